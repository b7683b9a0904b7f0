package health

import (
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deimos-edge/deimos/hw"
)

// TestWhatADiskIsDecidesWhatIsSaidOfIt has one case for each side of a rule
// that TestEachRuleFiresAndEnds shows only one side of.
func TestWhatADiskIsDecidesWhatIsSaidOfIt(t *testing.T) {
	gone := func(g *rig, name string) {
		g.pass(time.Hour)
		g.inv.Disks = slices.DeleteFunc(g.inv.Disks, func(d hw.Disk) bool { return d.Name == name })
		g.pass(time.Hour)
	}
	for name, c := range map[string]struct {
		do   func(*rig)
		want []string
	}{
		"a disk in the machine is missed though nothing of ours is on it": {func(g *rig) {
			g.inv.Disks = append(g.inv.Disks, hw.Disk{Name: "sdz", Serial: "Z1", Bus: "sata", Size: GiB})
			gone(g, "sdz")
		}, []string{"disk_gone Z1"}},
		"a disk on USB is missed if a volume is on it": {func(g *rig) {
			g.disk("sda").Bus = "usb"
			gone(g, "sda")
		}, []string{"disk_gone S1"}},
		"a disk on USB without one is not": {func(g *rig) {
			g.inv.Disks = append(g.inv.Disks, hw.Disk{Name: "sdz", Serial: "Z1", Bus: "usb", Size: GiB})
			gone(g, "sdz")
		}, nil},
		"of two with one serial number it is told which": {func(g *rig) {
			g.inv.Disks = append(g.inv.Disks, hw.Disk{Name: "sdy", Serial: "same", Bus: "usb", Size: GiB},
				hw.Disk{Name: "sdz", Serial: "same", Bus: "usb", Size: GiB, Health: &hw.Health{Passed: new(false)}})
			g.pass(time.Hour)
		}, []string{"disk_failing sdz"}},
		"an NVMe disk knows itself what is too hot": {func(g *rig) {
			g.disk("nvme0n1").Health.Temperature = new(float64(ssdWarm + 5))
			g.pass(time.Hour)
		}, nil},
		"more bad sectors than it has are a mistake": {func(g *rig) {
			g.pass(time.Hour)
			g.disk("sda").Health.Reallocated = new(uint64(1 << 40))
			g.pass(time.Hour)
		}, nil},
		"sectors that cannot be read once are not told": {func(g *rig) {
			g.pass(time.Hour)
			g.disk("sda").Health.Pending = new(uint64(8))
			g.m.Inventory(g.inv)
			time.Sleep(probing / 2)
		}, nil},
		"spare blocks run out, as the disk says": {func(g *rig) {
			h := g.disk("nvme0n1").Health
			h.Spare, h.Wear, h.Passed, h.Warnings = nil, nil, new(false), []string{"spare blocks are running out"}
			g.pass(time.Hour)
		}, []string{"disk_wearing N1"}},
		"a power cut is told once, by the machine or by the disk": {func(g *rig) {
			g.pass(time.Hour)
			g.boot("boot2") // without Close
			g.disk("nvme0n1").Health.UnsafeShutdowns = new(uint64(13))
			g.pass(time.Hour)
		}, []string{"unsafe_shutdown"}},
		"a disk that moves little of what it could is not at work": {func(g *rig) {
			g.pass(time.Hour)
			g.m.mem.Disks["S1"].Best = 100 * busyBytes
			for range 2 * slowInARow {
				g.use("sda", func(u *hw.DiskUse) { u.ReadMS = new(900.0); u.WrittenBytes += 15 * busyBytes })
				g.m.Telemetry(g.tel, nil)
				time.Sleep(sampling)
			}
			g.pass(10 * time.Minute)
		}, []string{"disk_slow S1"}},
		"one odd count of bytes does not make a disk at work seem idle": {func(g *rig) {
			g.pass(time.Hour)
			g.use("sda", func(u *hw.DiskUse) { u.WrittenBytes += 1e11 })
			for range 2 * slowInARow {
				g.m.Telemetry(g.tel, nil)
				time.Sleep(sampling)
				g.use("sda", func(u *hw.DiskUse) { u.ReadMS = new(900.0); u.WrittenBytes += 20 * busyBytes })
			}
			g.use("sda", func(u *hw.DiskUse) { u.ReadMS = nil })
			g.pass(10 * time.Minute)
		}, nil},
		"a latency is not judged until it is known": {func(g *rig) {
			g.pass(learnMean * sampling)
			g.use("sda", func(u *hw.DiskUse) { u.ReadMS = new(900.0) })
			g.pass(2 * slowInARow * sampling)
			g.use("sda", func(u *hw.DiskUse) { u.ReadMS = nil })
			g.pass(10 * time.Minute)
		}, nil},
		"a count of errors that begins anew is none": {func(g *rig) {
			g.use("sda", func(u *hw.DiskUse) { u.Errors = new(uint64(5)) })
			g.pass(time.Hour)
			g.use("sda", func(u *hw.DiskUse) { u.Errors = new(uint64(2)) })
			g.pass(time.Hour)
		}, nil},
		"a lone temperature is the processor's": {func(g *rig) {
			g.inv.Sensors = []hw.Sensor{{Name: "temp1", Kind: hw.Temperature}}
			g.tel.Temperatures = map[string]float64{"temp1": defaultWarm + 1}
			g.pass(time.Hour)
		}, []string{"overheating temp1"}},
		"a large machine with a small share available has memory": {func(g *rig) {
			g.tel.MemoryTotal, g.tel.MemoryAvailable = 512*GiB, GiB
			g.pass(time.Hour)
		}, nil},
		"short of memory until there is clearly more": {func(g *rig) {
			g.tel.MemoryTotal, g.tel.MemoryAvailable = 2*GiB, 60<<20
			g.pass(time.Hour)
			g.tel.MemoryAvailable = 100 << 20
			g.pass(time.Hour)
		}, []string{"memory_pressure"}},
		"a count of throttling that begins anew is none": {func(g *rig) {
			for i := range uint64(40) {
				g.tel.Throttling = &hw.Throttling{Count: new(100 - i)}
				g.m.Telemetry(g.tel, nil)
				time.Sleep(sampling)
			}
		}, nil},
		"a folder that another filesystem now covers was not written to there": {func(g *rig) {
			g.pass(time.Hour)
			g.inv.Filesystems = append(g.inv.Filesystems, hw.Filesystem{Mount: "/mnt/disk1/deimos", Disk: "sda", ReadOnly: true, Total: GiB, Free: GiB})
			g.pass(time.Hour)
		}, nil},
		"a disk that one sample leaves out is not gone": {func(g *rig) {
			g.pass(time.Hour + time.Minute)
			use := g.tel.Disks["sda"]
			delete(g.tel.Disks, "sda")
			g.m.Telemetry(g.tel, nil)
			g.expect()
			g.tel.Disks["sda"] = use
			g.m.Telemetry(g.tel, nil)
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(g *rig) {
				c.do(g)
				g.expect(c.want...)
			})
		})
	}
}

