package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/health"
	"github.com/deimos-edge/deimos/wire"
)

// front is a coordinator's front door that counts what gets through TLS.
type front struct {
	*httptest.Server
	requests atomic.Int64
}

// open starts a server with this certificate. Its handshakes' errors are what
// the tests want, so they are not logged.
func openFront(t *testing.T, cert tls.Certificate, answer http.HandlerFunc) *front {
	t.Helper()
	f := &front{}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		answer(w, r)
	}))
	f.Config.ErrorLog = log.New(io.Discard, "", 0)
	f.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}
	f.StartTLS()
	t.Cleanup(f.Close)
	return f
}

// at is the server's address under another host name of this machine.
func (f *front) at(host string) string {
	u, err := url.Parse(f.URL)
	if err != nil {
		panic(err)
	}
	return "https://" + net.JoinHostPort(host, u.Port())
}

func replying(t *testing.T, reply wire.EnrolReply) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if err := json.NewEncoder(w).Encode(reply); err != nil {
			t.Error(err)
		}
	}
}

func ask(id Identity, base string, tok wire.FleetToken) (*Membership, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	m, _, err := enrol(ctx, id, pinned(tok.Fingerprint, NewClock(time.Time{})), base, wire.EnrolRequest{Agent: "1.2.3", Token: tok.String()})
	return m, err
}

func TestEnrolmentAtThePinnedCoordinator(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	tok := ca.token()
	f := openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
		var q wire.EnrolRequest
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			t.Error(err)
		}
		csr, err := x509.ParseCertificateRequest(q.CSR)
		if err != nil || csr.CheckSignature() != nil || !id.key.Public().(ed25519.PublicKey).Equal(csr.PublicKey) {
			t.Errorf("the request does not prove the key: %v", err)
		}
		if r.Method != http.MethodPost || r.URL.Path != "/enrol/v1" || q.Token != tok.String() || q.Agent != "1.2.3" {
			t.Errorf("%s %s %+v", r.Method, r.URL.Path, q)
		}
		replying(t, ca.reply(id))(w, r)
	})
	m, err := ask(id, f.URL, tok)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "identity")
	if err := m.save(dir); err != nil {
		t.Fatal(err)
	}
	kept, err := loadMembership(dir, id)
	if err != nil || kept == nil || kept.Coordinator != f.URL || string(kept.Certificate) != string(m.Certificate) {
		t.Errorf("kept %+v, %v", kept, err)
	}
	if info, err := os.Stat(filepath.Join(dir, membershipFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// TestNoSecretForAnImpostor: whoever is not the pinned authority's server must
// see no request at all, because the first bytes of one are the token.
func TestNoSecretForAnImpostor(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	id := newIdentity(t)
	member := newKey(t)
	impostor := theirs.server("127.0.0.1")
	alone := ours.server("127.0.0.1")
	alone.Certificate = alone.Certificate[:1]
	for what, tc := range map[string]struct {
		cert      tls.Certificate
		host      string
		floor     time.Time
		untrusted bool
	}{
		"another authority, same name":      {cert: impostor, untrusted: true},
		"another one that adds ours":        {cert: tls.Certificate{Certificate: [][]byte{impostor.Certificate[0], ours.cert.Raw}, PrivateKey: impostor.PrivateKey}, untrusted: true},
		"our authority's, for another host": {cert: ours.server("elsewhere.example")},
		"right address, asked by name":      {cert: ours.server("127.0.0.1"), host: "localhost"},
		"a member's certificate":            {cert: tls.Certificate{Certificate: [][]byte{ours.issue(member.Public(), "x", x509.ExtKeyUsageClientAuth, "127.0.0.1"), ours.cert.Raw}, PrivateKey: member}},
		"ours, without the authority":       {cert: alone, untrusted: true},
		"ours, long expired":                {cert: ours.server("127.0.0.1"), floor: time.Now().AddDate(1, 0, 0)},
	} {
		t.Run(what, func(t *testing.T) {
			if tc.host == "" {
				tc.host = "127.0.0.1"
			}
			f := openFront(t, tc.cert, replying(t, ours.reply(id)))
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			m, _, err := enrol(ctx, id, pinned(ours.token().Fingerprint, NewClock(tc.floor)), f.at(tc.host), wire.EnrolRequest{})
			if err == nil {
				t.Errorf("enrolled: %+v", m)
			}
			if errors.Is(err, errStranger) != tc.untrusted {
				t.Errorf("error %v; untrusted must be %t", err, tc.untrusted)
			}
			if n := f.requests.Load(); n != 0 {
				t.Errorf("it saw %d requests, token included", n)
			}
		})
	}
}

func TestTokenFollowsNoRedirect(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	var seen atomic.Int64
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { seen.Add(1) }))
	defer plain.Close()
	f := openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL, http.StatusTemporaryRedirect)
	})
	if _, err := ask(id, f.URL, ca.token()); err == nil {
		t.Error("enrolled by a redirect")
	}
	if n := seen.Load(); n != 0 {
		t.Errorf("%d requests were sent elsewhere, in the clear", n)
	}
}

