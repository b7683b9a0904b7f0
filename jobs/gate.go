package jobs

import (
	"context"
	"slices"
	"sync"
)

// gate lets a number of jobs be at work, in the order in which they came. The
// number can change at any time: what is at work goes on.
type gate struct {
	mu    sync.Mutex
	limit int
	busy  int
	queue []chan struct{} // closed when it is that one's turn
}

// enter waits for a turn. Without an error, the caller owes a leave.
func (g *gate) enter(ctx context.Context) error {
	turn := make(chan struct{})
	g.mu.Lock()
	g.queue = append(g.queue, turn)
	g.admit()
	g.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(g.queue, turn); i >= 0 {
		g.queue = slices.Delete(g.queue, i, i+1)
	} else { // its turn came in the same moment
		g.busy--
		g.admit()
	}
	return context.Cause(ctx)
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy--
	g.admit()
}

func (g *gate) resize(limit int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limit = limit
	g.admit()
}

// admit gives turns while there are any. g.mu is held.
func (g *gate) admit() {
	for g.busy < g.limit && len(g.queue) > 0 {
		g.busy++
		close(g.queue[0])
		g.queue = g.queue[1:]
	}
}
