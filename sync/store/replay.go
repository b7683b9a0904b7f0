package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/compactors"
	"github.com/deimos-edge/deimos/internal/durable"
)

// How a volume begins: what its segments and its index say is brought together.

const (
	indexDir = "index"     // in chunks/
	oldIndex = "index.old" // a damaged one, that is being deleted

	tellEach = 10 * time.Second // how far it is, to the log

	beginAnew = "if the disk is sound, move the directory away and begin a new volume, the fleet holds copies"
)

// refuseOldForm refuses a volume whose chunks lie in value logs of Badger.
func refuseOldForm(dir string) error {
	for _, pattern := range []string{"*.vlog", "MANIFEST"} {
		if old, err := filepath.Glob(filepath.Join(dir, chunksDir, pattern)); err == nil && len(old) > 0 {
			return fmt.Errorf("the chunks in %s were stored by an earlier version, in a form that this one does not read: drain the device with the version before, or erase the volume", dir)
		}
	}
	return nil
}

// openLog opens segments and index, and reads what the index does not know yet.
func (v *Volume) openLog(fresh bool) (err error) {
	l := &v.log
	l.dir, l.hooks = filepath.Join(v.dir, chunksDir), v.opt.hooks
	if err := os.MkdirAll(filepath.Join(l.dir, indexDir), 0o700); err != nil {
		return fmt.Errorf("the directory for chunks cannot be made: %w", err)
	}
	if l.home, err = os.Stat(l.dir); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(l.dir, oldIndex)); err != nil {
		return fmt.Errorf("what is left of a damaged index cannot be removed: %w", err)
	}
	numbers, err := segmentsIn(l.dir)
	if err != nil {
		return fmt.Errorf("the segments in %s cannot be listed: %w", l.dir, err)
	}
	x, p, err := v.openIndex()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			v.awaitCheckpoint()
			v.opt.hooks.census.held.Add(-int64(v.chunks))
			err = errors.Join(err, l.close(), v.index.close())
		}
	}()
	v.setIndex(x)
	if err := v.agree(numbers, fresh); err != nil {
		return err
	}
	if err := v.takeStock(numbers, p); err != nil {
		var d *damage
		if !errors.As(err, &d) {
			return fmt.Errorf("the index of the chunks in %s cannot be read: %w", v.dir, err)
		}
		if err := x.close(); err != nil {
			return err
		}
		if x, err = v.newIndex(d); err != nil {
			return err
		}
		v.setIndex(x)
		p = position{}
		if err := v.takeStock(numbers, p); err != nil {
			return err
		}
	}
	if err := v.replay(numbers, p); err != nil {
		return fmt.Errorf("the segments in %s cannot be read: %w", v.dir, err)
	}
	if !fresh {
		return nil
	}
	if err := v.firstTime(); err != nil {
		return fmt.Errorf("a new volume cannot be made in %s: %w", v.dir, err)
	}
	return nil
}

func (v *Volume) setIndex(x *index) {
	x.stumbled, x.rest = v.stumble, compactors.Keep(x.db)
	v.index = x
}

// openIndex opens the index, or makes it anew. The position is the zero one then.
func (v *Volume) openIndex() (*index, position, error) {
	x, err := openIndex(filepath.Join(v.log.dir, indexDir), badgerLog{v.opt.Log}, v.opt.hooks)
	var d *damage
	if errors.As(err, &d) {
		x, err = v.newIndex(d)
		return x, position{}, err
	}
	if errors.Is(err, unix.ENOMEM) {
		err = fmt.Errorf("%w: the memory or the address space of this machine is too small; a 32-bit processor can hold %d chunks in all its volumes, use a 64-bit system for more", err, chunks32)
	}
	if err != nil {
		return nil, position{}, fmt.Errorf("the index of the chunks in %s cannot be opened: %w", v.dir, err)
	}
	p, o, err := x.position()
	if err != nil {
		return nil, p, errors.Join(fmt.Errorf("the index of the chunks in %s cannot be read: %w", v.dir, err), x.db.Close())
	}
	v.log.from = o
	return x, p, nil
}

