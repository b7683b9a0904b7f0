package ota

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/wire"
)

// mechanism is how this device comes to another version, and back.
type mechanism interface {
	// part is the name of what it installs.
	part() string
	// standing is its trial, nil if there is none, and how the last one ended.
	standing() (*trial, *slot.Outcome, error)
	// reported notes that the outcome of this order is told.
	reported(order string) error
	onTrial() (bool, error)
	// confirm makes the version that runs the one to keep.
	confirm(context.Context) error
	// runs opens the file that runs, which a delta is applied to.
	runs() (*running, error)
	// room tells how many bytes an install needs on the disk of the state, beside
	// what is fetched, and as an error if it has too few elsewhere.
	room(version string, size int64) (here int64, err error)
	// install unpacks a release, looks whether it is what it should be, and puts it on trial.
	install(context.Context, release) error
}

// trial is a version that is installed and not decided.
type trial struct {
	order, version string
	running        bool // it is what runs
	crashed        int  // tries that ended by a crash; of a firmware, whose try outlives its agent, they are not counted
}

// release is what is to be installed.
type release struct {
	order, version string
	part           bundle.Part
	form           bundle.Form
	packed         io.Reader
	old            *running // for a delta; nil otherwise
}

// running is the file that runs.
type running struct {
	*io.SectionReader
	io.Closer
}

// oldBytes are nil for a whole form.
func (r release) oldBytes() *io.SectionReader {
	if r.old == nil {
		return nil
	}
	return r.old.SectionReader
}

// check compares what a file says of itself with what was signed.
func (r release) check(about slot.About, p bundle.Platform, runs string) error {
	if about.Version != r.version || about.OS != p.OS || about.Arch != p.Arch {
		return wire.FailedBecause(wire.CodePreflight, "the release is signed as %s for %s, but says that it is %s for %s/%s; version %s keeps running",
			r.version, p, about.Version, about.OS, about.Arch, runs)
	}
	return nil
}

// mechanism picks by how this device was started; nil if it cannot be updated.
func (o Options) mechanism() (mechanism, error) {
	switch {
	case o.Slot != "":
		if !slot.Name(o.Slot).Valid() {
			return nil, fmt.Errorf("%s is %q, must be a or b; it is set by deimos-launch", slot.Env, o.Slot)
		}
		slots, err := slot.Open(o.StateDir)
		return agents{slots, o}, err
	case o.ESP != "":
		images, err := firmware.Open(o.ESP, filepath.Join(o.StateDir, "ota"), o.Version, o.Boot)
		return firmwares{images, o}, err
	}
	return nil, nil
}

// agents are two agents under their launcher.
type agents struct {
	slots *slot.Store
	o     Options
}

func (a agents) part() string { return bundle.PartAgent }

func (a agents) standing() (*trial, *slot.Outcome, error) {
	st, err := a.slots.Load()
	if err != nil || st.Trial == nil {
		return nil, st.Last, err
	}
	return &trial{st.Trial.Order, st.Trial.Version, a.isTrial(st.Trial), st.Trial.Crashed}, st.Last, nil
}

func (a agents) isTrial(t *slot.Trial) bool {
	return t != nil && t.Running && t.Slot == slot.Name(a.o.Slot)
}

func (a agents) reported(order string) error { return a.slots.Reported(order) }

func (a agents) onTrial() (bool, error) {
	st, err := a.slots.Load()
	return err == nil && a.isTrial(st.Trial), err
}

func (a agents) confirm(context.Context) error { return a.slots.Confirm(slot.Name(a.o.Slot)) }

func (a agents) runs() (*running, error) {
	f, err := os.Open(a.slots.Path(slot.Name(a.o.Slot)))
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &running{io.NewSectionReader(f, 0, info.Size()), f}, nil
}

func (a agents) room(_ string, size int64) (int64, error) { return size, nil }

func (a agents) install(ctx context.Context, r release) error {
	target, err := a.slots.BeginInstall(r.order, a.o.Version)
	if err != nil {
		return err
	}
	staged := a.slots.StagedPath(target)
	if err := bundle.Unpack(ctx, r.packed, r.part, r.form, r.oldBytes(), staged); err != nil {
		return err
	}
	about, err := slot.Ask(ctx, staged)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return wire.FailedBecause(wire.CodePreflight, "version %s does not run on this machine (%v); version %s keeps running", r.version, err, a.o.Version)
	}
	if err := r.check(about, a.o.Platform, a.o.Version); err != nil {
		return err
	}
	return a.slots.MarkTrial(r.order, slot.Image{Version: r.version, SHA256: r.part.SHA256})
}

// firmwares are two whole firmwares under the boot loader.
type firmwares struct {
	images *firmware.Store
	o      Options
}

func (f firmwares) part() string { return bundle.PartFirmware }

func (f firmwares) standing() (*trial, *slot.Outcome, error) {
	t, last, err := f.images.State()
	if t == nil || err != nil {
		return nil, last, err
	}
	return &trial{order: t.Order, version: t.Version, running: t.Running}, last, nil
}

func (f firmwares) reported(order string) error { return f.images.Reported(order) }

func (f firmwares) onTrial() (bool, error) { return f.images.OnTrial() }

func (f firmwares) confirm(ctx context.Context) error { return f.images.Confirm(ctx) }

func (f firmwares) runs() (*running, error) {
	image, size, err := f.images.Running()
	if err != nil {
		return nil, err
	}
	return &running{io.NewSectionReader(image, 0, size), image}, nil
}

func (f firmwares) room(version string, size int64) (int64, error) {
	return 0, f.images.CheckRoom(version, size)
}

// install unpacks right into the EFI system partition: a firmware is large, and
// flash wears.
func (f firmwares) install(ctx context.Context, r release) error {
	content, err := bundle.NewReader(ctx, r.packed, r.part, r.form, r.oldBytes())
	if err != nil {
		return err
	}
	defer content.Close()
	return f.images.Install(ctx, r.order, slot.Image{Version: r.version, SHA256: r.part.SHA256}, r.part.Size, content, func(image io.ReaderAt) error {
		about, err := firmware.Ask(image, r.part.Size)
		if err != nil {
			return wire.FailedBecause(wire.CodePreflight, "version %s cannot start this machine (%v); version %s keeps running", r.version, err, f.o.Version)
		}
		return r.check(about, f.o.Platform, f.o.Version)
	})
}
