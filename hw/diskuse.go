package hw

import (
	"context"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// diskStat is a line of /proc/diskstats (Documentation/admin-guide/iostats.rst).
// Times are in ms. They and, on a 32-bit kernel, all else wrap at 2^32.
type diskStat struct {
	reads, readSectors, readMS    uint64 // columns 4, 6, 7
	writes, writeSectors, writeMS uint64 // 8, 10, 11
	inFlight                      uint64 // 12; goes up and down
	busyMS                        uint64 // 13
	flushes, flushMS              uint64 // 19, 20; since Linux 5.5, else 0
}

// parseDiskstats gives each device's line to take. What is not of the form is left out.
func parseDiskstats(raw []byte, take func(name string, s diskStat)) {
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		if len(f) < 14 {
			continue
		}
		ok := true
		column := func(n int) uint64 {
			if n > len(f) {
				return 0
			}
			v, err := strconv.ParseUint(f[n-1], 10, 64)
			ok = ok && err == nil
			return v
		}
		s := diskStat{
			reads: column(4), readSectors: column(6), readMS: column(7),
			writes: column(8), writeSectors: column(10), writeMS: column(11),
			inFlight: column(12), busyMS: column(13),
			flushes: column(19), flushMS: column(20),
		}
		// A line that cannot be is no disk's: 2^62 sectors are more than any has; a
		// request count below zero was seen on old kernels as a huge number.
		if ok && s.readSectors < 1<<54 && s.writeSectors < 1<<54 && s.inFlight < 1<<31 {
			take(f[2], s)
		}
	}
}

// lastStat is what the sample before saw of a disk.
type lastStat struct {
	stat diskStat
	id   uint64 // see diskID
	at   time.Time
}

// maxSampledDisks bounds how many disks a sample describes.
const maxSampledDisks = 1024

// disks reads what the disks did. No disk is touched: the kernel counts.
func (s *Sampler) disks(ctx context.Context, l *layout) map[string]DiskUse {
	p := s.prober
	raw, err := p.bytes("proc/diskstats")
	if err != nil {
		return nil
	}
	now := s.now()
	last := make(map[string]lastStat, len(s.stats))
	var found map[string]DiskUse
	parseDiskstats(raw, func(name string, stat diskStat) {
		d, ok := l.disk(p.tree, name)
		if !ok || len(found) >= maxSampledDisks {
			return
		}
		seen := lastStat{stat, diskID(p.tree, name), now}
		before, has := s.stats[name]
		use := DiskUse{ReadBytes: stat.readSectors * 512, WrittenBytes: stat.writeSectors * 512, InFlight: stat.inFlight}
		switch passed := now.Sub(before.at); {
		case !has || before.id != seen.id: // new, or another one under the same name
		case passed < minRate: // two that ask at once must not spoil each other's rates
			seen = before
		default:
			use.rates(stat, before.stat, passed)
		}
		last[name] = seen
		use.Errors, use.IOErrors = s.diskErrors(ctx, name, d)
		if found == nil {
			found = map[string]DiskUse{}
		}
		found[clean(name)] = use
	})
	s.stats = last
	return found
}

// minRate is the least time that a rate is taken over.
const minRate = 50 * time.Millisecond

// rates fills in what happened between two readings of the same disk. If any
// counter went back, the disk began anew, and none can be believed.
func (u *DiskUse) rates(now, before diskStat, passed time.Duration) {
	believable := true
	since := func(now, before uint64) uint64 {
		d, ok := counted(now, before)
		believable = believable && ok
		return d
	}
	reads, readMS := since(now.reads, before.reads), since(now.readMS, before.readMS)
	writes, writeMS := since(now.writes, before.writes), since(now.writeMS, before.writeMS)
	flushes, flushMS := since(now.flushes, before.flushes), since(now.flushMS, before.flushMS)
	busy := since(now.busyMS, before.busyMS)
	since(now.readSectors, before.readSectors)
	since(now.writeSectors, before.writeSectors)
	if !believable {
		return
	}
	u.ReadMS, u.WriteMS, u.FlushMS = mean(readMS, reads), mean(writeMS, writes), mean(flushMS, flushes)
	// The kernel counts in its own ticks, which may round a full interval up; much more than full cannot be.
	if percent := 100 * float64(busy) / float64(passed.Milliseconds()); percent <= 150 {
		u.Busy = new(min(percent, 100))
	}
}

