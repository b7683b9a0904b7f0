package watchdog

import (
	"errors"
	"time"
)

// Hold is the machine's watchdog in the hands of who starts the agent: a machine that
// hangs before there is an agent is reset, too. It is armed, and must be fed. For one
// goroutine.
type Hold struct{ w *device }

// patient are the timeouts that are asked for, the first one that the driver takes: an
// agent that is handed the device arms it anew long before.
var patient = []time.Duration{5 * time.Minute, 2 * time.Minute, wished}

// Take opens and arms the device, as the [Dog] does: what is no watchdog gets nothing
// written. It fails while the agent, or another program, has it open.
func Take(path string) (*Hold, error) {
	w := &device{path: path, sys: "/sys", open: openKernel}
	if _, err := w.take(patient...); err != nil {
		return nil, err
	}
	return &Hold{w}, nil
}

// Timeout is how long the machine lives without being fed.
func (h *Hold) Timeout() time.Duration { return h.w.timeout }

// Feed begins the timeout anew.
func (h *Hold) Feed() error { return h.w.feed() }

// HandOver closes the device and leaves it armed, with the whole timeout for who
// opens it next. lives is false where the driver disarms it by that.
func (h *Hold) HandOver() (lives bool, err error) {
	lives = h.w.magic || nowayout(h.w.sys, h.w.path)
	return lives, errors.Join(h.w.feed(), h.w.file.Close())
}

// Disarm closes the device and stops its clock. stopped is false where the kernel
// refuses that (nowayout); it was fed then.
func (h *Hold) Disarm() (stopped bool, err error) {
	err = h.w.release()
	return err == nil && !nowayout(h.w.sys, h.w.path), err
}
