package api

import (
	"context"
	"net/http"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Status is one look at the fleet.
type Status struct {
	Version string    `json:"version"` // of the coordinator that answers
	Started time.Time `json:"started"`
	Since   time.Time `json:"since"` // what is counted "lately" is from then on
	Devices struct {
		Online  int `json:"online"`
		Offline int `json:"offline"`
		Pending int `json:"pending"` // wait to be claimed
		Retired int `json:"retired"`
		Warned  int `json:"warned"` // members that the coordinator has a warning about
		// By the worst of what members said last: something should be looked at,
		// or does not work.
		Troubled int `json:"troubled"`
		Critical int `json:"critical"`
	} `json:"devices"`
	// Health is what most members say is wrong with them, at most [MaxHealthCounts].
	Health []HealthCount `json:"health"`
	Orders struct {
		Open    map[wire.State]int `json:"open"`
		Ended   map[wire.State]int `json:"ended"`              // lately
		AtLeast bool               `json:"at_least,omitempty"` // more have ended lately than the coordinator remembers at once
	} `json:"orders"`
	Challenges map[AuditOutcome]int `json:"challenges"` // lately
	Repair     RepairSummary        `json:"repair"`
	// Attention is what somebody should look at, at most [MaxAttention]; More is
	// how much is left out.
	Attention []Attention `json:"attention"`
	More      int         `json:"more,omitempty"`
}

// HealthCount is how many members have one kind of warning.
type HealthCount struct {
	Code     string        `json:"code"`
	Title    string        `json:"title"`
	Severity wire.Severity `json:"severity"` // the worst
	Devices  int           `json:"devices"`
}

// MaxHealthCounts bounds [Status].Health.
const MaxHealthCounts = 10

// MaxAttention bounds [Status].Attention.
const MaxAttention = 50

// Attention is one thing that somebody should look at.
type Attention struct {
	Code  string `json:"code"`  // stable, for machines: that of a [Warning], or one of the constants below
	About string `json:"about"` // "coordinator", "device:ID", "object:NAME", "campaign:ID", "releases", "uploads", "operator:NAME" or "token:ID"
	Text  string `json:"text"`  // what it is, a short sentence
}

// What needs attention, beside the warnings of devices.
const (
	AttentionChallenge   = "challenge"   // a device failed one lately
	AttentionConfig      = "config"      // a device refuses values that are wanted of it, or could not take them
	AttentionCertificate = "certificate" // a device that is online has not renewed in time
	AttentionToken       = "token"       // a token ends soon
	AttentionRepair      = "repair"      // something holds up the repair of an object
	AttentionLost        = "lost"        // a part of an object is on no device any more
	AttentionDrain       = "drain"       // something holds up a drain
	AttentionCampaign    = "campaign"    // one was stopped, or waits for an approval
	AttentionMetadata    = "metadata"    // signed metadata of releases has ended, or will soon
	AttentionLogFork     = "log_fork"    // the log of releases has shown devices two faces
	AttentionSpace       = "disk_space"  // the disk of the coordinator's state is full, or soon
)

// Status gives one look at the fleet.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return ask[Status](ctx, c, http.MethodGet, "status", nil, nil)
}
