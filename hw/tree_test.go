package hw

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// A recorded machine is kept as one text file, NAME.tree: one entry a line,
// PATH = "content" in Go's quotes, PATH -> TARGET for a symbolic link, or PATH/
// for an empty directory; # begins a comment.

var pack = flag.String("pack", "", "DIR=NAME: write the machine recorded in DIR to testdata/NAME.tree")

// TestPack is a tool: it does nothing without its flag.
func TestPack(t *testing.T) {
	dir, name, ok := strings.Cut(*pack, "=")
	if !ok {
		t.Skip("no -pack DIR=NAME")
	}
	var out bytes.Buffer
	out.WriteString("# Recorded with deimos-agent probe --record; what identifies the machine was replaced.\n\n")
	out.WriteString(packed(t, dir))
	must(t, os.WriteFile(filepath.Join("testdata", name+".tree"), out.Bytes(), 0o644))
}

// packed writes a directory as text.
func packed(tb testing.TB, dir string) string {
	var out strings.Builder
	must(tb, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			fmt.Fprintf(&out, "%s -> %s\n", name, target)
			return err
		case d.IsDir():
			entries, err := os.ReadDir(p)
			if len(entries) == 0 {
				fmt.Fprintf(&out, "%s/\n", name)
			}
			return err
		case !d.Type().IsRegular():
			return fmt.Errorf("%s is neither a file nor a link nor a directory", name)
		}
		raw, err := os.ReadFile(p)
		fmt.Fprintf(&out, "%s = %s\n", name, strconv.Quote(string(raw)))
		return err
	}))
	return out.String()
}

// plant makes a machine out of a file of testdata and returns its root.
func plant(tb testing.TB, file string) string {
	tb.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", file))
	must(tb, err)
	root := tb.TempDir()
	for n, line := range strings.Split(string(raw), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if name, target, ok := strings.Cut(line, " -> "); ok {
			p := filepath.Join(root, name)
			must(tb, os.MkdirAll(filepath.Dir(p), 0o755))
			must(tb, os.Symlink(target, p))
			continue
		}
		if name, ok := strings.CutSuffix(line, "/"); ok {
			must(tb, os.MkdirAll(filepath.Join(root, name), 0o755))
			continue
		}
		name, quoted, ok := strings.Cut(line, " = ")
		content, err := strconv.Unquote(quoted)
		if !ok || err != nil {
			tb.Fatalf("%s:%d: neither a file nor a link nor a directory", file, n+1)
		}
		put(tb, root, name, content)
	}
	return root
}

func put(tb testing.TB, root, name, content string) {
	tb.Helper()
	p := filepath.Join(root, name)
	must(tb, os.MkdirAll(filepath.Dir(p), 0o755))
	must(tb, os.WriteFile(p, []byte(content), 0o644))
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
