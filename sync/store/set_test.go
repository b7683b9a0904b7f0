package store

import (
	"os"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// pair is a set of two volumes, the first with more free space, whose sync
// fails when broken is set.
func pair(t *testing.T) (s *Set, a, b *Volume, dirA string, broken *atomic.Bool) {
	broken = &atomic.Bool{}
	roomy := Options{FloorBytes: -1, Capacity: 10 << 20}
	roomy.hooks.fdatasync = func(f *os.File) error {
		if broken.Load() {
			return unix.EIO
		}
		return fdatasync(f)
	}
	dirA = t.TempDir()
	a = open1(t, dirA, roomy)
	b = open1(t, t.TempDir(), Options{FloorBytes: -1, Capacity: 5 << 20})
	return NewSet(a, b), a, b, dirA, broken
}

func TestSetPutsWhereThereIsRoomAndMovesOnAfterAFailure(t *testing.T) {
	rng := random(t)
	s, a, b, _, broken := pair(t)
	first, firstData := someChunk(rng, 100_000)
	if got, err := s.Put(t.Context(), first, firstData); err != nil || got != a.ID() {
		t.Fatalf("%s, %v", got, err)
	}
	broken.Store(true)
	second, secondData := someChunk(rng, 100_000)
	if got, err := s.Put(t.Context(), second, secondData); err != nil || got != b.ID() {
		t.Fatalf("%s, %v", got, err)
	}
	if got, size, err := s.Confirm(t.Context(), second); err != nil || got != b.ID() || size != 100_000 {
		t.Fatalf("the copy whose sync failed stands for the good one: %s, %v", got, err)
	}
	if got, err := s.Put(t.Context(), first, firstData); err != nil || got != a.ID() {
		t.Fatalf("what is held already went to %s, %v", got, err)
	}
	third, thirdData := someChunk(rng, chunk.MaxSize)
	if got, err := s.Put(t.Context(), third, thirdData); err != nil || got != b.ID() {
		t.Fatalf("%s, %v", got, err)
	}
	fourth, fourthData := someChunk(rng, chunk.MaxSize)
	if _, err := s.Put(t.Context(), fourth, fourthData); err == nil {
		t.Fatal("a full and a broken volume took a chunk")
	}
	if err := s.CanTake(chunk.MaxSize); err == nil {
		t.Fatal("a full and a broken volume promise to take a chunk")
	}
	if err := s.Drop(t.Context(), []chunk.ID{third}); err != nil {
		t.Fatalf("the broken volume has nothing to do with it: %v", err)
	}
}

func TestSetFindsTheWholeCopy(t *testing.T) {
	rng := random(t)
	s, a, b, dirA, _ := pair(t)
	both, data := someChunk(rng, 50_000)
	mustPut(t, a, both, data)
	mustPut(t, b, both, data)
	one, oneData := someChunk(rng, 50_000)
	mustPut(t, a, one, oneData)
	flip(t, dirA, data, 7)
	flip(t, dirA, oneData, 7)
	if got, err := s.Get(t.Context(), both); err != nil || chunk.Sum(got) != both {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	_, err := s.Get(t.Context(), one)
	mustFail(t, err, wire.CodeLost)
	if lost := s.Lost(); len(lost) != 1 || lost[0].ID != one {
		t.Fatalf("lost: %v", lost)
	}
	never, _ := someChunk(rng, 3)
	_, err = s.Get(t.Context(), never)
	mustFail(t, err, wire.CodeNotFound)
	if err := s.Drop(t.Context(), []chunk.ID{both, one, never}); err != nil {
		t.Fatal(err)
	}
	if s.Has(both) || s.Has(one) || len(s.Lost()) != 0 {
		t.Fatal("something is left after dropping all")
	}
}

func TestSetWithoutVolumesSaysSo(t *testing.T) {
	id, data := someChunk(random(t), 3)
	_, err := NewSet().Put(t.Context(), id, data)
	mustFail(t, err, wire.CodeNoSpace)
}
