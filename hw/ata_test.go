package hw

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/anatol/smart.go"
)

// sector makes a SMART sector: a version, entries of twelve bytes, a checksum.
func sector(entries ...[12]byte) []byte {
	s := make([]byte, 512)
	s[0] = 16
	for i, e := range entries {
		copy(s[2+12*i:], e[:])
	}
	s[511] = -sumOf(s)
	return s
}

func TestSMARTThroughABridge(t *testing.T) {
	data := sector(
		[12]byte{5, 0x33, 0, 130, 130, 44}, // at its threshold, and foretells failure
		[12]byte{9, 0x32, 0, 90, 90, 0x10, 0x27},
		[12]byte{194, 0x22, 0, 110, 90, 37, 0, 18, 0, 52, 0},
		[12]byte{199, 0x32, 0, 200, 200, 7},
		[12]byte{241, 0x32, 0, 100, 100, 0xff, 0xff}, // unit unknown without the drive database
	)
	limits := sector([12]byte{5, 140}, [12]byte{9, 0}, [12]byte{194, 0})
	pages, err := decodeATA(data, limits)
	must(t, err)
	h := ataHealth(pages)
	if *h.Reallocated != 44 || *h.PowerOnHours != 10000 || *h.Temperature != 37 || *h.CRCErrors != 7 || h.WrittenBytes != nil || h.Wear != nil {
		t.Errorf("got %+v", h)
	}
	if h.Passed == nil || *h.Passed || len(h.Warnings) != 1 || !strings.Contains(h.Warnings[0], "failing now") {
		t.Errorf("an attribute below its threshold: passed %v, %q", h.Passed, h.Warnings)
	}
	pages.Passed = new(true) // the disk's own word counts for more
	if h := ataHealth(pages); !*h.Passed || len(h.Warnings) != 1 {
		t.Errorf("passed %v, %q", *h.Passed, h.Warnings)
	}
	// Damaged thresholds are no thresholds; damaged data are no health.
	limits[100] ^= 1
	if pages, err := decodeATA(data, limits); err != nil || pages.Thresholds != nil {
		t.Errorf("thresholds %v, %v", pages, err)
	}
	data[100] ^= 1
	if _, err := decodeATA(data, limits); err == nil {
		t.Error("damaged data are believed")
	}
}

func TestThresholdsThatMeanNothingAreNoFailure(t *testing.T) {
	for name, c := range map[string]struct{ current, limit uint8 }{
		"no threshold": {1, 0}, "no value": {0, 10}, "never worked out": {253, 254}, "above": {11, 10},
	} {
		h := ataHealth(&ataPages{Attributes: []smart.AtaSmartAttr{{Id: 5, Flags: 1, Current: c.current}}, Thresholds: map[uint8]uint8{5: c.limit}})
		if h.Passed != nil || h.Warnings != nil {
			t.Errorf("%s: passed %v, %q", name, h.Passed, h.Warnings)
		}
	}
	old := ataHealth(&ataPages{Attributes: []smart.AtaSmartAttr{{Id: 9, Current: 1}}, Thresholds: map[uint8]uint8{9: 1}})
	if old.Passed != nil || len(old.Warnings) != 1 || !strings.Contains(old.Warnings[0], "designed for") {
		t.Errorf("an old disk: passed %v, %q", old.Passed, old.Warnings)
	}
}

func TestNamesOfTheDriveDatabaseTellUnits(t *testing.T) {
	attr := func(name string, current uint8, raw uint64) smart.AtaSmartAttr {
		return smart.AtaSmartAttr{Id: 241, Name: name, Current: current, ValueRaw: raw}
	}
	for name, want := range map[string]uint64{"Total_LBAs_Written": 512000, "Host_Writes_32MiB": 1000 << 25, "Lifetime_Writes_GiB": 1000 << 30} {
		if h := ataHealth(&ataPages{Attributes: []smart.AtaSmartAttr{attr(name, 100, 1000)}}); h.WrittenBytes == nil || *h.WrittenBytes != want {
			t.Errorf("%s: %v", name, h.WrittenBytes)
		}
	}
	if h := ataHealth(&ataPages{Attributes: []smart.AtaSmartAttr{attr("Host_Writes_GiB", 100, 1<<60)}}); h.WrittenBytes != nil {
		t.Errorf("a product that fits no counter became %d", *h.WrittenBytes)
	}
	h := ataHealth(&ataPages{Attributes: []smart.AtaSmartAttr{attr("SSD_Life_Left", 88, 0), attr("Available_Reservd_Space", 97, 0)}})
	if *h.Wear != 12 || *h.Spare != 97 {
		t.Errorf("wear %v, spare %v", *h.Wear, *h.Spare)
	}
	if h := ataHealth(&ataPages{Attributes: []smart.AtaSmartAttr{attr("SSD_Life_Left", 253, 0)}}); h.Wear != nil {
		t.Errorf("wear %v out of a value that is no percentage", *h.Wear)
	}
}

