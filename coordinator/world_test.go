package coordinator

import (
	"bytes"
	"context"
	"crypto/ed25519"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// patience is how long tests wait for what must come, on a machine that has much
// else to do. It is no measurement.
const patience = 2 * time.Minute

// world is a running coordinator with its operator.
type world struct {
	*Coordinator
	dir string
	op  *api.Client
	// said is what it logged, unless that goes to standard error.
	said lines
	// skew is added to the coordinator's clock.
	skew *atomic.Int64
	// frozen is where that clock stands still; nil while it runs.
	frozen *atomic.Pointer[time.Time]
}

// freeze stops the coordinator's clock: on a busy machine nothing comes due.
func (w *world) freeze() {
	now := time.Now()
	w.frozen.Store(&now)
}

func (w *world) time() time.Time {
	now := time.Now()
	if f := w.frozen.Load(); f != nil {
		now = *f
	}
	return now.Add(time.Duration(w.skew.Load()))
}

func (w *world) advance(d time.Duration) { w.skew.Add(int64(d)) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// toyCompute stands for an engine: what a module makes of its input.
func toyCompute(_ context.Context, module []byte, args []string, input []byte) ([]byte, error) {
	if bytes.HasPrefix(module, []byte("broken")) {
		return nil, errors.New("it does not run")
	}
	h := sha256.New()
	for _, p := range [][]byte{module, []byte(strings.Join(args, " ")), input} {
		fmt.Fprintf(h, "%d ", len(p))
		h.Write(p)
	}
	return fmt.Appendf(nil, "%x\n", h.Sum(nil)), nil
}

// Engines, as devices and coordinators say them; the tests' devices are arm64.
const (
	toyOnDevices   = "wazero/1.12.0 compiler arm64"
	toyInterpreted = "wazero/1.12.0 interpreter arm64"
	toyElsewhere   = "wazero/1.12.0 compiler amd64"
)

// toyEngine runs a job from standard input to standard output.
func toyEngine(ctx context.Context, j ComputeJob) (ComputeResult, error) {
	out, err := toyCompute(ctx, j.Module, j.Args, j.Input)
	return ComputeResult{Output: out}, err
}

func testConfig(dir string) Config {
	return Config{Dir: dir, Listen: "127.0.0.1:0", MQTT: "127.0.0.1:0", Compute: toyEngine, Engine: toyOnDevices, ackHold: time.Millisecond, serve: patience / 4}
}

// open starts a coordinator in dir; the caller closes it.
func open(t testing.TB, dir string) *world {
	t.Helper()
	return openWith(t, dir, func(*Config) {})
}

// openWith is open with a configuration of its own.
func openWith(t testing.TB, dir string, edit func(*Config)) *world {
	t.Helper()
	w := &world{dir: dir, skew: new(atomic.Int64), frozen: new(atomic.Pointer[time.Time])}
	cfg := testConfig(dir)
	cfg.now = w.time
	cfg.Log = slog.New(slog.NewTextHandler(&w.said, nil))
	if os.Getenv("DEIMOS_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	edit(&cfg)
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	var err error
	w.Coordinator, err = Start(ctx, cfg)
	must(t, err)
	at, err := api.LoadContext(filepath.Join(dir, ContextFile))
	must(t, err)
	w.op, err = api.NewClient(at)
	must(t, err)
	return w
}

// ownWorld is a coordinator for one test.
func ownWorld(t testing.TB) *world {
	t.Helper()
	w := open(t, t.TempDir())
	t.Cleanup(w.Close)
	return w
}

// shared are coordinators that tests have one after the other.
var shared struct {
	sync.Mutex
	idle []*world
}

// aWorld is a coordinator that no other test has at the same time, and others had
// before and will have after. Each brings its own devices, which are gone when it ends.
func aWorld(t testing.TB) *world {
	t.Helper()
	shared.Lock()
	var w *world
	if n := len(shared.idle); n > 0 {
		w, shared.idle = shared.idle[n-1], shared.idle[:n-1]
	}
	shared.Unlock()
	if w == nil {
		dir, err := os.MkdirTemp("", "coordinator")
		must(t, err)
		w = open(t, dir)
	}
	t.Cleanup(func() {
		shared.Lock()
		defer shared.Unlock()
		shared.idle = append(shared.idle, w)
	})
	return w
}

// closeShared ends the coordinators that no test has now.
func closeShared() {
	shared.Lock()
	defer shared.Unlock()
	for _, w := range shared.idle {
		w.Close()
		os.RemoveAll(w.dir)
	}
	shared.idle = nil
}

// besides is how many tests run at the same time: most of what they do is to wait.
const besides = "4"

func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", besides); err != nil { // -parallel is read later, and goes before
		panic(err)
	}
	code := m.Run()
	closeShared()
	os.Exit(code)
}

// reply is what a device has to say about an order; nil is silence.
type reply struct {
	state      wire.State
	code       string
	body       any
	attachment []byte
	bulk       bool  // put the attachment over HTTPS
	withhold   bool  // sign for the attachment and do not send it
	retry      int64 // seconds until it may be asked again
}

// device is a simulated device: real keys, real enrolment, real MQTT and HTTPS
// over mutual TLS. It is honest unless told otherwise.
type device struct {
	t    testing.TB
	w    *world
	id   wire.DeviceID
	key  ed25519.PrivateKey
	tls  *tls.Config
	http *http.Client
	mqtt mqtt.Client

	capacity int64
	agent    string // the version that it runs; of who holds mu
	session  string
	welcomes chan wire.Welcome
	acks     chan wire.Ack
	orders   chan wire.Order // each delivery, repeats included
	work     sync.WaitGroup

	mu     sync.Mutex
	gone   bool // it has hung up, and takes nothing in any more
	chunks map[string][]byte
	odd    map[wire.Kind]func(wire.Order) *reply
	done   map[string][]byte // order → its sealed terminal report
	busy   map[string]bool
	seq    uint64
}

func newKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	must(t, err)
	return key
}

