package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

const (
	maxBatchBytes    = 16 << 20 // chunks that share one sync
	maxBatchRequests = 1024
	partBytes        = 1 << 20 // of a batch, after which the disk begins to write
	maxDropsAtOnce   = 1000    // ids in one request

	// Whichever comes first, a checkpoint of the index follows: so much is read again, at
	// most, when the volume is opened after a crash.
	checkpointBytes   = 64 << 20
	checkpointChanges = 4 << 10
	checkpointAfter   = 30 * time.Second // without a change
)

// request is one change that waits for the committer, or with none of the changes
// the question whether a chunk is durable.
type request struct {
	id     chunk.ID
	data   []byte     // put
	read   bool       // put: the chunk was read just before, if it is held
	drops  []chunk.ID // drop
	lost   bool       // drop: only those that are lost, for all that is known when it is done
	moves  []move     // write again elsewhere
	graves []grave    // drop records to write again
	flush  bool       // have all that is durable in the index, durably
	done   chan error // takes one answer without blocking

	err error // the committer's
}

// Put makes a chunk durable and returns nil only then. data must hash to id
// and must not be changed until Put has returned nil, or ever if it did not. A
// chunk that is already held and verifies is not written again; one that was
// lost is.
//
// Problems: [wire.CodeMismatch], [wire.CodeNoSpace], [wire.CodeReadOnly], and
// [wire.CodeUnreachable] if the disk does not answer.
func (v *Volume) Put(ctx context.Context, id chunk.ID, data []byte) error {
	if err := chunk.CheckSize(int64(len(data))); err != nil {
		return wire.RejectedBecause(wire.CodeMismatch, "chunk %s cannot be stored: %v", id, err)
	}
	if got := chunk.Sum(data); got != id {
		return wire.FailedBecause(wire.CodeMismatch, "the bytes are those of chunk %s, not of %s", got, id)
	}
	err := v.submit(ctx, &request{id: id, data: data})
	if !errors.Is(err, errHeld) {
		return err
	}
	// Reading finds a loss, which the committer then mends. What cannot be read for now
	// may be anything.
	if _, err := v.Get(ctx, id); err != nil {
		if code := wire.ProblemOf(err).Code; ctx.Err() != nil || code != wire.CodeLost && code != wire.CodeNotFound {
			return err
		}
	}
	return v.submit(ctx, &request{id: id, data: data, read: true})
}

// errHeld is the answer to a put of a chunk that is held, as far as the index knows.
var errHeld = errors.New("the chunk is held")

// Confirm reads a chunk, verifies it and returns its size if it is durable: a
// nil error is worth as much as Put's. Errors as for [Volume.Get], and
// [wire.CodeReadOnly] for a chunk whose sync failed.
func (v *Volume) Confirm(ctx context.Context, id chunk.ID) (size int64, err error) {
	data, err := v.Get(ctx, id)
	if err != nil {
		return 0, err
	}
	return int64(len(data)), v.submit(ctx, &request{id: id})
}

// Drop forgets chunks, durably. Ids that are not held are no error. It works on
// a disk below its floor, but not on a volume that is read-only.
func (v *Volume) Drop(ctx context.Context, ids []chunk.ID) error {
	return v.drop(ctx, ids, false)
}

func (v *Volume) drop(ctx context.Context, ids []chunk.ID, lost bool) error {
	for len(ids) > 0 {
		n := min(len(ids), maxDropsAtOnce)
		if err := v.submit(ctx, &request{drops: ids[:n:n], lost: lost}); err != nil {
			return err
		}
		ids = ids[n:]
	}
	return nil
}

