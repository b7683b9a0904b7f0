package main

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// section is a part of a unified kernel image.
type section struct {
	name    string // 8 bytes at most
	content []byte
}

const (
	sectionHeader = 40
	readOnlyData  = 0x40000040 // initialized data, readable
)

// makeUKI adds sections to systemd's EFI stub, which finds them by name (UAPI
// group, "Unified Kernel Image"). Each is loaded above the last; the format is
// Microsoft's PE, and the stub must have room for the headers before its first section.
func makeUKI(stub []byte, sections []section) ([]byte, error) {
	f, err := pe.NewFile(bytes.NewReader(stub))
	if err != nil {
		return nil, fmt.Errorf("the EFI stub: %w", err)
	}
	defer f.Close()
	opt, ok := f.OptionalHeader.(*pe.OptionalHeader64)
	if !ok || len(f.Sections) == 0 || opt.SectionAlignment == 0 || opt.FileAlignment == 0 {
		return nil, errors.New("the EFI stub is no 64-bit PE image")
	}
	le := binary.LittleEndian
	header := int(le.Uint32(stub[0x3c:])) + 4 // the COFF header, behind "PE\0\0"
	optional := header + 20
	table := optional + int(f.SizeOfOptionalHeader)
	room := int(opt.SizeOfHeaders)
	for _, s := range f.Sections {
		if s.Offset != 0 {
			room = min(room, int(s.Offset))
		}
	}
	count := len(f.Sections) + len(sections)
	if table+count*sectionHeader > room {
		return nil, fmt.Errorf("the EFI stub has no room for %d more sections", len(sections))
	}

	align := func(n, to uint32) uint32 { return (n + to - 1) / to * to }
	out := slices.Clone(stub)
	address := align(opt.SizeOfImage, opt.SectionAlignment)
	for _, s := range f.Sections {
		address = max(address, align(s.VirtualAddress+max(s.VirtualSize, s.Size), opt.SectionAlignment))
	}
	added := uint32(0)
	for i, s := range sections {
		if len(s.name) > 8 || len(s.content) == 0 || len(s.content) > 1<<30 {
			return nil, fmt.Errorf("section %s of %d bytes does not fit into an EFI image", s.name, len(s.content))
		}
		out = append(out, make([]byte, int(align(uint32(len(out)), opt.FileAlignment))-len(out))...)
		size := align(uint32(len(s.content)), opt.FileAlignment)
		h := out[table+(len(f.Sections)+i)*sectionHeader:][:sectionHeader]
		clear(h)
		copy(h, s.name)
		le.PutUint32(h[8:], uint32(len(s.content)))
		le.PutUint32(h[12:], address)
		le.PutUint32(h[16:], size)
		le.PutUint32(h[20:], uint32(len(out)))
		le.PutUint32(h[36:], readOnlyData)
		out = append(out, s.content...)
		out = append(out, make([]byte, int(size)-len(s.content))...)
		address += align(size, opt.SectionAlignment)
		added += size
	}
	le.PutUint16(out[header+2:], uint16(count))
	le.PutUint32(out[optional+8:], opt.SizeOfInitializedData+added)
	le.PutUint32(out[optional+56:], address) // SizeOfImage
	le.PutUint32(out[optional+64:], 0)       // CheckSum: none
	return out, nil
}
