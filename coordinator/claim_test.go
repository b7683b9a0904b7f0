package coordinator

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// knocks makes the enrolment call of a device that has no token.
func (w *world) knocks(t *testing.T, key ed25519.PrivateKey) (int, wire.EnrolPending, wire.APIError) {
	t.Helper()
	rec := w.enrolHere(wire.EnrolRequest{CSR: csr(t, key), Agent: "1.0.0", Board: "Pi\x1b 4", Inventory: json.RawMessage(`{"big":"` + strings.Repeat("x", 10_000) + `"}`)})
	var p wire.EnrolPending
	var e wire.APIError
	if rec.Code < 400 {
		must(t, json.Unmarshal(rec.Body.Bytes(), &p))
	} else {
		must(t, json.Unmarshal(rec.Body.Bytes(), &e))
	}
	return rec.Code, p, e
}

func (w *world) codeFor(key ed25519.PrivateKey) string {
	return wire.ClaimCode(key.Public().(ed25519.PublicKey), wire.Fingerprint(w.auth.caCert.Raw))
}

func (w *world) pendingCodes(t *testing.T) []string {
	t.Helper()
	list, err := w.op.Pending(testContext(t))
	must(t, err)
	var out []string
	for _, p := range list {
		out = append(out, p.Code)
	}
	return out
}

func TestADeviceWithoutATokenWaitsUntilItIsClaimed(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	key := newKey(t)
	id := wire.IDOf(key.Public().(ed25519.PublicKey))
	code := w.codeFor(key)
	for range 3 {
		status, p, _ := w.knocks(t, key)
		if status != http.StatusAccepted || p.Device != id || p.RetrySeconds < 1 || !p.Expires.After(w.now()) {
			t.Fatalf("%d %+v", status, p)
		}
	}
	if w.reg.known(id) {
		t.Fatal("a device that nobody claimed is a member")
	}
	list, err := w.op.Pending(testContext(t))
	if err != nil || len(list) != 1 || list[0].Code != code || list[0].Device != id || list[0].Board != "Pi 4" || list[0].Address == "" {
		t.Fatalf("%+v %v", list, err)
	}
	v, err := w.op.Claim(testContext(t), api.Claim{Code: " " + strings.ToUpper(strings.ReplaceAll(code, "-", " ")), Group: "attic", Labels: map[string]string{"floor": "3"}})
	if err != nil || v.ID != id || v.Group != "attic" || v.Labels["floor"] != "3" {
		t.Fatalf("%+v %v", v, err)
	}
	if codes := w.pendingCodes(t); len(codes) != 0 {
		t.Errorf("a member still waits: %v", codes)
	}
	status, m, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, key), Agent: "1.0.0", Board: "Pi 4"})
	if status != http.StatusOK || m.Device != id || len(m.Certificate) == 0 {
		t.Fatalf("%d %s", status, e.Reason)
	}
	d, err := w.reg.device(id)
	if err != nil || d.Group != "attic" || d.Labels["floor"] != "3" || d.CertUntil.IsZero() || d.Token != "" {
		t.Errorf("%+v %v", d, err)
	}
	_, err = w.op.Claim(testContext(t), api.Claim{Code: code})
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound) // not a second time
}

// Both have found the code before either has made the device a member.
func TestTwoClaimsOfOneCodeMakeOneMember(t *testing.T) {
	t.Parallel()
	for name, groups := range map[string][]string{"differing": {"attic", "cellar"}, "alike": {"attic", "attic"}} {
		t.Run(name, func(t *testing.T) {
			w := ownWorld(t)
			key := newKey(t)
			w.knocks(t, key)
			id := wire.IDOf(key.Public().(ed25519.PublicKey))
			p, err := w.waiting.find(w.codeFor(key))
			must(t, err)
			var made []api.Device
			refused := 0
			for _, g := range groups {
				v, err := w.op.Claim(testContext(t), api.Claim{Code: w.codeFor(key), Group: g})
				if err != nil {
					wantRefusal(t, err, http.StatusConflict, "claimed")
					refused++
				} else if made = append(made, v); v.Group != g {
					t.Errorf("who asked for %s is told %s", g, v.Group)
				}
				_, err = w.waiting.rows.change(testContext(t), string(id), func(v *PendingRecord, _ bool) error { *v = p; return nil })
				must(t, err)
			}
			if differ := groups[0] != groups[1]; (refused == 1) != differ || len(made)+refused != 2 {
				t.Errorf("%d made, %d refused", len(made), refused)
			}
			page, err := w.trail.page(testContext(t), 0, 1000)
			must(t, err)
			n := 0
			for _, e := range page.Entries {
				if strings.Contains(string(e), "device.enrol") {
					n++
				}
			}
			if n != 1 {
				t.Errorf("%d entries say that it was enrolled", n)
			}
		})
	}
}

