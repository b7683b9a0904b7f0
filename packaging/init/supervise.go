package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/ota/slot"
)

const (
	firstPause = time.Second
	mostPause  = 15 * time.Second // an agent that crashed leaves the machine's watchdog armed: 60 s where it can be so long
	steady     = 10 * time.Minute // an agent that lived so long starts with firstPause again
	agentLine  = 4 << 10          // bytes of a line of the agent's that are kept

	// How long an agent that would end at once, for want of something to be told, is
	// left alone: nothing but news changes that.
	toldNothing = 15 * time.Minute
	exitConfig  = 78 // EX_CONFIG of sysexits.h: it cannot work with what it is told
)

// supervisor runs the agent for as long as the machine runs. Exit code 75
// ([slot.ExitRestart]) asks for another start at once, 79 ([slot.ExitReboot]) for one
// of the machine; after 78 it is left alone until there is news, or for
// toldNothing; after any other end there is a pause, which doubles.
// Nothing makes it give up: a device that nobody visits has nothing better to do.
type supervisor struct {
	processes  *processes
	command    func() (argv, env []string) // asked before each start
	say        func(line string)           // each line of the agent's
	log        *slog.Logger
	dog        *startDog       // hands the machine's watchdog to each agent
	kick       <-chan struct{} // there is news for the agent's command: ends a pause, and an agent that was started without it
	waits      func() bool     // there is nobody that the agent could come to; nil: there is
	stopWithin time.Duration
	first      time.Duration // pause
	crashed    func()        // after an end that nobody asked for; nil: nothing
	ended      func() bool   // after any end but those that we asked for; true: the machine is started anew for it; nil: nothing
	reboot     func()        // the agent asks for it; nil: nothing
}

// run returns once ctx has ended and the agent with it.
func (s *supervisor) run(ctx context.Context) {
	pause := s.first
	s.awaitNews(ctx)
	for ctx.Err() == nil {
		began := time.Now()
		end := s.once(ctx)
		if ctx.Err() != nil {
			return
		}
		lived := time.Since(began)
		if lived >= steady {
			pause = s.first
		}
		if end.news {
			s.log.Info("the agent is started again with what was found out")
			pause = s.first
			continue
		}
		anew := s.ended != nil && s.ended()
		if end.reboot && lived >= s.first && s.reboot != nil {
			s.reboot()
			anew = true
		}
		if anew {
			s.log.Info("the agent ended; the machine is started anew", "end", end.text, "lived", lived.Round(time.Millisecond))
			s.wait(ctx, mostPause) // it comes before that is over
			continue
		}
		if end.again && lived >= s.first {
			s.log.Info("the agent asks to be started again")
			continue
		}
		if s.crashed != nil && !end.again && !end.reboot {
			s.crashed()
		}
		if end.config {
			s.log.Warn("the agent cannot work with what it is told; it is started again when there is news", "end", end.text, "in", max(pause, toldNothing))
			s.wait(ctx, max(pause, toldNothing))
			pause = s.first
			continue
		}
		s.log.Error("the agent ended; it is started again", "end", end.text, "lived", lived.Round(time.Millisecond), "in", pause)
		if s.wait(ctx, pause) {
			pause = s.first
			continue
		}
		pause = min(2*pause, mostPause)
	}
}

// awaitNews waits while the agent would have nobody to come to, but not for ever:
// it is the agent that knows for sure.
func (s *supervisor) awaitNews(ctx context.Context) {
	if s.waits != nil && s.waits() {
		s.log.Info("this device waits for a coordinator")
		s.wait(ctx, toldNothing)
	}
}

// wait tells whether it ended early because there is news.
func (s *supervisor) wait(ctx context.Context, pause time.Duration) (news bool) {
	s.dog.expect(pause)
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-s.kick:
		return true
	}
	return false
}

type agentEnd struct {
	again  bool // it asked for another start at once
	reboot bool // it asked for a start of the machine
	news   bool // we stopped it, to start it with another command
	config bool // it cannot work with what it is told
	text   string
}

func (s *supervisor) once(ctx context.Context) agentEnd {
	r, w, err := os.Pipe()
	if err != nil {
		return agentEnd{text: err.Error()}
	}
	argv, env := s.command()
	s.dog.handOver()
	defer s.dog.takeBack()
	c, err := s.processes.start(argv, env, w)
	w.Close()
	if err != nil {
		r.Close()
		return agentEnd{text: err.Error()}
	}
	drained := make(chan struct{})
	go func() { // ends with the pipe: reapNow kills the agent's whole group
		defer close(drained)
		defer r.Close()
		eachLine(r, s.say)
	}()
	end := s.end(ctx, c)
	select {
	case <-drained:
	case <-time.After(5 * time.Second): // somebody left its group and holds the pipe
	}
	return end
}

func (s *supervisor) end(ctx context.Context, c *process) agentEnd {
	select {
	case status := <-c.ended:
		return endOf(status)
	case <-ctx.Done():
		return s.stop(c)
	case <-s.kick:
		end := s.stop(c)
		end.news = true
		return end
	}
}

func (s *supervisor) stop(c *process) agentEnd {
	c.signal(unix.SIGTERM)
	timer := time.NewTimer(s.stopWithin)
	defer timer.Stop()
	select {
	case status := <-c.ended:
		return endOf(status)
	case <-timer.C:
	}
	s.log.Error("the agent did not stop in time; it is killed", "within", s.stopWithin)
	c.kill()
	timer.Reset(5 * time.Second)
	select {
	case status := <-c.ended:
		return endOf(status)
	case <-timer.C:
		s.log.Error("the agent cannot be killed: it hangs in the kernel, most likely at a disk")
		return agentEnd{text: "could not be killed"}
	}
}

func endOf(status unix.WaitStatus) agentEnd {
	switch {
	case status.Signaled():
		return agentEnd{text: fmt.Sprintf("killed by the signal %v", status.Signal())}
	case status.ExitStatus() == slot.ExitRestart:
		return agentEnd{again: true, text: "asked to be started again"}
	case status.ExitStatus() == slot.ExitReboot:
		return agentEnd{reboot: true, text: "asked for the machine to be started anew"}
	case status.ExitStatus() == exitConfig:
		return agentEnd{config: true, text: "wrong or incomplete configuration"}
	}
	return agentEnd{text: fmt.Sprintf("exit code %d", status.ExitStatus())}
}

// eachLine hands over lines, cut to agentLine, until r ends.
func eachLine(r io.Reader, say func(string)) {
	b := bufio.NewReaderSize(r, agentLine)
	for {
		line, err := b.ReadSlice('\n')
		if len(line) > 0 {
			say(string(line))
		}
		for errors.Is(err, bufio.ErrBufferFull) { // the rest of a line too long
			_, err = b.ReadSlice('\n')
		}
		if err != nil {
			return
		}
	}
}
