package object

import (
	"bytes"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
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
