package board

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// What a profile may hold at most. Beyond it is a mistake or an attack.
const (
	maxFile    = 64 << 10 // bytes
	maxText    = 200      // runes of a title or a match
	maxName    = 64       // runes of what the kernel names: LEDs, chips, buses
	maxList    = 64       // entries of any list
	maxOffset  = 1023     // of a GPIO line
	maxWatch   = 31       // bytes of an identity: struct watchdog_info, <linux/watchdog.h>
	coldest    = 30.0     // °C; a limit below would always be passed
	hottest    = 125.0    // °C; no processor on a board bears more
	shortEvery = time.Second
	longEvery  = 24 * time.Hour
)

var (
	profileName = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)
	compatName  = regexp.MustCompile(`^[^,*\s]+,([^*\s]+|\*)$`)
	ledName     = regexp.MustCompile(`^[^/\s]+$`) // a folder below /sys/class/leds

	arches = []string{"amd64", "arm64", "arm"}
	// buses are those of hw.Disk, which this room may not import.
	buses = []string{"nvme", "sata", "usb", "sd", "emmc", "virtio", "scsi", "xen", "other"}
	// kinds are those of hw.SensorKind, likewise.
	kinds = []string{"temperature", "fan", "voltage", "current", "power", "humidity", "pressure", "co2", "illuminance"}
)

// Problem is one thing that is wrong with a profile.
type Problem struct {
	Line int    `json:"line,omitempty"` // of the file, from 1; 0 if it is about no line, or not known which
	Text string `json:"text"`           // what is wrong and what it must be
}

func (p Problem) String() string {
	if p.Line > 0 {
		return fmt.Sprintf("line %d: %s", p.Line, p.Text)
	}
	return p.Text
}

// Invalid is all that is wrong with a profile.
type Invalid struct {
	Name     string
	Problems []Problem
}

func (e *Invalid) Error() string {
	list := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		list[i] = p.String()
	}
	return fmt.Sprintf("board profile %s: %s", clip(e.Name), strings.Join(list, "; "))
}

// Parse reads one profile. name is the file's name without ".toml". Its error
// is an [*Invalid] with everything that is wrong: unknown keys, missing fields
// and facts that cannot be true. Whether the drivers of sensors exist is for
// hw/sensor to say.
func Parse(name string, raw []byte) (Profile, error) {
	var c checker
	if len(raw) > maxFile {
		c.add("the file has %d bytes; a profile has at most %d", len(raw), maxFile)
		return Profile{}, &Invalid{name, c.problems}
	}
	var p Profile
	meta, err := toml.Decode(string(raw), &p)
	if err != nil {
		return Profile{}, &Invalid{name, []Problem{syntax(err)}}
	}
	for _, key := range meta.Undecoded() {
		c.problems = append(c.problems, Problem{lineOf(raw, key), fmt.Sprintf("unknown key %q; remove it or correct its spelling", clip(key.String()))})
	}
	c.profile(name, p)
	if len(c.problems) > 0 {
		return Profile{}, &Invalid{name, c.problems}
	}
	return p, nil
}

func syntax(err error) Problem {
	if e, ok := errors.AsType[toml.ParseError](err); ok {
		return Problem{e.Position.Line, clip(e.Message)}
	}
	return Problem{Text: clip(strings.TrimPrefix(err.Error(), "toml: "))}
}

// lineOf finds an unknown key, which the library reports without its place: the
// first line that begins with its last part. 0 if there is no such line, as in
// an inline table.
func lineOf(raw []byte, key toml.Key) int {
	last := key[len(key)-1]
	n := 0
	for line := range strings.Lines(string(raw)) {
		n++
		line = strings.TrimSpace(line)
		if left, _, ok := strings.Cut(line, "="); ok && strings.Trim(strings.TrimSpace(left), `"'`) == last {
			return n
		}
		if strings.Trim(line, "[] ") == key.String() {
			return n
		}
	}
	return 0
}

// checker collects what is wrong.
type checker struct{ problems []Problem }

func (c *checker) add(format string, args ...any) {
	c.problems = append(c.problems, Problem{Text: fmt.Sprintf(format, args...)})
}

// text checks words for people, or of the machine.
func (c *checker) text(what, s string, limit int) {
	switch {
	case strings.TrimSpace(s) == "":
		c.add("%s is missing", what)
	case utf8.RuneCountInString(s) > limit:
		c.add("%s is longer than %d characters", what, limit)
	case strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }):
		c.add("%s has characters that cannot be printed", what)
	}
}

func (c *checker) oneOf(what, s string, allowed ...string) {
	if !slices.Contains(allowed, s) {
		c.add("%s is %q; it must be one of %s", what, clip(s), strings.TrimPrefix(strings.Join(allowed, ", "), ", "))
	}
}

// few bounds a list; the rest of an endless one is not looked at.
func few[T any](c *checker, what string, list []T) []T {
	if len(list) > maxList {
		c.add("%s has %d entries; it has at most %d", what, len(list), maxList)
		return list[:maxList]
	}
	return list
}

// once reports what stands in a list twice.
func (c *checker) once(what string, list []string) {
	for i, s := range list {
		if slices.Index(list, s) < i {
			c.add("%s %q stands there twice", what, clip(s))
		}
	}
}

func (c *checker) profile(name string, p Profile) {
	if p.Name != name {
		c.add("its name is %q; it must be that of the file, %q", clip(p.Name), clip(name))
	}
	if !profileName.MatchString(p.Name) || len(p.Name) > maxName {
		c.add("the name may have only a-z, 0-9 and single dashes, and %d of them", maxName)
	}
	c.text("title", p.Title, maxText)
	c.match(p.Match)
	c.facts(p.Facts)
}

