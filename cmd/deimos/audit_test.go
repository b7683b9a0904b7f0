package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// patience is how long an event may take.
const patience = 2 * time.Minute

// until waits for what nobody announces to a client of the API.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("this did not come true: %s", what)
		}
	}
}

// audited is a real agent in a fleet of two, and who audits it. The other holds the
// same.
type audited struct {
	t      *testing.T
	owner  *commands
	client *api.Client
	id     wire.DeviceID
	state  string            // the agent's
	chunks map[string][]byte // that it holds
	stop   func()            // ends the agent in good order
}

func newAudited(t *testing.T) *audited {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*patience)
	t.Cleanup(cancel)
	f := &audited{t: t, state: filepath.Join(t.TempDir(), "device"), chunks: map[string][]byte{}}
	f.owner, f.client = startCoordinator(ctx, t)
	f.id, f.stop = f.runAgent(ctx, f.state)
	_, _ = f.runAgent(ctx, filepath.Join(t.TempDir(), "other"))
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	for range 3 {
		data := make([]byte, 200_000)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		sum := chunk.Sum(data).String()
		_, err := f.client.PutChunk(ctx, sum, data, 2)
		must(t, err)
		f.chunks[sum] = data
	}
	return f
}

// runAgent runs a real one until stop is called, or the test ends.
func (f *audited) runAgent(ctx context.Context, state string) (id wire.DeviceID, stop func()) {
	t := f.t
	t.Helper()
	key, err := agent.LoadIdentity(filepath.Join(state, "identity"))
	must(t, err)
	tok, err := f.client.CreateToken(ctx, api.TokenRequest{})
	must(t, err)
	at, err := api.LoadContext(f.owner.Context)
	must(t, err)
	cfg, err := agent.LoadConfig("")
	must(t, err)
	cfg.Coordinator, cfg.Token, cfg.StateDir, cfg.Version, cfg.Log = at.URL, tok.Token, state, "1.0.0", slog.New(slog.DiscardHandler)
	cfg.Volumes = []agent.VolumeConfig{{Dir: filepath.Join(state, "volumes", "main"), Floor: 1 << 20}}
	ctx, end := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx, cfg); close(ended) }()
	stop = func() {
		end()
		if err := <-ended; err != nil {
			t.Errorf("the agent: %v", err)
		}
	}
	t.Cleanup(stop)
	f.awaitOnline(key.ID, true)
	return key.ID, stop
}

func (f *audited) awaitOnline(id wire.DeviceID, online bool) {
	f.t.Helper()
	until(f.t, "the device comes or goes", func() bool {
		d, err := f.client.Device(context.Background(), string(id))
		return err == nil && d.Online == online
	})
}

// part is one of the test's parts, under a name of its own.
func (f *audited) part(name string, run func(t *testing.T)) {
	whole := f.t
	whole.Run(name, func(t *testing.T) {
		f.t = t
		defer func() { f.t = whole }()
		run(t)
	})
}

// says runs a command that must succeed, and is what it prints.
func (f *audited) says(args ...string) string {
	f.t.Helper()
	return printed(f.t, func() {
		if err := typed(f.t, f.owner, args...); err != nil {
			f.t.Fatalf("%q: %v", args, err)
		}
	})
}

// fails runs a command that must end with code and a sentence that has these words.
func (f *audited) fails(code int, words string, args ...string) (out string) {
	f.t.Helper()
	return printed(f.t, func() {
		err := typed(f.t, f.owner, args...)
		if cli.CodeOf(err) != code || !strings.Contains(err.Error(), words) {
			f.t.Errorf("%q: exit code %d, %v; want %d and %q", args, cli.CodeOf(err), err, code, words)
		}
	})
}

func decode[T any](t *testing.T, raw string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(raw), &v); err != nil {
		t.Fatalf("%v in %q", err, raw)
	}
	return v
}

func wantWords(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not in\n%s", w, text)
		}
	}
}

