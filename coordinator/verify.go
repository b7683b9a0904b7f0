package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// # Which result is given out
//
// A task's case ([trust.Case]) begins with the first device that it is given to: a share of
// luck and what the device has earned decide whether one of another owner does it too. From
// then on all that counts is in the task's row: its attempts, and what the coordinator has
// found out by itself. So whoever places tasks, after a crash or another coordinator's,
// comes to the same ruling.
//
// A task that has a result and needs more than that says "verifying", and why. Where
// nobody of another owner could do it, its result is given out as one that nobody stands
// behind; it is not waited for an owner who may never come. Only [api.VerifyAlways] waits,
// after the coordinator has tried to run the job itself.

// incomparable is why no two devices have the same result of a job; nil if they have.
func incomparable(q api.JobSpec) *api.JobWait {
	if q.Live {
		return &api.JobWait{Code: api.UnverifiedLive, Reason: "it has the real time and random numbers, so no two results are alike"}
	}
	for _, in := range q.Inputs {
		if in.Object == "" {
			return &api.JobWait{Code: api.UnverifiedDeviceData, Reason: fmt.Sprintf("its input %s is on the device alone", in.Name)}
		}
	}
	return nil
}

// newCase is how sure the result of a task must be that is given to a device first. It is
// drawn, so it is kept.
func (s *jobs) newCase(q api.JobSpec, first wire.DeviceID) *trust.Case {
	switch {
	case incomparable(q) != nil:
		return nil
	case q.Verify == api.VerifyNone:
		return &trust.Case{Copies: 1}
	case q.Copies > 1:
		return &trust.Case{Copies: q.Copies}
	}
	c := s.honesty.begin("", first)
	if q.Verify == api.VerifyAlways {
		c.Copies = max(c.Copies, 2)
	}
	if q.Needs.Device != "" { // no other device is to see it
		c.Check = false
	}
	return &c
}

// caseOf is a task's case with what its devices have said.
func (s *jobs) caseOf(job jobRow, t taskRow) trust.Case {
	c := trust.Case{Copies: 1}
	if t.Case != nil {
		c = *t.Case
	}
	c.Module = job.Spec.Module
	// Of a device that had it several times, the result counts, else the last.
	last := make(map[wire.DeviceID]api.JobAttempt, len(t.Attempts))
	var order []wire.DeviceID
	for _, a := range t.Attempts {
		switch was, had := last[a.Device]; {
		case !a.Ended.IsZero() && a.State != wire.Succeeded && a.Code != codeGuestFailed:
			continue // it could not say anything
		case !had:
			order = append(order, a.Device)
		case was.State == wire.Succeeded && !was.Ended.IsZero():
			continue
		}
		last[a.Device] = a
	}
	for _, d := range order {
		a, to := last[d], s.honesty.copyOf(d)
		if a.Engine != "" {
			to.Engine = s.honesty.engineAs(d, a.Engine)
		}
		c.Sent = append(c.Sent, to)
		switch {
		case a.Ended.IsZero():
		case a.State != wire.Succeeded:
			c.Answered(trust.Answer{Copy: to, Digest: trust.Failed, Order: a.Order})
		case c.Own == nil && !t.State.Terminal() && s.honesty.standing(d).Distrusted():
			c.Answered(trust.Answer{Copy: to, Order: a.Order}) // its word counts for nothing by now
		default:
			c.Answered(trust.Answer{Copy: to, Digest: a.Result, CPUSeconds: a.CPU, Order: a.Order, Disturbed: a.Disturbed})
		}
	}
	return c
}

// ruling is what follows from the attempts at a task.
type ruling struct {
	stands     int // the attempt whose result is the task's; -1: none yet
	by         api.VerifiedBy
	unverified *api.JobWait
	more       int    // results that are still wanted, of devices that have it now or get it
	strict     bool   // of owners alone who have not had it
	own        bool   // the coordinator is to run it
	copies     int    // owners that must agree by now
	noMore     bool   // nobody else can be asked
	code       string // why none will stand
	reason     string // a sentence, for that, or of what is to be said of one that stands, or of what is waited for
}

// decided tells whether nothing more is to be waited for.
func (v ruling) decided() bool { return v.stands >= 0 || v.code != "" }

