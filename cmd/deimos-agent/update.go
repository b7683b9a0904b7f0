package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

type updateCmd struct {
	From    updateFromCmd    `cmd:"" default:"withargs" help:"Install from a folder or a file, such as a stick; without one, show how updates stand."`
	Status  updateStatusCmd  `cmd:"" help:"Show how updates stand, and what one waits for."`
	Approve updateApproveCmd `cmd:"" help:"Let the version be installed that waits."`
	Defer   updateDeferCmd   `cmd:"" help:"Let no version be installed for a while."`
}

func (updateCmd) Help() string {
	return `Updates come by themselves, signed by the fleet's release keys. What you allow them beforehand stands in [updates] of
the agent's configuration; what you say here is heard by a running agent within two seconds.

  deimos-agent update                          what runs, and does something wait?
  sudo deimos-agent update approve             yes (with consent = "ask")
  sudo deimos-agent update approve --now       yes, and not only in the window
  sudo deimos-agent update defer --for 48h     not now
  sudo deimos-agent update /media/usb          from a stick: the same checks, no network

A stick holds what "deimos release publish" makes, or a file that "tar" made of it.`
}

type updateState struct {
	State string `default:"/var/lib/deimos" env:"DEIMOS_STATE" placeholder:"DIR" help:"Folder of the agent's state (${default})."`
}

func (c *updateState) read(ctx context.Context) (agent.Updates, error) {
	return within(ctx, storageLimit, c.State, func() (agent.Updates, error) { return agent.ReadUpdates(c.State) })
}

// say changes the owner's word.
func (c *updateState) say(ctx context.Context, change func(agent.Updates, *agent.UpdateWord) error) error {
	u, err := c.read(ctx)
	if err != nil {
		return err
	}
	word := u.Word
	word.Said = time.Now().UTC().Truncate(time.Second)
	if err := change(u, &word); err != nil {
		return err
	}
	_, err = within(ctx, storageLimit, c.State, func() (struct{}, error) { return struct{}{}, agent.SayOfUpdates(c.State, word) })
	return err
}

type updateStatusCmd struct {
	updateState
	cli.Output
}

func (c *updateStatusCmd) Run(ctx context.Context) error {
	u, err := c.read(ctx)
	if err != nil {
		return err
	}
	return c.Print(u, func(w io.Writer) error { return writeUpdates(w, u, time.Now()) })
}

func writeUpdates(w io.Writer, u agent.Updates, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(t, "%s\t%s\n", name, value)
		}
	}
	line("runs", u.Runs)
	line("update", updateLine(u))
	if u.Update.Why != nil {
		for i, l := range cli.Wrap(u.Update.Why.Reason, 76) {
			line(map[bool]string{true: "it waits"}[i == 0], l)
			if i > 0 {
				fmt.Fprintf(t, "\t%s\n", l)
			}
		}
		if until := u.Update.Why.Until; until != nil {
			line("until", until.Local().Format("2006-01-02 15:04"))
		}
	}
	if u.Word.Until.After(now) {
		line("you said", "not before "+u.Word.Until.Local().Format("2006-01-02 15:04"))
	} else if u.Word.Approved != "" {
		line("you said", "version "+u.Word.Approved+" may be installed")
	}
	if e := u.Update.Ended; e != nil {
		line("the last", strings.TrimSpace(e.Version+" "+endedText(e))+", "+e.At.Local().Format("2006-01-02 15:04"))
		if e.Reason != "" {
			for _, l := range cli.Wrap(e.Reason, 76) {
				fmt.Fprintf(t, "\t%s\n", l)
			}
		}
	}
	line("nothing below", u.Floor)
	return t.Flush()
}

func updateLine(u agent.Updates) string {
	r := u.Update
	if r.Phase == slot.Idle {
		return "none under way"
	}
	s := string(r.Phase)
	if r.Version != "" {
		s = r.Version + ", " + s
	}
	if r.Local != "" {
		s += ", from " + r.Local
	}
	return s
}

