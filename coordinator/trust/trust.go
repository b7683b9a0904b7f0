// Package trust decides whose results of jobs are believed, and who is caught lying. It
// does nothing itself: it has no clock, no luck and no network, and says what follows.
//
// # What a liar is up against
//
//   - Challenges. A share of a device's jobs ([Standing.Share]: a fifth of a new one's, a
//     twentieth of a trusted one's, never none) are jobs whose result the coordinator has
//     worked out beforehand. Whether one is due after a job is drawn by itself each time
//     ([Standing.Challenge]), so nothing foretells it.
//   - Company. A job of a device that is not trusted is done by a second one, too, and one
//     of a trusted device now and then ([NewCase]). No owner has two of them ([Pick]).
//   - A third eye. Where two agree, a third owner does the job, too, after the result was
//     given out: of a fifth of the jobs of new devices, and always where a trusted one was
//     given company. Who lies only when both have the same job is found by that.
//   - Time. What others confirm earns little a day, with one owner and with all, and a part of
//     what makes a device trusted the coordinator must have worked out itself
//     ([Standing.Agree]). So two who agree do not make each other trusted.
//   - The coordinator itself. Whenever two results differ, it runs the job. Nobody pays for
//     being outvoted: only what the coordinator has worked out itself, before or after,
//     makes a lie. So no majority of liars gets an honest device punished.
//
// A lie that is told in a share of jobs, of which a share is looked at, has the chance p,
// the product of both, to be found with each job, and is found with 99% within
// ln(0.01)/ln(1-p) jobs ([Within]): p of 20% takes 21 jobs, of 10% 44, of 5% 90, of 1% 459.
//
// # Who is protected
//
// A result that a device could not give is no lie: a limit of its owner, silence, a job
// that failed. Processors differ in the bits of what is not a number, so a module may have
// another result on another engine, and no device has lied then. A result from
// an engine that is not the coordinator's is a lie only if two devices of other owners, on
// that same engine, say what the coordinator says ([Case]). If nobody can vouch for either,
// it is a doubt: the device counts as new, and gets no jobs of that module for a while; over
// several modules, none at all. That an engine has a result of its own, devices of three owners must
// say who are not near to one another ([Copy]): a league that came in by one token clears nobody.
// A name of an engine that the device cannot have ([Runs]) is none, and nobody can vouch for it.
//
// # Memory
//
// A [Standing] fades slowly, is not worn by time alone, and begins anew, but for the
// lies, when engine or agent of the device change: another program is another
// worker, and who has changed sides with an update has no credit to spend.
package trust

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"time"
)

// Runtime is what a device runs jobs with.
type Runtime struct {
	Engine string `json:"engine,omitempty"` // as in [wire.JobResult]
	Agent  string `json:"agent,omitempty"`  // version of the agent
}

// Standing is what is known of one device's results. The zero value is a device that
// nothing is known of. Counts fade by half in [HalfLife].
type Standing struct {
	At         time.Time `json:"at,omitzero"`           // when the counts were as they say
	Right      float64   `json:"right,omitempty"`       // results that were confirmed, each by its [Weight]
	Proven     float64   `json:"proven,omitempty"`      // of that, what the coordinator itself has worked out
	Wrong      float64   `json:"wrong,omitempty"`       // results that were proved wrong, each by one more than that
	Jobs       float64   `json:"jobs,omitempty"`        // results that customers got of it
	Challenges float64   `json:"challenges,omitempty"`  // that it was given
	Doubts     []Doubt   `json:"doubts,omitempty"`      // the newest of up to three modules, the oldest first
	Runtime    Runtime   `json:"runtime,omitzero"`      // that Right was earned with
	Since      time.Time `json:"since,omitzero"`        // when it was first seen with that
	ResetBy    string    `json:"reset_by,omitempty"`    // a sentence: why it began anew then; empty if it did not
	ResetRight float64   `json:"reset_right,omitempty"` // what Right was before
	// Company is what was earned since CompanySince, for a day, by having the same result as
	// devices of each owner ([Copy.Likely]).
	Company      map[string]float64 `json:"company,omitempty"`
	CompanySince time.Time          `json:"company_since,omitzero"`
	// Never is a sentence: why it is not trusted now, whatever it has earned. It follows
	// from the fleet, and is not kept.
	Never string `json:"-"`
}

// Doubt is a result that differs from the coordinator's and that nobody could vouch for
// or against.
type Doubt struct {
	At     time.Time `json:"at"`
	Module string    `json:"module"`
}

// HalfLife is in what time evidence loses half of its weight: twice as long as that of
// storage, as there is less of it.
const HalfLife = 60 * 24 * time.Hour

