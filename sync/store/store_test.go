package store

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

const (
	childEnv = "DEIMOS_TEST_STORE_CHILD"
	churnEnv = "DEIMOS_TEST_STORE_CHURN"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if os.Getenv(churnEnv) != "" {
			childThatChurns(dir)
		}
		childThatPuts(dir)
		return
	}
	os.Exit(m.Run())
}

// random returns a source whose seed is printed if the test fails, and can be given.
func random(t testing.TB) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(testenv.Seed(t), 0))
}

// shortest is the least size, in bytes, of chunks whose size is random: of one byte there would be
// two alike now and then, and their bytes would be found in others.
const shortest = 16

func someChunk(rng *rand.Rand, size int) (chunk.ID, []byte) {
	data := make([]byte, size)
	for i := 0; i < size; i += 8 {
		var word [8]byte
		for j, x := 0, rng.Uint64(); j < 8; j, x = j+1, x>>8 {
			word[j] = byte(x)
		}
		copy(data[i:], word[:])
	}
	return chunk.Sum(data), data
}

// noFloor leaves the test independent of how full this machine's disk is, and of how long it
// takes: no checkpoint begins because nothing was written for a while, and no disk counts as
// hanging because the machine is busy.
var noFloor = Options{FloorBytes: -1, hooks: hooks{checkpoint: time.Hour, patience: (*hasty)(nil).patience}}

// hasty is the patience that a test has with a disk: much, but while that is to hang.
type hasty struct {
	least time.Duration
	hangs atomic.Bool
}

func (h *hasty) patience() time.Duration {
	if h != nil && h.hangs.Load() {
		return h.least
	}
	return time.Minute
}

func open1(t testing.TB, dir string, opt Options) *Volume {
	t.Helper()
	v, err := Open(dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v
}

func mustPut(t testing.TB, v *Volume, id chunk.ID, data []byte) {
	t.Helper()
	if err := v.Put(t.Context(), id, data); err != nil {
		t.Fatal(err)
	}
}

func mustHold(t testing.TB, v *Volume, id chunk.ID, data []byte) {
	t.Helper()
	got, err := v.Get(t.Context(), id)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("chunk %s: %d bytes, %v", id, len(got), err)
	}
}

func mustFail(t testing.TB, err error, code string) {
	t.Helper()
	if err == nil || wire.ProblemOf(err).Code != code {
		t.Fatalf("got %v, want a problem with the code %s", err, code)
	}
}

func mustClose(t testing.TB, v *Volume) {
	t.Helper()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
}

// flip changes one byte of a chunk where it lies on disk, wherever that is.
func flip(t testing.TB, dir string, data []byte, at int) {
	t.Helper()
	found := false
	for _, path := range segmentPaths(t, dir) {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if i := bytes.Index(raw, data); i >= 0 {
			overwrite(t, path, int64(i+at), raw[i+at]^0x10)
			found = true
		}
	}
	if !found {
		t.Fatal("the chunk is in no segment")
	}
}

// segmentPaths are the files of a volume's segments, oldest first.
func segmentPaths(t testing.TB, dir string) []string {
	t.Helper()
	numbers, err := segmentsIn(filepath.Join(dir, chunksDir))
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, n := range numbers {
		paths = append(paths, filepath.Join(dir, chunksDir, segmentName(n)))
	}
	return paths
}

// killed is a copy of a volume that is open, as a kill would leave it now.
func killed(t testing.TB, dir string) string {
	t.Helper()
	to := t.TempDir()
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, os.ErrNotExist) && path != dir { // deleted just now
				return nil
			}
			return err
		}
		rel, err := filepath.Rel(dir, path)
		switch {
		case err != nil:
			return err
		case e.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case rel == ballastFile:
			return nil
		}
		raw, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		whole := filepath.Join(to, rel) // with holes where there are some
		return errors.Join(err, os.WriteFile(whole, bytes.TrimRight(raw, "\x00"), 0o600), os.Truncate(whole, int64(len(raw))))
	})
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func overwrite(t testing.TB, path string, at int64, b byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{b}, at); err != nil {
		t.Fatal(err)
	}
}

