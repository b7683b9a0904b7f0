package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/packaging/qemu"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
	"github.com/deimos-edge/deimos/test/powercut/nbd"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// work is what a recording is made of.
type work struct {
	bin      string
	image    string // of the disk
	firmware string // the newer one, which is installed; "" for none
	version  string // of the agent in the image
	seed     uint64
	rounds   int // of objects, orders and a job
	log      func(format string, args ...any)
}

const (
	diskSize  = 3 << 30
	bootLimit = 5 * time.Minute
	putLimit  = 2 * time.Minute
	workLimit = 40 * time.Minute
)

// worker is a recording that is made.
type worker struct {
	work
	*fleet
	rec *blocks.Recorder
	rng *rand.Rand
	h   header

	next string // version of the newer firmware

	mu      sync.Mutex // guards stored
	stored  map[string][]string
	objects int
}

// record boots a machine, works it and cuts its power. The recording is in dir.
func record(ctx context.Context, w work, dir string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, workLimit)
	defer cancel()
	k := &worker{work: w, rng: rand.New(rand.NewPCG(w.seed, 2)), stored: map[string][]string{}}
	if err := k.prepare(dir); err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "d") // sockets want short paths
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	live := filepath.Join(blocks.Roomy(), filepath.Base(scratch)+"-live")
	if err := qemu.CopyDisk(filepath.Join(dir, "base"), live, k.h.Size); err != nil {
		return err
	}
	defer os.Remove(live)
	if k.rec, err = blocks.NewRecorder(dir); err != nil {
		return err
	}
	disk, err := nbd.Serve(filepath.Join(scratch, "nbd"), live, k.rec)
	if err != nil {
		return err
	}
	if k.fleet, err = startFleet(ctx, w.bin, scratch, k.h.HTTPS, k.h.MQTT); err != nil {
		return errors.Join(err, disk.Close(), k.rec.Close())
	}
	// Not as NVMe: QEMU's takes a write with FUA for any other, so that what must be
	// durable is not. For virtio, which has no FUA, Linux flushes instead.
	if err = k.run(ctx, qemu.Disk{NBD: filepath.Join(scratch, "nbd")}); err != nil {
		if k.machine != nil {
			_ = os.WriteFile(filepath.Join(dir, "console.log"), []byte(k.machine.Said()), 0o644) // to see why
		}
		if raw, err := os.ReadFile(k.path("coordinator.log")); err == nil {
			_ = os.WriteFile(filepath.Join(dir, "coordinator.log"), raw, 0o644)
		}
	}
	k.fleet.end()
	if err := errors.Join(err, disk.Close(), k.rec.Close()); err != nil {
		return err
	}
	for name := range k.stored {
		k.h.Objects = append(k.h.Objects, name)
	}
	return errors.Join(k.h.save(dir), os.CopyFS(filepath.Join(dir, "coordinator"), os.DirFS(filepath.Join(scratch, "coordinator"))))
}

// prepare makes the disk, and notes what may boot from it.
func (k *worker) prepare(dir string) error {
	if err := qemu.CopyDisk(k.image, filepath.Join(dir, "base"), diskSize); err != nil {
		return err
	}
	base, err := blocks.OpenMapped(filepath.Join(dir, "base"))
	if err != nil {
		return err
	}
	defer base.End()
	e, err := openESP(base.Mem[espStart:espEnd])
	if err != nil {
		return err
	}
	files, err := e.list()
	if err != nil {
		return err
	}
	k.h = header{Size: diskSize, Firmware: map[string]string{}}
	for _, f := range files {
		if f.path == "EFI/BOOT/BOOTAA64.EFI" {
			if k.h.Loader, err = e.digest(f); err != nil {
				return err
			}
		}
	}
	for _, f := range choice(files) {
		if k.h.Firmware[f.version], err = e.digest(f.espFile); err != nil {
			return err
		}
	}
	if k.firmware != "" {
		if k.next, err = versionOf(k.firmware); err != nil {
			return err
		}
		named, err := firmware.ImageVersion(k.next)
		if err != nil {
			return err
		}
		if k.h.Firmware[named], err = slot.Digest(k.firmware); err != nil {
			return err
		}
	}
	if k.h.HTTPS, err = testbed.UnusedAddress(); err != nil {
		return err
	}
	k.h.MQTT, err = testbed.UnusedAddress()
	return err
}

