// Package fat mends the FAT32 file system of an EFI system partition after a
// power cut, before it is mounted.
//
// # Why not fsck.vfat
//
// FAT has no journal. A rename that was cut in the middle leaves two names of one
// chain of clusters, and fsck.vfat -a ends that by cutting off one of the two
// files, whichever stands later in the directory: a boot image under its
// confirmed name can end with no bytes, and a chain that is shared from its middle
// on is cut there. Its other modes ask a person. So this package knows the few
// things that a cut leaves behind, and does to each what cannot cost anything
// that was synced:
//
//	found                                          done
//	the mark of a file system that was in use      cleared, if nothing below is left alone
//	the copies of the table differ                 the first, which everybody reads, is copied
//	clusters that belong to no file                freed
//	a file longer than its clusters                ends with them
//	a chain that runs into a free cluster          ends there, as above
//	more clusters than the length needs            freed
//	a directory that goes on in what is none       ends before it: it was about to grow, and the new
//	                                               cluster still has what somebody else left there
//	an empty entry before others                   marked as deleted: Linux reads on behind it, UEFI does not
//	two names of one file                          the name that the rename was to stays
//	anything else                                  said, and left alone; nothing of it is freed
//
// Files go through these names in this order, so of two names of one chain the
// later one stays: "….tmp" or a name that begins with a dot, "NAME+LEFT.efi",
// "NAME+LEFT-DONE.efi" by growing DONE, "NAME.efi". If the names are of different
// files, the one whose length fits the chain stays; if both fit, both are left alone.
//
// # What always holds
//
//   - The content of a file is never written to, and a chain that two files share
//     is never cut.
//   - The mark is cleared last. A repair that is cut itself is begun again, and
//     comes to the same end.
//
// The format: Microsoft, "FAT32 File System Specification", 1.03. FAT12 and FAT16
// are not known ([ErrOther]).
package fat

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// ErrOther is for what is no FAT32, or one of a shape that Linux and UEFI do not make.
var ErrOther = errors.New("no file system that can be checked")

// Disk is a partition, or an image of one.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Report is what was found. The zero Report is a file system without a fault.
type Report struct {
	InUse   bool     // it was not unmounted
	Copies  bool     // the copies of the table differed
	Freed   int      // clusters
	Holes   int      // entries of directories that were empty, with others behind them
	Cut     []string // files and directories that lost an end which was never on the disk
	Dropped []string // second names of files
	Left    []string // what was left alone, each with the reason
}

// Clean tells whether there was nothing to mend.
func (r Report) Clean() bool {
	return !r.InUse && !r.Copies && r.Freed+r.Holes == 0 && len(r.Cut)+len(r.Dropped)+len(r.Left) == 0
}

const (
	slot      = 32 // bytes of a directory entry
	firstReal = 2  // number of the first cluster
	mask      = 0x0fffffff
	lastMark  = 0x0ffffff8 // and above: the last cluster of a chain
	unmounted = 0x08000000 // of the table's second entry: in good order
	stateAt   = 0x41       // in the boot sector; bit 0: in use, as Linux marks it
	mostCount = 1 << 22    // clusters; the table is kept in memory
	deepest   = 16         // directories in one another
)

type volume struct {
	disk                      Disk
	boot                      []byte
	sector, cluster           int64 // bytes
	tableAt, tableSize, spare int64 // bytes; spare is where the second copy is, 0 for none
	dataAt                    int64
	end                       uint32 // number behind the last cluster
	root                      uint32

	table, old []byte // the first copy, to be changed, and as it was
	files      []*file
	owners     []uint16        // of each cluster, how many; 0xffff stands for as many and more
	partly     bool            // some directory could not be read
	entered    map[uint32]bool // first clusters of directories
	report     Report
}

// file is a file or a directory.
type file struct {
	path, name string
	slots      []int64 // where its entries lie, the last has cluster and length
	dir        bool
	first      uint32
	size       uint32
	chain      []uint32
	whole      bool // the chain ends as it should
	// Of a directory: from which cluster of its chain on it is none (0 if it is one to its
	// end), and what makes empty entries that have others behind them deleted ones.
	strayed int
	holes   []change
	gone    bool
}

