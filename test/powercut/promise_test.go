package main

import (
	"path/filepath"
	"testing"
)

// A promise that was taken back before a cut is none after it.
func TestPromisesFollowTheirMarks(t *testing.T) {
	p := newPromises()
	for _, m := range []mark{{Receipt: "a"}, {Receipt: "b"}, {Order: "o"}, {Config: 3}, {Removing: []string{"a"}}} {
		p.take(m)
	}
	if _, asked := p.chunks["a"]; asked || !p.chunks["b"] || !p.orders["o"] || p.config != 3 {
		t.Errorf("%+v", p)
	}
	p.take(mark{Removed: []string{"a"}})
	if held, known := p.chunks["a"]; held || !known {
		t.Errorf("%+v", p)
	}
}

func TestTheBootLoadersChoice(t *testing.T) {
	files := func(names ...string) (all []espFile) {
		for _, n := range names {
			all = append(all, espFile{path: "EFI/Linux/" + n, size: 1})
		}
		return all
	}
	for want, names := range map[string][]string{
		"deimos_0.2.0+3.efi":   {"deimos_0.1.0.efi", "deimos_0.2.0+3.efi"},
		"deimos_0.1.0.efi":     {"deimos_0.2.0+0-3.efi", "deimos_0.1.0.efi", "deimos_0.3.0+3.efi.tmp"},
		"deimos_0.10.0.efi":    {"deimos_0.9.0.efi", "deimos_0.10.0.efi"},
		"deimos_0.2.0+0-3.efi": {"deimos_0.2.0+0-3.efi"},
	} {
		if got := choice(files(names...)); filepath.Base(got[0].path) != want {
			t.Errorf("%v: %s", names, got[0].path)
		}
	}
}
