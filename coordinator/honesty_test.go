package coordinator

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// luck is what a coordinator draws: a challenge after each job, or never one.
type luck struct{ never atomic.Bool }

func (l *luck) even() float64 {
	if l.never.Load() {
		return 1
	}
	return 0
}

// honestWorld makes challenges among jobs.
func honestWorld(t testing.TB, edit func(*Config)) (*world, *luck) {
	t.Helper()
	l := &luck{}
	w := openWith(t, t.TempDir(), func(c *Config) {
		c.Audits.Jobs, c.even = true, l.even
		edit(c)
	})
	t.Cleanup(w.Close)
	return w, l
}

// worker is a device that says how it stands with jobs.
func (w *world) worker(t testing.TB) *device {
	t.Helper()
	d := w.device(t)
	d.tell(ready())
	return d
}

// chunksOf stores n files of one chunk each, of one size, each on two devices.
func (w *world) chunksOf(t testing.TB, n, size int) (ids []string) {
	t.Helper()
	for range n {
		data := someBytes(size)
		id := chunk.Sum(data).String()
		w.putFile(t, "chunks/"+id, data, 2)
		ids = append(ids, id)
	}
	return ids
}

// doJob has a device do a customer's job.
func (w *world) doJob(t testing.TB, d *device, module, input string) OrderRecord {
	t.Helper()
	ctx := testContext(t)
	j, err := w.op.StartJob(ctx, api.JobSpec{Module: module, Args: []string{"-x"}, Input: &api.JobChunk{Object: "chunks/" + input},
		Limits: wire.JobLimits{CPUSeconds: 7}, Needs: on(d), Verify: api.VerifyNone})
	must(t, err)
	_, err = w.op.AwaitJob(ctx, j.ID, nil)
	must(t, err)
	row, err := w.jobs.tasks.find(ctx, taskKey(j.ID, 0))
	must(t, err)
	v, err := w.outbox.get(ctx, d.id, row.Attempts[0].Order)
	must(t, err)
	return v
}

func lie(r *wire.JobResult, _ []byte) []byte {
	out := []byte("made up\n")
	r.Output = sumOf(out)
	return out
}

func (d *device) lies() {
	d.on(wire.KindJobRun, func(o wire.Order) *reply { return d.compute(o, lie) })
}

// challengesOf are the routine compute challenges of a device that have ended, the newest first.
func (w *world) challengesOf(t testing.TB, d wire.DeviceID) (out []api.Audit) {
	t.Helper()
	list, err := w.op.Audits(testContext(t), api.AuditQuery{Device: d})
	must(t, err)
	for _, s := range list.Audits {
		if s.Kind == api.ComputeAudit && s.Routine && s.Outcome != api.AuditPending {
			a, err := w.op.AuditByID(testContext(t), s.ID)
			must(t, err)
			out = append(out, a)
		}
	}
	return out
}

func TestAChallengeComesAmongJobsAndIsLikeThem(t *testing.T) {
	t.Parallel()
	w, luck := honestWorld(t, func(*Config) {})
	d, _ := w.worker(t), w.worker(t)
	ids := w.chunksOf(t, 3, 5000)
	w.chunksOf(t, 3, 50_000) // of another size than the customer's
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	type seen struct {
		wire.JobRun
		begun []api.Audit
	}
	jobs := make(chan seen, 8)
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		b, _ := wire.DecodeBody[wire.JobRun](o)
		jobs <- seen{b, w.audits.underWay()}
		return d.compute(o, nil)
	})
	w.doJob(t, d, module, ids[0])
	customers, challenge := next(t, jobs, "the customer's job"), next(t, jobs, "the challenge")
	luck.never.Store(true)
	if len(customers.begun) != 0 {
		t.Errorf("a customer's job is a challenge: %+v", customers.begun)
	}
	b := challenge.begun
	if len(b) != 1 || b[0].Commitment == "" || b[0].Salt != "" || b[0].Expected != "" || !b[0].Routine {
		t.Errorf("on record before it was sent: %+v", b)
	}
	if c, j := challenge.JobRun, customers.JobRun; c.Module.SHA256 != j.Module.SHA256 || !slices.Equal(c.Args, j.Args) || c.Limits != j.Limits || c.Input == j.Input || !slices.Contains(ids, c.Input) {
		t.Errorf("the challenge is %+v, the job %+v", c, j)
	}
	eventually(t, "the challenge is judged", func() bool { return len(w.challengesOf(t, d.id)) == 1 })
	if a := w.challengesOf(t, d.id)[0]; a.Outcome != api.AuditRight || a.Penalty != nil {
		t.Errorf("%+v", a)
	}
	eventually(t, "it is counted", func() bool {
		s := w.audits.honesty.standing(d.id)
		return s.Challenges > 0.9 && s.Jobs > 0.9 && s.Jobs < 1.1 && s.Right > 0.2 && s.Runtime == trust.Runtime{Engine: toyOnDevices, Agent: "1.0.0"}
	})
}

