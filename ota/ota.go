// Package ota carries out update orders on the device: it asks the signed
// metadata what the release is, fetches it, installs it into the other slot and
// puts it on trial. Whether it stays is decided after the restart.
//
// # Parties
//
//   - The coordinator only hints ([wire.UpdateInstall]); nothing it says is trusted.
//   - The release keys decide what may run (ota/repo, ota/bundle).
//   - Who starts versions also rolls back: a launcher between two agents (ota/slot,
//     cmd/deimos-launch), or, where our image runs, the boot loader and process 1
//     between two whole firmwares (ota/slot/firmware, packaging/init). Which of the
//     two a device has decides which part of a release it takes; see mechanism.
//   - The agent calls [Service.Confirm] once it is healthy.
//
// # One update
//
//	order ─▶ refresh metadata ─▶ is it for this device? ─▶ may it go on? ─▶ space
//	      ─▶ fetch (resumes) ─▶ may it go on? ─▶ note how this version does
//	      ─▶ unpack aside, both digests checked ─▶ ask it for its version
//	      ─▶ on trial, durably ─▶ ErrRestart: the agent exits with slot.ExitRestart
//	                               or, with a firmware installed, slot.ExitReboot
//	new agent ─▶ healthy, and no worse than the one before ─▶ Confirm ─▶ Settled: SUCCEEDED
//	      └─▶ not confirmed in three tries ─▶ old agent ─▶ Settled: FAILED rolled_back
//
// Its phases, and how long it may stay in each, are those of [slot.Table] and
// [slot.Limits]; each step is on disk before it is taken ([Record]). Up to "on trial"
// nothing has changed for the running version: a crash, a cut
// or a refusal leaves files that the next install clears away. A repeat of the
// order at any moment installs nothing twice.
//
// An update that may not go on ([Options.Hold]: the owner is to be asked, or has set
// hours or a volume) waits without keeping others off: a newer order takes its place,
// and what the owner installs from a stick goes first. When it goes on it begins at the
// metadata: what was withdrawn meanwhile is not installed.
//
// A stick or a file of the owner's ([Service.Install]) takes the same path and the
// same checks. Its owner has said what is to be done, and is not asked again.
package ota

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/wire"
)

// ErrRestart is returned for an order whose release is installed and waits for
// its trial: exit with [slot.ExitRestart], or [slot.ExitReboot] if the service
// [Service.Reboots], and report nothing yet.
var ErrRestart = errors.New("the new version is installed; restart to try it")

// ErrPending is returned for a repeat of the order whose release is being tried by
// this very process, and where the disk does not tell: report nothing yet,
// [Service.Settled] will tell, or a repeat.
var ErrPending = errors.New("this update is on trial; its outcome is not known yet")

// spaceMargin is kept free on the disk beside what the update itself needs.
const spaceMargin = 32 << 20

// Options is what the agent hands in.
type Options struct {
	StateDir string
	Slot     string // of the environment, [slot.Env]; empty without a launcher
	ESP      string // where the EFI system partition is mounted; empty if our image does not run
	Boot     string // the kernel's id of this boot, empty if unknown
	Version  string // that runs
	Device   wire.DeviceID
	Board    string
	Platform bundle.Platform // zero: [bundle.Host]

	// Root returns the update root of the enrolment, empty while there is none.
	Root func() []byte
	// Source returns where to read the repository from.
	Source func() (repo.Source, error)
	// Now is the time as the device best knows it.
	Now func() time.Time
	// Hold is what keeps an update from its next step, nil if nothing does; of a problem
	// its code, reason and After are told. While it holds, it is asked each second. A nil
	// Hold never holds.
	Hold func(Step) *wire.Problem
	// Moved is told of bytes that came over the line; may be nil.
	Moved func(n int64)
	// Figures are how this agent does now; nil: it is online, and that is all.
	Figures func() wire.UpdateFigures
	// Steady is how long a version on trial must live before it is kept; 0: half of
	// [slot.ConfirmWithin].
	Steady time.Duration

	Limits repo.Limits
	// Patience is for how long an order whose release cannot be fetched is tried again
	// without a byte gained, 24 h if 0, not at all below; Retry is the pause before the second try, 10 s if 0.
	Patience, Retry time.Duration
	Log             *slog.Logger
}

// Step is what an update would do next.
type Step struct {
	Order   string
	Version string
	Fetch   int64 // bytes over the line; 0: it is installed, and the agent or the machine starts again
	// NoDelta is why the whole form is to be fetched of a release that has deltas: part of
	// a sentence, for the owner. Empty otherwise.
	NoDelta string
}

