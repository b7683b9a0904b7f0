package sandbox

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"runtime"
	"strings"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/experimental"
	"github.com/tetratelabs/wazero/experimental/sysfs"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"
	"golang.org/x/sys/cpu"

	"github.com/deimos-edge/deimos/wire"
)

// WorkerArg is the first argument that makes an executable a worker. Whoever
// uses a [Runner] must call [WorkerMain] in main when os.Args[1] is this, before
// anything else:
//
//	if len(os.Args) > 1 && os.Args[1] == sandbox.WorkerArg {
//		os.Exit(sandbox.WorkerMain())
//	}
const WorkerArg = "job-worker"

// EngineVersion is that of the engine; a test holds it to go.mod. It stands
// here because a test binary does not know its modules' versions.
const EngineVersion = "1.12.0"

// WorkerMain does one job as the task on standard input says, and returns the
// exit code of the process: 0 if how the job ended could be told on descriptor
// 4, whatever the end was.
func WorkerMain() int {
	events := os.NewFile(eventFD, "events")
	say := json.NewEncoder(events)
	w := &worker{say: say}
	end := w.work()
	end.MaxRSS = w.conf.maxRSS()
	if err := say.Encode(event{End: &end}); err != nil {
		fmt.Fprintln(os.Stderr, "job-worker is started by the agent only; its answer cannot be written:", err)
		return 1
	}
	return 0
}

// worker is the state of one job inside its process.
type worker struct {
	say         *json.Encoder
	conf        confinement
	cacheBroken bool
}

// misbehave is for tests: what code of a module would do that has broken the engine
// while it was compiling or running.
var misbehave = func(stage string) {}

// work goes through the life of a worker, and says how it ended.
func (w *worker) work() ending {
	t, err := readTask(os.Stdin)
	if err != nil {
		return failed(failure(WorkerFailed, "the worker got no task: %v", err))
	}
	if w.conf, err = confine(t); err != nil {
		return failed(failure(WorkerFailed, "the worker could not confine itself: %v", err))
	}
	if err := w.say.Encode(event{Walls: w.conf.walls}); err != nil {
		return failed(failure(WorkerFailed, "the parent does not listen: %v", err))
	}
	misbehave("compiling")
	module, err := readModule(t.Digest)
	if err != nil {
		return failed(err)
	}
	// Input is read whole before the module starts, so that how the pipe
	// happens to cut it cannot be seen.
	input := make([]byte, t.InputBytes)
	if _, err := io.ReadFull(os.Stdin, input); err != nil {
		return failed(failure(WorkerFailed, "the input did not arrive whole: %v", err))
	}
	g, err := w.granted(t)
	if err != nil {
		return failed(failure(WorkerFailed, "the worker cannot use what it was given: %v", err))
	}
	rt, code, err := w.compile(module, t, g.host)
	if err != nil {
		return failed(err)
	}
	if err := w.say.Encode(event{Engine: Engine(), Saves: imports(code, "checkpoint"), Looks: imports(code, "restore") || imports(code, "should_checkpoint")}); err != nil {
		return failed(failure(WorkerFailed, "the parent does not listen: %v", err))
	}
	if err := w.conf.tighten(t); err != nil {
		return failed(failure(WorkerFailed, "the worker could not give up its rights: %v", err))
	}
	misbehave("running")
	end := execute(rt, code, t, input, g)
	end.CacheBroken = w.cacheBroken
	return end
}

// granted is what a module finds beside standard input and output.
type granted struct {
	stdin   *input // nil: what the task brings
	in, out *folder
	host    *host
}

// granted takes over the descriptors that the worker was born with.
func (w *worker) granted(t task) (granted, error) {
	fd := uintptr(firstFileFD)
	next := func(name string) *os.File {
		fd++
		return os.NewFile(fd-1, name)
	}
	h := &host{say: w.say, checkpoints: os.NewFile(checkpointFD, "checkpoints"), answers: os.NewFile(answerFD, "answers")}
	g := granted{in: newFolder(), out: newFolder(), host: h}
	if t.Restore != nil {
		h.restored = &input{size: t.Restore.Size, file: next("checkpoint")}
	}
	for _, name := range t.Folders {
		g.in.grant(name, nil)
	}
	for _, in := range t.Inputs {
		f := &input{size: in.Size, file: next(in.Name)}
		if in.Name == wire.Stdin {
			g.stdin = f
			continue
		}
		g.in.grant(in.Name, f)
	}
	g.in.sort()
	for _, name := range t.Outputs {
		g.out.outputs = append(g.out.outputs, newOutput(name, next(name)))
	}
	h.inputs = g.in
	var err error
	h.control, err = mapControl()
	return g, err
}

