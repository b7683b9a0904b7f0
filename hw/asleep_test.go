package hw

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// sleepers is a machine with one disk of each kind, of which some sleep, and
// what each was asked.
type sleepers struct {
	root string

	mu    sync.Mutex
	asked map[string][]string // by disk
	read  []string            // files
}

// asks answers for a disk by its name: one called down has stopped its
// platters, one called mute tells nothing.
func (m *sleepers) asks() *asking {
	note := func(name, what string) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.asked[name] = append(m.asked[name], what)
	}
	return &asking{
		spinning: func(node string) (bool, error) {
			name := strings.TrimPrefix(node, "/dev/")
			note(name, "spinning")
			if strings.Contains(name, "mute") {
				return false, errors.New("no such command")
			}
			return !strings.Contains(name, "down"), nil
		},
		pages: func(d Disk) (pages, error) {
			note(d.Name, "pages")
			return pages{}, nil
		},
	}
}

func (m *sleepers) reads(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.read = append(m.read, name)
}

// add plants a disk. power is what the kernel says of it.
func (m *sleepers) add(t *testing.T, name, bus, power string, rotational, removable bool) {
	t.Helper()
	at := map[string]string{"sata": "pci0000:00/ata1/host0/" + name, "usb": "pci0000:00/usb1/1-1/host1/" + name, "nvme": "pci0000:00/nvme/" + name, "emmc": "mmc_host/mmc0/" + name}[bus]
	dir := "sys/devices/" + at + "/block/" + name
	flag := map[bool]string{true: "1\n", false: "0\n"}
	put(t, m.root, dir+"/size", "2048\n")
	put(t, m.root, dir+"/queue/rotational", flag[rotational])
	put(t, m.root, dir+"/removable", flag[removable])
	put(t, m.root, dir+"/device/power/runtime_status", power+"\n")
	put(t, m.root, dir+"/device/type", "MMC\n")
	// Its own thermometer, which is read through the disk.
	put(t, m.root, dir+"/device/hwmon/hwmon0/name", "drivetemp\n")
	put(t, m.root, dir+"/device/hwmon/hwmon0/temp1_input", "30000\n")
	point(t, m.root, "sys/block/"+name, "../devices/"+at+"/block/"+name)
	point(t, m.root, "sys/class/hwmon/hwmon-"+name, "../../devices/"+at+"/block/"+name+"/device/hwmon/hwmon0")
}

// TestASleepingDiskIsLeftAlone has an agent's probes and samples, over and
// over, and looks at every device file that they would open.
func TestASleepingDiskIsLeftAlone(t *testing.T) {
	m := &sleepers{root: t.TempDir(), asked: map[string][]string{}}
	m.add(t, "suspended", "sata", "suspended", true, false)
	m.add(t, "waking", "sata", "resuming", false, false)
	m.add(t, "usb-suspended", "usb", "suspended", false, false)
	m.add(t, "nvme-suspended", "nvme", "suspended", false, false)
	m.add(t, "stick", "usb", "active", false, true)
	m.add(t, "emmc", "emmc", "active", false, false)
	m.add(t, "down", "sata", "active", true, false)
	m.add(t, "usb-down", "usb", "active", false, false)
	m.add(t, "mute", "sata", "active", true, false)
	m.add(t, "usb-mute", "usb", "active", false, false)
	m.add(t, "up", "sata", "active", true, false)
	m.add(t, "ssd", "sata", "active", false, false)
	m.add(t, "nvme", "nvme", "active", false, false)
	put(t, m.root, "sys/devices/pci0000:00/usb1/1-1/idVendor", "152d\n")
	stats := map[string][10]uint64{}
	for _, name := range (tree{root: m.root}).list("sys/block") {
		stats[name] = [10]uint64{1, 8, 1}
	}
	diskstats(t, m.root, stats)

	s, now := sampled(t, m.root)
	s.prober.slow = m.reads
	const rounds = 3
	for range rounds {
		p, limit, err := newProber(Options{Root: m.root, User: new(0), Limit: unhurried})
		must(t, err)
		p.slow, p.ask = m.reads, m.asks()
		inv, err := p.probe(t.Context(), limit)
		must(t, err)
		for _, d := range inv.Disks {
			want := PowerAwake
			switch {
			case strings.Contains(d.Name, "suspended"), strings.Contains(d.Name, "down"), d.Name == "waking":
				want = PowerAsleep
			case strings.Contains(d.Name, "mute"):
				want = PowerUnknown
			}
			if d.Power != want {
				t.Errorf("%s is %q, want %q", d.Name, d.Power, want)
			}
			if answers := d.Name == "usb-down"; d.Bus == "usb" && (d.Bridge == nil || d.Bridge.SAT != answers) {
				t.Errorf("%s: bridge %+v", d.Name, d.Bridge)
			}
		}
		if got := sample(t, s); len(got.Disks) != len(stats) {
			t.Errorf("%d disks sampled of %d", len(got.Disks), len(stats))
		}
		*now = now.Add(2 * layoutAge)
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	want := map[string][]string{"down": {"spinning"}, "usb-down": {"spinning"}, "mute": {"spinning"}, "usb-mute": {"spinning"},
		"up": {"spinning", "pages"}, "ssd": {"pages"}, "nvme": {"pages"}}
	for _, name := range slices.Sorted(maps.Keys(stats)) {
		if all := slices.Repeat(want[name], rounds); !slices.Equal(m.asked[name], all) {
			t.Errorf("%s was asked %v, want %v", name, m.asked[name], all)
		}
	}
	if len(m.read) == 0 {
		t.Fatal("no file was read")
	}
	for _, name := range m.read {
		if strings.HasPrefix(name, "dev/") || strings.HasSuffix(name, "temp1_input") {
			t.Errorf("%s was read; that goes through the disk", name)
		}
	}
}

// TestOnlyTheUserWhoMayAsksADisk probes as somebody else.
func TestOnlyTheUserWhoMayAsksADisk(t *testing.T) {
	m := &sleepers{root: t.TempDir(), asked: map[string][]string{}}
	m.add(t, "up", "sata", "active", true, false)
	p, limit, err := newProber(Options{Root: m.root, User: new(1000), Limit: unhurried})
	must(t, err)
	p.ask = m.asks()
	inv, err := p.probe(t.Context(), limit)
	must(t, err)
	if len(m.asked) > 0 || len(inv.Disks) != 1 || inv.Disks[0].Power != PowerUnknown || !noted(inv, "disks", NotePermission, "up") {
		t.Errorf("asked %v: %+v", m.asked, inv.Disks)
	}
}

// TestALiveProbeAsksDisks and a recorded one does not: what is recorded answers.
func TestALiveProbeAsksDisks(t *testing.T) {
	live, _, err := newProber(Options{})
	must(t, err)
	recorded, _, err := newProber(Options{Root: t.TempDir()})
	must(t, err)
	if live.ask == nil || recorded.ask != nil {
		t.Errorf("live %v, recorded %v", live.ask, recorded.ask)
	}
}

// point makes a symbolic link in a tree.
func point(t *testing.T, root, name, target string) {
	t.Helper()
	p := filepath.Join(root, name)
	must(t, os.MkdirAll(filepath.Dir(p), 0o755))
	must(t, os.Symlink(target, p))
}
