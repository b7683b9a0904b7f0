package store

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
)

const (
	defaultFloor = 512 << 20
	ballastBytes = 16 << 20
)

// Options of [Open]. The zero value is a good one.
type Options struct {
	// Capacity is the most that the volume may occupy with chunks, in bytes,
	// dropped ones that still lie on disk included. 0 means up to the floor.
	Capacity int64
	// FloorBytes is what puts leave free on the file system. 0 means 512 MiB or
	// 1% of the file system, whichever is more; below 0 means no floor.
	FloorBytes int64
	// SegmentBytes is the length at which a segment is full and the next begins, below 2
	// GiB. 0 means by the size of the disk. Short ones give dead bytes back sooner.
	SegmentBytes int64
	// ID is the id that the volume must have. Empty means any, and allows Open
	// to make a new volume.
	ID string
	// Log receives what Badger has to say. nil means nobody.
	Log *slog.Logger

	hooks hooks
}

// hooks are the system calls that tests stand in for.
type hooks struct {
	fdatasync func(*os.File) error    // a segment
	fsync     func(path string) error // a directory
	syncIndex func(*badger.DB) error  // what a checkpoint wrote
	pwritev   func(fd int, from [][]byte, at int64) (int, error)
	statfs    func(dir string, st *unix.Statfs_t) error // space
	bootID    func() (string, error)
	// pace waits before so many bytes are moved; nil means the volume's own way.
	pace     func(ctx context.Context, bytes int64) error
	patience func() time.Duration // nil: the default
	pread    func(fd int, into []byte, at int64) (int, error)
	reading  func() // a chunk's place is known, its bytes are not read yet
	atOnce   int    // changes of the index in one transaction; 0: the default
	dropping func() // it is known which chunks are lost, they are not dropped yet
	// checkpoint is begun after so long without a write; 0: the default.
	checkpoint time.Duration
	census     *census
}

func (h hooks) orReal() hooks {
	if h.fdatasync == nil {
		h.fdatasync = fdatasync
	}
	if h.fsync == nil {
		h.fsync = durable.Sync
	}
	if h.statfs == nil {
		h.statfs = unix.Statfs
	}
	if h.pread == nil {
		h.pread = unix.Pread
	}
	if h.atOnce == 0 {
		h.atOnce = changesAtOnce
	}
	if h.checkpoint == 0 {
		h.checkpoint = checkpointAfter
	}
	if h.patience == nil {
		h.patience = func() time.Duration { return patience }
	}
	if h.reading == nil {
		h.reading = func() {}
	}
	if h.dropping == nil {
		h.dropping = func() {}
	}
	if h.pwritev == nil {
		h.pwritev = unix.Pwritev
	}
	if h.syncIndex == nil {
		h.syncIndex = (*badger.DB).Sync
	}
	if h.census == nil {
		h.census = &process
	}
	if h.bootID == nil {
		h.bootID = bootID
	}
	return h
}

// segmentBytesFor is the length at which a segment is full, in bytes: small, because only
// full ones can be emptied; but large enough that a big disk does not have tens of
// thousands of files.
func segmentBytesFor(capacity int64) int64 {
	if capacity > 128<<30 {
		return 256 << 20
	}
	return min(64<<20, max(16<<20, capacity/32))
}

// badgerLog passes on what a person may need and hides the rest.
type badgerLog struct{ log *slog.Logger }

func (b badgerLog) Errorf(format string, args ...any) {
	b.log.Warn("badger", "says", fmt.Sprintf(format, args...))
}

func (b badgerLog) Warningf(format string, args ...any) {
	b.log.Warn("badger", "says", fmt.Sprintf(format, args...))
}
func (badgerLog) Infof(string, ...any)  {}
func (badgerLog) Debugf(string, ...any) {}
