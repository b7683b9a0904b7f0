package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/internal/cli"
)

type probeCmd struct {
	Root   string `placeholder:"DIR" help:"Show the machine that was recorded in this folder instead of this one."`
	Record string `placeholder:"DIR" help:"Also record this machine in a new folder, for a bug report or a test: the kernel files that were read and the disks' health pages. Run with sudo to have all."`
	Exact  bool   `help:"With --record: keep serial numbers, hardware addresses and names of people instead of replacing them."`
	cli.Output
}

func (p *probeCmd) Run(ctx context.Context) error {
	if p.Root != "" && p.Record != "" || p.Exact && p.Record == "" {
		return &cli.Error{Code: cli.ExitUsage, Err: fmt.Errorf("--record records this machine, not that of --root, and --exact is for --record only")}
	}
	o := hw.Options{Root: p.Root}
	if p.Record == "" {
		inv, err := hw.Probe(ctx, o)
		if err != nil {
			return err
		}
		return p.print(inv)
	}
	inv, err := hw.Record(ctx, hw.RecordOptions{Options: o, Dir: p.Record, Exact: p.Exact})
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "recorded in %s; look at it with: deimos-agent probe --root %s\n", p.Record, p.Record)
	return p.print(inv)
}

func (p *probeCmd) print(inv *hw.Inventory) error {
	return p.Print(inv, func(w io.Writer) error { return hw.WriteTableIn(w, inv, columns()) })
}

// columns is how wide the terminal is; what goes elsewhere has the table's full width.
func columns() int {
	size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return hw.TableWidth
	}
	return int(size.Col)
}
