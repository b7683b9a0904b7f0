package coordinator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/wire"
)

// trail is the audit log: who changed what, when, and how it ended.
//
// # Format
//
// An entry is one [api.LogEntry] in JSON, one message of the JetStream stream
// LOG_audit, whose sequence number it repeats. Prev is the SHA-256 of the bytes
// of the message before. Entries are appended with the number of the one before
// as a condition that the server checks, so that coordinators of one NATS server
// write one chain and cannot fork it; who loses reads the new end and tries again.
//
// # What it protects from
//
// The server removes and replaces no message of that stream, whoever asks. Who
// has the server's files can; the chain then breaks at that place, unless
// everything after it is written anew. Against that, the number and hash of the
// newest entry are noted elsewhere ("deimos log --verify" prints and checks them).
//
// # Nothing without an entry
//
// A change that an operator asks for is on record before it is made, and how it
// ended afterwards. If the first cannot be written, the change is refused. A
// power cut can take the entries of the last second, and the changes with them:
// both are in the same store.
//
// What no one asks for in vain has no entry: refused logins, reads, uploads of
// content that nothing refers to yet.
type trail struct {
	js     jetstream.JetStream
	stream jetstream.Stream
	now    func() time.Time

	turn  chan struct{} // held by who appends
	last  uint64        // what follows is guarded by turn
	head  [sha256.Size]byte
	known bool // last and head are the stream's, unless a peer has appended
}

const (
	trailName     = "audit"
	trailLimit    = 5 * time.Second // for an entry, waiting for one's turn included
	trailReaders  = 16              // messages that one page asks for at once
	maxLogged     = 4 << 10         // bytes of a request in an entry
	maxLoggedText = 512             // bytes of one string in it
	maxTargets    = 100
)

func openTrail(ctx context.Context, e *engine.Engine, now func() time.Time) (*trail, error) {
	s, err := e.Log(ctx, trailName)
	if err != nil {
		return nil, err
	}
	return &trail{js: e.JetStream(), stream: s, now: now, turn: make(chan struct{}, 1)}, nil
}

// append writes an entry, whose number, time and predecessor it fills in, and
// returns the number.
func (t *trail) append(ctx context.Context, e api.LogEntry) (uint64, error) {
	// An entry that was begun is not given up because who asked has left:
	// whether it stands would be unknown.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), trailLimit)
	defer cancel()
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return 0, fmt.Errorf("the audit log cannot be written: %w", ctx.Err())
	}
	for {
		if err := t.locate(ctx); err != nil {
			return 0, fmt.Errorf("the end of the audit log cannot be read: %w", engine.StoreError(err))
		}
		e.Seq, e.At, e.Prev = t.last+1, t.now().UTC(), api.FirstPrev
		if t.last > 0 {
			e.Prev = hex.EncodeToString(t.head[:])
		}
		raw, err := json.Marshal(e)
		if err != nil {
			return 0, err
		}
		t.known = false // until the server has said so
		ack, err := t.js.Publish(ctx, engine.LogSubject(trailName), raw, jetstream.WithExpectLastSequence(t.last))
		switch {
		case isConflict(err):
			continue // a peer was first, or an answer was lost
		case err != nil:
			return 0, fmt.Errorf("the audit log cannot be written: %w", engine.StoreError(err))
		case ack.Sequence != e.Seq:
			return 0, fmt.Errorf("the audit log is not what it was: entry %d became %d", e.Seq, ack.Sequence)
		}
		t.last, t.head, t.known = e.Seq, sha256.Sum256(raw), true
		return e.Seq, nil
	}
}

// locate finds the end of the log.
func (t *trail) locate(ctx context.Context) error {
	if t.known {
		return nil
	}
	info, err := t.stream.Info(ctx)
	if err != nil {
		return err
	}
	t.last, t.known = info.State.LastSeq, true
	if t.last == 0 {
		return nil
	}
	m, err := t.stream.GetMsg(ctx, t.last)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		// Damaged on disk. The log goes on, and shows the gap for ever.
		t.head = sha256.Sum256(nil)
	case err != nil:
		t.known = false
		return err
	default:
		t.head = sha256.Sum256(m.Data)
	}
	return nil
}

