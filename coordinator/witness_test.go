package coordinator

import (
	"sync/atomic"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
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

// Company is drawn: a device that has more room than others, and so would get each job, is
// not the witness of all.
func TestCompanyIsDrawn(t *testing.T) {
	t.Parallel()
	const jobs = 24
	w := sureWorld(t)
	ds := w.devices(t, 5)
	for i, slots := range []int{60, 30, 1, 1, 1} {
		s := *ready()
		s.Slots = slots
		ds[i].tell(&s)
	}
	q := api.JobSpec{Module: w.module(t)}
	with := map[wire.DeviceID]int{}
	for range jobs {
		r, err := w.op.RunJob(testContext(t), q)
		wantSure(t, r, err, api.ByOwners, "")
		if len(r.Attempts) != 2 || r.Attempts[0].Device != ds[0].id {
			t.Fatalf("the one with most room is not first, so this shows nothing: %+v", r.Attempts)
		}
		with[r.Attempts[1].Device]++
	}
	// That three others are never drawn in so many jobs happens once in 4^24.
	if with[ds[1].id] == jobs || len(with) < 2 {
		t.Errorf("company is always the one that has most room of the others: %v", with)
	}
}
