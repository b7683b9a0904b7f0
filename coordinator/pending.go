package coordinator

import (
	"cmp"
	"container/heap"
	"math/rand/v2"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// line is the open orders of one device, in the order in which they go out:
// by [wire.Kind.Priority], then those that were tried less often, so that one
// that the device never answers holds up nobody, then by age.
//
// At most window of them are sent and unanswered at once; a report of any kind
// makes room for the next. Each order has one time at which something has to be
// done about it if nothing happens before: it goes out again, or it ends. A
// line's time is the earliest of them, so that a look for what is due costs what
// is due, and a device that comes back costs its own orders.
type line struct {
	device  wire.DeviceID
	orders  map[string]*pending
	waiting places[*pending] // to be sent
	timed   places[*pending] // all, by time
	flying  int              // sent and unanswered
	poll    time.Time        // when to look again whether the device is there, while orders wait
	came    time.Time        // when all went out anew
	owed    time.Time        // when they have to once more; zero: not
	due     time.Time
	place   int
}

// pending is one open order.
type pending struct {
	id      string
	kind    wire.Kind
	expires time.Time
	state   wire.State
	seq     uint64 // of the newest report
	tries   int
	wait    time.Duration // until the next try
	next    time.Time
	flying  bool
	waits   int // place in waiting
	timed   int // place in timed
}

const (
	// window is how many orders a device has to answer at once: some seconds of
	// work, and far from what a small board's queue holds.
	window     = 64
	firstRetry = 3 * time.Second
	lastRetry  = time.Minute
	// silence is how long after its expiry an order waits for a report that is
	// still on its way.
	silence = 30 * time.Second
)

func (p *pending) end() time.Time { return p.expires.Add(silence) }

func newLine(d wire.DeviceID) *line {
	return &line{device: d, orders: make(map[string]*pending),
		waiting: places[*pending]{at: func(p *pending) *int { return &p.waits }, less: func(a, b *pending) bool {
			return cmp.Or(cmp.Compare(a.kind.Priority(), b.kind.Priority()), cmp.Compare(a.tries, b.tries), cmp.Compare(a.id, b.id)) < 0
		}},
		timed: places[*pending]{at: func(p *pending) *int { return &p.timed }, less: func(a, b *pending) bool { return a.next.Before(b.next) }},
	}
}

func (l *line) add(p *pending, now time.Time) {
	l.orders[p.id] = p
	l.rest(p, p.end())
	l.waiting.put(p)
	if l.poll.Before(now) {
		l.poll = now.Add(firstRetry)
	}
}

// rest sets when something is next to be done about an order.
func (l *line) rest(p *pending, until time.Time) {
	if until.After(p.end()) {
		until = p.end()
	}
	p.next = until
	l.timed.put(p)
}

// land takes an order out of the window.
func (l *line) land(p *pending) {
	if p.flying {
		p.flying = false
		l.flying--
	}
}

func (l *line) remove(p *pending) {
	l.land(p)
	l.waiting.drop(p)
	l.timed.drop(p)
	delete(l.orders, p.id)
}

// heard is told of every report that does not end an order. The device has it,
// so it goes out again only when nothing is heard of it for long.
func (l *line) heard(p *pending, now time.Time) {
	l.land(p)
	l.waiting.drop(p)
	p.tries, p.wait = 0, 0
	l.rest(p, now.Add(kindOf(p.kind).quiet))
}

// back is told that the device has just come back.
func (l *line) back(now time.Time) {
	if soon := l.came.Add(firstRetry); now.Before(soon) && !l.came.After(now) {
		l.owed = soon
		return
	}
	l.again(now)
}

// again makes every order go out anew.
func (l *line) again(now time.Time) {
	l.came, l.owed = now, time.Time{}
	for _, p := range l.orders {
		l.land(p)
		p.tries, p.wait = 0, 0
		l.rest(p, p.end())
		l.waiting.put(p)
	}
}

// overdue moves on what the time has come for, and returns the orders that are
// over. Those stay for another look after retry, in case they cannot be ended.
func (l *line) overdue(now time.Time, retry time.Duration) (over []*pending) {
	if !l.owed.IsZero() && !l.owed.After(now) {
		l.again(now)
	}
	for {
		p, ok := l.timed.first()
		if !ok || p.next.After(now) {
			return over
		}
		l.land(p)
		if now.Before(p.end()) {
			l.waiting.put(p)
			l.rest(p, p.end())
			continue
		}
		over = append(over, p)
		p.next = now.Add(retry)
		l.timed.put(p)
	}
}

// fill takes what may be sent now.
func (l *line) fill(now time.Time, online bool) (send []string) {
	if !online {
		// Beside a hello and a beat, a look now and then.
		if _, any := l.waiting.first(); any && !l.poll.After(now) {
			l.poll = now.Add(jittered(lastRetry))
		}
		return nil
	}
	for l.flying < window {
		p, ok := l.waiting.first()
		if !ok {
			break
		}
		l.waiting.drop(p)
		if now.After(p.expires) {
			continue // nobody may begin it any more
		}
		p.flying = true
		l.flying++
		p.tries++
		p.wait = min(max(2*p.wait, firstRetry), lastRetry)
		l.rest(p, now.Add(jittered(p.wait)))
		send = append(send, p.id)
	}
	return send
}

// jittered is a time of three to five quarters of d.
func jittered(d time.Duration) time.Duration { return d*3/4 + rand.N(d/2) }

// settle works out the line's own time.
func (l *line) settle() {
	l.due = time.Time{}
	if p, ok := l.timed.first(); ok {
		l.due = p.next
	}
	if !l.owed.IsZero() && l.owed.Before(l.due) {
		l.due = l.owed
	}
	if _, ok := l.waiting.first(); ok && l.flying < window && l.poll.Before(l.due) {
		l.due = l.poll
	}
}

// places is a heap whose members know where they are in it, counted from 1, so
// that each can be moved or taken out.
type places[E any] struct {
	list []E
	less func(a, b E) bool
	at   func(E) *int
}

func (h *places[E]) first() (e E, ok bool) {
	if len(h.list) == 0 {
		return e, false
	}
	return h.list[0], true
}

// put adds a member, or finds the place of one whose order has changed.
func (h *places[E]) put(e E) {
	if i := *h.at(e); i > 0 {
		heap.Fix(h, i-1)
	} else {
		heap.Push(h, e)
	}
}

func (h *places[E]) drop(e E) {
	if i := *h.at(e); i > 0 {
		heap.Remove(h, i-1)
	}
}

// What container/heap needs.

func (h *places[E]) Len() int           { return len(h.list) }
func (h *places[E]) Less(i, j int) bool { return h.less(h.list[i], h.list[j]) }

func (h *places[E]) Swap(i, j int) {
	h.list[i], h.list[j] = h.list[j], h.list[i]
	*h.at(h.list[i]), *h.at(h.list[j]) = i+1, j+1
}

func (h *places[E]) Push(e any) {
	h.list = append(h.list, e.(E))
	*h.at(e.(E)) = len(h.list)
}

func (h *places[E]) Pop() any {
	last := len(h.list) - 1
	e := h.list[last]
	var none E
	h.list[last] = none
	h.list = h.list[:last]
	*h.at(e) = 0
	return e
}
