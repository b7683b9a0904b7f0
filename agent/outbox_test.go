package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/deimos-edge/deimos/wire"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// onBoth runs a claim on both journals.
func onBoth(t *testing.T, claim func(t *testing.T, j journal)) {
	t.Run("badger", func(t *testing.T) {
		j, err := openJournal(filepath.Join(t.TempDir(), "journal"))
		if err != nil {
			t.Fatal(err)
		}
		defer j.close()
		claim(t, j)
	})
	t.Run("memory", func(t *testing.T) { claim(t, newMemoryJournal()) })
}

func TestJournalKeepsRevisesAndForgets(t *testing.T) {
	onBoth(t, func(t *testing.T, j journal) {
		if _, ok, err := j.get("a"); ok || err != nil || j.bytes() != 0 || len(j.dropped()) != 0 {
			t.Fatalf("a new journal is not empty (%v)", err)
		}
		for _, id := range []string{"a", "b", "c"} {
			if err := j.put(entry{Order: id, Seq: 7, Expires: today, Report: make([]byte, 1000), Class: classProof}); err != nil {
				t.Fatal(err)
			}
		}
		full := j.bytes()
		if full < 3000 {
			t.Errorf("3 reports of 1000 bytes take %d", full)
		}
		if err := j.revise([]string{"a", "x", "b", "c"}, true, func(e *entry) fate {
			switch e.Order {
			case "a":
				e.Report, e.Seq, e.Was, e.lost, e.lostAt = e.Report[:100], 9, 7, 900, today
				return replace
			case "b":
				return remove
			}
			e.Seq = 1 // must not be taken over
			return leave
		}); err != nil {
			t.Fatal(err)
		}
		a, ok, err := j.get("a")
		if err != nil || !ok || a.Seq != 9 || a.Was != 7 || len(a.Report) != 100 || a.lost != 0 {
			t.Errorf("a: %+v (%v)", a, err)
		}
		if _, ok, _ := j.get("b"); ok {
			t.Error("b is still there")
		}
		if c, ok, _ := j.get("c"); !ok || c.Seq != 7 {
			t.Errorf("c: %+v", c)
		}
		if d := j.dropped(); len(d) != 1 || d[0].Class != "proof" || d[0].Count != 1 || d[0].Bytes != 900 || d[0].First.IsZero() || d[0].Last.Before(d[0].First) {
			t.Errorf("the record: %+v", d)
		}
		if got := j.bytes(); got >= full-1900 {
			t.Errorf("%d bytes of %d are left", got, full)
		}
		for seq, want := range map[uint64]bool{8: false, 7: true} { // 7 was the number before
			if err := acknowledge(j, []wire.Acked{{Order: "a", Seq: seq}, {Order: "x", Seq: 1}}); err != nil {
				t.Fatal(err)
			}
			if a, _, _ := j.get("a"); want && !a.Acked {
				t.Errorf("an acknowledgement of %d: %t", seq, a.Acked)
			}
		}
		if err := j.begin("d", today.Add(keepConcluded), true); err != nil {
			t.Fatal(err)
		}
		if err := j.begin("e", today.Add(-2*keepConcluded), false); err != nil {
			t.Fatal(err)
		}
		if err := j.forget(today.Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		for id, want := range map[string]bool{"a": false, "c": true} {
			if _, ok, _ := j.get(id); ok != want {
				t.Errorf("%s is kept: %t", id, ok)
			}
		}
		for id, want := range map[string]bool{"d": true, "e": false} {
			if ok, err := j.begun(id); ok != want || err != nil {
				t.Errorf("%s is begun: %t (%v)", id, ok, err)
			}
		}
		if err := j.put(entry{Order: "d"}); err != nil {
			t.Fatal(err)
		}
		if ok, _ := j.begun("d"); ok {
			t.Error("d has ended and is still begun")
		}
		if owed, err := unacked(j); err != nil || len(owed) != 2 {
			t.Errorf("owed: %v (%v)", owed, err)
		}
	})
}

// TestBytesAreCountedExactly changes a journal at random and opens it again:
// the count that was kept is the count of what is there.
func TestBytesAreCountedExactly(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	dir := t.TempDir()
	j, err := openJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	id := func() string { return fmt.Sprint("order", rng.IntN(40)) }
	for range 5 {
		var wg sync.WaitGroup
		for range 60 {
			order, size, what := id(), rng.IntN(5000), rng.IntN(4)
			wg.Go(func() {
				var err error
				switch what {
				case 0:
					err = j.revise([]string{order}, false, func(*entry) fate { return remove })
				case 1:
					err = acknowledge(j, []wire.Acked{{Order: order, Seq: 1}})
				default:
					err = j.put(entry{Order: order, Seq: 1, Report: make([]byte, size), lost: int64(size), lostAt: today, Class: classReceipt})
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		before, lost := j.bytes(), j.dropped()
		if err := j.close(); err != nil {
			t.Fatal(err)
		}
		if j, err = openJournal(dir); err != nil {
			t.Fatal(err)
		}
		if j.bytes() != before {
			t.Fatalf("counted %d bytes, there are %d", before, j.bytes())
		}
		raw, _ := json.Marshal(lost)
		again, _ := json.Marshal(j.dropped())
		if string(raw) != string(again) {
			t.Fatalf("the record was %s, it is %s", raw, again)
		}
	}
	if j.bytes() == 0 {
		t.Error("nothing was tested")
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
}

// TestWaitingPutsShareOneCommit: Badger counts its transactions.
func TestWaitingPutsShareOneCommit(t *testing.T) {
	j, err := openJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	commits := func(n, size int) uint64 {
		before := j.db.MaxVersion()
		j.turn.Lock()
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				if err := j.put(entry{Order: fmt.Sprintf("%d-%d", size, i), Report: make([]byte, size)}); err != nil {
					t.Error(err)
				}
			})
		}
		for {
			j.queue.Lock()
			queued := len(j.queued)
			j.queue.Unlock()
			if queued == n {
				break
			}
			time.Sleep(time.Millisecond)
		}
		j.turn.Unlock()
		wg.Wait()
		for i := range n {
			if _, ok, err := j.get(fmt.Sprintf("%d-%d", size, i)); !ok || err != nil {
				t.Errorf("put %d of %d bytes is not there (%v)", i, size, err)
			}
		}
		return j.db.MaxVersion() - before
	}
	if got := commits(16, 1000); got != 1 {
		t.Errorf("16 small puts took %d commits", got)
	}
	// Each commit has its sync, so none may be rotated out by another of its batch.
	if got := commits(16, 100<<10); got < 6 || got > 16 {
		t.Errorf("16 puts of 133 KiB took %d commits", got)
	}
}

// TestOneBadWriteHurtsNoOther of its batch.
func TestOneBadWriteHurtsNoOther(t *testing.T) {
	j, err := openJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	good := func(order string) *write {
		return &write{durable: true, change: func(tx *badger.Txn) ([]pair, error) {
			return []pair{{orderKey(order), []byte(`{"order":"` + order + `"}`)}}, nil
		}}
	}
	bad := &write{change: func(tx *badger.Txn) ([]pair, error) { return nil, context.Canceled }}
	before, after := good("a"), good("b")
	if err := j.commit(before, bad, after); err == nil || bad.err == nil || before.err != nil || after.err != nil {
		t.Errorf("%v: %v, %v, %v", err, before.err, bad.err, after.err)
	}
	for _, order := range []string{"a", "b"} {
		if _, ok, err := j.get(order); !ok || err != nil {
			t.Errorf("the good one %s is not there (%v)", order, err)
		}
	}
}

// small gives a dispatcher an outbox of so many bytes, and answers of size.
func small(bound int64, j func(*duties)) func(*duties) {
	return func(u *duties) {
		u.outbox = bound
		j(u)
		u.routes = map[wire.Kind]Route{
			wire.KindAudit:  {AtOnce: 1, Limit: time.Hour},
			wire.KindJobRun: {AtOnce: 1, Limit: time.Hour},
		}
		for k, r := range u.routes {
			r.Handle = func(context.Context, wire.Order, func(wire.Progress)) (wire.Outcome, error) {
				return wire.Outcome{Body: strings.Repeat("b", 4<<10), Attachment: make([]byte, 4<<10)}, nil
			}
			u.routes[k] = r
		}
	}
}

func badgerHere(*duties) {}

func inMemory(u *duties) { u.journal = newMemoryJournal() }

// do gives an order and awaits its end; false if it is left unanswered.
func (r *rig) do(k wire.Kind, id string) bool {
	r.t.Helper()
	err := r.receive(r.ctx, r.owner.seal(wire.TypeOrder, r.orderOf(k, id)))
	r.wait()
	return err == nil && len(r.sent(id)) > 0
}

// kept tells how the report of an order is kept: "full", "bare" or "gone". What
// is kept must be a report that the coordinator can take.
func (r *rig) kept(id string) string {
	r.t.Helper()
	e, ok, err := r.journal.get(id)
	if err != nil {
		r.t.Fatal(err)
	}
	if !ok {
		return "gone"
	}
	rep, err := wire.OpenAs[wire.Report](e.Report, r.id.public(), wire.TypeReport)
	if err != nil || rep.Seq != e.Seq || rep.Order != id || rep.State != wire.Succeeded {
		r.t.Fatalf("%s is kept as %+v, %+v (%v)", id, e, rep, err)
	}
	if rep.Dropped != (rep.Body == nil) || rep.Dropped != (rep.Attachment == nil) || rep.Dropped != e.Bare {
		r.t.Errorf("%s is stripped by half: %+v", id, rep)
	}
	if rep.Dropped {
		return "bare"
	}
	return "full"
}

func TestOutboxStripsTheLeastValuableAndOldestFirst(t *testing.T) {
	for name, j := range map[string]func(*duties){"badger": badgerHere, "memory": inMemory} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil, small(400<<10, j))
			n := 0
			do := func(k wire.Kind) string {
				n++
				id := fmt.Sprintf("%04d", n)
				if !r.do(k, id) {
					t.Fatalf("order %s was left unanswered", id)
				}
				return id
			}
			var jobs, audits []string
			for range 8 {
				jobs = append(jobs, do(wire.KindJobRun))
			}
			for len(r.journal.dropped()) == 0 {
				audits = append(audits, do(wire.KindAudit))
			}
			// It made room for a while, from the oldest, and only among audits.
			bare := 0
			for i, id := range audits {
				switch r.kept(id) {
				case "bare":
					if bare != i {
						t.Errorf("audit %s was stripped before an older one", id)
					}
					bare++
				case "gone":
					t.Errorf("audit %s is forgotten", id)
				}
			}
			if bare == 0 || bare == len(audits) {
				t.Errorf("%d of %d audits were stripped", bare, len(audits))
			}
			for _, id := range jobs {
				if r.kept(id) != "full" {
					t.Errorf("job %s was stripped while there were audits", id)
				}
			}
			d := r.journal.dropped()
			if len(d) != 1 || d[0].Class != "proof" || int(d[0].Count) != bare || d[0].Bytes < uint64(bare)*8<<10 {
				t.Errorf("the record is %+v, stripped were %d", d, bare)
			}
			if got := r.journal.bytes(); got > 400<<10 {
				t.Errorf("%d bytes are above the bound", got)
			}
			// Jobs only: they outlast every audit, then strip each other.
			for len(r.journal.dropped()) < 2 {
				do(wire.KindJobRun)
			}
			for _, id := range audits {
				if r.kept(id) != "bare" {
					t.Errorf("audit %s is %s though jobs were stripped", id, r.kept(id))
				}
			}
		})
	}
}

