package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

var errBusy = errors.New("another self-test runs there; wait until it has ended")

// file is the medium of a test on a real disk.
type file struct {
	path string
	f    *os.File
	raw  *os.File // the same with O_DIRECT, once Forget was asked; nil if that does not work
}

// openTestFile makes the test's file, or takes over what a crash has left. It
// holds a lock on it, so that two tests do not share it.
func openTestFile(dir string) (*file, error) {
	path := filepath.Join(dir, testFile)
	for range 3 {
		f, made, err := create(path)
		if errors.Is(err, fs.ErrNotExist) && dirExists(dir) { // removed meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		if held, err := lock(f, path, made); held || err != nil {
			if err != nil {
				f.Close()
				return nil, err
			}
			return &file{path: path, f: f}, nil
		}
		f.Close()
	}
	return nil, errBusy
}

func create(path string) (f *os.File, made bool, err error) {
	const flags = os.O_RDWR | unix.O_NOFOLLOW | unix.O_NONBLOCK
	if f, err = os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, 0o600); err == nil || !errors.Is(err, fs.ErrExist) {
		return f, err == nil, err
	}
	f, err = os.OpenFile(path, flags, 0)
	return f, false, err
}

func dirExists(dir string) bool {
	_, err := os.Stat(dir)
	return err == nil
}

// lock tells whether f is ours now; not if it was removed meanwhile by the one
// that had it. What a crash has left is emptied, so it must not be somebody's
// file, nor have another name as well.
func lock(f *os.File, path string, made bool) (bool, error) {
	opened, err := f.Stat()
	if err != nil {
		return false, err
	}
	if !opened.Mode().IsRegular() {
		return false, errors.New(path + " is in the way and is no file; remove it")
	}
	if st, ok := opened.Sys().(*syscall.Stat_t); ok && !made && (st.Nlink > 1 || int(st.Uid) != os.Geteuid()) {
		return false, errors.New(path + " is in the way: it is not this user's, or has another name as well; remove it")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return false, errBusy
	} else if err != nil {
		return false, err
	}
	named, err := os.Lstat(path)
	if err != nil || !os.SameFile(opened, named) {
		return false, nil
	}
	return true, f.Truncate(0)
}

// remove ends the test. The file is removed while the lock is held.
func (t *file) remove() {
	_ = os.Remove(t.path) // what stays is removed by the next test
	if t.raw != nil {
		t.raw.Close()
	}
	t.f.Close()
}

func (t *file) Write(p []byte, at int64) error {
	_, err := t.f.WriteAt(p, at)
	return err
}

func (t *file) Sync() error { return t.f.Sync() }

// Forget opens the file past the page cache. Where a filesystem does not allow
// that, the kernel is asked to drop the file's pages, all of which are written.
func (t *file) Forget() bool {
	_ = unix.Fadvise(int(t.f.Fd()), 0, 0, unix.FADV_DONTNEED)
	raw, err := os.OpenFile(t.path, os.O_RDONLY|unix.O_DIRECT|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	probe := aligned(small)
	defer unmap(probe)
	if _, err := raw.ReadAt(probe, 0); errors.Is(err, unix.EINVAL) {
		raw.Close()
		return false
	}
	t.raw = raw
	return true
}

func (t *file) Read(p []byte, at int64) error {
	from := t.f
	if t.raw != nil {
		from = t.raw
	}
	_, err := from.ReadAt(p, at)
	if errors.Is(err, io.EOF) {
		return &mismatch{"the file was shorter after it was synced; the disk loses data: replace it"}
	}
	return err
}

// aligned is memory at the beginning of a page, as O_DIRECT wants it.
func aligned(n int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return make([]byte, n) // no page to be had: O_DIRECT may refuse it, which is an error that is shown
	}
	return b
}

func unmap(all ...[]byte) {
	for _, b := range all {
		_ = unix.Munmap(b) // one that make made is the collector's
	}
}
