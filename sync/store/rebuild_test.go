package store

import (
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dgraph-io/badger/v4"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// past is a volume that was used: over several segments, of which some were emptied.
type past struct {
	dir     string
	held    map[chunk.ID][]byte
	dropped []chunk.ID
}

// live has things happen to a volume, by chance.
func (p *past) live(t testing.TB, rng *rand.Rand, v *Volume, changes int) {
	t.Helper()
	ids := slices.SortedFunc(maps.Keys(p.held), compareIDs)
	for range changes {
		if rng.IntN(3) > 0 || len(ids) == 0 {
			id, data := someChunk(rng, shortest+rng.IntN(60_000))
			if rng.IntN(8) == 0 && len(p.dropped) > 0 { // put again
				continue
			}
			mustPut(t, v, id, data)
			p.held[id] = data
			ids = append(ids, id)
			continue
		}
		i := rng.IntN(len(ids))
		id, data := ids[i], p.held[ids[i]]
		if err := v.Drop(t.Context(), []chunk.ID{id}); err != nil {
			t.Fatal(err)
		}
		if rng.IntN(5) == 0 { // put again
			mustPut(t, v, id, data)
			continue
		}
		ids = slices.Delete(ids, i, i+1)
		delete(p.held, id)
		p.dropped = append(p.dropped, id)
	}
}

func newPast(t testing.TB, rng *rand.Rand) *past {
	t.Helper()
	p := &past{dir: t.TempDir(), held: map[chunk.ID][]byte{}}
	v := open1(t, p.dir, smallSegments())
	for range 3 {
		p.live(t, rng, v, 120)
		if rng.IntN(2) == 0 {
			idle(t, v)
		}
	}
	mustClose(t, v)
	return p
}

// mustBe opens the volume: it has all that is held, whole, and nothing else, and takes more.
func (p *past) mustBe(t testing.TB, rng *rand.Rand) {
	t.Helper()
	v := open1(t, p.dir, smallSegments())
	p.mustBeIn(t, v)
	id, data := someChunk(rng, 20_000)
	mustPut(t, v, id, data)
	p.held[id] = data
	mustClose(t, v)
	v = open1(t, p.dir, smallSegments())
	p.mustBeIn(t, v)
	mustClose(t, v)
}

func (p *past) mustBeIn(t testing.TB, v *Volume) {
	t.Helper()
	var used int64
	for id, data := range p.held {
		mustHold(t, v, id, data)
		used += int64(len(data))
	}
	for _, id := range p.dropped {
		if _, held := p.held[id]; held {
			continue
		}
		_, err := v.Get(t.Context(), id)
		mustFail(t, err, wire.CodeNotFound)
	}
	if s := v.Stats(); s.Chunks != len(p.held) || s.Used != used || s.Lost != 0 || s.ReadOnly != "" {
		t.Fatalf("%+v, want %d chunks of %d bytes", s, len(p.held), used)
	}
}

// indexFiles are those of the index.
func (p *past) indexFiles(t testing.TB, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(p.dir, chunksDir, indexDir, pattern))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no %s in the index: %v", pattern, err)
	}
	return paths
}

