package engine

import (
	"context"
	"crypto/tls"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// entrance paces devices before their TLS handshake, the first thing that costs
// something. A fleet that comes back at once would otherwise share the
// processors so thinly that every login takes too long, fails, and is tried
// again. Who has to wait does so in its connection, in the order of coming.
//
// Nobody passes before [Engine.Open] if [Config.Hold] is set: a coordinator
// that is reading its state has no time for refusals either.
type entrance struct {
	opened chan struct{}
	once   sync.Once       // opens
	life   context.Context // of those who wait; ends with close
	end    context.CancelFunc
	pace   *rate.Limiter
	places chan struct{} // handshakes under way
	last   atomic.Int64  // when somebody passed, Unix nanoseconds
	queue  atomic.Int64  // who waits
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
	perSecond := loginRate * runtime.GOMAXPROCS(0)
	e := &entrance{places: make(chan struct{}, handshakes*runtime.GOMAXPROCS(0)), opened: make(chan struct{}), pace: rate.NewLimiter(rate.Limit(perSecond), perSecond/2)}
	e.life, e.end = context.WithCancel(context.Background())
	if !hold {
		e.open()
	}
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

var errEntrance = errors.New("too many devices are coming in; this one has to try again")

// pass waits for its turn, and says how to give the place back when the
// handshake is done. Who does not get one is cut off without a TLS alert: an
// alert would tell the device that something is wrong with it.
func (e *entrance) pass(h *tls.ClientHelloInfo) (leave func(), err error) {
	ctx, cancel := context.WithTimeout(e.life, entranceWait)
	defer cancel()
	e.queue.Add(1)
	defer e.queue.Add(-1)
	select {
	case <-e.opened:
	case <-ctx.Done():
	}
	if e.pace.Wait(ctx) != nil {
		h.Conn.Close()
		return nil, errEntrance
	}
	select {
	case e.places <- struct{}{}:
	case <-ctx.Done():
		h.Conn.Close()
		return nil, errEntrance
	}
	e.last.Store(time.Now().UnixNano())
	leave = sync.OnceFunc(func() { <-e.places })
	time.AfterFunc(placeLimit, leave)
	return leave, nil
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