func TestWrongClaimCodesAreExplained(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	for code, want := range map[string]struct {
		status int
		code   string
	}{
		w.codeFor(newKey(t)): {http.StatusNotFound, wire.CodeNotFound},
		"abc":                {http.StatusBadRequest, "bad_code"},
		"aaaaa-aaaaa-aaaa1":  {http.StatusBadRequest, "bad_code"},
	} {
		_, err := w.op.Claim(testContext(t), api.Claim{Code: code})
		wantRefusal(t, err, want.status, want.code)
		wantRefusal(t, w.op.RejectClaim(testContext(t), code), want.status, want.code)
	}
}

func TestARejectedDeviceIsRefusedForADay(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	key := newKey(t)
	w.knocks(t, key)
	must(t, w.op.RejectClaim(testContext(t), w.codeFor(key)))
	for range 2 { // that it asks does not make the day longer
		w.advance(pendingLife/2 - time.Minute)
		if status, _, e := w.knocks(t, key); status != http.StatusForbidden || e.Code != "rejected" {
			t.Errorf("%d %+v", status, e)
		}
	}
	if codes := w.pendingCodes(t); len(codes) != 0 {
		t.Errorf("it is listed: %v", codes)
	}
	w.advance(3 * time.Minute)
	if status, _, e := w.knocks(t, key); status != http.StatusAccepted {
		t.Errorf("a day later: %d %+v", status, e)
	}
}

func TestDevicesThatWaitAreForgottenAfterADay(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	gone, here := newKey(t), newKey(t)
	w.knocks(t, gone)
	w.knocks(t, here)
	for range 3 {
		w.advance(pendingLife / 2)
		w.knocks(t, here)
	}
	if codes := w.pendingCodes(t); !slices.Equal(codes, []string{w.codeFor(here)}) {
		t.Errorf("%v", codes)
	}
	_, err := w.op.Claim(testContext(t), api.Claim{Code: w.codeFor(gone)})
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
	w.waiting.sweep(testContext(t), w.reg.known, w.log)
	if n := w.waiting.count(); n != 1 {
		t.Errorf("%d are kept", n)
	}
	w.Close()
	w = open(t, dir) // and those that wait still wait
	defer w.Close()
	if codes := w.pendingCodes(t); !slices.Contains(codes, w.codeFor(here)) {
		t.Errorf("after a restart: %v", codes)
	}
}

// A stranger's keys ask twice, and a device that waits is written down only every
// few minutes; so neither tells them apart. Where they come from does.
func TestAFloodFromOneNetworkPushesOutItsOwn(t *testing.T) {
	t.Parallel()
	for name, flood := range map[string]func(i int) string{
		"one IPv4 network":                 func(i int) string { return fmt.Sprintf("203.0.113.%d:1", i%250) },
		"one IPv6 site":                    func(i int) string { return fmt.Sprintf("[2001:db8:1:%x::1]:1", i) },
		"all of an IPv6 provider's sites":  func(i int) string { return fmt.Sprintf("[2001:db8:%x::1]:1", i) },
		"all networks of an IPv4 provider": func(i int) string { return fmt.Sprintf("203.0.%d.1:1", i) },
	} {
		t.Run(name, func(t *testing.T) {
			w := ownWorld(t)
			w.freeze()
			w.waiting.most = 100
			if testing.Short() {
				w.waiting.most = 20
			}
			ask := func(from string, key ed25519.PrivateKey) {
				t.Helper()
				raw, err := json.Marshal(wire.EnrolRequest{CSR: csr(t, key)})
				must(t, err)
				if rec := w.serveLocal(http.MethodPost, enrolPath, "", from, raw); rec.Code != http.StatusAccepted {
					t.Fatalf("%d %s", rec.Code, rec.Body)
				}
			}
			alone, once := newKey(t), newKey(t)
			for range 3 {
				ask("192.0.2.7:1", alone)
				w.advance(time.Second)
			}
			ask("[2001:db9:2::1]:1", once)
			for i := range 2 * w.waiting.most {
				key := newKey(t)
				for range 2 {
					w.advance(time.Second)
					ask(flood(i), key)
				}
			}
			codes := w.pendingCodes(t)
			for _, key := range []ed25519.PrivateKey{alone, once} {
				if !slices.Contains(codes, w.codeFor(key)) {
					t.Errorf("a flood from elsewhere pushed it out of %d", len(codes))
				}
			}
		})
	}
}

func TestACodeThatIsNotFoundInAFullTableBlamesNobody(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.waiting.most = 3
	reason := func() string {
		_, err := w.op.Claim(testContext(t), api.Claim{Code: w.codeFor(newKey(t))})
		wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
		return err.Error()
	}
	if s := reason(); !strings.Contains(s, "stands between") {
		t.Errorf("with room: %s", s)
	}
	for range 5 {
		w.knocks(t, newKey(t))
	}
	if s := reason(); strings.Contains(s, "between") || !strings.Contains(s, "is full") || !strings.Contains(s, "token create") {
		t.Errorf("full: %s", s)
	}
}