// newIndex is an empty index in the place of a damaged one.
func (v *Volume) newIndex(d *damage) (*index, error) {
	dir := filepath.Join(v.log.dir, indexDir)
	if v.readOnly != "" {
		return nil, fmt.Errorf("the index of the chunks in %s is damaged (%w) and cannot be made anew: %s", v.dir, d, v.readOnly)
	}
	v.opt.Log.Warn("the index of the chunks is damaged and made anew", "volume", v.id, "dir", dir, "why", d)
	old := filepath.Join(v.log.dir, oldIndex)
	err := os.Rename(dir, old) // as a whole: with a part of its files it could pass for another
	if err == nil {
		err = errors.Join(os.Mkdir(dir, 0o700), v.opt.hooks.fsync(v.log.dir), os.RemoveAll(old))
	}
	var x *index
	if err == nil {
		x, err = openIndex(dir, badgerLog{v.opt.Log}, v.opt.hooks)
	}
	if err != nil {
		return nil, fmt.Errorf("the index of the chunks in %s is damaged (%w) and cannot be made anew: %w; %s", v.dir, d, err, beginAnew)
	}
	return x, nil
}

// agree finds out which volume the segments belong to, and whether it is this one.
func (v *Volume) agree(numbers []uint32, fresh bool) error {
	l := &v.log
	var unread error
	for i, n := range slices.Backward(numbers) {
		if i < len(numbers)-1 && l.from.volume != "" {
			break
		}
		o, form, err := v.headOf(n)
		if isDamage(err) {
			unread = err
		} else if err != nil {
			return err
		}
		if form > segmentForm {
			return fmt.Errorf("the chunks in %s were stored by a later version, in form %d; this one knows %d", v.dir, form, segmentForm)
		}
		switch {
		case l.from.volume == "":
			l.from = o
		case o.volume != "" && o != l.from:
			return fmt.Errorf("the index in %s belongs to other segments than lie beside it: if directories were mixed up, put back what belongs there; without an index one is made anew", filepath.Join(l.dir, indexDir))
		}
	}
	switch {
	case l.from.volume == "" && unread != nil:
		return fmt.Errorf("no head of the segments in %s can be read (%w): check the disk, its cable and its power", l.dir, unread)
	case l.from.volume == "" && len(numbers) > 1:
		return fmt.Errorf("no head of the segments in %s is whole, and its index is damaged: %s", l.dir, beginAnew)
	case l.from.volume == "" && !fresh:
		return fmt.Errorf("this is another volume: %s says %s, but the chunks beside it belong to none; was %s replaced?", filepath.Join(v.dir, idFile), v.id, chunksDir)
	case l.from.volume == "":
		l.from.volume = v.id
		_, err := rand.Read(l.from.mark[:])
		return err
	case fresh: // its making was cut short, or the file was deleted: the chunks keep their id
		v.id = l.from.volume
	case l.from.volume != v.id:
		return fmt.Errorf("this is another volume: %s says %s, the chunks beside it belong to %s; were directories mixed up?", filepath.Join(v.dir, idFile), v.id, l.from.volume)
	}
	return nil
}

// headOf reads the head of a segment; form is 0 if it is damaged, or cannot be read.
func (v *Volume) headOf(number uint32) (o origin, form uint32, err error) {
	s, err := v.openSegment(number)
	if err != nil {
		return o, 0, err
	}
	raw, err := s.bytes(0, segmentHead)
	if errors.Is(err, errBad) {
		err = s.bad
	}
	o, form = originIn(raw)
	return o, form, errors.Join(err, s.close())
}

// firstTime makes a new volume durable: its id last, so that VOLUME means a whole volume.
func (v *Volume) firstTime() error {
	if v.log.file == nil {
		if err := v.log.begin(); err != nil {
			return err
		}
		v.space.set(v.log.number, v.log.length, segmentHead)
	}
	if err := errors.Join(v.log.sync(), v.checkpoint()); err != nil {
		return err
	}
	if err := v.saving.wait(); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(v.dir, idFile), []byte(v.id+"\n"), 0o600)
}

