package history

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/wire"
)

var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// machine is a board whose clocks the test moves: up is the time since boot.
type machine struct {
	boot bootID
	real time.Time // carries Go's monotonic reading; up is counted from it
	up   time.Duration
}

func newMachine(boot byte) *machine { return &machine{boot: bootID{boot}, real: time.Now()} }

func (m *machine) env() environment {
	return environment{boot: m.boot, sinceBoot: func() time.Duration { return m.up }, now: m.now}
}

func (m *machine) now() time.Time { return m.real.Add(m.up) }

// at is a sample of the load, read by the clock of the board.
func (m *machine) at(load float64) hw.Telemetry {
	return hw.Telemetry{At: m.now(), Load1: &load}
}

func (m *machine) pass(d time.Duration) { m.up += d }

// sampleAt is a sample without a monotonic reading.
func sampleAt(at time.Time, load float64) hw.Telemetry { return hw.Telemetry{At: at, Load1: &load} }

func opened(t testing.TB, dir string) *Ring {
	t.Helper()
	r, err := Open(dir, Options{})
	must(t, err)
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// fill adds n samples, ten seconds apart, that end at noon, with values 0 to n-1.
func fill(t testing.TB, r *Ring, n int) {
	t.Helper()
	for i := range n {
		must(t, r.Add(sampleAt(noon.Add(time.Duration(i-n)*10*time.Second), float64(i))))
	}
}

func read(t testing.TB, r *Ring, q wire.HistoryRequest) wire.History {
	t.Helper()
	h, err := r.Read(q, noon)
	must(t, err)
	return h
}

// values of a curve's mean; NaN for null.
func values(c wire.Curve) []float64 {
	out := make([]float64, len(c.Mean))
	for i, v := range c.Mean {
		out[i] = math.NaN()
		if v != nil {
			out[i] = *v
		}
	}
	return out
}

func TestCurveSurvivesARestart(t *testing.T) {
	dir := t.TempDir()
	r := opened(t, dir)
	fill(t, r, 300)
	before := read(t, r, wire.HistoryRequest{Points: 50})
	must(t, r.Close())
	after := read(t, opened(t, dir), wire.HistoryRequest{Points: 50})
	if !reflect.DeepEqual(before, after) || before.Count != 50 {
		t.Errorf("%d points before, %d after, or others", before.Count, after.Count)
	}
	got := values(after.Series["load1"])
	for i, v := range got {
		if want := float64(6*i) + 2.5; math.Abs(v-want) > 0.6 {
			t.Errorf("point %d is %g, want %g", i, v, want)
		}
	}
	if lo, hi := after.Series["load1"].Min[10], after.Series["load1"].Max[10]; *hi-*lo < 4 || *hi-*lo > 6 {
		t.Errorf("least %g, most %g of six samples that grow by 1", *lo, *hi)
	}
}

func TestSamplesThatWaitAreInTheAnswer(t *testing.T) {
	r := opened(t, t.TempDir())
	fill(t, r, 3)
	got := values(read(t, r, wire.HistoryRequest{From: noon.Add(-30 * time.Second)}).Series["load1"])
	if len(got) != 2 || got[0] != 0.5 || got[1] != 2 {
		t.Errorf("got %v", got)
	}
}

func TestAStepIsNoShorterThanTheTimeBetweenSamples(t *testing.T) {
	r := opened(t, t.TempDir())
	fill(t, r, 60)
	h := read(t, r, wire.HistoryRequest{From: noon.Add(-10 * time.Minute), Points: 2000})
	for i, v := range values(h.Series["load1"]) {
		if math.IsNaN(v) {
			t.Errorf("point %d of %d is a gap that was none", i, h.Count)
		}
	}
	if h.Step != 15 || h.Count != 40 {
		t.Errorf("%d steps of %g s", h.Count, h.Step)
	}
}

func TestAGapStaysAGap(t *testing.T) {
	r := opened(t, t.TempDir())
	for i := range 60 {
		if i < 20 || i >= 40 {
			must(t, r.Add(sampleAt(noon.Add(time.Duration(i-60)*time.Minute), 1)))
		}
	}
	h := read(t, r, wire.HistoryRequest{From: noon.Add(-time.Hour), Points: 30})
	for i, v := range values(h.Series["load1"]) {
		if gap := i >= 10 && i < 20; gap != math.IsNaN(v) {
			t.Errorf("point %d: %g", i, v)
		}
	}
}

func TestOnlyTheSeriesThatWereAskedForAreSent(t *testing.T) {
	r := opened(t, t.TempDir())
	x := sampleAt(noon.Add(-time.Second), 1)
	x.Temperatures = map[string]float64{"cpu": 50, "nvme Composite": 40}
	x.Measured = []hw.Measurement{{Name: "greenhouse/humidity", Unit: "%", Value: 61.25}}
	must(t, r.Add(x))
	h := read(t, r, wire.HistoryRequest{Series: []string{"temperature.*", "sensor.greenhouse/humidity"}})
	if len(h.Series) != 3 || h.Series["temperature.cpu"].Unit != "°C" || h.Series["sensor.greenhouse/humidity"].Unit != "%" {
		t.Errorf("got %+v", h.Series)
	}
	if v := values(h.Series["temperature.nvme_Composite"]); v[len(v)-1] != 40 {
		t.Errorf("got %v", v)
	}
	if c := h.Series["temperature.cpu"]; c.Min != nil || c.Max != nil {
		t.Error("least and most of one sample are sent, though they are the mean")
	}
}

func TestAWrongRequestIsAProblemThatSaysWhy(t *testing.T) {
	r := opened(t, t.TempDir())
	for _, q := range []wire.HistoryRequest{
		{Points: -1}, {Points: wire.MaxPoints + 1},
		{From: noon, To: noon}, {From: noon, To: noon.Add(-time.Hour)}, {From: noon.Add(time.Hour)},
		{From: time.Unix(1<<55, 0)},
		{Series: []string{""}}, {Series: []string{"a*b"}}, {Series: []string{"**"}}, {Series: make([]string, 300)},
	} {
		_, err := r.Read(q, noon)
		var p *wire.Problem
		if !errors.As(err, &p) || p.Code != wire.CodeBadBody || p.State != wire.Rejected || p.Reason == "" {
			t.Errorf("%+v: %v", q, err)
		}
	}
}

func TestAnEmptyRingHasAnEmptyAnswer(t *testing.T) {
	r := opened(t, t.TempDir())
	for _, q := range []wire.HistoryRequest{{}, {From: noon.Add(-time.Hour)}} {
		h := read(t, r, q)
		if len(h.Series) != 0 || h.Series == nil {
			t.Errorf("got %+v", h)
		}
		_, err := json.Marshal(h)
		must(t, err)
	}
}

func TestAnAnswerTooLargeNamesWhatIsLeftOut(t *testing.T) {
	r := opened(t, t.TempDir())
	for i := range 10 {
		x := sampleAt(noon.Add(time.Duration(i-10)*time.Hour), 1)
		x.Temperatures = map[string]float64{}
		for s := range 200 {
			x.Temperatures[fmt.Sprintf("s%03d", s)] = float64(i)
		}
		must(t, r.Add(x))
	}
	h, err := r.Read(wire.HistoryRequest{From: noon.Add(-10 * time.Hour * 400), Points: wire.MaxPoints}, noon)
	must(t, err)
	if len(h.Series)*h.Count > maxValues || len(h.LeftOut)+len(h.Series) != 201 || len(h.LeftOut) == 0 {
		t.Errorf("%d series of %d points, %d left out", len(h.Series), h.Count, len(h.LeftOut))
	}
}

// A board without a battery begins in 1970, or where it stopped, and learns the time later.
func TestSamplesFromBeforeTheClockWasSetGetTheirTrueTime(t *testing.T) {
	for _, wrong := range []time.Duration{-56 * 365 * 24 * time.Hour, -3 * 24 * time.Hour, 10 * 365 * 24 * time.Hour} {
		dir, m := t.TempDir(), newMachine(1)
		r, err := open(dir, Options{}, m.env())
		must(t, err)
		for i := range 120 {
			x := m.at(float64(i))
			if i < 60 { // what the wall clock shows is wrong, the monotonic reading is not
				x.At = stepClock(x.At, wrong)
			}
			must(t, r.Add(x))
			if i == 59 && wrong < -40*365*24*time.Hour {
				h, err := r.Read(wire.HistoryRequest{}, m.now())
				must(t, err)
				if len(h.Series) != 0 {
					t.Error("samples without a time are shown")
				}
			}
			m.pass(10 * time.Second)
		}
		must(t, r.Close())
		r, err = open(dir, Options{}, m.env())
		must(t, err)
		h, err := r.Read(wire.HistoryRequest{Points: 20}, m.now())
		must(t, err)
		if span := time.Duration(h.Step * float64(h.Count) * float64(time.Second)); span > 25*time.Minute {
			t.Errorf("clock wrong by %v: 20 minutes of samples span %v", wrong, span)
		}
		got := values(h.Series["load1"])
		for i := range got {
			if want := 6 * float64(i); len(got) != 20 || math.Abs(got[i]-want) > 6 {
				t.Errorf("clock wrong by %v: point %d is %g, want about %g", wrong, i, got[i], want)
			}
		}
		must(t, r.Close())
	}
}

// stepClock changes what the wall clock shows and keeps the monotonic reading, as
// a clock that is set does. time has no function for it: the seconds since 1885 are
// in bits 30 to 62 of a time's first word (comment of time.Time's fields).
func stepClock(at time.Time, by time.Duration) time.Time {
	want := at.Round(0).Add(by)
	*(*int64)(unsafe.Pointer(&at)) += int64(by/time.Second) << 30
	if d := at.Round(0).Sub(want); d > time.Second || d < -time.Second {
		panic("the layout of time.Time has changed")
	}
	return at
}

func TestABootThatNeverKnewTheTimeDoesNotPoisonTheOthers(t *testing.T) {
	dir := t.TempDir()
	for boot := range byte(4) {
		m := newMachine(boot + 1)
		m.real = m.real.Add(time.Duration(boot) * time.Hour)
		r, err := open(dir, Options{}, m.env())
		must(t, err)
		for range 60 {
			x := m.at(float64(boot))
			if boot == 1 {
				x.At = stepClock(x.At, -50*365*24*time.Hour)
			}
			must(t, r.Add(x))
			m.pass(10 * time.Second)
		}
		must(t, r.Close())
	}
	r := opened(t, dir)
	h, err := r.Read(wire.HistoryRequest{}, time.Now().Add(4*time.Hour))
	must(t, err)
	seen := map[float64]bool{}
	for _, v := range values(h.Series["load1"]) {
		if !math.IsNaN(v) {
			seen[v] = true
		}
	}
	if len(seen) != 3 || seen[1] {
		t.Errorf("boots seen: %v; boot 1 never knew the time", seen)
	}
	if h.Step*float64(h.Count) > 5*3600 {
		t.Errorf("the answer spans %g s", h.Step*float64(h.Count))
	}
}

func TestTimeThatGoesBackLosesNothing(t *testing.T) {
	r := opened(t, t.TempDir())
	for i := range 60 { // the clock is set back by half an hour in the middle
		at := noon.Add(time.Duration(i-60) * time.Minute)
		if i >= 30 {
			at = at.Add(-30 * time.Minute)
		}
		must(t, r.Add(sampleAt(at, float64(i))))
	}
	must(t, r.Flush())
	h := read(t, r, wire.HistoryRequest{From: noon.Add(-time.Hour), To: noon.Add(-30 * time.Minute), Points: 1})
	c := h.Series["load1"]
	if *c.Min[0] != 0 || *c.Max[0] != 59 {
		t.Errorf("least %g, most %g; want 0 and 59", *c.Min[0], *c.Max[0])
	}
}

func TestRingStaysWithinItsBudgetAndKeepsTheCoarseLonger(t *testing.T) {
	dir := t.TempDir()
	r, err := Open(dir, Options{MaxBytes: leastBytes})
	must(t, err)
	seed := testenv.Seed(t)
	rnd := rand.New(rand.NewPCG(seed, 1))
	const n = 20 * 24 * 60
	for i := range n {
		x := sampleAt(noon.Add(time.Duration(i-n)*time.Minute), rnd.Float64())
		x.Temperatures = map[string]float64{"a": rnd.NormFloat64(), "b": rnd.NormFloat64(), "c": rnd.NormFloat64(), "d": rnd.NormFloat64()}
		must(t, r.Add(x))
		if i%5000 == 0 {
			if size := sizeOf(t, dir); size > leastBytes {
				t.Fatalf("%d bytes after %d samples", size, i)
			}
		}
	}
	oldestFine := r.fine.refs()[0].from
	h := read(t, r, wire.HistoryRequest{})
	first := h.From.UnixMilli()
	if first >= oldestFine-24*3600*1000 {
		t.Errorf("the curve begins %v, the oldest sample is of %v: the coarse one should reach further back", h.From, time.UnixMilli(oldestFine).UTC())
	}
	for i, v := range values(h.Series["load1"]) {
		if math.IsNaN(v) || math.Abs(v-0.5) > 0.4 {
			t.Errorf("point %d is %g", i, v)
		}
	}
	// In the finest that can be had, the border between the two resolutions shows no gap.
	border := time.UnixMilli(oldestFine)
	h = read(t, r, wire.HistoryRequest{From: border.Add(-6 * time.Hour), To: border.Add(6 * time.Hour), Points: 200})
	gaps := 0
	for _, v := range values(h.Series["load1"]) {
		if math.IsNaN(v) {
			gaps++
		}
	}
	if time.Duration(float64(gaps)*h.Step)*time.Second > coarseSpan+time.Duration(2*h.Step)*time.Second {
		t.Errorf("%d of %d points at the border are gaps", gaps, h.Count)
	}
	must(t, r.Close())
}

func sizeOf(t testing.TB, dir string) (total int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		info, err := e.Info()
		must(t, err)
		total += info.Size()
	}
	return total
}

