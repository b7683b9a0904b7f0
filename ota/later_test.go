package ota

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// cuts has the server send the first bytes of a part and then stand still, once; later
// requests are noted by what they ask for.
func (f *fleet) cuts(t *testing.T) (begun <-chan struct{}, asked func() []string) {
	t.Helper()
	sent := make(chan struct{})
	var mu sync.Mutex
	var ranges []string
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasPrefix(r.URL.Path, "/parts/") {
			return false
		}
		mu.Lock()
		ranges = append(ranges, r.Header.Get("Range"))
		first := len(ranges) == 1
		mu.Unlock()
		if !first {
			return false
		}
		all := &http.Request{Method: http.MethodGet, URL: r.URL, Header: http.Header{}}
		rec := &firstBytes{ResponseWriter: w}
		http.FileServer(http.Dir(f.repo)).ServeHTTP(rec, all)
		w.(http.Flusher).Flush()
		close(sent)
		<-r.Context().Done()
		return true
	}
	return sent, func() []string { mu.Lock(); defer mu.Unlock(); return ranges }
}

// firstBytes drops all but the first bytes.
type firstBytes struct {
	http.ResponseWriter
	n int
}

func (h *firstBytes) Write(p []byte) (int, error) {
	if rest := 16 - h.n; rest > 0 {
		n, err := h.ResponseWriter.Write(p[:min(rest, len(p))])
		if h.n += n; err != nil {
			return n, err
		}
	}
	return len(p), nil
}

func (h *firstBytes) ReadFrom(r io.Reader) (int64, error) { return io.Copy(struct{ io.Writer }{h}, r) }

// The owner's stick does not wait for what the fleet fetches, which may take a day; the
// fleet's order goes on where it was if the stick was no good.
func TestAFetchOfTheFleetGivesWayToItsOwner(t *testing.T) {
	for _, good := range []bool{true, false} {
		f := newFleet(t)
		f.good("1.1.0")
		begun, asked := f.cuts(t)
		s, _ := f.device()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		waits, ended := make(chan string, 100), make(chan error, 1)
		go func() {
			_, err := s.Handle(ctx, order("o1", "1.1.0"), func(p wire.Progress) {
				if p.Waits != nil {
					waits <- p.Waits.Code
				}
			})
			ended <- err
		}()
		<-begun
		eventuallyHas(t, s)
		if !good {
			end := s.ownerComes()
			if code := <-waits; code != wire.CodeUpdatePending {
				t.Errorf("it waits for %q", code)
			}
			if w := s.Record().Why; w == nil || w.Code != wire.CodeUpdatePending {
				t.Errorf("on record it waits for %+v", w)
			}
			end()
			if err := <-ended; !errors.Is(err, ErrRestart) {
				t.Errorf("it did not go on: %v", err)
			}
			if a := asked(); len(a) != 2 || !strings.HasPrefix(a[1], "bytes=") || strings.HasPrefix(a[1], "bytes=0-") {
				t.Errorf("it asked for %q", a)
			}
			continue
		}
		if _, err := s.Install(t.Context(), "w", f.repo, "", nil); !errors.Is(err, ErrRestart) {
			t.Errorf("the stick: %v", err)
		}
		if st, err := standing(s); err != nil || st == nil || st.order != LocalOrder("w") {
			t.Errorf("on trial is %+v, %v", st, err)
		}
		if err := <-ended; wire.ProblemOf(err).Code != wire.CodeUpdatePending {
			t.Errorf("the order: %v", err)
		}
	}
}

// eventuallyHas waits until a part has begun to come.
func eventuallyHas(t *testing.T, s *Service) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if b := treeSize(s.fetchDir()); b > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing comes")
		}
	}
}

// A coordinator that is started again, or a router, is no failure of the release.
func TestAnOrderIsPatientWithALineThatIsAway(t *testing.T) {
	f := newFleet(t)
	f.good("1.1.0")
	var mu sync.Mutex
	away := 0
	f.hook = func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if away > 0 {
			away--
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		return false
	}
	patient := func(o *Options) { o.Patience, o.Retry = time.Hour, time.Millisecond }
	_, dir := f.device()
	s := f.service(dir, patient)
	away = 5 // two tries of two, and a half
	var waited []wire.Problem
	_, err := s.Handle(t.Context(), order("o1", "1.1.0"), func(p wire.Progress) {
		if p.Waits != nil {
			waited = append(waited, *p.Waits)
			if w := s.Record().Why; w == nil || w.Code != wire.CodeTransfer {
				t.Errorf("on record it waits for %+v", w)
			}
		}
	})
	if !errors.Is(err, ErrRestart) || len(waited) != 2 || waited[0].Code != wire.CodeTransfer || !strings.Contains(waited[0].Reason, "tried again by itself") || waited[0].After <= 0 {
		t.Errorf("%v, waited %+v", err, waited)
	}
	// What cannot be had before the order is over is said to be so, and nothing else.
	_, dir = f.device()
	s = f.service(dir, patient)
	ctx := &overSoon{Context: t.Context()}
	f.mu.Lock()
	f.hook = func(w http.ResponseWriter, _ *http.Request) bool {
		ctx.soon.Store(true)
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	f.mu.Unlock()
	_, err = s.Handle(ctx, order("o2", "1.1.0"), nil)
	if p := wire.ProblemOf(err); p.State != wire.Failed || p.Code != wire.CodeTransfer || !strings.Contains(p.Reason, "the order is over before that") {
		t.Errorf("%+v", p)
	}
	// Who has gained nothing for so long gives up.
	_, dir = f.device()
	s = f.service(dir, func(o *Options) { o.Patience, o.Retry = 1, time.Millisecond })
	_, err = s.Handle(t.Context(), order("o3", "1.1.0"), nil)
	if p := wire.ProblemOf(err); p.State != wire.Failed || p.Code != wire.CodeTransfer || strings.Contains(p.Reason, "over") {
		t.Errorf("%+v", p)
	}
}

func treeSize(dir string) (n int64) {
	files, _ := filepath.Glob(filepath.Join(dir, "*")) // the pattern is good
	for _, f := range files {
		if st, err := os.Stat(f); err == nil {
			n += st.Size()
		}
	}
	return n
}
