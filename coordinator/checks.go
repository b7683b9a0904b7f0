package coordinator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// # What comes after a result was given out
//
// A third owner's look, a dispute that customers need not wait for, what is to be said of
// those who did it: the task's row says that it is not over (Checking), until what costs
// somebody is on record. What turns out wrong is corrected where a right result can be had,
// else retracted; the row keeps what was given out before.
//
// Who is caught lying has a row in "caught", from before it costs him anything until all
// his tasks were looked through, and so has who is doubted: of his, only those are looked at
// that were believed for his reputation. Those behind which nobody else stands ([trust.Case.Backed])
// are run by the coordinator, as long as module and inputs are there, and until then, and
// where they are not, are said to be unverified.

const (
	checksAtOnce = 8
	checkEvery   = time.Second
	checkTries   = 5
	checkPause   = 10 * time.Second // doubled with each try
)

// checks begins to look at tasks that have ended and are not over.
func (s *jobs) checks(ctx context.Context, under *sync.WaitGroup) {
	p, now := &s.plan, s.now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := now.Sub(p.checked); len(p.checking) >= checksAtOnce || !p.checkSoon && d >= 0 && d < checkEvery {
		return
	}
	p.checked, p.checkSoon = now, false
	var due []string
	s.tasks.each(func(key string, t taskRow) bool {
		if t.Checking && t.State.Terminal() && t.running() == 0 && !p.checking[key] && !now.Before(t.Next) {
			due = append(due, key)
		}
		return len(p.checking)+len(due) < checksAtOnce
	})
	for _, key := range due {
		p.checking[key] = true
		under.Go(func() {
			s.check(ctx, key)
			p.mu.Lock()
			delete(p.checking, key)
			p.checkSoon = true
			p.mu.Unlock()
			s.poke()
		})
	}
}

// check brings the case of a task to its end.
func (s *jobs) check(ctx context.Context, key string) {
	defer s.settling.lock(key)()
	t, ok := s.tasks.get(key)
	if !ok || !t.Checking {
		return
	}
	id, i := parseTaskKey(key)
	job, err := s.rows.find(ctx, id)
	if err == nil {
		limited, cancel := context.WithTimeout(ctx, s.honesty.audits.limit)
		err = s.conclude(limited, job, key, t)
		cancel()
	}
	if err == nil || ctx.Err() != nil {
		return
	}
	s.log.Warn("the result of a task is out and could not be looked at once more; it will be tried again", "job", id, "task", i, "tries", t.Checks+1, "error", err)
	_, err = s.tasks.change(ctx, key, func(t *taskRow, exists bool) error {
		if !exists || !t.Checking {
			return errUnchanged
		}
		t.Checks++
		t.Next = s.now().Add(checkPause << t.Checks).UTC()
		t.Checking = t.Checks < checkTries && !errors.Is(err, errNotFound)
		return nil
	})
	if err != nil && ctx.Err() == nil {
		s.log.Warn("a task that is looked at once more could not be kept", "job", id, "task", i, "error", err)
	}
}

