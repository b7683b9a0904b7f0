package hw

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func record(tb testing.TB, o RecordOptions) (*Inventory, string) {
	tb.Helper()
	o.Dir = filepath.Join(tb.TempDir(), "record")
	inv, err := Record(tb.Context(), o)
	must(tb, err)
	return inv, o.Dir
}

// withoutMoment takes out what a record does not keep, or what is new with each reading.
func withoutMoment(tb testing.TB, inv *Inventory) string {
	inv.System.Root, inv.Notes = "", nil
	for i := range inv.Network {
		inv.Network[i].Addresses = nil
	}
	for i := range inv.Filesystems {
		inv.Filesystems[i].Total, inv.Filesystems[i].Used, inv.Filesystems[i].Free = 0, 0, 0
	}
	for i := range inv.GPIO { // periph knows more than an old kernel's sysfs
		inv.GPIO[i].Label, inv.GPIO[i].Lines = "", 0
	}
	inv.Memory = Memory{Total: inv.Memory.Total} // read once more for the record
	inv.CPU.MaxMHz = 0
	raw, err := json.MarshalIndent(inv, "", " ")
	must(tb, err)
	return string(raw)
}

func TestRecordShowsTheSameMachine(t *testing.T) {
	for name, root := range map[string]string{"this machine": "/", "a recorded one": plant(t, "raspberry-pi-4.tree"), "QEMU's": plant(t, "qemu-virt-arm64.tree")} {
		live, dir := record(t, RecordOptions{Options: Options{Root: root}, Exact: true})
		again := probe(t, Options{Root: dir})
		if again.Digest() != live.Digest() {
			t.Errorf("%s: another digest", name)
		}
		if got, want := withoutMoment(t, again), withoutMoment(t, live); got != want {
			t.Errorf("%s: recorded as\n%s\nbut it was\n%s", name, got, want)
		}
	}
}

func TestRecordExtractsSafely(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	must(t, os.Symlink("/etc/../../../../outside", filepath.Join(root, "sys/class/net/eth7")))
	must(t, os.MkdirAll(filepath.Join(root, "outside"), 0o755))
	put(t, root, "outside/type", "1\n")
	_, dir := record(t, RecordOptions{Options: Options{Root: root}})
	links := 0
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		must(t, err)
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			links++
			target, err := os.Readlink(p)
			must(t, err)
			if to := filepath.Join(filepath.Dir(p), target); filepath.IsAbs(target) || !strings.HasPrefix(to, dir+"/") {
				t.Errorf("%s leads to %s, outside of the record", p, target)
			}
		case !d.IsDir() && !d.Type().IsRegular():
			t.Errorf("%s is a %s", p, d.Type())
		}
		return nil
	}))
	if links == 0 {
		t.Error("no link was recorded, so none was looked at")
	}
}

