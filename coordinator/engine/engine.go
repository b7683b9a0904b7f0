// Package engine is the coordinator's message server and its state: NATS with
// JetStream for the coordinator, MQTT over mutual TLS for the devices.
//
// # Parties
//
//   - Devices speak MQTT 3.1.1 over TLS 1.3 with a client certificate of the
//     fleet's CA. They are in an account of their own.
//   - Coordinators speak NATS, in another account that holds all state. They
//     prove themselves with nkeys derived from one secret ([Config.Secret]).
//   - The server is nats-server: in this process, with no other listener than
//     MQTT ([Config.URL] empty), or a stock one elsewhere that was configured by
//     [WriteServerConfig]. Both are configured by the same text, and everything
//     after the connection is the same code.
//
// # Who may do what
//
// The server knows no device. It asks for each MQTT connection ("auth callout",
// https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_callout)
// and this package answers. A device is let in if
//
//   - TLS has verified its certificate against the fleet's CA,
//   - the certificate's common name is a device id, and the certificate's key
//     is the Ed25519 key that this id is derived from,
//   - its MQTT client id is that id, so that nobody can take over the session
//     of another,
//   - [Config.Authorize] agrees.
//
// It may then publish on its own report, beat and presence, and subscribe at
// QoS 0 to its own order. That is its whole permission list; what else MQTT
// needs, the server does for it. The right ends with the certificate.
//
// Four subjects cross between the accounts, one way each. JetStream and
// the state of the coordinator are out of a device's reach by construction, not
// by permission. The system account is a third one.
//
// # What is kept, and what is not
//
// Key-value buckets and objects are files in [Config.Dir]. An acknowledged
// write survives the death of the process always, and a power cut as
// [Config.Sync] says.
//
// MQTT sessions are kept in memory, bounded: nothing a device does takes disk,
// and a restarted server answers "session not present", so a device subscribes
// anew after each connect. Retained messages are delivered, but never kept.
// Subscriptions above QoS 0 are refused (each would be a JetStream consumer)
// and QoS 2 ends the connection; publishing at QoS 0 and 1 works. Orders go
// down by [Engine.Conn] at QoS 0 and are resent until answered: the server is a
// pipe, not a memory.
//
// # Not done yet
//
// JetStream never serves a damaged record, but it hides the damage: the key is
// "not found", and if the process had crashed, so are the keys written after it
// to the same file. Only a bucket whose description is damaged is refused here.
// Who must know that nothing is missing keeps a count of its own, until a scrub
// does it.
//
// A cluster of external servers: the configuration lacks routes, and MQTT's
// streams have one replica. An external server in operator (JWT) mode.
package engine

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"github.com/deimos-edge/deimos/wire"
)

const (
	startTimeout      = 30 * time.Second // for Start, if its context has no earlier end
	closeTimeout      = 10 * time.Second // for each part of Close
	requestTimeout    = 5 * time.Second  // for one request to the server
	defaultMaxDevices = 100_000
)

// Config says how to start an [Engine].
type Config struct {
	// Dir holds JetStream's files and a lock. Embedded server only.
	Dir string

	// MQTTListen is where devices connect, host:port; port 0 takes a free one
	// (see [Engine.MQTTAddr]). Embedded server only.
	MQTTListen string

	// TLS has the server's certificate and, as ClientCAs, the CA of the devices'
	// certificates. A client certificate and TLS 1.3 are required whatever it
	// says. Embedded server only.
	TLS *tls.Config

	// URL names an external nats-server, for example tls://nats.example.org:4222.
	// It must run with the configuration that [WriteServerConfig] makes. Empty
	// means embedded.
	URL string

	// DialTLS is how to check the external server's certificate (RootCAs).
	DialTLS *tls.Config

	// Secret is what all coordinators of one external server share, [SecretSize]
	// bytes; see [NewSecret]. The embedded server makes a new one if it is nil.
	Secret []byte

	// Authorize decides whether a device, whose certificate has passed all
	// checks, may connect now: enrolled and not retired. An error refuses it and
	// is logged. It is called by many goroutines at once and must return soon
	// after its context ends.
	Authorize func(ctx context.Context, id wire.DeviceID, cert *x509.Certificate) error

	// Hold keeps devices waiting at the entrance until [Engine.Open]. Embedded
	// server only: an external one asks Authorize, which has to refuse.
	Hold bool

	// Sync is how long an acknowledged write may be lost to a power cut:
	// JetStream calls fsync that often. Zero means before each acknowledgement.
	// The death of the process alone never loses one. Measured on a virtual
	// disk that makes 2,400 fsyncs a second, 1 KiB values, one writer: zero gives
	// 1,200 writes a second (median 0.2 ms), a second gives 25,000 (0.03 ms), a
	// minute no more than that. See BenchmarkKVPut.
	// An external server has its own in [ServerConfig].
	Sync time.Duration

	// MaxStore bounds JetStream's files in bytes; zero means that only the disk
	// does, see [Engine.Free]. Embedded server only.
	MaxStore int64

	// MaxDevices bounds connections; zero means 100,000. Embedded server only.
	MaxDevices int

	// Log gets what the server and the auth callout have to say; nil drops it.
	Log *slog.Logger
}

