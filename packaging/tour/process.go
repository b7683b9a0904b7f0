package tour

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
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

// process is a program of the fleet that runs in the background.
type process struct {
	name string
	log  string // file with what it printed
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // valid after done
}

// starter starts processes that end with us, even if we are killed. The kernel
// ties that to the thread that started them, so one thread lives for it.
type starter struct{ jobs chan func() }

func newStarter() *starter {
	s := &starter{jobs: make(chan func())}
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the loop
		for f := range s.jobs {
			f()
		}
	}()
	return s
}

func (s *starter) end() { close(s.jobs) }

// start runs a program with its output in a log file. If ready is not empty, it
// returns once a line on standard output begins with it.
func (s *starter) start(ctx context.Context, name, log, ready string, argv ...string) (*process, error) {
	if err := os.MkdirAll(filepath.Dir(log), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := &process{name: name, log: log, cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Stderr = f
	// A group of its own: a Ctrl-C comes to us, and we end things in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.cmd.Stdout = in
	started := make(chan error)
	s.jobs <- func() { started <- p.cmd.Start() }
	err = <-started
	in.Close()
	if err != nil {
		out.Close()
		return nil, fmt.Errorf("%s cannot be started: %w", name, err)
	}
	up := make(chan struct{})
	go func() {
		defer out.Close()
		lines := bufio.NewScanner(out)
		seen := ready == ""
		for lines.Scan() {
			if !seen && strings.HasPrefix(lines.Text(), ready) {
				seen = true
				close(up)
			}
		}
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	if ready == "" {
		return p, nil
	}
	select {
	case <-up:
		return p, nil
	case <-p.done:
		return nil, fmt.Errorf("%s ended at once: %s", name, p.lastWords())
	case <-ctx.Done():
		p.stop()
		return nil, ctx.Err()
	}
}

// lastWords is the last line that a process logged.
func (p *process) lastWords() string {
	raw, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	return lines[len(lines)-1]
}

const stopLimit = 20 * time.Second

// stop asks a process to end and kills it if it does not.
func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	select {
	case <-p.done:
	case <-time.After(stopLimit):
		p.kill()
	}
}

// kill ends a process as a power cut would.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// cli runs "deimos" as an operator would and decodes its JSON into v, which may
// be nil for commands that print none.
func (t *tour) cli(ctx context.Context, v any, args ...string) error {
	if v != nil {
		args = append(args, "-o", "json")
	}
	raw, err := t.exec(ctx, "deimos", args...)
	if v != nil && len(raw) > 0 {
		if jerr := json.Unmarshal(raw, v); jerr != nil {
			return errors.Join(err, fmt.Errorf("\"deimos %s\" did not print JSON: %w", strings.Join(args, " "), jerr))
		}
	}
	return err
}

// exec runs one of our programs to its end and returns its standard output; its
// standard error becomes the error.
func (t *tour) exec(ctx context.Context, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(t.bin, program), args...)
	cmd.Env = append(os.Environ(), "DEIMOS_CONTEXT="+t.path("coordinator", "operator.json"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopLimit
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &limited{w: &errs, left: 64 << 10}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return out.Bytes(), ctx.Err()
		}
		return out.Bytes(), fmt.Errorf("\"%s %s\": %s", program, strings.Join(args, " "), said(errs.String(), err))
	}
	return out.Bytes(), nil
}

// said is what a failed command had to say, without its own name.
func said(stderr string, err error) string {
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	last := lines[len(lines)-1]
	if last == "" {
		return err.Error()
	}
	_, after, found := strings.Cut(last, ": ")
	if !found {
		return last
	}
	return after
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
