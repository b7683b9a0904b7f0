package sandbox

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
	"golang.org/x/sys/unix"
)

// run does one job with the shared cache of compiled code.
func run(t testing.TB, s Spec) (Result, error) {
	t.Helper()
	if s.CacheDir == "" {
		s.CacheDir = sharedCache
	}
	return runner.Run(t.Context(), s)
}

// mustRun fails the test unless the job succeeds.
func mustRun(t testing.TB, s Spec) Result {
	t.Helper()
	res, err := run(t, s)
	if err != nil {
		t.Fatalf("%v (stderr %q)", err, res.Stderr)
	}
	return res
}

// wantCause fails the test unless err has the cause, and as a problem of an
// order the state and code.
func wantCause(t testing.TB, err error, cause Cause, state wire.State, code string) *Error {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Cause != cause {
		t.Fatalf("got the error %v, want the cause %q", err, cause)
	}
	if p := wire.ProblemOf(err); p.State != state || p.Code != code || p.Reason != e.Reason {
		t.Fatalf("as a problem it is %+v, want %s with %q", p, state, code)
	}
	return e
}

func TestEndlessLoopEndsAtTheWallLimit(t *testing.T) {
	// A machine that has too much to do may not have begun with it by then.
	for limit := 0.3; ; limit *= 4 {
		res, err := run(t, Spec{Module: endless.file(t), Limits: wire.JobLimits{WallSeconds: limit, CPUSeconds: 60}})
		e := wantCause(t, err, LimitWall, wire.TimedOut, wire.CodeLimit)
		if !strings.Contains(e.Reason, fmt.Sprintf("%gs", limit)) {
			t.Errorf("%q does not name the limit", e.Reason)
		}
		if res.Wall < seconds(limit) {
			t.Errorf("killed after %v", res.Wall)
		}
		if res.CPU != 0 && res.MaxRSS != 0 && res.Engine != "" {
			return
		}
		if limit > 30 {
			t.Fatalf("a killed job is not metered: %+v", res)
		}
	}
}

func TestEndlessLoopEndsAtTheCPULimit(t *testing.T) {
	res, err := run(t, Spec{Module: endless.file(t), Limits: wire.JobLimits{WallSeconds: 300, CPUSeconds: 0.3}})
	wantCause(t, err, LimitCPU, wire.Failed, wire.CodeLimit)
	if res.CPU < 300*time.Millisecond {
		t.Errorf("killed for its CPU after %v of it", res.CPU)
	}
}

// TestCPULimitHoldsWithoutTheChild watches a worker that has set itself another
// limit.
func TestCPULimitHoldsWithoutTheChild(t *testing.T) {
	c := started(t, Spec{Module: endless.file(t), Limits: wire.JobLimits{CPUSeconds: 600}})
	err := c.supervise(t.Context(), wire.JobLimits{CPUSeconds: 0.2, WallSeconds: 300})
	wantCause(t, err, LimitCPU, wire.Failed, wire.CodeLimit)
}

// TestCPULimitHoldsWithoutTheParent leaves a worker alone, as a parent that
// hangs would.
func TestCPULimitHoldsWithoutTheParent(t *testing.T) {
	s := Spec{Module: endless.file(t), Limits: wire.JobLimits{CPUSeconds: 0.1}}
	c := started(t, s)
	await(t, c.exited)
	_, err := c.reap(nil, s.Limits)
	wantCause(t, err, LimitCPU, wire.Failed, wire.CodeLimit)
}

func TestMemoryBombEndsAtTheMemoryLimit(t *testing.T) {
	const limit = 48 << 20
	idle := mustRun(t, Spec{Module: wasm{memory: 1}.file(t)})
	res, err := run(t, Spec{Module: memoryBomb.file(t), Limits: wire.JobLimits{MemoryBytes: limit}})
	e := wantCause(t, err, LimitMemory, wire.Failed, wire.CodeLimit)
	if !strings.Contains(e.Reason, "48 MiB") {
		t.Errorf("%q does not name the limit", e.Reason)
	}
	// The bomb touches each page of 64 KiB once, which is one of 4 KiB to most kernels; what
	// the engine takes is not the same each time.
	if extra := res.MaxRSS - idle.MaxRSS; extra > limit+32<<20 {
		t.Errorf("%d bytes of memory for a limit of %d", extra, limit)
	}
}

