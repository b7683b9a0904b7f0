package coordinator

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// A device that has done a task is not asked to do it again as its own company.
func TestNobodyIsTheirOwnWitness(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	first := w.device(t)
	var given ordersTaken
	first.on(wire.KindJobRun, func(o wire.Order) *reply {
		given.add(o)
		return first.compute(o, nil)
	})
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Copies: 2})
	must(t, err)
	eventually(t, "the task waits for another device", func() bool {
		v, err := w.op.Job(testContext(t), j.ID, 0)
		must(t, err)
		return v.Waits != nil && v.Waits.Code == waitsBackoff && len(v.Open) == 1 && v.Open[0].Code == codeVerifying
	})
	w.device(t)
	r, err := w.op.JobOutcome(testContext(t), j.ID)
	wantSure(t, r, err, api.ByOwners, "")
	given.mu.Lock()
	defer given.mu.Unlock()
	if len(given.orders) != 1 || len(r.Attempts) != 2 {
		t.Errorf("one device was given the task %d times; %+v", len(given.orders), r.Attempts)
	}
}

// Who is caught lying while it has a task is no company for who did it too.
func TestTheWordOfALiarConfirmsNothing(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 2)
	w.owns(t, "ann", ds[0])
	w.owns(t, "ben", ds[1])
	w.putFile(t, "in", someBytes(100), 2)
	var caught atomic.Bool
	ds[0].on(wire.KindJobRun, func(o wire.Order) *reply {
		if !caught.Load() {
			return nil // the order comes again
		}
		return ds[0].compute(o, nil)
	})
	q := input(w.module(t), "in")
	q.Verify = api.VerifyAlways
	j, err := w.op.StartJob(testContext(t), q)
	must(t, err)
	eventually(t, "one has done it, and the other has it", func() bool {
		v, err := w.op.Job(testContext(t), j.ID, 0)
		must(t, err)
		return len(v.Open) == 1 && len(v.Open[0].Attempts) == 2 && v.Open[0].Code == codeVerifying
	})
	_, err = w.audits.scores.change(testContext(t), string(ds[0].id), func(s *score, _ bool) error {
		s.Compute.Lied(10, w.time())
		return nil
	})
	must(t, err)
	caught.Store(true)
	r, err := w.op.JobOutcome(testContext(t), j.ID)
	wantSure(t, r, err, api.ByCoordinator, "")
}

// Company is drawn: a device that is trusted with more than others, and so would get each job,
// is not the witness of all that the other such one does.
func TestCompanyIsDrawn(t *testing.T) {
	t.Parallel()
	const jobs = 24
	w := sureWorld(t)
	ds := w.devices(t, 5)
	first := map[wire.DeviceID]bool{ds[0].id: true, ds[1].id: true}
	for _, d := range ds[2:] {
		_, err := w.audits.scores.change(testContext(t), string(d.id), func(s *score, _ bool) error {
			s.Unreachable, s.At = 1, w.time()
			return nil
		})
		must(t, err)
		if got, of := w.audits.trust(d.id), w.audits.trust(ds[0].id); got <= 0 || got >= of {
			t.Fatalf("it is trusted with %v, the first with %v", got, of)
		}
	}
	q := api.JobSpec{Module: w.module(t)}
	other := 0
	for range jobs {
		r, err := w.op.RunJob(testContext(t), q)
		wantSure(t, r, err, api.ByOwners, "")
		if len(r.Attempts) != 2 || !first[r.Attempts[0].Device] {
			t.Fatalf("one of the two that are trusted most is not first, so this shows nothing: %+v", r.Attempts)
		}
		if first[r.Attempts[1].Device] {
			other++
		}
	}
	// That none of the three others is drawn in so many jobs happens once in 4^24.
	if other == jobs {
		t.Error("company is always the other one that is trusted most")
	}
}

// The end of an attempt counts once, whoever else has followed the order: another
// coordinator, or a former life of this one.
func TestAnEndIsTakenInOnce(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 2)
	r, err := w.op.RunJob(testContext(t), api.JobSpec{Module: w.module(t)})
	wantSure(t, r, err, api.ByOwners, "")
	const once = 0.25 // of a job that costs nothing
	credited := func() bool {
		return w.audits.honesty.standing(ds[0].id).Right > 0.9*once && w.audits.honesty.standing(ds[1].id).Right > 0.9*once
	}
	eventually(t, "both are credited", credited)
	before, err := w.jobs.tasks.find(testContext(t), taskKey(r.Job, 0))
	must(t, err)
	for _, a := range r.Attempts {
		v, err := w.outbox.get(testContext(t), a.Device, a.Order)
		must(t, err)
		w.jobs.settle(testContext(t), r.Job, 0, api.JobAttempt{Order: a.Order, Device: a.Device, Began: a.Began}, v, nil)
	}
	for _, d := range ds {
		if got := w.audits.honesty.standing(d.id).Right; got > 1.1*once {
			t.Errorf("one job has earned %.2f, want %.2f", got, once)
		}
	}
	after, err := w.jobs.tasks.find(testContext(t), taskKey(r.Job, 0))
	must(t, err)
	if !reflect.DeepEqual(before, after) {
		t.Errorf("the task was\n%+v and is\n%+v", before, after)
	}
}

