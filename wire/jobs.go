package wire

import (
	"encoding/json"
	"fmt"
	"time"
)

// JobRun asks a device to run a WebAssembly module. A device whose heartbeat has no
// [JobsState] knows of Module, Args, Input and Limits only, and must not be sent more:
// it would ignore the rest and sign a result without it.
type JobRun struct {
	Module  Blob              `json:"module"`
	Args    []string          `json:"args,omitempty"`
	Env     map[string]string `json:"env,omitempty"`
	Input   string            `json:"input,omitempty"`   // id of a chunk that this device holds; becomes standard input
	Inputs  []JobInput        `json:"inputs,omitempty"`  // read as files, /in/NAME
	Outputs []string          `json:"outputs,omitempty"` // names of what may be written, /out/NAME; [Stdout] keeps that as a chunk, too
	Limits  JobLimits         `json:"limits"`
	// Rank is among the jobs that wait on a device: the higher goes first, then the older.
	Rank int `json:"rank,omitempty"`
	// Deadline is when the result is of no use any more; TIMED_OUT then. Zero: none
	// but the order's own.
	Deadline time.Time `json:"deadline,omitzero"`
	// Live gives the module the real time and real random numbers. Without it the same
	// module, arguments, environment and inputs give the same output everywhere.
	Live bool `json:"live,omitempty"`
}

// The names of standard input and output among a job's inputs and outputs. What is
// named Stdin is standard input, and no file.
const (
	Stdin  = "stdin"
	Stdout = "stdout"
)

// JobInput is one named input of a job; exactly one of its sources is given.
type JobInput struct {
	Name  string    `json:"name"`            // letters, digits, dot, dash, underscore; 64 at most
	Parts []JobPart `json:"parts,omitempty"` // of a file, one after the other
	// List is the same of a file that has more parts than fit an order: JSON of
	// []JobPart, [MaxJobList] bytes at most.
	List *Blob `json:"list,omitempty"`
	// Dataset is what the owner has opened by this name, and a path below it:
	// "photos/2024". A folder is a folder for the job, too.
	Dataset string          `json:"dataset,omitempty"`
	Sensors *HistoryRequest `json:"sensors,omitempty"` // a window of measured curves, as the JSON of [History]
}

// MaxJobList bounds the list of an input's parts, in bytes.
const MaxJobList = 16 << 20

// JobPart is a chunk of an input or an output.
type JobPart struct {
	Chunk string `json:"chunk"` // id
	Size  int64  `json:"size"`  // bytes
	// URL is where a device gets it that does not hold it. Empty: it should.
	URL string `json:"url,omitempty"`
}

// JobLimits bounds a job. Zero means that of [OrdinaryLimits]; the owner's policy caps every
// value but the memory: a module can see how much there is, so a device that does not give
// as much has REJECTED the job, `policy`.
type JobLimits struct {
	MemoryBytes int64   `json:"memory_bytes,omitempty"`
	CPUSeconds  float64 `json:"cpu_seconds,omitempty"`
	WallSeconds float64 `json:"wall_seconds,omitempty"` // without the time for which it was suspended
	OutputBytes int64   `json:"output_bytes,omitempty"` // of all outputs together
}

// MostLimits are the highest that can be asked for. Time is that of one processor, as a module
// has one thread; the parts of so much output, each with its id, fit a report.
var MostLimits = JobLimits{MemoryBytes: 1 << 30, CPUSeconds: 24 * 3600, WallSeconds: 24 * 3600, OutputBytes: 2 << 30}

// Check is an error if a limit is none: negative, not a number, or above [MostLimits].
func (l JobLimits) Check() error {
	for _, x := range []struct {
		name, unit   string
		wanted, most float64
	}{
		{"memory_bytes", " bytes", float64(l.MemoryBytes), float64(MostLimits.MemoryBytes)},
		{"cpu_seconds", " s", l.CPUSeconds, MostLimits.CPUSeconds},
		{"wall_seconds", " s", l.WallSeconds, MostLimits.WallSeconds},
		{"output_bytes", " bytes", float64(l.OutputBytes), float64(MostLimits.OutputBytes)},
	} {
		if !(x.wanted >= 0 && x.wanted <= x.most) {
			return fmt.Errorf("the limit %s cannot be %.0f%s: it is 0, for what is usual, to %.0f%s", x.name, x.wanted, x.unit, x.most, x.unit)
		}
	}
	return nil
}

// OrdinaryLimits are those of a job that does not say what it needs.
var OrdinaryLimits = JobLimits{MemoryBytes: 64 << 20, CPUSeconds: 60, WallSeconds: 120, OutputBytes: 4 << 20}

