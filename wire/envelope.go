package wire

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
)

// PayloadType says what an envelope carries. The signature covers it.
type PayloadType string

// The payload types of version 1 of the protocol.
const (
	TypeOrder    PayloadType = "application/vnd.deimos.order.v1+json"
	TypeReport   PayloadType = "application/vnd.deimos.report.v1+json"
	TypeAck      PayloadType = "application/vnd.deimos.ack.v1+json"
	TypeWelcome  PayloadType = "application/vnd.deimos.welcome.v1+json"
	TypePresence PayloadType = "application/vnd.deimos.presence.v1+json"
	TypeBeat     PayloadType = "application/vnd.deimos.beat.v1+json"
)

// ErrSignature is returned for an envelope whose signature is missing, broken
// or by another key than the expected one.
var ErrSignature = errors.New("the signature is not valid for this sender")

// ErrTooLarge is returned for an envelope above [MaxMessage].
var ErrTooLarge = errors.New("the message is larger than the protocol allows")

// form is an envelope as DSSE 1.0 has it (github.com/secure-systems-lab/dsse,
// envelope.md). The library for it is the tests' measure, and not used here: it
// brings SSH with it, 0.26 MB of an agent, to name keys in a way that ours have not.
type form struct {
	PayloadType string `json:"payloadType"`
	Payload     string `json:"payload"`
	Signatures  []struct {
		KeyID string `json:"keyid"`
		Sig   string `json:"sig"`
	} `json:"signatures"`
}

// pae is DSSE's pre-authentication encoding, which is what is signed (protocol.md).
func pae(t PayloadType, payload []byte) []byte {
	b := fmt.Appendf(make([]byte, 0, len(payload)+len(t)+64), "DSSEv1 %d %s %d ", len(t), t, len(payload))
	return append(b, payload...)
}

// decode64 reads both alphabets that DSSE allows.
func decode64(s string) ([]byte, error) {
	raw, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		raw, err = base64.URLEncoding.DecodeString(s)
	}
	return raw, err
}

// signed tells whether a signature is this key's, if it does not name another.
func signed(pub ed25519.PublicKey, keyID string, t PayloadType, payload, sig []byte) bool {
	if keyID != "" && DeviceID(keyID) != IDOf(pub) {
		return false
	}
	return len(pub) == ed25519.PublicKeySize && ed25519.Verify(pub, pae(t, payload), sig)
}

// Seal signs v as JSON and returns the envelope's bytes. It fails with
// [ErrTooLarge] if nobody would accept the result.
func Seal(priv ed25519.PrivateKey, t PayloadType, v any) ([]byte, error) {
	payload, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", t, err)
	}
	typ, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("encode the type %s: %w", t, err)
	}
	sig := ed25519.Sign(priv, pae(t, payload))
	raw := make([]byte, 0, 200+len(typ)+base64.StdEncoding.EncodedLen(len(payload)))
	raw = append(append(raw, `{"payloadType":`...), typ...)
	raw = base64.StdEncoding.AppendEncode(append(raw, `,"payload":"`...), payload)
	raw = append(append(raw, `","signatures":[{"keyid":"`...), IDOf(priv.Public().(ed25519.PublicKey))...)
	raw = base64.StdEncoding.AppendEncode(append(raw, `","sig":"`...), sig)
	raw = append(raw, `"}]}`...)
	if len(raw) > MaxMessage {
		return nil, fmt.Errorf("%s of %d bytes (limit %d): %w", t, len(raw), MaxMessage, ErrTooLarge)
	}
	return raw, nil
}

// envelope is one in the very form that [Seal] writes: its strings have no
// escapes, its order is fixed. All that is hot comes in this form, and is read
// without a JSON decoder. Every other form that DSSE allows is read as a [form];
// which of both reads a message makes no difference to what it says.
type envelope struct {
	typ, payload, keyID, sig []byte // base64 as it stands
}

// split takes such an envelope apart. ok is false for every other form.
func split(raw []byte) (e envelope, ok bool) {
	for _, part := range []struct {
		head string
		into *[]byte
	}{{`{"payloadType":"`, &e.typ}, {`","payload":"`, &e.payload}, {`","signatures":[{"keyid":"`, &e.keyID}, {`","sig":"`, &e.sig}} {
		if raw, ok = bytes.CutPrefix(raw, []byte(part.head)); !ok {
			return envelope{}, false
		}
		n := bytes.IndexByte(raw, '"')
		if n < 0 || !verbatim(raw[:n]) {
			return envelope{}, false
		}
		*part.into, raw = raw[:n], raw[n:]
	}
	return e, string(raw) == `"}]}`
}

