package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

const kindTest wire.Kind = "test"

// rig is a dispatcher with a real journal, and what leaves it.
type rig struct {
	*dispatcher
	t       testing.TB
	owner   *authority
	dir     string
	disk    *badgerJournal
	reports chan wire.Report
	restart chan struct{}
	logged  *lockedBuffer
	end     context.CancelFunc
	ctx     context.Context

	mu  sync.Mutex
	raw map[string][][]byte // what was published, by order
	// onPublish is called with each report; d.mu is held.
	onPublish func(wire.Report)
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newRig starts a life of a device. change may adapt what the dispatcher gets.
func newRig(t testing.TB, handle wire.Handler, change ...func(*duties)) *rig {
	t.Helper()
	return startRig(t, newAuthority(t), newIdentity(t), filepath.Join(t.TempDir(), "journal"), handle, change...)
}

func startRig(t testing.TB, owner *authority, id Identity, dir string, handle wire.Handler, change ...func(*duties)) *rig {
	t.Helper()
	j, err := openJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	epoch, err := j.nextEpoch()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, owner: owner, dir: dir, disk: j, reports: make(chan wire.Report, 8192), restart: make(chan struct{}, 1), logged: &lockedBuffer{}, raw: map[string][][]byte{}}
	r.ctx, r.end = context.WithCancel(context.Background())
	clock := NewClock(time.Time{})
	clock.Trust(time.Now(), 0)
	u := duties{
		id: id, clock: clock, journal: j, epoch: epoch,
		trusted: func() ed25519.PublicKey { return owner.order.Public().(ed25519.PublicKey) },
		routes:  map[wire.Kind]Route{kindTest: {Handle: handle, AtOnce: 2, Limit: time.Hour}},
		publish: r.published,
		attach:  func(context.Context, string, []byte) error { t.Error("nothing was to be attached"); return nil },
		restart: func() { r.restart <- struct{}{} },
		log:     slog.New(slog.NewTextHandler(r.logged, nil)),
	}
	for _, f := range change {
		f(&u)
	}
	if r.dispatcher, err = newDispatcher(u); err != nil {
		t.Fatal(err)
	}
	r.quiet = 0        // every report at once: most tests follow an order by them
	r.patience = limit // a handler that is slow to hear of its end is not deaf
	t.Cleanup(r.stop)
	return r
}

// stop ends this life; it may be called twice.
func (r *rig) stop() {
	r.end()
	r.wait()
	if !r.disk.db.IsClosed() {
		if err := r.disk.close(); err != nil {
			r.t.Error(err)
		}
	}
}

// reborn is the next life of the same device.
func (r *rig) reborn(handle wire.Handler, change ...func(*duties)) *rig {
	r.t.Helper()
	r.stop()
	return startRig(r.t, r.owner, r.id, r.dir, handle, change...)
}

func (r *rig) published(raw []byte) {
	rep, err := wire.OpenAs[wire.Report](raw, r.id.public(), wire.TypeReport)
	if err != nil {
		r.t.Errorf("what was published is no report of this device: %v", err)
		return
	}
	if rep.Device != r.id.ID {
		r.t.Errorf("a report is of device %q", rep.Device)
	}
	r.mu.Lock()
	r.raw[rep.Order] = append(r.raw[rep.Order], raw)
	r.mu.Unlock()
	if r.onPublish != nil {
		r.onPublish(rep)
	}
	r.reports <- rep
}

func (r *rig) sent(order string) [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([][]byte(nil), r.raw[order]...)
}

func (r *rig) order(id string) wire.Order {
	now := time.Now()
	return wire.Order{ID: id, Device: r.id.ID, Kind: kindTest, Issued: now, Expires: now.Add(time.Hour), Body: json.RawMessage(`{}`)}
}

func (r *rig) give(o wire.Order) {
	r.t.Helper()
	if err := r.receive(r.ctx, r.owner.seal(wire.TypeOrder, o)); err != nil {
		r.t.Fatalf("order %s: %v", o.ID, err)
	}
}

// ends awaits the terminal report of an order; others are passed over.
func (r *rig) ends(order string) wire.Report {
	r.t.Helper()
	return r.reaches(order, wire.State.Terminal)
}

func (r *rig) reaches(order string, want func(wire.State) bool) wire.Report {
	r.t.Helper()
	for {
		rep := await(r.t, "a report on "+order, r.reports)
		if rep.Order == order && want(rep.State) {
			return rep
		}
	}
}

func running(s wire.State) bool { return s == wire.Running }

// silent fails if anything was published since the last look.
func (r *rig) silent(why string) {
	r.t.Helper()
	select {
	case rep := <-r.reports:
		r.t.Errorf("%s, but %s was reported on order %q", why, rep.State, rep.Order)
	default:
	}
}

func (r *rig) ack(order string, seq uint64) []byte {
	return r.owner.seal(wire.TypeAck, wire.Ack{Device: r.id.ID, Reports: []wire.Acked{{Order: order, Seq: seq}}})
}

func (r *rig) owes(order string) bool {
	r.dispatcher.mu.Lock()
	defer r.dispatcher.mu.Unlock()
	return r.owed.has(order)
}

