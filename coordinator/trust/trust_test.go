package trust

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/wire"
)

const day = 24 * time.Hour

func near(a, b float64) bool { return math.Abs(a-b) < 1e-9 }

func TestShareFallsWithWhatWasConfirmedAndNeverToNothing(t *testing.T) {
	var s Standing
	if s.Share() != 0.20 || s.Figure() != 1 || s.Trusted() || s.Aside() {
		t.Errorf("of a new device: %v, figure %v", s.Share(), s.Figure())
	}
	last := s.Share()
	for n := 1; n <= 500; n++ {
		s.Confirm(10, epoch)
		if s.Share() > last || s.Share() < 0.05 {
			t.Fatalf("after %d confirmed: %v, before %v", n, s.Share(), last)
		}
		if last = s.Share(); s.Trusted() != (n >= Within(0.10)) {
			t.Fatalf("after %d confirmed: trusted %v", n, s.Trusted())
		}
	}
	if !near(s.Share(), 0.05) {
		t.Errorf("at the end %v", s.Share())
	}
	if later := s.Aged(epoch.Add(HalfLife - day)); !later.Trusted() || later.Aged(epoch.Add(HalfLife+day)).Trusted() {
		t.Error("trust does not end a half-life after the last confirmed result")
	}
	s.Lied(0, epoch)
	if s.Share() != 0.20 {
		t.Errorf("after a lie %v", s.Share())
	}
}

func TestTheShareOfChallengesIsThatOfAllJobs(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 1))
	for _, s := range []Standing{{}, full()} {
		const n = 200_000
		challenges := 0
		for range n {
			if s.Challenge(rng.Float64()) {
				challenges++
			}
		}
		if got := float64(challenges) / float64(n+challenges); math.Abs(got-s.Share()) > 0.005 {
			t.Errorf("%.4f of all jobs are challenges, want %v", got, s.Share())
		}
	}
}

func TestOneLieIsEnoughWhateverThePast(t *testing.T) {
	for name, s := range map[string]Standing{"new": {}, "with the best past": full()} {
		cheap, dear := s, s
		cheap.Lied(0, epoch)
		dear.Lied(100, epoch)
		if !cheap.Distrusted() || !dear.Distrusted() || cheap.May("m") {
			t.Errorf("%s: %v, %v", name, cheap.Figure(), dear.Figure())
		}
		if !(dear.Figure() < cheap.Figure()-0.05) {
			t.Errorf("%s: a lie about a costly job leaves %.2f, about a cheap one %.2f", name, dear.Figure(), cheap.Figure())
		}
	}
}

func TestCreditIsWorthWhatItCost(t *testing.T) {
	for cpu, want := range map[float64]float64{-1: 0.25, 0: 0.25, 2.5: 0.25, 5: 0.5, 10: 1, 1e9: 1, math.Inf(1): 1, math.NaN(): 0.25} {
		if got := Weight(cpu); got != want {
			t.Errorf("%v s weigh %v, want %v", cpu, got, want)
		}
	}
	var small, large Standing
	for range 44 {
		small.Confirm(0.01, epoch)
		large.Confirm(20, epoch)
	}
	if small.Trusted() || !large.Trusted() {
		t.Errorf("after 44 jobs that cost nothing %v, after 44 large ones %v", small.Right, large.Right)
	}
}

func TestStandingFadesAndTimeAloneWearsNothing(t *testing.T) {
	s := full()
	s.Lied(0, epoch)
	was := s.Wrong
	if got := s.Aged(epoch.Add(HalfLife)).Wrong; !near(got, was/2) {
		t.Errorf("%v after a half-life, %v before", got, was)
	}
	last := s
	for d := range 800 {
		now := s.Aged(epoch.Add(time.Duration(d) * day))
		if now.Figure() < last.Figure()-1e-12 {
			t.Fatalf("day %d: %v, the day before %v", d, now.Figure(), last.Figure())
		}
		last = now
	}
	if last.Figure() < 0.95 || s.Aged(epoch.Add(7*day)).Figure() > 0.5 {
		t.Errorf("after a week %v, after two years %v", s.Aged(epoch.Add(7*day)).Figure(), last.Figure())
	}
	if back := s.Aged(epoch.Add(-day)); back.Wrong != s.Wrong {
		t.Error("a clock that is set back makes evidence")
	}
}

