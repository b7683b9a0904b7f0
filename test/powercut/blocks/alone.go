package blocks

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// aloneEnv says to a program started by [Alone] that it is.
const aloneEnv = "DEIMOS_POWERCUT_ALONE"

// Alone starts this program anew where nobody else sees what it mounts. A container, or a
// sandbox, that begins meanwhile would get a copy of our mounts, and keep a file
// system alive, and written to, that we have left and whose disk we go on with.
func Alone() error {
	if os.Getenv(aloneEnv) != "" {
		return os.Unsetenv(aloneEnv)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // namespaces are those of a thread; exec keeps this one's
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mounts of its own are needed (as root): %w", err)
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts of its own are needed: %w", err)
	}
	return unix.Exec(self, os.Args, append(os.Environ(), aloneEnv+"=1"))
}
