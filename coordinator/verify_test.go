package coordinator

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// sureWorld hurries, and draws neither challenges nor looks by a third owner.
func sureWorld(t testing.TB, edit ...func(*Config)) *world {
	t.Helper()
	w := openWith(t, t.TempDir(), func(c *Config) {
		hurried(c)
		c.even = func() float64 { return 0.999 }
		for _, f := range edit {
			f(c)
		}
	})
	t.Cleanup(w.Close)
	return w
}

// owns says whose devices are.
func (w *world) owns(t testing.TB, owner string, ds ...*device) {
	t.Helper()
	var ids []wire.DeviceID
	for _, d := range ds {
		ids = append(ids, d.id)
	}
	_, err := w.op.ChangeDevices(testContext(t), api.DeviceChange{Selector: api.Selector{Devices: ids}, SetLabels: map[string]string{ownerLabel: owner}})
	must(t, err)
}

// ownHas is a result that the coordinator has, too.
var ownHas = trust.Verdict{Finding: trust.Confirmed, CPUSeconds: 10}

// trusts makes a device one that has earned it.
func (w *world) trusts(t testing.TB, d *device) {
	t.Helper()
	h := w.audits.honesty
	for range 50 {
		h.earn(d.id, func(e *earned) {
			e.runtime = trust.Runtime{Engine: toyOnDevices, Agent: "1.0.0"}
			e.confirmed = append(e.confirmed, ownHas)
		})
	}
	must(t, h.flush(testContext(t)))
	if !h.trusted(d.id) {
		t.Fatalf("%+v", h.standing(d.id))
	}
}

// wantSure wants a result that these stand behind.
func wantSure(t testing.TB, r api.JobResult, err error, by api.VerifiedBy, code string) {
	t.Helper()
	got := ""
	if r.Unverified != nil {
		if got = r.Unverified.Code; !strings.Contains(r.Unverified.Reason, " ") {
			t.Errorf("without a reason: %+v", r.Unverified)
		}
	}
	if err != nil || r.VerifiedBy != by || got != code {
		t.Errorf("verified by %q (%q), want %q (%q): %v %+v", r.VerifiedBy, got, by, code, err, r.JobTask)
	}
}

// Who names other chunks beside the right SHA-256 has another result: readers by chunk would
// read them.
func TestTheChunksOfAnOutputAreCompared(t *testing.T) {
	t.Parallel()
	w := sureWorld(t, func(c *Config) {
		c.Compute = func(_ context.Context, j ComputeJob) (ComputeResult, error) {
			return ComputeResult{Outputs: map[string][]byte{"copy": j.Inputs["data"]}}, nil
		}
	})
	liar, d := w.device(t), w.device(t)
	data, garbage := someBytes(5000), someBytes(5000)
	w.putFile(t, "in", data, 2)
	w.putFile(t, "garbage", garbage, 2)
	right, other := chunk.Sum(data).String(), chunk.Sum(garbage).String()
	liar.tell(ready())
	d.tell(ready())
	liar.on(wire.KindJobRun, liar.maker(func(r *wire.JobResult, s *wire.Statement) {
		r.Outputs[0].Parts[0].Chunk = other
		s.Subject[1].Digest["deimosChunk"] = other
	}))
	d.on(wire.KindJobRun, d.maker(nil))
	r, err := w.op.RunJob(testContext(t), api.JobSpec{Module: w.module(t), Inputs: []api.JobInput{{Name: "data", Object: "in"}},
		Outputs: []string{"copy"}, Save: map[string]string{"copy": "saved"}, Copies: 2})
	must(t, err)
	o, err := w.op.Object(testContext(t), "saved")
	must(t, err)
	if r.Device != d.id || r.VerifiedBy != api.ByCoordinator || o.Chunks[0].ID != right {
		t.Errorf("%s (the liar is %s), verified by %q, has made a file of %+v; the output is chunk %s", r.Device, liar.id, r.VerifiedBy, o.Chunks, right)
	}
	eventually(t, "the liar is caught", func() bool { return w.audits.honesty.standing(liar.id).Distrusted() })
	if s := w.audits.honesty.standing(d.id); s.Distrusted() || s.Wrong > 0 {
		t.Errorf("the other is thought a liar: %+v", s)
	}
}