func csr(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(crand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "device"}}, key)
	must(t, err)
	return der
}

func (w *world) newToken(t testing.TB, r api.TokenRequest) string {
	t.Helper()
	tok, err := w.op.CreateToken(testContext(t), r)
	must(t, err)
	return tok.Token
}

// plain is an HTTPS client that knows the coordinator and shows cert, if any.
func (w *world) plain(cert *tls.Certificate) *http.Client {
	c := &tls.Config{RootCAs: w.auth.pool(), MinVersion: tls.VersionTLS13}
	if cert != nil {
		c.Certificates = []tls.Certificate{*cert}
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}, Timeout: patience}
}

// postEnrol makes the enrolment call and gives status, answer and refusal.
func (w *world) postEnrol(t testing.TB, q wire.EnrolRequest) (int, wire.EnrolReply, wire.APIError) {
	t.Helper()
	raw, err := json.Marshal(q)
	must(t, err)
	resp, err := w.plain(nil).Post(w.URL()+"/enrol/v1", "application/json", bytes.NewReader(raw))
	must(t, err)
	defer resp.Body.Close()
	raw, err = io.ReadAll(resp.Body)
	must(t, err)
	var ok wire.EnrolReply
	var bad wire.APIError
	if resp.StatusCode == http.StatusOK {
		must(t, json.Unmarshal(raw, &ok))
	} else {
		must(t, json.Unmarshal(raw, &bad))
	}
	return resp.StatusCode, ok, bad
}

