package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/hw/panel"
	"github.com/deimos-edge/deimos/sync/store"
)

// A reset to factory takes the device's key, its membership, what it holds for
// others, and what it has learnt. What is left is the software, in its slots,
// and the owner's own configuration file.

// survives is what stays below the state folder.
var survives = map[string]bool{"slots": true, lockFile: true, resetMark: true}

// resetMark stands below the state folder while it is reset, so that a power cut
// in the middle does not leave half a device: the next start goes on.
const resetMark = "reset"

// Reset resets the device of a stopped agent to factory.
func Reset(cfg Config) (err error) {
	if cfg, err = cfg.absolute(); err != nil {
		return err
	}
	lock, err := cfg.makeState()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	return cfg.reset()
}

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
		volumes = append(volumes, v.Dir)
	}
	var failed error
	for _, dir := range append(volumes, chosen...) {
		failed = errors.Join(failed, store.Erase(dir))
	}
	if failed != nil {
		return failed // and the mark stays
	}
	entries, err := os.ReadDir(c.StateDir)
	if err != nil {
		return fmt.Errorf("the device cannot be reset: %w", err)
	}
	for _, e := range entries {
		if !survives[e.Name()] {
			failed = errors.Join(failed, os.RemoveAll(c.path(e.Name())))
		}
	}
	if failed != nil {
		return fmt.Errorf("the device cannot be reset: %w", failed)
	}
	return os.Remove(c.path(resetMark))
}

// resetIfAsked resets a device whose button is held at the start, or whose reset
// was cut off. A button that cannot be read resets nothing.
func (a *Agent) resetIfAsked(ctx context.Context) error {
	if _, err := os.Stat(a.cfg.path(resetMark)); err == nil {
		a.log.Warn("a reset to factory was cut off; it goes on")
		return a.cfg.reset()
	}
	held, err := panel.Held(ctx, a.cfg.detectBoard(a.log), panel.HoldForReset, func(d time.Duration) {
		a.log.Warn("the reset button is held", "for", d.Round(time.Second).String(), "reset_after", panel.HoldForReset.String())
	})
	if err != nil {
		a.log.Warn("the reset button cannot be read", "error", err)
	}
	if !held {
		return nil
	}
	a.log.Warn("the reset button was held: this device is reset to factory")
	return a.cfg.reset()
}
