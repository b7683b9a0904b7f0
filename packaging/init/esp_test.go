package main

import (
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"

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
	go m.prepareDisks(t.Context())
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
	go m.prepareDisks(t.Context())
	select {
	case <-m.again:
	case <-time.After(20 * time.Second):
		t.Errorf("no restart: %q", s.lines)
	}
	if m.inMemory || s.count("a disk does not answer") != 1 {
		t.Errorf("in memory: %v; %q", m.inMemory, s.lines)
	}
}
