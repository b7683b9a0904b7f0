package orders_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/orders"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// owner is what an owner allows, in the hands of a test.
type owner struct {
	mu       sync.Mutex
	says     error
	reserved int64
}

func (o *owner) Check() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.says
}

func (o *owner) Reserve(size int64) (func(), error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.says != nil {
		return nil, o.says
	}
	o.reserved += size
	return func() { o.mu.Lock(); defer o.mu.Unlock(); o.reserved -= size }, nil
}

func (d *device) with(p *plane, set orders.Store, opt orders.Options) *device {
	client := &transfer.Client{HTTP: p.Client(), Base: func() []string { return []string{p.URL} }, Backoff: time.Millisecond}
	return &device{orders.New(set, client, opt), d.volume, d.dir}
}

// What the owner forbids now is refused before it costs anything, at arrival and
// when its turn has come, and says when to come back. All that is no bulk is done.
func TestOwnersLimitsRefuseBulkAndNothingElse(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	limits := &owner{}
	d = d.with(p, store.NewSet(d.volume), orders.Options{Limits: limits})
	held, heldData := someChunk(t, 50_000)
	other, otherData := someChunk(t, 50_001)
	p.files["/held"], p.files["/other"] = heldData, otherData
	storeOf := func(id chunk.ID, size int64, url string) (wire.Outcome, error) {
		return run(t, d, wire.KindChunkStore, wire.ChunkStore{ID: id.String(), Size: size, URL: url})
	}
	if _, err := storeOf(held, 50_000, "/held"); err != nil {
		t.Fatal(err)
	}
	if d.Pause() != nil {
		t.Errorf("it rests: %+v", d.Pause())
	}
	limits.says = wire.RejectedUntil(90*time.Minute, wire.CodeQuietHours, "not now")
	for kind, bulk := range map[wire.Kind]bool{
		wire.KindChunkStore: true, wire.KindChunkServe: true, wire.KindChunkDrop: false, wire.KindChunkLosses: false, wire.KindAudit: false, wire.KindJobRun: false, wire.KindUpdateInstall: false,
	} {
		if err := d.Refuse(wire.Order{Kind: kind}); (err != nil) != bulk {
			t.Errorf("%s at arrival: %v", kind, err)
		}
	}
	_, err := storeOf(other, 50_001, "/other")
	mustFail(t, err, wire.Rejected, wire.CodeQuietHours)
	if wire.ProblemOf(err).Seconds() != 5400 {
		t.Errorf("it says %+v", wire.ProblemOf(err))
	}
	_, err = run(t, d, wire.KindChunkServe, wire.ChunkServe{ID: held.String(), URL: "/up"})
	mustFail(t, err, wire.Rejected, wire.CodeQuietHours)
	if p.gets != 1 || len(p.puts) != 0 {
		t.Errorf("%d fetches, %d puts", p.gets, len(p.puts))
	}
	if pause := d.Pause(); pause == nil || *pause != (wire.Pause{Code: wire.CodeQuietHours, Seconds: 5400}) {
		t.Errorf("the heartbeat says %+v", pause)
	}
	// A chunk that is here costs nothing: its receipt is given.
	if _, err := storeOf(held, 50_000, "/held"); err != nil {
		t.Errorf("the receipt of what is held: %v", err)
	}
	out, err := run(t, d, wire.KindAudit, wire.Audit{Items: []wire.AuditItem{{Chunk: held.String()}}, Nonce: "00"})
	if err != nil || len(out.Body.(wire.AuditAnswer).Lost) != 0 {
		t.Errorf("an audit: %+v, %v", out.Body, err)
	}
	if _, err := run(t, d, wire.KindChunkDrop, wire.ChunkDrop{IDs: []string{held.String()}}); err != nil {
		t.Errorf("a drop: %v", err)
	}
	limits.says = nil
	if _, err := storeOf(other, 50_001, "/other"); err != nil || limits.reserved != 0 {
		t.Errorf("when it is allowed again: %v, %d bytes are still set aside", err, limits.reserved)
	}
}

