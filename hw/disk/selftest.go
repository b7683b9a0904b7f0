package disk

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/hw"
)

// The bounds of a self-test.
const (
	testTime  = 10 * time.Second
	testGrace = 20 * time.Second // beyond testTime that a slow disk may take for one answer
	testTidy  = time.Second      // to remove its file, once it is to end
	testBytes = 64 * mib
	testHome  = 8 * mib  // of the disk that the agent's state is on: it is relied on anyway
	testLeast = 4 * mib  // less says nothing
	leastFree = 64 * mib // with less no test is made
	block     = 1 * mib
	syncEvery = 8 * mib // so that one sync does not outlast the test
	small     = 4096    // bytes of a small write
	smalls    = 16
)

// testFile is the test's file in the folder. One that a crash has left is
// taken over and removed by the next test.
const testFile = ".deimos-selftest"

// The codes of problems.
const (
	ProblemFull     = "full"
	ProblemReadOnly = "read_only"
	ProblemDenied   = "denied"
	ProblemIO       = "io_error"
	ProblemMismatch = "mismatch"
	ProblemHung     = "hung"
	ProblemOther    = "other"
)

// medium is what is tested: a file, or in tests a disk that lies.
type medium interface {
	Write(p []byte, at int64) error
	Sync() error
	// Forget has the page cache give up the file, as far as it can. direct tells
	// whether what is read from now on surely comes from the disk.
	Forget() (direct bool)
	Read(p []byte, at int64) error // fills p, whose address is a multiple of a page's
}

// SelfTest writes to a folder, syncs, reads back and compares, for about 10 s
// and 64 MiB at most. It never goes below the floor, and removes what it wrote.
// What is wrong with the disk is in the Test; the error is that there was no
// test, as when the folder is missing, ctx ended, or another test runs there.
func SelfTest(ctx context.Context, dir string, log *slog.Logger) (Test, error) {
	return selfTest(ctx, dir, testBytes, log)
}

func selfTest(ctx context.Context, dir string, most int64, log *slog.Logger) (Test, error) {
	type result struct {
		t   Test
		err error
	}
	started := time.Now()
	ctx, cancel := context.WithTimeout(ctx, testTime+testGrace)
	defer cancel()
	waiting, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(testTidy, giveUp) })()
	r, ok := hw.Within(waiting, testTime+testGrace, "self-test of "+dir, func() result {
		t, err := testFolder(ctx, dir, testTime, most)
		return result{t, err}
	})
	switch {
	case !ok && errors.Is(ctx.Err(), context.Canceled):
		return Test{}, ctx.Err()
	case !ok:
		r.t = Test{At: started.UTC(), Code: ProblemHung, Problem: "the disk did not answer in time; it or its cable is failing"}
	case r.err != nil:
		return Test{}, fmt.Errorf("no self-test in %s: %w", dir, r.err)
	}
	log.Info("self-test of a disk", "folder", dir, "passed", r.t.Passed, "problem", r.t.Problem, "bytes", r.t.Bytes,
		"write_bps", int64(r.t.WriteBps), "read_bps", int64(r.t.ReadBps), "sync_ms", r.t.SyncMS, "direct", r.t.Direct,
		"took", time.Since(started).Round(time.Millisecond))
	return r.t, nil
}

func testFolder(ctx context.Context, dir string, limit time.Duration, most int64) (Test, error) {
	if st, err := os.Stat(dir); err != nil {
		return Test{}, err
	} else if !st.IsDir() {
		return Test{}, &fs.PathError{Op: "test", Path: dir, Err: unix.ENOTDIR}
	}
	t := Test{At: time.Now().UTC().Truncate(time.Second)}
	f, err := openTestFile(dir)
	if errors.Is(err, errBusy) {
		return t, err
	}
	if err != nil {
		return t.failed(err), nil
	}
	defer f.remove()
	room, err := roomIn(dir)
	if err != nil {
		return t.failed(err), nil
	}
	if room = min(room, most) / block * block; room < testLeast {
		t.Code, t.Problem = ProblemFull, "the disk is full, or too full to be tested; make room on it"
		return t, nil
	}
	return run(ctx, f, t, limit, room)
}

// roomIn is how much of a filesystem a test may take: down to the floor. On one
// that is filled to its floor, as a disk is that has long been in use, it is
// the least that says something, as it is that disk's chunks that would be
// given up otherwise.
func roomIn(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	unit := int64(st.Frsize)
	if unit == 0 {
		unit = int64(st.Bsize)
	}
	free := int64(st.Bavail) * unit
	room := free - floorOf(int64(st.Blocks)*unit, false)
	if room < testLeast && free >= leastFree {
		return testLeast, nil
	}
	return room, nil
}

// run is the test itself, on any medium.
func run(ctx context.Context, m medium, t Test, limit time.Duration, room int64) (Test, error) {
	deadline := time.Now().Add(limit)
	late := func(part float64) bool {
		return time.Until(deadline) < time.Duration(float64(limit)*(1-part))
	}
	p, err := newPattern()
	if err != nil {
		return t, err
	}
	want, got := aligned(block), aligned(block)
	defer unmap(want, got)

	if err := t.syncs(ctx, m, p, want[:small], late); err != nil {
		return t.ended(ctx, err)
	}
	written, err := t.write(ctx, m, p, want, room, late)
	if err != nil {
		return t.ended(ctx, err)
	}
	t.Direct = m.Forget()
	if err := t.read(ctx, m, p, want, got, written, late); err != nil {
		return t.ended(ctx, err)
	}
	t.Passed = true
	return t, nil
}

