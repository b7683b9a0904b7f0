package hw

import (
	"context"
	"errors"
	"sync"
	"time"
)

var errTimeout = errors.New("did not answer in time; if this stays so, the device or its cable is failing")

// hung counts, by name, the readings that were given up on and have not come back.
var hung = struct {
	sync.Mutex
	names map[string]int
}{names: map[string]int{}}

// within runs read, which may hang in the kernel, and waits for it until limit
// or the end of ctx. name is unique to what is read. The goroutine of a reading
// that hangs ends when the kernel lets go of it; until then the same name is
// answered with errTimeout at once, so that stuck threads do not pile up.
// read must share nothing with its caller but its result.
func within[T any](ctx context.Context, limit time.Duration, name string, read func() T) (T, error) {
	var none T
	hung.Lock()
	stuck := hung.names[name] > 0
	hung.Unlock()
	if stuck || ctx.Err() != nil {
		return none, errTimeout
	}

	done := make(chan T, 1)
	finished, abandoned := false, false // guarded by hung
	go func() {
		v := read()
		hung.Lock()
		defer hung.Unlock()
		finished = true
		done <- v
		if abandoned {
			if hung.names[name]--; hung.names[name] == 0 {
				delete(hung.names, name)
			}
		}
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case v := <-done:
		return v, nil
	case <-timer.C:
	case <-ctx.Done():
	}
	hung.Lock()
	defer hung.Unlock()
	if finished {
		return <-done, nil
	}
	abandoned = true
	hung.names[name]++
	return none, errTimeout
}

// Within is within for the rooms below: it waits for read until limit or the
// end of ctx. ok is false if it did not answer, and at once if an earlier
// reading of the same name has still not come back.
func Within[T any](ctx context.Context, limit time.Duration, name string, read func() T) (v T, ok bool) {
	v, err := within(ctx, limit, name, read)
	return v, err == nil
}
