package coordinator

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"net"
	"net/http"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

const (
	maxEnrol        = 1 << 20 // bytes; the inventory is most of it
	defaultTokenUse = 1
	maxTokenUse     = 20_000 // the record lists them: see maxRecord
	defaultTokenTTL = 24 * time.Hour
	maxTokenTTL     = 366 * 24 * time.Hour
)

func (c *Coordinator) enrolRoutes() []route {
	return []route{
		{method: "POST", path: "/enrol/v1", needs: byAnybody, summary: "Take a device in", in: wire.EnrolRequest{}, out: wire.EnrolReply{}, handle: c.enrol},
		{method: "POST", path: v1 + "/tokens", needs: toOperate, summary: "Make a fleet token", in: api.TokenRequest{}, out: api.Token{}, handle: answer(c.createToken)},
	}
}

// enrol answers POST /enrol/v1: who brings a good token and proves a key
// becomes the device with that key's id.
func (c *Coordinator) enrol(w http.ResponseWriter, r *http.Request) error {
	var q wire.EnrolRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxEnrol)).Decode(&q); err != nil {
		return refuse(http.StatusBadRequest, wire.CodeBadBody, "the enrolment request cannot be read: %v", err)
	}
	tok, err := wire.ParseFleetToken(q.Token)
	if err != nil {
		return refuse(http.StatusForbidden, "token_refused", "%v", err)
	}
	csr, err := x509.ParseCertificateRequest(q.CSR)
	if err == nil {
		err = csr.CheckSignature() // proof that the device has the key
	}
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_csr", "the certificate request is not valid: %v", err)
	}
	key, ok := csr.PublicKey.(ed25519.PublicKey)
	if !ok {
		return refuse(http.StatusBadRequest, "bad_csr", "a device key must be Ed25519, this is %T", csr.PublicKey)
	}
	id := wire.IDOf(key)
	if err := c.reg.mayEnrol(id); err != nil { // before a use is spent
		return err
	}
	hash := tok.Hash()
	rec, err := spend(r.Context(), c.tokens, hex.EncodeToString(hash[:]), id, c.now())
	if err != nil {
		return err
	}
	cert, until, err := c.auth.deviceCertificate(key)
	if err != nil {
		return err
	}
	root, err := c.releases.root(r.Context())
	if err != nil {
		return err
	}
	if err := c.reg.enrolled(r.Context(), api.DeviceRecord{
		ID: id, PublicKey: key, Group: rec.Group, Enrolled: c.now().UTC(), CertUntil: until,
		Agent: label(q.Agent), OS: label(q.OS), Arch: label(q.Arch), Board: label(q.Board), Inventory: q.Inventory,
	}); err != nil {
		return err
	}
	c.log.Info("device enrolled", "device", id, "group", rec.Group, "board", label(q.Board), "agent", label(q.Agent))
	brokers, planes := c.addresses(r)
	writeJSON(w, http.StatusOK, wire.EnrolReply{
		Device: id, Certificate: cert, CA: c.auth.caPEM,
		OrderKey: c.auth.orderKey.Public().(ed25519.PublicKey),
		Brokers:  brokers, DataPlane: planes, UpdateRoot: root,
		BeatSeconds: int(c.cfg.Beat / time.Second),
	})
	return nil
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
	for _, h := range hosts {
		brokers = append(brokers, "ssl://"+net.JoinHostPort(h, c.mqttPort))
		planes = append(planes, "https://"+net.JoinHostPort(h, c.httpPort))
	}
	return brokers, planes
}

// createToken makes a fleet token and keeps its hash.
func (c *Coordinator) createToken(r *http.Request, q api.TokenRequest) (api.Token, error) {
	uses, ttl := q.Uses, time.Duration(min(max(q.ValidSeconds, -1), int64(maxTokenTTL/time.Second)+1))*time.Second
	if uses == 0 {
		uses = defaultTokenUse
	}
	if ttl == 0 {
		ttl = defaultTokenTTL
	}
	if uses < 1 || uses > maxTokenUse || ttl < time.Second || ttl > maxTokenTTL {
		return api.Token{}, refuse(http.StatusBadRequest, "bad_token", "a token has 1 to %d uses and is valid for a second to a year", maxTokenUse)
	}
	if label(q.Group) != q.Group {
		return api.Token{}, refuse(http.StatusBadRequest, "bad_token", "a group has a name of at most %d printable bytes, without spaces around it", maxLabel)
	}
	tok := wire.NewFleetToken(c.auth.caCert.Raw)
	hash := tok.Hash()
	rec := TokenRecord{Group: q.Group, Uses: uses, Created: c.now().UTC(), Expires: c.now().Add(ttl).UTC()}
	_, err := c.tokens.change(r.Context(), hex.EncodeToString(hash[:]), func(v *TokenRecord, _ bool) error {
		*v = rec
		return nil
	})
	return api.Token{Token: tok.String(), Group: rec.Group, Uses: rec.Uses, Expires: rec.Expires}, err
}
