package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/orders"
	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// TransferConfig is what the owner lets the fleet have of the line. What the file
// states is a limit for the fleet, which may set less; the hours are the owner's
// alone. Rates and hours are of bulk: chunks that come in and go out, and by rate
// the modules of jobs. Orders, reports and proofs are small or cannot wait; of updates see
// [UpdatesConfig].
type TransferConfig struct {
	Down    int64        `toml:"max_down_bytes_per_second" json:"max_down_bytes_per_second"` // 0: no limit
	Up      int64        `toml:"max_up_bytes_per_second" json:"max_up_bytes_per_second"`     // 0: no limit
	Monthly int64        `toml:"monthly_bytes" json:"monthly_bytes"`                         // in and out, of everything; 0: no limit
	Hours   policy.Hours `toml:"hours" json:"hours"`                                         // of bulk
}

// leastMonthly is what a month's volume must be at least: a few chunks.
const leastMonthly = 64 << 20

func (c TransferConfig) check() error {
	for _, v := range []struct {
		key   string
		value int64
		least int64
		why   string
	}{
		{"max_down_bytes_per_second", c.Down, wire.MinRate, "or chunks do not get through before their orders end"},
		{"max_up_bytes_per_second", c.Up, wire.MinRate, "or chunks do not get through before their orders end"},
		{"monthly_bytes", c.Monthly, leastMonthly, "or the month ends with a few chunks"},
	} {
		if v.value < 0 || v.value > 0 && v.value < v.least {
			return fmt.Errorf("%s in [transfer] cannot be %d: it is 0 (no limit), or at least %d, %s", v.key, v.value, v.least, v.why)
		}
	}
	return nil
}

// traffic counts what goes over the line to the fleet, and is the owner's word on
// bulk ([orders.Limits]).
//
// It counts the bytes of all connections to broker and data plane, TLS included,
// in both directions; headers of TCP and IP, some 4%, are not in it. A month is the
// calendar's, by the machine's time zone and a trusted clock: without one the old
// month goes on.
//
// The count is on disk in steps of up to 16 MiB, half a step apart, so that the
// flash sees one small write for 8 MiB: written is up to where it may have come
// before the next write. After a power cut that is where it goes on, so a cut makes
// it up to a step too high, and never too low.
type traffic struct {
	path  string
	clock *Clock
	zone  *time.Location
	pace  *transfer.Pace
	log   *slog.Logger

	mu       sync.Mutex
	limits   TransferConfig
	noted    TransferConfig // that the file speaks of
	now      month
	covered  int64 // bytes up to which the file speaks
	reserved int64 // of chunks under way
	// notedUpdates is up to where the bytes of updates are noted, or about to be.
	notedUpdates int64
	failing      bool // the file cannot be written, and the log says so
	due          chan struct{}
}

// Line is what was moved this month, and what may be: traffic.json.
type Line struct {
	month
	Limits TransferConfig `json:"limits"`         // in force, of owner and fleet
	Left   *int64         `json:"left,omitempty"` // of the month's volume, at least; not in the file
}

// readLine returns nil without error if nothing was noted yet, or what was is damaged.
func readLine(stateDir string) (*Line, error) {
	raw, err := os.ReadFile(filepath.Join(stateDir, trafficFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var l Line
	if json.Unmarshal(raw, &l) != nil {
		return nil, nil
	}
	if most := l.Limits.Monthly; most > 0 {
		left := max(0, most-l.Bytes-l.Ahead)
		l.Left = &left
	}
	return &l, nil
}

// month is how much was moved in one.
type month struct {
	Month string `json:"month"` // such as 2026-11; empty before the time was known
	Bytes int64  `json:"bytes"` // in and out
	Ahead int64  `json:"ahead"` // so many more may have moved since; 0 if the agent ended in good order
	// Updates are those of Bytes that were for updates.
	Updates int64 `json:"updates,omitempty"`
}

const (
	trafficFile = "traffic.json"
	mostStep    = 16 << 20 // bytes between two writes
	leastStep   = 1 << 20
	// askAgain is how long who cannot be told better waits.
	askAgain = time.Minute
)

var _ orders.Limits = (*traffic)(nil)

func openTraffic(path string, clock *Clock, log *slog.Logger) (*traffic, error) {
	t := &traffic{path: path, clock: clock, zone: time.Local, pace: transfer.NewPace(), log: log, due: make(chan struct{}, 1)}
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the count of this month's traffic cannot be read: %w", err)
	}
	if err == nil && json.Unmarshal(raw, &t.now) != nil {
		t.now = month{}
		log.Error("the count of this month's traffic is damaged, and begins at nothing", "file", path)
	}
	t.now.Bytes, t.now.Ahead = t.now.Bytes+t.now.Ahead, 0
	t.covered, t.notedUpdates = t.now.Bytes, t.now.Updates
	var said Line
	if json.Unmarshal(raw, &said) == nil {
		t.noted = said.Limits
	}
	return t, nil
}

// set puts limits in force.
func (t *traffic) set(c TransferConfig) {
	t.pace.Set(c.Up, c.Down)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.limits = c; c != t.noted {
		t.nudge() // for deimos-agent status
	}
}

// counted is conn with all that it moves counted.
func (t *traffic) counted(conn net.Conn) net.Conn { return &countedConn{conn, t} }

type countedConn struct {
	net.Conn
	t *traffic
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.t.moved(n)
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.t.moved(n)
	return n, err
}

func (t *traffic) moved(n int) {
	now, sure := t.clock.Read()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now, sure)
	t.now.Bytes += int64(n)
	if t.now.Bytes > t.covered-t.step()/2 {
		t.nudge()
	}
}

