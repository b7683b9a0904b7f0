// Package health keeps what is wrong with a device: one registry of warnings,
// which feeds the status command, the heartbeat and the light; and the rules
// that judge the machine by what hw reads of it.
//
// # A warning's life
//
// Somebody calls [Registry.Set] for as long as something is so and
// [Registry.Clear] when it no longer is. What a person sees is calmer:
//
//	Set ──After──▶ visible ──Clear──▶ lingers ──Hold──▶ gone
//	 └─Clear before After: forgotten      └─Set: visible as before, Since kept
//
// After and Hold are each kind's own, in kinds. A warning that was never
// visible does not linger: one that comes and goes faster than After is noise.
//
// # What is shown
//
// A broken network must not light twenty lamps. A kind may hide others, which
// follow from it: whole, if one of the two has no subject; else only where both
// are about the same thing. A volume or a mount point is about the disk that it
// lies on. What is hidden itself hides, too. A cause becomes visible no later
// than what it hides (a test keeps that), so the consequence does not flash up first.
//
// Of one kind at most maxShown subjects are shown, and one more warning, of the
// subject "others", that counts the rest: a shelf of a thousand dead disks is
// one finding.
//
// # Time
//
// Durations are measured by the monotonic clock: a clock that jumps shows and
// hides nothing. Since is told by the wall clock as it is when it is asked for,
// so it becomes right when the clock does. Neither survives a restart of the
// agent, but for events (see machine.go).
package health

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/deimos-edge/deimos/wire"
)

// Code names a kind of warning; see kinds.go.
type Code string

// Kind is what is known of a warning beforehand.
type Kind struct {
	Code     Code
	Severity wire.Severity // what it is as a rule; a single warning may be worse
	Title    string        // a few words
	Todo     string        // what a person does about it
	After    time.Duration // it must last so long before a person sees it
	Hold     time.Duration // it stays visible so long after its end, and is the same one if it returns
	Hides    []Code        // kinds that follow from this one and are not shown beside it
}

const (
	maxShown   = 4    // subjects of a kind that are shown one by one
	maxKept    = 2048 // subjects of a kind that are kept; what is beyond is dropped
	maxSubject = 128  // bytes
	maxDetail  = 300  // bytes
	others     = "others"
)

// Registry holds the warnings of a device. Safe for concurrent use. It needs no
// end: its timer runs only while something is about to change by itself.
type Registry struct {
	now   func() time.Time
	began time.Time

	mu      sync.Mutex // guards the rest
	all     map[key]*warning
	kept    map[Code]int
	on      map[string]string // subject → the disk that it lies on
	changed chan struct{}
	timer   *time.Timer
	due     time.Duration // when the timer fires; 0 if it does not
}

type key struct {
	code    Code
	subject string
}

// warning is one that is, or was until a moment ago. Times are since the
// registry began.
type warning struct {
	key
	kind     Kind
	severity wire.Severity
	detail   string
	since    time.Duration
	wall     time.Time     // since, by the wall clock
	earlier  time.Time     // since, if that was before this registry began; else zero
	ended    time.Duration // it lingers since then; 0 if it is still so
}

func (w *warning) shown(at time.Duration) bool {
	if w.ended != 0 {
		return at < w.ended+w.kind.Hold
	}
	return at >= w.since+w.kind.After
}

// next is when it will change by itself; 0 if it will not.
func (w *warning) next(at time.Duration) time.Duration {
	switch {
	case w.ended != 0:
		return w.ended + w.kind.Hold
	case at < w.since+w.kind.After:
		return w.since + w.kind.After
	}
	return 0
}

// New makes a registry that knows the kinds of this package. now is the wall
// clock, and used only to tell since when something is so.
func New(now func() time.Time) *Registry {
	return &Registry{
		now: now, began: time.Now(),
		all: map[key]*warning{}, kept: map[Code]int{}, on: map[string]string{},
		changed: make(chan struct{}),
	}
}

// elapsed is never 0, which stands for never.
func (r *Registry) elapsed() time.Duration { return max(time.Since(r.began), 1) }

// Set says that something is so. detail is a sentence for a person; a repeat
// keeps the time since when it is so. The code must be known.
func (r *Registry) Set(c Code, subject, detail string) { r.set(c, subject, detail, "") }

