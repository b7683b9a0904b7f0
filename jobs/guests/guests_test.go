//go:build linux

// Package guests tests the guest modules that ship: each is built as it ships,
// run as a device runs it, and held to a native tool.
package guests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/jobs/internal/wasmtest"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

var (
	built  string         // folder of the modules
	runner sandbox.Runner // with a worker that is no test binary
)

// goGuests are those that ship and are written in Go.
var goGuests = []string{"wordcount", "sha256sum", "textstats", "tabulate", "thumbnail"}

// cGuests are those in C; noClang is why there are none of them here.
var (
	cGuests = []string{"kmeans"}
	noClang error
)

// needsClang ends a test of a guest in C where none can be made.
func needsClang(t testing.TB) {
	t.Helper()
	if noClang != nil {
		testenv.Cannot(t, "%v", noClang)
	}
}

func TestMain(m *testing.M) {
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	var err error
	if built, err = os.MkdirTemp("", "guests"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(built)
	for _, g := range goGuests {
		if err := wasmtest.Build(filepath.Join(wasmtest.Guests(), g), filepath.Join(built, g+".wasm")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	for _, g := range cGuests {
		switch err := wasmtest.BuildC(filepath.Join(wasmtest.Guests(), g, "main.c"), filepath.Join(built, g+".wasm")); {
		case errors.Is(err, wasmtest.ErrNoClang):
			noClang = err
		case err != nil:
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	runner.Executable = filepath.Join(built, "worker")
	if err := wasmtest.Worker(runtime.GOARCH, runner.Executable); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// job is a guest's order with limits for the slowest machine.
func job(guest string, in []byte, args ...string) sandbox.Spec {
	return sandbox.Spec{
		Module: filepath.Join(built, guest+".wasm"), Args: args, Input: in, CacheDir: filepath.Join(built, "cache"),
		Limits: wire.JobLimits{CPUSeconds: 300, WallSeconds: 300, MemoryBytes: 256 << 20},
	}
}

func run(t testing.TB, guest string, in []byte, args ...string) []byte {
	t.Helper()
	res, err := runner.Run(t.Context(), job(guest, in, args...))
	if err != nil {
		t.Fatalf("%s %q: %v (stderr %q)", guest, args, err, res.Stderr)
	}
	return res.Output
}

// refuses holds a guest to an exit code and a sentence that says why, for an order
// that it cannot do.
func refuses(t *testing.T, says string, guest string, in []byte, args ...string) {
	t.Helper()
	res, err := runner.Run(t.Context(), job(guest, in, args...))
	var e *sandbox.Error
	if !errors.As(err, &e) || e.Cause != sandbox.GuestFailed || res.ExitCode != 1 {
		t.Errorf("%s %q over %.40q: %v, exit code %d (output %.200q)", guest, args, in, err, res.ExitCode, res.Output)
		return
	}
	if line := strings.TrimSuffix(res.Stderr, "\n"); !strings.HasPrefix(line, guest+": ") || !strings.Contains(line, says) || strings.Contains(line, "\n") {
		t.Errorf("%s %q over %.40q says %q, not one line with %q", guest, args, in, line, says)
	}
}

// native runs a tool of this machine over the same input, in the C locale.
func native(t *testing.T, in []byte, tool string, args ...string) []string {
	t.Helper()
	cmd := exec.Command(testenv.Tool(t, tool, "coreutils gawk"), args...)
	cmd.Env = []string{"LC_ALL=C"}
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))
}

// pipe is native for a line of the shell.
func pipe(t *testing.T, in []byte, script string) string {
	t.Helper()
	cmd := exec.Command(testenv.Tool(t, "sh", "dash"), "-c", script)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// printable makes an x of each byte that is not. In the C locale GNU wc takes no
// notice of those; with it, its words are ours.
func printable(in []byte) []byte {
	out := slices.Clone(in)
	for i, b := range out {
		if b < ' ' && !(b >= '\t' && b <= '\r') || b > '~' {
			out[i] = 'x'
		}
	}
	return out
}

// inputs are real and awkward ones, none above the size of a chunk.
func inputs(t *testing.T) map[string][]byte {
	t.Helper()
	r := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	noise := make([]byte, 100_000+r.IntN(1000))
	for i := range noise {
		noise[i] = byte(r.IntN(256))
	}
	source, err := os.ReadFile("guests_test.go") // real text, this very file
	if err != nil {
		t.Fatal(err)
	}
	executable, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"empty":       nil,
		"no newline":  []byte("one"),
		"only spaces": []byte(" \t\n\v\f\r\n"),
		"umlauts":     []byte("Tür für Tür\n"),
		"text":        source,
		"executable":  executable[:1<<20],
		"noise":       noise,
	}
}

func TestSha256sumAgreesWithTheNativeTool(t *testing.T) {
	for what, in := range inputs(t) {
		want := native(t, in, "sha256sum")[0] + "\n"
		if got := string(run(t, "sha256sum", in)); got != want {
			t.Errorf("%s: got %q, want %q", what, got, want)
		}
	}
}

type count struct {
	Bytes, Lines, Words int
	Top                 []struct {
		Word  string
		Count int
	}
}

func wordcount(t testing.TB, in []byte) (c count) {
	t.Helper()
	if err := json.Unmarshal(run(t, "wordcount", in), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestWordcountAgreesWithTheNativeTool(t *testing.T) {
	for what, in := range inputs(t) {
		c := wordcount(t, in)
		wc := native(t, in, "wc", "-lwc") // prints lines, words, bytes
		if got := []string{strconv.Itoa(c.Lines), strconv.Itoa(c.Bytes)}; got[0] != wc[0] || got[1] != wc[2] {
			t.Errorf("%s: %s lines, %s bytes; wc says %s, %s", what, got[0], got[1], wc[0], wc[2])
		}
		if want := native(t, printable(in), "wc", "-w")[0]; strconv.Itoa(c.Words) != want {
			t.Errorf("%s: %d words; wc says %s", what, c.Words, want)
		}
	}
}

func TestWordcountListsTheMostFrequentInAFixedOrder(t *testing.T) {
	in := []byte("b a b ü a c \xff\xff \xff\xff \xff\xff d e f g h i j k " + strings.Repeat("x", 65))
	c := wordcount(t, in)
	var got []string
	for _, w := range c.Top {
		got = append(got, fmt.Sprint(w.Word, w.Count))
	}
	if want := []string{"a2", "b2", "c1", "d1", "e1", "f1", "g1", "h1", "i1", "j1"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if c.Words != 18 {
		t.Errorf("%d words", c.Words)
	}
}

func TestWordcountCopesWithTheWorstChunk(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds; run without -short")
	}
	// 4 MiB of words as short and as different as possible.
	var in []byte
	for i := 0; len(in) < sandbox.MaxInput-8; i++ {
		in = append(strconv.AppendInt(in, int64(i), 36), ' ')
	}
	if c := wordcount(t, in); c.Bytes != len(in) || c.Words < 700_000 {
		t.Errorf("%d bytes, %d words", c.Bytes, c.Words)
	}
}

// BenchmarkJob is a job from its start to its result: cold compiles the
// module, warm finds its machine code on disk. It reports medians, of CPU time
// too, which a busy machine changes less.
func BenchmarkJob(b *testing.B) {
	in := bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog\n"), 1<<20/44)
	for _, guest := range []string{"wordcount", "sha256sum"} {
		for _, size := range []int{0, len(in)} {
			for _, mode := range []string{"cold", "warm"} {
				b.Run(fmt.Sprintf("%s/%dKiB/%s", guest, size>>10, mode), func(b *testing.B) {
					spec := sandbox.Spec{Module: filepath.Join(built, guest+".wasm"), Input: in[:size], CacheDir: b.TempDir()}
					if mode == "cold" {
						spec.CacheDir = ""
					} else if _, err := runner.Run(b.Context(), spec); err != nil {
						b.Fatal(err)
					}
					var walls, cpus []time.Duration
					for b.Loop() {
						res, err := runner.Run(b.Context(), spec)
						if err != nil {
							b.Fatalf("%v: %+v", err, res)
						}
						walls, cpus = append(walls, res.Wall), append(cpus, res.CPU)
					}
					for unit, all := range map[string][]time.Duration{"p50-ms": walls, "p50-cpu-ms": cpus} {
						slices.Sort(all)
						b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, unit)
					}
				})
			}
		}
	}
}
