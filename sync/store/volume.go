package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

const (
	maxReaders = 16               // reads at once; what hangs on a dead disk stops here
	closeLimit = 30 * time.Second // each step of closing
	patience   = 5 * time.Second  // with a disk, for what takes it milliseconds
	// readPatience and writePatience are for a chunk, and for a batch of 16 MiB with
	// those waiting before it, in units of patience.
	readPatience, writePatience = 6, 12
	listPage                    = 1024 // ids that are read at once
)

// Volume is the chunks of one directory. Its methods may be called from any
// number of goroutines. Errors of methods are [*wire.Problem]s, or the
// context's own error.
type Volume struct {
	dir     string
	id      string
	opt     Options
	lock    *os.File // holds the directory's flock
	index   *index
	log     segments // the committer's, once it runs
	saving  *saving  // the committer's: its last checkpoint
	saved   int64    // bytes that were written before it
	queue   chan *request
	stop    chan struct{} // closed: the committer ends
	stopped chan struct{} // closed: it has ended
	mover   mover
	readers chan struct{} // one token a read under way
	ops     sync.WaitGroup
	doubts  doubts
	hangs   atomic.Int32 // calls that the disk has not answered in time
	// stumbled says that Badger cannot be closed: a read has left it with a lock that it
	// never gives back.
	stumbled atomic.Bool

	mu       sync.Mutex // guards all below
	closed   bool
	used     int64 // bytes of indexed chunks
	space    ledger
	chunks   int
	lost     map[chunk.ID]Loss
	readOnly string // why; empty: writable
	// suspect chunks were written but their sync failed; allSuspect says that
	// of everything, after a restart that left the kernel running.
	suspect    map[chunk.ID]bool
	allSuspect bool
}

// Loss is a chunk that should be here and cannot be read or does not verify.
type Loss struct {
	ID     chunk.ID
	Size   int64  // bytes, from the index
	Volume string // id
	Reason string
	Found  time.Time
}

// Stats are figures of a volume. Only the file system's free space is looked up
// for them; nothing is walked.
type Stats struct {
	Volume   string // id
	Dir      string
	Capacity int64  // bytes that may hold chunks: the sum of the next four
	Used     int64  // bytes of chunks held, lost ones included until dropped
	Dead     int64  // bytes of segments that belong to no chunk held, exactly
	Reserved int64  // heads of records and segments, exactly, and what is kept free to empty one
	Free     int64  // bytes that a put may still take
	Chunks   int    // held, lost ones included
	Lost     int    // of these, known to be lost
	ReadOnly string // why puts are refused; empty if they are not
}

// ID is the volume's id, a ULID made with it.
func (v *Volume) ID() string { return v.id }

// Dir is the directory that the volume lies in.
func (v *Volume) Dir() string { return v.dir }

// enter begins an operation; the caller must call ops.Done.
func (v *Volume) enter() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return wire.FailedBecause(wire.CodeInterrupted, "the store is closed; ask again when the agent has restarted")
	}
	v.ops.Add(1)
	return nil
}

func notFound(id chunk.ID) error {
	return wire.FailedBecause(wire.CodeNotFound, "chunk %s is not held here", id)
}

// absent is the error for a chunk that is not in the index.
func (v *Volume) absent(id chunk.ID) error {
	if v.doubts.failed {
		return v.partUnread("whether chunk " + id.String() + " is")
	}
	return notFound(id)
}

func (v *Volume) partUnread(what string) error {
	return wire.FailedBecause(wire.CodeUnreachable, "%s on volume %s (%s) is not known, as a part of that could not be read when it was opened: check the disk, its cable and its power, and restart the machine", what, v.id, v.dir)
}

// Get reads a chunk from disk and verifies it. [wire.CodeNotFound] if it was
// never here or was dropped, [wire.CodeLost] if it should be here but is not
// whole.
func (v *Volume) Get(ctx context.Context, id chunk.ID) ([]byte, error) {
	t, err := v.Tree(ctx, id)
	if err != nil {
		return nil, err
	}
	return t.Data(), nil
}

// Tree reads a chunk from disk, verifies it, and returns it ready to prove its
// leaves. Nothing of it is kept. Errors as for [Volume.Get].
func (v *Volume) Tree(ctx context.Context, id chunk.ID) (*chunk.Tree, error) {
	v.touch()
	return v.tree(ctx, id)
}