// DropLost is Drop of those of the chunks that are lost for sure: each that is known to
// be is read once more, as what kept it from being read may have passed. One that is put
// again meanwhile stays.
func (v *Volume) DropLost(ctx context.Context, ids []chunk.ID) error {
	v.mu.Lock()
	known := slices.DeleteFunc(slices.Clone(ids), func(id chunk.ID) bool { _, lost := v.lost[id]; return !lost })
	v.mu.Unlock()
	var lost []chunk.ID
	for _, id := range known {
		_, err := v.get(ctx, id)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil && wire.ProblemOf(err).Code == wire.CodeLost {
			lost = append(lost, id)
		}
	}
	v.opt.hooks.dropping()
	return v.drop(ctx, lost, true)
}

// dropHeld is Drop that leaves a volume alone that holds none of the ids, so
// that a broken volume does not fail what is no business of its.
func (v *Volume) dropHeld(ctx context.Context, ids []chunk.ID) error {
	there, err := v.holds(ids)
	if err != nil {
		return err
	}
	return v.Drop(ctx, there)
}

func (v *Volume) submit(ctx context.Context, r *request) error {
	v.touch()
	return v.hand(ctx, r)
}

// hand is submit by the volume itself.
func (v *Volume) hand(ctx context.Context, r *request) error {
	if err := v.enter(); err != nil {
		return err
	}
	defer v.ops.Done()
	if v.hangs.Load() > 0 {
		return v.hung()
	}
	r.done = make(chan error, 1)
	limit := writePatience * v.opt.hooks.patience()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case v.queue <- r:
	case <-timer.C:
		return v.hung()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return v.await(ctx, r.done, limit)
}

// commitLoop is the committer. It ends when stop is closed, which Close does
// after the last submit has returned.
func (v *Volume) commitLoop() {
	defer close(v.stopped)
	c := crowd{queue: v.queue}
	idle := time.NewTimer(v.opt.hooks.checkpoint)
	defer idle.Stop()
	for {
		select {
		case r := <-v.queue:
			var b batch
			c.wrote = false
			for b.add(r); len(b.requests) > 0; {
				b = v.commit(b, &c)
			}
			if c.wrote {
				idle.Reset(v.opt.hooks.checkpoint)
			}
		case <-idle.C:
			if v.index.changes() > 0 {
				_ = v.checkpoint()
			}
		case <-v.stop:
			if v.index.changes() > 0 {
				_ = v.checkpoint()
			}
			v.awaitCheckpoint()
			if err := v.log.close(); err != nil {
				v.opt.Log.Warn("a segment was not closed", "volume", v.id, "err", err)
			}
			return
		}
	}
}

// batch is requests that share a sync.
type batch struct {
	requests []*request
	bytes    int
}

func (b *batch) add(r *request) {
	b.requests, b.bytes = append(b.requests, r), b.bytes+len(r.data)
	for _, m := range r.moves {
		b.bytes += len(m.data)
	}
}

func (b *batch) full() bool { return b.bytes >= maxBatchBytes || len(b.requests) >= maxBatchRequests }

// crowd is those who use the committer at once. Who was answered just now comes again
// soon, if there is more to do. If the others did not wait for that, there would be two
// groups that take turns, and twice as many syncs.
type crowd struct {
	queue <-chan *request
	size  int           // of the last batch, with those who came while it was synced
	took  time.Duration // that sync
	skip  int           // batches that are not held up, because it was in vain
	wrote bool          // one of these batches wrote something
}

const (
	waitShare = 2  // of the time that the last sync took, the part for which others are waited for
	waitAgain = 16 // batches after which it is tried again
)

// take adds to a batch those who are there already.
func (c *crowd) take(b *batch) {
	for !b.full() {
		select {
		case r := <-c.queue:
			b.add(r)
		default:
			return
		}
	}
}

// expects tells whether others will soon come for this batch.
func (c *crowd) expects(b *batch) bool { return c.skip == 0 && len(b.requests) < c.size && !b.full() }

// wait adds the next one who comes, if one does.
func (c *crowd) wait(b *batch, limit *time.Timer) bool {
	select {
	case r := <-c.queue:
		b.add(r)
		return true
	case <-limit.C:
		return false
	}
}

