package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// RemoveEmpty removes the empty files of a folder whose names have one of these
// extensions, as a process leaves them that is killed between making a file and
// giving it its size. Badger calls such a log "a new file" and refuses to open
// all that lies beside it.
func RemoveEmpty(dir string, extensions ...string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || !slices.Contains(extensions, filepath.Ext(e.Name())) {
			continue
		}
		info, err := e.Info()
		if err == nil && info.Size() == 0 {
			err = os.Remove(filepath.Join(dir, e.Name()))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
