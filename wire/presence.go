package wire

import (
	"encoding/json"
	"time"
)

// Presence is a device's hello, and, with Online false, its last will.
type Presence struct {
	Device          DeviceID   `json:"device"`
	Online          bool       `json:"online"`
	Session         string     `json:"session"`  // hex, 16 bytes, new for every connection; a last will counts for its own session only
	Nonce           string     `json:"nonce"`    // hex, 16 bytes, new for every hello; the welcome repeats it
	Instance        string     `json:"instance"` // hex, 16 bytes, new for every start of the agent: it comes back only if two run with one key
	BootID          string     `json:"boot_id"`  // the kernel's, tells a reboot from a reconnect
	Agent           string     `json:"agent"`    // version
	OS              string     `json:"os"`       // as Go names it
	Arch            string     `json:"arch"`     // as Go names it
	Board           string     `json:"board"`
	Slot            string     `json:"slot,omitempty"`
	InventoryDigest string     `json:"inventory_digest,omitempty"` // SHA-256, hex
	Capacity        int64      `json:"capacity,omitempty"`         // bytes that may hold chunks, used ones included
	Used            int64      `json:"used,omitempty"`             // bytes of chunks held
	ConfigVersion   uint64     `json:"config_version,omitempty"`   // see ConfigReport
	Losses          string     `json:"losses,omitempty"`           // as in Beat
	Dropped         []Dropped  `json:"dropped,omitempty"`          // what the outbox gave up, since the agent's journal was made
	At              time.Time  `json:"at"`
	TimeConfidence  Confidence `json:"time_confidence"`
}

// Dropped is the record of what a device gave up of one retention class,
// because its outbox was full.
type Dropped struct {
	Class string    `json:"class"`
	Count uint64    `json:"count"`
	Bytes uint64    `json:"bytes"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
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
	// InventoryDigest is of what the device has now; the coordinator asks for
	// what it does not know with [KindInventory].
	InventoryDigest string    `json:"inventory_digest,omitempty"`
	Warnings        []Warning `json:"warnings,omitempty"` // at most MaxWarnings, the worst first
	// Losses is the LossDigest of all chunks that the device knows to be lost; the
	// coordinator asks for them with [KindChunkLosses].
	Losses string  `json:"losses,omitempty"`
	Scrubs []Scrub `json:"scrubs,omitempty"` // at most MaxScrubs, the latest first
	// Pause says that the device would refuse chunks now; without one it would not.
	Pause *Pause `json:"pause,omitempty"`
	// Jobs is how the device stands with jobs; without it, its agent is too old to
	// say, or runs none.
	Jobs *JobsState `json:"jobs,omitempty"`
	// Update is the update that is under way; without one there is none.
	Update *UpdateState `json:"update,omitempty"`
}

// Pause is why a device refuses to move chunks, or lets jobs stand still, and for how long: what a report
// says with the same code, told before anybody asks.
type Pause struct {
	Code    string `json:"code"`    // CodeMetered, CodeQuietHours or CodeBusy; of jobs, a code of jobs/policy
	Seconds int64  `json:"seconds"` // from the time of the message; 0: nobody knows
}

// EnrolRequest is the body of POST /enrol/v1. The device proves its key by the
// signature of the CSR, and why it should be let in by one of:
//
//   - a fleet token;
//   - nothing, and it is a member already: its certificate is renewed;
//   - nothing, and it is not: it waits until somebody claims it ([EnrolPending]).
//
// The signature covers the key and nothing else, so whoever has seen a request can
// send it again, with other words about the device. It gets what is of use only to
// who has the key; what it costs is bounded. Of a member it changes only until when
// its newest certificate lasts, and the inventory where none is on record or the
// connection shows the member's certificate; agent, os, arch and board come from
// [Presence]. Of a device that waits it changes what is shown to who claims it.
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

// EnrolPending is the answer 202 to a device that nobody has claimed yet. Its
// code ([ClaimCode]) is not in it: the device works it out from the authority
// that it sees, so that a code which fits says that nobody stands between.
type EnrolPending struct {
	Device       DeviceID  `json:"device"`
	RetrySeconds int       `json:"retry_seconds"` // ask again after so long, with jitter
	Expires      time.Time `json:"expires"`       // the coordinator forgets it then; asking again begins anew
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
