package health

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/sensor"
	"github.com/deimos-edge/deimos/wire"
)

const (
	GiB      = 1 << 30
	probing  = 10 * time.Minute
	sampling = 10 * time.Second
)

// rig is a machine with one disk for the system and one for chunks, which is
// well until a test changes it.
type rig struct {
	*testing.T
	dir string
	b   board.Board
	r   *Registry
	m   *Machine
	inv *hw.Inventory
	tel hw.Telemetry
	sil []sensor.Silent
	log bytes.Buffer
	put func(path string, raw []byte) error // as the Machine writes it; tests do without the sync
	mu  sync.Mutex
	did float64   // percent of the first disk's life that is used
	at  time.Time // of the newest probe
}

var rigPaths = []Path{{Dir: "/var/lib/deimos"}, {Dir: "/mnt/disk1/deimos", Floor: GiB}}

func newRig(t *testing.T) *rig {
	g := &rig{T: t, dir: t.TempDir(), inv: well(), tel: fine()}
	g.boot("boot1")
	return g
}

// in runs a test of one rig by a clock of its own.
func in(t *testing.T, f func(*rig)) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t)
		f(g)
		_ = g.m.Close()
	})
}

func (g *rig) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.log.Write(b)
}

// boot starts an agent.
func (g *rig) boot(id string) {
	g.Helper()
	g.r = New(time.Now)
	var err error
	if g.m, err = NewMachine(g.dir, g.b, rigPaths, g.r, slog.New(slog.NewTextHandler(g, nil)), id); err != nil {
		g.Fatal(err)
	}
	g.put = g.m.write
	g.m.write = func(path string, raw []byte) error { return os.WriteFile(path, raw, 0o600) }
}

func (g *rig) restart(id string) {
	g.Helper()
	if err := g.m.Close(); err != nil {
		g.Fatal(err)
	}
	g.boot(id)
}

func well() *hw.Inventory {
	return &hw.Inventory{
		Format: hw.Format,
		Disks: []hw.Disk{
			{Name: "nvme0n1", Model: "Fast", Serial: "N1", Bus: "nvme", Size: 500 * GiB, System: true, Power: hw.PowerAwake,
				Partitions: []hw.Partition{{Name: "nvme0n1p2", Mounts: []string{"/"}}},
				Health: &hw.Health{Source: "nvme", Temperature: new(45.0), PowerOnHours: new(uint64(5000)), UnsafeShutdowns: new(uint64(12)), Wear: new(7.0),
					MediaErrors: new(uint64(0)), Passed: new(true), Spare: new(100.0), WrittenBytes: new(uint64(5e12))}},
			{Name: "sda", Model: "Big", Serial: "S1", Bus: "sata", Rotational: true, Size: 4000 * GiB, Power: hw.PowerAwake,
				Partitions: []hw.Partition{{Name: "sda1", Mounts: []string{"/mnt/disk1"}}},
				Health: &hw.Health{Source: "smart", Temperature: new(38.0), PowerOnHours: new(uint64(20000)), Reallocated: new(uint64(3)), Pending: new(uint64(0)),
					CRCErrors: new(uint64(7)), Passed: new(true)}},
			{Name: "sdb", Model: "Stick", Serial: "U1", Bus: "usb", Removable: true, Size: 16 * GiB, Power: hw.PowerUnknown},
		},
		Filesystems: []hw.Filesystem{
			{Mount: "/", Disk: "nvme0n1", Type: "ext4", Total: 480 * GiB, Used: 80 * GiB, Free: 400 * GiB},
			{Mount: "/mnt/disk1", Disk: "sda", Type: "ext4", Total: 3900 * GiB, Used: 3899 * GiB, Free: GiB}, // full to its floor
		},
		Sensors: []hw.Sensor{
			{Name: "cpu_thermal", Kind: hw.Temperature, Unit: "°C", Value: 50, High: new(85.0), Critical: new(105.0)},
			{Name: "nvme Composite", Kind: hw.Temperature, Unit: "°C", Value: 45, High: new(82.0), Critical: new(85.0)},
			{Name: "acpitz", Kind: hw.Temperature, Unit: "°C", Value: 28},
		},
		Clocks:    []hw.Clock{{Name: "rtc0", System: true, Year: 2026}},
		Watchdogs: []hw.Watchdog{{Name: "watchdog0", Identity: "softdog"}},
	}
}

func fine() hw.Telemetry {
	return hw.Telemetry{
		MemoryTotal: 4 * GiB, MemoryAvailable: 2 * GiB,
		Temperatures: map[string]float64{"cpu_thermal": 50, "nvme Composite": 45, "acpitz": 28},
		Data:         &hw.Usage{Total: 480 * GiB, Used: 80 * GiB, Free: 400 * GiB},
		Pressure:     &hw.Pressure{},
		Throttling:   &hw.Throttling{Now: new(false), UnderVoltage: new(false)},
		Disks: map[string]hw.DiskUse{
			"nvme0n1": {ReadMS: new(0.2), WriteMS: new(0.5), FlushMS: new(2.0), Errors: new(uint64(0))},
			"sda":     {ReadMS: new(9.0), WriteMS: new(12.0), FlushMS: new(25.0), Errors: new(uint64(0))},
			"sdb":     {},
		},
	}
}

func (g *rig) disk(name string) *hw.Disk {
	return &g.inv.Disks[slices.IndexFunc(g.inv.Disks, func(d hw.Disk) bool { return d.Name == name })]
}

func (g *rig) use(name string, change func(*hw.DiskUse)) {
	u := g.tel.Disks[name]
	change(&u)
	g.tel.Disks = maps.Clone(g.tel.Disks)
	g.tel.Disks[name] = u
}

