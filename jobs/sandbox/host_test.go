package sandbox

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// granting makes an input of a file with this content.
func granting(t testing.TB, name string, content []byte) Input {
	t.Helper()
	path := filepath.Join(t.TempDir(), "input")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return Input{Name: name, Size: int64(len(content)), File: f}
}

// hosted is a job of the guest that uses the host interface.
func hosted(args ...string) Spec { return Spec{Module: hostedModule, Args: args} }

func TestNamedInputsAndOutputsAreFiles(t *testing.T) {
	r := seeded(t)
	a, b := make([]byte, 3<<20+7), []byte("short")
	for i := range a {
		a[i] = byte(r.IntN(256))
	}
	var outA, outB, never bytes.Buffer
	s := hosted("copy", "a", "b.txt")
	s.Inputs = []Input{granting(t, "b.txt", b), granting(t, "a", a)} // listed by name all the same
	s.Outputs = []Output{{"a", &outA}, {"b.txt", &outB}, {"never", &never}}
	res := mustRun(t, s)
	if !bytes.Equal(outA.Bytes(), a) || !bytes.Equal(outB.Bytes(), b) || never.Len() > 0 {
		t.Errorf("%d, %d and %d bytes came out of %d and %d", outA.Len(), outB.Len(), never.Len(), len(a), len(b))
	}
	// Go knows of no permissions in WASI; that writing is refused is another test.
	want := fmt.Sprintf("a %d %d -rw------- 0\nb.txt 5 5 -rw------- 0\n/in a false\n/in b.txt false\n/out a false\n/out b.txt false\n", len(a), len(a))
	if got := string(res.Output); got != want {
		t.Errorf("the guest saw\n%swant\n%s", got, want)
	}
}

// inFolder makes an input that is a folder of files of these contents.
func inFolder(t testing.TB, name string, files map[string]string) Input {
	t.Helper()
	in := Input{Name: name}
	for _, path := range slices.Sorted(maps.Keys(files)) {
		in.Files = append(in.Files, granting(t, path, []byte(files[path])))
	}
	return in
}

func TestAFolderAndStandardInputAreInputs(t *testing.T) {
	long := strings.Repeat("0123456789", 1<<19) // more than what can be sent as Input
	s := hosted("walk")
	s.Inputs = []Input{
		granting(t, "a", []byte("single")), granting(t, wire.Stdin, []byte(long)), inFolder(t, "empty", nil),
		inFolder(t, "d", map[string]string{"x": "1", "sub/deep/y z.jpg": "2", "sub/ä\n": "3", "..x": "4"}),
	}
	res := mustRun(t, s)
	want := fmt.Sprintf("stdin %d \"01234567890123456789\"\n", len(long)) +
		"./\na \"single\"\nd/\nd/..x \"4\"\nd/sub/\nd/sub/deep/\nd/sub/deep/y z.jpg \"2\"\nd/sub/ä\n \"3\"\nd/x \"1\"\nempty/\n"
	if got := string(res.Output); got != want {
		t.Errorf("the guest saw\n%s\nwant\n%s", got, want)
	}
}

func TestAFolderOfInputsCannotBeChangedNorLeft(t *testing.T) {
	s := hosted("spoil")
	files := map[string]string{"x": "1", "sub/y": "2"}
	s.Inputs = []Input{granting(t, "a", []byte("a")), inFolder(t, "d", files)}
	if got := mustRun(t, s).Output; len(got) > 0 {
		t.Errorf("%s", got)
	}
	for _, f := range s.Inputs[1].Files {
		if got := string(content(t, f)); got != files[f.Name] {
			t.Errorf("%s is now %q", f.Name, got)
		}
	}
}

