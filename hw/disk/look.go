package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/hw"
)

const (
	lookLimit   = 1500 * time.Millisecond // for one disk
	maxEntries  = 4096                    // of one folder that are read
	maxForeign  = 3                       // names that a person is shown
	maxMeasured = 20000                   // files whose sizes are added up
)

var errRecorded = errors.New("this is a recorded machine, whose disks are not here")

// sight is what a look at a filesystem shows.
type sight struct {
	fsid    string   // "" if it was not read
	asleep  bool     // and so not looked at
	ours    bool     // has our folder, or an empty one for us
	used    int64    // bytes in it
	foreign []string // names of what is neither ours nor the filesystem's own, a few
	err     error    // what an owner is told
}

// lookAt looks at a filesystem, but for no longer than a disk may take. Of one
// that hangs, one thread is left behind, however often it is looked at. The
// identity of a filesystem is in memory while it is mounted; asking for it
// wakes no disk.
func lookAt(disk, mount, dir string, asleep bool) sight {
	s, ok := hw.Within(context.Background(), lookLimit, "chunks on "+disk+" "+mount, func() sight {
		s := sight{asleep: asleep}
		if s.fsid, s.err = fsidOf(mount); s.err == nil && !asleep {
			s.read(mount, dir)
		}
		if s.err != nil {
			s.err = fmt.Errorf("it could not be looked at: %w", s.err)
		}
		return s
	})
	if !ok {
		return sight{err: errors.New("it did not answer in time; the disk or its cable may be failing")}
	}
	return s
}

// fsidOf is the kernel's identity of a filesystem, in hex: for ext4, btrfs and
// f2fs made from its UUID, for xfs and vfat the number of its device, so that
// these may count as new after the disks were plugged in differently.
func fsidOf(path string) (string, error) {
	var st unix.Statfs_t
	for {
		err := unix.Statfs(path, &st)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return "", &fs.PathError{Op: "statfs", Path: path, Err: err}
		}
		return fmt.Sprintf("%08x%08x", uint32(st.Fsid.Val[0]), uint32(st.Fsid.Val[1])), nil
	}
}

func (s *sight) read(mount, dir string) {
	d, err := os.Open(mount)
	if err != nil {
		s.err = err
		return
	}
	defer d.Close()
	entries, err := d.ReadDir(maxEntries)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
		return
	}
	s.ours = isOurs(dir)
	for _, e := range entries {
		switch name := e.Name(); {
		case name == "lost+found" && e.IsDir():
		case filepath.Join(mount, name) == dir && s.ours:
		case len(s.foreign) < maxForeign:
			s.foreign = append(s.foreign, shown(name))
		}
	}
	slices.Sort(s.foreign)
	if s.ours {
		s.used = measure(dir)
	}
}

// volumeFile is what the store calls the file with a volume's id.
const volumeFile = "VOLUME"

// isOurs tells whether a folder may be written to: it holds a volume, or only
// what one whose making was cut short leaves, which may be nothing. An owner's
// folder that has our name by chance is foreign, as is a symbolic link.
func isOurs(dir string) bool {
	if st, err := os.Lstat(dir); err != nil || !st.IsDir() {
		return false
	}
	if st, err := os.Lstat(filepath.Join(dir, volumeFile)); err == nil {
		return st.Mode().IsRegular()
	}
	entries, err := os.ReadDir(dir)
	return err == nil && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
		return !slices.Contains([]string{testFile, "chunks", "ballast", "lost+found"}, e.Name())
	})
}

// measure adds up what our folder takes. It ends after so many files: the
// store has few.
func measure(dir string) (sum int64) {
	n := 0
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if n++; n > maxMeasured {
			return fs.SkipAll
		}
		if err != nil || !e.Type().IsRegular() {
			return nil // what cannot be read is not counted, and capacity the smaller for it
		}
		if info, err := e.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok { // what it takes, which for a file with holes is less than its length
				sum += st.Blocks * 512
			}
		}
		return nil
	})
	return sum
}

// shown makes a name from a disk fit for a message.
func shown(name string) string {
	name = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return '?'
		}
		return r
	}, name)
	if r := []rune(name); len(r) > 40 {
		return string(r[:40]) + "…"
	}
	return name
}