// counter is a handler that succeeds and tells how often it was called.
type counter struct {
	mu sync.Mutex
	n  int
}

func (c *counter) handle(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	return wire.Outcome{Body: map[string]int{"call": c.n}}, nil
}

func (c *counter) calls() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func TestOrderRunsToItsReport(t *testing.T) {
	r := newRig(t, func(_ context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		for _, p := range []float64{-1, math.NaN(), 0.5, 0.505, 0.2, 7} {
			tell(wire.Progress{Done: p})
		}
		return wire.Outcome{Body: map[string]string{"echo": o.ID}, Attachment: []byte("out")}, nil
	})
	r.give(r.order("a"))
	last := r.ends("a")
	var states []string
	var seq uint64
	for _, raw := range r.sent("a") {
		rep, err := wire.OpenAs[wire.Report](raw, r.id.public(), wire.TypeReport)
		if err != nil {
			t.Fatal(err)
		}
		if rep.Seq <= seq {
			t.Errorf("seq %d follows %d", rep.Seq, seq)
		}
		seq = rep.Seq
		states = append(states, fmt.Sprintf("%s %g", rep.State, rep.Progress))
	}
	if got, want := strings.Join(states, ", "), "QUEUED 0, RUNNING 0, RUNNING 0.5, RUNNING 1, SUCCEEDED 0"; got != want {
		t.Errorf("reports: %s; want %s", got, want)
	}
	if string(last.Body) != `{"echo":"a"}` || last.TimeConfidence != wire.ClockTrusted {
		t.Errorf("got %+v", last)
	}
	sum := sha256.Sum256([]byte("out"))
	if a := last.Attachment; a == nil || string(a.Inline) != "out" || a.Size != 3 || a.SHA256 != hex.EncodeToString(sum[:]) {
		t.Errorf("attachment: %+v", a)
	}
}

// forgeries are messages that must have no effect, each made from a good one.
func forgeries(r *rig) map[string][]byte {
	o := r.order("forged")
	good := r.owner.seal(wire.TypeOrder, o)
	var env map[string]any
	if err := json.Unmarshal(good, &env); err != nil {
		r.t.Fatal(err)
	}
	with := func(key string, v any) []byte {
		c := map[string]any{}
		for k, old := range env {
			c[k] = old
		}
		c[key] = v
		raw, err := json.Marshal(c)
		if err != nil {
			r.t.Fatal(err)
		}
		return raw
	}
	sealed := func(key ed25519.PrivateKey, typ wire.PayloadType, v any) []byte {
		raw, err := wire.Seal(key, typ, v)
		if err != nil {
			r.t.Fatal(err)
		}
		return raw
	}
	altered := o
	altered.Body = json.RawMessage(`{"evil":true}`)
	payload, err := json.Marshal(altered)
	if err != nil {
		r.t.Fatal(err)
	}
	plain, err := json.Marshal(o)
	if err != nil {
		r.t.Fatal(err)
	}
	foreign := o
	foreign.Device = newIdentity(r.t).ID
	return map[string][]byte{
		"nothing":                   {},
		"not signed":                plain,
		"no signatures":             with("signatures", []any{}),
		"signed by another":         sealed(newKey(r.t), wire.TypeOrder, o),
		"signed by the device":      sealed(r.id.key, wire.TypeOrder, o),
		"payload altered":           with("payload", base64.StdEncoding.EncodeToString(payload)),
		"type altered":              with("payloadType", string(wire.TypeAck)),
		"report posing as order":    r.owner.seal(wire.TypeReport, o),
		"type of nobody":            r.owner.seal("application/x", o),
		"order that is no object":   r.owner.seal(wire.TypeOrder, []int{1}),
		"for another device":        r.owner.seal(wire.TypeOrder, foreign),
		"cut":                       good[:len(good)/2],
		"larger than allowed":       append(bytes.Clone(good), bytes.Repeat([]byte(" "), wire.MaxMessage)...),
		"ack for another device":    r.owner.seal(wire.TypeAck, wire.Ack{Device: foreign.Device, Reports: []wire.Acked{{Order: "forged", Seq: 1}}}),
		"ack that is no ack":        r.owner.seal(wire.TypeAck, "ack"),
		"welcome, no business of d": r.owner.seal(wire.TypeWelcome, wire.Welcome{Device: r.id.ID}),
	}
}

func TestForgedOrderHasNoEffectAndNoReport(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	for what, raw := range forgeries(r) {
		t.Run(what, func(t *testing.T) {
			if err := r.receive(r.ctx, raw); err == nil {
				t.Error("no error, so nobody would know")
			}
			r.wait()
			r.silent("it was forged")
			if c.calls() != 0 {
				t.Error("it was carried out")
			}
		})
	}
	r.give(r.order("genuine"))
	if rep := r.ends("genuine"); rep.State != wire.Succeeded {
		t.Errorf("afterwards a genuine order is %s", rep.State)
	}
}

