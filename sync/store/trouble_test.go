package store

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// What a killed run had written cannot be synced at the next opening: the kernel forgets it, and
// the opening after that finds the sync in order. Until the machine boots nothing has a receipt.
func TestASyncThatFailsAtOpeningIsRemembered(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	dir, w := killed(t, dir), &witness{}
	w.fails = func(n string) bool { return n == segmentName(1) }
	mustClose(t, open1(t, dir, bootedAs(w.hooked(smallSegments()), "one")))
	v = open1(t, dir, bootedAs(smallSegments(), "one"))
	mustHold(t, v, id, data)
	_, err := v.Confirm(t.Context(), id)
	mustFail(t, err, wire.CodeReadOnly)
	mustClose(t, v)
	v = open1(t, dir, bootedAs(smallSegments(), "two"))
	if _, err := v.Confirm(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}

// A part that could not be read twice counts as damaged. What cannot be read for a moment
// A cable that is not mended shows another segment each time: none counts as damaged for what
// A checkpoint that failed has the index be made anew, also after a kill, and when it is young.
func TestAYoungIndexThatFailedIsMadeAnew(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	var fails atomic.Bool
	opt := smallSegments()
	opt.hooks.syncIndex = func(db *badger.DB) error {
		if fails.Load() {
			return unix.EIO
		}
		return db.Sync()
	}
	v := open1(t, dir, opt)
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	fails.Store(true)
	if err := v.hand(t.Context(), &request{flush: true}); err == nil {
		t.Fatal("it has not failed")
	}
	dir = killed(t, dir)
	var out bytes.Buffer
	opt = smallSegments()
	opt.Log = slog.New(slog.NewTextHandler(&out, nil))
	v = open1(t, dir, opt)
	mustHold(t, v, id, data)
	if !strings.Contains(out.String(), "made anew") {
		t.Fatalf("it is not: %s", out.String())
	}
}

// What was decided of a part that cannot be read holds: a receipt that was given since counts,
// What kept a segment from being emptied may pass without anything being dropped in it.
func TestAFullDiskForAMomentDoesNotKeepDeadBytesForEver(t *testing.T) {
	rng := random(t)
	var full atomic.Bool
	v := open1(t, t.TempDir(), fillsUp(smallSegments(), &full, func([][]byte, int64) bool { return true }))
	still(t, v)
	var ids []chunk.ID
	for v.log.number < 2 {
		id, data := someChunk(rng, 100_000)
		mustPut(t, v, id, data)
		ids = append(ids, id)
	}
	if err := v.Drop(t.Context(), ids[1:8]); err != nil {
		t.Fatal(err)
	}
	full.Store(true)
	for v.reclaim(t.Context()) {
	}
	full.Store(false)
	v.forgive() // after a while
	for v.reclaim(t.Context()) {
	}
	if v.has(1) {
		t.Fatalf("%+v, stuck %v", v.Stats(), v.mover.stuck)
	}
}

// A quota is a full disk.
func TestAQuotaIsAFullDisk(t *testing.T) {
	rng := random(t)
	var full atomic.Bool
	opt := smallSegments()
	opt.hooks.pwritev = func(fd int, from [][]byte, at int64) (int, error) {
		if full.Load() {
			return -1, unix.EDQUOT
		}
		return unix.Pwritev(fd, from, at)
	}
	v := open1(t, t.TempDir(), opt)
	id, data := someChunk(rng, 1000)
	full.Store(true)
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeNoSpace)
	full.Store(false)
	mustPut(t, v, id, data)
}

// Who reads a chunk that has rotted while it is dropped leaves no loss behind.
func TestALossThatIsDroppedWhileItIsFoundIsNone(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	for round := range 300 {
		id, data := someChunk(rng, 100)
		mustPut(t, v, id, data)
		at := whereIs(t, v, id)
		overwrite(t, segmentPath(v, at.segment), int64(at.at)+recordHead+7, data[7]^1)
		var all sync.WaitGroup
		for range 4 {
			all.Add(1)
			go func() {
				defer all.Done()
				for range 10 {
					_, _ = v.Get(t.Context(), id)
				}
			}()
		}
		if err := v.Drop(t.Context(), []chunk.ID{id}); err != nil {
			t.Fatal(err)
		}
		all.Wait()
		if s := v.Stats(); s.Lost != 0 || s.Chunks != 0 {
			t.Fatalf("round %d: %d lost of %d", round, s.Lost, s.Chunks)
		}
	}
}

