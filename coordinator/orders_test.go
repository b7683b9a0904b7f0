package coordinator

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// order gives a device an order of a kind that nothing else in the coordinator knows.
func (w *world) order(t testing.TB, d *device, k wire.Kind) wire.Order {
	t.Helper()
	o, err := w.outbox.submit(testContext(t), d.id, k, struct{}{}, time.Hour)
	must(t, err)
	return o
}

const extension wire.Kind = "test.effect"

// drained has somebody take a device's deliveries, however many, and tells how
// many there were.
func (d *device) drained(t testing.TB) *atomic.Int64 {
	var n atomic.Int64
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	go func() {
		for {
			select {
			case <-d.orders:
				n.Add(1)
			case <-d.acks:
			case <-stop:
				return
			}
		}
	}()
	return &n
}

func TestADeviceIsNeverGivenMoreThanItsWindow(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	w.freeze() // a slow machine must not send anything again
	d.on(extension, silent)
	var sent []wire.Order
	for range window + 10 {
		sent = append(sent, w.order(t, d, extension))
	}
	for i := range window {
		if o := next(t, d.orders, "an order of the window"); o.ID != sent[i].ID {
			t.Fatalf("order %d is %s, want %s", i, o.ID, sent[i].ID)
		}
	}
	d.fence(t) // acks come the same way
	if n := len(d.orders); n != 0 {
		t.Fatalf("%d orders beyond the window were sent", n)
	}
	// A report of any kind makes room for one, a repeat of it for none.
	running := wire.Report{Order: sent[0].ID, Device: d.id, Seq: 1, State: wire.Running}
	d.say(wire.ChannelReport, wire.TypeReport, running)
	if o := next(t, d.orders, "the next order"); o.ID != sent[window].ID {
		t.Errorf("%s, want %s", o.ID, sent[window].ID)
	}
	d.say(wire.ChannelReport, wire.TypeReport, running)
	d.fence(t)
	if n := len(d.orders); n != 0 {
		t.Errorf("a repeat made room for %d orders", n)
	}
	d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: sent[1].ID, Device: d.id, Seq: 1, State: wire.Failed, Code: "x"})
	if o := next(t, d.orders, "the one after"); o.ID != sent[window+1].ID {
		t.Errorf("%s, want %s", o.ID, sent[window+1].ID)
	}
}

// Hellos that are repeated, copies or not, make no flood of orders; and no device
// that comes back twice has to wait for longer than the first retry.
func TestRepeatedHellosMakeFewOrders(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	w.freeze() // a slow machine must not send anything again
	d.on(extension, silent)
	var sent []wire.Order
	for range window {
		sent = append(sent, w.order(t, d, extension))
	}
	for range sent {
		next(t, d.orders, "an order")
	}
	hello := wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: newNonce(), Capacity: d.capacity}
	for range 10 {
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, hello)
	}
	for i := range 10 {
		hello.Nonce, hello.Session = newNonce(), fmt.Sprint(i)
		d.session = hello.Session
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, hello)
	}
	for range window { // the fence may overtake them
		next(t, d.orders, "an order once more")
	}
	d.fence(t)
	if n := len(d.orders); n != 0 {
		t.Fatalf("%d orders were sent for 20 hellos, want %d", window+n, window)
	}
	w.advance(firstRetry / 2)
	w.outbox.step(testContext(t))
	d.fence(t)
	if n := len(d.orders); n != 0 {
		t.Fatalf("%d orders came too soon", n)
	}
	w.advance(firstRetry / 2)
	w.outbox.step(testContext(t))
	for range window {
		next(t, d.orders, "an order for the hellos that had to wait")
	}
}

// Orders that a device never answers must not hold up others for ever.
func TestUnansweredOrdersYieldToFreshOnes(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	w.freeze() // a slow machine must not send anything again
	d.on(extension, silent)
	for range window {
		w.order(t, d, extension)
	}
	last := w.order(t, d, extension)
	for range window {
		if o := next(t, d.orders, "the window"); o.ID == last.ID {
			t.Fatal("the window was overrun")
		}
	}
	w.advance(2 * firstRetry)
	d.orderOf(last.ID)
}

