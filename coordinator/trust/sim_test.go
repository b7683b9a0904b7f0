package trust

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/wire"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

const ownEngine, otherEngine = "wazero/1.12.0 compiler amd64", "wazero/1.12.0 compiler arm64"

// worker is a device of a simulated fleet.
type worker struct {
	Copy
	Standing
	lies    float64 // share of its results that it makes up, each for itself
	league  bool    // makes up the same result as its partners, where one of them has the job, too
	flaky   bool    // 5% of the jobs it cannot give a result of, and 2% of the answers come twice
	given   int     // jobs and challenges
	told    int     // lies
	foundAt int     // given when it was first caught; 0: not yet
}

// fleet is a coordinator and its devices, in which all goes by the package's rules.
type fleet struct {
	rng      *rand.Rand
	now      time.Time
	devices  []*worker
	jobs     int // customers'
	wrong    int // results given out that are not what they should be
	repaired int // of these, found when their device was caught
	copies   int
	own      int // runs by the coordinator
	modules  int // of which the last is not portable, if there are several
	unable   float64
	noCompany,
	noChallenge bool
	cost func() float64
	// done are the newest jobs with what was given out; those of a device that is caught are
	// run again.
	done   []*past
	caught []wire.DeviceID // whose jobs are to be looked at
}

type past struct {
	Case
	job, module int
	cost        float64
	accepted    string
	again       bool
}

func newFleet(seed uint64, devices ...*worker) *fleet {
	f := &fleet{rng: rand.New(rand.NewPCG(seed, 7)), now: epoch, devices: devices, modules: 1}
	f.cost = func() float64 { return f.rng.ExpFloat64() * 5 }
	for i, d := range devices {
		if d.Device == "" {
			d.Device = wire.DeviceID(strconv.Itoa(i))
		}
		if d.Owner == "" {
			d.Owner = string(d.Device)
		}
		if d.Engine == "" {
			d.Engine = ownEngine
		}
	}
	return f
}

func (f *fleet) at(id wire.DeviceID) *worker {
	i, _ := strconv.Atoi(string(id))
	return f.devices[i]
}

func (f *fleet) trusted(id wire.DeviceID) bool { return f.at(id).Trusted() }

// truth is what an honest device makes of a job.
func (f *fleet) truth(job, module int, engine string) string {
	if f.modules > 1 && module == f.modules-1 {
		return fmt.Sprintf("%d by %s", job, engine)
	}
	return fmt.Sprint(job)
}

// answer is what a device says of a job that these devices get at the same time.
func (f *fleet) answer(d *worker, job, module int, with []Copy, cost float64) Answer {
	a := Answer{Copy: d.Copy, Digest: f.truth(job, module, d.Engine), CPUSeconds: cost}
	together := slices.ContainsFunc(with, func(c Copy) bool { return c.Device != d.Device && f.at(c.Device).league })
	switch {
	case d.flaky && f.rng.Float64() < 0.05:
		a.Digest = ""
	case d.league && together:
		a.Digest = fmt.Sprintf("agreed lie about %d", job)
		d.told++
	case f.rng.Float64() < d.lies:
		a.Digest = fmt.Sprintf("lie %d", f.rng.Uint64())
		d.told++
	}
	return a
}

// run has a case go on until it is done, and counts what it says.
func (f *fleet) run(p *past) {
	c, job, module, cost := &p.Case, p.job, p.module, p.cost
	for {
		s := c.Next(f.trusted)
		if s.Accept != "" {
			p.accepted = s.Accept
		}
		for _, v := range s.Verdicts {
			if v.Finding == Confirmed && p.again {
				continue
			}
			d := f.at(v.Device)
			d.Credit(v, c.Module, f.now)
			if v.Finding == Wrong && d.foundAt == 0 {
				d.foundAt = d.given
				f.caught = append(f.caught, d.Device)
			}
		}
		switch {
		case s.Done:
			return
		case s.Run && f.rng.Float64() < f.unable:
			c.Unable = "an input is on one device only"
		case s.Run && (s.Ask == 0 || f.rng.IntN(2) == 0): // sometimes before the third has answered
			f.own++
			c.Own = &Own{Digest: f.truth(job, module, ownEngine), Engine: ownEngine, CPUSeconds: cost}
		case s.Ask > 0:
			f.ask(c, s, job, module, cost)
		}
	}
}

