package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

const (
	moveRate   = 16 << 20         // bytes a second while nobody needs the disk
	quiet      = 2 * time.Second  // without use, after which nobody does
	longestLag = 5 * time.Second  // that use holds up one batch of chunks
	lookAgain  = 60 * time.Second // after which the logs are looked at again
	moveBatch  = 4 << 20          // bytes that are moved with one sync
	moveAtOnce = 32 << 10         // chunks that one walk of the tree collects
)

// move is a chunk that was read, and verified, at a place.
type move struct {
	id   chunk.ID
	data []byte
	from place
}

// mover is the goroutine that empties value logs.
type mover struct {
	wanted  chan struct{} // capacity 1: room is short, or something was dropped
	cancel  context.CancelFunc
	ended   chan struct{}
	lastUse atomic.Int64 // nanoseconds since start at which others used the volume
	start   time.Time
	// stuck logs could not be emptied; the value is what lived in them then. They
	// are tried again when that has changed. The volume's mu guards it.
	stuck map[uint32]int64
}

func (m *mover) begin(v *Volume) {
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	go v.moveLoop(ctx)
}

// end asks the mover to end; it closes ended then.
func (m *mover) end() { m.cancel() }

func (v *Volume) touch() { v.mover.lastUse.Store(int64(time.Since(v.mover.start))) }

// wantRoom wakes the mover.
func (v *Volume) wantRoom() {
	select {
	case v.mover.wanted <- struct{}{}:
	default:
	}
}

func (v *Volume) moveLoop(ctx context.Context) {
	defer close(v.mover.ended)
	for {
		for v.reclaim(ctx) && ctx.Err() == nil {
		}
		select {
		case <-v.mover.wanted:
		case <-time.After(lookAgain):
		case <-ctx.Done():
			return
		}
	}
}

// reserve is what is kept free to move a log, in bytes: what lives in one that is
// a quarter dead. A volume of a few logs keeps nothing: there is always one that
// is dead enough, or none.
func (v *Volume) reserve() int64 {
	if v.opt.Capacity > 0 && v.opt.Capacity < 16*v.logSize {
		return 0
	}
	return v.logSize * 3 / 4
}

// short tells whether puts will soon lack room.
func (v *Volume) short() bool { return v.Stats().Free < 2*v.logSize }

// moveRoom is how many bytes may be moved now: the floor's lower half stays free.
func (v *Volume) moveRoom() int64 {
	var st unix.Statfs_t
	if v.opt.hooks.statfs(v.dir, &st) != nil {
		return 0
	}
	return free(&st) - max(v.floor(&st)/2, needed) - needed
}

// reclaim empties the logs that are worth it and has Badger delete them. It tells
// whether that has given anything back. What goes wrong leaves the log where it is.
func (v *Volume) reclaim(ctx context.Context) bool {
	if v.writable() != nil {
		return false
	}
	v.mu.Lock()
	unread := v.unread
	v.mu.Unlock()
	if err := errors.Join(v.readAgain(ctx, unread), v.rewrite(ctx)); err != nil {
		if ctx.Err() == nil {
			v.opt.Log.Warn("chunks that a crash can have hurt could not be read, or not written again", "volume", v.id, "err", err)
		}
		return false // what they lie in must stay
	}
	v.forgetDeleted()
	victims, live := v.chooseVictims()
	if len(victims) == 0 {
		return false
	}
	v.opt.Log.Debug("value logs are being emptied", "volume", v.id, "logs", victims)
	err := v.empty(ctx, victims)
	var empty []uint32
	if err == nil {
		empty, err = v.unneeded(ctx, victims)
	}
	for _, n := range empty {
		if err == nil {
			err = v.deleteLog(ctx, n)
		}
	}
	v.mu.Lock()
	for _, n := range victims {
		if s := v.space.logs[n]; s != nil && !s.going {
			v.mover.stuck[n] = live[n] // as it was: what was dropped since is not looked at yet
		}
	}
	v.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		v.opt.Log.Warn("dead bytes could not be given back", "volume", v.id, "err", err)
	} else if err == nil {
		v.opt.Log.Debug("value logs were emptied", "volume", v.id, "deleted", empty)
	}
	return err == nil && len(empty) > 0
}

// chooseVictims tells what lives in them, too, in bytes.
func (v *Volume) chooseVictims() (logs []uint32, live map[uint32]int64) {
	short, room := v.short(), v.moveRoom()
	v.mu.Lock()
	defer v.mu.Unlock()
	logs, live = v.space.victims(short, room, func(n uint32, s *logSpace) bool {
		live, stuck := v.mover.stuck[n]
		return stuck && live == s.live
	}), map[uint32]int64{}
	for _, n := range logs {
		live[n] = v.space.logs[n].live
	}
	return logs, live
}

