package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// noop is a module whose _start returns.
const noop = "\x00asm\x01\x00\x00\x00" +
	"\x01\x04\x01\x60\x00\x00" + // type 0: no parameters, no results
	"\x03\x02\x01\x00" + // one function of type 0
	"\x07\x0a\x01\x06_start\x00\x00" + // which is exported
	"\x0a\x04\x01\x02\x00\x0b" // and ends

const (
	jobRuns    = 200 // one after the other
	jobsAtOnce = 200 // of one device
	jobBudget  = 60  // ms, of a job that does nothing
	smallJobs  = 10_000
	jobDevices = 20

	realJobs    = 2000 // of real agents, which share this machine's processors
	realDevices = 4
)

// jobRows measure what a job costs beside its work.
func jobRows(ctx context.Context, t *table) error {
	if err := oneDevice(ctx, t); err != nil {
		return fmt.Errorf("jobs of one device: %w", err)
	}
	if err := manySmall(ctx, t); err != nil {
		return fmt.Errorf("%d small jobs: %w", smallJobs, err)
	}
	if err := realSmall(ctx, t); err != nil {
		return fmt.Errorf("%d small jobs of real devices: %w", realJobs, err)
	}
	return nil
}

// jobSide is a coordinator of its own.
func jobSide(ctx context.Context, work func(s *ourSide, dir string) error) error {
	dir, err := os.MkdirTemp("", "deimos-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	opened, err := newOurSide(dir)
	if err != nil {
		return err
	}
	s := opened.(*ourSide)
	s.beat = time.Second
	s.stop = func() {}
	if err := s.start(ctx); err != nil {
		return err
	}
	defer s.close()
	return work(s, dir)
}

// oneDevice has a real agent run a module that does nothing.
func oneDevice(ctx context.Context, t *table) error {
	return jobSide(ctx, func(s *ourSide, dir string) (err error) {
		device, err := s.startAgent(ctx, filepath.Join(dir, "agent"))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, device.kill()) }()
		module, err := s.client.PutModule(ctx, []byte(noop))
		if err != nil {
			return err
		}
		spec := api.JobSpec{Module: module, Verify: api.VerifyNone}
		var whole, placed, there, back []float64
		for i := range jobRuns + 10 {
			began := time.Now()
			r, err := s.client.RunJob(ctx, spec)
			if err != nil {
				return err
			}
			if i < 10 { // not warm yet
				continue
			}
			took, a := time.Since(began), r.Attempts[0]
			whole = append(whole, ms(took))
			placed = append(placed, ms(a.Began.Sub(began)))
			there = append(there, ms(a.Ended.Sub(a.Began)))
			back = append(back, ms(took-a.Ended.Sub(began)))
		}
		t.row("a job that does nothing, p50 (aim)", "ms", median(whole), jobBudget, "%.1f")
		t.only("  of it, asked for and placed", "ms", median(placed), "%.1f")
		t.only("  order, worker, run, report", "ms", median(there), "%.1f")
		t.only("  collected and given out", "ms", median(back), "%.1f")
		began := time.Now()
		var g errgroup.Group
		g.SetLimit(32)
		for range jobsAtOnce {
			g.Go(func() error {
				_, err := s.client.RunJob(ctx, spec)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		t.only("jobs that do nothing, of one device", "/s", jobsAtOnce/time.Since(began).Seconds(), "%.1f")
		return nil
	})
}

// manySmall runs small tasks over simulated devices, and the same over files of this
// machine by xargs.
func manySmall(ctx context.Context, t *table) error {
	return jobSide(ctx, func(s *ourSide, dir string) error {
		// They are honest, or challenges find them: the module writes nothing.
		s.does = testbed.Workers{Slots: 4, Odd: func(context.Context, int, wire.Order) ([]byte, error, bool) { return nil, nil, true }}.Does
		if err := s.connect(ctx, jobDevices); err != nil {
			return err
		}
		if err := until(ctx, func() bool {
			list, err := s.client.Devices(ctx)
			return err == nil && !slices.ContainsFunc(list, func(d api.Device) bool { return d.Online && d.Jobs == nil })
		}); err != nil {
			return err
		}
		files := filepath.Join(dir, "files")
		if err := os.Mkdir(files, 0o700); err != nil {
			return err
		}
		var g errgroup.Group
		g.SetLimit(32)
		for i := range smallJobs {
			g.Go(func() error {
				name, data := fmt.Sprintf("small/%05d", i), []byte(strconv.Itoa(i)+"\n")
				if err := os.WriteFile(filepath.Join(files, strconv.Itoa(i)), data, 0o600); err != nil {
					return err
				}
				id, sum := chunk.Sum(data).String(), sha256.Sum256(data)
				if _, err := s.client.PutChunk(ctx, id, data, 1); err != nil {
					return err
				}
				_, err := s.client.PutObject(ctx, api.Object{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:]), Chunks: []api.Chunk{{ID: id, Size: int64(len(data))}}})
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		module, err := s.client.PutModule(ctx, []byte(noop))
		if err != nil {
			return err
		}
		ours, err := s.mapped(ctx, api.JobSpec{Module: module, Over: &api.JobOver{Prefix: "small/"}}, smallJobs)
		if err != nil {
			return err
		}
		theirs, err := xargs(ctx, files, "find . -type f | xargs -P %d -n 1 sha256sum")
		if err != nil {
			return err
		}
		t.row(fmt.Sprintf("%d files, %d simulated (xargs -P %d)", smallJobs, jobDevices, runtime.NumCPU()), "s", ours, theirs, "%.1f")
		if ours, err = s.mapped(ctx, api.JobSpec{Module: module, Over: &api.JobOver{Args: lists(smallJobs)}}, smallJobs); err != nil {
			return err
		}
		if theirs, err = xargs(ctx, files, fmt.Sprintf("seq %d | xargs -P %%d -n 1 echo", smallJobs)); err != nil {
			return err
		}
		t.row(fmt.Sprintf("%d lists, %d simulated (xargs -P %d)", smallJobs, jobDevices, runtime.NumCPU()), "s", ours, theirs, "%.1f")
		t.only("  that is", "/s", smallJobs/ours, "%.0f")
		return nil
	})
}

// realSmall runs a module that does nothing in the sandboxes of real agents, and as many
// processes that do nothing by xargs.
func realSmall(ctx context.Context, t *table) error {
	return jobSide(ctx, func(s *ourSide, dir string) (err error) {
		var devices []*child
		defer func() {
			for _, d := range devices {
				err = errors.Join(err, d.kill())
			}
		}()
		for i := range realDevices {
			d, err := s.startAgent(ctx, filepath.Join(dir, fmt.Sprint("agent", i)))
			if err != nil {
				return err
			}
			devices = append(devices, d)
		}
		module, err := s.client.PutModule(ctx, []byte(noop))
		if err != nil {
			return err
		}
		ours, err := s.mapped(ctx, api.JobSpec{Module: module, Over: &api.JobOver{Args: lists(realJobs)}}, realJobs)
		if err != nil {
			return err
		}
		theirs, err := xargs(ctx, dir, fmt.Sprintf("seq %d | xargs -P %%d -n 1 true", realJobs))
		if err != nil {
			return err
		}
		t.row(fmt.Sprintf("%d lists, %d real (xargs -P %d)", realJobs, realDevices, runtime.NumCPU()), "s", ours, theirs, "%.1f")
		t.only("  that is", "/s", realJobs/ours, "%.0f")
		return nil
	})
}

// lists are the arguments of n tasks.
func lists(n int) [][]string {
	out := make([][]string, n)
	for i := range out {
		out[i] = []string{strconv.Itoa(i)}
	}
	return out
}

// mapped does a job of n tasks without verifying, and says how many seconds it took.
func (s *ourSide) mapped(ctx context.Context, q api.JobSpec, n int) (float64, error) {
	began, got := time.Now(), 0
	q.Verify = api.VerifyNone
	j, err := s.client.StartJob(ctx, q)
	if err != nil {
		return 0, err
	}
	if err := s.client.EachJobResult(ctx, j.ID, func(r api.JobResult) error { got++; return r.Err() }, nil); err != nil {
		return 0, err
	}
	if got != n {
		return 0, fmt.Errorf("%d results of %d tasks", got, n)
	}
	return time.Since(began).Seconds(), nil
}

// xargs runs a line of the shell, in which %d is how many processes run at once, and says how
// many seconds it took.
func xargs(ctx context.Context, dir, line string) (float64, error) {
	began := time.Now()
	cmd := exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf(line, runtime.NumCPU())+" >/dev/null")
	cmd.Dir = dir
	err := cmd.Run()
	return time.Since(began).Seconds(), err
}
