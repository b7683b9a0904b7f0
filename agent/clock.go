package agent

import (
	"sync"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Clock is the time that the device goes by. It trusts the hardware clock only
// above a floor: the newest time it has proof of (its certificate's issue, the
// last trusted time it saved). A signed welcome makes it trusted until the
// agent ends; from then on it runs on the monotonic clock, which nobody sets.
type Clock struct {
	mu      sync.Mutex
	floor   time.Time
	anchor  time.Time // trusted time ...
	at      time.Time // ... at this reading, whose monotonic part counts
	trusted bool
	system  func() time.Time
}

// NewClock starts untrusted, at no earlier time than floor.
func NewClock(floor time.Time) *Clock { return &Clock{floor: floor, system: time.Now} }

// Now is the best guess at the time, in UTC.
func (c *Clock) Now() time.Time {
	t, _ := c.Read()
	return t
}

// Read also says how far the time can be trusted.
func (c *Clock) Read() (time.Time, wire.Confidence) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.system()
	switch {
	case c.trusted:
		return c.anchor.Add(now.Sub(c.at)).UTC(), wire.ClockTrusted
	case c.floor.IsZero():
		return now.UTC(), wire.ClockUnknown
	case now.Before(c.floor):
		return c.floor.UTC(), wire.ClockFloor
	}
	return now.UTC(), wire.ClockFloor
}

// Raise lifts the floor; a lower one is ignored.
func (c *Clock) Raise(floor time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if floor.After(c.floor) {
		c.floor = floor
	}
}

// Trust takes the time of a verified welcome. A time below the floor is a
// coordinator with a wrong clock, and is refused.
func (c *Clock) Trust(t time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Certificates are issued a little back in time and clocks of several
	// coordinators differ, so a floor is not exact to the second.
	if t.Before(c.floor.Add(-5 * time.Minute)) {
		return false
	}
	c.anchor, c.at, c.trusted = t, c.system(), true
	return true
}
