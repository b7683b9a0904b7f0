package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
)

func TestALineIsTakenApartAsByXargs(t *testing.T) {
	const text = "one two  three\n\n \t \n'a b' \"c'd\" e\\ f g\"h i\"j\n'' x\n\tlast\tone\n"
	path := filepath.Join(t.TempDir(), "lines")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := argLines(path)
	want := [][]string{{"one", "two", "three"}, {"a b", "c'd", "e f", "gh ij"}, {"", "x"}, {"last", "one"}}
	if err != nil || !slices.EqualFunc(got, want, slices.Equal) {
		t.Errorf("%q, want %q: %v", got, want, err)
	}
	// The same file as xargs reads it.
	cmd := exec.Command("xargs", "-L1", "sh", "-c", `printf '[%s]' "$@"; echo`, "sh")
	cmd.Stdin = strings.NewReader(text)
	said, err := cmd.Output()
	if err != nil {
		t.Skip("no xargs to compare with: ", err)
	}
	var ours strings.Builder
	for _, args := range got {
		for _, a := range args {
			ours.WriteString("[" + a + "]")
		}
		ours.WriteByte('\n')
	}
	if ours.String() != string(said) {
		t.Errorf("%q, xargs has %q", ours.String(), said)
	}
}

func TestWhatIsNoListOfArgumentsIsRefused(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ text, says string }{
		{"a\nb 'c\n", "line 2"},
		{"a\nb\\\n", "backslash"},
		{"\n \n", "no line"},
		{strings.Repeat("x\n", api.MaxTasks+1), "split -l"},
		{"a\n" + strings.Repeat("x", api.MaxSpecText+2), "line 2"},
	} {
		path := filepath.Join(dir, "lines")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := argLines(path); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%.20q: %v, which does not say %q", c.text, err, c.says)
		}
	}
	if _, err := argLines(filepath.Join(dir, "none")); err == nil {
		t.Error("there is no such file")
	}
}
