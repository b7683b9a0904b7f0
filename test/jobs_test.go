package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

const (
	batchTasks   = 1000
	batchDevices = 20
	batchKills   = 3
)

// TestEveryTaskHasOneResultThoughTheCoordinatorIsKilled runs a thousand small tasks
// over twenty simulated devices, of which one is silent, one fails at everything and
// one is slow, while the coordinator is killed and started again. The command that
// began the job goes on through that.
func TestEveryTaskHasOneResultThoughTheCoordinatorIsKilled(t *testing.T) {
	t.Parallel()
	rng := testbed.Seeded(t)
	f := newFleet(t)
	var done atomic.Int64
	reached := make(chan struct{}, batchTasks)
	stop := f.Simulate(batchDevices, testbed.Workers{Slots: 2, Odd: func(ctx context.Context, device int, _ wire.Order) ([]byte, error, bool) {
		switch device {
		case 0:
			<-ctx.Done()
			return nil, ctx.Err(), true
		case 1:
			return nil, wire.FailedBecause(wire.CodeInternal, "this one fails"), true
		case 2:
			select {
			case <-time.After(300 * time.Millisecond): // it is slow
			case <-ctx.Done():
				return nil, ctx.Err(), true
			}
		}
		done.Add(1)
		reached <- struct{}{}
		return nil, nil, false
	}})
	defer stop()

	want := f.putSmall("batch/", batchTasks)

	var out bytes.Buffer
	ended := make(chan error, 1)
	go func() {
		r, err := f.Deimos("job", "map", f.Write("toy.wasm", []byte("toy")), "--over", "batch/*", "--arg", "x", "--verify", "none", "-o", "json")
		out.Write(r.Stdout)
		if err == nil && r.Code != 0 {
			err = errors.New(r.Said())
		}
		ended <- err
	}()
	for range batchKills {
		for range batchTasks/10 + rng.IntN(batchTasks/10) {
			select {
			case <-reached:
			case <-f.Ctx.Done():
				t.Fatal("the tasks are not done")
			}
		}
		f.Serve.Kill()
		f.StartServe()
	}
	if err := <-ended; err != nil {
		t.Fatalf("deimos job map: %v", err)
	}
	got := make(map[string]api.JobResult)
	lines := bufio.NewScanner(&out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r api.JobResult
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		if _, twice := got[r.Name]; twice {
			t.Errorf("%s has two results", r.Name)
		}
		got[r.Name] = r
	}
	attempts := 0
	for name, data := range want {
		r := got[name]
		attempts += len(r.Attempts)
		good := 0
		for _, a := range r.Attempts {
			if a.State == wire.Succeeded {
				good++
			}
		}
		if r.State != wire.Succeeded || good == 0 || !bytes.Equal(r.Output, testbed.Toy([]string{"x"}, data)) {
			t.Errorf("%s: %+v %q", name, r.JobTask, r.Output)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d results of %d tasks", len(got), len(want))
	}
	var list api.JobList
	f.OK(&list, "job", "list")
	if len(list.Jobs) != 1 || list.Jobs[0].State != wire.Succeeded || list.Jobs[0].Succeeded != batchTasks {
		t.Errorf("%+v", list)
	}
	t.Logf("%d tasks, %d given to devices, %d done by them", len(got), attempts, done.Load())
}

// putSmall stores n small files, each on three devices: two may be of no use.
func (f *fleet) putSmall(prefix string, n int) map[string][]byte {
	f.T.Helper()
	return f.putSmallOn(prefix, n, 3)
}

// putSmallOn stores n small files, each on so many devices.
func (f *fleet) putSmallOn(prefix string, n, devices int) map[string][]byte {
	f.T.Helper()
	files := make(map[string][]byte, n)
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(16)
	for i := range n {
		g.Go(func() error {
			name, data := fmt.Sprintf("%s%05d", prefix, i), fmt.Appendf(nil, "this is file %d\n", i)
			id := chunk.Sum(data).String()
			if _, err := f.Client.PutChunk(f.Ctx, id, data, devices); err != nil {
				return err
			}
			sum := sha256.Sum256(data)
			_, err := f.Client.PutObject(f.Ctx, api.Object{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:]), Chunks: []api.Chunk{{ID: id, Size: int64(len(data))}}})
			mu.Lock()
			defer mu.Unlock()
			files[name] = data
			return err
		})
	}
	if err := g.Wait(); err != nil {
		f.T.Fatal(err)
	}
	return files
}

// looping is a module that never returns.
const looping = "\x00asm\x01\x00\x00\x00" +
	"\x01\x04\x01\x60\x00\x00" + // type 0: no parameters, no results
	"\x03\x02\x01\x00" + // one function of type 0
	"\x07\x0a\x01\x06_start\x00\x00" + // which is exported
	"\x0a\x09\x01\x07\x00\x03\x40\x0c\x00\x0b\x0b" // and goes round for ever

