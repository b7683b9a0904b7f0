package coordinator

import (
	"encoding/binary"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// give puts chunks on a device that no record knows of.
func (d *device) give(n int, seed byte) (ids []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range n {
		data := append(binary.BigEndian.AppendUint32(nil, uint32(i)), seed)
		id := chunk.Sum(data).String()
		d.chunks[id] = data
		ids = append(ids, id)
	}
	return ids
}

// missDrop has an order to drop time out while a device is away.
func (w *world) missDrop(t *testing.T, d *device, ids []string) {
	t.Helper()
	o, err := w.outbox.submit(testContext(t), d.id, wire.KindChunkDrop, wire.ChunkDrop{IDs: ids[:1]}, time.Minute)
	must(t, err)
	w.advance(2 * time.Minute)
	eventually(t, "the order to drop has timed out", func() bool {
		v, err := w.outbox.get(testContext(t), d.id, o.ID)
		must(t, err)
		return v.State == wire.TimedOut
	})
}

// What a device was to drop while it was away for too long goes when it is back, and
// nothing else: neither what it is to hold, nor the output of a job that nobody has
// taken yet. It is asked once.
func TestWhatADeviceWasToDropWhileItWasAwayGoesWhenItIsBack(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	devices := w.devices(t, 2)
	d := devices[0]
	w.putFile(t, "kept", someBytes(5000), 2)
	keep := slices.Collect(maps.Keys(d.held()))
	output := d.give(1, 'o')
	d.on(wire.KindJobRun, func(wire.Order) *reply {
		return &reply{state: wire.Succeeded, body: wire.JobResult{Outputs: []wire.JobOutput{{Name: "out", Size: 5, Parts: []wire.JobPart{{Chunk: output[0], Size: 5}}}}}}
	})
	job, err := w.outbox.submit(testContext(t), d.id, wire.KindJobRun, wire.JobRun{}, time.Hour)
	must(t, err)
	eventually(t, "the job has ended", func() bool {
		v, err := w.outbox.get(testContext(t), d.id, job.ID)
		must(t, err)
		return v.State == wire.Succeeded
	})
	d.leave()
	strays := d.give(700, 's')
	w.missDrop(t, d, strays)
	d.connect(w)
	eventually(t, "what nobody needs is gone", func() bool { return !slices.ContainsFunc(strays, d.holds) })
	for _, id := range slices.Concat(keep, output) {
		if !d.holds(id) {
			t.Errorf("it was told to drop %s, which is needed", id)
		}
	}
	eventually(t, "the row says that nothing is left", func() bool {
		row, ok := w.leftovers.rows.get(string(d.id))
		return ok && !row.left() && !row.open() && row.Freed == len(strays)
	})
	w.advance(2 * leftoverPause)
	must(t, w.leftovers.settle(testContext(t), d.id))
	if n := w.orders(t, wire.KindChunkHoldings); n != 1 {
		t.Errorf("it was asked %d times", n)
	}
}

// More than one answer names is dropped page by page, over a restart of the coordinator,
// and an agent that knows no pages is not asked for ever.
func TestLeftoversOfManyPages(t *testing.T) {
	t.Parallel()
	for name, pages := range map[string]bool{"an agent that knows pages": true, "one that does not": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := open(t, t.TempDir())
			d := w.device(t)
			d.leave()
			strays := d.give(wire.MaxHoldings+700, 'p')
			if !pages {
				d.on(wire.KindChunkHoldings, func(o wire.Order) *reply {
					o.Body = []byte("{}")
					return d.honest(o)
				})
				d.on(wire.KindChunkDrop, func(wire.Order) *reply { return &reply{state: wire.Succeeded} }) // and stays full
			}
			w.missDrop(t, d, strays)
			w.Close()
			w = open(t, w.dir)
			t.Cleanup(w.Close)
			d.connect(w)
			eventually(t, "the walk has ended", func() bool {
				row, ok := w.leftovers.rows.get(string(d.id))
				return ok && !row.left() && !row.open()
			})
			want := 2
			if n := w.orders(t, wire.KindChunkHoldings); n != want {
				t.Errorf("it was asked %d times, want %d", n, want)
			}
			if pages {
				eventually(t, "all is gone", func() bool { return len(d.held()) == 0 })
			}
		})
	}
}

// A page waits until the jobs have ended that may have stored what it names.
func TestLeftoversWaitForJobs(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	release := make(chan struct{})
	var output []string
	d.on(wire.KindJobRun, func(wire.Order) *reply {
		<-release
		return &reply{state: wire.Succeeded, body: wire.JobResult{Outputs: []wire.JobOutput{{Name: "out", Size: 5, Parts: []wire.JobPart{{Chunk: output[0], Size: 5}}}}}}
	})
	output = d.give(1, 'j')
	strays := d.give(3, 'x')
	_, err := w.outbox.submit(testContext(t), d.id, wire.KindJobRun, wire.JobRun{}, 2*time.Hour)
	must(t, err)
	next(t, d.orders, "the job")
	w.leftovers.undropped(d.id, "01JDB5Z3W4YQ5R6S7T8V9WAXBY")
	w.leftovers.arrived(d.id)
	eventually(t, "the page is there", func() bool {
		row, _ := w.leftovers.rows.get(string(d.id))
		if row.Order == "" {
			return false
		}
		v, err := w.outbox.get(testContext(t), d.id, row.Order)
		return err == nil && v.State == wire.Succeeded
	})
	must(t, w.leftovers.settle(testContext(t), d.id))
	if !d.holds(output[0]) || !d.holds(strays[0]) {
		t.Fatal("something was dropped while a job may still tell of it")
	}
	close(release)
	eventually(t, "the rest is gone", func() bool {
		must(t, w.leftovers.settle(testContext(t), d.id))
		return !slices.ContainsFunc(strays, d.holds)
	})
	if !d.holds(output[0]) {
		t.Error("the output of the job is gone")
	}
}
