package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/packaging/qemu"
)

// What a device of the image may use while nobody asks anything of it.
const (
	imageMemory   = 40  // MiB of the agent's own
	imageCPU      = 0.5 // % of a core
	imageOnline   = 30  // s from power-on
	imageDiskSize = 2 << 30

	imageStart = 3 * time.Minute
	// After it is online: the first probe, the inventory, and what the kernel writes
	// back of the boot half a minute later (inodes, bitmaps, FSInfo of the ESP).
	imageSettle = 90 * time.Second
	// The agent keeps its samples so long before it writes them (package hw/history).
	ringEvery = 5 * time.Minute
	// A block of the ring: its data and ext4's journal at once, and half a minute later
	// what the journal held; 10 writes were seen, and no others in six minutes.
	ringWrites = 12
)

// imageFigures is what was measured of a device in QEMU.
type imageFigures struct {
	online time.Duration // from power-on, the firmware and the first boot's partition included
	memory float64       // of the agent, anonymous, MiB
	cpu    float64       // of the agent, % of one emulated core of 500 million instructions a second: they are counted, see [qemu.Options]
	disk   qemu.Written
}

// inImage boots the image, has it join, and leaves it alone for so long. What
// the agent says of itself comes with its heartbeats; what the disk was asked to
// write is QEMU's word.
func inImage(ctx context.Context, image string, idle time.Duration) (f imageFigures, err error) {
	dir, err := os.MkdirTemp("", "d")
	if err != nil {
		return f, err
	}
	defer os.RemoveAll(dir)
	opened, err := newOurSide(dir)
	if err != nil {
		return f, err
	}
	s := opened.(*ourSide)
	s.advertise = qemu.Host
	if err := s.start(ctx); err != nil {
		return f, err
	}
	defer s.close()
	o, err := s.imageOptions(ctx, dir, image)
	if err != nil {
		return f, err
	}
	starter := proc.NewStarter()
	defer starter.End()
	run := filepath.Join(dir, "q")
	if err := os.Mkdir(run, 0o700); err != nil {
		return f, err
	}
	began := time.Now()
	m, err := qemu.Start(ctx, starter, run, o)
	if err != nil {
		return f, err
	}
	defer m.Kill()
	start, cancel := context.WithTimeout(ctx, imageStart)
	defer cancel()
	if err := s.awaitOnline(start); err != nil {
		return f, fmt.Errorf("the device did not come online: %w; its console ends with\n%s", err, lastOf(m.Said(), 2000))
	}
	f.online = time.Since(began)
	if err := rest(ctx, imageSettle); err != nil {
		return f, err
	}
	return f, f.watch(ctx, s, m, idle)
}

// imageOptions is a machine with a copy of the image and a token.
func (s *ourSide) imageOptions(ctx context.Context, dir, image string) (o qemu.Options, err error) {
	tok, err := s.client.CreateToken(ctx, api.TokenRequest{Uses: 1, ValidSeconds: 3600})
	if err != nil {
		return o, err
	}
	disk, config := filepath.Join(dir, "disk"), filepath.Join(dir, "deimos.toml")
	if err := qemu.CopyDisk(image, disk, imageDiskSize); err != nil {
		return o, err
	}
	_, port, err := net.SplitHostPort(s.https)
	if err != nil {
		return o, err
	}
	text := fmt.Sprintf("coordinator = \"https://%s:%s\"\ntoken = %q\n", qemu.Host, port, tok.Token)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return o, err
	}
	return qemu.Options{Disks: []qemu.Disk{{File: disk, NVMe: true}}, Config: config, Counted: true}, nil
}

