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
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
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
	Log    *slog.Logger
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
}

// New makes the slot directories if they are missing.
func New(o Options) (*Service, error) {
	if o.Platform == (bundle.Platform{}) {
		o.Platform = bundle.Host()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
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
			return &wire.Problem{State: wire.Rejected, Code: why.Code, Reason: why.Reason + "; the order is over before that", After: why.After}
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
	if !s.busy.TryLock() {
		return s.occupied(j), wire.Outcome{}, nil
	}
	defer s.busy.Unlock()
	if done, out, err := s.seenBefore(j.order); done {
		return nil, out, err
	}
	held, err := s.install(ctx, j)
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

// offer is a release that this device may take.
type offer struct {
	client *repo.Client
	m      bundle.Manifest
	part   bundle.Part
	forms  []bundle.Form // smallest first
	more   int64         // bytes that an install takes on the disk of the state, beside what is fetched
	down   bool          // it is older than what runs, by a signed exception
}

// install brings the release as far as its trial, or to what holds it.
func (s *Service) install(ctx context.Context, j job) (*hold, error) {
	from := s.mem.get()
	err := s.mem.step(slot.Offered, func(r *Record) {
		if from.Order == j.order {
			return // what it has fetched, and since when, stands
		}
		*r = Record{Phase: r.Phase, Order: j.order, Version: j.version, From: s.o.Version, Local: j.local, Ended: from.Ended, Heard: from.Heard}
	})
	if err != nil {
		return nil, err
	}
	s.show(&wire.UpdateState{Phase: wire.UpdateFetching, Version: j.version, Local: j.local != ""})
	f, err := s.look(ctx, j)
	if err != nil {
		return nil, err
	}
	j.progress(0.05)
	for _, form := range f.forms {
		held, err := s.take(ctx, j, f, form)
		if held != nil {
			return held, err
		}
		switch {
		case err == nil:
			s.noteInstalled()
			j.progress(0.95)
			if err := s.clearFetched(""); err != nil { // the next install clears it
				s.o.Log.Warn("what was fetched of the release cannot be removed", "error", err)
			}
			return nil, nil
		case !form.Delta() || !worthless(err):
			return nil, err
		}
		// The next form may be larger: whether its bytes may be fetched is asked again. For
		// when that takes a while, or the power goes, it is remembered what is of no use.
		s.o.Log.Warn("a delta of the release cannot be used; another form of it is looked at", "encoding", form.Encoding, "error", err)
		if err := s.mem.note(func(r *Record) {
			r.Unusable = maps.Clone(r.Unusable)
			if r.Unusable == nil {
				r.Unusable = map[string]string{}
			}
			r.Unusable[form.SHA256] = err.Error()
		}); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: version %s has no form that can be unpacked here", bundle.ErrPlatform, f.m.Version)
}

// take brings a form and installs it. One that lay here may have rotted on the disk
// meanwhile, which says nothing of the release: it is fetched once more.
func (s *Service) take(ctx context.Context, j job, f offer, form bundle.Form) (*hold, error) {
	for lay := s.missing(form) == 0; ; lay = false {
		packed, held, err := s.bring(ctx, j, f, form)
		if held != nil || err != nil {
			return held, err
		}
		err = s.prepare(ctx, packed, release{order: j.order, version: f.m.Version, part: f.part, form: form})
		if !lay || !errors.Is(err, bundle.ErrContent) {
			return nil, err
		}
		s.o.Log.Warn("what was fetched of the release before has been damaged on the disk; it is fetched again", "error", err)
	}
}

// worthless tells of an error that comes again however often this delta is tried: its
// bytes are not there, or not the signed ones, or do not make what was signed.
func worthless(err error) bool {
	var e *repo.Error
	return errors.Is(err, bundle.ErrContent) || errors.As(err, &e) && (e.Condition == repo.Digest || e.Condition == repo.Missing)
}

// noDelta is why a form is none, of a release that has some.
func (f offer) noDelta(form bundle.Form, unusable map[string]string) (why string) {
	if form.Delta() {
		return ""
	}
	for _, other := range f.part.Forms {
		switch reason := unusable[other.SHA256]; {
		case !other.Delta():
		case reason != "":
			return "its delta from what runs here cannot be used: " + reason
		case why == "":
			why = "none of its deltas is from what runs here"
		}
	}
	return why
}

// look asks the signed metadata what is offered, and whether it is for this device.
func (s *Service) look(ctx context.Context, j job) (offer, error) {
	client, err := s.client(j)
	if err != nil {
		return offer{}, err
	}
	if err := client.Refresh(ctx, s.o.Now()); err != nil {
		return offer{}, err
	}
	floor, _, err := s.floor()
	if err != nil {
		return offer{}, err
	}
	me := bundle.Device{ID: string(s.o.Device), Board: s.o.Board, Version: s.o.Version, Floor: floor, Part: s.how.part(), Platform: s.o.Platform, Runs: s.runs()}
	m, err := s.manifest(ctx, client, j, me)
	if err != nil {
		return offer{}, err
	}
	part, forms, err := m.For(me)
	if err != nil {
		return offer{}, err
	}
	if point := bundle.RolloutPoint(m.Version, string(s.o.Device)); j.share > 0 && point >= j.share {
		return offer{}, fmt.Errorf("%w: %s goes to %v%% of devices so far, and this one stands at %.2f%%", bundle.ErrRollout, m.Version, j.share, point)
	}
	unusable := s.mem.get().Unusable
	forms = slices.DeleteFunc(forms, func(form bundle.Form) bool { return unusable[form.SHA256] != "" })
	f := offer{client: client, m: m, part: part, forms: forms, down: bundle.Compare(m.Version, s.o.Version) < 0}
	if f.down && me.Part == bundle.PartFirmware {
		return f, wire.RejectedBecause(wire.CodeNoWayBack, "version %s is older than %s, which runs, and the boot loader of this device starts the newest firmware that there is: it cannot go back by an update; "+
			"release the old one again under a newer version, or write its image to the disk", m.Version, s.o.Version)
	}
	if m.Floor != "" {
		if err := s.raise(m.Floor, false); err != nil {
			return f, err
		}
	}
	f.more, err = s.how.room(m.Version, part.Size)
	if err != nil {
		return f, err
	}
	return f, s.mem.note(func(r *Record) { r.Version, r.Down, r.Checkpoint = m.Version, f.down, client.Log().Checkpoint })
}

// runs is the SHA-256 of the file that runs, measured; "" if it cannot be read, which
// is no reason not to install another.
func (s *Service) runs() string {
	file, err := s.how.runs()
	if err == nil {
		defer file.Close()
		h := sha256.New()
		if _, err = io.Copy(h, file); err == nil {
			return hex.EncodeToString(h.Sum(nil))
		}
	}
	s.o.Log.Warn("the file that runs cannot be read, so no delta is used", "error", err)
	return ""
}

// manifest is what the order names, or the newest that there is for this device.
func (s *Service) manifest(ctx context.Context, client *repo.Client, j job, me bundle.Device) (bundle.Manifest, error) {
	if j.version == "" {
		return s.newest(ctx, client, j, me)
	}
	if j.target == "" {
		j.target = repo.TargetName(j.version)
	}
	m, err := client.Manifest(ctx, j.target)
	if err == nil && m.Version != j.version {
		err = wire.RejectedBecause(wire.CodeVerification, "the order offers version %s, but its target %s is version %s", j.version, j.target, m.Version)
	}
	return m, err
}

// bring has a form on disk, whole and the signed bytes, when it may go on to be installed.
func (s *Service) bring(ctx context.Context, j job, f offer, form bundle.Form) (packed string, held *hold, err error) {
	rec := s.mem.get()
	noDelta := f.noDelta(form, rec.Unusable)
	if held, err := s.held(j, Step{Version: f.m.Version, Fetch: s.missing(form), NoDelta: noDelta}); held != nil || err != nil {
		return "", held, err
	}
	goes := slot.Allowed
	if rec.Phase != slot.Waiting {
		goes = slot.Refetched
	}
	if err := s.mem.step(goes, func(r *Record) {
		if r.Began == nil {
			r.Began = s.o.moment()
		}
		r.Form, r.NoDelta = form.Encoding, noDelta
	}); err != nil {
		return "", nil, err
	}
	s.show(&wire.UpdateState{Phase: wire.UpdateFetching, Version: f.m.Version, Local: j.local != ""})
	began := time.Now()
	limit := slot.Limits[slot.Fetching] - s.o.since(s.mem.get().Began)
	limited, cancel := context.WithTimeoutCause(ctx, limit, wire.FailedBecause(wire.CodeLimit, "the release could not be fetched within %s; what was fetched is kept for the next attempt", slot.Limits[slot.Fetching]))
	defer cancel()
	packed, err = s.fetch(limited, j, f, form)
	if err != nil {
		if ctx.Err() == nil && limited.Err() != nil {
			err = context.Cause(limited)
		}
		return "", nil, err
	}
	figures := s.figures()
	if j.local == "" {
		figures.Online = true // an order came, and this version is to be held to that
	}
	if err := s.mem.step(slot.Fetched, func(r *Record) {
		r.Took += time.Since(began).Seconds()
		r.Before = &figures
	}); err != nil {
		return "", nil, err
	}
	j.progress(0.8)
	held, err = s.held(j, Step{Version: f.m.Version})
	if held == nil && err == nil {
		s.show(&wire.UpdateState{Phase: wire.UpdateVerified, Version: f.m.Version, Local: j.local != ""})
	}
	return packed, held, err
}

// held asks whether the update may take its next step. If not, it waits, durably.
func (s *Service) held(j job, step Step) (*hold, error) {
	if j.local != "" { // the owner is here
		return nil, nil
	}
	step.Order = j.order
	ask := func() *wire.Problem { return s.o.Hold(step) }
	if step.Fetch == 0 && s.mem.get().Phase == slot.Waiting {
		return nil, nil // all is here: what is asked before it is installed, is asked then
	}
	why := ask()
	if why == nil {
		return nil, nil
	}
	err := s.mem.step(slot.Held, func(r *Record) {
		r.Why, r.Began = s.why(why), nil // while it waits, it does not fetch
	})
	return &hold{version: step.Version, why: why, again: ask}, err
}

// why is what an update waits for, as its record has it.
func (s *Service) why(p *wire.Problem) *Why {
	w := &Why{Code: p.Code, Reason: p.Reason}
	if p.After > 0 {
		until := s.o.Now().Add(p.After).UTC().Truncate(time.Second)
		w.Until = &until
	}
	return w
}

// noteWhy notes that an update waits for something else than before.
func (s *Service) noteWhy(j job, p *wire.Problem) {
	err := s.mem.note(func(r *Record) {
		if r.Order == j.order && r.Phase == slot.Waiting {
			r.Why = s.why(p)
		}
	})
	if err != nil {
		s.o.Log.Warn("what the update waits for cannot be noted", "error", err)
	}
}

// noteInstalled adds to a trial that stands: it is no reason to say that it does not.
func (s *Service) noteInstalled() {
	if err := s.mem.step(slot.Marked, nil); err != nil {
		s.o.Log.Warn("that the new version is installed cannot be noted", "error", err)
	}
	rec := s.mem.get()
	s.show(&wire.UpdateState{Phase: wire.UpdateInstalled, Version: rec.Version, Local: rec.Local != ""})
}

func trustDir(stateDir string) string { return filepath.Join(stateDir, "ota", "tuf") }

// Enrolled forgets the metadata of a fleet that the device leaves by an enrolment
// with another update root. Call it before that enrolment is kept: cut between the
// two, the device is still a member of the old fleet, and reads its metadata again.
func Enrolled(stateDir string, root []byte) error { return repo.Leave(trustDir(stateDir), root) }

func (s *Service) client(j job) (_ *repo.Client, err error) {
	root := s.o.Root()
	if len(root) == 0 {
		return nil, repo.ErrNoRoot
	}
	source := j.source
	if source == nil {
		if source, err = s.o.Source(); err != nil {
			return nil, err
		}
	}
	return repo.NewClient(repo.ClientOptions{
		Dir: trustDir(s.o.StateDir), Root: root, Source: source, Limits: s.o.Limits, Log: s.o.Log,
	})
}

// fetch brings the packed part to disk, once there is room for it and for what the
// install takes beside it.
func (s *Service) fetch(ctx context.Context, j job, f offer, form bundle.Form) (string, error) {
	if err := s.clearFetched(form.SHA256); err != nil {
		return "", err
	}
	path := filepath.Join(s.fetchDir(), form.SHA256)
	missing := s.missing(form)
	if missing == 0 {
		return path, nil // fetched before; unpacking checks it again
	}
	if err := checkSpace(s.fetchDir(), missing+f.more+spaceMargin); err != nil {
		return "", err
	}
	have := form.Size - missing
	s.o.Log.Info("fetching a release", "form", form.Encoding, "bytes", form.Size, "have", have)
	moved := int64(0)
	err := f.client.FetchPart(ctx, form, path, func(n, came int64) {
		moved += came
		if j.local == "" {
			s.o.Moved(came)
		}
		j.progress(0.05 + 0.75*float64(n)/float64(form.Size))
	})
	if moved > 0 { // and what a life before has fetched that was cut off
		err = errors.Join(err, s.mem.note(func(r *Record) { r.Fetched = max(r.Fetched, have) + moved }))
	}
	return path, err
}

// missing is how many bytes of a form are not here.
func (s *Service) missing(form bundle.Form) int64 {
	path := filepath.Join(s.fetchDir(), form.SHA256)
	if fi, err := os.Stat(path); err == nil && fi.Size() == form.Size {
		return 0
	}
	if fi, err := os.Stat(path + ".partial"); err == nil && fi.Size() < form.Size {
		return form.Size - fi.Size()
	}
	return form.Size
}

func (s *Service) fetchDir() string { return filepath.Join(s.o.StateDir, "ota", "parts") }

// clearFetched removes what earlier updates fetched, but for the part named keep.
func (s *Service) clearFetched(keep string) error {
	if err := os.MkdirAll(s.fetchDir(), 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.fetchDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if keep != "" && (e.Name() == keep || e.Name() == keep+".partial") {
			continue
		}
		if err := os.RemoveAll(filepath.Join(s.fetchDir(), e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// freeSpace is a variable so that a test can fill the disk.
var freeSpace = func(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

func checkSpace(dir string, need int64) error {
	free, err := freeSpace(dir)
	if err != nil {
		return err
	}
	if free < need {
		return wire.FailedBecause(wire.CodeNoSpace, "the update needs %d MB free on the disk of %s, there are %d MB; free some space and offer it again",
			need>>20, dir, free>>20)
	}
	return nil
}

// prepare installs what was fetched. Bytes that are not the signed ones are not kept.
func (s *Service) prepare(ctx context.Context, packed string, r release) (err error) {
	in, err := os.Open(packed)
	if err != nil {
		return err
	}
	defer in.Close()
	r.packed = io.MultiReader(io.LimitReader(in, r.form.Size/2), halfway{}, in)
	if r.form.Delta() {
		if r.old, err = s.how.runs(); err != nil {
			return fmt.Errorf("%w: what runs cannot be read: %w", bundle.ErrContent, err)
		}
		defer r.old.Close()
	}
	limit := slot.Limits[slot.Verified]
	limited, cancel := context.WithTimeoutCause(ctx, limit, wire.FailedBecause(wire.CodeLimit, "the release could not be installed within %s; is the disk failing?", limit))
	defer cancel()
	if err := s.how.install(limited, r); err != nil {
		if ctx.Err() == nil && limited.Err() != nil {
			return context.Cause(limited)
		}
		if errors.Is(err, bundle.ErrContent) {
			return errors.Join(err, os.Remove(packed))
		}
		return err
	}
	s.o.Log.Info("a new version is installed and goes on trial", "version", r.version, "part", r.part.Name)
	return nil
}

// halfway is where tests cut the power.
type halfway struct{}

func (halfway) Read([]byte) (int, error) {
	slot.CrashPoint("half of it is unpacked")
	return 0, io.EOF
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
