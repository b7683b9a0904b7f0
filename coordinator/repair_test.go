package coordinator

import (
	"bytes"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

var testRepair = RepairPlan{AtOnce: 4, Rate: 1 << 30, Grace: 24 * time.Hour, every: 20 * time.Millisecond}

// repairing is a coordinator that repairs.
func repairing(t testing.TB, dir string, edit ...func(*Config)) *world {
	t.Helper()
	w := openWith(t, dir, func(c *Config) {
		c.Repair = testRepair
		c.Beat = time.Hour // who is away has said so: no test's clock does, that goes by days
		for _, e := range edit {
			e(c)
		}
	})
	t.Cleanup(w.Close)
	return w
}

// looks waits until repair has looked at everything that was there to be looked at,
// and has done what it would.
func (w *world) looks(t testing.TB) {
	t.Helper()
	began := w.repairs.ticks.Load()
	eventually(t, "repair has looked", func() bool {
		w.repairs.mu.Lock()
		defer w.repairs.mu.Unlock()
		return w.repairs.ticks.Load() >= began+2 && w.repairs.working == 0
	})
}

// untilWhole waits until every stripe is whole.
func (w *world) untilWhole(t testing.TB, names ...string) {
	t.Helper()
	eventually(t, "everything is whole again", func() bool { return w.whole(names...) })
}

// whole tells whether all chunks have as many good holders as they should, by the
// records and by what the devices have: it does not ask repair.
func (w *world) whole(names ...string) bool {
	for _, name := range names {
		o, err := w.storage.object(name)
		if err != nil {
			return false
		}
		width := 1
		if o.Code != nil {
			width = o.Code.Shards()
		}
		for part := range slices.Chunk(o.Chunks, width) {
			on := make(map[wire.DeviceID]bool)
			for _, ch := range part {
				c, _ := w.storage.chunks.get(ch.ID)
				n := 0
				for _, h := range c.Holders {
					if h.Lost || !w.reg.online(h.Device) || w.audits.distrusted(h.Device) || w.repairs.drains.leaving(h.Device) {
						continue
					}
					if n++; o.Code != nil && on[h.Device] {
						n--
					}
					on[h.Device] = true
				}
				if n < c.wanted() {
					return false
				}
			}
		}
	}
	return true
}

// destroy takes a device away for ever, with what it held.
func (d *device) destroy() {
	d.t.Helper()
	d.leave()
	d.mu.Lock()
	clear(d.chunks)
	d.mu.Unlock()
}

// byID is the devices of a test.
func byID(devices []*device) map[wire.DeviceID]*device {
	out := make(map[wire.DeviceID]*device)
	for _, d := range devices {
		out[d.id] = d
	}
	return out
}

// trueHolders checks that who has given a receipt and not lost it has the bytes.
func (w *world) checkHolders(t testing.TB, devices []*device, name string) {
	t.Helper()
	of := byID(devices)
	o, err := w.storage.object(name)
	must(t, err)
	for _, ch := range o.Chunks {
		c, _ := w.storage.chunks.get(ch.ID)
		for _, h := range c.Holders {
			if d := of[h.Device]; d != nil && !h.Lost && w.reg.online(d.id) && !d.has(ch.ID) {
				t.Errorf("chunk %s of %q is said to be on %s and is not", ch.ID, name, d.id)
			}
		}
	}
}

// has tells whether a device has a chunk, whole.
func (d *device) has(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	data, ok := d.chunks[id]
	return ok && chunk.Sum(data).String() == id
}

// Of 4+2, one device is destroyed while another has lost something silently, and then
// one more is: everything is made anew elsewhere each time, and the file is there bit
// for bit with two others away after that.
func TestDestroyedAndCorruptingDevicesAreRepaired(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 10)
	f := w.putCoded(t, "coded", 100_000, api.Code{Data: 4, Parity: 2})
	p := w.putFile(t, "plain", someBytes(5000), 3)
	names := []string{"coded", "plain"}
	if !w.whole(names...) {
		t.Fatal("it was not whole at first")
	}
	gone := []*device{byID(devices)[f.placed[0].Holders[0].Device], byID(devices)[f.placed[1].Holders[0].Device]}
	liar := byID(devices)[f.placed[2].Holders[0].Device]
	// What a device has lost silently is found when it is read for the repair.
	liar.mu.Lock()
	liar.chunks[f.placed[2].ID] = someBytes(len(liar.chunks[f.placed[2].ID]))
	liar.mu.Unlock()
	day := func() {
		w.advance(25 * time.Hour)
		for _, d := range devices { // by the coordinator's clock they were not heard for a day
			if d.mqtt.IsConnected() {
				d.hello()
			}
		}
	}
	gone[0].destroy()
	w.looks(t)
	if w.whole(names...) || w.repairs.summary().Done > 0 {
		t.Error("what is away for a moment is made anew already")
	}
	day()
	// The stripe has four others, or it reads the bad one.
	for range 3 {
		w.untilWhole(t, names...)
		if c := w.chunkRecord(t, f.placed[2].ID); slices.ContainsFunc(c.Holders, func(h api.Holder) bool { return h.Device == liar.id && h.Lost }) {
			break
		}
		_, err := w.op.GetChunkFrom(testContext(t), f.placed[2].ID, liar.id)
		if err == nil {
			t.Fatal("bytes that were changed were handed out")
		}
		_, err = w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: liar.id, Leaves: 400})
		must(t, err)
	}
	if !w.audits.distrusted(liar.id) {
		t.Error("who did not serve what it should hold is trusted")
	}
	w.untilWhole(t, names...)
	gone[1].destroy()
	day()
	w.untilWhole(t, names...)
	w.checkHolders(t, devices, "coded")
	w.checkHolders(t, devices, "plain")
	if s := w.repairs.summary(); s.Rebuilt == 0 || s.Bytes == 0 || s.Done < s.Rebuilt {
		t.Errorf("counted %+v", s)
	}
	must(t, f.get(t, w))
	// Two others may go now.
	live := slices.DeleteFunc(slices.Clone(devices), func(d *device) bool { return slices.Contains(gone, d) || d == liar })
	live[0].leave()
	live[1].leave()
	must(t, f.get(t, w))
	if _, err := w.op.GetChunk(testContext(t), p.Chunks[0].ID); err != nil {
		t.Error(err)
	}
}

