package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/packaging/qemu"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

// bootCut switches a machine on with the disk of a cut, beside the coordinator as
// it was at the end of the recording, and waits until it is online as the same
// device. What it had given a receipt for by then is read back through the
// coordinator; what it took after the cut is its memory no more, so a cut at the
// end of the record is also audited. Last, it stores something new.
func bootCut(ctx context.Context, rec *recording, c blocks.Cut, bin string) (after time.Duration, err error) {
	dir, err := os.MkdirTemp("", "d") // sockets want short paths
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(blocks.Roomy(), filepath.Base(dir)+"-cut")
	defer os.Remove(disk)
	if _, err := blocks.MakeDisk(rec.Recording, c, disk); err != nil {
		return 0, err
	}
	if err := os.CopyFS(filepath.Join(dir, "coordinator"), os.DirFS(rec.Path("coordinator"))); err != nil {
		return 0, err
	}
	f, err := startFleet(ctx, bin, dir, rec.HTTPS, rec.MQTT)
	if err != nil {
		return 0, err
	}
	defer f.end()
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if err := f.boot(ctx, "machine", qemu.Disk{File: disk, NVMe: true}, ""); err != nil {
		return 0, err
	}
	if _, err := f.online(ctx, rec.Device, began); err != nil {
		return 0, fmt.Errorf("%w; the console's end: %s", err, lastOf(f.machine.Said(), 3000))
	}
	after = time.Since(began)
	return after, errors.Join(f.readBack(ctx, rec, c), f.storeNew(ctx))
}

// readBack fetches the objects all chunks of which had a receipt before the cut.
func (f *fleet) readBack(ctx context.Context, rec *recording, c blocks.Cut) error {
	p, err := rec.promised(c.At)
	if err != nil {
		return err
	}
	read := 0
	for _, name := range rec.Objects {
		o, err := f.client.Object(ctx, name)
		if err != nil {
			return err
		}
		promised := true
		for _, ch := range o.Chunks {
			promised = promised && p.chunks[ch.ID]
		}
		if !promised {
			continue
		}
		read++
		if _, err := object.Get(ctx, f.client, name, io.Discard, nil); err != nil {
			return fmt.Errorf("object %s, of which the device had every receipt, cannot be read: %w", name, err)
		}
	}
	if read == 0 || c.At < len(rec.Events) {
		return nil
	}
	a, err := f.client.Audit(ctx, api.AuditRequest{Kind: api.StorageAudit, Device: rec.Device})
	if err == nil && a.Outcome != api.AuditRight {
		err = fmt.Errorf("the audit of the storage: %s: %s", a.Outcome, a.Reason)
	}
	return err
}

// storeNew sees that a device works, not only answers.
func (f *fleet) storeNew(ctx context.Context) error {
	data := make([]byte, 4096)
	_, _ = rand.Read(data) // never fails
	id := chunk.Sum(data).String()
	if _, err := f.client.PutChunk(ctx, id, data, 1); err != nil {
		return fmt.Errorf("after the cut nothing new can be stored: %w", err)
	}
	return nil
}
