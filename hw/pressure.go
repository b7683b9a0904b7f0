package hw

import (
	"strconv"
	"strings"
)

// readPressure reads /proc/pressure; nil on a kernel without it (CONFIG_PSI off,
// or psi=0, with which the files are there and cannot be read).
func readPressure(t tree) *Pressure {
	memory, okMemory := stalls(t, "memory")
	cpu, okCPU := stalls(t, "cpu")
	io, okIO := stalls(t, "io")
	if !okMemory || !okCPU || !okIO {
		return nil
	}
	return &Pressure{
		MemorySome: memory["some"], MemoryFull: memory["full"],
		CPUSome: cpu["some"],
		IOSome:  io["some"], IOFull: io["full"],
	}
}

// stalls reads one resource, in percent of the last 10 seconds:
//
//	some avg10=0.22 avg60=0.17 avg300=1.11 total=58761459
//	full avg10=0.12 avg60=0.10 avg300=1.01 total=48761459
func stalls(t tree, resource string) (map[string]float64, bool) {
	raw, err := t.bytes("proc/pressure/" + resource)
	if err != nil {
		return nil, false
	}
	found := map[string]float64{}
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		text, ok := strings.CutPrefix(f[1], "avg10=")
		v, err := strconv.ParseFloat(text, 64)
		if ok && err == nil && v >= 0 && v <= 100 {
			found[f[0]] = v
		}
	}
	_, ok := found["some"]
	return found, ok
}