func TestTheSameChallengeIsNotGivenTwice(t *testing.T) {
	t.Parallel()
	w, _ := honestWorld(t, func(*Config) {})
	d, _ := w.worker(t), w.worker(t)
	ids := w.chunksOf(t, 4, 5000)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	inputs := make(chan string, 16)
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		b, _ := wire.DecodeBody[wire.JobRun](o)
		inputs <- b.Input
		return d.compute(o, nil)
	})
	had := map[string]bool{}
	for i := range 2 { // two jobs, and a challenge after each
		w.doJob(t, d, module, ids[i])
		for range 2 {
			in := next(t, inputs, "a job")
			if had[in] && in != ids[1] { // a challenge may come before a customer's own job
				t.Errorf("chunk %s comes again", in)
			}
			had[in] = true
		}
		eventually(t, "the challenge is judged", func() bool { return len(w.challengesOf(t, d.id)) == i+1 })
	}
}

func TestALieCostsTheFigureAndAllFurtherJobs(t *testing.T) {
	t.Parallel()
	w, luck := honestWorld(t, func(*Config) {})
	d, _ := w.worker(t), w.worker(t)
	ids := w.chunksOf(t, 3, 5000)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	d.lies()
	w.doJob(t, d, module, ids[0])
	eventually(t, "the lie is found", func() bool { return !w.audits.honesty.may(d.id, module) })
	luck.never.Store(true)
	h, err := w.op.Honesty(testContext(t), d.id)
	must(t, err)
	if !h.Distrusted || !h.Aside || h.Trusted || h.Share != 0.2 || h.Compute > 0.2 || len(h.Penalties) != 1 || len(h.Why) == 0 || h.Engine != toyOnDevices || h.Agent != "1.0.0" {
		t.Fatalf("%+v", h)
	}
	p := h.Penalties[0]
	if p.Figure != api.Compute || p.Cause != "wrong" || p.Amount < 0.8 {
		t.Errorf("%+v", p)
	}
	if raw, err := w.op.Evidence(testContext(t), p.Audit); err != nil || len(raw) == 0 {
		t.Errorf("evidence: %v", err)
	}
	if s := w.audits.scoreOf(d.id); s.integrity() != 1 || s.distrusted() {
		t.Errorf("what it holds is doubted: %+v", s.view())
	}
}

// A challenge that is owed is on record, and made after a restart.
func TestAnOwedChallengeSurvivesARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := &luck{}
	start := func() *world {
		return openWith(t, dir, func(c *Config) { c.Audits.Jobs, c.even = true, l.even })
	}
	w := start()
	d, other := w.worker(t), w.worker(t)
	ids := w.chunksOf(t, 3, 5000)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	<-w.fill(w.audits.honesty.turn) // nobody makes one before the restart
	v := w.doJob(t, d, module, ids[0])
	w.audits.honesty.challengeOwed(t, d.id, v.Order.ID)
	w.Close()
	l.never.Store(true) // so it is that one, or none
	w = start()
	t.Cleanup(w.Close)
	d.connect(w)
	other.connect(w)
	d.tell(ready())
	other.tell(ready())
	t.Cleanup(d.leave)
	t.Cleanup(other.leave)
	eventually(t, "the challenge is made", func() bool { return len(w.challengesOf(t, d.id)) == 1 })
	if a := w.challengesOf(t, d.id)[0]; a.Outcome != api.AuditRight {
		t.Errorf("%+v", a)
	}
}

// fill takes the place in a channel of capacity 1.
func (w *world) fill(c chan struct{}) <-chan struct{} {
	done := make(chan struct{})
	go func() { c <- struct{}{}; close(done) }()
	return done
}

func (h *honesty) challengeOwed(t testing.TB, d wire.DeviceID, order string) {
	t.Helper()
	eventually(t, "the challenge is on record", func() bool {
		found := false
		h.rows.each(func(_ string, o owed) bool { found = found || o.Device == d && o.Order == order; return true })
		return found
	})
}

