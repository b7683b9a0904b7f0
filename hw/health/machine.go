package health

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/sensor"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// Machine judges a machine by its inventory and telemetry. It remembers what is
// usual for it, in a file. Safe for concurrent use.
//
// Each rule answers yes, no or unknown. Unknown changes nothing: a figure that
// is absent neither raises a warning nor ends one. Between the limit that raises
// a warning and the lower one that ends it, the answer is unknown too. A rule
// says in a row how often it has to be so before it counts; the rest of the
// patience is in After and Hold of the kind. A warning ends as well when what it
// is about does not exist any more.
//
// Not judged: a disk's latency until 128 samples of it are known (one that was
// slow from the beginning is never found slow), wear of disks that do not tell
// it, and what sleeps.
type Machine struct {
	log   *slog.Logger
	r     *Registry
	board board.Board
	paths []place
	dir   string
	boot  string // id of this boot; "" if the kernel does not say
	began time.Time
	write func(path string, raw []byte) error

	mu      sync.Mutex // guards the rest
	mem     *memory
	start   float64 // run when this Machine began
	saved   float64 // run
	unsaved bool    // something that should not wait for saveEvery
	writing chan struct{}
	closed  bool

	row       map[key]int          // how often a rule has said yes (above 0) or no (below) in a row
	named     map[string]string    // kernel name → subject, of the newest inventory
	live      map[string]*liveDisk // by subject
	limits    map[string]hw.Sensor // temperatures by name, with their limits
	lone      bool                 // there is one temperature only, which is taken for the processor's
	data      hw.Filesystem        // that paths[0] is on
	floors    map[string]uint64    // of volumes, by mount point
	rootWrote bool                 // "/" was writable since this Machine began
	throttled *uint64              // how often, at the sample before
	sampled   time.Time            // when the sample before came
}

// place is a Path and what it is called behind symbolic links.
type place struct {
	Path
	real string
}

// Path is a folder whose filesystem matters.
type Path struct {
	Dir   string
	Floor uint64 // bytes that what is in it leaves free on purpose, as volumes do; 0 if it is not meant to fill the disk
}

const (
	memoryName = "memory.json"
	markerName = "running" // there while an agent runs; holds the id of the boot
	day        = 24.0      // hours
)

// liveDisk is what is known of a disk since this Machine began.
type liveDisk struct {
	slow      [3]row    // reads, writes, flushes
	bytes     *uint64   // read and written, at the sample before
	rate      float64   // bytes a second, at the sample before
	stuck     time.Time // with a request under way and none done since; zero if not
	ioHung    bool
	probeHung bool
	errors    *uint64   // the kernel's count, at the sample before
	errorAt   time.Time // when it grew; zero if that is long ago
	sampled   bool      // was in a sample since the newest inventory
	absent    int       // samples in a row without it
}

// NewMachine opens the memory in dir, or begins one. paths are the folders whose
// filesystems matter: first the state, which hw.Telemetry.Data measures, then the
// volumes, by the names under which they are the subject of VolumeFailed. An agent
// that did not end in good order is noticed here, and by boot, the kernel's id of
// it, whether the power was cut; "" is one that is not known.
func NewMachine(dir string, b board.Board, paths []Path, r *Registry, log *slog.Logger, boot string) (*Machine, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder for what is usual for this machine: %w", err)
	}
	m := blank(dir, b, paths, r, log, label(boot, 64))
	file := filepath.Join(dir, memoryName)
	mem, err := loadMemory(file)
	if err != nil {
		log.Warn("what is usual for this machine was lost and is learned anew", "file", file, "error", err)
	}
	m.mem, m.start, m.saved = mem, mem.Run, mem.Run
	m.lastEnd()
	m.events()
	return m, nil
}

// blank is a Machine without a memory.
func blank(dir string, b board.Board, paths []Path, r *Registry, log *slog.Logger, boot string) *Machine {
	m := &Machine{
		log: log, r: r, board: b, dir: dir, boot: boot, began: time.Now(),
		write: func(path string, raw []byte) error { return durable.WriteFile(path, raw, 0o600) },
		row:   map[key]int{}, live: map[string]*liveDisk{}, named: map[string]string{}, limits: map[string]hw.Sensor{},
	}
	for _, p := range paths {
		m.paths = append(m.paths, place{p, resolved(p.Dir)})
	}
	return m
}

