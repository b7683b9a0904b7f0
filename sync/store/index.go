package store

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/ristretto/v2/z"

	"github.com/deimos-edge/deimos/internal/compactors"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/sync/chunk"
)

// index tells where each chunk's record lies. It is made of the segments and can be made of
// them again at any time, so nobody waits for it to be durable.
//
// What was changed lately is in memory, the rest in Badger. A checkpoint writes the first
// into the second, together with the position in the log up to which it is all there; at
// opening the records behind that are read again (see [Volume.replay]).
//
//	'i'‖id       where the chunk's record lies: segment, at, size (3 × uint32)
//	's'‖segment  of a full segment: bytes that are neither of chunks nor of drops, bytes of drops (2 × uint32)
//	'p'          the position: segment, at (2 × uint32), seq, how many chunks there are and the sum of their places (3 × uint64)
//	'v'          the mark and the id of the volume
//
// All numbers are little endian.
type index struct {
	db   *badger.DB
	rest *compactors.Keeper
	dir  string
	// stumbled is told when a read of Badger's mapped memory failed.
	stumbled func(fault any)
	hooks    hooks

	mu sync.RWMutex // guards the rest
	// fresh changes are in no checkpoint, leaving ones in one that is being written.
	fresh, leaving map[chunk.ID]change
	full           map[uint32]full // fresh changes of segments
}

// change is of one chunk since the last checkpoint.
type change struct {
	at   place
	gone bool
}

// full is what the index knows of a segment that is full.
type full struct {
	meta, drops int64 // bytes
	gone        bool
}

// position is how far the index is complete.
type position struct {
	end    spot
	seq    uint64
	chunks int64
	places uint64 // see ledger: an index that lacks changes has others
}

const (
	indexPrefix   = 'i'
	segmentPrefix = 's'

	// changeBytes is what a change takes in Badger's memtable at most, rounded up.
	changeBytes = 64 + compactors.EntryBytes
	// changesAtOnce are in one transaction of Badger's.
	changesAtOnce = 4 << 10
)

var (
	keyOfPosition = []byte{'p'}
	keyOfVolume   = []byte{'v'}
)

func keyOf(id chunk.ID) []byte { return append([]byte{indexPrefix}, id[:]...) }

func keyOfSegment(number uint32) []byte {
	return binary.LittleEndian.AppendUint32([]byte{segmentPrefix}, number)
}

// tuning is Badger's configuration for small entries on a small board.
func tuning(dir string, log badgerLog) badger.Options {
	return badger.DefaultOptions(dir).
		WithLogger(log).
		WithSyncWrites(false). // a checkpoint syncs, and looks at the error
		WithMemTableSize(4 << 20).
		WithNumMemtables(2).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(4).
		WithNumCompactors(2).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(8 << 20).
		WithValueThreshold(1 << 10).
		WithValueLogFileSize(1 << 20). // nothing is ever in it
		WithMetricsEnabled(false).
		WithDetectConflicts(false).
		WithChecksumVerificationMode(options.OnBlockRead)
}

// damage is why an index must be made anew.
type damage struct{ why error }

func (d *damage) Error() string { return d.why.Error() }

// openIndex opens an index, or begins one. The error is a *damage if it must be made anew.
func openIndex(dir string, log badgerLog, h hooks) (x *index, err error) {
	if err := errors.Join(durable.RemoveEmpty(dir, ".vlog", ".mem"), inspect(dir, tuning(dir, log))); err != nil {
		return nil, err
	}
	x = &index{dir: dir, hooks: h, fresh: map[chunk.ID]change{}, full: map[uint32]full{}}
	// Badger's own lock stays for a moment with programs that are being started; that
	// nobody else has the volume is known already.
	for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		if x.db, err = openBadger(tuning(dir, log)); !isLocked(err) || time.Now().After(end) {
			break
		}
	}
	switch {
	case err == nil:
		return x, nil
	case isLocked(err):
		return nil, fmt.Errorf("another process uses this store (%s): stop it first", dir)
	case isFull(err):
		return nil, fmt.Errorf("the disk of %s is full: delete something else there (%w)", dir, err)
	case isErrno(err):
		return nil, err
	}
	return nil, &damage{err}
}

func openBadger(tuned badger.Options) (db *badger.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("its files are damaged: %v", p)
		}
	}()
	return badger.Open(tuned)
}

// isLocked tells whether somebody else has Badger's directory. Badger does not wrap
// the cause.
func isLocked(err error) bool {
	return err != nil && strings.Contains(err.Error(), "Cannot acquire directory lock")
}

