package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/wire"
)

func TestWhatTheOwnerSaysOfUpdatesIsReadAndMistakesNamed(t *testing.T) {
	c, _, err := loadText(t, "[updates]\nwindow = \"02:00-05:00\"\nconsent = \"ask\"\non_metered = \"wait\"\nmonthly_bytes = 50_000_000\n")
	want := UpdatesConfig{Window: mustHours(t, "02:00-05:00"), Consent: "ask", OnMetered: "wait", Monthly: 50_000_000}
	if err != nil || c.Updates != want {
		t.Fatalf("%+v, %v", c.Updates, err)
	}
	for text, says := range map[string]string{
		"window = \"2-5\"":       "22:00-06:00",
		"consent = \"maybe\"":    "\"auto\" or \"ask\"",
		"on_metered = \"stop\"":  "\"fetch\" or \"wait\"",
		"monthly_bytes = -1":     "monthly_bytes",
		"windows = \"02:00-05\"": "updates.windows",
	} {
		_, path, err := loadText(t, "[updates]\n"+text+"\n")
		if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// ask is what an owner's configuration and word make of a step.
func TestTheOwnersWordOnAnUpdate(t *testing.T) {
	fetch, install := ota.Step{Order: "o", Version: "1.2.0", Fetch: 5 << 20}, ota.Step{Order: "o", Version: "1.2.0"}
	whole := fetch
	whole.NoDelta = "the delta is broken"
	night := UpdatesConfig{Window: mustHours(t, "02:00-05:00")}
	asks := UpdatesConfig{Consent: "ask"}
	for name, c := range map[string]struct {
		c     UpdatesConfig
		word  UpdateWord
		step  ota.Step
		unset bool  // nobody has told the time
		moved int64 // by updates this month
		all   int64 // of the month's volume of 100 MiB, by everything
		code  string
		after time.Duration
		says  string
	}{
		"nothing said":                {step: install},
		"nothing said, to fetch":      {step: fetch},
		"by day":                      {c: night, step: install, code: wire.CodeWindow, after: 14 * time.Hour},
		"by day, to fetch":            {c: night, step: fetch},
		"no clock":                    {c: night, step: install, unset: true, code: wire.CodeWindow, after: askAgain},
		"at noon":                     {c: UpdatesConfig{Window: mustHours(t, "11:00-13:00")}, step: install},
		"over midnight":               {c: UpdatesConfig{Window: mustHours(t, "23:00-01:00")}, step: install, code: wire.CodeWindow, after: 11 * time.Hour},
		"asks":                        {c: asks, step: fetch, code: wire.CodeConsent},
		"asks, another was approved":  {c: asks, word: UpdateWord{Approved: "1.1.0"}, step: fetch, code: wire.CodeConsent},
		"asks, and was answered":      {c: asks, word: UpdateWord{Approved: "1.2.0"}, step: fetch},
		"approved, but by day":        {c: night, word: UpdateWord{Approved: "1.2.0"}, step: install, code: wire.CodeWindow, after: 14 * time.Hour},
		"approved, and now":           {c: night, word: UpdateWord{Approved: "1.2.0", Now: true}, step: install},
		"another one now":             {c: night, word: UpdateWord{Approved: "1.1.0", Now: true}, step: install, code: wire.CodeWindow, after: 14 * time.Hour},
		"put off":                     {word: UpdateWord{Until: someDay.Add(time.Hour), Said: someDay}, step: install, code: wire.CodeDeferred, after: time.Hour},
		"put off, over":               {word: UpdateWord{Until: someDay.Add(-time.Hour), Said: someDay.Add(-2 * time.Hour)}, step: install},
		"a budget":                    {c: UpdatesConfig{Monthly: 6 << 20}, step: fetch},
		"a budget, exactly":           {c: UpdatesConfig{Monthly: 6 << 20}, moved: 1 << 20, step: fetch},
		"a budget, used up":           {c: UpdatesConfig{Monthly: 6 << 20}, moved: 1<<20 + 1, step: fetch, code: wire.CodeMetered, after: 8*24*time.Hour + 12*time.Hour},
		"a budget, and all is here":   {c: UpdatesConfig{Monthly: 6 << 20}, moved: 6 << 20, step: install},
		"the month is used up":        {all: 100 << 20, step: fetch},
		"the month is used up, waits": {c: UpdatesConfig{OnMetered: "wait"}, all: 100 << 20, step: fetch, code: wire.CodeMetered, after: 8*24*time.Hour + 12*time.Hour},
		"it fits the month's rest":    {c: UpdatesConfig{OnMetered: "wait"}, all: 95 << 20, step: fetch},
		"it is more than the rest":    {c: UpdatesConfig{OnMetered: "wait"}, all: 95<<20 + 1, step: fetch, code: wire.CodeMetered, after: 8*24*time.Hour + 12*time.Hour, says: "takes 5242880 bytes, and"},
		"whole, more than the rest":   {c: UpdatesConfig{OnMetered: "wait"}, all: 96 << 20, step: whole, code: wire.CodeMetered, after: 8*24*time.Hour + 12*time.Hour, says: "takes 5242880 bytes whole (the delta is broken), and"},
		"whole, beyond a budget":      {c: UpdatesConfig{Monthly: 6 << 20}, moved: 2 << 20, step: whole, code: wire.CodeMetered, after: 8*24*time.Hour + 12*time.Hour, says: "takes 5242880 bytes whole (the delta is broken), and"},
		"whole, within a budget":      {c: UpdatesConfig{Monthly: 6 << 20}, moved: 1 << 20, step: whole},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			m := newMeter(t, filepath.Join(dir, trafficFile), someDay)
			if c.unset {
				m.clock = NewClock(someDay)
				m.clock.system = func() time.Time { return someDay }
			}
			m.set(TransferConfig{Monthly: 100 << 20})
			m.moved(int(c.all))
			m.updated(c.moved)
			a := &Agent{cfg: Config{StateDir: dir, Updates: c.c}, clock: m.clock, traffic: m.traffic, said: newSayings(filepath.Join(dir, updatesDir), "boot", m.clock, discardLog())}
			if c.word != (UpdateWord{}) {
				if err := SayOfUpdates(dir, c.word); err != nil {
					t.Fatal(err)
				}
			}
			p := a.holdUpdate(c.step)
			switch {
			case c.code == "" && p == nil:
			case c.code == "" || p == nil || p.Code != c.code || p.After.Round(time.Second) != c.after || p.State != wire.Rejected || p.Reason == "" || !strings.Contains(p.Reason, c.says):
				t.Errorf("%+v; want %q after %s, with %q", p, c.code, c.after, c.says)
			}
		})
	}
}

