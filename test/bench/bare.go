package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/nats-io/nats.go"

	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/wire"
)

// The baseline: the same server with the same TLS and the same permissions, the
// same MQTT client, the same messages by size and number; but nobody signs,
// verifies, keeps or decides anything.

// bareServer is the coordinator's place: it lets devices in and, told so on
// standard input, has orders answered by them. It prints one JSON line for each
// thing that it was told.
func bareServer(dir, addr string) error {
	ctx := context.Background()
	ca, err := loadCA(dir)
	if err != nil {
		return err
	}
	cert, err := ca.sign(pkix.Name{CommonName: "bare"}, nil)
	if err != nil {
		return err
	}
	e, err := engine.Start(ctx, engine.Config{
		Dir: filepath.Join(dir, "nats"), MQTTListen: addr,
		TLS:       &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: ca.pool()},
		Authorize: func(context.Context, wire.DeviceID, *x509.Certificate) error { return nil },
	})
	if err != nil {
		return err
	}
	defer e.Close()
	fmt.Println(e.MQTTAddr())
	b := &bareOrders{nc: e.Conn(), waiting: make(map[string]chan struct{})}
	sub, err := b.nc.Subscribe(wire.Subject("", wire.ChannelReport), b.report)
	if err != nil {
		return err
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var q bareQuestion
		if err := json.Unmarshal(in.Bytes(), &q); err != nil {
			return err
		}
		if err := json.NewEncoder(os.Stdout).Encode(b.measure(q)); err != nil {
			return err
		}
	}
	return in.Err()
}

// bareQuestion has so many orders answered, some at a time by each device.
type bareQuestion struct {
	Devices []wire.DeviceID
	Orders  int // by all of them
	Window  int // under way at once, for a device
	Order   int // bytes of each message
	Ack     int
}

type bareOrders struct {
	nc  *nats.Conn
	ack []byte

	mu      sync.Mutex
	waiting map[string]chan struct{} // by the first bytes of the message
}

const bareID = 16 // bytes at the head of each message

func (b *bareOrders) report(m *nats.Msg) {
	d, _, err := wire.ParseSubject(m.Subject)
	if err != nil || len(m.Data) < bareID {
		return
	}
	id := string(m.Data[:bareID])
	b.mu.Lock()
	done := b.waiting[id]
	delete(b.waiting, id)
	b.mu.Unlock()
	if done == nil {
		return
	}
	_ = b.nc.Publish(wire.Subject(d, wire.ChannelOrder), b.ack) // a measurement that stands still shows it
	close(done)
}

// measure answers with each order's time, and the time of all.
func (b *bareOrders) measure(q bareQuestion) timing {
	b.ack = make([]byte, q.Ack)
	copy(b.ack, "ack")
	var left atomic.Int64
	left.Store(int64(q.Orders))
	var t timing
	var mu sync.Mutex
	var wg sync.WaitGroup
	began := time.Now()
	for _, d := range q.Devices {
		for range q.Window {
			wg.Go(func() {
				msg := make([]byte, q.Order)
				for left.Add(-1) >= 0 {
					copy(msg, fmt.Sprintf("%016x", mrand.Uint64()))
					done := make(chan struct{})
					b.mu.Lock()
					b.waiting[string(msg[:bareID])] = done
					b.mu.Unlock()
					at := time.Now()
					if err := b.nc.Publish(wire.Subject(d, wire.ChannelOrder), msg); err != nil {
						return
					}
					<-done
					mu.Lock()
					t.Each = append(t.Each, time.Since(at))
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	t.All = time.Since(began)
	return t
}

// bareDevices connects so many clients to addr, counts those that are there, and
// answers each message that is no acknowledgement. It connects again what is
// cut off, until stop.
func bareDevices(dir, addr string, n, report int, online *atomic.Int64) (ids []wire.DeviceID, stop func(), err error) {
	ca, err := loadCA(dir)
	if err != nil {
		return nil, nil, err
	}
	ids = make([]wire.DeviceID, n)
	clients := make([]mqtt.Client, n)
	answer := make([]byte, report)
	gate := make(chan struct{}, connectAtOnce)
	var wg sync.WaitGroup
	for i := range n {
		gate <- struct{}{}
		wg.Go(func() {
			defer func() { <-gate }()
			key := newKey()
			ids[i] = wire.IDOf(key.Public().(ed25519.PublicKey))
			cert, err := ca.sign(pkix.Name{CommonName: string(ids[i])}, key)
			check(err)
			clients[i] = bareDevice(ids[i], cert, ca.pool(), addr, answer, online)
		})
	}
	wg.Wait()
	return ids, func() {
		for _, c := range clients {
			c.Disconnect(0)
		}
		online.Store(0)
	}, nil
}

func bareDevice(id wire.DeviceID, cert tls.Certificate, roots *x509.CertPool, addr string, answer []byte, online *atomic.Int64) mqtt.Client {
	order, report := wire.Topic(id, wire.ChannelOrder), wire.Topic(id, wire.ChannelReport)
	o := mqtt.NewClientOptions().AddBroker("ssl://" + addr).SetClientID(string(id)).SetProtocolVersion(4).
		SetTLSConfig(&tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS13}).
		SetConnectRetry(true).SetConnectRetryInterval(time.Second).SetMaxReconnectInterval(2 * time.Second).SetConnectTimeout(20 * time.Second)
	o.SetConnectionLostHandler(func(mqtt.Client, error) { online.Add(-1) })
	o.SetOnConnectHandler(func(c mqtt.Client) {
		c.Subscribe(order, 0, func(c mqtt.Client, m mqtt.Message) {
			if in := m.Payload(); string(in[:3]) != "ack" {
				out := make([]byte, len(answer))
				copy(out, in[:bareID])
				c.Publish(report, 0, false, out)
			}
		}).Wait()
		online.Add(1)
	})
	c := mqtt.NewClient(o)
	c.Connect().Wait()
	return c
}

// authority is a fleet's, as the coordinator makes one.
type authority struct {
	Cert, Key []byte // DER
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey
}

func newCA(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bare fleet"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	var a authority
	if a.Cert, err = x509.CreateCertificate(rand.Reader, t, t, key.Public(), key); err != nil {
		return err
	}
	if a.Key, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return err
	}
	raw, err := json.Marshal(a)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "ca.json"), raw, 0o600)
}

func loadCA(dir string) (*authority, error) {
	raw, err := os.ReadFile(filepath.Join(dir, "ca.json"))
	if err != nil {
		return nil, err
	}
	var a authority
	if err := json.Unmarshal(raw, &a); err != nil {
		return nil, err
	}
	if a.cert, err = x509.ParseCertificate(a.Cert); err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(a.Key)
	if err != nil {
		return nil, err
	}
	a.key = k.(*ecdsa.PrivateKey)
	return &a, nil
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// sign makes a certificate for key, or for a new one, as a server for 127.0.0.1.
func (a *authority) sign(name pkix.Name, key ed25519.PrivateKey) (tls.Certificate, error) {
	if key == nil {
		key = newKey()
	}
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{SerialNumber: n, Subject: name, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

func newKey() ed25519.PrivateKey {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return key
}
