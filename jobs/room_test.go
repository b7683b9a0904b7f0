package jobs

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

// What a job reads is bounded by its owner, before any of it is fetched or read.
func TestAJobReadsNoMoreThanItsOwnerAllows(t *testing.T) {
	photos := t.TempDir()
	for _, name := range []string{"a", "b"} {
		mustDo(t, os.WriteFile(filepath.Join(photos, name), []byte("1234"), 0o600))
	}
	p := policy.Default()
	p.MaxInput, p.Datasets = 7, map[string]string{"photos": photos}
	s, o, _ := device(t, p)
	long := strings.Repeat("x", 4)
	list, err := json.Marshal([]wire.JobPart{part(long, "/x"), part(long, "/x")})
	mustDo(t, err)
	o.files["/x"], o.files["/list"] = []byte(long), list
	for name, in := range map[string][]wire.JobInput{
		"parts":   {{Name: "a", Parts: []wire.JobPart{part(long, "/x")}}, {Name: "b", Parts: []wire.JobPart{part(long, "/x")}}},
		"list":    {{Name: "a", List: new(blob(list, "/list"))}},
		"dataset": {{Name: "a", Dataset: "photos"}},
		"both":    {{Name: "a", Parts: []wire.JobPart{part(long, "")}}, {Name: "b", Dataset: "photos/a"}},
	} {
		job := named("walk")
		if name == "both" {
			o.chunks[digest([]byte(long))] = []byte(long)
		}
		job.Inputs = in
		_, err := do(t, s, job)
		wantProblem(t, err, wire.Rejected, wire.CodePolicy, "lets a job read 7")
		if n := o.fetches("/x"); n != 0 {
			t.Errorf("%s: %d parts were fetched", name, n)
		}
	}
	if n := o.fetches("/list"); n != 1 {
		t.Errorf("the list was fetched %d times", n)
	}
	job := named("walk")
	job.Inputs = []wire.JobInput{{Name: "a", Dataset: "photos/a"}, {Name: "b", Parts: []wire.JobPart{part("123", "/y")}}}
	o.files["/y"] = []byte("123")
	_, err = do(t, s, job)
	mustDo(t, err)
	if r := s.Room(); r.Held != 0 || r.MaxInput != 7 {
		t.Errorf("afterwards %+v", r)
	}
	if st := s.State(); st.InputBytes != 7 || st.OutputBytes != p.MaxOutput {
		t.Errorf("the heartbeat says %+v", st)
	}
}

// What the heartbeat says of the room is what a job gets: one byte more is refused.
func TestTheRoomThatIsSaidIsTheRoomThatThereIs(t *testing.T) {
	p := policy.Default()
	s, o, _ := device(t, p)
	o.files["/b"] = []byte("content")
	free := int64(spareBytes + 1<<20)
	s.disk.free = func(string) (int64, error) { return free, nil }
	asks := func(size int64) error {
		t.Helper()
		job := named("walk")
		job.Outputs, job.Limits.OutputBytes = []string{wire.Stdout}, size-7
		job.Inputs = []wire.JobInput{{Name: "b", Parts: []wire.JobPart{part("content", "/b")}}}
		_, err := do(t, s, job)
		return err
	}
	says := func(want int64) int64 {
		t.Helper()
		got := s.State().DiskBytes
		if got == nil || *got != want {
			t.Fatalf("the heartbeat says %v, want %d", got, want)
		}
		return want
	}
	room := says(1 << 20)
	mustDo(t, asks(room))
	wantProblem(t, asks(room+1), wire.Failed, wire.CodeNoSpace, "stay free")
	p.MaxDisk = 1 << 19
	s.SetPolicy(p)
	room = says(1 << 19)
	mustDo(t, asks(room))
	wantProblem(t, asks(room+1), wire.Rejected, wire.CodePolicy, "gives all jobs together")
	free = spareBytes - 1
	says(0)
	s.disk.free = func(string) (int64, error) { return 0, os.ErrPermission }
	if got := s.State().DiskBytes; got != nil {
		t.Errorf("of a disk that cannot be asked it says %d", *got)
	}
}