const (
	priorWeight = 10.0
	// goodCap bounds what a good past is worth, so that no length of it buys a lie.
	goodCap       = 20.0
	wrongWeight   = 40.0
	trustedAbove  = 0.9 // of the figure
	distrustBelow = 0.5 // of the figure
	// trustedFrom is how much of Right makes a device trusted: as many whole jobs as it
	// takes to find who lies in one of ten. More than twice that is not kept, so that
	// trust ends within a [HalfLife] of doing nothing.
	trustedFrom = 44.0
	// provenFrom is how much of that the coordinator must have worked out itself: what owners
	// confirm each other costs them nothing if they are one.
	provenFrom = trustedFrom / 10
	// What company can earn a device within a day, with one other owner and with all: so that
	// no trust is bought in a minute by devices that agree on jobs which their owner gives them.
	companyPair, companyDay = 4.0, trustedFrom / 2
	companyEvery            = 24 * time.Hour

	newShare, trustedShare = 0.20, 0.05
	checkShare             = 0.20 // of the jobs that new devices have company in

	// A job of costUnit CPU seconds, or more, counts whole. Small ones count less: who
	// wants credit has to work for it.
	costUnit  = 10.0
	minWeight = 0.25

	doubtLife = 14 * 24 * time.Hour
	// asideFrom is over how many modules a device may be doubted before it gets no more
	// jobs for a while.
	asideFrom = 3
)

// Weight is what a result is worth by the CPU seconds that it cost, from 0.25 to 1. A
// device's own word on that is not to be believed: see [Verdict].
func Weight(cpuSeconds float64) float64 {
	if math.IsNaN(cpuSeconds) {
		return minWeight
	}
	return min(max(cpuSeconds/costUnit, minWeight), 1)
}

// Within is how many jobs it takes to find, with 99%, what has the chance p to be found
// with each of them.
func Within(p float64) int { return int(math.Ceil(math.Log(0.01) / math.Log1p(-p))) }

// Aged is the standing at a time after At.
func (s Standing) Aged(now time.Time) Standing {
	age := now.Sub(s.At)
	if age <= 0 {
		return s
	}
	left := math.Exp2(-float64(age) / float64(HalfLife))
	for _, v := range []*float64{&s.Right, &s.Proven, &s.Wrong, &s.Jobs, &s.Challenges, &s.ResetRight} {
		*v *= left
	}
	var doubts []Doubt
	for _, d := range s.Doubts {
		if now.Sub(d.At) < doubtLife {
			doubts = append(doubts, d)
		}
	}
	s.At, s.Doubts = now.UTC(), doubts
	return s
}

// Figure is from 0 to 1, and 1 where nothing is known against the device: the expectation
// of a beta distribution with the base rate 1, as the coordinator's other figures.
//
//	compute = (r + 10) / (r + 10 + 40·wrong)    r = min(right, 20)
func (s Standing) Figure() float64 {
	good := priorWeight + min(s.Right, goodCap)
	return good / (good + wrongWeight*s.Wrong)
}

// Distrusted is a device that lies, and gets no jobs.
func (s Standing) Distrusted() bool { return s.Figure() < distrustBelow }

// Aside is a device that gets no jobs: it lies, or is doubted over so many modules that
// there is no use in asking it.
func (s Standing) Aside() bool { return s.Distrusted() || len(s.Doubts) >= asideFrom }

// May tells whether the device may be given jobs of a module.
func (s Standing) May(module string) bool {
	return !s.Aside() && !slices.ContainsFunc(s.Doubts, func(d Doubt) bool { return d.Module == module })
}

// earned is from 0, of a new device, or one that is doubted or cannot be trusted, to 1.
func (s Standing) earned() float64 {
	if s.Figure() < trustedAbove || len(s.Doubts) > 0 || s.Never != "" {
		return 0
	}
	return min(s.Right/trustedFrom, s.Proven/provenFrom, 1)
}

// Trusted is a device whose result is believed without a second one's.
func (s Standing) Trusted() bool { return s.earned() == 1 }

// Share is the share of challenges among all jobs that the device is given, from 0.20 down
// to 0.05.
func (s Standing) Share() float64 { return newShare - (newShare-trustedShare)*s.earned() }

// Challenge tells whether, after a customer's job, a challenge is due. even is drawn
// evenly from [0, 1).
func (s Standing) Challenge(even float64) bool {
	q := s.Share()
	return even < q/(1-q)
}

// Under notes what the device runs jobs with. If that has changed, it is as new, but for
// lies and doubts. An empty part is not known and changes nothing.
func (s *Standing) Under(r Runtime, now time.Time) (reset bool) {
	was := s.Runtime
	if r.Engine == "" {
		r.Engine = was.Engine
	}
	if r.Agent == "" {
		r.Agent = was.Agent
	}
	if r == was {
		return false
	}
	*s = s.Aged(now)
	why := ""
	switch {
	case was.Engine != "" && r.Engine != was.Engine:
		why = fmt.Sprintf("its engine was %s and is %s", was.Engine, r.Engine)
	case was.Agent != "" && r.Agent != was.Agent:
		why = fmt.Sprintf("its agent was %s and is %s", was.Agent, r.Agent)
	}
	if s.Runtime = r; why == "" { // it is the first that is known
		if s.Since.IsZero() {
			s.Since = now.UTC()
		}
		return false
	}
	s.Since, s.ResetBy, s.ResetRight, s.Right, s.Proven = now.UTC(), why, s.Right, 0, 0
	return true
}

