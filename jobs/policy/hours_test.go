package policy

import (
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
)

func mustHours(t *testing.T, text string) Hours {
	t.Helper()
	var h Hours
	if err := h.UnmarshalText([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return h
}

func TestHoursOfTheDay(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		testenv.Cannot(t, "no time zones here: %v", err)
	}
	at := func(text string) time.Time {
		v, err := time.ParseInLocation("2006-01-02 15:04:05", text, berlin)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, c := range []struct {
		hours, now string
		closed     time.Duration
	}{
		{"", "2026-11-22 12:00:00", 0},
		{"22:00-06:00", "2026-11-22 21:59:59", time.Minute}, // a minute at least
		{"22:00-06:00", "2026-11-22 22:00:00", 0},
		{"22:00-06:00", "2026-11-22 00:00:00", 0},
		{"22:00-06:00", "2026-11-22 05:59:59", 0},
		{"22:00-06:00", "2026-11-22 06:00:00", 16 * time.Hour},
		{"09:30-17:15", "2026-11-22 09:29:00", time.Minute},
		{"09:30-17:15", "2026-11-22 09:30:00", 0},
		{"09:30-17:15", "2026-11-22 17:14:59", 0},
		{"09:30-17:15", "2026-11-30 17:15:00", 16*time.Hour + 15*time.Minute}, // of the next month's day
		{"00:00-06:00", "2026-12-31 06:00:00", 18 * time.Hour},
		{"00:00-23:59", "2026-11-22 23:59:30", time.Minute},
		// Clocks go forward on the 29th of March and back on the 25th of October.
		{"06:00-07:00", "2026-03-28 07:00:00", 22 * time.Hour},
		{"06:00-07:00", "2026-10-24 07:00:00", 24 * time.Hour},
	} {
		if got := mustHours(t, c.hours).Closed(at(c.now)); got != c.closed {
			t.Errorf("%q at %s: closed for %s, want %s", c.hours, c.now, got, c.closed)
		}
	}
}
