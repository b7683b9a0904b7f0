package test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"

	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// dial connects to the fleet's broker under a client id, with any certificate.
func (f *fleet) dial(clientID string, cert tls.Certificate, heard func(mqtt.Message)) (mqtt.Client, error) {
	f.T.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(readFile(f.T, f.Path("coordinator", "keys", "ca.pem")))
	c := mqtt.NewClient(mqtt.NewClientOptions().AddBroker("ssl://" + f.MQTT).SetClientID(clientID).SetProtocolVersion(4).
		SetAutoReconnect(false).SetConnectTimeout(testbed.Patience).SetWriteTimeout(testbed.Patience).
		SetDefaultPublishHandler(func(_ mqtt.Client, m mqtt.Message) { heard(m) }).
		SetTLSConfig(&tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}))
	tok := c.Connect()
	if !tok.WaitTimeout(testbed.Patience) {
		f.T.Fatal("the broker neither lets in nor refuses")
	}
	if tok.Error() == nil {
		f.T.Cleanup(func() { c.Disconnect(0) })
	}
	return c, tok.Error()
}

func (d *device) key() ed25519.PrivateKey {
	d.f.T.Helper()
	return readKey(d.f.T, d.state("identity", "key.pem"))
}

// certificate is the one that the device got when it enrolled.
func (d *device) certificate() tls.Certificate {
	d.f.T.Helper()
	var m wire.EnrolReply
	if err := json.Unmarshal(readFile(d.f.T, d.state("identity", "membership.json")), &m); err != nil {
		d.f.T.Fatal(err)
	}
	block, _ := pem.Decode(m.Certificate)
	return tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: d.key()}
}

// TestADeviceReachesNoOther: a device of the fleet, in the wrong hands, hears
// nothing that is for others, whatever it subscribes to, and what it says in
// another's name changes nothing about the other.
func TestADeviceReachesNoOther(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := testbed.Seeded(t)
	f.enrol(2, false)
	victim, thief := f.devices[0], f.devices[1]
	thief.stop()
	heard := make(chan mqtt.Message, 64)
	hear := func(m mqtt.Message) {
		select {
		case heard <- m:
		default: // the first is enough
		}
	}
	c, err := f.dial(string(thief.id), thief.certificate(), hear)
	if err != nil {
		t.Fatal(err)
	}
	// Whether a subscription is refused or never served is the broker's affair.
	for _, topic := range []string{"#", "+/#", "deimos/#", "deimos/1/+/order", "deimos/1/+/+", wire.Topic(victim.id, wire.ChannelOrder), wire.Topic(victim.id, wire.ChannelReport), wire.Topic(victim.id, wire.ChannelPresence), "$share/g/deimos/1/+/order", "$SYS/#", "$JS/#", "$KV/#", "$MQTT/#"} {
		c.Subscribe(topic, 0, nil).WaitTimeout(testbed.Patience)
		if !c.IsConnectionOpen() {
			t.Fatalf("the subscription of %s ended the connection, and the rest of this test", topic)
		}
	}
	before := victim.now()
	data := testbed.RandomBytes(rng, 100_000)
	f.Put("file", data, "--replicas", "1") // to the victim, which alone is online
	victim.checkStorage()

	// In the victim's name, with a key of its own and on every topic: a last
	// will, a hello from another board, a beat without room.
	lies := map[wire.Channel][]byte{}
	seal := func(ch wire.Channel, typ wire.PayloadType, v any) {
		raw, err := wire.Seal(thief.key(), typ, v)
		if err != nil {
			t.Fatal(err)
		}
		lies[ch] = raw
	}
	now := time.Now().UTC()
	seal(wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: victim.id, Online: true, Session: strings.Repeat("ab", 16), Nonce: strings.Repeat("cd", 16), Board: "stolen", Agent: "9.9.9", At: now})
	seal(wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: victim.id, At: now, Capacity: 1})
	seal(wire.ChannelReport, wire.TypeReport, wire.Report{Order: "01ARZ3NDEKTSV4RRFFQ69G5FAV", Device: victim.id, Seq: 1, State: wire.Succeeded, At: now})
	seal(wire.ChannelOrder, wire.TypeOrder, wire.Order{ID: "01ARZ3NDEKTSV4RRFFQ69G5FAV", Device: victim.id, Kind: wire.KindChunkDrop, Issued: now, Expires: now.Add(time.Hour), Body: json.RawMessage(`{"ids":[]}`)})
	for ch, raw := range lies {
		c.Publish(wire.Topic(victim.id, ch), 0, false, raw).WaitTimeout(testbed.Patience) // under the other's name
		c.Publish(wire.Topic(thief.id, ch), 0, false, raw).WaitTimeout(testbed.Patience)  // under its own
	}
	// The fence: a hello of its own, which is answered by a welcome. It is the
	// first thing that the thief hears.
	raw, err := wire.Seal(thief.key(), wire.TypePresence, wire.Presence{Device: thief.id, Online: true, Session: strings.Repeat("12", 16), Nonce: strings.Repeat("34", 16), At: now})
	if err != nil {
		t.Fatal(err)
	}
	if !c.IsConnectionOpen() {
		if c, err = f.dial(string(thief.id), thief.certificate(), hear); err != nil {
			t.Fatal(err)
		}
	}
	c.Subscribe(wire.Topic(thief.id, wire.ChannelOrder), 0, nil).WaitTimeout(testbed.Patience)
	c.Publish(wire.Topic(thief.id, wire.ChannelPresence), 0, false, raw).WaitTimeout(testbed.Patience)
	select {
	case m := <-heard:
		if m.Topic() != wire.Topic(thief.id, wire.ChannelOrder) || !bytes.Contains(m.Payload(), []byte(wire.TypeWelcome)) {
			t.Errorf("the thief heard %d bytes on %s", len(m.Payload()), m.Topic())
		}
	case <-time.After(testbed.Patience):
		t.Fatal("the thief's own hello was not answered: nothing was shown")
	}
	after := victim.now()
	if after.Board != before.Board || after.Agent != before.Agent || after.Capacity <= 1 || !after.Online {
		t.Errorf("the victim is seen as %+v, it was %+v", after, before)
	}
	victim.checkStorage()
	f.CheckGet("file", data)
	c.Disconnect(100)
}

