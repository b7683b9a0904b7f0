package test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// TestASecondCoordinatorGoesOnWithAJob has two coordinators share a fleet, and kills the
// one that places tasks in the middle of a job. The other takes over when the lease has
// ended; no task is done anew that was done, and each has one result.
func TestASecondCoordinatorGoesOnWithAJob(t *testing.T) {
	t.Parallel()
	const tasks, devices = 60, 4
	f := newFleet(t, external)
	f.Patience = 2 * testbed.Patience // a lease of a minute has to end
	begun := make(chan struct{}, 10*tasks)
	gate := make(chan struct{})
	stop := f.Simulate(devices, testbed.Workers{Slots: 1, Odd: func(ctx context.Context, _ int, _ wire.Order) ([]byte, error, bool) {
		begun <- struct{}{}
		select {
		case <-gate:
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err(), true
		}
		return nil, nil, false
	}})
	defer stop()
	files := f.putSmall("over/", tasks)

	// The other has the same keys, as "deimos serve --nats" wants of all that share a fleet.
	if err := os.CopyFS(f.Path("second"), os.DirFS(f.Path("coordinator"))); err != nil {
		t.Fatal(err)
	}
	https := testbed.FreeAddress(t)
	second := f.Start(proc.Command{Name: "the second coordinator", Log: f.Path("logs", "second.log"), Ready: api.Ready,
		Argv: []string{testbed.Program("deimos"), "serve", "--dir", f.Path("second"), "--listen", https, "--mqtt", f.MQTT, "--beat", f.Beat, "--nats", f.NATS}})
	defer f.Stopped(second, 0)
	c, err := api.LoadContext(f.Path("second", "operator.json"))
	if err != nil {
		t.Fatal(err)
	}
	c.URL = "https://" + https
	other, err := api.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}

	module, err := f.Client.PutModule(f.Ctx, []byte("toy"))
	if err != nil {
		t.Fatal(err)
	}
	j, err := f.Client.StartJob(f.Ctx, api.JobSpec{Module: module, Args: []string{"x"}, Over: &api.JobOver{Prefix: "over/"}, Verify: api.VerifyNone})
	if err != nil {
		t.Fatal(err)
	}
	for range tasks / 3 {
		select {
		case <-begun:
		case <-f.Ctx.Done():
			t.Fatal("the tasks do not begin")
		}
	}
	f.Serve.Kill()
	close(gate)
	before, err := other.Job(f.Ctx, j.ID, 0)
	if err != nil || before.State.Terminal() {
		t.Fatalf("the job was not cut off in the middle: %+v %v", before.JobCounts, err)
	}
	results := make(map[string]api.JobResult)
	if err := other.EachJobResult(f.Ctx, j.ID, func(r api.JobResult) error {
		if _, twice := results[r.Name]; twice {
			return fmt.Errorf("%s has two results", r.Name)
		}
		results[r.Name] = r
		return r.Err()
	}, nil); err != nil {
		t.Fatal(err)
	}
	attempts := 0
	for name, data := range files {
		r := results[name]
		attempts += len(r.Attempts)
		if string(r.Output) != string(testbed.Toy([]string{"x"}, data)) {
			t.Errorf("%s: %+v %q", name, r.JobTask, r.Output)
		}
	}
	// What was under way may be lost with the coordinator that waited for it, once.
	if most := tasks + devices*3; attempts > most || len(results) != tasks {
		t.Errorf("%d results of %d tasks took %d runs, at most %d", len(results), tasks, attempts, most)
	}
	if after, err := other.Job(f.Ctx, j.ID, 0); err != nil || after.State != wire.Succeeded || after.Succeeded != tasks {
		t.Errorf("%+v %v", after, err)
	}
	t.Logf("%d tasks were done when the first coordinator was killed; %d runs in all", before.Succeeded, attempts)
}
