package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// replyFor is a membership whose certificate ends then.
func (a *authority) replyFor(id Identity, end time.Time) wire.EnrolReply {
	r := a.reply(id)
	der := a.issueUntil(end, id.key.Public(), string(id.ID), x509.ExtKeyUsageClientAuth)
	r.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return r
}

// asMember is an agent with this membership, as far as renewal needs one. Its
// pauses go to the channel and end at once.
func asMember(t *testing.T, id Identity, base string, reply wire.EnrolReply) (*Agent, *lockedBuffer, chan time.Duration) {
	t.Helper()
	a := joining(t, id, base, "")
	said, pauses := &lockedBuffer{}, make(chan time.Duration, 1)
	a.log = slog.New(slog.NewTextHandler(said, nil))
	a.rest = func(ctx context.Context, d time.Duration) error {
		select {
		case pauses <- d:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	a.doubts, a.timed, a.web = make(chan struct{}, 1), make(chan struct{}, 1), &http.Client{}
	m := &Membership{Coordinator: base, EnrolReply: reply}
	if err := m.save(a.cfg.path("identity")); err != nil {
		t.Fatal(err)
	}
	a.member.Store(m)
	d := knows(m.authority(), a.clock)
	d.own = func() *tls.Certificate { return a.member.Load().proof(id) }
	a.session = newSession(link{
		id: id, brokers: func() []string { return a.member.Load().Brokers }, door: d, clock: a.clock, log: a.log,
		hello:   func() wire.Presence { return wire.Presence{} },
		receive: func([]byte) error { return nil }, trusted: a.orderKey, welcomed: func() {}, refused: a.doubted,
	})
	return a, said, pauses
}

func (a *Agent) background(t *testing.T, parts ...func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{}, len(parts))
	for _, f := range parts {
		go func() { f(ctx); over <- struct{}{} }()
	}
	t.Cleanup(func() {
		cancel()
		for range parts {
			await(t, "the end", over)
		}
	})
}

// A device that was off for so long that its certificate has ended, with a
// clock that knows nothing, gets in again by its key alone.
func TestAnEndedCertificateIsRenewedWithoutAToken(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	b := startBroker(t, ca, rules)
	o := b.office()
	fresh := ca.reply(id)
	fresh.Brokers = []string{"ssl://127.0.0.1:" + b.port}
	asked := make(chan wire.EnrolRequest, 16)
	f := openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
		var q wire.EnrolRequest
		_ = json.NewDecoder(r.Body).Decode(&q)
		asked <- q
		replying(t, fresh)(w, r)
	})
	old := ca.replyFor(id, time.Now().Add(-time.Minute))
	old.Brokers, old.UpdateRoot = fresh.Brokers, []byte("root")
	a, _, pauses := asMember(t, id, f.URL, old)
	a.clock.system = (&hardware{boot1970}).now
	go func() {
		for range pauses {
		}
	}()
	a.background(t, a.session.run, a.stayMember)
	if q := await(t, "the question", asked); q.Token != "" || deviceOf(q) != id.ID {
		t.Errorf("asked %+v", q)
	}
	o.presence(id, true)
	kept, err := loadMembership(a.cfg.path("identity"), id)
	if err != nil || string(kept.Certificate) != string(fresh.Certificate) || string(kept.UpdateRoot) != "root" {
		t.Errorf("kept %+v, %v", kept, err)
	}
}

func TestRenewalIsDueAtTwoThirdsOfALife(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	m := &Membership{EnrolReply: ca.replyFor(id, time.Now().Add(29*time.Hour))} // it began an hour ago
	begun := m.issued()
	about := func(d, want time.Duration) bool { return (d - want).Abs() < time.Minute } // times in it are of whole seconds
	if early, late := m.renewAt(0), m.renewAt(1); !about(early.Sub(begun), 20*time.Hour) || !about(late.Sub(early), 3*time.Hour) {
		t.Errorf("renewed %s after the issue, to %s", early.Sub(begun), late.Sub(begun))
	}
}

