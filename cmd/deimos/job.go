package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type jobCmd struct {
	Run     jobRunCmd     `cmd:"" help:"Run a module once, on a device that can."`
	Map     jobMapCmd     `cmd:"" help:"Run a module over each of many stored files, or of their chunks, or of the lines of a list."`
	List    jobListCmd    `cmd:"" help:"List jobs, the newest first."`
	Show    jobShowCmd    `cmd:"" help:"Show a job, what runs of it, and why the rest waits."`
	Results jobResultsCmd `cmd:"" help:"Give the results of a job, as they come."`
	Wait    jobWaitCmd    `cmd:"" help:"Wait for the end of a job."`
	Cancel  jobCancelCmd  `cmd:"" help:"Stop jobs."`
}

// limitFlags are what a job may use. Where none is given, it is an ordinary job's.
type limitFlags struct {
	Memory wire.Bytes `placeholder:"BYTES" help:"Most memory the module may use, as in 64MiB (memory_bytes)."`
	CPU    duration   `placeholder:"DURATION" help:"Most processor time it may use (cpu_seconds)."`
	Wall   duration   `placeholder:"DURATION" help:"Longest time it may take (wall_seconds)."`
	Output wire.Bytes `name:"output-bytes" placeholder:"BYTES" help:"Longest output it may write, as in 1MiB (output_bytes)."`
}

func (l limitFlags) limits() wire.JobLimits {
	return wire.JobLimits{
		MemoryBytes: int64(l.Memory), CPUSeconds: time.Duration(l.CPU).Seconds(), WallSeconds: time.Duration(l.Wall).Seconds(), OutputBytes: int64(l.Output),
	}
}

// jobFlags are what run and map have in common.
type jobFlags struct {
	Arg      []string          `sep:"none" help:"Argument for the module; may be repeated."`
	Env      map[string]string `mapsep:"none" placeholder:"KEY=VALUE" help:"Environment variable for the module; may be repeated."`
	Dataset  []string          `sep:"none" placeholder:"NAME=SET/PATH" help:"Data that the device's owner has opened, as the input /in/NAME; may be repeated."`
	Sensors  []string          `sep:"none" placeholder:"NAME=SERIES" help:"What the device has measured in a day, all series or one, as the input /in/NAME; may be repeated."`
	Write    []string          `sep:"none" placeholder:"NAME" help:"Output that the module may write, /out/NAME; may be repeated."`
	Device   deviceFlag        `placeholder:"ID" help:"Device to run on. Default: the best that can."`
	Arch     string            `placeholder:"ARCH" help:"Only on devices of this architecture: amd64, arm64, arm."`
	Compiled bool              `help:"Only on devices that compile modules: others are some 60 times slower."`
	Live     bool              `help:"Give the module the real time and real random numbers: results differ from run to run then."`
	Copies   int               `placeholder:"N" help:"Run it on so many devices and compare the results. Default: as --verify says."`
	Verify   string            `enum:"adaptive,always,none" default:"adaptive" help:"When a result is good enough: adaptive believes devices that have earned it and compares others, always wants two owners or the coordinator itself behind each, none takes the first (${default})."`
	Retries  int               `default:"3" help:"How often it is tried on another device, if one could not do it (${default})."`
	Rank     int               `help:"From -10 to 10: of two jobs that wait, the one with the higher rank goes first, then the older."`
	Deadline duration          `placeholder:"DURATION" help:"Give it up after this long. Default: 7d."`
	Limits   limitFlags        `embed:""`

	CancelOnInterrupt bool `help:"Stop the job at Ctrl-C. Without it, it goes on, and is told how to be found again."`
}

func usage(format string, args ...any) error {
	return &cli.Error{Code: cli.ExitUsage, Err: fmt.Errorf(format, args...)}
}

