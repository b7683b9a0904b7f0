package transfer_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// file is what the servers here serve.
var file = func() []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, 300_000)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}()

func serve(t *testing.T, h http.HandlerFunc) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func clientOf(s *httptest.Server, bases ...string) *transfer.Client {
	if bases == nil {
		bases = []string{s.URL}
	}
	return &transfer.Client{
		HTTP: s.Client(), Base: func() []string { return bases },
		Stall: time.Minute, Backoff: time.Millisecond,
	}
}

func mustBeProblem(t *testing.T, err error, sentence string) {
	t.Helper()
	var p *wire.Problem
	if !errors.As(err, &p) || p.Code != wire.CodeTransfer || !strings.Contains(p.Reason, sentence) {
		t.Fatalf("got %v, want a transfer problem that says %q", err, sentence)
	}
}

func content(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("ETag", `"v1"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file))
}

// cut sends n bytes of what h would send, then breaks the connection.
func cut(h http.HandlerFunc, n int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h(&cutter{w, n}, r)
	}
}

type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(p []byte) (int, error) {
	if len(p) >= c.left {
		c.ResponseWriter.Write(p[:c.left])
		c.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func TestFetchResumesAfterCuts(t *testing.T) {
	var asked []string
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Header.Get("Range"))
		cut(content, 70_000)(w, r)
	})
	var got bytes.Buffer
	if err := clientOf(s).Fetch(t.Context(), "/data/v1/x?ticket=7", int64(len(file)), &got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), file) {
		t.Fatal("the pieces are not the file")
	}
	want := []string{"", "bytes=70000-", "bytes=140000-", "bytes=210000-", "bytes=280000-"}
	if fmt.Sprint(asked) != fmt.Sprint(want) {
		t.Fatalf("asked for %q, want %q", asked, want)
	}
}

func TestFetchNeverJoinsTwoFiles(t *testing.T) {
	cases := map[string]struct {
		then     http.HandlerFunc // answers all requests but the first
		first    http.HandlerFunc
		sentence string
	}{
		"changed": {sentence: "has changed", then: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v2"`)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file))
		}},
		"changed, If-Range ignored": {sentence: "has changed", then: func(w http.ResponseWriter, r *http.Request) {
			r.Header.Del("If-Range")
			w.Header().Set("ETag", `"v2"`)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file))
		}},
		"ranges unknown": {sentence: "knows no ranges", then: func(w http.ResponseWriter, r *http.Request) {
			r.Header.Del("Range")
			content(w, r)
		}},
		"another range": {sentence: "offers", then: func(w http.ResponseWriter, r *http.Request) {
			r.Header.Set("Range", "bytes=69999-")
			content(w, r)
		}},
		"a part of the rest": {sentence: "offers", then: func(w http.ResponseWriter, r *http.Request) {
			r.Header.Set("Range", "bytes=70000-80000")
			content(w, r)
		}},
		"another size": {sentence: "offers", then: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v1"`)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file[:200_000]))
		}},
		"no range named": {sentence: "without saying which", then: func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusPartialContent)
			w.Write(file[70_000:])
		}},
		"no ETag": {sentence: "without an ETag", then: content, first: func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file))
		}},
		"weak ETag": {sentence: "without an ETag", then: content, first: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `W/"v1"`)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file))
		}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			var n atomic.Int32
			s := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if n.Add(1) > 1 {
					c.then(w, r)
					return
				}
				first := c.first
				if first == nil {
					first = content
				}
				cut(first, 70_000)(w, r)
			})
			var got bytes.Buffer
			mustBeProblem(t, clientOf(s).Fetch(t.Context(), "/x", int64(len(file)), &got), c.sentence)
			if !bytes.Equal(got.Bytes(), file[:70_000]) {
				t.Fatalf("%d bytes were kept", got.Len())
			}
		})
	}
}

func TestFetchTakesNoMoreThanExpected(t *testing.T) {
	announced := serve(t, content)
	endless := serve(t, func(w http.ResponseWriter, r *http.Request) {
		for {
			if _, err := w.Write(file); err != nil {
				return
			}
		}
	})
	for _, s := range []*httptest.Server{announced, endless} {
		var got bytes.Buffer
		err := clientOf(s).Fetch(t.Context(), "/x", 100_000, &got)
		mustBeProblem(t, err, "expected")
		if got.Len() > 100_000 {
			t.Fatalf("%d bytes were written", got.Len())
		}
	}
}

func TestARefusalIsTriedOnce(t *testing.T) {
	for _, status := range []int{400, 401, 403, 404, 410, 416} {
		var n atomic.Int32
		s := serve(t, func(w http.ResponseWriter, r *http.Request) {
			n.Add(1)
			w.WriteHeader(status)
			json.NewEncoder(w).Encode(wire.APIError{Code: "no_ticket", Reason: "the ticket is used up"})
		})
		c := clientOf(s)
		mustBeProblem(t, c.Fetch(t.Context(), "/x", 10, io.Discard), "no_ticket: the ticket is used up")
		mustBeProblem(t, c.Put(t.Context(), "/x", file, "application/octet-stream"), strconv.Itoa(status))
		if n.Load() != 2 {
			t.Fatalf("status %d: %d requests for two transfers", status, n.Load())
		}
	}
}