const (
	codeVerifying = "verifying"
	mostResults   = 5 // that are compared before a task is given up
)

// rule says what follows from the attempts at a task. lone tells whether no other owner's
// device could do it; it is asked only if that matters.
func (s *jobs) rule(job jobRow, t taskRow, lone func() bool) ruling {
	q := job.Spec
	var results []int
	for k, a := range t.Attempts {
		if !a.Ended.IsZero() && a.State == wire.Succeeded {
			results = append(results, k)
		}
	}
	want := max(q.Copies, 1)
	v := ruling{stands: -1, copies: 1}
	if why := incomparable(q); why != nil {
		if len(results) < want {
			v.more = want - len(results)
			return v
		}
		v.stands, v.by, v.unverified = results[0], api.ByNobody, why
		return v
	}
	c := s.caseOf(job, t)
	v.copies = c.Copies
	if len(results) == 0 {
		v.more, v.strict = max(want, c.Copies), c.Copies > want && t.running() > 0
		return v
	}
	// A device may have lost its credit since it was given the task.
	if v.copies == 1 && q.Verify != api.VerifyNone && !s.honesty.trusted(t.Attempts[results[0]].Device) {
		v.copies = 2
	}
	c.Copies = v.copies
	running := t.running()
	step := s.honesty.next(c)
	v.strict = len(results)+running >= want
	if step.Ask > 0 && running == 0 && len(results) >= want && lone() {
		c.NoMore, v.noMore = true, true
		step = s.honesty.next(c)
	}
	v.more, v.own, v.reason = step.Ask+running, step.Run, step.Why
	agree := slices.DeleteFunc(slices.Clone(c.Answers), func(a trust.Answer) bool { return a.Digest != step.Accept })
	owners := trust.Apart(agree)
	switch {
	case step.Accept == "" && step.Done:
		v.code, v.reason = codeDisagree, cmp.Or(step.Why, "no device that can be believed has a result")
		return v
	case step.Accept == "":
		v.reason = s.waitsWhy(q, c, v)
		return v
	case q.Verify == api.VerifyAlways && c.Own == nil && owners < 2:
		v.noMore = false // somebody may come
		if v.own = c.Unable == ""; v.own {
			v.reason = "no device of another owner could do it, so the coordinator runs it itself"
		} else {
			v.more = running + 1
			v.reason = "no device of another owner that could do it is there, and the coordinator cannot run it itself: " + c.Unable
		}
		return v
	}
	k := slices.IndexFunc(results, func(k int) bool { return t.Attempts[k].Result == step.Accept })
	switch {
	case k < 0 && step.Accept == trust.Failed:
		return v // what follows from failures, decide knows
	case k < 0 && (len(results) >= mostResults || running == 0 && lone()):
		v.code, v.reason = codeDisagree, fmt.Sprintf("the coordinator has run it itself, and none of %s has its result; nobody else could be asked", deviceCount(len(results)))
		return v
	case k < 0:
		v.more, v.strict = running+1, true
		v.reason = "the coordinator has run it itself and has another result; another device does it again"
		return v
	}
	v.stands, v.reason = results[k], ""
	switch {
	case c.Own != nil:
		v.by = api.ByCoordinator
		if len(agree) < len(results) {
			v.reason = fmt.Sprintf("devices differed; the coordinator has run it itself, and %d of %d had its result", len(agree), len(results))
		}
	case len(agree) < len(results):
		v.by, v.reason = api.ByMost, fmt.Sprintf("%d of %d devices agree, the others have another result", len(agree), len(results))
	case owners >= 2:
		v.by = api.ByOwners
	case q.Verify == api.VerifyNone:
		v.by, v.unverified = api.ByNobody, &api.JobWait{Code: api.UnverifiedNotWanted, Reason: "the first result was taken, as was asked for"}
	case v.copies == 1 || q.Copies < 2 && s.honesty.trusted(t.Attempts[v.stands].Device):
		v.by = api.ByReputation // company that may be its own owner's takes nothing from it
	case len(agree) > 1:
		v.by, v.unverified = api.ByNobody, &api.JobWait{Code: api.UnverifiedNoOther, Reason: sayWhose}
	default:
		v.by, v.unverified = api.ByNobody, &api.JobWait{Code: api.UnverifiedNoOther, Reason: "no device of another owner could do it too"}
		if q.Needs.Device != "" {
			v.unverified.Reason = "it was to run on one device alone, whose results are not believed without another's yet"
		}
	}
	return v
}

