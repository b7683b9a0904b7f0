package test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/nats-io/nats.go"
	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/packaging/tour"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// attacker has the broker in hand: it reads and writes what it likes on every
// device's topics, as somebody would who has the engine's secret. What it does
// not have is the order key; where a test gives it validly signed orders, they
// are such as a coordinator once signed.
type attacker struct {
	f        *fleet
	nc       *nats.Conn
	orderKey ed25519.PrivateKey

	mu      sync.Mutex
	reports map[string][][]byte // envelopes by order id, as devices sent them
	orders  map[string][]byte   // envelopes by order id, as the coordinator sent them
	kinds   map[string]wire.Order
	changed chan struct{} // closed at the next message
}

func newAttacker(f *fleet) *attacker {
	f.T.Helper()
	secret, err := os.ReadFile(f.Path("coordinator", "keys", "engine.secret"))
	if err != nil {
		f.T.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(readFile(f.T, f.Path("coordinator", "keys", "ca.pem")))
	eng, err := engine.Start(f.Ctx, engine.Config{
		URL: f.NATS, Secret: secret, DialTLS: &tls.Config{RootCAs: roots},
		Authorize: func(context.Context, wire.DeviceID, *x509.Certificate) error { return nil },
	})
	if err != nil {
		f.T.Fatal(err)
	}
	f.T.Cleanup(func() { eng.Close() })
	a := &attacker{
		f: f, nc: eng.Conn(), orderKey: readKey(f.T, f.Path("coordinator", "keys", "orders.key")),
		reports: map[string][][]byte{}, orders: map[string][]byte{}, kinds: map[string]wire.Order{}, changed: make(chan struct{}),
	}
	for _, ch := range []wire.Channel{wire.ChannelReport, wire.ChannelOrder} {
		if _, err := a.nc.Subscribe(wire.Subject("", ch), a.hear); err != nil {
			f.T.Fatal(err)
		}
	}
	if err := a.nc.Flush(); err != nil {
		f.T.Fatal(err)
	}
	return a
}

// hear notes what passes by. Signatures are not its business.
func (a *attacker) hear(m *nats.Msg) {
	var env struct {
		PayloadType wire.PayloadType
		Payload     []byte
	}
	if json.Unmarshal(m.Data, &env) != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch env.PayloadType {
	case wire.TypeReport:
		var r wire.Report
		if json.Unmarshal(env.Payload, &r) == nil {
			a.reports[r.Order] = append(a.reports[r.Order], m.Data)
		}
	case wire.TypeOrder:
		var o wire.Order
		if json.Unmarshal(env.Payload, &o) == nil {
			a.orders[o.ID], a.kinds[o.ID] = m.Data, o
		}
	}
	close(a.changed)
	a.changed = make(chan struct{})
}

// order makes an order for d that is valid but for what edit changes.
func (a *attacker) order(d *device, kind wire.Kind, body any, edit func(*wire.Order)) wire.Order {
	a.f.T.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		a.f.T.Fatal(err)
	}
	now := time.Now().UTC()
	o := wire.Order{ID: ulid.Make().String(), Device: d.id, Kind: kind, Issued: now, Expires: now.Add(time.Minute), Body: raw}
	if edit != nil {
		edit(&o)
	}
	return o
}

func (a *attacker) seal(key ed25519.PrivateKey, o wire.Order) []byte {
	a.f.T.Helper()
	raw, err := wire.Seal(key, wire.TypeOrder, o)
	if err != nil {
		a.f.T.Fatal(err)
	}
	return raw
}

func (a *attacker) send(d *device, envelope []byte) {
	a.f.T.Helper()
	if err := a.nc.Publish(wire.Subject(d.id, wire.ChannelOrder), envelope); err != nil {
		a.f.T.Fatal(err)
	}
}

// terminal is the nth terminal report on an order, counted from 0, and its bytes.
func (a *attacker) terminal(d *device, order string, n int) (wire.Report, []byte) {
	a.f.T.Helper()
	key := ed25519.PublicKey(d.now().PublicKey)
	deadline := time.After(testbed.Patience)
	for {
		a.mu.Lock()
		seen, changed := slices.Clone(a.reports[order]), a.changed
		a.mu.Unlock()
		left := n
		for _, raw := range seen {
			r, err := wire.OpenAs[wire.Report](raw, key, wire.TypeReport)
			if err != nil {
				a.f.T.Fatalf("a report that %s has not signed: %v", d.name, err)
			}
			if !r.State.Terminal() {
				continue
			}
			if left == 0 {
				return r, raw
			}
			left--
		}
		select {
		case <-changed:
		case <-deadline:
			a.f.T.Fatalf("order %s was not reported on", order)
		}
	}
}