// resolved is a folder behind its symbolic links, or as it is given if it is not there yet.
func resolved(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	real, ok := hw.Within(context.Background(), resolveLimit, "resolve "+dir, func() string {
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return dir
		}
		return real
	})
	if !ok { // its disk hangs
		return dir
	}
	return real
}

const resolveLimit = 2 * time.Second

// run is the memory's time, in hours.
func (m *Machine) run() float64 { return min(m.start+time.Since(m.began).Hours(), maxRun) }

// lastEnd judges how the agent before this one has ended, by the marker that it
// has left, and leaves one.
func (m *Machine) lastEnd() {
	path := filepath.Join(m.dir, markerName)
	raw, err := os.ReadFile(path)
	before := label(string(raw), 64)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil || before == "" || m.boot == "":
		m.happened(AgentKilled, "", "the agent that ran until then did not end in good order; whether the power was cut cannot be told")
	case before == m.boot:
		m.happened(AgentKilled, "", "the agent that ran until then did not end in good order, while the machine ran on")
	default:
		m.happened(UnsafeShutdown, "", "the machine went down without ending the agent: its power was cut, or it crashed")
	}
	// A full or broken disk must not keep the agent from judging just that.
	if err := m.write(path, []byte(m.boot+"\n")); err != nil {
		m.log.Warn("whether the power is cut will not be noticed at the next start", "error", err)
	}
}

// happened remembers what is shown for a day.
func (m *Machine) happened(c Code, subject, detail string) {
	for len(m.mem.Events) >= maxEvents {
		oldest := ""
		for k, e := range m.mem.Events {
			if oldest == "" || e.Run < m.mem.Events[oldest].Run {
				oldest = k
			}
		}
		delete(m.mem.Events, oldest)
	}
	m.mem.Events[key{c, subject}.String()] = event{Run: m.run(), Boot: m.boot, Detail: detail, noticed: time.Now()}
	m.unsaved = true
}

func (k key) String() string { return strings.TrimSpace(string(k.code) + " " + k.subject) }

func eventKey(s string) key {
	code, subject, _ := strings.Cut(s, " ")
	return key{Code(code), subject}
}

// events shows what has happened in the last day. One of this boot is
// remembered longer, so that it is not taken for a new one.
func (m *Machine) events() {
	for name, e := range m.mem.Events {
		k := eventKey(name)
		switch {
		case !e.Over && m.run()-e.Run < day:
			if e.noticed.IsZero() && !e.At.IsZero() {
				m.r.setEarlier(k.code, k.subject, e.Detail, e.At)
			} else {
				m.r.Set(k.code, k.subject, e.Detail)
			}
			continue
		case !e.Over:
			e.Over, m.unsaved = true, true
			m.mem.Events[name] = e
			m.r.Clear(k.code, k.subject)
		}
		if e.Boot != m.boot || m.boot == "" {
			delete(m.mem.Events, name)
		}
	}
}

// verdict is what a rule says.
type verdict int8

const (
	unknown verdict = iota
	yes
	no
)

func is(so bool) verdict {
	if so {
		return yes
	}
	return no
}

// over is yes from high on, no below low, and between them unknown.
func over(v, high, low float64) verdict {
	switch {
	case v >= high:
		return yes
	case v < low:
		return no
	}
	return unknown // NaN, too
}

// judge counts a verdict. It has to be the same need times in a row to count;
// an unknown one neither counts nor breaks the row.
func (m *Machine) judge(c Code, subject string, v verdict, need int, s wire.Severity, detail string) {
	k := key{c, subject}
	n := m.row[k]
	switch v {
	case yes:
		n = min(max(n, 0)+1, need)
	case no:
		n = max(min(n, 0)-1, -need)
	default:
		return
	}
	m.row[k] = n
	switch n {
	case need:
		m.r.set(c, subject, detail, s)
	case -need:
		delete(m.row, k)
		m.r.Clear(c, subject)
	}
}

// Inventory judges what is there. Called with each probe.
func (m *Machine) Inventory(inv *hw.Inventory) {
	if inv == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.events()
	m.disks(inv)
	m.filesystems(inv)
	m.temperatureLimits(inv)
	m.clocks(inv)
	m.watchdogs(inv)
	m.save()
}

