package coordinator

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
	"github.com/oklog/ulid/v2"
)

// # Challenges of a job: who is owed one, made of what, and sent as any order of a job

// challenge makes the challenges that are owed, until ctx ends.
func (h *honesty) challenge(ctx context.Context) {
	var going sync.WaitGroup
	defer going.Wait()
	for {
		select {
		case <-h.wake: // flush sees to it, at a start too
		case <-ctx.Done():
			return
		}
		for h.one(ctx, &going) {
		}
	}
}

// one begins the oldest challenge that is owed, when it is its turn. It is taken off the
// record only then.
func (h *honesty) one(ctx context.Context, going *sync.WaitGroup) (more bool) {
	select {
	case h.turn <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	back := func() { <-h.turn }
	key, o, ok := h.oldest()
	if ok = ok && h.jobs.leading.Load(); !ok { // else who gives places to tasks makes it
		back()
		return false
	}
	err := h.rows.remove(ctx, key, func(owed) bool { return true })
	if err != nil {
		back()
		if !errors.Is(err, errNotFound) && ctx.Err() == nil { // else another coordinator has it
			h.log.Warn("challenges among jobs wait: the record of one cannot be taken", "error", err)
			return false
		}
		return ctx.Err() == nil
	}
	going.Go(func() {
		begun, err := h.make(ctx, o)
		if err != nil && !begun && ctx.Err() == nil {
			err = errors.Join(err, h.later(ctx, o))
		}
		if err != nil && ctx.Err() == nil {
			h.log.Info("a challenge among jobs was not made", "device", o.Device, "tries", o.Tries+1, "error", err)
		}
	})
	return true
}

// later puts a challenge that could not be made back: a holder of its input was away, say, or the
// job failed here.
func (h *honesty) later(ctx context.Context, o owed) error {
	if o.Tries++; o.Tries >= owedTries {
		return nil
	}
	o.Next = h.now().Add(owedPause << o.Tries).UTC()
	return h.rows.create(ctx, ulid.Make().String(), o)
}

// oldest is the challenge that is owed for longest by a device that is there and lets jobs run.
func (h *honesty) oldest() (key string, first owed, ok bool) {
	unheard := make(map[wire.DeviceID]int)
	h.audits.challenges.each(func(_ string, v challengeRow) bool {
		if v.Own != nil {
			unheard[v.Device]++
		}
		return true
	})
	reg := h.audits.storage.reg
	h.rows.each(func(k string, o owed) bool {
		if (!ok || k < key) && !o.Next.After(h.now()) && unheard[o.Device] < maxUnheard && reg.mayWork(o.Device) && reg.runsJobs(o.Device) {
			key, first, ok = k, o, true
		}
		return true
	})
	return key, first, ok
}

// make makes one challenge and sends it; begun is true once it is on record. The turn is given
// back when the coordinator has worked out the answer, and has rested.
func (h *honesty) make(ctx context.Context, o owed) (begun bool, err error) {
	limited, cancel := context.WithTimeout(ctx, h.audits.limit)
	defer cancel()
	ran := false
	defer func() {
		if !ran {
			<-h.turn
		}
	}()
	l, err := h.like(limited, o)
	if err != nil {
		return false, err
	}
	rec := api.Audit{Kind: api.ComputeAudit, Device: o.Device, Routine: true}
	row, err := h.audits.computeChallenge(limited, rec, l, func(took time.Duration) {
		ran = true
		time.AfterFunc(min(paceOwn*took, paceMost), func() { <-h.turn })
	})
	if err != nil {
		return row.ID != "", err
	}
	// Its turn at the device may come late, which holds up nobody.
	waits, done := context.WithTimeout(ctx, max(l.deadline.Sub(h.now()), time.Second))
	defer done()
	_, err = h.dispatch(waits, row, l)
	return true, err
}

// send sends a job that is no customer's, as a customer's is sent, and when the device would be
// given one more task.
func (h *honesty) send(ctx context.Context, id string, q asked, d jobDevice, deadline time.Time) (wire.Order, error) {
	sent, err := h.jobs.reserve(ctx, d.id, id)
	if err != nil {
		return wire.Order{}, err
	}
	defer sent()
	body, life, err := h.jobs.orderFor(ctx, id, q, d, deadline)
	if err != nil {
		return wire.Order{}, err
	}
	h.mu.Lock()
	h.ours[id] = time.Time{}
	h.mu.Unlock()
	v, err := h.audits.compute.sendAs(ctx, "", id, d.id, q.run.Module.SHA256, body, life)
	if err != nil {
		h.forget(id, h.now())
	}
	return v.Order, err
}

// forget ends that a report is awaited of a job that is no customer's, a moment after the
// order's end.
func (h *honesty) forget(order string, end time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ours[order] = end.Add(oursKept)
}
