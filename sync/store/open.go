package store

import (
	"bytes"
	"container/heap"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/compactors"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// Names below a volume's directory.
const (
	idFile         = "VOLUME"
	ballastFile    = "ballast"
	syncFailedFile = "SYNC_FAILED"
	chunksDir      = "chunks"
)

// Open opens the volume in dir, or makes a new one if dir is empty or missing
// and no particular id is asked for. Before it returns it has read the chunks
// of the newest value log, which a crash can have hurt; see [Volume.Lost]. If the
// tree is damaged it is made anew, which reads all value logs once: hours on a large
// disk. It can be killed at any time, and is begun again then.
//
// It refuses, with a sentence, a directory that another process has open, that
// holds anything but a volume, or that holds another volume than the one asked
// for (a disk that was swapped, or is not mounted).
func Open(dir string, opt Options) (*Volume, error) {
	opt.hooks = opt.hooks.orReal()
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	return open(dir, opt)
}

func open(dir string, opt Options) (_ *Volume, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the directory for chunks cannot be made: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unlock(lock))
		}
	}()
	if err := removeHalfWritten(dir); err != nil {
		return nil, err
	}
	id, fresh, err := identify(dir, opt.ID)
	if err != nil {
		return nil, err
	}
	if opt.Capacity, err = process.take(opt.Capacity); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			process.giveBack(opt.Capacity)
		}
	}()
	if err := makeRoom(dir, opt.hooks); err != nil {
		return nil, err
	}
	v := &Volume{
		dir: dir, id: id, opt: opt, lock: lock,
		queue: make(chan *request), stop: make(chan struct{}), stopped: make(chan struct{}),
		readers: make(chan struct{}, maxReaders),
		lost:    map[chunk.ID]Loss{}, rescued: map[chunk.ID]bool{}, suspect: map[chunk.ID]bool{},
		mover: mover{wanted: make(chan struct{}, 1), ended: make(chan struct{}), start: time.Now(), stuck: map[uint32]int64{}},
	}
	if v.logSize = opt.LogBytes; v.logSize == 0 {
		v.logSize = logSizeFor(v.diskSize())
	}
	v.checkEarlierSync()
	path := filepath.Join(dir, chunksDir)
	if err := syncLeftovers(path, opt.hooks); err != nil && !errors.Is(err, fs.ErrNotExist) {
		v.latch(fmt.Sprintf("what an earlier run wrote could not be made durable: %v", err))
	}
	if err := errors.Join(durable.RemoveEmpty(path, ".vlog", ".mem"), forgetDiscards(path), forgetKeys(path), forgetRebuild(path), mendLogHeaders(path), guardNewestLog(path)); err != nil {
		return nil, fmt.Errorf("the chunks in %s cannot be prepared for opening: %w", dir, err)
	}
	mended, err := v.mendTree(path, fresh)
	if err != nil {
		return nil, err
	}
	if v.db, err = openBadger(path, opt, v.logSize); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.syncer.close(), v.db.Close())
		}
	}()
	if v.syncer, err = newSyncer(path, v.db, opt.hooks); err != nil {
		return nil, err
	}
	if err := v.agreeOnID(fresh); err != nil {
		return nil, err
	}
	newest, err := v.takeStock()
	if err != nil {
		return nil, err
	}
	hurt, err := v.hurt(mended)
	if err != nil {
		return nil, err
	}
	if err := v.readAgain(context.Background(), append(newest, hurt...)); err != nil {
		opt.Log.Warn("not all chunks that a crash can have hurt could be read; no log is emptied until they were", "volume", v.id, "err", err)
	}
	v.keepBallast()
	v.rest = compactors.Keep(v.db)
	go v.commitLoop()
	if err := v.rewrite(context.Background()); err != nil {
		v.latch(fmt.Sprintf("chunks whose move a crash had cut short could not be written again: %v", err))
	}
	v.mover.begin(v)
	return v, nil
}

// lockDir takes the directory for this process until the file is closed. The
// kernel gives it back if the process dies.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("the directory for chunks cannot be opened: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another process uses this store (%s): stop it first", dir)
		}
		return nil, fmt.Errorf("the store in %s cannot be locked: %w", dir, err)
	}
	return f, nil
}

// unlock gives the directory back. Closing alone would not, while a program that is
// being started has not let go of our files yet.
func unlock(lock *os.File) error {
	return errors.Join(unix.Flock(int(lock.Fd()), unix.LOCK_UN), lock.Close())
}

