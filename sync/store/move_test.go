package store

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// smallLogs makes value logs short, and moves without waiting.
func smallLogs() Options {
	opt := Options{FloorBytes: -1, LogBytes: 1 << 20}
	opt.hooks.pace = func(ctx context.Context, _ int64) error { return ctx.Err() }
	return opt
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

// onDisk is what the files of a closed volume's logs have besides their headers,
// and how many there are.
func onDisk(t testing.TB, dir string) (bytes int64, logs int) {
	t.Helper()
	paths, err := filesOf(filepath.Join(dir, chunksDir), ".vlog")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		bytes += info.Size() - logHeader
	}
	return bytes, len(paths)
}

// recordLength is computed here as the format says, not as the store does.
func recordLength(size int) int64 {
	if size < smallValue {
		return 0
	}
	key := 1 + 32 + 8
	return int64(2 + len(binary.AppendUvarint(nil, uint64(key))) + len(binary.AppendUvarint(nil, uint64(size))) + 1 + key + size + 4)
}

func TestDroppedBytesAreGivenBack(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallLogs())
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
	if bytes, _ := onDisk(t, dir); bytes != s.Used+s.Dead+v.space.heads()-int64(len(v.space.logs))*logHeader {
		t.Fatalf("%d bytes of records lie on disk, %+v", bytes, s)
	}
	v = open1(t, dir, smallLogs())
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
	opt := smallLogs()
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
				size := 1 + rng.IntN(60_000)
				if rng.IntN(5) == 0 {
					size = 1 + rng.IntN(2*smallValue)
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
		v.mover.end()
		<-v.mover.ended
		if err := v.hand(t.Context(), &request{flush: true}); err != nil { // the committer may be at the last move still
			t.Fatal(err)
		}
		var used, small, live int64
		for _, data := range held {
			used += int64(len(data))
			live += recordLength(len(data))
			if len(data) < smallValue {
				small += int64(len(data))
			}
		}
		perLog := map[uint32]int64{}
		err := v.eachRecord(t.Context(), func(_ chunk.ID, at place) error {
			perLog[at.log] += int64(at.length)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for n, s := range v.space.logs {
			if s.live != perLog[n] {
				t.Fatalf("round %d: %d bytes live in log %d, counted %d", round, perLog[n], n, s.live)
			}
		}
		s := v.Stats()
		logs := int64(len(v.space.logs))
		mustClose(t, v)
		bytes, files := onDisk(t, dir)
		if s.Used != used || s.Dead != bytes-live || int64(files) != logs || s.Lost != 0 {
			t.Fatalf("round %d: %+v in %d logs; on disk %d bytes of records in %d logs, %d of them live, %d bytes held", round, s, logs, bytes, files, live, used)
		}
		if heads := live - (used - small) + logs*logHeader; s.Reserved != heads+v.reserve()+recordHead {
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
	v := open1(t, dir, smallLogs())
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
	eventually(t, "what is whole is moved", func() bool { return whereIs(t, v, first[0]).log != 1 && v.Stats().Lost == 1 })
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
	if _, err := os.Stat(v.logPath(at.log)); err != nil {
		t.Fatalf("its log: %v", err)
	}
	v = open1(t, dir, smallLogs())
	if checked, err := v.Check(t.Context()); err != nil || len(checked.Lost) != 1 || checked.Lost[0].ID != bad {
		t.Fatalf("%+v, %v", checked, err)
	}
	if err := v.Drop(t.Context(), []chunk.ID{bad}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its log is deleted", func() bool {
		_, err := os.Stat(v.logPath(at.log))
		return os.IsNotExist(err)
	})
	if s := v.Stats(); s.Lost != 0 || s.Chunks != len(kept)-1 {
		t.Fatalf("%+v", s)
	}
}

func whereIs(t testing.TB, v *Volume, id chunk.ID) (at place) {
	t.Helper()
	err := v.eachRecord(t.Context(), func(got chunk.ID, p place) error {
		if got == id {
			at = p
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// A store that is full of what was dropped takes chunks again.
func TestAFullVolumeLivesOnWhatIsDropped(t *testing.T) {
	rng := random(t)
	opt := smallLogs()
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
// what is held: a line once Put has returned, one before each Drop.
func childThatChurns(dir string) {
	v, err := Open(dir, smallLogs())
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
			ids = slices.Delete(ids, i, i+1)
		}
	}
}

func TestKilledWhileLogsAreMoved(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	receipts := map[chunk.ID]int{}
	deleted, rounds := 0, 6
	if testing.Short() {
		rounds = 2
	}
	for range rounds {
		_, before := firstLog(t, dir)
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
			if what == "put" {
				receipts[id] = size
			}
			if left--; left == 0 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		cmd.Wait()
		if _, after := firstLog(t, dir); after > before {
			deleted++
		}
		v := open1(t, dir, smallLogs())
		for id, size := range receipts {
			if got, err := v.Confirm(t.Context(), id); err != nil || got != int64(size) {
				t.Fatalf("a chunk with a receipt: %d of %d bytes, %v", got, size, err)
			}
		}
		mustClose(t, v)
	}
	if deleted == 0 {
		t.Fatal("no log was deleted while the child ran: nothing is proved")
	}
	t.Logf("%d receipts kept, logs were deleted in %d of %d runs", len(receipts), deleted, rounds)
}

func firstLog(t testing.TB, dir string) (path string, number uint32) {
	t.Helper()
	logs, err := filesOf(filepath.Join(dir, chunksDir), ".vlog")
	if err != nil {
		t.Fatal(err)
	}
	if len(logs) == 0 {
		return "", 0
	}
	n, err := logNumber(logs[0])
	if err != nil {
		t.Fatal(err)
	}
	return logs[0], n
}

// The log is deleted between the moment a reader knows where the chunk lies and
// the moment it reads it there.
func TestALogThatGoesUnderAReaderCostsNothing(t *testing.T) {
	rng := random(t)
	opt := smallLogs()
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
	log := v.logPath(whereIs(t, v, id).log)
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
	v := open1(t, t.TempDir(), smallLogs())
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
	for range 300 {
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

// The tree of a move can reach the disk before the bytes do, as the kernel writes
// mapped files in any order. The chunk is then read where it lay, and written again.
func TestAMoveWhoseBytesAPowerCutTookLosesNothing(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallLogs())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	from, to := moved(t, v, id, data)
	for range 60 { // so that it is not among the newest keys alone
		other, bytes := someChunk(rng, 20_000)
		mustPut(t, v, other, bytes)
	}
	mustClose(t, v)
	neverWritten(t, v, to)
	v = open1(t, dir, smallLogs())
	mustHold(t, v, id, data)
	if now := whereIs(t, v, id); now == to || now == from {
		t.Fatalf("it still lies at %+v", now)
	}
	if s := v.Stats(); s.Lost != 0 || s.Chunks != 61 {
		t.Fatalf("%+v", s)
	}
}

// moved writes a chunk again elsewhere, and returns from where to where.
func moved(t *testing.T, v *Volume, id chunk.ID, data []byte) (from, to place) {
	t.Helper()
	from = whereIs(t, v, id)
	if err := v.hand(t.Context(), &request{moves: []move{{id: id, data: data, from: from}}}); err != nil {
		t.Fatal(err)
	}
	if to = whereIs(t, v, id); to == from {
		t.Fatal("it was not moved")
	}
	return from, to
}

// neverWritten takes the bytes of a record away, as a power cut does that comes before
// them. The volume is closed.
func neverWritten(t *testing.T, v *Volume, at place) {
	t.Helper()
	f, err := os.OpenFile(v.logPath(at.log), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, at.length), int64(at.at)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// cutMove leaves a volume of 21 chunks as a power cut leaves it in the middle of a move
// to another log: the tree knows of the move, its bytes are not there, the old log is.
func cutMove(t *testing.T, rng *rand.Rand, dir string) (id chunk.ID, data []byte) {
	t.Helper()
	v := open1(t, dir, smallLogs())
	id, data = someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	from := whereIs(t, v, id)
	mustClose(t, v)
	old, err := os.ReadFile(v.logPath(from.log))
	if err != nil {
		t.Fatal(err)
	}
	v = open1(t, dir, smallLogs())
	for range 20 {
		other, bytes := someChunk(rng, 20_000)
		mustPut(t, v, other, bytes)
	}
	_, to := moved(t, v, id, data)
	if to.log == from.log {
		t.Fatal("it was not moved to another log")
	}
	mustClose(t, v)
	// The cut: the old log is still there, and the bytes of the move are not.
	if err := os.WriteFile(v.logPath(from.log), old, 0o600); err != nil {
		t.Fatal(err)
	}
	neverWritten(t, v, to)
	return id, data
}

// A disk that does not answer once, while a volume opens after a power cut, keeps the
// check of what the cut can have hurt from its end. No log is emptied before that is
// made up for: the old one has the only whole copy.
func TestALogStaysUntilWhatACrashCanHaveHurtWasRead(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	id, data := cutMove(t, rng, dir)
	opt := smallLogs()
	opt.hooks.patience = 10 * time.Millisecond
	answers, first := make(chan struct{}), sync.Once{}
	opt.hooks.reading = func() { first.Do(func() { <-answers }) }
	v := open1(t, dir, opt)
	if v.reclaim(t.Context()) {
		t.Error("logs were emptied")
	}
	close(answers)
	eventually(t, "the disk answering", func() bool { return v.hangs.Load() == 0 })
	v.reclaim(t.Context())
	mustHold(t, v, id, data)
	if s := v.Stats(); s.Lost != 0 || s.Chunks != 21 {
		t.Fatalf("%+v", s)
	}
}

// Nor is one emptied after a restart in between: only the newest chunks are looked at
// then, so none may have come after those that still have to be.
func TestALogStaysOverRestartsUntilWhatACrashCanHaveHurtWasRead(t *testing.T) {
	for name, read := range map[string]bool{"not read": false, "read, and not written again": true} {
		t.Run(name, func(t *testing.T) { staysOverRestarts(t, read) })
	}
}

func staysOverRestarts(t *testing.T, read bool) {
	rng, dir := random(t), t.TempDir()
	id, data := cutMove(t, rng, dir)
	opt := smallLogs()
	opt.hooks.patience = 50 * time.Millisecond
	answers, first := make(chan struct{}), sync.Once{}
	opt.hooks.reading = func() { first.Do(func() { <-answers }) }
	v := open1(t, dir, opt)
	v.mover.end()
	close(answers)
	<-v.mover.ended
	eventually(t, "the disk answering", func() bool { return v.hangs.Load() == 0 })
	if read {
		if err := v.readAgain(t.Context(), v.unread); err != nil {
			t.Fatal(err)
		}
	}
	for range 30 {
		other, otherData := someChunk(rng, chunk.DefaultSize)
		_ = v.Put(t.Context(), other, otherData) // refused, if all is well
	}
	mustClose(t, v)
	for range 2 {
		v = open1(t, dir, smallLogs())
		for v.reclaim(t.Context()) {
		}
		mustHold(t, v, id, data)
		mustClose(t, v)
	}
}
