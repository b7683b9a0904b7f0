package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/beevik/ntp"
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
	var passed, looks atomic.Int64 // nanoseconds; lines of the kernel's
	begun := time.Now()
	k := &kernelLog{note: s.say, each: time.Minute, now: func() time.Time {
		defer looks.Add(1)
		return begun.Add(time.Duration(passed.Load()))
	}}
	go func() { ended <- k.follow(ctx, ours) }()
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
	for end := time.Now().Add(patience); looks.Load() < 1+1+3*kernelBurst; time.Sleep(time.Millisecond) { // one at its start
		if time.Now().After(end) {
			t.Fatalf("%d lines were read", looks.Load())
		}
	}
	passed.Add(int64(k.each)) // the record after it is of the next span
	says("4,9999,1,-;Out of memory: Killed process 7\n")
	s.await(t, "Out of memory", 1)
	if n := s.count("I/O error"); n != kernelBurst-1 || s.count(fmt.Sprint(2*kernelBurst+1, " further lines were left out")) != 1 {
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

func TestAClockBehindTheFloorIsRaisedToIt(t *testing.T) {
	floor := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	for behind, want := range map[time.Duration]bool{time.Hour: true, 0: false, -time.Hour: false} {
		is := floor.Add(-behind)
		c := &clock{floor: floor, now: func() time.Time { return is }, set: func(to time.Time) error { is = to; return nil }, log: slog.New(slog.DiscardHandler)}
		if err := c.raise(); err != nil || is.Equal(floor) != (want || behind == 0) {
			t.Errorf("%s behind, it is set to %s: %v", behind, is, err)
		}
	}
}

// TestAForgedTimeStaysOnlyUntilSomebodyAnswersTruly: the time is that of the bubble, which
// a clock of ours is ahead of.
func TestAForgedTimeStaysOnlyUntilSomebodyAnswersTruly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		floor := time.Now().Add(-time.Hour)
		var ahead, asked atomic.Int64 // nanoseconds; times
		now := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		set := func(to time.Time) error { ahead.Store(int64(time.Until(to))); return nil }
		c := &clock{floor: floor, now: now, set: set, log: slog.New(slog.DiscardHandler),
			query: func(string) (*ntp.Response, error) {
				r := &ntp.Response{Stratum: 2, Time: floor, ReferenceTime: floor, RootDistance: time.Millisecond}
				switch asked.Add(1) {
				case 1:
					return nil, errors.New("no answer")
				case 2:
					r.ClockOffset = 5 * 365 * 24 * time.Hour // forged, and could be
				default:
					r.ClockOffset = -time.Duration(ahead.Load())
				}
				return r, nil
			}}
		ctx, cancel := context.WithCancel(t.Context())
		go c.follow(ctx, func() []string { return []string{"server"} })
		time.Sleep(2 * ntpRetry)
		if synctest.Wait(); asked.Load() != 2 || ahead.Load() == 0 {
			t.Errorf("asked %d times, %s ahead", asked.Load(), time.Duration(ahead.Load()))
		}
		time.Sleep(ntpAgain)
		if synctest.Wait(); asked.Load() != 3 || ahead.Load() != 0 {
			t.Errorf("a day later: asked %d times, %s ahead", asked.Load(), time.Duration(ahead.Load()))
		}
		cancel()
	})
}