// pass lets time pass: a probe every ten minutes, and a sample every ten
// seconds, or with each probe if it is a day or more.
func (g *rig) pass(d time.Duration) {
	sampling := sampling
	if d >= 24*time.Hour {
		sampling = probing
	}
	for end := time.Now().Add(d); time.Now().Before(end); {
		if time.Since(g.at) >= probing {
			g.at = time.Now()
			g.m.Inventory(g.inv)
		}
		for n, u := range g.tel.Disks { // whatever a disk does, it does something
			if u.InFlight == 0 {
				u.WrittenBytes += 1 << 20
				g.tel.Disks[n] = u
			}
		}
		g.m.Telemetry(g.tel, g.sil)
		time.Sleep(sampling)
	}
}

// probes lets time pass with probes only.
func (g *rig) probes(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		g.m.Inventory(g.inv)
		time.Sleep(probing)
	}
}

func (g *rig) expect(want ...string) {
	g.Helper()
	expect(g.T, g.r, want...)
}

// Each rule fires when something is wrong for long enough, and its warning ends
// when it is well again.
func TestEachRuleFiresAndEnds(t *testing.T) {
	for name, c := range map[string]struct {
		bad   func(*rig)
		after time.Duration // at the latest
		want  string
		text  string
		sev   wire.Severity
		well  func(*rig)
		ends  time.Duration // at the latest
	}{
		"a disk expects to fail": {
			func(g *rig) { g.disk("sda").Health.Passed = new(false) }, probing, "disk_failing S1", "expects to fail soon", wire.Critical,
			func(g *rig) { g.disk("sda").Health.Passed = new(true) }, 3 * time.Hour},
		"an NVMe disk says that it is unreliable": {
			func(g *rig) {
				g.disk("nvme0n1").Health.Passed = new(false)
				g.disk("nvme0n1").Health.Warnings = []string{"reliability degraded by media errors"}
			}, probing, "disk_failing N1", "reliability degraded", wire.Critical,
			func(g *rig) { g.inv = well() }, 3 * time.Hour},
		"sectors cannot be read": {
			func(g *rig) { g.disk("sda").Health.Pending = new(uint64(8)) }, time.Hour, "disk_failing S1", "8 more bad sectors", wire.Trouble,
			func(g *rig) { g.disk("sda").Health.Pending = new(uint64(0)) }, 32 * 24 * time.Hour},
		"sectors are replaced": {
			func(g *rig) { g.disk("sda").Health.Reallocated = new(uint64(103)) }, time.Hour, "disk_failing S1", "100 more bad sectors", wire.Critical,
			func(*rig) {}, 32 * 24 * time.Hour},
		"media errors": {
			func(g *rig) { g.disk("nvme0n1").Health.MediaErrors = new(uint64(1)) }, time.Hour, "disk_failing N1", "1 more bad", wire.Trouble,
			func(*rig) {}, 32 * 24 * time.Hour},
		"worn": {
			func(g *rig) { g.disk("nvme0n1").Health.Wear = new(93.0) }, time.Hour, "disk_wearing N1", "93% of its rated life", wire.Trouble,
			func(g *rig) { g.disk("nvme0n1").Health.Wear = new(7.0) }, 3 * time.Hour},
		"worn out": {
			func(g *rig) { g.disk("nvme0n1").Health.Wear = new(130.0) }, time.Hour, "disk_wearing N1", "130%", wire.Critical,
			func(g *rig) { g.disk("nvme0n1").Health.Wear = new(7.0) }, 3 * time.Hour},
		"little spare": {
			func(g *rig) { g.disk("nvme0n1").Health.Spare = new(9.0) }, time.Hour, "disk_wearing N1", "9% of its spare", wire.Trouble,
			func(g *rig) { g.disk("nvme0n1").Health.Spare = new(50.0) }, 3 * time.Hour},
		"a bad cable": {
			func(g *rig) { g.disk("sda").Health.CRCErrors = new(uint64(60)) }, time.Hour, "disk_cable S1", "53 damaged transfers", wire.Trouble,
			func(*rig) {}, 30 * time.Hour},
		"reads have become slow": {
			func(g *rig) { g.use("sda", func(u *hw.DiskUse) { u.ReadMS = new(900.0) }) }, 10 * time.Minute, "disk_slow S1", "reads take 900 ms, usually 9.0 ms", wire.Trouble,
			func(g *rig) { g.use("sda", func(u *hw.DiskUse) { u.ReadMS = new(9.0) }) }, 15 * time.Minute},
		"flushes have become slow": {
			func(g *rig) { g.use("nvme0n1", func(u *hw.DiskUse) { u.FlushMS = new(80.0) }) }, 10 * time.Minute, "disk_slow N1", "flushes take 80 ms, usually 2.0 ms", wire.Trouble,
			func(g *rig) { g.use("nvme0n1", func(u *hw.DiskUse) { u.FlushMS = new(2.0) }) }, 15 * time.Minute},
		"requests do not end": {
			func(g *rig) {
				g.use("sda", func(u *hw.DiskUse) { *u = hw.DiskUse{InFlight: 3, WrittenBytes: u.WrittenBytes} })
			}, 2 * time.Minute, "disk_hung S1", "does not end", wire.Critical,
			func(g *rig) { g.use("sda", func(u *hw.DiskUse) { u.InFlight, u.ReadMS = 0, new(9.0) }) }, 10 * time.Minute},
		"a disk does not answer the probe": {
			func(g *rig) {
				g.inv.Notes = []hw.Note{{Section: "disks", Code: hw.NoteTimeout, Subjects: []string{"sda"}}}
				g.disk("sda").Health = nil
			}, probing, "disk_hung S1", "did not answer in time", wire.Critical,
			func(g *rig) { g.inv = well() }, 20 * time.Minute},
		"a disk is gone": {
			func(g *rig) {
				g.inv.Disks = slices.DeleteFunc(g.inv.Disks, func(d hw.Disk) bool { return d.Name == "sda" })
				g.inv.Filesystems = g.inv.Filesystems[:1]
			}, probing, "disk_gone S1", "on it was /mnt/disk1/deimos", wire.Critical,
			func(g *rig) { g.inv = well() }, probing},
		"the kernel counts errors": {
			func(g *rig) { g.use("sda", func(u *hw.DiskUse) { u.Errors = new(uint64(4)) }) }, time.Minute, "disk_errors S1", "counted 4 errors", wire.Trouble,
			func(*rig) {}, 26 * time.Hour},
		"the system's disk is nearly full": {
			func(g *rig) { g.tel.Data = &hw.Usage{Total: 480 * GiB, Free: 5 * GiB} }, 3 * time.Minute, "filesystem_full /", "5.0 GiB of 480 GiB left", wire.Trouble,
			func(g *rig) { g.tel.Data.Free = 100 * GiB }, 10 * time.Minute},
		"a volume is below its floor": {
			func(g *rig) { g.inv.Filesystems[1].Free = GiB / 5 }, 20 * time.Minute, "filesystem_full /mnt/disk1", "where volumes leave 1.0 GiB", wire.Critical,
			func(g *rig) { g.inv.Filesystems[1].Free = GiB }, 30 * time.Minute},
		"read-only": {
			func(g *rig) { g.inv.Filesystems[1].ReadOnly = true }, 20 * time.Minute, "filesystem_read_only /mnt/disk1", "was writable", wire.Critical,
			func(g *rig) { g.inv.Filesystems[1].ReadOnly = false }, 20 * time.Minute},
		"too hot": {
			func(g *rig) { g.tel.Temperatures["cpu_thermal"] = 88 }, 3 * time.Minute, "overheating cpu_thermal", "88 °C; 85 °C is its limit", wire.Trouble,
			func(g *rig) { g.tel.Temperatures["cpu_thermal"] = 79 }, 10 * time.Minute},
		"in danger of heat": {
			func(g *rig) { g.tel.Temperatures["cpu_thermal"] = 106 }, 3 * time.Minute, "overheating cpu_thermal", "in danger", wire.Critical,
			func(g *rig) { g.tel.Temperatures["cpu_thermal"] = 79 }, 10 * time.Minute},
		"a disk that is too hot is not failing": {
			func(g *rig) {
				g.disk("nvme0n1").Health.Passed = new(false)
				g.disk("nvme0n1").Health.Warnings = []string{"too hot or too cold"}
			}, time.Hour, "overheating N1", "too hot or too cold", wire.Trouble,
			func(g *rig) { g.inv = well() }, time.Hour},
		"a hard disk without limits is too hot": {
			func(g *rig) { g.disk("sda").Health.Temperature = new(63.0) }, time.Hour, "overheating S1", "63 °C; 60 °C", wire.Trouble,
			func(g *rig) { g.inv = well() }, time.Hour},
		"throttled": {
			func(g *rig) { g.tel.Throttling = &hw.Throttling{Now: new(true)} }, 4 * time.Minute, "throttled", "below its speed", wire.Trouble,
			func(g *rig) { g.tel.Throttling = &hw.Throttling{Now: new(false)} }, 15 * time.Minute},
		"programs wait for memory": {
			func(g *rig) { g.tel.Pressure = &hw.Pressure{MemorySome: 60, MemoryFull: 30} }, 4 * time.Minute, "memory_pressure", "60% of the time", wire.Trouble,
			func(g *rig) { g.tel.Pressure = &hw.Pressure{} }, 10 * time.Minute},
		"no memory is available": {
			func(g *rig) { g.tel.MemoryAvailable = 50 << 20 }, 4 * time.Minute, "memory_pressure", "Only 50 MiB of 4.0 GiB", wire.Trouble,
			func(g *rig) { g.tel.MemoryAvailable = GiB }, 10 * time.Minute},
		"too little voltage": {
			func(g *rig) { g.tel.Throttling = &hw.Throttling{Now: new(true), UnderVoltage: new(true)} }, time.Minute, "under_voltage", "voltage", wire.Trouble,
			func(g *rig) { g.tel.Throttling = fine().Throttling }, 2 * time.Hour},
		"a sensor is silent": {
			func(g *rig) { g.sil = []sensor.Silent{{Name: "cellar", Err: errors.New("no answer at 0x76")}} }, 6 * time.Minute, "sensor_silent cellar", "no answer at 0x76", wire.Trouble,
			func(g *rig) { g.sil = nil }, 6 * time.Minute},
		"the watchdog has fired": {
			func(g *rig) { g.inv.Watchdogs[0].FiredLast = true }, probing, "watchdog_fired", "softdog", wire.Trouble,
			func(*rig) {}, 26 * time.Hour},
		"a disk has counted lost power": {
			func(g *rig) { g.disk("nvme0n1").Health.UnsafeShutdowns = new(uint64(13)) }, time.Hour, "unsafe_shutdown N1", "lost its power", wire.Trouble,
			func(*rig) {}, 26 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in(t, func(g *rig) {
				g.pass(2 * time.Hour)
				g.expect()
				c.bad(g)
				g.pass(c.after + 2*sampling)
				g.expect(c.want)
				if w := g.r.Visible()[0]; w.Severity != c.sev || !strings.Contains(w.Text, c.text) {
					t.Errorf("%s: %s", w.Severity, w.Text)
				}
				c.well(g)
				g.pass(c.ends)
				g.pass(probing)
				g.expect()
			})
		})
	}
}

