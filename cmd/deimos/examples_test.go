package main

import (
	"bytes"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

// An example that cannot be typed is worse than none: what is read here is the
// help as it is shown, on a narrow terminal.
func TestExamplesCanBeTyped(t *testing.T) {
	t.Setenv("COLUMNS", "80")
	t.Chdir(t.TempDir())
	for _, name := range []string{"wordcount.wasm", "thumbnail.wasm", "agent"} { // that the examples name
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var c commands
	v := reflect.ValueOf(&c).Elem()
	seen := 0
	for i := range v.NumField() {
		h, ok := v.Field(i).Addr().Interface().(kong.HelpProvider)
		if !ok {
			continue
		}
		wanted := strings.Count("\n"+h.Help(), "\n  deimos ")
		group := strings.ToLower(v.Type().Field(i).Name)
		for line := range strings.Lines(helpOf(t, group)) {
			// An example is indented, a line of "Usage:" is not.
			line, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "  ")
			line, _, _ = strings.Cut(strings.TrimSpace(line), "  ")
			args := strings.Fields(line)
			if !ok || len(args) == 0 || args[0] != "deimos" {
				continue
			}
			wanted--
			if strings.Contains(line, `"`) { // for a shell to read
				continue
			}
			seen++
			p, err := kong.New(&commands{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Parse(args[1:]); err != nil {
				t.Errorf("%s: %v", line, err)
			}
		}
		if wanted != 0 {
			t.Errorf("%d examples of \"deimos %s --help\" are not shown as they are:\n%s", wanted, group, helpOf(t, group))
		}
	}
	if seen < 15 {
		t.Errorf("only %d examples were found", seen)
	}
}

// helpOf is what a command shows with --help.
func helpOf(t *testing.T, command string) string {
	t.Helper()
	var out bytes.Buffer
	ended := false
	p, err := kong.New(&commands{}, helpOptions, kong.Name("deimos"), kong.Writers(&out, &out), kong.Exit(func(int) { ended = true }))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = p.Parse([]string{command, "--help"}) // goes on where it would have ended
	if !ended {
		t.Fatalf("%s has no help", command)
	}
	return out.String()
}
