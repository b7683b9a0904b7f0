package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/hw/disk"
	"github.com/deimos-edge/deimos/internal/cli"
)

func TestDisksAreShownWithTheReason(t *testing.T) {
	var out bytes.Buffer
	err := writeDisks(&out, []disk.Candidate{
		{Mount: "/srv/data", Disk: "sda", Size: 1e12, Use: true, Capacity: 5e11, Code: disk.CodeOK, Why: "nothing else is on it",
			Test: &disk.Test{Passed: true, WriteBps: 1e8, ReadBps: 2e8}},
		{Mount: "/srv/bad", Disk: "sdb", Code: disk.CodeForeign, Why: "somebody's data is on it", Test: &disk.Test{}},
		{Disk: "sdc", Code: disk.CodeNotMounted, Why: "/dev/sdc is not mounted"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1.0 TB", "500 GB", "100 MB/s in, 200 MB/s out", "failed", "not tested", "(not mounted)", "/srv/data: nothing else is on it.", "sdc: /dev/sdc is not mounted."} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not shown in\n%s", want, out.String())
		}
	}
}

func TestDisksFollowTheConfiguration(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(file, []byte("[disks]\nuse = [\"/a\"]\nnever = [\"sdb\"]\n[board]\nname = \"rock-5b\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := (&disksListCmd{State: "state", Config: file, Use: []string{"/b"}}).options()
	if err != nil {
		t.Fatal(err)
	}
	if o.Auto || !slices.Equal(o.Use, []string{"/a", "/b"}) || !slices.Equal(o.Never, []string{"sdb"}) || o.Board.Name != "rock-5b" || !filepath.IsAbs(o.State) {
		t.Errorf("%+v", o)
	}
	if o, err := (&disksListCmd{State: "state"}).options(); err != nil || !o.Auto || o.Board.Name == "" {
		t.Errorf("without a configuration: %+v %v", o, err)
	}
	if err := os.WriteFile(file, []byte("[board]\nname = \"rock-6\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (&disksListCmd{State: "state", Config: file}).options(); cli.CodeOf(err) != cli.ExitConfig {
		t.Errorf("a board that there is no profile of: %v", err)
	}
}

func TestWithoutAConfigurationTheAnswerSaysWhatItIs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for config, want := range map[string]bool{"": true, file: false} {
		out := printed(t, func() {
			if err := (&disksListCmd{State: t.TempDir(), Config: config, Output: cli.Output{Format: "table"}}).Run(t.Context()); err != nil {
				t.Error(err)
			}
		})
		if strings.Contains(out, "would be used with auto = true") != want {
			t.Errorf("with %q:\n%s", config, out)
		}
	}
}

// printed is what is written to standard output meanwhile.
func printed(t *testing.T, run func()) string {
	t.Helper()
	stdout := os.Stdout
	defer func() { os.Stdout = stdout }()
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	os.Stdout = f
	run()
	raw, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestADiskCanBeTestedByHand(t *testing.T) {
	stdout := os.Stdout
	defer func() { os.Stdout = stdout }()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	os.Stdout = null
	dir := t.TempDir()
	if err := (&disksTestCmd{Dir: dir, Output: cli.Output{Format: "json"}}).Run(t.Context()); err != nil {
		t.Error(err)
	}
	if err := (&disksTestCmd{Dir: filepath.Join(dir, "missing")}).Run(t.Context()); err == nil {
		t.Error("a folder that is missing passes")
	}
	interrupted, cancel := context.WithCancel(t.Context())
	cancel()
	if err := coded((&disksTestCmd{Dir: dir}).Run(interrupted)); cli.CodeOf(err) != 130 {
		t.Errorf("a test that was interrupted ends with %v", err)
	}
	var out bytes.Buffer
	if err := writeTest(&out, disk.Test{Code: disk.ProblemMismatch, Bytes: 1 << 20, ReadBps: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, "failed (mismatch)") || !strings.Contains(s, "may have read from its cache") {
		t.Errorf("%s", s)
	}
}
