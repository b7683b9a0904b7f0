package hw

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// TestAThousandDisks probes a machine with many more disks than any has.
func TestAThousandDisks(t *testing.T) {
	root := inMemory(t)
	const all = 1000
	var mounts strings.Builder
	for n := range all {
		dev := fmt.Sprintf("sys/devices/pci0000:00/ata%d/host%d/target%d:0:0/%d:0:0:0", n, n, n, n)
		name := fmt.Sprintf("sd%04d", n)
		put(t, root, dev+"/model", "Disk\n")
		put(t, root, dev+"/vpd_pg80", fmt.Sprintf("\x00\x80\x00\x08SER%05d", n))
		put(t, root, dev+"/block/"+name+"/size", "2048\n")
		put(t, root, dev+"/block/"+name+"/dev", fmt.Sprintf("8:%d\n", n))
		put(t, root, dev+"/block/"+name+"/"+name+"1/partition", "1\n")
		put(t, root, dev+"/block/"+name+"/"+name+"1/size", "1024\n")
		put(t, root, dev+"/block/"+name+"/"+name+"1/dev", fmt.Sprintf("9:%d\n", n))
		must(t, os.Symlink("../../../"+fmt.Sprintf("%d:0:0:0", n), filepath.Join(root, dev, "block", name, "device")))
		must(t, os.MkdirAll(filepath.Join(root, "sys/block"), 0o755))
		must(t, os.Symlink("../devices/"+strings.TrimPrefix(dev, "sys/devices/")+"/block/"+name, filepath.Join(root, "sys/block", name)))
		fmt.Fprintf(&mounts, "%d 1 9:%d / /srv/%d rw - ext4 /dev/%s1 rw\n", n+30, n, n, name)
	}
	put(t, root, "proc/self/mountinfo", mounts.String())
	begun := time.Now()
	inv := probe(t, Options{Root: root})
	t.Logf("%d disks in %v", all, time.Since(begun))
	if len(inv.Disks) != all || len(inv.Filesystems) != all {
		t.Fatalf("%d disks and %d filesystems were found of %d", len(inv.Disks), len(inv.Filesystems), all)
	}
	for n, d := range inv.Disks {
		if d.Bus != "sata" || d.Serial != fmt.Sprintf("SER%05d", n) || !slices.Equal(d.Partitions[0].Mounts, []string{fmt.Sprintf("/srv/%d", n)}) {
			t.Fatalf("got %+v", d)
		}
	}
	for _, n := range inv.Notes {
		if n.Code == NoteTimeout || len(n.Text) > 500 {
			t.Errorf("got %+v", n.Text)
		}
	}
	checkTable(t, inv)
}

