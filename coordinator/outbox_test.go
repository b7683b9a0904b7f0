package coordinator

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// offer gives a device an order that needs nothing else.
func (w *world) offer(t testing.TB, d *device) wire.Order {
	t.Helper()
	w.publish(t, "2.0.0")
	out, err := w.op.Offer(testContext(t), api.OfferRequest{Version: "2.0.0", Target: repo.TargetName("2.0.0"), Selector: api.Selector{Devices: []wire.DeviceID{d.id}}})
	must(t, err)
	return out[0].Order
}

// publish puts a release where a coordinator looks; nobody has signed it.
func (w *world) publish(t testing.TB, version string) {
	t.Helper()
	part := []byte("a part of " + version)
	must(t, w.op.PutRepoFile(testContext(t), bundle.PartPath(sumOf(part)), part))
	must(t, w.putManifest(t, version, part))
}

// putManifest puts a manifest whose only part, packed, is this.
func (w *world) putManifest(t testing.TB, version string, part []byte) error {
	raw := manifestOf(t, version, part)
	return w.op.PutRepoFile(testContext(t), "targets/bundles/"+sumOf(raw)+"."+version+".json", raw)
}

func manifestOf(t testing.TB, version string, part []byte) []byte {
	t.Helper()
	raw, err := json.Marshal(bundle.Manifest{Format: bundle.Format, Version: version, Parts: []bundle.Part{{
		Name: bundle.PartAgent, Platform: bundle.Host(), SHA256: sumOf(part), Size: 1,
		Forms: []bundle.Form{{Encoding: bundle.EncodingZstd, SHA256: sumOf(part), Size: int64(len(part))}},
	}}})
	must(t, err)
	return raw
}

func sumOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func (w *world) record(t testing.TB, o wire.Order) OrderRecord {
	t.Helper()
	v, err := w.outbox.get(testContext(t), o.Device, o.ID)
	must(t, err)
	return v
}

func (w *world) ended(t testing.TB, o wire.Order) OrderRecord {
	t.Helper()
	v, err := w.outbox.await(testContext(t), o, nil)
	must(t, err)
	return v
}

// orderOf takes deliveries until one of this order comes.
func (d *device) orderOf(id string) wire.Order {
	d.t.Helper()
	for {
		if o := next(d.t, d.orders, "order "+id); o.ID == id {
			return o
		}
	}
}

func (d *device) ackOf(id string) wire.Ack {
	d.t.Helper()
	for {
		a := next(d.t, d.acks, "the ack of "+id)
		if slices.ContainsFunc(a.Reports, func(r wire.Acked) bool { return r.Order == id }) {
			return a
		}
	}
}

func TestOrdersSurviveARestartAndGoOutOnHello(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	d := w.enrolled(t)
	first, second := w.offer(t, d), w.offer(t, d)
	w.Close()

	w = open(t, dir)
	defer w.Close()
	d.on(wire.KindUpdateInstall, func(wire.Order) *reply { return &reply{state: wire.Succeeded} })
	d.connect(w)
	defer d.leave()
	if a, b := next(t, d.orders, "the first order"), next(t, d.orders, "the second order"); a.ID != first.ID || b.ID != second.ID {
		t.Errorf("sent %s and %s, given were %s and %s", a.ID, b.ID, first.ID, second.ID)
	}
	for _, o := range []wire.Order{first, second} {
		if v := w.ended(t, o); v.State != wire.Succeeded || v.Order.Issued != o.Issued {
			t.Errorf("%+v", v)
		}
	}
	acked := map[string]bool{} // in any order, together or not
	for len(acked) < 2 {
		for _, r := range next(t, d.acks, "an ack").Reports {
			acked[r.Order] = true
		}
	}
	if !acked[first.ID] || !acked[second.ID] {
		t.Errorf("acknowledged: %v", acked)
	}
}