// empty moves what lives in these logs.
func (v *Volume) empty(ctx context.Context, logs []uint32) error {
	var all []resident
	err := v.eachRecord(ctx, func(id chunk.ID, at place) error {
		if slices.Contains(logs, at.log) {
			all = append(all, resident{id: id, at: at})
		}
		if len(all) >= moveAtOnce {
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return err
	}
	asTheyLie(all)
	for len(all) > 0 {
		n, bytes := 0, int64(0)
		for n < len(all) && (n == 0 || bytes+int64(all[n].at.length) <= moveBatch) {
			bytes += int64(all[n].at.length)
			n++
		}
		if err := v.pace(ctx, bytes); err != nil {
			return err
		}
		if err := v.moveThese(ctx, all[:n], bytes); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// moveThese reads chunks, verifies them, and has them written again and synced.
// One that is lost stays: its log does too, until it is dropped or put again.
func (v *Volume) moveThese(ctx context.Context, these []resident, bytes int64) error {
	if v.moveRoom() < bytes+int64(len(these))*recordOverhead {
		return errors.New("there is no room to move what lives in a value log")
	}
	var moves []move
	for _, r := range these {
		data, err := v.get(ctx, r.id)
		switch {
		case err == nil:
			moves = append(moves, move{id: r.id, data: data, from: r.at})
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case wire.ProblemOf(err).Code != wire.CodeLost && wire.ProblemOf(err).Code != wire.CodeNotFound:
			return err
		}
	}
	if len(moves) == 0 {
		return nil
	}
	return v.hand(ctx, &request{moves: moves})
}

// rewrite has chunks written again that are whole only where they lay before a move.
func (v *Volume) rewrite(ctx context.Context) error {
	v.mu.Lock()
	ids := slices.Collect(maps.Keys(v.rescued))
	v.mu.Unlock()
	for _, id := range ids {
		data, err := v.get(ctx, id)
		if code := wire.ProblemOf(err).Code; err != nil && code != wire.CodeLost && code != wire.CodeNotFound {
			return err
		}
		if err == nil {
			var at place
			if err := v.view(func(txn *badger.Txn) (err error) {
				at, err = findRecord(txn, id)
				return err
			}); err != nil {
				return err
			}
			if err := v.hand(ctx, &request{moves: []move{{id: id, data: data, from: at}}}); err != nil {
				return err
			}
		}
		v.mu.Lock()
		delete(v.rescued, id)
		v.mu.Unlock()
	}
	return nil
}

// pace waits until so many bytes may be moved: at once if room is short, else at
// the rate, and when others leave the disk alone.
func (v *Volume) pace(ctx context.Context, bytes int64) error {
	if v.opt.hooks.pace != nil {
		return v.opt.hooks.pace(ctx, bytes)
	}
	if v.short() {
		return ctx.Err()
	}
	wait := time.Duration(bytes) * time.Second / moveRate
	for lag := time.Duration(0); ; lag += wait {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		idle := time.Since(v.mover.start) - time.Duration(v.mover.lastUse.Load())
		if idle >= quiet || lag >= longestLag || v.short() {
			return nil
		}
		wait = quiet - idle
	}
}

// unneeded are those of the logs that nothing in the tree points to. Nothing will
// again: only the newest log gets records.
func (v *Volume) unneeded(ctx context.Context, logs []uint32) ([]uint32, error) {
	needed := map[uint32]bool{}
	err := v.eachRecord(ctx, func(_ chunk.ID, at place) error {
		needed[at.log] = true
		return nil
	})
	return slices.DeleteFunc(slices.Clone(logs), func(n uint32) bool { return needed[n] }), err
}

// deleteLog has Badger delete a log that nothing points to. Badger first reads it,
// and would write everything again whose key it still finds under the record's own
// version, dropped and moved chunks until a compaction, so its first record is
// blanked: there Badger stops reading. Should Badger write something all the same,
// of this log or another, the iterator keeps the file until that is synced.
func (v *Volume) deleteLog(ctx context.Context, number uint32) (err error) {
	if err := v.blank(number); err != nil {
		return err
	}
	v.mu.Lock()
	var others []uint32
	for n := range v.space.logs {
		if n != number {
			others = append(others, n)
		}
	}
	v.mu.Unlock()
	err = v.view(func(txn *badger.Txn) error {
		it := txn.NewIterator(keysOnly('v'))
		defer it.Close()
		return v.hand(ctx, &request{flush: true, first: func() error {
			chooseLog(v.db, number, others)
			if err := v.db.RunValueLogGC(0.5); err != nil {
				return fmt.Errorf("value log %d is not deleted: %w", number, err)
			}
			v.mu.Lock()
			v.space.logs[number].going = true
			v.mu.Unlock()
			return nil
		}})
	})
	v.forgetDeleted()
	return err
}

// blank overwrites the head of a log's first record. It finds the log from the
// directory that is locked: by name it could be another volume's by now.
func (v *Volume) blank(number uint32) error {
	fd, err := unix.Openat(int(v.lock.Fd()), filepath.Join(chunksDir, logName(number)), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("value log %d cannot be opened: %w", number, err)
	}
	_, err = unix.Pwrite(fd, make([]byte, recordHead), logHeader)
	return errors.Join(err, unix.Close(fd))
}

// forgetDeleted takes logs out of the ledger that Badger has deleted, which it
// does when the last walk of the tree ends.
func (v *Volume) forgetDeleted() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for n, s := range v.space.logs {
		if !s.going {
			continue
		}
		if _, err := os.Stat(v.logPath(n)); errors.Is(err, fs.ErrNotExist) {
			v.space.forget(n)
			delete(v.mover.stuck, n)
		}
	}
}