// TestAcknowledgedReportsAreStrippedFirst: the coordinator has them, so it is no loss.
func TestAcknowledgedReportsAreStrippedFirst(t *testing.T) {
	r := newRig(t, nil, small(200<<10, badgerHere))
	if !r.do(wire.KindAudit, "1") {
		t.Fatal("unanswered")
	}
	var seq uint64
	for _, id := range []string{"0", "00", "000", "0000"} {
		if !r.do(wire.KindJobRun, id) {
			t.Fatal("unanswered")
		}
		if seq == 0 {
			seq = r.final(id).Seq
		}
		if err := r.receive(r.ctx, r.ack(id, r.final(id).Seq)); err != nil {
			t.Fatal(err)
		}
	}
	r.noteAcks()
	for n := 2; r.kept("0") == "full"; n++ {
		if !r.do(wire.KindAudit, fmt.Sprint(n)) {
			t.Fatal("unanswered")
		}
	}
	if r.kept("1") != "full" || len(r.journal.dropped()) != 0 {
		t.Errorf("audit 1 is %s, the record is %+v", r.kept("1"), r.journal.dropped())
	}
	if e, _, _ := r.journal.get("0"); e.Seq != seq || !e.Acked {
		t.Errorf("it is kept as %+v", e)
	}
}

