package jobs

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"

	"golang.org/x/mod/sumdb/dirhash"
	"golang.org/x/sys/unix"
)

// named is a job of the guest that has named inputs and outputs.
func named(args ...string) wire.JobRun {
	return wire.JobRun{Module: blob(hosted, "/hosted"), Args: args}
}

func part(content, url string) wire.JobPart {
	return wire.JobPart{Chunk: digest([]byte(content)), Size: int64(len(content)), URL: url}
}

func TestInputsOfEverySourceAndOutputsAsChunks(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "2024"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"2024/a.jpg": "a photo", "one.csv": "1,2\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := policy.Default()
	p.Sensors, p.MaxOutput = true, 64<<20
	p.Datasets = map[string]string{"photos": dir, "table": filepath.Join(dir, "one.csv")}
	s, o, _ := device(t, p)
	s.o.Sensors = func(q wire.HistoryRequest) ([]byte, error) { return json.Marshal(q) }
	held, far := strings.Repeat("held ", 1000), strings.Repeat("far", 2<<20) // 6 MiB
	o.chunks[digest([]byte(held))] = []byte(held)
	far1, far2 := far[:PartBytes], far[PartBytes:]
	o.files["/far1"], o.files["/far2"] = []byte(far1), []byte(far2)
	job := named("copy", "a", "b", "c", "d", "e", "f")
	curves := &wire.HistoryRequest{}
	job.Inputs = []wire.JobInput{
		{Name: "a", Parts: []wire.JobPart{{Chunk: digest([]byte(held)), Size: int64(len(held))}}},
		{Name: "b", Parts: []wire.JobPart{part(far1, "/far1"), part(far2, "/far2")}},
		{Name: "c", Dataset: "photos/2024/a.jpg"},
		{Name: "d", Dataset: "table"},
		{Name: "e", Sensors: curves},
		{Name: "f"},
	}
	job.Outputs = []string{"f", "b", wire.Stdout, "a", "c", "d", "e"}
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.o.Device = wire.IDOf(pub)
	s.o.Sign = func(typ wire.PayloadType, v any) ([]byte, error) { return wire.Seal(key, typ, v) }
	job.Env = map[string]string{"A": "b"}
	job.Limits.OutputBytes = 32 << 20
	out, err := do(t, s, job)
	if err != nil {
		t.Fatal(err)
	}
	r := out.Body.(wire.JobResult)
	window, _ := json.Marshal(curves)
	want := map[string]string{"a": held, "b": far, "c": "a photo", "d": "1,2\n", "e": string(window), "f": "", wire.Stdout: string(out.Attachment)}
	var names []string
	for _, got := range r.Outputs {
		names = append(names, got.Name)
		var whole bytes.Buffer
		for _, p := range got.Parts {
			if c := o.chunks[p.Chunk]; int64(len(c)) != p.Size || len(c) == 0 {
				t.Errorf("%s: the part %s has %d bytes, it says %d", got.Name, p.Chunk, len(c), p.Size)
			}
			whole.Write(o.chunks[p.Chunk])
		}
		if whole.String() != want[got.Name] || got.Size != int64(whole.Len()) || got.SHA256 != digest(whole.Bytes()) {
			t.Errorf("output %s: %d bytes, want %d", got.Name, whole.Len(), len(want[got.Name]))
		}
	}
	if !slices.Equal(names, job.Outputs) {
		t.Errorf("outputs %v, want %v", names, job.Outputs)
	}

	// The statement stands by itself.
	st, err := wire.OpenAs[wire.Statement](r.Statement, pub, wire.TypeStatement)
	if err != nil {
		t.Fatal(err)
	}
	if st.Type != wire.StatementType || st.PredicateType != wire.JobPredicateType || len(st.Subject) != 7 || st.Subject[0].Name != wire.Stdout {
		t.Errorf("%+v", st)
	}
	for _, sub := range st.Subject {
		if sub.Digest["sha256"] != digest([]byte(want[sub.Name])) {
			t.Errorf("the statement has %s for %s", sub.Digest["sha256"], sub.Name)
		}
		if one := sub.Name != "b" && sub.Name != "f"; one != (sub.Digest["deimosChunk"] != "") {
			t.Errorf("%s: %v", sub.Name, sub.Digest)
		}
	}
	q := st.Predicate
	if q.Order != "order" || q.Device != s.o.Device || q.Module.Digest["sha256"] != digest(hosted) || !slices.Equal(q.Args, job.Args) ||
		q.Env["A"] != "b" || q.Limits.OutputBytes != 32<<20 || q.Engine != r.Engine || q.Ended.Before(q.Began) || len(q.Inputs) != 6 {
		t.Errorf("%+v", q)
	}
	for _, in := range q.Inputs {
		if in.Digest["sha256"] != digest([]byte(want[in.Name])) {
			t.Errorf("the statement has %s for the input %s", in.Digest["sha256"], in.Name)
		}
	}
	if left, err := os.ReadDir(filepath.Join(s.o.Dir, "work")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestNoDatasetLeadsOutOfItsFolder(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	mustDo(t, os.Mkdir(open, 0o700), os.Mkdir(filepath.Join(open, "below"), 0o700),
		os.WriteFile(filepath.Join(dir, "secret"), []byte("secret"), 0o600),
		os.Symlink("../secret", filepath.Join(open, "link")),
		os.Symlink(filepath.Join(dir, "secret"), filepath.Join(open, "absolute")),
		os.Symlink("..", filepath.Join(open, "up")),
		unix.Mkfifo(filepath.Join(open, "fifo"), 0o600))
	p := policy.Default()
	p.Datasets = map[string]string{"open": open}
	s, _, _ := device(t, p)
	for path, code := range map[string]string{
		"open/link": wire.CodeNotFound, "open/absolute": wire.CodeNotFound, "open/up/secret": wire.CodeNotFound,
		"open/up": wire.CodeNotFound, "open/nothing": wire.CodeNotFound, "open/fifo": wire.CodeBadBody,
		"open/../secret": wire.CodeBadBody, "open//secret": wire.CodeBadBody, "open/": wire.CodeBadBody, "closed/x": wire.CodePolicy, "/etc/passwd": wire.CodePolicy,
	} {
		job := named("copy")
		job.Inputs = []wire.JobInput{{Name: "a", Dataset: path}}
		_, err := do(t, s, job)
		if p := wire.ProblemOf(err); err == nil || p.Code != code || strings.Contains(p.Reason, "secret: ") {
			t.Errorf("%s: %v, want %s", path, err, code)
		}
	}
}

// TestAFolderOfTheOwnerIsAnInput is all that can lie in a folder: only files are seen.
func TestAFolderOfTheOwnerIsAnInput(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	mustDo(t, os.MkdirAll(filepath.Join(open, "2024", "none"), 0o700), os.MkdirAll(filepath.Join(open, "2024", "may"), 0o700),
		os.WriteFile(filepath.Join(dir, "secret"), []byte("secret"), 0o600),
		os.WriteFile(filepath.Join(open, "2024", "b.jpg"), []byte("two"), 0o600),
		os.WriteFile(filepath.Join(open, "2024", "may", "a Ä.jpg"), []byte("one"), 0o600),
		os.WriteFile(filepath.Join(open, "other"), []byte("other"), 0o600),
		os.Symlink("../../secret", filepath.Join(open, "2024", "link")),
		os.Symlink("/etc", filepath.Join(open, "2024", "etc")),
		os.Symlink("..", filepath.Join(open, "2024", "up")),
		os.Symlink("b.jpg", filepath.Join(open, "2024", "same")),
		os.Symlink("2024", filepath.Join(open, "newest")),
		unix.Mkfifo(filepath.Join(open, "2024", "fifo"), 0o600))
	socket, err := net.Listen("unix", filepath.Join(open, "2024", "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	p := policy.Default()
	p.Datasets = map[string]string{"photos": open, "year": filepath.Join(open, "2024")}
	s, o, _ := device(t, p)
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.o.Sign = func(typ wire.PayloadType, v any) ([]byte, error) { return wire.Seal(key, typ, v) }
	o.chunks[digest([]byte("in"))] = []byte("in")
	files := map[string]string{"b.jpg": "two", "may/a Ä.jpg": "one"}
	before := descriptors(t)
	for _, set := range []string{"photos/2024", "year", "photos/newest"} {
		job := named("walk")
		job.Inputs = []wire.JobInput{{Name: "d", Dataset: set}, {Name: wire.Stdin, Parts: []wire.JobPart{part("in", "")}}}
		out, err := do(t, s, job)
		if err != nil {
			t.Fatalf("%s: %v", set, err)
		}
		want := "stdin 2 \"in\"\n./\nd/\nd/b.jpg \"two\"\nd/may/\nd/may/a Ä.jpg \"one\"\n"
		if got := string(out.Attachment); got != want {
			t.Errorf("%s: the module saw\n%s\nwant\n%s", set, got, want)
		}
		st, err := wire.OpenAs[wire.Statement](out.Body.(wire.JobResult).Statement, pub, wire.TypeStatement)
		if err != nil {
			t.Fatal(err)
		}
		sum, err := dirhash.Hash1(slices.Sorted(maps.Keys(files)), func(name string) (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(files[name])), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(sum, "h1:"))
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []wire.Resource{
			{Name: "d", Digest: map[string]string{"dirHash": hex.EncodeToString(raw)}},
			{Name: "stdin", Digest: map[string]string{"sha256": digest([]byte("in")), "deimosChunk": digest([]byte("in"))}},
		} {
			if got := st.Predicate.Inputs[i]; got.Name != want.Name || !maps.Equal(got.Digest, want.Digest) {
				t.Errorf("the statement says %v of an input, want %v", got, want)
			}
		}
	}
	job := named("walk")
	job.Inputs = []wire.JobInput{{Name: wire.Stdin, Dataset: "photos"}}
	_, err = do(t, s, job)
	wantProblem(t, err, wire.Rejected, wire.CodeBadBody, "is a folder")
	job.Input = digest([]byte("in"))
	_, err = do(t, s, job)
	wantProblem(t, err, wire.Rejected, wire.CodeBadBody, "two inputs")
	// Who reads a pipe of the worker's closes it just after the job is done.
	eventually(t, "all descriptors closed again", func() bool { return descriptors(t) <= before })
}

// descriptors counts what this process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func TestAFolderThatIsTooMuchForAJobIsRefused(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "deep", strings.Repeat("a/", maxDepth+1))
	mustDo(t, os.MkdirAll(deep, 0o700), os.WriteFile(filepath.Join(deep, "x"), nil, 0o600),
		os.Mkdir(filepath.Join(dir, "many"), 0o700), os.Mkdir(filepath.Join(dir, "odd"), 0o700),
		os.WriteFile(filepath.Join(dir, "odd", "\xff"), nil, 0o600))
	for i := range 101 {
		mustDo(t, os.WriteFile(filepath.Join(dir, "many", fmt.Sprint(i)), nil, 0o600))
	}
	p := policy.Default()
	p.Datasets = map[string]string{"set": dir}
	s, _, _ := device(t, p)
	var l unix.Rlimit
	mustDo(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &l))
	defer func() { mustDo(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &l)) }()
	mustDo(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100 * fileShare, Max: l.Max}))
	before := descriptors(t)
	for set, why := range map[string]string{"set/deep": "below more than", "set/many": "more than the 100 files", "set/odd": "no UTF-8"} {
		job := named("walk")
		job.Inputs = []wire.JobInput{{Name: "d", Dataset: set}}
		_, err := do(t, s, job)
		wantProblem(t, err, wire.Failed, wire.CodeLimit, why)
	}
	mustDo(t, os.Remove(filepath.Join(dir, "many", "0")))
	job := named("walk")
	job.Inputs = []wire.JobInput{{Name: "d", Dataset: "set/many"}}
	if _, err := do(t, s, job); err != nil {
		t.Error(err)
	}
	job.Inputs = append(job.Inputs, wire.JobInput{Name: "one more", Dataset: "set/many/1"})
	job.Inputs[1].Name = "more"
	job.Inputs[0], job.Inputs[1] = job.Inputs[1], job.Inputs[0]
	_, err := do(t, s, job)
	wantProblem(t, err, wire.Failed, wire.CodeLimit, "more than the 100 files")
	// Who reads a pipe of the worker's closes it just after the job is done.
	eventually(t, "all descriptors closed again", func() bool { return descriptors(t) <= before })
}

