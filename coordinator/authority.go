package coordinator

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// authority holds the coordinator's secrets: the CA that makes devices members
// and servers believable, the key that signs orders, the key of the data
// plane's tickets. They are files in one folder, made at the first start.
// Coordinators that share a fleet share a copy of that folder.
type authority struct {
	caCert    *x509.Certificate
	caPEM     []byte
	caKey     crypto.Signer
	orderKey  ed25519.PrivateKey
	ticketKey []byte
}

const (
	ticketKeySize  = 32                  // bytes
	deviceCertLife = 30 * 24 * time.Hour // unless the operator says otherwise
	minCertLife    = time.Minute
	serverCertLife = 365 * 24 * time.Hour
	caLife         = 20 * 365 * 24 * time.Hour
	// backdate lets a device whose clock is a little slow use a new certificate.
	// It is at most a tenth of the certificate's life, so that two thirds of the
	// time from NotBefore to NotAfter are well ahead when it is made.
	backdate = time.Hour
)

func openAuthority(dir string) (*authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the folder for the coordinator's keys cannot be made: %w", err)
	}
	if err := checkComplete(dir); err != nil {
		return nil, err
	}
	var a authority
	caKey, err := loadKey(filepath.Join(dir, "ca.key"), func() (any, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) })
	if err != nil {
		return nil, err
	}
	a.caKey = caKey
	orderKey, err := loadKey(filepath.Join(dir, "orders.key"), func() (any, error) {
		_, k, err := ed25519.GenerateKey(rand.Reader)
		return k, err
	})
	if err != nil {
		return nil, err
	}
	var ok bool
	if a.orderKey, ok = orderKey.(ed25519.PrivateKey); !ok {
		return nil, fmt.Errorf("%s must be an Ed25519 key, it is %T", filepath.Join(dir, "orders.key"), orderKey)
	}
	if a.ticketKey, err = loadOrMake(filepath.Join(dir, "tickets.key"), func() ([]byte, error) {
		k := make([]byte, ticketKeySize)
		rand.Read(k)
		return k, nil
	}); err != nil {
		return nil, err
	}
	if len(a.ticketKey) != ticketKeySize {
		return nil, fmt.Errorf("%s is damaged: it has %d bytes instead of %d; restore it from a backup, or remove the file to make a new one", filepath.Join(dir, "tickets.key"), len(a.ticketKey), ticketKeySize)
	}
	if a.caPEM, err = loadOrMake(filepath.Join(dir, "ca.pem"), a.selfSign); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(a.caPEM)
	if block == nil {
		return nil, fmt.Errorf("%s is damaged: restore the folder from a backup", filepath.Join(dir, "ca.pem"))
	}
	if a.caCert, err = x509.ParseCertificate(block.Bytes); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", filepath.Join(dir, "ca.pem"), err)
	}
	if !publicOf(a.caKey).Equal(a.caCert.PublicKey) {
		return nil, fmt.Errorf("ca.key and ca.pem in %s do not belong together: restore the folder from a backup", dir)
	}
	return &a, nil
}

// checkComplete refuses a folder of which a part is missing: a new order key or
// authority would be one that no device knows. The certificate is made last, so
// without it the first start may have been cut off.
func checkComplete(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, "ca.pem")); err != nil {
		return nil
	}
	for _, name := range []string{"ca.key", "orders.key"} {
		if _, err := os.Stat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is missing: restore the folder from a backup, devices know no other key", filepath.Join(dir, name))
		}
	}
	return nil
}

func publicOf(k crypto.Signer) interface{ Equal(crypto.PublicKey) bool } {
	return k.Public().(interface{ Equal(crypto.PublicKey) bool })
}

// loadOrMake reads a secret file, or makes it durable at the first start.
func loadOrMake(path string, make func() ([]byte, error)) ([]byte, error) {
	raw, err := os.ReadFile(path)
	if err == nil {
		return raw, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("a key cannot be read, check the folder's owner and permissions: %w", err)
	}
	if raw, err = make(); err != nil {
		return nil, err
	}
	if err := durable.WriteFile(path, raw, 0o600); err != nil {
		return nil, fmt.Errorf("a key cannot be saved: %w", err)
	}
	return raw, nil
}

func loadKey(path string, generate func() (any, error)) (crypto.Signer, error) {
	raw, err := loadOrMake(path, func() ([]byte, error) {
		k, err := generate()
		if err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			return nil, err
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
	})
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s is damaged: restore it from a backup", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", path, err)
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T, which cannot sign", path, k)
	}
	return s, nil
}

func (a *authority) selfSign() ([]byte, error) {
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "Deimos fleet authority"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caLife),
		IsCA:                  true,
		MaxPathLenZero:        true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, a.caKey.Public(), a.caKey)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// serverCertificate is good for these names and addresses. The chain holds the
// authority too: enrolling devices find the one their token pins in it.
func (a *authority) serverCertificate(names []string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: "Deimos coordinator"},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(serverCertLife),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.caCert, key.Public(), a.caKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der, a.caCert.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// serverCert is the coordinator's own certificate. It renews itself at two
// thirds of its life, when somebody connects; the names are looked up anew. It
// does so too when somebody connects to an address that it is not good for, which
// this machine has got since.
type serverCert struct {
	make func() (tls.Certificate, error)
	now  func() time.Time
	log  *slog.Logger

	mu    sync.Mutex
	cert  *tls.Certificate
	renew time.Time
	look  time.Time // not before this for an address
}

const (
	serverCertRenew = serverCertLife * 2 / 3
	serverCertRetry = time.Hour        // after a renewal that failed
	serverCertLook  = 10 * time.Second // between two because of an address
)

// get is for [tls.Config.GetCertificate].
func (s *serverCert) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cert != nil && s.now().Before(s.renew) && !s.misses(hello) {
		return s.cert, nil
	}
	c, err := s.make()
	switch {
	case err == nil:
		s.cert, s.renew = &c, s.now().Add(serverCertRenew)
	case s.cert != nil:
		s.log.Warn("the server certificate could not be renewed; it will be tried again", "error", err)
		s.renew = s.now().Add(serverCertRetry)
	default:
		return nil, fmt.Errorf("the server certificate cannot be made: %w", err)
	}
	return s.cert, nil
}

// misses tells whether somebody came to an address that the certificate is not
// good for, and it is time to see whether another would be.
func (s *serverCert) misses(hello *tls.ClientHelloInfo) bool {
	if hello == nil || hello.Conn == nil || s.now().Before(s.look) {
		return false
	}
	addr, ok := hello.Conn.LocalAddr().(*net.TCPAddr)
	if !ok || slices.ContainsFunc(s.cert.Leaf.IPAddresses, addr.IP.Equal) {
		return false
	}
	s.look = s.now().Add(serverCertLook)
	return true
}

// deviceCertificate makes the key of a checked request a member of the fleet.
func (a *authority) deviceCertificate(key ed25519.PublicKey, life time.Duration) (certPEM []byte, notAfter time.Time, err error) {
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: string(wire.IDOf(key))},
		NotBefore:    now.Add(-min(backdate, life/10)),
		NotAfter:     now.Add(life),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.caCert, key, a.caKey)
	if err != nil {
		return nil, time.Time{}, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), t.NotAfter, nil
}

// pool holds the authority alone: nobody else makes members.
func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.caCert)
	return p
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return n
}
