package wire

import (
	"crypto/ed25519"
	"strings"
	"testing"
)

// The expected code was worked out by another program from RFC 4648 and the
// sentence above ClaimCode.
func TestClaimCodeIsOfTheKeyAndTheAuthority(t *testing.T) {
	key := ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)
	var ca [16]byte
	code := ClaimCode(key, ca)
	if want := "4x5vn-xmhjc-hsmk4"; code != want {
		t.Errorf("code %s, want %s", code, want)
	}
	other := pub(newKey(t))
	seen := map[string]bool{code: true, ClaimCode(other, ca): true}
	for i := range ca {
		between := ca
		between[i] ^= 1 // another authority: somebody stands between
		seen[ClaimCode(key, between)] = true
	}
	if len(seen) != 2+len(ca) {
		t.Errorf("%d codes for %d pairs of key and authority", len(seen), 2+len(ca))
	}
}

func TestClaimCodesAreReadAsPeopleTypeThem(t *testing.T) {
	const code = "abcde-fgh23-45677"
	for _, s := range []string{code, strings.ToUpper(code), "abcdefgh2345677", " abcde fgh23 45677\n", "a-b-c-d-e-f-g-h-2-3-4-5-6-7-7", "Abcde--Fgh23 - 45677"} {
		if got, err := ParseClaimCode(s); err != nil || got != code {
			t.Errorf("%q is read as %q, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "-", "abcde-fgh23-4567", "abcde-fgh23-456777", "abcde-fgh23-45671", "abcde-fgh23-4567!", "abcde_fgh23_45677", "äbcde-fgh23-4567", "abcde-fgh23-45\n77"} {
		if got, err := ParseClaimCode(s); err == nil {
			t.Errorf("%q is taken for %q", s, got)
		}
	}
}

// TestIDsAreOneLine: what base32 in Go passes over, line breaks, is no letter of
// an id, which becomes part of topics, keys and file names.
func TestIDsAreOneLine(t *testing.T) {
	for _, s := range []string{strings.Repeat("a", 23) + "\n", "\r" + strings.Repeat("a", 23), strings.Repeat("a", 10) + "\n\n\n" + strings.Repeat("a", 11)} {
		if id, err := ParseDeviceID(s); err == nil {
			t.Errorf("%q is taken for a device id", string(id))
		}
		if d, _, err := ParseSubject("deimos.1." + s + ".order"); err == nil {
			t.Errorf("%q is taken for a device id in a subject", string(d))
		}
	}
}