// commit carries a batch out: it writes what is there, and what comes soon, syncs
// once, and answers all. It returns those who have come meanwhile.
func (v *Volume) commit(b batch, c *crowd) (next batch) {
	s := stage{v: v, from: v.log.point(), fates: map[chunk.ID]*fate{}}
	s.writeAll(&b, c)
	c.wrote = c.wrote || s.written
	err := s.err
	if err == nil && s.written {
		began := time.Now()
		err = v.log.sync()
		c.took = time.Since(began)
	}
	switch {
	case err == nil:
		v.follow()
		s.apply()
	case isFull(err) && v.log.back(s.from):
		v.follow()
		s.refuse(b.requests, wire.CodeNoSpace, fmt.Sprintf("the disk of volume %s (%s) is full: free space there", v.id, v.dir))
	default:
		reason := fmt.Sprintf("writing failed: %v", err)
		v.latch(reason)
		s.doubt()
		v.opt.Log.Error("the volume is read-only now: a write failed", "volume", v.id, "dir", v.dir, "reason", reason)
		v.noteFailedSync()
		v.follow()
		s.refuse(b.requests, wire.CodeReadOnly, fmt.Sprintf("volume %s could not make the change durable and takes no more: %s", v.id, reason))
	}
	v.checkpointIfDue()
	c.take(&next)
	c.size = len(b.requests) + len(next.requests)
	for _, r := range b.requests {
		if r.flush && r.err == nil {
			v.flush(r)
			continue
		}
		r.done <- r.err
	}
	return next
}

// follow brings the ledger up to date after a write.
func (v *Volume) follow() {
	for _, f := range v.log.sealed {
		v.mu.Lock()
		v.space.set(f.segment, f.length, f.meta)
		v.space.of(f.segment).drops = f.drops
		v.mu.Unlock()
		v.index.setFull(f.segment, full{meta: f.meta, drops: f.drops})
	}
	if len(v.log.sealed) > 0 { // one that is not the newest any more can be emptied
		defer v.wantRoom()
	}
	v.log.sealed = nil
	if v.log.file != nil {
		v.mu.Lock()
		v.space.set(v.log.number, v.log.length, segmentHead)
		v.space.of(v.log.number).drops = v.log.drops
		v.mu.Unlock()
	}
}

// flush answers when everything up to now is in the index, durably.
func (v *Volume) flush(r *request) {
	if err := v.writable(); err != nil {
		r.done <- err
		return
	}
	if err := v.checkpoint(); err != nil {
		r.done <- err
		return
	}
	under := v.saving
	go func() { r.done <- under.wait() }()
}

// checkpointIfDue begins a checkpoint if enough has changed and none is under way.
func (v *Volume) checkpointIfDue() {
	if v.writable() != nil || v.saving != nil && !v.saving.ended() {
		return
	}
	if v.index.changes() >= checkpointChanges || v.log.written-v.saved >= checkpointBytes {
		_ = v.checkpoint() // without one, more is read again at the next start
	}
}

// saving is a checkpoint under way.
type saving struct {
	done chan struct{}
	err  error
}

func (s *saving) wait() error {
	<-s.done
	return s.err
}

func (s *saving) ended() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// checkpoint begins one, beside what is put meanwhile. The committer calls it between two
// batches, when all that the index knows is durable in the log.
func (v *Volume) checkpoint() error {
	return v.checkpointAt(spot{v.log.number, uint32(v.log.length)})
}

// checkpointAt is checkpoint of an index that is complete up to there.
func (v *Volume) checkpointAt(end spot) error {
	v.awaitCheckpoint()
	if err := v.writable(); err != nil {
		return err
	}
	if err := makeRoom(v.dir, v.opt.hooks); err != nil {
		return err
	}
	v.mu.Lock()
	p := position{end: end, seq: v.log.seq, chunks: int64(v.chunks), places: v.space.places}
	v.mu.Unlock()
	v.saved = v.log.written
	changes, fulls := v.index.begin()
	s := &saving{done: make(chan struct{})}
	v.saving = s
	go func() {
		defer close(s.done)
		if s.err = v.index.checkpoint(v.log.from, p, changes, fulls); s.err != nil {
			v.latch(fmt.Sprintf("the index could not be written (%v): check the disk and its free space, and restart; the index is made anew then", s.err))
			v.opt.Log.Error("the volume is read-only now: its index could not be written", "volume", v.id, "dir", v.dir, "err", s.err)
			if err := v.index.spoil(); err != nil {
				v.opt.Log.Error("that the index is to be made anew could not be noted on disk", "volume", v.id, "err", err)
			}
		}
	}()
	return nil
}

