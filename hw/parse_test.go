package hw

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/anatol/smart.go"

	"github.com/deimos-edge/deimos/board"
)

func TestMountsOfThisMachineOnlyAndOnceEach(t *testing.T) {
	raw := `24 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw
25 24 0:22 / /proc rw - proc proc rw
30 24 0:31 / /tmp rw - tmpfs tmpfs rw
41 24 8:1 / /srv/data\040one rw shared:21 - ext4 /dev/sda1 rw
42 24 8:1 /pub /pub ro shared:21 - ext4 /dev/sda1 rw
43 24 0:40 / /mnt/nas rw - nfs4 nas:/export rw
44 24 7:0 / /snap/core/1 ro - squashfs /dev/loop0 ro
45 24 8:17 / /old rw - ext4 /dev/sdb1 rw
46 24 8:33 / /old ro - ext4 /dev/sdc1 rw
47 24 0:50 / /pool rw - zfs tank/data rw
48 24 0:51 / /home/u/x rw - fuse.sshfs host:/ rw
49 24 0:60 / /btr rw shared:1 master:2 - btrfs /dev/sdd1 rw,subvol=/
truncated line
- - - - - - - -
`
	got := onThisMachine(parseMountinfo([]byte(raw)), nodevTypes(tree{root: t.TempDir()}))
	var names []string
	for _, f := range got {
		names = append(names, fmt.Sprint(f.Mount, " ", f.Source, " ", f.ReadOnly))
	}
	want := []string{"/ /dev/mmcblk0p2 false", "/btr /dev/sdd1 false", "/old /dev/sdc1 true", "/pool tank/data false", "/srv/data one /dev/sda1 false"}
	if !slices.Equal(names, want) {
		t.Errorf("got  %q\nwant %q", names, want)
	}
}

func TestRootIsShownWhateverItIs(t *testing.T) {
	got := onThisMachine(parseMountinfo([]byte("1 0 0:30 / / rw - overlay overlay rw,lowerdir=/a\n")), nodevTypes(tree{root: t.TempDir()}))
	if len(got) != 1 || got[0].Type != "overlay" {
		t.Errorf("got %+v", got)
	}
}

func TestFilesystemOnEncryptedVolumeIsFoundOnItsDisk(t *testing.T) {
	root := t.TempDir()
	put(t, root, "sys/block/sda/device/model", "Disk")
	put(t, root, "sys/block/sda/dev", "8:0")
	put(t, root, "sys/block/sda/sda2/partition", "2")
	put(t, root, "sys/block/sda/sda2/dev", "8:2")
	put(t, root, "sys/dev/block/253:1/slaves/dm-0/dev", "253:0") // LVM on
	put(t, root, "sys/dev/block/253:0/slaves/sda2/dev", "8:2")   // encryption on a partition
	put(t, root, "sys/dev/block/253:9/slaves/dm-8/dev", "253:8") // a loop, which must end
	put(t, root, "sys/dev/block/253:8/slaves/dm-9/dev", "253:9")
	put(t, root, "proc/self/mountinfo", "1 0 253:1 / /data rw - ext4 /dev/mapper/vg-data rw\n2 0 253:9 / /loop rw - ext4 /dev/mapper/x rw\n")
	inv := probe(t, Options{Root: root})
	if len(inv.Filesystems) != 2 || inv.Filesystems[0].Disk != "sda" || !slices.Contains(inv.Disks[0].Partitions[0].Mounts, "/data") {
		t.Errorf("got %+v on %+v", inv.Filesystems, inv.Disks)
	}
}

