package object

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// latecomers remembers from stripe to stripe which devices were late, so that each is waited
// for once and not in every stripe. The zero value knows of none. Where the chunks are
// is asked for when something is late for the first time.
type latecomers struct {
	mu      sync.Mutex               // guards the rest
	asked   bool                     // where the chunks are
	holder  map[string]wire.DeviceID // chunk → the only device that holds it, when it is known
	unknown []string                 // chunks that were late before it was
	until   map[wire.DeviceID]time.Time
}

// slowRest is for how long a device that was late is asked only where there are not
// enough others; then it may have become quicker.
const slowRest = 30 * time.Second

// late notes that a chunk has not come in time.
func (s *latecomers) late(ctx context.Context, r *reader, chunk string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holder == nil {
		s.unknown = append(s.unknown, chunk)
		if !s.asked {
			s.asked = true
			r.running.Go(func() { s.learn(r.placements(ctx)) })
		}
		return
	}
	s.note(chunk)
}

// learn takes in where the chunks are. Without that nobody is known to be slow.
func (s *latecomers) learn(placed []api.Placement) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if placed == nil {
		s.asked, s.unknown = false, nil
		return
	}
	s.holder, s.until = make(map[string]wire.DeviceID, len(placed)), make(map[wire.DeviceID]time.Time)
	for _, p := range placed {
		left := slices.DeleteFunc(slices.Clone(p.Holders), func(h api.Holder) bool { return h.Lost })
		if len(left) == 1 { // of several nobody knows which one was asked
			s.holder[p.Chunk.ID] = left[0].Device
		}
	}
	for _, chunk := range s.unknown {
		s.note(chunk)
	}
	s.unknown = nil
}

// note is late for a chunk whose place is known; mu is held.
func (s *latecomers) note(chunk string) {
	if d, ok := s.holder[chunk]; ok {
		s.until[d] = time.Now().Add(slowRest)
	}
}

// onTime notes that a chunk has come as soon as others do.
func (s *latecomers) onTime(chunk string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.until, s.holder[chunk])
}

// rests tells whether a chunk is on a device that was late.
func (s *latecomers) rests(chunk string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.until[s.holder[chunk]])
}

// placements are where the chunks of the object are; nil if that cannot be told.
func (r *reader) placements(ctx context.Context) []api.Placement {
	placed, err := r.client.ObjectPlacements(ctx, r.object.Name)
	if err != nil {
		return nil
	}
	return placed
}
