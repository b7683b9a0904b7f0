package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/hw/health"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/wire"
)

// UpdatesConfig is what the owner says of updates beforehand. The fleet cannot change it.
type UpdatesConfig struct {
	// Window is when a new version may be installed, and the agent or the machine start
	// again for it. What it takes is fetched before.
	Window policy.Hours `toml:"window"`
	// Consent is "auto", or "ask": each version waits for deimos-agent update approve.
	Consent string `toml:"consent"`
	// OnMetered is what happens to an update that is more than what is left of the month's
	// volume of [transfer]: "fetch" all the same, or "wait" for the next month.
	OnMetered string `toml:"on_metered"`
	// Monthly is what updates may fetch in a month, bytes; 0: no limit. A stick costs nothing.
	Monthly int64 `toml:"monthly_bytes"`
}

func (c UpdatesConfig) check() error {
	switch {
	case c.Consent != "" && c.Consent != "auto" && c.Consent != "ask":
		return fmt.Errorf("consent in [updates] cannot be %.40q: it is \"auto\" or \"ask\"", c.Consent)
	case c.OnMetered != "" && c.OnMetered != "fetch" && c.OnMetered != "wait":
		return fmt.Errorf("on_metered in [updates] cannot be %.40q: it is \"fetch\" or \"wait\"", c.OnMetered)
	case c.Monthly < 0:
		return fmt.Errorf("monthly_bytes in [updates] cannot be %d: it is 0 (no limit), or more", c.Monthly)
	}
	return nil
}

// UpdateWord is what the owner has said of updates since: ota/owner.json. Its times are
// the system's; see sayings for how long ago they are.
type UpdateWord struct {
	Approved string    `json:"approved,omitempty"`      // this version may be installed
	Now      bool      `json:"now,omitempty"`           // and at once, whatever the window is
	Until    time.Time `json:"deferred_until,omitzero"` // nothing is installed before
	Wish     *Wish     `json:"install,omitempty"`       // the newest
	Said     time.Time `json:"said,omitzero"`
}

// Wish is an update from a stick or a file.
type Wish struct {
	ID      string    `json:"id"`
	Place   string    `json:"place"`             // folder or file
	Version string    `json:"version,omitempty"` // "": the newest there
	At      time.Time `json:"at"`
}

const (
	updatesDir = "ota"
	hearEvery  = 2 * time.Second // from the owner
	proveEvery = time.Second
	wishLife   = 24 * time.Hour
)

// UpdatesWord is what the owner of this device has said of updates.
func UpdatesWord(stateDir string) (w UpdateWord, err error) {
	err = readOwn(filepath.Join(stateDir, updatesDir, wordFile), &w)
	return w, err
}

// SayOfUpdates is the owner's word from now on. The agent hears it within two seconds,
// or when it starts.
func SayOfUpdates(stateDir string, w UpdateWord) error {
	return sayAsOwner(stateDir, updatesDir, w)
}

