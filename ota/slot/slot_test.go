package slot

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// device is a store that runs version 1.0.0 in slot a.
func device(t *testing.T) *Store {
	t.Helper()
	s := open(t)
	factory := filepath.Join(t.TempDir(), "factory")
	must(t, os.WriteFile(factory, []byte("agent 1.0.0"), 0o755))
	must(t, s.InstallFactory(A, factory, "1.0.0", ""))
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func load(t *testing.T, s *Store) State {
	t.Helper()
	st, err := s.Load()
	must(t, err)
	return st
}

func stage(t *testing.T, s *Store, order, version string) Name {
	t.Helper()
	n, err := s.BeginInstall(order, "1.0.0")
	must(t, err)
	must(t, os.WriteFile(s.StagedPath(n), []byte("agent "+version), 0o755))
	return n
}

func trial(t *testing.T, s *Store, order, version string) Name {
	t.Helper()
	n := stage(t, s, order, version)
	must(t, s.MarkTrial(order, Image{Version: version}))
	return n
}

func TestNewDeviceHasNoSlotYet(t *testing.T) {
	if st := load(t, open(t)); st.Current != "" || st.Warning != "" {
		t.Errorf("%+v", st)
	}
}

func TestConfirmedTrialBecomesCurrent(t *testing.T) {
	s := device(t)
	trial(t, s, "o1", "2.0.0")
	if _, err := s.StartTry(); err != nil {
		t.Fatal(err)
	}
	must(t, s.Confirm(B))
	must(t, s.Confirm(B)) // again does nothing
	st := load(t, s)
	want := Outcome{Order: "o1", From: "1.0.0", To: "2.0.0", Slot: B, Result: Confirmed}
	if st.Current != B || st.Version() != "2.0.0" || st.Trial != nil || *st.Last != want {
		t.Errorf("%+v, last %+v", st, st.Last)
	}
}

func TestCurrentSlotIsNeverWritten(t *testing.T) {
	s := device(t)
	for i, order := range []string{"o1", "o2", "o3"} {
		before := load(t, s)
		content, err := os.ReadFile(s.Path(before.Current))
		must(t, err)
		if n := trial(t, s, order, "2.0."+order[1:]); n == before.Current {
			t.Fatalf("install %d went into the current slot", i)
		}
		after, err := os.ReadFile(s.Path(before.Current))
		must(t, err)
		if !bytes.Equal(content, after) || load(t, s).Current != before.Current {
			t.Fatalf("install %d changed the current slot", i)
		}
		_, err = s.StartTry()
		must(t, err)
		must(t, s.Confirm(before.Current.Other()))
	}
}

func TestTryIsPaidBeforeItStarts(t *testing.T) {
	s := device(t)
	trial(t, s, "o1", "2.0.0")
	for left := Tries - 1; left >= 0; left-- {
		_, err := s.StartTry()
		must(t, err)
		if st := load(t, s); st.Trial.Tries != left {
			t.Fatalf("%d tries left on disk, want %d", st.Trial.Tries, left)
		}
		_, err = s.FailTry(B, "it crashed", true)
		must(t, err)
	}
	if _, err := s.StartTry(); !errors.Is(err, ErrNoTrial) {
		t.Errorf("a fourth try: %v", err)
	}
	if st := load(t, s); st.Trial.Interrupted != 0 || st.Trial.Failed != Tries || st.Trial.Crashed != Tries {
		t.Errorf("%+v", st.Trial)
	}
}

// TestPowerCutsAndCrashesHavePursesOfTheirOwn, and both have a bottom.
func TestPowerCutsAndCrashesHavePursesOfTheirOwn(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	for range 50 {
		s := device(t)
		trial(t, s, "o1", "2.0.0")
		cuts, crashes, starts := 0, 0, 0
		for {
			if _, err := s.StartTry(); errors.Is(err, ErrNoTrial) {
				break
			} else {
				must(t, err)
			}
			if starts++; starts > Tries+Interruptions {
				t.Fatal("it is tried for ever")
			}
			if rng.IntN(2) == 0 {
				cuts++ // nobody sees its end
				continue
			}
			crashes++
			_, err := s.FailTry(B, "it crashed", true)
			must(t, err)
		}
		if crashes != Tries && cuts != Interruptions+1 {
			t.Errorf("given up after %d crashes and %d cuts", crashes, cuts)
		}
		st := load(t, s)
		if !st.Trial.Spent() || st.Trial.Failed != crashes {
			t.Errorf("%+v after %d crashes and %d cuts", st.Trial, crashes, cuts)
		}
	}
}

// TestNothingHappensThatIsNotInTheTable brings a store to each phase and lets each
// event happen there.
func TestNothingHappensThatIsNotInTheTable(t *testing.T) {
	bring := map[Phase]func(t *testing.T, s *Store){
		Idle:      func(*testing.T, *Store) {},
		Verified:  func(t *testing.T, s *Store) { stage(t, s, "o1", "2.0.0") },
		Installed: func(t *testing.T, s *Store) { trial(t, s, "o1", "2.0.0") },
		Testing: func(t *testing.T, s *Store) {
			trial(t, s, "o1", "2.0.0")
			_, err := s.StartTry()
			must(t, err)
		},
	}
	factory := filepath.Join(t.TempDir(), "factory")
	must(t, os.WriteFile(factory, []byte("agent 1.0.0"), 0o755))
	events := map[Event]func(s *Store) error{
		Begun:     func(s *Store) error { _, err := s.BeginInstall("o1", "1.0.0"); return err },
		Marked:    func(s *Store) error { return s.MarkTrial("o1", Image{Version: "2.0.0"}) },
		Started:   func(s *Store) error { _, err := s.StartTry(); return err },
		Failed:    func(s *Store) error { return did(s.FailTry(B, "r", false)) },
		Stopped:   func(s *Store) error { return did(s.StopTry(B)) },
		Kept:      func(s *Store) error { return s.Confirm(B) },
		GoneBack:  func(s *Store) error { _, err := s.RollBack("r"); return err },
		Repaired:  func(s *Store) error { return s.InstallFactory(A, factory, "1.0.0", "r") },
		Forgotten: func(s *Store) error { return s.Forget() },
	}
	for event := range Table {
		switch do, known := events[event]; {
		case known:
			for phase, come := range bring {
				t.Run(string(event)+" when "+string(phase), func(t *testing.T) {
					s := device(t)
					come(t, s)
					if got := load(t, s).Phase(); got != phase {
						t.Fatalf("it is %s", got)
					}
					if phase == Verified { // whole, so that only the table can refuse
						must(t, os.WriteFile(s.StagedPath(B), []byte("agent 2.0.0"), 0o755))
					}
					before := load(t, s)
					err := do(s)
					after := load(t, s)
					to, allowed := Table[event][phase]
					switch {
					case allowed && (err != nil || after.Phase() != to):
						t.Errorf("it is %s, %v; want %s", after.Phase(), err, to)
					case !allowed && err == nil:
						t.Errorf("nothing refuses it; it is %s", after.Phase())
					case !allowed && !reflect.DeepEqual(before, after):
						t.Errorf("it was refused, and changed %+v to %+v", before, after)
					}
				})
			}
		case event == Remembered, Table[event][Idle] == Waiting, event == Allowed, event == Held, event == Fetched, event == Refetched, event == GivenUp: // not of slots
		default:
			t.Errorf("nobody lets %q happen", event)
		}
	}
}

func did(yes bool, err error) error {
	if err == nil && !yes {
		err = ErrNoTrial
	}
	return err
}

// TestAChangeThatIsNotInTheTableIsNotWritten, whatever the method believes.
func TestAChangeThatIsNotInTheTableIsNotWritten(t *testing.T) {
	s := device(t)
	trial(t, s, "o1", "2.0.0")
	before := load(t, s)
	if err := s.update(Kept, func(st *State) error { st.Trial = nil; return nil }); !errors.Is(err, ErrTransition) {
		t.Errorf("confirmed without a try: %v", err)
	}
	if err := s.update(Started, func(*State) error { return nil }); !errors.Is(err, ErrTransition) {
		t.Errorf("started, and leads nowhere: %v", err)
	}
	if after := load(t, s); !reflect.DeepEqual(before, after) {
		t.Errorf("%+v became %+v", before, after)
	}
}

func TestGivenUpTryCannotBeConfirmed(t *testing.T) {
	s := device(t)
	trial(t, s, "o1", "2.0.0")
	if err := s.Confirm(B); !errors.Is(err, ErrNoTrial) {
		t.Errorf("confirmed before it was started: %v", err)
	}
	_, err := s.StartTry()
	must(t, err)
	if tried, err := s.FailTry(B, "it hangs", false); !tried || err != nil {
		t.Fatal(tried, err)
	}
	if err := s.Confirm(B); !errors.Is(err, ErrNoTrial) {
		t.Errorf("confirmed after the launcher gave it up: %v", err)
	}
	_, err = s.RollBack("enough")
	must(t, err)
	if err := s.Confirm(B); !errors.Is(err, ErrNoTrial) {
		t.Errorf("confirmed after the roll-back: %v", err)
	}
	if st := load(t, s); st.Current != A || st.Last.Result != RolledBack || st.Last.Reason != "enough" {
		t.Errorf("%+v", st)
	}
}

func TestConfirmedTryCannotBeGivenUp(t *testing.T) {
	s := device(t)
	trial(t, s, "o1", "2.0.0")
	_, err := s.StartTry()
	must(t, err)
	must(t, s.Confirm(B))
	if tried, err := s.FailTry(B, "too late", false); tried || err != nil {
		t.Errorf("%v, %v", tried, err)
	}
}

func TestNothingInstallsDuringTrial(t *testing.T) {
	s := device(t)
	trial(t, s, "o1", "2.0.0")
	if _, err := s.BeginInstall("o2", "1.0.0"); !errors.Is(err, ErrBusy) {
		t.Errorf("%v, want ErrBusy", err)
	}
	if got, _ := os.ReadFile(s.Path(B)); string(got) != "agent 2.0.0" {
		t.Errorf("slot b holds %q", got)
	}
}

func TestTrialNeedsItsOwnInstall(t *testing.T) {
	s := device(t)
	if err := s.MarkTrial("o1", Image{}); !errors.Is(err, ErrNotInstalling) {
		t.Errorf("without an install: %v", err)
	}
	stage(t, s, "o1", "2.0.0")
	if err := s.MarkTrial("o2", Image{}); !errors.Is(err, ErrNotInstalling) {
		t.Errorf("for another order: %v", err)
	}
	if err := s.MarkTrial("o1", Image{SHA256: strings.Repeat("0", 64)}); err == nil {
		t.Error("a file with another digest went on trial")
	}
	if st := load(t, s); st.Trial != nil {
		t.Errorf("%+v", st.Trial)
	}
}

func TestInstallClearsWhatEarlierOnesLeft(t *testing.T) {
	s := device(t)
	left := filepath.Join(filepath.Dir(s.Path(B)), ".deimos-agent.new1234")
	must(t, os.WriteFile(left, nil, 0o644))
	stage(t, s, "o1", "2.0.0")
	if exists(left) {
		t.Error("it is still there")
	}
}

func TestDamagedFileIsFound(t *testing.T) {
	s := device(t)
	must(t, s.Check(load(t, s), A))
	must(t, os.WriteFile(s.Path(A), []byte("agent 1.0.1"), 0o755))
	if err := s.Check(load(t, s), A); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("%v", err)
	}
	must(t, os.Chmod(s.Path(A), 0o644))
	if err := s.Check(load(t, s), A); err == nil || !strings.Contains(err.Error(), "not executable") {
		t.Errorf("%v", err)
	}
	if err := s.Check(load(t, s), B); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("%v", err)
	}
}

