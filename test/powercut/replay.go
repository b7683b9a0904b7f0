package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/packaging/qemu"
)

// failure is a cut that something did not survive.
type failure struct {
	cut
	how  string // what was left of the pending changes
	note string // what was last noted before
	err  error
}

func (f failure) String() string {
	return fmt.Sprintf("cut %s (%s; after: %s): %v", f.cut, f.how, f.note, f.err)
}

// outcome is what came of a replay.
type outcome struct {
	points   int
	failures []failure
	boots    map[string]int // firmware → points at which it would boot
	repaired int            // points at which the journal of the file system was not enough
}

// maxFailures ends a replay: the next ones would say the same.
const maxFailures = 5

// replay makes each of these cuts, in the order of the record, and checks it. Each
// worker has a stretch of the record.
func replay(ctx context.Context, rec *recording, cuts []cut, workers int) (outcome, error) {
	total := outcome{boots: map[string]int{}}
	var mu sync.Mutex // guards total and err
	var failed error
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for w := range workers {
		from, to := spread(0, len(cuts), w, workers)
		wg.Go(func() {
			repaired, err := replayPart(ctx, rec, cuts[from:to], func(boots string, f *failure) {
				mu.Lock()
				defer mu.Unlock()
				if total.points++; total.points%1000 == 0 {
					fmt.Printf("       %d of %d cuts\n", total.points, len(cuts))
				}
				if boots != "" {
					total.boots[boots]++
				}
				if f != nil {
					if total.failures = append(total.failures, *f); len(total.failures) >= maxFailures {
						stop()
					}
				}
			})
			mu.Lock()
			defer mu.Unlock()
			total.repaired += repaired
			if err != nil {
				failed = errors.Join(failed, err)
				stop()
			}
		})
	}
	wg.Wait()
	return total, failed
}

func replayPart(ctx context.Context, rec *recording, cuts []cut, each func(boots string, f *failure)) (repaired int, err error) {
	if len(cuts) == 0 {
		return 0, nil
	}
	d, err := newDisk(rec)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	k := &checker{rec: rec}
	p, seen, lastNote := newPromises(), 0, "power on"
	for _, c := range cuts {
		if ctx.Err() != nil {
			return d.repaired, nil
		}
		for ; seen < c.At; seen++ {
			if e := rec.events[seen]; e.Mark != nil {
				p.take(*e.Mark)
			} else if e.Note != "" {
				lastNote = e.Note
			}
		}
		if err := d.advance(c.At); err != nil {
			return d.repaired, err
		}
		how, esp, err := d.cut(c.Seed)
		if err != nil {
			return d.repaired, err
		}
		boots, err := k.check(d, esp, p)
		if err != nil {
			each(boots, &failure{c, how, lastNote, err})
		} else {
			each(boots, nil)
		}
		if err := d.restore(); err != nil {
			return d.repaired, err
		}
	}
	return d.repaired, nil
}

// makeDisk leaves the disk of one cut at path, for a look or a boot.
func makeDisk(rec *recording, c cut, path string) (how string, err error) {
	d, err := newDisk(rec)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.advance(c.At); err != nil {
		return "", err
	}
	if how, _, err = d.cut(c.Seed); err != nil {
		return "", err
	}
	return how, qemu.CopyDisk(d.work.Name(), path, rec.Size)
}

// sinceNow is a duration for people.
func sinceNow(t time.Time) string { return fmt.Sprintf("%.0f s", time.Since(t).Seconds()) }