// page reads up to limit entries after number after.
func (t *trail) page(ctx context.Context, after uint64, limit int) (api.LogPage, error) {
	info, err := t.stream.Info(ctx)
	if err != nil {
		return api.LogPage{}, fmt.Errorf("the audit log cannot be read: %w", engine.StoreError(err))
	}
	p := api.LogPage{After: min(after, info.State.LastSeq), Last: info.State.LastSeq}
	p.Entries = make([][]byte, min(uint64(limit), p.Last-p.After))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(trailReaders)
	for i := range p.Entries {
		g.Go(func() error {
			raw, _, err := t.get(ctx, p.After+1+uint64(i))
			p.Entries[i] = raw
			return err
		})
	}
	return p, g.Wait()
}

// get reads the bytes of an entry and when it was stored; none if it is lost.
func (t *trail) get(ctx context.Context, seq uint64) ([]byte, time.Time, error) {
	m, err := t.stream.GetMsg(ctx, seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return []byte{}, time.Time{}, nil
	}
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("entry %d of the audit log cannot be read: %w", seq, engine.StoreError(err))
	}
	return m.Data, m.Time, nil
}

// before is the number of the last entry that was stored before at. Entries lie
// in the order of the server's clock.
func (t *trail) before(ctx context.Context, at time.Time) (uint64, error) {
	info, err := t.stream.Info(ctx)
	if err != nil {
		return 0, fmt.Errorf("the audit log cannot be read: %w", engine.StoreError(err))
	}
	low, high := uint64(0), info.State.LastSeq // low is before at; what is above high is not
	for low < high {
		mid := low + (high-low+1)/2
		_, stored, err := t.get(ctx, mid)
		if err != nil {
			return 0, err
		}
		if stored.Before(at) { // a lost entry counts as old: rather one too few
			low = mid
		} else {
			high = mid - 1
		}
	}
	return low, nil
}

// record puts on the audit log what happened without an operator's asking: e has
// Actor ("device:ID" or "coordinator") and Action, and may have Targets, Address,
// Request and Reason. An error says that the entry is not there: what must not
// happen without one is then not done.
func (c *Coordinator) record(ctx context.Context, e api.LogEntry) error {
	if e.Outcome == "" {
		e.Outcome = api.LogNoted
	}
	if len(e.Targets) > maxTargets {
		e.Targets = append(slices.Clone(e.Targets[:maxTargets]), "…")
	}
	e.Reason = cutText(e.Reason, maxLoggedText)
	_, err := c.trail.append(ctx, e)
	return err
}

// note is record for what has happened already: a failure is logged.
func (c *Coordinator) note(ctx context.Context, e api.LogEntry) {
	if err := c.record(ctx, e); err != nil {
		c.log.Warn("an event is not on the audit log", "action", e.Action, "actor", e.Actor, "targets", e.Targets, "error", err)
	}
}

// changes tells whether a route is on the audit log.
func (rt route) changes() bool {
	return rt.needs != byAnybody && rt.needs != byDevice && !rt.unlogged && rt.method != http.MethodGet && rt.method != http.MethodHead
}

