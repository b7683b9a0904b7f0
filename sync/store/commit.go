package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/deimos-edge/deimos/internal/compactors"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

const (
	maxBatchBytes    = 16 << 20 // chunks that share one sync
	maxBatchRequests = 1024
	partBytes        = 1 << 20 // of a batch, after which the disk begins to write
	maxDropsAtOnce   = 1000    // ids in one transaction

	keyBytes = 64 // a key in the tree with its value where that is no chunk (a size, or where the chunk lies), rounded up
)

// request is one change that waits for the committer, or with none of the changes
// the question whether a chunk is durable.
type request struct {
	id    chunk.ID
	data  []byte       // put
	read  bool         // put: the chunk was read just before, if it is held
	drops []chunk.ID   // drop
	lost  bool         // drop: only those that are lost, for all that is known when it is done
	moves []move       // write again elsewhere
	flush bool         // make durable what Badger wrote by itself
	first func() error // before a flush: what Badger does while nothing is being written
	done  chan error   // takes one answer without blocking

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
	limit := writePatience * v.opt.hooks.patience
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
	for {
		select {
		case r := <-v.queue:
			var b batch
			for b.add(r); len(b.requests) > 0; {
				b = v.commit(b, &c)
			}
		case <-v.stop:
			if err := v.syncer.close(); err != nil {
				v.opt.Log.Warn("a log was not closed", "volume", v.id, "err", err)
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
	s := stage{v: v, state: map[chunk.ID]held{}}
	s.writeAll(&b, c)
	err := s.err
	if err == nil && s.unsynced() {
		began := time.Now()
		settled := make(chan error, 1)
		go func() { settled <- s.settle() }()
		err = v.syncer.sync()
		c.took = time.Since(began)
		err = errors.Join(err, <-settled)
	}
	v.follow()
	if err != nil {
		reason := fmt.Sprintf("writing failed: %v", err)
		v.noteFailedSync(reason, s.put)
		for _, r := range b.requests {
			if r.err == nil {
				r.err = s.failed(r, reason)
			}
		}
	} else {
		s.apply()
	}
	c.take(&next)
	c.size = len(b.requests) + len(next.requests)
	for _, r := range b.requests {
		r.done <- r.err
	}
	return next
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
	for done := began; s.err == nil && s.unsynced() && c.expects(b); done = len(b.requests) {
		if s.err = s.v.syncer.begin(); s.err != nil {
			return
		}
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

// noteFailedSync latches the volume and leaves word for the next start.
func (v *Volume) noteFailedSync(reason string, put []chunk.ID) {
	v.latch(reason)
	v.mu.Lock()
	for _, id := range put {
		v.suspect[id] = true
	}
	v.mu.Unlock()
	v.opt.Log.Error("the volume is read-only now: a write failed", "volume", v.id, "dir", v.dir, "reason", reason)
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

// stage is a batch on its way: what it has written so far, and what that will
// mean for the counters once it is durable.
type stage struct {
	v        *Volume
	room     int64 // bytes left above the floor; read at the first put
	roomErr  error
	roomRead bool
	state    map[chunk.ID]held // of the ids that the batch names, as it goes
	put      []chunk.ID
	unlost   []chunk.ID
	flush    bool
	staged   int64 // bytes that the puts add to the logs
	used     int64 // changes of the counters
	chunks   int
	freed    []record // that no chunk needs any more
	taken    []record // that were written

	changes []unwritten // prepared
	tree    int64       // bytes that they set in Badger's tree, at most
	written bool        // some others
	mu      sync.Mutex  // guards err while Badger writes
	err     error
}

// held is what is known of a chunk before it is changed.
type held struct {
	size int64
	at   place
	ok   bool // indexed
	lost bool
	mine bool // written by this batch
}

// record is a chunk in the value logs.
type record struct {
	at   place
	size int64 // of the chunk, in bytes
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

// look finds out, before these requests are written, what is held of all that they
// name: Badger would make a later read wait for the writes before it.
func (s *stage) look(some []*request) error {
	var found []chunk.ID
	err := s.v.view(func(txn *badger.Txn) error {
		for _, r := range some {
			for _, id := range r.ids() {
				if _, known := s.state[id]; known {
					continue
				}
				h, err := lookUp(txn, id)
				if err != nil {
					return err
				}
				s.state[id] = h
				found = append(found, id)
			}
		}
		return nil
	})
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	for _, id := range found {
		h := s.state[id]
		_, h.lost = s.v.lost[id]
		s.state[id] = h
	}
	return err
}

// lookUp reads what the tree knows of a chunk.
func lookUp(txn *badger.Txn, id chunk.ID) (h held, err error) {
	item, err := txn.Get(keyOf(indexPrefix, id))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return held{}, nil
	}
	if err != nil {
		return held{}, err
	}
	if _, h.size, err = readIndex(item); err != nil {
		return held{}, err
	}
	h.at, err = findRecord(txn, id)
	h.ok = err == nil
	return h, err
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
	case r.flush:
		return nil
	}
	return []chunk.ID{r.id}
}

// findRecord tells where a chunk's record lies: nowhere, if it is gone.
func findRecord(txn *badger.Txn, id chunk.ID) (place, error) {
	item, err := txn.Get(keyOf(chunkPrefix, id))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return place{}, nil
	}
	if err != nil {
		return place{}, err
	}
	return placeOf(item), nil
}

func (s *stage) add(r *request) error {
	switch {
	case r.flush:
		s.flush = true
		if r.first != nil {
			return r.first()
		}
		return nil
	case r.moves != nil:
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
	h := s.state[id]
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
	h := s.state[r.id]
	if h.ok && !h.lost {
		if !r.read && !h.mine {
			return errHeld
		}
		return s.v.doubt(r.id)
	}
	if err := s.v.writable(); err != nil {
		return err
	}
	size := int64(len(r.data))
	if err := s.takeRoom(size); err != nil {
		return err
	}
	s.writeChunk(r.id, r.data)
	if h.ok { // the lost bytes stay behind
		s.forget(h)
	}
	s.used += size
	s.chunks++
	s.unlost = append(s.unlost, r.id)
	s.state[r.id] = held{size: size, ok: true, mine: true}
	return nil
}

func (s *stage) writeChunk(id chunk.ID, data []byte) {
	size := int64(len(data))
	s.prepare(2, size, func(txn *badger.Txn) error {
		index := binary.BigEndian.AppendUint32(nil, uint32(size))
		return errors.Join(
			txn.Set(keyOf(chunkPrefix, id), data),
			txn.Set(keyOf(indexPrefix, id), index),
		)
	})
	s.put = append(s.put, id)
}

// forget takes what was held out of the counters.
func (s *stage) forget(h held) {
	s.used -= h.size
	s.chunks--
	if !h.mine {
		s.freed = append(s.freed, record{h.at, h.size})
	}
}

// addMoves writes chunks again that still lie where they were read.
func (s *stage) addMoves(r *request) error {
	if err := s.v.writable(); err != nil {
		return err
	}
	if err := makeRoom(s.v.dir, s.v.opt.hooks); err != nil {
		return err
	}
	for _, m := range r.moves {
		h := s.state[m.id]
		if !h.ok || h.mine || h.at != m.from || h.size != int64(len(m.data)) {
			continue
		}
		s.writeChunk(m.id, m.data)
		s.freed = append(s.freed, record{h.at, h.size})
		s.state[m.id] = held{size: h.size, ok: true, lost: h.lost, mine: true}
	}
	return nil
}

func (s *stage) addDrops(r *request) error {
	if err := s.v.writable(); err != nil {
		return err
	}
	there := slices.DeleteFunc(slices.Clone(r.drops), func(id chunk.ID) bool { return !s.state[id].ok || r.lost && !s.state[id].lost })
	slices.SortFunc(there, func(a, b chunk.ID) int { return slices.Compare(a[:], b[:]) })
	there = slices.Compact(there)
	if len(there) == 0 {
		return nil
	}
	if err := makeRoom(s.v.dir, s.v.opt.hooks); err != nil {
		return err
	}
	for _, id := range there {
		h := s.state[id]
		s.forget(h)
		s.state[id] = held{}
	}
	s.unlost = append(s.unlost, there...)
	s.prepare(2*len(there), 0, func(txn *badger.Txn) error {
		for _, id := range there {
			if err := errors.Join(txn.Delete(keyOf(chunkPrefix, id)), txn.Delete(keyOf(indexPrefix, id))); err != nil {
				return err
			}
		}
		return nil
	})
	return nil
}

// unwritten is a transaction that is not committed yet.
type unwritten struct {
	txn   *badger.Txn
	bytes int64 // of its chunk
}

// prepare makes a transaction of so many keys, with a chunk of so many bytes or none.
// An error fails the batch as a whole.
func (s *stage) prepare(keys int, bytes int64, fill func(*badger.Txn) error) {
	s.tree += int64(keys)*(keyBytes+compactors.EntryBytes) + min(bytes, smallValue)
	c := unwritten{s.v.db.NewTransaction(true), bytes}
	s.changes = append(s.changes, c)
	if err := fill(c.txn); err != nil {
		s.fail(err)
	}
}

func (s *stage) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = errors.Join(s.err, err)
}

// write writes what is prepared. All transactions exist before the first is committed,
// because a new one waits for the writes before it. The disk begins with one part while
// the next is written.
func (s *stage) write() {
	if len(s.changes) == 0 {
		return
	}
	s.v.rest.Begin(s.tree)
	defer s.v.rest.End()
	s.tree, s.written = 0, true
	s.v.syncer.answers()
	for s.err == nil {
		if s.commitPart(); len(s.changes) == 0 {
			return
		}
		if s.err == nil {
			s.err = s.v.syncer.begin()
		}
	}
	for _, c := range s.changes {
		c.txn.Discard()
	}
}

// unsynced tells whether the batch needs a sync.
func (s *stage) unsynced() bool { return s.written || s.flush }

// commitPart writes the next changes, in their order, up to a part's bytes.
func (s *stage) commitPart() {
	var writes sync.WaitGroup
	for bytes := int64(0); bytes < partBytes && len(s.changes) > 0; {
		c := s.changes[0]
		s.changes, bytes = s.changes[1:], bytes+c.bytes
		writes.Add(1)
		c.txn.CommitWith(func(err error) {
			defer writes.Done()
			if err != nil {
				s.fail(err)
			}
		})
	}
	writes.Wait()
}

// failed is the answer to a request of a batch that did not become durable. A
// chunk that was held before is none of the batch's business.
func (s *stage) failed(r *request, reason string) error {
	if r.drops == nil && r.moves == nil && !r.flush && !s.state[r.id].mine {
		return nil
	}
	return wire.FailedBecause(wire.CodeReadOnly, "volume %s could not make the change durable and takes no more: %s", s.v.id, reason)
}

// settle finds out where the batch has put its chunks.
func (s *stage) settle() error {
	return s.v.view(func(txn *badger.Txn) error {
		settled := map[chunk.ID]bool{}
		for _, id := range s.put {
			h := s.state[id]
			if !h.mine || settled[id] { // dropped again, or written twice
				continue
			}
			settled[id] = true
			at, err := findRecord(txn, id)
			if err != nil {
				return err
			}
			s.taken = append(s.taken, record{at, h.size})
		}
		return nil
	})
}

// apply makes the batch count.
func (s *stage) apply() {
	s.v.mu.Lock()
	defer s.v.mu.Unlock()
	s.v.used += s.used
	s.v.chunks += s.chunks
	for _, r := range s.freed {
		s.v.space.remove(r.at, r.size)
	}
	for _, r := range s.taken {
		s.v.space.add(r.at, r.size)
	}
	for _, id := range s.unlost {
		delete(s.v.lost, id)
	}
	if len(s.freed) > 0 {
		s.v.wantRoom()
	}
}

// takeRoom reserves space for a chunk of this batch.
func (s *stage) takeRoom(size int64) error {
	if !s.roomRead {
		s.room, s.roomErr = s.v.room()
		s.roomRead = true
	}
	if s.roomErr != nil {
		return wire.FailedBecause(wire.CodeReadOnly, "the free space of volume %s cannot be read: %v", s.v.id, s.roomErr)
	}
	if err := s.v.fits(size, s.room, s.staged); err != nil {
		return err
	}
	s.room -= size + recordOverhead
	s.staged += size + recordHead
	return nil
}

// fits tells whether size more bytes may be written, with so much room above
// the floor, and so much taken already but not counted yet.
func (v *Volume) fits(size, room, staged int64) error {
	if size+recordOverhead > room {
		v.wantRoom()
		return wire.FailedBecause(wire.CodeNoSpace, "the disk of volume %s has reached its free-space floor: free space there, or lower the floor", v.id)
	}
	v.mu.Lock()
	occupied, hurt := v.occupied()+staged, len(v.unread)+len(v.rescued)
	v.mu.Unlock()
	if hurt > 0 { // the next opening only looks at the newest chunks again
		v.wantRoom()
		return wire.FailedBecause(wire.CodeUnreachable, "volume %s takes no chunks before those that a crash can have hurt were read, and written again if need be; try again soon, and if that goes on, check its disk (%s)", v.id, v.dir)
	}
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
