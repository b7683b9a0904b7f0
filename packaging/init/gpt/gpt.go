// Package gpt reads a GUID partition table (UEFI specification 2.10, section
// 5.3), adds partitions, and lets the last one grow with its disk. It does no
// more than the image and the first boot of a device need.
//
// Why it is written here: a power cut may come at any point. A change is first
// written as the backup table at the end of the disk and made durable, then as
// the primary table, which the backup replaces if the write was torn. No library
// that we know orders and syncs its writes so.
//
// # What always holds
//
//   - After a cut at any point one of the two tables is whole, and is the old one
//     or the new one; [Repair] makes them alike again.
//   - Entries that were there before keep their bytes.
//   - What [Read] returns has a valid checksum; its partitions lie in the disk's
//     usable part, do not overlap, and are no more than [MaxEntries].
//
// Blocks of 512 bytes only; that the disk has such, the caller makes sure. Not here:
// anything that removes, moves or shrinks a partition.
package gpt

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"unicode/utf16"
)

const (
	// Block is the size of a logical block, bytes.
	Block = 512
	// MaxEntries is how many entries a table may have; 128 are usual.
	MaxEntries = 256

	entrySize  = 128
	headerSize = 92
	nameUnits  = 36 // UTF-16 code units
	align      = 1 << 20 / Block
)

// GUID is an identifier as it stands in the table: its first three fields are little-endian.
type GUID [16]byte

// String is the usual text form, in lower case.
func (g GUID) String() string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(g[:]), binary.LittleEndian.Uint16(g[4:]),
		binary.LittleEndian.Uint16(g[6:]), g[8:10], g[10:])
}

// Types of partitions: UEFI specification, table 5.7, and the Discoverable Partitions Specification.
var (
	EFISystem = GUID{0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b}
	LinuxData = GUID{0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4}
)

// ErrNone is returned for a disk that has no GUID partition table.
var ErrNone = errors.New("the disk has no GUID partition table")

// ErrFull is returned when there is no room for another partition.
var ErrFull = errors.New("the disk has no room for another partition")

// Disk is a block device or its image. Sync makes what was written durable.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Partition is one used entry. First and Last are blocks, both included.
type Partition struct {
	Number      int // from 1, as in the kernel's names
	Type, ID    GUID
	First, Last int64
	Name        string
}

// Size in bytes.
func (p Partition) Size() int64 { return (p.Last - p.First + 1) * Block }

// Table is a valid partition table.
type Table struct {
	Disk       GUID
	Partitions []Partition // by number

	header  [Block]byte
	entries []byte
}

// Read takes the primary table, or the backup in the disk's last block if that
// is damaged. size is the disk's, in bytes.
func Read(d io.ReaderAt, size int64) (*Table, error) {
	t, err := readAt(d, size, 1)
	if err == nil {
		return t, nil
	}
	backup, errBackup := readAt(d, size, size/Block-1)
	if errBackup == nil {
		return backup, nil
	}
	if errors.Is(err, ErrNone) && !errors.Is(errBackup, ErrNone) {
		return nil, errBackup
	}
	return nil, err
}

func readAt(d io.ReaderAt, size, at int64) (*Table, error) {
	blocks := size / Block
	if at < 1 || at >= blocks {
		return nil, ErrNone
	}
	t := &Table{}
	if _, err := d.ReadAt(t.header[:], at*Block); err != nil {
		return nil, fmt.Errorf("read the partition table: %w", err)
	}
	h := t.header[:]
	if string(h[:8]) != "EFI PART" {
		return nil, ErrNone
	}
	if n := le32(h, 12); n < headerSize || n > Block {
		return nil, fmt.Errorf("the partition table has a header of %d bytes", n)
	}
	if le32(h, 16) != checksum(h[:le32(h, 12)], 16) {
		return nil, errors.New("the partition table's header is damaged")
	}
	if le64(h, 24) != at {
		return nil, errors.New("the partition table stands in the wrong place")
	}
	n, each := le32(h, 80), le32(h, 84)
	if n == 0 || n > MaxEntries || each != entrySize {
		return nil, fmt.Errorf("the partition table has %d entries of %d bytes; %d of %d are the most that is understood", n, each, MaxEntries, entrySize)
	}
	first, usable, last := le64(h, 72), le64(h, 40), le64(h, 48)
	length := (int64(n)*entrySize + Block - 1) / Block
	if first < 2 || first > blocks-length || usable < 2 || last < usable || last >= blocks {
		return nil, errors.New("the partition table describes another disk")
	}
	t.entries = make([]byte, n*entrySize)
	if _, err := d.ReadAt(t.entries, first*Block); err != nil {
		return nil, fmt.Errorf("read the partition table: %w", err)
	}
	if crc32.ChecksumIEEE(t.entries) != le32(h, 88) {
		return nil, errors.New("the partition table's entries are damaged")
	}
	copy(t.Disk[:], h[56:])
	return t, t.parse(usable, last)
}

