package main

import (
	"errors"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

// targets are the flags of every command that means devices: all, if none is
// given. No comma ends a value, and an empty one, as an unset variable of a
// shell leaves it, is refused: it would mean everybody.
type targets struct {
	Device []string `sep:"none" placeholder:"ID" help:"Only this device; may be repeated."`
	Group  []string `sep:"none" placeholder:"NAME" help:"Only devices of this group; may be repeated."`
	Label  []string `sep:"none" placeholder:"KEY=VALUE" help:"Only devices with this label; with all of them, if repeated."`
}

// selector reads the flags.
func (t targets) selector() (api.Selector, error) {
	s, err := api.ParseSelector(map[string][]string{"device": t.Device, "group": t.Group, "label": t.Label})
	if err != nil {
		return s, &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	return s, nil
}

// changed are the flags of what changes devices: none given is not yet all.
type changed struct {
	targets
	All bool `help:"Every device of the fleet."`
}

var errWhom = errors.New("say which devices are meant with --device, --group or --label, or else --all")

// selector reads the flags.
func (c changed) selector() (api.Selector, error) {
	s, err := c.targets.selector()
	if err != nil {
		return s, err
	}
	s.All = c.All
	if s.CheckChange() != nil {
		return s, &cli.Error{Code: cli.ExitUsage, Err: errWhom}
	}
	return s, nil
}

// name is a flag's value that narrows what is meant, so that it cannot be empty.
type name string

func (n *name) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		return errors.New("it is empty; is a variable of the shell not set?")
	}
	*n = name(text)
	return nil
}

// deviceFlag is the id of a device, as a flag or an argument.
type deviceFlag wire.DeviceID

func (d *deviceFlag) UnmarshalText(text []byte) error {
	id, err := wire.ParseDeviceID(string(text))
	*d = deviceFlag(id)
	return err
}