// logged puts what a handler is asked for on the log before it is done, and what
// became of it afterwards.
func (c *Coordinator) logged(rt route) handler {
	action, json := rt.verb(), hasJSON(rt.in)
	names := rt.pathNames()
	return func(w http.ResponseWriter, r *http.Request) error {
		e := api.LogEntry{Actor: "operator:" + operatorOf(r).Name, Address: host(r), Action: action}
		for _, n := range names {
			if v := cutText(r.PathValue(n), maxLoggedText); !secretKey(n) {
				e.Targets = append(e.Targets, v)
			}
		}
		switch {
		case json:
			body, err := io.ReadAll(io.LimitReader(r.Body, maxObject+1))
			if err != nil {
				return refuse(http.StatusBadRequest, "cut_off", "the request was cut off: %v", err)
			}
			r.Body = readCloser{io.MultiReader(bytes.NewReader(body), r.Body), r.Body}
			var named []string
			e.Request, named = summary(body)
			e.Targets = append(e.Targets, named...)
		case r.ContentLength > 0:
			e.Request = fmt.Appendf(nil, `{"bytes":%d}`, r.ContentLength)
		}
		e.Outcome = api.LogAsked
		seq, err := c.trail.append(r.Context(), e)
		if err != nil {
			c.log.Error("a change was refused because the audit log cannot be written", "action", action, "actor", e.Actor, "error", err)
			return refuse(http.StatusServiceUnavailable, "log_unavailable", "this was not done, because it cannot be put on the audit log: %v", err)
		}
		found := &concerned{targets: e.Targets}
		done := rt.handle(w, r.WithContext(context.WithValue(r.Context(), concernedKey{}, found)))
		e.Of, e.Request, e.Targets = seq, nil, found.targets
		e.Outcome, e.Code, e.Reason = c.outcome(done)
		if _, err := c.trail.append(r.Context(), e); err != nil {
			c.log.Error("how a change ended is not on the audit log", "entry", seq, "outcome", e.Outcome, "error", err)
		}
		return done
	}
}

// concerned is what a change turns out to be about while it is made.
type concerned struct {
	mu      sync.Mutex
	targets []string
}

type concernedKey struct{}

const maxConcerned = 50 // targets of one kind that an entry names

