package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Role is what an operator may do.
type Role string

// The roles. Everybody may read.
const (
	Viewer         Role = "viewer"          // read
	Operating      Role = "operator"        // and devices, orders, data, configuration
	ReleaseManager Role = "release-manager" // and the update repository and offers
	Admin          Role = "admin"           // everything, operators and their tokens included
)

// Owner is the name of the admin whose token "deimos serve" writes.
const Owner = "owner"

// OperatorRequest asks for an operator's token. For a name whose token has
// expired or was revoked it makes a new one.
type OperatorRequest struct {
	Name         string `json:"name"` // a-z, 0-9, '-' and '_', at most 64
	Role         Role   `json:"role"`
	ValidSeconds int64  `json:"valid_seconds,omitempty"` // 0 means 90 days
}

// Operator is who may call the API.
type Operator struct {
	Name      string    `json:"name"`
	Role      Role      `json:"role"`
	Created   time.Time `json:"created"`
	CreatedBy string    `json:"created_by"`
	Expires   time.Time `json:"expires"`
	LastUsed  time.Time `json:"last_used,omitzero"` // to the day
	Revoked   time.Time `json:"revoked,omitzero"`
}

// OperatorToken is an operator with the token, which is shown this one time; the
// coordinator keeps a hash.
type OperatorToken struct {
	Operator
	Token string `json:"token"`
}

// CreateOperator makes an operator's token.
func (c *Client) CreateOperator(ctx context.Context, r OperatorRequest) (OperatorToken, error) {
	return ask[OperatorToken](ctx, c, http.MethodPost, "operators", nil, r)
}

// Operators lists those who have or had a token, by name; the owner is not among them.
func (c *Client) Operators(ctx context.Context) ([]Operator, error) {
	return ask[[]Operator](ctx, c, http.MethodGet, "operators", nil, nil)
}

// RevokeOperator ends an operator's token at once.
func (c *Client) RevokeOperator(ctx context.Context, name string) (Operator, error) {
	return ask[Operator](ctx, c, http.MethodPost, "operators/"+segment(name)+"/revoke", nil, nil)
}

// Context is the context file for another token of the same coordinator.
func (c *Client) Context(token string) Context {
	return Context{URL: c.base.String(), CA: c.ca, Token: token}
}

// LogOutcome says what an entry of the audit log tells of.
type LogOutcome string

// The outcomes. A change that an operator asks for has two entries, "asked" and
// one of the next three, whose [LogEntry.Of] is the number of the first. If the
// second is missing, the coordinator was cut off and the change may or may not
// have been made.
const (
	LogAsked   LogOutcome = "asked"
	LogDone    LogOutcome = "done"
	LogRefused LogOutcome = "refused" // nothing was changed
	LogFailed  LogOutcome = "failed"  // in part or not at all
	LogNoted   LogOutcome = "noted"   // it happened, nobody asked
)

// LogEntry is one entry of the audit log. The log is a chain: each entry has the
// SHA-256 of the bytes of the one before, as they are stored and handed out, so
// that none can be altered, left out or put between others without breaking it.
type LogEntry struct {
	Seq     uint64    `json:"seq"`  // from 1, without gaps
	Prev    string    `json:"prev"` // hex; of the first entry: 64 zeros
	At      time.Time `json:"at"`
	Actor   string    `json:"actor"`             // "operator:NAME", "device:ID" or "coordinator"
	Address string    `json:"address,omitempty"` // where the actor called from
	Action  string    `json:"action"`            // what of what, as in "device.retire"
	Targets []string  `json:"targets,omitempty"` // names and ids of what it was done to, as far as they were given by name
	// Request is what was asked for: the body, with secrets left out and cut to
	// 4 KiB; a string if it was larger.
	Request json.RawMessage `json:"request,omitempty"`
	Outcome LogOutcome      `json:"outcome"`
	Of      uint64          `json:"of,omitempty"`
	Code    string          `json:"code,omitempty"` // of a refusal or failure
	Reason  string          `json:"reason,omitempty"`
}

// LogPage is a part of the log.
type LogPage struct {
	After uint64 `json:"after"`
	// Entries are the exact bytes of the entries After+1, After+2, …; empty for
	// one that the coordinator has lost.
	Entries [][]byte `json:"entries"`
	Last    uint64   `json:"last"` // number of the newest entry there is
}

// MaxLogPage is the most entries that one page has.
const MaxLogPage = 1000

// LogPage reads up to limit entries after number after; limit 0 is as many as
// fit. If since is given, those before that time are passed over.
func (c *Client) LogPage(ctx context.Context, after uint64, since time.Time, limit int) (LogPage, error) {
	q := url.Values{"after": {strconv.FormatUint(after, 10)}}
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	if !since.IsZero() {
		q.Set("since", since.UTC().Format(time.RFC3339Nano))
	}
	return ask[LogPage](ctx, c, http.MethodGet, "log", q, nil)
}

// LogFilter says which entries are meant: those that fit all that is given.
type LogFilter struct {
	Since  time.Time
	Actor  string // whole, or without "operator:"
	Action string // whole, or the part before the dot
	Device wire.DeviceID
}

