package sandbox

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math"
	"os"
	"os/exec"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/wire"
	"golang.org/x/sys/unix"
)

// Bounds that no limit lifts.
const (
	MaxModule  = 32 << 20 // bytes of a module
	MaxInput   = 4 << 20  // bytes of standard input
	MaxInputs  = 32       // named ones
	MaxOutputs = 16       // named ones
	MaxFiles   = 4096     // of all inputs together, in folders too: each is a descriptor

	maxStderr  = 1 << 20   // bytes of standard error, then the worker is killed
	stderrTail = 4 << 10   // bytes of it that are reported
	stderrKept = 64 << 10  // bytes of it that are kept meanwhile: a crash of the engine has a long stack
	pageBytes  = 64 << 10  // of WebAssembly
	maxEvents  = 1 << 20   // bytes of what the worker says: a worker of ours says less
	maxPath    = 1 << 10   // bytes of that of a file in a folder
	maxPaths   = 512 << 10 // bytes of all of them together
)

// pipeDelay is how long after a worker's end its pipes are read, should something outside its
// group hold them.
var pipeDelay = 20 * time.Second

// Spec is one job.
type Spec struct {
	Module   string   // path of the WebAssembly file
	Digest   string   // SHA-256 it must have, lower-case hex; checked over the very bytes that run; empty: not checked
	Args     []string // after the program's name, which is always "job"
	Env      map[string]string
	Input    []byte         // standard input, at most [MaxInput]
	Inputs   []Input        // at most [MaxInputs]
	Outputs  []Output       // at most [MaxOutputs]
	Live     bool           // the real time and real random numbers
	Limits   wire.JobLimits // zero means that of [wire.OrdinaryLimits]
	CacheDir string         // for compiled code; empty: compile each time
	// CompileBytes is the memory that compiling the module may take, see [CompileBytes]; zero: the
	// most. One of 2.5 MB that Go made takes some 80 MiB.
	CompileBytes int64

	// Checkpoint is what the module last kept in a run that was cut off, of
	// CheckpointBytes; nil: it begins. What it had written before is gone, and is
	// written anew.
	Checkpoint      *os.File
	CheckpointBytes int64
	Control         *Control // nil: nobody has a hand on it

	// What the module says while it runs; each may be nil. They are not called after
	// Run has returned, and the job waits while they are at work.
	OnProgress func(share float64)          // 0 to 1, each time more
	OnLog      func(level int, text string) // 0 to 3: debug, information, warning, error
	OnCompiled func()                       // from now on it takes no more than Limits
	// OnCheckpoint makes size bytes of r durable in place of the checkpoint before, as
	// a whole or not at all: r may end early, as the job may. Nil: nobody will go on from
	// one, and they are thrown away. The module does not see that, nor an error unless it is
	// Live, as its output must not depend on where it runs.
	OnCheckpoint func(size int64, r io.Reader) error
}

// Input is what the module reads as /in/Name: a file, or a folder with all that is
// in it. A file of the name [wire.Stdin] is standard input instead.
type Input struct {
	Name string
	Size int64    // bytes
	File *os.File // must not change while the job runs; left open. Nil: a folder
	// Files are those of a folder, each with its path below it for a name, as
	// [fs.ValidPath] has it. They are listed in this order.
	Files []Input
}

// Output is where /out/Name goes. An error of To ends the job, as its reason.
type Output struct {
	Name string
	To   io.Writer
}

// Result is what a job gave and took. After an [*Error] it still holds what
// was metered, and the tail of standard error.
type Result struct {
	Output   []byte // standard output
	Stderr   string // last 4 KiB, valid UTF-8
	ExitCode int    // the module's
	CPU      time.Duration
	Wall     time.Duration // from before the worker starts until it is gone, without Suspended
	// Suspended is for how long it stood still by [Control.Suspend].
	Suspended time.Duration
	// Disturbed says that it went on from a checkpoint, or was asked for one; Looks, that the
	// module has the means to see that.
	Disturbed, Looks bool
	MaxRSS           int64    // bytes, of the worker; if it died without saying, its cgroup's most memory, 0 without one
	Engine           string   // as [Engine] says; empty if it was not reached
	Walls            []string // that stood around it, as [Walls] says; none if it did not come that far
}

