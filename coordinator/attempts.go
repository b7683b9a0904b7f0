package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// # What the end of an attempt makes of its task

// settle takes in how an attempt has ended, and what follows for its task, until that is
// kept: nobody else would find it before the next start.
func (s *jobs) settle(ctx context.Context, id string, task int, a api.JobAttempt, v OrderRecord, err error) {
	for wait := houseEvery; ; wait = min(2*wait, longestRetry) {
		failed := s.takeIn(ctx, id, task, a, v, err)
		if failed == nil || ctx.Err() != nil {
			return
		}
		s.log.Warn("the end of a task could not be kept; it will be tried again", "job", id, "task", task, "error", failed)
		if rest(ctx, wait) != nil {
			return
		}
	}
}

// takeIn is settle, once.
func (s *jobs) takeIn(ctx context.Context, id string, task int, a api.JobAttempt, v OrderRecord, err error) error {
	defer s.settling.lock(taskKey(id, task))()
	var out jobOutcome
	if err == nil {
		out, err = s.compute.collect(ctx, v)
	}
	if err == nil {
		err = s.keep(ctx, v, out)
	}
	if ctx.Err() != nil {
		return ctx.Err() // it is found again
	}
	job, failed := s.rows.find(ctx, id)
	if failed != nil && !errors.Is(failed, errNotFound) {
		return failed
	}
	job.ID = id
	a.Ended, a.State = s.now().UTC(), wire.Succeeded
	if err != nil {
		a.State, a.Code, a.Reason, a.Retry = ending(err, v)
	} else {
		a.Result, a.CPU, a.Wall, a.Engine, a.Disturbed = resultDigest(out.result), out.result.CPUSeconds, out.result.WallSeconds, label(out.result.Engine), disturbed(out.result)
	}
	row, changed, failed := s.update(ctx, job, task, func(t *taskRow) bool {
		k := slices.IndexFunc(t.Attempts, func(x api.JobAttempt) bool { return x.Order == a.Order })
		if k < 0 || !t.Attempts[k].Ended.IsZero() {
			return false
		}
		t.Attempts[k] = a
		return true
	})
	if failed != nil {
		return failed
	}
	if row.State.Terminal() {
		s.stop(ctx, row, "another device was first, or the job has ended")
		if changed {
			s.credit(ctx, job, row)
		}
	}
	if v.Order.ID != "" {
		s.dropLists(ctx, v.Order)
	}
	s.settled(id, task, a, row)
	if a.State != wire.Succeeded && (a.Code == wire.CodeLost || a.Code == wire.CodeNotFound) {
		s.noteLoss(ctx, v)
	}
	return nil
}

// ending is how an attempt has failed, in few words.
func ending(err error, v OrderRecord) (state wire.State, code, reason string, retry int64) {
	var r *refusal
	var p *wire.Problem
	switch {
	case errors.As(err, &p):
		return p.State, p.Code, cutText(p.Reason, maxLoggedText), v.Result.RetrySeconds
	case errors.As(err, &r):
		return wire.Failed, r.Code, cutText(r.Reason, maxLoggedText), 0
	}
	return wire.Failed, wire.CodeInternal, cutText(err.Error(), maxLoggedText), 0
}

