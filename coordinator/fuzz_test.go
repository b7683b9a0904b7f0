package coordinator

import (
	"path"
	"strings"
	"testing"
)

func FuzzBlobRef(f *testing.F) {
	f.Add("chunk", strings.Repeat("a", 64))
	f.Add("module", strings.Repeat("A", 64))
	f.Add("served", strings.Repeat("é", 32))
	f.Add("attachment", strings.Repeat("0", 64))
	f.Add("", "")
	f.Fuzz(func(t *testing.T, kind, id string) {
		ref, err := parseBlobRef(kind, id)
		if err != nil {
			return
		}
		if ref.String() != kind+"/"+id || len(id) != 64 || strings.Trim(id, "0123456789abcdef") != "" ||
			kind != "chunk" && kind != "served" && kind != "module" {
			t.Errorf("%q %q was taken for a blob", kind, id)
		}
	})
}

func FuzzRepoPath(f *testing.F) {
	for _, s := range []string{"metadata/1.root.json", "targets/bundles/a+b_c.json", "..", "a/../b", "/a", "a//b", "a/", ".", "a\x00", "a\\b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if checkRepoPath(s) != nil {
			return
		}
		if s != path.Clean(s) || path.IsAbs(s) || s == "." || strings.HasPrefix(s, "..") || len(s) > maxRepoPath || strings.ContainsAny(s, "\\ \x00\n") {
			t.Errorf("%q was taken for a file of the repository", s)
		}
	})
}
