package store

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// What several requests of one batch say of the same chunk, and what becomes of a batch that
// cannot be written.

func putOf(id chunk.ID, data []byte) *request {
	return &request{id: id, data: data, done: make(chan error, 1)}
}

func dropOf(ids ...chunk.ID) *request { return &request{drops: ids, done: make(chan error, 1)} }

// together has requests share a batch, and returns their answers. The mover is ended: only it
// gives the committer something to do meanwhile.
func together(t testing.TB, v *Volume, all ...*request) (answers []error) {
	t.Helper()
	still(t, v)
	var b batch
	for _, r := range all {
		b.add(r)
	}
	v.commit(b, &crowd{})
	for _, r := range all {
		answers = append(answers, <-r.done)
	}
	return answers
}

// withALoss is a volume with a chunk that is known to be lost.
func withALoss(t *testing.T, opt Options) (v *Volume, dir string, id chunk.ID, data []byte) {
	t.Helper()
	rng, dir := random(t), t.TempDir()
	v = open1(t, dir, opt)
	id, data = someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	flip(t, dir, data, 100)
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeLost)
	return v, dir, id, data
}

// Two fetchers mend the same loss at once: it is written once.
func TestALossThatIsPutTwiceAtOnce(t *testing.T) {
	var out bytes.Buffer
	opt := smallSegments()
	opt.Log = slog.New(slog.NewTextHandler(&out, nil))
	v, dir, id, data := withALoss(t, opt)
	if err := errors.Join(together(t, v, putOf(id, data), putOf(id, data))...); err != nil {
		t.Fatal(err)
	}
	before := v.Stats()
	if want := int64(len(data)) + recordHead; before.Dead != want {
		t.Fatalf("%d bytes are dead, want %d", before.Dead, want)
	}
	mustClose(t, v)
	v = open1(t, dir, opt)
	if after := v.Stats(); after.Dead != before.Dead || after.Used != before.Used || strings.Contains(out.String(), "made anew") {
		t.Fatalf("%+v before, %+v after; %s", before, after, out.String())
	}
	mustHold(t, v, id, data)
}

func TestALossThatIsPutTwiceAndDroppedAtOnceIsGone(t *testing.T) {
	v, dir, id, data := withALoss(t, smallSegments())
	if err := errors.Join(together(t, v, putOf(id, data), putOf(id, data), dropOf(id))...); err != nil {
		t.Fatal(err)
	}
	for _, without := range []bool{false, true} {
		dir := killed(t, dir)
		if without {
			if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
				t.Fatal(err)
			}
		}
		_, err := open1(t, dir, smallSegments()).Get(t.Context(), id)
		mustFail(t, err, wire.CodeNotFound)
	}
}

// What was a loss and is put is none any more, for all who come behind in the same batch.
func TestALossThatIsPutIsNoneForTheRestOfTheBatch(t *testing.T) {
	v, _, id, data := withALoss(t, smallSegments())
	lost := dropOf(id)
	lost.lost = true
	if err := errors.Join(together(t, v, putOf(id, data), lost, &request{id: id, done: make(chan error, 1)})...); err != nil {
		t.Fatal(err)
	}
	mustHold(t, v, id, data)
}

// The drops of the batch that ends a segment count in its figures: the mover goes by them.
func TestTheDropsOfASegmentAreCountedWhenItEnds(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	all := []*request{dropOf(id)}
	for range 30 {
		id, data := someChunk(rng, 50_000)
		all = append(all, putOf(id, data))
	}
	if err := errors.Join(together(t, v, all...)...); err != nil {
		t.Fatal(err)
	}
	if v.log.number == 1 {
		t.Fatal("no segment has ended")
	}
	for range 2 {
		if got := v.space.segments[1].drops; got != recordHead {
			t.Fatalf("%d bytes of drops, want %d", got, recordHead)
		}
		mustClose(t, v)
		v = open1(t, dir, smallSegments())
	}
}

// fillsUp has no room for what begins at, or a part of it, once it is told so.
func fillsUp(opt Options, full *atomic.Bool, no func(from [][]byte, at int64) bool) Options {
	opt.hooks.pwritev = func(fd int, from [][]byte, at int64) (int, error) {
		if full.Load() && no(from, at) {
			return -1, unix.ENOSPC
		}
		return unix.Pwritev(fd, from, at)
	}
	return opt
}

