package coordinator

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// A device that says of each task that the module fails ends none: another owner's is to say
// the same.
func TestOneDeviceDoesNotEndTheTasksOfOthers(t *testing.T) {
	t.Parallel()
	w := openWith(t, t.TempDir(), func(c *Config) { hurried(c); c.jobPace.retry = 20 * time.Millisecond })
	t.Cleanup(w.Close)
	good, bad := w.device(t), w.device(t)
	const files = 12
	w.prefixed(t, "f/", files, 2)
	slow := make(chan struct{}, 1)
	good.on(wire.KindJobRun, func(o wire.Order) *reply {
		slow <- struct{}{} // one at a time: it is busy when the other is not
		defer func() { <-slow }()
		return good.compute(o, nil)
	})
	bad.on(wire.KindJobRun, func(wire.Order) *reply { return failed(codeGuestFailed) })
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "f/"}, Verify: api.VerifyNone})
	must(t, err)
	j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	if j.State != wire.Succeeded || j.Succeeded != files {
		t.Errorf("it ended %s %s: %d of %d", j.State, j.Code, j.Succeeded, files)
	}
}

// One that alone may do it is believed the second time.
func TestADeviceThatAloneMayIsBelievedTheSecondTime(t *testing.T) {
	t.Parallel()
	w := openWith(t, t.TempDir(), func(c *Config) { hurried(c); c.jobPace.retry = 20 * time.Millisecond })
	t.Cleanup(w.Close)
	d := w.device(t)
	w.putFile(t, "in", someBytes(100), 1)
	for _, needs := range []api.JobNeeds{{Device: d.id}, {}} {
		var asked atomic.Int32
		d.on(wire.KindJobRun, func(wire.Order) *reply { asked.Add(1); return failed(codeGuestFailed) })
		_, err := w.op.RunJob(testContext(t), api.JobSpec{Module: w.module(t), Input: &api.JobChunk{Object: "in"}, Needs: needs})
		if err == nil || asked.Load() != 2 {
			t.Errorf("with %+v it was asked %d times: %v", needs, asked.Load(), err)
		}
	}
}
