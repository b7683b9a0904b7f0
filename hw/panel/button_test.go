package panel

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/gpio"
	"periph.io/x/host/v3/gpioioctl"

	"github.com/deimos-edge/deimos/board"
)

// finger is a button's line under a finger: the level is that of the finger and
// not of the pull.
type finger struct {
	wire
	line    board.Line
	pressed atomic.Bool
	ins     []error // of In, one a call; then nil
	slow    time.Duration
}

func (f *finger) In(p gpio.Pull, e gpio.Edge) error {
	if len(f.ins) > 0 {
		err := f.ins[0]
		if f.ins = f.ins[1:]; err != nil {
			return err
		}
	}
	return f.wire.In(p, e)
}

func (f *finger) Read() gpio.Level {
	time.Sleep(f.slow)
	return gpio.Level(f.pressed.Load() != f.line.ActiveLow)
}

func (f *finger) open(board.Line) (pin, error) { return f, nil }

// press is a finger that presses, and what happens later.
func press(l board.Line, later map[time.Duration]bool) *finger {
	f := &finger{line: l}
	f.pressed.Store(true)
	for at, pressed := range later {
		time.AfterFunc(at, func() { f.pressed.Store(pressed) })
	}
	return f
}

func TestAButtonIsHeldForItsTime(t *testing.T) {
	for _, l := range []board.Line{{}, {ActiveLow: true, Pull: "up"}, {Pull: "down"}} {
		synctest.Test(t, func(t *testing.T) {
			f := press(l, nil)
			var told []time.Duration
			begin := time.Now()
			held, err := watch(t.Context(), l, f.open, HoldForReset, func(d time.Duration) { told = append(told, d) })
			if !held || err != nil {
				t.Fatalf("held %v, error %v", held, err)
			}
			if took := time.Since(begin); took < HoldForReset || took > HoldForReset+time.Second {
				t.Errorf("it took %v", took)
			}
			want := []time.Duration{0}
			for s := range 10 {
				want = append(want, time.Duration(s+1)*time.Second)
			}
			if !slices.Equal(told, want) {
				t.Errorf("feedback %v", told)
			}
			synctest.Wait()
			if f.closed != 1 || f.P != pull(l) {
				t.Errorf("closed %d times, pull %v", f.closed, f.P)
			}
		})
	}
}

func TestAButtonThatIsNotPressedTakesNoTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, l := range []board.Line{{}, {ActiveLow: true}} {
			f := press(l, nil)
			f.pressed.Store(false)
			begin := time.Now()
			held, err := watch(t.Context(), l, f.open, HoldForReset, func(time.Duration) { t.Error("feedback") })
			if held || err != nil || time.Since(begin) > 0 {
				t.Errorf("held %v, error %v, after %v", held, err, time.Since(begin))
			}
		}
	})
}

func TestAButtonThatIsLetGoIsNotHeld(t *testing.T) {
	for _, at := range []time.Duration{ms, time.Second, HoldForReset - 4*sampleEvery} {
		synctest.Test(t, func(t *testing.T) {
			f := press(board.Line{}, map[time.Duration]bool{at: false})
			begin := time.Now()
			held, err := watch(t.Context(), f.line, f.open, HoldForReset, func(time.Duration) {})
			if held || err != nil || time.Since(begin) > at+5*sampleEvery {
				t.Errorf("let go after %v: held %v, error %v, after %v", at, held, err, time.Since(begin))
			}
		})
	}
}

func TestContactsThatBounceAreStillHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		later := make(map[time.Duration]bool)
		for s := range 9 {
			at := time.Duration(s+1)*time.Second + 5*ms
			later[at], later[at+2*sampleEvery] = false, true // unseen, or twice
		}
		f := press(board.Line{}, later)
		held, err := watch(t.Context(), f.line, f.open, HoldForReset, func(time.Duration) {})
		if !held || err != nil {
			t.Errorf("held %v, error %v", held, err)
		}
	})
}

func TestTimeInWhichNobodyLookedDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := press(board.Line{}, map[time.Duration]bool{15 * time.Second: false})
		f.slow = time.Second // as if the process stood still between two looks
		held, err := watch(t.Context(), f.line, f.open, HoldForReset, func(time.Duration) {})
		if held || err != nil {
			t.Errorf("held %v, error %v", held, err)
		}
		time.Sleep(f.slow) // the look that is left behind
	})
}

func TestWhatCannotBeReadIsNotHeld(t *testing.T) {
	low := board.Line{ActiveLow: true}
	t.Run("the line fails meanwhile", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := press(low, nil) // which reads as low, and low is pressed
			f.ins = []error{nil, unix.ENODEV}
			held, err := watch(t.Context(), low, f.open, HoldForReset, func(time.Duration) {})
			if held && err == nil || !errors.Is(err, unix.ENODEV) {
				t.Errorf("held %v, error %v", held, err)
			}
		})
	})
	t.Run("the line is in use", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := press(low, nil)
			f.ins = []error{unix.EBUSY}
			if held, err := watch(t.Context(), low, f.open, HoldForReset, func(time.Duration) {}); held || !errors.Is(err, unix.EBUSY) {
				t.Errorf("held %v, error %v", held, err)
			}
		})
	})
	t.Run("the controller hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := press(low, nil)
			f.slow = time.Minute
			begin := time.Now()
			if held, err := watch(t.Context(), low, f.open, HoldForReset, func(time.Duration) {}); held || err == nil {
				t.Errorf("held %v, error %v", held, err)
			}
			if time.Since(begin) > answer {
				t.Errorf("it took %v", time.Since(begin))
			}
			time.Sleep(f.slow) // the look that is left behind
		})
	})
	t.Run("the agent ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := press(low, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			if held, err := watch(ctx, low, f.open, HoldForReset, func(time.Duration) {}); held || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("held %v, error %v", held, err)
			}
		})
	})
}

func TestABoardWithoutAButtonIsNotAsked(t *testing.T) {
	for _, b := range []*board.Button{nil, {Use: "power"}, {}} {
		if held, err := Held(t.Context(), board.Board{Facts: board.Facts{Button: b}}, HoldForReset, nil); held || err != nil {
			t.Errorf("held %v, error %v", held, err)
		}
	}
}

func TestALineThatThisMachineDoesNotHave(t *testing.T) {
	b := board.Board{Facts: board.Facts{Button: &board.Button{Use: resetUse, Line: board.Line{Chip: "no such chip"}}}}
	held, err := Held(t.Context(), b, HoldForReset, nil)
	if held || err == nil {
		t.Errorf("held %v, error %v", held, err)
	}
	if nodes, _ := filepath.Glob("/dev/gpiochip*"); len(nodes) == 0 && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	chips := []*gpioioctl.GPIOChip{{}}
	if _, err := lineOf(chips, board.Line{Chip: "other"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another label: %v", err)
	}
	for _, offset := range []int{-1, 0, 1 << 30} {
		if _, err := lineOf(chips, board.Line{Offset: offset}); err == nil || !strings.Contains(err.Error(), "0 lines") {
			t.Errorf("line %d of a controller without lines: %v", offset, err)
		}
	}
}