func TestALatencyThatCannotBeIsForgotten(t *testing.T) {
	m, err := decodeMemory([]byte(`{"format":1,"run":5,"disks":{"A":{"read":{"log":1e300,"n":500},"write":{"log":1.5,"n":500}}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if d := m.Disks["A"]; d.Read != (usual{}) || d.Write != (usual{1.5, 500}) {
		t.Errorf("%+v", d)
	}
}

func TestAVerdictCountsFromTheOppositeOne(t *testing.T) {
	in(t, func(g *rig) {
		for _, v := range []verdict{no, no, yes, unknown, yes} {
			g.m.judge(DiskFailing, "x", v, 3, "", "it fails")
		}
		g.expect()
		g.m.judge(DiskFailing, "x", yes, 3, "", "it fails")
		g.expect("disk_failing x")
	})
}

func TestDisksThatComeAndGoDoNotWearOutTheMemorysOwn(t *testing.T) {
	in(t, func(g *rig) {
		g.pass(time.Hour)
		var n atomic.Int32
		write := g.m.write
		g.m.write = func(path string, raw []byte) error { n.Add(1); return write(path, raw) }
		sticks := len(g.inv.Disks)
		for i := range 144 { // a day of probes
			g.inv.Disks = append(g.inv.Disks[:sticks:sticks], hw.Disk{Name: "sdz", Serial: fmt.Sprint("Z", i), Bus: "usb", Size: GiB})
			g.m.Inventory(g.inv)
			time.Sleep(probing)
		}
		synctest.Wait()
		if n := n.Load(); n < 20 || n > 25 {
			t.Errorf("written %d times in a day", n)
		}
	})
}

func TestAMountPointHoldsWhatIsBelowIt(t *testing.T) {
	for _, c := range []struct {
		mount, dir string
		depth      int
		ok         bool
	}{
		{"/", "/srv", 0, true}, {"/srv", "/srv", 4, true}, {"/srv/", "/srv/a/b", 4, true},
		{"/srv", "/srv2", 4, false}, {"/srv/a", "/srv", 6, false},
	} {
		if depth, ok := below(c.mount, c.dir); depth != c.depth || ok != c.ok {
			t.Errorf("%s below %s: %d %v", c.dir, c.mount, depth, ok)
		}
	}
}
