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
	d.tell(&wire.JobsState{Host: 1, Orders: 1, Engine: "toy", Slots: 1, MemoryBytes: 1 << 30, WallSeconds: 900})
	holder.tell(&wire.JobsState{Host: 1, Orders: 1, Engine: "toy", Slots: 0, MemoryBytes: 1 << 30, WallSeconds: 900})
	const files = 6
	w.prefixed(t, "f/", files, 2)
	w.chunksOf(t, 20, 5000)
	var mu sync.Mutex
	open, most, challenges := 0, 0, 0
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
		time.Sleep(quickTask + 50*time.Millisecond) // the task's work: quick ones may be ahead of the slots
		mu.Lock()
		open--
		mu.Unlock()
		return d.compute(o, nil)
	})
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "f/", PerChunk: true}, Verify: api.VerifyNone})
	must(t, err)
	j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	mu.Lock()
	defer mu.Unlock()
	if j.Succeeded != files || challenges == 0 || most != 1 {
		t.Errorf("of %d tasks %d succeeded; with %d challenges among them the device had %d orders open at once", files, j.Succeeded, challenges, most)
	}
}