func TestUrgentKindsGoFirst(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	for _, k := range []wire.Kind{extension, wire.KindPing, wire.KindOrderCancel, wire.KindUpdateInstall, extension} {
		w.order(t, d, k)
		d.on(k, silent)
	}
	d.connect(w)
	defer d.leave()
	var got []wire.Kind
	for range 5 {
		got = append(got, next(t, d.orders, "an order").Kind)
	}
	if want := []wire.Kind{wire.KindPing, wire.KindOrderCancel, wire.KindUpdateInstall, extension, extension}; !slices.Equal(got, want) {
		t.Errorf("they came as %v", got)
	}
	must(t, w.outbox.retire(testContext(t), d.id))
}

// A device comes back to thousands of orders, and the coordinator restarts in
// the middle: each order is done once, and none is lost.
func TestThousandsOfPendingOrdersAreAllDoneOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	d := w.enrolled(t)
	total := 3000
	if testing.Short() {
		total = 600
	}
	var orders []wire.Order
	for range total {
		orders = append(orders, w.order(t, d, extension))
	}
	var mu sync.Mutex
	done := make(map[string]int)
	half := make(chan struct{})
	d.on(extension, func(o wire.Order) *reply {
		mu.Lock()
		defer mu.Unlock()
		if done[o.ID]++; len(done) == total/2 {
			close(half)
		}
		return &reply{state: wire.Succeeded}
	})
	d.drained(t)
	d.connect(w)
	next(t, half, "half of the orders")
	d.hangUp(0)
	w.Close()

	w = open(t, dir)
	defer w.Close()
	d.connect(w)
	defer d.leave()
	for _, o := range orders {
		if v := w.ended(t, o); v.State != wire.Succeeded {
			t.Fatalf("%s is %s", o.ID, v.State)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	for id, n := range done {
		if n != 1 {
			t.Errorf("%s was done %d times", id, n)
		}
	}
	if len(done) != total {
		t.Errorf("%d of %d orders were done", len(done), total)
	}
	w.outbox.mu.Lock()
	defer w.outbox.mu.Unlock()
	if len(w.outbox.lines) != 0 || w.outbox.due.Len() != 0 || len(w.outbox.kinds[extension]) != 0 {
		t.Errorf("left behind: %d lines, %d due, %d of the kind", len(w.outbox.lines), w.outbox.due.Len(), len(w.outbox.kinds[extension]))
	}
}

func TestEndedOrdersAreNotHeldInMemory(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	d.on(extension, func(wire.Order) *reply { return &reply{state: wire.Succeeded, body: "yes"} })
	o := w.order(t, d, extension)
	if v := w.ended(t, o); string(v.Result.Body) != `"yes"` {
		t.Errorf("%+v", v.Result)
	}
	if _, ok := w.outbox.rows.get(orderKeyOf(d.id, o.ID)); ok {
		t.Error("an ended order is still in the copy")
	}
	st, err := w.outbox.rows.kv.Status(testContext(t))
	must(t, err)
	if st.TTL() != retention {
		t.Errorf("the bucket keeps orders for %s", st.TTL())
	}
	// What would be forgotten before it ends is not taken.
	_, err = w.outbox.submit(testContext(t), d.id, extension, struct{}{}, retention)
	if err == nil {
		t.Error("an order may live longer than it is kept")
	}
	// And what the bucket has forgotten is not there.
	must(t, w.outbox.rows.kv.Purge(testContext(t), orderKeyOf(d.id, o.ID)))
	_, err = w.op.Order(testContext(t), d.id, o.ID, 0)
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
}

// cancels makes a device stop an order when it is told to, which ends by its
// own report.
func (d *device) cancels(t testing.TB) {
	d.on(wire.KindOrderCancel, func(o wire.Order) *reply {
		b, err := wire.DecodeBody[wire.OrderCancel](o)
		if err != nil {
			t.Error(err)
		}
		raw, err := wire.Seal(d.key, wire.TypeReport, wire.Report{Order: b.Order, Device: d.id, Seq: 99, State: wire.Canceled, Code: wire.CodeCanceled, Reason: "it was taken back"})
		if err != nil {
			t.Error(err)
		}
		d.mu.Lock()
		d.done[b.Order] = raw
		d.mu.Unlock()
		d.mqtt.Publish(wire.Topic(d.id, wire.ChannelReport), 0, false, raw)
		return &reply{state: wire.Succeeded, body: wire.CancelResult{State: wire.Canceled}}
	})
}

func TestACancelEndsAnOrderByTheDevicesReport(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d := w.enrolled(t)
	d.on(extension, silent)
	d.cancels(t)
	never := w.order(t, d, extension) // never delivered
	asked, err := w.op.CancelOrder(ctx, d.id, never.ID, api.CancelRequest{Reason: "a mis\x1btake"})
	if err != nil || asked.State != wire.Queued || asked.Cancel == nil || asked.Cancel.Reason != "a mistake" || asked.Cancel.By == "" {
		t.Fatalf("%+v %v", asked, err)
	}
	again, err := w.op.CancelOrder(ctx, d.id, never.ID, api.CancelRequest{Reason: "another"})
	if err != nil || again.Cancel == nil || *again.Cancel != *asked.Cancel {
		t.Errorf("asked again: %+v %v", again.Cancel, err)
	}
	if n := w.outbox.openOfKind(d.id, wire.KindOrderCancel); n != 1 {
		t.Errorf("%d orders to cancel are out", n)
	}
	d.connect(w)
	defer d.leave()
	if o := next(t, d.orders, "the cancel"); o.ID != asked.Cancel.Order {
		t.Errorf("first came %s %s", o.Kind, o.ID)
	}
	if v := w.ended(t, never); v.State != wire.Canceled || v.Result.Code != wire.CodeCanceled || len(v.Report) == 0 {
		t.Errorf("%+v", v.Result)
	}
	running := w.order(t, d, extension)
	d.orderOf(running.ID)
	d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: running.ID, Device: d.id, Seq: 1, State: wire.Running, Progress: 0.25})
	eventually(t, "it runs", func() bool { return w.record(t, running).State == wire.Running })
	if _, err := w.op.CancelOrder(ctx, d.id, running.ID, api.CancelRequest{}); err != nil {
		t.Fatal(err)
	}
	if v := w.ended(t, running); v.State != wire.Canceled || v.Cancel == nil {
		t.Errorf("%+v", v)
	}
	_, err = w.op.CancelOrder(ctx, d.id, running.ID, api.CancelRequest{})
	wantRefusal(t, err, http.StatusConflict, "ended")
	_, err = w.op.CancelOrder(ctx, d.id, asked.Cancel.Order, api.CancelRequest{})
	if err == nil {
		t.Error("a cancel was canceled")
	}
	_, err = w.op.CancelOrder(ctx, d.id, "none", api.CancelRequest{})
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
}

