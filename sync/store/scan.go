package store

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
)

// contentID is what a table of contents is verified by.
func contentID(content []byte) chunk.ID { return chunk.Sum(content) }

// scan reads a segment that nobody writes to.
type scan struct {
	fd     int
	number uint32
	size   int64
	mark   mark
	pread  func(fd int, into []byte, at int64) (int, error)

	at    int64 // of buf
	buf   []byte
	bad   error          // what kept bytes from being read the last time
	fault error          // what kept a head, or the bytes of a record that was asked for, from being read
	holes map[int64]bool // pages of badBytes that were needed and cannot be read
	// passing says that what was found is not all that can be read: what could not be read can be by
	// now, or the rest was not looked at.
	passing bool
}

const (
	scanBytes = 64 << 10 // read at one go
	badBytes  = 4096     // that are given up where the disk cannot be read
	// mostHoles are looked for in a segment: a disk tries each for seconds. With more, nothing is
	// decided of it.
	mostHoles = 32
)

// openSegment is for segment number, which the caller closes with the scan.
func (v *Volume) openSegment(number uint32) (*scan, error) {
	fd, err := v.openat(number, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &scan{fd: fd, number: number, size: st.Size, mark: v.log.from.mark, pread: v.opt.hooks.pread}, nil
}

func (s *scan) close() error { return unix.Close(s.fd) }

// errBad is a part of a segment that the disk cannot give.
var errBad = errors.New("the disk cannot be read there")

// bytes returns n bytes, or fewer at the end. They are good until the next call.
func (s *scan) bytes(at int64, n int) ([]byte, error) {
	n = int(min(int64(n), s.size-at))
	if n <= 0 {
		return nil, nil
	}
	if at >= s.at && at+int64(n) <= s.at+int64(len(s.buf)) {
		return s.buf[at-s.at:][:n], nil
	}
	want := int(min(int64(max(n, scanBytes)), s.size-at))
	got, err := s.fill(at, want)
	if err != nil && want > n { // what is bad may lie behind
		got, err = s.fill(at, n)
	}
	if err != nil {
		return nil, err
	}
	return s.buf[:min(n, got)], nil
}

func (s *scan) fill(at int64, n int) (int, error) {
	s.at, s.buf = at, slices.Grow(s.buf[:0], n)[:n]
	for got := 0; got < n; {
		k, err := s.pread(s.fd, s.buf[got:n], at+int64(got))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			s.buf, s.bad = s.buf[:0], err
			if isDamage(err) {
				return 0, errBad
			}
			return 0, fmt.Errorf("segment %d cannot be read: %w", s.number, err)
		case k == 0: // it was cut meanwhile
			n = got
		}
		got += k
	}
	s.buf = s.buf[:n]
	return n, nil
}

// walk calls fn for each record from a place on, whose head is whole. Behind a damaged
// one the next is searched for. It returns where the last of them ends; a record can end
// behind the file's end, then.
func (s *scan) walk(from int64, fn func(record) error) (end int64, err error) {
	end = from
	for at := from; at+recordHead <= s.size; {
		b, err := s.bytes(at, recordHead)
		if err != nil && !errors.Is(err, errBad) {
			return end, err
		}
		var r record
		ok := err == nil
		if ok {
			r, ok = readHead(b, s.mark, spot{s.number, uint32(at)})
		} else if err := s.missing(at, recordHead); err != nil {
			return end, err
		}
		if !ok {
			if at, err = s.search(at + 1); err != nil {
				return end, err
			}
			continue
		}
		if err := fn(r); err != nil {
			return end, err
		}
		at = r.end()
		end = at
		if r.kind == kindSeal {
			end += segmentFoot
			break
		}
	}
	return end, nil
}

