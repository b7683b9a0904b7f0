package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/hw/history"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

// historyFolder is where the agent keeps its ring, below its state.
const historyFolder = "history"

type historyCmd struct {
	Series []string      `arg:"" optional:"" help:"Curves to draw, such as cpu or 'temperature.*'; none: a table of all."`
	Since  time.Duration `default:"24h" help:"How far to look back (${default}); 0: as far as there is."`
	Points int           `placeholder:"N" help:"Points of a curve; default: what fits the terminal."`
	State  string        `default:"/var/lib/deimos" env:"DEIMOS_STATE" placeholder:"DIR" help:"Folder of the agent's state (${default})."`
	cli.Output
}

func (c *historyCmd) Run() error {
	ring, err := history.Load(filepath.Join(c.State, historyFolder))
	if errors.Is(err, fs.ErrNotExist) {
		return &cli.Error{Code: cli.ExitConfig, Err: fmt.Errorf("%s holds no history; start the agent, or give the folder of its state with --state", c.State)}
	}
	if err != nil {
		return err
	}
	defer ring.Close()
	style, terminal := cli.ChartFor(os.Stdout)
	h, err := ring.Read(c.request(style, terminal), time.Now())
	if p := (*wire.Problem)(nil); errors.As(err, &p) {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	if err != nil {
		return err
	}
	if c.JSON() {
		return c.Print(h, nil)
	}
	if len(h.Series) == 0 {
		return errors.New(c.nothing())
	}
	switch {
	case len(c.Series) == 0:
		err = writeSummary(cli.Plain(os.Stdout), h, terminal && !style.ASCII)
	case terminal:
		err = writeCharts(os.Stdout, h, style)
	default:
		err = writePoints(cli.Plain(os.Stdout), h)
	}
	if err == nil && len(h.LeftOut) > 0 {
		fmt.Fprintf(cli.Plain(os.Stderr), "left out, because it is too much at once: %s\n", strings.Join(h.LeftOut, " "))
	}
	return err
}

func (c *historyCmd) request(style cli.ChartStyle, terminal bool) wire.HistoryRequest {
	q := wire.HistoryRequest{Points: c.Points, Series: c.Series}
	if c.Since != 0 {
		q.From = time.Now().Add(-c.Since)
	}
	if q.Points == 0 && terminal && len(c.Series) > 0 {
		q.Points = min(2*style.Width, wire.MaxPoints) // a character shows two
	}
	return q
}

// nothing says why there is nothing to show.
func (c *historyCmd) nothing() string {
	what := "nothing was measured"
	if len(c.Series) > 0 {
		what = "nothing of that name was measured"
	}
	if c.Since != 0 {
		what += fmt.Sprintf(" in the last %v", c.Since)
	}
	return what + `; the agent writes every five minutes. Try --since 0, or no names for a table of all`
}

func writeCharts(w io.Writer, h wire.History, style cli.ChartStyle) error {
	for i, name := range slices.Sorted(maps.Keys(h.Series)) {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := cli.Chart(w, h, name, style); err != nil {
			return err
		}
	}
	return nil
}

const sparkWidth = 20

func writeSummary(w io.Writer, h wire.History, sparks bool) error {
	head := "SERIES\tMIN\tMEAN\tMAX\tLAST"
	if sparks {
		head += "\tCURVE"
	}
	var rows []string
	for _, name := range slices.Sorted(maps.Keys(h.Series)) {
		c := h.Series[name]
		s := cli.Summarize(c)
		row := name
		for _, v := range []float64{s.Min, s.Mean, s.Max, s.Last} {
			row += "\t" + cli.Quantity(v, c.Unit)
		}
		if sparks {
			row += "\t" + cli.Sparkline(c.Mean, sparkWidth)
		}
		rows = append(rows, row)
	}
	return cli.Table(w, head, rows)
}

// writePoints is for other programs and files: one line a point that was measured.
func writePoints(w io.Writer, h wire.History) error {
	var rows []string
	for _, name := range slices.Sorted(maps.Keys(h.Series)) {
		c := h.Series[name]
		least, most := c.Min, c.Max
		if least == nil || most == nil {
			least, most = c.Mean, c.Mean
		}
		for i, v := range c.Mean {
			if v == nil {
				continue
			}
			at := h.From.Add(time.Duration(math.Round(float64(i) * h.Step * float64(time.Second))))
			rows = append(rows, fmt.Sprintf("%s\t%s\t%v\t%v\t%v\t%s", at.UTC().Format(time.RFC3339), name, *v, *least[i], *most[i], c.Unit))
		}
	}
	return cli.Table(w, "TIME\tSERIES\tMEAN\tMIN\tMAX\tUNIT", rows)
}
