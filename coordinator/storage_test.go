package coordinator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

func holders(p []api.Holder) []wire.DeviceID {
	var out []wire.DeviceID
	for _, h := range p {
		if !h.Lost {
			out = append(out, h.Device)
		}
	}
	slices.Sort(out)
	return out
}

func (w *world) chunkRecord(t testing.TB, id string) chunkRecord {
	t.Helper()
	c, ok := w.storage.chunks.get(id)
	if !ok {
		t.Fatalf("chunk %s has no record", id)
	}
	return c
}

func TestPlacementIsOnDistinctDevicesThatSignedForIt(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	devices := w.devices(t, 3)
	data := someBytes(100_000)
	id := chunk.Sum(data).String()
	p, err := w.op.PutChunk(testContext(t), id, data, 3)
	must(t, err)
	if got := holders(p.Holders); len(slices.Compact(got)) != 3 {
		t.Fatalf("held by %v", got)
	}
	for _, d := range devices {
		if !d.holds(id) {
			t.Errorf("device %s does not have it", d.id)
		}
		for _, h := range p.Holders {
			if h.Device != d.id {
				continue
			}
			r, err := wire.OpenAs[wire.Report](h.Receipt, d.pub(), wire.TypeReport)
			if err != nil || r.Order != h.Order || r.State != wire.Succeeded {
				t.Errorf("receipt of %s: %+v %v", d.id, r, err)
			}
		}
	}
	// The evidence travels with the answer and not into the record again.
	for _, h := range w.chunkRecord(t, id).Holders {
		if h.Receipt != nil {
			t.Error("an answer was written into the record that all share")
		}
	}
	// The coordinator keeps no copy of what it has placed.
	if _, err := w.staging.get(testContext(t), "chunk/"+id); !errors.Is(err, errNotStaged) {
		t.Errorf("the staged copy is still there: %v", err)
	}
}

func TestTooFewDevicesIsSaidSo(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	small := w.enrolled(t)
	small.capacity = 10
	small.connect(w)
	t.Cleanup(small.leave)
	w.enrolled(t) // never online
	gone := w.device(t)
	w.retire(t, gone.id)
	data := someBytes(1000)
	_, err := w.op.PutChunk(testContext(t), chunk.Sum(data).String(), data, 2)
	wantRefusal(t, err, http.StatusServiceUnavailable, "too_few_devices")
	if err == nil || !strings.Contains(err.Error(), "2 devices with room are needed, 1 can be found") {
		t.Errorf("it says %v", err)
	}
	if d.holds(chunk.Sum(data).String()) {
		t.Error("a copy was made for a placement that could not succeed")
	}
}

func TestAnotherDeviceTakesOverFromOneThatFails(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	for name, odd := range map[string]func(o wire.Order) *reply{
		"no space": func(wire.Order) *reply { return failed(wire.CodeNoSpace) },
		"receipt for another chunk": func(wire.Order) *reply {
			return &reply{state: wire.Succeeded, body: wire.Receipt{ID: chunk.Sum([]byte("x")).String(), Size: 1000, Volume: "v"}}
		},
		"receipt for another size": func(o wire.Order) *reply {
			b, _ := wire.DecodeBody[wire.ChunkStore](o)
			return &reply{state: wire.Succeeded, body: wire.Receipt{ID: b.ID, Size: 999, Volume: "v"}}
		},
		"no receipt": func(wire.Order) *reply { return &reply{state: wire.Succeeded} },
	} {
		t.Run(name, func(t *testing.T) {
			bad := w.enrolled(t)
			bad.capacity = 1 << 50 // it is asked first
			bad.on(wire.KindChunkStore, odd)
			bad.connect(w)
			t.Cleanup(bad.leave)
			good := w.devices(t, 2)
			data := someBytes(1000)
			id := chunk.Sum(data).String()
			p, err := w.op.PutChunk(testContext(t), id, data, 2)
			must(t, err)
			want := []wire.DeviceID{good[0].id, good[1].id}
			slices.Sort(want)
			if got := holders(p.Holders); !slices.Equal(got, want) {
				t.Errorf("held by %v, the good ones are %v", got, want)
			}
			if len(bad.orders) == 0 {
				t.Error("the bad device was not even asked")
			}
		})
	}
}

