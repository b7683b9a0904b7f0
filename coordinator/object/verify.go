package object

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"

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
	// Away are those that could not be looked at, because their devices are offline,
	// silent, without one of their volumes, or move no chunks now.
	Away []Fault `json:"away"`
	// Needed is how many shards of a stripe, or copies of a chunk, it takes to read
	// it; Least how many are right where the least are.
	Needed int `json:"needed"`
	Least  int `json:"least"`
}

// Verify reads every shard of an object from every device that should hold it,
// and checks it against its id. It needs no key; the list of ids is the
// coordinator's word unless the object came from [Open]. What is not to be
// blamed on a device ends it: that the coordinator cannot be asked, or refuses.
// progress is told the bytes of each chunk when all its copies were looked at.
func Verify(ctx context.Context, c *api.Client, o api.Object, progress func(bytes int64)) (Report, error) {
	r := Report{Faults: []Fault{}, Away: []Fault{}, Needed: 1}
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
	v := &verifier{client: c, width: width, report: &r, progress: progress, right: make([]int, len(o.Chunks)), left: make([]int, len(o.Chunks))}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for i, ch := range o.Chunks {
		holders := placed[i].Holders
		if len(holders) == 0 {
			holders = []api.Holder{{}}
		}
		v.left[i] = len(holders)
		for _, h := range holders {
			switch {
			case h.Device == "":
				v.note(i, ch, h.Device, found{fault: "no device is known to hold it"})
			case h.Lost:
				v.note(i, ch, h.Device, found{fault: "the device has lost it"})
			default:
				g.Go(func() error {
					f, err := v.look(gctx, ch, h.Device)
					if err == nil {
						v.note(i, ch, h.Device, f)
					}
					return err
				})
			}
		}
	}
	if err := g.Wait(); err != nil {
		return r, err
	}
	for _, list := range [][]Fault{r.Faults, r.Away} {
		slices.SortFunc(list, func(a, b Fault) int {
			return cmp.Or(cmp.Compare(a.Stripe, b.Stripe), cmp.Compare(a.Shard, b.Shard), cmp.Compare(a.Device, b.Device))
		})
	}
	r.Least = least(v.right, o.Code)
	return r, ctx.Err()
}

// verifier is one verify under way.
type verifier struct {
	client   *api.Client
	width    int
	progress func(int64)

	mu          sync.Mutex // guards the rest
	report      *Report
	right, left []int // copies of each chunk: that are right, that are not looked at yet
}

// found is what became of a look at a copy: it is right if both are empty.
type found struct{ fault, away string }

func (v *verifier) note(i int, ch api.Chunk, d wire.DeviceID, f found) {
	v.mu.Lock()
	defer v.mu.Unlock()
	problem := Fault{Stripe: i / v.width, Shard: i % v.width, Chunk: ch.ID, Device: d, Problem: f.fault + f.away}
	switch {
	case f.fault != "":
		v.report.Faults = append(v.report.Faults, problem)
	case f.away != "":
		v.report.Away = append(v.report.Away, problem)
	default:
		v.right[i]++
		v.report.Read++
	}
	if v.left[i]--; v.left[i] == 0 && v.progress != nil {
		v.progress(ch.Size)
	}
}

// While devices, or the coordinator, are busy, they are asked again after so long,
// so many times.
var busyWait = 5 * time.Second

const busyTries = 24

// look reads one copy. The error is one that says nothing of it.
func (v *verifier) look(ctx context.Context, ch api.Chunk, d wire.DeviceID) (found, error) {
	for try := 1; ; try++ {
		data, err := v.client.GetChunkFrom(ctx, ch.ID, d)
		if ctx.Err() != nil {
			return found{}, ctx.Err()
		}
		if err == nil {
			if err = checkChunk(ch, data); err != nil {
				return found{fault: err.Error()}, nil
			}
			return found{}, nil
		}
		var e *api.Error
		if !errors.As(err, &e) {
			return found{}, err
		}
		crowded := e.Status == http.StatusTooManyRequests
		switch {
		case slices.Contains([]string{wire.CodeLost, wire.CodeNotFound, "unreadable"}, e.Code):
			return found{fault: e.Reason}, nil
		case slices.Contains([]string{"offline", "no_answer", wire.CodeUnreachable, wire.CodeMetered, wire.CodeQuietHours}, e.Code), e.Code == wire.CodeBusy && try == busyTries:
			return found{away: e.Reason}, nil
		case e.Code != wire.CodeBusy && !crowded, try == busyTries:
			return found{}, err
		}
		select {
		case <-time.After(busyWait):
		case <-ctx.Done():
			return found{}, ctx.Err()
		}
	}
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
