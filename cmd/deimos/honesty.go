package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type deviceHonestyCmd struct {
	ID deviceFlag `arg:"" help:"Device id."`
	cli.Output
}

func (d *deviceHonestyCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.Honesty(ctx, wire.DeviceID(d.ID))
	if err != nil {
		return err
	}
	return d.Print(v, func(w io.Writer) error { return writeHonesty(w, v) })
}

// writeHonesty shows to a person how far a device is believed.
func writeHonesty(w io.Writer, v api.Honesty) error {
	row := func(k, format string, args ...any) {
		fmt.Fprintf(w, "%-12s %s\n", k, cell(fmt.Sprintf(format, args...)))
	}
	list := func(k string, i int) string {
		if i > 0 {
			return ""
		}
		return k
	}
	row("device", "%s", v.Device)
	row("compute", "%.2f", v.Compute)
	for i, s := range v.Why {
		row(list("because", i), "%s", s)
	}
	row("confirmed", "%.1f of the %.0f that make it trusted", v.Confirmed, v.Needed)
	if v.Engine != "" {
		row("runtime", "%s, agent %s, since %s", v.Engine, v.Agent, v.Since.Format(time.RFC3339))
	}
	for i, x := range v.Doubts {
		row(list("doubts", i), "%s module %s", cli.Ago(x.At), cli.Short(x.Module))
	}
	for i, p := range v.Penalties[:min(len(v.Penalties), maxShownPenalties)] {
		row(list("penalties", i), "%s -%.2f (%s), from %.2f to %.2f: \"deimos audit show %s\"", cli.Ago(p.At), p.Amount, p.Cause, p.Before, p.After, p.Audit)
	}
	return nil
}
