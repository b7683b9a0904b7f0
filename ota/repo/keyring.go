package repo

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/youmark/pkcs8"

	"github.com/deimos-edge/deimos/internal/durable"
)

// Desk is where somebody signs: a folder of keys, and what stands behind others.
type Desk struct {
	// Keys is the folder of [Init]. Its *.pem are PKCS #8, plain or with a
	// passphrase; root.json is the newest root, N.root.json are those before.
	Keys string
	// Signers are further keys, wherever they are: a token that signs and never
	// gives its key away is a [crypto.Signer] too. Ed25519 or ECDSA on P-256;
	// of the log only Ed25519.
	Signers []crypto.Signer
	// Passphrase is asked for that of a key file, once a file; nil if nobody can.
	Passphrase func(file string) ([]byte, error)
}

// key is one that may be locked: who it is is known, it signs once it is open.
type key struct {
	id     string
	where  string // for people
	public crypto.PublicKey
	open   func() (crypto.Signer, error) // nil: only the public half is here
}

// keyring is what a desk can sign with, by id.
type keyring map[string]*key

func (d Desk) keyring() (keyring, error) {
	ring := keyring{}
	for _, s := range d.Signers {
		k := &key{where: "a key that was handed in", public: s.Public(), open: func() (crypto.Signer, error) { return s, nil }}
		var err error
		if k.id, err = KeyID(k.public); err != nil {
			return nil, err
		}
		ring[k.id] = k
	}
	files, err := filepath.Glob(filepath.Join(d.Keys, "*.pem"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		k, err := d.keyFile(file)
		if err != nil {
			return nil, err
		}
		if k.open != nil && ring[k.id] == nil {
			ring[k.id] = k
		}
	}
	return ring, nil
}

// of are the keys at hand among these ids, by where they are.
func (r keyring) of(ids []string) (keys []*key) {
	for _, id := range ids {
		if k := r[id]; k != nil {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, b *key) int { return cmp.Compare(a.where, b.where) })
	return keys
}

// LoadKey opens the private key of a file. passphrase may be nil.
func LoadKey(file string, passphrase func(file string) ([]byte, error)) (crypto.Signer, error) {
	k, err := Desk{Passphrase: passphrase}.keyFile(file)
	if err != nil {
		return nil, err
	}
	if k.open == nil {
		return nil, fmt.Errorf("%s has only the public half of the key", file)
	}
	return k.open()
}

// LoadPublicKey reads the public half of a key: from a file of either half.
func LoadPublicKey(file string, passphrase func(file string) ([]byte, error)) (crypto.PublicKey, error) {
	k, err := Desk{Passphrase: passphrase}.keyFile(file)
	if err != nil {
		return nil, err
	}
	return k.public, nil
}

// Types of PEM blocks.
const (
	pemPrivate   = "PRIVATE KEY"
	pemEncrypted = "ENCRYPTED PRIVATE KEY"
	pemPublic    = "PUBLIC KEY"
)

// maxKeyFile bounds a key file, in bytes.
const maxKeyFile = 64 << 10

// keyFile reads a file of PEM blocks. The public half stands before an encrypted
// private one, so that nobody is asked for the passphrase of a key that does not sign.
func (d Desk) keyFile(file string) (*key, error) {
	raw, err := durable.ReadFile(file, maxKeyFile)
	if err != nil {
		return nil, fmt.Errorf("read a key: %w", err)
	}
	blocks := map[string][]byte{}
	for {
		var b *pem.Block
		if b, raw = pem.Decode(raw); b == nil {
			break
		}
		blocks[b.Type] = b.Bytes
	}
	k := &key{where: file}
	if der := blocks[pemPublic]; der != nil {
		if k.public, err = x509.ParsePKIXPublicKey(der); err != nil {
			return nil, fmt.Errorf("the public key in %s cannot be read: %w", file, err)
		}
	}
	switch plain, locked := blocks[pemPrivate], blocks[pemEncrypted]; {
	case plain != nil:
		s, err := parseSigner(file, plain, nil)
		if err != nil {
			return nil, err
		}
		k.open = func() (crypto.Signer, error) { return s, nil }
		k.public = s.Public()
	case locked != nil:
		k.open = d.unlock(k, locked)
		if k.public == nil { // made by another tool
			s, err := k.open()
			if err != nil {
				return nil, err
			}
			k.public = s.Public()
		}
	case k.public != nil:
		// open stays nil: it cannot sign
	default:
		return nil, fmt.Errorf("%s is no PEM file of a key (PKCS #8)", file)
	}
	k.id, err = KeyID(k.public)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return k, nil
}

// unlock asks for the passphrase, once.
func (d Desk) unlock(k *key, der []byte) func() (crypto.Signer, error) {
	var open crypto.Signer
	return func() (crypto.Signer, error) {
		if open != nil {
			return open, nil
		}
		if d.Passphrase == nil {
			return nil, fmt.Errorf("%s has a passphrase; name a file that holds it, or run this at a terminal", k.where)
		}
		pass, err := d.Passphrase(k.where)
		if err != nil {
			return nil, fmt.Errorf("the passphrase of %s: %w", k.where, err)
		}
		s, err := parseSigner(k.where, der, pass)
		if err != nil {
			return nil, err
		}
		if k.public != nil && !samePublic(k.public, s.Public()) {
			return nil, fmt.Errorf("%s holds the private half of another key than the public one that it shows", k.where)
		}
		open = s
		return s, nil
	}
}

func samePublic(a, b crypto.PublicKey) bool {
	e, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && e.Equal(b)
}

func parseSigner(file string, der, passphrase []byte) (crypto.Signer, error) {
	parsed, err := pkcs8.ParsePKCS8PrivateKey(der, passphrase)
	switch {
	case err != nil && passphrase != nil:
		return nil, fmt.Errorf("%s does not open with this passphrase (%w)", file, err)
	case err != nil:
		return nil, fmt.Errorf("%s is no PKCS #8 key: %w", file, err)
	}
	s, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s is no key that signs", file)
	}
	return s, nil
}