// Runner runs jobs. The zero value is ready; one Runner may run any number of
// jobs at the same time. Its executable must call [WorkerMain].
type Runner struct {
	Executable string   // of the worker; empty: the one that runs now, even if its file has been replaced
	CacheBytes int64    // most compiled code kept below a Spec's CacheDir; 0: 256 MiB
	Cgroups    *Cgroups // where each worker gets a cgroup; nil: none has one

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

// spend runs f on a thread that ends with it. The thread gives up its
// privileges and gaining any, which a child inherits, and a child's parent-death
// signal is tied to the thread that started it, so that f must outlive its
// children.
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
		if err = surrender(); err != nil {
			err = failure(WorkerFailed, "the worker cannot be denied the agent's privileges: %v", err)
			return
		}
		err = f()
	}()
	<-done
	return err
}

// do is Run on the thread that is spent with it.
func (r *Runner) do(ctx context.Context, s Spec, module *os.File, code codeCache) (Result, error) {
	c, err := r.start(s, module, code.dir)
	if err != nil {
		return Result{}, err
	}
	why := c.supervise(ctx, s.Limits)
	res, err := c.reap(why, s.Limits)
	res.Disturbed = s.Checkpoint != nil || s.Control.everAsked.Load()
	c.pace.suspend(false, time.Now())
	res.Wall, res.Suspended = c.pace.ran(time.Now()), c.pace.paused
	code.done(c.end.CacheBroken)
	return res, err
}

// normalize fills in defaults and refuses what cannot be run.
func (s *Spec) normalize() error {
	l, d := &s.Limits, wire.OrdinaryLimits
	l.MemoryBytes = orDefault(l.MemoryBytes, d.MemoryBytes)
	l.OutputBytes = orDefault(l.OutputBytes, d.OutputBytes)
	l.CPUSeconds = orDefault(l.CPUSeconds, d.CPUSeconds)
	l.WallSeconds = orDefault(l.WallSeconds, d.WallSeconds)
	most := wire.MostLimits
	l.OutputBytes = min(l.OutputBytes, most.OutputBytes)
	l.WallSeconds = min(l.WallSeconds, most.WallSeconds)
	l.CPUSeconds = min(l.CPUSeconds, most.CPUSeconds)
	// Memory comes in pages; a part of one is of no use to the module.
	l.MemoryBytes = max(min(l.MemoryBytes, most.MemoryBytes)/pageBytes, 1) * pageBytes
	s.CompileBytes = CompileBytes(s.CompileBytes)
	if len(s.Input) > MaxInput {
		return failure(BadSpec, "the input has %s, at most %s are possible", bytesText(int64(len(s.Input))), bytesText(MaxInput))
	}
	if s.Control == nil {
		s.Control = NewControl()
	}
	if err := s.checkWords(); err != nil {
		return err
	}
	return s.checkNames()
}

// checkWords looks at what the module is told.
func (s *Spec) checkWords() error {
	total := 0
	for _, a := range s.Args {
		if strings.ContainsRune(a, 0) {
			return failure(BadSpec, "an argument of the job contains a NUL byte")
		}
		total += len(a)
	}
	for name, value := range s.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return failure(BadSpec, "the job's environment cannot have the variable %.70q: a name has at least one letter and no \"=\", and neither it nor its value a NUL byte", name)
		}
		total += len(name) + len(value)
	}
	if total > wire.MaxMessage {
		return failure(BadSpec, "the job's arguments and environment have %d bytes, at most %d are possible", total, wire.MaxMessage)
	}
	return nil
}

// checkNames looks at inputs and outputs.
func (s *Spec) checkNames() error {
	if len(s.Inputs) > MaxInputs || len(s.Outputs) > MaxOutputs {
		return failure(BadSpec, "the job has %d inputs and %d outputs, at most %d and %d are possible", len(s.Inputs), len(s.Outputs), MaxInputs, MaxOutputs)
	}
	if s.Input != nil && slices.ContainsFunc(s.Inputs, func(in Input) bool { return in.Name == wire.Stdin }) {
		return failure(BadSpec, "the job has two inputs that are its standard input")
	}
	check := func(what, name string, seen map[string]bool) error {
		switch {
		case !ValidName(name):
			return failure(BadSpec, "the job cannot have %s of the name %.70q: it is 1 to 64 letters, digits, dots, dashes and underscores, not only dots", what, name)
		case seen[name]:
			return failure(BadSpec, "the job has %s of the name %q twice", what, name)
		}
		seen[name] = true
		return nil
	}
	ins, outs := map[string]bool{}, map[string]bool{}
	for _, in := range s.Inputs {
		if err := check("an input", in.Name, ins); err != nil {
			return err
		}
		if in.File == nil && in.Name == wire.Stdin {
			return failure(BadSpec, "the job has a folder for its standard input")
		}
	}
	if err := s.checkFiles(); err != nil {
		return err
	}
	for _, out := range s.Outputs {
		if err := check("an output", out.Name, outs); err != nil {
			return err
		}
	}
	return nil
}