// The coordinator cuts an output as devices do.
func TestOwnOutputsHaveTheChunksOfADevices(t *testing.T) {
	t.Parallel()
	data := someBytes(chunk.MaxSize + 5)
	all := ComputeResult{Output: data}.result([]string{wire.Stdout, "none"}).Outputs
	want := []wire.JobPart{{Chunk: chunk.Sum(data[:chunk.MaxSize]).String(), Size: chunk.MaxSize}, {Chunk: chunk.Sum(data[chunk.MaxSize:]).String(), Size: 5}}
	if !slices.Equal(all[0].Parts, want) || len(all[1].Parts) != 0 {
		t.Errorf("%+v, want %+v and nothing", all, want)
	}
}

func TestTheResultOfANewDeviceIsComparedWithAnotherOwners(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 4)
	w.owns(t, "ann", ds[0], ds[1], ds[2])
	w.putFile(t, "in", someBytes(100), 4)
	q := input(w.module(t), "in")
	for range 5 {
		r, err := w.op.RunJob(testContext(t), q)
		wantSure(t, r, err, api.ByOwners, "")
		if len(r.Attempts) != 2 || !slices.ContainsFunc(r.Attempts, func(a api.JobAttempt) bool { return a.Device == ds[3].id }) {
			t.Errorf("done by %+v, of which all but %s are ann's", r.Attempts, ds[3].id)
		}
	}
	q.Verify = api.VerifyNone
	r, err := w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByNobody, api.UnverifiedNotWanted)
	if len(r.Attempts) != 1 {
		t.Errorf("%+v", r.JobTask)
	}
	// Both have earned something by that, and once for each job.
	eventually(t, "they are credited", func() bool {
		s := w.audits.honesty.standing(ds[3].id)
		return s.Right > 5*0.24 && s.Right < 5*0.26
	})
	j, err := w.op.Job(testContext(t), r.Job, 0)
	if err != nil || j.Verified[api.ByNobody] != 1 || len(j.Verified) != 1 {
		t.Errorf("%+v %v", j, err)
	}
}

// A fleet of one owner: results are given out as what they are, and whoever wants more has
// the coordinator run each.
func TestWithoutAnotherOwnerAResultSaysSo(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 2)
	w.owns(t, "ann", ds...)
	w.putFile(t, "in", someBytes(100), 2)
	q := input(w.module(t), "in")
	r, err := w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByNobody, api.UnverifiedNoOther)
	if len(r.Attempts) != 1 {
		t.Errorf("given to devices of one owner: %+v", r.Attempts)
	}
	q.Verify = api.VerifyAlways
	r, err = w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByCoordinator, "")
	w.trusts(t, ds[0])
	q.Verify, q.Needs = "", on(ds[0])
	r, err = w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByReputation, "")
	// What it has earned was with another engine.
	ds[0].tell(&wire.JobsState{Host: 1, Engine: toyInterpreted, Slots: 1, MemoryBytes: 1 << 30, WallSeconds: 900})
	r, err = w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByNobody, api.UnverifiedNoOther)
	q = input(q.Module, "in")
	q.Verify = "perhaps"
	_, err = w.op.StartJob(testContext(t), q)
	wantRefusal(t, err, http.StatusBadRequest, "bad_job")
	q.Verify, q.Live = api.VerifyAlways, true
	_, err = w.op.StartJob(testContext(t), q)
	wantRefusal(t, err, http.StatusBadRequest, "bad_job")
}

// Who wants to be sure waits for another owner where the coordinator cannot run the job.
func TestAlwaysWaitsUntilSomebodyStandsBehindIt(t *testing.T) {
	t.Parallel()
	w := sureWorld(t, func(c *Config) { c.Compute = nil })
	ds := w.devices(t, 2)
	w.putFile(t, "in", someBytes(100), 2)
	w.owns(t, "ann", ds...)
	q := input(w.module(t), "in")
	q.Verify = api.VerifyAlways
	j, err := w.op.StartJob(testContext(t), q)
	must(t, err)
	eventually(t, "it says what it waits for", func() bool {
		j, err = w.op.Job(testContext(t), j.ID, 0)
		must(t, err)
		return len(j.Open) == 1 && j.Open[0].Code == codeVerifying && strings.Contains(j.Open[0].Reason, "cannot run it itself")
	})
	if j.State != wire.Running || len(j.Open[0].Attempts) != 1 {
		t.Errorf("%+v", j)
	}
	w.owns(t, "bob", ds[1])
	r, err := w.op.JobOutcome(testContext(t), j.ID)
	wantSure(t, r, err, api.ByOwners, "")
}

