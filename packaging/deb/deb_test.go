package deb

import (
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/ota/slot"
)

func read(t *testing.T, name string) string {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

var units = []string{"agent/deimos-agent.service", "coordinator/deimos.service"}

func TestUnitsAreRatedTwoOrBetter(t *testing.T) {
	analyze := testenv.Tool(t, "systemd-analyze", "systemd")
	for _, u := range units {
		// The threshold is in tenths, and what equals it passes.
		out, err := exec.CommandContext(t.Context(), analyze, "security", "--offline=true", "--threshold=20", "--no-pager", u).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", u, err, out)
		}
	}
}

func TestUnitsHaveNoUnknownWords(t *testing.T) {
	analyze := testenv.Tool(t, "systemd-analyze", "systemd")
	for _, u := range units {
		out, _ := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", "--recursive-errors=no", u).CombinedOutput()
		for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
			if line != "" && strings.Contains(line, filepath.Base(u)) && !strings.Contains(line, "is not executable") { // not installed here
				t.Errorf("%s", line)
			}
		}
	}
}

// TestStopOutlastsTheWatchdog: who kills the agent before it has ended leaves the
// machine's watchdog armed. The launcher waits 5 s longer than an agent takes, then
// kills it and ends; systemd must not be before it, on a slow machine neither.
func TestStopOutlastsTheWatchdog(t *testing.T) {
	const launcher, slow = slot.StopWithin + 5*time.Second, 15 * time.Second
	unit := read(t, units[0])
	if strings.Contains(unit, "--stop-within") {
		t.Error("the launcher is told another time, which this test does not know")
	}
	m := regexp.MustCompile(`(?m)^TimeoutStopSec=([0-9]+)$`).FindStringSubmatch(unit)
	if m == nil {
		t.Fatal("the agent's unit has no TimeoutStopSec in seconds")
	}
	if limit, err := time.ParseDuration(m[1] + "s"); err != nil || limit < launcher+slow {
		t.Errorf("systemd kills after %s (%v), but the launcher may take %s, and %s more where all is slow", limit, err, launcher, slow)
	}
}

// TestLauncherIsWhomSystemdTalksTo: it alone is asked to stop, and agents, its
// children, feed the watchdog of systemd.
func TestLauncherIsWhomSystemdTalksTo(t *testing.T) {
	unit := read(t, units[0])
	for _, want := range []string{"Type=notify", "NotifyAccess=all", "KillMode=mixed", "Restart=always"} {
		if !strings.Contains(unit, "\n"+want+"\n") {
			t.Errorf("the agent's unit has no %s", want)
		}
	}
}

// uncommented is a conffile with all its examples in force.
func uncommented(s string) string {
	return regexp.MustCompile(`(?m)^#([a-zA-Z\[])`).ReplaceAllString(s, "$1")
}

func TestEveryLineOfTheAgentsConffileIsUnderstood(t *testing.T) {
	raw := read(t, "agent/agent.toml")
	all := uncommented(raw)
	if all == raw || strings.Contains(all, "\n#coord") {
		t.Fatal("no example was found")
	}
	for _, text := range []string{raw, all} {
		file := filepath.Join(t.TempDir(), "agent.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := agent.LoadConfig(file); err != nil {
			t.Error(err)
		}
	}
}

func TestCoordinatorKnowsItsSettings(t *testing.T) {
	source := read(t, "../../cmd/deimos/serve.go")
	names := regexp.MustCompile(`(?m)^#?(DEIMOS_[A-Z_]+)=`).FindAllStringSubmatch(read(t, "coordinator/coordinator.env"), -1)
	if len(names) < 5 {
		t.Fatalf("only %d settings found", len(names))
	}
	for _, m := range names {
		if !strings.Contains(source, `env:"`+m[1]+`"`) {
			t.Errorf("deimos serve has no %s", m[1])
		}
	}
}

