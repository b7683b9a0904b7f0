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
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"

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

	mu    sync.Mutex
	nonce string // of the hello that waits for its welcome; empty if none does
}

// link is what a session needs of the rest of the agent.
type link struct {
	id      Identity
	brokers []string
	tls     *tls.Config
	clock   *Clock
	log     *slog.Logger
	// hello fills the part of a hello that is not the session's own.
	hello func() wire.Presence
	// receive takes a message of the order topic that is no welcome.
	receive func(raw []byte) error
	// welcomed is called after each verified welcome.
	welcomed func()
	trusted  func() ed25519.PublicKey
}

type message struct {
	channel wire.Channel
	raw     []byte
}

const (
	connectTimeout = 20 * time.Second
	keepAlive      = 30 * time.Second
	welcomeWait    = 10 * time.Second
	minBackoff     = 500 * time.Millisecond
	maxBackoff     = time.Minute
	inbox          = 256 // messages taken from the broker and not yet looked at
	outbox         = 256 // messages given by the agent and not yet sent
)

func newSession(l link) *session {
	return &session{link: l, out: make(chan message, outbox), again: welcomeWait}
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

// run connects, and connects again with a growing, jittered wait, until ctx ends.
func (s *session) run(ctx context.Context) {
	wait := minBackoff
	for attempt := 0; ctx.Err() == nil; attempt++ {
		broker := s.brokers[attempt%len(s.brokers)]
		began := time.Now()
		err := s.once(ctx, broker)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > time.Minute {
			wait = minBackoff // it worked for a while: this is a new fault
		}
		pause := wait/2 + mrand.N(wait) // a fleet must not come back as one
		s.log.Warn("no connection to the broker; trying again", "broker", broker, "in", pause.Round(time.Millisecond).String(), "error", err)
		wait = min(2*wait, maxBackoff)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// once holds one connection until it breaks or ctx ends.
func (s *session) once(ctx context.Context, broker string) error {
	id := newNonce()
	will, err := wire.Seal(s.id.key, wire.TypePresence, s.presence(false, id))
	if err != nil {
		return err
	}
	lost := make(chan error, 1)
	in := make(chan []byte, inbox)
	opts := mqtt.NewClientOptions().
		AddBroker(broker).
		SetClientID(string(s.id.ID)).
		SetProtocolVersion(4). // MQTT 3.1.1; without this, every failure is tried again as 3.1
		SetTLSConfig(s.tls.Clone()).
		SetCleanSession(true).
		SetAutoReconnect(false). // run does it, with jitter and over all brokers
		SetConnectTimeout(connectTimeout).
		SetWriteTimeout(connectTimeout).
		SetKeepAlive(keepAlive).
		SetPingTimeout(keepAlive/2).
		SetBinaryWill(wire.Topic(s.id.ID, wire.ChannelPresence), will, 0, false).
		SetConnectionLostHandler(func(_ mqtt.Client, err error) { lost <- err })
	c := mqtt.NewClient(opts)
	if err := wait(ctx, c.Connect()); err != nil {
		c.Disconnect(0)
		if s.clock.learn(err, s.tls.RootCAs) {
			s.log.Info("the clock was behind the broker's certificate, and is set to its beginning", "time", s.clock.Now().Format(time.RFC3339))
		}
		return fmt.Errorf("connect: %w", err)
	}
	defer c.Disconnect(250)
	if err := s.subscribe(ctx, c, in); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	s.discard()
	s.online.Store(true)
	defer s.online.Store(false)
	return s.pump(ctx, c, id, in, lost)
}

const refusedByBroker = 0x80 // MQTT 3.1.1, section 3.9.3

func (s *session) subscribe(ctx context.Context, c mqtt.Client, in chan<- []byte) error {
	topic := wire.Topic(s.id.ID, wire.ChannelOrder)
	t := c.Subscribe(topic, 0, func(_ mqtt.Client, m mqtt.Message) { deliver(in, m.Payload()) })
	if err := wait(ctx, t); err != nil {
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

// discard empties the outbox of what an earlier connection left: a hello of
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
	again := time.NewTicker(s.again)
	defer again.Stop()
	told := false
	for {
		select {
		case err := <-lost:
			return err
		case <-ctx.Done():
			s.goodbye(c, id)
			return ctx.Err()
		case <-again.C:
			s.mu.Lock()
			waiting := s.nonce != ""
			s.mu.Unlock()
			if waiting {
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
			if err := wait(ctx, t); err != nil && ctx.Err() == nil {
				return fmt.Errorf("publish: %w", err)
			}
		}
	}
}

// take sorts a message from the coordinator.
func (s *session) take(raw []byte) error {
	typ, payload, err := wire.Open(raw, s.trusted())
	if err != nil || typ != wire.TypeWelcome {
		return s.receive(raw)
	}
	var w wire.Welcome
	if err := json.Unmarshal(payload, &w); err != nil {
		return fmt.Errorf("a signed welcome cannot be read: %w", err)
	}
	s.mu.Lock()
	mine := w.Device == s.id.ID && w.Nonce != "" && w.Nonce == s.nonce
	if mine {
		s.nonce = ""
	}
	s.mu.Unlock()
	if !mine {
		return nil // to an older hello, or the second of two coordinators
	}
	if !s.clock.Trust(w.Time) {
		return fmt.Errorf("the coordinator's time %s is before what this device knows for sure; its clock must be set", w.Time.Format(time.RFC3339))
	}
	s.welcomed()
	return nil
}

func (s *session) greet(id string) {
	p := s.presence(true, id)
	s.mu.Lock()
	s.nonce = p.Nonce
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

// wait bounds a paho token by ctx and by connectTimeout.
func wait(ctx context.Context, t mqtt.Token) error {
	timer := time.NewTimer(connectTimeout)
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
