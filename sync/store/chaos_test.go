package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// chaos is a volume with which anything goes wrong, and what may be said of its chunks.
//
// Batches name the same few chunks again and again. The disk becomes full within them, writes
// and syncs fail, sectors rot, or cannot be read while it is opened. It is closed, killed, or
// the power is cut, also within a sync: of what was not synced, each sector is there or not, and
// what was cut off or deleted may be there still. Of the index any part is gone, then, or all.
type chaos struct {
	t    *testing.T
	rng  *rand.Rand
	dir  string
	boot int
	v    *Volume
	out  bytes.Buffer // what the volume has said
	mu   sync.Mutex   // guards it and what the hooks write

	ids   []chunk.ID
	datas map[chunk.ID][]byte
	may   map[chunk.ID]state

	fullAfter, failAfter int              // writes, until the disk is full, or fails; -1: never
	badSync              bool             // the next sync fails
	bad                  atomic.Int64     // a place that cannot be read, in every segment; -1: none
	synced               map[string]int64 // of each segment, up to where it is durable
	ghosts               map[string][]byte
	began                map[string]int64  // how long each segment was before the batch
	rotten               chunk.ID          // that the next batch is about
	fellBack             bool              // the index lost a log: it may be that of an older checkpoint
	undropped            map[chunk.ID]bool // the index alone may know that they were dropped
	cutAt                int               // steps until a copy is taken; -1: none is
	cut                  string
}

// state is what may be true of a chunk.
type state uint8

const (
	isHeld state = 1 << iota
	isGone
	isLost

	// rotted may be any: where the log is read again a record that has rotted counts as torn,
	// and what it took the place of is there still.
	rotted = isHeld | isGone | isLost
)

func (c *chaos) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(b)
}

func (c *chaos) options() Options {
	opt := smallSegments()
	opt.SegmentBytes = 16 << 10
	opt.Log = slog.New(slog.NewTextHandler(c, nil))
	opt.hooks.atOnce = 4
	boot := fmt.Sprint(c.boot)
	opt.hooks.bootID = func() (string, error) { return boot, nil }
	opt.hooks.pwritev = func(fd int, from [][]byte, at int64) (int, error) {
		if c.failAfter >= 0 {
			if c.failAfter--; c.failAfter < 0 {
				c.failAfter = 0
				return -1, unix.EIO
			}
		}
		if c.fullAfter >= 0 {
			if c.fullAfter--; c.fullAfter < 0 {
				c.fullAfter = 0
				if len(from) > 1 && c.rng.IntN(2) == 0 { // a part has room
					return unix.Pwritev(fd, from[:1+c.rng.IntN(len(from)-1)], at)
				}
				c.haunt()
				return -1, unix.ENOSPC
			}
		}
		n, err := unix.Pwritev(fd, from, at)
		if b := c.bad.Load(); b >= at && b < at+int64(n) { // the disk puts another sector there
			c.bad.Store(-1)
		}
		return n, err
	}
	opt.hooks.fdatasync = func(f *os.File) error {
		c.step()
		if c.badSync {
			return unix.EIO
		}
		if err := fdatasync(f); err != nil {
			return err
		}
		c.isSynced(f.Name())
		c.step()
		return nil
	}
	opt.hooks.fsync = func(path string) error {
		c.step()
		if err := durable.Sync(path); err != nil {
			return err
		}
		c.isSynced(path)
		c.step()
		return nil
	}
	opt.hooks.syncIndex = func(db *badger.DB) error {
		err := db.Sync()
		c.step()
		return err
	}
	opt.hooks.pread = func(fd int, into []byte, at int64) (int, error) {
		if b := c.bad.Load(); b >= 0 && at <= b && b < at+int64(len(into)) {
			return -1, unix.EIO
		}
		return unix.Pread(fd, into, at)
	}
	return opt
}

// step is a moment at which the power may be cut.
func (c *chaos) step() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cutAt < 0 {
		return
	}
	if c.cutAt--; c.cutAt < 0 && c.cut == "" {
		c.cut = c.powerCut()
	}
}

