package store

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// badSector cannot be read at a place, in any segment, until it is told otherwise or written over:
// a disk puts another sector there then.
func badSector(opt Options, bad *atomic.Int64) Options { return badIn(opt, "", bad) }

// badIn is badSector of one segment.
func badIn(opt Options, segment string, bad *atomic.Int64) Options {
	isIn := func(fd int) bool {
		name, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
		return err == nil && strings.HasSuffix(name, segment)
	}
	opt.hooks.pread = func(fd int, into []byte, at int64) (int, error) {
		if b := bad.Load(); b >= 0 && isIn(fd) && at < b-b%badBytes+badBytes && b-b%badBytes < at+int64(len(into)) { // a page, as the kernel reads
			return -1, unix.EIO
		}
		return unix.Pread(fd, into, at)
	}
	opt.hooks.pwritev = func(fd int, from [][]byte, at int64) (int, error) {
		n, err := unix.Pwritev(fd, from, at)
		if b := bad.Load(); b >= at && b < at+int64(n) && isIn(fd) {
			bad.Store(-1)
		}
		return n, err
	}
	return opt
}

// Chunks of these sizes, the first of a segment and others, have the next head begin on a page.
const (
	firstToPage = nextToPage - segmentHead
	nextToPage  = 13*badBytes - recordHead
)

func bootedAs(opt Options, boot string) Options {
	opt.hooks.bootID = func() (string, error) { return boot, nil }
	return opt
}

// What cannot be read when a volume is opened may be a cable that is mended tomorrow: nothing
// is written, and nothing has a receipt, until all can be read.
func TestASectorThatCannotBeReadForAMoment(t *testing.T) {
	for name, into := range map[string]int64{"head": 10, "payload": recordHead + 20_000} {
		for _, without := range []bool{false, true} {
			t.Run(name+map[bool]string{true: " without index"}[without], func(t *testing.T) {
				rng, dir := random(t), t.TempDir()
				v := open1(t, dir, smallSegments())
				first, firstData := someChunk(rng, firstToPage)
				mustPut(t, v, first, firstData)
				dropped, droppedData := someChunk(rng, nextToPage)
				mustPut(t, v, dropped, droppedData)
				id, data := someChunk(rng, nextToPage)
				mustPut(t, v, id, data)
				at := int64(whereIs(t, v, id).at)
				if into < recordHead { // the head of a drop: what it drops must not be told as held
					at = v.log.length
					if err := v.Drop(t.Context(), []chunk.ID{dropped}); err != nil {
						t.Fatal(err)
					}
				}
				cut := killed(t, dir)
				if without {
					if err := os.RemoveAll(filepath.Join(cut, chunksDir, indexDir)); err != nil {
						t.Fatal(err)
					}
				}
				raw := mustRead(t, segmentPaths(t, cut)[0])
				var bad atomic.Int64
				bad.Store(at + into)
				opt := bootedAs(badSector(smallSegments(), &bad), "one")
				for range 2 { // the same boot
					v = open1(t, cut, opt)
					mustHold(t, v, first, firstData)
					_, err := v.Confirm(t.Context(), first)
					mustFail(t, err, wire.CodeReadOnly)
					mustFail(t, v.Put(t.Context(), first, firstData), wire.CodeReadOnly)
					if into == 10 {
						mustFail(t, v.Put(t.Context(), dropped, droppedData), wire.CodeReadOnly)
					}
					mustClose(t, v)
					if !bytes.Equal(raw, mustRead(t, segmentPaths(t, cut)[0])) {
						t.Fatal("the segment was changed")
					}
				}
				bad.Store(-1)
				for _, boot := range []string{"one", "two"} {
					v = open1(t, cut, bootedAs(opt, boot))
					mustHold(t, v, first, firstData)
					mustHold(t, v, id, data)
					if _, err := v.Confirm(t.Context(), id); err != nil {
						t.Fatal(err)
					}
					if into == 10 {
						_, err := v.Get(t.Context(), dropped)
						mustFail(t, err, wire.CodeNotFound)
					}
					if s := v.Stats(); s.ReadOnly != "" || s.Lost != 0 {
						t.Fatalf("%+v", s)
					}
					mustClose(t, v)
				}
			})
		}
	}
}

