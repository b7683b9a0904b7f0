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
//	order ─▶ refresh metadata ─▶ is it for this device? ─▶ space ─▶ fetch (resumes)
//	      ─▶ unpack aside, both digests checked ─▶ ask it for its version
//	      ─▶ on trial, durably ─▶ ErrRestart: the agent exits with slot.ExitRestart
//	                               or, with a firmware installed, slot.ExitReboot
//	new agent ─▶ healthy ─▶ Confirm ─▶ Settled: SUCCEEDED
//	      └─▶ not confirmed in three tries ─▶ old agent ─▶ Settled: FAILED rolled_back
//
// Up to "on trial" nothing has changed for the running version: a crash, a cut
// or a refusal leaves files that the next install clears away. A repeat of the
// order at any moment installs nothing twice.
//
// Not here yet: deltas, maintenance windows, data budgets, a
// health gate that compares with the figures from before.
package ota

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/wire"
)

// Codes of this room's own.
const (
	CodeNoUpdateRoot  = "no_update_root" // the device has nothing to check a release against
	CodeDowngrade     = "downgrade"      // older than what runs
	CodeWrongHardware = "wrong_hardware" // for other boards or platforms
	CodeTooOld        = "too_old"        // needs a release in between
	CodeNotInRollout  = "not_in_rollout" // this device's turn has not come
	CodeUpdatePending = "update_pending" // another update is under way
	CodePreflight     = "preflight"      // the new agent does not start here, or is not what it should be
	CodeNewerFormat   = "newer_format"   // made for newer agents
	CodeSlowTransfer  = "slow_transfer"  // the source is too slow to ever finish
	CodeStaleMetadata = "stale_metadata" // signed too long ago, or the device's clock is wrong
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

	Limits repo.Limits
	Log    *slog.Logger
}

// Service carries out the updates of one device.
type Service struct {
	o    Options
	how  mechanism  // nil: the device cannot be updated
	busy sync.Mutex // one update at a time
}

