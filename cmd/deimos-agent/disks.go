package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/disk"
	"github.com/deimos-edge/deimos/internal/cli"
)

type disksCmd struct {
	List disksListCmd `cmd:"" default:"withargs" help:"Show which disks would hold chunks, and why or why not."`
	Test disksTestCmd `cmd:"" help:"Test the disk that a folder is on: 67 MB are written, read back and removed."`
}

func (disksCmd) Help() string {
	return `Nothing is written but by "test", no disk is formatted, and none that sleeps is woken. Without --config it is
answered as if auto of [disks] were true.

  deimos-agent disks                              what would be used, by the rules
  deimos-agent disks --use /mnt/data              what if I agreed to that one?
  sudo deimos-agent disks test /mnt/data          can it be trusted, and how fast is it?

To agree for good, put it into the agent's configuration:

  [disks]
  use = ["/mnt/data"]`
}

type disksListCmd struct {
	State  string   `default:"/var/lib/deimos" env:"DEIMOS_STATE" placeholder:"DIR" help:"Folder of the agent's state (${default})."`
	Config string   `env:"DEIMOS_CONFIG" placeholder:"FILE" help:"The agent's configuration, for its [disks] and [board]."`
	Use    []string `placeholder:"MOUNT" help:"As if use of [disks] named it too: a mount point or a serial number."`
	Never  []string `placeholder:"DISK" help:"As if never of [disks] named it too."`
	cli.Output
}

func (c *disksListCmd) Run(ctx context.Context) error {
	o, err := c.options()
	if err != nil {
		return err
	}
	inv, err := hw.Probe(ctx, hw.Options{Board: o.Board})
	if err != nil {
		return err
	}
	all := disk.Choose(inv, o)
	if all == nil {
		all = []disk.Candidate{}
	}
	return c.Print(all, func(w io.Writer) error {
		if err := writeDisks(w, all); err != nil || c.Config != "" {
			return err
		}
		_, err := fmt.Fprintln(w, "\nWithout --config: this is what would be used with auto = true.")
		return err
	})
}

func (c *disksListCmd) options() (disk.Options, error) {
	cfg, err := agent.LoadConfig(c.Config)
	if err != nil {
		return disk.Options{}, &cli.Error{Code: cli.ExitConfig, Err: err}
	}
	b, err := boardOf(cfg)
	if err != nil {
		return disk.Options{}, &cli.Error{Code: cli.ExitConfig, Err: err}
	}
	state, err := filepath.Abs(c.State)
	if err != nil {
		return disk.Options{}, err
	}
	return disk.Options{
		// Without a configuration the question is what the rules would allow.
		Auto: cfg.Disks.Auto || c.Config == "", State: state, Board: b,
		Use: append(cfg.Disks.Use, c.Use...), Never: append(cfg.Disks.Never, c.Never...),
	}, nil
}

// writeDisks is a line for each filesystem, and below it why.
func writeDisks(w io.Writer, all []disk.Candidate) error {
	rows := make([]string, 0, len(all))
	for _, c := range all {
		use, chunks := "no", "-"
		if c.Use {
			use, chunks = "yes", diskSize(c.Capacity)
		}
		mount := c.Mount
		if mount == "" {
			mount = "(not mounted)"
		}
		rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", mount, c.Disk, diskSize(c.Size), use, chunks, speed(c.Test), c.Code))
	}
	if err := cli.Table(w, "MOUNTED AT\tDISK\tSIZE\tUSED\tFOR CHUNKS\tSPEED\tREASON", rows); err != nil || len(all) == 0 {
		return err
	}
	fmt.Fprintln(w, "\nWhy")
	for _, c := range all {
		name := c.Mount
		if name == "" {
			name = c.Disk
		}
		fmt.Fprintf(w, "  %s: %s.\n", name, c.Why)
	}
	return nil
}

// diskSize is in the unit of the inventory and of labels of disks.
func diskSize[T int64 | uint64 | float64](n T) string { return hw.DiskSize(uint64(max(n, 0))) }

func speed(t *disk.Test) string {
	switch {
	case t == nil:
		return "not tested"
	case !t.Passed:
		return "failed"
	}
	return fmt.Sprintf("%s/s in, %s/s out", diskSize(t.WriteBps), diskSize(t.ReadBps))
}

type disksTestCmd struct {
	Dir string `arg:"" help:"A folder on the disk, such as where it is mounted."`
	cli.Output
}

func (disksTestCmd) Help() string {
	return `Takes about 10 s, and 30 s if the disk hangs. What is on the disk stays as it is. Ends with 1 if the disk has failed,
and with 130 if it was interrupted.

  sudo deimos-agent disks test /mnt/data`
}

func (c *disksTestCmd) Run(ctx context.Context) error {
	t, err := disk.SelfTest(ctx, c.Dir, cli.Logger("text", "error"))
	if errors.Is(err, context.Canceled) { // no verdict must not look like a good one to a script
		return &cli.Error{Code: 130, Err: errors.New("the self-test was interrupted and says nothing about the disk")}
	}
	if err != nil {
		return err
	}
	if err := c.Print(t, func(w io.Writer) error { return writeTest(w, t) }); err != nil {
		return err
	}
	if !t.Passed {
		return errors.New("the disk is not to be trusted with chunks: " + t.Problem)
	}
	return nil
}

func writeTest(w io.Writer, t disk.Test) error {
	result := "passed"
	if !t.Passed {
		result = "failed (" + t.Code + ")"
	}
	rows := []string{"result\t" + result, "written and read back\t" + diskSize(t.Bytes)}
	if t.WriteBps > 0 {
		rows = append(rows, "writes\t"+diskSize(t.WriteBps)+"/s")
	}
	if t.ReadBps > 0 {
		how := ", past the cache"
		if !t.Direct {
			how = "; this filesystem may have read from its cache"
		}
		rows = append(rows, "reads\t"+diskSize(t.ReadBps)+"/s"+how)
	}
	if t.SyncMS > 0 {
		rows = append(rows, fmt.Sprintf("a small synced write\t%.1f ms", t.SyncMS))
	}
	return cli.Table(w, "WHAT\tVALUE", rows)
}
