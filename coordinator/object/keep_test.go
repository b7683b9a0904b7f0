package object

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
)

// slow gives the rest when it may.
type slow struct {
	ctx  context.Context
	may  chan struct{}
	rest io.Reader
}

func (s *slow) Read(p []byte) (int, error) {
	select {
	case <-s.may:
		return s.rest.Read(p)
	case <-s.ctx.Done():
		return 0, s.ctx.Err()
	}
}

// A put may take longer than the coordinator keeps what no object has: what was
// placed first is asked for again and again.
func TestWhatASlowPutHasPlacedIsAskedForUntilItEnds(t *testing.T) {
	defer func(d time.Duration) { keepEvery = d }(keepEvery)
	keepEvery = 10 * time.Millisecond
	for name, put := range map[string]func(c *api.Client, r io.Reader) ([]api.Chunk, error){
		"encrypted": func(c *api.Client, r io.Reader) ([]api.Chunk, error) {
			s := newSession(t, api.Code{Data: 2, Parity: 1}, -1, newIdentity(t))
			s.Payload = chunk.DefaultSize / 2
			o, _, err := Put(testContext(t), c, "f", r, s, PutOptions{})
			if err != nil {
				return nil, err
			}
			return o.Chunks, nil
		},
		"plain": func(c *api.Client, r io.Reader) ([]api.Chunk, error) {
			o, _, err := PutPlain(testContext(t), c, "f", r, 2, nil)
			return o.Chunks, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, c := newShelf(t)
			first, again := "", 0
			var mu sync.Mutex
			may := make(chan struct{})
			s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, "/stripes") {
					return false
				}
				raw, _ := io.ReadAll(r.Body)
				r.Body = io.NopCloser(bytes.NewReader(raw))
				var q api.StripeRequest
				_ = json.Unmarshal(raw, &q)
				mu.Lock()
				defer mu.Unlock()
				if first == "" {
					first = q.Chunks[0]
				}
				if q.Chunks[0] != first {
					return false
				}
				if name == "plain" && q.Replicas != 2 {
					t.Errorf("%d replicas are asked for", q.Replicas)
				}
				if again++; again == 4 {
					close(may)
				}
				return false
			}
			data := randomBytes(t, 2*chunk.DefaultSize)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			chunks, err := put(c, io.MultiReader(bytes.NewReader(data[:chunk.DefaultSize]), &slow{ctx, may, bytes.NewReader(data[chunk.DefaultSize:])}))
			must(t, err)
			if chunks[0].ID != first {
				t.Error("something else was asked for")
			}
			mu.Lock()
			defer mu.Unlock()
			if again < 4 {
				t.Errorf("asked for %d times", again)
			}
		})
	}
}