func TestExpiredOrderIsRejected(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	o := r.order("old")
	o.Expires = time.Now().Add(-time.Second)
	r.give(o)
	if rep := r.ends("old"); rep.State != wire.Rejected || rep.Code != wire.CodeExpired || rep.Reason == "" {
		t.Errorf("got %+v", rep)
	}
	r.wait()
	if c.calls() != 0 {
		t.Error("it was carried out")
	}
}

// TestUnsureClockRejectsNothing: a clock that is years ahead must not make a
// final answer of every order that comes before the welcome.
func TestUnsureClockRejectsNothing(t *testing.T) {
	var c counter
	var clock *Clock
	r := newRig(t, c.handle, func(u *duties) {
		clock = NewClock(time.Time{})
		clock.system = func() time.Time { return time.Now().AddDate(14, 0, 0) }
		u.clock = clock
	})
	o := r.order("a")
	if err := r.receive(r.ctx, r.owner.seal(wire.TypeOrder, o)); err == nil {
		t.Error("ignored without a word")
	}
	r.silent("the clock is not sure")
	clock.Trust(time.Now(), 0)
	r.give(o)
	if rep := r.ends("a"); rep.State != wire.Succeeded {
		t.Errorf("with the time set, the order is %s: %s", rep.State, rep.Reason)
	}
}

func TestOrderIsNotBegunAfterItsExpiry(t *testing.T) {
	var c counter
	for range 20 {
		var mu sync.Mutex
		at := time.Now()
		r := newRig(t, c.handle, func(u *duties) {
			u.clock = NewClock(time.Time{})
			u.clock.system = func() time.Time { mu.Lock(); defer mu.Unlock(); return at }
			u.clock.Trust(at, 0)
		})
		r.onPublish = func(wire.Report) { // QUEUED: from here on it is late
			mu.Lock()
			defer mu.Unlock()
			at = at.Add(2 * time.Hour)
		}
		r.give(r.order("a"))
		if rep := r.ends("a"); rep.State != wire.Rejected || rep.Code != wire.CodeExpired {
			t.Fatalf("got %+v", rep)
		}
		r.stop()
	}
	if c.calls() != 0 {
		t.Errorf("%d of 20 were begun", c.calls())
	}
}

func TestOrderThatExpiresInTheQueueIsRejected(t *testing.T) {
	gate, entered := make(chan struct{}), make(chan string, 4)
	r := newRig(t, func(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		entered <- o.ID
		<-gate
		return wire.Outcome{}, nil
	}, func(u *duties) { route := u.routes[kindTest]; route.AtOnce = 1; u.routes[kindTest] = route })
	r.give(r.order("long"))
	await(t, "the long order", entered)
	o := r.order("short")
	o.Expires = time.Now().Add(50 * time.Millisecond)
	r.give(o)
	if rep := r.ends("short"); rep.State != wire.Rejected || rep.Code != wire.CodeExpired {
		t.Errorf("got %+v", rep)
	}
	close(gate)
	r.ends("long")
}

func TestUnknownKindIsRejected(t *testing.T) {
	r := newRig(t, nil)
	o := r.order("a")
	o.Kind = "tea.make"
	r.give(o)
	if rep := r.ends("a"); rep.State != wire.Rejected || rep.Code != wire.CodeUnknownKind || !strings.Contains(rep.Reason, "tea.make") {
		t.Errorf("got %+v", rep)
	}
}

func TestIncompleteOrderIsRejected(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	o := r.order("a")
	o.Expires = time.Time{}
	r.give(o)
	if rep := r.ends("a"); rep.State != wire.Rejected || rep.Code != wire.CodeBadBody {
		t.Errorf("got %+v", rep)
	}
	r.wait()
	if c.calls() != 0 {
		t.Error("it was carried out")
	}
}

func TestRepeatIsAnsweredWithTheSameBytes(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	o := r.order("a")
	r.give(o)
	r.ends("a")
	first := r.sent("a")
	final := first[len(first)-1]
	same := func(r *rig, when string) {
		t.Helper()
		before := len(r.sent("a"))
		r.give(o)
		r.ends("a")
		r.wait()
		got := r.sent("a")[before:]
		if len(got) != 1 || !bytes.Equal(got[0], final) {
			t.Errorf("%s: the answer to a repeat is not the report of before", when)
		}
		if c.calls() != 1 {
			t.Errorf("%s: the order was carried out %d times", when, c.calls())
		}
	}
	same(r, "in the same life")
	if err := r.receive(r.ctx, r.ack("a", r.seqOf(final))); err != nil {
		t.Fatal(err)
	}
	same(r, "acknowledged")
	o.Expires = time.Now().Add(-time.Second) // the same order, long afterwards
	same(r, "expired")
	r = r.reborn(c.handle)
	same(r, "after a restart")
}

func (r *rig) seqOf(raw []byte) uint64 {
	r.t.Helper()
	rep, err := wire.OpenAs[wire.Report](raw, r.id.public(), wire.TypeReport)
	if err != nil {
		r.t.Fatal(err)
	}
	return rep.Seq
}

