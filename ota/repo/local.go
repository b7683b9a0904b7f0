package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Dir is a repository in a directory, such as a USB stick.
type Dir string

// Open implements [Source].
func (d Dir) Open(ctx context.Context, path string, offset int64) (io.ReadCloser, error) {
	if !fs.ValidPath(path) {
		return nil, fmt.Errorf("%q is no path in a repository", path)
	}
	return patient(ctx, func() (io.ReadCloser, error) {
		root, err := os.OpenRoot(string(d)) // a stick may hold links that lead elsewhere
		if err != nil {
			return nil, err
		}
		defer root.Close()
		f, _, err := openRegular(filepath.FromSlash(path), root.Stat, root.OpenFile)
		if err != nil {
			return nil, err
		}
		if _, err := f.Seek(offset, io.SeekStart); err != nil {
			f.Close()
			return nil, err
		}
		return f, nil
	})
}

// OpenPlace finds a repository where somebody who is no developer points: a folder that
// holds one, or an archive of one. end ends its use.
func OpenPlace(ctx context.Context, place string) (source Source, end func(), err error) {
	type found struct {
		Source
		io.Closer
	}
	got, err := within(ctx, func() (found, error) {
		fi, err := os.Stat(place)
		if err != nil {
			return found{}, err
		}
		if !fi.IsDir() {
			a, err := openArchive(place)
			return found{a, a}, err
		}
		if _, err := os.Stat(filepath.Join(place, "metadata")); errors.Is(err, fs.ErrNotExist) {
			return found{}, errors.New(place + " holds no update: there is no folder \"metadata\" in it; name the folder that holds it")
		}
		return found{Dir(place), io.NopCloser(nil)}, nil
	}, func(f found) { f.Close() })
	if err != nil {
		return nil, nil, err
	}
	return got.Source, func() { _ = got.Close() }, nil
}

// openRegular opens a regular file and nothing else: a FIFO would wait for its other
// end, and some devices do something when they are opened.
func openRegular(name string, stat func(string) (fs.FileInfo, error), open func(string, int, fs.FileMode) (*os.File, error)) (*os.File, fs.FileInfo, error) {
	irregular := fmt.Errorf("%s is not a regular file", name)
	switch fi, err := stat(name); {
	case err != nil:
		return nil, nil, err
	case !fi.Mode().IsRegular():
		return nil, nil, irregular
	}
	f, err := open(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat() // it may be another by now
	if err == nil && !fi.Mode().IsRegular() {
		err = irregular
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, fi, nil
}

// within waits for f as long as ctx lasts. A disk that dies may not come back from a
// call, and nothing ends that: f is left behind then, and what it still brings dropped.
func within[T any](ctx context.Context, f func() (T, error), drop func(T)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result)
	go func() {
		v, err := f()
		select {
		case done <- result{v, err}:
		case <-ctx.Done():
			if err == nil {
				drop(v)
			}
		}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		var none T
		return none, fmt.Errorf("the disk does not answer: %w", ctx.Err())
	}
}

// patient opens what may never be opened, or read, and is given up when ctx ends.
func patient(ctx context.Context, open func() (io.ReadCloser, error)) (io.ReadCloser, error) {
	r, err := within(ctx, open, func(r io.ReadCloser) { r.Close() })
	if err != nil {
		return nil, err
	}
	return &patientReader{ctx: ctx, r: r}, nil
}

type patientReader struct {
	ctx  context.Context
	r    io.ReadCloser
	left bool // a read was left behind
}

func (p *patientReader) Read(b []byte) (int, error) {
	if p.left {
		return 0, p.ctx.Err()
	}
	var end error
	own, err := within(p.ctx, func() ([]byte, error) { // one that was left behind must not write to b later
		own := make([]byte, len(b))
		var n int
		n, end = p.r.Read(own)
		return own[:n], nil
	}, func([]byte) { p.r.Close() })
	if err != nil {
		p.left = true
		return 0, err
	}
	return copy(b, own), end
}

func (p *patientReader) Close() error {
	if p.left {
		return nil // it is closed when its read comes back
	}
	return p.r.Close()
}
