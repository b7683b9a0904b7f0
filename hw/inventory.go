package hw

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/board"
)

// Format is the version of the inventory's format. Fields may be added within
// a version; a field that changes its meaning makes a new one.
const Format = 1

// Inventory is what a machine has. A list is empty, never null, if nothing was
// found; a field is absent if it is not known.
type Inventory struct {
	Format      int          `json:"format"` // version of this format
	Taken       time.Time    `json:"taken"`  // when it was read, to the second
	Board       board.Board  `json:"board"`
	System      System       `json:"system"`
	CPU         CPU          `json:"cpu"`
	Memory      Memory       `json:"memory"`
	Disks       []Disk       `json:"disks"`
	Filesystems []Filesystem `json:"filesystems"`
	Network     []Interface  `json:"network"`
	Sensors     []Sensor     `json:"sensors"`
	Silent      []string     `json:"silent,omitempty"` // names of sensors that show nothing now: their device sleeps, or could not be read
	LEDs        []LED        `json:"leds"`
	GPIO        []GPIOChip   `json:"gpio"`
	Buses       []Bus        `json:"buses"`
	Clocks      []Clock      `json:"clocks"`
	TPMs        []TPM        `json:"tpms"`
	Watchdogs   []Watchdog   `json:"watchdogs"`
	Notes       []Note       `json:"notes"`
}

// System is the running system.
type System struct {
	OS     string  `json:"os"`                // the distribution's own name, such as "Debian GNU/Linux 12 (bookworm)"
	Kernel string  `json:"kernel"`            // release, such as "6.1.0-13-arm64"
	Arch   string  `json:"arch"`              // of the agent, as Go names it
	BootID string  `json:"boot_id"`           // the kernel's, new with each boot
	Uptime float64 `json:"uptime"`            // seconds since boot
	User   int     `json:"user"`              // numeric id that the probe ran as
	Root   string  `json:"machine,omitempty"` // directory of a recorded machine; absent for the live one
}

// CPU is the processor.
type CPU struct {
	Model  string   `json:"model"`   // "4 × Cortex-A55 + 4 × Cortex-A76" if cores differ
	Cores  int      `json:"cores"`   // logical processors that are online
	MaxMHz float64  `json:"max_mhz"` // 0 if the kernel does not say
	Crypto []string `json:"crypto"`  // of aes, clmul, sha1, sha2, sha512, sha3, crc32, rng: what it does in hardware
}

// Memory is in bytes.
type Memory struct {
	Total     uint64 `json:"total"`      // what the kernel manages, a little below what is built in
	Available uint64 `json:"available"`  // what programs can still take
	SwapTotal uint64 `json:"swap_total"` // bytes of swap, compressed memory included
	SwapFree  uint64 `json:"swap_free"`  // bytes of it that are free
}

// Power tells whether a disk may be asked questions.
type Power string

// The power states of a disk.
const (
	PowerAwake   Power = "awake"
	PowerAsleep  Power = "asleep"
	PowerUnknown Power = "unknown" // cannot be told without risking to wake it
)

// Disk is one physical (or virtual machine's) disk.
type Disk struct {
	Name          string      `json:"name"`                     // kernel name, may change with each boot
	Model         string      `json:"model,omitempty"`          // as the disk calls itself
	Serial        string      `json:"serial,omitempty"`         // of the disk; behind USB often the bridge's
	Firmware      string      `json:"firmware,omitempty"`       // version
	WWN           string      `json:"wwn,omitempty"`            // world wide name or NVMe namespace id
	Bus           string      `json:"bus"`                      // nvme, sata, usb, sd, emmc, virtio, scsi, xen, other
	Size          uint64      `json:"size"`                     // bytes
	LogicalBlock  uint64      `json:"logical_block,omitempty"`  // bytes; what it is addressed in
	PhysicalBlock uint64      `json:"physical_block,omitempty"` // bytes; what it really writes at once
	Rotational    bool        `json:"rotational"`               // has a spindle, as far as the kernel knows
	Removable     bool        `json:"removable"`                // the medium comes out, as in a card reader; USB sticks say so too
	ReadOnly      bool        `json:"read_only"`                // as the kernel has it
	System        bool        `json:"system"`                   // holds the filesystem that the machine runs from
	Bridge        *Bridge     `json:"bridge,omitempty"`         // of a disk behind USB
	Power         Power       `json:"power"`
	Mounts        []string    `json:"mounts,omitempty"` // of the disk itself, without a partition table
	Partitions    []Partition `json:"partitions,omitempty"`
	Health        *Health     `json:"health,omitempty"` // absent if it could not be read; a note says why

	dev string // major:minor
}

