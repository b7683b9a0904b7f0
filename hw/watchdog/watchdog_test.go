package watchdog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// machine is a watchdog as the kernel's core has it
// (https://docs.kernel.org/watchdog/watchdog-api.html, drivers/watchdog/watchdog_dev.c):
// open starts the clock, a write feeds, a 'V' in the last write lets close stop
// the clock, close without it feeds once more and lets it run.
type machine struct {
	options  uint32
	own      int   // timeout of the driver, in seconds
	most     int   // longer timeouts are refused; 0: none is
	nowayout bool  // nothing stops the clock
	busy     int   // how many opens are refused
	broken   error // of every write
	stuck    chan struct{}
	mute     bool // WDIOC_GETSUPPORT and WDIOC_GETTIMEOUT are not known

	mu      sync.Mutex
	timeout int
	opens   int
	open    bool
	release bool
	clock   *time.Timer
	feeds   int
	reset   time.Time // zero: never
}

const usual = unix.WDIOF_SETTIMEOUT | unix.WDIOF_MAGICCLOSE | unix.WDIOF_KEEPALIVEPING

func (m *machine) Open(string) (opened, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.opens++; m.opens <= m.busy {
		return nil, unix.EBUSY
	}
	m.timeout, m.open, m.release = m.own, true, false
	m.start()
	return m, nil
}

func (m *machine) start() {
	if m.clock != nil {
		m.clock.Stop()
	}
	m.clock = time.AfterFunc(time.Duration(m.timeout)*time.Second, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.reset = time.Now()
	})
}

func (m *machine) Write(b []byte) (int, error) {
	if m.stuck != nil {
		<-m.stuck
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken != nil {
		return 0, m.broken
	}
	m.release = bytes.ContainsRune(b, 'V')
	m.feeds++
	m.start()
	return len(b), nil
}

func (m *machine) Support() (uint32, string, error) {
	if m.mute {
		return 0, "", unix.EOPNOTSUPP
	}
	return m.options, "Software Watchdog\x1b[2J", nil
}

func (m *machine) SetTimeout(seconds int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.options&unix.WDIOF_SETTIMEOUT == 0 {
		return unix.EOPNOTSUPP
	}
	if m.most > 0 && seconds > m.most {
		return unix.EINVAL
	}
	m.timeout = seconds
	m.start()
	return nil
}

func (m *machine) Timeout() (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mute {
		return 0, unix.EOPNOTSUPP
	}
	return m.timeout, nil
}

func (m *machine) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.open {
		return unix.EBADF
	}
	m.open = false
	if (m.release || m.options&unix.WDIOF_MAGICCLOSE == 0) && !m.nowayout {
		m.clock.Stop()
	} else {
		m.start()
	}
	return nil
}

func (m *machine) state() (opens, feeds int, reset time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.opens, m.feeds, m.reset
}

// journal keeps what is logged.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

func (j *journal) count(words string) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Count(j.text.String(), words)
}

// kennel is a Dog that has m to feed.
func kennel(t *testing.T, m *machine) (*Dog, *journal) {
	t.Helper()
	t.Setenv("NOTIFY_SOCKET", "")
	j := &journal{}
	d, err := New(Options{Log: slog.New(slog.NewTextHandler(j, nil))})
	if err != nil {
		t.Fatal(err)
	}
	d.device = &device{path: "/dev/watchdog0", sys: t.TempDir(), open: m.Open, log: d.log}
	if m.nowayout {
		dir := filepath.Join(d.device.sys, "class/watchdog/watchdog0")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "nowayout"), []byte("1\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return d, j
}

// run runs d; stop ends it and waits.
func run(d *Dog) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { d.Run(ctx); close(ended) }()
	return func() { cancel(); <-ended }
}

// beats has p beat every d until stop.
func beats(p *Pulse, d time.Duration) (stop func()) {
	quit := make(chan struct{})
	go func() {
		for {
			select {
			case <-quit:
				return
			case <-time.After(d):
				p.Beat()
			}
		}
	}()
	return sync.OnceFunc(func() { close(quit) })
}

func TestLoopsThatBeatKeepTheMachineUpAndAStopInOrderDisarms(t *testing.T) {
	for name, m := range map[string]*machine{
		"60 s":                       {options: usual, own: 30},
		"at most 15 s":               {options: usual, own: 15, most: 15},
		"fixed timeout":              {options: unix.WDIOF_MAGICCLOSE, own: 5},
		"no magic close":             {options: unix.WDIOF_SETTIMEOUT, own: 30},
		"says nothing about itself":  {options: usual, own: 4, most: 4, mute: true},
		"in use for a while at boot": {options: usual, own: 30, busy: 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, _ := kennel(t, m)
				defer beats(d.Pulse("fast", 10*time.Second), 3*time.Second)()
				defer beats(d.Pulse("slow", time.Hour), 50*time.Minute)()
				stop := run(d)
				time.Sleep(5 * time.Hour)
				if _, feeds, reset := m.state(); !reset.IsZero() || feeds < 100 {
					t.Fatalf("reset at %v after %d feeds", reset, feeds)
				}
				stop()
				_, feeds, _ := m.state()
				time.Sleep(5 * time.Hour)
				if _, after, reset := m.state(); !reset.IsZero() || after != feeds {
					t.Fatalf("after the stop: reset at %v, fed %d times more", reset, after-feeds)
				}
			})
		})
	}
}

