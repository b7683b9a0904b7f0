package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	mrand "math/rand/v2"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Simulation is a fleet of devices in one process: real enrolment, real
// sessions with the broker, the real dispatcher and outbox, but no disks, no
// sensors, and a journal that dies with the process. The devices answer
// device.ping, take any configuration, and refuse every other kind. It shows what
// a coordinator bears.
type Simulation struct {
	Coordinator string // https://host:port
	Token       string // fleet token with enough uses: each device has a new key
	Agents      int
	Version     string
	Log         *slog.Logger
	// Does gives a device more kinds of orders to carry out, and its heartbeats more to
	// say. nil, or nil of either: nothing more.
	Does func(SimDevice) (routes map[wire.Kind]Route, say func(*wire.Beat))
	// Progress is called every second, and at the end; nil for none.
	Progress func(SimState)
}

// SimDevice is one of a simulated fleet.
type SimDevice struct {
	N         int // from 0
	ID        wire.DeviceID
	HTTP      *http.Client // shows who it is
	DataPlane []string     // https://host:port
	// UpdateRoot is of its enrolment; empty where the coordinator had none then.
	UpdateRoot []byte
	// Restart ends its session and begins another one, as an agent of that version.
	Restart func(version string)
	// Off ends its session; nobody hears of the device until on is called.
	Off func() (on func())
	// Starts is how many sessions it has begun: each but the first was a restart.
	Starts func() int
}

// SimState is how a simulated fleet is.
type SimState struct {
	Enrolled int   `json:"enrolled"`
	Online   int   `json:"online"` // welcomed by the coordinator, and connected since
	Orders   int64 `json:"orders"` // done
}

// enrolAtOnce bounds simulated devices that enrol together: more would only
// wait for the coordinator's processors, until they time out.
const enrolAtOnce = 32

