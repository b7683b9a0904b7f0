package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/wire"
	"golang.org/x/sys/unix"
)

// WallCgroup is the third wall: memory, threads and CPU as the kernel counts them, and an
// end that nothing in it outlives.
const WallCgroup = "cgroup"

const (
	// kernelAllowance is what the kernel may keep for a worker beside the worker's own
	// memory: pipes, page tables, stacks of threads, pages of files that it has read.
	kernelAllowance = 64 << 20
	// maxThreads bounds the threads of a worker. It has about 10.
	maxThreads = 64

	ownLeaf     = "deimos-agent" // where the agent goes, as who has children with controllers has no processes
	jobsPrefix  = "deimos-jobs-"
	removeLimit = 20 * time.Second
	cpuPeriod   = 100 * time.Millisecond
	cpuLeast    = time.Millisecond // of a period: less, the kernel refuses
)

// Cgroups is a place among the kernel's cgroups (version 2) where each worker gets a
// cgroup of its own. The files are few and written by hand: containerd's library for them
// brings clients of systemd and D-Bus along.
//
// The place is below the cgroup of this process, if that is ours alone: the one that
// systemd has delegated to its unit (Delegate=), or the root of a machine that has
// nobody else to share with, such as our image.
//
//	BASE                 delegated, or the root
//	├── deimos-agent     this process, and the launcher that started it; not in the root
//	└── deimos-jobs-N    locked (flock) for as long as its agent lives: whose lock can be had is stale
//	    ├── 1            one worker
//	    └── 2
type Cgroups struct {
	dir    string
	lock   *os.File // of dir
	cpu    bool     // cpu.max can be set
	byHand atomic.Bool
	last   atomic.Int64
}

// OpenCgroups finds the place for workers' cgroups, moves this process to where it
// is not in the way, and ends what is left of an agent that was killed. The error says
// why there can be none here.
func OpenCgroups() (*Cgroups, error) {
	base, err := cgroupBase()
	if err != nil {
		return nil, err
	}
	return openCgroups(base, "memory", "pids")
}

// openCgroups needs these controllers, and takes cpu if it is there.
func openCgroups(base string, needs ...string) (*Cgroups, error) {
	raw, err := os.ReadFile(filepath.Join(base, "cgroup.controllers"))
	if err != nil {
		return nil, fmt.Errorf("look for controllers of cgroups: %w", err)
	}
	there := strings.Fields(string(raw))
	for _, c := range needs {
		if !slices.Contains(there, c) {
			return nil, fmt.Errorf("the kernel does not offer %s in %s; it may be switched off by cgroup_disable= on its command line, or not be delegated", c, base)
		}
	}
	c := &Cgroups{cpu: slices.Contains(there, "cpu")}
	if c.cpu {
		needs = append(needs, "cpu")
	}
	if err := vacate(base); err != nil {
		return nil, err
	}
	if err := enable(base, needs); err != nil {
		return nil, err
	}
	if err := sweepCgroups(base); err != nil {
		return nil, err
	}
	for range 10 { // somebody else who starts may take ours for stale before it is locked
		if c.dir, err = os.MkdirTemp(base, jobsPrefix); err != nil {
			return nil, fmt.Errorf("make a cgroup for jobs: %w", err)
		}
		if c.lock, err = lockCgroup(c.dir); err == nil {
			break
		}
	}
	if err == nil {
		err = errors.Join(enable(c.dir, needs), c.leaveSome())
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// leaveSome bounds the memory of all jobs together to three quarters of the machine's: a
// module that breaks the engine must not take what the agent and the kernel need.
func (c *Cgroups) leaveSome() error {
	machine, err := machineMemory()
	if err != nil {
		return err
	}
	err = put(c.dir, "memory.max", strconv.FormatInt(machine/4*3, 10))
	if errors.Is(err, fs.ErrNotExist) { // tests do without controllers
		return nil
	}
	return err
}

// machineMemory is in bytes.
func machineMemory() (int64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, err
	}
	return int64(info.Totalram) * int64(max(1, info.Unit)), nil
}

// Close removes the place. No worker may run any more.
func (c *Cgroups) Close() error {
	if c.lock == nil {
		return nil
	}
	err := removeCgroup(c.dir)
	return errors.Join(err, c.lock.Close())
}

// cgroupBase is the cgroup that workers' cgroups may be made in.
func cgroupBase() (string, error) {
	in, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	own := cgroupFolder(string(in), string(mounts))
	if own == "" {
		return "", errors.New("no cgroups of version 2 are mounted here that show this process")
	}
	if filepath.Base(own) == ownLeaf { // since an earlier start
		own = filepath.Dir(own)
	}
	var value [8]byte
	n, err := unix.Getxattr(own, "user.delegate", value[:])
	switch {
	case err == nil && string(value[:n]) == "1": // by systemd, from version 251 on
		return own, nil
	case isRootCgroup(own) && unix.Geteuid() == 0:
		return own, nil
	}
	return "", fmt.Errorf("the cgroup %s is not this agent's alone; its unit wants Delegate=yes, and systemd 251 or newer", own)
}

// isRootCgroup tells the root by what only others have; see cgroups(7).
func isRootCgroup(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "cgroup.type"))
	return errors.Is(err, fs.ErrNotExist)
}

