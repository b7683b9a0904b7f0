package coordinator

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// honesty applies the rules of package trust: it keeps what is known of each device's
// results (in its score), and sends the challenges that are due.
//
// # Credit
//
// Jobs are many, and what they earn is little each. It is held in memory and written
// every second, so a crash costs a second of it. What costs a device something is on
// record at once, with evidence, and counts once, however often it is said.
//
// # Challenges among jobs
//
// After each job of a customer it is drawn whether the device owes a challenge
// ([trust.Standing.Challenge]). A draw has no memory, so there is nothing to keep but the
// challenges that are owed; those are records. One at a time they are made: the
// coordinator takes the job of a customer, looks for another input that the device has not had
// with this module, and runs it itself ([audits.known]), which takes at most a
// quarter of a processor. Only then it is sent, with its commitment on record. To the device it
// is one more job after those of its customers: the same module, arguments and limits over
// another chunk that it holds. One that was cut off by a restart is void.
type honesty struct {
	audits *audits
	jobs   *jobs
	active bool   // whether challenges are made that nobody asked for
	engine string // the coordinator's own; see [Config]
	log    *slog.Logger
	now    func() time.Time
	even   func() float64 // evenly from [0, 1), and not to be foretold
	rows   *table[owed]
	wake   chan struct{}     // capacity 1: something is owed
	turn   chan struct{}     // of capacity 1: who makes one
	sent   chan challengeRow // challenges whose answers are to be judged

	flushing sync.Mutex // one at a time

	mu      sync.Mutex
	earned  map[wire.DeviceID]*earned
	writing map[wire.DeviceID]*earned // what of it is being put on record
	draws   []owed                    // not on record yet
	ours    map[string]time.Time      // orders that are no customer's; zero: until they end, else forgotten then
	judging map[string]bool           // orders of challenges that wait for their turn, or whose ends are awaited
	had     map[wire.DeviceID]*hadJobs
	engines enginesSeen
	models  []string // the newest jobs of customers after which challenges were drawn
}

// owed is a challenge that is to be made.
type owed struct {
	Device wire.DeviceID `json:"device"`
	Order  string        `json:"order"` // the customer's job after which it was drawn
	At     time.Time     `json:"at"`
	Tries  int           `json:"tries,omitempty"`
	Next   time.Time     `json:"next,omitzero"` // it is not tried before
}

// earned is what is not in a device's score yet.
type earned struct {
	runtime   trust.Runtime
	jobs      int
	confirmed []trust.Verdict
}

const (
	flushEvery = time.Second
	owedKept   = 24 * time.Hour
	maxOwed    = 1000
	maxOwedOf  = 8 // of a device
	owedTries  = 5
	owedPause  = time.Second // doubled with each try
	hadKept    = 256         // of a device, of customers' jobs and of challenges each; 8 bytes a job
	modelsKept = 64
	maxUnheard = 8           // challenges that a device has not answered, before it gets no more
	oursKept   = time.Minute // of an order that has ended: its report is told of a moment later
	// paceOwn is how many times as long as its own run of a challenge took the coordinator
	// then waits, and paceMost the longest of it.
	paceOwn, paceMost = 3, time.Minute
	// answerLimit bounds the coordinator's own run of a job, and before it reading the inputs.
	answerLimit = 2 * time.Minute
)

func newHonesty(a *audits, active bool, engine string, log *slog.Logger) *honesty {
	return &honesty{audits: a, active: active, engine: engine, log: log, now: a.outbox.now, even: rand.Float64,
		wake: make(chan struct{}, 1), turn: make(chan struct{}, 1), sent: make(chan challengeRow),
		earned: make(map[wire.DeviceID]*earned), ours: make(map[string]time.Time), judging: make(map[string]bool), had: make(map[wire.DeviceID]*hadJobs)}
}

