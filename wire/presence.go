package wire

import (
	"encoding/json"
	"time"
)

// Presence is a device's hello, and, with Online false, its last will.
type Presence struct {
	Device          DeviceID   `json:"device"`
	Online          bool       `json:"online"`
	Session         string     `json:"session"` // hex, 16 bytes, new for every connection; a last will counts for its own session only
	Nonce           string     `json:"nonce"`   // hex, 16 bytes, new for every hello; the welcome repeats it
	BootID          string     `json:"boot_id"` // the kernel's, tells a reboot from a reconnect
	Agent           string     `json:"agent"`   // version
	OS              string     `json:"os"`      // as Go names it
	Arch            string     `json:"arch"`    // as Go names it
	Board           string     `json:"board"`
	Slot            string     `json:"slot,omitempty"`
	InventoryDigest string     `json:"inventory_digest,omitempty"` // SHA-256, hex
	Capacity        int64      `json:"capacity,omitempty"`         // bytes that may hold chunks, used ones included
	Used            int64      `json:"used,omitempty"`             // bytes of chunks held
	At              time.Time  `json:"at"`
	TimeConfidence  Confidence `json:"time_confidence"`
}

// Welcome answers a hello. Over the hello's nonce it carries the
// coordinator's time, so that a device without a clock can trust it.
type Welcome struct {
	Device DeviceID  `json:"device"`
	Nonce  string    `json:"nonce"`
	Time   time.Time `json:"time"`
}

// Beat is a heartbeat with telemetry.
type Beat struct {
	Device         DeviceID        `json:"device"`
	At             time.Time       `json:"at"`
	TimeConfidence Confidence      `json:"time_confidence"`
	Uptime         float64         `json:"uptime"`              // seconds since the agent started
	Telemetry      json.RawMessage `json:"telemetry,omitempty"` // hw.Telemetry
	Capacity       int64           `json:"capacity,omitempty"`
	Used           int64           `json:"used,omitempty"`
}

// EnrolRequest is the body of POST /enrol/v1.
type EnrolRequest struct {
	CSR   []byte `json:"csr"`             // PKCS #10, DER, signed by the device's key
	Token string `json:"token,omitempty"` // fleet token
	Agent string `json:"agent"`
	OS    string `json:"os"`
	Arch  string `json:"arch"`
	Board string `json:"board"`
	// Inventory is what hw found, as JSON; it tells the fleet manager what joined.
	Inventory json.RawMessage `json:"inventory,omitempty"`
}

// EnrolReply makes a device a member of the fleet.
type EnrolReply struct {
	Device      DeviceID `json:"device"`
	Certificate []byte   `json:"certificate"`  // PEM, for TLS client authentication
	CA          []byte   `json:"ca"`           // PEM, signs the coordinator's and the broker's certificates
	OrderKey    []byte   `json:"order_key"`    // raw Ed25519 public key that signs orders
	Brokers     []string `json:"brokers"`      // ssl://host:port
	DataPlane   []string `json:"data_plane"`   // https://host:port
	UpdateRoot  []byte   `json:"update_root"`  // TUF root.json, empty while there is none
	BeatSeconds int      `json:"beat_seconds"` // heartbeat interval, without jitter
}

// APIError is the body of every HTTP answer with a status of 400 or above.
type APIError struct {
	Code   string `json:"code"`
	Reason string `json:"reason"`
}
