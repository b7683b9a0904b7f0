// Package board tells which board this machine is, and what is known about
// that board beforehand.
//
// # Detect, never assume
//
// A machine describes itself in two public places, and nothing else is looked at:
//
//   - the device tree (ARM): /proc/device-tree/compatible, most specific name
//     first, and /proc/device-tree/model
//     (Devicetree Specification 0.4, section 2.3, https://www.devicetree.org/specifications/)
//   - DMI (PCs, servers, ARM with ACPI): /sys/class/dmi/id/sys_vendor and product_name
//     (https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-class-dmi)
//
// # Profiles
//
// What cannot be read from the machine, such as which LED is meant for status,
// stands in a profile: one TOML file in profiles/, embedded in the binary. A
// profile says which machines it fits. The most specific one wins:
//
//  1. a compatible name of the device tree, earlier names before later ones
//  2. DMI vendor and product
//  3. the generic profile of the processor architecture
//
// so that there is always one, and a board that nobody has described still
// works with what is detected. Each profile that states facts about a board
// names their public source in a comment; [Parse] refuses keys it does not know.
//
// # Not done yet
//
// Profiles on disk that override the embedded ones; buttons, sensor buses,
// thermal limits and update slots in profiles.
package board

import (
	"embed"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"unicode"

	"github.com/BurntSushi/toml"
	"golang.org/x/sys/unix"
)

// Board is what a machine is. The zero value is a machine that says nothing.
type Board struct {
	Name       string   `json:"name"`                 // of the profile, such as "raspberry-pi-4"; stable
	Title      string   `json:"title"`                // of the profile, for people
	Model      string   `json:"model,omitempty"`      // what the machine calls itself
	Vendor     string   `json:"vendor,omitempty"`     // DMI sys_vendor
	Compatible []string `json:"compatible,omitempty"` // device tree, most specific first
	Facts
}

// Facts are what a profile says about a board, beyond which machines it fits.
// Whether any of it exists in this machine, hw tells.
type Facts struct {
	LEDs     []LED    `toml:"leds" json:"leds,omitempty"`
	Button   *Button  `toml:"button" json:"button,omitempty"`
	Sensors  []Sensor `toml:"sensors" json:"sensors,omitempty"`
	Disks    Disks    `toml:"disks" json:"disks,omitzero"`
	Thermal  Thermal  `toml:"thermal" json:"thermal,omitzero"`
	Slots    string   `toml:"slots" json:"slots,omitempty"`       // how firmware is updated: "" (the agent only) or "uki" (unified kernel images with boot counting)
	Watchdog string   `toml:"watchdog" json:"watchdog,omitempty"` // driver identity of the one to feed, if there are several; "" takes the first
}

// LED is a light that a profile gives a purpose.
type LED struct {
	Use   string   `toml:"use" json:"use"`               // "status" or "power"
	Names []string `toml:"names" json:"names,omitempty"` // below /sys/class/leds; the first that exists is meant
	Line  *Line    `toml:"line" json:"line,omitempty"`   // instead of names: a GPIO line
}

// Line is one line of a GPIO controller.
type Line struct {
	Chip      string `toml:"chip" json:"chip"`                       // label of the controller, which unlike its number is the same after a reboot
	Offset    int    `toml:"offset" json:"offset"`                   // of the line in it
	ActiveLow bool   `toml:"active_low" json:"active_low,omitempty"` // low is on, or pressed
	Pull      string `toml:"pull" json:"pull,omitempty"`             // of an input: "", "up" or "down"
}

// Button is one that a person can press.
type Button struct {
	Use  string `toml:"use" json:"use"` // "reset": held for 10 s at start, it resets to factory
	Line Line   `toml:"line" json:"line"`
}

