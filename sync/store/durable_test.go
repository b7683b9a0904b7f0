package store

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// witness sees what is synced, and lets it fail if asked to.
type witness struct {
	mu    sync.Mutex // guards the rest
	names []string
	fails func(name string) bool
}

func (w *witness) see(path string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	name := filepath.Base(path)
	w.names = append(w.names, name)
	if w.fails != nil && w.fails(name) {
		return unix.EIO
	}
	return nil
}

// hooked are options whose syncs w sees.
func (w *witness) hooked(opt Options) Options {
	opt.hooks.fdatasync = func(f *os.File) error {
		if err := w.see(f.Name()); err != nil {
			return err
		}
		return fdatasync(f)
	}
	opt.hooks.fsync = func(path string) error {
		if err := w.see(path); err != nil {
			return err
		}
		return durable.Sync(path)
	}
	return opt
}

// synced returns what was synced since the last call, sorted.
func (w *witness) synced() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	names := w.names
	w.names = nil
	slices.Sort(names)
	return names
}

// A put needs one sync, and with a new segment that of the one before and of the directory.
func TestAPutNeedsOneSync(t *testing.T) {
	rng, w := random(t), &witness{}
	v := open1(t, t.TempDir(), w.hooked(smallSegments()))
	put := func(size int, want ...string) {
		t.Helper()
		id, data := someChunk(rng, size)
		mustPut(t, v, id, data)
		if got := w.synced(); !slices.Equal(got, want) {
			t.Fatalf("synced %v, want %v", got, want)
		}
	}
	w.synced()
	put(50_000, segmentName(1))
	put(500_000, segmentName(1))
	put(500_000, segmentName(1), segmentName(2), chunksDir)
	put(1, segmentName(2))
}

// Each of the syncs that a receipt needs can fail, and then there is none.
func TestNoReceiptIfAnyOfTheSyncsFails(t *testing.T) {
	for _, which := range []string{segmentName(1), segmentName(2), chunksDir} {
		t.Run(which, func(t *testing.T) {
			rng, w := random(t), &witness{}
			v := open1(t, t.TempDir(), w.hooked(smallSegments()))
			id, data := someChunk(rng, 600_000)
			mustPut(t, v, id, data)
			fails := func(is func(string) bool) {
				w.mu.Lock()
				w.fails = is
				w.mu.Unlock()
			}
			fails(func(name string) bool { return name == which })
			next, nextData := someChunk(rng, 600_000)
			mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
			fails(nil)
			mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
			if _, err := v.Confirm(t.Context(), id); err != nil {
				t.Fatalf("what was durable before: %v", err)
			}
		})
	}
}

// A disk that has no room for a batch, though there seemed to be, keeps nothing of it and
// goes on when there is room again.
func TestABatchThatTheDiskHasNoRoomForIsTakenBack(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	var full atomic.Bool
	opt := smallSegments()
	opt.hooks.pwritev = func(fd int, from [][]byte, at int64) (int, error) {
		if full.Load() && len(from) > 1 {
			return unix.Pwritev(fd, from[:1], at) // the head has room still
		}
		if full.Load() {
			return -1, unix.ENOSPC
		}
		return unix.Pwritev(fd, from, at)
	}
	v := open1(t, dir, opt)
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	before := v.Stats()
	full.Store(true)
	next, nextData := someChunk(rng, 50_000)
	mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeNoSpace)
	_, err := v.Get(t.Context(), next)
	mustFail(t, err, wire.CodeNotFound)
	if s := v.Stats(); s.Used != before.Used || s.Dead != before.Dead || s.Chunks != 1 || s.ReadOnly != "" {
		t.Fatalf("%+v before, %+v after", before, s)
	}
	full.Store(false)
	mustPut(t, v, next, nextData)
	dir = killed(t, dir)
	v = open1(t, dir, smallSegments())
	mustHold(t, v, id, data)
	mustHold(t, v, next, nextData)
	if s := v.Stats(); s.Dead != 0 || s.Chunks != 2 {
		t.Fatalf("%+v", s)
	}
}

// Of such a batch the first part was written already: nobody finds that either.
func TestABatchIsTakenBackAsAWhole(t *testing.T) {
	rng := random(t)
	full := false
	opt := smallSegments()
	opt.hooks.pwritev = func(fd int, from [][]byte, at int64) (int, error) {
		if full && len(from) > 2 { // with what comes after the drop
			return -1, unix.ENOSPC
		}
		return unix.Pwritev(fd, from, at)
	}
	v := open1(t, t.TempDir(), opt)
	kept, keptData := someChunk(rng, 50_000)
	mustPut(t, v, kept, keptData)
	before := v.Stats()
	full = true
	var all []*request
	for range 2 {
		id, data := someChunk(rng, 50_000)
		all = append(all, putOf(id, data), dropOf(kept))
	}
	answers := together(t, v, all...)
	for i, r := range all {
		if r.data != nil {
			mustFail(t, answers[i], wire.CodeNoSpace)
			_, err := v.Get(t.Context(), r.id)
			mustFail(t, err, wire.CodeNotFound)
		}
	}
	mustHold(t, v, kept, keptData)
	if s := v.Stats(); s.Used != before.Used || s.Dead != before.Dead || s.Chunks != 1 || s.Lost != 0 || s.ReadOnly != "" {
		t.Fatalf("%+v before, %+v after", before, s)
	}
}