func TestMemoryIsBoundedByItsLimitToThePage(t *testing.T) {
	holds := func(mib int, limit int64) error {
		_, err := run(t, Spec{Module: probeModule, Args: []string{"hold", strconv.Itoa(mib)}, Limits: wire.JobLimits{MemoryBytes: limit}})
		return err
	}
	if err := holds(64, 128<<20); err != nil {
		t.Errorf("64 of 128 MiB: %v", err)
	}
	wantCause(t, holds(128, 128<<20), LimitMemory, wire.Failed, wire.CodeLimit)
	for pages, ok := range map[uint32]bool{16: true, 17: false} {
		_, err := run(t, Spec{Module: wasm{memory: pages}.file(t), Limits: wire.JobLimits{MemoryBytes: 16*pageBytes + 5}})
		if ok && err != nil {
			t.Errorf("%d pages: %v", pages, err)
		} else if !ok {
			wantCause(t, err, LimitMemory, wire.Failed, wire.CodeLimit)
		}
	}
}

func TestGuestThatCopesWithRefusedMemorySucceeds(t *testing.T) {
	coping := wasm{memory: 1, start: cat(constant(60000), []byte{opMemoryGrow, 0, opDrop})}
	mustRun(t, Spec{Module: coping.file(t)})
}

// TestMemoryBesideTheLinearIsBounded has two ways around the linear memory's limit.
func TestMemoryBesideTheLinearIsBounded(t *testing.T) {
	table := wasm{table: true, start: forever(
		[]byte{opRefNull, funcref}, constant(1<<20), []byte{opTable, 0x0f, 0}, orTrap())}
	_, err := run(t, Spec{Module: table.file(t), Limits: wire.JobLimits{MemoryBytes: 1 << 20}})
	var e *Error
	// One time in a hundred it is the collector that is refused memory, and crashes.
	if !errors.As(err, &e) || e.Cause != LimitMemory && !strings.Contains(e.Reason, "SIGSEGV") {
		t.Errorf("endless table: %v", err)
	}

	deep := wasm{start: []byte{opCall, 0}}
	res, err := run(t, Spec{Module: deep.file(t), Limits: wire.JobLimits{MemoryBytes: 1 << 20}})
	if !errors.As(err, &e) || e.Cause != GuestFailed && e.Cause != LimitMemory {
		t.Errorf("endless recursion: %v", err)
	}
	if res.MaxRSS > 2*engineAllowance {
		t.Errorf("endless recursion took %d bytes of memory", res.MaxRSS)
	}
}

func TestOutputBombEndsAtTheOutputLimit(t *testing.T) {
	for fd, limit := range map[int32]string{1: "1 MiB", 2: "standard error"} {
		res, err := run(t, Spec{Module: bomb(fd).file(t), Limits: wire.JobLimits{OutputBytes: 1 << 20}})
		e := wantCause(t, err, LimitOutput, wire.Failed, wire.CodeLimit)
		if !strings.Contains(e.Reason, limit) || len(res.Output) != 0 {
			t.Errorf("descriptor %d: %q, and %d bytes handed on", fd, e.Reason, len(res.Output))
		}
	}
}

// Somebody holds the pipe after the worker's end: whether all of the output came is not known.
func TestOutputThatMayBeHalfIsNone(t *testing.T) {
	defer func(d time.Duration) { pipeDelay = d }(pipeDelay)
	pipeDelay = 10 * time.Millisecond
	r := Runner{Executable: "/bin/sh", prefix: []string{"-c", `setsid sleep 3 & exec "$0" "$@"`, runner.Executable}}
	res, err := r.Run(t.Context(), Spec{Module: wasm{}.file(t)})
	wantCause(t, err, WorkerFailed, wire.Failed, wire.CodeInternal)
	if res.Output != nil || !strings.Contains(err.Error(), "to its end") {
		t.Errorf("%q, %v", res.Output, err)
	}
}

func TestOutputMayFillItsLimitButNotPassIt(t *testing.T) {
	in := bytes.Repeat([]byte("x"), 100_000)
	s := Spec{Module: probeModule, Args: []string{"echo"}, Input: in, Limits: wire.JobLimits{OutputBytes: int64(len(in))}}
	if got := mustRun(t, s).Output; !bytes.Equal(got, in) {
		t.Errorf("%d of %d bytes came back", len(got), len(in))
	}
	s.Limits.OutputBytes--
	_, err := run(t, s)
	wantCause(t, err, LimitOutput, wire.Failed, wire.CodeLimit)
}

