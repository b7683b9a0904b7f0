package store

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"

	"github.com/deimos-edge/deimos/sync/chunk"
)

// The form of a segment, a file of chunks/ with records one after the other. All numbers
// are little endian; sums are CRC-32C.
//
//	head of a segment   magic [8], form uint32, number uint32, mark [8], the volume's id [26], zeros, sum uint32: 64 bytes
//	record              head of 76 bytes, then size bytes
//	head of a record    mark [8], seq uint64, durable uint64, kind uint32, size uint32, id [32], target (segment, at) 2 × uint32, sum uint32
//	foot of a segment   mark [8], where its seal begins uint32, sum uint32: 16 bytes, once it is full
//
// The mark is chosen by chance with the volume, and told to nobody: where a head is damaged, the
// next one is searched for by it, and who has chunks stored cannot put anything into them
// that looks like a record. The sum of a record's head is over where it lies, too (segment, at), so
// that a record which lies elsewhere is none: a copy in a chunk, which is a backup of this disk, or
// what an older file has left in a block that a power cut kept from being written.

const (
	segmentMagic = "DEIMSEG\n"
	segmentForm  = 1
	segmentHead  = 64 // bytes
	recordHead   = 8 + 8 + 8 + 4 + 4 + 32 + 8 + 4
	segmentFoot  = 8 + 4 + 4
	volumeIDSize = 26

	// segmentRecords is how many records a segment has at most: with them its table of
	// contents is no longer than a chunk may be.
	segmentRecords = 64 << 10
	contentBytes   = 4 + 4 + 4 + 32 + 8 // of a record in the table of contents
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// mark tells the records of a volume from all other bytes.
type mark [8]byte

// kind is what a record is.
type kind uint32

const (
	kindChunk kind = iota + 1 // its bytes follow; target is the record that it replaces, if any
	kindDrop                  // the record target, of the chunk id, is dropped
	kindSeal                  // the last of a full segment: its table of contents follows
)

// spot is where a record begins.
type spot struct {
	segment uint32 // number; 0: nowhere
	at      uint32 // bytes from the beginning of the segment
}

func (s spot) append(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(b, s.segment), s.at)
}

// place is where a chunk's record lies.
type place struct {
	spot
	size uint32 // bytes of the chunk
}

// length is that of the whole record, in bytes.
func (p place) length() int64 { return recordHead + int64(p.size) }

// end is where the record ends, in bytes from the beginning of the segment.
func (p place) end() int64 { return int64(p.at) + p.length() }

// record is one record, without the bytes that follow its head.
type record struct {
	place
	kind    kind
	id      chunk.ID // of a seal that of its table of contents
	target  spot
	seq     uint64 // rises by one with each record of the volume
	durable uint64 // all records up to this number were durable when this one was written
}

func (r *record) appendHead(b []byte, m mark) []byte {
	from := len(b)
	b = append(b, m[:]...)
	b = binary.LittleEndian.AppendUint64(b, r.seq)
	b = binary.LittleEndian.AppendUint64(b, r.durable)
	b = binary.LittleEndian.AppendUint32(b, uint32(r.kind))
	b = binary.LittleEndian.AppendUint32(b, r.size)
	b = append(b, r.id[:]...)
	b = r.target.append(b)
	return binary.LittleEndian.AppendUint32(b, headSum(b[from:], r.spot))
}

// headSum is the sum of a head without it, which lies at a spot.
func headSum(b []byte, at spot) uint32 {
	return crc32.Update(sum(b), castagnoli, at.append(nil))
}

// readHead takes a head apart; at is where it lies. ok is false if it is damaged.
func readHead(b []byte, m mark, at spot) (r record, ok bool) {
	if len(b) < recordHead || !bytes.Equal(b[:8], m[:]) || binary.LittleEndian.Uint32(b[recordHead-4:]) != headSum(b[:recordHead-4], at) {
		return record{}, false
	}
	r = record{
		seq: binary.LittleEndian.Uint64(b[8:]), durable: binary.LittleEndian.Uint64(b[16:]),
		kind:  kind(binary.LittleEndian.Uint32(b[24:])),
		place: place{at, binary.LittleEndian.Uint32(b[28:])},
	}
	copy(r.id[:], b[32:])
	r.target = spot{binary.LittleEndian.Uint32(b[64:]), binary.LittleEndian.Uint32(b[68:])}
	return r, true
}

// whole tells whether payload is what belongs to the record.
func (r *record) whole(payload []byte) bool {
	return r.kind == kindDrop || len(payload) == int(r.size) && len(payload) > 0 && chunk.Sum(payload) == r.id
}

// appendContent adds a record to a table of contents.
func (r *record) appendContent(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(r.kind))
	b = binary.LittleEndian.AppendUint32(b, r.at)
	b = binary.LittleEndian.AppendUint32(b, r.size)
	b = append(b, r.id[:]...)
	return r.target.append(b)
}

// contents are the records that a table of contents names. Its own number stands for theirs.
func contents(b []byte, segment uint32, seq uint64) []record {
	all := make([]record, 0, len(b)/contentBytes)
	for ; len(b) >= contentBytes; b = b[contentBytes:] {
		r := record{
			kind:   kind(binary.LittleEndian.Uint32(b)),
			seq:    seq,
			place:  place{spot{segment, binary.LittleEndian.Uint32(b[4:])}, binary.LittleEndian.Uint32(b[8:])},
			target: spot{binary.LittleEndian.Uint32(b[44:]), binary.LittleEndian.Uint32(b[48:])},
		}
		copy(r.id[:], b[12:])
		all = append(all, r)
	}
	return all
}

// origin is what the head of a segment tells.
type origin struct {
	mark   mark
	volume string
}

func (o origin) head(number uint32) []byte {
	b := append(make([]byte, 0, segmentHead), segmentMagic...)
	b = binary.LittleEndian.AppendUint32(b, segmentForm)
	b = binary.LittleEndian.AppendUint32(b, number)
	b = append(b, o.mark[:]...)
	b = append(b, o.volume...)
	b = append(b, make([]byte, segmentHead-4-len(b))...)
	return binary.LittleEndian.AppendUint32(b, sum(b))
}

// originIn reads the head of a segment; form is 0 if it is damaged.
func originIn(b []byte) (o origin, form uint32) {
	if len(b) < segmentHead || string(b[:8]) != segmentMagic || binary.LittleEndian.Uint32(b[segmentHead-4:]) != sum(b[:segmentHead-4]) {
		return origin{}, 0
	}
	copy(o.mark[:], b[16:])
	o.volume = string(b[24 : 24+volumeIDSize])
	return o, binary.LittleEndian.Uint32(b[8:])
}

// foot ends a full segment, whose seal begins at a place.
func foot(m mark, seal uint32) []byte {
	b := append(make([]byte, 0, segmentFoot), m[:]...)
	b = binary.LittleEndian.AppendUint32(b, seal)
	return binary.LittleEndian.AppendUint32(b, sum(b))
}

func sealIn(b []byte, m mark) (seal uint32, ok bool) {
	if len(b) != segmentFoot || !bytes.Equal(b[:8], m[:]) || binary.LittleEndian.Uint32(b[12:]) != sum(b[:12]) {
		return 0, false
	}
	return binary.LittleEndian.Uint32(b[8:]), true
}
