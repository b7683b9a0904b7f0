package test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/rs/zerolog"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// The storm: so many devices get so many orders while it lasts, and CHAOS=30m
// makes it longer, with everything in proportion.
const (
	chaosDevices = 20
	chaosOrders  = 2000
	chaosStorm   = 45 * time.Second
	chaosKind    = "test.effect"
	// chaosAtOnce bounds the orders that one kill can interrupt: those that run,
	// and those whose handler has returned and whose report is not on disk yet.
	chaosAtOnce = 8
	// chaosCalm is how long everybody has to be done after the storm. An agent
	// waits up to a minute until it tries the broker again, and so does the
	// coordinator with an order; then there is a queue to be worked off.
	chaosCalm = 8 * time.Minute
	chaosLife = 20 * time.Minute // of an order, beyond the storm
)

// TestEveryEffectOnceInAStorm: devices, broker and coordinator are killed at
// random moments, and all that they say to one another and that the operator
// says to them goes through proxies that delay, throttle, mute, break and
// refuse. In the end every order that was asked for has succeeded, and its
// effect stands exactly once. Handlers were called more than once only where a
// kill explains it.
//
// What happens when is drawn from the seed before it begins. What it meets is
// up to the machine, so a seed repeats the storm and not each of its victims.
func TestEveryEffectOnceInAStorm(t *testing.T) {
	length := chaosStorm
	if v := os.Getenv("CHAOS"); v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil || length < time.Second {
			t.Fatalf("CHAOS is no duration of a second or more: %q", v)
		}
	}
	rng := testbed.Seeded(t)
	s := newStorm(t, length, rng)
	began := time.Now()
	s.f.enrol(chaosDevices, false)
	t.Logf("%d devices enrolled in %s", chaosDevices, time.Since(began).Round(time.Second))
	requests := s.drawRequests(rng, int(chaosOrders*length/chaosStorm))
	strokes := s.drawStrokes(rng)

	began = time.Now()
	sent := s.send(began, requests)
	s.rage(began, strokes)
	s.clear()
	s.awaitCalm(sent)
	t.Logf("%s of storm, %s until the last order ended; %s", length, (time.Since(began) - length).Round(time.Second), s.tally())
	s.check(requests)
	s.checkDebts()
}

// storm is a fleet in bad weather.
type storm struct {
	t      *testing.T
	f      *fleet
	length time.Duration
	mqtt   []*way // an agent whose connection ends takes the next
	https  *way   // enrolment, data, and the operator
	nats   *way   // between coordinator and broker
	api    *api.Client

	down    map[string]bool // who is not to run now
	again   time.Time       // when the coordinator is started again that gave up
	gaveUp  int
	kills   map[*device]int
	strokes map[string]int // how many of which, for the log
}

const mqttWays = 4

