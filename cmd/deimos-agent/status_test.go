package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/internal/cli"
)

func TestStatusShowsWhatTheFleetHasOfTheLine(t *testing.T) {
	state := t.TempDir()
	if _, err := agent.LoadIdentity(filepath.Join(state, "identity")); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		`{"month":"2026-11","bytes":1288490189,"ahead":16777216,"limits":{"max_down_bytes_per_second":2000000,"max_up_bytes_per_second":0,"monthly_bytes":214748364800,"hours":"22:00-06:00"}}`: `
moved     1.2 GiB of 200.0 GiB in 2026-11, and up to 16.0 MiB since this was noted; 198.8 GiB left
line      1.9 MiB/s down, any rate up, 22:00-06:00
`,
		`{"month":"2026-11","bytes":1048576,"ahead":0,"limits":{}}`: `
moved     1.0 MiB in 2026-11
line      any rate down, any rate up, all day
`,
		`{"month":"","bytes":5,"ahead":0,"limits":{"monthly_bytes":67108864}}`: `
moved     5 B of 64.0 MiB, in a month that is not known yet; 64.0 MiB left
line      any rate down, any rate up, all day
`,
	} {
		if err := os.WriteFile(filepath.Join(state, "traffic.json"), []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		status := func(format string) string {
			return printed(t, func() {
				if err := (&statusCmd{State: state, Output: cli.Output{Format: format}}).Run(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		table := status("table")
		if !strings.HasSuffix(table, want) {
			t.Errorf("got\n%swant\n%s", table, want)
		}
		var got, noted struct {
			Line struct {
				Month  string
				Bytes  int64
				Left   *int64
				Limits map[string]any
			}
		}
		raw := status("json")
		if err := json.Unmarshal([]byte(raw), &got); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(file), &noted.Line); err != nil {
			t.Fatal(err)
		}
		most, limited := noted.Line.Limits["monthly_bytes"].(float64)
		if got.Line.Month != noted.Line.Month || got.Line.Bytes != noted.Line.Bytes || limited != (got.Line.Left != nil) || limited && (*got.Line.Left <= 0 || *got.Line.Left > int64(most)) {
			t.Errorf("as JSON: %s", raw)
		}
		for key, v := range noted.Line.Limits {
			if got.Line.Limits[key] != v {
				t.Errorf("%s is %v in %s", key, got.Line.Limits[key], raw)
			}
		}
	}
}
