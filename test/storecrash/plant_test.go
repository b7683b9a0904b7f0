package main

import (
	"testing"
)

// A planted bug must still be one: its place is there, and what comes of it builds.
func TestEachPlantStillFits(t *testing.T) {
	t.Chdir("../..")
	for name, bug := range plants {
		t.Run(name, func(t *testing.T) {
			if _, err := build(t.Context(), bug, t.TempDir()); err != nil {
				t.Error(err)
			}
		})
	}
}
