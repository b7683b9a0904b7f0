package hw

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// unhurried is a limit where nothing hangs: however busy this machine is, nothing is given up on.
const unhurried = 2 * time.Minute

// hurried is one where something hangs, which takes so long then. What does not hang must be read
// in a third of it, by a machine that is busy.
const hurried = 4 * time.Second

func probe(tb testing.TB, o Options) *Inventory {
	tb.Helper()
	o.Limit = cmp.Or(o.Limit, unhurried)
	inv, err := Probe(tb.Context(), o)
	must(tb, err)
	return inv
}

// noted tells whether a note with that code is about the subject ("" for a whole section).
func noted(inv *Inventory, section string, code NoteCode, subject string) bool {
	return slices.ContainsFunc(inv.Notes, func(n Note) bool {
		return n.Section == section && n.Code == code && n.Text != "" &&
			(subject == "" && len(n.Subjects) == 0 || slices.Contains(n.Subjects, subject))
	})
}

func TestProbeAgreesWithThisMachine(t *testing.T) {
	inv := probe(t, Options{})
	if inv.Board.Name == "" || inv.System.Kernel == "" || inv.System.OS == "" || inv.System.Uptime <= 0 {
		t.Errorf("the system is not described: %+v %+v", inv.Board, inv.System)
	}
	read := func(name string) string {
		raw, err := os.ReadFile(name)
		must(t, err)
		return string(raw)
	}
	if want := strings.TrimSpace(read("/proc/sys/kernel/random/boot_id")); inv.System.BootID != want {
		t.Errorf("boot id %q, the kernel says %q", inv.System.BootID, want)
	}
	if want := len(regexp.MustCompile(`(?m)^processor\s*:`).FindAllString(read("/proc/cpuinfo"), -1)); inv.CPU.Cores != want {
		t.Errorf("%d cores, /proc/cpuinfo has %d", inv.CPU.Cores, want)
	}
	var kb uint64
	for line := range strings.Lines(read("/proc/meminfo")) {
		fmt.Sscanf(line, "MemTotal: %d kB", &kb)
	}
	if inv.Memory.Total != kb*1024 || inv.Memory.Available == 0 {
		t.Errorf("memory %+v, /proc/meminfo has %d kB", inv.Memory, kb)
	}

	var root syscall.Statfs_t
	must(t, syscall.Statfs("/", &root))
	i := slices.IndexFunc(inv.Filesystems, func(f Filesystem) bool { return f.Mount == "/" })
	if i < 0 || inv.Filesystems[i].Total != root.Blocks*uint64(root.Frsize) {
		t.Errorf("the root filesystem is missing or of another size: %+v", inv.Filesystems)
	}
	for _, d := range inv.Disks {
		if strings.HasPrefix(d.Name, "loop") || strings.HasPrefix(d.Name, "zram") {
			t.Errorf("%s is no disk", d.Name)
		}
	}
	links, err := net.Interfaces()
	must(t, err)
	for _, l := range links {
		listed := slices.ContainsFunc(inv.Network, func(n Interface) bool { return n.Name == l.Name })
		if loop := l.Flags&net.FlagLoopback != 0; listed == loop {
			t.Errorf("interface %s: listed %v, loopback %v", l.Name, listed, loop)
		}
	}
	for _, n := range inv.Notes {
		if n.Code == NoteTimeout {
			t.Errorf("something did not answer: %+v", n)
		}
	}
}

