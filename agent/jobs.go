package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/jobs"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/orders"
	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// Jobs are how the jobs of a device are, as its agent last noted.
type Jobs struct {
	At     time.Time     `json:"at"`
	Word   policy.Word   `json:"word"`             // what the owner says now, which the agent may not have heard yet
	Code   string        `json:"code,omitempty"`   // why they stand still, or none begins
	Reason string        `json:"reason,omitempty"` //
	Until  *time.Time    `json:"until,omitempty"`  // absent: nobody knows
	Run    bool          `json:"run"`
	Begin  bool          `json:"begin"`
	Walls  []string      `json:"walls,omitempty"` // that stand around each job beside its sandbox
	Room   jobs.Room     `json:"room"`
	Jobs   []jobs.Listed `json:"jobs"`
}

const (
	jobsDir   = "jobs"
	wordFile  = "owner.json"
	jobsFile  = "now.json"
	maxOwners = 1 << 20 // bytes of such a file
	// noteJobs is how often it is noted how far jobs are: flash does not live for ever.
	noteJobs = 30 * time.Second
	jobsLate = 2 * time.Minute // the loop that watches over them hangs
)

// A part of an output is a chunk.
const _ = uint(chunk.MaxSize - jobs.PartBytes)

// newJobs makes the room that runs jobs.
func (a *Agent) newJobs(bulk *transfer.Client, data *orders.Service) (*jobs.Service, error) {
	load, said := &jobsLoad{}, newSayings(a.cfg.path(jobsDir), a.hw.boot, a.clock, a.log)
	runner := &sandbox.Runner{}
	var err error
	if runner.Cgroups, err = sandbox.OpenCgroups(); err != nil {
		a.log.Info("jobs have no cgroup here", "why", err)
	}
	work, err := jobs.New(jobs.Options{
		Dir: a.cfg.path(jobsDir), Policy: a.cfg.Jobs, Fetcher: bulk, Chunks: data,
		Device: a.id.ID, Sign: func(t wire.PayloadType, v any) ([]byte, error) { return wire.Seal(a.id.key, t, v) },
		Sensors: a.measured, Now: a.clock.Now,
		Readings: func() policy.Readings { return a.readings(load) },
		Word:     func() (policy.Word, error) { return said.paused(a.cfg.StateDir) },
		Runner:   runner, Log: a.log,
	})
	if err == nil {
		a.hw.check(func() { load.sample(a.hw.last.Load(), work.CPU()) })
	}
	return work, err
}

// measured is what jobs may read of the device's curves.
func (a *Agent) measured(q wire.HistoryRequest) ([]byte, error) {
	if a.hw.history == nil {
		return nil, wire.FailedBecause(wire.CodeNotFound, "this device keeps no history; its log says why")
	}
	h, err := a.hw.history.Read(q, time.Now())
	if err != nil {
		return nil, err
	}
	// What is misspelt would be an empty input else, and a result of nothing.
	if len(q.Series) > 0 && len(h.Series) == 0 && len(h.LeftOut) == 0 {
		return nil, wire.FailedBecause(wire.CodeNotFound, "this device has measured no %s in that time; \"deimos device history\" shows what it measures", strings.Join(q.Series, ", "))
	}
	return json.Marshal(h)
}

// readings are how the machine is, for the owner's policy.
func (a *Agent) readings(load *jobsLoad) policy.Readings {
	now, sure := a.clock.Read()
	r := policy.Readings{Now: now.In(a.traffic.zone), Sure: sure == wire.ClockTrusted, Others: load.others(), Metered: a.traffic.usedUp()}
	if t := a.hw.last.Load(); t != nil {
		for _, c := range t.Temperatures {
			if r.Celsius == nil || c > *r.Celsius {
				r.Celsius = &c
			}
		}
	}
	return r
}

// jobsLoad tells what jobs take of the processors from what others do.
type jobsLoad struct {
	mu   sync.Mutex
	jobs time.Duration
	at   time.Time
	rest *float64 // percent of all processors; nil: not known
}

