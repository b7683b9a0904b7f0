package health

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/wire"
)

// diskKinds are those whose subject is a disk of the inventory, but for DiskGone.
var diskKinds = []Code{DiskFailing, DiskWearing, DiskSlow, DiskHung, DiskErrors, DiskCable, Overheating, UnsafeShutdown}

// Subject is what a disk is called in warnings and in the memory: its serial
// number, else its world wide name, else its kernel name, which may be another's
// after a restart.
func Subject(d hw.Disk) string {
	return cmp.Or(label(d.Serial, 64), label(d.WWN, 64), label(d.Name, 64))
}

// subjects names the disks of an inventory. Cheap bridges all have the same
// serial number: such disks go by their kernel names, and are not missed.
func subjects(inv *hw.Inventory) (bySubject map[string]hw.Disk, sure map[string]bool) {
	count := map[string]int{}
	for _, d := range inv.Disks {
		count[Subject(d)]++
	}
	bySubject, sure = map[string]hw.Disk{}, map[string]bool{}
	for _, d := range inv.Disks {
		s := Subject(d)
		if count[s] > 1 {
			s = label(d.Name, 64)
		}
		if s == "" || len(bySubject) >= maxDisks {
			continue
		}
		bySubject[s] = d
		sure[s] = count[s] == 1 && s != label(d.Name, 64)
	}
	return bySubject, sure
}

// title is a disk for people.
func title(subject, name, model string) string {
	var more []string
	if model = label(model, 64); model != "" {
		more = append(more, model)
	}
	if subject != name {
		more = append(more, "serial "+subject)
	}
	if len(more) == 0 {
		return "the disk " + name
	}
	return fmt.Sprintf("the disk %s (%s)", name, strings.Join(more, ", "))
}

// How long what has gone stays in mind, in hours.
const (
	forgetDisk   = 7 * day
	forgetHolder = 30 * day // that held one of the paths
	badWindow    = 30 * day // since a counter of bad sectors has grown
	cableWindow  = day
)

func (m *Machine) disks(inv *hw.Inventory) {
	there, sure := subjects(inv)
	complete := len(inv.Disks) > 0 && !noted(inv, "disks", "")
	holds := m.holders(inv)
	m.named = map[string]string{}
	for _, s := range slices.Sorted(maps.Keys(there)) {
		d := there[s]
		name := label(d.Name, 32)
		m.named[d.Name] = s
		mem := m.mem.Disks[s]
		if mem == nil {
			m.mem.room()
			mem = &diskMemory{}
			m.mem.Disks[s] = mem
			m.unsaved = true
		}
		mem.Name, mem.Model, mem.Bus, mem.Rotational = name, label(d.Model, 64), label(d.Bus, 16), d.Rotational
		mem.Seen, mem.Gone, mem.Holds = m.run(), 0, holds[d.Name]
		mem.Fixed = sure[s] && (!d.Removable && d.Bus != "usb" || len(mem.Holds) > 0)
		live := m.live[s]
		if live == nil {
			live = &liveDisk{}
			m.live[s] = live
		}
		live.sampled, live.absent = false, 0
		m.r.Clear(DiskGone, s)
		live.probeHung = hungIn(inv, d.Name)
		m.hung(s, mem, live)
		if d.Health != nil {
			m.diskHealth(s, mem, live, d)
		}
	}
	m.missing(inv, there, complete)
	m.tidy(there, complete)
	m.alias(inv)
}

// holders says which disk each of the paths is on, by kernel name.
func (m *Machine) holders(inv *hw.Inventory) map[string][]string {
	holds := map[string][]string{}
	for _, p := range m.paths {
		if f, ok := filesystemOf(inv, p.real); ok && f.Disk != "" && len(holds[f.Disk]) < maxHolds {
			holds[f.Disk] = append(holds[f.Disk], p.Dir)
		}
	}
	return holds
}