// Service carries out the updates of one device.
type Service struct {
	o    Options
	how  mechanism  // nil: the device cannot be updated
	busy sync.Mutex // held while an update does something, not while it waits
	mem  *memory

	mu      sync.Mutex
	waiting map[string]context.CancelCauseFunc // orders that wait, by id
	active  *wire.UpdateState                  // nil: none in this life
	until   time.Time                          // of active, if it waits; zero: nobody knows
	// fetching ends what an order of the fleet does that has not fetched all; nil: none.
	fetching context.CancelCauseFunc
	owners   int // updates of the owner's that are at work, or are about to
}

// New makes the slot directories if they are missing.
func New(o Options) (*Service, error) {
	if o.Platform == (bundle.Platform{}) {
		o.Platform = bundle.Host()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	o.Patience, o.Retry = cmp.Or(o.Patience, untiring), cmp.Or(o.Retry, firstRetry)
	o.Steady = cmp.Or(o.Steady, slot.ConfirmWithin/2)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Hold == nil {
		o.Hold = func(Step) *wire.Problem { return nil }
	}
	if o.Moved == nil {
		o.Moved = func(int64) {}
	}
	if err := os.MkdirAll(filepath.Join(o.StateDir, "ota"), 0o755); err != nil {
		return nil, fmt.Errorf("cannot make the folder for updates (check the state directory): %w", err)
	}
	how, err := o.mechanism()
	s := &Service{o: o, how: how, mem: remember(o.StateDir, o.Log), waiting: map[string]context.CancelCauseFunc{}}
	return s, err
}

// align makes the phase that is remembered that of the trial, which decides.
func (s *Service) align(t *trial) {
	s.mem.mu.Lock()
	defer s.mem.mu.Unlock()
	rec := &s.mem.rec
	switch {
	case t != nil && t.order == rec.Order && t.running:
		rec.Phase = slot.Testing
	case t != nil && t.order == rec.Order:
		rec.Phase = slot.Installed
	case rec.Phase == slot.Installed || rec.Phase == slot.Testing:
		rec.Phase = slot.Idle
	}
}

// Reboots tells whether what is installed is tried at the next start of the
// machine, not of the agent.
func (s *Service) Reboots() bool { return s.how != nil && s.how.part() == bundle.PartFirmware }

// OnTrial tells whether what runs must be confirmed, or is left again.
func (s *Service) OnTrial() (bool, error) {
	if s.how == nil {
		return false, nil
	}
	return s.how.onTrial()
}

// Confirm makes the running version the one to keep, and the floor of what may be
// installed. Call it when the agent is
// [Service.Healthy], or has nothing to go back to; it does nothing for a version that is
// confirmed, and on a device that cannot be updated. On a new device that runs our
// image it writes that a second time, which takes seconds.
func (s *Service) Confirm(ctx context.Context) error {
	if s.how == nil {
		return nil
	}
	if err := s.how.confirm(ctx); err != nil {
		return fmt.Errorf("version %s cannot be confirmed: %w", s.o.Version, err)
	}
	return s.keepFloor()
}

// keepFloor makes the version that runs and is confirmed the floor.
func (s *Service) keepFloor() error {
	rec := s.mem.get()
	_, last, err := s.how.standing()
	if err != nil {
		return err
	}
	down := rec.Down && rec.Version == s.o.Version && last != nil && last.Order == rec.Order && last.Result == slot.Confirmed
	return s.raise(s.o.Version, down)
}

// Settled is how the last update ended.
type Settled struct {
	Order   string
	Outcome wire.Outcome  // with a [wire.UpdateResult], also if it failed
	Problem *wire.Problem // nil if the new version was confirmed
}

// Settled tells how the last update ended, nil if there was none or it is not
// decided or was [Service.Reported]. Ask it at every start and after [Service.Confirm].
func (s *Service) Settled() (*Settled, error) {
	if s.how == nil {
		return nil, nil
	}
	t, last, err := s.how.standing()
	if err != nil || last == nil || last.Order == "" || last.Reported {
		return nil, err
	}
	s.align(t)
	out := s.settled(*last)
	if rec := s.mem.get(); rec.Order == last.Order && (rec.Ended == nil || rec.Ended.Order != last.Order) {
		if err := s.mem.leave(func(r *Record) { r.end(s.o.Now(), r.Order, r.Version, out.Problem) }); err != nil {
			s.o.Log.Warn("how the update ended cannot be noted", "error", err)
		}
	}
	return out, nil
}

// Reported notes that what was settled of an order is kept to be reported, once
// for all: [Service.Settled] tells of it no more.
func (s *Service) Reported(order string) error {
	if s.how == nil {
		return nil
	}
	if err := s.how.reported(order); err != nil {
		return fmt.Errorf("that the update of order %s was reported cannot be noted: %w", order, err)
	}
	return nil
}

func (s *Service) settled(last slot.Outcome) *Settled {
	result := wire.UpdateResult{From: last.From, To: last.To, Running: s.o.Version, Slot: s.o.Slot, Confirmed: last.Result == slot.Confirmed}
	reason := last.Reason
	if rec := s.mem.get(); rec.Order == last.Order {
		result.Form, result.NoDelta, result.FetchedBytes, result.TookSeconds, result.Checkpoint = rec.Form, rec.NoDelta, rec.Fetched, rec.Took, rec.Checkpoint
		result.Local = rec.Local != ""
		if rec.Before != nil && rec.After != nil {
			result.Gate = &wire.UpdateGate{Before: *rec.Before, After: *rec.After, Worse: rec.Worse}
		}
		if len(rec.Worse) > 0 {
			reason += "; " + strings.Join(rec.Worse, "; ")
		}
	}
	out := &Settled{Order: last.Order, Outcome: wire.Outcome{Body: result}}
	if last.Result != slot.Confirmed {
		out.Problem = wire.FailedBecause(wire.CodeRolledBack, "rolled back to version %s: %s", last.From, reason)
	}
	return out
}

// job is one update to carry out.
type job struct {
	order   string
	version string // "" for the newest that fits
	target  string
	share   float64 // of devices that are meant, in percent; 0: this one is
	local   string  // what the owner named; "" for an order of the fleet
	line    *line
	source  repo.Source
	tell    func(wire.Progress)
}

func (j job) progress(done float64) {
	if j.tell != nil {
		j.tell(wire.Progress{Done: done})
	}
}

// Handle is the [wire.Handler] of [wire.KindUpdateInstall]. Beside what a
// handler may return it can return [ErrRestart] and [ErrPending], after which
// the order stays open, and ctx's error as it is, after which a repeat resumes.
func (s *Service) Handle(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
	want, err := wire.DecodeBody[wire.UpdateInstall](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	return s.carryOut(ctx, job{order: o.ID, version: want.Version, target: want.Target, share: want.Percentage, tell: tell})
}

// Refuse is told of each order for an update as it arrives, and refuses none: one that
// waits for its owner gives way to it, but what the owner himself has asked for does not.
func (s *Service) Refuse(o wire.Order) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, cancel := range s.waiting {
		if id != o.ID && !IsLocal(id) {
			cancel(wire.RejectedBecause(wire.CodeSuperseded, "while this update waited, order %s came; that one is carried out", o.ID))
		}
	}
	return nil
}

// carryOut goes on with an update, each time that it may, to its end.
func (s *Service) carryOut(ctx context.Context, j job) (wire.Outcome, error) {
	if s.how == nil {
		return wire.Outcome{}, wire.RejectedBecause(wire.CodeNotSupported, "this agent cannot update itself: start it through deimos-launch, or run our image")
	}
	defer s.show(nil)
	j.line = &line{}
	if j.local != "" {
		defer s.ownerComes()()
	}
	for {
		held, out, err := s.attempt(ctx, j)
		if held != nil {
			if err = s.wait(ctx, j, held); err == nil {
				continue
			}
		}
		s.ended(ctx, j, err)
		return out, err
	}
}

// hold is why an update does not go on now.
type hold struct {
	version string
	why     *wire.Problem
	again   func() *wire.Problem // asks again
}

// recheck is how often what holds an update is asked whether it still does.
const recheck = time.Second

// wait returns nil when the update may go on.
func (s *Service) wait(ctx context.Context, j job, h *hold) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.mu.Lock()
	s.waiting[j.order] = cancel
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.waiting, j.order)
		s.mu.Unlock()
	}()
	// Before the order is over, whoever gave it hears what it waited for.
	over, late := ctx.Deadline()
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for why, told := h.why, ""; why != nil; why = h.again() {
		s.show(&wire.UpdateState{Phase: wire.UpdateWaiting, Version: h.version, Local: j.local != "", Code: why.Code}, why.After)
		if told != why.Code {
			if told != "" {
				s.noteWhy(j, why)
			}
			if told = why.Code; j.tell != nil {
				j.tell(wire.Progress{Waits: why})
			}
		}
		if late && time.Until(over) < 2*recheck {
			return &wire.Problem{State: why.State, Code: why.Code, Reason: why.Reason + "; the order is over before that", After: why.After}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	return nil
}

// show is what heartbeats tell of this life's update.
func (s *Service) show(u *wire.UpdateState, after ...time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active, s.until = u, time.Time{}
	if len(after) > 0 && after[0] > 0 {
		s.until = time.Now().Add(after[0])
	}
}

// State is the update that is under way, nil if there is none.
func (s *Service) State() *wire.UpdateState {
	if s.how == nil {
		return nil
	}
	s.mu.Lock()
	u, until := s.active, s.until
	s.mu.Unlock()
	if u != nil {
		u := *u
		if !until.IsZero() {
			u.Seconds = max(1, int64(time.Until(until).Seconds()))
		}
		return &u
	}
	t, _, err := s.how.standing()
	if err != nil || t == nil {
		return nil
	}
	phase := wire.UpdateInstalled
	if t.running {
		phase = wire.UpdateTesting
	}
	return &wire.UpdateState{Phase: phase, Version: t.version, Local: IsLocal(t.order)}
}

// ended notes how an update ended, unless that is decided by its trial or comes again.
func (s *Service) ended(ctx context.Context, j job, err error) {
	var p *wire.Problem
	switch {
	case errors.Is(err, ErrRestart), errors.Is(err, ErrPending):
		return
	case err != nil && !errors.As(err, &p):
		if ctx.Err() != nil {
			return
		}
		p = wire.ProblemOf(err)
	}
	if rec := s.mem.get(); rec.Order != j.order || rec.Ended != nil && rec.Ended.Order == j.order {
		return // another one is under way since
	}
	note := func(r *Record) {
		if to, err := slot.Next(r.Phase, slot.GivenUp); err == nil {
			r.Phase = to
		}
		r.Why = nil
		r.end(s.o.Now(), r.Order, r.Version, p)
	}
	if err := s.mem.leave(note); err != nil {
		s.o.Log.Warn("how the update ended cannot be noted", "error", err)
	}
}

// attempt goes as far as it may: to an end, or to what holds it.
func (s *Service) attempt(ctx context.Context, j job) (*hold, wire.Outcome, error) {
	if j.local == "" && s.ownerIsHere() {
		return s.afterOwner(j), wire.Outcome{}, nil
	}
	if !s.busy.TryLock() {
		return s.occupied(j), wire.Outcome{}, nil
	}
	defer s.busy.Unlock()
	if done, out, err := s.seenBefore(j.order); done {
		return nil, out, err
	}
	yielding, settled := s.yields(ctx, j)
	held, err := s.install(yielding, j)
	if held == nil && err != nil {
		held = s.later(yielding, j, err)
	}
	settled()
	switch {
	case held != nil:
		return held, wire.Outcome{}, nil
	case err == nil:
		return nil, wire.Outcome{}, ErrRestart
	}
	t, _, unknown := s.how.standing()
	switch {
	case unknown != nil:
		return nil, wire.Outcome{}, s.unknown(j.order, errors.Join(err, unknown))
	case t == nil || t.order != j.order:
		return nil, s.evidence(j, err), problem(ctx, err)
	}
	// The trial stands, and will be tried at the next start whatever is said of it now.
	s.o.Log.Warn("the new version is on trial though its install did not end in order", "error", err)
	return nil, wire.Outcome{}, ErrRestart
}

// evidence is what the device was shown of a log with two faces, for who can compare
// it with what others have seen.
func (s *Service) evidence(j job, err error) (out wire.Outcome) {
	if fork := (*repo.Fork)(nil); errors.As(err, &fork) {
		out.Body = wire.UpdateResult{From: s.o.Version, To: j.version, Running: s.o.Version, Slot: s.o.Slot, Checkpoint: fork.Shown}
	}
	return out
}

// occupied waits for another update, which does something now.
func (s *Service) occupied(j job) *hold {
	why := wire.RejectedUntil(time.Minute, wire.CodeUpdatePending, "another update is being installed; this one is looked at when that has ended")
	return &hold{version: j.version, why: why, again: func() *wire.Problem {
		if !s.busy.TryLock() {
			return why
		}
		s.busy.Unlock()
		return nil
	}}
}

// unknown leaves an order open of which the disk does not tell whether it is on
// trial: a report is final, and a version that was reported as failed may be tried and
// kept. The order comes again until it expires.
func (s *Service) unknown(order string, why error) error {
	s.o.Log.Error("whether the new version is on trial cannot be told now; the order stays open", "order", order, "error", why)
	return ErrPending
}

// seenBefore answers a repeat from what is on disk.
func (s *Service) seenBefore(order string) (bool, wire.Outcome, error) {
	t, last, err := s.how.standing()
	if err == nil {
		s.align(t)
	}
	switch {
	case err != nil:
		return true, wire.Outcome{}, s.unknown(order, err)
	case t != nil && t.order == order && t.running:
		return true, wire.Outcome{}, ErrPending
	case t != nil && t.order == order:
		return true, wire.Outcome{}, ErrRestart
	case t != nil:
		return true, wire.Outcome{}, wire.RejectedBecause(wire.CodeUpdatePending,
			"version %s is on trial since order %s; offer this one again when that is decided", t.version, t.order)
	case last != nil && last.Order == order:
		done := s.settled(*last)
		if done.Problem != nil {
			return true, done.Outcome, done.Problem
		}
		return true, done.Outcome, nil
	}
	return false, wire.Outcome{}, nil
}

// problem says what an error means to the fleet manager.
func problem(ctx context.Context, err error) error {
	var p *wire.Problem
	var e *repo.Error
	switch {
	case errors.As(err, &p):
		return p
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, repo.ErrNoRoot):
		return wire.RejectedBecause(wire.CodeNoUpdateRoot, "%v", err)
	case errors.Is(err, slot.ErrBusy):
		return wire.RejectedBecause(wire.CodeUpdatePending, "%v", err)
	case errors.Is(err, firmware.ErrSpace):
		return wire.FailedBecause(wire.CodeNoSpace, "%v", err)
	case errors.Is(err, unix.ENOSPC):
		return wire.FailedBecause(wire.CodeNoSpace, "the disk is full: %v; free some space and offer the update again", err)
	case errors.Is(err, bundle.ErrContent):
		return wire.FailedBecause(wire.CodeVerification, "%v; publish the release again", err)
	case errors.As(err, &e):
		return repoProblem(e)
	}
	for _, r := range []struct {
		err  error
		code string
	}{
		{bundle.ErrSame, wire.CodeAlreadyLatest},
		{bundle.ErrDowngrade, wire.CodeDowngrade},
		{bundle.ErrFloor, wire.CodeDowngrade},
		{firmware.ErrVersion, wire.CodePreflight},
		{firmware.ErrUncounted, wire.CodeNotSupported},
		{bundle.ErrBoard, wire.CodeWrongHardware},
		{bundle.ErrPlatform, wire.CodeWrongHardware},
		{bundle.ErrFrom, wire.CodeTooOld},
		{bundle.ErrRollout, wire.CodeNotInRollout},
	} {
		if errors.Is(err, r.err) {
			return wire.RejectedBecause(r.code, "%v", err)
		}
	}
	return err
}

