package store

import (
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

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
