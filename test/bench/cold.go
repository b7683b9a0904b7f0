package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe" // for mincore(2), which golang.org/x/sys has no call for

	"golang.org/x/sys/unix"
)

// How what lies on a disk is taken out of the page cache: file by file, which
// needs no root and leaves the rest of the machine alone, as dropping all caches
// would not. It is counted afterwards what is still there.

// warmShare is how much of it may stay: a page that somebody touches meanwhile.
const warmShare = 0.02

// errWarm is why there is no row of cold reads.
type errWarm struct{ share float64 }

func (e errWarm) Error() string {
	return fmt.Sprintf("%.0f%% of it cannot be taken out of the page cache (is %s in memory?)", 100*e.share, os.TempDir())
}

func isWarm(err error) bool {
	var w errWarm
	return errors.As(err, &w)
}

// cooled is a measurement that begins with nothing below dir in memory.
func cooled(dir string, measure func() (float64, error)) func() (float64, error) {
	return func() (float64, error) {
		if err := cool(dir); err != nil {
			return 0, err
		}
		return measure()
	}
}

// cool writes what is below dir to the disk and takes it out of the page cache,
// of what this process has mapped, too.
func cool(dir string) error {
	var files []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, path := range files {
		if err := onFile(path, func(fd int, _ int64) error { return unix.Fsync(fd) }); err != nil {
			return err
		}
	}
	if err := letGo(dir); err != nil {
		return err
	}
	var there, all int64
	for _, path := range files {
		err := onFile(path, func(fd int, size int64) error {
			if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
				return err
			}
			n, err := resident(fd, size)
			there += n
			return err
		})
		if err != nil {
			return err
		}
		all += allocated(path)
	}
	if share := float64(there) / float64(max(all, 1)); share > warmShare {
		return errWarm{share}
	}
	return nil
}

func onFile(path string, do func(fd int, size int64) error) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0) // mincore tells nothing of what one may not write
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the store has joined it with another
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := do(int(f.Fd()), info.Size()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func allocated(path string) int64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// letGo has the kernel take back the pages of files below dir that this process
// has mapped; mapped ones are left in the page cache otherwise. MADV_PAGEOUT
// alters nothing, whatever is mapped there by then.
func letGo(dir string) error {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		span, rest, _ := strings.Cut(lines.Text(), " ")
		if !strings.Contains(rest, dir+"/") {
			continue
		}
		from, to, _ := strings.Cut(span, "-")
		a, err1 := strconv.ParseUint(from, 16, 64)
		b, err2 := strconv.ParseUint(to, 16, 64)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(a), uintptr(b-a), unix.MADV_PAGEOUT) // what stays is counted
	}
	return lines.Err()
}

// resident is how many bytes of a file are in the page cache.
func resident(fd int, size int64) (bytes int64, err error) {
	if size == 0 {
		return 0, nil
	}
	mapped, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	page := int64(os.Getpagesize())
	in := make([]byte, (size+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapped[0])), uintptr(size), uintptr(unsafe.Pointer(&in[0])))
	err = unix.Munmap(mapped)
	if errno != 0 {
		return 0, errno
	}
	for _, b := range in {
		bytes += int64(b&1) * page
	}
	return bytes, err
}
