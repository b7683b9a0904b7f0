// Package jobs carries out the order [wire.KindJobRun] on a device: it gets
// module and inputs, lets jobs/sandbox run the one over the others within what
// jobs/policy allows, and says what came out.
//
//	order → policy → queue → module (cache or fetch) → inputs → worker → outputs as chunks → signed result
//
// # Invariants
//
//   - What runs has the SHA-256 that the order names: checked while fetching,
//     and again by the worker over the very bytes that it runs.
//   - No more than the policy's number of slots are at work; other orders wait
//     until their context ends, holding no memory but their own.
//   - The owner's word bounds every job, whatever the order says, and at once: see
//     [Service.Watch].
//   - Inputs, outputs and checkpoints of all jobs together leave [spareBytes] of the disk free,
//     and take no more of it than the owner gives: see [disk].
//   - A job has no effect but its result: doing an order twice is harmless. Its outputs
//     are durable chunks before the result names them.
//   - Output that did not come from a module that ended well is never handed on.
//   - A checkpoint is durable when the module hears so. A job that was cut off by the
//     end of the agent goes on from there when its order arrives again.
//
// # On disk
//
//	<dir>/modules/<sha256>   modules, each complete or absent; the least recently used go first
//	<dir>/compiled/<sha256>  their machine code, see jobs/sandbox
//	<dir>/work               a folder for each job, named by its order, until its report: see work
//
// # How a job that fails is reported
//
//	REJECTED   bad_body, policy
//	TIMED_OUT  limit: wall time, deadline
//	FAILED     limit: memory, CPU, output; guest_failed: exit code or trap;
//	           bad_module; mismatch: the module or input fetched is not the one named,
//	           or a dataset changed meanwhile; no_space; interrupted: the agent ended
//	           again and again; transfer, and whatever the chunk store says of an input
//
// While it waits or stands still, its order says why, by a code of jobs/policy. A job
// whose context ends returns an error that wraps the
// context's cause; if that cause is a [*wire.Problem], it is what is reported.
package jobs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// Fetcher gets a file over HTTPS. An error may be a [*wire.Problem].
type Fetcher interface {
	// Fetch writes the file at url to w, and fails if it has more than maxSize bytes.
	Fetch(ctx context.Context, url string, maxSize int64, w io.Writer) error
}

// Chunks are what this device holds. An error may be a [*wire.Problem], with the
// code lost or not_found; one with After ends by itself.
type Chunks interface {
	// Read returns a chunk's bytes, verified against its id.
	Read(ctx context.Context, id string) ([]byte, error)
	// Get is Read, also of a chunk of that size that is not held, but at url; asked:
	// the owner's limits of the line are asked first.
	Get(ctx context.Context, id string, size int64, url string, asked bool) ([]byte, error)
	// Keep makes up to [PartBytes] bytes a chunk, durable when it returns its id.
	Keep(ctx context.Context, data []byte) (id string, err error)
}

// PartBytes is the size of all parts of an output but its last.
const PartBytes = 4 << 20

// Options are the parts of a [Service].
type Options struct {
	Dir     string        // of its own, see the package's comment
	Policy  policy.Policy // to begin with, see [Service.SetPolicy]
	Fetcher Fetcher
	Chunks  Chunks
	Runner  *sandbox.Runner // nil: this executable, which must call [sandbox.WorkerMain]

	Device wire.DeviceID
	// Sign makes the envelope of a statement; nil: results have none.
	Sign func(t wire.PayloadType, v any) ([]byte, error)
	// Sensors is what this device has measured, as JSON of [wire.History]; nil: nothing.
	Sensors func(wire.HistoryRequest) ([]byte, error)
	Now     func() time.Time // the time that the coordinator goes by; nil: the machine's

	// What [Service.Watch] goes by. Each may be nil.
	Readings func() policy.Readings
	Word     func() (policy.Word, error) // of the owner

	ModuleBytes int64        // most bytes of modules kept in Dir; 0: 256 MiB
	Log         *slog.Logger // nil: none
}

// Service runs jobs, any number of them at a time as far as the policy lets it.
type Service struct {
	o       Options
	modules *moduleCache
	policy  atomic.Pointer[policy.Policy] // in force
	queue   queue
	disk    disk
	nudge   chan struct{} // capacity 1: Watch looks at once

	toPause, atEnd time.Duration // graceToPause and graceAtEnd

	// Of weigh.
	before policy.Before
	word   policy.Word
	heard  bool // at least once
	deaf   bool // the owner's word cannot be read, and the log says so

	mu       sync.Mutex
	jobs     map[string]*job // accepted and not done, by order
	decision policy.Decision
	turned   chan struct{} // closed when jobs are to stand still, or to go on
	spent    time.Duration // CPU of jobs that have ended
}