// sayWhose is why devices that agree do not verify a result, and what to do.
const sayWhose = "the devices that have it may be of one owner, as they came by one token or are in one group; say whose devices are: \"deimos device set --device ID --set-label owner=NAME\""

// waitsWhy says what a task with a result waits for.
func (s *jobs) waitsWhy(q api.JobSpec, c trust.Case, v ruling) string {
	switch {
	case v.own:
		return "devices differ about the result; the coordinator runs it itself"
	case q.Verify == api.VerifyAlways || q.Copies > 1:
		return fmt.Sprintf("results of %d devices are wanted", c.Copies)
	case slices.ContainsFunc(c.Answers, func(a trust.Answer) bool { return a.Digest != "" && s.honesty.trusted(a.Device) }):
		return "it was drawn that a device of another owner does it too"
	}
	return "the result of a device that has not earned trust yet is compared with one of another owner's"
}

func deviceCount(n int) string {
	if n == 1 {
		return "1 device"
	}
	return fmt.Sprintf("%d devices", n)
}

// others tells whether there is a device that could give a task's result company now, or in a
// moment; of one that has none, whether there is one that has not said yet that it fails.
func (s *jobs) others(a asked, t taskRow, there fleet) bool {
	sent := s.sentTo(t, there)
	among, _ := s.candidates(a, there)
	has := slices.ContainsFunc(t.Attempts, func(at api.JobAttempt) bool { return !at.Ended.IsZero() && at.State == wire.Succeeded })
	return slices.ContainsFunc(among, func(d jobDevice) bool {
		why, _ := s.misfit(&d, a)
		return why == nil && !d.paused && (has || !s.blamed(t, d.as.Owner, a.run.Limits)) && !slices.ContainsFunc(sent, func(c trust.Copy) bool { return c.Owner == d.as.Owner || c.Device == d.id })
	})
}

// sentTo are the devices that have a task, or have had it and have a result.
func (s *jobs) sentTo(t taskRow, there fleet) (out []trust.Copy) {
	for _, at := range t.Attempts {
		if !at.Ended.IsZero() && at.State != wire.Succeeded {
			continue
		}
		if d := there.find(at.Device); d != nil {
			out = append(out, d.as)
		} else {
			out = append(out, s.honesty.copyOf(at.Device))
		}
	}
	return out
}

// gathering is true for a moment after a start, while devices of others that were there
// before are not back yet. Who was heard since, and left, is not waited for.
func (s *jobs) gathering(t taskRow) bool {
	if s.now().Sub(s.started) > s.pace.away {
		return false
	}
	sent := s.sentTo(t, fleet{})
	return slices.ContainsFunc(s.reg.list(), func(v api.Device) bool {
		return !v.Online && !v.Retired && v.Enrolled.Before(s.started) && v.LastSeen.Before(s.started) &&
			!slices.ContainsFunc(sent, func(c trust.Copy) bool { return c.Owner == s.honesty.copyOf(v.ID).Owner })
	})
}

// lone tells whether there is no device of another owner that could do a task. p.mu is held.
func (s *jobs) lone(w *work, i int32, t taskRow) bool {
	a, err := s.resolve(w.row, w.files, int(i))
	return err != nil || !s.others(a, t, s.plan.there) && !s.gathering(t)
}

