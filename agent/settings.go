package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

// settings is the device's side of the fleet's configuration. Three have a say
// in each value, the later over the earlier:
//
//	built-in default < owner's file < fleet (ConfigApply)
//
// but what the owner's file states is a limit for the fleet too: of a number
// the most (of [scrub] days the least), and "false" for good. A value that the fleet wants and cannot have
// is refused by itself, with the reason; the owner's or the default is then in
// force, and the other values are taken.
//
// The fleet's document is kept as it came, with the values that are refused:
// at each start it is weighed anew against what the owner says by then. It is
// on disk before it is in force. A document older than the one that is kept is
// rejected, so that a late order cannot bring back what was changed since. One
// of the same version is taken again: that is a repeat.
type settings struct {
	path  string
	base  inForce         // without the fleet
	owned map[string]bool // keys that the owner's file states
	apply func(inForce)   // puts values in force; called once at a time
	log   *slog.Logger

	mu      sync.Mutex
	wanted  wire.ConfigApply
	now     inForce
	refused map[string]wire.Refusal
	changed chan struct{} // closed when now changes
}

// inForce is the value of every setting.
type inForce struct {
	beatSeconds int
	jobs        policy.Policy
	scrub       ScrubConfig
	transfer    TransferConfig
	level       slog.Level
}

// knob is how one setting is read, set and compared.
type knob struct {
	get func(f *inForce) any
	set func(f *inForce, raw json.RawMessage) error
	// beyond tells whether want goes further than the owner allows; nil for
	// what an owner's file cannot state.
	beyond func(want, owner *inForce) bool
	least  bool // what the owner allows is the least, not the most
}

// knobs has an entry for each key of [wire.Settings].
var knobs = map[string]knob{
	wire.SettingBeat:      capped(func(f *inForce) *int { return &f.beatSeconds }),
	wire.SettingJobSlots:  capped(func(f *inForce) *int { return &f.jobs.Slots }),
	wire.SettingJobMemory: capped(func(f *inForce) *int64 { return &f.jobs.MaxMemory }),
	wire.SettingJobOutput: capped(func(f *inForce) *int64 { return &f.jobs.MaxOutput }),
	wire.SettingJobCPU:    capped(func(f *inForce) *float64 { return &f.jobs.MaxCPU }),
	wire.SettingJobWall:   capped(func(f *inForce) *float64 { return &f.jobs.MaxWall }),
	wire.SettingJobs: {
		get:    func(f *inForce) any { return f.jobs.Enabled },
		set:    func(f *inForce, raw json.RawMessage) error { return json.Unmarshal(raw, &f.jobs.Enabled) },
		beyond: func(want, owner *inForce) bool { return want.jobs.Enabled && !owner.jobs.Enabled },
	},
	wire.SettingScrubRate: capped(func(f *inForce) *int64 { return &f.scrub.Rate }),
	wire.SettingScrubDays: {
		get:    func(f *inForce) any { return f.scrub.Days },
		set:    func(f *inForce, raw json.RawMessage) error { return json.Unmarshal(raw, &f.scrub.Days) },
		beyond: func(want, owner *inForce) bool { return want.scrub.Days < owner.scrub.Days },
		least:  true,
	},
	wire.SettingDownRate: cappedOrNone(wire.MinRate, func(f *inForce) *int64 { return &f.transfer.Down }),
	wire.SettingUpRate:   cappedOrNone(wire.MinRate, func(f *inForce) *int64 { return &f.transfer.Up }),
	wire.SettingMonthly:  cappedOrNone(leastMonthly, func(f *inForce) *int64 { return &f.transfer.Monthly }),
	wire.SettingLogLevel: {
		get: func(f *inForce) any { return strings.ToLower(f.level.String()) },
		set: func(f *inForce, raw json.RawMessage) error { return json.Unmarshal(raw, &f.level) },
	},
}

// capped is a number of which the owner's value is the most.
func capped[T int | int64 | float64](field func(f *inForce) *T) knob {
	return knob{
		get:    func(f *inForce) any { return *field(f) },
		set:    func(f *inForce, raw json.RawMessage) error { return json.Unmarshal(raw, field(f)) },
		beyond: func(want, owner *inForce) bool { return *field(want) > *field(owner) },
	}
}

// cappedOrNone is [capped] where 0 is no limit, and any other value at least so
// much.
func cappedOrNone(least int64, field func(f *inForce) *int64) knob {
	k := capped(field)
	k.set = func(f *inForce, raw json.RawMessage) error {
		if err := json.Unmarshal(raw, field(f)); err != nil {
			return err
		}
		if v := *field(f); v > 0 && v < least {
			return fmt.Errorf("it is 0 for no limit, or at least %d, not %d", least, v)
		}
		return nil
	}
	k.beyond = func(want, owner *inForce) bool { return *field(want) == 0 || *field(want) > *field(owner) }
	return k
}

// settingsFile is in the state folder: a [wire.ConfigApply] as JSON.
const settingsFile = "config.json"

// openSettings reads the document that was in force before, if any, and puts
// it in force.
func openSettings(path string, base inForce, owned map[string]bool, apply func(inForce), log *slog.Logger) (*settings, error) {
	base.jobs, base.scrub = base.jobs.Effective(), base.scrub.orDefault()
	s := &settings{path: path, base: base, owned: owned, apply: apply, log: log, changed: make(chan struct{})}
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the fleet's configuration cannot be read: %w", err)
	}
	if err == nil {
		if err := json.Unmarshal(raw, &s.wanted); err != nil {
			s.wanted = wire.ConfigApply{}
			log.Error("the fleet's configuration on this device is damaged and not used; the coordinator will send it again", "file", path, "error", err)
		}
	}
	s.enforce()
	return s, nil
}

