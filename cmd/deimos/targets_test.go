package main

import (
	"context"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/deimos-edge/deimos/internal/cli"
)

// typed runs a command as it is typed, against the coordinator of at.
func typed(t *testing.T, at *commands, args ...string) error {
	t.Helper()
	c := commands{}
	p, err := kong.New(&c, kong.BindTo(t.Context(), (*context.Context)(nil)), kong.Bind(&c))
	if err != nil {
		t.Fatal(err)
	}
	k, err := p.Parse(args)
	if err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	c.Context = at.Context
	return coded(k.Run())
}

// printed is what f writes to standard output.
func printed(t *testing.T, f func()) string {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stdout := os.Stdout
	os.Stdout = file
	defer func() { os.Stdout = stdout }()
	f()
	raw, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func wantUsage(t *testing.T, err error, what string) {
	t.Helper()
	if code := cli.CodeOf(err); code != cli.ExitUsage {
		t.Errorf("%s: exit code %d, %v", what, code, err)
	}
}

// A variable that is not set is an empty word to a command.
func TestAnEmptyNameIsNotEverybody(t *testing.T) {
	c, asked := askable(t, http.StatusOK, []string{})
	for _, command := range []string{"device list", "device set --set-group x", "order list", "order send device.ping", "order cancel --pending --yes",
		"release offer 1.0.0", "config list"} {
		for _, flag := range []string{"--group", "--device", "--label"} {
			args := append(strings.Fields(command), flag, "")
			wantUsage(t, typed(t, c, args...), strings.Join(args, " "))
			wantUsage(t, typed(t, c, append(args, "--group", "g")...), strings.Join(args, " ")+" and a group")
		}
	}
	for _, command := range []string{"config set beat.seconds=60", "config unset beat.seconds", "config show"} {
		for _, flag := range []string{"--group", "--device"} {
			wantUsage(t, typed(t, c, append(strings.Fields(command), flag, "")...), command+" "+flag)
		}
	}
	for _, flag := range []string{"--device", "--actor", "--action"} {
		wantUsage(t, typed(t, c, "log", flag, ""), "log "+flag)
	}
	wantUsage(t, typed(t, c, "device", "show", ""), "device show")
	if *asked != 0 {
		t.Errorf("the coordinator was asked %d times", *asked)
	}
}

func TestTheWholeFleetIsNamed(t *testing.T) {
	c, asked := askable(t, http.StatusOK, map[string]any{})
	commands := []string{"device set --set-group x", "order send device.ping", "order cancel --pending --yes", "release offer 1.0.0",
		"config set beat.seconds=60", "config unset beat.seconds"}
	for _, command := range commands {
		wantUsage(t, typed(t, c, strings.Fields(command)...), command)
		wantUsage(t, typed(t, c, append(strings.Fields(command), "--all", "--group", "g")...), command+" for all and a group")
	}
	if *asked != 0 {
		t.Errorf("the coordinator was asked %d times", *asked)
	}
	for _, command := range commands {
		before := *asked
		_ = typed(t, c, append(strings.Fields(command), "--all")...) // the answer is none of its own
		if *asked == before {
			t.Errorf("%s --all asked nothing", command)
		}
	}
}

func TestALabelHasOneValue(t *testing.T) {
	c, asked := askable(t, http.StatusOK, []string{})
	for _, command := range []string{"device list --label a=1 --label a=2", "device set --all --set-label a=1 --set-label a=2", "token create --label a=1 --label a=2"} {
		wantUsage(t, typed(t, c, strings.Fields(command)...), command)
	}
	if *asked != 0 {
		t.Errorf("the coordinator was asked %d times", *asked)
	}
}

func TestNothingToCancelIsSaid(t *testing.T) {
	c, _ := askable(t, http.StatusOK, map[string]any{"orders": []string{}})
	text := printed(t, func() {
		if err := typed(t, c, "order", "cancel", "--pending", "--all"); err != nil {
			t.Error(err)
		}
	})
	if !strings.Contains(text, "no open order") {
		t.Errorf("said %q", text)
	}
	text = printed(t, func() {
		if err := typed(t, c, "order", "cancel", "--pending", "--all", "-o", "json"); err != nil {
			t.Error(err)
		}
	})
	if strings.TrimSpace(text) != "[]" {
		t.Errorf("as JSON: %q", text)
	}
}

func TestWhoIsNotFoundNeedsNoToken(t *testing.T) {
	c, _ := askable(t, http.StatusOK, []string{})
	for command, token := range map[string]bool{"device list": true, "device list --group nobody": false, "config list --group nobody": false, "device list --state retired": false} {
		text := printed(t, func() {
			if err := typed(t, c, strings.Fields(command)...); err != nil {
				t.Errorf("%s: %v", command, err)
			}
		})
		if text == "" || strings.Contains(text, "token create") != token {
			t.Errorf("%s: %q", command, text)
		}
	}
}
