package coordinator

import (
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// What comes to a limit that the job has set, and that is the same everywhere, is tried once
// more, and not as often as what another device may be able to do.
func TestALimitOfTheJobsOwnIsTriedTwice(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	ds := w.devices(t, 4)
	for _, d := range ds {
		d.on(wire.KindJobRun, func(wire.Order) *reply { return failed(wire.CodeLimit) })
	}
	for _, c := range []struct {
		limits wire.JobLimits
		tries  int
	}{
		{wire.JobLimits{MemoryBytes: 1 << 20}, 2},
		{wire.JobLimits{OutputBytes: 1 << 20}, 2},
		{wire.JobLimits{CPUSeconds: 1}, 1 + api.DefaultRetries}, // another may be faster
		{wire.JobLimits{}, 1 + api.DefaultRetries},              // or have more memory for it
	} {
		r, err := w.op.RunJob(testContext(t), api.JobSpec{Module: w.module(t), Limits: c.limits, Verify: api.VerifyNone})
		wantProblem(t, err, wire.Failed, wire.CodeLimit)
		of := map[wire.DeviceID]bool{}
		for _, a := range r.Attempts {
			of[a.Device] = true
		}
		if len(r.Attempts) != c.tries || len(of) < 2 {
			t.Errorf("%+v: tried %d times, on %d devices, want %d times", c.limits, len(r.Attempts), len(of), c.tries)
		}
	}
}
