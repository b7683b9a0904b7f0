package coordinator

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// module uploads one that toyCompute runs.
func (w *world) module(t testing.TB) string {
	t.Helper()
	id, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	return id
}

// waitsFor begins a job that cannot be placed now, and ends it again.
func (w *world) waitsFor(t testing.TB, s api.JobSpec, code string) {
	t.Helper()
	j, err := w.op.StartJob(testContext(t), s)
	must(t, err)
	var last api.Job
	eventually(t, "the job waits: "+code, func() bool {
		last, err = w.op.Job(testContext(t), j.ID, 0)
		must(t, err)
		return last.Waits != nil && last.Waits.Code == code
	})
	if !strings.Contains(last.Waits.Reason, " ") || last.State != wire.Queued {
		t.Errorf("%s: %+v", last.State, last.Waits)
	}
	_, err = w.op.CancelJob(testContext(t), j.ID, api.CancelRequest{})
	must(t, err)
	j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	if j.State != wire.Canceled {
		t.Errorf("a job that was canceled is %s: %s", j.State, j.Reason)
	}
}

// jobWorld is a coordinator whose jobs hurry.
func jobWorld(t testing.TB) *world {
	t.Helper()
	w := openWith(t, t.TempDir(), hurried)
	t.Cleanup(w.Close)
	return w
}

func hurried(c *Config) {
	c.jobPace = jobPace{retry: time.Millisecond, silent: time.Minute, away: 50 * time.Millisecond, rest: time.Millisecond, late: 20 * time.Millisecond,
		lease: time.Minute, kept: api.OutputKept, module: stagingLife / 3}
}

// input is a job over the first chunk of a stored file.
func input(module, object string) api.JobSpec {
	return api.JobSpec{Module: module, Input: &api.JobChunk{Object: object}}
}

func on(d *device) api.JobNeeds { return api.JobNeeds{Device: d.id} }

func wantProblem(t testing.TB, err error, state wire.State, code string) {
	t.Helper()
	var p *wire.Problem
	if !errors.As(err, &p) || p.State != state || p.Code != code || !strings.Contains(p.Reason, " ") {
		t.Errorf("got %+v (%v), want %s %s", p, err, state, code)
	}
}

func TestJobsRunAndTheirResultsBelongTogether(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	ctx := testContext(t)
	d, _ := w.device(t), w.device(t)
	module := w.module(t)
	data := someBytes(1000)
	w.putFile(t, "job", data, 2)
	ask := input(module, "job")
	ask.Args, ask.Needs = []string{"a b"}, on(d)
	want, _ := toyCompute(ctx, []byte("module"), ask.Args, data)
	j, err := w.op.RunJob(ctx, ask)
	if err != nil || string(j.Output) != string(want) || j.Device != d.id || len(j.Report) == 0 || len(j.Attempts) != 1 {
		t.Errorf("%+v %v", j, err)
	}
	large := someBytes(wire.MaxInline + 1)
	ask.Retries = -1
	for name, c := range map[string]struct {
		f    func(o wire.Order) *reply
		code string
	}{
		"it fails":       {func(wire.Order) *reply { return failed(wire.CodeLimit) }, wire.CodeLimit},
		"no result":      {func(wire.Order) *reply { return &reply{state: wire.Succeeded} }, wire.CodeMismatch},
		"another output": {func(o wire.Order) *reply { return d.compute(o, func(*wire.JobResult, []byte) []byte { return large }) }, wire.CodeMismatch},
		"another job": {func(o wire.Order) *reply {
			return d.compute(o, func(r *wire.JobResult, out []byte) []byte { r.Input = strings.Repeat("0", 64); return out })
		}, wire.CodeMismatch},
		"outputs that nobody wanted": {func(o wire.Order) *reply {
			return d.compute(o, func(r *wire.JobResult, out []byte) []byte { r.Outputs = make([]wire.JobOutput, 1); return out })
		}, wire.CodeMismatch},
	} {
		d.on(wire.KindJobRun, c.f)
		_, err := w.op.RunJob(ctx, ask)
		t.Log(name)
		wantProblem(t, err, wire.Failed, c.code)
	}
	// A result that is too large for a message comes by the data plane.
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		return d.compute(o, func(r *wire.JobResult, _ []byte) []byte {
			s := sha256.Sum256(large)
			r.Output = hex.EncodeToString(s[:])
			return large
		})
	})
	if j, err = w.op.RunJob(ctx, ask); err != nil || string(j.Output) != string(large) {
		t.Errorf("%d bytes, %v", len(j.Output), err)
	}
	// It is taken in for orders that are under way, from their own device.
	if status, _ := d.transfer(http.MethodPut, "/data/v1/attachment/"+j.Order, []byte("late")); status != http.StatusNotFound {
		t.Errorf("an attachment for a finished order: %d", status)
	}
	d.on(wire.KindUpdateInstall, silent)
	o := w.offer(t, d)
	if status, _ := w.device(t).transfer(http.MethodPut, "/data/v1/attachment/"+o.ID, []byte("other")); status != http.StatusNotFound {
		t.Errorf("an attachment for another's order: %d", status)
	}
	other := w.device(t)
	elsewhere := input(module, "job")
	elsewhere.Needs = on(other)
	nobody := input(module, "job")
	nobody.Needs.Device = "x"
	for _, bad := range []struct {
		q      api.JobSpec
		status int
		code   string
	}{
		{input(module, "none"), http.StatusNotFound, wire.CodeNotFound},
		{api.JobSpec{Module: module, Input: &api.JobChunk{Object: "job", Chunk: 1}}, http.StatusBadRequest, "no_such_chunk"},
		{api.JobSpec{Module: module, Input: &api.JobChunk{Object: "job", Chunk: -1}}, http.StatusBadRequest, "no_such_chunk"},
		{input("x", "job"), http.StatusBadRequest, "bad_module"},
		{input(strings.Repeat("0", 64), "job"), http.StatusNotFound, "no_module"},
		{elsewhere, http.StatusConflict, "not_a_holder"},
		{nobody, http.StatusNotFound, wire.CodeNotFound},
		{api.JobSpec{Module: module, Copies: api.MaxCopies + 1}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Module: module, Outputs: []string{"../x"}}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Module: module, Inputs: []api.JobInput{{Name: "a"}}}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Module: module, Inputs: []api.JobInput{{Name: "a", Object: "job"}, {Name: "a", Dataset: "b"}}}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Module: module, Deadline: time.Now().Add(-time.Minute)}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Module: module, Rank: api.MaxRank + 1}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Module: module, Rank: math.MinInt}, http.StatusBadRequest, "bad_job"},
		{api.JobSpec{Module: module, Over: &api.JobOver{Prefix: "nothing begins so"}}, http.StatusNotFound, wire.CodeNotFound},
		{api.JobSpec{Module: module, Over: &api.JobOver{Prefix: "job"}, Save: map[string]string{"stdout": "one"}}, http.StatusBadRequest, "bad_job"},
	} {
		_, err := w.op.RunJob(ctx, bad.q)
		wantRefusal(t, err, bad.status, bad.code)
	}
}