// counted is how far a counter went on. It may have wrapped at 2^32, which is
// believed of one that stood near the end and now stands near the beginning.
func counted(now, before uint64) (uint64, bool) {
	const end, quarter = 1 << 32, 1 << 30
	switch {
	case now >= before:
		return now - before, true
	case before < end && before >= end-quarter && now < quarter:
		return now + end - before, true
	}
	return 0, false
}

// longestRequest is more than the kernel lets a request take with all its retries.
const longestRequest = time.Hour

// mean is nil without requests, and for a mean that cannot be.
func mean(ms, requests uint64) *float64 {
	if requests == 0 {
		return nil
	}
	m := float64(ms) / float64(requests)
	if m > float64(longestRequest.Milliseconds()) {
		return nil
	}
	return &m
}

// diskID changes if another disk comes under the same name: sysfs gives each
// directory that it makes a number of its own.
func diskID(t tree, name string) uint64 {
	st, err := os.Stat(t.path("sys/block/" + name))
	if err != nil {
		return 0
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return uint64(sys.Ino)
	}
	return 0
}

// knownDisk is a disk and where the kernel counts its errors.
type knownDisk struct {
	scsi string   // ioerr_cnt
	ext4 []string // errors_count of the filesystems on it
}

// diskErrors reads what the kernel counts; nil is what it does not count for
// this disk. The two are kept apart: scsi_complete in drivers/scsi/scsi_lib.c
// counts each command that brings sense data, as ATA commands with CK_COND
// always do (ata_scsi_qc_complete), those of a probe among them.
func (s *Sampler) diskErrors(ctx context.Context, name string, d knownDisk) (ext4, scsi *uint64) {
	if d.scsi == "" && len(d.ext4) == 0 {
		return nil, nil
	}
	type counts struct{ ext4, scsi *uint64 }
	p := s.prober
	n, err := within(ctx, p.limit, p.root+" errors "+name, func() (n counts) {
		if d.scsi != "" { // in hex, such as 0x1f (drivers/scsi/scsi_sysfs.c)
			if v, err := strconv.ParseUint(p.word(d.scsi), 0, 32); err == nil {
				n.scsi = new(v)
			}
		}
		for _, file := range d.ext4 {
			if v, err := p.integer(file); err == nil && v >= 0 {
				n.ext4 = new(value(n.ext4) + uint64(v))
			}
		}
		return n
	})
	if err != nil {
		return nil, nil
	}
	return n.ext4, n.scsi
}

// findDisk tells whether a name of diskstats is a disk of the inventory.
func findDisk(t tree, name string) (knownDisk, bool) {
	if strings.ContainsAny(name, "/.") || !isDisk(t, name) {
		return knownDisk{}, false
	}
	var d knownDisk
	if file := "sys/block/" + name + "/device/ioerr_cnt"; t.exists(file) {
		d.scsi = file
	}
	return d, true
}

// ext4Disks tells on which disk each mounted ext4 lies, and where its errors are counted.
func ext4Disks(t tree) map[string][]string {
	found := map[string][]string{}
	for _, name := range t.list("sys/fs/ext4") {
		file := "sys/fs/ext4/" + name + "/errors_count"
		if !t.exists(file) {
			continue
		}
		dev := t.word("sys/class/block/" + name + "/dev")
		below := firstOf(diskBelow(t, dev, 0), name)
		if t.exists("sys/class/block/" + below + "/partition") {
			below = path.Base(path.Dir(t.device("sys/class/block/" + below)))
		}
		found[below] = append(found[below], file)
	}
	return found
}
