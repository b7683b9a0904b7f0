package engine

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/deimos-edge/deimos/wire"
)

const (
	calloutSubject  = "$SYS.REQ.USER.AUTH"         // server.AuthCalloutSubject
	calloutAudience = "nats-authorization-request" // server.AuthRequestSubject

	// calloutWorkers bounds the answers in the making. When a whole fleet comes
	// back at once the rest waits in the subscription, and whoever has waited
	// longer than the server does is not worked on any more.
	calloutWorkers = 64

	// authorizeTimeout leaves time to tell the server, which waits authTimeout.
	authorizeTimeout = authTimeout - time.Second
)

var errNotReady = errors.New("the message server is being prepared; come again in a second")

// gatekeeper answers the server's auth callouts.
type gatekeeper struct {
	issuer    nkeys.KeyPair
	authorize func(context.Context, wire.DeviceID, *x509.Certificate) error
	ready     func() bool
	log       *slog.Logger

	sub    *nats.Subscription
	ctx    context.Context
	cancel context.CancelFunc
	slots  chan struct{}
	work   sync.WaitGroup

	mu     sync.Mutex
	closed bool // no more work begins
}

func startGatekeeper(nc *nats.Conn, issuer nkeys.KeyPair, authorize func(context.Context, wire.DeviceID, *x509.Certificate) error, ready func() bool, log *slog.Logger) (*gatekeeper, error) {
	g := &gatekeeper{
		issuer: issuer, authorize: authorize, ready: ready, log: log,
		slots: make(chan struct{}, calloutWorkers),
	}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	var err error
	// The queue group lets several coordinators share the work.
	if g.sub, err = nc.QueueSubscribe(calloutSubject, "deimos-engine", g.take); err != nil {
		g.cancel()
		return nil, fmt.Errorf("serve the message server's questions about devices: %w", err)
	}
	// A connection that comes before the server has seen the subscription would
	// be refused.
	if err := nc.FlushTimeout(requestTimeout); err != nil {
		return nil, errors.Join(fmt.Errorf("serve the message server's questions about devices: %w", err), g.close())
	}
	return g, nil
}

// take hands a callout to a worker. It blocks the subscription while all are
// busy.
func (g *gatekeeper) take(m *nats.Msg) {
	select {
	case g.slots <- struct{}{}:
	case <-g.ctx.Done():
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return
	}
	g.work.Go(func() {
		defer func() { <-g.slots }()
		g.answer(m)
	})
}

func (g *gatekeeper) answer(m *nats.Msg) {
	req, err := jwt.DecodeAuthorizationRequestClaims(string(m.Data))
	if err != nil || req.Audience != calloutAudience {
		g.log.Warn("a question about a device cannot be read", "err", err)
		return
	}
	if req.Expires > 0 && time.Now().Unix() > req.Expires {
		return // nobody waits for the answer any more
	}
	resp := jwt.NewAuthorizationResponseClaims(req.UserNkey)
	resp.Audience = req.Server.ID
	if resp.Jwt, err = g.admit(req); err != nil {
		resp.Error = err.Error()
	}
	text, err := resp.Encode(g.issuer)
	if err != nil {
		g.log.Error("cannot sign an answer to the message server", "err", err)
		return
	}
	if err := m.Respond([]byte(text)); err != nil && g.ctx.Err() == nil {
		g.log.Warn("cannot answer the message server about a device", "err", err)
	}
}

// admit decides about one connection and makes the user that it becomes.
func (g *gatekeeper) admit(req *jwt.AuthorizationRequestClaims) (string, error) {
	refuse := func(id wire.DeviceID, err error) (string, error) {
		g.log.Info("refused a connection", "device", id, "client", req.ClientInformation.MQTT,
			"from", req.ClientInformation.Host, "why", err)
		return "", err
	}
	id, cert, err := identify(req, time.Now())
	if err != nil {
		return refuse("", err)
	}
	if !g.ready() {
		return refuse(id, errNotReady)
	}
	ctx, cancel := context.WithTimeout(g.ctx, authorizeTimeout)
	defer cancel()
	if err := g.authorize(ctx, id, cert); err != nil {
		return refuse(id, err)
	}
	user, err := deviceUser(req.UserNkey, id, cert).Encode(g.issuer)
	if err != nil {
		return refuse(id, fmt.Errorf("sign the rights of device %s: %w", id, err))
	}
	return user, nil
}

// identify finds out which device has opened the connection, or why it is none.
// It takes nothing from the connection but what TLS has verified.
func identify(req *jwt.AuthorizationRequestClaims, now time.Time) (wire.DeviceID, *x509.Certificate, error) {
	if req.ClientInformation.Type != "mqtt" {
		return "", nil, fmt.Errorf("devices connect by MQTT, not by %q", req.ClientInformation.Type)
	}
	if req.TLS == nil || len(req.TLS.VerifiedChains) == 0 || len(req.TLS.VerifiedChains[0]) == 0 {
		return "", nil, errors.New("the connection has no verified client certificate")
	}
	block, _ := pem.Decode([]byte(req.TLS.VerifiedChains[0][0]))
	if block == nil {
		return "", nil, errors.New("the client certificate cannot be read")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", nil, fmt.Errorf("the client certificate cannot be read: %w", err)
	}
	// A resumed TLS session does not look at the clock again.
	if now.After(cert.NotAfter) || now.Before(cert.NotBefore) {
		return "", nil, fmt.Errorf("the client certificate is valid from %s to %s only", cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339))
	}
	id, err := wire.ParseDeviceID(cert.Subject.CommonName)
	if err != nil {
		return "", nil, fmt.Errorf("the client certificate is no device's: %w", err)
	}
	key, ok := cert.PublicKey.(ed25519.PublicKey)
	if !ok {
		return "", nil, fmt.Errorf("the client certificate has a key of type %T, a device has an Ed25519 key", cert.PublicKey)
	}
	if owner := wire.IDOf(key); owner != id {
		return "", nil, fmt.Errorf("the client certificate says device %s, but its key is that of %s", id, owner)
	}
	if req.ClientInformation.MQTT != string(id) {
		return "", nil, fmt.Errorf("device %s must use its id as MQTT client id, not %q", id, req.ClientInformation.MQTT)
	}
	return id, cert, nil
}

// deviceUser is what a device may do. An empty allow list would mean
// everything, so each has at least one entry.
func deviceUser(nkey string, id wire.DeviceID, cert *x509.Certificate) *jwt.UserClaims {
	u := jwt.NewUserClaims(nkey)
	u.Name = string(id)
	u.Audience = accountDevices
	u.Expires = cert.NotAfter.Unix()
	u.AllowedConnectionTypes = jwt.StringList{jwt.ConnectionTypeMqtt}
	u.Permissions.Pub.Allow = jwt.StringList{
		wire.Subject(id, wire.ChannelReport), wire.Subject(id, wire.ChannelBeat), wire.Subject(id, wire.ChannelPresence),
	}
	u.Permissions.Sub.Allow = jwt.StringList{wire.Subject(id, wire.ChannelOrder)}
	// The server lets MQTT clients have these subjects implicitly, for
	// subscriptions above QoS 0. Each would be a JetStream consumer.
	u.Permissions.Sub.Deny = jwt.StringList{"$MQTT.>"}
	return u
}

func (g *gatekeeper) close() error {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel()
	err := g.sub.Unsubscribe()
	if errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrBadSubscription) {
		err = nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.work.Wait()
	}()
	select {
	case <-done:
		return err
	case <-time.After(closeTimeout):
		return errors.Join(err, fmt.Errorf("a decision about a device did not end within %s of being told to", closeTimeout))
	}
}
