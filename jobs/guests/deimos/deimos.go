// Package deimos is what a guest in Go asks of the device it runs on, version 1
// of the host interface "deimos".
//
// A guest is a command for GOOS=wasip1. WASI gives it arguments, standard input
// and output, and the files of its order: [In] and [Out] open them. They are
// plain files, so a guest that calls nothing else runs in any WASI runtime.
//
// The rest are imports of the module "deimos_v1", which never changes; what is
// added later gets a module of its own. A module has the imports that it calls
// and no others, and with any of them it does not start where there is no such
// host. include/deimos.h is the same for C, docs/guests.md the whole story.
//
// On any other platform a guest is an ordinary program, for tests and
// debuggers, and [Local] stands for the device.
package deimos

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// Version is that of the host interface.
const Version = 1

// MaxCheckpoint is the most bytes that a checkpoint may have.
const MaxCheckpoint = 64 << 20

// Level says how much a line of the log matters.
type Level int32

// Levels of [Log].
const (
	Debug   Level = 0
	Info    Level = 1
	Warning Level = 2
	Error   Level = 3
)

// Progress says how much of the work is done, from 0 to 1. Calls that would not
// change the figure, in thousandths, cost next to nothing.
func Progress(done float64) {
	permille := int32(0)
	if done > 0 { // a NaN is no progress
		permille = int32(min(done, 1) * 1000)
	}
	if permille != said {
		said = permille
		hostProgress(permille)
	}
}

// said is the progress that the host knows of.
var said int32 = -1

// Checkpoint keeps state in place of the former checkpoint; it is durable on this
// device when the error is nil, and after an error the former one still stands.
//
// A job that was interrupted begins again from main, with the same arguments and
// inputs; what it finds by [Restore] is all that is left of its former life.
// What it has already written to its outputs is gone with it.
func Checkpoint(state []byte) error {
	if len(state) > MaxCheckpoint {
		return fmt.Errorf("a checkpoint has %d bytes, at most %d are allowed", len(state), MaxCheckpoint)
	}
	if err := hostCheckpoint(state); err != nil {
		return fmt.Errorf("the device has not kept the checkpoint: %w", err)
	}
	return nil
}

// Restore is the newest checkpoint of this job; ok is false if there is none.
func Restore() (state []byte, ok bool) {
	n := hostRestore(nil)
	if n < 0 {
		return nil, false
	}
	state = make([]byte, n)
	if m := hostRestore(state); m != n {
		return nil, false // cannot be: only this job replaces it
	}
	return state, true
}

// ShouldCheckpoint tells whether this job is about to be stopped, by the owner's
// policy or because the agent ends: what is not in a checkpoint within seconds is
// lost.
func ShouldCheckpoint() bool { return hostShouldCheckpoint() }

// SHA256 is the digest of data, computed by the host: some thirty times faster
// than crypto/sha256 inside WebAssembly.
func SHA256(data []byte) (digest [32]byte) {
	hostSHA256(data, &digest)
	return digest
}

// Log writes a line to the device's log. What is too long is cut, what is too much
// is left out.
func Log(l Level, text string) { hostLog(l, text) }

// Input is one input of the order, for reads at any place by any number of
// goroutines. [In] is for those from beginning to end.
type Input struct {
	name string
	size int64 // bytes
}

// OpenInput finds the input that the order names so. The error wraps
// [os.ErrNotExist] if it names none so.
func OpenInput(name string) (*Input, error) {
	size := hostInputSize(name)
	if size < 0 {
		return nil, fmt.Errorf("the order has no input %q: %w", name, os.ErrNotExist)
	}
	return &Input{name, size}, nil
}

// Size is its length in bytes.
func (in *Input) Size() int64 { return in.size }

// ReadAt is that of [io.ReaderAt].
func (in *Input) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("read of an input before its beginning")
	}
	for n < len(p) {
		m := hostInputRead(in.name, off+int64(n), p[n:])
		if m < 0 || m > len(p)-n {
			return n, fmt.Errorf("the device cannot read input %q at %d", in.name, off+int64(n))
		}
		if m == 0 {
			return n, io.EOF
		}
		n += m
	}
	return n, nil
}

// In opens the input that the order names so; the empty name is standard input.
func In(name string) (io.ReadCloser, error) {
	if name == "" {
		return io.NopCloser(os.Stdin), nil
	}
	f, err := hostOpen(name)
	if err != nil {
		return nil, fmt.Errorf("the order has no input %q: %w", name, err)
	}
	return f, nil
}

// Out opens the output that the order names so, which can only be written from its
// beginning to its end; the empty name is standard output. What is written counts
// once Close has returned nil.
func Out(name string) (io.WriteCloser, error) {
	if name == "" {
		return standardOutput{os.Stdout}, nil
	}
	f, err := hostCreate(name)
	if err != nil {
		return nil, fmt.Errorf("the order has no output %q: %w", name, err)
	}
	return f, nil
}

// standardOutput stays open: others may write there, too.
type standardOutput struct{ io.Writer }

func (standardOutput) Close() error { return nil }