// removeHalfWritten removes what a crash has left of a file that was about to
// replace one of ours.
func removeHalfWritten(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("the directory for chunks cannot be read: %w", err)
	}
	for _, e := range entries {
		for _, ours := range []string{idFile, syncFailedFile} { // as internal/durable names it
			random, ok := strings.CutPrefix(e.Name(), "."+ours)
			if !ok || random == "" || strings.Trim(random, "0123456789") != "" {
				continue
			}
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("what a crash has left in %s cannot be removed: %w", dir, err)
			}
		}
	}
	return nil
}

// identify reads the volume's id, or makes one where a new volume may begin.
func identify(dir, want string) (id string, fresh bool, err error) {
	raw, err := os.ReadFile(filepath.Join(dir, idFile))
	switch {
	case err == nil:
		parsed, err := ulid.ParseStrict(strings.TrimSpace(string(raw)))
		if err != nil {
			return "", false, fmt.Errorf("%s is damaged and holds no volume id: %w", filepath.Join(dir, idFile), err)
		}
		if id = parsed.String(); want != "" && id != want {
			return "", false, fmt.Errorf("this is another volume: %s holds %s, expected %s; was a disk swapped?", dir, id, want)
		}
		return id, false, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", false, fmt.Errorf("the id of the volume in %s cannot be read: %w", dir, err)
	case want != "":
		return "", false, fmt.Errorf("volume %s is not in %s: is its disk mounted?", want, dir)
	}
	if err := mustBeEmpty(dir); err != nil {
		return "", false, err
	}
	made, err := ulid.New(ulid.Timestamp(time.Now()), rand.Reader)
	if err != nil {
		return "", false, err
	}
	return made.String(), true, nil
}

// mustBeEmpty keeps a new volume out of a directory with somebody's data. A
// volume whose making was cut short has chunks/ and no id, and may go on.
func mustBeEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("the directory for chunks cannot be read: %w", err)
	}
	for _, e := range entries {
		switch e.Name() {
		case "lost+found", ballastFile, chunksDir:
		default:
			return fmt.Errorf("%s holds other data (%q) and no volume: choose an empty directory", dir, e.Name())
		}
	}
	return nil
}

// needed is what Badger may write besides chunks before it can be stopped, in
// bytes: the pages of a log, and a flushed memtable.
const needed = ballastBytes / 2

// makeRoom sees to it that Badger has what is needed to open, to drop chunks or
// to close, and gives the ballast up for it, if that is enough. Without, the kernel
// would kill the process at a write to a file that has no block on disk.
func makeRoom(dir string, h hooks) error {
	have, err := lastAt(dir, h)
	if err != nil || have >= needed {
		return err
	}
	ballast := filepath.Join(dir, ballastFile)
	var st unix.Stat_t
	if unix.Stat(ballast, &st) == nil && have+st.Blocks*512 >= needed {
		if err := os.Remove(ballast); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return wire.FailedBecause(wire.CodeNoSpace, "the disk of %s is full, and the ballast cannot be removed: %v", dir, err)
		}
		if have, err = lastAt(dir, h); err != nil {
			return err
		}
	}
	if have < needed {
		return wire.FailedBecause(wire.CodeNoSpace, "the disk of %s is full: %d KiB are free, its chunks need %d MiB; delete something else there", dir, have>>10, needed>>20)
	}
	return nil
}

func lastAt(dir string, h hooks) (int64, error) {
	var st unix.Statfs_t
	if err := h.statfs(dir, &st); err != nil {
		return 0, wire.FailedBecause(wire.CodeReadOnly, "the free space of %s cannot be read: %v", dir, err)
	}
	return last(&st), nil
}

// keepBallast puts the ballast back when there is room. It may take the upper
// half of the floor: opening and dropping matter more.
func (v *Volume) keepBallast() {
	path := filepath.Join(v.dir, ballastFile)
	if _, err := os.Stat(path); err == nil {
		return
	}
	var st unix.Statfs_t
	if v.opt.hooks.statfs(v.dir, &st) != nil || free(&st)-ballastBytes < v.floor(&st)/2 {
		return
	}
	f, err := os.Create(path)
	if err != nil {
		return
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, ballastBytes)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(path) // no ballast is better than a hollow one
		v.opt.Log.Warn("no space could be set aside for the day the disk is full", "volume", v.id, "err", err)
	}
}