func newStorm(t *testing.T, length time.Duration, rng *rand.Rand) *storm {
	t.Helper()
	s := &storm{t: t, length: length, down: map[string]bool{}, kills: map[*device]int{}, strokes: map[string]int{}}
	t.Cleanup(func() { // after the fleet has ended, which has to say goodbye
		for _, w := range s.ways() {
			w.close()
		}
	})
	s.f = newFleet(t, func(f *fleet) {
		var cancel context.CancelFunc
		f.Ctx, cancel = context.WithTimeout(context.Background(), testLimit+2*length+chaosCalm)
		t.Cleanup(cancel)
		effectAgent(f)
		f.Beat = "2s"
		f.natsAt = testbed.FreeAddress(t)
		s.nats = newWay(t, "nats", f.natsAt, rng.Uint64())
		f.NATS = "tls://" + s.nats.proxy.Listen
		s.https = newWay(t, "https", f.HTTPS, rng.Uint64())
		f.door = s.https.proxy.Listen
		f.Flags = []string{"--public-https", f.door}
		for i := range mqttWays {
			w := newWay(t, fmt.Sprint("mqtt-", i), f.MQTT, rng.Uint64())
			s.mqtt = append(s.mqtt, w)
			f.Flags = append(f.Flags, "--public-mqtt", w.proxy.Listen)
		}
		external(f)
	})
	c, err := api.LoadContext(s.f.Path("coordinator", "operator.json"))
	if err == nil {
		c.URL = "https://" + s.f.door
		s.api, err = api.NewClient(c)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *storm) ways() (all []*way) {
	for _, w := range append(slices.Clone(s.mqtt), s.https, s.nats) {
		if w != nil {
			all = append(all, w)
		}
	}
	return all
}

// request is orders that are asked for at once.
type request struct {
	at time.Duration
	api.SendRequest
	orders []api.Order // what the coordinator made of it
}

// drawRequests draws what n orders are: most for one device, a few for all.
func (s *storm) drawRequests(rng *rand.Rand, n int) (out []*request) {
	add := func(sel api.Selector) {
		body, _ := json.Marshal(map[string]time.Duration{"before": some(rng, 400*time.Millisecond), "after": some(rng, 400*time.Millisecond)})
		out = append(out, &request{at: some(rng, s.length), SendRequest: api.SendRequest{
			Kind: chaosKind, Body: body, LifeSeconds: (s.length + chaosLife).Seconds(), Key: fmt.Sprint("chaos-", len(out)), Selector: sel}})
	}
	for n > 0 {
		if n > chaosDevices && rng.IntN(200) == 0 {
			add(api.Selector{Groups: []string{"test"}})
			n -= chaosDevices
			continue
		}
		add(api.Selector{Devices: []wire.DeviceID{s.f.devices[rng.IntN(chaosDevices)].id}})
		n--
	}
	slices.SortFunc(out, func(a, b *request) int { return cmp.Compare(a.at, b.at) })
	return out
}

func some(rng *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(rng.Int64N(int64(most)))
}

// send asks for all orders when it is time for each, several at once, and for
// each until there is an answer. The channel is closed when all are answered.
func (s *storm) send(began time.Time, all []*request) <-chan struct{} {
	todo, done := make(chan *request), make(chan struct{})
	var senders sync.WaitGroup
	for range 16 {
		senders.Go(func() {
			for r := range todo {
				s.ask(r)
			}
		})
	}
	go func() {
		defer close(done)
		defer senders.Wait()
		defer close(todo)
		for _, r := range all {
			select {
			case <-time.After(time.Until(began.Add(r.at))):
				todo <- r
			case <-s.f.Ctx.Done():
				return
			}
		}
	}()
	return done
}

func (s *storm) ask(r *request) {
	for s.f.Ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(s.f.Ctx, 10*time.Second)
		orders, err := s.api.SendOrder(ctx, r.SendRequest)
		cancel()
		if err == nil {
			r.orders = orders
			return
		}
		select {
		case <-time.After(300 * time.Millisecond):
		case <-s.f.Ctx.Done():
		}
	}
}

// stroke is one thing that happens.
type stroke struct {
	at   time.Duration
	what string
	do   func()
}

// drawStrokes makes the schedule. Whatever begins also ends.
func (s *storm) drawStrokes(rng *rand.Rand) (out []stroke) {
	// often draws pairs that do not overlap: mean apart, each from..to long.
	last := s.length
	often := func(what string, mean, from, to time.Duration, draw func() (begin, end func())) {
		for at := some(rng, 2*mean); at < last; {
			long := from + some(rng, to-from)
			begin, end := draw()
			out = append(out, stroke{at, what, begin}, stroke{at + long, "", end})
			at += long + mean/2 + some(rng, mean)
		}
	}
	const ms = time.Millisecond
	for _, d := range s.f.devices {
		often("agents killed", 25*time.Second, 0, 3*time.Second, func() (func(), func()) {
			return func() { d.proc.Kill(); s.kills[d]++; s.down[d.name] = true }, func() { s.down[d.name] = false; d.start() }
		})
	}
	// A coordinator that starts sends everything again. In the last quarter none
	// does, so that whatever is lost there comes again for other reasons.
	last = s.length * 3 / 4
	often("brokers killed", 15*time.Second, 200*ms, 2*time.Second, func() (func(), func()) {
		return func() { s.f.server.Kill(); s.down["broker"] = true }, func() { s.down["broker"] = false; s.launchBroker() }
	})
	often("coordinators killed", 12*time.Second, 100*ms, 2*time.Second, func() (func(), func()) {
		return func() { s.f.Serve.Kill(); s.down["coordinator"] = true }, func() { s.down["coordinator"] = false; s.launchServe() }
	})
	often("coordinators stopped for a while", 15*time.Second, 500*ms, 3*time.Second, func() (func(), func()) {
		return func() { s.f.Serve.Signal(syscall.SIGSTOP) }, func() { s.f.Serve.Signal(syscall.SIGCONT) }
	})
	last = s.length
	for _, w := range s.ways() {
		long := time.Duration(1)
		if w == s.nats { // where everything passes
			long = 4
		}
		often("slow lines", 4*time.Second, 2*time.Second, 6*time.Second, func() (func(), func()) {
			slow := sky{delay: some(rng, 300*ms) / long, jitter: some(rng, 200*ms)/long + 1, rate: 20e3 + rng.IntN(200e3)*int(long)}
			return func() { w.change(func(k *sky) { *k = sky{slow.delay, slow.jitter, slow.rate, k.mute} }) },
				func() { w.change(func(k *sky) { *k = sky{mute: k.mute} }) }
		})
		often("connections broken", 20*time.Second*long, 0, 1, func() (func(), func()) { return w.reset, func() {} })
		often("lines away", 25*time.Second*long, 300*ms, 3*time.Second/long, func() (func(), func()) { return w.close, w.open })
		often("directions cut", 25*time.Second*long, 500*ms, 4*time.Second/long, func() (func(), func()) {
			up := rng.IntN(2)
			return func() { w.change(func(k *sky) { k.mute[up] = true }) },
				func() { w.change(func(k *sky) { k.mute[up] = false }); w.reset() }
		})
	}
	slices.SortStableFunc(out, func(a, b stroke) int { return cmp.Compare(a.at, b.at) })
	return out
}