// A source that lies is found out by its own signature, and others are read.
func TestALyingSourceIsFoundOutAndOthersAreTried(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 8)
	f := w.putCoded(t, "lied", 20_000, api.Code{Data: 4, Parity: 2})
	// All but five are asked for a rebuild: with one bad among them, all the others.
	liar := byID(devices)[f.placed[0].Holders[0].Device]
	liar.mu.Lock()
	liar.chunks[f.placed[0].ID] = someBytes(len(liar.chunks[f.placed[0].ID]))
	liar.mu.Unlock()
	w.retire(t, f.placed[5].Holders[0].Device)
	w.untilWhole(t, "lied")
	eventually(t, "the liar is known", func() bool { return w.audits.distrusted(liar.id) })
	w.untilWhole(t, "lied")
	list, err := w.op.Audits(testContext(t), api.AuditQuery{Device: liar.id})
	must(t, err)
	if len(list.Audits) == 0 || list.Audits[0].Outcome != api.AuditWrong {
		t.Fatalf("it was challenged: %+v", list.Audits)
	}
	raw, err := w.op.Evidence(testContext(t), list.Audits[0].ID)
	must(t, err)
	if _, err := CheckEvidence(raw, EvidenceChecks{}); err != nil {
		t.Error(err)
	}
	w.checkHolders(t, devices, "lied")
	must(t, f.get(t, w))
}