func TestPutSurvivesReopening(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	held := map[chunk.ID][]byte{}
	for _, size := range []int{1, 1023, 1024, 4096, 4097, 1 << 20, chunk.MaxSize} {
		id, data := someChunk(rng, size)
		held[id] = data
		for range 2 { // the second changes nothing
			mustPut(t, v, id, data)
		}
	}
	before := v.Stats()
	mustClose(t, v)
	v = open1(t, dir, Options{FloorBytes: -1, ID: v.ID()})
	after := v.Stats()
	if after.Used != before.Used || after.Chunks != len(held) || after.Lost != 0 {
		t.Fatalf("before %+v, after %+v", before, after)
	}
	for id, data := range held {
		mustHold(t, v, id, data)
		if size, err := v.Confirm(t.Context(), id); err != nil || size != int64(len(data)) {
			t.Fatalf("confirm: %d, %v", size, err)
		}
		if !v.Has(id) {
			t.Fatal("a held chunk is denied")
		}
	}
}

func TestPutRefusesWhatIsNotTheChunk(t *testing.T) {
	v := open1(t, t.TempDir(), noFloor)
	id, data := someChunk(random(t), 5000)
	mustFail(t, v.Put(t.Context(), id, data[:4999]), wire.CodeMismatch)
	mustFail(t, v.Put(t.Context(), chunk.Sum(nil), nil), wire.CodeMismatch)
	big := make([]byte, chunk.MaxSize+1)
	mustFail(t, v.Put(t.Context(), chunk.Sum(big), big), wire.CodeMismatch)
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeNotFound)
	if s := v.Stats(); s.Chunks != 0 || s.Used != 0 {
		t.Fatalf("something was kept: %+v", s)
	}
}

func TestReceiptOnlyAfterSync(t *testing.T) {
	returned := make(chan struct{})
	var armed, early atomic.Bool
	opt := noFloor
	opt.hooks.fdatasync = func(f *os.File) error {
		if armed.Load() {
			select {
			case <-returned:
				early.Store(true)
			case <-time.After(100 * time.Millisecond): // a wrong Put has long returned
			}
		}
		return fdatasync(f)
	}
	v := open1(t, t.TempDir(), opt)
	armed.Store(true)
	id, data := someChunk(random(t), 100_000)
	mustPut(t, v, id, data)
	close(returned)
	mustClose(t, v) // waits for a sync that is still under way
	if early.Load() {
		t.Fatal("Put returned before the sync did")
	}
}

// What is being synced is not there yet, for nobody.
func TestAChunkIsThereOnceItIsSynced(t *testing.T) {
	syncing, release := make(chan struct{}), make(chan struct{})
	var armed atomic.Bool
	opt := noFloor
	opt.hooks.fdatasync = func(f *os.File) error {
		if armed.CompareAndSwap(true, false) {
			close(syncing)
			<-release
			return errors.New("injected")
		}
		return fdatasync(f)
	}
	v := open1(t, t.TempDir(), opt)
	armed.Store(true)
	id, data := someChunk(random(t), 100_000)
	put := make(chan error, 1)
	go func() { put <- v.Put(t.Context(), id, data) }()
	<-syncing
	if v.Has(id) {
		t.Error("it is there already")
	}
	confirmed := make(chan error, 1)
	go func() { _, err := v.Confirm(t.Context(), id); confirmed <- err }()
	close(release)
	mustFail(t, <-put, wire.CodeReadOnly)
	mustFail(t, <-confirmed, wire.CodeNotFound)
}

func TestFailedSyncGivesNoReceiptAndLatches(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	var fail atomic.Bool
	boot := "one"
	opt := noFloor
	opt.hooks.fdatasync = func(f *os.File) error {
		if fail.Load() {
			return unix.EIO
		}
		return fdatasync(f)
	}
	opt.hooks.bootID = func() (string, error) { return boot, nil }
	v := open1(t, dir, opt)
	good, goodData := someChunk(rng, 50_000)
	bad, badData := someChunk(rng, 50_000)
	next, nextData := someChunk(rng, 50_000)
	mustPut(t, v, good, goodData)

	fail.Store(true)
	mustFail(t, v.Put(t.Context(), bad, badData), wire.CodeReadOnly)
	fail.Store(false) // the kernel says success the next time
	mustFail(t, v.Put(t.Context(), bad, badData), wire.CodeReadOnly)
	mustFail(t, v.Put(t.Context(), next, nextData), wire.CodeReadOnly)
	mustFail(t, v.Drop(t.Context(), []chunk.ID{good}), wire.CodeReadOnly)
	_, err := v.Confirm(t.Context(), bad)
	mustFail(t, err, wire.CodeNotFound)
	if v.Stats().ReadOnly == "" {
		t.Fatal("the figures do not say why puts are refused")
	}
	mustHold(t, v, good, goodData)
	if err := v.Put(t.Context(), good, goodData); err != nil {
		t.Fatalf("what was durable before is doubted: %v", err)
	}

	// The page cache outlives the process, and so does the doubt.
	mustClose(t, v)
	v = open1(t, dir, opt)
	mustFail(t, v.Put(t.Context(), bad, badData), wire.CodeReadOnly)
	mustFail(t, v.Put(t.Context(), good, goodData), wire.CodeReadOnly)
	mustHold(t, v, good, goodData)
	mustClose(t, v)

	boot = "two"
	v = open1(t, dir, opt)
	mustPut(t, v, bad, badData)
	mustPut(t, v, next, nextData)
}

