package hw

import (
	"context"
	"strconv"
	"strings"
)

// throttleSources is where this machine tells that it holds its processor back.
// None of it is there on a virtual machine. A limit of cpufreq (scaling_max_freq)
// says nothing: an owner or a power profile may have set it.
//
//	x86           cpu*/thermal_throttle        Documentation/ABI/testing/sysfs-devices-system-cpu
//	any           cooling devices of the CPU   Documentation/driver-api/thermal/sysfs-api
//	Raspberry Pi  hwmon chip rpi_volt          Documentation/hwmon/raspberrypi-hwmon
//	Raspberry Pi  soc:firmware/get_throttled   vcgencmd get_throttled, raspberrypi.com/documentation/computers/os.html
type throttleSources struct {
	counters map[string][]string // files, by package of the processor
	cooling  []string            // cur_state of the devices that cool by slowing the processor down
	alarm    string              // of under-voltage
	firmware string              // the Raspberry Pi's word of flags
}

const raspberryFlags = "sys/devices/platform/soc/soc:firmware/get_throttled"

func findThrottling(t tree) throttleSources {
	s := throttleSources{counters: map[string][]string{}}
	for _, cpu := range t.list("sys/devices/system/cpu") {
		dir := "sys/devices/system/cpu/" + cpu
		if !withNumber(cpu, "cpu") || !t.exists(dir+"/thermal_throttle") {
			continue
		}
		socket := t.word(dir + "/topology/physical_package_id")
		for _, name := range []string{"/thermal_throttle/core_throttle_count", "/thermal_throttle/package_throttle_count"} {
			if t.exists(dir + name) {
				s.counters[socket] = append(s.counters[socket], dir+name)
			}
		}
	}
	for _, name := range t.list("sys/class/thermal") {
		dir := "sys/class/thermal/" + name
		if withNumber(name, "cooling_device") && coolsProcessor(t.word(dir+"/type")) {
			s.cooling = append(s.cooling, dir+"/cur_state")
		}
	}
	for _, chip := range t.list("sys/class/hwmon") {
		file := "sys/class/hwmon/" + chip + "/in0_lcrit_alarm"
		if t.word("sys/class/hwmon/"+chip+"/name") == "rpi_volt" && t.exists(file) {
			s.alarm = file
		}
	}
	if t.exists(raspberryFlags) {
		s.firmware = raspberryFlags
	}
	return s
}

// withNumber tells whether name is prefix and a number.
func withNumber(name, prefix string) bool {
	digits, ok := strings.CutPrefix(name, prefix)
	_, err := strconv.ParseUint(digits, 10, 16)
	return ok && err == nil
}

// coolsProcessor knows the types of cooling devices that cost speed: those of
// drivers/thermal/cpufreq_cooling.c (older kernels: thermal-cpufreq-0) and
// cpuidle_cooling.c, and ACPI's processor. A fan costs none.
func coolsProcessor(kind string) bool {
	return strings.HasPrefix(kind, "cpufreq") || strings.HasPrefix(kind, "thermal-cpufreq") ||
		strings.HasPrefix(kind, "cpuidle") || kind == "Processor"
}

// throttleReading is one reading of the sources.
type throttleReading struct {
	count    *uint64
	cooled   *bool
	flags    *uint64
	underVol *bool
}

func (s throttleSources) read(t tree) throttleReading {
	var r throttleReading
	for _, files := range s.counters {
		// Each processor of a package counts the package's events; the largest is nearest to how often it was.
		var most uint64
		for _, file := range files {
			most = max(most, t.count(file))
		}
		r.count = new(most + value(r.count))
	}
	for _, file := range s.cooling {
		if v, err := t.integer(file); err == nil && v >= 0 {
			r.cooled = new(v > 0 || r.cooled != nil && *r.cooled)
		}
	}
	if s.alarm != "" {
		if v, err := t.integer(s.alarm); err == nil && (v == 0 || v == 1) {
			r.underVol = new(v == 1)
		}
	}
	if s.firmware != "" {
		text := strings.TrimPrefix(t.word(s.firmware), "0x")
		if v, err := strconv.ParseUint(text, 16, 32); err == nil {
			r.flags = &v
		}
	}
	return r
}

func value(p *uint64) uint64 {
	if p == nil {
		return 0
	}
	return *p
}

// Bits of get_throttled.
const (
	flagUnderVoltage = 1 << 0
	flagsSlowed      = 1<<1 | 1<<2 | 1<<3 // frequency capped, throttled, soft temperature limit
)

// throttling reads what slows the processor down; nil if this machine does not tell.
func (s *Sampler) throttling(ctx context.Context, sources throttleSources) *Throttling {
	p := s.prober
	r, err := within(ctx, p.limit, p.root+" throttling", func() throttleReading { return sources.read(p.tree) })
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := Throttling{Now: r.cooled, Count: r.count, UnderVoltage: r.underVol}
	also := func(slowed bool) { t.Now = new(slowed || t.Now != nil && *t.Now) }
	if r.count != nil && s.throttled != nil {
		also(*r.count > *s.throttled)
	}
	s.throttled = r.count
	if r.flags != nil {
		also(*r.flags&flagsSlowed != 0)
		under := *r.flags&flagUnderVoltage != 0
		t.UnderVoltage = new(under || t.UnderVoltage != nil && *t.UnderVoltage)
	}
	if t == (Throttling{}) {
		return nil
	}
	return &t
}