// TestALongInputComesByAList is an input of more parts than fit an order.
func TestALongInputComesByAList(t *testing.T) {
	s, o, _ := device(t, policy.Default())
	var parts []wire.JobPart
	var whole strings.Builder
	for i := range 2000 {
		text := fmt.Sprintf("part %d\n", i)
		url := ""
		if i%2 == 0 {
			o.chunks[digest([]byte(text))] = []byte(text)
		} else {
			url = fmt.Sprint("/part", i)
			o.files[url] = []byte(text)
		}
		whole.WriteString(text)
		parts = append(parts, part(text, url))
	}
	list, err := json.Marshal(parts)
	if err != nil {
		t.Fatal(err)
	}
	o.files["/list"] = list
	job := named("walk")
	job.Inputs = []wire.JobInput{{Name: "d", List: new(blob(list, "/list"))}}
	out, err := do(t, s, job)
	if want := fmt.Sprintf("stdin 0 \"\"\n./\nd %q\n", whole.String()); err != nil || string(out.Attachment) != want {
		t.Errorf("%v: the module saw %.300s", err, out.Attachment)
	}
	for what, l := range map[string]wire.Blob{
		"another digest": {SHA256: digest([]byte("x")), Size: int64(len(list)), URL: "/list"},
		"too long":       {SHA256: digest(list), Size: wire.MaxJobList + 1, URL: "/list"},
		"no list":        blob(hosted, "/hosted"),
	} {
		job.Inputs[0].List = &l
		if _, err := do(t, s, job); err == nil {
			t.Errorf("%s was taken", what)
		}
	}
	parts[7].Size = PartBytes + 1
	o.files["/list"], err = json.Marshal(parts)
	if err != nil {
		t.Fatal(err)
	}
	job.Inputs[0].List = new(blob(o.files["/list"], "/list"))
	_, err = do(t, s, job)
	wantProblem(t, err, wire.Rejected, wire.CodeBadBody, "a chunk has 1 to")
}

