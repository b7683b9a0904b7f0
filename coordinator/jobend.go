package coordinator

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// # How jobs end, what is kept of them, and what is looked after once a second

// finish ends jobs: those whose tasks have all ended, that were canceled or have no
// time left.
func (s *jobs) finish(ctx context.Context) {
	now := s.now().UTC()
	var list []jobRow
	s.rows.each(func(_ string, v jobRow) bool {
		list = append(list, v)
		return true
	})
	for _, v := range list {
		s.mu.Lock()
		good, failed := 0, 0
		if p := s.open[v.ID]; p != nil {
			good, failed = p.good, p.failed
		}
		s.mu.Unlock()
		state, code, reason := wire.Succeeded, "", ""
		switch {
		case v.Cancel != nil:
			state, code, reason = wire.Canceled, wire.CodeCanceled, "it was canceled by "+v.Cancel.By
			if v.Cancel.Reason != "" {
				reason += ": " + v.Cancel.Reason
			}
		case good+failed == v.Tasks && failed > 0:
			state, code, reason = s.failure(v, failed)
		case good+failed == v.Tasks:
		case now.After(v.Spec.Deadline):
			state, code, reason = wire.TimedOut, wire.CodeLimit, fmt.Sprintf("the deadline has come, and %d of %d tasks have not ended", v.Tasks-good-failed, v.Tasks)
			if w := s.plan.waits(v.ID); w != nil {
				reason += "; what waits: " + w.Reason
			}
		default:
			continue
		}
		if err := s.end(ctx, v, state, code, reason); err != nil && ctx.Err() == nil {
			s.log.Warn("a job that is over is not marked so yet", "job", v.ID, "error", err)
		}
	}
}

// failure is how a job ends of which tasks have failed.
func (s *jobs) failure(v jobRow, failed int) (state wire.State, code, reason string) {
	if v.Tasks > 1 {
		return wire.Failed, "tasks_failed", fmt.Sprintf("%d of %d tasks failed", failed, v.Tasks)
	}
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	t, err := s.tasks.find(ctx, taskKey(v.ID, 0))
	if err != nil || !t.State.Terminal() {
		return wire.Failed, "tasks_failed", "its task failed"
	}
	return t.State, t.Code, t.Reason
}

// end marks a job as over. Tasks that run are told to stop.
func (s *jobs) end(ctx context.Context, v jobRow, state wire.State, code, reason string) error {
	p := &s.plan
	p.mu.Lock()
	var open []int32
	if w := p.works[v.ID]; w != nil {
		w.pending = nil
		for i := range w.open {
			open = append(open, i)
		}
	}
	p.mu.Unlock()
	for _, i := range open {
		row, err := s.tasks.change(ctx, taskKey(v.ID, int(i)), func(t *taskRow, exists bool) error {
			if !exists || t.State.Terminal() {
				return errUnchanged
			}
			t.State, t.Code, t.Reason, t.Ended = state, code, reason, s.now().UTC()
			return nil
		})
		if err != nil {
			return err
		}
		s.stop(ctx, row, reason)
	}
	good := 0
	s.mu.Lock()
	if p := s.open[v.ID]; p != nil {
		good = p.good
	}
	s.mu.Unlock()
	_, err := s.rows.change(ctx, v.ID, func(r *jobRow, exists bool) error {
		if !exists || r.State.Terminal() {
			return errUnchanged
		}
		r.State, r.Code, r.Reason, r.Ended = state, code, reason, s.now().UTC()
		r.Succeeded, r.Failed = good, r.Tasks-good
		return nil
	})
	if err == nil {
		p.mu.Lock()
		delete(p.works, v.ID)
		p.mu.Unlock()
	}
	return err
}

// keepHouse sees to what takes too long, and to modules and lists, which the shelf
// forgets after a day.
func (s *jobs) keepHouse(ctx context.Context) {
	p, now := &s.plan, s.now()
	if d := now.Sub(p.kept); d >= 0 && d < houseEvery {
		return
	}
	p.kept = now
	var shelve []string
	p.mu.Lock()
	for _, w := range p.works {
		if now.Sub(w.shelved) > s.pace.module {
			w.shelved, shelve = now, append(shelve, w.row.Spec.Module)
		}
		late := s.late(w)
		for i, o := range w.open {
			for _, a := range o.row.Attempts {
				if !a.Ended.IsZero() || o.extra >= mostExtra || slices.Contains(o.passed, a.Order) {
					continue
				}
				stands, still := o.still[a.Order]
				wait := s.pace.away
				if stands.silent {
					wait = s.pace.silent
				}
				// One that has had all the time that it may run hangs, whatever it says.
				still = still && now.Sub(stands.since) > wait
				if late > 0 && now.Sub(a.Began) > late || still || now.Sub(a.Began) > lifeOfJob(w.row.Spec.Limits) || s.awayFor(a.Device) > s.pace.away {
					if still && stands.silent {
						p.missed(a.Device)
					}
					o.extra, o.passed = o.extra+1, append(o.passed, a.Order)
					w.queue(i)
				}
			}
		}
	}
	p.mu.Unlock()
	for _, m := range shelve {
		code, err := s.compute.module(ctx, m)
		if err == nil {
			err = s.compute.staging.put(ctx, blobRef{moduleBlob, m}.String(), code)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("the module of a job may be forgotten before the job is done", "module", m, "error", err)
		}
	}
	if d := now.Sub(p.listed); d < 0 || d > s.pace.module {
		p.listed = now
		s.keepLists(ctx, now.Add(-s.pace.module))
	}
}

