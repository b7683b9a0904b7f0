package policy

import (
	"math"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/deimos-edge/deimos/wire"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// within fails unless every limit is above zero and no cap of d is passed.
func within(t *testing.T, got wire.JobLimits, d Policy) {
	t.Helper()
	if !(got.MemoryBytes > 0 && got.MemoryBytes <= d.MaxMemory &&
		got.OutputBytes > 0 && got.OutputBytes <= d.MaxOutput &&
		got.CPUSeconds > 0 && got.CPUSeconds <= d.MaxCPU &&
		got.WallSeconds > 0 && got.WallSeconds <= d.MaxWall) {
		t.Errorf("limits %+v are not within %+v", got, d)
	}
}

func TestOwnersCapsAlwaysWin(t *testing.T) {
	r := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	floats := []float64{0, -1, 1e-9, 1, 1e18, math.MaxFloat64, math.Inf(1), math.Inf(-1), math.NaN()}
	ints := []int64{0, -1, 1, 1 << 20, 1 << 40, math.MaxInt64, math.MinInt64}
	f := func() float64 { return floats[r.IntN(len(floats))] }
	n := func() int64 { return ints[r.IntN(len(ints))] }
	for range 10_000 {
		p := Policy{MaxMemory: n(), MaxOutput: n(), MaxCPU: f(), MaxWall: f(), Slots: int(int32(n()))}
		e := p.Effective()
		if e.Slots < 1 || e.Slots > maxSlots {
			t.Fatalf("%+v has %d slots", p, e.Slots)
		}
		if e.MaxWall > longest.Seconds() {
			t.Fatalf("%+v lets a job run for %g s", p, e.MaxWall)
		}
		for _, c := range []struct{ set, got float64 }{
			{float64(p.MaxMemory), float64(e.MaxMemory)}, {float64(p.MaxOutput), float64(e.MaxOutput)},
			{p.MaxCPU, e.MaxCPU}, {p.MaxWall, e.MaxWall},
		} {
			if c.set > 0 && c.got > c.set {
				t.Fatalf("the owner's %g became %g", c.set, c.got)
			}
		}
		want := wire.JobLimits{MemoryBytes: n(), OutputBytes: n(), CPUSeconds: f(), WallSeconds: f()}
		memory := want.MemoryBytes
		if memory <= 0 {
			memory = wire.OrdinaryLimits.MemoryBytes
		}
		got, err := p.Allow(want)
		if (err != nil) != (memory > e.MaxMemory) {
			t.Fatalf("%d bytes of %d: %v", memory, e.MaxMemory, err)
		}
		if err != nil {
			continue
		}
		if got.MemoryBytes != memory {
			t.Fatalf("%d bytes became %d", memory, got.MemoryBytes)
		}
		within(t, got, e)
	}
}

func TestAnOrderWithoutLimitsGetsOrdinaryOnes(t *testing.T) {
	if got, err := Default().Allow(wire.JobLimits{}); err != nil || got != wire.OrdinaryLimits {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestAnOrderWithinTheCapsGetsWhatItAsksFor(t *testing.T) {
	want := wire.JobLimits{MemoryBytes: 1 << 20, CPUSeconds: 0.5, WallSeconds: 2, OutputBytes: 10}
	if got, err := Default().Allow(want); err != nil || got != want {
		t.Errorf("got %+v, want %+v (%v)", got, want, err)
	}
}

func TestConfigurationFileOverridesDefaults(t *testing.T) {
	p := Default()
	if _, err := toml.Decode("enabled = false\nslots = 3\nmax_memory_bytes = 1048576\nmax_cpu_seconds = 1.5\n", &p); err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Enabled, want.Slots, want.MaxMemory, want.MaxCPU = false, 3, 1<<20, 1.5
	if !reflect.DeepEqual(p, want) {
		t.Errorf("got %+v, want %+v", p, want)
	}
}