// damage changes a byte of a chunk where it lies on the device's disk.
func (f *audited) damage(data []byte) {
	f.t.Helper()
	logs, err := filepath.Glob(filepath.Join(f.state, "volumes", "main", "chunks", "*.seg"))
	must(f.t, err)
	for _, path := range logs {
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		must(f.t, err)
		defer file.Close()
		raw, err := io.ReadAll(io.LimitReader(file, 16<<20))
		must(f.t, err)
		if i := bytes.Index(raw, data); i >= 0 {
			_, err := file.WriteAt([]byte{raw[i+9] ^ 1}, int64(i+9))
			must(f.t, err)
			return
		}
	}
	f.t.Fatal("the chunk is in no segment")
}

// liar stops the agent and goes on in its name: it answers orders of a kind with
// what lie makes of them.
func (f *audited) liar(lies map[wire.Kind]func(wire.Order) wire.Report) ed25519.PrivateKey {
	t := f.t
	t.Helper()
	f.stop()
	f.awaitOnline(f.id, false)
	raw, err := os.ReadFile(filepath.Join(f.state, "identity", "key.pem"))
	must(t, err)
	block, _ := pem.Decode(raw)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	must(t, err)
	key := parsed.(ed25519.PrivateKey)
	raw, err = os.ReadFile(filepath.Join(f.state, "identity", "membership.json"))
	must(t, err)
	m := decode[wire.EnrolReply](t, string(raw))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(m.CA)
	cert, _ := pem.Decode(m.Certificate)
	line := mqtt.NewClient(mqtt.NewClientOptions().AddBroker(m.Brokers[0]).SetClientID(string(f.id)).SetAutoReconnect(false).SetConnectTimeout(patience).SetPingTimeout(patience).
		SetTLSConfig(&tls.Config{RootCAs: roots, Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Bytes}, PrivateKey: key}}}))
	wait := func(tok mqtt.Token) {
		t.Helper()
		if !tok.WaitTimeout(patience) || tok.Error() != nil {
			t.Fatalf("the liar's connection: %v", tok.Error())
		}
	}
	say := func(ch wire.Channel, typ wire.PayloadType, v any) {
		raw, err := wire.Seal(key, typ, v)
		if err != nil {
			t.Error(err)
		}
		line.Publish(wire.Topic(f.id, ch), 0, false, raw)
	}
	wait(line.Connect())
	t.Cleanup(func() { line.Disconnect(100) })
	wait(line.Subscribe(wire.Topic(f.id, wire.ChannelOrder), 0, func(_ mqtt.Client, msg mqtt.Message) {
		o, err := wire.OpenAs[wire.Order](msg.Payload(), m.OrderKey, wire.TypeOrder)
		if err != nil || lies[o.Kind] == nil {
			return
		}
		r := lies[o.Kind](o)
		r.Order, r.Device, r.Seq, r.At, r.TimeConfidence = o.ID, f.id, 1, time.Now().UTC(), wire.ClockTrusted
		say(wire.ChannelReport, wire.TypeReport, r)
	}))
	say(wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: f.id, Online: true, Session: strings.Repeat("ab", 16), Nonce: strings.Repeat("cd", 16),
		Agent: "1.0.0", OS: "linux", Arch: "amd64", Board: "test", Capacity: 1 << 30, At: time.Now().UTC(), TimeConfidence: wire.ClockTrusted})
	f.awaitOnline(f.id, true)
	return key
}

func reportOf(t *testing.T, body any, attachment []byte) wire.Report {
	raw, err := json.Marshal(body)
	if err != nil {
		t.Error(err)
	}
	sum := sha256.Sum256(attachment)
	return wire.Report{State: wire.Succeeded, Body: raw, Attachment: &wire.Attachment{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(attachment)), Inline: attachment}}
}