// jobs are orders to run one that a device was given, repeats left out.
type ordersTaken struct {
	mu     sync.Mutex
	orders []wire.Order
}

func (k *ordersTaken) add(o wire.Order) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.orders = append(k.orders, o)
}

// What one device cannot do, another does; what the module fails at is tried once
// more elsewhere, to be sure.
func TestWhatADeviceCannotDoIsTriedOnAnother(t *testing.T) {
	t.Parallel()
	for code, c := range map[string]struct {
		always   bool // every device says so
		attempts int
		ok       bool
	}{
		wire.CodeTransfer: {false, 2, true},
		wire.CodeInternal: {true, 1 + api.DefaultRetries, false},
		codeGuestFailed:   {true, 2, false},
		codeBadModule:     {false, 2, true},
		wire.CodeBadBody:  {true, 1, false},
		wire.CodeLost:     {false, 2, true},
	} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			w := jobWorld(t)
			ds := w.devices(t, 2)
			w.putFile(t, "in", someBytes(100), 2)
			var bad atomic.Int64
			for _, d := range ds {
				d.on(wire.KindJobRun, func(o wire.Order) *reply {
					if bad.Add(1) == 1 || c.always {
						return failed(code)
					}
					return d.compute(o, nil)
				})
			}
			q := input(w.module(t), "in")
			q.Verify = api.VerifyNone
			r, err := w.op.RunJob(testContext(t), q)
			if (err == nil) != c.ok || len(r.Attempts) != c.attempts {
				t.Fatalf("%v %+v", err, r.JobTask)
			}
			if !c.ok {
				wantProblem(t, err, wire.Failed, code)
			}
			if c.attempts > 1 && r.Attempts[0].Device == r.Attempts[1].Device {
				t.Error("the same device was asked again, and there is another")
			}
		})
	}
}

