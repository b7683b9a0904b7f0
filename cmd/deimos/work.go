package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type jobCmd struct {
	Run jobRunCmd `cmd:"" help:"Run a module over a chunk of a stored file, on a device that holds it."`
}

type jobRunCmd struct {
	Module string     `arg:"" type:"existingfile" help:"WebAssembly file (WASI preview 1)."`
	Input  string     `required:"" placeholder:"NAME" help:"Stored file to run over."`
	Chunk  int        `default:"0" help:"Which chunk of it, from 0."`
	Device deviceFlag `placeholder:"ID" help:"Device to run on. Default: any that holds the chunk."`
	Arg    []string   `help:"Argument for the module; may be repeated."`
	Limits limitFlags `embed:""`
	Print  cli.Output `embed:""`
}

// limitFlags are what a job may use. Where none is given, the device's policy says.
type limitFlags struct {
	Memory int64    `placeholder:"BYTES" help:"Most memory the module may use (memory_bytes)."`
	CPU    duration `placeholder:"DURATION" help:"Most processor time it may use (cpu_seconds)."`
	Wall   duration `placeholder:"DURATION" help:"Longest time it may take (wall_seconds)."`
	Output int64    `name:"output-bytes" placeholder:"BYTES" help:"Longest output it may write (output_bytes)."`
}

func (l limitFlags) limits() wire.JobLimits {
	return wire.JobLimits{
		MemoryBytes: l.Memory, CPUSeconds: time.Duration(l.CPU).Seconds(), WallSeconds: time.Duration(l.Wall).Seconds(), OutputBytes: l.Output,
	}
}

func (j *jobRunCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	module, err := putModule(ctx, c, j.Module)
	if err != nil {
		return err
	}
	job, err := c.RunJob(ctx, api.JobRequest{
		Module: module, Args: j.Arg, Object: j.Input, Chunk: j.Chunk, Device: wire.DeviceID(j.Device),
		Limits: j.Limits.limits(),
	})
	if err != nil {
		return err
	}
	return j.Print.Print(job, func(w io.Writer) error {
		fmt.Fprintf(cli.Plain(os.Stderr), "device %s, %.2f s of CPU, %s, output sha256 %s, signed\n",
			job.Device, job.Result.CPUSeconds, job.Result.Engine, cli.Short(job.Result.Output))
		if !cli.Terminal(os.Stdout) {
			w = os.Stdout // a program gets the output as it is
		}
		_, err := w.Write(job.Output)
		return err
	})
}

func putModule(ctx context.Context, c *api.Client, path string) (string, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("the module cannot be read: %w", err)
	}
	return c.PutModule(ctx, raw)
}