// verbatim tells whether JSON has such a string stand for itself.
func verbatim(s []byte) bool {
	for _, c := range s {
		if c < ' ' || c > '~' || c == '\\' {
			return false
		}
	}
	return true
}

// TypeOf is what an envelope claims to carry, or nothing: good for choosing who
// opens it, and for nothing else.
func TypeOf(raw []byte) PayloadType {
	if e, ok := split(raw); ok {
		return PayloadType(e.typ)
	}
	var f form
	if len(raw) > MaxMessage || json.Unmarshal(raw, &f) != nil {
		return ""
	}
	return PayloadType(f.PayloadType)
}

// Open checks size and signature of an envelope and returns what it carries.
// Nothing of the payload may be looked at before this has succeeded.
func Open(raw []byte, pub ed25519.PublicKey) (PayloadType, json.RawMessage, error) {
	if len(raw) > MaxMessage {
		return "", nil, fmt.Errorf("%d bytes (limit %d): %w", len(raw), MaxMessage, ErrTooLarge)
	}
	if e, ok := split(raw); ok {
		payload, err := base64.StdEncoding.AppendDecode(nil, e.payload)
		sig, err2 := base64.StdEncoding.AppendDecode(nil, e.sig)
		if err == nil && err2 == nil {
			return e.verify(pub, payload, sig)
		}
	}
	return openAny(raw, pub)
}

func (e envelope) verify(pub ed25519.PublicKey, payload, sig []byte) (PayloadType, json.RawMessage, error) {
	t := PayloadType(e.typ)
	if !signed(pub, string(e.keyID), t, payload, sig) {
		return "", nil, ErrSignature
	}
	return t, payload, nil
}

// openAny opens an envelope of any form that DSSE allows: one signature of those
// that it has must be the key's.
func openAny(raw []byte, pub ed25519.PublicKey) (PayloadType, json.RawMessage, error) {
	var f form
	if err := json.Unmarshal(raw, &f); err != nil {
		return "", nil, fmt.Errorf("this is no signed envelope: %w", err)
	}
	payload, err := decode64(f.Payload)
	if err != nil {
		return "", nil, ErrSignature
	}
	valid := false
	for _, s := range f.Signatures {
		sig, err := decode64(s.Sig)
		if err != nil {
			return "", nil, ErrSignature
		}
		valid = valid || signed(pub, s.KeyID, PayloadType(f.PayloadType), payload, sig)
	}
	if !valid {
		return "", nil, ErrSignature
	}
	return PayloadType(f.PayloadType), payload, nil
}

// OpenAs opens an envelope that must carry a T under payload type t.
func OpenAs[T any](raw []byte, pub ed25519.PublicKey, t PayloadType) (T, error) {
	var v T
	got, payload, err := Open(raw, pub)
	if err != nil {
		return v, err
	}
	if got != t {
		return v, fmt.Errorf("expected %s, got %s", t, got)
	}
	if err := json.Unmarshal(payload, &v); err != nil {
		return v, fmt.Errorf("decode %s: %w", t, err)
	}
	return v, nil
}

// Reread decodes what an envelope carries without looking at its signature: for
// one's own records of what [Seal] has made or [Open] has accepted before.
func Reread[T any](raw []byte) (T, error) {
	var v T
	payload, err := payloadOf(raw)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(payload, &v); err != nil {
		return v, fmt.Errorf("decode what the envelope carries: %w", err)
	}
	return v, nil
}

func payloadOf(raw []byte) ([]byte, error) {
	if e, ok := split(raw); ok {
		if payload, err := base64.StdEncoding.AppendDecode(nil, e.payload); err == nil {
			return payload, nil
		}
	}
	var f form
	if err := json.Unmarshal(raw, &f); err != nil {
		return nil, fmt.Errorf("this is no envelope: %w", err)
	}
	payload, err := decode64(f.Payload)
	if err != nil {
		return nil, fmt.Errorf("decode the payload: %w", err)
	}
	return payload, nil
}
