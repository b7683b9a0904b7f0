package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// ErrRestart is what [Run] returns when it wants to be started again at once.
var ErrRestart = errors.New("the agent has to restart")

// Route says how one kind of order is carried out. The table of routes is the
// only place where kinds and handlers meet.
type Route struct {
	Handle wire.Handler
	// AtOnce is how many orders of this kind run together; more wait their turn.
	AtOnce int
	// Limit is how long one may take once it runs.
	Limit time.Duration
	// Restart is the error by which the handler says that the agent has to start
	// again before the order can be reported on. Later is the one by which it
	// says that somebody else will conclude the order. Both nil for most.
	Restart, Later error
}

// maxInFlight bounds orders that run or wait. What is above is not answered:
// the coordinator sends it again later.
const maxInFlight = 1024

// keepConcluded is how long the report of an order is kept whose expiry is not
// known any more.
const keepConcluded = 30 * 24 * time.Hour

// duties is what a dispatcher needs of the rest of the agent.
type duties struct {
	id      Identity
	trusted func() ed25519.PublicKey // key that signs orders
	clock   *Clock
	journal *journal
	// epoch is the number below this life's first report; a later life's is
	// higher, so that its reports are newer than those of this one.
	epoch  uint64
	routes map[wire.Kind]Route
	// publish sends a sealed report; it may be lost, the outbox sends it again.
	publish func(envelope []byte)
	// attach puts a large attachment where the coordinator finds it.
	attach  func(ctx context.Context, order string, data []byte) error
	restart func() // called once, when a handler asked for it
	log     *slog.Logger
}

// dispatcher turns signed orders into effects and signed reports. It checks
// signature, device, expiry and whether an order was done before, in this order.
type dispatcher struct {
	duties
	lanes map[wire.Kind]chan struct{}
	wg    sync.WaitGroup

	mu       sync.Mutex
	seq      uint64                  // of the last report; one count for all orders, as an order may begin again
	inFlight map[string]*wire.Report // by order id: the last report, for who asks again
	owed     map[string]*debt        // unacknowledged terminal reports, by order id
	changed  chan struct{}           // capacity 1: owed has changed
}

// debt is a terminal report that the coordinator has not acknowledged.
type debt struct {
	entry entry
	next  time.Time // when to send it again, local monotonic clock
	wait  time.Duration
}

func newDispatcher(u duties) (*dispatcher, error) {
	d := &dispatcher{
		duties:   u,
		lanes:    make(map[wire.Kind]chan struct{}, len(u.routes)),
		seq:      u.epoch,
		inFlight: make(map[string]*wire.Report),
		owed:     make(map[string]*debt),
		changed:  make(chan struct{}, 1),
	}
	for k, r := range d.routes {
		d.lanes[k] = make(chan struct{}, max(1, r.AtOnce))
	}
	left, err := d.journal.unacked()
	if err != nil {
		return nil, err
	}
	for _, e := range left {
		d.owe(e)
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
		return d.accept(ctx, o)
	case wire.TypeAck:
		var a wire.Ack
		if err := json.Unmarshal(payload, &a); err != nil {
			return fmt.Errorf("a signed acknowledgement cannot be read: %w", err)
		}
		return d.acknowledged(a)
	}
	return fmt.Errorf("a message of the unknown type %q was ignored", typ)
}