func TestAnotherRuntimeBeginsAnewButKeepsTheLies(t *testing.T) {
	a := Runtime{Engine: ownEngine, Agent: "1.0.0"}
	for name, c := range map[string]struct {
		next  Runtime
		reset bool
	}{
		"the same":            {a, false},
		"no engine is known":  {Runtime{Agent: "1.0.0"}, false},
		"no version is known": {Runtime{Engine: ownEngine}, false},
		"another engine":      {Runtime{Engine: otherEngine, Agent: "1.0.0"}, true},
		"another agent":       {Runtime{Agent: "1.0.1"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := full()
			if s.Under(a, epoch) || !s.Trusted() {
				t.Fatal("the first runtime that is known is a change")
			}
			lies := s
			lies.Lied(0, epoch)
			now := epoch.Add(day)
			if got := s.Under(c.next, now); got != c.reset || s.Trusted() == c.reset {
				t.Errorf("reset %v, trusted %v", got, s.Trusted())
			}
			if c.reset && (s.Share() != 0.20 || s.ResetBy == "" || !s.Since.Equal(now) || s.ResetRight < 80) {
				t.Errorf("%+v", s)
			}
			lies.Under(c.next, now)
			if !lies.Distrusted() {
				t.Error("with an update the lies are forgotten")
			}
		})
	}
}

// A device that begins to lie with an update is found as a new one is, though it was trusted.
func TestWhoChangesSidesWithAnUpdateIsNew(t *testing.T) {
	seed := testenv.Seed(t)
	const trials, within = 1500, 21
	missed := 0
	for i := range trials {
		d := &worker{Standing: full(), lies: 1}
		f := newFleet(seed+uint64(i), d)
		f.noCompany = true
		d.Under(Runtime{Agent: "1.0.0"}, epoch)
		d.Under(Runtime{Agent: "1.0.1"}, epoch)
		for d.foundAt == 0 && d.given < within {
			f.job()
		}
		if d.foundAt == 0 {
			missed++
		}
	}
	if missed > atMost(trials, 0.01) {
		t.Errorf("%d of %d not found within %d jobs", missed, trials, within)
	}
}

func TestDoubtMakesNewAndKeepsFromThatModule(t *testing.T) {
	s := full()
	s.Doubt("a", epoch)
	s.Doubt("a", epoch.Add(day))
	if s.Share() != 0.20 || s.Trusted() || s.Figure() != 1 || s.May("a") || !s.May("b") || len(s.Doubts) != 1 {
		t.Errorf("%+v", s)
	}
	s.Doubt("b", epoch.Add(day))
	if s.Aside() {
		t.Error("two modules are enough to get no jobs at all")
	}
	s.Doubt("c", epoch.Add(day))
	if !s.Aside() || s.May("d") || s.Distrusted() {
		t.Error("a device that is doubted over three modules gets more jobs, or is called a liar")
	}
	if s = s.Aged(epoch.Add(day + doubtLife)); s.Aside() || !s.May("a") || s.Trusted() || s.Right != 0 {
		t.Errorf("it is believed again without having earned it, or kept from jobs, two weeks later %+v", s)
	}
}

func TestAStandingIsKeptAsItIs(t *testing.T) {
	s := full()
	s.Under(Runtime{"e", "a"}, epoch)
	s.Under(Runtime{"f", "a"}, epoch)
	s.Lied(3, epoch)
	s.Doubt("m", epoch)
	raw, err := json.Marshal(s)
	var got Standing
	if err != nil || json.Unmarshal(raw, &got) != nil || !reflect.DeepEqual(s, got) {
		t.Errorf("%s is read as %+v, was %+v", raw, got, s)
	}
}

