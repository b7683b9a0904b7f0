package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/deimos-edge/deimos/hw/watchdog"
)

// startDog has the machine's watchdog while no agent has it: from the moment its driver is
// there, which is soon after power-on, and again in each pause between two agents. A
// kernel or a process 1 that hangs feeds nothing; a start that makes no progress is not
// fed either, see [startDog.expect].
//
// Each agent is handed the device: it is closed without being disarmed, with a timeout
// of 5 minutes where the driver takes that. The agent opens it with its first loop,
// seconds after its start, and sets a shorter one. One that hangs before is reset with
// the machine. One that ends before is no reason for a reset: the device is taken back.
//
// A machine must not be reset for an agent that was given no chance or does not want the
// device. So one that cannot be so long is disarmed before the agent starts; it is
// disarmed where the owner's configuration names none, and last of all before
// the machine goes down. What is no watchdog is left alone, as the agent does.
//
// Whatever hangs in the driver holds up nothing but the one goroutine that uses it. A nil
// startDog does nothing.
type startDog struct {
	take func(path string) (armed, error)
	path string // "": the owner wants none
	log  *slog.Logger
	ops  chan func()

	// Of run's goroutine.
	held   armed     // nil: it is not there, or is the agent's
	away   bool      // it is the agent's
	alive  time.Time // until then the start is believed to make progress
	said   string    // the last failure
	silent bool      // it is not fed, and the log says so
}

// armed is a watchdog that is open: [watchdog.Hold].
type armed interface {
	Timeout() time.Duration
	Feed() error
	HandOver() (lives bool, err error)
	Disarm() (stopped bool, err error)
}

const (
	// startGrace is what the parts of a start that have no limit may take together: it is
	// added to each limit.
	startGrace = 5 * time.Minute
	// handOverLeast is the shortest timeout with which an agent starts: what one that
	// crashed leaves to the next, too.
	handOverLeast = time.Minute
	lookForDog    = time.Second // for one whose driver is loaded later, or that was in use
	dogLimit      = 2 * time.Second
)

func newStartDog(path string, log *slog.Logger) *startDog {
	return &startDog{path: path, log: log, ops: make(chan func()), alive: time.Now().Add(startGrace),
		take: func(path string) (armed, error) {
			h, err := watchdog.Take(path)
			if err != nil {
				return nil, err
			}
			return h, nil
		}}
}

// run feeds until ctx ends.
func (d *startDog) run(ctx context.Context) {
	defer d.disarm() // also after a mistake in here
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case op := <-d.ops:
			op()
		case <-timer.C:
		}
		timer.Reset(d.tend())
	}
}

// tend does what is to be done, and says when to come back.
func (d *startDog) tend() time.Duration {
	if d.held == nil {
		if d.path == "" || d.away {
			return time.Hour
		}
		if !exists(d.path) {
			return lookForDog
		}
		held, err := d.take(d.path)
		if err != nil {
			d.fail("the machine's watchdog is not armed", err)
			return 10 * lookForDog
		}
		d.held, d.said = held, ""
		d.log.Info("the machine's watchdog is armed: if the start hangs, it resets the machine", "watchdog", d.path, "timeout", held.Timeout())
	}
	if late := time.Now().After(d.alive); late {
		if !d.silent {
			d.log.Error("the start makes no progress; the machine's watchdog is not fed until it does", "resets_in", d.held.Timeout())
		}
		d.silent = true
		return lookForDog
	}
	d.silent = false
	if err := d.held.Feed(); err != nil {
		d.fail("the machine's watchdog is not fed", err)
		return lookForDog
	}
	return d.held.Timeout() / 3
}

// fail logs a failure once, until it is another one.
func (d *startDog) fail(what string, err error) {
	if d.said != err.Error() {
		d.log.Error(what, "watchdog", d.path, "error", err)
	}
	d.said = err.Error()
}

// do has op done by run, and does not wait for a driver that hangs.
func (d *startDog) do(op func()) {
	if d == nil {
		return
	}
	limit := time.NewTimer(dogLimit)
	defer limit.Stop()
	done := make(chan struct{})
	select {
	case d.ops <- func() { defer close(done); op() }:
	case <-limit.C:
		d.log.Error("the machine's watchdog does not take its orders, and stays as it is")
		return
	}
	select {
	case <-done:
	case <-limit.C:
		d.log.Error("the machine's watchdog hangs")
	}
}

// expect says that the start makes progress, and what comes now may take so long.
func (d *startDog) expect(limit time.Duration) {
	d.do(func() { d.alive = time.Now().Add(limit + startGrace) })
}

// use takes the device that the configuration names, "" for none.
func (d *startDog) use(path string) {
	d.do(func() {
		if path != d.path {
			d.disarm()
			d.path = path
		}
	})
}

// handOver is called before an agent starts.
func (d *startDog) handOver() {
	d.do(func() {
		if d.away = true; d.held == nil {
			return
		}
		if d.held.Timeout() < handOverLeast {
			d.log.Warn("this watchdog cannot wait for an agent; one that hangs before it has armed it is not noticed", "watchdog", d.path, "timeout", d.held.Timeout())
			d.disarm()
			return
		}
		lives, err := d.held.HandOver()
		if d.held = nil; err != nil {
			d.fail("the machine's watchdog is not handed to the agent in good order", err)
		} else if !lives {
			d.log.Warn("this watchdog stops until the agent has armed it; one that hangs before is not noticed", "watchdog", d.path)
		}
	})
}

// takeBack is called when an agent has ended.
func (d *startDog) takeBack() {
	d.do(func() { d.away, d.alive = false, time.Now().Add(startGrace) })
}

// off is called before the machine goes down.
func (d *startDog) off() {
	d.do(func() {
		d.disarm()
		d.path = ""
	})
}

func (d *startDog) disarm() {
	if d.held == nil {
		return
	}
	stopped, err := d.held.Disarm()
	within := d.held.Timeout()
	if d.held = nil; stopped {
		d.log.Info("the machine's watchdog is disarmed", "watchdog", d.path)
		return
	}
	d.log.Warn("the machine's watchdog cannot be disarmed; unless somebody feeds it, the machine is reset", "watchdog", d.path, "within", within, "error", err)
}