// reported counts the reports on an order: those that are raw, and the others.
func (a *attacker) reported(order string, raw []byte) (same, others int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.reports[order] {
		if bytes.Equal(r, raw) {
			same++
		} else {
			others++
		}
	}
	return same, others
}

// fence has the device carry out a harmless order of the same kind as the
// attacks. It takes messages one after another, so whatever came before has
// been taken or refused when the fence is reported on.
func (a *attacker) fence(d *device) {
	a.f.T.Helper()
	o := a.order(d, wire.KindChunkDrop, wire.ChunkDrop{IDs: []string{strings.Repeat("0", 64)}}, nil)
	a.send(d, a.seal(a.orderKey, o))
	if r, _ := a.terminal(d, o.ID, 0); r.State != wire.Succeeded {
		a.f.T.Fatalf("a valid order ended as %s: %s", r.State, r.Reason)
	}
}

// sent finds the orders of a kind that the coordinator gave a device.
func (a *attacker) sent(d *device, kind wire.Kind) (ids []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, o := range a.kinds {
		if o.Device == d.id && o.Kind == kind {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// TestAttacksOnTheOrderTopic tries to make a device drop a chunk.
func TestAttacksOnTheOrderTopic(t *testing.T) {
	t.Parallel()
	f := newFleet(t, external)
	rng := testbed.Seeded(t)
	f.enrol(2, false)
	a := newAttacker(f)
	d, other := f.devices[0], f.devices[1]
	var prey wire.ChunkDrop // a new one for each attack
	hunt := func() {
		t.Helper()
		name := ulid.Make().String()
		prey = wire.ChunkDrop{IDs: []string{f.Put(name, testbed.RandomBytes(rng, 100_000)).Chunks[0].ID}}
	}
	_, stranger, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	deviceKey := readKey(t, other.state("identity", "key.pem"))

	for _, c := range []struct {
		name     string
		envelope func() (order string, raw []byte)
		code     string // of the report that there should be; empty: none
	}{
		{"unsigned", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, nil)
			return o.ID, editEnvelope(t, a.seal(a.orderKey, o), func(e map[string]any) { e["signatures"] = []any{} })
		}, ""},
		{"bare, without an envelope", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, nil)
			raw, _ := json.Marshal(o)
			return o.ID, raw
		}, ""},
		{"signed by a stranger", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, nil)
			return o.ID, a.seal(stranger, o)
		}, ""},
		{"signed by another device of the fleet", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, nil)
			return o.ID, a.seal(deviceKey, o)
		}, ""},
		{"altered after it was signed", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, wire.ChunkDrop{IDs: []string{strings.Repeat("0", 64)}}, nil)
			raw := a.seal(a.orderKey, o)
			return o.ID, editEnvelope(t, raw, func(e map[string]any) {
				o.Body, _ = json.Marshal(prey)
				payload, _ := json.Marshal(o)
				e["payload"] = payload
			})
		}, ""},
		{"under another payload type", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, nil)
			raw, err := wire.Seal(a.orderKey, wire.TypeWelcome, o)
			if err != nil {
				t.Fatal(err)
			}
			return o.ID, raw
		}, ""},
		{"meant for another device", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, func(o *wire.Order) { o.Device = other.id })
			return o.ID, a.seal(a.orderKey, o)
		}, ""},
		{"expired", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, func(o *wire.Order) {
				o.Issued, o.Expires = o.Issued.Add(-time.Hour), o.Issued.Add(-time.Second)
			})
			return o.ID, a.seal(a.orderKey, o)
		}, wire.CodeExpired},
		{"without an expiry", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, func(o *wire.Order) { o.Expires = time.Time{} })
			return o.ID, a.seal(a.orderKey, o)
		}, wire.CodeBadBody},
		{"larger than a message may be, its signature good", func() (string, []byte) {
			o := a.order(d, wire.KindChunkDrop, prey, nil)
			return o.ID, editEnvelope(t, a.seal(a.orderKey, o), func(e map[string]any) { e["padding"] = strings.Repeat("x", wire.MaxMessage) })
		}, ""},
		{"of an unknown kind", func() (string, []byte) {
			o := a.order(d, "shell.run", prey, nil)
			return o.ID, a.seal(a.orderKey, o)
		}, wire.CodeUnknownKind},
	} {
		f.Sub(c.name, func(t *testing.T) {
			hunt()
			order, raw := c.envelope()
			a.send(d, raw)
			if c.code != "" {
				if r, _ := a.terminal(d, order, 0); r.State != wire.Rejected || r.Code != c.code || r.Reason == "" {
					t.Errorf("reported as %s %s %q, want a refusal with %s", r.State, r.Code, r.Reason, c.code)
				}
			}
			a.fence(d)
			if _, n := a.reported(order, nil); c.code == "" && n > 0 {
				t.Errorf("it was taken for an order: %d reports", n)
			}
			d.checkStorage()
		})
	}
	if d.proc.Ended() {
		t.Fatal("the agent has ended")
	}
	// The same order, valid: what was tried above would have worked.
	hunt()
	valid := a.order(d, wire.KindChunkDrop, prey, nil)
	a.send(d, a.seal(a.orderKey, valid))
	if r, _ := a.terminal(d, valid.ID, 0); r.State != wire.Succeeded {
		t.Fatalf("the valid order: %s %s", r.State, r.Reason)
	}
	var lost api.Audit
	// Enough leaves that none of a dozen chunks is missed: (11/12)^512.
	f.Fails(&lost, 1, "audit", "storage", string(d.id), "--leaves", "512")
	if lost.Outcome != api.AuditLost {
		t.Errorf("after a valid drop the audit says %q", lost.Outcome)
	}
}