// Anybody can make keys. They push out one another, and not a device that keeps
// asking.
func TestAFloodOfKeysStaysBoundedAndHurtsNobody(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.waiting.most = 50
	real := newKey(t)
	w.knocks(t, real)
	w.advance(time.Minute)
	w.knocks(t, real)
	rejected := newKey(t)
	w.knocks(t, rejected)
	must(t, w.op.RejectClaim(testContext(t), w.codeFor(rejected)))
	for range 4 * w.waiting.most {
		if status, p, e := w.knocks(t, newKey(t)); status != http.StatusAccepted || p.RetrySeconds > retryMax {
			t.Fatalf("%d %+v", status, e)
		}
		if n := w.waiting.count(); n > w.waiting.most {
			t.Fatalf("%d wait", n)
		}
	}
	if !slices.Contains(w.pendingCodes(t), w.codeFor(real)) {
		t.Error("the flood pushed out a device that kept asking")
	}
	if status, _, _ := w.knocks(t, rejected); status != http.StatusForbidden {
		t.Errorf("the flood made a rejected device welcome: %d", status)
	}
	w.waiting.rows.each(func(_ string, v PendingRecord) bool {
		if raw, _ := json.Marshal(v); len(raw) > 1000 {
			t.Errorf("a record of %d bytes that anybody can make", len(raw))
			return false
		}
		return true
	})
}

func TestWithoutClaimingOnlyTokensLetIn(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.cfg.NoClaim = true
	if status, _, e := w.knocks(t, newKey(t)); status != http.StatusForbidden || e.Code != "token_refused" {
		t.Errorf("%d %+v", status, e)
	}
	if n := w.waiting.count(); n != 0 {
		t.Errorf("%d wait", n)
	}
	d := w.enrolled(t)
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, d.key)}); status != http.StatusOK {
		t.Errorf("a member cannot renew: %d %s", status, e.Reason)
	}
}

func TestWaitingWantsProofOfTheKeyToo(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	forged := bytes.Clone(csr(t, newKey(t)))
	forged[len(forged)-1] ^= 1
	other, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	must(t, err)
	before := w.waiting.count()
	for name, request := range map[string][]byte{"a bad signature": forged, "another type of key": csr(t, other)} {
		if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: request}); status != http.StatusBadRequest || e.Code != "bad_csr" {
			t.Errorf("%s: %d %+v", name, status, e)
		}
	}
	if n := w.waiting.count(); n != before {
		t.Errorf("%d of them wait", n-before)
	}
}

func TestCertificatesOfDevicesLastAsLongAsIsSaid(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	for _, life := range []time.Duration{time.Minute, deviceCertLife} {
		key := newKey(t)
		raw, until, err := w.auth.deviceCertificate(key.Public().(ed25519.PublicKey), life)
		must(t, err)
		c := certificate(t, raw, key)
		leaf, err := x509.ParseCertificate(c.Certificate[0])
		must(t, err)
		if d := time.Until(until); d > life || d < life-time.Minute/2 {
			t.Errorf("a life of %s ends in %s", life, d)
		}
		// Who renews at two thirds of what it sees must not renew at once.
		if renew := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) * 2 / 3); time.Until(renew) < life/2 {
			t.Errorf("a life of %s is to be renewed in %s", life, time.Until(renew))
		}
	}
	wantStartError(t, Config{Dir: t.TempDir(), CertificateLife: time.Second}, "1s", "1m0s")
}

// A coordinator may run for longer than its own certificate lasts.
func TestTheServersCertificateRenewsItself(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	serials := func() (https, mqtt *big.Int) {
		t.Helper()
		var out [2]*big.Int
		for i, addr := range []string{"localhost:" + w.httpPort, "localhost:" + w.Broker()} {
			c := d.tls.Clone()
			c.ServerName = "localhost"
			conn, err := tls.Dial("tcp", addr, c)
			must(t, err)
			out[i] = conn.ConnectionState().PeerCertificates[0].SerialNumber
			conn.Close()
		}
		return out[0], out[1]
	}
	h1, m1 := serials()
	w.advance(serverCertRenew - time.Hour)
	if h, m := serials(); h.Cmp(h1) != 0 || m.Cmp(m1) != 0 {
		t.Error("it was renewed before its time")
	}
	w.advance(2 * time.Hour)
	h2, m2 := serials()
	if h2.Cmp(h1) == 0 || m2.Cmp(m1) == 0 {
		t.Error("it was not renewed")
	}
}

func TestARenewalThatFailsLeavesTheOldCertificate(t *testing.T) {
	now := time.Now()
	fail := false
	s := &serverCert{log: slog.New(slog.NewTextHandler(io.Discard, nil)), now: func() time.Time { return now }, make: func() (tls.Certificate, error) {
		if fail {
			return tls.Certificate{}, io.ErrUnexpectedEOF
		}
		return tls.Certificate{}, nil
	}}
	first, err := s.get(nil)
	must(t, err)
	fail, now = true, now.Add(serverCertRenew)
	if c, err := s.get(nil); err != nil || c != first {
		t.Errorf("%v", err)
	}
	fail, now = false, now.Add(serverCertRetry)
	if c, err := s.get(nil); err != nil || c == first {
		t.Errorf("it was not tried again: %v", err)
	}
}
