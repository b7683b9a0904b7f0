package store

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// Names below a volume's directory.
const (
	idFile         = "VOLUME"
	ballastFile    = "ballast"
	syncFailedFile = "SYNC_FAILED"
	readFailedFile = "READ_FAILED"
	chunksDir      = "chunks"
)

// Open opens the volume in dir, or makes a new one if dir is empty or missing
// and no particular id is asked for. Before it returns it has read again what was written
// since the last checkpoint, which a crash can have hurt; see [Volume.Lost]. If the
// index is damaged it is made anew, which reads the tables of contents of all segments, and
// all of those that have none. It can be killed at any time, and goes on then.
//
// It refuses, with a sentence, a directory that another process has open, that
// holds anything but a volume, or that holds another volume than the one asked
// for (a disk that was swapped, or is not mounted).
func Open(dir string, opt Options) (*Volume, error) {
	opt.hooks = opt.hooks.orReal()
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	return open(dir, opt)
}

func open(dir string, opt Options) (_ *Volume, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the directory for chunks cannot be made: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unlock(lock))
		}
	}()
	if err := refuseOldForm(dir); err != nil {
		return nil, err
	}
	if err := removeHalfWritten(dir); err != nil {
		return nil, err
	}
	id, fresh, err := identify(dir, opt.ID)
	if err != nil {
		return nil, err
	}
	if err := makeRoom(dir, opt.hooks); err != nil {
		return nil, err
	}
	v := &Volume{
		dir: dir, id: id, opt: opt, lock: lock,
		queue: make(chan *request), stop: make(chan struct{}), stopped: make(chan struct{}),
		readers: make(chan struct{}, maxReaders),
		lost:    map[chunk.ID]Loss{}, suspect: map[chunk.ID]bool{},
		mover: mover{wanted: make(chan struct{}, 1), ended: make(chan struct{}), start: time.Now(), stuck: map[uint32]stuck{}},
	}
	v.log.limit = opt.SegmentBytes
	if v.log.limit == 0 {
		v.log.limit = segmentBytesFor(v.diskSize())
	}
	v.checkEarlierSync()
	if err := v.openLog(fresh); err != nil {
		return nil, err
	}
	v.keepBallast()
	go v.commitLoop()
	v.mover.begin(v)
	return v, nil
}

// lockDir takes the directory for this process until the file is closed. The
// kernel gives it back if the process dies.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("the directory for chunks cannot be opened: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another process uses this store (%s): stop it first", dir)
		}
		return nil, fmt.Errorf("the store in %s cannot be locked: %w", dir, err)
	}
	return f, nil
}

// unlock gives the directory back. Closing alone would not, while a program that is
// being started has not let go of our files yet.
func unlock(lock *os.File) error {
	return errors.Join(unix.Flock(int(lock.Fd()), unix.LOCK_UN), lock.Close())
}

// removeHalfWritten removes what a crash has left of a file that was about to
// replace one of ours.
func removeHalfWritten(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("the directory for chunks cannot be read: %w", err)
	}
	for _, e := range entries {
		for _, ours := range []string{idFile, syncFailedFile, readFailedFile} { // as internal/durable names it
			random, ok := strings.CutPrefix(e.Name(), "."+ours)
			if !ok || random == "" || strings.Trim(random, "0123456789") != "" {
				continue
			}
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("what a crash has left in %s cannot be removed: %w", dir, err)
			}
		}
	}
	return nil
}

// identify reads the volume's id, or makes one where a new volume may begin.
func identify(dir, want string) (id string, fresh bool, err error) {
	raw, err := os.ReadFile(filepath.Join(dir, idFile))
	switch {
	case err == nil:
		parsed, err := ulid.ParseStrict(strings.TrimSpace(string(raw)))
		if err != nil {
			return "", false, fmt.Errorf("%s is damaged and holds no volume id: %w", filepath.Join(dir, idFile), err)
		}
		if id = parsed.String(); want != "" && id != want {
			return "", false, fmt.Errorf("this is another volume: %s holds %s, expected %s; was a disk swapped?", dir, id, want)
		}
		return id, false, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", false, fmt.Errorf("the id of the volume in %s cannot be read: %w", dir, err)
	case want != "":
		return "", false, fmt.Errorf("volume %s is not in %s: is its disk mounted?", want, dir)
	}
	if err := mustBeEmpty(dir); err != nil {
		return "", false, err
	}
	made, err := ulid.New(ulid.Timestamp(time.Now()), rand.Reader)
	if err != nil {
		return "", false, err
	}
	return made.String(), true, nil
}

