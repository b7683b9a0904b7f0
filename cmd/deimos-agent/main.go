// Command deimos-agent is the firmware agent of a Deimos device.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/wire"
)

// Set by the build.
var (
	version  = "0.0.0-dev"
	released = "" // the day, 2006-01-02
)

const about = `The agent of a Deimos device: it stores chunks, runs sandboxed jobs, proves both, and updates itself.

Start with "deimos-agent probe" to see what this machine has. To join a fleet:

  deimos-agent run --coordinator https://HOST:8443 --token TOKEN

Without a token it shows a code, and waits until the fleet manager claims it.`

type commands struct {
	Run     runCmd     `cmd:"" help:"Join the fleet and serve it until stopped."`
	Status  statusCmd  `cmd:"" help:"Show how this device feels and stands with its fleet; works while the agent runs."`
	Reset   resetCmd   `cmd:"" help:"Reset this device to factory: forget its key, its fleet and all chunks."`
	Probe   probeCmd   `cmd:"" help:"Show what this machine has; needs no coordinator."`
	Disks   disksCmd   `cmd:"" help:"Show which disks would hold chunks and why, or test one."`
	Update  updateCmd  `cmd:"" help:"Show how updates stand, say yes or not now, or install from a stick."`
	Jobs    jobsCmd    `cmd:"" help:"Show the jobs on this device, or let them stand still."`
	Board   boardCmd   `cmd:"" help:"Show which board this is, list profiles of boards, or check one."`
	History historyCmd `cmd:"" help:"Show what this device has measured; works while the agent runs."`
	Sensors sensorsCmd `cmd:"" help:"Read the declared sensors once, or list which chips can be read."`
	Version versionCmd `cmd:"" help:"Show the version."`
}

func main() {
	// A job's worker is this program again; it must not parse our flags.
	if len(os.Args) > 1 && os.Args[1] == sandbox.WorkerArg {
		os.Exit(sandbox.WorkerMain())
	}
	limitMemory()
	cli.Main("deimos-agent", coded, func(ctx context.Context, args []string) error {
		return cli.Run(ctx, "deimos-agent", about, &commands{}, args)
	})
}

// memoryLimit is from where on the Go runtime collects harder, in bytes, instead of
// letting the heap double: the chunks that are under way, and what else lives, are some
// 50 MB at full load.
const memoryLimit = 72 << 20

// limitMemory leaves alone what the owner has set.
func limitMemory() {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}

type runCmd struct {
	State       string   `default:"/var/lib/deimos" env:"DEIMOS_STATE" placeholder:"DIR" help:"Folder for key, enrolment, journal and chunks (${default})."`
	Config      string   `env:"DEIMOS_CONFIG" placeholder:"FILE" help:"Configuration file (TOML)."`
	Coordinator string   `env:"DEIMOS_COORDINATOR" placeholder:"URL" help:"Where to enrol, https://HOST:8443."`
	Token       string   `env:"DEIMOS_TOKEN" placeholder:"TOKEN" help:"Fleet token, to join at once. A member needs none; one of another fleet moves it there."`
	Volume      []string `placeholder:"DIR" help:"Folder for chunks, one a disk; may be repeated. Default: the disks that the configuration allows (see deimos-agent disks), else STATE/volumes/main."`
	Floor       int64    `placeholder:"BYTES" help:"Bytes that chunks leave free on each volume's disk. Default: 512 MiB or 1%, whichever is more; on the system's disk more."`
	cli.LogFlags
}

func (r *runCmd) Run(ctx context.Context) error {
	cfg, err := agent.LoadConfig(r.Config)
	if err != nil {
		return &cli.Error{Code: cli.ExitConfig, Err: err}
	}
	if r.Coordinator != "" {
		cfg.Coordinator = r.Coordinator
	}
	if r.Token != "" {
		cfg.Token = r.Token
	}
	for _, dir := range r.Volume {
		cfg.Volumes = append(cfg.Volumes, agent.VolumeConfig{Dir: dir, Floor: r.Floor})
	}
	cfg.Floor = r.Floor
	if cfg.Released, err = releaseTime(released); err != nil {
		return err
	}
	cfg.StateDir, cfg.Version, cfg.Slot = r.State, version, os.Getenv(slot.Env)
	cfg.ConfirmWithin, _ = time.ParseDuration(os.Getenv(slot.EnvConfirmWithin)) // missing: this is no trial
	cfg.Log = cli.Logger(r.LogFormat, r.LogLevel)
	cfg.ESP = esp(cfg.Log)
	return agent.Run(ctx, cfg)
}

