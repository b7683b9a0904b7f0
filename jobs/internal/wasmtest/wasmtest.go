// Package wasmtest builds WebAssembly modules from Go source for the tests of
// the rooms above it, with the flags that ship.
package wasmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// Guests is the folder of the guests that ship.
func Guests() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..", "guests")
}

// Build compiles the Go command in the folder src to out.
func Build(src, out string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w -buildid=", "-o", out, ".")
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the guest %s: %w\n%s", src, err, text)
	}
	return nil
}
