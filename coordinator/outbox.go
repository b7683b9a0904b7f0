package coordinator

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/wire"
)

// OrderRecord is one order and what became of it.
type OrderRecord struct {
	Order    wire.Order  `json:"order"`
	Envelope []byte      `json:"envelope"` // the signed order, sent as it is every time
	State    wire.State  `json:"state"`
	Seq      uint64      `json:"seq"`
	Progress float64     `json:"progress,omitempty"`
	Report   []byte      `json:"report,omitempty"` // the device's signed report of the last state
	Result   wire.Report `json:"result,omitzero"`  // the same, opened
	Updated  time.Time   `json:"updated"`
	Used     bool        `json:"used,omitempty"` // its attachment was used and dropped
}

// outbox keeps each order until its device's signed terminal report is here,
// and sends it until then. The broker between is a pipe: nothing is asked of
// its memory.
type outbox struct {
	rows    *table[OrderRecord]
	key     ed25519.PrivateKey
	publish func(d wire.DeviceID, raw []byte) error
	online  func(wire.DeviceID) bool
	now     func() time.Time
	log     *slog.Logger

	mu      sync.Mutex
	pending map[string]*sending // by order id
}

// sending is when a pending order goes out again.
type sending struct {
	device  wire.DeviceID
	kind    wire.Kind
	expires time.Time
	next    time.Time
	wait    time.Duration
}

const (
	firstRetry = 3 * time.Second
	lastRetry  = time.Minute
	// silence is how long after its expiry an order waits for a report that is
	// still on its way.
	silence = 30 * time.Second
	sweep   = 500 * time.Millisecond
	// retention is how long a finished order can be looked up.
	retention = 30 * 24 * time.Hour
)

// codeNoAnswer is the code of an order that the coordinator gave up on.
const codeNoAnswer = "no_answer"

// orderKey: the device first, so that a device's orders are found together.
func orderKeyOf(d wire.DeviceID, id string) string { return string(d) + "." + id }

// track follows the records; it is the table's onEach.
func (o *outbox) track(_ string, v OrderRecord, gone bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	id := v.Order.ID
	if gone || v.State.Terminal() {
		delete(o.pending, id)
		return
	}
	if _, ok := o.pending[id]; !ok {
		o.pending[id] = &sending{device: v.Order.Device, kind: v.Order.Kind, expires: v.Order.Expires, next: o.now().Add(firstRetry), wait: firstRetry}
	}
}

// submit signs an order, keeps it, and sends it for the first time. Once it
// returns, the order will be answered or time out, whatever restarts between.
func (o *outbox) submit(ctx context.Context, d wire.DeviceID, kind wire.Kind, body any, life time.Duration) (wire.Order, error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return wire.Order{}, fmt.Errorf("encode the %s order: %w", kind, err)
	}
	now := o.now().UTC()
	order := wire.Order{ID: ulid.Make().String(), Device: d, Kind: kind, Issued: now, Expires: now.Add(life), Body: raw}
	env, err := wire.Seal(o.key, wire.TypeOrder, order)
	if err != nil {
		return wire.Order{}, err
	}
	_, err = o.rows.change(ctx, orderKeyOf(d, order.ID), func(v *OrderRecord, _ bool) error {
		*v = OrderRecord{Order: order, Envelope: env, State: wire.Queued, Updated: now}
		return nil
	})
	if err != nil {
		return wire.Order{}, err
	}
	if err := o.publish(d, env); err != nil {
		o.log.Warn("an order is kept but could not be sent yet", "order", order.ID, "error", err)
	}
	return order, nil
}

// report takes a verified report of a device and answers a terminal one with an
// ack once it is kept. A terminal state is final; before it, the newest counts.
// A report on an order that is not known (any more) is acknowledged too, or the
// device would send it for ever.
func (o *outbox) report(ctx context.Context, r wire.Report, envelope []byte) error {
	if !r.State.Terminal() && r.State != wire.Queued && r.State != wire.Running {
		return fmt.Errorf("device %s reports the state %q on order %s, which is none", r.Device, r.State, r.Order)
	}
	_, err := o.rows.change(ctx, orderKeyOf(r.Device, r.Order), func(v *OrderRecord, exists bool) error {
		switch {
		case !exists:
			o.log.Warn("a device reports on an order that is not known", "device", r.Device, "order", r.Order, "state", r.State)
			return errUnchanged
		case v.State.Terminal(), !r.State.Terminal() && r.Seq <= v.Seq:
			return errUnchanged
		}
		v.State, v.Seq, v.Progress, v.Result, v.Report, v.Updated = r.State, r.Seq, r.Progress, r, envelope, o.now().UTC()
		return nil
	})
	if err != nil || !r.State.Terminal() {
		return err
	}
	ack, err := wire.Seal(o.key, wire.TypeAck, wire.Ack{Device: r.Device, Reports: []wire.Acked{{Order: r.Order, Seq: r.Seq}}})
	if err != nil {
		return err
	}
	return o.publish(r.Device, ack)
}

// await blocks until the order is terminal or ctx ends. onProgress may be nil.
func (o *outbox) await(ctx context.Context, order wire.Order, onProgress func(OrderRecord)) (OrderRecord, error) {
	key := orderKeyOf(order.Device, order.ID)
	for {
		changed, leave := o.rows.changed(key)
		v, ok := o.rows.get(key)
		if !ok {
			leave()
			return v, errNotFound
		}
		if v.State.Terminal() {
			leave()
			return v, nil
		}
		if onProgress != nil {
			onProgress(v)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			leave()
			return v, ctx.Err()
		}
	}
}