// cgroupFolder is the folder of the cgroup that a process is in; "" if none is shown.
// Formats: proc_pid_cgroup(5), proc_pid_mountinfo(5).
func cgroupFolder(in, mountinfo string) string {
	for line := range strings.Lines(in) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if !ok || strings.HasPrefix(path, "/..") { // above what this container is shown
			continue
		}
		for mount := range strings.Lines(mountinfo) {
			f := strings.Fields(mount)
			if sep := slices.Index(f, "-"); sep < 6 || len(f) < sep+2 || f[sep+1] != "cgroup2" {
				continue
			}
			if below, err := filepath.Rel(f[3], path); err == nil && filepath.IsLocal(below) {
				return filepath.Join(f[4], below)
			}
		}
	}
	return ""
}

// vacate moves this process and those that it descends from out of base, unless that is
// the root, which may have both processes and children.
func vacate(base string) error {
	if isRootCgroup(base) {
		return nil
	}
	raw, err := os.ReadFile(filepath.Join(base, "cgroup.procs"))
	if err != nil {
		return err
	}
	ours := ancestors()
	leaf := filepath.Join(base, ownLeaf)
	for field := range strings.FieldsSeq(string(raw)) {
		pid, err := strconv.Atoi(field)
		if err != nil || !slices.Contains(ours, pid) {
			return fmt.Errorf("the process %s is in %s, too, and not this agent's to move", field, base)
		}
		if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := put(leaf, "cgroup.procs", field); err != nil {
			return fmt.Errorf("move the agent into a cgroup of its own: %w", err)
		}
	}
	return nil
}

// ancestors are this process and those that it descends from, as far as they can be seen.
func ancestors() []int {
	all := []int{os.Getpid()}
	for pid := os.Getppid(); pid > 0 && !slices.Contains(all, pid); {
		all = append(all, pid)
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			break
		}
		_, rest, _ := bytes.Cut(status, []byte("\nPPid:\t"))
		parent, _, _ := bytes.Cut(rest, []byte("\n"))
		pid, _ = strconv.Atoi(string(parent))
	}
	return all
}

// enable lets dir's children have controllers.
func enable(dir string, controllers []string) error {
	for _, c := range controllers {
		if err := put(dir, "cgroup.subtree_control", "+"+c); err != nil {
			return fmt.Errorf("let jobs be limited by %s: %w", c, err)
		}
	}
	return nil
}

