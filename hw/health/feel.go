package health

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/wire"
)

// Temperatures, in °C. A sensor's own limits are believed if they are possible
// for what warns; some drivers give placeholders. A warning ends coolBelow under
// its limit.
const (
	coolBelow    = 5
	leastLimit   = 40  // lower ones are placeholders
	leastCPU     = 75  // of a processor: k10temp shows a fixed 70, under which it works all day
	mostLimit    = 130 //
	defaultWarm  = 90  // of a processor of which nothing is known; most slow down at 95 to 105
	spindleWarm  = 60  // data sheets of hard disks end at 60 to 65
	ssdWarm      = 70  // those of SATA SSDs and eMMC at 70 to 85
	hotInARow    = 3   // samples
	diskHotInRow = 2   // probes
)

// processorNames are parts of names of sensors that measure the processor, of
// drivers in the kernel (Documentation/hwmon) and thermal zones of device trees.
var processorNames = []string{"cpu", "soc", "pkg", "package", "core", "k10temp", "zenpower"}

func processor(name string) bool {
	name = strings.ToLower(name)
	return slices.ContainsFunc(processorNames, func(s string) bool { return strings.Contains(name, s) })
}

// chips of hwmon whose temperatures are of a processor or a disk.
var chips = []string{"coretemp", "k8temp", "k10temp", "zenpower", "via_cputemp", "scpi_sensors", "scmi_sensors", "nvme"}

// judged tells whether what a sensor shows can be believed to be the temperature
// of something. Thermal zones can (their names have no label); of the chips of
// hwmon, those above and those that say that they are a processor's. The chips on
// mainboards that watch its fans (Super I/O) show 115 °C and the like where nothing
// is connected, and their limits are what the firmware left there.
func judged(name string) bool {
	chip, _, labelled := strings.Cut(name, " ")
	return !labelled || slices.Contains(chips, chip) || strings.Contains(chip, "cpu") || strings.Contains(chip, "soc")
}

// temperatureLimits remembers the limits that the machine itself tells.
func (m *Machine) temperatureLimits(inv *hw.Inventory) {
	limits := map[string]hw.Sensor{}
	for _, s := range inv.Sensors {
		if s.Kind == hw.Temperature && len(limits) < maxKept {
			limits[s.Name] = s
		}
	}
	for name := range m.limits {
		if _, still := limits[name]; !still && !noted(inv, "sensors", name) && len(inv.Sensors) > 0 {
			m.r.Clear(Overheating, name)
			delete(m.row, key{Overheating, name})
		}
	}
	m.limits, m.lone = limits, len(limits) == 1
}

// noted tells whether a section's notes say that something could not be read.
// subject "" asks for the whole section.
func noted(inv *hw.Inventory, section, subject string) bool {
	return slices.ContainsFunc(inv.Notes, func(n hw.Note) bool {
		return n.Section == section && (len(n.Subjects) == 0 || subject != "" && slices.Contains(n.Subjects, subject))
	})
}

// limit is from where on a sensor is too hot, and from where on it is in danger;
// 0 if nothing is known.
func (m *Machine) limit(name string) (warm, critical float64) {
	s := m.limits[name]
	cpu := processor(name) || m.lone
	least := float64(leastLimit)
	if cpu {
		least = leastCPU
	}
	if s.High != nil && *s.High >= least && *s.High <= mostLimit {
		warm = *s.High
	}
	if s.Critical != nil && *s.Critical >= least && *s.Critical <= mostLimit {
		critical = *s.Critical
	}
	if cpu {
		if t := m.board.Thermal; t.Warm > 0 {
			warm = t.Warm
		}
		if t := m.board.Thermal; t.Critical > 0 {
			critical = t.Critical
		}
		if warm == 0 && critical == 0 {
			warm = defaultWarm
		}
	}
	if warm == 0 && critical > 0 || critical > 0 && warm > critical {
		warm = critical - coolBelow
	}
	return warm, critical
}

func (m *Machine) temperatures(t hw.Telemetry) {
	for name, v := range t.Temperatures {
		warm, critical := m.limit(name)
		if warm == 0 || v < -100 || v > 200 || !judged(name) {
			continue
		}
		m.hot(name, label(name, 64), v, warm, critical, hotInARow)
	}
}