// standing is what is known of a device's results now.
func (h *honesty) standing(d wire.DeviceID) trust.Standing {
	h.mu.Lock()
	s := h.audits.scoreOf(d).Compute
	for _, e := range []*earned{h.writing[d], h.earned[d]} {
		if e != nil {
			e.into(&s, h.now())
		}
	}
	h.mu.Unlock()
	// What it says of itself counts before its first result with it does: else that one
	// would be believed for what another engine has earned.
	if rec, ok := h.audits.storage.reg.rows.get(string(d)); ok {
		s.Under(trust.Runtime{Agent: rec.Agent, Engine: h.audits.storage.reg.engineOf(d)}, h.now())
		s.Never = h.never(s.Runtime.Engine, rec.Arch)
	}
	return s
}

// enginesSeen is which engines several owners' devices have; true: more than one's.
type enginesSeen struct {
	at      time.Time
	several map[string]bool
}

const enginesFresh = time.Second

// never is why a device with that engine cannot be trusted; empty if it can. A result of an
// engine that the coordinator has not is judged by others who have it: where there is nobody
// else, a lie would cost little.
func (h *honesty) never(engine, arch string) string {
	switch {
	case engine == "":
		return "it has not said what engine it has"
	case !trust.Runs(h.engine, engine, arch):
		return fmt.Sprintf("it says that its engine is %q on %s, and the coordinator's is %q: of another version, or one that the device cannot have, nobody can say what its results are to be; update the older of the two", engine, arch, h.engine)
	case engine == h.engine || h.several(engine):
		return ""
	}
	return fmt.Sprintf("its engine is %s, the coordinator's is %s, and no device of another owner has it, who could vouch for results; say whose devices are: \"deimos device set --device ID --set-label owner=NAME\"", engine, h.engine)
}

// several tells whether devices of more than one owner have an engine.
func (h *honesty) several(engine string) bool {
	h.mu.Lock()
	seen := h.engines
	h.mu.Unlock()
	if seen.several == nil || time.Since(seen.at) > enginesFresh {
		seen = enginesSeen{time.Now(), make(map[string]bool)}
		reg, first := h.audits.storage.reg, make(map[string]string)
		for _, v := range reg.list() {
			e := cmp.Or(reg.engineOf(v.ID), h.audits.scoreOf(v.ID).Compute.Runtime.Engine)
			if v.Retired || !trust.Runs(h.engine, e, v.Arch) {
				continue
			}
			whose := ownerOf(v.DeviceRecord)
			if _, ok := first[e]; !ok {
				first[e] = whose
			}
			seen.several[e] = seen.several[e] || first[e] != whose
		}
		h.mu.Lock()
		h.engines = seen
		h.mu.Unlock()
	}
	return seen.several[engine]
}

// engineAs is the engine that a device says as the rules take it: empty if it cannot have it.
// Who says that he has the coordinator's is taken at his word: he is judged by that.
func (h *honesty) engineAs(d wire.DeviceID, said string) string {
	rec, ok := h.audits.storage.reg.rows.get(string(d))
	if said != h.engine && (!ok || !trust.Runs(h.engine, said, rec.Arch)) {
		return ""
	}
	return said
}

// into adds what was earned to a standing.
func (e *earned) into(s *trust.Standing, now time.Time) {
	s.Under(e.runtime, now)
	for range e.jobs {
		s.Did(now)
	}
	for _, v := range e.confirmed {
		s.Credit(v, "", now)
	}
}

// mayCompute is how far jobs may be entrusted to a device; 0: it gets none.
func (a *audits) mayCompute(d wire.DeviceID) float64 { return a.mayComputeAs(d, a.honesty.standing(d)) }

// mayComputeAs is mayCompute, of a device whose standing is known.
func (a *audits) mayComputeAs(d wire.DeviceID, s trust.Standing) float64 {
	if s.Aside() {
		return 0
	}
	return a.trust(d) * s.Figure()
}

// may tells whether a device may be given a job of a module.
func (h *honesty) may(d wire.DeviceID, module string) bool { return h.standing(d).May(module) }

