package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/deimos-edge/deimos/hw/watchdog"
	"github.com/deimos-edge/deimos/wire"
)

// session keeps one MQTT connection to one of the fleet's brokers. It knows
// nothing of orders: it hands on what arrives, and sends what it is given while
// there is a connection. What is lost in between is sent again by whoever owes
// it, so everything here is QoS 0 and nothing is stored: a broker's or a
// client's queue would only be a second, worse memory.
type session struct {
	link
	out    chan message
	online atomic.Bool
	again  time.Duration // without a welcome for so long, hello is said again
	rare   atomic.Bool   // see slow
	wake   chan struct{} // ends the wait for the next attempt
	alive  *watchdog.Pulse
	denied int         // connections in a row that came to nothing; of run alone
	met    atomic.Bool // this connection was welcomed

	mu     sync.Mutex
	hellos []hello // of this connection, not answered, the oldest first
}

// hello is one that waits for its welcome.
type hello struct {
	nonce string
	said  time.Time
}

// link is what a session needs of the rest of the agent.
type link struct {
	id      Identity
	brokers func() []string
	door    door
	clock   *Clock
	log     *slog.Logger
	// hello fills the part of a hello that is not the session's own.
	hello func() wire.Presence
	// receive takes a message of the order topic that is no welcome.
	receive func(raw []byte) error
	// welcomed is called after each verified welcome.
	welcomed func()
	// pulse is what the session's loop shows its life by; may be nil.
	pulse func() *watchdog.Pulse
	// lost is called when a connection that was welcomed has ended; may be nil.
	lost func()
	// refused is called when a broker was reached that does not let this device
	// in, or that again and again drops it before it is welcomed.
	refused func()
	trusted func() ed25519.PublicKey
}

type message struct {
	channel wire.Channel
	raw     []byte
}

// The limits let a link work that is only slow: one second there and back, one
// packet in twenty lost. TCP then carries about 8 kB/s (MSS/RTT · 1.22/√loss,
// Mathis et al. 1997), so the largest message takes 16 s, and connecting is four
// round trips with a retransmission (1 s, 2 s, 4 s …) or two among them.
const (
	connectTimeout = 45 * time.Second // TCP, TLS and CONNACK; or SUBACK
	writeTimeout   = 90 * time.Second // one message, and what is in the buffers before it
	// A broker gives up after one and a half of keepAlive (MQTT 3.1.1, section
	// 3.1.2.10). A ping is sent 65 s after the last packet at the latest, which
	// leaves 25 s for it to be lost and sent again.
	keepAlive   = time.Minute
	pingTimeout = 45 * time.Second
	// sendBuffer bounds what the kernel holds back on a slow link, because a ping
	// stands behind it: at 8 kB/s, twice this (the kernel doubles it) is 8 s.
	sendBuffer = 32 << 10

	welcomeWait = 10 * time.Second
	minBackoff  = 500 * time.Millisecond
	maxBackoff  = time.Minute
	// A welcome counts for any hello that is not older: where an answer takes
	// longer than the pause between two hellos, each would come too late for the
	// newest. So a trusted time is at most this much behind (see [Clock.Trust]).
	welcomeAge  = 2 * time.Minute
	maxHellos   = 16              // that wait; with the pauses below they are never so many
	spread      = 5 * time.Second // over which devices come back that were welcomed and lost it together
	rareBackoff = time.Hour
	doubtful    = 3   // connections in a row without a welcome
	inbox       = 256 // messages taken from the broker and not yet looked at
	outgoing    = 256 // messages given by the agent and not yet sent
)

func newSession(l link) *session {
	if l.lost == nil {
		l.lost = func() {}
	}
	return &session{link: l, out: make(chan message, outgoing), again: welcomeWait, wake: make(chan struct{}, 1)}
}

// publish queues a message. With no room, or no connection, it is dropped:
// see the type's comment.
func (s *session) publish(c wire.Channel, raw []byte) {
	if !s.online.Load() && c != wire.ChannelPresence {
		return
	}
	select {
	case s.out <- message{c, raw}:
	default:
	}
}

