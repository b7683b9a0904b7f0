package agent

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/wire"
)

// broker is a Mosquitto as an operator would set it up: mutual TLS, the
// certificate's common name as the user, and rules by which a device reaches
// its own topics only.
type broker struct {
	t    *testing.T
	ca   *authority
	dir  string
	port string
	cmd  *exec.Cmd
	done chan struct{} // the process has ended
}

const rules = `user coordinator
topic readwrite deimos/#
pattern read deimos/1/%u/order
pattern write deimos/1/%u/report
pattern write deimos/1/%u/beat
pattern write deimos/1/%u/presence
`

func mosquitto(t *testing.T) string { return testenv.Tool(t, "mosquitto", "mosquitto") }

// startBroker runs a broker with these access rules.
func startBroker(t *testing.T, ca *authority, acl string) *broker {
	t.Helper()
	mosquitto(t)
	b := &broker{t: t, ca: ca, dir: t.TempDir()}
	cert := ca.server("127.0.0.1")
	b.write("ca.pem", ca.pem())
	b.write("server.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}))
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	b.write("server.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	b.write("acl", []byte(acl))
	owner := "root" // else it changes to a user who cannot read its files here
	if os.Getuid() != 0 {
		owner = ""
	}
	for try := 1; ; try++ { // somebody else may take the port before the broker does
		b.port = freePort(t)
		conf := fmt.Sprintf(`listener %s 127.0.0.1
cafile %[2]s/ca.pem
certfile %[2]s/server.pem
keyfile %[2]s/server.key
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
acl_file %[2]s/acl
log_dest stderr
`, b.port, b.dir)
		if owner != "" {
			conf += "user " + owner + "\n"
		}
		b.write("conf", []byte(conf))
		said := b.begin()
		if said == "" {
			t.Cleanup(b.kill)
			return b
		}
		if !strings.Contains(said, "in use") || try == 10 {
			t.Fatalf("mosquitto did not start:\n%s", said)
		}
	}
}

func (b *broker) write(name string, data []byte) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), data, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// freePort is one on which nobody listens, below those that the kernel gives to whoever wants
// any: no other test gets it while its broker is started again.
func freePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(20_000 + rand.IntN(12_000))
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("of a hundred ports none is free")
	return ""
}

// start returns when the broker says that it runs.
func (b *broker) start() {
	b.t.Helper()
	if said := b.begin(); said != "" {
		b.t.Fatalf("mosquitto did not start:\n%s", said)
	}
}

// begin is start; of a broker that did not, it returns what it said.
func (b *broker) begin() (said string) {
	b.t.Helper()
	b.cmd = exec.Command(mosquitto(b.t), "-c", filepath.Join(b.dir, "conf"))
	out, err := b.cmd.StderrPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	up, done := make(chan struct{}), make(chan struct{})
	b.done = done
	var lines strings.Builder
	go func() {
		defer close(done)
		running := false
		for line := bufio.NewScanner(out); line.Scan(); {
			if running {
				continue
			}
			lines.WriteString(line.Text() + "\n")
			if running = strings.HasSuffix(line.Text(), "running"); running {
				close(up)
			}
		}
		_ = b.cmd.Wait() // it is killed
	}()
	select {
	case <-up:
		return ""
	case <-done:
		return "it ended: " + lines.String()
	case <-time.After(limit):
		b.t.Fatal("mosquitto does not say that it runs")
		return ""
	}
}

// kill is kill -9; a broker that is gone already is fine.
func (b *broker) kill() {
	_ = b.cmd.Process.Kill()
	<-b.done
}

// post is the network between device and broker: a proxy that can be shut and
// can break what is connected. It does not look at what it carries.
type post struct {
	l net.Listener
	// came gets a value for each connection that was let through or not.
	came chan struct{}

	mu    sync.Mutex
	to    string
	shut  bool
	conns []net.Conn
}