// A device can lose a cancel that it has answered, in a crash: who asks again has
// it told once more.
func TestACancelThatHasEndedCanBeGivenAgain(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	d.on(extension, silent)
	d.on(wire.KindOrderCancel, func(wire.Order) *reply {
		return &reply{state: wire.Succeeded, body: wire.CancelResult{State: wire.Running}}
	})
	o := w.order(t, d, extension)
	first, err := w.op.CancelOrder(ctx, d.id, o.ID, api.CancelRequest{})
	must(t, err)
	w.ended(t, wire.Order{Device: d.id, ID: first.Cancel.Order})
	d.cancels(t)
	second, err := w.op.CancelOrder(ctx, d.id, o.ID, api.CancelRequest{Reason: "really"})
	if err != nil || second.Cancel.Order == first.Cancel.Order || second.Cancel.Reason != "really" {
		t.Fatalf("%+v %v", second.Cancel, err)
	}
	if v := w.ended(t, o); v.State != wire.Canceled {
		t.Errorf("%+v", v.Result)
	}
}

// A crash can come between the mark and the order that it names: who asks again
// has it sent.
func TestACancelThatWasCutOffIsSentByTheNext(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	o := w.order(t, d, extension)
	mark := &api.Cancel{Order: "01J00000000000000000000000", At: time.Now().UTC()}
	_, err := w.outbox.rows.change(testContext(t), orderKeyOf(d.id, o.ID), func(v *orderRow, _ bool) error { v.Cancel = mark; return nil })
	must(t, err)
	v, err := w.op.CancelOrder(testContext(t), d.id, o.ID, api.CancelRequest{})
	if err != nil || v.Cancel.Order != mark.Order {
		t.Fatalf("%+v %v", v.Cancel, err)
	}
	if got := w.record(t, wire.Order{Device: d.id, ID: mark.Order}); got.Kind != wire.KindOrderCancel {
		t.Errorf("%+v", got)
	}
	must(t, w.outbox.retire(testContext(t), d.id))
}

