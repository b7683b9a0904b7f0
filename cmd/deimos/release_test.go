package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestOnlyWhatBelongsToARepositoryIsUploaded, what is named before what names it.
func TestOnlyWhatBelongsToARepositoryIsUploaded(t *testing.T) {
	want := []string{
		"parts/aa", "targets/bundles/bb.1.0.0.json", "metadata/1.root.json", "metadata/1.targets.json",
		"metadata/1.snapshot.json", "metadata/timestamp.json",
	}
	dir := t.TempDir()
	for _, name := range append([]string{".lock", "notes.txt", "parts/.aa123", "metadata/.timestamp.json7"}, want...) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := repoFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	place := func(name string) int { return slices.Index(got, name) }
	if len(got) != len(want) || !slices.IsSortedFunc(want[2:], func(a, b string) int { return place(a) - place(b) }) ||
		place("metadata/1.root.json") < 2 || slices.ContainsFunc(want, func(name string) bool { return place(name) < 0 }) {
		t.Errorf("it would upload %v", got)
	}
}
