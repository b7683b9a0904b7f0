package hw

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/anatol/smart.go"
)

// pages are what a disk says about itself, before it is understood. Those of
// a recorded machine are understood by the same code as those of a live disk.
type pages struct {
	nvme []byte // log page 02h, 512 bytes
	ata  *ataPages
}

// health reads what a disk says about itself, if that can be had without
// waking it. It may hang: the caller limits it. It fills in d.Power, d.Health, and
// whether the bridge passes ATA commands.
func (p *prober) health(d *Disk) notes {
	var missing notes
	d.Power = runtimePower(p.tree, d.Name)
	if d.Power == PowerAsleep {
		missing.add("disks", NoteAsleep, d.Name, asleep)
		return missing
	}
	var raw pages
	switch d.Bus {
	case "emmc":
		d.Health = emmcHealth(p.tree, d.Name)
		return missing
	case "nvme", "sata", "usb":
		if p.ask != nil {
			raw, missing = p.askHealth(d)
		} else {
			raw, missing = p.recordedHealth(d)
		}
	default:
		return missing
	}
	p.seen.health(d.Name, raw)
	h, err := raw.health()
	if err != nil {
		missing.add("disks", NoteUnreadable, d.Name, "its health could not be read: "+clean(err.Error()))
	}
	if h != nil {
		missing = append(missing, h.plausible(d.Name)...)
		d.Health = h
	}
	return missing
}

const asleep = "asleep, so its health was not read; that would wake it"

// asking is all that opens a disk's device file, which may wake the disk.
type asking struct {
	spinning func(node string) (bool, error) // whether it is awake; wakes none that sleeps by itself
	pages    func(Disk) (pages, error)       // would wake it
}

