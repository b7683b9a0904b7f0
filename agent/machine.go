package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/health"
	"github.com/deimos-edge/deimos/hw/history"
	"github.com/deimos-edge/deimos/hw/panel"
	"github.com/deimos-edge/deimos/hw/sensor"
	"github.com/deimos-edge/deimos/hw/watchdog"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

// machine is the agent's eye on what it runs on: it probes and samples, keeps
// the curves, judges what it sees, drives the light and feeds the watchdog. It
// runs from before the device is a member until the agent ends: an owner who
// waits for a claim looks at the light, too. What the rest of the agent knows
// (online, refused, at work) it is told.
type machine struct {
	log     *slog.Logger
	state   string // folder
	version string
	board   board.Board
	boot    string // the kernel's boot id
	began   time.Time
	places  []place

	sampler *hw.Sampler
	sensors *sensor.Set
	history *history.Ring
	health  *health.Registry
	judge   *health.Machine
	light   *panel.Light
	dog     *watchdog.Dog

	inv    atomic.Pointer[inventory]
	last   atomic.Pointer[hw.Telemetry]
	probes sync.Mutex // one probe at a time

	held    atomic.Bool            // an update waits
	changed chan struct{}          // capacity 1: what the light shows may have
	noted   *Feeling               // of show, and after it of run alone
	clock   atomic.Pointer[Clock]  // nil until the journal is open
	scrubs  atomic.Pointer[scrubs] // nil until the volumes are
	once    time.Time              // what an earlier life noted as the latest time for sure
	stop    sync.Once

	mu      sync.Mutex // guards the rest
	stage   stage
	online  bool
	why     error    // the agent ends
	working int      // long orders under way
	updates int      // update orders under way
	checks  []func() // called with each sample, to tell the registry how things are
}

// inventory is what was found, and its digest.
type inventory struct {
	*hw.Inventory
	digest string
}

// stage is how far the agent's start has come.
type stage int

const (
	atStart stage = iota
	atClaim       // it waits for one
	atWork
)

// Sampling reads what the kernel counts anyway, and costs a few milliseconds.
// Probing asks the disks for their health.
const (
	sampleEvery = 10 * time.Second
	probeEvery  = 10 * time.Minute
	probeLimit  = 10 * time.Second
	// A sample is late when it has been missed for so long that the loop must
	// hang: each reading has limits of its own.
	sampleLate = 3 * time.Minute
	// stopLate is what the agent allows itself for a stop in good order, twice:
	// its work and then its machine, and as much again for the disk.
	stopLate = 4 * stopLimit
	// The launcher waits for so long before it kills.
	_ = uint(slot.StopWithin - stopLate)

	HistoryDir = "history" // below the state, what [history.Open] keeps
	healthDir  = "health"
)

// openMachine finds out what machine this is, on its board. Nothing of it can keep
// an agent from running but a machine that cannot be probed at all.
func openMachine(ctx context.Context, cfg Config, on board.Board, log *slog.Logger) (*machine, error) {
	m := &machine{log: log, state: cfg.StateDir, version: cfg.Version, board: on, began: time.Now(), changed: make(chan struct{}, 1)}
	if err := m.probe(ctx); err != nil {
		return nil, fmt.Errorf("this machine cannot be probed: %w", err)
	}
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("the kernel does not tell its boot id: %w", err)
	}
	m.boot = strings.TrimSpace(string(raw))
	if f, err := readFeeling(cfg.StateDir); err == nil && f != nil && f.Sure != nil {
		m.once = *f.Sure
	}
	if m.sampler, err = hw.NewSampler(hw.SampleOptions{Data: cfg.StateDir}); err != nil {
		return nil, err
	}
	known := slices.DeleteFunc(slices.Clone(m.board.Sensors), func(s board.Sensor) bool {
		err := sensor.Check(s)
		if err != nil {
			log.Warn("a sensor of the board's profile is left out", "board", m.board.Name, "error", err)
		}
		return err != nil
	})
	// What the owner declares is meant, and a mistake in it must not pass in silence.
	if m.sensors, err = sensor.New(slices.Concat(known, cfg.Sensors), log); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if m.history, err = history.Open(cfg.path(HistoryDir), history.Options{Log: log}); err != nil {
		log.Error("the curves of this device cannot be kept; it runs without them", "error", err)
	}
	m.health = health.New(time.Now)
	m.places = cfg.places(m)
	if m.judge, err = health.NewMachine(cfg.path(healthDir), m.board, cfg.watched(m.places), m.health, log, m.boot); err != nil {
		log.Error("what is usual for this machine is not known; it is learnt anew", "error", err)
	}
	m.light = panel.NewLight("/", m.board, m.inventory().LEDs, log)
	if m.dog, err = watchdog.New(watchdog.Options{Device: cfg.Watchdog, Log: log}); err != nil {
		log.Error("the watchdog is not as it should be", "error", err)
	}
	return m, nil
}

func (m *machine) inventory() *inventory { return m.inv.Load() }

