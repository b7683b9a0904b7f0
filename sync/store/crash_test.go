package store

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// The cut is by chance: of what was written since the last sync, each sector is there, or is
// zero, or is what an older file has left there. What has a receipt is whole, all else whole
// or not there; nothing is called lost, and what was dropped does not come back.
func TestAPowerCutTakesOnlyWhatWasNotPromised(t *testing.T) {
	for round := range 12 {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			rng := random(t)
			p := &past{dir: t.TempDir(), held: map[chunk.ID][]byte{}}
			v := open1(t, p.dir, smallSegments())
			p.live(t, rng, v, 40+rng.IntN(80))
			still(t, v)
			if rng.IntN(2) == 0 {
				if err := v.hand(t.Context(), &request{flush: true}); err != nil {
					t.Fatal(err)
				}
			}
			number, length := v.log.number, v.log.length
			fresh, leaving := p.halfWritten(t, rng, v)
			dir := killed(t, p.dir)
			if v.log.number == number { // else all that the cut can take was synced, but for a part
				tear(t, rng, dir, number, length)
			}
			p.dir = dir
			v = open1(t, dir, smallSegments())
			eventually(t, "what is on disk is counted", func() bool {
				v.mu.Lock()
				defer v.mu.Unlock()
				return v.space.length == onDisk(t, dir)
			})
			for id, data := range fresh {
				if got, err := v.Get(t.Context(), id); err == nil && bytes.Equal(got, data) {
					p.held[id] = data
				} else {
					mustFail(t, err, wire.CodeNotFound)
					p.dropped = append(p.dropped, id)
				}
			}
			for _, id := range leaving {
				if _, err := v.Get(t.Context(), id); err != nil {
					mustFail(t, err, wire.CodeNotFound)
					p.dropped = append(p.dropped, id)
					delete(p.held, id)
				}
			}
			p.mustBeIn(t, v)
			for range 2 { // and killed again: what was torn off is not met again
				id, data := someChunk(rng, shortest+rng.IntN(2000))
				mustPut(t, v, id, data)
				p.held[id] = data
			}
			still(t, v)
			p.dir = killed(t, dir)
			p.mustBe(t, rng)
			if err := os.RemoveAll(filepath.Join(p.dir, chunksDir, indexDir)); err != nil {
				t.Fatal(err)
			}
			p.mustBe(t, rng)
		})
	}
}

// halfWritten writes a batch of new chunks and of drops, and does not sync it.
func (p *past) halfWritten(t testing.TB, rng *rand.Rand, v *Volume) (fresh map[chunk.ID][]byte, leaving []chunk.ID) {
	t.Helper()
	fresh = map[chunk.ID][]byte{}
	var entries []entry
	for id := range p.held {
		if len(leaving) == 3 {
			break
		}
		leaving = append(leaving, id)
		entries = append(entries, entry{record: record{kind: kindDrop, id: id, target: whereIs(t, v, id).spot}})
	}
	for range 1 + rng.IntN(6) {
		id, data := someChunk(rng, shortest+rng.IntN(40_000))
		fresh[id] = data
		entries = append(entries, entry{record{kind: kindChunk, id: id, place: place{size: uint32(len(data))}}, data})
	}
	rng.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
	if err := v.log.add(entries); err != nil {
		t.Fatal(err)
	}
	return fresh, leaving
}

