package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/wire"
)

// A cgroup (version 2) without controllers is enough to be put into one and to be ended
// with it: that every machine has, and root may. Limits need the controllers of memory and
// processes, which machines with both versions have elsewhere; these tests run on a
// kernel of their own (test/qemu).

// testCgroups is a place for workers below a cgroup of this test's own, as systemd's is.
func testCgroups(t *testing.T) (c *Cgroups, base string) {
	t.Helper()
	base = testCgroup(t)
	c, err := openCgroups(base)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c, base
}

func testCgroup(t *testing.T) string {
	t.Helper()
	testenv.Root(t, "cgroups are made by root")
	in, mounts := procFile(os.Getpid(), "cgroup"), procFile(os.Getpid(), "mountinfo")
	own := cgroupFolder(in, mounts)
	if own == "" {
		testenv.Cannot(t, "no cgroups of version 2 are mounted here")
	}
	base, err := os.MkdirTemp(own, "deimos-test-")
	if err != nil {
		testenv.Cannot(t, "no cgroup can be made here: %v", err)
	}
	t.Cleanup(func() {
		if err := removeCgroup(base); err != nil {
			t.Error(err)
		}
	})
	return base
}

// limited is the place that the agent would take, with limits.
func limited(t *testing.T) *Runner {
	t.Helper()
	if os.Getenv(inMachine) == "" {
		t.Skip("test/qemu runs this on a kernel that has the controllers of memory and processes")
	}
	c, err := OpenCgroups()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return &Runner{Executable: runner.Executable, Cgroups: c}
}

func processes(cgroup string) []string {
	raw, _ := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	return strings.Fields(string(raw))
}

// workers are the cgroups of the workers that there are now.
func workers(c *Cgroups) []string {
	all, _ := filepath.Glob(filepath.Join(c.dir, "*", "cgroup.procs"))
	for i := range all {
		all[i] = filepath.Dir(all[i])
	}
	return all
}

func TestEachWorkerHasACgroupThatEndsWithIt(t *testing.T) {
	for name, byHand := range map[string]bool{"before its first instruction": false, "before its task, where clone3 is denied": true} {
		t.Run(name, func(t *testing.T) {
			c, _ := testCgroups(t)
			c.byHand.Store(byHand)
			r := Runner{Executable: runner.Executable, Cgroups: c}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				_, err := r.Run(ctx, Spec{Module: endless.file(t)})
				ended <- err
			}()
			eventually(t, "a worker in a cgroup", func() bool { w := workers(c); return len(w) == 1 && len(processes(w[0])) == 1 })
			pid, err := strconv.Atoi(processes(workers(c)[0])[0])
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is the worker", func() bool { return strings.HasSuffix(procFile(pid, "cmdline"), "\x00"+WorkerArg+"\x00") })
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if w := workers(c); len(w) != 0 {
				t.Errorf("%v are left of a killed job", w)
			}
			if res, err := r.Run(t.Context(), Spec{Module: wasm{}.file(t)}); err != nil || !slices.Contains(res.Walls, WallCgroup) {
				t.Errorf("%v, walls %v", err, res.Walls)
			}
			if w := workers(c); len(w) != 0 {
				t.Errorf("%v are left of a job", w)
			}
			if c.byHand.Load() != byHand {
				t.Error("clone3 was not used")
			}
		})
	}
}

func TestAWorkerThatCannotBeStartedLeavesNoCgroup(t *testing.T) {
	c, _ := testCgroups(t)
	_, err := (&Runner{Executable: "/does/not/exist", Cgroups: c}).Run(t.Context(), Spec{Module: endless.file(t)})
	wantCause(t, err, WorkerFailed, wire.Failed, wire.CodeInternal)
	if w := workers(c); len(w) != 0 {
		t.Error(w)
	}
}

// escaping is a worker beside which somebody has left its group and its session, which only
// its cgroup tells.
func escaping(c *Cgroups) *Runner {
	return &Runner{Executable: "/bin/sh", Cgroups: c, prefix: []string{"-c", `setsid sleep 1000 & exec "$0" "$@"`, runner.Executable}}
}