// enrolled is a device that belongs to the fleet and is not connected.
func (w *world) enrolled(t testing.TB) *device {
	t.Helper()
	d := &device{t: t, w: w, key: newKey(t), capacity: 1 << 30, agent: "1.0.0",
		welcomes: make(chan wire.Welcome, 64), acks: make(chan wire.Ack, 1024), orders: make(chan wire.Order, 1024),
		chunks: map[string][]byte{}, odd: map[wire.Kind]func(wire.Order) *reply{}, done: map[string][]byte{}, busy: map[string]bool{}}
	status, m, refused := w.postEnrol(t, wire.EnrolRequest{
		CSR: csr(t, d.key), Token: w.newToken(t, api.TokenRequest{}), Agent: "1.0.0", OS: "linux", Arch: "arm64", Board: "test"})
	if status != http.StatusOK {
		t.Fatalf("enrolment: %d %s", status, refused.Reason)
	}
	d.id = m.Device
	block, _ := pem.Decode(m.Certificate)
	cert := tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: d.key}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(m.CA)
	d.tls = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, Certificates: []tls.Certificate{cert}}
	d.http = &http.Client{Transport: &http.Transport{TLSClientConfig: d.tls.Clone(), MaxIdleConnsPerHost: 4}, Timeout: patience}
	t.Cleanup(d.http.CloseIdleConnections)
	return d
}

// device is one that is online.
func (w *world) device(t testing.TB) *device {
	t.Helper()
	d := w.enrolled(t)
	d.connect(w)
	t.Cleanup(d.leave)
	return d
}

func (w *world) devices(t testing.TB, n int) []*device {
	t.Helper()
	out := make([]*device, n)
	for i := range out {
		out[i] = w.device(t)
	}
	return out
}

// connect says hello and waits for the welcome.
func (d *device) connect(w *world) {
	d.t.Helper()
	if d.mqtt != nil {
		d.hangUp(0) // of a coordinator that was closed, or of one that goes on
	}
	d.mu.Lock()
	d.w, d.gone = w, false
	d.mu.Unlock()
	d.session = newNonce()
	d.mqtt = mqtt.NewClient(mqtt.NewClientOptions().AddBroker("ssl://localhost:" + w.Broker()).SetClientID(string(d.id)).
		SetTLSConfig(d.tls.Clone()).SetCleanSession(true).SetAutoReconnect(false).SetConnectTimeout(patience).
		SetKeepAlive(patience).SetPingTimeout(patience)) // a machine that stands still for ten seconds cuts no line
	d.token(d.mqtt.Connect())
	d.token(d.mqtt.Subscribe(wire.Topic(d.id, wire.ChannelOrder), 0, func(_ mqtt.Client, m mqtt.Message) { d.take(m.Payload()) }))
	d.hello()
}

func (d *device) hello() {
	d.t.Helper()
	nonce := newNonce()
	d.mu.Lock()
	agent := d.agent
	d.mu.Unlock()
	d.say(wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: nonce,
		Agent: agent, OS: "linux", Arch: "arm64", Board: "test", Capacity: d.capacity})
	for {
		if got := next(d.t, d.welcomes, "the welcome"); got.Nonce == nonce && got.Device == d.id {
			return
		}
	}
}

// leave goes offline in good order.
func (d *device) leave() {
	if d.mqtt == nil || !d.mqtt.IsConnected() {
		return
	}
	if d.w.life.Err() != nil { // the coordinator was first to go
		d.hangUp(0)
		return
	}
	raw, err := wire.Seal(d.key, wire.TypePresence, wire.Presence{Device: d.id, Session: d.session, Nonce: newNonce()})
	must(d.t, err)
	tok := d.mqtt.Publish(wire.Topic(d.id, wire.ChannelPresence), 0, false, raw)
	if !tok.WaitTimeout(patience) {
		d.t.Fatal("the broker does not answer")
	}
	if tok.Error() != nil { // it was retired, and is thrown out in this moment
		d.hangUp(0)
		return
	}
	eventually(d.t, "the device is offline", func() bool { return !d.w.reg.online(d.id) })
	d.hangUp(50)
}

// hangUp ends the connection, within some milliseconds, and all work. The MQTT client
// may still give out messages after that.
func (d *device) hangUp(quiesce uint) {
	d.mqtt.Disconnect(quiesce)
	d.mu.Lock()
	d.gone = true
	d.mu.Unlock()
	d.work.Wait()
}

