package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares what a person sees with what it was.
func golden(t *testing.T, name string, write func(w *bytes.Buffer) error) {
	t.Helper()
	var out bytes.Buffer
	if err := write(&out); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, out.Bytes(), want)
	}
}

var goldenAt = time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)

func illDevice() api.Device {
	return api.Device{
		DeviceRecord: api.DeviceRecord{ID: "b4irkgbk5iwtj6erquld22qs", Agent: "1.0.0", OS: "linux", Arch: "arm64", Board: "raspberry-pi-4", Group: "home", Enrolled: goldenAt, CertUntil: goldenAt,
			Capacity: 1 << 40, Used: 1 << 30, Warnings: []api.Warning{{Code: api.WarningDuplicateKey, Title: "two machines use this device's key", Text: "Stop the copy.", Since: goldenAt, Last: goldenAt}}},
		State: api.DeviceOnline, Online: true, LastSeen: goldenAt, HealthAt: goldenAt,
		Update: &wire.UpdateState{Phase: wire.UpdateWaiting, Version: "1.2.0", Code: wire.CodeWindow, Seconds: 3 * 3600},
		Health: []wire.Warning{
			{Code: "disk_failing", Subject: "sda", Severity: wire.Critical, Title: "A disk is failing", Since: goldenAt,
				Text: "The disk itself expects to fail. Copy what is only on it elsewhere, and replace the disk soon; what the fleet has stored on it is on other devices too, and is placed anew.\nIt said so twice."},
			{Code: "update_waiting", Severity: wire.Info, Title: "An update waits", Text: "It is installed at night."},
		},
		Telemetry: json.RawMessage(`{"load1":0.5,"load5":0.25,"load15":0.1,"cpu_percent":12.4,"memory_total":4294967296,"memory_used":1073741824,"temperatures":{"cpu":61.2,"nvme\n0":40},
			"throttling":{"now":true},"disks":{"sda":{"written_bytes":1048576,"write_ms":2.5,"busy":3},"sdb":{"written_bytes":1}},"agent":{"anonymous":20971520,"written":4096}}`),
		Inventory: json.RawMessage(`{"format":1,"board":{"name":"raspberry-pi-4","model":"Pi\n\u001b[2J"},"cpu":{"model":"Cortex-A72","cores":4},"memory":{"total":4294967296},
			"disks":[{"name":"sda","model":"Some disk","size":1000204886016,"bus":"usb","health":{"temperature":40,"wear":12}}]}`),
		InventoryDigest: strings.Repeat("a", 64), InventoryTaken: goldenAt,
	}
}

func TestWhatIsWrongWithDevicesIsSeen(t *testing.T) {
	ill, well, mute := illDevice(), illDevice(), illDevice()
	ill.HealthMore = 3
	well.ID, well.Warnings, well.Health = "c4v7e36rdugbtptya3zf4nkg", nil, nil
	mute.ID, mute.Warnings, mute.Health, mute.HealthAt = "d4v7e36rdugbtptya3zf4nkg", nil, nil, time.Time{}
	golden(t, "devices", func(w *bytes.Buffer) error {
		return writeDevices(cli.Plain(w), api.DeviceQuery{}, []api.Device{ill, well, mute})
	})
	golden(t, "device", func(w *bytes.Buffer) error { return writeDevice(cli.Plain(w), ill) })
	golden(t, "device_well", func(w *bytes.Buffer) error {
		well.Telemetry, well.Inventory, well.HealthAt = nil, nil, goldenAt
		return writeDevice(cli.Plain(w), well)
	})
	for want, q := range map[string]api.DeviceQuery{
		"Nothing is wrong with any device that fits.\n": {Trouble: true},
		"No device that fits is retired.\n":             {State: api.DeviceRetired},
	} {
		var out bytes.Buffer
		if err := writeDevices(&out, q, nil); err != nil || out.String() != want {
			t.Errorf("%+v: %q %v", q, out.String(), err)
		}
	}
}

func TestAnInventoryThatWasNotTakenIsTold(t *testing.T) {
	for _, raw := range []string{"", `{"format":1}`} {
		d := illDevice()
		d.Inventory, d.InventoryProblem = json.RawMessage(raw), "it is too large"
		var out bytes.Buffer
		if err := writeDevice(&out, d); err != nil || !strings.Contains(out.String(), "not taken: it is too large.\n") {
			t.Errorf("%q: %v\n%s", raw, err, out.String())
		}
	}
}

// What a device says of itself is anything.
func TestOddInventoriesDoNoHarm(t *testing.T) {
	for _, raw := range []string{`{"format":2}`, `[]`, `{"disks":7}`, `nothing`, `{"cpu":{"cores":-5,"max_mhz":-1e300}}`, `{"disks":[{"size":18446744073709551615,"health":{"temperature":1e300,"wear":-1e300}}]}`,
		`{"memory":{"total":18446744073709551615,"available":18446744073709551615}}`, `{"disks":null,"notes":[{"text":"` + strings.Repeat("x", 60_000) + `"}]}`, `{"network":[{}],"gpio":[{}],"buses":[{}],"tpms":[{}],"sensors":[{}],"leds":[{}],"filesystems":[{}],"watchdogs":[{}],"clocks":[{}]}`} {
		d := illDevice()
		d.Inventory, d.Telemetry = json.RawMessage(raw), json.RawMessage(raw)
		var out bytes.Buffer
		if err := writeDevice(&out, d); err != nil || strings.ContainsRune(out.String(), '\x1b') {
			t.Errorf("%.40s: %v %q", raw, err, out.String())
		}
	}
}

