package panel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/gpio"
	"periph.io/x/conn/v3/gpio/gpiotest"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"

	"github.com/deimos-edge/deimos/internal/testenv"
)

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

func (j *journal) log() *slog.Logger { return slog.New(slog.NewTextHandler(j, nil)) }

// change is when a light went on or off.
type change struct {
	at time.Time
	on bool
}

// recorder is a lamp that notes its changes.
type recorder struct {
	mu      sync.Mutex
	changes []change
	takes   int
	backs   int
	fails   error
	stuck   chan struct{}
}

func (r *recorder) name() string { return "recorder" }

func (r *recorder) take() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.takes++
	return r.fails
}

func (r *recorder) set(on bool) error {
	if r.stuck != nil {
		<-r.stuck
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fails == nil && (len(r.changes) == 0 || r.changes[len(r.changes)-1].on != on) {
		r.changes = append(r.changes, change{time.Now(), on})
	}
	return r.fails
}

func (r *recorder) giveBack() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.backs++
	return nil
}

// since is how long it was on, off, on … from the first time it went on after t;
// the last, unfinished step is left out.
func (r *recorder) since(t time.Time) []time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	var steps []time.Duration
	for i, c := range r.changes {
		if c.at.Before(t) || len(steps) == 0 && !c.on || i+1 == len(r.changes) {
			continue
		}
		steps = append(steps, r.changes[i+1].at.Sub(c.at))
	}
	return steps
}

// run runs l; stop ends it and waits.
func run(l *Light) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { l.Run(ctx); close(ended) }()
	return func() { cancel(); <-ended }
}

func TestPatternsCanBeToldApartByPeople(t *testing.T) {
	type kind struct {
		lit     string
		flashes int
		period  time.Duration
	}
	kinds := make(map[State]kind)
	for s, p := range patterns {
		if len(p)%2 != 0 {
			t.Fatalf("%s does not end with off", s)
		}
		k := kind{flashes: len(p) / 2}
		var on time.Duration
		for i, d := range p {
			if d < 80*ms || d > Longest {
				t.Errorf("%s: a step of %v is not seen, or looks steady", s, d)
			}
			if k.period += d; i%2 == 0 {
				on += d
			}
		}
		switch share := float64(on) / float64(k.period); {
		case share > 0.8:
			k.lit = "mostly lit"
		case share < 0.3:
			k.lit = "mostly dark"
		default:
			k.lit = "even"
		}
		for other, o := range kinds {
			if k.lit == o.lit && k.flashes == o.flashes && max(k.period, o.period) < 4*min(k.period, o.period) {
				t.Errorf("%s and %s look alike: %v, %v", s, other, k, o)
			}
		}
		kinds[s] = k
	}
	for _, s := range []State{Online, Working, Trouble, Waiting, Starting, Updating, identify} {
		if patterns[s] == nil {
			t.Errorf("%s has no pattern", s)
		}
	}
}

func TestTheOwnersPageShowsThePatterns(t *testing.T) {
	page, err := os.ReadFile("../../docs/panel.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\|.*\*\*([a-z]+)\*\*.*\| ([0-9, ]+) \|$`).FindAllStringSubmatch(string(page), -1)
	shown := make(map[State]string)
	for _, r := range rows {
		shown[State(r[1])] = r[2]
	}
	for s, p := range patterns {
		var steps []string
		for _, d := range p {
			steps = append(steps, fmt.Sprint(d.Milliseconds()))
		}
		if want := strings.Join(steps, ", "); shown[s] != want {
			t.Errorf("%s is %q, and the page says %q", s, want, shown[s])
		}
	}
	if len(shown) != len(patterns) {
		t.Errorf("the page shows %d patterns, there are %d", len(shown), len(patterns))
	}
}

func TestTheLightShowsTheStateAndChangesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{}
		l := newLight(r, slog.New(slog.DiscardHandler))
		defer run(l)()
		l.Show("nonsense") // is not shown
		for _, s := range []State{Starting, Waiting, Online, Working, Trouble, Updating, Online} {
			begin := time.Now()
			l.Show(s)
			synctest.Wait()
			time.Sleep(21 * time.Second)
			synctest.Wait()
			// The first step may have begun before: the light was on already.
			if got := r.since(begin)[2:]; len(got) < 4 || !repeats(got, patterns[s]) {
				t.Fatalf("%s: %v", s, got)
			}
			time.Sleep(time.Duration(len(s)) * 37 * ms) // the next comes at any time
		}
	})
}