func TestRecordedMachineIsNotMixedWithThisOne(t *testing.T) {
	inv := probe(t, Options{Root: plant(t, "raspberry-pi-4.tree")})
	if inv.Board.Name != "raspberry-pi-4" || inv.CPU.Model != "Cortex-A72" || len(inv.Disks) != 2 || inv.Memory.Total != 3884360*1024 {
		t.Errorf("got board %q, %q, %d disks, %d bytes", inv.Board.Name, inv.CPU.Model, len(inv.Disks), inv.Memory.Total)
	}
	for _, n := range inv.Network {
		if len(n.Addresses) > 0 {
			t.Errorf("%s has this machine's addresses: %v", n.Name, n.Addresses)
		}
	}
	for _, f := range inv.Filesystems {
		if f.Total != 0 {
			t.Errorf("%s has the size of this machine's filesystem", f.Mount)
		}
	}
	empty := probe(t, Options{Root: t.TempDir()})
	if n := len(empty.Disks) + len(empty.Network) + len(empty.Sensors) + len(empty.Filesystems) + empty.CPU.Cores; n != 0 {
		t.Errorf("an empty machine has %d things", n)
	}
	if !noted(empty, "cpu", NoteUnreadable, "") || !noted(empty, "memory", NoteUnreadable, "") {
		t.Errorf("nothing says why: %+v", empty.Notes)
	}
}

// machines are the recorded ones of testdata.
var machines = []string{"raspberry-pi-4", "qemu-virt-arm64", "cloud-vm"}

// recordedMachine probes one of them, as if it had been recorded at a fixed time.
func recordedMachine(tb testing.TB, name string) *Inventory {
	inv := probe(tb, Options{Root: plant(tb, name+".tree")})
	if inv.System.User == os.Geteuid() && name == "raspberry-pi-4" { // hand-made: says nothing of itself
		inv.Taken = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
		inv.System.Arch, inv.System.User = "arm64", 1000
	}
	inv.System.Root = ""
	return inv
}

// TestFormatAndTableAreAsCommitted compares with golden files, which are the
// format's example; -update writes them.
func TestFormatAndTableAreAsCommitted(t *testing.T) {
	for _, machine := range machines {
		inv := recordedMachine(t, machine)
		var table bytes.Buffer
		must(t, WriteTable(&table, inv))
		asJSON, err := json.MarshalIndent(inv, "", "  ")
		must(t, err)
		for name, got := range map[string][]byte{machine + ".txt": table.Bytes(), machine + ".json": append(asJSON, '\n')} {
			asCommitted(t, filepath.Join("testdata", name), got)
		}
		var again Inventory
		must(t, json.Unmarshal(asJSON, &again))
		if again.Digest() != inv.Digest() {
			t.Error("the digest does not survive the journey through JSON")
		}
	}
}

// asCommitted compares with a file that is made from the source, or writes it anew.
func asCommitted(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		must(t, os.WriteFile(file, got, 0o644))
	}
	want, err := os.ReadFile(file)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test ./hw -update writes it anew):\n%s", file, got)
	}
}

func TestListsAreNeverNull(t *testing.T) {
	raw, err := json.Marshal(probe(t, Options{Root: t.TempDir()}))
	must(t, err)
	if bytes.Contains(raw, []byte("null")) {
		t.Errorf("%s", raw)
	}
}

// TestHangingFilesDoNotHangTheProbe puts FIFOs where files are expected. Some
// are opened by a library that waits for ever, others by us.
func TestHangingFilesDoNotHangTheProbe(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	fifos := []string{"proc/cpuinfo", "proc/meminfo", "sys/class/thermal/thermal_zone0/temp", "sys/class/hwmon/hwmon2/name", "sys/block/sda/size", "sys/class/leds/ACT/trigger"}
	for _, name := range fifos {
		p := filepath.Join(root, name)
		must(t, os.Remove(p))
		must(t, syscall.Mkfifo(p, 0o644))
	}
	inv := probe(t, Options{Root: root, Limit: hurried})
	for _, name := range fifos[:2] { // let the library's goroutines go
		f, err := os.OpenFile(filepath.Join(root, name), os.O_RDWR, 0)
		must(t, err)
		must(t, f.Close())
	}
	waitForHung(t)

	if !noted(inv, "cpu", NoteTimeout, "") || !noted(inv, "memory", NoteTimeout, "") || !noted(inv, "sensors", NoteUnreadable, "cpu-thermal") || !noted(inv, "disks", NoteImplausible, "sda") {
		t.Errorf("not all that hangs is noted: %+v", inv.Notes)
	}
	if i := slices.IndexFunc(inv.Notes, func(n Note) bool { return slices.Contains(n.Subjects, "cpu-thermal") }); i >= 0 && !strings.Contains(inv.Notes[i].Text, "not a regular file") {
		t.Errorf("a FIFO was read: %+v", inv.Notes[i])
	}
	if len(inv.Disks) != 2 || len(inv.Network) != 3 || len(inv.LEDs) != 3 || inv.System.Kernel == "" {
		t.Error("what does not hang is missing")
	}
}

