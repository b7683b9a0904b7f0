package coordinator

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// afterTheFirst has a device do its first job at once, and the others as it is told.
func (d *device) afterTheFirst(f func(wire.Order) *reply) {
	var n atomic.Int32
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		if n.Add(1) == 1 {
			return d.compute(o, nil)
		}
		return f(o)
	})
}

// A challenge waits on its device as a customer's job does, and costs nothing by that; its
// answer is judged whenever it comes, and is no customer's job.
func TestALateAnswerToAChallengeIsJudged(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		bend func(*wire.JobResult, []byte) []byte
		want api.AuditOutcome
	}{"right": {nil, api.AuditRight}, "a lie": {lie, api.AuditWrong}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, luck := honestWorld(t, func(*Config) {})
			w.audits.limit = 2 * time.Second
			d, _ := w.worker(t), w.worker(t)
			ids := w.chunksOf(t, 3, 5000)
			has, may := make(chan bool, 1), make(chan bool)
			d.afterTheFirst(func(o wire.Order) *reply {
				luck.never.Store(true)
				has <- true
				<-may
				return d.compute(o, c.bend)
			})
			w.doJob(t, d, w.module(t), ids[0])
			next(t, has, "the challenge")
			time.Sleep(w.audits.limit + 500*time.Millisecond) // a device is slow for so long
			if a, s := w.challengesOf(t, d.id), w.audits.scoreOf(d.id); len(a) > 0 || s.reachability() < 1 || len(w.audits.underWay()) != 1 {
				t.Errorf("it has ended before it was answered: %+v, reachability %v", a, s.reachability())
			}
			close(may)
			eventually(t, "the answer is judged, and counted", func() bool { return len(w.audits.underWay()) == 0 })
			a := w.challengesOf(t, d.id)[0]
			if a.Outcome != c.want || a.Salt == "" || a.Expected == "" || (a.Penalty != nil) != (c.want == api.AuditWrong) {
				t.Errorf("%+v", a)
			}
			must(t, w.audits.honesty.flush(testContext(t)))
			if s := w.audits.honesty.standing(d.id); s.Jobs > 1 || s.Challenges < 0.9 {
				t.Errorf("%v jobs of customers, %v challenges", s.Jobs, s.Challenges)
			}
		})
	}
}

// Who starts next finds a challenge that is under way, and knows its report for what it is.
func TestAChallengeUnderWaySurvivesARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := &luck{}
	start := func() *world {
		return openWith(t, dir, func(c *Config) { c.Audits.Jobs, c.even = true, l.even })
	}
	w := start()
	d, other := w.worker(t), w.worker(t)
	ids := w.chunksOf(t, 3, 5000)
	has := make(chan bool, 8)
	d.afterTheFirst(func(wire.Order) *reply {
		l.never.Store(true)
		has <- true
		return nil
	})
	w.doJob(t, d, w.module(t), ids[0])
	next(t, has, "the challenge")
	must(t, w.audits.honesty.flush(testContext(t)))
	w.Close()
	w = start()
	t.Cleanup(w.Close)
	if n := len(w.audits.underWay()); n != 1 {
		t.Fatalf("%d challenges are under way", n)
	}
	d.lies()
	other.connect(w)
	d.connect(w)
	other.tell(ready())
	d.tell(ready())
	t.Cleanup(d.leave)
	t.Cleanup(other.leave)
	eventually(t, "the answer is judged, and counted", func() bool { return len(w.audits.underWay()) == 0 })
	if a := w.challengesOf(t, d.id)[0]; a.Outcome != api.AuditWrong || !a.Evidence || a.Penalty == nil {
		t.Errorf("%+v", a)
	}
	must(t, w.audits.honesty.flush(testContext(t)))
	if s := w.audits.honesty.standing(d.id); s.Jobs > 1 {
		t.Errorf("%v jobs of customers", s.Jobs)
	}
}

// Who was there all the time and has not come to it is no absent one.
func TestAChallengeThatADeviceNeverCameToIsNotHeldAgainstIt(t *testing.T) {
	t.Parallel()
	w, luck := honestWorld(t, func(*Config) {})
	d, _ := w.worker(t), w.worker(t)
	ids := w.chunksOf(t, 3, 5000)
	orders := make(chan wire.Order, 8)
	d.afterTheFirst(func(o wire.Order) *reply {
		luck.never.Store(true)
		orders <- o
		return nil
	})
	w.doJob(t, d, w.module(t), ids[0])
	o := next(t, orders, "the challenge")
	w.freeze()
	w.advance(o.Expires.Sub(w.time()))
	d.hello()
	w.advance(silence + time.Second)
	eventually(t, "it has ended", func() bool { return len(w.audits.underWay()) == 0 })
	if a := w.challengesOf(t, d.id)[0]; a.Outcome != api.AuditRefused || a.Penalty != nil {
		t.Errorf("%+v", a)
	}
}

func TestWhoIsSentNoChallenge(t *testing.T) {
	t.Parallel()
	w, _ := honestWorld(t, func(*Config) {})
	d := w.device(t)
	h := w.audits.honesty
	<-w.fill(h.turn) // nobody makes one
	must(t, h.rows.create(testContext(t), "x", owed{Device: d.id, Order: "y"}))
	if _, _, ok := h.oldest(); ok {
		t.Error("its agent says nothing about jobs, and it is sent one")
	}
	said := ready()
	for _, paused := range []bool{true, false} {
		if said.Pause = nil; paused {
			said.Pause = &wire.Pause{Code: "owner"}
		}
		d.tell(said)
		if _, _, ok := h.oldest(); ok == paused {
			t.Errorf("its owner pauses jobs: %v; it is sent one: %v", paused, ok)
		}
	}
	for n := range maxUnheard {
		if _, _, ok := h.oldest(); !ok {
			t.Errorf("it has not answered %d, and gets no more", n)
		}
		_, err := w.audits.begin(testContext(t), challengeRow{Audit: api.Audit{Kind: api.ComputeAudit, Device: d.id, Order: "z"}, Own: &trust.Own{}})
		must(t, err)
	}
	if _, _, ok := h.oldest(); ok {
		t.Errorf("it has not answered %d, and gets one more", maxUnheard)
	}
}
