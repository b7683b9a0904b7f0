package agent

import (
	"crypto/x509"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Clock is the time that the device goes by. It trusts the hardware clock only
// above a floor: the newest time it has proof of (when this agent was released,
// the last trusted time it saved, the begin of a certificate that its authority
// signed). A signed welcome makes it trusted until the agent ends; from then on
// it runs on the monotonic clock, which nobody sets.
//
// The update metadata that the device has verified does not raise the floor:
// TUF says when metadata ends, not when it was made.
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
	return c.read()
}

func (c *Clock) read() (time.Time, wire.Confidence) {
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

// AtLeast is the latest time that has come for sure: the trusted time, else the
// floor.
func (c *Clock) AtLeast() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.trusted {
		now, _ := c.read()
		return now
	}
	return c.floor
}

// checkAt is the time by which to check the certificate of a server. A clock
// that is trusted decides. One that is not may say 1970 or 2050, and a device
// that believed it would never reach who could set it: then only what is known
// for sure counts against a certificate, that it ended before the floor. What
// that gives away is little: a server key that leaked and whose certificate has
// ended since this device last knew the time.
func (c *Clock) checkAt(cert *x509.Certificate) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, sure := c.read()
	switch {
	case sure == wire.ClockTrusted:
	case now.Before(cert.NotBefore):
		return cert.NotBefore
	case now.After(cert.NotAfter) && !c.floor.After(cert.NotAfter):
		return cert.NotAfter
	}
	return now
}

// Raise lifts the floor; a lower one is ignored.
func (c *Clock) Raise(floor time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if floor.After(c.floor) {
		c.floor = floor
	}
}

// Trust takes the time of a verified welcome whose hello was said age ago. The
// coordinator wrote t down since, so it is now between t and t+age (Cristian
// 1989). A reading that is trusted and fits in there stays; else the nearer end
// counts, and for a clock that was not trusted the earlier: it is never ahead,
// as renewal and the floor rely on it, but behind by age at most. An order may
// thus be taken up so long after its expiry. A time below the floor is a
// coordinator with a wrong clock, and is refused.
func (c *Clock) Trust(t time.Time, age time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Certificates are issued a little back in time and clocks of several
	// coordinators differ, so a floor is not exact to the second.
	if t.Before(c.floor.Add(-5 * time.Minute)) {
		return false
	}
	now := c.system()
	if c.trusted {
		if have := c.anchor.Add(now.Sub(c.at)); have.After(t.Add(age)) {
			t = t.Add(age)
		} else if have.After(t) {
			t = have
		}
	}
	c.anchor, c.at, c.trusted = t, now, true
	return true
}

// later is the later of two times.
func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