// set is Set with a severity other than the kind's, if it is not empty.
func (r *Registry) set(c Code, subject, detail string, s wire.Severity) {
	kind := kindOf(c)
	k := key{c, label(subject, maxSubject)}
	s = cmp.Or(s, kind.Severity)
	r.mu.Lock()
	defer r.mu.Unlock()
	at := r.elapsed()
	w := r.all[k]
	if w != nil && w.ended != 0 && !w.shown(at) { // its end has passed, the timer is late
		r.drop(w)
		w = nil
	}
	if w == nil {
		if r.kept[c] >= maxKept {
			return
		}
		w = &warning{key: k, kind: kind, severity: s, since: at, wall: r.now()}
		r.all[k] = w
		r.kept[c]++
		if w.shown(at) {
			r.notify()
		}
	}
	if w.severity != s && w.shown(at) {
		r.notify()
	}
	w.severity, w.detail, w.ended = s, label(detail, maxDetail), 0
	r.arm(w.next(at), at)
}

// setEarlier is Set for what is so since a time before this registry began.
func (r *Registry) setEarlier(c Code, subject, detail string, since time.Time) {
	r.Set(c, subject, detail)
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.all[key{c, label(subject, maxSubject)}]; w != nil {
		w.earlier = since
	}
}

// Clear says that it is no longer so.
func (r *Registry) Clear(c Code, subject string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.all[key{c, label(subject, maxSubject)}]; w != nil {
		r.end(w)
	}
}

func (r *Registry) end(w *warning) {
	at := r.elapsed()
	switch {
	case w.ended != 0:
	case !w.shown(at):
		r.drop(w)
	case w.kind.Hold == 0:
		r.drop(w)
		r.notify()
	default:
		w.ended = at
		r.arm(w.next(at), at)
	}
}

// forget removes at once what a subject has, of one kind: what it was about does not exist any more.
func (r *Registry) forget(c Code, subject string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.all[key{c, label(subject, maxSubject)}]; w != nil {
		r.drop(w)
		r.notify()
	}
}

func (r *Registry) drop(w *warning) {
	delete(r.all, w.key)
	if r.kept[w.code]--; r.kept[w.code] == 0 {
		delete(r.kept, w.code)
	}
}

// Is is Set or Clear.
func (r *Registry) Is(c Code, subject string, so bool, detail string) {
	if so {
		r.Set(c, subject, detail)
	} else {
		r.Clear(c, subject)
	}
}