// get is Get by the volume itself.
func (v *Volume) get(ctx context.Context, id chunk.ID) ([]byte, error) {
	t, err := v.tree(ctx, id)
	if err != nil {
		return nil, err
	}
	return t.Data(), nil
}

func (v *Volume) tree(ctx context.Context, id chunk.ID) (*chunk.Tree, error) {
	trees := make(chan *chunk.Tree, 1)
	if err := v.reading(ctx, func() error {
		t, err := v.readVerified(id)
		trees <- t
		return err
	}); err != nil {
		return nil, err
	}
	return <-trees, nil
}

// reading runs fn, which reads chunks, when it is its turn, and waits for it with
// patience. If it does not, fn goes on by itself.
func (v *Volume) reading(ctx context.Context, fn func() error) error {
	if err := v.enter(); err != nil {
		return err
	}
	limit := readPatience * v.opt.hooks.patience()
	turn := time.NewTimer(limit)
	defer turn.Stop()
	select {
	case v.readers <- struct{}{}:
	case <-turn.C: // those before it hang
		v.ops.Done()
		return v.hung()
	case <-ctx.Done():
		v.ops.Done()
		return context.Cause(ctx)
	}
	// On its own goroutine, because a read on a hung disk cannot be interrupted. It
	// ends when the disk answers.
	done := make(chan error, 1)
	go func() {
		defer v.ops.Done()
		defer func() { <-v.readers }()
		done <- fn()
	}()
	return v.await(ctx, done, limit)
}

// readVerified reads a chunk and remembers it as lost if it does not verify. One
// that was moved, and its old segment deleted, while it was being read is read again.
func (v *Volume) readVerified(id chunk.ID) (*chunk.Tree, error) {
	for again := 3; ; again-- {
		at, ok, err := v.index.find(id)
		if err != nil {
			return nil, v.unreadableIndex(id, err)
		}
		if !ok {
			return nil, v.absent(id)
		}
		t, fault := v.readOnce(id, at)
		if fault == nil {
			v.mu.Lock()
			delete(v.lost, id) // it was put again while its loss was being noted
			v.mu.Unlock()
			return t, nil
		}
		if err := v.unreadable(id, fault); err != nil {
			return nil, err
		}
		if now, ok, _ := v.index.find(id); again == 0 || ok && now == at {
			return nil, v.lose(id, at, fault.Error())
		}
	}
}

// readOnce reads a chunk where it lies. The fault is what is wrong with it.
func (v *Volume) readOnce(id chunk.ID, at place) (t *chunk.Tree, fault error) {
	v.opt.hooks.reading()
	if t, fault = v.readTree(at); fault != nil {
		return nil, fault
	}
	if t.ID() != id {
		return nil, errors.New("its bytes have changed on disk")
	}
	return t, nil
}

// openat opens a segment. It is found from the directory that is locked: by name it could
// be another volume's by now.
func (v *Volume) openat(number uint32, flags int) (int, error) {
	return unix.Openat(int(v.lock.Fd()), filepath.Join(chunksDir, segmentName(number)), flags|unix.O_CLOEXEC, 0)
}

// readTree reads a chunk's bytes and hashes them. It reads by system calls: in mapped memory, a
// disk that hangs would hold up the garbage collector, and with it the whole process.
func (v *Volume) readTree(at place) (*chunk.Tree, error) {
	fd, err := v.openat(at.segment, unix.O_RDONLY)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, errors.New("its segment is gone")
		}
		return nil, &readFault{"its segment cannot be opened", err}
	}
	defer unix.Close(fd)
	return chunk.ReadTree(int64(at.size), func(into []byte, from int64) error {
		switch err := v.readFull(fd, into, int64(at.at)+recordHead+from); {
		case errors.Is(err, errCut):
			v.noteCut(at)
			return err
		case err != nil:
			return &readFault{"the disk cannot be read there", err}
		}
		return nil
	})
}

// noteCut latches the volume if the segment of a record became shorter since it was opened:
// who did that may do more.
func (v *Volume) noteCut(at place) {
	v.mu.Lock()
	s := v.space.segments[at.segment]
	whole := s != nil && at.end() <= s.length
	v.mu.Unlock()
	if whole {
		v.latch("a segment was cut short while it was in use: check the disk and restart")
	}
}

