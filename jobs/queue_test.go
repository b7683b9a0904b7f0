package jobs

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"testing"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

var free = policy.Decision{Run: true, Begin: true}

func newQueue(slots int, memory int64) *queue {
	q := &queue{}
	q.decide(free)
	q.allow(policy.Policy{Slots: slots, Memory: memory})
	return q
}

// line is jobs that stand in a queue.
type line struct {
	t     *testing.T
	q     *queue
	began chan *ticket
	why   chan string // code of why one waits, with its order
	ctx   context.Context
}

func stand(t *testing.T, q *queue) *line {
	return &line{t: t, q: q, began: make(chan *ticket, 100), why: make(chan string, 1000), ctx: t.Context()}
}

// add puts a job into the queue, and returns when it is there.
func (l *line) add(order string, rank int, memory int64) {
	l.t.Helper()
	_, before := l.q.counts()
	n, _ := l.q.counts()
	go func() {
		k := &ticket{rank: rank, order: order, memory: memory}
		if l.q.enter(l.ctx, k, func(p *wire.Problem) { l.why <- order + " " + p.Code }) == nil {
			l.began <- k
		}
	}()
	for {
		if r, w := l.q.counts(); r > n || w > before {
			return
		}
		runtime.Gosched()
	}
}

func (l *line) next(want string) *ticket {
	l.t.Helper()
	k := <-l.began
	if k.order != want {
		l.t.Errorf("%s begins, want %s", k.order, want)
	}
	return k
}

func TestHigherRankGoesFirstThenTheOlder(t *testing.T) {
	l := stand(t, newQueue(1, 0))
	l.add("0", 0, 1)
	at := l.next("0")
	for _, k := range []struct {
		order string
		rank  int
	}{{"3", 0}, {"5", 7}, {"1", 0}, {"4", 7}, {"2", -1}} {
		l.add(k.order, k.rank, 1)
	}
	for _, want := range []string{"4", "5", "1", "3", "2"} {
		l.q.leave(at)
		at = l.next(want)
	}
}

func TestMoreSlotsLetWaitingJobsBeginAndFewerEndNone(t *testing.T) {
	q := newQueue(1, 0)
	l := stand(t, q)
	l.add("0", 0, 1)
	l.add("1", 0, 1)
	a := l.next("0")
	if got := <-l.why; got != "1 "+policy.CodeSlots {
		t.Errorf("it waits for %s", got)
	}
	q.allow(policy.Policy{Slots: 2})
	b := l.next("1")
	q.allow(policy.Policy{Slots: 1})
	l.add("2", 0, 1)
	q.leave(a)
	select {
	case <-l.began:
		t.Fatal("one begins beside another with one slot")
	case got := <-l.why:
		if got != "2 "+policy.CodeSlots {
			t.Errorf("it waits for %s", got)
		}
	}
	q.leave(b)
	l.next("2")
}

func TestJobsWaitForMemoryAndASmallOneDoesNotOvertake(t *testing.T) {
	q := newQueue(10, 100)
	l := stand(t, q)
	l.add("0", 0, 60)
	a := l.next("0")
	l.add("1", 0, 50)
	if got := <-l.why; got != "1 "+policy.CodeMemory {
		t.Errorf("it waits for %s", got)
	}
	l.add("2", 0, 1)
	if got := <-l.why; got != "2 "+policy.CodeMemory {
		t.Errorf("it waits for %s", got)
	}
	q.leave(a)
	both := []string{(<-l.began).order, (<-l.began).order}
	slices.Sort(both)
	if !slices.Equal(both, []string{"1", "2"}) {
		t.Errorf("%v begin", both)
	}
	// One that is alone begins, whatever it has.
	q2 := newQueue(1, 100)
	l2 := stand(t, q2)
	l2.add("0", 0, 1000)
	l2.next("0")
}

func TestOthersBeginOnceAModuleIsCompiledAndTakesLess(t *testing.T) {
	l := stand(t, newQueue(10, 100))
	l.add("0", 0, 90)
	a := l.next("0")
	l.add("1", 0, 90)
	if got := <-l.why; got != "1 "+policy.CodeMemory {
		t.Errorf("it waits for %s", got)
	}
	l.q.needs(a, 10)
	b := l.next("1")
	l.q.leave(a)
	l.q.leave(b)
	if l.q.memory != 0 {
		t.Errorf("%d bytes are missing at the end", l.q.memory)
	}
}

func TestNothingBeginsAgainstTheOwnersWord(t *testing.T) {
	q := newQueue(2, 0)
	for _, d := range []policy.Decision{{Code: policy.CodePaused}, {Run: true, Code: policy.CodeFinishing}} {
		q.decide(d)
		l := stand(t, q)
		l.add("0", 0, 1)
		if got := <-l.why; got != "0 "+d.Code {
			t.Errorf("it waits for %s, want %s", got, d.Code)
		}
		select {
		case <-l.began:
			t.Fatalf("one begins though: %+v", d)
		default:
		}
		q.decide(free)
		q.leave(l.next("0"))
	}
}

func TestWhoGivesUpLosesNoPlace(t *testing.T) {
	q := newQueue(1, 10)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	hush := func(*wire.Problem) {}
	// Turn and end come in the same moment: whatever is seen first, no place is lost.
	for i := range 200 {
		k := &ticket{order: fmt.Sprint(i), memory: 10}
		if q.enter(ended, k, hush) == nil {
			q.leave(k)
		}
	}
	k := &ticket{order: "x", memory: 10}
	if err := q.enter(t.Context(), k, hush); err != nil || q.running != 1 || q.memory != 10 || len(q.waiting) != 0 {
		t.Fatalf("%v, %d run with %d bytes, %d wait", err, q.running, q.memory, len(q.waiting))
	}
	if q.enter(ended, &ticket{order: "y"}, hush) == nil {
		t.Error("one came in beside another")
	}
	q.leave(k)
	if running, waiting := q.counts(); running != 0 || waiting != 0 || q.memory != 0 {
		t.Errorf("%d run, %d wait, %d bytes", running, waiting, q.memory)
	}
}