func TestATroubledServerIsTriedAgain(t *testing.T) {
	for _, status := range []int{408, 429, 500, 502, 503} {
		var n atomic.Int32
		var received []byte
		s := serve(t, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			if n.Add(1) <= 2 {
				w.WriteHeader(status)
				return
			}
			received = body
			content(w, r)
		})
		c := clientOf(s)
		var got bytes.Buffer
		if err := c.Fetch(t.Context(), "/x", int64(len(file)), &got); err != nil || !bytes.Equal(got.Bytes(), file) {
			t.Fatalf("status %d: %d bytes, %v", status, got.Len(), err)
		}
		n.Store(0)
		if err := c.Put(t.Context(), "/x", file[:5000], "application/octet-stream"); err != nil || !bytes.Equal(received, file[:5000]) {
			t.Fatalf("status %d: %d bytes arrived, %v", status, len(received), err)
		}
	}
}

func TestRetriesHaveAnEnd(t *testing.T) {
	var n atomic.Int32
	s := serve(t, func(w http.ResponseWriter, r *http.Request) { n.Add(1); w.WriteHeader(503) })
	c := clientOf(s)
	c.Futile = 4
	mustBeProblem(t, c.Fetch(t.Context(), "/x", 10, io.Discard), "503")
	if n.Load() != 4 {
		t.Fatalf("%d attempts", n.Load())
	}
}

func TestNoOtherPlaceIsAllowed(t *testing.T) {
	var reached atomic.Bool
	other := serve(t, func(http.ResponseWriter, *http.Request) { reached.Store(true) })
	for _, status := range []int{301, 302, 303, 307, 308} {
		s := serve(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, status) })
		mustBeProblem(t, clientOf(s).Fetch(t.Context(), "/x", 10, io.Discard), "redirects")
		mustBeProblem(t, clientOf(s).Put(t.Context(), "/x", file, "x/y"), "redirects")
	}
	s := serve(t, content)
	host := strings.TrimPrefix(s.URL, "https://")
	for _, ref := range []string{
		other.URL + "/x", "http://" + host + "/x", "//" + host + "/x", "https://user@" + host + "/x",
		"https:" + host, "x", "", "ftp://" + host, "https://" + host + ".evil.example/x", "\x7f",
		"/\\evil.example/x%", "file:///etc/passwd",
	} {
		if err := clientOf(s).Fetch(t.Context(), ref, int64(len(file)), io.Discard); err == nil {
			t.Errorf("%q was fetched", ref)
		}
	}
	if reached.Load() {
		t.Fatal("another server was asked")
	}
	var got bytes.Buffer
	if err := clientOf(s).Fetch(t.Context(), s.URL+"/x", int64(len(file)), &got); err != nil || got.Len() != len(file) {
		t.Fatalf("an absolute URL of the data plane: %v", err)
	}
}

func TestTheNextAddressIsTried(t *testing.T) {
	gone := serve(t, content)
	s := serve(t, content)
	goneURL := gone.URL
	gone.Close()
	var got bytes.Buffer
	if err := clientOf(s, goneURL, s.URL).Fetch(t.Context(), "/x", int64(len(file)), &got); err != nil || got.Len() != len(file) {
		t.Fatal(err)
	}
	c := clientOf(s, goneURL)
	c.Futile = 2
	mustBeProblem(t, c.Fetch(t.Context(), "/x", 10, io.Discard), "cannot be reached")
	mustBeProblem(t, (&transfer.Client{HTTP: s.Client(), Base: func() []string { return nil }}).Fetch(t.Context(), "/x", 10, io.Discard), "no address")
	mustBeProblem(t, clientOf(s, "http://insecure.example").Fetch(t.Context(), "/x", 10, io.Discard), "https://")
}

func TestAStalledLineIsCutAndResumed(t *testing.T) {
	var n atomic.Int32
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1) == 1 {
			w.Header().Set("ETag", `"v1"`)
			w.Header().Set("Content-Length", strconv.Itoa(len(file)))
			w.Write(file[:1000])
			w.(http.Flusher).Flush()
			<-r.Context().Done() // and nothing more
			return
		}
		content(w, r)
	})
	c := clientOf(s)
	c.Stall = 200 * time.Millisecond
	var got bytes.Buffer
	if err := c.Fetch(t.Context(), "/x", int64(len(file)), &got); err != nil || !bytes.Equal(got.Bytes(), file) {
		t.Fatalf("%d bytes, %v", got.Len(), err)
	}
	if n.Load() < 2 { // more, if this machine stalls
		t.Fatalf("%d requests", n.Load())
	}
}

func TestAServerThatNeverAnswersIsGivenUp(t *testing.T) {
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	})
	c := clientOf(s)
	c.Stall, c.Futile = 50*time.Millisecond, 2
	mustBeProblem(t, c.Fetch(t.Context(), "/x", 10, io.Discard), "no byte")
	mustBeProblem(t, c.Put(t.Context(), "/x", file, "x/y"), "no byte")
}