func TestNobodyOfOneOwnerHasTwoCopies(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 1))
	from := []Copy{
		{Device: "a1", Owner: "ann", Engine: ownEngine}, {Device: "a2", Owner: "ann", Engine: ownEngine}, {Device: "a3", Owner: "ann", Engine: otherEngine},
		{Device: "b1", Owner: "bob", Near: "token", Engine: ownEngine}, {Device: "x", Owner: "x", Near: "token", Engine: ownEngine}, {Device: "y", Owner: "y", Engine: otherEngine},
	}
	drawn := map[wire.DeviceID]int{}
	for range 2000 {
		sent := []Copy{from[rng.IntN(len(from))]}
		n := 1 + rng.IntN(6)
		got := Pick(from, sent, "", n, rng.IntN)
		if want := min(n, 3); len(got) != want {
			t.Fatalf("%d more of %v: %v", n, sent, got)
		}
		owners := map[string]bool{sent[0].Owner: true}
		for _, c := range got {
			if owners[c.Owner] {
				t.Fatalf("beside %v: %v", sent, got)
			}
			owners[c.Owner] = true
		}
		if sent[0].Device == "x" {
			if n < 3 && slices.ContainsFunc(got, func(c Copy) bool { return c.Device == "b1" }) {
				t.Fatalf("beside %v, one that came by the same token, though there are others: %v", sent, got)
			}
		}
		if sent[0].Device == "y" {
			drawn[got[0].Device]++
		}
	}
	for _, d := range []wire.DeviceID{"a1", "a2", "a3", "b1", "x"} {
		if drawn[d] < 25 {
			t.Errorf("%s was drawn %d times: %v", d, drawn[d], drawn)
		}
	}
	for _, c := range Pick(from, from[:1], otherEngine, 9, rng.IntN) {
		if c.Engine != otherEngine {
			t.Errorf("%v has another engine than the one asked for", c)
		}
	}
	if got := Pick(nil, nil, "", 3, rng.IntN); len(got) != 0 {
		t.Errorf("of nobody: %v", got)
	}
}

// say is an answer of a device that counts for itself.
func say(d, digest, engine string) Answer {
	return Answer{Copy: Copy{Device: wire.DeviceID(d), Owner: d, Engine: engine}, Digest: digest, CPUSeconds: 3, Order: "order of " + d}
}

// cameBy is an answer of a device that came in by a token.
func cameBy(d, digest, engine, token string) Answer {
	a := say(d, digest, engine)
	a.Near = token
	return a
}