// run is the life that is recorded.
func (k *worker) run(ctx context.Context, d qemu.Disk) error {
	if err := k.cli(ctx, "release", "keys", "init", "--keys", k.path("release-keys")); err != nil {
		return err
	}
	if err := k.publish(ctx, ""); err != nil { // a device learns whom to believe when it enrols
		return err
	}
	token, err := k.client.CreateToken(ctx, api.TokenRequest{Group: "powercut"})
	if err != nil {
		return err
	}
	if err := k.boot(ctx, "machine", d, token.Token); err != nil {
		return err
	}
	began := time.Now()
	bctx, cancel := context.WithTimeout(ctx, bootLimit)
	device, err := k.online(bctx, "", time.Time{})
	cancel()
	if err != nil {
		return fmt.Errorf("%w; the console's end: %.2000s", err, lastOf(k.machine.Said(), 2000))
	}
	k.h.Device = device.ID
	k.rec.Mark(mark{Device: string(device.ID)})
	k.say("online after %s", sinceNow(began))

	watching, stop := context.WithCancel(ctx)
	watched := make(chan error, 1)
	go func() { watched <- k.watchOrders(watching) }()
	err = k.life(ctx)
	stop()
	return errors.Join(err, <-watched)
}

func lastOf(s string, n int) string { return s[max(0, len(s)-n):] }

func (k *worker) life(ctx context.Context) error {
	for round := range k.rounds {
		if err := k.round(ctx, round); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		if round == 0 && k.rounds > 2 { // what a watchdog does
			if err := k.restart(ctx); err != nil {
				return err
			}
		}
	}
	if k.firmware != "" {
		if err := k.update(ctx); err != nil {
			return err
		}
		if err := k.round(ctx, k.rounds); err != nil {
			return err
		}
	}
	k.say("power cut")
	k.cutPower()
	return nil
}

func (k *worker) say(format string, args ...any) {
	k.rec.Note(format, args...)
	k.log(format, args...)
}

