package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"
)

var errLimit = errors.New("it takes too long; the rest goes on without it")

// step does one thing, within a limit, and says what became of it. Whatever it
// does, hang or panic included, it does not end process 1. One that hangs is left
// behind: what it still does must do no harm later.
func step(log *slog.Logger, name string, limit time.Duration, do func(context.Context) error) error {
	return stepWhile(log, name, limit, func(ctx context.Context, _ func()) error { return do(ctx) })
}

// stepWhile is a step whose limit begins anew with each call of moved.
func stepWhile(log *slog.Logger, name string, limit time.Duration, do func(ctx context.Context, moved func()) error) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	last := time.AfterFunc(limit, func() { cancel(errLimit) })
	defer last.Stop()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				done <- fmt.Errorf("a mistake in this program: %v; at %s", r, place())
			}
		}()
		done <- do(ctx, func() { last.Reset(limit) })
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		select {
		case err = <-done: // what honours its context says more
		case <-time.After(time.Second):
			err = errLimit
		}
	}
	if err != nil {
		log.Error(name+" failed", "error", err)
	}
	return err
}

// guard keeps a mistake in one goroutine from ending process 1, and with it the machine.
func guard(log *slog.Logger, name string, do func()) {
	defer func() {
		if r := recover(); r != nil {
			log.Error("a mistake in this program ended one of its parts", "part", name, "mistake", fmt.Sprint(r), "at", place())
		}
	}()
	do()
}

// failedPause keeps a machine that fails at each start from starting without a pause.
const failedPause = time.Minute

// vital does what the machine cannot work without: one that is without it before ctx
// has ended is started anew, after a pause. A watchdog does not see that, as long as
// the agent that feeds it runs, or has never run.
func (m *machine) vital(ctx context.Context, name string, pause time.Duration, do func()) {
	guard(m.log, name, do)
	if sleep(ctx, pause) {
		m.startAnew("process 1 has failed: its part \"" + name + "\" ended")
	}
}

func place() string {
	stack := debug.Stack()
	return string(stack[:min(len(stack), 1500)])
}
