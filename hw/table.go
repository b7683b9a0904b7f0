package hw

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// TableWidth is how many columns a line of the table has at most; narrower than
// minWidth no table can be read.
const (
	TableWidth = 100
	minWidth   = 60
)

// WriteTable writes the inventory for the owner of a machine: one section a
// subject, sizes as on the label (1 GB = 10⁹ bytes; memory in GiB, as memory is
// sold), no line longer than [TableWidth] columns, no colors.
func WriteTable(w io.Writer, inv *Inventory) error { return WriteTableIn(w, inv, TableWidth) }

// WriteTableIn is WriteTable for a terminal of that many columns.
func WriteTableIn(w io.Writer, inv *Inventory, columns int) error {
	t := &table{bufio.NewWriter(w), max(min(columns, TableWidth), minWidth)}
	t.head(inv)
	t.processor(inv)
	t.memory(inv)
	t.disks(inv)
	t.diskHealth(inv)
	t.filesystems(inv)
	t.network(inv)
	t.sensors(inv)
	t.lights(inv)
	t.pins(inv)
	t.keepers(inv)
	t.notes(inv)
	return t.w.Flush()
}

// table keeps its first error in w.
type table struct {
	w     *bufio.Writer
	width int
}

func (t *table) line(s string) { fmt.Fprintln(t.w, strings.TrimRight(cut(s, t.width), " ")) }

func (t *table) section(name string) {
	t.line("")
	t.line(name)
}

// field writes one named value, wrapped below itself.
func (t *table) field(name, value string) {
	const indent = 18
	for i, l := range wrap(value, t.width-indent) {
		if i > 0 {
			name = ""
		}
		t.line("  " + pad(name, indent-2) + l)
	}
}

// column is one column of rows; a wide one shrinks first when space is short.
type column struct {
	title string
	right bool // aligned right
	wide  bool
}

// rows writes aligned rows, or "none found".
func (t *table) rows(columns []column, rows [][]string) {
	if len(rows) == 0 {
		t.line("  none found")
		return
	}
	columns, rows = withoutEmpty(columns, rows)
	width := make([]int, len(columns))
	for i, c := range columns {
		width[i] = utf8.RuneCountInString(c.title)
		for _, r := range rows {
			width[i] = max(width[i], utf8.RuneCountInString(r[i]))
		}
	}
	shrink(columns, width, t.width-2-2*(len(columns)-1))
	write := func(cells []string) {
		parts := make([]string, len(cells))
		for i, cell := range cells {
			cell = cut(cell, width[i])
			if columns[i].right {
				parts[i] = strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)) + cell
			} else {
				parts[i] = pad(cell, width[i])
			}
		}
		t.line("  " + strings.Join(parts, "  "))
	}
	titles := make([]string, len(columns))
	for i, c := range columns {
		titles[i] = c.title
	}
	write(titles)
	for _, r := range rows {
		write(r)
	}
}

// withoutEmpty leaves out columns that no row fills.
func withoutEmpty(columns []column, rows [][]string) ([]column, [][]string) {
	var keep []int
	for i := range columns {
		if slices.ContainsFunc(rows, func(r []string) bool { return r[i] != "" }) {
			keep = append(keep, i)
		}
	}
	kept := make([]column, len(keep))
	for n, i := range keep {
		kept[n] = columns[i]
	}
	out := make([][]string, len(rows))
	for r, row := range rows {
		for _, i := range keep {
			out[r] = append(out[r], row[i])
		}
	}
	return kept, out
}

// shrink takes from the widest of the wide columns, then from the widest of
// all, until the sum fits.
func shrink(columns []column, width []int, limit int) {
	for sum(width) > limit {
		pick := -1
		for i := range width {
			if columns[i].wide && width[i] > 12 && (pick < 0 || width[i] > width[pick]) {
				pick = i
			}
		}
		if pick < 0 {
			pick = slices.Index(width, slices.Max(width))
		}
		width[pick]--
	}
}

func sum(list []int) int {
	n := 0
	for _, v := range list {
		n += v
	}
	return n
}

func (t *table) head(inv *Inventory) {
	name := firstOf(inv.Board.Model, inv.Board.Title, "This machine")
	stamp := inv.Taken.Format("2006-01-02 15:04 MST")
	gap := t.width - utf8.RuneCountInString(stamp)
	t.line(pad(cut(name, gap-2), gap) + stamp)
	parts := []string{inv.System.OS, "Linux " + inv.System.Kernel, inv.System.Arch}
	if inv.System.Uptime > 0 {
		parts = append(parts, "up "+duration(time.Duration(inv.System.Uptime)*time.Second))
	}
	for _, l := range wrap(strings.Join(parts, " · "), t.width) {
		t.line(l)
	}
	profile := "board profile " + firstOf(inv.Board.Name, "none")
	if inv.System.Root != "" {
		profile += " · recorded machine " + inv.System.Root
	}
	t.line(profile)
}