func TestAFolderHasNoMoreThanFits(t *testing.T) {
	one := granting(t, "x", []byte("1"))
	many := func(n int, name func(i int) string) (files []Input) {
		for i := range n {
			files = append(files, Input{Name: name(i), Size: 1, File: one.File})
		}
		return files
	}
	number := func(i int) string { return fmt.Sprintf("%d/%d", i%7, i) }
	s := hosted("spoil")
	s.Inputs = []Input{{Name: "d", Files: many(MaxFiles-1, number)}}
	if got := string(mustRun(t, s).Output); got != "" {
		t.Errorf("%s", got)
	}
	for what, in := range map[string]Input{
		"a file too many":               {Name: "d", Files: many(MaxFiles, number)},
		"paths too long together":       {Name: "d", Files: many(600, func(i int) string { return fmt.Sprintf("%d%s", i, strings.Repeat("/"+strings.Repeat("x", 98), 10)) })},
		"a path too long":               {Name: "d", Files: many(1, func(int) string { return strings.Repeat("x", maxPath+1) })},
		"a path that leads up":          {Name: "d", Files: many(1, func(int) string { return "../x" })},
		"a path from the top":           {Name: "d", Files: many(1, func(int) string { return "/x" })},
		"itself":                        {Name: "d", Files: many(1, func(int) string { return "." })},
		"a path of other bytes":         {Name: "d", Files: many(1, func(int) string { return "\xff" })},
		"a path twice":                  {Name: "d", Files: many(2, func(int) string { return "x" })},
		"a file that is a folder":       {Name: "d", Files: many(2, func(i int) string { return []string{"x", "x/y/z"}[i] })},
		"a file that is both":           {Name: "d", File: one.File, Files: many(1, number)},
		"a folder for standard input":   {Name: wire.Stdin},
		"a folder without a descriptor": {Name: "d", Files: []Input{{Name: "x"}}},
	} {
		s.Inputs = []Input{in}
		_, err := run(t, s)
		var e *Error
		if !errors.As(err, &e) || e.Cause != BadSpec {
			t.Errorf("%s: %v", what, err)
		}
	}
	s.Inputs = []Input{granting(t, wire.Stdin, []byte("1"))}
	s.Input = []byte("2")
	if _, err := run(t, s); err == nil || !strings.Contains(err.Error(), "two inputs") {
		t.Errorf("two standard inputs: %v", err)
	}
}

func TestInputsAreReadByNameWithoutAFile(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 7)
	s := hosted("read")
	s.Inputs = []Input{granting(t, "a", content)}
	s.Input = []byte("of another")
	want := "70 70 -1 -1 -1 -1 -1\n4 0 0 -1 -1\n" + string(content)
	if got := string(mustRun(t, s).Output); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNothingLeadsOutOfTheFolders(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s := hosted("escape")
	s.Inputs = []Input{granting(t, "a", []byte("hello"))}
	s.Outputs = []Output{{"o", &out}}
	if got := mustRun(t, s).Output; len(got) > 0 {
		t.Errorf("%s", got)
	}
	if out.String() != "abc" {
		t.Errorf("the output is %q", &out)
	}
	if got := string(content(t, s.Inputs[0])); got != "hello" {
		t.Errorf("the input is now %q", got)
	}
}

