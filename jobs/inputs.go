package jobs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// spareBytes is what inputs and outputs of jobs leave free on the disk.
const spareBytes = 256 << 20

// inputs is what a job reads, gathered.
type inputs struct {
	stdin     []byte
	files     []sandbox.Input
	resources []wire.Resource // of the statement
	watched   []watched
}

func (in *inputs) close() {
	for _, f := range in.files {
		closeInput(f)
	}
}

func closeInput(in sandbox.Input) {
	if in.File != nil {
		in.File.Close()
	}
	for _, f := range in.Files {
		f.File.Close()
	}
}

// gather gets everything that a job reads. An error with [wire.Problem.After] is
// one that ends by itself.
func (s *Service) gather(ctx context.Context, j *job) (_ *inputs, err error) {
	in := &inputs{}
	defer func() {
		if err != nil {
			in.close()
		}
	}()
	if j.Input != "" {
		if in.stdin, err = s.o.Chunks.Read(ctx, j.Input); err != nil {
			return nil, fmt.Errorf("read the job's input: %w", err)
		}
		in.resources = append(in.resources, resource(wire.Stdin, sha256Of(in.stdin), j.Input))
	}
	for _, want := range j.Inputs {
		if err := s.gatherOne(ctx, want, j, in); err != nil {
			return nil, err
		}
	}
	return in, nil
}