// spec is what the flags say of a job.
func (f jobFlags) spec() (api.JobSpec, error) {
	s := api.JobSpec{Args: f.Arg, Env: f.Env, Outputs: f.Write, Limits: f.Limits.limits(), Rank: f.Rank, Live: f.Live, Copies: f.Copies, Verify: api.Verify(f.Verify), Retries: f.Retries,
		Needs: api.JobNeeds{Device: wire.DeviceID(f.Device), Arch: f.Arch, Compiled: f.Compiled}}
	if s.Retries == 0 {
		s.Retries = -1 // 0 is for who says nothing
	}
	if f.Deadline > 0 {
		s.Deadline = time.Now().Add(time.Duration(f.Deadline))
	}
	for _, v := range f.Dataset {
		name, set, ok := strings.Cut(v, "=")
		if !ok || set == "" {
			return s, usage("--dataset is NAME=SET/PATH, as in --dataset photos=pictures/2024, not %q", v)
		}
		s.Inputs = append(s.Inputs, api.JobInput{Name: name, Dataset: set})
	}
	for _, v := range f.Sensors {
		name, series, _ := strings.Cut(v, "=")
		q := wire.HistoryRequest{From: time.Now().Add(-day).UTC(), Points: wire.MaxPoints}
		if series != "" {
			q.Series = []string{series}
		}
		s.Inputs = append(s.Inputs, api.JobInput{Name: name, Sensors: &q})
	}
	return s, nil
}

// saves reads OUTPUT=FILE, or FILE alone for standard output.
func saves(list []string) map[string]string {
	out := make(map[string]string)
	for _, v := range list {
		name, file, ok := strings.Cut(v, "=")
		if !ok {
			name, file = wire.Stdout, v
		}
		out[name] = file
	}
	return out
}

func putModule(ctx context.Context, c *api.Client, path string) (string, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("the module cannot be read: %w", err)
	}
	return c.PutModule(ctx, raw)
}

// begin uploads the module and begins the job.
func (f jobFlags) begin(ctx context.Context, all *commands, module string, s api.JobSpec) (*api.Client, api.Job, error) {
	c, err := all.client()
	if err != nil {
		return nil, api.Job{}, err
	}
	if s.Module, err = putModule(ctx, c, module); err != nil {
		return nil, api.Job{}, err
	}
	j, err := c.StartJob(ctx, s)
	return c, j, err
}

// interrupted says how a job is found again that goes on without this command, or
// stops it.
func (f jobFlags) interrupted(c *api.Client, id string, err error) error {
	if !errors.Is(err, context.Canceled) {
		return err
	}
	if !f.CancelOnInterrupt {
		fmt.Fprintf(os.Stderr, "job %s goes on; \"deimos job results %s\" gives what comes of it, \"deimos job cancel %s\" stops it\n", id, id, id)
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second) // the command's own is over
	defer cancel()
	if _, e := c.CancelJob(ctx, id, api.CancelRequest{Reason: "interrupted"}); e != nil {
		return fmt.Errorf("job %s goes on, it could not be canceled: %w", id, e)
	}
	fmt.Fprintf(os.Stderr, "job %s is canceled\n", id)
	return err
}

type jobRunCmd struct {
	Module string   `arg:"" type:"existingfile" help:"WebAssembly file (WASI preview 1)."`
	Input  []string `sep:"none" placeholder:"[NAME=]FILE" help:"Stored file. Without a name it is standard input; with one it is /in/NAME, and it may be repeated."`
	Chunk  *int     `placeholder:"N" help:"Give the module only this chunk of the file as standard input, from 0, on a device that holds it."`
	Save   []string `sep:"none" placeholder:"[NAME=]FILE" help:"Keep standard output, or the output NAME, as a stored file; may be repeated. An output that is not saved is dropped after 7 days."`
	Out    string   `type:"path" placeholder:"FOLDER" help:"Folder to write the outputs of --write to."`
	Start  bool     `help:"Do not wait for the end; print the job's id."`
	jobFlags
	Print cli.Output `embed:""`
}