func TestAForeignAnswerToARenewalChangesNothing(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	id, other := newIdentity(t), newIdentity(t)
	for what, tc := range map[string]struct {
		server *authority
		reply  func() wire.EnrolReply
	}{
		"another device":    {ours, func() wire.EnrolReply { return ours.reply(other) }},
		"another key":       {ours, func() wire.EnrolReply { r := ours.reply(id); r.Certificate = ours.reply(other).Certificate; return r }},
		"another authority": {ours, func() wire.EnrolReply { return theirs.reply(id) }},
		"another's signature": {ours, func() wire.EnrolReply {
			r := ours.reply(id)
			r.Certificate = theirs.reply(id).Certificate
			return r
		}},
		"another authority's server": {theirs, func() wire.EnrolReply { return ours.reply(id) }},
		"a broker in the clear":      {ours, func() wire.EnrolReply { r := ours.reply(id); r.Brokers = []string{"tcp://127.0.0.1:1"}; return r }},
	} {
		t.Run(what, func(t *testing.T) {
			f := openFront(t, tc.server.server("127.0.0.1"), replying(t, tc.reply()))
			old := ours.reply(id)
			old.DataPlane = []string{f.URL} // nowhere else to ask
			a, _, _ := asMember(t, id, f.URL, old)
			m := a.member.Load()
			before, err := os.ReadFile(a.cfg.path("identity", membershipFile))
			if err != nil {
				t.Fatal(err)
			}
			if err := a.renew(t.Context()); err == nil {
				t.Error("renewed")
			}
			if after, err := os.ReadFile(a.cfg.path("identity", membershipFile)); err != nil || !bytes.Equal(after, before) || a.member.Load() != m {
				t.Errorf("the membership changed (%v)", err)
			}
			if tc.server == theirs && f.requests.Load() != 0 {
				t.Error("the other one was asked")
			}
		})
	}
}

// Neither a wrong hardware clock nor a floor brings a renewal forward; a clock
// that becomes trusted is looked at at once.
func TestRenewalFollowsTrustedTimeAlone(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	var a *Agent
	asked := make(chan wire.Confidence, 1)
	f := openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
		_, sure := a.clock.Read()
		select {
		case asked <- sure:
		default:
		}
		replying(t, ca.replyFor(id, time.Now().Add(48*time.Hour)))(w, r)
	})
	a, _, _ = asMember(t, id, f.URL, ca.reply(id)) // one hour old, one left
	a.clock.system = (&hardware{time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC)}).now
	a.background(t, a.stayMember)
	look := func() { // two rounds, of which the second has begun after this call
		for range 3 {
			a.timed <- struct{}{}
		}
	}
	look()
	if !a.clock.Trust(time.Now(), 0) {
		t.Fatal("refused")
	}
	look()
	if n := f.requests.Load(); n != 0 {
		t.Errorf("asked %d times before it is due", n)
	}
	a.clock.Trust(time.Now().Add(45*time.Minute), 0)
	a.timed <- struct{}{}
	if sure := await(t, "the renewal", asked); sure != wire.ClockTrusted {
		t.Errorf("it asked by a clock that is %s", sure)
	}
}

// A member that the coordinator has forgotten keeps its membership and waits.
func TestAForgottenMemberShowsItsCodeAndStaysWhatItIs(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	d := openReception(t, ca.server("127.0.0.1"))
	a, said, _ := asMember(t, id, d.URL, ca.reply(id))
	before := a.member.Load()
	if err := a.renew(t.Context()); err == nil || !strings.Contains(err.Error(), "waits to be claimed") {
		t.Errorf("%v", err)
	}
	c := code(id, ca.cert)
	if raw, err := os.ReadFile(a.cfg.path(claimFile)); err != nil || string(raw) != c+"\n" || !strings.Contains(said.String(), c) {
		t.Errorf("%q %v; log: %s", raw, err, said)
	}
	if m, err := loadMembership(a.cfg.path("identity"), id); err != nil || m == nil || a.member.Load() != before {
		t.Errorf("the membership changed (%v)", err)
	}
	d.answers <- replying(t, ca.reply(id))
	if err := a.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantGone(t, a.cfg.path(claimFile))
}

// New addresses count from the answer on; the root of trust for updates stays.
func TestARenewalBringsAddressesButNoNewUpdateRoot(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	fresh := ca.reply(id)
	fresh.Brokers, fresh.DataPlane, fresh.UpdateRoot = []string{"ssl://new:1"}, []string{"https://new:2"}, []byte("evil")
	f := openFront(t, ca.server("127.0.0.1"), replying(t, fresh))
	for _, root := range []string{"", "good"} {
		old := ca.reply(id)
		old.UpdateRoot = []byte(root)
		a, _, _ := asMember(t, id, "https://127.0.0.1:1", old) // gone; its owner knows where to
		a.cfg.Coordinator = f.URL
		if err := a.renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		m, err := loadMembership(a.cfg.path("identity"), id)
		if err != nil || m.Brokers[0] != "ssl://new:1" || m.DataPlane[0] != "https://new:2" || m.Coordinator != f.URL {
			t.Errorf("%+v %v", m, err)
		}
		if want := map[string]string{"": "evil", "good": "good"}[root]; string(m.UpdateRoot) != want {
			t.Errorf("the root %q became %q", root, m.UpdateRoot)
		}
	}
}