// update changes a task's row and decides what follows. Nothing else need be kept: what
// the decision rests on is in the row.
func (s *jobs) update(ctx context.Context, job jobRow, task int, fill func(t *taskRow) bool) (row taskRow, changed bool, err error) {
	key := taskKey(job.ID, task)
	known, lone := false, false
	ask := func(t *taskRow) func() bool {
		return func() bool {
			if !known {
				s.plan.mu.Lock()
				defer s.plan.mu.Unlock()
				if w := s.plan.works[job.ID]; w != nil {
					s.look()
					known, lone = true, s.lone(w, int32(task), *t)
				}
			}
			return lone
		}
	}
	apply := func(t *taskRow, lone func() bool) bool {
		if !fill(t) {
			return false
		}
		switch {
		case t.State.Terminal():
		case job.Spec.Module == "" || job.State.Terminal(): // it was begun in the moment in which its job ended
			t.State, t.Ended = wire.Canceled, s.now().UTC()
		default:
			s.decide(job, t, lone)
		}
		t.Checking = s.unsettled(job, *t)
		return true
	}
	// Once outside of the table's lock: it takes others', and files are saved before a task
	// counts as done.
	var notSaved error
	if t, ok := s.tasks.get(key); ok && !t.State.Terminal() {
		t.Attempts = slices.Clone(t.Attempts)
		if apply(&t, ask(&t)) && t.State == wire.Succeeded && len(job.Spec.Save) > 0 {
			notSaved = s.saveOf(ctx, job, t)
		}
	}
	row, err = s.tasks.change(ctx, key, func(t *taskRow, exists bool) error {
		changed = exists && apply(t, func() bool { return lone })
		if !changed {
			return errUnchanged
		}
		if notSaved != nil && t.State == wire.Succeeded {
			_, t.Code, t.Reason, _ = ending(notSaved, OrderRecord{})
			t.State, t.Reason, t.VerifiedBy, t.Unverified = wire.Failed, "the result is there, and could not be saved: "+t.Reason, "", nil
		}
		return nil
	})
	return row, changed && err == nil, err
}

// look looks at the devices anew if the last look is too old. p.mu is held.
func (s *jobs) look() {
	p, now := &s.plan, s.now()
	if age := now.Sub(p.looked); age > max(devicesFresh, 10*p.looking) || age < 0 {
		began := time.Now()
		p.there, p.others, p.looked = newFleet(s.devices()), s.outbox.openBut(wire.KindJobRun, p.following), now
		p.looking = time.Since(began)
	}
}

// unsettled tells whether something is to be done about a task that has ended.
func (s *jobs) unsettled(job jobRow, t taskRow) bool {
	if job.Spec.Module == "" || !t.State.Terminal() || t.running() > 0 || incomparable(job.Spec) != nil {
		return false
	}
	step := s.honesty.next(s.ended(job, t))
	return !step.Done || slices.ContainsFunc(step.Verdicts, func(v trust.Verdict) bool { return v.Finding != trust.Confirmed })
}

// ended is the case of a task that has ended. Of one without a result that stands nothing
// more is asked, but who is right if some differ.
func (s *jobs) ended(job jobRow, t taskRow) trust.Case {
	c := s.caseOf(job, t)
	if t.State != wire.Succeeded {
		c.NoMore, c.Check, c.Doubted = true, false, false
	}
	return c
}

// credit has those who did a task that is over get what they have earned.
func (s *jobs) credit(ctx context.Context, job jobRow, t taskRow) {
	if job.Spec.Module == "" || !t.State.Terminal() || t.running() > 0 || t.Checking || incomparable(job.Spec) != nil {
		return
	}
	c := s.ended(job, t)
	if err := s.honesty.settle(ctx, c, s.honesty.next(c).Verdicts); err != nil && ctx.Err() == nil {
		s.log.Warn("what a task says of those who did it could not be taken in", "job", job.ID, "error", err)
	}
}

// reconsider decides anew about a task that something has changed for.
func (s *jobs) reconsider(ctx context.Context, id string, task int, edit func(*taskRow)) {
	key := taskKey(id, task)
	defer s.settling.lock(key)()
	row, changed, err := taskRow{State: wire.Running}, false, error(nil)
	job, ok := s.rows.get(id)
	if ok && !job.State.Terminal() {
		row, changed, err = s.update(ctx, job, task, func(t *taskRow) bool {
			if t.State.Terminal() {
				return false
			}
			edit(t)
			return true
		})
	}
	if err != nil && ctx.Err() == nil {
		s.log.Warn("what was decided about a task could not be kept; it is decided again", "job", id, "task", task, "error", err)
	}
	if changed && row.State.Terminal() {
		s.stop(ctx, row, "the task has ended")
		s.credit(ctx, job, row)
	}
	p := &s.plan
	p.mu.Lock()
	if w := p.works[id]; w != nil {
		if o := w.open[int32(task)]; o != nil {
			o.deciding, o.owning = false, false
			if t, ok := s.tasks.get(key); ok {
				o.row = t
			}
			if o.row.State.Terminal() || changed && row.State.Terminal() {
				w.over(int32(task))
			} else {
				w.queue(int32(task))
			}
		}
	}
	p.mu.Unlock()
	s.poke()
}

