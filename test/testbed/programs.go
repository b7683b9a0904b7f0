// Package testbed is what the tests of the whole share: the programs that users
// start, found in $DEIMOS_BIN (default: bin at the top of this module, as "make build"
// leaves them), a coordinator as a process, the command line as an operator types
// it, and the checks of what devices signed.
//
// Whatever a test does, its processes end with it: [Main] makes the test's process
// the reaper of all that descends from it, and fails if anything does at the end.
package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/internal/testenv"
)

const (
	// Patience is how long an event may take before a test fails: so long that only what
	// does not happen takes it, on a machine that is slow and busy too.
	Patience = 2 * time.Minute
	// StopLimit is how long a process has to end after SIGTERM.
	StopLimit = time.Minute
)

var (
	bin     string // folder with the programs
	scratch string

	// Starter starts every process of the tests.
	Starter *proc.Starter
)

// Main runs the tests of a package, which need these programs, and returns the
// exit code.
func Main(m *testing.M, programs ...string) (code int) {
	err := findPrograms(programs)
	if err == nil {
		scratch, err = os.MkdirTemp("", "deimos-test-")
	}
	// Whatever our processes leave behind becomes our child, and can be counted.
	if err == nil {
		err = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	Starter = proc.NewStarter()
	defer Starter.End()
	code = m.Run()
	if left := leftBehind(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "processes are left: %s\n", strings.Join(left, "; "))
		return 1
	}
	return code
}

// Scratch is a file or folder that the tests of a package share, until their end.
func Scratch(name string) string { return filepath.Join(scratch, name) }

// Program is the path of one of our programs, Guest that of a guest module.
func Program(name string) string { return filepath.Join(bin, name) }
func Guest(name string) string   { return Program("guests/" + name + ".wasm") }

// VersionOf asks one of our programs what it is. The releases that tests offer, in
// tour/, have the versions after the one under test.
func VersionOf(t *testing.T, name string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	r, err := Starter.Run(ctx, proc.Command{Argv: []string{Program(name), "version", "-o", "json"}})
	var v cli.Version
	if err == nil {
		err = json.Unmarshal(r.Stdout, &v)
	}
	if err != nil || r.Code != 0 || v.Version == "" {
		t.Fatalf("%s does not tell its version: %v %s", name, err, r.Said())
	}
	return v.Version
}

func findPrograms(names []string) (err error) {
	if bin = os.Getenv("DEIMOS_BIN"); bin == "" {
		if bin, err = moduleFolder(); err != nil {
			return err
		}
		bin = filepath.Join(bin, "bin")
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	for _, name := range names {
		if _, err := os.Stat(Program(name)); err != nil {
			return fmt.Errorf("%s is missing in %s: run \"make build\", or name the folder in DEIMOS_BIN", name, bin)
		}
	}
	return nil
}

// moduleFolder is the nearest one upwards that has a go.mod.
func moduleFolder() (string, error) {
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("this is not below a go.mod; name the folder of the programs in DEIMOS_BIN")
		}
	}
	return "", err
}

// leftBehind names the processes that descend from this one and still run
// [StopLimit] after everything was stopped, and ends them.
func leftBehind() (left []string) {
	for deadline := time.Now().Add(StopLimit); ; time.Sleep(20 * time.Millisecond) {
		left = left[:0]
		for _, pid := range Descendants(os.Getpid()) {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			left = append(left, fmt.Sprintf("%d %s", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			for _, pid := range Descendants(os.Getpid()) {
				_ = unix.Kill(pid, unix.SIGKILL) // it may have ended meanwhile
			}
			return left
		}
	}
}

// Descendants lists what runs below a process; what has ended and was not
// reaped does not run.
func Descendants(root int) (out []int) {
	children := map[int][]int{}
	entries, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range entries {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		_, rest, _ := strings.Cut(string(raw[bytes.LastIndexByte(raw, ')')+1:]), " ")
		f := strings.Fields(rest) // state, parent, …
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if parent, err := strconv.Atoi(f[1]); err == nil && f[0] != "Z" && f[0] != "X" {
			children[parent] = append(children[parent], pid)
		}
	}
	for next := children[root]; len(next) > 0; next = next[1:] {
		out = append(out, next[0])
		next = append(next, children[next[0]]...)
	}
	return out
}

// Seeded is a random source with the seed of [testenv.Seed].
func Seeded(t *testing.T) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(testenv.Seed(t), 0))
}

// RandomBytes are n bytes of any value.
func RandomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// RandomText is printable, because wc does not take what is not for words.
func RandomText(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = "abcdefghijklmnopqrstuvwxyz.,  \t\n"[rng.IntN(32)]
	}
	return b
}

// ports gives each address away once. They lie below those that the kernel
// takes for outgoing connections, so that a server can come back to its own.
var ports = struct {
	sync.Mutex
	given map[int]bool
}{given: map[int]bool{}}

// FreeAddress is [UnusedAddress] for a test.
func FreeAddress(t *testing.T) string {
	t.Helper()
	addr, err := UnusedAddress()
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

// UnusedAddress is one of this machine's loopback that nobody listens on.
func UnusedAddress() (string, error) {
	ports.Lock()
	defer ports.Unlock()
	for range 1000 {
		port := 20000 + rand.IntN(12000)
		if ports.given[port] {
			continue
		}
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		if ln, err := net.Listen("tcp", addr); err == nil {
			ln.Close()
			ports.given[port] = true
			return addr, nil
		}
	}
	return "", errors.New("there is no free port")
}

// RunToEnd runs a program as a user would, within a bound.
func RunToEnd(ctx context.Context, c proc.Command) (proc.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*Patience)
	defer cancel()
	return Starter.Run(ctx, c)
}
