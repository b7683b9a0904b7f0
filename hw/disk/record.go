package disk

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/internal/durable"
)

// RecordFile is the record's name in the state folder.
const RecordFile = "disks.json"

const (
	recordFormat = 1
	maxRecord    = 1 << 20 // bytes
	maxDisks     = 64      // entries; those not asked for the longest are forgotten
)

// Record keeps the results of tests in the state folder, by disk and
// filesystem, so that another disk at the same mount point is another disk.
// Safe for concurrent use.
type Record struct {
	path string

	mu    sync.Mutex // guards the rest, and the file
	disks map[string]entry
	warn  string // what was wrong with the file; said once
}

// recorded is the file.
type recorded struct {
	Format int              `json:"format"`
	Disks  map[string]entry `json:"disks"` // by keyOf
}

// entry is one filesystem's newest test.
type entry struct {
	Dir    string    `json:"dir"` // at the newest test
	Serial string    `json:"serial,omitempty"`
	Asked  time.Time `json:"asked"` // when it was last asked for
	Test   Test      `json:"test"`
}

// keyOf names a filesystem on a disk: the disk's own identity, which stays when
// it is plugged in elsewhere, and the filesystem's. d may be nil.
func keyOf(d *hw.Disk, fsid string) string {
	if d == nil {
		return "/" + fsid
	}
	return cmp.Or(d.Serial, d.WWN, d.Model) + "/" + fsid
}

// OpenRecord reads the results. A file that is damaged is begun anew, which
// costs a test of each disk; the first call of Trusted says so.
func OpenRecord(state string) (*Record, error) {
	if state == "" {
		return nil, errors.New("the record of self-tests needs the state folder")
	}
	return readRecord(state), nil
}

func readRecord(state string) *Record {
	r := &Record{path: filepath.Join(state, RecordFile), disks: map[string]entry{}}
	raw, err := durable.ReadFile(r.path, maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return r
	}
	var file recorded
	if err == nil {
		err = json.Unmarshal(raw, &file)
	}
	if err == nil && file.Format != recordFormat {
		err = fmt.Errorf("its format is %d, this program knows %d", file.Format, recordFormat)
	}
	if err != nil {
		r.warn = err.Error()
		return r
	}
	maps.Copy(r.disks, file.Disks)
	return r
}

// Trusted returns the test of the disk that dir is on, testing it if that was not done
// yet, or not with this disk, or not passed. dir is made. The error is that nothing could be
// found out; a disk that fails is a Test that was not passed.
func (r *Record) Trusted(ctx context.Context, dir string, inv *hw.Inventory, log *slog.Logger) (Test, error) {
	r.mu.Lock()
	if r.warn != "" {
		log.Warn("the record of self-tests is damaged and is begun anew; each disk is tested again", "file", r.path, "problem", r.warn)
		r.warn = ""
	}
	r.mu.Unlock()

	fsid, err := prepare(ctx, dir)
	if err != nil {
		return Test{}, err
	}
	d := diskOf(inv, dir)
	key := keyOf(d, fsid)
	if e, ok := r.asked(key); ok && e.Test.Passed {
		return e.Test, nil
	}
	most := int64(testBytes)
	if own, err := fsidOf(filepath.Dir(r.path)); err == nil && own == fsid {
		most = testHome
	}
	t, err := selfTest(ctx, dir, most, log)
	if err != nil {
		return Test{}, err
	}
	e := entry{Dir: dir, Asked: time.Now().UTC().Truncate(time.Second), Test: t}
	if d != nil {
		e.Serial = d.Serial
	}
	if err := r.put(key, e); err != nil {
		log.Warn("the result of a self-test could not be saved; the disk is tested again at the next start", "folder", dir, "error", err)
	}
	return t, nil
}

// prepare makes the folder and tells which filesystem it is on.
func prepare(ctx context.Context, dir string) (string, error) {
	type answer struct {
		fsid string
		err  error
	}
	a, ok := hw.Within(ctx, lookLimit, "prepare "+dir, func() answer {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return answer{err: err}
		}
		fsid, err := fsidOf(dir)
		return answer{fsid, err}
	})
	switch {
	case !ok && errors.Is(ctx.Err(), context.Canceled):
		return "", ctx.Err()
	case !ok:
		return "", fmt.Errorf("the disk of %s did not answer in time; it or its cable may be failing", dir)
	case a.err != nil:
		return "", fmt.Errorf("the folder for chunks cannot be used: %w", a.err)
	}
	return a.fsid, nil
}

// Of is the kernel name of the disk that a folder is on, "" if the inventory does
// not tell.
func Of(inv *hw.Inventory, dir string) string {
	if d := diskOf(inv, dir); d != nil {
		return d.Name
	}
	return ""
}

// diskOf finds the disk that a folder is on, nil if the inventory has none.
func diskOf(inv *hw.Inventory, dir string) *hw.Disk {
	if inv == nil {
		return nil
	}
	mount := stateMount(inv, dir)
	for _, f := range inv.Filesystems {
		if f.Path() != mount || f.Disk == "" {
			continue
		}
		if i := slices.IndexFunc(inv.Disks, func(d hw.Disk) bool { return d.Name == f.Disk }); i >= 0 {
			return &inv.Disks[i]
		}
	}
	return nil
}

// asked returns an entry and notes that it was asked for, so that it is not
// forgotten; the note lasts with the next test.
func (r *Record) asked(key string) (entry, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.disks[key]
	if ok {
		e.Asked = time.Now().UTC().Truncate(time.Second)
		r.disks[key] = e
	}
	return e, ok
}

func (r *Record) put(key string, e entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.disks[key] = e
	for len(r.disks) > maxDisks {
		oldest := ""
		for k, x := range r.disks {
			if k != key && (oldest == "" || x.Asked.Before(r.disks[oldest].Asked)) {
				oldest = k
			}
		}
		delete(r.disks, oldest)
	}
	raw, err := json.MarshalIndent(recorded{recordFormat, r.disks}, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(r.path, append(raw, '\n'), 0o600)
}
