package health

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deimos-edge/deimos/wire"
	"unicode/utf8"
)

// shown lists what is visible as "code subject".
func shown(r *Registry) []string {
	out := []string{}
	for _, w := range r.Visible() {
		out = append(out, strings.TrimSpace(w.Code+" "+w.Subject))
	}
	return out
}

func expect(t *testing.T, r *Registry, want ...string) {
	t.Helper()
	if got := shown(r); !slices.Equal(got, want) {
		t.Fatalf("visible: %q, not %q", got, want)
	}
}

func fired(c <-chan struct{}) bool {
	synctest.Wait()
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// look is where expectations stand: past the instant at which something changes.
const look = time.Millisecond

func TestVisibleOnlyAfterItHasLasted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		after := kindOf(Offline).After
		changed := r.Changed()
		r.Set(Offline, "", "no answer")
		if expect(t, r); fired(changed) {
			t.Error("nothing has changed yet")
		}
		time.Sleep(after - look)
		if expect(t, r); fired(changed) {
			t.Error("too early")
		}
		time.Sleep(2 * look)
		if expect(t, r, "offline"); !fired(changed) {
			t.Error("nobody was told what time alone has changed")
		}
	})
}

func TestWhatEndsBeforeItIsVisibleIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		after := kindOf(Offline).After
		for range 20 {
			r.Set(Offline, "", "")
			time.Sleep(after - look)
			r.Clear(Offline, "")
			time.Sleep(look)
			expect(t, r)
		}
	})
}

func TestWhatReturnsWithinAWhileDoesNotFlicker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		k := kindOf(Offline)
		r.Set(Offline, "", "first")
		time.Sleep(k.After + look)
		since := r.Visible()[0].Since
		changed := r.Changed()
		for range 10 {
			r.Clear(Offline, "")
			time.Sleep(k.Hold - look)
			expect(t, r, "offline")
			r.Set(Offline, "", "again")
			time.Sleep(time.Second)
			if w := r.Visible(); len(w) != 1 || !w[0].Since.Equal(since) || !strings.HasPrefix(w[0].Text, "Again. ") {
				t.Fatalf("%+v; since was %v", w, since)
			}
		}
		r.Clear(Offline, "")
		time.Sleep(k.Hold + look)
		if expect(t, r); !fired(changed) {
			t.Error("nobody was told of the end")
		}
		r.Set(Offline, "", "anew")
		expect(t, r)
		time.Sleep(k.After + look)
		if w := r.Visible(); len(w) != 1 || !w[0].Since.After(since) {
			t.Errorf("one that had ended is the same as before: %+v", w)
		}
	})
}

func TestOnlyTheFirstSetCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		r.Set(Offline, "", "a")
		for range 100 {
			time.Sleep(kindOf(Offline).After / 50)
			r.Is(Offline, "", true, "b")
		}
		expect(t, r, "offline")
		if w := r.Visible()[0]; time.Since(w.Since).Round(time.Second) != 2*kindOf(Offline).After {
			t.Errorf("since %v", w.Since)
		}
	})
}

// A change in words would have a heartbeat sent with each tenth of a degree.
func TestWordsAloneTellNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		r.Set(DiskFailing, "a", "one")
		c := r.Changed()
		r.Set(DiskFailing, "a", "two")
		if fired(c) {
			t.Error("told of new words")
		}
		r.set(DiskFailing, "a", "two", wire.Info)
		if !fired(c) {
			t.Error("not told of a new severity")
		}
	})
}