func mustDo(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func TestADatasetThatChangesMeanwhileIsNoResult(t *testing.T) {
	path := filepath.Join(t.TempDir(), "table")
	mustDo(t, os.WriteFile(path, []byte("before"), 0o600))
	p := policy.Default()
	p.Datasets = map[string]string{"table": path}
	s, _, _ := device(t, p)
	job := named("asked")
	job.Inputs = []wire.JobInput{{Name: "a", Dataset: "table"}}
	_, err := s.Run(t.Context(), order(t, job), func(p wire.Progress) {
		if p.Done > 0 { // the module runs
			mustDo(t, os.WriteFile(path, []byte("after!"), 0o600))
			s.mu.Lock()
			s.jobs["order"].control.AskCheckpoint()
			s.mu.Unlock()
		}
	})
	wantProblem(t, err, wire.Failed, wire.CodeMismatch, `"a" was changed`)
}

func TestWhatTheOwnerHasNotOpenedIsRejected(t *testing.T) {
	p := policy.Default()
	p.Modules = []string{digest(idle)}
	s, _, _ := device(t, p)
	_, err := do(t, s, named("copy"))
	wantProblem(t, err, wire.Rejected, wire.CodePolicy, "not among those")
	if _, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle")}); err != nil {
		t.Error(err)
	}
	s, _, _ = device(t, policy.Default())
	live := wire.JobRun{Module: blob(idle, "/idle"), Live: true}
	_, err = do(t, s, live)
	wantProblem(t, err, wire.Rejected, wire.CodePolicy, "real time")
	curves := wire.JobRun{Module: blob(idle, "/idle"), Inputs: []wire.JobInput{{Name: "a", Sensors: &wire.HistoryRequest{}}}}
	_, err = do(t, s, curves)
	wantProblem(t, err, wire.Rejected, wire.CodePolicy, "measured")
}

