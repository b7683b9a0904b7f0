package agent

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
	"log/slog"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// limit is how long a test waits for an event before it fails.
const limit = 2 * time.Minute

// authority is a fleet's CA with its order-signing key.
type authority struct {
	t     testing.TB
	cert  *x509.Certificate
	key   crypto.Signer
	order ed25519.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fleet authority"},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t: t, cert: cert, key: key, order: newKey(t)}
}

func newKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// issue signs a certificate; names are host names or IP addresses.
func (a *authority) issue(pub crypto.PublicKey, cn string, use x509.ExtKeyUsage, names ...string) []byte {
	return a.issueUntil(time.Now().Add(time.Hour), pub, cn, use, names...)
}

func (a *authority) issueUntil(end time.Time, pub crypto.PublicKey, cn string, use x509.ExtKeyUsage, names ...string) []byte {
	a.t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: cn},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{use},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, pub, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// server is a certificate for these names, with the authority in its chain.
func (a *authority) server(names ...string) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	der := a.issue(key.Public(), "server", x509.ExtKeyUsageServerAuth, names...)
	return tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key}
}

// token belongs to this authority.
func (a *authority) token() wire.FleetToken { return wire.NewFleetToken(a.cert.Raw) }

// reply makes id a member.
func (a *authority) reply(id Identity) wire.EnrolReply {
	pub := id.key.Public().(ed25519.PublicKey)
	der := a.issue(pub, string(id.ID), x509.ExtKeyUsageClientAuth)
	return wire.EnrolReply{
		Device: id.ID, CA: a.pem(), OrderKey: a.order.Public().(ed25519.PublicKey),
		Certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Brokers:     []string{"ssl://127.0.0.1:1"}, DataPlane: []string{"https://127.0.0.1:1"}, BeatSeconds: 60,
	}
}

func (a *authority) seal(typ wire.PayloadType, v any) []byte {
	a.t.Helper()
	raw, err := wire.Seal(a.order, typ, v)
	if err != nil {
		a.t.Fatal(err)
	}
	return raw
}

func newIdentity(t testing.TB) Identity {
	t.Helper()
	k := newKey(t)
	return Identity{ID: wire.IDOf(k.Public().(ed25519.PublicKey)), key: k}
}

// discardLog is for parts whose log nobody looks at.
func discardLog() *slog.Logger { return slog.New(slog.DiscardHandler) }

// await takes one value, or fails the test.
func await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(limit):
		t.Fatalf("waited %s for %s", limit, what)
		panic("unreachable")
	}
}
