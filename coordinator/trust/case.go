package trust

import (
	"cmp"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Case is one job and what devices say that its result is. Who runs the job keeps it, adds
// to it, and asks [Case.Next] each time what follows. Only for jobs that give the same
// result everywhere; one with the real clock cannot be compared.
type Case struct {
	Module  string   `json:"module"`          // SHA-256
	Copies  int      `json:"copies"`          // owners that have to agree before the result is given out
	Check   bool     `json:"check,omitempty"` // one more is asked after that
	Sent    []Copy   `json:"sent,omitempty"`  // all that were asked
	Answers []Answer `json:"answers,omitempty"`
	Own     *Own     `json:"own,omitempty"` // what the coordinator has worked out itself
	// Unable is why the coordinator cannot run this job: it cannot read an input, say.
	Unable string `json:"unable,omitempty"`
	// NoMore says that there is nobody left to ask; NoMoreLike that there is nobody with
	// one of these engines.
	NoMore     bool     `json:"no_more,omitempty"`
	NoMoreLike []string `json:"no_more_like,omitempty"`
	// Doubted says that somebody who stood behind the result was caught lying, or lost his credit: the
	// coordinator is to run the job, see [Case.Backed].
	Doubted bool `json:"doubted,omitempty"`
}

// Copy is a device that was given the job, or could be.
type Copy struct {
	Device wire.DeviceID `json:"device"`
	// Owner is whose it is. Where that is not known, it is the device's own id: strangers
	// count each for themselves.
	Owner string `json:"owner"`
	// Near is what makes it likely that two devices have one owner: a token by which both
	// came in, say. Empty is near to nobody.
	Near string `json:"near,omitempty"`
	// Engine is empty if it is not known, or the device cannot have it ([Runs]).
	Engine string `json:"engine,omitempty"`
}

// Likely is whose a device may be, as far as that can be told.
func (c Copy) Likely() string { return cmp.Or(c.Near, c.Owner) }

// Answer is what came of a copy; of each device the first counts.
type Answer struct {
	Copy
	// Digest names all outputs together, or is [Failed]. It is empty if the device could
	// not give a result, for whatever reason.
	Digest string `json:"digest,omitempty"`
	// CPUSeconds is what it took, by the device's own word.
	CPUSeconds float64 `json:"cpu_seconds,omitempty"`
	Order      string  `json:"order,omitempty"` // whose signed report says so
	// Disturbed is the device's own word, too: the job was stopped there, and went on.
	Disturbed bool `json:"disturbed,omitempty"`
}

// Failed is the digest of a job whose module failed. That one device says so, and another has
// a result, is no lie: memory may be short.
const Failed = "failed"

// Own is the coordinator's own result.
type Own struct {
	Digest     string  `json:"digest"`
	Output     string  `json:"output,omitempty"` // what evidence compares; nothing follows from it here
	Engine     string  `json:"engine,omitempty"` // empty: counts as every device's
	CPUSeconds float64 `json:"cpu_seconds,omitempty"`
	// Looks says that the module can see whether it was stopped and went on.
	Looks bool `json:"looks,omitempty"`
}

const (
	thirdCopies = 3 // owners that are asked when two differ
	mostCopies  = 5 // the same, where the coordinator cannot run the job
	// witnesses are how many owners of the accused's engine make a lie certain, beside the
	// coordinator, or that engine's own result.
	witnesses = 2
)

// NewCase is how a job begins that is given to a device first. Both numbers are drawn evenly
// from [0, 1).
func NewCase(module string, first Standing, even1, even2 float64) Case {
	c := Case{Module: module, Copies: 1}
	if !first.Trusted() || even1 < first.Share() {
		c.Copies, c.Check = 2, first.Trusted() || even2 < checkShare
	}
	return c
}

// Answered adds what came of a copy. An answer of who was not asked, or has answered, changes
// nothing.
func (c *Case) Answered(a Answer) {
	of := func(d Copy) bool { return d.Device == a.Device }
	if !slices.ContainsFunc(c.Sent, of) || slices.ContainsFunc(c.Answers, func(b Answer) bool { return of(b.Copy) }) {
		return
	}
	c.Answers = append(c.Answers, a)
}

// Step is what follows from a case as it is.
type Step struct {
	// Ask is how many more copies are to be sent now; with Like, to devices with that
	// engine only.
	Ask  int
	Like string
	// Run asks the coordinator to run the job itself, whenever it has the time, and to
	// put the result into Own, or the reason why not into Unable.
	Run bool
	// Accept is the digest of the result that the customer gets. It may come before Done,
	// and may then still turn out to be wrong.
	Accept string
	// Done says that nothing more is to be asked or awaited; the verdicts are final.
	Done     bool
	Verdicts []Verdict
	Why      string // a sentence, of what is unusual
}

// Finding is what a case says of one answer.
type Finding string

// The findings. Of an answer that has none, nothing can be said.
const (
	Confirmed Finding = "confirmed" // another owner or the coordinator has the same
	Wrong     Finding = "wrong"     // a lie: the coordinator has another, and is right
	Doubtful  Finding = "doubtful"  // the coordinator has another, or most others have
	Failing   Finding = "failing"   // the module failed there, and the coordinator has a result
)

// Verdict is a finding about a device.
type Verdict struct {
	Device  wire.DeviceID
	Order   string
	Finding Finding
	// CPUSeconds is what the job costs: the coordinator's own count, else the least that
	// one of those who agree says.
	CPUSeconds float64
	// With are the likely owners of others who have the same; of who is Confirmed without the
	// coordinator's own result.
	With []string
}

// Next says what is to be done. trusted tells of each device whether it is
// ([Standing.Trusted]).
func (c Case) Next(trusted func(wire.DeviceID) bool) Step {
	given := slices.DeleteFunc(slices.Clone(c.Answers), func(a Answer) bool { return a.Digest == "" })
	open := len(c.Sent) - len(c.Answers)
	kinds := tally(given)
	switch {
	case c.Own != nil:
		return c.settled(given, open)
	case len(kinds) > 1:
		return c.disputed(given, kinds, open, trusted)
	case c.Doubted && c.Unable == "" && len(given) > 0:
		return Step{Run: true, Accept: kinds[0].digest, Why: "somebody who stood behind the result is not believed any more"}
	}
	want, have := max(c.Copies, 1), owners(given)
	if len(kinds) == 1 && kinds[0].digest == Failed {
		want = max(want, 2) // a failure is confirmed elsewhere
	}
	var s Step
	if have > 0 && (have >= want || c.NoMore && open == 0) {
		s.Accept = kinds[0].digest
		if c.Check {
			want++
		}
	}
	if !c.NoMore {
		s.Ask = max(want-have-open, 0)
	}
	if s.Done = s.Ask == 0 && open == 0; s.Done && have > 1 {
		s.Verdicts = verdicts(given, func(Answer) Finding { return Confirmed }, leastCost(given))
		for i := range s.Verdicts {
			for _, b := range given {
				if v := &s.Verdicts[i]; b.Device != v.Device {
					v.With = append(v.With, b.Likely())
				}
			}
		}
	}
	return s
}

// owners counts who has some answers: devices of one owner are one. Those that may be of one
// are company all the same: where there is nobody else, it finds who lies alone.
func owners(given []Answer) int { return count(given, func(a Answer) string { return a.Owner }) }

// Apart counts who stands behind some answers: devices that may be of one owner are one.
func Apart(given []Answer) int { return count(given, func(a Answer) string { return a.Likely() }) }

func count(given []Answer, whose func(Answer) string) int {
	seen := make(map[string]bool, len(given))
	for _, a := range given {
		seen[whose(a)] = true
	}
	return len(seen)
}

// kindred are the answers with one digest.
type kindred struct {
	digest string
	n      int
}

// tally counts the answers by digest, most first.
func tally(given []Answer) (out []kindred) {
	for _, a := range given {
		i := slices.IndexFunc(out, func(k kindred) bool { return k.digest == a.Digest })
		if i < 0 {
			i, out = len(out), append(out, kindred{digest: a.Digest})
		}
		out[i].n++
	}
	slices.SortStableFunc(out, func(a, b kindred) int { return cmp.Compare(b.n, a.n) })
	return out
}

// disputed is a case in which answers differ, and the coordinator has not run the job. A
// third owner decides what the customer gets meanwhile, but only with somebody trusted on
// the side of the most and nobody on the other. What is a lie, the coordinator alone
// decides.
func (c Case) disputed(given []Answer, kinds []kindred, open int, trusted func(wire.DeviceID) bool) Step {
	s := Step{Run: c.Unable == "", Why: "devices differ about the result"}
	want := thirdCopies
	if !s.Run {
		want = mostCopies
	}
	if !c.NoMore {
		s.Ask = max(want-len(given)-open, 0)
	}
	pro, contra := false, false // whether somebody trusted is
	for _, a := range given {
		if trusted(a.Device) {
			pro, contra = pro || a.Digest == kinds[0].digest, contra || a.Digest != kinds[0].digest
		}
	}
	most := len(given) >= thirdCopies && kinds[0].n >= 2 && 2*kinds[0].n > len(given)
	if s.Run {
		if most && pro && !contra {
			s.Accept = kinds[0].digest
		}
		return s
	}
	if s.Done = s.Ask == 0 && open == 0; !s.Done {
		return s
	}
	if !most || contra && !pro {
		s.Why = "devices differ about the result, and the coordinator cannot run the job itself: " + c.Unable
		return s
	}
	s.Accept = kinds[0].digest
	s.Verdicts = verdicts(given, func(a Answer) Finding {
		// A majority may be one of liars: there is no credit in it. And if it has other
		// engines, it may be the module.
		if a.Digest != s.Accept && slices.ContainsFunc(given, func(b Answer) bool { return b.Digest == s.Accept && b.Engine == a.Engine }) {
			return Doubtful
		}
		return ""
	}, leastCost(given))
	return s
}

// settled is a case in which the coordinator has its own result.
func (c Case) settled(given []Answer, open int) Step {
	s := Step{Accept: c.Own.Digest}
	found := make(map[wire.DeviceID]Finding)
	for _, a := range given {
		if a.Digest == c.Own.Digest {
			found[a.Device] = Confirmed
			continue
		}
		s.Why = "the coordinator has another result"
		if a.Digest == Failed || c.Own.Digest == Failed {
			found[a.Device] = Failing
			if a.Digest != Failed { // it has a result that nobody can compare
				found[a.Device] = Doubtful
			}
			continue
		}
		f, ask := c.judge(a, given)
		if found[a.Device] = f; ask {
			s.Like = a.Engine
		}
	}
	if s.Like != "" && open == 0 {
		s.Ask = 1
	}
	if s.Done = open == 0 && s.Ask == 0; s.Done {
		s.Verdicts = verdicts(given, func(a Answer) Finding { return found[a.Device] }, c.Own.CPUSeconds)
	}
	return s
}

// judge is what is to be said of an answer that is not the coordinator's: nothing, if its
// engine has that result with everybody. ask is true if another witness is needed.
func (c Case) judge(a Answer, given []Answer) (f Finding, ask bool) {
	if a.Disturbed && c.Own.Looks {
		return Doubtful, false
	}
	if c.Own.Engine == "" || a.Engine == c.Own.Engine {
		return Wrong, false
	}
	if a.Engine == "" { // there is nobody with it to ask
		return Doubtful, false
	}
	against, with := map[string]bool{}, map[string]bool{a.Owner: true}
	apart := map[string]bool{a.Likely(): true}
	for _, b := range given {
		switch {
		case b.Engine != a.Engine:
		case b.Digest == c.Own.Digest && b.Owner != a.Owner:
			against[b.Owner] = true
		case b.Digest == a.Digest:
			with[b.Owner], apart[b.Likely()] = true, true
		}
	}
	switch {
	case len(against) >= witnesses && len(against) > len(with):
		return Wrong, false
	case len(with) > witnesses && len(with) > len(against):
		// Who came in by one token may be in league, and an engine is a device's own word:
		// alone they clear nobody. There is no use in asking more, as [Pick] has preferred
		// others. Against somebody each counts: they say what the coordinator says.
		if len(apart) <= witnesses {
			return Doubtful, false
		}
		return "", false
	case slices.Contains(c.NoMoreLike, a.Engine):
		return Doubtful, false
	}
	return "", true
}

func leastCost(given []Answer) float64 {
	return slices.MinFunc(given, func(a, b Answer) int { return cmp.Compare(a.CPUSeconds, b.CPUSeconds) }).CPUSeconds
}

func verdicts(given []Answer, of func(Answer) Finding, cost float64) (out []Verdict) {
	for _, a := range given {
		if f := of(a); f != "" {
			out = append(out, Verdict{Device: a.Device, Order: a.Order, Finding: f, CPUSeconds: cost})
		}
	}
	return out
}

// Backed tells whether enough stands behind a result that was given out: the coordinator,
// or two owners apart that are not caught. Once a device is caught, those of its recent results
// that are not backed are to be run by the coordinator. The last one who stands behind such a
// result may have been in league with the caught one, and is found then.
func (c Case) Backed(accepted string, caught func(wire.DeviceID) bool) bool {
	if c.Own != nil {
		return c.Own.Digest == accepted
	}
	return Apart(slices.DeleteFunc(slices.Clone(c.Answers), func(a Answer) bool { return a.Digest != accepted || caught(a.Device) })) >= 2
}

// Credit takes a verdict into the standing of the device that it is about.
func (s *Standing) Credit(v Verdict, module string, now time.Time) {
	switch v.Finding {
	case Confirmed:
		if len(v.With) > 0 {
			s.Agree(v.With, v.CPUSeconds, now)
		} else {
			s.Confirm(v.CPUSeconds, now)
		}
	case Wrong:
		s.Lied(v.CPUSeconds, now)
	case Doubtful:
		s.Doubt(module, now)
	case Failing:
		s.Fail(module, now)
	}
}
