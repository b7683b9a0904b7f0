//go:build !wasip1

package deimos

import (
	"bytes"
	"crypto/sha256"
	"io"
	"os"
	"slices"
	"sync"
)

// Device is what stands for one where there is none. Fill it in before the guest
// runs, read it after.
type Device struct {
	mu       sync.Mutex // guards what guests change
	Inputs   map[string][]byte
	Outputs  map[string][]byte // those that the order names; others are refused
	Stopping bool              // what [ShouldCheckpoint] says
	State    []byte            // the checkpoint; nil if there is none
	Permille int32             // progress
	Lines    []string          // of the log
	Refuse   error             // what [Checkpoint] meets, if anything
}

// Local is the device that the functions of this package ask.
var Local = &Device{}

func hostProgress(permille int32) {
	Local.mu.Lock()
	defer Local.mu.Unlock()
	Local.Permille = permille
}

func hostCheckpoint(state []byte) error {
	Local.mu.Lock()
	defer Local.mu.Unlock()
	if Local.Refuse != nil {
		return Local.Refuse
	}
	Local.State = append([]byte{}, state...) // an empty one is one, too
	return nil
}

func hostRestore(state []byte) int {
	Local.mu.Lock()
	defer Local.mu.Unlock()
	if Local.State == nil {
		return -1
	}
	if len(state) >= len(Local.State) {
		copy(state, Local.State)
	}
	return len(Local.State)
}

func hostShouldCheckpoint() bool {
	Local.mu.Lock()
	defer Local.mu.Unlock()
	return Local.Stopping
}

func hostInputSize(name string) int64 {
	if in, ok := Local.Inputs[name]; ok {
		return int64(len(in))
	}
	return -1
}

func hostInputRead(name string, off int64, p []byte) int {
	in, ok := Local.Inputs[name]
	if !ok {
		return -1
	}
	return copy(p, in[min(off, int64(len(in))):])
}

func hostSHA256(data []byte, digest *[32]byte) { *digest = sha256.Sum256(data) }

func hostLog(_ Level, text string) {
	Local.mu.Lock()
	defer Local.mu.Unlock()
	Local.Lines = append(Local.Lines, text)
}

func hostOpen(name string) (io.ReadCloser, error) {
	in, ok := Local.Inputs[name]
	if !ok {
		return nil, os.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(in)), nil
}

func hostCreate(name string) (io.WriteCloser, error) {
	if _, ok := Local.Outputs[name]; !ok {
		return nil, os.ErrNotExist
	}
	return &localOutput{name: name}, nil
}

// localOutput gathers what is written until it is closed.
type localOutput struct {
	name string
	buf  bytes.Buffer
}

func (o *localOutput) Write(p []byte) (int, error) { return o.buf.Write(p) }

func (o *localOutput) Close() error {
	Local.mu.Lock()
	defer Local.mu.Unlock()
	Local.Outputs[o.name] = slices.Clone(o.buf.Bytes())
	return nil
}
