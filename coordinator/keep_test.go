package coordinator

import (
	"crypto/rand"
	"net/http"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
)

// What a put that takes days has placed stays as long as it is asked for, with as
// many copies as it was placed for.
func TestWhatIsAskedForAgainIsNoOrphan(t *testing.T) {
	w := ownWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 2)
	put := func(data []byte) string {
		t.Helper()
		id := chunk.Sum(data).String()
		_, err := w.op.PutChunk(ctx, id, data, 2)
		must(t, err)
		return id
	}
	asked, forgotten := put(someBytes(100)), put(someBytes(200))
	ask := func(replicas int) error {
		st, err := w.op.Stripe(ctx, api.StripeRequest{Token: rand.Text(), Code: api.Code{Data: 1}, Size: 100, Chunks: []string{asked}, Replicas: replicas})
		if err == nil && len(st.Placed) != 1 {
			t.Errorf("placed: %+v", st)
		}
		return err
	}
	for range 6 {
		w.advance(6*time.Hour + time.Minute)
		for _, d := range devices {
			d.hello()
		}
		must(t, ask(2))
		must(t, w.storage.dropOrphans(ctx))
	}
	if _, ok := w.storage.chunks.get(forgotten); ok {
		t.Error("what nobody asks for is still there")
	}
	c := w.chunkRecord(t, asked)
	if len(holders(c.Holders)) != 2 || c.wanted() != 2 {
		t.Errorf("%d copies, %d are wanted", len(holders(c.Holders)), c.wanted())
	}
	for _, n := range []int{-1, maxReplica + 1} {
		wantRefusal(t, ask(n), http.StatusBadRequest, "bad_replicas")
	}
}
