package agent

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
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

// learn raises the floor by a certificate that a TLS handshake refused because
// by this clock it is not valid yet, and tells whether it did. That roots signed
// it proves that its time has begun. A device without a battery for its clock,
// that was off while a server's certificate was renewed, gets in only by this.
func (c *Clock) learn(refused error, roots *x509.CertPool) bool {
	var bad *tls.CertificateVerificationError
	if !errors.As(refused, &bad) || len(bad.UnverifiedCertificates) == 0 {
		return false
	}
	leaf := bad.UnverifiedCertificates[0]
	if !c.Now().Before(leaf.NotBefore) {
		return false
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: leaf.NotBefore}); err != nil {
		return false
	}
	c.Raise(leaf.NotBefore)
	return true
}

// later is the later of two times.
func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