// Only clears all of a kind whose subject is not among subjects.
func (r *Registry) Only(c Code, subjects ...string) {
	still := make(map[string]bool, len(subjects))
	for _, s := range subjects {
		still[label(s, maxSubject)] = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.kept[c] == 0 {
		return
	}
	for _, w := range r.all {
		if w.code == c && !still[w.subject] {
			r.end(w)
		}
	}
}

// lie says which disk each subject lies on: volumes, mount points, kernel names.
func (r *Registry) lie(on map[string]string) {
	clean := make(map[string]string, len(on))
	for s, disk := range on {
		clean[label(s, maxSubject)] = label(disk, maxSubject)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.on = clean
}

// Visible is what a person should see, the worst first.
func (r *Registry) Visible() []wire.Warning {
	r.mu.Lock()
	defer r.mu.Unlock()
	shown := r.unhidden(r.elapsed())
	slices.SortFunc(shown, func(a, b *warning) int {
		return cmp.Or(
			cmp.Compare(rank[b.severity], rank[a.severity]),
			cmp.Compare(order[a.code], order[b.code]),
			cmp.Compare(a.since/time.Second, b.since/time.Second),
			cmp.Compare(a.subject, b.subject))
	})
	out := []wire.Warning{}
	count := map[Code]int{}
	rest := map[Code][]*warning{}
	for _, w := range shown {
		if count[w.code]++; count[w.code] > maxShown {
			rest[w.code] = append(rest[w.code], w)
			continue
		}
		out = append(out, r.tell(w))
	}
	for i := len(out) - 1; i >= 0; i-- { // behind the last of its kind
		if more := rest[Code(out[i].Code)]; len(more) > 0 {
			out = slices.Insert(out, i+1, r.summary(more))
			delete(rest, Code(out[i].Code))
		}
	}
	return out
}

// unhidden is what is visible and does not follow from something else that is.
func (r *Registry) unhidden(at time.Duration) []*warning {
	var all []*warning
	causes := map[Code]map[string]bool{}
	for _, w := range r.all {
		if !w.shown(at) {
			continue
		}
		all = append(all, w)
		if len(w.kind.Hides) > 0 {
			if causes[w.code] == nil {
				causes[w.code] = map[string]bool{}
			}
			causes[w.code][r.about(w.subject)] = true
		}
	}
	return slices.DeleteFunc(all, func(w *warning) bool {
		for cause, subjects := range causes {
			if slices.Contains(kindOf(cause).Hides, w.code) &&
				(w.subject == "" || subjects[""] || subjects[r.about(w.subject)]) {
				return true
			}
		}
		return false
	})
}

func (r *Registry) about(subject string) string {
	if disk, ok := r.on[subject]; ok {
		return disk
	}
	return subject
}

// driftAllowed is how far the wall clock may wander before a time that was told is told anew.
const driftAllowed = 5 * time.Second

func (r *Registry) tell(w *warning) wire.Warning {
	if since := r.now().Add(w.since - r.elapsed()); since.Sub(w.wall).Abs() > driftAllowed {
		w.wall = since
	}
	if !w.earlier.IsZero() {
		w.wall = w.earlier
	}
	return wire.Warning{
		Code: string(w.code), Subject: w.subject, Severity: w.severity,
		Title: w.kind.Title, Text: sentence(w.detail, w.kind.Todo), Since: w.wall.UTC().Truncate(time.Second),
	}
}

// summary is one warning for several of a kind.
func (r *Registry) summary(more []*warning) wire.Warning {
	var names []string
	oldest := more[0]
	for i, w := range more {
		if i < 3 {
			names = append(names, w.subject)
		}
		if w.since < oldest.since {
			oldest = w
		}
	}
	list := strings.Join(names, ", ")
	if len(more) > len(names) {
		list += " …"
	}
	out := r.tell(oldest)
	out.Subject, out.Severity = others, more[0].severity
	out.Text = sentence(fmt.Sprintf("And %d more: %s", len(more), list), oldest.kind.Todo)
	return out
}

// Changed is closed when what is visible may have changed; ask again for the
// next. It also is when something becomes visible, or ends, by time alone. It
// is not when only the words of a warning change.
func (r *Registry) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

func (r *Registry) notify() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// arm has the timer fire at next, if it does not fire before.
func (r *Registry) arm(next, at time.Duration) {
	switch {
	case next == 0, r.due != 0 && r.due <= next:
		return
	case r.timer == nil:
		r.timer = time.AfterFunc(next-at, r.pass)
	default:
		r.timer.Reset(next - at)
	}
	r.due = next
}

// pass is called when time alone has changed something.
func (r *Registry) pass() {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := r.elapsed()
	r.due = 0
	next := time.Duration(0)
	for _, w := range r.all {
		if w.ended != 0 && !w.shown(at) {
			r.drop(w)
			continue
		}
		if n := w.next(at); n != 0 && (next == 0 || n < next) {
			next = n
		}
	}
	r.arm(next, at)
	r.notify()
}

var rank = map[wire.Severity]int{wire.Info: 0, wire.Trouble: 1, wire.Critical: 2}

// sentence joins what happened and what to do.
func sentence(detail, todo string) string {
	if detail == "" {
		return todo
	}
	first, n := utf8.DecodeRuneInString(detail)
	detail = string(unicode.ToUpper(first)) + detail[n:]
	if !strings.ContainsRune(".!?…", lastRune(detail)) {
		detail += "."
	}
	return strings.TrimSpace(detail + " " + todo)
}

func lastRune(s string) rune {
	last, _ := utf8.DecodeLastRuneInString(s)
	return last
}

// label is a text that a device may have chosen, fit for a record, a log and a terminal.
func label(s string, limit int) string {
	if len(s) > 4*limit {
		s = s[:4*limit] // the rest is cut anyway
	}
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case r == utf8.RuneError, !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s))
	if len(s) <= limit {
		return s
	}
	end := limit - len("…")
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…"
}