// takeStock counts what the index knows. What it has where no segment is, or behind a
// segment's end, is lost, unless it is found when the log is read again.
func (v *Volume) takeStock(numbers []uint32, p position) error {
	v.space = ledger{segments: map[uint32]*space{}}
	v.opt.hooks.census.held.Add(-int64(v.chunks))
	v.used, v.chunks = 0, 0
	clear(v.lost)
	fulls, err := v.index.fulls()
	if err != nil {
		return err
	}
	for _, n := range numbers {
		info, err := os.Stat(filepath.Join(v.log.dir, segmentName(n)))
		if err != nil {
			return err
		}
		meta := max(fulls[n].meta, segmentHead)
		v.space.set(n, info.Size(), min(meta, info.Size()))
		v.space.of(n).drops = fulls[n].drops
	}
	for n := range fulls {
		if v.space.segments[n] == nil { // a kill came between its end and the checkpoint
			v.index.setFull(n, full{gone: true})
		}
	}
	v.log.number, v.log.seq = max(p.end.segment, v.space.newest), p.seq
	err = v.index.each(context.Background(), func(r resident) error {
		v.count(r.at, 1)
		v.log.number = max(v.log.number, r.at.segment)
		if s := v.space.segments[r.at.segment]; s == nil {
			v.lost[r.id] = v.loss(r.id, r.at, "its segment is gone")
		} else if r.at.end() > s.length {
			v.lost[r.id] = v.loss(r.id, r.at, errCut.Error())
		}
		return nil
	})
	if err != nil {
		return err
	}
	if int64(v.chunks) != p.chunks || v.space.places != p.places {
		return &damage{fmt.Errorf("it has %d chunks, and not the %d that it should have", v.chunks, p.chunks)}
	}
	return nil
}

// count takes a chunk into the figures, or out of them.
func (v *Volume) count(at place, sign int) {
	v.chunks += sign
	v.opt.hooks.census.held.Add(int64(sign))
	v.used += int64(sign) * int64(at.size)
	v.space.change(at, int64(sign))
}

// replay brings the index up to date with the log from a position on. In the last segment
// are the records that a power cut can have hurt, all of those that are not known to have
// been durable: what is not whole of them was never promised. A record that was
// durable and is not whole is a lost chunk.
func (v *Volume) replay(numbers []uint32, p position) error {
	told := time.Now()
	v.doubts = v.readDoubts()
	for i, n := range numbers {
		if n < p.end.segment {
			continue
		}
		if time.Since(told) >= tellEach {
			told = time.Now()
			v.opt.Log.Info("the segments of a volume are read again", "volume", v.id, "dir", v.dir, "read", i, "of", len(numbers))
		}
		from := int64(segmentHead)
		if n == p.end.segment {
			from = max(from, int64(p.end.at))
		}
		s, err := v.openSegment(n)
		if err != nil {
			return err
		}
		last := i == len(numbers)-1
		if last { // if it was ended before the checkpoint, all of it is durable
			seal, _, ok, sealErr := s.sealed()
			last, err = !ok || int64(seal.at) >= from, sealErr
		}
		switch {
		case err != nil:
		case last:
			err = v.replayLast(s, from)
		default:
			err = v.replayFull(s, from)
		}
		if err := errors.Join(err, s.close()); err != nil {
			return err
		}
	}
	v.noteDoubts()
	if v.readOnly != "" || v.log.number == 0 {
		return nil
	}
	v.settle()
	return nil
}

// replayFull reads a segment that another follows: all of it was durable.
func (v *Volume) replayFull(s *scan, from int64) error {
	var all []record
	var meta, drops int64
	for again := true; again; again = v.hesitate(s) {
		var err error
		if all, meta, err = s.records(); err != nil {
			return err
		}
	}
	for _, r := range all {
		if r.kind == kindDrop {
			drops += r.length()
		}
		if int64(r.at) < from {
			continue
		}
		if err := v.redo(r); err != nil {
			return err
		}
	}
	v.space.set(s.number, s.size, min(meta, s.size))
	v.space.of(s.number).drops = drops
	v.index.setFull(s.number, full{meta: meta, drops: drops})
	if v.index.changes() < checkpointChanges || v.readOnly != "" {
		return nil
	}
	if err := v.checkpointAt(spot{s.number, uint32(s.size)}); err != nil {
		return err
	}
	return v.saving.wait()
}

// redo does what a record did.
func (v *Volume) redo(r record) error {
	v.log.seq = max(v.log.seq, r.seq)
	was, ok, err := v.index.find(r.id)
	if err != nil {
		return err
	}
	switch r.kind {
	case kindChunk:
		if ok {
			v.count(was, -1)
		}
		v.count(r.place, 1)
		v.index.set(r.id, r.place)
		delete(v.lost, r.id)
	case kindDrop:
		if ok && was.spot == r.target {
			v.count(was, -1)
			v.index.remove(r.id)
			delete(v.lost, r.id)
		}
	}
	return nil
}

