package jobs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/jobs/internal/wasmtest"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// endless is (module (func (export "_start") (loop br 0))).
var endless = []byte("\x00asm\x01\x00\x00\x00\x01\x04\x01\x60\x00\x00\x03\x02\x01\x00\x07\x0a\x01\x06_start\x00\x00\x0a\x09\x01\x07\x00\x03\x40\x0c\x00\x0b\x0b")

// idle is (module (func (export "_start"))).
var idle = []byte("\x00asm\x01\x00\x00\x00\x01\x04\x01\x60\x00\x00\x03\x02\x01\x00\x07\x0a\x01\x06_start\x00\x00\x0a\x04\x01\x02\x00\x0b")

var (
	sha256sum []byte // the guest of that name
	hosted    []byte // of jobs/sandbox: uses the host interface
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "jobs")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	for src, to := range map[string]*[]byte{
		filepath.Join(wasmtest.Guests(), "sha256sum"):  &sha256sum,
		filepath.Join("sandbox", "testdata", "hosted"): &hosted,
	} {
		out := filepath.Join(dir, "guest.wasm")
		if err := wasmtest.Build(src, out); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if *to, err = os.ReadFile(out); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	compiled = filepath.Join(dir, "compiled")
	worker = &sandbox.Runner{Executable: filepath.Join(dir, "worker")}
	if err := wasmtest.Worker(runtime.GOARCH, worker.Executable); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// compiled keeps the guest's machine code from one test to the next.
var compiled string

var worker *sandbox.Runner // with a worker that is no test binary

// origin is a data plane in memory: a Fetcher and Chunks.
type origin struct {
	mu      sync.Mutex
	files   map[string][]byte
	fetched map[string]int
	chunks  map[string][]byte
	reading func(ctx context.Context) // called while a chunk is read

	refused func(asked bool) error // of a chunk that is to be had now; may be nil
	full    error                  // of Keep

	flood   string // a file without an end
	flooded int64  // bytes of it that were taken
}

func (o *origin) Fetch(_ context.Context, url string, _ int64, w io.Writer) error {
	for piece := make([]byte, 64<<10); url == o.flood; {
		if o.flooded > 64<<20 {
			return errors.New("nobody stops it")
		}
		n, err := w.Write(piece)
		if o.flooded += int64(n); err != nil {
			return err
		}
	}
	o.mu.Lock()
	file, ok := o.files[url]
	o.fetched[url]++
	o.mu.Unlock()
	if !ok {
		return errors.New("404")
	}
	// In pieces, as from a network. What is too long is left to the caller to
	// notice, as from a fetcher that does not keep its word.
	for piece := range slices.Chunk(file, 64<<10) {
		if _, err := w.Write(piece); err != nil {
			return err
		}
	}
	return nil
}

func (o *origin) Read(ctx context.Context, id string) ([]byte, error) {
	if o.reading != nil {
		o.reading(ctx)
	}
	if c, ok := o.chunks[id]; ok {
		return c, nil
	}
	return nil, wire.FailedBecause(wire.CodeLost, "chunk %s is lost", id)
}

func (o *origin) Get(ctx context.Context, id string, size int64, url string, asked bool) ([]byte, error) {
	if o.refused != nil {
		if err := o.refused(asked); err != nil {
			return nil, err
		}
	}
	if url == "" {
		return o.Read(ctx, id)
	}
	var b bytes.Buffer
	err := o.Fetch(ctx, url, size, &b)
	return b.Bytes(), err
}

func (o *origin) Keep(_ context.Context, data []byte) (string, error) {
	if o.full != nil {
		return "", o.full
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	id := digest(data)
	o.chunks[id] = bytes.Clone(data)
	return id, nil
}

func (o *origin) fetches(url string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.fetched[url]
}

// device makes a service over an origin that has the modules and one chunk, "in".
func device(t *testing.T, p policy.Policy) (*Service, *origin, string) {
	t.Helper()
	o := &origin{
		files:   map[string][]byte{"/hosted": hosted, "/sha256sum": sha256sum, "/endless": endless, "/idle": idle},
		fetched: map[string]int{},
		chunks:  map[string][]byte{"in": []byte("hello\n")},
	}
	dir := t.TempDir()
	// The guest takes a second to compile; that is tested elsewhere.
	if err := os.MkdirAll(compiled, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(compiled, filepath.Join(dir, "compiled")); err != nil {
		t.Fatal(err)
	}
	s, err := New(Options{Dir: dir, Policy: p, Fetcher: o, Chunks: o, Runner: worker})
	if err != nil {
		t.Fatal(err)
	}
	// A machine that has too much to do may take as long for a checkpoint.
	s.toPause, s.atEnd = 2*time.Minute, 2*time.Minute
	return s, o, dir
}

// eventually waits for what no event announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not come: %s", what)
		}
	}
}