func newPost(t *testing.T, port string) *post {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &post{l: l, to: net.JoinHostPort("127.0.0.1", port), came: make(chan struct{}, 1024)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.carry(c) })
		}
	})
	t.Cleanup(func() { l.Close(); p.cut(true); wg.Wait() })
	return p
}

func (p *post) url() string { return "ssl://" + p.l.Addr().String() }

func (p *post) carry(c net.Conn) {
	defer c.Close()
	defer func() {
		select {
		case p.came <- struct{}{}:
		default:
		}
	}()
	up, err := net.Dial("tcp", p.to)
	p.mu.Lock()
	if err != nil || p.shut {
		p.mu.Unlock()
		if up != nil {
			up.Close()
		}
		return
	}
	p.conns = append(p.conns, c, up)
	p.mu.Unlock()
	defer up.Close()
	back := make(chan struct{})
	go func() { defer close(back); _, _ = io.Copy(c, up); c.Close(); up.Close() }()
	_, _ = io.Copy(up, c)
	c.Close()
	up.Close()
	<-back
}

// cut breaks every connection; with shut, it lets no new one through.
func (p *post) cut(shut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shut = shut
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

func (p *post) open() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shut = false
}

// office is the coordinator's end at the broker.
type office struct {
	t   *testing.T
	ca  *authority
	c   mqtt.Client
	got chan mqtt.Message
}

func (b *broker) office() *office {
	b.t.Helper()
	key := newKey(b.t)
	der := b.ca.issue(key.Public(), "coordinator", x509.ExtKeyUsageClientAuth)
	o := &office{t: b.t, ca: b.ca, got: make(chan mqtt.Message, 4096)}
	o.c = mqtt.NewClient(mqtt.NewClientOptions().AddBroker("ssl://127.0.0.1:" + b.port).SetClientID("office").
		SetTLSConfig(&tls.Config{RootCAs: b.ca.pool(), Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}).
		SetAutoReconnect(false))
	done(b.t, o.c.Connect())
	b.t.Cleanup(func() { o.c.Disconnect(0) })
	for _, c := range []wire.Channel{wire.ChannelReport, wire.ChannelBeat, wire.ChannelPresence} {
		done(b.t, o.c.Subscribe("deimos/1/+/"+string(c), 0, func(_ mqtt.Client, m mqtt.Message) { o.got <- m }))
	}
	return o
}

func done(t *testing.T, tok mqtt.Token) {
	t.Helper()
	if !tok.WaitTimeout(limit) {
		t.Fatal("the broker does not answer the test")
	}
	if err := tok.Error(); err != nil {
		t.Fatal(err)
	}
}

// presence awaits the next message, which must be a presence signed by id.
func (o *office) presence(id Identity, online bool) wire.Presence {
	o.t.Helper()
	m := await(o.t, "a presence", o.got)
	if want := wire.Topic(id.ID, wire.ChannelPresence); m.Topic() != want {
		o.t.Fatalf("a message on %s, want one on %s", m.Topic(), want)
	}
	p, err := wire.OpenAs[wire.Presence](m.Payload(), id.key.Public().(ed25519.PublicKey), wire.TypePresence)
	if err != nil {
		o.t.Fatal(err)
	}
	if p.Device != id.ID || p.Online != online || p.Session == "" || p.Nonce == "" {
		o.t.Fatalf("presence %+v, want online %t", p, online)
	}
	return p
}

func (o *office) send(id Identity, raw []byte) {
	o.t.Helper()
	done(o.t, o.c.Publish(wire.Topic(id.ID, wire.ChannelOrder), 0, false, raw))
}

func (o *office) welcome(id Identity, nonce string, at time.Time) {
	o.t.Helper()
	o.send(id, o.ca.seal(wire.TypeWelcome, wire.Welcome{Device: id.ID, Nonce: nonce, Time: at}))
}

// device is a running session and what it hands on.
type device struct {
	*session
	welcomes chan struct{}
	refusals atomic.Int64
	took     chan []byte
	log      *lockedBuffer
	stop     func()
}

