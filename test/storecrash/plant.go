package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/test/powercut/planted"
)

// plants are bugs that are put into the store, to see that the cuts find them. They
// are such that no other test would see: without a cut, all works as ever.
var plants = map[string]planted.Bug{
	// The receipt for a chunk is given before the chunk is durable.
	"receipt": {File: "sync/store/options.go", Replace: []planted.Replace{
		{Was: "h.fdatasync = fdatasync", Is: "h.fdatasync = func(*os.File) error { return nil }"},
	}},
	// A value log is deleted before what was moved out of it is durable.
	"move": {File: "sync/store/commit.go", Replace: []planted.Replace{
		{Was: "return s.written || s.flush }", Is: "return s.written && !s.moving }"},
		{Was: "func (s *stage) addMoves(r *request) error {\n", Is: "func (s *stage) addMoves(r *request) error {\n\ts.moving = true\n"},
		{Was: "type stage struct {\n", Is: "type stage struct {\n\tmoving bool\n"},
	}},
	// A memtable that is full is not synced before it is a table.
	"rotated": {File: "sync/store/durable.go", Replace: []planted.Replace{
		{Was: "slices.Concat(s.values.logs, s.trees.logs)", Is: "slices.Concat(s.values.logs, s.trees.logs[len(s.trees.logs)-1:])"},
	}},
}

const buildLimit = 10 * time.Minute

// build builds this program with a bug in dir.
func build(ctx context.Context, b planted.Bug, dir string) (program string, err error) {
	ctx, cancel := context.WithTimeout(ctx, buildLimit)
	defer cancel()
	list, err := b.Overlay(dir)
	if err != nil {
		return "", err
	}
	program = filepath.Join(dir, "storecrash")
	c := exec.CommandContext(ctx, "go", "build", "-overlay", list, "-o", program, "./test/storecrash")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return program, nil
}