// Telemetry judges how it feels. Called with each sample.
func (m *Machine) Telemetry(t hw.Telemetry, silent []sensor.Silent) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	now := time.Now()
	var passed time.Duration // since the sample before
	if !m.sampled.IsZero() {
		passed = now.Sub(m.sampled)
	}
	m.sampled = now
	m.events()
	m.diskUse(t, now, passed)
	m.temperatures(t)
	m.throttling(t.Throttling)
	m.memory(t)
	m.sensors(silent)
	if t.Data != nil && m.data.Mount != "" {
		f := m.data
		f.Total, f.Used, f.Free = t.Data.Total, t.Data.Used, t.Data.Free
		m.full(f)
	}
	m.save()
}

// save writes the memory if it is time. It does not wait: the disk may hang, and
// who judges it must not.
func (m *Machine) save() {
	age := time.Duration((m.run() - m.saved) * float64(time.Hour))
	due := age >= saveEvery || m.unsaved && age >= time.Hour || m.unsaved && m.saved == m.start
	if due {
		m.flush()
	}
}

// encode is the memory as it is now.
func (m *Machine) encode() ([]byte, error) {
	m.mem.Run = m.run()
	for name, e := range m.mem.Events {
		m.mem.Events[name] = e.dated()
	}
	return json.Marshal(m.mem)
}

// flush begins to write the memory, if the write before has come to its end.
func (m *Machine) flush() {
	if m.writing != nil {
		select {
		case <-m.writing:
		default:
			return
		}
	}
	raw, err := m.encode()
	if err != nil {
		m.log.Error("what is usual for this machine cannot be kept", "error", err)
		return
	}
	m.saved, m.unsaved = m.run(), false
	done := make(chan struct{})
	m.writing = done
	write := m.write
	go func() {
		defer close(done)
		if err := write(filepath.Join(m.dir, memoryName), raw); err != nil {
			m.log.Warn("what is usual for this machine was not kept; it is tried again", "error", err)
		}
	}()
}

// closeLimit is how long Close waits for the disk.
const closeLimit = 10 * time.Second

// Close saves the memory, and notes that the end was in good order. It does not
// wait for a disk that hangs.
func (m *Machine) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	limit := time.NewTimer(closeLimit)
	defer limit.Stop()
	hangs := fmt.Errorf("the disk of %s does not answer; what is usual for this machine was not kept", m.dir)
	if m.writing != nil {
		select {
		case <-m.writing:
		case <-limit.C:
			return hangs
		}
	}
	raw, err := m.encode()
	if err != nil {
		return fmt.Errorf("keep what is usual for this machine: %w", err)
	}
	done := make(chan error, 1)
	go func() {
		err := m.write(filepath.Join(m.dir, memoryName), raw)
		if gone := os.Remove(filepath.Join(m.dir, markerName)); !errors.Is(gone, fs.ErrNotExist) {
			err = errors.Join(err, gone, durable.Sync(m.dir))
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("keep what is usual for this machine: %w", err)
		}
		return nil
	case <-limit.C:
		return hangs
	}
}

// sensors: what does not answer is known as a whole.
func (m *Machine) sensors(silent []sensor.Silent) {
	names := make([]string, 0, len(silent))
	for _, s := range silent {
		detail := "it does not answer"
		if s.Err != nil {
			detail = s.Err.Error()
		}
		names = append(names, s.Name)
		m.r.Set(SensorSilent, s.Name, cmp.Or(s.Name, "a sensor")+": "+detail)
	}
	m.r.Only(SensorSilent, names...)
}

// clocks: a clock without power begins again at 1970 or 2000. Once the kernel
// has set it, it looks well until the next start.
func (m *Machine) clocks(inv *hw.Inventory) {
	for _, c := range inv.Clocks {
		if c.Year > 0 && c.Year < clockEpoch.Year() && m.mem.Battery != m.boot {
			m.mem.Battery, m.unsaved = m.boot, true
		}
	}
	if len(inv.Clocks) > 0 {
		m.r.Is(ClockBattery, "", m.mem.Battery == m.boot && m.boot != "", "at start the clock showed a time long ago")
	}
}

func (m *Machine) watchdogs(inv *hw.Inventory) {
	for _, w := range inv.Watchdogs {
		if !w.FiredLast {
			continue
		}
		if e, ok := m.mem.Events[string(WatchdogFired)]; ok && e.Boot == m.boot {
			return // known
		}
		m.happened(WatchdogFired, "", fmt.Sprintf("the watchdog %s (%s) restarted the machine, because nobody fed it", label(w.Name, 32), label(w.Identity, 64)))
		m.events()
		return
	}
}
