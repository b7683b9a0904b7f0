package object

import (
	"bytes"
	"errors"
	"maps"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"

	"filippo.io/age"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// sent are the chunks that are put from now on.
func (s *shelf) sent() func() []string {
	var mu sync.Mutex
	ids := map[string]bool{}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/chunks/") {
			mu.Lock()
			defer mu.Unlock()
			ids[path.Base(r.URL.Path)] = true
		}
		return false
	}
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Sorted(maps.Keys(ids))
	}
}

// Who has the file at hand gets a stored object whole again, though more of it
// is lost than its code bears, and though a stream has no size.
func TestAPutOfTheSameFilePlacesWhatWasLost(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 10_500)
	o := putCoded(t, c, "f", data, api.Code{Data: 3, Parity: 2}, 1000, id)
	lost := []string{o.Chunks[5].ID}
	for _, ch := range o.Chunks[10:15] {
		lost = append(lost, ch.ID)
	}
	lost = append(lost, o.Chunks[len(o.Chunks)-1].ID)
	for _, id := range lost {
		delete(s.chunks, id)
	}
	slices.Sort(lost)
	sent := s.sent()
	again := func(data []byte, o PutOptions, code api.Code) error {
		o.Identities = []age.Identity{id}
		_, placed, err := Put(testContext(t), c, "f", bytes.NewReader(data), newSession(t, code, len(data), id), o)
		if err == nil && len(placed) != len(s.objects["f"].Chunks) {
			t.Errorf("%d placements", len(placed))
		}
		return err
	}
	other := bytes.Clone(data)
	other[7000]++ // of what is lost
	for name, data := range map[string][]byte{"another file": other, "a longer one": append(bytes.Clone(data), 1), "a shorter one": data[:10_499], "an empty one": nil} {
		if err := again(data, PutOptions{AnyCode: true}, DefaultCode); !refused(err, "exists") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, id := range sent() {
		if !slices.Contains(lost, id) {
			t.Error("something of another file was sent")
		}
	}
	must(t, again(data, PutOptions{AnyCode: true}, DefaultCode))
	if got := sent(); !slices.Equal(got, lost) {
		t.Errorf("%d shards were sent, %d were lost", len(got), len(lost))
	}
	var out bytes.Buffer
	if _, err := Get(testContext(t), c, "f", &out, keyOf(id)); err != nil || !bytes.Equal(out.Bytes(), data) {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
}

func refused(err error, code string) bool {
	var e *api.Error
	return errors.As(err, &e) && e.Code == code
}

// Where lost shards find no device, it is not said that the file is stored.
func TestAPutThatCannotPlaceWhatWasLostFails(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 5000)
	putCoded(t, c, "f", data, DefaultCode, 1000, id)
	s.odd = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/stripes") {
			refuse(w, http.StatusServiceUnavailable, "too_few_devices")
			return true
		}
		return false
	}
	_, _, err := Put(testContext(t), c, "f", bytes.NewReader(data), newSession(t, DefaultCode, len(data), id), PutOptions{Identities: []age.Identity{id}})
	if !refused(err, "too_few_devices") {
		t.Errorf("%v", err)
	}
}

// What a put asks for and is not there is said, not passed over.
func TestAnotherCodeOrOtherReadersAreNoRepeat(t *testing.T) {
	_, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 5000)
	put := func(code api.Code, o PutOptions) error {
		o.Identities = []age.Identity{id}
		_, _, err := Put(testContext(t), c, "f", bytes.NewReader(data), newSession(t, code, len(data), id), o)
		return err
	}
	small := api.Code{Data: 2, Parity: 1}
	must(t, put(small, PutOptions{Readers: []string{"a", "b"}}))
	must(t, put(small, PutOptions{Readers: []string{"b", "a", "b"}}))
	must(t, put(DefaultCode, PutOptions{Readers: []string{"a", "b"}, AnyCode: true}))
	if err := put(DefaultCode, PutOptions{Readers: []string{"a", "b"}}); !refused(err, "exists") || !strings.Contains(err.Error(), "code 2+1") {
		t.Errorf("another code: %v", err)
	}
	for _, readers := range [][]string{nil, {"a"}, {"a", "b", "c"}, {"a", "c"}} {
		if err := put(small, PutOptions{Readers: readers}); !refused(err, "exists") || !strings.Contains(err.Error(), "other recipients") {
			t.Errorf("for %v: %v", readers, err)
		}
	}
}

// The answer to the last request of a put may be lost: the put that goes on finds
// its own object, also when it was made for others.
func TestAPutThatDidNotHearOfItsEndIsARepeat(t *testing.T) {
	_, c := newShelf(t)
	data := randomBytes(t, 5000)
	session := newSession(t, DefaultCode, len(data), newIdentity(t))
	for range 2 {
		_, _, err := Put(testContext(t), c, "f", bytes.NewReader(data), session, PutOptions{Readers: []string{"other"}})
		must(t, err)
	}
	other := newSession(t, DefaultCode, len(data), newIdentity(t))
	if _, _, err := Put(testContext(t), c, "f", bytes.NewReader(data), other, PutOptions{}); !refused(err, "exists") {
		t.Errorf("of another put: %v", err)
	}
}

func TestAnObjectThatIsRemovedMeanwhileIsNoRepeat(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	data := randomBytes(t, 5000)
	putCoded(t, c, "f", data, DefaultCode, 1000, id)
	s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/stripes") {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.objects, "f")
		}
		return false
	}
	_, _, err := Put(testContext(t), c, "f", bytes.NewReader(data), newSession(t, DefaultCode, len(data), id), PutOptions{Identities: []age.Identity{id}})
	if err == nil || !strings.Contains(err.Error(), "removed meanwhile") {
		t.Errorf("%v", err)
	}
}
