package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// reception is an enrolment door without tokens: it lets wait until it is told to
// answer otherwise.
type reception struct {
	*front
	answers chan http.HandlerFunc // for the next requests, one each; then pending again
	asked   chan wire.EnrolRequest
}

func openReception(t *testing.T, cert tls.Certificate) *reception {
	t.Helper()
	d := &reception{answers: make(chan http.HandlerFunc, 16), asked: make(chan wire.EnrolRequest, 1024)}
	d.front = openFront(t, cert, func(w http.ResponseWriter, r *http.Request) {
		var q wire.EnrolRequest
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			t.Error(err)
		}
		select {
		case answer := <-d.answers:
			answer(w, r)
		default:
			waiting(q, 7)(w, r)
		}
		d.asked <- q
	})
	return d
}

// deviceOf is who asks.
func deviceOf(q wire.EnrolRequest) wire.DeviceID {
	csr, err := x509.ParseCertificateRequest(q.CSR)
	if err != nil {
		return ""
	}
	return wire.IDOf(csr.PublicKey.(ed25519.PublicKey))
}

// waiting is the answer to a device that nobody has claimed.
func waiting(q wire.EnrolRequest, retry int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusAccepted)
		_ = json.NewEncoder(w).Encode(wire.EnrolPending{Device: deviceOf(q), RetrySeconds: retry})
	}
}

