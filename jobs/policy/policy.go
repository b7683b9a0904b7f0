// Package policy is the owner's word on what other people's jobs may take of
// this device, and when. It stands in the agent's configuration file, and no order can
// go beyond it:
//
//	[jobs]
//	enabled = true
//	slots = 1                # jobs at the same time
//	memory_bytes = 0         # that all of them together may have; 0: what the slots can take
//	cpu_percent = 0          # of all processors, for all jobs together; 0: no bound
//	max_memory_bytes = 268435456
//	max_output_bytes = 4194304
//	max_input_bytes = 0      # that one job may read; 0: no bound
//	max_disk_bytes = 0       # for inputs, outputs and checkpoints of all jobs together; 0: as far as the disk goes
//	max_cpu_seconds = 600
//	max_wall_seconds = 900
//
//	hours = "22:00-06:00"    # local time; "": the whole day
//	only_idle = false        # only while others leave the processors alone:
//	idle_percent = 20        # begin when they have taken less for idle_minutes,
//	idle_minutes = 5
//	busy_percent = 50        # stop when they have taken more for half a minute
//	max_celsius = 0          # stop at this temperature of the hottest part, go on 5 below; 0: no bound
//	on_metered = "no_fetch"  # when the month's volume is used up: "run", "no_fetch" or "stop"
//
//	live = false             # jobs that see the real time and real random numbers
//	sensors = false          # jobs that read what this device has measured
//	modules = []             # SHA-256 of those that may run; empty: any
//	[jobs.datasets]          # folders and files that jobs may read
//	photos = "/srv/photos"
//
// What is missing has the value of [Default]; zero and negative numbers mean
// that too, never "without limit", unless it says so.
//
// Over it stands what the owner says meanwhile: see [Word]. Whether jobs run now is
// one function, [Policy.Decide], of policy, word and the readings of the machine.
package policy

