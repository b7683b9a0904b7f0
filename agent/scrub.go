package agent

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/disk"
	"github.com/deimos-edge/deimos/hw/health"
	"github.com/deimos-edge/deimos/sync/orders"
	"github.com/deimos-edge/deimos/sync/scrub"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
)

// ScrubConfig is how the owner has chunks verified, see sync/scrub. What the file
// states is a limit for the fleet: it may have them verified more seldom and
// more slowly.
type ScrubConfig struct {
	Days float64 `toml:"days"`                 // in which everything is read; 0: 21
	Rate int64   `toml:"max_bytes_per_second"` // of one disk; 0: 32 MiB
}

// orDefault has no zeros.
func (c ScrubConfig) orDefault() ScrubConfig {
	if c.Days <= 0 {
		c.Days = scrub.DefaultPeriod.Hours() / 24
	}
	if c.Rate <= 0 {
		c.Rate = scrub.DefaultRate
	}
	return c
}

func (c ScrubConfig) pace() scrub.Pace {
	const longest = 100 * 365 // days
	return scrub.Pace{Period: time.Duration(min(c.Days, longest) * 24 * float64(time.Hour)), Rate: c.Rate}
}

// scrubs has every volume scrubbed, and keeps in mind what is lost.
type scrubs struct {
	*scrub.Scrubber
	working atomic.Int64 // orders about chunks that are under way

	mu     sync.Mutex
	digest string
	count  int       // of losses, by the volumes' figures, when that was made
	made   time.Time // by the monotonic clock
}

func (a *Agent) newScrubs(pace scrub.Pace) *scrubs {
	s := &scrubs{}
	s.Scrubber = scrub.New(pace, scrub.Options{
		Idle: s, Now: a.clock.Now, Log: a.log,
		Late: func(dir string, late bool, why string) { a.hw.health.Is(health.ScrubLate, dir, late, why) },
	})
	return s
}

// Idle is [scrub.Idleness].
func (s *scrubs) Idle() bool { return s.working.Load() == 0 }

// busy is told when an order arrives (1) and when it has ended (-1).
func (s *scrubs) busy(k wire.Kind, by int) {
	switch k {
	case wire.KindChunkStore, wire.KindChunkServe, wire.KindChunkDrop, wire.KindAudit:
		s.working.Add(int64(by))
	}
}

// scrub has each volume scrubbed from when it is open until ctx ends.
func (a *Agent) scrub(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	known := make(map[*store.Volume]bool)
	for {
		for _, v := range a.chunks.Volumes() {
			if !known[v] {
				known[v] = true
				on := disk.Of(a.hw.inventory().Inventory, v.Dir()) // those of which it is not known take turns
				wg.Go(func() { a.scrubs.Run(ctx, v, on) })
			}
		}
		if rest(ctx, reopenEvery) != nil {
			return
		}
	}
}

// digestEvery is how old the digest of losses may be while there are any.
const digestEvery = time.Minute

// feelLosses brings the digest up to date, with each sample. Who sends it must
// not wait for a disk.
func (a *Agent) feelLosses(count int, losses func() []wire.ChunkLoss) {
	s := a.scrubs
	s.mu.Lock()
	fresh := count == s.count && (count == 0 || time.Since(s.made) < digestEvery)
	s.mu.Unlock()
	if fresh {
		return
	}
	digest, ok := hw.Within(context.Background(), statLimit, "losses", func() string { return orders.DigestOf(losses()) })
	if !ok {
		return // with the next sample, perhaps
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.digest, s.count, s.made = digest, count, time.Now()
}

// losses is the digest of what is lost.
func (s *scrubs) losses() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.digest
}

// told is how far the scrubs are, for a heartbeat.
func (s *scrubs) told() []wire.Scrub {
	all := s.Progress()
	slices.SortStableFunc(all, func(a, b wire.Scrub) int { return a.Began.Compare(b.Began) }) // the latest first
	return all[:min(len(all), wire.MaxScrubs)]
}