// alias tells the registry which disk a path, a mount point or a kernel name is about.
func (m *Machine) alias(inv *hw.Inventory) {
	on := map[string]string{}
	for name, s := range m.named {
		on[name] = s
	}
	for _, d := range inv.Disks {
		for _, list := range append([][]string{d.Mounts}, mountsOf(d.Partitions)...) {
			for _, mount := range list {
				if s := m.named[d.Name]; s != "" {
					on[mount] = s
				}
			}
		}
	}
	for _, p := range m.paths {
		if f, ok := filesystemOf(inv, p.real); ok {
			if s := m.named[f.Disk]; s != "" {
				on[p.Dir] = s
			}
		}
	}
	for s, mem := range m.mem.Disks { // what was on a disk that is gone is still about it
		if mem.Gone > 0 {
			for _, dir := range mem.Holds {
				on[dir] = s
			}
		}
	}
	m.r.lie(on)
}

// missing judges the disks that are remembered and not there.
func (m *Machine) missing(inv *hw.Inventory, there map[string]hw.Disk, complete bool) {
	for _, d := range inv.Disks {
		if s := Subject(d); s != m.named[d.Name] { // not the only one of that name: neither can be missed
			delete(m.mem.Disks, s)
			m.r.Clear(DiskGone, s)
		}
	}
	for s, mem := range m.mem.Disks {
		_, is := there[s]
		if is || !complete || noted(inv, "disks", mem.Name) {
			continue
		}
		m.lost(s, mem)
		limit := float64(forgetDisk)
		if len(mem.Holds) > 0 {
			limit = forgetHolder
		}
		if m.run()-mem.Gone > limit || !mem.Fixed && m.run()-mem.Seen > limit {
			delete(m.mem.Disks, s)
			m.r.Clear(DiskGone, s)
		}
	}
}

func (m *Machine) lost(s string, mem *diskMemory) {
	if !mem.Fixed {
		return
	}
	if mem.Gone == 0 {
		mem.Gone, m.unsaved = max(m.run(), 1e-9), true
	}
	detail, severity := title(s, mem.Name, mem.Model)+" was there and is not any more", wire.Trouble
	if len(mem.Holds) > 0 {
		detail, severity = detail+"; on it was "+strings.Join(mem.Holds, ", "), wire.Critical
	}
	m.r.set(DiskGone, s, detail, severity)
}

// tidy ends what is said of disks that are not there.
func (m *Machine) tidy(there map[string]hw.Disk, complete bool) {
	if !complete {
		return
	}
	for s := range m.live {
		if _, is := there[s]; is {
			continue
		}
		delete(m.live, s)
		if mem := m.mem.Disks[s]; mem != nil && mem.Gone > 0 {
			continue // hidden by DiskGone; as it was, if the disk returns
		}
		for _, c := range diskKinds {
			m.r.forget(c, s)
			delete(m.row, key{c, s})
		}
	}
}

func hungIn(inv *hw.Inventory, name string) bool {
	return slices.ContainsFunc(inv.Notes, func(n hw.Note) bool {
		return n.Section == "disks" && n.Code == hw.NoteTimeout && slices.Contains(n.Subjects, name)
	})
}

func (m *Machine) hung(s string, mem *diskMemory, live *liveDisk) {
	if !live.probeHung && !live.ioHung {
		m.r.Clear(DiskHung, s)
		return
	}
	what := "a request to it does not end"
	if live.probeHung {
		what = "it did not answer in time when it was asked"
	}
	m.r.Set(DiskHung, s, title(s, mem.Name, mem.Model)+": "+what)
}

// diskHealth judges what a disk says about itself.
func (m *Machine) diskHealth(s string, mem *diskMemory, live *liveDisk, d hw.Disk) {
	h, what := d.Health, title(s, mem.Name, d.Model)
	m.failing(s, what, mem, d)
	m.wearing(s, what, mem, h)
	if c := h.CRCErrors; c != nil && *c <= math.MaxUint32 {
		mem.CRC.observe(*c, m.run(), cableWindow, false)
		m.judge(DiskCable, s, is(mem.CRC.Grew >= 10), 1, "", fmt.Sprintf("%s has counted %d damaged transfers of late", what, mem.CRC.Grew))
	}
	if c := h.UnsafeShutdowns; c != nil && *c <= math.MaxUint32 {
		mem.Unsafe.observe(*c, m.run(), day, false)
		// The marker tells the same, for all.
		_, told := m.mem.Events[string(UnsafeShutdown)]
		m.r.Is(UnsafeShutdown, s, mem.Unsafe.Grew > 0 && !told, what+" has lost its power without notice")
	}
	m.diskHeat(s, what, d)
}

