package cli

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

const sparkWidth = 24

// WriteHistory draws the curves of a history, or shows each in a line. Names and
// units are cleaned here: colors would not pass a writer that does ([Plain]).
func WriteHistory(w io.Writer, h wire.History, draw bool, s ChartStyle) error {
	write := writeSummaries
	if draw {
		write = writeCharts
	}
	if err := write(w, h, s); err != nil {
		return err
	}
	return WriteLeftOut(w, h)
}

// WriteLeftOut names the curves that were too much for one answer.
func WriteLeftOut(w io.Writer, h wire.History) error {
	if len(h.LeftOut) == 0 {
		return nil
	}
	const most = 16
	names := make([]string, 0, most)
	for _, name := range h.LeftOut[:min(len(h.LeftOut), most)] {
		names = append(names, oneCell(name))
	}
	more := ""
	if n := len(h.LeftOut) - most; n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	_, err := fmt.Fprintf(w, "\nLeft out, because it is too much at once: %s%s. Name some of them, or ask for fewer --points.\n", strings.Join(names, " "), more)
	return err
}

// Measured is when the first point of any curve was measured; zero if none was.
func Measured(h wire.History) time.Time {
	first := h.Count
	for _, c := range h.Series {
		if at := slices.IndexFunc(c.Mean, func(v *float64) bool { return v != nil }); at >= 0 {
			first = min(first, at)
		}
	}
	if first == h.Count {
		return time.Time{}
	}
	return h.From.Add(time.Duration(h.Step * float64(first) * float64(time.Second)))
}

// MostlyEmpty is [Measured] if that is in the later half: what was asked for began
// long before there was anything, and would show more if it began there.
func MostlyEmpty(h wire.History) (time.Time, bool) {
	at := Measured(h)
	half := h.From.Add(time.Duration(h.Step * float64(h.Count) / 2 * float64(time.Second)))
	return at, !at.IsZero() && at.After(half)
}

func writeCharts(w io.Writer, h wire.History, s ChartStyle) error {
	for i, name := range slices.Sorted(maps.Keys(h.Series)) {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := Chart(w, h, name, s); err != nil {
			return err
		}
	}
	return nil
}

func writeSummaries(w io.Writer, h wire.History, s ChartStyle) error {
	end := h.From.Add(time.Duration(h.Step * float64(h.Count) * float64(time.Second)))
	fmt.Fprintf(w, "%s to %s, a point every %s\n\n", h.From.UTC().Format(time.RFC3339), end.UTC().Format(time.RFC3339), time.Duration(h.Step*float64(time.Second)).Round(100*time.Millisecond))
	head := "SERIES\tLAST\tMIN\tMEAN\tMAX"
	if !s.ASCII {
		head += "\tCURVE"
	}
	rows := make([]string, 0, len(h.Series))
	for _, name := range slices.Sorted(maps.Keys(h.Series)) {
		rows = append(rows, oneCell(name)+summaryCells(h.Series[name], s.ASCII))
	}
	return Table(w, head, rows)
}

func summaryCells(c wire.Curve, ascii bool) string {
	row, curve := "\t-\t-\t-\t-", ""
	if slices.ContainsFunc(c.Mean, func(v *float64) bool { return v != nil }) {
		s := Summarize(c)
		row = ""
		for _, v := range []float64{s.Last, s.Min, s.Mean, s.Max} {
			row += "\t" + oneCell(Quantity(v, c.Unit))
		}
		curve = Sparkline(c.Mean, sparkWidth)
	}
	if ascii {
		return row
	}
	return row + "\t" + curve
}

// oneCell is somebody else's text, which must not make columns or lines of its own.
func oneCell(s string) string {
	return strings.NewReplacer("\n", " ", "\t", " ").Replace(harmless(s))
}
