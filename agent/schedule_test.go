package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// held is a handler whose orders stay until they are let go.
type held struct {
	entered chan string
	gate    chan struct{}
}

func newHeld() *held { return &held{make(chan string, 4096), make(chan struct{})} }

func (h *held) handle(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	h.entered <- o.ID
	select {
	case <-h.gate:
		return wire.Outcome{}, nil
	case <-ctx.Done():
		return wire.Outcome{}, ctx.Err()
	}
}

// kinds gives a dispatcher routes like the agent's: slow are held, the others end at once.
func kinds(slow *held, quick wire.Handler, which ...wire.Kind) func(*duties) {
	return func(u *duties) {
		u.routes = map[wire.Kind]Route{
			wire.KindChunkStore:    {AtOnce: storesAtOnce, Limit: time.Hour},
			wire.KindChunkServe:    {AtOnce: storesAtOnce, Limit: time.Hour},
			wire.KindChunkDrop:     {AtOnce: 1, Limit: time.Hour},
			wire.KindAudit:         {AtOnce: 1, Limit: time.Hour},
			wire.KindJobRun:        {AtOnce: 2, Long: true, Limit: time.Hour},
			wire.KindUpdateInstall: {AtOnce: 1, Limit: time.Hour},
			wire.KindPing:          {Limit: time.Hour},
		}
		for k, r := range u.routes {
			r.Handle = quick
			if slices.Contains(which, k) {
				r.Handle = slow.handle
			}
			u.routes[k] = r
		}
	}
}

func (r *rig) orderOf(k wire.Kind, id string) wire.Order {
	o := r.order(id)
	o.Kind = k
	return o
}

func TestFloodKeepsNothingUrgentWaiting(t *testing.T) {
	h := newHeld()
	var c counter
	slow := []wire.Kind{wire.KindChunkStore, wire.KindChunkDrop, wire.KindJobRun, wire.KindChunkServe}
	r := newRig(t, nil, kinds(h, c.handle, slow...))
	n := 0
	for _, k := range slow {
		for range 200 {
			n++
			r.give(r.orderOf(k, fmt.Sprintf("flood-%04d", n)))
		}
	}
	for range 4 + 1 + 1 + 2 { // stores; a drop and a serve in their own places; jobs
		await(t, "the flood", h.entered)
	}
	for _, k := range []wire.Kind{wire.KindAudit, wire.KindUpdateInstall, wire.KindPing} {
		r.give(r.orderOf(k, "urgent "+string(k)))
		if rep := r.ends("urgent " + string(k)); rep.State != wire.Succeeded {
			t.Errorf("%s: %+v", k, rep)
		}
	}
	r.give(r.cancelOf("cancel", "flood-0003", time.Now().Add(time.Hour)))
	if got := r.canceled("cancel"); got != wire.Canceled {
		t.Errorf("the canceled order is %s", got)
	}
	r.end()
	r.wait()
}

// TestDeviceThatServesAllTheTimeStoresToo: what is below another flood goes one at a
// time, and not never.
func TestDeviceThatServesAllTheTimeStoresToo(t *testing.T) {
	serves, stores := newHeld(), newHeld()
	r := newRig(t, nil, kinds(serves, stores.handle, wire.KindChunkServe))
	for n := range 50 {
		r.give(r.orderOf(wire.KindChunkServe, fmt.Sprintf("serve-%04d", n)))
	}
	for range storesAtOnce {
		await(t, "the flood", serves.entered)
	}
	for n := range 3 {
		r.give(r.orderOf(wire.KindChunkStore, fmt.Sprintf("store-%d", n)))
		r.give(r.orderOf(wire.KindChunkDrop, fmt.Sprintf("drop-%d", n)))
	}
	for range 3 { // a store and a drop each time
		await(t, "one", stores.entered)
		await(t, "another", stores.entered)
		if n := len(stores.entered); n > 0 {
			t.Fatalf("%d more began than have a place of their own", n)
		}
		stores.gate <- struct{}{}
		stores.gate <- struct{}{}
	}
	for ended := 0; ended < 6; {
		if rep := await(t, "the ends", r.reports); rep.State.Terminal() {
			ended++
			if rep.State != wire.Succeeded {
				t.Errorf("got %+v", rep)
			}
		}
	}
	r.end()
	r.wait()
}