func TestAStatusCountsWhatIsWrong(t *testing.T) {
	var s api.Status
	s.Started = goldenAt
	s.Devices.Online, s.Devices.Critical, s.Devices.Troubled = 5, 1, 2
	s.Health = []api.HealthCount{{Code: "filesystem_full", Title: "A file system\nis full", Severity: wire.Trouble, Devices: 2}, {Code: "disk_failing", Title: "A disk is failing", Severity: wire.Critical, Devices: 1}}
	golden(t, "status", func(w *bytes.Buffer) error { return writeStatus(w, s) })
}

func curve(unit string, points ...float64) wire.Curve {
	c := wire.Curve{Unit: unit}
	for _, v := range points {
		c.Mean = append(c.Mean, &v)
		if math.IsNaN(v) {
			c.Mean[len(c.Mean)-1] = nil
		}
	}
	return c
}

func TestAHistoryIsDrawn(t *testing.T) {
	gap := math.NaN()
	h := wire.History{From: goldenAt.Truncate(24 * time.Hour), Step: 600, Count: 6, Series: map[string]wire.Curve{
		"temperature/cpu": curve("°C", 40, 45.5, 61, gap, 58, 50), "memory/used": curve("B", 1<<30, 1<<30, 1<<31, gap, 1<<30, 1<<30), "link/eth0": curve("", gap, gap, gap, gap, gap, gap)}}
	raw, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	if h, err = readHistory(raw); err != nil {
		t.Fatal(err)
	}
	golden(t, "history", func(w *bytes.Buffer) error { return writeHistory(w, h, false, cli.ChartStyle{}) })
	golden(t, "chart", func(w *bytes.Buffer) error {
		return writeHistory(w, h, true, cli.ChartStyle{Width: 60, Height: 8, Zone: time.UTC})
	})
	var out bytes.Buffer
	if err := writeHistory(&out, wire.History{}, true, cli.ChartStyle{}); err != nil || !strings.Contains(out.String(), "nothing") {
		t.Errorf("%q %v", out.String(), err)
	}
}

// A chart is drawn of whatever readHistory lets through.
func TestOddHistoriesAreNotDrawn(t *testing.T) {
	history := func(step, count any, curves string) string {
		return fmt.Sprintf(`{"from":"2020-01-01T00:00:00Z","step":%v,"count":%v,"series":{%s}}`, step, count, curves)
	}
	for name, raw := range map[string]string{
		"no JSON":         `]`,
		"no object":       `[]`,
		"a negative":      history(60, -1, ""),
		"many points":     history(60, wire.MaxPoints+1, ""),
		"no step":         history(0, 1, `"a":{"mean":[1]}`),
		"a step back":     history(-60, 1, `"a":{"mean":[1]}`),
		"an age":          history(1e300, 1, `"a":{"mean":[1]}`),
		"too few points":  history(60, 2, `"a":{"mean":[1]}`),
		"no points":       history(60, 1, `"a":{}`),
		"too few minima":  history(60, 2, `"a":{"mean":[1,2],"min":[1]}`),
		"too many maxima": history(60, 1, `"a":{"mean":[1],"max":[1,2]}`),
		"beyond measure":  history(60, 2, `"a":{"mean":[-1.7e308,1.7e308]}`),
		"a steered name":  history(60, 1, `"a\u001b[2J":{"mean":[1]}`),
		"a line":          history(60, 1, `"a\nb":{"mean":[1]}`),
		"a tab":           history(60, 1, `"a":{"unit":"\t","mean":[1]}`),
		"a long name":     history(60, 1, `"`+strings.Repeat("a", 65)+`":{"mean":[1]}`),
		"before time":     strings.Replace(history(60, 1, `"a":{"mean":[1]}`), "2020", "0001", 1),
	} {
		if _, err := readHistory([]byte(raw)); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	for name, raw := range map[string]string{
		"nothing":      history(0, 0, ""),
		"tiny figures": history(60, 2, `"a":{"mean":[0,5e-324]}`),
		"large ones":   history(60, 2, `"a":{"unit":"B","mean":[-1e18,1e18]}`),
		"a century":    history(86400*365*99/2, 2, `"a":{"mean":[1,2]}`),
		"quick":        history(0.1, 1, `"a":{"mean":[1]}`),
	} {
		h, err := readHistory([]byte(raw))
		for _, draw := range []bool{true, false} {
			for _, style := range []cli.ChartStyle{{}, {Width: 200, Height: 50, ASCII: true}} {
				if err == nil {
					err = writeHistory(new(bytes.Buffer), h, draw, style)
				}
			}
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestADeviceSaysWhyItDidNotDoIt(t *testing.T) {
	order := func(s wire.State, code string) api.Order {
		return api.Order{Order: wire.Order{ID: "o", Device: "d"}, State: s, Result: wire.Report{Code: code, Reason: "it is so"}}
	}
	if err := awaited(order(wire.Succeeded, ""), ""); err != nil {
		t.Error(err)
	}
	for want, o := range map[string]api.Order{
		"no light: it is so":           order(wire.Rejected, wire.CodeNotSupported),
		"too old":                      order(wire.Rejected, wire.CodeUnknownKind),
		"(FAILED, internal): it is so": order(wire.Failed, wire.CodeInternal),
		"not answered yet":             order(wire.Running, ""),
	} {
		if err := awaited(o, "no light"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if code := cli.CodeOf(awaited(order(wire.Queued, ""), "")); code != cli.ExitNotYet {
		t.Errorf("exit code %d", code)
	}
}
