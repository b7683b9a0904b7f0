package main

import (
	"math"
	"strings"
	"testing"
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
