package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/hw"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// fake is a disk in memory that can lie, break and fill up.
type fake struct {
	data    []byte
	wraps   int64 // if set, what is written beyond is written from the beginning again
	drops   int64 // if set, what is written from here on is lost, and reads as zeros
	flips   int64 // if set, the bit at this place reads wrong
	failing func(op string, at int64) error
	syncs   int
	cached  bool // its pages cannot be dropped
}

func newFake() *fake { return &fake{data: make([]byte, testBytes)} }

func (f *fake) fault(op string, at int64) error {
	if f.failing == nil {
		return nil
	}
	return f.failing(op, at)
}

func (f *fake) Write(p []byte, at int64) error {
	if err := f.fault("write", at); err != nil || f.drops > 0 && at >= f.drops {
		return err
	}
	if f.wraps > 0 {
		at %= f.wraps
	}
	copy(f.data[at:], p)
	return nil
}

func (f *fake) Sync() error { f.syncs++; return f.fault("sync", 0) }

func (f *fake) Forget() bool { return !f.cached }

func (f *fake) Read(p []byte, at int64) error {
	if err := f.fault("read", at); err != nil {
		return err
	}
	from := at
	if f.wraps > 0 {
		from %= f.wraps
	}
	copy(p, f.data[from:])
	if f.flips >= at && f.flips < at+int64(len(p)) && f.flips > 0 {
		p[f.flips-at] ^= 1
	}
	return nil
}