func TestRunningOrderIsNotRunTwice(t *testing.T) {
	var c counter
	gate := make(chan struct{})
	r := newRig(t, func(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		tell(wire.Progress{Done: 0.25})
		<-gate
		return c.handle(ctx, o, tell)
	})
	o := r.order("a")
	r.give(o)
	for r.reaches("a", running).Progress == 0 {
	}
	for range 3 {
		r.give(o)
		if rep := r.reaches("a", running); rep.Progress != 0.25 {
			t.Errorf("a repeat is answered with %+v", rep)
		}
	}
	close(gate)
	r.ends("a")
	r.wait()
	if c.calls() != 1 {
		t.Errorf("carried out %d times", c.calls())
	}
}

func TestReportIsDurableBeforeItIsSent(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	r.onPublish = func(rep wire.Report) {
		if !rep.State.Terminal() {
			return
		}
		e, ok, err := r.journal.get(rep.Order)
		if err != nil || !ok || e.Seq != rep.Seq || e.Acked {
			t.Errorf("order %s is reported, and the journal has %+v, %t, %v", rep.Order, e, ok, err)
		}
	}
	for i := range 20 {
		r.give(r.order(fmt.Sprint(i)))
		r.ends(fmt.Sprint(i))
	}
}

func TestReportThatCannotBeKeptIsNotSent(t *testing.T) {
	gate := make(chan struct{})
	r := newRig(t, func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
		<-gate
		return wire.Outcome{}, nil
	})
	r.give(r.order("a"))
	r.reaches("a", running)
	if err := r.disk.close(); err != nil {
		t.Fatal(err)
	}
	r.end() // or it would be tried again
	close(gate)
	r.wait()
	r.silent("the report is not on disk")
	if r.owes("a") || !strings.Contains(r.logged.String(), "cannot be kept") {
		t.Errorf("owed: %t; log: %s", r.owes("a"), r.logged)
	}
}

func TestReportIsSentUntilAcknowledged(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	r.give(r.order("a"))
	rep := r.ends("a")
	r.wait()
	final := r.sent("a")[len(r.sent("a"))-1]
	now := time.Now()
	resent := func() int {
		before := len(r.sent("a"))
		now = now.Add(2 * lastResend)
		if d := r.resendDue(now); (d > 0) != r.owes("a") || d > 3*lastResend/2 {
			t.Errorf("the next look is in %s", d)
		}
		for _, raw := range r.sent("a")[before:] {
			if !bytes.Equal(raw, final) {
				t.Error("what is sent again is not what was sent")
			}
		}
		return len(r.sent("a")) - before
	}
	for i := range 5 {
		if n := resent(); n != 1 {
			t.Fatalf("round %d: sent %d times", i, n)
		}
	}
	other := newIdentity(t)
	forged, err := wire.Seal(other.key, wire.TypeAck, wire.Ack{Device: r.id.ID, Reports: []wire.Acked{{Order: "a", Seq: rep.Seq}}})
	if err != nil {
		t.Fatal(err)
	}
	for what, raw := range map[string][]byte{
		"by another key":     forged,
		"for another device": r.owner.seal(wire.TypeAck, wire.Ack{Device: other.ID, Reports: []wire.Acked{{Order: "a", Seq: rep.Seq}}}),
		"of an older report": r.ack("a", rep.Seq-1),
		"of another order":   r.ack("b", rep.Seq),
	} {
		_ = r.receive(r.ctx, raw)
		if !r.owes("a") {
			t.Fatalf("an ack %s was taken", what)
		}
		if e, _, _ := r.journal.get("a"); e.Acked {
			t.Fatalf("an ack %s was written down", what)
		}
	}
	if n := resent(); n != 1 {
		t.Fatalf("after false acks it is sent %d times", n)
	}
	r = r.reborn(c.handle)
	if n := resent(); n != 1 {
		t.Fatalf("after a restart it is sent %d times", n)
	}
	if err := r.receive(r.ctx, r.ack("a", rep.Seq)); err != nil {
		t.Fatal(err)
	}
	if n := resent(); n != 0 {
		t.Fatalf("acknowledged, it is sent %d times", n)
	}
	r = r.reborn(c.handle)
	if n := resent(); n != 0 {
		t.Fatalf("acknowledged before a restart, it is sent %d times", n)
	}
}

// TestReconnectSendsWhatIsOwed runs the real loop.
func TestReconnectSendsWhatIsOwed(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	for _, id := range []string{"a", "b", "c"} {
		r.give(r.order(id))
		r.ends(id)
	}
	r.wait()
	if err := r.receive(r.ctx, r.ack("b", r.seqOf(r.sent("b")[len(r.sent("b"))-1]))); err != nil {
		t.Fatal(err)
	}
	r.dispatcher.mu.Lock()
	for _, o := range r.owed.queue {
		o.next = time.Now().Add(time.Hour) // it was sent often already
	}
	r.dispatcher.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); r.resend(ctx, nil) }()
	r.reconnected()
	got := map[string]bool{}
	for len(got) < 2 {
		rep := await(t, "what is owed", r.reports)
		if !rep.State.Terminal() {
			t.Errorf("a report that is not terminal was sent again: %+v", rep)
		}
		got[rep.Order] = true
	}
	if got["b"] {
		t.Error("what is acknowledged was sent again")
	}
	cancel()
	await(t, "the end of resend", done)
}

