package engine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
)

// youngFiles is how long ago a stream's file was changed if it may not be synced yet:
// several times what [Config.Sync] is set to.
const youngFiles = time.Minute

// Durable returns when all that was written to these buckets before is safe from a
// power cut as well. JetStream has handed an acknowledged write to the kernel, in one of
// the youngest of a stream's files, and syncs them every [Config.Sync]: who cannot wait
// for that syncs them here. What an external server writes is as durable as its own
// configuration says; for it this does nothing.
func (e *Engine) Durable(buckets ...string) error {
	if e.local == nil {
		return nil
	}
	for _, b := range buckets {
		dirs, err := filepath.Glob(filepath.Join(e.local.srv.JetStreamConfig().StoreDir, "*", "streams", "KV_"+b, "msgs"))
		if err == nil && len(dirs) != 1 {
			err = fmt.Errorf("%d folders are its own, not one", len(dirs))
		}
		if err == nil {
			err = syncYoung(dirs[0])
		}
		if err != nil {
			return fmt.Errorf("bucket %q may not be on disk: %w", b, err)
		}
	}
	return nil
}

// syncYoung syncs the files of a folder that were changed lately, seen from the newest
// of them, and the folder.
func syncYoung(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	changed := make(map[string]time.Time)
	var newest time.Time
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) { // its messages are all gone
			continue
		}
		if err != nil {
			return err
		}
		changed[e.Name()] = info.ModTime()
		if info.ModTime().After(newest) {
			newest = info.ModTime()
		}
	}
	for name, at := range changed {
		if newest.Sub(at) > youngFiles {
			continue
		}
		if err := durable.Sync(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return durable.Sync(dir)
}