const (
	fetchTime = 15 * time.Minute // bounds the fetching of one module
	maxWords  = 32 << 10         // bytes of arguments and environment: a result repeats them twice
)

// New makes a service that keeps its files in o.Dir.
func New(o Options) (*Service, error) {
	if o.Runner == nil {
		o.Runner = &sandbox.Runner{}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	modules, err := openModuleCache(filepath.Join(o.Dir, "modules"), o.ModuleBytes)
	if err != nil {
		return nil, fmt.Errorf("open the cache of job modules: %w", err)
	}
	s := &Service{o: o, modules: modules, nudge: make(chan struct{}, 1), jobs: make(map[string]*job), turned: make(chan struct{}), disk: disk{free: freeOn}, toPause: graceToPause, atEnd: graceAtEnd}
	if err := sweep(s.workDir(), o.Now()); err != nil {
		o.Log.Warn("what jobs have left cannot be removed", "error", err)
	}
	s.SetPolicy(o.Policy)
	s.weigh()
	return s, nil
}

func (s *Service) workDir() string { return filepath.Join(s.o.Dir, "work") }

// SetPolicy changes what jobs may take. Those at work go on with the limits that they
// have; those that wait begin, or are rejected, by the new policy.
func (s *Service) SetPolicy(p policy.Policy) {
	p = p.Effective()
	s.policy.Store(&p)
	s.queue.allow(p)
	s.look()
}

// Run is the [wire.Handler] of [wire.KindJobRun]: the outcome has a
// [wire.JobResult] as its body and standard output as its attachment. It calls
// tell when the job has its slot, with its progress, and with why it waits.
func (s *Service) Run(ctx context.Context, o wire.Order, tell func(wire.Progress)) (out wire.Outcome, err error) {
	body, err := wire.DecodeBody[wire.JobRun](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	if err := s.admit(body); err != nil {
		return wire.Outcome{}, err
	}
	if !body.Deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, body.Deadline.Sub(s.o.Now()), &wire.Problem{State: wire.TimedOut, Code: wire.CodeLimit,
			Reason: fmt.Sprintf("the job was not done by its deadline, %s", body.Deadline.UTC().Format(time.RFC3339))})
		defer cancel()
	}
	w, err := openWork(s.workDir(), o)
	if w != nil {
		defer func() {
			if ctx.Err() != nil && err != nil && !final(context.Cause(ctx)) {
				return // the next life goes on with it
			}
			if err := w.remove(); err != nil {
				s.o.Log.Warn("what a job has left cannot be removed", "folder", w.dir, "error", err)
			}
			s.disk.drop(w)
		}()
	}
	if err != nil {
		return wire.Outcome{}, err
	}
	j := s.take(o.ID, body, w, tell)
	defer s.done(j)
	return s.carryOut(ctx, j)
}

// final tells whether a context has ended for good, not only with the agent.
func final(cause error) bool {
	var p *wire.Problem
	return errors.As(cause, &p)
}

// carryOut brings a job through the queue to its result.
func (s *Service) carryOut(ctx context.Context, j *job) (wire.Outcome, error) {
	for {
		p := s.policy.Load()
		limits, err := p.Allow(j.Limits)
		if err != nil {
			return wire.Outcome{}, err
		}
		t := &ticket{rank: j.Rank, order: j.order, memory: max(limits.MemoryBytes, sandbox.CompileBytes(p.MaxMemory))}
		if err := s.queue.enter(ctx, t, j.waits); err != nil {
			return wire.Outcome{}, fmt.Errorf("the job was stopped while it waited for its turn: %w", err)
		}
		room := s.disk.more()
		out, err := s.attempt(ctx, j, t)
		s.queue.leave(t)
		after := time.Duration(0)
		var why *wire.Problem
		if errors.As(err, &why) && j.began.Load() == nil {
			after = why.After
		}
		if after <= 0 {
			return out, err
		}
		// What it has to fetch may not be fetched now, or others have the disk; what it has
		// so far is not in their way.
		if err := j.work.empty(); err != nil {
			return wire.Outcome{}, err
		}
		if room = s.disk.await(j.work, room); why.Code != policy.CodeDisk {
			room = nil
		}
		j.stalls(why)
		select {
		case <-room:
		case <-time.After(min(after, time.Minute)):
		case <-ctx.Done():
			return wire.Outcome{}, fmt.Errorf("the job was stopped while it waited for its inputs: %w", context.Cause(ctx))
		}
	}
}

