package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/packaging/qemu"
)

// disk is the recorded disk at a moment of the record, twice: base is what is
// durable then, work is what a cut makes of it, and may be written to by whoever
// opens it. Going on costs what was written in between; going back, a look at
// what is not a hole.
type disk struct {
	rec        *recording
	dir        string // of the files, and for mounts
	cache      cache
	at         int // next event
	base, work *mapped
	espChanges int  // that became durable below espEnd
	espWritten bool // to the ESP of work, since it was what base is
	repaired   int  // cuts after which the data partition's journal was not enough
}

// The ESP begins at espStart, and the data partition not before espEnd, bytes:
// changes below that are those of the ESP and of the partition table.
const (
	espStart = 1 << 20
	espEnd   = 257 << 20
)

// mapped is a sparse file in memory.
type mapped struct {
	*os.File
	mem []byte
}

func openMapped(path string) (*mapped, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		var mem []byte
		if mem, err = unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			return &mapped{f, mem}, nil
		}
	}
	return nil, errors.Join(err, f.Close())
}

func (m *mapped) close() error { return errors.Join(unix.Munmap(m.mem), m.Close()) }

// newDisk keeps its files in a folder of its own, until it is closed.
func newDisk(rec *recording) (d *disk, err error) {
	d = &disk{rec: rec, cache: cache{rec: rec}}
	if d.dir, err = os.MkdirTemp(roomy(), "deimos-powercut-"); err != nil {
		return nil, err
	}
	if d.base, err = d.file("base"); err == nil {
		d.work, err = d.file("work")
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// file is the disk as it was before everything.
func (d *disk) file(name string) (*mapped, error) {
	path := filepath.Join(d.dir, name)
	if err := qemu.CopyDisk(d.rec.path("base"), path, d.rec.Size); err != nil {
		return nil, err
	}
	return openMapped(path)
}

func (d *disk) close() (err error) {
	for _, m := range []*mapped{d.base, d.work} {
		if m != nil {
			err = errors.Join(err, m.close())
		}
	}
	return errors.Join(err, os.RemoveAll(d.dir))
}

// roomy is a folder for disks: in memory if there is room, which is many times
// as fast.
func roomy() string {
	const shm = "/dev/shm"
	var st unix.Statfs_t
	if unix.Statfs(shm, &st) == nil && int64(st.Bavail)*int64(st.Bsize) > 4<<30 {
		return shm
	}
	return os.TempDir()
}

// advance goes to the moment before an event.
func (d *disk) advance(to int) error {
	if to < d.at {
		return fmt.Errorf("the record is at event %d, past %d", d.at, to)
	}
	for ; d.at < to; d.at++ {
		for _, i := range d.cache.step(d.at) {
			p := piece{i, 0, d.rec.events[i].Length}
			if err := errors.Join(d.apply(d.base, p), d.apply(d.work, p)); err != nil {
				return err
			}
			if d.rec.events[i].Offset < espEnd {
				d.espChanges++
			}
		}
	}
	return nil
}

// cut makes of work what a power cut leaves; esp tells whether what it chose is in the ESP.
func (d *disk) cut(seed uint64) (how string, esp bool, err error) {
	kept, how := d.cache.choose(seed)
	for _, p := range kept {
		if err := d.apply(d.work, p); err != nil {
			return how, esp, err
		}
		esp = esp || d.rec.events[p.event].Offset < espEnd
	}
	d.espWritten = d.espWritten || esp
	return how, esp, nil
}

func (d *disk) apply(m *mapped, p piece) error {
	e := d.rec.events[p.event]
	at := e.Offset + p.from
	switch {
	case e.Kind == write:
		copy(m.mem[at:at+p.length], d.rec.bytes(e)[p.from:])
	case p.length > 1<<20:
		return unix.Fallocate(int(m.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, p.length)
	default:
		clear(m.mem[at : at+p.length])
	}
	return nil
}

// restore makes work what base is. The ESP is large and seldom written to, so
// that is looked at only if somebody may have.
func (d *disk) restore() error {
	const unit = 64 << 10
	done := make([]bool, (d.rec.Size+unit-1)/unit)
	if !d.espWritten {
		for i := espStart / unit; i < min(espEnd/unit, len(done)); i++ {
			done[i] = true
		}
	}
	d.espWritten = false
	for _, m := range []*mapped{d.work, d.base} {
		err := m.extents(func(from, to int64) {
			for at := from / unit * unit; at < to; at += unit {
				if done[at/unit] {
					continue
				}
				done[at/unit] = true
				end := min(at+unit, d.rec.Size)
				if !bytes.Equal(d.work.mem[at:end], d.base.mem[at:end]) {
					copy(d.work.mem[at:end], d.base.mem[at:end])
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
func (m *mapped) extents(f func(from, to int64)) error {
	for at, end := int64(0), int64(len(m.mem)); at < end; {
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
