package object

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// shelf is the part of a coordinator's API that this package uses, over real
// TLS. It does as it is told, so that the client can be shown every lie.
type shelf struct {
	mu      sync.Mutex
	chunks  map[string][]byte
	objects map[string]api.Object
	// odd may answer a request instead; it returns whether it has.
	odd func(w http.ResponseWriter, r *http.Request) bool

	underWay, most atomic.Int32 // requests for chunks
}

func newShelf(t *testing.T) (*shelf, *api.Client) {
	t.Helper()
	s := &shelf{chunks: map[string][]byte{}, objects: map[string]api.Object{}}
	srv := httptest.NewUnstartedServer(s)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // of connections that a client gives up
	srv.StartTLS()
	t.Cleanup(srv.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	c, err := api.NewClient(api.Context{URL: srv.URL, Token: "token", CA: string(ca)})
	must(t, err)
	return s, c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (s *shelf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	odd := s.odd
	s.mu.Unlock()
	if odd != nil && odd(w, r) {
		return
	}
	name := path.Base(r.URL.Path)
	if strings.HasPrefix(r.URL.Path, "/api/v1/chunks/") {
		n := s.underWay.Add(1)
		defer s.underWay.Add(-1)
		for old := s.most.Load(); n > old && !s.most.CompareAndSwap(old, n); old = s.most.Load() {
		}
		if r.Method == http.MethodPut {
			raw, err := io.ReadAll(r.Body)
			if err != nil {
				return // cut off
			}
			s.mu.Lock()
			s.chunks[name] = raw
			s.mu.Unlock()
			answer(w, http.StatusOK, api.Placement{Chunk: api.Chunk{ID: name, Size: int64(len(raw))}})
			return
		}
		s.mu.Lock()
		raw, ok := s.chunks[name]
		s.mu.Unlock()
		if !ok && r.URL.Query().Has("device") {
			refuse(w, http.StatusGone, wire.CodeLost)
			return
		}
		if !ok {
			refuse(w, http.StatusServiceUnavailable, "no_holder_online")
			return
		}
		_, _ = w.Write(raw)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if strings.HasSuffix(r.URL.Path, "/stripes") {
		var q api.StripeRequest
		_ = json.NewDecoder(r.Body).Decode(&q)
		out := api.Stripe{}
		for _, id := range q.Chunks {
			if raw, ok := s.chunks[id]; ok {
				out.Placed = append(out.Placed, api.Placement{Chunk: api.Chunk{ID: id, Size: int64(len(raw))}})
			}
		}
		answer(w, http.StatusOK, out)
		return
	}
	if strings.HasSuffix(r.URL.Path, "/placements") {
		list := []api.Placement{}
		for _, ch := range s.objects[path.Base(path.Dir(r.URL.Path))].Chunks {
			list = append(list, api.Placement{Chunk: ch, Holders: []api.Holder{{Device: "d"}}})
		}
		answer(w, http.StatusOK, list)
		return
	}
	if r.Method == http.MethodPut {
		var o api.Object
		_ = json.NewDecoder(r.Body).Decode(&o)
		s.objects[o.Name] = o
		answer(w, http.StatusOK, o)
		return
	}
	o, ok := s.objects[name]
	if !ok {
		refuse(w, http.StatusNotFound, wire.CodeNotFound)
		return
	}
	answer(w, http.StatusOK, o)
}

func answer(w http.ResponseWriter, status int, v any) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

func refuse(w http.ResponseWriter, status int, code string) {
	answer(w, status, wire.APIError{Code: code, Reason: "it is refused (" + code + ")"})
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func randomBytes(t *testing.T, n int) []byte {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), byte(seed >> 32), byte(seed >> 40), byte(seed >> 48), byte(seed >> 56)})
	b := make([]byte, n)
	_, _ = src.Read(b)
	return b
}

const several = 5*chunk.DefaultSize + 5 // bytes: more chunks than are under way at once

func TestWhatIsPutComesBack(t *testing.T) {
	s, c := newShelf(t)
	for _, n := range []int{0, 1, chunk.DefaultSize, several} {
		clear(s.objects)
		data := randomBytes(t, n)
		var told atomic.Int64
		o, placed, err := PutPlain(testContext(t), c, "f", bytes.NewReader(data), 2, func(b int64) { told.Add(b) })
		must(t, err)
		sum := sha256.Sum256(data)
		if o.Size != int64(n) || o.SHA256 != hex.EncodeToString(sum[:]) || told.Load() != int64(n) || len(placed) != len(o.Chunks) {
			t.Errorf("%d bytes: %+v, %d told, %d placements", n, o, told.Load(), len(placed))
		}
		for i, p := range placed {
			if p.Chunk != o.Chunks[i] {
				t.Errorf("placement %d is of %v, the chunk is %v", i, p.Chunk, o.Chunks[i])
			}
		}
		told.Store(0)
		var out bytes.Buffer
		if _, err := Get(testContext(t), c, "f", &out, &GetOptions{Progress: func(b int64) { told.Add(b) }}); err != nil || !bytes.Equal(out.Bytes(), data) || told.Load() != int64(n) {
			t.Errorf("%d bytes: %d came back, %v", n, out.Len(), err)
		}
	}
	if most := s.most.Load(); most > atOnce+1 {
		t.Errorf("%d chunks were under way at once", most)
	}
}

// Every lie of whoever is in between is found out, and what has been written by
// then is right.
func TestGetRefusesDamagedData(t *testing.T) {
	for name, lie := range map[string]func(s *shelf, o *api.Object){
		"a flipped bit": func(s *shelf, o *api.Object) { s.chunks[o.Chunks[3].ID][7] ^= 1 },
		"a cut chunk":   func(s *shelf, o *api.Object) { s.chunks[o.Chunks[3].ID] = s.chunks[o.Chunks[3].ID][:100] },
		"a long chunk": func(s *shelf, o *api.Object) {
			s.chunks[o.Chunks[3].ID] = append(bytes.Clone(s.chunks[o.Chunks[3].ID]), 0)
		},
		"an empty chunk":          func(s *shelf, o *api.Object) { s.chunks[o.Chunks[3].ID] = nil },
		"another chunk":           func(s *shelf, o *api.Object) { s.chunks[o.Chunks[3].ID] = s.chunks[o.Chunks[4].ID] },
		"chunks in another order": func(_ *shelf, o *api.Object) { o.Chunks[3], o.Chunks[4] = o.Chunks[4], o.Chunks[3] },
		"a chunk left out":        func(_ *shelf, o *api.Object) { o.Chunks = append(o.Chunks[:3], o.Chunks[4:]...) },
		"another size":            func(_ *shelf, o *api.Object) { o.Chunks[3].Size-- },
		"another digest":          func(_ *shelf, o *api.Object) { o.SHA256 = strings.Repeat("0", 64) },
	} {
		t.Run(name, func(t *testing.T) {
			s, c := newShelf(t)
			data := randomBytes(t, several)
			o, _, err := PutPlain(testContext(t), c, "f", bytes.NewReader(data), 1, nil)
			must(t, err)
			lie(s, &o)
			s.objects["f"] = o
			var out bytes.Buffer
			_, err = Get(testContext(t), c, "f", &out, nil)
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("%v", err)
			}
			if strings.Contains(name, "chunk") && !strings.Contains(name, "chunks") && !strings.Contains(name, "left out") && !bytes.HasPrefix(data, out.Bytes()) {
				t.Error("wrong bytes were written")
			}
		})
	}
}

