package repo

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestAKeyFileIsNeverOverwritten: what it has signed could not be followed any more.
func TestAKeyFileIsNeverOverwritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "k.pem")
	_, err := newKey(path, nil)
	must(t, err)
	before := read(t, path)
	if _, err := newKey(path, nil); err == nil {
		t.Error("another key was written to the same file")
	}
	if !bytes.Equal(read(t, path), before) {
		t.Error("the key is gone")
	}
}

// TestAFileThatIsNoKeyIsNotReadToItsEnd: somebody may name a disk.
func TestAFileThatIsNoKeyIsNotReadToItsEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "k.pem")
	_, err := newKey(path, nil)
	must(t, err)
	must(t, os.WriteFile(path, append(bytes.Repeat([]byte("\n"), maxKeyFile), read(t, path)...), 0o600))
	if _, err := LoadKey(path, nil); err == nil {
		t.Error("a file of 64 KiB and more was taken")
	}
}

// TestWhoHasThePublicHalfAloneCannotSign, and is not taken for one who can.
func TestWhoHasThePublicHalfAloneCannotSign(t *testing.T) {
	dir := t.TempDir()
	priv, err := newKey(filepath.Join(dir, "whole.pem"), nil)
	must(t, err)
	der, err := x509.MarshalPKIXPublicKey(priv.Public())
	must(t, err)
	half := filepath.Join(t.TempDir(), "half.pem")
	must(t, os.WriteFile(half, pem.EncodeToMemory(&pem.Block{Type: pemPublic, Bytes: der}), 0o600))
	if _, err := LoadKey(half, nil); err == nil || !strings.Contains(err.Error(), "only the public half") {
		t.Errorf("%v", err)
	}
	id, err := KeyID(priv.Public())
	must(t, err)
	for folder, want := range map[string]int{dir: 1, filepath.Dir(half): 0} {
		ring, err := Desk{Keys: folder}.keyring()
		must(t, err)
		if got := ring.of([]string{id}); len(got) != want {
			t.Errorf("%d keys sign, want %d", len(got), want)
		}
	}
}

// TestAPassphraseIsAskedForOnce for a key that signs several files.
func TestAPassphraseIsAskedForOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "k.pem")
	_, err := newKey(path, []byte("correct horse"))
	must(t, err)
	asked := 0
	k, err := Desk{Passphrase: func(string) ([]byte, error) { asked++; return []byte("correct horse"), nil }}.keyFile(path)
	must(t, err)
	for range 3 {
		_, err := k.open()
		must(t, err)
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	// 600,000 rounds, as an INTEGER of DER: who steals the file has to guess slowly.
	if block, _ := pem.Decode(read(t, path)[bytes.Index(read(t, path), []byte("-----BEGIN "+pemEncrypted)):]); !bytes.Contains(block.Bytes, []byte{0x02, 0x03, 0x09, 0x27, 0xc0}) {
		t.Error("the passphrase is stretched by another number of rounds")
	}
}

// TestAKeyOfAnotherKindSignsNothing: devices know two kinds.
func TestAKeyOfAnotherKindSignsNothing(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	path := filepath.Join(t.TempDir(), "rsa.pem")
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: pemPrivate, Bytes: der}), 0o600))
	const words = "cannot sign releases"
	if _, err := LoadKey(path, nil); err == nil || !strings.Contains(err.Error(), words) {
		t.Errorf("from a file: %v", err)
	}
	if _, err := (Desk{Signers: []crypto.Signer{key}}).keyring(); err == nil || !strings.Contains(err.Error(), words) {
		t.Errorf("handed in: %v", err)
	}
}

// TestATargetOfAReleaseIsNamedForItsVersion: a stick's newest is looked for among these.
func TestATargetOfAReleaseIsNamedForItsVersion(t *testing.T) {
	for name, want := range map[string]string{
		"bundles/1.2.3.json": "1.2.3", "bundles/1.2.3-rc.1.json": "1.2.3-rc.1",
		"bundles/latest.json": "", "bundles/.json": "", "bundles/1.2.3": "", "1.2.3.json": "", "bundles/bundles/1.2.3.json": "", "bundles/../1.2.3.json": "", "": "",
	} {
		if v, ok := TargetVersion(name); ok != (want != "") || ok && v != want {
			t.Errorf("%q: %q, %v", name, v, ok)
		}
	}
}
