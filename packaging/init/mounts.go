package main

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

type mount struct {
	source, target, kind, options string
	flags                         uintptr
}

const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// kernelMounts are what the kernel offers, in this order.
var kernelMounts = []mount{
	{"proc", "/proc", "proc", "", quiet},
	{"sysfs", "/sys", "sysfs", "", quiet},
	{"devtmpfs", "/dev", "devtmpfs", "mode=0755", unix.MS_NOSUID},
	{"devpts", "/dev/pts", "devpts", "mode=0620,ptmxmode=0666", unix.MS_NOSUID | unix.MS_NOEXEC},
	{"tmpfs", "/dev/shm", "tmpfs", "size=16m,mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
	{"tmpfs", "/run", "tmpfs", "size=16m,mode=0755", unix.MS_NOSUID | unix.MS_NODEV},
	{"tmpfs", "/tmp", "tmpfs", "size=64m,mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", "", quiet},
}

// variablesMount is UEFI's variables. The file system is a module in Debian's
// kernel, and not every machine has UEFI.
var variablesMount = mount{"efivarfs", "/sys/firmware/efi/efivars", "efivarfs", "", quiet | unix.MS_RDONLY}

// mountAll mounts what it can and returns what it could not.
func mountAll(list []mount) error {
	var failed []error
	for _, m := range list {
		_ = os.MkdirAll(m.target, 0o755) // not below sysfs: what is not there, this kernel does not have
		err := unix.Mount(m.source, m.target, m.kind, m.flags, m.options)
		if err != nil && !errors.Is(err, unix.EBUSY) {
			failed = append(failed, fmt.Errorf("mount %s: %w", m.target, err))
		}
	}
	return errors.Join(failed...)
}

// loadModules loads the kernel's modules that list names, in its order. A module that
// this machine cannot use, such as a driver without its device, is no failure of the others.
func loadModules(list, dir string, log *slog.Logger) error {
	f, err := os.Open(list)
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel with everything in it
	}
	if err != nil {
		return err
	}
	defer f.Close()
	loaded := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, params, _ := strings.Cut(strings.TrimSpace(lines.Text()), " ")
		if name == "" || strings.HasPrefix(name, "#") {
			continue
		}
		if err := loadModule(filepath.Join(dir, filepath.Base(name)), params); err != nil {
			log.Warn("a module of the kernel is not loaded", "module", name, "error", err)
			continue
		}
		loaded++
	}
	log.Info("loaded modules of the kernel", "modules", loaded)
	return nil
}

// loadModule lets the kernel unpack what is compressed (since 5.17, if it was built so).
func loadModule(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	if err := unix.FinitModule(int(f.Fd()), params, flags); err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}