func TestPanicIsAFailureOfItsOrderAlone(t *testing.T) {
	var none map[string]int
	r := newRig(t, func(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		if o.ID == "bad" {
			none["x"] = 1
		}
		return wire.Outcome{}, nil
	}, func(u *duties) { route := u.routes[kindTest]; route.AtOnce = 1; u.routes[kindTest] = route })
	r.give(r.order("bad"))
	if rep := r.ends("bad"); rep.State != wire.Failed || rep.Code != wire.CodeInternal || !strings.Contains(rep.Reason, "nil map") {
		t.Errorf("got %+v", rep)
	}
	if log := r.logged.String(); !strings.Contains(log, "dispatch_test.go") {
		t.Errorf("the log does not say where: %s", log)
	}
	r.give(r.order("good")) // its place is free again
	if rep := r.ends("good"); rep.State != wire.Succeeded {
		t.Errorf("the next order is %s", rep.State)
	}
}

func TestHandlerOverItsLimitIsTimedOut(t *testing.T) {
	r := newRig(t, func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		<-ctx.Done()
		return wire.Outcome{}, fmt.Errorf("interrupted: %w", ctx.Err())
	}, func(u *duties) {
		route := u.routes[kindTest]
		route.Limit = time.Millisecond
		u.routes[kindTest] = route
	})
	r.give(r.order("a"))
	if rep := r.ends("a"); rep.State != wire.TimedOut || rep.Code != wire.CodeLimit || rep.Reason == "" {
		t.Errorf("got %+v", rep)
	}
}

func TestHandlerMayNotOutlastItsOrder(t *testing.T) {
	var mu sync.Mutex
	at := time.Now()
	r := newRig(t, func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		<-ctx.Done()
		return wire.Outcome{}, ctx.Err()
	}, func(u *duties) {
		u.clock = NewClock(time.Time{})
		u.clock.system = func() time.Time { mu.Lock(); defer mu.Unlock(); return at }
		u.clock.Trust(at, 0)
	})
	o := r.order("a")
	r.onPublish = func(rep wire.Report) { // so long before it expires
		mu.Lock()
		defer mu.Unlock()
		if rep.State == wire.Queued {
			at = o.Expires.Add(-100 * time.Millisecond)
		}
	}
	r.give(o)
	if rep := r.ends("a"); rep.State != wire.TimedOut {
		t.Errorf("got %+v", rep)
	}
}

func TestFailuresKeepTheirCode(t *testing.T) {
	for what, tc := range map[string]struct {
		err   error
		state wire.State
		code  string
	}{
		"rejected": {wire.RejectedBecause(wire.CodePolicy, "the owner says no"), wire.Rejected, wire.CodePolicy},
		"failed":   {fmt.Errorf("store: %w", wire.FailedBecause(wire.CodeNoSpace, "full")), wire.Failed, wire.CodeNoSpace},
		"unnamed":  {errors.New("boom"), wire.Failed, wire.CodeInternal},
	} {
		t.Run(what, func(t *testing.T) {
			r := newRig(t, func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
				return wire.Outcome{}, tc.err
			})
			r.give(r.order("a"))
			if rep := r.ends("a"); rep.State != tc.state || rep.Code != tc.code || rep.Reason == "" || rep.Body != nil {
				t.Errorf("got %+v", rep)
			}
		})
	}
}

func TestShutdownLeavesTheOrderOpen(t *testing.T) {
	for what, handle := range map[string]wire.Handler{
		"in the handler": func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
			<-ctx.Done()
			return wire.Outcome{}, wire.FailedBecause(wire.CodeTransfer, "interrupted")
		},
		"in the attachment": func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
			return wire.Outcome{Attachment: make([]byte, wire.MaxInline+1)}, nil
		},
	} {
		t.Run(what, func(t *testing.T) {
			attaching := make(chan struct{}, 1)
			r := newRig(t, handle, func(u *duties) {
				u.attach = func(ctx context.Context, _ string, _ []byte) error {
					attaching <- struct{}{}
					<-ctx.Done()
					return wire.FailedBecause(wire.CodeTransfer, "interrupted")
				}
			})
			r.give(r.order("a"))
			r.reaches("a", running)
			if what == "in the attachment" {
				await(t, "the attachment", attaching)
			}
			r.end()
			r.wait()
			r.silent("the agent was ended")
			if _, ok, err := r.journal.get("a"); ok || err != nil {
				t.Errorf("the journal knows it as finished (%v)", err)
			}
			var c counter
			r = r.reborn(c.handle)
			r.give(r.order("a"))
			if rep := r.ends("a"); rep.State != wire.Succeeded || c.calls() != 1 {
				t.Errorf("repeated, it is %s after %d calls", rep.State, c.calls())
			}
		})
	}
}

