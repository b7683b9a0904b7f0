package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
	"github.com/oklog/ulid/v2"
)

const noDiskIsThatLarge = 1 << 62

// TestAFullDiskBeginsNothing: an order whose report could not be kept would be
// done each time that the coordinator sends it.
func TestAFullDiskBeginsNothing(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	r.disk.leave.Store(noDiskIsThatLarge)
	said := 0
	for range 3 {
		if err := r.receive(r.ctx, r.owner.seal(wire.TypeOrder, r.order("a"))); err != nil {
			said++
			if !strings.Contains(err.Error(), "free some space") {
				t.Error(err)
			}
		}
		r.wait()
	}
	r.silent("the disk is full")
	if said != 1 || c.calls() != 0 {
		t.Errorf("it was said %d times, and done %d times", said, c.calls())
	}
	r.disk.leave.Store(0)
	r.give(r.order("a"))
	if rep := r.ends("a"); rep.State != wire.Succeeded {
		t.Errorf("with room again: %+v", rep)
	}
}

// TestADiskThatFillsUpWhileAnOrderWaitsBeginsIt not.
func TestADiskThatFillsUpWhileAnOrderWaitsBeginsItNot(t *testing.T) {
	h := newHeld()
	r := newRig(t, h.handle, func(u *duties) { x := u.routes[kindTest]; x.AtOnce = 1; u.routes[kindTest] = x })
	r.retry = time.Millisecond
	r.give(r.order("1"))
	await(t, "the first", h.entered)
	r.give(r.order("2"))
	r.disk.leave.Store(noDiskIsThatLarge)
	close(h.gate)
	for r.under("2") {
		time.Sleep(time.Millisecond)
	}
	if len(h.entered) != 0 {
		t.Error("it was begun")
	}
	r.disk.leave.Store(0)
	if rep := r.ends("1"); rep.State != wire.Succeeded {
		t.Errorf("the first: %+v", rep)
	}
}

// under tells whether an order is under way.
func (r *rig) under(order string) bool {
	r.dispatcher.mu.Lock()
	defer r.dispatcher.mu.Unlock()
	return r.inFlight[order] != nil
}

func TestAReportThatCannotBeKeptIsTriedAgainAndItsOrderIsNot(t *testing.T) {
	var c counter
	gate := make(chan struct{})
	r := newRig(t, func(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		if o.ID == "a" {
			<-gate
		}
		return c.handle(ctx, o, tell)
	})
	r.retry = time.Millisecond
	r.give(r.order("a"))
	r.reaches("a", running)
	r.disk.leave.Store(noDiskIsThatLarge)
	close(gate)
	for !strings.Contains(r.logged.String(), "cannot be kept") {
		time.Sleep(time.Millisecond)
	}
	for range 3 {
		r.give(r.order("a"))
		if rep := await(t, "an answer", r.reports); rep.State != wire.Running {
			t.Errorf("a repeat is answered with %+v", rep)
		}
	}
	r.disk.leave.Store(0)
	first := r.ends("a")
	if e, ok, err := r.journal.get("a"); !ok || err != nil || e.Seq != first.Seq || !r.owes("a") {
		t.Errorf("kept %t as %+v (%v), owed %t", ok, e, err, r.owes("a"))
	}
	r.wait()
	r.give(r.order("a"))
	if rep := r.ends("a"); rep.Seq != first.Seq || c.calls() != 1 {
		t.Errorf("report %d became %d, after %d effects", first.Seq, rep.Seq, c.calls())
	}
	if n := strings.Count(r.logged.String(), "cannot be kept"); n != 1 {
		t.Errorf("it was said %d times", n)
	}
}

// TestTheAgentEndsWithAReportThatCannotBeKept: also one of a cancellation.
func TestTheAgentEndsWithAReportThatCannotBeKept(t *testing.T) {
	r := newRig(t, nil)
	r.disk.leave.Store(noDiskIsThatLarge)
	ended := r.takeBack("1")
	for !strings.Contains(r.logged.String(), "cannot be kept") {
		time.Sleep(time.Millisecond)
	}
	r.end()
	await(t, "the end", ended)
	r.silent("it is not kept")
}