func (v *Volume) awaitCheckpoint() {
	if v.saving != nil {
		_ = v.saving.wait() // it has latched the volume
	}
}

// writeAll writes a batch, and whoever comes for it. The disk begins with what is
// there while others are waited for.
func (s *stage) writeAll(b *batch, c *crowd) {
	c.take(b)
	s.take(b.requests)
	if c.skip > 0 {
		c.skip--
	}
	began := len(b.requests)
	limit := time.NewTimer(c.took / waitShare)
	defer limit.Stop()
	for done := began; s.err == nil && s.written && c.expects(b); done = len(b.requests) {
		if !c.wait(b, limit) {
			if done == began {
				c.skip = waitAgain
			}
			return
		}
		c.take(b)
		s.take(b.requests[done:])
	}
}

// noteFailedSync leaves word for the next start.
func (v *Volume) noteFailedSync() {
	if here, err := v.atHome(); err != nil || !here {
		return // nothing that the kernel could forget has failed, and the note is not for others
	}
	boot, err := v.opt.hooks.bootID()
	if err == nil {
		err = durable.WriteFile(filepath.Join(v.dir, syncFailedFile), []byte(boot+"\n"), 0o600)
	}
	if err != nil {
		v.opt.Log.Error("the failed write could not be noted on disk", "volume", v.id, "err", err)
	}
}

// atHome tells whether the volume's directory is still where it was opened.
func (v *Volume) atHome() (bool, error) {
	opened, err := v.lock.Stat()
	if err != nil {
		return false, err
	}
	now, err := os.Stat(v.dir)
	return err == nil && os.SameFile(opened, now), err
}

// stage is a batch on its way. What it means for the index and the counters is made of what
// became of each chunk, once all of it is durable. Until then it is nowhere but in the log.
type stage struct {
	v        *Volume
	from     point
	room     int64 // bytes left above the floor; read at the first put
	roomErr  error
	roomRead bool
	staged   int64 // bytes that the puts add to the segments
	fates    map[chunk.ID]*fate
	entries  []entry // that are not written yet
	written  bool
	err      error
}

// fate is what a batch does to a chunk.
type fate struct {
	before, now held
	touched     bool // the batch has put or dropped it, or both
}

// held is what is known of a chunk.
type held struct {
	at   place // of one that is written by this batch: once it is written
	ok   bool  // held
	lost bool
	mine bool // written by this batch: never lost
}

// grave is a record that no chunk has any more, of a segment that is still there.
type grave struct {
	id     chunk.ID
	target spot
}

// take does what some requests of the batch ask for, up to the sync.
func (s *stage) take(some []*request) {
	if err := s.look(some); err != nil {
		for _, r := range some {
			r.err = wire.FailedBecause(wire.CodeInternal, "the index of volume %s cannot be read: %v", s.v.id, err)
		}
		return
	}
	for _, r := range some {
		r.err = s.add(r)
	}
	s.write()
}

// look finds out, before these requests are written, what is held of all that they name.
func (s *stage) look(some []*request) error {
	var found []chunk.ID
	for _, r := range some {
		for _, id := range r.ids() {
			if s.fates[id] != nil {
				continue
			}
			at, ok, err := s.v.index.find(id)
			if err != nil {
				return err
			}
			s.fates[id] = &fate{before: held{at: at, ok: ok}}
			found = append(found, id)
		}
	}
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	for _, id := range found {
		f := s.fates[id]
		_, f.before.lost = s.v.lost[id]
		f.now = f.before
	}
	return nil
}

