package trust

import "slices"

// Pick draws up to n devices for further copies of a job: of no owner twice, none that has
// one of those that were sent, with the engine like unless that is empty, and first those
// that are near to nobody who has one. Among these each has the same chance: who lies in
// league does not choose the company. below draws evenly from [0, n).
func Pick(from, sent []Copy, like string, n int, below func(n int) int) (out []Copy) {
	owned := func(c Copy) func(Copy) bool {
		return func(s Copy) bool { return s.Owner == c.Owner || s.Device == c.Device }
	}
	near := func(c Copy) func(Copy) bool {
		return func(s Copy) bool { return c.Near != "" && s.Near == c.Near }
	}
	sent, left := slices.Clone(sent), slices.Clone(from)
	for len(out) < n {
		left = slices.DeleteFunc(left, func(c Copy) bool {
			return like != "" && c.Engine != like || slices.ContainsFunc(sent, owned(c))
		})
		best := slices.DeleteFunc(slices.Clone(left), func(c Copy) bool { return slices.ContainsFunc(sent, near(c)) })
		if len(best) == 0 {
			best = left
		}
		if len(best) == 0 {
			break
		}
		c := best[below(len(best))]
		sent, out = append(sent, c), append(out, c)
	}
	return out
}
