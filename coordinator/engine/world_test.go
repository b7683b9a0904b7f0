package engine

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/deimos-edge/deimos/wire"
)

// patience is how long tests wait for what must come. It is no measurement.
const patience = time.Minute

// Environment of the test binary when it plays a part as a child process.
const (
	envServer = "DEIMOS_ENGINE_TEST_SERVER" // run a stock nats-server from this configuration
	envWriter = "DEIMOS_ENGINE_TEST_WRITER" // write to an engine in this directory until killed
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(envServer) != "":
		childServer(os.Getenv(envServer))
	case os.Getenv(envWriter) != "":
		childWriter(os.Getenv(envWriter))
	default:
		os.Exit(m.Run())
	}
}

// childServer is what a stock nats-server's main does: it runs from a file. It
// prints its two addresses and ends with its standard input.
func childServer(config string) {
	opts, err := server.ProcessConfigFile(config)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	opts.NoSigs = true
	s, err := server.NewServer(opts)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	s.ConfigureLogger()
	go s.Start()
	if !s.ReadyForConnections(patience) {
		fmt.Println("error not ready")
		os.Exit(1)
	}
	fmt.Println("ready", s.Addr().(*net.TCPAddr).Port, opts.MQTT.Port)
	_, _ = io.Copy(io.Discard, os.Stdin)
	s.Shutdown()
	s.WaitForShutdown()
}

// authority is a fleet's CA.
type authority struct {
	key  ed25519.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fleet CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, pub, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{key, cert}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func (a *authority) sign(t testing.TB, tmpl *x509.Certificate, key crypto.Signer) tls.Certificate {
	t.Helper()
	tmpl.SerialNumber, _ = rand.Int(rand.Reader, big.NewInt(1<<62))
	if tmpl.NotBefore.IsZero() {
		tmpl.NotBefore = time.Now().Add(-2 * time.Hour)
	}
	if tmpl.NotAfter.IsZero() {
		tmpl.NotAfter = time.Now().Add(time.Hour)
	}
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) server(t testing.TB) tls.Certificate {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	return a.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "broker"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key)
}

// device is a client with a certificate.
type device struct {
	id   wire.DeviceID
	cert tls.Certificate
}

// device makes one whose certificate is as it should be, but for edit.
func (a *authority) device(t testing.TB, edit ...func(*x509.Certificate)) device {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	id := wire.IDOf(pub)
	return device{id, a.deviceCert(t, id, key, edit...)}
}

func (a *authority) deviceCert(t testing.TB, id wire.DeviceID, key crypto.Signer, edit ...func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	tmpl := &x509.Certificate{
		Subject:     pkix.Name{CommonName: string(id)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, f := range edit {
		f(tmpl)
	}
	return a.sign(t, tmpl, key)
}

func ecdsaKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return k
}

// registry is the fleet's list as the engine sees it.
type registry struct {
	mu      sync.Mutex
	retired map[wire.DeviceID]bool
	asked   []wire.DeviceID
	wait    func(wire.DeviceID) // called after the decision, before it is told
}

func (r *registry) authorize(_ context.Context, id wire.DeviceID, _ *x509.Certificate) error {
	r.mu.Lock()
	retired, wait := r.retired[id], r.wait
	r.asked = append(r.asked, id)
	r.mu.Unlock()
	if wait != nil {
		wait(id)
	}
	if retired {
		return errors.New("the device is retired")
	}
	return nil
}

func (r *registry) retire(id wire.DeviceID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retired[id] = true
}

func (r *registry) setWait(f func(wire.DeviceID)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wait = f
}

// world is an engine with everything around it.
type world struct {
	*Engine
	ca   *authority
	reg  *registry
	addr string // MQTT
	ext  *extServer
	cfg  Config
}

// bothModes runs a test against the embedded and against an external server.
func bothModes(t *testing.T, test func(t *testing.T, w *world)) {
	t.Helper()
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		test(t, embedded(t))
	})
	t.Run("external", func(t *testing.T) {
		t.Parallel()
		test(t, external(t))
	})
}