// However many orders there are, the chunks that are under way fit the budget.
func TestManySlowTransfersStayWithinTheBudget(t *testing.T) {
	const n, size, memory = 64, 1 << 20, orders.LeastMemory
	var mu sync.Mutex
	var running, most int
	full, through := make(chan struct{}), make(chan struct{})
	files := map[string][]byte{}
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		if running++; running > most {
			most = running
		}
		if running == memory/size {
			select {
			case <-full:
			default:
				close(full)
			}
		}
		mu.Unlock()
		data := files[r.URL.Path]
		w.Header().Set("Content-Length", strconv.Itoa(len(data)))
		w.Write(data[:len(data)-1])
		w.(http.Flusher).Flush()
		<-through // the last byte takes its time
		mu.Lock()
		running--
		mu.Unlock()
		w.Write(data[len(data)-1:])
	}))
	t.Cleanup(s.Close)
	p := &plane{Server: s}
	d := newDevice(t, p, noFloor)
	d = d.with(p, store.NewSet(d.volume), orders.Options{Memory: memory})
	var list []wire.ChunkStore
	for i := range n {
		data := make([]byte, size)
		copy(data, fmt.Sprintf("chunk %d", i))
		path := fmt.Sprintf("/%d", i)
		files[path] = data
		list = append(list, wire.ChunkStore{ID: chunk.Sum(data).String(), Size: size, URL: path})
	}
	before := heap()
	done := make(chan error, n)
	for _, body := range list {
		go func() {
			_, err := run(t, d, wire.KindChunkStore, body)
			done <- err
		}()
	}
	<-full
	grown := heap() - before
	close(through)
	for range n {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if most != memory/size {
		t.Errorf("%d chunks of 1 MiB were under way at once with a budget of %d MiB", most, memory>>20)
	}
	// Besides the chunks: connections, and what the server of this test holds.
	if grown > memory+16<<20 {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
	t.Logf("%d orders of 1 MiB, a budget of %d MiB: %d at once, the heap has grown by %.1f MiB", n, memory>>20, most, float64(grown)/(1<<20))
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// slowDisk is a device's volumes on a disk that takes what it is given only when
// the test says so.
type slowDisk struct {
	*store.Set
	begun chan struct{}
	goOn  chan error
	asked atomic.Int32
}

func (s *slowDisk) Put(ctx context.Context, id chunk.ID, data []byte) (string, error) {
	s.begun <- struct{}{}
	select {
	case err := <-s.goOn:
		if err != nil {
			return "", err
		}
		return s.Set.Put(ctx, id, data)
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func (s *slowDisk) CanTake(size int64) error { s.asked.Add(1); return nil }

// While a disk hangs, chunks are refused as busy before they cost traffic; what
// was given to it counts as memory although its order has ended.
func TestADiskThatHangsRefusesChunksAndKeepsItsMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := &slowDisk{Set: store.NewSet(), begun: make(chan struct{}), goOn: make(chan error)}
		served := map[string][]byte{}
		var gets atomic.Int32
		web := &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			gets.Add(1)
			data := served[r.URL.Path]
			return &http.Response{StatusCode: 200, Header: http.Header{}, ContentLength: int64(len(data)), Body: io.NopCloser(bytes.NewReader(data)), Request: r}, nil
		})}
		client := &transfer.Client{HTTP: web, Base: func() []string { return []string{"https://plane.example"} }}
		d := &device{Service: orders.New(disk, client, orders.Options{Memory: orders.LeastMemory})}
		var list []wire.ChunkStore
		for i := range 4 {
			data := make([]byte, chunk.MaxSize)
			data[0] = byte(i)
			path := fmt.Sprintf("/%d", i)
			served[path] = data
			list = append(list, wire.ChunkStore{ID: chunk.Sum(data).String(), Size: chunk.MaxSize, URL: path})
		}
		ctx, cancel := context.WithCancel(t.Context())
		failed := make(chan error, 4)
		for i := range 2 {
			go func() {
				_, err := runIn(ctx, t, d, wire.KindChunkStore, list[i])
				failed <- err
			}()
			<-disk.begun
		}
		time.Sleep(6 * time.Second)
		_, err := run(t, d, wire.KindChunkStore, list[2])
		mustFail(t, err, wire.Rejected, wire.CodeBusy)
		if after := wire.ProblemOf(err).After; after != 6*time.Second {
			t.Errorf("it may be asked again in %s", after)
		}
		if err := d.Refuse(wire.Order{Kind: wire.KindChunkStore}); err == nil || d.Pause() == nil || d.Pause().Code != wire.CodeBusy {
			t.Errorf("at arrival: %v, in the heartbeat: %+v", err, d.Pause())
		}
		if err := d.Refuse(wire.Order{Kind: wire.KindChunkServe}); err != nil {
			t.Errorf("a slow disk refuses to serve: %v", err)
		}
		if gets.Load() != 2 {
			t.Errorf("%d chunks were fetched", gets.Load())
		}
		// The orders are taken back. Their chunks are still with the disk.
		cancel()
		for range 2 {
			if err := <-failed; !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
		}
		short, stop := context.WithTimeout(t.Context(), time.Hour)
		defer stop()
		_, err = runIn(short, t, d, wire.KindChunkServe, wire.ChunkServe{ID: list[0].ID, URL: "/up"})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the memory was given twice: %v", err)
		}
		// It answers at last, that it cannot be reached.
		for range 2 {
			disk.goOn <- wire.FailedBecause(wire.CodeUnreachable, "it hung")
		}
		synctest.Wait()
		_, err = run(t, d, wire.KindChunkServe, wire.ChunkServe{ID: list[0].ID, URL: "/up"})
		mustFail(t, err, wire.Failed, wire.CodeNotFound)
		// When it has rested, chunks are taken again.
		time.Sleep(2 * time.Hour)
		ok := make(chan error, 1)
		go func() {
			_, err := run(t, d, wire.KindChunkStore, list[3])
			ok <- err
		}()
		<-disk.begun
		disk.goOn <- wire.FailedBecause(wire.CodeUnreachable, "it hangs again")
		err = <-ok
		mustFail(t, err, wire.Failed, wire.CodeBusy)
		if wire.ProblemOf(err).After != time.Minute {
			t.Errorf("after a disk did not answer: %+v", wire.ProblemOf(err))
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Whatever the server does: the reason is told, nothing is kept, and the next
// order finds all memory free.
func TestWhateverTheServerDoesNothingIsKept(t *testing.T) {
	const size = chunk.MaxSize // two fill the memory
	id, data := someChunk(t, size)
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(data) }))
	t.Cleanup(elsewhere.Close)
	changed := bytes.Clone(data)
	changed[size/2] ^= 1
	refusal := func(status int, code, reason string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			json.NewEncoder(w).Encode(wire.APIError{Code: code, Reason: reason})
		}
	}
	// cut sends a half, and then answers the request for the rest.
	cut := func(rest http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v1"`)
			if r.Header.Get("Range") != "" {
				rest(w, r)
				return
			}
			w.Header().Set("Content-Length", strconv.Itoa(size))
			w.Write(data[:size/2])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
	}
	part := func(says string, body []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", says)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(body)
		}
	}
	half := size / 2
	for name, c := range map[string]struct {
		serve http.HandlerFunc
		code  string
		says  string
	}{
		"another chunk": {func(w http.ResponseWriter, _ *http.Request) { w.Write(changed) }, wire.CodeMismatch, "not of " + id.String()},
		"too short":     {func(w http.ResponseWriter, _ *http.Request) { w.Write(data[:size-1]) }, wire.CodeMismatch, "bytes came"},
		"nothing":       {func(http.ResponseWriter, *http.Request) {}, wire.CodeMismatch, "0 bytes came"},
		"too long":      {func(w http.ResponseWriter, _ *http.Request) { w.Write(data); w.Write(data) }, wire.CodeTransfer, "expected"},
		"said too long": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(size+1))
			w.Write(data)
		}, wire.CodeTransfer, "expected"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere.URL, http.StatusFound) }, wire.CodeTransfer, "redirects"},
		"expired":    {refusal(http.StatusForbidden, "bad_ticket", "the ticket has expired"), wire.CodeTransfer, "the ticket has expired"},
		"gone":       {refusal(http.StatusNotFound, "not_found", "it is not here"), wire.CodeTransfer, "it is not here"},
		"encoded": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			w.Write(data)
		}, wire.CodeTransfer, "gzip"},
		"a range that lies about its begin": {cut(part(fmt.Sprintf("bytes 0-%d/%d", size-1, size), data)), wire.CodeTransfer, "offers"},
		"a range that lies about its end":   {cut(part(fmt.Sprintf("bytes %d-%d/%d", half, size, size+1), data[half:])), wire.CodeTransfer, "offers"},
		"a range of other bytes":            {cut(part(fmt.Sprintf("bytes %d-%d/%d", half, size-1, size), changed[half:])), wire.CodeMismatch, "not of"},
		"a range with too much":             {cut(part(fmt.Sprintf("bytes %d-%d/%d", half, size-1, size), append(data[half:half:half], data...))), wire.CodeTransfer, ""},
		"a range with too little":           {cut(part(fmt.Sprintf("bytes %d-%d/%d", half, size-1, size), data[half:half+10])), wire.CodeTransfer, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := &plane{Server: httptest.NewUnstartedServer(c.serve)}
			p.Config.ErrorLog = log.New(io.Discard, "", 0)
			p.StartTLS()
			t.Cleanup(p.Close)
			d := newDevice(t, p, noFloor)
			d = d.with(p, store.NewSet(d.volume), orders.Options{Memory: orders.LeastMemory})
			for range 3 { // the third would wait for ever if memory were lost
				_, err := run(t, d, wire.KindChunkStore, wire.ChunkStore{ID: id.String(), Size: size, URL: "/c"})
				mustFail(t, err, wire.Failed, c.code)
				if !strings.Contains(err.Error(), c.says) {
					t.Errorf("it says %v", err)
				}
			}
			if s := d.volume.Stats(); s.Chunks != 0 || s.Lost != 0 || d.volume.Has(id) {
				t.Errorf("something was kept: %+v", s)
			}
		})
	}
}

