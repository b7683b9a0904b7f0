package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// engine runs jobs for the coordinator, in the same sandbox that devices use: their modules
// are customers'.
type engine struct {
	runner sandbox.Runner
	cache  string // of compiled code
	log    *slog.Logger
}

const (
	compiledDir  = "compiled" // below a coordinator's folder; it can be removed
	compileBytes = 512 << 20  // that compiling a module may take
)

func newEngine(dir string, log *slog.Logger) *engine {
	e := &engine{cache: filepath.Join(dir, compiledDir), log: log}
	var err error
	if e.runner.Cgroups, err = sandbox.OpenCgroups(); err != nil {
		log.Info("jobs that the coordinator runs itself have no cgroup here", "why", err)
	}
	return e
}

// close is for when no job runs any more.
func (e *engine) close() {
	if e.runner.Cgroups == nil {
		return
	}
	if err := e.runner.Cgroups.Close(); err != nil {
		e.log.Warn("the cgroups of jobs are left; the next start removes them", "error", err)
	}
}

// compute runs a job here. The coordinator has bounded what it takes.
func (e *engine) compute(ctx context.Context, j coordinator.ComputeJob) (coordinator.ComputeResult, error) {
	var none coordinator.ComputeResult
	dir, err := os.MkdirTemp("", "deimos-job-*")
	if err != nil {
		return none, err
	}
	defer os.RemoveAll(dir)
	spec := sandbox.Spec{Module: filepath.Join(dir, "module.wasm"), Args: j.Args, Env: j.Env, Input: j.Input, Limits: j.Limits, CacheDir: e.cache, CompileBytes: compileBytes}
	if err := os.WriteFile(spec.Module, j.Module, 0o600); err != nil {
		return none, err
	}
	for name, data := range j.Inputs {
		f, err := os.Create(filepath.Join(dir, "in-"+name))
		if err != nil {
			return none, err
		}
		defer f.Close()
		if _, err := f.Write(data); err != nil {
			return none, err
		}
		spec.Inputs = append(spec.Inputs, sandbox.Input{Name: name, Size: int64(len(data)), File: f})
	}
	written := make(map[string]*bytes.Buffer)
	for _, name := range j.Outputs {
		if name == wire.Stdout {
			continue
		}
		written[name] = new(bytes.Buffer)
		spec.Outputs = append(spec.Outputs, sandbox.Output{Name: name, To: written[name]})
	}
	out, err := e.runner.Run(ctx, spec)
	if err != nil {
		return none, err
	}
	res := coordinator.ComputeResult{Output: out.Output, Outputs: make(map[string][]byte), CPUSeconds: out.CPU.Seconds(), Engine: out.Engine, Looks: out.Looks}
	for name, b := range written {
		res.Outputs[name] = b.Bytes()
	}
	return res, nil
}
