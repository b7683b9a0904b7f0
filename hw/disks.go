package hw

import (
	"context"
	"fmt"
	"math"
	"regexp"
	"strings"
	"sync"
)

// diskReaders bounds how many disks are read at once: enough that a few hung
// ones do not hold up the others.
const diskReaders = 32

func (p *prober) disks(ctx context.Context) (func(*Inventory), notes) {
	names := p.list("sys/block")
	type found struct {
		disk    Disk
		missing notes
		ok      bool
	}
	all := make([]found, len(names))
	free := make(chan struct{}, diskReaders)
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			d, missing, ok := p.disk(ctx, name)
			all[i] = found{d, missing, ok}
		})
	}
	wg.Wait()

	disks, missing := []Disk{}, notes{}
	for _, f := range all {
		if f.ok {
			disks = append(disks, f.disk)
		}
		missing = append(missing, f.missing...)
	}
	return func(inv *Inventory) { inv.Disks = disks }, missing
}

// mmcExtra are the small hardware partitions of an eMMC, which Linux shows as disks.
var mmcExtra = regexp.MustCompile(`^mmcblk\d+(boot\d+|rpmb|gp\d+)$`)

// isDisk tells disks from loop devices, RAM disks, LVM and the like, which have
// no device behind them, and from drives without a disk in them.
func isDisk(t tree, name string) bool {
	dir := "sys/block/" + name
	switch {
	case !t.exists(dir + "/device"), mmcExtra.MatchString(name), strings.HasPrefix(name, "sr"), strings.HasPrefix(name, "fd"):
		return false
	case t.flag(dir + "/hidden"): // a path of an NVMe multipath disk
		return false
	}
	return true
}

// disk reads one disk: first what the kernel knows, then, if it is awake, what
// the disk says. Either may hang without hurting the other. It is false for
// what is no disk.
func (p *prober) disk(ctx context.Context, name string) (Disk, notes, bool) {
	type facts struct {
		disk    Disk
		missing notes
		ok      bool
	}
	var missing notes
	f, err := within(ctx, p.limit, p.root+" disk "+name, func() facts {
		if !isDisk(p.tree, name) {
			return facts{}
		}
		d, missing := readDisk(p.tree, name)
		return facts{d, missing, true}
	})
	if err != nil {
		missing.add("disks", NoteTimeout, name, err.Error())
	}
	if !f.ok {
		return Disk{}, missing, false
	}
	type answer struct {
		disk    Disk
		missing notes
	}
	d, missing := f.disk, f.missing
	a, err := within(ctx, p.limit, p.root+" health "+name, func() answer {
		d := d
		if d.Bridge != nil {
			d.Bridge = new(*d.Bridge) // shared with nobody if it hangs
		}
		missing := p.health(&d)
		return answer{d, missing}
	})
	if err != nil {
		d.Power = PowerUnknown
		missing.add("disks", NoteTimeout, name, "asked for its health, it "+err.Error())
		return d, missing, true
	}
	return a.disk, append(missing, a.missing...), true
}

func readDisk(t tree, name string) (Disk, notes) {
	dir := "sys/block/" + name
	var missing notes
	d := Disk{
		Name: name,
		Bus:  busOf(t, name),
		Model: firstOf(clean(t.word(dir+"/device/vendor")+" "+t.word(dir+"/device/model")),
			t.word(dir+"/device/name")),
		Serial:   firstOf(t.word(dir+"/serial"), t.word(dir+"/device/serial"), unitSerial(t, dir)),
		Firmware: firstOf(t.word(dir+"/device/firmware_rev"), t.word(dir+"/device/fwrev"), t.word(dir+"/device/rev")),
		WWN:      firstOf(t.word(dir+"/wwid"), t.word(dir+"/device/wwid")),

		LogicalBlock:  t.count(dir + "/queue/logical_block_size"),
		PhysicalBlock: t.count(dir + "/queue/physical_block_size"),
		Rotational:    t.flag(dir + "/queue/rotational"),
		Removable:     t.flag(dir + "/removable"),
		ReadOnly:      t.flag(dir + "/ro"),
		dev:           t.word(dir + "/dev"),
	}
	// A virtio or ATA disk has a PCI vendor number or the word "ATA" where a SCSI disk has its maker.
	d.Model = strings.TrimPrefix(d.Model, "ATA ")
	if d.Bus == "virtio" {
		d.Model = ""
	}
	if d.Bus == "usb" {
		d.Bridge = bridgeOf(t, name)
	}
	size, err := sectors(t, dir+"/size")
	if err != nil {
		missing.add("disks", NoteImplausible, name, "its size could not be read: "+clean(err.Error()))
	}
	d.Size = size
	for _, part := range t.list(dir) {
		sub := dir + "/" + part
		if !strings.HasPrefix(part, name) || !t.exists(sub+"/partition") {
			continue
		}
		size, err := sectors(t, sub+"/size")
		if err != nil {
			missing.add("disks", NoteImplausible, part, "its size could not be read: "+clean(err.Error()))
		}
		d.Partitions = append(d.Partitions, Partition{Name: part, Size: size, dev: t.word(sub + "/dev")})
	}
	return d, missing
}

func firstOf(candidates ...string) string {
	for _, c := range candidates {
		if c != "" {
			return c
		}
	}
	return ""
}

// sectors reads a size. The kernel counts 512 bytes a sector here, whatever the disk's own sectors are.
func sectors(t tree, name string) (uint64, error) {
	n, err := t.integer(name)
	if err != nil {
		return 0, err
	}
	if n < 0 || n > math.MaxInt64/512 {
		return 0, fmt.Errorf("%d sectors is not plausible", n)
	}
	return uint64(n) * 512, nil
}

// unitSerial reads a SCSI or ATA disk's serial number from page 80h of its
// vital product data: four bytes of header, then text (SPC-4, 7.8.15).
func unitSerial(t tree, dir string) string {
	raw, err := t.bytes(dir + "/device/vpd_pg80")
	if err != nil || len(raw) <= 4 || raw[1] != 0x80 {
		return ""
	}
	return clean(string(raw[4:]))
}

// busOf tells how a disk is attached, from its place in the device tree of the kernel.
func busOf(t tree, name string) string {
	at := t.device("sys/block/" + name)
	for _, b := range []struct{ part, bus string }{
		{"/usb", "usb"}, {"/nvme", "nvme"}, {"/ata", "sata"}, {"/virtio", "virtio"},
		{"/mmc_host/", "sd"}, {"/vbd-", "xen"}, {"/host", "scsi"},
	} {
		if !strings.Contains(at, b.part) {
			continue
		}
		if b.bus == "sd" && t.word("sys/block/"+name+"/device/type") == "MMC" {
			return "emmc"
		}
		return b.bus
	}
	return "other"
}
