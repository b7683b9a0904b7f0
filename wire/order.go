package wire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Kind names what an order asks for.
type Kind string

// The kinds of this version. Bodies stand in bodies.go.
const (
	KindChunkStore    Kind = "chunk.store"
	KindChunkServe    Kind = "chunk.serve"
	KindChunkDrop     Kind = "chunk.drop"
	KindChunkLosses   Kind = "chunk.losses"
	KindChunkHoldings Kind = "chunk.holdings"
	KindAudit         Kind = "audit"
	KindJobRun        Kind = "job.run"
	KindUpdateInstall Kind = "update.install"
	KindOrderCancel   Kind = "order.cancel"
	KindConfigApply   Kind = "config.apply"
	KindPing          Kind = "device.ping"
	KindIdentify      Kind = "device.identify"
	KindInventory     Kind = "device.inventory"
	KindHistory       Kind = "device.history"
)

// Priority says which of two waiting orders goes first: the lower number. Both
// sides go by it. A kind that is not known here, of an extension, comes last.
// Nothing in it tells a compute challenge from any other job.
func (k Kind) Priority() int {
	switch k {
	case KindOrderCancel, KindConfigApply, KindPing, KindIdentify, KindInventory, KindHistory:
		return 0 // short, and people wait for them
	case KindUpdateInstall:
		return 1
	case KindAudit, KindChunkLosses, KindChunkHoldings:
		return 2
	case KindChunkServe:
		return 3
	case KindChunkStore, KindChunkDrop:
		return 4
	}
	return 5
}

// Order is one piece of work for one device.
type Order struct {
	ID      string          `json:"id"` // ULID, unique for ever
	Device  DeviceID        `json:"device"`
	Kind    Kind            `json:"kind"`
	Issued  time.Time       `json:"issued"`
	Expires time.Time       `json:"expires"` // not begun after this; its report is kept until then
	Body    json.RawMessage `json:"body"`
}

// State is where an order stands.
type State string

// The states of an order. The last five are terminal.
const (
	Queued    State = "QUEUED"
	Running   State = "RUNNING"
	Succeeded State = "SUCCEEDED"
	Failed    State = "FAILED"   // tried, did not work
	Rejected  State = "REJECTED" // not tried: not allowed, not understood, not possible here
	TimedOut  State = "TIMED_OUT"
	Canceled  State = "CANCELED"
)

// Terminal tells whether s is final.
func (s State) Terminal() bool {
	switch s {
	case Succeeded, Failed, Rejected, TimedOut, Canceled:
		return true
	}
	return false
}

// Confidence says how far a device trusts its own clock.
type Confidence string

// From worst to best.
const (
	ClockUnknown Confidence = "unknown" // nothing but the hardware clock
	ClockFloor   Confidence = "floor"   // not before the newest time it has proof of
	ClockTrusted Confidence = "trusted" // set from the coordinator's signed welcome of this boot
)

// Report is what a device says about an order. A device need not report QUEUED
// and RUNNING of an order that ends at once.
type Report struct {
	Order    string   `json:"order"`
	Device   DeviceID `json:"device"`
	Seq      uint64   `json:"seq"` // grows from report to report of an order, across restarts of the device
	State    State    `json:"state"`
	Progress float64  `json:"progress,omitempty"` // 0 to 1, while RUNNING
	Code     string   `json:"code,omitempty"`     // stable, for machines; FAILED and REJECTED have one; of QUEUED and RUNNING why it stands still
	Reason   string   `json:"reason,omitempty"`   // a sentence for a person
	// RetrySeconds is when the same may be asked for again, counted from At: the
	// device refused for a reason that ends by itself. 0: nobody knows.
	RetrySeconds   int64           `json:"retry_seconds,omitempty"`
	At             time.Time       `json:"at"`
	TimeConfidence Confidence      `json:"time_confidence"`
	Body           json.RawMessage `json:"body,omitempty"`
	Attachment     *Attachment     `json:"attachment,omitempty"`
	// Dropped says that body and attachment were given up because the device's
	// outbox was full. State, code and reason still stand.
	Dropped bool `json:"dropped,omitempty"`
}

// MaxInline is the largest attachment that travels inside its report, in
// bytes; base64 twice (JSON, then DSSE) makes 24 KiB into 43 KiB.
const MaxInline = 24 << 10

// Attachment is the bulk result of an order. Up to [MaxInline] bytes it stands
// in the report; beyond, the device puts it over HTTPS first and the signed
// report only names it. Either way the signature covers its digest.
type Attachment struct {
	SHA256 string `json:"sha256"` // lower-case hex
	Size   int64  `json:"size"`   // bytes
	Inline []byte `json:"inline,omitempty"`
}

// Ack tells a device that reports are safe with the coordinator.
type Ack struct {
	Device  DeviceID `json:"device"`
	Reports []Acked  `json:"reports"`
}

// Acked names one terminal report.
type Acked struct {
	Order string `json:"order"`
	Seq   uint64 `json:"seq"`
}

// Outcome is what a [Handler] has to say when an order is done.
type Outcome struct {
	Body       any    // becomes Report.Body
	Attachment []byte // becomes Report.Attachment
}

// Progress is what a handler says of an order that is under way.
type Progress struct {
	Done float64 // 0 to 1
	// Waits is why the order stands still for now, whether it has begun or not: its code,
	// its reason and when it is likely to go on. nil: it does not. Its state is not used.
	Waits *Problem
}

// Handler carries out one kind of order on the device. It returns an Outcome
// for SUCCEEDED, or an error: a [*Problem] says state, code and reason itself,
// any other error becomes FAILED with the code [CodeInternal]. A handler must
// be idempotent, because a crash can come between its effect and its report,
// and must return soon after ctx ends.
type Handler func(ctx context.Context, o Order, tell func(Progress)) (Outcome, error)

