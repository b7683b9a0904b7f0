package test

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// evilBroker stands between one agent and the fleet's broker: it ends the
// device's mutual TLS with a certificate of the fleet's authority, is the device
// towards the real broker, and does to the messages of both directions whatever
// a broker can that cannot sign. What it sees is noted before it is hurt, so
// that it is also the witness of what a device said it did.
type evilBroker struct {
	f      *fleet
	d      *device
	listen net.Listener
	inner  *tls.Config // towards the real broker, as the device

	mu     sync.Mutex
	rng    *rand.Rand
	faults faults
	ends   [2]net.Conn // where a direction's messages go now; nil while there is no connection
	past   [2][]*packets.PublishPacket
	did    map[string]int
	closed bool

	wg      sync.WaitGroup // connections and messages that are under way
	reports [][]byte       // every report of the device, in the order it was sent
	orders  map[string]int // how often each order was handed to the device
}

type direction int

const (
	up   direction = iota // from the device
	down                  // to it
)

// faults are probabilities for each message, and the longest delay.
type faults struct {
	drop, repeat, late, replay, cut float64
	delay                           time.Duration
}

// interpose puts an evil broker before a device that is enrolled. The agent is
// restarted with the other address in its membership.
func interpose(d *device, seed uint64) *evilBroker {
	f := d.f
	f.T.Helper()
	d.stop()
	b := &evilBroker{f: f, d: d, rng: rand.New(rand.NewPCG(seed, 1)), did: map[string]int{}, orders: map[string]int{}}
	var m wire.EnrolReply
	if err := json.Unmarshal(readFile(f.T, d.state("identity", "membership.json")), &m); err != nil {
		f.T.Fatal(err)
	}
	cert, _ := pem.Decode(m.Certificate)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(m.CA)
	b.inner = &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", Certificates: []tls.Certificate{{
		Certificate: [][]byte{cert.Bytes}, PrivateKey: readKey(f.T, d.state("identity", "key.pem")),
	}}}
	var err error
	if b.listen, err = tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert, Certificates: []tls.Certificate{f.brokerCertificate()},
	}); err != nil {
		f.T.Fatal(err)
	}
	b.wg.Go(b.serve)
	f.T.Cleanup(b.close)
	d.reach(func(m map[string]any) { m["brokers"] = []string{"ssl://" + b.listen.Addr().String()} })
	d.start()
	d.awaitOnline()
	return b
}

// reach changes the addresses in a stopped device's membership.
func (d *device) reach(edit func(map[string]any)) {
	d.f.T.Helper()
	path := d.state("identity", "membership.json")
	var m map[string]any
	if err := json.Unmarshal(readFile(d.f.T, path), &m); err != nil {
		d.f.T.Fatal(err)
	}
	edit(m)
	raw, err := json.Marshal(m)
	if err != nil {
		d.f.T.Fatal(err)
	}
	overwrite(d.f.T, path, raw)
}

// brokerCertificate is one that devices believe: this broker is the fleet's own,
// gone bad.
func (f *fleet) brokerCertificate() tls.Certificate {
	f.T.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		f.T.Fatal(err)
	}
	return f.certify(key, x509.Certificate{Subject: pkix.Name{CommonName: "evil"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
}

// certify signs with the fleet's authority, which only somebody has who reads
// the coordinator's disk. Without times the certificate is good for this hour.
func (f *fleet) certify(key crypto.Signer, t x509.Certificate) tls.Certificate {
	f.T.Helper()
	ca, _ := pem.Decode(readFile(f.T, f.Path("coordinator", "keys", "ca.pem")))
	issuer, err := x509.ParseCertificate(ca.Bytes)
	if err != nil {
		f.T.Fatal(err)
	}
	block, _ := pem.Decode(readFile(f.T, f.Path("coordinator", "keys", "ca.key")))
	caKey, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		f.T.Fatal(err)
	}
	t.SerialNumber = big.NewInt(666)
	if t.NotAfter.IsZero() {
		t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	der, err := x509.CreateCertificate(crand.Reader, &t, issuer, key.Public(), caKey)
	if err != nil {
		f.T.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, issuer.Raw}, PrivateKey: key}
}

func (b *evilBroker) serve() {
	for {
		c, err := b.listen.Accept()
		if err != nil {
			return
		}
		b.wg.Go(func() { b.relay(c) })
	}
}

// handshakeLimit is how long a device may take until its first packet: the time
// that the fleet's broker gives to TLS, and then for the packet.
const handshakeLimit = 15 * time.Second

// relay carries one connection of the device.
func (b *evilBroker) relay(device net.Conn) {
	defer device.Close()
	_ = device.SetReadDeadline(time.Now().Add(handshakeLimit))
	hello, err := packets.ReadPacket(device)
	if err != nil {
		return // the device has gone, or does not get through
	}
	_ = device.SetReadDeadline(time.Time{})
	broker, err := tls.Dial("tcp", b.f.MQTT, b.inner)
	if err != nil {
		return // the real one is away
	}
	defer broker.Close()
	if hello.Write(broker) != nil {
		return
	}
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return
	}
	b.ends = [2]net.Conn{up: broker, down: device}
	b.mu.Unlock()
	var both sync.WaitGroup
	for dir, from := range map[direction]net.Conn{up: device, down: broker} {
		both.Go(func() {
			defer device.Close()
			defer broker.Close()
			for {
				p, err := packets.ReadPacket(from)
				if err != nil || !b.pass(dir, p) {
					return
				}
			}
		})
	}
	both.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ends[down] == device {
		b.ends = [2]net.Conn{}
	}
}

