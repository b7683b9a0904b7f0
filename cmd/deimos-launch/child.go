package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/ota/slot"
)

// ending is how an agent's run ended.
type ending struct {
	stopped     bool // the launcher was told to stop
	givenUp     bool // the launcher ended the try, and has recorded that
	unstartable bool // the kernel does not take the file for a program
	code        int  // exit code; -1 if there is none
	what        string
	lived       time.Duration
}

// crash tells whether the agent ended as none does in good order, by itself.
func (e ending) crash() bool { return !e.givenUp && e.code != 0 && e.code != slot.ExitRestart }

func (e ending) String() string {
	if e.lived == 0 {
		return e.what
	}
	return fmt.Sprintf("%s after %s", e.what, e.lived.Round(time.Millisecond))
}

// run starts the agent and waits for its end, for the end of its time on trial,
// or for a signal.
func (l *launcher) run(c choice) ending {
	cmd := l.command(c)
	started := time.Now()
	if err := cmd.Start(); err != nil {
		return ending{
			code:        -1,
			what:        fmt.Sprintf("could not be started (%v)", err),
			unstartable: errors.Is(err, unix.ENOEXEC) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES),
		}
	}
	ended := make(chan ending, 1)
	go func() { ended <- reap(cmd, started) }()

	var deadline <-chan time.Time
	if c.trial {
		timer := time.NewTimer(l.confirmWithin)
		defer timer.Stop()
		deadline = timer.C
	}
	for {
		select {
		case e := <-ended:
			return e
		case s := <-l.signals:
			log.Printf("stopping on %v", s)
			e, _ := l.stop(cmd, ended)
			e.stopped = true
			return e
		case <-deadline:
			reason := fmt.Sprintf("did not confirm itself within %s", l.confirmWithin)
			if !l.failTry(c, reason, false) {
				continue // confirmed; the channel fires once
			}
			log.Printf("%s: it %s; stopping it", c, reason)
			_, signalled := l.stop(cmd, ended)
			return ending{code: -1, what: reason, givenUp: true, stopped: signalled}
		}
	}
}

func (l *launcher) command(c choice) *exec.Cmd {
	cmd := exec.Command(l.slots.Path(c.slot), l.args...)
	// The agent keeps its state where its slots are, without being told twice.
	// systemd's watchdog is fed by the agent, not by us whom systemd started: by
	// the variable that names us it would leave that to us.
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "WATCHDOG_PID=") })
	cmd.Env = append(env, slot.Env+"="+string(c.slot), "DEIMOS_STATE="+l.stateDir)
	if c.trial {
		cmd.Env = append(cmd.Env, slot.EnvConfirmWithin+"="+l.confirmWithin.String())
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// A group of its own, so that a Ctrl-C reaches it once, from here, and that
	// what it started can be found at the end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// reap waits for the agent and kills what it left behind, before its number
// can belong to anybody else.
func reap(cmd *exec.Cmd, started time.Time) ending {
	pid := cmd.Process.Pid
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	_ = unix.Kill(-pid, unix.SIGKILL)
	err := cmd.Wait()
	e := ending{code: cmd.ProcessState.ExitCode(), lived: time.Since(started)}
	switch status, _ := cmd.ProcessState.Sys().(syscall.WaitStatus); {
	case err == nil:
		e.what = "exited with code 0"
	case status.Signaled():
		e.what = fmt.Sprintf("was killed by the signal %q", status.Signal())
	default:
		e.what = fmt.Sprintf("exited with code %d", e.code)
	}
	return e
}

// stop asks the agent to end, and kills it if it does not, or on a signal.
func (l *launcher) stop(cmd *exec.Cmd, ended <-chan ending) (e ending, signalled bool) {
	_ = cmd.Process.Signal(syscall.SIGTERM)
	timer := time.NewTimer(l.stopWithin)
	defer timer.Stop()
	select {
	case e := <-ended:
		return e, false
	case <-timer.C:
		log.Printf("the agent did not stop within %s; killing it", l.stopWithin)
	case s := <-l.signals:
		log.Printf("stopping on %v; killing the agent", s)
		signalled = true
	}
	_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	return <-ended, signalled
}
