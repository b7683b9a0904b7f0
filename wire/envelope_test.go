package wire

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"strings"
	"testing"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

// signer makes an Ed25519 key fit the dsse library.
type signer struct{ ed25519.PrivateKey }

func (s signer) KeyID() (string, error) {
	return string(IDOf(s.Public().(ed25519.PublicKey))), nil
}

func (s signer) Sign(_ context.Context, data []byte) ([]byte, error) {
	return ed25519.Sign(s.PrivateKey, data), nil
}

// TestSealIsWhatDSSEWrites: to the byte what the library makes of the same key
// and payload.
func TestSealIsWhatDSSEWrites(t *testing.T) {
	library, err := dsse.NewEnvelopeSigner(signer{goldenKey})
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range goldens() {
		for _, typ := range []PayloadType{TypeOrder, "a\"b<&>\\ü\n", ""} {
			payload, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			env, err := library.SignPayload(t.Context(), string(typ), payload)
			if err != nil {
				t.Fatal(err)
			}
			want, err := json.Marshal(env)
			if err != nil {
				t.Fatal(err)
			}
			got, err := Seal(goldenKey, typ, v)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s as %q:\n%s\nwant\n%s", name, typ, got, want)
			}
			if _, ok := split(got); ok != (typ != "a\"b<&>\\ü\n") {
				t.Errorf("%s as %q: read without the library: %v", name, typ, ok)
			}
		}
	}
}

// verifier makes a public key fit the dsse library.
type verifier struct{ ed25519.PublicKey }

func (v verifier) KeyID() (string, error)   { return string(IDOf(v.PublicKey)), nil }
func (v verifier) Public() crypto.PublicKey { return v.PublicKey }
func (v verifier) Verify(_ context.Context, data, sig []byte) error {
	if !ed25519.Verify(v.PublicKey, data, sig) {
		return ErrSignature
	}
	return nil
}

// libraryOpens is Open by the dsse library.
func libraryOpens(raw []byte, pub ed25519.PublicKey) (PayloadType, []byte, error) {
	var env dsse.Envelope
	if err := json.Unmarshal(raw, &env); err != nil {
		return "", nil, err
	}
	v, err := dsse.NewEnvelopeVerifier(verifier{pub})
	if err != nil {
		return "", nil, err
	}
	_, payload, err := v.VerifyAndDecode(context.Background(), &env)
	if err != nil {
		return "", nil, err
	}
	return PayloadType(env.PayloadType), payload, nil
}

// FuzzOpenIsAsDSSE: every envelope is judged as the library does, by both of the
// ways in which it may be read.
func FuzzOpenIsAsDSSE(f *testing.F) {
	sealed, err := Seal(goldenKey, TypeOrder, goldens()["order"])
	if err != nil {
		f.Fatal(err)
	}
	id := string(IDOf(goldenKey.Public().(ed25519.PublicKey)))
	f.Add(sealed)
	for _, change := range [][2]string{
		{id, ""}, {id, "a" + id[1:]}, {`"sig":"`, `"sig":"A`}, {`"sig":"`, `"sig": "`}, {`"payload":"e`, `"payload":"f`}, {`"payload":"`, "\"payload\":\"\n"},
		{`"payload":"`, `"payload":"\u0065`}, {`=="}]}`, `"}]}`}, {`"}]}`, `"},{"keyid":"","sig":""}]}`}, {`"}]}`, `"}]} `}, {`"}]}`, `"}],"payload":""}`},
		{`/vnd`, `/v\u006ed`}, {`order`, `report`}, {`"payloadType"`, `"payloadtype"`}, {`/`, `_`},
	} {
		f.Add([]byte(strings.Replace(string(sealed), change[0], change[1], 1)))
	}
	pub := goldenKey.Public().(ed25519.PublicKey)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > MaxMessage {
			return
		}
		wantTyp, want, wantErr := libraryOpens(raw, pub)
		for _, open := range []func([]byte, ed25519.PublicKey) (PayloadType, json.RawMessage, error){Open, openAny} {
			typ, payload, err := open(raw, pub)
			if (err == nil) != (wantErr == nil) || typ != wantTyp || !bytes.Equal(payload, want) {
				t.Fatalf("%q opens as %s %q, %v; the library says %s %q, %v", raw, typ, payload, err, wantTyp, want, wantErr)
			}
		}
		var env dsse.Envelope
		if json.Unmarshal(raw, &env) == nil && TypeOf(raw) != PayloadType(env.PayloadType) {
			t.Fatalf("%q claims to be %q, the library says %q", raw, TypeOf(raw), env.PayloadType)
		}
		wantBody, wantErr := env.DecodeB64Payload()
		if body, err := payloadOf(raw); err == nil && (wantErr != nil || !bytes.Equal(body, wantBody)) {
			t.Fatalf("%q carries %q, the library says %q, %v", raw, body, wantBody, wantErr)
		}
	})
}