// workers are the states of this process's children; see proc_pid_stat(5).
func workers() (states []string) {
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range paths {
		stat, _ := os.ReadFile(path) // it may have ended
		_, after, _ := bytes.Cut(stat, []byte(") "))
		if f := strings.Fields(string(after)); len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			states = append(states, f[0])
		}
	}
	return states
}

func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

func blob(content []byte, url string) wire.Blob {
	return wire.Blob{SHA256: digest(content), Size: int64(len(content)), URL: url}
}

func order(t *testing.T, body any) wire.Order {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return wire.Order{ID: "order", Kind: wire.KindJobRun, Body: raw, Expires: time.Now().Add(time.Hour)}
}

func do(t *testing.T, s *Service, job wire.JobRun) (wire.Outcome, error) {
	t.Helper()
	var handler wire.Handler = s.Run
	return handler(t.Context(), order(t, job), func(wire.Progress) {})
}

func wantProblem(t *testing.T, err error, state wire.State, code, text string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s with %q", state, code)
	}
	if p := wire.ProblemOf(err); p.State != state || p.Code != code || !strings.Contains(p.Reason, text) {
		t.Fatalf("got %s, %q, %q; want %s, %q, ...%s...", p.State, p.Code, p.Reason, state, code, text)
	}
}

func TestJobGivesItsSignedFacts(t *testing.T) {
	s, _, _ := device(t, policy.Default())
	out, err := do(t, s, wire.JobRun{Module: blob(sha256sum, "/sha256sum"), Input: "in"})
	if err != nil {
		t.Fatal(err)
	}
	want := digest([]byte("hello\n")) + "\n"
	if string(out.Attachment) != want {
		t.Errorf("the output is %q, want %q", out.Attachment, want)
	}
	r := out.Body.(wire.JobResult)
	if r.Module != digest(sha256sum) || r.Input != "in" || r.Output != digest([]byte(want)) || r.OutputBytes != 65 {
		t.Errorf("the result names %+v", r)
	}
	if r.CPUSeconds <= 0 || r.WallSeconds <= 0 || r.MaxRSSBytes <= 0 || !strings.HasPrefix(r.Engine, "wazero/") {
		t.Errorf("the result is not metered: %+v", r)
	}
}

