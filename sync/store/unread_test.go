package store

import (
	"bytes"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// months later is another matter.
func TestABadSectorLongAgoDoesNotCondemnAnother(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	at := int64(whereIs(t, v, id).at)
	dir = killed(t, dir)
	var bad atomic.Int64
	bad.Store(at + recordHead + 20_000)
	mustClose(t, open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "one")))
	v = open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "two"))
	if s := v.Stats(); s.ReadOnly != "" {
		t.Fatalf("%+v", s)
	}
	if err := v.hand(t.Context(), &request{flush: true}); err != nil {
		t.Fatal(err)
	}
	next, nextData := someChunk(rng, 50_000)
	mustPut(t, v, next, nextData) // a receipt
	at = int64(whereIs(t, v, next).at)
	dir = killed(t, dir)
	bad.Store(at + 10)
	v = open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "three"))
	if s := v.Stats(); s.ReadOnly == "" {
		t.Errorf("a part cannot be read for the first time, and counts as damaged at once: %+v", s)
	}
	mustClose(t, v)
	bad.Store(-1)
	v = open1(t, dir, bootedAs(smallSegments(), "four"))
	mustHold(t, v, next, nextData)
}

// spoilContents has the table of contents of a segment count no more.
func spoilContents(t testing.TB, path string) {
	t.Helper()
	raw := mustRead(t, path)
	overwrite(t, path, int64(len(raw))-1, raw[len(raw)-1]^0x55)
}

// A segment is decided of by what it has shown itself, in two boots, and not by what another has shown.
func TestOneSegmentThatCannotBeReadDoesNotCondemnAnother(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	still(t, v)
	held := map[chunk.ID][]byte{}
	for v.log.number < 2 || v.log.length < 500_000 {
		id, data := someChunk(rng, 100_000)
		mustPut(t, v, id, data)
		held[id] = data
	}
	dir = killed(t, dir)
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, chunksDir, segmentName(1))
	spoilContents(t, path) // its table of contents does not count
	var bad atomic.Int64
	for i, tc := range []struct {
		segment string
		latched bool
	}{{segmentName(1), true}, {segmentName(2), true}, {segmentName(1), false}, {"none", false}} {
		bad.Store((200_000 + segmentHead + 2*recordHead) &^ 4095) // a head lies there
		opt := bootedAs(badIn(smallSegments(), tc.segment, &bad), segmentName(uint32(i+1)))
		if i == 2 { // it can be read
			bad.Store(-1)
		}
		v = open1(t, dir, opt)
		if s := v.Stats(); (s.ReadOnly != "") != tc.latched {
			t.Fatalf("boot %d: %+v", i, s)
		}
		mustClose(t, v)
	}
	v = open1(t, dir, smallSegments())
	for id, data := range held {
		mustHold(t, v, id, data)
	}
}

// What could be read again was no damage: when it fails another time, that is the first again.
func TestWhatCouldBeReadAgainIsForgotten(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	at := int64(whereIs(t, v, id).at)
	dir = killed(t, dir)
	var bad atomic.Int64
	for i, where := range []int64{at + 10, -1, at + 10, -1} {
		bad.Store(where)
		v := open1(t, dir, bootedAs(badSector(smallSegments(), &bad), segmentName(uint32(i+1))))
		if s := v.Stats(); (s.ReadOnly != "") != (where >= 0) {
			t.Fatalf("boot %d: %+v", i, s)
		}
		mustClose(t, v)
	}
	mustHold(t, open1(t, dir, smallSegments()), id, data)
}

// A segment of which a part cannot be read is not given up: there may be a drop that is needed.
func TestASegmentThatCannotAllBeReadIsNotEmptied(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	var bad atomic.Int64
	bad.Store(-1)
	v := open1(t, dir, badSector(smallSegments(), &bad))
	still(t, v)
	x, xData := someChunk(rng, 100_000)
	mustPut(t, v, x, xData)
	var second []chunk.ID
	put := func(upTo uint32) {
		for v.log.number < upTo {
			id, data := someChunk(rng, 100_000)
			mustPut(t, v, id, data)
			if v.log.number == 2 {
				second = append(second, id)
			}
		}
	}
	put(2)
	at := v.log.length
	if err := v.Drop(t.Context(), []chunk.ID{x}); err != nil {
		t.Fatal(err)
	}
	put(3)
	if err := v.Drop(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	path := segmentPath(v, 2) // its table of contents is damaged, and the head of the drop cannot be read
	spoilContents(t, path)
	bad.Store(at + 10)
	for v.reclaim(t.Context()) {
	}
	bad.Store(-1)
	dir = killed(t, dir)
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	_, err := open1(t, dir, smallSegments()).Get(t.Context(), x)
	mustFail(t, err, wire.CodeNotFound)
}

// One bad page does not end a volume, even if it is all of the newest segment.
func TestASegmentOfOneBadPageDoesNotEndAVolume(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 1000_000)
	mustPut(t, v, id, data)
	next, nextData := someChunk(rng, 500_000)
	mustPut(t, v, next, nextData)
	if err := v.Drop(t.Context(), []chunk.ID{next}); err != nil {
		t.Fatal(err)
	}
	mustClose(t, v)
	if err := os.Truncate(filepath.Join(dir, chunksDir, segmentName(2)), segmentHead); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	v = open1(t, dir, smallSegments())
	small, smallData := someChunk(rng, 1000)
	mustPut(t, v, small, smallData)
	mustClose(t, v)
	var bad atomic.Int64
	for _, boot := range []string{"one", "two"} {
		v, err := Open(dir, bootedAs(badIn(smallSegments(), segmentName(2), &bad), boot))
		if err != nil {
			t.Fatalf("boot %s: %v", boot, err)
		}
		mustHold(t, v, id, data)
		mustClose(t, v)
	}
}

