package jobs

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

const defaultModuleBytes = 256 << 20

// moduleCache keeps modules on disk under their digests. A file there was once
// whole and verified; the worker checks it again before it runs.
type moduleCache struct {
	dir string
	max int64 // bytes

	mu   sync.Mutex
	used map[string]*use // modules that jobs hold or fetch, by digest
}

// use is one module in the hands of jobs.
type use struct {
	holders  int
	fetching chan struct{} // holds one token while somebody fetches it
}

func openModuleCache(dir string, maxBytes int64) (*moduleCache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// What a crash left half fetched.
	left, err := filepath.Glob(filepath.Join(dir, ".fetch-*"))
	if err != nil {
		return nil, err
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	if maxBytes <= 0 {
		maxBytes = defaultModuleBytes
	}
	return &moduleCache{dir: dir, max: maxBytes, used: make(map[string]*use)}, nil
}

// get returns the path of a module, which it fetches if it must; jobs that
// want the same at the same time fetch it once. The file stays until release.
func (c *moduleCache) get(ctx context.Context, b wire.Blob, fetch func(context.Context, wire.Blob, io.Writer) error) (path string, release func(), err error) {
	u := c.hold(b.SHA256)
	defer func() {
		if err != nil {
			c.release(b.SHA256)
		}
	}()
	select {
	case u.fetching <- struct{}{}:
		defer func() { <-u.fetching }()
	case <-ctx.Done():
		return "", nil, fmt.Errorf("the job was stopped while its module was fetched: %w", context.Cause(ctx))
	}
	path, release = c.path(b.SHA256), func() { c.release(b.SHA256) }
	if st, err := os.Stat(path); err == nil && st.Size() == b.Size {
		now := time.Now()
		_ = os.Chtimes(path, now, now) // only spoils the order of deleting
		return path, release, nil
	}
	if err := c.store(ctx, b, fetch); err != nil {
		return "", nil, err
	}
	c.prune()
	return path, release, nil
}

// store fetches a module to a temporary file, verifies it, and only then gives
// it its name.
func (c *moduleCache) store(ctx context.Context, b wire.Blob, fetch func(context.Context, wire.Blob, io.Writer) error) error {
	f, err := os.CreateTemp(c.dir, ".fetch-*")
	if err != nil {
		return diskProblem("the job's module", err)
	}
	defer os.Remove(f.Name()) // gone already if all went well
	defer f.Close()
	h := sha256.New()
	n := &counter{w: io.MultiWriter(f, h), left: b.Size}
	if err := fetch(ctx, b, n); err != nil {
		if n.err != nil {
			return n.err
		}
		return err
	}
	if sum := hex.EncodeToString(h.Sum(nil)); n.left != 0 || sum != b.SHA256 {
		return wire.FailedBecause(wire.CodeMismatch, "the module fetched has %d bytes and the SHA-256 %s, the order names %d and %s; publish it again",
			b.Size-n.left, sum, b.Size, b.SHA256)
	}
	if err := f.Sync(); err != nil {
		return diskProblem("the job's module", err)
	}
	if err := os.Rename(f.Name(), c.path(b.SHA256)); err != nil {
		return diskProblem("the job's module", err)
	}
	return nil
}

// counter passes on what it may, and remembers why it no longer does.
type counter struct {
	w    io.Writer
	left int64
	err  *wire.Problem
}

func (c *counter) Write(p []byte) (int, error) {
	if int64(len(p)) > c.left {
		c.err = wire.FailedBecause(wire.CodeMismatch, "the module is longer than the order says; publish it again")
		return 0, c.err
	}
	n, err := c.w.Write(p)
	c.left -= int64(n)
	if err != nil {
		c.err = diskProblem("the job's module", err)
		return n, c.err
	}
	return n, nil
}

func diskProblem(what string, err error) *wire.Problem {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return wire.FailedBecause(wire.CodeNoSpace, "there is no space left on the device for %s: %v", what, err)
	}
	return wire.FailedBecause(wire.CodeInternal, "%s cannot be kept: %v", what, err)
}

func (c *moduleCache) path(digest string) string { return filepath.Join(c.dir, digest) }

func (c *moduleCache) hold(digest string) *use {
	c.mu.Lock()
	defer c.mu.Unlock()
	u := c.used[digest]
	if u == nil {
		u = &use{fetching: make(chan struct{}, 1)}
		c.used[digest] = u
	}
	u.holders++
	return u
}

func (c *moduleCache) release(digest string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	u := c.used[digest]
	if u.holders--; u.holders == 0 {
		delete(c.used, digest)
	}
}

// forget deletes a module that does not verify. Workers that have it open keep it.
func (c *moduleCache) forget(digest string) {
	_ = os.Remove(c.path(digest)) // if it stays, the next job finds it bad again
}

// prune deletes the least recently used modules that no job holds until the
// rest fits.
func (c *moduleCache) prune() {
	c.mu.Lock()
	defer c.mu.Unlock()
	entries, _ := os.ReadDir(c.dir)
	var files []os.FileInfo
	var total int64
	for _, e := range entries {
		if info, err := e.Info(); err == nil && !strings.HasPrefix(e.Name(), ".") {
			files, total = append(files, info), total+info.Size()
		}
	}
	slices.SortFunc(files, func(a, b os.FileInfo) int {
		return cmp.Or(a.ModTime().Compare(b.ModTime()), cmp.Compare(a.Name(), b.Name()))
	})
	for _, f := range files {
		if total <= c.max {
			return
		}
		if c.used[f.Name()] == nil && os.Remove(c.path(f.Name())) == nil {
			total -= f.Size()
		}
	}
}