// askHealth asks the disk itself, if it is known to be awake.
func (p *prober) askHealth(d *Disk) (pages, notes) {
	var missing notes
	stick := d.Bus == "usb" && d.Removable
	spinningMatters := d.Bus == "usb" || d.Rotational // what is behind a bridge does not always say that it spins
	switch {
	case stick:
		// Sticks and card readers have no health, and some cannot bear the question. udev
		// (60-persistent-storage.rules) sends ATA commands to the others too.
		return pages{}, missing
	case p.user != 0:
		d.Power = PowerUnknown
		missing.add("disks", NotePermission, d.Name, "not root, so its health (SMART) was not read; run with sudo to see it")
		return pages{}, missing
	case spinningMatters:
		spinning, err := p.ask.spinning("/dev/" + d.Name)
		switch {
		case err != nil:
			d.Power = PowerUnknown
			missing.add("disks", NoteUnsupported, d.Name, "its health was not read, because it does not say whether it sleeps: "+clean(err.Error()))
			return pages{}, missing
		case !spinning:
			d.Power = PowerAsleep
			missing.add("disks", NoteAsleep, d.Name, asleep)
		}
		if d.Bridge != nil {
			d.Bridge.SAT = true
		}
		if !spinning {
			return pages{}, missing
		}
	}
	raw, err := p.ask.pages(*d)
	if err != nil {
		code := NoteUnreadable
		if errors.Is(err, fs.ErrPermission) {
			code = NotePermission
		}
		missing.add("disks", code, d.Name, "its health could not be read: "+clean(err.Error()))
	}
	return raw, missing
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

func ataSpinning(node string) (bool, error) {
	d, err := openATA(node)
	if err != nil {
		return false, err
	}
	defer d.close()
	return d.spinning()
}

func askDisk(d Disk) (pages, error) {
	if d.Bus != "nvme" {
		ata, err := readATA("/dev/"+d.Name, d.Bus == "usb")
		return pages{ata: ata}, err
	}
	dev, err := smart.OpenNVMe("/dev/" + d.Name)
	if err != nil {
		return pages{}, err
	}
	defer dev.Close()
	log, err := dev.ReadSMART()
	if err != nil {
		return pages{}, err
	}
	raw, err := binary.Append(nil, binary.LittleEndian, log)
	return pages{nvme: raw}, err
}

// health understands what the disk says; nil if it said nothing.
func (p pages) health() (*Health, error) {
	switch {
	case p.ata != nil:
		return ataHealth(p.ata), nil
	case p.nvme == nil:
		return nil, nil
	}
	var log smart.NvmeSMARTLog
	if len(p.nvme) != nvmeLogSize {
		return nil, fmt.Errorf("the health log has %d bytes and not %d", len(p.nvme), nvmeLogSize)
	}
	if err := binary.Read(bytes.NewReader(p.nvme), binary.LittleEndian, &log); err != nil {
		return nil, err
	}
	return nvmeHealth(&log), nil
}

const nvmeLogSize = 512

// nvmeWarnings are the bits of Critical Warning (NVM Express Base Specification 2.0, figure 207).
var nvmeWarnings = []string{
	"spare blocks are running out",
	"too hot or too cold",
	"reliability degraded by media errors",
	"has gone read-only",
	"the cache's backup power has failed",
	"persistent memory has become unreliable",
}

// nvmeHot is the bit of Critical Warning that passes with the weather. The
// others say that the disk has failed in part, or is about to.
const nvmeHot = 1 << 1

// nvmeUnit is what data units are counted in: thousands of 512 bytes (figure 207).
const nvmeUnit = 1000 * 512

func nvmeHealth(l *smart.NvmeSMARTLog) *Health {
	h := &Health{
		Source:          "nvme",
		PowerOnHours:    low(l.PowerOnHours),
		PowerCycles:     low(l.PowerCycles),
		UnsafeShutdowns: low(l.UnsafeShutdowns),
		MediaErrors:     low(l.MediaErrors),
		Wear:            new(float64(l.PercentUsed)),
		Passed:          new(l.CritWarning&^nvmeHot == 0),
		WrittenBytes:    times(low(l.DataUnitsWritten), nvmeUnit),
	}
	if l.AvailSpare != 0 || l.SpareThresh != 0 { // none left, and none needed: not implemented
		h.Spare = new(float64(l.AvailSpare))
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

// times multiplies; nil if the product fits no counter, so that it is not believable.
func times(v *uint64, unit uint64) *uint64 {
	if v == nil || *v > math.MaxInt64/unit {
		return nil
	}
	return new(*v * unit)
}

// writtenUnits is what attribute 241, and 225 and 246 of some, counts in, by its
// name in the drive database. An unknown disk's is called Total_LBAs_Written
// there; an LBA is 512 bytes (as smartmontools takes it).
var writtenUnits = map[string]uint64{
	"Total_LBAs_Written": 512, "Host_Writes_32MiB": 32 << 20, "Host_Writes_GiB": 1 << 30, "Lifetime_Writes_GiB": 1 << 30,
	"Total_Writes_GiB": 1 << 30, "Total_Writes_GB": 1e9, "Lifetime_Wts_Frm_Hst_GB": 1e9, "Host_Writes_MiB": 1 << 20, "Total_Host_Sector_Write": 512,
}

// lifeLeft are attributes whose normalized value is percent of the rated life that is left,
// spareLeft those where it is of the spare blocks.
var (
	lifeLeft  = []string{"SSD_Life_Left", "Percent_Lifetime_Remain", "Remaining_Lifetime_Perc", "Media_Wearout_Indicator"}
	spareLeft = []string{"Available_Reservd_Space"}
)

// preFailure is the flag of an attribute that foretells failure when it falls
// to its threshold; that of others means that the disk is past its design's age.
const preFailure = 1 << 0

// ataHealth picks the attributes whose meaning vendors agree on, or that the
// library's copy of the smartmontools drive database names for this disk.
func ataHealth(page *ataPages) *Health {
	h := &Health{Source: "smart", Passed: page.Passed}
	attrs := map[uint8]smart.AtaSmartAttr{}
	for _, a := range page.Attributes {
		attrs[a.Id] = a
		h.named(a)
		h.threshold(a, page.Thresholds[a.Id])
	}
	raw := func(id uint8) *uint64 {
		a, ok := attrs[id]
		if !ok {
			return nil
		}
		return &a.ValueRaw
	}
	for _, id := range []uint8{194, 190} { // Temperature_Celsius, Airflow_Temperature_Cel
		if a, ok := attrs[id]; ok && h.Temperature == nil {
			if t, _, _, _, err := a.ParseAsTemperature(); err == nil && t != 0 {
				h.Temperature = new(float64(t))
			}
		}
	}
	if a, ok := attrs[9]; ok { // Power_On_Hours, of some in minutes or half minutes
		if t, err := a.ParseAsDuration(); err == nil {
			h.PowerOnHours = new(uint64(t / time.Hour))
		} else {
			// Some pack minutes into the upper bytes; the lower four are hours.
			h.PowerOnHours = new(a.ValueRaw & 0xffffffff)
		}
	}
	h.PowerCycles = raw(12)
	// Reallocated_Sector_Ct, Current_Pending_Sector, UDMA_CRC_Error_Count: some pack more into the upper bytes.
	for id, field := range map[uint8]**uint64{5: &h.Reallocated, 197: &h.Pending, 199: &h.CRCErrors} {
		if v := raw(id); v != nil {
			*field = new(*v & 0xffffffff)
		}
	}
	return h
}

// named takes what the name of an attribute tells.
func (h *Health) named(a smart.AtaSmartAttr) {
	if unit, ok := writtenUnits[a.Name]; ok && h.WrittenBytes == nil {
		h.WrittenBytes = times(&a.ValueRaw, unit)
	}
	if a.Current > 100 {
		return
	}
	if slices.Contains(lifeLeft, a.Name) {
		h.Wear = new(float64(100 - a.Current))
	}
	if slices.Contains(spareLeft, a.Name) {
		h.Spare = new(float64(a.Current))
	}
}

// threshold says so if an attribute has fallen to its threshold (ATA-5, 8.41.4: 0
// never is, 253 and more are no values). Of one that foretells failure that is the disk's verdict, if it gave no other.
func (h *Health) threshold(a smart.AtaSmartAttr, limit uint8) {
	if limit == 0 || a.Current == 0 || a.Current >= 253 || a.Current > limit {
		return
	}
	name := clean(strings.ReplaceAll(firstOf(a.Name, fmt.Sprintf("attribute %d", a.Id)), "_", " "))
	if a.Flags&preFailure == 0 {
		h.Warnings = append(h.Warnings, name+" is past what it was designed for")
		return
	}
	h.Warnings = append(h.Warnings, name+" says that it is failing now")
	if h.Passed == nil {
		h.Passed = new(false)
	}
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
	if h.Spare != nil && *h.Spare > 100 {
		drop("percent of spare blocks left", *h.Spare)
		h.Spare = nil
	}
	const exabyte = 1_000_000_000_000_000_000 // a disk of 30 TB, written over each day for a century
	if h.WrittenBytes != nil && *h.WrittenBytes > exabyte {
		drop("bytes written", *h.WrittenBytes)
		h.WrittenBytes = nil
	}
	return missing
}
