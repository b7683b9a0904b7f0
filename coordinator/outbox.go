package coordinator

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// outbox keeps each order until its device's signed terminal report is here,
// and sends it until then. The broker between is a pipe: nothing is asked of
// its memory.
//
// Open orders are in memory, ended ones in the bucket only, which forgets them
// after retention. A terminal state is final, whoever set it: the device by its
// report, or the outbox itself for silence ([codeNoAnswer]) and for a device
// that is retired. What the device says later is kept beside it.
type outbox struct {
	rows    *table[orderRow]
	key     ed25519.PrivateKey
	publish func(d wire.DeviceID, raw []byte) error
	online  func(wire.DeviceID) bool
	now     func() time.Time
	log     *slog.Logger

	mu    sync.Mutex
	lines map[wire.DeviceID]*line
	due   places[*line] // by time
	kinds map[wire.Kind]map[*pending]wire.DeviceID
	ended recent

	// updates is told of each order to update a device, at the start and at each
	// change.
	updates func(wire.DeviceID, string, orderRow)
	// undropped is told of each order to drop that a device did not answer in time, at
	// the start and when it ends.
	undropped func(wire.DeviceID, string)
	// jobEnded is told of the first final report on each job.
	jobEnded func(wire.Report)
	// member tells whether a device still belongs to the fleet.
	member func(wire.DeviceID) bool
	// unknown counts reports on orders that are not known.
	unknown complaints

	hold  time.Duration // see ackHold
	ackMu sync.Mutex
	acks  []heldAck   // not sent yet, the oldest first
	acked time.Time   // when the last were
	timer *time.Timer // that will send them; nil: none
}

func newOutbox(key ed25519.PrivateKey, publish func(wire.DeviceID, []byte) error, online func(wire.DeviceID) bool, now func() time.Time, log *slog.Logger) *outbox {
	return &outbox{hold: ackHold, updates: func(wire.DeviceID, string, orderRow) {}, undropped: func(wire.DeviceID, string) {}, jobEnded: func(wire.Report) {}, member: func(wire.DeviceID) bool { return true }, key: key, publish: publish, online: online, now: now, log: log,
		lines: make(map[wire.DeviceID]*line), kinds: make(map[wire.Kind]map[*pending]wire.DeviceID), ended: newRecent(recentOrders),
		due: places[*line]{at: func(l *line) *int { return &l.place }, less: func(a, b *line) bool { return a.due.Before(b.due) }}}
}

// openRows opens the bucket of orders.
func (o *outbox) openRows(ctx context.Context, kv jetstream.KeyValue) (err error) {
	o.rows, err = openTable(ctx, kv, "order", o.track, loggingTo[orderRow](o.log), flat[orderRow](), encoded(orderRow.encode), keeping(func(v orderRow) bool { return !v.State.Terminal() }))
	return err
}

// orderRow is an order as it is kept. Order and report stand in it once, as
// they were signed; beside them is what is asked for often. Its key is the
// device and the order's id.
type orderRow struct {
	Kind     wire.Kind       `json:"kind"`
	Of       string          `json:"of,omitempty"` // the task that it was made for, of a customer's job; see taskKey
	Expires  time.Time       `json:"expires"`
	Envelope json.RawMessage `json:"envelope,omitempty"` // the signed order, sent as it is every time
	State    wire.State      `json:"state"`
	Seq      uint64          `json:"seq,omitempty"`
	Progress float64         `json:"progress,omitempty"`
	Code     string          `json:"code,omitempty"`
	Updated  time.Time       `json:"updated"`
	Report   json.RawMessage `json:"report,omitempty"` // the device's signed report of the last state
	// Reason is set where the coordinator itself has ended the order.
	Reason string          `json:"reason,omitempty"`
	Late   json.RawMessage `json:"late,omitempty"` // the device's signed end, where that came too late
	Cancel *api.Cancel     `json:"cancel,omitempty"`
}

// encode writes a record. What was signed is JSON that was checked when it was
// made or opened, and goes in as it stands.
func (v orderRow) encode() ([]byte, error) {
	signed := []struct {
		name string
		raw  json.RawMessage
	}{{`,"envelope":`, v.Envelope}, {`,"report":`, v.Report}, {`,"late":`, v.Late}}
	v.Envelope, v.Report, v.Late = nil, nil, nil
	out, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	out = out[:len(out)-1]
	for _, s := range signed {
		if len(s.raw) > 0 {
			out = append(append(out, s.name...), s.raw...)
		}
	}
	return append(out, '}'), nil
}

