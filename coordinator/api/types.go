// Package api is the operator's side of a coordinator: the types of its HTTPS
// API and a client for it. The command line uses only this.
//
// The API lives below /api/v1 on the coordinator's HTTPS address, and describes
// itself: GET /api/v1/openapi.json is an OpenAPI 3.1 document made from what is
// served, so there is no list of the calls here. Every request carries
// "Authorization: Bearer <operator token>". Every answer with a status of 400 or
// above has a [wire.APIError] as its body; one with 429 says in Retry-After when
// to ask again. Sizes are bytes, times are RFC 3339 in UTC, binary fields are
// base64 (encoding/json's).
package api

import (
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// JobRequest asks for a run of a module over one chunk.
type JobRequest struct {
	Module string         `json:"module"` // SHA-256, uploaded before
	Args   []string       `json:"args,omitempty"`
	Object string         `json:"object"`
	Chunk  int            `json:"chunk"`            // index in the object
	Device wire.DeviceID  `json:"device,omitempty"` // empty: any that holds the chunk
	Limits wire.JobLimits `json:"limits,omitzero"`
}

// Job is a finished job.
type Job struct {
	Order  string         `json:"order"`
	Device wire.DeviceID  `json:"device"`
	Result wire.JobResult `json:"result"`
	Output []byte         `json:"output"`
	Report []byte         `json:"report"` // the device's signed report, a DSSE envelope
}

// AuditKind tells the two challenges apart.
type AuditKind string

// The kinds of challenge.
const (
	StorageAudit AuditKind = "storage"
	ComputeAudit AuditKind = "compute"
)

// AuditRequest asks for one challenge now.
type AuditRequest struct {
	Kind   AuditKind     `json:"kind"`
	Device wire.DeviceID `json:"device"`
	Leaves int           `json:"leaves,omitempty"` // storage; 0 means 44, which finds a 10% loss in 99 of 100 cases
	Module string        `json:"module,omitempty"` // compute: SHA-256, uploaded before
	Args   []string      `json:"args,omitempty"`

	Limits wire.JobLimits `json:"limits,omitzero"` // compute: of the device's job
}

// AuditOutcome is how a challenge ended. They are kept apart: a device that
// cannot be reached has not lied, one that lied was reached, and one that
// answers with a refusal has proved nothing but that it is there.
type AuditOutcome string

// The outcomes of a challenge.
const (
	AuditPending     AuditOutcome = "pending"
	AuditRight       AuditOutcome = "right"
	AuditWrong       AuditOutcome = "wrong"       // an answer that does not verify
	AuditLost        AuditOutcome = "lost"        // an honest confession
	AuditRefused     AuditOutcome = "refused"     // an answer that is neither proof nor confession: the device could not or would not
	AuditUnreachable AuditOutcome = "unreachable" // no answer in time
	AuditVoid        AuditOutcome = "void"        // never judged, through no fault of the device
)

// Audit is one challenge and its outcome, with the evidence.
type Audit struct {
	ID      string        `json:"id"`
	Kind    AuditKind     `json:"kind"`
	Device  wire.DeviceID `json:"device"`
	Order   string        `json:"order"`
	At      time.Time     `json:"at"`
	Outcome AuditOutcome  `json:"outcome"`
	Reason  string        `json:"reason,omitempty"`
	Leaves  int           `json:"leaves,omitempty"` // asked
	Right   int           `json:"right,omitempty"`  // leaves that verified
	Chunks  []string      `json:"chunks,omitempty"` // those asked about
	Lost    []string      `json:"lost,omitempty"`   // chunks confessed
	Wrong   []string      `json:"wrong,omitempty"`  // chunks with a leaf that did not verify
	// Commitment is SHA-256(salt ‖ SHA-256 of the expected output), fixed
	// before the order was sent; Salt opens it.
	Commitment string `json:"commitment,omitempty"`
	Salt       string `json:"salt,omitempty"`
	Expected   string `json:"expected,omitempty"` // SHA-256 of the expected output, hex
	Got        string `json:"got,omitempty"`
	Report     []byte `json:"report,omitempty"` // the device's signed report
}

// OfferRequest offers a published release to devices.
type OfferRequest struct {
	Version string `json:"version"`
	Target  string `json:"target"`        // name in the TUF targets metadata
	Key     string `json:"key,omitempty"` // as in [SendRequest]
	Selector
}
