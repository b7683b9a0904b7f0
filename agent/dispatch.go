package agent

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/hw/watchdog"
	"github.com/deimos-edge/deimos/wire"
)

// ErrRestart is what [Run] returns when it wants to be started again at once.
var ErrRestart = errors.New("the agent has to restart")

// Route says how one kind of order is carried out. The table of routes is the
// only place where kinds and handlers meet.
type Route struct {
	Handle wire.Handler
	// Refuse tells why an order is refused as soon as it arrives, before it waits for
	// others; nil for one that is not. It must not block. An order that was begun
	// before is not refused: its handler knows what became of it. May be nil.
	Refuse func(o wire.Order) error
	// AtOnce is how many orders of this kind run together; more wait their turn
	// (see scheduler). 0 is one, and for kinds of priority 0 any number.
	AtOnce int
	// Queues is for a handler with a queue of its own: the order is QUEUED until
	// the handler first says that it is under way, when its turn has come.
	Queues bool
	// Keeps is for work without any effect but its report, that goes on after a restart
	// whether or not there is a coordinator: its orders are in the journal from when
	// they begin until their reports are.
	Keeps bool
	// Long is for work that may take hours: it does not count as I/O.
	Long bool
	// Limit is how long one may take once it runs.
	Limit time.Duration
	// Restart is the error by which the handler says that the agent has to start
	// again before the order can be reported on. Later is the one by which it
	// says that somebody else will conclude the order. Both nil for most.
	Restart, Later error
}

// maxInFlight bounds orders of the lowest priority that run or wait, in the
// presence of all others; each priority above has reserved more. What is above
// is not answered: the coordinator sends it again later.
const (
	maxInFlight    = 1024
	reserved       = 64
	lowestPriority = 5
)

// quietFor is how long the first report that is not terminal is held back, as
// most orders end sooner; and the least time between two such reports.
const quietFor = 500 * time.Millisecond

// keepConcluded is how long the report of an order is kept whose expiry is not
// known any more.
const keepConcluded = 30 * 24 * time.Hour

// keepRetry is the pause before a report that could not be kept is tried again.
const keepRetry = 5 * time.Second

// duties is what a dispatcher needs of the rest of the agent.
type duties struct {
	id      Identity
	trusted func() ed25519.PublicKey // key that signs orders
	clock   *Clock
	journal journal
	// outbox bounds the journal, in bytes; 0 is defaultOutbox.
	outbox int64
	// epoch is the number below this life's first report; a later life's is
	// higher, so that its reports are newer than those of this one.
	epoch  uint64
	routes map[wire.Kind]Route
	// extra are routes of who embeds the agent; none may be one of the above.
	extra map[wire.Kind]Route
	// publish sends a sealed report; it may be lost, the outbox sends it again.
	publish func(envelope []byte)
	// attach puts a large attachment where the coordinator finds it.
	attach  func(ctx context.Context, order string, data []byte) error
	restart func() // called once, when a handler asked for it
	// busy is called when an order is under way (1) and when it no longer is (-1);
	// may be nil, and must not block.
	busy func(k wire.Kind, by int)
	log  *slog.Logger
}

// dispatcher turns signed orders into effects and signed reports. It checks
// signature, device, expiry and whether an order was done before, in this order.
//
// An order is noted as begun before its handler is called, and until its report
// is kept. One that a former life has begun may have had its effect, so it ends
// by what its handler says when it arrives again (a handler bears being called
// twice), never as CANCELED or expired: rather as FAILED with
// [wire.CodeInterrupted]. The note costs no sync, except for routes with Later:
// it survives the death of the agent, and a power cut may lose the newest.
//
// A report that cannot be kept, for want of disk, stays in memory, and the order
// in flight: it is tried again until the agent ends.
//
// Its mutex is never held while the disk is waited for, only while it is read.
type dispatcher struct {
	duties
	out   outbox
	wg    sync.WaitGroup // of the orders in flight
	seq   atomic.Uint64  // of the last report; one count for all orders, as an order may begin again
	quiet time.Duration  // quietFor, except in tests
	retry time.Duration  // keepRetry, except in tests
	// patience is cancelPatience, except in tests
	patience time.Duration

	mu       sync.Mutex
	schedule *scheduler
	inFlight map[string]*task // by order id
	owed     debts            // unacknowledged terminal reports
	acks     []wire.Acked     // of owed reports, not yet noted in the journal
	revoked  map[string]error // orders that are canceled when they arrive again: see revoke
	full     bool             // the outbox or the disk, and the log says so
	ackless  bool             // acks cannot be noted, and the log says so
	tidying  bool             // tidy runs
	changed  chan struct{}    // capacity 1: owed or acks has changed
}

