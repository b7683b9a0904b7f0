package orders_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/orders"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// plane is a data plane that serves and takes chunks and counts requests.
type plane struct {
	*httptest.Server
	mu    sync.Mutex
	files map[string][]byte
	gets  int
	puts  map[string][]byte
}

func newPlane(t *testing.T) *plane {
	p := &plane{files: map[string][]byte{}, puts: map[string][]byte{}}
	p.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		switch r.Method {
		case http.MethodGet:
			p.gets++
			data, ok := p.files[r.URL.Path]
			if !ok {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			w.Write(data)
		case http.MethodPut:
			body, _ := io.ReadAll(r.Body)
			p.puts[r.URL.Path] = body
		}
	}))
	t.Cleanup(p.Close)
	return p
}

type device struct {
	*orders.Service
	volume *store.Volume
	dir    string
}

func newDevice(t *testing.T, p *plane, opt store.Options) *device {
	dir := t.TempDir()
	v, err := store.Open(dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	client := &transfer.Client{
		HTTP: p.Client(), Base: func() []string { return []string{p.URL} },
		Backoff: time.Millisecond,
	}
	return &device{orders.New(store.NewSet(v), client, orders.Options{}), v, dir}
}

var noFloor = store.Options{FloorBytes: -1}

func run(t *testing.T, d *device, kind wire.Kind, body any) (wire.Outcome, error) {
	return runIn(t.Context(), t, d, kind, body)
}

func runIn(ctx context.Context, t *testing.T, d *device, kind wire.Kind, body any) (wire.Outcome, error) {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return d.Handlers()[kind](ctx, wire.Order{ID: "1", Kind: kind, Body: raw}, func(wire.Progress) {})
}

func mustFail(t *testing.T, err error, state wire.State, code string) {
	t.Helper()
	var p *wire.Problem
	if !errors.As(err, &p) || p.Code != code || p.State != state {
		t.Fatalf("got %v, want %s with the code %s", err, state, code)
	}
}

func someChunk(t *testing.T, size int) (chunk.ID, []byte) {
	t.Helper()
	rng := rand.New(rand.NewPCG(testenv.Seed(t), uint64(size)))
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	return chunk.Sum(data), data
}

func damage(t *testing.T, dir string, data []byte) (undo func()) {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(dir, "chunks", "*.seg"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range logs {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if i := bytes.Index(raw, data); i >= 0 {
			write := func(b byte) {
				f, err := os.OpenFile(path, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if _, err := f.WriteAt([]byte{b}, int64(i+5)); err != nil {
					t.Fatal(err)
				}
			}
			write(raw[i+5] ^ 1)
			return func() { write(raw[i+5]) }
		}
	}
	t.Fatal("the chunk is in no segment")
	return nil
}

func TestStoreGivesAReceiptAndARepeatTheSameWithoutFetching(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	id, data := someChunk(t, 300_000)
	p.files["/data/c"] = data
	order := wire.ChunkStore{ID: id.String(), Size: 300_000, URL: "/data/c"}
	want := wire.Receipt{ID: id.String(), Size: 300_000, Volume: d.volume.ID()}
	for range 3 {
		out, err := run(t, d, wire.KindChunkStore, order)
		if err != nil || out.Body != want {
			t.Fatalf("%+v, %v", out.Body, err)
		}
	}
	if p.gets != 1 {
		t.Fatalf("fetched %d times", p.gets)
	}
	if got, err := d.Read(t.Context(), id.String()); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	// Lost meanwhile: the repeat notices, fetches again, and the receipt is true.
	damage(t, d.dir, data)
	out, err := run(t, d, wire.KindChunkStore, order)
	if err != nil || out.Body != want || p.gets != 2 {
		t.Fatalf("%+v, %v, fetched %d times", out.Body, err, p.gets)
	}
	if got, err := d.Read(t.Context(), id.String()); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

func TestStoreRefusesWhatIsNotThePromisedChunk(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	id, data := someChunk(t, 100_000)
	changed := bytes.Clone(data)
	changed[50_000] ^= 1
	p.files["/changed"], p.files["/short"], p.files["/long"], p.files["/good"] = changed, data[:99_999], append(bytes.Clone(data), 0), data
	store := func(url string, size int64) error {
		_, err := run(t, d, wire.KindChunkStore, wire.ChunkStore{ID: id.String(), Size: size, URL: url})
		return err
	}
	mustFail(t, store("/changed", 100_000), wire.Failed, wire.CodeMismatch)
	mustFail(t, store("/short", 100_000), wire.Failed, wire.CodeMismatch)
	mustFail(t, store("/long", 100_000), wire.Failed, wire.CodeTransfer)
	mustFail(t, store("/none", 100_000), wire.Failed, wire.CodeTransfer)
	mustFail(t, store("https://elsewhere.example/x", 100_000), wire.Failed, wire.CodeTransfer)
	mustFail(t, store("/good", 0), wire.Rejected, wire.CodeBadBody)
	mustFail(t, store("/good", chunk.MaxSize+1), wire.Rejected, wire.CodeBadBody)
	if s := d.volume.Stats(); s.Chunks != 0 {
		t.Fatalf("something was kept: %+v", s)
	}
	if err := store("/good", 100_000); err != nil {
		t.Fatal(err)
	}
	mustFail(t, store("/good", 99_999), wire.Rejected, wire.CodeMismatch)
	for _, bad := range []string{"", "xyz", strings.ToUpper(id.String())} {
		_, err := run(t, d, wire.KindChunkStore, wire.ChunkStore{ID: bad, Size: 1, URL: "/good"})
		mustFail(t, err, wire.Rejected, wire.CodeBadBody)
	}
}

func TestAFullDeviceDoesNotFetch(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, store.Options{FloorBytes: -1, Capacity: 50_000})
	id, data := someChunk(t, 60_000)
	p.files["/c"] = data
	_, err := run(t, d, wire.KindChunkStore, wire.ChunkStore{ID: id.String(), Size: 60_000, URL: "/c"})
	mustFail(t, err, wire.Failed, wire.CodeNoSpace)
	if p.gets != 0 {
		t.Fatal("it was fetched in vain")
	}
}

func TestServePutsWhatVerifiesAndNothingElse(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	id, data := someChunk(t, 200_000)
	if err := d.volume.Put(t.Context(), id, data); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, d, wire.KindChunkServe, wire.ChunkServe{ID: id.String(), URL: "/up/1"}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p.puts["/up/1"], data) {
		t.Fatalf("%d bytes arrived", len(p.puts["/up/1"]))
	}
	damage(t, d.dir, data)
	_, err := run(t, d, wire.KindChunkServe, wire.ChunkServe{ID: id.String(), URL: "/up/2"})
	mustFail(t, err, wire.Failed, wire.CodeLost)
	other := chunk.Sum([]byte("never held"))
	_, err = run(t, d, wire.KindChunkServe, wire.ChunkServe{ID: other.String(), URL: "/up/2"})
	mustFail(t, err, wire.Failed, wire.CodeNotFound)
	if len(p.puts) != 1 {
		t.Fatal("something was served that is not whole")
	}
}

func TestDropIsIdempotentAndAllOrNothingOnBadIDs(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	id, data := someChunk(t, 2000)
	if err := d.volume.Put(t.Context(), id, data); err != nil {
		t.Fatal(err)
	}
	_, err := run(t, d, wire.KindChunkDrop, wire.ChunkDrop{IDs: []string{id.String(), "rubbish"}})
	mustFail(t, err, wire.Rejected, wire.CodeBadBody)
	if !d.volume.Has(id) {
		t.Fatal("an order that was rejected had an effect")
	}
	for range 2 {
		if _, err := run(t, d, wire.KindChunkDrop, wire.ChunkDrop{IDs: []string{id.String()}}); err != nil {
			t.Fatal(err)
		}
	}
	if d.volume.Has(id) {
		t.Fatal("it is still there")
	}
}

func TestAuditProvesWhatIsHeldAndConfessesTheRest(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	good, goodData := someChunk(t, 300_001)
	bad, badData := someChunk(t, 50_000)
	never := chunk.Sum([]byte("never held"))
	for id, data := range map[chunk.ID][]byte{good: goodData, bad: badData} {
		if err := d.volume.Put(t.Context(), id, data); err != nil {
			t.Fatal(err)
		}
	}
	damage(t, d.dir, badData)
	items := []wire.AuditItem{
		{Chunk: good.String(), Leaf: 73}, {Chunk: bad.String(), Leaf: 0}, {Chunk: good.String(), Leaf: 0},
		{Chunk: never.String(), Leaf: 0}, {Chunk: good.String(), Leaf: 73}, {Chunk: bad.String(), Leaf: 12},
	}
	out, err := run(t, d, wire.KindAudit, wire.Audit{Items: items, Nonce: "0a0b", Deadline: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	answer := out.Body.(wire.AuditAnswer)
	if answer.Nonce != "0a0b" || !slices.Equal(answer.Lost, []string{bad.String(), never.String()}) {
		t.Fatalf("%+v", answer)
	}
	var leaves []wire.AuditLeaf
	if err := json.Unmarshal(out.Attachment, &leaves); err != nil || len(leaves) != len(items) {
		t.Fatalf("%d leaves, %v", len(leaves), err)
	}
	for i, l := range leaves {
		if l.Chunk != items[i].Chunk || l.Leaf != items[i].Leaf {
			t.Fatalf("leaf %d answers %s/%d", i, l.Chunk, l.Leaf)
		}
		if l.Chunk != good.String() {
			if !l.Lost || l.Data != nil || l.Path != nil {
				t.Fatalf("a lost leaf says %+v", l)
			}
			continue
		}
		if err := chunk.VerifyLeaf(good, 300_001, l.Leaf, l.Data, l.Path); err != nil || l.Lost {
			t.Fatalf("leaf %d: %v", i, err)
		}
	}
	if len(d.volume.Lost()) != 1 {
		t.Fatal("the store does not know of the loss that was confessed")
	}
}

func TestAuditRespectsItsDeadline(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	id, data := someChunk(t, 5000)
	if err := d.volume.Put(t.Context(), id, data); err != nil {
		t.Fatal(err)
	}
	// A machine's clock may be wrong by an hour: it is the coordinator's that counts.
	early := func() time.Time { return time.Now().Add(-time.Hour) }
	behind := &device{orders.New(store.NewSet(d.volume), &transfer.Client{HTTP: p.Client()}, orders.Options{Now: early}), d.volume, d.dir}
	audit := wire.Audit{Items: []wire.AuditItem{{Chunk: id.String()}}, Deadline: early().Add(time.Minute)}
	if _, err := run(t, behind, wire.KindAudit, audit); err != nil {
		t.Fatalf("by the clock that the device goes by there is a minute left: %v", err)
	}
	audit.Deadline = time.Now().Add(-time.Second)
	_, err := run(t, d, wire.KindAudit, audit)
	mustFail(t, err, wire.TimedOut, wire.CodeExpired)
	if len(d.volume.Lost()) != 0 {
		t.Fatal("lateness was taken for loss")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	audit.Deadline = time.Now().Add(time.Hour)
	if _, err := runIn(ctx, t, d, wire.KindAudit, audit); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}

func TestAuditRefusesWhatCannotBeAsked(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	id, data := someChunk(t, 5000)
	if err := d.volume.Put(t.Context(), id, data); err != nil {
		t.Fatal(err)
	}
	for _, item := range []wire.AuditItem{{Chunk: id.String(), Leaf: 2}, {Chunk: id.String(), Leaf: -1}, {Chunk: "x"}, {Chunk: id.String(), Leaf: 1024}} {
		_, err := run(t, d, wire.KindAudit, wire.Audit{Items: []wire.AuditItem{item}})
		mustFail(t, err, wire.Rejected, wire.CodeBadBody)
	}
	_, err := run(t, d, wire.KindAudit, wire.Audit{Items: make([]wire.AuditItem, 2000)})
	mustFail(t, err, wire.Rejected, wire.CodeLimit)
}

func TestBodiesThatCannotBeRead(t *testing.T) {
	d := newDevice(t, newPlane(t), noFloor)
	for kind, handler := range d.Handlers() {
		_, err := handler(t.Context(), wire.Order{Kind: kind, Body: json.RawMessage(`[`)}, func(wire.Progress) {})
		mustFail(t, err, wire.Rejected, wire.CodeBadBody)
	}
	_, err := d.Read(t.Context(), "no id")
	mustFail(t, err, wire.Rejected, wire.CodeBadBody)
}

func losses(t *testing.T, d *device) (wire.LossReport, []wire.ChunkLoss) {
	t.Helper()
	out, err := run(t, d, wire.KindChunkLosses, struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	var list []wire.ChunkLoss
	if err := json.Unmarshal(out.Attachment, &list); err != nil {
		t.Fatal(err)
	}
	return out.Body.(wire.LossReport), list
}

func TestLossesAreToldUntilTheyAreDroppedAndOnlyThen(t *testing.T) {
	d := newDevice(t, newPlane(t), noFloor)
	if body, list := losses(t, d); body.Digest != "" || body.Count != 0 || len(list) != 0 {
		t.Errorf("of none: %+v, %v", body, list)
	}
	var ids []chunk.ID
	var undo func()
	for i := range 3 {
		id, data := someChunk(t, 50_000+i)
		if err := d.volume.Put(t.Context(), id, data); err != nil {
			t.Fatal(err)
		}
		if i < 2 {
			undo = damage(t, d.dir, data)
			if _, err := d.volume.Get(t.Context(), id); err == nil {
				t.Fatal("it was read")
			}
		}
		ids = append(ids, id)
	}
	body, list := losses(t, d)
	if want := wire.LossDigest([]string{ids[0].String(), ids[1].String()}); body.Digest != want || body.Count != 2 || len(list) != 2 || list[0].ID > list[1].ID {
		t.Fatalf("%+v, %+v", body, list)
	}
	for _, l := range list {
		if l.Volume != d.volume.ID() || l.Reason == "" || l.Found.IsZero() || l.Size < 50_000 {
			t.Errorf("%+v", l)
		}
	}
	// One that is whole is not dropped because somebody thought that it was lost.
	drop := wire.ChunkDrop{OnlyLost: true, IDs: []string{ids[0].String(), ids[2].String()}}
	if _, err := run(t, d, wire.KindChunkDrop, drop); err != nil {
		t.Fatal(err)
	}
	if !d.volume.Has(ids[2]) {
		t.Error("a whole chunk was dropped")
	}
	if body, _ = losses(t, d); body.Digest != wire.LossDigest([]string{ids[1].String()}) {
		t.Errorf("then %+v", body)
	}
	// Nor is one that was not readable for a while, and is.
	undo()
	if _, err := run(t, d, wire.KindChunkDrop, wire.ChunkDrop{OnlyLost: true, IDs: []string{ids[1].String()}}); err != nil {
		t.Fatal(err)
	}
	if body, _ = losses(t, d); !d.volume.Has(ids[1]) || body.Digest != "" {
		t.Errorf("a chunk that can be read again was dropped, or is told as lost: %+v", body)
	}
}

// What may be on a volume that is away is neither proved nor called lost.
func TestWhileAVolumeIsAwayWhatIsNotHeldIsNotCalledLost(t *testing.T) {
	p := newPlane(t)
	v, err := store.Open(t.TempDir(), noFloor)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	away := "the one in /mnt/b"
	d := &device{Service: orders.New(store.NewSet(v), &transfer.Client{HTTP: p.Client()}, orders.Options{Away: func() string { return away }}), volume: v}
	here, data := someChunk(t, 10_000)
	if err := v.Put(t.Context(), here, data); err != nil {
		t.Fatal(err)
	}
	there, _ := someChunk(t, 10_001)
	audit := func(id chunk.ID) (wire.Outcome, error) {
		return run(t, d, wire.KindAudit, wire.Audit{Nonce: "00", Items: []wire.AuditItem{{Chunk: id.String()}}})
	}
	_, err = audit(there)
	mustFail(t, err, wire.Failed, wire.CodeUnreachable)
	_, err = d.Read(t.Context(), there.String())
	mustFail(t, err, wire.Failed, wire.CodeUnreachable)
	_, err = run(t, d, wire.KindChunkServe, wire.ChunkServe{ID: there.String(), URL: "/x"})
	mustFail(t, err, wire.Failed, wire.CodeUnreachable)
	if out, err := audit(here); err != nil || len(out.Body.(wire.AuditAnswer).Lost) != 0 {
		t.Errorf("what is here: %+v, %v", out.Body, err)
	}
	away = ""
	if out, err := audit(there); err != nil || len(out.Body.(wire.AuditAnswer).Lost) != 1 {
		t.Errorf("with all volumes here: %+v, %v", out.Body, err)
	}
}

// What is held is named in the order of ids, after the one that was named last.
func TestHoldingsAreNamedInOrderAndAfterTheLast(t *testing.T) {
	p := newPlane(t)
	d := newDevice(t, p, noFloor)
	var all []string
	for i := range 5 {
		id, data := someChunk(t, 100+i)
		p.files["/data/"+id.String()] = data
		if _, err := run(t, d, wire.KindChunkStore, wire.ChunkStore{ID: id.String(), Size: int64(len(data)), URL: "/data/" + id.String()}); err != nil {
			t.Fatal(err)
		}
		all = append(all, id.String())
	}
	slices.Sort(all)
	for after, want := range map[string][]string{"": all, all[1]: all[2:], all[4]: {}} {
		out, err := run(t, d, wire.KindChunkHoldings, wire.ChunkHoldings{After: after})
		var got []string
		if err := errors.Join(err, json.Unmarshal(out.Attachment, &got)); err != nil {
			t.Fatal(err)
		}
		if holds := out.Body.(wire.Holdings); !slices.Equal(got, want) || holds.Count != len(all) {
			t.Errorf("after %q: %v of %d, want %v", after, got, holds.Count, want)
		}
	}
}