// Repair checks the file system on a disk and mends it.
func Repair(d Disk) (Report, error) {
	v, err := open(d)
	if err != nil {
		return Report{}, err
	}
	v.readAll()
	v.resolve()
	v.count()
	var entries []change
	for _, f := range v.files {
		if c, changed := v.fit(f); changed {
			entries = append(entries, c...)
		}
	}
	v.free()
	return v.report, v.write(entries)
}

func open(d Disk) (*volume, error) {
	boot := make([]byte, 512)
	if _, err := d.ReadAt(boot, 0); err != nil {
		return nil, err
	}
	u16 := func(at int) int64 { return int64(binary.LittleEndian.Uint16(boot[at:])) }
	u32 := func(at int) int64 { return int64(binary.LittleEndian.Uint32(boot[at:])) }
	v := &volume{disk: d, boot: boot, sector: u16(11), root: uint32(u32(44))}
	v.cluster = v.sector * int64(boot[13])
	copies, total := int64(boot[16]), u32(32)
	v.tableAt, v.tableSize = u16(14)*v.sector, u32(36)*v.sector
	v.dataAt = v.tableAt + copies*v.tableSize
	switch {
	case u16(510) != 0xaa55, v.sector < 512, v.sector > 4096, v.sector&(v.sector-1) != 0, boot[13] == 0, boot[13]&(boot[13]-1) != 0,
		v.tableAt == 0, copies < 1, copies > 2,
		u16(17) != 0, u16(19) != 0, u16(22) != 0, // of FAT12 and FAT16
		u16(40)&0x80 != 0, // another table than the first is in use
		u16(42) != 0, total*v.sector <= v.dataAt:
		return nil, ErrOther
	}
	count := (total*v.sector - v.dataAt) / v.cluster
	v.end = uint32(count + firstReal)
	if count < 1 || count > mostCount || v.tableSize < int64(v.end)*4 || v.tableSize > 8*mostCount || !v.real(v.root) {
		return nil, ErrOther
	}
	v.table = make([]byte, v.tableSize)
	if _, err := d.ReadAt(v.table, v.tableAt); err != nil {
		return nil, err
	}
	if v.table[0] != boot[21] {
		return nil, fmt.Errorf("%w: its table is not one", ErrOther)
	}
	v.old = bytes.Clone(v.table)
	if copies == 2 {
		v.spare = v.tableAt + v.tableSize
	}
	v.owners, v.entered = make([]uint16, v.end), map[uint32]bool{}
	v.report.InUse = boot[stateAt]&1 != 0 || v.next(1)&unmounted == 0
	return v, nil
}

func (v *volume) real(c uint32) bool   { return c >= firstReal && c < v.end }
func (v *volume) at(c uint32) int64    { return v.dataAt + int64(c-firstReal)*v.cluster }
func (v *volume) next(c uint32) uint32 { return binary.LittleEndian.Uint32(v.table[4*c:]) & mask }
func (v *volume) set(c, to uint32) { // its highest four bits are nobody's
	e := v.table[4*c:]
	binary.LittleEndian.PutUint32(e, binary.LittleEndian.Uint32(e)&^uint32(mask)|to)
}
func (v *volume) leave(path, why string) { v.report.Left = append(v.report.Left, path+": "+why) }

// follow lists a chain's clusters. It is whole if it ends with a mark.
func (v *volume) follow(first uint32) (chain []uint32, whole bool) {
	seen := map[uint32]bool{}
	for c := first; v.real(c) && v.next(c) != 0 && !seen[c]; c = v.next(c) {
		seen[c] = true
		chain = append(chain, c)
		if v.next(c) >= lastMark {
			return chain, true
		}
	}
	return chain, false
}

// readAll lists all files and directories.
func (v *volume) readAll() {
	root := &file{path: "/", dir: true, first: v.root}
	v.files = append(v.files, root)
	v.read(root, "", 0)
}

