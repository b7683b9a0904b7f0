package tour

import (
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/disk"
)

func TestADiskThatFailsIsToldFirstHoweverManyThereAre(t *testing.T) {
	inv := hw.Inventory{Sensors: []hw.Sensor{{Name: "fan", Kind: hw.Fan, Value: 4000}, {Name: "cool", Kind: hw.Temperature, Value: 30}, {Name: "cpu", Kind: hw.Temperature, Value: 61}}}
	for _, name := range []string{"sda", "sdb", "sdc", "sdd"} {
		inv.Disks = append(inv.Disks, hw.Disk{Name: name, Power: hw.PowerAwake, Health: &hw.Health{Passed: new(true)}})
	}
	inv.Disks[3].Health.Passed = new(false)
	lines := few("health", health(inv))
	want := []string{"health   disk sdd, 0 B, expects to fail: save what is on it", "         61 °C at the hottest sensor, cpu", "         disk sda, 0 B, has no warning", "         and 2 more"}
	if !slices.Equal(lines, want) {
		t.Errorf("the step says\n%s\nnot\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
}

func TestDisksThatCouldHoldChunksComeFirst(t *testing.T) {
	says := room([]disk.Candidate{
		{Mount: "/boot", Why: "the machine starts from it"},
		{Disk: "sdb", Why: "it is not mounted"},
		{Mount: "/data", Use: true, Capacity: 5 << 30, Why: "it is empty"},
	})
	want := []string{"/data could hold 5.0 GiB: it is empty", "/boot not used: the machine starts from it", "sdb not used: it is not mounted"}
	if !slices.Equal(says, want) {
		t.Errorf("the step says %q, not %q", says, want)
	}
}
