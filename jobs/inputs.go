package jobs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

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

// watched is a file of the owner's, which may change while the job reads it.
type watched struct {
	name   string
	file   *os.File
	before os.FileInfo
}

func (in *inputs) close() {
	for _, f := range in.files {
		f.File.Close()
	}
}

// unchanged is an error if a file of the owner's is no longer what was hashed.
func (in *inputs) unchanged() error {
	for _, w := range in.watched {
		now, err := w.file.Stat()
		if err != nil {
			return wire.FailedBecause(wire.CodeInternal, "the job's input %q cannot be read any more: %v", w.name, err)
		}
		if a, b := stamp(w.before), stamp(now); a != b {
			return wire.FailedBecause(wire.CodeMismatch, "the job's input %q was changed on the device while the job read it; ask again", w.name)
		}
	}
	return nil
}

// stamp is what of a file changes with its content.
func stamp(info os.FileInfo) [3]int64 {
	st, _ := info.Sys().(*syscall.Stat_t)
	return [3]int64{info.Size(), info.ModTime().UnixNano(), st.Ctim.Nano()}
}

// gather gets everything that a job reads. An error with [wire.Problem.After] is
// one that ends by itself.
func (s *Service) gather(ctx context.Context, job wire.JobRun, w *work) (_ *inputs, err error) {
	in := &inputs{}
	defer func() {
		if err != nil {
			in.close()
		}
	}()
	if job.Input != "" {
		if in.stdin, err = s.o.Chunks.Read(ctx, job.Input); err != nil {
			return nil, fmt.Errorf("read the job's input: %w", err)
		}
		in.resources = append(in.resources, resource("stdin", sha256Of(in.stdin), job.Input))
	}
	for _, want := range job.Inputs {
		if err := s.gatherOne(ctx, want, w, in); err != nil {
			return nil, err
		}
	}
	return in, nil
}

func (s *Service) gatherOne(ctx context.Context, want wire.JobInput, w *work, in *inputs) error {
	var f *os.File
	var digest, only string
	var err error
	switch {
	case want.Dataset != "":
		if f, err = openDataset(s.policy.Load().Datasets, want); err != nil {
			return err
		}
		info, err := f.Stat()
		if err != nil {
			f.Close()
			return w.problem(err)
		}
		in.watched = append(in.watched, watched{want.Name, f, info})
		if digest, err = hashFile(ctx, f); err != nil {
			f.Close()
			return err
		}
	case want.Sensors != nil:
		data, err := s.o.Sensors(*want.Sensors)
		if err != nil {
			return err
		}
		f, digest, err = w.spool(want.Name, int64(len(data)), func(to io.Writer) error { _, err := to.Write(data); return err })
		if err != nil {
			return err
		}
	default:
		if len(want.Parts) == 1 {
			only = want.Parts[0].Chunk
		}
		asked := s.policy.Load().OnMetered != policy.MeteredRun
		f, digest, err = w.spool(want.Name, sizeOf(want.Parts), func(to io.Writer) error {
			for _, p := range want.Parts {
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

func sizeOf(parts []wire.JobPart) (n int64) {
	for _, p := range parts {
		n += p.Size
	}
	return n
}

// spool fills a file of the job's folder, and opens it for reading.
func (w *work) spool(name string, size int64, fill func(io.Writer) error) (_ *os.File, digest string, err error) {
	if err := w.room(size); err != nil {
		return nil, "", err
	}
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

// room is an error if so many bytes do not fit the disk.
func (w *work) room(size int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(w.dir, &st); err != nil {
		return w.problem(err)
	}
	if free := int64(st.Bavail) * int64(st.Bsize); free-size < spareBytes {
		return wire.FailedBecause(wire.CodeNoSpace, "the job needs %d MiB of the device's disk, of which %d are free, and %d stay free; place it on another", size>>20, free>>20, spareBytes>>20)
	}
	return nil
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

// openDataset opens a file that the owner has opened to jobs. No link leads out of
// the owner's folder.
func openDataset(open map[string]string, want wire.JobInput) (*os.File, error) {
	name, below, nested := strings.Cut(want.Dataset, "/")
	dir, ok := open[name]
	if !ok {
		return nil, wire.RejectedBecause(wire.CodePolicy, "the owner of this device has opened no dataset %.70q to jobs", name)
	}
	if !nested {
		dir, below = filepath.Split(filepath.Clean(dir))
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, wire.FailedBecause(wire.CodeNotFound, "the dataset %s cannot be read: %v", name, errors.Unwrap(err))
	}
	defer root.Close()
	// Not to wait for the other end of a FIFO, nor to touch a device.
	f, err := root.OpenFile(below, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, wire.FailedBecause(wire.CodeNotFound, "the dataset %.200s cannot be read: %v", want.Dataset, errors.Unwrap(err))
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = wire.RejectedBecause(wire.CodeBadBody, "the dataset %.200s is no file; name one below it", want.Dataset)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// hashFile reads a file as a whole, and leaves it at its beginning.
func hashFile(ctx context.Context, f *os.File) (string, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for at := int64(0); ; {
		if ctx.Err() != nil {
			return "", fmt.Errorf("the job was stopped while its input was read: %w", context.Cause(ctx))
		}
		n, err := f.ReadAt(buf, at)
		h.Write(buf[:n])
		at += int64(n)
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", wire.FailedBecause(wire.CodeInternal, "the job's input cannot be read: %v", err)
		}
	}
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
	for _, has := range []bool{len(in.Parts) > 0, in.Dataset != "", in.Sensors != nil} {
		if has {
			sources++
		}
	}
	if sources > 1 {
		return wire.RejectedBecause(wire.CodeBadBody, "the job's input %q has %d sources; it is parts, a dataset or sensors, or nothing and empty", in.Name, sources)
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
	for _, part := range in.Parts {
		if part.Size <= 0 || part.Size > PartBytes {
			return wire.RejectedBecause(wire.CodeBadBody, "the job's input %q has a part of %d bytes; a chunk has 1 to %d", in.Name, part.Size, PartBytes)
		}
	}
	return nil
}
