package wire

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
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

// key makes an Ed25519 public key fit the dsse library.
type key struct{ pub ed25519.PublicKey }

func (k key) KeyID() (string, error)   { return string(IDOf(k.pub)), nil }
func (k key) Public() crypto.PublicKey { return k.pub }

func (k key) Verify(_ context.Context, data, sig []byte) error {
	if len(k.pub) != ed25519.PublicKeySize || !ed25519.Verify(k.pub, data, sig) {
		return ErrSignature
	}
	return nil
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
	sig := ed25519.Sign(priv, dsse.PAE(string(t), payload))
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
// without a JSON decoder. Every other form that DSSE allows is left to the dsse
// library; which of both reads a message makes no difference to what it says.
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
	var env dsse.Envelope
	if len(raw) > MaxMessage || json.Unmarshal(raw, &env) != nil {
		return ""
	}
	return PayloadType(env.PayloadType)
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
	k := key{pub: pub}
	if len(e.keyID) > 0 && DeviceID(e.keyID) != IDOf(pub) || k.Verify(context.Background(), dsse.PAE(string(e.typ), payload), sig) != nil {
		return "", nil, ErrSignature
	}
	return PayloadType(e.typ), payload, nil
}

// openAny opens an envelope of any form that DSSE allows.
func openAny(raw []byte, pub ed25519.PublicKey) (PayloadType, json.RawMessage, error) {
	var env dsse.Envelope
	if err := json.Unmarshal(raw, &env); err != nil {
		return "", nil, fmt.Errorf("this is no signed envelope: %w", err)
	}
	v, err := dsse.NewEnvelopeVerifier(key{pub: pub})
	if err != nil {
		return "", nil, fmt.Errorf("verify: %w", err)
	}
	_, payload, err := v.VerifyAndDecode(context.Background(), &env)
	if err != nil {
		return "", nil, ErrSignature
	}
	return PayloadType(env.PayloadType), payload, nil
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
	var env dsse.Envelope
	if err := json.Unmarshal(raw, &env); err != nil {
		return nil, fmt.Errorf("this is no envelope: %w", err)
	}
	payload, err := env.DecodeB64Payload()
	if err != nil {
		return nil, fmt.Errorf("decode the payload: %w", err)
	}
	return payload, nil
}
