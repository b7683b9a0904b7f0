package object

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"path"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// outage has everything fail after n requests, by how, for so many.
func outage(n, length int, how func(w http.ResponseWriter)) func(http.ResponseWriter, *http.Request) bool {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/chunks/") && !strings.HasSuffix(r.URL.Path, "/stripes") {
			return false
		}
		mu.Lock()
		n--
		out := n < 0 && n >= -length
		mu.Unlock()
		if out {
			how(w)
		}
		return out
	}
}

func shortOutages(t *testing.T, life time.Duration) {
	a, b := outageLife, outageFirst
	t.Cleanup(func() { outageLife, outageFirst = a, b })
	outageLife, outageFirst = life, time.Millisecond
}

var outages = map[string]func(w http.ResponseWriter){
	"a coordinator that starts anew": func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	"a line that is cut": func(w http.ResponseWriter) {
		w.Header().Set("Content-Length", "1000")
		_, _ = w.Write(make([]byte, 10))
		panic(http.ErrAbortHandler)
	},
	"a crowd": func(w http.ResponseWriter) { refuse(w, http.StatusTooManyRequests, "too_many") },
}

func TestATransferOutlivesAnOutage(t *testing.T) {
	shortOutages(t, time.Minute)
	for name, how := range outages {
		t.Run(name, func(t *testing.T) {
			s, c := newShelf(t)
			id := newIdentity(t)
			data := randomBytes(t, 30_000)
			s.odd = outage(7, 15, how)
			putCoded(t, c, "f", data, api.Code{Data: 3, Parity: 2}, 1000, id)
			s.mu.Lock()
			s.odd = outage(7, 15, how)
			s.mu.Unlock()
			var out bytes.Buffer
			if _, err := Get(testContext(t), c, "f", &out, keyOf(id)); err != nil || !bytes.Equal(out.Bytes(), data) {
				t.Errorf("%d bytes, %v", out.Len(), err)
			}
		})
	}
}

func TestAPlainTransferOutlivesAnOutage(t *testing.T) {
	shortOutages(t, time.Minute)
	few := func(w http.ResponseWriter) { refuse(w, http.StatusServiceUnavailable, "too_few_devices") }
	for name, how := range outages {
		t.Run(name, func(t *testing.T) {
			s, c := newShelf(t)
			data := randomBytes(t, (atOnce+3)*chunk.DefaultSize)
			for _, o := range []struct {
				from   int
				how    func(http.ResponseWriter)
				object string
			}{{1, how, "f"}, {atOnce, few, "g"}} { // one has ended when as many have begun
				s.mu.Lock()
				s.odd = outage(o.from, 7, o.how)
				s.mu.Unlock()
				if _, _, err := PutPlain(testContext(t), c, o.object, bytes.NewReader(data), 2, nil); err != nil {
					t.Fatal(err)
				}
			}
			s.mu.Lock()
			s.odd = outage(1, 7, how)
			s.mu.Unlock()
			var out bytes.Buffer
			if _, err := Get(testContext(t), c, "f", &out, nil); err != nil || !bytes.Equal(out.Bytes(), data) {
				t.Errorf("%d bytes, %v", out.Len(), err)
			}
		})
	}
}

// A device that starts anew is waited for by a put that is under way; one that
// begins is told at once that there are too few.
func TestAPutWaitsForADeviceThatItHadBefore(t *testing.T) {
	shortOutages(t, time.Minute)
	s, c := newShelf(t)
	few := func(w http.ResponseWriter) { refuse(w, http.StatusServiceUnavailable, "too_few_devices") }
	s.odd = outage(30, 10, few)
	putCoded(t, c, "f", randomBytes(t, 30_000), api.Code{Data: 3, Parity: 2}, 1000, newIdentity(t))
	outageLife = time.Hour
	s.mu.Lock()
	s.odd = outage(0, 1<<30, few)
	s.mu.Unlock()
	s2 := newSession(t, DefaultCode, 5000, newIdentity(t))
	if _, _, err := Put(testContext(t), c, "g", bytes.NewReader(make([]byte, 5000)), s2, PutOptions{}); !refused(err, "too_few_devices") {
		t.Errorf("%v", err)
	}
}

// It ends when nothing has succeeded for long enough, however many requests there
// are.
func TestAnOutageThatDoesNotEndEndsTheTransfer(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 30_000)
	putCoded(t, c, "f", data, api.Code{Data: 3, Parity: 2}, 1000, id)
	shortOutages(t, 50*time.Millisecond)
	s.odd = outage(0, 1<<30, outages["a coordinator that starts anew"])
	if _, err := Get(testContext(t), c, "f", &bytes.Buffer{}, keyOf(id)); err == nil || errors.Is(err, ErrDamaged) {
		t.Errorf("%v", err)
	}
	if _, _, err := Put(testContext(t), c, "g", bytes.NewReader(data), newSession(t, DefaultCode, len(data), id), PutOptions{}); err == nil {
		t.Error("it is said to be stored")
	}
}

