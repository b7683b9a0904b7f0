package orders

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"
)

// budget is the memory that chunks under way may hold, in bytes. What does not
// fit waits: first a priority that holds nothing by now, so that none starves, then
// the lowest number of priority, then who came first; and nobody overtakes who is
// first in line. So no number of orders makes the agent grow.
//
// A disk that hangs keeps the chunks it was given, also when their orders have
// ended. They are parked: they count until no disk hangs any more.
type budget struct {
	hangs func() bool // whether a disk may still hold what was parked
	check time.Duration

	mu      sync.Mutex
	free    int64
	held    map[int]int64 // by priority, without what is parked
	parked  int64
	waiting []*waiter // by priority, then age
}

type waiter struct {
	bytes    int64
	priority int
	granted  chan struct{} // closed when it has them
}

// parkedCheck is how often who waits looks whether what is parked is free again.
const parkedCheck = 5 * time.Second

func newBudget(bytes int64, hangs func() bool) *budget {
	return &budget{hangs: hangs, check: parkedCheck, free: bytes, held: make(map[int]int64)}
}

// acquire waits for n bytes, which must not be more than all.
func (b *budget) acquire(ctx context.Context, n int64, priority int) error {
	b.unpark()
	w := &waiter{n, priority, make(chan struct{})}
	b.mu.Lock()
	at, _ := slices.BinarySearchFunc(b.waiting, priority+1, func(w *waiter, p int) int { return cmp.Compare(w.priority, p) })
	b.waiting = slices.Insert(b.waiting, at, w)
	b.grant()
	b.mu.Unlock()
	look := time.NewTicker(b.check)
	defer look.Stop()
	for {
		select {
		case <-w.granted:
			return nil
		case <-look.C:
			b.unpark()
		case <-ctx.Done():
			b.leave(w)
			return context.Cause(ctx)
		}
	}
}

// leave gives up waiting, or what was granted meanwhile.
func (b *budget) leave(w *waiter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := slices.Index(b.waiting, w); i >= 0 {
		b.waiting = slices.Delete(b.waiting, i, i+1)
	} else {
		b.free += w.bytes
		b.held[w.priority] -= w.bytes
	}
	b.grant()
}

// release gives n bytes back that were acquired with this priority.
func (b *budget) release(n int64, priority int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	b.held[priority] -= n
	b.grant()
}

// grant serves who is first in line as long as there is enough. mu is held.
func (b *budget) grant() {
	for len(b.waiting) > 0 {
		first := max(0, slices.IndexFunc(b.waiting, func(w *waiter) bool { return b.held[w.priority] == 0 }))
		w := b.waiting[first]
		if w.bytes > b.free {
			return
		}
		b.free -= w.bytes
		b.held[w.priority] += w.bytes
		close(w.granted)
		b.waiting = slices.Delete(b.waiting, first, first+1)
	}
}

// park keeps n bytes, which were acquired with this priority, taken until no disk
// hangs.
func (b *budget) park(n int64, priority int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.parked += n
	b.held[priority] -= n
	b.grant()
}

func (b *budget) unpark() {
	b.mu.Lock()
	parked := b.parked
	b.mu.Unlock()
	if parked == 0 || b.hangs() {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	parked = min(parked, b.parked) // what was parked since may hang still
	b.parked -= parked
	b.free += parked
	b.grant()
}