// sample takes a sample of the machine, and the CPU that jobs have taken so far.
func (l *jobsLoad) sample(t *hw.Telemetry, jobs time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t == nil || t.CPUPercent == nil {
		l.rest = nil
		return
	}
	cpus := float64(runtime.NumCPU())
	others := *t.CPUPercent
	if p := t.Agent.CPUPercent; p != nil {
		others -= *p / cpus
	}
	if passed := t.At.Sub(l.at); !l.at.IsZero() && passed > 0 {
		others -= 100 * (jobs - l.jobs).Seconds() / passed.Seconds() / cpus
	}
	l.jobs, l.at, l.rest = jobs, t.At, new(max(others, 0))
}

func (l *jobsLoad) others() *float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rest
}

// watchJobs keeps jobs to the owner's policy until ctx ends, and notes how they are.
func (a *Agent) watchJobs(ctx context.Context) {
	pulse := a.hw.dog.Pulse("jobs", jobsLate)
	defer pulse.End()
	var noted Jobs
	failing := false
	a.jobs.Watch(ctx, func() {
		pulse.Beat()
		now := a.jobsNow()
		if alike(noted, now) && (len(now.Jobs) == 0 || now.At.Sub(noted.At) < noteJobs) {
			return
		}
		raw, err := json.MarshalIndent(now, "", "  ")
		if err == nil {
			err = durable.WriteFile(a.cfg.path(jobsDir, jobsFile), raw, 0o600)
		}
		if err != nil && !failing {
			a.log.Warn("how jobs are cannot be noted for deimos-agent jobs", "error", err)
		}
		failing, noted = err != nil, now
	})
}

func (a *Agent) jobsNow() Jobs {
	d := a.jobs.Decision()
	j := Jobs{At: time.Now().UTC().Truncate(time.Second), Code: d.Code, Reason: d.Reason, Run: d.Run, Begin: d.Begin, Walls: a.jobs.Walls(), Room: a.jobs.Room(), Jobs: a.jobs.List()}
	if !d.Until.IsZero() {
		until := d.Until.UTC().Truncate(time.Second)
		j.Until = &until
	}
	return j
}

// alike tells whether a person would see no news.
func alike(a, b Jobs) bool {
	plain := func(j Jobs) Jobs {
		j.At, j.Until, j.Room.Held = time.Time{}, nil, 0
		all := make([]jobs.Listed, len(j.Jobs))
		for i, l := range j.Jobs {
			l.CPU, l.Progress = 0, 0
			all[i] = l
		}
		j.Jobs = all
		return j
	}
	return reflect.DeepEqual(plain(a), plain(b))
}

// OwnersWord is what the owner of this device has said of jobs; nothing, if that
// is all.
func OwnersWord(stateDir string) (w policy.Word, err error) {
	err = readOwn(filepath.Join(stateDir, jobsDir, wordFile), &w)
	return w, err
}

// SayOfJobs is the owner's word from now on. The agent hears it within a second or
// two, or when it starts.
func SayOfJobs(stateDir string, w policy.Word) error { return sayAsOwner(stateDir, jobsDir, w) }

// ReadJobs is how jobs are on this device; nil if nothing was noted yet and the owner
// has said nothing.
func ReadJobs(stateDir string) (*Jobs, error) {
	var j Jobs
	if err := readOwn(filepath.Join(stateDir, jobsDir, jobsFile), &j); err != nil {
		return nil, err
	}
	var err error
	if j.Word, err = OwnersWord(stateDir); err != nil {
		return nil, err
	}
	if j.At.IsZero() && j.Word == (policy.Word{}) {
		return nil, nil
	}
	return &j, nil
}

// readOwn reads a small file of JSON; there may be none.
func readOwn(path string, v any) error {
	raw, err := durable.ReadFile(path, maxOwners)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = json.Unmarshal(raw, v)
	}
	if err != nil {
		return fmt.Errorf("%s cannot be read: %w", path, err)
	}
	return nil
}
