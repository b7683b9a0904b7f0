package sandbox

import (
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
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	access "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/wire"
)

// attackArg makes the test binary a worker whose engine is broken; the next
// arguments are the stage in which it is, the attack and what that wants.
const attackArg = "attack"

const (
	exitRefused = 90
	exitBreach  = 91
)

func attackingWorker() int {
	stage, name, what := os.Args[2], os.Args[3], os.Args[4]
	misbehave = func(at string) {
		if at != stage {
			return
		}
		try := attacks[name].try
		if bomb, ok := bombs[name]; ok {
			try = bomb
		}
		if err := try(what); err != nil {
			fmt.Fprintln(os.Stderr, name, "was refused:", err)
			os.Exit(exitRefused)
		}
		fmt.Fprintln(os.Stderr, name, "SUCCEEDED")
		os.Exit(exitBreach)
	}
	return WorkerMain()
}

// agentPID is asked for before the walls stand, which do not let a worker ask.
var agentPID = os.Getppid()

// fate is what has to become of a worker that attacks.
type fate string

const (
	killed   fate = "killed"
	refused  fate = "refused" // it lives on, with an error
	succeeds fate = "succeeds"
)

// attack is what code may try that has taken over a worker.
type attack struct {
	try                func(what string) error
	compiling, running fate
}

// call makes a system call and gives its error.
func call(number uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, e := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); e != 0 {
		return e
	}
	return nil
}

var text = []byte("/proc/1/ns/net\x00") // any that is a path

func pointer() uintptr { return uintptr(unsafe.Pointer(&text[0])) }

// ofParent makes a system call whose first argument is the parent's pid.
func ofParent(number uintptr, args ...uintptr) func(string) error {
	return func(string) error { return call(number, append([]uintptr{uintptr(agentPID)}, args...)...) }
}

func calls(number uintptr, args ...uintptr) func(string) error {
	return func(string) error { return call(number, args...) }
}

var attacks = map[string]attack{
	"nothing": {func(string) error { return nil }, succeeds, succeeds},
	"reading a file": {func(path string) error {
		_, err := os.ReadFile(path)
		return err
	}, refused, refused},
	"writing a file": {func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) }, refused, refused},
	"making a file":  {func(path string) error { return os.WriteFile(path+".new", nil, 0o600) }, refused, refused},
	"listing a folder": {func(path string) error {
		_, err := os.ReadDir(filepath.Dir(path))
		return err
	}, refused, refused},
	"removing a file": {func(path string) error { return unix.Unlinkat(unix.AT_FDCWD, path, 0) }, refused, killed},
	"executing a file": {func(string) error {
		return syscall.Exec("/bin/true", []string{"true"}, nil)
	}, killed, killed},
	"a process of its own": {func(string) error {
		pid, _, e := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if pid == 0 && e == 0 {
			unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
		}
		if e != 0 {
			return e
		}
		return nil
	}, killed, killed},
	"a process by clone3":            {calls(unix.SYS_CLONE3), refused, refused},
	"a thread in another network":    {calls(unix.SYS_CLONE, unix.CLONE_THREAD|unix.CLONE_NEWNET), killed, killed},
	"a namespace of its own":         {calls(unix.SYS_UNSHARE, unix.CLONE_NEWUSER), killed, killed},
	"another's namespace":            {calls(unix.SYS_SETNS, 0, 0), killed, killed},
	"a socket of the network":        {calls(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM, 0), killed, killed},
	"a socket of the machine":        {calls(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM, 0), killed, killed},
	"a socket of the kernel":         {calls(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, 0), killed, killed},
	"two sockets":                    {calls(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM, 0, 0), killed, killed},
	"tracing the agent":              {func(string) error { return unix.PtraceAttach(agentPID) }, killed, killed},
	"reading the agent's memory":     {ofParent(unix.SYS_PROCESS_VM_READV), killed, killed},
	"a handle of the agent":          {ofParent(unix.SYS_PIDFD_OPEN), killed, killed},
	"killing the agent":              {ofParent(unix.SYS_KILL, uintptr(unix.SIGKILL)), killed, killed},
	"killing everybody":              {calls(unix.SYS_KILL, ^uintptr(0), uintptr(unix.SIGKILL)), killed, killed},
	"killing a thread of the agent":  {func(string) error { return unix.Tgkill(agentPID, agentPID, unix.SIGKILL) }, killed, killed},
	"signals by a file":              {func(string) error { return call(unix.SYS_FCNTL, 1, unix.F_SETOWN, uintptr(agentPID)) }, killed, killed},
	"mounting":                       {func(string) error { return unix.Mount("none", "/mnt", "tmpfs", 0, "") }, killed, killed},
	"another root":                   {func(string) error { return unix.Chroot("/proc") }, killed, killed},
	"another user":                   {calls(unix.SYS_SETUID, 1), killed, killed},
	"capabilities":                   {calls(unix.SYS_CAPSET), killed, killed},
	"raising a limit":                {raise, refused, killed},
	"limits of the agent":            {ofParent(unix.SYS_PRLIMIT64, unix.RLIMIT_NOFILE, 0, 0), killed, killed},
	"being traceable":                {calls(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1), killed, killed},
	"outliving the agent":            {calls(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, 0), killed, killed},
	"leaving its group":              {calls(unix.SYS_SETPGID, 0, 0), killed, killed},
	"a program in the kernel":        {calls(unix.SYS_BPF), killed, killed},
	"asynchronous system calls":      {calls(unix.SYS_IO_URING_SETUP, 1), killed, killed},
	"watching processors":            {calls(unix.SYS_PERF_EVENT_OPEN), killed, killed},
	"keys":                           {calls(unix.SYS_KEYCTL), killed, killed},
	"faults handled in user space":   {calls(unix.SYS_USERFAULTFD), killed, killed},
	"an open of its own kind":        {calls(unix.SYS_OPENAT2), killed, killed},
	"a device's commands":            {calls(unix.SYS_IOCTL, 1, unix.TIOCSTI), killed, killed},
	"an anonymous file":              {func(string) error { return call(unix.SYS_MEMFD_CREATE, pointer(), 0) }, killed, killed},
	"memory shared with other users": {calls(unix.SYS_SHMGET, 1, 4096, 0o1600), killed, killed},
	"loading a driver":               {calls(unix.SYS_INIT_MODULE), killed, killed},
	"a reboot":                       {calls(unix.SYS_REBOOT), killed, killed},
	"code made while it runs": {func(string) error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		return err
	}, succeeds, killed},
	"data made code": {func(string) error {
		m, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return err
		}
		return unix.Mprotect(m, unix.PROT_READ|unix.PROT_EXEC)
	}, succeeds, killed},
}

