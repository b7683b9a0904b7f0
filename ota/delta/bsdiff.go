package delta

import (
	"context"
	"encoding/binary"
	"errors"
	"index/suffixarray"
	"io"
	"math"

	"github.com/klauspost/compress/zstd"
)

// suffixes are the suffixes of a file in the order of their bytes, by where they begin.
type suffixes struct {
	file  []byte
	order []int32
	first []int32 // of the suffixes that begin with these two bytes, in order; and one more
}

// sorted reads the order out of an index of the standard library, which sorts in
// linear time, but does not say where the longest match of a text is: asked for all
// places of a byte, it tells them in order. (The order is not promised. If it were
// another one day, patches would be larger, not wrong.)
func sorted(file []byte) suffixes {
	x := suffixes{file: file, order: make([]int32, 0, len(file))}
	index := suffixarray.New(file)
	for b := range 256 {
		for _, at := range index.Lookup([]byte{byte(b)}, -1) {
			x.order = append(x.order, int32(at))
		}
	}
	x.first = make([]int32, 1<<16+1)
	for i := range file {
		x.first[x.bucket(i)+1]++
	}
	for i := range 1 << 16 {
		x.first[i+1] += x.first[i]
	}
	return x
}

// bucket is of the suffix that begins at i. The last one, of one byte, comes before all
// others with that byte, and so does not fall out of order.
func (x suffixes) bucket(i int) int {
	b := int(x.file[i]) << 8
	if i+1 < len(x.file) {
		b |= int(x.file[i+1])
	}
	return b
}

// longest finds where most bytes of text stand in the file, and how many.
func (x suffixes) longest(text []byte) (at, n int) {
	if len(x.order) == 0 || len(text) < 2 {
		return 0, 0
	}
	b := int(text[0])<<8 | int(text[1])
	lo, hi := int(x.first[b]), int(x.first[b+1])
	// What stands before lo is less than text, from hi on it is more; of both it is known
	// how many bytes they share with it.
	less, more := 0, 0
	for lo < hi {
		mid := (lo + hi) / 2
		suffix := x.file[x.order[mid]:]
		k := min(less, more)
		k += shared(suffix[k:], text[k:])
		if k > n {
			at, n = int(x.order[mid]), k
		}
		switch {
		case k == len(text):
			return at, n
		case k == len(suffix) || suffix[k] < text[k]:
			lo, less = mid+1, k
		default:
			hi, more = mid, k
		}
	}
	return at, n
}

// shared is how many bytes a and b have in common at their beginning.
func shared(a, b []byte) (n int) {
	most := min(len(a), len(b))
	for n+8 <= most && binary.LittleEndian.Uint64(a[n:]) == binary.LittleEndian.Uint64(b[n:]) {
		n += 8
	}
	for n < most && a[n] == b[n] {
		n++
	}
	return n
}

// better is by how many bytes a match must be longer than what goes on where the last
// one was, to be worth a record; of bsdiff.
const better = 8

// tell is after how many bytes of the new file progress is told, and the context asked.
const tell = 64 << 10