func TestJobsThatCannotBeNamedAreRejected(t *testing.T) {
	s, o, _ := device(t, policy.Default())
	many := make([]wire.JobInput, 33)
	for i := range many {
		many[i].Name = fmt.Sprint("i", i)
	}
	for what, change := range map[string]func(*wire.JobRun){
		"slash":        func(j *wire.JobRun) { j.Inputs = []wire.JobInput{{Name: "a/b"}} },
		"up":           func(j *wire.JobRun) { j.Outputs = []string{".."} },
		"twice":        func(j *wire.JobRun) { j.Outputs = []string{"a", "a"} },
		"input twice":  func(j *wire.JobRun) { j.Inputs = []wire.JobInput{{Name: "a"}, {Name: "a"}} },
		"many inputs":  func(j *wire.JobRun) { j.Inputs = many },
		"many outputs": func(j *wire.JobRun) { j.Outputs = make([]string, 17) },
		"two sources": func(j *wire.JobRun) {
			j.Inputs = []wire.JobInput{{Name: "a", Dataset: "x", Sensors: &wire.HistoryRequest{}}}
		},
		"empty part": func(j *wire.JobRun) { j.Inputs = []wire.JobInput{{Name: "a", Parts: []wire.JobPart{{Chunk: "x"}}}} },
		"words":      func(j *wire.JobRun) { j.Args = []string{strings.Repeat("x", maxWords+1)} },
		"env":        func(j *wire.JobRun) { j.Env = map[string]string{"A": strings.Repeat("x", maxWords)} },
	} {
		job := wire.JobRun{Module: blob(idle, "/idle")}
		change(&job)
		_, err := do(t, s, job)
		t.Run(what, func(t *testing.T) { wantProblem(t, err, wire.Rejected, wire.CodeBadBody, "") })
	}
	for _, id := range []string{"", "..", "a/b", strings.Repeat("x", 65)} {
		or := order(t, wire.JobRun{Module: blob(idle, "/idle")})
		or.ID = id
		_, err := s.Run(t.Context(), or, func(wire.Progress) {})
		wantProblem(t, err, wire.Rejected, wire.CodeBadBody, "name of a folder")
	}
	if n := o.fetches("/idle"); n != 0 {
		t.Errorf("fetched %d times for orders that were rejected", n)
	}
}

