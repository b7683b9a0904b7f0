package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/sensor"
	"github.com/deimos-edge/deimos/internal/cli"
)

func sensorsDoc(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile("../../docs/sensors.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestTheDocumentsTableOfDriversIsTheCodes(t *testing.T) {
	var want strings.Builder
	want.WriteString("| Driver | Chips | Measures | Bus | Address | Default | Least interval |\n|---|---|---|---|---|---|---|\n")
	for _, d := range sensor.Drivers() {
		fmt.Fprintf(&want, "| %s |\n", strings.Join(driverCells(d), " | "))
	}
	if !strings.Contains(sensorsDoc(t), want.String()) {
		t.Errorf("docs/sensors.md does not have this table:\n%s", want.String())
	}
}

// Each block of TOML in the document is a configuration that works.
func TestTheDocumentsExamplesAreRight(t *testing.T) {
	blocks := strings.Split(sensorsDoc(t), "```")
	found := 0
	for i := 1; i < len(blocks); i += 2 {
		text, is := strings.CutPrefix(blocks[i], "toml\n")
		if !is {
			continue
		}
		var c struct {
			Owner   []board.Sensor `toml:"sensor"`
			Profile []board.Sensor `toml:"sensors"`
		}
		meta, err := toml.Decode(text, &c)
		if err != nil || len(meta.Undecoded()) > 0 {
			t.Fatalf("%v, unknown: %v, in\n%s", err, meta.Undecoded(), text)
		}
		if _, err := sensor.New(slices.Concat(c.Owner, c.Profile), nil); err != nil {
			t.Errorf("%v, in\n%s", err, text)
		}
		found += len(c.Owner) + len(c.Profile)
	}
	if found == 0 {
		t.Error("there is no example")
	}
}

func TestSensorsOfTheConfigurationAreDeclaredAndWrongOnesNamed(t *testing.T) {
	dir := t.TempDir()
	write := func(text string) string {
		path := filepath.Join(dir, "agent.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c := sensorsReadCmd{Config: write("[board]\nprofiles = \"" + dir + "\"\n[[sensor]]\nname = \"a\"\ndriver = \"aht20\"\nbus = \"/dev/i2c-9\"\n")}
	got, err := c.declared()
	if err != nil || len(got) == 0 || got[len(got)-1].Name != "a" {
		t.Errorf("%v, %v", got, err)
	}
	c.Config = write("[[sensor]]\nname = \"a\"\ndriver = \"dht22\"\nbus = \"/dev/i2c-9\"\n")
	if err := c.Run(t.Context()); err == nil || cli.CodeOf(err) != cli.ExitConfig || !strings.Contains(err.Error(), `no driver "dht22"`) {
		t.Errorf("code %d: %v", cli.CodeOf(err), err)
	}
}

func TestReadingsShowValuesAndWhyThereAreNone(t *testing.T) {
	var b bytes.Buffer
	err := writeReadings(&b, []sensorReading{
		{Name: "box", Driver: "aht20", Bus: "/dev/i2c-1", Address: "0x38", Values: []hw.Measurement{{Name: "box/temperature", Unit: "°C", Value: 19.4458}}, Error: "humidity was dropped"},
		{Name: "gone", Driver: "tmp102", Bus: "/dev/i2c-1", Address: "0x48", Error: "no chip answers"},
	})
	want := `SENSOR           DRIVER  BUS         ADDRESS  VALUE
box/temperature  aht20   /dev/i2c-1  0x38     19.4458 °C
gone             tmp102  /dev/i2c-1  0x48     -

box: humidity was dropped
gone: no chip answers
`
	if err != nil || b.String() != want {
		t.Errorf("%v\n%s", err, b.String())
	}
}
