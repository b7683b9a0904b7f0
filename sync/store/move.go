package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

const (
	moveRate   = 16 << 20         // bytes a second while nobody needs the disk
	quiet      = 2 * time.Second  // without use, after which nobody does
	longestLag = 5 * time.Second  // that use holds up one batch of chunks
	lookAgain  = 60 * time.Second // after which the segments are looked at again
	moveBatch  = 4 << 20          // bytes that are moved with one sync
)

// move is a chunk that was read, and verified, at a place.
type move struct {
	id   chunk.ID
	data []byte
	from place
}

// mover is the goroutine that empties segments.
type mover struct {
	wanted  chan struct{} // capacity 1: room is short, or something was dropped
	cancel  context.CancelFunc
	ended   chan struct{}
	lastUse atomic.Int64 // nanoseconds since start at which others used the volume
	start   time.Time
	// stuck segments could not be emptied. The volume's mu guards it.
	stuck map[uint32]stuck
}

// stuck is why a segment could not be emptied: it is tried again when what lives in it has
// changed, and if that was not the reason, after a while.
type stuck struct {
	live  int64 // bytes, then
	lives bool  // errLives
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
			v.forgive()
		case <-ctx.Done():
			return
		}
	}
}

// forgive has segments be tried again that something else kept from being emptied than what
// lives in them: a disk that was full, or could not be read for a moment.
func (v *Volume) forgive() {
	v.mu.Lock()
	defer v.mu.Unlock()
	maps.DeleteFunc(v.mover.stuck, func(_ uint32, s stuck) bool { return !s.lives })
}

// reserve is what is kept free to empty a segment, in bytes: what lives in one that is
// a quarter dead. A volume of a few segments keeps nothing: there is always one that
// is dead enough, or none.
func (v *Volume) reserve() int64 {
	if v.opt.Capacity > 0 && v.opt.Capacity < 16*v.log.limit {
		return 0
	}
	return v.log.limit * 3 / 4
}

// short tells whether puts will soon lack room.
func (v *Volume) short() bool { return v.Stats().Free < 2*v.log.limit }

// moveRoom is how many bytes may be moved now: the floor's lower half stays free.
func (v *Volume) moveRoom() int64 {
	var st unix.Statfs_t
	if v.opt.hooks.statfs(v.dir, &st) != nil {
		return 0
	}
	return free(&st) - max(v.floor(&st)/2, needed) - needed
}

// reclaim empties a segment that is worth it and deletes it. It tells whether that has
// given anything back. What goes wrong leaves the segment where it is.
func (v *Volume) reclaim(ctx context.Context) bool {
	if v.writable() != nil {
		return false
	}
	victims, live := v.chooseVictims()
	if len(victims) == 0 {
		return false
	}
	number := victims[0]
	v.opt.Log.Debug("a segment is being emptied", "volume", v.id, "segment", number)
	err := v.empty(ctx, number)
	if err == nil {
		err = v.deleteSegment(ctx, number)
	}
	if err == nil {
		v.opt.Log.Debug("a segment was emptied", "volume", v.id, "segment", number)
		return true
	}
	v.mu.Lock()
	v.mover.stuck[number] = stuck{live[number], errors.Is(err, errLives)} // as it was: what was dropped since is not looked at yet
	v.mu.Unlock()
	if ctx.Err() != nil {
		return false
	}
	if !errors.Is(err, errLives) {
		v.opt.Log.Warn("dead bytes could not be given back", "volume", v.id, "err", err)
	}
	return len(victims) > 1 // the next one may be
}

// chooseVictims tells what lives in them, too, in bytes.
func (v *Volume) chooseVictims() (segments []uint32, live map[uint32]int64) {
	short, room := v.short(), v.moveRoom()
	v.mu.Lock()
	defer v.mu.Unlock()
	segments, live = v.space.victims(short, room, func(n uint32, s *space) bool {
		then, stuck := v.mover.stuck[n]
		return stuck && then.live == s.live
	}), map[uint32]int64{}
	for _, n := range segments {
		live[n] = v.space.segments[n].live
	}
	return segments, live
}

// errLives is why a segment cannot be deleted: what lives in it is lost, as far as it was
// not written again, and known to be only as long as it is there.
var errLives = errors.New("chunks that are lost lie in it")

// empty writes what is needed of a segment again: chunks held, and drops and
// replacements of records that are still there, which would come back without them if
// the index had to be made anew.
func (v *Volume) empty(ctx context.Context, number uint32) error {
	s, err := v.openSegment(number)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	var all []record
	if err == nil {
		all, _, err = s.records()
		if err := errors.Join(err, s.fault, s.close()); err != nil {
			return err // what cannot be read may be a drop that is needed
		}
	}
	var these []resident
	var graves []grave
	for _, r := range all {
		held := false
		if r.kind == kindChunk {
			at, ok, err := v.index.find(r.id)
			if err != nil {
				return err
			}
			if held = ok && at == r.place; held {
				these = append(these, resident{r.id, at})
			}
		}
		if r.target.segment != 0 && r.target.segment != number && v.has(r.target.segment) {
			graves = append(graves, grave{r.id, r.target})
		}
	}
	if err := v.moveAll(ctx, these); err != nil {
		return err
	}
	if v.livesIn(number) { // in records that are damaged, or lost
		these = nil
		if err := v.index.each(ctx, func(r resident) error {
			if r.at.segment == number {
				these = append(these, r)
			}
			return nil
		}); err != nil {
			return err
		}
		if err := v.moveAll(ctx, these); err != nil {
			return err
		}
		if v.livesIn(number) {
			return errLives
		}
	}
	for len(graves) > 0 {
		n := min(len(graves), maxDropsAtOnce)
		if err := v.hand(ctx, &request{graves: graves[:n]}); err != nil {
			return err
		}
		graves = graves[n:]
	}
	return nil
}

func (v *Volume) has(segment uint32) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.space.segments[segment] != nil
}

func (v *Volume) livesIn(segment uint32) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.space.segments[segment]
	return s != nil && s.live > 0
}

// moveAll writes chunks again, some at a time.
func (v *Volume) moveAll(ctx context.Context, all []resident) error {
	asTheyLie(all)
	for len(all) > 0 {
		n, bytes := 0, int64(0)
		for n < len(all) && (n == 0 || bytes+all[n].at.length() <= moveBatch) {
			bytes += all[n].at.length()
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
// One that is lost stays: its segment does too, until it is dropped or put again.
func (v *Volume) moveThese(ctx context.Context, these []resident, bytes int64) error {
	if v.moveRoom() < bytes {
		return errors.New("there is no room to move what lives in a segment")
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

// deleteSegment deletes a segment that nothing lives in. Before, the index has to know all
// that the log has: the drops in it are not read again once it is gone.
func (v *Volume) deleteSegment(ctx context.Context, number uint32) error {
	if err := v.hand(ctx, &request{flush: true}); err != nil {
		return err
	}
	if here, err := v.atHome(); err != nil || !here {
		return errors.Join(err, errors.New("another directory lies there now"))
	}
	err := v.log.remove(number)
	switch {
	case err == nil:
		v.index.setFull(number, full{gone: true})
	case v.onSegment(number, func(int) error { return nil }):
		return err
	default: // a power cut may bring it back, and what was dropped in it
		v.latch(fmt.Sprintf("that a segment was deleted could not be made durable (%v): check the disk and restart the machine", err))
		v.noteFailedSync()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.space.forget(number)
	delete(v.mover.stuck, number)
	return err
}
