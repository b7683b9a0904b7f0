package wire

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"strings"
)

// FleetToken lets devices enrol, and tells them which coordinator to believe:
// beside a secret it holds the fingerprint of the coordinator's authority, so
// that a device needs no certificate store and trusts nobody on first use.
//
// In text: "deimos_" secret "_" fingerprint, each 26 letters of the alphabet
// that device ids use (16 bytes, 128 bit).
type FleetToken struct {
	Secret      [16]byte
	Fingerprint [16]byte // first half of SHA-256 over the authority's DER certificate
}

const tokenPrefix = "deimos"

// ErrToken is returned for a text that is no fleet token.
var ErrToken = errors.New("this is no fleet token: it looks like deimos_<26 letters>_<26 letters>; make one with \"deimos token create\"")

// NewFleetToken draws a token for the authority with this DER certificate.
func NewFleetToken(caDER []byte) FleetToken {
	t := FleetToken{Fingerprint: Fingerprint(caDER)}
	rand.Read(t.Secret[:]) // never fails (crypto/rand)
	return t
}

// Fingerprint is what a [FleetToken] pins of an authority's DER certificate.
func Fingerprint(caDER []byte) [16]byte {
	sum := sha256.Sum256(caDER)
	return [16]byte(sum[:16])
}

func (t FleetToken) String() string {
	return tokenPrefix + "_" + idEncoding.EncodeToString(t.Secret[:]) + "_" + idEncoding.EncodeToString(t.Fingerprint[:])
}

// Hash is what a coordinator keeps of a token.
func (t FleetToken) Hash() [32]byte { return sha256.Sum256(t.Secret[:]) }

// ParseFleetToken reads the text form.
func ParseFleetToken(s string) (FleetToken, error) {
	var t FleetToken
	p := strings.Split(strings.TrimSpace(s), "_")
	if len(p) != 3 || p[0] != tokenPrefix {
		return t, ErrToken
	}
	for i, into := range []*[16]byte{&t.Secret, &t.Fingerprint} {
		b, err := idEncoding.DecodeString(p[i+1])
		if err != nil || len(b) != len(into) || !inAlphabet(p[i+1]) {
			return t, ErrToken
		}
		copy(into[:], b)
	}
	return t, nil
}