// checkEarlierSync latches the volume if a sync failed since the machine booted.
func (v *Volume) checkEarlierSync() {
	path := filepath.Join(v.dir, syncFailedFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	now, bootErr := v.opt.hooks.bootID()
	if err := errors.Join(err, bootErr); err != nil {
		v.latchAll(fmt.Sprintf("an earlier sync failed, and whether the machine has restarted since cannot be told: %v", err))
		return
	}
	if strings.TrimSpace(string(raw)) == now {
		v.latchAll("a sync failed since the machine started, so what lies on disk is not known: check the disk and restart the machine")
		return
	}
	if err := os.Remove(path); err != nil {
		v.latch(fmt.Sprintf("the disk refuses changes: %v", err))
	}
}

// guardNewestLog puts an empty value log after the newest one. Badger cuts the
// newest log at its first damaged record when it opens, and with it every whole
// chunk behind; all older logs it leaves alone, and it never appends to one. It
// deletes the empty log itself the next time. What it would have cut for good
// reason, the space that is set aside in a log but not written, is cut here.
func guardNewestLog(dir string) error {
	logs, err := filesOf(dir, ".vlog")
	if err != nil || len(logs) == 0 {
		return err
	}
	newest := logs[len(logs)-1]
	if err := cutUnwritten(newest); err != nil {
		return err
	}
	n, err := logNumber(newest)
	if err != nil {
		return fmt.Errorf("%s has no number: %w", newest, err)
	}
	// The header: key id 0 (no encryption) and an initial vector that is not used.
	header := make([]byte, logHeader)
	if err := os.WriteFile(filepath.Join(dir, logName(n+1)), header, 0o600); err != nil {
		return err
	}
	return nil
}

// forgetDiscards removes Badger's figures of what can be discarded, which a crash
// or a flipped bit may have falsified: they decide which log it deletes.
func forgetDiscards(dir string) error {
	if err := os.Remove(filepath.Join(dir, "DISCARD")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

const logHeader = 20 // bytes at the beginning of a value log

// mendLogHeaders puts the key id in the headers of logs right. It is always 0, since nothing here is encrypted by Badger, which refuses to open all chunks
// for a single flipped bit in one of them.
func mendLogHeaders(dir string) error {
	values, err := filesOf(dir, ".vlog")
	if err != nil {
		return err
	}
	mems, err := filesOf(dir, ".mem")
	if err != nil {
		return err
	}
	for _, path := range append(values, mems...) {
		if err := mendLogHeader(path); err != nil {
			return err
		}
	}
	return nil
}

func mendLogHeader(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var keyID [8]byte
	if _, err := f.ReadAt(keyID[:], 0); err != nil {
		return nil // too short, or unreadable: Badger will say
	}
	if keyID == [8]byte{} {
		return nil
	}
	_, err = f.WriteAt(make([]byte, len(keyID)), 0)
	return err
}

// cutUnwritten cuts the hole off the end of a sparse file. Where the file
// system cannot tell holes, nothing is cut.
func cutUnwritten(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	var end int64
	for at := int64(0); at < info.Size(); {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // nothing but a hole from here
			break
		}
		if err != nil {
			return nil
		}
		if end, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE); err != nil {
			return nil
		}
		at = end
	}
	if end < logHeader || end == info.Size() {
		return nil
	}
	return f.Truncate(end)
}

func (v *Volume) diskSize() int64 {
	if v.opt.Capacity > 0 {
		return v.opt.Capacity
	}
	var st unix.Statfs_t
	if v.opt.hooks.statfs(v.dir, &st) != nil {
		return 0
	}
	return int64(st.Blocks) * int64(st.Bsize)
}

func openBadger(dir string, opt Options, logSize int64) (db *badger.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the chunks in %s cannot be opened, their files are damaged or the disk fails: %v", dir, p)
		}
	}()
	tuned := tuning(dir, logSize, opt.Log)
	// Badger's own lock stays for a moment with programs that are being started; that
	// nobody else has the volume is known already.
	for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		if db, err = badger.Open(tuned); !isLocked(err) || time.Now().After(end) {
			break
		}
	}
	switch {
	case isLocked(err):
		return nil, fmt.Errorf("another process uses this store (%s): stop it first", dir)
	case errors.Is(err, syscall.ENOSPC):
		return nil, fmt.Errorf("the disk of %s is full: delete something else there (%w)", dir, err)
	case err != nil:
		return nil, fmt.Errorf("the chunks in %s cannot be opened: %w; %s", dir, err, beginAnew)
	}
	return db, nil
}

// isLocked tells whether somebody else has Badger's directory. Badger does not wrap
// the cause.
func isLocked(err error) bool {
	return err != nil && strings.Contains(err.Error(), "Cannot acquire directory lock")
}

const beginAnew = "if the disk is sound, move the directory away and begin a new volume, the fleet holds copies"