func TestTheSameFileTwiceIsStoredOnce(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	devices := w.devices(t, 4)
	data := someBytes(300_000)
	id := chunk.Sum(data).String()
	var wg sync.WaitGroup
	for range 4 { // at once, too
		wg.Go(func() {
			if _, err := w.op.PutChunk(testContext(t), id, data, 2); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	copies := 0
	for _, d := range devices {
		if d.holds(id) {
			copies++
		}
	}
	if copies != 2 {
		t.Errorf("%d copies of a chunk that was to have 2", copies)
	}
	first := w.putFile(t, "twice/a", data, 2)
	again := w.putFile(t, "twice/a", data, 2)
	if !first.Created.Equal(again.Created) {
		t.Error("a repeat made the object anew")
	}
	must(t, w.op.RemoveObject(testContext(t), "twice/a"))
}

func TestReadingTriesTheNextHolder(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	for name, c := range map[string]struct {
		odd  func(d *device, o wire.Order) *reply
		lost bool // the holder is marked
	}{
		"lost":      {func(*device, wire.Order) *reply { return failed(wire.CodeLost) }, true},
		"not there": {func(*device, wire.Order) *reply { return failed(wire.CodeNotFound) }, true},
		"refuses":   {func(*device, wire.Order) *reply { return &reply{state: wire.Rejected, code: wire.CodePolicy} }, false},
		"lies":      {func(*device, wire.Order) *reply { return &reply{state: wire.Succeeded} }, false},
		"serves other bytes": {func(d *device, o wire.Order) *reply {
			b, _ := wire.DecodeBody[wire.ChunkServe](o)
			if status, _ := d.transfer(http.MethodPut, b.URL, make([]byte, 1000)); status != http.StatusUnprocessableEntity {
				d.t.Errorf("other bytes were answered with %d", status)
			}
			return &reply{state: wire.Succeeded}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			devices := w.devices(t, 2)
			data := someBytes(1000)
			id := chunk.Sum(data).String()
			_, err := w.op.PutChunk(testContext(t), id, data, 2)
			must(t, err)
			bad := devices[0]
			asked := make(chan struct{}, 100)
			bad.on(wire.KindChunkServe, func(o wire.Order) *reply { asked <- struct{}{}; return c.odd(bad, o) })
			for len(asked) == 0 { // the first holder is chosen at random
				got, err := w.op.GetChunk(testContext(t), id)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%d bytes, %v", len(got), err)
				}
			}
			if marked := len(holders(w.chunkRecord(t, id).Holders)) == 1; marked != c.lost {
				t.Errorf("marked as lost: %v, want %v", marked, c.lost)
			}
			// With nobody else left it is said so.
			devices[1].leave()
			_, err = w.op.GetChunk(testContext(t), id)
			wantCode := "unreadable"
			if c.lost {
				wantCode = "no_holder_online"
			}
			wantRefusal(t, err, http.StatusServiceUnavailable, wantCode)
		})
	}
}

func TestASilentHolderIsPassedOver(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	devices := w.devices(t, 2)
	data := someBytes(1000)
	id := chunk.Sum(data).String()
	_, err := w.op.PutChunk(testContext(t), id, data, 2)
	must(t, err)
	devices[0].on(wire.KindChunkServe, silent)
	// Both orders of asking: one reader at a time would wait twice as long.
	w.storage.wait = 15 * time.Second // in which the other one does answer
	defer func() { w.storage.wait = w.cfg.serve }()
	for len(devices[0].orders) < 2 { // its own store order is the first
		got, err := w.storage.read(testContext(t), id)
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	if got := holders(w.chunkRecord(t, id).Holders); len(got) != 2 {
		t.Error("silence was taken for a loss")
	}
}

// A line may be so slow that a chunk takes longer than anybody waits for silence.
func TestASlowUploadIsWaitedFor(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	data := someBytes(64 << 10)
	id := chunk.Sum(data).String()
	_, err := w.op.PutChunk(testContext(t), id, data, 1)
	must(t, err)
	const quiet, parts = 12 * time.Second, 12
	w.storage.wait = quiet
	d.on(wire.KindChunkServe, func(o wire.Order) *reply {
		b, _ := wire.DecodeBody[wire.ChunkServe](o)
		slow, send := io.Pipe()
		go func() {
			defer send.Close()
			for part := range slices.Chunk(data, len(data)/parts+1) {
				time.Sleep(quiet / 8) // that time passes is what this is about
				if _, err := send.Write(part); err != nil {
					return
				}
			}
		}()
		if status, _ := call(d.t, d.http, http.MethodPut, d.w.URL()+b.URL, slow); status != http.StatusNoContent {
			return failed(wire.CodeTransfer)
		}
		return &reply{state: wire.Succeeded}
	})
	asked := w.orders(t, wire.KindChunkServe)
	got, err := w.storage.read(testContext(t), id)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if n := w.orders(t, wire.KindChunkServe) - asked; n != 1 {
		t.Errorf("it was asked for %d times", n)
	}
}

// Who reads "stored" may forget the file: the record of it must be on disk by then.
func TestAnObjectIsStoredWhenItsRecordIsOnDisk(t *testing.T) {
	w := ownWorld(t)
	w.devices(t, 2)
	safe := w.storage.durable
	var synced []string
	w.storage.durable = func(buckets ...string) error {
		synced = buckets
		return errors.Join(safe(buckets...), errors.New("the disk is gone"))
	}
	data := someBytes(100)
	_, err := w.tryPutFile(testContext(t), "kept", data, 2)
	if err == nil || !slices.Contains(synced, "objects") || !slices.Contains(synced, "chunks") {
		t.Errorf("after a failed sync of %v: %v", synced, err)
	}
	w.storage.durable = safe
	w.putFile(t, "kept", data, 2)
}

// An object whose record is damaged still needs its chunks.
func TestADamagedRecordDropsNothing(t *testing.T) {
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.devices(t, 2)[0]
	o := w.putFile(t, "kept", someBytes(100), 2)
	key := objectKey("kept")
	whole, err := w.storage.objects.kv.Get(ctx, key)
	must(t, err)
	_, err = w.storage.objects.kv.Put(ctx, key, []byte(`{"name":"kept","chunks":{}}`))
	must(t, err)
	eventually(t, "the damage is seen", func() bool { return w.storage.objects.unreadable() == 1 })
	w.advance(orphanLife + time.Hour)
	if err := w.storage.dropOrphans(ctx); err == nil {
		t.Error("chunks were looked through with an object that cannot be read")
	}
	if _, ok := w.storage.chunks.get(o.Chunks[0].ID); !ok || !d.holds(o.Chunks[0].ID) {
		t.Error("its chunk was dropped")
	}
	_, err = w.storage.objects.kv.Put(ctx, key, whole.Value())
	must(t, err)
	eventually(t, "it can be read again", func() bool { return w.storage.objects.unreadable() == 0 })
	must(t, w.storage.dropOrphans(ctx))
}

// Two different readers of one chunk use the same name on the data plane.
func TestReadersOfOneChunkDoNotDisturbEachOther(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	devices := w.devices(t, 2)
	data := someBytes(50_000)
	id := chunk.Sum(data).String()
	_, err := w.op.PutChunk(testContext(t), id, data, 2)
	must(t, err)
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			not := [][]wire.DeviceID{nil, {devices[0].id}, {devices[1].id}}[i%3]
			got, err := w.storage.read(testContext(t), id, not...)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	wg.Wait()
	for _, d := range devices {
		for len(d.orders) > 0 {
			o := <-d.orders
			if v := w.ended(t, o); v.State != wire.Succeeded {
				t.Errorf("order %s: %s", o.Kind, v.State)
			}
		}
	}
}

func TestRemovingDropsOnlyWhatNobodyElseNeeds(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 2)
	common, mine := someBytes(1000), someBytes(2000)
	put := func(name string, parts ...[]byte) {
		t.Helper()
		o := api.Object{Name: name}
		h := sha256.New()
		for _, p := range parts {
			id := chunk.Sum(p).String()
			_, err := w.op.PutChunk(ctx, id, p, 2)
			must(t, err)
			o.Chunks = append(o.Chunks, api.Chunk{ID: id, Size: int64(len(p))})
			o.Size += int64(len(p))
			h.Write(p)
		}
		o.SHA256 = hex.EncodeToString(h.Sum(nil))
		_, err := w.op.PutObject(ctx, o)
		must(t, err)
	}
	put("rm/a", common, mine, mine) // one chunk twice in a file is no trouble either
	put("rm/b", common)
	have := func(data []byte) int {
		n := 0
		for _, d := range devices {
			if d.holds(chunk.Sum(data).String()) {
				n++
			}
		}
		return n
	}
	must(t, w.op.RemoveObject(ctx, "rm/a"))
	eventually(t, "the chunk that nobody needs is dropped", func() bool { return have(mine) == 0 })
	if have(common) != 2 {
		t.Errorf("a chunk that another object needs is on %d of 2 devices", have(common))
	}
	var out bytes.Buffer
	if _, err := object.Get(ctx, w.op, "rm/b", &out, nil); err != nil || !bytes.Equal(out.Bytes(), common) {
		t.Errorf("the other object: %v", err)
	}
	must(t, w.op.RemoveObject(ctx, "rm/b"))
	eventually(t, "the rest is dropped", func() bool { return have(common) == 0 })
	wantRefusal(t, w.op.RemoveObject(ctx, "rm/b"), http.StatusNotFound, wire.CodeNotFound)
	_, err := w.op.GetChunk(ctx, chunk.Sum(common).String())
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
}

// A store order must never reach a device that has still to drop the same
// chunk: the drop could come last.
func TestPuttingAgainWhileADropIsPendingLosesNothing(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	slow := w.enrolled(t)
	slow.capacity = 1 << 50 // it would be the first choice
	slow.connect(w)
	t.Cleanup(slow.leave)
	quick := w.device(t)
	data := someBytes(1000)
	id := chunk.Sum(data).String()
	w.putFile(t, "again", data, 2)
	told, release := make(chan struct{}), make(chan struct{})
	slow.on(wire.KindChunkDrop, func(o wire.Order) *reply {
		close(told)
		<-release
		return slow.honest(o)
	})
	must(t, w.op.RemoveObject(ctx, "again"))
	next(t, told, "the order to drop")
	third := w.device(t)
	// There are two others: the slow one is passed over.
	w.putFile(t, "again", data, 2)
	want := []wire.DeviceID{quick.id, third.id}
	slices.Sort(want)
	if got := holders(w.chunkRecord(t, id).Holders); !slices.Equal(got, want) {
		t.Errorf("held by %v, want %v", got, want)
	}
	// A third copy needs the slow one: it is waited for.
	placed := make(chan error, 1)
	go func() {
		_, err := w.op.PutChunk(ctx, id, data, 3)
		placed <- err
	}()
	close(release)
	must(t, next(t, placed, "the placement"))
	slow.on(wire.KindChunkDrop, nil)
	for _, d := range []*device{slow, quick, third} {
		eventually(t, "each holder has it", func() bool { return d.holds(id) })
	}
	must(t, w.op.RemoveObject(ctx, "again"))
}

// The same as a race, without anybody holding anything up.
func TestPutAndRemoveInARowNeverLose(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 3)
	data := someBytes(3000)
	id := chunk.Sum(data).String()
	for round := range 8 {
		w.putFile(t, "row", data, 2)
		for _, h := range holders(w.chunkRecord(t, id).Holders) {
			for _, d := range devices {
				if d.id == h && !d.holds(id) {
					t.Fatalf("round %d: %s has given a receipt and does not have it", round, h)
				}
			}
		}
		got, err := w.op.GetChunk(ctx, id)
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("round %d: %v", round, err)
		}
		must(t, w.op.RemoveObject(ctx, "row"))
	}
}

