package jobs

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

const (
	lookEvery = time.Second
	// graceToPause is how long a job that is about to stand still may take for a
	// checkpoint; graceAtEnd, when the agent ends.
	graceToPause = 2 * time.Second
	graceAtEnd   = 4 * time.Second
)

// job is an order that was accepted and is not done.
type job struct {
	wire.JobRun
	order string
	work  *work
	since time.Time
	tell  func(wire.Progress)
	began atomic.Pointer[time.Time] // the last attempt with all inputs; nil: not yet
	saved chan struct{}             // capacity 1: a checkpoint was kept

	control *sandbox.Control // nil: it does not run; guarded by Service.mu
	held    time.Time        // since when it is to stand still; zero: it is not; of Watch alone

	mu       sync.Mutex
	running  bool
	progress float64
	why      *wire.Problem // why it waits or stands still
}

// take notes a job.
func (s *Service) take(order string, body wire.JobRun, w *work, tell func(wire.Progress)) *job {
	j := &job{JobRun: body, order: order, work: w, since: time.Now(), tell: tell, saved: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jobs[order] = j
	return j
}

func (s *Service) done(j *job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.jobs, j.order)
}

// waits notes why the job waits or stands still.
func (j *job) waits(why *wire.Problem) {
	j.mu.Lock()
	j.why = why
	p := wire.Progress{Done: j.progress, Waits: why}
	j.mu.Unlock()
	j.tell(p)
}

// runs notes that it does not.
func (j *job) runs() {
	j.mu.Lock()
	j.running, j.why = true, nil
	p := wire.Progress{Done: j.progress}
	j.mu.Unlock()
	j.tell(p)
}

// stalls notes that it waits after all.
func (j *job) stalls(why *wire.Problem) {
	j.mu.Lock()
	j.running = false
	j.mu.Unlock()
	j.waits(why)
}

func (j *job) progressed(share float64) {
	j.mu.Lock()
	j.progress = share
	p := wire.Progress{Done: share, Waits: j.why}
	j.mu.Unlock()
	j.tell(p)
}

func (j *job) checkpoint(size int64, r io.Reader) error {
	if err := j.work.keep(size, r); err != nil {
		return err
	}
	select {
	case j.saved <- struct{}{}:
	default:
	}
	return nil
}

// awaitCheckpoint waits for one that is made from now on.
func (j *job) awaitCheckpoint(ctx context.Context, d time.Duration) {
	select {
	case <-j.saved:
	default:
	}
	select {
	case <-j.saved:
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// Watch keeps jobs to the owner's word and policy until ctx ends: it lets them stand
// still and go on, and divides the share of CPU. It calls beat every second.
func (s *Service) Watch(ctx context.Context, beat func()) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		s.apply(s.weigh())
		beat()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-s.nudge:
		}
	}
}

// weigh decides whether jobs run. It is of New, and then of Watch alone.
func (s *Service) weigh() policy.Decision {
	r := policy.Readings{Now: s.o.Now(), Sure: true}
	if s.o.Readings != nil {
		r = s.o.Readings()
	}
	if s.o.Word != nil {
		switch said, err := s.o.Word(); {
		case err == nil:
			s.word, s.heard, s.deaf = said, true, false
		case !s.deaf: // what the owner has said before stands; before anything, caution
			s.deaf = true
			s.word.Paused = s.word.Paused || !s.heard
			s.o.Log.Error("what the owner says of jobs cannot be read; what was said before stands", "paused", s.word.Paused, "error", err)
		}
	}
	var d policy.Decision
	d, s.before = s.policy.Load().Decide(r, s.word, s.before)
	s.decide(d)
	return d
}

// look makes Watch decide at once.
func (s *Service) look() {
	select {
	case s.nudge <- struct{}{}:
	default:
	}
}

func (s *Service) decide(d policy.Decision) {
	s.mu.Lock()
	old := s.decision
	s.decision = d
	if old.Run != d.Run {
		close(s.turned)
		s.turned = make(chan struct{})
	}
	s.mu.Unlock()
	if old.Code != d.Code {
		s.o.Log.Info("whether jobs run has changed", "run", d.Run, "begin", d.Begin, "code", d.Code, "reason", d.Reason)
	}
	s.queue.decide(d)
}

// apply lets every job that runs stand still or go on.
func (s *Service) apply(d policy.Decision) {
	s.mu.Lock()
	running := make(map[*job]*sandbox.Control, len(s.jobs))
	for _, j := range s.jobs {
		if j.control != nil {
			running[j] = j.control
		}
	}
	s.mu.Unlock()
	share := s.policy.Load().Share(len(running))
	for j, control := range running {
		control.SetShare(share)
		switch {
		case d.Run && !j.held.IsZero():
			j.held = time.Time{}
			control.Continue()
			j.runs()
		case !d.Run:
			j.hold(control, d, s.toPause)
		}
	}
}