// mounts shows a module the folders in which there is something for it.
func (g granted) mounts() wazero.FSConfig {
	config := wazero.NewFSConfig()
	if len(g.in.below["."]) > 0 {
		config = config.(sysfs.FSConfig).WithSysFSMount(g.in, inDir)
	}
	if len(g.out.outputs) > 0 {
		config = config.(sysfs.FSConfig).WithSysFSMount(g.out, outDir)
	}
	return config
}

// flush passes on what the module has written.
func (g granted) flush() error {
	var all error
	for _, out := range g.out.outputs {
		all = errors.Join(all, out.pipe.Flush())
	}
	return all
}

func readModule(digest string) ([]byte, error) {
	f := os.NewFile(moduleFD, "module")
	defer f.Close()
	module, err := io.ReadAll(io.LimitReader(f, MaxModule+1))
	if err != nil {
		return nil, failure(WorkerFailed, "the module cannot be read: %v", err)
	}
	if len(module) > MaxModule {
		return nil, failure(BadModule, "the module is larger than %s", bytesText(MaxModule))
	}
	if sum := sha256.Sum256(module); digest != "" && hex.EncodeToString(sum[:]) != digest {
		return nil, failure(ModuleMismatch, "the module on disk has the SHA-256 %x, not %s; fetch it again", sum, digest)
	}
	return module, nil
}

// compile makes the module ready to run.
func (w *worker) compile(module []byte, t task, h *host) (wazero.Runtime, wazero.CompiledModule, error) {
	rt, code, err := w.load(module, t.CacheDir)
	if err != nil && wantsMemory(err.Error()) {
		return nil, nil, compileError(t.Compile)
	}
	if err != nil {
		return nil, nil, failure(BadModule, "the module is not valid WebAssembly: %s", firstLine(err.Error()))
	}
	if code.ExportedFunctions()["_start"] == nil {
		return nil, nil, failure(BadModule, "the module exports no function _start; build it as a WASI command")
	}
	// What it imports is code too, and none can be made later.
	ctx := context.Background()
	if _, err := wasi_snapshot_preview1.Instantiate(ctx, rt); err != nil {
		return nil, nil, failure(WorkerFailed, "WASI could not be set up: %v", err)
	}
	if imports(code, "") {
		if err := h.offer(ctx, rt); err != nil {
			return nil, nil, failure(WorkerFailed, "the host interface could not be set up: %v", err)
		}
	}
	return rt, code, nil
}

// load compiles. If compiled code cannot be loaded from or stored in the
// cache, it does without, and remembers that.
func (w *worker) load(module []byte, cacheDir string) (wazero.Runtime, wazero.CompiledModule, error) {
	if cacheDir != "" {
		if cache, err := wazero.NewCompilationCacheWithDir(cacheDir); err == nil {
			rt, code, err := compileWith(module, wazero.NewRuntimeConfig().WithCompilationCache(cache))
			if err == nil {
				return rt, code, nil
			}
		}
	}
	rt, code, err := compileWith(module, wazero.NewRuntimeConfig())
	w.cacheBroken = err == nil && cacheDir != "" // else it is the module
	return rt, code, err
}

func compileWith(module []byte, config wazero.RuntimeConfig) (wazero.Runtime, wazero.CompiledModule, error) {
	// The memory bound proper is boundedMemory; this is for any other way in.
	rt := wazero.NewRuntimeWithConfig(context.Background(), config.WithMemoryCapacityFromMax(true))
	ctx := experimental.WithCompilationWorkers(context.Background(), compileThreads)
	code, err := rt.CompileModule(ctx, module)
	return rt, code, err
}