// TestReplayHasNoSecondEffect plays finished orders again, byte for byte.
func TestReplayHasNoSecondEffect(t *testing.T) {
	t.Parallel()
	f := newFleet(t, external)
	rng := testbed.Seeded(t)
	f.enrol(1, false)
	a := newAttacker(f)
	d := f.devices[0]
	data := testbed.RandomBytes(rng, 200_000)

	// A drop, while the chunk is there again for a reason of its own.
	f.Put("prey", data, "--replicas", "1")
	f.OK(nil, "object", "rm", "prey")
	f.Until("the drop order being sent", func() bool { return len(a.sent(d, wire.KindChunkDrop)) == 1 })
	drop := a.sent(d, wire.KindChunkDrop)[0]
	first, raw := a.terminal(d, drop, 0)
	if first.State != wire.Succeeded {
		t.Fatalf("the drop: %s %s", first.State, first.Reason)
	}
	f.Put("prey", data, "--replicas", "1")
	check := func(order string, raw []byte) {
		t.Helper()
		a.mu.Lock()
		envelope := a.orders[order]
		a.mu.Unlock()
		same, others := a.reported(order, raw)
		a.send(d, envelope)
		if _, again := a.terminal(d, order, same); !bytes.Equal(again, raw) {
			t.Error("a replay was answered with another report")
		}
		a.fence(d)
		// A new run would be announced as QUEUED and RUNNING. The old report may
		// come more often: a device that was restarted before its acknowledgement,
		// which the coordinator holds back until its state is synced, sends it again.
		if _, n := a.reported(order, raw); n != others {
			t.Errorf("a replay was answered with %d other reports than the old one", n-others)
		}
		d.checkStorage()
		f.CheckGet("prey", data)
	}
	check(drop, raw)

	// A job, whose second run would cost the owner's CPU, also after a restart.
	var j api.JobResult
	f.OK(&j, "job", "run", testbed.Guest("wordcount"), "--input", "prey")
	_, raw = a.terminal(d, j.Order, 0)
	check(j.Order, raw)
	d.kill()
	d.start()
	d.awaitOnline()
	check(drop, func() []byte { _, r := a.terminal(d, drop, 0); return r }())
	check(j.Order, raw)
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// readKey reads an Ed25519 key in PKCS #8, as device and coordinator keep theirs.
func readKey(t *testing.T, path string) ed25519.PrivateKey {
	t.Helper()
	block, _ := pem.Decode(readFile(t, path))
	if block == nil {
		t.Fatalf("%s holds no key", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return k.(ed25519.PrivateKey)
}

// editEnvelope changes what is around a payload, or the payload itself, and
// leaves the signature as it was.
func editEnvelope(t *testing.T, raw []byte, edit func(map[string]any)) []byte {
	t.Helper()
	var e map[string]any
	if err := json.Unmarshal(raw, &e); err != nil {
		t.Fatal(err)
	}
	edit(e)
	out, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// impostor is a device's key in other hands: it comes online in the place of
// the agent and answers as its lies say.
type impostor struct {
	f    *fleet
	d    *device
	key  ed25519.PrivateKey
	mqtt mqtt.Client

	mu   sync.Mutex
	lies map[wire.Kind]lie
}

// lie makes the answer to an order. A report without a state is none.
type lie func(o wire.Order) (r wire.Report)

// takeOver stops the device's agent and connects with its identity.
func takeOver(d *device) *impostor {
	f := d.f
	f.T.Helper()
	d.stop()
	var m wire.EnrolReply
	if err := json.Unmarshal(readFile(f.T, d.state("identity", "membership.json")), &m); err != nil {
		f.T.Fatal(err)
	}
	i := &impostor{f: f, d: d, key: readKey(f.T, d.state("identity", "key.pem")), lies: map[wire.Kind]lie{}}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(m.CA)
	cert, _ := pem.Decode(m.Certificate)
	i.mqtt = mqtt.NewClient(mqtt.NewClientOptions().AddBroker(m.Brokers[0]).SetClientID(string(d.id)).SetAutoReconnect(false).
		SetConnectTimeout(testbed.Patience).SetWriteTimeout(testbed.Patience).SetTLSConfig(&tls.Config{
		RootCAs: roots, Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Bytes}, PrivateKey: i.key}},
	}))
	i.wait(i.mqtt.Connect())
	gone := make(chan struct{})
	f.T.Cleanup(func() { close(gone); i.mqtt.Disconnect(100) })
	i.wait(i.mqtt.Subscribe(wire.Topic(d.id, wire.ChannelOrder), 0, func(_ mqtt.Client, msg mqtt.Message) {
		if o, err := wire.OpenAs[wire.Order](msg.Payload(), m.OrderKey, wire.TypeOrder); err == nil {
			go i.answer(o)
		}
	}))
	now := d.now()
	i.publish(wire.ChannelPresence, wire.TypePresence, wire.Presence{
		Device: d.id, Online: true, Session: strings.Repeat("ab", 16), Nonce: strings.Repeat("cd", 16),
		Agent: now.Agent, OS: now.OS, Arch: now.Arch, Board: now.Board, Capacity: now.Capacity, Used: now.Used, At: time.Now().UTC(), TimeConfidence: wire.ClockTrusted,
	})
	go i.beat(gone)
	f.Until("the impostor passing for "+d.name, func() bool { return d.now().Online })
	return i
}

func (i *impostor) wait(tok mqtt.Token) {
	i.f.T.Helper()
	if !tok.WaitTimeout(testbed.Patience) || tok.Error() != nil {
		i.f.T.Fatalf("the impostor's connection: %v", tok.Error())
	}
}

func (i *impostor) publish(ch wire.Channel, typ wire.PayloadType, v any) {
	raw, err := wire.Seal(i.key, typ, v)
	if err != nil {
		panic(err) // what lies are made of always fits
	}
	i.mqtt.Publish(wire.Topic(i.d.id, ch), 0, false, raw)
}

// beat keeps the device online: who is silent gets no orders.
func (i *impostor) beat(gone <-chan struct{}) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			i.publish(wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: i.d.id, At: time.Now().UTC(), TimeConfidence: wire.ClockTrusted})
		case <-gone:
			return
		}
	}
}

