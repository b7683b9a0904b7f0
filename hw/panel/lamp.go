package panel

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/gpio"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

// statusUse is the use of a light that is the agent's to switch.
const statusUse = "status"

// findLamp is nil if there is none. An LED comes before a line: the kernel has
// it because the board's description has it.
func findLamp(root string, b board.Board, leds []hw.LED) lamp {
	for _, l := range b.LEDs {
		if l.Use != statusUse {
			continue
		}
		for _, name := range l.Names {
			if slices.ContainsFunc(leds, func(x hw.LED) bool { return x.Name == name }) && plainName(name) {
				return newLED(root, name)
			}
		}
		if l.Line != nil {
			return &lineLamp{line: *l.Line, open: openLine}
		}
	}
	for _, l := range leds {
		if function(l.Name) == statusUse && plainName(l.Name) {
			return newLED(root, l.Name)
		}
	}
	return nil
}

// function is what an LED is for, of a name "device:colour:function-2".
func function(name string) string {
	f, _, _ := strings.Cut(name[strings.LastIndexByte(name, ':')+1:], "-")
	return f
}

// plainName keeps to the class's folder, whatever a profile says.
func plainName(name string) bool { return name == filepath.Base(name) && name != ".." && name != "." }

// led is one of the kernel's
// (https://docs.kernel.org/leds/leds-class.html, Documentation/ABI/testing/sysfs-class-led).
type led struct {
	dir     string
	lit     string // the highest brightness
	trigger string // that it had when it was first taken; "" as long as that is unknown
}

func newLED(root, name string) *led {
	return &led{dir: filepath.Join(root, "sys/class/leds", name)}
}

func (l *led) name() string { return filepath.Base(l.dir) }

const (
	noTrigger   = "none"
	bootTrigger = "default" // the one that the board's description names
)

// take remembers the trigger and takes the LED from it. One that was unplugged
// comes back with a trigger, which is not what it had if that is known.
func (l *led) take() error {
	most, err := l.read("max_brightness")
	if err != nil {
		return err
	}
	l.lit = "1"
	if n, err := strconv.Atoi(most); err == nil && n > 0 {
		l.lit = most
	}
	list, err := l.read("trigger")
	if errors.Is(err, fs.ErrNotExist) { // a kernel without triggers
		list, err = "["+noTrigger+"]", l.reach()
	}
	if err != nil {
		return err
	}
	if now := inBrackets(list); l.trigger == "" || now != noTrigger {
		l.trigger = now
	}
	if l.trigger == noTrigger {
		return nil
	}
	return l.write("trigger", noTrigger)
}

// reach fails if the LED is gone.
func (l *led) reach() error {
	_, err := l.read("brightness")
	return err
}

func (l *led) set(on bool) error {
	if on {
		return l.write("brightness", l.lit)
	}
	return l.write("brightness", "0")
}

// giveBack writes the trigger last: a brightness of 0 takes it away.
func (l *led) giveBack() error {
	if err := l.set(false); err != nil {
		return err
	}
	if l.trigger != noTrigger {
		return l.write("trigger", l.trigger)
	}
	// Refused by kernels that do not know it, and of no effect where the board
	// names none: then dark is right.
	if err := l.write("trigger", bootTrigger); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// inBrackets finds the chosen one: "none [mmc0] timer".
func inBrackets(list string) string {
	_, s, _ := strings.Cut(list, "[")
	s, _, ok := strings.Cut(s, "]")
	if !ok || s == "" {
		return noTrigger
	}
	return s
}

// maxAttribute bounds what is read: with many triggers, the list is longer than a page.
const maxAttribute = 64 << 10

func (l *led) read(attribute string) (string, error) {
	var s string
	err := l.with(attribute, unix.O_RDONLY|unix.O_NONBLOCK, func(fd int) error {
		buf := make([]byte, maxAttribute)
		n := 0
		for n < len(buf) {
			more, err := untilDone(func() (int, error) { return unix.Read(fd, buf[n:]) })
			if err != nil {
				return err
			}
			if more == 0 {
				break
			}
			n += more
		}
		s = strings.TrimSpace(string(buf[:n]))
		return nil
	})
	return s, err
}

func (l *led) write(attribute, value string) error {
	return l.with(attribute, unix.O_WRONLY|unix.O_TRUNC, func(fd int) error {
		_, err := untilDone(func() (int, error) { return unix.Write(fd, []byte(value)) })
		return err
	})
}

// with opens an attribute anew each time: that of an LED that was unplugged
// stays dead. It never makes a file.
func (l *led) with(attribute string, how int, do func(fd int) error) error {
	path := filepath.Join(l.dir, attribute)
	fd, err := untilDone(func() (int, error) { return unix.Open(path, how|unix.O_CLOEXEC, 0) })
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if err := do(fd); err != nil {
		return &fs.PathError{Op: "use", Path: path, Err: err}
	}
	return nil
}

func untilDone(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// lineLamp is a light on a line of a GPIO controller.
type lineLamp struct {
	line board.Line
	open func(board.Line) (pin, error)
	pin  pin
}

func (l *lineLamp) name() string { return fmt.Sprintf("%s:%d", l.line.Chip, l.line.Offset) }

func (l *lineLamp) take() error {
	l.release()
	p, err := l.open(l.line)
	if err != nil {
		return err
	}
	l.pin = p
	return nil
}

func (l *lineLamp) set(on bool) error { return l.pin.Out(level(l.line, on)) }

func (l *lineLamp) giveBack() error {
	err := l.set(false)
	l.release()
	return err
}

func (l *lineLamp) release() {
	if l.pin != nil {
		closePin(l.pin)
		l.pin = nil
	}
}

// level is the one at which a line is on, or pressed, or not.
func level(l board.Line, active bool) gpio.Level { return gpio.Level(active != l.ActiveLow) }
