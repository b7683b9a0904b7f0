package panel

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/driver/driverreg"
	"periph.io/x/conn/v3/gpio"
	"periph.io/x/host/v3/gpioioctl"

	"github.com/deimos-edge/deimos/board"
)

// pin is what the panel needs of a line of a GPIO controller.
type pin interface {
	In(gpio.Pull, gpio.Edge) error
	Read() gpio.Level
	Out(gpio.Level) error
}

var _ pin = (*gpioioctl.GPIOLine)(nil)

// closePin lets go of a line, so that others may have it.
func closePin(p pin) {
	if c, ok := p.(interface{ Close() }); ok {
		c.Close()
	}
}

// openLine finds a line of this machine, by the label of its controller. It may hang.
func openLine(l board.Line) (pin, error) {
	nodes, err := filepath.Glob("/dev/gpiochip*")
	if err != nil {
		return nil, err
	}
	if len(nodes) == 0 {
		return nil, fmt.Errorf("line %d of %s: this machine has no GPIO controller in /dev: %w", l.Offset, l.Chip, fs.ErrNotExist)
	}
	// The driver is begun once in the life of the process, so not as long as it
	// would find less than there is.
	for _, n := range nodes {
		if err := unix.Access(n, unix.R_OK|unix.W_OK); err != nil {
			return nil, &fs.PathError{Op: "open", Path: n, Err: err}
		}
	}
	_, _ = driverreg.Init() // what it found counts, not whether all drivers have something to do
	return lineOf(gpioioctl.Chips, l)
}

// lineOf does not configure the line.
func lineOf(chips []*gpioioctl.GPIOChip, l board.Line) (pin, error) {
	i := slices.IndexFunc(chips, func(c *gpioioctl.GPIOChip) bool { return c.Label() == l.Chip })
	if i < 0 {
		return nil, fmt.Errorf("there is no GPIO controller with the label %q; the inventory lists those of this machine, and the board's profile must name one: %w", l.Chip, fs.ErrNotExist)
	}
	if n := chips[i].LineCount(); l.Offset < 0 || l.Offset >= n {
		return nil, fmt.Errorf("the GPIO controller %s has %d lines, and the board's profile names line %d", l.Chip, n, l.Offset)
	}
	return chips[i].ByNumber(l.Offset), nil
}

// pull is the resistor that an input wants.
func pull(l board.Line) gpio.Pull {
	switch l.Pull {
	case "up":
		return gpio.PullUp
	case "down":
		return gpio.PullDown
	}
	return gpio.PullNoChange
}
