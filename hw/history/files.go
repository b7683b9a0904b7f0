package history

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/deimos-edge/deimos/internal/durable"
)

var (
	magic      = []byte("DHR1")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

const (
	recordHead = 12
	maxBody    = 4 << 20
	segments   = 16 // that the budget is divided into
	maxSegment = 16 << 20
)

// files is one ring of segments on disk.
type files struct {
	dir, prefix string
	budget      int64
	damaged     int64 // bytes of what was scanned that were no record
	segs        []*segment
	out         *os.File // the last segment; nil until something is written
}

type segment struct {
	number uint64
	size   int64
	refs   []ref
}

// ref is where a record lies.
type ref struct {
	head
	segment uint64
	at      int64 // of its body
	size    int
	sum     uint32
}

func newFiles(dir, prefix string, budget int64) *files {
	return &files{dir: dir, prefix: prefix, budget: budget}
}

func (f *files) path(number uint64) string {
	return filepath.Join(f.dir, fmt.Sprintf("%s-%016x.seg", f.prefix, number))
}

// scan finds the segments and their records. A segment that cannot be read is left out.
func (f *files) scan() error {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), f.prefix+"-")
		digits, seg := strings.CutSuffix(digits, ".seg")
		number, err := strconv.ParseUint(digits, 16, 63)
		if !ok || !seg || err != nil || len(digits) != 16 || !e.Type().IsRegular() {
			continue
		}
		raw, err := readSome(f.path(number), maxSegment)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) { // which another process may have removed
				f.segs = append(f.segs, &segment{number: number, size: maxSegment}) // not to be written to
			}
			continue
		}
		s := &segment{number: number, size: int64(len(raw))}
		good := int64(0)
		records(raw, func(r ref) {
			r.segment = number
			s.refs = append(s.refs, r)
			good += recordHead + int64(r.size)
		})
		f.damaged += s.size - good
		f.segs = append(f.segs, s)
	}
	slices.SortFunc(f.segs, func(a, b *segment) int { return cmp.Compare(a.number, b.number) })
	return nil
}

func readSome(path string, most int64) ([]byte, error) {
	in, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	return io.ReadAll(io.LimitReader(in, most))
}

// records finds the records in a file that may hold anything between them.
func records(raw []byte, take func(ref)) {
	for at := 0; ; {
		skip := bytes.Index(raw[at:], magic)
		if skip < 0 {
			return
		}
		at += skip
		body, sum, ok := record(raw[at:])
		if !ok {
			at++
			continue
		}
		if h, err := decodeHead(body); err == nil {
			take(ref{head: h, at: int64(at + recordHead), size: len(body), sum: sum})
		}
		at += recordHead + len(body)
	}
}

// record reads the record at the beginning of raw.
func record(raw []byte) (body []byte, sum uint32, ok bool) {
	if len(raw) < recordHead {
		return nil, 0, false
	}
	size := binary.LittleEndian.Uint32(raw[4:])
	sum = binary.LittleEndian.Uint32(raw[8:])
	if size > maxBody || int(size) > len(raw)-recordHead {
		return nil, 0, false
	}
	body = raw[recordHead : recordHead+int(size)]
	return body, sum, checksum(body) == sum
}

// checksum is over the length and the body.
func checksum(body []byte) uint32 {
	var size [4]byte
	binary.LittleEndian.PutUint32(size[:], uint32(len(body)))
	return crc32.Update(crc32.Checksum(size[:], castagnoli), castagnoli, body)
}

// refs is every record, in the order that they were written.
func (f *files) refs() []ref {
	var all []ref
	for _, s := range f.segs {
		all = append(all, s.refs...)
	}
	return all
}

// load reads a record's block. It needs no lock: what it needs of f never changes.
func (f *files) load(r ref) (*block, error) {
	in, err := os.Open(f.path(r.segment))
	if err != nil {
		return nil, err
	}
	defer in.Close()
	body := make([]byte, r.size)
	if _, err := in.ReadAt(body, r.at); err != nil {
		return nil, err
	}
	if checksum(body) != r.sum {
		return nil, errBlock
	}
	return decode(body)
}

// append writes a block and waits until it is on disk. What a failed write has
// left is taken back, or, if not even that works, is passed over by readers.
func (f *files) append(b *block) error {
	body, err := b.encode()
	if err != nil {
		return err
	}
	if len(body) > maxBody {
		return fmt.Errorf("a block of %d bytes is too large", len(body))
	}
	sum := checksum(body)
	out := make([]byte, 0, recordHead+len(body))
	out = append(out, magic...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(body)))
	out = binary.LittleEndian.AppendUint32(out, sum)
	out = append(out, body...)

	if err := f.shrink(int64(len(out))); err != nil {
		return err
	}
	s, err := f.room(int64(len(out)))
	if err != nil {
		return err
	}
	if _, err = f.out.WriteAt(out, s.size); err == nil {
		err = f.out.Sync()
	}
	if err != nil {
		if f.out.Truncate(s.size) != nil {
			s.size = maxSegment // nobody knows what is there: it is not written to again
		}
		_ = f.close()
		return err
	}
	s.refs = append(s.refs, ref{head: b.head(), segment: s.number, at: s.size + recordHead, size: len(body), sum: sum})
	s.size += int64(len(out))
	return nil
}

// shrink removes the oldest segments until more fits.
func (f *files) shrink(more int64) error {
	total := more
	for _, s := range f.segs {
		total += min(s.size, f.onDisk(s))
	}
	for total > f.budget && len(f.segs) > 0 {
		oldest := f.segs[0]
		size := min(oldest.size, f.onDisk(oldest))
		if len(f.segs) == 1 {
			_ = f.close()
		}
		if err := os.Remove(f.path(oldest.number)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		f.segs = f.segs[1:]
		total -= size
	}
	return nil
}

// onDisk is a segment's size there: one that is closed to writing counts as full.
func (f *files) onDisk(s *segment) int64 {
	if s.size < maxSegment {
		return s.size
	}
	st, err := os.Stat(f.path(s.number))
	if err != nil {
		return 0
	}
	return st.Size()
}

// room is the segment that has place for more; out is open on it.
func (f *files) room(more int64) (*segment, error) {
	if n := len(f.segs); n > 0 {
		last := f.segs[n-1]
		if last.size+more <= f.budget/segments || last.size == 0 {
			if f.out != nil {
				return last, nil
			}
			out, err := os.OpenFile(f.path(last.number), os.O_WRONLY, 0o600)
			if err == nil {
				f.out = out
				return last, nil
			}
		}
	}
	_ = f.close()
	number := uint64(1)
	if n := len(f.segs); n > 0 {
		number = f.segs[n-1].number + 1
	}
	out, err := os.OpenFile(f.path(number), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := durable.Sync(f.dir); err != nil {
		_ = out.Close()
		_ = os.Remove(f.path(number))
		return nil, err
	}
	f.out = out
	s := &segment{number: number}
	f.segs = append(f.segs, s)
	return s, nil
}

func (f *files) close() error {
	if f.out == nil {
		return nil
	}
	err := f.out.Close()
	f.out = nil
	return err
}
