package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/deimos-edge/deimos/ota/slot"
)

const maxDelay = time.Minute

// launcher supervises one agent. It runs in one goroutine, main's.
type launcher struct {
	stateDir, factory                   string
	args                                []string
	confirmWithin, stopWithin, minDelay time.Duration

	slots   *slot.Store
	signals chan os.Signal
	delay   time.Duration // before the next restart after a crash
}

// choice is what to start next.
type choice struct {
	slot    slot.Name
	version string
	trial   bool
}

func (c choice) String() string {
	s := "slot " + string(c.slot)
	if c.version != "" {
		s = "version " + c.version + " in " + s
	}
	if c.trial {
		s += ", on trial"
	}
	return s
}

var errNoAgent = errors.New("no agent can be started")

// supervise starts agents until one of them, or a signal, says that it is enough.
func (l *launcher) supervise() int {
	for {
		c, err := l.choose()
		if err != nil {
			log.Print(err)
			if errors.Is(err, errNoAgent) {
				return exitNoAgent
			}
			return exitState
		}
		if code, again := l.once(c); !again {
			return code
		}
	}
}

// once runs one agent to its end. It returns the launcher's exit code, unless
// there is to be another start.
func (l *launcher) once(c choice) (code int, again bool) {
	log.Printf("starting %s", c)
	end := l.run(c)
	if end.stopped {
		if c.trial {
			l.stopTry(c)
		}
		return 0, false
	}
	log.Printf("%s: the agent %s", c, end)
	if c.trial && (end.givenUp || l.failTry(c, end.String(), end.crash())) {
		return 0, l.wait(l.minDelay)
	}
	switch {
	case end.unstartable:
		return l.repairUnstartable(end)
	case end.code == 0:
		return 0, false
	case end.code == slot.ExitRestart && end.lived > l.minDelay:
		return 0, true
	case end.code == slot.ExitRestart && l.trialWaits():
		return 0, true
	case end.code >= 64 && end.code <= 78 && end.code != slot.ExitRestart:
		return end.code, false
	}
	return 0, l.pause(end)
}

// choose decides what to start: the trial while it has tries, then the current
// slot, then, if that is damaged, whatever is left.
func (l *launcher) choose() (choice, error) {
	st, err := l.slots.Load()
	if err != nil {
		return choice{}, err
	}
	if st.Warning != "" {
		log.Print(st.Warning)
	}
	if st.Current == "" {
		return l.installFactory(slot.A, "")
	}
	if st.Trial != nil {
		if c, ok := l.chooseTrial(st); ok {
			return c, nil
		}
	}
	return l.chooseCurrent(st)
}

// chooseTrial pays for a try, or rolls back when there is none left.
func (l *launcher) chooseTrial(st slot.State) (choice, bool) {
	t := *st.Trial
	if err := l.slots.Check(st, t.Slot); err != nil {
		l.rollBack(fmt.Sprintf("version %s cannot be tried: %v", t.Version, err))
		return choice{}, false
	}
	if t.Spent() {
		l.rollBack(givenUp(t))
		return choice{}, false
	}
	if _, err := l.slots.StartTry(); err != nil {
		// An unpaid try could be repeated for ever; the current version is safe.
		log.Printf("version %s is not tried now, because that cannot be recorded: %v", t.Version, err)
		return choice{}, false
	}
	return choice{slot: t.Slot, version: t.Version, trial: true}, true
}

// givenUp says why a trial ended, for the report to the fleet manager. It does not
// count on what a launcher before this one has counted.
func givenUp(t slot.Trial) string {
	interrupted := t.Interrupted
	if t.Running {
		interrupted++
	}
	seen := slot.Tries - t.Tries
	if t.Running {
		seen--
	}
	switch {
	case interrupted == 0:
		return fmt.Sprintf("version %s was started %d times and never confirmed itself; the last time it %s", t.Version, seen, t.Failure)
	case seen <= 0:
		return fmt.Sprintf("version %s was started %d times, and each time the machine or the launcher went down with it", t.Version, interrupted)
	}
	return fmt.Sprintf("version %s was started %d times and never confirmed itself; %d of them ended with the machine or the launcher going down, and the last other time it %s",
		t.Version, seen+interrupted, interrupted, t.Failure)
}