// isErrno tells a failed system call from damage, which what cannot be read is here: the
// segments are there to make another index of.
func isErrno(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && !isDamage(err)
}

// inspect reads the list of tables and all tables before Badger does, which crashes the
// process at a damaged one.
func inspect(dir string, tuned badger.Options) error {
	f, err := os.Open(filepath.Join(dir, badger.ManifestFilename))
	if errors.Is(err, fs.ErrNotExist) {
		for _, pattern := range []string{"*.sst", "*.mem"} {
			if left, err := filepath.Glob(filepath.Join(dir, pattern)); err != nil || len(left) > 0 {
				return cmp.Or[error](err, &damage{errors.New("its MANIFEST is gone")})
			}
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	m, _, err := badger.ReplayManifestFile(f, tuned.ExternalMagicVersion, tuned)
	switch {
	case isErrno(err):
		return err
	case err != nil:
		return &damage{fmt.Errorf("its MANIFEST is damaged: %w", err)}
	}
	for id := range m.Tables {
		if err := checkTable(table.NewFilename(id, dir)); isErrno(err) && !errors.Is(err, fs.ErrNotExist) {
			return err
		} else if err != nil {
			return &damage{fmt.Errorf("table %s: %w", table.IDToFilename(id), err)}
		}
	}
	return nil
}

// checkTable reads a table as Badger does.
func checkTable(path string) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = errors.New("it is damaged, or cannot be read")
		}
	}()
	switch info, err := os.Stat(path); {
	case err != nil:
		return err
	case info.Size() == 0:
		return errors.New("it is empty")
	}
	file, err := z.OpenMmapFile(path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close(-1)) }()
	t, err := table.OpenTable(file, table.Options{ReadOnly: true, ChkMode: options.NoVerification})
	if err != nil {
		return err
	}
	return t.VerifyChecksum()
}

func (x *index) close() error {
	if x.rest != nil {
		x.rest.Close()
	}
	return x.db.Close()
}

// view is Badger's View with faults and stumbles turned into errors. After one, Badger
// holds a lock for ever that closing needs.
func (x *index) view(fn func(*badger.Txn) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = &readFault{"the index cannot be read", fmt.Errorf("%v", p)}
			x.stumbled(p)
		}
	}()
	return x.db.View(fn)
}

// find tells where a chunk's record lies; ok is false if it is not held.
func (x *index) find(id chunk.ID) (at place, ok bool, err error) {
	x.mu.RLock()
	c, changed := x.changed(id)
	x.mu.RUnlock()
	if changed {
		return c.at, !c.gone, nil
	}
	err = x.view(func(txn *badger.Txn) error {
		item, err := txn.Get(keyOf(id))
		if err == nil {
			at, err = placeOf(item)
		}
		return err
	})
	if errors.Is(err, badger.ErrKeyNotFound) {
		return place{}, false, nil
	}
	return at, err == nil, err
}

func (x *index) changed(id chunk.ID) (change, bool) {
	c, ok := x.fresh[id]
	if !ok {
		c, ok = x.leaving[id]
	}
	return c, ok
}

func placeOf(item *badger.Item) (at place, err error) {
	err = item.Value(func(b []byte) error {
		if len(b) != 12 {
			return fmt.Errorf("an entry of the index has %d bytes", len(b))
		}
		at = place{spot{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])}, binary.LittleEndian.Uint32(b[8:])}
		return nil
	})
	return at, err
}

// sum stands for a place in [position] and [ledger].
func (p place) sum() uint64 { return uint64(sum(p.encode())) }

func (p place) encode() []byte {
	return binary.LittleEndian.AppendUint32(p.spot.append(nil), p.size)
}

// set says where a chunk's record lies from now on.
func (x *index) set(id chunk.ID, at place) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.fresh[id] = change{at: at}
}

// remove says that a chunk is not held any more.
func (x *index) remove(id chunk.ID) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.fresh[id] = change{gone: true}
}

// setFull remembers the figures of a segment that is full, or that it is gone.
func (x *index) setFull(number uint32, f full) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.full[number] = f
}

// changes is how many there are that no checkpoint has.
func (x *index) changes() int {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return len(x.fresh) + len(x.full)
}

// resident is a chunk and where it lies.
type resident struct {
	id chunk.ID
	at place
}

