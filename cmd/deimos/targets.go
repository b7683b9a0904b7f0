package main

import (
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
)

// targets are the flags of every command that means devices.
type targets struct {
	Device []string `placeholder:"ID" help:"Device; may be repeated. Default: all."`
	Group  []string `placeholder:"NAME" help:"Devices of this group; may be repeated."`
	Label  []string `placeholder:"KEY=VALUE" help:"Devices with this label; with all of them, if repeated."`
}

// selector reads the flags.
func (t targets) selector() (api.Selector, error) {
	s, err := api.ParseSelector(map[string][]string{"device": t.Device, "group": t.Group, "label": t.Label})
	if err != nil {
		return s, &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	return s, nil
}
