package sensor

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/hw"
)

// BusKind is what a chip is connected by, as in hw.Bus.
type BusKind string

// The kinds of buses.
const (
	I2C     BusKind = "i2c"
	OneWire BusKind = "onewire"
)

// Driver reads a family of chips.
type Driver struct {
	Name      string          `json:"name"`
	Chips     []string        `json:"chips"`
	Bus       BusKind         `json:"bus"`
	Addresses []string        `json:"addresses"` // possible ones, the default first; on 1-wire their beginnings, without a default
	Measures  []hw.SensorKind `json:"measures"`
	Least     string          `json:"least_interval"` // Go duration; no reading sooner than this after another

	i2c      []uint16 // the default first
	families []byte   // 1-wire
	least    time.Duration
	limit    time.Duration // for opening, and for a reading
	settle   time.Duration // from opening to the first value, while others use the bus
	stays    bool          // open between readings
	shunt    bool          // wants the size of a resistor
	open     func(*link, declared) (chip, error)
}

// chip is an open sensor.
type chip struct {
	read func() (map[hw.SensorKind]float64, error) // in the kinds' units, as the chip has them
	rest func() error                              // leaves it as it is best while nobody reads; nil if it does so itself
}

// drivers is the table. Least intervals are from the datasheets: conversion
// time, and what keeps a chip from warming itself.
var drivers = []*Driver{
	{
		Name: "bmxx80", Chips: []string{"BMP180", "BMP280", "BME280"}, Bus: I2C, i2c: []uint16{0x76, 0x77},
		// A BMP has no humidity.
		Measures: []hw.SensorKind{hw.Temperature, hw.AirPressure, hw.Humidity},
		least:    time.Second, limit: 3 * time.Second, open: openBMxx80,
	},
	{
		Name: "ds18b20", Chips: []string{"DS18B20", "DS18S20"}, Bus: OneWire, families: []byte{0x28, 0x10},
		Measures: []hw.SensorKind{hw.Temperature},
		least:    2 * time.Second, limit: 8 * time.Second, open: openDS18B20,
	},
	{
		Name: "tmp102", Chips: []string{"TMP102"}, Bus: I2C, i2c: span(0x48, 0x4b),
		Measures: []hw.SensorKind{hw.Temperature},
		least:    time.Second, limit: 3 * time.Second, open: openTMP102,
	},
	{
		Name: "mcp9808", Chips: []string{"MCP9808"}, Bus: I2C, i2c: span(0x18, 0x1f),
		Measures: []hw.SensorKind{hw.Temperature},
		least:    time.Second, limit: 3 * time.Second, open: openMCP9808,
	},
	{
		Name: "aht20", Chips: []string{"AHT20"}, Bus: I2C, i2c: []uint16{0x38},
		Measures: []hw.SensorKind{hw.Temperature, hw.Humidity},
		least:    2 * time.Second, limit: 3 * time.Second, open: openAHT20,
	},
	{
		Name: "scd4x", Chips: []string{"SCD40", "SCD41"}, Bus: I2C, i2c: []uint16{0x62},
		Measures: []hw.SensorKind{hw.CO2, hw.Temperature, hw.Humidity},
		least:    5 * time.Second, limit: 10 * time.Second, settle: 5500 * time.Millisecond, stays: true, open: openSCD4x,
	},
	{
		Name: "ina219", Chips: []string{"INA219"}, Bus: I2C, i2c: span(0x40, 0x4f),
		Measures: []hw.SensorKind{hw.Voltage, hw.Current, hw.PowerDraw},
		least:    time.Second, limit: 3 * time.Second, shunt: true, open: openINA219,
	},
	{
		Name: "bh1750", Chips: []string{"BH1750"}, Bus: I2C, i2c: []uint16{0x23, 0x5c},
		Measures: []hw.SensorKind{hw.Illuminance},
		least:    time.Second, limit: 3 * time.Second, open: openBH1750,
	},
}

func init() {
	for _, d := range drivers {
		d.Least = d.least.String()
		for _, a := range d.i2c {
			d.Addresses = append(d.Addresses, fmt.Sprintf("0x%02x", a))
		}
		for _, f := range d.families {
			d.Addresses = append(d.Addresses, fmt.Sprintf("%02x-", f))
		}
	}
}

// Drivers is what can be read, in the order of the documentation.
func Drivers() []Driver {
	var all []Driver
	for _, d := range drivers {
		c := *d
		c.Chips, c.Addresses, c.Measures = slices.Clone(d.Chips), slices.Clone(d.Addresses), slices.Clone(d.Measures)
		all = append(all, c)
	}
	return all
}

// Where says a driver's addresses to a person: "0x18 to 0x1f".
func (dr Driver) Where() string {
	if dr.Bus == OneWire {
		return dr.Addresses[0] + "… or " + dr.Addresses[1] + "…"
	}
	return spans(dr.i2c)
}

func driverOf(name string) *Driver {
	for _, d := range drivers {
		if d.Name == name {
			return d
		}
	}
	return nil
}

func span(from, to uint16) []uint16 {
	var a []uint16
	for ; from <= to; from++ {
		a = append(a, from)
	}
	return a
}

// measure is the unit of a kind and what a chip can show in earnest.
type measure struct {
	unit     string
	min, max float64
}

// plausible are the kinds of the table. The limits are of what chips send,
// before calibration: a divider may well make 16 V of them 160 V. They are the
// widest range of any of the chips; beyond it lies what broken chips, loose
// wires and lost power show, such as 0 ppm of CO₂ or a light that is brighter
// than 16 bits.
var plausible = map[hw.SensorKind]measure{
	hw.Temperature: {"°C", -60, 150},
	hw.Humidity:    {"%", 0, 100},
	hw.AirPressure: {"Pa", 30000, 110000}, // 9,000 m up to below sea level
	hw.CO2:         {"ppm", 100, 40000},   // the air outdoors has above 400
	hw.Illuminance: {"lx", 0, 54611},      // 65535/1.2 is a BH1750 that is dazzled
	hw.Voltage:     {"V", 0, 32},
	hw.Current:     {"A", -3300, 3300}, // 0.32 V over the least shunt
	hw.PowerDraw:   {"W", 0, 110000},
}

// measurements calibrates what a chip sent. What is not plausible is left out
// and stands in the error.
func (d declared) measurements(raw map[hw.SensorKind]float64, at time.Time) ([]hw.Measurement, error) {
	var out []hw.Measurement
	var wrong error
	for _, kind := range d.driver.Measures {
		v, measured := raw[kind]
		if !measured {
			continue
		}
		m := plausible[kind]
		if !(v >= m.min && v <= m.max) {
			wrong = fmt.Errorf("it shows %s %s of %s, which cannot be; the value was dropped; check its wiring and power, then whether it is damaged", plain(v), m.unit, kind)
			continue
		}
		c := d.calibrate[kind]
		if c.Scale != nil {
			v *= *c.Scale
		}
		v += c.Offset
		if kind == hw.Humidity {
			v = min(max(v, 0), 100) // saturated air, corrected upwards, is still saturated
		}
		if !finite(v) {
			wrong = fmt.Errorf("its calibration makes no number of a %s of %s %s; correct scale and offset", kind, plain(raw[kind]), m.unit)
			continue
		}
		name := d.name
		if len(d.driver.Measures) > 1 {
			name += "/" + string(kind)
		}
		out = append(out, hw.Measurement{Name: name, Kind: kind, Unit: m.unit, Value: v, At: at})
	}
	return out, wrong
}

func plain(v float64) string { return strconv.FormatFloat(v, 'g', 6, 64) }