// A device that is gone, or lets a job stand still, is not waited for alone.
func TestWhoDoesNotGoOnIsNotWaitedForAlone(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]bool{"gone": true, "still": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := jobWorld(t)
			ds := w.devices(t, 2)
			w.putFile(t, "in", someBytes(100), 2)
			var first atomic.Pointer[device]
			begun := make(chan wire.Order, 1)
			for _, d := range ds {
				d.on(wire.KindJobRun, func(o wire.Order) *reply {
					if first.CompareAndSwap(nil, d) {
						begun <- o
					}
					if first.Load() == d { // what it does not answer comes again
						return nil
					}
					return d.compute(o, nil)
				})
			}
			results := make(chan api.JobResult, 1)
			go func() {
				q := input(w.module(t), "in")
				q.Verify = api.VerifyNone
				r, err := w.op.RunJob(testContext(t), q)
				if err != nil {
					t.Error(err)
				}
				results <- r
			}()
			o := next(t, begun, "the order")
			d := first.Load()
			if leave {
				d.leave()
			} else {
				d.say(wire.ChannelReport, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 1, State: wire.Running, Code: "hot", Reason: "it is too hot", At: time.Now()})
			}
			r := next(t, results, "the result")
			if r.Device == d.id || len(r.Attempts) != 2 {
				t.Errorf("%+v", r.JobTask)
			}
			// Nobody waits for the first any more, and it is told so.
			eventually(t, "the first order is canceled", func() bool {
				v, err := w.outbox.get(testContext(t), d.id, o.ID)
				return err == nil && v.Cancel != nil
			})
		})
	}
}

// Results are compared, and what more than half of the devices say stands.
func TestCopiesAreCompared(t *testing.T) {
	t.Parallel()
	w := openWith(t, t.TempDir(), func(c *Config) {
		hurried(c)
		c.Compute = nil // it cannot find out who lies
	})
	t.Cleanup(w.Close)
	ds := w.devices(t, 3)
	w.putFile(t, "in", someBytes(100), 3)
	lie := func(d *device, as string) {
		d.on(wire.KindJobRun, func(o wire.Order) *reply {
			return d.compute(o, func(r *wire.JobResult, _ []byte) []byte {
				s := sha256.Sum256([]byte(as))
				r.Output, r.OutputBytes = hex.EncodeToString(s[:]), int64(len(as))
				return []byte(as)
			})
		})
	}
	q := input(w.module(t), "in")
	q.Copies = 3
	r, err := w.op.RunJob(testContext(t), q)
	must(t, err)
	if len(r.Attempts) != 3 || r.Reason != "" {
		t.Errorf("%+v", r.JobTask)
	}
	seen := map[wire.DeviceID]bool{}
	for _, a := range r.Attempts {
		seen[a.Device] = true
		if a.Result != r.Attempts[0].Result || a.Result == "" {
			t.Errorf("%+v", a)
		}
	}
	if len(seen) != 3 {
		t.Errorf("%d devices ran 3 copies", len(seen))
	}
	lie(ds[0], "a lie")
	r, err = w.op.RunJob(testContext(t), q)
	if err != nil || string(r.Output) == "a lie" || r.Device == ds[0].id || !strings.Contains(r.Reason, "2 of 3") {
		t.Errorf("%v %+v", err, r.JobTask)
	}
	lie(ds[1], "another")
	_, err = w.op.RunJob(testContext(t), q)
	wantProblem(t, err, wire.Failed, codeDisagree)
}

// tell has a device say how it stands with jobs.
func (d *device) tell(j *wire.JobsState) {
	d.t.Helper()
	d.say(wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, At: time.Now(), Capacity: d.capacity, Jobs: j})
	eventually(d.t, "the device's word on jobs is heard", func() bool {
		rec, _ := d.w.reg.rows.get(string(d.id))
		v := d.w.reg.view(rec).Jobs
		return (v == nil) == (j == nil) && (v == nil || v.Slots == j.Slots && v.Engine == j.Engine && v.MemoryBytes == j.MemoryBytes && (v.Pause == nil) == (j.Pause == nil) && len(v.Datasets) == len(j.Datasets) && v.Live == j.Live)
	})
	d.w.jobs.plan.mu.Lock()
	d.w.jobs.plan.looked = time.Unix(0, 0) // or jobs are placed by what was known a moment ago
	d.w.jobs.plan.mu.Unlock()
}

func ready() *wire.JobsState {
	return &wire.JobsState{Host: 1, Engine: toyOnDevices, Slots: 1, MemoryBytes: 1 << 30, WallSeconds: 900, Live: true, Sensors: true, Datasets: []string{"photos"}}
}