// TestSchedulerKeepsItsRule checks the rule of the scheduler's
// comment on random floods.
func TestSchedulerKeepsItsRule(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	var u duties
	kinds(newHeld(), nil)(&u)
	all := []wire.Kind{wire.KindChunkStore, wire.KindChunkServe, wire.KindChunkDrop, wire.KindAudit, wire.KindJobRun, wire.KindUpdateInstall, wire.KindPing}
	s := newScheduler(u.routes)
	var waiting, running []*task
	less := func(a, b *task) bool {
		if p, q := a.order.Kind.Priority(), b.order.Kind.Priority(); p != q {
			return p < q
		}
		return a.order.ID < b.order.ID
	}
	// may is the rule, worked out from what runs.
	may := func(t *task) bool {
		same, io := 0, 0
		for _, x := range running {
			if x.order.Kind == t.order.Kind {
				same++
			}
			if x.order.Kind.Priority() > 0 && !u.routes[x.order.Kind].Long {
				io++
			}
		}
		r, p := u.routes[t.order.Kind], t.order.Kind.Priority()
		return (r.AtOnce == 0 || same < r.AtOnce) && (p == 0 || r.Long || same == 0 || io < placesFor[p])
	}
	for step := range 20_000 {
		switch {
		case rng.IntN(2) == 0:
			x := &task{place: -1, order: wire.Order{ID: fmt.Sprintf("%06d", rng.IntN(1e6)), Kind: all[rng.IntN(len(all))]}}
			waiting = append(waiting, x)
			s.add(x)
		case len(waiting) > 0 && rng.IntN(8) == 0:
			i := rng.IntN(len(waiting))
			if !s.remove(waiting[i]) || s.remove(waiting[i]) {
				t.Fatal("an order that waits is removed once")
			}
			waiting = slices.Delete(waiting, i, i+1)
		case len(running) > 0:
			i := rng.IntN(len(running))
			s.ended(running[i].order.Kind)
			running = slices.Delete(running, i, i+1)
		}
		for {
			var want *task
			for _, x := range waiting {
				if may(x) && (want == nil || less(x, want)) {
					want = x
				}
			}
			got := s.next()
			if (got == nil) != (want == nil) || got != nil && (less(got, want) || less(want, got)) {
				t.Fatalf("step %d: %+v begins, want %+v", step, got, want)
			}
			if got == nil {
				break
			}
			if s.remove(got) {
				t.Fatal("an order that runs was removed")
			}
			waiting = slices.DeleteFunc(waiting, func(x *task) bool { return x == got })
			running = append(running, got)
		}
	}
}

func TestUrgentOrderGetsInWhenTheRestIsFull(t *testing.T) {
	h := newHeld()
	var c counter
	r := newRig(t, nil, kinds(h, c.handle, wire.KindJobRun))
	r.quiet = time.Hour
	for i := range maxInFlight {
		r.give(r.orderOf(wire.KindJobRun, fmt.Sprintf("%04d", i)))
	}
	if err := r.accept(r.ctx, r.orderOf(wire.KindJobRun, "one too many"), nil); err == nil {
		t.Error("accepted")
	}
	for _, k := range []wire.Kind{wire.KindChunkStore, wire.KindAudit, wire.KindPing} {
		r.give(r.orderOf(k, string(k)))
		if rep := r.ends(string(k)); rep.State != wire.Succeeded {
			t.Errorf("%s: %+v", k, rep)
		}
	}
	r.end()
	r.wait()
}