// mendTree makes the tree anew if Badger would not open it, or forget what is in it.
// It returns nil if there was no need.
func (v *Volume) mendTree(path string, fresh bool) (*mended, error) {
	tuned := tuning(path, v.logSize, v.opt.Log)
	d, err := inspect(path, tuned)
	if err != nil {
		return nil, fmt.Errorf("the index of the chunks in %s cannot be read: %w", path, err)
	}
	if d == nil {
		return nil, nil
	}
	if v.readOnly != "" {
		return nil, fmt.Errorf("the index of the chunks in %s is damaged (%w) and cannot be made anew: %s", path, d.why, v.readOnly)
	}
	id := v.id
	if fresh { // the chunks may belong to another one
		id = ""
	}
	m, err := rebuildTree(path, id, d, tuned, v.opt.hooks, v.opt.Log)
	if err != nil {
		return nil, fmt.Errorf("the index of the chunks in %s is damaged (%w) and cannot be made anew: %w; %s", path, d.why, err, beginAnew)
	}
	return m, nil
}

// hurt are the chunks that are lost for all that a tree made anew knows: without a
// record, or with one where the logs are damaged or gone.
func (v *Volume) hurt(m *mended) (hurt []resident, err error) {
	if m == nil {
		return nil, nil
	}
	err = v.view(func(txn *badger.Txn) error {
		return v.eachIndexed(context.Background(), func(id chunk.ID, size int64, _ uint64) error {
			item, err := txn.Get(keyOf(chunkPrefix, id))
			if err != nil && !errors.Is(err, badger.ErrKeyNotFound) {
				return err
			}
			if err != nil || m.suspects(placeOf(item)) {
				hurt = append(hurt, resident{id: id, size: size}) // each by itself
			}
			return nil
		})
	})
	return hurt, err
}

// readAgain reads chunks that a crash can have hurt, and remembers which are lost, and
// which are whole only where they lay before. Until it has read all, no log may go: it
// may be the one with the only whole copy.
func (v *Volume) readAgain(ctx context.Context, some []resident) error {
	asTheyLie(some)
	s := sweep{v: v, rest: some}
	err := v.check(ctx, s.next, &Checked{})
	v.mu.Lock()
	defer v.mu.Unlock()
	v.unread = s.rest
	return err
}

// agreeOnID compares the id of the directory with the one among the chunks, and
// writes down a new one: into Badger first, so that VOLUME means a whole volume.
func (v *Volume) agreeOnID(fresh bool) error {
	var held []byte
	err := v.db.View(func(txn *badger.Txn) error {
		item, err := txn.Get(keyOfVolume)
		if err != nil {
			return err
		}
		held, err = item.ValueCopy(nil)
		return err
	})
	switch {
	case errors.Is(err, badger.ErrKeyNotFound):
		if !fresh {
			return fmt.Errorf("this is another volume: %s says %s, but the chunks beside it belong to none; was %s replaced?", filepath.Join(v.dir, idFile), v.id, chunksDir)
		}
	case err != nil:
		return fmt.Errorf("the id of the volume in %s cannot be read: %w", v.dir, err)
	case fresh: // its making was cut short, or the file was deleted: the chunks keep their id
		v.id = string(held)
	case string(held) != v.id:
		return fmt.Errorf("this is another volume: %s says %s, the chunks beside it belong to %s; were directories mixed up?", filepath.Join(v.dir, idFile), v.id, held)
	}
	if !fresh {
		return nil
	}
	err = v.db.Update(func(txn *badger.Txn) error { return txn.Set(keyOfVolume, []byte(v.id)) })
	if err = errors.Join(err, v.syncer.sync()); err == nil {
		err = durable.WriteFile(filepath.Join(v.dir, idFile), []byte(v.id+"\n"), 0o600)
	}
	if err != nil {
		return fmt.Errorf("a new volume cannot be made in %s: %w", v.dir, err)
	}
	return nil
}