// keepLists puts the lists of open orders on the shelf anew that were made before a time: a device
// fetches its list when the job begins, which its owner may put off for days. A challenge's, too.
func (s *jobs) keepLists(ctx context.Context, before time.Time) {
	for _, v := range s.outbox.unfinishedBefore(wire.KindJobRun, before) {
		b, err := wire.DecodeBody[wire.JobRun](v.Order)
		if err != nil {
			continue
		}
		for _, in := range b.Inputs {
			if in.List == nil {
				continue
			}
			name := listName(v.Order.ID, in.List.SHA256)
			raw, err := s.compute.staging.get(ctx, name)
			if err == nil {
				err = s.compute.staging.put(ctx, name, raw)
			}
			// It may have ended meanwhile, and its list been dropped.
			if row, ok := s.outbox.rows.get(orderKeyOf(v.Order.Device, v.Order.ID)); !ok || row.State.Terminal() {
				s.dropLists(ctx, v.Order)
				break
			}
			if err != nil && ctx.Err() == nil {
				s.log.Warn("the list of an input's chunks may be forgotten before the job has begun", "order", v.Order.ID, "error", err)
			}
		}
	}
}

// late is from when on a task of a job takes too long beside the others; 0: that
// cannot be said yet. p.mu is held.
func (s *jobs) late(w *work) time.Duration {
	n, ended := len(w.times), 0
	s.mu.Lock()
	if p := s.open[w.row.ID]; p != nil {
		ended = len(p.ended)
	}
	s.mu.Unlock()
	if n == 0 || w.row.Tasks < lateTasks || float64(ended) < lateShare*float64(w.row.Tasks) {
		return 0
	}
	sorted := slices.Sorted(slices.Values(w.times))
	return max(time.Duration(lateTimes*sorted[n/2]*float64(time.Second)), s.pace.late)
}

// awayFor is how long a device has been away; 0: it is there.
func (s *jobs) awayFor(d wire.DeviceID) time.Duration {
	if s.reg.online(d) {
		return 0
	}
	if since := s.reg.lastSeen(d); !since.IsZero() {
		return s.now().Sub(since)
	}
	return s.now().Sub(s.started)
}

// keep notes where the outputs of a result are: what a device has signed for is as
// good as a receipt.
func (s *jobs) keep(ctx context.Context, v OrderRecord, out jobOutcome) error {
	now := s.now().UTC()
	for _, o := range out.result.Outputs {
		for _, part := range o.Parts {
			_, err := s.storage.chunks.change(ctx, part.Chunk, func(c *chunkRecord, exists bool) error {
				if !exists {
					*c = chunkRecord{ID: part.Chunk, Size: part.Size}
				}
				if c.Size != part.Size {
					return refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s signed for chunk %s with %d bytes, it has %d", v.Order.Device, part.Chunk, part.Size, c.Size)
				}
				c.Used, c.Until = now, latest(c.Until, now.Add(s.pace.kept))
				if slices.ContainsFunc(c.Holders, func(h api.Holder) bool { return h.Device == v.Order.Device && !h.Lost }) {
					return nil
				}
				c.Holders = slices.DeleteFunc(c.Holders, func(h api.Holder) bool { return h.Device == v.Order.Device })
				c.Holders = append(c.Holders, api.Holder{Device: v.Order.Device, Order: v.Order.ID, Since: now})
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// saveOf makes stored files of the outputs of a task whose result stands.
func (s *jobs) saveOf(ctx context.Context, job jobRow, t taskRow) error {
	a := t.Attempts[t.Stands]
	v, err := s.outbox.get(ctx, a.Device, a.Order)
	if err != nil {
		return err
	}
	out, err := s.compute.collect(ctx, v)
	if err != nil {
		return err
	}
	for _, o := range out.result.Outputs {
		file, ok := job.Spec.Save[o.Name]
		if !ok {
			continue
		}
		obj := api.Object{Name: fileOf(file, t.Name), Size: o.Size, SHA256: o.SHA256, Chunks: make([]api.Chunk, len(o.Parts))}
		for k, part := range o.Parts {
			obj.Chunks[k] = api.Chunk{ID: part.Chunk, Size: part.Size}
			if _, err := s.storage.chunks.change(ctx, part.Chunk, func(c *chunkRecord, exists bool) error {
				if exists {
					c.ask(defaultReplicas) // repair makes the others
					c.Until = time.Time{}  // the file says how long it is kept
				}
				return nil
			}); err != nil {
				return err
			}
		}
		if _, err := s.storage.putObject(ctx, obj); err != nil {
			return err
		}
	}
	return nil
}

// fileOf is the name of the file that an output of a task is kept as.
func fileOf(file, task string) string { return strings.ReplaceAll(file, "{}", task) }

// noteLoss takes a device at its word that it does not have its task's input any more.
func (s *jobs) noteLoss(ctx context.Context, v OrderRecord) {
	b, err := wire.DecodeBody[wire.JobRun](v.Order)
	if err != nil || b.Input == "" || len(b.Inputs) > 0 {
		return
	}
	if err := s.storage.lost(ctx, v.Order.Device, []string{b.Input}); err != nil && ctx.Err() == nil {
		s.log.Warn("a loss could not be noted", "chunk", b.Input, "error", err)
	}
}
