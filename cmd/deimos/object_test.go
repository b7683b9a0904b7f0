package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/deimos-edge/deimos/coordinator/api"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantFile(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	s, err := os.Lstat(path)
	must(t, err)
	if string(raw) != content || s.Mode() != mode {
		t.Errorf("%s: %q, %s; want %q, %s", filepath.Base(path), raw, s.Mode(), content, mode)
	}
}

var aVersion, anotherVersion = strings.Repeat("a", 64), strings.Repeat("b", 64)

func parts(t *testing.T, dir string) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(dir, ".*"))
	must(t, err)
	return list
}

func TestAFileAppearsWholeOrNotAtAll(t *testing.T) {
	umask := syscall.Umask(0o022)
	defer syscall.Umask(umask)
	dir := t.TempDir()
	path, old := filepath.Join(dir, "new"), filepath.Join(dir, "old")
	must(t, os.WriteFile(old, []byte("before"), 0o640))
	for p, mode := range map[string]os.FileMode{path: 0o644, old: 0o640} {
		f, err := openOutput(t.Context(), p, aVersion)
		must(t, err)
		_, err = io.WriteString(f, "half")
		must(t, err)
		if p == old {
			wantFile(t, p, "before", mode)
		} else if _, err := os.Lstat(p); err == nil {
			t.Error("it is there before it is whole")
		}
		list := parts(t, dir)
		if len(list) != 1 {
			t.Fatalf("written aside: %v", list)
		}
		wantFile(t, list[0], "half", 0o600)
		if _, err := openOutput(t.Context(), p, aVersion); err == nil {
			t.Error("two commands write the same file at once")
		}
		must(t, f.finish())
		wantFile(t, p, "half", mode)
	}
	f, err := openOutput(t.Context(), old, aVersion)
	must(t, err)
	_, err = io.WriteString(f, "less")
	must(t, err)
	f.abandon(false)
	wantFile(t, old, "half", 0o640)
	if list, _ := os.ReadDir(dir); len(list) != 2 {
		t.Errorf("left behind: %v", list)
	}
	if _, err := openOutput(t.Context(), dir, aVersion); err == nil {
		t.Error("a folder was opened")
	}
}

func TestWhatCameIsKeptForTheSameContentOnly(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	f, err := openOutput(t.Context(), path, aVersion)
	must(t, err)
	_, err = io.WriteString(f, "half")
	must(t, err)
	if kept := f.abandon(true); kept != 4 {
		t.Errorf("%d bytes are kept", kept)
	}
	f, err = openOutput(t.Context(), path, aVersion)
	must(t, err)
	before, err := io.ReadAll(f.before)
	must(t, err)
	if f.had != 4 || string(before) != "half" {
		t.Errorf("it goes on after %d bytes %q", f.had, before)
	}
	_, err = io.WriteString(f, " more")
	must(t, err)
	f.abandon(true)
	f, err = openOutput(t.Context(), path, anotherVersion)
	must(t, err)
	if f.had != 0 {
		t.Errorf("%d bytes of something else are there", f.had)
	}
	if list := parts(t, dir); len(list) != 1 {
		t.Errorf("beside it are %v", list)
	}
	f.abandon(true)
	// What others could write to, or have a name for, is not gone on with.
	for name, spoil := range map[string]func(part string) error{
		"open to others":  func(p string) error { return os.Chmod(p, 0o666) },
		"with two names":  func(p string) error { return os.Link(p, filepath.Join(dir, "second")) },
		"a symbolic link": func(p string) error { return errors.Join(os.Remove(p), os.Symlink(path, p)) },
	} {
		f, err := openOutput(t.Context(), path, aVersion)
		must(t, err)
		_, err = io.WriteString(f, "half")
		must(t, err)
		f.abandon(true)
		list := parts(t, dir)
		must(t, spoil(list[0]))
		f, err = openOutput(t.Context(), path, aVersion)
		if err == nil && f.had != 0 {
			t.Errorf("%s: it is gone on with", name)
		}
		if err == nil {
			f.abandon(false)
		}
		for _, p := range append(parts(t, dir), filepath.Join(dir, "second")) {
			_ = os.Remove(p)
		}
	}
}

func TestWhatIsNoFileIsWrittenToAndNotReplaced(t *testing.T) {
	dir := t.TempDir()
	fifo, link, target := filepath.Join(dir, "fifo"), filepath.Join(dir, "link"), filepath.Join(dir, "target")
	must(t, syscall.Mkfifo(fifo, 0o600))
	must(t, os.WriteFile(target, []byte("longer than before"), 0o600))
	must(t, os.Symlink(target, link))
	write := func(path string) {
		f, err := openOutput(t.Context(), path, aVersion)
		must(t, err)
		_, err = io.WriteString(f, "content")
		must(t, err)
		must(t, f.finish())
	}
	write(link)
	wantFile(t, target, "content", 0o600)
	write(os.DevNull)
	got := make(chan string, 1)
	go func() {
		raw, err := os.ReadFile(fifo)
		if err != nil {
			t.Error(err)
		}
		got <- string(raw)
	}()
	write(fifo)
	if raw := <-got; raw != "content" {
		t.Errorf("through the FIFO came %q", raw)
	}
	for path, kind := range map[string]os.FileMode{link: os.ModeSymlink, fifo: os.ModeNamedPipe, os.DevNull: os.ModeDevice | os.ModeCharDevice} {
		if s, err := os.Lstat(path); err != nil || s.Mode().Type() != kind {
			t.Errorf("%s is a %v now, %v", path, s.Mode().Type(), err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := openOutput(ended, fifo, aVersion); !errors.Is(err, context.Canceled) {
		t.Errorf("a FIFO that nobody reads: %v", err)
	}
	// The open that was given up ends with the program; here, it is let through.
	raw, err := os.OpenFile(fifo, os.O_RDONLY, 0)
	must(t, err)
	must(t, raw.Close())
}

// "-" is standard input as a whole argument only, not as the name of a file.
func TestAFileNamedDashIsAFile(t *testing.T) {
	dir := t.TempDir()
	dash := filepath.Join(dir, "-")
	must(t, os.WriteFile(dash, []byte("content"), 0o600))
	t.Chdir(dir)
	for arg, file := range map[string]bool{dash: true, "./-": true, "-": false} {
		var c commands
		p, err := kong.New(&c)
		must(t, err)
		_, err = p.Parse([]string{"object", "put", arg})
		must(t, err)
		f, size, err := openInput(c.Object.Put.File)
		must(t, err)
		if file != (f != os.Stdin) || file && size != int64(len("content")) {
			t.Errorf("%s: %s with %d bytes", arg, f.Name(), size)
		}
		if file {
			f.Close()
		}
	}
}

func TestAFileNamedDashIsWritten(t *testing.T) {
	sum := sha256.Sum256(nil)
	c, _ := askable(t, http.StatusOK, api.Object{Name: "empty", SHA256: hex.EncodeToString(sum[:])})
	dash := filepath.Join(t.TempDir(), "-")
	must(t, typed(t, c, "object", "get", "empty", "--out", dash))
	if _, err := os.Stat(dash); err != nil {
		t.Error(err)
	}
}
