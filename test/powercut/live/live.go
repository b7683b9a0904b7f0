// Package live is a disk that is recorded while somebody works on it: its file system
// is mounted, and all that reaches the disk is in a recording of package blocks.
//
// It needs Linux, root (loop devices, FUSE), e2fsprogs and qemu-storage-daemon
// (Debian: qemu-system-common).
package live

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/packaging/qemu"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
	"github.com/deimos-edge/deimos/test/powercut/nbd"
)

const (
	diskSize  = 192 << 20 // bytes
	toolLimit = 2 * time.Minute
)

// Disk is a disk that is recorded, with a file system on it that is mounted: a
// file system on a loop device, on a file that qemu-storage-daemon makes by FUSE of
// a disk of package nbd.
type Disk struct {
	Rec    *blocks.Recorder
	ended  atomic.Bool
	server *nbd.Server
	daemon *proc.Process
	file   *os.File
	loop   *blocks.Loop
	Dir    string // where it is mounted; "" if it is not
	image  string
}

// Write, Zero and Flush pass on what happens until the end.
func (d *Disk) Write(offset int64, data []byte, fua bool) error {
	if d.ended.Load() {
		return nil
	}
	return d.Rec.Write(offset, data, fua)
}

// Zero is of [nbd.Observer].
func (d *Disk) Zero(offset, length int64, fua bool) error {
	if d.ended.Load() {
		return nil
	}
	return d.Rec.Zero(offset, length, fua)
}

// Flush is of [nbd.Observer].
func (d *Disk) Flush(changes int) error {
	if d.ended.Load() {
		return nil
	}
	return d.Rec.Flush(changes)
}

// format makes the disk as packaging/init makes the data partition.
func format(ctx context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, toolLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-m", "1",
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, out)
	}
	return nil
}

// Start formats a disk, records to dir what happens to it from then on, and
// mounts it below scratch, which must have a short path.
func Start(ctx context.Context, starter *proc.Starter, scratch, dir string) (d *Disk, err error) {
	base := filepath.Join(dir, "base")
	if err := format(ctx, base); err != nil {
		return nil, err
	}
	d = &Disk{image: filepath.Join(blocks.Roomy(), filepath.Base(scratch)+"-live")}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.End())
		}
	}()
	if err := qemu.CopyDisk(base, d.image, diskSize); err != nil {
		return nil, err
	}
	if d.Rec, err = blocks.NewRecorder(dir); err != nil {
		return nil, err
	}
	socket := filepath.Join(scratch, "nbd")
	if d.server, err = nbd.Serve(socket, d.image, d); err != nil {
		return nil, err
	}
	if err := d.fuse(ctx, starter, socket, filepath.Join(scratch, "disk")); err != nil {
		return nil, err
	}
	if d.loop, err = blocks.Attach(d.file, 0, diskSize); err != nil {
		return nil, err
	}
	mounted := filepath.Join(scratch, "mounted")
	if err := blocks.Mount(d.loop.Path, mounted); err != nil {
		return nil, err
	}
	d.Dir = mounted
	return d, nil
}

// fuse makes a file of the disk that is served at socket.
func (d *Disk) fuse(ctx context.Context, starter *proc.Starter, socket, file string) (err error) {
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	if d.daemon, err = starter.Start(ctx, proc.Command{Log: file + ".log", Argv: []string{"qemu-storage-daemon",
		"--blockdev", "driver=nbd,node-name=disk,discard=unmap,server.type=unix,server.path=" + socket,
		"--export", "type=fuse,id=file,node-name=disk,writable=on,growable=off,mountpoint=" + file}}); err != nil {
		return err
	}
	for end := time.Now().Add(toolLimit); ; {
		info, err := os.Stat(file)
		if err == nil && info.Size() == diskSize {
			break
		}
		if d.daemon.Ended() || time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("qemu-storage-daemon has made no disk: %s: %w", d.daemon.LastWords(), errors.Join(err, ctx.Err()))
		}
		time.Sleep(5 * time.Millisecond)
	}
	d.file, err = os.OpenFile(file, os.O_RDWR, 0)
	return err
}

// End is the power cut, and what is left to do for those who live on.
func (d *Disk) End() (err error) {
	d.ended.Store(true)
	if d.Dir != "" {
		err = blocks.Unmount(d.Dir)
	}
	if d.loop != nil {
		err = errors.Join(err, d.loop.Detach())
	}
	if d.file != nil {
		err = errors.Join(err, d.file.Close())
	}
	if d.daemon != nil {
		d.daemon.Stop(toolLimit)
	}
	if d.server != nil {
		err = errors.Join(err, d.server.Close())
	}
	if d.Rec != nil {
		err = errors.Join(err, d.Rec.Close())
	}
	return errors.Join(err, os.RemoveAll(d.image))
}