// TestAckOfTheFullReportCountsAfterItWasStripped: it was on its way meanwhile.
// An acknowledgement of the stripped one counts as well, one of neither does not.
func TestAckOfTheFullReportCountsAfterItWasStripped(t *testing.T) {
	for _, what := range []string{"full", "stripped", "neither", "full, in the next life"} {
		t.Run(what, func(t *testing.T) {
			r := newRig(t, nil, small(1<<20, badgerHere))
			if !r.do(wire.KindAudit, "1") {
				t.Fatal("unanswered")
			}
			full := r.final("1").Seq
			if err := r.out.stripAll([]string{"1"}); err != nil {
				t.Fatal(err)
			}
			if r.kept("1") != "bare" || !r.owes("1") {
				t.Fatal("it is not stripped")
			}
			e, _, _ := r.journal.get("1")
			if e.Seq <= full {
				t.Errorf("number %d follows %d", e.Seq, full)
			}
			r.resendDue(time.Now().Add(time.Hour))
			if rep := r.final("1"); !rep.Dropped || rep.Seq != e.Seq {
				t.Errorf("sent again is %+v", rep)
			}
			seq := full
			switch what {
			case "stripped":
				seq = e.Seq
			case "neither":
				seq = e.Seq + 1
			case "full, in the next life":
				r = r.reborn(nil, small(1<<20, badgerHere))
			}
			if err := r.receive(r.ctx, r.ack("1", seq)); err != nil {
				t.Fatal(err)
			}
			r.noteAcks()
			e, _, _ = r.journal.get("1")
			if want := what != "neither"; r.owes("1") == want || e.Acked != want {
				t.Errorf("owed %t, acknowledged %t", r.owes("1"), e.Acked)
			}
		})
	}
}