// pass hands a packet on, or does something else to it. It is false if the
// connection has to end.
func (b *evilBroker) pass(dir direction, p packets.ControlPacket) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	msg, ok := p.(*packets.PublishPacket)
	if !ok {
		return b.write(dir, p)
	}
	b.witness(dir, msg)
	b.past[dir] = append(b.past[dir], msg)
	fa := b.faults
	if b.roll("replay", fa.replay) { // anything that ever went this way
		b.later(dir, b.past[dir][b.rng.IntN(len(b.past[dir]))], fa.delay)
	}
	if b.roll("cut", fa.cut) {
		return false
	}
	if b.roll("drop", fa.drop) {
		return true
	}
	if b.roll("repeat", fa.repeat) {
		b.later(dir, msg, fa.delay)
	}
	if b.roll("late", fa.late) { // and so behind others
		b.later(dir, msg, fa.delay)
		return true
	}
	return b.write(dir, msg)
}

func (b *evilBroker) roll(what string, chance float64) bool {
	if b.rng.Float64() >= chance {
		return false
	}
	b.did[what]++
	return true
}

// later sends a message after a while, over whatever connection there is then.
func (b *evilBroker) later(dir direction, p packets.ControlPacket, most time.Duration) {
	wait := time.Duration(b.rng.Int64N(int64(most) + 1))
	b.wg.Add(1)
	time.AfterFunc(wait, func() {
		defer b.wg.Done()
		b.mu.Lock()
		defer b.mu.Unlock()
		b.write(dir, p)
	})
}

// write sends a packet. b.mu is held, so that packets do not mix.
func (b *evilBroker) write(dir direction, p packets.ControlPacket) bool {
	to := b.ends[dir]
	if to == nil {
		return false
	}
	_ = to.SetWriteDeadline(time.Now().Add(testbed.StopLimit)) // a dead peer ends with its reader
	return p.Write(to) == nil
}

// witness notes what the device says and is told.
func (b *evilBroker) witness(dir direction, p *packets.PublishPacket) {
	var env struct {
		PayloadType wire.PayloadType
		Payload     []byte
	}
	if json.Unmarshal(p.Payload, &env) != nil {
		return
	}
	switch {
	case dir == up && env.PayloadType == wire.TypeReport:
		b.reports = append(b.reports, p.Payload)
	case dir == down && env.PayloadType == wire.TypeOrder:
		var o wire.Order
		if json.Unmarshal(env.Payload, &o) == nil {
			b.orders[o.ID]++
		}
	}
}

func (b *evilBroker) behave(fa faults) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faults = fa
}

// replayAll plays everything that ever went to the device once more, in a random
// order: orders, acknowledgements, welcomes.
func (b *evilBroker) replayAll() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := slices.Clone(b.past[down])
	b.rng.Shuffle(len(old), func(i, j int) { old[i], old[j] = old[j], old[i] })
	for _, p := range old {
		b.write(down, p)
	}
	return len(old)
}

func (b *evilBroker) close() {
	b.listen.Close()
	b.mu.Lock()
	b.closed = true
	for _, c := range b.ends {
		if c != nil {
			c.Close()
		}
	}
	b.mu.Unlock()
	b.wg.Wait()
}

