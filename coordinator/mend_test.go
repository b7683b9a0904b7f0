package coordinator

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// byHand is the repair of a coordinator that repairs nothing by itself.
func byHand(w *world, plan RepairPlan) *repairs {
	r := newRepairs(w.storage, w.audits, plan, 0, slog.New(slog.DiscardHandler))
	r.leases, r.away, r.drains = w.repairs.leases, w.repairs.away, w.repairs.drains
	return r
}

// want changes how many copies of a chunk there should be.
func (w *world) want(t testing.TB, id string, n int) {
	t.Helper()
	_, err := w.storage.chunks.change(testContext(t), id, func(c *chunkRecord, _ bool) error { c.Want = n; return nil })
	must(t, err)
}

// unitOf is what a chunk of an object is repaired with.
func (w *world) unitOf(t testing.TB, id string) unit {
	t.Helper()
	units := w.repairs.units(map[string]bool{id: true})
	if len(units) != 1 {
		t.Fatalf("chunk %s is of %d units", id, len(units))
	}
	return units[0]
}

// A copy is given up only if all is whole without it, and a device that stays has just
// given the bytes back.
func TestACopyIsGivenUpOnlyWhenAnotherHasBeenRead(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 2)
	id := w.putFile(t, "two", someBytes(3000), 2).Chunks[0].ID
	goes, stays := devices[0], devices[1]
	const key = "s.test"
	must(t, w.repairs.lease(ctx, key))
	give := func(lease string, before func([]string) error) error {
		n, err := w.repairs.giveUp(ctx, lease, goes.id, []string{id}, before)
		if n > 0 && err != nil {
			t.Errorf("%d are said to be given up, and %v", n, err)
		}
		return err
	}
	keeps := func(what string) {
		t.Helper()
		if n := w.orders(t, wire.KindChunkDrop); n > 0 || !slices.Contains(holders(w.chunkRecord(t, id).Holders), goes.id) || !goes.has(id) {
			t.Fatalf("%s: it was given up, with %d orders to drop it", what, n)
		}
		if l, _ := w.repairs.leases.get(key); l.Drop != nil {
			t.Fatalf("%s: it is about to be dropped", what)
		}
	}
	if err := give(key, nil); err == nil || !strings.Contains(err.Error(), "not whole without") {
		t.Errorf("one of two that are wanted: %v", err)
	}
	keeps("one of two that are wanted")
	w.want(t, id, 1)
	if err := give("s.other", nil); !errors.Is(err, errTaken) {
		t.Errorf("without the lease: %v", err)
	}
	keeps("without the lease")

	stays.mu.Lock()
	good := stays.chunks[id]
	stays.chunks[id] = someBytes(len(good))
	stays.mu.Unlock()
	if give(key, nil) == nil {
		t.Error("the other one is bad, and nobody says so")
	}
	keeps("the other one is bad")
	stays.mu.Lock()
	stays.chunks[id] = good
	stays.mu.Unlock()

	stays.leave()
	if give(key, nil) == nil {
		t.Error("the other one is away, and nobody says so")
	}
	keeps("the other one is away")
	stays.connect(w)

	// It is lost between the read and the change.
	must(t, give(key, func([]string) error { return w.storage.lost(ctx, stays.id, []string{id}) }))
	if n := w.orders(t, wire.KindChunkDrop); n > 0 || !slices.Equal(holders(w.chunkRecord(t, id).Holders), []wire.DeviceID{goes.id}) {
		t.Fatalf("the other one was lost meanwhile: held by %v, %d orders to drop", holders(w.chunkRecord(t, id).Holders), n)
	}
}

// The order to drop is in the lease before the device is off the record, and until
// the order is in the outbox: a crash at any place between leaves no copy that nobody
// knows of.
func TestADropIsInTheLeaseBeforeTheHolderIsOffTheRecord(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 2)
	id := w.putFile(t, "two", someBytes(3000), 2).Chunks[0].ID
	w.want(t, id, 1)
	goes := devices[0]
	const key = "s.test"
	must(t, w.repairs.lease(ctx, key))
	intended := func() string {
		if l, _ := w.repairs.leases.get(key); l.Drop != nil && l.Drop.Device == goes.id && slices.Equal(l.Drop.IDs, []string{id}) {
			return l.Drop.Order
		}
		return ""
	}
	var off atomic.Pointer[string]
	w.storage.chunks.mu.Lock() // under which it is called
	w.storage.touched = func(...string) {
		order := intended()
		off.CompareAndSwap(nil, &order)
	}
	w.storage.chunks.mu.Unlock()
	n, err := w.repairs.giveUp(ctx, key, goes.id, []string{id}, nil)
	if n != 1 || err != nil {
		t.Fatalf("%d are given up, %v", n, err)
	}
	if p := off.Load(); p == nil || *p == "" {
		t.Error("the holder was taken off the record when no lease said what is dropped")
	}
	list, err := w.op.Orders(ctx, api.OrderQuery{Kind: wire.KindChunkDrop})
	if err != nil || len(list.Orders) != 1 || off.Load() == nil || list.Orders[0].ID != *off.Load() {
		t.Errorf("the order is another one than the lease said: %+v %v", list.Orders, err)
	}
	if intended() != "" {
		t.Error("it is still about to be made")
	}
	eventually(t, "it is dropped", func() bool { return !goes.has(id) })
}