// settled is what the planner makes of the end of an attempt.
func (s *jobs) settled(id string, task int, a api.JobAttempt, row taskRow) {
	p, now := &s.plan, s.now()
	p.mu.Lock()
	defer p.mu.Unlock()
	defer s.poke()
	p.release(a.Order, a.Device)
	switch {
	case a.State == wire.Succeeded:
		delete(p.resting, a.Device)
		p.did(a.Device)
	case deviceFailed(a):
		if a.Code == codeNoAnswer {
			p.missed(a.Device)
		}
		r := p.resting[a.Device]
		wait := min(s.pace.rest<<min(r.times, 10), longestJobRest)
		if a.Retry > 0 {
			wait = max(wait, time.Duration(min(a.Retry, int64(maxLife/time.Second)))*time.Second)
		}
		p.resting[a.Device] = jobRest{now.Add(wait), r.times + 1, a.Code}
	}
	if d := p.there.find(a.Device); d != nil { // the look is a moment old
		if r := p.resting[d.id]; now.Before(r.until) {
			d.rests = &api.JobWait{Code: r.code, Reason: "failed lately (" + r.code + ")"}
		}
	}
	w := p.works[id]
	if w == nil {
		return
	}
	if a.State == wire.Succeeded {
		w.times = append(w.times, a.Ended.Sub(a.Began).Seconds())
	}
	o := w.open[int32(task)]
	if o == nil {
		return
	}
	var kept bool
	if o.row, kept = s.tasks.get(taskKey(id, task)); !kept { // it has ended, and nothing of it goes on
		o.row = row
	}
	delete(o.still, a.Order)
	if row.State.Terminal() {
		w.over(int32(task))
		return
	}
	w.queueFirst(int32(task))
}

// deviceFailed tells whether it is the device that could not do a task, and not the
// task that could not be done.
func deviceFailed(a api.JobAttempt) bool {
	switch a.Code {
	case codeGuestFailed, codeBadModule, wire.CodeBadBody, wire.CodeLimit, wire.CodeLost, wire.CodeNotFound, wire.CodeInterrupted, "too_large", "no_module":
		return false
	}
	return a.State != wire.Canceled
}

// Codes of jobs/... that a device ends a job with.
const (
	codeGuestFailed = "guest_failed"
	codeBadModule   = "bad_module"
	codeDisagree    = "disagreement"
)

// failedAt tells whether a task came to a limit that the job itself has set, and that is the same
// on each device: of its memory, or its output. How much time it takes differs.
func failedAt(a api.JobAttempt, l wire.JobLimits) bool {
	return a.State == wire.Failed && a.Code == wire.CodeLimit && (l.MemoryBytes > 0 || l.OutputBytes > 0)
}

// decide sets a task's state by its attempts; lone is as for [jobs.rule].
func (s *jobs) decide(job jobRow, t *taskRow, lone func() bool) {
	now := s.now().UTC()
	end := func(state wire.State, code, format string, args ...any) {
		t.State, t.Code, t.Reason, t.Ended, t.Next = state, code, cutText(fmt.Sprintf(format, args...), maxLoggedText), now, time.Time{}
	}
	fails, good := 0, 0
	guest := make(map[string]int) // how often an owner's devices have said that it is the module that fails
	var last api.JobAttempt       // that counts
	for _, a := range t.Attempts {
		if !a.Ended.IsZero() && a.State == wire.Succeeded {
			good++
		}
		switch {
		case a.Ended.IsZero() || a.State == wire.Succeeded || a.Retry > 0 || a.State == wire.Canceled && (a.Code == wire.CodeRetired || a.Code == wire.CodeInterrupted):
			continue
		case a.State == wire.Canceled:
			end(wire.Canceled, a.Code, "order %s of device %s was canceled", a.Order, a.Device)
			return
		}
		if last, fails = a, fails+1; blames(a, job.Spec.Limits) {
			guest[s.honesty.copyOf(a.Device).Owner]++
		}
	}
	retries := max(job.Spec.Retries, 0)
	if spent := (fails > retries || len(t.Attempts) >= maxAttempts) && t.running() == 0; spent && good >= max(job.Spec.Copies, 1) {
		lone = func() bool { return true } // others could not do it
	}
	v := s.rule(job, *t, lone)
	if t.Case != nil && (v.copies != t.Case.Copies || v.noMore && !t.Case.NoMore) {
		c := *t.Case
		c.Copies, c.NoMore = v.copies, c.NoMore || v.noMore
		t.Case = &c
	}
	switch {
	case v.stands >= 0:
		end(wire.Succeeded, "", "%s", v.reason)
		t.Stands, t.VerifiedBy, t.Unverified = v.stands, v.by, v.unverified
	case v.code != "":
		end(wire.Failed, v.code, "%s", v.reason)
	case good > 0 && v.own: // what could not be done elsewhere counts for nothing
		t.State, t.Code, t.Reason = wire.Running, codeVerifying, v.reason
	case last.Code == wire.CodeBadBody || last.Code == "too_large" || last.Code == "no_module":
		end(last.State, last.Code, "%s", last.Reason)
	case confirmed(guest, retries, func() bool { return job.Spec.Needs.Device != "" || lone() }) && !job.Spec.Live && good == 0:
		end(last.State, last.Code, "%s", last.Reason)
	case (fails > retries || len(t.Attempts) >= maxAttempts) && t.running() == 0:
		reason := last.Reason
		if fails > 1 {
			reason = fmt.Sprintf("%d devices or tries failed; the last said: %s", fails, last.Reason)
		}
		end(cmp.Or(last.State, wire.Failed), cmp.Or(last.Code, wire.CodeInternal), "%s", reason)
	default:
		t.State, t.Code, t.Reason = wire.Queued, "", ""
		if t.running() > 0 {
			t.State = wire.Running
		}
		if good > 0 && v.reason != "" {
			t.State, t.Code, t.Reason = wire.Running, codeVerifying, v.reason
		}
		if n := len(t.Attempts); fails > 0 && n > 0 {
			t.Next = now.Add(min(s.pace.retry<<min(fails-1, 10), longestRetry))
		}
	}
}

