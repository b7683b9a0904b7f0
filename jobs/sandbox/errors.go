package sandbox

import (
	"fmt"

	"github.com/deimos-edge/deimos/wire"
)

// Cause tells the ways apart in which a job does not succeed.
type Cause string

// The causes.
const (
	LimitMemory    Cause = "memory" // hit the memory limit, and failed of it
	LimitCPU       Cause = "cpu"
	LimitWall      Cause = "wall"
	LimitOutput    Cause = "output"
	BadSpec        Cause = "spec"     // the caller asks for what no worker could do
	BadModule      Cause = "module"   // malformed, or wants imports that do not exist
	ModuleMismatch Cause = "mismatch" // the file is not the module of Spec.Digest
	GuestFailed    Cause = "guest"    // exit code other than 0, or a trap
	Breakout       Cause = "sandbox"  // it made a system call that a wall denies
	WorkerFailed   Cause = "worker"   // the worker could not start, or crashed
)

// Codes of this room, beside those of package wire.
const (
	CodeBadModule   = "bad_module"
	CodeGuestFailed = "guest_failed"
	CodeSandbox     = "sandbox" // it tried to get out, and was killed
)

// Error says why a job did not succeed. errors.As also finds a [*wire.Problem]
// in it, so that it can be reported as it is.
type Error struct {
	Cause    Cause
	ExitCode int    // the module's, with GuestFailed; -1 for a trap
	Reason   string // a sentence for a person
}

func (e *Error) Error() string { return e.Reason }

// Unwrap gives the error as a problem of an order.
func (e *Error) Unwrap() error {
	switch e.Cause {
	case LimitWall:
		return &wire.Problem{State: wire.TimedOut, Code: wire.CodeLimit, Reason: e.Reason}
	case LimitMemory, LimitCPU, LimitOutput:
		return wire.FailedBecause(wire.CodeLimit, "%s", e.Reason)
	case BadSpec:
		return wire.RejectedBecause(wire.CodeBadBody, "%s", e.Reason)
	case BadModule:
		return wire.FailedBecause(CodeBadModule, "%s", e.Reason)
	case ModuleMismatch:
		return wire.FailedBecause(wire.CodeMismatch, "%s", e.Reason)
	case GuestFailed:
		return wire.FailedBecause(CodeGuestFailed, "%s", e.Reason)
	case Breakout:
		return wire.FailedBecause(CodeSandbox, "%s", e.Reason)
	default:
		return wire.FailedBecause(wire.CodeInternal, "%s", e.Reason)
	}
}

func failure(c Cause, format string, args ...any) *Error {
	return &Error{Cause: c, Reason: fmt.Sprintf(format, args...)}
}
