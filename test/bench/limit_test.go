package main

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/packaging/qemu"
)

func TestARowOverItsLimitFailsTheRun(t *testing.T) {
	var all table
	all.limit("memory", "MiB", 40, 40, "%.0f")
	all.row("round trips", "/s", 2, 1, "%.0f")
	if err := all.kept(); err != nil {
		t.Error(err)
	}
	all.limit("writes", "", 13, 12, "%.0f")
	all.limit("processor", "%", math.NaN(), 1, "%.0f") // nothing was measured
	if err := all.kept(); err == nil || !strings.Contains(err.Error(), "writes; processor") {
		t.Error(err)
	}
}

// A window shorter than the ring's time shows nothing of what is written over hours.
func TestIdleWritesAreJudgedOverTheTimeOfTheRing(t *testing.T) {
	for _, c := range []struct {
		idle   time.Duration
		writes int64
		over   bool
	}{
		{2 * time.Minute, 12, false},
		{2 * time.Minute, 500, false}, // no verdict
		{ringEvery, ringWrites, false},
		{ringEvery, ringWrites + 1, true},
		{time.Hour, 12 * ringWrites, false},
		{time.Hour, 12*ringWrites + 1, true},
	} {
		var all table
		all.idleWrites(qemu.Written{Writes: c.writes}, c.idle)
		if got := all.kept() != nil; got != c.over {
			t.Errorf("%d writes in %s are too many: %v", c.writes, c.idle, got)
		}
	}
}