// tear has sectors of a segment, behind a place, be zero or be those of an older one, or has it
// be shorter.
func tear(t testing.TB, rng *rand.Rand, dir string, number uint32, from int64) {
	t.Helper()
	path := filepath.Join(dir, chunksDir, segmentName(number))
	raw := mustRead(t, path)
	older := [][]byte{slices.Clone(raw[:from])}
	for _, path := range segmentPaths(t, dir) {
		older = append(older, mustRead(t, path))
	}
	const sector = 512
	for at := from / sector * sector; at < int64(len(raw)); at += sector {
		torn := raw[max(at, from):min(at+sector, int64(len(raw)))]
		switch rng.IntN(6) {
		case 0:
			clear(torn)
		case 1: // at the place that it had there, or at another
			left := older[rng.IntN(len(older))]
			was := max(at, from)
			if rng.IntN(2) == 0 {
				was = rng.Int64N(int64(len(left)))
			}
			clear(torn)
			if was < int64(len(left)) {
				copy(torn, left[was:])
			}
		}
	}
	if rng.IntN(3) == 0 {
		raw = raw[:from+rng.Int64N(int64(len(raw))-from+1)]
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t testing.TB, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// Whoever keeps a backup of a device's disk on the device itself has true records in a
// chunk. They count nowhere but where they were written.
func TestARecordThatLiesElsewhereIsNone(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	dropped, droppedData := someChunk(rng, 30_000)
	kept, keptData := someChunk(rng, 30_000)
	mustPut(t, v, dropped, droppedData)
	mustPut(t, v, kept, keptData)
	backup := mustRead(t, segmentPaths(t, dir)[0])
	id := chunk.Sum(backup)
	if err := v.Drop(t.Context(), []chunk.ID{dropped}); err != nil {
		t.Fatal(err)
	}
	mustPut(t, v, id, backup)
	at := whereIs(t, v, id)
	mustClose(t, v)
	overwrite(t, segmentPaths(t, dir)[0], int64(at.at), v.log.from.mark[0]^1) // what is behind is searched through
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	v = open1(t, dir, noFloor)
	mustHold(t, v, kept, keptData)
	_, err := v.Get(t.Context(), dropped)
	mustFail(t, err, wire.CodeNotFound)
	if s := v.Stats(); s.Chunks != 1 || s.Lost != 0 {
		t.Fatalf("%+v", s)
	}
}

// What rots between a kill and the next opening is known to be lost at once, if anything was
// durable behind it.
func TestRotBehindTheCheckpointIsToldAtOnce(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	var ids []chunk.ID
	var datas [][]byte
	for range 6 {
		id, data := someChunk(rng, shortest+rng.IntN(100_000))
		mustPut(t, v, id, data)
		ids, datas = append(ids, id), append(datas, data)
	}
	dir = killed(t, dir)
	bad := rng.IntN(len(ids) - 1)
	flip(t, dir, datas[bad], rng.IntN(len(datas[bad])))
	v = open1(t, dir, noFloor)
	if got := lostIDs(v); !sameIDs(got, ids[bad:bad+1]) {
		t.Fatalf("lost: %v, want %v", got, ids[bad])
	}
	for i, id := range ids {
		if i != bad {
			mustHold(t, v, id, datas[i])
		}
	}
}

// A segment ends with its seal and its foot. If a part of them is not there, it has not ended.
func TestAnEndThatIsCutOffIsNone(t *testing.T) {
	for name, cut := range map[string]func(rng *rand.Rand, raw []byte, seal int64) []byte{
		"the foot is cut": func(rng *rand.Rand, raw []byte, _ int64) []byte { return raw[:len(raw)-1-rng.IntN(segmentFoot)] },
		"the foot is another": func(rng *rand.Rand, raw []byte, _ int64) []byte {
			raw[len(raw)-1-rng.IntN(segmentFoot)] ^= 0x40
			return raw
		},
		"the seal is cut": func(rng *rand.Rand, raw []byte, seal int64) []byte {
			return raw[:seal+rng.Int64N(int64(len(raw))-seal)]
		},
		"the seal's head is another": func(rng *rand.Rand, raw []byte, seal int64) []byte {
			raw[seal+rng.Int64N(recordHead)] ^= 0x40
			return raw
		},
	} {
		t.Run(name, func(t *testing.T) {
			rng := random(t)
			p := &past{dir: t.TempDir(), held: map[chunk.ID][]byte{}}
			v := open1(t, p.dir, noFloor)
			for range 5 {
				id, data := someChunk(rng, shortest+rng.IntN(50_000))
				mustPut(t, v, id, data)
				p.held[id] = data
			}
			seal := v.log.length
			if err := v.log.end(); err != nil {
				t.Fatal(err)
			}
			for _, without := range []bool{false, true} {
				dir := killed(t, p.dir)
				path := segmentPaths(t, dir)[0]
				if err := os.WriteFile(path, cut(rng, mustRead(t, path), seal), 0o600); err != nil {
					t.Fatal(err)
				}
				if without {
					if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
						t.Fatal(err)
					}
				}
				q := &past{dir: dir, held: maps.Clone(p.held)}
				v := open1(t, dir, noFloor)
				q.mustBeIn(t, v)
				if s := v.Stats(); s.Dead != 0 || v.space.length != onDisk(t, dir) {
					t.Fatalf("%+v; %d bytes on disk, %d counted", s, onDisk(t, dir), v.space.length)
				}
				mustClose(t, v)
				q.mustBe(t, rng)
			}
		})
	}
}

// A segment is emptied and the process is killed before and after each sync on the way, with
// what it had written by then: everything held is whole, and nothing dropped is back, with
// the index and without.
func TestKilledAtEachStepOfEmptying(t *testing.T) {
	rng := random(t)
	p := &past{dir: t.TempDir(), held: map[chunk.ID][]byte{}}
	var armed atomic.Bool
	var mu sync.Mutex // guards steps
	var steps []string
	step := func() {
		if armed.Load() {
			dir := killed(t, p.dir)
			mu.Lock()
			defer mu.Unlock()
			steps = append(steps, dir)
		}
	}
	opt := smallSegments()
	opt.SegmentBytes = 128 << 10
	opt.hooks.fdatasync = func(f *os.File) error { step(); defer step(); return fdatasync(f) }
	opt.hooks.fsync = func(path string) error { step(); defer step(); return durable.Sync(path) }
	opt.hooks.syncIndex = func(db *badger.DB) error { step(); defer step(); return db.Sync() }
	v := open1(t, p.dir, opt)
	var ids []chunk.ID
	for range 30 { // a dozen fill a segment
		id, data := someChunk(rng, 9000+rng.IntN(2000))
		mustPut(t, v, id, data)
		p.held[id] = data
		ids = append(ids, id)
	}
	idle(t, v)
	before := firstSegment(t, p.dir)
	for i, id := range ids[:12] { // two thirds of the first
		if i%3 > 0 {
			armed.Store(true)
			if err := v.Drop(t.Context(), []chunk.ID{id}); err != nil {
				t.Fatal(err)
			}
			delete(p.held, id)
			p.dropped = append(p.dropped, id)
		}
	}
	idle(t, v)
	armed.Store(false)
	if firstSegment(t, p.dir) == before {
		t.Fatal("no segment was emptied")
	}
	mustClose(t, v)
	t.Logf("%d steps", len(steps))
	if len(steps) < 10 {
		t.Fatalf("only %d steps", len(steps))
	}
	// A drop may have come after a step: what it dropped may be there still.
	for _, dir := range steps {
		for _, without := range []bool{false, true} {
			again := killed(t, dir)
			if without {
				if err := os.RemoveAll(filepath.Join(again, chunksDir, indexDir)); err != nil {
					t.Fatal(err)
				}
			}
			v := open1(t, again, opt)
			var gone []chunk.ID
			for range 2 {
				for id, data := range p.held {
					mustHold(t, v, id, data)
				}
				for _, id := range p.dropped {
					_, err := v.Get(t.Context(), id)
					if err != nil {
						mustFail(t, err, wire.CodeNotFound)
						gone = append(gone, id)
					} else if slices.Contains(gone, id) {
						t.Fatalf("chunk %s is back", id)
					}
				}
				idle(t, v)
			}
			if s := v.Stats(); s.Lost != 0 || s.ReadOnly != "" {
				t.Fatalf("%+v", s)
			}
			mustClose(t, v)
			if err := os.RemoveAll(again); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// churned is a volume of short segments: the first is full of chunks, which are in a checkpoint.
// Then come drops of a part of them, and other chunks until the second is full.
func churned(t *testing.T, rng *rand.Rand, part int) (v *Volume, first, later []chunk.ID, held map[chunk.ID][]byte) {
	t.Helper()
	opt := smallSegments()
	opt.SegmentBytes = 128 << 10
	v = open1(t, t.TempDir(), opt)
	held = map[chunk.ID][]byte{}
	fill := func(segment uint32) (ids []chunk.ID) {
		for {
			id, data := someChunk(rng, 10_000)
			mustPut(t, v, id, data)
			if held[id] = data; whereIs(t, v, id).segment != segment {
				return ids
			}
			ids = append(ids, id)
		}
	}
	first = fill(1)
	if err := v.hand(t.Context(), &request{flush: true}); err != nil {
		t.Fatal(err)
	}
	first = first[:len(first)/part]
	if err := v.Drop(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	later = fill(2)
	if err := v.Drop(t.Context(), later); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second segment is deleted", func() bool {
		_, err := os.Stat(segmentPath(v, 2))
		return os.IsNotExist(err)
	})
	for _, id := range slices.Concat(first, later) {
		delete(held, id)
	}
	return v, first, later, held
}

// A segment goes with the drops that are in it, and what they drop is there still.
func TestDropsOutliveTheirSegment(t *testing.T) {
	rng := random(t)
	v, first, later, held := churned(t, rng, 4)
	if _, err := os.Stat(segmentPath(v, 1)); err != nil {
		t.Fatal(err)
	}
	dir := killed(t, v.dir)
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	v = open1(t, dir, smallSegments())
	for _, id := range slices.Concat(first, later) {
		_, err := v.Get(t.Context(), id)
		mustFail(t, err, wire.CodeNotFound)
	}
	for id, data := range held {
		mustHold(t, v, id, data)
	}
}

// The last checkpoint names what was dropped since. The segments with the chunks and with the
// drops go: before, the index must have learnt of it.
func TestTheIndexKnowsOfDropsBeforeTheirSegmentGoes(t *testing.T) {
	rng := random(t)
	v, _, _, held := churned(t, rng, 1)
	if _, err := os.Stat(segmentPath(v, 1)); !os.IsNotExist(err) {
		t.Fatal("the first segment is there still: ", err)
	}
	v = open1(t, killed(t, v.dir), smallSegments())
	if s := v.Stats(); s.Lost != 0 || s.Chunks != len(held) {
		t.Fatalf("%+v, want %d chunks", s, len(held))
	}
}

// A sync that fails because there is no room is a sync that failed: nothing is taken back and
// gone on with.
func TestASyncWithoutRoomLatches(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	var full atomic.Bool
	opt := smallSegments()
	opt.hooks.fdatasync = func(f *os.File) error {
		if full.Load() {
			return unix.ENOSPC
		}
		return fdatasync(f)
	}
	v := open1(t, dir, opt)
	id, data := someChunk(rng, 600_000)
	mustPut(t, v, id, data)
	full.Store(true)
	next, nextData := someChunk(rng, 600_000) // begins another segment, for which the first is synced
	mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
	full.Store(false)
	mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
	if _, err := os.Stat(filepath.Join(dir, syncFailedFile)); err != nil {
		t.Fatal(err)
	}
	mustHold(t, v, id, data)
}

// An index beside segments of another volume is not believed, and not written to.
func TestAnIndexOfOtherSegmentsIsRefused(t *testing.T) {
	rng := random(t)
	dirs := []string{t.TempDir(), t.TempDir()}
	for _, dir := range dirs {
		v := open1(t, dir, noFloor)
		id, data := someChunk(rng, 1000)
		mustPut(t, v, id, data)
		mustClose(t, v)
	}
	index := filepath.Join(dirs[0], chunksDir, indexDir)
	if err := errors.Join(os.RemoveAll(index), os.CopyFS(index, os.DirFS(filepath.Join(dirs[1], chunksDir, indexDir)))); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dirs[0], noFloor); err == nil || !strings.Contains(err.Error(), "belongs to other segments") {
		t.Fatalf("got %v", err)
	}
	if err := os.RemoveAll(index); err != nil {
		t.Fatal(err)
	}
	if s := open1(t, dirs[0], noFloor).Stats(); s.Chunks != 1 || s.Lost != 0 {
		t.Fatalf("%+v", s)
	}
}

// What the file system has set aside for a segment goes back when it is opened again, also if
// the segment was ended and a kill came before that.
func TestBlocksThatAKillLeftBehindASegmentGoBack(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	if err := v.log.end(); err != nil {
		t.Fatal(err)
	}
	mustClose(t, v)
	f, err := os.OpenFile(segmentPath(v, 1), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, v.log.length, keepBytes); err != nil {
		t.Skip("this file system sets nothing aside: ", err)
	}
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	if blocks() < keepBytes {
		t.Skip("this file system says nothing of what it has set aside")
	}
	v = open1(t, dir, smallSegments())
	mustHold(t, v, id, data)
	if got := blocks(); got >= keepBytes {
		t.Errorf("a segment of %d bytes takes %d", v.space.segments[1].length, got)
	}
}

// A kill between the end of a segment and the checkpoint leaves its figures in the index. They
// go with the next one.
func TestTheIndexForgetsASegmentThatIsGone(t *testing.T) {
	dir := t.TempDir()
	v := open1(t, dir, smallSegments())
	const gone = 7
	v.index.setFull(gone, full{meta: segmentHead})
	if err := v.hand(t.Context(), &request{flush: true}); err != nil {
		t.Fatal(err)
	}
	if fulls, err := v.index.fulls(); err != nil || fulls[gone] != (full{meta: segmentHead}) {
		t.Fatal(fulls, err)
	}
	mustClose(t, v)
	for range 2 { // the second without anything to do
		v = open1(t, dir, smallSegments())
		if err := v.hand(t.Context(), &request{flush: true}); err != nil {
			t.Fatal(err)
		}
		fulls, err := v.index.fulls()
		if err != nil {
			t.Fatal(err)
		}
		if f, there := fulls[gone]; there {
			t.Errorf("the index knows a segment that is gone: %+v", f)
		}
		mustClose(t, v)
	}
}

// Of a record that never counted nothing is left, also not a record of a batch that was taken
// back and lay there before.
func TestOfATornRecordNothingIsLeft(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	x, xData := someChunk(rng, 50_000)
	mustPut(t, v, x, xData)
	target := whereIs(t, v, x).spot
	torn, tornData := someChunk(rng, 50_000)
	behind, behindData := someChunk(rng, 50_000)
	for _, err := range together(t, v, putOf(torn, tornData), putOf(behind, behindData)) {
		if err != nil {
			t.Fatal(err)
		}
	}
	at := whereIs(t, v, torn).spot
	old := record{kind: kindDrop, id: x, target: target, place: place{spot: spot{at.segment, at.at + 10_000}}, seq: 2}
	dir = killed(t, dir)
	path := filepath.Join(dir, chunksDir, segmentName(at.segment))
	raw := mustRead(t, path)
	copy(raw[old.at:], old.appendHead(nil, v.log.from.mark))
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	v = open1(t, dir, smallSegments())
	mustPut(t, v, x, xData) // a receipt
	small, smallData := someChunk(rng, 100)
	mustPut(t, v, small, smallData)
	mustClose(t, v)
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	mustHold(t, open1(t, dir, smallSegments()), x, xData)
}
