package ota

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

// The steps of one update, from the release that is offered to the one that is installed.

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
	s.fetched()
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
		Dir: trustDir(s.o.StateDir), Root: root, Source: source, Local: j.local != "", Limits: s.o.Limits, Log: s.o.Log,
	})
}

// fetch brings the packed part to disk, once there is room for it and for what the
// install takes beside it.
func (s *Service) fetch(ctx context.Context, j job, f offer, form bundle.Form) (string, error) {
	clear := func() error { return s.clearFetched(form.SHA256) }
	if j.local != "" { // what the fleet has fetched so far stays
		clear = func() error { return os.MkdirAll(s.fetchDir(), 0o755) }
	}
	if err := clear(); err != nil {
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