func TestAFewPointsOverALongTimeAreExactFromTheCoarseFiles(t *testing.T) {
	dir := t.TempDir()
	r := opened(t, dir)
	const n = 4 * 24 * 60
	for i := range n {
		must(t, r.Add(sampleAt(noon.Add(time.Duration(i-n)*time.Minute), float64(i))))
	}
	for range 2 { // and again after a restart, which makes the unwritten coarse rows again
		h := read(t, r, wire.HistoryRequest{From: noon.Add(-4 * 24 * time.Hour), To: noon, Points: 4})
		for i, v := range values(h.Series["load1"]) {
			if want := 1440*float64(i) + 719.5; math.Abs(v-want) > 10 {
				t.Errorf("day %d: %g, want %g", i, v, want)
			}
		}
		if lo := *h.Series["load1"].Min[0]; lo != 0 {
			t.Errorf("the least is %g", lo)
		}
		if hi := *h.Series["load1"].Max[3]; hi != n-1 {
			t.Errorf("the most is %g: the newest samples are missing", hi)
		}
		must(t, r.Close())
		r = opened(t, dir)
	}
}

// A torn tail costs only what is in it.
func TestATornFileCostsOnlyItsTail(t *testing.T) {
	dir := t.TempDir()
	ends := threeBlocks(t, dir)
	whole := one(t, dir, "fine-*.seg")
	raw, err := os.ReadFile(whole)
	must(t, err)
	for cut := range len(raw) + 1 {
		must(t, os.WriteFile(whole, raw[:cut], 0o600))
		want := 0
		for _, end := range ends {
			if int64(cut) >= end {
				want++
			}
		}
		if got := blocksIn(t, dir); len(got) != want {
			t.Fatalf("cut at byte %d of %d: %d blocks, want %d", cut, len(raw), len(got), want)
		}
	}
	// What is written after a tear is found.
	must(t, os.WriteFile(whole, raw[:ends[2]-5], 0o600))
	r := opened(t, dir)
	must(t, r.Add(sampleAt(noon, 99)))
	must(t, r.Close())
	if got := blocksIn(t, dir); len(got) != 3 || got[2].values("load1")[0] != 99 {
		t.Errorf("after a torn tail: %d blocks", len(got))
	}
}