const tooHot = "too hot" // in hw.Health.Warnings, of NVMe disks that are too hot or too cold

func (m *Machine) diskHeat(s, what string, d hw.Disk) {
	warm := float64(ssdWarm)
	if d.Rotational {
		warm = spindleWarm
	}
	says := slices.ContainsFunc(d.Health.Warnings, func(w string) bool { return strings.Contains(w, tooHot) })
	t := d.Health.Temperature
	switch {
	case says:
		m.judge(Overheating, s, yes, diskHotInRow, "", what+" says that it is too hot or too cold")
	case d.Bus == "nvme" && d.Health.Warnings == nil: // knows its limit itself
		m.judge(Overheating, s, no, diskHotInRow, "", "")
	case t != nil && *t > -100 && *t < 200:
		m.hot(s, what, *t, warm, 0, diskHotInRow)
	}
}

// Sectors are counted in 512 bytes; a bad spot of a modern disk is 8 of them.
const manyBad = 16

func (m *Machine) failing(s, what string, mem *diskMemory, d hw.Disk) {
	h := d.Health
	sectors := max(d.Size/512, 1)
	var grew uint64
	known := h.Passed != nil
	for _, c := range []struct {
		value *uint64
		mem   *counter
		most  uint64
	}{
		{h.Reallocated, &mem.Reallocated, sectors}, {h.Pending, &mem.Pending, sectors}, {h.MediaErrors, &mem.Media, math.MaxUint32},
	} {
		if c.value != nil && *c.value <= c.most {
			known = true
			c.mem.observe(*c.value, m.run(), badWindow, c.mem == &mem.Pending)
			grew += c.mem.Grew
		}
	}
	own := slices.DeleteFunc(slices.Clone(h.Warnings), func(w string) bool {
		return strings.Contains(w, tooHot) || strings.Contains(w, "spare")
	})
	pending := h.Pending != nil && *h.Pending > 0 && *h.Pending <= sectors
	onlyOther := len(h.Warnings) > 0 && len(own) == 0 // hot or worn, which has its own warning
	switch {
	case h.Passed != nil && !*h.Passed && !onlyOther || len(own) > 0:
		detail := "expects to fail soon"
		if len(own) > 0 {
			detail = "says: " + strings.Join(own, ", ")
		}
		m.judge(DiskFailing, s, yes, 1, wire.Critical, what+" "+detail)
	case grew >= manyBad:
		m.judge(DiskFailing, s, yes, 1, wire.Critical, fmt.Sprintf("%s has found %d more bad sectors or errors within a month", what, grew))
	case grew > 0:
		m.judge(DiskFailing, s, yes, 1, wire.Trouble, fmt.Sprintf("%s has found %d more bad sectors or errors within a month", what, grew))
	case pending:
		m.judge(DiskFailing, s, yes, 2, wire.Trouble, fmt.Sprintf("%s cannot read %d of its sectors", what, *h.Pending))
	case known:
		m.judge(DiskFailing, s, no, 2, "", "")
	}
}

// A disk is worn from so much of its rated life on, or so little spare, in
// percent, or if its life ends within so many days.
const (
	wornHigh, wornLow   = 90, 88
	spareLow, spareGood = 10, 12
	forecastDays        = 180
	forecastBack        = 220
)