func (s *Service) gatherOne(ctx context.Context, want wire.JobInput, j *job, in *inputs) error {
	w := j.work
	var f *os.File
	var digest, only string
	var err error
	switch {
	case want.Dataset != "":
		return s.gatherDataset(ctx, want, j, in)
	case want.Sensors != nil:
		data, err := s.o.Sensors(*want.Sensors)
		if err != nil {
			return err
		}
		f, digest, err = s.spool(w, want.Name, int64(len(data)), func(to io.Writer) error { _, err := to.Write(data); return err })
		if err != nil {
			return err
		}
	default:
		if want.List != nil {
			if want.Parts, err = s.partsOf(ctx, want); err != nil {
				return err
			}
		}
		if len(want.Parts) == 1 {
			only = want.Parts[0].Chunk
		}
		asked := s.policy.Load().OnMetered != policy.MeteredRun
		f, digest, err = s.spool(w, want.Name, sizeOf(want.Parts), func(to io.Writer) error {
			for _, p := range want.Parts {
				if err := s.pass(ctx, j, 0); err != nil {
					return err
				}
				data, err := s.o.Chunks.Get(ctx, p.Chunk, p.Size, p.URL, asked)
				if err != nil {
					return fmt.Errorf("get the job's input %q: %w", want.Name, err)
				}
				if _, err := to.Write(data); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return w.problem(err)
	}
	in.files = append(in.files, sandbox.Input{Name: want.Name, Size: info.Size(), File: f})
	in.resources = append(in.resources, resource(want.Name, digest, only))
	return nil
}

// partsOf gets the list of an input's parts.
func (s *Service) partsOf(ctx context.Context, want wire.JobInput) (parts []wire.JobPart, err error) {
	var raw bytes.Buffer
	if err := s.fetch(ctx, *want.List, &raw); err != nil {
		return nil, err
	}
	if sha256Of(raw.Bytes()) != want.List.SHA256 {
		return nil, wire.FailedBecause(wire.CodeMismatch, "what came is not the list of the parts of the job's input %q that was ordered", want.Name)
	}
	if err := json.Unmarshal(raw.Bytes(), &parts); err != nil {
		return nil, wire.RejectedBecause(wire.CodeBadBody, "the list of the parts of the job's input %q cannot be read: %v", want.Name, err)
	}
	return parts, checkParts(want.Name, parts)
}

func sizeOf(parts []wire.JobPart) (n int64) {
	for _, p := range parts {
		n += p.Size
	}
	return n
}

// spool fills a file of the job's folder, and opens it for reading.
func (s *Service) spool(w *work, name string, size int64, fill func(io.Writer) error) (_ *os.File, digest string, err error) {
	written, err := s.disk.reserve(w, size)
	if err != nil {
		return nil, "", err
	}
	defer written()
	path := w.path("files", "in."+name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, "", w.problem(err)
	}
	defer f.Close()
	h := sha256.New()
	disk := &diskWriter{w: f}
	if err := fill(io.MultiWriter(disk, h)); err != nil {
		if disk.err != nil {
			return nil, "", w.problem(disk.err)
		}
		return nil, "", err
	}
	r, err := os.Open(path)
	if err != nil {
		return nil, "", w.problem(err)
	}
	return r, hex.EncodeToString(h.Sum(nil)), nil
}

// disk is what jobs may still write where their folders are.
type disk struct {
	free func(dir string) (int64, error) // bytes; see freeOn

	mu     sync.Mutex
	coming int64 // bytes that jobs have room for and have not written
}

// reserve is an error if so many bytes do not fit beside those that are coming. When they
// are written, or come no more, they are given back.
func (d *disk) reserve(w *work, size int64) (giveBack func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	free, err := d.free(w.dir)
	if err != nil {
		return nil, w.problem(err)
	}
	if free -= d.coming; free-size < spareBytes {
		return nil, wire.FailedBecause(wire.CodeNoSpace, "the job needs %d MiB of the device's disk, of which %d are free, and %d stay free; place it on another", size>>20, free>>20, spareBytes>>20)
	}
	d.coming += size
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.coming -= size
	}), nil
}

func freeOn(dir string) (int64, error) {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	return int64(st.Bavail) * int64(st.Bsize), err
}

// diskWriter remembers that it was the disk that failed.
type diskWriter struct {
	w   io.Writer
	err error
}

func (d *diskWriter) Write(p []byte) (int, error) {
	n, err := d.w.Write(p)
	d.err = err
	return n, err
}

func sha256Of(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// resource names bytes in a statement; chunk is "" if they are not one chunk.
func resource(name, digest, chunk string) wire.Resource {
	r := wire.Resource{Name: name, Digest: map[string]string{"sha256": digest}}
	if chunk != "" {
		r.Digest["deimosChunk"] = chunk
	}
	return r
}

// checkSources refuses what a job cannot read or write here.
func (s *Service) checkSources(job wire.JobRun) error {
	p := s.policy.Load()
	if job.Live && !p.Live {
		return wire.RejectedBecause(wire.CodePolicy, "the owner of this device lets no job see the real time; place it on another")
	}
	ins := make([]string, len(job.Inputs))
	for i, in := range job.Inputs {
		ins[i] = in.Name
	}
	if err := errors.Join(checkNames("input", ins, sandbox.MaxInputs), checkNames("output", job.Outputs, sandbox.MaxOutputs)); err != nil {
		return err
	}
	if job.Input != "" && slices.Contains(ins, wire.Stdin) {
		return wire.RejectedBecause(wire.CodeBadBody, "the job has two inputs that are its standard input")
	}
	for _, in := range job.Inputs {
		if err := s.checkSource(p, in); err != nil {
			return err
		}
	}
	return nil
}

func checkNames(what string, names []string, most int) error {
	if len(names) > most {
		return wire.RejectedBecause(wire.CodeBadBody, "the job has %d %ss, at most %d are possible", len(names), what, most)
	}
	for i, name := range names {
		if !sandbox.ValidName(name) || slices.Contains(names[:i], name) {
			return wire.RejectedBecause(wire.CodeBadBody, "the job cannot have an %s of the name %.70q: it is 1 to 64 letters, digits, dots, dashes and underscores, not only dots, and given once", what, name)
		}
	}
	return nil
}

func (s *Service) checkSource(p *policy.Policy, in wire.JobInput) error {
	sources := 0
	for _, has := range []bool{len(in.Parts) > 0, in.List != nil, in.Dataset != "", in.Sensors != nil} {
		if has {
			sources++
		}
	}
	if sources > 1 {
		return wire.RejectedBecause(wire.CodeBadBody, "the job's input %q has %d sources; it is parts, a list of them, a dataset or sensors, or nothing and empty", in.Name, sources)
	}
	if in.Sensors != nil && (!p.Sensors || s.o.Sensors == nil) {
		return wire.RejectedBecause(wire.CodePolicy, "jobs may not read what this device has measured: its owner has not opened that; place it on another")
	}
	if name, below, nested := strings.Cut(in.Dataset, "/"); in.Dataset != "" {
		if _, ok := p.Datasets[name]; !ok {
			return wire.RejectedBecause(wire.CodePolicy, "the owner of this device has opened no dataset %.70q to jobs; place it on another", name)
		}
		if nested && !fs.ValidPath(below) {
			return wire.RejectedBecause(wire.CodeBadBody, "the job's input %q has %.200q for a path, which does not lead below a dataset", in.Name, below)
		}
	}
	if l := in.List; l != nil && (l.Size <= 0 || l.Size > wire.MaxJobList) {
		return wire.RejectedBecause(wire.CodeBadBody, "the list of the parts of the job's input %q has %d bytes, not 1 to %d", in.Name, l.Size, wire.MaxJobList)
	}
	return checkParts(in.Name, in.Parts)
}

func checkParts(name string, parts []wire.JobPart) error {
	for _, part := range parts {
		if part.Size <= 0 || part.Size > PartBytes {
			return wire.RejectedBecause(wire.CodeBadBody, "the job's input %q has a part of %d bytes; a chunk has 1 to %d", name, part.Size, PartBytes)
		}
	}
	return nil
}