func newWorld(t testing.TB) *world {
	w := &world{ca: newAuthority(t), reg: &registry{retired: map[wire.DeviceID]bool{}}}
	w.cfg = Config{Authorize: w.reg.authorize, Log: slog.New(slog.DiscardHandler), Sync: time.Minute}
	if testing.Verbose() {
		w.cfg.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	return w
}

func embedded(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	w.cfg.Dir = t.TempDir()
	w.cfg.MQTTListen = "127.0.0.1:0"
	w.cfg.TLS = &tls.Config{Certificates: []tls.Certificate{w.ca.server(t)}, ClientCAs: w.ca.pool()}
	w.start(t)
	w.addr = w.MQTTAddr()
	return w
}

func (w *world) start(t testing.TB) {
	t.Helper()
	var err error
	w.Engine, err = Start(t.Context(), w.cfg)
	must(t, err)
	e := w.Engine
	t.Cleanup(func() { must(t, e.Close()) })
}

func external(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	var err error
	w.cfg.Secret, err = NewSecret()
	must(t, err)
	w.ext = newExtServer(t, w.ca, w.cfg.Secret)
	w.ext.start(t)
	w.cfg.URL = "tls://" + w.ext.client
	w.cfg.DialTLS = &tls.Config{RootCAs: w.ca.pool()}
	w.start(t)
	w.addr = w.ext.mqtt
	return w
}

// extServer is a stock nats-server in a child process.
type extServer struct {
	cfg          ServerConfig
	client, mqtt string
	cmd          *exec.Cmd
	stdin        io.Closer
}

func newExtServer(t testing.TB, ca *authority, secret []byte) *extServer {
	t.Helper()
	dir := t.TempDir()
	cert := ca.server(t)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	must(t, err)
	file := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	return &extServer{client: "127.0.0.1:-1", mqtt: "127.0.0.1:-1", cfg: ServerConfig{
		Secret: secret, StoreDir: filepath.Join(dir, `odd "name" \ of a store`),
		CertFile: file("server.pem", "CERTIFICATE", cert.Certificate[0]),
		KeyFile:  file("server.key", "PRIVATE KEY", key),
		CAFile:   file("ca.pem", "CERTIFICATE", ca.cert.Raw),
		Sync:     time.Minute,
	}}
}

// start runs the server, the second time at the same addresses.
func (x *extServer) start(t testing.TB) {
	t.Helper()
	x.cfg.ClientListen, x.cfg.MQTTListen = x.client, x.mqtt
	path := filepath.Join(t.TempDir(), "nats-server.conf")
	f, err := os.Create(path)
	must(t, err)
	must(t, WriteServerConfig(f, x.cfg))
	must(t, f.Close())

	x.cmd = exec.Command(os.Args[0])
	x.cmd.Env = append(os.Environ(), envServer+"="+path, "GORACE=atexit_sleep_ms=0")
	if testing.Verbose() {
		x.cmd.Stderr = os.Stderr
	}
	x.stdin, err = x.cmd.StdinPipe()
	must(t, err)
	out, err := x.cmd.StdoutPipe()
	must(t, err)
	must(t, x.cmd.Start())
	t.Cleanup(func() { x.stop() })
	line, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	var client, mqttPort int
	if _, err := fmt.Sscanf(line, "ready %d %d", &client, &mqttPort); err != nil {
		t.Fatalf("the server said %q", line)
	}
	x.client = fmt.Sprintf("127.0.0.1:%d", client)
	x.mqtt = fmt.Sprintf("127.0.0.1:%d", mqttPort)
}

func (x *extServer) stop() {
	if x.cmd == nil {
		return
	}
	x.stdin.Close()
	_ = x.cmd.Wait()
	x.cmd = nil
}

// client is a device's MQTT session.
type client struct {
	mqtt.Client
	got  chan mqtt.Message // what no subscription's own handler took
	lost chan error
	cut  func() // ends the TCP connection without a word
}

// options are what the agent uses, more or less; edit changes them.
func (w *world) options(d device, edit ...func(*mqtt.ClientOptions)) (*mqtt.ClientOptions, *client) {
	c := &client{got: make(chan mqtt.Message, 64), lost: make(chan error, 1)}
	conf := &tls.Config{RootCAs: w.ca.pool(), MinVersion: tls.VersionTLS12}
	if d.cert.Certificate != nil {
		conf.Certificates = []tls.Certificate{d.cert}
	}
	o := mqtt.NewClientOptions().AddBroker("ssl://" + w.addr).SetClientID(string(d.id)).
		SetTLSConfig(conf).SetProtocolVersion(4).SetAutoReconnect(false).SetConnectRetry(false).
		SetConnectTimeout(patience).SetPingTimeout(patience).SetOrderMatters(true)
	o.SetDefaultPublishHandler(func(_ mqtt.Client, m mqtt.Message) { c.got <- m })
	o.SetConnectionLostHandler(func(_ mqtt.Client, err error) { c.lost <- err })
	o.SetCustomOpenConnectionFn(func(u *url.URL, o mqtt.ClientOptions) (net.Conn, error) {
		raw, err := net.DialTimeout("tcp", u.Host, patience)
		if err != nil {
			return nil, err
		}
		c.cut = func() { raw.Close() }
		conf := o.TLSConfig.Clone()
		conf.ServerName = "127.0.0.1"
		conn := tls.Client(raw, conf)
		if err := conn.Handshake(); err != nil {
			raw.Close()
			return nil, err
		}
		return conn, nil
	})
	for _, f := range edit {
		f(o)
	}
	return o, c
}

func (w *world) tryConnect(d device, edit ...func(*mqtt.ClientOptions)) (*client, error) {
	o, c := w.options(d, edit...)
	c.Client = mqtt.NewClient(o)
	return c, done(c.Connect())
}

func (w *world) connect(t testing.TB, d device, edit ...func(*mqtt.ClientOptions)) *client {
	t.Helper()
	c, err := w.tryConnect(d, edit...)
	must(t, err)
	t.Cleanup(func() { c.Disconnect(0) })
	return c
}

func (c *client) publish(t testing.TB, topic string, qos byte, retained bool, payload []byte) {
	t.Helper()
	must(t, done(c.Publish(topic, qos, retained, payload)))
}

// subscribe returns the code that the server answers with.
func (c *client) subscribe(t testing.TB, filter string, qos byte) byte {
	t.Helper()
	tok := c.Subscribe(filter, qos, nil).(*mqtt.SubscribeToken)
	if !tok.WaitTimeout(patience) {
		t.Fatalf("no answer to a subscription of %s", filter)
	}
	code, ok := tok.Result()[filter]
	if !ok {
		t.Fatalf("no result for %s: %v", filter, tok.Error())
	}
	return code
}

func done(tok mqtt.Token) error {
	if !tok.WaitTimeout(patience) {
		return errors.New("the MQTT client got no answer")
	}
	return tok.Error()
}

// listen collects what arrives on a subject at nc.
func listen(t testing.TB, nc *nats.Conn, subject string) chan *nats.Msg {
	t.Helper()
	ch := make(chan *nats.Msg, 1024)
	sub, err := nc.ChanSubscribe(subject, ch)
	must(t, err)
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	must(t, nc.FlushTimeout(patience))
	return ch
}

func next[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantSentence checks that an error tells a person what is wrong.
func wantSentence(t testing.TB, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not say %q: %v", w, err)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("the error is more than a sentence: %v", err)
	}
}