func (f *fleet) ask(c *Case, s Step, job, module int, cost float64) {
	var from []Copy
	for _, d := range f.devices {
		if d.May(c.Module) {
			from = append(from, d.Copy)
		}
	}
	more := Pick(from, c.Sent, s.Like, s.Ask, f.rng.IntN)
	if len(more) < s.Ask && s.Like == "" {
		c.NoMore = true
	} else if len(more) < s.Ask {
		c.NoMoreLike = append(c.NoMoreLike, s.Like)
	}
	f.send(c, more, job, module, cost)
}

func (f *fleet) send(c *Case, more []Copy, job, module int, cost float64) {
	c.Sent = append(c.Sent, more...)
	f.rng.Shuffle(len(more), func(i, j int) { more[i], more[j] = more[j], more[i] })
	for _, m := range more {
		d := f.at(m.Device)
		d.given, f.copies = d.given+1, f.copies+1
		a := f.answer(d, job, module, more, cost*(0.5+f.rng.Float64()))
		c.Answered(a)
		if d.flaky && f.rng.Float64() < 0.02 { // restarted, and says it once more
			a.Digest = "of another life"
			c.Answered(a)
		}
	}
}

// job is one of a customer's, with the challenges that it draws.
func (f *fleet) job() {
	f.jobs++
	f.now = f.now.Add(time.Minute)
	job, module, cost := f.jobs, f.rng.IntN(f.modules), f.cost()
	name := fmt.Sprintf("module %d", module)
	var may []*worker
	for _, d := range f.devices {
		if d.May(name) {
			may = append(may, d)
		}
	}
	if len(may) == 0 {
		return
	}
	first := may[f.rng.IntN(len(may))]
	c := NewCase(name, first.Standing, f.rng.Float64(), f.rng.Float64())
	if f.noCompany {
		c.Copies, c.Check = 1, false
	}
	sent := []Copy{first.Copy}
	if c.Copies == 2 { // both are asked at once
		var from []Copy
		for _, d := range may {
			from = append(from, d.Copy)
		}
		sent = append(sent, Pick(from, sent, "", 1, f.rng.IntN)...)
	}
	before := make([]int, len(f.devices))
	for i, d := range f.devices {
		before[i] = d.given
	}
	f.send(&c, sent, job, module, cost)
	p := &past{Case: c, job: job, module: module, cost: cost}
	f.run(p)
	if p.accepted != "" && !f.right(p) {
		f.wrong++
	}
	f.done = append(f.done, p)
	f.again()
	for i, d := range f.devices {
		for range d.given - before[i] {
			d.Did(f.now)
			if !f.noChallenge && d.Challenge(f.rng.Float64()) {
				f.challenge(d)
			}
		}
	}
}

// challenge gives a device a job that is known already, and that nobody else has.
func (f *fleet) challenge(d *worker) {
	job, module, cost := -f.rng.IntN(1<<30), f.rng.IntN(f.modules), f.cost()
	c := Case{Module: fmt.Sprintf("module %d", module), Own: &Own{Digest: f.truth(job, module, ownEngine), Engine: ownEngine, CPUSeconds: cost}}
	d.Challenged(f.now)
	f.send(&c, []Copy{d.Copy}, job, module, cost)
	f.run(&past{Case: c, job: job, module: module, cost: cost})
}

func (f *fleet) right(p *past) bool {
	return slices.Contains([]string{f.truth(p.job, p.module, ownEngine), f.truth(p.job, p.module, otherEngine)}, p.accepted)
}