import (
	"encoding/hex"
	"fmt"
	"math"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Policy is what the owner allows. The fleet's configuration can set the first six
// within it, the rest is the owner's alone.
type Policy struct {
	Enabled   bool    `toml:"enabled" json:"enabled"`                   // any jobs at all
	Slots     int     `toml:"slots" json:"slots"`                       // jobs at the same time
	MaxMemory int64   `toml:"max_memory_bytes" json:"max_memory_bytes"` // bytes of linear memory a job; of compiling its module alike
	MaxOutput int64   `toml:"max_output_bytes" json:"max_output_bytes"` // bytes of all outputs a job
	MaxCPU    float64 `toml:"max_cpu_seconds" json:"max_cpu_seconds"`   // CPU time a job
	MaxWall   float64 `toml:"max_wall_seconds" json:"max_wall_seconds"` // seconds from start to end a job, without those it stood still

	Memory     int64   `toml:"memory_bytes" json:"memory_bytes"`       // bytes of all jobs together; 0: no bound but the slots'
	MaxInput   int64   `toml:"max_input_bytes" json:"max_input_bytes"` // bytes of all inputs a job, datasets too; 0: no bound
	MaxDisk    int64   `toml:"max_disk_bytes" json:"max_disk_bytes"`   // bytes of what all jobs together keep on the disk; 0: no bound but what must stay free
	CPUPercent float64 `toml:"cpu_percent" json:"cpu_percent"`         // of all processors, of all jobs together; 0: no bound

	Hours       Hours   `toml:"hours" json:"hours"`
	OnlyIdle    bool    `toml:"only_idle" json:"only_idle"`
	IdlePercent float64 `toml:"idle_percent" json:"idle_percent"` // of all processors, taken by others
	IdleMinutes float64 `toml:"idle_minutes" json:"idle_minutes"`
	BusyPercent float64 `toml:"busy_percent" json:"busy_percent"`
	MaxCelsius  float64 `toml:"max_celsius" json:"max_celsius"` // 0: no bound
	OnMetered   Metered `toml:"on_metered" json:"on_metered"`

	Live     bool              `toml:"live" json:"live"`
	Sensors  bool              `toml:"sensors" json:"sensors"`
	Modules  []string          `toml:"modules" json:"modules,omitempty"`   // SHA-256, lower-case hex
	Datasets map[string]string `toml:"datasets" json:"datasets,omitempty"` // paths by name
}

// Metered is what jobs may do when the owner's volume of the month is used up.
type Metered string

// Fetching a job's module is neither: without it, nothing can be done.
const (
	MeteredRun     Metered = "run"      // fetch their inputs all the same
	MeteredNoFetch Metered = "no_fetch" // wait with what has to be fetched
	MeteredStop    Metered = "stop"     // stand still
)

const (
	longest  = 24 * time.Hour // no owner's cap goes beyond
	maxSlots = 64
)

// Default suits a small board with other things to do: jobs are welcome, up to
// half of the processors, one at least.
func Default() Policy {
	return Policy{
		Enabled:   true,
		Slots:     max(runtime.NumCPU()/2, 1),
		MaxMemory: 256 << 20,
		MaxOutput: 4 << 20,
		MaxCPU:    600,
		MaxWall:   900,

		IdlePercent: 20,
		IdleMinutes: 5,
		BusyPercent: 50,
		OnMetered:   MeteredNoFetch,
	}
}

// Check finds mistakes that an owner must hear of.
func (p Policy) Check() error {
	if !slices.Contains([]Metered{"", MeteredRun, MeteredNoFetch, MeteredStop}, p.OnMetered) {
		return fmt.Errorf("on_metered in [jobs] cannot be %q: it is %q, %q or %q", p.OnMetered, MeteredRun, MeteredNoFetch, MeteredStop)
	}
	if e := p.Effective(); e.OnlyIdle && e.BusyPercent < e.IdlePercent {
		return fmt.Errorf("busy_percent in [jobs] is %g, below idle_percent, which is %g: jobs would stop before they begin", e.BusyPercent, e.IdlePercent)
	}
	for _, m := range p.Modules {
		if b, err := hex.DecodeString(m); err != nil || len(b) != 32 || hex.EncodeToString(b) != m {
			return fmt.Errorf("modules in [jobs] has %.70q, which is no SHA-256 in lower-case hex", m)
		}
	}
	for name, path := range p.Datasets {
		if name == "" || strings.ContainsAny(name, "/\\ ") || !filepath.IsAbs(path) {
			return fmt.Errorf("[jobs.datasets] has %q = %q: the name is one word without slashes, the path begins with a slash", name, path)
		}
	}
	return nil
}

// Effective is p with [Default] for what is not set to a sensible value.
// Enabled stays as it is.
func (p Policy) Effective() Policy {
	d := Default()
	p.Slots = min(given(p.Slots, d.Slots), maxSlots)
	p.MaxMemory = given(p.MaxMemory, d.MaxMemory)
	p.MaxOutput = given(p.MaxOutput, d.MaxOutput)
	p.MaxCPU = min(given(p.MaxCPU, d.MaxCPU), longest.Seconds())
	p.MaxWall = min(given(p.MaxWall, d.MaxWall), longest.Seconds())
	if p.Memory = max(p.Memory, 0); p.Memory > 0 {
		p.MaxMemory = min(p.MaxMemory, p.Memory)
	}
	p.MaxInput, p.MaxDisk = max(p.MaxInput, 0), max(p.MaxDisk, 0)
	if !(p.CPUPercent > 0 && p.CPUPercent < 100) {
		p.CPUPercent = 0
	}
	p.IdlePercent = given(p.IdlePercent, d.IdlePercent)
	p.IdleMinutes = given(p.IdleMinutes, d.IdleMinutes)
	p.BusyPercent = given(p.BusyPercent, d.BusyPercent)
	if p.OnMetered == "" {
		p.OnMetered = d.OnMetered
	}
	return p
}

// Share is how many processors each of so many jobs may have; 0: no bound.
func (p Policy) Share(jobs int) float64 {
	return p.Effective().CPUPercent / 100 * float64(runtime.NumCPU()) / math.Max(float64(jobs), 1)
}

// Allow gives a job the limits it asks for, [wire.OrdinaryLimits] where it asks
// for none, and never more than the owner's caps. Every limit it returns is
// above zero. Memory it gives as asked or not at all: a module can see how much it
// has, and with less, the result would be another than elsewhere.
func (p Policy) Allow(want wire.JobLimits) (wire.JobLimits, error) {
	p = p.Effective()
	ordinary := wire.OrdinaryLimits
	memory := given(want.MemoryBytes, ordinary.MemoryBytes)
	if memory > p.MaxMemory {
		return wire.JobLimits{}, wire.RejectedBecause(wire.CodePolicy, "the job wants %d bytes of memory, and the owner of this device, or the fleet by its configuration, gives a job %d; place it on another, or ask for less", memory, p.MaxMemory)
	}
	return wire.JobLimits{
		MemoryBytes: memory,
		CPUSeconds:  min(given(want.CPUSeconds, ordinary.CPUSeconds), p.MaxCPU),
		WallSeconds: min(given(want.WallSeconds, ordinary.WallSeconds), p.MaxWall),
		OutputBytes: min(given(want.OutputBytes, ordinary.OutputBytes), p.MaxOutput),
	}, nil
}

// given is v, or d where v is zero, negative or not a number.
func given[T int | int64 | float64](v, d T) T {
	if v > 0 {
		return v
	}
	return d
}