// rage lets everything happen that is drawn.
func (s *storm) rage(began time.Time, strokes []stroke) {
	for _, k := range strokes {
		for {
			s.supervise()
			left := time.Until(began.Add(k.at))
			if left <= 0 {
				break
			}
			time.Sleep(min(left, 50*time.Millisecond))
		}
		k.do()
		if k.what != "" {
			s.strokes[k.what]++
		}
	}
}

// supervise does what a service manager would. An agent and a broker have no
// reason to end by themselves; a coordinator that starts while its broker is
// away has.
func (s *storm) supervise() {
	for _, d := range s.f.devices {
		if !s.down[d.name] && d.proc.Ended() {
			s.t.Fatalf("%s ended by itself with code %d: %s", d.name, d.proc.ExitCode(), d.proc.LastWords())
		}
	}
	if !s.down["broker"] && s.f.server.Ended() {
		s.t.Fatalf("the broker ended by itself: %s", s.f.server.LastWords())
	}
	if s.down["coordinator"] || !s.f.Serve.Ended() {
		return
	}
	if s.again.IsZero() {
		if said := s.f.Serve.LastWords(); !strings.Contains(said, "message server") {
			s.t.Fatalf("the coordinator ended by itself with code %d: %s", s.f.Serve.ExitCode(), said)
		}
		s.gaveUp++
		s.again = time.Now().Add(200 * time.Millisecond)
	}
	if time.Now().After(s.again) {
		s.launchServe()
	}
}

// launchServe and launchBroker do not wait, as nothing may be there to wait for.
func (s *storm) launchServe() {
	s.again = time.Time{}
	s.f.Serve = s.f.Start(proc.Command{Name: "the coordinator", Log: s.f.Path("logs", "coordinator.log"), Argv: s.f.ServeArgs()})
}

func (s *storm) launchBroker() { s.f.launchNATS(s.f.Path("logs", "nats.log")) }

// clear ends the storm. Every stroke has had its end by now.
func (s *storm) clear() {
	for _, w := range s.ways() {
		w.change(func(k *sky) { *k = sky{} })
	}
	for name, down := range s.down {
		if down {
			s.t.Fatalf("%s was not started again", name)
		}
	}
}