func TestOrdersAreSentUntilTheyAreAnswered(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	d.on(wire.KindUpdateInstall, silent)
	o := w.offer(t, d)
	d.orderOf(o.ID)
	for range 3 { // nothing happens on the device's side
		w.advance(2 * lastRetry)
		d.orderOf(o.ID)
	}
	d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 1, State: wire.Running, Progress: 0.5})
	eventually(t, "it runs", func() bool { v := w.record(t, o); return v.State == wire.Running && v.Progress == 0.5 })
	// Nothing is left running for ever: it is asked about. The report is on
	// record a moment before its silence is counted, so time goes on until it is.
	eventually(t, "it is asked about", func() bool {
		w.advance(kindOf(o.Kind).quiet)
		select {
		case got := <-d.orders:
			return got.ID == o.ID
		case <-time.After(50 * time.Millisecond):
			return false
		}
	})
	d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 2, State: wire.Succeeded})
	d.ackOf(o.ID)
	if n := len(w.outbox.unfinished(wire.KindUpdateInstall)); n != 0 {
		t.Errorf("%d orders are still to be sent", n)
	}
	// Another order's arrival shows that the pipe was not merely slow. What was sent
	// before the answer may come until the first such has come.
	for _, sentBefore := range []bool{true, false} {
		w.advance(2 * lastRetry)
		w.outbox.step(testContext(t))
		fence := w.offer(t, d)
		for got := next(t, d.orders, "the fence"); got.ID != fence.ID; got = next(t, d.orders, "the fence") {
			if got.ID == o.ID && !sentBefore {
				t.Error("an order that had been answered was sent again")
			}
		}
	}
}

// Reports that must have no effect: each is followed by one that has, on the
// same connection, so that the test knows when the first has been looked at.
func TestReportsOfOthersHaveNoEffect(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, other := w.device(t), w.device(t)
	d.on(wire.KindUpdateInstall, silent)
	other.on(wire.KindUpdateInstall, silent)
	o := w.offer(t, d)
	d.orderOf(o.ID)
	done := wire.Report{Order: o.ID, Device: d.id, Seq: 9, State: wire.Succeeded}

	seal := func(key *device, typ wire.PayloadType, r wire.Report) []byte {
		raw, err := wire.Seal(key.key, typ, r)
		must(t, err)
		return raw
	}
	claims := done
	claims.Device = other.id
	for name, bad := range map[string]struct {
		from *device
		raw  []byte
	}{
		"signed by another":             {d, seal(other, wire.TypeReport, done)},
		"on another's topic":            {other, seal(d, wire.TypeReport, done)},
		"in another's name":             {other, seal(other, wire.TypeReport, done)},
		"signed as something else":      {d, seal(d, wire.TypeBeat, done)},
		"for another device":            {d, seal(d, wire.TypeReport, claims)},
		"by another on another's order": {other, seal(other, wire.TypeReport, claims)},
		"garbage":                       {d, []byte("{}")},
		"an unknown state":              {d, seal(d, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 9, State: "DONE"})},
		"no state":                      {d, seal(d, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 9})},
	} {
		t.Run(name, func(t *testing.T) {
			// By hand: then it has been looked at when the record is.
			w.hear(testContext(t), &nats.Msg{Subject: wire.Subject(bad.from.id, wire.ChannelReport), Data: bad.raw})
			if v := w.record(t, o); v.State != wire.Queued || v.Seq != 0 || v.Report != nil {
				t.Errorf("order is %s with seq %d", v.State, v.Seq)
			}
		})
	}
	d.publish(wire.ChannelReport, seal(d, wire.TypeReport, done))
	if v := w.ended(t, o); v.State != wire.Succeeded {
		t.Errorf("the good one: %+v", v)
	}
}

// fence gives each worker of the coordinator its turn, so that what this device
// has sent before has been looked at.
func (d *device) fence(t testing.TB) {
	t.Helper()
	for range workers + 1 {
		id := "fence" + newNonce()
		d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: id, Device: d.id, Seq: 1, State: wire.Failed})
		d.ackOf(id) // an unknown order is acknowledged
	}
}

func TestReportsOnUnknownOrdersAreAcknowledged(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: "01UNKNOWN", Device: d.id, Seq: 7, State: wire.Succeeded})
	if a := d.ackOf("01UNKNOWN"); a.Reports[0].Seq != 7 || a.Device != d.id {
		t.Errorf("%+v", a)
	}
	if _, err := w.outbox.get(testContext(t), d.id, "01UNKNOWN"); !errors.Is(err, errNotFound) {
		t.Error("a device made an order by reporting on it")
	}
}