// TestEnrolmentWithoutAClock: a new board has no battery, and no network time
// before it has a network.
func TestEnrolmentWithoutAClock(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	f := openFront(t, ca.server("127.0.0.1"), replying(t, ca.reply(id)))
	c := clockWith(time.Time{}, &hardware{boot1970})
	m, _, err := enrol(t.Context(), id, pinned(ca.token().Fingerprint, c), f.URL, wire.EnrolRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m.issued().Before(time.Now().Add(-2 * time.Hour)) {
		t.Errorf("the certificate says it was issued at %s", m.issued())
	}
}

func TestRefusalSaysTheCoordinatorsSentence(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	var status int
	var body string
	f := openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
	for _, tc := range []struct {
		status  int
		body    string
		says    string
		refused bool
	}{
		{403, `{"code":"token_refused","reason":"the token is used up; make another"}`, "the token is used up", true},
		{404, "no such page", "404", true},
		{400, `{"reason":""}`, "400", true},
		{408, `{}`, "408", false},
		{429, `{"reason":"slowly"}`, "slowly", false},
		{500, `<html>`, "500", false},
		{503, `{"reason":"the coordinator is starting"}`, "is starting", false},
		{200, `not JSON`, "cannot be read", false},
		{200, ``, "cannot be read", false},
	} {
		status, body = tc.status, tc.body
		_, err := ask(id, f.URL, ca.token())
		if err == nil || !strings.Contains(err.Error(), tc.says) || errors.Is(err, ErrRefused) != tc.refused {
			t.Errorf("%d %s: error %v, want %q and refused %t", tc.status, tc.body, err, tc.says, tc.refused)
		}
	}
}

func TestBadAddressIsNoReasonToTryAgain(t *testing.T) {
	for _, base := range []string{"", "localhost:8443", "http://localhost:8443", "https://", "https://%zz"} {
		if _, err := ask(newIdentity(t), base, newAuthority(t).token()); !errors.Is(err, ErrAddress) {
			t.Errorf("%q: %v", base, err)
		}
	}
}

func TestAnswerWithoutEndIsCut(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	sent := make(chan int, 1)
	f := openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
		n := 0
		for block := make([]byte, 64<<10); ; {
			m, err := w.Write(block)
			n += m
			if err != nil || r.Context().Err() != nil {
				break
			}
		}
		sent <- n
	})
	if _, err := ask(id, f.URL, ca.token()); err == nil {
		t.Error("enrolled")
	}
	// A mebibyte is read; the rest stands in buffers of both kernels.
	if n := await(t, "the server to be cut off", sent); n > 64<<20 {
		t.Errorf("%d bytes were taken", n)
	}
}