// A flipped bit costs the block that it is in.
func TestAFlippedByteCostsOnlyItsBlock(t *testing.T) {
	dir := t.TempDir()
	ends := threeBlocks(t, dir)
	path := one(t, dir, "fine-*.seg")
	raw, err := os.ReadFile(path)
	must(t, err)
	for at := range raw {
		hurt := bytes.Clone(raw)
		hurt[at] ^= byte(1 + at%255)
		must(t, os.WriteFile(path, hurt, 0o600))
		var want []float64
		for i, end := range ends {
			begin := int64(0)
			if i > 0 {
				begin = ends[i-1]
			}
			if int64(at) < begin || int64(at) >= end {
				want = append(want, float64(10*i))
			}
		}
		var got []float64
		for _, b := range blocksIn(t, dir) {
			got = append(got, b.values("load1")[0])
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("byte %d flipped: blocks that begin with %v, want %v", at, got, want)
		}
	}
}

// threeBlocks writes three blocks of ten samples, and tells where each ends.
func threeBlocks(t *testing.T, dir string) (ends []int64) {
	r := opened(t, dir)
	for i := range 30 {
		must(t, r.Add(sampleAt(noon.Add(time.Duration(i-30)*10*time.Second), float64(i))))
		if i%10 == 9 {
			must(t, r.Flush())
			ends = append(ends, r.fine.segs[0].size)
		}
	}
	must(t, r.Close())
	return ends
}

