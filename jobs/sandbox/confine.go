package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// engineAllowance is what a worker may map beside linear memory while the
	// module runs: call stack, tables, garbage. Endless recursion ends here or
	// at wazero's own ceiling of 100 MB.
	engineAllowance = 160 << 20
	// maxCompile and leastCompile bound [Spec.CompileBytes].
	maxCompile, leastCompile = 1 << 30, 256 << 20
	// compileHeap is from where on garbage is collected while compiling.
	compileHeap = 64 << 20
	// maxCodeFile bounds one file of compiled code.
	maxCodeFile = 256 << 20
	// compileThreads is how many functions are compiled at a time.
	compileThreads = 2
)

// confinement is what a worker needs of itself once it can open nothing more.
type confinement struct {
	status *os.File // /proc/self/status
	walls  []string // as [Walls] names them
}

// confine takes from this process what compiling does not need.
func confine(t task) (confinement, error) {
	var c confinement
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return c, fmt.Errorf("become undumpable: %w", err)
	}
	if err := closeInherited(t.lastFD()); err != nil {
		return c, err
	}
	// Best effort: where it is refused, the kernel's own choice stands.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0)
	var err error
	if c.status, err = os.Open("/proc/self/status"); err != nil {
		return c, fmt.Errorf("open own status: %w", err)
	}
	// Behind the parent, who can tell the reason.
	cpu := uint64(math.Ceil(t.CPU)) + 1
	runtime.GOMAXPROCS(compileThreads)
	// Loading compiled code makes little garbage, compiling much: collect when
	// it begins to matter, not before.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(compileHeap)
	has := c.field("VmData")
	err = errors.Join(
		limit(unix.RLIMIT_CORE, 0, "core size"),
		limit(unix.RLIMIT_CPU, cpu, "CPU"),
		limit(unix.RLIMIT_FSIZE, maxCodeFile, "file size"),
		limit(unix.RLIMIT_NOFILE, 64+uint64(t.lastFD()), "open files"),
		// However much compiling takes, what the module may have beside it can be set later.
		limitTo(unix.RLIMIT_DATA, uint64(has+t.Compile), uint64(has+t.Compile+t.Memory+engineAllowance), "data"),
	)
	if err != nil {
		return c, err
	}
	c.walls = Walls()
	if slices.Contains(c.walls, WallLandlock) {
		if err := wallIn(t.CacheDir); err != nil {
			return c, err
		}
	}
	if slices.Contains(c.walls, WallSeccomp) {
		return c, compiling().load()
	}
	return c, nil
}

// tighten takes what running does not need.
func (c confinement) tighten(t task) error {
	debug.SetGCPercent(100)
	// With one processor nothing wants to stop the module's thread, which in
	// compiled code cannot be preempted.
	runtime.GOMAXPROCS(1)
	err := errors.Join(
		limit(unix.RLIMIT_DATA, uint64(c.field("VmData")+t.Memory+engineAllowance), "data"),
		limit(unix.RLIMIT_FSIZE, 0, "file size"),
		limit(unix.RLIMIT_NOFILE, 0, "open files"),
	)
	if err != nil || !slices.Contains(c.walls, WallSeccomp) {
		return err
	}
	return running().load()
}

// maxRSS is the most physical memory this process has held, in bytes. The
// kernel's rusage is of no use for that: across fork and exec it begins with
// the parent's.
func (c confinement) maxRSS() int64 { return c.field("VmHWM") }

// field reads one field of /proc/self/status that is given in kB, as bytes.
func (c confinement) field(name string) int64 {
	buf := make([]byte, 8<<10)
	if c.status == nil {
		return 0
	}
	n, _ := c.status.ReadAt(buf, 0)
	return statusField(buf[:n], name)
}

// statusField finds a field in the text of /proc/<pid>/status; see proc(5).
func statusField(status []byte, name string) int64 {
	for line := range bytes.Lines(status) {
		if v, ok := strings.CutPrefix(string(line), name+":"); ok {
			kb, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 64)
			return kb << 10
		}
	}
	return 0
}

func limit(resource int, v uint64, what string) error { return limitTo(resource, v, v, what) }

// limitTo leaves room up to most for a later limit.
func limitTo(resource int, v, most uint64, what string) error {
	if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: v, Max: most}); err != nil {
		return fmt.Errorf("limit %s to %d: %w", what, v, err)
	}
	return nil
}

// closeInherited closes what the parent left open by mistake. The Go runtime's
// own descriptors are told apart by being close-on-exec: none with that flag
// can have come through the exec that began this process.
func closeInherited(last int) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list open descriptors: %w", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= last {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			if err := unix.Close(fd); err != nil {
				return fmt.Errorf("close inherited descriptor %d: %w", fd, err)
			}
		}
	}
	return nil
}