var cryptoTitles = map[string]string{
	"aes": "AES", "clmul": "carry-less multiply", "sha1": "SHA-1", "sha2": "SHA-2",
	"sha512": "SHA-512", "sha3": "SHA-3", "crc32": "CRC-32", "rng": "random numbers",
}

func (t *table) processor(inv *Inventory) {
	t.section("PROCESSOR")
	t.field("Model", firstOf(inv.CPU.Model, "unknown"))
	cores := plural(inv.CPU.Cores, "core")
	if inv.CPU.MaxMHz > 0 {
		cores += fmt.Sprintf(", up to %.1f GHz", inv.CPU.MaxMHz/1000)
	}
	t.field("Cores", cores)
	var crypto []string
	for _, c := range inv.CPU.Crypto {
		crypto = append(crypto, cryptoTitles[c])
	}
	t.field("In hardware", firstOf(strings.Join(crypto, ", "), "no cryptography; encryption and hashing will be slow"))
}

func (t *table) memory(inv *Inventory) {
	t.section("MEMORY")
	m := inv.Memory
	if m.Total == 0 {
		t.line("  unknown")
		return
	}
	t.field("Total", fmt.Sprintf("%s, %s available", memorySize(m.Total), memorySize(m.Available)))
	if m.SwapTotal > 0 {
		t.field("Swap", fmt.Sprintf("%s, %s free", memorySize(m.SwapTotal), memorySize(m.SwapFree)))
	}
}

var busTitles = map[string]string{
	"nvme": "NVMe", "sata": "SATA", "usb": "USB", "sd": "SD card", "emmc": "eMMC",
	"virtio": "virtual", "scsi": "SCSI", "xen": "virtual",
}

func (t *table) disks(inv *Inventory) {
	t.section("DISKS")
	var rows [][]string
	for _, d := range inv.Disks {
		rows = append(rows, []string{d.Name, DiskSize(d.Size), diskKind(d), d.Model, d.Serial, mountedAt(d.Mounts)})
		for _, p := range d.Partitions {
			rows = append(rows, []string{"  " + p.Name, DiskSize(p.Size), "", "", "", mountedAt(p.Mounts)})
		}
	}
	t.rows([]column{{title: "NAME"}, {title: "SIZE", right: true}, {title: "KIND"}, {title: "MODEL", wide: true},
		{title: "SERIAL", wide: true}, {title: "MOUNTED AT", wide: true}}, rows)
}

// mountedAt shortens the list of a disk that is mounted all over the place, as
// in a container: the first few say which it is.
func mountedAt(mounts []string) string {
	const most = 3
	if len(mounts) > most {
		return strings.Join(mounts[:most], ", ") + fmt.Sprintf(" and %d more", len(mounts)-most)
	}
	return strings.Join(mounts, ", ")
}

// diskHealth is a table of its own: what a disk complains about must not be
// cut off by a long model name.
func (t *table) diskHealth(inv *Inventory) {
	t.section("DISK HEALTH")
	var rows [][]string
	for _, d := range inv.Disks {
		if d.Power == PowerAsleep {
			rows = append(rows, []string{d.Name, "asleep, not asked", "", "", "", "", ""})
		} else if d.Health != nil {
			rows = append(rows, healthRow(d.Name, d.Health))
		}
	}
	if len(rows) == 0 {
		t.line("  not known")
		return
	}
	t.rows([]column{{title: "NAME"}, {title: "SAYS", wide: true}, {title: "TEMP", right: true}, {title: "WORN", right: true},
		{title: "SPARE", right: true}, {title: "WRITTEN", right: true}, {title: "SWITCHED ON", right: true}}, rows)
}

func healthRow(name string, h *Health) []string {
	var says []string
	if h.Passed != nil && !*h.Passed {
		says = append(says, "FAILING, save your data")
	}
	says = append(says, h.Warnings...)
	complain := func(n *uint64, what string) {
		if n != nil && *n > 0 {
			says = append(says, plural(int(min(*n, math.MaxInt32)), what))
		}
	}
	complain(h.Pending, "unreadable sector")
	complain(h.MediaErrors, "media error")
	complain(h.Reallocated, "replaced sector")
	complain(h.CRCErrors, "cable error")
	row := []string{name, firstOf(strings.Join(says, "; "), "no complaints"), "", "", "", "", ""}
	if h.Temperature != nil {
		row[2] = reading(*h.Temperature, "°C")
	}
	if h.Wear != nil {
		row[3] = fmt.Sprintf("%.0f%%", *h.Wear)
	}
	if h.Spare != nil {
		row[4] = fmt.Sprintf("%.0f%%", *h.Spare)
	}
	if h.WrittenBytes != nil {
		row[5] = DiskSize(*h.WrittenBytes)
	}
	if h.PowerOnHours != nil {
		row[6] = duration(time.Duration(*h.PowerOnHours) * time.Hour)
	}
	return row
}