func one(t *testing.T, dir, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	must(t, err)
	if len(found) != 1 {
		t.Fatalf("found %v", found)
	}
	return found[0]
}

func blocksIn(t *testing.T, dir string) (all []*block) {
	t.Helper()
	r, err := Load(dir)
	must(t, err)
	for _, x := range r.fine.refs() {
		b, err := r.fine.load(x)
		must(t, err)
		all = append(all, b)
	}
	return all
}

func (b *block) values(name string) []float64 {
	for _, c := range b.cols {
		if c.name == name {
			return c.values
		}
	}
	return nil
}

func TestLoadReadsWhileAnotherWritesAndChangesNothing(t *testing.T) {
	dir := t.TempDir()
	r := opened(t, dir)
	fill(t, r, 100)
	must(t, r.Flush())
	before := sizeOf(t, dir)
	other, err := Load(dir)
	must(t, err)
	fill(t, r, 100)
	must(t, r.Flush())
	if h := read(t, other, wire.HistoryRequest{}); len(h.Series["load1"].Mean) == 0 {
		t.Error("nothing was read")
	}
	if err := other.Add(sampleAt(noon, 1)); err == nil {
		t.Error("a loaded ring took a sample")
	}
	size := sizeOf(t, dir)
	must(t, other.Close())
	if _, err := Load(dir); err != nil || sizeOf(t, dir) != size || size <= before {
		t.Errorf("sizes %d, %d, %d: %v", before, size, sizeOf(t, dir), err)
	}
	if _, err := Load(filepath.Join(dir, "none")); err == nil {
		t.Error("a folder that is not there was loaded")
	}
	if _, err := os.Stat(filepath.Join(dir, "none")); err == nil {
		t.Error("Load made a folder")
	}
}

