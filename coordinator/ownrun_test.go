package coordinator

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// What a job may ask for has bounds, whatever devices would do with it.
func TestAJobWithAbsurdLimitsIsRefused(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, _, _ := auditScene(t, w)
	module := w.module(t)
	absurd := wire.JobLimits{OutputBytes: 1 << 50}
	_, err := w.op.StartJob(testContext(t), api.JobSpec{Module: module, Limits: absurd})
	wantRefusal(t, err, http.StatusBadRequest, "bad_job")
	_, err = w.op.Audit(testContext(t), api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: module, Limits: absurd})
	wantRefusal(t, err, http.StatusBadRequest, "bad_job")
}

// The coordinator runs nothing itself that may take more than it has to spare, and fetches
// nothing for it.
func TestTheCoordinatorRunsNothingThatIsTooLarge(t *testing.T) {
	t.Parallel()
	ran := make(chan wire.JobLimits, 8)
	w := openWith(t, t.TempDir(), func(c *Config) {
		c.Compute = func(ctx context.Context, j ComputeJob) (ComputeResult, error) {
			ran <- j.Limits
			return toyEngine(ctx, j)
		}
	})
	t.Cleanup(w.Close)
	module := w.module(t)
	for name, c := range map[string]struct {
		limits wire.JobLimits
		size   int64
		why    string
	}{
		"all it may": {wire.JobLimits{MemoryBytes: maxOwnMemory, OutputBytes: maxOwnOutput}, maxOwnInput, ""},
		"memory":     {wire.JobLimits{MemoryBytes: maxOwnMemory + 1}, 1, "memory"},
		"output":     {wire.JobLimits{OutputBytes: maxOwnOutput + 1}, 1, "write"},
		"inputs":     {wire.JobLimits{}, maxOwnInput + 1, "reads"},
	} {
		job := wire.JobRun{Module: wire.Blob{SHA256: module}, Limits: c.limits, Inputs: []wire.JobInput{{Name: "a", Parts: []wire.JobPart{{Size: c.size}}}}}
		read := false
		_, _, err := w.audits.known(testContext(t), job, func(context.Context) (reading, error) { read = true; return reading{}, nil })
		switch {
		case c.why == "":
			must(t, err)
			if l := next(t, ran, name); l != c.limits {
				t.Errorf("%s: ran with %+v", name, l)
			}
		case err == nil || !strings.Contains(err.Error(), c.why) || read || len(ran) > 0:
			t.Errorf("%s: %v, read: %v", name, err, read)
		}
	}
}

// However many results differ, the inputs of one job at a time are in the coordinator's
// memory, and few wait.
func TestTheCoordinatorReadsForOneJobAtATime(t *testing.T) {
	t.Parallel()
	entered, gate := make(chan struct{}, 64), make(chan struct{})
	w := openWith(t, t.TempDir(), func(c *Config) {
		hurried(c)
		c.Compute = func(ctx context.Context, j ComputeJob) (ComputeResult, error) {
			entered <- struct{}{}
			select {
			case <-gate:
			case <-ctx.Done():
			}
			return toyEngine(ctx, j)
		}
	})
	t.Cleanup(w.Close)
	honest, liar := w.device(t), w.device(t)
	w.owns(t, "ann", honest)
	w.owns(t, "bob", liar)
	liar.lies()
	const tasks = 3 * ownsAtOnce
	w.prefixed(t, "f/", tasks, 2)
	served := make(chan struct{}, tasks)
	for _, d := range []*device{honest, liar} {
		d.on(wire.KindChunkServe, func(o wire.Order) *reply { served <- struct{}{}; return d.honest(o) })
	}
	j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Over: &api.JobOver{Prefix: "f/"}, Copies: 2})
	must(t, err)
	next(t, entered, "the first run")
	eventually(t, "both have done all that can be done", func() bool {
		n := 0
		w.jobs.tasks.each(func(_ string, row taskRow) bool {
			if len(row.Attempts) == 2 && row.running() == 0 {
				n++
			}
			return true
		})
		return n >= tasks
	})
	p := &w.jobs.plan
	eventually(t, "as many wait as may", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.owning == ownsAtOnce })
	if len(served) != 1 || len(entered) > 0 {
		t.Errorf("while one runs, %d inputs were read, and %d more run", len(served), len(entered))
	}
	close(gate)
	j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
	must(t, err)
	if j.State != wire.Succeeded || j.Succeeded != tasks {
		t.Errorf("%s, %d of %d", j.State, j.Succeeded, tasks)
	}
	eventually(t, "nobody waits", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.owning == 0 })
}
