package store

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

func TestFlippedByteIsLostAndNeverServed(t *testing.T) {
	for _, where := range []string{"while open", "closed", "killed"} {
		t.Run(where, func(t *testing.T) {
			rng, dir := random(t), t.TempDir()
			v := open1(t, dir, noFloor)
			reopen := func() { mustClose(t, v); v = open1(t, dir, noFloor) }
			var ids []chunk.ID
			var datas [][]byte
			for range 4 {
				id, data := someChunk(rng, 30_000)
				mustPut(t, v, id, data)
				ids, datas = append(ids, id), append(datas, data)
			}
			wantLost := []chunk.ID{ids[1]}
			switch where {
			case "while open":
				flip(t, dir, datas[1], rng.IntN(30_000))
			case "closed":
				mustClose(t, v)
				flip(t, dir, datas[1], rng.IntN(30_000))
				v = open1(t, dir, noFloor)
			case "killed":
				dir = killed(t, dir)
				flip(t, dir, datas[1], rng.IntN(30_000))
				v = open1(t, dir, noFloor)
				if got := lostIDs(v); !sameIDs(got, wantLost) {
					t.Fatalf("known to be lost before anyone asked: %v, want %v", got, wantLost)
				}
			}
			for i, id := range ids {
				if slices.Contains(wantLost, id) {
					_, err := v.Get(t.Context(), id)
					mustFail(t, err, wire.CodeLost)
					_, err = v.Tree(t.Context(), id)
					mustFail(t, err, wire.CodeLost)
					_, err = v.Confirm(t.Context(), id)
					mustFail(t, err, wire.CodeLost)
					if v.Has(id) {
						t.Fatal("a lost chunk is claimed")
					}
					continue
				}
				mustHold(t, v, id, datas[i])
			}
			if got := lostIDs(v); !sameIDs(got, wantLost) {
				t.Fatalf("listed as lost: %v, want %v", got, wantLost)
			}
			if s := v.Stats(); s.Lost != len(wantLost) || s.Chunks != 4 {
				t.Fatalf("%+v", s)
			}
			checked, err := v.Check(t.Context())
			if err != nil || checked.Chunks != 4 || len(checked.Lost) != len(wantLost) || checked.Bytes != int64(4-len(wantLost))*30_000 {
				t.Fatalf("check says %+v, %v", checked, err)
			}
			// Putting it again mends it, for good.
			for i, id := range ids {
				mustPut(t, v, id, datas[i])
			}
			reopen()
			for i, id := range ids {
				mustHold(t, v, id, datas[i])
			}
			if s := v.Stats(); s.Lost != 0 || s.Chunks != 4 || s.Used != 4*30_000 {
				t.Fatalf("after mending: %+v", s)
			}
		})
	}
}

// A record may be whole, with bytes that are not what belongs to the id.
func TestWrongBytesInAWholeRecordAreLost(t *testing.T) {
	rng := random(t)
	v := open1(t, t.TempDir(), noFloor)
	id, data := someChunk(rng, 30_000)
	_, other := someChunk(rng, 30_000)
	wrong := []entry{{record{kind: kindChunk, id: id, place: place{size: 30_000}}, other}}
	if err := v.log.add(wrong); err != nil { // the committer has nothing to do
		t.Fatal(err)
	}
	v.index.set(id, wrong[0].place)
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeLost)
	mustPut(t, v, id, data)
	mustHold(t, v, id, data)
}

func TestCheckFindsRotInOldLogs(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	id, data := someChunk(rng, 30_000)
	mustPut(t, v, id, data)
	flip(t, dir, data, 29_999)
	checked, err := v.Check(t.Context())
	if err != nil || len(checked.Lost) != 1 || checked.Lost[0].ID != id || checked.Lost[0].Size != 30_000 {
		t.Fatalf("%+v, %v", checked, err)
	}
}

func lostIDs(v *Volume) []chunk.ID {
	var ids []chunk.ID
	for _, l := range v.Lost() {
		ids = append(ids, l.ID)
	}
	return ids
}

func sameIDs(a, b []chunk.ID) bool {
	byID := func(x, y chunk.ID) int { return bytes.Compare(x[:], y[:]) }
	return slices.Equal(slices.SortedFunc(slices.Values(a), byID), slices.SortedFunc(slices.Values(b), byID))
}

