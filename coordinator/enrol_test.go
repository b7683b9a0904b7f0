package coordinator

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func TestEnrolmentRefusesTokensThatAreNotGood(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	used := w.newToken(t, api.TokenRequest{Uses: 1})
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: used}); status != http.StatusOK {
		t.Fatalf("the first use: %d %s", status, e.Reason)
	}
	expired := w.newToken(t, api.TokenRequest{ValidSeconds: 60})
	made, err := w.op.CreateToken(testContext(t), api.TokenRequest{Uses: 5, ValidSeconds: 3600})
	must(t, err)
	revoked := made.Token
	if _, err := w.op.RevokeToken(testContext(t), made.ID); err != nil {
		t.Fatal(err)
	}
	w.advance(2 * time.Minute)
	for name, tok := range map[string]string{
		"no token":  "let me in",
		"unknown":   wire.NewFleetToken(w.auth.caCert.Raw).String(),
		"used up":   used,
		"expired":   expired,
		"truncated": used[:len(used)-1],
		"revoked":   revoked,
	} {
		t.Run(name, func(t *testing.T) {
			key := newKey(t)
			status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, key), Token: tok})
			if status != http.StatusForbidden || e.Code != "token_refused" || !strings.Contains(e.Reason, "deimos token create") {
				t.Errorf("%d %+v", status, e)
			}
			if _, ok := w.reg.rows.get(string(wire.IDOf(key.Public().(ed25519.PublicKey)))); ok {
				t.Error("the refused device is in the registry")
			}
		})
	}
}

// An answer can be lost on the way: asking again costs no second use, and is
// not open to anybody else.
func TestADeviceRepeatsItsEnrolmentForFree(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	tok := w.newToken(t, api.TokenRequest{Uses: 1, Group: "attic"})
	request := csr(t, newKey(t))
	var ids []wire.DeviceID
	for range 3 {
		status, m, e := w.postEnrol(t, wire.EnrolRequest{CSR: request, Token: tok})
		if status != http.StatusOK {
			t.Fatalf("%d %s", status, e.Reason)
		}
		ids = append(ids, m.Device)
	}
	if ids[0] != ids[1] || ids[1] != ids[2] {
		t.Errorf("one key became %v", ids)
	}
	if d, err := w.op.Device(testContext(t), string(ids[0])); err != nil || d.Group != "attic" {
		t.Errorf("%+v %v", d, err)
	}
	if status, _, _ := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: tok}); status != http.StatusForbidden {
		t.Errorf("a second device came in by one use: %d", status)
	}
}

func TestATokenLetsExactlyAsManyInAsItHasUses(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	const racers, uses = 50, 20
	made, err := w.op.CreateToken(testContext(t), api.TokenRequest{Uses: uses})
	must(t, err)
	statuses := make([]int, racers)
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range racers {
		q := wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: made.Token}
		wg.Go(func() {
			<-start
			statuses[i] = w.enrolHere(q).Code
		})
	}
	close(start)
	wg.Wait()
	in := 0
	for _, s := range statuses {
		switch s {
		case http.StatusOK:
			in++
		case http.StatusForbidden:
		default:
			t.Errorf("status %d", s)
		}
	}
	if in != uses {
		t.Errorf("%d devices came in by a token with %d uses", in, uses)
	}
	list, err := w.op.Tokens(testContext(t))
	must(t, err)
	i := slices.IndexFunc(list, func(v api.Token) bool { return v.ID == made.ID })
	if i < 0 || list[i].Left != 0 || list[i].Uses != uses || list[i].Token != "" {
		t.Errorf("the list says %+v", list)
	}
	came := 0
	for _, d := range w.reg.list() {
		if d.Token == made.ID {
			came++
		}
	}
	if came != uses {
		t.Errorf("%d devices stand on record as having come by it", came)
	}
}

