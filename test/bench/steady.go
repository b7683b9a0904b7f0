package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	badger "github.com/dgraph-io/badger/v4"

	"github.com/deimos-edge/deimos/hw"
)

// What it may cost to know the machine, in percent of one core.
const steadyBudget = 0.5

const (
	sampleEvery  = 10 * time.Second // the agent's
	steadySettle = 15 * time.Second // after it is online: the first probe, inventory and heartbeats are over
	steadyFor    = time.Minute
	probeEvery   = 10 * time.Minute // the agent's
)

// knowing is what it takes to sample and probe this machine as often as an agent
// does, in percent of one core. Nothing else may run in this process.
func knowing(ctx context.Context) (percent float64, err error) {
	s, err := hw.NewSampler(hw.SampleOptions{Data: os.TempDir()})
	if err != nil {
		return 0, err
	}
	sample, err := each(100, func() error { _, err := s.Sample(ctx); return err })
	if err != nil {
		return 0, err
	}
	probe, err := each(10, func() error { _, err := hw.Probe(ctx, hw.Options{}); return err })
	return 100 * (sample/sampleEvery.Seconds() + probe/probeEvery.Seconds()), err
}

// databases is what an agent's databases use while nobody asks them, in percent
// of one core: that of the journal and that of one volume. Each looks 40 times a
// second whether there is something to compact.
func databases(ctx context.Context) (percent float64, err error) {
	for range 2 {
		dir, err := os.MkdirTemp("", "deimos-bench-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(dir)
		db, err := badger.Open(badger.DefaultOptions(dir).WithLogger(nil).WithNumCompactors(2))
		if err != nil {
			return 0, err
		}
		defer db.Close()
	}
	before, began := ownCPU(), time.Now()
	err = rest(ctx, steadySettle)
	return 100 * float64(ownCPU()-before) / float64(time.Since(began)), err
}

// each is the processor time that one of n takes, in seconds, the first left
// out: it finds out what there is.
func each(n int, do func() error) (seconds float64, err error) {
	if err := do(); err != nil {
		return 0, err
	}
	before := ownCPU()
	for range n {
		if err := do(); err != nil {
			return 0, err
		}
	}
	return (ownCPU() - before).Seconds() / float64(n), nil
}

// ownCPU is the processor time that this process has used.
func ownCPU() time.Duration {
	var u syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// steady is what a real agent uses that is a member, online and idle, in percent
// of one core. A minute has its samples, sensors, history and heartbeats; of
// the probe that each ten minutes have, a tenth of a whole run of the program
// is added, its start included, which is more than a daemon pays.
func steady(ctx context.Context) (percent float64, err error) {
	dir, err := os.MkdirTemp("", "deimos-bench-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	opened, err := newOurSide(dir)
	if err != nil {
		return 0, err
	}
	s := opened.(*ourSide)
	if err := s.start(ctx); err != nil {
		return 0, err
	}
	defer s.close()
	device, err := s.startAgent(ctx, filepath.Join(dir, "agent"))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, device.kill()) }()
	if err := rest(ctx, steadySettle); err != nil {
		return 0, err
	}
	before, began := cpuOf(device.cmd.Process.Pid), time.Now()
	if err := rest(ctx, steadyFor); err != nil {
		return 0, err
	}
	after, passed := cpuOf(device.cmd.Process.Pid), time.Since(began)
	if before == 0 || after < before {
		return 0, errors.New("the agent has ended")
	}
	probe, err := probeCost(ctx, filepath.Join(*bin, "deimos-agent"))
	return 100 * (float64(after-before)/float64(passed) + float64(probe)/float64(probeEvery)), err
}

func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// probeCost is the processor time of one probe of this machine.
func probeCost(ctx context.Context, program string) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, program, "probe", "-o", "json")
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("probe this machine: %w", err)
	}
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// cpuOf is the processor time that a process has used, in the kernel's ticks of
// 10 ms (utime and stime of proc_pid_stat(5)); 0 if it cannot be read.
func cpuOf(pid int) time.Duration {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(raw), ") ") // the name may hold anything before
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(f[11], 10, 64)
	system, _ := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond
}