func waitForHung(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		hung.Lock()
		n := len(hung.names)
		hung.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d readings never came back", n)
		}
		runtime.Gosched()
	}
}

// TestHungDisksDoNotHideOthers hangs more disks than are read at once.
func TestHungDisksDoNotHideOthers(t *testing.T) {
	root := t.TempDir()
	const all, broken = 100, diskReaders + 8
	for n := range all {
		dir := fmt.Sprintf("sys/block/sd%03d", n)
		put(t, root, dir+"/device/model", "Disk")
		put(t, root, dir+"/size", "2048")
	}
	p, _, err := newProber(Options{Root: root, Limit: unhurried})
	must(t, err)
	p.limit = hurried / 2
	release := make(chan struct{})
	p.slow = func(name string) {
		var n int
		if fmt.Sscanf(name, "sys/block/sd%03d/", &n); n > 0 && n <= broken {
			<-release
		}
	}
	first, err := p.probe(t.Context(), unhurried)
	must(t, err)
	second, err := p.probe(t.Context(), unhurried)
	must(t, err)
	hung.Lock()
	stuck := 0
	for _, n := range hung.names {
		stuck += n
	}
	hung.Unlock()
	close(release)
	waitForHung(t)
	third, err := p.probe(t.Context(), unhurried)
	must(t, err)

	if len(first.Disks) != all-broken || !noted(first, "disks", NoteTimeout, "sd001") {
		t.Errorf("%d of %d healthy disks found", len(first.Disks), all-broken)
	}
	if len(second.Disks) != all-broken || stuck != broken {
		t.Errorf("after a second probe %d readings hang; %d were wanted, one a disk", stuck, broken)
	}
	if len(third.Disks) != all {
		t.Errorf("%d of %d disks found after all answer again", len(third.Disks), all)
	}
}

func TestCanceledProbeEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	p, _, err := newProber(Options{Root: plant(t, "raspberry-pi-4.tree")})
	must(t, err)
	release := make(chan struct{})
	begun := make(chan struct{}, 1000)
	p.slow = func(string) { begun <- struct{}{}; <-release }
	go func() { <-begun; cancel() }()
	_, err = p.probe(ctx, time.Hour)
	close(release)
	waitForHung(t)
	if err != context.Canceled {
		t.Errorf("got %v", err)
	}
}

func TestRootThatIsNoDirectoryIsRefused(t *testing.T) {
	put(t, t.TempDir(), "x", "")
	for _, root := range []string{"/does/not/exist", "/proc/version"} {
		if _, err := Probe(t.Context(), Options{Root: root}); err == nil {
			t.Errorf("%s is accepted", root)
		}
	}
}