func newNonce() string {
	b := make([]byte, 16)
	crand.Read(b)
	return hex.EncodeToString(b)
}

func (d *device) token(tok mqtt.Token) {
	d.t.Helper()
	if !tok.WaitTimeout(patience) {
		d.t.Fatal("the broker does not answer")
	}
	must(d.t, tok.Error())
}

func (d *device) say(ch wire.Channel, typ wire.PayloadType, v any) {
	d.t.Helper()
	raw, err := wire.Seal(d.key, typ, v)
	must(d.t, err)
	d.publish(ch, raw)
}

func (d *device) publish(ch wire.Channel, raw []byte) {
	d.t.Helper()
	d.token(d.mqtt.Publish(wire.Topic(d.id, ch), 0, false, raw))
}

func (d *device) take(raw []byte) {
	d.mu.Lock()
	w, gone := d.w, d.gone
	d.mu.Unlock()
	if gone {
		return
	}
	typ, payload, err := wire.Open(raw, w.auth.orderKey.Public().(ed25519.PublicKey))
	if err != nil {
		d.t.Errorf("the coordinator sent what it did not sign: %v", err)
		return
	}
	switch typ {
	case wire.TypeWelcome:
		var v wire.Welcome
		_ = json.Unmarshal(payload, &v)
		d.welcomes <- v
	case wire.TypeAck:
		var v wire.Ack
		_ = json.Unmarshal(payload, &v)
		passOn(d.acks, v)
	case wire.TypeOrder:
		var o wire.Order
		_ = json.Unmarshal(payload, &o)
		passOn(d.orders, o)
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.gone {
			d.work.Go(func() { d.carryOut(o) })
		}
	}
}

// passOn keeps what a test may ask for. A device that no test watches goes on when it has kept all
// that it can.
func passOn[T any](c chan<- T, v T) {
	select {
	case c <- v:
	default:
	}
}

// on makes a device do something else than what is right; nil makes it honest again.
func (d *device) on(k wire.Kind, f func(wire.Order) *reply) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.odd[k] = f
}

func silent(wire.Order) *reply { return nil }

func (d *device) holds(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, ok := d.chunks[id]
	return ok
}

// carryOut does an order once, and answers repeats from memory.
func (d *device) carryOut(o wire.Order) {
	d.mu.Lock()
	old, odd, busy := d.done[o.ID], d.odd[o.Kind], d.busy[o.ID]
	d.busy[o.ID] = true
	d.mu.Unlock()
	if busy && old == nil {
		return
	}
	defer func() {
		d.mu.Lock()
		delete(d.busy, o.ID)
		d.mu.Unlock()
	}()
	if old != nil {
		d.mqtt.Publish(wire.Topic(d.id, wire.ChannelReport), 0, false, old)
		return
	}
	if odd == nil {
		odd = d.honest
	}
	r := odd(o)
	if r == nil {
		return
	}
	raw, err := wire.Seal(d.key, wire.TypeReport, d.report(o, r))
	if err != nil {
		d.t.Errorf("seal: %v", err)
		return
	}
	d.mu.Lock()
	d.done[o.ID] = raw
	d.mu.Unlock()
	d.mqtt.Publish(wire.Topic(d.id, wire.ChannelReport), 0, false, raw)
}

// report makes the report of a reply, with what has to be uploaded for it.
func (d *device) report(o wire.Order, r *reply) wire.Report {
	d.mu.Lock()
	d.seq++
	rep := wire.Report{Order: o.ID, Device: d.id, Seq: d.seq, State: r.state, Code: r.code, RetrySeconds: r.retry, At: time.Now()}
	d.mu.Unlock()
	if r.code != "" {
		rep.Reason = "it is so (" + r.code + ")"
	}
	if r.body != nil {
		rep.Body, _ = json.Marshal(r.body)
	}
	if r.attachment != nil {
		sum := sha256.Sum256(r.attachment)
		rep.Attachment = &wire.Attachment{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(r.attachment))}
		switch {
		case r.withhold:
		case r.bulk || len(r.attachment) > wire.MaxInline:
			if status, reason := d.transfer(http.MethodPut, "/data/v1/attachment/"+o.ID, r.attachment); status != http.StatusNoContent {
				d.t.Errorf("attachment of %s: %d %s", o.ID, status, reason)
			}
		default:
			rep.Attachment.Inline = r.attachment
		}
	}
	return rep
}

