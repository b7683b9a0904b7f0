package agent

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
)

// journal is the agent's memory of orders, in a small Badger store of its own:
// the terminal report of each order, kept until the order expires, so that a
// repeat is answered and not done again; and whether the coordinator has
// acknowledged it, so that no result is lost.
//
// Keys: "order/<id>" → JSON of [entry]; "floor" → the newest trusted time;
// "epoch" → how often the agent was started.
type journal struct {
	db    *badger.DB
	dir   string
	leave int64 // bytes left free on the disk
	// mu makes one write at a time. Badger's Sync leaves out the log of a
	// memtable that another write has just rotated out.
	mu sync.Mutex
}

// entry is a finished order.
type entry struct {
	Order   string    `json:"order"`
	Seq     uint64    `json:"seq"`
	Expires time.Time `json:"expires"`
	Report  []byte    `json:"report"` // the sealed envelope, sent as it is every time
	Acked   bool      `json:"acked"`
}

const orderPrefix = "order/"

// journalFloor is what the journal leaves free on its disk, in bytes. Badger
// writes through mapped memory, where a full disk is a SIGBUS that ends the
// agent instead of an error: with a margin for what it compacts, it is asked
// before each write.
const journalFloor = 32 << 20

// room is an error if the disk is too full to write.
func (j *journal) room() error {
	var st unix.Statfs_t
	if err := unix.Statfs(j.dir, &st); err != nil {
		return fmt.Errorf("the journal's disk cannot be asked for its free space: %w", err)
	}
	if free := int64(st.Bavail) * int64(st.Bsize); free < j.leave {
		return fmt.Errorf("the disk of %s is full: %d MiB are free, the agent needs %d; free some space", j.dir, free>>20, j.leave>>20)
	}
	return nil
}

func openJournal(dir string) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the journal's folder cannot be made: %w", err)
	}
	j := &journal{dir: dir, leave: journalFloor}
	if err := j.room(); err != nil {
		return nil, err
	}
	opts := badger.DefaultOptions(dir).
		WithLogger(nil).
		WithMetricsEnabled(false).
		WithDetectConflicts(false).
		WithMemTableSize(4 << 20).
		WithNumMemtables(1).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(4).
		WithNumCompactors(2).
		WithBlockCacheSize(0).
		WithCompression(0).
		WithIndexCacheSize(1 << 20).
		// Every value stays in the tree, where compaction drops old ones: a value
		// log would have to be collected. 256 KiB is above the largest entry and
		// below Badger's bound for this MemTableSize.
		WithValueThreshold(256 << 10).
		WithValueLogFileSize(1 << 20).
		WithSyncWrites(false) // put syncs itself and checks that it worked
	var err error
	if j.db, err = badger.Open(opts); err != nil {
		return nil, fmt.Errorf("the agent's journal in %s cannot be opened: %w", dir, err)
	}
	return j, nil
}

func (j *journal) close() error { return j.db.Close() }

// put keeps e; when it returns nil, e has reached the disk.
func (j *journal) put(e entry) error {
	raw, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return j.durably(func(tx *badger.Txn) error { return tx.Set([]byte(orderPrefix+e.Order), raw) })
}

// update changes the journal; a power cut may undo it.
func (j *journal) update(change func(*badger.Txn) error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.room(); err != nil {
		return err
	}
	return j.db.Update(change)
}

// durably changes the journal; when it returns nil, the change has reached the disk.
func (j *journal) durably(change func(*badger.Txn) error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.room(); err != nil {
		return err
	}
	if err := j.db.Update(change); err != nil {
		return fmt.Errorf("the journal cannot be written: %w", err)
	}
	err := j.db.Sync()
	if err == nil {
		err = durable.SyncDir(j.dir) // of a log that is new; Badger does it some time later
	}
	if err != nil {
		return fmt.Errorf("the journal cannot be synced to disk: %w", err)
	}
	return nil
}