// TestDeniedFilesAreNoted runs a second time as a user without rights, if the
// first run is root's.
func TestDeniedFilesAreNoted(t *testing.T) {
	root := os.Getenv("HW_TEST_DENIED")
	if root == "" {
		root = plant(t, "raspberry-pi-4.tree")
		must(t, os.Chmod(filepath.Dir(root), 0o755))
		for _, name := range []string{"sys/class/hwmon/hwmon2/temp1_input", "dev/i2c-1", "dev/gpiochip0"} {
			must(t, os.Chmod(filepath.Join(root, name), 0))
		}
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestDeniedFilesAreNoted$", "-test.v")
		cmd.Env = append(os.Environ(), "HW_TEST_DENIED="+root)
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			cmd.Dir = "/"
		}
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestDeniedFilesAreNoted")) {
			t.Fatalf("as an ordinary user: %v\n%s", err, out)
		}
		return
	}
	inv := probe(t, Options{Root: root})
	for section, subject := range map[string]string{"sensors": "w1_slave_temp temp1", "gpio": "gpiochip0", "buses": "/dev/i2c-1"} {
		if !noted(inv, section, NotePermission, subject) {
			t.Errorf("%s: nothing says that %s is not allowed: %+v", section, subject, inv.Notes)
		}
	}
	if len(inv.Sensors) != 2 || len(inv.Disks) != 2 {
		t.Error("what is allowed is missing")
	}
	for _, n := range inv.Notes {
		if n.Code == NotePermission && !strings.Contains(n.Text, "sudo") {
			t.Errorf("%q does not say what to do", n.Text)
		}
	}
}

func TestImplausibleValuesAreDroppedWithANote(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	for name, content := range map[string]string{
		"sys/class/thermal/thermal_zone0/temp":                 "200000\n",
		"sys/class/hwmon/hwmon2/temp1_input":                   "-127000\n",
		"sys/class/hwmon/hwmon3/fan1_input":                    "-1\n",
		"sys/block/sda/size":                                   "-8\n",
		"sys/block/mmcblk0/size":                               "9223372036854775807\n",
		"sys/class/net/eth0/speed":                             "4294967295\n",
		"proc/meminfo":                                         "MemTotal: 10 kB\nMemAvailable: 20 kB\n",
		"proc/uptime":                                          "-5 0\n",
		"sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "-1000\n",
		"sys/class/leds/ACT/brightness":                        "-3\n",
	} {
		put(t, root, name, content)
	}
	inv := probe(t, Options{Root: root})
	if len(inv.Sensors) != 0 || inv.Memory != (Memory{}) || inv.System.Uptime != 0 {
		t.Errorf("kept: %+v %+v %v", inv.Sensors, inv.Memory, inv.System.Uptime)
	}
	for _, d := range inv.Disks {
		if d.Size != 0 {
			t.Errorf("%s kept %d bytes", d.Name, d.Size)
		}
	}
	for _, n := range inv.Network {
		if n.SpeedMbps != 0 && n.Name == "eth0" {
			t.Errorf("kept %d Mbit/s", n.SpeedMbps)
		}
	}
	for _, want := range [][2]string{
		{"sensors", "cpu-thermal"}, {"sensors", "w1_slave_temp temp1"}, {"sensors", "pwmfan fan1"},
		{"disks", "sda"}, {"disks", "mmcblk0"}, {"network", "eth0"},
	} {
		if !noted(inv, want[0], NoteImplausible, want[1]) {
			t.Errorf("no note about %v: %+v", want, inv.Notes)
		}
	}
	if !noted(inv, "memory", NoteUnreadable, "") || !noted(inv, "system", NoteUnreadable, "uptime") {
		t.Errorf("no note: %+v", inv.Notes)
	}
}

func TestSleepingDevicesAreLeftAlone(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	put(t, root, "sys/block/sda/device/power/runtime_status", "suspended\n")
	put(t, root, "sys/class/hwmon/hwmon5/name", "nvme\n")
	put(t, root, "sys/class/hwmon/hwmon5/temp1_input", "40000\n")
	put(t, root, "sys/class/hwmon/hwmon5/device/power/runtime_status", "suspended\n")
	p, limit, err := newProber(Options{Root: root, Limit: unhurried})
	must(t, err)
	asked := make(chan string, 100000)
	p.slow = func(name string) { asked <- name }
	inv, err := p.probe(t.Context(), limit)
	must(t, err)
	close(asked)
	for name := range asked {
		if name == "sys/class/hwmon/hwmon5/temp1_input" || name == "sys/class/hwmon/hwmon4/temp1_input" {
			t.Errorf("%s was read, which can wake a disk", name)
		}
	}
	for _, d := range inv.Disks {
		if d.Name == "sda" && (d.Power != PowerAsleep || !noted(inv, "disks", NoteAsleep, "sda")) {
			t.Errorf("sda is %s: %+v", d.Power, inv.Notes)
		}
	}
}