func TestPutStopsAtTheFirstRefusal(t *testing.T) {
	s, c := newShelf(t)
	var puts atomic.Int32
	s.odd = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet {
			return false
		}
		if strings.Contains(r.URL.Path, "/objects/") {
			t.Error("an object was named though its chunks are not placed")
		}
		if puts.Add(1) < 3 {
			return false
		}
		_, _ = io.Copy(io.Discard, r.Body)
		refuse(w, http.StatusInsufficientStorage, wire.CodeNoSpace)
		return true
	}
	// An endless file: Put must stop by itself.
	_, _, err := PutPlain(testContext(t), c, "f", endless{}, 2, nil)
	var e *api.Error
	if !errors.As(err, &e) || e.Code != wire.CodeNoSpace {
		t.Errorf("%v", err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

type brokenFile struct{ n int }

func (b *brokenFile) Read(p []byte) (int, error) {
	if b.n -= len(p); b.n < 0 {
		return 0, errors.New("input/output error")
	}
	return len(p), nil
}

type full struct{ room int }

var errFull = errors.New("no space left on device")

func (f *full) Write(p []byte) (int, error) {
	if f.room -= len(p); f.room < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestLocalFaultsAreTold(t *testing.T) {
	s, c := newShelf(t)
	_, _, err := PutPlain(testContext(t), c, "f", &brokenFile{several}, 1, nil)
	if err == nil || !strings.Contains(err.Error(), "the file cannot be read") || len(s.objects) != 0 {
		t.Errorf("%v, %d objects", err, len(s.objects))
	}
	_, _, err = PutPlain(testContext(t), c, "f", bytes.NewReader(randomBytes(t, several)), 1, nil)
	must(t, err)
	if _, err := Get(testContext(t), c, "f", &full{chunk.DefaultSize + 1}, nil); !errors.Is(err, errFull) {
		t.Errorf("%v", err)
	}
	var e *api.Error
	if _, err := Get(testContext(t), c, "none", io.Discard, nil); !errors.As(err, &e) || e.Status != http.StatusNotFound {
		t.Errorf("%v", err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := PutPlain(ended, c, "g", endless{}, 1, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if _, err := Get(ended, c, "f", io.Discard, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// A name that is taken costs no upload; the same content is a repeat.
func TestATakenNameIsRefusedBeforeTheFirstChunk(t *testing.T) {
	s, c := newShelf(t)
	data := randomBytes(t, several)
	_, _, err := PutPlain(testContext(t), c, "f", bytes.NewReader(data), 1, nil)
	must(t, err)
	if _, _, err := PutPlain(testContext(t), c, "f", bytes.NewReader(data), 1, nil); err != nil {
		t.Errorf("the same again: %v", err)
	}
	other := bytes.Clone(data)
	other[2*chunk.DefaultSize]++
	s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if r.Method == http.MethodPut && s.chunks[path.Base(r.URL.Path)] == nil {
			t.Error("something new was sent")
		}
		return false
	}
	for name, data := range map[string][]byte{"other": randomBytes(t, 10), "other in the middle": other, "longer": append(bytes.Clone(data), 1)} {
		_, _, err := PutPlain(testContext(t), c, "f", bytes.NewReader(data), 1, nil)
		var e *api.Error
		if !errors.As(err, &e) || e.Code != "exists" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAFileThatIsKnownToBeTooLargeIsNotBegun(t *testing.T) {
	s, c := newShelf(t)
	defer func(n int) { maxChunks = n }(maxChunks)
	maxChunks = 3
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(3*chunk.DefaultSize+1))
	_, _, err = PutPlain(testContext(t), c, "f", f, 1, nil)
	if err == nil || !strings.Contains(err.Error(), "more than 3 chunks") || len(s.chunks) != 0 {
		t.Errorf("%v, %d chunks sent", err, len(s.chunks))
	}
}

// The limit is told before the last chunk has gone over the line, not after.
func TestAFileThatIsTooLargeIsRefusedInTime(t *testing.T) {
	s, c := newShelf(t)
	defer func(n int) { maxChunks = n }(maxChunks)
	maxChunks = 3
	_, _, err := PutPlain(testContext(t), c, "f", endless{}, 1, nil)
	if err == nil || !strings.Contains(err.Error(), "more than 3 chunks") || len(s.objects) != 0 {
		t.Errorf("%v, %d objects", err, len(s.objects))
	}
	if _, _, err := PutPlain(testContext(t), c, "f", bytes.NewReader(randomBytes(t, 3*chunk.DefaultSize)), 1, nil); err != nil {
		t.Errorf("a file of exactly that size: %v", err)
	}
}