// slow has the session try only about once an hour, or as usual again, and then
// at once.
func (s *session) slow(rare bool) {
	s.rare.Store(rare)
	if rare {
		return
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// backoff is the wait before the next attempt to connect. It is drawn from the
// whole of a range that doubles ("full jitter", Brooker 2015): of all ways to
// spread a fleet that comes back at once, it asks the least of a broker.
type backoff struct{ most time.Duration }

// next is told whether the last connection was welcomed: such a line is good,
// however short it stands.
func (b *backoff) next(welcomed bool) time.Duration {
	if welcomed {
		b.most = minBackoff // a new fault
		return mrand.N(spread)
	}
	b.most = min(max(2*b.most, 2*minBackoff), maxBackoff)
	return minBackoff + mrand.N(b.most-minBackoff)
}

// run connects, and connects again with a growing, jittered wait, until ctx ends.
func (s *session) run(ctx context.Context) {
	if s.pulse != nil {
		s.alive = s.pulse()
		defer s.alive.End()
	}
	var wait backoff
	for attempt := 0; ctx.Err() == nil; attempt++ {
		brokers := s.brokers()
		broker := brokers[attempt%len(brokers)]
		err := s.once(ctx, broker)
		if ctx.Err() != nil {
			return
		}
		pause := wait.next(s.met.Load())
		if s.rare.Load() {
			pause = rareBackoff/2 + mrand.N(rareBackoff)
		}
		s.log.Warn("no connection to the broker; trying again", "broker", broker, "in", pause.Round(time.Millisecond).String(), "error", err)
		s.waitFor(ctx, pause)
	}
}

// waitFor also ends when somebody wants the next attempt now.
func (s *session) waitFor(ctx context.Context, pause time.Duration) {
	for due := time.Now().Add(pause); ctx.Err() == nil; {
		s.alive.Beat()
		left := time.Until(due)
		if left <= 0 {
			return
		}
		t := time.NewTimer(min(left, pulseEvery))
		select {
		case <-ctx.Done():
		case <-s.wake:
			due = time.Time{}
		case <-t.C:
		}
		t.Stop()
	}
}

// once holds one connection until it breaks or ctx ends.
func (s *session) once(ctx context.Context, broker string) (err error) {
	s.begin()
	s.alive.Beat()
	id := newNonce()
	will, err := wire.Seal(s.id.key, wire.TypePresence, s.presence(false, id))
	if err != nil {
		return err
	}
	lost := make(chan error, 1)
	in := make(chan []byte, inbox)
	var reached atomic.Bool
	opts := mqtt.NewClientOptions().
		AddBroker(broker).
		SetClientID(string(s.id.ID)).
		SetProtocolVersion(4). // MQTT 3.1.1; without this, every failure is tried again as 3.1
		SetCustomOpenConnectionFn(s.open(ctx, &reached)).
		SetCleanSession(true).
		SetAutoReconnect(false). // run does it, with jitter and over all brokers
		SetConnectTimeout(connectTimeout).
		SetWriteTimeout(writeTimeout).
		SetKeepAlive(keepAlive).
		SetPingTimeout(pingTimeout).
		SetBinaryWill(wire.Topic(s.id.ID, wire.ChannelPresence), will, 0, false).
		SetConnectionLostHandler(func(_ mqtt.Client, err error) { lost <- err })
	c := mqtt.NewClient(opts)
	defer func() {
		if reached.Load() && ctx.Err() == nil {
			s.judge(err)
		}
	}()
	if err := wait(ctx, c.Connect(), connectTimeout); err != nil {
		c.Disconnect(0)
		return fmt.Errorf("connect: %w", err)
	}
	defer c.Disconnect(250)
	if err := s.subscribe(ctx, c, in); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	s.discard()
	s.online.Store(true)
	defer func() {
		s.online.Store(false)
		if s.met.Load() {
			s.lost()
		}
	}()
	return s.pump(ctx, c, id, in, lost)
}

// begin forgets what was of the connection before.
func (s *session) begin() {
	s.met.Store(false)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hellos = nil
}

// open reaches a broker by TLS, and watches what comes from it.
func (s *session) open(ctx context.Context, reached *atomic.Bool) mqtt.OpenConnectionFunc {
	return func(u *url.URL, _ mqtt.ClientOptions) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, connectTimeout)
		defer cancel()
		conn, err := s.door.dial(ctx, "tcp", u.Host)
		if err != nil {
			return nil, err
		}
		reached.Store(true)
		if tcp, ok := conn.(*tls.Conn).NetConn().(*net.TCPConn); ok {
			_ = tcp.SetWriteBuffer(sendBuffer) // without it a slow link is only less sure
		}
		return &guard{Conn: conn}, nil
	}
}

// judge tells, after a connection to a broker has ended, whether the broker
// does not want this device. A certificate that has ended is one reason for it.
func (s *session) judge(err error) {
	s.denied++ // since the last welcome, see take
	said := isAlert(err) || errors.Is(err, packets.ErrorRefusedNotAuthorised) ||
		errors.Is(err, packets.ErrorRefusedBadUsernameOrPassword) || errors.Is(err, packets.ErrorRefusedIDRejected)
	if said || s.denied >= doubtful {
		s.denied = 0
		s.refused()
	}
}

const refusedByBroker = 0x80 // MQTT 3.1.1, section 3.9.3

func (s *session) subscribe(ctx context.Context, c mqtt.Client, in chan<- []byte) error {
	topic := wire.Topic(s.id.ID, wire.ChannelOrder)
	t := c.Subscribe(topic, 0, func(_ mqtt.Client, m mqtt.Message) { deliver(in, m.Payload()) })
	if err := wait(ctx, t, connectTimeout); err != nil {
		return err
	}
	// To the library a refusal is no error, and the device would be deaf.
	if t.(*mqtt.SubscribeToken).Result()[topic] == refusedByBroker {
		return fmt.Errorf("the broker does not let this device read %s; its access rules must allow it", topic)
	}
	return nil
}

