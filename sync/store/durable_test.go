package store

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

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

// newMemtable writes to the tree until it begins a new memtable, so often. The volume
// has nothing else to do meanwhile.
func newMemtable(t *testing.T, v *Volume, times int) {
	t.Helper()
	value := make([]byte, smallValue-1)
	for n, last := 0, newestMemtable(v.db)+uint32(times); newestMemtable(v.db) < last; n++ {
		err := v.db.Update(func(txn *badger.Txn) error {
			for i := range 500 {
				if err := txn.Set(fmt.Appendf(nil, "x%d %d", n, i), value); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Whatever Badger has written to since the last sync is synced: the logs that it
// writes to, those that it has left since, and the directory if there are new ones.
func TestEverythingThatWasWrittenIsSynced(t *testing.T) {
	rng, w := random(t), &witness{}
	v := open1(t, t.TempDir(), w.hooked(smallLogs()))
	log := func() string { n, _ := newestLog(v.db); return logName(n) }
	tree := func() string { return memtableName(newestMemtable(v.db)) }
	check := func(because string, want ...string) {
		t.Helper()
		id, data := someChunk(rng, 50_000)
		mustPut(t, v, id, data)
		slices.Sort(want)
		if got := w.synced(); !slices.Equal(got, want) {
			t.Fatalf("%s: synced %v, want %v", because, got, want)
		}
	}
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	w.synced()
	check("nothing is new", log(), tree())

	left := tree()
	newMemtable(t, v, 1)
	check("a memtable was left", log(), left, tree(), chunksDir)
	check("that is done", log(), tree())

	left = tree()
	newMemtable(t, v, 3) // the first of them, at least, is a table by now, or soon
	mustPut(t, v, id, data)
	next, nextData := someChunk(rng, 50_000)
	mustPut(t, v, next, nextData)
	if got := w.synced(); !slices.Contains(got, left) || !slices.Contains(got, tree()) || !slices.Contains(got, chunksDir) {
		t.Fatalf("of %s to %s only %v was synced", left, tree(), got)
	}
	check("that is done, too", log(), tree())

	left = log()
	for log() == left {
		id, data := someChunk(rng, 500_000)
		mustPut(t, v, id, data)
	}
	if got := w.synced(); !slices.Contains(got, log()) || !slices.Contains(got, chunksDir) {
		t.Fatalf("after %s was left, only %v was synced", left, got)
	}
	check("nothing is new again", log(), tree())
}

// Each of the syncs that a receipt needs can fail, and then there is none.
func TestNoReceiptIfAnyOfTheSyncsFails(t *testing.T) {
	for which, fails := range map[string]func(name string, left string) bool{
		"the value log":                  func(name, _ string) bool { return strings.HasSuffix(name, ".vlog") },
		"the memtable's log":             func(name, left string) bool { return strings.HasSuffix(name, ".mem") && name != left },
		"the log of the memtable before": func(name, left string) bool { return name == left },
		"the directory":                  func(name, _ string) bool { return name == chunksDir },
	} {
		t.Run(which, func(t *testing.T) {
			rng, w := random(t), &witness{}
			v := open1(t, t.TempDir(), w.hooked(noFloor))
			id, data := someChunk(rng, 50_000)
			mustPut(t, v, id, data)
			left := memtableName(newestMemtable(v.db))
			newMemtable(t, v, 1)
			w.mu.Lock()
			w.fails = func(name string) bool { return fails(name, left) }
			w.mu.Unlock()
			next, nextData := someChunk(rng, 50_000)
			mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
			w.mu.Lock()
			w.fails = nil
			w.mu.Unlock()
			mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
			if _, err := v.Confirm(t.Context(), id); err != nil {
				t.Fatalf("what was durable before: %v", err)
			}
		})
	}
}
