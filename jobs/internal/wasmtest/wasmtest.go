// Package wasmtest builds what the tests of the rooms above it need: guest
// modules, with the flags that ship, and a worker without the race detector,
// under which compiling a module takes ten times as long.
package wasmtest

import (
	"errors"
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

// Worker builds the smallest executable that a sandbox.Runner can use, for the
// architecture (as Go names it), to out.
func Worker(arch, out string) error {
	_, file, _, _ := runtime.Caller(0)
	return build(filepath.Join(filepath.Dir(file), "worker"), out, "linux", arch)
}

// Build compiles the Go command in the folder src to out.
func Build(src, out string) error { return build(src, out, "wasip1", "wasm") }

// ErrNoClang is of a machine that has no C compiler for WebAssembly.
var ErrNoClang = errors.New("no C compiler for WebAssembly (Debian: apt-get install clang lld wasi-libc libclang-rt-dev-wasm32)")

// BuildC compiles the file of C src to out, with further flags of the compiler. The
// error may be [ErrNoClang].
func BuildC(src, out string, flags ...string) error {
	script := filepath.Join(Guests(), "..", "..", "scripts", "guest-c")
	text, err := exec.Command(script, append([]string{out, src}, flags...)...).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit) && exit.ExitCode() == 3:
		return ErrNoClang
	default:
		return fmt.Errorf("compile %s: %w\n%s", src, err, text)
	}
}

func build(src, out, goos, arch string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w -buildid=", "-o", out, ".")
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH="+arch, "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", src, err, text)
	}
	return nil
}
