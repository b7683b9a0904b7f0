package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// inMachine is set where these tests run on a kernel of their own, see test/qemu: some
// walls need one that has its controllers in cgroups of version 2.
const inMachine = "DEIMOS_TEST_IN_MACHINE"

// beMachine is process 1 of such a machine, which has nothing but this program. Its
// arguments are those of the kernel's command line behind "--". It does not return.
func beMachine() {
	code := -1
	if err := mountKernel(); err != nil {
		fmt.Println("init:", err)
	} else {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = []string{inMachine + "=1", "CI=true", "TMPDIR=/tmp"}
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		if err := cmd.Run(); err != nil {
			fmt.Println("init:", err)
		}
		code = cmd.ProcessState.ExitCode()
	}
	fmt.Printf("the tests ended with code %d.\n", code)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func mountKernel() error {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"cgroup2", "/sys/fs/cgroup"},
	} {
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	return nil
}
