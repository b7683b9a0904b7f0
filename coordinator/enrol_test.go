package coordinator

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	crand "crypto/rand"
	"net/http"
	"os"
	"path/filepath"
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
	w := ownWorld(t)
	used := w.newToken(t, api.TokenRequest{Uses: 1})
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: used}); status != http.StatusOK {
		t.Fatalf("the first use: %d %s", status, e.Reason)
	}
	expired := w.newToken(t, api.TokenRequest{ValidSeconds: 60})
	w.advance(2 * time.Minute)
	for name, tok := range map[string]string{
		"none":      "",
		"no token":  "let me in",
		"unknown":   wire.NewFleetToken(w.auth.caCert.Raw).String(),
		"used up":   used,
		"expired":   expired,
		"truncated": used[:len(used)-1],
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

func TestOneUseLetsExactlyOneOfManyIn(t *testing.T) {
	w := aWorld(t)
	tok := w.newToken(t, api.TokenRequest{Uses: 1})
	const racers = 12
	statuses := make([]int, racers)
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range racers {
		q := wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: tok}
		wg.Go(func() {
			<-start
			statuses[i], _, _ = w.postEnrol(t, q)
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
	if in != 1 {
		t.Errorf("%d devices came in by a token with one use", in)
	}
}

func TestEnrolmentWantsProofOfAnEd25519Key(t *testing.T) {
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
	_, err := w.reg.rows.change(testContext(t), string(id), func(v *api.DeviceRecord, _ bool) error { v.Retired = true; return nil })
	must(t, err)
}

func TestARetiredDeviceIsRefusedEverywhere(t *testing.T) {
	w := aWorld(t)
	d := w.enrolled(t)
	w.retire(t, d.id)
	tok := w.newToken(t, api.TokenRequest{Uses: 1})
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, d.key), Token: tok}); status != http.StatusForbidden || e.Code != "retired" {
		t.Errorf("enrolment: %d %+v", status, e)
	}
	if status, body := d.transfer(http.MethodGet, "/data/v1/repo/metadata/1.root.json", nil); status != http.StatusForbidden {
		t.Errorf("data plane: %d %s", status, body)
	}
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: tok}); status != http.StatusOK {
		t.Errorf("the retired device spent the use of another: %d %s", status, e.Reason)
	}
}

// Whoever gets hold of the coordinator's files, records or context must not be
// able to enrol with a token that was handed out.
func TestOnlyTheHashOfATokenIsKept(t *testing.T) {
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
	w := aWorld(t)
	for _, r := range []api.TokenRequest{{Uses: -1}, {Uses: maxTokenUse + 1}, {ValidSeconds: -5}, {ValidSeconds: int64(maxTokenTTL/time.Second) + 1},
		{ValidSeconds: 18446744074}} { // the last is 0.3 s if it overflows
		_, err := w.op.CreateToken(testContext(t), r)
		wantRefusal(t, err, http.StatusBadRequest, "bad_token")
	}
	for _, group := range []string{"a\x1b[2J", "a\nb", "a\x00", " a", "\u202ea", strings.Repeat("a", maxLabel+1)} {
		_, err := w.op.CreateToken(testContext(t), api.TokenRequest{Group: group})
		wantRefusal(t, err, http.StatusBadRequest, "bad_token")
	}
	for _, group := range []string{"", "Küche 2", strings.Repeat("a", maxLabel)} {
		w.newToken(t, api.TokenRequest{Group: group})
	}
}

// What a device says of itself ends in an operator's terminal.
func TestADevicesWordsAreFitForATerminal(t *testing.T) {
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
