package object

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
)

// seeded is a source of chance that DEIMOS_TEST_SEED repeats.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(testenv.Seed(t), 0))
}

func someOf(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func newIdentity(t *testing.T) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	must(t, err)
	return id
}

func newSession(t *testing.T, code api.Code, size int, ids ...*age.X25519Identity) *Session {
	t.Helper()
	var to []age.Recipient
	for _, id := range ids {
		to = append(to, id.Recipient())
	}
	s, err := NewSession(code, int64(size), to)
	must(t, err)
	return s
}

// putCoded stores data with small shards, so that there are several stripes.
func putCoded(t *testing.T, c *api.Client, name string, data []byte, code api.Code, payload int, id *age.X25519Identity) *Object {
	t.Helper()
	s := newSession(t, code, len(data), id)
	s.Payload = payload
	o, placed, err := Put(testContext(t), c, name, bytes.NewReader(data), s, PutOptions{})
	must(t, err)
	if len(placed) != len(o.Chunks) {
		t.Fatalf("%d placements of %d shards", len(placed), len(o.Chunks))
	}
	return o
}

func keyOf(id *age.X25519Identity) *GetOptions { return &GetOptions{Identities: []age.Identity{id}} }

func TestWhatIsEncryptedComesBackBitForBit(t *testing.T) {
	rng := seeded(t)
	id := newIdentity(t)
	rounds := 60
	if testing.Short() {
		rounds = 20
	}
	for round := range rounds {
		s, c := newShelf(t)
		code := api.Code{Data: 1 + rng.IntN(6), Parity: rng.IntN(4)}
		payload := 1 + rng.IntN(3000)
		full := payload * code.Data
		size := []int{0, 1, payload - 1, payload, payload + 1, full - 1, full, full + 1, 3*full + rng.IntN(full), rng.IntN(8 * full)}[round%10]
		data := someOf(rng, size)
		o := putCoded(t, c, "f", data, code, payload, id)
		sum := sha256.Sum256(data)
		if o.Digest() != hex.EncodeToString(sum[:]) || o.Size != int64(size) || o.SHA256 != "" {
			t.Fatalf("%d bytes, code %s, payload %d: %+v", size, code, payload, o)
		}
		for _, ch := range o.Chunks {
			if raw := s.chunks[ch.ID]; len(raw) != int(ch.Size) || chunk.Sum(raw).String() != ch.ID {
				t.Fatal("a shard is not what its id says")
			} else if n := len(raw); size > 100 && n > 60 && bytes.Contains(raw, data[:32]) {
				t.Fatal("the file can be read in a shard")
			}
		}
		// Any m of each stripe may be gone.
		for stripe := range slices.Chunk(o.Chunks, code.Shards()) {
			for _, i := range rng.Perm(len(stripe))[:code.Parity] {
				delete(s.chunks, stripe[i].ID)
			}
		}
		var out bytes.Buffer
		if _, err := Get(testContext(t), c, "f", &out, keyOf(id)); err != nil || !bytes.Equal(out.Bytes(), data) {
			t.Fatalf("%d bytes, code %s, payload %d: %d came back, %v", size, code, payload, out.Len(), err)
		}
		obj, err := Open(testContext(t), c, "f", []age.Identity{id})
		must(t, err)
		for range 5 {
			from := rng.IntN(size + 1)
			to := from + rng.IntN(size-from+1)
			out.Reset()
			if err := obj.WriteRange(testContext(t), c, &out, int64(from), int64(to), nil); err != nil || !bytes.Equal(out.Bytes(), data[from:to]) {
				t.Fatalf("range %d-%d of %d bytes, code %s, payload %d: %d came back, %v", from, to, size, code, payload, out.Len(), err)
			}
		}
	}
}

func TestOneShardMoreThanParityGoneIsSaidSo(t *testing.T) {
	shortOutages(t, 10*time.Millisecond)
	s, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 5000)
	o := putCoded(t, c, "f", data, api.Code{Data: 3, Parity: 2}, 500, id)
	for _, ch := range o.Chunks[5:8] {
		delete(s.chunks, ch.ID)
	}
	var out bytes.Buffer
	_, err := Get(testContext(t), c, "f", &out, keyOf(id))
	if err == nil || !strings.Contains(err.Error(), "stripe 1: 2 of 5 shards can be read, it takes 3") || !bytes.Equal(out.Bytes(), data[:1500]) {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
}