func endedText(e *ota.Ended) string {
	if e.State == wire.Succeeded {
		return "was installed"
	}
	return "was not installed (" + e.Code + ")"
}

type updateApproveCmd struct {
	updateState
	Version string `arg:"" optional:"" help:"The version; that which waits, if left out."`
	Now     bool   `help:"At once, whatever the window is."`
}

func (c *updateApproveCmd) Run(ctx context.Context) error {
	err := c.say(ctx, func(u agent.Updates, word *agent.UpdateWord) error {
		if c.Version == "" && u.Update.Phase == slot.Waiting {
			c.Version = u.Update.Version
		}
		if c.Version == "" && word.Until.IsZero() {
			return &cli.Error{Code: cli.ExitUsage, Err: errors.New("no update waits now; name the version that you expect")}
		}
		if c.Version != "" {
			if err := bundle.CheckVersion(c.Version); err != nil {
				return &cli.Error{Code: cli.ExitUsage, Err: err}
			}
		}
		word.Approved, word.Now, word.Until = c.Version, c.Now, time.Time{}
		return nil
	})
	if err == nil {
		text := "updates are not put off any more"
		if c.Version != "" {
			text = "version " + c.Version + " may be installed"
		}
		fmt.Println(text)
	}
	return err
}

type updateDeferCmd struct {
	updateState
	For *time.Duration `default:"24h" placeholder:"24h" help:"For so long (${default})."`
}

func (c *updateDeferCmd) Run(ctx context.Context) error {
	if *c.For <= 0 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("--for is a time from now on, such as 48h")}
	}
	until := time.Now().Add(*c.For).UTC().Truncate(time.Second)
	err := c.say(ctx, func(_ agent.Updates, word *agent.UpdateWord) error {
		word.Until, word.Approved, word.Now = until, "", false
		return nil
	})
	if err == nil {
		fmt.Printf("no update is installed before %s; deimos-agent update approve takes that back\n", until.Local().Format("2006-01-02 15:04"))
	}
	return err
}

type updateFromCmd struct {
	updateState
	Place   string `arg:"" optional:"" help:"Folder or file."`
	Version string `placeholder:"VERSION" help:"The version to install. Default: the newest there."`
	cli.Output
}

// look is how often who waits for an update looks how far it is.
const look = 200 * time.Millisecond

func (c *updateFromCmd) Run(ctx context.Context) error {
	if c.Place == "" {
		return (&updateStatusCmd{c.updateState, c.Output}).Run(ctx)
	}
	place, err := filepath.Abs(c.Place)
	if err != nil {
		return err
	}
	wish := agent.Wish{ID: rand.Text(), Place: place, Version: c.Version, At: time.Now().UTC().Truncate(time.Second)}
	err = c.say(ctx, func(u agent.Updates, word *agent.UpdateWord) error {
		if !u.Running {
			return errors.New("no agent runs with " + c.State + ": start it first (it is the agent that installs), or name its folder with --state")
		}
		word.Wish = &wish
		return nil
	})
	if err != nil {
		return err
	}
	return c.await(ctx, ota.LocalOrder(wish.ID))
}

// await shows how far the update is, over the restart of the agent, to its end.
func (c *updateFromCmd) await(ctx context.Context, order string) error {
	said := ""
	for {
		u, err := c.read(ctx)
		if err != nil {
			return err
		}
		r := u.Update
		if e := r.Ended; e != nil && e.Order == order {
			if e.State != wire.Succeeded {
				return fmt.Errorf("%s (%s)", e.Reason, e.Code)
			}
			return c.Print(e, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "version %s is installed, and does no worse than the one before\n", e.Version)
				return err
			})
		}
		if line := updateLine(u); r.Order == order && line != said {
			said = line
			fmt.Fprintln(os.Stderr, line)
		}
		select {
		case <-ctx.Done():
			fmt.Fprintln(os.Stderr, "the update goes on; deimos-agent update status tells how it ends")
			return ctx.Err()
		case <-time.After(look):
		}
	}
}
