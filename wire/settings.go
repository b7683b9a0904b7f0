package wire

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Setting is one thing of a device that the fleet may want otherwise
// ([ConfigApply]). The table says what a value may be at all; what the owner of
// a device allows of it, only the device knows.
type Setting struct {
	Key     string      `json:"key"`
	Type    SettingType `json:"type"`
	Unit    string      `json:"unit,omitempty"`
	Min     float64     `json:"min,omitempty"` // of numbers, both ends included
	Max     float64     `json:"max,omitempty"`
	Choices []string    `json:"choices,omitempty"` // of a SettingChoice
	About   string      `json:"about"`             // a sentence for a person
}

// SettingType is the JSON type of a setting's value.
type SettingType string

// The types of settings.
const (
	SettingBool   SettingType = "boolean"
	SettingInt    SettingType = "integer"
	SettingNumber SettingType = "number"
	SettingChoice SettingType = "choice" // a JSON string, one of Setting.Choices
)

// The keys of settings.
const (
	SettingBeat      = "beat.seconds"
	SettingJobs      = "jobs.enabled"
	SettingJobCPU    = "jobs.max_cpu_seconds"
	SettingJobMemory = "jobs.max_memory_bytes"
	SettingJobOutput = "jobs.max_output_bytes"
	SettingJobWall   = "jobs.max_wall_seconds"
	SettingJobSlots  = "jobs.slots"
	SettingLogLevel  = "log.level"
	SettingScrubDays = "scrub.days"
	SettingScrubRate = "scrub.max_bytes_per_second"
	SettingDownRate  = "transfer.max_down_bytes_per_second"
	SettingUpRate    = "transfer.max_up_bytes_per_second"
	SettingMonthly   = "transfer.monthly_bytes"
)

// MinRate is the least rate of bulk that can be set, in bytes a second: a chunk
// of the usual size then takes a minute.
const MinRate = 16 << 10

// MaxBeat is the longest heartbeat interval, in seconds.
const MaxBeat = 3600

const longestJob = 24 * 60 * 60 // seconds

// Those of jobs, of the scrub and of transfers have the names that the owner's configuration
// file has for them (jobs/policy, agent.Config).
var settings = []Setting{ // sorted by key
	{Key: SettingBeat, Type: SettingInt, Unit: "s", Min: 5, Max: MaxBeat, About: "Time between two heartbeats. Default: as the device was told when it enrolled."},
	{Key: SettingJobs, Type: SettingBool, About: "Whether the device runs jobs at all."},
	{Key: SettingJobCPU, Type: SettingNumber, Unit: "s", Min: 1, Max: longestJob, About: "Most CPU time of one job."},
	{Key: SettingJobMemory, Type: SettingInt, Unit: "bytes", Min: 1 << 16, Max: 4 << 30, About: "Most memory of one job."},
	{Key: SettingJobOutput, Type: SettingInt, Unit: "bytes", Min: 1, Max: 1 << 30, About: "Most output of one job."},
	{Key: SettingJobWall, Type: SettingNumber, Unit: "s", Min: 1, Max: longestJob, About: "Most time of one job from start to end."},
	{Key: SettingJobSlots, Type: SettingInt, Min: 1, Max: 64, About: "How many jobs run at the same time."},
	{Key: SettingLogLevel, Type: SettingChoice, Choices: []string{"debug", "info", "warn", "error"}, About: "The least important messages that the agent logs."},
	{Key: SettingScrubDays, Type: SettingNumber, Unit: "days", Min: 1, Max: 365, About: "Time within which every chunk is read and verified, again and again."},
	{Key: SettingScrubRate, Type: SettingInt, Unit: "bytes", Min: 1 << 16, Max: 1 << 30, About: "Most that is read of a disk in a second to verify chunks."},
	{Key: SettingDownRate, Type: SettingInt, Unit: "bytes", Max: 1 << 40, About: "Most that chunks and modules that come in take of the line in a second; 0: no limit, else at least 16 KiB."},
	{Key: SettingUpRate, Type: SettingInt, Unit: "bytes", Max: 1 << 40, About: "Most that chunks that go out take of the line in a second; 0: no limit, else at least 16 KiB."},
	{Key: SettingMonthly, Type: SettingInt, Unit: "bytes", Max: 1 << 50, About: "Bytes in and out in a month after which no more chunks are moved; 0: no limit."},
}

