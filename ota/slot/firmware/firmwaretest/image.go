// Package firmwaretest makes unified kernel images for tests: right in form, and
// good for no machine.
package firmwaretest

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"fmt"
	"slices"
)

// Image is an image of a version, as IMAGE_VERSION has it, for a machine in Go's
// words ("riscv64" for one that no Deimos knows), with size bytes of kernel. The
// sections that are named are left out.
func Image(version, arch string, size int, without ...string) []byte {
	machine, ok := map[string]uint16{"arm64": pe.IMAGE_FILE_MACHINE_ARM64, "amd64": pe.IMAGE_FILE_MACHINE_AMD64, "arm": pe.IMAGE_FILE_MACHINE_ARMNT}[arch]
	if !ok {
		machine = pe.IMAGE_FILE_MACHINE_RISCV64
	}
	type section struct {
		name    string
		content []byte
	}
	sections := slices.DeleteFunc([]section{
		{".osrel", fmt.Appendf(nil, "ID=deimos\nIMAGE_ID=deimos\nIMAGE_VERSION=%s\n", version)},
		{".linux", bytes.Repeat([]byte(version+" kernel\n"), size/len(version+" kernel\n")+1)[:size]},
		{".initrd", []byte("initrd")},
	}, func(s section) bool { return slices.Contains(without, s.name) })

	const header = 0x40 // of DOS, which ends with where PE's begins
	out := make([]byte, header, header+512)
	copy(out, "MZ")
	binary.LittleEndian.PutUint32(out[0x3c:], header)
	w := bytes.NewBuffer(append(out, "PE\x00\x00"...))
	_ = binary.Write(w, binary.LittleEndian, pe.FileHeader{Machine: machine, NumberOfSections: uint16(len(sections))})
	at := uint32(w.Len() + len(sections)*binary.Size(pe.SectionHeader32{}))
	for _, s := range sections {
		h := pe.SectionHeader32{VirtualSize: uint32(len(s.content)), VirtualAddress: at, SizeOfRawData: uint32(len(s.content)), PointerToRawData: at}
		copy(h.Name[:], s.name)
		_ = binary.Write(w, binary.LittleEndian, h)
		at += uint32(len(s.content))
	}
	for _, s := range sections {
		w.Write(s.content)
	}
	return w.Bytes()
}
