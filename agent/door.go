package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// door is the device's side of TLS with the servers of its fleet: broker, data
// plane and enrolment. It believes one authority and no other, and it checks
// certificates by what the device knows of the time (see [Clock.checkAt]). That
// replaces the usual check of the standard library, it does not skip it.
type door struct {
	// authority, or where only its fingerprint is known, what the server must
	// send along.
	authority   *x509.Certificate
	fingerprint [16]byte
	clock       *Clock
	// own is the device's certificate, as it is at the time of each handshake;
	// nil where the device has none.
	own func() *tls.Certificate
	// counted has the bytes of a connection counted; nil: nobody does.
	counted func(net.Conn) net.Conn
}

// pinned believes the authority with this fingerprint.
func pinned(fp [16]byte, clock *Clock) door { return door{fingerprint: fp, clock: clock} }

// knows believes this authority.
func knows(ca *x509.Certificate, clock *Clock) door {
	return door{authority: ca, fingerprint: wire.Fingerprint(ca.Raw), clock: clock}
}

// errStranger says that a server is not of the authority that the door believes.
var errStranger = errors.New("the server is not of the authority that this device believes")

func (d door) config(host string) *tls.Config {
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         host,
		Time:               d.clock.Now,
		InsecureSkipVerify: true, // VerifyConnection does it
		VerifyConnection:   func(cs tls.ConnectionState) error { return d.verify(cs.PeerCertificates, host) },
	}
	if d.own != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return d.own(), nil }
	}
	return c
}

func (d door) verify(chain []*x509.Certificate, host string) error {
	if len(chain) == 0 {
		return errStranger
	}
	roots, err := d.roots(chain)
	if err != nil {
		return err
	}
	leaf := chain[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: host, CurrentTime: d.clock.checkAt(leaf)}); err != nil {
		if errors.As(err, new(x509.UnknownAuthorityError)) {
			return fmt.Errorf("%w: %w", errStranger, err)
		}
		return fmt.Errorf("the certificate of %s is not valid: %w", host, err)
	}
	// That the authority has signed it proves that its time has begun.
	d.clock.Raise(leaf.NotBefore)
	return nil
}

func (d door) roots(chain []*x509.Certificate) (*x509.CertPool, error) {
	roots := x509.NewCertPool()
	if d.authority != nil {
		roots.AddCert(d.authority)
		return roots, nil
	}
	for _, c := range chain {
		if wire.Fingerprint(c.Raw) == d.fingerprint {
			roots.AddCert(c)
			return roots, nil
		}
	}
	return nil, errStranger
}

// dial has the form that http.Transport wants; the time is limited by ctx.
func (d door) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	return handshake(ctx, network, addr, d.config(host), d.counted)
}

// within limits the time of a dial, where whoever calls it does not.
func within(limit time.Duration, dial func(context.Context, string, string) (net.Conn, error)) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		return dial(ctx, network, addr)
	}
}

func handshake(ctx context.Context, network, addr string, c *tls.Config, counted func(net.Conn) net.Conn) (*tls.Conn, error) {
	raw, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	if counted != nil {
		raw = counted(raw)
	}
	conn := tls.Client(raw, c)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// whoServes looks at addr (host:port) and returns the self-signed
// authority at the end of the server's chain, which the chain must verify to.
// It says nothing but hello.
func whoServes(ctx context.Context, clock *Clock, addr string) (*x509.Certificate, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	var seen *x509.Certificate
	conn, err := handshake(ctx, "tcp", addr, &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: host, Time: clock.Now,
		InsecureSkipVerify: true, // against the chain's own end, below
		VerifyConnection: func(cs tls.ConnectionState) error {
			last := cs.PeerCertificates[len(cs.PeerCertificates)-1]
			if len(cs.PeerCertificates) < 2 || !last.IsCA || last.CheckSignatureFrom(last) != nil {
				return errors.New("the server shows no authority of its own; is this the address of a coordinator?")
			}
			// Not by knows(): an authority that is only seen, and not yet kept, has no
			// say in what time it is.
			d := knows(last, NewClock(clock.AtLeast()))
			d.clock.system = clock.Now
			seen = last
			return d.verify(cs.PeerCertificates, host)
		},
	}, nil)
	if err != nil {
		return nil, err
	}
	return seen, conn.Close()
}

// isAlert tells whether the other side ended a TLS connection because of what
// this side is: in TLS 1.3 a server says so after the handshake.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}
