package store

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// rebuildEnv names the step of making a tree anew after which a child dies.
const rebuildEnv = "DEIMOS_TEST_STORE_REBUILD"

// childThatDies opens the volume in dir and kills itself after a step of making its
// tree anew.
func childThatDies(dir, after string) {
	opt := noFloor
	opt.hooks.rebuilding = func(step string) {
		if step == after {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	if _, err := Open(dir, opt); err != nil {
		panic(err)
	}
	os.Exit(0)
}

// history is a volume with a past: tables on several levels, chunks in the tree and
// in several logs, some dropped, some put again.
type history struct {
	dir     string
	id      string
	held    map[chunk.ID][]byte
	dropped map[chunk.ID]bool
	twice   map[chunk.ID]bool // held, and put twice: whole in two places
}

func newHistory(t testing.TB, rng *rand.Rand) *history {
	h := &history{dir: t.TempDir(), held: map[chunk.ID][]byte{}, dropped: map[chunk.ID]bool{}, twice: map[chunk.ID]bool{}}
	for range 4 {
		v := open1(t, h.dir, smallLogs())
		h.id = v.ID()
		var puts sync.WaitGroup
		for i := range 50 {
			size := smallValue + rng.IntN(12_000)
			if i%5 == 0 {
				size = 1 + rng.IntN(smallValue-1)
			}
			id, data := someChunk(rng, size)
			h.held[id] = data
			puts.Go(func() {
				if err := v.Put(t.Context(), id, data); err != nil {
					t.Error(err)
				}
			})
		}
		puts.Wait()
		var drop []chunk.ID
		for id := range h.held {
			if len(drop) < 8 {
				drop = append(drop, id)
			}
		}
		if err := v.Drop(t.Context(), drop); err != nil {
			t.Fatal(err)
		}
		for i, id := range drop {
			if i == 0 { // dropped, and put again
				mustPut(t, v, id, h.held[id])
				h.twice[id] = true
				continue
			}
			h.dropped[id] = true
			delete(h.held, id)
			delete(h.twice, id)
		}
		mustClose(t, v)
	}
	return h
}

func (h *history) path(name string) string { return filepath.Join(h.dir, chunksDir, name) }

func (h *history) files(t testing.TB, ending string) []string {
	t.Helper()
	paths, err := filesOf(h.path(""), ending)
	if err != nil || len(paths) == 0 {
		t.Fatalf("no file %s: %v", ending, err)
	}
	return paths
}

// mustComeBack opens the volume: each chunk from 1 KiB on is whole, each smaller one is
// whole, or told as lost, or if knows is false, not found. Afterwards it is a volume like any other.
func (h *history) mustComeBack(t testing.TB, knows bool) {
	t.Helper()
	v := open1(t, h.dir, smallLogs())
	if v.ID() != h.id {
		t.Fatalf("the volume has become %s, was %s", v.ID(), h.id)
	}
	lost := lostIDs(v)
	for id, data := range h.held {
		got, err := v.Get(t.Context(), id)
		switch {
		case err == nil && bytes.Equal(got, data):
		case err == nil:
			t.Fatal("wrong bytes were served")
		case len(data) >= smallValue:
			t.Fatalf("a chunk of %d bytes: %v", len(data), err)
		case wire.ProblemOf(err).Code == wire.CodeLost && slices.Contains(lost, id):
		case wire.ProblemOf(err).Code == wire.CodeNotFound && !knows:
		default:
			t.Fatalf("a chunk of %d bytes: %v, lost are %v", len(data), err, lost)
		}
	}
	for id := range h.dropped { // may have come back, or be told as lost
		if got, err := v.Get(t.Context(), id); err == nil && chunk.Sum(got) != id {
			t.Fatal("wrong bytes were served")
		}
	}
	for id, data := range h.held { // mends what is lost
		mustPut(t, v, id, data)
	}
	checked, err := v.Check(t.Context())
	if s := v.Stats(); err != nil || s.Chunks != checked.Chunks || s.ReadOnly != "" || s.Dead < 0 || checked.Chunks < len(h.held) {
		t.Fatalf("%+v, %+v, %v", s, checked, err)
	}
	mustClose(t, v)
	opt := smallLogs()
	opt.hooks.rebuilding = func(step string) { t.Errorf("a tree made anew is made anew again: %s", step) }
	v = open1(t, h.dir, opt)
	for id, data := range h.held {
		mustHold(t, v, id, data)
	}
	if _, err := os.Stat(h.path(rebuildDir)); !os.IsNotExist(err) {
		t.Fatalf("something is left of making it: %v", err)
	}
	mustClose(t, v)
}

func change(t testing.TB, path string, at int) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, path, int64(at), raw[at]^0x41)
}