func (r *rig) cancelOf(id, order string, expires time.Time) wire.Order {
	o := r.orderOf(wire.KindOrderCancel, id)
	body, err := json.Marshal(wire.OrderCancel{Order: order, Expires: expires})
	if err != nil {
		r.t.Fatal(err)
	}
	o.Body = body
	return o
}

// takeBack has an order revoked, as by a cancellation of which nothing else
// happens. What it returns is closed when that is done, nil if nothing is in flight.
func (r *rig) takeBack(order string) <-chan struct{} {
	r.t.Helper()
	r.dispatcher.mu.Lock()
	defer r.dispatcher.mu.Unlock()
	if err := r.revoke(r.ctx, wire.OrderCancel{Order: order, Expires: time.Now().Add(time.Hour)}, takenBack("c")); err != nil {
		r.t.Fatal(err)
	}
	if t := r.inFlight[order]; t != nil {
		return t.done
	}
	return nil
}

// canceled awaits the end of an order.cancel and tells the state of the other.
func (r *rig) canceled(id string) wire.State {
	r.t.Helper()
	for {
		if r.owes(id) {
			break
		}
		await(r.t, "the end of "+id, r.reports)
	}
	sent := r.sent(id)
	rep, err := wire.OpenAs[wire.Report](sent[len(sent)-1], r.id.public(), wire.TypeReport)
	var res wire.CancelResult
	if err != nil || rep.State != wire.Succeeded || json.Unmarshal(rep.Body, &res) != nil {
		r.t.Fatalf("the cancellation ended as %+v (%v)", rep, err)
	}
	return res.State
}

// final is the last report that was sent on an order.
func (r *rig) final(order string) wire.Report {
	r.t.Helper()
	sent := r.sent(order)
	if len(sent) == 0 {
		r.t.Fatalf("nothing was reported on %s", order)
	}
	rep, err := wire.OpenAs[wire.Report](sent[len(sent)-1], r.id.public(), wire.TypeReport)
	if err != nil {
		r.t.Fatal(err)
	}
	return rep
}

func isCanceledReport(r wire.Report) bool {
	return r.State == wire.Canceled && r.Code == wire.CodeCanceled && r.Reason != ""
}

func TestCanceledOrderThatWaitsNeverBegins(t *testing.T) {
	h := newHeld()
	r := newRig(t, h.handle, func(u *duties) { x := u.routes[kindTest]; x.AtOnce = 1; u.routes[kindTest] = x })
	r.give(r.order("1"))
	await(t, "the first", h.entered)
	r.give(r.order("2"))
	r.give(r.cancelOf("c", "2", time.Now().Add(time.Hour)))
	if got := r.canceled("c"); got != wire.Canceled {
		t.Errorf("it is %s", got)
	}
	if rep := r.final("2"); !isCanceledReport(rep) {
		t.Errorf("its report: %+v", rep)
	}
	close(h.gate)
	r.wait()
	r.give(r.order("2"))
	r.wait()
	if len(h.entered) != 0 {
		t.Error("it was begun")
	}
	if rep := r.final("1"); rep.State != wire.Succeeded {
		t.Errorf("the other one: %+v", rep)
	}
}

func TestCanceledOrderThatRunsIsStopped(t *testing.T) {
	h := newHeld()
	r := newRig(t, h.handle)
	r.give(r.order("1"))
	await(t, "it", h.entered)
	r.give(r.cancelOf("c", "1", time.Now().Add(time.Hour)))
	if got := r.canceled("c"); got != wire.Canceled {
		t.Errorf("it is %s", got)
	}
	if rep := r.final("1"); !isCanceledReport(rep) {
		t.Errorf("its report: %+v", rep)
	}
}