// A checkpoint is durable when the log of the memtable is, and its name in the directory.
func TestACheckpointSyncsTheIndexAndItsDirectory(t *testing.T) {
	w, opt := &witness{}, noFloor
	opt.hooks.syncIndex = func(db *badger.DB) error { return errors.Join(w.see("log"), db.Sync()) }
	v := open1(t, t.TempDir(), w.hooked(opt))
	id, data := someChunk(random(t), 50_000)
	mustPut(t, v, id, data)
	w.synced()
	if err := v.hand(t.Context(), &request{flush: true}); err != nil {
		t.Fatal(err)
	}
	if got, want := w.synced(), []string{indexDir, "log"}; !slices.Equal(got, want) {
		t.Fatalf("synced %v, want %v", got, want)
	}
}

// Who only asks does not put a checkpoint off: what rots before it is not missed.
func TestAskingDoesNotPutOffTheCheckpoint(t *testing.T) {
	opt := noFloor
	opt.hooks.checkpoint = 2 * time.Second
	v := open1(t, t.TempDir(), opt)
	id, data := someChunk(random(t), 50_000)
	mustPut(t, v, id, data)
	eventually(t, "there is a checkpoint", func() bool { // asks each 5 ms
		if _, err := v.Confirm(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		return v.index.changes() == 0
	})
}

// The index is written beside the puts. If that fails, what is on disk of it is not known any
// more: it is made anew at the next start, for which the machine need not boot.
func TestACheckpointThatFailsLatches(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	var fails atomic.Bool
	opt := smallSegments()
	opt.hooks.syncIndex = func(db *badger.DB) error {
		if fails.Load() {
			return unix.EIO
		}
		return db.Sync()
	}
	v := open1(t, dir, opt)
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	fails.Store(true)
	if err := v.hand(t.Context(), &request{flush: true}); err == nil {
		t.Fatal("it has not failed")
	}
	next, nextData := someChunk(rng, 50_000)
	mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
	mustHold(t, v, id, data)
	mustClose(t, v)
	var out bytes.Buffer
	opt = smallSegments()
	opt.Log = slog.New(slog.NewTextHandler(&out, nil))
	v = open1(t, dir, opt)
	if !strings.Contains(out.String(), "made anew") {
		t.Fatal(out.String())
	}
	mustHold(t, v, id, data)
	mustPut(t, v, next, nextData)
}

// What a killed process has written may be in the kernel's memory alone. It counts only
// when it is durable.
func TestWhatAKillHasLeftIsSynced(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	for _, name := range []string{segmentName(1), chunksDir} {
		dir, w := killed(t, dir), &witness{}
		mustClose(t, open1(t, dir, w.hooked(smallSegments())))
		if got := w.synced(); !slices.Contains(got, name) {
			t.Fatalf("only %v was synced", got)
		}
		dir = killed(t, dir)
		w.fails = func(n string) bool { return n == name }
		v := open1(t, dir, w.hooked(smallSegments()))
		_, err := v.Confirm(t.Context(), id)
		mustFail(t, err, wire.CodeReadOnly)
		mustHold(t, v, id, data)
	}
}

// A sync that fails for want of room, once, is a failed sync: that the next one succeeds says nothing.
func TestASyncThatHadNoRoomOnceLatches(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	var fails atomic.Bool
	opt := smallSegments()
	opt.hooks.fdatasync = func(f *os.File) error {
		if fails.CompareAndSwap(true, false) {
			return unix.ENOSPC
		}
		return fdatasync(f)
	}
	v := open1(t, dir, opt)
	id, data := someChunk(rng, 50_000)
	fails.Store(true)
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeReadOnly)
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeReadOnly)
}

// What could not be read is written over, and that cannot be synced: until the machine boots
// again nobody knows what is on disk.
func TestAWriteOverThatIsNotSyncedIsRemembered(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	next, nextData := someChunk(rng, 50_000)
	mustPut(t, v, next, nextData)
	at := int64(whereIs(t, v, next).at)
	dir = killed(t, dir)
	var bad atomic.Int64
	bad.Store(at + recordHead + 20_000)
	mustClose(t, open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "one")))
	w := &witness{fails: func(n string) bool { return n == segmentName(1) }}
	mustClose(t, open1(t, dir, bootedAs(badSector(w.hooked(smallSegments()), &bad), "two")))
	bad.Store(-1)
	v = open1(t, dir, bootedAs(smallSegments(), "two"))
	_, err := v.Confirm(t.Context(), id)
	mustFail(t, err, wire.CodeReadOnly)
}