// read lists the files of a directory and of those below it.
func (v *volume) read(dir *file, path string, depth int) {
	chain, _ := v.follow(dir.first)
	if depth > deepest {
		v.doubt(path, "too deep")
		return
	}
	if v.entered[dir.first] { // by another name, which is found out later
		return
	}
	v.entered[dir.first] = true
	raw := make([]byte, v.cluster)
	var d directory
	var empty []change
	for i, c := range chain {
		if _, err := v.disk.ReadAt(raw, v.at(c)); err != nil {
			v.doubt(path, err.Error())
			return
		}
		if i == 0 && (depth > 0 && !startsWith(raw, dir.first) || !onlyEntries(raw)) {
			v.doubt(dir.path, "it is no directory")
			return
		}
		if !onlyEntries(raw) {
			dir.strayed = i
			return
		}
		for at := int64(0); at < v.cluster; at += slot {
			f := d.entry(raw[at:at+slot], v.at(c)+at)
			switch raw[at] {
			case 0:
				empty = append(empty, change{v.at(c) + at, []byte{deleted}})
			case deleted:
			default:
				dir.holes = append(dir.holes, empty...)
				empty = nil
			}
			if f == nil {
				continue
			}
			f.path = path + "/" + f.name
			v.files = append(v.files, f)
			if f.dir {
				v.read(f, f.path, depth+1)
			}
		}
	}
}

// doubt is for a directory of which not all is known: what is missing may own any cluster.
func (v *volume) doubt(path, why string) {
	v.partly = true
	v.leave(path, why)
}

// resolve leaves one name of each file that has two.
func (v *volume) resolve() {
	for _, f := range v.files {
		f.chain, f.whole = v.follow(f.first)
	}
	byCluster := map[uint32]*file{} // whoever has it, the best name first
	for _, f := range slices.SortedStableFunc(slices.Values(v.files), func(a, b *file) int { return cmp.Compare(b.stage(), a.stage()) }) {
		for _, c := range f.chain {
			other := byCluster[c]
			if other == nil || other.gone {
				continue
			}
			drop := v.second(other, f)
			if drop == nil {
				v.leave(f.path, "it shares clusters with "+other.path)
				break
			}
			drop.gone = true
			v.report.Dropped = append(v.report.Dropped, drop.path)
			if f.gone {
				break
			}
		}
		if !f.gone {
			for _, c := range f.chain {
				if o := byCluster[c]; o == nil || o.gone {
					byCluster[c] = f
				}
			}
		}
	}
}

// second is the one of two files with a cluster in common that only seems to be
// one; nil if neither surely is. The name of b is at no later stage than that of a.
func (v *volume) second(a, b *file) *file {
	switch {
	case a.dir || b.dir:
		return nil
	case b.stage() == 0: // worthless, whatever it holds
		return b
	case a.first != b.first:
		return nil
	case a.stem() == b.stem() && a.stage() > b.stage() && a.size == b.size:
		return b
	case v.fits(a) && !v.fits(b):
		return b
	case v.fits(b) && !v.fits(a):
		return a
	}
	return nil
}

// fits tells whether a file has the clusters that it needs, and no more.
func (v *volume) fits(f *file) bool { return f.whole && v.needs(f) == len(f.chain) }

func (v *volume) needs(f *file) int { return int((int64(f.size) + v.cluster - 1) / v.cluster) }

// count tells of each cluster how many files have it.
func (v *volume) count() {
	for _, f := range v.files {
		if f.gone {
			continue
		}
		for _, c := range f.chain {
			v.owners[c] = min(v.owners[c], 0xfffe) + 1
		}
	}
}

// change is bytes to be written.
type change struct {
	at  int64
	raw []byte
}

// fit makes a file's length and chain agree. A name that is gone takes all its slots.
func (v *volume) fit(f *file) (c []change, changed bool) {
	if f.gone {
		for _, at := range slices.Backward(f.slots) { // the long name alone names nothing
			c = append(c, change{at, []byte{deleted}})
		}
		return c, true
	}
	if slices.ContainsFunc(f.chain, func(c uint32) bool { return v.owners[c] > 1 }) {
		return nil, false
	}
	if f.dir {
		v.fitDir(f)
		v.report.Holes += len(f.holes)
		return f.holes, len(f.holes) > 0
	}
	need := v.needs(f)
	if need == len(f.chain) && (f.whole || need == 0 && f.first == 0) {
		return nil, false
	}
	keep := min(need, len(f.chain))
	if len(f.chain) < need {
		f.size = uint32(int64(keep) * v.cluster)
		v.report.Cut = append(v.report.Cut, f.path)
	}
	for _, c := range f.chain[keep:] {
		v.owners[c] = 0
	}
	if keep > 0 {
		if v.next(f.chain[keep-1]) < lastMark {
			v.set(f.chain[keep-1], mask)
		}
	} else {
		f.first, f.size = 0, 0
	}
	return v.entry(f), true
}

