package watchdog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// wished is the timeout that is asked of the device: long enough for a machine
// under load, short enough for one that nobody sees.
const wished = 60 * time.Second

// unknown is taken for the timeout where the driver does not tell.
const unknown = 3 * time.Second

// opened is an open watchdog device: what the kernel's watchdog API offers.
type opened interface {
	// Write feeds. A 'V' in it lets the next Close disarm, until the next Write.
	Write([]byte) (int, error)
	Support() (options uint32, identity string, err error) // WDIOC_GETSUPPORT
	SetTimeout(seconds int) error                          // WDIOC_SETTIMEOUT
	Timeout() (seconds int, err error)                     // WDIOC_GETTIMEOUT
	Close() error
}

// device is the machine's watchdog. Of guard alone.
type device struct {
	path string
	sys  string // "/sys" but in tests
	open func(path string) (opened, error)
	log  *slog.Logger

	file    opened
	timeout time.Duration
	magic   bool // without a 'V' before, Close does not disarm
	failing bool // and the log says so
}

// guard arms the device once there is a pulse, feeds it at a third of its
// timeout, and disarms it when ctx ends. A device that cannot be armed is tried
// again: whoever has it may let go.
func (d *Dog) guard(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-d.first:
	}
	w := d.device
	defer func() {
		if w.file != nil {
			w.disarm()
		}
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		next := armRetry
		if w.file == nil {
			err := w.arm()
			if errors.Is(err, errNoWatchdog) { // and will not become one
				w.log.Error("the machine's watchdog is not armed; the agent runs without it", "watchdog", w.path, "error", err)
				return
			}
			w.tell(err)
		}
		if w.file != nil {
			var err error
			if next, err = d.feed(w.timeout/3, w.feed); err != nil {
				next = min(next, recheck)
			}
			w.tell(err)
			if errors.Is(err, unix.ENODEV) { // unplugged, or its driver was unloaded
				_ = w.file.Close()
				w.file, next = nil, armRetry
			}
		}
		timer.Reset(next)
	}
}

// armRetry is the pause between two tries to open a device that is in use.
const armRetry = time.Minute

// tell logs a failure once, until it is over.
func (w *device) tell(err error) {
	if err != nil && !w.failing {
		w.log.Error("the machine's watchdog does not work; it is tried again", "watchdog", w.path, "error", err)
	}
	w.failing = err != nil
}

var errNoWatchdog = errors.New("it is no watchdog; name one, such as /dev/watchdog0")

// foreign tells whether a device does not know what each watchdog does: the
// kernel answers WDIOC_GETSUPPORT for all of them. Drivers refuse what they do not
// know with ENOTTY, and some (/dev/random) with EINVAL.
func foreign(err error) bool { return errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) }

// arm takes the device, and says what that means.
func (w *device) arm() error {
	driver, err := w.take(wished)
	if err != nil {
		return err
	}
	w.log.Info("the machine's watchdog is armed: if the agent hangs, it resets the machine", "watchdog", w.path, "driver", driver, "timeout", w.timeout.String())
	if nowayout(w.sys, w.path) {
		w.log.Warn("this watchdog cannot be disarmed (nowayout): whoever stops the agent has to start it again within the timeout, or the machine is reset", "watchdog", w.path, "timeout", w.timeout.String())
	} else if !w.magic {
		w.log.Warn("this watchdog is disarmed also when the agent dies: it guards against an agent that hangs, not against one that crashed", "watchdog", w.path)
	}
	return nil
}

// take opens the device, which starts its clock, with the first of the timeouts that
// the driver takes. What is no watchdog gets nothing written: it may be a serial port.
func (w *device) take(timeouts ...time.Duration) (driver string, err error) {
	f, err := w.open(w.path)
	if errors.Is(err, unix.EBUSY) {
		return "", fmt.Errorf("another program feeds it (systemd, if RuntimeWatchdogSec= is set): leave it to that one, or name none to the agent: %w", err)
	}
	if err != nil {
		return "", fmt.Errorf("it cannot be opened: %w", err)
	}
	options, identity, err := f.Support()
	if foreign(err) {
		_ = f.Close()
		return "", fmt.Errorf("%w: %w", errNoWatchdog, err)
	}
	// From here on the machine depends on it: nothing below may keep it unfed.
	w.file = f
	if err != nil {
		options = unix.WDIOF_SETTIMEOUT | unix.WDIOF_MAGICCLOSE // what most can; to try costs nothing
	}
	w.magic = options&unix.WDIOF_MAGICCLOSE != 0
	if options&unix.WDIOF_SETTIMEOUT != 0 {
		for _, t := range timeouts { // refused if it is too long: then its own stays
			if f.SetTimeout(int(t/time.Second)) == nil {
				break
			}
		}
	}
	w.timeout = unknown
	if s, err := f.Timeout(); err == nil && s > 0 {
		w.timeout = time.Duration(s) * time.Second
	}
	return line(identity), nil
}

// feed writes what is not 'V': a write feeds with every driver, also with one
// that does not know WDIOC_KEEPALIVE.
func (w *device) feed() error {
	if _, err := w.file.Write([]byte{0}); err != nil {
		return fmt.Errorf("it cannot be fed; within %s the machine is reset: %w", w.timeout, err)
	}
	return nil
}

// disarm says what has become of the magic close. Its write feeds, too: where it
// cannot be disarmed, who starts the agent again has the whole timeout.
func (w *device) disarm() {
	switch err := w.release(); {
	case nowayout(w.sys, w.path):
		w.log.Warn("the machine's watchdog stays armed (nowayout); unless the agent is started again, the machine is reset", "watchdog", w.path, "within", w.timeout.String())
	case err != nil:
		w.log.Error("the machine's watchdog cannot be disarmed; unless the agent is started again, the machine is reset", "watchdog", w.path, "within", w.timeout.String(), "error", err)
	default:
		w.log.Info("the machine's watchdog is disarmed", "watchdog", w.path)
	}
}

func (w *device) release() error {
	_, err := w.file.Write([]byte("V"))
	return errors.Join(err, w.file.Close())
}

// kernel is an open device of this machine.
type kernel int

// openKernel neither waits for a modem nor takes a terminal: path may be one by
// mistake.
func openKernel(path string) (opened, error) {
	const how = unix.O_WRONLY | unix.O_CLOEXEC | unix.O_NOCTTY | unix.O_NONBLOCK
	fd, err := again(func() (int, error) { return unix.Open(path, how, 0) })
	if err != nil {
		return nil, err
	}
	return kernel(fd), nil
}

func (k kernel) Write(b []byte) (int, error) {
	return again(func() (int, error) { return unix.Write(int(k), b) })
}

func (k kernel) Support() (uint32, string, error) {
	info, err := unix.IoctlGetWatchdogInfo(int(k))
	if err != nil {
		return 0, "", err
	}
	return info.Options, strings.TrimRight(string(info.Identity[:]), "\x00"), nil
}

func (k kernel) SetTimeout(seconds int) error {
	return unix.IoctlSetPointerInt(int(k), unix.WDIOC_SETTIMEOUT, seconds)
}

func (k kernel) Timeout() (int, error) { return unix.IoctlGetInt(int(k), unix.WDIOC_GETTIMEOUT) }

func (k kernel) Close() error { return unix.Close(int(k)) }

func again(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}