func TestCountersStayExactWithoutAWalk(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	v := open1(t, dir, noFloor)
	held := map[chunk.ID][]byte{}
	pool := map[chunk.ID][]byte{}
	for range 12 {
		id, data := someChunk(rng, shortest+rng.IntN(20_000))
		pool[id] = data
	}
	for round := range 120 {
		for id, data := range pool { // a random one
			if rng.IntN(3) == 0 {
				other, _ := someChunk(rng, 9) // never held
				if err := v.Drop(t.Context(), []chunk.ID{id, other, id}); err != nil {
					t.Fatal(err)
				}
				delete(held, id)
			} else {
				mustPut(t, v, id, data)
				held[id] = data
			}
			break
		}
		if round%40 == 39 {
			mustClose(t, v)
			v = open1(t, dir, noFloor)
		}
		var used int64
		for _, data := range held {
			used += int64(len(data))
		}
		if s := v.Stats(); s.Chunks != len(held) || s.Used != used || s.Dead < 0 {
			t.Fatalf("round %d: %+v, want %d chunks of %d bytes", round, s, len(held), used)
		}
	}
	listed := 0
	err := v.List(t.Context(), func(id chunk.ID, size int64, lost bool) error {
		listed++
		if data, ok := held[id]; !ok || size != int64(len(data)) || lost {
			return fmt.Errorf("%s is listed with %d bytes, lost %v", id, size, lost)
		}
		return nil
	})
	if err != nil || listed != len(held) {
		t.Fatalf("%d listed, %d held: %v", listed, len(held), err)
	}
	for id := range pool {
		if _, ok := held[id]; !ok {
			_, err := v.Get(t.Context(), id)
			mustFail(t, err, wire.CodeNotFound)
		}
	}
}