// With too few devices nothing is begun, it is said why, and it goes on by itself.
func TestRepairWaitsForDevicesAndGoesOnWhenOneComes(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 6)
	f := w.putCoded(t, "few", 30_000, api.Code{Data: 4, Parity: 2})
	w.retire(t, devices[0].id)
	about := func(code string) (text string) {
		s, err := w.op.Status(testContext(t))
		must(t, err)
		for _, a := range s.Attention {
			if a.Code == code && a.About == "object:few" {
				text = a.Text
			}
		}
		return text
	}
	eventually(t, "it says that it waits", func() bool { return strings.Contains(about(api.AttentionRepair), "add a device") })
	v, err := w.op.Repair(testContext(t))
	must(t, err)
	if v.Endangered != 1 || v.Waiting != 1 || len(v.Queue) != 1 || v.Queue[0].Spare != 1 || v.Queue[0].Missing != 1 || !strings.Contains(v.Queue[0].Problem, "add a device") || v.Bytes != 0 {
		t.Errorf("shown as %+v", v)
	}
	served := w.orders(t, wire.KindChunkServe)
	w.looks(t)
	if n := w.orders(t, wire.KindChunkServe); n != served {
		t.Errorf("%d chunks were read for nothing", n-served)
	}
	w.device(t)
	w.advance(comePause + time.Second)
	w.untilWhole(t, "few")
	eventually(t, "it says so no more", func() bool { return about(api.AttentionRepair) == "" })
	must(t, f.get(t, w))
}

// orders counts the orders of a kind.
func (w *world) orders(t testing.TB, k wire.Kind) int {
	t.Helper()
	list, err := w.op.Orders(testContext(t), api.OrderQuery{Kind: k, Limit: 500})
	must(t, err)
	return len(list.Orders)
}

// The most endangered goes first.
func TestTheMostEndangeredGoesFirst(t *testing.T) {
	at := time.Now()
	mk := func(key string, spare int, age time.Duration, missing ...int) *task {
		return &task{unit: unit{key: key}, state: look{missing: missing, spare: spare}, since: at.Add(-age)}
	}
	want := []*task{mk("a", 0, time.Hour, 1), mk("b", 0, time.Minute, 1), mk("c", 1, 10*time.Hour, 1), mk("d", 3, 0, 1), mk("e", 0, 20*time.Hour)}
	got := []*task{want[3], want[4], want[1], want[2], want[0]}
	slices.SortFunc(got, func(a, b *task) int { return a.compare(b) })
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("place %d has %s", i, got[i].key)
		}
	}
}

// A coordinator is stopped in the middle of a repair: nothing is forgotten.
func TestARepairGoesOnAfterARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := repairing(t, dir)
	devices := w.devices(t, 9)
	f := w.putCoded(t, "restart", 100_000, api.Code{Data: 4, Parity: 2})
	var begun atomic.Int32
	for _, d := range devices {
		d.on(wire.KindChunkStore, func(o wire.Order) *reply {
			begun.Add(1)
			return nil // not answered to this life of the coordinator
		})
	}
	w.retire(t, f.placed[0].Holders[0].Device)
	w.retire(t, f.placed[1].Holders[0].Device)
	eventually(t, "some are being placed", func() bool { return begun.Load() > 0 && len(w.outbox.unfinished(wire.KindChunkServe)) == 0 })
	w.Close()
	w = repairing(t, dir)
	for _, d := range devices {
		if d.id == f.placed[0].Holders[0].Device || d.id == f.placed[1].Holders[0].Device {
			continue
		}
		d.on(wire.KindChunkStore, nil)
		d.connect(w)
	}
	w.untilWhole(t, "restart")
	w.checkHolders(t, devices, "restart")
	must(t, f.get(t, w))
}

