package store

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// smallSegments makes segments short, and moves without waiting.
func smallSegments() Options {
	opt := noFloor
	opt.SegmentBytes = 1 << 20
	opt.hooks.pace = func(ctx context.Context, _ int64) error { return ctx.Err() }
	return opt
}

// still ends the mover, and waits until the committer has done what that had asked for.
func still(t testing.TB, v *Volume) {
	t.Helper()
	v.mover.end()
	<-v.mover.ended
	_ = v.hand(t.Context(), &request{graves: []grave{}}) // it may be read-only
	v.awaitCheckpoint()
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after a minute not yet: %s", what)
		}
	}
}

// idle waits until the mover finds nothing to do.
func idle(t testing.TB, v *Volume) {
	t.Helper()
	eventually(t, "dead bytes are given back", func() bool { logs, _ := v.chooseVictims(); return len(v.mover.wanted) == 0 && len(logs) == 0 })
}

// onDisk is how long the files of a volume's segments are, in bytes.
func onDisk(t testing.TB, dir string) (bytes int64) {
	t.Helper()
	for _, path := range segmentPaths(t, dir) {
		info, err := os.Stat(path)
		if os.IsNotExist(err) { // deleted just now
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		bytes += info.Size()
	}
	return bytes
}

func TestDroppedBytesAreGivenBack(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	kept := map[chunk.ID][]byte{}
	var dropped []chunk.ID
	for i := range 120 { // 12 MB: a dozen logs
		id, data := someChunk(rng, 50_000+rng.IntN(100_000))
		mustPut(t, v, id, data)
		if i%4 == 0 {
			kept[id] = data
		} else {
			dropped = append(dropped, id)
		}
	}
	before := v.Stats()
	if err := v.Drop(t.Context(), dropped); err != nil {
		t.Fatal(err)
	}
	idle(t, v)
	s := v.Stats()
	if s.Dead > before.Used/4 || s.Chunks != len(kept) || s.Lost != 0 {
		t.Fatalf("before %+v, after %+v", before, s)
	}
	for id, data := range kept {
		mustHold(t, v, id, data)
	}
	mustClose(t, v)
	if bytes := onDisk(t, dir); bytes != s.Used+s.Dead+v.space.heads() {
		t.Fatalf("%d bytes of records lie on disk, %+v", bytes, s)
	}
	v = open1(t, dir, smallSegments())
	if got := v.Stats(); got.Dead != s.Dead || got.Used != s.Used || got.Lost != 0 {
		t.Fatalf("before %+v, reopened %+v", s, got)
	}
	for id, data := range kept {
		mustHold(t, v, id, data)
	}
}

// The figures are compared with the files after each part of a long history.
func TestUsedAndDeadAreExactToTheByte(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	opt := smallSegments()
	v := open1(t, dir, opt)
	held := map[chunk.ID][]byte{}
	var ids []chunk.ID
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		for range 60 + rng.IntN(120) {
			switch n := rng.IntN(10); {
			case n < 7 || len(ids) == 0:
				size := shortest + rng.IntN(60_000)
				if rng.IntN(5) == 0 {
					size = shortest + rng.IntN(2000)
				}
				id, data := someChunk(rng, size)
				mustPut(t, v, id, data)
				held[id] = data
				ids = append(ids, id)
			case n < 8: // again: nothing is written
				id := ids[rng.IntN(len(ids))]
				mustPut(t, v, id, held[id])
			default:
				some := ids[rng.IntN(len(ids)):]
				some = slices.Clone(some[:min(len(some), 1+rng.IntN(4))])
				if err := v.Drop(t.Context(), some); err != nil {
					t.Fatal(err)
				}
				for _, id := range some {
					delete(held, id)
				}
				ids = slices.DeleteFunc(ids, func(id chunk.ID) bool { return slices.Contains(some, id) })
			}
		}
		still(t, v)
		var used, live int64
		for _, data := range held {
			used += int64(len(data))
			live += int64(len(data)) + recordHead
		}
		perSegment := map[uint32]int64{}
		err := v.index.each(t.Context(), func(r resident) error {
			perSegment[r.at.segment] += r.at.length()
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for n, s := range v.space.segments {
			if s.live != perSegment[n] {
				t.Fatalf("round %d: %d bytes live in segment %d, counted %d", round, perSegment[n], n, s.live)
			}
		}
		s := v.Stats()
		meta := int64(0)
		for _, n := range slices.Sorted(maps.Keys(v.space.segments)) {
			meta += v.space.segments[n].meta
		}
		mustClose(t, v)
		if bytes := onDisk(t, dir); s.Used != used || s.Dead != bytes-live-meta || len(v.space.segments) != len(segmentPaths(t, dir)) || s.Lost != 0 {
			t.Fatalf("round %d: %+v in %d segments; on disk %d bytes, %d of them live, %d bytes held", round, s, len(v.space.segments), bytes, live, used)
		}
		if heads := live - used + meta; s.Reserved != heads+v.reserve()+recordHead {
			t.Fatalf("round %d: %+v, want %d bytes of heads", round, s, heads)
		}
		v = open1(t, dir, opt)
		if got := v.Stats(); got.Used != s.Used || got.Dead > s.Dead {
			t.Fatalf("round %d: %+v, reopened %+v", round, s, got)
		}
	}
	for id, data := range held {
		mustHold(t, v, id, data)
	}
}

// A lost chunk keeps its log, and stays known as lost, until it is dropped.
func TestALogWithALostChunkStaysUntilItIsDropped(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	kept := map[chunk.ID][]byte{}
	var first, dropped []chunk.ID
	for i := range 40 {
		id, data := someChunk(rng, 100_000)
		mustPut(t, v, id, data)
		if i%5 == 0 {
			kept[id] = data
			first = append(first, id)
		} else {
			dropped = append(dropped, id)
		}
	}
	bad := first[1]
	flip(t, dir, kept[bad], rng.IntN(100_000))
	at := whereIs(t, v, bad)
	if err := v.Drop(t.Context(), dropped); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what is whole is moved", func() bool { return whereIs(t, v, first[0]).segment != 1 && v.Stats().Lost == 1 })
	for id, data := range kept {
		if id != bad {
			mustHold(t, v, id, data)
		}
	}
	_, err := v.Get(t.Context(), bad)
	mustFail(t, err, wire.CodeLost)
	idle(t, v)
	if got := lostIDs(v); !sameIDs(got, []chunk.ID{bad}) || whereIs(t, v, bad) != at {
		t.Fatalf("lost: %v", got)
	}
	mustClose(t, v) // the mover has ended
	if _, err := os.Stat(segmentPath(v, at.segment)); err != nil {
		t.Fatalf("its log: %v", err)
	}
	v = open1(t, dir, smallSegments())
	if checked, err := v.Check(t.Context()); err != nil || len(checked.Lost) != 1 || checked.Lost[0].ID != bad {
		t.Fatalf("%+v, %v", checked, err)
	}
	if err := v.Drop(t.Context(), []chunk.ID{bad}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its log is deleted", func() bool {
		_, err := os.Stat(segmentPath(v, at.segment))
		return os.IsNotExist(err)
	})
	if s := v.Stats(); s.Lost != 0 || s.Chunks != len(kept)-1 {
		t.Fatalf("%+v", s)
	}
}

func whereIs(t testing.TB, v *Volume, id chunk.ID) place {
	t.Helper()
	at, _, err := v.index.find(id)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func segmentPath(v *Volume, number uint32) string {
	return filepath.Join(v.dir, chunksDir, segmentName(number))
}

// A store that is full of what was dropped takes chunks again.
func TestAFullVolumeLivesOnWhatIsDropped(t *testing.T) {
	rng := random(t)
	opt := smallSegments()
	opt.Capacity = 20 << 20
	v := open1(t, t.TempDir(), opt)
	var ids []chunk.ID
	for range 600 { // 60 MB go through
		id, data := someChunk(rng, 100_000)
		for {
			err := v.Put(t.Context(), id, data)
			if err == nil {
				break
			}
			mustFail(t, err, wire.CodeNoSpace)
			dead := v.Stats().Dead
			if dead < 3<<20 {
				if err := v.Drop(t.Context(), ids[:40]); err != nil {
					t.Fatal(err)
				}
				ids = ids[40:]
			}
			eventually(t, "there is room again", func() bool { return v.CanTake(100_000) == nil })
		}
		ids = append(ids, id)
	}
	checked, err := v.Check(t.Context())
	if err != nil || len(checked.Lost) != 0 || checked.Chunks != len(ids) {
		t.Fatalf("%+v, %v", checked, err)
	}
}

// childThatChurns puts and drops, so that logs are moved all the time, and prints
// what is held: a line once Put has returned, one before each Drop and one after.
func childThatChurns(dir string) {
	v, err := Open(dir, smallSegments())
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	rng := rand.New(rand.NewPCG(uint64(os.Getpid()), 0))
	var ids []chunk.ID
	for {
		id, data := someChunk(rng, 2000+rng.IntN(100_000))
		if err := v.Put(context.Background(), id, data); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("put", id, len(data))
		ids = append(ids, id)
		if len(ids) > 60 {
			i := rng.IntN(len(ids))
			fmt.Println("drop", ids[i], 0)
			if err := v.Drop(context.Background(), ids[i:i+1]); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			fmt.Println("dropped", ids[i], 0)
			ids = slices.Delete(ids, i, i+1)
		}
	}
}

func TestKilledWhileLogsAreMoved(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	receipts, dropped := map[chunk.ID]int{}, map[chunk.ID]bool{}
	deleted, rounds := 0, 6
	if testing.Short() {
		rounds = 2
	}
	for range rounds {
		before := firstSegment(t, dir)
		cmd := child(t, dir)
		cmd.Env = append(cmd.Env, churnEnv+"=1")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		left := 300 + rng.IntN(300)
		for lines.Scan() {
			var what, text string
			var size int
			if n, _ := fmt.Sscan(lines.Text(), &what, &text, &size); n != 3 {
				t.Fatalf("the child says %q", lines.Text())
			}
			id, err := chunk.ParseID(text)
			if err != nil {
				t.Fatal(err)
			}
			delete(receipts, id) // dropped: may be there or not
			switch what {
			case "put":
				receipts[id] = size
			case "dropped":
				dropped[id] = true
			}
			if left--; left == 0 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		cmd.Wait()
		if after := firstSegment(t, dir); after > before {
			deleted++
		}
		without := killed(t, dir)
		if err := os.RemoveAll(filepath.Join(without, chunksDir, indexDir)); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{without, dir} {
			v := open1(t, dir, smallSegments())
			for id, size := range receipts {
				if got, err := v.Confirm(t.Context(), id); err != nil || got != int64(size) {
					t.Fatalf("a chunk with a receipt: %d of %d bytes, %v", got, size, err)
				}
			}
			for id := range dropped {
				_, err := v.Confirm(t.Context(), id)
				mustFail(t, err, wire.CodeNotFound)
			}
			if lost := v.Lost(); len(lost) > 0 {
				t.Fatalf("lost: %+v", lost)
			}
			mustClose(t, v)
		}
	}
	if deleted == 0 {
		t.Fatal("no log was deleted while the child ran: nothing is proved")
	}
	t.Logf("%d receipts kept, logs were deleted in %d of %d runs", len(receipts), deleted, rounds)
}

func firstSegment(t testing.TB, dir string) (number uint32) {
	t.Helper()
	numbers, err := segmentsIn(filepath.Join(dir, chunksDir))
	if err != nil {
		t.Fatal(err)
	}
	if len(numbers) == 0 {
		return 0
	}
	return numbers[0]
}

// The log is deleted between the moment a reader knows where the chunk lies and
// the moment it reads it there.
func TestALogThatGoesUnderAReaderCostsNothing(t *testing.T) {
	rng := random(t)
	opt := smallSegments()
	var armed atomic.Bool
	var pull func()
	opt.hooks.reading = func() {
		if armed.CompareAndSwap(true, false) {
			pull()
		}
	}
	v := open1(t, t.TempDir(), opt)
	id, data := someChunk(rng, 30_000)
	mustPut(t, v, id, data)
	var others []chunk.ID
	for range 15 {
		other, otherData := someChunk(rng, 100_000)
		mustPut(t, v, other, otherData)
		others = append(others, other)
	}
	log := segmentPath(v, whereIs(t, v, id).segment)
	pull = func() {
		if err := v.Drop(t.Context(), others); err != nil {
			t.Error(err)
		}
		eventually(t, "its log is deleted", func() bool {
			_, err := os.Stat(log)
			return os.IsNotExist(err)
		})
	}
	armed.Store(true)
	mustHold(t, v, id, data)
	if s := v.Stats(); s.Lost != 0 {
		t.Fatalf("%+v", s)
	}
}

// A chunk that is dropped while it is on its way elsewhere does not come back.
func TestAMoveDoesNotBringBackWhatWasDropped(t *testing.T) {
	rng := random(t)
	v := open1(t, t.TempDir(), noFloor)
	id, data := someChunk(rng, 30_000)
	mustPut(t, v, id, data)
	late := &request{moves: []move{{id: id, data: data, from: whereIs(t, v, id)}}}
	if err := v.Drop(t.Context(), []chunk.ID{id}); err != nil {
		t.Fatal(err)
	}
	if err := v.hand(t.Context(), late); err != nil {
		t.Fatal(err)
	}
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeNotFound)
	if s := v.Stats(); s.Used != 0 || s.Chunks != 0 {
		t.Fatalf("%+v", s)
	}
}

// Who reads while chunks move and their logs go gets the right bytes all the time.
func TestReadingWhileLogsAreMoved(t *testing.T) {
	rng := random(t)
	v := open1(t, t.TempDir(), smallSegments())
	id, data := someChunk(rng, 30_000)
	mustPut(t, v, id, data)
	stop, readers := make(chan struct{}), make(chan error, 2)
	for range cap(readers) {
		go func() {
			for {
				select {
				case <-stop:
					readers <- nil
					return
				default:
				}
				got, err := v.Get(t.Context(), id)
				if err == nil && !bytes.Equal(got, data) {
					err = fmt.Errorf("%d wrong bytes", len(got))
				}
				if err != nil {
					readers <- err
					return
				}
			}
		}()
	}
	was, moved := whereIs(t, v, id), 0
	for i, end := 0, time.Now().Add(time.Minute); i < 300 || moved == 0 && time.Now().Before(end); i++ {
		other, otherData := someChunk(rng, 100_000)
		mustPut(t, v, other, otherData)
		if err := v.Drop(t.Context(), []chunk.ID{other}); err != nil {
			t.Fatal(err)
		}
		if now := whereIs(t, v, id); now != was {
			was, moved = now, moved+1
		}
	}
	close(stop)
	for range cap(readers) {
		if err := <-readers; err != nil {
			t.Error(err)
		}
	}
	if moved == 0 {
		t.Error("the chunk has never moved")
	}
	if s := v.Stats(); s.Lost != 0 {
		t.Errorf("%+v", s)
	}
}

// Drops take room, too, and are written again as long as what they drop is there: a volume
// on which nothing happens comes to rest, and a chunk that was dropped does not come back
// without the index.
func TestDropsStayAsLongAsWhatTheyDrop(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	opt := smallSegments()
	opt.SegmentBytes = 64 << 10
	v := open1(t, dir, opt)
	held, dropped := map[chunk.ID][]byte{}, []chunk.ID{}
	for i := range 3000 { // a third of each segment
		id, data := someChunk(rng, 100+rng.IntN(200))
		mustPut(t, v, id, data)
		if i%3 == 0 {
			dropped = append(dropped, id)
		} else {
			held[id] = data
		}
	}
	for _, id := range dropped {
		if err := v.Drop(t.Context(), []chunk.ID{id}); err != nil {
			t.Fatal(err)
		}
	}
	idle(t, v)
	before := v.log.seq
	idle(t, v)
	if v.log.seq != before {
		t.Fatal("it does not come to rest")
	}
	for range 2 {
		dir = killed(t, dir)
		if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
			t.Fatal(err)
		}
		v = open1(t, dir, opt)
		for id, data := range held {
			mustHold(t, v, id, data)
		}
		if s := v.Stats(); s.Chunks != len(held) || s.Lost != 0 {
			t.Fatalf("%+v, want %d chunks", s, len(held))
		}
		some := 0
		for id := range held { // the segments that have the drops go
			if some++; some%10 > 0 {
				if err := v.Drop(t.Context(), []chunk.ID{id}); err != nil {
					t.Fatal(err)
				}
				delete(held, id)
			}
		}
		idle(t, v)
	}
}
