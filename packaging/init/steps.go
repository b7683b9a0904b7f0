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
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				done <- fmt.Errorf("a mistake in this program: %v; at %s", r, place())
			}
		}()
		done <- do(ctx)
	}()
	var err error
	select {
	case err = <-done:
	case <-time.After(limit + time.Second): // what honours its context says more
		err = errLimit
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

func place() string {
	stack := debug.Stack()
	return string(stack[:min(len(stack), 1500)])
}