// sayAsOwner writes what the owner says where the agent reads it, as the agent's user.
func sayAsOwner(stateDir, room string, word any) error {
	info, err := os.Stat(stateDir)
	if err != nil {
		return fmt.Errorf("%w be read: %w; choose another with --state", ErrState, err)
	}
	if err := writeOwn(filepath.Join(stateDir, room, wordFile), word); err != nil {
		return fmt.Errorf("%w be written: %w", ErrState, err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		// The agent may run as another user, whose folder it is.
		for _, path := range []string{filepath.Join(stateDir, room), filepath.Join(stateDir, room, wordFile)} {
			if err := os.Lchown(path, int(st.Uid), int(st.Gid)); err != nil {
				return fmt.Errorf("%w be written: %w", ErrState, err)
			}
		}
	}
	return nil
}

// holdUpdate is the owner's word on the next step of an update.
func (a *Agent) holdUpdate(s ota.Step) *wire.Problem {
	c := a.cfg.Updates
	word, err := UpdatesWord(a.cfg.StateDir)
	if err != nil { // what the owner said is not known: the worst is to wait
		return wire.RejectedUntil(askAgain, wire.CodeConsent, "what the owner said of updates cannot be read: %v; say it again with deimos-agent update", err)
	}
	now, sure := a.clock.Read()
	off := a.said.deferred(word)
	switch {
	case off > 0:
		return wire.RejectedUntil(off, wire.CodeDeferred, "the owner has put updates off until %s; deimos-agent update approve takes that back", now.Add(off).In(a.traffic.zone).Format("2006-01-02 15:04"))
	case c.Consent == "ask" && word.Approved != s.Version:
		return wire.RejectedBecause(wire.CodeConsent, "version %s waits for the owner of this device, who says yes with deimos-agent update approve", s.Version)
	case s.Fetch > 0:
		return a.traffic.mayUpdate(c, s)
	case c.Window == (policy.Hours{}) || word.Now && word.Approved == s.Version:
		return nil
	case sure != wire.ClockTrusted:
		return wire.RejectedUntil(askAgain, wire.CodeWindow, "the owner of this device lets updates be installed from %s, and the time is not known yet", c.Window)
	}
	if after := c.Window.Closed(now.In(a.traffic.zone)); after > 0 {
		return wire.RejectedUntil(after, wire.CodeWindow, "the owner of this device lets updates be installed from %s (%s)", c.Window, now.In(a.traffic.zone).Format("-07:00"))
	}
	return nil
}

// mayUpdate is why an update may not fetch its bytes now. Where it is to come whole though
// it has deltas, the owner is told why.
func (t *traffic) mayUpdate(c UpdatesConfig, s ota.Step) *wire.Problem {
	now, sure := t.clock.Read()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now, sure)
	whole := ""
	if s.NoDelta != "" {
		whole = " whole (" + s.NoDelta + ")"
	}
	if c.Monthly > 0 && t.now.Updates+s.Fetch > c.Monthly {
		return wire.RejectedUntil(t.nextMonth(now, sure), wire.CodeMetered, "the update takes %d bytes%s, and of the %d that the owner of this device allows updates in a month %d are used up; it can come from a stick",
			s.Fetch, whole, c.Monthly, t.now.Updates)
	}
	if most := t.limits.Monthly; c.OnMetered == "wait" && most > 0 && t.now.Bytes+t.reserved+s.Fetch > most {
		after := askAgain
		if t.now.Bytes+s.Fetch > most { // else it is for what is under way, which may yet take less
			after = t.nextMonth(now, sure)
		}
		return wire.RejectedUntil(after, wire.CodeMetered, "the update takes %d bytes%s, and of the %d that the owner of this device allows in a month %d are used up; it can come from a stick",
			s.Fetch, whole, most, t.now.Bytes)
	}
	return nil
}

// nextMonth is how long it takes to come; a while, if nobody knows.
func (t *traffic) nextMonth(now time.Time, sure wire.Confidence) time.Duration {
	if sure != wire.ClockTrusted {
		return askAgain
	}
	y, m, _ := now.In(t.zone).Date()
	return time.Date(y, m+1, 1, 0, 0, 0, 0, t.zone).Sub(now)
}

// updated counts bytes of updates, which the connections have counted, too. It is
// noted after each MiB, so that a power cut makes it that much too low.
func (t *traffic) updated(n int64) {
	now, sure := t.clock.Read()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now, sure)
	t.now.Updates += n
	if t.now.Updates-t.notedUpdates >= leastStep {
		t.notedUpdates = t.now.Updates
		t.nudge()
	}
}

// figures are how this agent does, for the version after it to be held to.
func (a *Agent) figures() wire.UpdateFigures {
	a.hw.mu.Lock()
	f := wire.UpdateFigures{Online: a.hw.online}
	a.hw.mu.Unlock()
	f.Volumes = len(a.chunks.Volumes())
	values, _ := a.hw.sensors.Latest()
	seen := map[string]bool{}
	for _, v := range values {
		name, _, _ := strings.Cut(v.Name, "/")
		seen[name] = true
	}
	f.Sensors = len(seen)
	return f
}

// prove confirms a version on trial once it does no worse than the one before. It ends
// with ctx at the latest; who started it gives it up sooner.
func (a *Agent) prove(ctx context.Context) {
	trial, err := a.update.OnTrial()
	if err != nil {
		a.log.Error("whether this version is on trial cannot be told; it is taken for that", "error", err)
	} else if !trial {
		if !a.update.Reboots() { // of a firmware see keepOnly
			a.confirm(ctx)
		}
		return
	}
	try{healthy: a.update.Healthy, look: a.hw.inspect, confirm: a.confirm, changed: a.proving, every: proveEvery, rest: a.cfg.ConfirmWithin / 12, log: a.log}.run(ctx)
}

// try is one of a version on trial.
type try struct {
	healthy func(lived time.Duration) error
	look    func(context.Context) error
	confirm func(context.Context) bool
	changed <-chan struct{} // something that counts
	every   time.Duration
	rest    time.Duration // that it must live on for after the look, so that what that sets off has come
	log     *slog.Logger
}