// New makes the slot directories if they are missing.
func New(o Options) (*Service, error) {
	if o.Platform == (bundle.Platform{}) {
		o.Platform = bundle.Host()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(filepath.Join(o.StateDir, "ota"), 0o755); err != nil {
		return nil, fmt.Errorf("cannot make the folder for updates (check the state directory): %w", err)
	}
	how, err := o.mechanism()
	return &Service{o: o, how: how}, err
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

// Confirm makes the running version the one to keep. Call it when the agent is
// healthy, or has nothing to go back to; it does nothing for a version that is
// confirmed, and on a device that cannot be updated. On a new device that runs our
// image it writes that a second time, which takes seconds.
func (s *Service) Confirm(ctx context.Context) error {
	if s.how == nil {
		return nil
	}
	if err := s.how.confirm(ctx); err != nil {
		return fmt.Errorf("version %s cannot be confirmed: %w", s.o.Version, err)
	}
	return nil
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
	_, last, err := s.how.standing()
	if err != nil || last == nil || last.Order == "" || last.Reported {
		return nil, err
	}
	return s.settled(*last), nil
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
	out := &Settled{Order: last.Order, Outcome: wire.Outcome{Body: wire.UpdateResult{
		From: last.From, To: last.To, Running: s.o.Version, Slot: s.o.Slot, Confirmed: last.Result == slot.Confirmed,
	}}}
	if last.Result != slot.Confirmed {
		out.Problem = wire.FailedBecause(wire.CodeRolledBack, "rolled back to version %s: %s", last.From, last.Reason)
	}
	return out
}

// Handle is the [wire.Handler] of [wire.KindUpdateInstall]. Beside what a
// handler may return it can return [ErrRestart] and [ErrPending], after which
// the order stays open, and ctx's error as it is, after which a repeat resumes.
func (s *Service) Handle(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
	if !s.busy.TryLock() {
		return wire.Outcome{}, wire.RejectedBecause(CodeUpdatePending, "another update is being installed; offer this one again when it has ended")
	}
	defer s.busy.Unlock()
	want, err := wire.DecodeBody[wire.UpdateInstall](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	if s.how == nil {
		return wire.Outcome{}, wire.RejectedBecause(wire.CodeNotSupported, "this agent cannot update itself: start it through deimos-launch, or run our image")
	}
	if done, out, err := s.seenBefore(o.ID); done {
		return out, err
	}
	progress := func(done float64) {
		if tell != nil {
			tell(wire.Progress{Done: done})
		}
	}
	if err := s.install(ctx, o.ID, want, progress); err != nil {
		t, _, unknown := s.how.standing()
		switch {
		case unknown != nil:
			return wire.Outcome{}, s.unknown(o.ID, errors.Join(err, unknown))
		case t == nil || t.order != o.ID:
			return wire.Outcome{}, problem(ctx, err)
		}
		// The trial stands, and will be tried at the next start whatever is said of it now.
		s.o.Log.Warn("the new version is on trial though its install did not end in order", "error", err)
	}
	return wire.Outcome{}, ErrRestart
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
	switch {
	case err != nil:
		return true, wire.Outcome{}, s.unknown(order, err)
	case t != nil && t.order == order && t.running:
		return true, wire.Outcome{}, ErrPending
	case t != nil && t.order == order:
		return true, wire.Outcome{}, ErrRestart
	case t != nil:
		return true, wire.Outcome{}, wire.RejectedBecause(CodeUpdatePending,
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

// install brings the release as far as its trial.
func (s *Service) install(ctx context.Context, order string, want wire.UpdateInstall, progress func(float64)) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	if err := client.Refresh(ctx, s.o.Now()); err != nil {
		return err
	}
	m, err := client.Manifest(ctx, want.Target)
	if err != nil {
		return err
	}
	if m.Version != want.Version {
		return wire.RejectedBecause(wire.CodeVerification, "the order offers version %s, but its target %s is version %s", want.Version, want.Target, m.Version)
	}
	part, form, err := m.For(bundle.Device{ID: string(s.o.Device), Board: s.o.Board, Version: s.o.Version, Part: s.how.part(), Platform: s.o.Platform})
	if err != nil {
		return err
	}
	if point := bundle.RolloutPoint(m.Version, string(s.o.Device)); want.Percentage > 0 && point >= want.Percentage {
		return fmt.Errorf("%w: %s goes to %v%% of devices so far, and this one stands at %.2f%%", bundle.ErrRollout, m.Version, want.Percentage, point)
	}
	progress(0.05)
	here, err := s.how.room(m.Version, part.Size)
	if err != nil {
		return err
	}
	packed, err := s.fetch(ctx, client, form, here, func(share float64) { progress(0.05 + 0.75*share) })
	if err != nil {
		return err
	}
	progress(0.8)
	if err := s.prepare(ctx, packed, release{order: order, version: m.Version, part: part, form: form}); err != nil {
		return err
	}
	progress(0.95)
	if err := s.clearFetched(""); err != nil { // the next install clears it
		s.o.Log.Warn("what was fetched of the release cannot be removed", "error", err)
	}
	return nil
}

func trustDir(stateDir string) string { return filepath.Join(stateDir, "ota", "tuf") }

// Enrolled forgets the metadata of a fleet that the device leaves by an enrolment
// with another update root. Call it before that enrolment is kept: cut between the
// two, the device is still a member of the old fleet, and reads its metadata again.
func Enrolled(stateDir string, root []byte) error { return repo.Leave(trustDir(stateDir), root) }

func (s *Service) client() (*repo.Client, error) {
	root := s.o.Root()
	if len(root) == 0 {
		return nil, repo.ErrNoRoot
	}
	source, err := s.o.Source()
	if err != nil {
		return nil, err
	}
	return repo.NewClient(repo.ClientOptions{
		Dir: trustDir(s.o.StateDir), Root: root, Source: source, Limits: s.o.Limits, Log: s.o.Log,
	})
}

// fetch brings the packed part to disk, once there is room for it and for more
// bytes beside it.
func (s *Service) fetch(ctx context.Context, c *repo.Client, form bundle.Form, more int64, share func(float64)) (string, error) {
	if err := s.clearFetched(form.SHA256); err != nil {
		return "", err
	}
	path := filepath.Join(s.fetchDir(), form.SHA256)
	if fi, err := os.Stat(path); err == nil && fi.Size() == form.Size {
		return path, nil // fetched before a crash; unpacking checks it again
	}
	var have int64
	if fi, err := os.Stat(path + ".partial"); err == nil {
		have = fi.Size()
	}
	if err := checkSpace(s.fetchDir(), form.Size-have+more+spaceMargin); err != nil {
		return "", err
	}
	s.o.Log.Info("fetching a release", "bytes", form.Size, "have", have)
	return path, c.FetchPart(ctx, form, path, func(n int64) { share(float64(n) / float64(form.Size)) })
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
	if r.packed, err = os.Open(packed); err != nil {
		return err
	}
	defer r.packed.Close()
	if err := s.how.install(ctx, r); err != nil {
		if errors.Is(err, bundle.ErrContent) {
			return errors.Join(err, os.Remove(packed))
		}
		return err
	}
	s.o.Log.Info("a new version is installed and goes on trial", "version", r.version, "part", r.part.Name)
	return nil
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
		return wire.RejectedBecause(CodeNoUpdateRoot, "%v", err)
	case errors.Is(err, slot.ErrBusy):
		return wire.RejectedBecause(CodeUpdatePending, "%v", err)
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
		{bundle.ErrDowngrade, CodeDowngrade},
		{firmware.ErrVersion, CodePreflight},
		{firmware.ErrUncounted, wire.CodeNotSupported},
		{bundle.ErrBoard, CodeWrongHardware},
		{bundle.ErrPlatform, CodeWrongHardware},
		{bundle.ErrFrom, CodeTooOld},
		{bundle.ErrRollout, CodeNotInRollout},
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
		return wire.RejectedBecause(CodeNewerFormat, "%v", e)
	case e.Condition == repo.Expired:
		return wire.RejectedBecause(CodeStaleMetadata, "update metadata: %v", e)
	case e.Condition == repo.Missing && !errors.Is(e, fs.ErrNotExist):
		return wire.RejectedBecause(wire.CodeNotFound, "%v; publish it first", e)
	case e.Condition == repo.Missing:
		return wire.FailedBecause(wire.CodeNotFound, "the update repository lacks a file: %v; publish it again", e)
	case e.Condition == repo.Slow:
		return wire.FailedBecause(CodeSlowTransfer, "%v; what was fetched is kept for the next attempt", e)
	case e.Condition == repo.Unreachable:
		return wire.FailedBecause(wire.CodeTransfer, "%v; what was fetched is kept for the next attempt", e)
	}
	return wire.RejectedBecause(wire.CodeVerification, "the release is refused: %v", e)
}
