package coordinator

import (
	"context"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// looked waits until all that a device has done was looked through.
func (w *world) looked(t testing.TB, d *device) {
	t.Helper()
	eventually(t, "all that it has done is looked through", func() bool {
		_, ok := w.jobs.caught.get(string(d.id))
		return !ok
	})
}

// only is the one task of a job, as it is kept.
func (w *world) only(t testing.TB, job string) taskRow {
	t.Helper()
	row, err := w.jobs.tasks.find(testContext(t), taskKey(job, 0))
	must(t, err)
	return row
}

// lied has a device caught, as if by a challenge.
func (w *world) lied(t testing.TB, d *device) {
	t.Helper()
	must(t, w.jobs.noteCaught(testContext(t), api.Audit{ID: "by hand", Device: d.id}))
	_, err := w.audits.scores.change(testContext(t), string(d.id), func(s *score, _ bool) error {
		s.Compute.Lied(10, w.time())
		return nil
	})
	must(t, err)
	w.jobs.poke()
}

// That somebody's results are to be looked through is on record before a lie costs him anything,
// and what it costs before the task forgets that there was something: whoever is killed in between
// finds it again.
func TestWhatALieCostsIsKeptInAnOrderThatNoCrashLoses(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 2)
	ds[0].lies()
	w.putFile(t, "in", someBytes(100), 2)
	type moment struct {
		before, after, marked, checking bool
	}
	seen := make(chan moment, 8)
	note := w.audits.caught
	w.audits.caught = func(ctx context.Context, rec api.Audit) error {
		var m moment
		m.before = w.audits.honesty.standing(rec.Device).Distrusted()
		w.jobs.tasks.each(func(_ string, row taskRow) bool {
			m.checking = m.checking || row.Checking || !row.State.Terminal()
			return true
		})
		err := note(ctx, rec)
		_, m.marked = w.jobs.caught.get(string(rec.Device))
		m.after = w.audits.honesty.standing(rec.Device).Distrusted()
		seen <- m
		return err
	}
	q := input(w.module(t), "in")
	q.Verify = api.VerifyAlways
	_, err := w.op.RunJob(testContext(t), q)
	must(t, err)
	if m := next(t, seen, "the lie"); m.before || m.after || !m.marked || !m.checking {
		t.Errorf("when it was noted: cost before %v, after %v; on record %v; the task is looked at %v", m.before, m.after, m.marked, m.checking)
	}
	eventually(t, "it is caught", func() bool { return w.audits.honesty.standing(ds[0].id).Distrusted() })
}

// What enough others stand behind is not run again because one of them lies elsewhere.
func TestWhatOthersStandBehindIsNotRunAgain(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 2)
	q := api.JobSpec{Module: w.module(t), Copies: 2}
	two, err := w.op.RunJob(testContext(t), q)
	wantSure(t, two, err, api.ByOwners, "")
	w.device(t)
	q.Copies = 3
	three, err := w.op.RunJob(testContext(t), q)
	wantSure(t, three, err, api.ByOwners, "")
	w.lied(t, ds[0])
	w.looked(t, ds[0])
	if row := w.only(t, two.Job); !row.Case.Doubted {
		t.Errorf("one that is not caught stands behind it: %+v", row)
	}
	if row := w.only(t, three.Job); row.Case.Doubted || row.Checking || row.VerifiedBy != api.ByOwners {
		t.Errorf("two that are not caught stand behind it: %+v", row)
	}
}

// Of who is doubted, only what was believed for his reputation is run: what another owner has
// said too was no more than compared.
func TestOfWhoIsDoubtedOnlyWhatRestsOnHisReputationIsRun(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	ds := w.devices(t, 2)
	q := api.JobSpec{Module: w.module(t)}
	both, err := w.op.RunJob(testContext(t), q)
	wantSure(t, both, err, api.ByOwners, "")
	w.trusts(t, ds[0])
	q.Needs = on(ds[0])
	alone, err := w.op.RunJob(testContext(t), q)
	wantSure(t, alone, err, api.ByReputation, "")
	must(t, w.audits.honesty.doubt(testContext(t), ds[0].id, "another module"))
	w.looked(t, ds[0])
	if row := w.only(t, alone.Job); !row.Case.Doubted {
		t.Errorf("it rests on who is doubted: %+v", row)
	}
	if row := w.only(t, both.Job); row.Case.Doubted || row.Checking || row.VerifiedBy != api.ByOwners {
		t.Errorf("another owner has it, too: %+v", row)
	}
}

// Who is caught again while his results are looked through has them looked through again.
func TestALieDuringAReviewIsReviewed(t *testing.T) {
	t.Parallel()
	w := sureWorld(t)
	d := w.device(t)
	must(t, w.jobs.noteCaught(testContext(t), api.Audit{ID: "first", Device: d.id})) // not looked at before it costs something
	first, _ := w.jobs.caught.get(string(d.id))
	must(t, w.jobs.noteCaught(testContext(t), api.Audit{ID: "second", Device: d.id}))
	must(t, w.jobs.review(testContext(t), d.id, first))
	if row, ok := w.jobs.caught.get(string(d.id)); !ok || row.Challenge != "second" {
		t.Errorf("%+v %v", row, ok)
	}
	second, _ := w.jobs.caught.get(string(d.id))
	must(t, w.jobs.review(testContext(t), d.id, second))
	w.looked(t, d)
}
