package agent

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// Identity is the device's key. Same key, same device.
type Identity struct {
	ID  wire.DeviceID
	key ed25519.PrivateKey
}

const keyFile = "key.pem"

// LoadIdentity reads the device's key from dir, and makes it there (PKCS #8,
// mode 0600, synced to disk) at the first start. A key that is there but cannot
// be read is an error, never a reason to make another one.
func LoadIdentity(dir string) (Identity, error) {
	path := filepath.Join(dir, keyFile)
	id, err := readIdentity(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	if err := makeKey(dir, path); err != nil {
		return Identity{}, fmt.Errorf("the device key cannot be saved, so this device would be another one after a restart: %w", err)
	}
	return readIdentity(path)
}

func readIdentity(path string) (Identity, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return Identity{}, fmt.Errorf("the device key cannot be read: %w", err)
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return Identity{}, fmt.Errorf("the device key %s is damaged: restore it from a backup, or remove it to enrol as a new device", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return Identity{}, fmt.Errorf("the device key %s is damaged: %w", path, err)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return Identity{}, fmt.Errorf("the device key %s is a %T, it must be Ed25519", path, parsed)
	}
	return Identity{ID: wire.IDOf(key.Public().(ed25519.PublicKey)), key: key}, nil
}

func makeKey(dir, path string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	raw := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return durable.WriteFile(path, raw, 0o600)
}

// csr is a certificate request that proves possession of the key.
func (i Identity) csr() ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: string(i.ID)},
	}, i.key)
}