// takeStock counts the chunks and the bytes of the logs, and returns those chunks that
// a crash can have hurt: the last ones written, up to a log's length or a batch's.
func (v *Volume) takeStock() ([]resident, error) {
	if err := v.measureLogs(); err != nil {
		return nil, fmt.Errorf("the value logs in %s cannot be measured: %w", v.dir, err)
	}
	window := newestWindow{limit: max(v.logSize, maxBatchBytes+moveBatch) + 2*chunk.MaxSize}
	err := v.eachIndexed(context.Background(), func(id chunk.ID, size int64, version uint64) error {
		v.chunks++
		v.used += size
		window.add(entry{id, size, version})
		return nil
	})
	newest := window.residents()
	if err == nil {
		next := 0 // both are in the order of ids
		err = v.eachRecord(context.Background(), func(id chunk.ID, at place) error {
			v.space.add(at, chunkSize(at))
			for next < len(newest) && compareIDs(newest[next].id, id) < 0 { // has no record
				next++
			}
			if next < len(newest) && newest[next].id == id {
				newest[next].at = at
			}
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("the index of the chunks in %s cannot be read: %w", v.dir, err)
	}
	return newest, nil
}

// eachIndexed walks the index in the order of ids. The version rises with time.
func (v *Volume) eachIndexed(ctx context.Context, fn func(id chunk.ID, size int64, version uint64) error) error {
	return v.eachIndexedFrom(ctx, chunk.ID{}, fn)
}

// eachIndexedFrom is eachIndexed that begins at an id.
func (v *Volume) eachIndexedFrom(ctx context.Context, from chunk.ID, fn func(id chunk.ID, size int64, version uint64) error) error {
	return v.eachKey(ctx, indexPrefix, from, func(item *badger.Item) error {
		id, size, err := readIndex(item)
		if err != nil {
			return err
		}
		return fn(id, size, item.Version())
	})
}

// eachRecord tells where each chunk's record lies, in the order of ids. It reads
// the tree only.
func (v *Volume) eachRecord(ctx context.Context, fn func(id chunk.ID, at place) error) error {
	return v.eachKey(ctx, chunkPrefix, chunk.ID{}, func(item *badger.Item) error {
		var id chunk.ID
		if key := item.Key(); len(key) != 1+len(id) {
			return fmt.Errorf("the key of a chunk has %d bytes", len(key))
		}
		copy(id[:], item.Key()[1:])
		return fn(id, placeOf(item))
	})
}

func (v *Volume) eachKey(ctx context.Context, prefix byte, from chunk.ID, fn func(*badger.Item) error) error {
	return v.view(func(txn *badger.Txn) error {
		it := txn.NewIterator(keysOnly(prefix))
		defer it.Close()
		for it.Seek(keyOf(prefix, from)); it.Valid(); it.Next() {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := fn(it.Item()); err != nil {
				return err
			}
		}
		return nil
	})
}

func keysOnly(prefix byte) badger.IteratorOptions {
	opt := badger.DefaultIteratorOptions
	opt.PrefetchValues = false
	opt.Prefix = []byte{prefix}
	return opt
}

func readIndex(item *badger.Item) (id chunk.ID, size int64, err error) {
	key := item.Key()
	if len(key) != 1+len(id) {
		return id, 0, fmt.Errorf("an index key has %d bytes", len(key))
	}
	copy(id[:], key[1:])
	err = item.Value(func(val []byte) error {
		if len(val) != 4 {
			return fmt.Errorf("the index entry of %s has %d bytes", id, len(val))
		}
		size = int64(binary.BigEndian.Uint32(val))
		return nil
	})
	return id, size, err
}

type entry struct {
	id      chunk.ID
	size    int64
	version uint64
}

// newestWindow keeps the newest entries whose sizes add up to limit, in a heap
// with the oldest on top.
type newestWindow struct {
	limit   int64
	bytes   int64
	entries []entry
}

func (w *newestWindow) Len() int           { return len(w.entries) }
func (w *newestWindow) Less(i, j int) bool { return w.entries[i].version < w.entries[j].version }
func (w *newestWindow) Swap(i, j int)      { w.entries[i], w.entries[j] = w.entries[j], w.entries[i] }
func (w *newestWindow) Push(x any)         { w.entries = append(w.entries, x.(entry)) }
func (w *newestWindow) Pop() any {
	last := w.entries[len(w.entries)-1]
	w.entries = w.entries[:len(w.entries)-1]
	return last
}

func (w *newestWindow) add(e entry) {
	heap.Push(w, e)
	w.bytes += e.size
	for w.bytes-w.entries[0].size >= w.limit {
		w.bytes -= heap.Pop(w).(entry).size
	}
}

// residents are the chunks in the window, in the order of ids.
func (w *newestWindow) residents() []resident {
	all := make([]resident, len(w.entries))
	for i, e := range w.entries {
		all[i] = resident{id: e.id, size: e.size}
	}
	slices.SortFunc(all, func(a, b resident) int { return compareIDs(a.id, b.id) })
	return all
}

func compareIDs(a, b chunk.ID) int { return bytes.Compare(a[:], b[:]) }

// Erase removes a volume for good: its chunks first and its id last, so that one
// that was cut off is found and erased again. A directory that is missing or
// holds no volume is left as it is. It refuses one that a process has open.
func Erase(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, idFile)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("the volume %s cannot be erased: %w", dir, err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	for _, name := range []string{chunksDir, ballastFile, syncFailedFile, idFile} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("the volume %s cannot be erased: %w", dir, err)
		}
	}
	return nil
}
