// Package durable replaces files so that a power cut leaves the old content or
// the new one, whole: written aside, synced, renamed, directory synced.
//
// It wraps renameio, which does the first three, but not the last, and which by
// itself may write aside in the machine's common temporary folder, where a
// crash would leave a secret behind.
//
// [ReadFile] reads back what is small, whatever stands in its place.
package durable

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// WriteFile replaces the file at path. The mode holds whatever the umask is.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	return Replace(path, mode, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// CopyFile is [WriteFile] with the content of another file.
func CopyFile(path, from string, mode fs.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	return Replace(path, mode, func(w io.Writer) error {
		_, err := io.Copy(w, src)
		return err
	})
}

// Replace is [WriteFile] with what fill writes; after an error of it the old file stands.
func Replace(path string, mode fs.FileMode, fill func(io.Writer) error) error {
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithPermissions(mode), renameio.IgnoreUmask())
	if err != nil {
		return err
	}
	defer func() { _ = f.Cleanup() }() // after success there is nothing left to clean
	if err := fill(f); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return Sync(filepath.Dir(path))
}

// Sync makes what was written to a file last, whoever wrote it, or what was created,
// renamed or removed in a folder.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