func TestHealthIsAskedOnlyWhereAllowed(t *testing.T) {
	ask := func(user int, d Disk) (Power, notes) {
		p := &prober{tree: tree{root: "/"}, user: user, ask: &asking{ataSpinning, askDisk}}
		missing := p.health(&d)
		if d.Health != nil {
			t.Errorf("%+v has health without a device", d)
		}
		return d.Power, missing
	}
	for name, c := range map[string]struct {
		user  int
		disk  Disk
		power Power
		code  NoteCode
		say   string
	}{
		"not root":              {1000, Disk{Name: "none0", Bus: "nvme"}, PowerUnknown, NotePermission, "sudo"},
		"USB disk is silent":    {0, Disk{Name: "none0", Bus: "usb"}, PowerUnknown, NoteUnsupported, "sleeps"},
		"spindle does not tell": {0, Disk{Name: "none0", Bus: "sata", Rotational: true}, PowerUnknown, NoteUnsupported, "sleeps"},
		"device without a node": {0, Disk{Name: "none0", Bus: "nvme"}, PowerAwake, NoteUnreadable, "could not be read"},
	} {
		power, missing := ask(c.user, c.disk)
		if power != c.power || len(missing) != 1 || missing[0].Code != c.code || !strings.Contains(missing[0].Text, c.say) {
			t.Errorf("%s: %s, %+v", name, power, missing)
		}
	}
}

func TestNothingPrintedCanCommandATerminal(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	evil := "a\x1b[2J\x07\u202eb\xff\x00"
	put(t, root, "sys/block/sda/device/model", evil)
	put(t, root, "sys/class/hwmon/hwmon2/name", evil)
	put(t, root, "sys/class/leds/"+"e\x1bvil/brightness", "1")
	put(t, root, "sys/class/net/e\x1bth9/type", "1")
	put(t, root, "sys/bus/i2c/devices/i2c-1/name", evil)
	put(t, root, "etc/os-release", "PRETTY_NAME=\""+evil+"\"\n")
	put(t, root, "proc/self/mountinfo", "1 0 8:1 / /x\\033[2J rw - ex\x1bt4 /dev/s\\033da1 rw\n")
	inv := probe(t, Options{Root: root})
	var table bytes.Buffer
	must(t, WriteTable(&table, inv))
	raw, err := json.Marshal(inv)
	must(t, err)
	for _, out := range []string{table.String(), string(raw)} {
		for _, bad := range []string{"\x1b", "\x07", "\u202e", `\u001b`, `\u202e`, "\ufffd"} {
			if strings.Contains(out, bad) {
				t.Errorf("%q got through:\n%s", bad, out)
			}
		}
	}
}

