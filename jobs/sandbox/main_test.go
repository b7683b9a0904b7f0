package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/deimos-edge/deimos/jobs/internal/wasmtest"
)

// Paths of modules built once for all tests.
var (
	wordcountModule string
	sha256Module    string
	probeModule     string
	hostedModule    string // imports the host interface
)

func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		beMachine()
	}
	if len(os.Args) > 1 && os.Args[1] == WorkerArg {
		os.Exit(WorkerMain())
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case orphanArg:
			orphanParent()
		case attackArg:
			os.Exit(attackingWorker())
		case aloneArg:
			os.Exit(behindLandlock())
		case leftArg:
			os.Exit(leaveCgroup())
		case vacateArg:
			os.Exit(vacated())
		case servedArg:
			// Capabilities are a thread's; main's is where the test begins.
			runtime.LockOSThread()
			os.Exit(served())
		}
	}
	if os.Getenv(inMachine) != "" { // which has no Go to build guests with
		runner.Executable = "/proc/self/exe"
		os.Exit(m.Run())
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "sandbox")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	for _, g := range []struct {
		path *string
		src  string
	}{
		{&wordcountModule, filepath.Join(wasmtest.Guests(), "wordcount")},
		{&sha256Module, filepath.Join(wasmtest.Guests(), "sha256sum")},
		{&probeModule, filepath.Join("testdata", "probe")},
		{&hostedModule, filepath.Join("testdata", "hosted")},
	} {
		*g.path = filepath.Join(dir, filepath.Base(g.src)+".wasm")
		if err := wasmtest.Build(g.src, *g.path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	sharedCache = filepath.Join(dir, "cache")
	runner.Executable = filepath.Join(dir, "worker")
	if err := wasmtest.Worker(runtime.GOARCH, runner.Executable); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// sharedCache keeps compiled code between tests that are not about it.
var sharedCache string

// runner's worker is built without the race detector, whose memory would count.
var runner Runner