func newDispatcher(u duties) (*dispatcher, error) {
	routes := maps.Clone(u.routes)
	d := &dispatcher{
		duties:   u,
		quiet:    quietFor,
		retry:    keepRetry,
		patience: cancelPatience,
		inFlight: make(map[string]*task),
		revoked:  make(map[string]error),
		changed:  make(chan struct{}, 1),
	}
	if d.busy == nil {
		d.busy = func(wire.Kind, int) {}
	}
	d.seq.Store(u.epoch)
	d.out = outbox{journal: u.journal, bound: cmp.Or(u.outbox, defaultOutbox), id: u.id, clock: u.clock, number: func() uint64 { return d.seq.Add(1) }}
	routes[wire.KindOrderCancel] = Route{Handle: d.cancelOrder, Limit: cancelLimit}
	for k, r := range u.extra {
		if _, own := routes[k]; own {
			return nil, fmt.Errorf("orders of kind %s are the agent's own; an extension must have a kind of its own", k)
		}
		if r.Handle == nil || r.Limit <= 0 {
			return nil, fmt.Errorf("the extension for orders of kind %s needs a handler and a limit", k)
		}
		routes[k] = r
	}
	d.routes = routes
	d.schedule = newScheduler(routes)
	left, err := unacked(d.journal)
	if err != nil {
		return nil, fmt.Errorf("the journal cannot be read: %w", err)
	}
	for _, order := range left {
		d.owed.add(order, time.Now())
	}
	return d, nil
}

// receive takes one message from the order topic. It does not block.
func (d *dispatcher) receive(ctx context.Context, raw []byte) error {
	typ, payload, err := wire.Open(raw, d.trusted())
	if err != nil {
		return fmt.Errorf("a message on the order topic was ignored: %w", err)
	}
	switch typ {
	case wire.TypeOrder:
		var o wire.Order
		if err := json.Unmarshal(payload, &o); err != nil {
			return fmt.Errorf("a signed order cannot be read: %w", err)
		}
		return d.accept(ctx, o, raw)
	case wire.TypeAck:
		var a wire.Ack
		if err := json.Unmarshal(payload, &a); err != nil {
			return fmt.Errorf("a signed acknowledgement cannot be read: %w", err)
		}
		return d.acknowledged(a)
	}
	return fmt.Errorf("a message of the unknown type %q was ignored", typ)
}

// takeUp goes on with the orders of a former life that were kept for that, as if
// they had arrived again.
func (d *dispatcher) takeUp(ctx context.Context) error {
	all, err := d.journal.held()
	for _, raw := range all {
		err = errors.Join(err, d.receive(ctx, raw))
	}
	return err
}