// esp is where the EFI system partition is mounted, if this agent is that of the
// image that runs; else "".
func esp(log *slog.Logger) string {
	dir := os.Getenv(firmware.Env)
	if dir == "" {
		return ""
	}
	raw, err := os.ReadFile("/etc/deimos-release")
	if release := strings.TrimSpace(string(raw)); release != version {
		log.Warn("the firmware cannot be updated: it and its agent have not the same version", "firmware", release, "agent", version, "error", err)
		return ""
	}
	return dir
}

// coded tells a launcher, a service manager or a script what kind of end it was.
func coded(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return nil
	case errors.Is(err, agent.ErrReboot):
		os.Exit(slot.ExitReboot)
	case errors.Is(err, agent.ErrRestart):
		os.Exit(cli.ExitRestart) // not a failure: nothing to say
	case errors.Is(err, wire.ErrToken), errors.Is(err, agent.ErrAddress):
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	case errors.Is(err, agent.ErrRefused), errors.Is(err, agent.ErrUntrusted):
		return &cli.Error{Code: cli.ExitNoPerm, Err: err}
	case errors.Is(err, agent.ErrNotEnrolled), errors.Is(err, agent.ErrConfig):
		return &cli.Error{Code: cli.ExitConfig, Err: err}
	case errors.Is(err, agent.ErrState):
		return &cli.Error{Code: cli.ExitNoCreate, Err: err}
	}
	return err
}

// releaseTime is the earliest that a day can have begun anywhere: 14 hours
// before it does at Greenwich. Without a release it is zero.
func releaseTime(day string) (time.Time, error) {
	if day == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.DateOnly, day)
	if err != nil {
		return time.Time{}, fmt.Errorf("this program was built with %q for the day of its release; it must look like 2006-01-02", day)
	}
	return t.Add(-14 * time.Hour), nil
}

type statusCmd struct {
	State string `default:"/var/lib/deimos" env:"DEIMOS_STATE" placeholder:"DIR" help:"Folder of the agent's state (${default})."`
	cli.Output
}

func (c *statusCmd) Run(ctx context.Context) error {
	s, err := within(ctx, storageLimit, c.State, func() (agent.Status, error) { return agent.ReadStatus(c.State) })
	if err != nil {
		return err
	}
	return c.Print(s, func(w io.Writer) error { return writeStatus(w, s) })
}

func writeStatus(w io.Writer, s agent.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	m := s.Machine
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(t, "%s\t%s\n", name, value)
		}
	}
	line("device", string(s.Device))
	line("standing", string(s.Standing))
	if m != nil {
		line("agent", agentLine(s))
		line("board", m.Board)
	}
	line("coordinator", s.Coordinator)
	if s.Until != nil {
		line("certificate until", s.Until.Format(time.RFC3339))
	}
	if s.ClaimCode != "" {
		line("claim code", s.ClaimCode)
		line("to let it in", "deimos device claim "+s.ClaimCode)
	}
	if m != nil {
		for i, x := range m.Scrubs {
			name := ""
			if i == 0 {
				name = "verified"
			}
			line(name, scrubLine(x))
		}
	}
	if s.Line != nil {
		line("moved", movedLine(*s.Line))
		line("line", limitsLine(s.Line.Limits))
	}
	if s.Jobs != nil {
		line("jobs", jobsLine(*s.Jobs))
		if !s.Jobs.At.IsZero() {
			line("walls around them", wallsLine(s.Jobs.Walls))
		}
	}
	if err := t.Flush(); err != nil || m == nil {
		return err
	}
	if len(m.Warnings) == 0 {
		verdict := "nothing is wrong with it"
		if !s.Running {
			verdict = "when last heard of, nothing was wrong with it"
		}
		_, err := fmt.Fprintln(w, "\n"+verdict)
		return err
	}
	for _, x := range m.Warnings {
		title := x.Title
		if x.Subject != "" {
			title += ": " + x.Subject
		}
		fmt.Fprintf(w, "\n%s  %s (since %s)\n", strings.ToUpper(string(x.Severity)), title, x.Since.Local().Format("2006-01-02 15:04"))
		for _, line := range cli.Wrap(x.Text, 76) {
			fmt.Fprintln(w, "  "+line)
		}
	}
	return nil
}