// repeats tells whether steps, which begin with on, are p over and over, from
// one of its flashes on.
func repeats(steps, p []time.Duration) bool {
	for from := 0; from < len(p); from += 2 {
		fits := true
		for i, d := range steps {
			fits = fits && d == p[(from+i)%len(p)]
		}
		if fits {
			return true
		}
	}
	return false
}

func TestShowingTheSameAgainDoesNotDisturb(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{}
		l := newLight(r, slog.New(slog.DiscardHandler))
		l.Show(Waiting)
		defer run(l)()
		for range 100 {
			time.Sleep(90 * ms)
			l.Show(Waiting)
			l.Identify(0)
		}
		for _, d := range r.since(time.Time{}) {
			if d != time.Second {
				t.Fatalf("a step took %v", d)
			}
		}
	})
}

func TestIdentifyIsShownOverAllAndEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{}
		l := newLight(r, slog.New(slog.DiscardHandler))
		l.Show(Waiting)
		defer run(l)()
		shows := func(s State) {
			t.Helper()
			synctest.Wait()
			begin := time.Now()
			time.Sleep(5 * time.Second)
			synctest.Wait()
			p := patterns[s]
			// Steps that are whole: at least those after the first.
			got := r.since(begin)[1:]
			if len(got) < 2 {
				t.Fatalf("for %s: %v", s, got)
			}
			for _, d := range got {
				if !slices.Contains(p, d) {
					t.Fatalf("it does not show %s: %v", s, got)
				}
			}
		}
		shows(Waiting)
		l.Identify(12 * time.Second)
		shows(identify)
		l.Show(Trouble)
		shows(identify)
		l.Identify(12 * time.Second) // again: from now on
		shows(identify)
		shows(identify)
		time.Sleep(2 * time.Second)
		shows(Trouble)
		l.Identify(time.Hour)
		shows(identify)
		l.Identify(0)
		shows(Trouble)
	})
}

// tree is a machine with an LED, as real files.
func tree(t *testing.T, name, trigger, brightness string) (root, dir string) {
	t.Helper()
	root = t.TempDir()
	dir = filepath.Join(root, "sys/class/leds", name)
	plug(t, dir, trigger, brightness)
	return root, dir
}

func plug(t *testing.T, dir, trigger, brightness string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]string{"trigger": trigger, "brightness": brightness, "max_brightness": "255\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func content(t *testing.T, dir, name string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(raw))
}

var statusBoard = board.Board{Facts: board.Facts{LEDs: []board.LED{{Use: "power", Names: []string{"PWR"}}, {Use: "status", Names: []string{"led0", "ACT"}}}}}

func TestAnLEDIsTakenFromItsTriggerAndGivenBack(t *testing.T) {
	for name, c := range map[string]struct{ before, after string }{
		"of the card": {"none usb-gadget [mmc0] timer heartbeat\n", "mmc0"},
		"heartbeat":   {"none mmc0 timer [heartbeat]\n", "heartbeat"},
		// What a crashed agent leaves behind, or somebody who switches it by hand.
		"none": {"[none] mmc0 timer\n", "default"},
		"many": {"none " + strings.Repeat("cpu-trigger ", 3000) + "[mmc0]\n", "mmc0"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				root, dir := tree(t, "ACT", c.before, "255\n")
				j := &journal{}
				l := NewLight(root, statusBoard, []hw.LED{{Name: "PWR"}, {Name: "ACT", Use: "status"}}, j.log())
				if !l.Exists() {
					t.Fatal("not found")
				}
				l.Show(Waiting)
				stop := run(l)
				for range 3 {
					time.Sleep(500 * ms)
					synctest.Wait()
					lit := content(t, dir, "brightness")
					time.Sleep(time.Second)
					synctest.Wait()
					dark := content(t, dir, "brightness")
					if lit != "255" || dark != "0" {
						t.Fatalf("brightness %s, then %s", lit, dark)
					}
					time.Sleep(500 * ms)
				}
				if now := content(t, dir, "trigger"); !strings.Contains(now, "none") || strings.Contains(now, "[mmc0]") {
					t.Errorf("the trigger is %q meanwhile", now)
				}
				stop()
				if tr, b := content(t, dir, "trigger"), content(t, dir, "brightness"); tr != c.after || b != "0" {
					t.Errorf("given back with trigger %q and brightness %s", tr, b)
				}
				if j.count("level=") != 0 {
					t.Errorf("logged: %s", j.text.String())
				}
			})
		})
	}
}

