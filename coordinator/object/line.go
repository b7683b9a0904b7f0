package object

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// line is the way to the coordinator while a transfer is under way. A transfer of
// hours meets a coordinator, a router or a device that starts anew: what fails for
// that is tried again, until nothing has succeeded for outageLife.
type line struct {
	mu   sync.Mutex
	down time.Time // since when; zero: it is not

	begun atomic.Bool // something has been placed, or has come
}

var (
	outageLife  = 2 * time.Minute
	outageFirst = time.Second // until the first try; each further one takes twice as long
)

const outageMost = 10 * time.Second

// do calls f until it succeeds, or fails for a reason that does not pass.
func (l *line) do(ctx context.Context, passes func(error) bool, f func() error) error {
	for wait := outageFirst; ; wait = min(2*wait, outageMost) {
		err := f()
		if !l.again(err != nil && ctx.Err() == nil && passes(err)) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *line) again(down bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case !down:
		l.down = time.Time{}
		return false
	case l.down.IsZero():
		l.down = time.Now()
	}
	return time.Since(l.down) < outageLife
}

// interrupted tells whether an error is one of the line, or of a coordinator that
// is not there or crowded.
func interrupted(err error) bool {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Status == http.StatusTooManyRequests
	}
	for _, of := range []error{api.ErrUnreachable, api.ErrStalled, net.ErrClosed, io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, of) {
			return true
		}
	}
	return false
}

// passes tells whether an error of a put may pass: once there were devices enough, one
// that is missing may only be starting anew.
func (l *line) passes(err error) bool { return interrupted(err) || l.begun.Load() && tooFew(err) }

// tooFew tells whether devices are missing.
func tooFew(err error) bool {
	var e *api.Error
	return errors.As(err, &e) && e.Code == "too_few_devices"
}

// away tells whether a chunk cannot be read only for now: a coordinator that has just
// started knows no device to be online yet. Of a device that rests for its owner nothing
// is expected within minutes.
func away(err error) bool {
	var e *api.Error
	return errors.As(err, &e) && slices.Contains([]string{"no_holder_online", "offline", "stopping", wire.CodeBusy}, e.Code)
}

// over is f as [line.do] takes it, and its result.
func over[T any](ctx context.Context, l *line, passes func(error) bool, f func() (T, error)) (out T, err error) {
	err = l.do(ctx, passes, func() (err error) {
		out, err = f()
		return err
	})
	return out, err
}
