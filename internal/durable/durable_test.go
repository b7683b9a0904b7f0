package durable

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestModeAndContentAreWhatWasAsked(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, content := range []string{"first", "second, longer"} {
		if err := WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != content {
			t.Fatalf("%q %v", got, err)
		}
	}
	if s, err := os.Stat(path); err != nil || s.Mode() != 0o644 {
		t.Errorf("mode %v %v", s.Mode(), err)
	}
	if err := CopyFile(filepath.Join(dir, "g"), path, 0o755); err != nil {
		t.Fatal(err)
	}
	if s, err := os.Stat(filepath.Join(dir, "g")); err != nil || s.Mode() != 0o755 {
		t.Errorf("mode %v %v", s.Mode(), err)
	}
}

// A secret must not be written where everybody's temporary files are, not even
// for a moment.
func TestNothingIsWrittenOutsideTheFolder(t *testing.T) {
	dir, common := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", common)
	path := filepath.Join(dir, "secret")
	err := Replace(path, 0o600, func(w io.Writer) error {
		if left, _ := os.ReadDir(common); len(left) > 0 {
			t.Errorf("%s stands in the common temporary folder", left[0].Name())
		}
		aside, _ := os.ReadDir(dir)
		if len(aside) != 1 || aside[0].Name() == "secret" {
			t.Errorf("written aside: %v", aside)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAFailureLeavesTheOldFileAndNothingElse(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	full := errors.New("disk full")
	err := Replace(path, 0o600, func(w io.Writer) error {
		_, _ = w.Write([]byte("ne"))
		return full
	})
	if !errors.Is(err, full) {
		t.Fatalf("%v", err)
	}
	if got, _ := os.ReadFile(path); string(got) != "old" {
		t.Errorf("the old content became %q", got)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func TestOnlyARegularFileOfThatSizeIsRead(t *testing.T) {
	dir := t.TempDir()
	file, fifo := filepath.Join(dir, "f"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.WriteFile(file, []byte("four"), 0o600), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	if raw, err := ReadFile(file, 4); err != nil || string(raw) != "four" {
		t.Errorf("%q %v", raw, err)
	}
	if raw, err := ReadFile(file, 3); err == nil {
		t.Errorf("one byte too many: %q", raw)
	}
	for _, path := range []string{fifo, dir, "/dev/zero"} {
		if _, err := ReadFile(path, 4); err == nil || errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := ReadFile(filepath.Join(dir, "none"), 4); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}