// accept starts an order, which came as raw, or answers it from memory.
func (d *dispatcher) accept(ctx context.Context, o wire.Order, raw []byte) error {
	if o.Device != d.id.ID {
		return fmt.Errorf("order %s is for device %s and was ignored", o.ID, o.Device)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if t, ok := d.inFlight[o.ID]; ok {
		d.tellNow(t)
		return nil
	}
	done, ok, err := d.journal.get(o.ID)
	if err != nil {
		return err
	}
	if ok {
		d.publish(done.Report)
		return nil
	}
	again, err := d.journal.begun(o.ID)
	if err != nil {
		return err
	}
	now, sure := d.clock.Read()
	if !again && d.journal.forgot(o.ID, o.Expires, now) {
		// Not kept, as what has expired is not.
		d.say(wire.Report{Order: o.ID, Seq: d.seq.Add(1), State: wire.Rejected, Code: wire.CodeExpired, Reason: "this device has forgotten which orders it did at that time, so this one may have been done; ask for it again"})
		return nil
	}
	taken := d.revoked[o.ID]
	if again && taken == nil {
		by, err := d.journal.revokedBy(o.ID)
		if err != nil {
			return err
		}
		if by != "" {
			taken = takenBack(by)
		}
	}
	if err := o.CheckFor(d.id.ID, now); err != nil {
		p := wire.ProblemOf(err)
		expired := p.Code == wire.CodeExpired
		if expired && sure != wire.ClockTrusted {
			// Perhaps it is this clock that is ahead, and a terminal report would
			// be final. The welcome sets the clock, and the order comes again.
			return fmt.Errorf("order %s expired at %s by a clock that is not sure of the time, and was ignored", o.ID, o.Expires.UTC().Format(time.RFC3339))
		}
		if !expired || !again {
			// Not kept: after its expiry nobody asks for it again.
			d.say(wire.Report{Order: o.ID, Seq: d.seq.Add(1), State: p.State, Code: p.Code, Reason: p.Reason})
			return nil
		}
	}
	if ok, err := d.admit(o); !ok {
		return err
	}
	d.enqueue(ctx, &task{order: o, raw: raw, class: classOf(o.Kind), again: again}, now, taken)
	return nil
}

// admit tells whether there is room for one more order, and for its report. Why
// not is said once.
func (d *dispatcher) admit(o wire.Order) (bool, error) {
	p := o.Kind.Priority()
	if len(d.inFlight) >= maxInFlight+reserved*(lowestPriority-p) {
		return false, fmt.Errorf("order %s has to wait: %d orders are under way", o.ID, len(d.inFlight))
	}
	if err := d.journal.writable(); err != nil {
		return false, d.sayFull(fmt.Errorf("new orders are left unanswered until their reports can be kept: %w", err))
	}
	n := len(d.inFlight) + 1
	if d.out.room(n, p) {
		d.full = false
		return true, nil
	}
	if !d.tidying {
		d.tidying = true
		d.wg.Go(func() { d.tidy(int64(n)*bareReport, classOf(o.Kind)) })
	}
	return false, d.sayFull(fmt.Errorf("new orders are left unanswered until the coordinator has acknowledged reports: the outbox holds %d MiB of them, and its bound is %d", d.journal.bytes()>>20, d.out.bound>>20))
}

// sayFull is why, unless it was said.
func (d *dispatcher) sayFull(why error) error {
	if d.full {
		return nil
	}
	d.full = true
	return why
}

// tidy makes room in the outbox for orders that come again.
func (d *dispatcher) tidy(need int64, most class) {
	if err := d.out.sweep(need, most); err != nil {
		d.log.Error("no room can be made", "error", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tidying = false
}

// enqueue puts an order under way, or one that was taken back, to its report.
// d.mu is held.
func (d *dispatcher) enqueue(ctx context.Context, t *task, now time.Time, taken error) {
	o, again := t.order, t.again
	d.track(ctx, t)
	d.step(t, wire.Report{Order: o.ID, State: wire.Queued})
	if _, known := d.routes[o.Kind]; !known {
		go d.end(t, wire.Outcome{}, wire.RejectedBecause(wire.CodeUnknownKind, "this agent does not know orders of kind %q; update it", o.Kind))
		return
	}
	if refuse := d.routes[o.Kind].Refuse; refuse != nil && !again && taken == nil {
		if err := refuse(o); err != nil {
			go d.end(t, wire.Outcome{}, err)
			return
		}
	}
	if o.Kind == wire.KindOrderCancel {
		// Now, not when its handler runs: the order that it takes back may come
		// right behind it.
		c, err := cancelOf(o)
		if err == nil {
			err = d.revoke(ctx, c, takenBack(o.ID))
		}
		if err != nil {
			go d.end(t, wire.Outcome{}, err)
			return
		}
	}
	if taken != nil {
		t.cancel(taken)
	}
	waiting, stop := context.WithTimeoutCause(t.ctx, o.Expires.Sub(now), errWaitedTooLong)
	unwatch := context.AfterFunc(waiting, func() { d.giveUp(t, context.Cause(waiting)) })
	t.unwatch = func() { unwatch(); stop() }
	d.schedule.add(t)
	d.beginNext()
}

var errWaitedTooLong = wire.RejectedBecause(wire.CodeExpired, "the order expired while it waited for other work to end")

// track makes t an order in flight; release ends that. d.mu is held.
func (d *dispatcher) track(ctx context.Context, t *task) {
	t.agent, t.place, t.done, t.said = ctx, -1, make(chan struct{}), time.Now()
	t.ctx, t.cancel = context.WithCancelCause(ctx)
	d.inFlight[t.order.ID] = t
	d.wg.Add(1)
	d.busy(t.order.Kind, 1)
}

func (d *dispatcher) release(t *task) {
	if t.hush != nil {
		t.hush.Stop()
	}
	t.cancel(nil)
	delete(d.inFlight, t.order.ID)
	close(t.done)
	d.busy(t.order.Kind, -1)
	d.wg.Done()
}

// giveUp ends an order that waits.
func (d *dispatcher) giveUp(t *task, why error) {
	d.mu.Lock()
	// What was begun before may be beyond recall: its handler knows.
	if t.again && isCancel(why) || !d.schedule.remove(t) {
		d.mu.Unlock()
		return
	}
	d.mu.Unlock()
	d.end(t, wire.Outcome{}, why)
}

// beginNext begins every order that may. d.mu is held.
func (d *dispatcher) beginNext() {
	for t := d.schedule.next(); t != nil; t = d.schedule.next() {
		t.unwatch()
		go d.carryOut(t)
	}
}

// carryOut runs an order to its terminal report.
func (d *dispatcher) carryOut(t *task) {
	out, err := d.effect(t)
	d.mu.Lock()
	d.schedule.ended(t.order.Kind)
	d.beginNext()
	d.mu.Unlock()
	d.end(t, out, err)
}

// end reports on an order, or leaves it open: the coordinator will send it
// again, or somebody else concludes it.
func (d *dispatcher) end(t *task, out wire.Outcome, err error) {
	route := d.routes[t.order.Kind]
	switch {
	case route.Restart != nil && errors.Is(err, route.Restart):
		d.restart()
		d.abandon(t) // last: who waits for the orders must find the wish
		return
	case route.Later != nil && errors.Is(err, route.Later), errors.Is(err, errNotBegun):
		d.abandon(t)
		return
	case err != nil && t.agent.Err() != nil && !isCancel(err):
		d.abandon(t)
		return
	}
	r := d.terminal(t.agent, t.order.ID, out, d.asFarAsKnown(t, err))
	if err == nil && r.State != wire.Succeeded && t.agent.Err() != nil {
		d.abandon(t) // not the result is at fault, its attachment had no time
		return
	}
	d.finish(t, r, t.order.Expires, t.class)
}

// asFarAsKnown is why an order is not done. Of one that was begun before nobody
// knows, unless somebody else concludes it and its handler has been asked.
func (d *dispatcher) asFarAsKnown(t *task, why error) error {
	route := d.routes[t.order.Kind]
	asked := route.Later != nil
	switch {
	case route.Keeps: // nothing of it is left
	case t.again && errors.Is(why, errWaitedTooLong):
		return wire.FailedBecause(wire.CodeInterrupted, "the agent ended before it could report, and the order expired before it was sent again: it may have been done")
	case t.again && isCancel(why) && !asked:
		return wire.FailedBecause(wire.CodeInterrupted, "the agent ended before it could report, and then %s: it may have been done", wire.ProblemOf(why).Reason)
	}
	return why
}

// abandon forgets an order in flight without a report.
func (d *dispatcher) abandon(t *task) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.release(t)
}

// conclude reports on an update that a former life of the agent was given.
func (d *dispatcher) conclude(order string, out wire.Outcome, problem error) {
	r := d.terminal(context.Background(), order, out, problem)
	d.finish(nil, r, d.clock.Now().Add(keepConcluded), classOf(wire.KindUpdateInstall))
}

var errNotBegun = errors.New("the order could not be begun")

// effect calls the handler under its limit, unless it is too late for that.
func (d *dispatcher) effect(t *task) (wire.Outcome, error) {
	o, route := t.order, d.routes[t.order.Kind]
	left := o.Expires.Sub(d.clock.Now())
	switch {
	case t.ctx.Err() != nil && !t.again:
		return wire.Outcome{}, context.Cause(t.ctx)
	case left <= 0:
		return wire.Outcome{}, errWaitedTooLong
	}
	if !t.again {
		if route.Keeps {
			if err := d.journal.hold(o.ID, t.raw); err != nil { // it will come again
				d.log.Warn("an order cannot be kept for the agent's next life", "order", o.ID, "error", err)
			}
		}
		if err := d.journal.begin(o.ID, o.Expires, route.Later != nil); err != nil {
			d.log.Error("an order cannot be begun; it comes again", "order", o.ID, "error", err)
			return wire.Outcome{}, errNotBegun
		}
	}
	limit := min(route.Limit, left)
	late := &wire.Problem{State: wire.TimedOut, Code: wire.CodeLimit, Reason: fmt.Sprintf("it was not done within %s", limit.Round(time.Second))}
	running, cancel := context.WithTimeoutCause(t.ctx, limit, late)
	defer cancel()
	if !route.Queues {
		d.mu.Lock()
		d.step(t, wire.Report{Order: o.ID, State: wire.Running})
		d.mu.Unlock()
	}
	out, err := d.handle(running, o, func(p wire.Progress) {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.inFlight[o.ID] == t { // nothing after the end
			d.progressed(t, p)
		}
	})
	open := route.Restart != nil && errors.Is(err, route.Restart) || route.Later != nil && errors.Is(err, route.Later)
	if err != nil && !open && running.Err() != nil {
		return wire.Outcome{}, context.Cause(running)
	}
	return out, err
}

// progressed takes what a handler says of an order that is under way. d.mu is held.
func (d *dispatcher) progressed(t *task, p wire.Progress) {
	r := wire.Report{Order: t.order.ID, State: wire.Running, Progress: t.last.Progress}
	if p.Done > r.Progress { // and a number
		r.Progress = min(p.Done, 1)
	}
	if w := p.Waits; w != nil {
		r.State, r.Code, r.Reason, r.RetrySeconds = t.last.State, w.Code, w.Reason, w.Seconds()
	}
	// A percent at a time is enough for a person to watch.
	if r.State != t.last.State || r.Code != t.last.Code || r.Progress >= t.last.Progress+0.01 {
		d.step(t, r)
	}
}

// handle calls the handler. A panic in it is the failure of this order: the
// other orders go on, and the coordinator hears of it.
func (d *dispatcher) handle(ctx context.Context, o wire.Order, tell func(wire.Progress)) (out wire.Outcome, err error) {
	defer func() {
		if v := recover(); v != nil {
			d.log.Error("a handler panicked; this is a bug, please report it", "order", o.ID, "kind", o.Kind, "panic", v, "stack", string(debug.Stack()))
			out, err = wire.Outcome{}, wire.FailedBecause(wire.CodeInternal, "the agent has a bug: carrying out a %s order panicked (%v); its log holds the details", o.Kind, v)
		}
	}()
	return d.routes[o.Kind].Handle(ctx, o, tell)
}

// terminal makes the final report of an order.
func (d *dispatcher) terminal(ctx context.Context, order string, out wire.Outcome, err error) wire.Report {
	r := wire.Report{Order: order, State: wire.Succeeded}
	body := out.Body // of one that did not succeed, it says how far it came
	if err == nil {
		body, err = nil, d.fill(ctx, &r, out)
	}
	if err != nil {
		p := wire.ProblemOf(err)
		r = wire.Report{Order: order, State: p.State, Code: p.Code, Reason: p.Reason, RetrySeconds: p.Seconds()}
		if body != nil {
			r.Body, _ = json.Marshal(body)
		}
		d.log.Warn("order not done", "order", order, "state", p.State, "code", p.Code, "reason", p.Reason)
	}
	return r
}

// fill puts an outcome into its report; what is too large for a message goes
// to the data plane first, so that a report never promises what is not there.
func (d *dispatcher) fill(ctx context.Context, r *wire.Report, out wire.Outcome) error {
	if out.Body != nil {
		raw, err := json.Marshal(out.Body)
		if err != nil {
			return fmt.Errorf("the result cannot be encoded: %w", err)
		}
		r.Body = raw
	}
	if out.Attachment == nil {
		return nil
	}
	sum := sha256.Sum256(out.Attachment)
	r.Attachment = &wire.Attachment{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(out.Attachment))}
	if len(out.Attachment) <= wire.MaxInline {
		r.Attachment.Inline = out.Attachment
		return nil
	}
	return d.attach(ctx, r.Order, out.Attachment)
}

// finish makes a terminal report durable, then sends it until it is
// acknowledged. t is nil for an order that is not in flight: its report is
// tried once, as who concludes it comes back to it after the next start.
func (d *dispatcher) finish(t *task, r wire.Report, expires time.Time, c class) {
	r.Seq = d.seq.Add(1)
	raw, err := d.seal(r)
	if err != nil {
		r = wire.Report{Order: r.Order, Seq: r.Seq, State: wire.Failed, Code: wire.CodeInternal, Reason: err.Error()}
		raw, err = d.seal(r)
	}
	e := entry{Order: r.Order, Seq: r.Seq, Expires: expires, Report: raw, Class: c, Bare: content(r) < worthStripping}
	if err == nil {
		e, err = d.keep(t, e) // outside the lock: it waits for the disk
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if t != nil {
		defer d.release(t)
	}
	if err != nil {
		// Unreported: the coordinator sends the order again to the next life, and
		// it is done again, which handlers bear.
		d.log.Error("an order is done and its report is lost", "order", r.Order, "error", err)
		return
	}
	delete(d.revoked, r.Order)
	d.owed.add(r.Order, time.Now())
	d.nudge()
	d.publish(e.Report)
}

// keep puts a report into the outbox, and tries again until the agent ends: what
// is done must not be done again for want of a report.
func (d *dispatcher) keep(t *task, e entry) (entry, error) {
	e, err := d.out.keep(e)
	if err != nil && t != nil {
		d.log.Error("an order is done but its report cannot be kept; it is tried again", "order", e.Order, "every", d.retry.String(), "error", err)
	}
	for err != nil && t != nil && rest(t.agent, d.retry) == nil {
		e, err = d.out.keep(e)
	}
	return e, err
}

// step numbers a report that is not terminal; it is sent when it is time. d.mu is held.
func (d *dispatcher) step(t *task, r wire.Report) {
	r.Seq = d.seq.Add(1)
	t.last = r
	if t.hush != nil {
		return
	}
	if wait := d.quiet - time.Since(t.said); wait > 0 {
		t.hush = time.AfterFunc(wait, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if t.hush != nil && d.inFlight[t.order.ID] == t {
				d.tellNow(t)
			}
		})
		return
	}
	d.tellNow(t)
}

// tellNow sends the present state of an order in flight. d.mu is held.
func (d *dispatcher) tellNow(t *task) {
	if t.hush != nil {
		t.hush.Stop()
		t.hush = nil
	}
	t.said = time.Now()
	d.say(t.last)
}

// say seals and sends a report that need not arrive.
func (d *dispatcher) say(r wire.Report) {
	raw, err := d.seal(r)
	if err != nil {
		d.log.Error("a report cannot be signed", "order", r.Order, "error", err)
		return
	}
	d.publish(raw)
}

// public is the half of the key that others check with.
func (i Identity) public() ed25519.PublicKey { return i.key.Public().(ed25519.PublicKey) }

func (d *dispatcher) seal(r wire.Report) ([]byte, error) {
	r.Device = d.id.ID
	r.At, r.TimeConfidence = d.clock.Read()
	return wire.Seal(d.id.key, wire.TypeReport, r)
}

func (d *dispatcher) nudge() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// acknowledged strikes reports off what is owed. That the journal knows it can
// wait for the next round of resend: this must not block.
func (d *dispatcher) acknowledged(a wire.Ack) error {
	if a.Device != d.id.ID {
		return fmt.Errorf("an acknowledgement for device %s was ignored", a.Device)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var failed error
	for _, r := range a.Reports {
		if !d.owed.has(r.Order) {
			continue
		}
		e, ok, err := d.journal.get(r.Order)
		failed = errors.Join(failed, err)
		if ok && e.answeredBy(r.Seq) {
			d.owed.settle(r.Order)
			d.acks = append(d.acks, r)
			d.nudge()
		}
	}
	return failed
}

// resend sends owed reports again until ctx ends, and writes down what was
// acknowledged. As that takes d.mu, its pulse speaks for all of the dispatcher.
func (d *dispatcher) resend(ctx context.Context, pulse *watchdog.Pulse) {
	defer pulse.End()
	tick := time.NewTicker(pulseEvery)
	defer tick.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			d.noteAcks()
			return
		case <-d.changed:
		case <-timer.C:
		case <-tick.C:
		}
		pulse.Beat()
		if next := d.resendDue(time.Now()); next > 0 {
			timer.Reset(next)
		} else {
			timer.Stop()
		}
	}
}