// stumble is told when the index could not be read: Badger holds a lock for ever then that
// rotating or closing a log needs. The volume takes no more writes, and Close does not
// wait for it.
func (v *Volume) stumble(fault any) {
	v.latch(fmt.Sprintf("a read failed (%v): check the disk and restart", fault))
	v.stumbled.Store(true)
}

func (v *Volume) unreadableIndex(id chunk.ID, err error) error {
	return wire.FailedBecause(wire.CodeUnreachable, "chunk %s cannot be read now: the index of volume %s (%s) does not say where it lies (%v); check the disk", id, v.id, v.dir, err)
}

// lose remembers a loss, unless the chunk was rewritten or dropped since it was
// read, and returns it as an error.
func (v *Volume) lose(id chunk.ID, at place, reason string) error {
	v.mu.Lock()
	_, known := v.lost[id]
	if !known {
		v.lost[id] = v.loss(id, at, reason)
	}
	v.mu.Unlock()
	// Only now: who rewrites or drops it changes the index first, and then what is lost.
	if now, ok, err := v.index.find(id); !known && err == nil && (!ok || now != at) {
		v.mu.Lock()
		delete(v.lost, id)
		v.mu.Unlock()
	}
	return wire.FailedBecause(wire.CodeLost, "chunk %s is lost: %s", id, reason)
}

func (v *Volume) loss(id chunk.ID, at place, reason string) Loss {
	return Loss{ID: id, Size: int64(at.size), Volume: v.id, Reason: reason, Found: time.Now()}
}

// Has tells whether the chunk is held and not known to be lost. It does not
// read the chunk.
func (v *Volume) Has(id chunk.ID) bool {
	ok, _ := v.holds([]chunk.ID{id})
	if len(ok) == 0 {
		return false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	_, lost := v.lost[id]
	return !lost
}

// holds tells which of the ids are indexed.
func (v *Volume) holds(ids []chunk.ID) ([]chunk.ID, error) {
	found := make(chan []chunk.ID, 1)
	err := v.prompt(func() error {
		var there []chunk.ID
		for _, id := range ids {
			_, ok, err := v.index.find(id)
			if err != nil {
				return v.unreadableIndex(id, err)
			}
			if ok {
				there = append(there, id)
			} else if v.doubts.failed {
				return v.absent(id)
			}
		}
		found <- there
		return nil
	})
	if err != nil {
		return nil, err
	}
	return <-found, nil
}

// prompt runs fn, which asks the disk for little, and waits for it with patience.
// A disk that hangs cannot be interrupted: fn then goes on by itself, and until it
// has returned no other is begun, so that they do not pile up.
func (v *Volume) prompt(fn func() error) error {
	if v.hangs.Load() > 0 {
		return v.hung()
	}
	if err := v.enter(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer v.ops.Done()
		done <- fn()
	}()
	return v.await(context.Background(), done, v.opt.hooks.patience())
}

// await waits for an answer of the disk. If there is none within the limit, the
// volume counts as hanging until it comes.
func (v *Volume) await(ctx context.Context, done <-chan error, limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		select {
		case err := <-done: // at the same time, or it was this process that stood still
			return err
		default:
		}
		v.hangs.Add(1)
		go func() {
			<-done
			v.hangs.Add(-1)
		}()
		return v.hung()
	}
}

func (v *Volume) hung() error {
	return wire.FailedBecause(wire.CodeUnreachable, "the disk of volume %s (%s) does not answer: check it, its cable and its power", v.id, v.dir)
}

// List calls fn for every chunk held, in the order of ids, until fn or ctx says
// stop. It reads the index only; size is in bytes. fn must not write to the volume. If a part
// of the volume could not be read when it was opened, [wire.CodeUnreachable] follows the last.
func (v *Volume) List(ctx context.Context, fn func(id chunk.ID, size int64, lost bool) error) error {
	for from := (chunk.ID{}); ; {
		page, err := v.page(ctx, from, listPage)
		if err != nil {
			return err
		}
		for _, e := range page {
			v.mu.Lock()
			_, lost := v.lost[e.id]
			v.mu.Unlock()
			if err := fn(e.id, int64(e.at.size), lost); err != nil {
				return err
			}
		}
		if len(page) < listPage && v.doubts.failed {
			return v.partUnread("what is")
		}
		if len(page) < listPage {
			return nil
		}
		from = page[len(page)-1].id
	}
}