// TestAForgottenOrderStaysExpired on a board without a battery, whose clock
// begins at the saved floor.
func TestAForgottenOrderStaysExpired(t *testing.T) {
	const late = 11 * time.Minute
	for what, tidy := range map[string]func(r *rig) error{
		"housekeeping":  func(r *rig) error { return forget(r.journal, r.clock) },
		"a full outbox": func(r *rig) error { r.out.bound = 1; return r.out.sweep(1, classControl) },
	} {
		t.Run(what, func(t *testing.T) {
			var mu sync.Mutex
			now := time.Now()
			pass := func(d time.Duration) { mu.Lock(); defer mu.Unlock(); now = now.Add(d) }
			var c counter
			r := newRig(t, c.handle, func(u *duties) {
				u.clock = NewClock(time.Time{})
				u.clock.system = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
				u.clock.Trust(now, 0)
			})
			if err := r.disk.saveFloor(now); err != nil { // at the welcome
				t.Fatal(err)
			}
			o := r.order("a")
			o.Expires = now.Add(time.Minute)
			r.give(o)
			if err := r.receive(r.ctx, r.ack("a", r.ends("a").Seq)); err != nil {
				t.Fatal(err)
			}
			r.noteAcks()
			for _, step := range []struct {
				pass  time.Duration
				known bool
			}{{time.Minute + time.Second, true}, {late, false}} {
				pass(step.pass)
				r.out.next = time.Time{}
				if err := tidy(r); err != nil {
					t.Fatal(err)
				}
				if _, known, err := r.journal.get("a"); known != step.known || err != nil {
					t.Errorf("%s on, it is known: %t (%v)", step.pass, known, err)
				}
			}
			r = r.reborn(c.handle, func(u *duties) {
				floor, err := u.journal.(*badgerJournal).floor()
				if err != nil {
					t.Fatal(err)
				}
				u.clock = NewClock(floor)
				u.clock.system = func() time.Time { return time.Unix(0, 0) }
				if !u.clock.Trust(floor.Add(-5*time.Minute), 0) {
					t.Fatal("the margin is not that of the clock any more")
				}
			})
			r.give(o)
			if rep := r.ends("a"); rep.State != wire.Rejected || c.calls() != 1 {
				t.Errorf("%+v after %d effects", rep, c.calls())
			}
		})
	}
}

// TestNothingIsForgottenWithoutAFloor on the disk.
func TestNothingIsForgottenWithoutAFloor(t *testing.T) {
	r := newRig(t, nil)
	if err := r.journal.put(entry{Order: "a", Acked: true, Expires: time.Now().Add(-time.Hour)}); err != nil {
		t.Fatal(err)
	}
	r.disk.flush = func() error { return errors.New("the disk is broken") }
	if err := forget(r.journal, r.clock); err == nil {
		t.Error("no error")
	}
	r.disk.broken.Store(nil)
	if _, ok, err := r.journal.get("a"); !ok || err != nil {
		t.Errorf("it was forgotten (%v)", err)
	}
}

// cutOff is a life that ends between the effect of order a and its report.
func cutOff(t *testing.T, expires time.Time) (*rig, wire.Order) {
	t.Helper()
	done := make(chan struct{})
	r := newRig(t, func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		close(done)
		<-ctx.Done()
		return wire.Outcome{}, ctx.Err()
	})
	o := r.order("a")
	o.Expires = expires
	r.give(o)
	await(t, "the effect", done)
	return r, o
}

// TestACancelAfterACrashDoesNotDenyTheEffect, whatever the handler makes of a
// context that is already canceled.
func TestACancelAfterACrashDoesNotDenyTheEffect(t *testing.T) {
	for what, x := range map[string]struct {
		handle wire.Handler
		state  wire.State
		code   string
	}{
		"it is done": {func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
			return wire.Outcome{}, nil
		}, wire.Succeeded, ""},
		"it does not know": {func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
			return wire.Outcome{}, ctx.Err()
		}, wire.Failed, wire.CodeInterrupted},
	} {
		t.Run(what, func(t *testing.T) {
			r, o := cutOff(t, time.Now().Add(time.Hour))
			var seen context.Context
			r = r.reborn(func(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
				seen = ctx
				return x.handle(ctx, o, tell)
			})
			r.give(r.cancelOf("c", "a", o.Expires))
			if got := r.canceled("c"); got != wire.Running {
				t.Errorf("canceled, it is %s", got)
			}
			if _, ok, err := r.journal.get("a"); ok || err != nil {
				t.Errorf("it has a report (%v)", err)
			}
			r.give(o)
			if rep := r.ends("a"); rep.State != x.state || rep.Code != x.code {
				t.Errorf("its report: %+v", rep)
			}
			if seen == nil || seen.Err() == nil {
				t.Error("its handler was not told")
			}
			r.wait()
			if begun, err := r.journal.begun("a"); begun || err != nil {
				t.Errorf("it still counts as begun (%v)", err)
			}
		})
	}
}

