//go:build crashpoints

package slot

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Built with the tag "crashpoints", a process kills itself with SIGKILL at the
// nth of these points, n from DEIMOS_CRASH_AT, if its program is called
// DEIMOS_CRASH_IN. Tests run n = 1, 2, … until the process survives, so that
// they meet every point there is.
var crashCount, crashAt = new(atomic.Int64), func() int64 {
	if filepath.Base(os.Args[0]) != os.Getenv("DEIMOS_CRASH_IN") {
		return 0
	}
	n, _ := strconv.ParseInt(os.Getenv("DEIMOS_CRASH_AT"), 10, 64)
	return n
}()

// CrashPoint is one of these points.
func CrashPoint(name string) {
	if n := crashCount.Add(1); n == crashAt {
		fmt.Fprintf(os.Stderr, "crash point %d: %s\n", n, name)
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // the signal is on its way
	}
}
