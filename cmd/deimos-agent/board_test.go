package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/internal/cli"
)

// TestSensorsOfProfilesHaveDrivers is the half of the profiles' linter that
// board cannot do, as it may not know drivers.
func TestSensorsOfProfilesHaveDrivers(t *testing.T) {
	for _, p := range board.Builtin().Profiles() {
		for _, problem := range checkSensors(p) {
			t.Errorf("%s: %s", p.Name, problem)
		}
	}
}

// profileFile writes a profile called box.toml and returns its path.
func profileFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "box.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const goodBox = "name = \"box\"\ntitle = \"A box\"\n[match]\ncompatible = [\"acme,box\"]\n"

func TestCheckListsEveryProblem(t *testing.T) {
	good := checkProfile(profileFile(t, goodBox))
	if len(good.Problems) > 0 {
		t.Fatalf("the good one: %+v", good)
	}
	bad := checkProfile(profileFile(t, goodBox+"colour = \"red\"\n[thermal]\nwarm = 500.0\n[disks]\nnever = [\"floppy\"]\n"))
	if len(bad.Problems) != 3 || bad.Problems[0].Line != 5 {
		t.Errorf("%+v", bad)
	}
	driver := checkProfile(profileFile(t, goodBox+"[[sensors]]\nname = \"a\"\ndriver = \"crystal-ball\"\nbus = \"/dev/i2c-1\"\n"))
	if len(driver.Problems) != 1 || !strings.Contains(driver.Problems[0].Text, "crystal-ball") {
		t.Errorf("a driver that there is none of: %+v", driver)
	}
	if missing := checkProfile(filepath.Join(t.TempDir(), "box.toml")); len(missing.Problems) != 1 {
		t.Errorf("missing: %+v", missing)
	}
	var out bytes.Buffer
	if err := writeChecked(&out, []checked{good, bad}); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "box.toml: good\n") || !strings.Contains(s, "box.toml:5: ") || strings.Count(s, "\n") != 4 {
		t.Errorf("%s", s)
	}
}

func TestCheckEndsWithAnErrorIfThereIsAProblem(t *testing.T) {
	stdout := os.Stdout
	defer func() { os.Stdout = stdout }()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	os.Stdout = null
	for _, format := range []string{"table", "json"} {
		c := boardCheckCmd{Files: []string{profileFile(t, goodBox), profileFile(t, "name =")}, Output: cli.Output{Format: format}}
		if err := c.Run(); cli.CodeOf(err) != cli.ExitConfig {
			t.Errorf("%s: %v", format, err)
		}
		c.Files = c.Files[:1]
		if err := c.Run(); err != nil {
			t.Errorf("%s, the good one: %v", format, err)
		}
	}
}

func TestABoardIsShownWithAllThatIsKnown(t *testing.T) {
	b, err := board.Builtin().Named("/", "raspberry-pi-4")
	if err != nil {
		t.Fatal(err)
	}
	b.Button = &board.Button{Use: "reset", Line: board.Line{Chip: "pinctrl", Offset: 3, ActiveLow: true, Pull: "up"}}
	b.Sensors = []board.Sensor{{Name: "outside", Driver: "bmxx80", Bus: "/dev/i2c-1", Address: "0x76"}}
	b.Disks.System = true
	var out bytes.Buffer
	if err := writeBoard(&out, b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"raspberry-pi-4", "ACT or led0", "line 3 of pinctrl, active low, pulled up", "bmxx80 on /dev/i2c-1 0x76", "sd", "80 °C", "85 °C", "Broadcom", "may be used"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not shown in\n%s", want, out.String())
		}
	}
}

func TestBoardAloneShowsTheBoard(t *testing.T) {
	for line, want := range map[string]string{"board rock-5b": `"rock-5b"`, "board": `"title"`, "board list": `"raspberry-pi-4"`} {
		out := shownBy(t, append(strings.Fields(line), "--profiles", t.TempDir(), "-o", "json")...)
		if !strings.Contains(out, want) {
			t.Errorf("%s: %s, want %s", line, out, want)
		}
	}
}
