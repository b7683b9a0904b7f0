package agent

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
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
	if !c.Trust(today) {
		t.Fatal("the coordinator's time was refused")
	}
	wantClock(t, c, today, wire.ClockTrusted)
	h.at = h.at.Add(time.Minute)
	wantClock(t, c, today.Add(time.Minute), wire.ClockTrusted)
}

func TestTimeBelowTheFloorIsRefused(t *testing.T) {
	h := &hardware{boot1970}
	c := clockWith(today, h)
	if c.Trust(today.Add(-5*time.Minute - time.Second)) {
		t.Error("a time that cannot be was trusted")
	}
	wantClock(t, c, today, wire.ClockFloor)
	if !c.Trust(today.Add(-5 * time.Minute)) {
		t.Error("coordinators may differ by five minutes")
	}
}

// TestTrustedTimeIgnoresTheSystemClock sets the wall clock of a reading forth
// and back while its monotonic part goes on, as settimeofday does.
func TestTrustedTimeIgnoresTheSystemClock(t *testing.T) {
	mono := time.Now() // has a monotonic part
	h := &hardware{mono}
	c := clockWith(time.Time{}, h)
	if !c.Trust(today) {
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

func TestClockLearnsOnlyFromItsOwnAuthority(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	id := newIdentity(t)
	refusal := func(der []byte) error {
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return &tls.CertificateVerificationError{UnverifiedCertificates: []*x509.Certificate{leaf}, Err: errors.New("not yet valid")}
	}
	good := ours.server("localhost").Certificate[0]
	for claim, tc := range map[string]struct {
		err   error
		start time.Time
		want  bool
	}{
		"a server of ours":          {refusal(good), boot1970, true},
		"a server of others":        {refusal(theirs.server("localhost").Certificate[0]), boot1970, false},
		"a member posing as server": {refusal(ours.issue(id.key.Public(), "x", x509.ExtKeyUsageClientAuth)), boot1970, false},
		"nothing to learn":          {refusal(good), time.Now(), false},
		"another error":             {errors.New("connection refused"), boot1970, false},
	} {
		t.Run(claim, func(t *testing.T) {
			c := clockWith(time.Time{}, &hardware{tc.start})
			if got := c.learn(tc.err, ours.pool()); got != tc.want {
				t.Errorf("learned: %t, want %t", got, tc.want)
			}
			if moved := c.Now().After(tc.start); moved != tc.want {
				t.Errorf("the clock moved: %t, want %t (%s)", moved, tc.want, c.Now())
			}
		})
	}
}
