package coordinator

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// drained waits for the end of a drain.
func (w *world) drained(t testing.TB, d wire.DeviceID) api.Drain {
	t.Helper()
	var v api.Drain
	eventually(t, "the device is drained", func() bool {
		var err error
		v, err = w.op.Drain(testContext(t), string(d))
		must(t, err)
		return v.State == api.DrainDone
	})
	return v
}

// A device is emptied while it proves what it holds, and signs at the end that it
// holds nothing: anybody can check that.
func TestADrainEndsWithASignedReceipt(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 8)
	f := w.putCoded(t, "coded", 60_000, api.Code{Data: 4, Parity: 2})
	w.putFile(t, "plain", someBytes(5000), 2)
	d := byID(devices)[f.placed[0].Holders[0].Device]
	stray := someBytes(50) // of an upload that nobody knows of any more
	d.mu.Lock()
	had := len(d.chunks)
	d.chunks[chunk.Sum(stray).String()] = stray
	d.mu.Unlock()
	v, err := w.op.DrainDevice(testContext(t), string(d.id))
	must(t, err)
	if v.Chunks != had || v.Left == 0 || v.State == api.DrainDone || v.By == "" {
		t.Errorf("it begins as %+v", v)
	}
	_, err = w.op.DrainReceipt(testContext(t), string(d.id))
	wantRefusal(t, err, http.StatusConflict, "not_drained")
	eventually(t, "it was asked what it holds, and told to drop the rest", func() bool { return w.orders(t, wire.KindChunkHoldings) > 0 && len(d.held()) == 0 })
	w.advance(drainPause + time.Second)
	v = w.drained(t, d.id)
	if v.Moved != had || v.Left != 0 || v.Receipt == "" || v.Problem != "" {
		t.Errorf("it ended as %+v", v)
	}
	w.untilWhole(t, "coded", "plain")
	w.checkHolders(t, devices, "coded")
	w.checkHolders(t, devices, "plain")
	must(t, f.get(t, w))
	if s := w.repairs.summary(); s.Rebuilt != 0 {
		t.Errorf("%d were rebuilt, though the device was there", s.Rebuilt)
	}
	raw, err := w.op.DrainReceipt(testContext(t), string(d.id))
	must(t, err)
	got, err := CheckEvidence(raw, EvidenceChecks{OrderKey: w.orderKey()})
	must(t, err)
	if got.Outcome != api.DrainEmpty || got.Device != d.id || !strings.Contains(got.Reason, "holds no chunk") {
		t.Errorf("judged as %+v", got)
	}
	// Who was drained gets nothing new, until somebody says so, and can go.
	w.putFile(t, "new", someBytes(100), 7)
	if n := len(d.held()); n != 0 {
		t.Errorf("it was given %d chunks", n)
	}
	show, err := w.op.Device(testContext(t), string(d.id))
	must(t, err)
	if show.Drain == nil || show.Drain.State != api.DrainDone {
		t.Errorf("shown with %+v", show.Drain)
	}
	_, err = w.op.RetireDevice(testContext(t), string(d.id), false)
	must(t, err)
	if !w.whole("coded", "plain", "new") {
		t.Error("something was lost with it")
	}
}

// What is altered about a receipt, or was never signed, is found.
func TestADrainReceiptThatDoesNotProveItIsRefused(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	sign := func(held wire.Holdings, statement *wire.Drained) api.Evidence {
		d.on(wire.KindChunkHoldings, func(wire.Order) *reply { return &reply{state: wire.Succeeded, body: held} })
		o, err := w.outbox.submit(testContext(t), d.id, wire.KindChunkHoldings, wire.ChunkHoldings{Drained: statement}, time.Minute)
		must(t, err)
		v, err := w.outbox.await(testContext(t), o, nil)
		must(t, err)
		return api.Evidence{Format: evidenceFormat, Audit: o.ID, Kind: api.DrainReceipt, Device: d.id, DeviceKey: d.pub(), OrderKey: w.orderKey(), Order: v.Envelope, Report: v.Report, Outcome: api.DrainEmpty}
	}
	said := &wire.Drained{Chunks: 3, Bytes: 30}
	good, other := sign(wire.Holdings{}, said), sign(wire.Holdings{}, said)
	check := func(e api.Evidence) error {
		raw, err := json.Marshal(e)
		must(t, err)
		_, err = CheckEvidence(raw, EvidenceChecks{})
		return err
	}
	must(t, check(good))
	for name, f := range map[string]func(e *api.Evidence){
		"another order's report": func(e *api.Evidence) { e.Report = other.Report },
		"another key":            func(e *api.Evidence) { e.OrderKey = d.pub() },
		"a device that holds something": func(e *api.Evidence) {
			*e = sign(wire.Holdings{Count: 1, Bytes: 5}, said)
		},
		"no statement":  func(e *api.Evidence) { *e = sign(wire.Holdings{}, nil) },
		"another claim": func(e *api.Evidence) { e.Outcome = api.AuditLost },
		"as a confession": func(e *api.Evidence) {
			e.Kind = api.Confession
		},
	} {
		e := good
		f(&e)
		if check(e) == nil {
			t.Errorf("%s: it is believed", name)
		}
	}
}