// confirmed tells whether it is the module that fails: devices of two owners say so, or those
// of one have said it twice and nobody else could. Else one that lies would end all tasks.
func confirmed(said map[string]int, retries int, lone func() bool) bool {
	if len(said) != 1 {
		return len(said) > 1
	}
	for _, n := range said {
		return retries == 0 || n > 1 && lone()
	}
	return false
}

// blamed tells whether an owner's device has said that it is the module that fails at a task.
func (s *jobs) blamed(t taskRow, owner string, l wire.JobLimits) bool {
	return slices.ContainsFunc(t.Attempts, func(a api.JobAttempt) bool { return blames(a, l) && s.honesty.copyOf(a.Device).Owner == owner })
}

// blames tells whether an attempt has failed for what the task is, by the device's word.
func blames(a api.JobAttempt, l wire.JobLimits) bool {
	return a.Code == codeGuestFailed || a.Code == codeBadModule || failedAt(a, l)
}

// fail ends a task that no device can do, for what it is about.
func (s *jobs) fail(ctx context.Context, id string, task int, why error) {
	row, err := s.tasks.change(ctx, taskKey(id, task), func(t *taskRow, exists bool) error {
		if t.State.Terminal() {
			return errUnchanged
		}
		t.State, t.Code, t.Reason, _ = ending(why, OrderRecord{})
		t.Ended = s.now().UTC()
		return nil
	})
	p := &s.plan
	p.mu.Lock()
	if w := p.works[id]; w != nil {
		if err != nil {
			w.queue(int32(task))
		} else {
			w.over(int32(task))
		}
	}
	p.mu.Unlock()
	if err == nil {
		s.stop(ctx, row, "the task has ended")
	} else if ctx.Err() == nil {
		s.log.Warn("a task that cannot be done waits", "job", id, "task", task, "error", err)
	}
	s.poke()
}

// stop cancels what is still under way of a task that has ended.
func (s *jobs) stop(ctx context.Context, t taskRow, why string) {
	for _, a := range t.Attempts {
		if !a.Ended.IsZero() {
			continue
		}
		if _, err := s.outbox.cancel(ctx, a.Device, a.Order, why, byItself); err != nil && ctx.Err() == nil {
			var r *refusal
			if !errors.As(err, &r) { // it has ended meanwhile, or was never made
				s.log.Warn("a superfluous run of a task goes on", "order", a.Order, "error", err)
			}
		}
	}
}
