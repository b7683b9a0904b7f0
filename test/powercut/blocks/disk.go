package blocks

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/packaging/qemu"
)

// Disk is the recorded disk at a moment of the record, twice: base is what is
// durable then, Work is what a cut makes of it, and may be written to by whoever
// opens it. Going on costs what was written in between; going back, a look at
// what is not a hole.
type Disk struct {
	rec      *Recording
	dir      string // of the files, and for mounts
	cache    cache
	at       int // next event
	base     *Mapped
	Work     *Mapped
	repaired int // times that the journal of a file system was not enough

	// Quiet is a part, in bytes, that is large and seldom written to. It is looked at
	// only where somebody may have written to it.
	Quiet        Region
	QuietChanges int  // that became durable before Quiet's end
	QuietWritten bool // Quiet of Work may not be what it was; who writes to it says so
}

// Region is from one byte up to another.
type Region struct{ From, To int64 }

// Mapped is a sparse file in memory.
type Mapped struct {
	*os.File
	Mem []byte
}

// OpenMapped opens a file to be written to as memory.
func OpenMapped(path string) (*Mapped, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		var mem []byte
		if mem, err = unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			return &Mapped{f, mem}, nil
		}
	}
	return nil, errors.Join(err, f.Close())
}

// End closes it.
func (m *Mapped) End() error { return errors.Join(unix.Munmap(m.Mem), m.Close()) }

// NewDisk begins before the first event. It keeps its files in a folder of its own,
// until it is closed.
func NewDisk(rec *Recording) (d *Disk, err error) {
	d = &Disk{rec: rec, cache: cache{rec: rec}}
	if d.dir, err = os.MkdirTemp(Roomy(), "deimos-powercut-"); err != nil {
		return nil, err
	}
	if d.base, err = d.file("base"); err == nil {
		d.Work, err = d.file("work")
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// file is the disk as it was before everything.
func (d *Disk) file(name string) (*Mapped, error) {
	path := filepath.Join(d.dir, name)
	if err := qemu.CopyDisk(d.rec.Path("base"), path, d.rec.size); err != nil {
		return nil, err
	}
	return OpenMapped(path)
}

// Close removes its files.
func (d *Disk) Close() (err error) {
	for _, m := range []*Mapped{d.base, d.Work} {
		if m != nil {
			err = errors.Join(err, m.End())
		}
	}
	return errors.Join(err, os.RemoveAll(d.dir))
}

// Mounted mends a file system, size bytes of Work, as packaging/init does, and mounts
// it while look looks at it. The journal mends all but what is written past it: a
// superblock of two sectors of which one got through. What that has cost shows in
// the files.
func (d *Disk) Mounted(from, size int64, look func(dir string) error) (err error) {
	loop, err := Attach(d.Work.File, from, size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loop.Detach()) }()
	if err := e2fsck(loop.Path, "-p"); err != nil {
		d.repaired++
		if err := e2fsck(loop.Path, "-y", "-f"); err != nil {
			return fmt.Errorf("the file system cannot be mended: %w", err)
		}
	}
	dir := filepath.Join(d.dir, "mounted")
	if err := Mount(loop.Path, dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, Unmount(dir)) }()
	return look(dir)
}

// Advance goes to the moment before an event.
func (d *Disk) Advance(to int) error {
	if to < d.at {
		return fmt.Errorf("the record is at event %d, past %d", d.at, to)
	}
	for ; d.at < to; d.at++ {
		for _, i := range d.cache.step(d.at) {
			p := piece{i, 0, d.rec.Events[i].Length}
			if err := errors.Join(d.apply(d.base, p), d.apply(d.Work, p)); err != nil {
				return err
			}
			if d.rec.Events[i].Offset < d.Quiet.To {
				d.QuietChanges++
			}
		}
	}
	return nil
}

// Cut makes of Work what a power cut leaves; quiet tells whether any of it lies before
// the end of Quiet.
func (d *Disk) Cut(seed uint64) (how string, quiet bool, err error) {
	kept, how := d.cache.choose(seed)
	for _, p := range kept {
		if err := d.apply(d.Work, p); err != nil {
			return how, quiet, err
		}
		quiet = quiet || d.rec.Events[p.event].Offset < d.Quiet.To
	}
	d.QuietWritten = d.QuietWritten || quiet
	return how, quiet, nil
}

func (d *Disk) apply(m *Mapped, p piece) error {
	e := d.rec.Events[p.event]
	at := e.Offset + p.from
	switch {
	case e.Kind == Write:
		copy(m.Mem[at:at+p.length], d.rec.bytes(e)[p.from:])
	case p.length > 1<<20:
		return unix.Fallocate(int(m.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, p.length)
	default:
		clear(m.Mem[at : at+p.length])
	}
	return nil
}

// Restore makes Work what it was before the cut.
func (d *Disk) Restore() error {
	const unit = 64 << 10
	done := make([]bool, (d.rec.size+unit-1)/unit)
	if !d.QuietWritten {
		for i := d.Quiet.From / unit; i < min(d.Quiet.To/unit, int64(len(done))); i++ {
			done[i] = true
		}
	}
	d.QuietWritten = false
	for _, m := range []*Mapped{d.Work, d.base} {
		err := m.extents(func(from, to int64) {
			for at := from / unit * unit; at < to; at += unit {
				if done[at/unit] {
					continue
				}
				done[at/unit] = true
				end := min(at+unit, d.rec.size)
				if !bytes.Equal(d.Work.Mem[at:end], d.base.Mem[at:end]) {
					copy(d.Work.Mem[at:end], d.base.Mem[at:end])
				}
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// extents are the parts of a file that are not holes.
func (m *Mapped) extents(f func(from, to int64)) error {
	for at, end := int64(0), int64(len(m.Mem)); at < end; {
		from, err := unix.Seek(int(m.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		to, err := unix.Seek(int(m.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		f(from, to)
		at = to
	}
	return nil
}
