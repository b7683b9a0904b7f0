package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// seenFile in the state folder names the volumes that the device has had open.
// One of them that is not there now is away, not lost: its disk may be slow, or
// out, and come back with all its chunks. It counts as away until
//
//   - it is opened again, wherever its disk is mounted then;
//   - another volume is in its place: somebody has put another disk there, or
//     begun anew;
//   - it has been away for [awayLimit], by a clock that is trusted.
//
// After that what was on it is lost, and the device says so.
const seenFile = "volumes.seen"

// awayLimit is as long as hw/health remembers a disk that held chunks.
const awayLimit = 30 * 24 * time.Hour

const maxSeen = 64 // volumes; the one that was seen last the longest ago goes

// seenVolume is a volume that was open.
type seenVolume struct {
	ID   string    `json:"id"`
	Dir  string    `json:"dir"`
	Seen time.Time `json:"seen"` // the newest time that was noted, a day late at most
}

// seen is the content of seenFile.
type seen struct {
	mu   sync.Mutex
	path string
	all  []seenVolume
	away string // for who asks, see Agent.awayNow
}

// openSeen reads what an earlier life noted. A damaged file is one that is not
// there: at worst a device calls lost what is away.
func openSeen(path string) (*seen, error) {
	s := &seen{path: path}
	raw, err := durable.ReadFile(path, maxConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the list of this device's volumes cannot be read: %w", err)
	}
	if json.Unmarshal(raw, &s.all) != nil {
		s.all = nil
	}
	return s, nil
}

// note takes in which volumes are open (id → folder), and writes that down where
// it says something new. sure tells whether now can be trusted.
func (s *seen) note(open map[string]string, now time.Time, sure bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := false
	taken := make(map[string]bool)
	for id, dir := range open {
		taken[dir] = true
		i := slices.IndexFunc(s.all, func(v seenVolume) bool { return v.ID == id })
		if i < 0 {
			s.all = append(s.all, seenVolume{ID: id, Dir: dir, Seen: now.UTC()})
			changed = true
			continue
		}
		if v := &s.all[i]; v.Dir != dir || now.Sub(v.Seen).Abs() >= 24*time.Hour {
			v.Dir, v.Seen, changed = dir, now.UTC(), true
		}
	}
	before := len(s.all)
	s.all = slices.DeleteFunc(s.all, func(v seenVolume) bool {
		return open[v.ID] == "" && (taken[v.Dir] || sure && now.Sub(v.Seen) > awayLimit)
	})
	slices.SortStableFunc(s.all, func(a, b seenVolume) int { return a.Seen.Compare(b.Seen) })
	s.all = s.all[max(0, len(s.all)-maxSeen):]
	var names []string
	for _, v := range s.all {
		if open[v.ID] == "" {
			names = append(names, fmt.Sprintf("%s of %s", v.ID, v.Dir))
		}
	}
	s.away = strings.Join(names, ", ")
	if !changed && len(s.all) == before {
		return nil
	}
	raw, err := json.Marshal(s.all)
	if err == nil {
		err = durable.WriteFile(s.path, raw, 0o600)
	}
	return err
}

// awayNow names the volumes that are away; "" if none is.
func (a *Agent) awayNow() string {
	s := a.places.seen
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.away
}

// noteSeen is called whenever a volume has come, and with each sample.
func (a *Agent) noteSeen() {
	open := make(map[string]string)
	for _, v := range a.chunks.Volumes() {
		open[v.ID()] = v.Dir()
	}
	now, sure := time.Now(), wire.ClockUnknown
	if a.clock != nil {
		now, sure = a.clock.Read()
	}
	if err := a.places.seen.note(open, now, sure == wire.ClockTrusted); err != nil {
		a.log.Debug("the list of this device's volumes cannot be saved", "error", err)
	}
}
