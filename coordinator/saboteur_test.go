package coordinator

import (
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// A device that says of each task that the module fails ends none: another owner's is to say
// the same. One that is alone is believed the second time.
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
	asked := 0
	good.leave()
	bad.on(wire.KindJobRun, func(wire.Order) *reply { asked++; return failed(codeGuestFailed) })
	_, err = w.op.RunJob(testContext(t), api.JobSpec{Module: w.module(t), Input: &api.JobChunk{Object: "f/0000"}, Needs: api.JobNeeds{Device: bad.id}})
	if err == nil || asked != 2 {
		t.Errorf("alone it was asked %d times: %v", asked, err)
	}
}