// sweepCgroups ends and removes what dead agents have left in base.
func sweepCgroups(base string) error {
	old, err := filepath.Glob(filepath.Join(base, jobsPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range old {
		lock, err := lockCgroup(dir)
		if err != nil {
			continue // its agent lives, or it is gone
		}
		err = removeCgroup(dir)
		lock.Close()
		if err != nil {
			return fmt.Errorf("remove what jobs of an agent that was killed have left: %w", err)
		}
	}
	return nil
}

// lockCgroup takes the lock that says whose jobs are below dir, if nobody has it.
func lockCgroup(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := os.Stat(dir); err != nil { // removed before it was locked
		f.Close()
		return nil, err
	}
	return f, nil
}

// removeCgroup kills all that is below dir and removes it.
func removeCgroup(dir string) error {
	killErr := put(dir, "cgroup.kill", "1") // Linux 5.14; a worker is killed by its group of processes as well
	var err error
	for deadline := time.Now().Add(removeLimit); ; time.Sleep(time.Millisecond) {
		children, _ := filepath.Glob(filepath.Join(dir, "*", "cgroup.procs"))
		for _, child := range children {
			_ = unix.Rmdir(filepath.Dir(child))
		}
		err = unix.Rmdir(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		// What was killed leaves a moment later.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("remove the cgroup %s: %w", dir, err), killErr)
		}
	}
}

// put writes one of the kernel's files, which must be there.
func put(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// cgroup is that of one worker. A nil one bounds nothing.
type cgroup struct {
	dir    string
	folder *os.File
	cpu    bool
	memory int64   // bytes of linear memory
	share  float64 // of processors, as last set
}

// make makes a worker's cgroup.
func (c *Cgroups) make(l wire.JobLimits, compile int64) (*cgroup, error) {
	if c == nil {
		return nil, nil
	}
	g := &cgroup{dir: filepath.Join(c.dir, strconv.FormatInt(c.last.Add(1), 10)), cpu: c.cpu, memory: l.MemoryBytes, share: -1}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup for the job: %w", err)
	}
	err := errors.Join(
		g.put("memory.max", strconv.FormatInt(compile+kernelAllowance, 10)),
		g.put("memory.swap.max", "0"),
		g.put("memory.oom.group", "1"),
		g.put("pids.max", strconv.Itoa(maxThreads)),
		g.setShare(0),
	)
	if err == nil {
		g.folder, err = os.Open(g.dir)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("limit the job by its cgroup: %w", err), g.remove())
	}
	return g, nil
}

// put sets what this kernel can set: swap may be switched off, and tests do without controllers.
func (g *cgroup) put(name, value string) error {
	if err := put(g.dir, name, value); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// runs lowers the bound of memory once the module is compiled: what the worker has then,
// linear memory, and the same beside it as RLIMIT_DATA lets it have.
func (g *cgroup) runs() {
	if g == nil {
		return
	}
	has := min(g.number("memory.current"), maxCodeFile+compileHeap)
	_ = g.put("memory.max", strconv.FormatInt(has+g.memory+engineAllowance+kernelAllowance, 10)) // else the one before holds
}

// setShare bounds the CPU to so many processors; 0: to the threads that a worker has use for.
func (g *cgroup) setShare(processors float64) error {
	if g == nil || !g.cpu || processors == g.share {
		return nil
	}
	g.share = processors
	if processors <= 0 {
		processors = compileThreads
	}
	quota := max(time.Duration(processors*float64(cpuPeriod)), cpuLeast)
	return g.put("cpu.max", fmt.Sprintf("%d %d", quota.Microseconds(), cpuPeriod.Microseconds()))
}

// throttles tells whether the kernel keeps the job to its share of CPU.
func (g *cgroup) throttles() bool { return g != nil && g.cpu }

// kill ends all that is in it at once.
func (g *cgroup) kill() {
	if g != nil {
		_ = put(g.dir, "cgroup.kill", "1") // the group of processes is killed as well
	}
}

// ranOut tells whether a process in it was killed for want of memory.
func (g *cgroup) ranOut() bool {
	if g == nil {
		return false
	}
	raw, _ := os.ReadFile(filepath.Join(g.dir, "memory.events"))
	for line := range strings.Lines(string(raw)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}

// peak is the most memory that there was in it, in bytes; 0 before Linux 5.19.
func (g *cgroup) peak() int64 {
	if g == nil {
		return 0
	}
	if n := g.number("memory.peak"); n != math.MaxInt64 {
		return n
	}
	return 0
}

// number reads a file with one number; the largest, if it cannot.
func (g *cgroup) number(name string) int64 {
	raw, err := os.ReadFile(filepath.Join(g.dir, name))
	if err != nil {
		return math.MaxInt64
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		return math.MaxInt64
	}
	return n
}

// remove removes it, with all that is in it.
func (g *cgroup) remove() error {
	if g == nil {
		return nil
	}
	g.folder.Close()
	return removeCgroup(g.dir)
}

// walls adds it to those that the worker tells of.
func (g *cgroup) walls(others []string) []string {
	if g == nil {
		return others
	}
	return append(others, WallCgroup)
}

// start starts what command makes in g, before its first instruction where that is
// possible: older kernels and units with RestrictNamespaces= do not let anybody. Then it
// is moved once it has started, which may take some 15 ms; its task waits for that.
func (c *Cgroups) start(g *cgroup, command func(inGroup bool) *exec.Cmd) (*exec.Cmd, error) {
	if g != nil && !c.byHand.Load() {
		cmd := command(true)
		err := cmd.Start()
		if err == nil || !slices.ContainsFunc([]error{unix.ENOSYS, unix.EPERM, unix.EINVAL, unix.E2BIG}, func(e error) bool { return errors.Is(err, e) }) {
			return cmd, err
		}
		c.byHand.Store(true)
	}
	cmd := command(false)
	if err := cmd.Start(); err != nil || g == nil {
		return cmd, err
	}
	if err := put(g.dir, "cgroup.procs", strconv.Itoa(cmd.Process.Pid)); err != nil {
		_ = cmd.Process.Kill()
		go func() { _ = cmd.Wait() }() // ends with the input, which the caller ends
		return nil, fmt.Errorf("put it into its cgroup: %w", err)
	}
	return cmd, nil
}

// after is an input that is empty, once ready is closed.
type after struct{ ready <-chan struct{} }

func (a after) Read([]byte) (int, error) {
	<-a.ready
	return 0, io.EOF
}