// fitDir ends a directory where its chain does, or where that leads to what is none.
func (v *volume) fitDir(f *file) {
	switch {
	case f.strayed > 0:
		for _, c := range f.chain[f.strayed:] {
			v.owners[c] = 0
		}
		v.set(f.chain[f.strayed-1], mask)
		v.report.Cut = append(v.report.Cut, f.path)
	case f.whole:
	case len(f.chain) == 0:
		v.doubt(f.path, "it has no clusters")
	default:
		v.set(f.chain[len(f.chain)-1], mask)
		v.report.Cut = append(v.report.Cut, f.path)
	}
}

// entry writes the cluster and length of a file.
func (v *volume) entry(f *file) []change {
	at := f.slots[len(f.slots)-1]
	var high, low [2]byte
	var size [4]byte
	binary.LittleEndian.PutUint16(high[:], uint16(f.first>>16))
	binary.LittleEndian.PutUint16(low[:], uint16(f.first))
	binary.LittleEndian.PutUint32(size[:], f.size)
	return []change{{at + highAt, high[:]}, {at + lowAt, low[:]}, {at + sizeAt, size[:]}}
}

// free frees the clusters that belong to no file.
func (v *volume) free() {
	if v.partly {
		return
	}
	const bad = 0x0ffffff7
	for c := uint32(firstReal); c < v.end; c++ {
		if n := v.next(c); n != 0 && n != bad && v.owners[c] == 0 {
			v.set(c, 0)
			v.report.Freed++
		}
	}
}

// write writes names before the table, so that no cluster is free while a name
// has it, and the mark last.
func (v *volume) write(entries []change) error {
	for _, c := range entries {
		if _, err := v.disk.WriteAt(c.raw, c.at); err != nil {
			return err
		}
	}
	if len(entries) > 0 {
		if err := v.disk.Sync(); err != nil {
			return err
		}
	}
	if len(v.report.Left) == 0 {
		v.set(1, v.next(1)|unmounted)
	}
	if err := v.writeTables(); err != nil {
		return err
	}
	if v.boot[stateAt]&1 == 0 || len(v.report.Left) > 0 {
		return nil
	}
	if _, err := v.disk.WriteAt([]byte{v.boot[stateAt] &^ 1}, stateAt); err != nil {
		return err
	}
	return v.disk.Sync()
}

// writeTables writes the sectors of both copies that are not as they should be.
func (v *volume) writeTables() error {
	second := v.old
	if v.spare != 0 {
		second = make([]byte, v.tableSize)
		if _, err := v.disk.ReadAt(second, v.spare); err != nil {
			return err
		}
		v.report.Copies = !bytes.Equal(second[:4*v.end], v.old[:4*v.end])
	}
	wrote := false
	for at := int64(0); at < v.tableSize; at += v.sector {
		want := v.table[at : at+v.sector]
		for _, t := range []struct {
			at  int64
			now []byte
		}{{v.tableAt, v.old}, {v.spare, second}} {
			if t.at == 0 || bytes.Equal(want, t.now[at:at+v.sector]) {
				continue
			}
			if _, err := v.disk.WriteAt(want, t.at+at); err != nil {
				return err
			}
			wrote = true
		}
	}
	if !wrote {
		return nil
	}
	return errors.Join(v.writeFree(), v.disk.Sync())
}

// writeFree puts the number of free clusters into the FSInfo sector, which is a hint.
func (v *volume) writeFree() error {
	at := int64(binary.LittleEndian.Uint16(v.boot[48:])) * v.sector
	if at == 0 || at >= v.tableAt {
		return nil
	}
	info := make([]byte, 512)
	if _, err := v.disk.ReadAt(info, at); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(info) != 0x41615252 || binary.LittleEndian.Uint32(info[484:]) != 0x61417272 {
		return nil
	}
	free := uint32(0)
	for c := uint32(firstReal); c < v.end; c++ {
		if v.next(c) == 0 {
			free++
		}
	}
	binary.LittleEndian.PutUint32(info[488:], free)
	_, err := v.disk.WriteAt(info[488:492], at+488)
	return err
}