func testOf(t *testing.T, f *fake) Test {
	t.Helper()
	got, err := run(t.Context(), f, Test{}, time.Minute, 16*mib)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestAGoodDiskPasses(t *testing.T) {
	f := newFake()
	got := testOf(t, f)
	if !got.Passed || got.Bytes != 16*mib || got.WriteBps <= 0 || got.ReadBps <= 0 || got.Problem != "" || got.Code != "" {
		t.Errorf("%+v", got)
	}
	if want := smalls + 16*mib/syncEvery + 1; f.syncs != want {
		t.Errorf("%d syncs, want %d", f.syncs, want)
	}
	if f.cached = true; !got.Direct || testOf(t, f).Direct {
		t.Error("it is not told whether the disk itself was read")
	}
}

func TestADiskThatLiesIsFoundOut(t *testing.T) {
	for name, c := range map[string]struct {
		f    fake
		says string
	}{
		"begins again at 5 MiB": {fake{wraps: 5 * mib}, "less room than it says"},
		"begins again at 1 MiB": {fake{wraps: 1 * mib}, "less room than it says"},
		"drops what is written": {fake{drops: 7 * mib}, "from byte 7340032 on"},
		"flips one bit":         {fake{flips: 9*mib + 12345}, fmt.Sprintf("from byte %d on", 9*mib+12345)},
	} {
		f := newFake()
		f.wraps, f.drops, f.flips = c.f.wraps, c.f.drops, c.f.flips
		if got := testOf(t, f); got.Passed || got.Code != ProblemMismatch || !strings.Contains(got.Problem, c.says) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// A disk that keeps what an earlier test wrote, and drops what this one does.
func TestEachTestWritesSomethingElse(t *testing.T) {
	f := newFake()
	testOf(t, f)
	f.drops = 1
	f.failing = nil
	if got := testOf(t, f); got.Passed || got.Code != ProblemMismatch {
		t.Errorf("what the last test had left passed for this one's: %+v", got)
	}
}

func TestEachFailureIsTold(t *testing.T) {
	for name, c := range map[string]struct {
		op   string
		at   int64
		err  error
		code string
	}{
		"full":             {"write", 6 * mib, unix.ENOSPC, ProblemFull},
		"quota":            {"write", 6 * mib, unix.EDQUOT, ProblemFull},
		"gone read-only":   {"write", 6 * mib, unix.EROFS, ProblemReadOnly},
		"write error":      {"write", 6 * mib, unix.EIO, ProblemIO},
		"sync error":       {"sync", 0, unix.EIO, ProblemIO},
		"read error":       {"read", 6 * mib, unix.EIO, ProblemIO},
		"unplugged":        {"read", 6 * mib, unix.ENODEV, ProblemIO},
		"no permission":    {"write", 0, unix.EACCES, ProblemDenied},
		"something else":   {"write", 0, unix.EXDEV, ProblemOther},
		"ends too early":   {"read", 6 * mib, &mismatch{"shorter"}, ProblemMismatch},
		"first write full": {"write", 0, unix.ENOSPC, ProblemFull},
	} {
		f := newFake()
		f.failing = func(op string, at int64) error {
			if op == c.op && at >= c.at {
				return &os.PathError{Op: op, Path: "x", Err: c.err}
			}
			return nil
		}
		if got := testOf(t, f); got.Passed || got.Code != c.code || got.Problem == "" {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestASlowDiskIsTestedInBounds(t *testing.T) {
	f := newFake()
	f.failing = func(op string, _ int64) error { time.Sleep(time.Millisecond); return nil }
	got, err := run(t.Context(), f, Test{}, time.Nanosecond, testBytes)
	if err != nil || !got.Passed || got.Bytes != testLeast {
		t.Errorf("no time, and not just the least: %+v %v", got, err)
	}
	if bytes.ContainsFunc(f.data[testLeast:], func(r rune) bool { return r != 0 }) {
		t.Error("no time, and more than the least was written")
	}
}

func TestACanceledTestIsNoVerdict(t *testing.T) {
	for _, op := range []string{"write", "sync", "read"} {
		ctx, cancel := context.WithCancel(t.Context())
		f := newFake()
		f.failing = func(o string, _ int64) error {
			if o == op {
				cancel()
			}
			return nil
		}
		if got, err := run(ctx, f, Test{}, time.Minute, 16*mib); !errors.Is(err, context.Canceled) || got.Passed {
			t.Errorf("%s: %+v %v", op, got, err)
		}
		cancel()
	}
}

func TestARealFolderPassesAndIsLeftClean(t *testing.T) {
	dir := t.TempDir()
	got, err := SelfTest(t.Context(), dir, quiet())
	if err != nil || !got.Passed || got.Bytes < testLeast || got.WriteBps <= 0 || got.ReadBps <= 0 || got.SyncMS < 0 || got.At.IsZero() {
		t.Fatalf("%+v %v", got, err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	t.Logf("%+v", got)
}

func TestALeftoverIsTakenOverAndRemoved(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, testFile), make([]byte, 3*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := testFolder(t.Context(), dir, time.Second, testLeast); err != nil || !got.Passed {
		t.Errorf("%+v %v", got, err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestTwoTestsDoNotShareAFile(t *testing.T) {
	dir := t.TempDir()
	f, err := openTestFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := testFolder(t.Context(), dir, time.Second, testLeast); !errors.Is(err, errBusy) {
		t.Errorf("the second: %v", err)
	}
	f.remove()
	if got, err := testFolder(t.Context(), dir, time.Second, testLeast); err != nil || !got.Passed {
		t.Errorf("after the first: %+v %v", got, err)
	}
}

func TestWhatIsInTheWayIsNotFollowed(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(elsewhere, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, testFile)
	if err := os.Symlink(elsewhere, path); err != nil {
		t.Fatal(err)
	}
	if got, err := testFolder(t.Context(), dir, time.Second, testLeast); err != nil || got.Passed || got.Problem == "" {
		t.Errorf("a link: %+v %v", got, err)
	}
	if raw, _ := os.ReadFile(elsewhere); string(raw) != "keep" {
		t.Errorf("the link was followed: %q", raw)
	}
	os.Remove(path)
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := testFolder(t.Context(), dir, time.Second, testLeast); err != nil || got.Passed || !strings.Contains(got.Problem, "in the way") {
		t.Errorf("a FIFO: %+v %v", got, err)
	}
}

func TestAnOwnersFileIsNotEmptied(t *testing.T) {
	dir := t.TempDir()
	precious, path := filepath.Join(dir, "precious"), filepath.Join(dir, testFile)
	if err := errors.Join(os.WriteFile(precious, []byte("keep"), 0o600), os.Link(precious, path)); err != nil {
		t.Fatal(err)
	}
	check := func(what string) {
		t.Helper()
		if got, err := testFolder(t.Context(), dir, time.Second, testLeast); err != nil || got.Passed || !strings.Contains(got.Problem, "in the way") {
			t.Errorf("%s: %+v %v", what, got, err)
		}
		if raw, _ := os.ReadFile(path); string(raw) != "keep" {
			t.Errorf("%s was overwritten", what)
		}
	}
	check("a file with two names")
	if os.Geteuid() != 0 {
		return
	}
	if err := errors.Join(os.Remove(precious), os.Chown(path, 12345, -1)); err != nil {
		t.Fatal(err)
	}
	check("another user's file")
}

// A context that ends while the test runs ends it after its file is removed.
func TestAnInterruptedTestLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if st, err := os.Stat(filepath.Join(dir, testFile)); err == nil && st.Size() > 0 {
				cancel()
			}
		}
	}()
	if _, err := SelfTest(ctx, dir, quiet()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestNoFolderIsAnError(t *testing.T) {
	dir := t.TempDir()
	if _, err := SelfTest(t.Context(), filepath.Join(dir, "missing"), quiet()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := SelfTest(t.Context(), file, quiet()); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := SelfTest(ctx, dir, quiet()); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// inventoryOf is a machine with one disk of that serial, mounted at dir.
func inventoryOf(dir, serial string) *hw.Inventory {
	return &hw.Inventory{
		Disks:       []hw.Disk{{Name: "sdx", Serial: serial, Mounts: []string{dir}}},
		Filesystems: []hw.Filesystem{{Mount: dir, Disk: "sdx", Type: "ext4"}},
	}
}

func open(t *testing.T, state string) *Record {
	t.Helper()
	r, err := OpenRecord(state)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestADiskIsTestedOnce(t *testing.T) {
	state, dir := t.TempDir(), t.TempDir()
	trust := func(serial string) Test {
		t.Helper()
		got, err := open(t, state).Trusted(t.Context(), filepath.Join(dir, "deimos"), inventoryOf(dir, serial), quiet())
		if err != nil || !got.Passed {
			t.Fatalf("%+v %v", got, err)
		}
		return got
	}
	first := trust("A")
	if again := trust("A"); again != first {
		t.Errorf("tested again: %+v, then %+v", first, again)
	}
	other := trust("B")
	if other == first {
		t.Error("another disk was not tested")
	}
	if again := trust("A"); again != first {
		t.Error("the first disk was forgotten")
	}
	if st, err := os.Stat(filepath.Join(state, RecordFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st, err)
	}
}

func TestAFailedDiskIsTestedAgain(t *testing.T) {
	state, dir := t.TempDir(), t.TempDir()
	fsid, err := fsidOf(dir)
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, state)
	if err := r.put("A/"+fsid, entry{Test: Test{Problem: "it lied"}}); err != nil {
		t.Fatal(err)
	}
	if got, err := open(t, state).Trusted(t.Context(), dir, inventoryOf(dir, "A"), quiet()); err != nil || !got.Passed || got.Problem != "" {
		t.Errorf("%+v %v", got, err)
	}
}

func TestADamagedRecordIsBegunAnew(t *testing.T) {
	good, err := json.Marshal(recorded{Format: recordFormat, Disks: map[string]entry{"A/x": {}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string][]byte{
		"empty": {}, "cut off": good[:len(good)-3], "garbage": []byte("\x00\xff\x00"), "of the future": []byte(`{"format":99}`),
		"too large": append(good, make([]byte, maxRecord)...), "another shape": []byte(`{"format":1,"disks":[]}`),
	} {
		state, dir := t.TempDir(), t.TempDir()
		if err := os.WriteFile(filepath.Join(state, RecordFile), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		r := open(t, state)
		if r.warn == "" || len(r.disks) > 0 {
			t.Errorf("%s: taken: %+v", name, r)
		}
		if name != "cut off" {
			continue
		}
		log := slog.New(slog.NewTextHandler(&said, nil))
		for range 2 {
			if got, err := r.Trusted(t.Context(), dir, inventoryOf(dir, "A"), log); err != nil || !got.Passed {
				t.Fatalf("%+v %v", got, err)
			}
		}
		if strings.Count(said.String(), "damaged") != 1 {
			t.Errorf("said: %s", said.String())
		}
		if r := open(t, state); r.warn != "" || len(r.disks) != 1 {
			t.Errorf("it was not begun anew: %+v", r)
		}
	}
	fifo := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(fifo, RecordFile), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := open(t, fifo); r.warn == "" {
		t.Error("a FIFO is taken for a record")
	}
}

func TestTheRecordForgetsTheOldest(t *testing.T) {
	r := open(t, t.TempDir())
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range maxDisks + 5 {
		if err := r.put(fmt.Sprint(i), entry{Asked: begin.Add(time.Duration(i) * time.Hour)}); err != nil {
			t.Fatal(err)
		}
		r.asked("0") // in use all the time
	}
	if _, ok := r.disks["0"]; !ok || len(r.disks) != maxDisks {
		t.Errorf("%d left, the one in use among them: %v", len(r.disks), ok)
	}
	if _, ok := r.disks["1"]; ok {
		t.Error("the oldest is still there")
	}
	if err := r.put("new", entry{}); err != nil {
		t.Fatal(err)
	}
	if _, ok := r.disks["new"]; !ok || len(r.disks) != maxDisks {
		t.Error("what was just put there was forgotten")
	}
}

func TestAReadOnlyStateDoesNotStopTheTest(t *testing.T) {
	state := filepath.Join(t.TempDir(), "gone")
	dir := t.TempDir()
	var said strings.Builder
	got, err := open(t, state).Trusted(t.Context(), dir, nil, slog.New(slog.NewTextHandler(io.Writer(&said), nil)))
	if err != nil || !got.Passed || !strings.Contains(said.String(), "could not be saved") {
		t.Errorf("%+v %v: %s", got, err, said.String())
	}
}