// Of an order to drop that a crash came before, what the device is being given again
// is left out.
func TestAnIntendedDropLeavesOutWhatIsOnItsWay(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	d.on(wire.KindChunkStore, silent)
	coming := chunk.Sum([]byte("coming")).String()
	_, err := w.outbox.submit(ctx, d.id, wire.KindChunkStore, wire.ChunkStore{ID: coming, Size: 6, URL: "/data/v1/x"}, storeLife)
	must(t, err)
	must(t, w.repairs.sendDrop(ctx, dropping{Device: d.id, Order: "01J0000000000000000000000B", IDs: []string{coming}}))
	if n := w.orders(t, wire.KindChunkDrop); n != 0 {
		t.Error("it is dropped and stored, in any order")
	}
}

// Bytes are checked against their id by repair itself, whoever has checked them before:
// when they come from a device, and when they go to one.
func TestRepairChecksBytesWhenTheyComeAndWhenTheyGo(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 2)
	data := someBytes(3000)
	id := w.putFile(t, "one", data, 1).Chunks[0].ID
	d := byID(devices)[w.claimedBy(id)]
	d.on(wire.KindChunkServe, func(o wire.Order) *reply {
		// As if the data plane had not looked.
		if err := w.staging.put(context.Background(), servedName(o.ID), someBytes(3000)); err != nil {
			t.Error(err)
		}
		return &reply{state: wire.Succeeded}
	})
	r := byHand(w, testRepair)
	if _, err := r.fetchFrom(ctx, d.id, w.chunkRecord(t, id)); err == nil || !strings.Contains(err.Error(), "other bytes") {
		t.Errorf("other bytes came: %v", err)
	}
	d.on(wire.KindChunkServe, nil)
	got, err := r.fetchFrom(ctx, d.id, w.chunkRecord(t, id))
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("the right ones: %v", err)
	}
	w.want(t, id, 2)
	u := w.unitOf(t, id)
	stores := w.orders(t, wire.KindChunkStore)
	if err := r.putAnew(ctx, u, 0, someBytes(3000)); err == nil {
		t.Error("other bytes went")
	}
	if n := w.orders(t, wire.KindChunkStore); n != stores {
		t.Error("a device was asked to store other bytes")
	}
	must(t, r.putAnew(ctx, u, 0, data))
	if !devices[0].has(id) || !devices[1].has(id) {
		t.Error("the right ones did not go")
	}
	// What is not missing any more is not placed again.
	must(t, r.putAnew(ctx, u, 0, data))
	if n := w.orders(t, wire.KindChunkStore); n != stores+1 {
		t.Errorf("%d devices were asked, for one copy that was missing", n-stores)
	}
}

// Of those that can be repaired, the most endangered takes the place; what cannot be
// does not take it from what can.
func TestPlacesGoToTheMostEndangeredThatCanBeRepaired(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.devices(t, 4)
	put := func(name string, copies, lost int) (id string) {
		id = w.putFile(t, name, someBytes(1000), copies).Chunks[0].ID
		must(t, w.storage.lost(testContext(t), w.chunkRecord(t, id).Holders[0].Device, []string{id}))
		if lost == 2 {
			must(t, w.storage.lost(testContext(t), w.chunkRecord(t, id).Holders[1].Device, []string{id}))
		}
		return id
	}
	put("spare", 3, 1)
	put("last", 3, 2)
	away := w.device(t)
	_, err := w.storage.chunks.change(testContext(t), put("unread", 2, 1), func(c *chunkRecord, _ bool) error {
		c.Holders = []api.Holder{{Device: away.id}}
		return nil
	})
	must(t, err)
	away.leave()
	plan := testRepair
	plan.AtOnce = 1
	r := byHand(w, plan)
	r.lookAtDevices()
	r.lookAtChunks()
	var got []string
	for range 2 {
		now := r.due()
		if len(now) != 1 {
			t.Fatalf("%d are begun at once, after %v", len(now), got)
		}
		got = append(got, now[0].unit.name)
		if more := r.due(); len(more) != 0 {
			t.Fatalf("%q is begun beside it, where there is one place", more[0].unit.name)
		}
		r.mu.Lock()
		r.working--
		r.mu.Unlock()
	}
	if !slices.Equal(got, []string{"last", "spare"}) {
		t.Errorf("begun were %v", got)
	}
	if more := r.due(); len(more) != 0 {
		t.Errorf("%q is begun, and nobody can serve it", more[0].unit.name)
	}
}