// TestJobsOfTheCommandLine is what a fleet manager does with jobs, on real devices.
func TestJobsOfTheCommandLine(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(2, false)
	texts := map[string]string{"a": "one two three\n", "b": "four five\n", "c": "\n"}
	for name, text := range texts {
		f.Put("texts-"+name, []byte(text))
	}

	f.Sub("map writes a file for each", func(t *testing.T) {
		dir := f.Path("counts")
		f.OK(nil, "job", "map", testbed.Guest("wordcount"), "--over", "texts-*", "--out", dir)
		for name, text := range texts {
			raw, err := os.ReadFile(dir + "/texts-" + name)
			var words struct{ Words int }
			if err == nil {
				err = json.Unmarshal(raw, &words)
			}
			if want := len(strings.Fields(text)); err != nil || words.Words != want {
				t.Errorf("%s has %d words, not %d: %v", name, want, words.Words, err)
			}
		}
	})
	f.Sub("map runs with the arguments of each line", func(t *testing.T) {
		list := f.Write("list", []byte("one 'two three'\n\n--four\n"))
		module := f.Write("echo.wasm", []byte(echo))
		out := f.Path("lines")
		f.OK(nil, "job", "map", module, "--arg-file", list, "--input", "stdin=texts-b", "--out", out)
		for _, n := range []string{"1", "2"} {
			if raw, err := os.ReadFile(out + "/" + n); err != nil || string(raw) != texts["b"] {
				t.Errorf("task %s: %q %v", n, raw, err)
			}
		}
		r, err := f.Deimos("job", "map", module, "-a", list, "--arg", "all", "--input", "stdin=texts-b")
		said := strings.Split(strings.TrimSpace(string(r.Stdout)), "\n")
		slices.Sort(said)
		if want := []string{"--four\tfour five", "one two three\tfour five"}; err != nil || r.Code != 0 || !slices.Equal(said, want) {
			t.Errorf("it says %q, want %q: %v %s", said, want, err, r.Stderr)
		}
		var newest api.OrderList
		f.OK(&newest, "order", "list", "--kind", string(wire.KindJobRun), "--limit", "1")
		v, err := f.Client.Order(f.Ctx, newest.Orders[0].Device, newest.Orders[0].ID, 0)
		if err != nil || !strings.Contains(string(v.Order.Body), `"all"`) {
			t.Errorf("%s %v", v.Order.Body, err)
		}
		f.Fails(nil, 64, "job", "map", module)
		f.Fails(nil, 64, "job", "map", module, "-a", list, "--over", "texts-*")
	})
	loop := f.Write("endless.wasm", []byte(looping))
	begin := func() (j api.Job, a api.JobAttempt) {
		f.OK(&j, "job", "run", loop, "--input", "texts-a", "--wall", "10m", "--cpu", "10m", "--start")
		f.Until("the job running", func() bool {
			v, err := f.Client.Job(f.Ctx, j.ID, 0)
			if err != nil || len(v.Open) != 1 {
				return false
			}
			a = v.Open[0].Attempts[0]
			return a.State == wire.Running
		})
		return j, a
	}
	f.Sub("a job that is canceled stops on its device", func(t *testing.T) {
		j, a := begin()
		if said := f.Fails(nil, 75, "job", "wait", j.ID, "--timeout", "100ms"); !strings.Contains(said, j.ID) {
			t.Errorf("it says %q", said)
		}
		f.OK(nil, "job", "cancel", j.ID, "--reason", "enough")
		if said := f.Fails(nil, 1, "job", "wait", j.ID); !strings.Contains(said, "enough") {
			t.Errorf("it says %q", said)
		}
		f.Until("the device stopping", func() bool {
			o, err := f.Client.Order(f.Ctx, a.Device, a.Order, 0)
			return err == nil && o.State == wire.Canceled
		})
		f.Fails(nil, 1, "job", "cancel", j.ID)
	})
	f.Sub("a job goes on though its coordinator is killed", func(t *testing.T) {
		j, a := begin()
		f.Serve.Kill()
		f.StartServe()
		v, err := f.Client.Job(f.Ctx, j.ID, 0)
		if err != nil || v.State != wire.Running || len(v.Open) != 1 || v.Open[0].Attempts[0].Order != a.Order {
			t.Errorf("after a restart: %+v %v", v, err)
		}
		for _, d := range f.devices {
			d.awaitOnline()
		}
		f.OK(nil, "job", "cancel", j.ID)
		f.Fails(nil, 1, "job", "results", j.ID)
	})
	for flag, word := range map[string]string{"": "goes on", "--cancel-on-interrupt": "is canceled"} {
		f.Sub("Ctrl-C, and it "+word, func(t *testing.T) {
			args := []string{testbed.Program("deimos"), "job", "run", loop, "--input", "texts-a", "--wall", "10m", "--cpu", "10m"}
			if flag != "" {
				args = append(args, flag)
			}
			p := f.Start(proc.Command{Name: "the command", Log: f.Path("logs", "command"+flag+".log"), Argv: args, Env: []string{"DEIMOS_CONTEXT=" + f.Path("coordinator", "operator.json")}})
			var id string
			f.Until("the job running", func() bool {
				list, err := f.Client.Jobs(f.Ctx, api.JobQuery{State: wire.Running})
				if err == nil && len(list.Jobs) == 1 {
					id = list.Jobs[0].ID
				}
				return id != ""
			})
			p.Signal(syscall.SIGINT)
			<-p.Done()
			if p.ExitCode() != 130 || !strings.Contains(p.LastWords(), id+" "+word) {
				t.Errorf("code %d: %s", p.ExitCode(), p.LastWords())
			}
			if flag == "" {
				f.OK(nil, "job", "cancel", id)
			}
			var j api.Job
			f.Fails(&j, 1, "job", "wait", id)
			if j.State != wire.Canceled {
				t.Errorf("it is %s", j.State)
			}
		})
	}
}
