package repo

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/deimos-edge/deimos/internal/durable"
)

const day = 24 * time.Hour

// Expiry is how long each role's signature is good for.
type Expiry struct {
	Root, Targets, Snapshot, Timestamp time.Duration
}

// DefaultExpiry suits a fleet whose manager signs by hand about once a month.
var DefaultExpiry = Expiry{Root: 730 * day, Targets: 365 * day, Snapshot: 90 * day, Timestamp: 45 * day}

func (e Expiry) orDefault() Expiry {
	d := DefaultExpiry
	for _, f := range []struct{ have, def *time.Duration }{
		{&e.Root, &d.Root}, {&e.Targets, &d.Targets}, {&e.Snapshot, &d.Snapshot}, {&e.Timestamp, &d.Timestamp},
	} {
		if *f.have == 0 {
			*f.have = *f.def
		}
	}
	return e
}

// InitOptions describes a new set of keys. Zero values mean the defaults.
type InitOptions struct {
	RootKeys  int // 3
	Threshold int // of root, 2 at least; 2
	Now       time.Time
	Expiry    Expiry
}

// rootFile is the newest signed root; it is public.
const rootFile = "root.json"

// Init makes all keys of a new fleet in dir: root-1.pem and on, targets.pem,
// snapshot.pem, timestamp.pem (Ed25519, PKCS #8, mode 0600), and root.json,
// which they sign. It never overwrites anything.
func Init(dir string, o InitOptions) error {
	if o.RootKeys == 0 {
		o.RootKeys = 3
	}
	if o.Threshold == 0 {
		o.Threshold = 2
	}
	if o.Threshold < 2 || o.RootKeys < o.Threshold {
		return fmt.Errorf("%d root keys of which %d sign: at least two must sign, so that one stolen key is not enough", o.RootKeys, o.Threshold)
	}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory for the keys: %w", err)
	}
	if entries, err := os.ReadDir(dir); err != nil {
		return err
	} else if len(entries) > 0 {
		return fmt.Errorf("%s is not empty; keys are never overwritten: choose a new directory", dir)
	}
	root, err := newKeys(dir, o)
	if err != nil {
		return err
	}
	raw, err := root.ToBytes(true)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, rootFile), raw, 0o644)
}

// newKeys makes the key files and the root that all root keys have signed.
func newKeys(dir string, o InitOptions) (*metadata.Metadata[metadata.RootType], error) {
	root := metadata.Root(o.Now.UTC().Truncate(time.Second).Add(o.Expiry.orDefault().Root))
	var rootKeys []ed25519.PrivateKey
	add := func(file, role string) error {
		priv, err := newKey(filepath.Join(dir, file))
		if err != nil {
			return err
		}
		key, err := metadata.KeyFromPublicKey(priv.Public())
		if err != nil {
			return err
		}
		if role == metadata.ROOT {
			rootKeys = append(rootKeys, priv)
		}
		return root.Signed.AddKey(key, role)
	}
	for i := 1; i <= o.RootKeys; i++ {
		if err := add(fmt.Sprintf("root-%d.pem", i), metadata.ROOT); err != nil {
			return nil, err
		}
	}
	for _, role := range []string{metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP} {
		if err := add(role+".pem", role); err != nil {
			return nil, err
		}
	}
	root.Signed.Roles[metadata.ROOT].Threshold = o.Threshold
	for _, k := range rootKeys {
		if err := sign(root, k); err != nil {
			return nil, err
		}
	}
	return root, nil
}

func newKey(path string) (ed25519.PrivateKey, error) {
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("write a key: %w", err)
	}
	err = pem.Encode(f, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return priv, errors.Join(err, f.Sync(), f.Close())
}

func loadKey(path string) (ed25519.PrivateKey, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read a key: %w", err)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s is no PEM file", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s is no PKCS #8 key: %w", path, err)
	}
	priv, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s is no Ed25519 key", path)
	}
	return priv, nil
}

// Root returns the newest signed root of a directory of keys: what a device
// needs to trust.
func Root(keysDir string) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(keysDir, rootFile))
	if err != nil {
		return nil, fmt.Errorf("there is no update root in %s: %w", keysDir, err)
	}
	return raw, nil
}

// sign adds a signature; the keys are ours, so only a bug can make it fail.
func sign[T metadata.Roles](m *metadata.Metadata[T], priv ed25519.PrivateKey) error {
	signer, err := signature.LoadSigner(priv, crypto.Hash(0))
	if err != nil {
		return err
	}
	_, err = m.Sign(signer)
	return err
}
