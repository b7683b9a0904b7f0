// Package delta makes a file out of another one and a patch that is a fraction of its
// size.
//
// # Encodings
//
// [DCZ] is the new file under zstd with the old one as its dictionary, as HTTP has it
// (RFC 9842, "Dictionary-Compressed Zstandard"): 40 bytes of header, of which 32 are the
// SHA-256 of the old file, and one zstd frame (RFC 8878). Whoever applies it has the
// whole old file and as much of the new one in memory: see [Memory].
//
// [BSDiff] is that of Colin Percival ("Naive differences of executable code", 2003),
// which does better with programs: where code has moved, the addresses in it differ by
// the same few numbers, and the differences of the bytes, which are mostly zero, pack
// well. As in the variant of Matthew Endsley all stands in one stream, so that it is
// applied as it comes, in a few MiB of memory whatever the sizes are; but like beside like,
// a MiB at a time, as that packs better. The stream, under zstd with a window of 4 MiB, is of
// groups until its end:
//
//	count    uvarint   records, 1 to 65536
//	records  seek      varint    how far on from where the last record ended in the old file this one begins
//	         add       uvarint   bytes that are made of old ones, and then
//	         copy      uvarint   bytes that are new
//	the new bytes of all these records, 1 MiB at most
//	what is to be added to the old bytes of all these records, byte by byte, modulo 256
//
// The numbers are those of encoding/binary. A record makes at least one byte.
//
// # What is not believed
//
// A patch may be damaged, or be for another file, or be made to harm: whatever it is,
// what comes out is no longer than the size that the caller knows, memory is bounded
// before it is taken, and an error wraps [ErrPatch]. Whether the right bytes came out, the
// caller must know by their digest.
//
// Making is reproducible: the same two files and library version give the same patch.
package delta

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// The encodings.
const (
	DCZ    = "dcz"
	BSDiff = "bsdiff"
)

// Encodings are all that can be made and applied.
var Encodings = []string{BSDiff, DCZ}

// Known tells whether a patch in that encoding can be applied.
func Known(encoding string) bool { return encoding == DCZ || encoding == BSDiff }

// Budget is how much memory a device may need to apply a patch, in bytes.
const Budget = 64 << 20

const (
	window  = 4 << 20 // of BSDiff
	working = 12 << 20

	// dczMagic is a skippable frame of zstd with 32 bytes in it.
	dczMagic = "\x5e\x2a\x4d\x18\x20\x00\x00\x00"
)

// ErrPatch is returned for a patch that does not make a file out of this old one.
var ErrPatch = errors.New("the delta cannot be applied here")

// Memory is how many bytes it takes to apply a patch, at most, to an old file of that
// size to make a new one of that.
func Memory(encoding string, old, size int64) int64 {
	if encoding == DCZ {
		return old + size + working
	}
	return working + 2*window
}

// NewReader gives out the new file, which has size bytes, and io.EOF only after so
// many. It reads old, which must stay readable until it is closed.
func NewReader(encoding string, patch io.Reader, old *io.SectionReader, size int64) (io.ReadCloser, error) {
	if need := Memory(encoding, old.Size(), size); need > Budget {
		return nil, fmt.Errorf("%w: it takes %d MiB of memory, %d are allowed", ErrPatch, need>>20, Budget>>20)
	}
	switch encoding {
	case DCZ:
		return newDCZ(patch, old, size)
	case BSDiff:
		dec, err := zstd.NewReader(patch, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(window))
		if err != nil {
			return nil, broken(err)
		}
		return &records{dec: dec, in: bufio.NewReader(dec), old: old, left: size}, nil
	}
	return nil, fmt.Errorf("%w: the encoding %q is not known", ErrPatch, encoding)
}

func broken(err error) error { return fmt.Errorf("%w: %w", ErrPatch, err) }

// newDCZ reads old into memory. (A mapping would be cheaper, but a disk that fails
// then ends the process, where a read returns an error.)
func newDCZ(patch io.Reader, old *io.SectionReader, size int64) (io.ReadCloser, error) {
	var head [len(dczMagic) + sha256.Size]byte
	if _, err := io.ReadFull(patch, head[:]); err != nil {
		return nil, broken(err)
	}
	if string(head[:len(dczMagic)]) != dczMagic {
		return nil, fmt.Errorf("%w: it does not begin as %s", ErrPatch, DCZ)
	}
	dict := make([]byte, old.Size())
	if _, err := io.ReadFull(io.NewSectionReader(old, 0, old.Size()), dict); err != nil {
		return nil, fmt.Errorf("%w: the file that runs cannot be read: %w", ErrPatch, err)
	}
	if sum := sha256.Sum256(dict); !bytes.Equal(sum[:], head[len(dczMagic):]) {
		return nil, fmt.Errorf("%w: it is for the file with SHA-256 %.6x…, and this is %.6x…", ErrPatch, head[len(dczMagic):], sum)
	}
	dec, err := zstd.NewReader(patch, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(uint64(max(size, zstd.MinWindowSize))), zstd.WithDecoderDictRaw(0, dict))
	if err != nil {
		return nil, broken(err)
	}
	return &frame{dec, size}, nil
}

// frame is the file that a frame makes.
type frame struct {
	dec  *zstd.Decoder
	left int64
}

func (f *frame) Close() error { f.dec.Close(); return nil }

