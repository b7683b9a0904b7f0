package policy

import (
	"fmt"
	"time"
)

// Codes of why jobs stand still, or wait. They are what a report and a heartbeat say.
const (
	CodePaused    = "paused"    // the owner said so
	CodeFinishing = "finishing" // the owner said so: what runs ends, nothing begins
	CodeHours     = "hours"     // the owner lets jobs run at other hours
	CodeHot       = "hot"       // the machine is too hot
	CodeInUse     = "in_use"    // others need the processors
	CodeMetered   = "metered"   // the month's volume is used up
	CodeSlots     = "slots"     // it waits for its turn
	CodeMemory    = "memory"    // it waits for the memory of other jobs
	CodeDisk      = "disk"      // it waits for the room on the disk of other jobs
)

// Word is what the owner has said since the agent's configuration was written. It
// is over everything else. The zero value is nothing.
type Word struct {
	Paused bool      `json:"paused,omitempty"`
	Until  time.Time `json:"until,omitzero"` // of a pause, by the clock of Said; zero: until the owner says otherwise
	Finish bool      `json:"finish,omitempty"`
	Said   time.Time `json:"said,omitzero"`
}

// Readings are how the machine is. What is nil is not known, and holds nothing up; but
// others are taken to be quiet then, and [Policy.OnlyIdle] wants them so for a while.
type Readings struct {
	Now     time.Time     // local
	Sure    bool          // Now is not only what a board without a clock believes
	Others  *float64      // percent of all processors that others take: neither agent nor jobs
	Celsius *float64      // of the hottest part
	Metered time.Duration // until the owner's volume of the month begins anew; 0: it is not used up
}

// Before is what a decision leaves for the next one: what has lasted for how
// long. The zero value is at the beginning.
type Before struct {
	hot  bool
	idle bool
	// quiet is since when others have taken little, and loud since when much; zero: they do not.
	quiet, loud time.Time
}

// Decision says whether jobs run now, and whether one may begin.
type Decision struct {
	Run    bool // those that have begun go on
	Begin  bool // others begin
	Code   string
	Reason string    // a sentence, if not both
	Until  time.Time // zero: nobody knows
}

const (
	cooler  = 5                // °C below the bound, before jobs go on
	busyFor = 30 * time.Second // that others must be loud, before jobs stop
)

// Decide weighs policy, word and readings. It is to be called every few seconds.
func (p Policy) Decide(r Readings, w Word, b Before) (Decision, Before) {
	p = p.Effective()
	b = b.see(p, r)
	stop := func(code string, until time.Time, format string, args ...any) (Decision, Before) {
		return Decision{Code: code, Reason: fmt.Sprintf(format, args...), Until: until}, b
	}
	switch {
	case w.Paused && w.Until.IsZero():
		return stop(CodePaused, time.Time{}, "the owner of this device has paused jobs until further notice")
	case w.Paused && r.Now.Before(w.Until):
		return stop(CodePaused, w.Until, "the owner of this device has paused jobs until %s", clock(w.Until, r.Now))
	case p.Hours != (Hours{}) && !r.Sure:
		return stop(CodeHours, r.Now.Add(time.Minute), "the owner of this device lets jobs run from %s, and the time is not known yet", p.Hours)
	case p.Hours.Closed(r.Now) > 0:
		until := r.Now.Add(p.Hours.Closed(r.Now))
		return stop(CodeHours, until, "the owner of this device lets jobs run from %s", p.Hours)
	case b.hot:
		return stop(CodeHot, time.Time{}, "the device is too hot: it had %g °C, which the owner allows, and jobs go on at %g", p.MaxCelsius, p.MaxCelsius-cooler)
	case p.OnlyIdle && !b.idle:
		var until time.Time
		if !b.quiet.IsZero() {
			until = b.quiet.Add(p.patience())
		}
		return stop(CodeInUse, until, "the device is in use: jobs run when others have taken less than %g%% of its processors for %s", p.IdlePercent, p.patience())
	case p.OnMetered == MeteredStop && r.Metered > 0:
		return stop(CodeMetered, r.Now.Add(r.Metered), "this month's volume of the device is used up, and its owner lets jobs stand still meanwhile")
	case w.Finish:
		return Decision{Run: true, Code: CodeFinishing, Reason: "the owner of this device lets no further job begin until further notice"}, b
	}
	return Decision{Run: true, Begin: true}, b
}

// patience is for how long others must be quiet.
func (p Policy) patience() time.Duration { return time.Duration(p.IdleMinutes * float64(time.Minute)) }

// see takes readings in, with hysteresis.
func (b Before) see(p Policy, r Readings) Before {
	if c := r.Celsius; p.MaxCelsius <= 0 || c == nil {
		b.hot = false
	} else if *c >= p.MaxCelsius {
		b.hot = true
	} else if *c <= p.MaxCelsius-cooler {
		b.hot = false
	}
	if !p.OnlyIdle {
		b.idle, b.quiet, b.loud = true, time.Time{}, time.Time{}
		return b
	}
	b.quiet = since(b.quiet, r.Others == nil || *r.Others < p.IdlePercent, r.Now)
	b.loud = since(b.loud, r.Others != nil && *r.Others > p.BusyPercent, r.Now)
	switch {
	case !b.idle && !b.quiet.IsZero() && r.Now.Sub(b.quiet) >= p.patience():
		b.idle = true
	case b.idle && !b.loud.IsZero() && r.Now.Sub(b.loud) >= busyFor:
		b.idle = false
	}
	return b
}

// since is from when on something has held; zero if it does not. A clock that was
// set back begins anew.
func since(before time.Time, holds bool, now time.Time) time.Time {
	switch {
	case !holds:
		return time.Time{}
	case before.IsZero() || now.Before(before):
		return now
	}
	return before
}

// clock writes a time as a person on this device reads it.
func clock(t, now time.Time) string {
	t = t.In(now.Location())
	if t.Format(time.DateOnly) == now.Format(time.DateOnly) {
		return t.Format("15:04 (-07:00)")
	}
	return t.Format("2006-01-02 15:04 (-07:00)")
}
