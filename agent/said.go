package agent

import (
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/jobs/policy"
)

// saidFile is beside the owner's word.
const saidFile = "said.json"

// sayings are how long ago the owner said something. A word is dated by the system's clock,
// which may be set anew by years after it, and which the agent may have reason not to
// believe. So that clock only tells how long a word has lain here when the agent first
// sees it; from then on time is that of the boot, and over boots that of the agent's clock.
type sayings struct {
	path  string
	clock *Clock
	boot  string
	up    func() time.Duration // since that boot
	log   *slog.Logger

	mu     sync.Mutex
	loaded bool
	notes  map[string]dated // by what it is about
}

type dated struct {
	ID   string        `json:"id"`
	For  time.Duration `json:"for,omitempty"`
	At   time.Time     `json:"at"` // by the agent's clock
	Boot string        `json:"boot"`
	Up   time.Duration `json:"up"` // of that boot, when it was said
}

// newSayings are those about one room, by its folder.
func newSayings(room, boot string, clock *Clock, log *slog.Logger) *sayings {
	return &sayings{path: filepath.Join(room, saidFile), clock: clock, boot: boot, up: sinceBoot, log: log}
}

func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// clockStep is by how much the agent's clock must move against the boot to be noted.
// Until it knows the time it may stand still, and each note wears the flash.
const clockStep = 10 * time.Minute

// age is how long ago the newest word about something was said; lasts is how long it is
// to last, as it was when the word was first seen.
func (s *sayings) age(about, id string, said time.Time, lasts time.Duration) (age, left time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.loaded {
		s.loaded = true
		if err := readOwn(s.path, &s.notes); err != nil {
			s.log.Warn("when the owner said what is not known any more; it counts from now on", "error", err)
		}
		if s.notes == nil {
			s.notes = map[string]dated{}
		}
	}
	now, up := s.clock.Now(), s.up()
	n, known := s.notes[about]
	was := n
	switch {
	case !known || n.ID != id:
		age = max(0, s.clock.system().Sub(said))
		n = dated{ID: id, For: lasts, At: now.Add(-age), Boot: s.boot, Up: up - age}
	case n.Boot == s.boot:
		age = up - n.Up
		if step := now.Add(-age).Sub(n.At).Abs(); step > clockStep && (n.For == 0 || age < n.For) {
			n.At = now.Add(-age) // the agent has learned the time
		}
	default:
		age = max(0, now.Sub(n.At)) // a clock that went back behind it makes it as good as new
		n.At, n.Boot, n.Up = now.Add(-age), s.boot, up-age
	}
	if n != was {
		n.At = n.At.UTC().Truncate(time.Second)
		s.notes[about] = n
		if err := writeOwn(s.path, s.notes); err != nil {
			s.log.Warn("when the owner said something cannot be noted", "error", err)
		}
	}
	return age, n.For - age
}

// paused is what the owner has said of jobs, with the end of a pause by the agent's clock.
func (s *sayings) paused(stateDir string) (policy.Word, error) {
	w, err := OwnersWord(stateDir)
	if err != nil || !w.Paused || w.Until.IsZero() || w.Said.IsZero() {
		return w, err
	}
	_, left := s.age("paused", w.Said.Format(time.RFC3339)+" "+w.Until.Format(time.RFC3339), w.Said, w.Until.Sub(w.Said))
	w.Until = s.clock.Now().Add(left)
	return w, nil
}

// deferred is how much longer updates are put off.
func (s *sayings) deferred(w UpdateWord) time.Duration {
	if w.Until.IsZero() {
		return 0
	}
	_, left := s.age("deferred", w.Until.Format(time.RFC3339), w.Said, w.Until.Sub(w.Said))
	return max(0, left)
}

// wished is how long ago the owner asked for an update.
func (s *sayings) wished(w *Wish) time.Duration {
	age, _ := s.age("install", w.ID, w.At, 0)
	return age
}