// attempt runs a job that has its slot.
func (s *Service) attempt(ctx context.Context, j *job, t *ticket) (wire.Outcome, error) {
	if err := s.admit(j.JobRun); err != nil { // the policy may have changed meanwhile
		return wire.Outcome{}, err
	}
	limits, err := s.policy.Load().Allow(j.Limits)
	if err != nil {
		return wire.Outcome{}, err
	}
	j.runs()
	if err := s.holdAll(j, limits); err != nil {
		return wire.Outcome{}, err
	}
	if len(j.Outputs) > 0 {
		ended, err := s.disk.reserve(j.work, limits.OutputBytes)
		if err != nil {
			return wire.Outcome{}, err
		}
		defer ended()
	}
	in, err := s.gather(ctx, j)
	if err != nil {
		return wire.Outcome{}, err
	}
	defer in.close()
	now := time.Now()
	j.began.Store(&now)
	outs, err := j.work.openOutputs(j.Outputs)
	if err != nil {
		return wire.Outcome{}, err
	}
	defer outs.close()
	res, err := s.runModule(ctx, j, t, limits, in, outs)
	s.mu.Lock()
	s.spent += res.CPU
	j.control = nil
	s.mu.Unlock()
	if err == nil {
		err = in.unchanged()
	}
	if err != nil {
		s.o.Log.Info("job ended without a result", "order", j.order, "module", j.Module.SHA256,
			"cpu", res.CPU, "wall", res.Wall, "max_rss", res.MaxRSS, "stderr", res.Stderr, "error", err)
		return wire.Outcome{}, err
	}
	return s.result(ctx, j, limits, in, outs, res)
}

// admit refuses what must not or cannot be tried.
func (s *Service) admit(job wire.JobRun) error {
	p := s.policy.Load()
	if !p.Enabled {
		return wire.RejectedBecause(wire.CodePolicy, "this device runs no jobs: its owner, or the fleet by its configuration, has switched them off; place it on another")
	}
	m := job.Module
	if b, err := hex.DecodeString(m.SHA256); err != nil || len(b) != sha256.Size || hex.EncodeToString(b) != m.SHA256 {
		return wire.RejectedBecause(wire.CodeBadBody, "the module's digest %.70q is no SHA-256 in lower-case hex", m.SHA256)
	}
	if m.Size <= 0 || m.Size > sandbox.MaxModule {
		return wire.RejectedBecause(wire.CodeBadBody, "the module's size of %d bytes is not between 1 and %d", m.Size, sandbox.MaxModule)
	}
	if _, err := p.Allow(job.Limits); err != nil {
		return err
	}
	if len(p.Modules) > 0 && !slices.Contains(p.Modules, m.SHA256) {
		return wire.RejectedBecause(wire.CodePolicy, "the module %s is not among those that the owner of this device lets run; place it on another", m.SHA256)
	}
	words := 0
	for _, a := range job.Args {
		words += len(a)
	}
	for name, value := range job.Env {
		words += len(name) + len(value)
	}
	if words > maxWords {
		return wire.RejectedBecause(wire.CodeBadBody, "the job's arguments and environment have %d bytes, at most %d are possible; give it an input", words, maxWords)
	}
	return s.checkSources(job)
}

// runModule runs the job's module. A cached one that has gone bad on disk is
// fetched again, once.
func (s *Service) runModule(ctx context.Context, j *job, t *ticket, limits wire.JobLimits, in *inputs, outs outputs) (sandbox.Result, error) {
	for retry := false; ; retry = true {
		path, release, err := s.modules.get(ctx, j.Module, s.fetch)
		if err != nil {
			return sandbox.Result{}, err
		}
		res, err := s.runOnce(ctx, j, sandbox.Spec{
			Module: path, Digest: j.Module.SHA256, Args: j.Args, Env: j.Env, Live: j.Live,
			Input: in.stdin, Inputs: in.files, Outputs: outs.files(),
			Limits: limits, CacheDir: filepath.Join(s.o.Dir, "compiled"), CompileBytes: s.policy.Load().MaxMemory,
			OnCompiled: func() { s.queue.needs(t, limits.MemoryBytes) },
			OnProgress: j.progressed, OnCheckpoint: func(size int64, r io.Reader) error { return s.keepCheckpoint(j, size, r) },
			OnLog: func(level int, text string) {
				s.o.Log.Log(ctx, slog.Level(4*(level-1)), "a job says", "order", j.order, "text", text)
			},
		})
		release()
		var e *sandbox.Error
		if retry || !errors.As(err, &e) || e.Cause != sandbox.ModuleMismatch {
			return res, err
		}
		s.o.Log.Warn("a cached module has gone bad, fetching it again", "module", j.Module.SHA256, "reason", e.Reason)
		s.modules.forget(j.Module.SHA256)
	}
}

