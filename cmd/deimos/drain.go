package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
)

type deviceDrainCmd struct {
	ID      deviceFlag `arg:"" help:"Device id."`
	Wait    bool       `xor:"what" help:"Wait until the device has signed that it holds nothing."`
	Cancel  bool       `xor:"what" help:"Use the device as before."`
	Receipt bool       `xor:"what" help:"Print what was signed at the end; \"deimos audit check\" judges it."`
	cli.Output
}

func (d *deviceDrainCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	id := string(d.ID)
	switch {
	case d.Receipt:
		raw, err := c.DrainReceipt(ctx, id)
		if err == nil {
			_, err = os.Stdout.Write(append(raw, '\n'))
		}
		return err
	case d.Cancel:
		if err := c.CancelDrain(ctx, id); err != nil {
			return err
		}
		return d.Print(map[string]string{"canceled": id}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "Device %s is used as before. What is elsewhere already stays where it is wanted most.\n", id)
			return err
		})
	}
	v, err := c.DrainDevice(ctx, id)
	if err == nil && d.Wait {
		v, err = awaitDrain(ctx, c, v)
	}
	if err != nil {
		return err
	}
	return d.Print(v, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, drainText(v))
		return err
	})
}

// drainEvery is how often it is asked how far a drain is.
const drainEvery = time.Second

// awaitDrain waits for the end of a drain, and shows how far it is on a terminal. A
// coordinator that cannot be reached for a while may be starting anew.
func awaitDrain(ctx context.Context, c *api.Client, v api.Drain) (api.Drain, error) {
	const patience = 5 * time.Minute
	reached := time.Now()
	show := cli.Terminal(os.Stderr)
	for v.State != api.DrainDone {
		if show {
			fmt.Fprintf(os.Stderr, "\r\033[K%s", cell(drainText(v)))
		}
		select {
		case <-ctx.Done():
			return v, ctx.Err()
		case <-time.After(drainEvery):
		}
		now, err := c.Drain(ctx, string(v.Device))
		switch {
		case err == nil:
			v, reached = now, time.Now()
		case !errors.Is(err, api.ErrUnreachable) || time.Since(reached) > patience:
			return v, err
		}
	}
	if show {
		fmt.Fprint(os.Stderr, "\r\033[K")
	}
	return v, nil
}

// drainText says how far a drain is.
func drainText(v api.Drain) string {
	var s string
	switch v.State {
	case api.DrainDone:
		return fmt.Sprintf("Device %s holds nothing any more, and has signed for it: %s moved. It can be retired; \"deimos device drain %s --receipt\" prints what was signed.", v.Device, cli.Count(v.Moved, "chunk"), v.Device)
	case api.DrainDropping:
		s = fmt.Sprintf("Device %s: all is whole elsewhere, %s of %d left to drop", v.Device, cli.Count(v.Left, "chunk"), max(v.Chunks, v.Left))
	default:
		s = fmt.Sprintf("Device %s is being drained: %s left, %d of them not elsewhere yet", v.Device, cli.Count(v.Left, "chunk"), v.Alone)
	}
	if v.Problem != "" {
		s += "; it waits: " + v.Problem
	}
	return s + "."
}

// writeDrain shows a device's drain with it.
func writeDrain(row func(name, format string, args ...any), v *api.Drain) {
	if v != nil {
		row("drain", "%s", drainText(*v))
	}
}

type repairCmd struct{ cli.Output }

func (r *repairCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.Repair(ctx)
	if err != nil {
		return err
	}
	return r.Print(v, func(w io.Writer) error { return writeRepair(w, v) })
}

// repairText says in a line how repair is.
func repairText(s api.RepairSummary) string {
	if s.Endangered == 0 {
		return "everything is as redundant as it was stored"
	}
	text := cli.Count(s.Endangered, "stripe") + " endangered"
	for _, part := range []struct {
		n    int
		what string
	}{{s.Working, "being repaired"}, {s.Waiting, "waiting"}, {s.Lost, "lost"}} {
		if part.n > 0 {
			text += fmt.Sprintf(", %d %s", part.n, part.what)
		}
	}
	return text
}

// writeRepair shows repair to a person.
func writeRepair(w io.Writer, v api.Repair) error {
	row := func(k, text string) { fmt.Fprintf(w, "%-12s %s\n", k, text) }
	if v.AtOnce == 0 {
		row("repair", "is switched off (--repair-at-once 0)")
	} else {
		row("repair", repairText(v.RepairSummary))
		row("limits", fmt.Sprintf("%d at a time, %s/s, after a device was away for %s", v.AtOnce, cli.Bytes(v.Rate), duration(v.Grace*float64(time.Second))))
	}
	row("done", fmt.Sprintf("%d placed anew since %s, %d of them rebuilt from others; %s moved; %d superfluous dropped",
		v.Done, v.Since.Format(time.RFC3339), v.Rebuilt, cli.Bytes(v.Bytes), v.Dropped))
	for i, d := range v.Drains {
		name := ""
		if i == 0 {
			name = "drains"
		}
		row(name, cell(drainText(d)))
	}
	if len(v.Queue) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	var rows []string
	for _, e := range v.Queue {
		state := "queued"
		switch {
		case e.Working:
			state = "being repaired"
		case e.Lost:
			state = "lost: " + e.Problem
		case e.Problem != "":
			state = "waits: " + e.Problem
		}
		rows = append(rows, fmt.Sprintf("%s\t%d\t%d\t%d\t%s\t%s", cell(cmp.Or(e.Object, "(no object yet)")), e.Stripe, e.Spare, e.Missing, cli.Ago(e.Since), cell(state)))
	}
	if n := v.Endangered - len(v.Queue); n > 0 {
		rows = append(rows, fmt.Sprintf("… and %d more", n))
	}
	return cli.Table(w, "OBJECT\tSTRIPE\tSPARE\tMISSING\tSINCE\tSTATE", rows)
}
