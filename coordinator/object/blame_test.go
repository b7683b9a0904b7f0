package object

import (
	"net/http"
	"path"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// chunkGets has f answer what is asked of chunks.
func chunkGets(f func(w http.ResponseWriter, id string) bool) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		return strings.Contains(r.URL.Path, "/chunks/") && f(w, path.Base(r.URL.Path))
	}
}

// That the coordinator stops, is crowded or does not know the caller any more is
// no fault of a device: a verify that said so would blame all of them.
func TestVerifyBlamesNoDeviceForWhatTheCoordinatorDoes(t *testing.T) {
	defer func(d time.Duration) { busyWait = d }(busyWait)
	busyWait = time.Millisecond
	for name, does := range map[string]func(w http.ResponseWriter){
		"it knows the token no more": func(w http.ResponseWriter) { refuse(w, http.StatusUnauthorized, "unauthorized") },
		"it is crowded":              func(w http.ResponseWriter) { refuse(w, http.StatusTooManyRequests, "too_many") },
		"it fails":                   func(w http.ResponseWriter) { refuse(w, http.StatusInternalServerError, wire.CodeInternal) },
		"it is not there":            func(w http.ResponseWriter) { refuse(w, http.StatusBadGateway, "") },
		"the line is cut": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write(make([]byte, 10))
			panic(http.ErrAbortHandler)
		},
		"it has ended": func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			s, c := newShelf(t)
			o := putCoded(t, c, "f", randomBytes(t, 9000), api.Code{Data: 2, Parity: 1}, 1000, newIdentity(t))
			s.odd = chunkGets(func(w http.ResponseWriter, id string) bool {
				if id != o.Chunks[4].ID {
					return false
				}
				does(w)
				return true
			})
			if r, err := Verify(testContext(t), c, o.Object, nil); err == nil || len(r.Faults)+len(r.Away) > 0 {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

func TestVerifyTellsWhatIsAwayFromWhatIsLost(t *testing.T) {
	defer func(d time.Duration) { busyWait = d }(busyWait)
	busyWait = time.Millisecond
	s, c := newShelf(t)
	o := putCoded(t, c, "f", randomBytes(t, 9000), api.Code{Data: 2, Parity: 1}, 1000, newIdentity(t))
	codes := map[string]string{}
	for i, code := range []string{"offline", "no_answer", wire.CodeUnreachable, wire.CodeMetered, wire.CodeQuietHours, wire.CodeBusy, wire.CodeLost, wire.CodeNotFound, "unreadable"} {
		codes[o.Chunks[i].ID] = code
	}
	soon := o.Chunks[10].ID
	var mu sync.Mutex
	left := 5
	s.odd = chunkGets(func(w http.ResponseWriter, id string) bool {
		mu.Lock()
		defer mu.Unlock()
		if code := codes[id]; code != "" {
			refuse(w, http.StatusServiceUnavailable, code)
			return true
		}
		if id == soon && left > 0 {
			left--
			refuse(w, []int{http.StatusServiceUnavailable, http.StatusTooManyRequests}[left%2], wire.CodeBusy)
			return true
		}
		return false
	})
	r, err := Verify(testContext(t), c, o.Object, nil)
	must(t, err)
	if len(r.Away) != 6 || len(r.Faults) != 3 || r.Read != len(o.Chunks)-9 || left > 0 {
		t.Fatalf("%+v", r)
	}
	for i, f := range append(r.Away, r.Faults...) {
		if f.Chunk != o.Chunks[i].ID || f.Device != "d" || !strings.Contains(f.Problem, codes[f.Chunk]) {
			t.Errorf("%d: %+v", i, f)
		}
	}
}

// However many copies there are, and whatever is wrong with them, a verify is at
// its end after all chunks.
func TestTheProgressOfVerifyEndsAtTheSizeOfTheChunks(t *testing.T) {
	s, c := newShelf(t)
	data := randomBytes(t, several)
	o, _, err := PutPlain(testContext(t), c, "f", strings.NewReader(string(data)), 2, nil)
	must(t, err)
	bad := o.Chunks[1].ID
	s.odd = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/placements") {
			var list []api.Placement
			for _, ch := range o.Chunks {
				list = append(list, api.Placement{Chunk: ch, Holders: []api.Holder{{Device: "a"}, {Device: "b"}, {Device: "c", Lost: true}}})
			}
			list[2].Holders = nil
			answer(w, http.StatusOK, list)
			return true
		}
		if path.Base(r.URL.Path) == bad {
			refuse(w, http.StatusServiceUnavailable, wire.CodeLost)
			return true
		}
		return false
	}
	var mu sync.Mutex
	var told int64
	r, err := Verify(testContext(t), c, o, func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		told += n
	})
	must(t, err)
	if told != o.Size || r.Read != 2*(len(o.Chunks)-2) {
		t.Errorf("%d of %d bytes told; %+v", told, o.Size, r)
	}
}
