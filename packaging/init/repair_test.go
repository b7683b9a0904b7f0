package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/packaging/init/gpt"
)

// must runs a program to its end by p, whose reaper would take that from os/exec.
func must(t *testing.T, p *processes, argv ...string) string {
	t.Helper()
	code, text, err := p.run(t.Context(), argv...)
	if err != nil || code != 0 {
		t.Fatalf("%v: %d, %v: %s", argv, code, err, text)
	}
	return text
}

// Reads behind the end of the file of a loop device fail, and writes there make it
// longer: as on a disk that does not read a sector until that is written again.
func TestWhatADiskDoesNotReadNowIsNotOverwritten(t *testing.T) {
	device, image := diskOf(t, 600<<20)
	d, s := dataOn(t, device, t.TempDir())
	p, err := d.prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.remember(p); err != nil {
		t.Fatal(err)
	}
	// Inodes in each group, and a full check to come.
	must(t, d.processes, d.tool("mke2fs"), "-q", "-F", "-t", "ext4", "-O", "^flex_bg", "-E", "lazy_itable_init=0", p.path)
	dir := t.TempDir()
	if err := mountData(p, dir); err != nil {
		t.Fatal(err)
	}
	const folders, each = 40, 5
	for i := range folders {
		for j := range each {
			write(t, filepath.Join(dir, fmt.Sprint(i), fmt.Sprint(j)), "mine")
		}
	}
	unmount(dir)
	must(t, d.processes, d.tool("tune2fs"), "-E", "force_fsck", p.path)
	end := p.First*gpt.Block + 4*ext4Group // of the groups that are read
	whole, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	loop, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(loop.Sync(), loop.Close(), os.Truncate(image, end), dropCaches()); err != nil {
		t.Fatal(err)
	}
	if f, err := os.Open(device); err != nil {
		t.Fatal(err)
	} else if _, err := f.ReadAt(make([]byte, 4096), end); err == nil {
		t.Fatal("the disk reads what is not there: the test shows nothing")
	} else {
		f.Close()
	}

	if _, err := d.prepare(t.Context()); err == nil || !strings.Contains(err.Error(), "fails to read") {
		t.Errorf("a disk that fails to read: %v; %q", err, s.lines)
	}
	if info, err := os.Stat(image); err != nil || info.Size() != end {
		t.Errorf("what cannot be read was written to: %d bytes of %d, %v", info.Size(), end, err)
	}

	passed, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = passed.WriteAt(whole[end:], end)
	if err := errors.Join(err, passed.Close(), dropCaches()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.prepare(t.Context()); err != nil {
		t.Fatalf("the disk reads again: %v; %q", err, s.lines)
	}
	if err := mountData(p, dir); err != nil {
		t.Fatal(err)
	}
	for i := range folders {
		for j := range each {
			if raw, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(i), fmt.Sprint(j))); string(raw) != "mine" {
				t.Errorf("%d/%d is lost: %v", i, j, err)
			}
		}
	}
	unmount(dir)

	// A sector that is never read again must not keep the device away for ever.
	must(t, d.processes, d.tool("tune2fs"), "-E", "force_fsck", p.path)
	if err := errors.Join(os.Truncate(image, end), dropCaches()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.prepare(t.Context()); err == nil {
		t.Error("given up at once")
	}
	d.unread = time.Now().Add(-readPatience)
	if _, err := d.prepare(t.Context()); err != nil {
		t.Errorf("after a day: %v; %q", err, s.lines)
	}
}

// dropCaches lets the next read ask the disk.
func dropCaches() error { return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200) }

func TestAReadFaultIsSeenHoweverMuchIsSaidBeforeIt(t *testing.T) {
	noise := strings.Repeat("Inode 12 ref count is 2, should be 1.  Fix? no\n", 1000)
	for text, want := range map[string]bool{
		"": false, noise: false,
		"Superblock invalid, trying backup blocks...\n":                                                                          false,
		noise + "Error reading block 66 (No data available) while getting next inode from scan.  Ignore error? no\n" + noise:     true,
		noise + "e2fsck: Attempt to read block from filesystem resulted in short read while trying to open /dev/sda2":            true,
		noise + "Error reading block 1 (Input/output error) while reading inode and block bitmaps" + strings.Repeat(" ", 10<<10): true,
	} {
		r := &readAll{Reader: strings.NewReader(text)}
		if got := readFault(r); (got != "") != want || r.left() {
			t.Errorf("%.60q…: %q; left: %v", strings.TrimPrefix(text, noise), got, r.left())
		}
	}
}

// readAll tells whether something is left: a tool that is not read to its end hangs.
type readAll struct{ *strings.Reader }

func (r *readAll) left() bool { return r.Len() > 0 }

func TestCheckOfADiskHasNoLimitWhileItReads(t *testing.T) {
	dir := t.TempDir()
	tool := filepath.Join(dir, "e2fsck")
	d, s := dataOn(t, dir, "")
	defer func(before time.Duration) { toolLook = before }(toolLook)
	toolLook = 10 * time.Millisecond
	run := func(limit time.Duration, script string) error {
		write(t, tool, "#!/bin/sh\n"+script)
		if err := os.Chmod(tool, 0o700); err != nil {
			t.Fatal(err)
		}
		return stepWhile(d.log, "checking", limit, func(ctx context.Context, moved func()) error {
			d.moved = moved
			d.tool = func(name string) string { return filepath.Join(dir, name) }
			return d.check(ctx, partition{path: "x"}, "-p")
		})
	}
	// It reads four times within its limit, and lasts three limits; a machine that is too busy
	// for that gets more time.
	for limit := 400 * time.Millisecond; ; limit *= 2 {
		err := run(limit, fmt.Sprintf("for i in 1 2 3 4 5 6 7 8 9 10 11 12; do read x < /proc/uptime; sleep %g; done\n", (limit/4).Seconds()))
		if err == nil {
			break
		}
		if limit > 10*time.Second {
			t.Errorf("a check that reads all the time was cut off: %v; %q", err, s.lines)
			break
		}
	}
	begun := time.Now()
	if err := run(400*time.Millisecond, "exec sleep 600\n"); !errors.Is(err, errLimit) {
		t.Errorf("a check that does nothing: %v", err)
	}
	if since := time.Since(begun); since > 2*time.Minute {
		t.Errorf("after %s", since)
	}
}