// Run simulates until ctx ends, or until the coordinator refuses a device.
func (s Simulation) Run(ctx context.Context) error {
	tok, err := wire.ParseFleetToken(s.Token)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var f simFleet
	var wg sync.WaitGroup
	gate := make(chan struct{}, enrolAtOnce)
	for n := range s.Agents {
		wg.Go(func() {
			d := &simulated{Simulation: s, fleet: &f, n: n, runs: s.Version, anew: make(chan struct{})}
			gate <- struct{}{}
			err := d.enrol(ctx, tok)
			<-gate
			if err == nil {
				err = d.live(ctx)
			}
			if err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("a simulated device cannot go on: %w", err))
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for ended := false; !ended; {
		select {
		case <-tick.C:
		case <-done:
			ended = true
		}
		if s.Progress != nil {
			s.Progress(f.state())
		}
	}
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// simFleet is who there is.
type simFleet struct {
	orders atomic.Int64
	mu     sync.Mutex
	there  []*simulated
}

func (f *simFleet) state() SimState {
	f.mu.Lock()
	defer f.mu.Unlock()
	st := SimState{Enrolled: len(f.there), Orders: f.orders.Load()}
	for _, d := range f.there {
		if s := d.session.Load(); s != nil && s.online.Load() && !s.waits() {
			st.Online++
		}
	}
	return st
}

// simulated is one device of a simulation.
type simulated struct {
	Simulation
	fleet  *simFleet
	n      int
	say    func(*wire.Beat) // may be nil
	id     Identity
	member *Membership
	clock  *Clock
	began  time.Time
	config atomic.Uint64 // version of the configuration it says it runs

	session atomic.Pointer[session] // of the newest start; nil before the first

	mu     sync.Mutex
	runs   string // version
	off    bool
	starts int
	anew   chan struct{} // closed when one of the above is not what the session began with
}

// become changes what the device is, which ends its session.
func (d *simulated) become(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
	close(d.anew)
	d.anew = make(chan struct{})
}

func (d *simulated) restart(version string) { d.become(func() { d.runs = version }) }

func (d *simulated) turnOff() (on func()) {
	d.become(func() { d.off = true })
	return func() { d.become(func() { d.off = false }) }
}

func (d *simulated) begun() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.starts
}

// publish sends what there is a connection for.
func (d *simulated) publish(c wire.Channel, raw []byte) {
	if s := d.session.Load(); s != nil {
		s.publish(c, raw)
	}
}

// sessions holds one after the other, of each start of the device, until ctx ends.
func (d *simulated) sessions(ctx context.Context, l link) {
	for ctx.Err() == nil {
		d.mu.Lock()
		runs, off, anew := d.runs, d.off, d.anew
		if !off {
			d.starts++
		}
		d.mu.Unlock()
		life, end := context.WithCancel(ctx)
		var wg sync.WaitGroup
		if !off {
			start := newNonce()
			l.hello = func() wire.Presence {
				return wire.Presence{Instance: start, ConfigVersion: d.config.Load(), Agent: runs, OS: runtime.GOOS, Arch: runtime.GOARCH, Board: "simulated"}
			}
			s := newSession(l)
			d.session.Store(s)
			wg.Go(func() { s.run(life) })
		}
		select {
		case <-ctx.Done():
		case <-anew:
		}
		end()
		wg.Wait()
	}
}

// configure says yes to everything: there is nothing here that it would change.
func (d *simulated) configure(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	c, err := wire.DecodeBody[wire.ConfigApply](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	d.config.Store(max(d.config.Load(), c.Version))
	return wire.Outcome{Body: wire.ConfigReport{Version: c.Version, Running: c.Values}}, nil
}

func (d *simulated) enrol(ctx context.Context, tok wire.FleetToken) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	d.id = Identity{ID: wire.IDOf(key.Public().(ed25519.PublicKey)), key: key}
	d.clock, d.began = NewClock(time.Time{}), time.Now()
	req := wire.EnrolRequest{Token: tok.String(), Agent: d.Version, OS: runtime.GOOS, Arch: runtime.GOARCH, Board: "simulated"}
	for wait := enrolMin; ; wait = min(2*wait, enrolMax) {
		d.member, _, err = enrol(ctx, d.id, pinned(tok.Fingerprint, d.clock), d.Coordinator, req)
		if err == nil || errors.Is(err, ErrRefused) || errors.Is(err, errStranger) || errors.Is(err, ErrAddress) {
			return err
		}
		if err := rest(ctx, wait/2+mrand.N(wait)); err != nil {
			return err
		}
	}
}

// live holds the device's session until ctx ends.
func (d *simulated) live(ctx context.Context) error {
	fleet := knows(d.member.authority(), d.clock)
	proof := d.member.proof(d.id)
	fleet.own = func() *tls.Certificate { return proof }
	trusted := func() ed25519.PublicKey { return ed25519.PublicKey(d.member.OrderKey) }
	pong := ping(d.Version, d.began)
	routes := map[wire.Kind]Route{
		wire.KindPing: {Limit: pingLimit, Handle: func(ctx context.Context, o wire.Order, p func(wire.Progress)) (wire.Outcome, error) {
			d.fleet.orders.Add(1)
			return pong(ctx, o, p)
		}},
		wire.KindConfigApply: {AtOnce: 1, Limit: configLimit, Handle: d.configure},
	}
	if d.Does != nil {
		web := &http.Client{Transport: &http.Transport{DialTLSContext: within(connectTimeout, fleet.dial), MaxIdleConnsPerHost: 2}}
		defer web.CloseIdleConnections()
		more, say := d.Does(SimDevice{N: d.n, ID: d.id.ID, HTTP: web, DataPlane: d.member.DataPlane, UpdateRoot: d.member.UpdateRoot,
			Restart: d.restart, Off: d.turnOff, Starts: d.begun})
		maps.Copy(routes, more)
		d.say = say
	}
	orders, err := newDispatcher(duties{
		id: d.id, trusted: trusted, clock: d.clock, journal: newMemoryJournal(),
		routes:  routes,
		publish: func(raw []byte) { d.publish(wire.ChannelReport, raw) },
		log:     d.Log,
	})
	if err != nil {
		return err
	}
	d.fleet.mu.Lock()
	d.fleet.there = append(d.fleet.there, d)
	d.fleet.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() {
		d.sessions(ctx, link{
			id: d.id, brokers: func() []string { return d.member.Brokers }, door: fleet, clock: d.clock, log: d.Log, trusted: trusted,
			receive:  func(raw []byte) error { return orders.receive(ctx, raw) },
			welcomed: orders.reconnected,
			refused:  func() {},
		})
	})
	wg.Go(func() { orders.resend(ctx, nil) })
	d.beat(ctx)
	wg.Wait()
	orders.wait()
	return nil
}

// beat says that the device lives, until ctx ends.
func (d *simulated) beat(ctx context.Context) {
	every := time.Duration(max(1, d.member.BeatSeconds)) * time.Second
	for rest(ctx, every*3/4+mrand.N(every/2)) == nil {
		b := wire.Beat{Device: d.id.ID, Uptime: time.Since(d.began).Seconds(), Telemetry: json.RawMessage(`{}`)}
		b.At, b.TimeConfidence = d.clock.Read()
		if d.say != nil {
			d.say(&b)
		}
		raw, err := wire.Seal(d.id.key, wire.TypeBeat, b)
		if err != nil {
			d.Log.Error("a heartbeat cannot be signed", "error", err)
			return
		}
		d.publish(wire.ChannelBeat, raw)
	}
}