func (i *impostor) lieTo(kind wire.Kind, l lie) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.lies[kind] = l
}

func (i *impostor) answer(o wire.Order) {
	i.mu.Lock()
	l := i.lies[o.Kind]
	i.mu.Unlock()
	if l == nil {
		return
	}
	r := l(o)
	r.Order, r.Device, r.Seq, r.At, r.TimeConfidence = o.ID, i.d.id, 1, time.Now().UTC(), wire.ClockTrusted
	i.publish(wire.ChannelReport, wire.TypeReport, r)
}

// succeeded is a report with a result and an attachment, both as told.
func succeeded(body any, attachment []byte) wire.Report {
	raw, _ := json.Marshal(body) // of a struct of ours: does not fail
	sum := sha256.Sum256(attachment)
	return wire.Report{State: wire.Succeeded, Body: raw,
		Attachment: &wire.Attachment{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(attachment)), Inline: attachment}}
}

// TestLiar has a device with a good key answer challenges wrongly.
func TestLiar(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := testbed.Seeded(t)
	f.enrol(2, false)
	data := testbed.RandomBytes(rng, 3<<20)
	o := f.Put("file", data)
	d := f.devices[0]
	d.checkCompute()
	d.checkStorage()
	i := takeOver(d)
	chunks := map[string][]byte{}
	for n, c := range o.Chunks {
		chunks[c.ID] = data[n<<20:][:c.Size]
	}

	f.Sub("a wrong result", func(t *testing.T) {
		i.lieTo(wire.KindJobRun, func(o wire.Order) wire.Report {
			body, _ := wire.DecodeBody[wire.JobRun](o)
			return jobResult(body, []byte(strings.Repeat("0", 64)+"\n"))
		})
		i.checkCaught(t, api.AuditWrong, "audit", "compute", string(d.id), "--module", testbed.Guest("sha256sum"))
	})
	f.Sub("the right result in another job's name", func(t *testing.T) {
		i.lieTo(wire.KindJobRun, func(o wire.Order) wire.Report {
			body, _ := wire.DecodeBody[wire.JobRun](o)
			sum := sha256.Sum256(chunks[body.Input])
			body.Input = strings.Repeat("1", 64)
			return jobResult(body, []byte(hex.EncodeToString(sum[:])+"\n"))
		})
		i.checkCaught(t, api.AuditWrong, "audit", "compute", string(d.id), "--module", testbed.Guest("sha256sum"))
	})
	f.Sub("a job refused is no lie", func(t *testing.T) {
		i.lieTo(wire.KindJobRun, func(wire.Order) wire.Report {
			return wire.Report{State: wire.Rejected, Code: wire.CodePolicy, Reason: "the owner does not allow jobs"}
		})
		i.checkCaught(t, api.AuditRefused, "audit", "compute", string(d.id), "--module", testbed.Guest("sha256sum"))
	})

	honest := func(o wire.Order) (wire.AuditAnswer, []wire.AuditLeaf) {
		body, _ := wire.DecodeBody[wire.Audit](o)
		leaves := make([]wire.AuditLeaf, len(body.Items))
		for n, it := range body.Items {
			leaf, path, err := chunk.Prove(chunks[it.Chunk], it.Leaf)
			if err != nil {
				t.Error(err)
			}
			leaves[n] = wire.AuditLeaf{Chunk: it.Chunk, Leaf: it.Leaf, Data: leaf, Path: path}
		}
		return wire.AuditAnswer{Nonce: body.Nonce}, leaves
	}
	report := func(a wire.AuditAnswer, leaves []wire.AuditLeaf) wire.Report {
		raw, _ := json.Marshal(leaves)
		return succeeded(a, raw)
	}
	const few = "3" // leaves, so that the attachment fits in the report
	f.Sub("the truth passes", func(t *testing.T) {
		i.lieTo(wire.KindAudit, func(o wire.Order) wire.Report { return report(honest(o)) })
		var a api.Audit
		f.OK(&a, "audit", "storage", string(d.id), "--leaves", few)
		if a.Outcome != api.AuditRight {
			t.Errorf("the truth was judged as %q: %s", a.Outcome, a.Reason)
		}
	})
	lies := map[string]lie{
		"an old nonce": func(o wire.Order) wire.Report {
			a, leaves := honest(o)
			a.Nonce = strings.Repeat("0", 32)
			return report(a, leaves)
		},
		"a leaf too few": func(o wire.Order) wire.Report {
			a, leaves := honest(o)
			return report(a, leaves[1:])
		},
		"nothing attached": func(o wire.Order) wire.Report {
			a, leaves := honest(o)
			r := report(a, leaves)
			r.Attachment = nil
			return r
		},
		"an attachment that was never put": func(o wire.Order) wire.Report {
			r := report(honest(o))
			r.Attachment.Inline = nil
			return r
		},
		"an attachment with another digest": func(o wire.Order) wire.Report {
			r := report(honest(o))
			r.Attachment.SHA256 = strings.Repeat("0", 64)
			return r
		},
	}
	for _, name := range slices.Sorted(maps.Keys(lies)) {
		f.Sub(name, func(t *testing.T) {
			i.lieTo(wire.KindAudit, lies[name])
			i.checkCaught(t, api.AuditWrong, "audit", "storage", string(d.id), "--leaves", few)
		})
	}
	f.Sub("another leaf of the same chunk", func(t *testing.T) {
		i.lieTo(wire.KindAudit, func(o wire.Order) wire.Report {
			a, leaves := honest(o)
			l := &leaves[0]
			at := (l.Leaf + 1) % chunk.LeafCount(int64(len(chunks[l.Chunk])))
			l.Data, l.Path, _ = chunk.Prove(chunks[l.Chunk], at)
			return report(a, leaves)
		})
		a := i.checkCaught(t, api.AuditWrong, "audit", "storage", string(d.id), "--leaves", few)
		if len(a.Wrong) != 1 {
			t.Errorf("%d chunks are called wrong, one is: %v", len(a.Wrong), a.Wrong)
		}
	})
	f.Sub("made-up leaves", func(t *testing.T) {
		seed := rng.Uint64()
		i.lieTo(wire.KindAudit, func(o wire.Order) wire.Report {
			a, leaves := honest(o)
			for n := range leaves {
				leaves[n].Data = testbed.RandomBytes(rand.New(rand.NewPCG(seed, 1)), 4<<10)
			}
			return report(a, leaves)
		})
		a := i.checkCaught(t, api.AuditWrong, "audit", "storage", string(d.id), "--leaves", few)
		if a.Right != 0 || len(a.Wrong) == 0 {
			t.Errorf("%d leaves are called right, %d chunks wrong", a.Right, len(a.Wrong))
		}
	})
	f.CheckGet("file", data) // from the other
}

