package object

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// Fault is a shard, or a copy of a chunk, that is not where it should be or not
// what it should be.
type Fault struct {
	Stripe  int           `json:"stripe"` // from 0; of a plain object, the chunk
	Shard   int           `json:"shard"`  // in the stripe, from 0; of a plain object, 0
	Chunk   string        `json:"chunk"`
	Device  wire.DeviceID `json:"device,omitempty"` // empty: no device has it
	Problem string        `json:"problem"`
}

// Report is what [Verify] found.
type Report struct {
	Read   int     `json:"read"` // shards and copies that are right
	Faults []Fault `json:"faults"`
	// Needed is how many shards of a stripe, or copies of a chunk, it takes to read
	// it; Least how many are right where the least are.
	Needed int `json:"needed"`
	Least  int `json:"least"`
}

// Verify reads every shard of an object from every device that should hold it,
// and checks it against its id. It needs no key; the list of ids is the
// coordinator's word unless the object came from [Open].
func Verify(ctx context.Context, c *api.Client, o api.Object, progress func(bytes int64)) (Report, error) {
	r := Report{Faults: []Fault{}, Needed: 1}
	placed, err := c.ObjectPlacements(ctx, o.Name)
	if err != nil {
		return r, err
	}
	width := 1
	if o.Code != nil {
		r.Needed, width = o.Code.Data, o.Code.Shards()
	}
	if !slices.EqualFunc(placed, o.Chunks, func(p api.Placement, ch api.Chunk) bool { return p.Chunk == ch }) {
		return r, damaged("the coordinator told the places of other chunks than those of %q", o.Name)
	}
	right := make([]int, len(o.Chunks)) // copies of each
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for i, ch := range o.Chunks {
		fault := func(d wire.DeviceID, problem string) {
			mu.Lock()
			defer mu.Unlock()
			r.Faults = append(r.Faults, Fault{Stripe: i / width, Shard: i % width, Chunk: ch.ID, Device: d, Problem: problem})
		}
		if len(placed[i].Holders) == 0 {
			fault("", "no device is known to hold it")
		}
		for _, h := range placed[i].Holders {
			if h.Lost {
				fault(h.Device, "the device has lost it")
				continue
			}
			g.Go(func() error {
				data, err := c.GetChunkFrom(gctx, ch.ID, h.Device)
				if err == nil {
					err = checkChunk(ch, data)
				}
				if gctx.Err() != nil {
					return gctx.Err()
				}
				if err != nil {
					fault(h.Device, err.Error())
					return nil
				}
				mu.Lock()
				right[i]++
				r.Read++
				mu.Unlock()
				if progress != nil {
					progress(ch.Size)
				}
				return nil
			})
		}
	}
	if err := g.Wait(); err != nil {
		return r, err
	}
	slices.SortFunc(r.Faults, func(a, b Fault) int {
		return cmp.Or(cmp.Compare(a.Stripe, b.Stripe), cmp.Compare(a.Shard, b.Shard), cmp.Compare(a.Device, b.Device))
	})
	r.Least = least(right, o.Code)
	return r, ctx.Err()
}

// least is the right copies of the chunk that has the least, with a code the
// right shards of such a stripe; 0 if there is none.
func least(right []int, code *api.Code) int {
	if len(right) == 0 {
		return 0
	}
	if code == nil {
		return slices.Min(right)
	}
	out := code.Shards()
	for stripe := range slices.Chunk(right, code.Shards()) {
		n := 0
		for _, copies := range stripe {
			n += min(copies, 1)
		}
		out = min(out, n)
	}
	return out
}