func TestOrdersOfARetiredDeviceEnd(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	a, b := w.order(t, d, extension), w.order(t, d, wire.KindPing)
	must(t, w.outbox.retire(testContext(t), d.id))
	for _, o := range []wire.Order{a, b} {
		if v := w.record(t, o); v.State != wire.Canceled || v.Result.Code != wire.CodeRetired || v.Result.Reason == "" {
			t.Errorf("%+v", v.Result)
		}
	}
	if n := w.outbox.openOf(d.id); len(n) != 0 {
		t.Errorf("open: %v", n)
	}
}

func TestReportsThatCameTogetherShareAnAck(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	var acks []wire.Ack
	o := newOutbox(w.outbox.key, func(_ wire.DeviceID, raw []byte) error {
		a, err := wire.Reread[wire.Ack](raw)
		acks = append(acks, a)
		return err
	}, w.outbox.online, w.outbox.now, w.log)
	for i := range maxAcks + 1 {
		o.acks = append(o.acks, heldAck{d.id, wire.Acked{Order: fmt.Sprintf("%026d", i), Seq: uint64(i)}, time.Now().Add(-ackHold)})
	}
	o.flushAcks()
	if len(acks) != 2 || len(acks[0].Reports) != maxAcks || len(acks[1].Reports) != 1 || acks[0].Device != d.id {
		t.Fatalf("%d acks for %d reports", len(acks), maxAcks+1)
	}
	o.flushAcks()
	if len(acks) != 2 {
		t.Error("a report was acknowledged twice")
	}
}

func ids(l api.OrderList) (out []string) {
	for _, o := range l.Orders {
		out = append(out, o.ID)
	}
	return out
}

