package store

import (
	"fmt"
	"log/slog"
	"strconv"
	"sync"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"golang.org/x/sys/unix"

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
	// ID is the id that the volume must have. Empty means any, and allows Open
	// to make a new volume.
	ID string
	// Log receives what Badger has to say. nil means nobody.
	Log *slog.Logger

	hooks hooks
}

// hooks are the system calls that tests stand in for.
type hooks struct {
	sync   func(*badger.DB) error                    // Badger's current logs
	fsync  func(path string) error                   // any other file, or a directory
	statfs func(dir string, st *unix.Statfs_t) error // space
	bootID func() (string, error)
}

func (h hooks) orReal() hooks {
	if h.sync == nil {
		h.sync = (*badger.DB).Sync
	}
	if h.fsync == nil {
		h.fsync = fsync
	}
	if h.statfs == nil {
		h.statfs = unix.Statfs
	}
	if h.bootID == nil {
		h.bootID = bootID
	}
	return h
}

// tuning is Badger's configuration for large values on a small board: about
// 20–30 MB of anonymous memory for any number of chunks.
func tuning(dir string, capacity int64, log *slog.Logger) badger.Options {
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
		WithValueLogFileSize(logSize(capacity)).
		WithMetricsEnabled(false).
		WithDetectConflicts(false).
		WithChecksumVerificationMode(options.OnBlockRead).
		// Not for truth, which is the chunk's own hash, but because Badger
		// keeps a lock for ever when it stumbles over a damaged record header.
		WithVerifyValueChecksum(true)
}

// logSize is the length at which a value log is full, in bytes: small, because
// Open reads about one log to find what Badger cut, but large enough that a big
// disk does not need tens of thousands of open files.
func logSize(capacity int64) int64 {
	if capacity > 128<<30 {
		return 256 << 20
	}
	return 64 << 20
}

// recordOverhead is what Badger adds to a chunk, rounded up, in bytes.
const recordOverhead = 512

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