// probe takes the inventory anew.
func (m *machine) probe(ctx context.Context) error {
	m.probes.Lock()
	defer m.probes.Unlock()
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	inv, err := hw.Probe(ctx, hw.Options{Board: m.board})
	if err != nil {
		return err
	}
	m.inv.Store(&inventory{inv, inv.Digest()})
	return nil
}

// begin runs it until the context that it returns has ended, which is when the
// given one has, or by stop; stop waits for that. The watchdog is fed until then:
// an agent that hangs while it stops is started anew, too.
func (m *machine) begin(ctx context.Context) (_ context.Context, stop func(why error) error) {
	guarded, calm := context.WithCancel(context.WithoutCancel(ctx))
	ctx, cancel := context.WithCancel(ctx)
	fed := make(chan struct{})
	go func() { m.dog.Run(guarded); close(fed) }()
	context.AfterFunc(ctx, m.stopping)
	done := make(chan error, 1)
	go func() { done <- m.run(ctx) }()
	return ctx, func(why error) (err error) {
		m.mu.Lock()
		m.why = why
		m.mu.Unlock()
		cancel()
		select {
		case err = <-done:
			if why != nil { // run may have ended before that was known
				err = errors.Join(err, m.saveStatus(true))
			}
		case <-time.After(stopLimit):
			m.log.Warn("a device on this machine hangs; it is not waited for", "waited", stopLimit.String())
		}
		calm()
		select {
		case <-fed:
		case <-time.After(stopLimit):
			m.log.Warn("the watchdog does not let itself be disarmed", "waited", stopLimit.String())
		}
		return err
	}
}

// stopping begins the time that a stop in good order may take.
func (m *machine) stopping() { m.stop.Do(func() { m.dog.Pulse("stop", stopLate) }) }

// run does all of it until ctx ends, and closes what openMachine has opened.
func (m *machine) run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { m.light.Run(ctx) })
	wg.Go(func() { m.sensors.Run(ctx) })
	wg.Go(func() { m.watch(ctx) })
	wg.Go(func() { m.watchLoops(ctx) })
	wg.Go(func() { m.lookAgain(ctx) })
	wg.Go(func() { m.show(ctx) })
	wg.Wait()
	var err error
	if m.history != nil {
		err = m.history.Close()
	}
	if m.judge != nil {
		err = errors.Join(err, m.judge.Close())
	}
	return errors.Join(err, m.saveStatus(true))
}

