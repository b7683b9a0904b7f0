package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// TestKilledBetweenEffectAndReport kills agents at random moments while 200
// chunks are stored: what was receipted is there, and no order hangs.
func TestKilledBetweenEffectAndReport(t *testing.T) {
	t.Parallel()
	const objects, chunks, wantKills = 40, 5, 10
	f := newFleet(t)
	rng := testbed.Seeded(t)
	f.enrol(3, false)

	var contents [objects][]byte
	for i := range contents {
		for range chunks {
			contents[i] = append(contents[i], testbed.RandomBytes(rng, 1+rng.IntN(60_000))...)
		}
	}
	placed := make(chan api.Placement, 3*objects*chunks)
	var left atomic.Int64
	left.Store(objects)
	var users sync.WaitGroup
	work := make(chan int)
	for range 4 {
		users.Go(func() {
			for i := range work {
				f.storeInChunks(fmt.Sprint("object-", i), contents[i], chunks, placed)
				left.Add(-1)
			}
		})
	}
	go func() {
		defer close(work)
		for i := range objects {
			work <- i
		}
	}()

	kills := 0
	for ; left.Load() > 0 || kills < wantKills; kills++ {
		if t.Failed() || f.Ctx.Err() != nil {
			break
		}
		d := f.devices[rng.IntN(len(f.devices))]
		// No wait for anything: the moment is the point.
		time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
		d.proc.Kill()
		d.start()
	}
	users.Wait()
	close(placed)
	if t.Failed() {
		return
	}
	t.Logf("%d kills", kills)
	for _, d := range f.devices {
		d.awaitOnline()
	}
	for i, want := range contents {
		var got bytes.Buffer
		if _, err := object.Get(f.Ctx, f.Client, fmt.Sprint("object-", i), &got, nil); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("object %d came back as %d bytes, %v", i, got.Len(), err)
		}
	}
	f.checkAllOrdersEnd()
	f.checkReceipts(placed)
}

