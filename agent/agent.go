// Package agent is the daemon on the device. It makes the device's key, enrols,
// keeps the session with the broker, and has orders carried out by the rooms
// that know how: sync, jobs and ota. It ties them together and knows nothing of
// their work.
//
// # What always holds
//
//   - An order is acted on only if the coordinator's key signed it, for this
//     device, and it has not expired.
//   - The terminal report of an order is on disk before it is sent, and is sent
//     until the coordinator acknowledges it. A repeat of the order is answered
//     with the same bytes, or without the content if the outbox had to give it up.
//   - No order begins whose report could not be kept. One that is done is done
//     again only if the agent ended before the report was kept, and then it is
//     never called CANCELED or expired: see dispatcher.
//   - What the owner's file states is a limit for the fleet's configuration too.
//   - A clock that is not trusted does not keep the device from its coordinator,
//     and makes it forget nothing.
//   - The device only dials out. It opens no port.
//   - State lives below one folder, and one process at a time has it.
//
// # State
//
//	agent.lock              flock: one agent at a time
//	claim                   the code under which the device waits to be claimed
//	identity/key.pem        the device's key
//	identity/pending.json   while it waits: the authority it saw first
//	identity/membership.json what enrolment gave: certificate, authority, addresses
//	config.json             what the fleet wants of the device, see settings.go
//	journal/                finished orders, unacknowledged reports, what was
//	                        dropped of them, orders that were begun, clock floor
//	traffic.json            what was moved this month, see traffic.go
//	volumes.seen            the volumes that were ever open, see away.go
//	volumes/main/           chunks, unless the configuration names other places
//	jobs/                   cached modules, and work under way; owner.json: what the owner
//	                        said of jobs; now.json: how they are, for deimos-agent jobs
//	slots/, ota/            see ota; ota/owner.json: what the owner said of updates
package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/hw/watchdog"
	"github.com/deimos-edge/deimos/jobs"
	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/sync/orders"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// ErrNotEnrolled says that the agent has neither an enrolment nor what it takes
// to get one.
var ErrNotEnrolled = errors.New("this device is in no fleet yet: start it with --coordinator https://HOST:8443; with --token TOKEN (a fleet manager makes one with \"deimos token create\") it joins at once, without one it shows a code by which the fleet manager claims it")

// ErrReboot is the [ErrRestart] that means the machine, too: a new firmware waits
// for its trial.
var ErrReboot = fmt.Errorf("%w, and the machine with it", ErrRestart)

// ErrConfig begins the sentence about a configuration that cannot be used.
var ErrConfig = errors.New("the configuration cannot be used")

// Agent is a device's daemon.
type Agent struct {
	cfg   Config
	log   *slog.Logger
	id    Identity
	hw    *machine
	rest  func(context.Context, time.Duration) error
	level *slog.LevelVar // of log

	start string // random, of this run of the agent

	member    atomic.Pointer[Membership] // a renewal replaces it
	doubts    chan struct{}              // see doubted
	timed     chan struct{}              // the clock has become trusted
	dismissed atomic.Bool                // the coordinator has sent this device away
	web       *http.Client               // to the data plane

	clock   *Clock
	journal *badgerJournal
	chunks  *store.Set
	places  volumes
	move    *transfer.Client
	update  *ota.Service
	said    *sayings // of updates, by the owner
	orders  *dispatcher
	session *session
	desired *settings
	scrubs  *scrubs
	traffic *traffic
	data    *orders.Service
	jobs    *jobs.Service

	proving chan struct{} // capacity 1: something that counts for a trial has changed
	restart chan struct{} // closed when a handler asked for a restart
	once    sync.Once
}