// The absence of a device is counted through a restart.
func TestAnAbsenceIsCountedThroughARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := repairing(t, dir)
	devices := w.devices(t, 4)
	o := w.putFile(t, "away", someBytes(3000), 2)
	d := byID(devices)[w.claimedBy(o.Chunks[0].ID)]
	d.leave()
	eventually(t, "the absence is on record", func() bool { _, ok := w.repairs.away.get(string(d.id)); return ok })
	w.Close()
	w = repairing(t, dir)
	w.looks(t) // and does not begin to count anew
	w.advance(25 * time.Hour)
	for _, e := range devices {
		if e != d {
			e.connect(w)
		}
	}
	w.untilWhole(t, "away")
}

// A device that comes back with a good copy makes one too many: one goes, after a
// while, and never the last that can be read.
func TestACopyTooManyIsDroppedAfterAWhile(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 8)
	f := w.putCoded(t, "back", 30_000, api.Code{Data: 4, Parity: 2})
	id := f.placed[0].ID
	d := byID(devices)[f.placed[0].Holders[0].Device]
	d.leave()
	again := func() {
		for _, e := range devices {
			if e != d {
				e.hello()
			}
		}
	}
	w.advance(25 * time.Hour)
	again()
	w.untilWhole(t, "back")
	d.connect(w)
	count := func() (n int) {
		for _, e := range devices {
			if e.has(id) {
				n++
			}
		}
		return n
	}
	w.looks(t)
	if n := count(); n != 2 {
		t.Fatalf("%d devices have the shard right after it came back", n)
	}
	// The copy that would stay is bad, and nobody knows: nothing is dropped.
	spoilt := make(map[*device][]byte)
	for _, e := range devices {
		e.mu.Lock()
		if e.chunks[id] != nil {
			spoilt[e] = e.chunks[id]
			e.chunks[id] = bytes.Repeat([]byte{7}, len(e.chunks[id]))
		}
		e.mu.Unlock()
	}
	w.advance(spareKept + time.Minute)
	eventually(t, "a read of the copy that would stay has failed", func() bool {
		return strings.Contains(w.said.take(), "cannot be read from a device that keeps it")
	})
	if n := w.orders(t, wire.KindChunkDrop); n != 0 {
		t.Fatal("a copy was dropped and the other one is bad")
	}
	for e, data := range spoilt {
		e.mu.Lock()
		e.chunks[id] = data
		e.mu.Unlock()
	}
	w.advance(maxPause + time.Minute)
	eventually(t, "one copy is left", func() bool { return count() == 1 && len(w.chunkRecord(t, id).Holders) == 1 })
	w.untilWhole(t, "back")
	w.checkHolders(t, devices, "back")
	must(t, f.get(t, w))
}

// Shards that do not fit together, though each is what its id says, make something
// that is never placed; where another choice makes the right thing, it is.
func TestAWrongRebuiltShardIsNeverPlaced(t *testing.T) {
	t.Parallel()
	w := repairing(t, t.TempDir())
	devices := w.devices(t, 9)
	code := api.Code{Data: 2, Parity: 3}
	shards := [][]byte{someBytes(2000), someBytes(2000), nil, nil, nil}
	must(t, object.Reconstruct(code, shards))
	right := slices.Clone(shards[1])
	put := func(name string, wrong ...int) api.Object {
		o := api.Object{Name: name, Size: 4000, Code: &code, Manifest: []byte("{}")}
		for i, s := range shards {
			if s = slices.Clone(s); slices.Contains(wrong, i) {
				s[5] ^= byte(i + 1)
			}
			if i == 4 && name == "none" {
				s = bytes.Repeat([]byte{1}, len(s))
			}
			id := chunk.Sum(s).String()
			_, err := w.op.PutShard(testContext(t), id, s, name)
			must(t, err)
			o.Chunks = append(o.Chunks, api.Chunk{ID: id, Size: 2000})
		}
		o, err := w.op.PutObject(testContext(t), o)
		must(t, err)
		return o
	}
	// Shard 0 is another one than the others were made of.
	o := put("some", 0)
	w.retire(t, w.claimedBy(o.Chunks[1].ID))
	w.untilWhole(t, "some")
	data, err := w.op.GetChunk(testContext(t), o.Chunks[1].ID)
	must(t, err)
	if !bytes.Equal(data, right) {
		t.Error("the shard came back as something else")
	}
	o = put("none", 0, 1, 2, 3)
	lost := o.Chunks[4].ID
	w.retire(t, w.claimedBy(lost))
	eventually(t, "it says that they do not fit", func() bool {
		v := w.repairs.status()
		return slices.ContainsFunc(v.Queue, func(e api.Endangered) bool {
			return e.Object == "none" && strings.Contains(e.Problem, "do not fit together")
		})
	})
	for _, d := range devices {
		for id := range d.held() {
			if !d.has(id) {
				t.Errorf("device %s was given wrong bytes as %s", d.id, id)
			}
		}
	}
	if n := w.chunkRecord(t, lost).alive(); n != 0 {
		t.Errorf("%d devices are said to hold what cannot be made", n)
	}
}

