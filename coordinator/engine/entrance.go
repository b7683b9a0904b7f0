package engine

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// entrance paces devices before their TLS handshake, the first thing that costs
// something. A fleet that comes back at once would otherwise share the
// processors so thinly that every login takes too long, fails, and is tried
// again. Who has to wait does so in its connection.
//
// Anybody can send a ClientHello and then nothing, which keeps a place for
// placeLimit. So places are shared fairly between the networks that want some:
// the next goes to the network that has the fewest, of those the one that waits
// longest, and within a network by the order of coming. A network alone, be it a
// whole fleet behind one address, has all of them.
//
// Nobody passes before [Engine.Open] if [Config.Hold] is set: a coordinator
// that is reading its state has no time for refusals either.
type entrance struct {
	opened chan struct{}
	once   sync.Once       // opens
	life   context.Context // of those who wait; ends with close
	end    context.CancelFunc
	pace   *rate.Limiter
	wait   time.Duration // see entranceWait
	room   int           // how many may wait, see join
	last   atomic.Int64  // when somebody passed, Unix nanoseconds
	queue  atomic.Int64  // who waits
	wake   chan struct{} // capacity 1: there is a place, or somebody who wants one

	mu     sync.Mutex
	free   int // places for handshakes under way
	from   map[netip.Prefix]*origin
	levels []*list.List // of *origin that wait, by the places that they have
}

// origin is a network that waits or has places: an IPv4 address or an IPv6 /64.
type origin struct {
	net     netip.Prefix
	held    int
	waiting list.List     // of chan struct{}, each closed when its turn has come
	place   *list.Element // in levels[held]; nil if nobody waits
}

const (
	// loginRate is how many devices a second each processor lets in at most. A
	// login is a handshake with two certificates, the auth callout and a hello,
	// 2 to 3 ms of a core.
	loginRate = 200

	// handshakes is how many a processor has under way at once. This is what
	// makes the pace fit: on a busy machine each takes longer. A device on a slow
	// link gives its place back after placeLimit, though it goes on.
	handshakes = 32
	placeLimit = time.Second

	// entranceWait is how long a device waits at most; below handshakeTimeout.
	entranceWait = 30 * time.Second

	// loginGrace is how long a login may still be under way after the entrance.
	loginGrace = 500 * time.Millisecond
)

func newEntrance(hold bool) *entrance {
	perSecond, places := loginRate*runtime.GOMAXPROCS(0), handshakes*runtime.GOMAXPROCS(0)
	e := &entrance{
		opened: make(chan struct{}), wake: make(chan struct{}, 1), pace: rate.NewLimiter(rate.Limit(perSecond), perSecond/2),
		wait: entranceWait, room: perSecond * int(entranceWait/time.Second),
		free: places, from: make(map[netip.Prefix]*origin), levels: make([]*list.List, places+1),
	}
	for i := range e.levels {
		e.levels[i] = list.New()
	}
	e.life, e.end = context.WithCancel(context.Background())
	if !hold {
		e.open()
	}
	go e.run()
	return e
}

func (e *entrance) open() { e.once.Do(func() { close(e.opened) }) }

// close lets nobody pass any more, and returns when those who have are through:
// nats-server 2.15 does not bear a login while it shuts down (it ends the
// process by a nil pointer).
func (e *entrance) close() {
	e.end()
	time.Sleep(time.Until(time.Unix(0, e.last.Load()).Add(loginGrace)))
}

// run gives turns, at the pace, until close.
func (e *entrance) run() {
	select {
	case <-e.opened:
	case <-e.life.Done():
		return
	}
	for {
		if e.wanted() {
			if e.pace.Wait(e.life) != nil {
				return
			}
			e.grant()
			continue
		}
		select {
		case <-e.wake:
		case <-e.life.Done():
			return
		}
	}
}

// wanted tells whether there is a place and somebody for it.
func (e *entrance) wanted() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.free > 0 && slices.ContainsFunc(e.levels, func(l *list.List) bool { return l.Len() > 0 })
}