// TestCancelTooLateTellsWhatHappened: the effect was done when the cancellation came.
func TestCancelTooLateTellsWhatHappened(t *testing.T) {
	entered := make(chan struct{}, 1)
	r := newRig(t, func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		entered <- struct{}{}
		<-ctx.Done()
		return wire.Outcome{Body: "done", Attachment: []byte("x")}, nil
	})
	r.give(r.order("1"))
	await(t, "it", entered)
	for _, id := range []string{"c1", "c2"} { // while it runs, and afterwards
		r.give(r.cancelOf(id, "1", time.Now().Add(time.Hour)))
		if got := r.canceled(id); got != wire.Succeeded {
			t.Errorf("%s: it is %s", id, got)
		}
	}
	if rep := r.final("1"); rep.State != wire.Succeeded || string(rep.Body) != `"done"` {
		t.Errorf("its report: %+v", rep)
	}
}

func TestOrderCanceledBeforeItArrivesNeverBegins(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	cancel := r.cancelOf("c", "1", time.Now().Add(time.Hour))
	r.give(cancel)
	if got := r.canceled("c"); got != wire.Canceled {
		t.Errorf("it is %s", got)
	}
	if !r.owes("1") {
		t.Error("its report is not owed")
	}
	first := r.final("1")
	if !isCanceledReport(first) {
		t.Errorf("its report: %+v", first)
	}
	o := r.order("1")
	for range 2 {
		r.give(o)
		r.wait()
		if rep := r.final("1"); rep.Seq != first.Seq || !isCanceledReport(rep) {
			t.Errorf("when it arrives: %+v", rep)
		}
		r = r.reborn(c.handle)
	}
	if c.calls() != 0 {
		t.Error("it was begun")
	}
}

// lateJournal holds up the beginning of one order.
type lateJournal struct {
	journal
	order string
	gate  chan struct{}
}

func (j lateJournal) begin(order string, until time.Time, durable bool) error {
	if order == j.order {
		<-j.gate
	}
	return j.journal.begin(order, until, durable)
}

// TestOrderRightBehindItsCancellationNeverBegins: the coordinator sends both at
// once to a device that comes back, the cancellation first.
func TestOrderRightBehindItsCancellationNeverBegins(t *testing.T) {
	var c counter
	gate := make(chan struct{})
	r := newRig(t, c.handle, func(u *duties) { u.journal = lateJournal{u.journal, "c", gate} })
	r.give(r.cancelOf("c", "1", time.Now().Add(time.Hour)))
	r.give(r.order("1"))
	if rep := r.ends("1"); !isCanceledReport(rep) || c.calls() != 0 {
		t.Errorf("%+v after %d calls", rep, c.calls())
	}
	close(gate)
	if got := r.canceled("c"); got != wire.Canceled {
		t.Errorf("it is %s", got)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.revoked) != 0 {
		t.Error("the mark stays for ever")
	}
}

// TestOrderThatArrivesAgainBeforeItsCancellationIsHandledIsCanceled: it was left
// open just after the cancellation had come.
func TestOrderThatArrivesAgainBeforeItsCancellationIsHandledIsCanceled(t *testing.T) {
	later := errors.New("later")
	gate, entered := make(chan struct{}), make(chan error, 1)
	var lives int
	r := newRig(t, func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		lives++
		entered <- ctx.Err()
		if lives == 1 {
			<-ctx.Done()
			return wire.Outcome{}, later
		}
		return wire.Outcome{}, ctx.Err()
	}, func(u *duties) {
		u.journal = lateJournal{u.journal, "c", gate}
		x := u.routes[kindTest]
		x.Later = later
		u.routes[kindTest] = x
	})
	r.give(r.order("1"))
	await(t, "it", entered)
	r.give(r.cancelOf("c", "1", time.Now().Add(time.Hour)))
	r.settled("1")
	r.give(r.order("1"))
	if await(t, "it again", entered) == nil {
		t.Error("its handler was not told")
	}
	if rep := r.ends("1"); !isCanceledReport(rep) {
		t.Errorf("its report: %+v", rep)
	}
	close(gate)
	if got := r.canceled("c"); got != wire.Canceled {
		t.Errorf("it is %s", got)
	}
}

