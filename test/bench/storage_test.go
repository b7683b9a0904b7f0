package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
)

func TestRoundsAreComparedWithinThemselves(t *testing.T) {
	var said []string
	measure := func(who string, values ...float64) func() (float64, error) {
		return func() (v float64, err error) {
			said = append(said, who)
			v, values = values[0], values[1:]
			return v, nil
		}
	}
	got, err := interleave(3, measure("ours", 9, 1, 2, 30), measure("base", 9, 2, 4, 10))
	if err != nil {
		t.Fatal(err)
	}
	if want := []pair{{1, 2}, {2, 4}, {30, 10}}; !slices.Equal(got, want) {
		t.Errorf("rounds %v, want %v", got, want)
	}
	if want := []string{"ours", "base", "base", "ours", "ours", "base", "base", "ours"}; !slices.Equal(said, want) {
		t.Errorf("the turns were %v", said)
	}
	if got := median([]float64{3, 1, 2}); got != 2 {
		t.Errorf("the median of 1, 2 and 3 is %v", got)
	}
	if got := median([]float64{4, 1, 2, 3}); got != 2.5 {
		t.Errorf("the median of 1 to 4 is %v", got)
	}
}

// A row of cold reads is one of the disk or none.
func TestColdIsWhatIsNotInMemory(t *testing.T) {
	s := testShelf(t)
	var fs unix.Statfs_t
	if err := unix.Statfs(s.dir, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		t.Skip(s.dir + " is in memory: name a folder on a disk with TMPDIR")
	}
	if err := s.getAll(t.Context(), []int{0, 1, 2, 3, 4, 5, 6, 7}); err != nil { // so that it is mapped
		t.Fatal(err)
	}
	before := cachedBelow(t, s.dir)
	if before < int64(s.bytes()) {
		t.Fatalf("only %d bytes of what was just written are in memory", before)
	}
	if err := cool(s.dir); err != nil {
		t.Fatal(err)
	}
	if after := cachedBelow(t, s.dir); after > before/20 {
		t.Errorf("%d bytes of %d are still in memory", after, before)
	}
	if err := s.getAll(t.Context(), []int{0, len(s.ids) - 1}); err != nil {
		t.Error(err)
	}
}

func TestWhatStaysInMemoryIsSaid(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "deimos-bench-")
	if err != nil {
		t.Skip(err)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cool(dir); !isWarm(err) {
		t.Errorf("a file in memory was taken out of it: %v", err)
	}
}

func cachedBelow(t *testing.T, dir string) (bytes int64) {
	t.Helper()
	var files []string
	for _, below := range []string{"*.seg", "index/*"} {
		found, err := filepath.Glob(filepath.Join(dir, "volume", "chunks", below))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	for _, path := range append(files, filepath.Join(dir, "plain")) {
		if err := onFile(path, func(fd int, size int64) error {
			n, err := resident(fd, size)
			bytes += n
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return bytes
}

func testShelf(t *testing.T) *shelf {
	t.Helper()
	s, err := newShelf(t.Context(), filepath.Join(t.TempDir(), "shelf"), chunk.MaxSize, 8)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.close(nil); err != nil {
			t.Error(err)
		}
	})
	return s
}

// What is measured is done: the scrub reads everything, the audit is answered, and
// a lost chunk fails both.
func TestReadsThatAreMeasuredAreWhole(t *testing.T) {
	s := testShelf(t)
	if err := s.scrub(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.scrub(t.Context()); err != nil {
		t.Errorf("a second round: %v", err)
	}
	if err := s.audit(t.Context(), []int{0, 1, 2}); err != nil {
		t.Error(err)
	}
	if err := s.v.Drop(t.Context(), s.ids[1:2]); err != nil {
		t.Fatal(err)
	}
	if err := s.scrub(t.Context()); err == nil {
		t.Error("a scrub that has not read everything counts")
	}
	if err := s.audit(t.Context(), []int{0, 1, 2}); err == nil {
		t.Error("an audit without a leaf counts")
	}
	if err := s.getAll(t.Context(), []int{1}); err == nil {
		t.Error("a get of nothing counts")
	}
}

func TestThePlainLogHoldsWhatItHasAnswered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "plain")
	l, err := newPlainLog(path)
	if err != nil {
		t.Fatal(err)
	}
	b := newBatch(64<<10, 7, 100)
	var mu sync.Mutex
	put := map[chunk.ID]bool{}
	err = b.each(16, func(i int, data []byte) error {
		if err := l.put(data); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		put[chunk.Sum(data)] = true
		return nil
	})
	if err = closed(l, err); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	held := map[chunk.ID]bool{}
	for piece := range slices.Chunk(raw, 64<<10) {
		held[chunk.Sum(piece)] = true
	}
	if len(put) != 100 || len(held) != 100 {
		t.Fatalf("%d put, %d in the file, of 100", len(put), len(held))
	}
	for id := range put {
		if !held[id] {
			t.Errorf("%s was answered and is not in the file", id)
		}
	}
}

// The index that is simulated is one that a volume opens, counts and lists, and what
// is whole beside it reads.
func TestASimulatedIndexIsThatOfAVolume(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "volume")
	const n, whole = 3000, 20
	if err := simulateIndex(t.Context(), dir, n, whole); err != nil {
		t.Fatal(err)
	}
	v, err := store.Open(dir, store.Options{SegmentBytes: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	s := v.Stats()
	if want := int64(n+whole) * chunk.DefaultSize; s.Chunks != n+whole || s.Used != want {
		t.Errorf("%d chunks with %d bytes, want %d with %d", s.Chunks, s.Used, n+whole, want)
	}
	listed, behind := 0, 0
	err = v.List(t.Context(), func(id chunk.ID, size int64, _ bool) error {
		if listed++; id[0] == 0xff {
			behind++
		}
		if size != chunk.DefaultSize {
			return errors.New("a chunk of another size")
		}
		return nil
	})
	if err != nil || listed != n+whole || behind < n {
		t.Errorf("%d are listed, %d at the end: %v", listed, behind, err)
	}
	for _, id := range newBatch(chunk.DefaultSize, 0, whole).ids {
		if _, err := v.Get(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

// The baseline of objects brings the file back, and writes half as much again.
func TestWhatOpensslEncryptedComesBack(t *testing.T) {
	dir := t.TempDir()
	o := &objects{file: filepath.Join(dir, "file")}
	content := bytes.Repeat([]byte("0123456789abcdef"), (3*plainBlock+1000)/16)
	if err := os.WriteFile(o.file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := o.encrypt(context.Background(), dir); err != nil {
		t.Skip(err)
	}
	out := filepath.Join(dir, "out")
	if err := o.decrypt(t.Context(), dir, out); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes came back of %d: %v", len(got), len(content), err)
	}
	var parity int64
	for _, name := range []string{"4", "5"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		parity += info.Size()
	}
	if parity < int64(len(content))/2 {
		t.Errorf("%d bytes stand for parity of %d", parity, len(content))
	}
}