// Whatever becomes of the index, all that was promised is there, and what was dropped is
// not.
func TestADamagedIndexIsMadeAnewOfTheSegments(t *testing.T) {
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	someByte := func(t *testing.T, rng *rand.Rand, path string) {
		info, err := os.Stat(path)
		must(t, err)
		raw, err := os.ReadFile(path)
		must(t, err)
		at := rng.Int64N(info.Size())
		overwrite(t, path, at, raw[at]^byte(1+rng.IntN(255)))
	}
	for name, damage := range map[string]func(t *testing.T, rng *rand.Rand, p *past){
		"gone": func(t *testing.T, _ *rand.Rand, p *past) {
			must(t, os.RemoveAll(filepath.Join(p.dir, chunksDir, indexDir)))
		},
		"its list is gone": func(t *testing.T, _ *rand.Rand, p *past) { must(t, os.Remove(p.indexFiles(t, "MANIFEST")[0])) },
		"its list is cut": func(t *testing.T, rng *rand.Rand, p *past) {
			path := p.indexFiles(t, "MANIFEST")[0]
			info, err := os.Stat(path)
			must(t, err)
			must(t, os.Truncate(path, rng.Int64N(info.Size())))
		},
		"its list cannot be read": func(t *testing.T, _ *rand.Rand, p *past) {
			path := p.indexFiles(t, "MANIFEST")[0]
			must(t, errors.Join(os.Remove(path), os.Symlink("/proc/self/mem", path))) // nothing is mapped at 0: EIO
		},
		"a table is gone":    func(t *testing.T, _ *rand.Rand, p *past) { must(t, os.Remove(p.indexFiles(t, "*.sst")[0])) },
		"a table is empty":   func(t *testing.T, _ *rand.Rand, p *past) { must(t, os.Truncate(p.indexFiles(t, "*.sst")[0], 0)) },
		"a byte of a table":  func(t *testing.T, rng *rand.Rand, p *past) { someByte(t, rng, p.indexFiles(t, "*.sst")[0]) },
		"a byte of its list": func(t *testing.T, rng *rand.Rand, p *past) { someByte(t, rng, p.indexFiles(t, "MANIFEST")[0]) },
		"an entry is missing": func(t *testing.T, rng *rand.Rand, p *past) {
			p.inIndex(t, func(txn *badger.Txn, key []byte) error { return txn.Delete(key) })
		},
		"an entry lacks a change": func(t *testing.T, rng *rand.Rand, p *past) {
			p.inIndex(t, func(txn *badger.Txn, key []byte) error {
				item, err := txn.Get(key)
				must(t, err)
				at, err := placeOf(item)
				must(t, err)
				at.segment++
				return txn.Set(key, at.encode())
			})
		},
		"its position is gone": func(t *testing.T, rng *rand.Rand, p *past) {
			p.inIndex(t, func(txn *badger.Txn, _ []byte) error { return txn.Delete(keyOfPosition) })
		},
		"gone, with a table of contents": func(t *testing.T, rng *rand.Rand, p *past) {
			must(t, os.RemoveAll(filepath.Join(p.dir, chunksDir, indexDir)))
			path := segmentPaths(t, p.dir)[0]
			raw, err := os.ReadFile(path)
			must(t, err)
			at := len(raw) - 1 - rng.IntN(segmentFoot)
			overwrite(t, path, int64(at), raw[at]^0x55)
		},
		"gone, with the head of a segment": func(t *testing.T, rng *rand.Rand, p *past) {
			must(t, os.RemoveAll(filepath.Join(p.dir, chunksDir, indexDir)))
			someByte(t, rng, segmentPaths(t, p.dir)[0]) // see below
		},
	} {
		t.Run(name, func(t *testing.T) {
			rng := random(t)
			p := newPast(t, rng)
			if name == "gone, with the head of a segment" {
				must(t, os.RemoveAll(filepath.Join(p.dir, chunksDir, indexDir)))
				overwrite(t, segmentPaths(t, p.dir)[0], rng.Int64N(8), 0)
			} else {
				damage(t, rng, p)
			}
			p.mustBe(t, rng)
		})
	}
}

