package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/packaging/init/gpt"
)

func TestWhereTheESPIsThereAndCannotBeMountedNoDataPartitionIsMade(t *testing.T) {
	boot, image := diskOf(t, 600<<20)
	empty, _ := diskOf(t, 600<<20)
	table := gpt.New(newGUID())
	_, err := table.Append(64<<20, gpt.EFISystem, gpt.GUID{2}, espName, 1<<20)
	f, open := os.OpenFile(image, os.O_RDWR, 0)
	if err := errors.Join(err, open); err != nil {
		t.Fatal(err)
	}
	_, mbr := f.WriteAt(gpt.ProtectiveMBR(600<<20), 0)
	if err := errors.Join(mbr, table.Write(f, 600<<20), f.Close(), dropCaches()); err != nil {
		t.Fatal(err)
	}
	m, s, _ := diskMachine(t)
	seen := at(&dataDisk{}, boot, empty)
	m.diskNames = func() []string { return []string{boot, empty} }
	m.trial = m.newTrial()
	prepares(t, m)
	s.await(t, "preparing the data partition failed", 1)
	if p, ok := seen.find(""); ok {
		t.Errorf("another identity was begun on %s", p.path)
	}
}

func TestOwnersFileOfALostESPIsKeptWithoutUEFIsVariables(t *testing.T) {
	const owner = "[jobs]\nenabled = false\n"
	m := &machine{root: t.TempDir(), log: slog.New(slog.DiscardHandler), data: "/dev/x", settle: time.Millisecond}
	write(t, m.path(lastConfig), owner)
	write(t, m.path(hadESP), "")
	m.configure()
	if got := readWord(m.path("run/deimos/deimos.toml")); got+"\n" != owner {
		t.Errorf("the agent gets %q", got)
	}
	if got := readWord(m.path(lastConfig)); got+"\n" != owner {
		t.Errorf("kept: %q", got)
	}
}

func TestMachineWhoseOnlyDiskNeverAnswersIsStartedAnew(t *testing.T) {
	m, s, plug := diskMachine(t)
	hang := make(chan struct{})
	defer close(hang)
	plug("a")
	m.readDisk = func(string) (blockDevice, error) { <-hang; return blockDevice{}, os.ErrClosed }
	m.lookLimit, m.hangLimit = 20*time.Millisecond, 100*time.Millisecond
	m.trial = m.newTrial()
	prepares(t, m)
	select {
	case <-m.again:
	case <-time.After(patience):
		t.Errorf("no restart: %q", s.lines)
	}
	if m.inMemory || s.count("a disk does not answer") != 1 {
		t.Errorf("in memory: %v; %q", m.inMemory, s.lines)
	}
}

func TestAnESPThatShowsUpAfterTheDataPutsTheFirmwareOnTrialAfterAll(t *testing.T) {
	boot, image := diskOf(t, 600<<20)
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	table := gpt.New(newGUID())
	_, esp := table.Append(64<<20, gpt.EFISystem, gpt.GUID{2}, espName, 1<<20)
	_, mbr := f.WriteAt(gpt.ProtectiveMBR(600<<20), 0)
	if err := errors.Join(esp, mbr, table.Write(f, 600<<20), f.Close(), dropCaches()); err != nil {
		t.Fatal(err)
	}
	m, s, plug := diskMachine(t)
	m.mount = func(partition, string, uintptr) error { return nil } // its files are there already
	for _, name := range onTrial {
		write(t, m.path("efi", firmware.Folder, name), name)
	}
	write(t, m.path("etc/deimos-release"), "2.0.0\n")
	if err := os.Mkdir(m.path("data"), 0o700); err != nil {
		t.Fatal(err)
	}
	m.data, m.params.confirm = "/dev/x", time.Millisecond
	m.trial = m.newTrial()
	m.trial.begin()
	m.trial.watch(t.Context()) // without an ESP nobody can tell
	counted := false           // before it is given up, which would pay, too: it may not come so far
	m.trial.ask(func(context.Context) bool {
		counted = exists(m.path("efi", firmware.Folder, "deimos_2.0.0+1-2.efi"))
		return true
	})
	data := &dataDisk{log: m.log, disks: (&diskLooks{names: func() []string { return m.diskNames() }, look: lookAt, limit: time.Minute, log: m.log}).list}
	kick, done := make(chan struct{}, 1), make(chan struct{})
	plug(boot)
	ctx, cancel := context.WithCancel(t.Context())
	m.inMemory = true
	without := make(chan struct{})
	go func() { m.mountLateESP(ctx, data, kick); close(without) }()
	s.await(t, "has shown up", 1)
	cancel()
	<-without
	if m.esp != "" || len(kick) != 0 {
		t.Error("a device in memory could confirm the firmware")
	}
	m.inMemory = false
	go func() { m.mountLateESP(t.Context(), data, kick); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("nobody looks for it: %q", s.lines)
	}
	if len(kick) != 1 || !exists(m.path(hadESP)) {
		t.Errorf("news for the agent: %d; noted: %v", len(kick), exists(m.path(hadESP)))
	}
	if _, env := m.command(); !slices.Contains(env, firmware.Env+"="+m.path("efi")) {
		t.Errorf("the agent is told %q", env)
	}
	if !restarts(m) {
		t.Errorf("a firmware that is not confirmed stays: %q", s.lines)
	}
	if !counted {
		left, _ := os.ReadDir(m.path("efi", firmware.Folder))
		t.Errorf("this start is not counted: %v", left)
	}
}

func TestOfSeveralDevicesDisksTheESPIsMountedThatHoldsTheFirmwareElseOnlyItsDiskIsUsed(t *testing.T) {
	for _, holding := range []string{"second", "both", "none"} {
		first, second := imageDisk(t, false), imageDisk(t, true)
		s := newSaid()
		m := &machine{root: t.TempDir(), log: slog.New(slog.NewTextHandler(lineWriter(s.say), nil)), node: func(partition) error { return nil }}
		write(t, m.path("etc/deimos-release"), "2.0.0\n")
		mounted := ""
		m.mount = func(p partition, dir string, _ uintptr) error {
			mounted = p.disk.path
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			if holding == "both" || holding == "second" && mounted == second.path {
				write(t, filepath.Join(dir, firmware.Folder, "deimos_2.0.0.efi"), "")
			}
			return nil
		}
		disks := []blockDevice{first, second}
		data := &dataDisk{disks: func() []blockDevice { return disks }, log: m.log}
		if err := m.mountOneOf(t.Context(), data, nil, findESPs(disks, "")); err != nil {
			t.Fatal(err)
		}
		sure := holding == "second"
		want := map[bool]string{true: second.path, false: first.path}[sure]
		if mounted != want || data.boot != want || data.bootOnly == sure || (s.count("several devices") == 0) != sure {
			t.Errorf("held by %s: mounted %s, want %s; beside it alone: %v; %q", holding, mounted, want, data.bootOnly, s.lines)
		}
		if _, found := data.find(""); found != sure {
			t.Errorf("held by %s: data of the second is used: %v", holding, found)
		}
	}
}