// awaitCalm waits until all orders were asked for and none is pending.
func (s *storm) awaitCalm(sent <-chan struct{}) {
	deadline := time.Now().Add(chaosCalm)
	var left api.OrderList
	var err error
	for {
		s.supervise()
		select {
		case <-sent:
			left, err = s.api.Orders(s.f.Ctx, api.OrderQuery{Pending: true, Limit: 3})
			if err == nil && len(left.Orders) == 0 {
				return
			}
		default:
			err = fmt.Errorf("there are requests without an answer")
		}
		if time.Now().After(deadline) {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	for _, o := range left.Orders {
		s.blame(o.Device, o.ID, "it is %s %s after the storm", o.State, chaosCalm)
	}
	s.t.Fatalf("%s after the storm not everything has ended (%v)", chaosCalm, err)
}

// check compares what was asked for, what the coordinator has on record and
// what the devices have done.
func (s *storm) check(requests []*request) {
	asked := map[wire.DeviceID]map[string]bool{}
	n := 0
	for _, r := range requests {
		for _, o := range r.orders {
			if asked[o.Order.Device] == nil {
				asked[o.Order.Device] = map[string]bool{}
			}
			if asked[o.Order.Device][o.Order.ID] {
				s.blame(o.Order.Device, o.Order.ID, "two requests were answered with it")
			}
			asked[o.Order.Device][o.Order.ID] = true
			n++
		}
	}
	if want := int(chaosOrders * s.length / chaosStorm); n != want {
		s.t.Errorf("%d orders were sent, want %d", n, want)
	}
	twice := 0
	for _, d := range s.f.devices {
		s.checkRecords(d, asked[d.id])
		s.checkEffects(d, asked[d.id])
		twice += s.checkCalls(d, asked[d.id])
	}
	s.t.Logf("%d orders, %d calls that had to be made again", n, twice)
}

// checkRecords: what the coordinator has of a device is what was asked for, and
// has succeeded by the device's own word.
func (s *storm) checkRecords(d *device, asked map[string]bool) {
	list, err := s.api.Orders(s.f.Ctx, api.OrderQuery{Selector: api.Selector{Devices: []wire.DeviceID{d.id}}, Kind: chaosKind, Limit: api.MaxOrders})
	if err != nil {
		s.t.Fatal(err)
	}
	known := map[string]bool{}
	for _, o := range list.Orders {
		known[o.ID] = true
		switch {
		case o.State != wire.Succeeded:
			s.blame(d.id, o.ID, "it is %s %s", o.State, o.Code)
		case !asked[o.ID]:
			s.blame(d.id, o.ID, "nobody has asked for it")
		}
	}
	for id := range asked {
		if !known[id] {
			s.blame(d.id, id, "the coordinator does not list it")
		}
	}
}

// checkEffects: each order has left its effect, once, and nothing else has.
func (s *storm) checkEffects(d *device, asked map[string]bool) {
	effects := map[string]int{}
	for _, id := range readLines(s.t, d.state("effects.log")) {
		effects[id]++
		if !asked[id] {
			s.blame(d.id, id, "it has left an effect on %s and was none of its orders", d.name)
		}
	}
	for id := range asked {
		if effects[id] != 1 {
			s.blame(d.id, id, "its effect stands %d times", effects[id])
		}
	}
}

// checkCalls: one life of an agent does an order once at most, and only what a
// kill has interrupted is done in another.
func (s *storm) checkCalls(d *device, asked map[string]bool) (twice int) {
	calls, life, lives := map[string]int{}, map[string]int{}, 0
	for _, id := range readLines(s.t, d.state("calls.log")) {
		if id == "begin" {
			lives++
			continue
		}
		if life[id] == lives {
			s.blame(d.id, id, "one life of %s has done it twice", d.name)
		}
		life[id] = lives
		if calls[id]++; calls[id] > 1 {
			twice++
		}
	}
	if most := s.kills[d] * chaosAtOnce; twice > most {
		s.t.Errorf("%s was killed %d times and has begun orders %d times again; %d can be explained", d.name, s.kills[d], twice, most)
	}
	if lives > s.kills[d]+1 {
		s.t.Errorf("%s was killed %d times and has begun %d times", d.name, s.kills[d], lives)
	}
	return twice
}

// ackTime is how long a report takes at most to be acknowledged on a good line:
// the coordinator waits until it is synced, about 5 s. Nothing shows outside
// when an agent has taken an acknowledgement.
const ackTime = 8 * time.Second

// checkDebts: every report is acknowledged, or it would be sent for ever. An
// agent that has come back sends what it owes.
func (s *storm) checkDebts() {
	var owed []string
	for range 3 {
		time.Sleep(ackTime)
		var all sync.WaitGroup
		for _, d := range s.f.devices {
			all.Go(func() { s.f.Stopped(d.proc, 0) })
		}
		all.Wait()
		owed = nil
		for _, d := range s.f.devices {
			r, err := testbed.RunToEnd(s.f.Ctx, proc.Command{Argv: []string{s.f.agent, "owed", "--state", d.state()}})
			if err != nil || r.Code != 0 {
				s.t.Fatalf("the journal of %s: %v: %s", d.name, err, r.Stderr)
			}
			if n := strings.TrimSpace(string(r.Stdout)); n != "0" {
				owed = append(owed, d.name+": "+n)
			}
		}
		if len(owed) == 0 {
			return
		}
		for _, d := range s.f.devices {
			d.awaitOffline()
			d.start()
		}
		for _, d := range s.f.devices {
			d.awaitOnline()
		}
	}
	s.t.Errorf("reports are not acknowledged: %s", strings.Join(owed, ", "))
}

// blame says what is wrong with an order, with all that is known of it.
func (s *storm) blame(d wire.DeviceID, id, what string, args ...any) {
	s.t.Errorf("order %s of device %s: %s", id, d, fmt.Sprintf(what, args...))
	if s.strokes["told"]++; s.strokes["told"] > 5 {
		return // one like the other
	}
	ctx, cancel := context.WithTimeout(s.f.Ctx, 10*time.Second)
	defer cancel()
	o, err := s.api.Order(ctx, d, id, 0)
	record, _ := json.MarshalIndent(o, "", "  ")
	s.t.Logf("its record (%v): %s", err, record)
	for _, dev := range s.f.devices {
		if dev.id == d {
			lines := readLines(s.t, dev.log())
			s.t.Logf("the last of %s:\n%s", dev.name, strings.Join(lines[max(0, len(lines)-20):], "\n"))
		}
	}
}

func (s *storm) tally() string {
	var out []string
	for what, n := range s.strokes {
		out = append(out, fmt.Sprintf("%d %s", n, what))
	}
	slices.Sort(out)
	return strings.Join(append(out, fmt.Sprintf("%d starts of a coordinator without a broker", s.gaveUp)), ", ")
}

func readLines(t *testing.T, path string) []string {
	t.Helper()
	return strings.Split(strings.TrimSpace(string(readFile(t, path))), "\n")
}

// way is one proxy and its weather.
type way struct {
	t     *testing.T
	proxy *toxiproxy.Proxy
	conns atomic.Uint64

	mu  sync.Mutex
	sky sky
}

// sky is what every connection of a way suffers.
type sky struct {
	delay, jitter time.Duration
	rate          int     // bytes a second; 0: as it is
	mute          [2]bool // swallows what goes down, up
}

// ways by name: toxiproxy makes its toxics itself, from JSON.
var chaosWays sync.Map

// weather is the toxic of a way. It is one that is there from the beginning and
// changes, as taking one out of a toxiproxy under load can block.
type weather struct {
	Way  string `json:"way"`
	Up   int    `json:"up"`
	Seed uint64 `json:"seed"`
}

func init() { toxics.Register("weather", new(weather)) }

// GetBufferSize lets pieces wait together.
func (*weather) GetBufferSize() int { return 1024 }

// Pipe carries one direction of one connection.
func (c *weather) Pipe(stub *toxics.ToxicStub) {
	v, _ := chaosWays.Load(c.Way)
	w := v.(*way)
	rng := rand.New(rand.NewPCG(c.Seed, w.conns.Add(1)))
	for {
		select {
		case <-stub.Interrupt:
			return
		case p := <-stub.Input:
			if p == nil {
				stub.Close()
				return
			}
			now := w.now()
			if now.mute[c.Up] {
				continue
			}
			wait := now.delay - time.Since(p.Timestamp)
			if now.jitter > 0 {
				wait += some(rng, now.jitter)
			}
			if now.rate > 0 {
				wait = max(wait, 0) + time.Duration(len(p.Data))*time.Second/time.Duration(now.rate)
			}
			time.Sleep(wait)
			stub.Output <- p
		}
	}
}

func newWay(t *testing.T, name, to string, seed uint64) *way {
	t.Helper()
	w := &way{t: t}
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	w.proxy = toxiproxy.NewProxy(server, name, testbed.FreeAddress(t), to)
	key := t.Name() + name + w.proxy.Listen
	chaosWays.Store(key, w)
	w.open()
	for up, stream := range []string{"downstream", "upstream"} {
		toxic := fmt.Sprintf(`{"stream":%q,"type":"weather","attributes":{"way":%q,"up":%d,"seed":%d}}`, stream, key, up, seed+uint64(up))
		if _, err := w.proxy.Toxics.AddToxicJson(strings.NewReader(toxic)); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *way) now() sky {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sky
}

func (w *way) change(f func(*sky)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.sky)
}

// close refuses connections and breaks those that are there.
func (w *way) close() { w.proxy.Stop() }

func (w *way) open() {
	if err := w.proxy.Start(); err != nil && err != toxiproxy.ErrProxyAlreadyStarted {
		w.t.Fatalf("a proxy does not come back: %v", err)
	}
}

func (w *way) reset() {
	if w.proxy.Enabled { // else it is away, and comes back by itself
		w.close()
		w.open()
	}
}