// checkFiles looks at what is in folders.
func (s *Spec) checkFiles() error {
	files, paths := 0, 0
	for _, in := range s.Inputs {
		files++
		seen := make(map[string]bool, len(in.Files))
		for _, f := range in.Files {
			if !validPath(f.Name) || seen[f.Name] || f.File == nil || in.File != nil {
				return failure(BadSpec, "the job's input %q cannot have a file %.200q: a path has at most %d bytes of UTF-8, and is of one file", in.Name, f.Name, maxPath)
			}
			seen[f.Name] = true
			files, paths = files+1, paths+len(in.Name)+1+len(f.Name)
		}
		for name := range seen {
			for above := path.Dir(name); above != "."; above = path.Dir(above) {
				if seen[above] {
					return failure(BadSpec, "the job's input %q cannot have a file %.200q that is a folder, too", in.Name, above)
				}
			}
		}
	}
	if files > MaxFiles || paths > maxPaths {
		return failure(BadSpec, "the job's inputs have %d files, with paths of %s, at most %d and %s are possible", files, bytesText(int64(paths)), MaxFiles, bytesText(maxPaths))
	}
	return nil
}

// CompileBytes is what compiling may take where a [Spec] says so many: 1 GiB and a quarter of
// the machine's memory at most, and 256 MiB at least.
func CompileBytes(want int64) int64 {
	machine, err := machineMemory()
	if err != nil { // of no kernel that is known
		machine = 0
	}
	return compileBytes(want, machine)
}

func compileBytes(want, machine int64) int64 {
	return max(min(orDefault(want, maxCompile), machine/4, maxCompile), leastCompile)
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
	cmd     *exec.Cmd
	control *Control
	page    *os.File // see host.control
	pace    pace
	group   *cgroup
	exited  chan struct{} // closed when it is dead but not yet reaped, so that its pid is still its own
	written *budget       // of standard output and all outputs
	stdout  *collector
	stderr  *collector
	spools  sync.WaitGroup // of the outputs
	spoiled chan error     // capacity 1: an output cannot be kept
	kept    chan struct{}  // closed when no checkpoint comes any more
	events  chan []event   // receives once, when the worker's end of descriptor 4 is closed
	compile int64          // bytes, see Spec.CompileBytes
	end     ending
	rss     int64 // bytes, as last seen
}

// files goes through all files among the inputs, by their paths, in the order of
// their descriptors.
func (s *Spec) files() iter.Seq2[string, Input] {
	return func(yield func(string, Input) bool) {
		for _, in := range s.Inputs {
			if in.File != nil && !yield(in.Name, in) {
				return
			}
			for _, f := range in.Files {
				if !yield(in.Name+"/"+f.Name, f) {
					return
				}
			}
		}
	}
}

// task is what the worker is told.
func (s *Spec) task(cacheDir string) task {
	t := task{
		Args: s.Args, Digest: s.Digest, InputBytes: len(s.Input), Live: s.Live,
		Memory: s.Limits.MemoryBytes, Compile: s.CompileBytes, CPU: s.Limits.CPUSeconds, CacheDir: cacheDir,
	}
	for _, name := range slices.Sorted(maps.Keys(s.Env)) {
		t.Env = append(t.Env, name, s.Env[name])
	}
	if s.Checkpoint != nil {
		t.Restore = &grant{Size: s.CheckpointBytes}
	}
	for _, in := range s.Inputs {
		if in.File == nil {
			t.Folders = append(t.Folders, in.Name)
		}
	}
	for name, in := range s.files() {
		t.Inputs = append(t.Inputs, grant{name, in.Size})
	}
	for _, out := range s.Outputs {
		t.Outputs = append(t.Outputs, out.Name)
	}
	return t
}