// page reads n entries of the index that follow an id, or fewer at the end.
func (v *Volume) page(ctx context.Context, after chunk.ID, n int) ([]resident, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	found := make(chan []resident, 1)
	err := v.prompt(func() error {
		var page []resident
		err := v.index.eachFrom(ctx, after, func(r resident) error {
			if r.id == after {
				return nil
			}
			if len(page) >= n {
				return errEnough
			}
			page = append(page, r)
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			return err
		}
		found <- page
		return nil
	})
	if err != nil {
		return nil, err
	}
	return <-found, nil
}

// errEnough ends a walk early.
var errEnough = errors.New("enough")

// Lost lists the chunks known to be lost, earliest found first. A chunk leaves
// the list when it is put again or dropped.
func (v *Volume) Lost() []Loss {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := make([]Loss, 0, len(v.lost))
	for _, l := range v.lost {
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b Loss) int {
		if c := a.Found.Compare(b.Found); c != 0 {
			return c
		}
		return slices.Compare(a.ID[:], b.ID[:])
	})
	return all
}

// Checked is the result of [Volume.Check].
type Checked struct {
	Chunks int   // read, lost ones included
	Bytes  int64 // that verified
	Lost   []Loss
}

// checkBytes is how much Check sorts by place at a time.
const checkBytes = 256 << 20

// Check reads and verifies every chunk. What is not whole shows in [Volume.Lost]
// as soon as it is found. It reads as fast as the disk does, until done or ctx ends.
func (v *Volume) Check(ctx context.Context) (Checked, error) {
	var sum Checked
	for after := (chunk.ID{}); ; {
		s, err := v.Stretch(ctx, after, checkBytes)
		if err != nil {
			return sum, err
		}
		if s.Last == (chunk.ID{}) {
			return sum, nil
		}
		if err := v.check(ctx, s.Next, &sum); err != nil {
			return sum, err
		}
		after = s.Last
	}
}

// check reads all that next gives.
func (v *Volume) check(ctx context.Context, next func(context.Context) ([]Verified, error), sum *Checked) error {
	for {
		some, err := next(ctx)
		if err != nil || len(some) == 0 {
			return err
		}
		for _, c := range some {
			switch {
			case c.Err == nil:
				sum.Bytes += c.Size
			case wire.ProblemOf(c.Err).Code == wire.CodeNotFound: // dropped meanwhile
				continue
			default:
				sum.Lost = append(sum.Lost, v.lossOf(c.ID, c.Err))
			}
			sum.Chunks++
		}
	}
}

func (v *Volume) lossOf(id chunk.ID, err error) Loss {
	v.mu.Lock()
	defer v.mu.Unlock()
	if l, ok := v.lost[id]; ok {
		return l
	}
	return Loss{ID: id, Volume: v.id, Reason: err.Error(), Found: time.Now()}
}

// Stats returns the volume's figures.
func (v *Volume) Stats() Stats {
	space, err := v.room()
	if err != nil {
		space = 0
	}
	hangs := v.hangs.Load() > 0
	v.mu.Lock()
	defer v.mu.Unlock()
	reserved := v.space.heads() + v.reserve()
	if v.opt.Capacity > 0 {
		space = min(space, max(0, v.opt.Capacity-v.space.length-v.reserve()))
	}
	head := min(space, recordHead) // of the next chunk
	space, reserved = space-head, reserved+head
	readOnly := v.readOnly
	if readOnly == "" && hangs {
		readOnly = "its disk does not answer"
	}
	return Stats{
		Volume: v.id, Dir: v.dir,
		Capacity: v.used + v.space.dead() + reserved + space,
		Used:     v.used, Dead: v.space.dead(), Reserved: reserved, Free: space,
		Chunks: v.chunks, Lost: len(v.lost), ReadOnly: readOnly,
	}
}

// room is how much puts may write before the floor is reached, in bytes. Without
// a capacity, what is kept to empty a segment comes on top of the floor, as far as the
// floor's upper half is too small for it.
func (v *Volume) room() (int64, error) {
	room := make(chan int64, 1) // a call that comes back late has its own
	if err := v.prompt(func() error {
		n, err := v.roomNow()
		room <- n
		return err
	}); err != nil {
		return 0, err
	}
	return <-room, nil
}