// OrderRecord is one order and what became of it.
type OrderRecord struct {
	orderRow
	Order  wire.Order
	Result wire.Report // the last one, or what the coordinator says in its place
}

// kind is what the outbox knows of one kind of order.
type kind struct {
	life  time.Duration // where who asks does not say
	quiet time.Duration // how long one that the device has reported on may be silent until it is asked again
}

var kinds = map[wire.Kind]kind{
	wire.KindChunkStore:    {life: storeLife, quiet: time.Minute},
	wire.KindChunkServe:    {life: serveLife, quiet: 20 * time.Second},
	wire.KindChunkDrop:     {life: dropLife, quiet: time.Minute},
	wire.KindChunkLosses:   {life: 10 * time.Minute, quiet: 15 * time.Second},
	wire.KindChunkHoldings: {life: 10 * time.Minute, quiet: 15 * time.Second},
	wire.KindAudit:         {life: auditLife, quiet: 15 * time.Second},
	wire.KindJobRun:        {life: jobLife, quiet: time.Minute},
	wire.KindUpdateInstall: {life: offerLife, quiet: 10 * time.Minute},
	wire.KindOrderCancel:   {quiet: 10 * time.Second}, // lives as long as what it cancels
	wire.KindConfigApply:   {life: 7 * 24 * time.Hour, quiet: time.Minute},
	wire.KindPing:          {life: time.Minute, quiet: 5 * time.Second},
	wire.KindIdentify:      {life: time.Minute, quiet: 5 * time.Second},
	wire.KindInventory:     {life: 10 * time.Minute, quiet: 15 * time.Second},
	wire.KindHistory:       {life: 2 * time.Minute, quiet: 15 * time.Second},
}

// kindOf also answers for kinds of extensions.
func kindOf(k wire.Kind) kind {
	if v, ok := kinds[k]; ok {
		return v
	}
	return kind{life: time.Hour, quiet: time.Minute}
}

const (
	sweep = 500 * time.Millisecond
	// retention is how long an order can be looked up, counted from the last
	// change of it.
	retention = 30 * 24 * time.Hour
	// maxLife leaves time for an order to end before it is forgotten.
	maxLife = retention - 24*time.Hour
	// maxEndings bounds what one sweep ends, so that it does not hold up sending.
	maxEndings = 1000
	// ackHold is how long after its report was written an ack is held: then the
	// state has been synced, and no power cut takes the report. A sync begins
	// orderSync after the last has ended, and one that was under way may have
	// missed the report: so there is time for two of up to slowSync. ackPause is
	// the least time between two rounds of acks. A device sends its reports again
	// after ten seconds at the earliest.
	slowSync  = 2 * time.Second
	ackHold   = orderSync + 2*slowSync
	ackPause  = 200 * time.Millisecond
	maxAcks   = 500     // in one message: some 30 KiB
	maxReason = 1 << 10 // bytes of a device's sentence that are shown
)

// codeNoAnswer is the code of an order that the coordinator gave up on.
const codeNoAnswer = "no_answer"

// orderKey: the device first, so that a device's orders are found together.
func orderKeyOf(d wire.DeviceID, id string) string { return string(d) + "." + id }

func parseOrderKey(key string) (wire.DeviceID, string) {
	d, id, _ := strings.Cut(key, ".")
	return wire.DeviceID(d), id
}

// open takes a record apart.
func (v orderRow) open() (OrderRecord, error) {
	rec := OrderRecord{orderRow: v}
	var err error
	if rec.Order, err = wire.Reread[wire.Order](v.Envelope); err != nil {
		return rec, fmt.Errorf("an order's record is damaged: %w", err)
	}
	switch {
	case v.Reason != "":
		rec.Result = wire.Report{Order: rec.Order.ID, Device: rec.Order.Device, State: v.State, Code: v.Code, Reason: v.Reason, At: v.Updated}
	case len(v.Report) > 0:
		if rec.Result, err = wire.Reread[wire.Report](v.Report); err != nil {
			return rec, fmt.Errorf("the report of order %s is damaged: %w", rec.Order.ID, err)
		}
		rec.Result.Code, rec.Result.Reason = label(rec.Result.Code), sentence(rec.Result.Reason)
	}
	return rec, nil
}

