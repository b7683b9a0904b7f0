package sandbox

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/jobs/internal/wasmtest"
	"github.com/deimos-edge/deimos/wire"
)

// TestSameBytesOnArm64 runs the worker as an arm64 program under emulation.
func TestSameBytesOnArm64(t *testing.T) {
	if testing.Short() {
		t.Skip("compiling a Go module under emulation takes half a minute; run without -short")
	}
	qemu := testenv.Tool(t, "qemu-aarch64-static", "qemu-user-static")
	worker := filepath.Join(t.TempDir(), "worker")
	if err := wasmtest.Worker("arm64", worker); err != nil {
		t.Fatal(err)
	}
	input, err := os.ReadFile("runner.go")
	if err != nil {
		t.Fatal(err)
	}
	s := Spec{
		Module: wordcountModule, Input: input, CacheDir: sharedCache,
		Limits: wire.JobLimits{CPUSeconds: 600, WallSeconds: 1800},
	}
	here := mustRun(t, s)
	there, err := (&Runner{Executable: qemu, prefix: []string{worker}}).Run(t.Context(), s)
	if err != nil {
		t.Fatalf("%v (stderr %q)", err, there.Stderr)
	}
	if !strings.HasSuffix(there.Engine, " compiler arm64") {
		t.Errorf("that was no arm64: %s", there.Engine)
	}
	if !bytes.Equal(here.Output, there.Output) {
		t.Errorf("%s: %s\n%s: %s", here.Engine, here.Output, there.Engine, there.Output)
	}
	t.Logf("%s: %v of CPU; %s: %v", here.Engine, here.CPU, there.Engine, there.CPU)
}