func (h *honesty) trusted(d wire.DeviceID) bool { return h.standing(d).Trusted() }

// copyOf is a device as the rules see it. Its owner is known only if somebody has said so by
// a label.
func (h *honesty) copyOf(d wire.DeviceID) trust.Copy { return h.copyAs(d, h.standing(d)) }

// copyAs is copyOf, of a device whose standing is known.
func (h *honesty) copyAs(d wire.DeviceID, s trust.Standing) trust.Copy {
	c := trust.Copy{Device: d, Owner: string(d), Engine: h.engineAs(d, s.Runtime.Engine)}
	rec, ok := h.audits.storage.reg.rows.get(string(d))
	switch {
	case !ok:
	case rec.Labels[ownerLabel] != "":
		c.Owner = ownerOf(rec)
	case rec.Token != "" || rec.Group != "":
		c.Near = ownerOf(rec)
	}
	return c
}

// begin is a task that is given to a device first; its copies are to be added to it.
func (h *honesty) begin(module string, first wire.DeviceID) trust.Case {
	return trust.NewCase(module, h.standing(first), h.even(), h.even())
}

// next is what follows from a task's answers.
func (h *honesty) next(c trust.Case) trust.Step { return c.Next(h.trusted) }

// pick draws devices for further copies of a task from those that could do it.
func (h *honesty) pick(c trust.Case, from []wire.DeviceID, like string, n int) []trust.Copy {
	var may []trust.Copy
	for _, d := range from {
		if h.may(d, c.Module) {
			may = append(may, h.copyOf(d))
		}
	}
	return trust.Pick(may, c.Sent, like, n, rand.IntN)
}

