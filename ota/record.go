package ota

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

// Record is what is remembered of the newest update: ota/update.json in the state
// folder. From its trial on it only adds to what the slots, or the firmware's record,
// say: they decide.
type Record struct {
	Order   string     `json:"order,omitempty"` // or what the owner's wish is called, see [LocalOrder]
	Version string     `json:"version,omitempty"`
	From    string     `json:"from,omitempty"`  // the version that installs
	Local   string     `json:"local,omitempty"` // the folder or file that the owner named
	Phase   slot.Phase `json:"phase"`
	Why     *Why       `json:"why,omitempty"` // it waits

	Form       string              `json:"form,omitempty"`
	NoDelta    string              `json:"no_delta,omitempty"` // why the form is not a delta, of a release that has some
	Unusable   map[string]string   `json:"unusable,omitempty"` // deltas that cannot be used here, by digest: why
	Fetched    int64               `json:"fetched_bytes,omitempty"`
	Took       float64             `json:"took_seconds,omitempty"` // until it was installed
	Checkpoint string              `json:"checkpoint,omitempty"`
	Before     *wire.UpdateFigures `json:"before,omitempty"` // of the version that installs
	After      *wire.UpdateFigures `json:"after,omitempty"`  // of the one on trial
	Worse      []string            `json:"worse,omitempty"`
	Down       bool                `json:"down,omitempty"` // an older version, by a signed exception

	Began *moment `json:"began,omitempty"` // of the fetch
	Ended *Ended  `json:"ended,omitempty"` // how it ended; until then, how the one before did
	Heard string  `json:"heard,omitempty"` // the newest wish of the owner's that has ended
}

// Why is what an update waits for.
type Why struct {
	Code   string     `json:"code"`
	Reason string     `json:"reason"`
	Until  *time.Time `json:"until,omitempty"` // by the device's clock; nil: nobody knows
}

// Ended is how an update ended on this device, for its owner.
type Ended struct {
	Order   string     `json:"order"`
	Version string     `json:"version,omitempty"`
	State   wire.State `json:"state"`
	Code    string     `json:"code,omitempty"`
	Reason  string     `json:"reason,omitempty"`
	At      time.Time  `json:"at"` // by the device's clock
}

// end notes how an update ended; p is nil if it was installed and confirmed.
func (r *Record) end(now time.Time, order, version string, p *wire.Problem) {
	e := &Ended{Order: order, Version: version, State: wire.Succeeded, At: now.UTC().Truncate(time.Second)}
	if p != nil {
		e.State, e.Code, e.Reason = p.State, p.Code, p.Reason
	}
	if r.Ended = e; IsLocal(order) {
		r.Heard = order
	}
}

// moment is a time that no clock that is set can move: of one boot of the kernel.
type moment struct {
	Boot string        `json:"boot"`
	At   time.Duration `json:"at"` // since then, of CLOCK_BOOTTIME
}

func (o Options) moment() *moment {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil || o.Boot == "" {
		return nil
	}
	return &moment{o.Boot, time.Duration(ts.Nano())}
}

// since is how long ago m was; 0 if that was before this boot, or is not known.
func (o Options) since(m *moment) time.Duration {
	now := o.moment()
	if m == nil || now == nil || m.Boot != now.Boot {
		return 0
	}
	return max(0, now.At-m.At)
}

const (
	recordFile = "update.json"
	maxRecord  = 256 << 10 // bytes
)

// ReadRecord is what the agent with this state folder has noted of its newest update;
// nothing, if there was none.
func ReadRecord(stateDir string) (Record, error) {
	r := Record{Phase: slot.Idle}
	raw, err := durable.ReadFile(filepath.Join(stateDir, "ota", recordFile), maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(raw, &r)
	}
	if err != nil {
		return Record{Phase: slot.Idle}, fmt.Errorf("what was noted of the last update cannot be read: %w", err)
	}
	if !r.Phase.Known() { // of a newer version that was left again, or damaged: nothing would lead on from it
		r.Phase = slot.Idle
	}
	return r, nil
}

// memory keeps the record, on disk before a step is taken.
type memory struct {
	path string
	mu   sync.Mutex
	rec  Record
}

// remember takes a record that is damaged for none: what runs is not decided by it, and
// an order comes again.
func remember(stateDir string, log *slog.Logger) *memory {
	rec, err := ReadRecord(stateDir)
	if err != nil {
		log.Warn("the newest update is begun anew if it is offered again", "error", err)
	}
	return &memory{path: filepath.Join(stateDir, "ota", recordFile), rec: rec}
}

func (m *memory) get() Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rec
}

// step takes the update from one phase to the next, if [slot.Table] has that.
func (m *memory) step(e slot.Event, change func(*Record)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	to, err := slot.Next(m.rec.Phase, e)
	if err != nil {
		return err
	}
	slot.CrashPoint("before it is " + string(e))
	err = m.write(func(r *Record) {
		r.Phase, r.Why = to, nil
		if change != nil {
			change(r)
		}
	})
	slot.CrashPoint("it is " + string(e))
	return err
}

// note changes what is remembered, but not the phase.
func (m *memory) note(change func(*Record)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.write(change)
}

// write keeps what was if it cannot be written. mu is held.
func (m *memory) write(change func(*Record)) error {
	next := m.rec
	change(&next)
	raw, err := json.MarshalIndent(next, "", "  ")
	if err == nil {
		err = durable.WriteFile(m.path, append(raw, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("how far the update is cannot be noted: %w", err)
	}
	m.rec = next
	return nil
}

// leave ends what no disk may keep from ending: in memory it has ended in any case.
func (m *memory) leave(change func(*Record)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.write(change)
	if err != nil {
		change(&m.rec)
	}
	return err
}
