package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// Membership is what enrolment gave this device, as kept on its disk.
type Membership struct {
	Coordinator string `json:"coordinator"` // the address it enrolled at
	wire.EnrolReply
}

// ErrRefused says that the coordinator answered and will not have this device.
// Trying again with the same token is of no use.
var ErrRefused = errors.New("the coordinator refused this device")

// ErrAddress says that the configured address cannot be a coordinator's.
var ErrAddress = errors.New("this is no address of a coordinator")

// ErrUntrusted says that whoever answered is not the coordinator of the token.
var ErrUntrusted = errors.New("this is not the coordinator that the token belongs to")

const membershipFile = "membership.json"

// loadMembership returns nil without error where the device never enrolled.
func loadMembership(dir string, id Identity) (*Membership, error) {
	path := filepath.Join(dir, membershipFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the enrolment cannot be read: %w", err)
	}
	var m Membership
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("the enrolment %s is damaged: remove it and start the agent with a fleet token: %w", path, err)
	}
	if m.Device != "" && m.Device != id.ID {
		return nil, fmt.Errorf("the enrolment %s is that of device %s, but this device's key makes it %s: restore that key, or remove the enrolment and start the agent with a fleet token", path, m.Device, id.ID)
	}
	if err := m.fits(id); err != nil {
		return nil, fmt.Errorf("the enrolment %s cannot be used: remove it and start the agent with a fleet token: %w", path, err)
	}
	return &m, nil
}

func (m *Membership) save(dir string) error {
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, membershipFile), raw, 0o600)
}

// orderKey is the key that signs the coordinator's orders.
func (m *Membership) orderKey() ed25519.PublicKey { return ed25519.PublicKey(m.OrderKey) }

// tlsConfig is the device's side of mutual TLS with broker and data plane.
func (m *Membership) tlsConfig(id Identity, now func() time.Time) (*tls.Config, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(m.CA) {
		return nil, errors.New("the enrolment holds no valid authority: remove it and enrol again")
	}
	block, _ := pem.Decode(m.Certificate)
	if block == nil {
		return nil, errors.New("the enrolment holds no valid certificate: remove it and enrol again")
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		RootCAs:      roots,
		Time:         now,
		Certificates: []tls.Certificate{{Certificate: [][]byte{block.Bytes}, PrivateKey: id.key}},
	}, nil
}

// issued is when the certificate began to be valid: the clock cannot be earlier.
func (m *Membership) issued() time.Time { return m.certificate().NotBefore }

// ends is when the certificate stops to be valid.
func (m *Membership) ends() time.Time { return m.certificate().NotAfter }

// certificate is the device's own; an empty one if it cannot be read.
func (m *Membership) certificate() *x509.Certificate {
	if block, _ := pem.Decode(m.Certificate); block != nil {
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			return c
		}
	}
	return &x509.Certificate{}
}

// enrol asks the coordinator at base (https://host:port) once to take this
// device in. It fails with ErrRefused or ErrUntrusted where asking again will
// not help, and with another error where it may.
func enrol(ctx context.Context, id Identity, base string, tok wire.FleetToken, req wire.EnrolRequest, now func() time.Time) (*Membership, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%w: %q; it looks like https://host:8443", ErrAddress, base)
	}
	if req.CSR, err = id.csr(); err != nil {
		return nil, err
	}
	req.Token = tok.String()
	body, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, u.JoinPath("/enrol/v1").String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	hr.Header.Set("Content-Type", "application/json")
	tr := &http.Transport{TLSClientConfig: pinned(tok.Fingerprint, u.Hostname(), now)}
	defer tr.CloseIdleConnections()
	c := &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // the token is for this address and no other
	}}
	resp, err := c.Do(hr)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		var e wire.APIError
		_ = json.Unmarshal(raw, &e) // without a reason the status has to do
		if e.Reason == "" {
			e.Reason = "it answered " + resp.Status
		}
		if resp.StatusCode >= 400 && resp.StatusCode < 500 && resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusRequestTimeout {
			return nil, fmt.Errorf("%w: %s", ErrRefused, e.Reason)
		}
		return nil, errors.New(e.Reason)
	}
	m := &Membership{Coordinator: base}
	if err := json.Unmarshal(raw, &m.EnrolReply); err != nil {
		return nil, fmt.Errorf("the coordinator's answer cannot be read: %w", err)
	}
	return m, m.check(id, tok)
}

// check refuses an enrolment that is not for this key or not from the token's
// authority, before any of it is kept.
func (m *Membership) check(id Identity, tok wire.FleetToken) error {
	ca, _ := pem.Decode(m.CA)
	if ca == nil || wire.Fingerprint(ca.Bytes) != tok.Fingerprint {
		return ErrUntrusted
	}
	if err := m.fits(id); err != nil {
		return fmt.Errorf("the coordinator's answer cannot be used; is it newer than this agent? %w", err)
	}
	return nil
}

// fits tells whether an enrolment is whole and for this device's key.
func (m *Membership) fits(id Identity) error {
	block, _ := pem.Decode(m.Certificate)
	if block == nil || m.Device != id.ID || len(m.OrderKey) != ed25519.PublicKeySize || len(m.Brokers) == 0 || len(m.DataPlane) == 0 {
		return errors.New("it lacks a part, or is for another device")
	}
	for _, u := range m.Brokers {
		if !strings.HasPrefix(u, "ssl://") {
			return fmt.Errorf("its broker %s is not reached by TLS", u)
		}
	}
	for _, u := range m.DataPlane {
		if !strings.HasPrefix(u, "https://") {
			return fmt.Errorf("its data plane %s is not reached by TLS", u)
		}
	}
	ca, rest := pem.Decode(m.CA)
	if ca == nil || len(bytes.TrimSpace(rest)) > 0 {
		return errors.New("it must hold one authority") // more would be trusted without having been pinned
	}
	if _, err := x509.ParseCertificate(ca.Bytes); err != nil {
		return fmt.Errorf("its authority cannot be read: %w", err)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return fmt.Errorf("its certificate for this device cannot be read: %w", err)
	}
	if !id.key.Public().(ed25519.PublicKey).Equal(cert.PublicKey) {
		return errors.New("its certificate is for another key")
	}
	return nil
}

// pinned trusts exactly the authority with this fingerprint, which the server
// must send along. It replaces the usual check, it does not skip it.
func pinned(fp [16]byte, host string, now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         host,
		InsecureSkipVerify: true, // VerifyConnection below does it against the pin
		VerifyConnection: func(cs tls.ConnectionState) error {
			roots := x509.NewCertPool()
			found := false
			for _, c := range cs.PeerCertificates {
				if wire.Fingerprint(c.Raw) == fp {
					roots.AddCert(c)
					found = true
				}
			}
			if !found {
				return ErrUntrusted
			}
			leaf := cs.PeerCertificates[0]
			// A new device may not know the time. That the authority has signed the
			// certificate proves that its time has begun.
			at := later(now(), leaf.NotBefore)
			_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: host, CurrentTime: at})
			if err != nil {
				return fmt.Errorf("the coordinator's certificate is not valid: %w", err)
			}
			return nil
		},
	}
}
