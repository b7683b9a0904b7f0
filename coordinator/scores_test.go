package coordinator

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// counted counts n challenges with an outcome, and gives what the last one cost.
func (s *score) counted(n int, kind api.AuditKind, o api.AuditOutcome, at time.Time) (p *api.Penalty) {
	for i := range n {
		p = s.count(api.Audit{ID: fmt.Sprintf("%s-%s-%s-%d", kind, o, at, i), Kind: kind, Outcome: o}, at)
	}
	return p
}

func near(a, b float64) bool { return math.Abs(a-b) < 1e-9 }

func TestEachOutcomeMovesItsFigureAndNoOther(t *testing.T) {
	for _, c := range []struct {
		kind                    api.AuditKind
		outcome                 api.AuditOutcome
		integrity, reachability float64 // after one, of a device with a full past
		compute                 float64 // of one that has done no job before
		figure                  api.Figure
	}{
		{api.StorageAudit, api.AuditRight, 1, 1, 1, ""},
		{api.StorageAudit, api.AuditVoid, 1, 1, 1, ""},
		{api.StorageAudit, api.AuditPending, 1, 1, 1, ""},
		{api.StorageAudit, api.AuditWrong, 30. / 70, 1, 1, api.Integrity},
		{api.ComputeAudit, api.AuditWrong, 1, 1, 10. / 60, api.Compute},
		{api.DisputeAudit, api.AuditWrong, 1, 1, 10. / 60, api.Compute},
		{api.ComputeAudit, api.AuditRight, 1, 1, 1, ""},
		{api.ComputeAudit, api.AuditRefused, 1, 1, 1, ""}, // its owner says what jobs it does
		{api.ComputeAudit, api.AuditLost, 30. / 32, 1, 1, api.Integrity},
		{api.ComputeAudit, api.AuditUnreachable, 1, 30. / 31, 1, api.Reachability},
		{api.StorageAudit, api.AuditLost, 30. / 32, 1, 1, api.Integrity},
		{api.Confession, api.AuditLost, 30. / 30.5, 1, 1, api.Integrity},
		{api.StorageAudit, api.AuditRefused, 1, 30. / 30.5, 1, api.Reachability},
		{api.StorageAudit, api.AuditUnreachable, 1, 30. / 31, 1, api.Reachability},
	} {
		t.Run(string(c.kind)+" "+string(c.outcome), func(t *testing.T) {
			var s score
			s.counted(50, api.StorageAudit, api.AuditRight, epoch)
			p := s.counted(1, c.kind, c.outcome, epoch)
			if v := s.view(); !near(v.Integrity, c.integrity) || !near(v.Reachability, c.reachability) || !near(v.Compute, c.compute) {
				t.Errorf("integrity %v, reachability %v, compute %v; want %v, %v, %v", v.Integrity, v.Reachability, v.Compute, c.integrity, c.reachability, c.compute)
			}
			if c.figure == "" {
				if p != nil || len(s.Penalties) > 0 {
					t.Errorf("it cost %+v", p)
				}
				return
			}
			if p == nil || p.Figure != c.figure || p.Before != 1 || !near(p.Amount, p.Before-p.After) || !near(p.After, min(c.integrity, c.reachability, c.compute)) || !p.At.Equal(epoch) || p.Audit == "" || p.Cause == "" {
				t.Errorf("%+v", p)
			}
		})
	}
}

func TestALieCostsMoreThanALossAndALossMoreThanAConfession(t *testing.T) {
	var lie, loss, told score
	a := lie.counted(1, api.StorageAudit, api.AuditWrong, epoch)
	b := loss.counted(1, api.StorageAudit, api.AuditLost, epoch)
	c := told.counted(1, api.Confession, api.AuditLost, epoch)
	if !(a.Amount > 4*b.Amount && b.Amount > 3*c.Amount && c.Amount > 0) {
		t.Errorf("a lie costs %v, a loss %v, a confession %v", a.Amount, b.Amount, c.Amount)
	}
	if lie.trust() != 0 || !lie.distrusted() || loss.distrusted() || told.trust() < 0.9 {
		t.Errorf("trust %v, %v, %v", lie.trust(), loss.trust(), told.trust())
	}
}