// What could not be done is tried again later and later, or soon after a device came.
func TestPausesDoubleAndADeviceThatComesEndsThem(t *testing.T) {
	t.Parallel()
	now := epoch
	var tk task
	pause := firstPause
	for range 12 {
		tk.wait(now, "why")
		if got := tk.next.Sub(now); got != pause {
			t.Errorf("try %d is followed by a pause of %s, want %s", tk.tries, got, pause)
		}
		pause = min(2*pause, maxPause)
	}
	if tk.next.Sub(now) != maxPause || tk.problem != "why" {
		t.Errorf("at last %s, %q", tk.next.Sub(now), tk.problem)
	}

	w := ownWorld(t)
	w.freeze()
	devices := w.devices(t, 2)
	id := w.putFile(t, "waits", someBytes(1000), 2).Chunks[0].ID
	must(t, w.storage.lost(testContext(t), devices[0].id, []string{id}))
	r := byHand(w, testRepair)
	try := func() string { // whether it is begun, or why not
		r.lookAtDevices()
		r.lookAtChunks()
		begun := r.due()
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(begun) > 0 {
			begun[0].task.working = false
			r.working--
			return "begun"
		}
		for _, v := range r.tasks {
			return v.problem
		}
		return "whole"
	}
	fails := func() {
		t.Helper()
		devices[1].leave()
		if got := try(); !strings.Contains(got, "online") {
			t.Fatalf("with nobody to read it from: %s", got)
		}
		devices[1].connect(w)
	}
	fails()
	w.advance(comePause + time.Second) // the pause is not over
	if got := try(); got == "begun" {
		t.Error("it was tried again before the pause was over")
	}
	r.arrived()
	if got := try(); got != "begun" {
		t.Errorf("a device came: %s", got)
	}
	r = byHand(w, testRepair)
	fails()
	w.advance(comePause / 2)
	r.arrived()
	if got := try(); got == "begun" {
		t.Error("devices that come and go have it tried all the time")
	}
	w.advance(comePause)
	if got := try(); got != "begun" {
		t.Errorf("a device came a while ago: %s", got)
	}
	r = byHand(w, testRepair)
	fails()
	w.advance(firstPause)
	if got := try(); got != "begun" {
		t.Errorf("the pause is over: %s", got)
	}
}

// Whoever works at a unit has given up when its lease ends: another coordinator may
// work at it then.
func TestWorkIsGivenUpBeforeItsLeaseEnds(t *testing.T) {
	t.Parallel()
	if leaseLife-mendLimit < time.Minute {
		t.Errorf("a lease of %s ends %s after the work: clocks differ by more", leaseLife, leaseLife-mendLimit)
	}
	w := repairing(t, t.TempDir(), func(c *Config) { c.Repair.limit = 300 * time.Millisecond })
	if r := newRepairs(w.storage, w.audits, DefaultRepair, 0, w.log); r.plan.limit != mendLimit {
		t.Errorf("work may take %s", r.plan.limit)
	}
	devices := w.devices(t, 4)
	o := w.putFile(t, "slow", someBytes(1000), 2)
	for _, d := range devices {
		d.on(wire.KindChunkStore, silent)
	}
	w.retire(t, w.claimedBy(o.Chunks[0].ID))
	eventually(t, "it is given up, and said so", func() bool {
		v := w.repairs.status()
		return len(v.Queue) == 1 && !v.Queue[0].Working && v.Queue[0].Problem != ""
	})
	if n := w.orders(t, wire.KindChunkStore); n > 3 {
		t.Errorf("%d devices were asked one after the other", n-2)
	}
	if _, ok := w.repairs.leases.get(w.unitOf(t, o.Chunks[0].ID).key); ok {
		t.Error("the lease is still there")
	}
}