func TestTheContextEndsATransfer(t *testing.T) {
	asked := make(chan struct{})
	s := serve(t, func(w http.ResponseWriter, r *http.Request) { close(asked); <-r.Context().Done() })
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	if err := clientOf(s).Fetch(ctx, "/x", 10, io.Discard); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}

func TestAFullWriterEndsAFetch(t *testing.T) {
	var n atomic.Int32
	s := serve(t, func(w http.ResponseWriter, r *http.Request) { n.Add(1); content(w, r) })
	mustBeProblem(t, clientOf(s).Fetch(t.Context(), "/x", int64(len(file)), broken{}), "cannot be kept")
	if n.Load() != 1 {
		t.Fatalf("%d requests", n.Load())
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestErrorsDoNotTellTheTicket(t *testing.T) {
	s := serve(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(404) })
	err := clientOf(s).Fetch(t.Context(), "/data/x?ticket=secret", 10, io.Discard)
	mustBeProblem(t, err, "/data/x")
	gone := s.URL
	s.Close()
	c := clientOf(s, gone)
	c.Futile = 1
	if err2 := c.Fetch(t.Context(), "/data/x?ticket=secret", 10, io.Discard); strings.Contains(err.Error()+err2.Error(), "secret") {
		t.Fatalf("%v, %v", err, err2)
	}
}

func TestRetryAfterIsHeeded(t *testing.T) {
	var times []time.Time
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if times = append(times, time.Now()); len(times) == 1 {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(503)
			return
		}
		content(w, r)
	})
	if err := clientOf(s).Fetch(t.Context(), "/x", int64(len(file)), io.Discard); err != nil {
		t.Fatal(err)
	}
	if wait := times[1].Sub(times[0]); wait < time.Second {
		t.Fatalf("asked again after %s", wait)
	}
}

// A rate is for all transfers together, in each direction for itself. To wait for
// one's turn is no stall, and cuts nothing.
func TestARateHoldsForAllTogetherAndIsNoStall(t *testing.T) {
	var requests atomic.Int32
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if r.Method == http.MethodPut {
			io.Copy(io.Discard, r.Body)
			return
		}
		w.Header().Set("ETag", `"v1"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file[:24<<10]))
	})
	c := clientOf(s)
	c.Stall = time.Second // less than one turn takes
	c.Pace = transfer.NewPace()
	for direction, one := range map[string]func() error{
		"down": func() error { return c.Fetch(t.Context(), "/x", 24<<10, io.Discard) },
		"up":   func() error { return c.Put(t.Context(), "/x", file[:24<<10], "x/y") },
	} {
		requests.Store(0)
		if direction == "down" {
			c.Pace.Set(0, 8<<10)
		} else {
			c.Pace.Set(8<<10, 0)
		}
		began := time.Now()
		done := make(chan error, 2)
		for range 2 {
			go func() { done <- one() }()
		}
		for range 2 {
			if err := <-done; err != nil {
				t.Fatalf("%s: %v", direction, err)
			}
		}
		// 48 KiB, of which 16 may be ahead: 4 s.
		if took := time.Since(began); took < 3900*time.Millisecond {
			t.Errorf("%s: 48 KiB at 8 KiB a second took %s", direction, took)
		}
		if n := requests.Load(); n != 2 {
			t.Errorf("%s: %d requests for two transfers", direction, n)
		}
	}
	c.Pace.Set(1, 1) // and without limits again, nobody waits
	c.Pace.Set(0, 0)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := errors.Join(c.Fetch(ctx, "/x", 24<<10, io.Discard), c.Put(ctx, "/x", file, "x/y")); err != nil {
		t.Error(err)
	}
}

// What cannot get through before its end is given up at once, and says why.
func TestATransferThatCannotEndInTimeSaysSo(t *testing.T) {
	s := serve(t, content)
	c := clientOf(s)
	c.Pace = transfer.NewPace()
	c.Pace.Set(0, 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	mustBeProblem(t, c.Fetch(ctx, "/x", int64(len(file)), io.Discard), "rate")
}

// A server that never stops to send a little is no stall. Who waits ends it, and
// has a beginning of the file and nothing else.
func TestAServerThatIsSlowForEverIsEndedByTheContext(t *testing.T) {
	const least = 5
	sent := make(chan struct{}, 1<<10)
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		w.Header().Set("Content-Length", strconv.Itoa(len(file)))
		for i := range file {
			w.Write(file[i : i+1])
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return
			case sent <- struct{}{}:
			}
			select {
			case <-r.Context().Done():
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	var got bytes.Buffer
	done := make(chan error, 1)
	go func() { done <- clientOf(s).Fetch(ctx, "/x", int64(len(file)), &got) }()
	for range least {
		<-sent
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if !bytes.HasPrefix(file, got.Bytes()) || got.Len() > len(sent)+least+1 { // one may be sent and not counted yet
		t.Fatalf("%d bytes are no beginning of the file", got.Len())
	}
}
