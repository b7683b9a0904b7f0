package hw

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// plant makes a machine out of a file of testdata and returns its root.
func plant(tb testing.TB, file string) string {
	tb.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		tb.Fatal(err)
	}
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
		name, quoted, ok := strings.Cut(line, " = ")
		content, err := strconv.Unquote(quoted)
		if !ok || err != nil {
			tb.Fatalf("%s:%d: neither a file nor a link", file, n+1)
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
