package engine

import (
	"crypto/tls"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"golang.org/x/time/rate"

	"github.com/deimos-edge/deimos/wire"
)

// held is an embedded engine whose devices wait to be let in.
func held(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.cfg.Dir, w.cfg.MQTTListen, w.cfg.Hold = t.TempDir(), "127.0.0.1:0", true
	w.cfg.TLS = &tls.Config{Certificates: []tls.Certificate{w.ca.server(t)}, ClientCAs: w.ca.pool()}
	w.start(t)
	w.addr = w.MQTTAddr()
	return w
}

func (w *world) awaitQueue(t *testing.T, n int64) {
	t.Helper()
	for deadline := time.Now().Add(patience); w.local.entrance.queue.Load() != n; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d devices wait, want %d", w.local.entrance.queue.Load(), n)
		}
	}
}

func TestDevicesWaitUntilTheDoorIsOpened(t *testing.T) {
	w := held(t)
	asked := make(chan struct{}, 100)
	w.reg.setWait(func(d wire.DeviceID) { asked <- struct{}{} })
	var wg sync.WaitGroup
	for range 5 {
		d := w.ca.device(t)
		wg.Go(func() {
			c, err := w.tryConnect(d)
			if err != nil {
				t.Errorf("a device that waited was not let in: %v", err)
				return
			}
			c.Disconnect(0)
		})
	}
	w.awaitQueue(t, 5)
	if len(asked) > 0 {
		t.Fatal("a device came in before the door was opened")
	}
	w.Open()
	wg.Wait()
	if len(asked) != 5 {
		t.Errorf("%d devices were asked about", len(asked))
	}
}

// A server that ends must not wait for those at its door, nor they for it.
func TestClosingSendsAwayWhoWaits(t *testing.T) {
	w := held(t)
	d := w.ca.device(t)
	failed := make(chan error, 1)
	go func() {
		_, err := w.tryConnect(d, func(o *mqtt.ClientOptions) { o.SetConnectTimeout(patience) })
		failed <- err
	}()
	w.awaitQueue(t, 1)
	must(t, w.Close())
	if err := next(t, failed, "the end of the attempt"); err == nil {
		t.Error("let in by a server that has ended")
	}
}

// hello is a ClientHello that comes from an address.
func helloFrom(c net.Conn, address string) *tls.ClientHelloInfo {
	return &tls.ClientHelloInfo{Conn: remote{c, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))}}
}

type remote struct {
	net.Conn
	addr net.Addr
}

func (r remote) RemoteAddr() net.Addr { return r.addr }

// anEntrance has nothing but places to wait for.
func anEntrance(t *testing.T) *entrance {
	e := newEntrance(false)
	t.Cleanup(e.end)
	e.pace.SetLimit(rate.Inf)
	return e
}

// Who cannot have a turn in time is cut off without a TLS alert, which would
// tell it that its certificate is at fault. It leaves nothing behind.
func TestWhoGetsNoTurnIsCutOffWithoutAnAlert(t *testing.T) {
	e := newEntrance(true) // nobody has a turn
	defer e.end()
	refused := func() {
		t.Helper()
		server, client := net.Pipe()
		defer client.Close()
		if _, err := e.pass(helloFrom(server, "192.0.2.1:1")); err == nil {
			t.Fatal("let in without a turn")
		}
		if n, err := client.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
	e.wait = time.Millisecond
	refused()
	if len(e.from) != 0 || e.levels[0].Len() != 0 || e.queue.Load() != 0 {
		t.Errorf("left behind: %d networks, %d that wait, a queue of %d", len(e.from), e.levels[0].Len(), e.queue.Load())
	}
	e.wait, e.room = time.Hour, 4
	for range e.room {
		_, _, ok := e.join(netip.MustParsePrefix("192.0.2.1/32"))
		if !ok {
			t.Fatal("no room in an empty queue")
		}
	}
	refused() // at once
	if _, _, ok := e.join(netip.MustParsePrefix("192.0.2.2/32")); !ok {
		t.Error("one network has all of the queue")
	}
}

// However many come, only so many handshakes are under way; each that ends
// makes room.
func TestHandshakesHaveOnlySoManyPlaces(t *testing.T) {
	e := anEntrance(t)
	var leave func()
	for range e.free {
		l, err := e.pass(helloFrom(nil, "192.0.2.1:1"))
		must(t, err)
		leave = l
	}
	in := make(chan struct{})
	go func() {
		if _, err := e.pass(helloFrom(nil, "192.0.2.1:1")); err == nil {
			close(in)
		}
	}()
	leave()
	leave() // its place and no other
	next(t, in, "the one that waited")
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.free < 0 || e.free > len(e.levels)-1 {
		t.Errorf("%d places are free", e.free)
	}
}

// What one network does not give back, another need not wait for: it has the
// next places until both have as many.
func TestPlacesAreSharedBetweenNetworks(t *testing.T) {
	e := newEntrance(true) // turns are given by hand
	defer e.end()
	take := func(network string) string {
		o, _, ok := e.join(netip.MustParsePrefix(network))
		if !ok {
			t.Fatal("no room")
		}
		return o.net.String()
	}
	got := func() map[string]int {
		held := map[string]int{}
		for n, o := range e.from {
			held[n.String()] = o.held
		}
		return held
	}
	all := e.free
	for range 3 * all {
		take("2001:db8::/64")
	}
	for range all {
		e.grant()
	}
	for range all {
		take("192.0.2.1/32")
		take("192.0.2.2/32")
	}
	stranger := e.from[netip.MustParsePrefix("2001:db8::/64")]
	for range all - all/3 {
		e.mu.Lock()
		e.giveBack(stranger)
		e.mu.Unlock()
		e.grant()
	}
	held := got()
	if a, b, c := held["2001:db8::/64"], held["192.0.2.1/32"], held["192.0.2.2/32"]; a+b+c != all || a > all/3+1 || b > all/3+1 || c > all/3+1 {
		t.Errorf("of %d places each of three has %v", all, held)
	}
}

func TestANetworkIsAnAddressOrA64(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.7:1883": "192.0.2.7/32", "[::ffff:192.0.2.7]:1": "192.0.2.7/32",
		"[2001:db8:1:2:3::4]:1": "2001:db8:1:2::/64", "[fe80::1%eth0]:1": "fe80::/64",
	} {
		if got := networkOf(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))).String(); got != want {
			t.Errorf("%s is of %s, want %s", address, got, want)
		}
	}
	pipe, _ := net.Pipe()
	if got := networkOf(pipe.RemoteAddr()); got != (netip.Prefix{}) {
		t.Errorf("a pipe is of %s", got)
	}
}

// Somebody without a certificate opens connections, says what begins a handshake,
// and then nothing: who comes from elsewhere passes them by.
func TestSilentStrangersDoNotLockDevicesOut(t *testing.T) {
	w := held(t)
	w.Open()
	near, far := net.Pipe()
	defer far.Close()
	go func() { _ = tls.Client(near, &tls.Config{ServerName: "localhost"}).Handshake() }()
	said := make([]byte, 4096)
	n, err := far.Read(said)
	must(t, err)
	from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	strangers := 16 * (len(w.local.entrance.levels) - 1)
	for range strangers {
		c, err := from.Dial("tcp", w.addr)
		must(t, err)
		defer c.Close()
		_, err = c.Write(said[:n])
		must(t, err)
	}
	c, err := w.tryConnect(w.ca.device(t))
	must(t, err)
	defer c.Disconnect(0)
	if n := w.local.entrance.queue.Load(); n == 0 {
		t.Error("a device came in when all the strangers had had their turn")
	}
}