func (d *device) held() map[string][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.chunks)
}

// Of two coordinators one has the lease.
func TestALeaseIsOneCoordinators(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	other := &repairs{leases: w.repairs.leases, now: w.time, self: "other", log: w.repairs.log}
	must(t, w.repairs.lease(ctx, "s.1"))
	if err := other.lease(ctx, "s.1"); err != errTaken {
		t.Errorf("the second one: %v", err)
	}
	must(t, w.repairs.lease(ctx, "s.1")) // it is ours
	other.unlease(ctx, "s.1")
	if _, ok := w.repairs.leases.get("s.1"); !ok {
		t.Error("the second one has ended our lease")
	}
	w.advance(leaseLife + time.Minute)
	must(t, other.lease(ctx, "s.1")) // ours was over
	if err := w.repairs.intend(ctx, "s.1", &dropping{}); err != errTaken {
		t.Errorf("who has lost the lease goes on: %v", err)
	}
	// With an order that is about to be made, it waits for endLeases.
	must(t, w.repairs.lease(ctx, "s.2"))
	must(t, w.repairs.intend(ctx, "s.2", &dropping{Device: "d", Order: "o", IDs: []string{"c"}}))
	w.repairs.unlease(ctx, "s.2")
	if err := w.repairs.lease(ctx, "s.2"); err != errTaken {
		t.Errorf("its own coordinator works on: %v", err)
	}
	if l, ok := w.repairs.leases.get("s.2"); !ok || l.Drop == nil {
		t.Error("the order that was about to be made is forgotten")
	}
}

// An order to drop that a crash came before is made, unless the device has the chunk
// again.
func TestAnIntendedDropIsMadeAfterACrash(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	ctx := testContext(t)
	kept, free := w.putFile(t, "kept", someBytes(100), 1).Chunks[0].ID, someBytes(100)
	stray := chunk.Sum(free).String()
	d.mu.Lock()
	d.chunks[stray] = free
	d.mu.Unlock()
	must(t, w.repairs.lease(ctx, "s.x"))
	must(t, w.repairs.intend(ctx, "s.x", &dropping{Device: d.id, Order: "01J0000000000000000000000A", IDs: []string{kept, stray}}))
	if got := w.repairs.intended(stray); !slices.Equal(got, []wire.DeviceID{d.id}) {
		t.Errorf("it is about to be dropped by %v", got)
	}
	w.repairs.self = "the next life"
	must(t, w.repairs.endLeases(ctx))
	eventually(t, "what it should not hold is dropped", func() bool { return !d.has(stray) })
	if !d.has(kept) {
		t.Error("what it holds by a receipt was dropped")
	}
	if _, ok := w.repairs.leases.get("s.x"); ok {
		t.Error("the lease is still there")
	}
}