func TestARangeFetchesOnlyTheShardsThatItTouches(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 40_000)
	o := putCoded(t, c, "f", data, api.Code{Data: 4, Parity: 2}, 1000, id)
	obj, err := Open(testContext(t), c, "f", []age.Identity{id})
	must(t, err)
	var mu sync.Mutex
	asked := map[string]bool{}
	s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		asked[path.Base(r.URL.Path)] = true
		return false
	}
	var out bytes.Buffer
	must(t, obj.WriteRange(testContext(t), c, &out, 5500, 6500, nil)) // stripe 1, shards 1 and 2
	want := []string{o.Chunks[7].ID, o.Chunks[8].ID}
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(asked)); !slices.Equal(got, want) || !bytes.Equal(out.Bytes(), data[5500:6500]) {
		t.Errorf("asked for %d shards", len(got))
	}
	for _, r := range [][2]int64{{-1, 5}, {5, 4}, {0, 40_001}} {
		if err := obj.WriteRange(testContext(t), c, io.Discard, r[0], r[1], nil); err == nil {
			t.Errorf("range %v of 40000 bytes was given", r)
		}
	}
}

// A device that never answers costs its shard, not the file: nobody waits for
// the end of its silence, which here never comes.
func TestASilentDeviceIsReadAround(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 100_000)
	o := putCoded(t, c, "f", data, api.Code{Data: 4, Parity: 2}, 1000, id)
	silent := map[string]bool{}
	for stripe := range slices.Chunk(o.Chunks, 6) {
		silent[stripe[1].ID], silent[stripe[3].ID] = true, true
	}
	s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
		if silent[path.Base(r.URL.Path)] {
			<-r.Context().Done()
			return true
		}
		return false
	}
	var out bytes.Buffer
	if _, err := Get(testContext(t), c, "f", &out, keyOf(id)); err != nil || !bytes.Equal(out.Bytes(), data) {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
}

