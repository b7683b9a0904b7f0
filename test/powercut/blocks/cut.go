package blocks

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
)

// Cut is one moment at which the power goes: before Event At of the record, with
// what Seed chooses of the changes that were not durable yet. From both, the disk
// follows, so a cut can be made again alone.
type Cut struct {
	At   int
	Seed uint64
}

func (c Cut) String() string { return fmt.Sprintf("%d:%d", c.At, c.Seed) }

// ParseCut reads what [Cut.String] writes, as a cut of this recording.
func (r *Recording) ParseCut(s string) (c Cut, err error) {
	at, seed, _ := strings.Cut(s, ":")
	var err1, err2 error
	c.At, err1 = strconv.Atoi(at)
	c.Seed, err2 = strconv.ParseUint(seed, 10, 64)
	if err1 != nil || err2 != nil || c.At < 0 || c.At > len(r.Events) {
		return c, fmt.Errorf("%q is no cut of this recording, which would be AT:SEED", s)
	}
	return c, nil
}

// cache is a disk's volatile write cache: the changes that were made and are not
// durable yet, by the order in which they came.
type cache struct {
	rec     *Recording
	changes int   // that came
	pending []int // events, of changes that are not durable
	numbers []int // which changes these are, from 1
}

// step takes the next event, and returns those that have become durable, as a
// disk would write them: in their order.
func (c *cache) step(i int) (durable []int) {
	e := c.rec.Events[i]
	switch {
	case e.Change():
		c.changes++
		c.pending, c.numbers = append(c.pending, i), append(c.numbers, c.changes)
		if !e.FUA {
			return nil
		}
		// It is durable now; what came before it is not. Older changes of the same
		// sectors are settled with it, or they would undo it when they get durable.
		last := len(c.pending) - 1
		var rest, numbers []int
		for k, at := range c.pending {
			if k == last || overlap(c.rec.Events[at], e) {
				durable = append(durable, at)
			} else {
				rest, numbers = append(rest, at), append(numbers, c.numbers[k])
			}
		}
		c.pending, c.numbers = rest, numbers
	case e.Kind == Flush:
		n := 0
		for n < len(c.numbers) && c.numbers[n] <= e.Covers {
			n++
		}
		durable = c.pending[:n:n]
		c.pending, c.numbers = c.pending[n:], c.numbers[n:]
	}
	return durable
}

func overlap(a, b Event) bool { return a.Offset < b.Offset+b.Length && b.Offset < a.Offset+a.Length }

const (
	// Sector is what a disk writes whole, in bytes.
	Sector = 512
	page   = 4096
)

// piece is a part of a change that reached the disk.
type piece struct {
	event        int
	from, length int64 // within the change
}

// choose is what a power cut leaves of the pending changes, in the order in which
// they came. A disk may write its cache in any order and stop anywhere, so any
// subset is possible; sectors are written whole.
func (c *cache) choose(seed uint64) (kept []piece, how string) {
	rng := rand.New(rand.NewPCG(seed, 0xc0ffee))
	n := len(c.pending)
	whole := func(k int) piece { return piece{c.pending[k], 0, c.rec.Events[c.pending[k]].Length} }
	subset := func(p float64, unit int64) {
		for k := range n {
			switch {
			case unit == 0 && rng.Float64() < p:
				kept = append(kept, whole(k))
			case unit > 0:
				kept = append(kept, torn(rng, whole(k), unit, p)...)
			}
		}
	}
	if n == 0 {
		return nil, "nothing was pending"
	}
	switch rng.IntN(10) {
	case 0:
		how = "nothing of what was pending is there"
	case 1:
		how = "all of what was pending is there"
		subset(2, 0)
	case 2:
		upTo := rng.IntN(n)
		how = fmt.Sprintf("the first %d of %d pending changes are there", upTo, n)
		for k := range upTo {
			kept = append(kept, whole(k))
		}
	case 3:
		from := 1 + rng.IntN(n)
		how = fmt.Sprintf("only the last %d of %d pending changes are there", n-from, n)
		for k := from; k < n; k++ {
			kept = append(kept, whole(k))
		}
	case 4:
		lost := rng.IntN(n)
		how = fmt.Sprintf("all of %d pending changes are there but number %d", n, lost+1)
		for k := range n {
			if k != lost {
				kept = append(kept, whole(k))
			}
		}
	case 5:
		only := rng.IntN(n)
		how = fmt.Sprintf("of %d pending changes only number %d is there", n, only+1)
		kept = append(kept, whole(only))
	case 6, 7:
		p := []float64{.1, .5, .9}[rng.IntN(3)]
		how = fmt.Sprintf("of %d pending changes each is there with probability %.1f", n, p)
		subset(p, 0)
	case 8:
		how = fmt.Sprintf("%d pending changes, torn at sectors", n)
		subset(.5, Sector)
	default:
		how = fmt.Sprintf("%d pending changes, torn at pages", n)
		subset(.5, page)
	}
	return kept, how
}

// torn is the parts of a change that got through, unit by unit.
func torn(rng *rand.Rand, p piece, unit int64, chance float64) (kept []piece) {
	for at := int64(0); at < p.length; at += unit {
		if rng.Float64() >= chance {
			continue
		}
		n := min(unit, p.length-at)
		if k := len(kept) - 1; k >= 0 && kept[k].from+kept[k].length == at {
			kept[k].length += n
			continue
		}
		kept = append(kept, piece{p.event, at, n})
	}
	return kept
}

// Plan chooses cuts: the moment before each flush is answered, which is when the
// most is at stake, and moments at random between, until there are n; of more flushes than
// n, every so manieth. They are in the order of the record.
func Plan(rec *Recording, n int, seed uint64) (cuts []Cut) {
	rng := rand.New(rand.NewPCG(seed, 1))
	var flushes, any []int
	began := false
	for i, e := range rec.Events {
		began = began || e.Change()
		switch {
		case !began:
		case e.Kind == Flush:
			flushes = append(flushes, i)
		case e.Change():
			any = append(any, i)
		}
	}
	if len(flushes) == 0 || len(any) == 0 {
		return nil
	}
	atFlush := n / 2
	times := map[int]int{} // at → cuts
	for k := range atFlush {
		times[flushes[k*len(flushes)/atFlush]]++
	}
	for k := range n - atFlush { // evenly, so that no stretch is left out
		lo, hi := Spread(0, len(any), k, n-atFlush)
		times[any[lo+rng.IntN(max(1, hi-lo))]]++
	}
	for i := range rec.Events {
		for range times[i] {
			cuts = append(cuts, Cut{i, rng.Uint64() >> 32})
		}
	}
	return cuts
}

// Spread is the k-th of n equal parts of what is between two numbers.
func Spread(from, to, k, n int) (lo, hi int) {
	return from + (to-from)*k/n, from + (to-from)*(k+1)/n
}
