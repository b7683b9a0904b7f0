package engine

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/nats-io/nkeys"
)

// SecretSize is the length of an engine secret in bytes.
const SecretSize = 32

// NewSecret makes the secret that coordinators share with nobody. It is needed
// only for an external server; the embedded one makes its own at every start.
func NewSecret() ([]byte, error) {
	s := make([]byte, SecretSize)
	if _, err := rand.Read(s); err != nil {
		return nil, fmt.Errorf("make an engine secret: %w", err)
	}
	return s, nil
}

// keyring is everything that proves a coordinator to the server. All of it is
// derived from the secret, so that there is one thing to keep, and the server's
// configuration needs only the public halves.
type keyring struct {
	issuer      nkeys.KeyPair // signs what the auth callout answers
	coordinator nkeys.KeyPair // user in the coordinator's account
	keeper      nkeys.KeyPair // user in the devices' account, makes the streams of MQTT
	system      nkeys.KeyPair // user in the system account, ends connections
}

func newKeyring(secret []byte) (*keyring, error) {
	if len(secret) != SecretSize {
		return nil, fmt.Errorf("an engine secret has %d bytes, this one has %d", SecretSize, len(secret))
	}
	var k keyring
	var errs []error
	derive := func(prefix nkeys.PrefixByte, name string) nkeys.KeyPair {
		raw, err := hkdf.Expand(sha256.New, secret, "deimos engine v1 "+name, 32)
		if err != nil {
			errs = append(errs, err)
			return nil
		}
		seed, err := nkeys.EncodeSeed(prefix, raw)
		if err != nil {
			errs = append(errs, err)
			return nil
		}
		kp, err := nkeys.FromSeed(seed)
		errs = append(errs, err)
		return kp
	}
	k.issuer = derive(nkeys.PrefixByteAccount, "issuer")
	k.coordinator = derive(nkeys.PrefixByteUser, "coordinator")
	k.keeper = derive(nkeys.PrefixByteUser, "keeper")
	k.system = derive(nkeys.PrefixByteUser, "system")
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("derive the engine's keys: %w", err)
	}
	return &k, nil
}

// public is the part of a keyring that a server's configuration names.
type public struct {
	Issuer, Coordinator, Keeper, System string
}

func (k *keyring) public() (public, error) {
	var p public
	var errs []error
	for _, it := range []struct {
		to   *string
		from nkeys.KeyPair
	}{{&p.Issuer, k.issuer}, {&p.Coordinator, k.coordinator}, {&p.Keeper, k.keeper}, {&p.System, k.system}} {
		var err error
		*it.to, err = it.from.PublicKey()
		errs = append(errs, err)
	}
	return p, errors.Join(errs...)
}