func TestAKernelThatKnowsNoBootTriggerIsNoFault(t *testing.T) {
	root, dir := tree(t, "ACT", "", "0\n")
	trigger := filepath.Join(dir, "trigger")
	if err := os.Remove(trigger); err != nil {
		t.Fatal(err)
	}
	// A file of the kernel that refuses every word, as such a kernel does.
	if err := os.Symlink("/proc/self/oom_score_adj", trigger); err != nil {
		t.Fatal(err)
	}
	l := newLED(root, "ACT")
	if err := errors.Join(l.take(), l.set(true)); err != nil {
		t.Fatal(err)
	}
	if err := l.write("trigger", bootTrigger); !errors.Is(err, unix.EINVAL) {
		testenv.Cannot(t, "here the kernel answers %v", err)
	}
	if err := l.giveBack(); err != nil {
		t.Error(err)
	}
	// And one without any triggers.
	if err := os.Remove(trigger); err != nil {
		t.Fatal(err)
	}
	l = newLED(root, "ACT")
	if err := errors.Join(l.take(), l.set(true), l.giveBack()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(trigger); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a file was made")
	}
}

func TestALightThatIsUnpluggedIsUsedAgainWhenItIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root, dir := tree(t, "usb:green:status", "none [usbport]\n", "1\n")
		j := &journal{}
		l := NewLight(root, board.Board{}, []hw.LED{{Name: "usb:green:status"}}, j.log())
		l.Show(Waiting)
		stop := run(l)
		time.Sleep(3 * time.Second)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal("it made files of its own")
		}
		if j.count("cannot be switched") != 1 {
			t.Errorf("not said once: %s", j.text.String())
		}
		plug(t, dir, "[none] timer\n", "0\n")
		time.Sleep(again + 2*time.Second)
		synctest.Wait()
		if j.count("works again") != 1 {
			t.Error("not used again")
		}
		stop()
		if tr := content(t, dir, "trigger"); tr != "usbport" {
			t.Errorf("given back to %q, not to what it had at first", tr)
		}
	})
}

func TestALightThatIsGoneAtTheEndIsNoFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root, dir := tree(t, "status", "[none]\n", "1\n")
		j := &journal{}
		l := NewLight(root, board.Board{}, []hw.LED{{Name: "status"}}, j.log())
		stop := run(l)
		synctest.Wait()
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		stop()
		if j.count("level=") != 0 {
			t.Errorf("logged: %s", j.text.String())
		}
	})
}

func TestALightThatMayNotBeSwitchedIsSaidOnceAndLeftAlone(t *testing.T) {
	for _, refusal := range []error{unix.EACCES, unix.EPERM, unix.EROFS} {
		synctest.Test(t, func(t *testing.T) {
			j := &journal{}
			r := &recorder{fails: &fs.PathError{Op: "open", Path: "/sys/class/leds/ACT/trigger", Err: refusal}}
			l := newLight(r, j.log())
			stop := run(l)
			time.Sleep(time.Hour)
			stop()
			if j.count("level=") != 1 || j.count("docs/panel.md") != 1 {
				t.Errorf("logged: %s", j.text.String())
			}
			if r.takes != 1 || r.backs != 0 {
				t.Errorf("taken %d times, given back %d times", r.takes, r.backs)
			}
		})
	}
}

func TestARealRefusalIsKnownAsOne(t *testing.T) {
	root, dir := tree(t, "ACT", "[none]\n", "0\n")
	if os.Geteuid() != 0 {
		if err := os.Chmod(filepath.Join(dir, "brightness"), 0o444); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(newLED(root, "ACT").set(true)); !denied(err) {
			t.Errorf("got %v", err)
		}
		return
	}
	for _, d := range []string{root, filepath.Dir(root)} { // let the other user reach it
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	refused := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if _, err := unix.SetfsuidRetUid(65534); err != nil {
			refused <- err
			return
		}
		l := newLED(root, "ACT")
		refused <- errors.Join(l.take(), l.set(true))
	}()
	if err := <-refused; !denied(err) {
		t.Errorf("got %v", err)
	}
}

func TestALightThatHangsHoldsUpNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		r := &recorder{stuck: make(chan struct{})}
		l := newLight(r, j.log())
		stop := run(l)
		for _, s := range []State{Waiting, Online, Trouble} {
			l.Show(s)
			l.Identify(time.Second)
			time.Sleep(3 * time.Second)
		}
		if j.count("does not answer") != 1 {
			t.Errorf("logged: %s", j.text.String())
		}
		asked := time.Now()
		stop()
		if waited := time.Since(asked); waited > patience {
			t.Errorf("the end took %v", waited)
		}
		close(r.stuck) // it comes back after all
		time.Sleep(time.Second)
		synctest.Wait()
		if r.backs != 1 {
			t.Error("it was not given back")
		}
	})
}

