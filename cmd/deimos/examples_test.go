package main

import (
	"reflect"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

// An example that cannot be typed is worse than none.
func TestExamplesCanBeTyped(t *testing.T) {
	var c commands
	v := reflect.ValueOf(&c).Elem()
	seen := 0
	for i := range v.NumField() {
		h, ok := v.Field(i).Addr().Interface().(kong.HelpProvider)
		if !ok {
			continue
		}
		for line := range strings.Lines(h.Help()) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), "  ")
			args := strings.Fields(line)
			if len(args) == 0 || args[0] != "deimos" || strings.Contains(line, `"`) {
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
	}
	if seen < 15 {
		t.Errorf("only %d examples were found", seen)
	}
}
