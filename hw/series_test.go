package hw

import (
	"fmt"
	"math"
	"os"
	"regexp"
	"strings"
	"testing"
)

// full is a sample with everything in it.
func full() Telemetry {
	f, n, b := new(1.5), new(uint64(2)), new(true)
	return Telemetry{
		Load1: f, Load5: f, Load15: f, CPUPercent: f, MemoryTotal: 3, MemoryUsed: 1, MemoryAvailable: 2,
		Temperatures: map[string]float64{"cpu-thermal": 48.2}, Data: &Usage{Total: 3, Used: 1, Free: 2},
		Pressure: &Pressure{}, Throttling: &Throttling{Now: b, Count: n, UnderVoltage: new(false)},
		Disks:    map[string]DiskUse{"sda": {ReadMS: f, WriteMS: f, FlushMS: f, Busy: f, Errors: n, IOErrors: n}},
		Links:    map[string]Link{"eth0": {Up: true, Changes: 3}},
		Measured: []Measurement{{Name: "greenhouse/humidity", Kind: Humidity, Unit: "%", Value: 61}},
		Agent:    Process{RSS: 1, Anonymous: 1, CPUPercent: f, Written: 1},
	}
}

// example is a series' name with hardware in the place of "<…>".
var example = strings.NewReplacer("temperature.<sensor>", "temperature.cpu-thermal", "sensor.<name>", "sensor.greenhouse/humidity", "link.<name>", "link.eth0", "disk.<name>", "disk.sda")

func TestEverySeriesIsOfADocumentedKind(t *testing.T) {
	s := full()
	got := s.Series()
	want := map[string]string{}
	for _, k := range SeriesKinds {
		want[example.Replace(k.Name)] = k.Unit
	}
	want["sensor.greenhouse/humidity"] = "%"
	for name, unit := range want {
		if _, ok := got[name]; !ok {
			t.Errorf("no %s", name)
		}
		if s.Unit(name) != unit {
			t.Errorf("%s is in %q, want %q", name, s.Unit(name), unit)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is of no kind", name)
		}
	}
	if got["throttling.now"] != 1 || got["throttling.under_voltage"] != 0 || got["link.eth0.changes"] != 3 || got["temperature.cpu-thermal"] != 48.2 {
		t.Errorf("got %v", got)
	}
	if n := len((Telemetry{}).Series()); n != 0 {
		t.Errorf("%d series of nothing measured", n)
	}
}

func TestEveryFieldOfASampleIsASeries(t *testing.T) {
	// Of this machine, whatever it has: each number must come out.
	s, err := NewSampler(SampleOptions{Data: t.TempDir(), Limit: unhurried})
	must(t, err)
	got, err := s.Sample(t.Context())
	must(t, err)
	for name := range got.Series() {
		if got.Unit(name) == "" && strings.Contains(name, "bytes") {
			t.Errorf("%s has no unit", name)
		}
	}
	if len(got.Series()) < 10 {
		t.Errorf("got %v", got.Series())
	}
}

func TestNamesFromHardwareAreFitForSeries(t *testing.T) {
	s := Telemetry{Temperatures: map[string]float64{
		"nvme Composite @0000:01:00.0": 40, "a*b\x1b[2J": 1, strings.Repeat("x", 500): 2, "nan": math.NaN(), "inf": math.Inf(1),
	}}
	got := s.Series()
	if len(got) != 3 || got["temperature.nvme_Composite_@0000:01:00.0"] != 40 {
		t.Errorf("got %v", got)
	}
	for name := range got {
		if strings.ContainsAny(name, "* \x1b") || len(name) > 100 {
			t.Errorf("%q", name)
		}
	}
}

func TestSeriesAreBoundedAndDisksGoFirst(t *testing.T) {
	s := full()
	for i := range 1000 {
		s.Disks[fmt.Sprintf("sd%d", i)] = DiskUse{}
	}
	got := s.Series()
	if _, ok := got["temperature.cpu-thermal"]; len(got) != MaxSeries || !ok {
		t.Errorf("%d series, the temperature is there: %v", len(got), ok)
	}
}

// docs/telemetry.md lists each kind with its unit, as SeriesKinds has them.
func TestTheDocumentListsEverySeries(t *testing.T) {
	raw, err := os.ReadFile("../docs/telemetry.md")
	must(t, err)
	rows := map[string][2]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([^|]*) \\| ([^|]*) \\|$").FindAllStringSubmatch(string(raw), -1) {
		rows[m[1]] = [2]string{strings.TrimSpace(m[2]), strings.TrimSpace(m[3])}
	}
	for _, k := range SeriesKinds {
		if rows[k.Name] != [2]string{k.Unit, k.Text} {
			t.Errorf("the document says %q of %s; its row must be:\n| `%s` | %s | %s |", rows[k.Name], k.Name, k.Name, k.Unit, k.Text)
		}
		delete(rows, k.Name)
	}
	for name := range rows {
		t.Errorf("the document lists %s, which is no series", name)
	}
}
