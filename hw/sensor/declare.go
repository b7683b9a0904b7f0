package sensor

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"periph.io/x/conn/v3/onewire"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

const (
	everyDefault = time.Minute
	everyMost    = 24 * time.Hour
	nameMost     = 64 // runes
	// The range of shunts for which the INA219's current register neither
	// overflows nor loses its resolution; real ones are 1 mΩ to 1 Ω.
	shuntLeast, shuntMost = 0.0001, 10.0
)

// declared is a declaration that has been checked.
type declared struct {
	name      string
	driver    *Driver
	bus       string
	i2c       uint16          // address, of a driver on I²C
	rom       onewire.Address // of one on 1-wire
	every     time.Duration
	shunt     float64 // Ω
	calibrate map[hw.SensorKind]board.Calibration
}

// address is how people and files write it.
func (d declared) address() string {
	if d.driver.Bus == OneWire {
		return romText(d.rom)
	}
	return fmt.Sprintf("0x%02x", d.i2c)
}

// Check tells what is wrong with a declaration, for linters.
func Check(s board.Sensor) error {
	_, err := declare(s)
	return err
}

// declare checks a declaration; all that is wrong with it is in the error.
func declare(s board.Sensor) (declared, error) {
	d := declared{name: s.Name, driver: driverOf(s.Driver), bus: s.Bus, every: everyDefault, calibrate: map[hw.SensorKind]board.Calibration{}}
	var wrong []error
	add := func(format string, args ...any) {
		wrong = append(wrong, fmt.Errorf("sensor %s: "+format, append([]any{quote(s.Name)}, args...)...))
	}
	if problem := badName(s.Name); problem != "" {
		add("%s", problem)
	}
	if d.driver == nil {
		add("%s", unknownDriver(s.Driver))
		return d, errors.Join(wrong...)
	}
	if !busNames[d.driver.Bus].MatchString(s.Bus) {
		add("its bus is %s; %s is on %s, so that must be such as %s; \"deimos-agent probe\" lists them", quote(s.Bus), d.driver.Name, d.driver.Bus, busExamples[d.driver.Bus])
	}
	var err error
	if d.driver.Bus == OneWire {
		d.rom, err = parseROM(s.Address)
		if err == nil && !slices.Contains(d.driver.families, byte(d.rom)) {
			err = fmt.Errorf("its address is %s; one of %s begins with %s", quote(s.Address), d.driver.Name, strings.Join(d.driver.Addresses, " or "))
		}
	} else {
		d.i2c, err = d.driver.parseAddress(s.Address)
	}
	if err != nil {
		add("%v", err)
	}
	if s.Every != "" {
		d.every, err = time.ParseDuration(s.Every)
		switch {
		case err != nil:
			add("every is %s; it must be a time such as \"30s\" or \"5m\"", quote(s.Every))
		case d.every < d.driver.least:
			add("every is %s; %s bears no more than one reading every %v", s.Every, d.driver.Name, d.driver.least)
		case d.every > everyMost:
			add("every is %s; it must be %v at most", s.Every, everyMost)
		}
	}
	d.shunt = s.Shunt
	switch {
	case s.Shunt != 0 && !d.driver.shunt:
		add("shunt_ohm is of a sensor that measures current; %s does not", d.driver.Name)
	case s.Shunt != 0 && !(s.Shunt >= shuntLeast && s.Shunt <= shuntMost):
		add("shunt_ohm is %v; it must be %v to %v (0.1 on most modules)", s.Shunt, shuntLeast, shuntMost)
	}
	for _, c := range s.Calibration {
		kind := hw.SensorKind(c.Kind)
		_, twice := d.calibrate[kind]
		switch {
		case !slices.Contains(d.driver.Measures, kind):
			add("calibration is of %s, which %s does not measure; it measures %s", quote(c.Kind), d.driver.Name, join(d.driver.Measures))
		case twice:
			add("there are two calibrations of %s; there can be one", c.Kind)
		case c.Scale != nil && (*c.Scale == 0 || !finite(*c.Scale)):
			add("the scale of %s is %v; it must be a number other than 0", c.Kind, *c.Scale)
		case !finite(c.Offset):
			add("the offset of %s is %v; it must be a number", c.Kind, c.Offset)
		}
		d.calibrate[kind] = c
	}
	return d, errors.Join(wrong...)
}

