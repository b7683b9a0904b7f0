package coordinator

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// score is what is thought of one device: evidence, each kind for itself, that
// fades with time. Three figures come of it, and nothing that lowers one is kept
// from who asks why. The one about results of jobs is package trust's.
//
// # The figures
//
// All are the expectation of a beta distribution (Jøsang and Ismail, "The Beta
// Reputation System", 2002) with the prior weight W and the base rate 1 of
// Jøsang's "Subjective Logic" (2016), section 3.3: nothing speaks against who is
// not known.
//
//	integrity    = (r + W) / (r + W + 40·wrong + 2·lost + ½·confessed)   r = min(right, cap)
//	reachability = (a + W) / (a + W + unreachable + ½·refused)           a = min(answered, cap)
//	compute      = see [trust.Standing.Figure]
//
// Evidence halves in 30 days for integrity, in 7 for reachability, which is a
// matter of links more than of character. It is counted by challenge, not by leaf,
// and good evidence up to a cap, so that a long good time buys no lie. Both good
// and bad fade, and with W both figures then go back to 1; time alone lowers none.
//
//   - wrong costs at once what makes a device distrusted: an honest agent never
//     answers with what does not verify, it says that it is lost.
//   - lost is an honest disk that fails. It costs a twentieth of a lie, a
//     confession before anybody asked a quarter of that.
//   - refused and unreachable say nothing about what the device holds, and leave
//     integrity alone; any answer, a wrong one too, says that it was reached.
//   - A wrong result of a job is about compute alone: what a device holds, it proves by
//     other means. A job that it refused, or that failed, counts for nothing, as
//     it is its owner who says what jobs it does.
//   - void counts for nothing.
//
// # What follows
//
// A device below distrustBelow of integrity, or below awayBelow of reachability,
// gets no new chunks, and what it holds counts as endangered
// ([audits.distrusted]). Above, trust is the product of both figures. One wrong answer
// of a device with the best past makes an integrity of 30/70 = 0.43, which is at
// ½ again after 12 days without another, and at 0.9 after 107.
type score struct {
	At          time.Time      `json:"at"` // when what follows was as much as it says
	Right       float64        `json:"right,omitempty"`
	Wrong       float64        `json:"wrong,omitempty"`
	Lost        float64        `json:"lost,omitempty"`
	Confessed   float64        `json:"confessed,omitempty"`
	Answered    float64        `json:"answered,omitempty"`
	Refused     float64        `json:"refused,omitempty"`
	Unreachable float64        `json:"unreachable,omitempty"`
	Compute     trust.Standing `json:"compute,omitzero"`
	// Counted are the challenges that were counted last, so that none is twice.
	Counted []string `json:"counted,omitempty"`
	// Missed is the order by which a read has found a loss last, and when: other losses
	// that reads find soon after are the same one.
	Missed    string        `json:"missed,omitempty"`
	MissedAt  time.Time     `json:"missed_at,omitzero"`
	Penalties []api.Penalty `json:"penalties,omitempty"` // the oldest first
}

const (
	integrityHalf    = 30 * 24 * time.Hour
	reachabilityHalf = 7 * 24 * time.Hour
	priorWeight      = 10.0
	goodCap          = 20.0
	wrongWeight      = 40.0
	lostWeight       = 2.0
	confessedWeight  = 0.5
	refusedWeight    = 0.5
	distrustBelow    = 0.5
	awayBelow        = 0.3
	maxCounted       = 32
)

func halved(v float64, age, half time.Duration) float64 {
	return v * math.Exp2(-float64(max(age, 0))/float64(half))
}

// aged is the score at a time after At.
func (s score) aged(now time.Time) score {
	age := now.Sub(s.At)
	if age <= 0 {
		return s
	}
	for _, v := range []*float64{&s.Right, &s.Wrong, &s.Lost, &s.Confessed} {
		*v = halved(*v, age, integrityHalf)
	}
	for _, v := range []*float64{&s.Answered, &s.Refused, &s.Unreachable} {
		*v = halved(*v, age, reachabilityHalf)
	}
	s.At, s.Compute = now, s.Compute.Aged(now)
	return s
}

