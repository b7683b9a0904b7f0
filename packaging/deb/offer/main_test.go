package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/ota/slot"
)

// device is a state folder with a current agent, and perhaps a membership.
func device(t *testing.T, version string, member bool) (state string, slots *slot.Store) {
	t.Helper()
	state = t.TempDir()
	slots, err := slot.Open(state)
	if err != nil {
		t.Fatal(err)
	}
	if version != "" {
		if err := slots.InstallFactory(slot.A, packaged(t, version), version, ""); err != nil {
			t.Fatal(err)
		}
	}
	if member {
		if err := os.MkdirAll(filepath.Join(state, "identity"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(state, "identity", "membership.json"), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return state, slots
}

// packaged is an agent that says its version.
func packaged(t *testing.T, version string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "deimos-agent")
	text := fmt.Sprintf("#!/bin/sh\necho '{\"version\":\"%s\",\"os\":\"linux\",\"arch\":\"any\"}'\n", version)
	if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

func try(t *testing.T, state, agent string, again bool, want string) {
	t.Helper()
	said, err := offer(t.Context(), state, agent, again)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(said, want) {
		t.Fatalf("it says %q, not %q", said, want)
	}
}

func load(t *testing.T, s *slot.Store) slot.State {
	t.Helper()
	st, err := s.Load()
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestNewerPackageGoesOnTrialOnce(t *testing.T) {
	state, slots := device(t, "0.1.0", true)
	newer := packaged(t, "0.1.1")
	try(t, state, newer, false, "goes on trial in slot b")
	st := load(t, slots)
	if st.Current != slot.A || st.Trial == nil || st.Trial.Version != "0.1.1" || st.Trial.Order != "" || slots.Check(st, slot.B) != nil {
		t.Fatalf("state %+v", st)
	}
	try(t, state, newer, false, "on trial; the packaged agent waits")
	if _, err := slots.RollBack("test"); err != nil {
		t.Fatal(err)
	}
	try(t, state, newer, false, "was offered before")
	if load(t, slots).Trial != nil {
		t.Error("a version that was rolled back is on trial again")
	}
	try(t, state, newer, true, "goes on trial")
}

func TestOlderOrSamePackageChangesNothing(t *testing.T) {
	state, slots := device(t, "0.10.0", true)
	before := load(t, slots).Generation
	for _, version := range []string{"0.9.9", "0.10.0", "0.10.0-rc.1"} {
		try(t, state, packaged(t, version), false, "is not newer")
	}
	if after := load(t, slots).Generation; after != before {
		t.Errorf("generation %d, was %d", after, before)
	}
}

func TestFirstStartIsTheLaunchers(t *testing.T) {
	state, slots := device(t, "", false)
	try(t, state, packaged(t, "0.1.0"), false, "first start")
	if st := load(t, slots); st.Current != "" {
		t.Errorf("state %+v", st)
	}
}

// TestStrangerTakesThePackageAtOnce: without a fleet no trial could be confirmed.
func TestStrangerTakesThePackageAtOnce(t *testing.T) {
	state, slots := device(t, "0.1.0", false)
	try(t, state, packaged(t, "0.1.1"), false, "in slot b")
	if st := load(t, slots); st.Current != slot.B || st.Trial != nil || st.Version() != "0.1.1" {
		t.Errorf("state %+v", st)
	}
}

func TestPackageThatDoesNotAnswerIsNotOffered(t *testing.T) {
	state, slots := device(t, "0.1.0", true)
	bad := filepath.Join(t.TempDir(), "deimos-agent")
	for _, text := range []string{"#!/bin/sh\nexit 1\n", "#!/bin/sh\necho '{\"version\":\"new\"}'\n"} {
		if err := os.WriteFile(bad, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if said, err := offer(t.Context(), state, bad, false); err == nil {
			t.Errorf("it says %q", said)
		}
	}
	if st := load(t, slots); st.Trial != nil || st.Installing != nil {
		t.Errorf("state %+v", st)
	}
}
