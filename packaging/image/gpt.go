package main

import (
	"encoding/binary"
	"hash/crc32"
	"io"
	"unicode/utf16"
)

const (
	sector    = 512
	alignment = 2048 // sectors: 1 MiB, where partitions begin

	gptEntries   = 128
	gptEntrySize = 128
	gptTable     = gptEntries * gptEntrySize / sector // sectors
)

// guid is a GUID as UEFI writes it to disk: the first three groups little-endian
// (UEFI specification, appendix A).
type guid [16]byte

func makeGUID(a uint32, b, c uint16, d uint64) (g guid) {
	binary.LittleEndian.PutUint32(g[:], a)
	binary.LittleEndian.PutUint16(g[4:], b)
	binary.LittleEndian.PutUint16(g[6:], c)
	binary.BigEndian.PutUint64(g[8:], d)
	return g
}

var (
	// typeESP is the type of an EFI system partition (UEFI specification, table 5-7).
	typeESP = makeGUID(0xC12A7328, 0xF81F, 0x11D2, 0xBA4B00A0C93EC93B)

	// The same in every image, so that two builds are equal. They were drawn at random once.
	diskGUID = makeGUID(0x6bfd1d5a, 0x1d2c, 0x4b66, 0x9e0c5c2f1a7d3e84)
	espGUID  = makeGUID(0x2e4f7c19, 0x86d3, 0x4f0a, 0xb1573d90c6e8a2f5)
)

type partition struct {
	kind, id    guid
	first, last uint64 // sectors, inclusive
	name        string // 36 UTF-16 units at most
}

// writeGPT writes the partition table of a disk of so many sectors, twice, with
// the MBR that protects it (UEFI specification, chapter 5).
func writeGPT(w io.WriterAt, sectors uint64, disk guid, parts []partition) error {
	table := make([]byte, gptEntries*gptEntrySize)
	for i, p := range parts {
		e := table[i*gptEntrySize:][:gptEntrySize]
		copy(e[0:], p.kind[:])
		copy(e[16:], p.id[:])
		binary.LittleEndian.PutUint64(e[32:], p.first)
		binary.LittleEndian.PutUint64(e[40:], p.last)
		for j, unit := range utf16.Encode([]rune(p.name)) {
			binary.LittleEndian.PutUint16(e[56+2*j:], unit)
		}
	}
	last := sectors - 1
	for _, part := range []struct {
		at      uint64
		content []byte
	}{
		{0, protectiveMBR(sectors)},
		{1, gptHeader(1, last, 2, sectors, disk, table)},
		{2, table},
		{last - gptTable, table},
		{last, gptHeader(last, 1, last-gptTable, sectors, disk, table)},
	} {
		if _, err := w.WriteAt(part.content, int64(part.at)*sector); err != nil {
			return err
		}
	}
	return nil
}

func gptHeader(here, other, tableAt, sectors uint64, disk guid, table []byte) []byte {
	h := make([]byte, sector)
	copy(h, "EFI PART")
	le := binary.LittleEndian
	le.PutUint32(h[8:], 0x00010000) // revision 1.0
	const size = 92
	le.PutUint32(h[12:], size)
	le.PutUint64(h[24:], here)
	le.PutUint64(h[32:], other)
	le.PutUint64(h[40:], 2+gptTable)         // first usable sector
	le.PutUint64(h[48:], sectors-2-gptTable) // last usable sector
	copy(h[56:], disk[:])
	le.PutUint64(h[72:], tableAt)
	le.PutUint32(h[80:], gptEntries)
	le.PutUint32(h[84:], gptEntrySize)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:size])) // over itself as 0
	return h
}

func protectiveMBR(sectors uint64) []byte {
	m := make([]byte, sector)
	e := m[446:]
	copy(e, []byte{0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF})
	binary.LittleEndian.PutUint32(e[8:], 1)
	binary.LittleEndian.PutUint32(e[12:], uint32(min(sectors-1, 0xFFFFFFFF)))
	m[510], m[511] = 0x55, 0xAA
	return m
}
