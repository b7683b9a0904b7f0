package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/wire"
	"golang.org/x/sys/unix"
)

// Bounds that no limit lifts.
const (
	MaxModule = 32 << 20 // bytes of a module
	MaxInput  = 4 << 20  // bytes of standard input
	MaxMemory = 1 << 30  // bytes of linear memory; fits a 32-bit address space too

	maxStderr  = 1 << 20        // bytes of standard error, then the worker is killed
	stderrTail = 4 << 10        // bytes of it that are reported
	stderrKept = 64 << 10       // bytes of it that are kept meanwhile: a crash of the engine has a long stack
	maxWall    = 24 * time.Hour // of one job
	pageBytes  = 64 << 10       // of WebAssembly
)

// Defaults for limits that a [Spec] leaves at zero.
var defaultLimits = wire.JobLimits{MemoryBytes: 64 << 20, CPUSeconds: 60, WallSeconds: 120, OutputBytes: 4 << 20}

// Spec is one job.
type Spec struct {
	Module   string         // path of the WebAssembly file
	Digest   string         // SHA-256 it must have, lower-case hex; checked over the very bytes that run; empty: not checked
	Args     []string       // after the program's name, which is always "job"
	Input    []byte         // standard input, at most [MaxInput]
	Limits   wire.JobLimits // zero means a default: 64 MiB, 60 s of CPU, 120 s, 4 MiB of output
	CacheDir string         // for compiled code; empty: compile each time
}

// Result is what a job gave and took. After an [*Error] it still holds what
// was metered, and the tail of standard error.
type Result struct {
	Output   []byte
	Stderr   string // last 4 KiB, valid UTF-8
	ExitCode int    // the module's
	CPU      time.Duration
	Wall     time.Duration // from before the worker starts until it is gone
	MaxRSS   int64         // bytes, of the worker; 0 if it died without saying
	Engine   string        // as in "wazero/1.12.0 compiler amd64"; empty if it was not reached
}

// Runner runs jobs. The zero value is ready; one Runner may run any number of
// jobs at the same time. Its executable must call [WorkerMain].
type Runner struct {
	Executable string // of the worker; empty: the one that runs now, even if its file has been replaced
	CacheBytes int64  // most compiled code kept below a Spec's CacheDir; 0: 256 MiB

	prefix []string // before WorkerArg: an emulator's arguments, in tests
}

// Run does one job. The error is an [*Error], or wraps the cause of ctx's end.
func (r *Runner) Run(ctx context.Context, s Spec) (Result, error) {
	if err := s.normalize(); err != nil {
		return Result{}, err
	}
	module, err := openModule(s.Module)
	if err != nil {
		return Result{}, err
	}
	defer module.Close()
	code, err := r.openCodeCache(s, module)
	if err != nil {
		return Result{}, err
	}
	var res Result
	err = spend(func() error {
		res, err = r.do(ctx, s, module, code)
		return err
	})
	return res, err
}

// spend runs f on a thread that ends with it. The thread gives up gaining
// privileges, which a child inherits, and a child's parent-death signal is tied
// to the thread that started it, so that f must outlive its children. What
// else a child can inherit from its thread (Landlock) is to be added here.
func spend(f func() error) error {
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked, so that nothing else gets the thread
		if unix.Gettid() == unix.Getpid() {
			// The Go runtime cannot end the main thread. While this holds it,
			// the next try gets another.
			err = spend(f)
			runtime.UnlockOSThread()
			return
		}
		if err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			err = failure(WorkerFailed, "the worker cannot be denied new privileges: %v", err)
			return
		}
		err = f()
	}()
	<-done
	return err
}

// do is Run on the thread that is spent with it.
func (r *Runner) do(ctx context.Context, s Spec, module *os.File, code codeCache) (Result, error) {
	began := time.Now()
	c, err := r.start(s, module, code.dir)
	if err != nil {
		return Result{}, err
	}
	why := c.supervise(ctx, s.Limits)
	res, err := c.reap(why, s.Limits)
	res.Wall = time.Since(began)
	code.done(c.end.CacheBroken)
	return res, err
}

