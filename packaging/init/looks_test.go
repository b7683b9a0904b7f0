package main

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stick is a disk that opens as slowly as nobody writes to a FIFO: it hangs until mend
// is called, and answers then.
func stick(t *testing.T) (path string, mend func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "stick")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	mended := false
	mend = func() {
		if mended {
			return
		}
		mended = true
		image := path + ".img"
		if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 2<<20)); err != nil {
			t.Fatal(err)
		}
		w, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0) // lets go who opens it
		if err := errors.Join(os.Rename(image, path), err); err != nil {
			t.Logf("nobody hung: %v", err)
			return
		}
		w.Close()
	}
	t.Cleanup(mend)
	return path, mend
}

func TestADiskThatDoesNotAnswerIsLeftOutSaidOnceAndSeenWhenItAnswers(t *testing.T) {
	bad, mend := stick(t)
	good := filepath.Join(t.TempDir(), "good")
	if err := errors.Join(os.WriteFile(good, nil, 0o600), os.Truncate(good, 2<<20)); err != nil {
		t.Fatal(err)
	}
	whole, err := lookAt(good) // beforehand: what is slow here is the bad one alone
	if err != nil {
		t.Fatal(err)
	}
	s := newSaid()
	names := []string{bad, good}
	loud := 0
	var looked atomic.Int32 // also of a look that has hung until now
	l := &diskLooks{names: func() []string { return names }, limit: 5 * time.Second, loud: func([]string) { loud++ },
		log: slog.New(slog.NewTextHandler(lineWriter(s.say), nil))}
	l.look = func(name string) (blockDevice, error) {
		if name == good {
			return whole, nil
		}
		if name == bad {
			looked.Add(1)
		}
		return lookAt(name)
	}
	for range 5 {
		listed := make(chan []blockDevice, 1)
		go func() { listed <- l.list() }()
		select {
		case all := <-listed:
			if len(all) != 1 || all[0].path != good || !l.someHang() {
				t.Fatalf("%+v; hangs: %v", all, l.someHang())
			}
		case <-time.After(patience):
			t.Fatal("it is awaited again")
		}
		l.limit = time.Hour
	}
	if loud != 1 || looked.Load() != 1 || s.count("a disk does not answer") != 1 {
		t.Errorf("said loudly %d times, looked at %d times; %q", loud, looked.Load(), s.lines)
	}
	mend()
	for until := time.Now().Add(2 * time.Minute); len(l.list()) != 2; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("it answers, and is not listed: %q", s.lines)
		}
	}
	if l.someHang() || s.count("a disk answers again") != 1 {
		t.Errorf("hangs: %v; %q", l.someHang(), s.lines)
	}

	other, _ := stick(t)
	names = []string{good, other}
	l.limit = 3 * time.Second
	l.list()
	l.limit = time.Hour
	if names = []string{good}; len(l.list()) != 1 || l.someHang() {
		t.Error("a disk that is gone still hangs")
	}
}

func TestAMachineGoesOnWithoutADiskThatDoesNotAnswer(t *testing.T) {
	device, _ := diskOf(t, 600<<20)
	bad, _ := stick(t)
	m, s, _ := diskMachine(t)
	m.diskNames = func() []string { return []string{bad, device} }
	m.lookLimit, m.hangLimit = 3*time.Second, time.Millisecond
	m.esp = t.TempDir()
	m.trial = m.newTrial()
	done := make(chan struct{})
	go func() { m.prepareDisks(t.Context()); close(done) }()
	select {
	case <-done:
	case why := <-m.again:
		t.Fatalf("it is started anew: %s; %q", why, s.lines)
	case <-time.After(patience):
		t.Fatalf("it does not go on: %q", s.lines)
	}
	if m.data == "" || m.inMemory || s.count("a disk does not answer") != 1 {
		t.Errorf("data on %q, in memory: %v; %q", m.data, m.inMemory, s.lines)
	}
}

func TestAMachineWhoseDataMayBeOnADiskThatDoesNotAnswerWaitsForItAndIsStartedAnew(t *testing.T) {
	for name, set := range map[string]func(m *machine){
		"a note names it": func(m *machine) {
			m.esp = t.TempDir()
			write(t, filepath.Join(m.esp, dataNote), "01020304-0000-4000-8000-000000000000\n")
		},
		"the ESP may be on it": func(*machine) {},
	} {
		t.Run(name, func(t *testing.T) {
			empty, _ := diskOf(t, 600<<20)
			bad, _ := stick(t)
			m, s, _ := diskMachine(t)
			set(m)
			m.diskNames = func() []string { return []string{bad, empty} }
			m.lookLimit, m.hangLimit = 300*time.Millisecond, 100*time.Millisecond
			m.trial = m.newTrial()
			prepares(t, m)
			select {
			case <-m.again:
			case <-time.After(patience):
				t.Fatalf("it is not started anew: %q", s.lines)
			}
			if disk, err := lookAt(empty); err != nil || disk.parted || m.inMemory {
				t.Errorf("another identity is begun: %v, %v", err, m.inMemory)
			}
		})
	}
}

func TestAMachineGoesOnWhenTheDiskThatItNeedsAnswers(t *testing.T) {
	bad, mend := stick(t)
	m, s, _ := diskMachine(t)
	m.diskNames = func() []string { return []string{bad} }
	m.lookLimit, m.hangLimit = 300*time.Millisecond, time.Minute
	m.trial = m.newTrial()
	done := make(chan struct{})
	go func() { m.prepareDisks(t.Context()); close(done) }()
	s.await(t, "preparing the data partition failed", 1)
	mend() // neither an ESP nor data is on it: a machine that has no disk
	select {
	case <-done:
	case why := <-m.again:
		t.Fatalf("it is started anew: %s; %q", why, s.lines)
	case <-time.After(patience):
		t.Fatalf("it does not go on: %q", s.lines)
	}
	if !m.inMemory {
		t.Errorf("data on %q; %q", m.data, s.lines)
	}
}