func TestOrdersAreListedNewestFirst(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d, e := w.device(t), w.enrolled(t)
	d.on(extension, func(wire.Order) *reply { return &reply{state: wire.Rejected, code: wire.CodePolicy} })
	var all []string
	for range 3 {
		o := w.order(t, d, extension)
		w.ended(t, o)
		all = append(all, o.ID)
	}
	for range 2 {
		all = append(all, w.order(t, e, wire.KindPing).ID)
	}
	slices.Reverse(all)
	for name, c := range map[string]struct {
		q    api.OrderQuery
		want []string
		cut  bool
	}{
		"all":                 {api.OrderQuery{}, all, false},
		"some":                {api.OrderQuery{Limit: 3}, all[:3], true},
		"pending":             {api.OrderQuery{Pending: true}, all[:2], false},
		"a state":             {api.OrderQuery{State: wire.Rejected}, all[2:], false},
		"a kind":              {api.OrderQuery{Kind: wire.KindPing}, all[:2], false},
		"one":                 {api.OrderQuery{ID: all[4]}, all[4:], false},
		"a device":            {api.OrderQuery{Selector: api.Selector{Devices: []wire.DeviceID{d.id}}}, all[2:], false},
		"two of a device":     {api.OrderQuery{Limit: 2, Selector: api.Selector{Devices: []wire.DeviceID{d.id}}}, all[2:4], true},
		"pending of a device": {api.OrderQuery{Pending: true, Selector: api.Selector{Devices: []wire.DeviceID{d.id}}}, nil, false},
		"two devices":         {api.OrderQuery{Selector: api.Selector{Devices: []wire.DeviceID{d.id, e.id}}}, all, false},
	} {
		list, err := w.op.Orders(ctx, c.q)
		if err != nil || !slices.Equal(ids(list), c.want) || (list.Cut != "") != c.cut {
			t.Errorf("%s: %v %q (%v), want %v", name, ids(list), list.Cut, err, c.want)
		}
	}
	for name, q := range map[string]api.OrderQuery{
		"all in parts": {Limit: 2}, "pending in parts": {Limit: 1, Pending: true}, "a device's in parts": {Limit: 2, Selector: api.Selector{Devices: []wire.DeviceID{d.id}}},
	} {
		var got []string
		for range all {
			list, err := w.op.Orders(ctx, q)
			must(t, err)
			got = append(got, ids(list)...)
			if q.Before = list.Next; q.Before == "" {
				break
			}
		}
		want := map[bool][]string{true: all[:2], false: all}[q.Pending]
		if len(q.Devices) > 0 {
			want = all[2:]
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	_, err := w.op.Orders(ctx, api.OrderQuery{Before: "yesterday"})
	wantRefusal(t, err, http.StatusBadRequest, "bad_query")
	list, err := w.op.Orders(ctx, api.OrderQuery{State: wire.Rejected})
	must(t, err)
	if s := list.Orders[0]; s.Device != d.id || s.Code != wire.CodePolicy || s.Updated.IsZero() {
		t.Errorf("%+v", s)
	}
	_, err = w.op.Orders(ctx, api.OrderQuery{State: "DONE"})
	wantRefusal(t, err, http.StatusBadRequest, "bad_query")
	_, err = w.op.Orders(ctx, api.OrderQuery{Limit: api.MaxOrders + 1})
	wantRefusal(t, err, http.StatusBadRequest, "bad_query")
}

func TestTheIndexOfEndedOrdersIsBounded(t *testing.T) {
	o := newOutbox(nil, nil, nil, time.Now, nil)
	o.ended = newRecent(3)
	for i := range 5 {
		o.ended.add(orderKeyOf("d", fmt.Sprint(i)), orderRow{State: wire.Failed})
	}
	o.ended.add(orderKeyOf("d", "4"), orderRow{State: wire.Failed, Code: "late"}) // the same again
	o.ended.forget("3")
	list := o.list(nil, api.OrderQuery{Limit: 10})
	if got := ids(list); !slices.Equal(got, []string{"4", "2"}) || list.Orders[0].Code != "late" || list.Cut == "" {
		t.Errorf("%v %q", got, list.Cut)
	}
	if len(o.ended.at) != 2 || len(o.ended.ring) != 3 {
		t.Errorf("%d places, %d in the ring", len(o.ended.at), len(o.ended.ring))
	}
}

func TestOrdersSentByHand(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d, e := w.enrolled(t), w.enrolled(t)
	for k := range services {
		_, err := w.op.SendOrder(ctx, api.SendRequest{Kind: k, Selector: api.Selector{Devices: []wire.DeviceID{d.id}}})
		wantRefusal(t, err, http.StatusBadRequest, "has_service")
	}
	for _, k := range []wire.Kind{"", "A", "a b", wire.Kind(make([]byte, 65))} {
		_, err := w.op.SendOrder(ctx, api.SendRequest{Kind: k, Selector: api.Selector{Devices: []wire.DeviceID{d.id}}})
		wantRefusal(t, err, http.StatusBadRequest, "bad_kind")
	}
	q := api.SendRequest{Kind: extension, Body: json.RawMessage(`{"n":1}`), LifeSeconds: 60, Selector: api.Selector{Devices: []wire.DeviceID{d.id, e.id}}, Key: newNonce()}
	first, err := w.op.SendOrder(ctx, q)
	must(t, err)
	if len(first) != 2 || first[0].Order.ID == first[1].Order.ID || string(first[0].Order.Body) != `{"n":1}` || first[0].Order.Expires.Sub(first[0].Order.Issued) != time.Minute {
		t.Fatalf("%+v", first)
	}
	// The client that lost the answer asks again.
	again, err := w.op.SendOrder(ctx, q)
	if err != nil || len(again) != 2 || again[0].Order.ID != first[0].Order.ID || again[1].Order.ID != first[1].Order.ID {
		t.Errorf("%+v %v", again, err)
	}
	if n := len(w.outbox.openOf(d.id)); n != 1 {
		t.Errorf("the device has %d orders", n)
	}
	q.LifeSeconds = 61
	_, err = w.op.SendOrder(ctx, q)
	wantRefusal(t, err, http.StatusConflict, "key_used")
	q.LifeSeconds, q.Key = 40*24*3600, ""
	_, err = w.op.SendOrder(ctx, q)
	wantRefusal(t, err, http.StatusBadRequest, "bad_life")
	q.LifeSeconds, q.Body = 60, json.RawMessage(`"`+string(slices.Repeat([]byte("x"), wire.MaxMessage))+`"`)
	_, err = w.op.SendOrder(ctx, q)
	wantRefusal(t, err, http.StatusRequestEntityTooLarge, "too_large")
	must(t, w.outbox.retire(ctx, d.id))
	must(t, w.outbox.retire(ctx, e.id))
}