func TestADeviceThatIsSentAwaySaysSoAndAsksRarely(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	back := make(chan struct{})
	f := openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-back:
			replying(t, ca.reply(id))(w, r)
		default:
			saying(403, `{"code":"retired","reason":"this device was retired"}`)(w, r)
		}
	})
	old := ca.reply(id)
	a, said, pauses := asMember(t, id, f.URL, old)
	a.background(t, a.stayMember)
	a.doubted()
	await(t, "the spread", pauses)
	for range 3 {
		if pause := await(t, "a pause", pauses); pause < renewRare/2 || pause > renewRare*3/2 {
			t.Errorf("it asks again in %s", pause)
		}
		if !a.dismissed.Load() || !a.session.rare.Load() {
			t.Error("it goes on as before")
		}
	}
	if n := strings.Count(said.String(), "was retired"); n != 1 {
		t.Errorf("said %d times: %s", n, said)
	}
	if m, err := loadMembership(a.cfg.path("identity"), id); err != nil || m == nil {
		t.Errorf("the membership is gone (%v)", err)
	}
	close(back)
	for a.dismissed.Load() {
		await(t, "a pause", pauses)
	}
	if a.session.rare.Load() {
		t.Error("it is a member again, and still slow")
	}
}

// A broker that refuses everybody must not have the fleet ask all the time.
func TestDoubtsAreAskedAboutEveryFewMinutesAtMost(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	fresh := ca.reply(id)
	f := openFront(t, ca.server("127.0.0.1"), replying(t, fresh))
	a, _, pauses := asMember(t, id, f.URL, ca.reply(id))
	a.background(t, a.stayMember)
	for range 5 {
		for range 10 {
			a.doubted()
		}
		if d := await(t, "the spread", pauses); d > doubtSpread {
			t.Errorf("it hesitates for %s", d)
		}
		if d := await(t, "the pause", pauses); d < renewGap/2 {
			t.Errorf("it may ask again in %s", d)
		}
	}
	if n := f.requests.Load(); n != 5 {
		t.Errorf("%d requests", n)
	}
}

func TestTheDataPlaneUsesTheNewCertificateWithoutARestart(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.TLS.PeerCertificates[0].SerialNumber.String())
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{ca.server("127.0.0.1")}, ClientCAs: ca.pool(), ClientAuth: tls.RequireAndVerifyClientCert}
	s.StartTLS()
	defer s.Close()
	a, _, _ := asMember(t, id, s.URL, ca.replyFor(id, time.Now().Add(-time.Minute)))
	a.web = &http.Client{Transport: dataPlane{&http.Transport{DialTLSContext: a.session.door.dial}, a.doubted}}
	if resp, err := a.web.Get(s.URL); err == nil {
		resp.Body.Close()
		t.Fatal("an ended certificate was taken")
	}
	await(t, "the doubt", a.doubts)
	for range 2 {
		fresh := &Membership{EnrolReply: ca.reply(id)}
		a.renewed(fresh, a.member.Load(), s.URL)
		resp, err := a.web.Get(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(got) != fresh.certificate().SerialNumber.String() {
			t.Error("it shows the old certificate")
		}
	}
	if len(a.doubts) != 0 {
		t.Error("a good answer raised a doubt")
	}
}

// The child saves one of two memberships again and again until it is killed.
func TestACrashWhileSavingLeavesTheOldOrTheNew(t *testing.T) {
	const env = "DEIMOS_TEST_SAVE"
	if dir := os.Getenv(env); dir != "" {
		saveForEver(dir)
	}
	ca, id := newAuthority(t), newIdentity(t)
	dir := t.TempDir()
	one, two := &Membership{EnrolReply: ca.reply(id)}, &Membership{EnrolReply: ca.reply(id)}
	two.UpdateRoot = bytes.Repeat([]byte("x"), 1<<20)
	for name, m := range map[string]*Membership{"one": one, "two": two} {
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := one.save(filepath.Join(dir, "identity")); err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	crashes := 10
	if testing.Short() {
		crashes = 4
	}
	for range crashes {
		c := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		c.Env = append(os.Environ(), env+"="+dir)
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it has begun
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rng.Int64N(int64(30 * time.Millisecond)))) // where the crash falls is the test's dice
		_ = c.Process.Kill()
		_ = c.Wait()
		m, err := loadMembership(filepath.Join(dir, "identity"), id)
		if err != nil || m == nil {
			t.Fatalf("%v", err)
		}
		if n := len(m.UpdateRoot); n != 0 && n != len(two.UpdateRoot) {
			t.Errorf("a mixture: %d bytes of root", n)
		}
	}
}