// wrongLeaf answers a storage challenge rightly, but for a byte of the first leaf.
func wrongLeaf(t *testing.T, chunks map[string][]byte, o wire.Order) wire.Report {
	body, err := wire.DecodeBody[wire.Audit](o)
	if err != nil {
		t.Error(err)
	}
	leaves := make([]wire.AuditLeaf, len(body.Items))
	for i, it := range body.Items {
		data, path, err := chunk.Prove(chunks[it.Chunk], it.Leaf)
		if err != nil {
			t.Error(err)
			return wire.Report{State: wire.Failed, Code: wire.CodeInternal, Reason: err.Error()}
		}
		leaves[i] = wire.AuditLeaf{Chunk: it.Chunk, Leaf: it.Leaf, Data: bytes.Clone(data), Path: path}
	}
	leaves[0].Data[0] ^= 1
	raw, err := json.Marshal(leaves)
	if err != nil {
		t.Error(err)
	}
	return reportOf(t, wire.AuditAnswer{Nonce: body.Nonce}, raw)
}

// silentModule does nothing and puts out nothing.
var silentModule = []byte("\x00asm\x01\x00\x00\x00" +
	"\x01\x04\x01\x60\x00\x00" + // a type: no arguments, no results
	"\x03\x02\x01\x00" + // a function of that type
	"\x05\x03\x01\x00\x01" + // a page of memory
	"\x07\x13\x02\x06memory\x02\x00\x06_start\x00\x00" +
	"\x0a\x04\x01\x02\x00\x0b") // with nothing in it

// forged is evidence that was altered, as a file.
func forged(t *testing.T, raw []byte, change func(e *api.Evidence)) string {
	t.Helper()
	e := decode[api.Evidence](t, string(raw))
	change(&e)
	out, err := json.Marshal(e)
	must(t, err)
	return fileOf(t, out)
}

func fileOf(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, content, 0o600))
	return path
}

// altered is an envelope of which one field of the payload is another, while its
// signature stays what it was; with a key it is signed anew.
func altered(t *testing.T, env json.RawMessage, typ wire.PayloadType, key ed25519.PrivateKey, field string, value any) json.RawMessage {
	t.Helper()
	payload, err := wire.Reread[map[string]any](env)
	must(t, err)
	payload[field] = value
	if key != nil {
		out, err := wire.Seal(key, typ, payload)
		must(t, err)
		return out
	}
	around := decode[map[string]any](t, string(env))
	raw, err := json.Marshal(payload)
	must(t, err)
	around["payload"] = base64.StdEncoding.EncodeToString(raw)
	out, err := json.Marshal(around)
	must(t, err)
	return out
}

