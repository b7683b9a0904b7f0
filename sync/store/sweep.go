package store

import (
	"cmp"
	"context"
	"errors"
	"path/filepath"
	"slices"

	"github.com/dgraph-io/badger/v4"
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

// resident is a chunk and where it lies.
type resident struct {
	id   chunk.ID
	size int64 // bytes, from the index
	at   place // zero: in the tree, or unknown
}

// asTheyLie sorts by place.
func asTheyLie(some []resident) {
	slices.SortFunc(some, func(a, b resident) int {
		return cmp.Or(cmp.Compare(a.at.log, b.at.log), cmp.Compare(a.at.at, b.at.at))
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
	var all []entry
	for bytes > 0 {
		page, err := v.page(ctx, after, listPage)
		if err != nil {
			return Stretch{}, err
		}
		for i := 0; i < len(page) && bytes > 0; i++ {
			all, after, bytes = append(all, page[i]), page[i].id, bytes-page[i].size
		}
		if len(page) < listPage {
			break
		}
	}
	if len(all) == 0 {
		return Stretch{Next: func(context.Context) ([]Verified, error) { return nil, nil }}, nil
	}
	s := sweep{v: v}
	var err error
	if s.rest, err = v.locate(all); err != nil {
		return Stretch{}, err
	}
	asTheyLie(s.rest)
	return Stretch{Last: after, Next: s.next}, nil
}

// locate finds out where chunks lie. What the tree does not tell stays unknown.
func (v *Volume) locate(some []entry) ([]resident, error) {
	found := make(chan []resident, 1)
	err := v.prompt(func() error {
		there := make([]resident, len(some))
		for i, e := range some {
			there[i] = resident{id: e.id, size: e.size}
		}
		_ = v.view(func(txn *badger.Txn) error { // where it stumbles, who reads the chunk will
			for i := range there {
				there[i].at, _ = findRecord(txn, there[i].id)
			}
			return nil
		})
		found <- there
		return nil
	})
	if err != nil {
		return nil, err
	}
	return <-found, nil
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
		done[i] = Verified{ID: r.id, Size: r.size}
		if !ok { // moved, dropped, in the tree, or lost: who reads it alone finds out which
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
	if first.log == 0 {
		return 1
	}
	end := int64(first.at) + int64(first.length)
	n := 1
	for ; n < len(some); n++ {
		at := some[n].at
		from, to := int64(at.at), int64(at.at)+int64(at.length)
		if at.log != first.log || from < end || from-end > sweepGap || to-int64(first.at) > sweepBytes {
			break
		}
		end = to
	}
	return n
}

// read tells which of the next n chunks, a run, are whole where they lie.
func (s *sweep) read(n int) []bool {
	whole := make([]bool, n)
	first, last := s.rest[0].at, s.rest[n-1].at
	span := int64(last.at) + int64(last.length) - int64(first.at)
	if first.log == 0 || span > sweepBytes {
		return whole
	}
	s.v.opt.hooks.reading()
	s.ask(n)
	if s.buf == nil {
		s.buf = make([]byte, sweepBytes)
	}
	raw := s.buf[:span]
	if !s.v.onLog(first.log, func(fd int) error { return s.v.readFull(fd, raw, int64(first.at)) }) {
		return whole
	}
	for i, r := range s.rest[:n] {
		from := int64(r.at.at) - int64(first.at)
		data := valueOf(raw[from : from+int64(r.at.length)])
		whole[i] = len(data) > 0 && int64(len(data)) == r.size && chunk.Sum(data) == r.id
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
		ahead += int64(s.rest[i].at.length)
	}
	for s.asked < len(s.rest) && (s.asked < n || ahead < aheadBytes) {
		run := s.rest[s.asked:]
		run = run[:runLength(run)]
		first, last := run[0].at, run[len(run)-1].at
		if s.asked >= n {
			ahead += int64(last.at) + int64(last.length) - int64(first.at)
		}
		s.asked += len(run)
		if first.log != 0 {
			s.v.onLog(first.log, func(fd int) error {
				return unix.Fadvise(fd, int64(first.at), int64(last.at)+int64(last.length)-int64(first.at), unix.FADV_WILLNEED)
			})
		}
	}
}

// onLog opens a value log for fn, and tells whether all went well. The log is found from
// the directory that is locked: by name it could be another volume's by now.
func (v *Volume) onLog(number uint32, fn func(fd int) error) bool {
	fd, err := unix.Openat(int(v.lock.Fd()), filepath.Join(chunksDir, logName(number)), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return fn(fd) == nil
}

// errCut is a file that ends too early.
var errCut = errors.New("its value log ends before it")

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