// runOnce runs the worker until it ends, or a little longer than ctx, so that a job
// that the end of the agent cuts off can save what it has.
func (s *Service) runOnce(ctx context.Context, j *job, spec sandbox.Spec) (sandbox.Result, error) {
	saved, size, err := j.work.checkpoint()
	if err != nil {
		return sandbox.Result{}, err
	}
	if saved != nil {
		defer saved.Close()
		spec.Checkpoint, spec.CheckpointBytes = saved, size
	}
	spec.Control = sandbox.NewControl()
	s.mu.Lock()
	j.control = spec.Control
	s.mu.Unlock()
	s.look()
	running, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	defer context.AfterFunc(ctx, func() {
		if cause := context.Cause(ctx); !final(cause) && spec.Control.Saves() {
			spec.Control.Continue()
			spec.Control.AskCheckpoint()
			j.awaitCheckpoint(running, s.atEnd)
		}
		stop(context.Cause(ctx))
	})()
	return s.o.Runner.Run(running, spec)
}

func (s *Service) fetch(ctx context.Context, b wire.Blob, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	err := s.o.Fetcher.Fetch(ctx, b.URL, b.Size, w)
	var p *wire.Problem
	if err == nil || errors.As(err, &p) {
		return err
	}
	return wire.FailedBecause(wire.CodeTransfer, "the job's module could not be fetched: %v", err)
}

// result makes chunks of the outputs and signs what was done.
func (s *Service) result(ctx context.Context, j *job, limits wire.JobLimits, in *inputs, outs outputs, res sandbox.Result) (wire.Outcome, error) {
	named, err := s.store(ctx, j.Outputs, outs, res.Output)
	if err != nil {
		return wire.Outcome{}, err
	}
	digest := sha256Of(res.Output)
	r := wire.JobResult{
		Module:      j.Module.SHA256,
		Input:       j.Input,
		Output:      digest,
		OutputBytes: int64(len(res.Output)),
		CPUSeconds:  res.CPU.Seconds(),
		WallSeconds: res.Wall.Seconds(),
		MaxRSSBytes: res.MaxRSS,
		Engine:      res.Engine,
		Stderr:      res.Stderr,
		Outputs:     named,
		Resumed:     j.work.meta.Begun - 1,

		Disturbed: res.Disturbed,

		SuspendedSeconds: res.Suspended.Seconds(),
	}
	if s.o.Sign != nil {
		began := s.o.Now().Add(-time.Since(*j.began.Load()))
		env, err := s.o.Sign(wire.TypeStatement, wire.Statement{
			Type: wire.StatementType, Subject: subjects(digest, named), PredicateType: wire.JobPredicateType,
			Predicate: wire.JobPredicate{
				Order: j.order, Device: s.o.Device, Module: resource("module", j.Module.SHA256, ""),
				Args: j.Args, Env: j.Env, Inputs: in.resources, Limits: limits, Live: j.Live,
				Engine: res.Engine, ExitCode: res.ExitCode, Began: began.UTC(), Ended: s.o.Now().UTC(),
				CPUSeconds: r.CPUSeconds, WallSeconds: r.WallSeconds,
			},
		})
		if err != nil {
			return wire.Outcome{}, fmt.Errorf("the job's result cannot be signed: %w", err)
		}
		r.Statement = json.RawMessage(env)
	}
	return wire.Outcome{Body: r, Attachment: res.Output}, nil
}

// subjects are standard output, whether or not it is kept, and the named outputs.
func subjects(stdout string, named []wire.JobOutput) []wire.Resource {
	all := []wire.Resource{resource(wire.Stdout, stdout, "")}
	for _, out := range named {
		chunk := ""
		if len(out.Parts) == 1 {
			chunk = out.Parts[0].Chunk
		}
		if r := resource(out.Name, out.SHA256, chunk); out.Name == wire.Stdout {
			all[0] = r
		} else {
			all = append(all, r)
		}
	}
	return all
}