func diskKind(d Disk) string {
	kind := firstOf(busTitles[d.Bus], "disk")
	switch {
	case d.Rotational && (d.Bus == "sata" || d.Bus == "usb" || d.Bus == "scsi"):
		kind += " hard disk"
	case d.Bus == "sata":
		kind += " SSD"
	case d.Bus == "usb" && d.Removable:
		kind += " stick"
	}
	if d.System {
		kind += ", system"
	}
	if d.ReadOnly {
		kind += ", read-only"
	}
	return kind
}

func (t *table) filesystems(inv *Inventory) {
	t.section("FILESYSTEMS")
	var rows [][]string
	for _, f := range inv.Filesystems {
		size, free, used := DiskSize(f.Total), DiskSize(f.Free), ""
		if f.Total == 0 {
			size, free = "", ""
		} else {
			used = usedShare(f)
		}
		kind := f.Type
		if f.ReadOnly {
			kind += ", read-only"
		}
		rows = append(rows, []string{f.Mount, f.Source, f.Disk, kind, size, used, free})
	}
	t.rows([]column{{title: "MOUNTED AT", wide: true}, {title: "DEVICE", wide: true}, {title: "DISK"}, {title: "TYPE"},
		{title: "SIZE", right: true}, {title: "USED", right: true}, {title: "FREE", right: true}}, rows)
}

// usedShare is what df shows: of what there is for everybody. Some is root's alone.
func usedShare(f Filesystem) string {
	if f.Used == 0 && f.Free == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f%%", 100*float64(f.Used)/(float64(f.Used)+float64(f.Free)))
}

func (t *table) network(inv *Inventory) {
	t.section("NETWORK")
	var rows [][]string
	virtual := 0
	for _, n := range inv.Network {
		if n.Kind == "virtual" {
			virtual++
			continue
		}
		link := "no link"
		if n.Up {
			link = "connected"
		}
		if n.Up && n.SpeedMbps > 0 {
			link = speed(n.SpeedMbps)
		}
		addresses := n.Addresses
		if len(addresses) == 0 {
			addresses = []string{""}
		}
		for i, a := range addresses {
			if i == 0 {
				rows = append(rows, []string{n.Name, n.Kind, link, n.MAC, a})
			} else {
				rows = append(rows, []string{"", "", "", "", a})
			}
		}
	}
	t.rows([]column{{title: "NAME"}, {title: "KIND"}, {title: "LINK"}, {title: "MAC"}, {title: "ADDRESS", wide: true}}, rows)
	if virtual > 0 {
		t.line("  and " + plural(virtual, "virtual interface"))
	}
}

func (t *table) sensors(inv *Inventory) {
	t.section("SENSORS")
	var rows [][]string
	for _, s := range inv.Sensors {
		var limits []string
		if s.High != nil {
			limits = append(limits, "high at "+reading(*s.High, s.Unit))
		}
		if s.Critical != nil {
			limits = append(limits, "critical at "+reading(*s.Critical, s.Unit))
		}
		rows = append(rows, []string{s.Name, string(s.Kind), reading(s.Value, s.Unit), strings.Join(limits, ", ")})
	}
	t.rows([]column{{title: "NAME", wide: true}, {title: "MEASURES"}, {title: "NOW", right: true}, {title: "LIMITS", wide: true}}, rows)
}

func reading(v float64, unit string) string {
	digits := 1
	switch unit {
	case "rpm":
		digits = 0
	case "V", "A":
		digits = 2
	}
	return strconv.FormatFloat(v, 'f', digits, 64) + " " + unit
}

func (t *table) lights(inv *Inventory) {
	t.section("LEDS")
	var rows [][]string
	for _, l := range inv.LEDs {
		state := "off"
		if l.Level > 0 {
			state = "on"
		}
		driven := l.Trigger
		if driven == "none" {
			driven = "by hand"
		}
		rows = append(rows, []string{l.Name, l.Use, state, driven})
	}
	t.rows([]column{{title: "NAME", wide: true}, {title: "USED FOR"}, {title: "STATE"}, {title: "DRIVEN BY"}}, rows)
}

var accessTitles = map[Access]string{AccessOK: "usable", AccessDenied: "not for this user", AccessNoNode: "driver not loaded"}