func TestAJobThatNoDeviceCanDoWaitsAndSaysWhy(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	module := w.module(t)
	w.waitsFor(t, api.JobSpec{Module: module}, waitsNoDevice)
	d := w.device(t)
	with := func(edit func(q *api.JobSpec)) api.JobSpec {
		q := api.JobSpec{Module: module}
		edit(&q)
		return q
	}
	w.waitsFor(t, with(func(q *api.JobSpec) { q.Live = true }), "too_old")
	w.putFile(t, "some", someBytes(100), 1)
	for code, q := range map[string]api.JobSpec{
		"memory":     with(func(q *api.JobSpec) { q.Limits.MemoryBytes = 1 << 30 }),
		"memory ":    with(func(*api.JobSpec) {}),
		"wall_time":  with(func(q *api.JobSpec) { q.Limits.WallSeconds = 1000 }),
		"live":       with(func(q *api.JobSpec) { q.Live = true }),
		"dataset":    with(func(q *api.JobSpec) { q.Inputs = []api.JobInput{{Name: "a", Dataset: "letters/2024"}} }),
		"sensors":    with(func(q *api.JobSpec) { q.Inputs = []api.JobInput{{Name: "a", Sensors: &wire.HistoryRequest{}}} }),
		"arch":       with(func(q *api.JobSpec) { q.Needs.Arch = "amd64" }),
		"engine":     with(func(q *api.JobSpec) { q.Needs.Compiled = true }),
		"paused":     with(func(*api.JobSpec) {}),
		"distrusted": with(func(*api.JobSpec) {}),
		waitsHolder:  with(func(q *api.JobSpec) { q.Input = &api.JobChunk{Object: "in"} }),
		"policy":     with(func(*api.JobSpec) {}),
		"input": with(func(q *api.JobSpec) {
			q.Inputs = []api.JobInput{{Name: "a", Object: "some"}, {Name: "b", Object: "some"}}
		}),
		"input ":       with(func(q *api.JobSpec) { q.Input = &api.JobChunk{Object: "some"} }), // read from the store
		"disk":         with(func(q *api.JobSpec) { q.Inputs = []api.JobInput{{Name: "a", Object: "some"}} }),
		"disk ":        with(func(q *api.JobSpec) { q.Outputs = []string{"table"} }), // as much as it may write
		waitsNoDevice:  with(func(q *api.JobSpec) { q.Needs.Device = w.enrolled(t).id }),
		"drained":      with(func(*api.JobSpec) {}),
		"whole again ": with(func(q *api.JobSpec) { q.Input = &api.JobChunk{Object: "some"} }),
	} {
		st := ready()
		w.jobs.trust, w.jobs.leaving = func(wire.DeviceID, trust.Standing) float64 { return 1 }, func(wire.DeviceID) bool { return false }
		switch code {
		case "live", "sensors":
			st.Live, st.Sensors = false, false
		case "engine":
			st.Engine = toyInterpreted
		case "paused":
			st.Pause = &wire.Pause{Code: "paused"}
		case "policy":
			st.Slots = 0
		case "memory":
			st.MemoryBytes = 1<<30 - 1
		case "input":
			st.InputBytes = 2*100 - 1
		case "input ":
			st.InputBytes = 100 - 1
		case "disk":
			st.DiskBytes = new(int64(100 - 1))
		case "disk ":
			st.OutputBytes, st.DiskBytes = 1000, new(int64(1000-1))
		case "whole again ":
			st.InputBytes, st.DiskBytes = 100, new(int64(0)) // it reads just so much, and needs no file
		case "memory ": // less than a job has that does not say what it wants
			st.MemoryBytes = wire.OrdinaryLimits.MemoryBytes - 1
		}
		d.tell(st)
		switch code {
		case "distrusted":
			w.jobs.trust = func(wire.DeviceID, trust.Standing) float64 { return 0 }
		case "drained":
			w.jobs.leaving = func(wire.DeviceID) bool { return true }
		case waitsHolder:
			w.putFile(t, "in", someBytes(100), 1)
			o, err := w.storage.object("in")
			must(t, err)
			must(t, w.storage.lost(testContext(t), d.id, []string{o.Chunks[0].ID}))
		case "whole again ":
			d.on(wire.KindJobRun, func(o wire.Order) *reply { return d.compute(o, nil) })
			if _, err := w.op.RunJob(testContext(t), q); err != nil {
				t.Errorf("what nothing keeps from its device: %v", err)
			}
			continue
		}
		t.Log(code)
		w.waitsFor(t, q, strings.TrimSpace(code))
	}
}

// Of one job, a file that no device may read keeps none that is smaller.
func TestWhatNoDeviceMayReadKeepsNoOtherTask(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	d := w.device(t)
	for i, size := range []int{300, 200, 100, 50} {
		w.putFile(t, fmt.Sprintf("f/%d", i), someBytes(size), 1)
	}
	d.on(wire.KindJobRun, func(o wire.Order) *reply { return d.compute(o, nil) })
	st := ready()
	st.Orders, st.InputBytes, st.DiskBytes = wire.JobOrders, 200, new(int64(100))
	d.tell(st)
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "f/", As: "data"}})
	must(t, err)
	eventually(t, "the two that fit are done, and it is said why the others wait", func() bool {
		j, err := w.op.Job(testContext(t), j.ID, 0)
		must(t, err)
		return j.Succeeded == 2 && j.Waits != nil && (j.Waits.Code == "input" || j.Waits.Code == "disk")
	})
}

