package store

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// What keeps a read from its bytes is one of three things: the bytes, which are wrong
// or gone; the sector that they lie on; or something that has nothing to do with them:
// no descriptor or memory is left, or the disk has left the bus. Only the first two are
// a loss. The third is confessed by nobody and dropped by nobody.

// damaged are the errors by which the kernel tells of a place on a disk that cannot be
// read (block/blk-core.c, blk_errors) or that a file system finds to be wrong.
var damaged = []unix.Errno{unix.EIO, unix.ENODATA, unix.EILSEQ, unix.EBADMSG, unix.EUCLEAN, unix.EREMOTEIO}

func isDamage(err error) bool {
	var no unix.Errno
	return errors.As(err, &no) && slices.Contains(damaged, no)
}

// isFull tells whether there was no room for a write.
func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// readFault is a system call that failed on the way to a record, or a fault of the
// memory that a file is mapped to.
type readFault struct {
	call string
	err  error
}

func (f *readFault) Error() string { return fmt.Sprintf("%s: %v", f.call, f.err) }

// unreadable tells whether a fault says nothing of the chunk, and why, as an error of
// [wire.CodeUnreachable]; nil for a loss.
func (v *Volume) unreadable(id chunk.ID, fault error) error {
	var f *readFault
	if !errors.As(fault, &f) {
		return nil
	}
	var no unix.Errno
	if errors.As(f.err, &no) && !isDamage(no) {
		return wire.FailedBecause(wire.CodeUnreachable, "chunk %s cannot be read now (%v), which says nothing of its bytes; ask again", id, f)
	}
	switch err := v.answers(); {
	case err == nil:
		return nil
	case !isDamage(err):
		return wire.FailedBecause(wire.CodeUnreachable, "chunk %s cannot be read (%v), and whether its disk answers cannot be found out (%v); ask again", id, f, err)
	}
	v.latch(fmt.Sprintf("its disk cannot be read anywhere (%v): check the disk, its cable and its power, and restart", f))
	return wire.FailedBecause(wire.CodeUnreachable, "chunk %s cannot be read (%v), nor anything else on the disk of volume %s (%s): check it, its cable and its power", id, f, v.id, v.dir)
}

// probeBytes is what is read of a segment: a page, which suits direct reads of any disk.
const probeBytes = 4096

// answers tells, as an error, why nothing can be read from the disk: the beginning and
// the middle of some segments. Small files are not asked for, as a file system may keep them
// with what it has in memory.
func (v *Volume) answers() error {
	type probe struct {
		segment uint32
		at      int64
	}
	var probes []probe
	v.mu.Lock()
	for n, s := range v.space.segments {
		probes = append(probes, probe{n, 0}, probe{n, s.length / 2 / probeBytes * probeBytes})
		if len(probes) > 6 {
			break
		}
	}
	v.mu.Unlock()
	err := error(unix.ENOENT)
	for _, p := range probes {
		if err = v.reads(p.segment, p.at); err == nil {
			return nil
		}
	}
	return err
}

// reads reads a page of a segment from the disk, not from the kernel's memory.
func (v *Volume) reads(segment uint32, at int64) error {
	fd, err := v.openat(segment, unix.O_RDONLY|unix.O_DIRECT)
	if errors.Is(err, unix.EINVAL) { // not on this file system
		if fd, err = v.openat(segment, unix.O_RDONLY); err == nil {
			_ = unix.Fadvise(fd, at, probeBytes, unix.FADV_DONTNEED)
		}
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	page, err := unix.Mmap(-1, 0, probeBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned, as a direct read wants it
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(page) }()
	for {
		if _, err := v.opt.hooks.pread(fd, page, at); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