// inMemory is a folder for a tree of many files.
func inMemory(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "hw-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestEachSectionMayHang hangs one directory of the kernel's after another, as
// a device does: the probe must end, say so, and lose nothing else.
func TestEachSectionMayHang(t *testing.T) {
	root := func(t *testing.T) string {
		root := plant(t, "raspberry-pi-4.tree")
		put(t, root, "sys/class/rtc/rtc0/date", "2026-01-02\n")
		put(t, root, "sys/class/tpm/tpm0/tpm_version_major", "2\n")
		return root
	}
	whole := sizes(probe(t, Options{Root: root(t)}))
	for section, prefix := range map[string]string{
		"system": "proc/uptime", "disks": "sys/block/sda", "filesystems": "proc/self/mountinfo", "network": "sys/class/net/",
		"sensors": "sys/class/thermal/", "leds": "sys/class/leds/", "buses": "sys/bus/i2c/", "clocks": "sys/class/rtc/",
		"tpms": "sys/class/tpm/", "watchdogs": "sys/class/watchdog/",
	} {
		t.Run(section, func(t *testing.T) {
			t.Parallel()
			p, limit, err := newProber(Options{Root: root(t), Limit: hurried})
			must(t, err)
			release := make(chan struct{})
			p.slow = func(name string) {
				if strings.HasPrefix(name, prefix) {
					<-release
				}
			}
			inv, err := p.probe(t.Context(), limit)
			close(release)
			must(t, err)
			waitForHung(t)
			if !slices.ContainsFunc(inv.Notes, func(n Note) bool { return n.Section == section && n.Code == NoteTimeout }) {
				t.Errorf("nothing says that it hangs: %+v", inv.Notes)
			}
			for name, n := range sizes(inv) {
				if name != section && !(name == "gpio" && section == "buses") && n != whole[name] {
					t.Errorf("of %s there are %d and not %d", name, n, whole[name])
				}
			}
		})
	}
}

func sizes(inv *Inventory) map[string]int {
	return map[string]int{
		"system": len(inv.System.Kernel), "disks": len(inv.Disks), "filesystems": len(inv.Filesystems), "network": len(inv.Network),
		"sensors": len(inv.Sensors), "leds": len(inv.LEDs), "buses": len(inv.Buses), "gpio": len(inv.GPIO),
		"clocks": len(inv.Clocks), "tpms": len(inv.TPMs), "watchdogs": len(inv.Watchdogs),
	}
}

func TestOddKeepersAreNotedAndDropped(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"sys/class/rtc/rtc0/date": "9999-01-01\n", "sys/class/rtc/rtc1/date": "x\n", "sys/class/rtc/rtc2/name": "rtc-ds1307 1-0068\n",
		"sys/class/rtc/rtc3/date": "2000-01-01\n", "sys/class/rtc/rtc3/hctosys": "1\n",
		"sys/class/tpm/tpm0/tpm_version_major": "9\n", "sys/class/tpm/tpm1/pcrs": "PCR-00\n", "sys/class/tpm/tpm2/tpm_version_major": "2\n",
		"sys/class/watchdog/watchdog0/timeout": "-1\n", "sys/class/watchdog/watchdog1/dev": "250:1\n", "sys/class/watchdog/watchdog2/timeout": "9223372036854775807\n",
		"sys/class/watchdog/watchdog3/timeout": "60\n", "sys/class/watchdog/watchdog3/state": "active\n", "sys/class/watchdog/watchdog3/bootstatus": "33\n",
	} {
		put(t, root, name, content)
	}
	inv := probe(t, Options{Root: root})
	for _, want := range []struct {
		section, subject string
		code             NoteCode
	}{
		{"clocks", "rtc0", NoteImplausible}, {"clocks", "rtc1", NoteImplausible}, {"clocks", "rtc2", NoteUnreadable},
		{"tpms", "tpm0", NoteImplausible}, {"watchdogs", "watchdog0", NoteImplausible}, {"watchdogs", "watchdog1", NoteUnsupported}, {"watchdogs", "watchdog2", NoteImplausible},
	} {
		if !noted(inv, want.section, want.code, want.subject) {
			t.Errorf("no %s note about %s: %+v", want.code, want.subject, inv.Notes)
		}
	}
	years := []int{}
	for _, c := range inv.Clocks {
		years = append(years, c.Year)
	}
	if !slices.Equal(years, []int{0, 0, 0, 2000}) || inv.Clocks[2].Driver != "rtc-ds1307" || !inv.Clocks[3].System {
		t.Errorf("clocks %+v", inv.Clocks)
	}
	if len(inv.TPMs) != 2 || inv.TPMs[0].Version != 1 || inv.TPMs[1].Version != 2 {
		t.Errorf("TPMs %+v", inv.TPMs)
	}
	w := inv.Watchdogs
	if len(w) != 4 || w[0].Timeout != 0 || w[2].Timeout != 0 || w[3] != (Watchdog{Name: "watchdog3", Timeout: 60, Active: true, FiredLast: true, Access: AccessNoNode}) {
		t.Errorf("watchdogs %+v", w)
	}
}

func TestAHungClockDoesNotHideAnother(t *testing.T) {
	root := t.TempDir()
	put(t, root, "sys/class/rtc/rtc0/date", "2026-01-02\n")
	put(t, root, "sys/class/rtc/rtc1/date", "2026-01-02\n")
	p, limit, err := newProber(Options{Root: root, Limit: hurried})
	must(t, err)
	release := make(chan struct{})
	p.slow = func(name string) {
		if strings.HasPrefix(name, "sys/class/rtc/rtc0/") {
			<-release
		}
	}
	inv, err := p.probe(t.Context(), limit)
	close(release)
	must(t, err)
	waitForHung(t)
	if len(inv.Clocks) != 1 || inv.Clocks[0].Name != "rtc1" || !noted(inv, "clocks", NoteTimeout, "rtc0") {
		t.Errorf("%+v %+v", inv.Clocks, inv.Notes)
	}
}

