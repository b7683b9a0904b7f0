package store

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/sync/chunk"
)

const (
	defaultFloor = 512 << 20
	ballastBytes = 16 << 20
	smallValue   = 1 << 10 // values below stay in the LSM tree

	// addressable32 is what a 32-bit process may map of chunks: Badger with
	// 64 MiB logs was seen to run out of address space at 1.7 GiB.
	addressable32 = 1 << 30
)

// Options of [Open]. The zero value is a good one.
type Options struct {
	// Capacity is the most that the volume may occupy with chunks, in bytes,
	// dropped ones that still lie on disk included. 0 means up to the floor.
	Capacity int64
	// FloorBytes is what puts leave free on the file system. 0 means 512 MiB or
	// 1% of the file system, whichever is more; below 0 means no floor.
	FloorBytes int64
	// LogBytes is the length at which a value log is full and the next begins: not
	// less than the longest chunk, and below 2 GiB. 0 means by the size of the disk.
	// Short logs give dead bytes back sooner, and take more open files.
	LogBytes int64
	// ID is the id that the volume must have. Empty means any, and allows Open
	// to make a new volume.
	ID string
	// Log receives what Badger has to say. nil means nobody.
	Log *slog.Logger

	hooks hooks
}

// hooks are the system calls that tests stand in for.
type hooks struct {
	fdatasync func(*os.File) error                      // one of Badger's logs; several at once
	fsync     func(path string) error                   // any other file, or a directory
	statfs    func(dir string, st *unix.Statfs_t) error // space
	bootID    func() (string, error)
	// pace waits before so many bytes are moved; nil means the volume's own way.
	pace     func(ctx context.Context, bytes int64) error
	patience time.Duration // 0: the default
	pread    func(fd int, into []byte, at int64) (int, error)
	reading  func() // a chunk's place is known, its bytes are not read yet
	dropping func() // it is known which chunks are lost, they are not dropped yet
	// rebuilding is told each step of making the tree anew when it is done.
	rebuilding func(step string)
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
	if h.patience == 0 {
		h.patience = patience
	}
	if h.reading == nil {
		h.reading = func() {}
	}
	if h.dropping == nil {
		h.dropping = func() {}
	}
	if h.rebuilding == nil {
		h.rebuilding = func(string) {}
	}
	if h.bootID == nil {
		h.bootID = bootID
	}
	return h
}

// tuning is Badger's configuration for large values on a small board: about
// 20–30 MB of anonymous memory for any number of chunks.
func tuning(dir string, logSize int64, log *slog.Logger) badger.Options {
	return badger.DefaultOptions(dir).
		WithLogger(badgerLog{log}).
		WithSyncWrites(false). // the committer syncs, and looks at the error
		WithMemTableSize(8 << 20).
		WithNumMemtables(2).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(4).
		WithNumCompactors(2).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(8 << 20).
		WithValueThreshold(smallValue).
		WithValueLogFileSize(logSize).
		WithMetricsEnabled(false).
		WithNumVersionsToKeep(2). // the tree knows where a chunk lay before a move that is not durable yet
		WithDetectConflicts(false).
		WithChecksumVerificationMode(options.OnBlockRead).
		// Not for truth, which is the chunk's own hash, but because Badger
		// keeps a lock for ever when it stumbles over a damaged record header.
		WithVerifyValueChecksum(true)
}

// logSizeFor is the length at which a value log is full, in bytes: small, because
// Open reads about one log to find what a crash cut, and because only full logs
// can be emptied; but large enough that a big disk does not need tens of thousands
// of open files.
func logSizeFor(capacity int64) int64 {
	if capacity > 128<<30 {
		return 256 << 20
	}
	return min(64<<20, max(16<<20, capacity/32))
}

const (
	// recordOverhead is what a chunk takes on disk besides its bytes, in the log
	// and in the tree, rounded up.
	recordOverhead = 512
	// recordHead is what Badger adds to a chunk in the log at most: meta, user
	// meta, the lengths of key and value and the expiry as uvarints, the key (a
	// prefix, the id and a version of 8 bytes), and a CRC-32C.
	recordHead = 1 + 1 + 1 + 4 + 1 + (1 + 32 + 8) + 4
)

// chunkSize is the size of a chunk whose record has that length.
func chunkSize(at place) int64 {
	for lengthBytes := int64(1); lengthBytes <= 4; lengthBytes++ {
		size := int64(at.length) - (recordHead - 4) - lengthBytes
		if size >= 0 && size < 1<<(7*lengthBytes) {
			return size
		}
	}
	return 0
}

// addressSpace shares out what a 32-bit process can map.
type addressSpace struct {
	mu    sync.Mutex
	limit int64 // 0: unlimited
	taken int64
}

var process = newAddressSpace(strconv.IntSize)

func newAddressSpace(bits int) *addressSpace {
	if bits == 32 {
		return &addressSpace{limit: addressable32}
	}
	return &addressSpace{}
}

// take reserves room for a volume of that capacity, where 0 means all that is
// left, and returns the capacity that the volume gets.
func (a *addressSpace) take(capacity int64) (int64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.limit == 0 {
		return capacity, nil
	}
	left := a.limit - a.taken
	if capacity == 0 {
		capacity = left
	}
	if capacity > left || left < chunk.MaxSize {
		return 0, fmt.Errorf("a 32-bit processor can hold %d MiB of chunks in all its volumes, and %d MiB of that are left: lower the capacity of the volumes, or use a 64-bit system", a.limit>>20, left>>20)
	}
	a.taken += capacity
	return capacity, nil
}

func (a *addressSpace) giveBack(capacity int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.limit != 0 {
		a.taken -= capacity
	}
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
