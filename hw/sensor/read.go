package sensor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/hw"
)

// sensor is a declared sensor and its connection.
type sensor struct {
	declared
	bus     *bus // shared with the others on it; its name is that of declared
	machine machine
	open    *session // nil if closed; belongs to who reads the sensor, one at a time
	state   state
}

// session is an open sensor.
type session struct {
	link  *link
	chip  chip
	close func() error // the bus
}

// outcome is what a turn on the bus came to. Several may be set.
type outcome struct {
	raw  map[hw.SensorKind]float64
	open *session // still open
	err  error
}

// drop closes what nobody will use any more; in the turn it came from.
func (o outcome) drop() {
	if o.open != nil {
		o.open.end()
	}
}

// once reads the sensor, and opens it before if it is not. Of several values
// some may be there beside an error.
func (s *sensor) once(ctx context.Context) ([]hw.Measurement, error) {
	if !s.driver.stays {
		o := s.turn(ctx, func(ctx context.Context) outcome {
			open, err := s.connect(ctx)
			if err != nil {
				return outcome{err: err}
			}
			defer open.end()
			raw, err := open.read(ctx)
			return outcome{raw: raw, err: err}
		})
		return s.finish(o)
	}
	if s.open == nil {
		o := s.turn(ctx, func(ctx context.Context) outcome {
			open, err := s.connect(ctx)
			return outcome{open: open, err: err}
		})
		if s.open = o.open; o.err != nil {
			return s.finish(o)
		}
		if err := pause(ctx, s.driver.settle); err != nil {
			return nil, err
		}
	}
	open := s.open
	s.open = nil // if the reading does not come back, it is no longer ours
	o := s.turn(ctx, func(ctx context.Context) outcome {
		raw, err := open.read(ctx)
		if err != nil {
			open.end()
			return outcome{err: err}
		}
		return outcome{raw: raw, open: open}
	})
	s.open = o.open
	values, err := s.finish(o)
	if err != nil { // what is open shows nonsense
		s.shut()
	}
	return values, err
}

func (s *sensor) turn(ctx context.Context, work func(context.Context) outcome) outcome {
	return s.bus.use(ctx, s.name, s.driver.limit, func(ctx context.Context) (o outcome) {
		// Drivers compute with what a chip sends; a division by zero in one must
		// not end the agent.
		defer func() {
			if p := recover(); p != nil {
				o = outcome{err: fmt.Errorf("it sends what makes no sense (%v); check its wiring, then whether it is damaged", p)}
			}
		}()
		return work(ctx)
	}, outcome.drop)
}

func (s *sensor) finish(o outcome) ([]hw.Measurement, error) {
	if o.err != nil {
		return nil, s.explain(o.err)
	}
	values, err := s.measurements(o.raw, time.Now())
	if err == nil && len(values) == 0 {
		err = errors.New("it sent no value")
	}
	return values, err
}

// shut closes the sensor, if it is open.
func (s *sensor) shut() {
	open := s.open
	if s.open = nil; open == nil {
		return
	}
	s.turn(context.Background(), func(context.Context) outcome {
		open.end()
		return outcome{}
	})
}

// connect opens bus and chip.
func (s *sensor) connect(ctx context.Context) (*session, error) {
	x := &session{link: &link{}}
	x.link.begin(ctx)
	if s.driver.Bus == OneWire {
		b, err := s.machine.oneWire(s.declared.bus)
		if err != nil {
			return nil, err
		}
		x.link.wire, x.close = b, b.Close
	} else {
		b, err := s.machine.i2c(s.declared.bus)
		if err != nil {
			return nil, err
		}
		x.link.i2c, x.close = b, b.Close
	}
	opened := false
	defer func() {
		if !opened { // or the driver panicked
			_ = x.close()
		}
	}()
	var err error
	if x.chip, err = s.driver.open(x.link, s.declared); err != nil {
		return nil, x.cause(err)
	}
	opened = true
	return x, nil
}

func (x *session) read(ctx context.Context) (map[hw.SensorKind]float64, error) {
	x.link.begin(ctx)
	raw, err := x.chip.read()
	if err != nil {
		return nil, x.cause(err)
	}
	return raw, nil
}

// end leaves the chip at rest and closes its bus. That a chip which is gone
// cannot be put to rest is nobody's concern.
func (x *session) end() {
	ctx, cancel := context.WithTimeout(context.Background(), restLimit)
	defer cancel()
	x.link.begin(ctx)
	if x.chip.rest != nil {
		_ = x.chip.rest()
	}
	_ = x.close()
}

// cause prefers what went wrong on the bus to what the driver made of it.
func (x *session) cause(err error) error {
	if x.link.err != nil {
		return x.link.err
	}
	return err
}

// explain adds what to do to the errors of transfers. periph passes them on as
// text only.
func (s *sensor) explain(err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	text := err.Error()
	for _, known := range []struct {
		errno unix.Errno
		say   string
	}{
		// Which of the first three says "nobody there" depends on the adapter's
		// driver (Documentation/i2c/fault-codes.rst).
		{unix.ENXIO, "no chip answers"},
		{unix.EREMOTEIO, "no chip answers"},
		{unix.EIO, "no chip answers, or the transfer was disturbed"},
		{unix.ETIMEDOUT, "the bus does not move: something holds a line down"},
		{unix.EBUSY, "a driver of the kernel has this chip, or the bus is busy"},
		{unix.EAGAIN, "the bus is busy"},
	} {
		if errno := unix.Errno(0); errors.As(err, &errno) && errno == known.errno || strings.HasSuffix(text, ": "+known.errno.Error()) {
			return fmt.Errorf("%s at %s on %s (%w); check wiring, power and address", known.say, s.address(), s.bus.name, err)
		}
	}
	return err
}
