package coordinator

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
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
	if !ok {
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
		made, err := h.make(ctx, o)
		if err != nil && !made && ctx.Err() == nil {
			err = errors.Join(err, h.later(ctx, o))
		}
		if err != nil && ctx.Err() == nil {
			h.log.Info("a challenge among jobs was not made", "device", o.Device, "tries", o.Tries+1, "error", err)
		}
	})
	return true
}

// later puts a challenge that could not be made back: a holder of its input was away, say.
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
		if (!ok || k < key) && !o.Next.After(h.now()) && unheard[o.Device] < maxUnheard && reg.mayWork(o.Device) && !reg.pauses(o.Device) {
			key, first, ok = k, o, true
		}
		return true
	})
	return key, first, ok
}

// make makes one challenge and sends it; made is true once the coordinator has run the job.
// The turn is given back when the coordinator has worked out the answer, and has rested.
func (h *honesty) make(ctx context.Context, o owed) (made bool, err error) {
	limited, cancel := context.WithTimeout(ctx, h.audits.limit)
	defer cancel()
	defer func() {
		if !made {
			<-h.turn
		}
	}()
	m, err := h.model(limited, o)
	if err != nil {
		return made, err
	}
	job, data, err := h.like(limited, o.Device, m)
	if err != nil {
		return made, err
	}
	rec := api.Audit{Kind: api.ComputeAudit, Device: o.Device, Routine: true}
	row, err := h.audits.computeChallenge(limited, rec, job, data, func(took time.Duration) {
		made = true
		time.AfterFunc(min(paceOwn*took, paceMost), func() { <-h.turn })
	})
	if err == nil {
		err = h.hand(ctx, row)
	}
	return made, err
}

// model is the job that a challenge is made like: the one after which it was drawn, or
// another new one if that is of a kind that the coordinator cannot run.
func (h *honesty) model(ctx context.Context, o owed) (wire.JobRun, error) {
	v, err := h.audits.outbox.get(ctx, o.Device, o.Order)
	if err != nil {
		return wire.JobRun{}, err
	}
	asked, err := wire.DecodeBody[wire.JobRun](v.Order)
	if err != nil {
		return asked, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if cannot := challengeable(asked); cannot != nil {
		if len(h.models) == 0 {
			return asked, fmt.Errorf("there is no job of a customer that a challenge could be made like: %w", cannot)
		}
		return h.models[rand.IntN(len(h.models))], nil
	}
	h.models = newestOf(append(h.models, asked), modelsKept)
	return asked, nil
}

// like is a customer's job over other chunks: such that the device holds and has not had
// with this module, of sizes like the customer's.
func (h *honesty) like(ctx context.Context, d wire.DeviceID, m wire.JobRun) (job wire.JobRun, data reading, err error) {
	h.mu.Lock()
	had := slices.Clone(h.had[d])
	h.mu.Unlock()
	seen := func(id string) { had = append(had, hadJob{m.Module.SHA256, id}) }
	seen(m.Input)
	for _, in := range m.Inputs {
		for _, p := range in.Parts {
			seen(p.Chunk)
		}
	}
	other := func(size int64) (id string, data []byte, err error) {
		id, data, err = h.audits.knownInput(ctx, d, func(c api.Chunk) bool {
			return !slices.Contains(had, hadJob{m.Module.SHA256, c.ID}) && (size == 0 || c.Size >= size/2 && c.Size <= 2*size)
		})
		seen(id)
		return id, data, err
	}
	job, data.inputs = m, make(map[string][]byte)
	if m.Input != "" {
		size := h.audits.sizesOf(api.Audit{Chunks: []string{m.Input}})[m.Input]
		if job.Input, data.input, err = other(size); err != nil {
			return job, data, err
		}
	}
	job.Inputs = slices.Clone(m.Inputs)
	for i, in := range m.Inputs {
		job.Inputs[i].Parts, data.inputs[in.Name] = nil, nil
		for _, p := range in.Parts {
			id, part, err := other(p.Size)
			if err != nil {
				return job, data, err
			}
			job.Inputs[i].Parts = append(job.Inputs[i].Parts, wire.JobPart{Chunk: id, Size: int64(len(part))})
			data.inputs[in.Name] = append(data.inputs[in.Name], part...)
		}
	}
	return job, data, nil
}

// send sends a job that is no customer's, when the device would be given one more task.
func (h *honesty) send(ctx context.Context, id string, d wire.DeviceID, job wire.JobRun) (wire.Order, error) {
	sent, err := h.reserve(ctx, d, id)
	if err != nil {
		return wire.Order{}, err
	}
	defer sent()
	h.mu.Lock()
	h.ours[id] = time.Time{}
	h.mu.Unlock()
	v, err := h.audits.compute.sendAs(ctx, id, d, job.Module.SHA256, job, lifeOfJob(job.Limits))
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