// The disk is full: here, the process may not write large files.
func TestAFullDiskIsToldOnceAndTheHistoryGoesOnWhenThereIsRoom(t *testing.T) {
	if os.Getenv("HISTORY_FULL") == "" {
		cmd := exec.Command(os.Args[0], "-test.run", t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "HISTORY_FULL="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	dir := os.Getenv("HISTORY_FULL")
	m := newMachine(1)
	var logged bytes.Buffer
	r, err := open(dir, Options{Log: slog.New(slog.NewTextHandler(&logged, nil))}, m.env())
	must(t, err)
	var old syscall.Rlimit
	must(t, syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old))
	full := old
	full.Cur = 100
	must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &full))
	told := 0
	for i := range 2000 {
		if err := r.Add(m.at(float64(i))); err != nil {
			told++
		}
		m.pass(10 * time.Second)
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
	if r.buffer != nil && len(r.buffer.block.rows) > flushRows {
		t.Errorf("%d samples wait", len(r.buffer.block.rows))
	}
	if err := r.Flush(); err == nil {
		t.Error("who flushes is not told")
	}
	if files, _ := os.ReadDir(dir); len(files) > 1 {
		t.Errorf("%d files while nothing can be written", len(files))
	}
	must(t, syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old))
	for i := range 100 {
		must(t, r.Add(m.at(float64(i))))
		m.pass(10 * time.Second)
	}
	must(t, r.Close())
	if !strings.Contains(logged.String(), "written again") {
		t.Errorf("log: %s", logged.String())
	}
	again, err := Load(dir)
	must(t, err)
	h, err := again.Read(wire.HistoryRequest{}, m.now())
	must(t, err)
	if len(h.Series["load1"].Mean) == 0 || again.fine.damaged != 0 {
		t.Errorf("got %+v, %d bytes damaged", h, again.fine.damaged)
	}
}