// TestWatchdogIsNotOpened probes one whose device would tell if it were.
func TestWatchdogIsNotOpened(t *testing.T) {
	root := t.TempDir()
	put(t, root, "sys/class/watchdog/watchdog0/timeout", "60\n")
	p, limit, err := newProber(Options{Root: root, Limit: unhurried})
	must(t, err)
	read := make(chan string, 10_000)
	p.slow = func(name string) { read <- name }
	_, err = p.probe(t.Context(), limit)
	must(t, err)
	close(read)
	for name := range read {
		if strings.HasPrefix(name, "dev/") {
			t.Errorf("%s was opened; that arms a watchdog", name)
		}
	}
}

func TestMirroredSystemIsOnBothDisks(t *testing.T) {
	root := t.TempDir()
	for i, name := range []string{"sda", "sdb", "sdc"} {
		put(t, root, "sys/block/"+name+"/device/model", "Disk")
		put(t, root, "sys/block/"+name+"/"+name+"1/partition", "1")
		put(t, root, "sys/block/"+name+"/"+name+"1/dev", fmt.Sprintf("8:%d", 16*i+1))
	}
	put(t, root, "sys/dev/block/9:0/slaves/sda1/dev", "8:1")
	put(t, root, "sys/dev/block/9:0/slaves/sdb1/dev", "8:17")
	put(t, root, "proc/self/mountinfo", "1 0 9:0 / / rw - ext4 /dev/md0 rw\n2 0 8:33 / /srv rw - ext4 /dev/sdc1 rw\n")
	inv := probe(t, Options{Root: root})
	for _, d := range inv.Disks {
		if d.System != (d.Name != "sdc") || len(d.Partitions[0].Mounts) != 1 {
			t.Errorf("%+v", d)
		}
	}
	if inv.Filesystems[0].Disk != "sda" {
		t.Errorf("%+v", inv.Filesystems[0])
	}
}

// loopDevice attaches a file to a loop device of this kernel, where that is allowed.
func loopDevice(t *testing.T) string {
	t.Helper()
	testenv.Root(t, "attaching a loop device needs root")
	file := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, 64<<20))
	run := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	dev, err := run("losetup", "--find", "--show", file)
	if err != nil {
		testenv.Cannot(t, "no loop device here: %v %s", err, dev)
	}
	t.Cleanup(func() {
		if out, err := run("losetup", "--detach", dev); err != nil {
			t.Errorf("detach %s: %v %s", dev, err, out)
		}
	})
	return dev
}

// TestRealFilesystemOnALoopDeviceIsMeasured mounts one and compares with what
// the kernel's own sysfs and statfs say.
func TestRealFilesystemOnALoopDeviceIsMeasured(t *testing.T) {
	dev := loopDevice(t)
	point := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), testenv.Tool(t, "mkfs.ext4", "e2fsprogs"), "-q", dev).CombinedOutput(); err != nil {
		t.Fatalf("no file system could be made: %v %s", err, out)
	}
	if out, err := exec.CommandContext(t.Context(), "mount", dev, point).CombinedOutput(); err != nil {
		testenv.Cannot(t, "mounting is not allowed here: %v %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("umount", point).Run() })
	inv := probe(t, Options{})
	i := slices.IndexFunc(inv.Filesystems, func(f Filesystem) bool { return f.Mount == point })
	if i < 0 {
		t.Fatalf("%s is not among %+v", point, inv.Filesystems)
	}
	f := inv.Filesystems[i]
	if f.Type != "ext4" || f.Source != dev || f.Total < 32<<20 || f.Total > 64<<20 || f.Free == 0 || f.Free > f.Total || f.ReadOnly {
		t.Errorf("got %+v", f)
	}
	if slices.ContainsFunc(inv.Disks, func(d Disk) bool { return "/dev/"+d.Name == dev }) {
		t.Errorf("%s is shown as a disk", dev)
	}
	if out, err := exec.CommandContext(t.Context(), "mount", "-o", "remount,ro", point).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	inv = probe(t, Options{})
	if i := slices.IndexFunc(inv.Filesystems, func(f Filesystem) bool { return f.Mount == point }); i >= 0 && !inv.Filesystems[i].ReadOnly {
		t.Error("that it was remounted read-only is not seen")
	}
}