// Partition is a part of a disk.
type Partition struct {
	Name   string   `json:"name"` // kernel name
	Size   uint64   `json:"size"` // bytes
	Mounts []string `json:"mounts,omitempty"`

	dev string
}

// Bridge is what stands between USB and a disk.
type Bridge struct {
	ID     string `json:"id"`             // vendor and product, such as "152d:0578"
	Name   string `json:"name,omitempty"` // as it calls itself
	Driver string `json:"driver"`         // uas or usb-storage
	SAT    bool   `json:"sat"`            // it passes ATA commands on, so that health can be read
}

// Health is what a disk says about itself. A field is absent if the disk does not say.
type Health struct {
	Source          string   `json:"source"`                     // nvme, smart or emmc
	Temperature     *float64 `json:"temperature,omitempty"`      // °C
	PowerOnHours    *uint64  `json:"power_on_hours,omitempty"`   // hours that it was switched on
	PowerCycles     *uint64  `json:"power_cycles,omitempty"`     // times that it was switched on
	UnsafeShutdowns *uint64  `json:"unsafe_shutdowns,omitempty"` // power lost without a flush
	Wear            *float64 `json:"wear,omitempty"`             // percent of the rated life that is used, may pass 100
	Reallocated     *uint64  `json:"reallocated,omitempty"`      // sectors replaced by spares
	Pending         *uint64  `json:"pending,omitempty"`          // sectors that could not be read and wait for a rewrite
	MediaErrors     *uint64  `json:"media_errors,omitempty"`     // errors that its correction could not mend
	Passed          *bool    `json:"passed,omitempty"`           // false: the disk itself expects to fail within a day (SMART status; a critical warning of NVMe)
	Spare           *float64 `json:"spare,omitempty"`            // percent of the spare blocks that are left
	WrittenBytes    *uint64  `json:"written_bytes,omitempty"`    // by the host, over its life
	CRCErrors       *uint64  `json:"crc_errors,omitempty"`       // on the cable
	Warnings        []string `json:"warnings,omitempty"`         // the disk's own, in words
}

// Filesystem is a mounted filesystem on this machine's own storage.
type Filesystem struct {
	Mount    string `json:"mount"`           // the shortest of its mount points that show all of it
	Source   string `json:"source"`          // as mounted
	Disk     string `json:"disk,omitempty"`  // kernel name of the disk that it is on, the first of several
	Type     string `json:"type"`            // such as ext4
	ReadOnly bool   `json:"read_only"`       // in each of its mounts
	Total    uint64 `json:"total,omitempty"` // bytes
	Used     uint64 `json:"used,omitempty"`  // bytes
	Free     uint64 `json:"free,omitempty"`  // bytes that an ordinary user can still write

	path   string // Mount as the kernel has it
	dev    string
	below  []string // disks and partitions that it is made of, if there are layers between
	mounts []string
	whole  bool // Mount shows all of it, not one directory
}

// Path is where the filesystem is mounted, to be opened: Mount is made fit to be
// printed, and may differ. The path of an inventory that was not read here is
// its Mount.
func (f Filesystem) Path() string { return cmp.Or(f.path, f.Mount) }

// Interface is one network interface other than loopback.
type Interface struct {
	Name      string   `json:"name"`                 // such as eth0
	Kind      string   `json:"kind"`                 // ethernet, wifi, other; virtual if there is no device behind it
	MAC       string   `json:"mac,omitempty"`        // hardware address as it is now
	BurnedIn  bool     `json:"burned_in"`            // the MAC is the device's own, not drawn at random
	Up        bool     `json:"up"`                   // has a link
	SpeedMbps int      `json:"speed_mbps,omitempty"` // of the link, Mbit/s
	MTU       int      `json:"mtu,omitempty"`        // bytes of the largest packet
	Addresses []string `json:"addresses,omitempty"`  // CIDR
}

// SensorKind says what a sensor measures.
type SensorKind string

// The kinds of sensors, each with its unit.
const (
	Temperature SensorKind = "temperature" // °C
	Fan         SensorKind = "fan"         // rpm
	Voltage     SensorKind = "voltage"     // V
	Current     SensorKind = "current"     // A
	PowerDraw   SensorKind = "power"       // W
	Humidity    SensorKind = "humidity"    // %
	AirPressure SensorKind = "pressure"    // Pa, of air
	CO2         SensorKind = "co2"         // ppm
	Illuminance SensorKind = "illuminance" // lx
)