// awaitEnds waits until the device has ended every order that it was handed.
func (b *evilBroker) awaitEnds() {
	b.f.T.Helper()
	b.f.Until(b.d.name+" ending all of its orders", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		open := len(b.orders)
		for order := range b.orders {
			if slices.ContainsFunc(b.reports, func(raw []byte) bool { return endOf(raw) == order }) {
				open--
			}
		}
		return open == 0
	})
}

// endOf is the order that a sealed report ends; empty if it ends none.
func endOf(raw []byte) string {
	var env struct{ Payload []byte }
	var r wire.Report
	if json.Unmarshal(raw, &env) != nil || json.Unmarshal(env.Payload, &r) != nil || !r.State.Terminal() {
		return ""
	}
	return r.Order
}

// checkOnceEach reads what the device has signed: each order was begun once, in
// one life of the agent, and ended in one report, the same bytes each time. It
// returns how many orders ended and how many of them were told twice.
func (b *evilBroker) checkOnceEach(t *testing.T) (ended, repeated int) {
	t.Helper()
	key := ed25519.PublicKey(b.d.now().PublicKey)
	b.mu.Lock()
	defer b.mu.Unlock()
	terminal := map[string][]byte{}
	began := map[string]map[uint64]bool{}
	for _, raw := range b.reports {
		r, err := wire.OpenAs[wire.Report](raw, key, wire.TypeReport)
		if err != nil {
			t.Fatalf("%s signed something else than a report: %v", b.d.name, err)
		}
		switch {
		case r.Code == wire.CodeExpired: // not done, and answered anew each time
		case r.State.Terminal():
			if old := terminal[r.Order]; old != nil && !bytes.Equal(old, raw) {
				t.Errorf("%s ended order %s twice:\n%s\n%s", b.d.name, r.Order, old, raw)
			}
			terminal[r.Order] = raw
		case r.State == wire.Running && r.Progress == 0:
			if began[r.Order] == nil {
				began[r.Order] = map[uint64]bool{}
			}
			began[r.Order][r.Seq] = true
		}
	}
	for order, seqs := range began {
		if len(seqs) > 1 {
			t.Errorf("%s began order %s %d times", b.d.name, order, len(seqs))
		}
	}
	for order, n := range b.orders {
		if terminal[order] != nil {
			ended++
			if n > 1 {
				repeated++
			}
		}
	}
	return ended, repeated
}

// TestEvilBrokerCanOnlyDelay: brokers that drop a fifth of all messages, repeat a
// fifth, swap, delay, replay old ones and cut connections make work slow. All of
// it ends, each piece is done once, and what is stored is what was stored.
func TestEvilBrokerCanOnlyDelay(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := testbed.Seeded(t)
	f.enrol(3, false)
	var evil []*evilBroker
	for _, d := range f.devices {
		evil = append(evil, interpose(d, rng.Uint64()))
	}
	bad := faults{drop: 0.2, repeat: 0.2, late: 0.3, replay: 0.1, cut: 0.005, delay: 3 * time.Second}
	for _, b := range evil {
		b.behave(bad)
	}

	const objects, chunks = 6, 4
	contents := make([][]byte, objects)
	for i := range contents {
		contents[i] = testbed.RandomText(rng, chunks*(1000+rng.IntN(30_000)))
	}
	placed := make(chan api.Placement, objects*chunks)
	var users sync.WaitGroup
	for i := range contents {
		users.Go(func() { f.storeInChunks(fmt.Sprint("object-", i), contents[i], chunks, placed) })
	}
	users.Wait()
	close(placed)
	if t.Failed() {
		return
	}
	// Challenges and jobs, side by side.
	for i := range contents {
		users.Go(func() { f.jobInTheEnd(testbed.Guest("sha256sum"), fmt.Sprint("object-", i), i%chunks) })
	}
	for _, d := range f.devices {
		users.Go(func() { d.provesInTheEnd() })
	}
	users.Wait()
	if t.Failed() {
		return
	}

	// Half of the objects go, one of them comes again: its drop orders, played
	// once more, must not take it.
	gone := rng.Perm(objects)[:objects/2]
	for _, i := range gone {
		f.OK(nil, "object", "rm", fmt.Sprint("object-", i))
	}
	back := gone[0]
	again := make(chan api.Placement, chunks)
	f.storeInChunks(fmt.Sprint("object-", back), contents[back], chunks, again)
	close(again)

	for _, b := range evil {
		b.behave(faults{})
	}
	f.checkAllOrdersEnd()
	for _, d := range f.devices {
		d.awaitOnline()
	}
	kept := func(i int) bool { return i == back || !slices.Contains(gone, i) }
	wanted := map[string]bool{}
	for i := range contents {
		if kept(i) {
			o, err := f.Client.Object(f.Ctx, fmt.Sprint("object-", i))
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range o.Chunks {
				wanted[c.ID] = true
			}
		}
	}
	replayed := 0
	for _, b := range evil {
		replayed += b.replayAll()
	}
	// The fence: a challenge of each device is behind everything replayed.
	for _, d := range f.devices {
		d.checkStorage()
	}
	for i, want := range contents {
		name := fmt.Sprint("object-", i)
		if kept(i) {
			f.CheckGet(name, want)
		} else {
			f.Fails(nil, 1, "object", "get", "--plain", name, "--out", f.Path("nothing"))
		}
	}
	ended, repeated := 0, 0
	for _, b := range evil {
		n, r := b.checkOnceEach(t)
		ended, repeated = ended+n, repeated+r
		b.mu.Lock()
		t.Logf("%s: %d messages up, %d down; %v", b.d.name, len(b.past[up]), len(b.past[down]), b.did)
		for _, what := range []string{"drop", "repeat", "late", "replay"} {
			if b.did[what] == 0 {
				t.Errorf("the broker of %s did no %s: nothing was shown", b.d.name, what)
			}
		}
		b.mu.Unlock()
	}
	t.Logf("%d orders ended, %d of them were sent more than once; %d messages were replayed at the end", ended, repeated, replayed)
	if ended < objects*chunks*2 || repeated == 0 {
		t.Errorf("%d orders ended and %d were repeated: nothing was shown", ended, repeated)
	}
	copies := f.copiesOnDisk()
	for id, n := range copies {
		if !wanted[id] {
			t.Errorf("chunk %s was dropped, and %d devices hold it after the replay", id, n)
		}
	}
	for id := range wanted {
		if copies[id] < 2 {
			t.Errorf("chunk %s is on %d devices after the replay, it was on 2", id, copies[id])
		}
	}
}