func TestBadModulesAreToldApartFromBadJobs(t *testing.T) {
	good := endless.encode()
	huge := filepath.Join(t.TempDir(), "huge.wasm")
	if err := os.WriteFile(huge, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(huge, MaxModule+1); err != nil {
		t.Fatal(err)
	}
	for what, path := range map[string]string{
		"nothing":        write(t, nil),
		"text":           write(t, []byte("#!/bin/sh\necho hello\n")),
		"cut":            write(t, good[:len(good)-1]),
		"wrong type":     wasm{start: constant(1)}.file(t),
		"no _start":      wasm{export: "main"}.file(t),
		"unknown import": wasm{imported: "fd_steal", memory: 1}.file(t),
		"huge":           huge,
		"a folder":       t.TempDir(),
	} {
		t.Run(what, func(t *testing.T) {
			_, err := run(t, Spec{Module: path})
			e := wantCause(t, err, BadModule, wire.Failed, CodeBadModule)
			if what == "no _start" && !strings.Contains(e.Reason, "build it as a WASI command") {
				t.Errorf("the reason is %q", e.Reason)
			}
		})
	}
}

// TestAnyBytesAreAModuleOrAnError feeds the engine's decoder and compiler with
// damaged modules: whatever happens, it is one of the known ends.
func TestAnyBytesAreAModuleOrAnError(t *testing.T) {
	r := seeded(t)
	for range 15 {
		bad := bomb(1).encode()
		for range 1 + r.IntN(4) {
			bad[8+r.IntN(len(bad)-8)] = byte(r.IntN(256))
		}
		_, err := run(t, Spec{Module: write(t, bad), Limits: wire.JobLimits{CPUSeconds: 0.2, OutputBytes: 1 << 16}})
		var e *Error
		if err != nil && (!errors.As(err, &e) || e.Cause == WorkerFailed) {
			t.Errorf("module %x: %v", bad, err)
		}
	}
}

func TestExitCodeAndLastWordsReachTheReason(t *testing.T) {
	res, err := run(t, Spec{Module: probeModule, Args: []string{"exit", "3"}})
	e := wantCause(t, err, GuestFailed, wire.Failed, CodeGuestFailed)
	if e.ExitCode != 3 || res.ExitCode != 3 || e.Reason != `the module exited with code 3: "last words"` {
		t.Errorf("got %d, %d, %q", e.ExitCode, res.ExitCode, e.Reason)
	}
}

func TestTrapIsTheGuestsFailure(t *testing.T) {
	zero := wasm{start: cat(constant(1), constant(0), []byte{opI32DivS, opDrop})}
	_, err := run(t, Spec{Module: zero.file(t)})
	e := wantCause(t, err, GuestFailed, wire.Failed, CodeGuestFailed)
	if e.ExitCode != -1 || !strings.Contains(e.Reason, "divide by zero") {
		t.Errorf("got %d, %q", e.ExitCode, e.Reason)
	}
}

func TestStderrIsKeptAsItsTail(t *testing.T) {
	res := mustRun(t, Spec{Module: probeModule, Args: []string{"stderr"}})
	if !strings.HasSuffix(res.Stderr, "line 998\nline 999\n") || len(res.Stderr) != stderrTail {
		t.Errorf("%d bytes, ending in %q", len(res.Stderr), res.Stderr[max(0, len(res.Stderr)-30):])
	}
}

func TestGuestSeesNothingOfTheDevice(t *testing.T) {
	t.Setenv("DEIMOS_SECRET", "do not tell")
	l := listener(t)
	res := mustRun(t, Spec{Module: probeModule, Args: []string{"look", l.port}})
	if got := strings.ReplaceAll(string(res.Output), "fake listen\n", ""); got != "" {
		t.Errorf("the guest reached out:\n%s", got)
	}
	if l.reached() {
		t.Error("the guest reached a listener of the host")
	}
	if _, err := os.Stat("/tmp/deimos-escape"); err == nil {
		t.Error("the guest wrote a file")
	}
}

func TestSameJobSameBytes(t *testing.T) {
	in := make([]byte, 300_000)
	r := seeded(t)
	for i := range in {
		in[i] = byte(r.IntN(40) + 10)
	}
	for _, s := range []Spec{
		{Module: probeModule, Args: []string{"clock"}},
		{Module: wordcountModule, Input: in},
	} {
		a, b := mustRun(t, s), mustRun(t, s)
		if len(a.Output) == 0 || !bytes.Equal(a.Output, b.Output) {
			t.Errorf("%s %q gave two answers:\n%s\n%s", s.Module, s.Args, a.Output, b.Output)
		}
	}
}

func TestInputArrivesInFullReads(t *testing.T) {
	res := mustRun(t, Spec{Module: probeModule, Args: []string{"reads"}, Input: make([]byte, 3<<20+5)})
	if got := string(res.Output); got != "1048576 1048576 1048576 5 " {
		t.Errorf("reads of %s", got)
	}
}

func TestArgumentsArriveAsGiven(t *testing.T) {
	args := []string{"args", "", "a b", "ü\n", "--", "$HOME"}
	want := fmt.Sprintf("%q", append([]string{"job"}, args...))
	if got := string(mustRun(t, Spec{Module: probeModule, Args: args}).Output); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestImpossibleJobsAreRejected(t *testing.T) {
	for what, s := range map[string]Spec{
		"input":     {Input: make([]byte, MaxInput+1)},
		"NUL":       {Args: []string{"a\x00b"}},
		"arguments": {Args: []string{strings.Repeat("x", wire.MaxMessage+1)}},
	} {
		s.Module = endless.file(t)
		_, err := run(t, s)
		t.Run(what, func(t *testing.T) { wantCause(t, err, BadSpec, wire.Rejected, wire.CodeBadBody) })
	}
}

func TestModuleMustHaveItsDigest(t *testing.T) {
	path := wasm{}.file(t)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	digest := fmt.Sprintf("%x", sha256.Sum256(content))
	mustRun(t, Spec{Module: path, Digest: digest})
	_, err = run(t, Spec{Module: endless.file(t), Digest: digest})
	wantCause(t, err, ModuleMismatch, wire.Failed, wire.CodeMismatch)
}

func TestCancelStopsTheJobWithItsCause(t *testing.T) {
	why := &wire.Problem{State: wire.Canceled, Code: "canceled", Reason: "the operator canceled it"}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	first := make(chan struct{})
	go func() { <-first; cancel(why) }()
	close(first)
	_, err := runner.Run(ctx, Spec{Module: endless.file(t)})
	if wire.ProblemOf(err) != why {
		t.Errorf("got %v, want the cause of the cancel", err)
	}
}

// TestMaxRSSIsTheWorkersOwn keeps to the worker what rusage would mix with the
// parent, whose memory a child shares until it has called exec.
func TestMaxRSSIsTheWorkersOwn(t *testing.T) {
	ballast := make([]byte, 400<<20)
	for i := 0; i < len(ballast); i += 4096 {
		ballast[i] = 1
	}
	res := mustRun(t, Spec{Module: wasm{}.file(t)})
	runtime.KeepAlive(ballast)
	if res.MaxRSS == 0 || res.MaxRSS > 300<<20 {
		t.Errorf("an idle worker took %d bytes", res.MaxRSS)
	}
}

func TestEngineVersionIsThatOfTheModule(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", "github.com/tetratelabs/wazero").Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(out)); got != "v"+EngineVersion {
		t.Errorf("EngineVersion is %s, go.mod has %s", EngineVersion, got)
	}
}

func TestJobsAtTheSameTimeKeepApartAndLeaveNothing(t *testing.T) {
	mustRun(t, Spec{Module: probeModule, Args: []string{"echo"}}) // opens what stays open
	loop := endless.file(t)
	before := openFiles(t)
	errs := make(chan error)
	const jobs = 12
	for i := range jobs {
		go func() {
			in := bytes.Repeat([]byte{byte('a' + i)}, 200_000)
			res, err := runner.Run(t.Context(), Spec{Module: probeModule, Args: []string{"echo"}, Input: in, CacheDir: sharedCache})
			if err == nil && !bytes.Equal(res.Output, in) {
				err = fmt.Errorf("job %d got another's bytes", i)
			}
			if i%3 == 0 {
				_, _ = runner.Run(t.Context(), Spec{Module: loop, Limits: wire.JobLimits{CPUSeconds: 0.05}})
			}
			errs <- err
		}()
	}
	for range jobs {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	// Readers of pipes close them just after the job is done.
	eventually(t, "all descriptors closed again", func() bool { return openFiles(t) <= before })
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child was left: %d, %v", pid, err)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// hungry is a module whose code is small and takes much memory to compile.
func hungry() wasm {
	return wasm{start: bytes.Repeat([]byte{opI32Const, 1, opI32Const, 2, opI32Sub, opI32Const, 3, opI32Sub, opDrop}, 1<<20)}
}

func TestCompilingTakesNoMoreMemoryThanItMay(t *testing.T) {
	_, err := runner.Run(t.Context(), Spec{Module: hungry().file(t), CompileBytes: 1, Limits: wire.JobLimits{CPUSeconds: 100, WallSeconds: 200}})
	if e := wantCause(t, err, LimitMemory, wire.Failed, wire.CodeLimit); !strings.Contains(e.Reason, "256 MiB") {
		t.Errorf("it says %q", e.Reason)
	}
}

func TestAModuleHasItsMemoryHoweverLittleCompilingMayTake(t *testing.T) {
	compiled := false
	res, err := runner.Run(t.Context(), Spec{
		Module: wordcountModule, Input: []byte("a b"), CompileBytes: 1, Limits: wire.JobLimits{MemoryBytes: 512 << 20},
		OnCompiled: func() { compiled = true },
	})
	if err != nil || !compiled {
		t.Errorf("%v, compiled %v (stderr %q)", err, compiled, res.Stderr)
	}
}