// A figure that is absent says nothing: it neither raises a warning nor ends one.
func TestUnknownIsNotFine(t *testing.T) {
	in(t, func(g *rig) {
		g.pass(2 * time.Hour)
		g.disk("sda").Health.Passed = new(false)
		g.disk("nvme0n1").Health.Wear = new(95.0)
		g.use("nvme0n1", func(u *hw.DiskUse) { u.FlushMS = new(80.0) })
		g.tel.Temperatures["cpu_thermal"] = 88
		g.tel.Pressure = &hw.Pressure{MemorySome: 60}
		g.tel.Throttling.UnderVoltage = new(true)
		g.tel.Data.Free = GiB
		g.inv.Filesystems[0].Free = GiB
		g.pass(time.Hour)
		want := []string{"disk_failing S1", "filesystem_full /", "disk_slow N1", "disk_wearing N1", "overheating cpu_thermal", "under_voltage", "memory_pressure"}
		slices.Sort(want)
		sorted := func() []string { got := shown(g.r); slices.Sort(got); return got }
		if got := sorted(); !slices.Equal(got, want) {
			t.Fatalf("%q", got)
		}
		g.inv = well()
		for i := range g.inv.Disks {
			g.inv.Disks[i].Health = nil
		}
		g.inv.Filesystems, g.inv.Clocks, g.inv.Sensors = nil, nil, nil
		g.inv.Notes = []hw.Note{{Section: "sensors", Code: hw.NoteTimeout}, {Section: "filesystems", Code: hw.NoteTimeout}}
		g.tel = hw.Telemetry{Disks: map[string]hw.DiskUse{"nvme0n1": {}, "sda": {}, "sdb": {}}}
		g.pass(12 * time.Hour)
		if got := sorted(); !slices.Equal(got, want) {
			t.Errorf("absent figures have changed what is known: %q", got)
		}
		// A probe that found nothing at all is no proof that all disks are gone.
		g.inv, g.tel = &hw.Inventory{}, hw.Telemetry{}
		g.pass(12 * time.Hour)
		if got := sorted(); !slices.Equal(got, want) {
			t.Errorf("an empty probe has changed what is known: %q", got)
		}
	})
}

