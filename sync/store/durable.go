package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"
)

// syncer makes everything written to a Badger directory durable. It belongs to
// the committer, which calls it while nothing is being written.
//
// Badger's own DB.Sync is not used. It leaves out the log of a memtable that a write
// has just rotated out, whose entries are durable only once it is flushed to a table,
// some time later, and the directory entries of new logs. And it syncs the tree's log
// and then the value log, where the disk can do both at once. Which of them becomes
// durable first does not matter: nobody relies on one before both are.
//
// Nothing else needs a sync. Badger syncs a table, and the manifest that names it,
// before it deletes the memtable's log.
type syncer struct {
	dir    string
	db     *badger.DB
	hooks  hooks
	home   os.FileInfo // the directory when the volume was opened
	values tail
	trees  tail // logs of memtables
	named  bool // the directory entries of all these logs are durable
}

// newSyncer is for a Badger that has just been opened and has written nothing.
func newSyncer(dir string, db *badger.DB, h hooks) (syncer, error) {
	home, err := os.Stat(dir)
	newest, _ := newestLog(db)
	return syncer{
		dir: dir, db: db, hooks: h, home: home,
		values: tail{name: logName, next: newest},
		trees:  tail{name: memtableName, next: newestMemtable(db)},
	}, err
}

func (s *syncer) sync() error {
	now, err := os.Stat(s.dir)
	if err != nil {
		return err
	}
	if !os.SameFile(now, s.home) { // what is written goes where no next start looks
		return fmt.Errorf("another directory lies at %s now: was a disk swapped, or mounted over it?", s.dir)
	}
	if err := s.follow(); err != nil {
		return err
	}
	// A file system with a journal finds blocks for what is written when it writes it. If
	// all of that is begun before the first sync, one entry in the journal can have it
	// all. It is faster, on ext4 (docs/developer.md).
	logs := slices.Concat(s.values.logs, s.trees.logs)
	for _, f := range logs {
		if err := beginWriting(f); err != nil {
			return err
		}
	}
	var syncs []func() error
	for _, f := range logs {
		syncs = append(syncs, func() error { return s.hooks.fdatasync(f) })
	}
	if !s.named {
		syncs = append(syncs, func() error { return s.hooks.fsync(s.dir) })
	}
	if err := atOnce(syncs); err != nil {
		return err
	}
	s.named = true
	return errors.Join(s.values.keep(1), s.trees.keep(1))
}

// begin has the disk write what is in the newest value log, and does not wait for
// it. Only an error of writing is one.
func (s *syncer) begin() error {
	if err := s.follow(); err != nil {
		return err
	}
	return beginWriting(s.values.logs[len(s.values.logs)-1])
}

// beginWriting has the disk write what is in a file, and does not wait for it.
func beginWriting(f *os.File) error {
	err := unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
	if err == nil || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		return nil
	}
	return fmt.Errorf("write %s: %w", f.Name(), err)
}

// follow finds the logs that were begun since the last sync.
func (s *syncer) follow() error {
	newest, _ := newestLog(s.db)
	values, err := s.values.follow(s.dir, newest)
	if err != nil {
		return err
	}
	trees, err := s.trees.follow(s.dir, newestMemtable(s.db))
	s.named = s.named && values == 0 && trees == 0
	return err
}

// answers returns when the file system can be written to. It is asked before Badger
// writes to a log in mapped memory: who waits there for a disk that hangs (for its
// journal, within a page fault) cannot be stopped for the garbage collector, so all of
// the process would stand still; who waits in a system call holds up nobody. A change
// of the mode to what it is takes the same way through the journal as the write. Why
// it fails, the write and the sync will tell.
func (s *syncer) answers() {
	for _, t := range []*tail{&s.values, &s.trees} {
		if n := len(t.logs); n > 0 {
			if info, err := t.logs[n-1].Stat(); err == nil {
				_ = t.logs[n-1].Chmod(info.Mode())
			}
		}
	}
}

// close lets go of the logs.
func (s *syncer) close() error { return errors.Join(s.values.keep(0), s.trees.keep(0)) }

// tail is the end of Badger's numbered logs of one kind. It appends to the newest only.
type tail struct {
	name func(number uint32) string
	// logs that may hold what is not durable, the newest last. They have descriptors
	// of their own, and for as long, so that an error of the kernel's own writing in
	// the meantime is told.
	logs []*os.File
	next uint32 // the number of the next one
}

// follow opens the logs up to the newest, and returns how many were begun.
func (t *tail) follow(dir string, newest uint32) (begun int, err error) {
	for ; t.next <= newest; t.next++ {
		f, err := os.Open(filepath.Join(dir, t.name(t.next)))
		switch {
		case err == nil:
			t.logs = append(t.logs, f)
			begun++
		case t.next == newest || !errors.Is(err, fs.ErrNotExist): // else it is a durable table already
			return begun, err
		}
	}
	return begun, nil
}

// keep closes all logs but the newest n.
func (t *tail) keep(n int) (err error) {
	for len(t.logs) > n {
		err = errors.Join(err, t.logs[0].Close())
		t.logs = t.logs[1:]
	}
	return err
}

// atOnce runs all jobs and waits for them.
func atOnce(jobs []func() error) error {
	errs := make([]error, len(jobs))
	var all sync.WaitGroup
	for i, job := range jobs {
		all.Go(func() { errs[i] = job() })
	}
	all.Wait()
	return errors.Join(errs...)
}

// syncLeftovers makes durable what a killed process left in the page cache, so
// that a chunk that is found after opening is as good as one just put.
func syncLeftovers(dir string, h hooks) error {
	mems, err := filesOf(dir, ".mem")
	if err != nil {
		return err
	}
	values, err := filesOf(dir, ".vlog")
	if err != nil {
		return err
	}
	// Older value logs were synced when they were rotated out.
	newest := values[max(0, len(values)-2):]
	for _, path := range append(mems, newest...) {
		if err := h.fsync(path); err != nil {
			return err
		}
	}
	return h.fsync(dir)
}

// filesOf lists the files with that ending, oldest first; Badger numbers them.
func filesOf(dir, ending string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ending) {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	slices.SortFunc(paths, func(a, b string) int {
		if len(a) != len(b) { // a number that outgrew its leading zeros
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
	return paths, nil
}

// fdatasync flushes what was written to a log, its length included.
func fdatasync(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("fdatasync "+f.Name(), err)
		}
	}
}

func bootID() (string, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(raw)), err
}
