package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

// outcome is what came of a replay.
type outcome struct {
	blocks.Outcome
	boots map[string]int // firmware → points at which it would boot
}

// replay makes each of these cuts, in the order of the record, and checks it.
func replay(ctx context.Context, rec *recording, cuts []blocks.Cut, workers int) (outcome, error) {
	var mu sync.Mutex // guards out.boots
	out := outcome{boots: map[string]int{}}
	var err error
	out.Outcome, err = blocks.Replay(ctx, rec.Recording, cuts, workers, func(d *blocks.Disk) blocks.Checker {
		d.Quiet = blocks.Region{From: espStart, To: espEnd}
		return &following{checker: checker{rec: rec}, promises: newPromises(), boots: func(firmware string) {
			mu.Lock()
			defer mu.Unlock()
			out.boots[firmware]++
		}}
	})
	return out, err
}

// following is a checker that keeps what was promised up to each cut.
type following struct {
	checker
	promises
	boots func(firmware string)
}

func (f *following) Pass(e blocks.Event) error { return f.promises.pass(e) }

func (f *following) Check(d *blocks.Disk, _ blocks.Cut, esp bool) error {
	boots, err := f.checker.check(d, esp, f.promises)
	if boots != "" {
		f.boots(boots)
	}
	return err
}

// sinceNow is a duration for people.
func sinceNow(t time.Time) string { return fmt.Sprintf("%.0f s", time.Since(t).Seconds()) }