// resendDue sends what is due and says how long until the next is; 0 if nothing
// is owed.
func (d *dispatcher) resendDue(now time.Time) time.Duration {
	d.noteAcks()
	d.mu.Lock()
	orders, next := d.owed.due(now)
	d.mu.Unlock()
	for _, order := range orders {
		e, ok, err := d.journal.get(order)
		if err != nil {
			d.log.Error("a report that is owed cannot be read; it is tried again", "order", order, "error", err)
		}
		if ok && !e.Acked {
			d.publish(e.Report)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.acks) > 0 && (next == 0 || next > d.retry) {
		next = d.retry
	}
	return next
}

func (d *dispatcher) noteAcks() {
	d.mu.Lock()
	acks := d.acks
	d.acks = nil
	d.mu.Unlock()
	if len(acks) == 0 {
		return
	}
	err := d.out.acknowledged(acks)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.acks = append(acks, d.acks...) // for the next round
	}
	if err != nil && !d.ackless {
		d.log.Warn("that reports are acknowledged cannot be noted; it is tried again", "reports", len(acks), "error", err)
	}
	d.ackless = err != nil
}

// reconnected sends everything owed: the last link may have lost it.
func (d *dispatcher) reconnected() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.owed.allDue(time.Now())
	d.nudge()
}

