package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/history"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type historyCmd struct {
	Series []string       `arg:"" optional:"" help:"Curves to draw, such as cpu or 'temperature.*'; none: a table of all."`
	Since  *time.Duration `placeholder:"24h" help:"How far to look back; 0: as far as there is; default: 24h, or from the first that was measured in it."`
	Points int            `placeholder:"N" help:"Points of a curve; default: what fits the terminal."`
	State  string         `default:"/var/lib/deimos" env:"DEIMOS_STATE" placeholder:"DIR" help:"Folder of the agent's state (${default})."`
	cli.Output
}

// storageLimit is how long a command waits for the agent's folder, whose disk may hang.
const storageLimit = 20 * time.Second

func (c *historyCmd) Run(ctx context.Context) error {
	style, terminal := cli.ChartFor(os.Stdout)
	h, err := within(ctx, storageLimit, c.State, func() (wire.History, error) { return c.read(c.request(style, terminal)) })
	if err != nil {
		return err
	}
	if c.JSON() {
		return c.Print(h, nil)
	}
	if len(h.Series) == 0 {
		return errors.New(c.nothing())
	}
	if len(c.Series) > 0 && !terminal {
		if err := writePoints(cli.Plain(os.Stdout), h); err != nil {
			return err
		}
		return cli.WriteLeftOut(cli.Plain(os.Stderr), h)
	}
	style.ASCII = style.ASCII || !terminal
	return cli.WriteHistory(os.Stdout, h, len(c.Series) > 0, style)
}

// within does what reads a folder. What does not return in time, or when ctx
// ends, is left behind: nothing gets it out of a disk that hangs.
func within[T any](ctx context.Context, limit time.Duration, dir string, read func() (T, error)) (T, error) {
	type answer struct {
		v   T
		err error
	}
	a, ok := hw.Within(ctx, limit, dir, func() answer {
		v, err := read()
		return answer{v, err}
	})
	switch {
	case ok:
		return a.v, a.err
	case ctx.Err() != nil:
		return a.v, ctx.Err()
	}
	return a.v, fmt.Errorf("%s does not answer for %s: its disk may hang; \"journalctl -k\" shows what the system says of it", dir, limit)
}

// read reads what is asked for; a young device's from its first point on.
func (c *historyCmd) read(q wire.HistoryRequest) (h wire.History, err error) {
	ring, err := history.Load(filepath.Join(c.State, agent.HistoryDir))
	if errors.Is(err, fs.ErrNotExist) {
		return h, &cli.Error{Code: cli.ExitConfig, Err: fmt.Errorf("%s holds no history; start the agent, or give the folder of its state with --state", c.State)}
	}
	if err != nil {
		return h, err
	}
	defer ring.Close()
	h, err = ring.Read(q, time.Now())
	if at, mostly := cli.MostlyEmpty(h); err == nil && mostly && c.Since == nil {
		q.From = at
		h, err = ring.Read(q, time.Now())
	}
	if p := (*wire.Problem)(nil); errors.As(err, &p) {
		return h, &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	return h, err
}

func (c *historyCmd) request(style cli.ChartStyle, terminal bool) wire.HistoryRequest {
	q := wire.HistoryRequest{Points: c.Points, Series: c.Series}
	if since := c.since(); since != 0 {
		q.From = time.Now().Add(-since)
	}
	if q.Points == 0 && terminal && len(c.Series) > 0 {
		q.Points = min(2*style.Width, wire.MaxPoints) // a character shows two
	}
	return q
}

func (c *historyCmd) since() time.Duration {
	if c.Since == nil {
		return 24 * time.Hour
	}
	return *c.Since
}

// nothing says why there is nothing to show.
func (c *historyCmd) nothing() string {
	what, try := "nothing was measured", "the agent writes every five minutes, for the first time five minutes after its start"
	if len(c.Series) > 0 {
		what, try = "nothing of that name was measured", "no names show a table of all; the agent writes every five minutes"
	}
	if since := c.since(); since != 0 {
		what += fmt.Sprintf(" in the last %v", since)
		if c.Since == nil && len(c.Series) == 0 {
			return what + "; " + try // most likely it is young
		}
		try += "; --since 0 looks as far back as there is"
	}
	return what + "; " + try
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