// grant gives one place away.
func (e *entrance) grant() {
	e.mu.Lock()
	defer e.mu.Unlock()
	i := slices.IndexFunc(e.levels, func(l *list.List) bool { return l.Len() > 0 })
	if i < 0 || e.free == 0 {
		return // who waited has left
	}
	o := e.levels[i].Front().Value.(*origin)
	turn := o.waiting.Remove(o.waiting.Front()).(chan struct{})
	e.free--
	e.hold(o, 1)
	e.last.Store(time.Now().UnixNano())
	close(turn)
}

// hold notes that an origin has one place more or less, and puts it behind the
// others that have as many. e.mu is held.
func (e *entrance) hold(o *origin, more int) {
	if o.place != nil {
		e.levels[o.held].Remove(o.place)
		o.place = nil
	}
	o.held += more
	switch {
	case o.waiting.Len() > 0:
		o.place = e.levels[o.held].PushBack(o)
	case o.held == 0:
		delete(e.from, o.net)
	}
}

// join puts somebody in the queue of its network. If more wait than there are
// turns in the time that they have, a network with more than its share gets no
// further place in the queue.
func (e *entrance) join(n netip.Prefix) (o *origin, turn *list.Element, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	o, known := e.from[n]
	if known && e.queue.Load() >= int64(e.room) && o.waiting.Len() >= e.room/len(e.from) {
		return nil, nil, false
	}
	if !known {
		o = &origin{net: n}
		e.from[n] = o
	}
	turn = o.waiting.PushBack(make(chan struct{}))
	if o.place == nil {
		o.place = e.levels[o.held].PushBack(o)
	}
	e.queue.Add(1)
	e.awake()
	return o, turn, true
}

func (e *entrance) awake() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// leave takes somebody out of the queue, whose turn may have come just now.
func (e *entrance) leave(o *origin, turn *list.Element) {
	e.mu.Lock()
	defer e.mu.Unlock()
	select {
	case <-turn.Value.(chan struct{}):
		e.giveBack(o)
	default:
		o.waiting.Remove(turn)
		if o.waiting.Len() == 0 {
			e.hold(o, 0)
		}
	}
}

// giveBack frees a place. e.mu is held.
func (e *entrance) giveBack(o *origin) {
	e.free++
	e.hold(o, -1)
	e.awake()
}

var errEntrance = errors.New("too many devices are coming in; this one has to try again")

// pass waits for its turn, and says how to give the place back when the
// handshake is done. Who does not get one is cut off without a TLS alert: an
// alert would tell the device that something is wrong with it.
func (e *entrance) pass(h *tls.ClientHelloInfo) (leave func(), err error) {
	ctx, cancel := context.WithTimeout(e.life, e.wait)
	defer cancel()
	o, turn, ok := e.join(networkOf(h.Conn.RemoteAddr()))
	if !ok {
		h.Conn.Close()
		return nil, errEntrance
	}
	defer e.queue.Add(-1)
	select {
	case <-turn.Value.(chan struct{}):
	case <-ctx.Done():
		e.leave(o, turn)
		h.Conn.Close()
		return nil, errEntrance
	}
	leave = sync.OnceFunc(func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.giveBack(o)
	})
	time.AfterFunc(placeLimit, leave)
	return leave, nil
}

// networkOf is who is behind an address: with IPv6, everybody has a /64 to
// choose from. What is no IP address is all one.
func networkOf(a net.Addr) netip.Prefix {
	at, _ := netip.ParseAddrPort(a.String())
	ip := at.Addr().Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	p, _ := ip.Prefix(bits)
	return p
}

// guard puts the entrance before a server's TLS.
func (e *entrance) guard(c *tls.Config) *tls.Config {
	c = c.Clone()
	inner := c.GetConfigForClient
	c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		leave, err := e.pass(h)
		if err != nil {
			return nil, err
		}
		its := c
		if inner != nil {
			got, err := inner(h)
			if err != nil {
				return nil, err
			}
			if got != nil {
				its = got
			}
		}
		its = its.Clone()
		verify := its.VerifyConnection
		its.VerifyConnection = func(s tls.ConnectionState) error {
			defer leave()
			if verify == nil {
				return nil
			}
			return verify(s)
		}
		return its, nil
	}
	return c
}