// Handle is the [wire.Handler] of [wire.KindConfigApply].
func (s *settings) Handle(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	want, err := wire.DecodeBody[wire.ConfigApply](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	if err := s.take(want); err != nil {
		return wire.Outcome{}, err
	}
	return wire.Outcome{Body: s.report()}, nil
}

func (s *settings) take(want wire.ConfigApply) error {
	if want.Version == 0 {
		return wire.RejectedBecause(wire.CodeBadBody, "this configuration has no version")
	}
	raw, err := json.Marshal(want)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if want.Version < s.wanted.Version {
		return wire.RejectedBecause(wire.CodeSuperseded, "this is version %d of the configuration, and version %d is in force", want.Version, s.wanted.Version)
	}
	if err := durable.WriteFile(s.path, raw, 0o600); err != nil {
		return fmt.Errorf("the configuration cannot be saved: %w; version %d stays in force", err, s.wanted.Version)
	}
	s.wanted = want
	s.enforce()
	s.log.Info("the fleet's configuration is in force", "version", want.Version, "refused", slices.Sorted(maps.Keys(s.refused)))
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

// enforce weighs what is wanted and puts it in force. s.mu is held, or nobody
// else knows s yet.
func (s *settings) enforce() {
	s.now, s.refused = s.base, make(map[string]wire.Refusal)
	for key, raw := range s.wanted.Values {
		if r := s.weigh(key, raw); r != nil {
			s.refused[key] = *r
		}
	}
	s.apply(s.now)
}

// weigh sets one value, or says why not.
func (s *settings) weigh(key string, raw json.RawMessage) *wire.Refusal {
	known, ok := wire.SettingOf(key)
	k, mine := knobs[key]
	if !ok || !mine {
		return &wire.Refusal{Code: wire.CodeNotSupported, Reason: "this version of the agent has no such setting"}
	}
	clean, err := known.Check(raw)
	if err != nil {
		return &wire.Refusal{Code: wire.CodeBadBody, Reason: err.Error()}
	}
	want := s.now
	if err := k.set(&want, clean); err != nil {
		return &wire.Refusal{Code: wire.CodeBadBody, Reason: fmt.Sprintf("%s cannot be set: %v", key, err)}
	}
	if s.owned[key] && k.beyond != nil && k.beyond(&want, &s.base) {
		bound := "more"
		if k.least {
			bound = "less"
		}
		return &wire.Refusal{Code: wire.CodePolicy, Reason: fmt.Sprintf("the owner of this device allows no %s than %v (%s in its configuration file)", bound, k.get(&s.base), key)}
	}
	s.now = want
	return nil
}

// report says what is in force.
func (s *settings) report() wire.ConfigReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := wire.ConfigReport{Version: s.wanted.Version, Running: make(map[string]json.RawMessage, len(knobs)), Refused: maps.Clone(s.refused)}
	for key, k := range knobs {
		raw, err := json.Marshal(k.get(&s.now))
		if err != nil {
			s.log.Error("a setting cannot be reported", "key", key, "error", err)
			continue
		}
		r.Running[key] = raw
	}
	return r
}

// version is that of the newest document that was taken; 0 if there was none.
func (s *settings) version() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wanted.Version
}

// beat is the time between two heartbeats, and a channel that is closed when
// any setting changes.
func (s *settings) beat() (time.Duration, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Duration(s.now.beatSeconds) * time.Second, s.changed
}

// owners is which settings the owner's file states. A number that is not above
// zero states nothing (see jobs/policy).
func owners(defined func(key ...string) bool, c Config) map[string]bool {
	p := c.Jobs
	stated := map[string]bool{
		wire.SettingJobs:      true,
		wire.SettingJobSlots:  p.Slots > 0,
		wire.SettingJobMemory: p.MaxMemory > 0,
		wire.SettingJobOutput: p.MaxOutput > 0,
		wire.SettingJobCPU:    p.MaxCPU > 0,
		wire.SettingJobWall:   p.MaxWall > 0,

		wire.SettingScrubDays: c.Scrub.Days > 0,
		wire.SettingScrubRate: c.Scrub.Rate > 0,

		wire.SettingDownRate: c.Transfer.Down > 0,
		wire.SettingUpRate:   c.Transfer.Up > 0,
		wire.SettingMonthly:  c.Transfer.Monthly > 0,
	}
	maps.DeleteFunc(stated, func(key string, sensible bool) bool {
		return !sensible || !defined(strings.Split(key, ".")...)
	})
	return stated
}

// leveled filters messages by a level that can change at any time.
type leveled struct {
	slog.Handler
	level *slog.LevelVar
}

// withLevel gives a logger whose level can change, and has the old one's to
// begin with.
func withLevel(log *slog.Logger) (*slog.Logger, *slog.LevelVar) {
	level := new(slog.LevelVar)
	level.Set(slog.LevelError)
	for _, l := range []slog.Level{slog.LevelWarn, slog.LevelInfo, slog.LevelDebug} {
		if log.Enabled(context.Background(), l) {
			level.Set(l)
		}
	}
	return slog.New(leveled{log.Handler(), level}), level
}

func (l leveled) Enabled(_ context.Context, at slog.Level) bool { return at >= l.level.Level() }

func (l leveled) WithAttrs(attrs []slog.Attr) slog.Handler {
	return leveled{l.Handler.WithAttrs(attrs), l.level}
}

func (l leveled) WithGroup(name string) slog.Handler {
	return leveled{l.Handler.WithGroup(name), l.level}
}