// prefixed stores n files of a hundred bytes, each on copies devices.
func (w *world) prefixed(t testing.TB, prefix string, n, copies int) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte, n)
	for i := range n {
		name := fmt.Sprintf("%s%04d", prefix, i)
		files[name] = someBytes(100)
		w.putFile(t, name, files[name], copies)
	}
	return files
}

// gather takes all results of a job, and no task's twice.
func (w *world) gather(t testing.TB, id string) map[string]api.JobResult {
	t.Helper()
	got := make(map[string]api.JobResult)
	must(t, w.op.EachJobResult(testContext(t), id, func(r api.JobResult) error {
		if _, twice := got[r.Name]; twice {
			t.Errorf("%s came twice", r.Name)
		}
		got[r.Name] = r
		return nil
	}, nil))
	return got
}

func wantToy(t testing.TB, files map[string][]byte, got map[string]api.JobResult) {
	t.Helper()
	for name, data := range files {
		want, _ := toyCompute(context.Background(), []byte("module"), nil, data)
		if r := got[name]; r.Err() != nil || string(r.Output) != string(want) {
			t.Errorf("%s: %v %q %+v", name, r.Err(), r.Output, r.JobTask)
		}
	}
	if len(got) != len(files) {
		t.Errorf("%d results of %d files", len(got), len(files))
	}
}

func TestAJobOverFilesHasAResultOfEach(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	w.devices(t, 3)
	files := w.prefixed(t, "logs/", 40, 2)
	w.putFile(t, "other", someBytes(100), 1)
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "logs/"}})
	must(t, err)
	if j.Tasks != 40 {
		t.Errorf("%d tasks", j.Tasks)
	}
	wantToy(t, files, w.gather(t, j.ID))
	end, err := w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	if end.State != wire.Succeeded || end.Succeeded != 40 || end.Failed != 0 || end.Running != 0 {
		t.Errorf("%+v", end)
	}
	list, err := w.op.Jobs(testContext(t), api.JobQuery{})
	if err != nil || len(list.Jobs) != 1 || list.Jobs[0].ID != j.ID || list.Jobs[0].State != wire.Succeeded {
		t.Errorf("%+v %v", list, err)
	}
	if list, _ := w.op.Jobs(testContext(t), api.JobQuery{Pending: true}); len(list.Jobs) != 0 {
		t.Errorf("%d jobs are pending", len(list.Jobs))
	}
	_, err = w.op.CancelJob(testContext(t), j.ID, api.CancelRequest{})
	wantRefusal(t, err, http.StatusConflict, "ended")
	_, err = w.op.Job(testContext(t), "none", 0)
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
}

// What was begun before a restart is gone on from, and each task has one result.
func TestJobsSurviveARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	edit := func(c *Config) {
		hurried(c)
		c.even = func() float64 { return 0.999 } // no third look, which is an order too
	}
	w := openWith(t, dir, edit)
	ds := w.devices(t, 3)
	files := w.prefixed(t, "f/", 30, 3)
	var runs ordersTaken
	hold := make(chan struct{})
	var answered atomic.Int64
	for _, d := range ds {
		d.on(wire.KindJobRun, func(o wire.Order) *reply {
			if answered.Add(1) > 45 { // after the restart the order comes again
				select {
				case <-hold:
				default:
					return nil
				}
			}
			runs.add(o)
			return d.compute(o, nil)
		})
	}
	done, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "f/"}})
	must(t, err)
	eventually(t, "half of it is done", func() bool {
		j, err := w.op.Job(testContext(t), done.ID, 0)
		return err == nil && j.Succeeded > 10
	})
	before, err := w.op.JobResults(testContext(t), done.ID, "", 0)
	must(t, err)
	w.Close()
	close(hold)
	w = openWith(t, dir, edit)
	t.Cleanup(w.Close)
	for _, d := range ds {
		d.connect(w)
		t.Cleanup(d.leave)
	}
	// A cursor of the former life begins anew: nothing is left out.
	again, err := w.op.JobResults(testContext(t), done.ID, before.Next, 0)
	must(t, err)
	for _, r := range before.Results {
		if !slices.ContainsFunc(again.Results, func(x api.JobResult) bool { return x.Task == r.Task && x.Order == r.Order }) {
			t.Errorf("the result of %s was forgotten, or is another", r.Name)
		}
	}
	got := w.gather(t, done.ID)
	wantToy(t, files, got)
	// Nothing was done twice that was not tried again.
	attempts := 0
	for _, r := range got {
		attempts += len(r.Attempts)
	}
	seen := map[string]bool{}
	runs.mu.Lock()
	for _, o := range runs.orders {
		seen[o.ID] = true
	}
	runs.mu.Unlock()
	if len(seen) > attempts {
		t.Errorf("%d orders were carried out, the tasks know of %d", len(seen), attempts)
	}
}