// Open lets devices in that [Config.Hold] has kept waiting.
func (e *Engine) Open() {
	if e.local != nil {
		e.local.entrance.open()
	}
}

// Engine is a running message server, or the connection to one. All methods
// may be called by many goroutines.
type Engine struct {
	log   *slog.Logger
	local *localServer // nil if the server is external
	nc    *nats.Conn   // coordinator's account
	sys   *nats.Conn   // system account
	js    jetstream.JetStream
	keep  *keeper
	gate  *gatekeeper

	closeOnce sync.Once
	closeErr  error
}

// Start starts the server, or connects to the external one, and begins to let
// devices in. ctx bounds the start, not the life of the engine: end that
// with [Engine.Close]. An error is a sentence for the operator.
func Start(ctx context.Context, c Config) (_ *Engine, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if c.Authorize == nil {
		return nil, errors.New("the engine needs somebody to decide which devices may connect (Config.Authorize)")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Secret == nil && c.URL == "" {
		if c.Secret, err = NewSecret(); err != nil {
			return nil, err
		}
	}
	keys, err := newKeyring(c.Secret)
	if err != nil {
		return nil, err
	}

	e := &Engine{log: c.Log}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if c.URL == "" {
		if e.local, err = startLocal(ctx, c, keys); err != nil {
			return nil, err
		}
	}
	if e.nc, err = e.connect(ctx, c, "coordinator", keys.coordinator); err != nil {
		return nil, err
	}
	if e.sys, err = e.connect(ctx, c, "system", keys.system); err != nil {
		return nil, err
	}
	if e.js, err = jetstream.New(e.nc); err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	if e.keep, err = e.startKeeper(ctx, c, keys.keeper); err != nil {
		return nil, err
	}
	if e.gate, err = startGatekeeper(e.nc, keys.issuer, c.Authorize, e.keep.ready, c.Log); err != nil {
		return nil, err
	}
	return e, nil
}

// connect opens one connection to the server as the user that owns key.
func (e *Engine) connect(ctx context.Context, c Config, role string, key nkeys.KeyPair, more ...nats.Option) (*nats.Conn, error) {
	pub, err := key.PublicKey()
	if err != nil {
		return nil, fmt.Errorf("read the %s key: %w", role, err)
	}
	timeout := requestTimeout
	if end, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(end))
	}
	opts := []nats.Option{
		nats.Name("deimos " + role),
		nats.Nkey(pub, key.Sign),
		nats.Timeout(timeout),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(time.Second),
		nats.IgnoreAuthErrorAbort(), // an external server may be configured a moment later
		nats.ErrorHandler(func(_ *nats.Conn, s *nats.Subscription, err error) {
			subject := ""
			if s != nil {
				subject = s.Subject
			}
			e.log.Warn("message server reports an error", "role", role, "subject", subject, "err", err)
		}),
	}
	url := c.URL
	if e.local != nil {
		opts = append(opts, nats.InProcessServer(e.local.srv))
	} else {
		opts = append(opts,
			nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
				if err != nil {
					e.log.Warn("lost the message server, trying again until it is back", "role", role, "err", err)
				}
			}),
			nats.ReconnectHandler(func(nc *nats.Conn) {
				e.log.Info("the message server is back", "role", role, "server", nc.ConnectedUrlRedacted())
			}))
		if c.DialTLS != nil {
			opts = append(opts, nats.Secure(c.DialTLS.Clone()))
		}
	}
	nc, err := nats.Connect(url, append(opts, more...)...)
	switch {
	case err == nil:
		return nc, nil
	case e.local != nil:
		return nil, fmt.Errorf("connect to the embedded message server as %s: %w", role, err)
	case errors.Is(err, nats.ErrAuthorization):
		return nil, fmt.Errorf("the message server at %s does not know this coordinator: configure it with the text that this coordinator's secret makes, and restart it: %w", url, err)
	default:
		return nil, fmt.Errorf("cannot reach the message server at %s; check that it runs and that the address is right: %w", url, err)
	}
}