// TestRecordNamesNobody looks for everything that identifies a machine or a
// person in every name and content of a record.
func TestRecordNamesNobody(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	// Addresses that no time of day looks like: a record says when it was taken.
	put(t, root, "sys/class/net/eth0/address", "dc:a6:32:a1:a2:a3\n")
	put(t, root, "sys/class/net/wlan0/address", "dc:a6:32:a1:a2:a4\n")
	put(t, root, "sys/class/net/wlx00c0ca919293/type", "1\n")
	put(t, root, "sys/class/net/wlx00c0ca919293/address", "00:c0:ca:91:92:93\n")
	put(t, root, "sys/block/nvme0n1/device/model", "Disk\n")
	put(t, root, "sys/block/nvme0n1/wwid", "nvme.1234-53455249414c31-4d4f44454c-00000001\n")
	put(t, root, "sys/block/nvme0n1/device/serial", "SERIAL1\n")
	info, err := os.ReadFile(filepath.Join(root, "proc/cpuinfo"))
	must(t, err)
	put(t, root, "proc/cpuinfo", string(info)+"\nSerial\t\t: 10000000abcdef12\n")
	mounts, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	must(t, err)
	put(t, root, "proc/self/mountinfo", string(mounts)+
		"60 24 8:1 / /media/alice/Stick rw - ext4 /dev/sda1 rw\n61 24 0:70 / /mnt/x rw - nfs4 nas.alice.example:/x rw\n62 24 0:71 / /home/alice/y rw - fuse.sshfs alice@host: rw\n")
	secrets := []string{
		"WX11A22B3C4D", "1f2e3d4c", "a2:a3", "a2:a4", "00000a1b2c3d", "919293", "91:92:93", "53455249414c31", "SERIAL1", "10000000abcdef12",
		"alice", "nas:", "7c0e7d0a-1c8e-4b7c-9a40-0d3f6c1f3c55",
	}
	exact := ""
	for _, keep := range []bool{true, false} {
		_, dir := record(t, RecordOptions{Options: Options{Root: root}, Exact: keep})
		all := packed(t, dir)
		if keep {
			exact = all
		}
		for _, secret := range secrets {
			if strings.Contains(all, secret) != keep && !keep {
				t.Errorf("%q is in the record", secret)
			}
			if !strings.Contains(exact, secret) {
				t.Errorf("%q is not in the exact record, so nothing was tested", secret)
			}
		}
		if keep {
			continue
		}
		// Replaced the same everywhere: the machine is still one.
		inv := probe(t, Options{Root: dir})
		var wlan *Interface
		for i := range inv.Network {
			if strings.HasPrefix(inv.Network[i].Name, "wlx00c0ca") {
				wlan = &inv.Network[i]
			}
		}
		if wlan == nil || wlan.Name != "wlx"+strings.ReplaceAll(wlan.MAC, ":", "") {
			t.Errorf("name and address of an interface no longer fit: %+v", wlan)
		}
		serial := regexp.MustCompile(`^[A-F]{2}\d{2}[A-F]\d{2}[A-F]\d[A-F]\d[A-F]$`)
		for _, d := range inv.Disks {
			if d.Name == "sda" && !serial.MatchString(d.Serial) {
				t.Errorf("serial number became %q", d.Serial)
			}
		}
	}
}

func TestRecordNeedsAnEmptyFolder(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "mine", "precious")
	if _, err := Record(t.Context(), RecordOptions{Options: Options{Root: t.TempDir()}, Dir: dir}); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("got %v", err)
	}
	if raw, err := os.ReadFile(filepath.Join(dir, "mine")); err != nil || string(raw) != "precious" {
		t.Errorf("what was there is now %q, %v", raw, err)
	}
}

func TestRecordIsBounded(t *testing.T) {
	s := &sightings{files: map[string][]byte{}, names: map[string]bool{}}
	for range recordBytes/maxFile + 1 {
		s.file("a"+strings.Repeat("x", len(s.files)), bytes.Repeat([]byte{1}, maxFile))
	}
	w := &recordWriter{root: t.TempDir(), dir: t.TempDir(), mask: strings.NewReplacer()}
	if err := w.write(s); err == nil {
		t.Error("a record of any size is written")
	}
	late := &sightings{files: map[string][]byte{}, names: map[string]bool{}}
	late.close()
	late.file("x", nil)
	late.asked("y")
	if len(late.files)+len(late.names) != 0 {
		t.Error("a reading that came back late is still kept")
	}
}

func TestDamagedRecordIsRefusedOrNoted(t *testing.T) {
	for content, want := range map[string]string{
		"{":                          "machine.json",
		`{"format":2}`:               "format 2",
		`{"format":1,"user":"root"}`: "machine.json",
	} {
		root := t.TempDir()
		put(t, root, recordAbout, content)
		if _, err := Probe(t.Context(), Options{Root: root}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", content, err)
		}
	}
	root := plant(t, "qemu-virt-arm64.tree")
	put(t, root, recordHealth+"nvme0n1.nvme", "short")
	inv := probe(t, Options{Root: root})
	if inv.Disks[0].Health != nil || !noted(inv, "disks", NoteUnreadable, "nvme0n1") {
		t.Errorf("%+v", inv.Notes)
	}
}