// Between a spent use and the device's record there may be a crash. The use is
// neither lost to the device nor given to another.
func TestACrashAfterSpendingNeitherLosesNorDoublesTheUse(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	text := w.newToken(t, api.TokenRequest{Uses: 1, Group: "attic", Labels: map[string]string{"a": "1"}})
	tok, err := wire.ParseFleetToken(text)
	must(t, err)
	key := newKey(t)
	id := wire.IDOf(key.Public().(ed25519.PublicKey))
	if _, _, err := w.tokens.spend(testContext(t), tok, id); err != nil { // and here the coordinator dies
		t.Fatal(err)
	}
	if status, _, _ := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: text}); status != http.StatusForbidden {
		t.Errorf("the use was given to another: %d", status)
	}
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, key), Token: text}); status != http.StatusOK {
		t.Fatalf("the use was lost: %d %s", status, e.Reason)
	}
	if d, err := w.reg.device(id); err != nil || d.Group != "attic" || d.Labels["a"] != "1" {
		t.Errorf("%+v %v", d, err)
	}
}

// A token's record does not grow with the devices that come in by it.
func TestATokensRecordStaysSmall(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	made, err := w.op.CreateToken(testContext(t), api.TokenRequest{Uses: 10})
	must(t, err)
	for range 6 {
		if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: made.Token}); status != http.StatusOK {
			t.Fatalf("%d %s", status, e.Reason)
		}
	}
	w.tokens.rows.each(func(key string, v TokenRecord) bool {
		if tokenID(key) == made.ID && len(v.Open) > 1 {
			t.Errorf("it lists %d devices", len(v.Open))
		}
		return true
	})
}

func TestRevokingATokenIsFinalAndSurvivesARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	made, err := w.op.CreateToken(testContext(t), api.TokenRequest{Uses: 5})
	must(t, err)
	first, err := w.op.RevokeToken(testContext(t), made.ID)
	must(t, err)
	again, err := w.op.RevokeToken(testContext(t), made.ID)
	if err != nil || !again.Revoked.Equal(first.Revoked) {
		t.Errorf("a second time: %+v %v", again, err)
	}
	_, err = w.op.RevokeToken(testContext(t), "0123456789")
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
	w.Close()
	w = open(t, dir)
	defer w.Close()
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: made.Token}); status != http.StatusForbidden || !strings.Contains(e.Reason, "revoked") {
		t.Errorf("%d %+v", status, e)
	}
}

// enrolHere makes the call without a network, and so without what keeps one
// address from asking too often.
func (w *world) enrolHere(q wire.EnrolRequest) *httptest.ResponseRecorder {
	raw, _ := json.Marshal(q)
	rec := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/enrol/v1", bytes.NewReader(raw))
	if err := w.enrol(rec, r); err != nil {
		writeError(rec, w.log, false, err)
	}
	return rec
}

// A certificate is renewed by the key alone, and whoever has seen a request for it
// can send it again: nothing else changes.
func TestRenewalChangesNothingButTheCertificate(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	key := newKey(t)
	made, err := w.op.CreateToken(testContext(t), api.TokenRequest{Uses: 2, Group: "attic", Labels: map[string]string{"floor": "3"}})
	must(t, err)
	q := wire.EnrolRequest{CSR: csr(t, key), Token: made.Token, Agent: "1.0.0", Board: "old", Inventory: json.RawMessage(`{"a":1}`)}
	status, first, e := w.postEnrol(t, q)
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Reason)
	}
	before, err := w.reg.device(first.Device)
	must(t, err)
	other := w.newToken(t, api.TokenRequest{Uses: 1, Group: "cellar"})
	for name, tok := range map[string]string{"no token": "", "its own": made.Token, "another": other, "none at all": "nonsense"} {
		status, m, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, key), Token: tok, Agent: "2.0.0", Board: "new", Inventory: json.RawMessage(`{"a":2}`)})
		if status != http.StatusOK || m.Device != first.Device || bytes.Equal(m.Certificate, first.Certificate) {
			t.Fatalf("%s: %d %s", name, status, e.Reason)
		}
	}
	d, err := w.reg.device(first.Device)
	must(t, err)
	if d.Agent != "1.0.0" || d.Board != "old" || !d.CertUntil.After(before.CertUntil) {
		t.Errorf("%+v", d)
	}
	if v, err := w.op.Device(testContext(t), string(d.ID)); err != nil || string(v.Inventory) != `{"a":1}` {
		t.Errorf("the inventory is %s: %v", v.Inventory, err)
	}
	if d.Group != "attic" || d.Labels["floor"] != "3" || !d.Enrolled.Equal(before.Enrolled) || d.Token != made.ID {
		t.Errorf("what the fleet says has changed: %+v", d)
	}
	for _, tok := range []string{made.Token, other} { // each has its use left
		if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: tok}); status != http.StatusOK {
			t.Errorf("a renewal spent a use: %d %s", status, e.Reason)
		}
	}
}