// runOwn has the coordinator do a task that waits for that.
func (s *jobs) runOwn(ctx context.Context, id string, task int, t taskRow) {
	own, err := s.honesty.runFor(ctx, t)
	s.plan.mu.Lock()
	s.plan.owning--
	s.plan.mu.Unlock()
	if ctx.Err() != nil {
		return // whoever starts next sees that it is to be run
	}
	s.reconsider(ctx, id, task, func(t *taskRow) {
		c := trust.Case{Copies: 1}
		if t.Case != nil {
			c = *t.Case
		}
		if err != nil {
			c.Unable = cutText(errText(err), maxLoggedText)
		} else {
			c.Own = &own
		}
		t.Case = &c
	})
}

const (
	ownTries = 3 // of the coordinator's own run: a holder of an input may be away for a moment
	ownPause = time.Second
)

// runFor has the coordinator do what the devices of a task were asked to.
func (h *honesty) runFor(ctx context.Context, t taskRow) (own trust.Own, err error) {
	asked, err := h.askedOf(ctx, t)
	for try := range ownTries {
		if err != nil {
			break
		}
		var away *inputAway
		if own, err = h.run(ctx, asked); err == nil || !errors.As(err, &away) || ctx.Err() != nil {
			break
		}
		if try+1 < ownTries && rest(ctx, ownPause<<try) == nil {
			err = nil
		}
	}
	return own, err
}

// askedOf is what the devices of a task were asked to do.
func (h *honesty) askedOf(ctx context.Context, t taskRow) (wire.JobRun, error) {
	for _, a := range t.Attempts {
		if a.Result != "" {
			v, err := h.audits.outbox.get(ctx, a.Device, a.Order)
			if err != nil {
				return wire.JobRun{}, err
			}
			return wire.DecodeBody[wire.JobRun](v.Order)
		}
	}
	return wire.JobRun{}, errors.New("no device has done it")
}

// # What a job shows of it

// sure is how sure a task's result is, in a byte: its place in [api.VerifiedBys], from 1 on.
type sure uint8

const sureWrong sure = 1 << 7 // its first result was wrong

func (t taskRow) sure() (v sure) {
	if t.State != wire.Succeeded {
		return 0
	}
	v = sure(slices.Index(api.VerifiedBys, t.VerifiedBy) + 1)
	if len(t.Corrections) > 0 {
		v |= sureWrong
	}
	return v
}

// count fills in how sure a job's results are. Of a job that ended long ago, each task is read.
func (s *jobs) count(ctx context.Context, v *api.Job) error {
	s.mu.Lock()
	p := s.open[v.ID]
	var all map[int32]sure
	if p != nil {
		all = maps.Clone(p.is)
	}
	s.mu.Unlock()
	if p == nil && v.State.Terminal() {
		list := make([]sure, v.Tasks)
		var g errgroup.Group
		g.SetLimit(resultReaders)
		for i := range list {
			g.Go(func() error {
				t, err := s.tasks.find(ctx, taskKey(v.ID, i))
				if errors.Is(err, errNotFound) { // it never began
					return nil
				}
				list[i] = t.sure()
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		all = make(map[int32]sure, len(list))
		for i, x := range list {
			all[int32(i)] = x
		}
	}
	var wrong []int32
	for i, x := range all {
		if x&sureWrong != 0 {
			v.Corrected++
			wrong = append(wrong, i)
		}
		if x &^= sureWrong; x > 0 {
			if v.Verified == nil {
				v.Verified = make(map[api.VerifiedBy]int)
			}
			v.Verified[api.VerifiedBys[x-1]]++
		}
	}
	slices.Sort(wrong)
	for _, i := range wrong[:min(len(wrong), api.MaxOpenShown)] {
		t, err := s.tasks.find(ctx, taskKey(v.ID, int(i)))
		if err != nil {
			return err
		}
		v.Wrong = append(v.Wrong, t.view(v.ID, int(i)))
	}
	return nil
}