func (m *Machine) hot(subject, what string, v, warm, critical float64, need int) {
	s, limit := wire.Trouble, fmt.Sprintf("%.0f °C is its limit", warm)
	if critical > 0 && v >= critical {
		s, limit = wire.Critical, fmt.Sprintf("at %.0f °C it is in danger", critical)
	}
	m.judge(Overheating, subject, over(v, warm, warm-coolBelow), need, s, fmt.Sprintf("%s is at %.0f °C; %s", what, v, limit))
}

func (m *Machine) throttling(t *hw.Throttling) {
	if t == nil {
		return
	}
	if t.UnderVoltage != nil {
		m.judge(UnderVoltage, "", is(*t.UnderVoltage), 1, "", "the board says that its voltage is too low")
	}
	v := unknown
	switch {
	case t.Now != nil:
		v = is(*t.Now)
	case t.Count != nil && m.throttled != nil && *t.Count >= *m.throttled:
		v = is(*t.Count > *m.throttled)
	}
	if t.Count != nil {
		m.throttled = t.Count
	}
	m.judge(Throttled, "", v, 3, "", "the processor is held below its speed")
}

// Memory is short if tasks wait for it (percent of the time, see hw.Pressure),
// or next to nothing is available.
const (
	someHigh, someLow = 40, 20
	fullHigh, fullLow = 10, 5
	leastAvailable    = 128 << 20 // bytes, together with leastShare
	leastShare        = 0.04      // of all
	memoryInARow      = 6         // samples
)

func (m *Machine) memory(t hw.Telemetry) {
	var votes []verdict
	detail := ""
	if p := t.Pressure; p != nil && percent(p.MemorySome) && percent(p.MemoryFull) {
		v := max3(over(p.MemorySome, someHigh, someLow), over(p.MemoryFull, fullHigh, fullLow))
		votes = append(votes, v)
		detail = fmt.Sprintf("programs wait for memory %.0f%% of the time", p.MemorySome)
	}
	if total, free := t.MemoryTotal, t.MemoryAvailable; total > 0 && free <= total {
		share := float64(free) / float64(total)
		switch {
		case free < leastAvailable && share < leastShare:
			votes = append(votes, yes)
			detail = fmt.Sprintf("only %s of %s are available", size(free), size(total))
		case share < 1.5*leastShare && free < 2*leastAvailable:
			votes = append(votes, unknown)
		default:
			votes = append(votes, no)
		}
	}
	if len(votes) > 0 {
		m.judge(MemoryPressure, "", max3(votes...), memoryInARow, "", detail)
	}
}

func percent(v float64) bool { return v >= 0 && v <= 100 }

// max3 is yes if any is; no if all are.
func max3(all ...verdict) verdict {
	switch {
	case slices.Contains(all, yes):
		return yes
	case slices.Contains(all, unknown):
		return unknown
	}
	return no
}

// below tells whether a path is in a mount point, and how deep that is.
func below(mount, dir string) (depth int, ok bool) {
	mount, dir = path.Clean(mount), path.Clean(dir)
	if mount == "/" {
		return 0, strings.HasPrefix(dir, "/")
	}
	return len(mount), dir == mount || strings.HasPrefix(dir, mount+"/")
}

// filesystemOf finds the filesystem that a folder is on.
func filesystemOf(inv *hw.Inventory, dir string) (hw.Filesystem, bool) {
	var best hw.Filesystem
	deepest := -1
	consider := func(mount string, f hw.Filesystem) {
		if depth, ok := below(mount, dir); ok && depth > deepest {
			best, deepest = f, depth
		}
	}
	for _, f := range inv.Filesystems {
		consider(f.Path(), f)
		for _, mount := range alsoMounted(inv, f) {
			consider(mount, f)
		}
	}
	return best, deepest >= 0
}

// alsoMounted lists the other mount points of a filesystem.
func alsoMounted(inv *hw.Inventory, f hw.Filesystem) []string {
	for _, d := range inv.Disks {
		if d.Name != f.Disk {
			continue
		}
		for _, list := range append([][]string{d.Mounts}, mountsOf(d.Partitions)...) {
			if slices.Contains(list, f.Mount) {
				return list
			}
		}
	}
	return nil
}

