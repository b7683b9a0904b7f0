package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
)

// What cannot be read of a segment at opening may be a cable that is mended tomorrow, or a sector
// that is gone. Nothing is decided of it, and nothing written, until the machine has booted again.
// What cannot be read then, either, is written over, so that the decision is in the segment itself:
// whoever reads it later, and whatever becomes of the index, finds the same. The heads of records
// that the index knows are written again: what belongs to them may be whole.

// doubts is what is known of segments that could not be read, and of this opening.
type doubts struct {
	boot   string
	noted  map[uint32]string // segment: the boot id under which it could not be read
	before map[uint32]string // the same, as it was noted
	now    map[uint32]string // the same, as it is to be noted
	failed bool              // something could not be read and nothing was decided: what is not in the index may be there
}

// readDoubts reads the note. One that cannot be read, or is damaged, is none.
func (v *Volume) readDoubts() doubts {
	d := doubts{noted: map[uint32]string{}, now: map[uint32]string{}}
	var err error
	if d.boot, err = v.opt.hooks.bootID(); err != nil {
		v.opt.Log.Error("which boot this is cannot be told", "volume", v.id, "err", err)
	}
	raw, err := os.ReadFile(filepath.Join(v.dir, readFailedFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		v.opt.Log.Error("what could not be read earlier is not known", "volume", v.id, "err", err)
	}
	for line := range strings.Lines(string(raw)) {
		boot, number, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(number, 10, 32); err == nil {
			d.noted[uint32(n)] = boot
		}
	}
	d.before = maps.Clone(d.noted)
	return d
}

// noteDoubts writes down what is still in doubt.
func (v *Volume) noteDoubts() {
	if maps.Equal(v.doubts.before, v.doubts.now) {
		return
	}
	path := filepath.Join(v.dir, readFailedFile)
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if len(v.doubts.now) > 0 {
		var b strings.Builder
		for n, boot := range v.doubts.now {
			fmt.Fprintln(&b, boot, n)
		}
		err = durable.WriteFile(path, []byte(b.String()), 0o600)
	}
	if err != nil {
		v.opt.Log.Error("which segments could not be read could not be noted on disk", "volume", v.id, "err", err)
	}
}

// hesitate is called when a segment was read. If a part could not be, the volume is read-only,
// without any receipt, until the next boot; or that part is written over, and counts as damaged:
// the segment is to be read again then.
func (v *Volume) hesitate(s *scan) (again bool) {
	if s.fault == nil {
		return false
	}
	boot, known := v.doubts.noted[s.number]
	why := "cannot be read then counts as damaged"
	if known && boot != v.doubts.boot && v.doubts.boot != "" && !s.passing && v.readOnly == "" {
		err := v.writeOver(s)
		if err == nil {
			v.opt.Log.Warn("a part of a segment cannot be read, and could not before the machine started: what was there counts as damaged", "volume", v.id, "segment", s.number, "bytes", len(s.holes)*badBytes, "err", s.fault)
			s.fault, s.holes = nil, nil
			delete(v.doubts.noted, s.number) // what cannot be read now is something else
			return true
		}
		v.opt.Log.Error("a part of a segment can neither be read nor written over", "volume", v.id, "segment", s.number, "err", err)
		v.noteFailedSync()
		why = "can neither be read nor written over ends the volume: replace the disk"
	}
	if !known {
		boot = v.doubts.boot
	}
	if boot != "" {
		v.doubts.now[s.number] = boot
	}
	v.doubts.failed = true
	v.latchAll(fmt.Sprintf("a part of segment %d could not be read when it was opened (%v): check the disk, its cable and its power, and restart the machine; what %s", s.number, s.fault, why))
	return false
}

// writeOver puts zeros where a segment cannot be read, durably: a disk puts another sector there.
// A whole page is written, so that the kernel need not read the rest of it.
func (v *Volume) writeOver(s *scan) error {
	f, err := os.OpenFile(filepath.Join(v.log.dir, segmentName(s.number)), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	write := func(b []byte, at int64) error {
		n, err := v.opt.hooks.pwritev(int(f.Fd()), [][]byte{b}, at)
		if err == nil && n < len(b) {
			err = io.ErrShortWrite
		}
		return err
	}
	for at := range s.holes {
		err = errors.Join(err, write(make([]byte, badBytes), at))
	}
	if err == nil {
		err = v.rewriteHeads(s, write)
	}
	if err == nil {
		err = errors.Join(f.Truncate(s.size), v.opt.hooks.fdatasync(f))
	}
	for at := range s.holes {
		if err != nil {
			break
		}
		_ = unix.Fadvise(int(f.Fd()), at, badBytes, unix.FADV_DONTNEED) // what is read is to come from the disk
		_, err = s.fill(at, int(min(badBytes, s.size-at)))
	}
	s.buf = s.buf[:0]
	return errors.Join(err, f.Close())
}

// rewriteHeads writes what the index knows of the pages that were written over.
func (v *Volume) rewriteHeads(s *scan, write func(b []byte, at int64) error) error {
	if s.holes[0] {
		if err := write(v.log.from.head(s.number), 0); err != nil {
			return err
		}
	}
	return v.index.each(context.Background(), func(r resident) error {
		first, last := int64(r.at.at), int64(r.at.at)+recordHead-1
		if r.at.segment != s.number || !s.holes[first-first%badBytes] && !s.holes[last-last%badBytes] {
			return nil
		}
		lost := record{place: r.at, kind: kindChunk, id: r.id} // its number, and what it took the place of, is not known
		return write(lost.appendHead(nil, v.log.from.mark), first)
	})
}
