package orders

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
)

func TestWhoWaitsForMemoryGoesByPriorityThenByAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(10, func() bool { return false })
		if err := b.acquire(t.Context(), 10, 4); err != nil {
			t.Fatal(err)
		}
		var order []string
		ask := func(name string, n int64, priority int) {
			go func() {
				if err := b.acquire(t.Context(), n, priority); err == nil {
					order = append(order, name)
				}
			}()
			synctest.Wait()
		}
		ask("store 1", 6, 4)
		ask("store 2", 1, 4) // would fit, and does not overtake
		ask("serve", 4, 3)
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan error, 1)
		go func() { gone <- b.acquire(ctx, 10, 0) }()
		synctest.Wait()
		b.release(5, 4)
		synctest.Wait()
		if len(order) != 0 {
			t.Fatalf("%v went before who is first in line", order)
		}
		cancel() // who gives up lets the others go on
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		synctest.Wait()
		b.release(5, 4)
		synctest.Wait()
		if !slices.Equal(order, []string{"serve", "store 1"}) {
			t.Errorf("they went %v", order)
		}
		b.release(10, 4)
		synctest.Wait()
		if len(order) != 3 || b.free != 9 || len(b.waiting) != 0 {
			t.Errorf("%v, %d free, %d wait", order, b.free, len(b.waiting))
		}
	})
}

// TestNoPriorityTakesAllMemoryFromAnother: a device that serves all the time stores
// all the same, one chunk at a time, and the other way round.
func TestNoPriorityTakesAllMemoryFromAnother(t *testing.T) {
	for _, flood := range []int{3, 4} {
		synctest.Test(t, func(t *testing.T) {
			const size = 4
			b := newBudget(2*size, func() bool { return false })
			var granted []int // by priority, in order
			ask := func(priority int) {
				go func() {
					if err := b.acquire(t.Context(), size, priority); err == nil {
						granted = append(granted, priority)
					}
				}()
				synctest.Wait()
			}
			for range 100 {
				ask(flood)
			}
			other := 7 - flood
			ask(other)
			ask(other)
			for n := 0; n < len(granted); n++ { // each ends in its turn
				b.release(size, granted[n])
				synctest.Wait()
			}
			if len(granted) != 102 || len(b.waiting) != 0 || b.free != 2*size {
				t.Fatalf("%d were granted, %d wait, %d free", len(granted), len(b.waiting), b.free)
			}
			if granted[2] != other {
				t.Errorf("a flood of %d: the first of %d was not next: %v", flood, other, granted[:6])
			}
			if flood < other && granted[3] == other {
				t.Error("the lower priority got more than its share")
			}
			if at := slices.Index(granted[3:], other); at < 0 || at > 2 {
				t.Errorf("a flood of %d: the second of %d came as number %d", flood, other, at+4)
			}
		})
	}
}

func TestWhatAHungDiskHoldsCountsUntilItAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hangs atomic.Bool
		hangs.Store(true)
		b := newBudget(10, hangs.Load)
		if err := b.acquire(t.Context(), 8, 4); err != nil {
			t.Fatal(err)
		}
		b.park(8, 4)
		short, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := b.acquire(short, 4, 4); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("the memory was given twice: %v", err)
		}
		got := make(chan error, 1)
		go func() { got <- b.acquire(t.Context(), 4, 4) }()
		synctest.Wait()
		hangs.Store(false) // who waits finds out by himself
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		if b.free != 6 || b.parked != 0 {
			t.Errorf("%d free, %d parked", b.free, b.parked)
		}
	})
}

// hungSet is a device's volumes whose disk does not answer for ten seconds.
type hungSet struct{ *store.Set }

func (hungSet) CanTake(int64) error { return nil }

func (hungSet) Put(context.Context, chunk.ID, []byte) (string, error) {
	time.Sleep(10 * time.Second)
	return "", wire.FailedBecause(wire.CodeUnreachable, "it hangs")
}

func TestAChunkThatAHungDiskWasGivenIsParked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(hungSet{store.NewSet()}, nil, Options{Memory: LeastMemory})
		var hangs atomic.Bool
		hangs.Store(true)
		s.memory.hangs = hangs.Load
		const size = 1000
		for n := range 2 {
			if err := s.memory.acquire(t.Context(), size, 4); err != nil {
				t.Fatal(err)
			}
			_, err := s.put(t.Context(), chunk.ID{}, make([]byte, size))
			if p := wire.ProblemOf(err); p.Code != wire.CodeBusy || p.After != busyMost {
				t.Errorf("the order says %+v", p)
			}
			if s.memory.free != LeastMemory-size {
				t.Errorf("%d: %d are free while it hangs", n, s.memory.free)
			}
			hangs.Store(false)
			s.memory.unpark()
			if s.memory.free != LeastMemory {
				t.Errorf("%d: %d are free when the disk answers again", n, s.memory.free)
			}
			hangs.Store(true)
		}
	})
}

func TestSlowDisksAreBusyForAsLongAsAChunkTakesThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPressure()
		want := func(what string, after time.Duration) {
			t.Helper()
			if got := p.busy(); got != after {
				t.Errorf("%s: busy for %s, want %s", what, got, after)
			}
			err := p.refuse()
			if (err != nil) != (after > 0) {
				t.Fatalf("%s: %v", what, err)
			}
			if err == nil {
				return
			}
			if p := wire.ProblemOf(err); p.State != wire.Rejected || p.Code != wire.CodeBusy || p.After != after {
				t.Errorf("%s: %+v", what, p)
			}
		}
		want("at first", 0)
		end := p.begin()
		time.Sleep(4 * time.Second)
		want("a write of 4 s", 0)
		time.Sleep(4 * time.Second)
		want("a write of 8 s", 8*time.Second)
		time.Sleep(time.Hour)
		want("a write of an hour", time.Minute)
		end()
		want("just after it", time.Minute)
		time.Sleep(2 * time.Hour)
		want("long after it", 0)

		end = p.begin()
		time.Sleep(20 * time.Second)
		end()
		time.Sleep(10 * time.Second)
		want("10 s after one of 20 s", 10*time.Second)
		time.Sleep(6 * time.Second)
		want("16 s after", 0)
		quick := p.begin()
		quick()
		want("after a quick one", 0)

		p.hung()
		time.Sleep(20 * time.Second)
		want("20 s after a disk did not answer", 40*time.Second)
		time.Sleep(40 * time.Second)
		want("a minute after", 0)
	})
}