func TestJobsDoNotTakeTheSameRoomOnTheDisk(t *testing.T) {
	s, _, _ := device(t, policy.Default())
	s.disk.free = func(string) (int64, error) { return spareBytes + 10, nil }
	w := &work{}
	one, err := s.disk.reserve(w, 6)
	mustDo(t, err)
	_, err = s.disk.reserve(w, 5) // while the other is about to write
	wantProblem(t, err, wire.Failed, wire.CodeNoSpace, "are free")
	two, err := s.disk.reserve(w, 4)
	mustDo(t, err)
	one()
	one()
	two()
	if s.disk.coming != 0 {
		t.Errorf("%d bytes are kept for nobody", s.disk.coming)
	}
}

func TestAJobThatHasNoRoomForWhatItReadsAndWritesDoesNotBegin(t *testing.T) {
	s, _, _ := device(t, policy.Default())
	job := named("steps", "1")
	job.Limits.OutputBytes = 1 << 20
	job.Outputs = []string{"a"}
	job.Inputs = []wire.JobInput{{Name: "b", Parts: []wire.JobPart{part("content", "/b")}}}
	for spare, ok := range map[int64]bool{1<<20 - 1: false, 1 << 20: false, 1<<20 + 6: false, 1<<20 + 7: true} {
		s.disk.free = func(string) (int64, error) { return spareBytes + spare, nil }
		if _, err := do(t, s, job); ok {
			var p *wire.Problem
			if errors.As(err, &p) && p.Code == wire.CodeNoSpace {
				t.Error(err)
			}
		} else {
			wantProblem(t, err, wire.Failed, wire.CodeNoSpace, "place it on another")
		}
		if s.disk.coming != 0 {
			t.Fatalf("%d bytes are kept for nobody", s.disk.coming)
		}
	}
}

func TestOutputThatCannotBecomeAChunkIsTheReason(t *testing.T) {
	s, o, _ := device(t, policy.Default())
	o.full = wire.FailedBecause(wire.CodeNoSpace, "the disk's floor is reached")
	job := wire.JobRun{Module: blob(sha256sum, "/sha256sum"), Outputs: []string{wire.Stdout}}
	_, err := do(t, s, job)
	wantProblem(t, err, wire.Failed, wire.CodeNoSpace, "floor")
}

func TestDeadlineEndsAJobThatWaitsOrRuns(t *testing.T) {
	s, _, _ := device(t, policy.Default())
	run := wire.JobRun{Module: blob(endless, "/endless"), Deadline: time.Now().Add(300 * time.Millisecond)}
	_, err := do(t, s, run)
	wantProblem(t, err, wire.TimedOut, wire.CodeLimit, "deadline")
	s.queue.decide(policy.Decision{Code: policy.CodePaused})
	run.Deadline = time.Now().Add(-time.Second)
	_, err = do(t, s, run)
	wantProblem(t, err, wire.TimedOut, wire.CodeLimit, "deadline")
}

