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
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// spareBytes is what inputs and outputs of jobs leave free on the disk.
const spareBytes = 256 << 20

// inputs is what a job reads, gathered.
type inputs struct {
	size      int64 // bytes, so far
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
		if err := s.counts(in, int64(len(in.stdin))); err != nil {
			return nil, err
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
		if err := errors.Join(s.counts(in, int64(len(data))), s.disk.hold(w, int64(len(data)), s.policy.Load().MaxDisk)); err != nil {
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
			if err := s.disk.hold(w, sizeOf(want.Parts), s.policy.Load().MaxDisk); err != nil {
				return err
			}
		}
		if err := s.counts(in, sizeOf(want.Parts)); err != nil {
			return err
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

// counts adds to what a job reads.
func (s *Service) counts(in *inputs, size int64) error {
	in.size += size
	return mayRead(s.policy.Load(), in.size)
}

// mayRead is an error if the owner lets a job read less.
func mayRead(p *policy.Policy, size int64) error {
	if p.MaxInput > 0 && size > p.MaxInput {
		return wire.RejectedBecause(wire.CodePolicy, "the job reads %d bytes or more, and the owner of this device lets a job read %d; place it on another", size, p.MaxInput)
	}
	return nil
}

// holdAll has the room on the disk that is known to be wanted of it before a job begins.
func (s *Service) holdAll(j *job, limits wire.JobLimits) error {
	size, err := j.work.checkpointSize()
	if err != nil {
		return err
	}
	j.work.kept = size
	for _, in := range j.Inputs {
		size += sizeOf(in.Parts)
	}
	if len(j.Outputs) > 0 {
		size += limits.OutputBytes
	}
	return s.disk.hold(j.work, size, s.policy.Load().MaxDisk)
}

// keepCheckpoint keeps one, if there is room. Until it is durable, the one before is there too.
func (s *Service) keepCheckpoint(j *job, size int64, r io.Reader) (err error) {
	defer func() {
		if err != nil {
			s.o.Log.Warn("a checkpoint of a job was not kept; if the agent ends, the job goes on from the one before", "order", j.order, "bytes", size, "error", err)
		}
	}()
	written, err := s.disk.reserve(j.work, size)
	if err != nil {
		return err
	}
	defer written()
	if err := s.disk.hold(j.work, size, s.policy.Load().MaxDisk); err != nil {
		return err
	}
	gone := size
	if err = j.checkpoint(size, r); err == nil {
		gone, j.work.kept = j.work.kept, size
	}
	s.disk.release(j.work, gone)
	return err
}

// disk is what jobs may still write where their folders are, and what they hold there by the
// owner's leave.
type disk struct {
	free func(dir string) (int64, error) // bytes; see freeOn

	mu     sync.Mutex
	coming int64         // bytes that jobs have room for and have not written
	given  chan struct{} // closed when room is given back; nil: nobody waits for that
	held   int64         // bytes of all jobs together, written or not, until their folders are gone; work.held has each one's
}

// hold is an error if so many bytes more are above what the owner gives, most; 0: all. Where
// others have it, the job can wait.
func (d *disk) hold(w *work, size, most int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case most <= 0:
	case w.held+size > most:
		return wire.RejectedBecause(wire.CodePolicy, "the job needs %d bytes of this device's disk, and its owner gives all jobs together %d; place it on another", w.held+size, most)
	case d.held+size > most:
		return &wire.Problem{State: wire.Rejected, Code: policy.CodeDisk, Reason: "other jobs have the room on the disk that the owner of this device gives to jobs; it waits for theirs", After: roomAfter}
	}
	d.held, w.held = d.held+size, w.held+size
	return nil
}

// roomAfter is when a job looks again for room, also if nobody has said that there is more.
const roomAfter = time.Minute

// more is closed when there is more room than now.
func (d *disk) more() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.moreLocked()
}

func (d *disk) moreLocked() chan struct{} {
	if d.given == nil {
		d.given = make(chan struct{})
	}
	return d.given
}

// release gives a part of it back.
func (d *disk) release(w *work, size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.releaseLocked(w, size)
}

func (d *disk) releaseLocked(w *work, size int64) {
	d.held, w.held = d.held-size, w.held-size
	if d.given != nil && size > 0 {
		close(d.given)
		d.given = nil
	}
}

// drop gives back all that a job holds.
func (d *disk) drop(w *work) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.releaseLocked(w, w.held)
}

// await is drop, of a job that had too little room. What is returned is closed when others
// have given room back since the job got seen.
func (d *disk) await(w *work, seen <-chan struct{}) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	others := (<-chan struct{})(d.given) != seen
	d.releaseLocked(w, w.held)
	if others {
		return seen
	}
	return d.moreLocked()
}

func (d *disk) holds() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.held
}

// room is how many bytes one more job can have where dir is, by what is free now and by what
// the owner gives all together, most; what others hold of the latter can be waited for. nil
// if it cannot be told.
func (d *disk) room(dir string, most int64) *int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	free, err := d.free(dir)
	if err != nil {
		return nil
	}
	room := max(free-d.coming-spareBytes, 0)
	if most > 0 {
		room = min(room, most)
	}
	return &room
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
	size := int64(0)
	for _, in := range job.Inputs {
		if err := s.checkSource(p, in); err != nil {
			return err
		}
		size += sizeOf(in.Parts)
	}
	return mayRead(p, size)
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