// Bytes are spread evenly over time, and who waits for his turn can leave.
func TestRepairKeepsItsPace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pacer{rate: 1 << 20}
		began := time.Now()
		for i := range 5 {
			must(t, p.wait(t.Context(), 2<<20))
			if took := time.Since(began); took != time.Duration(2*i)*time.Second {
				t.Fatalf("after %d MiB of 1 MiB a second %s have gone by", 2*i, took)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := p.wait(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("who has left waits: %v", err)
		}
		// Nothing is saved up for later.
		time.Sleep(time.Hour)
		began = time.Now()
		must(t, p.wait(t.Context(), 2<<20))
		must(t, p.wait(t.Context(), 2<<20))
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("after a pause 4 MiB took %s", took)
		}
	})
}

// A device that is there can have lost sight of a volume: what is on that one is made
// anew after the same time, and what is on the others is left.
func TestAVolumeThatIsAwayIsMadeAnewElsewhere(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 3)
	on := func(volume string) {
		for _, d := range devices {
			d.on(wire.KindChunkStore, func(o wire.Order) *reply {
				r := d.honest(o)
				if b, ok := r.body.(wire.Receipt); ok {
					b.Volume = volume
					r.body = b
				}
				return r
			})
		}
	}
	on("v1")
	gone := w.putFile(t, "gone", someBytes(3000), 3).Chunks[0].ID
	on("v2")
	there := w.putFile(t, "there", someBytes(3000), 3).Chunks[0].ID
	d, fourth := devices[0], w.device(t)
	beat := func(failed bool, open ...string) {
		b := wire.Beat{Device: d.id, Capacity: d.capacity}
		for _, v := range open {
			b.Scrubs = append(b.Scrubs, wire.Scrub{Volume: v})
		}
		if failed {
			b.Warnings = []wire.Warning{{Code: volumeFailed, Subject: "v1", Severity: wire.Critical, Title: "A disk is gone"}}
		}
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, b)
	}
	noted := func() bool { _, ok := w.repairs.away.get(string(d.id) + ".v1"); return ok }
	beat(false, "v2") // of an agent that says nothing of a failure
	w.looks(t)
	if noted() {
		t.Error("a volume that nothing is said of is taken for one that is away")
	}
	beat(true, "v2")
	eventually(t, "the absence is on record", noted)
	w.looks(t)
	if fourth.has(gone) {
		t.Error("what is away for a moment is made anew already")
	}
	w.advance(25 * time.Hour)
	eventually(t, "what was on it is elsewhere", func() bool { return fourth.has(gone) && len(holders(w.chunkRecord(t, gone).Holders)) == 4 })
	w.looks(t)
	if fourth.has(there) {
		t.Error("what is on another volume of the device was made anew, too")
	}
	if v := w.repairs.summary(); v.Done != 1 || v.Endangered != 0 {
		t.Errorf("counted %+v", v)
	}
	beat(false, "v1", "v2")
	eventually(t, "it is back", func() bool { return !noted() })
	w.advance(spareKept + time.Minute)
	eventually(t, "one copy too many is dropped", func() bool { return len(holders(w.chunkRecord(t, gone).Holders)) == 3 })
}

// A receipt that was asked for by a repair, and comes to the next life of the
// coordinator, counts: nothing is stored that nobody knows of.
func TestAReceiptOfARepairThatComesAfterARestartCounts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := repairing(t, dir)
	devices := w.devices(t, 8)
	f := w.putCoded(t, "late", 30_000, api.Code{Data: 4, Parity: 2})
	type answer struct {
		device *device
		order  wire.Order
		reply  *reply
	}
	stored := make(chan answer, len(devices))
	for _, d := range devices {
		d.on(wire.KindChunkStore, func(o wire.Order) *reply {
			passOn(stored, answer{d, o, d.honest(o)}) // and the line is cut
			return nil
		})
	}
	gone := byID(devices)[f.placed[0].Holders[0].Device]
	w.retire(t, gone.id)
	late := next(t, stored, "a device that stores it anew")
	w.Close()
	w = open(t, dir) // it repairs nothing itself: only the receipt can make it whole
	defer w.Close()
	for _, d := range devices {
		if d != gone {
			d.on(wire.KindChunkStore, func(wire.Order) *reply { return late.reply }) // only one has an order
			d.connect(w)
		}
	}
	b, err := wire.DecodeBody[wire.ChunkStore](late.order)
	must(t, err)
	eventually(t, "the receipt counts", func() bool {
		return slices.ContainsFunc(w.chunkRecord(t, b.ID).Holders, func(h api.Holder) bool {
			return h.Device == late.device.id && h.Order == late.order.ID && !h.Lost
		})
	})
	if !w.whole("late") {
		t.Error("it is not whole with it")
	}
	must(t, f.get(t, w))
}