func (j *jobRunCmd) Run(ctx context.Context, all *commands) error {
	s, err := j.spec()
	if err != nil {
		return err
	}
	s.Save = saves(j.Save)
	standard := false
	for _, v := range j.Input {
		name, file, named := strings.Cut(v, "=")
		if !named {
			name, file = wire.Stdin, v
		}
		switch {
		case name == wire.Stdin && standard:
			return usage("there is one standard input: give the others names, as in --input model=%s", file)
		case name == wire.Stdin && j.Chunk != nil:
			s.Input = &api.JobChunk{Object: file, Chunk: *j.Chunk}
		default:
			s.Inputs = append(s.Inputs, api.JobInput{Name: name, Object: file})
		}
		standard = standard || name == wire.Stdin
	}
	if j.Chunk != nil && s.Input == nil {
		return usage("--chunk is for a file that is standard input, as in --input FILE --chunk %d", *j.Chunk)
	}
	c, job, err := j.begin(ctx, all, j.Module, s)
	if err != nil {
		return err
	}
	if j.Start {
		return j.Print.Print(job, func(w io.Writer) error {
			_, err := fmt.Fprintln(w, job.ID)
			return err
		})
	}
	line := watchJob(ctx, c, job)
	r, err := c.JobOutcome(ctx, job.ID)
	line.end()
	if err != nil {
		return j.interrupted(c, job.ID, err)
	}
	if j.Out != "" {
		if err := writeOutputs(ctx, c, j.Out, r, false); err != nil {
			return err
		}
	}
	return j.Print.Print(r, func(w io.Writer) error {
		fmt.Fprintf(cli.Plain(os.Stderr), "device %s, %.2f s of CPU, %s, output sha256 %s, signed\n",
			r.Device, r.Result.CPUSeconds, r.Result.Engine, cli.Short(r.Result.Output))
		fmt.Fprintf(cli.Plain(os.Stderr), "%s\n", verifiedText(r.JobTask))
		if r.Reason != "" {
			fmt.Fprintf(cli.Plain(os.Stderr), "%s\n", r.Reason)
		}
		if !cli.Terminal(os.Stdout) {
			w = os.Stdout // a program gets the output as it is
		}
		_, err := w.Write(r.Output)
		return err
	})
}

// verifiedText says who stands behind a result.
func verifiedText(t api.JobTask) string {
	switch t.VerifiedBy {
	case api.ByOwners:
		return "verified: devices of different owners have the same result"
	case api.ByCoordinator:
		return "verified: the coordinator has run it itself"
	case api.ByReputation:
		return "verified by reputation: the device's results were confirmed often enough"
	case api.ByMost:
		return "not verified for sure: devices differ, and most have this result"
	}
	if t.Unverified == nil {
		return "unverified"
	}
	return fmt.Sprintf("unverified: %s (%s)", cell(t.Unverified.Reason), t.Unverified.Code)
}

// verifiedCount says in short who stands behind the results of a job.
func verifiedCount(j api.Job) string {
	words := map[api.VerifiedBy]string{api.ByOwners: "by other owners", api.ByCoordinator: "by the coordinator", api.ByReputation: "by reputation", api.ByMost: "by most", api.ByNobody: "unverified"}
	var parts []string
	for _, by := range api.VerifiedBys {
		if n := j.Verified[by]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, words[by]))
		}
	}
	if j.Corrected > 0 {
		parts = append(parts, fmt.Sprintf("%d corrected or retracted", j.Corrected))
	}
	return strings.Join(parts, ", ")
}

type jobMapCmd struct {
	Module string   `arg:"" type:"existingfile" help:"WebAssembly file (WASI preview 1)."`
	Over   []string `sep:"none" xor:"over" placeholder:"PREFIX*|FILE" help:"Stored files: all whose names begin so, or one; may be repeated."`
	Args   string   `name:"arg-file" short:"a" xor:"over" placeholder:"FILE" help:"Instead: a file of this machine, or - for standard input, of which each line is the arguments of one task, after those of --arg. Blanks divide them, but within quotes, as for xargs -L 1."`
	Per    string   `enum:"file,chunk" default:"file" help:"What one task gets: a whole file, or one chunk of it: ${enum}."`
	As     string   `placeholder:"NAME" help:"Give each task its file as /in/NAME. Without it, it is standard input."`
	Input  []string `sep:"none" placeholder:"NAME=FILE" help:"Stored file that every task gets, as /in/NAME; may be repeated."`
	Save   []string `sep:"none" placeholder:"[NAME=]FILE" help:"Keep standard output, or the output NAME, of each task as a stored file, with {} for the task's name, as in thumbs/{}; may be repeated."`
	Start  bool     `help:"Do not wait for results; print the job's id."`
	jobFlags
	resultFlags
}