func TestWhereDevicesDifferTheCoordinatorsResultStands(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 2)
	ds[0].lies()
	data := someBytes(100)
	w.putFile(t, "in", data, 2)
	q := input(w.module(t), "in")
	r, err := w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByCoordinator, "")
	if want, _ := toyCompute(testContext(t), []byte("module"), nil, data); string(r.Output) != string(want) || r.Device != ds[1].id {
		t.Errorf("%s says %q", r.Device, r.Output)
	}
	eventually(t, "who lied is caught", func() bool { return w.audits.mayCompute(ds[0].id) == 0 })
	if h, err := w.op.Honesty(testContext(t), ds[0].id); err != nil || len(h.Penalties) != 1 {
		t.Errorf("%+v %v", h, err)
	}
	// The only device that is left says something wrong, too.
	ds[1].lies()
	q.Verify = api.VerifyAlways
	_, err = w.op.RunJob(testContext(t), q)
	wantProblem(t, err, wire.Failed, codeDisagree)
}

// What two in league have had accepted is looked at by a third owner, corrected, and with it
// what they had accepted before, once the first of them is caught.
func TestWhatLiarsHadAcceptedIsCorrected(t *testing.T) {
	t.Parallel()
	var third atomic.Bool
	w := sureWorld(t, func(c *Config) {
		c.even = func() float64 {
			if third.Load() {
				return 0.1 // below the share of third looks
			}
			return 0.999
		}
	})
	ds := w.devices(t, 2)
	for _, d := range ds {
		d.lies()
	}
	w.prefixed(t, "f/", 6, 2)
	data := someBytes(100)
	w.putFile(t, "in", data, 2)
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "f/"}})
	must(t, err)
	for name, r := range w.gather(t, j.ID) {
		if r.VerifiedBy != api.ByOwners || string(r.Output) != "made up\n" {
			t.Fatalf("%s: %+v", name, r.JobTask)
		}
	}
	honest := w.worker(t)
	w.moreCopies(t, 3)
	third.Store(true)
	last := input(w.module(t), "in")
	r, err := w.op.RunJob(testContext(t), last)
	must(t, err)
	eventually(t, "both are caught", func() bool {
		return w.audits.mayCompute(ds[0].id) == 0 && w.audits.mayCompute(ds[1].id) == 0
	})
	if string(r.Output) == "made up\n" { // the two were drawn, and the third looked after it was given out
		eventually(t, "the last result is corrected", func() bool {
			r, err = w.op.JobOutcome(testContext(t), r.Job)
			return err == nil && len(r.Corrections) == 1
		})
		if want, _ := toyCompute(testContext(t), []byte("module"), nil, data); string(r.Output) != string(want) || r.Device != honest.id || r.VerifiedBy != api.ByCoordinator {
			t.Errorf("%+v %q", r.JobTask, r.Output)
		}
	}
	eventually(t, "all that they had accepted before is corrected", func() bool {
		v, err := w.op.Job(testContext(t), j.ID, 0)
		must(t, err)
		return v.Corrected == 6 && v.Verified[api.ByCoordinator] == 6
	})
	files := w.gather(t, j.ID)
	for name, r := range files {
		if r.Device != honest.id || len(r.Corrections) != 1 || string(r.Output) == "made up\n" {
			t.Errorf("%s: %+v", name, r.JobTask)
		}
	}
	if h, err := w.op.Honesty(testContext(t), honest.id); err != nil || h.Distrusted || len(h.Penalties) > 0 {
		t.Errorf("the honest one: %+v %v", h, err)
	}
}

// moreCopies has all chunks held by n devices.
func (w *world) moreCopies(t testing.TB, n int) {
	t.Helper()
	for _, c := range w.storage.chunks.all(func(a, b chunkRecord) int { return strings.Compare(a.ID, b.ID) }) {
		data, err := w.op.GetChunk(testContext(t), c.ID)
		must(t, err)
		_, err = w.op.PutChunk(testContext(t), c.ID, data, n)
		must(t, err)
	}
}

