package wire

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"strings"
)

// claimLetters is the length of a claim code: 75 bits. Who wants to stand
// between a device and its coordinator would have to find an authority with the
// same code within the hours that the device waits to be claimed.
const claimLetters = 15

// ClaimCode is what a device that waits to be claimed shows to its owner, and
// what the fleet manager types in: base32 of SHA-256("deimos claim v1" ‖ device
// key ‖ [Fingerprint] of the authority), in groups of five letters. Device and
// coordinator work it out alone; it is the same only if both see the same
// authority.
func ClaimCode(key ed25519.PublicKey, caFingerprint [16]byte) string {
	h := sha256.New()
	h.Write([]byte("deimos claim v1"))
	h.Write(key)
	h.Write(caFingerprint[:])
	s := idEncoding.EncodeToString(h.Sum(nil))
	return s[:5] + "-" + s[5:10] + "-" + s[10:claimLetters]
}

// ParseClaimCode reads a code as people type it: in either case, with or
// without the dashes, with spaces between.
func ParseClaimCode(s string) (string, error) {
	letters := strings.Map(func(r rune) rune {
		if r == '-' || r == ' ' {
			return -1
		}
		return r
	}, strings.ToLower(strings.TrimSpace(s)))
	if len(letters) != claimLetters {
		return "", fmt.Errorf("%q is no claim code: it has %d letters, like abcde-fghij-klmno", s, claimLetters)
	}
	if !inAlphabet(letters) {
		return "", fmt.Errorf("%q is no claim code: only a-z and 2-7 are used", s)
	}
	return letters[:5] + "-" + letters[5:10] + "-" + letters[10:], nil
}
