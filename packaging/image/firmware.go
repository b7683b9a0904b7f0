package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/deimos-edge/deimos/packaging/image/initramfs"
	"github.com/klauspost/compress/zstd"
)

// diskModules are what a machine may need beyond the kernel to reach its disks, in
// the order of /lib/modules.list; what they depend on is found. A driver whose
// hardware is missing costs its memory only, so generic hardware is here, too.
var diskModules = []string{
	"crc32c_generic", "ext4", // asks for the checksum by name, which no dependency tells
	"nls_cp437", "nls_ascii", "nls_utf8", "vfat", "efivarfs",
	"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "virtio_rng", "qemu_fw_cfg",
	"nvme", "ahci", "sd_mod", "xhci_pci", "usb_storage", "uas", "mmc_block", "sdhci_pci", "sdhci_acpi",
}

// laterModules are the rest, in /lib/modules.later: loaded while the disks are prepared.
var laterModules = []string{
	"virtio_net", "r8169", "e1000e", "igb", "cdc_ether", "r8152",
	"i6300esb", "sbsa_gwdt",
	"gpio_keys", "usbhid", "hid_generic", "evdev", // buttons and keyboards; those of ACPI are in the kernel
	"leds_gpio", "i2c_dev", "virtio_console",
}

// commandLine is the kernel's. No console is named: the kernel takes the one
// that the device tree or ACPI names. A panic restarts the machine, so that a
// firmware that cannot even start uses up its tries.
const (
	commandLine      = "panic=10 quiet"
	commandLineDebug = "panic=10"
)

// firmware is one whole firmware: what goes into a unified kernel image.
type firmware struct {
	version      string // of the release
	imageVersion string // the same as the boot loader has it
	init, agent  string // files of the two programs
	unpacked     string // Debian's packages, unpacked
	debug        bool   // with a shell
	appended     string // to the kernel's command line
}

// image makes the unified kernel image.
func (fw firmware) image() ([]byte, error) {
	root, err := fw.root()
	if err != nil {
		return nil, err
	}
	packed, err := compress(root)
	if err != nil {
		return nil, err
	}
	kernels, err := filepath.Glob(filepath.Join(fw.unpacked, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return nil, fmt.Errorf("the packages have %d kernels, not one", len(kernels))
	}
	kernel, err := os.ReadFile(kernels[0])
	if err != nil {
		return nil, err
	}
	stub, err := os.ReadFile(filepath.Join(fw.unpacked, "usr/lib/systemd/boot/efi/linuxaa64.efi.stub"))
	if err != nil {
		return nil, err
	}
	line := commandLine
	if fw.debug {
		line = commandLineDebug
	}
	return makeUKI(stub, []section{
		{".osrel", fw.osRelease()},
		{".cmdline", []byte(strings.TrimSpace(line + " " + fw.appended))},
		{".linux", kernel},
		{".initrd", packed},
	})
}

// osRelease is os-release(5); systemd-boot sorts by IMAGE_ID and IMAGE_VERSION.
func (fw firmware) osRelease() []byte {
	return fmt.Appendf(nil, "ID=deimos\nNAME=Deimos\nPRETTY_NAME=\"Deimos %[1]s\"\nVERSION_ID=%[1]s\nIMAGE_ID=deimos\nIMAGE_VERSION=%[2]s\n", fw.version, fw.imageVersion)
}

// root is the root file system, which stays in memory.
func (fw firmware) root() ([]byte, error) {
	var root initramfs.Archive
	root.Dir("dev", "proc", "sys", "run", "tmp", "data", "root", "bin", "sbin")
	root.File("etc/os-release", fw.osRelease(), false)
	root.File("etc/deimos-release", []byte(fw.version+"\n"), false)
	for name, from := range map[string]string{"init": fw.init, "bin/deimos-agent": fw.agent} {
		if err := addFile(&root, name, from, true); err != nil {
			return nil, err
		}
	}
	if err := addFile(&root, "etc/mke2fs.conf", filepath.Join(fw.unpacked, "etc/mke2fs.conf"), false); err != nil {
		return nil, err
	}
	if err := fw.addPrograms(&root, "sbin/mke2fs", "sbin/resize2fs", "sbin/e2fsck"); err != nil {
		return nil, err
	}
	if err := fw.addModules(&root); err != nil {
		return nil, err
	}
	if fw.debug {
		if err := addFile(&root, "bin/busybox", filepath.Join(fw.unpacked, "bin/busybox"), true); err != nil {
			return nil, err
		}
		root.Symlink("bin/sh", "busybox")
	}
	return root.Bytes()
}

func addFile(root *initramfs.Archive, name, from string, program bool) error {
	raw, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	root.File(name, raw, program)
	return nil
}

func (fw firmware) addModules(root *initramfs.Archive) error {
	first, err := initramfs.Modules(fw.unpacked, diskModules)
	if err != nil {
		return err
	}
	all, err := initramfs.Modules(fw.unpacked, slices.Concat(diskModules, laterModules))
	if err != nil {
		return err
	}
	lists := map[string][]string{"lib/modules.list": first, "lib/modules.later": all[len(first):]}
	for name, files := range lists {
		var list strings.Builder
		for _, f := range files {
			name := filepath.Base(f)
			list.WriteString(name + "\n")
			if err := addFile(root, "lib/modules/"+name, f, false); err != nil {
				return err
			}
		}
		root.File(name, []byte(list.String()), false)
	}
	return nil
}

// addPrograms adds programs with their libraries, which all stand in /lib, where
// the dynamic linker of Debian looks, too.
func (fw firmware) addPrograms(root *initramfs.Archive, names ...string) error {
	done := map[string]bool{}
	var needs func(from string) error
	needs = func(from string) error {
		libraries, err := neededBy(from)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		for _, lib := range libraries {
			if done[lib] {
				continue
			}
			done[lib] = true
			file, err := fw.library(lib)
			if err != nil {
				return fmt.Errorf("%s: %w", from, err)
			}
			if err := addFile(root, "lib/"+lib, file, true); err != nil {
				return err
			}
			if err := needs(file); err != nil {
				return err
			}
		}
		return nil
	}
	for _, name := range names {
		file := filepath.Join(fw.unpacked, name)
		if err := addFile(root, name, file, true); err != nil {
			return err
		}
		if err := needs(file); err != nil {
			return err
		}
	}
	return nil
}

// library finds a library in Debian's packages.
func (fw firmware) library(name string) (string, error) {
	for _, dir := range []string{"lib", "lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu"} {
		file := filepath.Join(fw.unpacked, dir, name)
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			return file, err
		}
	}
	return "", fmt.Errorf("needs %s, which none of the packages has", name)
}

// neededBy lists the shared libraries of a program or library.
func neededBy(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.ImportedLibraries()
}

// compress packs as zstd, which the kernel unpacks while it starts.
func compress(raw []byte) ([]byte, error) {
	var out bytes.Buffer
	// One worker: how the work is shared out must not show in the bytes.
	w, err := zstd.NewWriter(&out, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(raw); err != nil {
		return nil, err
	}
	err = w.Close()
	return out.Bytes(), err
}
