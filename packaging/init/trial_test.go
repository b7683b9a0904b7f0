package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
)

// trialOn is the watch of a machine that runs 2.0.0, with these images.
func trialOn(t *testing.T, confirm time.Duration, images ...string) (*trial, *machine) {
	t.Helper()
	root := t.TempDir()
	m := &machine{root: root, esp: filepath.Join(root, "efi"), again: make(chan string, 1), params: params{confirm: confirm},
		log: slog.New(slog.DiscardHandler)}
	if err := os.MkdirAll(m.path("efi", firmware.Folder), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range images {
		if err := os.WriteFile(m.path("efi", firmware.Folder, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(m.path("etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.path("etc/deimos-release"), []byte("2.0.0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return m.newTrial(), m
}

func restarts(m *machine) bool {
	select {
	case <-m.again:
		return true
	default:
		return false
	}
}

var (
	onTrial   = []string{"deimos_1.0.0.efi", "deimos_2.0.0+2-1.efi"}
	confirmed = []string{"deimos_1.0.0.efi", "deimos_2.0.0.efi"}
	newDevice = []string{"deimos_2.0.0+2-1.efi"}
	// None is confirmed: there is no safe one to go back to.
	noneSafe = []string{"deimos_1.0.0+0-3.efi", "deimos_2.0.0+2-1.efi"}
)

func TestOnlyAFirmwareOnTrialIsLeftWhenItsAgentDoesNotStay(t *testing.T) {
	for name, c := range map[string]struct {
		images []string
		want   bool
	}{"on trial": {onTrial, true}, "on its last try": {[]string{"deimos_1.0.0.efi", "deimos_2.0.0+0-3.efi"}, true},
		"confirmed": {confirmed, false}, "a new device": {newDevice, false}, "nothing safe": {noneSafe, false}} {
		w, m := trialOn(t, 0, c.images...)
		for range slot.Tries - 1 {
			w.ended()
		}
		if restarts(m) {
			t.Errorf("%s: restarted before the agent had its %d starts", name, slot.Tries)
		}
		said := w.ended()
		if got := restarts(m); got != c.want || said != c.want {
			t.Errorf("%s: restarted: %v, and says %v", name, got, said)
		}
	}
}

func TestOnlyAFirmwareThatIsNotConfirmedInTimeIsLeft(t *testing.T) {
	for name, c := range map[string]struct {
		images []string
		want   bool
	}{"on trial": {onTrial, true}, "confirmed": {confirmed, false}, "a new device": {newDevice, false}} {
		w, m := trialOn(t, time.Millisecond, c.images...)
		w.watch(t.Context())
		if got := restarts(m); got != c.want {
			t.Errorf("%s: restarted: %v", name, got)
		}
	}
	w, m := trialOn(t, time.Millisecond, onTrial...)
	look := w.onTrial
	w.onTrial = func() (bool, error) { // it is confirmed once the watch has begun
		w.onTrial = look
		on, err := look()
		return on, errors.Join(err, os.Rename(m.path("efi", firmware.Folder, "deimos_2.0.0+2-1.efi"), m.path("efi", firmware.Folder, "deimos_2.0.0.efi")))
	}
	if w.watch(t.Context()); restarts(m) {
		t.Error("restarted though it was confirmed in time")
	}
	if w, _ := trialOn(t, 0, onTrial...); w.within != slot.ConfirmWithin {
		t.Errorf("by itself a trial lasts %s", w.within)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w, m = trialOn(t, time.Hour, onTrial...)
	if w.watch(ctx); restarts(m) {
		t.Error("restarted by a stop")
	}
}

func TestAMachineWhoseFirmwareIsGivenUpIsRestartedNotSwitchedOff(t *testing.T) {
	w, m := trialOn(t, time.Millisecond, onTrial...)
	w.watch(t.Context())
	if how := m.awaitStop(nil); how != unix.LINUX_REBOOT_CMD_RESTART {
		t.Errorf("it goes down by %#x", how)
	}
}

func TestAgentThatAsksForAStartOfTheMachineIsNotStartedAgain(t *testing.T) {
	ended, reboots := 0, make(chan struct{}, 10)
	s, stop := supervisedBy(t, "reboot", time.Second, nil, time.Nanosecond, func(v *supervisor) {
		v.ended = func() bool { ended++; return false }
		v.reboot = func() { reboots <- struct{}{} }
	})
	<-reboots
	stop()
	if ended != 1 || s.count("agent starts") != 1 || len(reboots) != 0 {
		t.Errorf("%d ends: %q", ended, s.lines)
	}
}

func TestAgentForWhoseEndsTheMachineIsStartedAnewIsNotAnnouncedAgain(t *testing.T) {
	s, stop := supervisedBy(t, "crash", time.Second, nil, time.Nanosecond, func(v *supervisor) {
		ends := 0
		v.ended = func() bool { ends++; return ends == 3 }
	})
	s.await(t, "the machine is started anew", 1)
	stop()
	if s.count("it is started again") != 2 || s.count("agent starts") != 3 {
		t.Errorf("%q", s.lines)
	}
}

func TestConfirmTimeOfTheCommandLine(t *testing.T) {
	for line, want := range map[string]time.Duration{"deimos.confirm=60s": time.Minute, "deimos.confirm=-1s": 0, "deimos.confirm=soon": 0, "quiet": 0} {
		if got := parseCommandLine(line).confirm; got != want {
			t.Errorf("%s: %s", line, got)
		}
	}
}