// A task that takes far longer than the others is given to another device too.
func TestAStragglerIsDoubled(t *testing.T) {
	t.Parallel()
	// Longer than others are held up on a busy machine, and not so long as what makes a device silent.
	const late = 30 * time.Second
	w := openWith(t, t.TempDir(), func(c *Config) { hurried(c); c.jobPace.late = late })
	t.Cleanup(w.Close)
	ds := w.devices(t, 3)
	files := w.prefixed(t, "s/", 20, 3)
	var stuck atomic.Pointer[wire.Order]
	for _, d := range ds {
		d.on(wire.KindJobRun, func(o wire.Order) *reply {
			if stuck.CompareAndSwap(nil, &o); stuck.Load().ID == o.ID { // repeats too
				return nil
			}
			return d.compute(o, nil)
		})
	}
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "s/"}, Verify: api.VerifyNone})
	must(t, err)
	eventually(t, "all but one are done", func() bool {
		v, err := w.op.Job(testContext(t), j.ID, 0)
		return err == nil && v.Succeeded == len(files)-1
	})
	w.advance(late)
	got := w.gather(t, j.ID)
	wantToy(t, files, got)
	doubled := 0
	for _, r := range got {
		doubled += len(r.Attempts) - 1
	}
	if doubled != 1 {
		t.Errorf("%d tasks were given to a second device", doubled)
	}
	o := stuck.Load()
	eventually(t, "the straggler is canceled", func() bool {
		v, err := w.outbox.get(testContext(t), o.Device, o.ID)
		return err == nil && v.Cancel != nil
	})
}

func TestACanceledJobStopsWhatRuns(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	d := w.device(t)
	w.prefixed(t, "c/", 5, 1)
	begun := make(chan wire.Order, 64) // with those that come again
	d.on(wire.KindJobRun, func(o wire.Order) *reply { passOn(begun, o); return nil })
	canceled := make(chan wire.Order, 5)
	d.on(wire.KindOrderCancel, func(o wire.Order) *reply { canceled <- o; return &reply{state: wire.Succeeded} })
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "c/"}})
	must(t, err)
	o := next(t, begun, "an order")
	_, err = w.op.CancelJob(testContext(t), j.ID, api.CancelRequest{Reason: "not wanted"})
	must(t, err)
	c := next(t, canceled, "its cancel")
	if b, _ := wire.DecodeBody[wire.OrderCancel](c); b.Order != o.ID {
		t.Errorf("order %s was canceled, %s runs", b.Order, o.ID)
	}
	end, err := w.op.AwaitJob(testContext(t), j.ID, nil)
	if err != nil || end.State != wire.Canceled || !strings.Contains(end.Reason, "not wanted") || end.Failed != 5 {
		t.Errorf("%+v %v", end, err)
	}
	for range len(begun) {
		if late := <-begun; late.ID != o.ID {
			t.Errorf("order %s was begun after that", late.ID)
		}
	}
}

func TestAJobEndsWithItsDeadline(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Deadline: w.time().Add(time.Hour)})
	must(t, err)
	w.advance(2 * time.Hour)
	end, err := w.op.AwaitJob(testContext(t), j.ID, nil)
	if err != nil || end.State != wire.TimedOut || end.Code != wire.CodeLimit {
		t.Errorf("%+v %v", end, err)
	}
	if _, err := w.op.JobOutcome(testContext(t), j.ID); err == nil {
		t.Error("it has a result")
	}
}

