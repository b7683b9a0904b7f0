package coordinator

import (
	"errors"
	"sync/atomic"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

var errStoreAway = errors.New("the store is away for a moment")

// The end of a task that could not be written once is written later, not after the next start.
func TestAnEndThatCouldNotBeWrittenIsWrittenLater(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	w.device(t)
	w.putFile(t, "in", someBytes(5000), 1)
	write, failed := w.jobs.tasks.write, atomic.Bool{}
	w.jobs.tasks.write = func(v taskRow) ([]byte, error) {
		if v.State.Terminal() && failed.CompareAndSwap(false, true) {
			return nil, errStoreAway
		}
		return write(v)
	}
	if _, err := w.op.RunJob(testContext(t), input(w.module(t), "in")); err != nil || !failed.Load() {
		t.Errorf("%v; a write failed: %v", err, failed.Load())
	}
}

// An order that could not be made is its device's fault as little as the task's.
func TestAnOrderThatCouldNotBeMadeIsMadeAnew(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	w.device(t)
	w.putFile(t, "in", someBytes(5000), 1)
	write, failed := w.outbox.rows.write, atomic.Bool{}
	w.outbox.rows.write = func(v orderRow) ([]byte, error) {
		if v.Kind == wire.KindJobRun && failed.CompareAndSwap(false, true) {
			return nil, errStoreAway
		}
		return write(v)
	}
	q := input(w.module(t), "in")
	q.Retries = -1
	r, err := w.op.RunJob(testContext(t), q)
	if err != nil || !failed.Load() || len(r.Attempts) != 2 || r.Attempts[0].Code != wire.CodeInterrupted {
		t.Errorf("%v; a write failed: %v; attempts %+v", err, failed.Load(), r.Attempts)
	}
}

// A row that was written though the answer said otherwise is gone on from.
func TestARowThatWasWrittenAllTheSameIsFound(t *testing.T) {
	t.Parallel()
	w := jobWorld(t)
	ctx, key := testContext(t), taskKey("job", 0)
	has := func(want bool) {
		t.Helper()
		if _, made, err := w.jobs.written(ctx, key, "order", errStoreAway); made != want || (err == nil) != want {
			t.Errorf("it is there: %v %v", made, err)
		}
	}
	has(false)
	_, err := w.jobs.tasks.change(ctx, key, func(t *taskRow, _ bool) error {
		t.Attempts = []api.JobAttempt{{Order: "another"}}
		return nil
	})
	must(t, err)
	has(false)
	_, err = w.jobs.tasks.change(ctx, key, func(t *taskRow, _ bool) error {
		t.Attempts = append(t.Attempts, api.JobAttempt{Order: "order"})
		return nil
	})
	must(t, err)
	has(true)
}