// Devices whose engine is not the coordinator's are liars only if others with that engine
// say so.
func TestAnotherEngineIsNoLie(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		witnesses []func(*wire.JobResult, []byte) []byte // nil: as the coordinator has it
		outcome   api.AuditOutcome
		doubts    int
		strangers bool // each device came by a token of its own, else all by one
	}{
		"two others have it as the coordinator": {[]func(*wire.JobResult, []byte) []byte{nil, nil}, api.AuditWrong, 0, false},
		"all others have it, too":               {[]func(*wire.JobResult, []byte) []byte{lie, lie}, api.AuditVoid, 0, true},
		"all who came by one token have it":     {[]func(*wire.JobResult, []byte) []byte{lie, lie}, api.AuditVoid, 1, false},
		"there is one other alone":              {[]func(*wire.JobResult, []byte) []byte{nil}, api.AuditVoid, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := openWith(t, t.TempDir(), func(c *Config) {
				c.Compute = func(ctx context.Context, j ComputeJob) (ComputeResult, error) {
					r, err := toyEngine(ctx, j)
					r.Engine = toyElsewhere
					return r, err
				}
			})
			t.Cleanup(w.Close)
			d := w.device(t)
			devices := append([]*device{d}, w.devices(t, len(c.witnesses))...)
			for _, x := range devices {
				if !c.strangers {
					_, err := w.reg.rows.change(testContext(t), string(x.id), func(v *api.DeviceRecord, _ bool) error { v.Token = "one"; return nil })
					must(t, err)
				}
			}
			data := someBytes(5000)
			id := chunk.Sum(data).String()
			w.putFile(t, "chunks/"+id, data, len(devices))
			module, err := w.op.PutModule(testContext(t), []byte("module"))
			must(t, err)
			for i, bend := range c.witnesses {
				x := devices[i+1]
				x.tell(ready())
				x.on(wire.KindJobRun, func(o wire.Order) *reply { return x.compute(o, bend) })
				w.doJob(t, x, module, id)
				eventually(t, "it is known what engine it has", func() bool { return w.audits.honesty.copyOf(x.id).Engine == toyOnDevices })
			}
			d.lies()
			a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: module})
			must(t, err)
			if a.Outcome != c.outcome || (a.Penalty != nil) != (c.outcome == api.AuditWrong) {
				t.Errorf("%s (%s), it cost %+v", a.Outcome, a.Reason, a.Penalty)
			}
			if h, err := w.op.Honesty(testContext(t), d.id); err != nil || len(h.Doubts) != c.doubts || h.Distrusted != (c.outcome == api.AuditWrong) {
				t.Errorf("%+v %v", h, err)
			}
		})
	}
}

// A module that can see that it was stopped may give another result then, and the device is
// honest; one that cannot see it gives the same.
func TestWhatWasStoppedIsNoLieIfItsModuleCanSeeThat(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		looks   bool
		disturb func(*wire.JobResult)
		outcome api.AuditOutcome
		doubts  int
	}{
		"it looks":                 {true, func(r *wire.JobResult) { r.Disturbed = true }, api.AuditVoid, 1},
		"it looks, an old agent":   {true, func(r *wire.JobResult) { r.SuspendedSeconds = 2 }, api.AuditVoid, 1},
		"it looks, an old one too": {true, func(r *wire.JobResult) { r.Resumed = 1 }, api.AuditVoid, 1},
		"it cannot look":           {false, func(r *wire.JobResult) { r.Disturbed = true }, api.AuditWrong, 0},
		"it was not stopped":       {true, func(*wire.JobResult) {}, api.AuditWrong, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := openWith(t, t.TempDir(), func(cfg *Config) {
				cfg.Compute = func(ctx context.Context, j ComputeJob) (ComputeResult, error) {
					r, err := toyEngine(ctx, j)
					r.Looks = c.looks
					return r, err
				}
			})
			t.Cleanup(w.Close)
			d := w.devices(t, 2)[0]
			w.chunksOf(t, 1, 5000)
			module, err := w.op.PutModule(testContext(t), []byte("module"))
			must(t, err)
			d.on(wire.KindJobRun, func(o wire.Order) *reply {
				return d.compute(o, func(r *wire.JobResult, out []byte) []byte { c.disturb(r); return lie(r, out) })
			})
			a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: module})
			must(t, err)
			if a.Outcome != c.outcome || (a.Penalty != nil) != (c.outcome == api.AuditWrong) {
				t.Errorf("%s (%s), it cost %+v", a.Outcome, a.Reason, a.Penalty)
			}
			if h, err := w.op.Honesty(testContext(t), d.id); err != nil || len(h.Doubts) != c.doubts || h.Distrusted != (c.outcome == api.AuditWrong) {
				t.Errorf("%+v %v", h, err)
			}
		})
	}
}