func (t *Table) parse(usable, last int64) error {
	t.Partitions = nil
	for i := 0; i*entrySize < len(t.entries); i++ {
		e := t.entries[i*entrySize:][:entrySize]
		p := Partition{Number: i + 1, Type: GUID(e[:16]), ID: GUID(e[16:32]), First: le64(e, 32), Last: le64(e, 40), Name: decodeName(e[56:])}
		if p.Type == (GUID{}) {
			continue
		}
		if p.First < usable || p.Last < p.First || p.Last > last {
			return fmt.Errorf("partition %d lies outside of the disk's usable part", p.Number)
		}
		t.Partitions = append(t.Partitions, p)
	}
	sorted := slices.SortedFunc(slices.Values(t.Partitions), func(a, b Partition) int { return cmp.Compare(a.First, b.First) })
	for i := 1; i < len(sorted); i++ {
		if sorted[i].First <= sorted[i-1].Last {
			return fmt.Errorf("partitions %d and %d overlap", sorted[i-1].Number, sorted[i].Number)
		}
	}
	return nil
}

// Find returns the first partition that has this name.
func (t *Table) Find(name string) (Partition, bool) {
	i := slices.IndexFunc(t.Partitions, func(p Partition) bool { return p.Name == name })
	if i < 0 {
		return Partition{}, false
	}
	return t.Partitions[i], true
}

// Append adds a partition from the end of the last one, rounded up to 1 MiB, to
// the end of a disk of size bytes. It changes t only; see [Table.Write].
func (t *Table) Append(size int64, kind, id GUID, name string, atLeast int64) (Partition, error) {
	p := Partition{Type: kind, ID: id, First: le64(t.header[:], 40), Last: t.lastUsable(size), Name: name}
	for _, q := range t.Partitions {
		p.First = max(p.First, q.Last+1)
	}
	p.First = (p.First + align - 1) / align * align
	p.Last = (p.Last+1)/align*align - 1
	if p.Last < p.First || p.Size() < atLeast {
		return Partition{}, ErrFull
	}
	return t.Add(p)
}

// Add adds a partition where p says, under the first free number. It changes t
// only; whether the disk is large enough, [Table.Write] tells.
func (t *Table) Add(p Partition) (Partition, error) {
	units := utf16.Encode([]rune(p.Name))
	if len(units) > nameUnits {
		return Partition{}, fmt.Errorf("%q is too long for the name of a partition", p.Name)
	}
	taken := func(q Partition) bool { return p.First <= q.Last && q.First <= p.Last }
	if p.First < le64(t.header[:], 40) || p.Last < p.First || slices.ContainsFunc(t.Partitions, taken) {
		return Partition{}, fmt.Errorf("a partition cannot be from block %d to %d", p.First, p.Last)
	}
	for p.Number = 1; slices.ContainsFunc(t.Partitions, func(q Partition) bool { return q.Number == p.Number }); {
		p.Number++
	}
	if p.Number*entrySize > len(t.entries) {
		return Partition{}, ErrFull
	}
	e := t.entries[(p.Number-1)*entrySize:][:entrySize]
	clear(e)
	copy(e, p.Type[:])
	copy(e[16:], p.ID[:])
	put64(e, 32, p.First)
	put64(e, 40, p.Last)
	for i, u := range units {
		binary.LittleEndian.PutUint16(e[56+2*i:], u)
	}
	t.Partitions = append(t.Partitions, p)
	slices.SortFunc(t.Partitions, func(a, b Partition) int { return cmp.Compare(a.Number, b.Number) })
	return p, nil
}

// Grow lets a partition that is the disk's last end where the disk ends. ok is
// false if there is less than 1 MiB to win, or another partition behind it. It
// changes t only; see [Table.Write].
func (t *Table) Grow(size int64, number int) (p Partition, ok bool) {
	i := slices.IndexFunc(t.Partitions, func(p Partition) bool { return p.Number == number })
	if i < 0 {
		return Partition{}, false
	}
	p = t.Partitions[i]
	last := (t.lastUsable(size)+1)/align*align - 1
	behind := slices.ContainsFunc(t.Partitions, func(q Partition) bool { return q.First > p.Last })
	if behind || last <= p.Last {
		return p, false
	}
	p.Last = last
	t.Partitions[i] = p
	put64(t.entries[(number-1)*entrySize:], 40, last)
	return p, true
}