func TestPutsAndDropsFromManySides(t *testing.T) {
	rng := random(t)
	v := open1(t, t.TempDir(), noFloor)
	type piece struct {
		id   chunk.ID
		data []byte
	}
	pieces := make([]piece, 24)
	for i := range pieces {
		pieces[i].id, pieces[i].data = someChunk(rng, shortest+rng.IntN(50_000))
	}
	var all sync.WaitGroup
	for w := range 6 {
		all.Go(func() {
			for i := range pieces {
				p := pieces[(i+w*4)%len(pieces)]
				if err := v.Put(t.Context(), p.id, p.data); err != nil {
					t.Error(err)
				}
				if w == 0 && i%3 == 0 {
					if err := v.Drop(t.Context(), []chunk.ID{p.id}); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	all.Wait()
	checked, err := v.Check(t.Context())
	if err != nil || len(checked.Lost) != 0 {
		t.Fatalf("%+v, %v", checked, err)
	}
	if s := v.Stats(); s.Chunks != checked.Chunks || s.Used != checked.Bytes {
		t.Fatalf("counted %+v, read %+v", s, checked)
	}
}

func TestFloorAndCapacityAreRespected(t *testing.T) {
	rng := random(t)
	var freeBlocks atomic.Uint64
	freeBlocks.Store(1 << 20)
	opt := Options{FloorBytes: 100 << 20, Capacity: 300_000}
	opt.hooks.statfs = func(_ string, st *unix.Statfs_t) error {
		*st = unix.Statfs_t{Bsize: 4096, Blocks: 1 << 21, Bavail: freeBlocks.Load(), Bfree: freeBlocks.Load()}
		return nil
	}
	v := open1(t, t.TempDir(), opt)
	first, firstData := someChunk(rng, 100_000)
	second, secondData := someChunk(rng, 100_000)
	mustPut(t, v, first, firstData)

	freeBlocks.Store((100<<20 + 50_000) / 4096)
	mustFail(t, v.Put(t.Context(), second, secondData), wire.CodeNoSpace)
	mustFail(t, v.CanTake(100_000), wire.CodeNoSpace)
	if err := v.Put(t.Context(), first, firstData); err != nil {
		t.Fatalf("what is held takes no space: %v", err)
	}
	freeBlocks.Store(1 << 20)
	mustPut(t, v, second, secondData)
	s := v.Stats()
	if s.Capacity != 300_000 || s.Used != 200_000 || s.Used+s.Dead+s.Reserved+s.Free != s.Capacity {
		t.Fatalf("%+v", s)
	}
	third, thirdData := someChunk(rng, int(s.Free)+4)
	mustFail(t, v.Put(t.Context(), third, thirdData), wire.CodeNoSpace)
	// Dropping gives nothing back while the bytes still lie there, and the figures say so.
	if err := v.Drop(t.Context(), []chunk.ID{first}); err != nil {
		t.Fatal(err)
	}
	after := v.Stats()
	if after.Used != 100_000 || after.Dead != 100_000+2*recordHead || after.Free != s.Free-recordHead || after.Capacity != 300_000 {
		t.Fatalf("%+v", after)
	}
	if fits, data := someChunk(rng, int(after.Free)); v.Put(t.Context(), fits, data) != nil {
		t.Fatal("there is less room than the figures say")
	}
}

func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		testenv.Cannot(t, "no file system of our own here: %v", err)
	}
	t.Cleanup(func() {
		err := unix.Unmount(dir, 0)
		for end := time.Now().Add(time.Minute); err == unix.EBUSY && time.Now().Before(end); err = unix.Unmount(dir, 0) {
			time.Sleep(10 * time.Millisecond) // another package's test looks at all that is mounted
		}
		if err != nil {
			t.Error(err)
		}
	})
	rng, store := random(t), filepath.Join(dir, "store")
	const floor = 4 << 20
	opt := Options{FloorBytes: floor}
	v := open1(t, store, opt)
	held := map[chunk.ID][]byte{}
	var small []chunk.ID
	for range 60 {
		id, data := someChunk(rng, 100)
		mustPut(t, v, id, data)
		held[id], small = data, append(small, id)
	}
	for {
		id, data := someChunk(rng, chunk.DefaultSize)
		err := v.Put(t.Context(), id, data)
		if err != nil {
			mustFail(t, err, wire.CodeNoSpace)
			break
		}
		held[id] = data
	}
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	left := free(&st)
	if err != nil || left < floor-(64<<10) || len(held) < 80 {
		t.Fatalf("%d chunks, %d bytes left above a floor of %d: %v", len(held), left, floor, err)
	}
	somebodyFillsIt := func() (undo func()) {
		f, err := os.Create(filepath.Join(dir, "fill"))
		for _, size := range []int{1 << 20, 4096} {
			for block := make([]byte, size); err == nil; {
				_, err = f.Write(block)
			}
			err = nil
		}
		f.Close()
		return func() {
			if err := os.Remove(filepath.Join(dir, "fill")); err != nil {
				t.Fatal(err)
			}
		}
	}
	holdsAll := func() {
		t.Helper()
		for id, data := range held {
			mustHold(t, v, id, data)
		}
		if s := v.Stats(); s.Lost != 0 || s.Chunks != len(held) {
			t.Fatalf("%+v", s)
		}
	}
	undo := somebodyFillsIt()
	mustClose(t, v) // with what the ballast gives
	v = open1(t, store, opt)
	holdsAll()
	mustClose(t, v)
	undo()
	v = open1(t, store, opt) // sets the ballast aside again
	undo = somebodyFillsIt()
	for _, id := range small { // enough of them to need new pages
		if err := v.Drop(t.Context(), []chunk.ID{id}); err != nil {
			t.Fatalf("dropping on a full disk: %v", err)
		}
		delete(held, id)
	}
	holdsAll()
	mustClose(t, v)
	refill, err := os.OpenFile(filepath.Join(dir, "fill"), os.O_APPEND|os.O_WRONLY, 0)
	for block := make([]byte, 4096); err == nil; { // now there is no ballast
		_, err = refill.Write(block)
	}
	refill.Close()
	if _, err := Open(store, opt); err == nil || !strings.Contains(err.Error(), "full") {
		t.Fatalf("opened on a disk that is full to the brim: %v", err)
	}
	undo()
	v = open1(t, store, opt)
	holdsAll()
	mustClose(t, v)
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	v := open1(t, dir, noFloor)
	if _, err := Open(dir, noFloor); err == nil || !strings.Contains(err.Error(), "another process uses this store") {
		t.Fatalf("got %v", err)
	}
	out, err := child(t, dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another process uses this store") {
		t.Fatalf("another process: %v, %s", err, out)
	}
	mustClose(t, v)
	mustClose(t, open1(t, dir, noFloor))
}

func TestAnotherVolumeIsRefused(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	va := open1(t, a, noFloor)
	mustClose(t, va)
	vb := open1(t, b, noFloor)
	mustClose(t, vb)
	refused := func(dir, id, sentence string) {
		t.Helper()
		if _, err := Open(dir, Options{FloorBytes: -1, ID: id}); err == nil || !strings.Contains(err.Error(), sentence) {
			t.Fatalf("got %v, want %q", err, sentence)
		}
	}
	refused(b, va.ID(), "this is another volume")
	refused(t.TempDir(), va.ID(), "is its disk mounted?")
	if err := os.WriteFile(filepath.Join(b, idFile), []byte(va.ID()), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(b, "", "this is another volume")
	if err := os.WriteFile(filepath.Join(b, idFile), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(b, "", "damaged")
	if err := os.Remove(filepath.Join(b, idFile)); err != nil { // its making was cut short
		t.Fatal(err)
	}
	if again := open1(t, b, noFloor); again.ID() != vb.ID() {
		t.Fatalf("the volume became %s, was %s", again.ID(), vb.ID())
	}
	foreign := t.TempDir()
	if err := os.WriteFile(filepath.Join(foreign, "holiday.jpg"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(foreign, "", "other data")
}

func TestClosedVolumeSaysSo(t *testing.T) {
	v := open1(t, t.TempDir(), noFloor)
	id, data := someChunk(random(t), 10)
	mustPut(t, v, id, data)
	mustClose(t, v)
	mustClose(t, v)
	_, err := v.Get(t.Context(), id)
	mustFail(t, err, wire.CodeInterrupted)
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeInterrupted)
	if v.Has(id) {
		t.Fatal("a closed volume claims a chunk")
	}
}

func TestContextBoundsWaiting(t *testing.T) {
	syncing, release := make(chan struct{}), make(chan struct{})
	var armed atomic.Bool
	opt := noFloor
	opt.hooks.fdatasync = func(f *os.File) error {
		if armed.CompareAndSwap(true, false) {
			close(syncing)
			<-release // the disk hangs
		}
		return fdatasync(f)
	}
	v := open1(t, t.TempDir(), opt)
	armed.Store(true)
	id, data := someChunk(random(t), 10)
	ctx, cancel := context.WithCancel(t.Context())
	put := make(chan error, 1)
	go func() { put <- v.Put(ctx, id, data) }()
	<-syncing
	cancel()
	if err := <-put; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	close(release)
}

func child(t testing.TB, dir string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	return cmd
}

// childThatPuts puts random chunks from four sides and prints the seed and size
// of each once Put has returned.
func childThatPuts(dir string) {
	v, err := Open(dir, noFloor)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	var mu sync.Mutex
	for w := range uint64(4) {
		go func() {
			for i := uint64(0); ; i++ {
				rng := rand.New(rand.NewPCG(w, i))
				size := shortest + rng.IntN(200_000)
				id, data := someChunk(rng, size)
				if err := v.Put(context.Background(), id, data); err != nil {
					fmt.Println(err)
					os.Exit(1)
				}
				mu.Lock()
				fmt.Println(id, size)
				mu.Unlock()
			}
		}()
	}
	select {}
}

func TestKilledInTheMiddleOfPuts(t *testing.T) {
	rng, dir := random(t), t.TempDir()
	receipts := map[string]int{}
	for range 3 {
		cmd := child(t, dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 20 + rng.IntN(60); n > 0 && lines.Scan(); n-- {
			readReceipt(t, lines.Text(), receipts)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // what it had still said
			readReceipt(t, lines.Text(), receipts)
		}
		cmd.Wait()
		v := open1(t, dir, noFloor)
		for text, size := range receipts {
			id, err := chunk.ParseID(text)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := v.Confirm(t.Context(), id); err != nil || got != int64(size) {
				t.Fatalf("a chunk with a receipt: %d of %d bytes, %v", got, size, err)
			}
		}
		if s := v.Stats(); s.Chunks < len(receipts) {
			t.Fatalf("%d receipts, %+v", len(receipts), s)
		}
		mustClose(t, v)
	}
	t.Logf("%d receipts kept", len(receipts))
}

func readReceipt(t *testing.T, line string, into map[string]int) {
	t.Helper()
	var id string
	var size int
	if n, _ := fmt.Sscanf(line, "%64s %d", &id, &size); n != 2 || len(id) != 64 {
		t.Fatalf("the child says %q", line)
	}
	into[id] = size
}