// normalize fills in defaults and refuses what cannot be run.
func (s *Spec) normalize() error {
	l, d := &s.Limits, defaultLimits
	l.MemoryBytes = orDefault(l.MemoryBytes, d.MemoryBytes)
	l.OutputBytes = orDefault(l.OutputBytes, d.OutputBytes)
	l.CPUSeconds = orDefault(l.CPUSeconds, d.CPUSeconds)
	l.WallSeconds = orDefault(l.WallSeconds, d.WallSeconds)
	l.WallSeconds = min(l.WallSeconds, maxWall.Seconds())
	l.CPUSeconds = min(l.CPUSeconds, maxWall.Seconds()*float64(runtime.NumCPU()))
	// Memory comes in pages; a part of one is of no use to the module.
	l.MemoryBytes = max(min(l.MemoryBytes, MaxMemory)/pageBytes, 1) * pageBytes
	if len(s.Input) > MaxInput {
		return failure(BadSpec, "the input has %s, at most %s are possible", bytesText(int64(len(s.Input))), bytesText(MaxInput))
	}
	total := 0
	for _, a := range s.Args {
		if strings.ContainsRune(a, 0) {
			return failure(BadSpec, "an argument of the job contains a NUL byte")
		}
		total += len(a)
	}
	if total > wire.MaxMessage {
		return failure(BadSpec, "the job's arguments have %d bytes, at most %d are possible", total, wire.MaxMessage)
	}
	return nil
}

// orDefault treats what is no sensible limit (zero, negative, NaN) as not given.
func orDefault[T int64 | float64](v, d T) T {
	if v > 0 {
		return v
	}
	return d
}