// again runs what a device that was caught has done and nobody stands behind.
func (f *fleet) again() {
	caught := func(id wire.DeviceID) bool { return f.at(id).Wrong > 0 }
	for len(f.caught) > 0 {
		id := f.caught[0]
		f.caught = f.caught[1:]
		for _, p := range f.done {
			if slices.ContainsFunc(p.Answers, func(a Answer) bool { return a.Device == id }) && !p.Backed(p.accepted, caught) && p.accepted != "" && p.Unable == "" {
				f.own++
				f.repaired += btoi(!f.right(p))
				p.Own, p.again = &Own{Digest: f.truth(p.job, p.module, ownEngine), Engine: ownEngine, CPUSeconds: p.cost}, true
				f.run(p)
			}
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// full is a standing of a device that is as trusted as can be.
func full() Standing { return Standing{At: epoch, Right: 2 * trustedFrom, Proven: 2 * trustedFrom} }

// atMost is how many of n may be missed where each is with p, but for one run in 10^9: by the
// binomial distribution, whose tail is far longer than a normal one's where few are expected.
func atMost(n int, p float64) int {
	tail, one := 1.0, math.Pow(1-p, float64(n)) // more than k-1, and just k
	for k := range n {
		if tail -= one; tail < 1e-9 {
			return k
		}
		one *= float64(n-k) / float64(k+1) * p / (1 - p)
	}
	return n
}

// Challenges alone find who lies, within what the table of docs/PROTOCOL.md says, in 99
// of 100 cases.
func TestChallengesAloneFindALiarWithinTheTable(t *testing.T) {
	seed := testenv.Seed(t)
	trials := 1500
	if testing.Short() {
		trials = 300
	}
	for _, c := range []struct {
		past   Standing
		lies   float64
		p      float64 // share of challenges by share of lies
		within int
	}{
		{Standing{}, 1, 0.20, 21},
		{Standing{}, 0.5, 0.10, 44},
		{full(), 1, 0.05, 90},
		{full(), 0.2, 0.01, 459},
	} {
		missed, most := 0, 0
		for i := range trials {
			d := &worker{Standing: c.past, lies: c.lies}
			f := newFleet(seed+uint64(i), d)
			f.noCompany, f.cost = true, func() float64 { return 0 } // no credit changes the share much
			for d.foundAt == 0 && d.given < c.within {
				f.job()
			}
			if d.foundAt == 0 || d.foundAt > c.within {
				missed++
			}
			most = max(most, d.foundAt)
		}
		if Within(c.p) != c.within {
			t.Errorf("%v: the table has %d, the formula %d", c.p, c.within, Within(c.p))
		}
		if missed > atMost(trials, 0.01) {
			t.Errorf("p=%v: %d of %d not found within %d jobs", c.p, missed, trials, c.within)
		}
		t.Logf("p=%v: within %d jobs %.2f%% of %d found", c.p, c.within, 100-100*float64(missed)/float64(trials), trials)
	}
}

// A fleet of ten: one always lies, one in every tenth result, two only where both have the
// same job and agree on it.
func scene(past Standing) []*worker {
	out := []*worker{{lies: 1}, {lies: 0.1}, {league: true}, {league: true}}
	for range 6 {
		out = append(out, &worker{flaky: true})
	}
	for _, d := range out {
		d.Standing = past
	}
	return out
}

func TestLiarsInAFleetAreFoundWithinTheTable(t *testing.T) {
	seed := testenv.Seed(t)
	share := 1
	if testing.Short() {
		share = 5
	}
	for _, c := range []struct {
		name                      string
		past                      Standing
		trials                    int
		always, sometimes, league int
	}{
		// Of new devices every job has company: a lie in ten jobs is p = 10%. The two
		// share a ninth of their jobs, a fifth of which is looked at: p = 2%, until they
		// are trusted.
		{"new", Standing{}, 400 / share, Within(0.2), Within(0.1), Within(0.01)},
		// Of trusted ones a job in seven is a challenge or has company. The two share a
		// hundredth of their jobs, all of which are looked at.
		{"trusted", full(), 200 / share, Within(0.1), Within(0.01), Within(0.01)},
	} {
		t.Run(c.name, func(t *testing.T) {
			missed := map[string]int{}
			worst := map[string]int{}
			for i := range c.trials {
				f := newFleet(seed+uint64(i), scene(c.past)...)
				names, within := []string{"always", "sometimes", "league", "league"}, []int{c.always, c.sometimes, c.league, c.league}
				open := func() bool {
					for j, d := range f.devices[:4] {
						if d.foundAt == 0 && d.given < within[j] {
							return true
						}
					}
					return false
				}
				for open() {
					f.job()
				}
				for j, d := range f.devices[:4] {
					if d.foundAt == 0 || d.foundAt > within[j] {
						missed[names[j]]++
					}
					worst[names[j]] = max(worst[names[j]], d.foundAt)
				}
				for _, d := range f.devices[4:] {
					if d.Wrong > 0 || len(d.Doubts) > 0 {
						t.Errorf("seed %d: an honest device was punished: %+v", seed+uint64(i), d.Standing)
					}
				}
			}
			for name, n := range missed {
				of := c.trials
				if name == "league" {
					of *= 2
				}
				if n > atMost(of, 0.01) {
					t.Errorf("%s: %d of %d were not found in time", name, n, of)
				}
			}
			t.Logf("missed %v of %d; the last were found after %v jobs", missed, c.trials, worst)
		})
	}
}

// Ten thousand jobs among liars, with devices that fail and come back, two kinds of
// engines, one module that is not the same on both, and jobs that the coordinator
// cannot run: no honest device is punished, and customers get what is right.
func TestNoHonestDeviceIsPunished(t *testing.T) {
	seed, fleets := testenv.Seed(t), uint64(4)
	if testing.Short() {
		fleets = 1
	}
	for i := range fleets {
		devices := scene(Standing{})
		for j, d := range devices {
			if j%2 == 1 {
				d.Engine = otherEngine
			}
		}
		devices = append(devices, &worker{flaky: true, Copy: Copy{Engine: otherEngine}}, &worker{flaky: true, Copy: Copy{Engine: otherEngine}})
		f := newFleet(seed+i, devices...)
		f.modules, f.unable = 5, 0.05
		for f.jobs < 10_000 {
			f.job()
		}
		for j, d := range f.devices {
			switch honest := j >= 4; {
			case honest && (d.Wrong > 0 || d.Figure() < 1):
				t.Errorf("seed %d: honest device %d was punished: %+v", seed+i, j, d.Standing)
			case honest && d.Aside():
				t.Errorf("seed %d: honest device %d gets no jobs any more: %+v", seed+i, j, d.Standing)
			case honest && d.Engine == ownEngine && !d.Trusted():
				t.Errorf("seed %d: honest device %d is not trusted after %d jobs: %+v", seed+i, j, d.given, d.Standing)
			// Who was only ever caught by a module that is not the same everywhere is
			// doubted; who has no partner left tells no more lies.
			case !honest && d.told > 0 && d.foundAt == 0 && len(d.Doubts) == 0:
				t.Errorf("seed %d: liar %d was not found in %d jobs: %+v", seed+i, j, d.given, d.Standing)
			}
		}
		// What is wrong is what was given out before the liars were found.
		if f.wrong > 40 {
			t.Errorf("seed %d: %d wrong results", seed+i, f.wrong)
		}
		t.Logf("seed %d: %d jobs, %d copies and challenges, %d runs by the coordinator, %d wrong results, %d of them found later", seed+i, f.jobs, f.copies, f.own, f.wrong, f.repaired)
	}
}
