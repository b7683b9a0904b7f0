package agent

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

func mustHours(t *testing.T, text string) policy.Hours {
	t.Helper()
	var h policy.Hours
	if err := h.UnmarshalText([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return h
}

func TestLimitsOfTheLineAreReadAndMistakesNamed(t *testing.T) {
	c, _, err := loadText(t, "[transfer]\nmax_down_bytes_per_second = 1_000_000\nmax_up_bytes_per_second = 16384\nmonthly_bytes = 50_000_000_000\nhours = \"22:00-06:00\"\n")
	want := TransferConfig{Down: 1_000_000, Up: 16384, Monthly: 50_000_000_000, Hours: mustHours(t, "22:00-06:00")}
	if err != nil || c.Transfer != want {
		t.Fatalf("%+v, %v", c.Transfer, err)
	}
	if c, _, err := loadText(t, "[transfer]\nmax_up_bytes_per_second = 0\nhours = \"\"\n"); err != nil || c.Transfer != (TransferConfig{}) || c.owned[wire.SettingUpRate] {
		t.Errorf("no limits: %+v, %v", c.Transfer, err)
	}
	for text, says := range map[string]string{
		"max_up_bytes_per_second = 1000":   "at least 16384",
		"max_down_bytes_per_second = -1":   "max_down_bytes_per_second",
		"monthly_bytes = 1_000_000":        "at least 67108864",
		"hours = \"22-6\"":                 "22:00-06:00",
		"hours = \"22:00-06:00 \"":         "22:00-06:00",
		"hours = \"24:00-06:00\"":          "22:00-06:00",
		"hours = \"22:60-06:00\"":          "22:00-06:00",
		"hours = \"+2:00-06:00\"":          "22:00-06:00",
		"hours = \"06:00-06:00\"":          "two different times",
		"hours = \"00:00-00:00\"":          "two different times",
		"hour = \"22:00-06:00\"":           "transfer.hour",
		"max_up_bytes_per_second = \"1M\"": "max_up_bytes_per_second",
	} {
		_, path, err := loadText(t, "[transfer]\n"+text+"\n")
		if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestTheFleetTakesNoMoreOfTheLineThanTheOwnerAllows(t *testing.T) {
	d := newDesk(t, t.TempDir(), "[transfer]\nmax_up_bytes_per_second = 100000\nhours = \"22:00-06:00\"\n")
	for version, c := range []struct{ want, runs, code string }{
		{"50000", "50000", ""}, {"100000", "100000", ""}, {"100001", "100000", wire.CodePolicy},
		{"0", "100000", wire.CodePolicy}, // no limit is more than any
		{"1000", "100000", wire.CodeBadBody},
	} {
		r := d.mustOrder(uint64(version+1), map[string]string{wire.SettingUpRate: c.want, wire.SettingDownRate: "20000", wire.SettingMonthly: "1000000000"})
		d.wantRunning(r, wire.SettingUpRate, c.runs)
		d.wantRunning(r, wire.SettingDownRate, "20000") // what the owner leaves open is the fleet's
		if r.Refused[wire.SettingUpRate].Code != c.code {
			t.Errorf("%s: %+v", c.want, r.Refused)
		}
		if f := d.inForce().transfer; f.Hours != (mustHours(t, "22:00-06:00")) || f.Monthly != 1_000_000_000 {
			t.Errorf("in force: %+v", f)
		}
	}
}

// meter is a device's count of its traffic at a time that the test sets.
type meter struct {
	*traffic
	t    *testing.T
	path string
	at   time.Time
	sure bool
}

// newMeter is an agent's start: what the last one has written is there.
func newMeter(t *testing.T, path string, at time.Time) *meter {
	t.Helper()
	m := &meter{t: t, path: path, at: at, sure: true}
	clock := NewClock(at)
	clock.system = func() time.Time { return m.at }
	clock.Trust(at, 0)
	var err error
	if m.traffic, err = openTraffic(path, clock, discardLog()); err != nil {
		t.Fatal(err)
	}
	m.zone = time.UTC
	return m
}

// written does what keep does, if it is due.
func (m *meter) written() bool {
	select {
	case <-m.due:
		m.save(false)
		return true
	default:
		return false
	}
}

func (m *meter) bytes() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now.Bytes
}

var someDay = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// At whatever byte the power is cut, what is counted afterwards is no less than
// what was moved and no more than a step above, and the flash has seen few writes.
func TestTheMonthsVolumeOutlivesPowerCutsWithFewWrites(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	for _, limit := range []int64{0, 1 << 30, 1 << 40} {
		path := filepath.Join(t.TempDir(), trafficFile)
		m := newMeter(t, path, someDay)
		m.set(TransferConfig{Monthly: limit})
		step := m.step()
		var moved, cuts int64
		writes := 0
		const all = 1 << 30
		for moved < all {
			n := 1 + rng.IntN(64<<10)
			m.moved(n)
			moved += int64(n)
			if m.written() {
				writes++
			}
			if got := m.bytes(); got < moved || got > moved+cuts*step {
				t.Fatalf("%d bytes are counted, %d were moved, with %d cuts", got, moved, cuts)
			}
			if rng.IntN(4000) == 0 {
				cuts++
				m = newMeter(t, path, someDay)
				m.set(TransferConfig{Monthly: limit})
			}
		}
		if most := int(2*all/step + 2*cuts + 2); writes > most {
			t.Errorf("%d writes for %d steps and %d cuts", writes, all/step, cuts)
		}
		t.Logf("limit %d: %d writes for 1 GiB and %d power cuts, counted %.2f%% too much", limit, writes, cuts, 100*float64(m.bytes()-moved)/float64(moved))
		// An end in good order costs nothing.
		before := m.bytes()
		stop := make(chan struct{})
		close(stop)
		m.keep(stop)
		for range 3 {
			if m = newMeter(t, path, someDay); m.bytes() != before {
				t.Errorf("after an end in good order %d are counted, before it %d", m.bytes(), before)
			}
		}
	}
}

func TestBothDirectionsOfAConnectionAreCounted(t *testing.T) {
	m := newMeter(t, filepath.Join(t.TempDir(), trafficFile), someDay)
	here, there := net.Pipe()
	defer there.Close()
	conn := m.counted(here)
	go func() { io.CopyN(io.Discard, there, 1000); there.Write(make([]byte, 234)) }()
	if _, err := conn.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 234)); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if m.bytes() != 1234 {
		t.Errorf("%d bytes are counted", m.bytes())
	}
}

func wantRefusedUntil(t *testing.T, err error, code string, after time.Duration) {
	t.Helper()
	var p *wire.Problem
	if !errors.As(err, &p) || p.State != wire.Rejected || p.Code != code || p.After != after {
		t.Errorf("got %v (%+v), want %s for %s", err, p, code, after)
	}
}

func TestAMonthThatIsUsedUpEndsBulkUntilTheNext(t *testing.T) {
	path := filepath.Join(t.TempDir(), trafficFile)
	m := newMeter(t, path, someDay)
	const limit = 100 << 20
	m.set(TransferConfig{Monthly: limit})
	done, err := m.Reserve(chunk.MaxSize)
	if err != nil {
		t.Fatal(err)
	}
	m.moved(limit - 2*chunk.MaxSize + 1)
	// What is under way may use up the rest: nobody begins, and it is asked again soon.
	wantRefusedUntil(t, m.Check(), wire.CodeMetered, time.Minute)
	done()
	done() // counts once
	if err := m.Check(); err != nil {
		t.Errorf("what was set aside and not used: %v", err)
	}
	m.moved(chunk.MaxSize)
	firstOfDecember := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	wantRefusedUntil(t, m.Check(), wire.CodeMetered, firstOfDecember.Sub(someDay))
	if _, err := m.Reserve(1); err == nil {
		t.Error("it is set aside")
	}
	// Neither a restart nor a clock that nobody has confirmed begins a new month.
	m.save(true)
	m = newMeter(t, path, someDay)
	m.set(TransferConfig{Monthly: limit})
	m.clock = NewClock(someDay)
	m.clock.system = func() time.Time { return someDay.AddDate(1, 0, 0) }
	wantRefusedUntil(t, m.Check(), wire.CodeMetered, time.Minute)
	m = newMeter(t, path, firstOfDecember.Add(-time.Second))
	m.set(TransferConfig{Monthly: limit})
	wantRefusedUntil(t, m.Check(), wire.CodeMetered, time.Second)
	m.at = firstOfDecember
	if err := m.Check(); err != nil || m.bytes() != 0 {
		t.Errorf("in the next month: %v, %d bytes", err, m.bytes())
	}
	// That it has begun is on disk at once, and an earlier month does not come back.
	if !m.written() {
		t.Error("the new month is not written")
	}
	m.moved(1000)
	m.at = someDay
	if m.moved(1); m.bytes() != 1001 {
		t.Errorf("a clock that was set back has made of 1001 bytes %d", m.bytes())
	}
}

func TestTheMonthIsTheOwnersOwn(t *testing.T) {
	m := newMeter(t, filepath.Join(t.TempDir(), trafficFile), time.Date(2026, 11, 30, 22, 30, 0, 0, time.UTC))
	m.zone = time.FixedZone("", 3600)
	m.set(TransferConfig{Monthly: 64 << 20, Hours: mustHours(t, "00:00-06:00")})
	m.moved(64 << 20)
	wantRefusedUntil(t, m.Check(), wire.CodeMetered, 30*time.Minute)
	m.at = m.at.Add(30 * time.Minute)
	if err := m.Check(); err != nil {
		t.Errorf("at midnight, local time, of the first: %v", err)
	}
}

func TestOutsideItsHoursTheDeviceMovesNoBulk(t *testing.T) {
	m := newMeter(t, filepath.Join(t.TempDir(), trafficFile), someDay)
	m.set(TransferConfig{Hours: mustHours(t, "22:00-06:00"), Monthly: 64 << 20})
	wantRefusedUntil(t, m.Check(), wire.CodeQuietHours, 10*time.Hour)
	m.at = m.at.Add(10 * time.Hour)
	if err := m.Check(); err != nil {
		t.Error(err)
	}
	// Of two reasons, the one that lasts.
	m.moved(64 << 20)
	m.at = someDay
	wantRefusedUntil(t, m.Check(), wire.CodeMetered, time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC).Sub(someDay))
	// A device that does not know the time stays within its hours, too.
	m = newMeter(t, filepath.Join(t.TempDir(), trafficFile), someDay)
	m.set(TransferConfig{Hours: mustHours(t, "00:00-23:59")})
	m.clock = NewClock(someDay)
	wantRefusedUntil(t, m.Check(), wire.CodeQuietHours, time.Minute)
}