func TestAKilledWriterLosesOnlyWhatWaited(t *testing.T) {
	if dir := os.Getenv("HISTORY_KILLED"); dir != "" {
		r, err := Open(dir, Options{})
		must(t, err)
		for i := 0; ; i++ {
			must(t, r.Add(sampleAt(noon.Add(time.Duration(i)*time.Second), float64(i))))
			must(t, r.Flush())
			fmt.Printf("flushed %d\n", i)
		}
	}
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run", t.Name()+"$")
	cmd.Env = append(os.Environ(), "HISTORY_KILLED="+dir)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	last := -1
	for last < 40 {
		if _, err := fmt.Fscanf(out, "flushed %d\n", &last); err != nil {
			t.Fatal(err)
		}
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	seen := map[float64]bool{}
	for _, b := range blocksIn(t, dir) {
		for _, v := range b.values("load1") {
			seen[v] = true
		}
	}
	for i := range last + 1 {
		if !seen[float64(i)] {
			t.Errorf("sample %d was flushed and is lost", i)
		}
	}
}

func TestWhatIsEncodedIsDecoded(t *testing.T) {
	seed := testenv.Seed(t)
	rnd := rand.New(rand.NewPCG(seed, 2))
	for range 200 {
		x := newBuilder(bootID{byte(rnd.IntN(2))})
		at, seq := rnd.Int64N(1<<45), rnd.Uint64N(1<<40)
		for range 1 + rnd.IntN(40) {
			at += rnd.Int64N(20000) - 5000
			seq += 1 + rnd.Uint64N(3)
			x.row(row{from: at, to: at + rnd.Int64N(1000), seq: seq}, rnd.Int64N(1<<40))
			for c := range 5 {
				v := []float64{float64(rnd.Int64N(1 << 50)), float64(float32(rnd.NormFloat64())), 0 - float64(rnd.IntN(10)), 0, float64(float32(rnd.ExpFloat64() * 1e30))}[c]
				if rnd.IntN(4) > 0 {
					x.set(fmt.Sprint("c", c), statValue, v, func() string { return "°C" })
				}
			}
		}
		body, err := x.block.encode()
		must(t, err)
		got, err := decode(body)
		must(t, err)
		if fmt.Sprint(dump(got)) != fmt.Sprint(dump(x.block)) {
			t.Fatalf("got  %v\nwant %v", dump(got), dump(x.block))
		}
	}
}

func dump(b *block) []any {
	out := []any{b.boot, b.offset, b.rows}
	for _, c := range b.cols {
		out = append(out, *c)
	}
	return out
}

func FuzzDecode(f *testing.F) {
	x := newBuilder(bootID{1})
	x.row(row{from: 5, to: 6, seq: 1}, 7)
	x.set("load1", statValue, 1.5, func() string { return "" })
	x.row(row{from: 15, to: 16, seq: 2}, 7)
	x.set("memory.used", statValue, 1<<40, func() string { return "B" })
	body, err := x.block.encode()
	must(f, err)
	f.Add(body)
	f.Add(body[:headSize])
	f.Add(body[:len(body)-3])
	f.Fuzz(func(t *testing.T, body []byte) {
		b, err := decode(body)
		if err != nil {
			return
		}
		again, err := b.encode()
		must(t, err)
		got, err := decode(again)
		must(t, err)
		if h := b.head(); got.head() != h && h.first != math.MaxUint64 {
			t.Errorf("head %+v became %+v", h, got.head())
		}
		// Whatever a record says, an answer stays bounded.
		v := view{parts: []part{{head: b.head(), load: func() (*block, error) { return b, nil }}}}
		v.clock = clocks(v.parts)
		g := v.grid(b.head().from+b.offset, b.head().to+b.offset, 100)
		v.names(g, nil)
		v.fill(g, map[string]*bin{"load1": newBin(max(g.count, 1))})
	})
}

func FuzzRecords(f *testing.F) {
	x := newBuilder(bootID{})
	x.row(row{from: 5, to: 5, seq: 1}, 0)
	body, err := x.block.encode()
	must(f, err)
	f.Add(body)
	f.Add(append([]byte("DHR1DHR1\x00\x00\x00\x00\x00"), magic...))
	f.Fuzz(func(t *testing.T, raw []byte) {
		records(raw, func(r ref) {
			if r.at < recordHead || r.at+int64(r.size) > int64(len(raw)) {
				t.Errorf("a record at %d of %d bytes", r.at, r.size)
			}
		})
	})
}

// likely is a sample of a small board: 60 series, some noisy, some still.
func likely(i int, rnd *rand.Rand) hw.Telemetry {
	f := func(v float64) *float64 { v = math.Round(v*1000) / 1000; return &v }
	u := func(v uint64) *uint64 { return &v }
	x := hw.Telemetry{
		Load1: f(rnd.ExpFloat64()), Load5: f(rnd.ExpFloat64()), Load15: f(rnd.ExpFloat64()), CPUPercent: f(100 * rnd.Float64()),
		MemoryTotal: 4 << 30, MemoryAvailable: 3<<30 + 4096*uint64(rnd.IntN(10000)), MemoryUsed: 1<<30 + 4096*uint64(rnd.IntN(10000)),
		Data: &hw.Usage{Used: 100<<30 + 4096*uint64(i), Free: 100<<30 - 4096*uint64(i)}, Pressure: &hw.Pressure{MemorySome: math.Round(100*rnd.Float64()) / 100, IOSome: math.Round(300*rnd.Float64()) / 100},
		Throttling:   &hw.Throttling{Now: new(false), Count: u(0), UnderVoltage: new(false)},
		Temperatures: map[string]float64{}, Disks: map[string]hw.DiskUse{}, Links: map[string]hw.Link{"eth0": {Up: true, Changes: 3}, "wlan0": {}},
		Agent: hw.Process{RSS: 40<<20 + 4096*uint64(rnd.IntN(500)), Anonymous: 20<<20 + 4096*uint64(rnd.IntN(200)), CPUPercent: f(3 * rnd.Float64()), Written: 512 * uint64(i) * 40},
	}
	for s := range 6 {
		x.Temperatures[fmt.Sprintf("chip%d temp", s)] = math.Round((45+3*rnd.NormFloat64())*10) / 10
	}
	for d := range 4 {
		x.Disks[fmt.Sprintf("sd%c", 'a'+d)] = hw.DiskUse{ReadBytes: 1<<40 + uint64(i)*4096*uint64(1+d), WrittenBytes: 1<<41 + uint64(i)*8192*uint64(rnd.IntN(3)),
			ReadMS: f(rnd.ExpFloat64() * 3), WriteMS: f(rnd.ExpFloat64() * 5), FlushMS: f(rnd.ExpFloat64() * 9), Busy: f(rnd.Float64() * 5), Errors: u(2)}
	}
	return x
}

func TestBudgetLastsAsTheCommentSays(t *testing.T) {
	dir := t.TempDir()
	r := opened(t, dir)
	rnd := rand.New(rand.NewPCG(1, 1))
	series := 0
	for i := range 8640 / 8 { // three hours
		x := likely(i, rnd)
		x.At = noon.Add(time.Duration(i) * 10 * time.Second)
		series = len(x.Series())
		must(t, r.Add(x))
		if i%30 == 29 {
			must(t, r.Flush())
		}
	}
	must(t, r.Close())
	fine, blocks := sizeOf(t, dir)*8, len(r.fine.refs())*8
	// The coarse rows: those of a day, written as blocks of six hours.
	for i := range 24*60 + 15 {
		x := likely(i, rnd)
		x.At = noon.Add(24*time.Hour + time.Duration(i)*time.Minute)
		r.buffer = nil
		r.closed = false
		must(t, r.Add(x))
	}
	var coarse int
	for _, b := range r.pending {
		body, err := b.encode()
		must(t, err)
		coarse += len(body)
	}
	for _, x := range r.coarse.refs() {
		coarse += x.size
	}
	t.Logf("%d series: fine %d bytes a day in %d writes, %.1f days in the budget; coarse %d bytes a day, %.0f days", series,
		fine, blocks, float64(defaultBytes*3/4)/float64(fine), coarse, float64(defaultBytes/4)/float64(coarse))
	if fine > 1_500_000 || coarse > 60_000 {
		t.Errorf("more than the package comment says")
	}
}

func BenchmarkReadOfAFullRing(b *testing.B) {
	dir := b.TempDir()
	r := opened(b, dir)
	rnd := rand.New(rand.NewPCG(1, 1))
	for i := range 2 * 8640 {
		x := likely(i, rnd)
		x.At = noon.Add(time.Duration(i-2*8640) * 10 * time.Second)
		must(b, r.Add(x))
	}
	for b.Loop() {
		h, err := r.Read(wire.HistoryRequest{}, noon)
		must(b, err)
		if h.Count != defaultPoints {
			b.Fatal(h.Count)
		}
	}
}

// Coarse rows wait for hours to be written; a restart must not cost them, or a
// device that restarts each day has no curve of months.
func TestRestartsLoseNoCoarseRows(t *testing.T) {
	dir := t.TempDir()
	const n, restarts = 4 * 60, 5
	for k := range restarts {
		r := opened(t, dir)
		for i := range n {
			must(t, r.Add(sampleAt(noon.Add(time.Duration(k*n+i)*time.Minute), 1)))
		}
		must(t, r.Close())
	}
	r, err := Load(dir)
	must(t, err)
	blocks := r.pending
	for _, x := range r.coarse.refs() {
		b, err := r.coarse.load(x)
		must(t, err)
		blocks = append(blocks, b)
	}
	samples := 0.0
	for _, b := range blocks {
		for _, c := range b.cols {
			if c.name == "load1" && c.stat == statCount {
				for _, v := range c.values {
					samples += v
				}
			}
		}
	}
	samples += r.bucket.cols["load1"].n
	if samples != n*restarts {
		t.Errorf("the coarse rows have %g of %d samples", samples, n*restarts)
	}
}