// The clock of a device is set when the network comes: that must neither show
// nor hide anything, and Since becomes right.
func TestAClockThatJumpsShowsAndHidesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var jump time.Duration
		r := New(func() time.Time { return time.Now().Round(0).Add(jump) })
		jump = -30 * 365 * 24 * time.Hour
		r.Set(Offline, "", "")
		r.Set(DiskFailing, "a", "")
		time.Sleep(time.Second)
		jump = 0
		expect(t, r, "disk_failing a")
		if w := r.Visible()[0]; time.Since(w.Since) > 2*time.Second {
			t.Errorf("since %v, which the clock has said when it was wrong", w.Since)
		}
		r.Clear(DiskFailing, "a")
		jump = 100 * 24 * time.Hour
		time.Sleep(kindOf(DiskFailing).Hold / 2)
		expect(t, r, "disk_failing a", "offline")
		jump = -jump
		time.Sleep(kindOf(DiskFailing).Hold/2 + look)
		expect(t, r, "offline")
	})
}

func TestSinceDoesNotWander(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slew time.Duration
		r := New(func() time.Time { return time.Now().Add(slew) })
		r.Set(DiskFailing, "a", "")
		since := r.Visible()[0].Since
		for range 100 {
			time.Sleep(time.Second)
			slew += 20 * time.Millisecond
			if got := r.Visible()[0].Since; !got.Equal(since) {
				t.Fatalf("%v, before %v", got, since)
			}
		}
	})
}

func TestACauseHidesWhatFollowsFromIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		r.Set(CoordinatorRefuses, "", "")
		r.Set(ClockUntrusted, "", "")
		r.Set(Offline, "", "")
		time.Sleep(time.Hour)
		expect(t, r, "coordinator_refuses") // offline follows from it, and hides the clock all the same
		r.Clear(CoordinatorRefuses, "")
		time.Sleep(time.Hour)
		expect(t, r, "offline")
		r.Clear(Offline, "")
		time.Sleep(time.Hour)
		expect(t, r, "clock_untrusted")
	})
}

func TestADiskHidesOnlyItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		r.lie(map[string]string{"/mnt/a/deimos": "A", "/mnt/b/deimos": "B", "sda": "A"})
		for _, s := range []string{"A", "B"} {
			r.Set(DiskSlow, s, "")
		}
		r.Set(VolumeFailed, "/mnt/a/deimos", "")
		r.Set(VolumeFailed, "/mnt/b/deimos", "")
		r.Set(DiskRefused, "sda", "")
		r.Set(DiskGone, "A", "")
		time.Sleep(time.Hour)
		expect(t, r, "volume_failed /mnt/b/deimos", "disk_gone A", "disk_slow B")
	})
}

// What hides must not come later than what it hides, or the consequence flashes up first.
func TestNoConsequenceBeforeItsCause(t *testing.T) {
	for _, k := range kinds {
		for _, c := range k.Hides {
			h, ok := byCode[c]
			if !ok || k.After > h.After || c == k.Code || slices.Contains(h.Hides, k.Code) {
				t.Errorf("%s (after %s) hides %s (after %s)", k.Code, k.After, c, h.After)
			}
		}
	}
}

func TestEachKindIsWhole(t *testing.T) {
	seen := map[Code]bool{}
	for _, k := range kinds {
		if seen[k.Code] || k.Title == "" || len(k.Title) > 50 || !strings.HasSuffix(k.Todo, ".") || rank[k.Severity] == 0 && k.Severity != wire.Info || k.After < 0 || k.Hold < 0 {
			t.Errorf("%+v", k)
		}
		seen[k.Code] = true
	}
	for _, c := range []Code{DiskFailing, DiskWearing, DiskSlow, DiskHung, DiskGone, DiskErrors, DiskCable, DiskRefused, VolumeFailed, FilesystemFull, FilesystemReadOnly,
		Overheating, Throttled, MemoryPressure, UnderVoltage, SensorSilent, ClockUntrusted, ClockBattery, Offline, CoordinatorRefuses, UpdateWaiting, UnsafeShutdown,
		AgentKilled, WatchdogFired, Stalled} {
		if !seen[c] {
			t.Errorf("%s is no kind", c)
		}
	}
}

func TestTheWorstComesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		r.Set(UpdateWaiting, "", "")
		r.Set(DiskWearing, "b", "")
		time.Sleep(time.Minute)
		r.Set(DiskWearing, "a", "")
		r.Set(DiskFailing, "c", "")
		r.set(DiskWearing, "z", "", wire.Critical)
		time.Sleep(2 * time.Hour)
		expect(t, r, "disk_failing c", "disk_wearing z", "disk_wearing b", "disk_wearing a", "update_waiting")
	})
}

func TestAThousandOfAKindAreOneFinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		for i := range 1000 {
			r.Set(DiskFailing, fmt.Sprintf("d%03d", i), "bad")
		}
		r.Set(UpdateWaiting, "", "")
		time.Sleep(2 * time.Hour)
		w := r.Visible()
		expect(t, r, "disk_failing d000", "disk_failing d001", "disk_failing d002", "disk_failing d003", "disk_failing others", "update_waiting")
		if len(w) > wire.MaxWarnings || !strings.HasPrefix(w[4].Text, "And 996 more: d004, d005, d006 …") {
			t.Errorf("%+v", w[4])
		}
		for i := range 10 * maxKept {
			r.Set(DiskFailing, fmt.Sprint(i), "")
		}
		if len(r.all) > maxKept+1 {
			t.Errorf("%d are kept", len(r.all))
		}
		r.Only(DiskFailing, "d500")
		time.Sleep(2 * time.Hour)
		expect(t, r, "disk_failing d500", "update_waiting")
		if len(r.all) != 2 || r.kept[DiskFailing] != 1 {
			t.Errorf("%d are kept", len(r.all))
		}
	})
}

func TestTextsAreCleanAndBounded(t *testing.T) {
	r := New(time.Now)
	evil := "\x1b[31m" + strings.Repeat("ö\u202e\n", 100000) + "\xff"
	r.Set(DiskFailing, evil, evil)
	w := r.Visible()[0]
	if len(w.Subject) > maxSubject || len(w.Text) > maxDetail+400 || !utf8.ValidString(w.Subject+w.Text) || strings.ContainsAny(w.Subject+w.Text, "\x1b\n\u202e\ufffd") {
		t.Errorf("%q %q", w.Subject, w.Text)
	}
	r.Set(DiskFailing, "a", "ende gut")
	r.Clear(DiskFailing, evil)
	if r.all[key{DiskFailing, w.Subject}].ended == 0 {
		t.Error("what was set under a dirty name cannot be cleared under it")
	}
	if got := sentence("it is so", "Do it."); got != "It is so. Do it." {
		t.Errorf("%q", got)
	}
	if got := sentence("", "Do it."); got != "Do it." {
		t.Errorf("%q", got)
	}
}

func TestAnUnknownCodeIsShownAndStopsNothing(t *testing.T) {
	r := New(time.Now)
	r.Set("no_such", "", "what")
	if w := r.Visible(); len(w) != 1 || w[0].Title != "no_such" {
		t.Errorf("%+v", w)
	}
	r.Clear("no_such", "")
}

// The timer runs only while something is about to change by itself, so that a
// registry needs no end.
func TestTheTimerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(time.Now)
		r.Set(Offline, "", "")
		r.Set(DiskSlow, "a", "")
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if r.due != 0 {
			t.Errorf("it fires again at %s", r.due)
		}
		c := r.Changed()
		time.Sleep(24 * time.Hour)
		if fired(c) {
			t.Error("nothing has changed")
		}
	})
}

func TestManyAtOnce(t *testing.T) {
	r := New(time.Now)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 200 {
				s := fmt.Sprint(j % 7)
				r.Set(DiskFailing, s, "a")
				r.set(DiskSlow, s, "b", wire.Critical)
				r.Clear(DiskRefused, s)
				r.Is(DiskRefused, s, j%2 == i%2, "c")
				r.Only(DiskSlow, "1", "2")
				r.lie(map[string]string{s: "1"})
				r.Visible()
				select {
				case <-r.Changed():
				default:
				}
			}
		})
	}
	wg.Wait()
}
