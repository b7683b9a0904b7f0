package wire

import (
	"encoding/json"
	"time"
)

// URLs in orders are paths below the coordinator's data plane ("/data/v1/…"),
// so that they outlive a change of its address. They carry a ticket that only
// the addressed device may use, for the stated size and time.

// ChunkStore asks a device to fetch a chunk and make it durable.
type ChunkStore struct {
	ID   string `json:"id"`   // Merkle root, hex (see sync/chunk)
	Size int64  `json:"size"` // bytes
	URL  string `json:"url"`
}

// Receipt is the body of a SUCCEEDED chunk.store: the chunk is durable on disk.
type Receipt struct {
	ID     string `json:"id"`
	Size   int64  `json:"size"`
	Volume string `json:"volume"`
}

// ChunkServe asks a device to put a chunk it holds to a URL.
type ChunkServe struct {
	ID  string `json:"id"`
	URL string `json:"url"`
}

// ChunkDrop asks a device to forget chunks. Unknown ids are no error.
type ChunkDrop struct {
	IDs []string `json:"ids"`
	// OnlyLost leaves alone what is not known to be lost when the order is carried
	// out: it may have been stored anew since somebody decided.
	OnlyLost bool `json:"only_lost,omitempty"`
}

// Audit asks for proof that chunks are held.
type Audit struct {
	Items    []AuditItem `json:"items"`
	Nonce    string      `json:"nonce"` // hex; makes each audit's answer its own
	Deadline time.Time   `json:"deadline"`
}

// AuditItem is one leaf of one chunk, both drawn by the coordinator.
type AuditItem struct {
	Chunk string `json:"chunk"`
	Leaf  int    `json:"leaf"` // index from 0, 4 KiB each
}

// AuditAnswer is the body of a report on an audit; the leaves are its
// attachment, as the JSON of []AuditLeaf in the order of the items.
type AuditAnswer struct {
	Nonce string   `json:"nonce"`
	Lost  []string `json:"lost,omitempty"` // chunks that the device confesses to have lost
}

// AuditLeaf answers one item. A lost chunk's leaves have Lost set and nothing else.
type AuditLeaf struct {
	Chunk string   `json:"chunk"`
	Leaf  int      `json:"leaf"`
	Lost  bool     `json:"lost,omitempty"`
	Data  []byte   `json:"data,omitempty"`
	Path  [][]byte `json:"path,omitempty"` // RFC 6962 inclusion path, leaf to root, 32 bytes each
}

// Blob is a file fetched over HTTPS and checked against its digest.
type Blob struct {
	SHA256 string `json:"sha256"` // lower-case hex
	Size   int64  `json:"size"`   // bytes
	URL    string `json:"url"`
}

// UpdateInstall offers a release. The device trusts none of this: it reads the
// signed update metadata itself and installs only what that names.
type UpdateInstall struct {
	Version string `json:"version"`
	Target  string `json:"target"` // name in the TUF targets metadata
	// Percentage is the share of devices that a campaign has come to, above 0 and up
	// to 100; missing: whoever is asked is meant. The device finds out by itself
	// whether it is among them, and refuses with "not_in_rollout" if it is not.
	Percentage float64 `json:"percentage,omitempty"`
}

// UpdateResult is the body of a report on an update.
type UpdateResult struct {
	From      string `json:"from"`
	To        string `json:"to"`
	Running   string `json:"running"` // version that reports
	Slot      string `json:"slot"`    // "a" or "b"; "" where whole firmwares are updated
	Confirmed bool   `json:"confirmed"`

	// What follows is left out where it is not known, by older agents too.

	Form         string  `json:"form,omitempty"`          // encoding of the form that was fetched, of ota/bundle
	NoDelta      string  `json:"no_delta,omitempty"`      // why that was none of the deltas that the release has, a sentence
	FetchedBytes int64   `json:"fetched_bytes,omitempty"` // of parts, over the line or from a stick, what was given up included
	TookSeconds  float64 `json:"took_seconds,omitempty"`  // from the first byte that was asked for until it was installed
	Local        bool    `json:"local,omitempty"`         // from a stick or a file of the owner's
	// Checkpoint is the newest one of the release log that the device has checked, a
	// signed note (golang.org/x/mod/sumdb/note).
	Checkpoint string      `json:"checkpoint,omitempty"`
	Gate       *UpdateGate `json:"gate,omitempty"`
}

// UpdateGate is what decides whether a new version is kept: it must not do worse than
// the one before it did.
type UpdateGate struct {
	Before UpdateFigures `json:"before"`
	After  UpdateFigures `json:"after"`
	Worse  []string      `json:"worse,omitempty"` // sentences; empty for a version that is kept
}

// UpdateFigures are how an agent does.
type UpdateFigures struct {
	Online  bool `json:"online"`  // broker and coordinator answer
	Volumes int  `json:"volumes"` // that are open
	Sensors int  `json:"sensors"` // that answer
	Crashes int  `json:"crashes"` // of a version on trial: tries that it ended by a crash
}

// Phases of an update, in order; see ota/slot.
const (
	UpdateWaiting   = "waiting"   // for what UpdateState.Code says
	UpdateFetching  = "fetching"  // bytes come
	UpdateVerified  = "verified"  // they are the signed ones, and are being installed
	UpdateInstalled = "installed" // and wait for a start
	UpdateTesting   = "testing"   // what runs is on trial
)

// UpdateState is how far a device is with an update, told in each heartbeat while there is one.
type UpdateState struct {
	Phase   string `json:"phase"`
	Version string `json:"version"`
	Local   bool   `json:"local,omitempty"`   // by the owner's wish
	Code    string `json:"code,omitempty"`    // why it waits
	Seconds int64  `json:"seconds,omitempty"` // until it goes on, from the time of the message; 0: nobody knows
}

// OrderCancel asks a device to stop an order, or never to begin it. The order
// itself ends with its own report, CANCELED or whatever it was by then.
type OrderCancel struct {
	Order   string    `json:"order"`
	Expires time.Time `json:"expires"` // of that order: so long the device remembers, if it has not seen it yet
}

// CancelResult is the body of a SUCCEEDED order.cancel.
type CancelResult struct {
	State State `json:"state"` // of the other order: CANCELED, or as it had already ended
}

// ConfigApply is the whole configuration that the fleet wants of a device. What
// is not in it goes back to the device's own default.
type ConfigApply struct {
	Version uint64                     `json:"version"` // grows with every change that touches this device
	Values  map[string]json.RawMessage `json:"values"`
}

// ConfigReport says what configuration a device runs. It is the body of a
// SUCCEEDED config.apply: a value that is refused does not fail the others.
type ConfigReport struct {
	Version uint64                     `json:"version"` // of the newest ConfigApply that was taken; 0 if there was none
	Running map[string]json.RawMessage `json:"running"` // every setting, as it is in force
	Refused map[string]Refusal         `json:"refused,omitempty"`
}

// Refusal is why a device does not run a value that the fleet wants.
type Refusal struct {
	Code   string `json:"code"` // CodePolicy for an owner's limit, CodeBadBody, CodeNotSupported
	Reason string `json:"reason"`
}

// Pong is the body of a SUCCEEDED device.ping.
type Pong struct {
	Agent  string  `json:"agent"`
	Uptime float64 `json:"uptime"` // seconds since the agent started
}