// resultFlags are where results go.
type resultFlags struct {
	Out string `type:"path" placeholder:"FOLDER" help:"Folder to write outputs to, one file a task, or one folder where there are outputs with names. Default: a line for each on standard output."`
	cli.Output
}

func (j *jobMapCmd) Run(ctx context.Context, all *commands) error {
	s, err := j.spec()
	if err != nil {
		return err
	}
	s.Save = saves(j.Save)
	s.Over = &api.JobOver{PerChunk: j.Per == "chunk", As: j.As}
	if j.Args != "" {
		if s.Over.Args, err = argLines(j.Args); err != nil {
			return err
		}
	} else if len(j.Over) == 0 {
		return usage("there is nothing to run it over: name stored files, as in --over 'photos/*', or a list of arguments, as in --arg-file LIST")
	}
	for _, v := range j.Over {
		if prefix, ok := strings.CutSuffix(v, "*"); ok || strings.HasSuffix(v, "/") {
			if s.Over.Prefix != "" || prefix == "" || len(j.Over) > 1 {
				return usage("--over takes one beginning of names, as in --over 'photos/*', or names of files")
			}
			s.Over.Prefix = prefix
			continue
		}
		s.Over.Names = append(s.Over.Names, v)
	}
	for _, v := range j.Input {
		name, file, ok := strings.Cut(v, "=")
		if !ok {
			return usage("what every task gets has a name, as in --input model=%s", v)
		}
		s.Inputs = append(s.Inputs, api.JobInput{Name: name, Object: file})
	}
	c, job, err := j.begin(ctx, all, j.Module, s)
	if err != nil {
		return err
	}
	if j.Start {
		return j.Print(job, func(w io.Writer) error {
			_, err := fmt.Fprintln(w, job.ID)
			return err
		})
	}
	fmt.Fprintf(os.Stderr, "job %s, %s\n", job.ID, cli.Count(job.Tasks, "task"))
	return j.interrupted(c, job.ID, j.collect(ctx, c, job))
}

// collect takes results as they come, and is an error if a task failed.
func (f resultFlags) collect(ctx context.Context, c *api.Client, job api.Job) error {
	line := watchJob(ctx, c, job)
	failed := 0
	err := c.EachJobResult(ctx, job.ID, func(r api.JobResult) error {
		if r.Err() != nil {
			failed++
		}
		line.hide()
		return f.take(ctx, c, job, r)
	}, nil)
	line.end()
	if err != nil {
		return err
	}
	if job, err = c.Job(ctx, job.ID, 0); err != nil {
		return err
	}
	if text := verifiedCount(job); text != "" && !f.JSON() {
		fmt.Fprintf(cli.Plain(os.Stderr), "results: %s\n", text)
	}
	if job.State != wire.Succeeded || failed > 0 {
		return fmt.Errorf("job %s is %s: %s (%d of %s succeeded)", job.ID, job.State, cmp.Or(job.Reason, "not all results can be given"), job.Succeeded, cli.Count(job.Tasks, "task"))
	}
	return nil
}