// transfer calls the data plane and gives status and body; 0 when the coordinator is
// closed meanwhile.
func (d *device) transfer(method, path string, body []byte) (int, string) {
	d.t.Helper()
	w := d.w
	status, answer, err := tryCall(d.http, method, w.URL()+path, bytes.NewReader(body))
	if err != nil && w.storage.life.Err() == nil {
		d.t.Error(err)
	}
	return status, answer
}

func call(t testing.TB, c *http.Client, method, url string, body io.Reader) (int, string) {
	t.Helper()
	status, answer, err := tryCall(c, method, url, body)
	if err != nil {
		t.Error(err)
	}
	return status, answer
}

func tryCall(c *http.Client, method, url string, body io.Reader) (int, string, error) {
	req, err := http.NewRequest(method, url, body)
	if err != nil {
		return 0, "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(raw), nil
}

func failed(code string) *reply { return &reply{state: wire.Failed, code: code} }

// honest does what a good device does.
func (d *device) honest(o wire.Order) *reply {
	switch o.Kind {
	case wire.KindChunkStore:
		b, _ := wire.DecodeBody[wire.ChunkStore](o)
		status, data := d.transfer(http.MethodGet, b.URL, nil)
		if status != http.StatusOK || chunk.Sum([]byte(data)).String() != b.ID || int64(len(data)) != b.Size {
			return failed(wire.CodeTransfer)
		}
		d.mu.Lock()
		d.chunks[b.ID] = []byte(data)
		d.mu.Unlock()
		return &reply{state: wire.Succeeded, body: wire.Receipt{ID: b.ID, Size: b.Size, Volume: "v1"}}
	case wire.KindChunkServe:
		b, _ := wire.DecodeBody[wire.ChunkServe](o)
		d.mu.Lock()
		data, ok := d.chunks[b.ID]
		d.mu.Unlock()
		if !ok {
			return failed(wire.CodeNotFound)
		}
		if status, _ := d.transfer(http.MethodPut, b.URL, data); status != http.StatusNoContent {
			return failed(wire.CodeTransfer)
		}
		return &reply{state: wire.Succeeded}
	case wire.KindChunkDrop:
		b, _ := wire.DecodeBody[wire.ChunkDrop](o)
		d.mu.Lock()
		for _, id := range b.IDs {
			delete(d.chunks, id)
		}
		d.mu.Unlock()
		return &reply{state: wire.Succeeded}
	case wire.KindChunkHoldings:
		b, _ := wire.DecodeBody[wire.ChunkHoldings](o)
		d.mu.Lock()
		defer d.mu.Unlock()
		var holds wire.Holdings
		ids := []string{}
		for id, data := range d.chunks {
			if holds.Count, holds.Bytes = holds.Count+1, holds.Bytes+int64(len(data)); id > b.After {
				ids = append(ids, id)
			}
		}
		slices.Sort(ids)
		ids = ids[:min(len(ids), wire.MaxHoldings)]
		raw, _ := json.Marshal(ids)
		return &reply{state: wire.Succeeded, body: holds, attachment: raw}
	case wire.KindAudit:
		return d.prove(o, nil)
	case wire.KindJobRun:
		return d.compute(o, nil)
	}
	return &reply{state: wire.Rejected, code: wire.CodeUnknownKind}
}

// send has a device run a module over a chunk that it holds.
func (c *compute) send(ctx context.Context, d wire.DeviceID, module string, args []string, input string, limits wire.JobLimits) (wire.Order, error) {
	v, err := c.sendAs(ctx, "", ulid.Make().String(), d, module, wire.JobRun{Args: args, Input: input, Limits: limits}, lifeOfJob(limits))
	return v.Order, err
}

// prove answers an audit; bend, if not nil, may change the answer and its leaves.
func (d *device) prove(o wire.Order, bend func(a *wire.AuditAnswer, l []wire.AuditLeaf) []wire.AuditLeaf) *reply {
	b, _ := wire.DecodeBody[wire.Audit](o)
	ans := wire.AuditAnswer{Nonce: b.Nonce}
	leaves := make([]wire.AuditLeaf, len(b.Items))
	d.mu.Lock()
	have := maps.Clone(d.chunks)
	d.mu.Unlock()
	for i, it := range b.Items {
		leaves[i] = wire.AuditLeaf{Chunk: it.Chunk, Leaf: it.Leaf}
		data, ok := have[it.Chunk]
		if !ok {
			leaves[i].Lost = true
			continue
		}
		leaves[i].Data, leaves[i].Path, _ = chunk.Prove(data, it.Leaf)
	}
	if bend != nil {
		leaves = bend(&ans, leaves)
	}
	raw, _ := json.Marshal(leaves)
	return &reply{state: wire.Succeeded, body: ans, attachment: raw}
}

// compute answers a job; bend, if not nil, may change result and output.
func (d *device) compute(o wire.Order, bend func(r *wire.JobResult, output []byte) []byte) *reply {
	b, _ := wire.DecodeBody[wire.JobRun](o)
	status, module := d.transfer(http.MethodGet, b.Module.URL, nil)
	d.mu.Lock()
	input, ok := d.chunks[b.Input]
	d.mu.Unlock()
	if status != http.StatusOK || !ok && b.Input != "" {
		return failed(wire.CodeTransfer)
	}
	out, _ := toyCompute(context.Background(), []byte(module), b.Args, input)
	sum := sha256.Sum256(out)
	r := wire.JobResult{Module: b.Module.SHA256, Input: b.Input, Output: hex.EncodeToString(sum[:]), OutputBytes: int64(len(out)), Engine: toyOnDevices}
	if bend != nil {
		out = bend(&r, out)
	}
	return &reply{state: wire.Succeeded, body: r, attachment: out}
}

// next takes the next value of a channel, or ends the test.
func next[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s did not come", what)
		panic("unreachable")
	}
}

