// Package slot keeps two copies of the agent, A and B, and remembers which one
// to start. It is linked into the agent, which installs, and into the launcher,
// which starts and goes back; so it imports the standard library and
// golang.org/x/sys, nothing else.
//
// # Files
//
// All of it stands below STATE/slots:
//
//	a/deimos-agent, b/deimos-agent   the two agents, always whole (written aside, synced, renamed)
//	a/deimos-agent.new               an install in progress, in either slot; worthless after a crash
//	state.json                       the newest [State], with its SHA-256
//	state.prev.json                  the one before it
//	lock                             flock: one reader or writer of the state at a time
//	launcher.lock                    flock: one launcher at a time, for as long as it lives
//
// # States
//
//	          BeginInstall            MarkTrial                StartTry
//	settled ───────────────▶ installing ──────────▶ on trial ───────────▶ being tried
//	   ▲                                               ▲  │                  │   │
//	   │                                 tries left    └──│──── FailTry ─────┘   │
//	   ├──────────── RollBack ────────────────────────────┘                      │
//	   └──────────── Confirm ────────────────────────────────────────────────────┘
//
// The agent calls BeginInstall, MarkTrial, Confirm, Reported and Forget; the launcher everything else.
//
// # What always holds
//
//   - The current slot is never written to. It changes only when a trial is
//     confirmed, or when the file in it is found damaged ([Store.FallBack]).
//   - A try is paid for, durably, before the process starts. One that ends unseen, by a
//     power cut, say, costs none of the three that a version may fail; but only five
//     may, so that a version that takes the whole machine down with it runs out, too. An orderly stop costs nothing.
//   - What may follow on what stands in [Table]; everything else is refused.
//   - A state is on disk, file and directory synced, before a method returns.
//   - Once an install has begun, neither generation of the state names its
//     slot as the one to start: beginning is a generation of its own, and the
//     one before it has the same current slot and no trial. So not even falling
//     back to the older one can start a version that nobody has tried.
//   - Both generations damaged: slot A, and a warning that says so.
//
// Time limits of a try are the launcher's, on its monotonic clock: a device's
// wall clock may jump by decades while the new version is being tried.
//
// The same for firmware images, with the boot loader as launcher: package firmware.
package slot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Name is one of the two slots.
type Name string

// The two slots.
const (
	A Name = "a"
	B Name = "b"
)

// Other is the slot that n is not.
func (n Name) Other() Name {
	if n == A {
		return B
	}
	return A
}

// Valid tells whether n names a slot.
func (n Name) Valid() bool { return n == A || n == B }

const (
	// ExitRestart is the exit code by which an agent asks its launcher to start
	// it again at once (EX_TEMPFAIL of sysexits.h).
	ExitRestart = 75

	// ExitReboot is the exit code by which an agent asks the image's process 1 to
	// start the machine anew: a new firmware waits for its trial. Not of sysexits.h.
	ExitReboot = 79

	// Env is the environment variable that tells an agent its slot. It is
	// missing when no launcher started the agent.
	Env = "DEIMOS_SLOT"

	// EnvConfirmWithin tells an agent how long it has for its trial, if this is one, as a
	// Go duration: from the launcher on trial, from process 1 of the image always.
	EnvConfirmWithin = "DEIMOS_CONFIRM_WITHIN"

	// ConfirmWithin is how long a new version has to prove itself in one try.
	ConfirmWithin = 2 * time.Minute

	// StopWithin is what an agent allows itself for a stop in good order. Who kills
	// it before that leaves the machine's watchdog armed, and the machine is reset.
	StopWithin = 40 * time.Second

	// Tries is how often a new version may fail before it is given up.
	Tries = 3

	// Interruptions is how many tries may end unseen, as by a power cut, and be made
	// again: a version may be what takes the machine down.
	Interruptions = 5

	agentFile  = "deimos-agent"
	stagedFile = "deimos-agent.new"
)

// ErrBusy is returned when an install is asked for while a version is on trial.
var ErrBusy = errors.New("a version is on trial; wait until it is confirmed or rolled back")