// A coordinator that has just started knows no device to be online. A get that is under
// way waits for them, and asks for nothing twice that has come; one that begins is told at once.
func TestAGetWaitsForDevicesThatServedItBefore(t *testing.T) {
	nobody := func(w http.ResponseWriter) { refuse(w, http.StatusServiceUnavailable, "no_holder_online") }
	for name, coded := range map[string]bool{"coded": true, "plain": false} {
		t.Run(name, func(t *testing.T) {
			shortOutages(t, time.Minute)
			s, c := newShelf(t)
			data, o := putSome(t, c, coded)
			var mu sync.Mutex
			came := map[string]int{}
			out, down := &bytes.Buffer{}, 0
			begun := false
			odd := func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/chunks/") {
					return false
				}
				mu.Lock()
				defer mu.Unlock()
				if begun && down > 0 {
					down--
					nobody(w)
					return true
				}
				came[r.URL.Path]++
				return false
			}
			s.mu.Lock()
			s.odd, down = odd, map[bool]int{false: 7, true: 25}[coded] // parity does not make up for it
			s.mu.Unlock()
			if _, err := Get(testContext(t), c, "f", onWrite{out, func() { mu.Lock(); begun = true; mu.Unlock() }}, o); err != nil || !bytes.Equal(out.Bytes(), data) {
				t.Errorf("%d bytes, %v", out.Len(), err)
			}
			mu.Lock()
			if down != 0 {
				t.Errorf("the devices were back before they were missed %d times more", down)
			}
			for path, n := range came {
				if n != 1 {
					t.Errorf("%s came %d times", path, n)
				}
			}
			down = 1 << 30
			mu.Unlock()
			outageLife = time.Hour
			if _, err := Get(testContext(t), c, "f", &bytes.Buffer{}, o); !refused(err, "no_holder_online") {
				t.Errorf("%v", err)
			}
		})
	}
}

// putSome stores more as "f" than a get has under way at once.
func putSome(t *testing.T, c *api.Client, coded bool) (data []byte, o *GetOptions) {
	t.Helper()
	if !coded {
		data = randomBytes(t, (atOnce+3)*chunk.DefaultSize)
		_, _, err := PutPlain(testContext(t), c, "f", bytes.NewReader(data), 1, nil)
		must(t, err)
		return data, nil
	}
	id := newIdentity(t)
	data = randomBytes(t, 30_000)
	putCoded(t, c, "f", data, api.Code{Data: 3, Parity: 2}, 1000, id)
	return data, keyOf(id)
}

// onWrite calls f before each write.
type onWrite struct {
	w io.Writer
	f func()
}

func (o onWrite) Write(p []byte) (int, error) {
	o.f()
	return o.w.Write(p)
}

// A stripe of which too much is gone for good is not waited for, and one that some
// shards come of again and again is not waited for without end.
func TestAGetDoesNotWaitForWhatDoesNotComeBack(t *testing.T) {
	for name, code := range map[string]string{"gone": wire.CodeLost, "away": "no_holder_online"} {
		t.Run(name, func(t *testing.T) {
			shortOutages(t, time.Hour)
			if name == "away" {
				outageLife = 100 * time.Millisecond
			}
			s, c := newShelf(t)
			id := newIdentity(t)
			o := putCoded(t, c, "f", randomBytes(t, 30_000), api.Code{Data: 3, Parity: 2}, 1000, id)
			bad := map[string]bool{}
			for _, ch := range o.Chunks[30:33] {
				bad[ch.ID] = true
			}
			s.odd = func(w http.ResponseWriter, r *http.Request) bool {
				if bad[path.Base(r.URL.Path)] {
					refuse(w, http.StatusServiceUnavailable, code)
					return true
				}
				return false
			}
			if _, err := Get(testContext(t), c, "f", &bytes.Buffer{}, keyOf(id)); err == nil || !strings.Contains(err.Error(), "2 of 5 shards can be read") {
				t.Errorf("%v", err)
			}
		})
	}
}

// That an object is not there any more is said, and not what becomes of its chunks.
func TestAGetOfWhatIsRemovedMeanwhileSaysSo(t *testing.T) {
	for name, coded := range map[string]bool{"coded": true, "plain": false} {
		for _, replaced := range []bool{false, true} {
			s, c := newShelf(t)
			_, o := putSome(t, c, coded)
			s.odd = chunkGets(func(w http.ResponseWriter, _ string) bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				if _, there := s.objects["f"]; !there || len(s.objects["f"].Chunks) == 0 {
					refuse(w, http.StatusNotFound, wire.CodeNotFound)
					return true
				}
				return false
			})
			_, err := Get(testContext(t), c, "f", onWrite{io.Discard, func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				delete(s.objects, "f")
				if replaced {
					s.objects["f"] = api.Object{Name: "f"}
				}
			}}, o)
			if !errors.Is(err, ErrRemoved) || strings.Contains(err.Error(), "something else") != replaced || strings.Contains(err.Error(), "shard") {
				t.Errorf("%s, replaced %v: %v", name, replaced, err)
			}
		}
	}
}