// Problem is the reason for an order that did not succeed.
type Problem struct {
	State  State
	Code   string // stable, lower_snake_case
	Reason string // what happened, why, what to do next
	// After is when it may be asked for again; 0: nobody knows.
	After time.Duration
}

func (p *Problem) Error() string { return p.Reason }

// Seconds is After in whole seconds, upwards.
func (p *Problem) Seconds() int64 { return int64((p.After + time.Second - 1) / time.Second) }

// Codes that more than one room uses. A room may have codes of its own.
const (
	CodeUnknownKind   = "unknown_kind"
	CodeBadBody       = "bad_body"
	CodeWrongDevice   = "wrong_device"
	CodeExpired       = "expired"
	CodeInternal      = "internal"
	CodeNotFound      = "not_found"
	CodeLost          = "lost"           // it should be here, and is not or does not verify
	CodeUnreachable   = "unreachable"    // it may be on a volume that is away: no loss, and no proof
	CodeMismatch      = "mismatch"       // bytes do not have the promised digest or size
	CodeNoSpace       = "no_space"       // the disk's free-space floor is reached
	CodeReadOnly      = "read_only"      // the volume refuses writes after an error
	CodeTransfer      = "transfer"       // could not fetch or put over HTTPS
	CodeMetered       = "metered"        // the owner's volume of this month is used up
	CodeQuietHours    = "quiet_hours"    // bulk is for other hours, says the owner
	CodeBusy          = "busy"           // the disks are too slow for more at the moment
	CodePolicy        = "policy"         // the owner does not allow it
	CodeLimit         = "limit"          // a limit of the order was hit
	CodeInterrupted   = "interrupted"    // the agent stopped in the middle and cannot resume
	CodeNotSupported  = "not_supported"  // this device cannot do that at all
	CodeVerification  = "verification"   // update metadata or bundle did not verify
	CodeRolledBack    = "rolled_back"    // the new version did not become healthy
	CodeAlreadyLatest = "already_latest" // nothing to do: that version runs
	CodeCanceled      = "canceled"       // an operator took the order back
	CodeRetired       = "retired"        // the device was sent away while the order was open
	CodeSuperseded    = "superseded"     // a newer one of its kind is already in force
	CodeWindow        = "window"         // updates are for other hours, says the owner
	CodeConsent       = "consent"        // the owner has not said yes yet
	CodeDeferred      = "deferred"       // the owner has put it off

	// Of updates.

	CodeNoUpdateRoot  = "no_update_root" // the device has nothing to check a release against
	CodeDowngrade     = "downgrade"      // older than what runs
	CodeWrongHardware = "wrong_hardware" // for other boards or platforms
	CodeTooOld        = "too_old"        // needs a release in between
	CodeNotInRollout  = "not_in_rollout" // this device's turn has not come
	CodeUpdatePending = "update_pending" // another update is under way
	CodePreflight     = "preflight"      // the new agent does not start here, or is not what it should be
	CodeNewerFormat   = "newer_format"   // made for newer agents
	CodeSlowTransfer  = "slow_transfer"  // the source is too slow to ever finish
	CodeStaleMetadata = "stale_metadata" // signed too long ago, or the device's clock is wrong
	CodeNoWayBack     = "no_way_back"    // older, by a signed exception, but the boot loader always takes the newest
	CodeLogFork       = "log_fork"       // the log of releases contradicts what this device has seen of it
	CodeNotLogged     = "not_logged"     // signed, but not in the log of releases
)

// FailedBecause makes a FAILED problem; args as for fmt.Sprintf.
func FailedBecause(code, format string, args ...any) *Problem {
	return &Problem{State: Failed, Code: code, Reason: fmt.Sprintf(format, args...)}
}

// RejectedBecause makes a REJECTED problem; args as for fmt.Sprintf.
func RejectedBecause(code, format string, args ...any) *Problem {
	return &Problem{State: Rejected, Code: code, Reason: fmt.Sprintf(format, args...)}
}

// RejectedUntil is [RejectedBecause] of what may be asked for again after a while.
func RejectedUntil(after time.Duration, code, format string, args ...any) *Problem {
	p := RejectedBecause(code, format, args...)
	p.After = after
	return p
}

// ProblemOf finds the Problem in err, or makes err an internal failure.
func ProblemOf(err error) *Problem {
	var p *Problem
	if errors.As(err, &p) {
		return p
	}
	return FailedBecause(CodeInternal, "%v", err)
}

// DecodeBody reads an order's body, or says REJECTED with [CodeBadBody].
func DecodeBody[T any](o Order) (T, error) {
	var v T
	if err := json.Unmarshal(o.Body, &v); err != nil {
		return v, RejectedBecause(CodeBadBody, "the body of this %s order cannot be read: %v", o.Kind, err)
	}
	return v, nil
}

// CheckFor tells whether device may act on o at the time now: it must be the
// addressee, and the order must not have expired. The signature is checked
// before, by [Open].
func (o Order) CheckFor(device DeviceID, now time.Time) error {
	switch {
	case o.ID == "" || o.Kind == "" || o.Expires.IsZero():
		return RejectedBecause(CodeBadBody, "the order lacks an id, a kind or an expiry")
	case o.Device != device:
		return RejectedBecause(CodeWrongDevice, "the order is for device %s, this is %s", o.Device, device)
	case now.After(o.Expires):
		return RejectedBecause(CodeExpired, "the order expired at %s; ask for it again", o.Expires.UTC().Format(time.RFC3339))
	}
	return nil
}
