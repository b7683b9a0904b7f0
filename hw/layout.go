package hw

import (
	"path"
	"time"
)

// layoutAge is how long a sampler remembers what there is to read. Looking for
// it costs much more than reading it.
const layoutAge = 5 * time.Minute

// layout is what a machine has that a sample reads.
type layout struct {
	found        time.Time
	temperatures []source
	throttling   throttleSources
	ext4         map[string][]string
	names        map[string]*knownDisk // of diskstats; nil for what is no disk
	links        map[string]bool       // by name: there is a device behind it
}

func findLayout(t tree, now time.Time) *layout {
	l := &layout{found: now, throttling: findThrottling(t), ext4: ext4Disks(t), names: map[string]*knownDisk{}, links: map[string]bool{}}
	for _, x := range findSensors(t) {
		if x.measure.kind == Temperature {
			x.high, x.critical = "", "" // a sample has no use for the limits
			l.temperatures = append(l.temperatures, x)
		}
	}
	return l
}

// disk looks a name of diskstats up. One that was never seen is looked at, so
// that a disk that was just plugged in is seen at once.
func (l *layout) disk(t tree, name string) (knownDisk, bool) {
	d, known := l.names[name]
	if !known {
		if found, ok := findDisk(t, name); ok {
			found.ext4 = l.ext4[name]
			d = &found
		}
		l.names[name] = d
	}
	if d == nil {
		return knownDisk{}, false
	}
	return *d, true
}

// asleep tells whether the device of a sensor was suspended since it was found:
// reading it could wake it, as in skipChip.
func (s source) asleep(t tree) bool {
	return t.word(path.Dir(s.value)+"/device/power/runtime_status") == "suspended"
}