// TestEveryDamagedStateFallsBackToTheOneBefore damages each byte of the state
// file in turn, and cuts it at each length.
func TestEveryDamagedStateFallsBackToTheOneBefore(t *testing.T) {
	s := device(t)
	before := load(t, s)
	must(t, s.update(Remembered, func(st *State) error { st.Last = &Outcome{Order: "newer"}; return nil }))
	path := filepath.Join(s.dir, stateFile)
	whole, err := os.ReadFile(path)
	must(t, err)
	check := func(what string, i int, raw []byte) {
		t.Helper()
		must(t, os.WriteFile(path, raw, 0o644))
		st := load(t, s)
		if st.Last != nil && st.Last.Order == "newer" && st.Generation == before.Generation+1 {
			return // the damage is in white space, or the like
		}
		warning := st.Warning
		st.Warning = ""
		if !reflect.DeepEqual(st, before) || warning == "" {
			t.Fatalf("%s %d: %+v, warning %q", what, i, st, warning)
		}
	}
	for i := range whole {
		raw := bytes.Clone(whole)
		raw[i] ^= byte(1 + rand.N(255))
		check("byte", i, raw)
		check("cut", i, whole[:i])
	}
	must(t, os.WriteFile(path, []byte("damaged"), 0o644))
	must(t, s.update(Remembered, func(*State) error { return nil }))
	if st, err := readState(filepath.Join(s.dir, prevFile)); err != nil || st.Generation != before.Generation {
		t.Errorf("a damaged state replaced the one before: %+v, %v", st, err)
	}
}

