package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/jobs"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/jobs/sandbox"
)

type jobsCmd struct {
	List   jobsListCmd   `cmd:"" default:"withargs" help:"Show which jobs there are, and why they wait or stand still."`
	Pause  jobsPauseCmd  `cmd:"" help:"Let all jobs stand still at once, also after a restart."`
	Finish jobsFinishCmd `cmd:"" help:"Let no further job begin; those that have begun go on to their end."`
	Resume jobsResumeCmd `cmd:"" help:"Take pause or finish back."`
}

func (jobsCmd) Help() string {
	return `What you say here is over everything else, works whether or not the agent runs or has a network, and
is heard by a running agent within two seconds. Jobs that stand still keep their memory, and are not lost.

  deimos-agent jobs                       what runs here?
  sudo deimos-agent jobs pause --for 2h   I need this machine
  sudo deimos-agent jobs finish           before I switch it off
  sudo deimos-agent jobs resume

What is allowed always stands in [jobs] of the agent's configuration.`
}

type jobsState struct {
	State string `default:"/var/lib/deimos" env:"DEIMOS_STATE" placeholder:"DIR" help:"Folder of the agent's state (${default})."`
}

type jobsListCmd struct {
	jobsState
	cli.Output
}

func (c *jobsListCmd) Run(ctx context.Context) error {
	j, err := within(ctx, storageLimit, c.State, func() (*agent.Jobs, error) { return agent.ReadJobs(c.State) })
	if err != nil {
		return err
	}
	if j == nil {
		j = &agent.Jobs{Run: true, Begin: true}
	}
	if j.Jobs == nil {
		j.Jobs = []jobs.Listed{}
	}
	return c.Print(j, func(w io.Writer) error { return writeJobs(w, j) })
}

// stale is longer than an agent with jobs lets pass without a note of them.
const stale = 2 * time.Minute

func writeJobs(w io.Writer, j *agent.Jobs) error {
	if j.At.IsZero() {
		fmt.Fprintln(w, "no agent has run jobs here yet")
	} else if len(j.Jobs) == 0 {
		fmt.Fprintf(w, "no jobs (as of %s)\n", j.At.Local().Format(time.DateTime))
	} else {
		var rows []string
		for _, l := range j.Jobs {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%.0f%%\t%.1f s\t%s", l.Order, l.Module[:min(12, len(l.Module))], l.State, 100*l.Progress, l.CPU, l.Code))
		}
		if err := cli.Table(w, "ORDER\tMODULE\tSTATE\tDONE\tCPU\tWHY", rows); err != nil {
			return err
		}
	}
	if len(j.Jobs) > 0 && time.Since(j.At) > stale {
		fmt.Fprintf(w, "\nas of %s; the agent does not run now, or hangs\n", j.At.Local().Format(time.DateTime))
	}
	if !j.At.IsZero() {
		fmt.Fprintf(w, "\naround each job, beside its sandbox: %s\n", wallsLine(j.Walls))
		fmt.Fprintf(w, "on the disk: %s\n", roomLine(j.Room))
	}
	if line := wordLine(j.Word, time.Now()); line != "" {
		fmt.Fprintln(w, "\n"+line)
	} else if j.Reason != "" {
		fmt.Fprintf(w, "\n%s%s\n", j.Reason, untilText(j.Until))
	}
	return nil
}

// wallsLine names the walls around jobs, and those that are missing here.
func wallsLine(have []string) string {
	var missing []string
	for _, w := range []string{sandbox.WallSeccomp, sandbox.WallLandlock, sandbox.WallCgroup} {
		if !slices.Contains(have, w) {
			missing = append(missing, w)
		}
	}
	line := cmp.Or(strings.Join(have, ", "), "no walls")
	if len(missing) > 0 {
		line += " (missing here: " + strings.Join(missing, ", ") + ")"
	}
	return line
}

// roomLine is what jobs have and may have of the disk.
func roomLine(r jobs.Room) string {
	line := cli.Bytes(r.Held)
	if r.MaxDisk > 0 {
		line += " of the " + cli.Bytes(r.MaxDisk) + " that you give to all jobs together"
	}
	if r.MaxInput > 0 {
		line += "; one job reads " + cli.Bytes(r.MaxInput) + " at most"
	}
	return line
}

func untilText(t *time.Time) string {
	if t == nil {
		return ""
	}
	return ", until " + t.Local().Format("2006-01-02 15:04")
}

// wordLine is what the owner has said; "" if that is nothing, or over.
func wordLine(w policy.Word, now time.Time) string {
	const back = "deimos-agent jobs resume takes it back"
	switch {
	case w.Paused && w.Until.IsZero():
		return "paused by you until further notice; " + back
	case w.Paused && now.Before(w.Until):
		return "paused by you until " + w.Until.Local().Format("2006-01-02 15:04") + "; " + back
	case w.Finish:
		return "no further job begins, as you said; " + back
	}
	return ""
}

type jobsPauseCmd struct {
	jobsState
	For *time.Duration `placeholder:"2h" help:"For so long. Default: until you resume."`
}

func (c *jobsPauseCmd) Run(ctx context.Context) error {
	if c.For != nil && *c.For <= 0 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("--for is a time from now on, such as 2h or 45m")}
	}
	now := time.Now()
	word := policy.Word{Paused: true, Said: now.UTC().Truncate(time.Second)}
	if c.For != nil {
		word.Until = now.Add(*c.For).UTC().Truncate(time.Second)
	}
	return c.say(ctx, word)
}

type jobsFinishCmd struct{ jobsState }

func (c *jobsFinishCmd) Run(ctx context.Context) error {
	return c.say(ctx, policy.Word{Finish: true, Said: time.Now().UTC().Truncate(time.Second)})
}

type jobsResumeCmd struct{ jobsState }

func (c *jobsResumeCmd) Run(ctx context.Context) error {
	return c.say(ctx, policy.Word{Said: time.Now().UTC().Truncate(time.Second)})
}

func (c *jobsState) say(ctx context.Context, word policy.Word) error {
	_, err := within(ctx, storageLimit, c.State, func() (struct{}, error) { return struct{}{}, agent.SayOfJobs(c.State, word) })
	if err != nil {
		return err
	}
	line := wordLine(word, time.Now())
	if line == "" {
		line = "jobs may run again, as the configuration allows"
	}
	fmt.Println(line)
	return nil
}
