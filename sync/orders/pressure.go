package orders

import (
	"sync"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// pressure is how the disks bear what is written to them, judged by what they do:
// how long the writes under way last by now, how long the last one took, and
// whether a disk has said nothing at all. While they are too slow, new chunks are
// refused before they cost traffic or memory ([wire.CodeBusy]), for as long as a
// chunk takes them.
type pressure struct {
	now func() time.Time

	mu     sync.Mutex
	writes map[*time.Time]bool // when each that is under way has begun
	last   time.Duration       // what the last one took
	ended  time.Time           // when
	silent time.Time           // when a disk was last found not to answer
}

const (
	slowWrite = 5 * time.Second // of one chunk with those before it: at most 16 MiB
	busyLeast = 5 * time.Second
	busyMost  = time.Minute
)

func newPressure() *pressure {
	return &pressure{now: time.Now, writes: make(map[*time.Time]bool)}
}

// begin notes a write, until end is called.
func (p *pressure) begin() (end func() (took time.Duration)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	began := p.now()
	p.writes[&began] = true
	return func() time.Duration {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.writes, &began)
		p.ended = p.now()
		p.last = p.ended.Sub(began)
		return p.last
	}
}

// hung notes that no disk that could take a chunk answers.
func (p *pressure) hung() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent = p.now()
}

// busy is for how long to refuse chunks; 0 if they are welcome.
func (p *pressure) busy() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if left := p.silent.Add(busyMost).Sub(now); !p.silent.IsZero() && left > 0 {
		return left
	}
	var slow time.Duration
	for began := range p.writes {
		slow = max(slow, now.Sub(*began))
	}
	if since := now.Sub(p.ended); since < p.last {
		slow = max(slow, p.last-since)
	}
	if slow < slowWrite {
		return 0
	}
	return min(max(slow, busyLeast), busyMost)
}

// refuse is busy as a problem; nil if chunks are welcome.
func (p *pressure) refuse() error {
	after := p.busy()
	if after == 0 {
		return nil
	}
	return wire.RejectedUntil(after, wire.CodeBusy, "the disks of this device are too slow for more at the moment; ask again in %s", after.Round(time.Second))
}