// What nobody can put right is retracted; what cannot be run any more says that it rests on
// a liar.
func TestWhatCannotBePutRightIsRetracted(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	d := w.device(t)
	d.lies()
	w.putFile(t, "a", someBytes(100), 1)
	w.putFile(t, "b", someBytes(100), 1)
	module := w.module(t)
	a, err := w.op.RunJob(testContext(t), input(module, "a"))
	wantSure(t, a, err, api.ByNobody, api.UnverifiedNoOther)
	b, err := w.op.RunJob(testContext(t), input(module, "b"))
	wantSure(t, b, err, api.ByNobody, api.UnverifiedNoOther)
	must(t, w.op.RemoveObject(testContext(t), "b"))
	w.advance(time.Hour)
	must(t, w.storage.dropOrphans(testContext(t)))
	gone := func() bool {
		o, err := w.outbox.get(testContext(t), d.id, b.Order)
		must(t, err)
		body, err := wire.DecodeBody[wire.JobRun](o.Order)
		must(t, err)
		_, ok := w.storage.chunks.get(body.Input)
		return !ok
	}
	eventually(t, "an input is gone", gone)
	q := input(module, "a")
	q.Verify = api.VerifyAlways // the coordinator runs it
	if _, err := w.op.RunJob(testContext(t), q); err == nil {
		t.Error("a lie was accepted")
	}
	eventually(t, "what can be run is retracted, the other is said to rest on a liar", func() bool {
		x, errA := w.op.JobOutcome(testContext(t), a.Job)
		y, errB := w.op.JobOutcome(testContext(t), b.Job)
		return x.Retracted() && errA != nil && len(x.Output) == 0 && len(x.Corrections) == 1 &&
			errB == nil && y.Unverified != nil && y.Unverified.Code == api.UnverifiedCaught && !y.Checking
	})
}

// What an engine has another result with, only those can tell who have it: who is alone with one,
// or says one that the coordinator does not know, is not believed alone.
func TestAnEngineThatNobodyElseHasMakesNoTrust(t *testing.T) {
	t.Parallel()
	w := sureWorld(t, func(c *Config) { c.Engine = toyElsewhere })
	a, h := w.device(t), w.audits.honesty
	earns := func(d *device, engine string) {
		for range 50 {
			h.earn(d.id, func(e *earned) {
				e.runtime, e.confirmed = trust.Runtime{Engine: engine, Agent: "1.0.0"}, append(e.confirmed, ownHas)
			})
		}
		must(t, h.flush(testContext(t)))
	}
	earns(a, toyOnDevices)
	if h.trusted(a.id) || !strings.Contains(h.standing(a.id).Never, "no device of another owner") {
		t.Errorf("alone with its engine: %+v", h.standing(a.id))
	}
	b := w.device(t)
	_, err := w.reg.rows.change(testContext(t), string(b.id), func(v *api.DeviceRecord, _ bool) error {
		rec, _ := w.reg.rows.get(string(a.id))
		v.Token = rec.Token
		return nil
	})
	must(t, err)
	earns(b, toyOnDevices)
	h.mu.Lock()
	h.engines = enginesSeen{} // it is looked at anew each second
	h.mu.Unlock()
	if h.trusted(a.id) || h.trusted(b.id) {
		t.Errorf("two by one token: %+v", h.standing(a.id))
	}
	w.owns(t, "another", b)
	eventually(t, "two owners have it", func() bool { return h.trusted(a.id) && h.trusted(b.id) })
	for _, odd := range []string{"wazero/1.12.0 compiler riscv64", "wazero/1.11.0 compiler arm64", toyElsewhere} {
		earns(a, odd)
		earns(b, odd)
		if h.trusted(a.id) || h.trusted(b.id) {
			t.Errorf("%s: %+v", odd, h.standing(a.id))
		}
	}
}

// What a device was believed for alone is run by the coordinator once it is doubted, and it has
// to earn anew that it is believed.
func TestWhatADoubtedDeviceWasBelievedForIsRun(t *testing.T) {
	t.Parallel()
	w := sureWorld(t, func(c *Config) {
		c.Compute = func(ctx context.Context, j ComputeJob) (ComputeResult, error) {
			r, err := toyEngine(ctx, j)
			r.Engine = toyElsewhere
			return r, err
		}
	})
	d := w.device(t)
	w.trusts(t, d)
	w.putFile(t, "in", someBytes(100), 1)
	module := w.module(t)
	right, err := w.op.RunJob(testContext(t), input(module, "in"))
	wantSure(t, right, err, api.ByReputation, "")
	d.lies()
	wrong, err := w.op.RunJob(testContext(t), input(module, "in"))
	wantSure(t, wrong, err, api.ByReputation, "")
	h := w.audits.honesty
	must(t, h.doubt(testContext(t), d.id, "another module"))
	eventually(t, "both were looked at", func() bool {
		right, err = w.op.JobOutcome(testContext(t), right.Job)
		must(t, err)
		wrong, err = w.op.JobOutcome(testContext(t), wrong.Job)
		must(t, err)
		return right.VerifiedBy == api.ByCoordinator && wrong.Unverified != nil && wrong.Unverified.Code == api.UnverifiedDoubtful
	})
	if s := h.standing(d.id); s.Distrusted() || s.Trusted() || s.Aged(w.time().Add(15*24*time.Hour)).Trusted() {
		t.Errorf("%+v", s)
	}
	eventually(t, "nothing is left to be looked at", func() bool {
		_, ok := w.jobs.caught.get(string(d.id))
		return !ok
	})
}

