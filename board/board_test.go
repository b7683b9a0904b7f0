package board

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestProfilesAreSound is the linter of every shipped profile.
func TestProfilesAreSound(t *testing.T) {
	all, err := Profiles()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	compatible := map[string]string{}
	dmi := map[DMI]string{}
	generic := map[string]string{}
	known := []string{"amd64", "arm64", "arm"}
	claim := func(who, what string, owner string) {
		if owner != "" {
			t.Errorf("%s and %s both claim %s; detection would depend on their names", owner, who, what)
		}
	}
	for _, p := range all {
		names = append(names, p.Name)
		for _, a := range p.Match.Arch {
			if !slices.Contains(known, a) {
				t.Errorf("%s: %q is no architecture that is built", p.Name, a)
			}
			if p.Match.generic() {
				claim(p.Name, a, generic[a])
				generic[a] = p.Name
			}
		}
		for _, c := range p.Match.Compatible {
			if !strings.Contains(c, ",") {
				t.Errorf("%s: %q has no vendor prefix", p.Name, c)
			}
			claim(p.Name, c, compatible[c])
			compatible[c] = p.Name
		}
		for _, d := range p.Match.DMI {
			claim(p.Name, d.Product, dmi[d])
			dmi[d] = p.Name
		}
		raw, err := files.ReadFile("profiles/" + p.Name + ".toml")
		if err != nil {
			t.Fatal(err)
		}
		if !p.Match.generic() && !regexp.MustCompile(`(?m)^# Source: https://\S+$`).Match(raw) {
			t.Errorf("%s states facts about a board without a line %q", p.Name, "# Source: https://…")
		}
	}
	for _, a := range known {
		if generic[a] == "" {
			t.Errorf("no generic profile for %s; an unknown board of that kind would have no name", a)
		}
	}
	for _, want := range []string{"generic-amd64", "generic-arm64", "generic-armv7", "qemu-virt-arm64", "raspberry-pi-4"} {
		if !slices.Contains(names, want) {
			t.Errorf("profile %s is not shipped", want)
		}
	}
}

func TestUnsoundProfilesAreRefused(t *testing.T) {
	good := "name = \"x\"\ntitle = \"X\"\n[match]\narch = [\"arm64\"]\n"
	if _, err := Parse("x", []byte(good)); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	for name, bad := range map[string]string{
		"no TOML":          "name = ",
		"unknown key":      good + "compatibel = [\"a,b\"]\n",
		"another name":     strings.Replace(good, `"x"`, `"y"`, 1),
		"no title":         strings.Replace(good, `"X"`, `""`, 1),
		"fits all":         "name = \"x\"\ntitle = \"X\"\n",
		"empty compatible": good + "compatible = [\"\"]\n",
		"half a DMI":       good + "dmi = [{ vendor = \"QEMU\" }]\n",
		"LED without use":  good + "[[leds]]\nnames = [\"ACT\"]\n",
		"LED without name": good + "[[leds]]\nuse = \"status\"\n",
	} {
		if _, err := Parse("x", []byte(bad)); err == nil {
			t.Errorf("%s: accepted", name)
		} else if !strings.Contains(err.Error(), "x") {
			t.Errorf("%s: the error does not name the profile: %v", name, err)
		}
	}
	if _, err := Parse("../x", []byte(strings.Replace(good, `"x"`, `"../x"`, 1))); err == nil {
		t.Error("a name with a path in it is accepted")
	}
}

func machine(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestMostSpecificProfileWins(t *testing.T) {
	for name, c := range map[string]struct {
		arch  string
		files map[string]string
		want  string
		model string
	}{
		"Raspberry Pi, 64 bit": {"arm64", map[string]string{
			"proc/device-tree/compatible": "raspberrypi,4-model-b\x00brcm,bcm2711\x00",
			"proc/device-tree/model":      "Raspberry Pi 4 Model B Rev 1.4\x00",
		}, "raspberry-pi-4", "Raspberry Pi 4 Model B Rev 1.4"},
		"Raspberry Pi, 32 bit": {"arm", map[string]string{
			"proc/device-tree/compatible": "raspberrypi,4-model-b\x00brcm,bcm2711\x00",
		}, "raspberry-pi-4", ""},
		"QEMU by device tree": {"arm64", map[string]string{
			"proc/device-tree/compatible": "linux,dummy-virt\x00",
		}, "qemu-virt-arm64", ""},
		"QEMU by ACPI": {"arm64", map[string]string{
			"sys/class/dmi/id/sys_vendor":   "QEMU\n",
			"sys/class/dmi/id/product_name": "KVM Virtual Machine\n",
		}, "qemu-virt-arm64", "KVM Virtual Machine"},
		"QEMU, 32 bit":        {"arm", map[string]string{"proc/device-tree/compatible": "linux,dummy-virt\x00"}, "generic-armv7", ""},
		"unknown ARM board":   {"arm64", map[string]string{"proc/device-tree/compatible": "acme,one\x00"}, "generic-arm64", ""},
		"PC":                  {"amd64", map[string]string{"sys/class/dmi/id/product_name": "NUC7i3BNH\n"}, "generic-amd64", "NUC7i3BNH"},
		"silent machine":      {"amd64", nil, "generic-amd64", ""},
		"unknown processor":   {"riscv64", nil, "", ""},
		"terminal escapes":    {"amd64", map[string]string{"sys/class/dmi/id/product_name": "\x1b[31mred\u202e\n"}, "generic-amd64", "[31mred"},
		"empty compatible":    {"arm64", map[string]string{"proc/device-tree/compatible": ""}, "generic-arm64", ""},
		"second name matches": {"arm64", map[string]string{"proc/device-tree/compatible": "acme,clone\x00raspberrypi,4-model-b\x00"}, "raspberry-pi-4", ""},
	} {
		b := detect(machine(t, c.files), c.arch)
		if b.Name != c.want || b.Model != c.model {
			t.Errorf("%s: got %q (%q), want %q (%q)", name, b.Name, b.Model, c.want, c.model)
		}
	}
}

func TestFIFODoesNotHangDetection(t *testing.T) {
	root := machine(t, map[string]string{"proc/device-tree/compatible": "linux,dummy-virt\x00"})
	if err := syscall.Mkfifo(filepath.Join(root, "proc/device-tree/model"), 0o644); err != nil {
		t.Fatal(err)
	}
	if b := detect(root, "arm64"); b.Name != "qemu-virt-arm64" || b.Model != "" {
		t.Errorf("got %+v", b)
	}
}

func TestThisMachineHasABoard(t *testing.T) {
	if b := Detect("/"); b.Name == "" || b.Title == "" {
		t.Errorf("this machine is no board: %+v", b)
	}
}

func FuzzParse(f *testing.F) {
	all, err := files.ReadDir("profiles")
	if err != nil {
		f.Fatal(err)
	}
	for _, e := range all {
		raw, err := files.ReadFile("profiles/" + e.Name())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := Parse("x", raw)
		if err == nil && (p.Name != "x" || p.Title == "") {
			t.Errorf("an unsound profile is accepted: %+v", p)
		}
	})
}