// eachFrom calls fn for all chunks from an id on, in the order of ids. fn may change the
// index; what it changes is not seen.
func (x *index) eachFrom(ctx context.Context, from chunk.ID, fn func(resident) error) error {
	var late []resident // with what is gone, at nowhere
	x.mu.RLock()
	for _, changes := range []map[chunk.ID]change{x.fresh, x.leaving} {
		for id, c := range changes {
			if compareIDs(id, from) < 0 {
				continue
			}
			if now, _ := x.changed(id); now != c {
				continue
			}
			late = append(late, resident{id, c.at})
		}
	}
	x.mu.RUnlock()
	slices.SortFunc(late, func(a, b resident) int { return compareIDs(a.id, b.id) })
	late = slices.CompactFunc(late, func(a, b resident) bool { return a.id == b.id })
	// tell tells of those up to an id, and whether that was one of them.
	tell := func(upTo *chunk.ID) (same bool, err error) {
		for len(late) > 0 && (upTo == nil || compareIDs(late[0].id, *upTo) <= 0) {
			r := late[0]
			late = late[1:]
			same = upTo != nil && r.id == *upTo
			if r.at == (place{}) {
				continue
			}
			if err := fn(r); err != nil {
				return same, err
			}
		}
		return same, nil
	}
	err := x.view(func(txn *badger.Txn) error {
		opt := badger.DefaultIteratorOptions
		opt.PrefetchValues, opt.Prefix = false, []byte{indexPrefix}
		it := txn.NewIterator(opt)
		defer it.Close()
		for it.Seek(keyOf(from)); it.Valid(); it.Next() {
			if err := ctx.Err(); err != nil {
				return err
			}
			var r resident
			key := it.Item().Key()
			if len(key) != 1+len(r.id) {
				return fmt.Errorf("a key of the index has %d bytes", len(key))
			}
			copy(r.id[:], key[1:])
			if newer, err := tell(&r.id); err != nil || newer {
				if err != nil {
					return err
				}
				continue
			}
			at, err := placeOf(it.Item())
			if err != nil {
				return err
			}
			r.at = at
			if err := fn(r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = tell(nil)
	return err
}

// each is eachFrom the beginning.
func (x *index) each(ctx context.Context, fn func(resident) error) error {
	return x.eachFrom(ctx, chunk.ID{}, fn)
}

// fulls are the figures of all full segments.
func (x *index) fulls() (map[uint32]full, error) {
	all := map[uint32]full{}
	err := x.view(func(txn *badger.Txn) error {
		opt := badger.DefaultIteratorOptions
		opt.Prefix = []byte{segmentPrefix}
		it := txn.NewIterator(opt)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			key := it.Item().Key()
			err := it.Item().Value(func(b []byte) error {
				if len(key) != 5 || len(b) != 8 {
					return errors.New("an entry of a segment has another length")
				}
				all[binary.LittleEndian.Uint32(key[1:])] = full{meta: int64(binary.LittleEndian.Uint32(b)), drops: int64(binary.LittleEndian.Uint32(b[4:]))}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return all, err
}

// position reads how far the index is complete; the zero position if nowhere. o is the
// zero origin if the index is new.
func (x *index) position() (p position, o origin, err error) {
	err = x.view(func(txn *badger.Txn) error {
		item, err := txn.Get(keyOfVolume)
		if err != nil {
			return err
		}
		if err := item.Value(func(b []byte) error {
			copy(o.mark[:], b)
			o.volume = string(b[min(len(b), len(o.mark)):])
			return nil
		}); err != nil {
			return err
		}
		if item, err = txn.Get(keyOfPosition); err != nil {
			return err
		}
		return item.Value(func(b []byte) error {
			if len(b) != 32 {
				return fmt.Errorf("the position has %d bytes", len(b))
			}
			p = position{
				end: spot{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])},
				seq: binary.LittleEndian.Uint64(b[8:]), chunks: int64(binary.LittleEndian.Uint64(b[16:])), places: binary.LittleEndian.Uint64(b[24:]),
			}
			return nil
		})
	})
	if errors.Is(err, badger.ErrKeyNotFound) {
		err = nil
	}
	return p, o, err
}

func (p position) encode() []byte {
	b := binary.LittleEndian.AppendUint64(p.end.append(nil), p.seq)
	b = binary.LittleEndian.AppendUint64(b, uint64(p.chunks))
	return binary.LittleEndian.AppendUint64(b, p.places)
}

// begin takes what has changed for a checkpoint. The one before must have ended.
func (x *index) begin() (changes []resident, fulls map[uint32]full) {
	x.mu.Lock()
	fulls = x.full
	x.leaving, x.fresh, x.full = x.fresh, map[chunk.ID]change{}, map[uint32]full{}
	for id, c := range x.leaving {
		changes = append(changes, resident{id, c.at})
	}
	x.mu.Unlock()
	slices.SortFunc(changes, func(a, b resident) int { return compareIDs(a.id, b.id) })
	return changes, fulls
}

// checkpoint writes what begin gave, and that the log up to p is in the index. Parts of
// it are durable one after the other, so that a crash leaves an index which has all up to
// its position, and some of what is behind: reading that again changes nothing.
func (x *index) checkpoint(o origin, p position, changes []resident, fulls map[uint32]full) error {
	x.rest.Begin(int64(len(changes)+len(fulls)+2) * changeBytes)
	defer x.rest.End()
	x.answers()
	parts := len(changes) > x.hooks.atOnce
	var known position
	if parts {
		var err error
		if known, _, err = x.position(); err != nil {
			return err
		}
	}
	for first := true; first || len(changes) > 0; first = false {
		n := min(len(changes), x.hooks.atOnce)
		last := n == len(changes)
		err := x.update(func(txn *badger.Txn) error {
			for _, r := range changes[:n] {
				if parts {
					if err := known.change(txn, r); err != nil {
						return err
					}
				}
				var err error
				if r.at == (place{}) {
					err = txn.Delete(keyOf(r.id))
				} else {
					err = txn.Set(keyOf(r.id), r.at.encode())
				}
				if err != nil {
					return err
				}
			}
			if err := txn.Set(keyOfVolume, append(bytes.Clone(o.mark[:]), o.volume...)); err != nil {
				return err
			}
			if !last { // complete up to where it was, and with so many chunks of what is behind
				return txn.Set(keyOfPosition, known.encode())
			}
			for number, f := range fulls {
				key := keyOfSegment(number)
				var err error
				if f.gone {
					err = txn.Delete(key)
				} else {
					b := binary.LittleEndian.AppendUint32(nil, uint32(f.meta))
					err = txn.Set(key, binary.LittleEndian.AppendUint32(b, uint32(f.drops)))
				}
				if err != nil {
					return err
				}
			}
			return txn.Set(keyOfPosition, p.encode())
		})
		if err != nil {
			return err
		}
		if err := x.sync(); err != nil {
			return err
		}
		changes = changes[n:]
	}
	x.mu.Lock()
	x.leaving = nil
	x.mu.Unlock()
	return nil
}

// change takes into the figures what a change does to the entries, before it is made.
func (p *position) change(txn *badger.Txn, r resident) error {
	switch item, err := txn.Get(keyOf(r.id)); {
	case err == nil:
		was, err := placeOf(item)
		if err != nil {
			return err
		}
		p.chunks, p.places = p.chunks-1, p.places-was.sum()
	case !errors.Is(err, badger.ErrKeyNotFound):
		return err
	}
	if r.at != (place{}) {
		p.chunks, p.places = p.chunks+1, p.places+r.at.sum()
	}
	return nil
}

// spoil has the next opening make the index anew: after a write of it that failed, nobody
// knows what of it is on disk. It takes no room, as there may be none.
func (x *index) spoil() error {
	return errors.Join(os.Remove(filepath.Join(x.dir, badger.ManifestFilename)), durable.Sync(x.dir))
}

func (x *index) update(fn func(*badger.Txn) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the index cannot be written: %v", p)
			x.stumbled(p)
		}
	}()
	return x.db.Update(fn)
}

// sync makes the last transaction durable. Badger's Sync covers the log of the memtable
// that it writes to, and nothing was written since; the directory has that log's entry.
func (x *index) sync() error {
	return errors.Join(x.hooks.syncIndex(x.db), x.hooks.fsync(x.dir))
}

// answers returns when the file system can be written to. It is asked before Badger
// writes to a log in mapped memory: who waits there for a disk that hangs (for its
// journal, within a page fault) cannot be stopped for the garbage collector, so all of
// the process would stand still; who waits in a system call holds up nobody. A change
// of the mode to what it is takes the same way through the journal as the write. Why
// it fails, the write and the sync will tell.
func (x *index) answers() {
	logs, err := filepath.Glob(filepath.Join(x.dir, "*.mem"))
	if err != nil || len(logs) == 0 {
		return
	}
	newest := slices.MaxFunc(logs, func(a, b string) int {
		if len(a) != len(b) { // a number that outgrew its leading zeros
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
	if info, err := os.Stat(newest); err == nil {
		_ = os.Chmod(newest, info.Mode())
	}
}

func compareIDs(a, b chunk.ID) int { return bytes.Compare(a[:], b[:]) }