func TestDigestIsOverTheStablePart(t *testing.T) {
	fresh := func() *Inventory {
		inv := probe(t, Options{Root: planted(t), User: new(1000)})
		inv.Disks = append(inv.Disks, Disk{Name: "sdb", Serial: "Z", Size: 1 << 40}, Disk{Name: "sdc", Size: 1 << 41})
		return inv
	}
	base := fresh().Digest()
	if len(base) != 64 || fresh().Digest() != base {
		t.Fatalf("two probes give %s and %s", base, fresh().Digest())
	}
	for name, change := range map[string]func(*Inventory){
		"time":        func(i *Inventory) { i.Taken = i.Taken.Add(time.Hour) },
		"uptime":      func(i *Inventory) { i.System.Uptime++ },
		"boot":        func(i *Inventory) { i.System.BootID = "other" },
		"user":        func(i *Inventory) { i.System.User = 0 },
		"free memory": func(i *Inventory) { i.Memory.Available /= 2 },
		"a few pages": func(i *Inventory) { i.Memory.Total -= 8192 },
		"free space":  func(i *Inventory) { i.Filesystems[0].Free, i.Filesystems[0].Used = 1, 2 },
		"temperature": func(i *Inventory) { i.Sensors[0].Value++ },
		"brightness":  func(i *Inventory) { i.LEDs[0].Level, i.LEDs[0].Trigger = 0, "timer" },
		"address":     func(i *Inventory) { i.Network[0].Addresses = []string{"192.0.2.1/24"} },
		"link":        func(i *Inventory) { i.Network[1].Up, i.Network[1].SpeedMbps = !i.Network[1].Up, 10 },
		"container": func(i *Inventory) {
			i.Network = slices.DeleteFunc(i.Network, func(n Interface) bool { return n.Kind == "virtual" })
		},
		"health": func(i *Inventory) { i.Disks[0].Health = &Health{Wear: new(3.0)} },
		"sleep":  func(i *Inventory) { i.Disks[0].Power = PowerAsleep },
		"disks swap name": func(i *Inventory) {
			i.Disks[1].Name, i.Disks[2].Name = i.Disks[2].Name, i.Disks[1].Name
			i.Disks[1], i.Disks[2] = i.Disks[2], i.Disks[1]
		},
		"notes":  func(i *Inventory) { i.Notes = nil },
		"access": func(i *Inventory) { i.GPIO[0].Access = AccessDenied },
	} {
		inv := fresh()
		change(inv)
		if inv.Digest() != base {
			t.Errorf("%s changes the digest", name)
		}
	}
	for name, change := range map[string]func(*Inventory){
		"format":      func(i *Inventory) { i.Format++ },
		"board":       func(i *Inventory) { i.Board.Name = "other" },
		"kernel":      func(i *Inventory) { i.System.Kernel += "1" },
		"processor":   func(i *Inventory) { i.CPU.Crypto = []string{"aes"} },
		"memory":      func(i *Inventory) { i.Memory.Total *= 2 },
		"disk gone":   func(i *Inventory) { i.Disks = i.Disks[1:] },
		"other disk":  func(i *Inventory) { i.Disks[1].Serial = "other" },
		"disk size":   func(i *Inventory) { i.Disks[3].Size++ },
		"partition":   func(i *Inventory) { i.Disks[0].Partitions = i.Disks[0].Partitions[:1] },
		"mount":       func(i *Inventory) { i.Filesystems = i.Filesystems[1:] },
		"own MAC":     func(i *Inventory) { i.Network[1].MAC = "00:00:00:00:00:01" },
		"sensor gone": func(i *Inventory) { i.Sensors = i.Sensors[1:] },
		"LED gone":    func(i *Inventory) { i.LEDs = i.LEDs[1:] },
		"chip gone":   func(i *Inventory) { i.GPIO = nil },
		"bus gone":    func(i *Inventory) { i.Buses = i.Buses[1:] },
	} {
		inv := fresh()
		change(inv)
		if inv.Digest() == base {
			t.Errorf("%s does not change the digest", name)
		}
	}
}

func TestRandomMACIsNotPartOfTheDigest(t *testing.T) {
	wifi := func(mac string) string {
		inv := Inventory{Network: []Interface{{Name: "wlan0", Kind: "wifi", MAC: mac}}}
		return inv.Digest()
	}
	if wifi("02:00:00:00:00:01") != wifi("02:00:00:00:00:02") {
		t.Error("a MAC that is drawn anew makes the machine a new one")
	}
}

// planted plants the Raspberry Pi once a test and not once a call.
func planted(t *testing.T) string {
	if root, ok := roots[t]; ok {
		return root
	}
	roots[t] = plant(t, "raspberry-pi-4.tree")
	t.Cleanup(func() { delete(roots, t) })
	return roots[t]
}