// raise lifts a limit of its own, as root may.
func raise(string) error {
	var l unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &l); err != nil {
		return err
	}
	l.Max++
	l.Cur = l.Max
	return unix.Prlimit(0, unix.RLIMIT_NOFILE, &l, nil)
}

func TestABrokenEngineStaysInsideItsWalls(t *testing.T) {
	if walls := Walls(); !slices.Contains(walls, WallSeccomp) || !slices.Contains(walls, WallLandlock) {
		testenv.Cannot(t, "this kernel has only the walls %v", walls)
	}
	// The code of two modules, of which one attacks the other's.
	cache := filepath.Join(t.TempDir(), "cache")
	victim := wasm{memory: 2}.file(t)
	if _, err := runner.Run(t.Context(), Spec{Module: victim, CacheDir: cache}); err != nil {
		t.Fatal(err)
	}
	code, err := filepath.Glob(filepath.Join(cache, "*", "*", "*"))
	if err != nil || len(code) != 1 {
		t.Fatalf("the victim's code: %q, %v", code, err)
	}
	before, err := os.ReadFile(code[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, a := range attacks {
		for stage, want := range map[string]fate{"compiling": a.compiling, "running": a.running} {
			t.Run(name+", "+stage, func(t *testing.T) {
				t.Parallel()
				attacker := Runner{prefix: []string{attackArg, stage, name, code[0]}}
				res, err := attacker.Run(t.Context(), Spec{Module: wasm{memory: 1}.file(t), CacheDir: cache})
				switch want {
				case killed:
					wantCause(t, err, Breakout, wire.Failed, CodeSandbox)
				case refused:
					if err == nil || !strings.Contains(err.Error(), "exit status "+strconv.Itoa(exitRefused)) {
						t.Errorf("%v, of the worker: %s", err, res.Stderr)
					}
				case succeeds: // so that a test which is always refused is no proof
					if err == nil || !strings.Contains(err.Error(), "exit status "+strconv.Itoa(exitBreach)) {
						t.Errorf("%v, of the worker: %s", err, res.Stderr)
					}
				}
				if !slices.Equal(res.Walls, Walls()) {
					t.Errorf("its walls were %v", res.Walls)
				}
			})
		}
	}
	t.Cleanup(func() {
		if after, err := os.ReadFile(code[0]); err != nil || string(after) != string(before) {
			t.Errorf("the code of the other module is not what it was: %v", err)
		}
	})
}

// aloneArg makes the test binary a process behind one wall only, which tries what
// another wall would also keep from it.
const aloneArg = "behind-landlock"

func behindLandlock() int {
	if err := wallIn(""); err != nil {
		fmt.Println(err)
		return 1
	}
	_, opened := os.ReadDir("/")
	for what, err := range map[string]error{
		"connect":         dial(unix.AF_INET, &unix.SockaddrInet4{Port: 1, Addr: [4]byte{127, 0, 0, 1}}),
		"abstract socket": dial(unix.AF_UNIX, &unix.SockaddrUnix{Name: os.Args[2]}),
		"signal":          unix.Kill(agentPID, 0),
		"file":            opened,
	} {
		fmt.Printf("%s %d\n", what, errnoOf(err))
	}
	return 0
}

func errnoOf(err error) syscall.Errno {
	var e syscall.Errno
	errors.As(err, &e)
	return e
}

func dial(family int, to unix.Sockaddr) error {
	s, err := unix.Socket(family, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	return unix.Connect(s, to)
}

func TestLandlockAloneKeepsTheNetworkAndTheNeighboursOut(t *testing.T) {
	abi, err := access.LandlockGetABIVersion()
	if err != nil || abi < 6 {
		testenv.Cannot(t, "Landlock has version %d here, network and signals came with 4 and 6", abi)
	}
	name := "@deimos-sandbox-test-" + strconv.Itoa(os.Getpid())
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	if err := errors.Join(unix.Bind(s, &unix.SockaddrUnix{Name: name}), unix.Listen(s, 1)); err != nil {
		t.Fatal(err)
	}
	if err := dial(unix.AF_UNIX, &unix.SockaddrUnix{Name: name}); err != nil {
		t.Fatalf("without a wall the socket cannot be reached either: %v", err)
	}
	out, err := exec.CommandContext(t.Context(), "/proc/self/exe", aloneArg, name).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for what, want := range map[string]syscall.Errno{"connect": unix.EACCES, "abstract socket": unix.EPERM, "signal": unix.EPERM, "file": unix.EACCES} {
		if line := fmt.Sprintf("%s %d\n", what, want); !strings.Contains(string(out), line) {
			t.Errorf("%q is not in\n%s", line, out)
		}
	}
}

// TestTheFiltersNameSystemCallsThatThereAre: names differ between architectures, and
// what is written wrong would be passed over everywhere.
func TestTheFiltersNameSystemCallsThatThereAre(t *testing.T) {
	for _, a := range []allowed{running(), compiling()} {
		for name := range a {
			if !slices.ContainsFunc([]*arch.Info{arch.X86_64, arch.AARCH64, arch.ARM}, func(i *arch.Info) bool { _, ok := i.SyscallNames[name]; return ok }) {
				t.Errorf("no architecture has the system call %s", name)
			}
		}
	}
}

func TestAWorkerHasNoPrivileges(t *testing.T) {
	c := started(t, Spec{Module: endless.file(t), Limits: wire.JobLimits{CPUSeconds: 30}})
	pid := c.cmd.Process.Pid
	eventually(t, "the job running", func() bool {
		return strings.Contains(procFile(pid, "limits"), "Max open files            0 ") // the last but one that it gives up
	})
	if slices.Contains(Walls(), WallSeccomp) {
		eventually(t, "the second filter", func() bool { return strings.Contains(procFile(pid, "status"), "Seccomp_filters:\t2") })
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) == 0 {
		t.Fatal("no threads", err)
	}
	for _, path := range threads {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		for _, want := range []string{"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapInh:\t0000000000000000", "CapAmb:\t0000000000000000"} {
			if !strings.Contains(string(raw), want) {
				t.Errorf("%s has not %q", path, want)
			}
		}
		if slices.Contains(Walls(), WallSeccomp) && (!strings.Contains(string(raw), "Seccomp:\t2") || !strings.Contains(string(raw), "Seccomp_filters:\t2")) {
			t.Errorf("%s is without the filters of system calls:\n%s", path, raw)
		}
	}
}

// servedArg makes the test binary a service whose unit denies capset, as @privileged
// does; the next argument says whether it has capabilities.
const servedArg = "served"

func served() int {
	if os.Args[2] == "none" {
		if err := surrender(); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	err := seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Policy: seccomp.Policy{DefaultAction: seccomp.ActionAllow,
		Syscalls: []seccomp.SyscallGroup{{Names: []string{"capset"}, Action: seccomp.ActionErrno&^0xffff | seccomp.Action(unix.EPERM)}}}})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if surrender() != nil {
		return exitRefused
	}
	return 0
}

func TestAServiceWithoutPrivilegesNeedNotBeAllowedToGiveThemUp(t *testing.T) {
	testenv.Root(t, "only root has capabilities to give up")
	for has, want := range map[string]int{"none": 0, "all": exitRefused} {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", servedArg, has)
		if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != want {
			t.Errorf("with capabilities: %s: exit code %d, want %d\n%s", has, cmd.ProcessState.ExitCode(), want, out)
		}
	}
}