// round stores objects while orders come, runs a job, changes the configuration, and
// removes some of the objects.
func (k *worker) round(ctx context.Context, n int) error {
	began := time.Now()
	k.rec.Note("round %d begins: objects and orders", n)
	g, gctx := errgroup.WithContext(ctx)
	for range 3 {
		rng := rand.New(rand.NewPCG(k.rng.Uint64(), 3))
		g.Go(func() error {
			for range 12 {
				if err := k.store(gctx, rng); err != nil {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		for range 10 {
			orders, err := k.client.SendOrder(gctx, api.SendRequest{Kind: wire.KindPing, Selector: api.Selector{Devices: []wire.DeviceID{k.h.Device}}})
			if err != nil {
				return err
			}
			if _, err := k.client.AwaitOrder(gctx, k.h.Device, orders[0].Order.ID, nil); err != nil {
				return err
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	k.rec.Note("a job, a change of the configuration, objects removed")
	if err := errors.Join(k.job(ctx), k.configure(ctx, n)); err != nil {
		return err
	}
	if err := k.removeSome(ctx, 8); err != nil {
		return err
	}
	k.say("round %d: %s", n, sinceNow(began))
	return nil
}

// store puts an object of a few chunks.
func (k *worker) store(ctx context.Context, rng *rand.Rand) error {
	k.mu.Lock()
	k.objects++
	o := api.Object{Name: fmt.Sprintf("object-%04d", k.objects)}
	k.mu.Unlock()
	whole := sha256.New()
	var ids []string
	for range 1 + rng.IntN(3) {
		data := make([]byte, 1+rng.IntN(1<<(10+rng.IntN(9)))) // up to 256 KiB, mostly small
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		id := chunk.Sum(data).String()
		if err := k.put(ctx, id, data); err != nil {
			return err
		}
		k.rec.Mark(mark{Receipt: id})
		whole.Write(data)
		ids = append(ids, id)
		o.Chunks = append(o.Chunks, api.Chunk{ID: id, Size: int64(len(data))})
		o.Size += int64(len(data))
	}
	o.SHA256 = hex.EncodeToString(whole.Sum(nil))
	if _, err := k.client.PutObject(ctx, o); err != nil {
		return err
	}
	k.mu.Lock()
	k.stored[o.Name] = ids
	k.mu.Unlock()
	return nil
}

// put tries again while the coordinator does not know of the device, or of its
// room, as after a start.
func (k *worker) put(ctx context.Context, id string, data []byte) error {
	ctx, cancel := context.WithTimeout(ctx, putLimit)
	defer cancel()
	var refused *api.Error
	err := until(ctx, "a chunk's receipt", func() (bool, error) {
		_, err := k.client.PutChunk(ctx, id, data, 1)
		if errors.As(err, &refused) && refused.Status >= 500 {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil && refused != nil {
		d, _ := k.client.Device(context.WithoutCancel(ctx), string(k.h.Device)) // for the reader of the error
		err = fmt.Errorf("%w; before that: %w; the device: online %v, capacity %d, used %d, last heartbeat %s, warnings %v, telemetry %.300s", err, refused, d.Online, d.Capacity, d.Used, d.HealthAt, d.Health, d.Telemetry)
	}
	return err
}

// nothing is a module whose _start returns: to compile more takes an emulated
// processor a minute, in which the disk rests.
const nothing = "\x00asm\x01\x00\x00\x00" +
	"\x01\x04\x01\x60\x00\x00" + // type 0: no parameters, no results
	"\x03\x02\x01\x00" + // one function of type 0
	"\x07\x0a\x01\x06_start\x00\x00" + // which is exported
	"\x0a\x04\x01\x02\x00\x0b" // and ends

func (k *worker) job(ctx context.Context) error {
	sum, err := k.client.PutModule(ctx, []byte(nothing))
	if err != nil {
		return err
	}
	j, err := k.client.RunJob(ctx, api.JobSpec{Module: sum, Input: &api.JobChunk{Object: k.any()}})
	if err == nil {
		k.rec.Mark(mark{Order: j.Order})
	}
	return err
}

func (k *worker) any() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name := range k.stored {
		return name
	}
	return ""
}

func (k *worker) configure(ctx context.Context, n int) error {
	_, err := k.client.ChangeConfig(ctx, api.ConfigChange{ConfigScope: api.ConfigScope{Device: k.h.Device},
		Set: map[string]json.RawMessage{wire.SettingBeat: asJSON(6 + n)}})
	if err != nil {
		return err
	}
	return until(ctx, "the configuration", func() (bool, error) {
		all, err := k.client.DeviceConfigs(ctx, api.Selector{Devices: []wire.DeviceID{k.h.Device}})
		if err != nil || len(all) != 1 || all[0].State != api.ConfigApplied {
			return false, err
		}
		k.rec.Mark(mark{Config: all[0].Wanted})
		return true, nil
	})
}

// removeSome removes objects, and waits until the device has said that it did.
func (k *worker) removeSome(ctx context.Context, n int) error {
	var gone []string
	for range n {
		name := k.any()
		k.mu.Lock()
		ids := k.stored[name]
		delete(k.stored, name)
		k.mu.Unlock()
		k.rec.Mark(mark{Removing: ids})
		if err := k.client.RemoveObject(ctx, name); err != nil {
			return err
		}
		gone = append(gone, ids...)
	}
	err := until(ctx, "the end of all orders", func() (bool, error) {
		l, err := k.client.Orders(ctx, api.OrderQuery{Pending: true})
		return err == nil && len(l.Orders) == 0, err
	})
	if err == nil {
		k.rec.Mark(mark{Removed: gone})
	}
	return err
}

// watchOrders notes each order whose report the coordinator has.
func (k *worker) watchOrders(ctx context.Context) error {
	seen := map[string]bool{}
	for {
		l, err := k.client.Orders(ctx, api.OrderQuery{State: wire.Succeeded, Limit: 300})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		for _, o := range l.Orders {
			if !seen[o.ID] {
				seen[o.ID] = true
				k.rec.Mark(mark{Order: o.ID})
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// restart resets the machine, which is not asked.
func (k *worker) restart(ctx context.Context) error {
	k.say("the machine is reset")
	if err := k.machine.Reset(ctx); err != nil {
		return err
	}
	return k.again(ctx, 2)
}

// again waits for the machine's n-th start.
func (k *worker) again(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if _, err := k.machine.Await(ctx, "Deimos starts", n); err != nil {
		return err
	}
	_, err := k.online(ctx, k.h.Device, time.Now())
	return err
}

// versionOf is what a firmware calls itself.
func versionOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	about, err := firmware.Ask(f, info.Size())
	return about.Version, err
}

// update installs the newer firmware while objects are stored.
func (k *worker) update(ctx context.Context) error {
	began := time.Now()
	k.say("firmware %s is offered", k.next)
	dir := k.path("bundle")
	if err := k.cli(ctx, "release", "build", "--version", k.next, "--firmware", k.firmware, "--out", dir); err != nil {
		return err
	}
	if err := k.publish(ctx, dir); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		done <- k.cli(ctx, "release", "offer", k.next, "--device", string(k.h.Device), "--wait", (2 * bootLimit).String())
	}()
	rng := rand.New(rand.NewPCG(k.rng.Uint64(), 4))
	for {
		select {
		case err := <-done:
			if err == nil {
				named, err := firmware.ImageVersion(k.next)
				if err != nil {
					return err
				}
				k.rec.Mark(mark{Confirmed: named})
				k.say("firmware %s is confirmed after %s", k.next, sinceNow(began))
			}
			return err
		default:
		}
		sctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		_ = k.store(sctx, rng) // the machine may be away; a chunk without an answer has no mark
		cancel()
		select {
		case <-ctx.Done():
		case <-time.After(300 * time.Millisecond):
		}
	}
}

func (k *worker) publish(ctx context.Context, bundle string) error {
	args := []string{"release", "publish", "--keys", k.path("release-keys"), "--repo", k.path("repo")}
	if bundle != "" {
		args = append(args, "--bundle", bundle)
	}
	return k.cli(ctx, args...)
}
