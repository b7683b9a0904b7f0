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

// plant is a bug that is put into the agent, to see that the cuts find it. It is one
// that no other test would see: without a cut, all works as ever.
type plant struct {
	planted.Bug
	firmware bool // it needs an update in the recording
}

func bug(file, was, is string) plant {
	return plant{Bug: planted.Bug{File: file, Replace: []planted.Replace{{Was: was, Is: is}}}}
}

var plants = map[string]plant{
	// The receipt for a chunk is given before the disk was asked to write the chunk. A store
	// that asks but does not wait is not found here: the journal of orders is on the same disk
	// and flushes it before the receipt goes out. (test/storecrash finds it.)
	"receipt": {Bug: planted.Bug{File: "sync/store/segments.go", Replace: []planted.Replace{
		{Was: "if err := l.hooks.fdatasync(l.file); err != nil {", Is: "if err := error(nil); err != nil {"},
		{Was: "return l.beginWriting()", Is: "return nil"},
	}}},
	// An order is reported before the journal durably knows it.
	"journal": bug("agent/journal.go", "j.flush = j.db.Sync", "j.flush = func() error { return nil }"),
	// A new firmware gets its name before its bytes are durable.
	"firmware": {Bug: bug("ota/slot/firmware/firmware.go", "err = out.Sync()", "err = nil").Bug, firmware: true},
	// A file is replaced by one whose bytes are not durable.
	"file": bug("internal/durable/durable.go", "f.CloseAtomicallyReplace()",
		"func() error { defer f.Close(); return os.Rename(f.Name(), path) }()"),
}

const buildLimit = 10 * time.Minute

// image makes an image with the planted agent in dir.
func (p plant) image(ctx context.Context, bin, version, dir string) (image string, err error) {
	ctx, cancel := context.WithTimeout(ctx, buildLimit)
	defer cancel()
	list, err := p.Overlay(dir)
	if err != nil {
		return "", err
	}
	agent := filepath.Join(dir, "agent")
	if err := golang(ctx, []string{"GOOS=linux", "GOARCH=arm64"}, "build", "-overlay", list, "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -X main.version="+version, "-o", agent, "./cmd/deimos-agent"); err != nil {
		return "", err
	}
	err = golang(ctx, nil, "run", "./packaging/image", "-version", version, "-agent", agent,
		"-init", filepath.Join(bin, "arm64", "deimos-init"), "-out", dir)
	return filepath.Join(dir, "deimos-arm64-"+version+".img"), err
}

func golang(ctx context.Context, env []string, args ...string) error {
	c := exec.CommandContext(ctx, "go", args...)
	c.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w: %s", args[0], err, lastOf(strings.TrimSpace(string(out)), 2000))
	}
	return nil
}

// findPlanted records a life of the planted agent, and fails unless a cut finds
// the bug. How the cuts fail is the same as for a bug of our own.
func findPlanted(ctx context.Context, o options) (err error) {
	p, ok := plants[o.plant]
	if !ok {
		return fmt.Errorf("there is no bug %q to plant", o.plant)
	}
	dir, err := os.MkdirTemp("", "deimos-plant-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.image, err = p.image(ctx, o.bin, o.version, dir); err != nil {
		return err
	}
	if !p.firmware {
		o.firmware = ""
	}
	rec, err := recorded(ctx, o)
	if err != nil {
		return err
	}
	defer rec.Close()
	out, err := replayAll(ctx, rec, o)
	if err != nil {
		return err
	}
	if len(out.Failures) == 0 {
		return fmt.Errorf("the planted bug %q (in %s) was not found by %d cuts", o.plant, p.File, out.Points)
	}
	fmt.Printf("       the planted bug %q is found, in %d of %d cuts, as by this one: %s\n", o.plant, len(out.Failures), out.Points, out.Failures[0])
	return nil
}