func (f *frame) Read(p []byte) (int, error) {
	if f.left == 0 {
		return 0, ended(f.dec)
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := f.dec.Read(p[:min(int64(len(p)), f.left)])
	f.left -= int64(n)
	if err != nil && (f.left > 0 || !errors.Is(err, io.EOF)) {
		return n, broken(cut(err))
	}
	return n, nil
}

// ended is io.EOF if nothing follows.
func ended(r io.Reader) error {
	var one [1]byte
	switch n, err := io.ReadFull(r, one[:]); {
	case n > 0:
		return fmt.Errorf("%w: it makes more than was said", ErrPatch)
	case errors.Is(err, io.EOF):
		return io.EOF
	default:
		return broken(err)
	}
}

// cut is err, of what should have gone on.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

const (
	mostRecords = 1 << 16 // of a group
	mostFresh   = 1 << 20 // new bytes of a group
)

// record makes add bytes of those of the old file that begin at from, and then some new ones.
type record struct{ from, add, fresh int64 }

// records is the file that the records of a BSDiff make.
type records struct {
	dec  *zstd.Decoder
	in   *bufio.Reader
	old  *io.SectionReader
	left int64 // of the new file
	at   int64 // in the old file, after the last record that was read

	group []record // what is left of it
	fresh []byte   // new bytes that are left of it
	whole [mostFresh]byte
	buf   [16 << 10]byte
}

func (r *records) Close() error { r.dec.Close(); return nil }

func (r *records) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, ended(r.in)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if len(r.group) == 0 {
		if err := r.next(); err != nil {
			return 0, err
		}
	}
	n, err := r.some(p)
	r.left -= int64(n)
	return n, err
}

// next reads a group as far as its new bytes.
func (r *records) next() error {
	count, err := binary.ReadUvarint(r.in)
	if err != nil {
		return broken(cut(err))
	}
	if count == 0 || count > mostRecords {
		return fmt.Errorf("%w: a group of it has %d records", ErrPatch, count)
	}
	r.group = r.group[:0]
	makes, fresh := int64(0), int64(0)
	for range count {
		rec, err := r.record(r.left - makes)
		if err != nil {
			return err
		}
		makes += rec.add + rec.fresh
		if fresh += rec.fresh; fresh > mostFresh {
			return fmt.Errorf("%w: a group of it has too many new bytes", ErrPatch)
		}
		r.group = append(r.group, rec)
	}
	r.fresh = r.whole[:fresh]
	if _, err := io.ReadFull(r.in, r.fresh); err != nil {
		return broken(cut(err))
	}
	return nil
}

// record reads one, which may make so many bytes.
func (r *records) record(most int64) (rec record, err error) {
	seek, err := binary.ReadVarint(r.in)
	if err != nil {
		return rec, broken(cut(err))
	}
	for _, n := range []*int64{&rec.add, &rec.fresh} {
		count, err := binary.ReadUvarint(r.in)
		if err != nil {
			return rec, broken(cut(err))
		}
		if count > uint64(most) {
			return rec, fmt.Errorf("%w: it makes more than was said", ErrPatch)
		}
		*n = int64(count)
	}
	switch {
	case rec.add+rec.fresh > most:
		return rec, fmt.Errorf("%w: it makes more than was said", ErrPatch)
	case rec.add+rec.fresh == 0:
		return rec, fmt.Errorf("%w: a record makes nothing", ErrPatch)
	case seek < -r.at || rec.add > r.old.Size()-r.at-seek:
		return rec, fmt.Errorf("%w: it needs bytes that the old file has not", ErrPatch)
	}
	rec.from = r.at + seek
	r.at = rec.from + rec.add
	return rec, nil
}

// some makes up to len(p) bytes of the first record of the group.
func (r *records) some(p []byte) (n int, err error) {
	rec := &r.group[0]
	if rec.add > 0 {
		p = p[:min(int64(len(p)), rec.add, int64(len(r.buf)))]
		was := r.buf[:len(p)]
		if n, err := r.old.ReadAt(was, rec.from); n < len(was) {
			return 0, fmt.Errorf("%w: the file that runs cannot be read: %w", ErrPatch, cut(err))
		}
		n, err = r.in.Read(p)
		for i := range p[:n] {
			p[i] += was[i]
		}
		rec.from, rec.add = rec.from+int64(n), rec.add-int64(n)
	} else {
		n = copy(p[:min(int64(len(p)), rec.fresh)], r.fresh)
		r.fresh, rec.fresh = r.fresh[n:], rec.fresh-int64(n)
	}
	if rec.add+rec.fresh == 0 {
		r.group = r.group[1:]
	}
	if err != nil {
		return n, broken(cut(err))
	}
	return n, nil
}

// Make writes a patch that makes file out of old. It holds both in memory, and for
// [BSDiff] twelve bytes more for each of the old file. done, if not nil, is told how much
// of the work is done, from 0 to 1. Errors: a patch that takes more than [Budget] to apply,
// the end of ctx, and those of w.
func Make(ctx context.Context, encoding string, old, file []byte, w io.Writer, done func(float64)) error {
	if need := Memory(encoding, int64(len(old)), int64(len(file))); need > Budget {
		return fmt.Errorf("%w: to apply it takes %d MiB of memory, %d are allowed", ErrPatch, need>>20, Budget>>20)
	}
	if done == nil {
		done = func(float64) {}
	}
	switch encoding {
	case DCZ:
		return makeDCZ(old, file, w)
	case BSDiff:
		return makeRecords(ctx, old, file, w, done)
	}
	return fmt.Errorf("the encoding %q is not known", encoding)
}

func makeDCZ(old, file []byte, w io.Writer) error {
	reach := zstd.MinWindowSize // a power of two that reaches over both
	for reach < len(old)+len(file) {
		reach *= 2
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(reach), zstd.WithSingleSegment(true), zstd.WithEncoderDictRaw(0, old))
	if err != nil {
		return err
	}
	defer enc.Close()
	sum := sha256.Sum256(old)
	for _, part := range [][]byte{[]byte(dczMagic), sum[:], enc.EncodeAll(file, nil)} {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}
