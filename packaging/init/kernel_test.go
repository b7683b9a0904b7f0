package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKernelsWarningsAreNotedAndNotWithoutEnd reads records as from /dev/kmsg: one a read.
func TestKernelsWarningsAreNotedAndNotWithoutEnd(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	kernel, ours := os.NewFile(uintptr(pair[0]), "kernel"), os.NewFile(uintptr(pair[1]), "kmsg")
	defer kernel.Close()
	s := newSaid()
	s.news = make(chan struct{}, 10*kernelBurst)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	each := make(chan struct{})
	k := &kernelLog{note: s.say, each: 300 * time.Millisecond}
	go func() { close(each); ended <- k.follow(ctx, ours) }()
	<-each
	says := func(record string) {
		t.Helper()
		if _, err := kernel.Write([]byte(record)); err != nil {
			t.Fatal(err)
		}
	}
	says("3,339,5140900,-;EXT4-fs error (device vda2): bad block\n SUBSYSTEM=block\n DEVICE=b8:0\n")
	says("6,340,5140901,-;eth0: link becomes ready\n")
	says("12,341,5140902,-;a warning that somebody wrote to /dev/kmsg\n")
	says("garbage")
	s.await(t, "kernel: [5.140900] EXT4-fs error (device vda2): bad block", 1)
	for i := range 3 * kernelBurst {
		says(fmt.Sprintf("3,%d,1,-;I/O error, sector %d\n", 400+i, i))
	}
	time.Sleep(k.each) // the record after it is of the next span
	says("4,9999,1,-;Out of memory: Killed process 7\n")
	s.await(t, "Out of memory", 1)
	if n := s.count("I/O error"); n > 2*kernelBurst || s.count("further lines were left out") == 0 {
		t.Errorf("%d of %d lines were noted, and %d times told what was left out", n, 3*kernelBurst, s.count("left out"))
	}
	if s.count("link becomes ready")+s.count("somebody wrote")+s.count("DEVICE=")+s.count("garbage") != 0 {
		t.Errorf("noted %q", s.lines)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestNoClockThatWasSetMovesTheFloor: the agent's file may bear the time of a forged answer.
func TestNoClockThatWasSetMovesTheFloor(t *testing.T) {
	released, sure := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	path := filepath.Join(t.TempDir(), "status.json")
	for text, want := range map[string]time.Time{
		`{"at":"2035-01-01T00:00:00Z","online":true}`:                                        released,
		`{"at":"2035-01-01T00:00:00Z","online":true,"time_at_least":"2026-03-01T00:00:00Z"}`: sure,
		`{"time_at_least":"2025-03-01T00:00:00Z"}`:                                           released,
		`{"time_at_least":`: released,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, released.AddDate(9, 0, 0)); err != nil {
			t.Fatal(err)
		}
		if got := newest(released, readStatus(path).TimeAtLeast); !got.Equal(want) {
			t.Errorf("%s: the floor is %v", text, got)
		}
	}
}