// TestCancelCutOffBeforeItsReportIsDoneAgain: the power went after the other
// order's report and before the cancellation's own.
func TestCancelCutOffBeforeItsReportIsDoneAgain(t *testing.T) {
	var c counter
	r := newRig(t, c.handle)
	await(t, "the report", r.takeBack("1"))
	seq := r.final("1").Seq
	r = r.reborn(c.handle)
	r.give(r.cancelOf("c", "1", time.Now().Add(time.Hour)))
	if got := r.canceled("c"); got != wire.Canceled {
		t.Errorf("it is %s", got)
	}
	r.give(r.order("1"))
	if rep := r.ends("1"); rep.Seq != seq || c.calls() != 0 {
		t.Errorf("%+v after %d calls", rep, c.calls())
	}
}

// TestUpdateBeyondRecallIsNotCanceled: what is installed and on trial is
// concluded by a later life, and must not be CANCELED before.
func TestUpdateBeyondRecallIsNotCanceled(t *testing.T) {
	again, later := errors.New("again"), errors.New("later")
	route := func(u *duties) {
		x := u.routes[kindTest]
		x.Restart, x.Later = again, later
		u.routes[kindTest] = x
	}
	install := func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
		return wire.Outcome{}, again
	}
	r := newRig(t, install, route)
	o := r.order("update")
	still := func(cancel string) {
		t.Helper()
		r.give(r.cancelOf(cancel, "update", time.Now().Add(time.Hour)))
		if got := r.canceled(cancel); got != wire.Running {
			t.Errorf("%s: it is %s", cancel, got)
		}
		if _, ok, err := r.journal.get("update"); ok || err != nil {
			t.Errorf("%s: it has a report (%v)", cancel, err)
		}
	}
	r.give(o)
	await(t, "the restart", r.restart)
	r.wait()
	still("c1")
	canceledToo := make(chan bool, 4)
	r = r.reborn(func(ctx context.Context, _ wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
		canceledToo <- ctx.Err() != nil
		return wire.Outcome{}, fmt.Errorf("on trial: %w", later)
	}, route)
	still("c2")
	r.give(o)
	if !await(t, "its handler", canceledToo) {
		t.Error("its handler does not see that it was canceled")
	}
	r.wait()
	still("c3")
	r.conclude("update", wire.Outcome{Body: "confirmed"}, nil)
	r.give(r.cancelOf("c4", "update", time.Now().Add(time.Hour)))
	if got := r.canceled("c4"); got != wire.Succeeded {
		t.Errorf("concluded, it is %s", got)
	}
}

// TestUpdateCutOffInTheMiddleCanBeCanceled: a former life began it and did not
// get as far as the trial.
func TestUpdateCutOffInTheMiddleCanBeCanceled(t *testing.T) {
	later := errors.New("later")
	route := func(u *duties) { x := u.routes[kindTest]; x.Later = later; u.routes[kindTest] = x }
	h := newHeld()
	r := newRig(t, h.handle, route)
	r.give(r.order("update"))
	await(t, "it", h.entered)
	r = r.reborn(h.handle, route)
	r.give(r.cancelOf("c1", "update", time.Now().Add(time.Hour)))
	if got := r.canceled("c1"); got != wire.Running {
		t.Errorf("it is %s", got)
	}
	r.give(r.order("update"))
	if rep := r.ends("update"); !isCanceledReport(rep) {
		t.Errorf("its report: %+v", rep)
	}
	if ok, err := r.journal.begun("update"); ok || err != nil {
		t.Errorf("it still counts as begun (%v)", err)
	}
}

// TestUpdateOnTrialIsNotCanceledWhileItWaits: its handler must be asked first.
func TestUpdateOnTrialIsNotCanceledWhileItWaits(t *testing.T) {
	later := errors.New("later")
	h := newHeld()
	r := newRig(t, func(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		if o.ID == "update" {
			return wire.Outcome{}, later
		}
		return h.handle(ctx, o, tell)
	}, func(u *duties) { x := u.routes[kindTest]; x.Later, x.AtOnce = later, 1; u.routes[kindTest] = x })
	r.give(r.order("update"))
	r.wait()
	r.give(r.order("first"))
	await(t, "the one before", h.entered)
	r.takeBack("update")
	r.give(r.order("update"))
	close(h.gate)
	r.wait()
	if _, ok, err := r.journal.get("update"); ok || err != nil {
		t.Errorf("it was canceled (%v)", err)
	}
}