func (m *Machine) wearing(s, what string, mem *diskMemory, h *hw.Health) {
	var votes []verdict
	detail, severity := "", wire.Trouble
	if w := h.Wear; w != nil && *w >= 0 && *w <= 255 {
		now := edge{Run: m.run(), Wear: *w}
		if h.PowerOnHours != nil && *h.PowerOnHours < maxRun {
			now.Hours = float64(*h.PowerOnHours)
		}
		if h.WrittenBytes != nil && float64(*h.WrittenBytes) < 1e21 {
			now.Written = float64(*h.WrittenBytes)
		}
		mem.Wear.observe(now)
		votes = append(votes, over(*w, wornHigh, wornLow))
		if hours, ok := mem.Wear.remaining(now); ok {
			v := unknown
			switch days := hours / 24; {
			case days <= forecastDays:
				v = yes
			case days > forecastBack:
				v = no
			}
			votes = append(votes, v)
			detail = fmt.Sprintf("%s has used %.0f%% of its rated life; written to as of late, it ends %s", what, *w, inDays(hours/24))
		}
		if *w >= wornHigh {
			detail = fmt.Sprintf("%s has used %.0f%% of its rated life", what, *w)
		}
		if *w >= 100 {
			severity = wire.Critical
		}
	}
	if sp := h.Spare; sp != nil && *sp >= 0 && *sp <= 100 {
		v := unknown
		switch {
		case *sp <= spareLow:
			v, detail = yes, fmt.Sprintf("%s has %.0f%% of its spare blocks left", what, *sp)
		case *sp >= spareGood:
			v = no
		}
		votes = append(votes, v)
	}
	if i := slices.IndexFunc(h.Warnings, func(w string) bool { return strings.Contains(w, "spare") }); i >= 0 {
		votes, detail = append(votes, yes), what+" says: "+h.Warnings[i]
	}
	if len(votes) > 0 {
		m.judge(DiskWearing, s, max3(votes...), 2, severity, detail)
	}
}

func inDays(days float64) string {
	switch {
	case days < 1:
		return "now"
	case days < 60:
		return fmt.Sprintf("in about %.0f days", days)
	}
	return fmt.Sprintf("in about %.0f months", days/30.4)
}

// A request is slow if it takes slowTimes as long as usual, and longer than
// what is normal for its sort of disk under load.
const (
	slowTimes   = 8
	slowInARow  = 5       // samples
	fineTimes   = 4       // below so many times it is fine again
	busyShare   = 0.25    // of the most that it moves: at work, not ill
	busyBytes   = 4 << 20 // bytes a second, at least, for the same
	bestKept    = 0.99999
	maxRate     = 1e11 // bytes a second; faster is a mistake
	hungInARow  = 30 * time.Second
	goneInARow  = 3 // samples
	errorsShown = 24 * time.Hour
)

// slowFloor is in ms. SD cards and sticks stop for garbage collection now and then.
func slowFloor(mem *diskMemory) float64 {
	switch {
	case mem.Rotational:
		return 300
	case mem.Bus == "sd" || mem.Bus == "usb":
		return 500
	case mem.Bus == "emmc":
		return 150
	}
	return 50
}

// diskUse judges what the kernel counts of each disk.
func (m *Machine) diskUse(t hw.Telemetry, now time.Time, passed time.Duration) {
	for name, use := range t.Disks {
		s := m.named[name]
		mem, live := m.mem.Disks[s], m.live[s]
		if mem == nil || live == nil {
			continue
		}
		live.sampled, live.absent = true, 0
		moved, known := live.moved(use)
		m.slow(s, mem, live, use, moved, passed)
		live.io(use, known && moved == 0, now)
		m.hung(s, mem, live)
		m.errors(s, mem, live, use.Errors, now)
	}
	if len(t.Disks) == 0 {
		return
	}
	for name, s := range m.named {
		mem, live := m.mem.Disks[s], m.live[s]
		if _, is := t.Disks[name]; is || mem == nil || live == nil || !live.sampled {
			continue
		}
		if live.absent++; live.absent >= goneInARow {
			m.lost(s, mem)
		}
	}
}

// moved is how many bytes went since the sample before; not known for the
// first, and when the counters have begun anew.
func (l *liveDisk) moved(use hw.DiskUse) (uint64, bool) {
	sum := use.ReadBytes + use.WrittenBytes
	before := l.bytes
	l.bytes = &sum
	if before == nil || sum < *before {
		return 0, false
	}
	return sum - *before, true
}

