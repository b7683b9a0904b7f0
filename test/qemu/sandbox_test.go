package qemu

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/packaging/image/debian"
	"github.com/deimos-edge/deimos/packaging/image/initramfs"
	"github.com/deimos-edge/deimos/test/testbed"
)

// TestJobsAreBoundedByRealCgroups runs those of the sandbox's tests that need a kernel
// with all controllers in cgroups of version 2: that of the image, with the tests as its
// process 1 (jobs/sandbox/machine_test.go) and nothing else.
func TestJobsAreBoundedByRealCgroups(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), testLimit)
	defer cancel()
	dir := t.TempDir()
	kernel, initrd := sandboxMachine(ctx, t, dir)
	// No network, no disk. The kernel hands what is behind -- to process 1.
	argv := []string{"qemu-system-aarch64",
		"-M", "virt,acpi=off", "-cpu", "cortex-a57", "-smp", "2", "-m", "1024", "-accel", "tcg,thread=multi",
		"-display", "none", "-serial", "stdio", "-monitor", "none", "-nic", "none", "-no-reboot", "-device", "virtio-rng-pci",
		"-kernel", kernel, "-initrd", initrd,
		"-append", "console=ttyAMA0 quiet panic=-1 -- -test.v -test.count=1 -test.timeout=10m -test.run=^TestCgroup|^TestEachWorkerHas"}
	r, err := testbed.Starter.Run(ctx, proc.Command{Argv: argv})
	said := strings.ReplaceAll(string(r.Stdout), "\r", "")
	if err != nil || r.Code != 0 || !strings.Contains(said, "the tests ended with code 0.") {
		t.Fatalf("code %d, %v: %s\n%s", r.Code, err, r.Stderr, said)
	}
	for _, name := range []string{"TestCgroupBoundsMemoryThatNoRlimitCounts", "TestCgroupBoundsThreads", "TestCgroupKeepsAJobToItsShareOfCPU", "TestEachWorkerHasACgroupThatEndsWithIt"} {
		if !strings.Contains(said, "--- PASS: "+name) {
			t.Errorf("%s did not run:\n%s", name, said)
		}
	}
}

// sandboxMachine makes the machine's kernel and its only program.
func sandboxMachine(ctx context.Context, t *testing.T, dir string) (kernel, initrd string) {
	t.Helper()
	packages, err := debian.Locked()
	if err != nil {
		t.Fatal(err)
	}
	packages = slices.DeleteFunc(packages, func(p debian.Package) bool { return !strings.HasPrefix(p.Name, debian.KernelPrefix) })
	unpacked := filepath.Join(dir, "kernel")
	if err := debian.Fetch(ctx, packages, filepath.Join("..", "..", ".tools", "debian"), unpacked); err != nil {
		t.Fatal(err)
	}
	kernels, err := filepath.Glob(filepath.Join(unpacked, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		t.Fatalf("there are %d kernels in the package; one was wanted", len(kernels))
	}
	tests := filepath.Join(dir, "sandbox.test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", tests, "../../jobs/sandbox")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=arm64")
	build.WaitDelay = time.Minute
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	raw, err := os.ReadFile(tests)
	if err != nil {
		t.Fatal(err)
	}
	var root initramfs.Archive
	root.Dir("proc", "sys", "dev", "tmp")
	root.File("init", raw, true)
	packed, err := root.Bytes()
	initrd = filepath.Join(dir, "initrd")
	if err := errors.Join(err, os.WriteFile(initrd, packed, 0o600)); err != nil {
		t.Fatal(err)
	}
	return kernels[0], initrd
}
