package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/packaging/init/gpt"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func scribble(t *testing.T, path string, at, n int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{0xa5}, int(n)), at)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func uuidOf(t *testing.T, p partition) string { return string(superblock(t, p.path)[0x68:0x78]) }

func TestPartitionWhoseNoteAndSuperblockAreLostIsRepairedNotFormatted(t *testing.T) {
	for name, lost := range map[string]int64{"the superblock": 2048, "all of its front": 1 << 20} {
		t.Run(name, func(t *testing.T) {
			device, _ := diskOf(t, 600<<20)
			esp := t.TempDir()
			d, s := dataOn(t, device, esp)
			p, err := d.prepare(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := d.remember(p); err != nil {
				t.Fatal(err)
			}
			if left, _ := os.ReadDir(esp); len(left) != 1 {
				t.Errorf("beside the note, the ESP has %v", left)
			}
			uuid := uuidOf(t, p)
			wipe(t, p.path, lost)
			if err := os.Remove(filepath.Join(esp, dataNote)); err != nil {
				t.Fatal(err)
			}
			if _, err := d.prepare(t.Context()); err != nil {
				t.Errorf("%s: %v; %q", name, err, s.lines)
			} else if uuidOf(t, p) != uuid {
				t.Errorf("%s: it was formatted", name)
			}
		})
	}
}

func TestFormattingThatWasCutOffIsBegunAgain(t *testing.T) {
	device, _ := diskOf(t, 600<<20)
	d, _ := dataOn(t, device, t.TempDir())
	tool := d.tool
	d.tool = func(string) string { return "/bin/false" }
	if _, err := d.prepare(t.Context()); err == nil {
		t.Fatal("formatted by nothing")
	}
	d.tool = tool
	p, ok := d.find("")
	if !ok {
		t.Fatal("no partition was made")
	}
	scribble(t, p.path, 4096, 1<<20) // what a formatting leaves behind
	note := filepath.Join(d.esp, freshNote)
	kept, err := os.ReadFile(note)
	if err := errors.Join(err, os.Remove(note)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.prepare(t.Context()); err == nil {
		t.Error("a partition with something in it, that no note calls new, was formatted")
	}
	write(t, note, string(kept))
	if _, err := d.prepare(t.Context()); err != nil {
		t.Errorf("a new partition was not formatted: %v", err)
	}
}

func TestWithoutItsESPADeviceMakesAndFormatsNothing(t *testing.T) {
	device, _ := diskOf(t, 600<<20)
	d, _ := dataOn(t, device, "")
	d.lost = true
	if _, err := d.prepare(t.Context()); err == nil {
		t.Error("a data partition was made")
	}
	if disk, err := lookAt(device); err != nil || disk.parted {
		t.Errorf("an empty disk was written to: %v", err)
	}
	if !d.hadData() {
		t.Error("the device would run from memory, as another one")
	}
	tool := d.tool
	d.lost, d.tool = false, func(string) string { return "/bin/false" }
	_, _ = d.prepare(t.Context())
	p, ok := d.find("")
	if !ok {
		t.Fatal("no partition was made")
	}
	d.lost, d.tool = true, tool
	if _, err := d.prepare(t.Context()); err == nil {
		t.Error("an empty data partition was formatted")
	}
	if fs, err := readExt4(p.path); fs != 0 || err != nil {
		t.Errorf("a file system of %d bytes: %v", fs, err)
	}
}

func TestImageWrittenOverAnOlderOneBeginsAnew(t *testing.T) {
	device, _ := diskOf(t, 700<<20)
	image := func() {
		f, err := os.OpenFile(device, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		table := gpt.New(gpt.GUID{1})
		_, err = table.Append(64<<20, gpt.EFISystem, gpt.GUID{2}, espName, 1<<20)
		_, mbr := f.WriteAt(gpt.ProtectiveMBR(700<<20), 0)
		if err := errors.Join(err, mbr, table.Write(f, 700<<20)); err != nil {
			t.Fatal(err)
		}
		reread(f)
	}
	d, s := dataOn(t, device, "")
	d.boot = device
	first := func() string {
		image()
		d.esp = t.TempDir()
		p, err := d.prepare(t.Context())
		if err != nil {
			t.Fatalf("%v; %q", err, s.lines)
		}
		return uuidOf(t, p)
	}
	if older, newer := first(), first(); older == newer {
		t.Error("the older device is back")
	}
}

func TestDiskWithLargeBlocksIsLeftAlone(t *testing.T) {
	sys, dev := t.TempDir(), t.TempDir()
	for name, block := range map[string]string{"sda": "512", "sdb": "4096"} {
		write(t, filepath.Join(sys, "class/block", name, "queue/logical_block_size"), block+"\n")
		write(t, filepath.Join(sys, "class/block", name, "device/model"), "")
		write(t, filepath.Join(dev, name), "")
		if err := os.Truncate(filepath.Join(dev, name), 600<<20); err != nil {
			t.Fatal(err)
		}
	}
	s := newSaid()
	d := &dataDisk{log: slog.New(slog.NewTextHandler(lineWriter(s.say), nil))}
	d.disks = (&diskLooks{names: func() []string { return diskNames(sys) }, look: func(name string) (blockDevice, error) { return readDisk(sys, dev, name) }, limit: time.Minute, log: d.log}).list
	if c := d.candidates(); len(c) != 1 || filepath.Base(c[0].path) != "sda" || s.count("bytes=4096") != 1 {
		t.Errorf("%+v, %q", c, s.lines)
	}
}

func TestOfSeveralESPsTheOneWithTheFirmwareThatRunsIsTaken(t *testing.T) {
	a, b := partition{path: "a"}, partition{path: "b"}
	for holding, want := range map[string]string{"a": "a sure", "b": "b sure", "ab": "a", "": "a"} {
		p, sure := chooseESP([]partition{a, b}, func(p partition) bool { return strings.Contains(holding, p.path) })
		got := p.path
		if sure {
			got += " sure"
		}
		if got != want {
			t.Errorf("held by %q: %s", holding, got)
		}
	}
	if _, sure := chooseESP([]partition{a}, nil); !sure {
		t.Error("the only one is not sure")
	}
	for name, want := range map[string]bool{"deimos_1.2.0.efi": true, "deimos_1.2.0+2-1.efi": true, "deimos_1.2.0+3.efi.tmp": false, "deimos_1.2.01.efi": false, "deimos_1.2.0-rc1.efi": false} {
		esp := t.TempDir()
		write(t, filepath.Join(esp, "EFI/Linux", name), "")
		if holdsRelease(esp, "1.2.0") != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

// imageDisk is an image with an ESP, whose id all images share, and perhaps data.
func imageDisk(t *testing.T, data bool) blockDevice {
	t.Helper()
	table := gpt.New(newGUID())
	_, err := table.Append(64<<20, gpt.EFISystem, gpt.GUID{2}, espName, 1<<20)
	if data && err == nil {
		_, err = table.Append(600<<20, gpt.LinuxData, newGUID(), dataName, 1<<20)
	}
	if err != nil {
		t.Fatal(err)
	}
	return blockDevice{path: t.TempDir(), size: 2 << 30, block: gpt.Block, table: table, parted: true}
}

func TestWhereTheESPIsNotSureOnlyItsOwnDiskIsUsed(t *testing.T) {
	ours, other := imageDisk(t, false), imageDisk(t, true)
	if all := findESPs([]blockDevice{ours, other}, gpt.GUID{2}.String()); len(all) != 2 {
		t.Fatalf("%d ESPs", len(all))
	}
	empty := blockDevice{path: filepath.Join(t.TempDir(), "empty"), size: 1 << 30, block: gpt.Block}
	write(t, empty.path, "")
	if err := os.Truncate(empty.path, empty.size); err != nil {
		t.Fatal(err)
	}
	for _, sure := range []bool{true, false} {
		d := &dataDisk{disks: func() []blockDevice { return []blockDevice{other, ours, empty} }, boot: ours.path, bootOnly: !sure, log: slog.New(slog.DiscardHandler)}
		_, found := d.find("")
		spare := slices.ContainsFunc(d.candidates(), func(b blockDevice) bool { return b.path == empty.path })
		if found != sure || spare != sure {
			t.Errorf("sure: %v; another's data is taken: %v; an empty disk: %v", sure, found, spare)
		}
	}
}

// diskMachine has no disk until there is one.
func diskMachine(t *testing.T) (m *machine, s *said, plug func(device string)) {
	t.Helper()
	s = newSaid()
	m = &machine{root: t.TempDir(), log: slog.New(slog.NewTextHandler(lineWriter(s.say), nil)), node: ensureNode, mount: mountESP, settle: time.Millisecond, lookLimit: time.Minute, hangLimit: time.Minute, again: make(chan string, 1)}
	m.journal = newJournal(lineWriter(func(string) {}))
	var disk atomic.Pointer[string]
	m.diskNames = func() []string {
		if disk.Load() == nil {
			return nil
		}
		return []string{*disk.Load()}
	}
	m.readDisk = lookAt
	if err := errors.Join(os.Mkdir(m.path("usr"), 0o755), os.Symlink("/usr/sbin", m.path("usr/sbin"))); err != nil {
		t.Fatal(err)
	}
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { m.processes.reap(ctx, chld); close(done) }()
	t.Cleanup(func() { unmount(m.path("data")); cancel(); <-done; signal.Stop(chld) })
	return m, s, func(device string) { disk.Store(&device) }
}

// prepares has a machine prepare its disks until the test ends, and is over before its folders go.
func prepares(t *testing.T, m *machine) {
	t.Helper()
	done := make(chan struct{})
	go func() { m.prepareDisks(t.Context()); close(done) }()
	t.Cleanup(func() { await(t, done, "the end of preparing disks") })
}

func TestDeviceThatHadDataWaitsForItAndGoesOnWithIt(t *testing.T) {
	for _, name := range []string{"a note", "no ESP"} {
		t.Run(name, func(t *testing.T) {
			device, _ := diskOf(t, 600<<20)
			m, s, plug := diskMachine(t)
			esp := t.TempDir()
			d := &dataDisk{processes: &m.processes, log: m.log, esp: esp, node: ensureNode, tool: m.tool, disks: func() []blockDevice {
				b, _ := lookAt(device)
				return []blockDevice{b}
			}}
			p, err := d.prepare(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := d.remember(p); err != nil {
				t.Fatal(err)
			}
			uuid := uuidOf(t, p)
			if name == "a note" {
				m.esp = esp
			} else {
				write(t, m.path("sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"), "\x00\x00\x00\x00a\x00")
			}
			done := make(chan struct{})
			go func() { m.prepareDisks(t.Context()); close(done) }()
			s.await(t, "preparing the data partition failed", 1)
			plug(device)
			select {
			case <-done:
			case <-time.After(patience):
				t.Fatalf("it does not go on: %q", s.lines)
			}
			if m.inMemory || m.data != p.path || uuidOf(t, p) != uuid {
				t.Errorf("in memory: %v; data on %q; %q", m.inMemory, m.data, s.lines)
			}
		})
	}
}

func TestDeviceThatWaitsForItsDataStopsWhenItIsTold(t *testing.T) {
	m, s, _ := diskMachine(t)
	m.esp = t.TempDir()
	write(t, filepath.Join(m.esp, dataNote), "01020304-0000-4000-8000-000000000000\n")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { m.prepareDisks(ctx); close(done) }()
	s.await(t, "preparing the data partition failed", 1)
	cancel()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("it does not stop")
	}
	if m.inMemory {
		t.Error("it would run from memory, as another device")
	}
}

func TestMachineIsStartedAnewForFaultsOfTheDataPartitionWhichAreRepairedThen(t *testing.T) {
	device, _ := diskOf(t, 600<<20)
	d, s := dataOn(t, device, t.TempDir())
	p, err := d.prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := mountData(p, dir); err != nil {
		t.Fatal(err)
	}
	defer unmount(dir)
	faults := filepath.Join("/sys/fs/ext4", filepath.Base(p.path))
	again := make(chan string, 1)
	begun := time.Now()
	const least = 300 * time.Millisecond
	go watchFaults(t.Context(), filepath.Join(faults, "errors_count"), 10*time.Millisecond, least, func(why string) { again <- why }, d.log)
	select {
	case <-again:
		t.Fatal("without a fault")
	case <-time.After(100 * time.Millisecond):
	}
	if err := os.WriteFile(filepath.Join(faults, "trigger_fs_error"), []byte("1"), 0o200); err != nil {
		testenv.Cannot(t, "this kernel makes no faults: %v", err)
	}
	select {
	case <-again:
	case <-time.After(patience):
		t.Fatalf("the machine is not started anew: %q", s.lines)
	}
	if since := time.Since(begun); since < least {
		t.Errorf("after %s: a disk that fails at each start would keep the machine restarting", since)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err == nil {
		t.Error("the fault did not make it read-only")
	}
	unmount(dir)
	if _, err := d.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := mountData(p, dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
		t.Errorf("after the check: %v", err)
	}
}

func TestOwnersFileThatCannotBeReadIsNoMissingFile(t *testing.T) {
	const owner = "coordinator = \"https://h:1\"\n[jobs]\nenabled = false\n"
	unreadable := map[string]func(m *machine){
		"it is too long":         func(m *machine) { write(t, m.path("efi/deimos.toml"), strings.Repeat("#", maxConfig+1)) },
		"it fails to be read":    func(m *machine) { _ = os.MkdirAll(m.path("efi/deimos.toml"), 0o700) },
		"the ESP is not mounted": func(m *machine) { m.esp = "" },
	}
	for name, spoil := range unreadable {
		for _, before := range []string{"none", "", owner} {
			m := &machine{root: t.TempDir(), log: slog.New(slog.DiscardHandler), esp: "/efi", data: "/dev/x"}
			write(t, m.path("sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"), "\x00\x00\x00\x00a\x00")
			if err := os.MkdirAll(m.path("data"), 0o700); err != nil {
				t.Fatal(err)
			}
			if before != "none" { // a start that could read it, or that it was not there
				if before != "" {
					write(t, m.path("efi/deimos.toml"), before)
				}
				m.configure()
				_ = os.Remove(m.path("efi/deimos.toml"))
			}
			spoil(m)
			m.configure()
			got, err := os.ReadFile(m.path("run/deimos/deimos.toml"))
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]string{"none": noConfig, "": "", owner: owner}[before]
			if string(got) != want || m.alone != (before == "none") || m.waits() != (before == "") {
				t.Errorf("%s, before %q: the agent gets %q; alone: %v; waits: %v", name, before, got, m.alone, m.waits())
			}
		}
	}
}
