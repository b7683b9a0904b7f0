package wire

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

func TestSettingsAreSortedAndFoundByKey(t *testing.T) {
	var keys []string
	for _, s := range Settings() {
		keys = append(keys, s.Key)
		if got, ok := SettingOf(s.Key); !ok || got.About != s.About {
			t.Errorf("%s is not found", s.Key)
		}
	}
	if !slices.IsSorted(keys) {
		t.Errorf("not sorted: %v", keys)
	}
	if _, ok := SettingOf("beat"); ok {
		t.Error("a key that there is not was found")
	}
}

func TestSettingsTakeOnlyWhatIsInRange(t *testing.T) {
	for _, c := range []struct{ key, raw, want string }{
		{SettingBeat, "5", "5"}, {SettingBeat, "6e1", "60"}, {SettingBeat, "60.0", "60"}, {SettingBeat, "3600", "3600"},
		{SettingBeat, "4", ""}, {SettingBeat, "3601", ""}, {SettingBeat, "60.5", ""}, {SettingBeat, `"60"`, ""}, {SettingBeat, "null", ""}, {SettingBeat, "", ""}, {SettingBeat, "1e999", ""},
		{SettingJobCPU, "1.50", "1.5"}, {SettingJobCPU, "0", ""},
		{SettingJobMemory, "4294967296", "4294967296"}, {SettingJobMemory, "-1", ""},
		{SettingJobs, " true", "true"}, {SettingJobs, "1", ""}, {SettingJobs, "null", ""},
		{SettingLogLevel, `"warn"`, `"warn"`}, {SettingLogLevel, `"loud"`, ""}, {SettingLogLevel, "warn", ""},
	} {
		s, _ := SettingOf(c.key)
		got, err := s.Check(json.RawMessage(c.raw))
		if string(got) != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s = %s: got %s, %v", c.key, c.raw, got, err)
		}
		if err != nil && !strings.Contains(err.Error(), c.key) {
			t.Errorf("%v does not name the key", err)
		}
	}
}

func TestPeopleWriteValuesInTheirOwnWay(t *testing.T) {
	for _, c := range []struct{ key, text, want string }{
		{SettingJobMemory, "256MiB", "268435456"}, {SettingJobMemory, "1.5 GiB", "1610612736"}, {SettingJobMemory, "65536", "65536"},
		{SettingJobMemory, "MiB", ""}, {SettingBeat, "1KiB", ""}, {SettingLogLevel, "debug", `"debug"`}, {SettingJobs, "false", "false"},
	} {
		s, _ := SettingOf(c.key)
		if got, err := s.Parse(c.text); string(got) != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s=%s: got %s, %v", c.key, c.text, got, err)
		}
	}
}

func TestAMisspeltKeyIsToldItsNeighbours(t *testing.T) {
	for typo, want := range map[string]string{"beat.second": SettingBeat, "job.enabled": SettingJobs, "loglevel": SettingLogLevel} {
		if msg := UnknownSetting(typo).Error(); !strings.Contains(msg, "nearest are "+want) {
			t.Errorf("%s: %s", typo, msg)
		}
	}
}

func FuzzSettingCheck(f *testing.F) {
	f.Add(uint8(0), []byte("60"))
	f.Add(uint8(7), []byte(`"warn"`))
	f.Add(uint8(2), []byte("1e3"))
	f.Fuzz(func(t *testing.T, which uint8, raw []byte) {
		s := settings[int(which)%len(settings)]
		got, err := s.Check(raw)
		if err != nil {
			return
		}
		again, err := s.Check(got)
		if err != nil || string(again) != string(got) {
			t.Fatalf("%s: %q became %q, and that %q (%v)", s.Key, raw, got, again, err)
		}
	})
}

func TestBytesAreReadAsAPersonWritesThem(t *testing.T) {
	for text, want := range map[string]Bytes{"64MiB": 64 << 20, "1.5 GiB": 3 << 29, "65536": 65536, "0": 0} {
		var got Bytes
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("%q is %d, want %d: %v", text, got, want, err)
		}
	}
	for _, text := range []string{"", "MiB", "64MB", "-1", "64 apples", "1e30GiB", "0.3KiB"} {
		var got Bytes
		if err := got.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is %d", text, got)
		}
	}
}