func saveForEver(dir string) {
	var m [2]Membership
	for i, name := range []string{"one", "two"} {
		raw := must(os.ReadFile(filepath.Join(dir, name)))
		if err := json.Unmarshal(raw, &m[i]); err != nil {
			panic(err)
		}
	}
	for i := 0; ; i++ {
		if err := m[i%2].save(filepath.Join(dir, "identity")); err != nil {
			panic(err)
		}
		if i == 0 {
			os.Stdout.WriteString("!")
		}
	}
}

// The whole agent on a board whose clock says what it likes: it waits to be
// claimed, says hello, works and renews.
func TestAWrongClockAtBootStopsNothing(t *testing.T) {
	for name, at := range map[string]time.Time{"1970": boot1970, "2050": time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC)} {
		t.Run(name, func(t *testing.T) {
			ca := newAuthority(t)
			b := startBroker(t, ca, rules)
			o := b.office()
			state := t.TempDir()
			id, err := LoadIdentity(filepath.Join(state, "identity"))
			if err != nil {
				t.Fatal(err)
			}
			answers := make(chan wire.EnrolReply, 2)
			for _, end := range []time.Duration{10 * time.Minute, 24 * time.Hour} { // the first is past two thirds
				r := ca.replyFor(id, time.Now().Add(end))
				r.Brokers = []string{"ssl://127.0.0.1:" + b.port}
				answers <- r
			}
			var last wire.EnrolReply
			renewals := make(chan struct{}, 2)
			f := openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
				select {
				case last = <-answers:
				default: // the last one again
				}
				replying(t, last)(w, r)
				renewals <- struct{}{}
			})
			began := time.Now()
			cfg := Config{
				Coordinator: f.URL, StateDir: state, Version: "1.2.3", Released: began.AddDate(0, 0, -30),
				Volumes: []VolumeConfig{{Dir: filepath.Join(state, "volume")}}, Log: discardLog(),
				SystemTime: func() time.Time { return at.Add(time.Since(began)) },
			}
			ctx, cancel := context.WithCancel(context.Background())
			over := make(chan error, 1)
			go func() { over <- Run(ctx, cfg) }()
			defer func() {
				cancel()
				if err := await(t, "the agent's end", over); err != nil {
					t.Error(err)
				}
			}()
			await(t, "the enrolment", renewals)
			hello := o.presence(id, true)
			if hello.TimeConfidence == wire.ClockTrusted || len(hello.Instance) != 32 {
				t.Errorf("hello %+v", hello)
			}
			o.welcome(id, hello.Nonce, time.Now())
			o.send(id, ca.seal(wire.TypeOrder, wire.Order{
				ID: "01J00000000000000000000000", Device: id.ID, Kind: wire.KindChunkDrop, Issued: time.Now(), Expires: time.Now().Add(time.Hour), Body: json.RawMessage(`{"ids":[]}`),
			}))
			for {
				m := await(t, "the report", o.got)
				if m.Topic() != wire.Topic(id.ID, wire.ChannelReport) {
					continue
				}
				r, err := wire.OpenAs[wire.Report](m.Payload(), id.key.Public().(ed25519.PublicKey), wire.TypeReport)
				if err != nil {
					t.Fatal(err)
				}
				if r.State == wire.Succeeded {
					if d := time.Since(r.At); d < -time.Minute || d > time.Minute || r.TimeConfidence != wire.ClockTrusted {
						t.Errorf("reported at %s, %s", r.At, r.TimeConfidence)
					}
					break
				}
				if r.State.Terminal() {
					t.Fatalf("%+v", r)
				}
			}
			await(t, "the renewal", renewals)
		})
	}
}

// A member whose certificate is good for long, and which is given another address, as
// by its owner or because its coordinator has moved, asks there without being refused
// first; and keeps the address if the answer is its own fleet's.
func TestMemberFollowsItsCoordinatorToAnotherAddress(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	for claim, c := range map[string]struct {
		server *authority
		moves  bool
	}{"its own fleet": {ca, true}, "another fleet": {newAuthority(t), false}} {
		f := openFront(t, c.server.server("127.0.0.1"), replying(t, c.server.reply(id)))
		a, _, pauses := asMember(t, id, "https://127.0.0.1:1", ca.replyFor(id, time.Now().Add(1000*time.Hour)))
		a.cfg.Coordinator = f.URL
		a.background(t, a.stayMember)
		await(t, "the question", pauses)
		if moved := a.member.Load().Coordinator == f.URL; moved != c.moves {
			t.Errorf("%s: the member moved: %v", claim, moved)
		}
	}
}