// syncs measures small synced writes for at most a fifth of the time.
func (t *Test) syncs(ctx context.Context, m medium, p *pattern, buf []byte, late func(float64) bool) error {
	var took []time.Duration
	for i := range int64(smalls) {
		if len(took) > 0 && late(0.2) || ctx.Err() != nil {
			break
		}
		p.fill(buf, i) // overwritten by the blocks
		from := time.Now()
		if err := m.Write(buf, i*small); err != nil {
			return err
		}
		if err := m.Sync(); err != nil {
			return err
		}
		took = append(took, time.Since(from))
	}
	if len(took) > 0 {
		slices.Sort(took)
		t.SyncMS = float64(took[len(took)/2].Microseconds()) / 1000
	}
	return ctx.Err()
}

// write writes blocks until room or 60 % of the time is used up. Making the
// pattern is not measured.
func (t *Test) write(ctx context.Context, m medium, p *pattern, buf []byte, room int64, late func(float64) bool) (written int64, err error) {
	var took time.Duration
	timed := func(f func() error) error {
		from := time.Now()
		err := f()
		took += time.Since(from)
		return err
	}
	for written < room && ctx.Err() == nil && (written < testLeast || !late(0.6)) {
		p.fill(buf, written/block)
		if err := timed(func() error { return m.Write(buf, written) }); err != nil {
			return written, err
		}
		if written += block; written%syncEvery == 0 || written >= room {
			if err := timed(m.Sync); err != nil {
				return written, err
			}
		}
	}
	if err := timed(m.Sync); err != nil {
		return written, err
	}
	t.WriteBps = rate(written, took)
	return written, ctx.Err()
}

// read reads blocks back until all or the time is used up.
func (t *Test) read(ctx context.Context, m medium, p *pattern, want, got []byte, written int64, late func(float64) bool) error {
	var took time.Duration
	for at := int64(0); at < written && ctx.Err() == nil && (at < testLeast || !late(1)); at += block {
		from := time.Now()
		if err := m.Read(got, at); err != nil {
			return err
		}
		took += time.Since(from)
		if p.fill(want, at/block); !bytes.Equal(want, got) {
			return p.mismatch(want, got, at, written)
		}
		t.Bytes += block
	}
	t.ReadBps = rate(t.Bytes, took)
	return ctx.Err()
}

func rate(n int64, took time.Duration) float64 {
	return float64(n) / max(took, time.Microsecond).Seconds()
}

// ended is a test that was not passed: because of the disk, or because it was
// to end.
func (t Test) ended(ctx context.Context, err error) (Test, error) {
	if ctx.Err() != nil {
		return t, ctx.Err()
	}
	return t.failed(err), nil
}

// mismatch is what was read and is not what was written.
type mismatch struct{ text string }

func (m *mismatch) Error() string { return m.text }

func (t Test) failed(err error) Test {
	t.Passed = false
	lie, isLie := errors.AsType[*mismatch](err)
	switch {
	case isLie:
		t.Code, t.Problem = ProblemMismatch, lie.text
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		t.Code, t.Problem = ProblemFull, "the disk is full, though the system said that there was room; make room on it, or look for a quota"
	case errors.Is(err, unix.EROFS):
		t.Code, t.Problem = ProblemReadOnly, "the filesystem can only be read; if it was not mounted so on purpose, the kernel has found an error: see \"dmesg\""
	case errors.Is(err, fs.ErrPermission):
		t.Code, t.Problem = ProblemDenied, "this user may not write there; give the folder to the user of the agent"
	case errors.Is(err, unix.EIO), errors.Is(err, unix.EREMOTEIO), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO), errors.Is(err, unix.EUCLEAN):
		t.Code, t.Problem = ProblemIO, "the disk failed to read or write; check its cable and power, see \"dmesg\", and replace it if this stays so: "+err.Error()
	default:
		t.Code, t.Problem = ProblemOther, err.Error()
	}
	return t
}

// pattern is content that is different at each place and in each test, and
// that a disk cannot shrink.
type pattern struct{ seed [32]byte }

func newPattern() (*pattern, error) {
	var p pattern
	_, err := crand.Read(p.seed[:])
	return &p, err
}

// fill writes what belongs into a block.
func (p *pattern) fill(buf []byte, index int64) {
	seed := p.seed
	binary.LittleEndian.PutUint64(seed[:], binary.LittleEndian.Uint64(seed[:])+uint64(index))
	_, _ = rand.NewChaCha8(seed).Read(buf) // never fails
}

// mismatch says how what was read is wrong.
func (p *pattern) mismatch(want, got []byte, at, written int64) error {
	head := make([]byte, 64)
	for other := int64(0); other < written; other += block {
		if p.fill(head, other/block); other != at && bytes.HasPrefix(got, head) {
			return &mismatch{fmt.Sprintf("the disk gave back at %d MiB what was written at %d MiB: it has less room than it says, as forged ones do; replace it", at/mib, other/mib)}
		}
	}
	first := 0
	for first < len(want) && want[first] == got[first] {
		first++
	}
	return &mismatch{fmt.Sprintf("the disk gave back something else than was written, from byte %d on; it loses data: replace it", at+int64(first))}
}
