// Package initramfs makes the root file system that a Linux kernel starts from:
// a cpio archive in the format "newc" (Documentation/driver-api/early-userspace/buffer-format),
// and finds the kernel modules that go into it.
//
// The same contents give the same bytes: names are sorted, and owners, times and
// inode numbers are 0.
package initramfs

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
)

// File types of the mode, as in stat(2).
const (
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeSymlink = 0o120000
)

// Archive is a root file system in the making. Names are slash-separated and
// relative to the root, without a leading slash. Parents are made as needed. The zero value is
// empty and ready.
type Archive struct {
	entries map[string]entry
	twice   []string
}

type entry struct {
	mode    uint32
	content []byte // of a symlink, its target
}

// Dir adds empty directories.
func (a *Archive) Dir(names ...string) {
	for _, name := range names {
		if e, ok := a.entries[name]; !ok || e.mode != typeDir|0o755 {
			a.add(name, entry{mode: typeDir | 0o755})
		}
	}
}

// File adds a file that everybody may read and, if it is a program, run.
func (a *Archive) File(name string, content []byte, program bool) {
	mode := uint32(typeRegular | 0o644)
	if program {
		mode = typeRegular | 0o755
	}
	a.add(name, entry{mode, content})
}

// Symlink adds a symbolic link.
func (a *Archive) Symlink(name, target string) {
	a.add(name, entry{typeSymlink | 0o777, []byte(target)})
}

func (a *Archive) add(name string, e entry) {
	if a.entries == nil {
		a.entries = map[string]entry{}
	}
	if dir := path.Dir(name); dir != "." {
		a.Dir(dir)
	}
	if _, ok := a.entries[name]; ok {
		a.twice = append(a.twice, name)
	}
	a.entries[name] = e
}

// Bytes is the archive. It fails if two entries have one name.
func (a *Archive) Bytes() ([]byte, error) {
	if len(a.twice) > 0 {
		return nil, fmt.Errorf("the root file system has two of %q", a.twice)
	}
	var out bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(a.entries)) { // a directory sorts before what is in it
		e := a.entries[name]
		if uint64(len(e.content)) > math.MaxUint32 {
			return nil, fmt.Errorf("%s is too large for a cpio archive", name)
		}
		write(&out, name, e)
	}
	write(&out, "TRAILER!!!", entry{})
	return out.Bytes(), nil
}

func write(out *bytes.Buffer, name string, e entry) {
	const links = 1
	fmt.Fprintf(out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		0, e.mode, 0, 0, links, 0, len(e.content), 0, 0, 0, 0, len(name)+1, 0, name)
	pad := func() { out.Write(make([]byte, -out.Len()&3)) }
	pad()
	out.Write(e.content)
	pad()
}
