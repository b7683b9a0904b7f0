package compactors

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
)

const (
	memTable = 1 << 20
	atOnce   = time.Millisecond // to rest as often as can be
	hung     = 3 * time.Minute  // however busy the machine is: nothing is measured by it
)

func open(t testing.TB, dir string) *badger.DB {
	t.Helper()
	db, err := badger.Open(badger.DefaultOptions(dir).
		WithLogger(nil).
		WithMetricsEnabled(false).
		WithDetectConflicts(false).
		WithMemTableSize(memTable).
		WithNumMemtables(1).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(4).
		WithNumCompactors(2).
		WithBlockCacheSize(0).
		WithCompression(0).
		WithIndexCacheSize(1 << 20).
		WithValueThreshold(64 << 10).
		WithValueLogFileSize(1 << 20))
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// running is how many compactors there are in this process.
func running(t testing.TB) int {
	t.Helper()
	var all bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&all, 2); err != nil {
		t.Fatal(err)
	}
	return bytes.Count(all.Bytes(), []byte("levelsController).runCompactor("))
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(hung); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after %s not yet: %s", hung, what)
		}
	}
}

// inTime ends the process instead of letting it hang: a store that has stalled
// cannot even be closed.
func inTime(what string, f func()) {
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(hung):
		panic(what + " hangs")
	}
}

func key(i int) []byte { return fmt.Appendf(nil, "order/%08d", i) }

// write sets so many keys of 1 KiB from i on, in one batch that says its size.
func write(k *Keeper, i, n int) error {
	value := make([]byte, 1<<10)
	k.Begin(int64(n) * int64(len(key(0))+len(value)+EntryBytes))
	defer k.End()
	var mu sync.Mutex
	var failed error
	var all sync.WaitGroup
	for ; n > 0; i, n = i+1, n-1 {
		tx := k.db.NewTransaction(true)
		if err := tx.Set(key(i), value); err != nil {
			return err
		}
		all.Add(1)
		tx.CommitWith(func(err error) {
			defer all.Done()
			if err != nil {
				mu.Lock()
				failed = err
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return failed
}

func TestCompactorsRestWhileNothingIsDue(t *testing.T) {
	db := open(t, t.TempDir())
	defer db.Close()
	k := keep(db, atOnce)
	defer k.Close()
	eventually(t, "no compactor runs", func() bool { return k.resting.Load() && running(t) == 0 })
	if err := write(k, 0, 1); err != nil {
		t.Fatal(err)
	}
	if !k.resting.Load() || running(t) != 0 {
		t.Error("a write that fills no memtable woke the compactors")
	}
}

// TestWritesNeverStall writes in small groups, each of which finds the
// compactors at rest or going there.
func TestWritesNeverStall(t *testing.T) {
	dir := t.TempDir()
	db := open(t, dir)
	k := keep(db, atOnce)
	const keys, group = 4000, 50
	rounds := 5 // of the same keys: what is old must go
	if testing.Short() {
		rounds = 3
	}
	inTime("writing", func() {
		for i := 0; i < keys*rounds; i += group {
			if err := write(k, i%keys, group); err != nil {
				t.Error(err)
				return
			}
			if l0 := db.Levels()[0].NumTables; l0 > 4 {
				t.Errorf("level 0 has %d tables", l0)
			}
		}
	})
	eventually(t, "what is due is compacted, and the compactors rest", func() bool { return k.resting.Load() && !k.due() })
	if size := tables(t, dir); size > 3*keys<<10 {
		t.Errorf("%d KiB of tables for %d KiB of values", size>>10, keys)
	}
	inTime("closing", func() {
		k.Close()
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	db = open(t, dir)
	defer db.Close()
	found := 0
	err := db.View(func(tx *badger.Txn) error {
		it := tx.NewIterator(badger.IteratorOptions{})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			found++
		}
		return nil
	})
	if err != nil || found != keys {
		t.Errorf("%d of %d keys are there after opening again: %v", found, keys, err)
	}
}

func tables(t testing.TB, dir string) (sum int64) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil {
			sum += info.Size()
		}
	}
	return sum
}

// TestABatchOfManyMemtablesNeverStalls begins while the compactors rest, and
// again while they are going to.
func TestABatchOfManyMemtablesNeverStalls(t *testing.T) {
	db := open(t, t.TempDir())
	defer db.Close()
	k := keep(db, atOnce)
	defer k.Close()
	for range 2 {
		eventually(t, "the compactors rest", k.resting.Load)
		inTime("a large batch", func() {
			if err := write(k, 0, 12<<10); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAWriteUnderWayKeepsThemAwake(t *testing.T) {
	db := open(t, t.TempDir())
	defer db.Close()
	k := keep(db, atOnce)
	defer k.Close()
	k.Begin(k.small)
	eventually(t, "the compactors run", func() bool { return !k.resting.Load() && running(t) == 2 })
	for range 100 {
		if k.resting.Load() {
			t.Fatal("they rest during a write")
		}
		time.Sleep(atOnce)
	}
	k.End()
	eventually(t, "the compactors rest", k.resting.Load)
}
