package test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/rs/zerolog"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/testbed"
)

// radio is a toxic for what toxiproxy has none: a line that loses packets and
// is away most of the time. Both show above TCP as waiting: a lost packet holds
// up what is behind it until it was sent again, an outage holds up everything.
type radio struct {
	Name string  `json:"name"` // of its air, see airs
	Loss float64 `json:"loss"` // share of pieces that are sent again
	RTO  int64   `json:"rto"`  // ms until they are
}

// air tells whether a radio's line is there.
type air struct {
	mu   sync.Mutex
	back chan struct{} // closed when the line comes back; nil while it is there
}

// airs by name: toxiproxy makes its toxics itself, from JSON.
var airs sync.Map

func init() { toxics.Register("radio", new(radio)) }

// Pipe carries one direction of one connection.
func (r *radio) Pipe(stub *toxics.ToxicStub) {
	v, _ := airs.Load(r.Name)
	a := v.(*air)
	for {
		select {
		case <-stub.Interrupt:
			return
		case c := <-stub.Input:
			if c == nil {
				stub.Close()
				return
			}
			if rand.Float64() < r.Loss {
				time.Sleep(time.Duration(r.RTO) * time.Millisecond)
			}
			<-a.there()
			stub.Output <- c
		}
	}
}

// there is closed while the line is, or when it comes back.
func (a *air) there() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.back != nil {
		return a.back
	}
	now := make(chan struct{})
	close(now)
	return now
}

func (a *air) set(there bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case there && a.back != nil:
		close(a.back)
		a.back = nil
	case !there && a.back == nil:
		a.back = make(chan struct{})
	}
}

// line is one device's way to its coordinator: a proxy before the broker and one
// before the data plane, over one radio.
type line struct {
	t       *testing.T
	air     *air
	proxies []*toxiproxy.Proxy
}

// How the line is: half a second each way, give or take a tenth; a packet in
// twenty is lost and comes a round trip later; 64 KB/s.
const (
	oneWay    = 500 // ms
	jitter    = 100 // ms
	loss      = 0.05
	bandwidth = 64 // KB/s
)

