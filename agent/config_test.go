package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/jobs/policy"
	"golang.org/x/sys/unix"
)

func loadText(t *testing.T, text string) (Config, string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := LoadConfig(path)
	return c, path, err
}

func TestConfigDefaults(t *testing.T) {
	c, err := LoadConfig("")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%+v", c.Jobs), fmt.Sprintf("%+v", policy.Default()); got != want {
		t.Errorf("jobs: %s, want %s", got, want)
	}
	if c.Coordinator != "" || len(c.Volumes) != 0 {
		t.Errorf("got %+v out of nothing", c)
	}
	// A file that speaks of one thing leaves the others as they are.
	c, _, err = loadText(t, "coordinator = \"https://fleet.example.org:8443\"\n")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%+v", c.Jobs), fmt.Sprintf("%+v", policy.Default()); got != want {
		t.Errorf("jobs: %s, want %s", got, want)
	}
}

func TestConfigIsRead(t *testing.T) {
	c, _, err := loadText(t, `
coordinator = "https://fleet.example.org:8443"
token = "deimos_x"
[[volume]]
dir = "/mnt/disk1"
capacity_bytes = 1000
floor_bytes = 10
[[volume]]
dir = "/mnt/disk2"
[jobs]
enabled = false
`)
	if err != nil {
		t.Fatal(err)
	}
	want := []VolumeConfig{{"/mnt/disk1", 1000, 10}, {Dir: "/mnt/disk2"}}
	if c.Coordinator != "https://fleet.example.org:8443" || c.Token != "deimos_x" || fmt.Sprint(c.Volumes) != fmt.Sprint(want) || c.Jobs.Effective().Enabled {
		t.Errorf("got %+v", c)
	}
}

func TestConfigMistakesAreNamed(t *testing.T) {
	for what, tc := range map[string]struct {
		text string
		says []string
	}{
		"misspelt key":       {"cordinator = \"x\"\n", []string{"cordinator"}},
		"misspelt owner cap": {"[jobs]\nslotz = 1\n[[volume]]\ndir = \"/a\"\ncapacity = 5\n", []string{"jobs.slotz", "volume.capacity"}},
		"syntax":             {"coordinator = \"a\"\n\ntoken = [\n", []string{"line 3"}},
		"wrong type":         {"token = \"a\"\ncoordinator = 5\n", []string{"line 2", "coordinator"}},
		"key twice":          {"token = \"a\"\ntoken = \"b\"\n", []string{"line 2", "token"}},
		// What the command line sets is no business of the file.
		"state in the file": {"StateDir = \"/x\"\n", []string{"StateDir"}},
	} {
		t.Run(what, func(t *testing.T) {
			_, path, err := loadText(t, tc.text)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, s := range append(tc.says, path) {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
		})
	}
	path := filepath.Join(t.TempDir(), "none.toml")
	if _, err := LoadConfig(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("missing file: %v", err)
	}
}

func TestOneAgentAtATime(t *testing.T) {
	c := Config{StateDir: filepath.Join(t.TempDir(), "a", "state")}
	lock, err := c.makeState()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.makeState(); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent: %v", err)
	}
	lock.Close()
	lock, err = c.makeState()
	if err != nil {
		t.Fatalf("the lock outlived its agent: %v", err)
	}
	lock.Close()
}

// TestAConfigurationIsAFile: one without an end, or that nobody writes, must not
// hold the agent.
func TestAConfigurationIsAFile(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, bytes.Repeat([]byte("# nothing\n"), 200_000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, large, "/dev/zero", dir} {
		done := make(chan error, 1)
		go func() { _, err := LoadConfig(path); done <- err }()
		if err := await(t, path, done); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