// about adds targets to the entry on how the change under way has ended: who is
// meant by a code, a group or a label is not in the request.
func about[S ~string](ctx context.Context, targets ...S) {
	c, ok := ctx.Value(concernedKey{}).(*concerned)
	if !ok {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range targets[:min(len(targets), maxConcerned)] {
		if !slices.Contains(c.targets, string(t)) {
			c.targets = append(c.targets, string(t))
		}
	}
	if more := len(targets) - maxConcerned; more > 0 {
		c.targets = append(c.targets, fmt.Sprintf("… and %d more", more))
	}
}

// outcome tells how a handler ended.
func (c *Coordinator) outcome(err error) (o api.LogOutcome, code, reason string) {
	if err == nil {
		return api.LogDone, "", ""
	}
	r := explain(err, c.life.Err() != nil)
	switch {
	case r == nil:
		return api.LogFailed, "gone", "the operator left before it was done"
	case r.status < 500:
		o = api.LogRefused
	default:
		o = api.LogFailed
	}
	return o, r.Code, cutText(r.Reason, maxLoggedText)
}

type readCloser struct {
	io.Reader
	io.Closer
}

// hasJSON tells a JSON body from none and from a plain one.
func hasJSON(body any) bool {
	_, plain := body.(bytes.Buffer)
	return body != nil && !plain
}

var pathName = regexp.MustCompile(`\{([^}.]+)(\.\.\.)?\}`)

// pathNames are the names of the variable parts of a route's path.
func (rt route) pathNames() []string {
	var out []string
	for _, m := range pathName.FindAllStringSubmatch(rt.path, -1) {
		out = append(out, m[1])
	}
	return out
}

// verb is what the log calls a change: the kind of thing, and the last word of
// the path or else what the method does to it, as in "device.retire" and
// "token.create".
func (rt route) verb() string {
	var words []string
	for _, p := range strings.Split(strings.TrimPrefix(rt.path, v1+"/"), "/") {
		if !strings.HasPrefix(p, "{") {
			words = append(words, p)
		}
	}
	what := strings.TrimSuffix(words[0], "s")
	method := map[string]string{http.MethodPost: "create", http.MethodPut: "put", http.MethodPatch: "change", http.MethodDelete: "remove"}[rt.method]
	switch {
	case len(words) == 1:
		return what + "." + method
	case rt.method == http.MethodPost:
		return what + "." + strings.Join(words[1:], "-")
	}
	return what + "." + method + "-" + strings.Join(words[1:], "-")
}

// summary is what an entry keeps of a request, and the devices that it names.
func summary(body []byte) (json.RawMessage, []string) {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	var v any
	if len(body) == 0 {
		return nil, nil
	}
	if d.Decode(&v) != nil {
		return fmt.Appendf(nil, `"%d bytes that are no JSON"`, len(body)), nil
	}
	raw, err := json.Marshal(withoutSecrets(v))
	if err == nil && len(raw) > maxLogged {
		raw, err = json.Marshal(cutText(string(raw), maxLogged-2*utf8.UTFMax))
		if len(raw) > 2*maxLogged { // quotes, escaped
			raw = fmt.Appendf(nil, `"%d bytes"`, len(body))
		}
	}
	if err != nil {
		return nil, nil
	}
	return raw, namedIn(v)
}

// namedIn is what a request names: a thing that it makes, devices.
func namedIn(v any) []string {
	m, _ := v.(map[string]any)
	var out []string
	if s, _ := m["name"].(string); s != "" {
		out = append(out, cutText(s, maxLoggedText))
	}
	list, _ := m["devices"].([]any)
	for _, x := range append(list, m["device"]) {
		s, _ := x.(string)
		if _, err := wire.ParseDeviceID(s); err == nil && len(out) < maxTargets {
			out = append(out, s)
		}
	}
	return out
}

const notLogged = "(not logged)"

// secretWords are in the names of fields whose values the log must not have.
var secretWords = []string{"token", "secret", "password", "passphrase", "psk", "private", "credential"}

func secretKey(name string) bool {
	name = strings.ToLower(name)
	return name == "code" || slices.ContainsFunc(secretWords, func(w string) bool { return strings.Contains(name, w) })
}

// tokenText finds fleet tokens and operators' tokens wherever they stand.
var tokenText = regexp.MustCompile(`deimos_[a-z2-7]{20,}(_[a-z2-7]*)?|` + operatorPrefix + `[A-Za-z0-9_-]{20,}`)

func withoutSecrets(v any) any {
	switch v := v.(type) {
	case map[string]any:
		// {"key": "wifi.password", "value": …} is a field too.
		key, _ := v["key"].(string)
		out := make(map[string]any, len(v))
		for k, x := range v {
			switch {
			case secretKey(k), k == "value" && secretKey(key):
				x = notLogged
			default:
				x = withoutSecrets(x)
			}
			out[cutText(tokenText.ReplaceAllString(k, notLogged), maxLoggedText)] = x
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, x := range v {
			out[i] = withoutSecrets(x)
		}
		return out
	case string:
		return cutText(tokenText.ReplaceAllString(v, notLogged), maxLoggedText)
	}
	return v
}

// cutText makes s valid text of at most most bytes and a mark.
func cutText(s string, most int) string {
	s = strings.ToValidUTF8(s, "\ufffd")
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most] + "…"
}

func (c *Coordinator) logRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/log", needs: toRead, summary: "Read the audit log", out: api.LogPage{},
			query: []param{
				{"after", "the number of the entry before the first wanted; default 0", 0},
				{"limit", fmt.Sprintf("how many entries; default and at most %d", api.MaxLogPage), 0},
				{"since", "pass over what was stored before this time (RFC 3339)", ""},
			}, handle: c.getLog},
	}
}

func (c *Coordinator) getLog(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	after, limit := uint64(0), api.MaxLogPage
	var err error
	if s := q.Get("after"); s != "" {
		if after, err = strconv.ParseUint(s, 10, 64); err != nil {
			return refuse(http.StatusBadRequest, "bad_after", "after must be the number of an entry, not %q", s)
		}
	}
	if s := q.Get("limit"); s != "" {
		if limit, err = strconv.Atoi(s); err != nil || limit < 1 || limit > api.MaxLogPage {
			return refuse(http.StatusBadRequest, "bad_limit", "limit must be a number from 1 to %d, not %q", api.MaxLogPage, s)
		}
	}
	if s := q.Get("since"); s != "" {
		at, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			return refuse(http.StatusBadRequest, "bad_since", "since must be a time as 2006-01-02T15:04:05Z, not %q", s)
		}
		n, err := c.trail.before(r.Context(), at)
		if err != nil {
			return err
		}
		after = max(after, n)
	}
	p, err := c.trail.page(r.Context(), after, limit)
	if err == nil {
		writeJSON(w, http.StatusOK, p)
	}
	return err
}
