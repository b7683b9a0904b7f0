// Package jobs carries out the order [wire.KindJobRun] on a device: it gets
// module and input, lets jobs/sandbox run the one over the other within what
// jobs/policy allows, and says what came out.
//
//	order → policy → slot → module (cache or fetch) → input → worker → result
//
// # Invariants
//
//   - What runs has the SHA-256 that the order names: checked while fetching,
//     and again by the worker over the very bytes that it runs.
//   - No more than the policy's number of slots are at work; other orders wait
//     until their context ends, holding no memory but their own.
//   - The owner's caps bound every job, whatever the order says.
//   - A job has no effect but its result: doing an order twice is harmless.
//   - Output that did not come from a module that ended well is never handed on.
//
// # On disk
//
//	<dir>/modules/<sha256>   modules, each complete or absent; the least recently used go first
//	<dir>/compiled/<sha256>  their machine code, see jobs/sandbox
//
// # How a job that fails is reported
//
//	REJECTED   bad_body, policy
//	TIMED_OUT  limit: wall time
//	FAILED     limit: memory, CPU, output; guest_failed: exit code or trap;
//	           bad_module; mismatch: the module fetched is not the one named;
//	           transfer, and whatever the chunk store says of the input
//
// Not here yet: a queue that survives restarts, checkpoints, many inputs,
// priorities. A job whose context ends returns an error that wraps the
// context's cause; if that cause is a [*wire.Problem], it is what is reported.
package jobs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
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

// Chunks reads chunks that this device holds. An error may be a
// [*wire.Problem], with the code lost or not_found.
type Chunks interface {
	// Read returns a chunk's bytes, verified against its id.
	Read(ctx context.Context, id string) ([]byte, error)
}

// Options are the parts of a [Service].
type Options struct {
	Dir     string        // of its own, for modules and their machine code
	Policy  policy.Policy // to begin with, see [Service.SetPolicy]
	Fetcher Fetcher
	Chunks  Chunks
	Runner  *sandbox.Runner // nil: this executable, which must call [sandbox.WorkerMain]

	ModuleBytes int64        // most bytes of modules kept in Dir; 0: 256 MiB
	Log         *slog.Logger // nil: none
}

// Service runs jobs, any number of them at a time as far as the policy lets it.
type Service struct {
	o       Options
	modules *moduleCache
	policy  atomic.Pointer[policy.Policy] // in force
	slots   gate
}

// fetchTime bounds the fetching of one module.
const fetchTime = 15 * time.Minute

// New makes a service that keeps its files in o.Dir.
func New(o Options) (*Service, error) {
	if o.Runner == nil {
		o.Runner = &sandbox.Runner{}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	modules, err := openModuleCache(filepath.Join(o.Dir, "modules"), o.ModuleBytes)
	if err != nil {
		return nil, fmt.Errorf("open the cache of job modules: %w", err)
	}
	s := &Service{o: o, modules: modules}
	s.SetPolicy(o.Policy)
	return s, nil
}

// SetPolicy changes what jobs may take. Those at work go on as they began;
// those that wait begin, or are rejected, by the new policy.
func (s *Service) SetPolicy(p policy.Policy) {
	p = p.Effective()
	s.policy.Store(&p)
	s.slots.resize(p.Slots)
}

// Run is the [wire.Handler] of [wire.KindJobRun]: the outcome has a
// [wire.JobResult] as its body and standard output as its attachment. It calls
// tell once, with no progress, when the job has its slot.
func (s *Service) Run(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
	job, err := wire.DecodeBody[wire.JobRun](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	if err := s.admit(job); err != nil {
		return wire.Outcome{}, err
	}
	if err := s.slots.enter(ctx); err != nil {
		return wire.Outcome{}, fmt.Errorf("the job was stopped while it waited for its turn: %w", err)
	}
	defer s.slots.leave()
	if err := s.admit(job); err != nil { // the policy may have changed meanwhile
		return wire.Outcome{}, err
	}
	tell(wire.Progress{})
	input, err := s.input(ctx, job.Input)
	if err != nil {
		return wire.Outcome{}, err
	}
	res, err := s.runModule(ctx, job, input)
	if err != nil {
		s.o.Log.Info("job ended without a result", "order", o.ID, "module", job.Module.SHA256,
			"cpu", res.CPU, "wall", res.Wall, "max_rss", res.MaxRSS, "stderr", res.Stderr)
		return wire.Outcome{}, err
	}
	return outcome(job, res), nil
}

// admit refuses what must not or cannot be tried.
func (s *Service) admit(job wire.JobRun) error {
	if !s.policy.Load().Enabled {
		return wire.RejectedBecause(wire.CodePolicy, "this device runs no jobs: its owner, or the fleet by its configuration, has switched them off; place it on another")
	}
	m := job.Module
	if b, err := hex.DecodeString(m.SHA256); err != nil || len(b) != sha256.Size || hex.EncodeToString(b) != m.SHA256 {
		return wire.RejectedBecause(wire.CodeBadBody, "the module's digest %.70q is no SHA-256 in lower-case hex", m.SHA256)
	}
	if m.Size <= 0 || m.Size > sandbox.MaxModule {
		return wire.RejectedBecause(wire.CodeBadBody, "the module's size of %d bytes is not between 1 and %d", m.Size, sandbox.MaxModule)
	}
	return nil
}

func (s *Service) input(ctx context.Context, id string) ([]byte, error) {
	if id == "" {
		return nil, nil
	}
	data, err := s.o.Chunks.Read(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("read the job's input: %w", err)
	}
	return data, nil
}

// runModule runs the job's module. A cached one that has gone bad on disk is
// fetched again, once.
func (s *Service) runModule(ctx context.Context, job wire.JobRun, input []byte) (sandbox.Result, error) {
	for retry := false; ; retry = true {
		path, release, err := s.modules.get(ctx, job.Module, s.fetch)
		if err != nil {
			return sandbox.Result{}, err
		}
		res, err := s.o.Runner.Run(ctx, sandbox.Spec{
			Module: path, Digest: job.Module.SHA256, Args: job.Args, Input: input,
			Limits: s.policy.Load().Clamp(job.Limits), CacheDir: filepath.Join(s.o.Dir, "compiled"),
		})
		release()
		var e *sandbox.Error
		if retry || !errors.As(err, &e) || e.Cause != sandbox.ModuleMismatch {
			return res, err
		}
		s.o.Log.Warn("a cached module has gone bad, fetching it again", "module", job.Module.SHA256, "reason", e.Reason)
		s.modules.forget(job.Module.SHA256)
	}
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

func outcome(job wire.JobRun, res sandbox.Result) wire.Outcome {
	sum := sha256.Sum256(res.Output)
	return wire.Outcome{
		Body: wire.JobResult{
			Module:      job.Module.SHA256,
			Input:       job.Input,
			Output:      hex.EncodeToString(sum[:]),
			OutputBytes: int64(len(res.Output)),
			CPUSeconds:  res.CPU.Seconds(),
			WallSeconds: res.Wall.Seconds(),
			MaxRSSBytes: res.MaxRSS,
			Engine:      res.Engine,
			Stderr:      res.Stderr,
		},
		Attachment: res.Output,
	}
}
