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
	return computeRow(ctx, t, "textstats in Go", dir, filepath.Join(*bin, "guests", "textstats.wasm"), native, computeText(), nil)
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