// What cannot be read after the machine has booted again is damaged: the volume lives on, and
// only the page that cannot be read is written over.
func TestASectorThatCannotBeReadAgainCostsWhatLiesThere(t *testing.T) {
	for name, into := range map[string]int64{"head": 10, "payload": recordHead + 20_000} {
		t.Run(name, func(t *testing.T) {
			rng, dir := random(t), t.TempDir()
			v := open1(t, dir, smallSegments())
			first, firstData := someChunk(rng, firstToPage)
			mustPut(t, v, first, firstData)
			id, data := someChunk(rng, nextToPage)
			mustPut(t, v, id, data)
			at := int64(whereIs(t, v, id).at)
			last, lastData := someChunk(rng, nextToPage)
			mustPut(t, v, last, lastData)
			cut := killed(t, dir)
			raw := mustRead(t, segmentPaths(t, cut)[0])
			var bad atomic.Int64
			bad.Store(at + into)
			mustClose(t, open1(t, cut, bootedAs(badSector(smallSegments(), &bad), "one")))
			v = open1(t, cut, bootedAs(badSector(smallSegments(), &bad), "two"))
			if s := v.Stats(); s.ReadOnly != "" {
				t.Fatalf("%+v", s)
			}
			mustHold(t, v, first, firstData)
			mustHold(t, v, last, lastData)
			_, err := v.Get(t.Context(), id)
			mustFail(t, err, map[string]string{"head": wire.CodeNotFound, "payload": wire.CodeLost}[name])
			mustPut(t, v, id, data)
			page := (at + into) / badBytes * badBytes
			for i, b := range mustRead(t, segmentPaths(t, cut)[0])[:len(raw)] {
				if want := raw[i]; int64(i) >= page && int64(i) < page+badBytes {
					if b != 0 {
						t.Fatalf("byte %d was not written over", i)
					}
				} else if b != want {
					t.Fatalf("byte %d of a segment was changed, the page that cannot be read is at %d", i, page)
				}
			}
			mustHold(t, v, id, data)
			mustClose(t, v)
			bad.Store(-1)
			v = open1(t, cut, bootedAs(smallSegments(), "three"))
			mustHold(t, v, id, data)
			if _, err := os.Stat(filepath.Join(cut, readFailedFile)); !os.IsNotExist(err) {
				t.Fatal("the note is still there:", err)
			}
		})
	}
}

// A head of an older record that is written over is there again, as the index knew it: the chunk is
// lost, and not unknown, when the index is made anew.
func TestATableOfContentsLacksNothing(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, firstToPage)
	mustPut(t, v, id, data)
	other, otherData := someChunk(rng, nextToPage)
	mustPut(t, v, other, otherData)
	var bad atomic.Int64
	bad.Store(int64(whereIs(t, v, id).at) + 10)
	mustClose(t, v)
	mustClose(t, open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "one")))
	v = open1(t, dir, bootedAs(badSector(smallSegments(), &bad), "two"))
	bad.Store(-1)
	still(t, v)
	for v.log.number < 3 {
		id, data := someChunk(rng, nextToPage)
		mustPut(t, v, id, data)
	}
	mustClose(t, v)
	if err := os.RemoveAll(filepath.Join(dir, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	v = open1(t, dir, smallSegments())
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeLost)
	mustHold(t, v, other, otherData)
}

// A new volume whose only segment cannot be read is not begun anew over it.
func TestAHeadOfASegmentThatCannotBeReadIsNotWrittenOver(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	cut := killed(t, dir)
	if err := errors.Join(os.RemoveAll(filepath.Join(cut, chunksDir, indexDir)), os.Remove(filepath.Join(cut, idFile))); err != nil {
		t.Fatal(err)
	}
	var bad atomic.Int64
	bad.Store(10)
	if v, err := Open(cut, badSector(smallSegments(), &bad)); err == nil {
		t.Error("it was opened")
		mustClose(t, v)
	}
	mustHold(t, open1(t, cut, smallSegments()), id, data)
}

// A cut while a segment is ended may leave a whole table of contents of what is not all there.
// It does not count: else a drop that never was would be done when the index is made anew.
func TestATableOfContentsThatNamesWhatIsNotThere(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, smallSegments())
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data)
	if err := v.hand(t.Context(), &request{flush: true}); err != nil {
		t.Fatal(err)
	}
	other, otherData := someChunk(rng, 5000)
	all := []entry{
		{record: record{kind: kindDrop, id: id, target: whereIs(t, v, id).spot}},
		{record{kind: kindChunk, id: other, place: place{size: 5000}}, otherData},
	}
	if err := v.log.add(all); err != nil {
		t.Fatal(err)
	}
	if err := v.log.end(); err != nil {
		t.Fatal(err)
	}
	cut := killed(t, dir)
	f, err := os.OpenFile(filepath.Join(cut, chunksDir, segmentName(1)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, recordHead), int64(all[0].at)); err != nil { // its sector was not written
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	v = open1(t, cut, smallSegments())
	mustPut(t, v, id, data) // a receipt
	next, nextData := someChunk(rng, 5000)
	mustPut(t, v, next, nextData)
	mustClose(t, v)
	if err := os.RemoveAll(filepath.Join(cut, chunksDir, indexDir)); err != nil {
		t.Fatal(err)
	}
	v = open1(t, cut, smallSegments())
	mustHold(t, v, id, data)
	mustHold(t, v, next, nextData)
}

