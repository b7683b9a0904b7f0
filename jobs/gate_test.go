package jobs

import (
	"context"
	"runtime"
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
	awaitQueue(s)
	p.Slots = 2
	s.SetPolicy(p)
	<-entered // the second has its turn while the first is at work
	p.Slots = 1
	s.SetPolicy(p)
	go run()
	awaitQueue(s)
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
	// Turn and end come in the same moment: whatever is seen first, no place is lost.
	for range 100 {
		if g.enter(ended) == nil {
			g.leave()
		}
	}
	if err := g.enter(t.Context()); err != nil || g.busy != 1 || len(g.queue) != 0 {
		t.Errorf("%v, %d busy, %d wait", err, g.busy, len(g.queue))
	}
}

// awaitQueue returns when a job waits for its turn.
func awaitQueue(s *Service) {
	for waiting := 0; waiting == 0; runtime.Gosched() {
		s.slots.mu.Lock()
		waiting = len(s.slots.queue)
		s.slots.mu.Unlock()
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
	awaitQueue(s)
	p.Enabled = false
	s.SetPolicy(p)
	s.slots.leave()
	wantProblem(t, <-result, wire.Rejected, wire.CodePolicy, "no jobs")
}