// plumbing is the pipes between parent and worker.
type plumbing struct {
	ours, theirs []*os.File
	err          error
}

// from makes a pipe that the worker writes.
func (p *plumbing) from() *os.File { return p.pipe(false) }

// to makes a pipe that the worker reads.
func (p *plumbing) to() *os.File { return p.pipe(true) }

func (p *plumbing) pipe(read bool) *os.File {
	r, w, err := os.Pipe()
	if err != nil {
		p.err = errors.Join(p.err, err)
		return nil
	}
	if read {
		r, w = w, r
	}
	p.ours, p.theirs = append(p.ours, r), append(p.theirs, w)
	return r
}

// closeAll closes these files, of which some may be missing.
func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func (r *Runner) start(s Spec, module *os.File, cacheDir string) (*child, error) {
	head, err := s.task(cacheDir).encode()
	if err != nil {
		return nil, failure(WorkerFailed, "%v", err)
	}
	page, theirs, err := newControlPage()
	if err != nil {
		return nil, failure(WorkerFailed, "no memory to speak to the worker: %v", err)
	}
	defer theirs.Close()
	var p plumbing
	events, checkpoints, answers := p.from(), p.from(), p.to()
	var outputs []*os.File
	for range s.Outputs {
		outputs = append(outputs, p.from())
	}
	defer func() { closeAll(p.theirs) }()
	if p.err != nil {
		closeAll(append(p.ours, page))
		return nil, failure(WorkerFailed, "no pipe to the worker: %v", p.err)
	}
	written := newBudget(s.Limits.OutputBytes)
	c := &child{
		control: s.Control,
		page:    page,
		pace:    pace{began: time.Now()},
		exited:  make(chan struct{}),
		written: written,
		stdout:  &collector{budget: written},
		stderr:  &collector{budget: newBudget(maxStderr), tail: stderrKept},
		spoiled: make(chan error, 1),
		kept:    make(chan struct{}),
		events:  make(chan []event, 1),
		compile: s.CompileBytes,
	}
	ready := make(chan struct{})
	command := func(inGroup bool) *exec.Cmd {
		cmd := exec.Command(cmp.Or(r.Executable, "/proc/self/exe"), append(slices.Clone(r.prefix), WorkerArg)...)
		cmd.Dir = "/"
		cmd.Env = []string{}
		cmd.Stdin = io.MultiReader(after{ready}, bytes.NewReader(head), bytes.NewReader(s.Input))
		cmd.Stdout, cmd.Stderr = c.stdout, c.stderr
		// In the order of the descriptors, see task.go.
		cmd.ExtraFiles = []*os.File{module, p.theirs[0], theirs, p.theirs[1], p.theirs[2]}
		if s.Checkpoint != nil {
			cmd.ExtraFiles = append(cmd.ExtraFiles, s.Checkpoint)
		}
		for _, in := range s.files() {
			cmd.ExtraFiles = append(cmd.ExtraFiles, in.File)
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, p.theirs[3:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		if inGroup {
			cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(c.group.folder.Fd())
		}
		cmd.WaitDelay = pipeDelay
		return cmd
	}
	c.group, err = r.Cgroups.make(s.Limits, s.CompileBytes)
	if err == nil {
		c.cmd, err = r.Cgroups.start(c.group, command)
	}
	close(ready) // of a worker that could not be put where it belongs, nobody is left to read
	if err != nil {
		closeAll(append(p.ours, page))
		_ = c.group.remove()
		return nil, failure(WorkerFailed, "the worker could not be started: %v", err)
	}
	go c.listen(events, s)
	go c.awaitExit()
	go c.keepCheckpoints(checkpoints, answers, s)
	for i, out := range s.Outputs {
		c.spools.Go(func() { c.spool(outputs[i], out) })
	}
	return c, nil
}

// spool passes an output on until the worker is gone, or wrote too much.
func (c *child) spool(r *os.File, out Output) {
	defer r.Close()
	_, err := io.Copy(metered{c.written, out.To}, r)
	if err == nil || errors.Is(err, errTooMuch) {
		return
	}
	select {
	case c.spoiled <- fmt.Errorf("the job's output %q cannot be kept: %w", out.Name, err):
	default: // another one is told
	}
}

// listen reads the worker's events until it is gone.
func (c *child) listen(r *os.File, s Spec) {
	defer r.Close()
	var all []event
	for d := json.NewDecoder(io.LimitReader(r, maxEvents)); ; {
		var e event
		if d.Decode(&e) != nil {
			c.events <- all
			return
		}
		if e.Engine != "" {
			c.group.runs()
			if s.OnCompiled != nil {
				s.OnCompiled()
			}
		}
		if e.Saves {
			s.Control.saves.Store(true)
		}
		if e.Progress > 0 && s.OnProgress != nil {
			s.OnProgress(min(float64(e.Progress)/1000, 1))
		}
		if e.Log != nil && s.OnLog != nil {
			s.OnLog(e.Log.Level, e.Log.Text)
		}
		if e.Walls != nil || e.Engine != "" || e.End != nil {
			all = append(all, e)
		}
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
	look := time.NewTimer(0)
	defer look.Stop()
	for {
		select {
		case <-c.exited:
			return nil
		case <-ctx.Done():
			return c.kill(fmt.Errorf("the job was stopped: %w", context.Cause(ctx)))
		case <-c.written.over:
			return c.kill(outputError(l))
		case <-c.stderr.over:
			return c.kill(stderrError())
		case err := <-c.spoiled:
			return c.kill(err)
		case <-c.control.changed:
		case <-look.C:
		}
		next, why := c.look(l)
		if why != nil {
			return c.kill(why)
		}
		look.Reset(next)
	}
}

// look meters the child, and lets it run or stand still. It says when to look
// again, or why the child must die.
func (c *child) look(l wire.JobLimits) (next time.Duration, why error) {
	now, cpu := time.Now(), c.cpuTime()
	c.control.cpu.Store(int64(cpu))
	c.ask()
	if c.pace.suspend(c.control.suspended.Load(), now) {
		c.stop(true)
		return time.Hour, nil
	}
	wall := seconds(l.WallSeconds) - c.pace.ran(now)
	if wall <= 0 {
		return 0, failure(LimitWall, "the job ran longer than its limit of %gs; raise wall_seconds or use a smaller input", l.WallSeconds)
	}
	left := seconds(l.CPUSeconds) - cpu
	if left <= 0 {
		return 0, cpuError(l)
	}
	share := math.Float64frombits(c.control.share.Load())
	var still time.Duration
	if c.group.throttles() {
		_ = c.group.setShare(share) // else what was set before holds
	} else {
		still = c.pace.throttle(share, cpu, now)
	}
	c.stop(still > 0)
	if still > 0 {
		return min(still, wall), nil
	}
	// It cannot use up what is left sooner than on all its threads.
	next = min(max(left/compileThreads, 5*time.Millisecond), wall, lookEvery)
	if share > 0 && !c.group.throttles() {
		next = min(next, shareLook)
	}
	return next, nil
}

// ask passes on that a checkpoint is wanted, or no longer.
func (c *child) ask() {
	b := []byte{0}
	if c.control.asked.Load() {
		b[0] = 1
	}
	_, _ = c.page.WriteAt(b, 0) // memory
}

// stop lets the child stand still, or go on.
func (c *child) stop(still bool) {
	if still == c.pace.stopped {
		return
	}
	c.pace.stopped = still
	signal := unix.SIGCONT
	if still {
		signal = unix.SIGSTOP
	}
	_ = unix.Kill(-c.cmd.Process.Pid, signal) // fails only if it is dead already
}

func cpuError(l wire.JobLimits) *Error {
	return failure(LimitCPU, "the job used more than its limit of %gs of CPU; raise cpu_seconds or use a smaller input", l.CPUSeconds)
}

func outputError(l wire.JobLimits) *Error {
	return failure(LimitOutput, "the job wrote more than its limit of %s; raise output_bytes", bytesText(l.OutputBytes))
}

func stderrError() *Error {
	return failure(LimitOutput, "the job wrote more than %s to standard error; make it quieter", bytesText(maxStderr))
}

// kill ends the child's whole group and gives the reason back.
func (c *child) kill(why error) error {
	c.rss = c.peakMemory()
	c.group.kill()
	_ = unix.Kill(-c.cmd.Process.Pid, unix.SIGKILL) // fails only if it is dead already
	return why
}

// cpuTime reads the child's CPU clock: all its threads, to the nanosecond. The
// number of a process's clock is made as clock_getcpuclockid(3) does.
func (c *child) cpuTime() time.Duration { return cpuOf(c.cmd.Process.Pid) }

func cpuOf(pid int) time.Duration {
	const schedClock = 2 // CPUCLOCK_SCHED
	var ts unix.Timespec
	if unix.ClockGettime(int32(^pid)<<3|schedClock, &ts) != nil {
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
		go func() { <-c.exited; _ = c.cmd.Wait(); c.page.Close(); _ = c.group.remove() }()
		return Result{}, failure(WorkerFailed, "the worker %d was killed but does not go; look for disk errors in the kernel's log", c.cmd.Process.Pid)
	}
	_ = unix.Kill(-c.cmd.Process.Pid, unix.SIGKILL) // whatever else is in the group
	waited := c.cmd.Wait()                          // how it ended is read from the state below
	c.page.Close()
	ranOut, peak := c.group.ranOut(), c.group.peak()
	if err := c.group.remove(); err != nil && why == nil {
		why = failure(WorkerFailed, "what the job has left cannot be ended: %v; look for disk errors in the kernel's log", err)
	}
	c.spools.Wait()
	<-c.kept
	stderr := c.stderr.bytes()
	res := Result{MaxRSS: c.rss, Stderr: lastText(stderr, stderrTail)}
	state := c.cmd.ProcessState
	res.CPU = state.UserTime() + state.SystemTime()
	told := false
	for _, e := range <-c.events {
		if e.Engine != "" {
			res.Engine, res.Looks = e.Engine, e.Looks
		}
		if res.Walls == nil && e.Walls != nil { // the first word, before any of the module's
			res.Walls = c.group.walls(e.Walls)
		}
		if e.End != nil {
			c.end, told = *e.End, true
			res.MaxRSS = max(c.rss, c.end.MaxRSS)
			res.ExitCode = c.end.ExitCode
		}
	}
	res.MaxRSS = cmp.Or(res.MaxRSS, peak)
	switch {
	case why != nil:
		return res, why
	case c.written.isOver():
		return res, outputError(l)
	case c.stderr.isOver():
		return res, stderrError()
	case len(c.spoiled) > 0:
		return res, <-c.spoiled
	case !told && ranOut && res.Engine == "":
		return res, compileError(c.compile)
	case !told && ranOut:
		return res, failure(LimitMemory, "the job's process needed more memory than its limit of %s and what it may have beside that, with what the kernel keeps for it", bytesText(l.MemoryBytes))
	case !told:
		return res, c.crash(res, lastCrash(stderr), l)
	case c.end.Cause != "":
		return res, &Error{Cause: c.end.Cause, ExitCode: c.end.ExitCode, Reason: withLastWords(c.end, res.Stderr)}
	}
	var exit *exec.ExitError
	if waited != nil && !errors.As(waited, &exit) { // else half an output would be signed
		return res, failure(WorkerFailed, "what the job wrote could not be read to its end: %v; run it again", waited)
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
	case res.Engine == "" && wantsMemory(said):
		return compileError(c.compile)
	case wantsMemory(said):
		return failure(LimitMemory, "the job needed more than %s for its call stack and tables, beyond its memory limit of %s",
			bytesText(engineAllowance), bytesText(l.MemoryBytes))
	case status.Signaled() && status.Signal() == syscall.SIGSYS:
		return failure(Breakout, "the job tried to leave its sandbox and was killed: its module broke the engine and made a system call that no job may make; do not run it again, and report it")
	case status.Signaled() && status.Signal() == syscall.SIGKILL:
		return failure(WorkerFailed, "the worker was killed from outside, most likely because the machine ran out of memory")
	default:
		return failure(WorkerFailed, "the worker crashed (%v): %s", c.cmd.ProcessState, said)
	}
}

// wantsMemory tells whether a crash of the Go runtime, or an error, is for want of memory.
func wantsMemory(said string) bool {
	return strings.Contains(said, "out of memory") || strings.Contains(said, "cannot allocate memory")
}

func compileError(most int64) *Error {
	return failure(LimitMemory, "compiling the module takes more than the %s of memory that this device has for it; place the job on one that lets jobs have more, or use a smaller module", bytesText(most))
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