func TestModuleIsFetchedOnceAndKept(t *testing.T) {
	s, o, dir := device(t, policy.Policy{Enabled: true, Slots: 4})
	var wg sync.WaitGroup
	for i := range 8 {
		o := order(t, wire.JobRun{Module: blob(idle, "/idle")})
		o.ID = fmt.Sprint("order-", i) // each has a folder of its own
		wg.Go(func() {
			if _, err := s.Run(t.Context(), o, func(wire.Progress) {}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	again, err := New(Options{Dir: dir, Policy: policy.Default(), Fetcher: o, Chunks: o, Runner: worker})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := do(t, again, wire.JobRun{Module: blob(idle, "/idle")}); err != nil {
		t.Fatal(err)
	}
	if n := o.fetches("/idle"); n != 1 {
		t.Errorf("fetched %d times", n)
	}
}

func TestModuleThatWentBadOnDiskIsFetchedAgain(t *testing.T) {
	s, o, dir := device(t, policy.Default())
	job := wire.JobRun{Module: blob(idle, "/idle")}
	path := filepath.Join(dir, "modules", digest(idle))
	if _, err := do(t, s, job); err != nil {
		t.Fatal(err)
	}
	bad := slices.Clone(idle)
	bad[len(bad)-1] ^= 1
	if err := os.WriteFile(path, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := do(t, s, job); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, idle) || o.fetches("/idle") != 2 {
		t.Errorf("fetched %d times, kept %x, %v", o.fetches("/idle"), got, err)
	}
}

func TestModuleOtherThanNamedIsNeitherRunNorKept(t *testing.T) {
	other := slices.Clone(idle)
	other[len(other)-1] ^= 1
	for what, served := range map[string][]byte{
		"other bytes": other,
		"too short":   idle[:len(idle)-1],
		"too long":    append(slices.Clone(idle), 0),
		"empty":       nil,
	} {
		t.Run(what, func(t *testing.T) {
			s, o, dir := device(t, policy.Default())
			o.files["/idle"] = served
			_, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle")})
			wantProblem(t, err, wire.Failed, wire.CodeMismatch, "publish it again")
			if left, err := os.ReadDir(filepath.Join(dir, "modules")); err != nil || len(left) > 0 {
				t.Errorf("left on disk: %v, %v", left, err)
			}
		})
	}
}

// TestFetchThatNeverEndsIsCut has a data plane that sends until it is stopped.
func TestFetchThatNeverEndsIsCut(t *testing.T) {
	s, o, _ := device(t, policy.Default())
	o.flood = "/flood"
	_, err := do(t, s, wire.JobRun{Module: blob(idle, "/flood")})
	wantProblem(t, err, wire.Failed, wire.CodeMismatch, "longer than the order says")
	if o.flooded > int64(len(idle))+1<<20 {
		t.Errorf("took %d bytes for a module of %d", o.flooded, len(idle))
	}
}

func TestHalfFetchedModulesOfACrashAreCleared(t *testing.T) {
	dir := t.TempDir()
	half := filepath.Join(dir, "modules", ".fetch-123")
	if err := os.MkdirAll(filepath.Dir(half), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(half, idle, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Options{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}

func TestModuleCacheIsBoundedAndSparesWhatIsInUse(t *testing.T) {
	fetch := func(_ context.Context, b wire.Blob, w io.Writer) error {
		_, err := w.Write([]byte(b.URL)) // each its own content
		return err
	}
	c, err := openModuleCache(t.TempDir(), 25)
	if err != nil {
		t.Fatal(err)
	}
	get := func(content string) (string, func()) {
		path, release, err := c.get(t.Context(), blob([]byte(content), content), fetch)
		if err != nil {
			t.Fatal(err)
		}
		return path, release
	}
	age := func(path string, hours int) {
		then := time.Now().Add(-time.Duration(hours) * time.Hour)
		if err := os.Chtimes(path, then, then); err != nil {
			t.Fatal(err)
		}
	}
	held, release := get("0123456789")
	second, done := get("abcdefghij")
	done()
	age(held, 2)
	age(second, 1)
	_, done = get("ABCDEFGHIJ")
	done()
	exists := func(path string) bool { _, err := os.Stat(path); return err == nil }
	if !exists(held) || exists(second) {
		t.Errorf("the oldest, in use: %v; the next, not in use: %v; want true, false", exists(held), exists(second))
	}
	release()
	_, done = get("9876543210")
	done()
	if exists(held) {
		t.Error("the oldest is kept though nobody uses it")
	}
	if len(c.used) != 0 {
		t.Errorf("modules still held: %v", c.used)
	}
}

func TestFetchFailureIsNamed(t *testing.T) {
	s, _, _ := device(t, policy.Default())
	_, err := do(t, s, wire.JobRun{Module: blob(idle, "/nowhere")})
	wantProblem(t, err, wire.Failed, wire.CodeTransfer, "404")
}

func TestLostInputIsPassedOn(t *testing.T) {
	s, _, _ := device(t, policy.Default())
	_, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle"), Input: "other"})
	wantProblem(t, err, wire.Failed, wire.CodeLost, "chunk other is lost")
}

func TestOrdersThatCannotBeAreRejected(t *testing.T) {
	s, o, _ := device(t, policy.Default())
	good := blob(idle, "/idle")
	for what, job := range map[string]wire.JobRun{
		"no digest":        {Module: wire.Blob{Size: 1, URL: "/idle"}},
		"a path as digest": {Module: wire.Blob{SHA256: "../../../../../../../../../../../../../../../../../../../etc/passwd", Size: 1, URL: "/idle"}},
		"capitals":         {Module: wire.Blob{SHA256: strings.ToUpper(good.SHA256), Size: good.Size, URL: good.URL}},
		"no size":          {Module: wire.Blob{SHA256: good.SHA256, URL: good.URL}},
		"too large":        {Module: wire.Blob{SHA256: good.SHA256, Size: sandbox.MaxModule + 1, URL: good.URL}},
	} {
		t.Run(what, func(t *testing.T) {
			_, err := do(t, s, job)
			wantProblem(t, err, wire.Rejected, wire.CodeBadBody, "module")
		})
	}
	_, err := s.Run(t.Context(), wire.Order{Kind: wire.KindJobRun, Body: json.RawMessage(`{"args": 3}`)}, nil)
	wantProblem(t, err, wire.Rejected, wire.CodeBadBody, "cannot be read")
	if n := o.fetches("/idle"); n != 0 {
		t.Errorf("fetched %d times for orders that were rejected", n)
	}
}

func TestOwnerWhoAllowsNoJobsGetsNone(t *testing.T) {
	s, o, _ := device(t, policy.Policy{})
	_, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle")})
	wantProblem(t, err, wire.Rejected, wire.CodePolicy, "owner")
	if n := o.fetches("/idle"); n != 0 {
		t.Errorf("fetched %d times", n)
	}
}

// A module can see how much memory it has: with less than elsewhere its result would be another.
func TestAJobHasTheMemoryThatItWantsOrIsRejected(t *testing.T) {
	s, o, _ := device(t, policy.Policy{Enabled: true, MaxMemory: 32 << 20})
	for want, ok := range map[int64]bool{0: false, 32<<20 + 1: false, 32 << 20: true} {
		_, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle"), Limits: wire.JobLimits{MemoryBytes: want}})
		if ok {
			mustDo(t, err)
			continue
		}
		wantProblem(t, err, wire.Rejected, wire.CodePolicy, "memory")
	}
	if n := o.fetches("/idle"); n != 1 {
		t.Errorf("fetched %d times", n)
	}
}

func TestOwnersCapsBoundTheJob(t *testing.T) {
	s, _, _ := device(t, policy.Policy{Enabled: true, MaxCPU: 0.1})
	_, err := do(t, s, wire.JobRun{Module: blob(endless, "/endless"), Limits: wire.JobLimits{CPUSeconds: 3600}})
	wantProblem(t, err, wire.Failed, wire.CodeLimit, "0.1s of CPU")
	s, _, _ = device(t, policy.Policy{Enabled: true, MaxWall: 0.1})
	_, err = do(t, s, wire.JobRun{Module: blob(endless, "/endless"), Limits: wire.JobLimits{WallSeconds: 3600}})
	wantProblem(t, err, wire.TimedOut, wire.CodeLimit, "0.1s")
	s, _, _ = device(t, policy.Policy{Enabled: true, MaxOutput: 64})
	_, err = do(t, s, wire.JobRun{Module: blob(sha256sum, "/sha256sum"), Input: "in"})
	wantProblem(t, err, wire.Failed, wire.CodeLimit, "64 bytes")
}

func TestNoMoreJobsThanSlots(t *testing.T) {
	const slots = 2
	s, o, _ := device(t, policy.Policy{Enabled: true, Slots: slots})
	entered := make(chan struct{})
	leave := make(chan struct{})
	o.reading = func(context.Context) { entered <- struct{}{}; <-leave }
	results := make(chan error)
	for range slots {
		go func() {
			_, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle"), Input: "in"})
			results <- err
		}()
		<-entered
	}
	// All slots are taken: the next waits, and gives up with its context.
	ctx, cancel := context.WithCancelCause(t.Context())
	why := &wire.Problem{State: wire.Canceled, Code: "canceled", Reason: "the operator canceled it"}
	waiting := make(chan error)
	go func() {
		_, err := s.Run(ctx, order(t, wire.JobRun{Module: blob(idle, "/idle"), Input: "in"}), func(wire.Progress) {})
		waiting <- err
	}()
	cancel(why)
	select {
	case err := <-waiting:
		if wire.ProblemOf(err) != why {
			t.Errorf("got %v, want the cause of the cancel", err)
		}
	case <-entered:
		t.Fatal("a job runs without a slot")
	}
	close(leave)
	for range slots {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	// The slots are free again.
	o.reading = nil
	if _, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle"), Input: "in"}); err != nil {
		t.Error(err)
	}
}
