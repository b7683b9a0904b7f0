package coordinator

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/url"
	"path/filepath"

	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/internal/durable"
)

// WriteNATSConfig prints what a stock nats-server has to be started with to
// serve this coordinator, and leaves that server's certificate and key with the
// coordinator's own keys. The server must find these files at the same paths.
func WriteNATSConfig(w io.Writer, cfg Config) error {
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return err
	}
	keys := filepath.Join(dir, "keys")
	auth, err := openAuthority(keys)
	if err != nil {
		return err
	}
	secret, err := loadOrMake(filepath.Join(keys, secretFile), engine.NewSecret)
	if err != nil {
		return err
	}
	c := &Coordinator{cfg: cfg, auth: auth}
	cert, err := auth.serverCertificate(c.names())
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return err
	}
	var listen string // engine's default unless --nats says where
	if cfg.NATS != "" {
		u, err := url.Parse(cfg.NATS)
		if err != nil || u.Host == "" {
			return fmt.Errorf("%q is no address of a NATS server, it looks like tls://host:4222", cfg.NATS)
		}
		listen = u.Host
	}
	sc := engine.ServerConfig{
		ClientListen: listen,
		Secret:       secret, MQTTListen: cfg.MQTT, StoreDir: filepath.Join(dir, "nats"), Sync: orderSync,
		CertFile: filepath.Join(keys, "nats.pem"), KeyFile: filepath.Join(keys, "nats.key"), CAFile: filepath.Join(keys, "ca.pem"),
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := durable.WriteFile(sc.CertFile, certPEM, 0o644); err != nil {
		return fmt.Errorf("the certificate of the NATS server cannot be saved: %w", err)
	}
	if err := durable.WriteFile(sc.KeyFile, keyPEM, 0o600); err != nil {
		return fmt.Errorf("the key of the NATS server cannot be saved: %w", err)
	}
	return engine.WriteServerConfig(w, sc)
}