// Did counts a result that a customer got.
func (s *Standing) Did(now time.Time) {
	*s = s.Aged(now)
	s.At = now.UTC()
	s.Jobs++
}

// Challenged counts a challenge that was given.
func (s *Standing) Challenged(now time.Time) {
	*s = s.Aged(now)
	s.At = now.UTC()
	s.Challenges++
}

// Confirm counts a result that the coordinator has, too.
func (s *Standing) Confirm(cpuSeconds float64, now time.Time) {
	*s = s.Aged(now)
	w := Weight(cpuSeconds)
	s.At, s.Right, s.Proven = now.UTC(), min(s.Right+w, 2*trustedFrom), min(s.Proven+w, 2*trustedFrom)
}

// Agree counts a result that devices of these owners have, too; no more than a day's of each,
// and of all.
func (s *Standing) Agree(with []string, cpuSeconds float64, now time.Time) {
	*s = s.Aged(now)
	s.At = now.UTC()
	if age := now.Sub(s.CompanySince); age >= companyEvery || age < 0 {
		s.CompanySince, s.Company = now.UTC(), nil
	}
	left := companyDay
	for _, w := range s.Company {
		left -= w
	}
	whose, most := "", 0.0
	for _, o := range with {
		if m := companyPair - s.Company[o]; m > most {
			whose, most = o, m
		}
	}
	w := min(Weight(cpuSeconds), most, left)
	if w <= 0 {
		return
	}
	all := maps.Clone(s.Company) // that of a copy stays as it is
	if all == nil {
		all = make(map[string]float64)
	}
	all[whose] += w
	s.Company, s.Right = all, min(s.Right+w, 2*trustedFrom)
}

// Lied counts a result that is proved wrong. One of a job that costs nothing is enough to be
// distrusted, also with the best past; a costly one takes longer to be forgotten.
func (s *Standing) Lied(cpuSeconds float64, now time.Time) {
	*s = s.Aged(now)
	s.At = now.UTC()
	s.Wrong += 1 + Weight(cpuSeconds)
}

// Doubt counts a result that nobody can vouch for or against; the module is named by its
// SHA-256. What was confirmed before is forgotten: else a lie that nobody can prove would
// cost two weeks, and be believed without company again after them.
func (s *Standing) Doubt(module string, now time.Time) {
	s.Fail(module, now)
	s.Right, s.Proven = 0, 0
}

// Fail counts that a module failed on the device, and not on the coordinator. It says nothing
// about results that were given, so what was confirmed stays; but it is a doubt for as long as others.
func (s *Standing) Fail(module string, now time.Time) {
	*s = s.Aged(now)
	s.At = now.UTC()
	others := slices.DeleteFunc(slices.Clone(s.Doubts), func(d Doubt) bool { return d.Module == module })
	s.Doubts = append(others, Doubt{now.UTC(), module})
	s.Doubts = s.Doubts[max(0, len(s.Doubts)-asideFrom):]
}

// Needed is how much of Right makes a device trusted.
const Needed = trustedFrom

// Explain says in sentences what follows from the standing, and from what.
func (s Standing) Explain() (why []string) {
	say := func(format string, args ...any) { why = append(why, fmt.Sprintf(format, args...)) }
	switch {
	case s.Distrusted():
		say("it gets no jobs: a result of its was proved wrong, and half of what that counts is forgotten every %.0f days", HalfLife.Hours()/24)
	case s.Aside():
		say("it gets no jobs for %.0f days: over %d modules its results differ from the coordinator's, or there are none, and no other device with its engine could vouch for either", doubtLife.Hours()/24, len(s.Doubts))
	case s.Never != "":
		say("its results are not believed without another owner's device: %s", s.Never)
	case s.Trusted():
		say("its results are believed: %.1f were confirmed", s.Right)
	case s.Figure() < trustedAbove:
		say("its results are not believed without another owner's device: one was proved wrong")
	case len(s.Doubts) > 0:
		say("its results are not believed without another owner's device: over a module they differ from the coordinator's, or it failed there alone, and no other device with its engine could vouch for either; it gets no jobs of that module for %.0f days", doubtLife.Hours()/24)
	case s.Right >= trustedFrom:
		say("its results are not believed without another owner's device: %.1f were confirmed, but %.1f of them by the coordinator itself, and it takes %.1f; challenges among its jobs bring that", s.Right, s.Proven, provenFrom)
	default:
		say("its results are not believed without another owner's device: %.1f were confirmed, and %.0f make it trusted", s.Right, Needed)
	}
	if s.ResetBy != "" {
		say("it began anew: %s", s.ResetBy)
	}
	say("%.0f%% of its jobs are challenges, and it was given %.0f of them beside %.0f jobs", 100*s.Share(), s.Challenges, s.Jobs)
	return why
}