// turn begins a new month if it is time. mu is held.
func (t *traffic) turn(now time.Time, sure wire.Confidence) {
	if sure != wire.ClockTrusted {
		return
	}
	this := now.In(t.zone).Format("2006-01")
	if this == t.now.Month {
		return
	}
	if t.now.Month != "" && this > t.now.Month { // of an earlier one, what was counted by then counts on
		t.now.Bytes, t.covered = 0, 0
		t.now.Updates, t.notedUpdates = 0, 0
	}
	t.now.Month = this
	t.nudge()
}

func (t *traffic) nudge() {
	select {
	case t.due <- struct{}{}:
	default:
	}
}

// step is how far ahead the file speaks: less of a small volume. mu is held.
func (t *traffic) step() int64 {
	if t.limits.Monthly == 0 {
		return mostStep
	}
	return min(max(t.limits.Monthly/256, leastStep), mostStep)
}

// keep writes the count when it is due, until stop is closed, and then as it is.
func (t *traffic) keep(stop <-chan struct{}) {
	for {
		select {
		case <-t.due:
			t.save(false)
		case <-stop:
			t.save(true)
			return
		}
	}
}

func (t *traffic) save(last bool) {
	t.mu.Lock()
	m, limits := t.now, t.limits
	if !last {
		m.Ahead = t.step()
	}
	t.mu.Unlock()
	raw, err := json.Marshal(Line{month: m, Limits: limits})
	if err == nil {
		err = durable.WriteFile(t.path, raw, 0o600)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil && !t.failing {
		t.log.Error("this month's traffic cannot be noted; after a power cut it is counted too low", "error", err)
	}
	t.failing, t.noted = err != nil, limits
	if m.Month == t.now.Month {
		t.covered = m.Bytes + m.Ahead // also if it failed, or it would be tried with every byte
	}
}

// Check is [orders.Limits].
func (t *traffic) Check() error {
	now, sure := t.clock.Read()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.check(now, sure)
}

// Reserve is [orders.Limits].
func (t *traffic) Reserve(size int64) (done func(), err error) {
	now, sure := t.clock.Read()
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.check(now, sure); err != nil {
		return nil, err
	}
	t.reserved += size
	return sync.OnceFunc(func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.reserved -= size
	}), nil
}

// usedUp is for how long the month's volume is; 0 if it is not.
func (t *traffic) usedUp() time.Duration {
	now, sure := t.clock.Read()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now, sure)
	if p := t.inVolume(now, sure); p != nil {
		return p.After
	}
	return 0
}

// check is the refusal that lasts longest, if there is one. mu is held.
func (t *traffic) check(now time.Time, sure wire.Confidence) error {
	t.turn(now, sure)
	hours, volume := t.inHours(now, sure), t.inVolume(now, sure)
	switch {
	case volume != nil && (hours == nil || volume.After >= hours.After):
		return volume
	case hours != nil:
		return hours
	}
	return nil
}

func (t *traffic) inHours(now time.Time, sure wire.Confidence) *wire.Problem {
	h := t.limits.Hours
	if h == (policy.Hours{}) {
		return nil
	}
	if sure != wire.ClockTrusted {
		return wire.RejectedUntil(askAgain, wire.CodeQuietHours, "the owner of this device lets chunks be moved from %s, and the time is not known yet; ask again in a minute", h)
	}
	after := h.Closed(now.In(t.zone))
	if after == 0 {
		return nil
	}
	return wire.RejectedUntil(after, wire.CodeQuietHours, "the owner of this device lets chunks be moved from %s (%s); ask again in %s", h, now.In(t.zone).Format("-07:00"), after.Round(time.Minute))
}

func (t *traffic) inVolume(now time.Time, sure wire.Confidence) *wire.Problem {
	most := t.limits.Monthly
	if most == 0 || t.now.Bytes+t.reserved+chunk.MaxSize <= most {
		return nil
	}
	after := askAgain
	// If it is only for what is under way, that may yet take less.
	if t.now.Bytes+chunk.MaxSize > most {
		after = t.nextMonth(now, sure)
	}
	return wire.RejectedUntil(after, wire.CodeMetered, "%d of the %d bytes that the owner of this device allows in a month are used up; ask again in %s", t.now.Bytes, most, after.Round(time.Minute))
}
