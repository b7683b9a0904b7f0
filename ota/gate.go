package ota

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// ErrNotSteady keeps a version from being kept before its first samples, heartbeats and
// orders: there is no way back once it is, and a crash at one of those is what a trial is
// to find.
var ErrNotSteady = errors.New("it has not lived for long enough")

// Healthy tells, as an error, why the version on trial is not to be confirmed yet: it
// does worse than the one before it did, as noted when it was installed. lived is for
// how long it has run. What is worse is noted, so that who goes back can tell.
//
// A device that was updated by an older agent has no such note: it was online.
func (s *Service) Healthy(lived time.Duration) error {
	if s.how == nil {
		return nil
	}
	t, _, err := s.how.standing()
	if err != nil || t == nil || !t.running {
		return err
	}
	rec := s.mem.get()
	before := wire.UpdateFigures{Online: true}
	if rec.Order == t.order && rec.Before != nil {
		before = *rec.Before
	}
	after := s.figures()
	after.Crashes = t.crashed
	worse := compare(before, after)
	if rec.Order == t.order && (rec.After == nil || *rec.After != after || !slices.Equal(rec.Worse, worse)) {
		if err := s.mem.note(func(r *Record) { r.After, r.Worse = &after, worse }); err != nil {
			s.o.Log.Warn("how the new version does cannot be noted", "error", err) // it may be confirmed all the same
		}
	}
	switch {
	case len(worse) > 0:
		return fmt.Errorf("version %s does worse than the one before: %s", s.o.Version, strings.Join(worse, "; "))
	case lived < s.o.Steady:
		return ErrNotSteady
	}
	return nil
}

func (s *Service) figures() wire.UpdateFigures {
	if s.o.Figures == nil {
		return wire.UpdateFigures{Online: true}
	}
	return s.o.Figures()
}

// compare says what is worse after than it was before. A crash of a try is, however the
// next try goes: what is confirmed is not gone back from, and to live for longer after a
// crash proves little of what crashes once in a while. A power cut is none, nor is a try
// that was given up since nobody was reached.
func compare(before, after wire.UpdateFigures) (worse []string) {
	fewer := func(what string, before, after int) {
		if after < before {
			worse = append(worse, fmt.Sprintf("%s: %d, before it was %d", what, after, before))
		}
	}
	if before.Online && !after.Online {
		worse = append(worse, "the coordinator is not reached, before it was")
	}
	fewer("volumes that are open", before.Volumes, after.Volumes)
	fewer("sensors that answer", before.Sensors, after.Sensors)
	if after.Crashes > before.Crashes {
		worse = append(worse, fmt.Sprintf("tries in which it crashed: %d", after.Crashes))
	}
	return worse
}