func (l *launcher) rollBack(reason string) {
	log.Printf("rolling back: %s", reason)
	if _, err := l.slots.RollBack(reason); err != nil {
		log.Printf("the roll-back could not be recorded; it will be at the next start: %v", err)
	}
}

func (l *launcher) chooseCurrent(st slot.State) (choice, error) {
	err := l.slots.Check(st, st.Current)
	if err == nil {
		return choice{slot: st.Current, version: st.Version()}, nil
	}
	return l.repair(st, err.Error())
}

// repair finds something else to start when the current slot cannot be.
func (l *launcher) repair(st slot.State, reason string) (choice, error) {
	log.Printf("slot %s cannot be started: %s", st.Current, reason)
	other := st.Current.Other()
	if rejected := st.Last != nil && st.Last.Result == slot.RolledBack && st.Last.Slot == other; !rejected && l.slots.Check(st, other) == nil {
		log.Printf("falling back to slot %s", other)
		if err := l.slots.FallBack(reason); err != nil {
			log.Printf("the change of slot could not be recorded: %v", err)
		}
		return choice{slot: other, version: st.Images[other].Version}, nil
	}
	return l.installFactory(st.Current, reason)
}

// repairUnstartable is for a file that is what was installed, and yet the
// kernel refuses it.
func (l *launcher) repairUnstartable(end ending) (code int, again bool) {
	st, err := l.slots.Load()
	if err != nil {
		log.Print(err)
		return exitState, false
	}
	if _, err := l.repair(st, "it "+end.what); err != nil {
		log.Print(err)
		return exitNoAgent, false
	}
	return 0, l.pause(end)
}

// installFactory puts the agent that the device was shipped with into a slot.
func (l *launcher) installFactory(n slot.Name, reason string) (choice, error) {
	about, err := slot.Ask(context.Background(), l.factory)
	if err != nil {
		return choice{}, fmt.Errorf("%w: the factory agent does not answer (check --agent): %w", errNoAgent, err)
	}
	if err := l.slots.InstallFactory(n, l.factory, about.Version, reason); err != nil {
		return choice{}, fmt.Errorf("cannot install the factory agent: %w", err)
	}
	log.Printf("installed the factory agent, version %s, in slot %s", about.Version, n)
	return choice{slot: n, version: about.Version}, nil
}

// failTry tells whether c was still on trial, and records that this try failed.
func (l *launcher) failTry(c choice, reason string, crashed bool) bool {
	tried, err := l.slots.FailTry(c.slot, reason, crashed)
	if err != nil {
		// The try is paid for already; only its reason is lost.
		log.Printf("the end of the try could not be recorded: %v", err)
		return true
	}
	return tried
}

func (l *launcher) stopTry(c choice) {
	if _, err := l.slots.StopTry(c.slot); err != nil {
		log.Printf("the stop could not be recorded and counts as a try: %v", err)
	}
}

// trialWaits tells whether an agent asks for a restart because it has installed something.
func (l *launcher) trialWaits() bool {
	st, err := l.slots.Load()
	return err == nil && st.Trial != nil && !st.Trial.Running
}

// pause waits before a restart, longer each time, unless the agent had lived
// for a while. It returns false if a signal came instead.
func (l *launcher) pause(end ending) bool {
	if l.delay == 0 || end.lived >= maxDelay {
		l.delay = l.minDelay
	}
	d := l.delay
	l.delay = min(2*l.delay, maxDelay)
	return l.wait(d)
}

func (l *launcher) wait(d time.Duration) bool {
	log.Printf("next start in %s", d)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case s := <-l.signals:
		log.Printf("stopping on %v", s)
		return false
	}
}