// haunt remembers what the kernel may have written by now, though it is about to be taken back.
func (c *chaos) haunt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, path := range segmentPaths(c.t, c.dir) {
		name := filepath.Base(path)
		if raw := mustRead(c.t, path); int64(len(raw)) > c.began[name] {
			c.ghosts[name] = raw
		}
	}
}

func (c *chaos) isSynced(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	name := filepath.Base(path)
	if name == chunksDir {
		for ghost := range c.ghosts {
			if _, err := os.Stat(filepath.Join(c.dir, chunksDir, ghost)); err != nil {
				delete(c.ghosts, ghost)
			}
		}
		return
	}
	delete(c.ghosts, name)
	if info, err := os.Stat(path); err == nil {
		c.synced[name] = info.Size()
	}
}

// powerCut is a copy of the directory with what the disk may have.
func (c *chaos) powerCut() string {
	var dir string
	for again := true; again; { // a segment that goes meanwhile would leave a state that never was
		before := segmentPaths(c.t, c.dir)
		dir = killed(c.t, c.dir)
		again = !slices.Equal(before, segmentPaths(c.t, c.dir))
	}
	if c.rng.IntN(3) == 0 {
		for name, raw := range c.ghosts {
			path := filepath.Join(dir, chunksDir, name)
			if err := os.WriteFile(path, raw, 0o600); err != nil {
				c.t.Fatal(err)
			}
		}
	}
	odds := []int{3, 20}[c.rng.IntN(2)]
	for _, path := range segmentPaths(c.t, dir) {
		raw, from := mustRead(c.t, path), c.synced[filepath.Base(path)]
		one := int64(-1) // that is missing alone
		if from < int64(len(raw)) && c.rng.IntN(2) == 0 {
			one = from + c.rng.Int64N(int64(len(raw))-from)
		}
		for at := from; at < int64(len(raw)); at = at/512*512 + 512 {
			if one < 0 && c.rng.IntN(odds) == 0 || one >= at && one < at/512*512+512 {
				clear(raw[at:min(at/512*512+512, int64(len(raw)))])
			}
		}
		if one < 0 && from < int64(len(raw)) && c.rng.IntN(4) == 0 {
			raw = raw[:from+c.rng.Int64N(int64(len(raw))-from+1)]
		}
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	return dir
}

// batch has a few requests share one, and judges the answers.
func (c *chaos) batch() {
	c.mu.Lock()
	c.began = map[string]int64{}
	for _, path := range segmentPaths(c.t, c.dir) {
		c.began[filepath.Base(path)] = int64(len(mustRead(c.t, path)))
	}
	c.mu.Unlock()
	var all []*request
	rotten := c.rotten
	c.rotten = chunk.ID{}
	for range 1 + c.rng.IntN(12) {
		id := c.ids[c.rng.IntN(len(c.ids))]
		if rotten != (chunk.ID{}) && c.rng.IntN(2) == 0 {
			id = rotten
		}
		var r *request
		switch c.rng.IntN(8) {
		case 0, 1:
			r = dropOf(id)
		case 2:
			r = dropOf(id)
			r.lost = true
		case 3:
			r = &request{id: id, done: make(chan error, 1)}
			if _, err := c.v.Get(c.t.Context(), id); err != nil {
				continue // who asks has read it
			}
		default:
			r = putOf(id, c.datas[id])
			_, err := c.v.Get(c.t.Context(), id)
			r.read = err == nil || c.rng.IntN(2) == 0 && wire.ProblemOf(err).Code != wire.CodeNotFound
		}
		all = append(all, r)
	}
	if len(all) == 0 {
		return
	}
	answers := together(c.t, c.v, all...)
	c.v.awaitCheckpoint()
	c.mu.Lock()
	wasCut := c.cut != ""
	c.mu.Unlock()
	before := map[chunk.ID]state{}
	for i, r := range all {
		id, err := r.id, answers[i]
		if r.drops != nil {
			id = r.drops[0]
		}
		if _, ok := before[id]; !ok {
			before[id] = c.may[id]
		}
		then := c.may[id]
		switch {
		case r.data != nil:
			then = isHeld
		case r.lost:
			if then&isLost != 0 {
				then |= isGone
			}
		case r.drops != nil:
			then = isGone
		}
		switch {
		case err == errHeld:
			continue
		case err == nil && r.data == nil && r.drops == nil && c.may[id]&isHeld == 0:
			c.t.Fatalf("a receipt for %s, of which is true: %d", id, c.may[id])
		case err == nil && r.data == nil && r.drops == nil:
			c.may[id] = isHeld
		case err == nil:
			c.may[id] = then
		case wire.ProblemOf(err).Code == wire.CodeReadOnly:
			c.may[id] |= then
		}
	}
	if wasCut { // nobody was answered before the cut
		for id, s := range before {
			c.may[id] |= s
			for _, r := range all {
				switch {
				case r.id == id && r.data != nil:
					c.may[id] |= isHeld
				case r.drops != nil && r.drops[0] == id:
					c.may[id] |= isGone
				}
			}
		}
	}
}

// look sees what is true of each chunk, which stays so then.
func (c *chaos) look(when string) {
	c.t.Helper()
	for _, id := range c.ids {
		got, err := c.v.Get(c.t.Context(), id)
		is := isHeld
		switch {
		case err == nil && !bytes.Equal(got, c.datas[id]):
			c.t.Fatalf("%s: wrong bytes", when)
		case err == nil:
		case wire.ProblemOf(err).Code == wire.CodeNotFound:
			is = isGone
		case wire.ProblemOf(err).Code == wire.CodeLost:
			is = isLost
		default:
			c.t.Fatalf("%s: %v", when, err)
		}
		// What doc.go leaves open: a drop is not known any more whose segment was emptied since that
		// checkpoint, or whose page was written over, if the index is gone, too.
		forgotten := c.undropped[id] && c.may[id]&isGone != 0
		forgotten = forgotten || c.fellBack && is == isLost && c.may[id]&isGone != 0 && strings.Contains(err.Error(), "its segment is gone")
		if c.may[id]&is == 0 && !forgotten {
			c.t.Fatalf("%s: of %s is true %d, may be %d (1 held, 2 gone, 4 lost): %v", when, id, is, c.may[id], err)
		}
		if c.may[id] = is; is == isLost {
			c.may[id] = rotted
		}
	}
	c.count(when)
}

// count compares the figures with what they are made of.
func (c *chaos) count(when string) {
	c.t.Helper()
	if c.v.writable() != nil {
		return
	}
	var chunks int
	var used int64
	live := map[uint32]int64{}
	if err := c.v.index.each(c.t.Context(), func(r resident) error {
		chunks, used = chunks+1, used+int64(r.at.size)
		live[r.at.segment] += r.at.length()
		return nil
	}); err != nil {
		c.t.Fatal(err)
	}
	if s := c.v.Stats(); s.Chunks != chunks || s.Used != used {
		c.t.Fatalf("%s: %d chunks of %d bytes, counted %d of %d", when, chunks, used, s.Chunks, s.Used)
	}
	if got := onDisk(c.t, c.dir); got != c.v.space.length {
		c.t.Fatalf("%s: %d bytes on disk, counted %d", when, got, c.v.space.length)
	}
	for n, s := range c.v.space.segments {
		if s.live != live[n] {
			c.t.Fatalf("%s: in segment %d live %d bytes, counted %d", when, n, live[n], s.live)
		}
	}
	for n, f := range c.v.index.full {
		if s := c.v.space.segments[n]; s != nil && !f.gone && s.drops != f.drops {
			c.t.Fatalf("%s: segment %d has %d bytes of drops, the index knows %d", when, n, s.drops, f.drops)
		}
	}
	for n, space := range c.v.space.segments {
		if n == c.v.space.newest {
			continue
		}
		s, err := c.v.openSegment(n)
		if err != nil {
			c.t.Fatal(err)
		}
		all, _, err := s.records()
		if err := errors.Join(err, s.close()); err != nil {
			c.t.Fatal(err)
		}
		var drops int64
		for _, r := range all {
			if r.kind == kindDrop {
				drops += r.length()
			}
		}
		if drops != space.drops {
			c.t.Fatalf("%s: segment %d has %d bytes of drops, counted %d", when, n, drops, space.drops)
		}
	}
}

// open opens the volume, perhaps while some of it cannot be read.
func (c *chaos) open(sound bool) {
	c.t.Helper()
	bad := int64(-1)
	if !sound && c.rng.IntN(3) == 0 {
		bad = c.rng.Int64N(16 << 10)
	}
	c.openWith(bad)
}

// openWith opens the volume while a place cannot be read, if that is not below 0.
func (c *chaos) openWith(bad int64) {
	c.t.Helper()
	c.fullAfter, c.failAfter, c.badSync = -1, -1, false
	c.bad.Store(bad)
	v, err := Open(c.dir, c.options())
	hurt := bad >= 0
	c.bad.Store(-1)
	if err != nil {
		if !hurt {
			c.t.Fatal(err)
		}
		if v, err = Open(c.dir, c.options()); err != nil {
			c.t.Fatal(err)
		}
	}
	c.v = v
	c.t.Cleanup(func() { v.Close() })
	still(c.t, v)
	v.awaitCheckpoint()
	if !hurt {
		return
	}
	c.receipts()
	if v.writable() == nil {
		return
	}
	mustClose(c.t, v)
	c.boot++
	if c.rng.IntN(2) == 0 { // it can be read again
		c.openWith(-1)
		return
	}
	c.condemn(bad)
	c.openWith(bad)
}

// condemn is for a page that counts as damaged now: what lies on it may be anything.
func (c *chaos) condemn(bad int64) {
	c.t.Helper()
	page := bad / badBytes * badBytes
	for _, path := range segmentPaths(c.t, c.dir) {
		raw := mustRead(c.t, path)
		for i := range c.ids {
			id := c.ids[i]
			for from := 0; ; {
				at := bytes.Index(raw[from:], id[:])
				if at < 0 {
					break
				}
				head := int64(from + at - 32)
				from += at + len(id)
				size := int64(len(c.datas[id]))
				if head < page+badBytes && page < head+recordHead+size {
					c.may[id], c.undropped[id] = rotted, true
				}
			}
		}
	}
}

// receipts asks for some that are given without anything being written. They count,
// whatever has gone wrong.
func (c *chaos) receipts() {
	c.t.Helper()
	v := c.v
	for _, id := range c.ids {
		if c.rng.IntN(3) == 0 && v.Put(c.t.Context(), id, c.datas[id]) == nil {
			c.may[id] = isHeld
		}
		if _, err := v.Confirm(c.t.Context(), id); err == nil {
			if c.may[id]&isHeld == 0 && !c.undropped[id] {
				c.t.Fatalf("a receipt for %s, of which is true: %d", id, c.may[id])
			}
			c.may[id] = isHeld
		}
	}
}

// end closes the volume or what a cut has left of it, and does something to its index.
func (c *chaos) end() {
	c.t.Helper()
	c.v.awaitCheckpoint()
	damaged := false
	c.fellBack = false
	c.mu.Lock()
	cut := c.cut
	c.cut, c.cutAt = "", -1
	c.mu.Unlock()
	switch {
	case cut == "" && c.rng.IntN(3) == 0: // a kill
		cut = killed(c.t, c.dir)
		c.mu.Lock()
		c.ghosts = map[string][]byte{}
		c.mu.Unlock()
	case cut == "" && c.rng.IntN(3) == 0:
		c.mu.Lock()
		cut = c.powerCut()
		c.mu.Unlock()
	}
	mustClose(c.t, c.v)
	if cut != "" {
		c.dir, damaged = cut, true // Badger may have been writing beside the copying
	}
	c.mu.Lock()
	c.synced, c.ghosts = map[string]int64{}, map[string][]byte{}
	for _, path := range segmentPaths(c.t, c.dir) {
		c.synced[filepath.Base(path)] = int64(len(mustRead(c.t, path)))
	}
	c.mu.Unlock()
	index := filepath.Join(c.dir, chunksDir, indexDir)
	switch c.rng.IntN(6) {
	case 0:
		damaged = true
		if err := os.RemoveAll(index); err != nil {
			c.t.Fatal(err)
		}
	case 1:
		damaged = true
		left, err := filepath.Glob(filepath.Join(index, "*"))
		if err != nil {
			c.t.Fatal(err)
		}
		c.rng.Shuffle(len(left), func(i, j int) { left[i], left[j] = left[j], left[i] })
		for _, path := range left[:c.rng.IntN(len(left)+1)] {
			if err := os.Remove(path); err != nil {
				c.t.Fatal(err)
			}
			c.fellBack = c.fellBack || strings.HasSuffix(path, ".mem")
		}
	}
	if err := os.Remove(filepath.Join(c.dir, syncFailedFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.t.Fatal(err)
	}
	c.boot++
	c.mu.Lock()
	c.out.Reset()
	c.mu.Unlock()
	c.open(false)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !damaged && strings.Contains(c.out.String(), "made anew") {
		c.t.Fatalf("a whole index is made anew: %s", c.out.String())
	}
}

// rot changes a byte of a chunk, and has that be noticed.
func (c *chaos) rot() {
	id := c.ids[c.rng.IntN(len(c.ids))]
	if c.may[id] != isHeld || c.v.writable() != nil {
		return
	}
	at := whereIs(c.t, c.v, id)
	path := segmentPath(c.v, at.segment)
	raw := mustRead(c.t, path)
	where := int64(at.at) + recordHead + c.rng.Int64N(int64(at.size))
	overwrite(c.t, path, where, raw[where]^0x10)
	c.may[id], c.rotten = rotted, id
	_, err := c.v.Get(c.t.Context(), id)
	mustFail(c.t, err, wire.CodeLost)
}

// wasCut tells whether there is a copy now, and lets no other be taken.
func (c *chaos) wasCut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cutAt = -1
	return c.cut != ""
}

func (c *chaos) live() {
	for range 1 + c.rng.IntN(12) {
		switch c.rng.IntN(12) {
		case 0:
			c.rot()
		case 1:
			c.mu.Lock()
			c.cutAt = c.rng.IntN(8) - 4
			c.mu.Unlock()
			if c.v.hand(c.t.Context(), &request{flush: true}) == nil {
				c.v.awaitCheckpoint()
			}
			if c.wasCut() {
				return
			}
		case 2:
			for c.v.reclaim(c.t.Context()) {
			}
		case 3, 4, 5:
			c.fullAfter = c.rng.IntN(4)
		case 6:
			if c.rng.IntN(4) == 0 {
				c.failAfter = c.rng.IntN(4)
			}
		case 7:
			c.badSync = c.rng.IntN(8) == 0
		case 8:
			c.mu.Lock()
			c.cutAt = c.rng.IntN(8)
			c.mu.Unlock()
		}
		onlyFull := c.failAfter < 0 && !c.badSync
		c.batch()
		c.fullAfter, c.failAfter, c.badSync = -1, -1, false
		if c.wasCut() {
			return
		}
		if err := c.v.writable(); err != nil {
			if onlyFull {
				c.t.Fatal(err)
			}
			c.receipts()
			return
		}
		c.look("after a batch")
	}
}

func TestWhateverGoesWrongThePromisesHold(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 10
	}
	first := testenv.Seed(t)
	for round := range rounds {
		seed := first + uint64(round)
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			c := &chaos{t: t, rng: rand.New(rand.NewPCG(seed, 1)), dir: t.TempDir(), datas: map[chunk.ID][]byte{}, may: map[chunk.ID]state{},
				synced: map[string]int64{}, ghosts: map[string][]byte{}, undropped: map[chunk.ID]bool{}, cutAt: -1}
			c.bad.Store(-1)
			for range 14 {
				id, data := someChunk(c.rng, []int{1 + c.rng.IntN(200), 1 + c.rng.IntN(5000)}[c.rng.IntN(2)])
				c.ids, c.datas[id], c.may[id] = append(c.ids, id), data, isGone
			}
			c.open(true)
			for range 12 {
				c.live()
				c.end()
				c.look("opened again")
			}
			mustClose(t, c.v)
			if err := os.RemoveAll(filepath.Join(c.dir, chunksDir, indexDir)); err != nil {
				t.Fatal(err)
			}
			c.open(true)
			c.look("with an index made anew")
			mustClose(t, c.v)
		})
	}
}