// What two devices differ about, the coordinator settles, with evidence that can be judged
// anywhere; whoever says so again, it costs once.
func TestADisputeIsSettledByTheCoordinatorsOwnRun(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	honest, liar := w.device(t), w.device(t)
	data := someBytes(5000)
	id := chunk.Sum(data).String()
	w.putFile(t, "chunks/"+id, data, 2)
	module, err := w.op.PutModule(ctx, []byte("module"))
	must(t, err)
	liar.lies()
	h := w.audits.honesty
	c := h.begin(module, honest.id)
	if c.Copies != 2 {
		t.Fatalf("%+v", c)
	}
	c.Sent = h.pick(c, []wire.DeviceID{honest.id, liar.id}, "", 2)
	var asked wire.JobRun
	for _, to := range c.Sent {
		d := honest
		if to.Device == liar.id {
			d = liar
		}
		v := w.doJob(t, d, module, id)
		res, err := decodeResult(v.Result)
		must(t, err)
		asked, err = wire.DecodeBody[wire.JobRun](v.Order)
		must(t, err)
		c.Answered(trust.Answer{Copy: to, Digest: resultDigest(res), CPUSeconds: 1, Order: v.Order.ID})
	}
	if s := h.next(c); !s.Run || s.Accept != "" || s.Done {
		t.Fatalf("%+v", s)
	}
	own, err := h.run(ctx, asked)
	must(t, err)
	c.Own, c.NoMore = &own, true
	s := h.next(c)
	if !s.Done || s.Accept != own.Digest || len(s.Verdicts) != 2 {
		t.Fatalf("%+v", s)
	}
	for range 2 {
		must(t, h.settle(ctx, c, s.Verdicts))
	}
	must(t, h.flush(ctx))
	if a := h.standing(honest.id); a.Right < 0.2 || a.Wrong > 0 {
		t.Errorf("the honest one: %+v", a)
	}
	v, err := w.op.Honesty(ctx, liar.id)
	must(t, err)
	if !v.Distrusted || len(v.Penalties) != 1 || v.Wrong > 1.26 {
		t.Fatalf("the liar: %+v", v)
	}
	raw, err := w.op.Evidence(ctx, v.Penalties[0].Audit)
	must(t, err)
	out, err := toyCompute(ctx, []byte("module"), asked.Args, data)
	must(t, err)
	if got, err := CheckEvidence(raw, EvidenceChecks{Output: out}); err != nil || got.Outcome != api.AuditWrong || got.Kind != api.DisputeAudit {
		t.Errorf("%+v %v", got, err)
	}
	if _, err := CheckEvidence(raw, EvidenceChecks{}); err == nil {
		t.Error("the coordinator's word is enough")
	}
}

func TestWhatTheCoordinatorCannotRunItSays(t *testing.T) {
	in := wire.JobRun{Input: "x"}
	if err := answerable(in); err != nil {
		t.Error(err)
	}
	for name, edit := range map[string]func(*wire.JobRun){
		"live":    func(j *wire.JobRun) { j.Live = true },
		"dataset": func(j *wire.JobRun) { j.Inputs = []wire.JobInput{{Name: "a", Dataset: "b"}} },
		"sensors": func(j *wire.JobRun) { j.Inputs = []wire.JobInput{{Name: "a", Sensors: &wire.HistoryRequest{}}} },
		"large": func(j *wire.JobRun) {
			j.Inputs = []wire.JobInput{{Name: "a", Parts: []wire.JobPart{{Chunk: "x", Size: maxOwnInput + 1}}}}
		},
	} {
		j := in
		if edit(&j); answerable(j) == nil {
			t.Errorf("%s: it can", name)
		}
	}
}

func TestAnUpdateOfTheAgentMakesADeviceNew(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	h := w.audits.honesty
	for range 50 {
		h.earn(d.id, func(e *earned) {
			e.runtime = trust.Runtime{Engine: toyOnDevices, Agent: "1.0.0"}
			e.confirmed = append(e.confirmed, ownHas)
		})
	}
	if !h.trusted(d.id) { // before it is on record
		t.Fatalf("%+v", h.standing(d.id))
	}
	must(t, h.flush(testContext(t)))
	if v, err := w.op.Honesty(testContext(t), d.id); err != nil || !v.Trusted || v.Reset != "" || v.Share > 0.0501 {
		t.Fatalf("%+v %v", v, err)
	}
	_, err := w.reg.rows.change(testContext(t), string(d.id), func(v *api.DeviceRecord, _ bool) error { v.Agent = "1.0.1"; return nil })
	must(t, err)
	if v, err := w.op.Honesty(testContext(t), d.id); err != nil || v.Trusted || v.Share != 0.2 || !strings.Contains(v.Reset, "1.0.1") {
		t.Errorf("%+v %v", v, err)
	}
}

