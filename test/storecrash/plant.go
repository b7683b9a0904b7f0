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
	// A segment is deleted before what was moved out of it is durable.
	"move": {File: "sync/store/commit.go", Replace: []planted.Replace{
		{Was: "if err == nil && s.written {", Is: "if err == nil && s.written && !s.moving {"},
		{Was: "func (s *stage) addMoves(r *request) error {\n", Is: "func (s *stage) addMoves(r *request) error {\n\ts.moving = true\n"},
		{Was: "type stage struct {\n", Is: "type stage struct {\n\tmoving bool\n"},
	}},
	// A segment is left for the next one before all of it is durable.
	"rotated": {File: "sync/store/segments.go", Replace: []planted.Replace{
		{Was: "	if err := l.sync(); err != nil {\n		return err\n	}\n	return l.close()\n", Is: "	return l.close()\n"},
	}},
	// A segment is deleted before the index knows what became of what was in it.
	"unindexed": {File: "sync/store/move.go", Replace: []planted.Replace{
		{Was: "if err := v.hand(ctx, &request{flush: true}); err != nil {", Is: "if err := ctx.Err(); err != nil {"},
	}},
	// Drops go with the segment that they were written to, though what they drop is there.
	"undropped": {File: "sync/store/move.go", Replace: []planted.Replace{
		{Was: "	for len(graves) > 0 {", Is: "	for false {"},
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
