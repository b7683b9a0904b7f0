package engine

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"text/template"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Accounts of the server. What crosses between the two is in the exports and
// imports of [serverConf] and nothing else.
const (
	accountCoordinator = "DEIMOS"
	accountDevices     = "DEVICES"
	accountSystem      = "SYS"
)

// Limits that keep one device, or all of them, from hurting the server.
const (
	// maxDevicePayload is what a device may publish at once: an envelope, and
	// room for the headers that the server adds.
	maxDevicePayload = wire.MaxMessage + 1<<10

	// maxDeviceSubs bounds the subscriptions of one connection. A device needs
	// one; the server's own bookkeeping counts too.
	maxDeviceSubs = 16

	// maxPending is how much the server holds for a connection that does not
	// read before it drops the connection. The coordinator's own is one of them.
	maxPending = 32 << 20

	// mqttMemory holds what the server remembers of MQTT sessions, about 500
	// bytes a device, in memory: the devices' account has no file storage.
	mqttMemory = 256 << 20

	// handshakeTimeout bounds a device's TLS handshake. Its link may be away for
	// most of the time.
	handshakeTimeout = 45 * time.Second

	// authTimeout is how long the server waits for the auth callout.
	authTimeout = 5 * time.Second
)

// ServerConfig describes an external nats-server to [WriteServerConfig].
type ServerConfig struct {
	Secret []byte // the coordinators' secret; only public keys made from it are written
	Name   string // server_name, must differ within a cluster; default "deimos"

	ClientListen string // where coordinators connect, host:port; default 127.0.0.1:4222
	MQTTListen   string // where devices connect, host:port; default 0.0.0.0:8883
	StoreDir     string // JetStream's directory, absolute

	// PEM files: the server's certificate and key, and the CA of the devices'
	// certificates. Both listeners use TLS 1.3 with them; coordinators prove
	// themselves by nkey, devices by client certificate.
	CertFile, KeyFile, CAFile string

	Sync       time.Duration // see [Config.Sync]
	MaxStore   int64         // see [Config.MaxStore]
	MaxDevices int           // see [Config.MaxDevices]
}

// WriteServerConfig prints a complete nats-server.conf with which a stock
// nats-server behaves as the embedded one does. It holds no secret.
func WriteServerConfig(w io.Writer, c ServerConfig) error {
	for _, f := range []struct{ name, value string }{
		{"StoreDir", c.StoreDir}, {"CertFile", c.CertFile}, {"KeyFile", c.KeyFile}, {"CAFile", c.CAFile},
	} {
		if f.value == "" {
			return fmt.Errorf("the server's configuration needs a %s", f.name)
		}
	}
	keys, err := newKeyring(c.Secret)
	if err != nil {
		return err
	}
	if c.ClientListen == "" {
		c.ClientListen = "127.0.0.1:4222"
	}
	if c.MQTTListen == "" {
		c.MQTTListen = "0.0.0.0:8883"
	}
	return renderConfig(w, c, keys)
}

// confValues is what [serverConf] is filled with.
type confValues struct {
	ServerConfig
	Keys                                    public
	Coordinator, Devices, System            string
	FromDevices                             []string
	Orders                                  string
	MaxPayload, MaxSubs, MaxPending, Memory int
	AuthTimeout, HandshakeTimeout           int
	SyncText                                string
}

func renderConfig(w io.Writer, c ServerConfig, keys *keyring) error {
	pub, err := keys.public()
	if err != nil {
		return fmt.Errorf("read the engine's public keys: %w", err)
	}
	if c.Name == "" {
		c.Name = "deimos"
	}
	if c.MaxDevices <= 0 {
		c.MaxDevices = defaultMaxDevices
	}
	if c.MaxStore <= 0 {
		c.MaxStore = noReservation
	}
	v := confValues{
		ServerConfig: c,
		Keys:         pub,
		Coordinator:  accountCoordinator,
		Devices:      accountDevices,
		System:       accountSystem,
		FromDevices: []string{
			wire.Subject("", wire.ChannelReport), wire.Subject("", wire.ChannelBeat), wire.Subject("", wire.ChannelPresence),
		},
		Orders:      wire.Subject("", wire.ChannelOrder),
		MaxPayload:  maxDevicePayload,
		MaxSubs:     maxDeviceSubs,
		MaxPending:  maxPending,
		Memory:      mqttMemory,
		AuthTimeout: int(authTimeout / time.Second), HandshakeTimeout: int(handshakeTimeout / time.Second),
		SyncText: "always",
	}
	if c.Sync > 0 {
		v.SyncText = c.Sync.String()
	}
	if err := serverConf.Execute(w, v); err != nil {
		return fmt.Errorf("write the server's configuration: %w", err)
	}
	return nil
}