// TestOnlyADiskThatSaysSoHasPassed feeds answers to RETURN STATUS.
func TestOnlyADiskThatSaysSoHasPassed(t *testing.T) {
	descriptor := func(mid, high, status byte) []byte {
		s := make([]byte, 22)
		s[0], s[1], s[3], s[7] = 0x72, 1, 0x1d, 14
		s[8], s[9], s[17], s[19], s[21] = 0x09, 12, mid, high, status
		return s
	}
	fixed := []byte{0: 0xf0, 2: 1, 4: 0x50, 7: 10, 10: 0xf4, 11: 0x2c, 13: 0x1d, 17: 0}
	for name, c := range map[string]struct {
		sense         []byte
		passed, known bool
	}{
		"passed":           {descriptor(0x4f, 0xc2, 0x50), true, true},
		"failing":          {descriptor(0xf4, 0x2c, 0x50), false, true},
		"failing, fixed":   {fixed, false, true},
		"half of each":     {descriptor(0x4f, 0x2c, 0x50), false, false},
		"nothing":          {descriptor(0, 0, 0x50), false, false},
		"command refused":  {descriptor(0x4f, 0xc2, 0x51), false, false},
		"no sense at all":  {nil, false, false},
		"bridge that lies": {make([]byte, 32), false, false},
	} {
		passed, err := passedFromSense(c.sense)
		if passed != c.passed || (err == nil) != c.known {
			t.Errorf("%s: passed %v, %v", name, passed, err)
		}
	}
}

// TestALoopDeviceAnswersNoATACommand asks a real block device of this kernel
// that is no disk: it must be refused, not believed.
func TestALoopDeviceAnswersNoATACommand(t *testing.T) {
	dev := loopDevice(t)
	if spinning, err := ataSpinning(dev); err == nil {
		t.Errorf("it spins: %v", spinning)
	}
	if pages, err := readATA(dev, true); err == nil {
		t.Errorf("it has health: %+v", pages)
	}
}

func TestBridgeIsFoundAboveItsDisk(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	inv := probe(t, Options{Root: root})
	i := slices.IndexFunc(inv.Disks, func(d Disk) bool { return d.Name == "sda" })
	want := Bridge{ID: "1058:25a2", Name: "Western Digital Elements 25A2", Driver: "uas", SAT: true}
	if b := inv.Disks[i].Bridge; b == nil || *b != want {
		t.Errorf("got %+v", b)
	}
	for _, d := range inv.Disks {
		if d.Bus != "usb" && d.Bridge != nil {
			t.Errorf("%s, on no USB, has %+v", d.Name, d.Bridge)
		}
	}
	// One that is asleep is not asked, so nobody knows what its bridge passes on.
	put(t, root, "sys/block/sda/device/power/runtime_status", "suspended\n")
	inv = probe(t, Options{Root: root})
	if d := inv.Disks[i]; d.Bridge == nil || d.Bridge.SAT || d.Health != nil || d.Power != PowerAsleep {
		t.Errorf("asleep: %+v", d)
	}
	must(t, os.RemoveAll(filepath.Join(root, "sys/devices/platform/scb/fd500000.pcie/pci0000:00/0000:01:00.0/usb2/2-1/idVendor")))
	if b := bridgeOf(tree{root: root}, "sda"); b != nil {
		t.Errorf("a bridge out of nothing: %+v", b)
	}
}

// FuzzSMART takes two sectors for what a bridge has passed on. What comes out
// must be plausible, or noted and dropped, and survive being recorded.
func FuzzSMART(f *testing.F) {
	f.Add(sector([12]byte{5, 0x33, 0, 130, 130, 44}, [12]byte{194, 0x22, 0, 110, 90, 37, 0, 18, 0, 52}), sector([12]byte{5, 140}))
	f.Add(sector([12]byte{9, 0, 0, 1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}), []byte(nil))
	f.Add(make([]byte, 512), make([]byte, 512))
	f.Add([]byte("short"), []byte("short"))
	f.Fuzz(func(t *testing.T, data, limits []byte) {
		data, limits = slices.Clone(data), slices.Clone(limits)
		for _, s := range [][]byte{data, limits} { // or nothing would get past the checksum
			if len(s) == 512 {
				s[511] -= sumOf(s)
			}
		}
		pages, err := decodeATA(data, limits)
		if err != nil {
			return
		}
		raw, err := json.Marshal(pages)
		must(t, err)
		var again ataPages
		must(t, json.Unmarshal(raw, &again))
		h := ataHealth(&again)
		h.plausible("sda")
		checkHealth(t, h)
	})
}

// FuzzNVMeLog takes 512 bytes for log page 02h.
func FuzzNVMeLog(f *testing.F) {
	f.Add(make([]byte, 512))
	f.Add([]byte(strings.Repeat("\xff", 512)))
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, err := pages{nvme: raw}.health()
		if (err == nil) != (len(raw) == nvmeLogSize || raw == nil) {
			t.Fatalf("%d bytes: %v", len(raw), err)
		}
		if h != nil {
			h.plausible("nvme0n1")
			checkHealth(t, h)
		}
	})
}

func checkHealth(t *testing.T, h *Health) {
	switch {
	case h.Temperature != nil && !plausible(Temperature, *h.Temperature),
		h.Spare != nil && *h.Spare > 100, h.Wear != nil && (*h.Wear < 0 || *h.Wear > 255),
		h.PowerOnHours != nil && *h.PowerOnHours > 100*366*24, h.WrittenBytes != nil && *h.WrittenBytes > 1e18:
		t.Errorf("implausible: %+v", h)
	}
	for _, w := range h.Warnings {
		if w != clean(w) || w == "" {
			t.Errorf("warning %q", w)
		}
	}
}