// inIndex changes the index of a volume that is closed, with the first of its keys.
func (p *past) inIndex(t testing.TB, fn func(txn *badger.Txn, key []byte) error) {
	t.Helper()
	db, err := badger.Open(tuning(filepath.Join(p.dir, chunksDir, indexDir), badgerLog{}).WithLogger(nil))
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(txn *badger.Txn) error {
		opt := badger.DefaultIteratorOptions
		opt.Prefix = []byte{indexPrefix}
		it := txn.NewIterator(opt)
		it.Rewind()
		key := it.Item().KeyCopy(nil)
		it.Close()
		return fn(txn, key)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// One damaged record hides no other, without the index and without a table of contents.
func TestOneDamagedRecordCostsOneChunk(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	var ids []chunk.ID
	var datas [][]byte
	for range 12 {
		id, data := someChunk(rng, shortest+rng.IntN(200_000))
		mustPut(t, v, id, data)
		ids, datas = append(ids, id), append(datas, data)
	}
	bad := rng.IntN(11)
	at := whereIs(t, v, ids[bad])
	mustClose(t, v)
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	head := rng.Int64N(recordHead)
	was := mustRead(t, segmentPaths(t, dir)[0])[int64(at.at)+head]
	overwrite(t, segmentPaths(t, dir)[0], int64(at.at)+head, was^0x77)
	v = open1(t, dir, noFloor)
	for i, id := range ids {
		if i != bad {
			mustHold(t, v, id, datas[i])
		}
	}
	if s := v.Stats(); s.Chunks < 11 || s.Lost != 0 {
		t.Fatalf("%+v", s)
	}
}

// Who has chunks stored could put records into them, of whatever he knows. They are met
// when the head of the chunk's own record is damaged, and do no harm.
func TestForgedRecordsInAChunkDoNoHarm(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	victim, victimData := someChunk(rng, 30_000)
	mustPut(t, v, victim, victimData)
	at := whereIs(t, v, victim)
	var forged []byte
	for _, m := range []mark{{}, mark([]byte(segmentMagic)), mark([]byte(v.id[:8]))} {
		drop := record{kind: kindDrop, id: victim, target: at.spot, seq: 1 << 40, durable: 1 << 40}
		forged = drop.appendHead(forged, m)
	}
	carrier := chunk.Sum(forged)
	mustPut(t, v, carrier, forged)
	place := whereIs(t, v, carrier)
	mustClose(t, v)
	overwrite(t, segmentPaths(t, dir)[0], int64(place.at), v.log.from.mark[0]^1)
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	mustHold(t, open1(t, dir, noFloor), victim, victimData)
}

// What the index said was here, and is in no segment any more, is told as lost.
func TestASegmentThatIsGoneIsToldAsLost(t *testing.T) {
	rng := random(t)
	p := newPast(t, rng)
	v := open1(t, p.dir, smallSegments())
	idle(t, v) // it may have been closed while a segment was being emptied
	still(t, v)
	var gone []chunk.ID
	first := segmentPaths(t, p.dir)[0]
	for id := range p.held {
		if segmentPath(v, whereIs(t, v, id).segment) == first {
			gone = append(gone, id)
		}
	}
	mustClose(t, v)
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	v = open1(t, p.dir, smallSegments())
	if got := lostIDs(v); len(gone) == 0 || !sameIDs(got, gone) {
		t.Fatalf("known to be lost before anyone asked: %v, want %v", got, gone)
	}
	for _, id := range gone {
		_, err := v.Get(t.Context(), id)
		mustFail(t, err, wire.CodeLost)
		mustPut(t, v, id, p.held[id])
	}
	p.mustBeIn(t, v)
}

// Killed at any moment: what was put since the last checkpoint is in the segments.
func TestAKilledVolumeKnowsWhatIsInNoCheckpoint(t *testing.T) {
	rng := random(t)
	p := &past{dir: t.TempDir(), held: map[chunk.ID][]byte{}}
	v := open1(t, p.dir, smallSegments())
	open := p.dir
	for range 4 {
		p.live(t, rng, v, 60)
		idle(t, v)
		still(t, v)
		p.dir = killed(t, open)
		p.mustBe(t, rng)
		p.held = maps.Clone(p.held)
		for id := range p.held {
			if !v.Has(id) {
				delete(p.held, id)
			}
		}
		mustClose(t, v)
		v = open1(t, open, smallSegments())
	}
}

// A volume in the form of the version before is refused, and not touched.
func TestTheOldFormIsRefused(t *testing.T) {
	dir := t.TempDir()
	chunks := filepath.Join(dir, chunksDir)
	if err := os.Mkdir(chunks, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{
		filepath.Join(dir, idFile): "01J0000000000000000000000A\n", filepath.Join(chunks, "MANIFEST"): "x",
		filepath.Join(chunks, "000001.vlog"): "x", filepath.Join(dir, "."+idFile+"123"): "half",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(dir, noFloor); err == nil || !strings.Contains(err.Error(), "drain the device with the version before, or erase the volume") {
		t.Fatalf("got %v", err)
	}
	var left []string
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error { left = append(left, path); return err })
	if err != nil || len(left) != 6 {
		t.Fatalf("%v: %v", left, err)
	}
}

// A disk that gives nothing is not taken for one that holds nothing.
func TestADiskThatGivesNothingIsNotTakenForAnEmptyOne(t *testing.T) {
	rng := random(t)
	p := newPast(t, rng)
	if err := os.RemoveAll(filepath.Join(p.dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	opt := smallSegments()
	opt.hooks.pread = func(int, []byte, int64) (int, error) { return -1, damaged[0] }
	if _, err := Open(p.dir, opt); err == nil || !strings.Contains(err.Error(), "can be read") {
		t.Fatalf("got %v", err)
	}
	p.mustBe(t, rng)
}