// door is a member's, as the agent makes it.
func (m *Membership) door(id Identity, clock *Clock) door {
	d := knows(m.authority(), clock)
	d.own = func() *tls.Certificate { return m.proof(id) }
	return d
}

// joinBroker runs a session until the test ends; change may adapt it before.
func joinBroker(t *testing.T, ca *authority, id Identity, url string, change ...func(*session)) *device {
	t.Helper()
	m := Membership{EnrolReply: ca.reply(id)}
	d := &device{welcomes: make(chan struct{}, 64), took: make(chan []byte, 1<<16), log: &lockedBuffer{}}
	clock := NewClock(time.Time{})
	d.session = newSession(link{
		id: id, brokers: func() []string { return []string{url} }, door: m.door(id, clock), clock: clock, log: slog.New(slog.NewTextHandler(d.log, nil)),
		hello:   func() wire.Presence { return wire.Presence{Agent: "1.2.3", BootID: "boot"} },
		receive: func(raw []byte) error { d.took <- raw; return nil },
		trusted: func() ed25519.PublicKey { return m.OrderKey }, welcomed: func() { d.welcomes <- struct{}{} },
		refused: func() { d.refusals.Add(1) },
	})
	d.again = time.Hour // who is slow to welcome it hears one hello all the same
	for _, f := range change {
		f(d.session)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() { defer close(over); d.run(ctx) }()
	var once sync.Once
	d.stop = func() { once.Do(func() { cancel(); await(t, "the session's end", over) }) }
	t.Cleanup(d.stop)
	return d
}

// meet is a device that is online with its coordinator.
func meet(t *testing.T) (*broker, *post, *office, *device, Identity, wire.Presence) {
	t.Helper()
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	p, o := newPost(t, b.port), b.office()
	d := joinBroker(t, ca, id, p.url())
	hello := o.presence(id, true)
	o.welcome(id, hello.Nonce, time.Now())
	await(t, "the welcome", d.welcomes)
	return b, p, o, d, id, hello
}

func TestHelloIsWelcomed(t *testing.T) {
	_, _, o, d, id, hello := meet(t)
	if hello.Agent != "1.2.3" || hello.BootID != "boot" || hello.TimeConfidence != wire.ClockFloor {
		t.Errorf("hello %+v", hello)
	}
	if _, sure := d.clock.Read(); sure != wire.ClockTrusted {
		t.Errorf("after the welcome the clock is %s", sure)
	}
	order := o.ca.seal(wire.TypeOrder, wire.Order{ID: "a"})
	o.send(id, order)
	if raw := await(t, "the order", d.took); string(raw) != string(order) {
		t.Errorf("the order arrived as %q", raw)
	}
	for _, c := range []wire.Channel{wire.ChannelReport, wire.ChannelBeat} {
		d.publish(c, []byte("x"+c))
		if m := await(t, "what was published", o.got); m.Topic() != wire.Topic(id.ID, c) || string(m.Payload()) != "x"+string(c) {
			t.Errorf("got %q on %s", m.Payload(), m.Topic())
		}
	}
	d.stop()
	if bye := o.presence(id, false); bye.Session != hello.Session {
		t.Errorf("goodbye is of session %s, hello was of %s", bye.Session, hello.Session)
	}
}

func TestWelcomeMustAnswerThisHello(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	o := b.office()
	d := joinBroker(t, ca, id, "ssl://127.0.0.1:"+b.port, func(s *session) {
		s.clock.Raise(time.Now())
	})
	hello := o.presence(id, true)
	other := newIdentity(t)
	forged, err := wire.Seal(newKey(t), wire.TypeWelcome, wire.Welcome{Device: id.ID, Nonce: hello.Nonce, Time: time.Now().AddDate(1, 0, 0)})
	if err != nil {
		t.Fatal(err)
	}
	year := time.Now().AddDate(1, 0, 0)
	for _, raw := range [][]byte{
		forged,
		ca.seal(wire.TypeWelcome, wire.Welcome{Device: id.ID, Nonce: newNonce(), Time: year}),
		ca.seal(wire.TypeWelcome, wire.Welcome{Device: id.ID, Time: year}),
		ca.seal(wire.TypeWelcome, wire.Welcome{Device: other.ID, Nonce: hello.Nonce, Time: year}),
	} {
		o.send(id, raw)
	}
	o.send(id, []byte("behind them"))
	if raw := await(t, "the forged welcome, as no welcome", d.took); string(raw) != string(forged) {
		t.Errorf("handed on: %q", raw)
	}
	await(t, "what is behind them", d.took)
	if _, sure := d.clock.Read(); sure == wire.ClockTrusted || len(d.welcomes) != 0 {
		t.Error("a welcome that answers nothing was taken")
	}
	o.welcome(id, hello.Nonce, time.Now())
	await(t, "the true welcome", d.welcomes)
	o.welcome(id, hello.Nonce, year) // the same nonce again
	o.send(id, []byte("behind it"))
	await(t, "what is behind it", d.took)
	if len(d.welcomes) != 0 || d.clock.Now().After(time.Now().Add(time.Hour)) {
		t.Error("a nonce counted twice")
	}
}

func TestHelloIsSaidUntilItIsAnswered(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	o := b.office()
	d := joinBroker(t, ca, id, "ssl://127.0.0.1:"+b.port, func(s *session) { s.again = 20 * time.Millisecond })
	first := o.presence(id, true)
	var last wire.Presence
	for range 3 {
		last = o.presence(id, true)
		if last.Session != first.Session || last.Nonce == first.Nonce {
			t.Errorf("said again as %+v after %+v", last, first)
		}
	}
	o.welcome(id, first.Nonce, time.Now()) // three newer ones are out
	await(t, "the welcome that answers the first", d.welcomes)
	if d.waits() {
		t.Error("the newer hellos still wait")
	}
	o.welcome(id, last.Nonce, time.Now())
	o.send(id, []byte("behind it"))
	await(t, "what is behind the second welcome", d.took)
	if len(d.welcomes) != 0 {
		t.Error("it was welcomed twice")
	}
}

func TestOnlyAHelloOfTheLastMinutesIsAnswered(t *testing.T) {
	s := newSession(link{id: newIdentity(t), clock: NewClock(time.Time{}), hello: func() wire.Presence { return wire.Presence{} }})
	for range 3 * maxHellos {
		s.greet("s")
	}
	if len(s.hellos) != maxHellos {
		t.Errorf("%d hellos wait", len(s.hellos))
	}
	s.hellos[0].said = time.Now().Add(-welcomeAge - time.Second)
	s.hellos[1].said = time.Now().Add(-welcomeAge / 2)
	old, good := s.hellos[0].nonce, s.hellos[1].nonce
	if _, ok := s.answered(old); ok || !s.waits() {
		t.Error("a hello counts that is too old")
	}
	if age, ok := s.answered(good); !ok || age < welcomeAge/2 || age > welcomeAge || s.waits() {
		t.Errorf("%s %t", age, ok)
	}
	s.greet("s")
	last := s.hellos[0].nonce
	s.begin()
	if _, ok := s.answered(last); ok {
		t.Error("a hello of the connection before counts")
	}
}

func TestWaitsGrowUntilAWelcome(t *testing.T) {
	var b backoff
	most := 2 * minBackoff
	var longest time.Duration
	for range 200 {
		d := b.next(false)
		if d < minBackoff || d > most {
			t.Fatalf("it waits %s, %s at most", d, most)
		}
		longest, most = max(longest, d), min(2*most, maxBackoff)
	}
	if longest < maxBackoff/2 {
		t.Errorf("of two hundred waits the longest is %s", longest)
	}
	if d := b.next(true); d > spread {
		t.Errorf("after a welcome it waits %s", d)
	}
	if d := b.next(false); d > 4*minBackoff {
		t.Errorf("the fault after a welcome is not new: it waits %s", d)
	}
}

// A welcome counts for its own connection: see TestWaitsGrowUntilAWelcome.
func TestAConnectionIsGoodOnceItIsWelcomed(t *testing.T) {
	_, p, o, d, id, _ := meet(t)
	if !d.met.Load() {
		t.Error("the welcome is not remembered")
	}
	p.cut(false)
	o.presence(id, false)
	o.presence(id, true)
	d.stop()
	if d.met.Load() {
		t.Error("the connection that nobody welcomed counts as the one before")
	}
}

func TestThreeConnectionsInVainAreARefusal(t *testing.T) {
	refused := 0
	s := newSession(link{id: newIdentity(t), clock: NewClock(time.Time{}), refused: func() { refused++ }})
	for i, want := range []int{0, 0, 1, 1, 1, 2} {
		if s.judge(io.EOF); refused != want {
			t.Errorf("after %d in vain: refused %d times", i+1, refused)
		}
	}
	for _, said := range []error{packets.ErrorRefusedNotAuthorised, packets.ErrorRefusedBadUsernameOrPassword, packets.ErrorRefusedIDRejected} {
		before := refused
		if s.judge(fmt.Errorf("connect: %w", said)); refused != before+1 {
			t.Errorf("%v is no refusal", said)
		}
	}
}

func TestASlowSessionIsWokenWhenItIsNotSlowAnyMore(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	p, o := newPost(t, b.port), b.office()
	p.cut(true)
	d := joinBroker(t, ca, id, p.url(), func(s *session) { s.slow(true) })
	await(t, "an attempt in vain", p.came)
	p.open()
	d.slow(false) // the wait is half an hour at least, whether it has begun or not
	o.presence(id, true)
}

func TestWillTellsOfABrokenConnection(t *testing.T) {
	_, p, o, d, id, hello := meet(t)
	p.cut(false)
	will := o.presence(id, false)
	if will.Session != hello.Session {
		t.Errorf("the will is of session %s, the hello was of %s", will.Session, hello.Session)
	}
	again := o.presence(id, true)
	if again.Session == hello.Session || again.Nonce == hello.Nonce {
		t.Error("the new connection bears the old one's marks")
	}
	o.welcome(id, again.Nonce, time.Now())
	await(t, "the second welcome", d.welcomes)
}

func TestSessionOutlivesTheBroker(t *testing.T) {
	b, p, _, d, id, hello := meet(t)
	p.cut(true)
	b.kill()
	for len(p.came) > 0 {
		<-p.came
	}
	await(t, "an attempt in vain", p.came)
	b.start()
	o := b.office()
	p.open()
	again := o.presence(id, true)
	if again.Session == hello.Session {
		t.Error("the same session twice")
	}
	o.welcome(id, again.Nonce, time.Now())
	await(t, "the welcome", d.welcomes)
}

// TestNextBrokerIsTried: the first one is down for good.
func TestNextBrokerIsTried(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	o := b.office()
	joinBroker(t, ca, id, "ssl://127.0.0.1:"+freePort(t), func(s *session) {
		first := s.brokers()
		s.brokers = func() []string { return append(first, "ssl://127.0.0.1:"+b.port) }
	})
	o.presence(id, true)
}

func TestOnlyTheFleetsBrokerIsBelieved(t *testing.T) {
	ca, other, id := newAuthority(t), newAuthority(t), newIdentity(t)
	b := startBroker(t, other, rules) // it would take anybody of its own
	o := b.office()
	p := newPost(t, b.port)
	d := joinBroker(t, ca, id, p.url())
	for range 2 {
		await(t, "an attempt", p.came)
	}
	d.stop()
	if len(o.got) != 0 || !strings.Contains(d.log.String(), "x509") {
		t.Errorf("%d messages reached it; log: %s", len(o.got), d.log)
	}
}

// TestSessionWithoutAClock: the board's clock says 1970, its last saved time is
// from before the broker's certificate.
func TestSessionWithoutAClock(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	o := b.office()
	h := &hardware{boot1970}
	d := joinBroker(t, ca, id, "ssl://127.0.0.1:"+b.port, func(s *session) {
		s.clock.system = h.now
		s.clock.Raise(time.Now().Add(-30 * time.Hour))
	})
	hello := o.presence(id, true)
	if hello.TimeConfidence != wire.ClockFloor {
		t.Errorf("the clock is %s", hello.TimeConfidence)
	}
	at := time.Now()
	o.welcome(id, hello.Nonce, at)
	await(t, "the welcome", d.welcomes)
	if got := d.clock.Now(); !got.Equal(at) {
		t.Errorf("the clock says %s, the welcome said %s", got, at)
	}
}

// TestRefusedSubscriptionIsNoSession: to a device that hears nothing it must not
// look as if it were online. Mosquitto refuses no subscription (it only never
// delivers), so the broker here is made of the library's packets.
func TestRefusedSubscriptionIsNoSession(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{ca.server("127.0.0.1")}})
	if err != nil {
		t.Fatal(err)
	}
	said := make(chan packets.ControlPacket, 16)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { refuseToSubscribe(c, said) })
		}
	})
	d := joinBroker(t, ca, id, "ssl://"+l.Addr().String())
	for range 2 { // it tries, gives up, and tries again
		for _, want := range []byte{packets.Connect, packets.Subscribe, packets.Disconnect} {
			if p := await(t, "a packet", said); packetType(p) != want {
				t.Errorf("got %s, want %s", p, packets.PacketNames[want])
			}
		}
	}
	d.stop()
	l.Close()
	wg.Wait()
	if !strings.Contains(d.log.String(), "access rules") {
		t.Errorf("the log does not say why: %s", d.log)
	}
}

