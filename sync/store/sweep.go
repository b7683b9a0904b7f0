package store

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// Who reads all chunks, or many, does not ask for one after the other: that seeks, and
// leaves the disk idle while a chunk is hashed. A sweep reads them as they lie, what is
// close together at one go, and has the disk begin with what comes next.

const (
	sweepBytes = chunk.MaxSize + recordHead // read at one go: a chunk of any size fits
	sweepGap   = 64 << 10                   // bytes between two records that are read along: less than a seek
	aheadBytes = 8 << 20                    // that the disk is asked for beforehand
)

// asTheyLie sorts by place.
func asTheyLie(some []resident) {
	slices.SortFunc(some, func(a, b resident) int {
		return cmp.Or(cmp.Compare(a.at.segment, b.at.segment), cmp.Compare(a.at.at, b.at.at))
	})
}

// Verified is a chunk that was read. Err is nil, or a problem as of [Volume.Get]:
// [wire.CodeLost], or [wire.CodeNotFound] for one that was dropped meanwhile.
type Verified struct {
	ID   chunk.ID
	Size int64 // bytes
	Err  error
}

// Stretch is chunks whose ids follow one another.
type Stretch struct {
	Last chunk.ID // the greatest id; the zero id if there is no chunk
	// Next reads the next few and verifies them, in the order in which they lie on disk: a
	// longest chunk's bytes at most, or what lies in the index. It returns none when all
	// are read. Nothing is read if nobody calls it. Not to be called again after an
	// error, which is the disk's or the context's.
	Next func(context.Context) ([]Verified, error)
}

// Stretch finds the chunks whose ids follow after, lost ones included, until they have
// so many bytes, one at least. It reads the index only. The zero id begins.
func (v *Volume) Stretch(ctx context.Context, after chunk.ID, bytes int64) (Stretch, error) {
	s := sweep{v: v}
	for bytes > 0 {
		page, err := v.page(ctx, after, listPage)
		if err != nil {
			return Stretch{}, err
		}
		for i := 0; i < len(page) && bytes > 0; i++ {
			s.rest, after, bytes = append(s.rest, page[i]), page[i].id, bytes-int64(page[i].at.size)
		}
		if len(page) < listPage {
			break
		}
	}
	if len(s.rest) == 0 {
		return Stretch{Next: func(context.Context) ([]Verified, error) { return nil, nil }}, nil
	}
	asTheyLie(s.rest)
	return Stretch{Last: after, Next: s.next}, nil
}

// sweep reads chunks in a given order.
type sweep struct {
	v     *Volume
	rest  []resident
	asked int // of rest, that the disk was asked for
	buf   []byte
}

// next is [Stretch.Next].
func (s *sweep) next(ctx context.Context) ([]Verified, error) {
	if len(s.rest) == 0 {
		return nil, nil
	}
	s.v.touch()
	n := runLength(s.rest)
	whole := make(chan []bool, 1)
	if err := s.v.reading(ctx, func() error {
		whole <- s.read(n)
		return nil
	}); err != nil {
		return nil, err
	}
	done := make([]Verified, n)
	for i, ok := range <-whole {
		r := s.rest[i]
		done[i] = Verified{ID: r.id, Size: int64(r.at.size)}
		if !ok { // moved, dropped, or lost: who reads it alone finds out which
			_, err := s.v.get(ctx, r.id)
			if code := wire.ProblemOf(err).Code; err != nil && (ctx.Err() != nil || code != wire.CodeLost && code != wire.CodeNotFound) {
				return nil, err
			}
			done[i].Err = err
		}
	}
	s.rest, s.asked = s.rest[n:], max(0, s.asked-n)
	return done, nil
}

// runLength is how many of these lie close together, and are few enough bytes.
func runLength(some []resident) int {
	first := some[0].at
	end := first.end()
	n := 1
	for ; n < len(some); n++ {
		at := some[n].at
		from := int64(at.at)
		if at.segment != first.segment || from < end || from-end > sweepGap || at.end()-int64(first.at) > sweepBytes {
			break
		}
		end = at.end()
	}
	return n
}

// read tells which of the next n chunks, a run, are whole where they lie.
func (s *sweep) read(n int) []bool {
	whole := make([]bool, n)
	first, last := s.rest[0].at, s.rest[n-1].at
	span := last.end() - int64(first.at)
	if span > sweepBytes { // damaged
		return whole
	}
	s.v.opt.hooks.reading()
	s.ask(n)
	if s.buf == nil {
		s.buf = make([]byte, sweepBytes)
	}
	raw := s.buf[:span]
	if !s.v.onSegment(first.segment, func(fd int) error { return s.v.readFull(fd, raw, int64(first.at)) }) {
		return whole
	}
	for i, r := range s.rest[:n] {
		from := int64(r.at.at) - int64(first.at)
		whole[i] = chunk.Sum(raw[from+recordHead:from+r.at.length()]) == r.id
	}
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	for i, r := range s.rest[:n] {
		if _, lost := s.v.lost[r.id]; lost {
			whole[i] = false
		}
	}
	return whole
}

// ask has the disk begin with the next n chunks and those after, and does not wait.
func (s *sweep) ask(n int) {
	var ahead int64
	for i := n; i < s.asked; i++ {
		ahead += s.rest[i].at.length()
	}
	for s.asked < len(s.rest) && (s.asked < n || ahead < aheadBytes) {
		run := s.rest[s.asked:]
		run = run[:runLength(run)]
		first, last := run[0].at, run[len(run)-1].at
		if s.asked >= n {
			ahead += last.end() - int64(first.at)
		}
		s.asked += len(run)
		s.v.onSegment(first.segment, func(fd int) error {
			return unix.Fadvise(fd, int64(first.at), last.end()-int64(first.at), unix.FADV_WILLNEED)
		})
	}
}

// onSegment opens a segment for fn, and tells whether all went well.
func (v *Volume) onSegment(number uint32, fn func(fd int) error) bool {
	fd, err := v.openat(number, unix.O_RDONLY)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return fn(fd) == nil
}

// errCut is a file that ends too early.
var errCut = errors.New("its segment ends before it")

// readFull fills raw from a place in a file.
func (v *Volume) readFull(fd int, raw []byte, at int64) error {
	for read := 0; read < len(raw); {
		n, err := v.opt.hooks.pread(fd, raw[read:], at+int64(read))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return errCut
		}
		read += max(n, 0)
	}
	return nil
}