func TestTheNewestReportCountsAndATerminalOneIsFinal(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	d.on(wire.KindUpdateInstall, silent)
	o := w.offer(t, d)
	d.orderOf(o.ID)
	say := func(seq uint64, s wire.State, progress float64, code string) {
		raw, err := wire.Seal(d.key, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: seq, State: s, Progress: progress, Code: code})
		must(t, err)
		// By hand: the coordinator's workers could change the order of two messages.
		w.hear(testContext(t), &nats.Msg{Subject: wire.Subject(d.id, wire.ChannelReport), Data: raw})
	}
	want := func(s wire.State, seq uint64) {
		t.Helper()
		if v := w.record(t, o); v.State != s || v.Seq != seq {
			t.Errorf("order is %s with seq %d, want %s %d", v.State, v.Seq, s, seq)
		}
	}
	say(5, wire.Running, 0.5, "")
	say(4, wire.Queued, 0, "")
	say(5, wire.Running, 0.1, "")
	want(wire.Running, 5)
	if p := w.record(t, o).Progress; p != 0.5 {
		t.Errorf("progress went back to %v", p)
	}
	// A device that lost its counter in a restart must still be able to end.
	say(1, wire.Failed, 0, "broken")
	want(wire.Failed, 1)
	say(9, wire.Succeeded, 0, "")
	say(10, wire.Running, 0.9, "")
	want(wire.Failed, 1)
	if v := w.record(t, o); v.Result.Code != "broken" {
		t.Errorf("the result became %+v", v.Result)
	}
}

// The ack promises that the device may forget: so the report must be in the
// state store before.
func TestAckOnlyAfterTheReportIsKept(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	d.on(wire.KindUpdateInstall, silent)
	o := w.offer(t, d)
	d.orderOf(o.ID)
	raw, err := wire.Seal(d.key, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 1, State: wire.Succeeded})
	must(t, err)
	acked := make(chan bool, 1)
	publish := w.outbox.publish
	deaf := newOutbox(w.outbox.key, func(id wire.DeviceID, raw []byte) error {
		e, err := w.outbox.rows.kv.Get(testContext(t), orderKeyOf(o.Device, o.ID))
		acked <- err == nil && strings.Contains(string(e.Value()), string(wire.Succeeded))
		return publish(id, raw)
	}, w.outbox.online, w.outbox.now, w.log)
	deaf.rows = w.outbox.rows
	r, err := wire.OpenAs[wire.Report](raw, d.pub(), wire.TypeReport)
	must(t, err)
	must(t, deaf.report(testContext(t), r, raw))
	if !next(t, acked, "the ack") {
		t.Error("the ack went out before the report was in the store")
	}
	// Without a store there is no ack at all.
	d.leave()
	must(t, w.eng.Close())
	if err := deaf.report(testContext(t), wire.Report{Order: "01OTHER", Device: d.id, State: wire.Succeeded}, raw); err == nil {
		t.Error("a report was taken though the store is gone")
	}
	deaf.hold = 0
	deaf.flushAcks()
	if len(acked) != 0 {
		t.Error("it was acknowledged though the store is gone")
	}
}

func TestSilenceTimesOut(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	d.on(wire.KindUpdateInstall, silent)
	o := w.offer(t, d)
	d.orderOf(o.ID)
	w.freeze()
	w.advance(offerLife + silence/2)
	w.outbox.step(testContext(t))
	if v := w.record(t, o); v.State != wire.Queued {
		t.Errorf("%s before the silence is over", v.State)
	}
	w.advance(silence)
	v := w.ended(t, o)
	if v.State != wire.TimedOut || v.Result.Code != "no_answer" || !strings.Contains(v.Result.Reason, "deimos device show") {
		t.Errorf("%+v", v)
	}
	// The answer that comes after all is acknowledged and changes nothing, however
	// large it is.
	large, err := json.Marshal(strings.Repeat("x", wire.MaxMessage/2+wire.MaxMessage/8))
	must(t, err)
	d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 3, State: wire.Succeeded, Body: large})
	d.ackOf(o.ID)
	if v := w.record(t, o); v.State != wire.TimedOut {
		t.Errorf("a terminal state became %s", v.State)
	}
	if v := w.record(t, o); len(v.Late) == 0 {
		t.Error("what the device said too late is not kept")
	} else if r, err := wire.OpenAs[wire.Report](v.Late, d.pub(), wire.TypeReport); err != nil || r.State != wire.Succeeded {
		t.Errorf("kept as late: %+v %v", r, err)
	}
}

// awaited tells whether somebody waits for a change of the record.
func (t *table[T]) awaited(key string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.waiters[key] != nil
}