// mustBeEmpty keeps a new volume out of a directory with somebody's data. A
// volume whose making was cut short has chunks/ and no id, and may go on.
func mustBeEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("the directory for chunks cannot be read: %w", err)
	}
	for _, e := range entries {
		switch e.Name() {
		case "lost+found", ballastFile, chunksDir:
		default:
			return fmt.Errorf("%s holds other data (%q) and no volume: choose an empty directory", dir, e.Name())
		}
	}
	return nil
}

// needed is what the index may take before it can be stopped, in bytes: the pages of a
// log, and a flushed memtable.
const needed = ballastBytes / 2

// makeRoom sees to it that there is what is needed to open, to drop chunks or
// to close, and gives the ballast up for it, if that is enough. Without, the kernel
// would kill the process at a write to a file of the index that has no block on disk.
func makeRoom(dir string, h hooks) error {
	have, err := lastAt(dir, h)
	if err != nil || have >= needed {
		return err
	}
	ballast := filepath.Join(dir, ballastFile)
	var st unix.Stat_t
	if unix.Stat(ballast, &st) == nil && have+st.Blocks*512 >= needed {
		if err := os.Remove(ballast); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return wire.FailedBecause(wire.CodeNoSpace, "the disk of %s is full, and the ballast cannot be removed: %v", dir, err)
		}
		if have, err = lastAt(dir, h); err != nil {
			return err
		}
	}
	if have < needed {
		return wire.FailedBecause(wire.CodeNoSpace, "the disk of %s is full: %d KiB are free, its chunks need %d MiB; delete something else there", dir, have>>10, needed>>20)
	}
	return nil
}

func lastAt(dir string, h hooks) (int64, error) {
	var st unix.Statfs_t
	if err := h.statfs(dir, &st); err != nil {
		return 0, wire.FailedBecause(wire.CodeReadOnly, "the free space of %s cannot be read: %v", dir, err)
	}
	return last(&st), nil
}

// keepBallast puts the ballast back when there is room. It may take the upper
// half of the floor: opening and dropping matter more.
func (v *Volume) keepBallast() {
	path := filepath.Join(v.dir, ballastFile)
	if _, err := os.Stat(path); err == nil {
		return
	}
	var st unix.Statfs_t
	if v.opt.hooks.statfs(v.dir, &st) != nil || free(&st)-ballastBytes < v.floor(&st)/2 {
		return
	}
	f, err := os.Create(path)
	if err != nil {
		return
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, ballastBytes)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(path) // no ballast is better than a hollow one
		v.opt.Log.Warn("no space could be set aside for the day the disk is full", "volume", v.id, "err", err)
	}
}

// checkEarlierSync latches the volume if a sync failed since the machine booted.
func (v *Volume) checkEarlierSync() {
	path := filepath.Join(v.dir, syncFailedFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	now, bootErr := v.opt.hooks.bootID()
	if err := errors.Join(err, bootErr); err != nil {
		v.latchAll(fmt.Sprintf("an earlier sync failed, and whether the machine has restarted since cannot be told: %v", err))
		return
	}
	if strings.TrimSpace(string(raw)) == now {
		v.latchAll("a sync failed since the machine started, so what lies on disk is not known: check the disk and restart the machine")
		return
	}
	if err := os.Remove(path); err != nil {
		v.latch(fmt.Sprintf("the disk refuses changes: %v", err))
	}
}

func (v *Volume) diskSize() int64 {
	if v.opt.Capacity > 0 {
		return v.opt.Capacity
	}
	var st unix.Statfs_t
	if v.opt.hooks.statfs(v.dir, &st) != nil {
		return 0
	}
	return int64(st.Blocks) * int64(st.Bsize)
}

// Erase removes a volume for good: its chunks first and its id last, so that one
// that was cut off is found and erased again. A directory that is missing or
// holds no volume is left as it is. It refuses one that a process has open.
func Erase(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, idFile)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("the volume %s cannot be erased: %w", dir, err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	for _, name := range []string{chunksDir, ballastFile, syncFailedFile, readFailedFile, idFile} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("the volume %s cannot be erased: %w", dir, err)
		}
	}
	return nil
}