// Sensor is one measured value.
type Sensor struct {
	Name     string     `json:"name"` // chip and label, unique on this machine, the same after a reboot
	Kind     SensorKind `json:"kind"`
	Unit     string     `json:"unit"`               // of the values, by kind
	Value    float64    `json:"value"`              // as just read
	High     *float64   `json:"high,omitempty"`     // the device's own limit for concern
	Critical *float64   `json:"critical,omitempty"` // the device's own limit for shutting down
}

// LED is one light that the system can switch.
type LED struct {
	Name    string `json:"name"`              // below /sys/class/leds
	Use     string `json:"use,omitempty"`     // of the board's profile: status or power
	Trigger string `json:"trigger,omitempty"` // what the kernel drives it by, "none" if by hand
	Level   int    `json:"level"`             // 0 is dark
	Max     int    `json:"max"`               // brightest level
}

// Access tells whether this process may use a device.
type Access string

// From usable to not there.
const (
	AccessOK     Access = "ok"
	AccessDenied Access = "denied"  // exists, not for this user
	AccessNoNode Access = "no-node" // the kernel has it, but there is no file in /dev
)

// GPIOChip is one GPIO controller.
type GPIOChip struct {
	Name   string `json:"name"`            // gpiochip0
	Label  string `json:"label,omitempty"` // as its driver calls it
	Lines  int    `json:"lines,omitempty"` // how many it has
	Access Access `json:"access"`
}

// Bus is an I²C or 1-wire bus or a SPI chip select.
type Bus struct {
	Kind    string   `json:"kind"`            // i2c, spi, onewire
	Name    string   `json:"name"`            // /dev/i2c-1, /dev/spidev0.0, w1_bus_master1
	Label   string   `json:"label,omitempty"` // as its driver calls it
	Access  Access   `json:"access"`
	Devices []string `json:"devices,omitempty"` // 1-wire only: family and serial, as the kernel names them
}

// NoteCode is the reason of a note, for machines.
type NoteCode string

// The reasons why something is missing.
const (
	NotePermission  NoteCode = "permission"
	NoteTimeout     NoteCode = "timeout"
	NoteAsleep      NoteCode = "asleep"
	NoteImplausible NoteCode = "implausible"
	NoteUnreadable  NoteCode = "unreadable"
	NoteUnsupported NoteCode = "unsupported"
)

// Clock is a real-time clock, one that goes on without power if it has a battery.
type Clock struct {
	Name   string `json:"name"`           // rtc0
	Driver string `json:"driver"`         // as the kernel names it
	System bool   `json:"system"`         // the kernel set its time by it at boot
	Year   int    `json:"year,omitempty"` // that it shows; 1970 or 2000 on one whose battery is gone
}

// TPM is a trusted platform module.
type TPM struct {
	Name    string `json:"name"`    // tpm0
	Version int    `json:"version"` // 1 or 2, of the specification
	Access  Access `json:"access"`
}

// Watchdog resets the machine if nobody feeds it.
type Watchdog struct {
	Name      string `json:"name"`               // watchdog0
	Identity  string `json:"identity,omitempty"` // of its driver
	Timeout   int    `json:"timeout,omitempty"`  // seconds, as set now
	Active    bool   `json:"active"`             // somebody feeds it
	FiredLast bool   `json:"fired_last"`         // the last start of the machine was its doing
	Access    Access `json:"access"`
}

// Note says what is missing and why.
type Note struct {
	Section  string   `json:"section"` // as the inventory's field is named
	Code     NoteCode `json:"code"`
	Subjects []string `json:"subjects,omitempty"` // what it is about, such as "sda"
	Text     string   `json:"text"`               // what happened and what to do, for people
}