// ErrNoTrial is returned by a transition that needs a version on trial.
var ErrNoTrial = errors.New("no version is on trial in this slot")

// ErrNotInstalling is returned by MarkTrial without the BeginInstall before it.
var ErrNotInstalling = errors.New("this version is not being installed")

// Image is what a slot holds.
type Image struct {
	Version string `json:"version,omitempty"` // empty if unknown
	SHA256  string `json:"sha256,omitempty"`  // of the file, lower-case hex; empty if unknown
}

// State is everything that is remembered.
type State struct {
	Generation uint64         `json:"generation"`
	Current    Name           `json:"current"` // the slot to start; empty on a device that has none yet
	Images     map[Name]Image `json:"images,omitempty"`
	Installing *Installing    `json:"installing,omitempty"`
	Trial      *Trial         `json:"trial,omitempty"`
	Last       *Outcome       `json:"last,omitempty"`
	Repair     *Repair        `json:"repair,omitempty"` // the last one

	// Warning says, in a sentence, what was lost when this state was read.
	Warning string `json:"-"`
}

// Version is the version in the current slot, empty if unknown.
func (s State) Version() string { return s.Images[s.Current].Version }

// Installing is an install that has begun.
type Installing struct {
	Order string `json:"order"`
	Slot  Name   `json:"slot"`
	From  string `json:"from"` // the version that installs
}

// Trial is a version that has not been confirmed yet.
type Trial struct {
	Order       string `json:"order"`
	Slot        Name   `json:"slot"`
	From        string `json:"from"`
	Version     string `json:"version"`
	Tries       int    `json:"tries"`                  // left
	Failed      int    `json:"failed,omitempty"`       // tries that were seen to end badly
	Crashed     int    `json:"crashed,omitempty"`      // of them, those that it ended itself, and not for want of confirmation
	Running     bool   `json:"running"`                // a try was paid for and is not known to have ended
	Interrupted int    `json:"interrupted,omitempty"`  // tries that ended unseen: power, or the launcher was killed
	Failure     string `json:"last_failure,omitempty"` // how the last seen try ended
}

// Result is how a trial ended.
type Result string

// The results.
const (
	Confirmed  Result = "confirmed"
	RolledBack Result = "rolled_back"
)

// Outcome is how the last trial ended. It stays until the next one ends, so
// that it can be reported after any crash.
type Outcome struct {
	Order  string `json:"order"`
	From   string `json:"from"`
	To     string `json:"to"`
	Slot   Name   `json:"slot"` // the slot that was on trial
	Result Result `json:"result"`
	Reason string `json:"reason,omitempty"`

	Reported bool `json:"reported,omitempty"` // whoever ordered it is told, or will be: nothing of it is to be done
}

// Repair is what the launcher did about a current slot that could not be started.
type Repair struct {
	Slot    Name   `json:"slot"` // current since then
	Version string `json:"version,omitempty"`
	Reason  string `json:"reason"`
}

// Store is the slots of one device. Its methods may be called from several
// goroutines and processes at once.
type Store struct {
	dir string // STATE/slots
}

// Open makes the directories if they are missing.
func Open(stateDir string) (*Store, error) {
	s := &Store{dir: filepath.Join(stateDir, "slots")}
	for _, n := range []Name{A, B} {
		if err := os.MkdirAll(filepath.Join(s.dir, string(n)), 0o755); err != nil {
			return nil, fmt.Errorf("cannot make the agent's slots (check the state directory): %w", err)
		}
	}
	return s, nil
}

// Path is where the agent of a slot stands.
func (s *Store) Path(n Name) string { return filepath.Join(s.dir, string(n), agentFile) }

// StagedPath is where an install into a slot is prepared.
func (s *Store) StagedPath(n Name) string { return filepath.Join(s.dir, string(n), stagedFile) }

