package ota

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

// What an order of the fleet gives way to while it fetches, without failing: a line or a
// coordinator that is away, and its owner's own update. What was fetched is kept.

const (
	// untiring is for how long an order that gains nothing is tried again; the order's own
	// life may be shorter.
	untiring = 24 * time.Hour
	// firstRetry is the pause before the second try, doubled with each to mostRetry.
	firstRetry, mostRetry = 10 * time.Second, 10 * time.Minute
)

// errOwner ends what the fleet fetches: its owner is here with an update.
var errOwner = errors.New("the owner of this device has an update of their own")

// line is how the fetching of one order goes.
type line struct {
	since   time.Time // the first try of those that gained nothing
	tries   int       // so many of them
	fetched int64     // bytes, by then
}

// yields is ctx for what an order of the fleet does until all is fetched: it ends when the
// owner comes with an update.
func (s *Service) yields(ctx context.Context, j job) (context.Context, func()) {
	if j.local != "" {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	s.mu.Lock()
	s.fetching = cancel
	if s.owners > 0 {
		cancel(errOwner)
	}
	s.mu.Unlock()
	return ctx, func() { s.fetched(); cancel(nil) }
}

// fetched says that there is nothing to yield any more: what is here is installed.
func (s *Service) fetched() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fetching = nil
}

// ownerComes has what the fleet fetches yield, until the owner's update has ended.
func (s *Service) ownerComes() (ended func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owners++; s.fetching != nil {
		s.fetching(errOwner)
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.owners--
	}
}

func (s *Service) ownerIsHere() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.owners > 0
}

// later is what holds an order of the fleet that could not fetch; nil if it has failed.
func (s *Service) later(yielding context.Context, j job, err error) *hold {
	if j.local != "" {
		return nil
	}
	var h *hold
	switch phase := s.mem.get().Phase; {
	case errors.Is(context.Cause(yielding), errOwner):
		if t, _, unknown := s.how.standing(); unknown == nil && (t == nil || t.order != j.order) { // else it is on trial already
			h = s.afterOwner(j)
		}
	case yielding.Err() == nil && repo.Passing(err) && (phase == slot.Waiting || phase == slot.Fetching):
		h = s.retry(j, err)
	}
	if h == nil {
		return nil
	}
	if err := s.mem.step(slot.Held, func(r *Record) { r.Why, r.Began = s.why(h.why), nil }); err != nil {
		s.o.Log.Warn("why the update waits cannot be noted", "error", err)
	}
	return h
}

// afterOwner holds while the owner's update is at work.
func (s *Service) afterOwner(j job) *hold {
	why := wire.RejectedUntil(time.Minute, wire.CodeUpdatePending, "the owner of this device installs an update of their own, which goes first; this one goes on after that, and what it has fetched is kept")
	return &hold{version: j.version, why: why, again: func() *wire.Problem {
		if s.ownerIsHere() {
			return why
		}
		return nil
	}}
}

// retry holds until the next try, the longer the more tries in a row have gained nothing.
func (s *Service) retry(j job, err error) *hold {
	l, now := j.line, time.Now()
	if fetched := s.mem.get().Fetched; l.tries == 0 || fetched > l.fetched {
		*l = line{since: now, fetched: fetched}
	}
	if now.Sub(l.since) >= s.o.Patience {
		return nil
	}
	pause := min(s.o.Retry<<min(l.tries, 16), mostRetry)
	pause = pause/2 + rand.N(pause/2+1) // so that a fleet does not come in step
	l.tries++
	p := wire.ProblemOf(problem(context.Background(), err))
	why := &wire.Problem{State: p.State, Code: p.Code, Reason: p.Reason + "; it is tried again by itself", After: pause}
	s.o.Log.Info("a release cannot be fetched now", "again", pause, "error", err)
	return &hold{version: j.version, why: why, again: func() *wire.Problem {
		left := pause - time.Since(now)
		if left <= 0 || s.ownerIsHere() {
			return nil
		}
		w := *why
		w.After = left
		return &w
	}}
}