// The bytes of a chunk are verified, so a damaged head of its record costs nothing.
func TestADamagedHeadOfARecordCostsNothing(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	id, data := someChunk(rng, 30_000)
	mustPut(t, v, id, data)
	at := whereIs(t, v, id)
	overwrite(t, segmentPaths(t, dir)[0], int64(at.at)+rng.Int64N(recordHead), 0x7f)
	mustHold(t, v, id, data)
	mustClose(t, v)
	v = open1(t, dir, noFloor)
	mustHold(t, v, id, data)
}

func TestLogCutUnderTheVolumeIsLostNotACrash(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	id, data := someChunk(rng, 300_000)
	mustPut(t, v, id, data)
	mustClose(t, v)
	v = open1(t, dir, noFloor)
	if err := os.Truncate(segmentPaths(t, dir)[0], 4096); err != nil {
		t.Fatal(err)
	}
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeLost)
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeReadOnly)
	mustClose(t, v)
	v = open1(t, dir, noFloor)
	if got := lostIDs(v); !sameIDs(got, []chunk.ID{id}) {
		t.Fatalf("known to be lost before anyone asked: %v", got)
	}
	mustPut(t, v, id, data)
	mustHold(t, v, id, data)
}

func TestADamagedHeadOfASegmentCostsNothing(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	id, data := someChunk(rng, 30_000)
	mustPut(t, v, id, data)
	mustClose(t, v)
	overwrite(t, segmentPaths(t, dir)[0], int64(rng.IntN(segmentHead)), 0x55)
	mustHold(t, open1(t, dir, noFloor), id, data)
}

// As a process leaves them that is killed while it makes the next one.
func TestLogsThatWereJustMadeCostNothing(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	id, data := someChunk(rng, 30_000)
	mustPut(t, v, id, data)
	mustClose(t, v)
	for _, name := range []string{segmentName(2), segmentName(900), "index/90000.mem"} {
		if err := os.WriteFile(filepath.Join(dir, chunksDir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		v := open1(t, dir, noFloor)
		mustHold(t, v, id, data)
		mustClose(t, v)
	}
}

func TestADamagedIndexIsMadeAnewNotACrash(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	id, data := someChunk(rng, 3000)
	mustPut(t, v, id, data)
	mustClose(t, v)
	tables, err := filepath.Glob(filepath.Join(dir, chunksDir, indexDir, "*.sst"))
	if err != nil || len(tables) == 0 {
		t.Fatal(tables, err)
	}
	whole, err := os.ReadFile(tables[0])
	if err != nil {
		t.Fatal(err)
	}
	for end := 60; end > 0; end-- { // where its parts are described
		at := len(whole) - end
		overwrite(t, tables[0], int64(at), whole[at]^byte(1<<rng.IntN(8)))
		v, err := Open(dir, noFloor)
		if err != nil {
			t.Fatalf("byte %d: %v", at, err)
		}
		mustHold(t, v, id, data)
		mustClose(t, v)
		if tables, err = filepath.Glob(filepath.Join(dir, chunksDir, indexDir, "*.sst")); err != nil || len(tables) == 0 {
			t.Fatal(tables, err)
		}
		if whole, err = os.ReadFile(tables[0]); err != nil {
			t.Fatal(err)
		}
	}
}

// Whatever byte rots while the volume is closed: it opens or says why not, and
// serves the right bytes or none.
func TestAnyFlippedByteServesRightBytesOrNone(t *testing.T) {
	rng := random(t)
	for range 6 {
		dir := t.TempDir()
		v := open1(t, dir, noFloor)
		held := map[chunk.ID][]byte{}
		for i := range 8 {
			id, data := someChunk(rng, shortest+rng.IntN(6000))
			held[id] = data
			mustPut(t, v, id, data)
			if i == 3 {
				mustClose(t, v)
				v = open1(t, dir, noFloor)
			}
		}
		mustClose(t, v)
		var files []string
		for _, pattern := range []string{"*.seg", "index/*.mem", "index/*.sst", "index/MANIFEST"} {
			found, err := filepath.Glob(filepath.Join(dir, chunksDir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, found...)
		}
		path := files[rng.IntN(len(files))]
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		at := rng.IntN(len(raw))
		t.Logf("byte %d of %s", at, filepath.Base(path))
		overwrite(t, path, int64(at), raw[at]^byte(1+rng.IntN(255)))
		v, err = Open(dir, noFloor)
		if err != nil {
			t.Logf("refused: %v", err)
			continue
		}
		for id, data := range held {
			got, err := v.Get(t.Context(), id)
			if err == nil && !bytes.Equal(got, data) {
				t.Fatal("wrong bytes were served")
			}
		}
		v.Close()
	}
}