func content(t *testing.T, in Input) []byte {
	t.Helper()
	b, err := os.ReadFile(in.File.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestHostFunctionsTrapOutsideOfTheMemory(t *testing.T) {
	for _, f := range []string{"checkpoint", "restore", "input_size", "input_read", "input_read_name", "sha256", "sha256_out", "log"} {
		for _, place := range [][2]string{{"0xfffffff0", "64"}, {"0", "0xffffffff"}, {"0x3fffffff", "0x3fffffff"}, {"0xffffffff", "0xffffffff"}} {
			if f == "sha256_out" && place[0] == "0" {
				continue // 32 bytes at 0 are there
			}
			s := hosted("fault", f, place[0], place[1])
			s.Inputs = []Input{granting(t, "a", []byte("hello"))}
			s.OnCheckpoint = func(int64, io.Reader) error { t.Error("a checkpoint of nothing"); return nil }
			_, err := run(t, s)
			var e *Error
			if !errors.As(err, &e) || e.Cause != GuestFailed || e.ExitCode != -1 || !strings.Contains(e.Reason, "memory that the module does not have") {
				t.Errorf("%s of %s bytes at %s: %v", f, place[1], place[0], err)
			}
		}
	}
	// The same ranges with nothing in them are none.
	mustRun(t, hosted("fault", "sha256", "0xfffffff0", "0"))
}

func TestModuleWithoutMemoryTraps(t *testing.T) {
	m := wasm{host: "checkpoint", start: cat(constant(0), constant(1), []byte{opCall, 0, opDrop})}
	_, err := run(t, Spec{Module: m.file(t)})
	wantCause(t, err, GuestFailed, wire.Failed, CodeGuestFailed)
	m.host = "steal"
	_, err = run(t, Spec{Module: m.file(t)})
	wantCause(t, err, BadModule, wire.Failed, CodeBadModule)
}

// TestThreadsCannotBeMade has the two ways in which guests make threads: the
// wasi-threads proposal, and memory that is shared.
func TestThreadsCannotBeMade(t *testing.T) {
	spawn := wasm{from: "wasi", host: "thread-spawn", memory: 1, start: cat(constant(0), constant(0), []byte{opCall, 0, opDrop})}
	_, err := run(t, Spec{Module: spawn.file(t)})
	if e := wantCause(t, err, BadModule, wire.Failed, CodeBadModule); !strings.Contains(e.Reason, "module[wasi]") {
		t.Errorf("the reason is %q", e.Reason)
	}
	shared := bytes.Replace(wasm{memory: 1}.encode(), []byte{5, 3, 1, 0, 1}, []byte{5, 4, 1, 3, 1, 1}, 1) // shared, 1 to 1 pages
	_, err = run(t, Spec{Module: write(t, shared)})
	if e := wantCause(t, err, BadModule, wire.Failed, CodeBadModule); !strings.Contains(e.Reason, "shared memory") {
		t.Errorf("the reason is %q", e.Reason)
	}
}

// TestAJobSeesNothingOfItsNeighbours has the files of others open in the parent and in
// a worker at the same time.
func TestAJobSeesNothingOfItsNeighbours(t *testing.T) {
	other := hosted("asked")
	other.Inputs = []Input{granting(t, "secret", []byte("of another job"))}
	var out bytes.Buffer
	other.Outputs = []Output{{"o", &out}}
	other.Control, other.OnCheckpoint = NewControl(), newShelf(t).keep
	runs := make(chan struct{}, 1)
	other.OnProgress = func(float64) { runs <- struct{}{} }
	done := make(chan error, 1)
	go func() { _, err := runner.Run(t.Context(), other); done <- err }()
	<-runs
	for _, s := range []Spec{hosted("neighbours"), hosted("neighbours")} {
		s.Inputs, s.Outputs = []Input{granting(t, "a", nil)}, []Output{{"o", io.Discard}}
		if got := mustRun(t, s).Output; len(got) > 0 {
			t.Errorf("%s", got)
		}
	}
	other.Control.AskCheckpoint()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if out.Len() > 0 {
		t.Errorf("others wrote %q to its output", &out)
	}
}

func TestHashIsThatOfTheStandard(t *testing.T) {
	want := fmt.Sprintf("%x\n", sha256.Sum256(bytes.Repeat([]byte("deimos"), 100_000)))
	if got := string(mustRun(t, hosted("sha256")).Output); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestProgressGrowsAndMessagesArrive(t *testing.T) {
	var shares []float64
	var lines []string
	s := hosted("tell")
	s.OnProgress = func(share float64) { shares = append(shares, share) }
	s.OnLog = func(level int, text string) { lines = append(lines, fmt.Sprintf("%d %q", level, text)) }
	mustRun(t, s)
	if want := []float64{0.001, 0.5, 0.501, 1}; !slices.Equal(shares, want) {
		t.Errorf("progress %v, want %v", shares, want)
	}
	if want := []string{`0 "quiet"`, `3 "loud ` + "\uFFFD" + `\n"`, `0 "strange"`}; !slices.Equal(lines, want) {
		t.Errorf("messages %q, want %q", lines, want)
	}
}

func TestFloodsOfMessagesAreCut(t *testing.T) {
	var steps, lines, total int
	var last string
	s := hosted("flood")
	s.OnProgress = func(float64) { steps++ }
	s.OnLog = func(_ int, text string) { lines++; total += len(text); last = text }
	mustRun(t, s)
	if steps > 1000 || total > maxLogs || lines < 100 || last != maxLogText {
		t.Errorf("%d steps; %d messages of %d bytes, the last %q", steps, lines, total, last)
	}
}

// shelf keeps checkpoints as a device does.
type shelf struct {
	mu   sync.Mutex
	path string
	n    int
}

func newShelf(t *testing.T) *shelf { return &shelf{path: filepath.Join(t.TempDir(), "checkpoint")} }

func (s *shelf) keep(size int64, r io.Reader) error {
	var b bytes.Buffer
	if _, err := io.CopyN(&b, r, size); err != nil {
		return err
	}
	if err := os.WriteFile(s.path, b.Bytes(), 0o600); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	return nil
}

// give lets a job go on from what is on the shelf.
func (s *shelf) give(t *testing.T, to *Spec) {
	t.Helper()
	f, err := os.Open(s.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	to.Checkpoint, to.CheckpointBytes = f, st.Size()
}

func TestJobGoesOnFromItsCheckpoint(t *testing.T) {
	shelf := newShelf(t)
	s := hosted("count", "100", "60") // hangs at 60
	stopped := &wire.Problem{State: wire.Canceled, Code: "canceled", Reason: "its last checkpoint is kept"}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	s.OnCheckpoint = func(size int64, r io.Reader) error {
		err := shelf.keep(size, r)
		if shelf.n == 61 {
			cancel(stopped)
		}
		return err
	}
	if _, err := runner.Run(ctx, s); wire.ProblemOf(err) != stopped {
		t.Fatal(err)
	}
	s = hosted("count", "100")
	s.OnCheckpoint = shelf.keep
	shelf.give(t, &s)
	res := mustRun(t, s)
	if res.Stderr != "went on at 60\n" || string(res.Output) != "100\n" {
		t.Errorf("%q, %q", res.Stderr, res.Output)
	}
	if shelf.n != 61+40 {
		t.Errorf("%d checkpoints were kept", shelf.n)
	}
}

func TestCheckpointThatCannotBeKeptIsAnErrorToALiveJob(t *testing.T) {
	s := hosted("count", "3")
	s.Live = true
	s.OnCheckpoint = func(int64, io.Reader) error { return errors.New("the disk is full") }
	res, err := run(t, s)
	wantCause(t, err, GuestFailed, wire.Failed, CodeGuestFailed)
	if res.Stderr != "errno 29\n" {
		t.Errorf("the guest was told %q", res.Stderr)
	}
}

// Else who runs a job to see whether a device did it well, and keeps no checkpoints, gets
// another output.
func TestAModuleDoesNotSeeThatNobodyKeepsItsCheckpoints(t *testing.T) {
	kept := hosted("count", "3")
	kept.OnCheckpoint = newShelf(t).keep
	full := hosted("count", "3")
	full.OnCheckpoint = func(int64, io.Reader) error { return errors.New("the disk is full") }
	want := mustRun(t, kept)
	for what, s := range map[string]Spec{"nobody keeps them": hosted("count", "3"), "the disk is full": full} {
		if got := mustRun(t, s); string(got.Output) != string(want.Output) || got.Stderr != want.Stderr {
			t.Errorf("%q and %q where %s, %q and %q where somebody keeps them", got.Output, got.Stderr, what, want.Output, want.Stderr)
		}
	}
}

// Who went on from a checkpoint or was asked for one may have seen that, if its module looks.
func TestItIsKnownWhetherAModuleMayHaveSeenThatItWasStopped(t *testing.T) {
	resumed, asked, plain := hosted("count", "1"), hosted("asked"), hosted("count", "1")
	f := newShelf(t)
	plain.OnCheckpoint = f.keep
	if r := mustRun(t, plain); r.Disturbed || !r.Looks {
		t.Errorf("one that nobody stopped: disturbed %v, looks %v", r.Disturbed, r.Looks)
	}
	f.give(t, &resumed)
	asked.Control = NewControl()
	asked.OnProgress = func(float64) { asked.Control.AskCheckpoint() }
	for what, s := range map[string]Spec{"resumed": resumed, "asked": asked} {
		if r := mustRun(t, s); !r.Disturbed || !r.Looks {
			t.Errorf("%s: disturbed %v, looks %v", what, r.Disturbed, r.Looks)
		}
	}
	blind := Spec{Module: wordcountModule, Control: NewControl()}
	blind.Control.AskCheckpoint()
	if r := mustRun(t, blind); !r.Disturbed || r.Looks {
		t.Errorf("one without the means: disturbed %v, looks %v", r.Disturbed, r.Looks)
	}
}

func TestCheckpointsAreBounded(t *testing.T) {
	shelf := newShelf(t)
	for size, want := range map[int]string{MaxCheckpoint: "0\n", MaxCheckpoint + 1: "22\n", 0: "0\n"} {
		s := hosted("bombs", strconv.Itoa(size))
		s.Limits.MemoryBytes = 256 << 20
		s.OnCheckpoint = shelf.keep
		if got := string(mustRun(t, s).Output); got != want {
			t.Errorf("%d bytes: %s", size, got)
		}
	}
	if shelf.n != 2 {
		t.Errorf("%d were kept", shelf.n)
	}
}

func TestCheckpointBombsAreSlowedDown(t *testing.T) {
	const size, free = 8 << 20, checkpointBurst/(8<<20) - 1 // so many come without waiting
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	kept := 0
	s := hosted("many", "1000000", strconv.Itoa(size))
	s.CacheDir = sharedCache
	s.Limits.WallSeconds, s.Limits.CPUSeconds = 600, 600
	began := time.Now()
	s.OnCheckpoint = func(size int64, r io.Reader) error {
		if kept++; kept == free {
			began = time.Now()
			time.AfterFunc(2*time.Second, cancel)
		}
		_, err := io.CopyN(io.Discard, r, size)
		return err
	}
	if _, err := runner.Run(ctx, s); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	took := time.Since(began)
	if most := free + 2 + int(took.Seconds()*checkpointRate/size); kept > most {
		t.Errorf("%d checkpoints of 8 MiB, the last %d in %v: at most %d are meant", kept, kept-free, took, most)
	}
}

// TestAWorkerThatPromisesTooMuchIsNotBelieved speaks to the parent as a worker that
// a module has taken over.
func TestAWorkerThatPromisesTooMuchIsNotBelieved(t *testing.T) {
	for what, said := range map[string]string{"too much": "\xff\xff\xff\xff", "cut": "\x00\x00\x00\x10abc", "nothing": ""} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		answer, answers, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		shelf := newShelf(t)
		c := &child{kept: make(chan struct{}), exited: make(chan struct{}), control: NewControl()}
		go c.keepCheckpoints(r, answers, Spec{OnCheckpoint: shelf.keep})
		if _, err := io.WriteString(w, said); err != nil {
			t.Fatal(err)
		}
		w.Close()
		await(t, c.kept)
		if shelf.n != 0 {
			t.Errorf("%s: %d were kept", what, shelf.n)
		}
		answer.Close()
	}
}

func TestJobSavesItselfWhenItIsAsked(t *testing.T) {
	shelf := newShelf(t)
	s := hosted("asked")
	s.OnCheckpoint = shelf.keep
	s.Control = NewControl()
	s.OnProgress = func(float64) { s.Control.AskCheckpoint() }
	if got := string(mustRun(t, s).Output); got != "0\n" {
		t.Errorf("got %q", got)
	}
}

func TestEnvironmentIsWhatWasGiven(t *testing.T) {
	t.Setenv("DEIMOS_SECRET", "do not tell")
	s := hosted("env")
	s.Env = map[string]string{"B": "2 =", "A": "", "C": "ü\n"}
	if got, want := string(mustRun(t, s).Output), `["A=" "B=2 =" "C=ü\n"]`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestOnlyALiveJobKnowsTheTime(t *testing.T) {
	before := time.Now().Unix()
	live := hosted("live")
	live.Live = true
	out := strings.Fields(string(mustRun(t, live).Output))
	if now, _ := strconv.ParseInt(out[0], 10, 64); now < before || now > time.Now().Unix() || out[1] != "true" {
		t.Errorf("a live job reads %q", out)
	}
	random := Spec{Module: probeModule, Args: []string{"clock"}}
	a := mustRun(t, random).Output
	if b := mustRun(t, random).Output; !bytes.Equal(a, b) {
		t.Errorf("two readings of the fake: %s, %s", a, b)
	}
	var dead, alive [2]string
	for i := range dead {
		dead[i] = string(mustRun(t, Spec{Module: probeModule, Args: []string{"random"}}).Output)
		alive[i] = string(mustRun(t, Spec{Module: probeModule, Args: []string{"random"}, Live: true}).Output)
	}
	if dead[0] != dead[1] || alive[0] == alive[1] || dead[0] == alive[0] {
		t.Errorf("random numbers: not live %q, live %q", dead, alive)
	}
}

func TestAllOutputsTogetherAreBounded(t *testing.T) {
	var out bytes.Buffer
	s := hosted("pour", "100000")
	s.Outputs = []Output{{"a", &out}}
	s.Limits.OutputBytes = 100_000
	mustRun(t, s)
	if out.Len() != 100_000 {
		t.Errorf("%d bytes", out.Len())
	}
	s.Limits.OutputBytes--
	_, err := run(t, s)
	wantCause(t, err, LimitOutput, wire.Failed, wire.CodeLimit)

	// An output and standard output are one bound.
	in := granting(t, "a", make([]byte, 1000))
	two := hosted("copy", "a")
	two.Inputs, two.Outputs = []Input{in}, []Output{{"a", io.Discard}}
	two.Limits.OutputBytes = 1010
	_, err = run(t, two)
	wantCause(t, err, LimitOutput, wire.Failed, wire.CodeLimit)
}

// TestOutputWithoutAnEndIsCut has a guest that does not look at what comes of it.
func TestOutputWithoutAnEndIsCut(t *testing.T) {
	s := hosted("pour", "1000000000000")
	s.Outputs = []Output{{"a", io.Discard}}
	s.Limits.OutputBytes = 1 << 20
	_, err := run(t, s)
	e := wantCause(t, err, LimitOutput, wire.Failed, wire.CodeLimit)
	if !strings.Contains(e.Reason, "1 MiB") {
		t.Errorf("the reason is %q", e.Reason)
	}
}

type full struct{}

var errFull = errors.New("the disk is full")

func (full) Write([]byte) (int, error) { return 0, errFull }

func TestOutputThatCannotBeKeptIsTheReason(t *testing.T) {
	for _, size := range []string{"10", "1000000000000"} {
		s := hosted("pour", size)
		s.Outputs = []Output{{"a", full{}}}
		s.Limits.OutputBytes = 1 << 40
		if _, err := run(t, s); !errors.Is(err, errFull) || !strings.Contains(err.Error(), `output "a"`) {
			t.Errorf("%s bytes: %v", size, err)
		}
	}
}

func TestImpossibleNamesAreRejected(t *testing.T) {
	in := granting(t, "a", nil)
	named := func(name string) Input { in := in; in.Name = name; return in }
	for what, s := range map[string]Spec{
		"slash":      {Inputs: []Input{named("a/b")}},
		"up":         {Inputs: []Input{named("..")}},
		"dot":        {Outputs: []Output{{".", io.Discard}}},
		"empty":      {Outputs: []Output{{"", io.Discard}}},
		"long":       {Inputs: []Input{named(strings.Repeat("x", 65))}},
		"NUL":        {Inputs: []Input{named("a\x00")}},
		"twice":      {Inputs: []Input{in, in}},
		"out twice":  {Outputs: []Output{{"a", io.Discard}, {"a", io.Discard}}},
		"too many":   {Inputs: slices.Repeat([]Input{in}, MaxInputs+1)},
		"out many":   {Outputs: make([]Output, MaxOutputs+1)},
		"env name":   {Env: map[string]string{"A=B": ""}},
		"env empty":  {Env: map[string]string{"": "x"}},
		"env NUL":    {Env: map[string]string{"A": "\x00"}},
		"env length": {Env: map[string]string{"A": strings.Repeat("x", wire.MaxMessage)}},
	} {
		s.Module = endless.file(t)
		_, err := run(t, s)
		t.Run(what, func(t *testing.T) { wantCause(t, err, BadSpec, wire.Rejected, wire.CodeBadBody) })
	}
}

func TestAsManyFilesAsPossible(t *testing.T) {
	s := hosted("copy")
	var outs [MaxOutputs]bytes.Buffer
	for i := range MaxInputs {
		name := fmt.Sprintf("f%d", i)
		s.Inputs = append(s.Inputs, granting(t, name, []byte(name)))
		if i < MaxOutputs {
			s.Args = append(s.Args, name)
			s.Outputs = append(s.Outputs, Output{name, &outs[i]})
		}
	}
	s.CacheDir = t.TempDir() // opening the cache takes descriptors beside
	mustRun(t, s)
	for i := range outs {
		if got, want := outs[i].String(), fmt.Sprintf("f%d", i); got != want {
			t.Errorf("output %d is %q", i, got)
		}
	}
	if entries, err := os.ReadDir(s.CacheDir); err != nil || len(entries) == 0 {
		t.Errorf("no code was cached: %v", err)
	}
}

func TestSuspendedJobTakesNothing(t *testing.T) {
	s := Spec{Module: endless.file(t), Limits: wire.JobLimits{WallSeconds: 1, CPUSeconds: 60}, Control: NewControl()}
	s.Control.Suspend() // before its wall time passes, however slow this machine is
	type ended struct {
		res Result
		err error
	}
	done := make(chan ended, 1)
	began := time.Now()
	go func() { res, err := runner.Run(t.Context(), s); done <- ended{res, err} }()
	var worker int
	eventually(t, "a worker that stands still", func() bool {
		worker = childOf(os.Getpid())
		return worker != 0 && standsStill(worker)
	})
	const still = 1500 * time.Millisecond // longer than its wall time
	before := cpuOf(worker)
	select {
	case e := <-done:
		t.Fatalf("it ended while suspended: %v", e.err)
	case <-time.After(still):
	}
	if now := cpuOf(worker); now != before || now == 0 {
		t.Errorf("it took %v of CPU, and %v more while suspended", before, now-before)
	}
	seen := s.Control.CPU()
	s.Control.Continue()
	e := <-done
	wantCause(t, e.err, LimitWall, wire.TimedOut, wire.CodeLimit)
	all := time.Since(began)
	if e.res.Suspended < still || e.res.Wall < time.Second || e.res.Wall+e.res.Suspended > all {
		t.Errorf("%v wall and %v suspended, of %v", e.res.Wall, e.res.Suspended, all)
	}
	if e.res.CPU <= seen {
		t.Errorf("%v of CPU in all, %v before it was suspended", e.res.CPU, seen)
	}
}

func TestAJobAtWorkStandsStillAndGoesOn(t *testing.T) {
	s := Spec{Module: endless.file(t), Control: NewControl()}
	c := started(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- c.supervise(ctx, wire.JobLimits{WallSeconds: 3600, CPUSeconds: 600}) }()
	eventually(t, "a job at work", func() bool {
		return strings.Contains(procFile(c.cmd.Process.Pid, "limits"), "Max open files            0 ")
	})
	s.Control.Suspend()
	eventually(t, "a job that stands still", func() bool { return standsStill(c.cmd.Process.Pid) })
	before := c.cpuTime()
	time.Sleep(200 * time.Millisecond)
	if now := c.cpuTime(); now != before {
		t.Errorf("it took %v of CPU while suspended", now-before)
	}
	s.Control.Continue()
	eventually(t, "a job that goes on", func() bool { return c.cpuTime() > before })
	cancel()
	<-done
}

// standsStill tells whether all threads of a process are stopped: while one is about to be, it
// may take CPU.
func standsStill(pid int) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, path := range threads {
		if status, err := os.ReadFile(path); err != nil || !strings.Contains(string(status), "State:\tT") {
			return false
		}
	}
	return len(threads) > 0
}

func TestSuspendedJobCanBeStopped(t *testing.T) {
	s := Spec{Module: endless.file(t), Control: NewControl()}
	s.Control.Suspend() // before it begins
	c := started(t, s)
	done := make(chan error, 1)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	go func() { done <- c.supervise(ctx, wire.JobLimits{WallSeconds: 60, CPUSeconds: 60}) }()
	eventually(t, "a stopped worker", func() bool {
		return strings.Contains(procFile(c.cmd.Process.Pid, "status"), "State:\tT")
	})
	why := &wire.Problem{State: wire.Canceled, Code: "canceled", Reason: "the operator canceled it"}
	cancel(why)
	if err := <-done; wire.ProblemOf(err) != why {
		t.Errorf("got %v", err)
	}
	await(t, c.exited)
}

func TestShareOfAProcessorIsKept(t *testing.T) {
	// On a machine that has too much to do, who watches the job comes late, or the job gets
	// nothing: not each time.
	for try := 1; ; try++ {
		s := Spec{Module: endless.file(t), Limits: wire.JobLimits{WallSeconds: 4, CPUSeconds: 60}, Control: NewControl()}
		s.Control.SetShare(0.25)
		res, err := run(t, s)
		wantCause(t, err, LimitWall, wire.TimedOut, wire.CodeLimit)
		if res.Suspended != 0 {
			t.Errorf("it counts as suspended for %v", res.Suspended)
		}
		// What it may be ahead comes on top.
		share := res.CPU.Seconds() / res.Wall.Seconds()
		if share <= 0.25*1.3 && share >= 0.05 {
			return
		}
		if t.Logf("%v of CPU in %v: a share of %.2f", res.CPU, res.Wall, share); try == 5 {
			t.Fatal("five times it was not its share")
		}
	}
}

func TestPaceOfAShare(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(1000, 0).Add(time.Duration(ms) * time.Millisecond) }
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	p := pace{began: at(0)}
	for _, step := range []struct {
		now, cpu int
		share    float64
		want     int
	}{
		{0, 0, 0.5, 0},
		{200, 200, 0.5, 0},     // 100 ms ahead, 125 are free
		{300, 300, 0.5, 300},   // 150 ahead: 300 ms at half a processor
		{400, 300, 0.5, 200},   // still
		{600, 300, 0.5, 0},     // even
		{2000, 400, 0.5, 0},    // far behind, and that is not saved up
		{2300, 700, 0.5, 300},  //
		{2350, 700, 0, 0},      // no bound any more
		{2400, 5000, 0, 0},     //
		{2500, 5000, 0.001, 0}, // never less than a hundredth
	} {
		if got := p.throttle(step.share, ms(step.cpu), at(step.now)); got != ms(step.want) {
			t.Errorf("at %d ms with %d ms of CPU: %v, want %d ms", step.now, step.cpu, got, step.want)
		}
	}
}