// A segment whose deletion is not known to be durable may come back.
func TestASegmentWhoseDeletionIsNotDurable(t *testing.T) {
	rng, w := random(t), &witness{}
	v := open1(t, t.TempDir(), w.hooked(smallSegments()))
	still(t, v)
	var ids []chunk.ID
	for v.log.number < 2 {
		id, data := someChunk(rng, 100_000)
		mustPut(t, v, id, data)
		ids = append(ids, id)
	}
	if err := v.Drop(t.Context(), ids[:len(ids)-1]); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.fails = func(name string) bool { return name == chunksDir }
	w.mu.Unlock()
	for v.reclaim(t.Context()) {
	}
	w.mu.Lock()
	w.fails = nil
	w.mu.Unlock()
	if v.Stats().ReadOnly == "" {
		t.Errorf("a sync of the directory has failed, and the volume goes on")
	}
	if got := onDisk(t, v.dir); got != v.space.length {
		t.Errorf("%d bytes on disk, counted %d", got, v.space.length)
	}
}

// Everybody at once, with a disk that is full now and then and reads that fail now and then:
// who was told that a chunk is durable finds it after a kill, and nobody waits for ever.
func TestEverybodyAtOnceOnADiskInTrouble(t *testing.T) {
	var trouble atomic.Uint64
	odd := func(one uint64) bool { return trouble.Add(0x9e3779b97f4a7c15)>>33%one == 0 }
	opt := smallSegments()
	opt.SegmentBytes = 128 << 10
	opt.hooks.atOnce = 8
	opt.hooks.pwritev = func(fd int, from [][]byte, at int64) (int, error) {
		if odd(20) {
			return -1, unix.ENOSPC
		}
		return unix.Pwritev(fd, from, at)
	}
	opt.hooks.pread = func(fd int, into []byte, at int64) (int, error) {
		if odd(50) {
			return -1, []error{unix.EIO, unix.ENOMEM, unix.EINTR}[trouble.Load()>>20%3]
		}
		return unix.Pread(fd, into, at)
	}
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, opt)
	const workers, each = 8, 6
	var all, side sync.WaitGroup
	held := make([]map[chunk.ID]bool, workers) // true: held; false: gone; missing: either
	datas := map[chunk.ID][]byte{}
	ids := make([][]chunk.ID, workers)
	for w := range workers {
		held[w] = map[chunk.ID]bool{}
		for range each {
			id, data := someChunk(rng, shortest+rng.IntN(30_000))
			datas[id], held[w][id] = data, false
			ids[w] = append(ids[w], id)
		}
	}
	stop := make(chan struct{})
	for _, fn := range []func(){
		func() { _, _ = v.Check(t.Context()) },
		func() { _ = v.List(t.Context(), func(chunk.ID, int64, bool) error { return nil }) },
		func() { v.Stats(); v.Lost() },
		func() { _ = v.hand(t.Context(), &request{flush: true}) },
		func() {
			for id := range datas {
				_, _ = v.Get(t.Context(), id)
			}
		},
	} {
		side.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					fn()
				}
			}
		})
	}
	for w := range workers {
		r := rand.New(rand.NewPCG(rng.Uint64(), 1))
		all.Go(func() {
			for range 150 {
				id := ids[w][r.IntN(each)]
				switch r.IntN(5) {
				case 0, 1:
					if v.Put(t.Context(), id, datas[id]) == nil {
						held[w][id] = true
					} else {
						delete(held[w], id)
					}
				case 2:
					if v.Drop(t.Context(), []chunk.ID{id}) == nil {
						held[w][id] = false
					} else {
						delete(held[w], id)
					}
				case 3:
					if _, err := v.Confirm(t.Context(), id); err == nil {
						if is, known := held[w][id]; known && !is {
							t.Errorf("a receipt for %s, which was dropped", id)
						}
					}
				default:
					if got, err := v.Get(t.Context(), id); err == nil && !bytes.Equal(got, datas[id]) {
						t.Error("wrong bytes")
					}
				}
			}
		})
	}
	all.Wait()
	close(stop)
	side.Wait()
	t.Log(v.Stats())
	still(t, v) // else a segment may go while it is copied, after the one that took what lived in it was looked for
	cut := killed(t, dir)
	mustClose(t, v)
	for _, without := range []bool{false, true} {
		if without {
			if err := os.RemoveAll(filepath.Join(cut, chunksDir, indexDir)); err != nil {
				t.Fatal(err)
			}
		}
		v := open1(t, cut, smallSegments())
		for w := range workers {
			for id, is := range held[w] {
				_, err := v.Get(t.Context(), id)
				if is && err != nil || !is && wire.ProblemOf(err).Code != wire.CodeNotFound {
					t.Errorf("without index %v: %s is held: %v, got %v", without, id, is, err)
				}
			}
		}
		mustClose(t, v)
	}
}