// tries repeats a command as a user would who reads "no answer in time": only
// that may happen, and not for ever.
func (f *fleet) tries(what string, once func() (done bool, said string)) {
	for deadline := time.Now().Add(cmp.Or(f.trial, 2*testbed.Patience)); ; {
		done, said := once()
		if done {
			return
		}
		if time.Now().After(deadline) || f.Ctx.Err() != nil {
			f.T.Errorf("%s does not succeed: %s", what, said)
			return
		}
		time.Sleep(100 * time.Millisecond) // a refusal can come at once
	}
}

func (f *fleet) jobInTheEnd(module, object string, index int) {
	f.tries("a job over "+object, func() (bool, string) {
		var j api.JobResult
		code, said := f.Try(&j, "job", "run", module, "--input", object, "--chunk", fmt.Sprint(index))
		if code != 0 && !unanswered(said) {
			f.T.Errorf("a job over %s: %s", object, said)
			return true, ""
		}
		return code == 0, said
	})
}

func (d *device) provesInTheEnd() {
	d.f.tries("a challenge of "+d.name, func() (bool, string) {
		var a api.Audit
		code, said := d.f.Try(&a, "audit", "storage", string(d.id), "--leaves", "3")
		if a.Outcome != api.AuditRight && a.Outcome != api.AuditUnreachable {
			d.f.T.Errorf("%s is judged %q for what its broker does: %s", d.name, a.Outcome, said)
			return true, ""
		}
		return code == 0, said
	})
}

// unanswered tells whether a refusal is only for want of an answer.
func unanswered(said string) bool {
	for _, text := range []string{"did not answer", "no answer", "under way", "has not answered"} {
		if strings.Contains(said, text) {
			return true
		}
	}
	return false
}

// copiesOnDisk stops the devices and counts, for each chunk, the volumes that
// hold it.
func (f *fleet) copiesOnDisk() map[string]int {
	f.T.Helper()
	out := map[string]int{}
	for _, d := range f.devices {
		f.Stopped(d.proc, 0)
		v, err := store.Open(d.state("volumes", "main"), store.Options{Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			f.T.Fatal(err)
		}
		err = v.List(context.Background(), func(id chunk.ID, _ int64, lost bool) error {
			if lost {
				f.T.Errorf("%s has lost chunk %s", d.name, id)
			}
			out[id.String()]++
			return nil
		})
		if err = errors.Join(err, v.Close()); err != nil {
			f.T.Fatal(err)
		}
	}
	return out
}
