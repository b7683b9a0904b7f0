package engine

import (
	"crypto/tls"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"

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

// Who cannot have a turn in time is cut off without a TLS alert, which would
// tell it that its certificate is at fault.
func TestWhoGetsNoTurnIsCutOffWithoutAnAlert(t *testing.T) {
	e := newEntrance(true)
	e.open()
	for e.pace.Allow() { // the burst is used up
	}
	e.pace.SetLimit(0)
	server, client := net.Pipe()
	defer client.Close()
	if _, err := e.pass(&tls.ClientHelloInfo{Conn: server}); err == nil {
		t.Fatal("let in without a turn")
	}
	if n, err := client.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// However many come, only so many handshakes are under way; each that ends
// makes room.
func TestHandshakesHaveOnlySoManyPlaces(t *testing.T) {
	e := newEntrance(false)
	e.pace.SetLimit(1 << 20)
	e.pace.SetBurst(1 << 20)
	var leave func()
	for range cap(e.places) {
		l, err := e.pass(&tls.ClientHelloInfo{})
		must(t, err)
		leave = l
	}
	in := make(chan struct{})
	go func() {
		if _, err := e.pass(&tls.ClientHelloInfo{}); err == nil {
			close(in)
		}
	}()
	leave()
	leave() // its place and no other
	next(t, in, "the one that waited")
	if n := len(e.places); n > cap(e.places) {
		t.Errorf("%d places taken", n)
	}
}
