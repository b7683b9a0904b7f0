package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

const (
	updateRounds   = 5
	downtimeBudget = 2.0 // s, of the agent's slot
	updatePatience = 2 * time.Minute
	confirmWithin  = "10s" // half of it is the trial; devices have two minutes
)

// updateRows have agents under their launchers take a release, one after the other.
// A device's downtime is the time between what the coordinator heard last of the old
// version and first of the new, at a heartbeat a second: so up to a second of it is the
// old one's silence between two.
func updateRows(ctx context.Context, t *table) error {
	return jobSide(ctx, func(s *ourSide, dir string) error {
		next := filepath.Join(*bin, "tour", "agent-next")
		said, err := exec.CommandContext(ctx, next, "version", "-o", "json").Output()
		var is cli.Version
		if err := errors.Join(err, json.Unmarshal(said, &is)); err != nil {
			return fmt.Errorf("%s does not tell its version: %w", next, err)
		}
		version := is.Version
		keys, repository, bundle := filepath.Join(dir, "keys"), filepath.Join(dir, "repo"), filepath.Join(dir, "bundle")
		for _, args := range [][]string{
			{"release", "keys", "init", "--keys", keys},
			{"release", "build", "--version", version, "--agent", next, "--out", bundle},
			{"release", "publish", "--keys", keys, "--repo", repository, "--bundle", bundle, "--context", filepath.Join(dir, "coordinator", "operator.json")},
		} {
			if out, err := exec.CommandContext(ctx, filepath.Join(*bin, "deimos"), args...).CombinedOutput(); err != nil {
				return fmt.Errorf("deimos %s: %w: %s", strings.Join(args[:2], " "), err, out)
			}
		}
		var down, whole []float64
		for i := range updateRounds {
			d, w, err := s.updateOne(ctx, filepath.Join(dir, fmt.Sprintf("device-%d", i)), version)
			if err != nil {
				return err
			}
			down, whole = append(down, d.Seconds()), append(whole, w.Seconds())
		}
		t.limit("an update's downtime", "s", median(down), downtimeBudget, "%.2f")
		t.only("  from its order to the success, a trial of 5 s", "s", median(whole), "%.2f")
		return nil
	})
}

// updateOne has a new device join and take the version; it returns for how long it was
// not heard, and how long all took from the offer on.
func (s *ourSide) updateOne(ctx context.Context, state, version string) (down, whole time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, updatePatience)
	defer cancel()
	tok, err := s.client.CreateToken(ctx, api.TokenRequest{Uses: 1, ValidSeconds: 3600})
	if err != nil {
		return 0, 0, err
	}
	device, err := startChild(filepath.Join(*bin, "deimos-launch"), "--state", state, "--agent", filepath.Join(*bin, "deimos-agent"), "--confirm-within", confirmWithin, "--",
		"run", "--state", state, "--coordinator", "https://"+s.https, "--token", tok.Token, "--log-level", "error")
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, device.end()) }()
	known := make(map[wire.DeviceID]bool)
	for _, id := range s.ids {
		known[id] = true
	}
	var id wire.DeviceID
	var old string
	if err := until(ctx, func() bool {
		list, err := s.client.Devices(ctx)
		if err != nil {
			return false
		}
		for _, d := range list {
			if d.Online && !known[d.ID] {
				id, old = d.ID, d.Agent
			}
		}
		return id != ""
	}); err != nil {
		return 0, 0, fmt.Errorf("the device did not come online: %w", err)
	}
	s.ids = append(s.ids, id)
	began := time.Now()
	orders, err := s.client.Offer(ctx, api.OfferRequest{Version: version, Target: repo.TargetName(version), Selector: api.Selector{Devices: []wire.DeviceID{id}}})
	if err != nil {
		return 0, 0, err
	}
	var last, first time.Time
	if err := until(ctx, func() bool {
		d, err := s.client.Device(ctx, string(id))
		switch {
		case err != nil:
		case d.Agent == old:
			last = d.LastSeen
		case d.Online:
			first = d.LastSeen
		}
		return !first.IsZero()
	}); err != nil {
		return 0, 0, fmt.Errorf("version %s did not come up: %w", version, err)
	}
	o, err := s.client.AwaitOrder(ctx, id, orders[0].Order.ID, func(api.Order) {})
	if err == nil && o.State != wire.Succeeded {
		err = fmt.Errorf("the update ended %s: %s", o.State, o.Result.Reason)
	}
	return first.Sub(last), time.Since(began), err
}

// end asks a process to stop, and waits until it has.
func (c *child) end() error {
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	_ = c.cmd.Wait() // it was asked to
	return nil
}
