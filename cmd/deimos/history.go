package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type deviceHistoryCmd struct {
	ID     string   `arg:"" help:"Device id."`
	Series []string `arg:"" optional:"" help:"What to draw, as the table without it names it; \"temperature*\" means all that begin so."`
	Since  duration `default:"24h" help:"How far back (${default})."`
	Points int      `default:"240" help:"How many points a curve has at most (${default})."`
	cli.Output
}

func (d *deviceHistoryCmd) Run(ctx context.Context, all *commands) error {
	id, err := wire.ParseDeviceID(d.ID)
	if err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	if d.Points < 1 || d.Points > wire.MaxPoints {
		return &cli.Error{Code: cli.ExitUsage, Err: fmt.Errorf("a curve has 1 to %d points", wire.MaxPoints)}
	}
	if d.Since == 0 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("--since must be more than nothing")}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	o, err := c.AskHistory(ctx, id, wire.HistoryRequest{From: time.Now().UTC().Add(-time.Duration(d.Since)), Points: d.Points, Series: d.Series})
	if err != nil {
		return err
	}
	if o, err = watchOrder(ctx, c, o, askedWait); err != nil {
		return err
	}
	if err := awaited(o, "it keeps no history"); err != nil {
		return err
	}
	if o.Result.Attachment == nil {
		return fmt.Errorf("device %s has sent nothing with its report", id)
	}
	raw, err := c.Attachment(ctx, id, o.Order.ID, *o.Result.Attachment)
	if err != nil {
		return err
	}
	h, err := readHistory(raw)
	if err != nil {
		return fmt.Errorf("what device %s has sent is no history: %w", id, err)
	}
	return d.Print(h, func(w io.Writer) error { return writeHistory(w, h, len(d.Series) > 0) })
}

// maxCurves bounds what is shown of one device.
const maxCurves = 1000

// readHistory takes what a device has sent, if it holds together.
func readHistory(raw []byte) (wire.History, error) {
	var h wire.History
	if err := json.Unmarshal(raw, &h); err != nil {
		return h, err
	}
	switch {
	case h.Count < 0 || h.Count > wire.MaxPoints:
		return h, fmt.Errorf("curves of %d points", h.Count)
	case !(h.Step >= 0 && h.Step <= (365*day).Seconds()):
		return h, fmt.Errorf("points %g seconds apart", h.Step)
	case len(h.Series) > maxCurves:
		return h, fmt.Errorf("%d curves", len(h.Series))
	}
	for name, c := range h.Series {
		if len(c.Mean) != h.Count || c.Min != nil && len(c.Min) != h.Count || c.Max != nil && len(c.Max) != h.Count {
			return h, fmt.Errorf("the curve %q has not %d points", name, h.Count)
		}
	}
	return h, nil
}

// writeHistory shows curves, or one line of each.
func writeHistory(w io.Writer, h wire.History, draw bool) error {
	if len(h.Series) == 0 || h.Count == 0 {
		_, err := fmt.Fprintln(w, "The device has measured nothing in that time.")
		return err
	}
	end := h.From.Add(time.Duration(h.Step * float64(h.Count) * float64(time.Second)))
	fmt.Fprintf(w, "%s to %s, a point every %s\n\n", h.From.UTC().Format(time.RFC3339), end.UTC().Format(time.RFC3339), time.Duration(h.Step*float64(time.Second)).Round(time.Second))
	var rows []string
	for _, name := range slices.Sorted(maps.Keys(h.Series)) {
		c := h.Series[name]
		s := summarise(c)
		rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", cell(name), cell(c.Unit), figure(s.last), figure(s.min), figure(s.mean), figure(s.max)))
	}
	return cli.Table(w, "SERIES\tUNIT\tLAST\tMIN\tMEAN\tMAX", rows)
}

// summary is a curve in four figures; NaN where nothing was measured.
type summary struct{ last, min, mean, max float64 }

func summarise(c wire.Curve) summary {
	s := summary{math.NaN(), math.NaN(), math.NaN(), math.NaN()}
	sum, n := 0.0, 0
	for i, p := range c.Mean {
		if p == nil {
			continue
		}
		low, high := *p, *p
		if i < len(c.Min) && c.Min[i] != nil {
			low = *c.Min[i]
		}
		if i < len(c.Max) && c.Max[i] != nil {
			high = *c.Max[i]
		}
		if n == 0 {
			s.min, s.max = low, high
		}
		s.last, s.min, s.max = *p, min(s.min, low), max(s.max, high)
		sum += *p
		n++
	}
	if n > 0 {
		s.mean = sum / float64(n)
	}
	return s
}

// figure says a number in few characters.
func figure(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "-"
	case a != 0 && (a >= 1e9 || a < 1e-3):
		return strconv.FormatFloat(v, 'e', 2, 64)
	case a >= 100 || v == math.Trunc(v):
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 1:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 3, 64)
}