func TestAnswerForAnotherIsRefused(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	id, other := newIdentity(t), newIdentity(t)
	for what, spoil := range map[string]func(*wire.EnrolReply){
		"another device":              func(r *wire.EnrolReply) { *r = ours.reply(other) },
		"another device's key":        func(r *wire.EnrolReply) { r.Certificate = ours.reply(other).Certificate },
		"another authority":           func(r *wire.EnrolReply) { r.CA = theirs.pem() },
		"ours, and another behind it": func(r *wire.EnrolReply) { r.CA = append(ours.pem(), theirs.pem()...) },
		"no authority":                func(r *wire.EnrolReply) { r.CA = nil },
		"no certificate":              func(r *wire.EnrolReply) { r.Certificate = nil },
		"a broken certificate": func(r *wire.EnrolReply) {
			r.Certificate = []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		},
		"a certificate of others":   func(r *wire.EnrolReply) { r.Certificate = theirs.reply(id).Certificate },
		"no key for orders":         func(r *wire.EnrolReply) { r.OrderKey = nil },
		"half a key for orders":     func(r *wire.EnrolReply) { r.OrderKey = r.OrderKey[:16] },
		"no broker":                 func(r *wire.EnrolReply) { r.Brokers = nil },
		"a broker in the clear":     func(r *wire.EnrolReply) { r.Brokers = []string{"tcp://127.0.0.1:1883"} },
		"no data plane":             func(r *wire.EnrolReply) { r.DataPlane = nil },
		"a data plane in the clear": func(r *wire.EnrolReply) { r.DataPlane = []string{"http://127.0.0.1"} },
	} {
		t.Run(what, func(t *testing.T) {
			reply := ours.reply(id)
			spoil(&reply)
			f := openFront(t, ours.server("127.0.0.1"), replying(t, reply))
			a := joining(t, id, f.URL, ours.token().String())
			// Once is enough to see that nothing is kept.
			a.rest = func(context.Context, time.Duration) error { return context.Canceled }
			if err := a.join(t.Context()); err == nil {
				t.Error("joined")
			}
			if _, err := os.Stat(a.cfg.path("identity", membershipFile)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the answer was kept (%v)", err)
			}
		})
	}
}

// joining is an agent just before it enrols.
func joining(t *testing.T, id Identity, base, token string) *Agent {
	t.Helper()
	return &Agent{
		cfg: Config{Coordinator: base, Token: token, StateDir: t.TempDir()},
		log: discardLog(), id: id, hw: bareMachine(), clock: NewClock(time.Time{}), rest: rest,
	}
}

// bareMachine has found nothing yet.
func bareMachine() *machine {
	m := &machine{log: discardLog(), changed: make(chan struct{}, 1), health: health.New(time.Now)}
	m.inv.Store(&inventory{&hw.Inventory{}, ""})
	return m
}

func TestEnrolmentIsTriedUntilItSucceeds(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	const fail = 12
	var f *front
	f = openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
		if f.requests.Load() <= fail {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		replying(t, ca.reply(id))(w, r)
	})
	a := joining(t, id, f.URL, ca.token().String())
	var pauses []time.Duration
	a.rest = func(_ context.Context, d time.Duration) error { pauses = append(pauses, d); return nil }
	if err := a.join(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(pauses) != fail {
		t.Errorf("%d pauses, want %d", len(pauses), fail)
	}
	want := enrolMin
	for i, d := range pauses {
		if d < want/2 || d > want*3/2 {
			t.Errorf("pause %d is %s, want %s give or take a half", i, d, want)
		}
		want = min(2*want, enrolMax)
	}
	// The next start asks nobody.
	f.Close()
	again := joining(t, id, "", "")
	again.cfg.StateDir = a.cfg.StateDir
	if err := again.join(t.Context()); err != nil || again.member.Load() == nil {
		t.Errorf("after a restart: %v", err)
	}
}