// Whatever the coordinator says, w gets right bytes or none.
func TestEveryLieAboutWhatIsEncryptedIsFoundOut(t *testing.T) {
	id, other := newIdentity(t), newIdentity(t)
	code := api.Code{Data: 2, Parity: 1}
	edit := func(o *api.Object, f func(e *envelope)) {
		var e envelope
		_ = json.Unmarshal(o.Manifest, &e)
		f(&e)
		o.Manifest, _ = json.Marshal(e)
	}
	all := func(s *shelf, o *api.Object, stripe int, f func(raw []byte) []byte) {
		for _, ch := range o.Chunks[stripe*3:][:3] {
			s.chunks[ch.ID] = f(s.chunks[ch.ID])
		}
	}
	s, c := newShelf(t)
	data := randomBytes(t, 5500)
	o, second := putCoded(t, c, "f", data, code, 1000, id), putCoded(t, c, "g", randomBytes(t, 5500), code, 1000, id)
	chunks := s.chunks
	for name, lie := range map[string]func(s *shelf, o, second *api.Object){
		"flipped bits":         func(s *shelf, o, _ *api.Object) { all(s, o, 1, func(b []byte) []byte { b[20] ^= 1; return b }) },
		"cut shards":           func(s *shelf, o, _ *api.Object) { all(s, o, 1, func(b []byte) []byte { return b[:10] }) },
		"empty shards":         func(s *shelf, o, _ *api.Object) { all(s, o, 1, func([]byte) []byte { return nil }) },
		"long shards":          func(s *shelf, o, _ *api.Object) { all(s, o, 1, func(b []byte) []byte { return append(b, 0) }) },
		"shards swapped":       func(_ *shelf, o, _ *api.Object) { o.Chunks[3], o.Chunks[4] = o.Chunks[4], o.Chunks[3] },
		"stripes swapped":      func(_ *shelf, o, _ *api.Object) { o.Chunks = slices.Concat(o.Chunks[3:6], o.Chunks[:3], o.Chunks[6:]) },
		"a stripe left out":    func(_ *shelf, o, _ *api.Object) { o.Chunks = o.Chunks[3:] },
		"the last stripe gone": func(_ *shelf, o, _ *api.Object) { o.Chunks = o.Chunks[:len(o.Chunks)-3] },
		"no stripes":           func(_ *shelf, o, _ *api.Object) { o.Chunks = nil },
		"a stripe twice":       func(_ *shelf, o, _ *api.Object) { o.Chunks = append(o.Chunks, o.Chunks[:3]...) },
		"another size":         func(_ *shelf, o, _ *api.Object) { o.Size-- },
		"another code":         func(_ *shelf, o, _ *api.Object) { o.Code = &api.Code{Data: 1, Parity: 2} },
		"the other's chunks":   func(_ *shelf, o, second *api.Object) { o.Chunks = second.Chunks },
		"the other's manifest": func(_ *shelf, o, second *api.Object) { o.Manifest = second.Manifest },
		"the other file":       func(_ *shelf, o, second *api.Object) { n := o.Name; *o = *second; o.Name = n },
		"the other's record":   func(_ *shelf, o, second *api.Object) { *o = *second },
		"no manifest":          func(_ *shelf, o, _ *api.Object) { o.Manifest = nil },
		"a cut manifest":       func(_ *shelf, o, _ *api.Object) { o.Manifest = o.Manifest[:len(o.Manifest)/2] },
		"a cut seal":           func(_ *shelf, o, _ *api.Object) { edit(o, func(e *envelope) { e.Sealed = e.Sealed[:20] }) },
		"an altered seal":      func(_ *shelf, o, _ *api.Object) { edit(o, func(e *envelope) { e.Sealed[30] ^= 1 }) },
		"a cut key":            func(_ *shelf, o, _ *api.Object) { edit(o, func(e *envelope) { e.Key = e.Key[:len(e.Key)-1] }) },
		"a key of another file": func(_ *shelf, o, second *api.Object) {
			var e envelope
			_ = json.Unmarshal(second.Manifest, &e)
			edit(o, func(mine *envelope) { mine.Key = e.Key })
		},
		"plain, though it was not": func(_ *shelf, o, _ *api.Object) {
			o.Code, o.Manifest = nil, nil
			o.Chunks = o.Chunks[:1]
			o.Size = o.Chunks[0].Size
		},
		"a huge manifest": func(_ *shelf, o, _ *api.Object) { o.Manifest = make([]byte, api.MaxManifest+1) },
	} {
		t.Run(name, func(t *testing.T) {
			o, second := o.Object, second.Object
			o.Chunks, second.Chunks = slices.Clone(o.Chunks), slices.Clone(second.Chunks)
			s.mu.Lock() // the server may still be at the request of the case before
			s.chunks = map[string][]byte{}
			for id, raw := range chunks {
				s.chunks[id] = bytes.Clone(raw)
			}
			lie(s, &o, &second)
			s.objects["f"] = o
			s.mu.Unlock()
			var out bytes.Buffer
			_, err := Get(testContext(t), c, "f", &out, keyOf(id))
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrPlain) {
				t.Errorf("%v", err)
			}
			if !bytes.HasPrefix(data, out.Bytes()) {
				t.Error("wrong bytes were written")
			}
		})
	}
	t.Run("another key", func(t *testing.T) {
		_, c := newShelf(t)
		putCoded(t, c, "f", randomBytes(t, 100), code, 1000, id)
		for _, o := range []*GetOptions{keyOf(other), nil} {
			if _, err := Get(testContext(t), c, "f", io.Discard, o); !errors.Is(err, ErrNoKey) {
				t.Errorf("%v", err)
			}
		}
	})
	t.Run("another version", func(t *testing.T) {
		s, c := newShelf(t)
		o := putCoded(t, c, "f", randomBytes(t, 100), code, 1000, id)
		edit(&o.Object, func(e *envelope) { e.Version = 2 })
		s.objects["f"] = o.Object
		if _, err := Get(testContext(t), c, "f", io.Discard, keyOf(id)); err == nil || !strings.Contains(err.Error(), "version 2") {
			t.Errorf("%v", err)
		}
	})
}

func TestEachRecipientCanReadAndNobodyElse(t *testing.T) {
	_, c := newShelf(t)
	a, b := newIdentity(t), newIdentity(t)
	data := randomBytes(t, 3000)
	_, _, err := Put(testContext(t), c, "f", bytes.NewReader(data), newSession(t, DefaultCode, len(data), a, b), PutOptions{})
	must(t, err)
	for _, id := range []*age.X25519Identity{a, b} {
		var out bytes.Buffer
		if _, err := Get(testContext(t), c, "f", &out, keyOf(id)); err != nil || !bytes.Equal(out.Bytes(), data) {
			t.Errorf("%v", err)
		}
	}
}