func TestAnExpiryAfterACrashDoesNotDenyTheEffect(t *testing.T) {
	var c counter
	r, o := cutOff(t, time.Now().Add(time.Hour))
	r = r.reborn(c.handle, func(u *duties) {
		u.clock = NewClock(time.Time{})
		u.clock.Trust(time.Now().Add(2*time.Hour), 0)
	})
	r.give(o)
	first := r.ends("a")
	if first.State != wire.Failed || first.Code != wire.CodeInterrupted || !strings.Contains(first.Reason, "may have been done") {
		t.Errorf("its report: %+v", first)
	}
	r.wait()
	r.give(o)
	if sent := r.sent("a"); !bytes.Equal(sent[len(sent)-1], sent[len(sent)-2]) || c.calls() != 0 {
		t.Errorf("a repeat is answered with another report, after %d calls", c.calls())
	}
}

// TestThatAnOrderBeginsIsNotedBeforeItsHandlerAndCostsNoSync, unless somebody
// else may conclude it.
func TestThatAnOrderBeginsIsNotedBeforeItsHandlerAndCostsNoSync(t *testing.T) {
	for later, want := range map[error]int{nil: 1, errors.New("later"): 2} {
		t.Run(fmt.Sprint(later), func(t *testing.T) {
			var r *rig
			r = newRig(t, func(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
				if begun, err := r.journal.begun(o.ID); !begun || err != nil {
					t.Errorf("%s is not noted (%v)", o.ID, err)
				}
				return wire.Outcome{}, nil
			}, func(u *duties) { x := u.routes[kindTest]; x.Later = later; u.routes[kindTest] = x })
			syncs := 0
			r.disk.flush = func() error { syncs++; return r.disk.db.Sync() } // one at a time: see turn
			const orders = 20
			for i := range orders {
				r.give(r.order(fmt.Sprint(i)))
				r.ends(fmt.Sprint(i))
				r.wait()
			}
			if syncs != want*orders {
				t.Errorf("%d orders took %d syncs, want %d", orders, syncs, want*orders)
			}
		})
	}
}

// TestACancelThatWasAnsweredOutlivesACrash: the handler did not stop in time, so
// the cancellation ended with RUNNING and will not come again.
func TestACancelThatWasAnsweredOutlivesACrash(t *testing.T) {
	for _, what := range []string{"while it runs", "before it comes again"} {
		t.Run(what, func(t *testing.T) {
			begun, gate := make(chan struct{}, 1), make(chan struct{})
			r := newRig(t, func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
				begun <- struct{}{}
				<-gate // deaf
				return wire.Outcome{}, context.Cause(ctx)
			})
			r.patience = 0
			o := r.order("a")
			r.give(o)
			await(t, "the handler", begun)
			cancel := func() {
				r.give(r.cancelOf("c", "a", o.Expires))
				if got := r.canceled("c"); got != wire.Running {
					t.Errorf("canceled, it is %s", got)
				}
			}
			kill := func() { // what is in memory is lost, and nothing more is written
				r.settled("c")
				crashed := r.disk
				if err := crashed.close(); err != nil {
					t.Fatal(err)
				}
			}
			if what == "while it runs" {
				cancel()
			}
			kill()
			var told error
			next := func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
				told = context.Cause(ctx)
				return wire.Outcome{}, ctx.Err()
			}
			old := r
			r = startRig(t, old.owner, old.id, old.dir, next)
			if what != "while it runs" {
				r.patience = 0
				cancel()
				kill()
				r = startRig(t, old.owner, old.id, old.dir, next)
			}
			close(gate)
			r.give(o)
			if rep := r.ends("a"); rep.State != wire.Failed || rep.Code != wire.CodeInterrupted || !isCancel(told) {
				t.Errorf("the handler was told %v; the report: %+v", told, rep)
			}
			r.wait()
			if by, err := r.journal.revokedBy("a"); by != "" || err != nil {
				t.Errorf("the note stays: %q, %v", by, err)
			}
		})
	}
}

// settled waits until an order is no longer in flight.
func (r *rig) settled(order string) {
	r.t.Helper()
	r.dispatcher.mu.Lock()
	t := r.inFlight[order]
	r.dispatcher.mu.Unlock()
	if t != nil {
		await(r.t, order, t.done)
	}
}