// TestAChallengeIsShownListedAndJudgedAgainWithoutTheCoordinator: what a device has
// proved, lost and lied about, as an operator sees it.
func TestAChallengeIsShownListedAndJudgedAgainWithoutTheCoordinator(t *testing.T) {
	f := newAudited(t)
	device := string(f.id)
	text := f.says("audit", "storage", device)
	wantWords(t, text, "(storage), asked for by an operator", "device     "+device, "outcome    right", "proof      44 of 44 leaves verified, from 3 chunks", "cost       nothing")
	right := decode[api.Audit](t, f.says("audit", "storage", device, "--leaves", "5", "-o", "json"))
	if right.Outcome != api.AuditRight || right.Right != 5 || right.Leaves != 5 || right.Device != f.id || right.Evidence {
		t.Errorf("%+v", right)
	}

	var gone string
	for gone = range f.chunks {
		break
	}
	f.damage(f.chunks[gone])
	lost := decode[api.Audit](t, f.fails(1, "lost", "audit", "storage", device, "--leaves", "200", "-o", "json"))
	if lost.Outcome != api.AuditLost || len(lost.Lost) != 1 || lost.Lost[0] != gone || !lost.Evidence {
		t.Fatalf("%+v", lost)
	}
	delete(f.chunks, gone)
	key := f.liar(map[wire.Kind]func(wire.Order) wire.Report{
		wire.KindAudit: func(o wire.Order) wire.Report { return wrongLeaf(t, f.chunks, o) },
		wire.KindJobRun: func(o wire.Order) wire.Report {
			body, err := wire.DecodeBody[wire.JobRun](o)
			if err != nil {
				t.Error(err)
			}
			out := []byte("made up")
			sum := sha256.Sum256(out)
			return reportOf(t, wire.JobResult{Module: body.Module.SHA256, Input: body.Input, Output: hex.EncodeToString(sum[:]), OutputBytes: int64(len(out)), Engine: "wazero/" + sandbox.EngineVersion + " compiler " + runtime.GOARCH}, out)
		},
	})
	wrong := decode[api.Audit](t, f.fails(1, "wrong", "audit", "storage", device, "--leaves", "3", "-o", "json"))
	if wrong.Outcome != api.AuditWrong || len(wrong.Wrong) != 1 || wrong.Penalty == nil {
		t.Fatalf("%+v", wrong)
	}

	f.part("show", func(t *testing.T) {
		wantWords(t, f.says("audit", "show", lost.ID), "challenge  "+lost.ID, "outcome    lost", "lost       "+gone, "evidence   \"deimos audit evidence "+lost.ID)
		wantWords(t, f.says("audit", "show", wrong.ID), "wrong      "+wrong.Wrong[0], "of its integrity, from ", "proof      2 of 3 leaves")
		if got := decode[api.Audit](t, f.says("audit", "show", wrong.ID, "-o", "json")); got.ID != wrong.ID || got.Outcome != api.AuditWrong || got.Penalty == nil {
			t.Errorf("%+v", got)
		}
		f.fails(1, "challenge", "audit", "show", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
		f.fails(1, "", "audit", "show", "no-id")
		wantUsage(t, typed(t, f.owner, "audit", "show"), "show nothing")
	})
	f.part("list", func(t *testing.T) {
		text := f.says("audit", "list")
		wantWords(t, text, "CHALLENGE", right.ID, lost.ID, wrong.ID)
		if strings.Index(text, wrong.ID) > strings.Index(text, lost.ID) || strings.Contains(text, "may be more") {
			t.Errorf("not the newest first, or cut:\n%s", text)
		}
		list := decode[api.AuditList](t, f.says("audit", "ls", "--outcome", "lost", "--device", device, "-o", "json"))
		if len(list.Audits) != 1 || list.Audits[0].ID != lost.ID {
			t.Errorf("%+v", list)
		}
		wantWords(t, f.says("audit", "ls", "--limit", "1"), wrong.ID, "There may be more")
		list = decode[api.AuditList](t, f.says("audit", "ls", "--limit", "1", "--before", wrong.ID, "-o", "json"))
		if len(list.Audits) != 1 || list.Audits[0].ID != lost.ID || list.Next != lost.ID {
			t.Errorf("before the newest: %+v", list)
		}
		wantWords(t, f.says("audit", "ls", "--outcome", "void"), "There is no such challenge")
		f.fails(1, "outcome", "audit", "ls", "--outcome", "liar")
		f.fails(1, "before", "audit", "ls", "--before", "yesterday")
		f.fails(1, "device", "audit", "ls", "--device", "aaaaaaaaaaaaaaaaaaaaaaaa")
		for _, args := range [][]string{{"--limit", "0"}, {"--limit", "-3"}, {"--limit", "100000"}, {"--device", "x"}, {"--device", ""}} {
			wantUsage(t, typed(t, f.owner, append([]string{"audit", "ls"}, args...)...), strings.Join(args, " "))
		}
	})
	f.part("wrong orders", func(t *testing.T) {
		wantUsage(t, typed(t, f.owner, "audit", "storage", device, "--leaves", "0"), "no leaf")
		wantUsage(t, typed(t, f.owner, "audit", "compute", device), "no module")
		wantUsage(t, typed(t, f.owner, "audit", "compute", device, "--module", filepath.Join(t.TempDir(), "none")), "no file")
		f.fails(1, "leaves", "audit", "storage", device, "--leaves", "1000000")
		f.fails(1, "device", "audit", "storage", "aaaaaaaaaaaaaaaaaaaaaaaa")
	})

	evidence := func(id string) []byte { return []byte(f.says("audit", "evidence", id)) }
	orderKey := base64.StdEncoding.EncodeToString(decode[api.Evidence](t, string(evidence(wrong.ID))).OrderKey)
	ofWrong, ofLost := evidence(wrong.ID), evidence(lost.ID)
	_, strangerKey, err := ed25519.GenerateKey(nil)
	must(t, err)
	stranger := strangerKey.Public().(ed25519.PublicKey)
	f.fails(1, "evidence", "audit", "evidence", right.ID)
	f.part("check", func(t *testing.T) {
		file := fileOf(t, ofWrong)
		wantWords(t, f.says("audit", "check", file, "--order-key", orderKey), "proved     wrong", "device     "+device, "order      "+wrong.Order+" (storage)", "wrong      "+wrong.Wrong[0], "verified   the order key is the given one")
		v := decode[coordinator.EvidenceVerdict](t, f.says("audit", "check", fileOf(t, ofLost), "--order-key", orderKey, "-o", "json"))
		if v.Outcome != api.AuditLost || len(v.Lost) != 1 || v.Lost[0] != gone || v.Device != f.id {
			t.Errorf("%+v", v)
		}
		// Without the key it is said whose word that is.
		wantWords(t, f.says("audit", "check", file), "not proved that the key which signed the order is the coordinator's", "order key  "+orderKey)
		f.fails(1, "another key", "audit", "check", file, "--order-key", base64.StdEncoding.EncodeToString(stranger))
		for _, bad := range []string{"x", "AAAA", strings.Repeat("A", 100)} {
			wantUsage(t, typed(t, f.owner, "audit", "check", file, "--order-key", bad), "the key "+bad)
		}
		wantUsage(t, typed(t, f.owner, "audit", "check", filepath.Join(t.TempDir(), "none")), "no file")
		f.fails(1, "no evidence of a compute challenge", "audit", "check", file, "--module", file)
	})
	f.part("altered", func(t *testing.T) {
		defer func(owner *commands) { f.owner = owner }(f.owner)
		f.owner = &commands{Context: filepath.Join(t.TempDir(), "none")} // nobody is asked
		type change = func(e *api.Evidence)
		sig := func(env json.RawMessage) json.RawMessage {
			around := decode[map[string]any](t, string(env))
			s := around["signatures"].([]any)[0].(map[string]any)
			raw, err := base64.StdEncoding.DecodeString(s["sig"].(string))
			must(t, err)
			raw[10] ^= 1
			s["sig"] = base64.StdEncoding.EncodeToString(raw)
			out, err := json.Marshal(around)
			must(t, err)
			return out
		}
		leaf := func(e *api.Evidence) { e.Attachment[bytes.Index(e.Attachment, []byte(`"data":"`))+20] ^= 1 }
		for name, c := range map[string]struct {
			of   []byte
			by   change
			says string
		}{
			"the report's signature": {ofWrong, func(e *api.Evidence) { e.Report = sig(e.Report) }, "the device's report"},
			"the order's signature":  {ofWrong, func(e *api.Evidence) { e.Order = sig(e.Order) }, "the order"},
			"a receipt's signature":  {ofWrong, func(e *api.Evidence) { id := wrong.Wrong[0]; e.Receipts[id] = sig(e.Receipts[id]) }, "the receipt"},
			"a leaf beside it":       {ofLost, leaf, "not the one that the device signed for"},
			"leaves within it": {ofWrong, func(e *api.Evidence) {
				e.Report = altered(t, e.Report, wire.TypeReport, nil, "attachment", map[string]any{"sha256": strings.Repeat("0", 64), "size": 2, "inline": []byte("[]")})
			}, "the device's report"},
			"when it was answered": {ofWrong, func(e *api.Evidence) {
				e.Report = altered(t, e.Report, wire.TypeReport, nil, "at", "2020-01-01T00:00:00Z")
			}, "the device's report"},
			"when it was ordered": {ofWrong, func(e *api.Evidence) {
				e.Order = altered(t, e.Order, wire.TypeOrder, nil, "issued", "2020-01-01T00:00:00Z")
			}, "the order"},
			"answered before it was ordered, by the device's own key": {ofWrong, func(e *api.Evidence) {
				e.Report = altered(t, e.Report, wire.TypeReport, key, "at", "2020-01-01T00:00:00Z")
			}, "before the order"},
			"the device's name":        {ofWrong, func(e *api.Evidence) { e.Device = wire.IDOf(stranger) }, "not that of device"},
			"the device's key":         {ofWrong, func(e *api.Evidence) { e.DeviceKey = stranger }, "not that of device"},
			"the device, name and key": {ofWrong, func(e *api.Evidence) { e.Device, e.DeviceKey = wire.IDOf(stranger), stranger }, "for device"},
			"the device, and who signed the report": {ofWrong, func(e *api.Evidence) {
				e.Device, e.DeviceKey = wire.IDOf(stranger), stranger
				e.Report = altered(t, e.Report, wire.TypeReport, strangerKey, "device", string(wire.IDOf(stranger)))
			}, "for device"},
			"the coordinator's key":      {ofWrong, func(e *api.Evidence) { e.OrderKey = stranger }, "another key"},
			"a loss called a lie":        {ofLost, func(e *api.Evidence) { e.Outcome, e.Wrong, e.Lost = api.AuditWrong, e.Lost, nil }, "claims"},
			"another challenge's report": {ofWrong, func(e *api.Evidence) { e.Report = decode[api.Evidence](t, string(ofLost)).Report }, "not on this order"},
		} {
			var err error
			out := printed(t, func() {
				err = typed(t, f.owner, "audit", "check", forged(t, c.of, c.by), "--order-key", orderKey)
			})
			if cli.CodeOf(err) != 1 || out != "" {
				t.Errorf("%s: exit code %d, and it prints %q", name, cli.CodeOf(err), out)
			} else {
				wantWords(t, err.Error(), "it is not proved: ", c.says)
			}
		}
		for name, raw := range map[string][]byte{
			"nothing": nil, "a half": ofWrong[:len(ofWrong)/2], "more after its end": append(bytes.Clone(ofWrong), '{'), "something else": []byte(`{"name":"x"}`), "no JSON": silentModule,
		} {
			if out := f.fails(1, "it is not proved: ", "audit", "check", fileOf(t, raw)); out != "" {
				t.Errorf("%s: it prints %q", name, out)
			}
		}
		// What was not altered is proved without the coordinator, too.
		wantWords(t, f.says("audit", "check", fileOf(t, ofWrong), "--order-key", orderKey), "proved     wrong")
	})
	f.part("a job", func(t *testing.T) {
		module := fileOf(t, silentModule)
		a := decode[api.Audit](t, f.fails(1, "wrong", "audit", "compute", device, "--module", module, "-o", "json"))
		wantWords(t, f.says("audit", "show", a.ID), "(compute)", "committed  "+a.Commitment, "expected   "+a.Expected, "got        "+a.Got)
		if a.Outcome != api.AuditWrong || a.Expected == a.Got {
			t.Fatalf("%+v", a)
		}
		honesty := f.says("device", "honesty", device)
		wantWords(t, honesty, "device       "+device, "compute      0.", "it gets no jobs", "20% of its jobs are challenges", "penalties", "deimos audit show "+a.ID)
		if h := decode[api.Honesty](t, f.says("device", "honesty", device, "-o", "json")); !h.Distrusted || len(h.Penalties) != 1 || h.Penalties[0].Audit != a.ID {
			t.Errorf("%+v", h)
		}
		raw := evidence(a.ID)
		job, err := coordinator.JobOf(raw)
		must(t, err)
		file, input := fileOf(t, raw), fileOf(t, f.chunks[job.Input])
		wantWords(t, f.says("audit", "check", file, "--module", module, "--input", input), "proved     wrong", "verified   the job, run here, has the expected result")
		f.fails(1, "--module", "audit", "check", file)
		wantUsage(t, typed(t, f.owner, "audit", "check", file, "--module", module), "a module without its input")
		f.fails(1, "the job ran over chunk", "audit", "check", file, "--module", module, "--input", module)
		f.fails(1, "the job ran module", "audit", "check", file, "--module", input, "--input", input)
		f.fails(1, "commitment", "audit", "check", forged(t, raw, func(e *api.Evidence) { e.Salt = strings.Repeat("0", len(e.Salt)) }), "--module", module, "--input", input)
	})
}
