package jobs

import (
	"context"
	"testing"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

func TestMoreSlotsLetWaitingJobsBeginAndFewerEndNone(t *testing.T) {
	p := policy.Policy{Enabled: true, Slots: 1}
	s, o, _ := device(t, p)
	entered, leave := make(chan struct{}), make(chan struct{})
	o.reading = func(context.Context) { entered <- struct{}{}; <-leave }
	results := make(chan error)
	run := func() {
		_, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle"), Input: "in"})
		results <- err
	}
	go run()
	<-entered
	go run()
	p.Slots = 2
	s.SetPolicy(p)
	<-entered // the second has its turn while the first is at work
	p.Slots = 1
	s.SetPolicy(p)
	go run()
	leave <- struct{}{}
	if err := <-results; err != nil {
		t.Error(err)
	}
	select {
	case <-entered:
		t.Error("a job runs beside another with one slot")
	default: // that it does not come later either is the gate's own test
	}
	close(leave)
	<-entered
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

func TestAGateOpensOnlyBelowItsLimit(t *testing.T) {
	var g gate
	g.resize(2)
	for range 2 {
		if err := g.enter(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	g.resize(1)
	g.leave()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if g.enter(ended) == nil {
		t.Error("one came in beside another with a limit of one")
	}
	g.leave()
	if err := g.enter(t.Context()); err != nil || g.busy != 1 || len(g.queue) != 0 {
		t.Errorf("%v, %d busy, %d wait", err, g.busy, len(g.queue))
	}
}

func TestAJobThatWaitedGoesByThePolicyOfItsTurn(t *testing.T) {
	p := policy.Policy{Enabled: true, Slots: 1}
	s, o, _ := device(t, p)
	if err := s.slots.enter(t.Context()); err != nil {
		t.Fatal(err)
	}
	o.reading = func(context.Context) { t.Error("a job began though jobs are switched off") }
	result := make(chan error)
	go func() {
		_, err := do(t, s, wire.JobRun{Module: blob(idle, "/idle"), Input: "in"})
		result <- err
	}()
	for waiting := 0; waiting == 0; {
		s.slots.mu.Lock()
		waiting = len(s.slots.queue)
		s.slots.mu.Unlock()
	}
	p.Enabled = false
	s.SetPolicy(p)
	s.slots.leave()
	wantProblem(t, <-result, wire.Rejected, wire.CodePolicy, "no jobs")
}
