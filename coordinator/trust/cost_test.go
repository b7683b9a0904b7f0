package trust

import (
	"math"
	"slices"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// What docs/PROTOCOL.md says that verifying costs, in a fleet of ten honest devices of as
// many owners: how often devices run what is given to them once, challenges among it.
func TestWhatVerifyingCosts(t *testing.T) {
	seed, trials := testenv.Seed(t), 300
	if testing.Short() {
		trials = 60
	}
	devices := func(past Standing) (all []*worker) {
		for range 10 {
			all = append(all, &worker{Standing: past})
		}
		return all
	}
	for _, c := range []struct {
		name string
		past Standing
		jobs int
		runs float64 // a job
	}{
		// Two owners, and a third of a fifth of the jobs; of all that, a fifth more are challenges.
		{"new", Standing{}, 20, (2 + checkShare) / (1 - newShare)},
		// One; of a twentieth of the jobs two more; a twentieth are challenges.
		{"trusted", full(), 200, (1 + 2*trustedShare) / (1 - trustedShare)},
	} {
		jobs, runs, own := 0, 0, 0
		for i := range trials {
			f := newFleet(seed+uint64(i), devices(c.past)...)
			f.cost = func() float64 { return 0 } // as little credit as can be, so that who is new stays so
			for f.jobs < c.jobs {
				f.job()
			}
			jobs, runs, own = jobs+f.jobs, runs+f.copies, own+f.own
		}
		got := float64(runs) / float64(jobs)
		t.Logf("%s devices: %.2f runs a job over %d jobs; derived %.2f", c.name, got, jobs, c.runs)
		if math.Abs(got-c.runs) > 0.05*c.runs {
			t.Errorf("%s devices run %.3f times what they are given, not %.3f", c.name, got, c.runs)
		}
		if own > 0 {
			t.Errorf("the coordinator ran %d jobs that nobody disputed", own)
		}
	}
	for _, c := range []struct {
		cost float64
		most int
	}{{costUnit, 1700}, {0, 2100}} { // at a job a minute: a day, a day and a half
		var all []int
		runs := 0
		for i := range 20 {
			f := newFleet(seed+uint64(i), devices(Standing{})...)
			f.cost = func() float64 { return c.cost }
			for slices.ContainsFunc(f.devices, func(d *worker) bool { return !d.Trusted() }) {
				f.job()
			}
			all, runs = append(all, f.jobs), runs+f.copies
		}
		slices.Sort(all)
		sum := 0
		for _, n := range all {
			sum += n
		}
		t.Logf("jobs of %g s: all ten are trusted after %d to %d jobs, and had run %.2f times as many", c.cost, all[0], all[len(all)-1], float64(runs)/float64(sum))
		if all[len(all)-1] > c.most {
			t.Errorf("jobs of %g s: ten devices are trusted after %d jobs, it should be %d at most", c.cost, all[len(all)-1], c.most)
		}
	}
}