func TestTwoDisksSensorsKeepTheirNamesWhenChipsAreRenumbered(t *testing.T) {
	names := func(first, second string) []string {
		root := t.TempDir()
		for chip, dev := range map[string]string{first: "nvme0", second: "nvme1"} {
			put(t, root, "sys/devices/"+dev+"/x", "")
			put(t, root, "sys/class/hwmon/"+chip+"/name", "nvme")
			put(t, root, "sys/class/hwmon/"+chip+"/temp1_label", "Composite")
			put(t, root, "sys/class/hwmon/"+chip+"/temp1_input", "40000")
			link := filepath.Join(root, "sys/class/hwmon", chip, "device")
			must(t, os.Symlink("../../../devices/"+dev, link))
		}
		var list []string
		for _, s := range probe(t, Options{Root: root}).Sensors {
			list = append(list, s.Name)
		}
		return list
	}
	want := []string{"nvme Composite @nvme0", "nvme Composite @nvme1"}
	if a, b := names("hwmon0", "hwmon1"), names("hwmon1", "hwmon0"); !slices.Equal(a, want) || !slices.Equal(b, want) {
		t.Errorf("got %q and %q", a, b)
	}
}

func TestSensorsAreScaledToTheirUnits(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"name": "chip", "temp1_input": "41500", "temp1_max": "80000", "temp1_crit": "0", "fan2_input": "1200",
		"in0_input": "12050", "curr1_input": "250", "power1_average": "5000000", "humidity1_input": "45500",
		"temp2_input": "x", "temp3_alarm": "1", "update_interval": "5",
	} {
		put(t, root, "sys/class/hwmon/hwmon0/"+name, content)
	}
	got := map[string]string{}
	inv := probe(t, Options{Root: root})
	for _, s := range inv.Sensors {
		got[s.Name] = fmt.Sprint(s.Kind, " ", reading(s.Value, s.Unit), " ", s.High != nil, " ", s.Critical != nil)
	}
	want := map[string]string{
		"chip temp1": "temperature 41.5 °C true false", "chip fan2": "fan 1200 rpm false false", "chip in0": "voltage 12.05 V false false",
		"chip curr1": "current 0.25 A false false", "chip power1": "power 5.0 W false false", "chip humidity1": "humidity 45.5 % false false",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if !noted(inv, "sensors", NoteUnreadable, "chip temp2") {
		t.Errorf("no note about the broken one: %+v", inv.Notes)
	}
}

// TestOnlyADiskThatSaysSoIsSpinning feeds sense data made after SAT-3, table
// 12-8 (descriptor) and Linux 6.11 (fixed).
func TestOnlyADiskThatSaysSoIsSpinning(t *testing.T) {
	descriptor := func(count, status byte) []byte {
		s := make([]byte, 22)
		s[0], s[1], s[3], s[7] = 0x72, 1, 0x1d, 14
		s[8], s[9], s[13], s[21] = 0x09, 12, count, status
		return s
	}
	fixed := func(count, status byte) []byte {
		s := make([]byte, 18)
		s[0], s[2], s[4], s[6], s[7], s[13] = 0xf0, 1, status, count, 10, 0x1d
		return s
	}
	for name, c := range map[string]struct {
		sense    []byte
		spinning bool
		known    bool
	}{
		"active":                {descriptor(0xff, 0x50), true, true},
		"idle":                  {descriptor(0x80, 0x50), true, true},
		"idle_c":                {descriptor(0x83, 0x50), true, true},
		"standby":               {descriptor(0x00, 0x50), false, true},
		"standby_y":             {descriptor(0x01, 0x50), false, true},
		"fixed, active":         {fixed(0xff, 0x50), true, true},
		"fixed, standby":        {fixed(0x00, 0x50), false, true},
		"unknown mode":          {descriptor(0x42, 0x50), false, false},
		"failed":                {descriptor(0xff, 0x51), false, false},
		"device fault":          {descriptor(0xff, 0x70), false, false},
		"not ready":             {descriptor(0xff, 0x00), false, false},
		"fixed before 6.11":     {fixed(0x00, 0x00), false, false},
		"no answer":             {nil, false, false},
		"cut":                   {descriptor(0xff, 0x50)[:20], false, false},
		"another sense":         {append([]byte{0x72, 5, 0x20, 0}, make([]byte, 18)...), false, false},
		"another descriptor":    {func() []byte { s := descriptor(0xff, 0x50); s[8] = 0; return s }(), false, false},
		"deferred error format": {func() []byte { s := descriptor(0xff, 0x50); s[0] = 0x73; return s }(), false, false},
	} {
		spinning, err := spinningFromSense(c.sense)
		if spinning != c.spinning || (err == nil) != c.known {
			t.Errorf("%s: spinning %v, %v", name, spinning, err)
		}
	}
}

