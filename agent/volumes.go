package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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
func (c Config) places(m *machine) []place {
	chosen := c.Volumes
	if len(chosen) == 0 {
		chosen = c.choose(m)
	}
	all := make([]place, len(chosen))
	for i := range chosen {
		all[i].VolumeConfig = chosen[i]
		v := &all[i]
		// A disk that hangs is not waited for; what is decided then is on the safe side.
		floor, ok := hw.Within(context.Background(), statLimit, "floor of "+v.Dir, func() int64 { return store.DefaultFloor(v.Dir) })
		if !ok {
			floor = sharedFloor
		}
		v.Floor = cmp.Or(v.Floor, floor)
		shared, ok := hw.Within(context.Background(), statLimit, "place of "+v.Dir, func() bool { return sameDisk(v.Dir, c.StateDir) })
		v.shared = shared && ok
		// With less, a device could fill itself until it cannot report.
		if v.Floor < sharedFloor && (shared || !ok) {
			m.log.Warn("the floor is raised: this volume is on the disk of the agent's own state", "volume", v.Dir, "floor_bytes", int64(sharedFloor))
			v.Floor = sharedFloor
		}
	}
	return all
}

// place is where chunks go.
type place struct {
	VolumeConfig
	shared bool // it is on the disk of the agent's state
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
func (c Config) watched(places []place) []health.Path {
	all := []health.Path{{Dir: c.StateDir}}
	for _, v := range places {
		all = append(all, health.Path{Dir: v.Dir, Floor: uint64(v.Floor)})
	}
	return all
}

// chosenFile names the folders that were ever chosen, one a line, for who resets
// the device: a disk that is away today may hold chunks, too.
const chosenFile = "volumes.chosen"

const maxChosen = 256

func (a *Agent) noteChosen(all []place) error {
	dirs, err := chosenBefore(a.cfg)
	if err != nil {
		return fmt.Errorf("the choice of disks cannot be read: %w", err)
	}
	for _, v := range all {
		if !slices.Contains(dirs, v.Dir) {
			dirs = append(dirs, v.Dir)
		}
	}
	dirs = dirs[max(0, len(dirs)-maxChosen):]
	if err := durable.WriteFile(a.cfg.path(chosenFile), []byte(strings.Join(dirs, "\n")+"\n"), 0o600); err != nil {
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
	return disk.Options{Auto: c.Disks.Auto, Use: c.Disks.Use, Never: c.Disks.Never, State: c.StateDir, Own: c.ESP != "", Board: b}
}

// volumes is the device's places for chunks, as they are now.
type volumes struct {
	tests *disk.Record
	seen  *seen
	left  []*unopened // of reopen alone, once the agent lives

	mu             sync.Mutex
	capacity, used int64 // see Agent.room
	closed         bool  // nothing is to be opened any more
}

// unopened is a volume that could not be opened, and is tried again.
type unopened struct {
	place
	late  <-chan opened // that is still opening; nil if none is
	tries int
	next  time.Time
	final bool // not before the next start
}

// opened is what has become of opening a volume.
type opened struct {
	vol *store.Volume
	err error
}

const (
	// openLimit is how long the start waits for a volume. It may take longer, as
	// the chunks of its newest log are read, or all if its index was damaged; then
	// it comes later.
	openLimit = 20 * time.Second
	statLimit = 2 * time.Second
	// reopenEvery is how often it is looked for a volume that is due, or has opened
	// after all.
	reopenEvery = time.Minute
)

// retryAfter is when a volume is tried again: soon, as a disk that was slow while
// the machine started is quick when that is over, and then each hour, as each try
// of a disk that is not trusted may be a self-test, which writes to it.
func retryAfter(tries int) time.Duration {
	first := []time.Duration{time.Minute, 5 * time.Minute, 15 * time.Minute}
	if tries < len(first) {
		return first[tries]
	}
	return time.Hour
}

// openVolumes opens what can be opened and trusted. One broken disk must not take
// the others down with it, and a device without any still has to say so, and to
// take jobs and updates. What failed is tried again, see reopen.
func (a *Agent) openVolumes(ctx context.Context) (err error) {
	if a.places.tests, err = disk.OpenRecord(a.cfg.StateDir); err != nil {
		return err
	}
	if err := a.noteChosen(a.hw.places); err != nil {
		return err
	}
	if a.places.seen, err = openSeen(a.cfg.path(seenFile)); err != nil {
		return err
	}
	a.chunks = store.NewSet()
	for _, v := range a.hw.places {
		a.open(ctx, &unopened{place: v})
	}
	if len(a.places.left) > 0 {
		a.log.Error("a volume is not available; its chunks cannot be reached until it is, and it is tried again", "volumes", len(a.places.left))
	}
	a.noteSeen()
	a.measure()
	return nil
}

// reopen tries again what could not be opened, until all is.
func (a *Agent) reopen(ctx context.Context, every time.Duration) {
	for len(a.places.left) > 0 && rest(ctx, every) == nil {
		a.openRest(ctx)
	}
}

// openRest tries again what is due: a disk that was slow at the
// start, or was put back. A folder that is on the system's disk now and was not
// then is one whose disk was taken out.
func (a *Agent) openRest(ctx context.Context) {
	left := a.places.left
	a.places.left = nil
	for _, u := range left {
		waits := u.final || time.Now().Before(u.next)
		if !waits {
			shared, ok := hw.Within(ctx, statLimit, "place of "+u.Dir, func() bool { return sameDisk(u.Dir, a.cfg.StateDir) })
			waits = !ok || shared && !u.shared
		}
		if waits && u.late == nil {
			a.places.left = append(a.places.left, u)
			continue
		}
		if vol := a.open(ctx, u); vol != nil {
			a.log.Info("a volume is available again", "volume", u.Dir)
			a.hw.health.Clear(health.DiskRefused, u.Dir)
			a.hw.health.Clear(health.VolumeFailed, u.Dir)
		}
	}
}

// open adds a volume to the chunks, or notes that it has to be tried again.
func (a *Agent) open(ctx context.Context, u *unopened) *store.Volume {
	vol, err := a.openVolume(ctx, u)
	if err == nil && a.adopt(vol) {
		return vol
	}
	if err != nil {
		a.log.Warn("a volume cannot be opened", "volume", u.Dir, "error", err)
		u.next = time.Now().Add(retryAfter(u.tries))
		u.tries++
	}
	a.places.left = append(a.places.left, u)
	return nil
}

// adopt is false if the agent ends.
func (a *Agent) adopt(vol *store.Volume) bool {
	a.places.mu.Lock()
	defer a.places.mu.Unlock()
	if a.places.closed {
		go vol.Close() // it is as one that was never opened
		return false
	}
	a.chunks.Add(vol)
	a.noteSeen()
	return true
}

// openVolume waits for openLimit. What opens after that is found the next time.
func (a *Agent) openVolume(ctx context.Context, u *unopened) (*store.Volume, error) {
	if u.late == nil {
		t, err := a.places.tests.Trusted(ctx, u.Dir, a.hw.inventory().Inventory, a.log)
		if err == nil && !t.Passed {
			// A disk that lies may pass by luck the next time.
			u.final = t.Code == disk.ProblemMismatch
			err = fmt.Errorf("the disk of %s has failed its self-test: %s", u.Dir, t.Problem)
		}
		if err != nil {
			a.hw.health.Set(health.DiskRefused, u.Dir, err.Error())
			return nil, err
		}
		late := make(chan opened, 1)
		go func() {
			vol, err := store.Open(u.Dir, store.Options{Capacity: u.Capacity, FloorBytes: u.Floor, Log: a.log})
			late <- opened{vol, err}
		}()
		u.late = late
	}
	limit := time.NewTimer(openLimit)
	defer limit.Stop()
	select {
	case x := <-u.late:
		u.late = nil
		if x.err != nil {
			a.hw.health.Set(health.VolumeFailed, u.Dir, x.err.Error())
		}
		return x.vol, x.err
	case <-limit.C:
		err := fmt.Errorf("the volume %s is not open after %s, because its disk is slow or hangs, or its damaged index is made anew (then the log says how far it is); it is waited for", u.Dir, openLimit)
		a.hw.health.Set(health.VolumeFailed, u.Dir, err.Error())
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// closeStores closes volumes and journal. A disk that hangs is not waited for:
// what was promised is on the disks already.
func (a *Agent) closeStores() error {
	a.places.mu.Lock()
	a.places.closed = true
	a.places.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		var err error
		if a.chunks != nil {
			err = a.chunks.Close()
		}
		done <- errors.Join(err, a.journal.close())
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(stopLimit):
		a.log.Error("a disk does not let itself be closed and is left", "waited", stopLimit.String())
		return nil
	}
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
	lost := 0
	for _, s := range a.measure() {
		lost += s.Lost
		a.hw.health.Is(health.VolumeFailed, s.Dir, s.ReadOnly != "", s.ReadOnly)
	}
	a.noteSeen()
	a.feelLosses(lost, a.data.Losses)
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