// How many copies are wanted is kept; of an old record it is as many as there were.
func TestTheRecordKnowsHowManyCopiesAreWanted(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	w.devices(t, 4)
	data := someBytes(700)
	id := chunk.Sum(data).String()
	put := func(n int) {
		t.Helper()
		_, err := w.op.PutChunk(testContext(t), id, data, n)
		must(t, err)
	}
	put(3)
	if c := w.chunkRecord(t, id); c.wanted() != 3 {
		t.Errorf("%d are wanted", c.wanted())
	}
	put(2) // nobody relies on it yet
	if c := w.chunkRecord(t, id); c.wanted() != 2 {
		t.Errorf("then %d", c.wanted())
	}
	put(3)
	w.putFile(t, "two", data, 2)
	w.putFile(t, "three", data, 3)
	put(1)
	if c := w.chunkRecord(t, id); c.wanted() != 3 {
		t.Errorf("with two objects %d", c.wanted())
	}
	old := chunkRecord{Holders: []api.Holder{{Lost: true}, {}, {}}}
	if old.wanted() != 3 || (chunkRecord{}).wanted() != 1 {
		t.Errorf("an old record wants %d", old.wanted())
	}
	must(t, w.op.RemoveObject(testContext(t), "two"))
	must(t, w.op.RemoveObject(testContext(t), "three"))
}

// A device with the last copies is not sent away unless somebody says so.
func TestTheLastCopiesAreNotSentAwayUnasked(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	w.devices(t, 3)
	o := w.putFile(t, "only", someBytes(300), 1)
	two := w.putFile(t, "twice", someBytes(300), 2)
	d := w.claimedBy(o.Chunks[0].ID)
	_, err := w.op.RetireDevice(testContext(t), string(d), false)
	wantRefusal(t, err, http.StatusConflict, "last_copies")
	if err == nil || !strings.Contains(err.Error(), "only") || strings.Contains(err.Error(), "twice") || !strings.Contains(err.Error(), "--force") {
		t.Errorf("it says %v", err)
	}
	for _, h := range w.chunkRecord(t, two.Chunks[0].ID).Holders {
		if h.Device != d {
			_, err := w.op.RetireDevice(testContext(t), string(h.Device), false)
			must(t, err)
			break
		}
	}
	_, err = w.op.RetireDevice(testContext(t), string(d), true)
	must(t, err)
	must(t, w.op.RemoveObject(testContext(t), "only"))
	must(t, w.op.RemoveObject(testContext(t), "twice"))
}

func TestRepairPlansThatCannotBeAreRefused(t *testing.T) {
	for name, p := range map[string]RepairPlan{
		"negative":  {AtOnce: -1},
		"too many":  {AtOnce: maxRepairs + 1, Rate: 1 << 20, Grace: time.Hour},
		"no rate":   {AtOnce: 1, Grace: time.Hour},
		"no grace":  {AtOnce: 1, Rate: 1 << 20},
		"too quick": {AtOnce: 1, Rate: 1 << 20, Grace: time.Second},
	} {
		if p.check() == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if err := DefaultRepair.check(); err != nil {
		t.Error(err)
	}
	if err := (RepairPlan{}).check(); err != nil {
		t.Error(fmt.Errorf("no repair: %w", err))
	}
}

// Who has switched repair off still wants to know what there is to repair.
func TestWithoutRepairALossIsTold(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	devices := w.devices(t, 3)
	w.putFile(t, "gone", someBytes(3000), 3)
	attention := func(code string) func() bool {
		return func() bool {
			return slices.ContainsFunc(w.repairs.attention(), func(a api.Attention) bool { return a.Code == code && a.About == "object:gone" })
		}
	}
	w.retire(t, devices[0].id)
	eventually(t, "a copy less is told of", attention(api.AttentionRepair))
	w.retire(t, devices[1].id)
	w.retire(t, devices[2].id)
	eventually(t, "the loss is told of", attention(api.AttentionLost))
}