// While a drain has a chunk on its list to drop, the device is not given it.
func TestWhatIsAboutToBeDroppedIsNotPlacedThere(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	data := someBytes(500)
	id := chunk.Sum(data).String()
	must(t, w.repairs.lease(ctx, "d.x"))
	must(t, w.repairs.intend(ctx, "d.x", &dropping{Device: d.id, Order: "01J0000000000000000000000C", IDs: []string{id}}))
	_, err := w.op.PutChunk(ctx, id, data, 1)
	wantRefusal(t, err, http.StatusServiceUnavailable, "too_few_devices")
	must(t, w.repairs.intend(ctx, "d.x", nil))
	_, err = w.op.PutChunk(ctx, id, data, 1)
	must(t, err)
}

// Who is to leave is read from first, and nobody is told to drop anything while it is
// away.
func TestWhoLeavesServesAndWhoIsAwayKeeps(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 2)
	var served [2]atomic.Int32
	for i, d := range devices {
		d.on(wire.KindChunkServe, func(o wire.Order) *reply { served[i].Add(1); return d.honest(o) })
	}
	ch := w.putFile(t, "two", someBytes(3000), 2).Chunks[0]
	for i, d := range devices {
		must(t, w.repairs.drains.rows.create(ctx, string(d.id), drainRow{Device: d.id, Began: w.now()}))
		_, err := w.repairs.fetch(ctx, ch, new([]liar))
		must(t, err)
		must(t, w.repairs.drains.cancel(ctx, d.id))
		if served[i].Load() != 1 || served[1-i].Load() != int32(i) {
			t.Errorf("with device %d drained, %d and %d were read from", i, served[0].Load(), served[1].Load())
		}
	}
	w.want(t, ch.ID, 1)
	if l := w.repairs.look(w.unitOf(t, ch.ID)); len(l.extra) != 1 {
		t.Errorf("too many are %v", l.extra)
	}
	for _, d := range devices {
		d.leave()
		if l := w.repairs.look(w.unitOf(t, ch.ID)); len(l.extra) != 0 {
			t.Errorf("one is away, and too many are %v", l.extra)
		}
		d.connect(w)
	}
}

// Bytes that a device has sent for another order are no proof that it still has them:
// one that threw its chunk away must not be taken for the keeper of the last copy.
func TestWhatWasServedBeforeIsNoProof(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 2)
	id := w.putFile(t, "two", someBytes(3000), 2).Chunks[0].ID
	keeps, liar := devices[0], devices[1]
	liar.mu.Lock()
	data := liar.chunks[id]
	liar.mu.Unlock()
	urls := make(chan string, 1)
	liar.on(wire.KindChunkServe, func(o wire.Order) *reply {
		b, err := wire.DecodeBody[wire.ChunkServe](o)
		if err != nil {
			t.Error(err)
		}
		urls <- b.URL
		return liar.honest(o)
	})
	if _, err := w.storage.readHolder(ctx, id, liar.id); err != nil {
		t.Fatal(err)
	}
	if status, body := liar.transfer(http.MethodPut, <-urls, data); status != http.StatusGone {
		t.Errorf("bytes were taken after the order had ended: %d %s", status, body)
	}
	liar.on(wire.KindChunkServe, func(wire.Order) *reply { return &reply{state: wire.Succeeded} })
	w.want(t, id, 1)
	const key = "s.test"
	must(t, w.repairs.lease(ctx, key))
	if n, err := w.repairs.giveUp(ctx, key, keeps.id, []string{id}, nil); n != 0 {
		t.Errorf("%d copies were given up for one that was not read: %v", n, err)
	}
	if !keeps.holds(id) {
		t.Error("the last good copy was dropped")
	}
}