// maker has a device answer as one that knows of named inputs and outputs: it writes
// what it reads, as the output "copy".
func (d *device) maker(bend func(*wire.JobResult, *wire.Statement)) func(o wire.Order) *reply {
	return func(o wire.Order) *reply {
		b, _ := wire.DecodeBody[wire.JobRun](o)
		var all []byte
		inputs := []wire.Resource{}
		for _, in := range b.Inputs {
			for _, p := range in.Parts {
				d.mu.Lock()
				data, ok := d.chunks[p.Chunk]
				d.mu.Unlock()
				if (p.URL == "") != ok {
					d.t.Errorf("chunk %s is held: %v, and its address is %q", p.Chunk, ok, p.URL)
				}
				if !ok {
					status, got := d.transfer(http.MethodGet, p.URL, nil)
					if status != http.StatusOK || chunk.Sum([]byte(got)).String() != p.Chunk {
						return failed(wire.CodeTransfer)
					}
					data = []byte(got)
				}
				all = append(all, data...)
			}
			res := wire.Resource{Name: in.Name, Digest: map[string]string{}}
			if len(in.Parts) == 1 {
				res.Digest["deimosChunk"] = in.Parts[0].Chunk
			}
			inputs = append(inputs, res)
		}
		sum, none := sha256.Sum256(all), sha256.Sum256(nil)
		id := chunk.Sum(all).String()
		d.mu.Lock()
		d.chunks[id] = all
		d.mu.Unlock()
		r := wire.JobResult{Module: b.Module.SHA256, Output: hex.EncodeToString(none[:]), Engine: toyOnDevices,
			Outputs: []wire.JobOutput{{Name: "copy", SHA256: hex.EncodeToString(sum[:]), Size: int64(len(all)), Parts: []wire.JobPart{{Chunk: id, Size: int64(len(all))}}}}}
		st := wire.Statement{Type: wire.StatementType, PredicateType: wire.JobPredicateType,
			Subject:   []wire.Resource{{Name: wire.Stdout, Digest: map[string]string{"sha256": r.Output}}, {Name: "copy", Digest: map[string]string{"sha256": r.Outputs[0].SHA256, "deimosChunk": id}}},
			Predicate: wire.JobPredicate{Order: o.ID, Device: d.id, Module: wire.Resource{Digest: map[string]string{"sha256": b.Module.SHA256}}, Args: b.Args, Env: b.Env, Inputs: inputs, Live: b.Live}}
		if bend != nil {
			bend(&r, &st)
		}
		r.Statement, _ = wire.Seal(d.key, wire.TypeStatement, st)
		return &reply{state: wire.Succeeded, body: r}
	}
}

// A named input goes to a device that does not hold it; a named output is known, can
// be read, and is kept if it is saved.
func TestInputsAreMovedAndOutputsAreKept(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	ctx := testContext(t)
	holder, d := w.device(t), w.enrolled(t)
	data := someBytes(5000)
	w.putFile(t, "in", data, 1)
	d.connect(w)
	t.Cleanup(d.leave)
	d.tell(ready())
	d.on(wire.KindJobRun, d.maker(nil))
	q := api.JobSpec{Module: w.module(t), Args: []string{"x"}, Env: map[string]string{"K": "v"}, Inputs: []api.JobInput{{Name: "data", Object: "in"}}, Outputs: []string{"copy"},
		Verify: api.VerifyNone} // or others run it, too, and have its output
	r, err := w.op.RunJob(ctx, q)
	must(t, err)
	if r.Device != d.id || len(r.Result.Outputs) != 1 {
		t.Fatalf("%+v", r)
	}
	id := chunk.Sum(data).String()
	got, err := w.op.GetChunkFrom(ctx, id, d.id)
	if err != nil || string(got) != string(data) {
		t.Errorf("the output cannot be read: %v", err)
	}
	// Who has the input already is asked first.
	holder.on(wire.KindJobRun, holder.maker(nil))
	holder.tell(ready())
	must(t, w.storage.lost(ctx, d.id, []string{id}))
	d.mu.Lock()
	delete(d.chunks, id)
	d.mu.Unlock()
	for range 3 {
		if r, err := w.op.RunJob(ctx, q); err != nil || r.Device != holder.id {
			t.Errorf("the input was moved to %s: %v", r.Device, err)
		}
	}
	// Another output, that nobody saves, goes after a week.
	w.putFile(t, "in2", someBytes(3000), 1)
	q.Inputs[0].Object = "in2"
	r, err = w.op.RunJob(ctx, q)
	must(t, err)
	part := r.Result.Outputs[0].Parts[0].Chunk
	must(t, w.op.RemoveObject(ctx, "in2"))
	w.advance(6 * 24 * time.Hour)
	must(t, w.storage.dropOrphans(ctx))
	if _, ok := w.storage.chunks.get(part); !ok {
		t.Error("an output was dropped within a week")
	}
	w.advance(2 * 24 * time.Hour)
	must(t, w.storage.dropOrphans(ctx))
	if _, ok := w.storage.chunks.get(part); ok {
		t.Error("an output that nobody saved is kept for more than a week")
	}
	// One that is saved is a file.
	q.Inputs[0].Object, q.Save = "in", map[string]string{"copy": "saved"}
	if _, err := w.op.RunJob(ctx, q); err != nil {
		t.Error(err)
	}
	w.advance(30 * 24 * time.Hour)
	must(t, w.storage.dropOrphans(ctx))
	o, err := w.op.Object(ctx, "saved")
	must(t, err)
	c, _ := w.storage.chunks.get(id)
	if o.Size != int64(len(data)) || len(o.Chunks) != 1 || o.Chunks[0].ID != id || c.wanted() != defaultReplicas {
		t.Errorf("%+v, %d copies wanted", o, c.wanted())
	}
	// A name that is taken is no success.
	q.Save = map[string]string{"copy": "in2"}
	w.putFile(t, "in2", someBytes(10), 1)
	_, err = w.op.RunJob(ctx, q)
	wantProblem(t, err, wire.Failed, "exists")
}