// watch samples.
func (m *machine) watch(ctx context.Context) {
	pulse := m.dog.Pulse("telemetry", sampleLate)
	defer pulse.End()
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		m.sample(ctx)
		pulse.Beat()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (m *machine) sample(ctx context.Context) {
	t, err := m.sampler.Sample(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		m.log.Debug("telemetry is incomplete", "error", err)
	}
	values, silent := m.sensors.Latest()
	t.Measured = values
	m.last.Store(&t)
	if m.history != nil {
		if err := m.history.Add(t); err != nil {
			m.log.Warn("a sample cannot be kept", "error", err)
		}
	}
	if m.judge != nil {
		m.judge.Telemetry(t, silent)
	}
	m.mu.Lock()
	checks := slices.Clone(m.checks)
	m.mu.Unlock()
	for _, check := range checks {
		check()
	}
}

// watchLoops tells the registry which loops are stuck. It is not one of them: it
// touches no device.
func (m *machine) watchLoops(ctx context.Context) {
	for rest(ctx, sampleEvery) == nil {
		var names []string
		for name, late := range m.dog.Stalled() {
			names = append(names, name)
			m.health.Set(health.Stalled, name, fmt.Sprintf("it has made no progress for %s", late.Round(time.Second)))
		}
		m.health.Only(health.Stalled, names...)
	}
}

// check adds one that is called with each sample.
func (m *machine) check(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.checks = append(m.checks, f)
}

// lookAgain probes now and then: disks come and go, and their health changes.
func (m *machine) lookAgain(ctx context.Context) {
	m.judgeInventory()
	for {
		if rest(ctx, probeEvery-probeEvery/20+rand.N(probeEvery/10)) != nil {
			return
		}
		old := m.inventory().digest
		if err := m.inspect(ctx); err != nil {
			if ctx.Err() == nil {
				m.log.Warn("the machine cannot be probed", "error", err)
			}
			continue
		}
		if now := m.inventory().digest; now != old {
			m.log.Info("the machine has changed", "inventory", now)
		}
	}
}

// inspect takes the inventory anew, and judges it.
func (m *machine) inspect(ctx context.Context) error {
	if err := m.probe(ctx); err != nil {
		return err
	}
	m.judgeInventory()
	return nil
}

func (m *machine) judgeInventory() {
	if m.judge != nil {
		m.judge.Inventory(m.inventory().Inventory)
	}
}

// at says how far the start has come.
func (m *machine) at(s stage) {
	m.mu.Lock()
	m.stage = s
	m.mu.Unlock()
	m.touch()
}

// connected is told whether the device is in touch with its fleet.
func (m *machine) connected(yes bool) {
	m.mu.Lock()
	m.online = yes
	m.mu.Unlock()
	m.answered(yes)
	if yes {
		m.health.Clear(health.CoordinatorRefuses, "")
	}
	m.touch()
}

// answered is told whether a coordinator answers at all, of a device that is no
// member yet.
func (m *machine) answered(yes bool) {
	m.health.Is(health.Offline, "", !yes, "the coordinator does not answer")
}

// busy is told when an order arrives (1) and when it has ended (-1).
func (m *machine) busy(k wire.Kind, by int) {
	m.mu.Lock()
	switch k {
	case wire.KindUpdateInstall:
		m.updates += by
		m.health.Is(health.UpdateWaiting, "", m.updates > 0, "an update was ordered and is not done yet")
	case wire.KindJobRun, wire.KindChunkStore, wire.KindChunkServe, wire.KindAudit:
		m.working += by
	}
	m.mu.Unlock()
	m.touch()
}

func (m *machine) touch() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// show keeps light, service manager and status file in step with how things are.
func (m *machine) show(ctx context.Context) {
	shown := panel.State("")
	hourly := time.NewTicker(time.Hour)
	defer hourly.Stop()
	for {
		warned := m.health.Changed()
		if s := m.look(); s != shown {
			shown = s
			m.light.Show(s)
			m.dog.Ready(said[s])
		}
		if err := m.saveStatus(false); err != nil {
			m.log.Debug("the status file cannot be written", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-warned:
		case <-m.changed:
		case <-hourly.C:
			m.noted = nil // so that the file shows that somebody is there
		}
		// Warnings and work come in bursts; the eye does not need each.
		if rest(ctx, 200*time.Millisecond) != nil {
			return
		}
	}
}

// said is what the service manager is told.
var said = map[panel.State]string{
	panel.Starting: "not online",
	panel.Waiting:  "waits to be claimed; deimos-agent status shows the code",
	panel.Online:   "online",
	panel.Working:  "online, at work",
	panel.Trouble:  "something is wrong; deimos-agent status tells",
	panel.Updating: "updating",
}

// look is what the light shows.
func (m *machine) look() panel.State {
	all := m.health.Visible() // the worst first
	trouble := len(all) > 0 && all[0].Severity != wire.Info
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.updates > 0 && !m.held.Load():
		return panel.Updating
	case m.stage == atStart:
		return panel.Starting
	case m.stage == atClaim:
		return panel.Waiting
	case trouble:
		return panel.Trouble
	case !m.online:
		return panel.Starting
	case m.working > 0:
		return panel.Working
	}
	return panel.Online
}

// routes are the orders that ask about the machine.
func (m *machine) routes() map[wire.Kind]Route {
	return map[wire.Kind]Route{
		wire.KindIdentify:  {Handle: m.identify, Limit: pingLimit},
		wire.KindInventory: {Handle: m.tellInventory, AtOnce: 1, Limit: configLimit},
		wire.KindHistory:   {Handle: m.tellHistory, AtOnce: 1, Limit: serveLimit},
	}
}

func (m *machine) identify(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	q, err := wire.DecodeBody[wire.Identify](o)
	switch {
	case err != nil:
		return wire.Outcome{}, err
	case q.Seconds < 0 || q.Seconds > wire.MaxIdentify:
		return wire.Outcome{}, wire.RejectedBecause(wire.CodeBadBody, "a device shows itself for 0 to %d seconds, not %d", wire.MaxIdentify, q.Seconds)
	case !m.light.Exists():
		return wire.Outcome{}, wire.RejectedBecause(wire.CodeNotSupported, "this device has no light that it may switch: its board %q names none that exists here", m.board.Name)
	}
	m.light.Identify(time.Duration(q.Seconds) * time.Second)
	return wire.Outcome{}, nil
}

func (m *machine) tellInventory(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	if err := m.inspect(ctx); err != nil {
		return wire.Outcome{}, err
	}
	inv := m.inventory()
	raw, err := json.Marshal(inv.Inventory)
	return wire.Outcome{Body: wire.InventoryReport{Digest: inv.digest}, Attachment: raw}, err
}

func (m *machine) tellHistory(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	q, err := wire.DecodeBody[wire.HistoryRequest](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	if m.history == nil {
		return wire.Outcome{}, wire.FailedBecause(wire.CodeNotFound, "this device keeps no history; its log says why")
	}
	h, err := m.history.Read(q, time.Now())
	if err != nil {
		return wire.Outcome{}, err
	}
	raw, err := json.Marshal(h)
	return wire.Outcome{Attachment: raw}, err
}

// maxTelemetry bounds what travels in a heartbeat, in bytes. A machine with
// hundreds of disks tells of them when it is asked for its history.
const maxTelemetry = 16 << 10

// telemetry is the newest sample as it travels; nil before the first.
func (m *machine) telemetry() (json.RawMessage, error) {
	t := m.last.Load()
	if t == nil {
		return nil, nil
	}
	raw, err := json.Marshal(t)
	if err != nil || len(raw) <= maxTelemetry {
		return raw, err
	}
	few := *t
	few.Disks, few.Temperatures, few.Notes = nil, nil, nil
	return json.Marshal(few)
}

// warnings are those that travel.
func (m *machine) warnings() []wire.Warning {
	all := m.health.Visible()
	return all[:min(len(all), wire.MaxWarnings)]
}
