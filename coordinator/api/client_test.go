package api

import (
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// clientOf is a client of a coordinator that answers as it is told.
func clientOf(t *testing.T, answer http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewTLSServer(answer)
	t.Cleanup(srv.Close)
	c, err := NewClient(Context{URL: srv.URL, Token: "secret", CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// An operator's token goes to his coordinator, and to no other place that this one
// names.
func TestNobodyElseIsAsked(t *testing.T) {
	var reached atomic.Bool
	other := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Store(true) }))
	t.Cleanup(other.Close)
	for _, status := range []int{301, 302, 303, 307, 308} {
		c := clientOf(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL+r.URL.Path, status) })
		_, chunk := c.GetChunk(t.Context(), strings.Repeat("a", 64))
		_, put := c.PutChunk(t.Context(), strings.Repeat("a", 64), []byte("x"), 1)
		_, object := c.Object(t.Context(), "f")
		for what, err := range map[string]error{"a chunk": chunk, "a chunk put": put, "an object": object} {
			var e *Error
			if !errors.As(err, &e) || e.Status != status {
				t.Errorf("%s, redirected with %d: %v", what, status, err)
			}
		}
	}
	if reached.Load() {
		t.Error("another server was asked")
	}
}

// A coordinator that begins an answer and does not end it is given up, whether it
// sends nothing more or a little for ever.
func TestAnAnswerWithoutEndIsGivenUp(t *testing.T) {
	const patience = 2 * time.Minute // beyond which the test fails
	for name, c := range map[string]struct {
		every        time.Duration // between two bytes; 0: none come
		stall, whole time.Duration
		want         error
	}{
		"silent":        {0, 50 * time.Millisecond, time.Hour, ErrStalled},
		"slow for ever": {time.Millisecond, time.Hour, 100 * time.Millisecond, errSlow},
	} {
		over := make(chan struct{})
		client := clientOf(t, func(w http.ResponseWriter, r *http.Request) {
			defer close(over)
			w.Header().Set("Content-Length", "100000000")
			for r.Context().Err() == nil {
				_, _ = w.Write([]byte{' '})
				w.(http.Flusher).Flush()
				if c.every == 0 {
					<-r.Context().Done()
				}
				time.Sleep(c.every)
			}
		})
		client.stall, client.whole = c.stall, c.whole
		done := make(chan error, 1)
		go func() { _, err := client.Objects(t.Context()); done <- err }()
		limit := time.After(patience)
		select {
		case err := <-done:
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), "cut off") {
				t.Errorf("%s: %v", name, err)
			}
		case <-limit:
			t.Fatalf("%s: it is waited for", name)
		}
		select {
		case <-over:
		case <-limit:
			t.Fatalf("%s: the server still sends", name)
		}
	}
}

// An upload that a coordinator takes nothing of, or nothing more, is given up; one that
// is slow is not.
func TestAnUploadThatStallsIsGivenUp(t *testing.T) {
	const size, limit = 32 << 20, 2 * time.Minute // more than the kernel buffers
	for name, takes := range map[string]int{"nothing is taken": 0, "half is taken": size / 2} {
		release := make(chan struct{})
		client := clientOf(t, func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.CopyN(io.Discard, r.Body, int64(takes))
			<-release
		})
		client.stall = 100 * time.Millisecond
		done := make(chan error, 1)
		go func() { done <- client.PutRepoFile(t.Context(), "f", make([]byte, size)) }()
		select {
		case err := <-done:
			if !errors.Is(err, ErrStalled) || !strings.Contains(err.Error(), "request") {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(limit):
			t.Errorf("%s: it is waited for", name)
		}
		close(release)
	}
	client := clientOf(t, func(w http.ResponseWriter, r *http.Request) {
		for n, err := int64(1), error(nil); n > 0 && err == nil; time.Sleep(150 * time.Millisecond) {
			n, err = io.CopyN(io.Discard, r.Body, 1<<19)
		}
		w.WriteHeader(http.StatusNoContent)
	})
	client.stall = 8 * time.Second // longer than a busy machine stands still
	began := time.Now()
	if err := client.PutRepoFile(t.Context(), "f", make([]byte, size)); err != nil || time.Since(began) < client.stall {
		t.Errorf("a slow one, after %s: %v", time.Since(began), err)
	}
}

func TestAnAnswerThatIsTooLargeIsNotTaken(t *testing.T) {
	c := clientOf(t, func(w http.ResponseWriter, r *http.Request) {
		block := make([]byte, 1<<16)
		for r.Context().Err() == nil {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	if _, err := c.GetChunk(t.Context(), strings.Repeat("a", 64)); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("%v", err)
	}
}
