// Package tour runs a whole fleet on one machine, a coordinator and three
// devices as real processes, or two of them as virtual machines that start the
// image, and walks through all that they are for. It calls the same programs that a person would, and believes none of them: what it
// shows as evidence it has checked itself.
package tour

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/packaging/qemu"
	"github.com/deimos-edge/deimos/sync/chunk"
)

// Options says how to walk.
type Options struct {
	Bin   string    // folder with our programs, bin/ as "make build" leaves it
	Dir   string    // empty folder for the fleet; "" for a new one that is removed at the end
	File  string    // what to store; "" for the agent's own binary
	Image string    // of a device; with it all devices but the first are machines in QEMU
	Once  bool      // end after the tour
	Out   io.Writer // for people
}

// tour is a fleet under way.
type tour struct {
	Options
	bin     string
	madeDir bool // Dir is ours to remove
	starter *proc.Starter
	serve   *proc.Process
	devices []*device
	token   string
	next    string // version of the release that works
	broken  string // version of the one that does not come up

	object  putResult
	victim  *device // stopped, later tampered with
	started time.Time
}

// device is one agent under its launcher, or a machine.
type device struct {
	n     int
	id    string
	proc  running
	boots int // of a machine
}

// putResult is what "deimos object put -o json" prints.
type putResult struct {
	api.Object
	Placements []api.Placement `json:"placements"`
}

const (
	fleetSize  = 3
	objectName = "tour"
	readyLimit = 30 * time.Second
	stepLimit  = 5 * time.Minute // large files take long
)

// step is one stop of the tour. Its lines are the evidence.
type step struct {
	name string
	run  func(ctx context.Context) (evidence []string, err error)
}

// Run walks through every step, and returns the first failure as a sentence.
// Whatever happens, no process outlives it.
func Run(ctx context.Context, o Options) (err error) {
	starter := proc.NewStarter()
	defer starter.End()
	t, err := prepare(ctx, o, starter)
	if err != nil {
		return err
	}
	defer func() {
		t.stopAll()
		err = t.tidy(err)
	}()
	if err := t.walk(ctx); err != nil {
		return err
	}
	if t.Once {
		return nil
	}
	t.farewell()
	select {
	case <-ctx.Done():
		fmt.Fprintln(t.Out, "\nStopping the fleet.")
		return nil
	case <-t.serve.Done():
		return fmt.Errorf("the coordinator ended by itself: %s", t.serve.LastWords())
	}
}

// prepare checks everything that can be wrong before the fleet is started.
func prepare(ctx context.Context, o Options, starter *proc.Starter) (*tour, error) {
	t := &tour{Options: o, bin: o.Bin, starter: starter, started: time.Now()}
	for _, name := range []string{"deimos", "deimos-agent", "deimos-launch", "guests/wordcount.wasm", "guests/sha256sum.wasm", nextAgent, brokenAgent} {
		if _, err := os.Stat(filepath.Join(o.Bin, name)); err != nil {
			return nil, fmt.Errorf("%s is missing in %s: run \"make build\", or name the folder with --bin", name, o.Bin)
		}
	}
	if err := t.learnVersions(ctx); err != nil {
		return nil, err
	}
	if t.File == "" {
		t.File = filepath.Join(o.Bin, "deimos-agent")
	}
	info, err := os.Stat(t.File)
	if err != nil {
		return nil, fmt.Errorf("the file to store cannot be read: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() < chunk.LeafSize {
		return nil, fmt.Errorf("%s is no file of at least %d bytes, which the challenges of the tour need; choose another with --file", t.File, chunk.LeafSize)
	}
	devices := "every one a process"
	if o.Image != "" {
		if _, err := os.Stat(o.Image); err != nil {
			return nil, fmt.Errorf("the image cannot be read (make image): %w", err)
		}
		if _, err := qemu.Find(); err != nil {
			return nil, err
		}
		devices = "the first a process, the others arm64 machines in QEMU"
	}
	if o.Dir == "" {
		t.madeDir = true
		t.Dir, err = os.MkdirTemp("", "deimos-dev-")
	} else {
		err = emptyDir(o.Dir)
	}
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(t.Out, "A Deimos fleet on this machine: one coordinator, %d devices, %s.\n", fleetSize, devices)
	fmt.Fprintf(t.Out, "  folder  %s\n  stores  %s (%s)\n\n", t.Dir, near(t.File), cli.Bytes(info.Size()))
	return t, nil
}

// near says a path the short way, from the folder that the person is in.
func near(path string) string {
	wd, err := os.Getwd()
	if err != nil {
		return path
	}
	if rel, err := filepath.Rel(wd, path); err == nil && len(rel) < len(path) {
		return rel
	}
	return path
}

func emptyDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("the folder for the fleet cannot be made: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("the folder for the fleet cannot be read: %w", err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s is not empty; the tour wants an empty folder, so that it cannot harm what is yours", dir)
	}
	return nil
}

