package blocks

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/packaging/qemu"
)

// Failure is a cut that something did not survive.
type Failure struct {
	Cut
	how  string // what was left of the pending changes
	note string // what was last noted before
	err  error
}

func (f Failure) String() string {
	return fmt.Sprintf("cut %s (%s; after: %s): %v", f.Cut, f.how, f.note, f.err)
}

// Outcome is what came of a replay.
type Outcome struct {
	Points   int
	Failures []Failure
	Repaired int // points at which the journal of the file system was not enough
	Took     time.Duration
}

// Err is what was not as it must be.
func (o Outcome) Err() (err error) {
	for _, f := range o.Failures {
		err = errors.Join(err, errors.New(f.String()))
	}
	return err
}

// maxFailures ends a replay: the next ones would say the same.
const maxFailures = 5

// Checker looks at disks after a cut. It may write to d.Work. Each has a stretch of
// the record: its cuts come in order.
type Checker interface {
	// Pass is told of each event before the next cut.
	Pass(e Event) error
	// Check says in a sentence what is not as it must be; quiet as of [Disk.Cut].
	Check(d *Disk, c Cut, quiet bool) error
}

// Workers are as many as pay.
func Workers() int { return min(runtime.NumCPU(), 4) }

// Replay makes each of these cuts, in the order of the record, and has it checked, by
// several checkers at once; open makes one for a disk. It fails if not all cuts could
// be made, unless enough of them have failed.
func Replay(ctx context.Context, rec *Recording, cuts []Cut, workers int, open func(d *Disk) Checker) (Outcome, error) {
	began := time.Now()
	var total Outcome
	var mu sync.Mutex // guards total and failed
	var failed error
	inner, stop := context.WithCancel(ctx)
	defer stop()
	each := func(f *Failure) {
		mu.Lock()
		defer mu.Unlock()
		if total.Points++; total.Points%1000 == 0 {
			fmt.Printf("       %d of %d cuts\n", total.Points, len(cuts))
		}
		if f != nil {
			if total.Failures = append(total.Failures, *f); len(total.Failures) >= maxFailures {
				stop()
			}
		}
	}
	var wg sync.WaitGroup
	for w := range workers {
		from, to := Spread(0, len(cuts), w, workers)
		wg.Go(func() {
			repaired, err := replayPart(inner, rec, cuts[from:to], open, each)
			mu.Lock()
			defer mu.Unlock()
			total.Repaired += repaired
			if err != nil {
				failed = errors.Join(failed, err)
				stop()
			}
		})
	}
	wg.Wait()
	total.Took = time.Since(began)
	if failed == nil && total.Points < len(cuts) && len(total.Failures) == 0 {
		failed = fmt.Errorf("only %d of %d cuts were made: %w", total.Points, len(cuts), context.Cause(ctx))
	}
	return total, failed
}

func replayPart(ctx context.Context, rec *Recording, cuts []Cut, open func(*Disk) Checker, each func(*Failure)) (repaired int, err error) {
	if len(cuts) == 0 {
		return 0, nil
	}
	d, err := NewDisk(rec)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	k := open(d)
	seen, lastNote := 0, "power on"
	for _, c := range cuts {
		if ctx.Err() != nil {
			return d.repaired, nil
		}
		for ; seen < c.At; seen++ {
			e := rec.Events[seen]
			if e.Note != "" {
				lastNote = e.Note
			}
			if err := k.Pass(e); err != nil {
				return d.repaired, err
			}
		}
		if err := d.Advance(c.At); err != nil {
			return d.repaired, err
		}
		how, quiet, err := d.Cut(c.Seed)
		if err != nil {
			return d.repaired, err
		}
		var f *Failure
		if err := k.Check(d, c, quiet); err != nil {
			f = &Failure{c, how, lastNote, err}
		}
		each(f)
		if err := d.Restore(); err != nil {
			return d.repaired, err
		}
	}
	return d.repaired, nil
}

// MakeDisk leaves the disk of one cut at path, for a look or a boot.
func MakeDisk(rec *Recording, c Cut, path string) (how string, err error) {
	d, err := NewDisk(rec)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := d.Advance(c.At); err != nil {
		return "", err
	}
	if how, _, err = d.Cut(c.Seed); err != nil {
		return "", err
	}
	return how, qemu.CopyDisk(d.Work.Name(), path, rec.size)
}