// TestGroupsOfTheRuleExist: udev ignores a rule whose group it does not know.
func TestGroupsOfTheRuleExist(t *testing.T) {
	users := read(t, "agent/sysusers.conf")
	rules := read(t, "agent/udev.rules")
	groups := regexp.MustCompile(`GROUP="([^"]+)"|chgrp ([a-z0-9-]+) `).FindAllStringSubmatch(rules, -1)
	if len(groups) < 4 {
		t.Fatalf("only %d groups found", len(groups))
	}
	for _, m := range groups {
		if !regexp.MustCompile(`(?m)^[ug] ` + m[1] + m[2] + ` `).MatchString(users) {
			t.Errorf("nothing makes the group %s%s", m[1], m[2])
		}
	}
}

func TestScriptsAreShell(t *testing.T) {
	scripts, err := filepath.Glob("*/p*[mt]")
	if err != nil || len(scripts) != 6 {
		t.Fatalf("maintainer scripts: %v, %v", scripts, err)
	}
	for _, s := range slices.Concat(scripts, []string{"lifecycle.sh", "empty.sh"}) {
		if out, err := exec.CommandContext(t.Context(), "sh", "-n", s).CombinedOutput(); err != nil {
			t.Errorf("%s: %s", s, out)
		}
		if s != "empty.sh" && !strings.Contains(read(t, s), "\nset -e") { // which is part of one
			t.Errorf("%s goes on after an error", s)
		}
	}
}

// TestAPurgeTakesTheStateAndNothingElse empties folders as each postrm does, in a mount
// namespace of its own. What is there in the end is named by paths.
func TestAPurgeTakesTheStateAndNothingElse(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ before, user, left string }{
		"a folder":      {"mkdir -p state/a state/.b/c; touch state/key 'state/.b/two words'", me.Username, "other other/theirs"},
		"none is there": {"true", me.Username, "other other/theirs"},
		"a bind mount of the same file system below it": {"mkdir -p 'state/a b/disk' state/c; touch 'state/a b/ours' state/key; mount --bind other 'state/a b/disk'", me.Username,
			"other other/theirs state state/a b state/a b/disk state/a b/disk/theirs"},
		"one beside ours":                {"mkdir -p state/disk state/disk2; mount --bind other state/disk", me.Username, "other other/theirs state state/disk state/disk/theirs"},
		"a mount itself":                 {"mkdir state; mount --bind state state; touch state/key", me.Username, "other other/theirs state"},
		"a link to what was given to it": {"mkdir given; touch given/key; ln -s given state", me.Username, "other other/theirs"},
		"a link to somebody else's":      {"ln -s other state", "somebody", "other other/theirs state"},
		"a link to nothing":              {"ln -s nothing state", me.Username, "other other/theirs"},
		"a link in it":                   {"mkdir state; ln -s ../other state/link", me.Username, "other other/theirs"},
	} {
		script := "set -e; mkdir other; touch other/theirs; " + c.before + "; . \"$1\"; said=yes; empty \"$PWD/state\" '" + c.user + "' || said=no; echo $said; find . -mindepth 1 -printf '%P\\n' | sort"
		empty, err := filepath.Abs("empty.sh")
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "unshare", "--user", "--map-current-user", "--keep-caps", "--mount", "sh", "-c", script, "sh", empty)
		cmd.Dir = t.TempDir()
		out, err := cmd.CombinedOutput()
		if err != nil && strings.HasPrefix(string(out), "unshare:") {
			testenv.Cannot(t, "no namespaces here: %s", out)
		}
		want := "yes " + c.left
		if strings.Contains(c.left, " state") {
			want = "no " + c.left
		}
		if got := strings.Join(strings.Split(strings.TrimSpace(string(out)), "\n"), " "); err != nil || got != want {
			t.Errorf("%s: it is %q (%v), want %q", name, got, err, want)
		}
	}
}

func TestChangelogHasThisRelease(t *testing.T) {
	version := regexp.MustCompile(`(?m)^VERSION *:= *(\S+)`).FindStringSubmatch(read(t, "../../Makefile"))
	if version == nil {
		t.Fatal("the Makefile has no version")
	}
	// As build writes it for dpkg.
	if want := "deimos (" + strings.Replace(version[1], "-", "~", 1) + ") "; !strings.HasPrefix(read(t, "changelog"), want) {
		t.Errorf("the changelog does not begin with %q, the version of the Makefile", want)
	}
}