// execute instantiates the module and calls its _start.
func execute(rt wazero.Runtime, code wazero.CompiledModule, t task, input []byte, g granted) (end ending) {
	memory := &boundedMemory{limit: t.Memory}
	ctx := experimental.WithMemoryAllocator(context.Background(), memory)
	out := bufio.NewWriterSize(os.Stdout, 64<<10)
	defer func() {
		// wazero turns panics below a call into errors, but panics itself if a
		// module's initial memory is refused.
		if p := recover(); p != nil {
			end = failed(failure(BadModule, "the module cannot be instantiated: %v", p))
		}
		if end.Cause != "" && memory.refused > 0 {
			end = failed(failure(LimitMemory, "the job asked for %s of memory, the limit is %s; raise memory_bytes or use a smaller input",
				bytesText(int64(memory.refused)), bytesText(t.Memory)))
		}
		if err := errors.Join(out.Flush(), g.flush()); err != nil && end.Cause == "" {
			end = failed(failure(WorkerFailed, "the output could not be passed on: %v", err))
		}
	}()
	// Reader and writers are wrapped: of a plain *os.File wazero would show the
	// module the real file's times and kind.
	clock := &fakeClock{now: clockStart}
	var stdin io.Reader = bytes.NewReader(input)
	if g.stdin != nil {
		stdin = io.NewSectionReader(g.stdin.file, 0, g.stdin.size)
	}
	config := wazero.NewModuleConfig().
		WithWalltime(clock.walltime, sys.ClockResolution(clockStep)).
		WithNanotime(clock.nanotime, sys.ClockResolution(clockStep)).
		WithNanosleep(clock.sleep).
		WithName("").
		WithArgs(append([]string{"job"}, t.Args...)...).
		WithStdin(stdin).
		WithStdout(out).
		WithStderr(struct{ io.Writer }{os.Stderr}).
		WithFSConfig(g.mounts()).
		WithStartFunctions()
	for name, value := range pairs(t.Env) {
		config = config.WithEnv(name, value)
	}
	if t.Live {
		config = config.WithSysWalltime().WithSysNanotime().WithSysNanosleep().WithRandSource(rand.Reader)
	}
	module, err := rt.InstantiateModule(ctx, code, config)
	if err != nil {
		return ended(err, BadModule, "the module cannot be instantiated")
	}
	_, err = module.ExportedFunction("_start").Call(ctx)
	return ended(err, GuestFailed, "the module was stopped by a trap")
}

// pairs goes through a list of names, each with its value behind it.
func pairs(list []string) iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for i := 0; i+1 < len(list) && yield(list[i], list[i+1]); i += 2 {
		}
	}
}

// ended reads what wazero returned from running a module; otherwise says what
// it is if the module did not exit by itself.
func ended(err error, otherwise Cause, what string) ending {
	var exit *sys.ExitError
	switch {
	case err == nil:
		return ending{}
	case errors.As(err, &exit) && exit.ExitCode() == 0:
		return ending{}
	case errors.As(err, &exit):
		return ending{Cause: GuestFailed, ExitCode: int(exit.ExitCode()),
			Reason: fmt.Sprintf("the module exited with code %d", exit.ExitCode())}
	default:
		e := ending{Cause: otherwise, Reason: what + ": " + firstLine(err.Error())}
		if otherwise == GuestFailed {
			e.ExitCode = -1
		}
		return e
	}
}

func failed(err error) ending {
	var e *Error
	if !errors.As(err, &e) {
		e = failure(WorkerFailed, "%v", err)
	}
	return ending{Cause: e.Cause, ExitCode: e.ExitCode, Reason: e.Reason}
}

// Engine says what runs modules here, as in "wazero/1.12.0 compiler amd64". Where
// that is an interpreter, as on 32-bit ARM, they take some 60 times as long.
func Engine() string {
	mode := "interpreter"
	// The conditions of wazero's own choice (its internal/platform).
	if runtime.GOARCH == "arm64" || runtime.GOARCH == "amd64" && cpu.X86.HasSSE41 {
		mode = "compiler"
	}
	return "wazero/" + EngineVersion + " " + mode + " " + runtime.GOARCH
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	if len(line) > 200 {
		line = strings.ToValidUTF8(line[:200], "") + "…"
	}
	return line
}
