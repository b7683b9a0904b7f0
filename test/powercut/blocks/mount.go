package blocks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const toolLimit = 2 * time.Minute

// e2fsck runs it; what it could repair is no error.
func e2fsck(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), toolLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "e2fsck", args...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && (exit.ExitCode() == 1 || exit.ExitCode() == 2) {
		return nil // repaired
	}
	if err != nil {
		return fmt.Errorf("e2fsck %s: %w: %s", args[0], err, strings.Join(strings.Split(strings.TrimSpace(string(out)), "\n"), "; "))
	}
	return nil
}

// Loop is a part of a file as a block device.
type Loop struct {
	Path string
	dev  *os.File
}

// Attach makes a block device of size bytes of a file.
func Attach(f *os.File, from, size int64) (*Loop, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("a loop device is needed (as root): %w", err)
	}
	defer control.Close()
	for range 50 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		l := &Loop{Path: fmt.Sprintf("/dev/loop%d", n)}
		if l.dev, err = os.OpenFile(l.Path, os.O_RDWR, 0); err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(l.dev.Fd()), &unix.LoopConfig{Fd: uint32(f.Fd()), Size: Sector,
			Info: unix.LoopInfo64{Offset: uint64(from), Sizelimit: uint64(size), Flags: unix.LO_FLAGS_AUTOCLEAR}})
		if err == nil {
			return l, nil
		}
		l.dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("the loop device %s: %w", l.Path, err)
		}
	}
	return nil, errors.New("others take every loop device first")
}

// Detach lets go of it; it ends with its last user.
func (l *Loop) Detach() error { return l.dev.Close() }

// Mount mounts the file system of a device as packaging/init does.
func Mount(device, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(device, dir, "ext4", unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID, "errors=remount-ro"); err != nil {
		return fmt.Errorf("the file system cannot be mounted: %w", err)
	}
	return nil
}

// Unmount waits for who still looks at the folder.
func Unmount(dir string) (err error) {
	for range 50 {
		if err = unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("unmount %s: %w", dir, err)
}

// Roomy is a folder for disks: in memory if there is room, which is many times
// as fast.
func Roomy() string {
	const shm = "/dev/shm"
	var st unix.Statfs_t
	if unix.Statfs(shm, &st) == nil && int64(st.Bavail)*int64(st.Bsize) > 4<<30 {
		return shm
	}
	return os.TempDir()
}
