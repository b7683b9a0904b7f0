package main

import (
	"io/fs"
	"path/filepath"
	"testing"

	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/wire"
)

// What the coordinator runs itself is compiled once: challenges are of few modules.
func TestEngineKeepsCompiledCode(t *testing.T) {
	t.Parallel()
	// (module (func (export "_start")))
	module := []byte("\x00asm\x01\x00\x00\x00\x01\x04\x01\x60\x00\x00\x03\x02\x01\x00\x07\x0a\x01\x06_start\x00\x00\x0a\x04\x01\x02\x00\x0b")
	e := &engine{cache: filepath.Join(t.TempDir(), compiledDir)}
	if r, err := e.compute(t.Context(), coordinator.ComputeJob{Module: module, Limits: wire.OrdinaryLimits}); err != nil || r.Engine == "" {
		t.Fatalf("%+v %v", r, err)
	}
	files := 0
	err := filepath.WalkDir(e.cache, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files++
		}
		return err
	})
	if err != nil || files != 1 {
		t.Errorf("%d files of compiled code, %v", files, err)
	}
}
