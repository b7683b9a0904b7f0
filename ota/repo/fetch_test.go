package repo

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
)

// noise does not compress, so that parts have a known size.
func noise(n int) string {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		sum := sha256.Sum256([]byte{byte(i), byte(i >> 8)})
		b.WriteString(hex.EncodeToString(sum[:]))
	}
	return b.String()[:n]
}

func TestCutPartResumes(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(256<<10))
	file := filepath.Join(f.repo, bundle.PartPath(form.SHA256))
	cuts := 0
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		if cuts++; cuts > 3 {
			return false
		}
		from := int64(0)
		if h := r.Header.Get("Range"); h != "" {
			_, _ = fmt.Sscanf(h, "bytes=%d-", &from)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, form.Size-1, form.Size))
			w.WriteHeader(http.StatusPartialContent)
		}
		in := open(t, file)
		_, _ = in.Seek(from, io.SeekStart)
		_, _ = io.CopyN(w, in, form.Size/5)
		panic(http.ErrAbortHandler) // the line drops
	})
	f.server.Config.ErrorLog = nil
	path := filepath.Join(t.TempDir(), "part")
	var gained int64
	must(t, f.client(t.TempDir()).FetchPart(t.Context(), form, path, func(n, _ int64) {
		if n < gained {
			t.Errorf("progress went back from %d to %d", gained, n)
		}
		gained = n
	}))
	if gained != form.Size || cuts != 4 {
		t.Errorf("%d of %d bytes, %d requests", gained, form.Size, cuts)
	}
	if n := f.seen("bytes="); n != 3 {
		t.Errorf("%d of the requests asked for the rest only, want 3: %v", n, f.requests)
	}
	if _, err := os.Stat(path + ".partial"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the partial file is still there")
	}
}

func TestPartResumesAfterRestart(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(64<<10))
	whole, err := os.ReadFile(filepath.Join(f.repo, bundle.PartPath(form.SHA256)))
	must(t, err)
	for name, c := range map[string]struct {
		partial []byte
		asked   string
	}{
		"half":         {whole[:1000], "bytes=1000-"},
		"all":          {whole, ""},
		"too long":     {append(bytes.Clone(whole), 1), ""},
		"damaged half": {append([]byte{^whole[0]}, whole[1:1000]...), "bytes=1000-"},
		"damaged all":  {append([]byte{^whole[0]}, whole[1:]...), ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "part")
			must(t, os.WriteFile(path+".partial", c.partial, 0o644))
			before := f.seen(c.asked)
			must(t, f.client(t.TempDir()).FetchPart(t.Context(), form, path, nil))
			if got, _ := os.ReadFile(path); !bytes.Equal(got, whole) {
				t.Error("other bytes")
			}
			if c.asked != "" && f.seen(c.asked) == before {
				t.Errorf("never asked for %q: %v", c.asked, f.requests)
			}
		})
	}
}

func TestServerWithoutRangesStillResumes(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(64<<10))
	f.onRequest(func(_ http.ResponseWriter, r *http.Request) bool { r.Header.Del("Range"); return false })
	path := filepath.Join(t.TempDir(), "part")
	whole, err := os.ReadFile(filepath.Join(f.repo, bundle.PartPath(form.SHA256)))
	must(t, err)
	must(t, os.WriteFile(path+".partial", whole[:1000], 0o644))
	came := int64(0)
	must(t, f.client(t.TempDir()).FetchPart(t.Context(), form, path, func(_, n int64) { came += n }))
	if came != form.Size {
		t.Errorf("%d bytes are said to have come, the server sent all %d again", came, form.Size)
	}
}

// TestASlowServerWithoutRangesIsNotGivenUp for bytes that come and are here already.
func TestASlowServerWithoutRangesIsNotGivenUp(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(64<<10))
	whole, err := os.ReadFile(filepath.Join(f.repo, bundle.PartPath(form.SHA256)))
	must(t, err)
	var line atomic.Int64 // how long a piece takes
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		for p := range slices.Chunk(whole, len(whole)/20+1) {
			_, _ = w.Write(p)
			w.(http.Flusher).Flush()
			select {
			case <-time.After(time.Duration(line.Load())):
			case <-r.Context().Done():
			}
		}
		return true
	})
	// On a machine that stands still for as long as a window nothing comes in one.
	for window := 200 * time.Millisecond; ; window *= 5 {
		line.Store(int64(window / 8))
		path := filepath.Join(t.TempDir(), "part")
		must(t, os.WriteFile(path+".partial", whole[:len(whole)-1], 0o644))
		c := f.client(t.TempDir())
		c.o.Limits = Limits{Metadata: time.Minute, Window: window, MinBytes: 2, Attempts: 1, Pause: time.Millisecond}
		err := c.FetchPart(t.Context(), form, path, nil)
		if err == nil {
			return
		}
		if window > 20*time.Second {
			t.Fatal(err)
		}
	}
}

// TestAServerThatBeginsAnewIsCountedAndBounded: without ranges, each time it breaks off
// what is here comes again.
func TestAServerThatBeginsAnewIsCountedAndBounded(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(512<<10))
	whole, err := os.ReadFile(filepath.Join(f.repo, bundle.PartPath(form.SHA256)))
	must(t, err)
	step := len(whole) / 20
	good, sent := 0, atomic.Int64{}
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/parts/") {
			return false
		}
		good = min(good+step, len(whole))
		w.Header().Set("Content-Length", strconv.Itoa(len(whole)))
		n, _ := w.Write(whole[:good])
		sent.Add(int64(n))
		return true
	})
	path := filepath.Join(t.TempDir(), "part")
	came := int64(0)
	err = f.client(t.TempDir()).FetchPart(t.Context(), form, path, func(_, n int64) { came += n })
	refused(t, err, Slow, "again and again")
	if limit := maxOverLine * form.Size; came < limit || came > limit+int64(len(whole)) {
		t.Errorf("%d bytes came of %d: the limit is %d", came, form.Size, limit)
	}
	f.server.Close()                                                      // what it still writes is written then
	if over := sent.Load() - came; over < 0 || over > int64(len(whole)) { // it hears of the end late
		t.Errorf("%d bytes were sent, %d counted", sent.Load(), came)
	}
	if fi, err := os.Stat(path + ".partial"); err != nil || fi.Size() < int64(step) {
		t.Errorf("what came is not kept for the next attempt: %v", err)
	}
}

func TestRangeThatLiesIsRefused(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(64<<10))
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", form.Size-1, form.Size))
		w.WriteHeader(http.StatusPartialContent)
		return true
	})
	path := filepath.Join(t.TempDir(), "part")
	must(t, os.WriteFile(path+".partial", make([]byte, 10), 0o644))
	refused(t, f.client(t.TempDir()).FetchPart(t.Context(), form, path, nil), Unreachable, "the server sent")
}
