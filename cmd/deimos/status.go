package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
)

type statusCmd struct{ cli.Output }

func (s *statusCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.Status(ctx)
	if err != nil {
		return err
	}
	return s.Print(v, func(w io.Writer) error { return writeStatus(w, v) })
}

// writeStatus shows the fleet to a person.
func writeStatus(w io.Writer, s api.Status) error {
	row := func(k, v string) { fmt.Fprintf(w, "%-12s %s\n", k, v) }
	row("coordinator", fmt.Sprintf("%s, started %s (%s)", s.Version, cli.Ago(s.Started), s.Started.Format(time.RFC3339)))
	devices := fmt.Sprintf("%d online, %d offline", s.Devices.Online, s.Devices.Offline)
	for _, part := range []struct {
		n    int
		what string
	}{{s.Devices.Retired, "retired"}, {s.Devices.Pending, "waiting to be claimed"}, {s.Devices.Warned, "with a warning"},
		{s.Devices.Critical, "in a critical state"}, {s.Devices.Troubled, "in trouble"}} {
		if part.n > 0 {
			devices += fmt.Sprintf(", %d %s", part.n, part.what)
		}
	}
	row("devices", devices)
	for i, h := range s.Health {
		name := ""
		if i == 0 {
			name = "health"
		}
		row(name, fmt.Sprintf("%s: %s (%s)", cli.Count(h.Devices, "device"), cell(h.Title), h.Severity))
	}
	least := ""
	if s.Orders.AtLeast {
		least = "at least "
	}
	row("orders", "open: "+counted(s.Orders.Open))
	row("", "ended in the last day: "+least+counted(s.Orders.Ended))
	row("challenges", "in the last day: "+counted(s.Challenges))
	if s.Repair.Endangered > 0 {
		row("repair", repairText(s.Repair))
	}
	if len(s.Attention) == 0 {
		row("attention", "nothing needs it")
		return nil
	}
	fmt.Fprintln(w)
	rows := make([]string, 0, len(s.Attention))
	for _, a := range s.Attention {
		rows = append(rows, oneCell.Replace(strings.Replace(a.About, ":", " ", 1))+"\t"+oneCell.Replace(a.Text))
	}
	if s.More > 0 {
		rows = append(rows, fmt.Sprintf("… and %d more", s.More))
	}
	return cli.Table(w, "ATTENTION\tWHY", rows)
}

// counted says how many of each there are, the most first.
func counted[K ~string](of map[K]int) string {
	keys := slices.SortedFunc(maps.Keys(of), func(a, b K) int { return cmp.Or(cmp.Compare(of[b], of[a]), cmp.Compare(a, b)) })
	var parts []string
	for _, k := range keys {
		parts = append(parts, fmt.Sprintf("%d %s", of[k], strings.ReplaceAll(strings.ToLower(string(k)), "_", " ")))
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}