// Conn is the connection in the coordinator's account. Devices' messages
// arrive on [wire.Subject]s, and orders published there reach them at QoS 0.
func (e *Engine) Conn() *nats.Conn { return e.nc }

// JetStream is the coordinator's JetStream. Below [Reserve] it publishes nothing.
func (e *Engine) JetStream() jetstream.JetStream { return guarded{e.js, e} }

// Failed gives the error that the embedded server cannot go on with: a write of the
// state has failed, and the server writes no more to that part of it until it is
// started again. Who gets it closes the engine.
func (e *Engine) Failed() <-chan error {
	if e.local == nil {
		return nil
	}
	return e.local.log.broken
}

// KV opens a key-value bucket, and makes it if it does not exist. A bucket is
// in files and keeps one value a key, unless edit says otherwise; a bucket that
// exists is changed to that.
func (e *Engine) KV(ctx context.Context, bucket string, edit ...func(*jetstream.KeyValueConfig)) (jetstream.KeyValue, error) {
	cfg := jetstream.KeyValueConfig{Bucket: bucket, Storage: jetstream.FileStorage, History: 1}
	for _, f := range edit {
		f(&cfg)
	}
	kv, err := e.js.CreateOrUpdateKeyValue(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open bucket %q: %w", bucket, StoreError(err))
	}
	return guardedKV{kv, e}, nil
}

// Objects opens a bucket of objects like [Engine.KV].
func (e *Engine) Objects(ctx context.Context, bucket string, edit ...func(*jetstream.ObjectStoreConfig)) (jetstream.ObjectStore, error) {
	cfg := jetstream.ObjectStoreConfig{Bucket: bucket, Storage: jetstream.FileStorage}
	for _, f := range edit {
		f(&cfg)
	}
	os, err := e.js.CreateOrUpdateObjectStore(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open bucket of objects %q: %w", bucket, StoreError(err))
	}
	return guardedObjects{os, e}, nil
}

// Log opens a stream that can only be appended to, and makes it if it does not
// exist: it is in files, keeps everything, and the server lets nobody, this
// coordinator included, remove or replace a message. Its one subject is [LogSubject].
func (e *Engine) Log(ctx context.Context, name string) (jetstream.Stream, error) {
	s, err := e.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: "LOG_" + name, Subjects: []string{LogSubject(name)}, Storage: jetstream.FileStorage,
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew,
		MaxMsgSize: maxLogEntry, DenyDelete: true, DenyPurge: true,
	})
	if err != nil {
		return nil, fmt.Errorf("open log %q: %w", name, StoreError(err))
	}
	return s, nil
}

// LogSubject is where entries of a log are published.
func LogSubject(name string) string { return "log." + name }

// maxLogEntry is the largest entry of a log, in bytes, headers included.
const maxLogEntry = 64 << 10

// MQTTAddr is where the embedded server listens for devices, host:port. It is
// empty for an external server.
func (e *Engine) MQTTAddr() string {
	if e.local == nil {
		return ""
	}
	return e.local.mqttAddr
}

// Close lets no more devices in, ends all connections, and stops the embedded
// server. It returns within a bounded time, and does nothing the second time.
func (e *Engine) Close() error {
	e.closeOnce.Do(func() { e.closeErr = e.close() })
	return e.closeErr
}

func (e *Engine) close() error {
	var errs []error
	if e.gate != nil {
		errs = append(errs, e.gate.close())
	}
	if e.keep != nil {
		e.keep.close()
	}
	for _, nc := range []*nats.Conn{e.sys, e.nc} {
		if nc == nil {
			continue
		}
		if nc.IsConnected() {
			// What was published last should leave; if it cannot, closing goes on.
			_ = nc.FlushTimeout(time.Second)
		}
		nc.Close()
	}
	if e.local != nil {
		errs = append(errs, e.local.close())
	}
	return errors.Join(errs...)
}