// TestAnOrderForgottenByAWrongClockIsNotDoneAgain: the coordinator's clock was
// ahead for a while, and what it had signed before comes again.
func TestAnOrderForgottenByAWrongClockIsNotDoneAgain(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	at := func(when time.Time, tail string) string {
		id := ulid.MustNew(ulid.Timestamp(when), strings.NewReader(tail))
		return id.String()
	}
	now := time.Now()
	o := r.order(at(now, "0123456789"))
	o.Expires = now.Add(7 * 24 * time.Hour)
	r.give(o)
	seq := r.ends(o.ID).Seq
	r.wait()
	if err := acknowledge(r.journal, []wire.Acked{{Order: o.ID, Seq: seq}}); err != nil {
		t.Fatal(err)
	}
	ahead := NewClock(time.Time{})
	ahead.Trust(now.Add(8*24*time.Hour), 0)
	if err := forget(r.journal, ahead); err != nil {
		t.Fatal(err)
	}
	if _, known, err := r.journal.get(o.ID); known || err != nil {
		t.Fatalf("it was not forgotten (%v)", err)
	}
	for range 2 { // in this life and the next
		r.give(o)
		if rep := r.ends(o.ID); rep.State != wire.Rejected || rep.Code != wire.CodeExpired || c.calls() != 1 {
			t.Errorf("after %d calls: %+v", c.calls(), rep)
		}
		r = r.reborn(c.handle)
	}
	// What is made after that is done, though it expires before the wrong time.
	fresh := r.order(at(now.Add(time.Minute), "abcdefghij"))
	fresh.Expires = now.Add(time.Hour)
	r.give(fresh)
	if rep := r.ends(fresh.ID); rep.State != wire.Succeeded {
		t.Errorf("a new order: %+v", rep)
	}
	// And what is older than others that were forgotten in due time.
	pending := r.order(at(now.Add(-time.Minute), "klmnopqrst"))
	pending.Expires = now.Add(30 * 24 * time.Hour)
	r.give(pending)
	if rep := r.ends(pending.ID); rep.State != wire.Succeeded {
		t.Errorf("one that waited for long: %+v", rep)
	}
}

// TestAClockThatIsSetRightRefusesNoNewOrders, though orders were made, done and
// forgotten while it was a year ahead; those do not come back, either.
func TestAClockThatIsSetRightRefusesNoNewOrders(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	at := func(when time.Time, tail string) string {
		return ulid.MustNew(ulid.Timestamp(when), strings.NewReader(tail)).String()
	}
	now := time.Now()
	wrong := now.Add(365 * 24 * time.Hour)
	r.clock.Trust(wrong, 0)
	o := r.order(at(wrong, "0123456789"))
	o.Issued, o.Expires = wrong, wrong.Add(time.Hour)
	r.give(o)
	seq := r.ends(o.ID).Seq
	r.wait()
	if err := acknowledge(r.journal, []wire.Acked{{Order: o.ID, Seq: seq}}); err != nil {
		t.Fatal(err)
	}
	ahead := NewClock(time.Time{})
	ahead.Trust(wrong.Add(48*time.Hour), 0)
	if err := forget(r.journal, ahead); err != nil {
		t.Fatal(err)
	}
	r.clock.Trust(now, 0)
	if err := r.journal.timeIs(now); err != nil {
		t.Fatal(err)
	}
	for life := range 2 {
		fresh := r.order(at(now.Add(time.Minute), fmt.Sprintf("abcdefghi%d", life)))
		fresh.Expires = now.Add(time.Hour)
		r.give(fresh)
		if rep := r.ends(fresh.ID); rep.State != wire.Succeeded {
			t.Errorf("a new order: %+v", rep)
		}
		calls := c.calls()
		r.give(o)
		if rep := r.ends(o.ID); rep.State != wire.Rejected || c.calls() != calls {
			t.Errorf("one that was done: %+v", rep)
		}
		r = r.reborn(c.handle)
	}
}

func TestAcknowledgementsOnAFullDiskAreNotedLater(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	r.give(r.order("a"))
	seq := r.ends("a").Seq
	r.wait()
	r.disk.leave.Store(noDiskIsThatLarge)
	if err := r.receive(r.ctx, r.ack("a", seq)); err != nil {
		t.Fatal(err)
	}
	if next := r.resendDue(time.Now()); next != r.retry {
		t.Errorf("it is tried again in %s", next)
	}
	r.disk.leave.Store(0)
	r.resendDue(time.Now())
	if e, _, err := r.journal.get("a"); !e.Acked || err != nil {
		t.Errorf("not noted (%v)", err)
	}
}

// TestAFailedSyncIsTold, so that the agent ends: it must not stay online and
// answer nothing.
func TestAFailedSyncIsTold(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	r.disk.flush = func() error { return errors.New("the disk is broken") }
	for range 2 {
		if err := r.journal.saveFloor(time.Now()); err == nil {
			t.Error("nothing was said")
		}
	}
	await(t, "the end of the journal", r.disk.died)
}