// Sensor is one on a bus, which cannot be detected but by asking. Owners
// declare theirs in the agent's configuration in the same form.
type Sensor struct {
	Name        string        `toml:"name" json:"name"`                         // unique, for people and series
	Driver      string        `toml:"driver" json:"driver"`                     // one of hw/sensor
	Bus         string        `toml:"bus" json:"bus"`                           // as in the inventory, such as "/dev/i2c-1" or "w1_bus_master1"
	Address     string        `toml:"address" json:"address,omitempty"`         // "0x76", or "28-0000075565ad" on 1-wire; "" for the driver's own default
	Every       string        `toml:"every" json:"every,omitempty"`             // Go duration; "" is one minute
	Shunt       float64       `toml:"shunt_ohm" json:"shunt_ohm,omitempty"`     // of a current sensor
	Calibration []Calibration `toml:"calibration" json:"calibration,omitempty"` // at most one a kind
}

// Calibration corrects a value: shown = read · Scale + Offset, in the kind's own unit.
type Calibration struct {
	Kind   string   `toml:"kind" json:"kind"`             // of hw.SensorKind
	Scale  *float64 `toml:"scale" json:"scale,omitempty"` // nil is 1
	Offset float64  `toml:"offset" json:"offset,omitempty"`
}

// Disks says which disks of a board may hold chunks, beyond the rules of hw/disk.
type Disks struct {
	Never  []string `toml:"never" json:"never,omitempty"`   // buses, such as "sd", whose disks are not used unless the owner says so
	System bool     `toml:"system" json:"system,omitempty"` // the system's own disk may be used, above its floor
}

// Thermal is what the processor bears, in °C; 0 leaves it to what the machine says.
type Thermal struct {
	Warm     float64 `toml:"warm" json:"warm,omitempty"`         // from here on somebody should look
	Critical float64 `toml:"critical" json:"critical,omitempty"` // from here on no jobs
}

// Profile is one file of profiles/.
type Profile struct {
	Name  string `toml:"name"`  // same as the file's name without .toml
	Title string `toml:"title"` // for people
	Match Match  `toml:"match"`
	Facts
}

// Match says which machines a profile fits. Arch, where given, must fit too;
// a profile with nothing but Arch is the generic one of these architectures.
type Match struct {
	Arch       []string `toml:"arch"`       // as Go names them
	Compatible []string `toml:"compatible"` // device tree names, any of them
	DMI        []DMI    `toml:"dmi"`        // any of them
}

// DMI is one firmware identity; both fields must be equal.
type DMI struct {
	Vendor  string `toml:"vendor"`
	Product string `toml:"product"`
}

func (m Match) generic() bool { return len(m.Compatible) == 0 && len(m.DMI) == 0 }

//go:embed profiles/*.toml
var files embed.FS

