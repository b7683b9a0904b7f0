package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// The key of a file whose name is taken is not kept: the same command would be refused
// for ever. What was cut off for another reason goes on.
func TestAPutThatCannotGoOnLeavesNothing(t *testing.T) {
	for code, kept := range map[string]bool{"exists": false, "too_few_devices": true} {
		s := &putState{path: filepath.Join(t.TempDir(), "state")}
		must(t, s.keep())
		refused := &api.Error{APIError: wire.APIError{Code: code, Reason: "no"}}
		err := s.interrupted(fmt.Errorf("storing x: %w", refused), 100)
		if !errors.Is(err, refused) {
			t.Error("the reason is gone:", err)
		}
		if _, err := os.Stat(s.path); (err == nil) != kept {
			t.Errorf("%s: kept %v, want %v", code, err == nil, kept)
		}
	}
}

func TestAnEmptyNameIsNoName(t *testing.T) {
	empty := ""
	if err := (&objectPutCmd{Name: &empty}).check(); err == nil {
		t.Error("a file is stored under another name than the empty one that was asked for")
	}
	if err := (&objectPutCmd{}).check(); err != nil {
		t.Error(err)
	}
}
