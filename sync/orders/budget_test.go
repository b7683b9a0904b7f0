package orders

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

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
		b.release(5)
		synctest.Wait()
		if len(order) != 0 {
			t.Fatalf("%v went before who is first in line", order)
		}
		cancel() // who gives up lets the others go on
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		synctest.Wait()
		b.release(5)
		synctest.Wait()
		if !slices.Equal(order, []string{"serve", "store 1"}) {
			t.Errorf("they went %v", order)
		}
		b.release(10)
		synctest.Wait()
		if len(order) != 3 || b.free != 9 || len(b.waiting) != 0 {
			t.Errorf("%v, %d free, %d wait", order, b.free, len(b.waiting))
		}
	})
}

func TestWhatAHungDiskHoldsCountsUntilItAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var hangs atomic.Bool
		hangs.Store(true)
		b := newBudget(10, hangs.Load)
		if err := b.acquire(t.Context(), 8, 4); err != nil {
			t.Fatal(err)
		}
		b.park(8)
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
