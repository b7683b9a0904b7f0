package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
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
		// A disk that hangs is not waited for; what is decided then is on the safe side.
		floor, ok := hw.Within(context.Background(), statLimit, "floor of "+v.Dir, func() int64 { return store.DefaultFloor(v.Dir) })
		if !ok {
			floor = sharedFloor
		}
		v.Floor = cmp.Or(v.Floor, floor)
		shared, ok := hw.Within(context.Background(), statLimit, "place of "+v.Dir, func() bool { return sameDisk(v.Dir, c.StateDir) })
		// With less, a device could fill itself until it cannot report.
		if v.Floor < sharedFloor && (shared || !ok) {
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

// volumes is the device's places for chunks, as they are now.
type volumes struct {
	tests *disk.Record
	left  []VolumeConfig // that could not be opened; of live's probe loop alone

	mu             sync.Mutex
	capacity, used int64 // see Agent.room
}

const (
	// openLimit is how long a volume may take to open: the chunks of its newest
	// log are read, up to a gigabyte from a slow disk.
	openLimit = 5 * time.Minute
	statLimit = 2 * time.Second
)

// openVolumes opens what can be opened and trusted. One broken disk must not take
// the others down with it, and a device without any still has to say so, and to
// take jobs and updates. What failed is tried again, see openRest.
func (a *Agent) openVolumes(ctx context.Context) (err error) {
	if a.places.tests, err = disk.OpenRecord(a.cfg.StateDir); err != nil {
		return err
	}
	if err := a.noteChosen(a.hw.places); err != nil {
		return err
	}
	var open []*store.Volume
	var failed error
	for _, v := range a.hw.places {
		vol, err := a.openVolume(ctx, v)
		if err != nil {
			a.places.left = append(a.places.left, v)
			failed = errors.Join(failed, err)
			continue
		}
		open = append(open, vol)
	}
	if failed != nil {
		a.log.Error("a volume is not available; its chunks count as lost until it is, and it is tried again", "error", failed)
	}
	a.chunks = store.NewSet(open...)
	a.measure()
	return nil
}

// openRest tries again what could not be opened: a disk that was slow at the
// start, or was put back.
func (a *Agent) openRest(ctx context.Context) {
	left := a.places.left
	a.places.left = nil
	for _, v := range left {
		vol, err := a.openVolume(ctx, v)
		if err != nil {
			a.places.left = append(a.places.left, v)
			continue
		}
		a.log.Info("a volume is available again", "volume", v.Dir)
		a.hw.health.Clear(health.DiskRefused, v.Dir)
		a.hw.health.Clear(health.VolumeFailed, v.Dir)
		a.chunks.Add(vol)
	}
}

// openVolume gives a disk that hangs up in time. What it opens after that is
// closed again.
func (a *Agent) openVolume(ctx context.Context, v VolumeConfig) (*store.Volume, error) {
	t, err := a.places.tests.Trusted(ctx, v.Dir, a.hw.inventory().Inventory, a.log)
	if err == nil && !t.Passed {
		err = fmt.Errorf("the disk of %s has failed its self-test: %s", v.Dir, t.Problem)
	}
	if err != nil {
		a.hw.health.Set(health.DiskRefused, v.Dir, err.Error())
		return nil, err
	}
	type answer struct {
		vol *store.Volume
		err error
	}
	opened := make(chan answer, 1)
	go func() {
		vol, err := store.Open(v.Dir, store.Options{Capacity: v.Capacity, FloorBytes: v.Floor, Log: a.log})
		opened <- answer{vol, err}
	}()
	var x answer
	limit := time.NewTimer(openLimit)
	defer limit.Stop()
	select {
	case x = <-opened:
	case <-limit.C:
		x.err = fmt.Errorf("the disk of %s does not answer", v.Dir)
	case <-ctx.Done():
		x.err = ctx.Err()
	}
	if x.err != nil {
		a.hw.health.Set(health.VolumeFailed, v.Dir, x.err.Error())
		if x.vol == nil {
			go func() {
				if late := <-opened; late.vol != nil {
					_ = late.vol.Close() // nothing was written
				}
			}()
		}
	}
	return x.vol, x.err
}

// feel tells the registry of warnings how the agent's own parts are; it is
// called with each sample.
func (a *Agent) feel() {
	_, sure := a.clock.Read()
	a.hw.health.Is(health.ClockUntrusted, "", sure != wire.ClockTrusted, "nobody has told this device the time since it started")
	a.hw.health.Is(health.CoordinatorRefuses, "", a.dismissed.Load(), "the coordinator has sent this device away")
}

// feelVolumes does so of the volumes, and learns how much room there is.
func (a *Agent) feelVolumes() {
	for _, s := range a.measure() {
		a.hw.health.Is(health.VolumeFailed, s.Dir, s.ReadOnly != "", s.ReadOnly)
	}
}

// measure asks each volume for its figures. One whose disk hangs is left out, and
// is the disk's warning.
func (a *Agent) measure() []store.Stats {
	var all []store.Stats
	var capacity, used int64
	for _, v := range a.chunks.Volumes() {
		s, ok := hw.Within(context.Background(), statLimit, "volume "+v.Dir(), v.Stats)
		if !ok {
			a.hw.health.Set(health.VolumeFailed, v.Dir(), "its disk does not answer")
			continue
		}
		all = append(all, s)
		used += s.Used
		capacity += s.Used
		if s.ReadOnly == "" {
			capacity += s.Free
		}
	}
	a.places.mu.Lock()
	defer a.places.mu.Unlock()
	a.places.capacity, a.places.used = capacity, used
	return all
}

// room is how much may hold chunks, used included, and how much does, as
// measured with the newest sample: who asks must not wait for a disk.
func (a *Agent) room() (capacity, used int64) {
	a.places.mu.Lock()
	defer a.places.mu.Unlock()
	return a.places.capacity, a.places.used
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
