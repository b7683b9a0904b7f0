package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type logCmd struct {
	Since  duration   `default:"24h" help:"How far back to look (${default})."`
	Actor  name       `placeholder:"NAME" help:"What this operator did; also device:ID or coordinator."`
	Action name       `placeholder:"ACTION" help:"This action, as in device.retire, or all of a kind, as in device."`
	Device deviceFlag `placeholder:"ID" help:"What this device did or what was done to it by name."`
	Limit  int        `default:"100" help:"At most so many, the newest; 0 means all (${default})."`
	Follow bool       `short:"f" help:"Go on with what comes."`
	Verify bool       `help:"Check that no entry was altered or removed, from the first to the last."`
	Noted  string     `placeholder:"HEAD" help:"With --verify: the head that an earlier check printed; the log up to there must be the same."`
	cli.Output
}

// followEvery is how often --follow asks.
const followEvery = 2 * time.Second

func (l *logCmd) Run(ctx context.Context, all *commands) error {
	f := api.LogFilter{Since: time.Now().Add(-time.Duration(l.Since)), Actor: string(l.Actor), Action: string(l.Action), Device: wire.DeviceID(l.Device)}
	if l.Limit < 0 || l.Noted != "" && !l.Verify {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("--limit is 0 or more, and --noted goes with --verify")}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	if l.Verify {
		return l.verify(ctx, c)
	}
	list := []api.LogEntry{}
	after, err := c.Log(ctx, 0, f, func(e api.LogEntry) error {
		if list = append(list, e); l.Limit > 0 && len(list) > 2*l.Limit {
			list = append(list[:0], list[len(list)-l.Limit:]...)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if l.Limit > 0 && len(list) > l.Limit {
		list = list[len(list)-l.Limit:]
	}
	if l.Follow {
		return l.follow(ctx, c, after, f, list)
	}
	return l.Print(list, func(w io.Writer) error {
		if len(list) == 0 {
			_, err := fmt.Fprintln(w, "Nothing of that kind was done in that time. --since looks further back.")
			return err
		}
		var rows []string
		for _, e := range list {
			rows = append(rows, logRow(e))
		}
		return cli.Table(w, logHead, rows)
	})
}

const logHead = "SEQ\tTIME\tACTOR\tACTION\tTARGETS\tOUTCOME\tREASON"

// oneCell keeps what others have named from making rows of its own.
var oneCell = strings.NewReplacer("\n", " ", "\t", " ")

func logRow(e api.LogEntry) string {
	outcome := string(e.Outcome)
	if e.Of != 0 {
		outcome += fmt.Sprintf(" (%d)", e.Of)
	}
	return fmt.Sprintf("%d\t%s\t%s\t%s\t%s\t%s\t%s", e.Seq, e.At.Format(time.RFC3339), e.Actor, e.Action, oneCell.Replace(strings.Join(e.Targets, " ")), outcome, oneCell.Replace(e.Reason))
}

// follow prints until it is ended: as JSON, one page of entries after the other.
func (l *logCmd) follow(ctx context.Context, c *api.Client, after uint64, f api.LogFilter, list []api.LogEntry) error {
	t := time.NewTicker(followEvery)
	defer t.Stop()
	for {
		if len(list) > 0 {
			err := l.Print(list, func(w io.Writer) error {
				tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				for _, e := range list {
					fmt.Fprintln(tw, logRow(e))
				}
				return tw.Flush()
			})
			if err != nil {
				return err
			}
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
		list = list[:0]
		var err error
		after, err = c.Log(ctx, after, f, func(e api.LogEntry) error {
			list = append(list, e)
			return nil
		})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, api.ErrUnreachable) {
			return err
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err) // it may come back
		}
	}
}

func (l *logCmd) verify(ctx context.Context, c *api.Client) error {
	var noted api.LogHead
	if l.Noted != "" {
		var err error
		if noted, err = api.ParseLogHead(l.Noted); err != nil {
			return &cli.Error{Code: cli.ExitUsage, Err: err}
		}
	}
	head, err := c.VerifyLog(ctx, noted)
	var broken *api.BrokenLog
	if errors.As(err, &broken) {
		return fmt.Errorf("%w; what is before it is whole", broken)
	}
	if err != nil {
		return err
	}
	return l.Print(head, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "The log has %d entries, an unbroken chain.\nNote this head where the coordinator's administrators cannot change it, and check with --verify --noted HEAD later:\n%s\n",
			head.Seq, head)
		return err
	})
}
