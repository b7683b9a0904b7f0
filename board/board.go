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
// stands in a profile: one TOML file. Those of profiles/ are embedded in the
// binary; an owner puts more into a folder, [Dir] by default. A profile says
// which machines it fits. The most specific one wins:
//
//  1. a compatible name of the device tree, earlier names before later ones,
//     and a name in full before a vendor's "vendor,*"
//  2. DMI vendor and product
//  3. the generic profile of the processor architecture
//
// so that there is always one, and a board that nobody has described still
// works with what is detected. A file on disk replaces the embedded profile of
// the same name, and wins over the embedded ones where both are as specific.
// One that is unsound is left out and reported; it never stops the agent.
//
// Each embedded profile that states facts about a board names their public source
// in a comment. docs/boards.md says how to write one, field by field.
package board

import (
	"embed"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"unicode"

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
	Watchdog string   `toml:"watchdog" json:"watchdog,omitempty"` // identity, as in /sys/class/watchdog/*/identity, of the one to feed, if there are several; "" takes the first
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

// Profile is one file.
type Profile struct {
	Name  string `toml:"name" json:"name"`   // same as the file's name without .toml
	Title string `toml:"title" json:"title"` // for people
	Match Match  `toml:"match" json:"match"`
	Facts
	File string `toml:"-" json:"file,omitempty"` // on disk; "" if it is embedded
}

// Match says which machines a profile fits. Arch, where given, must fit too;
// a profile with nothing but Arch is the generic one of these architectures.
type Match struct {
	Arch       []string `toml:"arch" json:"arch,omitempty"`             // as Go names them
	Compatible []string `toml:"compatible" json:"compatible,omitempty"` // device tree names, any of them; "vendor,*" is all of a vendor
	DMI        []DMI    `toml:"dmi" json:"dmi,omitempty"`               // any of them
}

// DMI is one firmware identity; both fields must be equal.
type DMI struct {
	Vendor  string `toml:"vendor" json:"vendor"`
	Product string `toml:"product" json:"product"`
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

// Detect tells which board the machine below root is, by the embedded profiles;
// root is "/" except for recorded machines. It reads four small files, never
// fails and never blocks on anything but the kernel: what cannot be read is left empty.
func Detect(root string) Board { return Builtin().Detect(root) }

// identity is what a machine says of itself.
type identity struct {
	arch       string
	compatible []string
	dmi        DMI
	model      string
}

func identify(root, arch string) identity {
	id := identity{
		arch:       arch,
		compatible: stringList(read(root, "proc/device-tree/compatible")),
		dmi:        DMI{readText(root, "sys/class/dmi/id/sys_vendor"), readText(root, "sys/class/dmi/id/product_name")},
		model:      readText(root, "proc/device-tree/model"),
	}
	if id.model == "" {
		id.model = id.dmi.Product
	}
	return id
}

// as is the machine with what a profile says about it; p may be nil.
func (id identity) as(p *Profile) Board {
	b := Board{Model: id.model, Vendor: id.dmi.Vendor, Compatible: id.compatible}
	if p != nil {
		b.Name, b.Title, b.Facts = p.Name, p.Title, p.Facts
	}
	return b
}

// choose finds the most specific profile, nil if there is none even for the
// architecture. Of equally specific ones the first wins.
func choose(all []Profile, id identity) *Profile {
	fits := func(yes func(Match) bool) *Profile {
		for i, p := range all {
			if (len(p.Match.Arch) == 0 || slices.Contains(p.Match.Arch, id.arch)) && yes(p.Match) {
				return &all[i]
			}
		}
		return nil
	}
	for _, c := range id.compatible {
		if p := fits(func(m Match) bool { return slices.Contains(m.Compatible, c) }); p != nil {
			return p
		}
		if vendor, _, ok := strings.Cut(c, ","); ok {
			if p := fits(func(m Match) bool { return slices.Contains(m.Compatible, vendor+",*") }); p != nil {
				return p
			}
		}
	}
	if p := fits(func(m Match) bool { return slices.Contains(m.DMI, id.dmi) }); p != nil {
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
