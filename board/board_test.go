package board

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unicode"
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
			if p.Match.generic() {
				claim(p.Name, a, generic[a])
				generic[a] = p.Name
			}
		}
		for _, c := range p.Match.Compatible {
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
	for _, want := range []string{"deimos", "generic-amd64", "generic-arm64", "generic-armv7", "qemu-virt-arm64", "raspberry-pi-4", "raspberry-pi-5", "rock-5b"} {
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
		"escape in title":  strings.Replace(good, `"X"`, `"\u001b[31m"`, 1),
		"fits all":         "name = \"x\"\ntitle = \"X\"\n",
		"strange arch":     strings.Replace(good, `"arm64"`, `"riscv64"`, 1),
		"empty compatible": good + "compatible = [\"\"]\n",
		"no vendor":        good + "compatible = [\"box\"]\n",
		"all vendors":      good + "compatible = [\"*,box\"]\n",
		"any ending":       good + "compatible = [\"deimos,b*\"]\n",
		"half a DMI":       good + "dmi = [{ vendor = \"QEMU\" }]\n",
		"LED without use":  good + "[[leds]]\nnames = [\"ACT\"]\n",
		"LED without name": good + "[[leds]]\nuse = \"status\"\n",
		"LED twice":        good + "[[leds]]\nuse = \"status\"\nnames = [\"A\"]\n[[leds]]\nuse = \"status\"\nnames = [\"B\"]\n",
		"LED with a path":  good + "[[leds]]\nuse = \"status\"\nnames = [\"../../block\"]\n",
		"LED dots":         good + "[[leds]]\nuse = \"status\"\nnames = [\"..\"]\n",
		"LED name, line":   good + "[[leds]]\nuse = \"status\"\nnames = [\"A\"]\nline = { chip = \"c\", offset = 1 }\n",
		"line, no chip":    good + "[[leds]]\nuse = \"status\"\nline = { offset = 1 }\n",
		"line below 0":     good + "[button]\nuse = \"reset\"\nline = { chip = \"c\", offset = -1 }\n",
		"line too far":     good + "[button]\nuse = \"reset\"\nline = { chip = \"c\", offset = 70000 }\n",
		"pull":             good + "[button]\nuse = \"reset\"\nline = { chip = \"c\", offset = 1, pull = \"left\" }\n",
		"button's use":     good + "[button]\nuse = \"format\"\nline = { chip = \"c\", offset = 1 }\n",
		"sensor nameless":  good + "[[sensors]]\ndriver = \"d\"\nbus = \"b\"\n",
		"sensor driver":    good + "[[sensors]]\nname = \"n\"\nbus = \"b\"\n",
		"sensor bus":       good + "[[sensors]]\nname = \"n\"\ndriver = \"d\"\n",
		"sensors alike":    good + strings.Repeat("[[sensors]]\nname = \"n\"\ndriver = \"d\"\nbus = \"b\"\n", 2),
		"sensor too often": sensor("every = \"1ms\""),
		"no such time":     sensor("every = \"often\""),
		"shunt":            sensor("shunt_ohm = nan"),
		"shunt below 0":    sensor("shunt_ohm = -0.1"),
		"calibration kind": sensor("calibration = [{ kind = \"smell\" }]"),
		"scale 0":          sensor("calibration = [{ kind = \"fan\", scale = 0.0 }]"),
		"scale nan":        sensor("calibration = [{ kind = \"fan\", scale = nan }]"),
		"scale inf":        sensor("calibration = [{ kind = \"fan\", scale = inf }]"),
		"offset inf":       sensor("calibration = [{ kind = \"fan\", offset = -inf }]"),
		"calibrated twice": sensor("calibration = [{ kind = \"fan\" }, { kind = \"fan\" }]"),
		"no bus":           good + "[disks]\nnever = [\"floppy\"]\n",
		"bus twice":        good + "[disks]\nnever = [\"sd\", \"sd\"]\n",
		"warm at critical": good + "[thermal]\nwarm = 80.0\ncritical = 80.0\n",
		"absurdly hot":     good + "[thermal]\ncritical = 200.0\n",
		"absurdly cold":    good + "[thermal]\nwarm = 5.0\n",
		"no temperature":   good + "[thermal]\nwarm = nan\n",
		"slots":            "slots = \"floppy\"\n" + good,
		"watchdog":         "watchdog = \"" + strings.Repeat("w", 32) + "\"\n" + good,
		"65 LED names":     good + "[[leds]]\nuse = \"status\"\nnames = [" + strings.Repeat("\"a\",", 65) + "]\n",
		"too large":        good + "#" + strings.Repeat("x", maxFile),
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

func sensor(more string) string {
	return "name = \"x\"\ntitle = \"X\"\n[match]\narch = [\"arm64\"]\n[[sensors]]\nname = \"n\"\ndriver = \"d\"\nbus = \"b\"\n" + more + "\n"
}

func TestSoundFactsAreTaken(t *testing.T) {
	p, err := Parse("x", []byte(`
name = "x"
title = "Ä box"
slots = "uki"
watchdog = "Some Watchdog"
[match]
compatible = ["acme,box", "acme,*"]
[[leds]]
use = "status"
line = { chip = "pinctrl", offset = 17, active_low = true }
[button]
use = "reset"
line = { chip = "pinctrl", offset = 3, pull = "up" }
[[sensors]]
name = "outside"
driver = "bmxx80"
bus = "/dev/i2c-1"
address = "0x76"
every = "30s"
calibration = [{ kind = "temperature", scale = 1.01, offset = -0.5 }, { kind = "humidity" }]
[disks]
never = ["sd", "usb"]
system = true
[thermal]
warm = 70
critical = 85.5
`))
	if err != nil {
		t.Fatal(err)
	}
	if p.Button.Line.Offset != 3 || *p.Sensors[0].Calibration[0].Scale != 1.01 || !p.Disks.System || p.Thermal.Warm != 70 {
		t.Errorf("%+v", p)
	}
}

func TestEveryProblemIsListed(t *testing.T) {
	_, err := Parse("x", []byte("name = \"y\"\ntitel = \"X\"\n[match]\narch = [\"z80\"]\n\n[disks]\nnevr = [\"sd\"]\n"))
	var bad *Invalid
	if !errors.As(err, &bad) || len(bad.Problems) != 5 {
		t.Fatalf("%v", err)
	}
	if bad.Problems[0].Line != 2 || bad.Problems[1].Line != 7 {
		t.Errorf("lines: %+v", bad.Problems)
	}
	_, err = Parse("x", []byte("name = \"x\"\ntitle = \n"))
	if !errors.As(err, &bad) || bad.Problems[0].Line != 2 {
		t.Errorf("the line of a syntax error: %v", err)
	}
}

// own is a folder with profiles of an owner.
func own(t *testing.T, files map[string]string) string {
	t.Helper()
	return machine(t, files)
}

func profile(name, match string) string {
	return "name = \"" + name + "\"\ntitle = \"The owner's\"\n[match]\n" + match + "\n"
}

func TestOwnersProfilesReplaceAndPrecedeEmbeddedOnes(t *testing.T) {
	pi := machine(t, map[string]string{"proc/device-tree/compatible": "raspberrypi,4-model-b\x00brcm,bcm2711\x00"})
	for what, c := range map[string]struct {
		file, text, want string
	}{
		"same name":             {"raspberry-pi-4.toml", profile("raspberry-pi-4", `compatible = ["raspberrypi,4-model-b"]`), "raspberry-pi-4"},
		"as specific":           {"zz.toml", profile("zz", `compatible = ["raspberrypi,4-model-b"]`), "zz"},
		"less specific":         {"zz.toml", profile("zz", `compatible = ["brcm,bcm2711"]`), "raspberry-pi-4"},
		"vendor, less specific": {"zz.toml", profile("zz", `compatible = ["raspberrypi,*"]`), "raspberry-pi-4"},
		"same name, no match":   {"raspberry-pi-4.toml", profile("raspberry-pi-4", `compatible = ["acme,box"]`), "generic-arm64"},
		"of another arch":       {"zz.toml", profile("zz", "arch = [\"amd64\"]\ncompatible = [\"raspberrypi,4-model-b\"]"), "raspberry-pi-4"},
	} {
		set, problems := Load(own(t, map[string]string{c.file: c.text}))
		if len(problems) > 0 {
			t.Fatal(what, problems)
		}
		b := set.detect(pi, "arm64")
		if b.Name != c.want {
			t.Errorf("%s: got %s, want %s", what, b.Name, c.want)
		}
		if what == "same name" && (b.Title != "The owner's" || len(b.LEDs) > 0) {
			t.Errorf("the embedded profile was not replaced: %+v", b)
		}
	}
	if b := Detect(pi); b.Title == "The owner's" {
		t.Error("an owner's profile is among the embedded ones")
	}
}

func TestABadFileIsLeftOutAndReported(t *testing.T) {
	dir := own(t, map[string]string{
		"good.toml":    profile("good", `compatible = ["acme,box"]`),
		"broken.toml":  "name =",
		"huge.toml":    profile("huge", `compatible = ["acme,box"]`) + "#" + strings.Repeat("x", maxFile),
		"README":       "not read",
		".hidden.toml": "not read",
	})
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo.toml"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"zero.toml": "/dev/zero", "loop.toml": "loop.toml", "dir.toml": "/proc", "gone.toml": "nowhere"} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	set, problems := Load(dir)
	if len(problems) != 6 { // broken, huge, fifo, zero, loop, dir; what is gone is no problem
		t.Errorf("%d problems: %v", len(problems), problems)
	}
	for _, err := range problems {
		if !strings.Contains(err.Error(), dir) || len(err.Error()) > 1000 {
			t.Errorf("which file? %v", err)
		}
	}
	b := set.detect(machine(t, map[string]string{"proc/device-tree/compatible": "acme,box\x00"}), "arm64")
	if b.Name != "good" {
		t.Errorf("the good one is not used: %+v", b)
	}
	if n := len(set.Profiles()); n != len(Builtin().Profiles())+1 {
		t.Errorf("%d profiles", n)
	}
}

func TestAFolderIsReadOnlySoFar(t *testing.T) {
	dir := t.TempDir()
	for i := range maxProfiles + 10 {
		name := "p" + strconv.Itoa(i)
		if err := os.WriteFile(filepath.Join(dir, name+".toml"), []byte(profile(name, `compatible = ["acme,box"]`)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set, problems := Load(dir)
	if n := len(set.Profiles()) - len(Builtin().Profiles()); n != maxProfiles || len(problems) != 1 {
		t.Errorf("%d of them, %v", n, problems)
	}
	if _, problems := Load(filepath.Join(dir, "p1.toml")); len(problems) != 1 {
		t.Errorf("a file instead of a folder: %v", problems)
	}
	if _, problems := Load(filepath.Join(dir, "missing")); len(problems) != 0 {
		t.Errorf("no folder: %v", problems)
	}
}

func TestAnOwnerCanNameTheBoard(t *testing.T) {
	root := machine(t, map[string]string{"proc/device-tree/model": "Clone\x00"})
	b, err := Builtin().Named(root, "rock-5b")
	if err != nil || b.Name != "rock-5b" || b.Model != "Clone" || len(b.LEDs) == 0 {
		t.Errorf("%+v %v", b, err)
	}
	if _, err := Builtin().Named(root, "rock-6"); err == nil || !strings.Contains(err.Error(), "rock-5b") {
		t.Errorf("an error that does not name what there is: %v", err)
	}
	if b, err := Builtin().Named(root, ""); err != nil || b.Name == "" {
		t.Errorf("no name does not detect: %+v %v", b, err)
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
		"Raspberry Pi 5":      {"arm64", map[string]string{"proc/device-tree/compatible": "raspberrypi,5-model-b\x00brcm,bcm2712\x00"}, "raspberry-pi-5", ""},
		"ROCK 5B":             {"arm64", map[string]string{"proc/device-tree/compatible": "radxa,rock-5b\x00rockchip,rk3588\x00"}, "rock-5b", ""},
		"some Deimos":         {"arm64", map[string]string{"proc/device-tree/compatible": "deimos,box-7\x00rockchip,rk3588\x00"}, "deimos", ""},
		"Deimos on a Pi":      {"arm64", map[string]string{"proc/device-tree/compatible": "deimos,box-7\x00raspberrypi,4-model-b\x00"}, "deimos", ""},
		"no Deimos":           {"arm64", map[string]string{"proc/device-tree/compatible": "deimosx,box\x00deimos\x00"}, "generic-arm64", ""},
		"second name matches": {"arm64", map[string]string{"proc/device-tree/compatible": "acme,clone\x00raspberrypi,4-model-b\x00"}, "raspberry-pi-4", ""},
	} {
		b := Builtin().detect(machine(t, c.files), c.arch)
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
	if b := Builtin().detect(root, "arm64"); b.Name != "qemu-virt-arm64" || b.Model != "" {
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
	f.Add([]byte(sensor("calibration = [{ kind = \"fan\", scale = inf }]")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := Parse("x", raw)
		if err != nil {
			if msg := err.Error(); len(msg) > 100_000 || strings.ContainsFunc(msg, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("an error that cannot be shown: %q", msg)
			}
			return
		}
		if p.Name != "x" || p.Title == "" || len(p.LEDs) > maxList || (p.Match.generic() && len(p.Match.Arch) == 0) {
			t.Errorf("an unsound profile is accepted: %+v", p)
		}
		if _, err := json.Marshal(p); err != nil {
			t.Errorf("a profile that cannot be sent: %v", err)
		}
	})
}