func TestNVMeHealthLog(t *testing.T) {
	h := nvmeHealth(&smart.NvmeSMARTLog{
		CritWarning: 1<<0 | 1<<3, Temperature: 273 + 41, PercentUsed: 103,
		PowerOnHours: smart.Uint128{Val: [2]uint64{8760, 0}}, PowerCycles: smart.Uint128{Val: [2]uint64{7, 1}},
		MediaErrors: smart.Uint128{Val: [2]uint64{2, 0}}, DataUnitsWritten: smart.Uint128{Val: [2]uint64{3, 0}},
	})
	if *h.Passed || h.Spare != nil || *h.WrittenBytes != 3*512000 {
		t.Errorf("got passed %v, spare %v, written %v", *h.Passed, h.Spare, h.WrittenBytes)
	}
	if *h.Temperature != 41 || *h.Wear != 103 || *h.PowerOnHours != 8760 || *h.MediaErrors != 2 || h.PowerCycles != nil {
		t.Errorf("got %+v", h)
	}
	if want := []string{"spare blocks are running out", "has gone read-only"}; !slices.Equal(h.Warnings, want) {
		t.Errorf("warnings %q", h.Warnings)
	}
	if missing := h.plausible("nvme0n1"); len(missing) != 0 {
		t.Errorf("plausible values are dropped: %+v", missing)
	}
	// 0 K means that there is no sensor, and must not become −273 °C.
	if h := nvmeHealth(&smart.NvmeSMARTLog{}); h.Temperature != nil {
		t.Errorf("temperature %v out of nothing", *h.Temperature)
	}
	// A disk that is only hot is not about to fail.
	if h := nvmeHealth(&smart.NvmeSMARTLog{CritWarning: 1 << 1, AvailSpare: 7, SpareThresh: 10}); !*h.Passed || *h.Spare != 7 {
		t.Errorf("got passed %v, spare %v", *h.Passed, h.Spare)
	}
	hot := nvmeHealth(&smart.NvmeSMARTLog{
		Temperature: 65535, AvailSpare: 101, PowerOnHours: smart.Uint128{Val: [2]uint64{math.MaxUint64, 0}},
		DataUnitsWritten: smart.Uint128{Val: [2]uint64{1e13, 0}},
	})
	if missing := hot.plausible("nvme0n1"); len(missing) != 4 || hot.Temperature != nil || hot.PowerOnHours != nil || hot.Spare != nil || hot.WrittenBytes != nil {
		t.Errorf("kept %+v, noted %+v", hot, missing)
	}
}

func TestATAAttributes(t *testing.T) {
	attr := func(id uint8, typ int, raw uint64) smart.AtaSmartAttr {
		return smart.AtaSmartAttr{Id: id, Type: typ, ValueRaw: raw}
	}
	h := ataHealth(&ataPages{Attributes: []smart.AtaSmartAttr{
		attr(5, smart.AtaDeviceAttributeTypeRaw16OptRaw16, 3), attr(9, smart.AtaDeviceAttributeTypeMin2Hour, 60*1000),
		attr(12, smart.AtaDeviceAttributeTypeRaw48, 44), attr(194, smart.AtaDeviceAttributeTypeTempMinMax, 0x0000_0036_0014_0026),
		attr(197, smart.AtaDeviceAttributeTypeRaw48, 0), attr(199, smart.AtaDeviceAttributeTypeRaw48, 0x7_0000_0002),
	}})
	if *h.Reallocated != 3 || *h.Pending != 0 || *h.PowerCycles != 44 || *h.PowerOnHours != 1000 || *h.Temperature != 38 || *h.CRCErrors != 2 {
		t.Errorf("got %+v", h)
	}
	packed := ataHealth(&ataPages{Attributes: []smart.AtaSmartAttr{
		attr(9, smart.AtaDeviceAttributeTypeRaw24OptRaw8, 0x1234_0000_1000),
	}})
	if *packed.PowerOnHours != 0x1000 || packed.Temperature != nil || packed.Reallocated != nil {
		t.Errorf("got %+v", packed)
	}
}