// TestOldAndForeignCertificatesOpenNothing: neither the broker nor the data
// plane takes a certificate that has run out, is not yet good, is for another
// key or another purpose, or is another authority's.
func TestOldAndForeignCertificatesOpenNothing(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(1, false)
	d := f.devices[0]
	good := d.certificate()
	d.stop()
	key := d.key()
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	name := pkix.Name{CommonName: string(d.id)}
	_, stranger, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	own, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: name, ExtKeyUsage: client, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}, &x509.Certificate{Subject: name}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	for what, cert := range map[string]tls.Certificate{
		"none":                           {},
		"one that has run out":           f.certify(key, x509.Certificate{Subject: name, ExtKeyUsage: client, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(-time.Minute)}),
		"one that is not good yet":       f.certify(key, x509.Certificate{Subject: name, ExtKeyUsage: client, NotBefore: time.Now().Add(24 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour)}),
		"one for another key":            f.certify(stranger, x509.Certificate{Subject: name, ExtKeyUsage: client}),
		"one of a server":                f.certify(key, x509.Certificate{Subject: name, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}),
		"one that signed itself":         {Certificate: [][]byte{own}, PrivateKey: key},
		"one of a device not known":      f.certify(stranger, x509.Certificate{Subject: pkix.Name{CommonName: string(wire.IDOf(stranger.Public().(ed25519.PublicKey)))}, ExtKeyUsage: client}),
		"one with no device's name":      f.certify(key, x509.Certificate{Subject: pkix.Name{CommonName: "*"}, ExtKeyUsage: client}),
		"one with another device's name": f.certify(key, x509.Certificate{Subject: pkix.Name{CommonName: strings.Repeat("a", 24)}, ExtKeyUsage: client}),
	} {
		id := string(d.id)
		if cert.Leaf == nil && len(cert.Certificate) > 0 {
			if leaf, err := x509.ParseCertificate(cert.Certificate[0]); err == nil && leaf.Subject.CommonName != "" {
				id = leaf.Subject.CommonName
			}
		}
		if _, err := f.dial(id, cert, func(mqtt.Message) {}); err == nil {
			t.Errorf("%s: the broker lets it in", what)
		}
		if strings.HasSuffix(what, "name") {
			continue // the data plane goes by the key, which is the device's
		}
		if status := f.fetches(cert); status != 0 && status != http.StatusUnauthorized && status != http.StatusForbidden {
			t.Errorf("%s: the data plane answers %d", what, status)
		}
	}
	if _, err := f.dial(string(d.id), good, func(mqtt.Message) {}); err != nil {
		t.Errorf("the device's own certificate is refused too, nothing was shown: %v", err)
	}
	if status := f.fetches(good); status != http.StatusNotFound && status != http.StatusOK {
		t.Errorf("the device's own certificate gets %d from the data plane, nothing was shown", status)
	}
}

// fetches asks for a file of the update repository, which is for every device;
// 0 means that there was no answer at all.
func (f *fleet) fetches(cert tls.Certificate) int {
	f.T.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(readFile(f.T, f.Path("coordinator", "keys", "ca.pem")))
	ctx, cancel := context.WithTimeout(f.Ctx, testbed.Patience)
	defer cancel()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+f.HTTPS+"/data/v1/repo/metadata/1.root.json", nil)
	if err != nil {
		f.T.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}
