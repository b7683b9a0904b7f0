package sandbox

import (
	"fmt"
	"maps"
	"os"
	"slices"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/landlock-lsm/go-landlock/landlock"
	access "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// The names of the walls that may stand around a worker beside the sandbox that
// its engine is.
const (
	WallSeccomp  = "seccomp"  // system calls
	WallLandlock = "landlock" // files, network, signals, abstract sockets
)

// Walls names the walls that a job of this runner has around it.
func (r *Runner) Walls() []string {
	if r.Cgroups == nil {
		return Walls()
	}
	return append(Walls(), WallCgroup)
}

// Walls names the walls that a worker builds itself on this kernel. One of a kernel without
// one does without it.
func Walls() (names []string) {
	if seccomp.Supported() {
		names = append(names, WallSeccomp)
	}
	if v, err := access.LandlockGetABIVersion(); err == nil && v > 0 {
		names = append(names, WallLandlock)
	}
	return names
}

// surrender takes all capabilities from this thread, and with no_new_privs, which
// has to be set, from what it starts: a worker of root is then an ordinary user that
// happens to own root's files. Without them nobody can raise a limit again. A thread
// that has none does not ask: the service that it is in may not let it.
func surrender() error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has, none [2]unix.CapUserData // all of 64, of which each has 32
	if err := unix.Capget(&head, &has[0]); err == nil && has == none {
		return nil
	}
	if err := unix.Capset(&head, &none[0]); err != nil {
		return fmt.Errorf("give up all capabilities: %w", err)
	}
	return nil
}

// wallIn denies this process all files but those below codeDir ("" for none), which
// it may read and write but not execute, all of the network that the kernel's
// Landlock knows, and signals and abstract sockets to anybody outside. The kernel
// offers more with each version; what it has is used.
func wallIn(codeDir string) error {
	var rules []landlock.Rule
	if codeDir != "" {
		rules = append(rules, landlock.PathAccess(access.AccessFSReadFile|access.AccessFSWriteFile|access.AccessFSReadDir|
			access.AccessFSMakeReg|access.AccessFSMakeDir|access.AccessFSRemoveFile|access.AccessFSTruncate, codeDir))
	}
	if err := landlock.V8.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("build the wall of Landlock: %w", err)
	}
	return nil
}

// allowed are system calls by name, each with the conditions of which one has to
// hold; with none it is always allowed. It has those of all architectures.
type allowed map[string][]seccomp.ArgumentConditions

func (a allowed) always(names ...string) {
	for _, name := range names {
		a[name] = nil
	}
}

func (a allowed) when(name string, c seccomp.ArgumentConditions) { a[name] = append(a[name], c) }

// load allows every thread of this process these system calls from now on, and
// what an earlier filter denies remains denied. Any other ends the process.
func (a allowed) load() error {
	here, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("build the wall of seccomp: %w", err)
	}
	group := seccomp.SyscallGroup{Action: seccomp.ActionAllow}
	for _, name := range slices.Sorted(maps.Keys(a)) {
		if _, ok := here.SyscallNames[name]; !ok {
			continue
		}
		conditions := a[name]
		if len(conditions) == 0 {
			group.Names = append(group.Names, name)
		}
		for _, c := range conditions {
			group.NamesWithCondtions = append(group.NamesWithCondtions, seccomp.NameWithConditions{Name: name, Conditions: c})
		}
	}
	// Whose number no filter can look into: libc then takes clone.
	clone3 := seccomp.SyscallGroup{Names: []string{"clone3"}, Action: seccomp.ActionErrno&^0xffff | seccomp.Action(unix.ENOSYS)}
	others := []seccomp.SyscallGroup{group, clone3}
	// Libraries that the coordinator is built with look at themselves now and then (the
	// message server, each second). They are refused, and no job dies of it.
	if _, open := a["openat"]; !open {
		others = append(others, seccomp.SyscallGroup{Names: []string{"openat"}, Action: seccomp.ActionErrno&^0xffff | seccomp.Action(unix.EACCES)})
	}
	err = seccomp.LoadFilter(seccomp.Filter{Flag: seccomp.FilterFlagTSync, Policy: seccomp.Policy{
		DefaultAction: seccomp.ActionKillProcess, Syscalls: others,
	}})
	if err != nil {
		return fmt.Errorf("build the wall of seccomp: %w", err)
	}
	return nil
}

// running is what a worker needs for a module that runs: the Go runtime's memory,
// threads, timers and signals to itself, and reading and writing what is open.
func running() allowed {
	const (
		newNamespaces = unix.CLONE_NEWCGROUP | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWNS |
			unix.CLONE_NEWPID | unix.CLONE_NEWUSER | unix.CLONE_NEWUTS
		setVMA = 0x53564d41 // PR_SET_VMA: the runtime names its mappings
	)
	self := uint64(os.Getpid())
	a := allowed{}
	a.always(
		"read", "write", "pread64", "close",
		"munmap", "madvise", "mremap", "brk", "mincore",
		"futex", "futex_time64", "sched_yield", "sched_getaffinity", "set_robust_list", "rseq", "gettid", "getpid",
		"exit", "exit_group", "restart_syscall", "rt_sigreturn", "sigreturn", "rt_sigaction", "rt_sigprocmask", "sigaltstack",
		"nanosleep", "clock_nanosleep", "clock_nanosleep_time64", "clock_gettime", "clock_gettime64", "gettimeofday",
		"timer_create", "timer_settime", "timer_settime64", "timer_delete",
		"epoll_create1", "epoll_ctl", "epoll_pwait", "eventfd2", "getrandom",
	)
	a.when("clone", seccomp.ArgumentConditions{ // a thread, no process
		{Argument: 0, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD},
		{Argument: 0, Operation: seccomp.BitsNotSet, Value: newNamespaces},
	})
	a.when("tgkill", equal(self))
	a.when("kill", equal(self))
	a.when("prctl", equal(setVMA))
	for _, name := range []string{"mmap", "mmap2", "mprotect"} { // nothing more becomes code
		a.when(name, seccomp.ArgumentConditions{{Argument: 2, Operation: seccomp.BitsNotSet, Value: unix.PROT_EXEC}})
	}
	for _, cmd := range []uint64{unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL} {
		a.when("fcntl", at(1, cmd))
		a.when("fcntl64", at(1, cmd))
	}
	return a
}

// compiling adds what it takes to come that far: the files of compiled code,
// machine code in memory, tighter limits and the second filter.
func compiling() allowed {
	a := running()
	a.always(
		"openat", "open", "pwrite64", "writev", "readv", "lseek", "_llseek", "fstat", "fstat64", "newfstatat", "fstatat", "fstatat64", "stat", "lstat", "statx",
		"getdents64", "mkdirat", "unlinkat", "renameat", "renameat2", "fsync", "fdatasync", "ftruncate", "fchmod",
		"copy_file_range", "sendfile", "splice", "fadvise64",
		"mmap", "mmap2", "mprotect",
		"cacheflush", // of 32-bit ARM
	)
	const oneself = 0 // as a pid
	a.when("prlimit64", equal(oneself))
	a.when("seccomp", equal(unix.SECCOMP_SET_MODE_FILTER))
	return a
}

func at(argument uint32, value uint64) seccomp.ArgumentConditions {
	return seccomp.ArgumentConditions{{Argument: argument, Operation: seccomp.Equal, Value: value}}
}

func equal(value uint64) seccomp.ArgumentConditions { return at(0, value) }