// roomNow is room for the committer, which waits for the disk anyway.
func (v *Volume) roomNow() (int64, error) {
	var st unix.Statfs_t
	if err := v.opt.hooks.statfs(v.dir, &st); err != nil {
		return 0, err
	}
	keep := v.floor(&st)
	if v.opt.Capacity == 0 && keep > 0 {
		keep = max(keep, keep/2+needed+v.reserve())
	}
	return max(0, free(&st)-keep), nil
}

func (v *Volume) floor(st *unix.Statfs_t) int64 {
	switch {
	case v.opt.FloorBytes > 0:
		return v.opt.FloorBytes
	case v.opt.FloorBytes < 0:
		return 0
	}
	return floorOf(st)
}

func floorOf(st *unix.Statfs_t) int64 { return max(defaultFloor, int64(st.Blocks)*int64(st.Bsize)/100) }

// DefaultFloor is what a volume in dir leaves free if nobody says otherwise, in
// bytes. dir need not be there yet, but the folder that it is to be in.
func DefaultFloor(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil && unix.Statfs(filepath.Dir(dir), &st) != nil {
		return defaultFloor
	}
	return floorOf(&st)
}

// free is what an ordinary user may still write, in bytes.
func free(st *unix.Statfs_t) int64 { return int64(st.Bavail) * int64(st.Bsize) }

// last is what this process can write to a disk when it must, in bytes: root also what a
// file system keeps back for it.
func last(st *unix.Statfs_t) int64 {
	if unix.Geteuid() == 0 {
		return int64(st.Bfree) * int64(st.Bsize)
	}
	return free(st)
}

// latch makes the volume read-only for good. The first reason stays.
func (v *Volume) latch(reason string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.readOnly == "" {
		v.readOnly = reason
	}
}

// latchAll is latch, and doubts the durability of everything held.
func (v *Volume) latchAll(reason string) {
	v.latch(reason)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.allSuspect = true
}

// Close waits for what is under way, closes the files and gives the directory
// back. A disk that hangs does not hold it up for ever: it then returns an
// error, and the directory stays locked until the process ends.
func (v *Volume) Close() error {
	v.mu.Lock()
	if v.closed {
		v.mu.Unlock()
		return nil
	}
	v.closed = true
	v.mu.Unlock()
	v.mover.end()
	if !within(closeLimit, v.ops.Wait) {
		return fmt.Errorf("volume %s is not closed: its disk has not answered for %s", v.id, closeLimit)
	}
	close(v.stop)
	if !within(closeLimit, func() { <-v.stopped; <-v.mover.ended }) {
		return fmt.Errorf("volume %s is not closed: a write has not ended for %s", v.id, closeLimit)
	}
	if v.stumbled.Load() {
		return fmt.Errorf("volume %s is not closed: a read of its disk failed; the directory is free when the process ends", v.id)
	}
	if v.writable() != nil && refusesWrites(v.dir) { // Badger would try for ever
		return fmt.Errorf("volume %s is not closed, though all its chunks are safe: its file system takes no writes; the directory is free when the process ends", v.id)
	}
	if err := makeRoom(v.dir, v.opt.hooks); err != nil {
		return fmt.Errorf("volume %s is not closed, though all its chunks are safe: %w", v.id, err)
	}
	closed := make(chan error, 1)
	go func() { closed <- v.index.close() }()
	select {
	case err := <-closed:
		v.opt.hooks.census.held.Add(-int64(v.chunks))
		if err := errors.Join(err, unlock(v.lock)); err != nil {
			return fmt.Errorf("volume %s closed with an error: %w", v.id, err)
		}
		return nil
	case <-time.After(closeLimit):
		return fmt.Errorf("volume %s is not closed: its files have not closed for %s", v.id, closeLimit)
	}
}

// refusesWrites tells whether the file system of dir is read-only, also if only the
// kernel knows because it has found an error there.
func refusesWrites(dir string) bool {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return errors.Is(err, unix.EROFS) || errors.Is(err, unix.EIO)
}

// within tells whether fn returned in time. If not, fn goes on.
func within(limit time.Duration, fn func()) bool {
	done := make(chan struct{})
	go func() { fn(); close(done) }()
	select {
	case <-done:
		return true
	case <-time.After(limit):
		return false
	}
}
