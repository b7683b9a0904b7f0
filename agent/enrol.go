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
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// Membership is what enrolment gave this device, as kept on its disk. A renewal
// replaces it as a whole: a power cut leaves the old one or the new one.
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

// refusal is the answer of a coordinator that will not have this device.
type refusal struct {
	status int
	reason string
}

func (r *refusal) Error() string        { return ErrRefused.Error() + ": " + r.reason }
func (r *refusal) Is(target error) bool { return target == ErrRefused }

// busy is the answer 429: the same question may be asked again later.
type busy struct {
	after  int // seconds, from Retry-After; 0 if it says nothing
	reason string
}

func (b *busy) Error() string { return b.reason }

// forbidden tells a coordinator's "not you" from its "not so".
func forbidden(err error) bool {
	var r *refusal
	return errors.As(err, &r) && r.status == http.StatusForbidden
}

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

// authority signs the certificates of the fleet's servers. It is nil only in a
// membership that was never checked.
func (m *Membership) authority() *x509.Certificate {
	if block, _ := pem.Decode(m.CA); block != nil {
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			return c
		}
	}
	return nil
}

// proof is what the device shows at the fleet's doors.
func (m *Membership) proof(id Identity) *tls.Certificate {
	return &tls.Certificate{Certificate: [][]byte{m.certificate().Raw}, PrivateKey: id.key}
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

const (
	enrolLimit  = 2 * time.Minute // one request; a slow link is no fault
	maxAnswer   = 1 << 20         // bytes
	maxSentence = 300             // bytes of another's text in a log
)

// enrol asks the coordinator at base (https://host:port) once to take this
// device in, to renew its membership, or to let it wait: then there is no
// membership, but an [wire.EnrolPending]. It fails with ErrRefused, errStranger
// or ErrAddress where asking again will not help, else with another error.
func enrol(ctx context.Context, id Identity, d door, base string, req wire.EnrolRequest) (*Membership, *wire.EnrolPending, error) {
	u, err := address(base)
	if err != nil {
		return nil, nil, err
	}
	if req.CSR, err = id.csr(); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, enrolLimit)
	defer cancel()
	status, head, raw, err := postJSON(ctx, d, u.JoinPath("/enrol/v1").String(), req)
	if err != nil {
		return nil, nil, err
	}
	switch {
	case status == http.StatusOK:
		m := &Membership{Coordinator: base}
		if err := json.Unmarshal(raw, &m.EnrolReply); err != nil {
			return nil, nil, fmt.Errorf("the coordinator's answer cannot be read: %w", err)
		}
		return m, nil, m.check(id, d.fingerprint)
	case status == http.StatusAccepted && req.Token == "":
		var p wire.EnrolPending
		if err := json.Unmarshal(raw, &p); err != nil {
			return nil, nil, fmt.Errorf("the coordinator's answer cannot be read: %w", err)
		}
		if p.Device != id.ID {
			return nil, nil, errors.New("the coordinator's answer is for another device")
		}
		return nil, &p, nil
	}
	var e wire.APIError
	_ = json.Unmarshal(raw, &e) // without a reason the status has to do
	reason := sentence(e.Reason)
	if reason == "" {
		reason = fmt.Sprintf("it answered %d %s", status, http.StatusText(status))
	}
	if status == http.StatusTooManyRequests {
		after, _ := strconv.Atoi(head.Get("Retry-After")) // a date, which it may also be, is not ours
		return nil, nil, &busy{after, reason}
	}
	if status >= 400 && status < 500 && status != http.StatusRequestTimeout {
		return nil, nil, &refusal{status, reason}
	}
	return nil, nil, errors.New(reason)
}

// address reads a coordinator's address, with the port.
func address(base string) (*url.URL, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("%w: %q; it looks like https://host:8443", ErrAddress, base)
	}
	if u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), "443")
	}
	return u, nil
}

// postJSON sends one request through d, on a connection of its own, and follows
// nobody elsewhere: what is in it is for this address.
func postJSON(ctx context.Context, d door, to string, body any) (status int, head http.Header, answer []byte, err error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return 0, nil, nil, err
	}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(raw))
	if err != nil {
		return 0, nil, nil, err
	}
	hr.Header.Set("Content-Type", "application/json")
	tr := &http.Transport{DialTLSContext: d.dial}
	defer tr.CloseIdleConnections()
	resp, err := tr.RoundTrip(hr)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return resp.StatusCode, resp.Header, answer, err
}

// sentence cuts and cleans what another says before it stands in a log.
func sentence(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxSentence {
		s = strings.ToValidUTF8(s[:maxSentence], "") + "…"
	}
	return strings.TrimSpace(s)
}

// check refuses an enrolment that is not for this key or not from the authority
// that the device believes, before any of it is kept.
func (m *Membership) check(id Identity, authority [16]byte) error {
	ca, _ := pem.Decode(m.CA)
	if ca == nil || wire.Fingerprint(ca.Bytes) != authority {
		return errStranger
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
	authority, err := x509.ParseCertificate(ca.Bytes)
	if err != nil {
		return fmt.Errorf("its authority cannot be read: %w", err)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return fmt.Errorf("its certificate for this device cannot be read: %w", err)
	}
	if !id.key.Public().(ed25519.PublicKey).Equal(cert.PublicKey) {
		return errors.New("its certificate is for another key")
	}
	if err := cert.CheckSignatureFrom(authority); err != nil {
		return fmt.Errorf("its certificate is not signed by its authority: %w", err)
	}
	return nil
}
