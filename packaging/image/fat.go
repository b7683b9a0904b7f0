package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"unicode/utf16"
)

// The file system of the EFI system partition: FAT32 as UEFI wants it
// (Microsoft, "FAT32 File System Specification", 2000), with long names. All
// times are the first that FAT knows, 1980-01-01.
const (
	fatReserved       = 32 // sectors before the first FAT
	fatCopies         = 2
	sectorsPerCluster = 4 // at 256 MiB this makes FAT32 by the count of its clusters; 8 would be FAT16
	clusterSize       = sectorsPerCluster * sector
	fatEnd            = 0x0FFFFFFF
	firstDate         = 1<<5 | 1 // 1980-01-01
	dirEntry          = 32

	attrVolume    = 0x08
	attrDirectory = 0x10
	attrArchive   = 0x20
	attrLongName  = 0x0F
)

// file is one file of the EFI system partition, its name slash-separated.
type file struct {
	name    string
	content []byte
}

// node is a file or a directory on its way to the disk.
type node struct {
	name     string
	content  []byte
	children []*node // of a directory, in the order of their names
	dir      bool
	cluster  uint32 // its first one; 0 for an empty file
}

// fat is a file system in the making.
type fat struct {
	w        io.WriterAt
	table    []uint32
	next     uint32 // the first free cluster
	clusters uint32
	dataAt   int64 // byte offset of cluster 2
}

// writeFAT makes a file system of so many sectors, the first of which is sector
// start of the disk. The writer's zeroes are not written again.
func writeFAT(w io.WriterAt, sectors, start, serial uint32, label string, files []file) error {
	f := &fat{w: w, next: 2}
	// Each FAT holds 4 bytes a cluster; a little too large is allowed.
	perFAT := (((sectors-fatReserved)/sectorsPerCluster+2)*4 + sector - 1) / sector
	f.dataAt = int64(fatReserved+fatCopies*perFAT) * sector
	f.clusters = (sectors - fatReserved - fatCopies*perFAT) / sectorsPerCluster
	if f.clusters < 65525 {
		return fmt.Errorf("%d clusters are too few for FAT32", f.clusters)
	}
	f.table = make([]uint32, perFAT*sector/4)
	f.table[0], f.table[1] = 0x0FFFFFF8, fatEnd

	root, err := tree(files)
	if err != nil {
		return err
	}
	if err := f.writeDir(root, 0, label); err != nil {
		return err
	}

	table := make([]byte, perFAT*sector)
	for i, v := range f.table {
		binary.LittleEndian.PutUint32(table[4*i:], v)
	}
	boot := bootSector(sectors, start, perFAT, serial, label)
	info := infoSector(f.clusters-(f.next-2), f.next)
	for _, part := range []struct {
		at      uint32
		content []byte
	}{{0, boot}, {1, info}, {6, boot}, {7, info}, {fatReserved, table}, {fatReserved + perFAT, table}} {
		if _, err := w.WriteAt(part.content, int64(part.at)*sector); err != nil {
			return err
		}
	}
	return nil
}

func bootSector(sectors, start, perFAT, serial uint32, label string) []byte {
	b := make([]byte, sector)
	le := binary.LittleEndian
	copy(b, "\xEB\x58\x90MSWIN4.1")
	le.PutUint16(b[11:], sector)
	b[13] = sectorsPerCluster
	le.PutUint16(b[14:], fatReserved)
	b[16] = fatCopies
	b[21] = 0xF8              // a fixed disk
	le.PutUint16(b[24:], 63)  // sectors a track, heads: nobody asks any more
	le.PutUint16(b[26:], 255) //
	le.PutUint32(b[28:], start)
	le.PutUint32(b[32:], sectors)
	le.PutUint32(b[36:], perFAT)
	le.PutUint32(b[44:], 2) // the root directory's cluster
	le.PutUint16(b[48:], 1) // the information sector
	le.PutUint16(b[50:], 6) // the copy of this sector
	b[64], b[66] = 0x80, 0x29
	le.PutUint32(b[67:], serial)
	copy(b[71:82], fmt.Sprintf("%-11s", label))
	copy(b[82:90], "FAT32   ")
	b[510], b[511] = 0x55, 0xAA
	return b
}

