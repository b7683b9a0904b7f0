package wire

import (
	"context"
	"crypto"
	"crypto/ed25519"
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

// key makes an Ed25519 key fit the dsse library. priv is nil where only
// verifying is wanted.
type key struct {
	priv ed25519.PrivateKey
	pub  ed25519.PublicKey
}

func (k key) KeyID() (string, error)   { return string(IDOf(k.pub)), nil }
func (k key) Public() crypto.PublicKey { return k.pub }

func (k key) Sign(_ context.Context, data []byte) ([]byte, error) {
	return ed25519.Sign(k.priv, data), nil
}

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
	s, err := dsse.NewEnvelopeSigner(key{priv: priv, pub: priv.Public().(ed25519.PublicKey)})
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", t, err)
	}
	env, err := s.SignPayload(context.Background(), string(t), payload)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", t, err)
	}
	raw, err := json.Marshal(env)
	if err != nil {
		return nil, fmt.Errorf("encode the envelope of %s: %w", t, err)
	}
	if len(raw) > MaxMessage {
		return nil, fmt.Errorf("%s of %d bytes (limit %d): %w", t, len(raw), MaxMessage, ErrTooLarge)
	}
	return raw, nil
}

// Open checks size and signature of an envelope and returns what it carries.
// Nothing of the payload may be looked at before this has succeeded.
func Open(raw []byte, pub ed25519.PublicKey) (PayloadType, json.RawMessage, error) {
	if len(raw) > MaxMessage {
		return "", nil, fmt.Errorf("%d bytes (limit %d): %w", len(raw), MaxMessage, ErrTooLarge)
	}
	var env dsse.Envelope
	if err := json.Unmarshal(raw, &env); err != nil {
		return "", nil, fmt.Errorf("this is no signed envelope: %w", err)
	}
	v, err := dsse.NewEnvelopeVerifier(key{pub: pub})
	if err != nil {
		return "", nil, fmt.Errorf("verify: %w", err)
	}
	if _, err := v.Verify(context.Background(), &env); err != nil {
		return "", nil, ErrSignature
	}
	payload, err := env.DecodeB64Payload()
	if err != nil {
		return "", nil, fmt.Errorf("decode the payload: %w", err)
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
	var env dsse.Envelope
	if err := json.Unmarshal(raw, &env); err != nil {
		return v, fmt.Errorf("this is no envelope: %w", err)
	}
	payload, err := env.DecodeB64Payload()
	if err != nil {
		return v, fmt.Errorf("decode the payload: %w", err)
	}
	if err := json.Unmarshal(payload, &v); err != nil {
		return v, fmt.Errorf("decode what the envelope carries: %w", err)
	}
	return v, nil
}