// search finds the next mark, or the end.
func (s *scan) search(at int64) (int64, error) {
	for at < s.size {
		if len(s.holes) >= mostHoles {
			s.passing = true
			return s.size, nil
		}
		page := int(badBytes - at%badBytes)
		var b []byte
		err := errBad
		// It may be a sector of these alone that cannot be read; a mark can lie on two pages.
		for _, n := range []int{scanBytes, page + len(s.mark) - 1, page} {
			if b, err = s.bytes(at, n); !errors.Is(err, errBad) {
				break
			}
		}
		if err != nil && !errors.Is(err, errBad) {
			return at, err
		}
		if i := bytes.Index(b, s.mark[:]); i >= 0 {
			return at + int64(i), nil
		}
		switch n := len(b); {
		case at+int64(n) >= s.size:
			return s.size, nil
		case n <= page: // it, or what follows, cannot be read
			if err := s.missing(at, int(badBytes-at%badBytes)+len(s.mark)-1); err != nil {
				return at, err
			}
			at += int64(page)
		default:
			at += int64(n - len(s.mark) + 1)
		}
	}
	return s.size, nil
}

// payload reads what belongs to a record; nil if it is not all there.
func (s *scan) payload(r record) ([]byte, error) {
	if r.end() > s.size {
		return nil, nil
	}
	return s.bytes(int64(r.at)+recordHead, int(r.size))
}

// holds tells whether all that belongs to a record is there. It is [errBad] if the disk cannot
// tell.
func (s *scan) holds(r record) (bool, error) {
	b, err := s.payload(r)
	if errors.Is(err, errBad) {
		if err := s.missing(int64(r.at)+recordHead, int(r.size)); err != nil {
			return false, err
		}
		return false, errBad
	}
	return r.whole(b), err
}

// missing is for bytes that are needed and could not be read: it finds the pages.
func (s *scan) missing(at int64, n int) error {
	s.fault = s.bad
	found, err := s.note(at, n)
	s.passing = s.passing || !found
	return err
}

// note finds the pages of bytes that could not be read.
func (s *scan) note(at int64, n int) (found bool, err error) {
	for page := at - at%badBytes; page < min(at+int64(n), s.size) && len(s.holes) < mostHoles; page += badBytes {
		switch _, err := s.fill(page, int(min(badBytes, s.size-page))); {
		case errors.Is(err, errBad):
			if s.holes == nil {
				s.holes = map[int64]bool{}
			}
			s.holes[page], found = true, true
		case err != nil:
			return found, err
		}
	}
	return found, nil
}

// sealed reads the table of contents; ok is false if there is none that is whole. One that
// cannot be read is not needed; but when something is that cannot be read, either, it is written
// over, too: two ways to read a segment must not come to differ.
func (s *scan) sealed() (seal record, content []byte, ok bool, err error) {
	if s.size <= segmentHead+segmentFoot {
		return seal, nil, false, nil
	}
	b, err := s.bytes(s.size-segmentFoot, segmentFoot)
	if errors.Is(err, errBad) {
		_, err = s.note(s.size-segmentFoot, segmentFoot)
		return seal, nil, false, err
	}
	at, ok := sealIn(b, s.mark)
	if err != nil || !ok || int64(at)+recordHead > s.size {
		return seal, nil, false, err
	}
	if b, err = s.bytes(int64(at), recordHead); err == nil {
		if seal, ok = readHead(b, s.mark, spot{s.number, at}); !ok || seal.kind != kindSeal {
			return seal, nil, false, nil
		}
		content, err = s.payload(seal)
	}
	if errors.Is(err, errBad) {
		_, err = s.note(int64(at), int(s.size-int64(at)))
		return seal, nil, false, err
	}
	return seal, content, err == nil && seal.whole(content), err
}

// records are all of a segment, from its table of contents if that is whole. meta is how
// many of its bytes are neither of chunks nor of drops, with its table and not without.
func (s *scan) records() (all []record, meta int64, err error) {
	seal, content, ok, err := s.sealed()
	if ok || err != nil {
		return contents(content, s.number, seal.seq), segmentHead + seal.length() + segmentFoot, err
	}
	_, err = s.walk(segmentHead, func(r record) error {
		if r.kind == kindSeal {
			meta = segmentHead + r.length() + segmentFoot
			return nil
		}
		all = append(all, r)
		return nil
	})
	if meta == 0 {
		meta = min(segmentHead, s.size)
	}
	return all, meta, err
}

// ends tells whether the foot that belongs behind a seal is there.
func (s *scan) ends(seal record) bool {
	b, err := s.bytes(seal.end(), segmentFoot)
	at, ok := sealIn(b, s.mark)
	return err == nil && ok && at == seal.at
}