func openModule(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, failure(WorkerFailed, "the module cannot be opened: %v", err)
	}
	st, err := f.Stat()
	switch {
	case err != nil:
		err = failure(WorkerFailed, "the module cannot be read: %v", err)
	case !st.Mode().IsRegular():
		err = failure(BadModule, "the module %s is not a regular file", path)
	case st.Size() > MaxModule:
		err = failure(BadModule, "the module has %s, at most %s are possible", bytesText(st.Size()), bytesText(MaxModule))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// child is a worker as its parent sees it.
type child struct {
	cmd    *exec.Cmd
	exited chan struct{} // closed when it is dead but not yet reaped, so that its pid is still its own
	stdout *collector
	stderr *collector
	events chan []event // receives once, when the worker's end of descriptor 4 is closed
	end    ending
	rss    int64 // bytes, as last seen
}

func (r *Runner) start(s Spec, module *os.File, cacheDir string) (*child, error) {
	head, err := task{
		Args: s.Args, Digest: s.Digest, InputBytes: len(s.Input),
		Memory: s.Limits.MemoryBytes, CPU: s.Limits.CPUSeconds, CacheDir: cacheDir,
	}.encode()
	if err != nil {
		return nil, failure(WorkerFailed, "%v", err)
	}
	er, ew, err := os.Pipe()
	if err != nil {
		return nil, failure(WorkerFailed, "no pipe to the worker: %v", err)
	}
	defer ew.Close()
	c := &child{
		exited: make(chan struct{}),
		stdout: newCollector(s.Limits.OutputBytes, 0),
		stderr: newCollector(maxStderr, stderrKept),
		events: make(chan []event, 1),
	}
	exe := r.Executable
	if exe == "" {
		exe = "/proc/self/exe"
	}
	c.cmd = exec.Command(exe, append(append([]string{}, r.prefix...), WorkerArg)...)
	c.cmd.Dir = "/"
	c.cmd.Env = []string{}
	c.cmd.Stdin = io.MultiReader(bytes.NewReader(head), bytes.NewReader(s.Input))
	c.cmd.Stdout, c.cmd.Stderr = c.stdout, c.stderr
	c.cmd.ExtraFiles = []*os.File{module, ew} // descriptors 3 and 4
	// A cgroup, once there is one, is given here with UseCgroupFD.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c.cmd.WaitDelay = 5 * time.Second // for the pipes, should something outside the group hold them
	if err := c.cmd.Start(); err != nil {
		er.Close()
		return nil, failure(WorkerFailed, "the worker %s could not be started: %v", exe, err)
	}
	go c.listen(er)
	go c.awaitExit()
	return c, nil
}

// listen reads the worker's events until it is gone.
func (c *child) listen(r *os.File) {
	defer r.Close()
	var all []event
	for d := json.NewDecoder(io.LimitReader(r, 64<<10)); ; {
		var e event
		if d.Decode(&e) != nil {
			c.events <- all
			return
		}
		all = append(all, e)
	}
}

// awaitExit waits for the child's death without reaping it: until reap does,
// neither its pid nor its group can become somebody else's.
func (c *child) awaitExit() {
	defer close(c.exited)
	for {
		err := unix.Waitid(unix.P_PID, c.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// supervise watches the child until it is dead, and kills it when it takes too
// much. It returns why it did: nil for a child that ended by itself.
func (c *child) supervise(ctx context.Context, l wire.JobLimits) error {
	wall := time.NewTimer(seconds(l.WallSeconds))
	defer wall.Stop()
	look := time.NewTimer(0)
	defer look.Stop()
	for {
		select {
		case <-c.exited:
			return nil
		case <-ctx.Done():
			return c.kill(fmt.Errorf("the job was stopped: %w", context.Cause(ctx)))
		case <-wall.C:
			return c.kill(failure(LimitWall, "the job ran longer than its limit of %gs; raise wall_seconds or use a smaller input", l.WallSeconds))
		case <-c.stdout.over:
			return c.kill(outputError(l))
		case <-c.stderr.over:
			return c.kill(stderrError())
		case <-look.C:
			left := seconds(l.CPUSeconds) - c.cpuTime()
			if left <= 0 {
				return c.kill(cpuError(l))
			}
			// It cannot use up what is left sooner than on all its threads.
			look.Reset(max(left/compileThreads, 5*time.Millisecond))
		}
	}
}

func cpuError(l wire.JobLimits) *Error {
	return failure(LimitCPU, "the job used more than its limit of %gs of CPU; raise cpu_seconds or use a smaller input", l.CPUSeconds)
}

func outputError(l wire.JobLimits) *Error {
	return failure(LimitOutput, "the job wrote more than its limit of %s to standard output; raise output_bytes", bytesText(l.OutputBytes))
}

func stderrError() *Error {
	return failure(LimitOutput, "the job wrote more than %s to standard error; make it quieter", bytesText(maxStderr))
}

// kill ends the child's whole group and gives the reason back.
func (c *child) kill(why error) error {
	c.rss = c.peakMemory()
	_ = unix.Kill(-c.cmd.Process.Pid, unix.SIGKILL) // fails only if it is dead already
	return why
}

// cpuTime reads the child's CPU clock: all its threads, to the nanosecond. The
// number of a process's clock is made as clock_getcpuclockid(3) does.
func (c *child) cpuTime() time.Duration {
	const schedClock = 2 // CPUCLOCK_SCHED
	var ts unix.Timespec
	if unix.ClockGettime(int32(^c.cmd.Process.Pid)<<3|schedClock, &ts) != nil {
		return 0 // dead; the exit is about to be seen
	}
	return time.Duration(ts.Nano())
}

// peakMemory asks the kernel for the child's largest resident set so far.
func (c *child) peakMemory() int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	return statusField(status, "VmHWM")
}

// reap collects a child that is dead or has been killed, and tells how it ended.
func (c *child) reap(why error, l wire.JobLimits) (Result, error) {
	select {
	case <-c.exited:
	case <-time.After(10 * time.Second):
		// Only a kernel that waits for a broken disk or the like holds a killed process.
		go func() { <-c.exited; _ = c.cmd.Wait() }()
		return Result{}, failure(WorkerFailed, "the worker %d was killed but does not go; look for disk errors in the kernel's log", c.cmd.Process.Pid)
	}
	_ = unix.Kill(-c.cmd.Process.Pid, unix.SIGKILL) // whatever else is in the group
	_ = c.cmd.Wait()                                // how it ended is read from the state below
	stderr := c.stderr.bytes()
	res := Result{MaxRSS: c.rss, Stderr: lastText(stderr, stderrTail)}
	state := c.cmd.ProcessState
	res.CPU = state.UserTime() + state.SystemTime()
	told := false
	for _, e := range <-c.events {
		if e.Engine != "" {
			res.Engine = e.Engine
		}
		if e.End != nil {
			c.end, told = *e.End, true
			res.MaxRSS = max(c.rss, c.end.MaxRSS)
			res.ExitCode = c.end.ExitCode
		}
	}
	switch {
	case why != nil:
		return res, why
	case c.stdout.isOver():
		return res, outputError(l)
	case c.stderr.isOver():
		return res, stderrError()
	case !told:
		return res, c.crash(res, lastCrash(stderr), l)
	case c.end.Cause != "":
		return res, &Error{Cause: c.end.Cause, ExitCode: c.end.ExitCode, Reason: withLastWords(c.end, res.Stderr)}
	}
	res.Output = c.stdout.bytes()
	return res, nil
}

// crash explains a worker that died without a word; said is what the Go
// runtime wrote about it.
func (c *child) crash(res Result, said string, l wire.JobLimits) error {
	status, _ := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case res.CPU >= seconds(l.CPUSeconds):
		return cpuError(l)
	case strings.Contains(said, "out of memory") || strings.Contains(said, "cannot allocate memory"):
		return failure(LimitMemory, "the job needed more than %s for its call stack and tables, beyond its memory limit of %s",
			bytesText(engineAllowance), bytesText(l.MemoryBytes))
	case status.Signaled() && status.Signal() == syscall.SIGKILL:
		return failure(WorkerFailed, "the worker was killed from outside, most likely because the machine ran out of memory")
	default:
		return failure(WorkerFailed, "the worker crashed (%v): %s", c.cmd.ProcessState, said)
	}
}

// lastCrash finds the line with which the Go runtime begins to tell of a
// crash. A module can write such a line too, but not make the worker die with it.
func lastCrash(stderr []byte) string {
	var found string
	for line := range strings.Lines(string(stderr)) {
		if strings.HasPrefix(line, "fatal error: ") || strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "SIG") {
			found = line
		}
	}
	return firstLine(strings.ToValidUTF8(found, "\uFFFD"))
}

// lastText is the end of what a module wrote, at most n bytes of valid UTF-8.
func lastText(b []byte, n int) string {
	text := strings.ToValidUTF8(string(b[max(0, len(b)-n):]), "\uFFFD")
	for len(text) > n { // each byte that was replaced took three
		text = strings.ToValidUTF8(text[len(text)-n:], "")
	}
	return text
}

// withLastWords adds the last line of standard error to a module's failure.
func withLastWords(e ending, stderr string) string {
	words := strings.TrimSpace(stderr)
	if e.Cause != GuestFailed || words == "" {
		return e.Reason
	}
	return fmt.Sprintf("%s: %q", e.Reason, firstLine(words[strings.LastIndexByte(words, '\n')+1:]))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// bytesText writes a number of bytes as a person reads it.
func bytesText(n int64) string {
	if n >= 1<<20 {
		return fmt.Sprintf("%.4g MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d bytes", n)
}