// settle takes in what a task says of those who did it. Called again for the same, it
// costs nobody anything twice.
func (h *honesty) settle(ctx context.Context, c trust.Case, verdicts []trust.Verdict) error {
	for _, v := range verdicts {
		var err error
		switch v.Finding {
		case trust.Confirmed:
			h.earn(v.Device, func(e *earned) { e.confirmed = append(e.confirmed, v) })
		case trust.Doubtful:
			err = h.doubt(ctx, v.Device, c.Module)
		case trust.Failing:
			err = h.fail(ctx, v.Device, c.Module)
		case trust.Wrong:
			err = h.lied(ctx, v, *c.Own)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (h *honesty) earn(d wire.DeviceID, add func(*earned)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := h.earned[d]
	if e == nil {
		e = &earned{}
		h.earned[d] = e
	}
	add(e)
}

func (h *honesty) doubt(ctx context.Context, d wire.DeviceID, module string) error {
	h.log.Warn("a device's result differs from the coordinator's, and nobody can vouch for either; it gets no jobs of this module for two weeks", "device", d, "module", module)
	if err := h.jobs.noteReview(ctx, d, module); err != nil {
		return err
	}
	_, err := h.audits.scores.change(ctx, string(d), func(s *score, _ bool) error {
		s.Compute.Doubt(module, h.now())
		return nil
	})
	return err
}

// fail keeps that a module failed on a device alone.
func (h *honesty) fail(ctx context.Context, d wire.DeviceID, module string) error {
	h.log.Info("a module failed on a device and not on the coordinator; it gets no jobs of it for two weeks", "device", d, "module", module)
	_, err := h.audits.scores.change(ctx, string(d), func(s *score, _ bool) error {
		s.Compute.Fail(module, h.now())
		return nil
	})
	return err
}

// lied keeps that a result was proved wrong, and what proves it.
func (h *honesty) lied(ctx context.Context, v trust.Verdict, own trust.Own) error {
	a := h.audits
	rec := api.Audit{ID: v.Order, Kind: api.DisputeAudit, Device: v.Device, Order: v.Order, At: h.now().UTC(), Routine: true, CPUSeconds: own.CPUSeconds, Expected: own.Output}
	old, err := a.rows.find(ctx, auditKey(rec))
	if err == nil {
		_, err = a.finish(ctx, old)
		return err
	}
	if !errors.Is(err, errNotFound) {
		return err
	}
	o, err := a.outbox.get(ctx, v.Device, v.Order)
	if err != nil {
		return err
	}
	asked, err := wire.DecodeBody[wire.JobRun](o.Order)
	if err != nil {
		return err
	}
	_, err = a.judged(ctx, rec, o, a.sizesOf(rec), func(ans response) verdict { return judgeCompute(asked, own.Output, ans, false) })
	return err
}

// inputAway is an input that cannot be read now.
type inputAway struct{ error }

func (e *inputAway) Unwrap() error { return e.error }

// run has the coordinator itself do a customer's job. The error says why it cannot.
func (h *honesty) run(ctx context.Context, asked wire.JobRun) (trust.Own, error) {
	known, _, err := h.audits.known(ctx, asked, func(ctx context.Context) (reading, error) { return h.readAll(ctx, asked) })
	if err != nil {
		return trust.Own{}, err
	}
	return ownOf(known, asked.Outputs), nil
}

// readAll gets all that a job reads, from other devices than some.
func (h *honesty) readAll(ctx context.Context, j wire.JobRun, not ...wire.DeviceID) (data reading, err error) {
	data.inputs = make(map[string][]byte)
	if j.Input != "" {
		if data.input, err = h.audits.storage.read(ctx, j.Input, not...); err != nil {
			return data, &inputAway{err}
		}
	}
	for _, in := range j.Inputs {
		data.inputs[in.Name] = nil // an empty file is one, too
		for _, p := range in.Parts {
			part, err := h.audits.storage.read(ctx, p.Chunk, not...)
			if err != nil {
				return data, &inputAway{err}
			}
			data.inputs[in.Name] = append(data.inputs[in.Name], part...)
		}
	}
	return data, nil
}

// ownOf is the coordinator's result as the rules see it.
func ownOf(r ComputeResult, outputs []string) trust.Own {
	res := r.result(outputs)
	return trust.Own{Digest: resultDigest(res), Output: expectedOf(outputs, res), Engine: r.Engine, CPUSeconds: r.CPUSeconds, Looks: r.Looks}
}

// resultDigest is the same of the same outputs, whoever made them. Their chunks are in it: who
// reads a stored file reads those, and what a device says of them beside the right SHA-256 is
// compared, too.
func resultDigest(r wire.JobResult) string {
	h := sha256.New()
	fmt.Fprintln(h, r.Output, r.OutputBytes)
	for _, f := range r.Outputs {
		fmt.Fprintln(h, f.Name, f.SHA256, f.Size)
		for _, p := range f.Parts {
			fmt.Fprintln(h, p.Chunk, p.Size)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// expectedOf is what a challenge commits to: the digest of standard output, or where a job
// has outputs with names, that of all.
func expectedOf(outputs []string, r wire.JobResult) string {
	if len(outputs) == 0 {
		return r.Output
	}
	return resultDigest(r)
}

// What a job may take that the coordinator runs itself, in bytes. What it reads and writes
// is in the coordinator's own memory, linear memory beside it.
const (
	maxOwnInput  = 128 << 20
	maxOwnMemory = 512 << 20
	maxOwnOutput = 16 << 20
)

// answerable tells why the coordinator cannot run a job itself.
func answerable(j wire.JobRun) error {
	size := int64(0)
	for _, in := range j.Inputs {
		if in.Dataset != "" || in.Sensors != nil {
			return fmt.Errorf("its input %s is on the device alone", in.Name)
		}
		if in.List != nil {
			return fmt.Errorf("its input %s has more parts than fit an order", in.Name)
		}
		for _, p := range in.Parts {
			size += p.Size
		}
	}
	switch {
	case j.Live:
		return errors.New("it depends on time and chance")
	case size > maxOwnInput:
		return fmt.Errorf("it reads %d MiB, and the coordinator runs jobs over up to %d MiB itself", size>>20, maxOwnInput>>20)
	case j.Limits.MemoryBytes > maxOwnMemory:
		return fmt.Errorf("it may take %d MiB of memory, and the coordinator runs jobs with up to %d MiB itself", j.Limits.MemoryBytes>>20, maxOwnMemory>>20)
	case j.Limits.OutputBytes > maxOwnOutput:
		return fmt.Errorf("it may write %d MiB, and the coordinator runs jobs that write up to %d MiB itself", j.Limits.OutputBytes>>20, maxOwnOutput>>20)
	}
	return nil
}

// known is the result of a job, worked out here, and how long that took; one at a time, from
// reading on.
func (a *audits) known(ctx context.Context, job wire.JobRun, read func(context.Context) (reading, error)) (ComputeResult, time.Duration, error) {
	if a.answer == nil {
		return ComputeResult{}, 0, errors.New("this coordinator has no engine")
	}
	if err := answerable(job); err != nil {
		return ComputeResult{}, 0, err
	}
	module, err := a.compute.module(ctx, job.Module.SHA256)
	if err != nil {
		return ComputeResult{}, 0, err
	}
	select {
	case a.answering <- struct{}{}:
	case <-ctx.Done():
		return ComputeResult{}, 0, ctx.Err()
	}
	defer func() { <-a.answering }()
	reads, done := context.WithTimeout(ctx, answerLimit)
	data, err := read(reads)
	done()
	if err != nil {
		return ComputeResult{}, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	began := time.Now()
	r, err := a.answer(ctx, ComputeJob{Module: module, Args: job.Args, Env: job.Env, Input: data.input, Inputs: data.inputs, Outputs: job.Outputs, Limits: job.Limits})
	return r, time.Since(began), err
}

func decodeResult(r wire.Report) (res wire.JobResult, err error) {
	if err = json.Unmarshal(r.Body, &res); err != nil {
		err = fmt.Errorf("the result of order %s cannot be read: %w", r.Order, err)
	}
	return res, err
}

// ended is told of the first final report on each job order.
func (h *honesty) ended(r wire.Report) {
	res, err := decodeResult(r)
	if r.State != wire.Succeeded || err != nil {
		return
	}
	run := trust.Runtime{Engine: label(res.Engine)}
	if rec, ok := h.audits.storage.reg.rows.get(string(r.Device)); ok {
		run.Agent = rec.Agent
	}
	h.mu.Lock()
	_, ours := h.ours[r.Order]
	h.mu.Unlock()
	h.earn(r.Device, func(e *earned) {
		e.runtime = run
		if !ours {
			e.jobs++
		}
	})
	if ours || !h.active || h.audits.answer == nil || !h.standing(r.Device).Challenge(h.even()) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	of := 0
	for _, o := range h.draws {
		if o.Device == r.Device {
			of++
		}
	}
	if of < maxOwedOf {
		h.draws = append(h.draws, owed{Device: r.Device, Order: r.Order, At: h.now().UTC()})
	}
}

// keep writes what was earned and what is owed, every second until ctx ends.
func (h *honesty) keep(ctx context.Context) {
	t := time.NewTicker(flushEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if err := h.flush(ctx); err != nil && ctx.Err() == nil {
				h.log.Warn("what devices have earned by their jobs is not on record yet; it will be tried again", "error", err)
			}
		case <-ctx.Done():
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushEvery)
			defer cancel()
			_ = h.flush(ctx) // what is lost is a second's credit
			return
		}
	}
}

func (h *honesty) flush(ctx context.Context) error {
	h.flushing.Lock()
	defer h.flushing.Unlock()
	h.mu.Lock()
	all, draws := h.earned, h.draws
	h.earned, h.writing, h.draws = make(map[wire.DeviceID]*earned), all, nil
	maps.DeleteFunc(h.ours, func(_ string, until time.Time) bool { return !until.IsZero() && h.now().After(until) })
	maps.DeleteFunc(h.had, func(d wire.DeviceID, _ *hadJobs) bool { return !h.audits.storage.reg.member(d) })
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		h.writing = nil
		h.mu.Unlock()
	}()
	var failed error
	for d, e := range all {
		_, err := h.audits.scores.change(ctx, string(d), func(s *score, _ bool) error {
			e.into(&s.Compute, h.now())
			return nil
		})
		if err != nil {
			failed = err
			h.earn(d, func(now *earned) {
				now.jobs, now.confirmed = now.jobs+e.jobs, append(now.confirmed, e.confirmed...)
				if now.runtime == (trust.Runtime{}) {
					now.runtime = e.runtime
				}
			})
		}
	}
	have := make(map[wire.DeviceID]int)
	n := 0
	h.rows.each(func(_ string, o owed) bool { have[o.Device]++; n++; return true })
	for _, o := range draws {
		if have[o.Device] >= maxOwedOf || n >= maxOwed {
			continue // the coordinator is behind; "deimos device honesty" shows how many were given
		}
		if err := h.rows.create(ctx, ulid.Make().String(), o); err != nil {
			return err
		}
		have[o.Device]++
		n++
	}
	if n > 0 {
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
	return failed
}

// disturbed tells whether a device says that a job was stopped and went on. Agents that are too
// old for that say how often and for how long.
func disturbed(r wire.JobResult) bool {
	return r.Disturbed || r.Resumed > 0 || r.SuspendedSeconds > 0
}

// vouched is what a wrong result of a challenge is, if the device has another engine than the
// coordinator: a lie only if others with that engine say what the coordinator says.
func (h *honesty) vouched(ctx context.Context, asked asked, own trust.Own, res wire.JobResult, d wire.DeviceID) (lie bool, why string) {
	if own.Looks && disturbed(res) {
		if err := h.doubt(ctx, d, asked.run.Module.SHA256); err != nil {
			h.log.Warn("a doubt about a device's results is not on record", "device", d, "error", err)
		}
		return false, "the result is not the coordinator's, but the job was stopped on the device, and its module can see that (restore, should_checkpoint)"
	}
	if own.Engine == "" || res.Engine == own.Engine {
		return true, ""
	}
	me := h.copyOf(d)
	me.Engine = h.engineAs(d, res.Engine)
	c := trust.Case{Module: asked.run.Module.SHA256, Own: &own, Sent: []trust.Copy{me}}
	c.Answered(trust.Answer{Copy: me, Digest: resultDigest(res)})
	for _, v := range h.conclude(ctx, &c, asked) {
		if v.Device != d {
			continue
		}
		if v.Finding == trust.Wrong {
			return true, ""
		}
		if err := h.doubt(ctx, d, c.Module); err != nil {
			h.log.Warn("a doubt about a device's results is not on record", "device", d, "error", err)
		}
		return false, fmt.Sprintf("the result is not the coordinator's, but the device has the engine %s, and no other device with that could be asked", res.Engine)
	}
	return false, fmt.Sprintf("the module has another result on the engine %s, as several devices say: nobody has lied", res.Engine)
}

// conclude has a case that customers wait for no more come to its end: the coordinator runs
// the job where answers differ, and asks witnesses.
func (h *honesty) conclude(ctx context.Context, c *trust.Case, asked asked) []trust.Verdict {
	for ctx.Err() == nil {
		s := h.next(*c)
		if s.Done {
			return s.Verdicts
		}
		if s.Run {
			own, err := h.run(ctx, asked.run)
			if err != nil {
				c.Unable = err.Error()
			} else {
				c.Own = &own
			}
			continue
		}
		more := h.pick(*c, h.able(asked), s.Like, 1)
		switch {
		case len(more) == 0 && s.Like == "":
			c.NoMore = true
			continue
		case len(more) == 0:
			c.NoMoreLike = append(c.NoMoreLike, s.Like)
			continue
		}
		c.Sent = append(c.Sent, more...)
		c.Answered(h.ask(ctx, more[0], asked))
	}
	return nil
}

// able are the devices that could do a job as witnesses: all that its customer wants holds for
// them, and they should hold all that it reads. An agent that does not say how it stands with jobs
// may do another than it is asked to.
func (h *honesty) able(a asked) (out []wire.DeviceID) {
	h.jobs.plan.mu.Lock()
	there := h.jobs.devices()
	h.jobs.plan.mu.Unlock()
	for _, d := range there {
		if why, _ := h.jobs.misfit(&d, a); why == nil && d.jobs != nil && !d.paused && h.holdsAll(d.id, a.run) {
			out = append(out, d.id)
		}
	}
	return out
}

// ask has a device run a job, as a witness.
func (h *honesty) ask(ctx context.Context, to trust.Copy, q asked) trust.Answer {
	a, deadline := trust.Answer{Copy: to}, q.run.Deadline
	if q.run.Deadline = (time.Time{}); !deadline.After(h.now()) {
		deadline = h.now().Add(api.JobLife)
	}
	d, there := h.jobs.deviceNow(to.Device)
	if !there {
		return a
	}
	order, err := h.send(ctx, ulid.Make().String(), q, d, deadline)
	if err != nil {
		return a
	}
	defer h.forget(order.ID, order.Expires.Add(silence))
	v, err := h.audits.outbox.await(ctx, order, nil)
	if err != nil || v.State != wire.Succeeded {
		return a
	}
	if res, err := decodeResult(v.Result); err == nil && res.Module == q.run.Module.SHA256 && res.Input == q.run.Input {
		a.Digest, a.Engine, a.Order, a.CPUSeconds, a.Disturbed = resultDigest(res), h.engineAs(to.Device, label(res.Engine)), order.ID, res.CPUSeconds, disturbed(res)
	}
	return a
}

// holdsAll tells whether a device should hold all that a job reads.
func (h *honesty) holdsAll(d wire.DeviceID, j wire.JobRun) bool {
	s := h.audits.storage
	s.mu.Lock()
	defer s.mu.Unlock()
	holds := func(id string) bool { _, ok := s.holds[d][id]; return ok }
	for _, in := range j.Inputs {
		if in.List != nil || slices.ContainsFunc(in.Parts, func(p wire.JobPart) bool { return !holds(p.Chunk) }) {
			return false
		}
	}
	return j.Input == "" || holds(j.Input)
}

// view is how far a device's results are believed, and why.
func (h *honesty) view(d wire.DeviceID) (api.Honesty, error) {
	if _, err := h.audits.storage.reg.device(d); err != nil {
		return api.Honesty{}, err
	}
	s := h.standing(d)
	v := api.Honesty{Device: d, Compute: s.Figure(), Distrusted: s.Distrusted(), Aside: s.Aside(), Trusted: s.Trusted(), Share: s.Share(),
		Jobs: two(s.Jobs), Challenges: two(s.Challenges), Confirmed: two(s.Right), Needed: trust.Needed, Wrong: two(s.Wrong), Doubts: []api.Doubt{},
		Engine: s.Runtime.Engine, Agent: s.Runtime.Agent, Since: s.Since, Reset: s.ResetBy, Why: s.Explain(), Penalties: []api.Penalty{}}
	for _, x := range s.Doubts {
		v.Doubts = append(v.Doubts, api.Doubt{At: x.At, Module: x.Module})
	}
	for _, p := range slices.Backward(h.audits.scoreOf(d).Penalties) {
		if p.Figure == api.Compute {
			v.Penalties = append(v.Penalties, p)
		}
	}
	return v, nil
}

func (c *Coordinator) honestyRoutes() []route {
	return []route{{method: "GET", path: v1 + "/devices/{id}/honesty", needs: toRead, summary: "How far the results of a device's jobs are believed, and why", out: api.Honesty{},
		handle: func(w http.ResponseWriter, r *http.Request) error {
			v, err := c.audits.honesty.view(wire.DeviceID(r.PathValue("id")))
			if err == nil {
				writeJSON(w, http.StatusOK, v)
			}
			return err
		}}}
}
