package api

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// AuditKind tells the challenges apart, and what a device tells unasked.
type AuditKind string

// The kinds of challenge.
const (
	StorageAudit AuditKind = "storage"
	ComputeAudit AuditKind = "compute"
	// DisputeAudit is a customer's job that devices had different results of, and that the
	// coordinator has run itself since.
	DisputeAudit AuditKind = "dispute"
	// Confession is no challenge: a device has told of chunks that it lost before
	// it was asked for them, or when it was told to serve one. Its outcome is always
	// [AuditLost].
	Confession AuditKind = "confession"
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

// AuditOutcomes is every outcome.
var AuditOutcomes = []AuditOutcome{AuditPending, AuditRight, AuditWrong, AuditLost, AuditRefused, AuditUnreachable, AuditVoid}

// Audit is one challenge and its outcome.
type Audit struct {
	ID      string        `json:"id"`
	Kind    AuditKind     `json:"kind"`
	Device  wire.DeviceID `json:"device"`
	Order   string        `json:"order"`
	At      time.Time     `json:"at"`
	Routine bool          `json:"routine,omitempty"` // nobody asked for it
	Outcome AuditOutcome  `json:"outcome"`
	Reason  string        `json:"reason,omitempty"`
	// CPUSeconds is what a job has cost the coordinator.
	CPUSeconds float64  `json:"cpu_seconds,omitempty"`
	Leaves     int      `json:"leaves,omitempty"` // asked
	Right      int      `json:"right,omitempty"`  // leaves that verified
	Chunks     []string `json:"chunks,omitempty"` // those asked about
	Lost       []string `json:"lost,omitempty"`   // chunks confessed
	Wrong      []string `json:"wrong,omitempty"`  // chunks with a leaf that did not verify
	Bytes      int64    `json:"bytes,omitempty"`  // that order, report and leaves had on the line
	// Commitment is SHA-256(salt ‖ SHA-256 of the expected output), fixed
	// before the order was sent; Salt opens it.
	Commitment string `json:"commitment,omitempty"`
	Salt       string `json:"salt,omitempty"`
	Expected   string `json:"expected,omitempty"` // SHA-256 of the expected output, hex
	Got        string `json:"got,omitempty"`
	Report     []byte `json:"report,omitempty"` // the device's signed report
	// Evidence tells that there is an [Evidence] of it.
	Evidence bool `json:"evidence,omitempty"`
	// Penalty is what it cost the device; nil for nothing.
	Penalty *Penalty `json:"penalty,omitempty"`
}

// AuditSummary is a challenge in a list.
type AuditSummary struct {
	ID      string        `json:"id"`
	Kind    AuditKind     `json:"kind"`
	Device  wire.DeviceID `json:"device"`
	At      time.Time     `json:"at"`
	Routine bool          `json:"routine,omitempty"`
	Outcome AuditOutcome  `json:"outcome"`
	Reason  string        `json:"reason,omitempty"`
}

// Summary is the challenge as a list has it.
func (a Audit) Summary() AuditSummary {
	return AuditSummary{a.ID, a.Kind, a.Device, a.At, a.Routine, a.Outcome, a.Reason}
}

// AuditQuery says which challenges are meant: those that fit everything given.
type AuditQuery struct {
	Device  wire.DeviceID
	Outcome AuditOutcome
	Before  string // only those older than the one with this id
	Limit   int    // 0 for [DefaultAudits]
}

// How many challenges a list has if nobody says, and at most.
const (
	DefaultAudits = 100
	MaxAudits     = 1000
)

// AuditList is a part of all challenges, the newest first.
type AuditList struct {
	Audits []AuditSummary `json:"audits"`
	Cut    string         `json:"cut,omitempty"`  // a sentence: why there may be more than these; empty if these are all
	Next   string         `json:"next,omitempty"` // [AuditQuery.Before] of the next part; empty if there is none
}

// Score is what is thought of a device, and why. All figures are from 0 to 1,
// and 1 where nothing is known against it.
type Score struct {
	Integrity    float64 `json:"integrity"`    // whether what it answers about chunks is true
	Compute      float64 `json:"compute"`      // whether what it answers as the result of a job is; see [Honesty]
	Reachability float64 `json:"reachability"` // whether it answers
	Trust        float64 `json:"trust"`        // of both, for new chunks; 0: it gets none
	Distrusted   bool    `json:"distrusted"`   // what it holds counts as endangered
	// Evidence is the decayed number of each outcome; see the coordinator's
	// package for half-lives and weights.
	Evidence  map[string]float64 `json:"evidence"`
	Penalties []Penalty          `json:"penalties"` // the newest first, at most [MaxPenalties]
}

// MaxPenalties is how many of a device are kept.
const MaxPenalties = 100

// Figure is one of those of a [Score].
type Figure string

// The figures of a score.
const (
	Integrity    Figure = "integrity"
	Reachability Figure = "reachability"
	Compute      Figure = "compute"
)

// Honesty is how far the results of a device's jobs are believed, and why. Counts fade by
// half in 60 days.
type Honesty struct {
	Device     wire.DeviceID `json:"device"`
	Compute    float64       `json:"compute"`    // as in its [Score]
	Distrusted bool          `json:"distrusted"` // it lied, and gets no jobs
	Aside      bool          `json:"aside"`      // it gets no jobs: distrusted, or doubted over several modules
	Trusted    bool          `json:"trusted"`    // its results are believed without another device's, but for now and then
	// Share of all its jobs, from 0 to 1, are challenges.
	Share      float64 `json:"share"`
	Jobs       float64 `json:"jobs"`       // jobs of customers that it has ended
	Challenges float64 `json:"challenges"` // challenges that it has ended
	Confirmed  float64 `json:"confirmed"`  // results that others or the coordinator have too, each by its cost, 0.25 to 1; 88 at most
	Needed     float64 `json:"needed"`     // of Confirmed, to be trusted
	Wrong      float64 `json:"wrong"`      // results that are proved wrong, each 1 and its cost
	// Doubts are results that differ from the coordinator's, and that no other device
	// could vouch for or against. The oldest first.
	Doubts []Doubt `json:"doubts"`
	Engine string  `json:"engine,omitempty"` // that it runs jobs with
	Agent  string  `json:"agent,omitempty"`  // version, when it last ended a job
	// Since is when it was first seen with these, and Reset why it began anew then; empty
	// if it did not.
	Since     time.Time `json:"since,omitzero"`
	Reset     string    `json:"reset,omitempty"`
	Why       []string  `json:"why"`       // sentences: what follows, and from what
	Penalties []Penalty `json:"penalties"` // of the figure compute, the newest first; "deimos audit show" and "evidence" tell of each
}

// Honesty tells how far the results of a device's jobs are believed, and why.
func (c *Client) Honesty(ctx context.Context, device wire.DeviceID) (Honesty, error) {
	return ask[Honesty](ctx, c, http.MethodGet, "devices/"+segment(string(device))+"/honesty", nil, nil)
}

// Doubt is one of [Honesty].
type Doubt struct {
	At     time.Time `json:"at"`
	Module string    `json:"module"` // SHA-256
}

// Penalty is one change that has lowered a score.
type Penalty struct {
	At     time.Time `json:"at"`
	Figure Figure    `json:"figure"`
	Cause  string    `json:"cause"` // an outcome, or "confession"
	Amount float64   `json:"amount"`
	Before float64   `json:"before"`
	After  float64   `json:"after"`
	Audit  string    `json:"audit"` // the challenge or confession that was the cause
}

// Evidence is all that is needed to judge a challenge again without the
// coordinator: "deimos audit check" does. What is signed stands in it as it came.
type Evidence struct {
	Format int           `json:"format"` // 1
	Audit  string        `json:"audit"`  // id; nothing follows from it
	At     time.Time     `json:"at"`     // when it was judged; nothing follows from it
	Kind   AuditKind     `json:"kind"`
	Device wire.DeviceID `json:"device"`
	// DeviceKey is the raw Ed25519 key of which Device is the hash, OrderKey the
	// one that the coordinator signs orders with.
	DeviceKey []byte          `json:"device_key"`
	OrderKey  []byte          `json:"order_key"`
	Order     json.RawMessage `json:"order"`  // DSSE envelope: what was asked
	Report    json.RawMessage `json:"report"` // DSSE envelope: what was answered
	// Attachment is what the report signs for: of a storage challenge the leaves.
	// Missing: it was signed for and never sent, which only the coordinator can say.
	Attachment []byte `json:"attachment,omitempty"`
	Missing    bool   `json:"missing,omitempty"`
	// Sizes are those of the chunks asked about. For each that is said to be wrong
	// or lost, Receipts has the device's signed report of having stored it.
	Sizes    map[string]int64           `json:"sizes,omitempty"`
	Receipts map[string]json.RawMessage `json:"receipts,omitempty"`
	// What is claimed.
	Outcome AuditOutcome `json:"outcome"`
	Lost    []string     `json:"lost,omitempty"`
	Wrong   []string     `json:"wrong,omitempty"`
	// Of a compute challenge; see [Audit].
	Commitment string `json:"commitment,omitempty"`
	Salt       string `json:"salt,omitempty"`
	Expected   string `json:"expected,omitempty"`
}

// Audit challenges a device and waits for the outcome.
func (c *Client) Audit(ctx context.Context, r AuditRequest) (Audit, error) {
	return ask[Audit](ctx, c, http.MethodPost, "audits", nil, r)
}

// Audits lists challenges, the newest first.
func (c *Client) Audits(ctx context.Context, q AuditQuery) (AuditList, error) {
	v := url.Values{}
	for k, s := range map[string]string{"device": string(q.Device), "outcome": string(q.Outcome), "before": q.Before} {
		if s != "" {
			v.Set(k, s)
		}
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return ask[AuditList](ctx, c, http.MethodGet, "audits", v, nil)
}

// AuditByID shows one challenge.
func (c *Client) AuditByID(ctx context.Context, id string) (Audit, error) {
	return ask[Audit](ctx, c, http.MethodGet, "audits/"+segment(id), nil, nil)
}

// Evidence fetches the evidence of a challenge, as JSON.
func (c *Client) Evidence(ctx context.Context, id string) ([]byte, error) {
	return c.call(ctx, http.MethodGet, "audits/"+segment(id)+"/evidence", nil, nil)
}