func infoSector(free, next uint32) []byte {
	b := make([]byte, sector)
	le := binary.LittleEndian
	le.PutUint32(b[0:], 0x41615252)
	le.PutUint32(b[484:], 0x61417272)
	le.PutUint32(b[488:], free)
	le.PutUint32(b[492:], next)
	le.PutUint32(b[508:], 0xAA550000)
	return b
}

func tree(files []file) (*node, error) {
	root := &node{dir: true}
	for _, f := range files {
		at := root
		dirs := strings.Split(path.Dir(f.name), "/")
		if dirs[0] == "." {
			dirs = nil
		}
		for _, name := range dirs {
			next := at.child(name)
			if next == nil {
				next = &node{name: name, dir: true}
				at.children = append(at.children, next)
			}
			if !next.dir {
				return nil, fmt.Errorf("%s: %s is a file", f.name, name)
			}
			at = next
		}
		name := path.Base(f.name)
		if at.child(name) != nil {
			return nil, fmt.Errorf("two files are called %s", f.name)
		}
		at.children = append(at.children, &node{name: name, content: f.content})
	}
	root.sort()
	return root, nil
}

// child finds a name as FAT does, whatever its case.
func (n *node) child(name string) *node {
	for _, c := range n.children {
		if strings.EqualFold(c.name, name) {
			return c
		}
	}
	return nil
}

func (n *node) sort() {
	slices.SortFunc(n.children, func(a, b *node) int { return strings.Compare(a.name, b.name) })
	for _, c := range n.children {
		c.sort()
	}
}

// allocate gives a content the next clusters, one behind the other.
func (f *fat) allocate(size int) (uint32, error) {
	n := uint32((size + clusterSize - 1) / clusterSize)
	if n == 0 {
		return 0, nil
	}
	if f.next-2+n > f.clusters {
		return 0, errors.New("the files do not fit into the EFI system partition")
	}
	first := f.next
	for i := range n {
		f.table[first+i] = first + i + 1
	}
	f.table[first+n-1] = fatEnd
	f.next += n
	return first, nil
}

func (f *fat) write(content []byte, cluster uint32) error {
	if len(content) == 0 {
		return nil
	}
	_, err := f.w.WriteAt(content, f.dataAt+int64(cluster-2)*clusterSize)
	return err
}

// writeDir writes a directory and all below it. parent is the first cluster of
// the directory above, 0 for the root, which is written so in "..".
func (f *fat) writeDir(d *node, parent uint32, label string) error {
	shorts, err := shortNames(d.children)
	if err != nil {
		return err
	}
	size := 2 * dirEntry // "." and "..", or in the root the label
	for i, c := range d.children {
		size += dirEntry * (1 + longEntries(c.name, shorts[i]))
	}
	if d.cluster, err = f.allocate(size); err != nil {
		return err
	}
	self := d.cluster
	if label != "" {
		self = 0 // children name the root so
	}
	for _, c := range d.children {
		if c.dir {
			if err := f.writeDir(c, self, ""); err != nil {
				return err
			}
			continue
		}
		if c.cluster, err = f.allocate(len(c.content)); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		if err := f.write(c.content, c.cluster); err != nil {
			return err
		}
	}

	var out []byte
	if label != "" {
		out = append(out, shortEntry(fmt.Sprintf("%-11s", label), attrVolume, 0, 0)...)
	} else {
		out = append(out, shortEntry(".          ", attrDirectory, d.cluster, 0)...)
		out = append(out, shortEntry("..         ", attrDirectory, parent, 0)...)
	}
	for i, c := range d.children {
		out = append(out, longName(c.name, shorts[i])...)
		attr := byte(attrArchive)
		if c.dir {
			attr = attrDirectory
		}
		out = append(out, shortEntry(shorts[i], attr, c.cluster, uint32(len(c.content)))...)
	}
	return f.write(out, d.cluster)
}