// TestFullOutboxLeavesNewOrdersUnanswered, forgets nothing that was done, says
// so once, and goes on when there is room.
func TestFullOutboxLeavesNewOrdersUnanswered(t *testing.T) {
	r := newRig(t, nil, small(64<<10, badgerHere))
	var done []string
	for n := 0; ; n++ {
		id := fmt.Sprintf("%04d", n)
		if !r.do(wire.KindAudit, id) {
			break
		}
		done = append(done, id)
	}
	if len(done) < 20 {
		t.Errorf("only %d orders in 64 KiB", len(done))
	}
	for range 3 {
		if r.do(wire.KindAudit, "late") || r.kept("late") != "gone" {
			t.Fatal("it was carried out")
		}
	}
	for _, id := range done {
		if got := r.kept(id); got == "gone" || got == "full" {
			t.Errorf("order %s is %s", id, got)
		}
	}
	o := r.orderOf(wire.KindAudit, done[0])
	r.give(o) // a repeat
	r.wait()
	if rep := r.final(done[0]); !rep.Dropped {
		t.Errorf("a repeat is answered with %+v", rep)
	}
	// A cancellation still gets in: it may be what helps.
	r.give(r.cancelOf("c", "some", time.Now().Add(time.Hour)))
	if got := r.canceled("c"); got != wire.Canceled {
		t.Errorf("it is %s", got)
	}
	// Acknowledged and expired, they are forgotten, and there is room.
	for _, id := range done {
		e, _, _ := r.journal.get(id)
		if err := r.receive(r.ctx, r.ack(id, e.Seq)); err != nil {
			t.Fatal(err)
		}
	}
	r.noteAcks()
	r.clock.Trust(time.Now().Add(2*time.Hour), 0)
	later := r.orderOf(wire.KindAudit, "later")
	later.Expires = time.Now().Add(4 * time.Hour)
	for i := 0; len(r.sent("later")) == 0; i++ {
		if i == 3 {
			t.Fatal("there is room and it is left unanswered")
		}
		_ = r.accept(r.ctx, later, nil)
		r.wait()
	}
	for _, id := range done {
		if r.kept(id) != "gone" {
			t.Errorf("order %s is not forgotten", id)
		}
	}
}

func TestFullOutboxIsSaidOnce(t *testing.T) {
	r := newRig(t, nil, small(1, inMemory))
	said := 0
	for i := range 10 {
		if err := r.accept(r.ctx, r.orderOf(wire.KindAudit, fmt.Sprint(i)), nil); err != nil {
			said++
		}
	}
	r.wait()
	if said != 1 {
		t.Errorf("said %d times", said)
	}
}

