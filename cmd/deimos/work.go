package main

import (
	"context"
	"errors"
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

type auditCmd struct {
	Storage auditStorageCmd `cmd:"" help:"Have a device prove that it holds its chunks."`
	Compute auditComputeCmd `cmd:"" help:"Give a device a job whose answer is known."`
	List    auditListCmd    `cmd:"" help:"List past challenges."`
}

type auditStorageCmd struct {
	Device string `arg:"" help:"Device id."`
	Leaves int    `default:"44" help:"How many 4 KiB pieces to ask for; 44 find a loss of 10% in 99 of 100 cases."`
	cli.Output
}

func (a *auditStorageCmd) Run(ctx context.Context, all *commands) error {
	if a.Leaves < 1 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("a challenge asks for at least one leaf")}
	}
	return runAudit(ctx, all, a.Output, api.AuditRequest{Kind: api.StorageAudit, Device: wire.DeviceID(a.Device), Leaves: a.Leaves}, "")
}

type auditComputeCmd struct {
	Device string     `arg:"" help:"Device id."`
	Module string     `required:"" type:"existingfile" placeholder:"FILE" help:"WebAssembly file to run, best one that customers run too."`
	Arg    []string   `help:"Argument for the module; may be repeated."`
	Limits limitFlags `embed:""`
	cli.Output
}

func (a *auditComputeCmd) Run(ctx context.Context, all *commands) error {
	return runAudit(ctx, all, a.Output, api.AuditRequest{Kind: api.ComputeAudit, Device: wire.DeviceID(a.Device), Args: a.Arg, Limits: a.Limits.limits()}, a.Module)
}

// runAudit fails for a device that did not prove itself, after printing why.
func runAudit(ctx context.Context, all *commands, out cli.Output, r api.AuditRequest, module string) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	if module != "" {
		if r.Module, err = putModule(ctx, c, module); err != nil {
			return err
		}
	}
	a, err := c.Audit(ctx, r)
	if err != nil {
		return err
	}
	if err := out.Print(a, func(w io.Writer) error { return writeAudit(w, a) }); err != nil {
		return err
	}
	if a.Outcome != api.AuditRight {
		return fmt.Errorf("the device did not prove itself (%s): %s", a.Outcome, a.Reason)
	}
	return nil
}

func writeAudit(w io.Writer, a api.Audit) error {
	fmt.Fprintf(w, "challenge  %s (%s)\ndevice     %s\norder      %s\noutcome    %s\n", a.ID, a.Kind, a.Device, a.Order, a.Outcome)
	if a.Reason != "" {
		fmt.Fprintf(w, "because    %s\n", a.Reason)
	}
	for _, id := range a.Lost {
		fmt.Fprintf(w, "lost       %s\n", id)
	}
	switch a.Kind {
	case api.StorageAudit:
		fmt.Fprintf(w, "proof      %d of %d leaves verified, from %s\n", a.Right, a.Leaves, cli.Count(len(a.Chunks), "chunk"))
		for _, id := range a.Wrong {
			fmt.Fprintf(w, "wrong      %s\n", id)
		}
	case api.ComputeAudit:
		fmt.Fprintf(w, "committed  %s before the job was sent\nexpected   %s\ngot        %s\n", a.Commitment, a.Expected, a.Got)
	}
	return nil
}

type auditListCmd struct{ cli.Output }

func (a *auditListCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Audits(ctx)
	if err != nil {
		return err
	}
	return a.Print(list, func(w io.Writer) error {
		var rows []string
		for _, v := range list {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", v.ID, v.Kind, v.Device, v.Outcome, cli.Ago(v.At), v.Reason))
		}
		return cli.Table(w, "CHALLENGE\tKIND\tDEVICE\tOUTCOME\tWHEN\tREASON", rows)
	})
}
