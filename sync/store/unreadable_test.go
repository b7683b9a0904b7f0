package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// TestWhatSaysNothingOfTheBytesIsNoLoss: a chunk that the machine has no means to read,
// or whose disk has left the bus, is neither lost nor proved.
func TestWhatSaysNothingOfTheBytesIsNoLoss(t *testing.T) {
	rng := random(t)
	id, data := someChunk(rng, 100_000)
	other, otherData := someChunk(rng, 100_000)
	everywhere := func(int64) bool { return true }
	place := func(at int64) bool { return at > probeBytes }
	for name, tc := range map[string]struct {
		err     unix.Errno
		fails   func(at int64) bool
		code    string
		latched bool
	}{
		"no descriptors":               {unix.EMFILE, everywhere, wire.CodeUnreachable, false},
		"no memory":                    {unix.ENOMEM, place, wire.CodeUnreachable, false},
		"the disk has left":            {unix.EIO, everywhere, wire.CodeUnreachable, true},
		"its device is gone":           {unix.ENODEV, everywhere, wire.CodeUnreachable, false},
		"a bad sector":                 {unix.EIO, place, wire.CodeLost, false},
		"a bad sector, said otherwise": {unix.ENODATA, place, wire.CodeLost, false},
	} {
		t.Run(name, func(t *testing.T) {
			var failing atomic.Bool
			opt := noFloor
			opt.hooks.pread = func(fd int, into []byte, at int64) (int, error) {
				if failing.Load() && tc.fails(at) {
					return -1, tc.err
				}
				return unix.Pread(fd, into, at)
			}
			v := open1(t, t.TempDir(), opt)
			mustPut(t, v, other, otherData) // so that the chunk is not where every log begins
			mustPut(t, v, id, data)
			failing.Store(true)
			_, err := v.Get(t.Context(), id)
			mustFail(t, err, tc.code)
			if s := v.Stats(); (s.Lost > 0) != (tc.code == wire.CodeLost) || (s.ReadOnly != "") != tc.latched {
				t.Errorf("%d lost, read-only %q", s.Lost, s.ReadOnly)
			}
			failing.Store(false)
			mustHold(t, v, id, data)
			if s := v.Stats(); s.Lost != 0 {
				t.Errorf("%d are lost that were read", s.Lost)
			}
		})
	}
}

// TestWithoutDescriptorsNothingIsLost, in the real case.
func TestWithoutDescriptorsNothingIsLost(t *testing.T) {
	v := open1(t, t.TempDir(), noFloor)
	id, data := someChunk(random(t), 100_000)
	mustPut(t, v, id, data)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	_, err := v.Get(t.Context(), id)
	if back := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); back != nil {
		t.Fatal(back)
	}
	mustFail(t, err, wire.CodeUnreachable)
	mustHold(t, v, id, data)
}

// TestRootDropsWhereItAloneHasRoom: a file system that is full for all others keeps
// some room back for root; and the ballast is given up only where that is enough.
func TestRootDropsWhereItAloneHasRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root has the room that a file system keeps back")
	}
	var st atomic.Pointer[unix.Statfs_t]
	st.Store(&unix.Statfs_t{Bsize: 4096, Blocks: 1 << 21, Bavail: 1 << 20, Bfree: 1 << 20})
	opt := Options{}
	opt.hooks.statfs = func(_ string, into *unix.Statfs_t) error { *into = *st.Load(); return nil }
	v := open1(t, t.TempDir(), opt)
	id, data := someChunk(random(t), 1000)
	mustPut(t, v, id, data)
	st.Store(&unix.Statfs_t{Bsize: 4096, Blocks: 1 << 21, Bfree: 1 << 12})
	if err := v.CanTake(1000); err == nil {
		t.Error("a chunk is taken into the room that is kept back")
	}
	if err := v.Drop(t.Context(), []chunk.ID{id}); err != nil {
		t.Errorf("nothing can be dropped: %v", err)
	}
	ballast := filepath.Join(v.Dir(), ballastFile)
	if err := os.Truncate(ballast, 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	st.Store(&unix.Statfs_t{Bsize: 4096, Blocks: 1 << 21})
	if err := makeRoom(v.Dir(), v.opt.hooks); err == nil || !strings.Contains(err.Error(), "is full") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(ballast); err != nil {
		t.Errorf("the ballast was given up in vain: %v", err)
	}
	st.Store(&unix.Statfs_t{Bsize: 4096, Blocks: 1 << 21, Bavail: 1 << 20, Bfree: 1 << 20})
}

