// Package compactors lets the compactors of a Badger store rest while there is
// nothing to compact.
//
// Badger's compactors look for work twenty times a second each, for ever: two
// stores of two compactors took an idle agent 1% of a core, and 530 system calls
// a second where it now makes 32. A store has work for
// them only after a memtable was flushed, which takes megabytes of writes. So a
// [Keeper] stops them when nothing has been due for a while, and starts them when
// a write finds that something is.
//
// # Why it cannot stall
//
// A writer blocks in Badger when the tables of level 0 have reached
// NumLevelZeroTablesStall (S), one more is being flushed, NumMemtables (M) wait
// behind it, and the current one is full: at S+M+1 tables that are not compacted.
// Compactors rest only below NumLevelZeroTables (L) tables in level 0, and
// [Keeper.Begin] starts them again from L on. At a write that finds them resting
// rightly there are at most L-1 tables in level 0 and M+1 on their way there, and
// a small write fills one more at most. That makes L+M+1, and L is less than S. A
// write that could fill more starts them in any case, and while a write is under
// way they do not begin to rest: the keeper looks for writes once more after it
// has made the mark that they rest, a writer for the mark after it has said that
// it writes.
//
// # The private methods
//
// Badger stops and starts its compactors itself around Flatten, DropAll and the
// stream writer, but has no public call for it. DB.Flatten alone (with
// NumCompactors 0) would do for compaction, but it rewrites the whole tree each
// time, cannot be interrupted by Close, and does not end while writes go on. So
// the two methods are linked by name. A Badger without them does not link, and
// the tests fail if they no longer do what they did: it is found out by who takes
// a new Badger, never by a device. Nobody may call DropAll,
// DropPrefix, Flatten or NewStreamWriter on a store with a Keeper: they start
// compactors too.
package compactors

import (
	"sync"
	"sync/atomic"
	"time"
	_ "unsafe" // for go:linkname

	"github.com/dgraph-io/badger/v4"
)

// restAfter is for how long nothing must have been due. Compactors that are
// started wait up to a second before they begin, so resting between two
// compactions of a busy store would not pay.
const restAfter = 5 * time.Second

// EntryBytes is what Badger adds to a key in its memtable at most, rounded up: a
// node of its skip list (96 bytes), the head of the value, and the timestamp.
const EntryBytes = 128

// Keeper runs the compactors of one store when they are needed.
type Keeper struct {
	db      *badger.DB
	small   int64 // bytes; a write below does not fill a memtable
	writing atomic.Int64
	resting atomic.Bool
	work    chan struct{} // capacity 1: the compactors are wanted
	stop    chan struct{}
	stopped chan struct{}
	once    sync.Once
}

// Keep takes over the compactors of db, which was opened with two of them or
// more. Close the keeper before db.
func Keep(db *badger.DB) *Keeper { return keep(db, restAfter) }

func keep(db *badger.DB, after time.Duration) *Keeper {
	k := &Keeper{
		db: db, small: db.Opts().MemTableSize / 4,
		work: make(chan struct{}, 1), stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	go k.run(after)
	return k
}

// Begin must be called before each write, or each batch of writes, with at least
// as many bytes as its keys and values take in the tree, and [EntryBytes] more a key. After
// the write comes [Keeper.End].
func (k *Keeper) Begin(bytes int64) {
	k.writing.Add(1)
	if k.resting.Load() && (bytes >= k.small || k.due()) {
		select {
		case k.work <- struct{}{}:
		default:
		}
	}
}

// End says that a write that began has ended.
func (k *Keeper) End() { k.writing.Add(-1) }

// due tells whether a compactor would find something to do.
func (k *Keeper) due() bool {
	for _, level := range k.db.Levels() {
		if level.Score >= 1 {
			return true
		}
	}
	return false
}

// run ends with Close. It alone starts and stops compactors.
func (k *Keeper) run(after time.Duration) {
	defer close(k.stopped)
	for {
		if !k.awake(after) {
			return
		}
		stopCompactions(k.db)
		k.resting.Store(true)
		if !k.due() && k.writing.Load() == 0 { // else a write did not see the mark
			select {
			case <-k.work:
			case <-k.stop:
				return
			}
		}
		k.resting.Store(false)
		startCompactions(k.db)
	}
}

// awake returns true when nothing has been due for so long, false at the end.
func (k *Keeper) awake(after time.Duration) bool {
	const looks = 5
	tick := time.NewTicker(after / looks)
	defer tick.Stop()
	for quiet := 0; quiet < looks; quiet++ {
		select {
		case <-tick.C:
			if k.due() || k.writing.Load() > 0 {
				quiet = -1
			}
		case <-k.stop:
			return false
		}
	}
	return true
}

// Close ends the keeper; the compactors stay as they are, and are the store's to
// end. A compaction that is being waited for holds it up.
func (k *Keeper) Close() {
	k.once.Do(func() { close(k.stop) })
	<-k.stopped
}

//go:linkname stopCompactions github.com/dgraph-io/badger/v4.(*DB).stopCompactions
func stopCompactions(*badger.DB)

//go:linkname startCompactions github.com/dgraph-io/badger/v4.(*DB).startCompactions
func startCompactions(*badger.DB)