const (
	stopLimit    = 10 * time.Second
	journalPause = 10 * time.Second // before a start that a failed sync makes necessary
	forgetEvery  = time.Hour
	storeLimit   = 9 * time.Minute
	serveLimit   = 2 * time.Minute
	auditLimit   = time.Minute
	jobLimit     = 30 * 24 * time.Hour // its own limits and the owner's bind first; it may stand still for long
	configLimit  = time.Minute
	updateLimit  = 30 * 24 * time.Hour // it waits for its owner; what it does has limits of its own
	keepAfter    = 30 * time.Second
	storesAtOnce = 4
	// dataStall is how long the data plane may be silent: as long as the session's
	// writes, on the same line.
	dataStall = writeTimeout
	// Loops that wait for long wake up so often to show that they live, and hang
	// if they have not for loopLate. The longest that one may block is connecting,
	// or one message on a slow line.
	pulseEvery = time.Minute
	loopLate   = 5 * time.Minute
)

// Run is the agent's whole life. It returns nil when ctx ends, ErrRestart when
// it wants to be started again ([ErrReboot]: with the machine), and another error,
// which is a sentence for the owner, when it cannot go on.
func Run(ctx context.Context, cfg Config) (err error) {
	if cfg, err = cfg.absolute(); err != nil {
		return err
	}
	lock, err := cfg.makeState()
	if err != nil {
		return err
	}
	defer lock.Close()
	a := &Agent{cfg: cfg, start: newNonce(), rest: rest, doubts: make(chan struct{}, 1), timed: make(chan struct{}, 1), proving: make(chan struct{}, 1), restart: make(chan struct{})}
	a.log, a.level = withLevel(cfg.Log)
	on := cfg.detectBoard(a.log)
	if err := a.resetIfAsked(ctx, on); err != nil {
		return err
	}
	if a.id, err = LoadIdentity(cfg.path("identity")); err != nil {
		return err
	}
	a.log = a.log.With("device", a.id.ID)
	if a.hw, err = openMachine(ctx, cfg, on, a.log); err != nil {
		return err
	}
	looking, look := a.hw.begin(ctx)
	defer func() { err = errors.Join(err, look(err)) }()
	return a.serve(looking)
}

// serve is what comes after the agent knows its machine.
func (a *Agent) serve(ctx context.Context) (err error) {
	if a.journal, err = openJournal(a.cfg.path("journal")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.closeStores()) }()
	floor, err := a.journal.floor()
	if err != nil {
		return err
	}
	a.clock = NewClock(later(floor, a.cfg.Released))
	if a.cfg.SystemTime != nil {
		a.clock.system = a.cfg.SystemTime
	}
	a.hw.clock.Store(a.clock)
	if a.update, err = a.openUpdate(); err != nil {
		return err
	}
	keeping, enough := context.WithCancel(ctx)
	var keeper sync.WaitGroup
	keeper.Go(func() { a.keepOnly(keeping) })
	defer func() { enough(); keeper.Wait() }()
	a.hw.answered(false)
	a.hw.check(a.feel)
	if err := a.join(ctx); err != nil {
		if ctx.Err() != nil {
			return nil // asked to end before it was a member
		}
		return err
	}
	if err := a.openVolumes(ctx); err != nil {
		return err
	}
	if a.traffic, err = openTraffic(a.cfg.path(trafficFile), a.clock, a.log); err != nil {
		return err
	}
	if err := a.furnish(); err != nil {
		return err
	}
	ended := make(chan struct{})
	keeper.Go(func() { a.traffic.keep(ended) })
	defer close(ended)
	return a.live(ctx)
}

func (a *Agent) openUpdate() (*ota.Service, error) {
	a.said = newSayings(a.cfg.path(updatesDir), a.hw.boot, a.clock, a.log)
	return ota.New(ota.Options{
		StateDir: a.cfg.StateDir, Slot: a.cfg.Slot, ESP: a.cfg.ESP, Boot: a.hw.boot, Version: a.cfg.Version,
		Device: a.id.ID, Board: a.hw.board.Name,
		Root: func() []byte { return a.member.Load().UpdateRoot },
		Source: func() (repo.Source, error) {
			var all []repo.Source
			for _, base := range a.member.Load().DataPlane {
				all = append(all, repo.HTTP{Client: a.web, Base: base + "/data/v1/repo"})
			}
			return repo.NewMirrors(all...), nil
		},
		Now:     a.clock.Now,
		Hold:    a.holdUpdate,
		Moved:   func(n int64) { a.traffic.updated(n) },
		Figures: a.figures,
		Steady:  a.cfg.ConfirmWithin / 2,
		Log:     a.log,
	})
}