func TestInputsThatMayNotBeFetchedNowAreWaitedForWithoutASlot(t *testing.T) {
	p := policy.Default()
	p.Slots = 1
	s, o, _ := device(t, p)
	o.files["/far"] = []byte("far")
	var mu sync.Mutex
	refusals := 0
	o.refused = func(asked bool) error {
		mu.Lock()
		defer mu.Unlock()
		if refusals++; refusals > 1 || !asked {
			return nil
		}
		return wire.RejectedUntil(50*time.Millisecond, wire.CodeMetered, "used up")
	}
	job := named("copy", "a")
	job.Inputs, job.Outputs = []wire.JobInput{{Name: "a", Parts: []wire.JobPart{part("far", "/far")}}}, []string{"a"}
	var told []string
	other := make(chan error, 1)
	_, err := s.Run(t.Context(), order(t, job), func(p wire.Progress) {
		if p.Waits == nil {
			told = append(told, "runs")
			return
		}
		if p.Waits.Code == policy.CodeSlots {
			return // until the other one is done
		}
		told = append(told, p.Waits.Code)
		go func() { // another job has the slot meanwhile
			or := order(t, wire.JobRun{Module: blob(idle, "/idle")})
			or.ID = "other"
			_, err := s.Run(t.Context(), or, func(wire.Progress) {})
			other <- err
		}()
	})
	if err != nil || !slices.Equal(told, []string{"runs", wire.CodeMetered, "runs"}) {
		t.Errorf("%v, %v", told, err)
	}
	if err := <-other; err != nil {
		t.Error(err)
	}
	p.OnMetered = policy.MeteredRun
	s.SetPolicy(p)
	refusals = 0
	if _, err := do(t, s, job); err != nil || refusals != 1 {
		t.Errorf("asked %d times, %v", refusals, err)
	}
}

// owner is an owner whom a service listens to.
type owner struct {
	mu   sync.Mutex
	word policy.Word
	err  error
}

func (o *owner) say(s *Service, w policy.Word) {
	o.mu.Lock()
	o.word = w
	o.mu.Unlock()
	s.look()
}

func (o *owner) listen() (policy.Word, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.word, o.err
}

