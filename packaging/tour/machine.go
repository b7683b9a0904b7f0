package tour

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/packaging/qemu"
)

// With an image, the second device and those after it are virtual machines that start from
// a copy of it, and the first stays a process. It is the one that is stopped, tampered with
// and updated: its disk is open to us.
const (
	machineDisk = 1 << 30           // bytes that a machine starts from
	machineData = 4 << 30           // bytes of its NVMe disk
	machineJob  = 220 * time.Second // within the 4 minutes that the coordinator waits for a job
	slower      = 8                 // times; every instruction of a machine is translated
	labelOf     = "tour"            // names a machine's number: its key is out of our reach
)

func (t *tour) isMachine(d *device) bool { return t.Image != "" && d.n > 1 }

// patience is how long something may take in this fleet that takes limit in one
// of processes.
func (t *tour) patience(limit time.Duration) time.Duration {
	if t.Image == "" {
		return limit
	}
	return slower * limit
}

// startMachine switches a machine on, for the first time or again.
func (t *tour) startMachine(ctx context.Context, d *device, coordinator string) error {
	boot, data, config := d.state(t, "boot.img"), d.state(t, "data.img"), d.state(t, "deimos.toml")
	if d.boots == 0 {
		if err := t.makeMachine(ctx, d, coordinator, boot, data, config); err != nil {
			return err
		}
	}
	d.boots++
	dir := t.path("logs", fmt.Sprintf("device-%d-boot-%d", d.n, d.boots))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	m, err := qemu.Start(ctx, t.starter, dir, qemu.Options{Disks: []qemu.Disk{{File: boot}, {File: data, NVMe: true}}, Config: config})
	if err != nil {
		return err
	}
	d.proc = m
	return nil
}

// makeMachine makes disks and configuration. Each machine has a token of its own,
// whose label tells us later which of the devices it is.
func (t *tour) makeMachine(ctx context.Context, d *device, coordinator, boot, data, config string) error {
	if err := os.MkdirAll(d.state(t), 0o700); err != nil {
		return err
	}
	u, err := url.Parse(coordinator)
	if err != nil {
		return err
	}
	var tok api.Token
	if err := t.cli(ctx, &tok, "token", "create", "--group", "tour", "--label", labelOf+"="+strconv.Itoa(d.n), "--uses", "1"); err != nil {
		return err
	}
	words := fmt.Sprintf("coordinator = %q\ntoken = %q\n", "https://"+net.JoinHostPort(qemu.Host, u.Port()), tok.Token)
	if err := os.WriteFile(config, []byte(words), 0o600); err != nil {
		return err
	}
	if err := qemu.CopyDisk(t.Image, boot, machineDisk); err != nil {
		return err
	}
	if err := os.WriteFile(data, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(data, machineData)
}

// powerCut pulls the plug of a machine and has it prove what it holds when it is back.
func (t *tour) powerCut(ctx context.Context) ([]string, error) {
	d := t.devices[1]
	d.proc.Kill()
	began := time.Now()
	if err := until(ctx, t.patience(readyLimit), "the coordinator noticing that a device is gone", func() (bool, error) {
		fleet, err := t.devicesNow(ctx)
		return err == nil && !fleet[d.id].Online, err
	}); err != nil {
		return nil, err
	}
	gone := time.Since(began)
	if err := t.startDevice(ctx, d); err != nil {
		return nil, err
	}
	began = time.Now()
	if err := t.untilOnline(ctx, d); err != nil {
		return nil, err
	}
	back := time.Since(began)
	var a api.Audit
	if err := t.cli(ctx, &a, "audit", "storage", d.id, "--leaves", "64"); err != nil {
		return nil, err
	}
	if a.Right != a.Leaves || a.Right == 0 {
		return nil, fmt.Errorf("after the power cut the device proved %d of %d leaves", a.Right, a.Leaves)
	}
	return []string{
		fmt.Sprintf("device %d lost its power; the coordinator knew after %.1f s", d.n, gone.Seconds()),
		fmt.Sprintf("switched on again, it was online after %.1f s as the same device", back.Seconds()),
		fmt.Sprintf("it proved %d of %d random 4 KiB leaves of what it had given receipts for", a.Right, a.Leaves),
	}, nil
}

// running is what a device runs as: its launcher, or QEMU.
type running interface {
	Done() <-chan struct{}
	Kill()
	LastWords() string
}

var (
	_ running = (*proc.Process)(nil)
	_ running = (*qemu.Machine)(nil)
)