// replayLast reads the segment that was written last, and goes on in it where it ends.
func (v *Volume) replayLast(s *scan, from int64) error {
	l := &v.log
	var all, torn []record
	whole, unread := map[spot]bool{}, map[spot]bool{}
	for again := true; again; again = v.hesitate(s) {
		all = nil
		if _, err := s.walk(segmentHead, func(r record) error {
			l.durable, l.seq = max(l.durable, r.durable), max(l.seq, r.seq)
			all = append(all, r)
			return nil
		}); err != nil {
			return err
		}
		for _, r := range all {
			if int64(r.at) < from {
				continue
			}
			ok, err := s.holds(r)
			if err != nil && !errors.Is(err, errBad) {
				return err
			}
			whole[r.spot], unread[r.spot] = ok, unread[r.spot] || err != nil
		}
	}
	var content []byte
	var drops int64
	end, meta := from, int64(segmentHead) // up to from all was durable, whatever can be read of it
	for _, r := range all {
		if int64(r.at) >= from {
			switch ok := whole[r.spot]; {
			case r.kind == kindSeal && (!ok || !s.ends(r) || r.id != contentID(content)):
				continue // of what is not all there
			case !ok && r.seq > l.durable && !unread[r.spot]: // never promised
				torn = append(torn, r)
				continue
			}
			if err := v.redo(r); err != nil {
				return err
			}
			if !whole[r.spot] {
				v.lost[r.id] = v.loss(r.id, r.place, "its bytes have changed on disk")
			}
		}
		end = max(end, r.end())
		switch r.kind {
		case kindSeal:
			end += segmentFoot
			meta = segmentHead + r.length() + segmentFoot
			continue
		case kindDrop:
			drops += r.length()
		}
		content = r.appendContent(content)
	}
	sealed := meta > segmentHead
	v.space.set(s.number, s.size, min(meta, s.size))
	v.space.of(s.number).drops = drops
	if sealed {
		v.index.setFull(s.number, full{meta: meta, drops: drops})
	}
	l.length = s.size
	if v.readOnly != "" || s.number != l.number || s.size < from && from > segmentHead {
		return nil
	}
	if sealed {
		return nil
	}
	l.content, l.drops = content, drops
	return v.goOn(s.number, min(end, s.size), torn)
}

// goOn opens the newest segment to append to it. What is behind its last record is cut off,
// and records that never counted are blanked: once something durable follows them, they
// would count as lost. Their bytes are, too: behind a blank the next record is searched for,
// and in those could be one of a batch that was taken back.
func (v *Volume) goOn(number uint32, end int64, torn []record) error {
	l := &v.log
	f, err := os.OpenFile(filepath.Join(l.dir, segmentName(number)), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	l.file, l.length = f, max(end, segmentHead)
	if len(l.content) == 0 { // its making may have been cut off
		if _, err := f.WriteAt(l.from.head(number), 0); err != nil {
			return err
		}
	}
	if err := f.Truncate(l.length); err != nil {
		return err
	}
	for _, r := range torn {
		if n := min(r.end(), l.length) - int64(r.at); n > 0 {
			if _, err := f.WriteAt(make([]byte, n), int64(r.at)); err != nil {
				return err
			}
		}
	}
	v.space.set(number, l.length, segmentHead)
	return nil
}

// settle makes durable what a crash has left, so that a chunk that is found after opening
// is as good as one just put.
func (v *Volume) settle() {
	l := &v.log
	var err error
	if l.file != nil {
		err = l.sync()
	} else if path := filepath.Join(l.dir, segmentName(v.space.newest)); v.space.newest > 0 {
		_ = os.Truncate(path, v.space.segments[v.space.newest].length) // a kill may have kept it from giving back what it does not need
		err = errors.Join(l.hooks.fsync(path), l.hooks.fsync(l.dir))
		l.durable = l.seq
	}
	if err != nil {
		v.latchAll(fmt.Sprintf("what an earlier run wrote could not be made durable: %v: check the disk and restart the machine", err))
		v.noteFailedSync()
	}
}