// TestReportDisplacesNothingMoreValuable: rather it is stripped itself.
func TestReportDisplacesNothingMoreValuable(t *testing.T) {
	r := newRig(t, nil, small(100<<10, badgerHere))
	n := 0
	for r.journal.bytes() < 80<<10 {
		n++
		if !r.do(wire.KindJobRun, fmt.Sprint("job", n)) {
			t.Fatal("unanswered")
		}
	}
	for i := range 3 {
		if !r.do(wire.KindAudit, fmt.Sprint("audit", i)) {
			t.Fatal("unanswered")
		}
	}
	if got := r.kept("audit2"); got != "bare" {
		t.Errorf("the newest audit is %s", got)
	}
	for i := range n {
		if got := r.kept(fmt.Sprint("job", i+1)); got != "full" {
			t.Errorf("job %d is %s", i+1, got)
		}
	}
	if d := r.journal.dropped(); len(d) != 1 || d[0].Class != "proof" {
		t.Errorf("the record is %+v", d)
	}
}

// TestManyDebtsAreSentInBursts, the first due first, and all of them.
func TestManyDebtsAreSentInBursts(t *testing.T) {
	var d debts
	now := time.Now()
	for i := range 3*resendBurst + 1 {
		d.add(fmt.Sprint(i), now)
		d.add(fmt.Sprint(i), now) // once is enough
	}
	d.settle("0")
	d.settle("0")
	if got, next := d.due(now); len(got) != 0 || next <= 0 || next > firstResend {
		t.Errorf("%d are due at once, the next in %s", len(got), next)
	}
	d.allDue(now)
	seen := map[string]bool{}
	for round := range 3 {
		got, next := d.due(now)
		if len(got) != resendBurst || round < 2 && next != resendGap || next < resendGap || next > lastResend {
			t.Errorf("round %d: %d are due, the next in %s", round, len(got), next)
		}
		for _, id := range got {
			seen[id] = true
		}
	}
	if len(seen) != 3*resendBurst || seen["0"] {
		t.Errorf("%d were sent", len(seen))
	}
	for id := range seen {
		d.settle(id)
	}
	if got, next := d.due(now.Add(time.Hour)); len(got) != 0 || next != 0 || len(d.of) != 0 {
		t.Errorf("nothing is owed, and %d are due, the next in %s", len(got), next)
	}
}

func TestEveryClassHasItsWorth(t *testing.T) {
	order := []class{classOf(wire.KindAudit), classOf(wire.KindChunkStore), classOf(wire.KindJobRun), classOf(wire.KindUpdateInstall)}
	var worth []int
	for _, c := range order {
		worth = append(worth, c.worth())
	}
	if !reflect.DeepEqual(worth, []int{0, 1, 2, 3}) || classOf("x").worth() != 2 || class("").worth() != 2 {
		t.Errorf("%v", worth)
	}
}

// TestAStrippedReportHasANumberOfItsOwn while it is owed: an acknowledgement of
// what was sent before counts too. One that is acknowledged keeps its own.
func TestAStrippedReportHasANumberOfItsOwn(t *testing.T) {
	r := newRig(t, nil, small(1<<20, inMemory))
	r.do(wire.KindJobRun, "a")
	full, _, _ := r.journal.get("a")
	owed, err := r.out.strip(full)
	if err != nil || owed.Seq <= full.Seq || owed.Was != full.Seq || owed.lost <= 0 {
		t.Errorf("number %d became %d, was %d, lost %d (%v)", full.Seq, owed.Seq, owed.Was, owed.lost, err)
	}
	full.Acked = true
	if known, err := r.out.strip(full); err != nil || known.Seq != full.Seq || known.lost != 0 {
		t.Errorf("number %d became %d, lost %d (%v)", full.Seq, known.Seq, known.lost, err)
	}
}

func TestAWrongClockForgetsNothing(t *testing.T) {
	j, err := openJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	clock := NewClock(time.Time{})
	clock.system = (&hardware{time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC)}).now
	box := outbox{journal: j, bound: 1, clock: clock}
	look := func() {
		t.Helper()
		for what, tidy := range map[string]func() error{"housekeeping": func() error { return forget(j, clock) }, "a full outbox": func() error { box.next = time.Time{}; return box.sweep(1, classProof) }} {
			if err := j.put(entry{Order: "a", Acked: true, Bare: true, Expires: time.Now().Add(-time.Hour)}); err != nil {
				t.Fatal(err)
			}
			if err := tidy(); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			_, there, err := j.get("a")
			if err != nil {
				t.Fatal(err)
			}
			if there == clock.trusted {
				t.Errorf("%s with a trusted clock %t: it is there: %t", what, clock.trusted, there)
			}
		}
	}
	look()
	clock.Trust(time.Now(), 0)
	look()
}