// A claimed device has none until its first renewal; a member's own connection
// brings a newer one.
func TestAnInventoryIsReplacedOnlyByTheMemberItself(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	owner, neighbour := w.enrolled(t), w.enrolled(t)
	send := func(as *tls.Certificate, inventory, want string) {
		t.Helper()
		raw, err := json.Marshal(wire.EnrolRequest{CSR: csr(t, owner.key), Inventory: json.RawMessage(inventory)})
		must(t, err)
		resp, err := w.plain(as).Post(w.URL()+enrolPath, "application/json", bytes.NewReader(raw))
		must(t, err)
		resp.Body.Close()
		v, err := w.op.Device(testContext(t), string(owner.id))
		if err != nil || resp.StatusCode != http.StatusOK || string(v.Inventory) != want {
			t.Errorf("%s: %d, kept %s: %v", inventory, resp.StatusCode, v.Inventory, err)
		}
	}
	send(nil, `{"first":1}`, `{"first":1}`)
	send(nil, `{"copied":1}`, `{"first":1}`)
	send(&neighbour.tls.Certificates[0], `{"forged":1}`, `{"first":1}`)
	send(&owner.tls.Certificates[0], `{"newer":1}`, `{"newer":1}`)
}

func TestALargeInventoryIsNotKept(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	large := json.RawMessage(`"` + strings.Repeat("x", maxInventory) + `"`)
	status, m, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: w.newToken(t, api.TokenRequest{}), Inventory: large})
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Reason)
	}
	if d, err := w.op.Device(testContext(t), string(m.Device)); err != nil || d.Inventory != nil {
		t.Errorf("%d bytes are kept", len(d.Inventory))
	}
}

func TestEnrolmentWantsProofOfAnEd25519Key(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	tok := w.newToken(t, api.TokenRequest{Uses: 1})
	good := csr(t, newKey(t))
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1 // the signature is last
	other, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	must(t, err)
	for name, request := range map[string][]byte{"nothing": nil, "a bad signature": forged, "another type of key": csr(t, other)} {
		status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: request, Token: tok})
		if status != http.StatusBadRequest || e.Code != "bad_csr" || !strings.Contains(e.Reason, " ") {
			t.Errorf("%s: %d %+v", name, status, e)
		}
	}
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: good, Token: tok}); status != http.StatusOK {
		t.Errorf("the refused requests cost the token's use: %d %s", status, e.Reason)
	}
}

func (w *world) retire(t testing.TB, id wire.DeviceID) {
	t.Helper()
	_, err := w.op.RetireDevice(testContext(t), string(id), true)
	must(t, err)
}

// Whoever gets hold of the coordinator's files, records or context must not be
// able to enrol with a token that was handed out.
func TestOnlyTheHashOfATokenIsKept(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	tok := w.newToken(t, api.TokenRequest{Uses: 2})
	status, _, _ := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: tok})
	w.Close()
	if status != http.StatusOK {
		t.Fatal(status)
	}
	parsed, err := wire.ParseFleetToken(tok)
	must(t, err)
	secret := strings.Split(tok, "_")[1]
	files := 0
	err = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		files++
		if bytes.Contains(raw, []byte(secret)) || bytes.Contains(raw, parsed.Secret[:]) {
			t.Errorf("%s holds the token's secret", path)
		}
		return err
	})
	if err != nil || files < 5 {
		t.Fatalf("%d files looked at: %v", files, err)
	}
}

