package main

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// A line that is longer than the terminal would be broken, and stay there.
func TestTheProgressFitsTheTerminal(t *testing.T) {
	for _, total := range []int64{-1, 0, 1 << 20, 3 << 40} {
		p := &progress{what: "einen ziemlich langen Namen hat diese Datei über alles.tar.gz", total: total, began: time.Now().Add(-time.Hour)}
		p.add(max(total/3, 5<<30))
		if total > 0 {
			p.done.Store(total / 3)
		}
		whole := p.line(200)
		if !strings.HasPrefix(whole, p.what+": ") || !strings.HasSuffix(whole, "/s") && !strings.HasSuffix(whole, " left") {
			t.Errorf("with room for all: %q", whole)
		}
		for width := range 120 {
			line := p.line(width)
			if n := utf8.RuneCountInString(line); n >= max(width, 1) && n > 0 {
				t.Errorf("%d columns: %d characters: %q", width, n, line)
			}
			if width >= 30 && total > 0 && !strings.Contains(line, "33%") {
				t.Errorf("%d columns: how far it is, is not said: %q", width, line)
			}
		}
	}
}