// KeyID is the id of a public key in TUF metadata, lower-case hex.
func KeyID(public crypto.PublicKey) (string, error) {
	k, err := tufKey(public)
	if err != nil {
		return "", err
	}
	return k.ID()
}

func tufKey(public crypto.PublicKey) (*metadata.Key, error) {
	switch p := public.(type) {
	case ed25519.PublicKey:
	case *ecdsa.PublicKey:
		if p.Curve != elliptic.P256() {
			return nil, fmt.Errorf("an ECDSA key on %s cannot sign releases: use Ed25519, or ECDSA on P-256", p.Curve.Params().Name)
		}
	default:
		return nil, fmt.Errorf("a key of type %T cannot sign releases: use Ed25519, or ECDSA on P-256", public)
	}
	return metadata.KeyFromPublicKey(public)
}

// newKey writes an Ed25519 key to a file that is not there yet, with a
// passphrase if there is one.
func newKey(path string, passphrase []byte) (ed25519.PrivateKey, error) {
	public, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	var file bytes.Buffer
	block := pem.Block{Type: pemPrivate}
	if len(passphrase) > 0 {
		der, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			return nil, err
		}
		if err := pem.Encode(&file, &pem.Block{Type: pemPublic, Bytes: der}); err != nil {
			return nil, err
		}
		block.Type = pemEncrypted
		if block.Bytes, err = pkcs8.MarshalPrivateKey(priv, passphrase, keyDerivation()); err != nil {
			return nil, err
		}
	} else if block.Bytes, err = x509.MarshalPKCS8PrivateKey(priv); err != nil {
		return nil, err
	}
	if err := pem.Encode(&file, &block); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("write a key: %w", err)
	}
	_, err = f.Write(file.Bytes())
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, errors.Join(fmt.Errorf("write a key: %w", err), os.Remove(path))
	}
	return priv, durable.Sync(filepath.Dir(path))
}

// keyDerivation is PBES2 as openssl reads it, with as many rounds of
// PBKDF2-HMAC-SHA-256 as OWASP asks for (Password Storage Cheat Sheet, 2023).
func keyDerivation() *pkcs8.Opts {
	return &pkcs8.Opts{
		Cipher:  pkcs8.AES256CBC,
		KDFOpts: pkcs8.PBKDF2Opts{SaltSize: 16, IterationCount: 600_000, HMACHash: crypto.SHA256},
	}
}

// sign adds the signature of a key.
func sign[T metadata.Roles](m *metadata.Metadata[T], s crypto.Signer) error {
	_, err := m.Sign(tufSigner{s})
	return err
}

// tufSigner is a key as go-tuf wants one.
type tufSigner struct{ crypto.Signer }

func (s tufSigner) PublicKey(...signature.PublicKeyOption) (crypto.PublicKey, error) {
	return s.Public(), nil
}

func (s tufSigner) SignMessage(r io.Reader, _ ...signature.SignOption) ([]byte, error) {
	message, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	if _, ok := s.Public().(ed25519.PublicKey); ok {
		return s.Sign(rand.Reader, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return s.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// short is enough of an id to tell keys apart.
func short(id string) string { return id[:min(len(id), 12)] }

func shortAll(ids []string) string {
	var all []string
	for _, id := range ids {
		all = append(all, short(id))
	}
	return strings.Join(all, ", ")
}