// makeRecords follows bsdiff 4: it looks for matches that are worth it, extends each
// forwards and backwards with differences, and leaves what is between two of them as it is.
func makeRecords(ctx context.Context, old, file []byte, w io.Writer, done func(float64)) error {
	if len(old) > math.MaxInt32 {
		return errors.New("the old file is larger than 2 GiB")
	}
	enc, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window))
	if err != nil {
		return err
	}
	defer enc.Close()
	done(0)
	x := sorted(old)
	out := recordWriter{w: enc, old: old, file: file}
	var (
		scan, pos, length    int // where we are in the new file, and the match there
		lastScan, lastPos    int // from where on nothing is written, and where that is in the old file
		lastOffset, nextTell int
	)
	follows := func(i int) bool { // the byte at i goes on where the last match was
		at := i + lastOffset
		return at >= 0 && at < len(old) && old[at] == file[i]
	}
	for scan < len(file) {
		same := 0 // bytes of the match that go on where the last one was, too; less those before it that are counted later
		scan += length
		for counted := scan; scan < len(file); scan++ {
			if scan >= nextTell {
				if err := ctx.Err(); err != nil {
					return err
				}
				done(float64(scan) / float64(len(file)))
				nextTell = scan + tell
			}
			pos, length = x.longest(file[scan:])
			for ; counted < scan+length; counted++ {
				if follows(counted) {
					same++
				}
			}
			if length == same && length != 0 || length > same+better {
				break
			}
			if follows(scan) {
				same--
			}
		}
		if length == same && scan < len(file) {
			continue
		}
		forth := extend(len(file[lastScan:scan]), func(i int) bool { return lastPos+i < len(old) && old[lastPos+i] == file[lastScan+i] }, len(old)-lastPos)
		back := 0
		if scan < len(file) {
			back = extend(scan-lastScan, func(i int) bool { return old[pos-1-i] == file[scan-1-i] }, pos)
		}
		if over := lastScan + forth - (scan - back); over > 0 {
			// Both claim these bytes: the seam goes where most of them are right.
			best, score, seam := 0, 0, 0
			for i := range over {
				if file[lastScan+forth-over+i] == old[lastPos+forth-over+i] {
					score++
				}
				if file[scan-back+i] == old[pos-back+i] {
					score--
				}
				if score > best {
					best, seam = score, i+1
				}
			}
			forth += seam - over
			back -= seam
		}
		if err := out.record(made{lastPos, lastScan, forth, scan - back - lastScan - forth}); err != nil {
			return err
		}
		lastScan, lastPos, lastOffset = scan-back, pos-back, pos-scan
	}
	if err := out.flush(); err != nil {
		return err
	}
	done(1)
	return enc.Close()
}

// extend is for how many of the next n bytes a match goes on so that most are right,
// and no more than most bytes.
func extend(n int, right func(int) bool, most int) (length int) {
	for i, score, best := 0, 0, 0; i < min(n, most); i++ {
		if right(i) {
			score++
		}
		if score*2-(i+1) > best*2-length {
			best, length = score, i+1
		}
	}
	return length
}

// recordWriter writes records, in groups.
type recordWriter struct {
	w         io.Writer
	old, file []byte
	at        int // in old, after the last one that is written
	group     []made
	fresh     int // new bytes of the group
}

// made is a record: add bytes at here are made of those at from, and fresh ones follow.
type made struct{ from, here, add, fresh int }

func (r *recordWriter) record(m made) error {
	for m.add+m.fresh > 0 {
		part := m
		part.fresh = min(m.fresh, mostFresh-r.fresh)
		r.group, r.fresh = append(r.group, part), r.fresh+part.fresh
		if r.fresh == mostFresh || len(r.group) == mostRecords {
			if err := r.flush(); err != nil {
				return err
			}
		}
		m = made{from: m.from + m.add, here: m.here + m.add + part.fresh, fresh: m.fresh - part.fresh}
	}
	return nil
}

// flush writes the group.
func (r *recordWriter) flush() error {
	if len(r.group) == 0 {
		return nil
	}
	out := binary.AppendUvarint(nil, uint64(len(r.group)))
	for _, m := range r.group {
		out = binary.AppendVarint(out, int64(m.from-r.at))
		out = binary.AppendUvarint(out, uint64(m.add))
		out = binary.AppendUvarint(out, uint64(m.fresh))
		r.at = m.from + m.add
	}
	for _, m := range r.group {
		out = append(out, r.file[m.here+m.add:m.here+m.add+m.fresh]...)
	}
	for _, m := range r.group {
		for i := range m.add {
			out = append(out, r.file[m.here+i]-r.old[m.from+i])
		}
	}
	r.group, r.fresh = r.group[:0], 0
	_, err := r.w.Write(out)
	return err
}