// succeeded gives the result of a terminal order, or its failure as an error.
func succeeded(v OrderRecord) error {
	if v.State == wire.Succeeded {
		return nil
	}
	return &wire.Problem{State: v.State, Code: v.Result.Code, Reason: v.Result.Reason}
}

// unfinished lists the pending orders of one kind.
func (o *outbox) unfinished(kind wire.Kind) []OrderRecord {
	var keys []string
	o.mu.Lock()
	for id, s := range o.pending {
		if s.kind == kind {
			keys = append(keys, orderKeyOf(s.device, id))
		}
	}
	o.mu.Unlock()
	var out []OrderRecord
	for _, k := range keys {
		if v, ok := o.rows.get(k); ok && !v.State.Terminal() {
			out = append(out, v)
		}
	}
	return out
}

// hello sends a device's pending orders at once: it has just come back.
func (o *outbox) hello(d wire.DeviceID) {
	o.mu.Lock()
	for _, s := range o.pending {
		if s.device == d {
			s.next, s.wait = o.now(), firstRetry
		}
	}
	o.mu.Unlock()
	o.sendDue()
}

// run sends again and times out until ctx ends.
func (o *outbox) run(ctx context.Context) {
	t := time.NewTicker(sweep)
	defer t.Stop()
	forgot := o.now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			o.sendDue()
			o.timeOut(ctx)
			if o.now().Sub(forgot) > time.Hour {
				forgot = o.now()
				o.forget(ctx)
			}
		}
	}
}

// sendDue publishes what is due for devices that are there.
func (o *outbox) sendDue() {
	type due struct{ id, key string }
	var list []due
	now := o.now()
	o.mu.Lock()
	for id, s := range o.pending {
		if s.next.After(now) || now.After(s.expires) || !o.online(s.device) {
			continue
		}
		s.wait = min(2*s.wait, lastRetry)
		s.next = now.Add(s.wait/2 + rand.N(s.wait))
		list = append(list, due{id, orderKeyOf(s.device, id)})
	}
	o.mu.Unlock()
	slices.SortFunc(list, func(a, b due) int { return cmp.Compare(a.id, b.id) }) // the oldest first
	for _, e := range list {
		v, ok := o.rows.get(e.key)
		if !ok || v.State.Terminal() {
			continue
		}
		if err := o.publish(v.Order.Device, v.Envelope); err != nil {
			o.log.Warn("an order could not be sent; it will be again", "order", e.id, "error", err)
			return // the link is down: the others would fail alike
		}
	}
}

// timeOut ends orders whose device stayed silent.
func (o *outbox) timeOut(ctx context.Context) {
	var keys []string
	now := o.now()
	o.mu.Lock()
	for id, s := range o.pending {
		if now.After(s.expires.Add(silence)) {
			keys = append(keys, orderKeyOf(s.device, id))
		}
	}
	o.mu.Unlock()
	for _, key := range keys {
		_, err := o.rows.change(ctx, key, func(v *OrderRecord, exists bool) error {
			if !exists || v.State.Terminal() {
				return errUnchanged
			}
			v.State, v.Updated = wire.TimedOut, now.UTC()
			v.Result = wire.Report{Order: v.Order.ID, Device: v.Order.Device, State: wire.TimedOut, Code: codeNoAnswer,
				Reason: "the device did not answer in time; see \"deimos device show\" for when it was last seen"}
			return nil
		})
		if err != nil && !errors.Is(err, context.Canceled) {
			o.log.Warn("an order could not be timed out", "order", key, "error", err)
		}
	}
}

// retire ends all open orders of a device that is being sent away: nobody will
// answer them.
func (o *outbox) retire(ctx context.Context, d wire.DeviceID) error {
	var keys []string
	o.mu.Lock()
	for id, s := range o.pending {
		if s.device == d {
			keys = append(keys, orderKeyOf(d, id))
		}
	}
	o.mu.Unlock()
	var errs []error
	for _, key := range keys {
		_, err := o.rows.change(ctx, key, func(v *OrderRecord, exists bool) error {
			if !exists || v.State.Terminal() {
				return errUnchanged
			}
			v.State, v.Updated = wire.Canceled, o.now().UTC()
			v.Result = wire.Report{Order: v.Order.ID, Device: d, State: wire.Canceled, Code: wire.CodeRetired,
				Reason: "the device was retired while this order was open"}
			return nil
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// forget removes orders that ended longer than retention ago.
func (o *outbox) forget(ctx context.Context) {
	old := o.now().Add(-retention)
	isOld := func(v OrderRecord) bool { return v.State.Terminal() && v.Updated.Before(old) }
	var keys []string
	o.rows.each(func(key string, v OrderRecord) bool {
		if isOld(v) {
			keys = append(keys, key)
		}
		return ctx.Err() == nil
	})
	for _, key := range keys {
		if err := o.rows.remove(ctx, key, isOld); err != nil && !errors.Is(err, errNotFound) {
			o.log.Warn("an old order could not be removed", "order", key, "error", err)
			return
		}
	}
}