const (
	cancelLimit = time.Minute
	// cancelPatience is how long a canceled order may take to stop before the
	// cancellation is answered with RUNNING; the order's own report follows.
	cancelPatience = 10 * time.Second
)

// cancelOrder carries out order.cancel, as far as revoke has not when it arrived:
// it waits for the end of the other order. All of it may be done again after a
// crash.
//
// An order that a former life has begun and not reported on may have been done,
// or cut off in the middle, or be an update on trial. So its state is RUNNING;
// when it arrives again, its handler is called with its context already
// canceled, and says that it is done or beyond recall, or stops.
func (d *dispatcher) cancelOrder(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	c, err := cancelOf(o)
	if err != nil {
		return wire.Outcome{}, err
	}
	d.mu.Lock()
	t := d.inFlight[c.Order]
	d.mu.Unlock()
	if t != nil {
		patience := time.NewTimer(d.patience)
		defer patience.Stop()
		select {
		case <-t.done:
		case <-patience.C:
		case <-ctx.Done():
			return wire.Outcome{}, ctx.Err()
		}
	}
	state, err := d.stateOf(c.Order)
	if err == nil && !state.Terminal() {
		// The next life must know of it: this cancellation is done and will not come again.
		err = d.journal.revoke(c.Order, o.ID, c.Expires)
	}
	return wire.Outcome{Body: wire.CancelResult{State: state}}, err
}

