package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/internal/cli"
)

func TestTheOwnersWordIsKeptAndShown(t *testing.T) {
	state := t.TempDir()
	at := jobsState{State: state}
	list := func() string {
		return printed(t, func() {
			if err := (&jobsListCmd{jobsState: at, Output: cli.Output{Format: "table"}}).Run(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	said := func(run func() error) string {
		return printed(t, func() {
			if err := run(); err != nil {
				t.Error(err)
			}
		})
	}
	if got := list(); got != "no agent has run jobs here yet\n" {
		t.Errorf("got %q", got)
	}
	two := 2 * time.Hour
	out := said(func() error { return (&jobsPauseCmd{jobsState: at, For: &two}).Run(t.Context()) })
	w, err := agent.OwnersWord(state)
	if err != nil || !w.Paused || time.Until(w.Until) > two || time.Until(w.Until) < two-time.Minute {
		t.Errorf("%+v, %v", w, err)
	}
	if !strings.HasPrefix(out, "paused by you until ") || !strings.HasSuffix(list(), out) {
		t.Errorf("%q, and later %q", out, list())
	}
	said(func() error { return (&jobsFinishCmd{at}).Run(t.Context()) })
	if w, err := agent.OwnersWord(state); err != nil || w.Paused || !w.Finish {
		t.Errorf("%+v, %v", w, err)
	}
	said(func() error { return (&jobsResumeCmd{at}).Run(t.Context()) })
	if w, err := agent.OwnersWord(state); err != nil || w.Paused || w.Finish {
		t.Errorf("%+v, %v", w, err)
	}
	none := time.Duration(0)
	if err := (&jobsPauseCmd{jobsState: at, For: &none}).Run(t.Context()); cli.CodeOf(err) != cli.ExitUsage {
		t.Errorf("a pause for no time: %v", err)
	}
	if err := (&jobsPauseCmd{jobsState: jobsState{State: filepath.Join(state, "nowhere")}}).Run(t.Context()); err == nil {
		t.Error("a pause of a device that there is not")
	}
	// A word that cannot be read is not passed over in silence.
	if err := os.WriteFile(filepath.Join(state, "jobs", "owner.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (&jobsListCmd{jobsState: at}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "owner.json") {
		t.Errorf("a damaged word: %v", err)
	}
}

func TestJobsAreListedWithWhyTheyWait(t *testing.T) {
	state := t.TempDir()
	dir := filepath.Join(state, "jobs")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	raw := `{"at":"` + time.Now().UTC().Format(time.RFC3339) + `","code":"hot","reason":"the device is too hot","run":false,"begin":false,"walls":["seccomp","cgroup"],"room":{"held_bytes":5242880,"max_disk_bytes":1073741824,"max_input_bytes":2097152},"jobs":[
		{"order":"01A","module":"0123456789abcdef","state":"suspended","progress":0.25,"cpu_seconds":1.25,"code":"hot"},
		{"order":"01B","module":"0123456789abcdef","state":"waiting","code":"hot"}]}`
	if err := os.WriteFile(filepath.Join(dir, "now.json"), []byte(raw), 0o600); err != nil {
		t.Fatal(err)
	}
	got := printed(t, func() {
		if err := (&jobsListCmd{jobsState: jobsState{State: state}, Output: cli.Output{Format: "table"}}).Run(t.Context()); err != nil {
			t.Error(err)
		}
	})
	want := `ORDER  MODULE        STATE      DONE  CPU    WHY
01A    0123456789ab  suspended  25%   1.2 s  hot
01B    0123456789ab  waiting    0%    0.0 s  hot

around each job, beside its sandbox: seccomp, cgroup (missing here: landlock)
on the disk: 5.0 MiB of the 1.0 GiB that you give to all jobs together; one job reads 2.0 MiB at most

the device is too hot
`
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	old := strings.Replace(raw, raw[7:11], "2020", 1)
	if err := os.WriteFile(filepath.Join(dir, "now.json"), []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := printed(t, func() {
		if err := (&jobsListCmd{jobsState: jobsState{State: state}, Output: cli.Output{Format: "table"}}).Run(t.Context()); err != nil {
			t.Error(err)
		}
	}); !strings.Contains(got, "\nas of 2020-") {
		t.Errorf("old news are shown as\n%s", got)
	}
	var j agent.Jobs
	if err := json.Unmarshal([]byte(raw), &j); err != nil {
		t.Fatal(err)
	}
	if got := jobsLine(j); got != "0 running, 1 suspended, 1 waiting; the device is too hot" {
		t.Errorf("got %q", got)
	}
}
