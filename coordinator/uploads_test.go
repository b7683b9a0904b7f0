package coordinator

import (
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// A device that begins upload after upload and ends none has the coordinator hold its
// share of memory and no more; others are not held up, and it goes on when one has ended.
func TestUploadsThatDoNotEndAreBounded(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.uploads.wait = 20 * time.Millisecond
	greedy, other := w.enrolled(t), w.enrolled(t)
	order := func(d *device) string {
		o, err := w.outbox.submit(testContext(t), d.id, wire.KindPing, struct{}{}, time.Hour)
		must(t, err)
		return "/data/v1/attachment/" + o.ID
	}
	type upload struct {
		send   *io.PipeWriter
		status chan int
	}
	begin := func(d *device, path string) upload {
		body, send := io.Pipe()
		u := upload{send, make(chan int, 1)}
		req, err := http.NewRequestWithContext(testContext(t), http.MethodPut, w.URL()+path, body)
		must(t, err)
		req.ContentLength = maxAttachment
		go func() {
			status := 0
			if resp, err := d.http.Do(req); err == nil {
				status = resp.StatusCode
				resp.Body.Close()
			}
			body.Close()
			u.status <- status
		}()
		return u
	}
	path := order(greedy)
	var open []upload
	for range uploadBytes / maxAttachment {
		u := begin(greedy, path)
		if _, err := u.send.Write(make([]byte, 1<<20)); err != nil { // it is being read
			t.Fatal(err)
		}
		open = append(open, u)
	}
	if status := next(t, begin(greedy, path).status, "an answer to one too many"); status != http.StatusTooManyRequests {
		t.Errorf("one too many: %d", status)
	}
	if status, body := other.transfer(http.MethodPut, order(other), make([]byte, 1<<20)); status != http.StatusNoContent {
		t.Errorf("another device: %d %s", status, body)
	}
	open[0].send.CloseWithError(errors.New("cut"))
	<-open[0].status
	eventually(t, "its share is free again", func() bool {
		leave, err := w.uploads.enter(context.Background(), greedy.id, maxAttachment)
		if err == nil {
			leave()
		}
		return err == nil
	})
	open[1].send.CloseWithError(errors.New("cut"))
	<-open[1].status
	eventually(t, "nothing is kept of who has no upload", func() bool {
		w.uploads.mu.Lock()
		defer w.uploads.mu.Unlock()
		return len(w.uploads.of) == 0
	})
}
