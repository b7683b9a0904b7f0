package jobs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// outputs are the files that a job's named outputs are collected in. Standard
// output is none of them: the sandbox keeps it.
type outputs map[string]*os.File

// openOutputs makes an empty file for each.
func (w *work) openOutputs(names []string) (_ outputs, err error) {
	all := outputs{}
	defer func() {
		if err != nil {
			all.close()
		}
	}()
	for _, name := range names {
		if name == wire.Stdout {
			continue
		}
		f, err := os.OpenFile(w.path("files", "out."+name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return nil, w.problem(err)
		}
		all[name] = f
	}
	return all, nil
}

func (o outputs) close() {
	for _, f := range o {
		f.Close()
	}
}

// files is where the sandbox writes.
func (o outputs) files() (all []sandbox.Output) {
	for name, f := range o {
		all = append(all, sandbox.Output{Name: name, To: outputFile{f}})
	}
	return all
}

// outputFile says of the disk's errors what they mean.
type outputFile struct{ f *os.File }

func (o outputFile) Write(p []byte) (int, error) {
	n, err := o.f.Write(p)
	if err != nil {
		err = diskProblem("the job's output", err)
	}
	return n, err
}

// store makes chunks of the outputs, in the order in which they were asked for.
func (s *Service) store(ctx context.Context, names []string, outs outputs, stdout []byte) ([]wire.JobOutput, error) {
	var all []wire.JobOutput
	for _, name := range names {
		from := io.Reader(bytes.NewReader(stdout))
		if name != wire.Stdout {
			f := outs[name]
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				return nil, diskProblem("the job's output", err)
			}
			from = f
		}
		out, err := s.storeOne(ctx, name, from)
		if err != nil {
			return nil, fmt.Errorf("the job's output %q cannot be kept: %w", name, err)
		}
		all = append(all, out)
	}
	return all, nil
}

func (s *Service) storeOne(ctx context.Context, name string, from io.Reader) (wire.JobOutput, error) {
	out := wire.JobOutput{Name: name}
	h := sha256.New()
	for {
		part := make([]byte, PartBytes) // the store may have it for longer than the call
		n, err := io.ReadFull(from, part)
		if n > 0 {
			h.Write(part[:n])
			id, err := s.o.Chunks.Keep(ctx, part[:n:n])
			if err != nil {
				return out, err
			}
			out.Parts = append(out.Parts, wire.JobPart{Chunk: id, Size: int64(n)})
			out.Size += int64(n)
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			out.SHA256 = hex.EncodeToString(h.Sum(nil))
			return out, nil
		case err != nil:
			return out, diskProblem("the job's output", err)
		}
	}
}