// A batch ends a segment, and there is no room for the next: all of it is taken back, though
// a part was durable already. The volume goes on when there is room, and drops do at once.
func TestADiskThatIsFullAtTheEndOfASegment(t *testing.T) {
	begun := 0
	for name, no := range map[string]func(from [][]byte, at int64) bool{
		"no room for the head":         func(_ [][]byte, at int64) bool { return at == 0 },
		"no room for the first record": func(_ [][]byte, at int64) bool { return at == segmentHead },
		"no room for the seal":         func(from [][]byte, _ int64) bool { return len(from) == 3 && len(from[2]) == segmentFoot },
		"no room for the segment behind": func(_ [][]byte, at int64) bool {
			if at == 0 {
				begun++
			}
			return at == 0 && begun%2 == 0
		},
	} {
		t.Run(name, func(t *testing.T) {
			rng, dir := random(t), t.TempDir()
			var full atomic.Bool
			v := open1(t, dir, fillsUp(smallSegments(), &full, no))
			held := map[chunk.ID][]byte{}
			var kept chunk.ID
			for v.log.length < 950_000 {
				id, data := someChunk(rng, 50_000)
				mustPut(t, v, id, data)
				held[id], kept = data, id
			}
			before := v.Stats()
			for range 3 {
				full.Store(true)
				all := []*request{dropOf(kept)}
				for range 60 {
					id, data := someChunk(rng, 50_000)
					all = append(all, putOf(id, data))
				}
				for _, err := range together(t, v, all...) {
					mustFail(t, err, wire.CodeNoSpace)
				}
				for _, r := range all[1:] {
					_, err := v.Get(t.Context(), r.id)
					mustFail(t, err, wire.CodeNotFound)
				}
				if s := v.Stats(); s.Used != before.Used || s.Dead != before.Dead || s.Chunks != before.Chunks || s.ReadOnly != "" {
					t.Fatalf("%+v before, %+v after", before, s)
				}
				if got := onDisk(t, dir); v.space.length != got {
					t.Fatalf("%d bytes are counted, %d on disk", v.space.length, got)
				}
				mustPut(t, v, kept, held[kept]) // a receipt
				for _, without := range []bool{false, true} {
					dir := killed(t, dir)
					if without {
						if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
							t.Fatal(err)
						}
					}
					v := open1(t, dir, smallSegments())
					for id, data := range held {
						mustHold(t, v, id, data)
					}
					if s := v.Stats(); s.Chunks != len(held) || s.Dead != 0 {
						t.Fatalf("%+v, want %d chunks", s, len(held))
					}
				}
				full.Store(false)
				id, data := someChunk(rng, 50_000)
				mustPut(t, v, id, data)
				held[id] = data
				before = v.Stats()
			}
		})
	}
}

// What is taken back is taken back durably before anybody is answered: else a power cut could
// bring it back behind a receipt.
func TestWhatIsTakenBackIsSynced(t *testing.T) {
	for _, rotates := range []bool{false, true} {
		t.Run(fmt.Sprint(rotates), func(t *testing.T) {
			rng, dir := random(t), t.TempDir()
			var full, fails atomic.Bool
			opt := fillsUp(smallSegments(), &full, func(from [][]byte, at int64) bool {
				return !rotates && len(from) > 2 || rotates && at == segmentHead
			})
			var tries atomic.Int32
			opt.hooks.fdatasync = func(f *os.File) error {
				if fails.Load() && !rotates {
					tries.Add(1)
					return unix.EIO
				}
				return fdatasync(f)
			}
			opt.hooks.fsync = func(path string) error {
				if full.Load() && fails.Load() && strings.HasSuffix(path, segmentEnding) {
					tries.Add(1)
					return unix.EIO
				}
				return orRealFsync(path)
			}
			v := open1(t, dir, opt)
			kept, keptData := someChunk(rng, 600_000)
			mustPut(t, v, kept, keptData)
			full.Store(true)
			fails.Store(true)
			id, data := someChunk(rng, 600_000)
			answers := together(t, v, dropOf(kept), putOf(id, data))
			for _, err := range answers {
				mustFail(t, err, wire.CodeReadOnly)
			}
			if tries.Load() == 0 {
				t.Fatal("no sync was tried")
			}
			_, err := v.Confirm(t.Context(), kept) // whether the drop is still there is not known
			mustFail(t, err, wire.CodeReadOnly)
			mustFail(t, v.Put(t.Context(), kept, keptData), wire.CodeReadOnly)
			mustHold(t, v, kept, keptData)
		})
	}
}

var orRealFsync = hooks{}.orReal().fsync

// A batch of which nobody knows what the log has may have dropped what it was to drop: that has
// no receipt any more, until it is opened again.
func TestWhatAFailedBatchWasToDropHasNoReceipt(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	opt := smallSegments()
	var bad atomic.Bool
	opt.hooks.pwritev = func(fd int, from [][]byte, at int64) (int, error) {
		switch {
		case bad.Load() && len(from) > 2:
			return unix.Pwritev(fd, from[:1], at)
		case bad.Load():
			return -1, unix.EIO
		}
		return unix.Pwritev(fd, from, at)
	}
	v := open1(t, dir, opt)
	kept, keptData := someChunk(rng, 50_000)
	other, otherData := someChunk(rng, 50_000)
	mustPut(t, v, kept, keptData)
	mustPut(t, v, other, otherData)
	bad.Store(true)
	id, data := someChunk(rng, 50_000)
	for _, err := range together(t, v, dropOf(kept), putOf(id, data)) {
		mustFail(t, err, wire.CodeReadOnly)
	}
	mustFail(t, v.Put(t.Context(), kept, keptData), wire.CodeReadOnly)
	_, err := v.Confirm(t.Context(), kept)
	mustFail(t, err, wire.CodeReadOnly)
	if _, err := v.Confirm(t.Context(), other); err != nil {
		t.Fatal("it was none of the batch's business:", err)
	}
	mustHold(t, v, kept, keptData)
	mustClose(t, v)
	if err := os.Remove(filepath.Join(dir, syncFailedFile)); err != nil { // the machine has booted again
		t.Fatal(err)
	}
	v = open1(t, dir, smallSegments())
	_, err = v.Get(t.Context(), kept)
	mustFail(t, err, wire.CodeNotFound) // the drop was whole: the test is one
	mustHold(t, v, other, otherData)
}