func TestTheDeviceGetsAMinuteIfItCan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 15}
		d, j := kennel(t, m)
		defer beats(d.Pulse("loop", time.Second), time.Second/2)()
		stop := run(d)
		time.Sleep(time.Hour + time.Second)
		_, feeds, _ := m.state()
		stop()
		if m.timeout != 60 || feeds != 181 { // at 0, then at a third of the timeout
			t.Errorf("timeout %d s, fed %d times in an hour", m.timeout, feeds)
		}
		if j.count("\x1b") != 0 || j.count("Software Watchdog") != 1 {
			t.Error("the driver's name is not cleaned, or not logged")
		}
	})
}

func TestOneLateLoopResetsTheMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30}
		d, j := kennel(t, m)
		defer beats(d.Pulse("alive", 10*time.Second), time.Second)()
		p := d.Pulse("dies", 40*time.Second)
		die := beats(p, 7*time.Second)
		defer run(d)()
		time.Sleep(33 * time.Minute)
		die()
		last := d.began.Add(time.Duration(p.last.Load()))
		time.Sleep(time.Until(last.Add(40 * time.Second)))
		if late := d.Stalled(); late != nil {
			t.Fatalf("late before its limit: %v", late)
		}
		time.Sleep(5 * time.Minute)
		_, _, reset := m.state()
		if reset.IsZero() || reset.Sub(last) > 40*time.Second+wished || reset.Sub(last) < 40*time.Second {
			t.Fatalf("reset %v after the last beat, with a limit of 40 s and a timeout of %v", reset.Sub(last), wished)
		}
		if late := d.Stalled(); len(late) != 1 || late["dies"] < 5*time.Minute {
			t.Errorf("stalled: %v", late)
		}
		if j.count("loop=dies") != 1 || j.count("goroutine ") == 0 {
			t.Error("the log does not say once which loop, and what the goroutines do")
		}
	})
}

func TestALoopThatBeatsAgainIsForgiven(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30}
		d, j := kennel(t, m)
		p := d.Pulse("loop", 10*time.Second)
		defer run(d)()
		// A process that is stopped for 55 s looks late when it goes on; the device
		// was last fed 35 s before the end, or less.
		for range 50 {
			time.Sleep(55 * time.Second)
			p.Beat()
			time.Sleep(2 * time.Second)
		}
		if _, _, reset := m.state(); !reset.IsZero() {
			t.Fatal("reset, although it always beat again in time for the device")
		}
		if late, again := j.count("makes no progress"), j.count("make progress again"); late != 50 || again != 50 {
			t.Errorf("said late %d times and forgiven %d times", late, again)
		}
	})
}

func TestALoopThatEndedInOrderIsNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30}
		d, _ := kennel(t, m)
		defer beats(d.Pulse("stays", 10*time.Second), time.Second)()
		d.Pulse("goes", time.Second).End()
		defer run(d)()
		time.Sleep(time.Hour)
		if _, _, reset := m.state(); !reset.IsZero() || d.Stalled() != nil {
			t.Error("a loop that ended counts as late")
		}
	})
}

func TestTheDeviceIsNotArmedBeforeThereIsALoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30}
		d, _ := kennel(t, m)
		stop := run(d)
		time.Sleep(72 * time.Hour)
		if opens, _, _ := m.state(); opens != 0 {
			t.Fatal("opened")
		}
		d.Pulse("loop", time.Hour)
		synctest.Wait()
		if opens, feeds, _ := m.state(); opens != 1 || feeds != 1 {
			t.Fatalf("with a loop: opened %d times, fed %d times", opens, feeds)
		}
		stop()
	})
}

func TestADogWithoutALoopNeverOpensTheDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30}
		d, _ := kennel(t, m)
		run(d)()
		if opens, _, _ := m.state(); opens != 0 {
			t.Error("opened")
		}
	})
}

func TestNowayoutIsSaidWhenItIsArmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30, nowayout: true}
		d, j := kennel(t, m)
		d.Pulse("loop", time.Hour)
		stop := run(d)
		time.Sleep(30 * time.Second)
		if j.count("nowayout") != 1 {
			t.Error("the log does not say it")
		}
		stopped := time.Now()
		stop()
		if j.count("stays armed") != 1 || j.count("is disarmed") != 0 {
			t.Error("the log calls it disarmed")
		}
		time.Sleep(time.Hour)
		if _, _, reset := m.state(); reset.Sub(stopped) != wished {
			t.Errorf("who starts the agent again has %v, not the whole timeout", reset.Sub(stopped))
		}
	})
}