func jobResult(job wire.JobRun, output []byte) wire.Report {
	sum := sha256.Sum256(output)
	return succeeded(wire.JobResult{Module: job.Module.SHA256, Input: job.Input, Output: hex.EncodeToString(sum[:]), OutputBytes: int64(len(output)), Engine: sandbox.Engine()}, output)
}

// checkCaught runs a challenge that must fail for the reason named by outcome.
func (i *impostor) checkCaught(t *testing.T, outcome api.AuditOutcome, args ...string) (a api.Audit) {
	t.Helper()
	said := i.f.Fails(&a, 1, args...)
	if a.Outcome != outcome || a.Reason == "" {
		t.Errorf("judged as %q (%s), want %q", a.Outcome, a.Reason, outcome)
	}
	if !strings.Contains(said, string(outcome)) {
		t.Errorf("the sentence does not say %q: %s", outcome, said)
	}
	return a
}

// TestTamper flips single bytes on a device's disk, while it is stopped and
// while it runs.
func TestTamper(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := testbed.Seeded(t)
	f.enrol(2, false)
	data := testbed.RandomBytes(rng, 6<<20)
	o := f.Put("file", data)
	d := f.devices[0]
	flip := func(n int) {
		t.Helper()
		logs, err := filesBelow(d.state("volumes", "main"), ".seg")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range logs {
			ok, err := tour.FlipByte(path, data[n<<20:(n+1)<<20])
			if err != nil {
				t.Fatal(err)
			}
			if ok {
				return
			}
		}
		t.Fatalf("chunk %d is not in %v", n, logs)
	}
	// 512 leaves out of 6 chunks: one that is not asked for has a chance of (5/6)^512 = 10^-40.
	challenge := func(n int) {
		t.Helper()
		var a api.Audit
		f.Fails(&a, 1, "audit", "storage", string(d.id), "--leaves", "512")
		if a.Outcome != api.AuditLost && a.Outcome != api.AuditWrong {
			t.Errorf("judged as %q: %s", a.Outcome, a.Reason)
		}
		if !slices.Equal(slices.Concat(a.Lost, a.Wrong), []string{o.Chunks[n].ID}) || a.Right >= a.Leaves {
			t.Errorf("lost %v, wrong %v, %d of %d leaves right; only chunk %s was tampered with", a.Lost, a.Wrong, a.Right, a.Leaves, o.Chunks[n].ID)
		}
	}
	d.stop()
	flip(1)
	d.start()
	d.awaitOnline()
	challenge(1)
	flip(4)
	challenge(4)
	f.CheckGet("file", data)
	d.checkStorage() // of what it still claims to hold
}