// TestCancelJustBeforeShutdownIsReported: it was taken back, whatever ends next.
func TestCancelJustBeforeShutdownIsReported(t *testing.T) {
	stopping, gate := make(chan struct{}), make(chan struct{})
	r := newRig(t, func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		<-ctx.Done()
		close(stopping)
		<-gate
		return wire.Outcome{}, ctx.Err()
	})
	r.give(r.order("a"))
	r.reaches("a", running)
	r.give(r.cancelOf("c", "a", time.Now().Add(time.Hour)))
	await(t, "the handler to hear of it", stopping)
	r.end()
	close(gate)
	r.wait()
	if rep := r.final("a"); !isCanceledReport(rep) {
		t.Errorf("got %+v", rep)
	}
}

// TestWhyAnOrderStandsStillIsReported, in whatever state it is, until it goes on.
func TestWhyAnOrderStandsStillIsReported(t *testing.T) {
	night := &wire.Problem{Code: "hours", Reason: "the owner lets jobs run from 22:00", After: 90 * time.Second}
	r := newRig(t, func(_ context.Context, _ wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		for _, p := range []wire.Progress{{Waits: night}, {Waits: night}, {}, {Done: 0.5}, {Done: 0.5, Waits: night}, {Done: 0.1}} {
			tell(p)
		}
		return wire.Outcome{}, nil
	}, func(u *duties) { x := u.routes[kindTest]; x.Queues = true; u.routes[kindTest] = x })
	r.give(r.order("a"))
	r.wait()
	var said []string
	for len(r.reports) > 0 {
		rep := <-r.reports
		said = append(said, fmt.Sprintf("%s %g %s%d", rep.State, rep.Progress, rep.Code, rep.RetrySeconds))
	}
	if got, want := strings.Join(said, ", "), "QUEUED 0 0, QUEUED 0 hours90, RUNNING 0 0, RUNNING 0.5 0, RUNNING 0.5 hours90, RUNNING 0.5 0, SUCCEEDED 0 0"; got != want {
		t.Errorf("reported %s\nwant     %s", got, want)
	}
}

// TestOrderInItsHandlersQueueIsQueued until its turn.
func TestOrderInItsHandlersQueueIsQueued(t *testing.T) {
	turn, begun, end := make(chan struct{}), make(chan struct{}), make(chan struct{})
	r := newRig(t, func(_ context.Context, _ wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		<-turn
		tell(wire.Progress{})
		tell(wire.Progress{})
		close(begun)
		<-end
		return wire.Outcome{}, nil
	}, func(u *duties) { x := u.routes[kindTest]; x.Queues = true; u.routes[kindTest] = x })
	o := r.order("a")
	r.give(o)
	r.give(o) // asked again while it waits
	turn <- struct{}{}
	await(t, "its turn", begun)
	close(end)
	r.wait()
	var states []wire.State
	for len(r.reports) > 0 {
		states = append(states, (<-r.reports).State)
	}
	if want := []wire.State{wire.Queued, wire.Queued, wire.Running, wire.Succeeded}; !slices.Equal(states, want) {
		t.Errorf("reported %s", states)
	}
}

// TestEffectJustBeforeShutdownIsReported: what is done is done.
func TestEffectJustBeforeShutdownIsReported(t *testing.T) {
	r := newRig(t, func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		<-ctx.Done()
		return wire.Outcome{}, nil
	})
	r.give(r.order("a"))
	r.reaches("a", running)
	r.end()
	if rep := r.ends("a"); rep.State != wire.Succeeded {
		t.Errorf("got %+v", rep)
	}
}

func TestLargeAttachmentIsPutBeforeTheReport(t *testing.T) {
	for _, size := range []int{0, wire.MaxInline, wire.MaxInline + 1, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			data := bytes.Repeat([]byte{7}, size)
			var mu sync.Mutex
			var put []byte
			r := newRig(t, func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
				return wire.Outcome{Attachment: data}, nil
			}, func(u *duties) {
				u.attach = func(_ context.Context, order string, b []byte) error {
					mu.Lock()
					defer mu.Unlock()
					if order != "a" {
						t.Errorf("attached to %q", order)
					}
					put = b
					return nil
				}
			})
			there := false
			r.onPublish = func(rep wire.Report) {
				if rep.State.Terminal() {
					mu.Lock()
					there = put != nil
					mu.Unlock()
				}
			}
			r.give(r.order("a"))
			rep := r.ends("a")
			large := size > wire.MaxInline
			sum := sha256.Sum256(data)
			a := rep.Attachment
			if a == nil || a.Size != int64(size) || a.SHA256 != hex.EncodeToString(sum[:]) {
				t.Fatalf("attachment %+v", a)
			}
			if large == (len(a.Inline) > 0) && size > 0 || !large && !bytes.Equal(a.Inline, data) {
				t.Errorf("%d bytes stand in the report", len(a.Inline))
			}
			if there != large || large && !bytes.Equal(put, data) {
				t.Errorf("put before the report: %t, %d bytes", there, len(put))
			}
		})
	}
}

