package packaging

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// maxAgent is what an agent may weigh stripped, in bytes, so that a small
// board's flash holds two of them and an update is a small download.
const maxAgent = 20_000_000

// device names the programs that devices run, below the folder of DEIMOS_BIN,
// and what each is built for.
var device = []struct {
	name    string
	machine elf.Machine
	arch    string
}{
	{"arm64/deimos-agent", elf.EM_AARCH64, "arm64"},
	{"arm64/deimos-launch", elf.EM_AARCH64, "arm64"},
	{"armv7/deimos-agent", elf.EM_ARM, "arm"},
	{"armv7/deimos-launch", elf.EM_ARM, "arm"},
}

// built is the path of a program that `make build` made.
func built(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("DEIMOS_BIN")
	if dir == "" {
		t.Skip("DEIMOS_BIN does not name a folder of built programs; `make device` builds and tests them")
	}
	return filepath.Join(dir, name)
}

func TestShippedAgentFitsSmallBoards(t *testing.T) {
	for _, p := range device {
		info, err := os.Stat(built(t, p.name))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %.1f MB", p.name, float64(info.Size())/1e6)
		if info.Size() >= maxAgent {
			t.Errorf("%s has %d bytes, the limit is %d", p.name, info.Size(), maxAgent)
		}
	}
}

// TestShippedProgramsStandAlone: a device needs no libc and no loader of the
// right version, and carries no symbols.
func TestShippedProgramsStandAlone(t *testing.T) {
	for _, p := range device {
		f, err := elf.Open(built(t, p.name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if f.Machine != p.machine {
			t.Errorf("%s is built for %s, not for %s", p.name, f.Machine, p.machine)
		}
		for _, prog := range f.Progs {
			if prog.Type == elf.PT_INTERP {
				t.Errorf("%s wants a dynamic loader", p.name)
			}
		}
		for _, s := range f.Sections {
			if s.Name == ".symtab" || strings.HasPrefix(s.Name, ".debug_") || strings.HasPrefix(s.Name, ".zdebug_") {
				t.Errorf("%s is not stripped: it has %s", p.name, s.Name)
			}
		}
	}
}

func TestShippedProgramsSayHowTheyWereBuilt(t *testing.T) {
	for _, p := range device {
		info, err := buildinfo.ReadFile(built(t, p.name))
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, s := range info.Settings {
			got[s.Key] = s.Value
			if strings.HasPrefix(s.Key, "vcs") {
				t.Errorf("%s carries %s=%s, which changes with each commit", p.name, s.Key, s.Value)
			}
		}
		want := map[string]string{"-trimpath": "true", "CGO_ENABLED": "0", "GOOS": "linux", "GOARCH": p.arch}
		switch p.arch {
		case "arm":
			want["GOARM"] = "7"
		case "arm64":
			want["GOARM64"] = "v8.0"
		}
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s was built with %s=%q, not %q", p.name, k, got[k], v)
			}
		}
	}
}

// emulated runs a program of another architecture under QEMU's user emulation
// and returns its standard output. Probing must not take long even there.
func emulated(t *testing.T, arch, program string, args ...string) []byte {
	t.Helper()
	path := built(t, program)
	qemu := ""
	for _, name := range []string{"qemu-" + arch + "-static", "qemu-" + arch} {
		if found, err := exec.LookPath(name); err == nil {
			qemu = found
			break
		}
	}
	if qemu == "" {
		testenv.Cannot(t, "there is no qemu-%s: `make setup` installs it", arch)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, append([]string{path}, args...)...)
	cmd.WaitDelay = 30 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v (%v)\n%s", program, strings.Join(args, " "), err, ctx.Err(), &stderr)
	}
	return stdout.Bytes()
}

func TestShippedARM64AgentProbes(t *testing.T) {
	table := string(emulated(t, "aarch64", "arm64/deimos-agent", "probe"))
	if strings.Count(table, "\n") < 10 {
		t.Errorf("the table of this machine is too short to be one:\n%s", table)
	}

	raw := emulated(t, "aarch64", "arm64/deimos-agent", "probe", "-o", "json")
	var inventory map[string]any
	if err := json.Unmarshal(raw, &inventory); err != nil {
		t.Fatalf("probe -o json printed no JSON object: %v\n%s", err, raw)
	}
	if !mentions(inventory, "arm64") && !mentions(inventory, "aarch64") {
		t.Errorf("the inventory does not say that this is an arm64 machine:\n%s", raw)
	}
}

// mentions looks for a string value anywhere in decoded JSON.
func mentions(v any, want string) bool {
	switch v := v.(type) {
	case string:
		return v == want
	case []any:
		for _, e := range v {
			if mentions(e, want) {
				return true
			}
		}
	case map[string]any:
		for _, e := range v {
			if mentions(e, want) {
				return true
			}
		}
	}
	return false
}

func TestShippedAgentsTellTheirVersion(t *testing.T) {
	for program, arch := range map[string][2]string{
		"arm64/deimos-agent": {"aarch64", "arm64"},
		"armv7/deimos-agent": {"arm", "arm"},
	} {
		raw := emulated(t, arch[0], program, "version", "-o", "json")
		var got struct{ Version, OS, Arch string }
		if err := json.Unmarshal(raw, &got); err != nil {
			t.Fatalf("%s version -o json: %v\n%s", program, err, raw)
		}
		if got.Version != makefileVersion(t) || got.OS != "linux" || got.Arch != arch[1] {
			t.Errorf("%s says %+v, the Makefile built %s for linux/%s", program, got, makefileVersion(t), arch[1])
		}
	}
}

// makefileVersion reads the one place where the version stands.
func makefileVersion(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root(t), "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if name, v, ok := strings.Cut(line, ":="); ok && strings.TrimSpace(name) == "VERSION" {
			return strings.TrimSpace(v)
		}
	}
	t.Fatal("the Makefile has no VERSION := line")
	return ""
}