func cancelOf(o wire.Order) (wire.OrderCancel, error) {
	c, err := wire.DecodeBody[wire.OrderCancel](o)
	if err == nil && (c.Order == "" || c.Order == o.ID || c.Expires.IsZero()) {
		err = wire.RejectedBecause(wire.CodeBadBody, "the cancellation lacks the id or the expiry of another order")
	}
	return c, err
}

func takenBack(by string) *wire.Problem {
	return &wire.Problem{State: wire.Canceled, Code: wire.CodeCanceled, Reason: "the order was taken back by order " + by}
}

// revoke stops an order or keeps it from beginning: it is in flight until that is
// done, or has ended, or is canceled when it arrives again. agent ends with the
// agent. d.mu is held.
func (d *dispatcher) revoke(agent context.Context, c wire.OrderCancel, why *wire.Problem) error {
	if t, ok := d.inFlight[c.Order]; ok {
		d.revoked[c.Order] = why // it may end without a report, and arrive again
		t.cancel(why)
		return nil
	}
	if _, done, err := d.journal.get(c.Order); done || err != nil {
		return err
	}
	begun, err := d.journal.begun(c.Order)
	if err != nil {
		return err
	}
	if begun {
		d.revoked[c.Order] = why
		return nil
	}
	// Never seen. It is in flight until its report is kept, so that it cannot
	// arrive and begin meanwhile.
	t := &task{order: wire.Order{ID: c.Order, Expires: c.Expires}, class: classOf(wire.KindOrderCancel)}
	d.track(agent, t)
	t.last = wire.Report{Order: c.Order, Seq: d.seq.Add(1), State: wire.Queued}
	go d.end(t, wire.Outcome{}, why)
	return nil
}

// isCancel tells a cancellation from the end of the agent or of a time limit.
func isCancel(err error) bool {
	var p *wire.Problem
	return errors.As(err, &p) && p.State == wire.Canceled
}

// stateOf is where an order stands that was known a moment ago.
func (d *dispatcher) stateOf(order string) (wire.State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.inFlight[order]; ok {
		return wire.Running, nil
	}
	e, ok, err := d.journal.get(order)
	if err != nil {
		return "", err
	}
	if ok {
		r, err := wire.OpenAs[wire.Report](e.Report, d.id.public(), wire.TypeReport)
		return r.State, err
	}
	begun, err := d.journal.begun(order)
	if err == nil && !begun {
		err = wire.FailedBecause(wire.CodeInternal, "the order was stopped, but that cannot be kept; see the agent's log, and cancel again")
	}
	return wire.Running, err
}

const pingLimit = 10 * time.Second

// ping carries out device.ping.
func ping(version string, began time.Time) wire.Handler {
	return func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
		return wire.Outcome{Body: wire.Pong{Agent: version, Uptime: time.Since(began).Seconds()}}, nil
	}
}

// wait blocks until running handlers have returned.
func (d *dispatcher) wait() { d.wg.Wait() }