// A month of an ordinary life gives no warning: latencies that jump, work that
// comes in bursts, days and nights, pressure for a moment, readings that fail.
func TestAMonthOfNoiseGivesNoWarning(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	in(t, func(g *rig) {
		rng := rand.New(rand.NewPCG(seed, 1))
		jitter := func(v float64) *float64 { // log-normal, and one in fifty is far off
			v *= math.Exp(rng.NormFloat64() * 0.5)
			if rng.IntN(50) == 0 {
				v *= 10 + 200*rng.Float64()
			}
			return &v
		}
		const step = 30 * time.Second
		var burst int
		var bytes [2]uint64
		days := 30
		if testing.Short() {
			days = 4
		}
		for i := range days * int(24*time.Hour/step) {
			g.tel = fine()
			if burst > 0 {
				burst--
			} else if rng.IntN(3000) == 0 {
				burst = rng.IntN(240)
			}
			for n, name := range []string{"nvme0n1", "sda"} {
				base, load, rate := []float64{0.2, 9}[n], 1.0, uint64(50e3*rng.Float64())
				if burst > 0 { // a copy: long queues, and much is moved
					load, rate = 40, uint64([]float64{900e6, 120e6}[n]*(0.6+0.4*rng.Float64()))
				}
				bytes[n] += rate * uint64(step/time.Second)
				u := hw.DiskUse{WrittenBytes: bytes[n], Errors: new(uint64(0)), InFlight: uint64(rng.IntN(3))}
				if rng.IntN(4) > 0 {
					u.ReadMS, u.WriteMS = jitter(base*load), jitter(2*base*load)
				}
				if rng.IntN(3) > 0 {
					u.FlushMS = jitter(5 * base * load)
				}
				g.tel.Disks[name] = u
			}
			day := math.Sin(float64(i) * step.Hours() / 24 * 2 * math.Pi)
			g.tel.Temperatures["cpu_thermal"] = 66 + 10*day + 4*rng.NormFloat64()
			if rng.IntN(20) == 0 {
				delete(g.tel.Temperatures, "cpu_thermal")
			}
			if rng.IntN(10) == 0 {
				g.tel.Pressure.MemorySome = 90 * rng.Float64()
			}
			// Three of these in a row and a fourth soon after are a warning, and would
			// come in one month of 25 by chance if one sample in 50 were so.
			if rng.IntN(500) == 0 {
				g.tel.Throttling.Now = new(true)
			}
			g.tel.MemoryAvailable = uint64((0.1 + 0.8*rng.Float64()) * 4 * GiB)
			if i%20 == 0 {
				g.inv = well()
				hours := uint64(float64(i) * step.Hours())
				n, s := g.disk("nvme0n1").Health, g.disk("sda").Health
				*n.PowerOnHours += hours
				*n.WrittenBytes += hours * 20e9 // half a TB a day
				*n.Temperature += 8 * rng.NormFloat64()
				*s.PowerOnHours += hours
				*s.Temperature += 5 * rng.NormFloat64()
				g.inv.Filesystems[1].Free = uint64((0.85 + 0.4*rng.Float64()) * GiB) // hovers around its floor
				if rng.IntN(30) == 0 {
					g.disk("sda").Health = nil
				}
				g.m.Inventory(g.inv)
			}
			g.m.Telemetry(g.tel, nil)
			time.Sleep(step)
			if i%20 == 0 {
				if w := g.r.Visible(); len(w) > 0 {
					t.Fatalf("after %s: %+v", time.Duration(i)*step, w)
				}
			}
		}
	})
}

