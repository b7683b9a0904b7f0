package jobs

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

// queue lets jobs be at work as far as slots, memory and the owner's policy go:
// of those that wait the one with the highest rank, and among equals the oldest.
// That one is waited for: a small job does not overtake a large one.
type queue struct {
	mu       sync.Mutex
	slots    int
	most     int64 // bytes that all that run may take; 0: no bound
	decision policy.Decision
	running  int
	memory   int64 // bytes
	waiting  []*ticket
}

// ticket is a job's place in the queue.
type ticket struct {
	rank   int
	order  string // ids sort by age
	memory int64  // bytes that it may take: first what compiling may, then the job's limit
	turn   chan struct{}
	why    *wire.Problem // why it waits
	news   chan struct{} // capacity 1: why has changed
}

// enter waits for a turn, and calls tell with why as often as that changes.
// Without an error, the caller owes a leave.
func (q *queue) enter(ctx context.Context, t *ticket, tell func(why *wire.Problem)) error {
	t.turn, t.news = make(chan struct{}), make(chan struct{}, 1)
	q.mu.Lock()
	at, _ := slices.BinarySearchFunc(q.waiting, t, func(a, b *ticket) int {
		return cmp.Or(cmp.Compare(b.rank, a.rank), cmp.Compare(a.order, b.order))
	})
	q.waiting = slices.Insert(q.waiting, at, t)
	q.admit()
	q.mu.Unlock()
	for {
		select {
		case <-t.turn:
			return nil
		default:
		}
		select {
		case <-t.turn:
			return nil
		case <-t.news:
			q.mu.Lock()
			why := t.why
			q.mu.Unlock()
			if why != nil {
				tell(why)
			}
		case <-ctx.Done():
			q.giveUp(t)
			return context.Cause(ctx)
		}
	}
}

func (q *queue) giveUp(t *ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.waiting, t); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	} else { // its turn came in the same moment
		q.running--
		q.memory -= t.memory
	}
	q.admit()
}

func (q *queue) leave(t *ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running--
	q.memory -= t.memory
	q.admit()
}

// needs changes what a job that is at work may take.
func (q *queue) needs(t *ticket, memory int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.memory += memory - t.memory
	t.memory = memory
	q.admit()
}

// allow changes what there is room for; what is at work goes on.
func (q *queue) allow(p policy.Policy) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.slots, q.most = p.Slots, p.Memory
	q.admit()
}

// decide changes whether jobs may begin at all.
func (q *queue) decide(d policy.Decision) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.decision = d
	q.admit()
}

func (q *queue) counts() (running, waiting int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.running, len(q.waiting)
}

// admit gives turns while there are any, and tells the others why not. q.mu is held.
func (q *queue) admit() {
	for len(q.waiting) > 0 {
		t := q.waiting[0]
		why := q.obstacle(t)
		if why != nil {
			q.explain(why)
			return
		}
		q.running++
		q.memory += t.memory
		q.waiting = slices.Delete(q.waiting, 0, 1)
		close(t.turn)
	}
}

// obstacle is why the first may not begin. q.mu is held.
func (q *queue) obstacle(t *ticket) *wire.Problem {
	switch {
	case !q.decision.Run || !q.decision.Begin:
		return waits(q.decision)
	case q.running >= q.slots:
		return &wire.Problem{State: wire.Rejected, Code: policy.CodeSlots, Reason: "other jobs are at work on this device; it waits for its turn"}
	case q.most > 0 && q.running > 0 && q.memory+t.memory > q.most:
		return &wire.Problem{State: wire.Rejected, Code: policy.CodeMemory, Reason: "other jobs have the memory that the owner of this device gives to jobs; it waits for theirs"}
	}
	return nil
}

// explain notes why nobody begins. q.mu is held.
func (q *queue) explain(why *wire.Problem) {
	for _, t := range q.waiting {
		if t.why != nil && t.why.Code == why.Code && t.why.Reason == why.Reason {
			continue
		}
		t.why = why
		select {
		case t.news <- struct{}{}:
		default:
		}
	}
}

// waits is a decision as a report says it.
func waits(d policy.Decision) *wire.Problem {
	p := &wire.Problem{State: wire.Rejected, Code: d.Code, Reason: d.Reason}
	if !d.Until.IsZero() {
		p.After = max(time.Until(d.Until), time.Second)
	}
	return p
}