// A statement must say what was asked for, and what the result says.
func TestAStatementAboutAnotherJobIsNotTaken(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	d := w.device(t)
	d.tell(ready())
	w.putFile(t, "in", someBytes(100), 1)
	q := api.JobSpec{Module: w.module(t), Args: []string{"x"}, Inputs: []api.JobInput{{Name: "data", Object: "in"}}, Outputs: []string{"copy"}, Retries: -1}
	zero := strings.Repeat("0", 64)
	for name, bend := range map[string]func(*wire.JobResult, *wire.Statement){
		"order":          func(_ *wire.JobResult, s *wire.Statement) { s.Predicate.Order = "x" },
		"device":         func(_ *wire.JobResult, s *wire.Statement) { s.Predicate.Device = "x" },
		"module":         func(_ *wire.JobResult, s *wire.Statement) { s.Predicate.Module.Digest["sha256"] = zero },
		"arguments":      func(_ *wire.JobResult, s *wire.Statement) { s.Predicate.Args = nil },
		"environment":    func(_ *wire.JobResult, s *wire.Statement) { s.Predicate.Env = map[string]string{"A": "b"} },
		"live":           func(_ *wire.JobResult, s *wire.Statement) { s.Predicate.Live = true },
		"input":          func(_ *wire.JobResult, s *wire.Statement) { s.Predicate.Inputs[0].Digest["deimosChunk"] = zero },
		"no input":       func(_ *wire.JobResult, s *wire.Statement) { s.Predicate.Inputs = nil },
		"output":         func(_ *wire.JobResult, s *wire.Statement) { s.Subject[1].Digest["sha256"] = zero },
		"no output":      func(_ *wire.JobResult, s *wire.Statement) { s.Subject = s.Subject[:1] },
		"type":           func(_ *wire.JobResult, s *wire.Statement) { s.Type = "x" },
		"result's size":  func(r *wire.JobResult, _ *wire.Statement) { r.Outputs[0].Size++ },
		"result's name":  func(r *wire.JobResult, _ *wire.Statement) { r.Outputs[0].Name = "other" },
		"output's chunk": func(_ *wire.JobResult, s *wire.Statement) { s.Subject[1].Digest["deimosChunk"] = zero },
		"result's chunk": func(r *wire.JobResult, _ *wire.Statement) { r.Outputs[0].Parts[0].Chunk = zero },
		"result's parts": func(r *wire.JobResult, s *wire.Statement) {
			delete(s.Subject[1].Digest, "deimosChunk")
			r.Outputs[0].Parts = []wire.JobPart{{Chunk: zero, Size: 40}, {Chunk: zero, Size: 60}}
		},
		"result's digest": func(r *wire.JobResult, _ *wire.Statement) { r.Outputs[0].SHA256 = zero },
	} {
		d.on(wire.KindJobRun, d.maker(bend))
		_, err := w.op.RunJob(testContext(t), q)
		t.Log(name)
		wantProblem(t, err, wire.Failed, wire.CodeMismatch)
	}
	d.on(wire.KindJobRun, d.maker(nil))
	if _, err := w.op.RunJob(testContext(t), q); err != nil {
		t.Error(err)
	}
}

// Of two coordinators one places tasks, and the other takes over; both tell of them.
func TestOfTwoCoordinatorsOnePlacesJobs(t *testing.T) {
	t.Parallel()
	ws := peers(t, 2, hurried)
	a, b := ws[0], ws[1]
	d := a.device(t)
	files := a.prefixed(t, "p/", 10, 1)
	eventually(t, "both know the device", func() bool { return b.reg.online(d.id) })
	module := a.module(t)
	j, err := b.op.StartJob(testContext(t), api.JobSpec{Module: module, Over: &api.JobOver{Prefix: "p/"}})
	must(t, err)
	wantToy(t, files, b.gather(t, j.ID))
	wantToy(t, files, a.gather(t, j.ID))
	leads := 0
	for _, w := range ws {
		if w.jobs.lead(testContext(t)) {
			leads++
		}
	}
	if leads != 1 {
		t.Errorf("%d coordinators place tasks", leads)
	}
}