func (s *ourSide) awaitOnline(ctx context.Context) (err error) {
	for {
		list, err := s.client.Devices(ctx)
		if err != nil {
			return err
		}
		if len(list) == 1 && list[0].Online {
			return nil
		}
		if err := rest(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// watch leaves the machine alone between two heartbeats that are about so far apart.
func (f *imageFigures) watch(ctx context.Context, s *ourSide, m *qemu.Machine, idle time.Duration) error {
	first, err := s.heartbeat(ctx, time.Time{})
	if err != nil {
		return err
	}
	before, err := m.Written(ctx)
	if err != nil {
		return err
	}
	if err := rest(ctx, idle); err != nil {
		return err
	}
	after, err := m.Written(ctx)
	if err != nil {
		return err
	}
	if len(before) != 1 || len(after) != 1 {
		return fmt.Errorf("QEMU tells of %d disks, not of one", len(after))
	}
	f.disk = qemu.Written{Writes: after[0].Writes - before[0].Writes, Flushes: after[0].Flushes - before[0].Flushes, Bytes: after[0].Bytes - before[0].Bytes}
	last, err := s.heartbeat(ctx, first.At)
	if err != nil {
		return err
	}
	f.memory = float64(last.Agent.Anonymous) / (1 << 20)
	f.cpu = 100 * (last.Agent.CPUSeconds - first.Agent.CPUSeconds) / last.At.Sub(first.At).Seconds()
	return nil
}

// heartbeat is the newest telemetry, once it is later than after.
func (s *ourSide) heartbeat(ctx context.Context, after time.Time) (t hw.Telemetry, err error) {
	ctx, cancel := context.WithTimeout(ctx, imageStart)
	defer cancel()
	for {
		list, err := s.client.Devices(ctx)
		if err != nil {
			return t, err
		}
		if len(list) != 1 {
			return t, errors.New("the device is no longer a member")
		}
		device, err := s.client.Device(ctx, string(list[0].ID))
		if err != nil {
			return t, err
		}
		if len(device.Telemetry) > 0 {
			if err := json.Unmarshal(device.Telemetry, &t); err != nil {
				return t, err
			}
			if t.At.After(after) {
				return t, nil
			}
		}
		if err := rest(ctx, time.Second); err != nil {
			return t, fmt.Errorf("no heartbeat of the device: %w", err)
		}
	}
}

func lastOf(s string, n int) string { return s[max(0, len(s)-n):] }

// imageRows are the rows on a device of the image; where it cannot be run, it is said why.
func imageRows(ctx context.Context, t *table) error {
	images := []string{*image}
	if *image == "" {
		images, _ = filepath.Glob(filepath.Join(*bin, "image", "deimos-arm64-*[0-9].img"))
	}
	_, err := qemu.Find()
	if err == nil && len(images) != 1 {
		err = fmt.Errorf("there are %d images in %s (make image), not one; name one with -image", len(images), filepath.Join(*bin, "image"))
	}
	if err != nil {
		fmt.Printf("left out: a device of the image: %v\n", err)
		return nil
	}
	f, err := inImage(ctx, images[0], *idleFor)
	if err != nil {
		return fmt.Errorf("a device of the image: %w", err)
	}
	t.limit("image: power-on to online", "s", f.online.Seconds(), imageOnline, "%.1f")
	t.limit("image: idle agent's memory", "MiB", f.memory, imageMemory, "%.1f")
	t.limit("image: idle agent, of a core", "%", f.cpu, imageCPU, "%.3f")
	t.idleWrites(f.disk, *idleFor)
	return nil
}

// idleWrites are the rows on what an idle device wrote in so long. A time that is
// shorter than the ring's has one of its blocks in it or none, as chance will have it:
// a limit that allows one would pass an agent that writes all the time, so there is
// none.
func (t *table) idleWrites(w qemu.Written, idle time.Duration) {
	writes, bytes := fmt.Sprintf("image: disk writes in %s", idle), fmt.Sprintf("image: KiB written in %s", idle)
	if idle < ringEvery {
		t.only(writes, "", float64(w.Writes), "%.0f")
		t.only(bytes, "KiB", float64(w.Bytes)/1024, "%.0f")
		fmt.Printf("no verdict on what an idle device writes: that takes %s at least (IDLE=%[1]s)\n", ringEvery)
		return
	}
	blocks := math.Ceil(idle.Seconds() / ringEvery.Seconds()) // at most
	t.limit(writes, "", float64(w.Writes), blocks*ringWrites, "%.0f")
	t.row(bytes, "KiB", float64(w.Bytes)/1024, blocks*ringWrites*8, "%.0f")
}