// get finds a finished order; ok is false for one that is not known.
func (j *journal) get(order string) (e entry, ok bool, err error) {
	err = j.db.View(func(tx *badger.Txn) error {
		item, err := tx.Get([]byte(orderPrefix + order))
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		ok = true
		return item.Value(func(v []byte) error { return json.Unmarshal(v, &e) })
	})
	if err != nil {
		return entry{}, false, fmt.Errorf("the journal cannot be read: %w", err)
	}
	return e, ok, nil
}

// acked notes that the coordinator has the report. It need not be durable: the
// worst that a lost note does is one report too many.
func (j *journal) acked(order string, seq uint64) error {
	e, ok, err := j.get(order)
	if err != nil || !ok || e.Acked || e.Seq != seq {
		return err
	}
	e.Acked = true
	raw, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return j.update(func(tx *badger.Txn) error { return tx.Set([]byte(orderPrefix+order), raw) })
}

// each calls f for every finished order.
func (j *journal) each(f func(entry)) error {
	return j.db.View(func(tx *badger.Txn) error {
		it := tx.NewIterator(badger.IteratorOptions{Prefix: []byte(orderPrefix), PrefetchValues: true, PrefetchSize: 64})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			var e entry
			if err := it.Item().Value(func(v []byte) error { return json.Unmarshal(v, &e) }); err != nil {
				return err
			}
			f(e)
		}
		return nil
	})
}

// forget drops what expired before now. An order that is not acknowledged is
// kept: its result is still owed.
func (j *journal) forget(now time.Time) error {
	var old []string
	if err := j.each(func(e entry) {
		if e.Acked && e.Expires.Before(now) {
			old = append(old, e.Order)
		}
	}); err != nil {
		return err
	}
	if len(old) == 0 {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.room(); err != nil {
		return err // it also takes space to forget
	}
	wb := j.db.NewWriteBatch()
	defer wb.Cancel()
	for _, id := range old {
		if err := wb.Delete([]byte(orderPrefix + id)); err != nil {
			return err
		}
	}
	return wb.Flush()
}

var floorKey = []byte("floor")

// floor is the newest trusted time that was saved; zero if there is none.
func (j *journal) floor() (t time.Time, err error) {
	err = j.db.View(func(tx *badger.Txn) error {
		item, err := tx.Get(floorKey)
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return item.Value(t.UnmarshalBinary)
	})
	return t, err
}

func (j *journal) saveFloor(t time.Time) error {
	raw, err := t.UTC().Truncate(time.Second).MarshalBinary()
	if err != nil {
		return err
	}
	return j.update(func(tx *badger.Txn) error { return tx.Set(floorKey, raw) })
}

var epochKey = []byte("epoch")

// reportsAnEpoch is how many reports there can be in one life of the agent (a
// hundred a second for a year); epochs are multiples of it. They stay exact in
// any reader of JSON (2^53) for two million lives, and in Go's for four billion.
const reportsAnEpoch = 1 << 32

// nextEpoch counts the agent's lives, durably.
func (j *journal) nextEpoch() (uint64, error) {
	var n uint64
	err := j.durably(func(tx *badger.Txn) error {
		item, err := tx.Get(epochKey)
		switch {
		case err == nil:
			err = item.Value(func(v []byte) error {
				n = binary.BigEndian.Uint64(v)
				return nil
			})
		case errors.Is(err, badger.ErrKeyNotFound):
			err = nil
		}
		if err != nil {
			return err
		}
		n++
		return tx.Set(epochKey, binary.BigEndian.AppendUint64(nil, n))
	})
	if err != nil {
		return 0, err
	}
	return n * reportsAnEpoch, nil
}

// unacked lists reports that the coordinator has not acknowledged.
func (j *journal) unacked() (out []entry, err error) {
	err = j.each(func(e entry) {
		if !e.Acked {
			out = append(out, e)
		}
	})
	return out, err
}
