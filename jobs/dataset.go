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
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// Of a folder that is an input.
const (
	maxDepth = 32 // folders below folders
	// fileShare is of the descriptors that this process may have open, what one job's
	// files may take of them: 1/fileShare. Stores and connections need some, too.
	fileShare = 4
)

// gatherDataset opens what the owner has opened to jobs: a file, or all files of a
// folder. No link leads out of the owner's folder.
func (s *Service) gatherDataset(ctx context.Context, want wire.JobInput, j *job, in *inputs) (err error) {
	name, below, _ := strings.Cut(want.Dataset, "/")
	dir, ok := s.policy.Load().Datasets[name]
	if !ok {
		return wire.RejectedBecause(wire.CodePolicy, "the owner of this device has opened no dataset %.70q to jobs", name)
	}
	unreadable := func(err error) error {
		var p *wire.Problem
		if errors.As(err, &p) || ctx.Err() != nil {
			return err
		}
		var at *fs.PathError
		if errors.As(err, &at) {
			err = at.Err // where it is on the device is the owner's
		}
		return wire.FailedBecause(wire.CodeNotFound, "the dataset %.200s cannot be read: %v", want.Dataset, err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return unreadable(err)
	}
	if !info.IsDir() {
		if below != "" {
			return wire.FailedBecause(wire.CodeNotFound, "the dataset %s is one file; there is no %.200s in it", name, below)
		}
		dir, below = filepath.Split(filepath.Clean(dir))
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return unreadable(err)
	}
	defer root.Close()
	if below == "" {
		below = "."
	}
	f, info, err := openIn(root, below)
	if err != nil {
		return unreadable(err)
	}
	switch {
	case info.IsDir() && want.Name == wire.Stdin:
		f.Close()
		return wire.RejectedBecause(wire.CodeBadBody, "the dataset %.200s is a folder, and standard input is a file", want.Dataset)
	case info.IsDir():
		f.Close()
		return s.gatherFolder(ctx, want, root, below, j, in, unreadable)
	case !info.Mode().IsRegular():
		f.Close()
		return wire.RejectedBecause(wire.CodeBadBody, "the dataset %.200s is neither a file nor a folder", want.Dataset)
	}
	in.files = append(in.files, sandbox.Input{Name: want.Name, Size: info.Size(), File: f})
	in.watched = append(in.watched, watched{want.Name, f, info})
	if err := s.counts(in, info.Size()); err != nil {
		return err
	}
	digest, err := s.hashFile(ctx, f, j)
	if err != nil {
		return err
	}
	in.resources = append(in.resources, resource(want.Name, digest, ""))
	return nil
}

// openIn opens a path below root as it is: it does not wait for the other end of a
// FIFO, nor touch a device.
func openIn(root *os.Root, name string) (*os.File, fs.FileInfo, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// gatherFolder opens all files of a folder and of those in it, by name. Links, sockets,
// FIFOs and devices are left out.
func (s *Service) gatherFolder(ctx context.Context, want wire.JobInput, root *os.Root, below string, j *job, in *inputs, unreadable func(error) error) error {
	names, err := filesBelow(ctx, root, below, want.Dataset)
	if err != nil {
		return unreadable(err)
	}
	already := 0
	for _, other := range in.files {
		already += max(len(other.Files), 1)
	}
	if most := mostFiles(); already+len(names) > most {
		return wire.FailedBecause(wire.CodeLimit, "the job's inputs have more than the %d files that this device can open for a job, with the dataset %.200s among them; name a folder or a file in it", most, want.Dataset)
	}
	folder := sandbox.Input{Name: want.Name}
	at := len(in.files)
	in.files = append(in.files, folder)
	sums := make(map[string]string, len(names))
	for _, name := range names {
		f, info, err := openIn(root, filepath.Join(below, name))
		if err != nil {
			return unreadable(err)
		}
		in.files[at].Files = append(in.files[at].Files, sandbox.Input{Name: name, Size: info.Size(), File: f})
		if !info.Mode().IsRegular() {
			return wire.FailedBecause(wire.CodeMismatch, "the job's input %q was changed on the device while it was opened; ask again", want.Name)
		}
		in.watched = append(in.watched, watched{want.Name, f, info})
		if err := s.counts(in, info.Size()); err != nil {
			return err
		}
		if sums[name], err = s.hashFile(ctx, f, j); err != nil {
			return err
		}
	}
	in.resources = append(in.resources, wire.Resource{Name: want.Name, Digest: map[string]string{wire.DirHash: dirHash(names, sums)}})
	return nil
}

// filesBelow lists the regular files below a folder, by their paths from there, in the
// order of those.
func filesBelow(ctx context.Context, root *os.Root, below, dataset string) (names []string, err error) {
	err = fs.WalkDir(root.FS(), below, func(at string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the job was stopped while its input was listed: %w", context.Cause(ctx))
		}
		name := at
		if below != "." {
			name = strings.TrimPrefix(strings.TrimPrefix(at, below), "/")
		}
		switch {
		case strings.Count(name, "/") > maxDepth:
			return wire.FailedBecause(wire.CodeLimit, "the dataset %.200s has folders below more than %d others; name a folder in it", dataset, maxDepth)
		case len(names) > sandbox.MaxFiles:
			return wire.FailedBecause(wire.CodeLimit, "the dataset %.200s has more than %d files, which is the most that a job can have as an input; name a folder in it", dataset, sandbox.MaxFiles)
		case !e.Type().IsRegular():
			return nil
		case !utf8.ValidString(name):
			return wire.FailedBecause(wire.CodeLimit, "the dataset %.200s has a file whose name %.200q is no UTF-8, which no job can name; rename it", dataset, name)
		}
		names = append(names, name)
		return nil
	})
	slices.Sort(names)
	return names, err
}

// mostFiles is how many files one job may have open here.
func mostFiles() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return sandbox.MaxInputs
	}
	return int(min(l.Cur/fileShare, sandbox.MaxFiles))
}

// dirHash is the digest of a folder that in-toto calls dirHash (spec/v1/digest_set.md):
// Hash1 of golang.org/x/mod/sumdb/dirhash, in hexadecimal.
func dirHash(names []string, sums map[string]string) string {
	h := sha256.New()
	for _, name := range names {
		fmt.Fprintf(h, "%s  %s\n", sums[name], name)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// watched is a file of the owner's, which may change while the job reads it.
type watched struct {
	name   string
	file   *os.File
	before os.FileInfo
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

// hashFile reads a file as a whole, and leaves it at its beginning. It stands still when
// the job is to.
func (s *Service) hashFile(ctx context.Context, f *os.File, j *job) (string, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	took := time.Duration(0)
	for at := int64(0); ; {
		if err := s.pass(ctx, j, took); err != nil {
			return "", err
		}
		began := time.Now()
		n, err := f.ReadAt(buf, at)
		h.Write(buf[:n])
		at += int64(n)
		took = time.Since(began)
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", wire.FailedBecause(wire.CodeInternal, "the job's input cannot be read: %v", err)
		}
	}
}
