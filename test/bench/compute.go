package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

const (
	computeRounds = 7
	noCompiler    = 3 // how scripts/guest-c ends where nothing makes WebAssembly of C
)

// computeRows are jobs of the guests that ship against the same source built for this
// machine, over the same input. It is CPU time that is compared, which others' work
// changes less than the clock; of a job it is that of the whole worker, the loading of
// its compiled code too.
func computeRows(ctx context.Context, t *table) error {
	dir, err := os.MkdirTemp("", "compute")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	points := computePoints()
	args := []string{"-k", "64", "-f32", "32", "-iterations", "30"}
	for _, v := range []struct {
		what  string
		flags []string
	}{
		{"k-means in C", []string{"-DKMEANS_SCALAR"}},
		{"k-means in C with SIMD", nil},
	} {
		module, native := filepath.Join(dir, "kmeans.wasm"), filepath.Join(dir, "kmeans")
		const source = "jobs/guests/kmeans/main.c"
		err := command(ctx, "scripts/guest-c", append([]string{module, source}, v.flags...)...)
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == noCompiler {
			fmt.Printf("%s: left out, %v\n", v.what, err)
			continue
		} else if err != nil {
			return err
		}
		if err := command(ctx, "gcc", append([]string{"-std=c11", "-O2", "-ffp-contract=off", "-Ijobs/guests/include", "-o", native, source}, v.flags...)...); err != nil {
			return err
		}
		if err := computeRow(ctx, t, v.what, dir, module, native, points, args); err != nil {
			return err
		}
	}
	native := filepath.Join(dir, "textstats")
	if err := command(ctx, "go", "build", "-o", native, "./jobs/guests/textstats"); err != nil {
		return err
	}
	if err := computeRow(ctx, t, "textstats in Go", dir, filepath.Join(*bin, "guests", "textstats.wasm"), native, computeText(), nil); err != nil {
		return err
	}
	return memoryRow(ctx, t, dir)
}

// holdMiB is what the module of memoryRow has, and touches.
const holdMiB = 64

// hold writes on each page of its 64 MiB and then runs for ever.
const hold = "\x00asm\x01\x00\x00\x00" +
	"\x01\x04\x01\x60\x00\x00" + // type 0: no parameters, no results
	"\x03\x02\x01\x00" + // one function of type 0
	"\x05\x04\x01\x00\x80\x08" + // memory: 1024 pages of 64 KiB
	"\x07\x0a\x01\x06_start\x00\x00" + // the function is exported
	"\x0a\x25\x01\x23\x01\x01\x7f" + // its code, with a local i32
	"\x03\x40" + // loop
	"\x20\x00\x41\x01\x3a\x00\x00" + // memory[i] = 1
	"\x20\x00\x41\x80\x20\x6a\x22\x00" + // i += 4096
	"\x41\x80\x80\x80\x20\x49\x0d\x00" + // again while i < 64 MiB
	"\x0b\x03\x40\x0c\x00\x0b\x0b" // end; loop: again; end

// memoryRow is the memory of a worker while its job runs, against what the module has:
// the worker's share (PSS) of all pages, of which those of the program are the agent's, too.
func memoryRow(ctx context.Context, t *table, dir string) error {
	module := filepath.Join(dir, "hold.wasm")
	if err := os.WriteFile(module, []byte(hold), 0o600); err != nil {
		return err
	}
	agent, err := filepath.Abs(filepath.Join(*bin, "deimos-agent"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := (&sandbox.Runner{Executable: agent}).Run(ctx, sandbox.Spec{Module: module, CacheDir: filepath.Join(dir, "cache"),
			Limits: wire.JobLimits{CPUSeconds: 60, WallSeconds: 60, MemoryBytes: holdMiB << 20}})
		ended <- err
	}()
	share := 0.0
	for before := -1.0; share < holdMiB || share != before; {
		before = share
		select {
		case err := <-ended:
			return fmt.Errorf("the job whose memory is measured ended: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
		if share, err = workersShare(); err != nil {
			return err
		}
	}
	cancel()
	<-ended
	t.row("memory of a job of 64 MiB", "MiB", share, holdMiB, "%.1f")
	return nil
}

// workersShare is the PSS of this process's only child, in MiB; 0 without one. From
// smaps_rollup, see proc_pid_smaps(5).
func workersShare() (float64, error) {
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return 0, err
	}
	for _, list := range lists {
		raw, err := os.ReadFile(list)
		child := strings.Fields(string(raw))
		if err != nil || len(child) == 0 {
			continue // the thread has ended, or has none
		}
		rollup, err := os.ReadFile("/proc/" + child[0] + "/smaps_rollup")
		if errors.Is(err, syscall.ESRCH) || errors.Is(err, os.ErrNotExist) {
			continue // it has ended; the runner says why
		}
		if err != nil {
			return 0, fmt.Errorf("look at the memory of a worker: %w", err)
		}
		for line := range strings.Lines(string(rollup)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
				kib, err := strconv.ParseFloat(f[1], 64)
				return kib / 1024, err
			}
		}
	}
	return 0, nil
}

func command(ctx context.Context, name string, args ...string) error {
	if text, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, text)
	}
	return nil
}

func computeRow(ctx context.Context, t *table, what, dir, module, native string, in []byte, args []string) error {
	agent, err := filepath.Abs(filepath.Join(*bin, "deimos-agent"))
	if err != nil {
		return err
	}
	runner := sandbox.Runner{Executable: agent}
	spec := sandbox.Spec{
		Module: module, Args: args, Input: in, CacheDir: filepath.Join(dir, "cache"),
		Limits: wire.JobLimits{CPUSeconds: 600, WallSeconds: 600, MemoryBytes: 256 << 20},
	}
	var jobSaid, nativeSaid []byte
	job := func() (float64, error) {
		res, err := runner.Run(ctx, spec)
		jobSaid = res.Output
		return ms(res.CPU), err
	}
	plain := func() (float64, error) {
		cmd := exec.CommandContext(ctx, native, args...)
		cmd.Stdin = bytes.NewReader(in)
		out, err := cmd.Output()
		nativeSaid = out
		if err != nil {
			return 0, err
		}
		return ms(cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()), nil
	}
	rounds, err := interleave(computeRounds, job, plain)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if !bytes.Equal(jobSaid, nativeSaid) {
		return fmt.Errorf("%s: the job says %.200q, the native program %.200q", what, jobSaid, nativeSaid)
	}
	t.paired(what+", CPU", "ms", rounds, "%.0f")
	return nil
}

// computePoints are as many points of 32 float32 as standard input takes.
func computePoints() []byte {
	r := rand.New(rand.NewPCG(1, 2))
	var b bytes.Buffer
	for b.Len() < sandbox.MaxInput {
		v := uint32(0x3f800000) | r.Uint32()>>9 // in [1, 2)
		b.Write([]byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)})
	}
	return b.Bytes()
}

// computeText is text of that size, a few words of which come often and most seldom, as in a
// language.
func computeText() []byte {
	r := rand.New(rand.NewPCG(3, 4))
	z := rand.NewZipf(r, 1.2, 4, 50_000)
	var b []byte
	for len(b) < sandbox.MaxInput-16 {
		b = strconv.AppendUint(append(b, 'w'), z.Uint64(), 36)
		b = append(b, " \n"[r.IntN(12)/11])
	}
	return b
}