func repoProblem(e *repo.Error) error {
	switch {
	case errors.Is(e, bundle.ErrNewerFormat):
		return wire.RejectedBecause(wire.CodeNewerFormat, "%v", e)
	case e.Condition == repo.LogFork:
		return wire.RejectedBecause(wire.CodeLogFork, "the release is refused: %v", e)
	case e.Condition == repo.Unlogged:
		return wire.RejectedBecause(wire.CodeNotLogged, "the release is refused: %v", e)
	case e.Condition == repo.Expired:
		return wire.RejectedBecause(wire.CodeStaleMetadata, "update metadata: %v", e)
	case e.Condition == repo.Missing && !errors.Is(e, fs.ErrNotExist):
		return wire.RejectedBecause(wire.CodeNotFound, "%v; publish it first", e)
	case e.Condition == repo.Missing:
		return wire.FailedBecause(wire.CodeNotFound, "the update repository lacks a file: %v; publish it again", e)
	case e.Condition == repo.Slow:
		return wire.FailedBecause(wire.CodeSlowTransfer, "%v; what was fetched is kept for the next attempt", e)
	case e.Condition == repo.Unreachable:
		return wire.FailedBecause(wire.CodeTransfer, "%v; what was fetched is kept for the next attempt", e)
	}
	return wire.RejectedBecause(wire.CodeVerification, "the release is refused: %v", e)
}