// A damaged index is removed in no order: what is left of it after a kill is none, also if a
// checkpoint of several parts was cut before.
func TestAnIndexThatIsHalfRemovedIsNone(t *testing.T) {
	for name, goes := range map[string]func(name string) bool{
		"all but the logs": func(name string) bool { return !strings.HasSuffix(name, ".mem") },
		"the list":         func(name string) bool { return name == badger.ManifestFilename },
		"the logs":         func(name string) bool { return strings.HasSuffix(name, ".mem") },
	} {
		t.Run(name, func(t *testing.T) {
			rng, dir := random(t), t.TempDir()
			opt := noFloor
			v := open1(t, dir, opt)
			held := map[chunk.ID][]byte{}
			for range 20 {
				id, data := someChunk(rng, 3000)
				mustPut(t, v, id, data)
				held[id] = data
			}
			mustClose(t, v)
			cut, watch := "", false
			opt.hooks.syncIndex = func(db *badger.DB) error {
				err := db.Sync()
				if watch && cut == "" {
					cut = killed(t, dir) // behind the first part
				}
				return err
			}
			v = open1(t, dir, opt)
			watch = true
			for range 6 {
				var all []*request
				for range 1000 {
					id, data := someChunk(rng, 100)
					all = append(all, putOf(id, data))
				}
				if err := errors.Join(together(t, v, all...)...); err != nil {
					t.Fatal(err)
				}
			}
			if err := v.hand(t.Context(), &request{flush: true}); err != nil {
				t.Fatal(err)
			}
			if cut == "" {
				t.Fatal("there was no checkpoint")
			}
			whole := killed(t, cut)
			left, err := filepath.Glob(filepath.Join(cut, chunksDir, indexDir, "*"))
			if err != nil {
				t.Fatal(err)
			}
			for _, path := range left {
				if goes(filepath.Base(path)) {
					if err := os.Remove(path); err != nil {
						t.Fatal(err)
					}
				}
			}
			for dir, anew := range map[string]bool{cut: name != "the logs", whole: false} { // without logs it has nothing, and says so
				var out bytes.Buffer
				opt := noFloor
				opt.Log = slog.New(slog.NewTextHandler(&out, nil))
				v = open1(t, dir, opt)
				if got := strings.Contains(out.String(), "made anew"); got != anew {
					t.Errorf("made anew: %v, want %v; %s", got, anew, out.String())
				}
				for id, data := range held {
					mustHold(t, v, id, data)
				}
				mustClose(t, v)
			}
		})
	}
}

// Where a part cannot be read, marks before, behind and across the end of a page are found all
// the same, and that there was such a part is told.
func TestMarksAreFoundAroundWhatCannotBeRead(t *testing.T) {
	var bad atomic.Int64
	opt := badSector(noFloor, &bad)
	m := mark{1, 2, 3, 4, 5, 6, 7, 8}
	const size = 40 * badBytes
	for _, c := range []struct {
		from, bad, mark, want int64
		fault                 bool
	}{
		{1, 2*badBytes + 100, badBytes - 3, badBytes - 3, false},
		{badBytes - 7, 2 * badBytes, badBytes - 3, badBytes - 3, false},
		{badBytes - 7, badBytes, 5 * badBytes, 5 * badBytes, true},
		{badBytes - 7, 3 * badBytes, 4*badBytes - 3, size, true}, // its first bytes are gone, too
		{badBytes - 6, 30 * badBytes, 31 * badBytes, 31 * badBytes, true},
		{1, size - 1, size - badBytes - 9, size - badBytes - 9, false},
		{1, size - 1, size - 8, size, true},
		{1, 3, badBytes, badBytes, true},
	} {
		raw := make([]byte, size)
		copy(raw[c.mark:], m[:])
		path := filepath.Join(t.TempDir(), "segment")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		bad.Store(c.bad)
		s := scan{fd: int(f.Fd()), number: 1, size: size, mark: m, pread: opt.hooks.pread}
		at, err := s.search(c.from)
		if err != nil || at != c.want || (s.fault != nil) != c.fault {
			t.Errorf("from %d, %d cannot be read, a mark at %d: found at %d, fault %v, %v; want %d, %v", c.from, c.bad, c.mark, at, s.fault, err, c.want, c.fault)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