func TestWhoLeavesTheGroupOfProcessesEndsWithTheCgroup(t *testing.T) {
	c, _ := testCgroups(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := escaping(c).Run(ctx, Spec{Module: endless.file(t)})
		ended <- err
	}()
	var escaped int
	eventually(t, "one that has left", func() bool { escaped = sleeper(workers(c)); return escaped != 0 })
	cancel()
	<-ended
	if !isGone(escaped) {
		t.Errorf("%d lives on: %s", escaped, procFile(escaped, "cmdline"))
	}
	if w := workers(c); len(w) != 0 {
		t.Errorf("%v are left", w)
	}
}

// sleeper is the process that has left the worker's group, in one of these cgroups; 0: none.
func sleeper(cgroups []string) int {
	for _, dir := range cgroups {
		for _, field := range processes(dir) {
			pid, _ := strconv.Atoi(field)
			if group, err := unix.Getpgid(pid); err == nil && group == pid && strings.HasPrefix(procFile(pid, "cmdline"), "sleep\x00") {
				return pid
			}
		}
	}
	return 0
}

func isGone(pid int) bool {
	return unix.Kill(pid, 0) != nil || strings.Contains(procFile(pid, "status"), "State:\tZ")
}

// leftArg makes the test binary an agent with a job that never ends; the next
// arguments are where its cgroups go, the worker and the module.
const leftArg = "left"

func leaveCgroup() int {
	c, err := openCgroups(os.Args[2])
	if err == nil {
		runner.Executable = os.Args[3]
		_, err = escaping(c).Run(context.Background(), Spec{Module: os.Args[4]})
	}
	fmt.Println(err)
	return 1
}