func TestADriverThatKeepsAWriteDoesNotKeepTheAgent(t *testing.T) {
	root, dir := tree(t, "ACT", "[none]\n", "")
	fifo := filepath.Join(dir, "brightness")
	if err := os.Remove(fifo); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil { // nobody reads: to open it blocks in the kernel
		t.Fatal(err)
	}
	t.Cleanup(func() { // let go of it
		if fd, err := unix.Open(fifo, unix.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			unix.Close(fd)
		}
	})
	stop := run(NewLight(root, statusBoard, []hw.LED{{Name: "ACT"}}, slog.New(slog.DiscardHandler)))
	ended := make(chan struct{})
	go func() { stop(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("Run does not end")
	}
}

func TestWhichLightIsMeant(t *testing.T) {
	status := func(l board.LED) board.Board {
		l.Use = "status"
		return board.Board{Facts: board.Facts{LEDs: []board.LED{l}}}
	}
	line := &board.Line{Chip: "pinctrl-bcm2711", Offset: 17}
	for name, c := range map[string]struct {
		board board.Board
		leds  []string
		want  string
	}{
		"none":                         {board.Board{}, []string{"input3::capslock", "mmc0::"}, ""},
		"the first name that exists":   {status(board.LED{Names: []string{"led0", "ACT", "PWR"}}), []string{"PWR", "ACT"}, "ACT"},
		"of a profile, but not here":   {status(board.LED{Names: []string{"led0"}}), []string{"PWR"}, ""},
		"only for power":               {board.Board{Facts: board.Facts{LEDs: []board.LED{{Use: "power", Names: []string{"PWR"}}}}}, []string{"PWR"}, ""},
		"a line":                       {status(board.LED{Line: line}), nil, "pinctrl-bcm2711:17"},
		"by its function":              {board.Board{}, []string{"board:red:power", "board:green:status"}, "board:green:status"},
		"by its function and a number": {board.Board{}, []string{"green:status-1"}, "green:status-1"},
		"by a word that is no function": {board.Board{}, []string{"statuses", "status:green:power"},
			""},
		"out of the folder": {status(board.LED{Names: []string{"../../x"}}), []string{"../../x"}, ""},
	} {
		var leds []hw.LED
		for _, n := range c.leds {
			leds = append(leds, hw.LED{Name: n})
		}
		l := NewLight("/", c.board, leds, slog.New(slog.DiscardHandler))
		got := ""
		if l.Exists() {
			got = l.lamp.name()
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestAMachineWithoutALightShowsNothing(t *testing.T) {
	l := NewLight("/", board.Board{}, nil, slog.New(slog.DiscardHandler))
	l.Show(Trouble)
	l.Identify(time.Hour)
	l.Run(context.Background()) // returns
}

// wire is periph's own test pin, which can also fail and be let go of.
type wire struct {
	gpiotest.Pin
	refuses error // guarded by the pin's mutex, as is closed
	closed  int
}

func (w *wire) In(p gpio.Pull, e gpio.Edge) error { return errors.Join(w.Pin.In(p, e), w.refusal()) }

func (w *wire) Out(l gpio.Level) error {
	if err := w.refusal(); err != nil {
		return err
	}
	return w.Pin.Out(l)
}

func (w *wire) refusal() error {
	w.Lock()
	defer w.Unlock()
	return w.refuses
}

func (w *wire) refuse(err error) {
	w.Lock()
	defer w.Unlock()
	w.refuses = err
}

func (w *wire) Close() {
	w.Lock()
	defer w.Unlock()
	w.closed++
}

func TestALightOnALine(t *testing.T) {
	for _, low := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := &wire{}
			opens := 0
			l := newLight(&lineLamp{line: board.Line{Chip: "gpio", Offset: 4, ActiveLow: low}, open: func(board.Line) (pin, error) {
				opens++
				return c, nil
			}}, slog.New(slog.DiscardHandler))
			l.Show(Waiting)
			stop := run(l)
			for range 3 {
				time.Sleep(500 * ms)
				synctest.Wait()
				if c.Read() != gpio.Level(!low) {
					t.Fatal("not lit")
				}
				time.Sleep(time.Second)
				synctest.Wait()
				if c.Read() != gpio.Level(low) {
					t.Fatal("not dark")
				}
				time.Sleep(500 * ms)
			}
			c.refuse(unix.ENODEV)
			time.Sleep(15 * time.Second)
			synctest.Wait()
			c.refuse(nil)
			time.Sleep(again + time.Second)
			stop()
			if c.Read() != gpio.Level(low) || c.closed != opens || opens != 3 {
				t.Errorf("at the end %v, opened %d times and closed %d times", c.Read(), opens, c.closed)
			}
		})
	}
}