// Matches tells whether an entry is meant.
func (f LogFilter) Matches(e LogEntry) bool {
	kind, _, _ := strings.Cut(e.Action, ".")
	return (f.Since.IsZero() || !e.At.Before(f.Since)) &&
		(f.Actor == "" || e.Actor == f.Actor || e.Actor == "operator:"+f.Actor) &&
		(f.Action == "" || e.Action == f.Action || kind == f.Action) &&
		(f.Device == "" || e.Actor == "device:"+string(f.Device) || slices.Contains(e.Targets, string(f.Device)))
}

// Log calls each with the entries after number after that are meant, oldest
// first. It returns the number of the last entry that it looked at.
func (c *Client) Log(ctx context.Context, after uint64, f LogFilter, each func(LogEntry) error) (uint64, error) {
	for since := f.Since; ; since = (time.Time{}) {
		p, err := c.LogPage(ctx, after, since, 0)
		if err != nil {
			return after, err
		}
		after = p.After
		for _, raw := range p.Entries {
			after++
			var e LogEntry
			if err := json.Unmarshal(raw, &e); err != nil {
				return after, fmt.Errorf("entry %d of the log is missing or damaged; \"deimos log --verify\" checks all of it", after)
			}
			if !f.Matches(e) {
				continue
			}
			if err := each(e); err != nil {
				return after, err
			}
		}
		if after >= p.Last || len(p.Entries) == 0 {
			return after, nil
		}
	}
}

// LogHead names an entry by number and content: with it, everything up to there.
type LogHead struct {
	Seq    uint64 `json:"seq"`
	SHA256 string `json:"sha256"` // of the entry's bytes, hex
}

func (h LogHead) String() string { return fmt.Sprintf("%d:%s", h.Seq, h.SHA256) }

// ParseLogHead reads what [LogHead.String] writes.
func ParseLogHead(s string) (LogHead, error) {
	n, sum, _ := strings.Cut(s, ":")
	seq, err := strconv.ParseUint(n, 10, 64)
	raw, herr := hex.DecodeString(sum)
	if err != nil || herr != nil || seq == 0 || len(raw) != sha256.Size {
		return LogHead{}, fmt.Errorf("%q is no head of a log, it looks like 1234:<64 hex digits>; \"deimos log --verify\" prints it", s)
	}
	return LogHead{seq, strings.ToLower(sum)}, nil
}

// BrokenLog is the first entry at which a log is not what was written.
type BrokenLog struct {
	Seq    uint64
	Reason string
}

func (b *BrokenLog) Error() string {
	return fmt.Sprintf("the audit log is broken at entry %d: %s", b.Seq, b.Reason)
}

// LogChain checks a log, entry by entry from the first. Its zero value has seen
// none.
type LogChain struct {
	Head  LogHead // of what was checked so far
	Noted LogHead // what somebody has noted of this log before; may be empty
}

// FirstPrev is [LogEntry.Prev] of the first entry.
const FirstPrev = "0000000000000000000000000000000000000000000000000000000000000000"

// Take checks the next entry. Its error is a [*BrokenLog]. If the hash of the
// entry before does not fit, it is that entry, the one that was vouched for, that
// is named: who writes on can put anything there, who alters must alter both.
func (c *LogChain) Take(raw []byte) error {
	seq := c.Head.Seq + 1
	if len(raw) == 0 {
		return &BrokenLog{seq, "it is missing"}
	}
	var e LogEntry
	d := json.NewDecoder(bytes.NewReader(raw))
	if err := d.Decode(&e); err != nil {
		return &BrokenLog{seq, "it cannot be read"}
	}
	prev := c.Head.SHA256
	if seq == 1 {
		prev = FirstPrev
	}
	switch {
	case e.Seq != seq:
		return &BrokenLog{seq, fmt.Sprintf("entry %d stands in its place", e.Seq)}
	case e.Prev != prev && seq == 1:
		return &BrokenLog{seq, "it is not the first: others were removed before it"}
	case e.Prev != prev:
		return &BrokenLog{seq - 1, fmt.Sprintf("it is not the entry that entry %d was written after", seq)}
	}
	sum := sha256.Sum256(raw)
	c.Head = LogHead{seq, hex.EncodeToString(sum[:])}
	if c.Noted.Seq == seq && c.Noted != c.Head {
		return &BrokenLog{seq, "it is not the entry that was noted; it or one before it was altered"}
	}
	return nil
}

// End checks what can only be known at the end of the log.
func (c *LogChain) End() error {
	if c.Noted.Seq > c.Head.Seq {
		return &BrokenLog{c.Head.Seq + 1, fmt.Sprintf("it and all up to the noted entry %d are missing", c.Noted.Seq)}
	}
	return nil
}

// VerifyLog fetches the whole log and checks its chain. It returns the head up
// to which it is good; its error is a [*BrokenLog] if there is more than that.
func (c *Client) VerifyLog(ctx context.Context, noted LogHead) (LogHead, error) {
	chain := LogChain{Noted: noted}
	for last := uint64(1); chain.Head.Seq < last; {
		p, err := c.LogPage(ctx, chain.Head.Seq, time.Time{}, 0)
		if err != nil {
			return chain.Head, err
		}
		if p.After != chain.Head.Seq || len(p.Entries) == 0 && p.Last > chain.Head.Seq {
			return chain.Head, &BrokenLog{chain.Head.Seq + 1, "the coordinator does not hand it out"}
		}
		for _, raw := range p.Entries {
			if err := chain.Take(raw); err != nil {
				return chain.Head, err
			}
		}
		last = p.Last
	}
	return chain.Head, chain.End()
}