// pass is for work that the agent does itself for a job, between two pieces of it: it waits
// while jobs are to stand still, and keeps what took so long to the job's share of CPU.
func (s *Service) pass(ctx context.Context, j *job, took time.Duration) error {
	s.mu.Lock()
	share := s.policy.Load().Share(len(s.jobs))
	s.mu.Unlock()
	if share > 0 && share < 1 {
		pause := time.NewTimer(min(time.Duration(float64(took)*(1-share)/share), lookEvery))
		defer pause.Stop()
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
	}
	for stood := false; ; stood = true {
		s.mu.Lock()
		d, turned := s.decision, s.turned
		s.mu.Unlock()
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("the job was stopped while its inputs were prepared: %w", context.Cause(ctx))
		case d.Run && stood:
			j.runs()
			return nil
		case d.Run:
			return nil
		}
		j.waits(waits(d))
		select {
		case <-turned:
		case <-ctx.Done():
		}
	}
}

// hold lets a job stand still, after a checkpoint if it can make one within grace.
func (j *job) hold(control *sandbox.Control, d policy.Decision, grace time.Duration) {
	fresh := j.held.IsZero()
	if fresh {
		j.held = time.Now()
		select {
		case <-j.saved: // of before it was asked
		default:
		}
		control.AskCheckpoint()
	}
	if j.whyNot() == nil || j.whyNot().Reason != d.Reason {
		j.waits(waits(d))
	}
	if control.Saves() && time.Since(j.held) < grace && len(j.saved) == 0 {
		return // Watch comes back
	}
	control.Suspend()
}

func (j *job) whyNot() *wire.Problem {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.why
}

// CPU is what all jobs together have taken since the service was made.
func (s *Service) CPU() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.spent
	for _, j := range s.jobs {
		if j.control != nil {
			all += j.control.CPU()
		}
	}
	return all
}

// State is how this device stands with jobs, as a heartbeat says it; nil if it
// runs none.
func (s *Service) State() *wire.JobsState {
	p := s.policy.Load()
	if !p.Enabled {
		return nil
	}
	running, waiting := s.queue.counts()
	st := &wire.JobsState{
		Host: sandbox.HostVersion, Orders: wire.JobOrders, Engine: sandbox.Engine(), Walls: s.Walls(), Slots: p.Slots, Running: running, Waiting: waiting,
		MemoryBytes: min(p.MaxMemory, wire.MostLimits.MemoryBytes), WallSeconds: p.MaxWall,
		InputBytes: p.MaxInput, OutputBytes: min(p.MaxOutput, wire.MostLimits.OutputBytes), DiskBytes: s.disk.room(s.o.Dir, p.MaxDisk),
		Live: p.Live, Sensors: p.Sensors && s.o.Sensors != nil, Datasets: slices.Sorted(maps.Keys(p.Datasets)),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.decision; !d.Run || !d.Begin {
		st.Pause = &wire.Pause{Code: d.Code, Seconds: waits(d).Seconds()}
	}
	return st
}

// Listed is a job as its device's owner sees it.
type Listed struct {
	Order    string    `json:"order"`
	Module   string    `json:"module"` // SHA-256
	Since    time.Time `json:"since"`  // when this life of the agent got the order
	State    string    `json:"state"`  // waiting, running or suspended
	Progress float64   `json:"progress,omitempty"`
	CPU      float64   `json:"cpu_seconds,omitempty"`
	Code     string    `json:"code,omitempty"` // why it waits or is suspended
	Reason   string    `json:"reason,omitempty"`
}

// List is all jobs, the oldest order first.
func (s *Service) List() []Listed {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := []Listed{}
	for _, j := range s.jobs {
		l := Listed{Order: j.order, Module: j.Module.SHA256, Since: j.since, State: "waiting"}
		j.mu.Lock()
		l.Progress = j.progress
		if j.running {
			l.State = "running"
		}
		if j.why != nil {
			l.Code, l.Reason = j.why.Code, j.why.Reason
			if j.running {
				l.State = "suspended"
			}
		}
		j.mu.Unlock()
		if j.control != nil {
			l.CPU = j.control.CPU().Seconds()
		}
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b Listed) int { return cmp.Compare(a.Order, b.Order) })
	return all
}

// Room is what jobs take of this device's disk, and may.
type Room struct {
	Held     int64 `json:"held_bytes"`                // inputs, outputs and checkpoints of all jobs, written or still to be
	MaxDisk  int64 `json:"max_disk_bytes,omitempty"`  // 0: no bound of the owner's
	MaxInput int64 `json:"max_input_bytes,omitempty"` // of one job; 0: no bound
}

// Room tells how jobs stand with the disk.
func (s *Service) Room() Room {
	p := s.policy.Load()
	return Room{Held: s.disk.holds(), MaxDisk: p.MaxDisk, MaxInput: p.MaxInput}
}

// Walls are those that stand around each job of this device beside its sandbox.
func (s *Service) Walls() []string { return s.o.Runner.Walls() }

// Close takes the place away that workers had among the kernel's cgroups. No job may run
// any more.
func (s *Service) Close() error {
	if s.o.Runner.Cgroups == nil {
		return nil
	}
	return s.o.Runner.Cgroups.Close()
}

// Decision is what was decided last.
func (s *Service) Decision() policy.Decision {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.decision
}
