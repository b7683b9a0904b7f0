package jobs

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// mostFruitless is how often a job may be cut off by the end of the agent without
// having got further in between: perhaps it is the job that ends the agent.
const mostFruitless = 10

// work is the folder of one job. It outlives the agent, and goes with the job's
// report:
//
//	meta.json    see meta
//	checkpoint   what the module last kept
//	files/       inputs, outputs: of one run
type work struct {
	dir  string
	meta meta
	held int64 // bytes on the disk, guarded by disk.mu
	kept int64 // bytes of the checkpoint; of the job's own goroutines, one after the other
}

// meta is what is known of a job's former lives.
type meta struct {
	Expires   time.Time `json:"expires"`             // of the order
	Begun     int       `json:"begun"`               // how often
	Fruitless int       `json:"fruitless,omitempty"` // so many of them since the last checkpoint, this one included
}

// openWork begins a job, once more or for the first time.
func openWork(root string, o wire.Order) (*work, error) {
	if !sandbox.ValidName(o.ID) {
		return nil, wire.RejectedBecause(wire.CodeBadBody, "the order's id %.70q cannot be the name of a folder", o.ID)
	}
	w := &work{dir: filepath.Join(root, o.ID)}
	raw, err := os.ReadFile(w.path("meta.json"))
	if err == nil && json.Unmarshal(raw, &w.meta) != nil {
		w.meta = meta{} // cut off while it was written
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, w.problem(err)
	}
	if w.meta.Fruitless >= mostFruitless {
		return w, wire.FailedBecause(wire.CodeInterrupted, "the agent ended %d times in the middle of this job, which never came as far as a checkpoint; try it on another device, with less memory", w.meta.Fruitless)
	}
	w.meta.Expires = o.Expires
	w.meta.Begun++
	w.meta.Fruitless++
	if err := w.empty(); err != nil {
		return nil, err
	}
	if err := w.save(); err != nil {
		return nil, w.problem(err)
	}
	return w, nil
}

// empty removes inputs and outputs.
func (w *work) empty() error {
	if err := errors.Join(os.RemoveAll(w.path("files")), os.MkdirAll(w.path("files"), 0o700)); err != nil {
		return w.problem(err)
	}
	return nil
}

// checkpointSize is how many bytes a former life has kept.
func (w *work) checkpointSize() (int64, error) {
	st, err := os.Stat(w.path("checkpoint"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, w.problem(err)
	}
	return st.Size(), nil
}

func (w *work) problem(err error) error { return diskProblem("the job's folder", err) }

func (w *work) path(name ...string) string {
	return filepath.Join(append([]string{w.dir}, name...)...)
}

func (w *work) save() error {
	raw, err := json.Marshal(w.meta)
	if err != nil {
		return err
	}
	if w.meta.Begun > 1 || w.meta.Fruitless == 0 {
		return durable.WriteFile(w.path("meta.json"), raw, 0o600)
	}
	// Of a first life, before a checkpoint, it is not synced, which would cost each job as
	// much as it takes: a power cut can leave it empty, and the job begins anew.
	return os.WriteFile(w.path("meta.json"), raw, 0o600)
}

// keep makes a checkpoint durable.
func (w *work) keep(size int64, r io.Reader) error {
	if err := durable.Replace(w.path("checkpoint"), 0o600, func(to io.Writer) error {
		_, err := io.CopyN(to, r, size)
		return err
	}); err != nil {
		return err
	}
	if w.meta.Fruitless == 0 {
		return nil
	}
	w.meta.Fruitless = 0
	// The first of this life: of a folder that is new, its name must last, too.
	return errors.Join(w.save(), durable.Sync(filepath.Dir(w.dir)), durable.Sync(filepath.Dir(filepath.Dir(w.dir))))
}

// checkpoint is what a former life has kept; nil if there is none.
func (w *work) checkpoint() (*os.File, int64, error) {
	f, err := os.Open(w.path("checkpoint"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, w.problem(err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, w.problem(err)
	}
	return f, st.Size(), nil
}

// remove forgets the job.
func (w *work) remove() error { return os.RemoveAll(w.dir) }

// sweep removes the folders of orders that nobody will ask for again.
func sweep(root string, now time.Time) error {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		w := work{dir: filepath.Join(root, e.Name())}
		raw, readErr := os.ReadFile(w.path("meta.json"))
		if readErr != nil && !errors.Is(readErr, fs.ErrNotExist) {
			continue
		}
		if json.Unmarshal(raw, &w.meta) == nil && now.Before(w.meta.Expires.Add(time.Hour)) {
			continue
		}
		err = errors.Join(err, w.remove())
	}
	return err
}