// A good past of any length does not pay for a lie.
func TestALongGoodTimeBuysNoLie(t *testing.T) {
	var s score
	s.counted(100_000, api.StorageAudit, api.AuditRight, epoch)
	s.counted(1, api.StorageAudit, api.AuditWrong, epoch)
	if !s.distrusted() || s.trust() != 0 {
		t.Errorf("integrity %v after it", s.integrity())
	}
}

// Whatever never answers is given nothing new, and is no liar.
func TestSilenceLowersReachabilityAlone(t *testing.T) {
	var s score
	s.counted(200, api.StorageAudit, api.AuditUnreachable, epoch)
	s.counted(200, api.StorageAudit, api.AuditRefused, epoch)
	if s.integrity() != 1 || !s.distrusted() || s.trust() != 0 {
		t.Errorf("integrity %v, reachability %v, trust %v", s.integrity(), s.reachability(), s.trust())
	}
	if later := s.aged(epoch.Add(60 * 24 * time.Hour)); later.distrusted() || later.trust() < 0.9 {
		t.Errorf("after two months: reachability %v", later.reachability())
	}
}

func TestEvidenceHalvesAndTimeAloneLowersNothing(t *testing.T) {
	var s score
	s.counted(8, api.StorageAudit, api.AuditRight, epoch)
	s.counted(1, api.StorageAudit, api.AuditWrong, epoch)
	s.counted(3, api.StorageAudit, api.AuditUnreachable, epoch)
	month := s.aged(epoch.Add(integrityHalf))
	if !near(month.Right, 4) || !near(month.Wrong, 0.5) || !near(s.aged(epoch.Add(reachabilityHalf)).Unreachable, 1.5) {
		t.Errorf("%+v", month)
	}
	two := s.aged(epoch.Add(time.Hour)).aged(epoch.Add(integrityHalf))
	if !near(two.Right, month.Right) || !near(two.Unreachable, month.Unreachable) {
		t.Error("two steps of time are not as one")
	}
	last := s
	for day := range 400 {
		now := s.aged(epoch.Add(time.Duration(day) * 24 * time.Hour))
		if now.integrity() < last.integrity()-1e-12 || now.reachability() < last.reachability()-1e-12 {
			t.Fatalf("day %d: %v, %v; the day before %v, %v", day, now.integrity(), now.reachability(), last.integrity(), last.reachability())
		}
		last = now
	}
	if last.integrity() < 0.99 || last.reachability() < 0.99 {
		t.Errorf("after a year %v, %v", last.integrity(), last.reachability())
	}
	if back := s.aged(epoch.Add(-time.Hour)); back.Right != s.Right {
		t.Error("a clock that is set back makes evidence")
	}
	// What the comment of score says of one lie.
	s = score{}
	s.counted(50, api.StorageAudit, api.AuditRight, epoch)
	s.counted(1, api.StorageAudit, api.AuditWrong, epoch)
	when := func(level float64) (days int) {
		for t := s; t.integrity() < level; days++ {
			// three right ones a day go on
			at := epoch.Add(time.Duration(days+1) * 24 * time.Hour)
			t = t.aged(at)
			t.Right += 3
			if days > 1000 {
				break
			}
		}
		return days
	}
	if a, b := when(distrustBelow), when(0.9); a != 13 || b != 108 {
		t.Errorf("½ after %d days, 0.9 after %d", a, b)
	}
}

func TestAChallengeCountsOnce(t *testing.T) {
	var s score
	first := s.counted(1, api.StorageAudit, api.AuditWrong, epoch)
	before := s.integrity()
	again := s.counted(1, api.StorageAudit, api.AuditWrong, epoch)
	if again == nil || *again != *first || s.integrity() != before || len(s.Penalties) != 1 {
		t.Errorf("%+v, then %+v", first, again)
	}
}

