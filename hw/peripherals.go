package hw

import (
	"context"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"periph.io/x/conn/v3/driver/driverreg"
	"periph.io/x/conn/v3/i2c/i2creg"
	"periph.io/x/conn/v3/onewire/onewirereg"
	"periph.io/x/conn/v3/spi/spireg"
	"periph.io/x/host/v3/gpioioctl"
	_ "periph.io/x/host/v3/netlink" // 1-wire
	_ "periph.io/x/host/v3/sysfs"   // I²C, SPI
)

func (p *prober) leds(context.Context) (func(*Inventory), notes) {
	found := []LED{}
	for _, name := range p.list("sys/class/leds") {
		if keyboardLight.MatchString(name) {
			continue
		}
		dir := "sys/class/leds/" + name
		found = append(found, LED{
			Name:    clean(name),
			Trigger: activeTrigger(p.word(dir + "/trigger")),
			Level:   int(min(p.count(dir+"/brightness"), 1<<16)),
			Max:     int(min(p.count(dir+"/max_brightness"), 1<<16)),
		})
	}
	return func(inv *Inventory) { inv.LEDs = found }, nil
}

// keyboardLight is Caps Lock and the like: lights of what is plugged in, not of the machine.
var keyboardLight = regexp.MustCompile(`^input\d+::`)

// activeTrigger finds the one in brackets: "none [mmc0] timer".
func activeTrigger(s string) string {
	_, s, _ = strings.Cut(s, "[")
	s, _, ok := strings.Cut(s, "]")
	if !ok {
		return ""
	}
	return s
}

func (p *prober) buses(ctx context.Context) (func(*Inventory), notes) {
	var missing notes
	chips, buses := p.gpioChips(), append([]Bus{}, slices.Concat(p.i2cBuses(), p.spiPorts(), p.oneWireBuses())...)
	if p.live() {
		extra, err := within(ctx, p.limit, "periph", func() periphFound { return askPeriph(chips, buses) })
		if err != nil {
			missing.add("buses", NoteTimeout, "", "a bus "+err.Error())
		} else {
			chips, buses = extra.join(chips, buses)
		}
	}
	for _, c := range chips {
		missing.access("gpio", c.Name, c.Access)
	}
	for _, b := range buses {
		missing.access("buses", b.Name, b.Access)
	}
	return func(inv *Inventory) { inv.GPIO, inv.Buses = chips, buses }, missing
}

func (n *notes) access(section, name string, a Access) {
	switch a {
	case AccessDenied:
		n.add(section, NotePermission, name, "not allowed for this user; run with sudo, or add the user to the group that owns it in /dev")
	case AccessNoNode:
		text := "the kernel has it, but no file in /dev"
		if section == "buses" {
			text += "; load the module i2c-dev or spidev to use it"
		}
		n.add(section, NoteUnsupported, name, text)
	}
}

var numbered = regexp.MustCompile(`^(gpiochip|i2c-|w1_bus_master)\d+$`)

func (p *prober) gpioChips() []GPIOChip {
	found := []GPIOChip{}
	for _, name := range p.list("sys/bus/gpio/devices") {
		if numbered.MatchString(name) {
			found = append(found, GPIOChip{Name: name, Access: p.access("dev/" + name)})
		}
	}
	// The old interface, where it is still built, knows the label and number of
	// lines without opening anything; its numbers are not those of the chips.
	for _, old := range p.list("sys/class/gpio") {
		dir := "sys/class/gpio/" + old
		if !strings.HasPrefix(old, "gpiochip") {
			continue
		}
		at := p.device(dir + "/device")
		for i, c := range found {
			if at != "" && (at == p.device("sys/bus/gpio/devices/"+c.Name) || strings.HasPrefix(p.device("sys/bus/gpio/devices/"+c.Name), at+"/")) {
				found[i].Label = p.word(dir + "/label")
				found[i].Lines = int(min(p.count(dir+"/ngpio"), 1<<16))
			}
		}
	}
	return found
}