// A device that has a task is not given it once more, though somebody who knows less places
// it there: another coordinator whose lease has just ended, say.
func TestADeviceHasATaskOnceAtATime(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	d := w.device(t)
	d.on(wire.KindJobRun, func(wire.Order) *reply { return nil })
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Verify: api.VerifyNone})
	must(t, err)
	attempts := func() int {
		v, err := w.op.Job(testContext(t), j.ID, 0)
		must(t, err)
		if len(v.Open) == 0 {
			return 0
		}
		return len(v.Open[0].Attempts)
	}
	eventually(t, "the device has the task", func() bool { return attempts() == 1 })
	s := w.jobs
	row, err := s.rows.find(testContext(t), j.ID)
	must(t, err)
	a, err := s.resolve(row, jobFiles{}, 0)
	must(t, err)
	s.plan.mu.Lock()
	s.plan.works[j.ID].open[0].starting++
	s.plan.busy[d.id]++
	there := s.devices()
	s.plan.mu.Unlock()
	ctx, cancel := context.WithCancel(testContext(t))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.start(ctx, begun{j.ID, 0, a, there[0], row.Spec.Module, row.Spec.Deadline, row.Spec})
	}()
	eventually(t, "the second is refused, or made", func() bool {
		select {
		case <-ended:
			return true
		default:
			return attempts() > 1
		}
	})
	cancel()
	<-ended
	if n := attempts(); n != 1 {
		t.Errorf("the device has the task %d times", n)
	}
}

// Witnesses meet what the customer wants of a device, and say how they stand with jobs.
func TestWitnessesAreWhomTheCustomerWants(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	first, other, old, small, paused := w.worker(t), w.worker(t), w.device(t), w.device(t), w.device(t)
	st := ready()
	st.MemoryBytes = 1 << 20
	small.tell(st)
	st = ready()
	st.Pause = &wire.Pause{Code: "owner"}
	paused.tell(st)
	data := someBytes(100)
	w.putFile(t, "in", data, 5)
	run := wire.JobRun{Module: wire.Blob{SHA256: w.module(t)}, Input: chunk.Sum(data).String(), Limits: wire.JobLimits{MemoryBytes: 64 << 20}}
	for name, c := range map[string]struct {
		needs api.JobNeeds
		want  []wire.DeviceID
	}{
		"anybody":           {api.JobNeeds{}, []wire.DeviceID{first.id, other.id}},
		"one device":        {on(first), []wire.DeviceID{first.id}},
		"an architecture":   {api.JobNeeds{Arch: "arm64"}, []wire.DeviceID{first.id, other.id}},
		"another one":       {api.JobNeeds{Arch: "riscv64"}, nil},
		"a compiled module": {api.JobNeeds{Compiled: true}, []wire.DeviceID{first.id, other.id}},
	} {
		got := w.audits.honesty.able(askedAs(run, c.needs))
		slices.Sort(got)
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %s, want %s (old %s, small %s, paused %s)", name, got, c.want, old.id, small.id, paused.id)
		}
	}
	w.doubts(t, other, run.Module.SHA256)
	if got := w.audits.honesty.able(askedAs(run, api.JobNeeds{})); !slices.Equal(got, []wire.DeviceID{first.id}) {
		t.Errorf("with a doubt: %s", got)
	}
}

// doubts makes a device one that is doubted over a module.
func (w *world) doubts(t testing.TB, d *device, module string) {
	t.Helper()
	_, err := w.audits.scores.change(testContext(t), string(d.id), func(s *score, _ bool) error {
		s.Compute.Doubt(module, w.time())
		return nil
	})
	must(t, err)
}

// Devices that came in by one token may be one owner's: that they agree verifies nothing until
// somebody says whose they are. Others are asked first.
func TestDevicesByOneTokenVerifyNothingUntilTheyAreLabelled(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 3)
	for _, d := range ds {
		_, err := w.reg.rows.change(testContext(t), string(d.id), func(v *api.DeviceRecord, _ bool) error { v.Token = "one"; return nil })
		must(t, err)
	}
	q := api.JobSpec{Module: w.module(t)}
	r, err := w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByNobody, api.UnverifiedNoOther)
	if len(r.Attempts) != 2 || r.Unverified == nil || !strings.Contains(r.Unverified.Reason, "--set-label owner=") {
		t.Errorf("%+v, which %+v", r.Attempts, r.Unverified)
	}
	q.Verify = api.VerifyAlways
	r, err = w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByCoordinator, "")
	w.trusts(t, ds[0])
	w.trusts(t, ds[1])
	w.trusts(t, ds[2])
	q.Verify = ""
	r, err = w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByReputation, "")
	for _, d := range ds {
		w.doubts(t, d, "another")
	}
	for i, d := range ds {
		w.owns(t, fmt.Sprint(i), d)
	}
	r, err = w.op.RunJob(testContext(t), q)
	wantSure(t, r, err, api.ByOwners, "")
}