// take puts one result where it belongs.
func (f resultFlags) take(ctx context.Context, c *api.Client, job api.Job, r api.JobResult) error {
	if f.Out != "" && r.Err() == nil {
		if err := writeOutputs(ctx, c, f.Out, r, job.Tasks > 1); err != nil {
			return err
		}
	}
	switch {
	case f.JSON() && f.Out != "":
		r.Output = nil // it is in a file
		return cli.Line(os.Stdout, r)
	case f.JSON():
		return cli.Line(os.Stdout, r)
	}
	name := cell(cmp.Or(strings.Join(r.Args, " "), r.Name, fmt.Sprint("task ", r.Task)))
	if err := r.Err(); err != nil {
		fmt.Fprintf(cli.Plain(os.Stderr), "%s: %s (%s)\n", name, err, cmp.Or(r.Code, string(r.State)))
		return nil
	}
	if f.Out != "" {
		return nil
	}
	first, _, more := strings.Cut(strings.TrimRight(string(r.Output), "\n"), "\n")
	if more {
		first += " …"
	}
	_, err := fmt.Fprintf(cli.Plain(os.Stdout), "%s\t%s\n", name, first)
	return err
}

// writeOutputs writes what a task has made below a folder: of one task among many
// below its name. What its device made is checked against what it has signed for.
func writeOutputs(ctx context.Context, c *api.Client, dir string, r api.JobResult, many bool) error {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir) // a name from the fleet leads nowhere else
	if err != nil {
		return err
	}
	defer root.Close()
	place := func(name string) string { return name }
	if many {
		task := strings.TrimPrefix(path.Clean("/"+cmp.Or(r.Name, fmt.Sprint(r.Task))), "/")
		place = func(name string) string { return path.Join(task, name) }
		if len(r.Result.Outputs) == 0 {
			place = func(string) string { return task }
		}
	}
	write := func(name string, from func(io.Writer) error) error {
		at := place(name)
		if err := root.MkdirAll(path.Dir(at), 0o777); err != nil {
			return err
		}
		f, err := root.Create(at)
		if err != nil {
			return fmt.Errorf("the output of %s cannot be written: %w", cmp.Or(r.Name, "the job"), err)
		}
		return errors.Join(from(f), f.Close())
	}
	err = write(wire.Stdout, func(w io.Writer) error {
		_, err := w.Write(r.Output)
		return err
	})
	for _, o := range r.Result.Outputs {
		if err != nil {
			break
		}
		if o.Name == wire.Stdout {
			continue
		}
		err = write(o.Name, func(w io.Writer) error {
			h := sha256.New()
			for _, p := range o.Parts {
				data, err := c.GetChunk(ctx, p.Chunk)
				if err != nil {
					return err
				}
				if _, err := io.MultiWriter(w, h).Write(data); err != nil {
					return err
				}
			}
			if got := hex.EncodeToString(h.Sum(nil)); got != o.SHA256 {
				return fmt.Errorf("the output %s has the digest %s, device %s has signed for %s", o.Name, cli.Short(got), r.Device, cli.Short(o.SHA256))
			}
			return nil
		})
	}
	return err
}

// jobLine is a line on a terminal that says how far a job is. Where nobody watches,
// it says nothing.
type jobLine struct {
	hidden atomic.Bool
	stop   context.CancelFunc
	ended  chan struct{}
}

// watchJob shows how far a job is, until end.
func watchJob(ctx context.Context, c *api.Client, j api.Job) *jobLine {
	ctx, stop := context.WithCancel(ctx)
	l := &jobLine{stop: stop, ended: make(chan struct{})}
	if !cli.Terminal(os.Stderr) {
		close(l.ended)
		return l
	}
	go func() {
		defer close(l.ended)
		began := time.Now()
		// What cannot be asked for the line, the command itself says.
		_, _ = c.AwaitJob(ctx, j.ID, func(j api.Job) {
			fmt.Fprint(os.Stderr, "\r\x1b[K")
			fmt.Fprint(cli.Plain(os.Stderr), jobText(j, time.Since(began)))
			l.hidden.Store(false)
		})
		l.hide()
	}()
	return l
}

