package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func TestValuesAreReadAsPeopleWriteThem(t *testing.T) {
	set, err := parseValues([]string{"jobs.max_memory_bytes=256MiB", "log.level=warn", "jobs.enabled=false", "new.text=a=b", "new.number=7"})
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"jobs.max_memory_bytes": "268435456", "log.level": `"warn"`, "jobs.enabled": "false", "new.text": `"a=b"`, "new.number": "7"} {
		if got := string(set[key]); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
	for _, bad := range [][]string{{"beat.seconds"}, {"=5"}, {"beat.seconds=4"}, {"beat.seconds=5", "beat.seconds=6"}} {
		if _, err := parseValues(bad); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
}

func TestWhatADeviceRefusesIsShownBesideWhatItRuns(t *testing.T) {
	d := api.DeviceConfig{Device: "abc", State: api.ConfigPartly, Wanted: 7,
		Values: map[string]api.ConfigValue{"jobs.slots": {Value: json.RawMessage("9"), From: "group"}},
		Reported: &api.ConfigReported{ConfigReport: wire.ConfigReport{Version: 7,
			Running: map[string]json.RawMessage{"jobs.slots": json.RawMessage("2"), "log.level": json.RawMessage(`"info"`)},
			Refused: map[string]wire.Refusal{"jobs.slots": {Code: wire.CodePolicy, Reason: "the owner allows 2"}}}}}
	var out bytes.Buffer
	if err := writeDeviceConfig(&out, d); err != nil {
		t.Fatal(err)
	}
	var line string
	for l := range strings.Lines(out.String()) {
		if strings.HasPrefix(l, "jobs.slots") {
			line = strings.Join(strings.Fields(l), " ")
		}
	}
	if line != "jobs.slots 9 group 2 the owner allows 2" || !strings.Contains(out.String(), "log.level") {
		t.Errorf("shown as\n%s", out.String())
	}
	out.Reset()
	if err := writeConfigs(&out, []api.DeviceConfig{d}); err != nil || !strings.Contains(out.String(), "jobs.slots: the owner allows 2") {
		t.Errorf("%v, shown as\n%s", err, out.String())
	}
}