// sentence is what a device says to a person, fit for a log and a terminal.
func sentence(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r == utf8.RuneError || !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s[:min(len(s), maxReason)])
	return strings.TrimSpace(s)
}

// view is the record as operators see it.
func (v OrderRecord) view() api.Order {
	return api.Order{Order: v.Order, State: v.State, Progress: v.Progress, Result: v.Result, Report: v.Report, Late: v.Late, Cancel: v.Cancel, Updated: v.Updated}
}

// get looks an order up; errNotFound if there is none, or not any more.
func (o *outbox) get(ctx context.Context, d wire.DeviceID, id string) (OrderRecord, error) {
	v, err := o.rows.find(ctx, orderKeyOf(d, id))
	if err != nil {
		return OrderRecord{}, err
	}
	return v.open()
}

// track follows the records; it is the table's onEach.
func (o *outbox) track(key string, v orderRow, gone bool) {
	d, id := parseOrderKey(key)
	switch {
	case gone:
	case v.Kind == wire.KindUpdateInstall:
		o.updates(d, id, v)
	case v.Kind == wire.KindChunkDrop && v.State == wire.TimedOut:
		o.undropped(d, id)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	l, p := o.of(d, id)
	switch {
	case gone || v.State.Terminal():
		if p != nil {
			l.remove(p)
			delete(o.kinds[p.kind], p)
			o.settle(l)
		}
		if gone {
			o.ended.forget(id)
		} else {
			o.ended.add(key, v)
		}
	case p == nil:
		if l == nil {
			l = newLine(d)
			o.lines[d] = l
		}
		p = &pending{id: id, kind: v.Kind, expires: v.Expires, state: v.State, seq: v.Seq}
		if o.kinds[p.kind] == nil {
			o.kinds[p.kind] = make(map[*pending]wire.DeviceID)
		}
		o.kinds[p.kind][p] = d
		l.add(p, o.now())
		o.settle(l)
	case v.Seq != p.seq:
		p.seq, p.state = v.Seq, v.State
		l.heard(p, o.now())
		o.settle(l)
	}
}

// of finds a device's line and an order in it; nil if there is none. o.mu is held.
func (o *outbox) of(d wire.DeviceID, id string) (*line, *pending) {
	l := o.lines[d]
	if l == nil {
		return nil, nil
	}
	return l, l.orders[id]
}

// settle puts a line that has changed in its place. o.mu is held.
func (o *outbox) settle(l *line) {
	if len(l.orders) == 0 {
		o.due.drop(l)
		delete(o.lines, l.device)
		return
	}
	l.settle()
	o.due.put(l)
}

// submit signs an order, keeps it, and sends it if the device is there. Once it
// returns, the order will be answered or time out, whatever restarts between.
func (o *outbox) submit(ctx context.Context, d wire.DeviceID, kind wire.Kind, body any, life time.Duration) (wire.Order, error) {
	v, err := o.submitAs(ctx, ulid.Make().String(), d, kind, body, life)
	return v.Order, err
}

// submitAs is submit with the id given: if there is such an order, that is what
// it returns.
func (o *outbox) submitAs(ctx context.Context, id string, d wire.DeviceID, kind wire.Kind, body any, life time.Duration) (OrderRecord, error) {
	return o.submitOf(ctx, "", id, d, kind, body, life)
}

// submitOf is submitAs for a task.
func (o *outbox) submitOf(ctx context.Context, of, id string, d wire.DeviceID, kind wire.Kind, body any, life time.Duration) (OrderRecord, error) {
	if life <= 0 || life > maxLife {
		return OrderRecord{}, refuse(http.StatusBadRequest, "bad_life", "an order lives for up to %d days, not %s", maxLife/(24*time.Hour), life)
	}
	raw, err := json.Marshal(body)
	if err != nil {
		return OrderRecord{}, fmt.Errorf("encode the %s order: %w", kind, err)
	}
	now := o.now().UTC()
	order := wire.Order{ID: id, Device: d, Kind: kind, Issued: now, Expires: now.Add(life), Body: raw}
	env, err := wire.Seal(o.key, wire.TypeOrder, order)
	if errors.Is(err, wire.ErrTooLarge) {
		return OrderRecord{}, refuse(http.StatusRequestEntityTooLarge, "too_large", "the order cannot be sent: %v", err)
	}
	if err != nil {
		return OrderRecord{}, err
	}
	row := orderRow{Kind: kind, Of: of, Expires: order.Expires, Envelope: env, State: wire.Queued, Updated: now}
	err = o.rows.create(ctx, orderKeyOf(d, id), row)
	if errors.Is(err, errExists) {
		return o.get(ctx, d, id)
	}
	if err != nil {
		return OrderRecord{}, err
	}
	// Who was retired since it was chosen gets no orders any more, and nobody
	// would end this one before it expires.
	if !o.member(d) {
		if err := o.end(ctx, d, id, wire.Canceled, wire.CodeRetired, "the device was retired while this order was made"); err != nil {
			return OrderRecord{}, err
		}
		return o.get(ctx, d, id)
	}
	o.pump(d)
	return OrderRecord{orderRow: row, Order: order}, nil
}

// report takes a verified report of a device and acknowledges a terminal one
// once it is kept. A terminal state is final; before it, the newest counts.
// A report on an order that is not known (any more) is acknowledged too, or the
// device would send it for ever.
func (o *outbox) report(ctx context.Context, r wire.Report, envelope []byte) error {
	if !r.State.Terminal() && r.State != wire.Queued && r.State != wire.Running {
		return fmt.Errorf("device %s reports the state %q on order %s, which is none", r.Device, r.State, r.Order)
	}
	ended := false
	_, err := o.rows.change(ctx, orderKeyOf(r.Device, r.Order), func(v *orderRow, exists bool) error {
		ended = false
		switch {
		case !exists:
			if n := o.unknown.add(r.Device, o.now()); n > 0 {
				o.log.Warn("a device reports on an order that is not known", "device", r.Device, "order", label(r.Order), "state", r.State, "times", n)
			}
			return errUnchanged
		case v.State.Terminal():
			if v.Reason == "" || len(v.Late) > 0 || !r.State.Terminal() {
				return errUnchanged
			}
			v.Late = envelope
			return nil
		case !r.State.Terminal() && r.Seq <= v.Seq:
			return errUnchanged
		}
		v.State, v.Seq, v.Progress, v.Code, v.Report, v.Updated = r.State, r.Seq, r.Progress, label(r.Code), envelope, o.now().UTC()
		ended = v.Kind == wire.KindJobRun && r.State.Terminal()
		return nil
	})
	if err != nil {
		return err
	}
	if ended {
		o.jobEnded(r)
	}
	if r.State.Terminal() {
		o.ack(r)
	}
	o.answered(r.Device, r.Order)
	return nil
}

// answered makes room in a device's window, which a repeat does too.
func (o *outbox) answered(d wire.DeviceID, id string) {
	o.mu.Lock()
	if l, p := o.of(d, id); p != nil {
		l.heard(p, o.now())
		o.settle(l)
	}
	o.mu.Unlock()
	o.pump(d)
}

// heldAck is the word that a report is safe, before it may be given.
type heldAck struct {
	device wire.DeviceID
	wire.Acked
	since time.Time // when the report was in the store at the latest
}

// ack keeps the word that a report is safe until that is so. Acks leave in
// rounds, not too often: nobody waits for them, and one signature and one message
// serve all that is ripe of a device.
func (o *outbox) ack(r wire.Report) {
	o.ackMu.Lock()
	defer o.ackMu.Unlock()
	o.acks = append(o.acks, heldAck{r.Device, wire.Acked{Order: r.Order, Seq: r.Seq}, time.Now()})
	if o.timer == nil {
		o.nextRound()
	}
}

// nextRound sets the timer for the oldest ack. o.ackMu is held.
func (o *outbox) nextRound() {
	ripe := o.hold - time.Since(o.acks[0].since)
	o.timer = time.AfterFunc(max(ripe, ackPause-time.Since(o.acked)), o.flushAcks)
}

// flushAcks sends the acks that are ripe.
func (o *outbox) flushAcks() {
	o.sendAcks(o.ripe())
}

// closeAcks is the last round. What is not ripe is left unsaid; the report's
// repeat asks for it, as it does for an ack that is lost.
func (o *outbox) closeAcks() {
	acks := o.ripe()
	o.ackMu.Lock()
	o.acks = nil
	if o.timer != nil {
		o.timer.Stop()
	}
	o.ackMu.Unlock()
	o.sendAcks(acks)
}

// ripe takes the acks that may be sent now, and sees to the next round.
func (o *outbox) ripe() map[wire.DeviceID][]wire.Acked {
	o.ackMu.Lock()
	defer o.ackMu.Unlock()
	o.acked = time.Now()
	if o.timer != nil {
		o.timer.Stop()
		o.timer = nil
	}
	ripe := make(map[wire.DeviceID][]wire.Acked)
	n := 0
	for ; n < len(o.acks) && o.acked.Sub(o.acks[n].since) >= o.hold; n++ {
		ripe[o.acks[n].device] = append(ripe[o.acks[n].device], o.acks[n].Acked)
	}
	o.acks = slices.Clone(o.acks[n:])
	if len(o.acks) > 0 {
		o.nextRound()
	}
	return ripe
}

func (o *outbox) sendAcks(acks map[wire.DeviceID][]wire.Acked) {
	for d, all := range acks {
		for len(all) > 0 {
			n := min(len(all), maxAcks)
			raw, err := wire.Seal(o.key, wire.TypeAck, wire.Ack{Device: d, Reports: all[:n]})
			if err == nil {
				err = o.publish(d, raw)
			}
			if err != nil {
				o.log.Warn("reports could not be acknowledged; the device will send them again", "device", d, "error", err)
			}
			all = all[n:]
		}
	}
}

// await blocks until the order is terminal or ctx ends. onProgress may be nil.
func (o *outbox) await(ctx context.Context, order wire.Order, onProgress func(OrderRecord)) (OrderRecord, error) {
	key := orderKeyOf(order.Device, order.ID)
	for {
		changed, leave := o.rows.changed(key)
		v, err := o.get(ctx, order.Device, order.ID)
		if err != nil || v.State.Terminal() {
			leave()
			return v, err
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
	return o.unfinishedBefore(kind, time.Time{})
}

// unfinishedBefore lists those that were named before a time; zero: all.
func (o *outbox) unfinishedBefore(kind wire.Kind, before time.Time) []OrderRecord {
	var keys []string
	o.mu.Lock()
	for p, d := range o.kinds[kind] {
		if id, err := ulid.Parse(p.id); before.IsZero() || err != nil || id.Timestamp().Before(before) {
			keys = append(keys, orderKeyOf(d, p.id))
		}
	}
	o.mu.Unlock()
	var out []OrderRecord
	for _, k := range keys {
		row, ok := o.rows.get(k)
		if !ok || row.State.Terminal() {
			continue
		}
		v, err := row.open()
		if err != nil {
			o.log.Warn("an open order is passed over", "order", k, "error", err)
			continue
		}
		out = append(out, v)
	}
	return out
}

// hello sends a device's pending orders anew: it has just come back. What follows
// too soon waits: whoever repeats hellos makes no more of it than the timers do.
func (o *outbox) hello(d wire.DeviceID) {
	o.mu.Lock()
	if l := o.lines[d]; l != nil {
		l.back(o.now())
		o.settle(l)
	}
	o.mu.Unlock()
	o.pump(d)
}

// pump sends what a device may have now.
func (o *outbox) pump(d wire.DeviceID) {
	o.mu.Lock()
	l := o.lines[d]
	if l == nil {
		o.mu.Unlock()
		return
	}
	ids := l.fill(o.now(), o.online(d))
	o.settle(l)
	o.mu.Unlock()
	o.send(d, ids)
}

// send publishes orders. What cannot be sent is unanswered, and goes again.
func (o *outbox) send(d wire.DeviceID, ids []string) {
	for _, id := range ids {
		v, ok := o.rows.get(orderKeyOf(d, id))
		if !ok {
			continue // ended meanwhile
		}
		if err := o.publish(d, v.Envelope); err != nil {
			o.log.Warn("an order could not be sent; it will be again", "order", id, "error", err)
			return // the link is down: the others would fail alike
		}
	}
}

// run sends again and times out until ctx ends.
func (o *outbox) run(ctx context.Context) {
	t := time.NewTicker(sweep)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			o.step(ctx)
		}
	}
}

// step does what is due.
func (o *outbox) step(ctx context.Context) {
	type batch struct {
		device wire.DeviceID
		ids    []string
	}
	var sends, over []batch
	endings := 0
	now := o.now()
	o.mu.Lock()
	for endings < maxEndings {
		l, ok := o.due.first()
		if !ok || l.due.After(now) {
			break
		}
		var ids []string
		for _, p := range l.overdue(now, storeTimeout) {
			ids = append(ids, p.id)
		}
		endings += len(ids)
		over = append(over, batch{l.device, ids})
		sends = append(sends, batch{l.device, l.fill(now, o.online(l.device))})
		o.settle(l)
	}
	o.mu.Unlock()
	for _, b := range sends {
		o.send(b.device, b.ids)
	}
	for _, b := range over {
		for _, id := range b.ids {
			err := o.end(ctx, b.device, id, wire.TimedOut, codeNoAnswer, "the device did not answer in time; see \"deimos device show\" for when it was last seen")
			if err != nil {
				if ctx.Err() == nil {
					o.log.Warn("orders could not be timed out; they will be tried again", "error", err)
				}
				return
			}
		}
	}
}

// end is the coordinator's own end of an order that is still open.
func (o *outbox) end(ctx context.Context, d wire.DeviceID, id string, s wire.State, code, reason string) error {
	_, err := o.rows.change(ctx, orderKeyOf(d, id), func(v *orderRow, exists bool) error {
		if !exists || v.State.Terminal() {
			return errUnchanged
		}
		v.State, v.Code, v.Reason, v.Updated = s, code, reason, o.now().UTC()
		return nil
	})
	return err
}

// retire ends all open orders of a device that is being sent away: nobody will
// answer them.
func (o *outbox) retire(ctx context.Context, d wire.DeviceID) error {
	var errs []error
	for _, id := range o.openOf(d) {
		errs = append(errs, o.end(ctx, d, id, wire.Canceled, wire.CodeRetired, "the device was retired while this order was open"))
	}
	return errors.Join(errs...)
}

// openOf lists the open orders of a device.
func (o *outbox) openOf(d wire.DeviceID) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	l := o.lines[d]
	if l == nil {
		return nil
	}
	ids := make([]string, 0, len(l.orders))
	for id := range l.orders {
		ids = append(ids, id)
	}
	return ids
}

