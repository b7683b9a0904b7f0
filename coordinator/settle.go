package coordinator

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// settler brings what is known of devices up to date, one device after the other.
// What fails is found again by the next sweep, or the next heartbeat.
type settler struct {
	what   string                                     // is brought up to date, for the log
	settle func(context.Context, wire.DeviceID) error // can be run at any time
	sweep  func()                                     // touches the devices that wait for an end, for all that is known here
	log    *slog.Logger

	mu    sync.Mutex
	dirty map[wire.DeviceID]bool
	wake  chan struct{} // capacity 1: there is something dirty
}

const settleSweep = time.Minute

func newSettler(what string, log *slog.Logger) *settler {
	return &settler{what: what, log: log, dirty: make(map[wire.DeviceID]bool), wake: make(chan struct{}, 1)}
}

// touch has a device settled soon.
func (s *settler) touch(id wire.DeviceID) {
	s.mu.Lock()
	s.dirty[id] = true
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run settles what was touched until ctx ends.
func (s *settler) run(ctx context.Context) {
	t := time.NewTicker(settleSweep)
	defer t.Stop()
	s.sweep()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			s.sweep()
			continue
		case <-s.wake:
		}
		s.mu.Lock()
		todo := s.dirty
		s.dirty = make(map[wire.DeviceID]bool)
		s.mu.Unlock()
		for id := range todo {
			err := s.settle(ctx, id)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				s.log.Warn("the "+s.what+" of devices cannot be brought up to date; it will be tried again", "device", id, "left", len(todo), "error", err)
				break // the state store failed: the others would fail alike
			}
			delete(todo, id)
		}
	}
}
