package qemu

import (
	"fmt"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// TestAJobGoesOnAfterAPowerCut pulls the plug in the middle of a job that makes
// checkpoints. The device boots and goes on by itself, not from the beginning, and what
// comes of it stands once.
func TestAJobGoesOnAfterAPowerCut(t *testing.T) {
	const (
		steps = 300
		every = 25 // steps from one checkpoint to the next
	)
	f := newFleet(t)
	d := newDevice(f)
	d.options.Config = f.Write("config.toml", fmt.Appendf(nil, "coordinator = %q\ntoken = %q\n\n[jobs]\nenabled = true\n", address(f), f.NewToken(1)))
	d.powerOn()
	d.awaitOnline()
	var job api.Job
	f.OK(&job, "job", "run", f.HostedGuest(), "--arg", "long", "--arg", fmt.Sprint(steps), "--cpu", "10m", "--wall", "15m", "--start")
	progress := func() float64 {
		v, err := f.Client.Job(f.Ctx, job.ID, 0)
		if err != nil {
			t.Fatal(err)
		}
		if v.State.Terminal() {
			t.Fatalf("the job is over: %+v", v)
		}
		if len(v.Open) != 1 || len(v.Open[0].Attempts) != 1 {
			return 0
		}
		return v.Open[0].Attempts[0].Progress
	}
	f.Until("a third of the job being done", func() bool { return progress() > 1.0/3 })
	d.cutPower()
	at := progress()
	t.Logf("the power is cut at %.0f%%", 100*at)
	d.powerOn()
	d.awaitOnline()

	r, err := f.Client.JobOutcome(f.Ctx, job.ID)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintln(steps, testbed.HostedLong(steps)); string(r.Output) != want {
		t.Errorf("the result is %q, want %q", r.Output, want)
	}
	// Each checkpoint is durable before the step after it.
	from, least := 0, int(at*steps)/every*every
	if _, said, ok := strings.Cut(r.Result.Stderr, "went on at "); ok {
		_, _ = fmt.Sscan(said, &from)
	}
	t.Logf("it went on at step %d of %d, %.1f s of processor since", from, steps, r.Result.CPUSeconds)
	if from < least || r.Result.Resumed != 1 || len(r.Attempts) != 1 {
		t.Errorf("it went on at step %d, at least %d was saved; resumed %d times, in %d attempts", from, least, r.Result.Resumed, len(r.Attempts))
	}
	list, err := f.Client.Orders(f.Ctx, api.OrderQuery{Kind: wire.KindJobRun})
	if err != nil || len(list.Orders) != 1 || list.Orders[0].State != wire.Succeeded {
		t.Errorf("%d orders for one job: %+v %v", len(list.Orders), list.Orders, err)
	}
}