// TestWhatFollowsFromAnswers is the table of all cases. In each, a and b are new, t is
// trusted, and s is another device of a's owner.
func TestWhatFollowsFromAnswers(t *testing.T) {
	const e, o = ownEngine, otherEngine
	own := func(digest string) *Own { return &Own{Digest: digest, Engine: e, CPUSeconds: 2} }
	looks := func(digest string) *Own { return &Own{Digest: digest, Engine: e, CPUSeconds: 2, Looks: true} }
	stopped := func(d, digest, engine string) Answer {
		a := say(d, digest, engine)
		a.Disturbed = true
		return a
	}
	type found map[wire.DeviceID]Finding
	for name, c := range map[string]struct {
		Case
		waiting int // for so many more
		ask     int
		like    string
		run     bool
		accept  string
		done    bool
		found   found
	}{
		"nobody was asked":                {Case: Case{Copies: 2}, ask: 2},
		"both are at it":                  {Case: Case{Copies: 2}, waiting: 2},
		"one of two has answered":         {Case: Case{Copies: 2, Answers: []Answer{say("a", "x", e)}}, waiting: 1},
		"one could not":                   {Case: Case{Copies: 2, Answers: []Answer{say("a", "", e), say("b", "x", e)}}, ask: 1},
		"two agree":                       {Case: Case{Copies: 2, Answers: []Answer{say("a", "x", e), say("b", "x", e)}}, accept: "x", done: true, found: found{"a": Confirmed, "b": Confirmed}},
		"two agree, and are looked at":    {Case: Case{Copies: 2, Check: true, Answers: []Answer{say("a", "x", e), say("b", "x", e)}}, ask: 1, accept: "x"},
		"the look is on its way":          {Case: Case{Copies: 2, Check: true, Answers: []Answer{say("a", "x", e), say("b", "x", e)}}, waiting: 1, accept: "x"},
		"there is nobody to look":         {Case: Case{Copies: 2, Check: true, NoMore: true, Answers: []Answer{say("a", "x", e), say("b", "x", e)}}, accept: "x", done: true, found: found{"a": Confirmed, "b": Confirmed}},
		"one alone":                       {Case: Case{Copies: 1, Answers: []Answer{say("t", "x", e)}}, accept: "x", done: true},
		"there is nobody for company":     {Case: Case{Copies: 2, NoMore: true, Answers: []Answer{say("a", "x", e)}}, accept: "x", done: true},
		"nobody could":                    {Case: Case{Copies: 2, NoMore: true, Answers: []Answer{say("a", "", e)}}, done: true},
		"the module fails":                {Case: Case{Copies: 1, Answers: []Answer{say("t", Failed, e)}}, ask: 1},
		"the module fails with two":       {Case: Case{Copies: 1, Answers: []Answer{say("t", Failed, e), say("a", Failed, e)}}, accept: Failed, done: true, found: found{"t": Confirmed, "a": Confirmed}},
		"two differ":                      {Case: Case{Copies: 2, Answers: []Answer{say("a", "x", e), say("b", "y", e)}}, ask: 1, run: true},
		"two differ, a third is asked":    {Case: Case{Copies: 2, Answers: []Answer{say("a", "x", e), say("b", "y", e)}}, waiting: 1, run: true},
		"two new ones against one":        {Case: Case{Copies: 2, Answers: []Answer{say("a", "x", e), say("b", "y", e), say("c", "y", e)}}, run: true},
		"two new ones against a trusted":  {Case: Case{Copies: 2, Answers: []Answer{say("t", "x", e), say("b", "y", e), say("c", "y", e)}}, run: true},
		"with a trusted one against one":  {Case: Case{Copies: 2, Answers: []Answer{say("a", "x", e), say("t", "y", e), say("c", "y", e)}}, run: true, accept: "y"},
		"three differ":                    {Case: Case{Copies: 2, Answers: []Answer{say("a", "x", e), say("t", "y", e), say("c", "z", e)}}, run: true},
		"looked at, and it differs":       {Case: Case{Copies: 2, Check: true, Answers: []Answer{say("a", "x", e), say("b", "x", e), say("c", "y", e)}}, run: true},
		"a league, and the truth":         {Case: Case{Copies: 2, Check: true, Own: own("y"), Answers: []Answer{say("a", "x", e), say("b", "x", e), say("c", "y", e)}}, accept: "y", done: true, found: found{"a": Wrong, "b": Wrong, "c": Confirmed}},
		"four in league, and the truth":   {Case: Case{Copies: 2, Own: own("y"), Answers: []Answer{say("a", "x", e), say("b", "x", e), say("t", "x", e), say("d", "x", e), say("c", "y", e)}}, accept: "y", done: true, found: found{"a": Wrong, "b": Wrong, "t": Wrong, "d": Wrong, "c": Confirmed}},
		"one is still at it":              {Case: Case{Copies: 2, Own: own("y"), Answers: []Answer{say("a", "x", e)}}, waiting: 1, accept: "y"},
		"it failed here, and not there":   {Case: Case{Copies: 2, Own: own(Failed), Answers: []Answer{say("a", "x", e), say("b", Failed, e)}}, accept: Failed, done: true, found: found{"a": Doubtful, "b": Confirmed}},
		"it failed there, and not here":   {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{say("a", "x", e), say("b", Failed, e)}}, accept: "x", done: true, found: found{"a": Confirmed, "b": Failing}},
		"no result is no lie":             {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{say("a", "", e), say("b", "x", e)}}, accept: "x", done: true, found: found{"b": Confirmed}},
		"another engine, no witness":      {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{say("a", "x", e), say("b", "y", o)}}, ask: 1, like: o, accept: "x"},
		"another engine, one witness":     {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{say("b", "y", o), say("c", "x", o)}}, ask: 1, like: o, accept: "x"},
		"another engine, two witnesses":   {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{say("b", "y", o), say("c", "x", o), say("d", "x", o)}}, accept: "x", done: true, found: found{"b": Wrong, "c": Confirmed, "d": Confirmed}},
		"another engine, two on each":     {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{say("b", "y", o), say("c", "x", o), say("d", "x", o), say("f", "y", o)}}, ask: 1, like: o, accept: "x"},
		"another engine has another":      {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{say("a", "x", e), say("b", "y", o), say("c", "y", o), say("d", "y", o)}}, accept: "x", done: true, found: found{"a": Confirmed}},
		"another engine, by one token":    {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{cameBy("b", "y", o, "token"), cameBy("c", "y", o, "token"), cameBy("d", "y", o, "token")}}, accept: "x", done: true, found: found{"b": Doubtful, "c": Doubtful, "d": Doubtful}},
		"another engine, by two tokens":   {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{cameBy("b", "y", o, "token"), cameBy("c", "y", o, "token"), cameBy("d", "y", o, "other")}}, accept: "x", done: true, found: found{"b": Doubtful, "c": Doubtful, "d": Doubtful}},
		"another engine, by three":        {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{cameBy("b", "y", o, "token"), cameBy("c", "y", o, "other"), cameBy("d", "y", o, "third")}}, accept: "x", done: true, found: found{}},
		"by one token, and is right":      {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{cameBy("b", "y", o, "token"), cameBy("c", "x", o, "token"), cameBy("d", "x", o, "token")}}, accept: "x", done: true, found: found{"b": Wrong, "c": Confirmed, "d": Confirmed}},
		"another engine, nobody has it":   {Case: Case{Copies: 2, Own: own("x"), NoMoreLike: []string{o}, Answers: []Answer{say("a", "x", e), say("b", "y", o)}}, accept: "x", done: true, found: found{"a": Confirmed, "b": Doubtful}},
		"it cannot be run here":           {Case: Case{Copies: 2, Unable: "sensors", Answers: []Answer{say("a", "x", e), say("b", "y", e)}}, ask: 3},
		"most of five":                    {Case: Case{Copies: 2, Unable: "sensors", Answers: []Answer{say("a", "x", e), say("b", "y", e), say("c", "y", e), say("d", "y", e), say("f", "z", o)}}, accept: "y", done: true, found: found{"a": Doubtful}},
		"most of five against a trusted":  {Case: Case{Copies: 2, Unable: "sensors", Answers: []Answer{say("t", "x", e), say("b", "y", e), say("c", "y", e), say("d", "y", e), say("f", "y", e)}}, done: true},
		"no most of five":                 {Case: Case{Copies: 2, Unable: "sensors", Answers: []Answer{say("a", "x", e), say("b", "y", e), say("c", "y", e), say("d", "x", e), say("f", "z", e)}}, done: true},
		"two differ, and that is all":     {Case: Case{Copies: 2, Unable: "sensors", NoMore: true, Answers: []Answer{say("a", "x", e), say("b", "y", e)}}, done: true},
		"there is nobody, but ourselves":  {Case: Case{Copies: 2, NoMore: true, Answers: []Answer{say("a", "x", e), say("b", "y", e)}}, run: true},
		"a challenge that was right":      {Case: Case{Own: own("x"), Answers: []Answer{say("a", "x", e)}}, accept: "x", done: true, found: found{"a": Confirmed}},
		"a challenge that was not right":  {Case: Case{Own: own("x"), Answers: []Answer{say("t", "y", e)}}, accept: "x", done: true, found: found{"t": Wrong}},
		"a challenge on any engine":       {Case: Case{Own: &Own{Digest: "x"}, Answers: []Answer{say("t", "y", o)}}, accept: "x", done: true, found: found{"t": Wrong}},
		"stopped, and looks":              {Case: Case{Copies: 2, Own: looks("x"), Answers: []Answer{say("a", "x", e), stopped("b", "y", e)}}, accept: "x", done: true, found: found{"a": Confirmed, "b": Doubtful}},
		"stopped, and cannot look":        {Case: Case{Copies: 2, Own: own("x"), Answers: []Answer{say("a", "x", e), stopped("b", "y", e)}}, accept: "x", done: true, found: found{"a": Confirmed, "b": Wrong}},
		"looks, and was not stopped":      {Case: Case{Copies: 2, Own: looks("x"), Answers: []Answer{say("a", "x", e), say("b", "y", e)}}, accept: "x", done: true, found: found{"a": Confirmed, "b": Wrong}},
		"stopped, on another engine":      {Case: Case{Copies: 2, Own: looks("x"), Answers: []Answer{stopped("b", "y", o)}}, accept: "x", done: true, found: found{"b": Doubtful}},
		"stopped, and right":              {Case: Case{Copies: 2, Own: looks("x"), Answers: []Answer{stopped("b", "x", e)}}, accept: "x", done: true, found: found{"b": Confirmed}},
		"a challenge that was unanswered": {Case: Case{Own: own("x"), Answers: []Answer{say("t", "", e)}}, accept: "x", done: true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, a := range c.Answers {
				c.Sent = append(c.Sent, a.Copy)
			}
			for range c.waiting {
				c.Sent = append(c.Sent, Copy{Device: "w", Owner: "w"})
			}
			s := c.Next(func(d wire.DeviceID) bool { return d == "t" })
			got := found{}
			for _, v := range s.Verdicts {
				got[v.Device] = v.Finding
				cost := 3.0
				if c.Own != nil {
					cost = c.Own.CPUSeconds
				}
				if v.Order != "order of "+string(v.Device) || v.CPUSeconds != cost {
					t.Errorf("%+v", v)
				}
			}
			if c.found == nil {
				c.found = found{}
			}
			if s.Ask != c.ask || s.Like != c.like || s.Run != c.run || s.Accept != c.accept || s.Done != c.done || !reflect.DeepEqual(got, c.found) {
				t.Errorf("%+v\nwant ask %d like %q run %v accept %q done %v, found %v", s, c.ask, c.like, c.run, c.accept, c.done, c.found)
			}
		})
	}
}