func saying(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

// paced is an agent that waits to be claimed and whose pauses the test ends.
type paced struct {
	*Agent
	pauses chan time.Duration
	goOn   chan struct{}
	said   *lockedBuffer
	joined chan error
}

func startJoining(t *testing.T, id Identity, base, state string) *paced {
	t.Helper()
	p := &paced{pauses: make(chan time.Duration), goOn: make(chan struct{}), said: &lockedBuffer{}, joined: make(chan error, 1)}
	p.Agent = joining(t, id, base, "")
	if state != "" {
		p.cfg.StateDir = state
	}
	p.log = slog.New(slog.NewTextHandler(p.said, nil))
	p.rest = func(ctx context.Context, d time.Duration) error {
		select {
		case p.pauses <- d:
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case <-p.goOn:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() { defer close(over); p.joined <- p.join(ctx) }()
	t.Cleanup(func() { cancel(); await(t, "join to end", over) })
	return p
}

func (p *paced) code(ca *authority) string {
	return wire.ClaimCode(p.id.key.Public().(ed25519.PublicKey), wire.Fingerprint(ca.cert.Raw))
}

func wantGone(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there (%v)", path, err)
		}
	}
}

func TestADeviceWithoutATokenWaitsUnderItsCodeUntilItIsClaimed(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	d := openReception(t, ca.server("127.0.0.1"))
	p := startJoining(t, id, d.URL, "")
	pause := await(t, "the pause after the first question", p.pauses)
	if pause < 7*time.Second || pause > 9*time.Second {
		t.Errorf("it asks again in %s, was told 7 s", pause)
	}
	if q := await(t, "the question", d.asked); q.Token != "" || q.Agent != p.cfg.Version || deviceOf(q) != id.ID {
		t.Errorf("asked %+v", q)
	}
	want := p.code(ca)
	if raw, err := os.ReadFile(p.cfg.path(claimFile)); err != nil || string(raw) != want+"\n" {
		t.Errorf("the file says %q (%v), want %s", raw, err, want)
	}
	if _, err := loadPending(p.cfg.path("identity")); err != nil {
		t.Error(err)
	}
	p.goOn <- struct{}{}
	await(t, "the next pause", p.pauses)
	if n := strings.Count(p.said.String(), "deimos device claim "+want); n != 1 {
		t.Errorf("the owner is told %d times: %s", n, p.said)
	}
	reply := ca.reply(id)
	d.answers <- replying(t, reply)
	p.goOn <- struct{}{}
	if err := await(t, "the membership", p.joined); err != nil {
		t.Fatal(err)
	}
	m, err := loadMembership(p.cfg.path("identity"), id)
	if err != nil || m == nil || string(m.Certificate) != string(reply.Certificate) || m.Coordinator != d.URL {
		t.Errorf("kept %+v, %v", m, err)
	}
	wantGone(t, p.cfg.path(claimFile), p.cfg.path("identity", pendingFile))
}

// The authority is on disk before the first word is said, and after a restart it
// is that one and no other.
func TestWhoAnswersFirstIsKeptBeforeAnythingIsSaid(t *testing.T) {
	ours, theirs, id := newAuthority(t), newAuthority(t), newIdentity(t)
	state := t.TempDir()
	var kept []byte
	f := openFront(t, ours.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
		kept, _ = os.ReadFile(Config{StateDir: state}.path("identity", pendingFile))
		saying(http.StatusServiceUnavailable, "")(w, r)
	})
	p := startJoining(t, id, f.URL, state)
	await(t, "a pause", p.pauses)
	if len(kept) == 0 {
		t.Fatal("it spoke before it kept the authority")
	}
	if err := await(t, "its end", stopped(p)); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	// Another authority at the same address, under the same name.
	impostor := openFront(t, theirs.server("127.0.0.1"), replying(t, theirs.reply(id)))
	raw := []byte(strings.ReplaceAll(string(kept), f.URL, impostor.URL))
	if err := os.WriteFile(p.cfg.path("identity", pendingFile), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	again := startJoining(t, id, impostor.URL, state)
	for range 3 {
		await(t, "a pause", again.pauses)
		again.goOn <- struct{}{}
	}
	if n := impostor.requests.Load(); n != 0 {
		t.Errorf("the impostor got %d requests", n)
	}
	if says := again.said.String(); !strings.Contains(says, "somebody else answers") || !strings.Contains(says, "remove") {
		t.Errorf("log: %s", says)
	}
	if now, err := os.ReadFile(p.cfg.path("identity", pendingFile)); err != nil || string(now) != string(raw) {
		t.Errorf("the authority was replaced (%v)", err)
	}
	wantGone(t, again.cfg.path("identity", membershipFile))
}

// stopped ends a join through its pause.
func stopped(p *paced) <-chan error {
	p.rest = func(context.Context, time.Duration) error { return context.Canceled }
	p.goOn <- struct{}{}
	return p.joined
}

// An impostor in front of a new device is all that the device sees. It can have
// the device wait with it, under a code that the coordinator does not know.
func TestAnImpostorHasAnotherCode(t *testing.T) {
	ours, theirs, id := newAuthority(t), newAuthority(t), newIdentity(t)
	d := openReception(t, theirs.server("127.0.0.1"))
	p := startJoining(t, id, d.URL, "")
	await(t, "a pause", p.pauses)
	if raw, err := os.ReadFile(p.cfg.path(claimFile)); err != nil || string(raw) == p.code(ours)+"\n" {
		t.Errorf("it shows %q (%v)", raw, err)
	}
	// With our authority's certificate in its answer it gets no further.
	d.answers <- replying(t, ours.reply(id))
	p.goOn <- struct{}{}
	await(t, "the next pause", p.pauses)
	wantGone(t, p.cfg.path("identity", membershipFile))
}

func TestAServerWithoutItsAuthorityIsNotWaitedFor(t *testing.T) {
	ca, other, id := newAuthority(t), newAuthority(t), newIdentity(t)
	good := ca.server("127.0.0.1")
	alone, wrong := good, good
	alone.Certificate = good.Certificate[:1]
	wrong.Certificate = [][]byte{good.Certificate[0], other.cert.Raw}
	for what, tc := range map[string]struct {
		cert tls.Certificate
		host string
	}{
		"alone":                {alone, "127.0.0.1"},
		"another one's":        {wrong, "127.0.0.1"},
		"for another host":     {good, "localhost"},
		"a leaf for authority": {tls.Certificate{Certificate: [][]byte{good.Certificate[0], good.Certificate[0]}, PrivateKey: good.PrivateKey}, "127.0.0.1"},
	} {
		t.Run(what, func(t *testing.T) {
			f := openFront(t, tc.cert, saying(500, ""))
			p := startJoining(t, id, f.at(tc.host), "")
			await(t, "a pause", p.pauses)
			if n := f.requests.Load(); n != 0 {
				t.Errorf("%d requests", n)
			}
			wantGone(t, p.cfg.path("identity", pendingFile), p.cfg.path(claimFile))
		})
	}
}

func TestAWaitingDeviceOutlastsWhatTheCoordinatorSays(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	d := openReception(t, ca.server("127.0.0.1"))
	p := startJoining(t, id, d.URL, "")
	await(t, "a pause", p.pauses)
	q := await(t, "the question", d.asked)
	for what, tc := range map[string]struct {
		answer   http.HandlerFunc
		min, max time.Duration
	}{
		"at once":         {waiting(q, 0), claimMin, claimMin * 5 / 4},
		"before that":     {waiting(q, -1<<31), claimMin, claimMin * 5 / 4},
		"in an age":       {waiting(q, 1<<31-1), claimMax, claimMax * 5 / 4},
		"in ten seconds":  {waiting(q, 10), 10 * time.Second, 12500 * time.Millisecond},
		"too many":        {saying(429, `{"reason":"slowly"}`), enrolMin / 2, claimMax * 3 / 2},
		"broken":          {saying(500, ``), enrolMin / 2, claimMax * 3 / 2},
		"not for it":      {waiting(wire.EnrolRequest{CSR: must(newIdentity(t).csr())}, 5), enrolMin / 2, claimMax * 3 / 2},
		"no JSON":         {saying(202, `<html>`), enrolMin / 2, claimMax * 3 / 2},
		"for another key": {replying(t, ca.reply(newIdentity(t))), enrolMin / 2, claimMax * 3 / 2},
	} {
		d.answers <- tc.answer
		p.goOn <- struct{}{}
		if pause := await(t, "the pause", p.pauses); pause < tc.min || pause > tc.max {
			t.Errorf("%s: it asks again in %s", what, pause)
		}
	}
	wantGone(t, p.cfg.path("identity", membershipFile))
	// A word is a word, though.
	d.answers <- saying(403, `{"code":"retired","reason":"this device was retired\u001b[2J"}`)
	p.goOn <- struct{}{}
	err := await(t, "the end", p.joined)
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "was retired") || strings.ContainsRune(err.Error(), 0x1b) {
		t.Errorf("%q", err)
	}
}