func badName(s string) string {
	switch {
	case strings.TrimSpace(s) == "":
		return "it has no name; give it one, such as \"cabinet\""
	case s != strings.TrimSpace(s), strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar || r == '/' || r == '*' }):
		return "its name may not begin or end with a space, nor have \"/\", \"*\" or what cannot be printed"
	case utf8.RuneCountInString(s) > nameMost:
		return fmt.Sprintf("its name has more than %d characters", nameMost)
	}
	return ""
}

func unknownDriver(name string) string {
	for _, d := range drivers {
		for _, chip := range d.Chips {
			if strings.EqualFold(chip, name) {
				return fmt.Sprintf("the driver of a %s is called %q", chip, d.Name)
			}
		}
	}
	var known []string
	for _, d := range drivers {
		known = append(known, d.Name)
	}
	return fmt.Sprintf("there is no driver %s; there are %s", quote(name), strings.Join(known, ", "))
}

// The names of buses are those of hw.Bus.
var (
	busNames = map[BusKind]*regexp.Regexp{
		I2C:     regexp.MustCompile(`^/dev/i2c-(0|[1-9]\d{0,3})$`),
		OneWire: regexp.MustCompile(`^w1_bus_master[1-9]\d{0,3}$`),
	}
	busExamples = map[BusKind]string{I2C: `"/dev/i2c-1"`, OneWire: `"w1_bus_master1"`}
)

var hexAddress = regexp.MustCompile(`^0[xX][0-9a-fA-F]{1,2}$`)

// parseAddress reads an I²C address of 7 bits. Only hex with 0x will do: "76" is
// what i2cdetect prints for 0x76, and 76 is 0x4c to everybody else.
func (dr *Driver) parseAddress(s string) (uint16, error) {
	if s == "" {
		return dr.i2c[0], nil
	}
	if !hexAddress.MatchString(s) {
		return 0, fmt.Errorf("its address is %s; write it in hex with 0x in front, such as %q", quote(s), dr.Addresses[0])
	}
	v, err := strconv.ParseUint(s[2:], 16, 8)
	if err != nil || !slices.Contains(dr.i2c, uint16(v)) {
		return 0, fmt.Errorf("its address is %s; %s can only be at %s", quote(s), dr.Name, spans(dr.i2c))
	}
	return uint16(v), nil
}

// romText writes a 1-wire address as the kernel does.
func romText(rom onewire.Address) string {
	return fmt.Sprintf("%02x-%012x", byte(rom), uint64(rom)>>8&(1<<48-1))
}

var romForm = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{12}$`)

// parseROM reads a 1-wire address as the kernel writes it: family and serial
// number, in hex (Documentation/w1/w1-generic.rst). What the chip sends has a
// checksum behind it, which is put in its place here.
func parseROM(s string) (onewire.Address, error) {
	if s == "" {
		return 0, fmt.Errorf("its address is missing; \"deimos-agent probe\" lists those that are on the bus")
	}
	low := strings.ToLower(s)
	if !romForm.MatchString(low) {
		return 0, fmt.Errorf("its address is %s; it must be two digits, a dash and twelve digits, such as \"28-0000075565ad\"", quote(s))
	}
	raw, err := hex.DecodeString(low[:2] + low[3:])
	if err != nil {
		return 0, err // cannot happen: the digits are hex
	}
	slices.Reverse(raw[1:]) // the serial number is sent lowest byte first
	var rom onewire.Address
	for i, b := range append(raw, onewire.CalcCRC(raw)) {
		rom |= onewire.Address(b) << (8 * i)
	}
	return rom, nil
}

// spans writes addresses for people: 0x18 to 0x1f.
func spans(a []uint16) string {
	var parts []string
	for i := 0; i < len(a); {
		j := i
		for j+1 < len(a) && a[j+1] == a[j]+1 {
			j++
		}
		if j > i+1 {
			parts = append(parts, fmt.Sprintf("0x%02x to 0x%02x", a[i], a[j]))
			i = j + 1
			continue
		}
		parts = append(parts, fmt.Sprintf("0x%02x", a[i]))
		i++
	}
	return strings.Join(parts, " or ")
}

// quote makes what a file holds fit for a message.
func quote(s string) string {
	if r := []rune(s); len(r) > nameMost {
		s = string(r[:nameMost]) + "…"
	}
	return strconv.Quote(s)
}

func join(kinds []hw.SensorKind) string {
	var s []string
	for _, k := range kinds {
		s = append(s, string(k))
	}
	return strings.Join(s, ", ")
}

func finite(v float64) bool { return !math.IsNaN(v) && !math.IsInf(v, 0) }
