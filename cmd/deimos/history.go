package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type deviceHistoryCmd struct {
	ID     deviceFlag `arg:"" help:"Device id."`
	Series []string   `arg:"" optional:"" help:"What to draw, as the table without it names it; \"temperature*\" means all that begin so."`
	Since  *duration  `placeholder:"24h" help:"How far back; default: 24h, or from the first that was measured in it."`
	Points int        `default:"240" help:"How many points a curve has at most (${default})."`
	cli.Output
}

func (d *deviceHistoryCmd) Run(ctx context.Context, all *commands) error {
	id := wire.DeviceID(d.ID)
	if d.Points < 1 || d.Points > wire.MaxPoints {
		return &cli.Error{Code: cli.ExitUsage, Err: fmt.Errorf("a curve has 1 to %d points", wire.MaxPoints)}
	}
	since := defaultSince
	if d.Since != nil {
		since = time.Duration(*d.Since)
	}
	if since <= 0 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("--since must be more than nothing")}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	if err := awake(ctx, c, id); err != nil {
		return offlineError(err, "its history is on the device alone: ask again when it is back, it measures all the same")
	}
	q := wire.HistoryRequest{From: time.Now().UTC().Add(-since), Points: d.Points, Series: d.Series}
	h, err := fetchHistory(ctx, c, id, q)
	if err != nil {
		return err
	}
	if at, mostly := cli.MostlyEmpty(h); mostly && d.Since == nil {
		q.From = at // it is young
		if h, err = fetchHistory(ctx, c, id, q); err != nil {
			return err
		}
	}
	return d.Print(h, func(w io.Writer) error {
		style := chartStyle()
		if style.Color {
			w = os.Stdout // the chart cleans what it shows; colors would not pass
		}
		return writeHistory(w, h, len(d.Series) > 0, style)
	})
}

const defaultSince = 24 * time.Hour

// fetchHistory asks a device, and waits for its answer.
func fetchHistory(ctx context.Context, c *api.Client, id wire.DeviceID, q wire.HistoryRequest) (wire.History, error) {
	var none wire.History
	o, err := c.AskHistory(ctx, id, q)
	if err != nil {
		return none, err
	}
	if o, err = watchOrder(ctx, c, o, askedWait); err != nil {
		return none, err
	}
	if err := awaited(o, "it keeps no history"); err != nil {
		return none, err
	}
	if o.Result.Attachment == nil {
		return none, fmt.Errorf("device %s has sent nothing with its report", id)
	}
	raw, err := c.Attachment(ctx, id, o.Order.ID, *o.Result.Attachment)
	if err != nil {
		return none, err
	}
	h, err := readHistory(raw)
	if err != nil {
		return none, fmt.Errorf("what device %s has sent is no history: %w", id, err)
	}
	return h, nil
}

// What of a device's history is shown; beyond it, it is no device that we know.
const (
	maxCurves  = 1000
	maxName    = 64                     // bytes
	mostFigure = 1e18                   // of anything that is measured
	maxHistory = 100 * 365 * day        // from the first point to the last
	leastStep  = 100 * time.Millisecond // between two points
)

// readHistory takes what a device has sent, if it holds together and can be drawn.
func readHistory(raw []byte) (wire.History, error) {
	var h wire.History
	if err := json.Unmarshal(raw, &h); err != nil {
		return h, err
	}
	switch y := h.From.Year(); {
	case h.Count < 0 || h.Count > wire.MaxPoints:
		return h, fmt.Errorf("it has curves of %d points", h.Count)
	case h.Count > 0 && !(h.Step >= leastStep.Seconds() && h.Step*float64(h.Count) <= time.Duration(maxHistory).Seconds()):
		return h, fmt.Errorf("its points are %g seconds apart", h.Step)
	case y < 1970 || y > 2500:
		return h, fmt.Errorf("it begins in the year %d", y)
	case len(h.Series) > maxCurves:
		return h, fmt.Errorf("it has %d curves", len(h.Series))
	}
	for name, c := range h.Series {
		if !shows(name) || name == "" || !shows(c.Unit) {
			return h, fmt.Errorf("a curve has the name %q and the unit %q", name, c.Unit)
		}
		for _, list := range [][]*float64{c.Mean, c.Min, c.Max} {
			if len(list) != h.Count && (list != nil || h.Count > 0 && c.Mean == nil) {
				return h, fmt.Errorf("the curve %q has not %d points", name, h.Count)
			}
			for _, v := range list {
				if v != nil && math.Abs(*v) > mostFigure {
					return h, fmt.Errorf("the curve %q goes to %g", name, *v)
				}
			}
		}
	}
	return h, nil
}

// shows tells whether a text can stand in a chart.
func shows(s string) bool {
	return len(s) <= maxName && strings.IndexFunc(s, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }) < 0
}

// chartStyle is for standard output. What is piped gets a chart too.
func chartStyle() cli.ChartStyle {
	if s, ok := cli.ChartFor(os.Stdout); ok {
		s.Height = min(s.Height, 14)
		return s
	}
	return cli.ChartStyle{Width: 80, Height: 14, Zone: time.UTC}
}

// writeHistory draws curves, or shows each in a line.
func writeHistory(w io.Writer, h wire.History, draw bool, style cli.ChartStyle) error {
	if len(h.Series) == 0 || h.Count == 0 {
		if _, err := fmt.Fprintln(w, "The device has measured nothing of that in that time."); err != nil {
			return err
		}
		return cli.WriteLeftOut(w, h)
	}
	return cli.WriteHistory(w, h, draw, style)
}
