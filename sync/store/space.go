package store

import (
	"cmp"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/deimos-edge/deimos/wire"
)

// ledger is the bytes of the segments, to the last one: how long each is and how much of
// it is records of chunks held. It is made when the volume opens, from the lengths of the
// files and a walk of the index, and then follows the committer.
type ledger struct {
	newest   uint32
	segments map[uint32]*space
	length   int64 // sums over all segments
	live     int64
	meta     int64
	chunks   int64 // bytes of the chunks alone, in these records
	// places is the sum over all chunks held of the CRC-32C of their place, as the index has it.
	places uint64
}

// space is of one segment, in bytes.
type space struct {
	length int64
	meta   int64 // neither of chunks nor of drops: head, table of contents, foot
	live   int64 // records of chunks held
	drops  int64 // records of drops, which may be needed
}

func (s *space) dead() int64 { return s.length - s.meta - s.live }

// dead is the bytes that belong to no chunk held.
func (l *ledger) dead() int64 { return l.length - l.meta - l.live }

// heads is what the segments have besides the bytes of chunks held, and what is dead.
func (l *ledger) heads() int64 { return l.meta + l.live - l.chunks }

func (l *ledger) of(number uint32) *space {
	s := l.segments[number]
	if s == nil {
		s = &space{}
		l.segments[number] = s
		l.newest = max(l.newest, number)
	}
	return s
}

func (l *ledger) set(number uint32, length, meta int64) {
	s := l.of(number)
	l.length += length - s.length
	l.meta += meta - s.meta
	s.length, s.meta = length, meta
}

// forget is for a segment that is deleted.
func (l *ledger) forget(number uint32) {
	if s := l.segments[number]; s != nil {
		l.length -= s.length
		l.meta -= s.meta
		l.live -= s.live
		delete(l.segments, number)
	}
}

func (l *ledger) change(p place, sign int64) {
	l.places += uint64(sign) * p.sum()
	if s := l.segments[p.segment]; s != nil { // else it is gone
		s.live += sign * p.length()
		l.live += sign * p.length()
		l.chunks += sign * int64(p.size)
	}
}

// victims are the segments worth emptying, the ones with most dead bytes first: those
// that are half dead, or a quarter if room is short, as far as what lives in them fits
// into room bytes. Drops count as alive, as most are needed as long as what they drop is
// there: a segment of nothing else would be written again and again. In the oldest segment
// none is needed, as a drop is never older than what it drops. Those to skip are left out.
func (l *ledger) victims(short bool, room int64, skip func(uint32, *space) bool) []uint32 {
	share := int64(2)
	if short {
		share = 4
	}
	var all []uint32
	oldest := l.newest
	for n := range l.segments {
		oldest = min(oldest, n)
	}
	for n, s := range l.segments {
		needed := s.drops
		if n == oldest {
			needed = 0
		}
		if n != l.newest && !skip(n, s) && (s.live+needed == 0 || (s.dead()-needed)*share >= s.length) {
			all = append(all, n)
		}
	}
	slices.SortFunc(all, func(a, b uint32) int {
		return cmp.Or(cmp.Compare(l.segments[b].dead(), l.segments[a].dead()), cmp.Compare(a, b))
	})
	return slices.DeleteFunc(all, func(n uint32) bool {
		if live := l.segments[n].live + l.segments[n].drops; live <= max(0, room) {
			room -= live
			return false
		}
		return true
	})
}

// chunks32 is how many chunks a 32-bit process takes. Their index is mapped into its address
// space of 2 or 3 GiB: some 60 bytes for each, and while tables are merged twice that.
const chunks32 = 4 << 20

// census counts the chunks in all volumes of a process.
type census struct {
	limit int64 // 0: none
	held  atomic.Int64
}

var process = census{limit: chunkLimit(strconv.IntSize)}

// chunkLimit is that of a process whose addresses have so many bits.
func chunkLimit(bits int) int64 {
	if bits == 32 {
		return chunks32
	}
	return 0
}

// takes is the error for one chunk more, if that is too many. A batch that is on its way is not
// counted: it has maxBatchRequests chunks at most.
func (c *census) takes() error {
	if c.limit == 0 || c.held.Load() < c.limit {
		return nil
	}
	return wire.FailedBecause(wire.CodeNoSpace, "a 32-bit processor can hold %d chunks in all its volumes, and holds as many: drop some, or use a 64-bit system", c.limit)
}
