package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dgraph-io/badger/v4"
)

// syncer makes everything written to a Badger directory durable. It belongs to
// the committer, which calls it while nothing is being written.
//
// What Badger's DB.Sync leaves out:
//
//   - The write-ahead log of a memtable that a write has just rotated out. Its
//     entries are durable only once it is flushed to a table, some time later.
//   - The directory entries of new logs.
//
// A rotated value log is synced by Badger itself when it is cut to its length,
// and an error there fails the write.
type syncer struct {
	dir   string
	db    *badger.DB
	hooks hooks
	// clean is the directory's modification time when all but DB.Sync was last
	// done. Files that come or go change it.
	clean time.Time
	home  os.FileInfo // the directory when the volume was opened
}

// racy is the time within which two changes of a directory may carry the same
// modification time, with a wide margin for the kernel's coarse clock.
const racy = time.Second

func (s *syncer) sync() error {
	info, err := os.Stat(s.dir)
	if err != nil {
		return err
	}
	if s.home == nil {
		s.home = info
	}
	if !os.SameFile(info, s.home) { // what is written goes where no next start looks
		return fmt.Errorf("another directory lies at %s now: was a disk swapped, or mounted over it?", s.dir)
	}
	if err := s.hooks.sync(s.db); err != nil {
		return err
	}
	if info.ModTime().Equal(s.clean) {
		return nil
	}
	if err := s.syncRotated(); err != nil {
		return err
	}
	s.clean = time.Time{}
	if age := time.Since(info.ModTime()); age > racy {
		s.clean = info.ModTime()
	}
	return nil
}

// syncRotated syncs the logs of memtables but the current one, then the
// directory. A log that vanishes meanwhile has become a synced table.
func (s *syncer) syncRotated() error {
	logs, err := filesOf(s.dir, ".mem")
	if err != nil {
		return err
	}
	for _, path := range logs[:max(0, len(logs)-1)] {
		if err := s.hooks.fsync(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return s.hooks.fsync(s.dir)
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

// fsync flushes a file or directory, whoever wrote to it.
func fsync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	return nil
}

func bootID() (string, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(raw)), err
}