// refuseToSubscribe is a broker's side of one connection.
func refuseToSubscribe(c net.Conn, said chan<- packets.ControlPacket) {
	defer c.Close()
	for {
		p, err := packets.ReadPacket(c)
		if err != nil {
			return
		}
		said <- p
		switch p := p.(type) {
		case *packets.ConnectPacket:
			err = packets.NewControlPacket(packets.Connack).Write(c)
		case *packets.SubscribePacket:
			a := packets.NewControlPacket(packets.Suback).(*packets.SubackPacket)
			a.MessageID, a.ReturnCodes = p.MessageID, []byte{refusedByBroker}
			err = a.Write(c)
		}
		if err != nil {
			return
		}
	}
}

func packetType(p packets.ControlPacket) byte {
	switch p.(type) {
	case *packets.ConnectPacket:
		return packets.Connect
	case *packets.SubscribePacket:
		return packets.Subscribe
	case *packets.PublishPacket:
		return packets.Publish
	case *packets.DisconnectPacket:
		return packets.Disconnect
	}
	return 0
}

// TestDeafDeviceSaysSo: the rules let it speak and not hear.
func TestDeafDeviceSaysSo(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, strings.Replace(rules, "pattern read", "# pattern read", 1))
	o := b.office()
	d := joinBroker(t, ca, id, "ssl://127.0.0.1:"+b.port, func(s *session) { s.again = 10 * time.Millisecond })
	for range 5 {
		o.welcome(id, o.presence(id, true).Nonce, time.Now())
	}
	d.stop()
	if n := strings.Count(d.log.String(), "no coordinator answers"); n != 1 || len(d.welcomes) != 0 {
		t.Errorf("it is said %d times: %s", n, d.log)
	}
}

