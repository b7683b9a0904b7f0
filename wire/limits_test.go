package wire

import (
	"math"
	"strings"
	"testing"
)

func TestJobLimitsThatAreNone(t *testing.T) {
	t.Parallel()
	for _, ok := range []JobLimits{{}, OrdinaryLimits, MostLimits} {
		if err := ok.Check(); err != nil {
			t.Errorf("%+v: %v", ok, err)
		}
	}
	for name, bad := range map[string][]JobLimits{
		"memory_bytes": {{MemoryBytes: -1}, {MemoryBytes: MostLimits.MemoryBytes + 1}},
		"cpu_seconds":  {{CPUSeconds: -1}, {CPUSeconds: math.NaN()}, {CPUSeconds: math.Inf(1)}, {CPUSeconds: MostLimits.CPUSeconds + 1}},
		"wall_seconds": {{WallSeconds: -1}, {WallSeconds: math.NaN()}, {WallSeconds: MostLimits.WallSeconds + 1}},
		"output_bytes": {{OutputBytes: -1}, {OutputBytes: 1 << 50}},
	} {
		for _, l := range bad {
			if err := l.Check(); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("%+v: %v", l, err)
			}
		}
	}
}
