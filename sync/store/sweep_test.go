package store

import (
	"math"
	"testing"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// swept reads what is left of a stretch.
func swept(t testing.TB, s Stretch) (all []Verified) {
	t.Helper()
	for {
		some, err := s.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(some) == 0 {
			return all
		}
		all = append(all, some...)
	}
}

// shelved puts chunks of all sizes, over several segments.
func shelved(t testing.TB, v *Volume, n int) (datas map[chunk.ID][]byte, order []chunk.ID) {
	t.Helper()
	rng := random(t)
	datas = map[chunk.ID][]byte{}
	for i := range n {
		size := shortest + rng.IntN(300_000)
		switch {
		case i == n/2:
			size = 1_000_000
		case i%10 == 0:
			size = shortest + rng.IntN(1000)
		case i%10 < 4:
			size = 4096
		}
		id, data := someChunk(rng, size)
		mustPut(t, v, id, data)
		datas[id] = data
		order = append(order, id)
	}
	return datas, order
}

func stretchOf(t testing.TB, v *Volume, after chunk.ID, bytes int64) Stretch {
	t.Helper()
	s, err := v.Stretch(t.Context(), after, bytes)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStretchesReadAllChunksOnce(t *testing.T) {
	v := open1(t, t.TempDir(), smallSegments())
	datas, order := shelved(t, v, 60)
	lost := order[12]
	flip(t, v.dir, datas[lost], len(datas[lost])/2)
	for _, bytes := range []int64{1, 1 << 20, math.MaxInt64} {
		seen, after, ended := map[chunk.ID]bool{}, chunk.ID{}, false
		for !ended {
			s := stretchOf(t, v, after, bytes)
			all := swept(t, s)
			if ended = s.Last == (chunk.ID{}); ended {
				continue
			}
			var size int64
			for _, c := range all {
				if compareIDs(c.ID, after) <= 0 || compareIDs(c.ID, s.Last) > 0 || seen[c.ID] || c.Size != int64(len(datas[c.ID])) {
					t.Fatalf("%s with %d bytes was read, between %s and %s", c.ID, c.Size, after, s.Last)
				}
				seen[c.ID] = true
				if size += c.Size; c.ID != s.Last && size-int64(len(datas[s.Last])) >= bytes {
					t.Fatalf("a stretch of %d bytes has %d", bytes, size)
				}
				if c.ID == lost {
					mustFail(t, c.Err, wire.CodeLost)
				} else if c.Err != nil {
					t.Errorf("%s: %v", c.ID, c.Err)
				}
			}
			after = s.Last
		}
		if len(seen) != len(order) {
			t.Fatalf("%d chunks of %d were read", len(seen), len(order))
		}
	}
	if got := lostIDs(v); !sameIDs(got, []chunk.ID{lost}) {
		t.Errorf("lost are %v", got)
	}
	mustPut(t, v, lost, datas[lost])
	for _, c := range swept(t, stretchOf(t, v, chunk.ID{}, math.MaxInt64)) {
		if c.Err != nil {
			t.Errorf("%s: %v", c.ID, c.Err)
		}
	}
}

// What was put together is read together, in its order.
func TestAStretchIsReadAsItLies(t *testing.T) {
	v := open1(t, t.TempDir(), noFloor)
	rng := random(t)
	rank := map[chunk.ID]int{}
	reads := 0
	for i := range 200 {
		id, data := someChunk(rng, 60_000)
		mustPut(t, v, id, data)
		rank[id] = i
	}
	s := stretchOf(t, v, chunk.ID{}, math.MaxInt64)
	for next := 0; next < len(rank); reads++ {
		some, err := s.Next(t.Context())
		if err != nil || len(some) == 0 {
			t.Fatalf("%d of %d are read: %v", next, len(rank), err)
		}
		for _, c := range some {
			if rank[c.ID] != next || c.Err != nil {
				t.Fatalf("number %d was read as number %d: %v", rank[c.ID], next, c.Err)
			}
			next++
		}
	}
	if most := 200*60_000/(sweepBytes-60_000) + 1; reads > most {
		t.Errorf("it was read in %d parts, %d would do", reads, most)
	}
}

// A stretch that was found some time ago: chunks were dropped since, put again, and moved,
// and their logs are gone.
func TestAStretchReadsWhatHasMoved(t *testing.T) {
	v := open1(t, t.TempDir(), smallSegments())
	datas, order := shelved(t, v, 100)
	s := stretchOf(t, v, chunk.ID{}, math.MaxInt64)
	before := map[chunk.ID]place{}
	dropped := map[chunk.ID]bool{}
	var drops []chunk.ID
	for i, id := range order {
		before[id] = whereIs(t, v, id)
		if i%4 != 0 || i == 40 {
			drops = append(drops, id)
			dropped[id] = true
		}
	}
	if err := v.Drop(t.Context(), drops); err != nil {
		t.Fatal(err)
	}
	idle(t, v)
	again := drops[0]
	mustPut(t, v, again, datas[again])
	delete(dropped, again)
	moved := 0
	for i, c := range swept(t, s) {
		if before[c.ID] != whereIs(t, v, c.ID) && !dropped[c.ID] {
			moved++
		}
		switch {
		case dropped[c.ID] && c.Err != nil:
			mustFail(t, c.Err, wire.CodeNotFound)
		case c.Err != nil:
			t.Errorf("chunk %d, %s: %v", i, c.ID, c.Err)
		}
	}
	if moved < 5 {
		t.Fatalf("only %d chunks were moved meanwhile", moved)
	}
	if len(v.Lost()) > 0 {
		t.Errorf("lost are %v", v.Lost())
	}
}