func TestADeviceThatIsRefusedIsSaidOnceAndTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30, busy: 10}
		d, j := kennel(t, m)
		defer beats(d.Pulse("loop", time.Minute), time.Second)()
		defer run(d)()
		time.Sleep(9 * time.Minute)
		if j.count("another program feeds it") != 1 {
			t.Error("not said once")
		}
		time.Sleep(2 * time.Minute)
		if opens, feeds, _ := m.state(); opens != 11 || feeds == 0 {
			t.Errorf("opened %d times, fed %d times", opens, feeds)
		}
	})
}

func TestADeviceThatVanishedIsOpenedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30}
		d, j := kennel(t, m)
		defer beats(d.Pulse("loop", time.Minute), time.Second)()
		defer run(d)()
		time.Sleep(time.Minute)
		set := func(err error) { m.mu.Lock(); m.broken = err; m.mu.Unlock() }
		set(unix.ENODEV)
		time.Sleep(10 * time.Minute)
		set(nil)
		time.Sleep(2 * time.Minute)
		m.mu.Lock()
		defer m.mu.Unlock()
		if !m.open || m.opens < 2 || m.opens > 13 {
			t.Errorf("open %v after %d opens", m.open, m.opens)
		}
		if j.count("does not work") > m.opens {
			t.Error("said more often than it was tried")
		}
	})
}

func TestADeviceThatHangsHoldsUpNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{options: usual, own: 30, stuck: make(chan struct{})}
		d, j := kennel(t, m)
		p := d.Pulse("loop", 5*time.Second)
		stop := run(d)
		time.Sleep(10 * time.Second)
		if j.count("watchdog hangs") != 1 {
			t.Error("the log does not say that it hangs")
		}
		if d.Stalled()["loop"] != 10*time.Second {
			t.Errorf("stalled: %v", d.Stalled())
		}
		p.Beat()
		d.Ready("on")
		d.Pulse("another", time.Second).End()
		asked := time.Now()
		stop()
		if waited := time.Since(asked); waited > patience {
			t.Errorf("the end took %v", waited)
		}
		// When the driver comes back, it is disarmed after all.
		close(m.stuck)
		time.Sleep(time.Second)
		synctest.Wait()
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.open || !m.release {
			t.Error("not disarmed when it came back")
		}
	})
}

func TestWhatIsNoWatchdogIsRefusedButSystemdIsServed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "watchdog0")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", "@nobody")
	for _, path := range []string{file, file + "1"} {
		d, err := New(Options{Device: path, Log: slog.New(slog.DiscardHandler)})
		if err == nil || d == nil || d.device != nil || d.systemd == nil {
			t.Errorf("%s: dog %+v, error %v", path, d, err)
		}
	}
	if raw, err := os.ReadFile(file); err != nil || len(raw) != 0 {
		t.Error("it was written to")
	}
	if _, err := openKernel(file + "1"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("open: %v", err)
	}
	f, err := openKernel(file) // a file bears a write, but has none of the controls
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Support(); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("support: %v", err)
	}
	if _, err := f.Timeout(); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("timeout: %v", err)
	}
	if err := errors.Join(f.SetTimeout(60), f.Close()); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("set timeout: %v", err)
	}
}

// A terminal tells whether something was written to it.
func TestADeviceThatIsNoWatchdogGetsNothingWritten(t *testing.T) {
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		testenv.Cannot(t, "no terminals here: %v", err)
	}
	defer ptmx.Close()
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", "")
	for _, path := range []string{fmt.Sprintf("/dev/pts/%d", n), "/dev/null", "/dev/random"} {
		j := &journal{}
		d, err := New(Options{Device: path, Log: slog.New(slog.NewTextHandler(j, nil))})
		if err != nil {
			t.Fatal(err)
		}
		d.Pulse("loop", time.Hour)
		ended := make(chan struct{})
		go func() { d.guard(t.Context()); close(ended) }()
		select {
		case <-ended: // it is not tried again
		case <-time.After(time.Minute):
			t.Fatalf("%s: still tried, and the log says %s", path, j.text.String())
		}
		if j.count("is no watchdog") != 1 || j.count("is armed") != 0 || d.device.file != nil {
			t.Errorf("%s: the log says %s", path, j.text.String())
		}
	}
	waiting := []unix.PollFd{{Fd: int32(ptmx.Fd()), Events: unix.POLLIN}}
	if _, err := unix.Poll(waiting, 0); err != nil {
		t.Fatal(err)
	}
	if waiting[0].Revents&unix.POLLIN != 0 {
		t.Error("something was written to the terminal")
	}
}

func TestNoDogWatchesOverNothing(t *testing.T) {
	var d *Dog
	p := d.Pulse("loop", time.Second)
	p.Beat()
	p.End()
	d.Ready("on")
	d.Run(context.Background())
	if d.Stalled() != nil {
		t.Error("something is late")
	}
}