// What is bad for days must not become what is usual.
func TestTheBadIsNotLearned(t *testing.T) {
	in(t, func(g *rig) {
		g.pass(4 * time.Hour)
		g.use("sda", func(u *hw.DiskUse) { u.ReadMS = new(900.0) })
		for range 7 {
			g.pass(24 * time.Hour)
			g.expect("disk_slow S1")
		}
		if usual := g.m.mem.Disks["S1"].Read.ms(); usual > 10 {
			t.Errorf("%f ms have become usual", usual)
		}
	})
}

func TestADiskAtWorkIsNotSlow(t *testing.T) {
	in(t, func(g *rig) {
		g.pass(2 * time.Hour)
		for range 300 {
			g.use("sda", func(u *hw.DiskUse) { u.WriteMS, u.WrittenBytes = new(800.0), u.WrittenBytes+1200e6 })
			g.m.Telemetry(g.tel, nil)
			time.Sleep(sampling)
		}
		g.expect()
		g.use("sda", func(u *hw.DiskUse) { u.WriteMS = new(800.0) }) // as long, and next to nothing is moved
		g.pass(10 * time.Minute)
		g.expect("disk_slow S1")
	})
}

// wear has a disk used up by so many percent a day, and probes twice a day.
func (g *rig) wear(days int, perDay, bytesPerDay float64) {
	h := g.disk("nvme0n1").Health
	wear, written := *h.Wear, float64(*h.WrittenBytes)
	if g.did > 0 {
		wear = g.did
	}
	for range days * 4 {
		wear, written = wear+perDay/4, written+bytesPerDay/4
		h.Wear, h.WrittenBytes, h.PowerOnHours = new(math.Floor(wear)), new(uint64(written)), new(*h.PowerOnHours+6)
		g.m.Inventory(g.inv)
		time.Sleep(time.Minute)
		g.m.Inventory(g.inv) // two readings count as one
		time.Sleep(6*time.Hour - time.Minute)
	}
	g.did = wear
}

func TestTheEndOfADisksLifeIsForeseen(t *testing.T) {
	in(t, func(g *rig) {
		g.wear(6, 1, 1e11)
		g.expect() // less than a week
		g.wear(6, 1, 1e11)
		g.expect("disk_wearing N1")
		left := (100 - g.did) / 30.4 // 1% a day
		if w := g.r.Visible()[0]; !strings.Contains(w.Text, fmt.Sprintf("in about %.0f months", left)) {
			t.Errorf("%s; it is %.1f months", w.Text, left)
		}
		// What writes so much is stopped: no forecast holds.
		g.wear(30, 0.02, 2e9)
		g.expect()
	})
}

func TestNoForecastFromLittle(t *testing.T) {
	in(t, func(g *rig) { // 0.2% a day: the end is over a year away
		g.wear(60, 0.2, 1e10)
		g.expect()
	})
	in(t, func(g *rig) { // an eMMC that tells tens makes a step by chance
		h := g.disk("nvme0n1").Health
		h.WrittenBytes, h.PowerOnHours = nil, nil
		h.Wear = new(10.0)
		g.probes(24 * time.Hour)
		h.Wear = new(20.0)
		g.probes(9 * 24 * time.Hour)
		g.expect()
	})
}

func TestOneOddReadingChangesNothing(t *testing.T) {
	in(t, func(g *rig) {
		g.pass(3 * time.Hour)
		for _, odd := range []func(*rig){
			func(g *rig) { g.disk("sda").Health.Reallocated = new(uint64(70000)) },
			func(g *rig) { g.disk("sda").Health.Reallocated = new(uint64(0)) },
			func(g *rig) { g.disk("sda").Health.Pending = new(uint64(math.MaxUint64)) },
			func(g *rig) { g.disk("sda").Health.CRCErrors = new(uint64(0xffffffff)) },
			func(g *rig) { g.disk("nvme0n1").Health.Wear = new(255.0) },
			func(g *rig) { g.disk("nvme0n1").Health.Spare = new(0.0) },
			func(g *rig) { g.disk("nvme0n1").Health.UnsafeShutdowns = new(uint64(9999)) },
			func(g *rig) { g.disk("sda").Health.Temperature = new(120.0) },
		} {
			g.inv = well()
			odd(g)
			g.m.Inventory(g.inv)
			time.Sleep(probing)
			g.inv = well()
			g.probes(time.Hour)
			g.expect()
		}
	})
}