// TestWhatCannotBeReadGetsNoReceipt: that a chunk is in the index is no proof that it is whole.
func TestWhatCannotBeReadGetsNoReceipt(t *testing.T) {
	var failing atomic.Bool
	opt := noFloor
	opt.hooks.pread = func(fd int, into []byte, at int64) (int, error) {
		if failing.Load() {
			return -1, unix.ENOMEM
		}
		return unix.Pread(fd, into, at)
	}
	v := open1(t, t.TempDir(), opt)
	id, data := someChunk(random(t), 100_000)
	mustPut(t, v, id, data)
	failing.Store(true)
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeUnreachable)
	_, err := v.Confirm(t.Context(), id)
	mustFail(t, err, wire.CodeUnreachable)
	// Another disk takes it.
	other := open1(t, t.TempDir(), noFloor)
	if where, err := NewSet(v, other).Put(t.Context(), id, data); err != nil || where != other.ID() {
		t.Errorf("put on %q: %v", where, err)
	}
	failing.Store(false)
	mustPut(t, v, id, data)
}

// TestACopyThatCannotBeReadIsNoLoss, whatever the order of the disks is: one has lost the
// chunk, and the other may have it whole.
func TestACopyThatCannotBeReadIsNoLoss(t *testing.T) {
	rng := random(t)
	var failing atomic.Bool
	opt := noFloor
	opt.hooks.pread = func(fd int, into []byte, at int64) (int, error) {
		if failing.Load() {
			return -1, unix.ENOMEM
		}
		return unix.Pread(fd, into, at)
	}
	dir := t.TempDir()
	lost, passing := open1(t, dir, noFloor), open1(t, t.TempDir(), opt)
	id, data := someChunk(rng, 100_000)
	mustPut(t, lost, id, data)
	mustPut(t, passing, id, data)
	flip(t, dir, data, 7)
	for _, s := range []*Set{NewSet(lost, passing), NewSet(passing, lost)} {
		failing.Store(true)
		_, err := s.Get(t.Context(), id)
		mustFail(t, err, wire.CodeUnreachable)
		failing.Store(false)
		if _, err := s.Get(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if err := NewSet(lost, passing).DropLost(t.Context(), []chunk.ID{id}); err != nil {
		t.Fatal(err)
	}
	mustHold(t, passing, id, data)
	if _, err := lost.Get(t.Context(), id); wire.ProblemOf(err).Code != wire.CodeNotFound {
		t.Errorf("what is lost on one disk and whole on the other was not dropped: %v", err)
	}
}

// TestALossThatIsPutAgainWhileItIsDroppedStays: it has a receipt.
func TestALossThatIsPutAgainWhileItIsDroppedStays(t *testing.T) {
	dir, opt := t.TempDir(), noFloor
	var v *Volume
	id, data := someChunk(random(t), 100_000)
	again := true
	opt.hooks.dropping = func() {
		if again {
			mustPut(t, v, id, data)
		}
	}
	v = open1(t, dir, opt)
	mustPut(t, v, id, data)
	lose := func() {
		t.Helper()
		flip(t, dir, data, 7)
		_, err := v.Get(t.Context(), id)
		mustFail(t, err, wire.CodeLost)
	}
	lose()
	if err := v.DropLost(t.Context(), []chunk.ID{id}); err != nil {
		t.Fatal(err)
	}
	mustHold(t, v, id, data)
	if again = false; v.Stats().Chunks != 1 {
		t.Errorf("%+v", v.Stats())
	}
}
