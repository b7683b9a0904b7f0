package hw

import (
	"maps"
	"slices"
	"strings"
	"unicode"
)

// MaxSeries bounds how many series a sample has; those of disks, the last, are left out first.
const MaxSeries = 512

// maxSeriesPart is how many characters of a device's own name are in that of a series.
const maxSeriesPart = 64

// SeriesKind describes the series of one name, or of many whose names differ in
// what stands for "<…>".
type SeriesKind struct {
	Name string
	Unit string // "" is a plain number, or of a sensor its own
	Text string
}

// SeriesKinds is every kind of series that [Telemetry.Series] makes.
var SeriesKinds = []SeriesKind{
	{"load1", "", "tasks that run or wait, mean over 1 minute"},
	{"load5", "", "the same over 5 minutes"},
	{"load15", "", "the same over 15 minutes"},
	{"cpu", "%", "busy, of all processors together"},
	{"memory.available", "B", "that programs can still get"},
	{"memory.used", "B", "that is not available"},
	{"data.used", "B", "on the filesystem of the agent's data"},
	{"data.free", "B", "that the agent can still write there"},
	{"pressure.memory.some", "%", "of the time, some task waited for memory"},
	{"pressure.memory.full", "%", "of the time, all tasks did"},
	{"pressure.cpu.some", "%", "of the time, some task waited for a processor"},
	{"pressure.io.some", "%", "of the time, some task waited for a disk"},
	{"pressure.io.full", "%", "of the time, all tasks did"},
	{"throttling.now", "", "1 while the processor is held below its speed, else 0"},
	{"throttling.count", "", "how often that was since boot"},
	{"throttling.under_voltage", "", "1 while the supply is too weak, else 0"},
	{"agent.rss", "B", "memory of the agent, mapped files included"},
	{"agent.anonymous", "B", "memory of the agent that is its own"},
	{"agent.cpu", "%", "of one processor, that the agent uses"},
	{"agent.written", "B", "that the agent wrote since it started"},
	{"temperature.<sensor>", "°C", "of a sensor on the board"},
	{"sensor.<name>", "", "of a declared sensor, in its own unit"},
	{"link.<name>.up", "", "1 if the interface has a link, else 0"},
	{"link.<name>.changes", "", "how often the link came or went since boot"},
	{"disk.<name>.read_bytes", "B", "since boot"},
	{"disk.<name>.written_bytes", "B", "since boot"},
	{"disk.<name>.read_ms", "ms", "mean time of a request, queueing included"},
	{"disk.<name>.write_ms", "ms", "mean time of a request, queueing included"},
	{"disk.<name>.flush_ms", "ms", "mean time of a flush"},
	{"disk.<name>.busy", "%", "of the time, with a request under way"},
	{"disk.<name>.in_flight", "", "requests under way"},
	{"disk.<name>.errors", "", "that ext4 found since its last check; only a growth says something"},
	{"disk.<name>.io_errors", "", "commands of SCSI that did not end plainly, harmless ones among them"},
}

// Series is the sample as flat names and numbers, of the kinds in [SeriesKinds]
// and at most [MaxSeries]. What was not measured is not in it.
func (t Telemetry) Series() map[string]float64 {
	s := series{}
	s.floats("load1", t.Load1)
	s.floats("load5", t.Load5)
	s.floats("load15", t.Load15)
	s.floats("cpu", t.CPUPercent)
	if t.MemoryTotal > 0 {
		s.add("memory.available", float64(t.MemoryAvailable))
		s.add("memory.used", float64(t.MemoryUsed))
	}
	if t.Data != nil {
		s.add("data.used", float64(t.Data.Used))
		s.add("data.free", float64(t.Data.Free))
	}
	if p := t.Pressure; p != nil {
		s.add("pressure.memory.some", p.MemorySome)
		s.add("pressure.memory.full", p.MemoryFull)
		s.add("pressure.cpu.some", p.CPUSome)
		s.add("pressure.io.some", p.IOSome)
		s.add("pressure.io.full", p.IOFull)
	}
	if x := t.Throttling; x != nil {
		s.flags("throttling.now", x.Now)
		s.counts("throttling.count", x.Count)
		s.flags("throttling.under_voltage", x.UnderVoltage)
	}
	if t.Agent.RSS > 0 {
		s.add("agent.rss", float64(t.Agent.RSS))
		s.add("agent.anonymous", float64(t.Agent.Anonymous))
		s.add("agent.written", float64(t.Agent.Written))
	}
	s.floats("agent.cpu", t.Agent.CPUPercent)
	for _, name := range slices.Sorted(maps.Keys(t.Temperatures)) {
		s.add("temperature."+part(name), t.Temperatures[name])
	}
	for _, m := range t.Measured {
		s.add("sensor."+part(m.Name), m.Value)
	}
	for _, name := range slices.Sorted(maps.Keys(t.Links)) {
		l, at := t.Links[name], "link."+part(name)
		s.flags(at+".up", &l.Up)
		s.add(at+".changes", float64(l.Changes))
	}
	for _, name := range slices.Sorted(maps.Keys(t.Disks)) {
		d, at := t.Disks[name], "disk."+part(name)
		s.add(at+".read_bytes", float64(d.ReadBytes))
		s.add(at+".written_bytes", float64(d.WrittenBytes))
		s.floats(at+".read_ms", d.ReadMS)
		s.floats(at+".write_ms", d.WriteMS)
		s.floats(at+".flush_ms", d.FlushMS)
		s.floats(at+".busy", d.Busy)
		s.add(at+".in_flight", float64(d.InFlight))
		s.counts(at+".errors", d.Errors)
		s.counts(at+".io_errors", d.IOErrors)
	}
	return s
}

// Unit is the unit of one of the sample's series.
func (t Telemetry) Unit(name string) string {
	if sensor, ok := strings.CutPrefix(name, "sensor."); ok {
		for _, m := range t.Measured {
			if part(m.Name) == sensor {
				return clean(m.Unit)
			}
		}
		return ""
	}
	for _, k := range SeriesKinds {
		before, rest, many := strings.Cut(k.Name, "<")
		_, after, _ := strings.Cut(rest, ">")
		if name == k.Name || many && len(name) > len(before)+len(after) && strings.HasPrefix(name, before) && strings.HasSuffix(name, after) {
			return k.Unit
		}
	}
	return ""
}

// series collects what fits and is a number.
type series map[string]float64

func (s series) add(name string, v float64) {
	if len(s) < MaxSeries && v-v == 0 { // neither NaN nor infinite
		s[name] = v
	}
}

func (s series) floats(name string, v *float64) {
	if v != nil {
		s.add(name, *v)
	}
}

func (s series) counts(name string, v *uint64) {
	if v != nil {
		s.add(name, float64(*v))
	}
}

func (s series) flags(name string, v *bool) {
	switch {
	case v == nil:
	case *v:
		s.add(name, 1)
	default:
		s.add(name, 0)
	}
}

// part makes a device's name fit to be part of a series': letters, digits and
// a little else, so that it can be typed and "*" stands for nothing but itself.
func part(name string) string {
	r := []rune(strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("-_:/@#+.", r) {
			return r
		}
		return '_'
	}, clean(name)))
	if len(r) > maxSeriesPart {
		r = r[:maxSeriesPart]
	}
	return string(r)
}