func (p *prober) i2cBuses() []Bus {
	var found []Bus
	for _, name := range p.list("sys/bus/i2c/devices") {
		if numbered.MatchString(name) { // others are devices on a bus
			found = append(found, Bus{
				Kind: "i2c", Name: "/dev/" + name, Label: p.word("sys/bus/i2c/devices/" + name + "/name"),
				Access: p.access("dev/" + name),
			})
		}
	}
	return found
}

func (p *prober) spiPorts() []Bus {
	var found []Bus
	for _, name := range p.list("sys/class/spidev") {
		found = append(found, Bus{Kind: "spi", Name: "/dev/" + clean(name), Access: p.access("dev/" + name)})
	}
	return found
}

func (p *prober) oneWireBuses() []Bus {
	var found []Bus
	for _, name := range p.list("sys/bus/w1/devices") {
		if !numbered.MatchString(name) {
			continue
		}
		b := Bus{Kind: "onewire", Name: name, Access: AccessOK}
		for _, d := range strings.Fields(p.word("sys/bus/w1/devices/" + name + "/w1_master_slaves")) {
			if d != "not" && d != "found." { // "not found." is the kernel's way to say none
				b.Devices = append(b.Devices, d)
			}
		}
		found = append(found, b)
	}
	return found
}

// periphFound is what periph can use.
type periphFound struct {
	chips []GPIOChip
	buses []Bus
}

// askPeriph registers periph's drivers, once in the life of the process, and
// lists what they found; periph keeps the GPIO chips open from then on. This is
// what host.Init of periph does, with only the drivers linked that go through
// the kernel; those of single boards map registers, which a probe must not. The
// GPIO driver prints to the log of the process if it may not open a chip, so it
// is not begun then.
func askPeriph(chips []GPIOChip, buses []Bus) periphFound {
	var f periphFound
	if len(chips)+len(buses) == 0 || slices.ContainsFunc(chips, func(c GPIOChip) bool { return c.Access == AccessDenied }) {
		return f
	}
	// A driver that fails, such as SPI on a board without, says only that there
	// is nothing for it; what the kernel has stands in sysfs anyway.
	_, _ = driverreg.Init()
	for _, c := range gpioioctl.Chips {
		f.chips = append(f.chips, GPIOChip{Name: clean(c.Name()), Label: clean(c.Label()), Lines: c.LineCount(), Access: AccessOK})
	}
	for _, r := range i2creg.All() {
		f.buses = append(f.buses, Bus{Kind: "i2c", Name: clean(r.Name), Access: AccessOK})
	}
	for _, r := range spireg.All() {
		f.buses = append(f.buses, Bus{Kind: "spi", Name: clean(r.Name), Access: AccessOK})
	}
	for _, r := range onewirereg.All() {
		// "netlink-w1-master 1" is the kernel's w1_bus_master1.
		name := r.Name
		if r.Number >= 0 {
			name = "w1_bus_master" + strconv.Itoa(r.Number)
		}
		f.buses = append(f.buses, Bus{Kind: "onewire", Name: clean(name), Access: AccessOK})
	}
	return f
}

// join adds what periph knows beyond sysfs: labels and lines of GPIO chips, and
// buses that are in no class of sysfs.
func (f periphFound) join(chips []GPIOChip, buses []Bus) ([]GPIOChip, []Bus) {
	for _, c := range f.chips {
		if i := slices.IndexFunc(chips, func(x GPIOChip) bool { return x.Name == c.Name }); i >= 0 {
			chips[i].Label, chips[i].Lines = c.Label, c.Lines
		} else {
			chips = append(chips, c)
		}
	}
	for _, b := range f.buses {
		if !slices.ContainsFunc(buses, func(x Bus) bool { return x.Name == b.Name }) {
			buses = append(buses, b)
		}
	}
	return chips, buses
}