// TestDeviceReachesOnlyItsOwnTopics shows that the rules above are in force, or
// the other tests would prove less than they say.
func TestDeviceReachesOnlyItsOwnTopics(t *testing.T) {
	ca, id, victim := newAuthority(t), newIdentity(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	o := b.office()
	posing := Identity{ID: victim.ID, key: id.key} // its own certificate, another's topics
	m := Membership{EnrolReply: ca.reply(id)}
	d := joinBroker(t, ca, posing, "ssl://127.0.0.1:"+b.port, func(s *session) {
		s.door = m.door(id, s.clock)
	})
	joinBroker(t, ca, id, "ssl://127.0.0.1:"+b.port)
	o.presence(id, true) // the only one that arrives
	d.stop()
	if n := len(o.got); n != 0 {
		t.Errorf("%d messages in another's name", n)
	}
}

// TestFloodIsDroppedNotHoarded: more arrives than can be looked at.
func TestFloodIsDroppedNotHoarded(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	o := b.office()
	stuck, gate := make(chan struct{}, 1), make(chan struct{})
	seen := make(chan struct{})
	var n int
	d := joinBroker(t, ca, id, "ssl://127.0.0.1:"+b.port, func(s *session) {
		s.receive = func(raw []byte) error {
			if n == 0 {
				stuck <- struct{}{}
				<-gate
			}
			if n++; string(raw) == "last" {
				select {
				case <-seen:
				default:
					close(seen)
				}
			}
			return nil
		}
	})
	hello := o.presence(id, true)
	o.welcome(id, hello.Nonce, time.Now())
	await(t, "the welcome", d.welcomes)
	o.send(id, []byte("first"))
	await(t, "the first message", stuck)
	const flood = 40 * inbox
	block := make([]byte, 1024)
	for range flood {
		o.send(id, block)
	}
	// The sender is not held up, and neither is the broker: it still carries
	// what others say.
	other := newIdentity(t)
	joinBroker(t, ca, other, "ssl://127.0.0.1:"+b.port)
	o.presence(other, true)
	close(gate)
	for {
		o.send(id, []byte("last")) // as a coordinator does, again and again
		select {
		case <-seen:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestInboxIsBounded(t *testing.T) {
	in := make(chan []byte, inbox)
	for range 4 * inbox {
		deliver(in, []byte("x"))
	}
	if len(in) != inbox {
		t.Errorf("%d messages are kept", len(in))
	}
	for range inbox {
		<-in
	}
	deliver(in, make([]byte, wire.MaxMessage+1))
	if len(in) != 0 {
		t.Error("a message above the protocol's limit is kept")
	}
	deliver(in, make([]byte, wire.MaxMessage))
	if len(in) != 1 {
		t.Error("the largest message that is allowed is not")
	}
}

func TestPublishNeverBlocks(t *testing.T) {
	s := newSession(link{})
	over := make(chan struct{})
	go func() {
		defer close(over)
		for range 4 * outgoing {
			s.publish(wire.ChannelReport, []byte("offline"))
		}
		if len(s.out) != 0 {
			t.Errorf("%d reports wait for a connection; the dispatcher keeps them better", len(s.out))
		}
		s.online.Store(true)
		for range 4 * outgoing {
			s.publish(wire.ChannelReport, []byte("stuck"))
		}
		if len(s.out) != outgoing {
			t.Errorf("%d reports are kept", len(s.out))
		}
	}()
	await(t, "publish to return", over)
}

// TestHelloIsNotStuckBehindOldMessages: the last connection broke with a full
// queue.
func TestHelloIsNotStuckBehindOldMessages(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	o := b.office()
	joinBroker(t, ca, id, "ssl://127.0.0.1:"+b.port, func(s *session) {
		for range outgoing {
			s.out <- message{wire.ChannelPresence, []byte("of old")}
		}
	})
	o.presence(id, true) // is the first that arrives
}

// TestSessionEndsAtASilentBroker: it takes the connection and says nothing.
func TestSessionEndsAtASilentBroker(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	came := make(chan net.Conn, 4)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			came <- c
		}
	}()
	d := joinBroker(t, newAuthority(t), newIdentity(t), "ssl://"+l.Addr().String())
	c := await(t, "the connection", came)
	defer c.Close()
	over := make(chan struct{})
	go func() { defer close(over); d.stop() }()
	select {
	case <-over:
	case <-time.After(connectTimeout - 5*time.Second):
		t.Error("it waits for a broker that says nothing although it has to end")
	}
}