// Jobs together take no more of the disk than their owner gives: who is too large alone is
// refused, who would fit waits for the others.
func TestJobsTakeNoMoreOfTheDiskThanTheirOwnerGives(t *testing.T) {
	p := policy.Default()
	p.MaxDisk, p.Slots = 1<<20, 2
	s, o, _ := device(t, p)
	o.files["/b"] = []byte("content")
	job := func(output int64) wire.JobRun {
		job := named("walk")
		job.Outputs, job.Limits.OutputBytes = []string{wire.Stdout}, output
		job.Inputs = []wire.JobInput{{Name: "b", Parts: []wire.JobPart{part("content", "/b")}}}
		return job
	}
	_, err := do(t, s, job(1<<20-6))
	wantProblem(t, err, wire.Rejected, wire.CodePolicy, "its owner gives all jobs together")
	if n := o.fetches("/b"); n != 0 {
		t.Errorf("fetched %d times", n)
	}
	// One that runs until it is told to end, with room for one byte less than the next wants.
	first := named("steps", "1000000000")
	first.Outputs, first.Limits = []string{"a"}, wire.JobLimits{OutputBytes: 8, WallSeconds: 600, CPUSeconds: 600}
	ctx, end := context.WithCancelCause(t.Context())
	runs, ended := make(chan bool, 1), make(chan error, 1)
	go func() {
		or := order(t, first)
		or.ID = "first"
		_, err := s.Run(ctx, or, func(p wire.Progress) {
			if p.Done > 0 {
				select {
				case runs <- true:
				default:
				}
			}
		})
		ended <- err
	}()
	<-runs
	waits := make(chan string, 100)
	result := make(chan error, 1)
	go func() {
		_, err := s.Run(t.Context(), order(t, job(1<<20-7)), func(p wire.Progress) {
			if p.Waits != nil {
				waits <- p.Waits.Code
			}
		})
		result <- err
	}()
	select {
	case code := <-waits:
		if code != policy.CodeDisk {
			t.Errorf("it waits for %q", code)
		}
	case err := <-result:
		t.Fatalf("it did not wait: %v", err)
	}
	if r := s.Room(); r.Held != 8 {
		t.Errorf("the first holds %d bytes", r.Held)
	}
	end(&wire.Problem{State: wire.Canceled, Code: wire.CodeCanceled, Reason: "enough"})
	<-ended
	select {
	case err := <-result:
		mustDo(t, err)
	case <-time.After(roomAfter - time.Second): // then it would look by itself
		t.Fatal("it goes on waiting for room that there is")
	}
	if r := s.Room(); r.Held != 0 {
		t.Errorf("%d bytes are held for nobody", r.Held)
	}
}

// A checkpoint takes room, too, and while it takes the place of another, both are there.
func TestCheckpointsAreCounted(t *testing.T) {
	p := policy.Default()
	p.MaxDisk = 10
	s, _, dir := device(t, p)
	w, err := openWork(filepath.Join(dir, "work"), order(t, named("walk")))
	mustDo(t, err)
	j := s.take("order", named("walk"), w, func(wire.Progress) {})
	for i, c := range []struct {
		size, held int64
		ok         bool
	}{{6, 6, true}, {5, 6, false}, {4, 4, true}, {6, 6, true}, {11, 6, false}} {
		err := s.keepCheckpoint(j, c.size, strings.NewReader(strings.Repeat("x", int(c.size))))
		if (err == nil) != c.ok || s.Room().Held != c.held {
			t.Errorf("%d: %v, %d bytes are held", i, err, s.Room().Held)
		}
	}
	mustDo(t, s.keepCheckpoint(j, 1, strings.NewReader("x")))
	if err := s.keepCheckpoint(j, 2, strings.NewReader("x")); err == nil { // it ends early
		t.Error("half a checkpoint was taken")
	}
	s.disk.free = func(string) (int64, error) { return spareBytes, nil }
	wantProblem(t, s.keepCheckpoint(j, 1, strings.NewReader("x")), wire.Failed, wire.CodeNoSpace, "stay free")
	if s.Room().Held != 1 || s.disk.coming != 0 {
		t.Errorf("%d bytes are held, %d are to come", s.Room().Held, s.disk.coming)
	}
	// In the next life it is there, before anything else.
	s.disk = disk{free: freeOn}
	mustDo(t, s.holdAll(&job{JobRun: wire.JobRun{}, work: &work{dir: w.dir}}, wire.JobLimits{}))
	if s.Room().Held != 1 {
		t.Errorf("%d bytes are held", s.Room().Held)
	}
}
