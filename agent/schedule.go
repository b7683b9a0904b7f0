package agent

import (
	"container/heap"
	"context"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// scheduler decides which of the waiting orders begins next: of those that may,
// the one with the lowest [wire.Kind.Priority], and among equals the oldest
// (ids are ULIDs, which sort by age). One may begin if
//
//   - fewer than AtOnce orders of its kind run, and
//   - it is no I/O (a long one, see [Route.Long]), or nothing of its kind runs, or
//     fewer I/O orders run than its priority may see: see placesFor. So each kind
//     has a place of its own: no flood keeps another kind waiting, neither an urgent
//     one nor one that is below it all the time. Beyond that place, the lower a
//     priority, the fewer it sees: while much of a higher priority is to be done, a
//     lower one goes one at a time.
//
// Orders of priority 0 take no place. They begin at once, unless their kind has
// a bound of its own. Jobs are long and take no place either: they are bounded
// by the owner's slots.
//
// It is not safe for use by several goroutines: the dispatcher's mutex guards it.
type scheduler struct {
	kinds map[wire.Kind]*lane
	io    int // places taken
}

// placesFor is how many I/O orders there may be with one of this priority that
// begins beside others of its kind: 4 for chunks that come in and for extensions,
// and one more or two for each priority above.
var placesFor = [...]int{1: 8, 2: 7, 3: 6, 4: 4, 5: 4}

// lane is one kind's share of the scheduler.
type lane struct {
	route    Route
	priority int
	running  int
	waiting  taskQueue
}

func newScheduler(routes map[wire.Kind]Route) *scheduler {
	s := &scheduler{kinds: make(map[wire.Kind]*lane, len(routes))}
	for k, r := range routes {
		if k.Priority() > 0 {
			r.AtOnce = max(1, r.AtOnce)
		}
		s.kinds[k] = &lane{route: r, priority: k.Priority()}
	}
	return s
}

func (l *lane) takesPlace() bool { return l.priority > 0 && !l.route.Long }

func (s *scheduler) add(t *task) { heap.Push(&s.kinds[t.order.Kind].waiting, t) }

// remove takes an order back that has not begun; false if it has.
func (s *scheduler) remove(t *task) bool {
	if t.place < 0 {
		return false
	}
	heap.Remove(&s.kinds[t.order.Kind].waiting, t.place)
	return true
}

// next takes the order that is to begin now; nil if there is none.
func (s *scheduler) next() *task {
	var best *lane
	for _, l := range s.kinds {
		if len(l.waiting) > 0 && s.mayBegin(l) && (best == nil || l.before(best)) {
			best = l
		}
	}
	if best == nil {
		return nil
	}
	best.running++
	if best.takesPlace() {
		s.io++
	}
	return heap.Pop(&best.waiting).(*task)
}

func (s *scheduler) mayBegin(l *lane) bool {
	if l.route.AtOnce > 0 && l.running >= l.route.AtOnce {
		return false
	}
	return !l.takesPlace() || l.running == 0 || s.io < placesFor[l.priority]
}

func (l *lane) before(other *lane) bool {
	if l.priority != other.priority {
		return l.priority < other.priority
	}
	return l.waiting[0].order.ID < other.waiting[0].order.ID
}

// ended gives the place of an order back that next took.
func (s *scheduler) ended(k wire.Kind) {
	l := s.kinds[k]
	l.running--
	if l.takesPlace() {
		s.io--
	}
}

// task is an order that is under way: it waits, runs, or is being reported on.
// The dispatcher's mutex guards what changes.
type task struct {
	order wire.Order
	raw   []byte // its envelope
	// ctx ends with the agent, or with the order's cancellation as its cause.
	ctx    context.Context
	cancel context.CancelCauseFunc
	agent  context.Context // ends with the agent alone
	// unwatch stops what takes the order back if it expires or is canceled while
	// it waits.
	unwatch func()
	class   class
	// again says that a former life, or an earlier arrival in this one, has begun
	// it, and there is no report.
	again bool
	place int           // in its lane; -1: not there
	done  chan struct{} // closed when it is no longer under way

	last wire.Report // for who asks again
	said time.Time   // when a report was last sent
	hush *time.Timer // sends last when it is time; nil if it waits for nothing
}

// taskQueue is ordered by age.
type taskQueue []*task

func (q taskQueue) Len() int           { return len(q) }
func (q taskQueue) Less(i, j int) bool { return q[i].order.ID < q[j].order.ID }
func (q taskQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i, j
}

func (q *taskQueue) Push(x any) {
	x.(*task).place = len(*q)
	*q = append(*q, x.(*task))
}

func (q *taskQueue) Pop() any {
	old := *q
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	last.place = -1
	return last
}