func TestCancelOfNothingIsRejected(t *testing.T) {
	r := newRig(t, nil)
	r.give(r.cancelOf("self", "self", time.Now().Add(time.Hour)))
	if rep := r.ends("self"); rep.State != wire.Rejected || rep.Code != wire.CodeBadBody {
		t.Errorf("of itself: %+v", rep)
	}
	r.give(r.cancelOf("c", "1", time.Time{}))
	if rep := r.ends("c"); rep.State != wire.Rejected || rep.Code != wire.CodeBadBody {
		t.Errorf("without an expiry: %+v", rep)
	}
}

func TestQuickOrderIsReportedOnce(t *testing.T) {
	r := newRig(t, func(_ context.Context, _ wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		tell(wire.Progress{Done: 0.5})
		return wire.Outcome{}, nil
	})
	r.quiet = time.Hour
	r.give(r.order("1"))
	r.ends("1")
	r.wait()
	if n := len(r.sent("1")); n != 1 {
		t.Errorf("%d reports", n)
	}
}

func TestSlowOrderIsReportedAfterAWhile(t *testing.T) {
	h := newHeld()
	r := newRig(t, h.handle)
	r.quiet = 10 * time.Millisecond
	r.give(r.order("1"))
	if rep := await(t, "a report", r.reports); rep.State == wire.Queued {
		rep = await(t, "another", r.reports) // a slow machine
		if rep.State != wire.Running {
			t.Errorf("got %+v", rep)
		}
	}
}

// TestRepeatIsAnsweredAtOnce, and the newest progress is in the answer though
// it was not sent yet.
func TestRepeatIsAnsweredAtOnce(t *testing.T) {
	at, gate := make(chan struct{}), make(chan struct{})
	r := newRig(t, func(_ context.Context, _ wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		for i := range 100 {
			tell(wire.Progress{Done: float64(i) / 100})
		}
		close(at)
		<-gate
		return wire.Outcome{}, nil
	})
	r.quiet = time.Hour
	r.give(r.order("1"))
	await(t, "the progress", at)
	r.silent("it is held back")
	r.give(r.order("1"))
	if rep := await(t, "the answer", r.reports); rep.State != wire.Running || rep.Progress != 0.99 {
		t.Errorf("got %+v", rep)
	}
	close(gate)
	r.ends("1")
}

func TestExtensionIsCarriedOutButReplacesNothing(t *testing.T) {
	var c counter
	route := Route{Handle: c.handle, Limit: time.Hour}
	r := newRig(t, nil, func(u *duties) { u.extra = map[wire.Kind]Route{"x.mine": route} })
	r.give(r.orderOf("x.mine", "1"))
	if rep := r.ends("1"); rep.State != wire.Succeeded {
		t.Errorf("got %+v", rep)
	}
	for _, bad := range []map[wire.Kind]Route{{kindTest: route}, {wire.KindOrderCancel: route}, {"x.mine": {Limit: time.Hour}}, {"x.mine": {Handle: c.handle}}} {
		u := r.duties
		u.routes = map[wire.Kind]Route{kindTest: route}
		u.extra = bad
		if _, err := newDispatcher(u); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
}

func TestPingIsAnswered(t *testing.T) {
	out, err := ping("1.2.3", time.Now().Add(-time.Minute))(t.Context(), wire.Order{}, nil)
	if p, ok := out.Body.(wire.Pong); err != nil || !ok || p.Agent != "1.2.3" || p.Uptime < 60 {
		t.Errorf("%+v, %v", out, err)
	}
}