func TestBothStatesDamagedStartsSlotAAndSaysSo(t *testing.T) {
	s := device(t)
	trial(t, s, "o1", "2.0.0")
	for _, f := range []string{stateFile, prevFile} {
		must(t, os.WriteFile(filepath.Join(s.dir, f), []byte("damaged"), 0o644))
	}
	if st := load(t, s); st.Current != A || st.Trial != nil || !strings.Contains(st.Warning, "lost") {
		t.Errorf("%+v", st)
	}
}

func TestNoGenerationNamesTheInstallTarget(t *testing.T) {
	s := device(t)
	trial(t, s, "o1", "2.0.0")
	_, err := s.StartTry()
	must(t, err)
	must(t, s.Confirm(B)) // the generation before still names a
	target := stage(t, s, "o2", "3.0.0")
	for _, f := range []string{stateFile, prevFile} {
		st, err := readState(filepath.Join(s.dir, f))
		must(t, err)
		if st.Current == target || st.Trial != nil {
			t.Errorf("%s would start slot %s, into which is being installed", f, target)
		}
	}
}

// TestRandomHistories drives agent and launcher through random steps, with
// damage to the newest generation in between, and checks what always holds.
func TestRandomHistories(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	s := device(t)
	must(t, s.update(Remembered, func(*State) error { return nil })) // two generations
	for i := range 300 {
		before := load(t, s)
		content, err := os.ReadFile(s.Path(before.Current))
		must(t, err)
		step := rng.IntN(8)
		switch step {
		case 0:
			_, err = s.BeginInstall("o", "v")
		case 1:
			if before.Installing != nil {
				must(t, os.WriteFile(s.StagedPath(before.Installing.Slot), []byte{byte(i)}, 0o755))
			}
			err = s.MarkTrial("o", Image{Version: "v"})
		case 2:
			_, err = s.StartTry()
		case 3:
			_, err = s.FailTry(B, "r", false)
		case 4:
			_, err = s.StopTry(B)
		case 5:
			err = s.Confirm(before.Current.Other())
		case 6:
			_, err = s.RollBack("r")
		case 7:
			must(t, os.WriteFile(filepath.Join(s.dir, stateFile), []byte{byte(i)}, 0o644))
		}
		if err != nil && !errors.Is(err, ErrBusy) && !errors.Is(err, ErrNoTrial) && !errors.Is(err, ErrNotInstalling) {
			t.Fatalf("step %d (%d): %v", i, step, err)
		}
		after := load(t, s)
		if now, err := os.ReadFile(s.Path(before.Current)); err != nil || !bytes.Equal(now, content) {
			t.Fatalf("step %d (%d) wrote to the current slot (%v)", i, step, err)
		}
		if after.Current != before.Current && step != 5 && step != 7 {
			t.Fatalf("step %d (%d) changed the current slot", i, step)
		}
		if err := s.Check(after, after.Current); err != nil {
			t.Fatalf("step %d (%d): the current slot does not start: %v", i, step, err)
		}
	}
}

func TestAskIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent")
	must(t, os.WriteFile(path, []byte("#!/bin/sh\nyes '{'\n"), 0o755))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if about, err := Ask(ctx, path); err == nil {
		t.Errorf("an endless answer gave %+v", about)
	}
	must(t, os.WriteFile(path, []byte("#!/bin/sh\necho boom >&2; exit 3\n"), 0o755))
	if _, err := Ask(t.Context(), path); err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("%v does not say why", err)
	}
	must(t, os.WriteFile(path, []byte("#!/bin/sh\n[ \"$*\" = 'version -o json' ] && echo '{\"version\":\"1.2.3\",\"os\":\"linux\",\"arch\":\"arm64\"}'\n"), 0o755))
	if about, err := Ask(t.Context(), path); err != nil || about != (About{"1.2.3", "linux", "arm64"}) {
		t.Errorf("%+v, %v", about, err)
	}
}

// TestForgottenOrdersAreInNeitherGeneration, and what is on trial stays so.
func TestForgottenOrdersAreInNeitherGeneration(t *testing.T) {
	for name, histories := range map[string]func(s *Store){
		"none":       func(*Store) {},
		"installing": func(s *Store) { stage(t, s, "secret", "2.0.0") },
		"on trial":   func(s *Store) { trial(t, s, "secret", "2.0.0") },
		"rolled back": func(s *Store) {
			trial(t, s, "secret", "2.0.0")
			_, err := s.RollBack("it did not come up")
			must(t, err)
		},
	} {
		s := device(t)
		histories(s)
		before := load(t, s)
		must(t, s.Forget())
		for _, file := range []string{stateFile, prevFile} {
			raw, err := os.ReadFile(filepath.Join(s.dir, file))
			if err != nil || strings.Contains(string(raw), "secret") {
				t.Errorf("%s: %s %v", name, raw, err)
			}
		}
		after := load(t, s)
		if after.Current != before.Current || (after.Trial == nil) != (before.Trial == nil) || after.Last != nil {
			t.Errorf("%s: %+v", name, after)
		}
	}
	s := open(t)
	must(t, s.Forget())
	if st := load(t, s); st.Generation != 0 {
		t.Errorf("a new device remembers %+v", st)
	}
}
