// Package sensor reads the sensors that a board's profile or its owner declares:
// chips on I²C and 1-wire, which cannot be detected, only asked.
//
// # What is promised
//
//   - One reader at a time on a bus; different buses in parallel.
//   - A reading ends. A transfer can hang in the kernel, where no signal reaches
//     it. So every reading runs in a goroutine of its own and is waited for within
//     its driver's limit; one that does not come back is left behind with the bus
//     it holds, and that bus is not touched again until it does. A bus never holds
//     more than one stuck goroutine.
//   - A sensor that disappears comes back by itself. An error closes it; it is
//     opened again, and so configured again, after 5 s, then after twice as long
//     each time up to 5 minutes (or its interval, if that is longer). All chips
//     but the SCD4x are opened anew for each reading, so that one that lost its
//     power and its settings between two readings cannot show values that are
//     wrong but look right.
//   - A bus that does not exist yet (a module that is loaded later, an adapter on
//     USB) is the same case: buses are opened for each reading.
//   - Values are believable or absent. What a chip cannot show in earnest (see
//     plausible) is dropped and counts as a failure of the reading.
//   - A value older than three intervals is not shown.
//
// Chips are read with the drivers of periph.io/x/devices; chips.go says what
// had to be worked around in each.
//
// # Not done yet
//
// SPI. Two programs that read the same chip at the same time, such as the agent
// and "deimos-agent sensors", do not know of each other; see docs/sensors.md.
package sensor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

const (
	retryFirst = 5 * time.Second // after a first failure; doubles with each
	retryMost  = 5 * time.Minute // or the sensor's interval, if that is longer
	startWhen  = 2 * time.Second // first readings are spread over so long
	jitter     = 0.05            // of an interval, either way
	current    = 3               // intervals that a value is shown for
	silentFrom = 3               // failures in a row that a person hears of while there still is a value
)

// Set is the declared sensors of a machine. Safe for concurrent use.
type Set struct {
	sensors []*sensor
	log     *slog.Logger

	mu sync.Mutex // guards state of each sensor
}

// state is what is known of a sensor; guarded by Set.mu.
type state struct {
	values   []hw.Measurement // newest of each kind
	failures int              // in a row
	err      error            // the last one, nil if there was none since
}

// New checks the declarations; all that is wrong with them is in the error.
// It touches no bus.
func New(sensors []board.Sensor, log *slog.Logger) (*Set, error) {
	return newSet(sensors, log, kernel{root: "/"})
}

func newSet(sensors []board.Sensor, log *slog.Logger, m machine) (*Set, error) {
	s := &Set{log: log}
	var wrong []error
	names, places := map[string]bool{}, map[string]string{}
	buses := map[string]*bus{}
	for _, b := range sensors {
		d, err := declare(b)
		if err != nil {
			wrong = append(wrong, err)
			continue
		}
		if names[d.name] {
			wrong = append(wrong, fmt.Errorf("two sensors have the name %q; give one of them another", d.name))
		}
		names[d.name] = true
		place := d.bus + " " + d.address()
		if other, taken := places[place]; taken {
			wrong = append(wrong, fmt.Errorf("sensors %q and %q are both at %s on %s; remove one of them", other, d.name, d.address(), d.bus))
		}
		places[place] = d.name
		if buses[d.bus] == nil {
			buses[d.bus] = newBus(d.bus)
		}
		s.sensors = append(s.sensors, &sensor{declared: d, bus: buses[d.bus], machine: m})
	}
	if len(wrong) > 0 {
		return nil, errors.Join(wrong...)
	}
	return s, nil
}

// Run reads each sensor on its schedule until ctx ends; it then returns within
// a few seconds, whatever hangs. It is called once.
func (s *Set) Run(ctx context.Context) {
	var all sync.WaitGroup
	for _, x := range s.sensors {
		all.Go(func() { s.follow(ctx, x) })
	}
	all.Wait()
}

func (s *Set) follow(ctx context.Context, x *sensor) {
	defer x.shut()
	delay := rand.N(min(x.every, startWhen))
	for pause(ctx, delay) == nil {
		began := time.Now()
		values, err := x.once(ctx)
		if ctx.Err() != nil {
			return
		}
		failures := s.note(x, values, err)
		delay = time.Until(began.Add(x.next(failures)))
	}
}

// next is how long after the beginning of a reading the next one begins.
func (d declared) next(failures int) time.Duration {
	every := time.Duration(float64(d.every) * (1 - jitter + 2*jitter*rand.Float64()))
	if failures > 0 {
		retry := retryFirst << min(failures-1, 10)
		every = min(retry, max(d.every, retryMost))
	}
	return max(every, d.driver.least)
}

// note keeps the outcome of a reading; both values and an error are possible.
func (s *Set) note(x *sensor, values []hw.Measurement, err error) (failures int) {
	s.mu.Lock()
	was := x.state.silent(x.every)
	for _, v := range values {
		x.state.values = slices.DeleteFunc(x.state.values, func(o hw.Measurement) bool { return o.Kind == v.Kind })
		x.state.values = append(x.state.values, v)
	}
	x.state.err = err
	if err == nil {
		x.state.failures = 0
	} else {
		x.state.failures++
	}
	is, failures := x.state.silent(x.every), x.state.failures
	s.mu.Unlock()
	switch {
	case is && !was:
		s.log.Warn("sensor does not answer", "sensor", x.name, "driver", x.driver.Name, "bus", x.bus.name, "address", x.address(), "err", err)
	case was && !is:
		s.log.Info("sensor answers again", "sensor", x.name)
	}
	return failures
}

// silent tells whether a person should hear of a sensor: it fails, and either
// has nothing to show or has failed too often for a glitch.
func (st *state) silent(every time.Duration) bool {
	return st.failures >= silentFrom || st.failures > 0 && len(st.shown(every)) == 0
}

func (st *state) shown(every time.Duration) []hw.Measurement {
	var now []hw.Measurement
	for _, v := range st.values {
		if time.Since(v.At) <= current*every {
			now = append(now, v)
		}
	}
	return now
}

// Latest is the newest value of each that answers, and, for the warnings, which do not.
func (s *Set) Latest() (values []hw.Measurement, silent []Silent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.sensors {
		values = append(values, x.state.shown(x.every)...)
		if x.state.silent(x.every) {
			silent = append(silent, Silent{x.name, x.state.err})
		}
	}
	return values, silent
}

// Silent is a sensor that does not answer.
type Silent struct {
	Name string
	Err  error // why, and what to do
}

// Reading is the outcome of reading a sensor once. Both values and an error
// are possible: one of several values was not plausible.
type Reading struct {
	Name    string
	Driver  string
	Bus     string
	Address string // as declared, or the driver's default
	Values  []hw.Measurement
	Err     error // why there is no value, and what to do
}

// ReadOnce reads each sensor once, in the order of their declaration, and
// leaves the chips as if nobody had. It is not for a set that runs.
func (s *Set) ReadOnce(ctx context.Context) []Reading {
	out := make([]Reading, len(s.sensors))
	var all sync.WaitGroup
	for i, x := range s.sensors {
		all.Go(func() {
			values, err := x.once(ctx)
			x.shut()
			out[i] = Reading{x.name, x.driver.Name, x.bus.name, x.address(), values, err}
		})
	}
	all.Wait()
	return out
}

// pause waits, or tells why not.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}
