package hw

import (
	"cmp"
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// measure is how hwmon names and scales a kind of sensor
// (Documentation/hwmon/sysfs-interface), and what a real one can show.
type measure struct {
	kind     SensorKind
	unit     string
	scale    float64 // hwmon's unit to ours
	min, max float64
}

var measures = map[string]measure{
	"temp":     {Temperature, "°C", 1e-3, -60, 150},
	"fan":      {Fan, "rpm", 1, 0, 50000},
	"in":       {Voltage, "V", 1e-3, -500, 500},
	"curr":     {Current, "A", 1e-3, -1000, 1000},
	"power":    {PowerDraw, "W", 1e-6, 0, 100000},
	"humidity": {Humidity, "%", 1e-3, 0, 100},
}

// plausible tells whether a sensor of that kind can show v.
func plausible(kind SensorKind, v float64) bool {
	for _, m := range measures {
		if m.kind == kind {
			return v >= m.min && v <= m.max
		}
	}
	return false
}

// source is a sensor's file, before it is read.
type source struct {
	name                  string // as in Sensor
	value, high, critical string // paths of files; high and critical may be empty
	measure               measure
}

func (p *prober) sensors(ctx context.Context) (func(*Inventory), notes) {
	all := findSensors(p.tree)
	found, missing := p.readSources(ctx, all)
	return func(inv *Inventory) { inv.Sensors, inv.Silent = found, silent(all, found) }, missing
}

// silent lists those of all that are not among the ones found, in their order.
func silent(all []source, found []Sensor) (names []string) {
	for _, s := range all {
		if !slices.ContainsFunc(found, func(f Sensor) bool { return f.Name == s.name }) {
			names = append(names, s.name)
		}
	}
	return names
}

// readSources reads sensors, but those of a device that sleeps, in their order.
func (p *prober) readSources(ctx context.Context, sources []source) ([]Sensor, notes) {
	type reading struct {
		sensor Sensor
		err    error
	}
	var missing notes
	found := []Sensor{}
	for _, s := range sources {
		if s.asleep(p.tree) {
			continue
		}
		r, err := within(ctx, p.limit, p.root+" sensor "+s.value, func() reading {
			sensor, err := readSensor(p.tree, s)
			return reading{sensor, err}
		})
		err = cmp.Or(err, r.err)
		if err != nil {
			code, text := reason(err)
			missing.add("sensors", code, s.name, text)
			continue
		}
		if !plausible(r.sensor.Kind, r.sensor.Value) {
			missing.add("sensors", NoteImplausible, s.name,
				fmt.Sprintf("shows %.0f %s, which is not plausible and was dropped", r.sensor.Value, r.sensor.Unit))
			continue
		}
		found = append(found, r.sensor)
	}
	return found, missing
}

func readSensor(t tree, s source) (Sensor, error) {
	raw, err := t.integer(s.value)
	if err != nil {
		return Sensor{}, err
	}
	limit := func(name string) *float64 {
		if name == "" {
			return nil
		}
		v, err := t.integer(name)
		if scaled := float64(v) * s.measure.scale; err == nil && v > 0 && plausible(s.measure.kind, scaled) {
			return &scaled
		}
		return nil
	}
	return Sensor{
		Name: s.name, Kind: s.measure.kind, Unit: s.measure.unit,
		Value: float64(raw) * s.measure.scale, High: limit(s.high), Critical: limit(s.critical),
	}, nil
}

// findSensors lists thermal zones and hwmon channels without reading a value,
// so that nothing here touches the hardware.
func findSensors(t tree) []source {
	all := append(thermalZones(t), hwmonChannels(t)...)
	slices.SortStableFunc(all, func(a, b source) int { return cmp.Compare(a.name, b.name) })
	seen := map[string]int{}
	for i := range all {
		name := all[i].name
		if seen[name]++; seen[name] > 1 {
			all[i].name = fmt.Sprintf("%s#%d", name, seen[name])
		}
	}
	return all
}

func thermalZones(t tree) []source {
	var all []source
	for _, zone := range t.list("sys/class/thermal") {
		dir := "sys/class/thermal/" + zone
		if !strings.HasPrefix(zone, "thermal_zone") {
			continue
		}
		s := source{name: firstOf(t.word(dir+"/type"), zone), value: dir + "/temp", measure: measures["temp"]}
		for n := range 16 { // the kernel's own limit is 12 trip points
			point := fmt.Sprintf("%s/trip_point_%d", dir, n)
			switch t.word(point + "_type") {
			case "hot", "passive":
				s.high = firstOf(s.high, point+"_temp")
			case "critical":
				s.critical = firstOf(s.critical, point+"_temp")
			}
		}
		all = append(all, s)
	}
	return all
}

var channel = regexp.MustCompile(`^(temp|fan|in|curr|power|humidity)(\d{1,3})_(input|average)$`)

func hwmonChannels(t tree) []source {
	var all []source
	for _, chip := range t.list("sys/class/hwmon") {
		dir := "sys/class/hwmon/" + chip
		name := firstOf(t.word(dir+"/name"), chip)
		if skipChip(t, dir, name) {
			continue
		}
		for _, file := range t.list(dir) {
			m := channel.FindStringSubmatch(file)
			if m == nil || (m[3] == "average" && t.exists(dir+"/"+m[1]+m[2]+"_input")) {
				continue
			}
			base := dir + "/" + m[1] + m[2]
			label := t.word(base + "_label")
			if label == "" {
				label = m[1] + m[2]
			}
			all = append(all, source{
				name: name + " " + label, value: dir + "/" + file,
				high: base + "_max", critical: base + "_crit", measure: measures[m[1]],
			})
		}
	}
	// Two disks have the same chip and labels: the device tells them apart, and
	// unlike the number of the chip it is the same after a reboot.
	count := map[string]int{}
	for _, s := range all {
		count[s.name]++
	}
	for i, s := range all {
		if count[s.name] > 1 {
			dev := t.device(s.value[:strings.LastIndexByte(s.value, '/')] + "/device")
			all[i].name += " @" + clean(dev[strings.LastIndexByte(dev, '/')+1:])
		}
	}
	return all
}

// skipChip leaves out chips that repeat a thermal zone, and drivetemp, whose reading
// may keep a disk from spinning down (Documentation/hwmon/drivetemp). Those whose
// device is suspended are listed and not read, see readSources.
func skipChip(t tree, dir, name string) bool {
	return name == "drivetemp" ||
		strings.Contains(t.device(dir), "/thermal_zone")
}
