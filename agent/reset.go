package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw/disk"
	"github.com/deimos-edge/deimos/hw/panel"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/sync/store"
	"golang.org/x/sys/unix"
)

// A reset to factory takes the device's key, its membership, what it holds for
// others, and what it has learnt. What is left is the software, in its slots,
// and the owner's own configuration file.

// made is what the agent makes below the state folder, but for its volumes. In
// what is not in this list, a reset finds nothing of the device's.
var made = []string{claimFile, settingsFile, statusFile, chosenFile, seenFile, disk.RecordFile, trafficFile, HistoryDir, healthDir, "jobs", "ota", "journal", "identity"}

// resetMark stands below the state folder while it is reset, so that a power cut
// in the middle does not leave half a device: the next start goes on.
const resetMark = "reset"

// Reset resets the device of a stopped agent to factory.
func Reset(cfg Config) (err error) {
	if cfg, err = cfg.absolute(); err != nil {
		return err
	}
	if err := cfg.isDevice(); err != nil {
		return err
	}
	lock, err := cfg.makeState()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	return cfg.reset()
}

// reset is for a folder that isDevice.
func (c Config) reset() error {
	if err := os.WriteFile(c.path(resetMark), nil, 0o600); err != nil {
		return fmt.Errorf("the device cannot be reset: %w", err)
	}
	volumes, err := filepath.Glob(c.path("volumes", "*"))
	if err != nil {
		return err
	}
	chosen, err := chosenBefore(c)
	if err != nil {
		return err
	}
	for _, v := range c.Volumes {
		chosen = append(chosen, v.Dir)
	}
	// One disk that fails keeps nothing else from going, the key least of all; but
	// the mark stays.
	var failed error
	for _, dir := range append(chosen, volumes...) {
		failed = errors.Join(failed, store.Erase(dir))
	}
	for _, name := range made {
		failed = errors.Join(failed, wipe(c.path(name)))
	}
	failed = errors.Join(failed, c.forgetOrders())
	// A folder that something else is in or mounted on is not the device's alone.
	for _, dir := range append(volumes, c.path("volumes")) {
		_ = os.Remove(dir)
	}
	if failed != nil {
		return fmt.Errorf("the device cannot be reset whole: %w", failed)
	}
	return os.Remove(c.path(resetMark))
}

// forgetOrders keeps the slots, but not which orders filled them.
func (c Config) forgetOrders() error {
	if _, err := os.Stat(c.path("slots")); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	slots, err := slot.Open(c.StateDir)
	if err != nil {
		return err
	}
	return slots.Forget()
}

// wipe removes a file, or a folder with what is in it, also where that is a link
// or something is mounted there.
func wipe(path string) error {
	var failed error
	if entries, err := os.ReadDir(path); err == nil {
		for _, e := range entries {
			failed = errors.Join(failed, os.RemoveAll(filepath.Join(path, e.Name())))
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
		failed = errors.Join(failed, err)
	}
	return failed
}

// isDevice tells a state folder from others: a reset must remove nothing that a
// slip of the hand names.
func (c Config) isDevice() error {
	for _, name := range []string{resetMark, filepath.Join("identity", keyFile)} {
		if _, err := os.Lstat(c.path(name)); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s holds no device: there is no %s in it; name its state folder with --state", c.StateDir, filepath.Join("identity", keyFile))
}

// resetIfAsked resets a device whose button is held at the start, or whose reset
// was cut off. A button that cannot be read resets nothing.
func (a *Agent) resetIfAsked(ctx context.Context, on board.Board) error {
	if _, err := os.Stat(a.cfg.path(resetMark)); err == nil {
		a.log.Warn("a reset to factory was cut off; it goes on")
		return a.cfg.reset()
	}
	held, err := panel.Held(ctx, on, panel.HoldForReset, func(d time.Duration) {
		a.log.Warn("the reset button is held", "for", d.Round(time.Second).String(), "reset_after", panel.HoldForReset.String())
	})
	if err != nil {
		a.log.Warn("the reset button cannot be read", "error", err)
	}
	if !held || a.cfg.isDevice() != nil { // or it is as it left the factory
		return nil
	}
	a.log.Warn("the reset button was held: this device is reset to factory")
	return a.cfg.reset()
}
