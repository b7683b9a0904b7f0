package agent

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// hardware is a clock chip that a test sets.
type hardware struct{ at time.Time }

func (h *hardware) now() time.Time { return h.at }

func clockWith(floor time.Time, h *hardware) *Clock {
	c := NewClock(floor)
	c.system = h.now
	return c
}

func wantClock(t *testing.T, c *Clock, at time.Time, sure wire.Confidence) {
	t.Helper()
	if got, s := c.Read(); !got.Equal(at) || s != sure {
		t.Errorf("the clock reads %s (%s), want %s (%s)", got, s, at, sure)
	}
}

var (
	boot1970 = time.Unix(12, 0)
	today    = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

func TestClockStartsNoEarlierThanItsFloor(t *testing.T) {
	h := &hardware{boot1970}
	wantClock(t, clockWith(time.Time{}, h), boot1970, wire.ClockUnknown)
	c := clockWith(today, h)
	wantClock(t, c, today, wire.ClockFloor)
	h.at = today.Add(time.Hour)
	wantClock(t, c, h.at, wire.ClockFloor)
	c.Raise(today.Add(2 * time.Hour))
	wantClock(t, c, today.Add(2*time.Hour), wire.ClockFloor)
	c.Raise(today)
	wantClock(t, c, today.Add(2*time.Hour), wire.ClockFloor)
}

func TestWelcomeMakesAClockFrom1970Trusted(t *testing.T) {
	h := &hardware{boot1970}
	c := clockWith(today.Add(-24*time.Hour), h)
	if !c.Trust(today, 0) {
		t.Fatal("the coordinator's time was refused")
	}
	wantClock(t, c, today, wire.ClockTrusted)
	h.at = h.at.Add(time.Minute)
	wantClock(t, c, today.Add(time.Minute), wire.ClockTrusted)
}

func TestTimeBelowTheFloorIsRefused(t *testing.T) {
	h := &hardware{boot1970}
	c := clockWith(today, h)
	if c.Trust(today.Add(-5*time.Minute-time.Second), 0) {
		t.Error("a time that cannot be was trusted")
	}
	wantClock(t, c, today, wire.ClockFloor)
	if !c.Trust(today.Add(-5*time.Minute), 0) {
		t.Error("coordinators may differ by five minutes")
	}
}

// TestTrustedTimeIgnoresTheSystemClock sets the wall clock of a reading forth
// and back while its monotonic part goes on, as settimeofday does.
// The coordinator's time was written down at most age ago.
func TestALateWelcomeMovesATrustedClockNoFurtherThanItProves(t *testing.T) {
	h := &hardware{boot1970}
	c := clockWith(time.Time{}, h)
	for _, step := range []struct {
		told time.Time
		age  time.Duration
		want time.Time
	}{
		{today, time.Minute, today}, // behind, perhaps, but never ahead
		{today.Add(-30 * time.Second), time.Minute, today},
		{today.Add(time.Second), time.Minute, today.Add(time.Second)},
		{today.Add(-time.Hour), time.Minute, today.Add(-59 * time.Minute)},
	} {
		if !c.Trust(step.told, step.age) {
			t.Fatal("refused")
		}
		wantClock(t, c, step.want, wire.ClockTrusted)
	}
}

func TestTrustedTimeIgnoresTheSystemClock(t *testing.T) {
	mono := time.Now() // has a monotonic part
	h := &hardware{mono}
	c := clockWith(time.Time{}, h)
	if !c.Trust(today, 0) {
		t.Fatal("refused")
	}
	for _, elapsed := range []time.Duration{time.Second, time.Minute, time.Hour} {
		h.at = mono.Add(elapsed) // both parts
		wantClock(t, c, today.Add(elapsed), wire.ClockTrusted)
	}
	// NewClock must read a clock that has the monotonic part at all: a reading
	// stripped of it prints no "m=".
	if r := NewClock(time.Time{}).system(); r == r.Round(0) {
		t.Error("the clock's readings have no monotonic part: a step of the system clock would move trusted time")
	}
}

// A certificate is refused for its time only by a clock that is trusted, or by
// the floor.
func TestAWrongClockKeepsNobodyOut(t *testing.T) {
	ca := newAuthority(t)
	leaf, err := x509.ParseCertificate(ca.server("localhost").Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	later := time.Now().AddDate(24, 0, 0)
	for claim, tc := range map[string]struct {
		system, floor, trusted time.Time
		good                   bool
	}{
		"1970":                        {system: boot1970, good: true},
		"1970, with a floor":          {system: boot1970, floor: time.Now().AddDate(0, 0, -40), good: true},
		"2050":                        {system: later, good: true},
		"2050, with a floor":          {system: later, floor: time.Now().AddDate(0, 0, -40), good: true},
		"right":                       {system: time.Now(), good: true},
		"floor after the end":         {system: boot1970, floor: leaf.NotAfter.Add(time.Second)},
		"2050, floor after the end":   {system: later, floor: leaf.NotAfter.Add(time.Second)},
		"trusted, and after the end":  {system: boot1970, trusted: leaf.NotAfter.Add(time.Minute)},
		"trusted, before it begins":   {system: boot1970, trusted: leaf.NotBefore.Add(-time.Minute)},
		"trusted, and 2050 by itself": {system: later, trusted: time.Now(), good: true},
	} {
		t.Run(claim, func(t *testing.T) {
			c := clockWith(tc.floor, &hardware{tc.system})
			if !tc.trusted.IsZero() && !c.Trust(tc.trusted, 0) {
				t.Fatal("not trusted")
			}
			err := knows(ca.cert, c).verify([]*x509.Certificate{leaf}, "localhost")
			if (err == nil) != tc.good {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestClockLearnsOnlyFromItsOwnAuthority(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	id := newIdentity(t)
	for claim, tc := range map[string]struct {
		der  []byte
		want bool
	}{
		"a server of ours":          {ours.server("localhost").Certificate[0], true},
		"a server of others":        {theirs.server("localhost").Certificate[0], false},
		"a member posing as server": {ours.issue(id.key.Public(), "x", x509.ExtKeyUsageClientAuth, "localhost"), false},
	} {
		t.Run(claim, func(t *testing.T) {
			leaf, err := x509.ParseCertificate(tc.der)
			if err != nil {
				t.Fatal(err)
			}
			c := clockWith(time.Time{}, &hardware{boot1970})
			if err := knows(ours.cert, c).verify([]*x509.Certificate{leaf}, "localhost"); (err == nil) != tc.want {
				t.Errorf("%v, want it believed: %t", err, tc.want)
			}
			if moved := c.AtLeast().Equal(leaf.NotBefore); moved != tc.want {
				t.Errorf("the clock moved: %t, want %t (%s)", moved, tc.want, c.Now())
			}
		})
	}
}
