package object

import (
	"context"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// keeper keeps what a put has placed from being dropped while the put goes on.
// The coordinator drops after a day what no object has and nobody asks for, and a
// large file over a slow line takes longer than that: so it is asked for again.
type keeper struct {
	client *api.Client
	stop   context.CancelFunc
	ended  chan struct{}

	mu   sync.Mutex
	kept []kept
}

// kept are chunks that were asked for at a time.
type kept struct {
	api.StripeRequest
	at time.Time
}

// keepEvery is how long what is placed is not asked for. It leaves time for many
// tries in the coordinator's day.
var keepEvery = 6 * time.Hour

// keep begins; the keeper must be ended.
func keep(ctx context.Context, c *api.Client) *keeper {
	ctx, cancel := context.WithCancel(ctx)
	k := &keeper{client: c, stop: cancel, ended: make(chan struct{})}
	go k.run(ctx)
	return k
}

func (k *keeper) end() {
	k.stop()
	<-k.ended
}

// add takes in what was asked for just now; of nil it does nothing.
func (k *keeper) add(q api.StripeRequest) {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kept = append(k.kept, kept{q, wall()})
}

// wall is the time by the clock on the wall, which goes on while the machine sleeps.
func wall() time.Time { return time.Now().Round(0) }

func (k *keeper) run(ctx context.Context) {
	defer close(k.ended)
	t := time.NewTicker(keepEvery / 12)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			k.renew(ctx)
		}
	}
}

// renew asks for what is due. What fails is asked for at the next turn; if that
// never succeeds, the put ends with the coordinator's refusal to name what it has
// not.
func (k *keeper) renew(ctx context.Context) {
	k.mu.Lock()
	n := len(k.kept)
	k.mu.Unlock()
	for i := range n {
		k.mu.Lock()
		q := k.kept[i]
		k.mu.Unlock()
		if wall().Sub(q.at) < keepEvery {
			continue
		}
		if _, err := k.client.Stripe(ctx, q.StripeRequest); err != nil {
			if ctx.Err() != nil {
				return
			}
			continue
		}
		k.mu.Lock()
		k.kept[i].at = wall()
		k.mu.Unlock()
	}
}