func TestTokenRequestsAreBounded(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	for _, r := range []api.TokenRequest{{Uses: -1}, {Uses: maxTokenUse + 1}, {ValidSeconds: -5}, {ValidSeconds: int64(maxTokenTTL/time.Second) + 1},
		{ValidSeconds: 18446744074}, {Name: "a\nb"}} { // the last is 0.3 s if it overflows
		_, err := w.op.CreateToken(testContext(t), r)
		wantRefusal(t, err, http.StatusBadRequest, "bad_token")
	}
	for _, group := range []string{"a\x1b[2J", "a\nb", "a\x00", " a", "\u202ea", strings.Repeat("a", maxLabel+1)} {
		_, err := w.op.CreateToken(testContext(t), api.TokenRequest{Group: group})
		wantRefusal(t, err, http.StatusBadRequest, "bad_group")
	}
	for _, labels := range []map[string]string{{"": "x"}, {"a b": "x"}, {"a": "\x1b"}, {"a": strings.Repeat("x", 65)}} {
		_, err := w.op.CreateToken(testContext(t), api.TokenRequest{Labels: labels})
		wantRefusal(t, err, http.StatusBadRequest, "bad_label")
	}
	for _, group := range []string{"", "Küche 2", strings.Repeat("a", maxLabel)} {
		w.newToken(t, api.TokenRequest{Group: group})
	}
}

// What a device says of itself ends in an operator's terminal.
func TestADevicesWordsAreFitForATerminal(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	check := func(id wire.DeviceID) {
		t.Helper()
		d, err := w.reg.device(id)
		must(t, err)
		for _, s := range []string{d.Agent, d.OS, d.Arch, d.Board, d.Slot} {
			if len(s) > maxLabel || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("kept: %q", s)
			}
		}
		if d.Board != "Pi 4 é" || len(d.Arch) < maxLabel-1 {
			t.Errorf("what is good is lost: %q %q", d.Board, d.Arch)
		}
	}
	key := newKey(t)
	long := "a" + strings.Repeat("é", maxLabel)
	board := "Pi 4\x1b\u202e é\x00\n"
	status, m, _ := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, key), Token: w.newToken(t, api.TokenRequest{}),
		Agent: "\x1b]0;x\a", OS: "a\r\nb", Arch: long, Board: board})
	if status != http.StatusOK {
		t.Fatalf("enrolment: %d", status)
	}
	check(m.Device)
	w.hearFrom(t, &device{id: m.Device, key: key}, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: m.Device, Online: true,
		Session: "s", Nonce: newNonce(), Agent: "\x1b[2J", OS: "\x7f", Arch: long, Board: board, Slot: "a\tb\u009b"})
	check(m.Device)
	if d, _ := w.reg.device(m.Device); d.Slot != "ab" {
		t.Errorf("slot %q", d.Slot)
	}
}

// A router or load balancer before the coordinator has ports of its own.
func TestDevicesAreToldThePublicAddresses(t *testing.T) {
	c := &Coordinator{cfg: Config{PublicMQTT: []string{"mq.example.org:443", "[::1]:1"}}, mqttPort: "8883", httpPort: "8443"}
	brokers, planes := c.addresses(&http.Request{Host: "192.0.2.1:8443"})
	if !slices.Equal(brokers, []string{"ssl://mq.example.org:443", "ssl://[::1]:1"}) || !slices.Equal(planes, []string{"https://192.0.2.1:8443"}) {
		t.Errorf("%v %v", brokers, planes)
	}
	if !slices.Contains(c.names(), "mq.example.org") {
		t.Error("the certificate is not good for the public name")
	}
	if _, err := Start(testContext(t), Config{Dir: t.TempDir(), PublicHTTPS: []string{"example.org"}}); err == nil {
		t.Error("an address without a port was taken")
	}
}
