// Package panel is what a person sees and presses on a device: its light and
// its button.
//
// # The light
//
// One light of one colour says how the agent is, by when it is on and off: see
// [State]. The agent switches it itself and does not leave that to a trigger of
// the kernel, because the light of an agent that hangs or is gone must not look
// fine. So no pattern is steady: a light that stays on or dark for longer than
// [Longest] says that nobody is at home. This costs two switchings in five
// seconds while all is well, and a few in a second otherwise.
//
// Where the light is found: an LED of the kernel (/sys/class/leds) or a line of
// a GPIO controller to which the board's profile gives the use "status"; with
// no such profile, an LED whose function is called status
// (https://docs.kernel.org/leds/leds-class.html, "LED Device Naming").
//
// # Giving it back
//
// While it runs, the agent takes the LED from its trigger; at the end it gives
// it back, dark, to the trigger that it had. If it had none, that may be what an
// agent that crashed has left behind, so it is given to the trigger that the
// board gives it at boot (older kernels do not know it), and stays
// dark if there is none. A brightness that somebody set by hand is not restored.
//
// # What always holds
//
//   - Switching may hang (a bus, a driver) or fail (a light on USB that was
//     unplugged). That holds up only the light; one that comes back is used again.
//   - Show and Identify do not block.
//   - A light that this user may not switch is said once, with what to do, and left alone.
//
// # The button
//
// See [Held].
//
// # Not done yet
//
// Buttons that the kernel drives itself (gpio-keys, /dev/input): such a line is
// refused as busy. Lights of several colours.
package panel

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

const (
	// again is the pause after a light failed.
	again = 10 * time.Second
	// patience is how long a switching takes until the log says that it hangs, and
	// how long Run waits for the light to be given back.
	patience = 2 * time.Second
)

// Light is the status light of the board, if it has one. Safe for concurrent use.
type Light struct {
	lamp    lamp // nil: there is none
	log     *slog.Logger
	changed chan struct{} // capacity 1

	mu       sync.Mutex
	state    State
	identify time.Time // until then; zero: no
}

// lamp is a light that can be switched. All of it may hang.
type lamp interface {
	name() string
	take() error // from whoever switches it now
	set(on bool) error
	giveBack() error // dark, to whom it was taken from
}

// NewLight finds the board's light; a machine without one gets a Light that
// shows nothing. root is "/" but in tests.
func NewLight(root string, b board.Board, leds []hw.LED, log *slog.Logger) *Light {
	return newLight(findLamp(root, b, leds), log)
}

func newLight(l lamp, log *slog.Logger) *Light {
	return &Light{lamp: l, log: log, changed: make(chan struct{}, 1), state: Starting}
}

// Show is the pattern from now on. A state that is none of the above is not shown.
func (l *Light) Show(s State) {
	if patterns[s] == nil {
		return
	}
	l.mu.Lock()
	same := l.state == s
	l.state = s
	l.mu.Unlock()
	if !same {
		l.wake()
	}
}

// Identify blinks for d from now on, whatever else is to be shown; 0 ends it.
func (l *Light) Identify(d time.Duration) {
	l.mu.Lock()
	l.identify = time.Time{}
	if d > 0 {
		l.identify = time.Now().Add(d)
	}
	l.mu.Unlock()
	l.wake()
}

func (l *Light) wake() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// Exists tells whether there is a light at all.
func (l *Light) Exists() bool { return l.lamp != nil }

// Run drives the light until ctx ends, then gives it back to the kernel as it was.
func (l *Light) Run(ctx context.Context) {
	if l.lamp == nil {
		return
	}
	s := l.newSwitch()
	defer s.end()
	timer := time.NewTimer(0)
	defer timer.Stop()
	shown, step := State(""), 0
	for {
		now := l.now()
		if now != shown {
			shown, step = now, 0
		}
		p := patterns[shown]
		s.set(step%2 == 0)
		timer.Reset(p[step%len(p)])
		step++
		if !l.pause(ctx, timer, shown) {
			return
		}
	}
}

// pause waits for the end of a step, or for another pattern; false: ctx ended.
func (l *Light) pause(ctx context.Context, timer *time.Timer, shown State) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-l.changed:
			if l.now() != shown {
				return true
			}
		}
	}
}

// now is the pattern that is due.
func (l *Light) now() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Now().Before(l.identify) {
		return identify
	}
	return l.state
}

// toggle switches a lamp in a goroutine of its own, so that one that hangs holds
// up nobody. Only the newest wish counts.
type toggle struct {
	*Light
	wish  chan bool // capacity 1
	ended chan struct{}
}

func (l *Light) newSwitch() *toggle {
	t := &toggle{Light: l, wish: make(chan bool, 1), ended: make(chan struct{})}
	go t.work()
	return t
}

func (t *toggle) set(on bool) {
	select {
	case <-t.wish:
	default:
	}
	t.wish <- on
}

// end gives the lamp back.
func (t *toggle) end() {
	close(t.wish)
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-t.ended:
	case <-timer.C:
		t.log.Warn("the status light does not answer and stays as it is", "light", t.lamp.name())
	}
}

func (t *toggle) work() {
	defer close(t.ended)
	var (
		ours   bool      // it was taken
		told   bool      // the log says that it fails
		failed time.Time // when it last did
	)
	for on := range t.wish {
		if !ours && told && time.Since(failed) < again {
			continue
		}
		err := t.switchTo(on, ours)
		switch {
		case denied(err):
			t.log.Warn("the status light stays as it is: the agent's user may not switch it. Run the agent as root, or let its group write to the light (docs/panel.md has the rule)", "light", t.lamp.name(), "error", err)
			for range t.wish {
			}
			return
		case err != nil:
			if !told {
				t.log.Warn("the status light cannot be switched; it is tried again", "light", t.lamp.name(), "error", err)
			}
			ours, told, failed = false, true, time.Now()
		default:
			if told {
				t.log.Info("the status light works again", "light", t.lamp.name())
			}
			ours, told = true, false
		}
	}
	if !ours {
		return
	}
	if err := t.lamp.giveBack(); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		t.log.Warn("the status light was not given back to the kernel", "light", t.lamp.name(), "error", err)
	}
}

func (t *toggle) switchTo(on, ours bool) error {
	hangs := time.AfterFunc(patience, func() {
		t.log.Warn("the status light does not answer", "light", t.lamp.name())
	})
	defer hangs.Stop()
	if !ours {
		if err := t.lamp.take(); err != nil {
			return err
		}
	}
	return t.lamp.set(on)
}

// denied tells a light that this user may not switch, ever. In a container,
// sysfs is often mounted read-only.
func denied(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)
}