// Nobody's second copy goes to the same owner, as far as owners are known.
func TestOwnersAreThoseOfTheLabel(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d := w.devices(t, 3)
	for _, x := range d[:2] {
		_, err := w.op.ChangeDevices(ctx, api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{x.id}}, SetLabels: map[string]string{ownerLabel: "ann"}})
		must(t, err)
	}
	h := w.audits.honesty
	c := trust.Case{Sent: []trust.Copy{h.copyOf(d[0].id)}}
	got := h.pick(c, []wire.DeviceID{d[0].id, d[1].id, d[2].id}, "", 3)
	if len(got) != 1 || got[0].Device != d[2].id || got[0].Owner != string(d[2].id) || got[0].Near == "" {
		t.Errorf("%+v", got)
	}
}

func TestChallengesAreBounded(t *testing.T) {
	t.Parallel()
	w, _ := honestWorld(t, func(*Config) {})
	d := w.device(t)
	h := w.audits.honesty
	<-w.fill(h.turn)
	for i := range 100 {
		h.ended(wire.Report{Device: d.id, Order: fmt.Sprint(i), State: wire.Succeeded, Body: []byte(`{}`)})
	}
	for range 3 {
		must(t, h.flush(testContext(t)))
	}
	n := 0
	h.rows.each(func(string, owed) bool { n++; return true })
	if n > maxOwedOf || n < maxOwedOf-2 { // one or two wait for their turn
		t.Errorf("%d challenges are owed by one device", n)
	}
	h.ended(wire.Report{Device: d.id, Order: "x", State: wire.Failed, Body: []byte(`{}`)})
	if s := h.standing(d.id); s.Jobs < 99 || s.Jobs > 100 {
		t.Errorf("%v jobs were done", s.Jobs)
	}
}

// The coordinator's own runs come one at a time, and with rests between them.
func TestTheCoordinatorWorksOutOneAnswerAtATime(t *testing.T) {
	t.Parallel()
	var at, most atomic.Int64
	var ran atomic.Int64
	w, luck := honestWorld(t, func(c *Config) {
		c.Compute = func(ctx context.Context, j ComputeJob) (ComputeResult, error) {
			if n := at.Add(1); n > most.Load() {
				most.Store(n)
			}
			defer at.Add(-1)
			ran.Add(1)
			select {
			case <-time.After(50 * time.Millisecond): // what a job takes
			case <-ctx.Done():
			}
			return toyEngine(ctx, j)
		}
	})
	ds := []*device{w.worker(t), w.worker(t), w.worker(t)}
	ids := w.chunksOf(t, 6, 5000)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	began := time.Now()
	for _, id := range ids[:3] {
		for _, d := range ds {
			if d.holds(id) {
				w.doJob(t, d, module, id)
			}
		}
	}
	eventually(t, "some are judged", func() bool { return ran.Load() >= 3 })
	took := time.Since(began)
	luck.never.Store(true)
	if most.Load() != 1 {
		t.Errorf("%d at a time", most.Load())
	}
	if least := 2 * (1 + paceOwn) * 50 * time.Millisecond; took < least {
		t.Errorf("three of 50 ms each were made within %s, before %s", took, least)
	}
}

// Who lies in a job that was given to several devices is caught by it, and nobody else.
func TestWhoLiesInACustomersJobIsCaught(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	ds := w.devices(t, 3)
	w.putFile(t, "in", someBytes(100), 3)
	for _, d := range ds[:2] { // in league, and the majority
		d.lies()
	}
	q := input(w.module(t), "in")
	q.Copies = 3
	if _, err := w.op.RunJob(testContext(t), q); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the liars are caught", func() bool {
		return w.audits.mayCompute(ds[0].id) == 0 && w.audits.mayCompute(ds[1].id) == 0
	})
	for i, d := range ds {
		h, err := w.op.Honesty(testContext(t), d.id)
		must(t, err)
		if h.Distrusted != (i < 2) || len(h.Penalties) != btoi(i < 2) {
			t.Errorf("device %d: %+v", i, h)
		}
	}
	q.Copies = 1
	r, err := w.op.RunJob(testContext(t), q)
	if err != nil || r.Device != ds[2].id {
		t.Errorf("the next job is given to %s: %v", r.Device, err)
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// underWay are the challenges that have not ended, as operators see them.
func (a *audits) underWay() (out []api.Audit) {
	for _, row := range a.challenges.all(byChallenge) {
		out = append(out, row.Audit)
	}
	return out
}
