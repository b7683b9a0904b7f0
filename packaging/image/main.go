// Command image makes the disk image of a device: arm64, UEFI, everything in
// one file that is written to a disk or started under QEMU. It needs no root
// and, with Debian's packages in its cache, no network. `make image` runs it.
//
// # What the image is
//
//	sector 0      protective MBR, GPT
//	1 MiB         partition 1, "deimos-esp": EFI system partition, FAT32, 256 MiB
//	257 MiB       1 MiB for the second copy of the GPT
//
// The first start makes partition 2, "deimos-data", in the rest of the disk.
//
// In the EFI system partition:
//
//	EFI/BOOT/BOOTAA64.EFI              systemd-boot, which UEFI starts from any disk
//	loader/loader.conf                 no menu, no editor
//	EFI/Linux/deimos_VERSION+3.efi     the firmware; +3 are the tries it has until it is confirmed.
//	                                   1.0.0-rc.1 is 1.0.0~rc.1 here (ota/slot/firmware)
//	deimos.toml                        the owner's configuration, if one was given
//
// A firmware is one file, a unified kernel image: systemd's EFI stub with Debian's
// kernel, its command line and an initramfs. It is also written beside the
// image, as deimos_VERSION.efi: that is what an update brings to a device. 256 MiB hold five;
// two are needed, and room for a third on its way. deimos_VERSION.cdx.json is what it is made
// of (ota/sbom), which a release takes along.
//
// The initramfs is the whole system:
//
//	/init                       process 1
//	/bin/deimos-agent           the agent
//	/sbin/mke2fs, e2fsck, resize2fs, their libraries in /lib, /etc/mke2fs.conf
//	/lib/modules.list           the kernel modules to load for the disks, file names, a line each, in this order
//	/lib/modules.later          the other ones
//	/lib/modules/*.ko           the modules
//	/etc/os-release, /etc/deimos-release
//	/bin/busybox, /bin/sh       only in the debug variant
//
// # What always holds
//
//   - Debian's packages are those of debian.lock, by SHA-256, or nothing is made.
//   - The same sources, lock and Go release give the same bytes: no times, no
//     random ids, everything sorted. So all devices share the ids of their disk
//     and of their EFI system partition; what tells devices apart is the agent's key.
//   - The image appears under its name when it is whole.
//
// # Not done yet
//
// Nothing is signed for UEFI Secure Boot. The drivers are those of QEMU's virt,
// of servers and of USB; a board whose disk or network hangs on its own chip
// needs lines in the list of modules.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/ota/sbom"
	"github.com/deimos-edge/deimos/ota/slot"
	efi "github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/packaging/image/debian"
)

const (
	espSectors = 256 << 20 / sector
	imageSize  = (alignment + espSectors + alignment) * sector
	espSerial  = 0xDE1305E5 // of the file system

	loaderConf = "timeout 0\neditor no\nauto-entries no\nauto-firmware no\n"

	limit = 30 * time.Minute // for all of it, downloads included
)

// options is what is asked for.
type options struct {
	firmware
	config string // the owner's configuration, a file; empty for none
	out    string // folder
	cache  string
}

