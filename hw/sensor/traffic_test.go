package sensor

import (
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/i2c"
	"periph.io/x/conn/v3/i2c/i2ctest"
	"periph.io/x/conn/v3/onewire"
	"periph.io/x/conn/v3/onewire/onewiretest"
	"periph.io/x/conn/v3/physic"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

// traffic is a file of testdata/traffic: what goes over the bus while a sensor
// is opened, read once and put to rest, and the values it makes.
type traffic struct {
	sensor board.Sensor
	ops    []transferred
	values map[hw.SensorKind]float64
}

type transferred struct{ w, r []byte }

func readTraffic(t testing.TB, name string) traffic {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", "traffic", name+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	f := traffic{sensor: board.Sensor{Name: name}, values: map[hw.SensorKind]float64{}}
	for line := range strings.Lines(string(raw)) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch word {
		case "", "#":
		case "driver":
			f.sensor.Driver = rest
		case "address":
			f.sensor.Address = rest
		case "shunt":
			f.sensor.Shunt, err = strconv.ParseFloat(rest, 64)
		case "value":
			kind, v, _ := strings.Cut(rest, " ")
			f.values[hw.SensorKind(kind)], err = strconv.ParseFloat(v, 64)
		case "W", "R":
			w, r, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "W"), "R")
			f.ops = append(f.ops, transferred{unhex(t, w), unhex(t, r)})
		default:
			t.Fatalf("%s: %q", name, line)
		}
		if err != nil {
			t.Fatalf("%s: %q: %v", name, line, err)
		}
	}
	f.sensor.Bus = "/dev/i2c-1"
	if driverOf(f.sensor.Driver).Bus == OneWire {
		f.sensor.Bus = "w1_bus_master1"
	}
	return f
}

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(s), " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// change returns the traffic with what is read by the nth transfer replaced.
func (f traffic) change(n int, r ...byte) traffic {
	f.ops = slices.Clone(f.ops)
	f.ops[n].r = r
	return f
}

// machineOf is a machine whose buses play traffic, from the beginning each
// time a bus is opened. Safe for concurrent use.
type machineOf struct {
	mu     sync.Mutex
	on     map[string]traffic // by name of the bus; others do not exist
	before func(bus string)   // a transfer; may block
	opened []string
	open   int
	played []interface{ Close() error } // that were closed; their Close tells whether all was played
}

func play(f traffic) *machineOf { return &machineOf{on: map[string]traffic{f.sensor.Bus: f}} }

// set puts another traffic on a bus, or takes the bus away.
func (m *machineOf) set(bus string, f *traffic) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f == nil {
		delete(m.on, bus)
	} else {
		m.on[bus] = *f
	}
}

func (m *machineOf) find(bus string) (traffic, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f, ok := m.on[bus]
	if !ok {
		return f, fmt.Errorf("there is no bus %s", bus)
	}
	m.opened = append(m.opened, bus)
	m.open++
	return f, nil
}

func (m *machineOf) closed(p interface{ Close() error }) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open--
	m.played = append(m.played, p)
	return nil
}

func (m *machineOf) hold(bus string) {
	m.mu.Lock()
	before := m.before
	m.mu.Unlock()
	if before != nil {
		before(bus)
	}
}

type i2cPlay struct {
	*i2ctest.Playback
	m   *machineOf
	bus string
}

func (p i2cPlay) Close() error { return p.m.closed(p.Playback) }
func (p i2cPlay) Tx(addr uint16, w, r []byte) error {
	p.m.hold(p.bus)
	if len(p.Ops) == 0 {
		return fmt.Errorf("sysfs-i2c: %w", unix.EREMOTEIO)
	}
	return p.Playback.Tx(addr, w, r)
}
func (p i2cPlay) SetSpeed(physic.Frequency) error { panic("nobody may change the speed of a bus") }

func (m *machineOf) i2c(name string) (i2c.BusCloser, error) {
	f, err := m.find(name)
	if err != nil {
		return nil, err
	}
	d, err := declare(f.sensor)
	if err != nil {
		return nil, err
	}
	b := &i2ctest.Playback{DontPanic: true}
	for _, o := range f.ops {
		b.Ops = append(b.Ops, i2ctest.IO{Addr: d.i2c, W: o.w, R: o.r})
	}
	return i2cPlay{b, m, name}, nil
}

type wirePlay struct {
	*onewiretest.Playback
	m   *machineOf
	bus string
}

func (p wirePlay) Close() error { return p.m.closed(p.Playback) }
func (p wirePlay) Tx(w, r []byte, pull onewire.Pullup) error {
	p.m.hold(p.bus)
	return p.Playback.Tx(w, r, pull)
}

func (m *machineOf) oneWire(name string) (onewire.BusCloser, error) {
	f, err := m.find(name)
	if err != nil {
		return nil, err
	}
	b := &onewiretest.Playback{DontPanic: true}
	for _, o := range f.ops {
		b.Ops = append(b.Ops, onewiretest.IO{W: o.w, R: o.r})
	}
	return wirePlay{b, m, name}, nil
}

// readOne reads one sensor once on a machine.
func readOne(t testing.TB, m machine, s board.Sensor) Reading {
	t.Helper()
	set, err := newSet([]board.Sensor{s}, discard, m)
	if err != nil {
		t.Fatal(err)
	}
	return set.ReadOnce(t.Context())[0]
}

func TestRecordedTrafficMakesTheValuesOfTheDatasheet(t *testing.T) {
	files, err := filepath.Glob("testdata/traffic/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	covered := map[string]bool{}
	for _, file := range files {
		f := readTraffic(t, strings.TrimSuffix(filepath.Base(file), ".txt"))
		covered[f.sensor.Driver] = true
		t.Run(f.sensor.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := play(f)
				r := readOne(t, m, f.sensor)
				if r.Err != nil {
					t.Fatal(r.Err)
				}
				got := map[hw.SensorKind]float64{}
				for _, v := range r.Values {
					got[v.Kind] = v.Value
					if want := plausible[v.Kind].unit; v.Unit != want || v.Unit == "" {
						t.Errorf("%s is in %q, not %q", v.Kind, v.Unit, want)
					}
					name := r.Name
					if len(driverOf(r.Driver).Measures) > 1 {
						name += "/" + string(v.Kind)
					}
					if v.Name != name {
						t.Errorf("the %s is called %q, not %q", v.Kind, v.Name, name)
					}
				}
				for kind, want := range f.values {
					if v, ok := got[kind]; !ok || math.Abs(v-want) > 1e-3+math.Abs(want)*1e-6 {
						t.Errorf("%s is %v, not %v", kind, v, want)
					}
				}
				if len(got) != len(f.values) {
					t.Errorf("it measured %v", slices.Collect(maps.Keys(got)))
				}
				if m.open != 0 {
					t.Errorf("%d buses are still open", m.open)
				}
				for _, p := range m.played {
					if err := p.Close(); err != nil {
						t.Error("not all of the traffic was played:", err)
					}
				}
			})
		})
	}
	for _, d := range Drivers() {
		if !covered[d.Name] {
			t.Errorf("there is no traffic of %s", d.Name)
		}
	}
}
