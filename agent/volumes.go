package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw/disk"
	"github.com/deimos-edge/deimos/hw/health"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
)

// places is where chunks go, each with what it leaves free: what the owner's file
// or the command line names, and else what hw/disk chooses; at the least a folder
// in the state, whose floor then decides whether there is room for anything.
func (c Config) places(m *machine) []VolumeConfig {
	chosen := c.Volumes
	if len(chosen) == 0 {
		chosen = c.choose(m)
	}
	for i := range chosen {
		v := &chosen[i]
		if v.Floor == 0 {
			v.Floor = store.DefaultFloor(v.Dir)
		}
		// With less, a device could fill itself until it cannot report.
		if v.Floor < sharedFloor && sameDisk(v.Dir, c.StateDir) {
			m.log.Warn("the floor is raised: this volume is on the disk of the agent's own state", "volume", v.Dir, "floor_bytes", int64(sharedFloor))
			v.Floor = sharedFloor
		}
	}
	return chosen
}

// sharedFloor is the least that chunks leave free on the disk that the agent's
// own state is on: what the journal needs, twice over, and room for both to
// compact.
const sharedFloor = 4 * journalFloor

func (c Config) choose(m *machine) (chosen []VolumeConfig) {
	own := VolumeConfig{Dir: c.path("volumes", "main"), Floor: c.Floor}
	for _, x := range disk.Choose(m.inventory().Inventory, c.diskOptions(m.board)) {
		switch {
		case x.Use:
			chosen = append(chosen, VolumeConfig{Dir: x.Dir, Capacity: x.Capacity, Floor: max(x.Floor, c.Floor)})
			m.log.Info("a disk is used for chunks", "folder", x.Dir, "why", x.Why)
		case x.Dir == own.Dir:
			own.Floor = max(x.Floor, c.Floor)
		}
	}
	if len(chosen) == 0 {
		chosen = append(chosen, own)
	}
	return chosen
}

// watched are the folders whose filesystems matter.
func (c Config) watched(places []VolumeConfig) []health.Path {
	all := []health.Path{{Dir: c.StateDir}}
	for _, v := range places {
		all = append(all, health.Path{Dir: v.Dir, Floor: uint64(v.Floor)})
	}
	return all
}

// chosenFile names the folders that were chosen, one a line, for who resets the
// device.
const chosenFile = "volumes.chosen"

func (a *Agent) noteChosen(all []VolumeConfig) error {
	var b strings.Builder
	for _, v := range all {
		fmt.Fprintln(&b, v.Dir)
	}
	if err := durable.WriteFile(a.cfg.path(chosenFile), []byte(b.String()), 0o600); err != nil {
		return fmt.Errorf("the choice of disks cannot be saved: %w", err)
	}
	return nil
}

// chosenBefore reads what noteChosen wrote.
func chosenBefore(c Config) ([]string, error) {
	raw, err := os.ReadFile(c.path(chosenFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return strings.FieldsFunc(string(raw), func(r rune) bool { return r == '\n' }), err
}

func (c Config) diskOptions(b board.Board) disk.Options {
	return disk.Options{Auto: c.Disks.Auto, Use: c.Disks.Use, Never: c.Disks.Never, State: c.StateDir, Board: b}
}

// openVolumes opens what can be opened and trusted: one broken disk must not
// take the others down with it. None at all is an error.
func (a *Agent) openVolumes(ctx context.Context) error {
	tests, err := disk.OpenRecord(a.cfg.StateDir)
	if err != nil {
		return err
	}
	var open []*store.Volume
	var failed error
	if err := a.noteChosen(a.hw.places); err != nil {
		return err
	}
	for _, v := range a.hw.places {
		vol, err := a.openVolume(ctx, tests, v)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		open = append(open, vol)
	}
	if len(open) == 0 {
		return failed
	}
	if failed != nil {
		a.log.Error("a volume is not available; its chunks count as lost until it is", "error", failed)
	}
	a.chunks = store.NewSet(open...)
	return nil
}

func (a *Agent) openVolume(ctx context.Context, tests *disk.Record, v VolumeConfig) (*store.Volume, error) {
	t, err := tests.Trusted(ctx, v.Dir, a.hw.inventory().Inventory, a.log)
	if err == nil && !t.Passed {
		err = fmt.Errorf("the disk of %s has failed its self-test: %s", v.Dir, t.Problem)
	}
	if err != nil {
		a.hw.health.Set(health.DiskRefused, v.Dir, err.Error())
		return nil, err
	}
	vol, err := store.Open(v.Dir, store.Options{Capacity: v.Capacity, FloorBytes: v.Floor, Log: a.log})
	if err != nil {
		a.hw.health.Set(health.VolumeFailed, v.Dir, err.Error())
	}
	return vol, err
}

// feel tells the registry of warnings how the agent's own parts are; it is
// called with each sample.
func (a *Agent) feel() {
	for _, s := range a.chunks.Stats() {
		a.hw.health.Is(health.VolumeFailed, s.Dir, s.ReadOnly != "", s.ReadOnly)
	}
	_, sure := a.clock.Read()
	a.hw.health.Is(health.ClockUntrusted, "", sure != wire.ClockTrusted, "nobody has told this device the time since it started")
	a.hw.health.Is(health.CoordinatorRefuses, "", a.dismissed.Load(), "the coordinator has sent this device away")
}

// sameDisk tells whether two folders, of which the first may not be there yet,
// are on one file system. In doubt they are.
func sameDisk(dir, other string) bool {
	var a, b unix.Stat_t
	for unix.Stat(dir, &a) != nil {
		up := filepath.Dir(dir)
		if up == dir {
			return true
		}
		dir = up
	}
	return unix.Stat(other, &b) != nil || a.Dev == b.Dev
}
