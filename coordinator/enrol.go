package coordinator

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

const (
	maxEnrol = maxInventory + 256<<10 // bytes of a request; the inventory is most of it
	// maxInventory is the largest inventory that is kept, in bytes: one with 1,000
	// disks has up to 500 KiB, and a record of the store up to 1 MiB. A device with
	// a larger one is a member all the same.
	maxInventory = 768 << 10
)

func (c *Coordinator) enrolRoutes() []route {
	return slices.Concat([]route{
		{method: "POST", path: "/enrol/v1", needs: byAnybody, summary: "Take a device in, renew a member's certificate, or note that a device waits to be claimed (202)",
			in: wire.EnrolRequest{}, out: wire.EnrolReply{}, handle: c.enrol},
	}, c.tokenRoutes(), c.claimRoutes())
}

// enrol answers POST /enrol/v1. Whoever proves a key speaks for the device with
// that key's id:
//
//   - a member gets a new certificate. It needs no token, and spends none that it
//     brings: its record stays, also when it was flashed anew;
//   - a retired device is refused;
//   - another comes in by a fleet token, or waits to be claimed.
func (c *Coordinator) enrol(w http.ResponseWriter, r *http.Request) error {
	var q wire.EnrolRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxEnrol)).Decode(&q); err != nil {
		return refuse(http.StatusBadRequest, wire.CodeBadBody, "the enrolment request cannot be read: %v", err)
	}
	key, err := provenKey(q.CSR)
	if err != nil {
		return err
	}
	id := wire.IDOf(key)
	if err := c.limitProven(w, id); err != nil {
		return err
	}
	defer c.enrolling.lock(string(id))()
	// Not only from the copy: another coordinator may have taken it in just now.
	d, _, known, err := c.reg.rows.load(r.Context(), string(id), false)
	if err != nil {
		return err
	}
	switch {
	case known && d.Retired:
		return errRetired(id)
	case known:
		return c.reply(w, r, q, api.DeviceRecord{ID: id, PublicKey: key}, false)
	case q.Token != "":
		if d, err = c.byToken(r.Context(), q.Token, id); err != nil {
			return err
		}
		d.PublicKey = key
		return c.reply(w, r, q, d, true)
	case c.cfg.NoClaim:
		return errToken("is missing")
	}
	p, err := c.waiting.knock(r.Context(), q, key, host(r))
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusAccepted, p)
	return nil
}

// provenKey is the key that a certificate request is for, and signed by.
func provenKey(raw []byte) (ed25519.PublicKey, error) {
	csr, err := x509.ParseCertificateRequest(raw)
	if err == nil {
		err = csr.CheckSignature() // proof that the device has the key
	}
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "bad_csr", "the certificate request is not valid: %v", err)
	}
	key, ok := csr.PublicKey.(ed25519.PublicKey)
	if !ok {
		return nil, refuse(http.StatusBadRequest, "bad_csr", "a device key must be Ed25519, this is %T", csr.PublicKey)
	}
	return key, nil
}

// byToken spends a token's use for a device, and says what it becomes by it.
func (c *Coordinator) byToken(ctx context.Context, text string, id wire.DeviceID) (api.DeviceRecord, error) {
	tok, err := wire.ParseFleetToken(text)
	if err != nil {
		return api.DeviceRecord{}, refuse(http.StatusForbidden, "token_refused", "%v", err)
	}
	name, t, err := c.tokens.spend(ctx, tok, id)
	return api.DeviceRecord{ID: id, Token: name, Group: t.Group, Labels: t.Labels, Enrolled: c.now().UTC()}, err
}

// reply puts a device on record and gives it what makes it a member.
func (c *Coordinator) reply(w http.ResponseWriter, r *http.Request, q wire.EnrolRequest, d api.DeviceRecord, isNew bool) error {
	cert, until, err := c.auth.deviceCertificate(d.PublicKey, c.cfg.CertificateLife)
	if err != nil {
		return err
	}
	root, err := c.releases.root(r.Context())
	if err != nil {
		return err
	}
	d.CertUntil = until
	d.Agent, d.OS, d.Arch, d.Board = label(q.Agent), label(q.OS), label(q.Arch), label(q.Board)
	if p := networkOf(host(r)); p.IsValid() {
		d.Network = p.String()
	}
	if d, err = c.reg.enrolled(r.Context(), d, isNew); err != nil {
		return err
	}
	certain := func() bool {
		by, err := c.checkDevice(r)
		return isNew || err == nil && by == d.ID
	}
	if err := c.inventories.came(r.Context(), d.ID, q.Inventory, certain); err != nil {
		return err
	}
	if isNew {
		c.log.Info("device enrolled", "device", d.ID, "group", d.Group, "token", d.Token, "board", d.Board, "agent", d.Agent)
		c.noteMember(r.Context(), d, host(r))
	} else {
		c.log.Info("certificate renewed", "device", d.ID, "until", until.UTC().Format(time.RFC3339))
	}
	brokers, planes := c.addresses(r)
	writeJSON(w, http.StatusOK, wire.EnrolReply{
		Device: d.ID, Certificate: cert, CA: c.auth.caPEM,
		OrderKey: c.auth.orderKey.Public().(ed25519.PublicKey),
		Brokers:  brokers, DataPlane: planes, UpdateRoot: root,
		BeatSeconds: int(c.cfg.Beat / time.Second),
	})
	return nil
}

// noteMember puts a device that has become a member on the audit log.
func (c *Coordinator) noteMember(ctx context.Context, d api.DeviceRecord, address string) {
	how := map[string]string{"token": d.Token} // its id, which is no secret
	if d.Token == "" {
		how = map[string]string{"claimed": "yes"}
	}
	if d.Group != "" {
		how["group"] = d.Group
	}
	raw, _ := json.Marshal(how) // texts only
	c.note(ctx, api.LogEntry{Actor: "device:" + string(d.ID), Action: "device.enrol", Targets: []string{string(d.ID)}, Address: address, Request: raw})
}

// addresses are where devices find the broker and the data plane: the host
// names given by the operator, or else the one by which this device came.
func (c *Coordinator) addresses(r *http.Request) (brokers, planes []string) {
	hosts := c.cfg.Advertise
	if len(hosts) == 0 {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		hosts = []string{host}
	}
	with := func(scheme, port string, public []string) (urls []string) {
		for _, h := range hosts {
			urls = append(urls, scheme+net.JoinHostPort(h, port))
		}
		if len(public) > 0 {
			urls = nil
		}
		for _, a := range public {
			urls = append(urls, scheme+a)
		}
		return urls
	}
	return with("ssl://", c.mqttPort, c.cfg.PublicMQTT), with("https://", c.httpPort, c.cfg.PublicHTTPS)
}