// BeginInstall picks the slot to install into, which is never the current one.
// The new agent then goes to [Store.StagedPath], and [Store.MarkTrial] follows.
// An earlier install that did not get that far is forgotten. from is the
// version that runs, for the record.
func (s *Store) BeginInstall(order, from string) (Name, error) {
	var target Name
	err := s.update(Begun, func(st *State) error {
		if st.Trial != nil {
			return ErrBusy
		}
		target = st.Current.Other()
		st.Installing = &Installing{Order: order, Slot: target, From: from}
		return nil
	})
	if err != nil {
		return "", err
	}
	return target, s.clear(target)
}

// clear removes what earlier installs left beside the agent of a slot.
func (s *Store) clear(n Name) error {
	dir := filepath.Join(s.dir, string(n))
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("clear slot %s: %w", n, err)
	}
	for _, e := range entries {
		if e.Name() == agentFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("clear slot %s: %w", n, err)
		}
	}
	return nil
}

// MarkTrial moves the staged file into its slot and puts it on trial: from the
// next start on, the launcher tries it. The staged file must be whole, checked
// and synced. image describes it; a digest that is given must match.
func (s *Store) MarkTrial(order string, image Image) error {
	return s.update(Marked, func(st *State) error {
		in := st.Installing
		switch {
		case st.Trial != nil:
			return ErrBusy
		case in == nil || in.Order != order:
			return ErrNotInstalling
		}
		sum, err := Digest(s.StagedPath(in.Slot))
		switch {
		case err != nil:
			return fmt.Errorf("read the new agent: %w", err)
		case image.SHA256 == "":
			image.SHA256 = sum
		case image.SHA256 != sum:
			return fmt.Errorf("the new agent was damaged on its way to the disk (SHA-256 %.12s…, expected %.12s…)", sum, image.SHA256)
		}
		if err := moveIntoPlace(s.StagedPath(in.Slot), s.Path(in.Slot)); err != nil {
			return fmt.Errorf("move the new agent into slot %s: %w", in.Slot, err)
		}
		st.setImage(in.Slot, image)
		st.Trial = &Trial{Order: order, Slot: in.Slot, From: in.From, Version: image.Version, Tries: Tries}
		st.Installing = nil
		return nil
	})
}

// StartTry pays for one try, before the process is started. If the try before ended
// unseen, it is that which is paid again, of another purse.
func (s *Store) StartTry() (Trial, error) {
	var t Trial
	err := s.update(Started, func(st *State) error {
		if st.Trial == nil || st.Trial.Spent() {
			return ErrNoTrial
		}
		if st.Trial.Running {
			st.Trial.Interrupted++
		} else {
			st.Trial.Tries--
		}
		st.Trial.Running = true
		t = *st.Trial
		return nil
	})
	return t, err
}

// Spent tells whether a trial may not be tried once more.
func (t Trial) Spent() bool {
	if t.Running { // it ended unseen
		return t.Interrupted >= Interruptions
	}
	return t.Tries <= 0
}

// FailTry ends a try: from here on it can no longer be confirmed. It returns
// false, and changes nothing, if the slot is not being tried: it was confirmed.
func (s *Store) FailTry(n Name, reason string, crashed bool) (bool, error) {
	return s.endTry(Failed, n, func(t *Trial) {
		t.Failure = reason
		if t.Failed++; crashed {
			t.Crashed++
		}
	})
}

// StopTry ends a try that somebody stopped in good order, and returns its price.
// It returns false, and changes nothing, if the slot is not being tried.
func (s *Store) StopTry(n Name) (bool, error) {
	return s.endTry(Stopped, n, func(t *Trial) { t.Tries++ })
}

func (s *Store) endTry(e Event, n Name, change func(*Trial)) (bool, error) {
	err := s.update(e, func(st *State) error {
		if st.Trial == nil || st.Trial.Slot != n || !st.Trial.Running {
			return ErrNoTrial
		}
		st.Trial.Running = false
		change(st.Trial)
		return nil
	})
	if errors.Is(err, ErrNoTrial) {
		return false, nil
	}
	return err == nil, err
}

// Confirm makes the version that runs in slot n the current one. It does
// nothing if it is that already, and fails with [ErrNoTrial] if the launcher
// has given the try up.
func (s *Store) Confirm(n Name) error {
	st, err := s.Load()
	if err != nil {
		return err
	}
	if st.Current == n {
		return nil
	}
	return s.update(Kept, func(st *State) error {
		t := st.Trial
		if t == nil || t.Slot != n || !t.Running {
			return ErrNoTrial
		}
		st.end(Confirmed, "")
		st.Current = n
		return nil
	})
}

