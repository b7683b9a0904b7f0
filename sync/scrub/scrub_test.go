package scrub

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
)

const childEnv = "DEIMOS_TEST_SCRUB_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		childThatScrubs(dir)
		return
	}
	os.Exit(m.Run())
}

// clock stands still but while somebody rests.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func (c *clock) Rest(ctx context.Context, d time.Duration) error {
	c.add(d)
	return ctx.Err()
}

// huge is a volume whose chunks take no memory. They are large, so that few of
// them fill a disk.
type huge struct {
	id, dir string
	size    int64
	ids     []chunk.ID
	get     func(chunk.ID) error // nil: all is well

	mu   sync.Mutex
	gone map[chunk.ID]bool
	read map[chunk.ID]int
}

var nothing = make([]byte, 64<<20) // never touched

func random(t testing.TB) *rand.Rand {
	return rand.New(rand.NewPCG(testenv.Seed(t), 0))
}

func randomID(rng *rand.Rand) (id chunk.ID) {
	for i := range id {
		id[i] = byte(rng.Uint32())
	}
	return id
}

func newHuge(t testing.TB, chunks int) *huge {
	rng := random(t)
	v := &huge{id: "huge", dir: t.TempDir(), size: int64(len(nothing)), gone: map[chunk.ID]bool{}, read: map[chunk.ID]int{}}
	if err := os.Mkdir(filepath.Join(v.dir, "chunks"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range chunks {
		v.ids = append(v.ids, randomID(rng))
	}
	slices.SortFunc(v.ids, compare)
	return v
}

func compare(a, b chunk.ID) int { return bytes.Compare(a[:], b[:]) }

func (v *huge) ID() string         { return v.id }
func (v *huge) Dir() string        { return v.dir }
func (v *huge) Lost() []store.Loss { return nil }
func (v *huge) Stats() store.Stats { return store.Stats{Used: int64(len(v.ids)) * v.size} }

// Stretch reads one chunk after the other.
func (v *huge) Stretch(_ context.Context, after chunk.ID, bytes int64) (store.Stretch, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	i, found := slices.BinarySearchFunc(v.ids, after, compare)
	if found {
		i++
	}
	n := min(len(v.ids)-i, int((bytes+v.size-1)/v.size))
	these := slices.Clone(v.ids[i : i+n])
	s := store.Stretch{Next: func(context.Context) ([]store.Verified, error) {
		if len(these) == 0 {
			return nil, nil
		}
		id := these[0]
		these = these[1:]
		size, err := v.look(id)
		if err != nil && wire.ProblemOf(err).Code == wire.CodeInternal {
			return nil, err
		}
		return []store.Verified{{ID: id, Size: size, Err: err}}, nil
	}}
	if n > 0 {
		s.Last = these[n-1]
	}
	return s, nil
}

func (v *huge) Get(_ context.Context, id chunk.ID) ([]byte, error) {
	size, err := v.look(id)
	return nothing[:size], err
}

func (v *huge) look(id chunk.ID) (int64, error) {
	v.mu.Lock()
	gone := v.gone[id]
	v.read[id]++
	v.mu.Unlock()
	if gone {
		return 0, wire.FailedBecause(wire.CodeNotFound, "dropped")
	}
	if v.get != nil {
		if err := v.get(id); err != nil {
			return 0, err
		}
	}
	return v.size, nil
}

// reads is what was read when, by the fake clock.
type reads struct {
	at    []time.Time
	bytes []int64
}

// bursts is how many there are with more than an hour between them.
func (r reads) bursts() int {
	n := 0
	for i := range r.at {
		if i == 0 || r.at[i].Sub(r.at[i-1]) > time.Hour {
			n++
		}
	}
	return n
}

// within tells whether the rate was kept, from each read to each later one of
// its burst: what was begun in that time had its time.
func (r reads) within(t *testing.T, rate int64) {
	t.Helper()
	var sum int64
	first := time.Time{}
	for i, at := range r.at {
		if i == 0 || at.Sub(r.at[i-1]) > time.Hour {
			first, sum = at, 0
		}
		if most := int64(at.Sub(first).Seconds()*float64(rate)) + 1000; sum > most {
			t.Fatalf("%d bytes were read in %s, the limit allows %d", sum, at.Sub(first), most)
		}
		sum += r.bytes[i]
	}
}

// scrubUntil runs a scrub until done says so, which is asked at each rest, or a
// thousand days have passed.
func scrubUntil(t *testing.T, c *clock, v Volume, pace Pace, opt Options, done func(wire.Scrub) bool) wire.Scrub {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var s *Scrubber
	var last wire.Scrub
	end, ok := c.Now().Add(1000*24*time.Hour), false
	opt.Now = c.Now
	opt.Rest = func(ctx context.Context, d time.Duration) error {
		if p := s.Progress(); len(p) > 0 {
			last = p[0]
			ok = done(last)
		}
		if ok || c.Now().After(end) {
			cancel()
			return context.Canceled
		}
		return c.Rest(ctx, d)
	}
	s = New(pace, opt)
	s.Run(ctx, v, "sda")
	if !ok {
		t.Fatalf("it did not come to that; it is at %+v", last)
	}
	return last
}

func noted(v *huge, c *clock) *reads {
	r := &reads{}
	v.get = func(chunk.ID) error {
		r.at, r.bytes = append(r.at, c.Now()), append(r.bytes, v.size)
		return nil
	}
	return r
}

func verified(p wire.Scrub) bool { return !p.Verified.IsZero() }

type idle func() bool

func (f idle) Idle() bool { return f() }

// 256 GiB on a disk that nobody uses.
func TestEachChunkIsReadOnceWithinThePeriodInFewBurstsBelowTheLimit(t *testing.T) {
	c, v := newClock(), newHuge(t, 4096)
	r, began := noted(v, c), c.Now()
	p := scrubUntil(t, c, v, Pace{}, Options{}, verified)
	if took := p.Verified.Sub(began); took > DefaultPeriod*6/7+time.Hour || took < DefaultPeriod/2 {
		t.Errorf("the round took %s", took)
	}
	for _, id := range v.ids {
		if v.read[id] != 1 {
			t.Fatalf("chunk %s was read %d times", id, v.read[id])
		}
	}
	if n := r.bursts(); n > 73 || n < 60 {
		t.Errorf("it was read in %d bursts", n)
	}
	r.within(t, DefaultRate)
}

func TestASmallVolumeIsReadInOneBurst(t *testing.T) {
	c, v := newClock(), newHuge(t, 4)
	v.size = 1 << 20
	r := noted(v, c)
	p := scrubUntil(t, c, v, Pace{}, Options{}, verified)
	if r.bursts() != 1 || len(r.at) != 4 || p.Verified.Sub(r.at[0]) > time.Minute {
		t.Errorf("%d reads in %d bursts, ended %s after the first", len(r.at), r.bursts(), p.Verified.Sub(r.at[0]))
	}
}

// Orders without a pause are no reason to be late.
func TestABusyDiskIsLeftAloneUntilItMustBeRead(t *testing.T) {
	c, v := newClock(), newHuge(t, 4096)
	r, began := noted(v, c), c.Now()
	p := scrubUntil(t, c, v, Pace{}, Options{Idle: idle(func() bool { return false })}, verified)
	must := began.Add(DefaultPeriod / 7 * 6).Add(-Pace{Rate: DefaultRate}.takes(v.Stats().Used))
	if first := r.at[0]; first.Before(must) {
		t.Errorf("it was read at %s though it was busy; it must be from %s on", first, must)
	}
	if took := p.Verified.Sub(began); took > DefaultPeriod {
		t.Errorf("the round took %s", took)
	}
	r.within(t, DefaultRate)
}

func TestItRestsWhileOrdersAreAtWork(t *testing.T) {
	c, v := newClock(), newHuge(t, 4096)
	began := c.Now()
	busy := func() bool { return c.Now().Sub(began)/(15*time.Minute)%2 == 0 }
	v.get = func(chunk.ID) error {
		if busy() {
			return errors.New("it was read while orders were at work")
		}
		return nil
	}
	scrubUntil(t, c, v, Pace{}, Options{Idle: idle(func() bool { return !busy() })}, func(p wire.Scrub) bool {
		if p.Problem != "" {
			t.Fatal(p.Problem)
		}
		return p.Share > 0.9
	})
}

// A device that was off for a month.
func TestALateRoundCatchesUpAndSaysSo(t *testing.T) {
	c, v := newClock(), newHuge(t, 4096)
	scrubUntil(t, c, v, Pace{}, Options{}, func(p wire.Scrub) bool { return p.Share > 0.3 })
	read := len(v.read)
	c.add(40 * 24 * time.Hour)
	woke, told := c.Now(), []bool{}
	p := scrubUntil(t, c, v, Pace{}, Options{Late: func(_ string, late bool, _ string) { told = append(told, late) }}, verified)
	left := v.Stats().Used - int64(read)*v.size
	if took := p.Verified.Sub(woke); took > settleTime+2*(Pace{Rate: DefaultRate}).takes(left) {
		t.Errorf("it took %s for %d GiB", took, left>>30)
	}
	if !told[0] || told[len(told)-1] {
		t.Errorf("lateness was told as %v first and %v last", told[0], told[len(told)-1])
	}
	if again := sum(v.read) - len(v.ids); again > 64 {
		t.Errorf("%d chunks were read twice", again)
	}
}

func sum(m map[chunk.ID]int) (n int) {
	for _, v := range m {
		n += v
	}
	return n
}

func TestAFasterPaceIsInForceAtOnce(t *testing.T) {
	c, v := newClock(), newHuge(t, 64)
	began := c.Now()
	p := scrubUntil(t, c, v, Pace{Period: 24 * time.Hour, Rate: 1 << 20}, Options{}, verified)
	if p.Verified.Sub(began) > 24*time.Hour {
		t.Errorf("it took %s", p.Verified.Sub(began))
	}
}

func TestWhatIsPutAndDroppedMeanwhileIsNoError(t *testing.T) {
	c, v := newClock(), newHuge(t, 1000)
	behind, ahead := chunk.ID{0, 1}, chunk.ID{0xff, 0xfe}
	v.gone[v.ids[900]] = true
	put := false
	p := scrubUntil(t, c, v, Pace{}, Options{}, func(p wire.Scrub) bool {
		if p.Problem != "" || p.Lost > 0 {
			t.Fatalf("%+v", p)
		}
		if p.Share > 0.5 && !put {
			put = true
			v.mu.Lock()
			v.ids = append(v.ids, behind, ahead)
			slices.SortFunc(v.ids, compare)
			v.mu.Unlock()
		}
		return verified(p)
	})
	if v.read[ahead] != 1 || v.read[behind] != 0 {
		t.Errorf("ahead was read %d times, behind %d", v.read[ahead], v.read[behind])
	}
	scrubUntil(t, c, v, Pace{}, Options{}, func(q wire.Scrub) bool { return q.Verified.After(p.Verified) })
	if v.read[behind] != 1 {
		t.Errorf("what was put behind the walk was read %d times by the next round", v.read[behind])
	}
}

func TestAVolumeThatCannotBeReadIsTriedAgainAndSaysWhy(t *testing.T) {
	c, v := newClock(), newHuge(t, 1000)
	broken, tries := true, 0
	v.get = func(id chunk.ID) error {
		if broken && id == v.ids[2] {
			tries++
			return errors.New("the cable is out")
		}
		return nil
	}
	at := scrubUntil(t, c, v, Pace{}, Options{}, func(p wire.Scrub) bool { return p.Late })
	if !strings.Contains(at.Problem, "the cable is out") || at.Share != 0 || at.Bytes != 0 { // what stands before it is read again
		t.Errorf("%+v", at)
	}
	if tries < 20 || tries > 24*22 {
		t.Errorf("it was tried %d times", tries)
	}
	broken = false
	if p := scrubUntil(t, c, v, Pace{}, Options{}, verified); p.Problem != "" || p.Late {
		t.Errorf("%+v", p)
	}
}

func TestAClockThatGoesBackHoldsNothingUp(t *testing.T) {
	c, v := newClock(), newHuge(t, 1000)
	c.add(30 * 365 * 24 * time.Hour)
	scrubUntil(t, c, v, Pace{}, Options{}, func(p wire.Scrub) bool { return p.Share > 0.1 })
	c.add(-30 * 365 * 24 * time.Hour)
	began := c.Now()
	if p := scrubUntil(t, c, v, Pace{}, Options{}, verified); p.Verified.Sub(began) > DefaultPeriod {
		t.Errorf("it took %s", p.Verified.Sub(began))
	}
	// And while it reads.
	set := false
	v2 := newHuge(t, 1000)
	v2.get = func(id chunk.ID) error {
		if !set && id == v2.ids[500] {
			set = true
			c.add(-3 * 365 * 24 * time.Hour)
		}
		return nil
	}
	end := c.Now().Add(2 * DefaultPeriod)
	if p := scrubUntil(t, c, v2, Pace{}, Options{}, verified); !set || p.Verified.After(end) {
		t.Errorf("%+v", p)
	}
}

// Two volumes of one disk take turns, those of two disks do not wait for one another.
func TestOneVolumeOfADiskAtATime(t *testing.T) {
	for name, disks := range map[string][2]string{"one disk": {"sda", "sda"}, "two disks": {"sda", "sdb"}} {
		t.Run(name, func(t *testing.T) {
			c := newClock()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			same := disks[0] == disks[1]
			var reading atomic.Int32
			met := make(chan struct{})
			var first sync.Once
			s := New(Pace{}, Options{Now: c.Now, Rest: c.Rest})
			var wg sync.WaitGroup
			for i, disk := range disks {
				v := newHuge(t, 20)
				v.id = fmt.Sprint(i)
				v.get = func(chunk.ID) error {
					n := reading.Add(1)
					defer reading.Add(-1)
					switch {
					case same && n > 1:
						t.Error("two volumes of one disk were read at once")
					case same:
						first.Do(func() { time.Sleep(300 * time.Millisecond) }) // the other is due long before that, and would be in here
					case n == 2:
						close(met)
						cancel()
					default:
						<-ctx.Done() // until the other disk's reader is here, too
					}
					return nil
				}
				wg.Go(func() { s.Run(ctx, v, disk) })
			}
			if same {
				for ctx.Err() == nil {
					p := s.Progress()
					if len(p) == 2 && verified(p[0]) && verified(p[1]) {
						cancel()
					}
				}
			}
			wg.Wait()
			if !same {
				select {
				case <-met:
				default:
					t.Error("the volumes of two disks were not read at the same time")
				}
			}
		})
	}
}

// What follows is with real volumes.

func openVolume(t testing.TB, dir string) *store.Volume {
	t.Helper()
	v, err := store.Open(dir, store.Options{FloorBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v
}

func fill(t testing.TB, v *store.Volume, n, size int) (datas [][]byte) {
	t.Helper()
	rng := random(t)
	for range n {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		if err := v.Put(t.Context(), chunk.Sum(data), data); err != nil {
			t.Fatal(err)
		}
		datas = append(datas, data)
	}
	return datas
}

// flip changes one bit of a chunk where it lies on disk.
func flip(t testing.TB, dir string, data []byte) {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(dir, "chunks", "*.seg"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range logs {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		raw, err := io.ReadAll(io.LimitReader(f, 32<<20))
		if err != nil {
			t.Fatal(err)
		}
		if i := bytes.Index(raw, data); i >= 0 {
			if _, err := f.WriteAt([]byte{raw[i+len(data)/2] ^ 1}, int64(i+len(data)/2)); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("the chunk is in no segment")
}

// counted counts the chunks that are read of a volume.
type counted struct {
	*store.Volume
	reads int
}

func (v *counted) Get(ctx context.Context, id chunk.ID) ([]byte, error) {
	v.reads++
	return v.Volume.Get(ctx, id)
}

func (v *counted) Stretch(ctx context.Context, after chunk.ID, bytes int64) (store.Stretch, error) {
	s, err := v.Volume.Stretch(ctx, after, bytes)
	next := s.Next
	s.Next = func(ctx context.Context) ([]store.Verified, error) {
		some, err := next(ctx)
		v.reads += len(some)
		return some, err
	}
	return s, err
}

func TestAStartReadsNothing(t *testing.T) {
	v := &counted{Volume: openVolume(t, t.TempDir())}
	fill(t, v.Volume, 20, 10_000)
	c := newClock()
	day := c.Now().Add(24 * time.Hour)
	for range 3 {
		scrubUntil(t, c, v, Pace{}, Options{}, func(wire.Scrub) bool { return c.Now().After(day) })
	}
	if v.reads != 0 {
		t.Errorf("%d chunks were read", v.reads)
	}
}

func TestAFlippedBitIsFoundWithinARoundAndKnownAfterARestart(t *testing.T) {
	dir := t.TempDir()
	v := openVolume(t, dir)
	datas := fill(t, v, 40, 50_000)
	flip(t, dir, datas[17])
	c := newClock()
	found := 0
	p := scrubUntil(t, c, v, Pace{}, Options{}, func(p wire.Scrub) bool {
		found = max(found, p.Lost)
		return verified(p)
	})
	want := chunk.Sum(datas[17])
	if lost := v.Lost(); len(lost) != 1 || lost[0].ID != want || found != 1 {
		t.Fatalf("lost are %v, the round says %d", lost, found)
	}
	if p.Problem != "" {
		t.Error(p.Problem)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	// The store's own look at its newest log is not what finds it: more is behind.
	v = openVolume(t, dir)
	counting := &counted{Volume: v}
	scrubUntil(t, c, counting, Pace{}, Options{}, func(wire.Scrub) bool { return true })
	if lost := v.Lost(); len(lost) != 1 || lost[0].ID != want || counting.reads != 1 {
		t.Fatalf("after a restart lost are %v, %d chunks were read", lost, counting.reads)
	}
	if err := v.Drop(t.Context(), []chunk.ID{want}); err != nil {
		t.Fatal(err)
	}
	soon := c.Now().Add(3 * look)
	scrubUntil(t, c, counting, Pace{}, Options{}, func(wire.Scrub) bool { return c.Now().After(soon) })
	if rec, err := readRecord(dir); err != nil || len(rec.Lost) != 0 {
		t.Errorf("what was dropped is still noted: %v, %v", rec.Lost, err)
	}
}

// The record goes with the chunks, and is in nobody's way.
func TestAVolumeThatIsErasedTakesItsRecordAlong(t *testing.T) {
	dir := t.TempDir()
	v := openVolume(t, dir)
	fill(t, v, 3, 1000)
	scrubUntil(t, newClock(), v, Pace{}, Options{}, verified)
	if _, err := os.Stat(recordPath(dir)); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if err := store.Erase(dir); err != nil {
		t.Fatal(err)
	}
	openVolume(t, dir)
	if _, err := os.Stat(recordPath(dir)); err == nil {
		t.Error("a new volume has an old one's record")
	}
}

func TestADamagedOrForeignRecordBeginsANewRound(t *testing.T) {
	v := openVolume(t, t.TempDir())
	fill(t, v, 3, 1000)
	for name, raw := range map[string]string{
		"damaged": `{"volume":`, "foreign": `{"volume":"01J","began":"2026-01-01T00:00:00Z","cursor":"` + strings.Repeat("f", 64) + `"}`,
		"a cursor that is none": `{"volume":"` + v.ID() + `","began":"2026-05-04T00:00:00Z","cursor":"odd","lost":["odd"]}`, "large": strings.Repeat(" ", maxRecord+1),
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(recordPath(v.Dir()), []byte(raw), 0o600); err != nil {
				t.Fatal(err)
			}
			c := &counted{Volume: v}
			scrubUntil(t, newClock(), c, Pace{}, Options{}, verified)
			if c.reads != 3 {
				t.Errorf("%d chunks were read", c.reads)
			}
		})
	}
}

// slowly makes a chunk of 10,000 bytes take a minute.
var slowly = Pace{Period: DefaultPeriod, Rate: 10_000 / 60}

// childThatScrubs reads a volume, and says each chunk when it has read it; it goes
// on when it is told to.
func childThatScrubs(dir string) {
	v, err := store.Open(dir, store.Options{FloorBytes: -1})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	c := newClock()
	c.add(DefaultPeriod)
	s := New(slowly, Options{Now: c.Now, Rest: c.Rest})
	s.Run(context.Background(), told{v, bufio.NewReader(os.Stdin)}, "sda")
}

type told struct {
	*store.Volume
	in *bufio.Reader
}

func (v told) Stretch(ctx context.Context, after chunk.ID, bytes int64) (store.Stretch, error) {
	s, err := v.Volume.Stretch(ctx, after, bytes)
	next := s.Next
	s.Next = func(ctx context.Context) ([]store.Verified, error) {
		some, err := next(ctx)
		for _, c := range some {
			fmt.Println(c.ID)
			if _, err := v.in.ReadByte(); err != nil {
				os.Exit(1)
			}
		}
		return some, err
	}
	return s, err
}

func TestAScrubThatIsKilledGoesOnWhereItWas(t *testing.T) {
	dir := t.TempDir()
	v := openVolume(t, dir)
	datas := fill(t, v, 100, 10_000)
	var all []string // in the order of ids
	for _, data := range datas {
		all = append(all, chunk.Sum(data).String())
	}
	slices.Sort(all)
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	began, err := os.Create(recordPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(began, `{"volume":%q,"began":%q}`, v.ID(), newClock().Now().Format(time.RFC3339))
	if err := began.Close(); err != nil {
		t.Fatal(err)
	}
	const before, perSave = 47, int(saveEvery / time.Minute) // chunks that the child reads, and between two saves
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+dir)
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for i := range before {
		// Within the minutes after which it saves, it may read in any order.
		if !lines.Scan() || slices.Index(all, lines.Text())/perSave != i/perSave {
			t.Fatalf("chunk %d of the round is %q, want one of those about %s", i, lines.Text(), all[i])
		}
		if _, err := in.Write([]byte{'\n'}); err != nil {
			t.Fatal(err)
		}
	}
	if !lines.Scan() { // it is in the middle of the next one
		t.Fatal("it ended")
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed
	c := newClock()
	c.add(DefaultPeriod + time.Hour)
	counting := &counted{Volume: openVolume(t, dir)}
	scrubUntil(t, c, counting, slowly, Options{}, verified)
	again := counting.reads - (len(all) - before)
	t.Logf("%d chunks of a minute each were read again", again)
	if most := 2 * perSave; again < 0 || again > most {
		t.Errorf("%d chunks were read again, %d at most should be", again, most)
	}
}

func BenchmarkScrub(b *testing.B) {
	v := openVolume(b, b.TempDir())
	fill(b, v, 64, 1<<20)
	b.SetBytes(64 << 20)
	for b.Loop() {
		c := newClock()
		ctx, cancel := context.WithCancel(b.Context())
		s := New(Pace{Rate: 1 << 40}, Options{Now: c.Now})
		s.opt.Rest = func(ctx context.Context, d time.Duration) error {
			if p := s.Progress(); len(p) > 0 && verified(p[0]) {
				cancel()
			}
			c.add(30 * 24 * time.Hour)
			return ctx.Err()
		}
		os.Remove(recordPath(v.Dir()))
		s.Run(ctx, v, "sda")
		cancel()
	}
}
