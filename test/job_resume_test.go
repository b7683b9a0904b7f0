package test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// TestAJobOutlivesItsAgentAndItsCoordinator kills the agent twice in the middle of a
// job, with no coordinator to send it again: once at work, once while its owner has paused
// it. Each time it goes on from its checkpoint, the pause holds, and the result stands
// once, as if nothing had happened.
func TestAJobOutlivesItsAgentAndItsCoordinator(t *testing.T) {
	t.Parallel()
	const steps = 3000 // of some milliseconds: it must not be done when it is paused
	f := newFleet(t)
	f.enrol(1, false)
	d := f.devices[0]
	module := f.HostedGuest()
	var job api.Job
	f.OK(&job, "job", "run", module, "--arg", "long", "--arg", fmt.Sprint(steps), "--wall", "15m", "--cpu", "10m", "--start")

	work := d.state("jobs", "work")
	step := func() (n int) { // of the newest checkpoint
		all, err := filepath.Glob(filepath.Join(work, "*", "checkpoint"))
		if err != nil || len(all) != 1 {
			return 0
		}
		raw, err := os.ReadFile(all[0])
		if err == nil {
			_, _ = fmt.Sscan(string(raw), &n)
		}
		return n
	}
	passes := func(what string, from int) int {
		t.Helper()
		f.Until(what, func() bool { return step() > from })
		return step()
	}
	jobs := func() *agent.Jobs {
		t.Helper()
		j, err := agent.ReadJobs(d.state())
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	owner := func(word string) {
		t.Helper()
		r, err := testbed.RunToEnd(f.Ctx, proc.Command{Argv: []string{testbed.Program("deimos-agent"), "jobs", word, "--state", d.state()}})
		if err != nil || r.Code != 0 {
			t.Fatalf("%v %s", err, r.Said())
		}
	}

	at := passes("the first checkpoints", 60)
	f.Serve.Kill()
	d.proc.Kill()
	d.start()
	at = passes("the job going on without a coordinator", max(at, step()))

	owner("pause")
	f.Until("the job standing still", func() bool {
		j := jobs()
		return len(j.Jobs) == 1 && j.Jobs[0].State == "suspended" && j.Jobs[0].Code == "paused"
	})
	d.proc.Kill()
	saved := step()
	if saved < at {
		t.Errorf("the checkpoint went from step %d back to %d", at, saved)
	}
	d.start()
	f.Until("the job waiting after the restart", func() bool {
		j := jobs()
		return len(j.Jobs) == 1 && j.Jobs[0].State == "waiting" && j.Jobs[0].Code == "paused"
	})
	if now := step(); now != saved {
		t.Errorf("it went on from step %d to %d though it is paused", saved, now)
	}
	owner("resume")
	passes("the job going on after the pause", saved)

	f.StartServe()
	d.awaitOnline()
	r, err := f.Client.JobOutcome(f.Ctx, job.ID)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintln(steps, testbed.HostedLong(steps)); string(r.Output) != want {
		t.Errorf("the result is %q, want %q", r.Output, want)
	}
	if r.Result.Resumed != 2 || len(r.Attempts) != 1 {
		t.Errorf("resumed %d times, in %d attempts; want 2, in one", r.Result.Resumed, len(r.Attempts))
	}
	f.Until("the job's folder going with its report", func() bool {
		left, err := os.ReadDir(work)
		return err == nil && len(left) == 0
	})
	var all api.OrderList
	f.OK(&all, "order", "list", "--kind", string(wire.KindJobRun))
	if len(all.Orders) != 1 || all.Orders[0].State != wire.Succeeded {
		t.Errorf("%d orders for one job: %+v", len(all.Orders), all.Orders)
	}
}