// Reported notes that the outcome of this order is told.
func (s *Store) Reported(order string) error {
	st, err := s.Load()
	if err != nil || st.Last == nil || st.Last.Order != order || st.Last.Reported {
		return err
	}
	return s.update(Remembered, func(st *State) error {
		if st.Last != nil && st.Last.Order == order {
			last := *st.Last
			last.Reported = true
			st.Last = &last
		}
		return nil
	})
}

// Forget removes, from both generations, which orders this device was given. What
// is on trial stays so, for nobody.
func (s *Store) Forget() error {
	for range 2 {
		st, err := s.Load()
		if err != nil || st.Generation == 0 { // a new device, or one that remembers nothing
			return err
		}
		err = s.update(Forgotten, func(st *State) error {
			st.Installing, st.Last = nil, nil
			if st.Trial != nil {
				t := *st.Trial
				t.Order = ""
				st.Trial = &t
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// RollBack gives the version on trial up. The current slot was never touched,
// so there is nothing to restore.
func (s *Store) RollBack(reason string) (Outcome, error) {
	var out Outcome
	err := s.update(GoneBack, func(st *State) error {
		if st.Trial == nil {
			return ErrNoTrial
		}
		out = st.end(RolledBack, reason)
		return nil
	})
	return out, err
}

// FallBack makes the other slot the current one because the file in the
// current one is damaged.
func (s *Store) FallBack(reason string) error {
	return s.update(Repaired, func(st *State) error {
		if st.Trial != nil {
			return ErrBusy
		}
		st.Current, st.Installing = st.Current.Other(), nil
		st.Repair = &Repair{Slot: st.Current, Version: st.Version(), Reason: reason}
		return nil
	})
}

// InstallFactory copies the agent that the device was shipped with into a slot
// and makes it the current one: at the first start, with an empty reason, and
// when nothing else is left.
func (s *Store) InstallFactory(n Name, path, version, reason string) error {
	return s.update(Repaired, func(st *State) error {
		if st.Trial != nil {
			return ErrBusy
		}
		sum, err := copyDurably(path, s.StagedPath(n))
		if err != nil {
			return fmt.Errorf("copy the factory agent: %w", err)
		}
		if err := moveIntoPlace(s.StagedPath(n), s.Path(n)); err != nil {
			return fmt.Errorf("move the factory agent into slot %s: %w", n, err)
		}
		st.setImage(n, Image{Version: version, SHA256: sum})
		st.Current, st.Installing = n, nil
		if reason != "" {
			st.Repair = &Repair{Slot: n, Version: version, Reason: reason}
		}
		return nil
	})
}

// Check tells, as an error, what is wrong with the file in a slot: missing, not
// executable, or not the bytes that were installed.
func (s *Store) Check(st State, n Name) error {
	fi, err := os.Stat(s.Path(n))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("slot %s is empty", n)
	case err != nil:
		return err
	case !fi.Mode().IsRegular() || fi.Mode().Perm()&0o111 == 0:
		return fmt.Errorf("the file in slot %s is not executable", n)
	}
	want := st.Images[n].SHA256
	if want == "" {
		return nil
	}
	got, err := Digest(s.Path(n))
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("the file in slot %s is damaged (SHA-256 %.12s…, installed was %.12s…)", n, got, want)
	}
	return nil
}

func (st *State) setImage(n Name, image Image) {
	images := map[Name]Image{n: image}
	if other, ok := st.Images[n.Other()]; ok {
		images[n.Other()] = other
	}
	st.Images = images
}

// end closes the trial.
func (st *State) end(r Result, reason string) Outcome {
	t := st.Trial
	out := Outcome{Order: t.Order, From: t.From, To: t.Version, Slot: t.Slot, Result: r, Reason: reason}
	st.Last, st.Trial = &out, nil
	return out
}