// What was placed before a put was cut off is not sent again, wherever that was.
func TestAPutGoesOnWhereItWasCutOff(t *testing.T) {
	rng := seeded(t)
	id := newIdentity(t)
	for range 10 {
		s, c := newShelf(t)
		data := someOf(rng, 30_000+rng.IntN(5000))
		session := newSession(t, api.Code{Data: 3, Parity: 2}, len(data), id)
		session.Payload = 1000
		ctx, cancel := context.WithCancel(testContext(t))
		left := int32(1 + rng.IntN(40))
		s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut && atomic.AddInt32(&left, -1) == 0 {
				cancel()
			}
			return false
		}
		if _, _, err := Put(ctx, c, "f", bytes.NewReader(data), session, PutOptions{}); !errors.Is(err, context.Canceled) {
			t.Fatalf("%v", err)
		}
		raw, err := json.Marshal(session) // as in a state file
		must(t, err)
		session = new(Session)
		must(t, json.Unmarshal(raw, session))
		var again atomic.Int32
		s.mu.Lock()
		before := maps.Clone(s.chunks)
		s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
			if before[path.Base(r.URL.Path)] != nil && r.Method == http.MethodPut {
				again.Add(1)
			}
			return false
		}
		s.mu.Unlock()
		var told atomic.Int64
		o, _, err := Put(testContext(t), c, "f", bytes.NewReader(data), session, PutOptions{Progress: func(n int64) { told.Add(n) }})
		must(t, err)
		// A request that was under way when it was cut off may have come late.
		if n := again.Load(); n > 0 || len(before) == 0 || told.Load() != int64(len(data)) {
			t.Errorf("%d of %d shards were sent again, %d bytes told", n, len(before), told.Load())
		}
		for id := range before {
			if !slices.ContainsFunc(o.Chunks, func(ch api.Chunk) bool { return ch.ID == id }) {
				t.Error("what was placed before is not part of the object")
			}
		}
		var out bytes.Buffer
		if _, err := Get(testContext(t), c, "f", &out, keyOf(id)); err != nil || !bytes.Equal(out.Bytes(), data) {
			t.Errorf("%v", err)
		}
	}
}

// One key for two versions of a file: no nonce serves two payloads, which would
// show their difference.
func TestAChangedFileUnderTheSameKeyUsesOtherNonces(t *testing.T) {
	k, err := deriveKeys(make([]byte, keySize))
	must(t, err)
	a := k.sealShard(make([]byte, 200), DefaultCode, 7, []byte("before"))
	b := k.sealShard(make([]byte, 200), DefaultCode, 7, []byte("behind"))
	same := k.sealShard(make([]byte, 200), DefaultCode, 7, []byte("before"))
	elsewhere := k.sealShard(make([]byte, 200), DefaultCode, 8, []byte("before"))
	if bytes.Equal(a[:nonceSize], b[:nonceSize]) || bytes.Equal(a[:nonceSize], elsewhere[:nonceSize]) || !bytes.Equal(a, same) {
		t.Error("nonces do not follow the payload and its place")
	}
}

func TestTheSameFileUnderItsNameIsARepeat(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	file := filepath.Join(t.TempDir(), "f")
	data := randomBytes(t, 5000)
	must(t, os.WriteFile(file, data, 0o600))
	put := func(o PutOptions) error {
		f, err := os.Open(file)
		must(t, err)
		defer f.Close()
		_, _, err = Put(testContext(t), c, "f", f, newSession(t, DefaultCode, len(data), id), o)
		return err
	}
	must(t, put(PutOptions{}))
	s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut {
			t.Error("something was sent")
		}
		return false
	}
	must(t, put(PutOptions{Identities: []age.Identity{id}}))
	var e *api.Error
	if err := put(PutOptions{Identities: []age.Identity{newIdentity(t)}}); !errors.As(err, &e) || e.Code != "exists" {
		t.Errorf("with another key: %v", err)
	}
	data[3]++
	must(t, os.WriteFile(file, data, 0o600))
	if err := put(PutOptions{Identities: []age.Identity{id}}); !errors.As(err, &e) || e.Code != "exists" {
		t.Errorf("another file: %v", err)
	}
}

