package wire

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func newKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return priv
}

func pub(k ed25519.PrivateKey) ed25519.PublicKey { return k.Public().(ed25519.PublicKey) }

func order(d DeviceID) Order {
	now := time.Now().UTC()
	return Order{ID: "01J", Device: d, Kind: KindChunkDrop, Issued: now, Expires: now.Add(time.Minute), Body: json.RawMessage(`{"ids":[]}`)}
}

// The expected id was worked out by another program from RFC 8032 and RFC 4648.
func TestDeviceIDIsDerivedFromTheKey(t *testing.T) {
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	id := IDOf(pub(key))
	if _, err := ParseDeviceID(string(id)); err != nil {
		t.Fatal(err)
	}
	if want := DeviceID("copdsqhgjnkjc4rardm2bv2b"); id != want {
		t.Fatalf("id %s, want %s", id, want)
	}
}

func TestParseDeviceIDRefusesOtherText(t *testing.T) {
	for _, s := range []string{"", "abc", strings.Repeat("A", 24), strings.Repeat("a", 23) + "1", strings.Repeat("a", 25), strings.Repeat("a", 23) + "."} {
		if _, err := ParseDeviceID(s); err == nil {
			t.Errorf("%q was taken for a device id", s)
		}
	}
}

func TestSubjectsAndTopicsMatch(t *testing.T) {
	id := IDOf(pub(newKey(t)))
	if got := strings.ReplaceAll(Topic(id, ChannelBeat), "/", "."); got != Subject(id, ChannelBeat) {
		t.Errorf("topic maps to %s, subject is %s", got, Subject(id, ChannelBeat))
	}
	d, c, err := ParseSubject(Subject(id, ChannelReport))
	if err != nil || d != id || c != ChannelReport {
		t.Errorf("got %s %s %v", d, c, err)
	}
	for _, s := range []string{"deimos.1.x", "deimos.2." + string(id) + ".order", "deimos.1.*.order"} {
		if _, _, err := ParseSubject(s); err == nil {
			t.Errorf("%q was accepted", s)
		}
	}
}

func TestOnlyTheRightKeyOpensAnEnvelope(t *testing.T) {
	k := newKey(t)
	o := order(IDOf(pub(k)))
	raw, err := Seal(k, TypeOrder, o)
	if err != nil {
		t.Fatal(err)
	}
	got, err := OpenAs[Order](raw, pub(k), TypeOrder)
	if err != nil || got.ID != o.ID {
		t.Fatalf("%+v %v", got, err)
	}
	if _, _, err := Open(raw, pub(newKey(t))); !errors.Is(err, ErrSignature) {
		t.Errorf("another key: %v", err)
	}
	if _, _, err := Open(raw, nil); err == nil {
		t.Errorf("no key opened it")
	}
}

// Each single-character change of a sealed envelope either breaks it or leaves
// the payload as it was (white space, an ignored field name, the key id hint).
func TestAlteredEnvelopesAreRefused(t *testing.T) {
	k := newKey(t)
	raw, err := Seal(k, TypeOrder, order(IDOf(pub(k))))
	if err != nil {
		t.Fatal(err)
	}
	_, want, err := Open(raw, pub(k))
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for i := range raw {
		bad := append([]byte(nil), raw...)
		bad[i] ^= 1
		typ, payload, err := Open(bad, pub(k))
		if err != nil {
			refused++
			continue
		}
		if typ != TypeOrder || string(payload) != string(want) {
			t.Fatalf("byte %d altered: accepted as %s %s", i, typ, payload)
		}
	}
	if refused < len(raw)/2 {
		t.Errorf("only %d of %d alterations were refused", refused, len(raw))
	}
}

func TestAReportCannotPassAsAnOrder(t *testing.T) {
	k := newKey(t)
	raw, _ := Seal(k, TypeReport, order(IDOf(pub(k))))
	if _, err := OpenAs[Order](raw, pub(k), TypeOrder); err == nil {
		t.Error("the payload type was not checked")
	}
}

func TestOversizedMessagesAreRefusedOnBothSides(t *testing.T) {
	k := newKey(t)
	if _, err := Seal(k, TypeBeat, strings.Repeat("x", MaxMessage)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("sealing: %v", err)
	}
	if _, _, err := Open(make([]byte, MaxMessage+1), pub(k)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("opening: %v", err)
	}
}

// The largest inline attachment must fit a message, with room for the rest.
func TestInlineAttachmentsFitAMessage(t *testing.T) {
	k := newKey(t)
	_, err := Seal(k, TypeReport, Report{Attachment: &Attachment{Inline: make([]byte, MaxInline)}, Reason: strings.Repeat("r", 32<<10)})
	if err != nil {
		t.Error(err)
	}
}

func TestOrdersAreCheckedForDeviceAndExpiry(t *testing.T) {
	me, other := IDOf(pub(newKey(t))), IDOf(pub(newKey(t)))
	o := order(me)
	for name, c := range map[string]struct {
		order  Order
		device DeviceID
		now    time.Time
		code   string
	}{
		"mine and fresh": {o, me, o.Issued, ""},
		"wrong device":   {o, other, o.Issued, CodeWrongDevice},
		"expired":        {o, me, o.Expires.Add(time.Second), CodeExpired},
		"no id":          {Order{Device: me, Kind: "x", Expires: o.Expires}, me, o.Issued, CodeBadBody},
		"no expiry":      {Order{Device: me, Kind: "x", ID: "1"}, me, o.Issued, CodeBadBody},
	} {
		err := c.order.CheckFor(c.device, c.now)
		if c.code == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if p := ProblemOf(err); err == nil || p.Code != c.code || p.State != Rejected {
			t.Errorf("%s: got %v, want %s", name, err, c.code)
		}
	}
}

func TestFleetTokensSurviveTextAndRefuseOthers(t *testing.T) {
	tok := NewFleetToken([]byte("a certificate"))
	got, err := ParseFleetToken(" " + tok.String() + "\n")
	if err != nil || got != tok {
		t.Fatalf("%v %v", got, err)
	}
	for _, s := range []string{"", "deimos_x_y", strings.ToUpper(tok.String()), tok.String()[:40], tok.String() + "_a"} {
		if _, err := ParseFleetToken(s); err == nil {
			t.Errorf("%q was accepted", s)
		}
	}
}
