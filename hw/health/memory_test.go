package health

import (
	"fmt"
	"math"
	"testing"
)

func TestACounterCountsWhatTwoReadingsAgreeOn(t *testing.T) {
	for name, c := range map[string]struct {
		readings []uint64
		falls    bool
		grew     uint64
	}{
		"the first is no growth":        {[]uint64{100}, false, 0},
		"steady":                        {[]uint64{100, 100, 100}, false, 0},
		"one high reading":              {[]uint64{100, 100, 900, 100, 100}, false, 0},
		"one low reading, then growth":  {[]uint64{100, 100, 0, 101, 100, 100}, false, 0},
		"grown":                         {[]uint64{100, 100, 103, 103}, false, 3},
		"grows on: what both have":      {[]uint64{100, 100, 103, 110}, false, 3},
		"grows twice":                   {[]uint64{100, 103, 103, 104, 104}, false, 4},
		"kept for life: low for long":   {[]uint64{100, 100, 50, 50, 100, 100}, false, 0},
		"may fall: then it grows again": {[]uint64{100, 100, 50, 50, 100, 100}, true, 50},
		"falls by what both have":       {[]uint64{100, 100, 50, 20, 50, 50}, true, 0},
	} {
		var x counter
		for i, v := range c.readings {
			x.observe(v, float64(i), day, c.falls)
		}
		if x.Grew != c.grew {
			t.Errorf("%s: grew by %d, want %d", name, x.Grew, c.grew)
		}
	}
}

func TestGrowthIsForgottenAfterItsWindow(t *testing.T) {
	var x counter
	for i, v := range []uint64{1, 2, 2} {
		x.observe(v, float64(i), day, false)
	}
	if x.observe(2, 2+day, day, false); x.Grew != 1 {
		t.Errorf("within its window: %d", x.Grew)
	}
	if x.observe(2, 2.1+day, day, false); x.Grew != 0 {
		t.Errorf("after it: %d", x.Grew)
	}
}

// TestTheRestOfALifeIsComputedFromStepToStep gives the forecast in hours.
func TestTheRestOfALifeIsComputedFromStepToStep(t *testing.T) {
	steps := []edge{{Run: 0, Wear: 10}, {Run: 10, Wear: 11}, {Run: 1010, Wear: 12}} // nobody saw the first
	slept := []edge{{Run: 0, Wear: 10, Hours: 100}, {Run: 10, Wear: 11, Hours: 110}, {Run: 1010, Wear: 12, Hours: 3110}}
	wrote := []edge{{Run: 0, Wear: 10, Written: 1}, {Run: 10, Wear: 11, Written: 1e12}, {Run: 1010, Wear: 12, Written: 2e12}}
	for name, c := range map[string]struct {
		w    wearing
		now  edge
		left float64 // 0: none can be told
	}{
		"a percent in 1000 hours":        {wearing{Edges: steps}, edge{Run: 1010, Wear: 12}, 88 * 1000},
		"the next step is due":           {wearing{Edges: steps}, edge{Run: 2010, Wear: 12}, 88 * 1000},
		"the next step is overdue":       {wearing{Edges: steps}, edge{Run: 5010, Wear: 12}, 88 * 2500},
		"the disk's own clock is longer": {wearing{Edges: slept}, edge{Run: 1010, Wear: 12, Hours: 3110}, 88 * 3000},
		"the agent's clock is longer":    {wearing{Edges: steps}, edge{Run: 1010, Wear: 12, Hours: 5}, 88 * 1000},
		"it writes twice as much now":    {wearing{Edges: wrote, Marks: []edge{{Run: 810, Written: 1.6e12}}}, edge{Run: 1010, Wear: 12, Written: 2e12}, 88 * 500},
		"marks of less than a week":      {wearing{Edges: wrote, Marks: []edge{{Run: 900, Written: 1.6e12}}}, edge{Run: 1010, Wear: 12, Written: 2e12}, 88 * 1000},
		"worn out":                       {wearing{Edges: steps}, edge{Run: 1010, Wear: 120}, -1},
		"one step seen":                  {wearing{Edges: steps[:2]}, edge{Run: 1010, Wear: 11}, 0},
		"less than a week between steps": {wearing{Edges: []edge{{Wear: 10}, {Run: 10, Wear: 11}, {Run: 100, Wear: 12}}}, edge{Run: 1010, Wear: 12}, 0},
	} {
		left, ok := c.w.remaining(c.now)
		if want := max(c.left, 0); ok != (c.left != 0) || math.Abs(left-want) > 1e-6*want {
			t.Errorf("%s: %f hours (%v), want %f", name, left, ok, c.left)
		}
	}
}

func TestAWearThatIsReadOnceIsNoStep(t *testing.T) {
	var w wearing
	for i, v := range []float64{10, 10, 60, 10, 11, 11} {
		w.observe(edge{Run: float64(i), Wear: v})
	}
	if got := fmt.Sprint(w.Edges); got != fmt.Sprint([]edge{{Run: 1, Wear: 10}, {Run: 5, Wear: 11}}) {
		t.Error(got)
	}
}

func TestAMemoryOfManyDisksForgetsThoseUnseenTheLongest(t *testing.T) {
	m := newMemory()
	for i := range maxDisks {
		m.Disks[fmt.Sprint(i)] = &diskMemory{Seen: float64((i + 7) % maxDisks)}
	}
	m.room()
	if len(m.Disks) != maxDisks-1 || m.Disks[fmt.Sprint(maxDisks-7)] != nil {
		t.Errorf("%d disks; the one unseen the longest: %v", len(m.Disks), m.Disks[fmt.Sprint(maxDisks-7)])
	}
}