// Settings is the table of all settings that this version knows, sorted by key.
func Settings() []Setting { return slices.Clone(settings) }

// SettingOf finds a setting by its key.
func SettingOf(key string) (Setting, bool) {
	i, ok := slices.BinarySearchFunc(settings, key, func(s Setting, k string) int { return cmp.Compare(s.Key, k) })
	if !ok {
		return Setting{}, false
	}
	return settings[i], true
}

// Range says to a person what values there are.
func (s Setting) Range() string {
	switch s.Type {
	case SettingBool:
		return "true or false"
	case SettingChoice:
		return strings.Join(s.Choices, ", ")
	}
	r := strconv.FormatFloat(s.Min, 'f', -1, 64) + " to " + strconv.FormatFloat(s.Max, 'f', -1, 64)
	if s.Unit != "" {
		r += " " + s.Unit
	}
	return r
}

// Check reads a value. It returns it in the one form in which two values that
// mean the same are the same bytes.
func (s Setting) Check(raw json.RawMessage) (json.RawMessage, error) {
	switch s.Type {
	case SettingBool:
		var v bool
		if isNull(raw) || json.Unmarshal(raw, &v) != nil {
			return nil, s.refuse(raw)
		}
		return json.Marshal(v)
	case SettingChoice:
		var v string
		if json.Unmarshal(raw, &v) != nil || !slices.Contains(s.Choices, v) {
			return nil, s.refuse(raw)
		}
		return json.Marshal(v)
	}
	var v float64
	if isNull(raw) || json.Unmarshal(raw, &v) != nil || v < s.Min || v > s.Max || s.Type == SettingInt && v != math.Trunc(v) {
		return nil, s.refuse(raw)
	}
	return []byte(strconv.FormatFloat(v, 'f', -1, 64)), nil
}

func isNull(raw []byte) bool { return bytes.Equal(bytes.TrimSpace(raw), []byte("null")) }

func (s Setting) refuse(raw []byte) error {
	what := "a whole number from "
	switch s.Type {
	case SettingBool:
		what = ""
	case SettingChoice:
		what = "one of "
	case SettingNumber:
		what = "a number from "
	}
	return fmt.Errorf("%s cannot be %.60s: it is %s%s", s.Key, raw, what, s.Range())
}

// byteUnits are what a person may write behind a number of bytes.
var byteUnits = []struct {
	name  string
	bytes float64
}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}}

// Parse reads a value as a person writes it: 256MiB, true, warn.
func (s Setting) Parse(text string) (json.RawMessage, error) {
	if s.Type == SettingChoice {
		raw, err := json.Marshal(text)
		if err != nil {
			return nil, err
		}
		return s.Check(raw)
	}
	if s.Unit == "bytes" {
		text = withoutUnit(text)
	}
	return s.Check([]byte(text))
}

// withoutUnit is a number of bytes in digits. What is none stays as it is.
func withoutUnit(text string) string {
	for _, u := range byteUnits {
		n, ok := strings.CutSuffix(text, u.name)
		if v, err := strconv.ParseFloat(strings.TrimSpace(n), 64); ok && err == nil {
			return strconv.FormatFloat(v*u.bytes, 'f', -1, 64)
		}
	}
	return text
}

// Bytes is a number of bytes as a person writes it: 64MiB, 1.5 GiB, 65536.
type Bytes int64

// UnmarshalText is for the flags of commands.
func (b *Bytes) UnmarshalText(text []byte) error {
	n, err := strconv.ParseInt(withoutUnit(string(text)), 10, 64)
	if err != nil || n < 0 {
		return fmt.Errorf("%.60q is no number of bytes: it looks like 64MiB, 1GiB or 65536", text)
	}
	*b = Bytes(n)
	return nil
}

// UnknownSetting is the sentence about a key that is not in the table. It names
// the keys that are most like it.
func UnknownSetting(key string) error {
	near := Settings()
	slices.SortStableFunc(near, func(a, b Setting) int { return cmp.Compare(distance(key, a.Key), distance(key, b.Key)) })
	return fmt.Errorf("there is no setting %.64q; the nearest are %s, %s and %s (\"deimos config keys\" shows all)", key, near[0].Key, near[1].Key, near[2].Key)
}

// distance is Levenshtein's, in bytes.
func distance(a, b string) int {
	if len(a) > 64 {
		a = a[:64]
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