func TestEMMCLifeTime(t *testing.T) {
	root := t.TempDir()
	for name, c := range map[string]struct {
		life, eol string
		wear      float64 // 0: absent
		warnings  int
	}{
		"new":       {"0x01 0x01", "0x01", 10, 0},
		"worn":      {"0x02 0x09", "0x02", 90, 1},
		"used up":   {"0x0b 0x03", "0x03", 110, 1},
		"not given": {"0x00 0x00", "0x00", 0, 0},
		"nonsense":  {"0xff zz", "9", 0, 0},
	} {
		put(t, root, "sys/block/mmcblk0/device/life_time", c.life)
		put(t, root, "sys/block/mmcblk0/device/pre_eol_info", c.eol)
		h := emmcHealth(tree{root: root}, "mmcblk0")
		switch {
		case c.wear == 0 && h != nil:
			t.Errorf("%s: %+v out of nothing", name, h)
		case c.wear != 0 && (h == nil || h.Wear == nil || *h.Wear != c.wear || len(h.Warnings) != c.warnings):
			t.Errorf("%s: %+v", name, h)
		}
	}
}

func TestSizesReadAsOnTheLabel(t *testing.T) {
	for v, want := range map[uint64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_600: "1.0 MB", 31_914_983_424: "31.9 GB", 256_000_000_000: "256 GB", 999_999_999_999: "1.0 TB", 2_000_398_934_016: "2.0 TB", math.MaxUint64: "18.4 EB"} {
		if got := DiskSize(v); got != want {
			t.Errorf("%d: %s, want %s", v, got, want)
		}
	}
	for d, want := range map[time.Duration]string{0: "0 min", 59 * time.Minute: "59 min", 90 * time.Minute: "1 h 30 min", 24 * time.Hour: "1 day", 76 * time.Hour: "3 days 4 h", 61 * 24 * time.Hour: "61 days", 3 * 8766 * time.Hour: "3.0 years"} {
		if got := duration(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

func TestBareMachineSaysNoneFound(t *testing.T) {
	var out bytes.Buffer
	must(t, WriteTable(&out, probe(t, Options{Root: t.TempDir()})))
	for _, section := range []string{"DISKS", "FILESYSTEMS", "NETWORK", "SENSORS", "LEDS", "PINS AND BUSES", "CLOCK, SECURITY CHIP, WATCHDOG"} {
		if !strings.Contains(out.String(), section+"\n  none found\n") {
			t.Errorf("%s is left empty:\n%s", section, &out)
		}
	}
}

// checkTable is what must hold of every table.
func checkTable(tb testing.TB, inv *Inventory) {
	tb.Helper()
	for _, columns := range []int{minWidth, 80, TableWidth} {
		var out bytes.Buffer
		must(tb, WriteTableIn(&out, inv, columns))
		for line := range strings.Lines(out.String()) {
			line = strings.TrimSuffix(line, "\n")
			if n := utf8.RuneCountInString(line); n > columns || strings.TrimRight(line, " ") != line {
				tb.Errorf("line of %d columns where %d fit: %q", n, columns, line)
			}
		}
	}
}

func TestTableFitsWhateverIsInIt(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	word := func() string {
		return strings.Repeat([]string{"x", "Ω", "ab ", "/srv"}[r.IntN(4)], r.IntN(60))
	}
	number := func() uint64 { return r.Uint64() >> r.IntN(64) }
	for range 300 {
		inv := &Inventory{Board: board.Board{Model: word(), Name: word()}, System: System{OS: word(), Kernel: word(), Uptime: float64(number() >> 32)},
			CPU: CPU{Model: word(), Cores: r.IntN(300), Crypto: []string{"aes", "rng"}}, Memory: Memory{Total: number(), Available: number()}}
		for range r.IntN(5) {
			d := Disk{Name: word(), Model: word(), Serial: word(), Size: number(), Mounts: []string{word(), word()}, Health: &Health{Warnings: []string{word(), word()}}}
			d.Partitions = append(d.Partitions, Partition{Name: word(), Size: number(), Mounts: []string{word()}})
			inv.Disks = append(inv.Disks, d)
			inv.Filesystems = append(inv.Filesystems, Filesystem{Mount: word(), Source: word(), Type: word(), Total: number(), Used: number(), Free: number()})
			inv.Network = append(inv.Network, Interface{Name: word(), Kind: "wifi", MAC: word(), Up: true, SpeedMbps: int(number() >> 40), Addresses: []string{word(), word()}})
			inv.Sensors = append(inv.Sensors, Sensor{Name: word(), Kind: Temperature, Unit: "°C", Value: r.NormFloat64() * 1e6, High: new(r.Float64())})
			inv.LEDs = append(inv.LEDs, LED{Name: word(), Trigger: word()})
			inv.Clocks = append(inv.Clocks, Clock{Name: word(), Driver: word(), Year: r.IntN(3000)})
			inv.TPMs = append(inv.TPMs, TPM{Name: word(), Version: r.IntN(3)})
			inv.Watchdogs = append(inv.Watchdogs, Watchdog{Name: word(), Identity: word(), Timeout: int(number() >> 33), FiredLast: true})
			inv.Buses = append(inv.Buses, Bus{Kind: "onewire", Name: word(), Devices: []string{word(), word()}})
			inv.Notes = append(inv.Notes, Note{Section: word(), Subjects: slices.Repeat([]string{word()}, r.IntN(20)), Text: word() + " " + word()})
		}
		checkTable(t, inv)
	}
	if t.Failed() {
		t.Logf("seed %d", seed)
	}
}

func TestLongTextsDoNotPushOutWhatMatters(t *testing.T) {
	long := strings.Repeat("long ", 30)
	inv := &Inventory{Disks: []Disk{{Name: "sda", Size: 1e12, Bus: "sata", Model: long, Serial: long, Mounts: []string{"/srv"}, Health: &Health{Warnings: []string{"failing"}}}}}
	var out bytes.Buffer
	must(t, WriteTable(&out, inv))
	if !strings.Contains(out.String(), "failing") || !strings.Contains(out.String(), "1.0 TB") || !strings.Contains(out.String(), "MOUNTED AT\n") {
		t.Errorf("the size or the warning is gone:\n%s", &out)
	}
}

func TestHealthReadsAsAPersonWouldSayIt(t *testing.T) {
	for want, d := range map[string]Disk{
		"no complaints 41.0 °C 3% 338 days":        {Health: &Health{Temperature: new(41.0), Wear: new(3.0), PowerOnHours: new(uint64(8123))}},
		"FAILING, save your data; 1 cable error":   {Health: &Health{Passed: new(false), CRCErrors: new(uint64(1))}},
		"no complaints 98% 1.5 TB":                 {Health: &Health{Passed: new(true), Spare: new(98.0), WrittenBytes: new(uint64(1.5e12))}},
		"hot; 1 unreadable sector; 2 media errors": {Health: &Health{Warnings: []string{"hot"}, Pending: new(uint64(1)), MediaErrors: new(uint64(2))}},
		"asleep, not asked":                        {Power: PowerAsleep, Health: &Health{Warnings: []string{"old"}}},
		"not known":                                {},
	} {
		var out bytes.Buffer
		must(t, WriteTable(&out, &Inventory{Disks: []Disk{d}}))
		if !strings.Contains(strings.Join(strings.Fields(out.String()), " "), want) {
			t.Errorf("%q is not in:\n%s", want, &out)
		}
	}
}

func FuzzMountinfo(f *testing.F) {
	f.Add([]byte("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"))
	f.Add([]byte("24 1 179:2 / /a\\040b\\134c rw - ext4 /dev/x ro\n- - -\n\\9 \\ \\777\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, m := range parseMountinfo(raw) {
			if m.fstype != clean(m.fstype) || m.source != clean(m.source) {
				t.Errorf("not clean: %+v", m)
			}
		}
	})
}

func FuzzSense(f *testing.F) {
	f.Add([]byte{0x72, 1, 0, 0x1d, 0, 0, 0, 14, 9, 12, 0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0x50})
	f.Add([]byte{0xf0, 0, 1, 0, 0x50, 0, 0xff, 10, 0, 0, 0, 0, 0, 0x1d, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		if spinning, err := spinningFromSense(raw); spinning && err != nil {
			t.Error("spinning and unknown at once")
		}
	})
}

// FuzzAttributes gives every file of a small machine the same odd content. What
// comes out must be printable, plausible and survive JSON.
func FuzzAttributes(f *testing.F) {
	for _, s := range []string{"", "0", "1\n", "-1", "48199", "9223372036854775807", "99999999999999999999", "0x0b 0x01", "[none] x", "179:0",
		"processor : 0\nFeatures : aes\n", "MemTotal: 18446744073709551615 kB\n", "PRETTY_NAME=\"\x1b\"", "\x00\x80\x00\x04\xff\xfe", "1 0 8:1 / / rw - ext4 /dev/sda rw"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		root := t.TempDir()
		for _, name := range []string{
			"etc/os-release", "proc/uptime", "proc/cpuinfo", "proc/meminfo", "proc/self/mountinfo", "proc/filesystems", "proc/sys/kernel/osrelease",
			"proc/device-tree/compatible", "proc/device-tree/model", "sys/block/sda/device/model", "sys/block/sda/device/vpd_pg80", "sys/block/sda/size",
			"sys/block/sda/queue/rotational", "sys/block/mmcblk0/device/life_time", "sys/block/mmcblk0/device/type", "sys/class/net/eth0/type",
			"sys/class/net/eth0/speed", "sys/class/net/eth0/address", "sys/class/thermal/thermal_zone0/type", "sys/class/thermal/thermal_zone0/temp",
			"sys/class/hwmon/hwmon0/name", "sys/class/hwmon/hwmon0/temp1_input", "sys/class/hwmon/hwmon0/temp1_max", "sys/class/leds/a/trigger",
			"sys/class/leds/a/brightness", "sys/bus/i2c/devices/i2c-1/name", "sys/bus/w1/devices/w1_bus_master1/w1_master_slaves",
			"sys/class/thermal/thermal_zone0/trip_point_0_type", "sys/class/thermal/thermal_zone0/trip_point_0_temp", "sys/class/rtc/rtc0/name",
			"sys/class/rtc/rtc0/date", "sys/class/tpm/tpm0/tpm_version_major", "sys/class/watchdog/watchdog0/identity", "sys/class/watchdog/watchdog0/timeout",
			"sys/class/watchdog/watchdog0/bootstatus", recordHealth + "nvme0n1.nvme", recordHealth + "sda.ata.json", "sys/block/nvme0n1/device/model",
		} {
			put(t, root, name, string(raw))
		}
		inv := probe(t, Options{Root: root})
		for _, s := range inv.Sensors {
			if !plausible(s.Kind, s.Value) {
				t.Errorf("implausible: %+v", s)
			}
		}
		out, err := json.Marshal(inv)
		must(t, err)
		var again Inventory
		must(t, json.Unmarshal(out, &again))
		if again.Digest() != inv.Digest() {
			t.Error("the digest does not survive the journey through JSON")
		}
		for _, r := range string(out) {
			if r < ' ' || r == utf8.RuneError {
				t.Errorf("unprintable: %q", out)
			}
		}
		checkTable(t, inv)
	})
}

// What is root's alone is not free, and not used: df divides by the rest.
func TestTheShareUsedIsAsDfSays(t *testing.T) {
	for want, f := range map[string]Filesystem{
		"50%":  {Total: 200, Used: 90, Free: 90},
		"100%": {Total: 200, Used: 190},
		"":     {Total: 200},
	} {
		if got := usedShare(f); got != want {
			t.Errorf("%+v: %s, want %s", f, got, want)
		}
	}
}
