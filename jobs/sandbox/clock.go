package sandbox

import "time"

const (
	clockStart = int64(1640995200) * int64(time.Second) // 2022-01-01, as wazero's own fake has it
	clockStep  = int64(time.Microsecond)
)

// fakeClock is both clocks of a module: the same readings in every run. With
// wazero's own fakes a sleep does not move the clock, and a Go guest that
// sleeps for an hour reads it 3.6 million times.
type fakeClock struct{ now int64 } // nanoseconds since 1970

func (c *fakeClock) nanotime() int64 {
	c.now += clockStep
	return c.now
}

func (c *fakeClock) walltime() (sec int64, nsec int32) {
	now := c.nanotime()
	return now / int64(time.Second), int32(now % int64(time.Second))
}

// sleep passes the time at once, as much as fits.
func (c *fakeClock) sleep(ns int64) {
	if ns > 0 && c.now <= 1<<62 {
		c.now += min(ns, 1<<61)
	}
}
