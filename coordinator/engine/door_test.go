package engine

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"sync"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/nats-io/jwt/v2"

	"github.com/deimos-edge/deimos/wire"
)

func TestRefusedAtTheDoor(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		other := newAuthority(t)
		good, victim := w.ca.device(t), w.ca.device(t)
		_, key, err := ed25519.GenerateKey(rand.Reader)
		must(t, err)
		rsaLike := w.ca.deviceCert(t, victim.id, ecdsaKey(t))

		for name, d := range map[string]device{
			"no certificate":            {id: good.id},
			"certificate of another CA": other.device(t),
			"expired certificate":       w.ca.device(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
			"certificate not yet valid": w.ca.device(t, func(c *x509.Certificate) {
				c.NotBefore = time.Now().Add(time.Hour)
				c.NotAfter = time.Now().Add(2 * time.Hour)
			}),
			"server's certificate":       {good.id, w.ca.server(t)},
			"key that is not the id's":   {victim.id, w.ca.deviceCert(t, victim.id, key)},
			"key of another kind":        {victim.id, rsaLike},
			"client id of another":       {victim.id, good.cert},
			"client id that is longer":   {good.id + "x", good.cert},
			"client id left out":         {"", good.cert},
			"common name that is no id":  w.ca.device(t, func(c *x509.Certificate) { c.Subject.CommonName = "*" }),
			"common name with wildcards": w.ca.device(t, func(c *x509.Certificate) { c.Subject.CommonName = "a.>" }),
		} {
			if c, err := w.tryConnect(d); err == nil {
				c.Disconnect(0)
				t.Errorf("%s: let in", name)
			}
		}
		if c, err := w.tryConnect(good, func(o *mqtt.ClientOptions) { o.TLSConfig.MaxVersion = tls.VersionTLS12 }); err == nil {
			c.Disconnect(0)
			t.Error("TLS 1.2: let in")
		}
		w.reg.mu.Lock()
		asked := len(w.reg.asked)
		w.reg.mu.Unlock()
		if asked != 0 {
			t.Errorf("the registry was asked about %d of them", asked)
		}
		// User name and password are no way around the certificate.
		pub, err := mustKeyring(t, w).public()
		must(t, err)
		for _, user := range []string{pub.Coordinator, pub.System, pub.Keeper, pub.Issuer} {
			d := device{victim.id, good.cert}
			if c, err := w.tryConnect(d, func(o *mqtt.ClientOptions) { o.SetUsername(user).SetPassword(user) }); err == nil {
				c.Disconnect(0)
				t.Errorf("user name %s: let in", user)
			}
		}
		w.reg.retire(victim.id)
		if c, err := w.tryConnect(victim); err == nil {
			c.Disconnect(0)
			t.Error("a device that the registry refuses was let in")
		}
		w.connect(t, good)
	})
}

// mustKeyring is the keyring of an external world, or any other: there the
// embedded server's secret is known to nobody.
func mustKeyring(t *testing.T, w *world) *keyring {
	t.Helper()
	secret := w.cfg.Secret
	if secret == nil {
		secret = make([]byte, SecretSize)
	}
	k, err := newKeyring(secret)
	must(t, err)
	return k
}

// TestNobodyIsLetInBeforeTheServerIsPrepared: while MQTT's streams are not as
// they should be, as after the restart of an external server.
func TestNobodyIsLetInBeforeTheServerIsPrepared(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d := w.ca.device(t)
		w.keep.ok.Store(false)
		if c, err := w.tryConnect(d); err == nil {
			c.Disconnect(0)
			t.Error("let in")
		}
		w.keep.again()
		for deadline := time.Now().Add(patience); ; {
			c, err := w.tryConnect(d)
			if err == nil {
				c.Disconnect(0)
				return
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	})
}

// TestConnectionEndsWithTheCertificate: a certificate that runs out ends a
// connection that was opened before.
func TestConnectionEndsWithTheCertificate(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		var end time.Time
		connect := func(life time.Duration) (*client, error) {
			end = time.Now().Add(life).Truncate(time.Second) // as certificates have it
			return w.tryConnect(w.ca.device(t, func(c *x509.Certificate) { c.NotAfter = end }))
		}
		c, err := connect(3 * time.Second)
		if err != nil && !time.Now().Before(end) { // the machine stood still, and it was over before the handshake was
			c, err = connect(patience / 2)
		}
		must(t, err)
		next(t, c.lost, "the end of the connection")
		if time.Now().Before(end) {
			t.Error("the connection ended before the certificate did")
		}
	})
}