func TestAttachmentThatCannotBePutFailsTheOrder(t *testing.T) {
	r := newRig(t, func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
		return wire.Outcome{Body: "x", Attachment: make([]byte, wire.MaxInline+1)}, nil
	}, func(u *duties) {
		u.attach = func(context.Context, string, []byte) error {
			return wire.FailedBecause(wire.CodeTransfer, "the data plane is away")
		}
	})
	r.give(r.order("a"))
	if rep := r.ends("a"); rep.State != wire.Failed || rep.Code != wire.CodeTransfer || rep.Attachment != nil || rep.Body != nil {
		t.Errorf("got %+v", rep)
	}
}

func TestReportTooLargeToSendFailsTheOrder(t *testing.T) {
	for what, handle := range map[string]wire.Handler{
		"body": func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
			return wire.Outcome{Body: strings.Repeat("x", wire.MaxMessage)}, nil
		},
		"reason": func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
			return wire.Outcome{}, errors.New(strings.Repeat("x", wire.MaxMessage))
		},
		"not JSON": func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
			return wire.Outcome{Body: math.Inf(1)}, nil
		},
	} {
		t.Run(what, func(t *testing.T) {
			r := newRig(t, handle)
			r.give(r.order("a"))
			if rep := r.ends("a"); rep.State != wire.Failed || rep.Code != wire.CodeInternal || rep.Reason == "" {
				t.Errorf("got %s %s %.100s", rep.State, rep.Code, rep.Reason)
			}
			r.wait()
			if _, ok, err := r.journal.get("a"); !ok || err != nil || !r.owes("a") {
				t.Errorf("the failure is not kept: %t %v", ok, err)
			}
		})
	}
}

// TestLargestReportIsKept: what fits a message must fit the journal, and many
// of them at once, over several of its logs.
func TestLargestReportIsKept(t *testing.T) {
	// Base64 makes 3 bytes 4; the rest is the envelope.
	body := strings.Repeat("x", wire.MaxMessage*3/4-1024)
	r := newRig(t, func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
		return wire.Outcome{Body: body}, nil
	})
	r.give(r.order("a"))
	if rep := r.ends("a"); rep.State != wire.Succeeded {
		t.Fatalf("%s: %.200s", rep.State, rep.Reason)
	}
	r.wait()
	first, _, err := r.journal.get("a")
	if err != nil {
		t.Fatal(err)
	}
	writers, each := 4, 20
	if testing.Short() {
		each = 6
	}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				e := first
				e.Order = fmt.Sprintf("%d-%d", w, i)
				if err := r.journal.put(e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	r = r.reborn(nil)
	if want := 1 + writers*each; len(r.owed.of) != want {
		t.Fatalf("%d of %d reports survived", len(r.owed.of), want)
	}
	for id := range r.owed.of {
		if e, ok, err := r.journal.get(id); err != nil || !ok || !bytes.Equal(e.Report, first.Report) {
			t.Errorf("report %s was changed (%v)", id, err)
		}
	}
}

func TestOnlySoManyAtOnce(t *testing.T) {
	const n, most = 40, 3
	gate, entered := make(chan struct{}), make(chan struct{}, n)
	var mu sync.Mutex
	now, peak := 0, 0
	r := newRig(t, func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
		mu.Lock()
		now++
		peak = max(peak, now)
		mu.Unlock()
		entered <- struct{}{}
		<-gate
		mu.Lock()
		now--
		mu.Unlock()
		return wire.Outcome{}, nil
	}, func(u *duties) {
		u.routes[kindTest] = Route{Handle: u.routes[kindTest].Handle, AtOnce: most, Limit: time.Hour}
		u.routes["other"] = Route{Handle: (&counter{}).handle, AtOnce: 1, Limit: time.Hour}
	})
	for i := range n {
		r.give(r.order(fmt.Sprint(i)))
	}
	for range most {
		await(t, "the first ones", entered)
	}
	other := r.order("other")
	other.Kind = "other"
	r.give(other)
	r.ends("other") // another kind does not wait for this one
	close(gate)
	r.wait()
	if peak != most {
		t.Errorf("%d ran at once, want %d", peak, most)
	}
}

func TestTooManyOrdersAreLeftUnanswered(t *testing.T) {
	gate := make(chan struct{})
	r := newRig(t, func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
		<-gate
		return wire.Outcome{}, nil
	})
	for i := range maxInFlight {
		if err := r.accept(r.ctx, r.order(fmt.Sprint(i)), nil); err != nil {
			t.Fatal(err)
		}
	}
	one := r.order("one too many")
	if err := r.accept(r.ctx, one, nil); err == nil {
		t.Error("accepted")
	}
	if n := len(r.sent(one.ID)); n != 0 {
		t.Errorf("%d reports: it must look as if it had not arrived", n)
	}
	r.give(r.order("0")) // a repeat is none too many
	r.end()              // the rest need not run
	close(gate)
	r.wait()
	if len(r.inFlight) != 0 {
		t.Errorf("%d orders are left in flight", len(r.inFlight))
	}
}