// embedded reads the built-in profiles once, sorted by name. A profile that
// does not parse cannot be shipped: the linter test reads the same files.
var embedded = sync.OnceValues(func() ([]Profile, error) {
	entries, err := files.ReadDir("profiles")
	if err != nil {
		return nil, err
	}
	var all []Profile
	for _, e := range entries {
		raw, err := files.ReadFile(path.Join("profiles", e.Name()))
		if err != nil {
			return nil, err
		}
		p, err := Parse(strings.TrimSuffix(e.Name(), ".toml"), raw)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
})

// Profiles returns the built-in profiles, sorted by name.
func Profiles() ([]Profile, error) {
	all, err := embedded()
	return slices.Clone(all), err
}

var profileName = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// Parse reads one profile. name is the file's name without ".toml". Unknown
// keys, missing fields and an unknown use of an LED are errors.
func Parse(name string, raw []byte) (Profile, error) {
	var p Profile
	meta, err := toml.Decode(string(raw), &p)
	if err != nil {
		return Profile{}, fmt.Errorf("board profile %s: %w", name, err)
	}
	if extra := meta.Undecoded(); len(extra) > 0 {
		return Profile{}, fmt.Errorf("board profile %s: unknown key %q; remove it or correct its spelling", name, extra[0].String())
	}
	if err := p.check(name); err != nil {
		return Profile{}, fmt.Errorf("board profile %s: %w", name, err)
	}
	return p, nil
}

func (p Profile) check(name string) error {
	switch {
	case p.Name != name:
		return fmt.Errorf("its name is %q; it must be that of the file", p.Name)
	case !profileName.MatchString(p.Name):
		return fmt.Errorf("the name may have only a-z, 0-9 and single dashes")
	case p.Title == "":
		return fmt.Errorf("title is missing")
	case p.Match.generic() && len(p.Match.Arch) == 0:
		return fmt.Errorf("match is empty; it would fit every machine")
	}
	for _, c := range p.Match.Compatible {
		if c == "" {
			return fmt.Errorf("match.compatible has an empty name")
		}
	}
	for _, d := range p.Match.DMI {
		if d.Vendor == "" || d.Product == "" {
			return fmt.Errorf("match.dmi needs vendor and product")
		}
	}
	for _, l := range p.LEDs {
		if l.Use != "status" && l.Use != "power" {
			return fmt.Errorf("an LED's use is %q; it must be status or power", l.Use)
		}
		if len(l.Names) == 0 || slices.Contains(l.Names, "") {
			return fmt.Errorf("the %s LED has no name", l.Use)
		}
	}
	return nil
}

// Detect tells which board the machine below root is; root is "/" except for
// recorded machines. It reads four small files, never fails and never blocks
// on anything but the kernel: what cannot be read is left empty.
func Detect(root string) Board { return detect(root, runtime.GOARCH) }

func detect(root, arch string) Board {
	b := Board{
		Vendor: readText(root, "sys/class/dmi/id/sys_vendor"),
		Model:  readText(root, "proc/device-tree/model"),
	}
	product := readText(root, "sys/class/dmi/id/product_name")
	if b.Model == "" {
		b.Model = product
	}
	b.Compatible = stringList(read(root, "proc/device-tree/compatible"))

	all, err := embedded()
	if err != nil {
		// Cannot happen in a tested binary; a machine without a profile still works.
		return b
	}
	if p := choose(all, arch, b.Compatible, DMI{b.Vendor, product}); p != nil {
		b.Name, b.Title, b.Facts = p.Name, p.Title, p.Facts
	}
	return b
}

// choose finds the most specific profile, nil if there is none even for the architecture.
func choose(all []Profile, arch string, compatible []string, dmi DMI) *Profile {
	fits := func(yes func(Match) bool) *Profile {
		for i, p := range all {
			if (len(p.Match.Arch) == 0 || slices.Contains(p.Match.Arch, arch)) && yes(p.Match) {
				return &all[i]
			}
		}
		return nil
	}
	for _, c := range compatible {
		if p := fits(func(m Match) bool { return slices.Contains(m.Compatible, c) }); p != nil {
			return p
		}
	}
	if p := fits(func(m Match) bool { return slices.Contains(m.DMI, dmi) }); p != nil {
		return p
	}
	return fits(Match.generic)
}

// stringList takes a device tree's list of NUL-terminated strings apart.
func stringList(raw []byte) []string {
	var list []string
	for s := range strings.SplitSeq(string(raw), "\x00") {
		if s = clean(s); s != "" {
			list = append(list, s)
		}
	}
	return list
}

// readText reads one line of text, without what a terminal could take for a command.
func readText(root, name string) string {
	return clean(strings.TrimRight(string(read(root, name)), "\x00\n"))
}

func clean(s string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, s))
}

// read returns at most 4 KiB of a regular file, nil if there is none. It opens
// without blocking: a FIFO in a recorded tree must not stop the agent.
func read(root, name string) []byte {
	f, err := os.OpenFile(filepath.Join(root, name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil
	}
	buf := make([]byte, 4096)
	n, err := f.Read(buf)
	if err != nil {
		return nil
	}
	return buf[:n]
}