func TestRetiredDeviceIsCutAndStaysOut(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d, other := w.ca.device(t), w.ca.device(t)
		presence := listen(t, w.Conn(), wire.Subject("", wire.ChannelPresence))
		stay := w.connect(t, other)
		c := w.connect(t, d, func(o *mqtt.ClientOptions) {
			o.SetBinaryWill(wire.Topic(d.id, wire.ChannelPresence), []byte("gone"), 0, false)
		})
		w.reg.retire(d.id)
		begun := time.Now()
		must(t, w.Disconnect(t.Context(), d.id))
		next(t, c.lost, "the end of the connection")
		t.Logf("cut off after %s", time.Since(begun).Round(time.Millisecond))
		next(t, presence, "the last will")
		if back, err := w.tryConnect(d); err == nil {
			back.Disconnect(0)
			t.Error("the retired device is back")
		}
		must(t, w.Disconnect(t.Context(), d.id)) // nothing to do
		stay.publish(t, wire.Topic(other.id, wire.ChannelPresence), 1, false, []byte("here"))
		if m := next(t, presence, "the other device"); string(m.Data) != "here" {
			t.Errorf("got %q", m.Data)
		}
	})
}

// TestRetireBeatsConnectInFlight: the registry has said yes, then the device is
// retired, and only then the answer reaches the server.
func TestRetireBeatsConnectInFlight(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d := w.ca.device(t)
		decided, release := make(chan struct{}), make(chan struct{})
		var once sync.Once
		w.reg.setWait(func(wire.DeviceID) {
			once.Do(func() { close(decided); <-release })
		})
		result := make(chan error, 1)
		o, c := w.options(d)
		c.Client = mqtt.NewClient(o)
		go func() { result <- done(c.Connect()) }()
		next(t, decided, "the question to the registry")

		w.reg.retire(d.id)
		must(t, w.Disconnect(t.Context(), d.id))
		close(release)
		if err := next(t, result, "the end of the attempt"); err == nil {
			next(t, c.lost, "the end of the connection")
		}
	})
}

// TestIdentify asks about what TLS would refuse before, and about a
// certificate that has run out since its TLS session began.
func TestIdentify(t *testing.T) {
	ca := newAuthority(t)
	d := ca.device(t)
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d.cert.Certificate[0]}))
	request := func(edit func(*jwt.AuthorizationRequestClaims)) *jwt.AuthorizationRequestClaims {
		r := jwt.NewAuthorizationRequestClaims("U")
		r.ClientInformation = jwt.ClientInformation{Type: "mqtt", MQTT: string(d.id)}
		r.TLS = &jwt.ClientTLS{VerifiedChains: []jwt.StringList{{text}}}
		edit(r)
		return r
	}
	now := time.Now()
	id, _, err := identify(request(func(*jwt.AuthorizationRequestClaims) {}), now)
	must(t, err)
	if id != d.id {
		t.Errorf("%s was taken for %s", d.id, id)
	}
	for words, r := range map[string]*jwt.AuthorizationRequestClaims{
		"not by \"nats\"":     request(func(r *jwt.AuthorizationRequestClaims) { r.ClientInformation.Type = "nats" }),
		"no verified":         request(func(r *jwt.AuthorizationRequestClaims) { r.TLS = nil }),
		"no verified client":  request(func(r *jwt.AuthorizationRequestClaims) { r.TLS = &jwt.ClientTLS{Certs: jwt.StringList{text}} }),
		"cannot be read":      request(func(r *jwt.AuthorizationRequestClaims) { r.TLS.VerifiedChains[0][0] = "x" }),
		"as MQTT client id":   request(func(r *jwt.AuthorizationRequestClaims) { r.ClientInformation.MQTT = "" }),
		"MQTT client id, not": request(func(r *jwt.AuthorizationRequestClaims) { r.ClientInformation.MQTT += "x" }),
	} {
		_, _, err := identify(r, now)
		wantSentence(t, err, words)
	}
	for _, at := range []time.Time{now.Add(2 * time.Hour), now.Add(-3 * time.Hour)} {
		_, _, err := identify(request(func(*jwt.AuthorizationRequestClaims) {}), at)
		wantSentence(t, err, "is valid from")
	}
}

// TestCallerCannotWeakenTLS, neither by its configuration nor by one that it
// makes for each connection.
func TestCallerCannotWeakenTLS(t *testing.T) {
	ca := newAuthority(t)
	c := requireClientCert(&tls.Config{ClientCAs: ca.pool(), GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{MinVersion: tls.VersionTLS10, ClientAuth: tls.NoClientCert}, nil
	}})
	inner, err := c.GetConfigForClient(nil)
	must(t, err)
	for _, c := range []*tls.Config{c, inner} {
		if c.MinVersion != tls.VersionTLS13 || c.ClientAuth != tls.RequireAndVerifyClientCert || !c.ClientCAs.Equal(ca.pool()) {
			t.Errorf("weakened to %#x, %v", c.MinVersion, c.ClientAuth)
		}
	}
}
