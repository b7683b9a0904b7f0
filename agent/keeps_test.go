package agent

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/jobs"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

// keeping makes the orders of a test outlive the agent.
func keeping(u *duties) {
	x := u.routes[kindTest]
	x.Keeps, x.AtOnce, x.Queues = true, 100, true
	u.routes[kindTest] = x
}

// untilEnd is a handler that works until its life ends.
func untilEnd(entered chan<- string) wire.Handler {
	return func(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		entered <- o.ID
		<-ctx.Done()
		return wire.Outcome{}, ctx.Err()
	}
}

func TestKeptOrdersGoOnInTheNextLifeWithoutACoordinator(t *testing.T) {
	entered := make(chan string, 10)
	r := newRig(t, untilEnd(entered), keeping)
	r.give(r.order("1"))
	r.give(r.order("2"))
	await(t, "the first", entered)
	await(t, "the second", entered)
	for range 2 { // lives that are cut off, too
		r = r.reborn(untilEnd(entered), keeping)
		if err := r.takeUp(r.ctx); err != nil {
			t.Fatal(err)
		}
		await(t, "one again", entered)
		await(t, "the other again", entered)
	}
	var c counter
	r = r.reborn(c.handle, keeping)
	if err := r.takeUp(r.ctx); err != nil {
		t.Fatal(err)
	}
	r.wait()
	for _, order := range []string{"1", "2"} {
		if e, ok, err := r.journal.get(order); err != nil || !ok || len(e.Report) == 0 {
			t.Errorf("order %s has no report: %v", order, err)
		}
	}
	// With its report, an order is no longer kept.
	if left, err := r.disk.held(); err != nil || len(left) != 0 {
		t.Errorf("%d are still kept, %v", len(left), err)
	}
	r = r.reborn(c.handle, keeping)
	if err := r.takeUp(r.ctx); err != nil {
		t.Fatal(err)
	}
	r.wait()
	if c.calls() != 2 {
		t.Errorf("two orders were done %d times", c.calls())
	}
}

func TestOrdersOfOtherKindsAreNotKept(t *testing.T) {
	entered := make(chan string, 10)
	r := newRig(t, untilEnd(entered))
	r.give(r.order("1"))
	await(t, "it", entered)
	if left, err := r.disk.held(); err != nil || len(left) != 0 {
		t.Errorf("%d are kept, %v", len(left), err)
	}
}

// TestAKeptOrderThatIsTakenBackIsCanceled though a former life began it: nothing of
// it is left.
func TestAKeptOrderThatIsTakenBackIsCanceled(t *testing.T) {
	entered := make(chan string, 10)
	r := newRig(t, untilEnd(entered), keeping)
	r.give(r.order("1"))
	await(t, "it", entered)
	r = r.reborn(untilEnd(entered), keeping)
	if err := r.takeUp(r.ctx); err != nil {
		t.Fatal(err)
	}
	await(t, "it again", entered)
	r.takeBack("1")
	if rep := r.ends("1"); rep.State != wire.Canceled {
		t.Errorf("%+v", rep)
	}
}

func TestAKeptOrderThatHasExpiredMeanwhileIsNotDone(t *testing.T) {
	entered := make(chan string, 10)
	r := newRig(t, untilEnd(entered), keeping)
	o := r.order("1")
	r.give(o)
	await(t, "it", entered)
	var c counter
	r = r.reborn(c.handle, keeping, func(u *duties) {
		u.clock = NewClock(time.Time{})
		u.clock.Trust(o.Expires.Add(time.Second), 0)
	})
	if err := r.takeUp(r.ctx); err != nil {
		t.Fatal(err)
	}
	if rep := r.ends("1"); rep.State != wire.Rejected || rep.Code != wire.CodeExpired || c.calls() != 0 {
		t.Errorf("%+v after %d calls", rep, c.calls())
	}
}

func TestWhatIsHeldIsForgottenWithItsOrder(t *testing.T) {
	r := newRig(t, nil)
	j := r.disk
	now := time.Now()
	for _, order := range []string{"old", "new"} {
		expires := now.Add(time.Hour)
		if order == "old" {
			expires = now.Add(-2 * keepConcluded)
		}
		if err := j.hold(order, []byte(order)); err != nil {
			t.Fatal(err)
		}
		if err := j.begin(order, expires, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.forget(now); err != nil {
		t.Fatal(err)
	}
	left, err := j.held()
	if err != nil || len(left) != 1 || string(left[0]) != "new" {
		t.Errorf("%q, %v", left, err)
	}
}

func TestJobsAreNotOthersLoad(t *testing.T) {
	cpus := float64(runtime.NumCPU())
	var l jobsLoad
	at := time.Unix(1000, 0)
	sample := func(total, agent float64, jobs time.Duration) {
		at = at.Add(10 * time.Second)
		l.sample(&hw.Telemetry{At: at, CPUPercent: &total, Agent: hw.Process{CPUPercent: &agent}}, jobs)
	}
	wants := func(want float64) {
		t.Helper()
		if got := l.others(); got == nil || *got < want-0.01 || *got > want+0.01 {
			t.Errorf("others take %v%%, want %g", got, want)
		}
	}
	if l.others() != nil {
		t.Error("a load before the first sample")
	}
	sample(100, 0, 0)
	wants(100)
	sample(100, 0, time.Duration(10*cpus)*time.Second) // jobs had everything
	wants(0)
	sample(80, 10*cpus, time.Duration(15*cpus)*time.Second) // half for jobs, a tenth for the agent
	wants(20)
	sample(10, 0, time.Duration(25*cpus)*time.Second) // more than there was: clocks differ
	wants(0)
	l.sample(nil, 0)
	if l.others() != nil {
		t.Error("a load that was not measured")
	}
}

func TestTheOwnersWordIsForTheAgentToo(t *testing.T) {
	dir := t.TempDir()
	if w, err := OwnersWord(dir); err != nil || w != (policy.Word{}) {
		t.Errorf("%+v, %v", w, err)
	}
	want := policy.Word{Paused: true, Until: time.Now().Add(time.Hour).UTC().Truncate(time.Second)}
	if err := SayOfJobs(dir, want); err != nil {
		t.Fatal(err)
	}
	if w, err := OwnersWord(dir); err != nil || w != want {
		t.Errorf("%+v, %v", w, err)
	}
	if j, err := ReadJobs(dir); err != nil || j == nil || j.Word != want {
		t.Errorf("%+v, %v", j, err)
	}
}

func TestOnlyNewsIsWritten(t *testing.T) {
	a := Jobs{At: time.Unix(1, 0), Jobs: []jobs.Listed{{Order: "1", State: "running", CPU: 1, Progress: 0.5}}}
	b := Jobs{At: time.Unix(2, 0), Jobs: []jobs.Listed{{Order: "1", State: "running", CPU: 2, Progress: 0.6}}}
	if !alike(a, b) {
		t.Error("a job that goes on is news")
	}
	b.Jobs[0].State = "suspended"
	if alike(a, b) {
		t.Error("a job that stands still is none")
	}
}