// A server that goes on for ever, a byte at a time, holds an order until its end,
// and nothing after it.
func TestAServerThatIsSlowForEverHoldsNothingAfterTheOrder(t *testing.T) {
	sent := make(chan struct{}, 1<<16)
	p := &plane{Server: httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(chunk.MaxSize))
		for r.Context().Err() == nil {
			w.Write([]byte{0})
			w.(http.Flusher).Flush()
			select {
			case sent <- struct{}{}:
			case <-r.Context().Done():
			}
		}
	}))}
	t.Cleanup(p.Close)
	d := newDevice(t, p, noFloor)
	d = d.with(p, store.NewSet(d.volume), orders.Options{Memory: orders.LeastMemory})
	id, _ := someChunk(t, 1000)
	limit := &wire.Problem{State: wire.TimedOut, Code: wire.CodeLimit, Reason: "it was not done in time"}
	for range 3 {
		ctx, end := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := runIn(ctx, t, d, wire.KindChunkStore, wire.ChunkStore{ID: id.String(), Size: chunk.MaxSize, URL: "/c"})
			done <- err
		}()
		for range 20 {
			<-sent
		}
		end(limit)
		mustFail(t, <-done, wire.TimedOut, wire.CodeLimit)
	}
	if s := d.volume.Stats(); s.Chunks != 0 {
		t.Errorf("something was kept: %+v", s)
	}
}