func TestRestartAndLaterLeaveTheOrderOpen(t *testing.T) {
	again, later := errors.New("again"), errors.New("later")
	r := newRig(t, func(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		if o.ID == "later" {
			return wire.Outcome{}, fmt.Errorf("wait: %w", later)
		}
		return wire.Outcome{}, fmt.Errorf("start: %w", again)
	}, func(u *duties) {
		route := u.routes[kindTest]
		route.Restart, route.Later = again, later
		u.routes[kindTest] = route
	})
	for _, id := range []string{"later", "again"} {
		r.give(r.order(id))
		r.wait()
		for _, raw := range r.sent(id) {
			if rep, _ := wire.OpenAs[wire.Report](raw, r.id.public(), wire.TypeReport); rep.State.Terminal() {
				t.Errorf("%s: reported %s", id, rep.State)
			}
		}
		if _, ok, _ := r.journal.get(id); ok {
			t.Errorf("%s: the journal knows it as finished", id)
		}
		if got, want := len(r.restart), map[string]int{"later": 0, "again": 1}[id]; got != want {
			t.Errorf("%s: asked for %d restarts, want %d", id, got, want)
		}
	}
}

// TestConcludedReportIsTheNewest: an update's report, given by a later life,
// must be numbered above all that were given before, and above a repeat's.
func TestConcludedReportIsTheNewest(t *testing.T) {
	later := errors.New("later")
	handle := func(_ context.Context, _ wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		for i := range 50 {
			tell(wire.Progress{Done: float64(i) / 50})
		}
		return wire.Outcome{}, later
	}
	route := func(u *duties) {
		x := u.routes[kindTest]
		x.Later = later
		u.routes[kindTest] = x
	}
	r := newRig(t, handle, route)
	o := r.order("update")
	var newest uint64
	look := func(r *rig) {
		t.Helper()
		for _, raw := range r.sent("update") {
			seq := r.seqOf(raw)
			if seq <= newest {
				t.Errorf("report %d follows %d", seq, newest)
			}
			newest = seq
		}
	}
	for range 3 { // repeated in one life
		r.give(o)
		r.wait()
	}
	look(r)
	r = r.reborn(handle, route)
	r.give(o)
	r.wait()
	r.conclude("update", wire.Outcome{Body: "done"}, nil)
	look(r)
	if rep := r.ends("update"); rep.State != wire.Succeeded || rep.Seq != newest || !r.owes("update") {
		t.Errorf("got %+v", rep)
	}
	r = r.reborn(handle, route)
	if !r.owes("update") {
		t.Error("forgotten after a restart")
	}
}

func TestJournalForgetsOnlyWhatNobodyIsOwed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	j, err := openJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []entry{
		{Order: "acked and old", Seq: 1, Expires: today.Add(-time.Second)},
		{Order: "acked and new", Seq: 1, Expires: today.Add(time.Second)},
		{Order: "owed and old", Seq: 1, Expires: today.Add(-time.Hour)},
	} {
		if err := j.put(e); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(e.Order, "acked") {
			if err := acknowledge(j, []wire.Acked{{Order: e.Order, Seq: 1}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := j.forget(today); err != nil {
		t.Fatal(err)
	}
	if err := j.saveFloor(today); err != nil {
		t.Fatal(err)
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	if j, err = openJournal(dir); err != nil {
		t.Fatal(err)
	}
	defer j.close()
	for order, want := range map[string]bool{"acked and old": false, "acked and new": true, "owed and old": true} {
		if _, ok, err := j.get(order); ok != want || err != nil {
			t.Errorf("%s: kept %t (%v), want %t", order, ok, err, want)
		}
	}
	if floor, err := j.floor(); err != nil || !floor.Equal(today) {
		t.Errorf("floor %s (%v)", floor, err)
	}
}

// TestASettledUpdateIsReportedOnce, also when the journal has forgotten its order.
func TestASettledUpdateIsReportedOnce(t *testing.T) {
	state := t.TempDir()
	slots, err := slot.Open(state)
	if err != nil {
		t.Fatal(err)
	}
	factory := filepath.Join(t.TempDir(), "factory")
	if err := os.WriteFile(factory, nil, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := slots.InstallFactory(slot.A, factory, "1.0.0", ""); err != nil {
		t.Fatal(err)
	}
	target, err := slots.BeginInstall("update", "1.0.0")
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(os.WriteFile(slots.StagedPath(target), nil, 0o700), slots.MarkTrial("update", slot.Image{Version: "1.1.0"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := slots.RollBack("it did not come up"); err != nil {
		t.Fatal(err)
	}
	settle := func(r *rig) {
		t.Helper()
		update, err := ota.New(ota.Options{StateDir: state, Slot: "a", Version: "1.0.0"})
		if err != nil {
			t.Fatal(err)
		}
		a := &Agent{update: update, journal: r.disk, orders: r.dispatcher}
		if err := a.settle(); err != nil {
			t.Error(err)
		}
	}
	r := newRig(t, nil)
	settle(r)
	settle(r)
	if rep := r.ends("update"); rep.State != wire.Failed || rep.Code != wire.CodeRolledBack || len(r.sent("update")) != 1 {
		t.Errorf("%d reports, %+v", len(r.sent("update")), rep)
	}
	r = newRig(t, nil) // with a journal that knows nothing of it any more
	settle(r)
	if n := len(r.sent("update")); n != 0 {
		t.Errorf("it is reported %d times again", n)
	}
}