// ids are the chunks that a request names.
func (r *request) ids() []chunk.ID {
	switch {
	case r.drops != nil:
		return r.drops
	case r.moves != nil:
		ids := make([]chunk.ID, len(r.moves))
		for i, m := range r.moves {
			ids[i] = m.id
		}
		return ids
	case r.flush || r.graves != nil:
		return nil
	}
	return []chunk.ID{r.id}
}

func (s *stage) add(r *request) error {
	switch {
	case r.flush:
		return nil
	case r.moves != nil || r.graves != nil:
		return s.addMoves(r)
	case r.data != nil:
		return s.addPut(r)
	case r.drops != nil:
		return s.addDrops(r)
	default:
		return s.confirm(r.id)
	}
}

// confirm answers for a chunk that was read and verified just before.
func (s *stage) confirm(id chunk.ID) error {
	h := s.fates[id].now
	if !h.ok {
		return notFound(id)
	}
	if h.lost {
		return wire.FailedBecause(wire.CodeLost, "chunk %s is lost", id)
	}
	return s.v.doubt(id)
}

// doubt is the error for a chunk whose sync failed, if it did.
func (v *Volume) doubt(id chunk.ID) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.allSuspect || v.suspect[id] {
		return wire.FailedBecause(wire.CodeReadOnly, "chunk %s can be read, but may not survive: %s", id, v.readOnly)
	}
	return nil
}

func (v *Volume) writable() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.readOnly != "" {
		return wire.FailedBecause(wire.CodeReadOnly, "volume %s takes no more chunks: %s", v.id, v.readOnly)
	}
	return nil
}

func (s *stage) addPut(r *request) error {
	f := s.fates[r.id]
	if f.now.ok && !f.now.lost {
		if !r.read && !f.now.mine {
			return errHeld
		}
		return s.v.doubt(r.id)
	}
	if err := s.v.writable(); err != nil {
		return err
	}
	if err := s.takeRoom(int64(len(r.data))); err != nil {
		return err
	}
	s.writeChunk(r.id, r.data, f)
	return nil
}

// writeChunk writes a record that takes the place of what is held. Lost bytes stay behind.
func (s *stage) writeChunk(id chunk.ID, data []byte, f *fate) {
	e := entry{record{kind: kindChunk, id: id, place: place{size: uint32(len(data))}}, data}
	if f.now.ok {
		e.target = f.now.at.spot
	}
	s.entries = append(s.entries, e)
	f.now, f.touched = held{ok: true, mine: true}, true
}

// addMoves writes chunks again that still lie where they were read, and drops of what is
// still there.
func (s *stage) addMoves(r *request) error {
	if err := s.v.writable(); err != nil {
		return err
	}
	if err := makeRoom(s.v.dir, s.v.opt.hooks); err != nil {
		return err
	}
	for _, m := range r.moves {
		f := s.fates[m.id]
		if !f.now.ok || f.now.at != m.from || int64(m.from.size) != int64(len(m.data)) {
			continue
		}
		s.writeChunk(m.id, m.data, f)
	}
	for _, g := range r.graves {
		s.entries = append(s.entries, entry{record: record{kind: kindDrop, id: g.id, target: g.target}})
	}
	return nil
}

func (s *stage) addDrops(r *request) error {
	if err := s.v.writable(); err != nil {
		return err
	}
	there := slices.DeleteFunc(slices.Clone(r.drops), func(id chunk.ID) bool {
		h := s.fates[id].now
		return !h.ok || r.lost && !h.lost
	})
	slices.SortFunc(there, compareIDs)
	there = slices.Compact(there)
	if len(there) == 0 {
		return nil
	}
	if err := makeRoom(s.v.dir, s.v.opt.hooks); err != nil {
		return err
	}
	s.write() // what is dropped must lie somewhere
	for _, id := range there {
		f := s.fates[id]
		s.entries = append(s.entries, entry{record: record{kind: kindDrop, id: id, target: f.now.at.spot}})
		f.now, f.touched = held{}, true
	}
	return nil
}