// Whatever is read, nothing breaks, and what is remembered stays usable.
func TestAbsurdFiguresBreakNothing(t *testing.T) {
	in(t, func(g *rig) {
		g.pass(3 * time.Hour)
		for _, v := range []float64{math.NaN(), math.Inf(1), math.Inf(-1), -1, 0, math.MaxFloat64, 1e300} {
			for _, n := range []uint64{0, math.MaxUint64, math.MaxInt64 + 1} {
				g.m.Telemetry(hw.Telemetry{
					MemoryTotal: n, MemoryAvailable: math.MaxUint64 - n, Temperatures: map[string]float64{"cpu_thermal": v, "": v},
					Data: &hw.Usage{Total: n, Used: n, Free: n}, Pressure: &hw.Pressure{MemorySome: v, MemoryFull: v},
					Throttling: &hw.Throttling{Count: &n},
					Disks:      map[string]hw.DiskUse{"sda": {ReadBytes: n, WrittenBytes: n, ReadMS: &v, WriteMS: &v, FlushMS: &v, Busy: &v, Errors: new(uint64(0))}, "": {}},
				}, []sensor.Silent{{}})
				inv := well()
				for i := range inv.Disks {
					inv.Disks[i].Size = n
					inv.Disks[i].Health = &hw.Health{Temperature: &v, PowerOnHours: &n, UnsafeShutdowns: &n, Wear: &v, Spare: &v, WrittenBytes: &n}
				}
				inv.Filesystems = append(inv.Filesystems, hw.Filesystem{Mount: "", Total: n, Free: math.MaxUint64 - n}, hw.Filesystem{Mount: "no/slash"})
				inv.Sensors = append(inv.Sensors, hw.Sensor{Name: "cpu_thermal", Kind: hw.Temperature, High: &v, Critical: &v})
				inv.Clocks = append(inv.Clocks, hw.Clock{Year: -5})
				g.m.Inventory(inv)
				time.Sleep(sampling)
			}
		}
		g.m.Inventory(nil)
		g.m.Inventory(&hw.Inventory{})
		g.restart("boot1")
		if log := g.log.String(); log != "" {
			t.Errorf("the memory was spoiled: %s", log)
		}
		if u := g.m.mem.Disks["S1"].Read; u.N < learnJudge || math.Abs(u.ms()-9) > 1 {
			t.Errorf("usual is %+v now", u)
		}
		g.inv, g.tel = well(), fine()
		g.pass(12 * time.Hour)
		g.expect()
	})
}

func TestMissingDisks(t *testing.T) {
	without := func(g *rig, names ...string) {
		g.inv.Disks = slices.DeleteFunc(g.inv.Disks, func(d hw.Disk) bool { return slices.Contains(names, d.Name) })
	}
	t.Run("a stick is not missed", func(t *testing.T) {
		in(t, func(g *rig) {
			g.pass(time.Hour)
			without(g, "sdb")
			g.pass(time.Hour)
			g.expect()
		})
	})
	t.Run("one that could not be read is not gone", func(t *testing.T) {
		in(t, func(g *rig) {
			g.pass(time.Hour)
			without(g, "sda")
			g.inv.Notes = []hw.Note{{Section: "disks", Code: hw.NoteTimeout, Subjects: []string{"sda"}}}
			g.pass(time.Hour)
			g.expect()
		})
	})
	t.Run("samples tell before the next probe", func(t *testing.T) {
		in(t, func(g *rig) {
			g.pass(probing + time.Minute)
			delete(g.tel.Disks, "sda")
			g.pass(time.Minute)
			g.expect("disk_gone S1")
		})
	})
	t.Run("over a restart, and then its volume is not told twice", func(t *testing.T) {
		in(t, func(g *rig) {
			g.pass(time.Hour)
			without(g, "sda")
			g.inv.Filesystems = g.inv.Filesystems[:1]
			g.restart("boot2")
			g.r.Set(VolumeFailed, "/mnt/disk1/deimos", "cannot be opened")
			g.pass(time.Hour)
			g.expect("disk_gone S1")
		})
	})
	t.Run("forgotten in the end", func(t *testing.T) {
		in(t, func(g *rig) {
			g.pass(time.Hour)
			without(g, "sda")
			g.inv.Filesystems = g.inv.Filesystems[:1]
			g.pass(29 * 24 * time.Hour)
			g.expect("disk_gone S1")
			g.pass(2 * 24 * time.Hour)
			g.expect()
			if g.m.mem.Disks["S1"] != nil {
				t.Error("still remembered")
			}
		})
	})
	t.Run("two of one serial number", func(t *testing.T) {
		in(t, func(g *rig) {
			g.pass(time.Hour)
			twin := *g.disk("sda")
			twin.Name = "sdc"
			g.inv.Disks = append(g.inv.Disks, twin)
			g.pass(time.Hour)
			g.expect()
			without(g, "sdc")
			g.pass(time.Hour)
			g.expect()
		})
	})
	t.Run("what failed is not held against the next", func(t *testing.T) {
		in(t, func(g *rig) {
			stick := g.disk("sdb")
			stick.Health = &hw.Health{Passed: new(false)}
			g.pass(time.Hour)
			g.expect("disk_failing U1")
			without(g, "sdb")
			g.pass(time.Hour)
			g.expect()
		})
	})
}

// Chunks fill a volume to its floor on purpose.
func TestAVolumeAtItsFloorIsNotFull(t *testing.T) {
	in(t, func(g *rig) {
		for _, free := range []uint64{GiB, GiB * 9 / 10, GiB * 8 / 10} {
			g.inv.Filesystems[1].Free = free
			g.pass(time.Hour)
			g.expect()
		}
	})
}

// The system's floor of 8 GiB is more than such a board's disk can have free.
func TestASmallBoardIsNotFullForItsFloor(t *testing.T) {
	const total = uint64(71 * GiB / 10)
	in(t, func(g *rig) {
		g.m.paths[1].real, g.m.paths[1].Floor = "/var/lib/deimos/volumes/main", 8*GiB
		set := func(free uint64) {
			f := &g.inv.Filesystems[0]
			f.Total, f.Free, f.Used = total, free, total-free
			g.tel.Data = &hw.Usage{Total: total, Free: free}
			g.pass(time.Hour)
		}
		set(41 * GiB / 10)
		g.expect()
		set(GiB / 2)
		g.expect()
		set(GiB / 5)
		g.expect("filesystem_full /")
	})
}

