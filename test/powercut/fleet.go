package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/packaging/qemu"
	"github.com/deimos-edge/deimos/wire"
)

// fleet is a coordinator, and at most one machine that is its device.
type fleet struct {
	bin     string
	dir     string // of the coordinator, its logs and the machine's
	starter *proc.Starter
	serve   *proc.Process
	client  *api.Client
	machine *qemu.Machine
	https   string
	mqtt    string
}

const stopLimit = time.Minute

// startFleet starts a coordinator in dir/coordinator at these addresses.
func startFleet(ctx context.Context, bin, dir, https, mqtt string) (*fleet, error) {
	f := &fleet{bin: bin, dir: dir, starter: proc.NewStarter(), https: https, mqtt: mqtt}
	var err error
	f.serve, err = f.starter.Start(ctx, proc.Command{
		Argv: []string{f.program("deimos"), "serve", "--dir", f.path("coordinator"), "--listen", https, "--mqtt", mqtt, "--beat", "5s", "--advertise", qemu.Host},
		Log:  f.path("coordinator.log"), Ready: api.Ready,
	})
	if err == nil {
		var c api.Context
		if c, err = api.LoadContext(f.context()); err == nil {
			f.client, err = api.NewClient(c)
		}
	}
	if err != nil {
		f.end()
		return nil, err
	}
	return f, nil
}

func (f *fleet) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}
func (f *fleet) program(name string) string { return filepath.Join(f.bin, name) }
func (f *fleet) context() string            { return f.path("coordinator", "operator.json") }

// end ends everything, the machine by a cut.
func (f *fleet) end() {
	f.cutPower()
	if f.serve != nil {
		f.serve.Stop(stopLimit)
	}
	f.starter.End()
}

func (f *fleet) cutPower() {
	if f.machine != nil {
		f.machine.Kill()
		f.machine = nil
	}
}

// cli runs "deimos".
func (f *fleet) cli(ctx context.Context, args ...string) error {
	r, err := f.starter.Run(ctx, proc.Command{Argv: append([]string{f.program("deimos")}, args...), Env: []string{"DEIMOS_CONTEXT=" + f.context()}})
	if err == nil && r.Code != 0 {
		err = errors.New(r.Said())
	}
	if err != nil {
		return fmt.Errorf("deimos %s %s: %w", args[0], args[1], err)
	}
	return nil
}

// boot switches a machine on.
func (f *fleet) boot(ctx context.Context, name string, d qemu.Disk, token string) error {
	dir := f.path(name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	config := filepath.Join(dir, "deimos.toml")
	text := fmt.Sprintf("coordinator = %q\n", "https://"+guestAddress(f.https))
	if token != "" {
		text += fmt.Sprintf("token = %q\n", token)
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	m, err := qemu.Start(ctx, f.starter, dir, qemu.Options{Disks: []qemu.Disk{d}, Config: config})
	f.machine = m
	return err
}

// guestAddress is how a machine calls an address of our loopback.
func guestAddress(address string) string {
	_, port, _ := net.SplitHostPort(address) // we made it
	return net.JoinHostPort(qemu.Host, port)
}

// until asks again and again.
func until(ctx context.Context, what string, ask func() (bool, error)) error {
	for {
		ok, err := ask()
		if ok || ctx.Err() == nil && err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s did not come about in time: %w", what, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// online waits for a device that has been seen since a moment; "" for any.
func (f *fleet) online(ctx context.Context, id wire.DeviceID, since time.Time) (d api.Device, err error) {
	err = until(ctx, "the device being online", func() (bool, error) {
		all, err := f.client.Devices(ctx)
		if err != nil {
			return false, err
		}
		if len(all) > 1 {
			return false, fmt.Errorf("there are %d devices now: the machine has become another one", len(all))
		}
		for _, d = range all {
			if d.Online && d.LastSeen.After(since) && (id == "" || d.ID == id) {
				return true, nil
			}
		}
		if f.machine != nil {
			select {
			case <-f.machine.Done():
				return false, errors.New("the machine has ended")
			default:
			}
		}
		return false, nil
	})
	return d, err
}

func asJSON(v any) json.RawMessage {
	raw, _ := json.Marshal(v) // of numbers and strings
	return raw
}