// What cannot be read may have been "no".
// TestAVersionLooksAtItsMachineBeforeItIsKept: once, when nothing is worse any more, and it
// lives on after it.
func TestAVersionLooksAtItsMachineBeforeItIsKept(t *testing.T) {
	worse := errors.New("it does worse")
	for what, c := range map[string]struct {
		healthy []error // one after the other
		looks   error
		want    string
	}{
		"well from the start": {[]error{nil, nil}, nil, "asked looked asked kept"},
		"not for long enough": {[]error{ota.ErrNotSteady, ota.ErrNotSteady, nil}, nil, "asked looked asked asked kept"},
		"worse at first":      {[]error{worse, worse, ota.ErrNotSteady, nil}, nil, "asked asked asked looked asked kept"},
		"worse after it":      {[]error{ota.ErrNotSteady, worse, nil}, nil, "asked looked asked asked kept"},
		"it cannot look":      {[]error{nil, nil}, errors.New("no such disk"), "asked looked asked kept"},
	} {
		t.Run(what, func(t *testing.T) {
			var did []string
			changed := make(chan struct{}, 1)
			do := func(s string) {
				did = append(did, s)
				select {
				case changed <- struct{}{}:
				default:
				}
			}
			try{
				healthy: func(time.Duration) error {
					do("asked")
					err := c.healthy[0]
					c.healthy = c.healthy[min(1, len(c.healthy)-1):]
					return err
				},
				look:    func(context.Context) error { do("looked"); return c.looks },
				confirm: func(context.Context) bool { do("kept"); return true },
				changed: changed, every: time.Minute, log: slog.New(slog.DiscardHandler),
			}.run(t.Context())
			if got := strings.Join(did, " "); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

// What was steady for long before the look, as its broker came late, is no proof of what the
// look sets off.
func TestAVersionLivesOnAfterItsLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		try{
			healthy: func(time.Duration) error { return nil },
			look:    func(context.Context) error { time.Sleep(3 * time.Second); return nil },
			confirm: func(context.Context) bool { return true },
			changed: make(chan struct{}), every: time.Second, rest: 10 * time.Second, log: slog.New(slog.DiscardHandler),
		}.run(t.Context())
		if took := time.Since(began); took != 13*time.Second {
			t.Errorf("it was kept after %s", took)
		}
	})
}

func TestAnOwnersWordThatIsDamagedHoldsUpdates(t *testing.T) {
	dir := t.TempDir()
	m := newMeter(t, filepath.Join(dir, trafficFile), someDay)
	a := &Agent{cfg: Config{StateDir: dir}, clock: m.clock, traffic: m.traffic, said: newSayings(filepath.Join(dir, updatesDir), "boot", m.clock, discardLog())}
	if err := SayOfUpdates(dir, UpdateWord{Until: someDay.Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, updatesDir, wordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p := a.holdUpdate(ota.Step{Version: "1.0.0"}); p == nil || p.Code != wire.CodeConsent {
		t.Errorf("%+v", p)
	}
}

// TestTheVolumeOfUpdatesOutlivesRestarts, and a power cut makes it a MiB too low at most.
func TestTheVolumeOfUpdatesOutlivesRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), trafficFile)
	m := newMeter(t, path, someDay)
	moved := int64(0)
	for range 100 {
		m.updated(100 << 10)
		moved += 100 << 10
		m.written()
		next := newMeter(t, path, someDay) // as after a cut
		if next.now.Updates > moved || next.now.Updates <= moved-leastStep {
			t.Fatalf("of %d bytes %d are remembered", moved, next.now.Updates)
		}
	}
	m.at = someDay.AddDate(0, 1, 0)
	m.updated(7)
	if m.now.Updates != 7 {
		t.Errorf("a new month begins with %d", m.now.Updates)
	}
}

