package store

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// A disk that hangs in every call holds up nobody who can do without it, and who
// cannot is told so in a bounded time.
func TestAHungVolumeHoldsUpNoOther(t *testing.T) {
	rng := random(t)
	wait := &hasty{least: 50 * time.Millisecond}
	release := make(chan struct{})
	stuck := func() {
		if wait.hangs.Load() {
			<-release
		}
	}
	opt := noFloor
	opt.Capacity = 100 << 20
	opt.hooks.patience = wait.patience
	opt.hooks.statfs = func(dir string, st *unix.Statfs_t) error { stuck(); return unix.Statfs(dir, st) }
	opt.hooks.fdatasync = func(f *os.File) error { stuck(); return fdatasync(f) }
	opt.hooks.reading = stuck
	bad := open1(t, t.TempDir(), opt)
	patient := noFloor
	patient.Capacity = 50 << 20
	good := open1(t, t.TempDir(), patient)
	var once sync.Once
	free := func() { once.Do(func() { close(release) }) }
	t.Cleanup(free)
	s := NewSet(bad, good)
	onBad, badData := someChunk(rng, 50_000)
	onBoth, bothData := someChunk(rng, 50_000)
	onGood, goodData := someChunk(rng, 50_000)
	mustPut(t, bad, onBad, badData)
	mustPut(t, bad, onBoth, bothData)
	mustPut(t, good, onBoth, bothData)
	mustPut(t, good, onGood, goodData)

	wait.hangs.Store(true)
	for range 2 { // the first time it is found out
		if got, err := s.Get(t.Context(), onBoth); err != nil || chunk.Sum(got) != onBoth {
			t.Fatalf("what lies on a good disk too: %v", err)
		}
		if _, _, err := s.Confirm(t.Context(), onGood); err != nil {
			t.Fatal(err)
		}
		id, data := someChunk(rng, 50_000)
		if where, err := s.Put(t.Context(), id, data); err != nil || where != good.ID() {
			t.Fatalf("put on %s: %v", where, err)
		}
		if !s.Has(onGood) || s.CanTake(1000) != nil {
			t.Fatal("what the good disk has, or takes, is denied")
		}
		stats := s.Stats()
		if stats[0].ReadOnly == "" || stats[0].Free != 0 || stats[1].ReadOnly != "" {
			t.Fatalf("%+v", stats)
		}
		listed := 0
		s.List(t.Context(), func(chunk.ID, int64, bool) error { listed++; return nil })
		if listed < 2 {
			t.Fatalf("%d chunks are listed", listed)
		}
		_, err := s.Get(t.Context(), onBad)
		mustFail(t, err, wire.CodeUnreachable)
		mustFail(t, bad.Put(t.Context(), id, data), wire.CodeUnreachable)
	}
	if len(s.Lost()) != 0 {
		t.Fatal("what hangs is called lost")
	}
	wait.hangs.Store(false)
	free()
	eventually(t, "the disk answers again", func() bool { return bad.hangs.Load() == 0 })
	if got, err := s.Get(t.Context(), onBad); err != nil || chunk.Sum(got) != onBad {
		t.Fatal(err)
	}
	id, data := someChunk(rng, 50_000)
	if where, err := s.Put(t.Context(), id, data); err != nil || where != bad.ID() {
		t.Fatalf("put on %s: %v", where, err)
	}
}

// mounted is a volume on a file system of its own, and where that is mounted.
func mounted(t *testing.T) (dir, store string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128m"); err != nil {
		testenv.Cannot(t, "no file system of our own here: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir, filepath.Join(dir, "store")
}

func TestAVolumeRemountedReadOnlyLatches(t *testing.T) {
	rng := random(t)
	dir, store := mounted(t)
	v := open1(t, store, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	mustClose(t, v)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(store, smallSegments()); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Fatalf("opened where nothing can be written: %v", err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	v = open1(t, store, smallSegments())
	mustHold(t, v, id, data)
}

// The directory goes away under an open volume: what is written then would be out
// of reach of the next start, so there is no receipt for it.
func TestAVolumeThatVanishesGivesNoReceipt(t *testing.T) {
	rng, dir := random(t), filepath.Join(t.TempDir(), "volume")
	v := open1(t, dir, noFloor)
	other := open1(t, t.TempDir(), Options{FloorBytes: -1, Capacity: 50 << 20})
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	away := dir + ".away"
	if err := os.Rename(dir, away); err != nil {
		t.Fatal(err)
	}
	next, nextData := someChunk(rng, 50_000)
	mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
	if where, err := NewSet(v, other).Put(t.Context(), next, nextData); err != nil || where != other.ID() {
		t.Fatalf("put on %s: %v", where, err)
	}
	v.Close()
	if _, err := Open(dir, Options{FloorBytes: -1, ID: v.ID()}); err == nil || !strings.Contains(err.Error(), "is its disk mounted?") {
		t.Fatalf("got %v", err)
	}
}

// Another volume is mounted over, or moved into the place of, an open one.
func TestAVolumeSwappedUnderWayGivesNoReceipt(t *testing.T) {
	rng, base := random(t), t.TempDir()
	a, b := filepath.Join(base, "a"), filepath.Join(base, "b")
	mustClose(t, open1(t, b, noFloor))
	v := open1(t, a, noFloor)
	if err := os.Rename(a, a+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(b, a); err != nil {
		t.Fatal(err)
	}
	id, data := someChunk(rng, 50_000)
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeReadOnly)
	if _, err := os.Stat(filepath.Join(a, syncFailedFile)); !os.IsNotExist(err) {
		t.Fatalf("the other volume was marked as broken: %v", err)
	}
}

func TestATruncatedLogLosesOnlyWhatWasCut(t *testing.T) {
	for _, which := range []string{"old", "newest"} {
		t.Run(which, func(t *testing.T) {
			rng, dir := random(t), t.TempDir()
			opt := Options{FloorBytes: -1, SegmentBytes: 220_000} // four chunks
			v := open1(t, dir, opt)
			held := map[chunk.ID][]byte{}
			var ids []chunk.ID
			put := func() {
				for range 4 {
					id, data := someChunk(rng, 50_000)
					mustPut(t, v, id, data)
					held[id] = data
					ids = append(ids, id)
				}
			}
			put()
			if which == "old" {
				put()
			}
			cut := whereIs(t, v, ids[2])
			mustClose(t, v)
			if err := os.Truncate(segmentPath(v, cut.segment), int64(cut.at)+rng.Int64N(cut.length())); err != nil {
				t.Fatal(err)
			}
			v = open1(t, dir, opt)
			checked, err := v.Check(t.Context())
			if err != nil || len(checked.Lost) != 2 || checked.Chunks != len(ids) {
				t.Fatalf("%+v, %v", checked, err)
			}
			for i, id := range ids {
				if i == 2 || i == 3 {
					_, err := v.Get(t.Context(), id)
					mustFail(t, err, wire.CodeLost)
					mustPut(t, v, id, held[id])
				}
				mustHold(t, v, id, held[id])
			}
		})
	}
}
