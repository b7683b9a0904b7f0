// Command record-qemu records QEMU's virtual ARM machine (virt, with device
// tree) with an NVMe disk, a network card and a watchdog, as a folder that
// "deimos-agent probe --root" shows. This is how hw/testdata/qemu-virt-arm64.tree
// is made, in about 10 seconds:
//
//	go run ./packaging/record-qemu DIR
//	go test ./hw -run TestPack -pack "$PWD/DIR=qemu-virt-arm64"
//
// It needs qemu-system-aarch64 (Debian: qemu-system-arm), dpkg-deb, and Debian's
// kernel for arm64: a package named with -kernel, or else the one that the image
// is made from.
//
// The same program is process 1 of the machine: it loads the modules that it was
// given, has the agent record the machine, writes the record to the console as a tar file in
// base64, and switches off.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/packaging/image/debian"
)

const (
	bootLimit = 2 * time.Minute // 3 seconds, where nothing else runs
	begin     = "BEGIN RECORD"
	end       = "END RECORD"
)

// modules are what the machine needs beyond the kernel; what they depend on is found.
var modules = []string{"virtio_pci", "virtio_net", "nvme", "i6300esb"}

func main() {
	if os.Getpid() == 1 {
		beInit()
	}
	kernel := flag.String("kernel", "", "Debian package of an arm64 kernel; that of the image if not given")
	agent := flag.String("agent", "./cmd/deimos-agent", "package of the agent")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: record-qemu [-kernel FILE.deb] DIR")
		os.Exit(2)
	}
	if err := record(*kernel, *agent, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "record-qemu:", err)
		os.Exit(1)
	}
}

func record(deb, agent, dir string) error {
	tmp, err := os.MkdirTemp("", "record-qemu-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()

	kernel := filepath.Join(tmp, "kernel")
	if deb == "" {
		err = lockedKernel(ctx, kernel)
	} else {
		err = run(ctx, "dpkg-deb", "-x", deb, kernel)
	}
	if err != nil {
		return err
	}
	for name, pkg := range map[string]string{"init": "./packaging/record-qemu", "deimos-agent": agent} {
		if err := run(ctx, "go", "build", "-trimpath", "-ldflags=-s", "-o", filepath.Join(tmp, name), pkg); err != nil {
			return err
		}
	}
	initrd, err := makeInitrd(tmp, kernel)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tmp, "initrd"), initrd, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tmp, "disk"), nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(filepath.Join(tmp, "disk"), 1<<30); err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(kernel, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return fmt.Errorf("there are %d kernels in the package; one was wanted", len(images))
	}
	console, err := boot(ctx, tmp, images[0])
	if err != nil {
		return err
	}
	if err := unpack(console, dir); err != nil {
		return fmt.Errorf("%w; the machine said:\n%s", err, console)
	}
	return nil
}

// lockedKernel unpacks the kernel that the image has, too.
func lockedKernel(ctx context.Context, dir string) error {
	packages, err := debian.Locked()
	if err != nil {
		return err
	}
	packages = slices.DeleteFunc(packages, func(p debian.Package) bool { return !strings.HasPrefix(p.Name, debian.KernelPrefix) })
	return debian.Fetch(ctx, packages, filepath.Join(".tools", "debian"), dir)
}

func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	if name == "go" {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=arm64")
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, out)
	}
	return nil
}

// boot runs the machine until it switches off and returns what it wrote to its console.
func boot(ctx context.Context, tmp, image string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-aarch64",
		"-M", "virt,acpi=off", "-cpu", "cortex-a57", "-smp", "2", "-m", "512", "-nographic", "-no-reboot",
		"-kernel", image, "-initrd", filepath.Join(tmp, "initrd"), "-append", "console=ttyAMA0 quiet panic=-1",
		"-drive", "file="+filepath.Join(tmp, "disk")+",format=raw,if=none,id=disk", "-device", "nvme,drive=disk,serial=DEIMOS-RECORD-1",
		"-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,mac=52:54:00:12:34:56,romfile=",
		"-device", "i6300esb")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("run the machine: %w; it said:\n%s", err, out)
	}
	return bytes.ReplaceAll(out, []byte("\r"), nil), nil
}