func (c *checker) match(m Match) {
	if m.generic() && len(m.Arch) == 0 {
		c.add("match is empty; it would fit every machine")
	}
	c.once("match.arch", few(c, "match.arch", m.Arch))
	for _, a := range few(c, "match.arch", m.Arch) {
		c.oneOf("match.arch", a, arches...)
	}
	c.once("match.compatible", few(c, "match.compatible", m.Compatible))
	for _, s := range few(c, "match.compatible", m.Compatible) {
		if !compatName.MatchString(s) {
			c.add("match.compatible has %q; it must look like \"vendor,board\", or \"vendor,*\" for all of a vendor", clip(s))
		}
	}
	for _, d := range few(c, "match.dmi", m.DMI) {
		c.text("the vendor in match.dmi", d.Vendor, maxText)
		c.text("the product in match.dmi", d.Product, maxText)
	}
}

func (c *checker) facts(f Facts) {
	var uses []string
	for _, l := range few(c, "leds", f.LEDs) {
		uses = append(uses, l.Use)
		c.led(l)
	}
	c.once("an LED for the use", uses)
	if f.Button != nil {
		c.oneOf("the button's use", f.Button.Use, "reset")
		c.line("the button", f.Button.Line)
	}
	var names []string
	for _, s := range few(c, "sensors", f.Sensors) {
		names = append(names, s.Name)
		c.sensor(s)
	}
	c.once("the sensor", names)
	never := few(c, "disks.never", f.Disks.Never)
	c.once("disks.never", never)
	for _, b := range never {
		c.oneOf("disks.never", b, buses...)
	}
	c.thermal(f.Thermal)
	c.oneOf("slots", f.Slots, "", "uki")
	if f.Watchdog != "" {
		c.text("watchdog", f.Watchdog, maxWatch)
	}
}

func (c *checker) led(l LED) {
	c.oneOf("an LED's use", l.Use, "status", "power")
	who := fmt.Sprintf("the %s LED", clip(l.Use))
	switch {
	case len(l.Names) == 0 && l.Line == nil:
		c.add("%s has neither names nor a line", who)
	case len(l.Names) > 0 && l.Line != nil:
		c.add("%s has names and a line; it can have only one of them", who)
	}
	for _, n := range few(c, "names of "+who, l.Names) {
		c.text("a name of "+who, n, maxName)
		if !ledName.MatchString(n) || n == "." || n == ".." {
			c.add("%s is called %q; it must be a name below /sys/class/leds", who, clip(n))
		}
	}
	if l.Line != nil {
		c.line(who, *l.Line)
	}
}

func (c *checker) line(who string, l Line) {
	c.text("line.chip of "+who, l.Chip, maxName)
	if l.Offset < 0 || l.Offset > maxOffset {
		c.add("line.offset of %s is %d; it must be 0 to %d", who, l.Offset, maxOffset)
	}
	c.oneOf("line.pull of "+who, l.Pull, "", "up", "down")
}

func (c *checker) sensor(s Sensor) {
	c.text("a sensor's name", s.Name, maxName)
	who := fmt.Sprintf("sensor %q", clip(s.Name))
	c.text("driver of "+who, s.Driver, maxName)
	c.text("bus of "+who, s.Bus, maxName)
	if s.Address != "" {
		c.text("address of "+who, s.Address, maxName)
	}
	if s.Every != "" {
		if d, err := time.ParseDuration(s.Every); err != nil || d < shortEvery || d > longEvery {
			c.add("every of %s is %q; it must be a time from 1s to 24h, such as \"30s\"", who, clip(s.Every))
		}
	}
	if !(s.Shunt >= 0) || math.IsInf(s.Shunt, 0) {
		c.add("shunt_ohm of %s is %v; it must be a resistance in ohm", who, s.Shunt)
	}
	var of []string
	for _, k := range few(c, "calibration of "+who, s.Calibration) {
		of = append(of, k.Kind)
		c.oneOf("calibration.kind of "+who, k.Kind, kinds...)
		if k.Scale != nil && (*k.Scale == 0 || math.IsNaN(*k.Scale) || math.IsInf(*k.Scale, 0)) {
			c.add("calibration.scale of %s is %v; it must be a number other than 0", who, *k.Scale)
		}
		if math.IsNaN(k.Offset) || math.IsInf(k.Offset, 0) {
			c.add("calibration.offset of %s is %v; it must be a number", who, k.Offset)
		}
	}
	c.once("calibration of "+who+" for", of)
}

func (c *checker) thermal(t Thermal) {
	for _, l := range []struct {
		what string
		c    float64
	}{{"warm", t.Warm}, {"critical", t.Critical}} {
		if l.c != 0 && !(l.c >= coldest && l.c <= hottest) {
			c.add("thermal.%s is %v °C; it must be %v to %v, or 0 to leave it to the machine", l.what, l.c, coldest, hottest)
		}
	}
	if t.Warm != 0 && t.Critical != 0 && !(t.Warm < t.Critical) {
		c.add("thermal.warm is %v °C and thermal.critical %v °C; warm must be below critical", t.Warm, t.Critical)
	}
}

// clip makes what a file holds fit for a message.
func clip(s string) string {
	s = clean(s)
	if r := []rune(s); len(r) > maxText {
		return string(r[:maxText]) + "…"
	}
	return s
}