// write writes what is prepared.
func (s *stage) write() {
	if len(s.entries) == 0 || s.err != nil {
		return
	}
	s.written = true
	if s.err = s.v.log.add(s.entries); s.err != nil {
		return
	}
	for _, e := range s.entries {
		if f := s.fates[e.id]; e.kind == kindChunk && f.now.mine {
			f.now.at = e.place
		}
	}
	s.entries = nil
}

// refuse is the answer to all whom a batch that did not become durable was to change
// anything for. A chunk that was held before, and that it left alone, is none of its business.
func (s *stage) refuse(all []*request, code string, why string) {
	for _, r := range all {
		asks := r.drops == nil && r.moves == nil && r.graves == nil
		if r.err == nil && !r.flush && (!asks || s.fates[r.id].touched) {
			r.err = wire.FailedBecause(code, "%s", why)
		}
	}
}

// doubt is for a batch of which nobody knows what the log has: what was held, and what it
// has dropped or replaced, may be gone at the next opening.
func (s *stage) doubt() {
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	for id, f := range s.fates {
		if f.before.ok && f.touched {
			s.v.suspect[id] = true
		}
	}
}

// apply makes the batch count.
func (s *stage) apply() {
	for id, f := range s.fates {
		switch {
		case f.now.mine:
			s.v.index.set(id, f.now.at)
		case f.before.ok && !f.now.ok:
			s.v.index.remove(id)
		}
	}
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	freed := false
	for id, f := range s.fates {
		if !f.touched {
			continue
		}
		if f.before.ok {
			s.v.count(f.before.at, -1)
		}
		if f.now.ok {
			s.v.count(f.now.at, 1)
		}
		freed = freed || f.before.ok || !f.now.ok
		delete(s.v.lost, id)
	}
	if freed {
		s.v.wantRoom()
	}
}

// takeRoom reserves space for a chunk of this batch.
func (s *stage) takeRoom(size int64) error {
	if !s.roomRead {
		s.room, s.roomErr = s.v.roomNow()
		s.roomRead = true
	}
	if s.roomErr != nil {
		return wire.FailedBecause(wire.CodeReadOnly, "the free space of volume %s cannot be read: %v", s.v.id, s.roomErr)
	}
	if err := s.v.fits(size, s.room, s.staged); err != nil {
		return err
	}
	s.room -= size + recordHead
	s.staged += size + recordHead
	return nil
}

// fits tells whether size more bytes may be written, with so much room above
// the floor, and so much taken already but not counted yet.
func (v *Volume) fits(size, room, staged int64) error {
	if err := v.opt.hooks.census.takes(); err != nil {
		return err
	}
	if size+recordHead > room {
		v.wantRoom()
		return wire.FailedBecause(wire.CodeNoSpace, "the disk of volume %s has reached its free-space floor: free space there, or lower the floor", v.id)
	}
	v.mu.Lock()
	occupied := v.space.length + staged
	v.mu.Unlock()
	if v.opt.Capacity > 0 && occupied+size+recordHead > v.opt.Capacity-v.reserve() {
		v.wantRoom()
		return wire.FailedBecause(wire.CodeNoSpace, "volume %s has reached its capacity of %d MiB", v.id, v.opt.Capacity>>20)
	}
	return nil
}

// CanTake tells whether a chunk of size bytes would be accepted now, so that
// nobody fetches what cannot be kept. Errors as for [Volume.Put].
func (v *Volume) CanTake(size int64) error {
	if err := v.writable(); err != nil {
		return err
	}
	room, err := v.room()
	if err != nil {
		return wire.FailedBecause(wire.CodeReadOnly, "the free space of volume %s cannot be read: %v", v.id, err)
	}
	return v.fits(size, room, 0)
}