// accept starts an order, or answers it from memory.
func (d *dispatcher) accept(ctx context.Context, o wire.Order) error {
	if o.Device != d.id.ID {
		return fmt.Errorf("order %s is for device %s and was ignored", o.ID, o.Device)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if last, ok := d.inFlight[o.ID]; ok {
		d.say(*last)
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
	now, sure := d.clock.Read()
	if err := o.CheckFor(d.id.ID, now); err != nil {
		p := wire.ProblemOf(err)
		if p.Code == wire.CodeExpired && sure != wire.ClockTrusted {
			// Perhaps it is this clock that is ahead, and a terminal report would
			// be final. The welcome sets the clock, and the order comes again.
			return fmt.Errorf("order %s expired at %s by a clock that is not sure of the time, and was ignored", o.ID, o.Expires.UTC().Format(time.RFC3339))
		}
		// Not kept: after its expiry nobody asks for it again.
		d.seq++
		d.say(wire.Report{Order: o.ID, Seq: d.seq, State: p.State, Code: p.Code, Reason: p.Reason})
		return nil
	}
	if len(d.inFlight) >= maxInFlight {
		return fmt.Errorf("order %s has to wait: %d orders are under way", o.ID, maxInFlight)
	}
	last := new(wire.Report)
	d.inFlight[o.ID] = last
	d.step(last, wire.Report{Order: o.ID, State: wire.Queued})
	d.wg.Go(func() { d.carryOut(ctx, o, last) })
	return nil
}

// carryOut runs an order to its terminal report.
func (d *dispatcher) carryOut(ctx context.Context, o wire.Order, last *wire.Report) {
	out, err := d.effect(ctx, o, last)
	route := d.routes[o.Kind]
	switch {
	case err != nil && ctx.Err() != nil:
		d.abandon(o.ID)
		return
	case route.Restart != nil && errors.Is(err, route.Restart):
		d.abandon(o.ID)
		d.restart()
		return
	case route.Later != nil && errors.Is(err, route.Later):
		d.abandon(o.ID)
		return
	}
	r := d.terminal(ctx, o.ID, out, err)
	if err == nil && r.State != wire.Succeeded && ctx.Err() != nil {
		d.abandon(o.ID) // not the result is at fault, its attachment had no time
		return
	}
	d.finish(o.Expires, r)
}

// conclude reports on an order that a former life of the agent was given.
func (d *dispatcher) conclude(order string, out wire.Outcome, problem error) {
	d.finish(d.clock.Now().Add(keepConcluded), d.terminal(context.Background(), order, out, problem))
}

// effect waits for a place and calls the handler under its limit.
func (d *dispatcher) effect(ctx context.Context, o wire.Order, last *wire.Report) (wire.Outcome, error) {
	route, ok := d.routes[o.Kind]
	if !ok {
		return wire.Outcome{}, wire.RejectedBecause(wire.CodeUnknownKind, "this agent does not know orders of kind %q; update it", o.Kind)
	}
	left := o.Expires.Sub(d.clock.Now())
	waiting, cancel := context.WithTimeoutCause(ctx, left, wire.RejectedBecause(wire.CodeExpired, "the order expired while it waited for other work to end"))
	defer cancel()
	select {
	case d.lanes[o.Kind] <- struct{}{}:
		defer func() { <-d.lanes[o.Kind] }()
	case <-waiting.Done():
	}
	if waiting.Err() != nil { // also where both were ready: not begun after its expiry
		return wire.Outcome{}, context.Cause(waiting)
	}
	limit := min(route.Limit, o.Expires.Sub(d.clock.Now()))
	late := &wire.Problem{State: wire.TimedOut, Code: wire.CodeLimit, Reason: fmt.Sprintf("it was not done within %s", limit.Round(time.Second))}
	running, cancel := context.WithTimeoutCause(ctx, limit, late)
	defer cancel()

	d.mu.Lock()
	d.step(last, wire.Report{Order: o.ID, State: wire.Running})
	d.mu.Unlock()
	out, err := d.handle(running, o, func(done float64) {
		d.mu.Lock()
		defer d.mu.Unlock()
		// A percent at a time is enough for a person to watch. Nothing after the end.
		if d.inFlight[o.ID] == last && done >= last.Progress+0.01 {
			d.step(last, wire.Report{Order: o.ID, State: wire.Running, Progress: min(done, 1)})
		}
	})
	if err != nil && running.Err() != nil && ctx.Err() == nil {
		return wire.Outcome{}, context.Cause(running)
	}
	return out, err
}

// handle calls the handler. A panic in it is the failure of this order: the
// other orders go on, and the coordinator hears of it.
func (d *dispatcher) handle(ctx context.Context, o wire.Order, progress func(float64)) (out wire.Outcome, err error) {
	defer func() {
		if v := recover(); v != nil {
			d.log.Error("a handler panicked; this is a bug, please report it", "order", o.ID, "kind", o.Kind, "panic", v, "stack", string(debug.Stack()))
			out, err = wire.Outcome{}, wire.FailedBecause(wire.CodeInternal, "the agent has a bug: carrying out a %s order panicked (%v); its log holds the details", o.Kind, v)
		}
	}()
	return d.routes[o.Kind].Handle(ctx, o, progress)
}

// terminal makes the final report of an order.
func (d *dispatcher) terminal(ctx context.Context, order string, out wire.Outcome, err error) wire.Report {
	r := wire.Report{Order: order, State: wire.Succeeded}
	if err == nil {
		err = d.fill(ctx, &r, out)
	}
	if err != nil {
		p := wire.ProblemOf(err)
		r = wire.Report{Order: order, State: p.State, Code: p.Code, Reason: p.Reason}
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

// finish makes a terminal report durable, then sends it until it is acknowledged.
func (d *dispatcher) finish(expires time.Time, r wire.Report) {
	order := r.Order
	d.mu.Lock()
	d.seq++
	r.Seq = d.seq
	d.mu.Unlock()
	raw, err := d.seal(r)
	if err != nil {
		raw, err = d.seal(wire.Report{Order: order, Seq: r.Seq, State: wire.Failed, Code: wire.CodeInternal, Reason: err.Error()})
	}
	e := entry{Order: order, Seq: r.Seq, Expires: expires, Report: raw}
	if err == nil {
		err = d.journal.put(e) // outside the lock: it waits for the disk
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.inFlight, order)
	if err != nil {
		// Unreported: the coordinator sends the order again and it is done
		// again, which handlers bear.
		d.log.Error("an order is done but its report cannot be kept; free some disk space", "order", order, "error", err)
		return
	}
	d.owe(e)
	d.publish(raw)
}

// abandon forgets a running order without a report: the coordinator will send
// it again, or somebody else concludes it.
func (d *dispatcher) abandon(order string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.inFlight, order)
}

// step numbers and sends a report that is not terminal. d.mu is held.
func (d *dispatcher) step(last *wire.Report, r wire.Report) {
	d.seq++
	r.Seq = d.seq
	*last = r
	d.say(r)
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

func (d *dispatcher) seal(r wire.Report) ([]byte, error) {
	r.Device = d.id.ID
	r.At, r.TimeConfidence = d.clock.Read()
	return wire.Seal(d.id.key, wire.TypeReport, r)
}

const (
	firstResend = 2 * time.Second
	lastResend  = time.Minute
)

func (d *dispatcher) owe(e entry) {
	d.owed[e.Order] = &debt{entry: e, next: time.Now().Add(firstResend), wait: firstResend}
	d.nudge()
}

func (d *dispatcher) nudge() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

func (d *dispatcher) acknowledged(a wire.Ack) error {
	if a.Device != d.id.ID {
		return fmt.Errorf("an acknowledgement for device %s was ignored", a.Device)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var failed error
	for _, r := range a.Reports {
		if o, ok := d.owed[r.Order]; ok && o.entry.Seq == r.Seq {
			delete(d.owed, r.Order)
			failed = errors.Join(failed, d.journal.acked(r.Order, r.Seq))
		}
	}
	return failed
}

// resend sends owed reports again, with a growing and jittered wait, until ctx ends.
func (d *dispatcher) resend(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.changed:
		case <-timer.C:
		}
		timer.Reset(d.resendDue(time.Now()))
	}
}

// resendDue sends what is due and says how long until the next is.
func (d *dispatcher) resendDue(now time.Time) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	soonest := lastResend
	for _, o := range d.owed {
		if !o.next.After(now) {
			d.publish(o.entry.Report)
			o.wait = min(2*o.wait, lastResend)
			o.next = now.Add(o.wait/2 + rand.N(o.wait)) // half to one and a half
		}
		soonest = min(soonest, o.next.Sub(now))
	}
	return max(soonest, 10*time.Millisecond)
}

// reconnected sends everything owed at once: the last link may have lost it.
func (d *dispatcher) reconnected() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range d.owed {
		o.next, o.wait = time.Now(), firstResend
	}
	d.nudge()
}

// wait blocks until running handlers have returned.
func (d *dispatcher) wait() { d.wg.Wait() }
