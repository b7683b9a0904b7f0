package sandbox

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const defaultCacheBytes = 256 << 20

// codeCache is the directory of one module's compiled code. Empty: no cache.
type codeCache struct {
	dir string
	max int64 // bytes of all modules' directories together
}

// openCodeCache makes the module's directory the newest of the cache.
func (r *Runner) openCodeCache(s Spec, module *os.File) (codeCache, error) {
	if s.CacheDir == "" {
		return codeCache{}, nil
	}
	digest := s.Digest
	if !isDigest(digest) {
		var err error
		if digest, err = moduleDigest(module); err != nil {
			return codeCache{}, failure(WorkerFailed, "the module cannot be read: %v", err)
		}
	}
	root, err := filepath.Abs(s.CacheDir) // the worker's directory is another
	if err != nil {
		return codeCache{}, failure(WorkerFailed, "the cache of compiled code cannot be found: %v", err)
	}
	dir := filepath.Join(root, digest)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		// A full or broken disk must not stop jobs that need none.
		return codeCache{}, nil
	}
	now := time.Now()
	_ = os.Chtimes(dir, now, now) // only spoils the order of deleting
	return codeCache{dir: dir, max: orDefault(r.CacheBytes, defaultCacheBytes)}, nil
}

// moduleDigest hashes a module, and leaves it at its beginning.
func moduleDigest(module *os.File) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(module, 0, MaxModule)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// done deletes this module's code if it was broken, and the least recently
// used of the others' while all together are too large.
func (c codeCache) done(broken bool) {
	if c.dir == "" {
		return
	}
	if broken {
		_ = os.RemoveAll(c.dir)
	}
	c.sweep()
	type entry struct {
		path string
		size int64
		used time.Time
	}
	var all []entry
	var total int64
	root := filepath.Dir(c.dir)
	dirs, _ := os.ReadDir(root)
	for _, d := range dirs {
		info, err := d.Info()
		if err != nil || !d.IsDir() || !isDigest(d.Name()) {
			continue
		}
		e := entry{filepath.Join(root, d.Name()), treeBytes(filepath.Join(root, d.Name())), info.ModTime()}
		all, total = append(all, e), total+e.size
	}
	slices.SortFunc(all, func(a, b entry) int { return a.used.Compare(b.used) })
	for _, e := range all {
		if total <= c.max {
			return
		}
		// A worker that is about to load it compiles instead.
		if os.RemoveAll(e.path) == nil {
			total -= e.size
		}
	}
}

// unfinished is from when on a file of compiled code that has not got its name yet
// is one of a worker that was killed while it wrote it.
const unfinished = time.Hour

// sweep removes what killed workers have left of this module.
func (c codeCache) sweep() {
	left, _ := filepath.Glob(filepath.Join(c.dir, "*", "*.tmp")) // wazero's names; the pattern is good
	for _, path := range left {
		if info, err := os.Lstat(path); err == nil && time.Since(info.ModTime()) > unfinished {
			_ = os.Remove(path) // else the bound of all code counts it
		}
	}
}

// treeBytes is the size of all files below a directory, in bytes.
func treeBytes(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // deleted meanwhile
		}
		if err != nil {
			return err
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
		return nil
	})
	return n
}

func isDigest(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size && hex.EncodeToString(b) == s
}