// cancel asks the device to stop an order, or never to begin it. The order ends
// by the device's own report. Who asks again gets what was asked first, unless
// that has ended and the order has not: the device may have lost it.
func (o *outbox) cancel(ctx context.Context, d wire.DeviceID, id, reason, by string) (OrderRecord, error) {
	over, err := o.cancelOver(ctx, d, id)
	if err != nil {
		return OrderRecord{}, err
	}
	row, err := o.rows.change(ctx, orderKeyOf(d, id), func(v *orderRow, exists bool) error {
		switch {
		case !exists:
			return refuse(http.StatusNotFound, wire.CodeNotFound, "device %s has no order %s", d, id)
		case v.State.Terminal():
			return refuse(http.StatusConflict, "ended", "order %s has ended (%s): it cannot be canceled any more", id, v.State)
		case v.Kind == wire.KindOrderCancel:
			return refuse(http.StatusConflict, "is_cancel", "order %s is itself a cancel; send the other order anew instead", id)
		case v.Cancel != nil && v.Cancel.Order != over:
			return errUnchanged
		}
		v.Cancel = &api.Cancel{Order: ulid.Make().String(), At: o.now().UTC(), By: label(by), Reason: sentence(reason)}
		return nil
	})
	if err != nil {
		return OrderRecord{}, err
	}
	// On record first: a crash between leaves a mark, and who asks again sends
	// the very order that it names.
	life := max(row.Expires.Sub(o.now()), time.Minute)
	if _, err := o.submitAs(ctx, row.Cancel.Order, d, wire.KindOrderCancel, wire.OrderCancel{Order: id, Expires: row.Expires}, min(life, maxLife)); err != nil {
		return OrderRecord{}, err
	}
	return row.open()
}

// cancelOver is the cancel of an order, if there is one and it has ended.
func (o *outbox) cancelOver(ctx context.Context, d wire.DeviceID, id string) (string, error) {
	v, ok := o.rows.get(orderKeyOf(d, id))
	if !ok || v.Cancel == nil {
		return "", nil
	}
	asked, err := o.rows.find(ctx, orderKeyOf(d, v.Cancel.Order))
	switch {
	case errors.Is(err, errNotFound):
		return "", nil // it was not made yet, see cancel
	case err != nil || !asked.State.Terminal():
		return "", err
	}
	return v.Cancel.Order, nil
}