func TestTheLastHundredPenaltiesAreKept(t *testing.T) {
	var s score
	for i := range 150 {
		s.count(api.Audit{ID: fmt.Sprint(i), Kind: api.StorageAudit, Outcome: api.AuditLost}, epoch.Add(time.Duration(i)*time.Hour))
	}
	v := s.view()
	if len(v.Penalties) != api.MaxPenalties || v.Penalties[0].Audit != "149" || v.Penalties[99].Audit != "50" || len(s.Counted) != maxCounted {
		t.Errorf("%d penalties, %d counted", len(v.Penalties), len(s.Counted))
	}
}

func TestTrustFollowsFromWhatADeviceDid(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d, _, _ := auditScene(t, w)
	if w.audits.trust(d.id) != 1 || w.audits.distrusted(d.id) || w.audits.trust("nobody") != 1 {
		t.Error("something is held against who is not known")
	}
	d.on(wire.KindAudit, func(o wire.Order) *reply {
		return d.prove(o, func(_ *wire.AuditAnswer, l []wire.AuditLeaf) []wire.AuditLeaf { return l[1:] })
	})
	a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id})
	must(t, err)
	if w.audits.trust(d.id) != 0 || !w.audits.distrusted(d.id) {
		t.Errorf("after a lie: trust %v", w.audits.trust(d.id))
	}
	v, err := w.op.Device(testContext(t), string(d.id))
	must(t, err)
	if s := v.Score; s == nil || !near(s.Integrity, 0.2) && s.Integrity > 0.21 || !s.Distrusted || len(s.Penalties) != 1 || s.Penalties[0].Audit != a.ID || a.Penalty == nil || s.Penalties[0] != *a.Penalty {
		t.Errorf("shown as %+v, the challenge's own %+v", v.Score, a.Penalty)
	}
	w.advance(2 * integrityHalf)
	if w.audits.distrusted(d.id) || w.audits.trust(d.id) >= 0.9 {
		t.Errorf("after two months: trust %v", w.audits.trust(d.id))
	}
}

func TestAConfessionCountsOnceAndHasARecord(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d, _, chunks := auditScene(t, w)
	d.on(wire.KindChunkLosses, func(wire.Order) *reply {
		return &reply{state: wire.Succeeded, body: wire.LossReport{Digest: wire.LossDigest(chunks[:2]), Count: 2},
			attachment: fmt.Appendf(nil, `[{"id":%q,"size":40,"volume":"v1"},{"id":%q,"size":1,"volume":"v1"}]`, chunks[0], chunks[1])}
	})
	o, err := w.outbox.submit(ctx, d.id, wire.KindChunkLosses, struct{}{}, time.Minute)
	must(t, err)
	_, err = w.outbox.await(ctx, o, nil)
	must(t, err)
	must(t, w.audits.confessed(ctx, d.id, chunks[:2], o.ID))
	for i := range maxCounted { // so that the score itself does not remember
		_, err := w.audits.count(ctx, api.Audit{ID: fmt.Sprint(i), Kind: api.StorageAudit, Device: d.id, Outcome: api.AuditRight})
		must(t, err)
	}
	must(t, w.audits.confessed(ctx, d.id, chunks[:2], o.ID))
	s := w.audits.scoreOf(d.id)
	if len(s.Penalties) != 1 || s.Penalties[0].Cause != string(api.Confession) || s.Penalties[0].Audit != o.ID || !near(s.Confessed, 1) && s.Confessed < 0.99 {
		t.Errorf("%+v", s)
	}
	a, err := w.op.AuditByID(ctx, o.ID)
	if err != nil || a.Kind != api.Confession || a.Outcome != api.AuditLost || len(a.Lost) != 2 || a.Penalty == nil || !a.Evidence {
		t.Errorf("%+v %v", a, err)
	}
	raw, err := w.op.Evidence(ctx, o.ID)
	must(t, err)
	if v, err := CheckEvidence(raw, EvidenceChecks{}); err != nil || len(v.Lost) != 2 {
		t.Errorf("%+v %v", v, err)
	}
	if st := w.statusNow(t); st.Challenges[api.AuditLost] != 0 {
		t.Error("a confession counts as a challenge that failed")
	}
}