func (t *table) pins(inv *Inventory) {
	t.section("PINS AND BUSES")
	var rows [][]string
	for _, g := range inv.GPIO {
		detail := g.Label
		if g.Lines > 0 {
			detail = strings.TrimSpace(detail + " (" + plural(g.Lines, "line") + ")")
		}
		rows = append(rows, []string{g.Name, "GPIO", detail, accessTitles[g.Access]})
	}
	kinds := map[string]string{"i2c": "I²C", "spi": "SPI", "onewire": "1-wire"}
	for _, b := range inv.Buses {
		detail := b.Label
		if len(b.Devices) > 0 {
			detail = strings.Join(b.Devices, ", ")
		}
		rows = append(rows, []string{b.Name, kinds[b.Kind], detail, accessTitles[b.Access]})
	}
	t.rows([]column{{title: "NAME"}, {title: "KIND"}, {title: "WHAT", wide: true}, {title: "STATE"}}, rows)
}

// keepers are what keeps the time, the keys, and the machine going.
func (t *table) keepers(inv *Inventory) {
	t.section("CLOCK, SECURITY CHIP, WATCHDOG")
	var rows [][]string
	for _, c := range inv.Clocks {
		state := "set the time at start"
		if !c.System {
			state = "did not set the time at start"
		}
		if c.Year > 0 && c.Year < inv.Taken.Year() {
			state = fmt.Sprintf("shows the year %d: is its battery empty?", c.Year)
		}
		rows = append(rows, []string{c.Name, "clock", c.Driver, state})
	}
	for _, m := range inv.TPMs {
		version := "TPM 2.0"
		if m.Version == 1 {
			version = "TPM 1.2"
		}
		rows = append(rows, []string{m.Name, "security chip", version, accessTitles[m.Access]})
	}
	for _, w := range inv.Watchdogs {
		state := "off"
		if w.Active {
			state = "watching"
		}
		if w.Timeout > 0 {
			state += fmt.Sprintf(" (%d s)", w.Timeout)
		}
		if w.FiredLast {
			state += ", caused the last restart"
		}
		rows = append(rows, []string{w.Name, "watchdog", w.Identity, state})
	}
	t.rows([]column{{title: "NAME"}, {title: "KIND"}, {title: "WHAT", wide: true}, {title: "STATE"}}, rows)
}

func (t *table) notes(inv *Inventory) {
	if len(inv.Notes) == 0 {
		return
	}
	t.section("NOT SHOWN, AND WHY")
	for _, n := range inv.Notes {
		subjects := n.Subjects
		if len(subjects) > 8 {
			subjects = append(slices.Clone(subjects[:8]), fmt.Sprintf("and %d more", len(n.Subjects)-8))
		}
		text := n.Text
		if len(subjects) > 0 {
			text = strings.Join(subjects, ", ") + ": " + text
		}
		t.field(n.Section, text)
	}
}

// DiskSize writes a size as on the label of a disk: three digits that count.
func DiskSize(v uint64) string {
	return scaled(float64(v), 1000, []string{"B", "kB", "MB", "GB", "TB", "PB", "EB"})
}

// memorySize writes a size as memory is sold.
func memorySize(v uint64) string {
	return scaled(float64(v), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"})
}

func scaled(v, base float64, units []string) string {
	i := 0
	for v >= 999.5 && i < len(units)-1 {
		v /= base
		i++
	}
	digits := 0
	if i > 0 && v < 99.95 {
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64) + " " + units[i]
}

func speed(mbps int) string {
	if mbps < 1000 {
		return fmt.Sprintf("%d Mbit/s", mbps)
	}
	return strconv.FormatFloat(float64(mbps)/1000, 'f', -1, 64) + " Gbit/s"
}

// duration writes the two units that count: "3 days 4 h", "12 min".
func duration(d time.Duration) string {
	days, h, m := int(d/(24*time.Hour)), int(d/time.Hour)%24, int(d/time.Minute)%60
	switch {
	case days >= 730:
		return fmt.Sprintf("%.1f years", float64(days)/365.25)
	case days >= 60:
		return plural(days, "day")
	case days > 0 && h > 0:
		return fmt.Sprintf("%s %d h", plural(days, "day"), h)
	case days > 0:
		return plural(days, "day")
	case h > 0:
		return fmt.Sprintf("%d h %d min", h, m)
	default:
		return fmt.Sprintf("%d min", m)
	}
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(width-utf8.RuneCountInString(s), 0))
}

// cut shortens to a number of columns and shows that it did.
func cut(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	r := []rune(s)
	return string(r[:max(width-1, 0)]) + "…"
}

// wrap breaks text at spaces; a word longer than the width is cut.
func wrap(s string, width int) []string {
	var lines []string
	line := ""
	for word := range strings.FieldsSeq(s) {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= width:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	lines = append(lines, line)
	for i := range lines {
		lines[i] = cut(lines[i], width)
	}
	return lines
}
