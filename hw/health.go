package hw

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/anatol/smart.go"
)

// health reads what a disk says about itself, if that can be had without
// waking it. It may hang: the caller limits it.
func (p *prober) health(d Disk) (*Health, Power, notes) {
	var missing notes
	power := runtimePower(p.tree, d.Name)
	if power == PowerAsleep {
		missing.add("disks", NoteAsleep, d.Name, "asleep, so its health was not read; that would wake it")
		return nil, power, missing
	}
	switch d.Bus {
	case "emmc":
		return emmcHealth(p.tree, d.Name), power, missing
	case "nvme", "sata":
	case "usb":
		if d.Rotational {
			power = PowerUnknown
		}
		missing.add("disks", NoteUnsupported, d.Name, "health is not read through USB; whether the disk sleeps cannot be told there")
		return nil, power, missing
	default:
		return nil, power, missing
	}
	if !p.live() {
		return nil, PowerUnknown, missing
	}
	if p.user != 0 {
		missing.add("disks", NotePermission, d.Name, "not root, so its health (SMART) was not read; run with sudo to see it")
		return nil, PowerUnknown, missing
	}
	if d.Bus == "sata" && d.Rotational {
		spinning, err := ataSpinning("/dev/" + d.Name)
		switch {
		case err != nil:
			missing.add("disks", NoteUnsupported, d.Name, "its health was not read, because the disk does not say whether it sleeps: "+clean(err.Error()))
			return nil, PowerUnknown, missing
		case !spinning:
			missing.add("disks", NoteAsleep, d.Name, "asleep, so its health was not read; that would wake it")
			return nil, PowerAsleep, missing
		}
	}
	h, err := askDisk(d)
	if err != nil {
		code := NoteUnreadable
		if errors.Is(err, fs.ErrPermission) {
			code = NotePermission
		}
		missing.add("disks", code, d.Name, "its health could not be read: "+clean(err.Error()))
		return nil, power, missing
	}
	missing = append(missing, h.plausible(d.Name)...)
	return h, power, missing
}

// runtimePower is what the kernel's power management knows
// (Documentation/ABI/testing/sysfs-devices-power). A device without it is never suspended by it.
func runtimePower(t tree, name string) Power {
	switch t.word("sys/block/" + name + "/device/power/runtime_status") {
	case "suspended", "suspending", "resuming":
		return PowerAsleep
	default:
		return PowerAwake
	}
}

func askDisk(d Disk) (*Health, error) {
	if d.Bus == "nvme" {
		dev, err := smart.OpenNVMe("/dev/" + d.Name)
		if err != nil {
			return nil, err
		}
		defer dev.Close()
		log, err := dev.ReadSMART()
		if err != nil {
			return nil, err
		}
		return nvmeHealth(log), nil
	}
	dev, err := smart.OpenSata("/dev/" + d.Name)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	page, err := dev.ReadSMARTData()
	if err != nil {
		return nil, err
	}
	return ataHealth(page), nil
}

// nvmeWarnings are the bits of Critical Warning (NVM Express Base Specification 2.0, figure 207).
var nvmeWarnings = []string{
	"spare blocks are running out",
	"too hot or too cold",
	"reliability degraded by media errors",
	"has gone read-only",
	"the cache's backup power has failed",
	"persistent memory has become unreliable",
}

func nvmeHealth(l *smart.NvmeSMARTLog) *Health {
	h := &Health{
		Source:          "nvme",
		PowerOnHours:    low(l.PowerOnHours),
		PowerCycles:     low(l.PowerCycles),
		UnsafeShutdowns: low(l.UnsafeShutdowns),
		MediaErrors:     low(l.MediaErrors),
		Wear:            new(float64(l.PercentUsed)),
	}
	if l.Temperature != 0 { // Kelvin; 0 means not implemented
		h.Temperature = new(float64(l.Temperature) - 273)
	}
	for bit, text := range nvmeWarnings {
		if l.CritWarning&(1<<bit) != 0 {
			h.Warnings = append(h.Warnings, text)
		}
	}
	return h
}

// low takes a 128-bit counter that fits 64 bits; nil if it does not, which no real one does.
func low(v smart.Uint128) *uint64 {
	if v.Val[1] != 0 {
		return nil
	}
	return &v.Val[0]
}

// ataHealth picks the attributes whose meaning vendors agree on. Names and raw
// formats come from the library's copy of the smartmontools drive database.
func ataHealth(page *smart.AtaSmartPage) *Health {
	h := &Health{Source: "smart"}
	raw := func(id uint8) *uint64 {
		a, ok := page.Attrs[id]
		if !ok {
			return nil
		}
		return &a.ValueRaw
	}
	for _, id := range []uint8{194, 190} { // Temperature_Celsius, Airflow_Temperature_Cel
		if a, ok := page.Attrs[id]; ok && h.Temperature == nil {
			if t, _, _, _, err := a.ParseAsTemperature(); err == nil && t != 0 {
				h.Temperature = new(float64(t))
			}
		}
	}
	if a, ok := page.Attrs[9]; ok { // Power_On_Hours, of some in minutes or half minutes
		if t, err := a.ParseAsDuration(); err == nil {
			h.PowerOnHours = new(uint64(t / time.Hour))
		} else {
			// Some pack minutes into the upper bytes; the lower four are hours.
			h.PowerOnHours = new(a.ValueRaw & 0xffffffff)
		}
	}
	h.PowerCycles = raw(12)
	// Reallocated_Sector_Ct and Current_Pending_Sector: some pack more into the upper bytes.
	for id, field := range map[uint8]**uint64{5: &h.Reallocated, 197: &h.Pending} {
		if v := raw(id); v != nil {
			*field = new(*v & 0xffffffff)
		}
	}
	return h
}

// emmcHealth reads the life time estimates of an eMMC (JESD84-B51, 7.4.88 and
// following): two memory types, in steps of 10% used, 0x0b for used up; and
// how much of the reserve is left. Nil if the card has none (before eMMC 5.0).
func emmcHealth(t tree, name string) *Health {
	h := &Health{Source: "emmc"}
	for s := range strings.FieldsSeq(t.word("sys/block/" + name + "/device/life_time")) {
		v, err := strconv.ParseUint(strings.TrimPrefix(s, "0x"), 16, 8)
		if err != nil || v == 0 || v > 0x0b {
			continue
		}
		if used := float64(v) * 10; h.Wear == nil || used > *h.Wear {
			h.Wear = &used
		}
	}
	switch t.word("sys/block/" + name + "/device/pre_eol_info") {
	case "0x02":
		h.Warnings = append(h.Warnings, "80% of the spare blocks are used")
	case "0x03":
		h.Warnings = append(h.Warnings, "90% of the spare blocks are used")
	}
	if h.Wear == nil && h.Warnings == nil {
		return nil
	}
	return h
}

// plausible drops what no disk can mean.
func (h *Health) plausible(name string) notes {
	var missing notes
	drop := func(what string, value any) {
		missing.add("disks", NoteImplausible, name, fmt.Sprintf("says %s %v, which is not plausible and was dropped", what, value))
	}
	if h.Temperature != nil && !plausible(Temperature, *h.Temperature) {
		drop("temperature", *h.Temperature)
		h.Temperature = nil
	}
	const century = 100 * 365 * 24
	if h.PowerOnHours != nil && *h.PowerOnHours > century {
		drop("power-on hours", *h.PowerOnHours)
		h.PowerOnHours = nil
	}
	return missing
}