// A device that goes away in the middle is drained by rebuilding, and can be retired
// without losing anything; when it comes back instead, it ends as any other.
func TestADrainGoesOnWithoutTheDevice(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 8)
	f := w.putCoded(t, "coded", 60_000, api.Code{Data: 4, Parity: 2})
	d := byID(devices)[f.placed[0].Holders[0].Device]
	d.leave()
	_, err := w.op.DrainDevice(testContext(t), string(d.id))
	must(t, err)
	eventually(t, "all is elsewhere, and it says what it waits for", func() bool {
		v, err := w.op.Drain(testContext(t), string(d.id))
		must(t, err)
		return v.Alone == 0 && strings.Contains(v.Problem, "can be retired")
	})
	w.untilWhole(t, "coded")
	if s := w.repairs.summary(); s.Rebuilt == 0 {
		t.Error("nothing was rebuilt")
	}
	if n := w.orders(t, wire.KindChunkDrop); n != 0 {
		t.Error("it was told to drop something while it was away")
	}
	d.connect(w)
	w.drained(t, d.id)
	if len(d.held()) != 0 {
		t.Error("it still holds something")
	}
	must(t, f.get(t, w))
}

// The coordinator is stopped in the middle of dropping.
func TestADrainGoesOnAfterARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := repairing(t, dir)
	devices := w.devices(t, 8)
	f := w.putCoded(t, "coded", 60_000, api.Code{Data: 4, Parity: 2})
	d := byID(devices)[f.placed[0].Holders[0].Device]
	had := len(d.held())
	d.on(wire.KindChunkDrop, silent)
	_, err := w.op.DrainDevice(testContext(t), string(d.id))
	must(t, err)
	eventually(t, "it is told to drop", func() bool { return w.orders(t, wire.KindChunkDrop) > 0 })
	w.Close()
	w = repairing(t, dir)
	d.on(wire.KindChunkDrop, nil)
	for _, e := range devices {
		e.connect(w)
	}
	v := w.drained(t, d.id)
	if v.Moved != had || len(d.held()) != 0 {
		t.Errorf("ended as %+v", v)
	}
	w.untilWhole(t, "coded")
	must(t, f.get(t, w))
}

// While there is no room elsewhere the device keeps everything, and says why; a
// canceled drain leaves it as it was.
func TestADrainThatCannotBeKeepsEverything(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 6)
	f := w.putCoded(t, "coded", 60_000, api.Code{Data: 4, Parity: 2})
	w.putOne(t, len(devices)) // of an upload that has no name yet
	d := devices[0]
	had := len(d.held())
	_, err := w.op.DrainDevice(testContext(t), string(d.id))
	must(t, err)
	eventually(t, "it says why it waits", func() bool {
		s, err := w.op.Status(testContext(t))
		must(t, err)
		for _, a := range s.Attention {
			if a.Code == api.AttentionDrain && strings.Contains(a.Text, "add a device") {
				return true
			}
		}
		return false
	})
	eventually(t, "the upload is told of as such", func() bool {
		see := w.repairs.attention()
		return slices.ContainsFunc(see, func(a api.Attention) bool {
			return a.Code == api.AttentionRepair && a.About == "uploads" && strings.Contains(a.Text, "chunks that no object has yet")
		}) && slices.ContainsFunc(see, func(a api.Attention) bool { return a.About == "object:coded" })
	})
	if len(d.held()) != had || w.orders(t, wire.KindChunkDrop) != 0 {
		t.Error("something was dropped that is nowhere else")
	}
	a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id})
	must(t, err)
	if a.Outcome != api.AuditRight {
		t.Errorf("challenged: %s", a.Outcome)
	}
	must(t, w.op.CancelDrain(testContext(t), string(d.id)))
	eventually(t, "nothing is endangered", func() bool { return w.repairs.summary().Endangered == 0 })
	wantRefusal(t, w.op.CancelDrain(testContext(t), string(d.id)), http.StatusNotFound, wire.CodeNotFound)
	must(t, f.get(t, w))
}

// A device is asked whether it holds nothing when no order is out that could change
// that; and the order to say so, which a crash came before, is made.
func TestADrainIsEndedWhenNothingIsOnItsWay(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	s := w.repairs.drains
	row := drainRow{Device: d.id, Began: w.now().UTC()}
	must(t, s.rows.create(ctx, string(d.id), row))
	d.on(wire.KindChunkStore, silent)
	late, err := w.outbox.submit(ctx, d.id, wire.KindChunkStore, wire.ChunkStore{ID: chunk.Sum([]byte("late")).String(), Size: 4, URL: "/data/v1/x"}, storeLife)
	must(t, err)
	must(t, s.step(ctx, row))
	if n := w.orders(t, wire.KindChunkHoldings); n != 0 {
		t.Error("it is asked whether it is empty while it is told to store something")
	}
	must(t, w.outbox.end(ctx, d.id, late.ID, wire.Canceled, "x", "the test is done with it"))
	const order = "01J0000000000000000000000D"
	must(t, s.change(ctx, d.id, func(v *drainRow) error { v.Order, v.Asked = order, w.now().UTC(); return nil }))
	must(t, s.step(ctx, row))
	if _, err := w.outbox.await(ctx, wire.Order{ID: order, Device: d.id}, nil); err != nil {
		t.Fatalf("the order that was about to be made is not made: %v", err)
	}
	must(t, s.step(ctx, row))
	if v, err := s.show(d.id); err != nil || v.State != api.DrainDone || v.Receipt != order {
		t.Errorf("ended as %+v, %v", v, err)
	}
}