// keepOnly confirms the firmware of a new device, in a fleet or not: there is no
// other to go back to, and the boot loader must not rename the only one at each
// start. That writes it once more; the way online goes first.
func (a *Agent) keepOnly(ctx context.Context) {
	if !a.update.Reboots() || a.rest(ctx, keepAfter) != nil {
		return
	}
	trial, err := a.update.OnTrial()
	if err == nil && !trial {
		err = a.update.Confirm(ctx)
	}
	if err != nil && ctx.Err() == nil {
		a.log.Error("the firmware cannot be kept", "error", err)
	}
}

// rest waits for d; it returns an error if ctx ends before.
func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// plain drops what wraps a network error without telling a person more.
func plain(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// furnish builds the rooms and the table of routes.
func (a *Agent) furnish() error {
	fleet := knows(a.member.Load().authority(), a.clock)
	fleet.own = func() *tls.Certificate { return a.member.Load().proof(a.id) }
	fleet.counted = a.traffic.counted
	a.web = &http.Client{Transport: dataPlane{&http.Transport{
		DialTLSContext:        within(connectTimeout, fleet.dial),
		ResponseHeaderTimeout: dataStall,
		MaxIdleConnsPerHost:   storesAtOnce,
		IdleConnTimeout:       90 * time.Second,
	}, a.doubted}}
	// Its patience covers the dial: a line that comes only now and then is no stall.
	a.move = &transfer.Client{HTTP: a.web, Stall: dataStall, Base: func() []string { return a.member.Load().DataPlane }}
	bulk := *a.move
	bulk.Pace = a.traffic.pace
	data := orders.New(a.chunks, &bulk, orders.Options{Away: a.awayNow, Limits: a.traffic, Memory: bulkMemory(), Now: a.clock.Now, Log: a.log})
	work, err := a.newJobs(&bulk, data)
	if err != nil {
		return err
	}
	a.data, a.jobs = data, work
	a.scrubs = a.newScrubs(a.cfg.Scrub.pace())
	a.hw.scrubs.Store(a.scrubs)
	base := inForce{beatSeconds: max(1, a.member.Load().BeatSeconds), jobs: a.cfg.Jobs, scrub: a.cfg.Scrub, transfer: a.cfg.Transfer, level: a.level.Level()}
	a.desired, err = openSettings(a.cfg.path(settingsFile), base, a.cfg.owned, func(f inForce) {
		work.SetPolicy(f.jobs)
		a.scrubs.SetPace(f.scrub.pace())
		a.traffic.set(f.transfer)
		a.level.Set(f.level)
	}, a.log)
	if err != nil {
		return err
	}
	handle := data.Handlers()
	epoch, err := a.journal.nextEpoch()
	if err != nil {
		return err
	}
	routes := a.hw.routes()
	maps.Copy(routes, map[wire.Kind]Route{
		wire.KindChunkStore:    {Handle: handle[wire.KindChunkStore], Refuse: data.Refuse, AtOnce: storesAtOnce, Limit: storeLimit},
		wire.KindChunkServe:    {Handle: handle[wire.KindChunkServe], Refuse: data.Refuse, AtOnce: storesAtOnce, Limit: serveLimit},
		wire.KindChunkDrop:     {Handle: handle[wire.KindChunkDrop], AtOnce: 1, Limit: storeLimit},
		wire.KindChunkLosses:   {Handle: handle[wire.KindChunkLosses], AtOnce: 1, Limit: auditLimit},
		wire.KindChunkHoldings: {Handle: handle[wire.KindChunkHoldings], AtOnce: 1, Limit: auditLimit},
		wire.KindAudit:         {Handle: handle[wire.KindAudit], AtOnce: 1, Limit: auditLimit},
		wire.KindJobRun:        {Handle: work.Run, AtOnce: maxInFlight, Queues: true, Keeps: true, Long: true, Limit: jobLimit},
		wire.KindUpdateInstall: {Handle: a.update.Handle, Refuse: a.update.Refuse, AtOnce: 1, Long: true, Limit: updateLimit, Restart: ota.ErrRestart, Later: ota.ErrPending},
		wire.KindConfigApply:   {Handle: a.desired.Handle, AtOnce: 1, Limit: configLimit},
		wire.KindPing:          {Handle: ping(a.cfg.Version, a.hw.began), Limit: pingLimit},
	})
	a.orders, err = newDispatcher(duties{
		id: a.id, trusted: a.orderKey, clock: a.clock, journal: a.journal, epoch: epoch, routes: routes,
		extra:   a.cfg.Routes,
		busy:    func(k wire.Kind, by int) { a.hw.busy(k, by); a.scrubs.busy(k, by) },
		publish: func(raw []byte) { a.session.publish(wire.ChannelReport, raw) },
		attach: func(ctx context.Context, order string, data []byte) error {
			return a.move.Put(ctx, "/data/v1/attachment/"+order, data, "application/octet-stream")
		},
		restart: func() { a.once.Do(func() { close(a.restart) }) },
		log:     a.log,
	})
	if err != nil {
		return err
	}
	a.session = newSession(link{
		pulse: func() *watchdog.Pulse { return a.hw.dog.Pulse("session", loopLate) },
		id:    a.id, brokers: func() []string { return a.member.Load().Brokers }, door: fleet, clock: a.clock, log: a.log,
		hello: a.hello, trusted: a.orderKey, welcomed: a.welcomed, lost: func() { a.hw.connected(false) }, refused: a.doubted,
	})
	return nil
}

// orderKey is the key that signs the coordinator's orders.
func (a *Agent) orderKey() ed25519.PublicKey { return ed25519.PublicKey(a.member.Load().OrderKey) }

// live runs until ctx ends or a restart is asked for, then stops in good order.
func (a *Agent) live(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a.session.receive = func(raw []byte) error {
		if a.dismissed.Load() {
			return nil
		}
		return a.orders.receive(ctx, raw)
	}
	if err := a.settle(); err != nil { // an EFI system partition that fails is no reason not to work
		a.log.Error("the update cannot be settled", "error", err)
	}
	a.hw.connected(false)
	a.hw.check(a.feelVolumes)
	a.hw.check(a.feelUpdate)
	a.hw.at(atWork)
	if err := a.orders.takeUp(ctx); err != nil {
		a.log.Error("not all that a former life began can be gone on with; the coordinator will send it again", "error", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { a.watchJobs(ctx) })
	wg.Go(func() { a.prove(ctx) })
	wg.Go(func() { a.hearOwner(ctx) })
	wg.Go(func() { a.session.run(ctx) })
	wg.Go(func() { a.stayMember(ctx) })
	wg.Go(func() { a.orders.resend(ctx, a.hw.dog.Pulse("reports", loopLate)) })
	wg.Go(func() { a.beat(ctx) })
	wg.Go(func() { a.housekeep(ctx) })
	wg.Go(func() { a.scrub(ctx) })
	wg.Go(func() { a.reopen(ctx, reopenEvery) })
	a.log.Info("agent runs", "version", a.cfg.Version, "board", a.hw.board.Name, "slot", a.cfg.Slot)
	var again error
	select {
	case <-ctx.Done():
	case <-a.restart:
		if again = ErrRestart; a.update.Reboots() {
			again = ErrReboot
		}
	case <-a.journal.died:
		// Nothing can be promised any more. Perhaps the next life can write; if not,
		// it must not spin.
		a.log.Error("the journal is lost to this process; the agent starts again", "in", journalPause.String(), "error", *a.journal.broken.Load())
		again = ErrRestart
		_ = a.rest(ctx, journalPause)
	}
	a.hw.stopping()
	cancel()
	done := make(chan struct{})
	go func() { wg.Wait(); a.orders.wait(); close(done) }()
	select {
	case <-done:
		if err := a.jobs.Close(); err != nil {
			a.log.Warn("the cgroup of jobs stays until the next start", "error", err)
		}
	case <-time.After(stopLimit):
		a.log.Warn("some work did not end in time; it will be done again", "waited", stopLimit.String())
	}
	return again
}

// settle reports how an update ended that was under way when the agent was
// started, once.
func (a *Agent) settle() error {
	s, err := a.update.Settled()
	if err != nil || s == nil {
		return err
	}
	_, known, err := a.journal.get(s.Order)
	if err != nil {
		return err
	}
	if !known && !ota.IsLocal(s.Order) { // that one, nobody but the owner has asked for
		var problem error
		if s.Problem != nil {
			problem = s.Problem
		}
		a.orders.conclude(s.Order, s.Outcome, problem)
		if _, known, err = a.journal.get(s.Order); !known || err != nil {
			return err // the next start concludes it
		}
	}
	return a.update.Reported(s.Order) // the journal forgets it before the slots do
}

// welcomed is called when broker and coordinator have answered.
func (a *Agent) welcomed() {
	a.dismissed.Store(false) // who is welcomed is a member
	a.hw.connected(true)
	a.session.slow(false)
	select {
	case a.timed <- struct{}{}:
	default:
	}
	now := a.clock.Now()
	if err := errors.Join(a.journal.saveFloor(now), a.journal.timeIs(now)); err != nil {
		a.log.Warn("the time cannot be saved", "error", err)
	}
	select {
	case a.proving <- struct{}{}:
	default:
	}
	a.log.Info("online", "broker_time", now.Format(time.RFC3339))
	a.orders.reconnected()
}

func (a *Agent) hello() wire.Presence {
	p := wire.Presence{
		BootID: a.hw.boot, Instance: a.start, Agent: a.cfg.Version, OS: runtime.GOOS, Arch: runtime.GOARCH,
		Board: a.hw.board.Name, Slot: a.cfg.Slot, InventoryDigest: a.hw.inventory().digest,
	}
	p.Capacity, p.Used = a.room()
	p.ConfigVersion = a.desired.version()
	p.Dropped = a.journal.dropped()
	p.Losses = a.scrubs.losses()
	return p
}

// beat sends heartbeats, jittered by a tenth so that a fleet's do not fall together.
func (a *Agent) beat(ctx context.Context) {
	pulse := a.hw.dog.Pulse("heartbeat", loopLate)
	defer pulse.End()
	for {
		if !a.awaitBeat(ctx, pulse) {
			return
		}
		raw, err := a.hw.telemetry()
		if err != nil {
			a.log.Error("telemetry cannot be encoded", "error", err)
			continue
		}
		b := wire.Beat{Device: a.id.ID, Uptime: time.Since(a.hw.began).Seconds(), Telemetry: raw, InventoryDigest: a.hw.inventory().digest, Warnings: a.hw.warnings()}
		b.At, b.TimeConfidence = a.clock.Read()
		b.Capacity, b.Used = a.room()
		b.Losses, b.Scrubs = a.scrubs.losses(), a.scrubs.told()
		b.Pause = a.data.Pause()
		b.Jobs = a.jobs.State()
		b.Update = a.update.State()
		env, err := wire.Seal(a.id.key, wire.TypeBeat, b)
		if err != nil {
			a.log.Error("a heartbeat cannot be signed", "error", err)
			continue
		}
		a.session.publish(wire.ChannelBeat, env)
	}
}

// awaitBeat waits until a heartbeat is due, also by an interval that changes
// meanwhile. It is false when ctx ends.
func (a *Agent) awaitBeat(ctx context.Context, pulse *watchdog.Pulse) bool {
	began, share := time.Now(), 0.95+rand.Float64()/10
	for {
		pulse.Beat()
		every, changed := a.desired.beat()
		left := time.Until(began.Add(time.Duration(share * float64(every))))
		if left <= 0 {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		case <-time.After(min(left, pulseEvery)):
		}
	}
}

// housekeep forgets finished orders that nobody will ask for again.
func (a *Agent) housekeep(ctx context.Context) {
	t := time.NewTicker(forgetEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if err := forget(a.journal, a.clock); err != nil {
			a.log.Warn("the journal cannot be tidied", "error", err)
		}
	}
}