func sizeOf(t testing.TB, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func TestADamagedTreeIsMadeAnew(t *testing.T) {
	for _, c := range []struct {
		name  string
		knows bool // what is lost is told
		do    func(*testing.T, *rand.Rand, *history)
	}{
		{"a flipped byte in a block", true, func(t *testing.T, rng *rand.Rand, h *history) {
			change(t, h.files(t, ".sst")[0], 5+rng.IntN(3000))
		}},
		{"a flipped byte in the index", true, func(t *testing.T, _ *rand.Rand, h *history) {
			path := h.files(t, ".sst")[0]
			change(t, path, int(sizeOf(t, path))-200)
		}},
		{"a flipped byte in the foot", true, func(t *testing.T, rng *rand.Rand, h *history) {
			path := h.files(t, ".sst")[0]
			change(t, path, int(sizeOf(t, path))-1-rng.IntN(14))
		}},
		{"a table that is cut", false, func(t *testing.T, rng *rand.Rand, h *history) {
			path := h.files(t, ".sst")[0]
			if err := os.Truncate(path, rng.Int64N(sizeOf(t, path))); err != nil {
				t.Fatal(err)
			}
		}},
		{"a table that is empty", false, func(t *testing.T, _ *rand.Rand, h *history) {
			if err := os.Truncate(h.files(t, ".sst")[0], 0); err != nil {
				t.Fatal(err)
			}
		}},
		{"a table that is gone", false, func(t *testing.T, _ *rand.Rand, h *history) {
			if err := os.Remove(h.files(t, ".sst")[0]); err != nil {
				t.Fatal(err)
			}
		}},
		{"all tables gone", false, func(t *testing.T, _ *rand.Rand, h *history) {
			for _, path := range h.files(t, ".sst") {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"a flipped byte in MANIFEST", true, func(t *testing.T, rng *rand.Rand, h *history) {
			change(t, h.path(badger.ManifestFilename), rng.IntN(int(sizeOf(t, h.path(badger.ManifestFilename)))))
		}},
		{"no MANIFEST", true, func(t *testing.T, _ *rand.Rand, h *history) {
			if err := os.Remove(h.path(badger.ManifestFilename)); err != nil {
				t.Fatal(err)
			}
		}},
		{"neither tables nor MANIFEST", false, func(t *testing.T, _ *rand.Rand, h *history) {
			for _, path := range append(h.files(t, ".sst"), h.path(badger.ManifestFilename)) {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"a flipped byte in KEYREGISTRY", true, func(t *testing.T, rng *rand.Rand, h *history) {
			change(t, h.path(badger.KeyRegistryFileName), 16+rng.IntN(12))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
			h := newHistory(t, rng)
			c.do(t, rng, h)
			h.mustComeBack(t, c.knows)
		})
	}
}

// Of a list that was cut Badger says nothing: it deletes the tables that are not on
// it, wherever the cut is.
func TestACutManifestCostsNothing(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	h := newHistory(t, rng)
	whole := t.TempDir()
	if err := os.CopyFS(whole, os.DirFS(h.dir)); err != nil {
		t.Fatal(err)
	}
	length := sizeOf(t, h.path(badger.ManifestFilename))
	cuts := []int64{0, 8, length - 1}
	for range 5 {
		cuts = append(cuts, rng.Int64N(length))
	}
	for _, cut := range cuts {
		h.dir = t.TempDir()
		if err := os.CopyFS(h.dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(h.path(badger.ManifestFilename), cut); err != nil {
			t.Fatal(err)
		}
		t.Logf("cut at %d of %d", cut, length)
		h.mustComeBack(t, true)
	}
}

// A chunk that only the old tree still lists is told as lost before anyone asks.
func TestWhatATreeMadeAnewCannotReadIsToldAsLost(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	h := newHistory(t, rng)
	opt := smallLogs()
	opt.hooks.pace = func(context.Context, int64) error { return errors.New("nothing is moved here") }
	v := open1(t, h.dir, opt)
	var flipped chunk.ID
	var gone []chunk.ID // a whole log is gone as well
	var log uint32
	for id, data := range h.held {
		at := whereIs(t, v, id)
		switch {
		case len(data) < smallValue || h.twice[id]:
		case flipped == chunk.ID{}:
			flipped = id
		case at.log != whereIs(t, v, flipped).log && (log == 0 || at.log == log):
			log, gone = at.log, append(gone, id)
		}
	}
	for range 30 { // Open reads the newest ones in any case
		id, data := someChunk(rng, chunk.DefaultSize)
		mustPut(t, v, id, data)
	}
	rotten := whereIs(t, v, flipped)
	mustClose(t, v)
	overwrite(t, v.logPath(rotten.log), int64(rotten.at)+60+rng.Int64N(900), 0xa5)
	overwrite(t, v.logPath(rotten.log), int64(rotten.at)+1000, 0x5a) // one of them is a change
	if err := os.Remove(v.logPath(log)); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(h.path(badger.ManifestFilename)); err != nil {
		t.Fatal(err)
	}
	v = open1(t, h.dir, opt)
	lost := lostIDs(v)
	if !slices.Contains(lost, flipped) {
		t.Errorf("the damaged chunk is not told as lost, of %d that are", len(lost))
	}
	for _, id := range gone {
		if !slices.Contains(lost, id) {
			t.Errorf("chunk %s of the log that is gone is not told as lost", id)
		}
	}
	for id, data := range h.held {
		if !slices.Contains(lost, id) {
			mustHold(t, v, id, data)
		}
	}
	if len(gone) == 0 {
		t.Fatal("the log that was removed held nothing")
	}
}

// A record with a damaged head hides none behind it.
func TestARecordThatCannotBeTakenApartHidesNoOther(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	dir := t.TempDir()
	v := open1(t, dir, noFloor)
	var ids []chunk.ID
	held := map[chunk.ID][]byte{}
	for range 6 {
		id, data := someChunk(rng, 3000+rng.IntN(200_000))
		mustPut(t, v, id, data)
		ids, held[id] = append(ids, id), data
	}
	hurt := whereIs(t, v, ids[2])
	mustClose(t, v)
	// Any byte of the head: meta, lengths, expiry, key.
	overwrite(t, v.logPath(hurt.log), int64(hurt.at)+rng.Int64N(40), 0xa5)
	tables, err := filesOf(filepath.Join(dir, chunksDir), ".sst")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range tables {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	v = open1(t, dir, noFloor)
	for i, id := range ids {
		if i == 2 {
			_, err := v.Get(t.Context(), id)
			mustFail(t, err, wire.CodeNotFound) // nobody knows of it any more
			continue
		}
		mustHold(t, v, id, held[id])
	}
}

// Whoever has chunks stored could put records into them. They are met when the head
// of the chunk's own record is damaged, and do no harm.
func TestForgedRecordsInAChunkDoNoHarm(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	dir := t.TempDir()
	v := open1(t, dir, noFloor)
	victim, victimData := someChunk(rng, 5000)
	inside, insideData := someChunk(rng, 3000)
	ghost, _ := someChunk(rng, 3000)
	record := func(meta byte, id chunk.ID, version uint64, data []byte) []byte {
		key := y.KeyWithTs(keyOf(chunkPrefix, id), version)
		raw := []byte{meta, 0}
		for _, n := range []int{len(key), len(data), 0} {
			raw = binary.AppendUvarint(raw, uint64(n))
		}
		raw = append(append(raw, key...), data...)
		return binary.BigEndian.AppendUint32(raw, crc32.Checksum(raw, castagnoli))
	}
	forged := slices.Concat(
		make([]byte, 1000),
		record(0, victim, 1<<40, insideData), // other bytes
		record(bitDelete, victim, 1<<40, nil),
		record(0, ghost, 1<<40, insideData),             // nobody has it
		record(0, inside, math.MaxUint64-1, insideData), // a version that ends all others
		record(0, inside, 1<<41, insideData),            // what is true may be believed
		make([]byte, 1000),
	)
	id := chunk.Sum(forged)
	mustPut(t, v, victim, victimData)
	mustPut(t, v, id, forged)
	at := whereIs(t, v, id)
	mustClose(t, v)
	overwrite(t, v.logPath(at.log), int64(at.at)+2, 0x7f)
	if err := os.Remove(filepath.Join(dir, chunksDir, badger.ManifestFilename)); err != nil {
		t.Fatal(err)
	}
	v = open1(t, dir, noFloor)
	mustHold(t, v, victim, victimData)
	mustHold(t, v, inside, insideData)
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeLost)
	_, err = v.Get(t.Context(), ghost)
	mustFail(t, err, wire.CodeNotFound)
	more, moreData := someChunk(rng, 5000)
	mustPut(t, v, more, moreData)
	mustPut(t, v, id, forged)
	mustClose(t, v)
	v = open1(t, dir, noFloor)
	for id, data := range map[chunk.ID][]byte{victim: victimData, inside: insideData, id: forged, more: moreData} {
		mustHold(t, v, id, data)
	}
}

// The same for blocks of a table, in chunks that are small enough to lie in one: they
// could drop chunks of others.
func TestAForgedBlockInASmallChunkDropsNothing(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	dir := t.TempDir()
	v := open1(t, dir, noFloor)
	victim, victimData := someChunk(rng, 5000)
	mustPut(t, v, victim, victimData)
	b := table.NewTableBuilder(table.Options{TableSize: 1 << 20, BlockSize: 4 << 10})
	b.Add(y.KeyWithTs(keyOf(chunkPrefix, victim), 1<<40), y.ValueStruct{Meta: bitDelete}, 0)
	raw := b.Finish()
	entries, length := splitBlock(raw)
	if len(entries) != 1 || length > smallValue/2 {
		t.Fatalf("%d entries in a block of %d bytes", len(entries), length)
	}
	_, tail := someChunk(rng, 300)
	forged := slices.Concat(raw[:length], tail)
	mustPut(t, v, chunk.Sum(forged), forged)
	mustClose(t, v)
	tables, err := filesOf(filepath.Join(dir, chunksDir), ".sst")
	if err != nil || len(tables) != 1 {
		t.Fatal(tables, err)
	}
	whole, err := os.ReadFile(tables[0])
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(whole, forged)
	if at < 0 {
		t.Fatal("the small chunk is not in the tree as it is")
	}
	change(t, tables[0], at+len(forged)-1) // so its own block is damaged
	v = open1(t, dir, noFloor)
	mustHold(t, v, victim, victimData)
	_, err = v.Get(t.Context(), chunk.Sum(forged))
	mustFail(t, err, wire.CodeNotFound)
}

// The agent is killed while a tree is made anew: the next start makes it, or has it.
func TestKilledWhileATreeIsMadeAnew(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	steps := []string{"tables read", "a log read", "logs read", "run written", "tables made", "tables in place", "list replaced"}
	for _, damaged := range []string{"table", "MANIFEST"} {
		h := newHistory(t, rng)
		if damaged == "table" {
			change(t, h.files(t, ".sst")[0], 5+rng.IntN(3000))
		} else if err := os.Remove(h.path(badger.ManifestFilename)); err != nil {
			t.Fatal(err)
		}
		for _, step := range steps { // one after the other, on what the last has left
			cmd := child(t, h.dir)
			cmd.Env = append(cmd.Env, rebuildEnv+"="+step)
			out, err := cmd.CombinedOutput()
			if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
				t.Fatalf("%s, %s: it was not killed: %v: %s", damaged, step, err, out)
			}
		}
		h.mustComeBack(t, true)
	}
}

// A tree with more entries than are sorted at once is complete, and in order.
func TestATreeOfManyRunsIsComplete(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	dir := t.TempDir()
	tuned := tuning(dir, 1<<20, slog.New(slog.DiscardHandler))
	b := &builder{dir: dir, tuned: tuned, hooks: hooks{}.orReal(), log: slog.New(slog.DiscardHandler)}
	if err := b.begin(); err != nil {
		t.Fatal(err)
	}
	const chunks = 60_000
	var id chunk.ID
	newest := map[chunk.ID]uint64{}
	for range chunks {
		binary.BigEndian.PutUint64(id[:], rng.Uint64N(chunks))
		version := 1 + rng.Uint64N(1<<40)
		newest[id] = max(newest[id], version)
		r := &logRecord{key: y.KeyWithTs(keyOf(chunkPrefix, id), version), value: make([]byte, 5000)}
		if err := b.takeRecord(r, place{1, 5100, uint32(version)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(b.merge(), b.install()); err != nil {
		t.Fatal(err)
	}
	if len(b.runs) < 2 || len(b.tables) < 2 {
		t.Fatalf("%d runs, %d tables: the test is too small", len(b.runs), len(b.tables))
	}
	db, err := badger.Open(tuned)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.View(func(txn *badger.Txn) error {
		for _, prefix := range []byte{chunkPrefix, indexPrefix} {
			n := 0
			it := txn.NewIterator(keysOnly(prefix))
			for it.Rewind(); it.Valid(); it.Next() {
				n++
			}
			it.Close()
			if n != len(newest) {
				t.Errorf("%d of %d keys %q", n, len(newest), prefix)
			}
		}
		for id, version := range newest {
			item, err := txn.Get(keyOf(chunkPrefix, id))
			if err != nil {
				return err
			}
			if item.Version() != version || placeOf(item) != (place{1, 5100, uint32(version)}) {
				t.Fatalf("version %d lies at %+v, want version %d", item.Version(), placeOf(item), version)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A disk that gives next to nothing is not taken for one that holds nothing.
func TestADiskThatGivesNothingIsNotTakenForAnEmptyOne(t *testing.T) {
	for _, c := range []struct {
		bad  int64
		sure bool
	}{{60, false}, {40, true}} {
		b := &builder{total: 100, bad: c.bad}
		if err := b.enough(); (err == nil) != c.sure {
			t.Errorf("%d of 100 bytes are not to be had: %v", c.bad, err)
		}
	}
}

// Killed between the flush of a memtable and its place on the list, Badger makes the
// table again from the memtable's log: no reason to walk all chunks.
func TestATreeIsNotMadeAnewForAFlushThatWasCutShort(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	dir := t.TempDir()
	v := open1(t, dir, noFloor)
	held := map[chunk.ID][]byte{}
	for range 20 {
		id, data := someChunk(rng, 1+rng.IntN(5000))
		mustPut(t, v, id, data)
		held[id] = data
	}
	logs, err := filesOf(filepath.Join(dir, chunksDir), ".mem")
	if err != nil || len(logs) == 0 {
		t.Fatal(logs, err)
	}
	before := map[string][]byte{}
	for _, path := range append(logs, filepath.Join(dir, chunksDir, badger.ManifestFilename)) {
		if before[path], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, v) // flushes
	for path, raw := range before {
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if tables, err := tablesIn(filepath.Join(dir, chunksDir)); err != nil || len(tables) == 0 {
		t.Fatal("no table was made", err)
	}
	opt := noFloor
	opt.hooks.rebuilding = func(step string) { t.Errorf("the tree is made anew: %s", step) }
	v = open1(t, dir, opt)
	for id, data := range held {
		mustHold(t, v, id, data)
	}
}

// What a killed process leaves is not damage: a tree made anew costs a walk of all chunks.
func TestATreeIsNotMadeAnewForAKill(t *testing.T) {
	dir := t.TempDir()
	for range 4 {
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
		for n := 60; n > 0 && lines.Scan(); n-- {
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
		}
		cmd.Wait()
		opt := smallLogs()
		opt.hooks.rebuilding = func(step string) { t.Errorf("the tree is made anew: %s", step) }
		v, err := Open(dir, opt)
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, v)
	}
	if tables, err := filesOf(filepath.Join(dir, chunksDir), ".sst"); err != nil || !strings.HasSuffix(strings.Join(tables, " "), ".sst") {
		t.Fatalf("the test made no table: %v", err)
	}
}
