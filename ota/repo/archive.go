package repo

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
)

// archive is a repository in one file, as tar makes it of the repository's folder. What
// is in it is trusted no more than what a server sends.
type archive struct {
	file  *os.File
	files map[string]span
}

type span struct{ at, size int64 }

// maxFiles is how many files an archive may have; a release has some ten, and those of
// ten years a thousand.
const maxFiles = 20_000

// errCut is what an archive or a file on a stick is that was not copied to its end.
var errCut = errors.New("it is cut short: copy it again, and remove the stick only when it may be")

// openArchive reads which files there are, each of them whole.
func openArchive(name string) (*archive, error) {
	f, _, err := openRegular(name, os.Stat, os.OpenFile)
	if err != nil {
		return nil, err
	}
	a := &archive{file: f, files: map[string]span{}}
	if err := a.index(); err != nil {
		if !errors.Is(err, errCut) {
			err = fmt.Errorf("it is no archive of a repository (tar -C REPOSITORY -cf FILE .): %w", err)
		}
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return a, nil
}

func (a *archive) index() error {
	info, err := a.file.Stat()
	if err != nil {
		return err
	}
	for t := tar.NewReader(a.file); ; {
		h, err := t.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, io.ErrUnexpectedEOF) && len(a.files) > 0:
			return errCut
		case err != nil:
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		at, err := a.file.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		if at+h.Size > info.Size() {
			return errCut
		}
		if len(a.files) == maxFiles {
			return fmt.Errorf("it has more than %d files", maxFiles)
		}
		a.files[path.Clean(h.Name)] = span{at, h.Size}
	}
}

// Open implements [Source].
func (a *archive) Open(ctx context.Context, name string, offset int64) (io.ReadCloser, error) {
	s, ok := a.files[name]
	if !ok {
		return nil, fmt.Errorf("%s in the archive: %w", name, fs.ErrNotExist)
	}
	return patient(ctx, func() (io.ReadCloser, error) {
		return io.NopCloser(io.NewSectionReader(a.file, s.at+offset, max(0, s.size-offset))), nil
	})
}

// Close ends the use of the archive.
func (a *archive) Close() error { return a.file.Close() }