func main() {
	var o options
	flag.StringVar(&o.version, "version", "", "version of the firmware")
	flag.StringVar(&o.init, "init", "bin/arm64/deimos-init", "program that is process 1")
	flag.StringVar(&o.agent, "agent", "bin/arm64/deimos-agent", "the agent")
	flag.BoolVar(&o.debug, "debug", false, "with a shell (busybox) and the kernel's messages")
	flag.StringVar(&o.appended, "append", "", "more for the kernel's command line")
	flag.StringVar(&o.config, "config", "", "owner's configuration to put on the EFI system partition as deimos.toml")
	flag.StringVar(&o.out, "out", "bin/image", "folder for the image and the firmware")
	flag.StringVar(&o.cache, "cache", ".tools/debian", "folder where Debian's packages are kept")
	lock := flag.Bool("lock", false, "take Debian's newest packages, write their lock file, and make nothing")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var err error
	switch {
	case flag.NArg() > 0:
		err = fmt.Errorf("%q is no option", flag.Arg(0))
	case *lock:
		err = debian.Refresh(ctx, o.cache)
	default:
		var packages []debian.Package
		if packages, err = debian.Locked(); err == nil {
			err = build(ctx, o, packages)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// build makes the firmware and the image around it from Debian's packages.
func build(ctx context.Context, o options, packages []debian.Package) error {
	var err error
	if o.imageVersion, err = efi.ImageVersion(o.version); err != nil {
		return err
	}
	if o.unpacked, err = os.MkdirTemp("", "deimos-image-"); err != nil {
		return err
	}
	defer os.RemoveAll(o.unpacked)
	if err := debian.Fetch(ctx, packages, o.cache, o.unpacked); err != nil {
		return err
	}
	uki, err := o.image()
	if err != nil {
		return err
	}
	files, err := o.espFiles(uki)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	variant := ""
	if o.debug {
		variant = "-debug"
	}
	firmware := filepath.Join(o.out, "deimos_"+o.version+variant+".efi")
	if err := create(firmware, func(f *os.File) error { _, err := f.Write(uki); return err }); err != nil {
		return err
	}
	if err := o.list(firmware, packages); err != nil {
		return err
	}
	image := filepath.Join(o.out, "deimos-arm64-"+o.version+variant+".img")
	if err := create(image, func(f *os.File) error { return writeDisk(f, files) }); err != nil {
		return err
	}
	fmt.Printf("made   %s, with a firmware of %d MB\n", image, len(uki)/1e6)
	return nil
}

// list writes what a firmware is made of beside it.
func (o options) list(firmware string, packages []debian.Package) error {
	bill, err := sbom.NewFirmware(firmware, o.version)
	if err != nil {
		return err
	}
	for _, program := range []string{o.agent, o.init} {
		if err := bill.AddProgram(program, o.version); err != nil {
			return err
		}
	}
	for _, p := range packages {
		if p.Name == debian.Shell && !o.debug {
			continue
		}
		bill.AddDebian(sbom.Debian{Name: p.Name, Version: p.Version, Arch: debian.Arch, SHA256: p.SHA256})
	}
	raw, err := bill.JSON(time.Time{})
	if err != nil {
		return err
	}
	return create(sbom.Beside(firmware), func(f *os.File) error { _, err := f.Write(raw); return err })
}

// espFiles is what the EFI system partition holds.
func (o options) espFiles(uki []byte) ([]file, error) {
	loader, err := os.ReadFile(filepath.Join(o.unpacked, "usr/lib/systemd/boot/efi/systemd-bootaa64.efi"))
	if err != nil {
		return nil, err
	}
	files := []file{
		{"EFI/BOOT/BOOTAA64.EFI", loader},
		{"loader/loader.conf", []byte(loaderConf)},
		{fmt.Sprintf("EFI/Linux/deimos_%s+%d.efi", o.imageVersion, slot.Tries), uki},
	}
	if o.config != "" {
		raw, err := os.ReadFile(o.config)
		if err != nil {
			return nil, err
		}
		files = append(files, file{"deimos.toml", raw})
	}
	return files, nil
}

// writeDisk writes a whole disk; what is not written is a hole in the file.
func writeDisk(f *os.File, files []file) error {
	if err := f.Truncate(imageSize); err != nil {
		return err
	}
	if err := writeGPT(f, imageSize/sector, alignment, alignment+espSectors-1); err != nil {
		return err
	}
	return writeFAT(io.NewOffsetWriter(f, alignment*sector), espSectors, alignment, espSerial, "DEIMOS-ESP", files)
}

// create writes a file that appears under its name when it is whole.
func create(name string, write func(*os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := errors.Join(write(f), f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}
