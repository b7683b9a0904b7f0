package coordinator

import (
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// A device with one slot that is slow has one order open at a time, challenges among them: one
// more would be known for a challenge.
func TestAChallengeTakesAPlaceLikeATask(t *testing.T) {
	t.Parallel()
	w, _ := honestWorld(t, func(c *Config) { hurried(c); c.jobPace.away = time.Minute; c.jobPace.late = time.Minute })
	d, holder := w.device(t), w.device(t)
	d.tell(&wire.JobsState{Host: 1, Orders: 1, Engine: toyOnDevices, Slots: 1, MemoryBytes: 1 << 30, WallSeconds: 900})
	holder.tell(&wire.JobsState{Host: 1, Orders: 1, Engine: toyOnDevices, Slots: 0, MemoryBytes: 1 << 30, WallSeconds: 900})
	const files = 10
	w.prefixed(t, "f/", files, 2)
	var mu sync.Mutex
	open, most, challenges := 0, 0, 0
	stored := make(chan struct{})
	store := sync.OnceFunc(func() { close(stored) })
	t.Cleanup(store)
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		w.audits.honesty.mu.Lock()
		_, is := w.audits.honesty.ours[o.ID]
		w.audits.honesty.mu.Unlock()
		mu.Lock()
		if open++; open > most {
			most = open
		}
		if is {
			challenges++
		}
		mu.Unlock()
		<-stored
		time.Sleep(quickTask + 50*time.Millisecond) // the task's work: quick ones may be ahead of the slots
		mu.Lock()
		open--
		mu.Unlock()
		return d.compute(o, nil)
	})
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "f/", PerChunk: true}, Verify: api.VerifyNone})
	must(t, err)
	w.prefixed(t, "f/more", 20, 2) // what challenges can be made of
	store()
	j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	mu.Lock()
	defer mu.Unlock()
	if j.Succeeded != files || challenges == 0 || most != 1 {
		t.Errorf("of %d tasks %d succeeded; with %d challenges among them the device had %d orders open at once", files, j.Succeeded, challenges, most)
	}
}

// Who says that it has many slots and is silent does not take a batch away from others, and is
// given less the more it is silent of.
func TestASilentDeviceWithManySlotsDoesNotHoldABatch(t *testing.T) {
	t.Parallel()
	const silent = 500 * time.Millisecond
	w := openWith(t, t.TempDir(), func(c *Config) { hurried(c); c.jobPace.silent = silent })
	t.Cleanup(w.Close)
	hog := w.device(t)
	good := w.devices(t, 3)
	const files = 40
	w.prefixed(t, "f/", files, 4)
	for _, d := range good {
		d.tell(ready())
	}
	many := ready()
	many.Slots = 256
	hog.tell(many)
	var mu sync.Mutex
	given := 0
	hog.on(wire.KindJobRun, func(wire.Order) *reply {
		mu.Lock()
		defer mu.Unlock()
		given++
		return nil
	})
	began := time.Now()
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "f/", PerChunk: true}, Verify: api.VerifyNone})
	must(t, err)
	j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	mu.Lock()
	defer mu.Unlock()
	// Half as many each time, then one at a time.
	most := 2*firstJobs + int(time.Since(began)/silent)
	if j.Succeeded != files || given == 0 || given > most {
		t.Errorf("of %d tasks %d succeeded; the silent device was given %d, and %d at most should be", files, j.Succeeded, given, most)
	}
}

func TestPlacesGrowWithWhatWasDone(t *testing.T) {
	t.Parallel()
	p := newPlanner()
	d := wire.DeviceID("d")
	p.there = newFleet([]jobDevice{{id: d, slots: 20}})
	has := func(want int) {
		t.Helper()
		if room, _ := p.places(); room[d] != want {
			t.Errorf("it may have %d at once, want %d", room[d], want)
		}
	}
	has(firstJobs)
	for range firstJobs {
		p.did(d)
	}
	has(2 * firstJobs)
	for range 100 {
		p.did(d)
	}
	has(20)
	if _, ahead := p.places(); ahead[d] != quickAhead*20 {
		t.Errorf("of quick ones it may have %d", ahead[d])
	}
	for _, want := range []int{20, 15, 7, 3, 1, 1} {
		p.missed(d)
		has(want)
	}
}

// An order that a device says no word of, though it is there, is not waited for alone.
func TestATaskOfASilentDeviceIsAskedOfAnother(t *testing.T) {
	t.Parallel()
	w := openWith(t, t.TempDir(), func(c *Config) { hurried(c); c.jobPace.silent = 100 * time.Millisecond })
	t.Cleanup(w.Close)
	quiet := w.device(t)
	has := make(chan struct{}, 1)
	quiet.on(wire.KindJobRun, func(wire.Order) *reply {
		select {
		case has <- struct{}{}:
		default:
		}
		return nil
	})
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Verify: api.VerifyNone})
	must(t, err)
	next(t, has, "the silent device has the task")
	other := w.device(t)
	r, err := w.op.JobOutcome(testContext(t), j.ID)
	must(t, err)
	if r.Device != other.id {
		t.Errorf("it was done by %s", r.Device)
	}
}