func TestAnAnswerCountsOnceAndOnlyOfWhoWasAsked(t *testing.T) {
	a, b := say("a", "x", ownEngine), say("b", "x", ownEngine)
	c := Case{Sent: []Copy{a.Copy}}
	c.Answered(b)
	c.Answered(a)
	again := a
	again.Digest = "y"
	c.Answered(again)
	if len(c.Answers) != 1 || c.Answers[0].Digest != "x" {
		t.Errorf("%+v", c.Answers)
	}
}

func TestWhatNobodyElseStandsBehindIsRunAgain(t *testing.T) {
	caught := func(d wire.DeviceID) bool { return d == "liar" }
	liar, a, b, other := say("liar", "x", ""), say("a", "x", ""), say("b", "x", ""), say("c", "y", "")
	for name, c := range map[string]struct {
		Case
		backed bool
	}{
		"alone":                      {Case{Answers: []Answer{liar}}, false},
		"with one who agrees":        {Case{Answers: []Answer{liar, a}}, false}, // in league, perhaps
		"with one who does not":      {Case{Answers: []Answer{liar, other}}, false},
		"with two who agree":         {Case{Answers: []Answer{liar, a, b}}, true},
		"the coordinator has it":     {Case{Answers: []Answer{liar}, Own: &Own{Digest: "x"}}, true},
		"the coordinator has not":    {Case{Answers: []Answer{liar, a, b}, Own: &Own{Digest: "y"}}, false},
		"others, and not the caught": {Case{Answers: []Answer{a, b}}, true},
		"two who came by one token":  {Case{Answers: []Answer{liar, cameBy("a", "x", "", "token"), cameBy("b", "x", "", "token")}}, false},
	} {
		if got := c.Backed("x", caught); got != c.backed {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestVerdictsBecomeStandings(t *testing.T) {
	for f, want := range map[Finding]Standing{
		Confirmed: {At: epoch, Right: 1, Proven: 1}, Wrong: {At: epoch, Wrong: 2}, Doubtful: {At: epoch, Doubts: []Doubt{{epoch, "m"}}}, "": {},
	} {
		var s Standing
		s.Credit(Verdict{Finding: f, CPUSeconds: 30}, "m", epoch)
		if !reflect.DeepEqual(s, want) {
			t.Errorf("%q: %+v", f, s)
		}
	}
}

func TestCompanyIsForTheNewAndNowAndThenForTheTrusted(t *testing.T) {
	for even, want := range map[float64][2]int{0: {2, 2}, 0.049: {2, 2}, 0.051: {2, 1}, 0.999: {2, 1}} {
		if a, b := NewCase("m", Standing{}, even, 0.5), NewCase("m", full(), even, 0.5); a.Copies != want[0] || b.Copies != want[1] || a.Check || b.Check != (want[1] == 2) {
			t.Errorf("%v: %+v, %+v", even, a, b)
		}
	}
	if c := NewCase("m", Standing{}, 0.5, 0.19); !c.Check || c.Module != "m" {
		t.Errorf("%+v", c)
	}
}

// Only names that a device of its kind can have, of the coordinator's version, stand for an engine.
func TestAnEngineIsOneThatTheDeviceCanHave(t *testing.T) {
	t.Parallel()
	const own = "wazero/1.12.0 compiler amd64"
	for _, c := range []struct {
		own, said, arch string
		runs            bool
	}{
		{own, own, "amd64", true},
		{own, "wazero/1.12.0 compiler arm64", "arm64", true},
		{own, "wazero/1.12.0 interpreter arm", "arm", true},
		{own, "wazero/1.12.0 interpreter arm64", "arm64", true},
		{own, "wazero/1.12.0 compiler arm64", "amd64", false},
		{own, "wazero/1.12.0 compiler riscv64", "riscv64", false},
		{own, "wazero/1.11.0 compiler amd64", "amd64", false},
		{own, "wasmtime/1.12.0 compiler amd64", "amd64", false},
		{own, "wazero/1.12.0 magic amd64", "amd64", false},
		{own, "wazero/1.12.0  compiler amd64", "amd64", false},
		{own, "wazero/1.12.0 compiler amd64 of mine", "amd64", false},
		{own, "", "amd64", false},
		{"", own, "amd64", false},
		{"", "", "", false},
	} {
		if got := Runs(c.own, c.said, c.arch); got != c.runs {
			t.Errorf("%q of a coordinator with %q on %s: %v", c.said, c.own, c.arch, got)
		}
	}
}

// A module that fails on one device alone puts it aside for that, and it keeps what it has earned.
func TestAFailureCostsNothingThatWasEarned(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	s := Standing{At: now, Right: 60, Proven: 60}
	s.Credit(Verdict{Finding: Failing}, "m", now)
	if s.Right != 60 || s.May("m") || !s.May("other") || s.Trusted() {
		t.Errorf("%+v", s)
	}
	if s = s.Aged(now.Add(doubtLife + time.Hour)); !s.Trusted() || !s.May("m") {
		t.Errorf("later: %+v", s)
	}
	s.Never = "for a reason"
	if s.Trusted() || s.Share() != newShare || !strings.Contains(strings.Join(s.Explain(), "\n"), "for a reason") {
		t.Errorf("it can never be trusted: %v", s.Explain())
	}
}

// What devices confirm each other earns little a day, with one owner and with all, and without
// the coordinator's own results no trust at all.
func TestCompanyAloneMakesNoTrust(t *testing.T) {
	t.Parallel()
	agreed := func(owners ...string) Verdict { return Verdict{Finding: Confirmed, CPUSeconds: 1000, With: owners} }
	var s Standing
	for range 1000 {
		s.Credit(agreed("ben"), "m", epoch)
	}
	if !near(s.Right, companyPair) || s.Proven != 0 {
		t.Errorf("with one owner %+v", s)
	}
	before := s
	s.Credit(agreed("ben", "cem"), "m", epoch)
	if !near(s.Right, companyPair+1) || len(before.Company) != 1 || !near(before.Company["ben"], companyPair) {
		t.Errorf("with another beside him %+v, before %+v", s, before)
	}
	for i := range 1000 {
		s.Credit(agreed(fmt.Sprint(i)), "m", epoch.Add(day-time.Second))
	}
	if s.Right > companyDay || s.Right < 0.97*companyDay {
		t.Errorf("with all on one day %v", s.Right)
	}
	for n := range 100 {
		for i := range 100 {
			s.Credit(agreed(fmt.Sprint(i)), "m", epoch.Add(time.Duration(n+1)*day))
		}
	}
	if s.Right < trustedFrom || s.Trusted() || s.Share() != newShare || !strings.Contains(strings.Join(s.Explain(), "\n"), "by the coordinator itself") {
		t.Errorf("company of 100 days %+v", s)
	}
	for range 5 {
		s.Credit(Verdict{Finding: Confirmed, CPUSeconds: 10}, "m", s.At)
	}
	if !s.Trusted() {
		t.Errorf("with the coordinator's own %+v", s)
	}
}

// A verdict names who else has the result, as far as that can be told; where the coordinator
// has it, nobody is needed.
func TestAVerdictNamesThoseWhoAgree(t *testing.T) {
	t.Parallel()
	a, b, c := cameBy("a", "x", ownEngine, "token"), cameBy("b", "x", ownEngine, "token"), say("c", "x", ownEngine)
	k := Case{Copies: 3, Answers: []Answer{a, b, c}, Sent: []Copy{a.Copy, b.Copy, c.Copy}}
	for _, v := range k.Next(func(wire.DeviceID) bool { return false }).Verdicts {
		want := map[wire.DeviceID][]string{"a": {"token", c.Owner}, "b": {"token", c.Owner}, "c": {"token", "token"}}[v.Device]
		if !slices.Equal(v.With, want) {
			t.Errorf("%s: with %q, want %q", v.Device, v.With, want)
		}
	}
	if n := Apart(k.Answers); n != 2 {
		t.Errorf("%d stand behind it apart", n)
	}
	k.Own = &Own{Digest: "x"}
	for _, v := range k.Next(func(wire.DeviceID) bool { return false }).Verdicts {
		if len(v.With) > 0 {
			t.Errorf("%+v", v)
		}
	}
}
