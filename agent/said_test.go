package agent

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/jobs/policy"
)

// A board without a clock of its own, whose owner pauses jobs for two hours.
func TestAPauseLastsAsLongAsTheOwnerSaidWhateverTheClock(t *testing.T) {
	right := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	for name, system := range map[string]time.Time{
		"1970":         time.Date(1970, 1, 1, 0, 10, 0, 0, time.UTC),
		"right":        right,
		"a year ahead": right.AddDate(1, 0, 0),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			passed := time.Duration(0) // since the first start; nobody sets that
			clock := NewClock(right.AddDate(0, 0, -40))
			clock.system = func() time.Time { return system.Add(passed) }
			start := func() *sayings {
				s := newSayings(filepath.Join(dir, jobsDir), "boot", clock, discardLog())
				s.up = func() time.Duration { return passed }
				return s
			}
			h := start()
			left := func(want time.Duration) {
				t.Helper()
				w, err := h.paused(dir)
				if err != nil {
					t.Fatal(err)
				}
				if got := w.Until.Sub(clock.Now()); !w.Paused || got < want-time.Second || got > want+time.Second {
					t.Errorf("%s are left, want %s", got, want)
				}
			}
			said := system.Truncate(time.Second)
			if err := SayOfJobs(dir, policy.Word{Paused: true, Said: said, Until: said.Add(2 * time.Hour)}); err != nil {
				t.Fatal(err)
			}
			left(2 * time.Hour)
			passed = 30 * time.Minute
			left(90 * time.Minute)
			if !clock.Trust(right.Add(passed), 0) { // a welcome
				t.Fatal("the clock is not set")
			}
			left(90 * time.Minute)
			passed = time.Hour
			left(time.Hour)
			// A start, before it has a coordinator: never less than it has to be.
			clock = NewClock(right.Add(passed))
			clock.system = func() time.Time { return system.Add(passed) }
			if system.Before(right) {
				h = start()
				left(time.Hour)
			}
			clock.Trust(right.Add(passed), 0)
			h = start()
			left(time.Hour)
			passed = 3 * time.Hour
			left(-time.Hour)
			// Another of the same length is another.
			said = said.Add(3 * time.Hour)
			if err := SayOfJobs(dir, policy.Word{Paused: true, Said: said, Until: said.Add(2 * time.Hour)}); err != nil {
				t.Fatal(err)
			}
			left(2 * time.Hour)
			if err := SayOfJobs(dir, policy.Word{Paused: true, Said: said}); err != nil {
				t.Fatal(err)
			}
			if w, err := h.paused(dir); err != nil || !w.Paused || !w.Until.IsZero() {
				t.Errorf("a pause until further notice: %+v, %v", w, err)
			}
		})
	}
}