// Digest is the SHA-256, in hex, over what changes only if the machine, its
// system or its mounts change. Not in it: figures (free space, temperatures,
// uptime, speeds, levels), addresses, kernel names of disks that have a serial
// number, random MACs, notes, what depends on who asks (health, access, whether a
// bridge passes ATA commands), and what a watchdog or a clock shows.
// Memory counts in steps of 64 MiB, because kernels differ by a few pages from boot to boot.
func (inv *Inventory) Digest() string {
	raw, err := json.Marshal(inv.stable())
	if err != nil {
		panic("hw: the stable part is plain data: " + err.Error())
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

type stableDisk struct {
	Name, Model, Serial, Firmware, WWN, Bus string
	Size                                    uint64
	Rotational, Removable, System           bool
	Bridge                                  string
	Partitions                              []uint64
}

type stableInventory struct {
	Format  int
	Board   board.Board
	OS      string
	Kernel  string
	Arch    string
	CPU     CPU
	Memory  uint64 // steps
	Disks   []stableDisk
	Mounts  [][2]string // mount point, type
	Network [][3]string // name, kind, own MAC
	Sensors []string
	LEDs    []string
	GPIO    []string
	Buses   []string
	Clocks  [][2]string // name, driver
	TPMs    []string
	Dogs    [][2]string // name, identity
}

func (inv *Inventory) stable() stableInventory {
	const step = 64 << 20
	s := stableInventory{
		Format: inv.Format, Board: inv.Board,
		OS: inv.System.OS, Kernel: inv.System.Kernel, Arch: inv.System.Arch,
		CPU: inv.CPU, Memory: (inv.Memory.Total + step/2) / step,
	}
	for _, d := range inv.Disks {
		s.Disks = append(s.Disks, d.stable())
	}
	slices.SortFunc(s.Disks, func(a, b stableDisk) int {
		return cmp.Or(cmp.Compare(a.Serial, b.Serial), cmp.Compare(a.WWN, b.WWN),
			cmp.Compare(a.Name, b.Name), cmp.Compare(a.Model, b.Model), cmp.Compare(a.Size, b.Size))
	})
	for _, f := range inv.Filesystems {
		s.Mounts = append(s.Mounts, [2]string{f.Mount, f.Type})
	}
	for _, n := range inv.Network {
		if n.Kind == "virtual" { // containers come and go
			continue
		}
		mac := ""
		if n.BurnedIn {
			mac = n.MAC
		}
		s.Network = append(s.Network, [3]string{n.Name, n.Kind, mac})
	}
	for _, x := range inv.Sensors {
		s.Sensors = append(s.Sensors, x.Name)
	}
	s.Sensors = append(s.Sensors, inv.Silent...) // which ones show something depends on the moment
	slices.Sort(s.Sensors)
	for _, l := range inv.LEDs {
		s.LEDs = append(s.LEDs, l.Name)
	}
	for _, g := range inv.GPIO {
		s.GPIO = append(s.GPIO, g.Name)
	}
	for _, b := range inv.Buses {
		s.Buses = append(s.Buses, b.Name)
	}
	for _, c := range inv.Clocks {
		s.Clocks = append(s.Clocks, [2]string{c.Name, c.Driver})
	}
	for _, m := range inv.TPMs {
		s.TPMs = append(s.TPMs, fmt.Sprint(m.Name, " ", m.Version))
	}
	for _, w := range inv.Watchdogs {
		s.Dogs = append(s.Dogs, [2]string{w.Name, w.Identity})
	}
	return s
}

func (d Disk) stable() stableDisk {
	s := stableDisk{
		Model: d.Model, Serial: d.Serial, Firmware: d.Firmware, WWN: d.WWN, Bus: d.Bus,
		Size: d.Size, Rotational: d.Rotational, Removable: d.Removable, System: d.System,
	}
	if d.Bridge != nil {
		s.Bridge = d.Bridge.ID
	}
	if d.Serial == "" && d.WWN == "" {
		s.Name = d.Name
	}
	for _, p := range d.Partitions {
		s.Partitions = append(s.Partitions, p.Size)
	}
	return s
}

// notes collects what is missing; notes that differ in their subject only become one.
type notes []Note

func (n *notes) add(section string, code NoteCode, subject, text string) {
	var subjects []string
	if subject != "" {
		subjects = []string{clean(subject)}
	}
	*n = append(*n, Note{section, code, subjects, text})
}

func (n notes) merged() []Note {
	out := []Note{}
	for _, note := range n {
		i := slices.IndexFunc(out, func(o Note) bool {
			return o.Section == note.Section && o.Code == note.Code && o.Text == note.Text
		})
		if i < 0 {
			note.Subjects = slices.Clone(note.Subjects)
			out = append(out, note)
			continue
		}
		for _, s := range note.Subjects {
			if !slices.Contains(out[i].Subjects, s) {
				out[i].Subjects = append(out[i].Subjects, s)
			}
		}
	}
	return out
}