// A placement in the middle of a removal waits until the removal's orders are out.
func TestNoPlacementBetweenRemovalAndItsDropOrder(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	w.devices(t, 2)
	data := someBytes(1000)
	id := chunk.Sum(data).String()
	w.putFile(t, "between", data, 2)
	placed := make(chan error, 1)
	unlock := w.storage.placing.lock(id) // as a placement would
	removed := make(chan error, 1)
	go func() { removed <- w.op.RemoveObject(testContext(t), "between") }()
	eventually(t, "the object is gone", func() bool { _, err := w.storage.object("between"); return err != nil })
	if _, ok := w.storage.chunks.get(id); !ok {
		t.Error("the record went while a placement was under way")
	}
	unlock()
	must(t, next(t, removed, "the removal"))
	go func() {
		_, err := w.op.PutChunk(testContext(t), id, data, 2)
		placed <- err
	}()
	must(t, next(t, placed, "the placement"))
}

func TestAnyNameWorks(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	w.devices(t, 2)
	data := someBytes(10)
	for _, name := range []string{"a", "with space", "a/b/c", "/leading", "trailing/", "..", ".", "a/../b", "%2F", "a%20b", "a+b?c=d&e#f", "überraschung ☕ 日本",
		"a.b.>.*", `"quoted\`, strings.Repeat("x", maxName), strings.Repeat("ü", maxName/2)} {
		o := w.putFile(t, name, data, 2)
		if o.Name != name {
			t.Errorf("%q became %q", name, o.Name)
		}
		if got, err := w.op.Object(ctx, name); err != nil || got.Name != name {
			t.Errorf("%q: %q %v", name, got.Name, err)
		}
		list, err := w.op.Objects(ctx)
		if err != nil || !slices.ContainsFunc(list, func(o api.ObjectEntry) bool { return o.Name == name }) {
			t.Errorf("%q is not listed: %v", name, err)
		}
		if err := w.op.RemoveObject(ctx, name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	if left, err := w.op.Objects(ctx); err != nil || len(left) != 0 {
		t.Errorf("%d objects left: %v", len(left), err)
	}
	for _, name := range []string{strings.Repeat("x", maxName+1), "new\nline", "bell\a", "\xff"} {
		_, err := w.op.PutObject(ctx, api.Object{Name: name})
		wantRefusal(t, err, http.StatusBadRequest, "bad_object")
	}
}

func TestATakenNameIsNotGivenAway(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	w.devices(t, 2)
	data := someBytes(10)
	w.putFile(t, "taken", data, 2)
	_, err := w.tryPutFile(ctx, "taken", someBytes(10), 2)
	wantRefusal(t, err, http.StatusConflict, "exists")
	var out bytes.Buffer
	if _, err := object.Get(ctx, w.op, "taken", &out, nil); err != nil || !bytes.Equal(out.Bytes(), data) {
		t.Errorf("the first object: %v", err)
	}
	// Two at once: one wins, and its content is what the name stands for.
	var wg sync.WaitGroup
	errs := make([]error, 6)
	for i := range errs {
		wg.Go(func() { _, errs[i] = w.tryPutFile(ctx, "race", bytes.Repeat([]byte{byte(i + 1)}, 100), 2) })
	}
	wg.Wait()
	won := -1
	for i, err := range errs {
		if err == nil && won < 0 {
			won = i
		} else if err == nil {
			t.Errorf("%d and %d both have the name", won, i)
		} else {
			wantRefusal(t, err, http.StatusConflict, "exists")
		}
	}
	if o, err := w.op.Object(ctx, "race"); won < 0 || err != nil || o.Chunks[0].ID != chunk.Sum(bytes.Repeat([]byte{byte(won + 1)}, 100)).String() {
		t.Errorf("winner %d, object %+v %v", won, o, err)
	}
	must(t, w.op.RemoveObject(ctx, "taken"))
	must(t, w.op.RemoveObject(ctx, "race"))
}

func TestObjectsThatAreNotWhatTheySayAreRefused(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	w.devices(t, 2)
	data := someBytes(10)
	id := chunk.Sum(data).String()
	_, err := w.op.PutChunk(ctx, id, data, 2)
	must(t, err)
	for name, c := range map[string]struct {
		o      api.Object
		status int
		code   string
	}{
		"a chunk nobody has":    {api.Object{Size: 5, Chunks: []api.Chunk{{ID: chunk.Sum([]byte("?")).String(), Size: 5}}}, http.StatusConflict, "chunk_missing"},
		"another size":          {api.Object{Size: 11, Chunks: []api.Chunk{{ID: id, Size: 11}}}, http.StatusBadRequest, "bad_object"},
		"sizes that do not add": {api.Object{Size: 11, Chunks: []api.Chunk{{ID: id, Size: 10}}}, http.StatusBadRequest, "bad_object"},
		"no id":                 {api.Object{Size: 10, Chunks: []api.Chunk{{ID: "x", Size: 10}}}, http.StatusBadRequest, "bad_object"},
		"a negative size":       {api.Object{Size: -10, Chunks: []api.Chunk{{ID: id, Size: -10}}}, http.StatusBadRequest, "bad_object"},
		"too many chunks":       {api.Object{Size: 10 * (api.MaxChunks + 1), Chunks: slices.Repeat([]api.Chunk{{ID: id, Size: 10}}, api.MaxChunks+1)}, http.StatusRequestEntityTooLarge, "too_large"},
	} {
		c.o.Name = "bad/" + name
		_, err := w.op.PutObject(ctx, c.o)
		t.Log(name)
		wantRefusal(t, err, c.status, c.code)
		if _, err := w.op.Object(ctx, c.o.Name); err == nil {
			t.Errorf("%s: the object is there", name)
		}
	}
	// The largest that is allowed can be kept.
	most := api.Object{Name: strings.Repeat("n", maxName), Size: 10 * api.MaxChunks, SHA256: strings.Repeat("0", 64),
		Chunks: slices.Repeat([]api.Chunk{{ID: id, Size: 10}}, api.MaxChunks)}
	if _, err := w.storage.objects.change(ctx, objectKey(most.Name), func(o *api.Object, _ bool) error {
		*o = most
		for i := range o.Chunks {
			o.Chunks[i].Size = chunk.MaxSize
		}
		return nil
	}); err != nil {
		t.Errorf("an object of %d chunks: %v", api.MaxChunks, err)
	}
	must(t, w.storage.objects.remove(ctx, objectKey(most.Name), func(api.Object) bool { return true }))
}

// Each device gets chunks in proportion to its free space, up to what counts.
func TestPlacementFollowsFreeSpace(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	fit := []offer{{device: "small", weight: 1 << 38}, {device: "large", weight: 3 << 38}, {device: "largest", weight: 1 << 40}, {device: "boaster", weight: 1 << 40}}
	const draws = 40_000
	first := map[wire.DeviceID]int{}
	for range draws {
		got := drawDevices(fit, around{map[string]int{}, map[netip.Prefix]int{}}, 3, rng.ExpFloat64)
		if len(got) != 3 || got[0] == got[1] || got[1] == got[2] || got[0] == got[2] {
			t.Fatalf("drawn: %v", got)
		}
		first[got[0]]++
	}
	for d, share := range map[wire.DeviceID]float64{"small": 1. / 12, "large": 3. / 12, "largest": 4. / 12, "boaster": 4. / 12} {
		// Six standard deviations: a false alarm in 10^8 runs.
		want, slack := draws*share, 6*math.Sqrt(draws*share*(1-share))
		if got := float64(first[d]); math.Abs(got-want) > slack {
			t.Errorf("%s was drawn first %v times, expected %.0f ± %.0f", d, got, want, slack)
		}
	}
	if got := drawDevices(fit[:2], around{map[string]int{}, map[netip.Prefix]int{}}, 3, rng.ExpFloat64); len(got) != 2 {
		t.Errorf("of two devices, drawn: %v", got)
	}
}

// What is left of uploads that were given up goes, a day later.
func TestOrphansAreDropped(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 2)
	kept, orphan, again, fresh := someBytes(100), someBytes(200), someBytes(300), someBytes(400)
	put := func(data []byte) string {
		t.Helper()
		id := chunk.Sum(data).String()
		_, err := w.op.PutChunk(ctx, id, data, 2)
		must(t, err)
		return id
	}
	sweep := func() {
		t.Helper()
		must(t, w.storage.dropOrphans(ctx))
		for _, d := range devices {
			d.hello()
		}
	}
	w.putFile(t, "kept", kept, 2)
	gone, back := put(orphan), put(again)
	// A claim of an object that was never made is none.
	_, err := w.storage.chunks.change(ctx, gone, func(c *chunkRecord, _ bool) error { c.Refs = []string{"crashed"}; return nil })
	must(t, err)
	sweep()
	if !devices[0].holds(gone) {
		t.Error("it was dropped at once")
	}
	w.advance(orphanLife + time.Minute)
	for _, d := range devices {
		d.hello()
	}
	put(again)
	put(fresh)
	sweep()
	for _, d := range devices {
		eventually(t, "the orphan is dropped", func() bool { return !d.holds(gone) })
	}
	if _, ok := w.storage.chunks.get(gone); ok {
		t.Error("its record is still there")
	}
	for _, id := range []string{chunk.Sum(kept).String(), back, chunk.Sum(fresh).String()} {
		if len(holders(w.chunkRecord(t, id).Holders)) != 2 || len(w.storage.dropping(id)) > 0 || !devices[0].holds(id) {
			t.Errorf("chunk %s went too", id)
		}
	}
}

func TestAnObjectThatIsNotMadeClaimsNothing(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	w.devices(t, 2)
	one, two := someBytes(100), someBytes(100)
	w.putFile(t, "claimed", two, 2)
	o := api.Object{Name: "unmade", Size: 300}
	for _, p := range [][]byte{one, two, someBytes(100)} { // the third is on no device
		o.Chunks = append(o.Chunks, api.Chunk{ID: chunk.Sum(p).String(), Size: 100})
	}
	_, err := w.op.PutChunk(ctx, o.Chunks[0].ID, one, 2)
	must(t, err)
	_, err = w.op.PutObject(ctx, o)
	wantRefusal(t, err, http.StatusConflict, "chunk_missing")
	if refs := w.chunkRecord(t, o.Chunks[0].ID).Refs; len(refs) != 0 {
		t.Errorf("claimed by %v", refs)
	}
	if refs := w.chunkRecord(t, o.Chunks[1].ID).Refs; !slices.Equal(refs, []string{objectKey("claimed")}) {
		t.Errorf("the other object's claim: %v", refs)
	}
	must(t, w.op.RemoveObject(ctx, "claimed"))
}

// Who asked for a placement may be gone when the receipt comes.
func TestALateReceiptIsKept(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	stored, release := make(chan struct{}), make(chan struct{})
	d.on(wire.KindChunkStore, func(o wire.Order) *reply {
		r := d.honest(o)
		close(stored)
		<-release
		return r
	})
	data := someBytes(1000)
	id := chunk.Sum(data).String()
	ctx, cancel := context.WithCancel(testContext(t))
	placed := make(chan error, 1)
	go func() {
		_, err := w.storage.place(ctx, id, data, 1, "")
		placed <- err
	}()
	next(t, stored, "the store order")
	cancel()
	if err := next(t, placed, "the end of the placement"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(release)
	eventually(t, "the receipt is kept", func() bool {
		return slices.Equal(holders(w.chunkRecord(t, id).Holders), []wire.DeviceID{d.id})
	})
}

func TestAFileComesBackWhole(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	devices := w.devices(t, 3)
	for _, size := range []int{0, 1, chunk.DefaultSize, 3*chunk.DefaultSize + 17} {
		data := someBytes(size)
		var safe sync.Map
		o, placed, err := object.PutPlain(ctx, w.op, "file", bytes.NewReader(data), 2, func(n int64) { safe.Store(n, true) })
		must(t, err)
		if want := (size + chunk.DefaultSize - 1) / chunk.DefaultSize; len(o.Chunks) != want || len(placed) != want {
			t.Errorf("%d bytes made %d chunks", size, len(o.Chunks))
		}
		devices[0].leave() // one device down does not matter
		var out bytes.Buffer
		if _, err := object.Get(ctx, w.op, "file", &out, nil); err != nil || !bytes.Equal(out.Bytes(), data) {
			t.Errorf("%d bytes: got %d, %v", size, out.Len(), err)
		}
		devices[0].connect(w)
		must(t, w.op.RemoveObject(ctx, "file"))
	}
}