// jobsLine says how many jobs there are, and why they stand still.
func jobsLine(j agent.Jobs) string {
	count := map[string]int{}
	for _, l := range j.Jobs {
		count[l.State]++
	}
	s := "none"
	if len(j.Jobs) > 0 {
		s = fmt.Sprintf("%d running, %d suspended, %d waiting", count["running"], count["suspended"], count["waiting"])
	}
	if said := wordLine(j.Word, time.Now()); said != "" {
		return s + "; " + said
	}
	if j.Reason != "" {
		s += "; " + j.Reason + untilText(j.Until)
	}
	return s
}

// movedLine says what of the month's volume is used and left.
func movedLine(l agent.Line) string {
	s := cli.Bytes(l.Bytes)
	if l.Left != nil {
		s += " of " + cli.Bytes(l.Limits.Monthly)
	}
	if l.Month == "" {
		s += ", in a month that is not known yet"
	} else {
		s += " in " + l.Month
	}
	if l.Ahead > 0 {
		s += ", and up to " + cli.Bytes(l.Ahead) + " since this was noted"
	}
	if l.Left != nil {
		s += "; " + cli.Bytes(*l.Left) + " left"
	}
	return s
}

// limitsLine says at which rate and when chunks are moved.
func limitsLine(c agent.TransferConfig) string {
	rate := func(n int64) string {
		if n == 0 {
			return "any rate"
		}
		return cli.Bytes(n) + "/s"
	}
	hours := c.Hours.String()
	if hours == "" {
		hours = "all day"
	}
	return fmt.Sprintf("%s down, %s up, %s", rate(c.Down), rate(c.Up), hours)
}

// scrubLine says how far the scrub of a volume is.
func scrubLine(x wire.Scrub) string {
	s := x.Dir + ": "
	if x.Verified.IsZero() {
		s += "not yet as a whole"
	} else {
		s += "as a whole on " + x.Verified.Local().Format(time.DateOnly)
	}
	s += fmt.Sprintf("; %.0f%% of this round since %s, to end by %s", 100*x.Share, x.Began.Local().Format(time.DateOnly), x.Ends.Local().Format(time.DateOnly))
	if x.Lost > 0 {
		s += fmt.Sprintf("; %d chunks lost", x.Lost)
	}
	if x.Late {
		s += "; late"
	}
	if x.Problem != "" {
		s += ": " + x.Problem
	}
	return s
}

// agentLine says what the agent does, or did when it was last heard of.
func agentLine(s agent.Status) string {
	m, at := s.Machine, s.Machine.At.Local().Format(time.DateTime)
	switch {
	case s.Running && string(m.Light) == "online":
		return m.Agent + ", online"
	case s.Running && m.Online:
		return m.Agent + ", online, " + string(m.Light)
	case s.Running:
		return m.Agent + ", runs, not online"
	case m.Error != "":
		return m.Agent + ", ended at " + at + ": " + m.Error
	case m.Ended:
		return m.Agent + ", stopped in good order at " + at
	}
	return m.Agent + ", does not run and did not end in good order; last heard of at " + at
}

type resetCmd struct {
	State  string `default:"/var/lib/deimos" env:"DEIMOS_STATE" placeholder:"DIR" help:"Folder of the agent's state (${default})."`
	Config string `env:"DEIMOS_CONFIG" placeholder:"FILE" help:"Configuration file (TOML), for the volumes that it names."`
	Yes    bool   `help:"Do it; nothing can be had back."`
}

func (c *resetCmd) Run() error {
	if !c.Yes {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("this removes the device's key, its place in the fleet and every chunk that it holds; add --yes if that is meant")}
	}
	cfg, err := agent.LoadConfig(c.Config)
	if err != nil {
		return &cli.Error{Code: cli.ExitConfig, Err: err}
	}
	cfg.StateDir = c.State
	return agent.Reset(cfg)
}

type versionCmd struct {
	cli.Output
}

func (v *versionCmd) Run() error { return cli.PrintVersion(v.Output, "deimos-agent", version) }