// Linux counts each command that reads a disk's health as one that failed.
func TestCommandsThatTheKernelCountsAsFailedAreNoErrors(t *testing.T) {
	in(t, func(g *rig) {
		for n := range uint64(20) {
			g.use("sda", func(u *hw.DiskUse) { u.IOErrors = new(3 * n) })
			g.pass(time.Hour)
		}
		g.expect()
	})
}

func TestWhatWasNeverWritableIsMeantToBeSo(t *testing.T) {
	in(t, func(g *rig) {
		g.inv.Filesystems[0].ReadOnly = true
		g.pass(time.Hour)
		g.expect()
		g.inv.Filesystems[1].ReadOnly = true
		g.restart("boot2")
		g.pass(time.Hour)
		g.expect("filesystem_read_only /mnt/disk1") // it was, before the restart
	})
}

func TestAMainboardsLooseInputsAreNotHot(t *testing.T) {
	in(t, func(g *rig) {
		for _, name := range []string{"nct6775 AUXTIN0", "it8728 temp3", "nct6775 CPUTIN"} {
			g.inv.Sensors = append(g.inv.Sensors, hw.Sensor{Name: name, Kind: hw.Temperature, High: new(80.0)})
			g.tel.Temperatures[name] = 115
		}
		g.pass(time.Hour)
		g.expect()
		g.inv.Sensors = append(g.inv.Sensors, hw.Sensor{Name: "coretemp Package id 0", Kind: hw.Temperature, High: new(84.0)})
		g.tel.Temperatures["coretemp Package id 0"] = 95
		g.pass(time.Hour)
		g.expect("overheating coretemp Package id 0")
	})
}

func TestLimitsOfTheBoardComeFirst(t *testing.T) {
	in(t, func(g *rig) {
		g.m.board.Thermal = board.Thermal{Warm: 60, Critical: 70}
		g.tel.Temperatures["cpu_thermal"] = 65
		g.tel.Temperatures["nvme Composite"] = 75 // not the processor
		g.pass(time.Hour)
		g.expect("overheating cpu_thermal")
	})
	in(t, func(g *rig) { // k10temp says 70, always
		g.inv.Sensors[0] = hw.Sensor{Name: "k10temp temp1", Kind: hw.Temperature, High: new(70.0)}
		g.tel.Temperatures = map[string]float64{"k10temp temp1": 80}
		g.pass(time.Hour)
		g.expect()
	})
}

func TestAnEmptyBatteryIsRememberedForTheBoot(t *testing.T) {
	in(t, func(g *rig) {
		g.inv.Clocks[0].Year = 1970
		g.pass(time.Hour)
		g.expect("clock_battery")
		g.inv.Clocks[0].Year = 2026 // the network has told the time
		g.pass(time.Hour)
		g.restart("boot1")
		g.pass(time.Hour)
		g.expect("clock_battery")
		g.restart("boot2")
		g.pass(time.Hour)
		g.expect()
	})
}

func TestAPowerCutIsToldFromAKilledAgent(t *testing.T) {
	in(t, func(g *rig) {
		g.restart("boot1")
		g.expect()
		g.boot("boot1") // without Close
		g.expect("agent_killed")
		g.pass(20 * time.Hour)
		g.restart("boot1")
		g.expect("agent_killed") // for a day, restarts included
		g.pass(5 * time.Hour)
		g.expect()

		g.boot("boot2")
		g.expect("unsafe_shutdown")
		g.restart("boot3")
		g.expect("unsafe_shutdown")
		g.inv.Watchdogs[0].FiredLast = true
		g.pass(time.Hour)
		g.expect("watchdog_fired")
		g.pass(23*time.Hour + 2*probing)
		g.expect()
		g.pass(72 * time.Hour) // the watchdog still says so, of this boot
		g.expect()

		g.boot("") // the kernel does not tell boots apart
		g.expect("agent_killed")
		_ = g.m.Close()
		if err := os.WriteFile(filepath.Join(g.dir, markerName), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		g.boot("boot4")
		g.expect("agent_killed")
	})
}

func TestAnEventKeepsItsTimeOverRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(clockEpoch.AddDate(6, 0, 0))) // the test's clock begins in 2000
		g := newRig(t)
		defer func() { _ = g.m.Close() }()
		g.pass(time.Hour)
		g.boot("boot1") // without Close
		killed := time.Now().UTC().Truncate(time.Second)
		for range 3 {
			w := g.r.Visible()
			if len(w) != 1 || w[0].Code != "agent_killed" || w[0].Since.Sub(killed).Abs() > time.Second {
				t.Fatalf("killed at %s, shown is %+v", killed, w)
			}
			if strings.Contains(w[0].Text, "last time") || !strings.Contains(w[0].Text, "until then did not end in good order") {
				t.Errorf("the text is %q", w[0].Text)
			}
			g.pass(5 * time.Hour)
			g.restart("boot1")
		}
	})
}

// A board without a clock's battery begins in 1970: that is not when it was.
func TestAnEventOfAClockThatWasNeverSetHasNoTime(t *testing.T) {
	begun := time.Now()
	if at := (event{noticed: begun}).dated().At; at.Sub(begun).Abs() > 2*time.Second {
		t.Errorf("noticed at %s, dated %s", begun, at)
	}
	synctest.Test(t, func(t *testing.T) { // its clock begins in 2000
		if at := (event{noticed: time.Now()}).dated().At; !at.IsZero() {
			t.Errorf("dated %s", at)
		}
	})
}

