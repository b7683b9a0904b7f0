package main

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// A planted bug must still be one: its place is there, and what comes of it builds.
func TestEachPlantStillFits(t *testing.T) {
	t.Chdir("../..")
	for name, p := range plants {
		t.Run(name, func(t *testing.T) {
			list, err := p.Overlay(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			if out, err := exec.CommandContext(t.Context(), "go", "build", "-overlay", list, "./"+filepath.Dir(p.File)).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
