package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type deviceIdentifyCmd struct {
	ID   deviceFlag `arg:"" help:"Device id."`
	For  duration   `default:"1m" help:"How long it blinks (${default}), up to an hour."`
	Stop bool       `help:"End it."`
	cli.Output
}

func (d *deviceIdentifyCmd) Run(ctx context.Context, all *commands) error {
	id := wire.DeviceID(d.ID)
	seconds := int(time.Duration(d.For).Round(time.Second) / time.Second)
	switch {
	case d.Stop:
		seconds = 0
	case seconds < 1 || seconds > wire.MaxIdentify:
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("a device blinks for one second to one hour")}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	o, err := c.Identify(ctx, id, api.IdentifyRequest{Seconds: seconds})
	if err != nil {
		return err
	}
	if err := awake(ctx, c, id); err != nil {
		return offlineError(err, fmt.Sprintf("it shows itself if it comes back before %s; \"deimos order cancel %s %s\" takes that back", o.Order.Expires.UTC().Format(time.RFC3339), id, o.Order.ID))
	}
	if o, err = watchOrder(ctx, c, o, askedWait); err != nil {
		return err
	}
	if err := awaited(o, "it cannot show itself"); err != nil {
		return err
	}
	return d.Print(o, func(w io.Writer) error {
		if d.Stop {
			_, err := fmt.Fprintf(w, "Device %s has stopped.\n", id)
			return err
		}
		_, err := fmt.Fprintf(w, "Device %s blinks for %s. End it with --stop.\n", id, time.Duration(seconds)*time.Second)
		return err
	})
}

// askedWait is a little longer than such orders live.
const askedWait = 3 * time.Minute

// errOffline says that a device would not answer.
type errOffline struct{ error }

// awake tells at once if a device is offline, with an errOffline.
func awake(ctx context.Context, c *api.Client, id wire.DeviceID) error {
	d, err := c.Device(ctx, string(id))
	if err != nil || d.State != api.DeviceOffline {
		return err // one that is retired is refused with the reason
	}
	seen := "not heard of since the coordinator started"
	if !d.LastSeen.IsZero() {
		seen = "seen " + cli.Ago(d.LastSeen)
	}
	return errOffline{fmt.Errorf("device %s is offline, %s", id, seen)}
}

// offlineError adds to an errOffline what becomes of what was wanted.
func offlineError(err error, next string) error {
	if offline, ok := errors.AsType[errOffline](err); ok {
		return &cli.Error{Code: cli.ExitNotYet, Err: fmt.Errorf("%w; %s", offline.error, next)}
	}
	return err
}

type deviceInventoryCmd struct {
	ID      deviceFlag `arg:"" help:"Device id."`
	Refresh bool       `help:"Have the device look again now, and wait for it."`
	cli.Output
}

func (d *deviceInventoryCmd) Run(ctx context.Context, all *commands) error {
	id := wire.DeviceID(d.ID)
	c, err := all.client()
	if err != nil {
		return err
	}
	var v api.Device
	if d.Refresh {
		if err := awake(ctx, c, id); err != nil {
			return offlineError(err, "what it said last is shown without --refresh")
		}
		v, err = c.RefreshInventory(ctx, id)
	} else {
		v, err = c.Device(ctx, string(id))
	}
	if err != nil {
		return err
	}
	if len(v.Inventory) == 0 && v.InventoryProblem != "" {
		return fmt.Errorf("there is no inventory of device %s: %s", id, strings.TrimRight(cell(v.InventoryProblem), "."))
	}
	if len(v.Inventory) == 0 {
		return fmt.Errorf("device %s has not said what it has; ask it with --refresh", id)
	}
	return d.Print(json.RawMessage(v.Inventory), func(w io.Writer) error { return writeInventory(w, v) })
}