// run ends when the version is confirmed, or with ctx. A crash that comes at the look at
// the machine, the first of which in an agent's life is after ten minutes, would come
// after there is a way back: so one is taken as soon as nothing is worse, and the version
// is kept only if it lives on after it.
func (t try) run(ctx context.Context) {
	began, said := time.Now(), ""
	var looked time.Time
	tick := time.NewTicker(t.every)
	defer tick.Stop()
	for {
		err := t.healthy(time.Since(began))
		if open := err == nil || errors.Is(err, ota.ErrNotSteady); open && looked.IsZero() {
			if err := t.look(ctx); err != nil && ctx.Err() == nil {
				t.log.Warn("the machine cannot be probed", "error", err) // nor could it by the version before
			}
			looked = time.Now()
			continue
		}
		if err == nil && time.Since(looked) >= t.rest && t.confirm(ctx) {
			t.log.Info("this version is confirmed")
			return
		}
		if err != nil && err.Error() != said && !errors.Is(err, ota.ErrNotSteady) {
			said = err.Error()
			t.log.Warn("this version is not confirmed yet", "why", said)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.changed:
		case <-tick.C:
		}
	}
}

func (a *Agent) confirm(ctx context.Context) bool {
	err := a.update.Confirm(ctx)
	if err == nil {
		err = a.settle()
	}
	if err != nil && ctx.Err() == nil {
		a.log.Error("the update cannot be settled", "error", err)
	}
	return err == nil
}

// hearOwner carries out what the owner wants installed.
func (a *Agent) hearOwner(ctx context.Context) {
	for last := ""; a.rest(ctx, hearEvery) == nil; {
		word, err := UpdatesWord(a.cfg.StateDir)
		if err == nil {
			a.said.deferred(word) // it counts from now on, whether an update comes or not
		}
		if err != nil || word.Wish == nil || word.Wish.ID == last || a.update.Known(word.Wish.ID) {
			continue // who asks for an update, or for its state, is told of the error
		}
		w := word.Wish
		if a.said.wished(w) > wishLife {
			last = w.ID
			a.update.Decline(w.ID, w.Version, wire.RejectedBecause(wire.CodeExpired, "the update from %s was asked for more than %s ago; ask again", w.Place, wishLife))
			continue
		}
		_, err = a.update.Install(ctx, w.ID, w.Place, w.Version, nil)
		switch {
		case errors.Is(err, ota.ErrRestart):
			a.once.Do(func() { close(a.restart) })
			return
		case ctx.Err() != nil:
			return
		}
		last = w.ID
		a.log.Info("an update by the owner's wish has ended", "place", w.Place, "error", err)
	}
}

// feelUpdate tells the owner what an update waits for.
func (a *Agent) feelUpdate() {
	s := a.update.State()
	held := s != nil && s.Phase == wire.UpdateWaiting
	a.hw.held.Store(held)
	if held {
		rec := a.update.Record()
		text := "an update waits"
		if rec.Why != nil {
			text = rec.Why.Reason
		}
		a.hw.health.Is(health.UpdateWaiting, "", true, text)
	}
}

// writeOwn writes a small file of JSON, and makes its folder.
func writeOwn(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return durable.WriteFile(path, raw, 0o600)
}

// Updates is how updates stand on a device, as its state folder tells.
type Updates struct {
	Running bool       `json:"running"`        // an agent runs with this folder
	Runs    string     `json:"runs,omitempty"` // version of the agent, or of the last that ran
	Update  ota.Record `json:"update"`
	Word    UpdateWord `json:"word"`
	Floor   string     `json:"floor,omitempty"` // no version below it is installed
}

// ReadUpdates reads a state folder, whether an agent runs with it or not.
func ReadUpdates(stateDir string) (u Updates, err error) {
	if _, err := os.Stat(stateDir); err != nil {
		return u, fmt.Errorf("%w be read: %w; choose another with --state", ErrState, err)
	}
	u.Running = locked(filepath.Join(stateDir, lockFile))
	feeling, err := readFeeling(stateDir)
	if err != nil {
		return u, fmt.Errorf("%w be read: %w", ErrState, err)
	}
	if feeling != nil {
		u.Runs = feeling.Agent
	}
	if u.Word, err = UpdatesWord(stateDir); err != nil {
		return u, err
	}
	if u.Update, err = ota.ReadRecord(stateDir); err != nil {
		return u, err
	}
	u.Floor, err = ota.ReadFloor(stateDir)
	return u, err
}