// storeInChunks stores an object and tries again as a user would, because a
// device may be killed more often than the coordinator has others to ask.
func (f *fleet) storeInChunks(name string, data []byte, n int, placed chan<- api.Placement) {
	o := api.Object{Name: name, Size: int64(len(data))}
	sum := sha256.Sum256(data)
	o.SHA256 = hex.EncodeToString(sum[:])
	again := func(what string, call func() error) bool {
		for deadline := time.Now().Add(testbed.Patience); ; {
			err := call()
			if err == nil {
				return true
			}
			var refused *api.Error
			if !errors.As(err, &refused) || refused.Status < 500 || time.Now().After(deadline) {
				f.T.Errorf("%s of %s: %v", what, name, err)
				return false
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	for size := (len(data) + n - 1) / n; len(data) > 0; data = data[min(size, len(data)):] {
		part := data[:min(size, len(data))]
		id := chunk.Sum(part).String()
		if !again("a chunk", func() error {
			p, err := f.Client.PutChunk(f.Ctx, id, part, 2)
			if err == nil {
				placed <- p
			}
			return err
		}) {
			return
		}
		o.Chunks = append(o.Chunks, api.Chunk{ID: id, Size: int64(len(part))})
	}
	again("the record", func() error {
		_, err := f.Client.PutObject(f.Ctx, o)
		return err
	})
}

// checkReceipts stops the fleet and looks for every receipted chunk on the
// volume that its receipt names, without any agent between.
func (f *fleet) checkReceipts(placed <-chan api.Placement) {
	f.T.Helper()
	volumes := map[wire.DeviceID]*store.Volume{}
	for _, d := range f.devices {
		f.Stopped(d.proc, 0)
		v, err := store.Open(d.state("volumes", "main"), store.Options{Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			f.T.Fatal(err)
		}
		defer v.Close()
		volumes[d.id] = v
		// Nothing else there is damaged either: no kill of a process takes what it wrote.
		if found, err := v.Check(f.Ctx); err != nil || len(found.Lost) > 0 {
			f.T.Errorf("%s: %d chunks are lost, the first %+v; %v", d.name, len(found.Lost), found.Lost[:min(1, len(found.Lost))], err)
		}
	}
	receipts := 0
	for p := range placed {
		id, err := chunk.ParseID(p.ID)
		if err != nil {
			f.T.Fatal(err)
		}
		for _, h := range p.Holders {
			receipts++
			data, err := volumes[h.Device].Get(f.Ctx, id)
			if err != nil || chunk.Sum(data) != id || volumes[h.Device].ID() != h.Volume {
				f.T.Errorf("device %s gave a receipt for chunk %s and has not got it: %v", h.Device, p.ID, err)
			}
		}
	}
	f.T.Logf("%d receipts", receipts)
}

// checkAllOrdersEnd waits until every order that was ever given has ended.
func (f *fleet) checkAllOrdersEnd() {
	f.T.Helper()
	f.Stopped(f.Serve, 0)
	pending := f.pendingOrders()
	f.StartServe()
	f.awaitOrders(pending)
}

func (f *fleet) awaitOrders(list []wire.Order) {
	f.T.Helper()
	ctx, cancel := context.WithTimeout(f.Ctx, testbed.Patience)
	defer cancel()
	for _, o := range list {
		v, err := f.Client.AwaitOrder(ctx, o.Device, o.ID, nil)
		if err != nil {
			f.T.Errorf("the %s order %s hangs as %s: %v", o.Kind, o.ID, v.State, err)
		}
	}
}

// pendingOrders reads a copy of the stopped coordinator's state.
func (f *fleet) pendingOrders() (pending []wire.Order) {
	f.T.Helper()
	dir := filepath.Join(f.T.TempDir(), "nats")
	if err := os.CopyFS(dir, os.DirFS(f.Path("coordinator", "nats"))); err != nil {
		f.T.Fatal(err)
	}
	ca := x509.NewCertPool()
	ca.AppendCertsFromPEM(readFile(f.T, f.Path("coordinator", "keys", "ca.pem")))
	eng, err := engine.Start(f.Ctx, engine.Config{
		Dir: dir, MQTTListen: "127.0.0.1:0",
		TLS:       &tls.Config{ClientCAs: ca, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errors.New("nobody is expected") }},
		Authorize: func(context.Context, wire.DeviceID, *x509.Certificate) error { return errors.New("nobody is expected") },
	})
	if err != nil {
		f.T.Fatal(err)
	}
	defer eng.Close()
	kv, err := eng.KV(f.Ctx, "orders")
	if err != nil {
		f.T.Fatal(err)
	}
	keys, err := kv.Keys(f.Ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoKeysFound) {
		f.T.Fatal(err)
	}
	total := 0
	for _, k := range keys {
		e, err := kv.Get(f.Ctx, k)
		if err != nil {
			f.T.Fatal(err)
		}
		var rec coordinator.OrderRecord
		if err := json.Unmarshal(e.Value(), &rec); err != nil {
			f.T.Fatal(err)
		}
		total++
		if rec.State.Terminal() {
			continue
		}
		o, err := wire.Reread[wire.Order](rec.Envelope)
		if err != nil {
			f.T.Fatal(err)
		}
		pending = append(pending, o)
	}
	f.T.Logf("%d orders, %d of them have not ended", total, len(pending))
	if total == 0 {
		f.T.Error("there is no order at all; is this the coordinator's state?")
	}
	return pending
}

// TestCoordinatorKilled kills the coordinator in the middle of work and starts
// it again in the same place, three times.
func TestCoordinatorKilled(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := testbed.Seeded(t)
	f.enrol(3, false)
	kept := testbed.RandomBytes(rng, 2<<20+17)
	f.Put("kept", kept)
	doomed := f.Put("doomed", testbed.RandomBytes(rng, 1<<20))

	// An order that nobody can answer now: its device is down.
	away := f.holdersOf(doomed, 0)[0]
	away.kill()
	f.OK(nil, "object", "rm", "doomed")

	// A compute challenge and storing, under way when the power goes.
	stored := map[string][]byte{}
	for round := range 3 {
		name := fmt.Sprint("round-", round)
		stored[name] = testbed.RandomBytes(rng, 3<<20)
		file := f.Write("in-"+name, stored[name])
		began := make(chan struct{})
		var busy sync.WaitGroup
		for _, args := range [][]string{
			{"object", "put", "--plain", file, "--name", name},
			{"job", "run", testbed.Guest("sha256sum"), "--input", "kept"},
		} {
			busy.Go(func() {
				<-began
				// It may succeed or be cut off; only that it ends counts.
				if _, err := f.Deimos(args...); err != nil {
					t.Errorf("deimos %v: %v", args, err)
				}
			})
		}
		close(began)
		time.Sleep(time.Duration(50+rng.IntN(400)) * time.Millisecond) // any moment will do
		f.Serve.Kill()
		pending := f.pendingOrders()
		if len(pending) == 0 {
			t.Error("nothing was pending when the coordinator died, not even the drop order of a device that is away")
		}
		f.StartServe()
		for _, d := range f.devices {
			if d != away {
				d.awaitOnline()
			}
		}
		busy.Wait() // both outlive a coordinator that is away for a while
		var answerable []wire.Order
		for _, o := range pending {
			if o.Device != away.id {
				answerable = append(answerable, o)
			}
		}
		f.awaitOrders(answerable)
		f.CheckGet("kept", kept)
		f.OK(nil, "object", "put", "--plain", file, "--name", name) // again, as a user would; a repeat of what succeeded is fine
	}

	f.Serve.Kill()
	pending := f.pendingOrders()
	f.StartServe()
	away.start()
	for _, d := range f.devices {
		d.awaitOnline()
	}
	f.awaitOrders(pending)
	for name, want := range stored {
		f.CheckGet(name, want)
	}
	f.CheckGet("kept", kept)
	for _, d := range f.devices {
		d.checkStorage()
	}
}

// TestDevicesOutliveALongAbsence: agents that could not reach the broker are
// still there, and come back by themselves.
func TestDevicesOutliveALongAbsence(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := testbed.Seeded(t)
	f.enrol(2, true)
	data := testbed.RandomBytes(rng, 1<<20)
	f.Put("file", data)
	f.Serve.Kill()
	for _, d := range f.devices {
		// Three refusals in a row.
		f.Until(d.name+" trying again and again", func() bool {
			return bytes.Count(readFile(t, d.log()), []byte("no connection to the broker")) >= 3
		})
	}
	f.StartServe()
	for _, d := range f.devices {
		d.awaitOnline()
		d.checkStorage()
	}
	f.CheckGet("file", data)
}