// latency is believed from nanoseconds to hours.
func latency(ms *float64) (float64, bool) {
	if ms == nil || !(*ms > 1e-6 && *ms < 1e7) {
		return 0, false
	}
	return *ms, true
}

// slow judges reads, writes and flushes against what is usual for this disk.
func (m *Machine) slow(s string, mem *diskMemory, live *liveDisk, use hw.DiskUse, moved uint64, passed time.Duration) {
	busy := false
	if rate := float64(moved) / passed.Seconds(); passed > 0 && rate < maxRate {
		busy = rate >= busyBytes && rate >= busyShare*mem.Best
		// The best is approached, and by what two samples in a row have: one odd reading does not make it.
		sure := min(rate, live.rate)
		mem.Best = max(mem.Best*bestKept, mem.Best+0.2*max(0, sure-mem.Best))
		live.rate = rate
	}
	detail, worst, known := "", 0.0, false
	for i, op := range []struct {
		name  string
		ms    *float64
		usual *usual
	}{{"reads", use.ReadMS, &mem.Read}, {"writes", use.WriteMS, &mem.Write}, {"flushes", use.FlushMS, &mem.Flush}} {
		ms, ok := latency(op.ms)
		if !ok {
			continue
		}
		if op.usual.N >= learnJudge {
			times := ms / op.usual.ms()
			known = true
			live.slow[i].add(slowness(times, ms, slowFloor(mem), busy))
			if live.slow[i].so && times > worst {
				detail, worst = fmt.Sprintf("%s take %.0f ms, usually %.1f ms", op.name, ms, op.usual.ms()), times
			}
		}
		op.usual.learn(ms)
	}
	switch slow := slices.ContainsFunc(live.slow[:], func(r row) bool { return r.so }); {
	case slow && detail != "":
		m.r.Set(DiskSlow, s, title(s, mem.Name, mem.Model)+": "+detail)
	case known && !slow:
		m.r.Clear(DiskSlow, s)
	}
}

// slowness judges one sample that took so many times as long as usual.
func slowness(times, ms, floor float64, busy bool) verdict {
	switch {
	case times < fineTimes || ms < floor/2:
		return no
	case times >= slowTimes && ms >= floor && !busy: // of a busy disk it says nothing: the requests stand in line
		return yes
	}
	return unknown
}

// row is a verdict that slowInARow samples have to agree on.
type row struct {
	so bool
	n  int // samples in a row that say the opposite
}

func (r *row) add(v verdict) {
	switch {
	case v == unknown:
	case (v == yes) == r.so:
		r.n = 0
	default:
		if r.n++; r.n >= slowInARow {
			r.so, r.n = !r.so, 0
		}
	}
}

// io judges whether requests end.
func (l *liveDisk) io(use hw.DiskUse, still bool, now time.Time) {
	switch {
	case use.InFlight == 0 || !still || use.ReadMS != nil || use.WriteMS != nil || use.FlushMS != nil:
		l.stuck, l.ioHung = time.Time{}, false
	case l.stuck.IsZero():
		l.stuck = now
	case now.Sub(l.stuck) >= hungInARow:
		l.ioHung = true
	}
}

// errors judges what the filesystems on a disk count, which stays over a restart:
// only what is added while we watch is new.
func (m *Machine) errors(s string, mem *diskMemory, live *liveDisk, count *uint64, now time.Time) {
	if count == nil {
		return
	}
	if live.errors != nil && *count > *live.errors {
		live.errorAt = now
		m.r.Set(DiskErrors, s, fmt.Sprintf("%s: the filesystems on it have counted %d errors", title(s, mem.Name, mem.Model), *count))
	} else if !live.errorAt.IsZero() && now.Sub(live.errorAt) > errorsShown {
		live.errorAt = time.Time{}
		m.r.Clear(DiskErrors, s)
	}
	live.errors = count
}
