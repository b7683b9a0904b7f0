package slot

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// Phase is how far an update is. What was confirmed or rolled back is idle again, with
// an [Outcome].
type Phase string

// The phases, in order.
const (
	Idle      Phase = "idle"
	Waiting   Phase = "waiting"   // for its owner, or for the time that its owner set
	Fetching  Phase = "fetching"  // bytes come; what has come outlives a restart
	Verified  Phase = "verified"  // they are the signed ones, and go beside what runs
	Installed Phase = "installed" // it is what the next start tries
	Testing   Phase = "testing"   // it runs, and is not confirmed
)

// Known tells whether it is one of them.
func (p Phase) Known() bool {
	return slices.Contains([]Phase{Idle, Waiting, Fetching, Verified, Installed, Testing}, p)
}

// Event is what leads from one phase to the next.
type Event string

// The events. Those of the first line happen before a slot is touched, and package ota
// keeps them; the others are methods of [Store], or what the boot loader does.
const (
	Offered, Allowed, Held, Fetched, Refetched, GivenUp Event = "offered", "allowed", "held", "fetched", "refetched", "given up"

	Begun      Event = "begun"       // BeginInstall
	Marked     Event = "marked"      // MarkTrial
	Started    Event = "started"     // StartTry
	Failed     Event = "failed"      // FailTry
	Stopped    Event = "stopped"     // StopTry
	Kept       Event = "confirmed"   // Confirm
	GoneBack   Event = "rolled back" // RollBack
	Repaired   Event = "repaired"    // FallBack, InstallFactory
	Forgotten  Event = "forgotten"   // Forget
	Remembered Event = "remembered"  // Reported
)

// Table is all that may happen, and where it leads. What is not in it is refused, and
// changes nothing.
var Table = map[Event]map[Phase]Phase{
	Offered:   {Idle: Waiting, Waiting: Waiting, Fetching: Waiting, Verified: Waiting}, // a repeat begins at the beginning; bytes that have come are kept
	Allowed:   {Waiting: Fetching},
	Held:      {Waiting: Waiting, Fetching: Waiting, Verified: Waiting},
	Fetched:   {Fetching: Verified},
	Refetched: {Fetching: Fetching, Verified: Fetching}, // a delta could not be had, or did not make what was signed, so another form may be fetched; or what was fetched has rotted
	GivenUp:   {Idle: Idle, Waiting: Idle, Fetching: Idle, Verified: Idle},

	Begun:      {Idle: Verified, Verified: Verified}, // a store of slots does not know what comes before
	Marked:     {Verified: Installed},
	Started:    {Installed: Testing, Testing: Testing}, // the latter after a try that ended unseen
	Failed:     {Testing: Installed},
	Stopped:    {Testing: Installed},
	Kept:       {Testing: Idle},
	GoneBack:   {Installed: Idle, Testing: Idle},
	Repaired:   {Idle: Idle, Verified: Idle},
	Forgotten:  {Idle: Idle, Verified: Idle, Installed: Installed, Testing: Testing},
	Remembered: {Idle: Idle, Verified: Verified, Installed: Installed, Testing: Testing},
}

// Limits is how long an update may stay in a phase, on a clock that nobody sets. What
// happens at the limit: a fetch is given up, and so is an install; what is installed
// asks for its start again; and of a try see [ConfirmWithin]. How long it waits for its
// owner is up to who offers it.
var Limits = map[Phase]time.Duration{
	Fetching:  24 * time.Hour, // a slow line is no fault
	Verified:  15 * time.Minute,
	Installed: 10 * time.Minute,
	Testing:   ConfirmWithin,
}

// ErrTransition is returned for what [Table] does not have.
var ErrTransition = errors.New("an update cannot do that now")

// Next is where an event leads.
func Next(from Phase, e Event) (Phase, error) {
	to, ok := Table[e][from]
	if !ok {
		return from, fmt.Errorf("%w: it is %s, and cannot be %s", ErrTransition, from, e)
	}
	return to, nil
}

// Phase is how far the update of these slots is.
func (s State) Phase() Phase {
	switch {
	case s.Trial != nil && s.Trial.Running:
		return Testing
	case s.Trial != nil:
		return Installed
	case s.Installing != nil:
		return Verified
	}
	return Idle
}
