// Package proc runs the programs of a fleet as processes, for the tour and for
// the tests of the whole.
//
// Whatever it starts ends with this process, even if this one is killed, and
// is in a process group of its own, so that a Ctrl-C reaches us alone and we
// end things in order. Every wait is bounded by the caller.
package proc

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Command is a program to run.
type Command struct {
	Name string   // for messages; default: the program's file name
	Argv []string // program and arguments
	Env  []string // more of the environment, NAME=value
	Dir  string   // working directory; default: ours
	As   uint32   // user id to run as; 0: ours
	// Log is the file that standard error is appended to.
	Log string
	// Ready begins the line on standard output that [Starter.Start] waits for.
	Ready string
}

func (c Command) name() string {
	if c.Name != "" {
		return c.Name
	}
	return filepath.Base(c.Argv[0])
}

func (c Command) build(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.Argv[0], c.Argv[1:]...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Dir = c.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if c.As != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.As, Gid: c.As}
	}
	return cmd
}

// Starter starts processes. The kernel ties their end to the thread that
// started them, so one thread lives for it.
type Starter struct{ jobs chan func() }

// NewStarter makes a Starter; call [Starter.End] when all that it started has
// ended, for what still runs is killed then.
func NewStarter() *Starter {
	s := &Starter{jobs: make(chan func())}
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the loop
		for f := range s.jobs {
			f()
		}
	}()
	return s
}

// End ends the thread.
func (s *Starter) End() { close(s.jobs) }

func (s *Starter) start(cmd *exec.Cmd) error {
	started := make(chan error)
	s.jobs <- func() { started <- cmd.Start() }
	return <-started
}

// Process is a program that runs in the background.
type Process struct {
	Name string
	Log  string // file with what it logged
	cmd  *exec.Cmd
	done chan struct{}
}

// Start runs a program in the background. With Ready it returns when that line
// has come, and fails with the program's last words if it ends before. ctx
// bounds this wait, not the life of the process.
func (s *Starter) Start(ctx context.Context, c Command) (*Process, error) {
	if err := os.MkdirAll(filepath.Dir(c.Log), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &Process{Name: c.name(), Log: c.Log, cmd: c.build(context.WithoutCancel(ctx)), done: make(chan struct{})}
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.cmd.Stdout, p.cmd.Stderr = in, f
	err = s.start(p.cmd)
	in.Close()
	if err != nil {
		out.Close()
		return nil, fmt.Errorf("%s cannot be started: %w", p.Name, err)
	}
	up := make(chan struct{})
	go p.follow(out, c.Ready, up)
	if c.Ready == "" {
		return p, nil
	}
	select {
	case <-up:
		return p, nil
	case <-p.done:
		return nil, fmt.Errorf("%s ended at once: %s", p.Name, p.LastWords())
	case <-ctx.Done():
		p.Stop(termLimit)
		return nil, ctx.Err()
	}
}

// follow reads standard output to its end, which is the end of everybody who
// has it, and then the process's own.
func (p *Process) follow(out *os.File, ready string, up chan<- struct{}) {
	defer out.Close()
	lines := bufio.NewScanner(out)
	for seen := ready == ""; lines.Scan(); {
		if !seen && strings.HasPrefix(lines.Text(), ready) {
			seen = true
			close(up)
		}
	}
	_, _ = io.Copy(io.Discard, out) // after a line that was too long
	_ = p.cmd.Wait()                // ExitCode tells
	close(p.done)
}

// Done is closed when the process, and whoever shares its standard output, has
// ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ended tells whether Done is closed.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// ExitCode is that of a process that is done; -1 if a signal ended it.
func (p *Process) ExitCode() int { return p.cmd.ProcessState.ExitCode() }

// PID is the process's number.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// LastWords is the last line that the process logged.
func (p *Process) LastWords() string {
	raw, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	return lastLine(string(raw))
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// Signal sends a signal. A process that has ended is no error.
func (p *Process) Signal(s os.Signal) {
	_ = p.cmd.Process.Signal(s) // it may have ended already
}

// Stop asks the process to end, and kills it if it has not within limit. It
// returns whether it ended by itself.
func (p *Process) Stop(limit time.Duration) bool {
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return true
	case <-time.After(limit):
		p.Kill()
		return false
	}
}

// Kill ends the process as a power cut would, and waits for its end.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it may have ended already
	<-p.done
}

// Result is how a program ended that was run to its end.
type Result struct {
	Stdout []byte
	Stderr []byte // the first 64 KiB
	Code   int    // exit code; -1 if a signal ended it
}

// Said is the last line on standard error without the program's own name.
func (r Result) Said() string {
	last := lastLine(string(r.Stderr))
	if _, after, found := strings.Cut(last, ": "); found {
		return after
	}
	return last
}

const (
	maxStderr = 64 << 10
	// termLimit is how long a program has to end after its context has.
	termLimit = 20 * time.Second
)

// Run runs a program to its end. It fails if the program could not be started
// or ctx ended first, in which case the program was stopped; an exit code is
// no error.
func (s *Starter) Run(ctx context.Context, c Command) (Result, error) {
	cmd := c.build(ctx)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = termLimit
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &limited{w: &errs, left: maxStderr}
	err := s.start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	r := Result{Stdout: out.Bytes(), Stderr: errs.Bytes(), Code: cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return r, nil
	case ctx.Err() != nil:
		return r, ctx.Err()
	case errors.As(err, &exit):
		return r, nil
	}
	return r, fmt.Errorf("%s cannot be run: %w", c.name(), err)
}

// limited writes the first bytes and drops the rest.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	if _, err := l.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}