// While a part cannot be read, nobody says that what may lie there never was.
func TestWhatMayLieInAnUnreadPartIsNotToldAsNeverPut(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	at := int64(whereIs(t, v, id).at)
	dir = killed(t, dir)
	var bad atomic.Int64
	bad.Store(at + 10)
	v = open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "one"))
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeUnreachable)
	_, err = v.Confirm(t.Context(), id)
	mustFail(t, err, wire.CodeUnreachable)
	mustFail(t, v.List(t.Context(), func(chunk.ID, int64, bool) error { return nil }), wire.CodeUnreachable)
	mustFail(t, NewSet(v).Drop(t.Context(), []chunk.ID{id}), wire.CodeUnreachable)
}

// A move that a cut has torn leaves the chunk where it was, whatever else cannot be read.
func TestATornMoveBesideABadSector(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	still(t, v)
	x, xData := someChunk(rng, 100_000)
	mustPut(t, v, x, xData)
	old := whereIs(t, v, x)
	var fill []chunk.ID
	for v.log.number < 2 {
		id, data := someChunk(rng, 100_000)
		mustPut(t, v, id, data)
		fill = append(fill, id)
	}
	bystander := whereIs(t, v, fill[len(fill)-1])
	if err := v.hand(t.Context(), &request{moves: []move{{x, xData, old}}}); err != nil {
		t.Fatal(err)
	}
	torn := whereIs(t, v, x)
	dir = killed(t, dir)
	path := filepath.Join(dir, chunksDir, segmentName(torn.segment))
	raw := mustRead(t, path)
	clear(raw[int64(torn.at)+recordHead+4096 : torn.end()]) // it was not synced yet
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	var bad atomic.Int64
	bad.Store(-1)
	mustHoldIn := func(boot string) {
		t.Helper()
		v := open1(t, dir, bootedAs(badIn(smallSegments(), segmentName(torn.segment), &bad), boot))
		mustHold(t, v, x, xData)
		mustClose(t, v)
	}
	_ = bystander
	bad.Store((int64(bystander.at) + recordHead + 8192) &^ 4095)
	mustHoldIn("one")
	mustHoldIn("two")
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	mustHoldIn("three")
	mustHoldIn("four")
}

// when the index is made anew and a whole table of contents names the drop that was not read.
func TestWhatWasDecidedOfAnUnreadPartHolds(t *testing.T) {
	for _, sealed := range []bool{true, false} {
		t.Run(map[bool]string{true: "ended", false: "newest"}[sealed], func(t *testing.T) {
			rng, dir := random(t), t.TempDir()
			v := open1(t, dir, smallSegments())
			still(t, v)
			x, xData := someChunk(rng, firstToPage)
			mustPut(t, v, x, xData)
			if err := v.hand(t.Context(), &request{flush: true}); err != nil {
				t.Fatal(err)
			}
			at := v.log.length
			if err := v.Drop(t.Context(), []chunk.ID{x}); err != nil {
				t.Fatal(err)
			}
			other, otherData := someChunk(rng, 50_000)
			mustPut(t, v, other, otherData)
			if sealed { // killed before the next begins
				if err := v.log.end(); err != nil {
					t.Fatal(err)
				}
			}
			dir = killed(t, dir)
			var bad atomic.Int64
			bad.Store(at + 10)
			mustClose(t, open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "one")))
			v = open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "two"))
			mustHold(t, v, x, xData)
			mustPut(t, v, x, xData) // a receipt
			more, moreData := someChunk(rng, 50_000)
			mustPut(t, v, more, moreData)
			mustClose(t, v)
			if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
				t.Fatal(err)
			}
			v = open1(t, dir, bootedAs(smallSegments(), "three"))
			mustHold(t, v, x, xData)
		})
	}
}

// A segment of which nothing can be read is given up soon, and nothing is decided of it.
func TestASegmentThatCannotBeReadAtAllIsLeftAlone(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	opt := smallSegments()
	opt.SegmentBytes = 8 << 20
	v := open1(t, dir, opt)
	for range 6 {
		id, data := someChunk(rng, 1000_000)
		mustPut(t, v, id, data)
	}
	dir = killed(t, dir)
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	raw := mustRead(t, filepath.Join(dir, chunksDir, segmentName(1)))
	var reads atomic.Int64
	for _, boot := range []string{"one", "two", "three"} {
		opt := bootedAs(opt, boot)
		opt.hooks.pread = func(fd int, into []byte, from int64) (int, error) {
			if from+int64(len(into)) > segmentHead {
				reads.Add(1)
				return -1, unix.EIO
			}
			return unix.Pread(fd, into, from)
		}
		reads.Store(0)
		v := open1(t, dir, opt)
		if s := v.Stats(); s.ReadOnly == "" {
			t.Errorf("boot %s: %+v", boot, s)
		}
		mustClose(t, v)
		if n := reads.Load(); n > 8*mostHoles {
			t.Errorf("it was asked for %d times", n)
		}
		if !bytes.Equal(raw, mustRead(t, filepath.Join(dir, chunksDir, segmentName(1)))) {
			t.Fatal("the segment was changed")
		}
	}
}