func (t *tour) path(parts ...string) string {
	return filepath.Join(append([]string{t.Dir}, parts...)...)
}

// steps are the tour, in order.
func (t *tour) steps() []step {
	steps := []step{
		{"probe this machine", t.probe},
		{"enrol three devices", t.enrol},
		{"store a file, each chunk twice", t.store},
		{"read it with one device stopped", t.readBack},
		{"run jobs where the data is", t.jobs},
		{"challenge storage, then tamper", t.auditStorage},
		{"challenge a computation", t.auditCompute},
		{"update, and go back from a bad one", t.update},
	}
	if t.Image != "" {
		steps = append(steps, step{"pull the plug of a machine", t.powerCut})
	}
	return steps
}

func (t *tour) walk(ctx context.Context) error {
	steps := t.steps()
	for i, s := range steps {
		began := time.Now()
		sctx, cancel := context.WithTimeoutCause(ctx, t.patience(stepLimit), fmt.Errorf("it took longer than %s", t.patience(stepLimit)))
		lines, err := s.run(sctx)
		if err != nil && sctx.Err() != nil && ctx.Err() == nil {
			err = context.Cause(sctx)
		}
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		mark := "✓"
		if err != nil {
			mark = "✗"
		}
		fmt.Fprintf(t.Out, "%s %d/%d  %-36s %6.1f s\n", mark, i+1, len(steps), s.name, time.Since(began).Seconds())
		for _, l := range lines {
			fmt.Fprintf(t.Out, "         %s\n", l)
		}
		if err != nil {
			return fmt.Errorf("step %d (%s) failed: %w", i+1, s.name, err)
		}
	}
	fmt.Fprintf(t.Out, "\nAll %d steps in %.1f s.\n", len(steps), time.Since(t.started).Seconds())
	return nil
}

// farewell says what can be done now.
func (t *tour) farewell() {
	deimos := near(t.program("deimos"))
	fmt.Fprintf(t.Out, `
The fleet stays up until Ctrl-C. In another terminal:

  export DEIMOS_CONTEXT=%s
  %s device list
  %s object put --plain FILE
  %s job run %s --input NAME
  %s audit storage %s

Logs are in %s.
`, t.path("coordinator", "operator.json"),
		deimos, deimos, deimos, near(filepath.Join(t.bin, "guests", "wordcount.wasm")), deimos, t.holder().id, t.path("logs"))
}

func (t *tour) program(name string) string { return filepath.Join(t.bin, name) }

// stopAll ends every process, devices first.
func (t *tour) stopAll() {
	done := make(chan struct{})
	for _, d := range t.devices {
		go func() {
			switch p := d.proc.(type) {
			case nil:
			case *proc.Process:
				p.Stop(stopLimit)
			default:
				p.Kill() // its disks go with the folder
			}
			done <- struct{}{}
		}()
	}
	for range t.devices {
		<-done
	}
	if t.serve != nil {
		t.serve.Stop(stopLimit)
	}
}

// tidy removes a folder that we made, unless something in it tells why we failed.
func (t *tour) tidy(err error) error {
	if t.madeDir && (err == nil || errors.Is(err, context.Canceled)) {
		if rerr := os.RemoveAll(t.Dir); rerr != nil {
			return fmt.Errorf("the tour's folder cannot be removed: %w", rerr)
		}
		return err
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("%w\nThe fleet's folder is left as it was: %s; its logs are in %s", err, t.Dir, t.path("logs"))
	}
	return err
}

// devicesNow asks the coordinator for the fleet.
func (t *tour) devicesNow(ctx context.Context) (map[string]api.Device, error) {
	var list []api.Device
	if err := t.cli(ctx, &list, "device", "list"); err != nil {
		return nil, err
	}
	m := make(map[string]api.Device)
	for _, d := range list {
		m[string(d.ID)] = d
	}
	return m, nil
}

// until asks again and again until ok, at most for limit.
func until(ctx context.Context, limit time.Duration, what string, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		good, err := ok()
		if err != nil && ctx.Err() == nil {
			return err
		}
		if good {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s did not happen within %s", what, limit)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// chunkOf reads one chunk of the stored file from the original.
func (t *tour) chunkOf(i int) ([]byte, error) {
	f, err := os.Open(t.File)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data := make([]byte, t.object.Chunks[i].Size)
	if _, err := f.ReadAt(data, int64(i)*chunk.DefaultSize); err != nil {
		return nil, fmt.Errorf("%s has changed since it was stored: %w", t.File, err)
	}
	return data, nil
}

// holders lists the tour's devices that hold a chunk.
func (t *tour) holders(p api.Placement) []*device {
	var out []*device
	for _, h := range p.Holders {
		if i := slices.IndexFunc(t.devices, func(d *device) bool { return d.id == string(h.Device) }); i >= 0 {
			out = append(out, t.devices[i])
		}
	}
	return out
}