func TestOrdersCanBeLookedUpAndWaitedFor(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	hold := make(chan struct{})
	d.on(wire.KindUpdateInstall, func(wire.Order) *reply { <-hold; return &reply{state: wire.Rejected, code: wire.CodePolicy} })
	o := w.offer(t, d)
	got, err := w.op.Order(testContext(t), d.id, o.ID, 0)
	if err != nil || got.State != wire.Queued {
		t.Errorf("%+v %v", got, err)
	}
	close(hold)
	got, err = w.op.AwaitOrder(testContext(t), d.id, o.ID, nil)
	if err != nil || got.State != wire.Rejected || got.Result.Code != wire.CodePolicy {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := wire.OpenAs[wire.Report](got.Report, d.pub(), wire.TypeReport); err != nil {
		t.Errorf("the evidence: %v", err)
	}
	asked := []string{o.ID}
	for _, id := range []string{"01NONE", "..", "a/b", "*", ">"} {
		_, err = w.op.Order(testContext(t), d.id, id, time.Second)
		wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
		asked = append(asked, id)
	}
	for _, id := range asked {
		if w.outbox.rows.awaited(orderKeyOf(d.id, id)) {
			t.Errorf("a waiter for order %q is left behind", id)
		}
	}
	// An offer is for all of the named devices or for none, and once for each.
	_, err = w.op.Offer(testContext(t), api.OfferRequest{Version: "2.0.0", Target: repo.TargetName("2.0.0"), Selector: api.Selector{Devices: []wire.DeviceID{d.id, "aaaaaaaaaaaaaaaaaaaaaaaa"}}})
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
	e := w.enrolled(t)
	many, err := w.op.Offer(testContext(t), api.OfferRequest{Version: "2.0.0", Target: repo.TargetName("2.0.0"), Selector: api.Selector{Devices: []wire.DeviceID{d.id, e.id, d.id}}})
	if err != nil || len(many) != 2 {
		t.Errorf("%d orders for 2 devices (%v)", len(many), err)
	}
}

// TestAcksWaitForTheSync and go out in rounds: what became ripe in a pause goes
// together, and nothing that is younger, also not at the end.
func TestAcksWaitForTheSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, key, err := ed25519.GenerateKey(nil)
		must(t, err)
		var mu sync.Mutex
		var rounds []int
		o := newOutbox(key, func(_ wire.DeviceID, raw []byte) error {
			a, err := wire.Reread[wire.Ack](raw)
			mu.Lock()
			defer mu.Unlock()
			rounds = append(rounds, len(a.Reports))
			return err
		}, func(wire.DeviceID) bool { return true }, time.Now, slog.New(slog.DiscardHandler))
		ack := func(n int) {
			for i := range n {
				o.ack(wire.Report{Device: "d", Order: fmt.Sprint(i), Seq: 1})
			}
		}
		after := func(d time.Duration, want ...int) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(rounds, want) {
				t.Fatalf("rounds of %v acks, want %v", rounds, want)
			}
		}
		ack(2)
		after(orderSync)
		after(3900 * time.Millisecond) // a slow disk is still at it
		after(ackHold-orderSync-3900*time.Millisecond, 2)
		rounds = nil
		ack(2)
		after(orderSync)
		ack(3)
		after(ackHold - orderSync - 1)
		after(1, 2)
		after(orderSync-1, 2)
		after(1, 2, 3)
		ack(2)
		after(ackPause/4, 2, 3)
		ack(4)
		after(ackHold-ackPause/4, 2, 3, 2)
		after(ackPause, 2, 3, 2, 4)
		ack(1)
		after(ackHold/2, 2, 3, 2, 4)
		ack(1)
		o.closeAcks()
		after(time.Hour, 2, 3, 2, 4)
	})
}

// TestRecordsAreWrittenAsTheyAreRead: by orderRow's own way into JSON, with all
// and with little in it.
func TestRecordsAreWrittenAsTheyAreRead(t *testing.T) {
	at := time.Date(2026, 5, 4, 3, 2, 1, 5, time.UTC)
	full := orderRow{Kind: "k", Expires: at, Envelope: json.RawMessage(`{"a":"<é>"}`), State: wire.Failed, Seq: 3, Progress: 0.5, Code: "c", Updated: at,
		Report: json.RawMessage(`{"b": [1] }`), Reason: "r", Late: json.RawMessage(`{}`), Cancel: &api.Cancel{Order: "o", At: at, By: "b", Reason: "r"}, Of: "t"}
	for i := range reflect.TypeFor[orderRow]().NumField() {
		if reflect.ValueOf(full).Field(i).IsZero() {
			t.Errorf("the test leaves out %s", reflect.TypeFor[orderRow]().Field(i).Name)
		}
	}
	for _, want := range []orderRow{full, {}, {Envelope: full.Envelope}, {Late: full.Late}} {
		raw, err := want.encode()
		must(t, err)
		var got orderRow
		if err := json.Unmarshal(raw, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s is read as %+v (%v), it was %+v", raw, got, err, want)
		}
	}
}