// putOnLine puts a slow line between an enrolled device and its broker and data
// plane, and starts the agent again.
func putOnLine(d *device, broker, data string) *line {
	f := d.f
	f.T.Helper()
	d.stop()
	l := &line{t: f.T, air: &air{}}
	name := f.T.Name() + d.name
	airs.Store(name, l.air)
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	reach := map[string]string{}
	for _, to := range []struct{ field, scheme, addr string }{{"brokers", "ssl://", broker}, {"data_plane", "https://", data}} {
		p := toxiproxy.NewProxy(server, to.field, "127.0.0.1:0", to.addr)
		if err := p.Start(); err != nil {
			f.T.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(p.Listen)
		reach[to.field] = to.scheme + net.JoinHostPort("127.0.0.1", port)
		for _, way := range []string{"upstream", "downstream"} {
			for _, toxic := range []string{ // in this order along the line
				fmt.Sprintf(`"latency","attributes":{"latency":%d,"jitter":%d}`, oneWay, jitter),
				fmt.Sprintf(`"bandwidth","attributes":{"rate":%d}`, bandwidth),
				fmt.Sprintf(`"radio","attributes":{"name":%q,"loss":%g,"rto":%d}`, name, loss, 2*oneWay),
			} {
				if _, err := p.Toxics.AddToxicJson(strings.NewReader(fmt.Sprintf(`{"stream":%q,"type":%s}`, way, toxic))); err != nil {
					f.T.Fatal(err)
				}
			}
		}
		l.proxies = append(l.proxies, p)
	}
	f.T.Cleanup(func() {
		l.air.set(true)
		for _, p := range l.proxies {
			p.Stop()
		}
	})
	d.reach(func(m map[string]any) {
		for field, url := range reach {
			m[field] = []string{url}
		}
	})
	d.start()
	return l
}

// cut breaks every connection at once, whatever is on its way.
func (l *line) cut() {
	for _, p := range l.proxies {
		p.Stop()
		if err := p.Start(); err != nil {
			l.t.Errorf("the proxy does not come back: %v", err)
		}
	}
}

// outages is how the line comes and goes.
type outages struct {
	up, down time.Duration
	firstCut int // the round in which all connections break
	everyCut int // and again after so many more; 0: never again
}

// comeAndGo follows a schedule until ctx ends, and leaves the line there.
func (l *line) comeAndGo(ctx context.Context, o outages) {
	defer l.air.set(true)
	for round, next := 1, o.firstCut; ; round++ {
		for i, d := range []time.Duration{o.up, o.down} {
			l.air.set(i == 0)
			if i == 0 && round == next {
				l.cut()
				if next += o.everyCut; o.everyCut == 0 {
					next = 0
				}
			}
			select {
			case <-time.After(d):
			case <-ctx.Done():
				return
			}
		}
	}
}

// okModule is a WASI module of 130 bytes that prints "ok": the guests that are
// built take a minute on such a line.
const okModule = "\x00asm\x01\x00\x00\x00" +
	"\x01\x0c\x02\x60\x04\x7f\x7f\x7f\x7f\x01\x7f\x60\x00\x00" + // types
	"\x02\x23\x01\x16wasi_snapshot_preview1\x08fd_write\x00\x00" +
	"\x03\x02\x01\x01" + // one function
	"\x05\x03\x01\x00\x01" + // one page
	"\x07\x13\x02\x06memory\x02\x00\x06_start\x00\x01" +
	"\x0a\x0f\x01\x0d\x00\x41\x01\x41\x00\x41\x01\x41\x0c\x10\x00\x1a\x0b" + // fd_write(1, 0, 1, 12)
	"\x0b\x11\x01\x00\x41\x00\x0b\x0b\x08\x00\x00\x00\x03\x00\x00\x00ok\n"

// TestSlowLinkOnlyMakesItSlow: a device behind a round trip of a second, one
// packet in twenty lost, 64 KB/s. First the line stays; then it is away nine
// tenths of the time, and breaks in the middle of transfers. All work succeeds
// and none of it is done twice. LINK=5m makes the second part as long, with
// outages of nine seconds.
func TestSlowLinkOnlyMakesItSlow(t *testing.T) {
	t.Parallel()
	var long time.Duration
	if s := os.Getenv("LINK"); s != "" {
		var err error
		if long, err = time.ParseDuration(s); err != nil {
			t.Fatalf("LINK is no duration: %v", err)
		}
	}
	f := newFleet(t, func(f *fleet) { f.Beat = "5s" })
	var cancel context.CancelFunc
	f.Ctx, cancel = context.WithTimeout(context.Background(), testLimit+3*long)
	t.Cleanup(cancel)
	f.trial = long // what takes two minutes on the short schedule may take as long as the long one
	rng := testbed.Seeded(t)
	f.enrol(1, false)
	d := f.devices[0]
	witness := interpose(d, rng.Uint64()) // behind the line; it does no evil here
	l := putOnLine(d, witness.listen.Addr().String(), f.HTTPS)
	d.awaitOnline()

	module := f.Write("ok.wasm", []byte(okModule))
	stored := map[string][]byte{}
	work := func(size int) {
		name := fmt.Sprint("object-", len(stored))
		began := time.Now()
		stored[name] = testbed.RandomBytes(rng, size)
		f.storeSlowly(name, stored[name])
		put := time.Since(began)
		var both sync.WaitGroup
		both.Go(func() { f.jobInTheEnd(module, name, 0) })
		both.Go(d.provesInTheEnd)
		both.Wait()
		t.Logf("%s: %d KiB stored in %s, job and challenge in %s more", name, size>>10, put.Round(time.Millisecond), (time.Since(began) - put).Round(time.Millisecond))
	}
	work(96 << 10)

	o := outages{up: 150 * time.Millisecond, down: 1350 * time.Millisecond, firstCut: 3}
	if long > 0 {
		o = outages{up: time.Second, down: 9 * time.Second, firstCut: 3, everyCut: 12}
	}
	away, end := context.WithCancel(f.Ctx)
	var schedule sync.WaitGroup
	schedule.Go(func() { l.comeAndGo(away, o) })
	for began := time.Now(); !t.Failed(); {
		work(64 << 10)
		if time.Since(began) >= long {
			break
		}
	}
	end()
	schedule.Wait()
	if t.Failed() {
		return
	}
	witness.awaitEnds()
	f.Stopped(f.Serve, 0)
	f.Stopped(d.proc, 0) // or it might wait a minute before it tries again
	pending := f.pendingOrders()
	f.StartServe()
	d.start()
	d.awaitOnline()
	f.awaitOrders(pending)
	for name, want := range stored {
		f.CheckGet(name, want)
	}
	ended, repeated := witness.checkOnceEach(t)
	t.Logf("%d orders ended, %d of them were sent more than once", ended, repeated)
	if ended < 3*len(stored) {
		t.Errorf("%d orders ended, there must be %d at least", ended, 3*len(stored))
	}
}

// storeSlowly stores an object of one chunk, and asks again as long as the only
// refusal is that the device has not answered yet.
func (f *fleet) storeSlowly(name string, data []byte) {
	id, sum := chunk.Sum(data).String(), sha256.Sum256(data)
	f.tries("storing "+name, func() (bool, string) {
		_, err := f.Client.PutChunk(f.Ctx, id, data, 1)
		var refused *api.Error
		if errors.As(err, &refused) && refused.Status >= 500 {
			return false, err.Error()
		}
		if err == nil {
			_, err = f.Client.PutObject(f.Ctx, api.Object{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:]), Chunks: []api.Chunk{{ID: id, Size: int64(len(data))}}})
		}
		if err != nil {
			f.T.Errorf("storing %s: %v", name, err)
		}
		return true, ""
	})
}
