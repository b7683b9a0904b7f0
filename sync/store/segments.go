package store

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// segments is the log of a volume: what is written goes to the end of the newest one.
// It belongs to the committer, once that runs.
type segments struct {
	dir   string
	from  origin
	limit int64 // bytes at which a segment is full
	hooks hooks
	home  os.FileInfo // the directory when the volume was opened

	// file is the newest segment. It stays open, so that an error of the kernel's own
	// writing is told by the next sync. nil: the next record begins one.
	file    *os.File
	number  uint32
	length  int64
	begun   int64  // up to there the disk was told to begin
	kept    int64  // up to there it has blocks, if the file system gave them
	content []byte // its table of contents so far
	drops   int64  // bytes of its records of drops
	named   bool   // its directory entry is durable
	seq     uint64 // of the last record
	durable uint64 // of the last record that is durable
	broken  bool   // a sync has failed: what is on disk is not known any more
	sealed  []seal // since these were last asked for
	written int64  // bytes, since the volume was opened
}

// seal is a segment that was ended.
type seal struct {
	segment uint32
	length  int64
	meta    int64 // bytes of it that are not records of chunks or drops
	drops   int64 // bytes of records of drops
}

// entry is a record that is to be written, and its bytes.
type entry struct {
	record
	data []byte
}

func segmentName(number uint32) string {
	digits := strconv.FormatUint(uint64(number), 10)
	return strings.Repeat("0", max(0, 6-len(digits))) + digits + segmentEnding
}

const segmentEnding = ".seg"

// segmentsIn lists the numbers of the segments in a directory, oldest first.
func segmentsIn(dir string) ([]uint32, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []uint32
	for _, e := range entries {
		digits, ok := strings.CutSuffix(e.Name(), segmentEnding)
		if n, err := strconv.ParseUint(digits, 10, 32); ok && err == nil && n > 0 {
			all = append(all, uint32(n))
		}
	}
	slices.Sort(all)
	return all, nil
}