func TestWhatIsUsualSurvivesARestart(t *testing.T) {
	in(t, func(g *rig) {
		g.pass(2 * time.Hour)
		g.m.write = g.put
		g.restart("boot2")
		g.use("sda", func(u *hw.DiskUse) { u.ReadMS = new(900.0) })
		g.pass(10 * time.Minute)
		g.expect("disk_slow S1")
		if run := g.m.run(); run < 2.1 || run > 2.3 {
			t.Errorf("%f hours are remembered", run)
		}
	})
}

func TestADamagedMemoryIsBegunAnew(t *testing.T) {
	for _, raw := range []string{"", "{", "null", "{}", `{"format":2}`, `{"format":1,"run":"x"}`, strings.Repeat(" ", maxMemory+1)} {
		in(t, func(g *rig) {
			g.pass(time.Hour)
			if err := g.m.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(g.dir, memoryName), []byte(raw), 0o600); err != nil {
				t.Fatal(err)
			}
			g.boot("boot2")
			if g.m.mem.Run != 0 || !strings.Contains(g.log.String(), "learned anew") {
				t.Errorf("%.20q: %+v, log %q", raw, g.m.mem, g.log.String())
			}
			g.pass(time.Hour)
			g.expect()
		})
	}
}

func TestTheMemoryIsWrittenRarely(t *testing.T) {
	in(t, func(g *rig) {
		var n atomic.Int32
		write := g.m.write
		g.m.write = func(path string, raw []byte) error { n.Add(1); return write(path, raw) }
		g.pass(24 * time.Hour)
		synctest.Wait()
		if n := n.Load(); n < 4 || n > 6 {
			t.Errorf("written %d times in a day", n)
		}
	})
}

// The disk that is judged is the one that the memory is on.
func TestADiskThatHangsDoesNotHoldUpWhoJudgesIt(t *testing.T) {
	in(t, func(g *rig) {
		g.pass(time.Hour)
		stuck := make(chan struct{})
		var writes atomic.Int32
		g.m.mu.Lock()
		g.m.write = func(string, []byte) error { writes.Add(1); <-stuck; return errors.New("late") }
		g.m.mu.Unlock()
		g.use("nvme0n1", func(u *hw.DiskUse) { *u = hw.DiskUse{InFlight: 1, WrittenBytes: u.WrittenBytes} })
		before := time.Now()
		g.pass(24 * time.Hour)
		g.expect("disk_hung N1")
		if d := time.Since(before); d > 24*time.Hour+time.Minute || writes.Load() != 1 {
			t.Errorf("%s, %d writes", d, writes.Load())
		}
		if err := g.m.Close(); err == nil || !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("%v", err)
		}
		close(stuck)
		if err := g.m.Close(); err != nil {
			t.Errorf("a second time: %v", err)
		}
		g.m.Telemetry(g.tel, nil) // late, and harmless
		g.m.Inventory(g.inv)
	})
}

func TestAFullDiskDoesNotKeepItFromStarting(t *testing.T) {
	r := New(time.Now)
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, markerName), 0o700); err != nil { // nothing can be written there
		t.Fatal(err)
	}
	m, err := NewMachine(dir, board.Board{}, nil, r, slog.New(slog.DiscardHandler), "boot1")
	if err != nil {
		t.Fatal(err)
	}
	m.Inventory(well())
	m.Telemetry(fine(), nil)
	_ = m.Close()
	if _, err := NewMachine(filepath.Join(dir, memoryName, "x"), board.Board{}, nil, r, slog.New(slog.DiscardHandler), "boot1"); err == nil {
		t.Error("a folder that cannot be made is no error")
	}
}

func TestAThousandDisks(t *testing.T) {
	in(t, func(g *rig) {
		g.inv.Disks, g.tel.Disks = nil, map[string]hw.DiskUse{}
		for i := range 1000 {
			n := fmt.Sprintf("sd%03d", i)
			g.inv.Disks = append(g.inv.Disks, hw.Disk{Name: n, Serial: "S" + n, Bus: "sata", Size: GiB,
				Health: &hw.Health{Passed: new(false), CRCErrors: new(uint64(1)), Temperature: new(80.0)}})
			g.tel.Disks[n] = hw.DiskUse{ReadMS: new(1.0), Errors: new(uint64(i))}
		}
		g.pass(30 * time.Minute)
		w := g.r.Visible()
		if len(w) > wire.MaxWarnings || len(w) != 2*(maxShown+1) || w[4].Subject != others || !strings.Contains(w[4].Text, "And 996 more") {
			t.Errorf("%d: %+v", len(w), w)
		}
		// Other thousands come and go: what is remembered stays bounded.
		for k := range 3 {
			for i := range g.inv.Disks {
				g.inv.Disks[i].Serial = fmt.Sprint(k, "x", i)
			}
			g.m.Inventory(g.inv)
			time.Sleep(probing)
		}
		if len(g.m.mem.Disks) > maxDisks || len(g.m.row) > 20*maxDisks || len(g.m.live) > maxDisks {
			t.Errorf("%d disks, %d rows, %d live", len(g.m.mem.Disks), len(g.m.row), len(g.m.live))
		}
		g.restart("boot1")
		if len(g.m.mem.Disks) == 0 || strings.Contains(g.log.String(), "anew") {
			t.Errorf("%d disks are remembered; %s", len(g.m.mem.Disks), g.log.String())
		}
	})
}

func TestManyJudgeAtOnce(t *testing.T) {
	g := newRig(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				g.m.Inventory(well())
				g.m.Telemetry(fine(), []sensor.Silent{{Name: "a"}})
				g.r.Visible()
			}
		})
	}
	wg.Wait()
	if err := g.m.Close(); err != nil {
		t.Fatal(err)
	}
}