// eventually waits for what nobody announces.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("this did not come true: %s", what)
		}
	}
}

// someBytes are different at every call.
func someBytes(n int) []byte {
	b := make([]byte, n)
	crand.Read(b)
	return b
}

// putFile stores one chunk of n bytes as an object on replicas devices.
func (w *world) putFile(t testing.TB, name string, data []byte, replicas int) api.Object {
	t.Helper()
	o, err := w.tryPutFile(testContext(t), name, data, replicas)
	must(t, err)
	return o
}

func (w *world) tryPutFile(ctx context.Context, name string, data []byte, replicas int) (api.Object, error) {
	id := chunk.Sum(data).String()
	if _, err := w.op.PutChunk(ctx, id, data, replicas); err != nil {
		return api.Object{}, err
	}
	sum := sha256.Sum256(data)
	return w.op.PutObject(ctx, api.Object{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:]),
		Chunks: []api.Chunk{{ID: id, Size: int64(len(data))}}})
}

// wantRefusal checks an answer of the API.
func wantRefusal(t testing.TB, err error, status int, code string) {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) {
		t.Errorf("got %v, want a refusal %d %s", err, status, code)
		return
	}
	if e.Status != status || e.Code != code {
		t.Errorf("got %d %s (%s), want %d %s", e.Status, e.Code, e.Reason, status, code)
	}
	if !strings.Contains(e.Reason, " ") {
		t.Errorf("%q is no sentence", e.Reason)
	}
}

func (d *device) pub() ed25519.PublicKey { return d.key.Public().(ed25519.PublicKey) }