// begin makes the next segment.
func (l *segments) begin() error {
	number := l.number + 1
	f, err := os.OpenFile(filepath.Join(l.dir, segmentName(number)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	head := l.from.head(number)
	if n, err := l.hooks.pwritev(int(f.Fd()), [][]byte{head}, 0); err != nil || n < len(head) {
		return errors.Join(cmp.Or(err, io.ErrShortWrite), f.Close(), os.Remove(f.Name()))
	}
	l.file, l.number, l.length, l.begun, l.kept, l.content, l.drops, l.named = f, number, segmentHead, 0, 0, nil, 0, false
	return nil
}

// end writes the table of contents of the newest segment, makes all of it durable, and
// leaves it.
func (l *segments) end() error {
	if len(l.content) > 0 {
		l.seq++
		r := record{place: place{spot{l.number, uint32(l.length)}, uint32(len(l.content))}, kind: kindSeal, id: contentID(l.content), seq: l.seq, durable: l.durable}
		all := [][]byte{r.appendHead(nil, l.from.mark), l.content, foot(l.from.mark, r.at)}
		if err := l.write(all); err != nil {
			return err
		}
		l.sealed = append(l.sealed, seal{l.number, l.length, segmentHead + r.length() + segmentFoot, l.drops})
	}
	if err := l.sync(); err != nil {
		return err
	}
	return l.close()
}

// keep has the file system find blocks before they are written to, many at a time: the syncs
// that follow have less to write (docs/developer.md). Without, all works as well.
func (l *segments) keep() {
	if l.length+keepBytes/2 < l.kept {
		return
	}
	from := max(l.kept, l.length)
	l.kept = from + keepBytes
	_ = unix.Fallocate(int(l.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, from, keepBytes)
}

const keepBytes = 8 << 20

// makeFit begins the next segment if one more record does not belong into the newest.
func (l *segments) makeFit(length int64) error {
	if l.file != nil {
		if len(l.content) == 0 || l.length+length <= l.limit && len(l.content) < segmentRecords*contentBytes {
			return nil
		}
		if err := l.end(); err != nil {
			return err
		}
	}
	return l.begin()
}

// add appends records, and fills in where they lie and their numbers. The disk begins
// with one part of them while the next is written.
func (l *segments) add(all []entry) error {
	heads := make([]byte, 0, len(all)*recordHead)
	for len(all) > 0 {
		if err := l.makeFit(all[0].length()); err != nil {
			return err
		}
		n, at := 0, l.length
		var parts [][]byte
		content, drops := l.content, l.drops
		for n < len(all) && at-l.length < partBytes && len(parts) < maxParts {
			e := &all[n]
			if n > 0 && (at+e.length() > l.limit || len(content) >= segmentRecords*contentBytes) {
				break
			}
			l.seq++
			e.seq, e.durable, e.spot = l.seq, l.durable, spot{l.number, uint32(at)}
			from := len(heads)
			heads = e.appendHead(heads, l.from.mark)
			content = e.appendContent(content)
			if e.kind == kindDrop {
				drops += e.length()
			}
			parts = append(parts, heads[from:len(heads):len(heads)], e.data)
			at += e.length()
			n++
		}
		if err := l.write(parts); err != nil {
			return err
		}
		l.content, l.drops, all = content, drops, all[n:]
	}
	return nil
}

const maxParts = 512 // of one system call; the kernel takes 1024

// write appends bytes to the newest segment.
func (l *segments) write(parts [][]byte) error {
	l.keep()
	for len(parts) > 0 {
		if len(parts[0]) == 0 {
			parts = parts[1:]
			continue
		}
		n, err := l.hooks.pwritev(int(l.file.Fd()), parts, l.length)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("write "+l.file.Name(), err)
		}
		l.length, l.written = l.length+int64(n), l.written+int64(n)
		for n > 0 {
			k := min(n, len(parts[0]))
			if parts[0], n = parts[0][k:], n-k; len(parts[0]) == 0 {
				parts = parts[1:]
			}
		}
	}
	return l.beginWriting()
}

// beginWriting has the disk begin with what was written since the last sync, if that is
// much, and does not wait for it. The last page is left out: who writes more to it then,
// or syncs it, would wait for the disk twice. Only an error of writing is one.
func (l *segments) beginWriting() error {
	end := l.length &^ (pageBytes - 1)
	if end-l.begun < partBytes {
		return nil
	}
	err := unix.SyncFileRange(int(l.file.Fd()), l.begun, end-l.begun, unix.SYNC_FILE_RANGE_WRITE)
	if err == nil || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		l.begun = end
		return nil
	}
	return fmt.Errorf("write %s: %w", l.file.Name(), err)
}

const pageBytes = 4096

// sync makes everything durable that was added.
func (l *segments) sync() (err error) {
	defer func() { l.broken = l.broken || err != nil }()
	now, err := os.Stat(l.dir)
	if err != nil {
		return err
	}
	if !os.SameFile(now, l.home) { // what is written goes where no next start looks
		return fmt.Errorf("another directory lies at %s now: was a disk swapped, or mounted over it?", l.dir)
	}
	if err := l.hooks.fdatasync(l.file); err != nil {
		return err
	}
	if !l.named {
		if err := l.hooks.fsync(l.dir); err != nil {
			return err
		}
		l.named = true
	}
	l.durable, l.begun = l.seq, l.length
	return nil
}

// point is an end that the log can be taken back to.
type point struct {
	number  uint32
	open    bool // else the next record begins a segment
	length  int64
	content []byte
	drops   int64
}

func (l *segments) point() point {
	return point{l.number, l.file != nil, l.length, l.content, l.drops}
}

// back takes away, durably, what was added behind a point, and tells whether it did: else a
// power cut could bring a part of it back. It does not after a failed sync. If a segment was
// ended or begun since, the next record begins another: no number is used twice, so that
// nothing which a cut has left of the one that was taken away fits into it.
func (l *segments) back(p point) bool {
	if l.broken {
		return false
	}
	l.sealed = nil
	if l.file != nil && l.number == p.number {
		if l.file.Truncate(p.length) != nil {
			return false
		}
		l.length, l.content, l.drops = p.length, p.content, p.drops
		l.begun, l.kept = min(l.begun, l.length), 0
		return l.sync() == nil
	}
	if l.close() != nil {
		return false
	}
	l.content, l.drops = nil, 0
	for n := l.number; n > p.number; n-- {
		if err := l.remove(n); err != nil {
			return false
		}
	}
	if !p.open {
		return true
	}
	path := filepath.Join(l.dir, segmentName(p.number))
	if os.Truncate(path, p.length) != nil || l.hooks.fsync(path) != nil {
		return false
	}
	l.sealed = []seal{{p.number, p.length, segmentHead, p.drops}}
	return true
}

// remove deletes a segment, durably.
func (l *segments) remove(number uint32) error {
	if err := os.Remove(filepath.Join(l.dir, segmentName(number))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return l.hooks.fsync(l.dir)
}

// close leaves the newest segment, and gives back what it has and does not need.
func (l *segments) close() error {
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	if l.kept > l.length {
		_ = f.Truncate(l.length) // if not now, the next opening does it
	}
	return f.Close()
}

// fdatasync flushes what was written to a file, its length included.
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