// lastUsable is the last block before the backup table of a disk of that size.
func (t *Table) lastUsable(size int64) int64 { return size/Block - 2 - t.length() }

func (t *Table) length() int64 { return (int64(len(t.entries)) + Block - 1) / Block }

// Write makes t the table of a disk of size bytes: the backup first.
func (t *Table) Write(d Disk, size int64) error {
	end := size/Block - 1
	for _, p := range t.Partitions {
		if p.Last > t.lastUsable(size) {
			return fmt.Errorf("partition %d does not fit on the disk", p.Number)
		}
	}
	first := le64(t.header[:], 72)
	if le64(t.header[:], 24) != 1 {
		first = 2 // t was the backup
	}
	if first+t.length() > le64(t.header[:], 40) {
		return errors.New("the partition table has no room before the first usable block")
	}
	backup := t.copyFor(size, end, 1, end-t.length())
	if err := writeSynced(d, end-t.length(), append(padded(t.entries), backup...)); err != nil {
		return err
	}
	primary := t.copyFor(size, 1, end, first)
	if first == 2 { // header and entries are neighbours: one write
		return writeSynced(d, 1, append(primary, padded(t.entries)...))
	}
	if err := writeSynced(d, first, padded(t.entries)); err != nil {
		return err
	}
	return writeSynced(d, 1, primary)
}

func (t *Table) copyFor(size, at, other, entries int64) []byte {
	h := bytes.Clone(t.header[:])
	put64(h, 24, at)
	put64(h, 32, other)
	put64(h, 48, t.lastUsable(size))
	put64(h, 72, entries)
	binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(t.entries))
	binary.LittleEndian.PutUint32(h[16:], checksum(h[:le32(h, 12)], 16))
	return h
}

func writeSynced(d Disk, block int64, raw []byte) error {
	if _, err := d.WriteAt(raw, block*Block); err != nil {
		return fmt.Errorf("write the partition table: %w", err)
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("write the partition table: %w", err)
	}
	return nil
}

// Repair writes both tables anew if the primary one is damaged or the backup is
// not at the disk's end, and tells whether it did.
func Repair(d Disk, size int64) (bool, error) {
	primary, errPrimary := readAt(d, size, 1)
	backup, errBackup := readAt(d, size, size/Block-1)
	switch {
	case errPrimary != nil && errBackup != nil:
		return false, errPrimary
	case errPrimary != nil:
		return true, backup.Write(d, size)
	case errBackup != nil || !bytes.Equal(primary.entries, backup.entries):
		return true, primary.Write(d, size)
	}
	return false, nil
}

// New is an empty table with 128 entries for a disk of size bytes. It does not
// contain the protective MBR; see [ProtectiveMBR].
func New(disk GUID) *Table {
	t := &Table{Disk: disk, entries: make([]byte, 128*entrySize)}
	h := t.header[:]
	copy(h, "EFI PART\x00\x00\x01\x00")
	binary.LittleEndian.PutUint32(h[12:], headerSize)
	put64(h, 24, 1)
	put64(h, 40, 2+t.length())
	copy(h[56:], disk[:])
	put64(h, 72, 2)
	binary.LittleEndian.PutUint32(h[80:], 128)
	binary.LittleEndian.PutUint32(h[84:], entrySize)
	return t
}

// ProtectiveMBR is block 0 of a disk of size bytes with a GUID partition table,
// without which the kernel does not look for one.
func ProtectiveMBR(size int64) []byte {
	mbr := make([]byte, Block)
	e := mbr[446:]
	copy(e[1:], []byte{0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff})
	binary.LittleEndian.PutUint32(e[8:], 1)
	binary.LittleEndian.PutUint32(e[12:], uint32(min(size/Block-1, 0xffffffff)))
	mbr[510], mbr[511] = 0x55, 0xaa
	return mbr
}

// checksum is the CRC-32 of a header whose own checksum, at offset, counts as 0.
func checksum(h []byte, offset int) uint32 {
	h = bytes.Clone(h)
	clear(h[offset : offset+4])
	return crc32.ChecksumIEEE(h)
}

func padded(b []byte) []byte {
	return append(bytes.Clone(b), make([]byte, -len(b)&(Block-1))...)
}

func decodeName(raw []byte) string {
	var units []uint16
	for i := 0; i+1 < len(raw) && len(units) < nameUnits; i += 2 {
		u := binary.LittleEndian.Uint16(raw[i:])
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}

func le32(b []byte, at int) uint32    { return binary.LittleEndian.Uint32(b[at:]) }
func le64(b []byte, at int) int64     { return int64(binary.LittleEndian.Uint64(b[at:])) }
func put64(b []byte, at int, v int64) { binary.LittleEndian.PutUint64(b[at:], uint64(v)) }