// quote writes a string as nats-server's configuration reads it back.
func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\r", `\r`, "\t", `\t`).Replace(s) + `"`
}

// serverConf is the configuration of both the embedded and an external server.
//
// Devices and coordinator have an account each. A device cannot name a subject
// of the coordinator's account, and so cannot reach its JetStream, whatever its
// permissions say; the imports below carry the four channels across. The
// devices' account keeps MQTT's sessions in memory and has no file storage.
var serverConf = template.Must(template.New("nats-server.conf").Funcs(template.FuncMap{"q": quote}).Parse(
	`# Configuration of the message server of a Deimos fleet. It holds no secret.
server_name: {{q .Name}}
{{- if .ClientListen}}
listen: {{q .ClientListen}}
{{- end}}
max_connections: {{.MaxDevices}}
max_pending: {{.MaxPending}}
{{- if .CertFile}}

# Coordinators: they check the server's certificate and prove themselves by nkey.
tls {
  cert_file: {{q .CertFile}}
  key_file: {{q .KeyFile}}
  min_version: "1.3"
  timeout: 10
}
{{- end}}

jetstream {
  store_dir: {{q .StoreDir}}
  sync_interval: {{q .SyncText}}
  max_file_store: {{.MaxStore}}
  max_memory_store: {{.Memory}}
}

# Devices: mutual TLS, no exceptions.
mqtt {
{{- if .MQTTListen}}
  listen: {{q .MQTTListen}}
{{- end}}
{{- if .CertFile}}
  tls {
    cert_file: {{q .CertFile}}
    key_file: {{q .KeyFile}}
    ca_file: {{q .CAFile}}
    verify: true
    min_version: "1.3"
    timeout: {{.HandshakeTimeout}}
  }
{{- end}}
  max_ack_pending: 64
  reject_qos2_publish: true
}

system_account: {{.System}}

accounts {
  {{.Coordinator}} {
    jetstream: enabled
    users: [ { nkey: {{.Keys.Coordinator}} } ]
    exports: [ { stream: {{q .Orders}}, accounts: [ {{.Devices}} ] } ]
    imports: [
{{- range .FromDevices}}
      { stream: { account: {{$.Devices}}, subject: {{q .}} } }
{{- end}}
    ]
  }
  {{.Devices}} {
    jetstream { max_memory: {{.Memory}}, max_file: 0, max_streams: 5, max_consumers: 64 }
    limits { max_payload: {{.MaxPayload}}, max_subscriptions: {{.MaxSubs}} }
    users: [ { nkey: {{.Keys.Keeper}} } ]
    exports: [
{{- range .FromDevices}}
      { stream: {{q .}}, accounts: [ {{$.Coordinator}} ] }
{{- end}}
    ]
    imports: [ { stream: { account: {{.Coordinator}}, subject: {{q .Orders}} } } ]
  }
  {{.System}} {
    users: [ { nkey: {{.Keys.System}} } ]
  }
}

# Everybody but the coordinator is asked for: it decides who a device is.
authorization {
  timeout: {{.AuthTimeout}}
  auth_callout {
    issuer: {{.Keys.Issuer}}
    account: {{.Coordinator}}
    auth_users: [ {{.Keys.Coordinator}}, {{.Keys.Keeper}}, {{.Keys.System}} ]
  }
}
`))

// splitListen takes host:port apart; port 0 asks for any free one.
func splitListen(addr string) (string, int, error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, fmt.Errorf("%q is no address to listen on, write host:port: %w", addr, err)
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q is no address to listen on: the port must be a number up to 65535", addr)
	}
	return host, int(port), nil
}