// conclude asks and runs what a task's case still needs, and keeps what follows.
func (s *jobs) conclude(ctx context.Context, job jobRow, key string, t taskRow) error {
	h := s.honesty
	run, err := h.askedOf(ctx, t)
	if err != nil {
		return err
	}
	asked := askedAs(run, job.Spec.Needs)
	c := s.ended(job, t)
	if c.Doubted && c.Own == nil && c.Unable == "" {
		// There may be many of these: they take turns with challenges, at the same pace.
		select {
		case h.turn <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		began := time.Now()
		own, err := h.runFor(ctx, t)
		time.AfterFunc(min(paceOwn*time.Since(began), paceMost), func() { <-h.turn })
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			c.Unable = cutText(errText(err), maxLoggedText)
		} else {
			c.Own = &own
		}
	}
	verdicts := h.conclude(ctx, &c, asked)
	if err := ctx.Err(); err != nil {
		return err
	}
	// What costs a device is on record before the task forgets that there was something.
	costs := func(v trust.Verdict) bool { return v.Finding != trust.Confirmed }
	if err := h.settle(ctx, c, slices.DeleteFunc(slices.Clone(verdicts), func(v trust.Verdict) bool { return !costs(v) })); err != nil {
		return err
	}
	var found trust.Finding
	var stood api.JobAttempt
	right := ""
	if t.State == wire.Succeeded {
		stood = t.Attempts[t.Stands]
		for _, v := range verdicts {
			if v.Device == stood.Device {
				found = v.Finding
			}
		}
		if found == trust.Wrong {
			if right, err = s.rightOne(ctx, &c, asked, t); err != nil {
				return err
			}
		}
	}
	step := h.next(c)
	_, err = s.tasks.change(ctx, key, func(t *taskRow, exists bool) error {
		if !exists || !t.Checking {
			return errUnchanged
		}
		now := s.now().UTC()
		for _, a := range c.Answers {
			if a.Order != "" && a.Digest != "" && a.Digest != trust.Failed && !slices.ContainsFunc(t.Attempts, func(x api.JobAttempt) bool { return x.Order == a.Order }) {
				t.Attempts = append(t.Attempts, api.JobAttempt{Order: a.Order, Device: a.Device, Began: now, Ended: now, State: wire.Succeeded, Engine: a.Engine, Result: a.Digest, CPU: a.CPUSeconds, Disturbed: a.Disturbed})
			}
		}
		kept := c
		kept.Module, kept.Sent, kept.Answers = "", nil, nil
		t.Case, t.Checking, t.Next = &kept, false, time.Time{}
		if t.State != wire.Succeeded {
			return nil
		}
		nobody := func(code, format string, args ...any) {
			t.VerifiedBy, t.Unverified = api.ByNobody, &api.JobWait{Code: code, Reason: cutText(fmt.Sprintf(format, args...), maxLoggedText)}
		}
		switch {
		case found == trust.Wrong:
			t.Corrections = append(t.Corrections, api.Correction{At: now, Order: stood.Order, Device: stood.Device, Result: stood.Result,
				Reason: "the coordinator has run it itself, and has another result" + savedWrong(job, *t)})
			k := slices.IndexFunc(t.Attempts, func(x api.JobAttempt) bool { return x.Order == right })
			if k < 0 {
				nobody(api.UnverifiedRetracted, "the result of device %s was wrong, as the coordinator has found by running it itself, and no device could be had that has the right one: run the job again", stood.Device)
				break
			}
			t.Stands, t.VerifiedBy, t.Unverified = k, api.ByCoordinator, nil
			t.Reason = fmt.Sprintf("corrected: the result of device %s, which was given out before, was wrong", stood.Device)
		case found == trust.Doubtful:
			nobody(api.UnverifiedDoubtful, "the coordinator has another result than device %s, and nobody could vouch for either", stood.Device)
		case c.Own != nil && c.Own.Digest == stood.Result:
			t.VerifiedBy, t.Unverified = api.ByCoordinator, nil
		case c.Own == nil && step.Accept != stood.Result && step.Accept != "":
			nobody(api.UnverifiedDoubtful, "most devices have another result, and the coordinator cannot run it itself: %s", c.Unable)
		case c.Doubted && c.Own == nil:
			nobody(api.UnverifiedCaught, "a device that stood behind it was caught lying since, or is doubted, and the coordinator cannot run it itself: %s", c.Unable)
		case (t.VerifiedBy == api.ByReputation || t.Unverified != nil && t.Unverified.Code == api.UnverifiedNoOther) && c.Own == nil && !c.Doubted:
			if agree := slices.DeleteFunc(slices.Clone(c.Answers), func(a trust.Answer) bool { return a.Digest != stood.Result }); trust.Apart(agree) >= 2 {
				t.VerifiedBy, t.Unverified = api.ByOwners, nil
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if found == trust.Wrong {
		s.log.Warn("a result that was given out was wrong", "task", key, "device", stood.Device, "corrected", right != "")
	}
	return h.settle(ctx, c, slices.DeleteFunc(verdicts, costs))
}

// savedWrong says which stored files hold a wrong result.
func savedWrong(job jobRow, t taskRow) (text string) {
	for _, name := range slices.Sorted(maps.Values(job.Spec.Save)) {
		text += fmt.Sprintf("; the stored file %q was made of the wrong one", fileOf(name, t.Name))
	}
	return text
}

// rightOne is the order with the result that the coordinator has, too; empty if no device
// can be had that has it.
func (s *jobs) rightOne(ctx context.Context, c *trust.Case, asked asked, t taskRow) (order string, err error) {
	good := func() int {
		return slices.IndexFunc(c.Answers, func(a trust.Answer) bool { return a.Digest == c.Own.Digest && a.Order != "" })
	}
	for range 2 {
		if good() >= 0 {
			break
		}
		more := s.honesty.pick(*c, s.honesty.able(asked), "", 1)
		if len(more) == 0 {
			return "", nil
		}
		c.Sent = append(c.Sent, more...)
		c.Answered(s.honesty.ask(ctx, more[0], asked))
	}
	k := good()
	if k < 0 {
		return "", ctx.Err()
	}
	a := c.Answers[k]
	if !slices.ContainsFunc(t.Attempts, func(x api.JobAttempt) bool { return x.Order == a.Order }) {
		v, err := s.outbox.get(ctx, a.Device, a.Order)
		if err != nil {
			return "", err
		}
		out, err := s.compute.collect(ctx, v)
		if err == nil {
			err = s.keep(ctx, v, out)
		}
		if err != nil {
			return "", err
		}
	}
	return a.Order, nil
}

// # Who was caught

// caughtRow is a device whose results are to be looked at again.
type caughtRow struct {
	At        time.Time `json:"at"`
	Challenge string    `json:"challenge,omitempty"` // that it was caught by
	Module    string    `json:"module,omitempty"`    // or that it is doubted over
}

// noteCaught is told before a lie costs its device anything, so that a crash in between is
// followed by another telling.
func (s *jobs) noteCaught(ctx context.Context, rec api.Audit) error {
	return s.mark(ctx, rec.Device, caughtRow{At: s.now().UTC(), Challenge: rec.ID})
}

// noteReview is told before a doubt costs its device what it has earned, for the same reason.
func (s *jobs) noteReview(ctx context.Context, d wire.DeviceID, module string) error {
	return s.mark(ctx, d, caughtRow{At: s.now().UTC(), Module: module})
}

func (s *jobs) mark(ctx context.Context, d wire.DeviceID, row caughtRow) error {
	_, err := s.caught.change(ctx, string(d), func(v *caughtRow, _ bool) error {
		*v = row
		return nil
	})
	if err == nil {
		s.poke()
	}
	return err
}

// reviews begins to look through what devices have done that were caught.
func (s *jobs) reviews(ctx context.Context, under *sync.WaitGroup) {
	p := &s.plan
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reviewing || s.now().Before(p.reviewNext) {
		return
	}
	var next wire.DeviceID
	var row caughtRow
	s.caught.each(func(d string, v caughtRow) bool {
		// Its score falls a moment after the row was written.
		if now := s.honesty.standing(wire.DeviceID(d)); now.Distrusted() || len(now.Doubts) > 0 {
			next, row = wire.DeviceID(d), v
		}
		return next == ""
	})
	if next == "" {
		return
	}
	p.reviewing = true
	under.Go(func() {
		err := s.review(ctx, next, row)
		if err != nil && ctx.Err() == nil {
			s.log.Warn("what a device has done that was caught lying, or is doubted, could not be looked through; it will be tried again", "device", next, "error", err)
		}
		p.mu.Lock()
		if p.reviewing = false; err != nil {
			p.reviewNext = s.now().Add(checkPause)
		}
		p.mu.Unlock()
		s.poke()
	})
}

// review has those results looked at again behind which a device stood that was caught, and
// not enough others.
func (s *jobs) review(ctx context.Context, d wire.DeviceID, row caughtRow) error {
	keys, err := s.tasks.keys(ctx, ">")
	if err != nil {
		return err
	}
	n := 0
	for _, key := range keys {
		again, err := s.doubt(ctx, key, d)
		if err != nil {
			return err
		}
		if again {
			n++
		}
	}
	s.log.Info("results of a device that was caught lying, or is doubted, are looked at again", "device", d, "tasks", n)
	err = s.caught.remove(ctx, string(d), func(v caughtRow) bool { return v == row })
	if errors.Is(err, errNotFound) {
		err = nil
	}
	s.poke()
	return err
}

// doubt has one task's result looked at again, if it rests on a device that was caught, or
// on the reputation of one that is doubted.
func (s *jobs) doubt(ctx context.Context, key string, d wire.DeviceID) (again bool, err error) {
	lied := func(d wire.DeviceID) bool { return s.honesty.standing(d).Distrusted() }
	gone, why := lied, "was caught lying since"
	if !lied(d) {
		gone, why = func(x wire.DeviceID) bool { return x == d || lied(x) }, "has had another result than the coordinator since, with which nobody could vouch for it"
	}
	rests := func(t taskRow) bool {
		if t.State != wire.Succeeded || t.running() > 0 || t.Case == nil || t.Case.Doubted || !lied(d) && t.VerifiedBy != api.ByReputation {
			return false
		}
		digest := t.Attempts[t.Stands].Result
		return slices.ContainsFunc(t.Attempts, func(a api.JobAttempt) bool { return a.Device == d && a.Result == digest })
	}
	t, err := s.tasks.find(ctx, key)
	if errors.Is(err, errNotFound) || err == nil && !rests(t) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	id, _ := parseTaskKey(key)
	job, err := s.rows.find(ctx, id)
	if errors.Is(err, errNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	_, err = s.tasks.change(ctx, key, func(t *taskRow, exists bool) error {
		if again = exists && rests(*t) && !s.caseOf(job, *t).Backed(t.Attempts[t.Stands].Result, gone); !again {
			return errUnchanged
		}
		c := *t.Case
		c.Doubted = true
		t.Case, t.Checking, t.Checks, t.Next = &c, true, 0, time.Time{}
		t.VerifiedBy, t.Unverified = api.ByNobody, &api.JobWait{Code: api.UnverifiedCaught, Reason: fmt.Sprintf("device %s %s; the coordinator will run it itself", d, why)}
		return nil
	})
	return again, err
}