// A coordinator that has too much to do says when to come again.
func TestRetryAfterIsHeededWithinBounds(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	for said, bound := range map[string][2]time.Duration{
		"90":      {90 * time.Second, 113 * time.Second},
		"9999999": {claimMax, claimMax * 5 / 4},
		"-3":      {0, enrolMin * 3 / 2},
		"soon":    {0, enrolMin * 3 / 2},
	} {
		var f *front
		f = openFront(t, ca.server("127.0.0.1"), func(w http.ResponseWriter, r *http.Request) {
			if f.requests.Load() == 1 {
				w.Header().Set("Retry-After", said)
				saying(http.StatusTooManyRequests, `{"reason":"too many"}`)(w, r)
				return
			}
			replying(t, ca.reply(id))(w, r)
		})
		for _, token := range []string{ca.token().String(), ""} {
			f.requests.Store(0)
			a := joining(t, id, f.URL, token)
			var pauses []time.Duration
			a.rest = func(_ context.Context, d time.Duration) error { pauses = append(pauses, d); return nil }
			if err := a.join(t.Context()); err != nil {
				t.Fatal(err)
			}
			if len(pauses) != 1 || pauses[0] < bound[0] || pauses[0] > bound[1] {
				t.Errorf("Retry-After %s, token %t: it waits %s", said, token != "", pauses)
			}
		}
	}
}

func TestEnrolmentIsTriedUntilTheAgentEnds(t *testing.T) {
	ca := newAuthority(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := l.Addr().String()
	l.Close()
	a := joining(t, newIdentity(t), "https://"+gone, ca.token().String())
	ctx, cancel := context.WithCancel(t.Context())
	tries := 0
	a.rest = func(ctx context.Context, _ time.Duration) error {
		if tries++; tries == 5 {
			cancel()
			return rest(ctx, time.Hour) // the real one, which must notice
		}
		return nil
	}
	if err := a.join(ctx); !errors.Is(err, context.Canceled) || tries != 5 {
		t.Errorf("error %v after %d tries", err, tries)
	}
}

func TestRefusedOrUntrustedIsNotTriedAgain(t *testing.T) {
	ours, theirs, id := newAuthority(t), newAuthority(t), newIdentity(t)
	deny := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }
	for what, tc := range map[string]struct {
		front *front
		token string
		want  error
	}{
		"refused":                     {openFront(t, ours.server("127.0.0.1"), deny), ours.token().String(), ErrRefused},
		"untrusted":                   {openFront(t, theirs.server("127.0.0.1"), deny), ours.token().String(), ErrUntrusted},
		"no token":                    {openFront(t, ours.server("127.0.0.1"), deny), "deimos_oops", wire.ErrToken},
		"not let in, without a token": {openFront(t, ours.server("127.0.0.1"), deny), "", ErrRefused},
	} {
		a := joining(t, id, tc.front.URL, tc.token)
		a.rest = func(context.Context, time.Duration) error { t.Errorf("%s: tried again", what); return context.Canceled }
		if err := a.join(t.Context()); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestDamagedMembershipIsNamedAndKept(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	whole, err := json.Marshal(Membership{EnrolReply: ca.reply(id)})
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := json.Marshal(Membership{EnrolReply: ca.reply(newIdentity(t))})
	if err != nil {
		t.Fatal(err)
	}
	for what, raw := range map[string][]byte{
		"empty": {}, "cut": whole[:len(whole)/2], "zeroed": make([]byte, 100), "hollow": []byte("{}"),
		"of another device": foreign,
	} {
		t.Run(what, func(t *testing.T) {
			a := joining(t, id, "https://127.0.0.1:1", ca.token().String())
			path := a.cfg.path("identity", membershipFile)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			a.rest = func(context.Context, time.Duration) error {
				t.Error("it enrols anew by itself")
				return context.Canceled
			}
			err := a.join(t.Context())
			if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "remove") {
				t.Errorf("error %v, want the file and what to do", err)
			}
			if now, err := os.ReadFile(path); err != nil || string(now) != string(raw) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
}

// TestEnrolmentGivesUpOnASilentServer: a server that takes the request and then
// says nothing must not hold the agent when it is to end.
func TestEnrolmentGivesUpOnASilentServer(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	asked, over := make(chan struct{}), make(chan struct{})
	var once sync.Once
	f := openFront(t, ca.server("127.0.0.1"), func(_ http.ResponseWriter, r *http.Request) {
		once.Do(func() { close(asked) })
		<-over
	})
	defer close(over)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	a := joining(t, id, f.URL, ca.token().String())
	go func() { done <- a.join(ctx) }()
	await(t, "the request", asked)
	cancel()
	if err := await(t, "the end", done); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