// TestTheOwnersWordOutlivesItsClock: the system's clock is wrong when it is said, or is
// set after it, and a deferral lasts as long as was said; nor is a stick ignored.
func TestTheOwnersWordOutlivesItsClock(t *testing.T) {
	real := someDay
	for name, system := range map[string]time.Time{"right": real, "1970": time.Unix(60, 0).UTC(), "2040": real.AddDate(14, 0, 0)} {
		for _, learns := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, learns the time: %v", name, learns), func(t *testing.T) {
				dir := t.TempDir()
				up, boot := time.Hour, "first"
				clock := NewClock(real.AddDate(0, -3, 0)) // as of the last start
				at := system
				clock.system = func() time.Time { return at }
				agent := func() *sayings {
					h := newSayings(filepath.Join(dir, updatesDir), boot, clock, discardLog())
					h.up = func() time.Duration { return up }
					return h
				}
				h := agent()
				pass := func(d time.Duration) { up, at = up+d, at.Add(d) }
				word := UpdateWord{Until: at.Add(48 * time.Hour), Said: at, Wish: &Wish{ID: "w", At: at}}
				pass(time.Second)
				want := func(when string, left time.Duration) {
					t.Helper()
					if got := h.deferred(word); (got - left).Abs() > 2*time.Minute {
						t.Errorf("%s: put off for %s more, want %s", when, got, left)
					}
					if got := h.wished(word.Wish); (got - (48*time.Hour - left)).Abs() > 2*time.Minute {
						t.Errorf("%s: asked for %s ago, want %s", when, got, 48*time.Hour-left)
					}
				}
				want("at once", 48*time.Hour)
				pass(10 * time.Hour)
				want("later", 38*time.Hour)
				if learns {
					at = real.Add(10 * time.Hour)
					clock.Raise(at)
					want("the time is set", 38*time.Hour)
				}
				h = agent() // the agent starts again
				pass(time.Hour)
				want("the agent started", 37*time.Hour)
				boot, up = "second", time.Minute
				h = agent()
				want("the machine started", 37*time.Hour)
				pass(20 * time.Hour)
				want("then", 17*time.Hour)
				pass(17*time.Hour + time.Minute)
				if got := h.deferred(word); got != 0 {
					t.Errorf("for ever: %s more", got)
				}
			})
		}
	}
}

// TestAWordThatLayThereIsAsOldAsItIs: said while no agent ran.
func TestAWordThatLayThereIsAsOldAsItIs(t *testing.T) {
	clock := NewClock(someDay)
	clock.system = func() time.Time { return someDay }
	h := newSayings(t.TempDir(), "boot", clock, discardLog())
	if got := h.deferred(UpdateWord{Until: someDay.Add(time.Hour), Said: someDay.Add(-23 * time.Hour)}); got != time.Hour {
		t.Errorf("put off for %s more", got)
	}
	if got := h.wished(&Wish{ID: "w", At: someDay.Add(-25 * time.Hour)}); got != 25*time.Hour {
		t.Errorf("asked for %s ago", got)
	}
}
