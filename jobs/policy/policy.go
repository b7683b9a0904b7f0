// Package policy is the owner's word on what other people's jobs may take of
// this device. It stands in the agent's configuration file, and no order can
// go beyond it:
//
//	[jobs]
//	enabled = true
//	slots = 1                # jobs at the same time
//	max_memory_bytes = 268435456
//	max_output_bytes = 4194304
//	max_cpu_seconds = 600
//	max_wall_seconds = 900
//
// What is missing has the value of [Default]; zero and negative values mean
// that too, never "without limit".
//
// Not here yet: hours, idleness, temperature, metered networks, pausing.
package policy

import (
	"runtime"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Policy is what the owner allows.
type Policy struct {
	Enabled   bool    `toml:"enabled" json:"enabled"`                   // any jobs at all
	Slots     int     `toml:"slots" json:"slots"`                       // jobs at the same time
	MaxMemory int64   `toml:"max_memory_bytes" json:"max_memory_bytes"` // bytes of linear memory a job
	MaxOutput int64   `toml:"max_output_bytes" json:"max_output_bytes"` // bytes of standard output a job
	MaxCPU    float64 `toml:"max_cpu_seconds" json:"max_cpu_seconds"`   // CPU time a job
	MaxWall   float64 `toml:"max_wall_seconds" json:"max_wall_seconds"` // seconds from start to end a job
}

// What an order gets that does not say what it needs.
var ordinary = wire.JobLimits{MemoryBytes: 64 << 20, CPUSeconds: 60, WallSeconds: 120, OutputBytes: 4 << 20}

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
	}
}

// Effective is p with [Default] for what is not set to a sensible value.
// Enabled stays as it is.
func (p Policy) Effective() Policy {
	d := Default()
	return Policy{
		Enabled:   p.Enabled,
		Slots:     min(given(p.Slots, d.Slots), maxSlots),
		MaxMemory: given(p.MaxMemory, d.MaxMemory),
		MaxOutput: given(p.MaxOutput, d.MaxOutput),
		MaxCPU:    min(given(p.MaxCPU, d.MaxCPU), longest.Seconds()),
		MaxWall:   min(given(p.MaxWall, d.MaxWall), longest.Seconds()),
	}
}

// Clamp gives a job the limits it asks for, an ordinary job's where it asks
// for none, and never more than the owner's caps. Every limit it returns is
// above zero.
func (p Policy) Clamp(want wire.JobLimits) wire.JobLimits {
	p = p.Effective()
	return wire.JobLimits{
		MemoryBytes: min(given(want.MemoryBytes, ordinary.MemoryBytes), p.MaxMemory),
		CPUSeconds:  min(given(want.CPUSeconds, ordinary.CPUSeconds), p.MaxCPU),
		WallSeconds: min(given(want.WallSeconds, ordinary.WallSeconds), p.MaxWall),
		OutputBytes: min(given(want.OutputBytes, ordinary.OutputBytes), p.MaxOutput),
	}
}

// given is v, or d where v is zero, negative or not a number.
func given[T int | int64 | float64](v, d T) T {
	if v > 0 {
		return v
	}
	return d
}