func TestWhatAKilledAgentLeavesIsEndedByTheNext(t *testing.T) {
	base := testCgroup(t)
	living, err := openCgroups(base)
	if err != nil {
		t.Fatal(err)
	}
	agent := exec.Command("/proc/self/exe", leftArg, base, runner.Executable, endless.file(t))
	var said bytes.Buffer
	agent.Stdout, agent.Stderr = &said, &said
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	var escaped int
	eventually(t, "its job", func() bool {
		dirs, _ := filepath.Glob(filepath.Join(base, jobsPrefix+"*", "*"))
		escaped = sleeper(dirs)
		return escaped != 0
	})
	_ = agent.Process.Kill()
	_ = agent.Wait()
	if isGone(escaped) {
		t.Fatalf("it ended with its agent, which shows nothing; the agent said %s", said.String())
	}
	next, err := openCgroups(base)
	if err != nil {
		t.Fatal(err)
	}
	if !isGone(escaped) {
		t.Errorf("%d lives on: %s", escaped, procFile(escaped, "cmdline"))
	}
	dirs, _ := filepath.Glob(filepath.Join(base, jobsPrefix+"*"))
	slices.Sort(dirs)
	want := []string{living.dir, next.dir}
	slices.Sort(want)
	if !slices.Equal(dirs, want) {
		t.Errorf("there are %v, want those of the two that live, %v", dirs, want)
	}
	for _, c := range []*Cgroups{living, next} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// vacateArg makes the test binary an agent that wants the cgroup that the next argument
// names, in which it is.
const vacateArg = "vacate"

func vacated() int {
	c, err := openCgroups(os.Args[2])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Printf("here %v, leaf %v", processes(os.Args[2]), processes(filepath.Join(os.Args[2], ownLeaf)))
	if err := c.Close(); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func TestTheAgentGoesOutOfTheWayWithWhoStartedIt(t *testing.T) {
	base := testCgroup(t)
	folder, err := os.Open(base)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	// The shell stands for the launcher: it waits for the agent.
	start := func(script string) (string, int, error) {
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", script, "/proc/self/exe", vacateArg, base)
		cmd.Args[3], _ = os.Executable()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(folder.Fd())}
		out, err := cmd.CombinedOutput()
		return string(out), cmd.Process.Pid, err
	}
	out, shell, err := start(`"$0" "$@"; exit $?`)
	leaf, ok := strings.CutPrefix(strings.TrimSuffix(out, "]"), "here [], leaf [")
	if err != nil || !ok || !slices.Contains(strings.Fields(leaf), strconv.Itoa(shell)) {
		t.Errorf("%v: %s; the launcher is %d", err, out, shell)
	}
	// Whose it is not, is not moved.
	out, _, err = start(`sleep 1000 & "$0" "$@"; code=$?; kill $!; exit $code`)
	if err == nil || !strings.Contains(out, "not this agent's to move") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestTheCgroupOfAProcessIsFoundWhereItIsShown(t *testing.T) {
	const v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
	const v1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
	for _, c := range []struct{ in, mounts, want string }{
		{"0::/\n", v2, "/sys/fs/cgroup"},
		{"0::/system.slice/deimos-agent.service\n", v1 + v2, "/sys/fs/cgroup/system.slice/deimos-agent.service"},
		{"4:memory:/a\n0::/b\n", v1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup/unified/b"},
		{"4:memory:/a\n", v1 + v2, ""}, // no version 2
		{"0::/a\n", v1, ""},            // not mounted
		{"0::/a/b\n", "30 23 0:26 /a /cg rw - cgroup2 cgroup2 rw\n", "/cg/b"},
		{"0::/c\n", "30 23 0:26 /a /cg rw - cgroup2 cgroup2 rw\n" + v2, "/sys/fs/cgroup/c"}, // the first does not show it
		{"0::/../c\n", v2, ""},
		{"", "", ""},
	} {
		if got := cgroupFolder(c.in, c.mounts); got != c.want {
			t.Errorf("%q in %q is at %q, want %q", c.in, c.mounts, got, c.want)
		}
	}
}

// hoard takes memory that no rlimit counts: it is shared, with nobody.
func hoard(string) error {
	for range 64 {
		m, err := unix.Mmap(-1, 0, 64<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
		if err != nil {
			return err
		}
		for i := 0; i < len(m); i += 4096 {
			m[i] = 1
		}
	}
	return nil
}

// multiply starts threads that never end; the Go runtime crashes when it gets none.
func multiply(string) error {
	for range 300 {
		started := make(chan struct{})
		go func() {
			ts := unix.Timespec{Sec: 1000}
			close(started)
			// As no blocking call: each keeps a processor of Go's until it is taken away, and a thread.
			_, _, _ = unix.Syscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
		}()
		<-started
	}
	time.Sleep(200 * time.Millisecond) // until all are in the kernel
	return nil
}

// bombs are attacks that only a cgroup bounds; not one of [attacks], which every machine must bear.
var bombs = map[string]func(string) error{"hoarding": hoard, "multiplying": multiply}

func TestCgroupBoundsMemoryThatNoRlimitCounts(t *testing.T) {
	r := limited(t)
	var machine unix.Sysinfo_t
	if err := unix.Sysinfo(&machine); err != nil {
		t.Fatal(err)
	}
	all := int64(machine.Totalram) / 4 * 3
	if has := (&cgroup{dir: r.Cgroups.dir}).number("memory.max"); has > all || has < all-4096 {
		t.Errorf("all jobs may have %d bytes together, of a machine with %d", has, machine.Totalram)
	}
	const slack = 48 << 20
	for stage, most := range map[string]int64{"compiling": CompileBytes(0) + kernelAllowance + slack, "running": engineAllowance + kernelAllowance + slack} {
		if most >= all {
			t.Fatalf("the machine is too small to tell the bound of a job that is %s from that of all", stage)
		}
		attacker := Runner{Cgroups: r.Cgroups, prefix: []string{attackArg, stage, "hoarding", ""}}
		res, err := attacker.Run(t.Context(), Spec{Module: wasm{memory: 1}.file(t), Limits: wire.JobLimits{MemoryBytes: 1 << 20, CPUSeconds: 3600, WallSeconds: 3600}})
		wantCause(t, err, LimitMemory, wire.Failed, wire.CodeLimit)
		// Else it was the machine that had no more.
		if t.Logf("%s: %d MiB of at most %d, of a machine with %d", stage, res.MaxRSS>>20, most>>20, machine.Totalram>>20); res.MaxRSS == 0 || res.MaxRSS > most {
			t.Errorf("%s: it took %d bytes, want at most %d", stage, res.MaxRSS, most)
		}
		if !slices.Contains(res.Walls, WallCgroup) {
			t.Errorf("%s: walls %v", stage, res.Walls)
		}
		if w := workers(r.Cgroups); len(w) != 0 {
			t.Errorf("%s: %v are left", stage, w)
		}
	}
	mustRunBy(t, r, Spec{Module: wasm{memory: 1}.file(t)})
}

func TestCgroupBoundsThreads(t *testing.T) {
	r := limited(t)
	for _, stage := range []string{"compiling", "running"} {
		attacker := Runner{Cgroups: r.Cgroups, prefix: []string{attackArg, stage, "multiplying", ""}}
		s := Spec{Module: wasm{memory: 1}.file(t), Limits: wire.JobLimits{CPUSeconds: 3600, WallSeconds: 3600}}
		res, err := attacker.Run(t.Context(), s)
		if err == nil || !strings.Contains(err.Error(), "newosproc") {
			t.Errorf("%s: %v; stderr %q", stage, err, res.Stderr)
		}
		attacker.Cgroups = nil // so that it is this wall that holds
		if res, err := attacker.Run(t.Context(), s); err == nil || !strings.Contains(res.Stderr, "multiplying SUCCEEDED") {
			t.Errorf("%s, without a cgroup: %v; stderr %q", stage, err, res.Stderr)
		}
	}
}

func TestCgroupLeavesJobsTheirMemory(t *testing.T) {
	const limit = 96 << 20
	r := limited(t)
	// All but a page of its memory, each page of the kernel's touched.
	full := wasm{memory: 1, start: cat(constant(limit/pageBytes-2), []byte{opMemoryGrow, 0, opDrop})}
	mustRunBy(t, r, Spec{Module: full.file(t), Limits: wire.JobLimits{MemoryBytes: limit}})
	_, err := r.Run(t.Context(), Spec{Module: memoryBomb.file(t), Limits: wire.JobLimits{MemoryBytes: limit}})
	if e := wantCause(t, err, LimitMemory, wire.Failed, wire.CodeLimit); !strings.Contains(e.Reason, "the limit is 96 MiB") {
		t.Errorf("not the engine has refused it, but: %s", e.Reason)
	}
}

func TestCgroupKeepsAJobToItsShareOfCPU(t *testing.T) {
	r := limited(t)
	control := NewControl()
	control.SetShare(0.25)
	res, err := r.Run(t.Context(), Spec{Module: endless.file(t), Control: control, Limits: wire.JobLimits{WallSeconds: 8, CPUSeconds: 60}})
	wantCause(t, err, LimitWall, wire.TimedOut, wire.CodeLimit)
	if share := res.CPU.Seconds() / res.Wall.Seconds(); share > 0.4 || share < 0.01 { // of a busy machine it gets less
		t.Errorf("%v of CPU in %v is %.2f of a processor, want 0.25", res.CPU, res.Wall, share)
	}
}

func TestCgroupIsWhatTheAgentTellsOf(t *testing.T) {
	r := limited(t)
	if got, want := r.Walls(), []string{WallSeccomp, WallLandlock, WallCgroup}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func mustRunBy(t *testing.T, r *Runner, s Spec) {
	t.Helper()
	if res, err := r.Run(t.Context(), s); err != nil {
		t.Errorf("%v (stderr %q)", err, res.Stderr)
	}
}

// Compiling leaves a small machine most of its memory.
func TestCompilingIsBoundedByTheMachine(t *testing.T) {
	t.Parallel()
	const gib = 1 << 30
	for _, c := range []struct{ want, machine, got int64 }{
		{0, 16 * gib, gib}, {512 << 20, 16 * gib, 512 << 20}, {1, 16 * gib, 256 << 20}, {2 * gib, 16 * gib, gib},
		{512 << 20, gib, 256 << 20}, {0, 2 * gib, 512 << 20}, {0, 512 << 20, 256 << 20}, {300 << 20, 2 * gib, 300 << 20},
	} {
		if got := compileBytes(c.want, c.machine); got != c.got {
			t.Errorf("%d MiB wanted of %d: %d, want %d", c.want>>20, c.machine>>20, got>>20, c.got>>20)
		}
	}
}