// deliver takes a message from the broker without waiting. What is larger than
// the protocol allows is not even kept for a moment.
func deliver(in chan<- []byte, raw []byte) {
	if len(raw) > wire.MaxMessage {
		return
	}
	select {
	case in <- raw:
	default: // full: the coordinator sends it again
	}
}

// discard empties the queue of what an earlier connection left: a hello of
// that one, and reports that are sent again anyway. They would stand before, or
// in the place of, this connection's hello.
func (s *session) discard() {
	for {
		select {
		case <-s.out:
		default:
			return
		}
	}
}

// pump moves messages both ways and says hello until it is answered.
func (s *session) pump(ctx context.Context, c mqtt.Client, id string, in <-chan []byte, lost <-chan error) error {
	s.greet(id)
	pause := s.again
	again := time.NewTimer(jittered(pause))
	defer again.Stop()
	told := false
	tick := time.NewTicker(pulseEvery)
	defer tick.Stop()
	for {
		s.alive.Beat()
		select {
		case <-tick.C:
		case err := <-lost:
			return err
		case <-ctx.Done():
			s.goodbye(c, id)
			return ctx.Err()
		case <-again.C:
			if s.waits() {
				pause = min(2*pause, maxBackoff)
				again.Reset(jittered(pause))
				if !told {
					s.log.Warn("the broker is reached, but no coordinator answers through it; does it run, and do the broker's access rules let this device read " + wire.Topic(s.id.ID, wire.ChannelOrder) + "?")
					told = true
				}
				s.greet(id)
			}
		case raw := <-in:
			if err := s.take(raw); err != nil {
				s.log.Warn(err.Error())
			}
		case m := <-s.out:
			t := c.Publish(wire.Topic(s.id.ID, m.channel), 0, false, m.raw)
			if err := wait(ctx, t, writeTimeout); err != nil && ctx.Err() == nil {
				return fmt.Errorf("publish: %w", err)
			}
		}
	}
}

// take sorts a message from the coordinator.
func (s *session) take(raw []byte) error {
	if wire.TypeOf(raw) != wire.TypeWelcome {
		return s.receive(raw) // which checks it: once is enough
	}
	typ, payload, err := wire.Open(raw, s.trusted())
	if err != nil || typ != wire.TypeWelcome {
		return s.receive(raw)
	}
	var w wire.Welcome
	if err := json.Unmarshal(payload, &w); err != nil {
		return fmt.Errorf("a signed welcome cannot be read: %w", err)
	}
	if w.Device != s.id.ID {
		return nil
	}
	age, ok := s.answered(w.Nonce)
	if !ok {
		return nil // too late, or the second of two coordinators
	}
	if !s.clock.Trust(w.Time, age) {
		return fmt.Errorf("the coordinator's time %s is before what this device knows for sure; its clock must be set", w.Time.Format(time.RFC3339))
	}
	s.denied = 0
	s.met.Store(true)
	s.welcomed()
	return nil
}

// answered says how long ago the hello with this nonce was said. All hellos
// count as answered then.
func (s *session) answered(nonce string) (age time.Duration, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.hellos {
		if age = time.Since(h.said); h.nonce == nonce && age <= welcomeAge {
			s.hellos = nil
			return age, true
		}
	}
	return 0, false
}

// waits tells whether a hello is out that nobody has answered.
func (s *session) waits() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.hellos) > 0
}

// jittered is d, give or take a quarter.
func jittered(d time.Duration) time.Duration { return d*3/4 + mrand.N(d/2+1) }

func (s *session) greet(id string) {
	p := s.presence(true, id)
	s.mu.Lock()
	s.hellos = append(s.hellos, hello{p.Nonce, time.Now()})
	s.hellos = s.hellos[max(0, len(s.hellos)-maxHellos):]
	s.mu.Unlock()
	raw, err := wire.Seal(s.id.key, wire.TypePresence, p)
	if err != nil {
		s.log.Error("hello cannot be signed", "error", err)
		return
	}
	s.publish(wire.ChannelPresence, raw)
}

// goodbye says offline before the connection is closed in good order, because a
// broker sends the last will only when it is not.
func (s *session) goodbye(c mqtt.Client, id string) {
	raw, err := wire.Seal(s.id.key, wire.TypePresence, s.presence(false, id))
	if err == nil {
		c.Publish(wire.Topic(s.id.ID, wire.ChannelPresence), 0, false, raw).WaitTimeout(time.Second)
	}
}

func (s *session) presence(online bool, id string) wire.Presence {
	p := s.hello()
	p.Device, p.Online, p.Session, p.Nonce = s.id.ID, online, id, newNonce()
	p.At, p.TimeConfidence = s.clock.Read()
	return p
}

// wait bounds a paho token by ctx and by limit.
func wait(ctx context.Context, t mqtt.Token, limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-t.Done():
		return t.Error()
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return errors.New("the broker does not answer")
	}
}

func newNonce() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