func (l *jobLine) hide() {
	if cli.Terminal(os.Stderr) && !l.hidden.Swap(true) {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}

func (l *jobLine) end() {
	l.stop()
	<-l.ended
}

// jobText is how far a job is, in a line.
func jobText(j api.Job, since time.Duration) string {
	const width = 30
	if j.Tasks == 1 {
		text := string(j.State)
		if j.Waits != nil && j.Running == 0 {
			text += ": " + cell(j.Waits.Reason)
		}
		for _, t := range j.Open {
			if t.Code != "" {
				text = t.Code + ": " + cell(t.Reason)
				continue
			}
			for _, a := range t.Attempts {
				if a.Ended.IsZero() {
					text = fmt.Sprintf("%s on %s %3.0f%%", a.State, a.Device, 100*min(max(a.Progress, 0), 1))
					if a.Code != "" {
						text += ", stands still: " + cell(cmp.Or(a.Reason, a.Code))
					}
				}
			}
		}
		return text
	}
	done := j.Succeeded + j.Failed
	n := width * done / max(j.Tasks, 1)
	text := fmt.Sprintf("[%s%s] %d/%d, %d run", strings.Repeat("=", n), strings.Repeat(" ", width-n), done, j.Tasks, j.Running)
	if j.Failed > 0 {
		text += fmt.Sprintf(", %d failed", j.Failed)
	}
	if done > 0 && done < j.Tasks {
		text += ", " + (since * time.Duration(j.Tasks-done) / time.Duration(done)).Round(time.Second).String() + " left"
	}
	if j.Waits != nil && j.Running == 0 {
		text += "; " + cell(j.Waits.Reason)
	}
	return text
}

type jobListCmd struct {
	State   string `placeholder:"STATE" help:"Only those in this state: QUEUED, RUNNING, SUCCEEDED, FAILED, TIMED_OUT or CANCELED."`
	Pending bool   `help:"Only those that have not ended."`
	Limit   int    `default:"100" help:"At most so many (${default})."`
	cli.Output
}

func (l *jobListCmd) Run(ctx context.Context, all *commands) error {
	if l.Limit < 1 || l.Limit > api.MaxOrders {
		return usage("a list has 1 to %d jobs", api.MaxOrders)
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Jobs(ctx, api.JobQuery{State: wire.State(l.State), Pending: l.Pending, Limit: l.Limit})
	if err != nil {
		return err
	}
	return l.Print(list, func(w io.Writer) error {
		if len(list.Jobs) == 0 {
			_, err := fmt.Fprintln(w, "No job fits.")
			return err
		}
		var rows []string
		for _, j := range list.Jobs {
			why := j.Reason
			if j.Waits != nil {
				why = "waits: " + j.Waits.Reason
			}
			rows = append(rows, fmt.Sprintf("%s\t%s\t%d/%d\t%d\t%s\t%s", j.ID, j.State, j.Succeeded, j.Tasks, j.Failed, cli.Ago(j.Created), cell(why)))
		}
		if err := cli.Table(w, "JOB\tSTATE\tDONE\tFAILED\tBEGAN\tWHY", rows); err != nil {
			return err
		}
		if list.Cut != "" {
			fmt.Fprintf(cli.Plain(os.Stderr), "(%s)\n", list.Cut)
		}
		return nil
	})
}

type jobShowCmd struct {
	ID string `arg:"" help:"Job id."`
	cli.Output
}

func (s *jobShowCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	j, err := c.Job(ctx, s.ID, 0)
	if err != nil {
		return err
	}
	return s.Print(j, func(w io.Writer) error { return writeJob(w, j) })
}

// writeJob shows a job to a person.
func writeJob(w io.Writer, j api.Job) error {
	row := func(k, format string, args ...any) { fmt.Fprintf(w, "%-9s%s\n", k, cell(fmt.Sprintf(format, args...))) }
	row("job", "%s", j.ID)
	row("module", "%s", cli.Short(j.Spec.Module))
	if j.By != "" {
		row("by", "%s", j.By)
	}
	row("began", "%s", j.Created.Format(time.RFC3339))
	row("until", "%s", j.Spec.Deadline.Format(time.RFC3339))
	row("state", "%s", j.State)
	if j.Reason != "" {
		row("because", "%s (%s)", j.Reason, j.Code)
	}
	row("tasks", "%d of %d succeeded, %d failed, %d run", j.Succeeded, j.Tasks, j.Failed, j.Running)
	if text := verifiedCount(j); text != "" {
		row("results", "%s", text)
	}
	if j.Waits != nil {
		row("waits", "%s (%s)", j.Waits.Reason, j.Waits.Code)
	}
	var rows []string
	for _, t := range j.Wrong {
		for _, c := range t.Corrections {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s", cell(cmp.Or(t.Name, fmt.Sprint(t.Task))), c.Device, cli.Ago(c.At), cell(c.Reason), cell(verifiedText(t))))
		}
	}
	if len(rows) > 0 {
		fmt.Fprintln(w)
		if err := cli.Table(w, "WRONG\tDEVICE\tFOUND\tWHY\tNOW", rows); err != nil {
			return err
		}
		rows = nil
	}
	for _, t := range j.Open {
		if t.Code != "" {
			rows = append(rows, fmt.Sprintf("%s\t\t%s\t\t%s", cell(cmp.Or(t.Name, fmt.Sprint(t.Task))), t.Code, cell(t.Reason)))
		}
		for _, a := range t.Attempts {
			state := fmt.Sprintf("%s %3.0f%%", a.State, 100*a.Progress)
			if !a.Ended.IsZero() {
				state = string(a.State)
			}
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s", cell(cmp.Or(t.Name, fmt.Sprint(t.Task))), a.Device, state, cli.Ago(a.Began), cell(a.Reason)))
		}
	}
	if len(rows) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	return cli.Table(w, "TASK\tDEVICE\tSTATE\tBEGAN\tWHY", rows)
}

type jobResultsCmd struct {
	ID string `arg:"" help:"Job id."`
	resultFlags
}

func (r *jobResultsCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	j, err := c.Job(ctx, r.ID, 0)
	if err != nil {
		return err
	}
	return r.collect(ctx, c, j)
}

type jobWaitCmd struct {
	ID      string   `arg:"" help:"Job id."`
	Timeout duration `placeholder:"DURATION" help:"Wait up to this long; exit code 75 if it has not ended by then. Default: until its end."`
	cli.Output
}

func (j *jobWaitCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.Job(ctx, j.ID, 0)
	if err != nil {
		return err
	}
	wait := ctx
	if j.Timeout > 0 {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, time.Duration(j.Timeout))
		defer cancel()
	}
	line := watchJob(wait, c, v)
	end, err := endOf(ctx, wait,
		func(ctx context.Context) (api.Job, error) { return c.AwaitJob(ctx, j.ID, nil) },
		func(ctx context.Context) (api.Job, error) { return c.Job(ctx, j.ID, 0) })
	line.end()
	if err != nil {
		return err
	}
	if err := j.Print(end, func(w io.Writer) error { return writeJob(w, end) }); err != nil {
		return err
	}
	switch {
	case !end.State.Terminal():
		return notEnded(j.Timeout, "job "+j.ID, end.State)
	case end.State != wire.Succeeded:
		return fmt.Errorf("job %s is %s: %s", j.ID, end.State, end.Reason)
	}
	return nil
}

type jobCancelCmd struct {
	IDs    []string `arg:"" name:"job" help:"Job ids."`
	Reason string   `placeholder:"TEXT" help:"Why, for the record."`
	cli.Output
}

func (j *jobCancelCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	done, failed, err := cancelEach(ctx, j.IDs, func(id string) (api.Job, error) {
		return c.CancelJob(ctx, id, api.CancelRequest{Reason: j.Reason})
	})
	if err != nil {
		return err
	}
	err = j.Print(done, func(w io.Writer) error {
		for _, v := range done {
			fmt.Fprintf(w, "%s  cancel asked; what runs is told to stop\n", v.ID)
		}
		return nil
	})
	return errors.Join(append(failed, err)...)
}