func TestAPartIsGoneOnWithAndCheckedWithTheRest(t *testing.T) {
	_, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 20_000)
	putCoded(t, c, "f", data, api.Code{Data: 3, Parity: 1}, 1000, id)
	o, err := Open(testContext(t), c, "f", []age.Identity{id})
	must(t, err)
	for _, n := range []int{0, 1, 999, 3000, 10_001, 20_000} {
		var out bytes.Buffer
		if err := o.Resume(testContext(t), c, bytes.NewReader(data[:n]), int64(n), &out, nil); err != nil || !bytes.Equal(out.Bytes(), data[n:]) {
			t.Errorf("after %d bytes: %d came, %v", n, out.Len(), err)
		}
	}
	bad := bytes.Clone(data[:5000])
	bad[4999] ^= 1
	if err := o.Resume(testContext(t), c, bytes.NewReader(bad), 5000, io.Discard, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("a part that is wrong: %v", err)
	}
}

func TestVerifyNamesEachShardThatIsMissingOrWrong(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	o := putCoded(t, c, "f", randomBytes(t, 9000), api.Code{Data: 2, Parity: 1}, 1000, id)
	if r, err := Verify(testContext(t), c, o.Object, nil); err != nil || len(r.Faults) != 0 || r.Read != len(o.Chunks) || r.Least != 3 || r.Needed != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	s.chunks[o.Chunks[4].ID][5] ^= 1
	delete(s.chunks, o.Chunks[3].ID)
	r, err := Verify(testContext(t), c, o.Object, nil)
	must(t, err)
	if len(r.Faults) != 2 || r.Faults[0].Stripe != 1 || r.Faults[0].Shard != 0 || r.Faults[1].Shard != 1 || r.Faults[1].Device != "d" || r.Least != 1 {
		t.Errorf("%+v", r)
	}
}

// No two shards of a stripe may be one chunk, or one device could hold both.
func TestAllShardsOfAStripeDiffer(t *testing.T) {
	id := newIdentity(t)
	_, c := newShelf(t)
	for k := 1; k <= 5; k++ {
		for m := range 6 {
			o := putCoded(t, c, fmt.Sprintf("%d+%d", k, m), make([]byte, 5000), api.Code{Data: k, Parity: m}, 1000, id)
			seen := map[string]bool{}
			for _, ch := range o.Chunks {
				seen[ch.ID] = true
			}
			if len(seen) != len(o.Chunks) {
				t.Errorf("%d+%d: %d chunks for %d shards", k, m, len(seen), len(o.Chunks))
			}
		}
	}
}

// Who rebuilds has no key: k shards make every other one.
func TestAnyShardsOfDataMakeTheOthers(t *testing.T) {
	rng := seeded(t)
	id := newIdentity(t)
	s, c := newShelf(t)
	for i := range 30 {
		code := api.Code{Data: 1 + rng.IntN(6), Parity: 1 + rng.IntN(4)}
		o := putCoded(t, c, fmt.Sprint("f", i), someOf(rng, 500), code, 1000, id)
		shards := make([][]byte, code.Shards())
		for _, i := range rng.Perm(code.Shards())[:code.Data] {
			shards[i] = s.chunks[o.Chunks[i].ID]
		}
		must(t, Reconstruct(code, shards))
		for i, sh := range shards {
			if chunk.Sum(sh).String() != o.Chunks[i].ID {
				t.Errorf("code %s: shard %d was made wrong", code, i)
			}
		}
	}
}

func TestLargeFilesGetLargerShardsAndTheLimitIsToldAtOnce(t *testing.T) {
	most := int64(api.MaxChunks/6) * 4 * (chunk.MaxSize - overhead)
	for size, want := range map[int64]int{0: chunk.DefaultSize, 1: chunk.DefaultSize, 6 << 30: chunk.DefaultSize, 10 << 30: 2 << 20, 20 << 30: 4 << 20, most: 4 << 20, -1: 4 << 20} {
		if got, err := payloadFor(size, DefaultCode); err != nil || got+overhead != want {
			t.Errorf("%d bytes: shards of %d, %v", size, got+overhead, err)
		}
	}
	if _, err := payloadFor(most+1, DefaultCode); err == nil || !strings.Contains(err.Error(), fmt.Sprint(most)) {
		t.Errorf("%v", err)
	}
	// Of a stream, it is found out on the way.
	s, c := newShelf(t)
	defer func(n int) { maxChunks = n }(maxChunks)
	maxChunks = 6
	session := newSession(t, api.Code{Data: 1, Parity: 1}, 3, newIdentity(t))
	session.Payload = 1000
	if _, _, err := Put(testContext(t), c, "f", endless{}, session, PutOptions{}); err == nil || !strings.Contains(err.Error(), "at most") || len(s.objects) != 0 {
		t.Errorf("%v", err)
	}
	if _, _, err := Put(testContext(t), c, "f", bytes.NewReader(make([]byte, 3000)), session, PutOptions{}); err != nil {
		t.Errorf("a file of exactly that size: %v", err)
	}
}

