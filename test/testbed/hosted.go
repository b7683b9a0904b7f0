package testbed

import (
	"os"
	"os/exec"
	"path/filepath"
)

// HostedGuest builds the guest that uses all that there is for guests.
func (f *Fleet) HostedGuest() (module string) {
	f.T.Helper()
	root, err := moduleFolder()
	if err != nil {
		f.T.Fatal(err)
	}
	module = f.Path("hosted.wasm")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", module, ".")
	build.Dir = filepath.Join(root, "jobs", "sandbox", "testdata", "hosted")
	build.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm", "GOFLAGS=-buildvcs=false")
	if out, err := build.CombinedOutput(); err != nil {
		f.T.Fatalf("%v\n%s", err, out)
	}
	return module
}

// HostedLong is what it comes to in so many steps of its "long" task.
func HostedLong(steps int) uint64 {
	x := uint64(1)
	for range steps * 1_000_000 {
		x = x*6364136223846793005 + 1442695040888963407 // Knuth's, as in MMIX
	}
	return x
}
