package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
	"github.com/deimos-edge/deimos/wire"
)

// checker opens disks after a cut as a device does when its power comes back.
type checker struct {
	promises
}

func newChecker() *checker { return &checker{promises{chunks: map[chunk.ID]state{}}} }

// Check looks at everything, and says in a sentence what is not as it must be.
func (k *checker) Check(d *blocks.Disk, c blocks.Cut, _ bool) error {
	return mounted(d, func(dir string) error { return k.checkVolume(dir, c.Seed) })
}

// mounted has the volume on a disk looked at.
func mounted(d *blocks.Disk, look func(dir string) error) error {
	return d.Mounted(0, int64(len(d.Work.Mem)), func(dir string) error { return look(filepath.Join(dir, "volume")) })
}

// checkVolume opens the volume, looks, and works with it. Of some cuts the volume is
// as full as it was, so that dead bytes are given back at once; of some it is opened
// once more; of some the index is taken away first.
func (k *checker) checkVolume(dir string, seed uint64) error {
	opt := storeOptions()
	opt.ID = k.volume
	full := seed%8 == 0
	if !full {
		opt.Capacity += 64 << 20
	}
	if seed%8 == 3 { // it is made anew of the segments
		if err := os.RemoveAll(filepath.Join(dir, "chunks", "index")); err != nil {
			return err
		}
	}
	want := map[chunk.ID]state{}
	for id, s := range k.chunks {
		want[id] = s
	}
	if err := k.use(dir, opt, func(v *store.Volume) error {
		if err := verify(v, want); err != nil {
			return err
		}
		if err := exact(v); err != nil {
			return err
		}
		if full {
			if err := dropSome(v, want); err != nil {
				return err
			}
		}
		return putNew(v, want, seed)
	}); err != nil {
		return err
	}
	if !full && seed%4 != 1 {
		return nil
	}
	if err := k.use(dir, opt, func(v *store.Volume) error {
		return errors.Join(verify(v, want), exact(v))
	}); err != nil {
		return fmt.Errorf("opened once more after the cut: %w", err)
	}
	return nil
}

func (k *checker) use(dir string, opt store.Options, do func(v *store.Volume) error) (err error) {
	v, err := store.Open(dir, opt)
	if err != nil {
		return fmt.Errorf("the store does not open: %w", err)
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	return do(v)
}

// verify compares what is there with what must be.
func verify(v *store.Volume, want map[chunk.ID]state) error {
	ctx := context.Background()
	listed := map[chunk.ID]int64{}
	err := v.List(ctx, func(id chunk.ID, size int64, _ bool) error {
		listed[id] = size
		return nil
	})
	if err != nil {
		return err
	}
	var used int64
	for id, size := range listed {
		used += size
		s, known := want[id]
		if !known {
			return fmt.Errorf("chunk %s was never stored, and is listed", id)
		}
		if s == gone {
			return fmt.Errorf("chunk %s was dropped, and is back", id)
		}
		data, err := v.Get(ctx, id)
		switch {
		case err == nil && (chunk.Sum(data) != id || int64(len(data)) != size):
			return fmt.Errorf("chunk %s is read without an error, and is another", id)
		case err == nil:
		case s == held:
			return fmt.Errorf("chunk %s has a receipt, and is not whole: %w", id, err)
		case wire.ProblemOf(err).Code != wire.CodeLost:
			return fmt.Errorf("chunk %s is listed, and neither whole nor lost: %w", id, err)
		case !slices.ContainsFunc(v.Lost(), func(l store.Loss) bool { return l.ID == id }):
			return fmt.Errorf("chunk %s is lost, and is not among the lost: %w", id, err)
		}
	}
	for id, s := range want {
		if _, there := listed[id]; there {
			continue
		}
		if s == held {
			return fmt.Errorf("chunk %s has a receipt, and is not there", id)
		}
	}
	if s := v.Stats(); s.Used != used || s.Chunks != len(listed) {
		return fmt.Errorf("%d chunks of %d bytes are there, and the figures say %d of %d", len(listed), used, s.Chunks, s.Used)
	}
	if s := v.Stats(); s.ReadOnly != "" {
		return fmt.Errorf("the volume is read-only: %s", s.ReadOnly)
	}
	return nil
}

const settleLimit = time.Minute

// exact compares the dead bytes with the files. Segments may be emptied meanwhile, so that
// both must agree once while nothing changes.
func exact(v *store.Volume) error {
	for end := time.Now().Add(settleLimit); ; {
		before := v.Stats()
		dead, err := deadOnDisk(v)
		after := v.Stats()
		if err == nil && before == after && before.Dead == dead {
			return nil
		}
		if time.Now().After(end) {
			return errors.Join(err, fmt.Errorf("the segments have %d dead bytes, and the figures say %d", dead, after.Dead))
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// deadOnDisk is the bytes of the segments that are of no chunk that is listed, and not of
// their heads and tables of contents. It is computed as the format says, not as the store
// does.
func deadOnDisk(v *store.Volume) (dead int64, err error) {
	const segmentHead, recordHead = 64, 76
	segments, err := filepath.Glob(filepath.Join(v.Dir(), "chunks", "*.seg"))
	if err != nil {
		return 0, err
	}
	for _, path := range segments {
		raw, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		dead += int64(len(raw)) - segmentHead
		if n := len(raw); n > segmentHead+recordHead {
			foot := raw[n-16:]
			crc := crc32.Checksum(foot[:12], crc32.MakeTable(crc32.Castagnoli))
			if bytes.Equal(foot[:8], raw[16:24]) && binary.LittleEndian.Uint32(foot[12:]) == crc {
				dead -= int64(n) - int64(binary.LittleEndian.Uint32(foot[8:]))
			}
		}
	}
	err = v.List(context.Background(), func(_ chunk.ID, size int64, _ bool) error {
		dead -= size + recordHead
		return nil
	})
	return dead, err
}

func number(segment string) int {
	n, _ := strconv.Atoi(strings.TrimSuffix(filepath.Base(segment), filepath.Ext(segment)))
	return n
}

// dropSome drops a third, so that there is something to give back.
func dropSome(v *store.Volume, want map[chunk.ID]state) error {
	var ids []chunk.ID
	err := v.List(context.Background(), func(id chunk.ID, _ int64, _ bool) error {
		if id[0]%3 == 0 {
			ids = append(ids, id)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := v.Drop(context.Background(), ids); err != nil {
		return fmt.Errorf("after the cut nothing can be dropped: %w", err)
	}
	for _, id := range ids {
		want[id] = gone
	}
	return nil
}

// putNew stores something. A full volume drops for it, and waits until that has been
// given back.
func putNew(v *store.Volume, want map[chunk.ID]state, seed uint64) error {
	ctx := context.Background()
	s := Stored{seed ^ 1<<63, 100_000}
	data := s.bytes()
	id := chunk.Sum(data)
	for end := time.Now().Add(settleLimit); ; time.Sleep(5 * time.Millisecond) {
		err := v.Put(ctx, id, data)
		if err == nil {
			break
		}
		if wire.ProblemOf(err).Code != wire.CodeNoSpace || time.Now().After(end) {
			return fmt.Errorf("after the cut nothing new can be stored: %w", err)
		}
	}
	want[id] = held
	if got, err := v.Get(ctx, id); err != nil || chunk.Sum(got) != id {
		return fmt.Errorf("what was stored after the cut is not there: %w", err)
	}
	return nil
}