func (s score) integrity() float64 {
	good := priorWeight + min(s.Right, goodCap)
	return good / (good + wrongWeight*s.Wrong + lostWeight*s.Lost + confessedWeight*s.Confessed)
}

func (s score) reachability() float64 {
	good := priorWeight + min(s.Answered, goodCap)
	return good / (good + s.Unreachable + refusedWeight*s.Refused)
}

func (s score) distrusted() bool {
	return s.integrity() < distrustBelow || s.reachability() < awayBelow
}

func (s score) trust() float64 {
	if s.distrusted() {
		return 0
	}
	return s.integrity() * s.reachability()
}

// count takes in how a challenge ended; what it cost, if it did, is the penalty.
// A challenge that was counted before gives what it cost then.
func (s *score) count(rec api.Audit, now time.Time) *api.Penalty {
	if slices.Contains(s.Counted, rec.ID) {
		return s.penaltyOf(rec.ID)
	}
	*s = s.aged(now)
	before := *s
	figure, cause := api.Integrity, string(rec.Outcome)
	job := rec.Kind == api.ComputeAudit || rec.Kind == api.DisputeAudit
	switch rec.Outcome {
	case api.AuditRight:
		s.Answered++
		if job {
			s.Compute.Confirm(rec.CPUSeconds, now)
		} else {
			s.Right++
		}
	case api.AuditWrong:
		s.Answered++
		if job {
			figure = api.Compute
			s.Compute.Lied(rec.CPUSeconds, now)
		} else {
			s.Wrong++
		}
	case api.AuditLost:
		if rec.Kind == api.Confession {
			s.Confessed++
			cause = string(api.Confession)
			break
		}
		s.Lost++
		s.Answered++
	case api.AuditRefused:
		if job {
			break
		}
		s.Refused++
		figure = api.Reachability
	case api.AuditUnreachable:
		s.Unreachable++
		figure = api.Reachability
	default:
		return nil
	}
	s.At = now
	s.Counted = newestOf(append(s.Counted, rec.ID), maxCounted)
	if rec.Kind == api.ComputeAudit {
		s.Compute.Challenged(now)
	}
	was, is := before.figure(figure), s.figure(figure)
	if is >= was {
		return nil
	}
	s.Penalties = newestOf(append(s.Penalties, api.Penalty{At: now.UTC(), Figure: figure, Cause: cause, Amount: was - is, Before: was, After: is, Audit: rec.ID}), api.MaxPenalties)
	return s.penaltyOf(rec.ID)
}

func (s score) figure(f api.Figure) float64 {
	switch f {
	case api.Reachability:
		return s.reachability()
	case api.Compute:
		return s.Compute.Figure()
	}
	return s.integrity()
}

func newestOf[T any](list []T, n int) []T { return slices.Clone(list[max(0, len(list)-n):]) }

func (s score) penaltyOf(audit string) *api.Penalty {
	for _, p := range slices.Backward(s.Penalties) {
		if p.Audit == audit {
			return &p
		}
	}
	return nil
}

// view is the score as operators see it.
func (s score) view() api.Score {
	v := api.Score{Integrity: s.integrity(), Reachability: s.reachability(), Compute: s.Compute.Figure(), Trust: s.trust(), Distrusted: s.distrusted(),
		Evidence: make(map[string]float64), Penalties: slices.Clone(s.Penalties)}
	slices.Reverse(v.Penalties)
	for name, n := range map[string]float64{"right": s.Right, "wrong": s.Wrong, "lost": s.Lost, "confessed": s.Confessed,
		"answered": s.Answered, "refused": s.Refused, "unreachable": s.Unreachable} {
		if n >= 0.005 {
			v.Evidence[name] = math.Round(n*100) / 100
		}
	}
	return v
}