// With 2050 or 1970 on its clock.
func TestClaimWithoutAClock(t *testing.T) {
	for _, at := range []time.Time{boot1970, time.Now().AddDate(24, 0, 0)} {
		ca, id := newAuthority(t), newIdentity(t)
		d := openReception(t, ca.server("127.0.0.1"))
		d.answers <- replying(t, ca.reply(id))
		a := joining(t, id, d.URL, "")
		a.clock.system = (&hardware{at}).now
		if err := a.join(t.Context()); err != nil {
			t.Errorf("%s: %v", at, err)
		}
	}
}

// A token of another fleet moves a member; one that is refused leaves it where
// it is, and one of its own fleet asks nobody.
func TestATokenOfAnotherFleetMovesAMember(t *testing.T) {
	ours, theirs, id := newAuthority(t), newAuthority(t), newIdentity(t)
	at := openFront(t, ours.server("127.0.0.1"), replying(t, ours.reply(id)))
	token := ours.token().String()
	a := joining(t, id, at.URL, token)
	if err := a.join(t.Context()); err != nil {
		t.Fatal(err)
	}
	state := a.cfg.StateDir
	start := func(base, token string) *Agent {
		a := joining(t, id, base, token)
		a.cfg.StateDir = state
		if err := a.join(t.Context()); err != nil {
			t.Fatal(err)
		}
		return a
	}
	start(at.URL, token)
	start(at.URL, ours.token().String())
	start(at.URL, "")
	if n := at.requests.Load(); n != 1 {
		t.Errorf("a member asked %d times", n-1)
	}
	deny := openFront(t, theirs.server("127.0.0.1"), saying(403, `{"reason":"used up"}`))
	for _, bad := range []string{theirs.token().String(), "deimos_oops"} {
		if a := start(deny.URL, bad); a.member.Load().Coordinator != at.URL || string(a.member.Load().CA) != string(ours.pem()) {
			t.Error("a refused token changed the membership")
		}
	}
	take := openFront(t, theirs.server("127.0.0.1"), replying(t, theirs.reply(id)))
	// What it trusts of the old fleet's releases would refuse the new one's for ever.
	trusted := a.cfg.path("ota", "tuf")
	if err := errors.Join(os.MkdirAll(trusted, 0o700), os.WriteFile(filepath.Join(trusted, "enrolled.root.json"), []byte("of the old fleet"), 0o600)); err != nil {
		t.Fatal(err)
	}
	start(deny.URL, theirs.token().String())
	if left, _ := os.ReadDir(trusted); len(left) != 1 {
		t.Error("a refused token took what the device trusts")
	}
	if a := start(take.URL, theirs.token().String()); string(a.member.Load().CA) != string(theirs.pem()) || a.member.Load().Coordinator != take.URL {
		t.Error("the new token did not move it")
	}
	if left, _ := os.ReadDir(trusted); len(left) != 0 {
		t.Errorf("it still trusts what the old fleet signed: %v", left)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