// A coordinator that is stopped in the middle of verifying goes on with it.
func TestVerificationSurvivesARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	edit := func(c *Config) {
		hurried(c)
		c.jobPace.away = time.Minute // for who was there before to come back
		c.even = func() float64 { return 0.999 }
	}
	w := openWith(t, dir, edit)
	ds := w.devices(t, 2)
	w.putFile(t, "in", someBytes(100), 2)
	var hold atomic.Bool
	hold.Store(true)
	var orders ordersTaken
	ds[1].on(wire.KindJobRun, func(o wire.Order) *reply {
		if hold.Load() {
			return nil
		}
		orders.add(o)
		return ds[1].compute(o, nil)
	})
	j, err := w.op.StartJob(testContext(t), input(w.module(t), "in"))
	must(t, err)
	verifying := func() bool {
		v, err := w.op.Job(testContext(t), j.ID, 0)
		must(t, err)
		return len(v.Open) == 1 && v.Open[0].Code == codeVerifying
	}
	eventually(t, "one has done it", verifying)
	w.Close()
	w = openWith(t, dir, edit)
	t.Cleanup(w.Close)
	if !verifying() {
		t.Error("it is forgotten that there is a result")
	}
	hold.Store(false)
	for _, d := range ds {
		d.connect(w)
		t.Cleanup(d.leave)
	}
	r, err := w.op.JobOutcome(testContext(t), j.ID)
	wantSure(t, r, err, api.ByOwners, "")
	if len(r.Attempts) != 2 {
		t.Errorf("%+v", r.Attempts)
	}
}

// A coordinator that has just begun waits for nobody who was there since, and left.
func TestNobodyIsWaitedForWhoHasLeft(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	edit := func(c *Config) { hurried(c); c.jobPace.away = time.Hour }
	w := openWith(t, dir, edit)
	ds := w.devices(t, 2)
	w.putFile(t, "in", someBytes(100), 2)
	w.Close()
	w = openWith(t, dir, edit)
	t.Cleanup(w.Close)
	for _, d := range ds {
		d.connect(w)
		t.Cleanup(d.leave)
	}
	w.enrolled(t) // and was never there
	ds[0].leave()
	eventually(t, "it has left", func() bool { return !w.reg.online(ds[0].id) })
	ds[0].leave()
	eventually(t, "it has left", func() bool { return !w.reg.online(ds[0].id) })
	j, err := w.op.StartJob(testContext(t), input(w.module(t), "in"))
	must(t, err)
	r, err := w.op.JobOutcome(testContext(t), j.ID)
	must(t, err)
	if r.Unverified == nil || r.Unverified.Code != api.UnverifiedNoOther {
		t.Errorf("%+v", r)
	}
}

func TestWhatCannotBeComparedSaysSo(t *testing.T) {
	for code, q := range map[string]api.JobSpec{
		api.UnverifiedLive:       {Live: true},
		api.UnverifiedDeviceData: {Inputs: []api.JobInput{{Name: "a", Dataset: "b"}}},
		"":                       {Inputs: []api.JobInput{{Name: "a", Object: "b"}}},
	} {
		why := incomparable(q)
		if (why == nil) != (code == "") || why != nil && why.Code != code {
			t.Errorf("%s: %+v", code, why)
		}
		s := &jobs{}
		t1 := taskRow{Attempts: []api.JobAttempt{{Ended: time.Now(), State: wire.Succeeded, Result: "x"}}}
		if why == nil {
			continue
		}
		if v := s.rule(jobRow{Spec: q}, t1, nil); v.stands != 0 || v.by != api.ByNobody || v.unverified.Code != code {
			t.Errorf("%+v", v)
		}
	}
}