func TestCodesAreReadAsPeopleWriteThem(t *testing.T) {
	for _, s := range []string{"4+2", "1+0", "1+1", "16+16", "31+1"} {
		if c, err := ParseCode(s); err != nil || c.String() != s {
			t.Errorf("%q: %v, %v", s, c, err)
		}
	}
	for _, s := range []string{"", "4", "4+", "+2", "0+2", "4+-1", "-1+4", "20+20", "4+2+1", "a+b", "9999999999999999999+1", "32+1"} {
		if c, err := ParseCode(s); err == nil {
			t.Errorf("%q was taken for %s", s, c)
		}
	}
}

// disk is a shelf for what does not fit into memory.
type disk struct {
	dir string
	*shelf
}

func (d disk) chunk(w http.ResponseWriter, r *http.Request) bool {
	if !strings.HasPrefix(r.URL.Path, "/api/v1/chunks/") {
		return false
	}
	name := filepath.Join(d.dir, path.Base(r.URL.Path))
	if r.Method != http.MethodPut {
		http.ServeFile(w, r, name)
		return true
	}
	f, err := os.Create(name)
	if err != nil {
		refuse(w, http.StatusInternalServerError, "disk")
		return true
	}
	n, err := io.Copy(f, r.Body)
	if errors.Join(err, f.Close()) != nil {
		refuse(w, http.StatusInternalServerError, "disk")
		return true
	}
	answer(w, http.StatusOK, api.Placement{Chunk: api.Chunk{ID: path.Base(name), Size: n}})
	return true
}

// A file many times larger than the bound goes both ways within it.
func TestMemoryDoesNotGrowWithTheFile(t *testing.T) {
	size := int64(1 << 30)
	if testing.Short() {
		size = 144 << 20 // three times what may be under way
	}
	s, c := newShelf(t)
	s.odd = disk{t.TempDir(), s}.chunk
	id := newIdentity(t)
	ctx, cancel := context.WithTimeout(context.Background(), 12*time.Minute)
	defer cancel()
	session, err := NewSession(DefaultCode, size, []age.Recipient{id.Recipient()})
	must(t, err)
	// A page that the kernel does not have to give back counts until the next
	// collection: what is measured is what is in use after one.
	runtime.GC()
	base := live()
	var most uint64
	var mu sync.Mutex
	var at int64
	watch := func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		if at += n; at >= 32<<20 {
			at = 0
			runtime.GC()
			most = max(most, live()-min(base, live()))
		}
	}
	h := sha256.New()
	_, _, err = Put(ctx, c, "f", io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), h), session, PutOptions{Progress: watch})
	must(t, err)
	put := most
	most = 0
	back := sha256.New()
	if _, err := Get(ctx, c, "f", back, &GetOptions{Identities: []age.Identity{id}, Progress: watch}); err != nil || !bytes.Equal(h.Sum(nil), back.Sum(nil)) {
		t.Fatalf("it did not come back: %v", err)
	}
	t.Logf("%d MiB: at most %d MiB in use to put and %d MiB to get", size>>20, put>>20, most>>20)
	// Beside the shards: the buffers of requests, and the shelf's.
	if bound := uint64(2 * underWay); put == 0 || most == 0 || put > bound || most > bound {
		t.Errorf("more than %d MiB", bound>>20)
	}
}

// live is the bytes that were in use at the last collection.
func live() uint64 {
	m := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(m)
	return m[0].Value.Uint64()
}

func BenchmarkSealStripe(b *testing.B) {
	k, _ := deriveKeys(make([]byte, keySize))
	p := &putter{session: &Session{Code: DefaultCode, Payload: chunk.DefaultSize - overhead}, keys: k}
	shards := make([][]byte, DefaultCode.Shards())
	for i := range shards {
		shards[i] = make([]byte, chunk.DefaultSize)
	}
	b.SetBytes(int64(p.session.Payload * DefaultCode.Data))
	for b.Loop() {
		for i := range DefaultCode.Data {
			k.sealShard(shards[i], DefaultCode, int64(i), shards[i][nonceSize:nonceSize+p.session.Payload])
		}
		_ = encode(DefaultCode, shards)
		for _, sh := range shards {
			chunk.Sum(sh)
		}
	}
}