// scoreOf is a device's score now.
func (a *audits) scoreOf(d wire.DeviceID) score {
	s, _ := a.scores.get(string(d))
	return s.aged(a.outbox.now())
}

// count has a challenge that has ended count, once.
func (a *audits) count(ctx context.Context, rec api.Audit) (p *api.Penalty, err error) {
	_, err = a.scores.change(ctx, string(rec.Device), func(s *score, _ bool) error {
		p = s.count(rec, a.outbox.now())
		return nil
	})
	return p, err
}

// trust is how far new chunks may be entrusted to a device: 1 for one that
// nothing is known against, 0 for one that gets nothing new.
func (a *audits) trust(d wire.DeviceID) float64 { return a.scoreOf(d).trust() }

// distrusted tells whether what a device holds is to be held elsewhere, too.
func (a *audits) distrusted(d wire.DeviceID) bool { return a.scoreOf(d).distrusted() }

// maxConfessed is how many chunks the record of a confession names; its evidence
// has them all.
const maxConfessed = 1000

// missedApart is how long after a confession what a read finds missing is another loss.
const missedApart = time.Hour

// confessed notes that a device has told of chunks that it lost before it was
// asked for them. The order is the one whose signed report says so; called again
// for the same one, it counts once.
func (a *audits) confessed(ctx context.Context, d wire.DeviceID, ids []string, order string) error {
	if len(ids) == 0 {
		return nil
	}
	return a.confess(ctx, d, ids, order, "the device says by itself that it has lost "+chunksOf(len(ids)))
}

// missed notes that a device was told to serve a chunk that it should hold, and has
// answered, by that order, that it does not have it. Which chunks of a failing disk
// are read first is chance, and so is how many: what comes within missedApart of
// another confession is of the same loss, and costs nothing more.
func (a *audits) missed(ctx context.Context, d wire.DeviceID, id, order string) error {
	now, first := a.outbox.now().UTC(), false
	// Several coordinators may find it at once: who writes it down first, counts it.
	_, err := a.scores.change(ctx, string(d), func(s *score, _ bool) error {
		first = s.Missed == order
		if first || now.Sub(s.MissedAt) < missedApart || slices.ContainsFunc(s.Penalties, func(p api.Penalty) bool {
			return p.Cause == string(api.Confession) && p.Audit != order && now.Sub(p.At) < missedApart
		}) {
			return errUnchanged
		}
		s.Missed, s.MissedAt, first = order, now, true
		return nil
	})
	if err != nil || !first {
		return err
	}
	return a.confess(ctx, d, []string{id}, order, "the device does not have a chunk that it was told to serve")
}

func (a *audits) confess(ctx context.Context, d wire.DeviceID, ids []string, order, reason string) error {
	rec := api.Audit{ID: order, Kind: api.Confession, Device: d, Order: order, At: a.outbox.now().UTC(), Routine: true, Outcome: api.AuditLost,
		Lost: ids[:min(len(ids), maxConfessed)], Reason: reason}
	if old, err := a.rows.find(ctx, auditKey(rec)); err == nil {
		if old.Penalty == nil { // a coordinator ended before it was counted
			_, err = a.finish(ctx, old)
		}
		return err
	} else if !errors.Is(err, errNotFound) {
		return err
	}
	v, err := a.outbox.get(ctx, d, order)
	if err != nil && !errors.Is(err, errNotFound) {
		return err
	}
	if err == nil {
		rec.Report = v.Report
		if rec.Evidence, err = a.keepEvidence(ctx, rec, v, nil); err != nil {
			return err
		}
	}
	_, err = a.conclude(ctx, rec)
	return err
}

// keyOf is a device's public key.
func (a *audits) keyOf(d wire.DeviceID) (ed25519.PublicKey, error) {
	rec, err := a.storage.reg.device(d)
	if err == nil && len(rec.PublicKey) != ed25519.PublicKeySize {
		err = fmt.Errorf("the record of device %s has no key", d)
	}
	return rec.PublicKey, err
}