// watched makes a service with an owner, whom it hears until the test ends.
func watchedDevice(t *testing.T, p policy.Policy, say policy.Word) (*Service, *origin, *owner) {
	t.Helper()
	s, o, _ := device(t, p)
	own := &owner{word: say}
	s.o.Word = own.listen
	s.weigh()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { s.Watch(ctx, func() {}); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return s, o, own
}

func TestOwnersPauseStopsAJobAfterItsCheckpoint(t *testing.T) {
	s, _, own := watchedDevice(t, policy.Default(), policy.Word{})
	job := named("steps", "1000000000") // counts, and saves itself when it is asked
	job.Limits.WallSeconds = 600
	ctx, cancel := context.WithCancelCause(t.Context())
	type said struct{ code, reason string }
	heard := make(chan said, 100)
	result := make(chan error, 1)
	go func() {
		_, err := s.Run(ctx, order(t, job), func(p wire.Progress) {
			if p.Waits != nil {
				heard <- said{p.Waits.Code, p.Waits.Reason}
			} else {
				heard <- said{"runs", fmt.Sprint(p.Done > 0)}
			}
		})
		result <- err
	}()
	await := func(want said) {
		t.Helper()
		for got := range heard {
			if got == want {
				return
			}
		}
	}
	await(said{"runs", "true"}) // the module runs
	own.say(s, policy.Word{Paused: true})
	await(said{policy.CodePaused, "the owner of this device has paused jobs until further notice"})
	checkpoint := filepath.Join(s.o.Dir, "work", "order", "checkpoint")
	eventually(t, "a job that stands still", func() bool { return slices.Equal(workers(), []string{"T"}) })
	if b, err := os.ReadFile(checkpoint); err != nil || len(b) == 0 {
		t.Errorf("no checkpoint before the pause: %v", err)
	}
	if st := s.State(); st.Pause == nil || st.Pause.Code != policy.CodePaused || st.Running != 1 {
		t.Errorf("the heartbeat says %+v", st)
	}
	if l := s.List(); len(l) != 1 || l[0].State != "suspended" || l[0].Code != policy.CodePaused {
		t.Errorf("the list says %+v", l)
	}
	before := s.CPU()
	own.say(s, policy.Word{})
	await(said{"runs", "true"})
	eventually(t, "a job that goes on", func() bool { return s.CPU() > before })
	why := &wire.Problem{State: wire.Canceled, Code: wire.CodeCanceled, Reason: "enough"}
	cancel(why)
	if err := <-result; wire.ProblemOf(err) != why {
		t.Error(err)
	}
}

// A dataset of terabytes takes hours to be read, which the agent itself does.
func TestAJobStandsStillWhileItsInputsArePrepared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "big")
	f, err := os.Create(path)
	mustDo(t, err, f.Truncate(1<<40), f.Close())
	p := policy.Default()
	p.Datasets = map[string]string{"big": path}
	s, _, own := watchedDevice(t, p, policy.Word{})
	job := named("steps", "1")
	job.Inputs = []wire.JobInput{{Name: "big", Dataset: "big"}}
	ctx, cancel := context.WithCancel(t.Context())
	waits, goesOn, result := make(chan string, 10), make(chan bool, 10), make(chan error, 1)
	go func() {
		_, err := s.Run(ctx, order(t, job), func(p wire.Progress) {
			if p.Waits != nil {
				waits <- p.Waits.Code
			} else {
				goesOn <- true
			}
		})
		result <- err
	}()
	read := func() int64 { // bytes, of this process
		raw, err := os.ReadFile("/proc/self/io") // see proc_pid_io(5)
		mustDo(t, err)
		n := int64(-1)
		_, err = fmt.Sscanf(string(raw), "rchar: %d", &n)
		mustDo(t, err)
		return n
	}
	<-goesOn // it has its slot
	for begun := read(); read() < begun+16<<20; {
		time.Sleep(time.Millisecond) // of reading nobody tells
	}
	own.say(s, policy.Word{Paused: true})
	if got := <-waits; got != policy.CodePaused {
		t.Errorf("it waits for %s", got)
	}
	if l := s.List(); len(l) != 1 || l[0].State != "suspended" || l[0].Code != policy.CodePaused {
		t.Errorf("it is listed as %+v", l)
	}
	before := read()
	time.Sleep(100 * time.Millisecond)
	if n := read() - before; n > 4<<20 {
		t.Errorf("%d bytes were read meanwhile", n)
	}
	own.say(s, policy.Word{})
	<-goesOn
	own.say(s, policy.Word{Paused: true})
	<-waits
	cancel() // while it stands still
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestAPausedDeviceBeginsNothingAndSaysSo(t *testing.T) {
	s, _, own := watchedDevice(t, policy.Default(), policy.Word{Paused: true, Until: time.Now().Add(time.Hour)})
	heard := make(chan *wire.Problem, 10)
	result := make(chan error, 1)
	go func() {
		_, err := s.Run(t.Context(), order(t, wire.JobRun{Module: blob(idle, "/idle")}), func(p wire.Progress) { heard <- p.Waits })
		result <- err
	}()
	why := <-heard
	if why == nil || why.Code != policy.CodePaused || why.After < 59*time.Minute || why.After > time.Hour {
		t.Fatalf("told %+v", why)
	}
	own.say(s, policy.Word{Finish: true})
	if why := <-heard; why == nil || why.Code != policy.CodeFinishing {
		t.Fatalf("told %+v", why)
	}
	own.say(s, policy.Word{})
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestAnOwnerWhoCannotBeHeardHasSaidWhatWasHeardLast(t *testing.T) {
	s, _, _ := device(t, policy.Default())
	own := &owner{err: errors.New("the disk is broken")}
	s.o.Word = own.listen
	if d := s.weigh(); d.Run || d.Code != policy.CodePaused {
		t.Errorf("before a word was heard: %+v", d)
	}
	own.err = nil
	if d := s.weigh(); !d.Run {
		t.Errorf("nothing was said, and %+v", d)
	}
	own.word.Paused = true
	s.weigh()
	own.word, own.err = policy.Word{}, errors.New("the disk is broken")
	if d := s.weigh(); d.Run {
		t.Errorf("the pause is forgotten: %+v", d)
	}
}

func TestAJobThatIsCutOffGoesOnFromItsCheckpoint(t *testing.T) {
	s, o, dir := device(t, policy.Default())
	// Cut off by the end of the agent, in good order: it may save itself.
	ctx, end := context.WithCancel(t.Context())
	job := named("steps", "1000000000")
	job.Limits = wire.JobLimits{WallSeconds: 600, CPUSeconds: 600}
	_, err := s.Run(ctx, order(t, job), func(p wire.Progress) {
		if p.Done > 0 {
			end()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	saved, err := os.ReadFile(filepath.Join(dir, "work", "order", "checkpoint"))
	if err != nil || len(saved) == 0 {
		t.Fatalf("nothing was saved: %v", err)
	}
	// The next life.
	s, err = New(Options{Dir: dir, Policy: policy.Default(), Fetcher: o, Chunks: o, Runner: worker})
	if err != nil {
		t.Fatal(err)
	}
	short := named("steps", "1") // so that it ends at once
	out, err := do(t, s, short)
	if err != nil {
		t.Fatal(err)
	}
	r := out.Body.(wire.JobResult)
	if want := "went on at " + string(saved) + "\n"; r.Stderr != want || r.Resumed != 1 || !r.Disturbed {
		t.Errorf("%q, resumed %d; want %q", r.Stderr, r.Resumed, want)
	}
	if _, err := os.Stat(filepath.Join(dir, "work", "order")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder is left: %v", err)
	}
}

func TestAJobThatEndsTheAgentAgainAndAgainIsGivenUp(t *testing.T) {
	s, _, dir := device(t, policy.Default())
	or := order(t, wire.JobRun{Module: blob(idle, "/idle")})
	or.Expires = time.Now().Add(time.Hour)
	for range mostFruitless { // lives that say no more
		if _, err := openWork(s.workDir(), or); err != nil {
			t.Fatal(err)
		}
	}
	_, err := s.Run(t.Context(), or, func(wire.Progress) {})
	wantProblem(t, err, wire.Failed, wire.CodeInterrupted, "10 times")
	if _, err := os.Stat(filepath.Join(dir, "work", "order")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder is left: %v", err)
	}
	// One that came further is not.
	for i := range 3 * mostFruitless {
		w, err := openWork(s.workDir(), or)
		if err != nil {
			t.Fatalf("life %d: %v", i, err)
		}
		mustDo(t, w.keep(1, strings.NewReader("x")))
	}
}

func TestHalfACheckpointIsNone(t *testing.T) {
	s, _, _ := device(t, policy.Default())
	w, err := openWork(s.workDir(), order(t, wire.JobRun{}))
	if err != nil {
		t.Fatal(err)
	}
	mustDo(t, w.keep(5, strings.NewReader("whole")))
	if w.keep(10, strings.NewReader("half")) == nil {
		t.Error("half a checkpoint was kept")
	}
	if b, err := os.ReadFile(w.path("checkpoint")); string(b) != "whole" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestFoldersOfOrdersThatAreOverAreSwept(t *testing.T) {
	s, o, dir := device(t, policy.Default())
	for id, ends := range map[string]time.Duration{"over": -2 * time.Hour, "open": time.Hour} {
		or := order(t, wire.JobRun{})
		or.ID, or.Expires = id, time.Now().Add(ends)
		if _, err := openWork(s.workDir(), or); err != nil {
			t.Fatal(err)
		}
	}
	mustDo(t, os.Mkdir(filepath.Join(dir, "work", "damaged"), 0o700))
	if _, err := New(Options{Dir: dir, Fetcher: o, Chunks: o}); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Join(dir, "work"))
	if err != nil || len(left) != 1 || left[0].Name() != "open" {
		t.Errorf("%v, %v", left, err)
	}
}

func TestStateForTheHeartbeat(t *testing.T) {
	p := policy.Default()
	p.Live, p.Sensors, p.Datasets = true, true, map[string]string{"b": "/b", "a": "/a"}
	s, _, _ := device(t, p)
	st := s.State()
	if st.Host != 1 || !strings.HasPrefix(st.Engine, "wazero/") || st.Slots != p.Slots || !st.Live || st.Sensors || !slices.Equal(st.Datasets, []string{"a", "b"}) || st.Pause != nil {
		t.Errorf("%+v", st)
	}
	p.Enabled = false
	s.SetPolicy(p)
	if s.State() != nil {
		t.Error("a device without jobs says that it has some")
	}
}