func shortEntry(short string, attr byte, cluster, size uint32) []byte {
	e := make([]byte, dirEntry)
	le := binary.LittleEndian
	copy(e, short)
	e[11] = attr
	le.PutUint16(e[16:], firstDate) // made
	le.PutUint16(e[18:], firstDate) // read
	le.PutUint16(e[20:], uint16(cluster>>16))
	le.PutUint16(e[24:], firstDate) // written
	le.PutUint16(e[26:], uint16(cluster))
	le.PutUint32(e[28:], size)
	return e
}

// shortNames gives each file its name of 8 and 3 letters: its own if it is one,
// else the beginning with ~1, ~2 and so on.
func shortNames(nodes []*node) ([]string, error) {
	var all []string
	for _, n := range nodes {
		if n.name == "" || n.name[0] == '.' || len(n.name) > 255 || strings.Trim(n.name, " .") != n.name || !onlyLetters(n.name, " .+,;=[]") {
			return nil, fmt.Errorf("%q is no name for a file of the EFI system partition", n.name)
		}
		stem, ext := strings.ToUpper(n.name), ""
		if dot := strings.LastIndexByte(stem, '.'); dot > 0 {
			stem, ext = stem[:dot], stem[dot+1:]
		}
		short := fmt.Sprintf("%-8s%-3s", stem, ext)
		if len(stem) > 8 || len(ext) > 3 || !onlyLetters(stem+ext, "") || slices.Contains(all, short) {
			stem, ext = lettersOf(stem), lettersOf(ext)
			for i := 1; ; i++ {
				tail := fmt.Sprintf("~%d", i)
				short = fmt.Sprintf("%-8s%-3s", stem[:min(len(stem), 8-len(tail))]+tail, ext[:min(len(ext), 3)])
				if !slices.Contains(all, short) {
					break
				}
			}
		}
		all = append(all, short)
	}
	return all, nil
}

func isLetter(r rune) bool {
	return r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '_' || r == '-'
}

// onlyLetters tells whether a name has only letters that every FAT takes, and those of more.
func onlyLetters(s, more string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return !isLetter(r) && !strings.ContainsRune(more, r) })
}

func lettersOf(s string) string {
	return strings.Map(func(r rune) rune {
		if isLetter(r) {
			return r
		}
		return -1
	}, s)
}

// dotted is a short name as people write it.
func dotted(short string) string {
	return strings.TrimSuffix(strings.TrimRight(short[:8], " ")+"."+strings.TrimRight(short[8:], " "), ".")
}

// lettersInEntry is how many UTF-16 units of a long name one entry holds.
const lettersInEntry = 13

func longEntries(name, short string) int {
	if name == dotted(short) {
		return 0
	}
	return (len(utf16.Encode([]rune(name))) + lettersInEntry - 1) / lettersInEntry
}

// longName is the entries before the short one, the last part of the name first.
func longName(name, short string) []byte {
	count := longEntries(name, short)
	units := append(utf16.Encode([]rune(name)), 0)
	for len(units) < (count+1)*lettersInEntry {
		units = append(units, 0xFFFF)
	}
	var sum byte
	for i := range 11 {
		sum = sum>>1 | sum<<7
		sum += short[i]
	}
	var out []byte
	for n := count; n > 0; n-- {
		e := make([]byte, dirEntry)
		e[0] = byte(n)
		if n == count {
			e[0] |= 0x40
		}
		e[11], e[13] = attrLongName, sum
		for i, unit := range units[(n-1)*lettersInEntry:][:lettersInEntry] {
			at := 1 + 2*i
			if i >= 5 {
				at = 14 + 2*(i-5)
			}
			if i >= 11 {
				at = 28 + 2*(i-11)
			}
			binary.LittleEndian.PutUint16(e[at:], unit)
		}
		out = append(out, e...)
	}
	return out
}