// Who was too slow is told to stop, and what came in the meantime does not stay.
func TestWhatComesTooLateDoesNotStay(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.devices(t, 1)[0]
	c := w.chunkRecord(t, w.putFile(t, "one", someBytes(3000), 1).Chunks[0].ID)
	orders, stopped := make(chan wire.Order, 1), make(chan struct{})
	d.on(wire.KindChunkServe, func(o wire.Order) *reply { passOn(orders, o); return nil }) // it comes again
	d.on(wire.KindOrderCancel, func(wire.Order) *reply {
		close(stopped)
		return &reply{state: wire.Succeeded, body: wire.CancelResult{State: wire.Succeeded}}
	})
	reading, leave := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { _, err := w.storage.readFrom(reading, d.id, c); done <- err }()
	o := <-orders
	b, err := wire.DecodeBody[wire.ChunkServe](o)
	must(t, err)
	d.mu.Lock()
	data := d.chunks[c.ID]
	d.mu.Unlock()
	if status, body := d.transfer(http.MethodPut, b.URL, data); status != http.StatusNoContent {
		t.Fatalf("%d %s", status, body)
	}
	leave()
	if err := <-done; err == nil {
		t.Error("it was read")
	}
	<-stopped
	d.say(wire.ChannelReport, wire.TypeReport, d.report(o, &reply{state: wire.Succeeded}))
	eventually(t, "what came is gone", func() bool {
		_, err := w.staging.get(ctx, servedName(o.ID))
		return errors.Is(err, errNotStaged)
	})
}

// A device that says that it does not have a chunk when nobody waits for it any more says
// so all the same: else it only had to be slow about it.
func TestALossThatIsToldTooLateCounts(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.devices(t, 1)[0]
	c := w.chunkRecord(t, w.putFile(t, "one", someBytes(3000), 1).Chunks[0].ID)
	orders := make(chan wire.Order, 1)
	d.on(wire.KindChunkServe, func(o wire.Order) *reply { passOn(orders, o); return nil }) // it comes again
	d.on(wire.KindOrderCancel, func(wire.Order) *reply {
		return &reply{state: wire.Succeeded, body: wire.CancelResult{State: wire.Failed}}
	})
	reading, leave := context.WithCancel(testContext(t))
	done := make(chan error, 1)
	go func() { _, err := w.storage.readFrom(reading, d.id, c); done <- err }()
	o := <-orders
	leave()
	if err := <-done; err == nil {
		t.Error("it was read")
	}
	if w.isLost(t, d, c.ID) {
		t.Error("it is lost though the device has said nothing yet")
	}
	d.say(wire.ChannelReport, wire.TypeReport, d.report(o, failed(wire.CodeLost)))
	eventually(t, "the loss is noted", func() bool { return w.isLost(t, d, c.ID) })
	if told := w.confessions(t, d); len(told) != 1 || w.audits.scoreOf(d.id).integrity() == 1 {
		t.Errorf("integrity %v, the score heard %+v", w.audits.scoreOf(d.id).integrity(), told)
	}
}

// What a device has given a receipt for while it was being read is there.
func TestALossIsNotOfWhatWasStoredSince(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.devices(t, 1)[0]
	id := w.putFile(t, "one", someBytes(3000), 1).Chunks[0].ID
	d.on(wire.KindChunkServe, func(wire.Order) *reply {
		_, err := w.storage.chunks.change(context.Background(), id, func(c *chunkRecord, _ bool) error {
			c.Holders[0].Order = newNonce()
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		return failed(wire.CodeLost)
	})
	if _, err := w.storage.readHolder(ctx, id, d.id); err == nil {
		t.Error("it was read")
	}
	if w.isLost(t, d, id) || w.audits.scoreOf(d.id).integrity() != 1 {
		t.Error("a chunk is lost that was stored since")
	}
}

// How many copies a put wants of what is there already is kept, and bounded.
func TestAStripeThatIsThereIsWantedAsOftenAsItsPutSays(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	w.devices(t, 2)
	data := someBytes(3000)
	id := chunk.Sum(data).String()
	q := api.StripeRequest{Token: newNonce(), Code: api.Code{Data: 1}, Size: int64(len(data)), Chunks: []string{id}}
	_, err := w.storage.place(ctx, id, data, 1, q.Token)
	must(t, err)
	for _, n := range []int{0, 2} {
		q.Replicas = n
		there, err := w.storage.stripe(ctx, q)
		must(t, err)
		if got := w.chunkRecord(t, id).Want; len(there.Placed) != 1 || got != max(n, 1) {
			t.Errorf("with %d: %d are placed, %d are wanted", n, len(there.Placed), got)
		}
	}
	for _, n := range []int{-1, maxReplica + 1} {
		q.Replicas = n
		var no *refusal
		if _, err := w.storage.stripe(ctx, q); !errors.As(err, &no) || no.status != http.StatusBadRequest {
			t.Errorf("%d replicas: %v", n, err)
		}
	}
}