func mountsOf(parts []hw.Partition) [][]string {
	var all [][]string
	for _, p := range parts {
		all = append(all, p.Mounts)
	}
	return all
}

// filesystems judges those of the paths, and "/".
func (m *Machine) filesystems(inv *hw.Inventory) {
	dirs := []string{"/"}
	for _, p := range m.paths {
		dirs = append(dirs, p.real)
	}
	found := map[string]hw.Filesystem{}
	floors := map[string]uint64{}
	for i, dir := range dirs {
		f, ok := filesystemOf(inv, dir)
		if !ok {
			continue
		}
		f.Mount = label(f.Mount, maxSubject)
		found[f.Mount] = f
		m.readOnly(f, dir)
		if i == 0 {
			continue
		}
		if i == 1 {
			m.data = f
		}
		// Of two volumes on one filesystem, the one with the lower floor fills it.
		if floor := m.paths[i-1].Floor; floor > 0 && (floors[f.Mount] == 0 || floor < floors[f.Mount]) {
			floors[f.Mount] = floor
		}
	}
	m.floors = floors
	for _, f := range found {
		m.full(f)
	}
	if len(inv.Filesystems) > 0 && !noted(inv, "filesystems", "") {
		mounts := slices.Collect(maps.Keys(found))
		m.r.Only(FilesystemFull, mounts...)
		m.r.Only(FilesystemReadOnly, mounts...)
	}
}

// readOnly judges the filesystem that a folder is on. One that was never
// writable is meant to be so. For "/" only what was seen since the agent
// started counts: a new version of the system may be made differently.
func (m *Machine) readOnly(f hw.Filesystem, dir string) {
	wrote := m.mem.Writable[dir] == f.Mount
	if dir == "/" {
		wrote = m.rootWrote
	}
	switch {
	case !f.ReadOnly:
		if dir == "/" {
			m.rootWrote = true
		} else if !wrote && len(m.mem.Writable) < maxWritable {
			m.mem.Writable[dir], m.unsaved = f.Mount, true
		}
		m.r.Clear(FilesystemReadOnly, f.Mount)
	case wrote:
		m.r.Set(FilesystemReadOnly, f.Mount, fmt.Sprintf("%s was writable and is not any more", f.Mount))
	}
}

// A filesystem is nearly full below a share of it, of a large one below so many
// bytes. Where volumes fill it on purpose, it is so only when also well below
// their floor: stores work in files of up to 256 MiB and hover around it. The
// floor alone says nothing: that of a small system disk may be more than it ever
// has free.
const (
	fullShare, fullBytes         = 0.05, 10 << 30
	criticalShare, criticalBytes = 0.01, 1 << 30
	fullBack                     = 1.2
	floorShare, floorCritical    = 0.75, 0.25
)

func (m *Machine) full(f hw.Filesystem) {
	if f.Total == 0 || f.Free > f.Total {
		return
	}
	free, total := float64(f.Free), float64(f.Total)
	warn, critical := min(fullShare*total, fullBytes), min(criticalShare*total, criticalBytes)
	why := ""
	if floor := float64(m.floors[f.Mount]); floor > 0 {
		warn, critical = min(warn, floorShare*floor), min(critical, floorCritical*floor)
		why = fmt.Sprintf(", where volumes leave %s", size(m.floors[f.Mount]))
	}
	v, s := unknown, wire.Trouble
	switch {
	case free < warn:
		v = yes
	case free >= fullBack*warn:
		v = no
	}
	if free < critical {
		s = wire.Critical
	}
	m.judge(FilesystemFull, f.Mount, v, 1, s, fmt.Sprintf("%s has %s of %s left%s", f.Mount, size(f.Free), size(f.Total), why))
}

// size is a number of bytes for people.
func size(b uint64) string {
	v, unit := float64(b), 0
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	for v >= 1024 && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	if v < 10 && unit > 0 {
		return fmt.Sprintf("%.1f %s", v, units[unit])
	}
	return fmt.Sprintf("%.0f %s", v, units[unit])
}