func TestADamagedCountBeginsAnewAndAFolderThatIsFullIsSaidOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, trafficFile)
	if err := os.WriteFile(path, []byte(`{"month":"2026-`), 0o600); err != nil {
		t.Fatal(err)
	}
	m := newMeter(t, path, someDay)
	if m.bytes() != 0 {
		t.Errorf("%d bytes", m.bytes())
	}
	if err := os.Rename(dir, dir+".gone"); err != nil {
		t.Fatal(err)
	}
	tries := 0
	for range 1000 {
		m.moved(64 << 10)
		if m.written() {
			tries++
		}
	}
	if tries > 12 || m.bytes() != 1000*64<<10 {
		t.Errorf("%d tries for 64 MB, %d bytes counted", tries, m.bytes())
	}
}

// What deimos-agent status tells of the line is what is in force and was counted,
// while the agent runs and afterwards.
func TestTheLineIsToldAsItIs(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, trafficFile)
	told := func() Line {
		t.Helper()
		l, err := readLine(dir)
		if err != nil || l == nil {
			t.Fatalf("%v, %v", l, err)
		}
		return *l
	}
	if l, err := readLine(dir); l != nil || err != nil {
		t.Errorf("before anything was moved: %v, %v", l, err)
	}
	m := newMeter(t, path, someDay)
	m.set(TransferConfig{})
	if m.written() {
		t.Error("written for nothing")
	}
	limits := TransferConfig{Down: 2_000_000, Up: 500_000, Monthly: 1 << 30, Hours: mustHours(t, "22:00-06:00")}
	m.set(limits)
	if !m.written() {
		t.Fatal("new limits are not told")
	}
	m.moved(100 << 20)
	m.written()
	l := told()
	if l.Limits != limits || l.Month != "2026-11" || l.Bytes != 100<<20 || l.Ahead != m.step() || l.Left == nil || *l.Left != 1<<30-100<<20-m.step() {
		t.Errorf("while it runs: %+v, left %v", l, l.Left)
	}
	if m.set(limits); m.written() {
		t.Error("the same limits are written again")
	}
	limits.Up = 0
	m.set(limits)
	m.moved(1)
	m.save(true)
	if l = told(); l.Limits != limits || l.Bytes != 100<<20+1 || l.Ahead != 0 || *l.Left != 1<<30-100<<20-1 {
		t.Errorf("afterwards: %+v, left %d", l, *l.Left)
	}
	// The next start knows what it has told.
	m = newMeter(t, path, someDay)
	if m.set(limits); m.written() {
		t.Error("after a start the same limits are written again")
	}
	m.moved(1 << 30)
	m.save(true)
	if l = told(); *l.Left != 0 {
		t.Errorf("beyond the volume %d are left", *l.Left)
	}
	if m.set(TransferConfig{}); !m.written() {
		t.Error("that there is no limit any more is not told")
	}
	if l = told(); l.Left != nil || l.Limits != (TransferConfig{}) {
		t.Errorf("without limits: %+v", l)
	}
	if err := os.WriteFile(path, []byte(`{"month":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := readLine(dir); l != nil || err != nil {
		t.Errorf("of a damaged file: %v, %v", l, err)
	}
}

// An order that is refused does not wait behind others of its kind, and its report
// says when to come back. What was begun before is left to its handler.
func TestAnOrderIsRefusedAtArrival(t *testing.T) {
	refuse := func(wire.Order) error { return wire.RejectedUntil(1500*time.Millisecond, wire.CodeBusy, "too slow") }
	var now atomic.Pointer[func(wire.Order) error]
	one := func(u *duties) {
		r := u.routes[kindTest]
		r.AtOnce = 1
		r.Refuse = func(o wire.Order) error {
			if f := now.Load(); f != nil {
				return (*f)(o)
			}
			return nil
		}
		u.routes[kindTest] = r
	}
	begun := make(chan string, 10)
	stuck := func(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		begun <- o.ID
		<-ctx.Done()
		return wire.Outcome{}, ctx.Err()
	}
	r := newRig(t, stuck, one)
	r.give(r.order("a"))
	await(t, "the first", begun)
	now.Store(&refuse)
	r.give(r.order("b"))
	rep := r.ends("b")
	if rep.State != wire.Rejected || rep.Code != wire.CodeBusy || rep.RetrySeconds != 2 || rep.Reason != "too slow" {
		t.Errorf("got %+v", rep)
	}
	if len(begun) != 0 {
		t.Error("it was begun")
	}
	// The next life is refused nothing that this one has begun.
	r = r.reborn((&counter{}).handle, one)
	r.give(r.order("a"))
	if rep := r.ends("a"); rep.State != wire.Succeeded {
		t.Errorf("what was begun before: %+v", rep)
	}
}