var roots = map[*testing.T]string{}

func TestNamesOfDisksArePrintableAndTheirFilesStillFound(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	const odd = "sd\x1b[2Jz"
	for file, text := range map[string]string{"/dev": "8:240\n", "/size": "2000\n", "/device/model": "X\n", "/" + odd + "1/partition": "1\n", "/" + odd + "1/dev": "8:241\n"} {
		put(t, root, "sys/block/"+odd+file, text)
	}
	long := "/srv/" + strings.Repeat("x", 300)
	put(t, root, "proc/self/mountinfo", "1 0 8:241 / /srv/my\\040\\040data rw - ext4 /dev/x rw\n2 0 8:242 / "+long+" rw - ext4 /dev/y rw\n")
	inv := probe(t, Options{Root: root})
	i := slices.IndexFunc(inv.Disks, func(d Disk) bool { return d.Name == "sd[2Jz" })
	if i < 0 || inv.Disks[i].Size != 1024000 || len(inv.Disks[i].Partitions) != 1 || inv.Disks[i].Partitions[0].Name != "sd[2Jz1" {
		t.Fatalf("got %+v", inv.Disks)
	}
	if len(inv.Filesystems) != 2 {
		t.Fatalf("got %+v", inv.Filesystems)
	}
	if f := inv.Filesystems[0]; f.Mount != "/srv/my data" || f.Path() != "/srv/my  data" || f.Disk != "sd[2Jz" {
		t.Errorf("got %+v", f)
	}
	if f := inv.Filesystems[1]; len(f.Mount) != 200 || f.Path() != long {
		t.Errorf("got %+v", f)
	}
}

func TestASensorThatSleepsOrFailsDoesNotChangeTheDigest(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	awake := probe(t, Options{Root: root})
	put(t, root, "sys/class/hwmon/hwmon2/device/power/runtime_status", "suspended\n")
	put(t, root, "sys/class/thermal/thermal_zone0/temp", "hot\n")
	now := probe(t, Options{Root: root})
	if len(now.Sensors) >= len(awake.Sensors) || len(now.Sensors)+len(now.Silent) != len(awake.Sensors)+len(awake.Silent) {
		t.Errorf("%d sensors and %v, then %d and %v", len(awake.Sensors), awake.Silent, len(now.Sensors), now.Silent)
	}
	raw, err := json.Marshal(now)
	must(t, err)
	var sent Inventory
	must(t, json.Unmarshal(raw, &sent))
	if now.Digest() != awake.Digest() || sent.Digest() != awake.Digest() {
		t.Error("the digest has changed, and the machine has not")
	}
}

// TestEveryFieldHasItsPlaceInTheDigest fails when a section is added, until
// somebody has decided whether it is stable.
func TestEveryFieldHasItsPlaceInTheDigest(t *testing.T) {
	decided := []string{"Format", "Taken", "Board", "System", "CPU", "Memory", "Disks", "Filesystems", "Network", "Sensors", "Silent", "LEDs", "GPIO", "Buses", "Clocks", "TPMs", "Watchdogs", "Notes"}
	for i := range reflect.TypeFor[Inventory]().NumField() {
		if name := reflect.TypeFor[Inventory]().Field(i).Name; !slices.Contains(decided, name) {
			t.Errorf("%s is new: put it into stable() or leave it out on purpose, then name it here", name)
		}
	}
}

func TestLEDsOfTheProfileAreFoundOnce(t *testing.T) {
	inv := probe(t, Options{Root: plant(t, "raspberry-pi-4.tree")})
	got := map[string]string{}
	for _, l := range inv.LEDs {
		got[l.Name] = l.Use
	}
	// led0 is another name for ACT; with both there, the first of the profile is meant.
	if want := map[string]string{"ACT": "status", "PWR": "power", "led0": ""}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v", got)
	}
}