// JobResult is the body of a report on a job that ran; standard output is the
// report's attachment.
type JobResult struct {
	Module      string  `json:"module"`          // SHA-256 of the module, hex
	Input       string  `json:"input,omitempty"` // chunk id
	Output      string  `json:"output"`          // SHA-256 of standard output, hex
	OutputBytes int64   `json:"output_bytes"`
	CPUSeconds  float64 `json:"cpu_seconds"`
	WallSeconds float64 `json:"wall_seconds"`
	MaxRSSBytes int64   `json:"max_rss_bytes"`
	Engine      string  `json:"engine"`           // e.g. "wazero/1.12.0 compiler amd64"
	Stderr      string  `json:"stderr,omitempty"` // the last 4 KiB of standard error
	// Outputs are what [JobRun.Outputs] names, in that order. Each chunk is durable on
	// this device, as after a [Receipt].
	Outputs []JobOutput `json:"outputs,omitempty"`
	// Statement is an envelope of [TypeStatement] with a [Statement], signed by the
	// device's key, that can be handed on by itself.
	Statement json.RawMessage `json:"statement,omitempty"`
	// Resumed is how often the job went on from a checkpoint or began again, because
	// the agent ended in the middle.
	Resumed int `json:"resumed,omitempty"`
	// Disturbed says that the module went on from a checkpoint or was asked for one. One that
	// looks (restore, should_checkpoint) can give another result then: that is no lie.
	Disturbed bool `json:"disturbed,omitempty"`
	// SuspendedSeconds is for how long it stood still by the owner's policy.
	SuspendedSeconds float64 `json:"suspended_seconds,omitempty"`
}

// JobOutput is one output of a job.
type JobOutput struct {
	Name   string    `json:"name"`
	SHA256 string    `json:"sha256"` // of the whole, hex
	Size   int64     `json:"size"`
	Parts  []JobPart `json:"parts,omitempty"` // in order; none of an empty output
}

// JobsState is how a device stands with jobs; it travels in its heartbeat.
type JobsState struct {
	Host        int      `json:"host"`              // version of the host interface "deimos" that modules may import
	Orders      int      `json:"orders,omitempty"`  // version of [JobRun] that it knows, up to [JobOrders]
	Engine      string   `json:"engine"`            // as in [JobResult]; an interpreter is some 60 times slower
	Walls       []string `json:"walls,omitempty"`   // that stand around a job beside the sandbox: seccomp, landlock, cgroup
	Slots       int      `json:"slots"`             // jobs that may run at the same time
	Running     int      `json:"running,omitempty"` // suspended ones too
	Waiting     int      `json:"waiting,omitempty"`
	MemoryBytes int64    `json:"memory_bytes"`           // most that one job may have
	WallSeconds float64  `json:"wall_seconds"`           // longest that one may take
	InputBytes  int64    `json:"input_bytes,omitempty"`  // most that one may read; 0: no bound
	OutputBytes int64    `json:"output_bytes,omitempty"` // most that one may write, more is cut to it; 0: it does not say
	DiskBytes   *int64   `json:"disk_bytes,omitempty"`   // room for the files of one more: its inputs, and its outputs if it has named ones; nil: it does not say
	Live        bool     `json:"live,omitempty"`
	Sensors     bool     `json:"sensors,omitempty"`  // windows of its curves may be inputs
	Datasets    []string `json:"datasets,omitempty"` // names that the owner has opened
	// Pause says that jobs stand still now, and why; without one they do not.
	Pause *Pause `json:"pause,omitempty"`
}

// JobOrders is the newest version of [JobRun]. An agent would ignore what is newer than
// it, and sign a result without it.
//
//	1: an input named Stdin is standard input; List
const JobOrders = 1

// TypeStatement is the payload type of in-toto statements
// (github.com/in-toto/attestation, spec/v1/envelope.md).
const TypeStatement PayloadType = "application/vnd.in-toto+json"

// The fixed strings of a [Statement].
const (
	StatementType    = "https://in-toto.io/Statement/v1"
	JobPredicateType = "https://github.com/deimos-edge/deimos/job/v1"
)

// DirHash is the digest of a folder: SHA-256 over a line for each file, in the order of
// their paths, with the SHA-256 of its bytes in hex, two spaces, and the path.
const DirHash = "dirHash"

// Statement says what a job has made of what. Its subjects are the outputs; [Stdout] is
// always one of them.
type Statement = StatementOf[JobPredicate]

// StatementOf is an in-toto statement, version 1
// (github.com/in-toto/attestation, spec/v1/statement.md). The library for it
// is generated protobuf, too heavy for a device; the tests measure by it.
type StatementOf[P any] struct {
	Type          string     `json:"_type"`
	Subject       []Resource `json:"subject"`
	PredicateType string     `json:"predicateType"`
	Predicate     P          `json:"predicate"`
}

// Resource is an in-toto resource descriptor (spec/v1/resource_descriptor.md). Its
// digests are "sha256" of the bytes, and "deimosChunk", the id, of what is one chunk; of
// a folder [DirHash] alone.
type Resource struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// JobPredicate is how the subjects of a [Statement] were made.
type JobPredicate struct {
	Order       string            `json:"order"`
	Device      DeviceID          `json:"device"`
	Module      Resource          `json:"module"`
	Args        []string          `json:"args,omitempty"`
	Env         map[string]string `json:"env,omitempty"`
	Inputs      []Resource        `json:"inputs,omitempty"` // "stdin" for standard input
	Limits      JobLimits         `json:"limits"`           // as they were in force
	Live        bool              `json:"live,omitempty"`
	Engine      string            `json:"engine"`
	ExitCode    int               `json:"exit_code"`
	Began       time.Time         `json:"began"`
	Ended       time.Time         `json:"ended"`
	CPUSeconds  float64           `json:"cpu_seconds"`
	WallSeconds float64           `json:"wall_seconds"`
}
