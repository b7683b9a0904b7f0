package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"maps"
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
		f, err := openOutput(t.Context(), p, "", aVersion)
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
		if _, err := openOutput(t.Context(), p, "", aVersion); err == nil {
			t.Error("two commands write the same file at once")
		}
		must(t, f.finish())
		wantFile(t, p, "half", mode)
	}
	f, err := openOutput(t.Context(), old, "", aVersion)
	must(t, err)
	_, err = io.WriteString(f, "less")
	must(t, err)
	f.abandon(false)
	wantFile(t, old, "half", 0o640)
	if list, _ := os.ReadDir(dir); len(list) != 2 {
		t.Errorf("left behind: %v", list)
	}
	if _, err := openOutput(t.Context(), dir, "", aVersion); err == nil {
		t.Error("a folder was opened")
	}
}

func TestWhatCameIsKeptForTheSameContentOnly(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	f, err := openOutput(t.Context(), path, "", aVersion)
	must(t, err)
	_, err = io.WriteString(f, "half")
	must(t, err)
	if kept := f.abandon(true); kept != 4 {
		t.Errorf("%d bytes are kept", kept)
	}
	f, err = openOutput(t.Context(), path, "", aVersion)
	must(t, err)
	before, err := io.ReadAll(f.before)
	must(t, err)
	if f.had != 4 || string(before) != "half" {
		t.Errorf("it goes on after %d bytes %q", f.had, before)
	}
	_, err = io.WriteString(f, " more")
	must(t, err)
	f.abandon(true)
	f, err = openOutput(t.Context(), path, "", anotherVersion)
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
		f, err := openOutput(t.Context(), path, "", aVersion)
		must(t, err)
		_, err = io.WriteString(f, "half")
		must(t, err)
		f.abandon(true)
		list := parts(t, dir)
		must(t, spoil(list[0]))
		f, err = openOutput(t.Context(), path, "", aVersion)
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
		f, err := openOutput(t.Context(), path, "", aVersion)
		must(t, err)
		_, err = io.WriteString(f, "content")
		must(t, err)
		must(t, f.finish())
	}
	f, err := openOutput(t.Context(), link, "", aVersion)
	must(t, err)
	_, err = io.WriteString(f, "half")
	must(t, err)
	f.abandon(false)
	wantFile(t, target, "longer than before", 0o600)
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
	if _, err := openOutput(ended, fifo, "", aVersion); !errors.Is(err, context.Canceled) {
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
		f, size, err := openInput(t.Context(), c.Object.Put.File)
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

// wantUntouched wants a file to be what it was, and beside it nothing that is no
// beginning of what it is to become.
func (m *machine) wantUntouched(out, content, data string) {
	m.t.Helper()
	wantFile(m.t, out, content, 0o600)
	for _, part := range parts(m.t, filepath.Dir(out)) {
		if raw, err := os.ReadFile(part); err != nil || !strings.HasPrefix(data, string(raw)) {
			m.t.Errorf("%d bytes are kept that are none of the file, %v", len(raw), err)
		}
	}
}

// Whatever the coordinator gives instead of what was stored: the command says why
// it refuses it, the file that was there is still there, and when the truth is told
// again it comes back.
func TestWhatIsNotWhatWasStoredIsRefusedAndNothingIsLost(t *testing.T) {
	m := newMachine(t)
	elsewhere, reached := askable(t, http.StatusOK, nil)
	at, err := api.LoadContext(elsewhere.Context)
	must(t, err)
	data := strings.Repeat("what was stored ", 100_000)
	file, other, out := filepath.Join(m.dir, "file"), filepath.Join(m.dir, "other"), filepath.Join(m.dir, "back")
	must(t, os.WriteFile(file, []byte(data), 0o600))
	must(t, os.WriteFile(other, []byte(data), 0o600))
	m.ok("object", "put", other, "--name", "file")
	second := m.s.object
	m.s.object = nil
	// The same file again, of somebody with another key.
	key := filepath.Join(filepath.Dir(m.args[1]), keyFile)
	must(t, os.Rename(key, key+".mine"))
	m.ok("object", "put", file)
	stranger := m.s.object
	m.s.object = nil
	must(t, os.Rename(key+".mine", key))
	m.ok("object", "put", file)
	truth, chunks := *m.s.object, m.s.chunks

	sealed := func(change func(manifest map[string]any)) func(o *api.Object) {
		return func(o *api.Object) {
			var manifest map[string]any
			must(t, json.Unmarshal(o.Manifest, &manifest))
			change(manifest)
			o.Manifest, err = json.Marshal(manifest)
			must(t, err)
		}
	}
	// change puts another letter of base64 there: the wrapped key is a text of such.
	change := func(field string, at int) func(map[string]any) {
		return func(manifest map[string]any) {
			raw, err := base64.StdEncoding.DecodeString(manifest[field].(string))
			must(t, err)
			if raw[at] == 'A' {
				raw[at] = 'B'
			} else {
				raw[at] = 'A'
			}
			manifest[field] = base64.StdEncoding.EncodeToString(raw)
		}
	}
	// stripe is the first one, of which two parts of six may be bad.
	stripe := func(change func(raw []byte) []byte) func(*api.Object) {
		return func(o *api.Object) {
			for _, ch := range o.Chunks[:3] {
				m.s.chunks[ch.ID] = change(bytes.Clone(m.s.chunks[ch.ID]))
			}
		}
	}
	for name, c := range map[string]struct {
		change func(o *api.Object)
		says   string
	}{
		"a manifest that was altered":   {change: sealed(change("sealed", 40)), says: "manifest"},
		"a manifest whose key was":      {change: sealed(change("key", 60)), says: "--identity"},
		"a manifest that was cut":       {change: func(o *api.Object) { o.Manifest = o.Manifest[:len(o.Manifest)/2] }, says: "manifest"},
		"no manifest":                   {change: func(o *api.Object) { o.Manifest = nil }, says: "manifest"},
		"a manifest of another file":    {change: func(o *api.Object) { o.Manifest = second.Manifest }, says: "list of the chunks"},
		"a manifest for another key":    {change: func(o *api.Object) { o.Manifest = stranger.Manifest }, says: "--identity"},
		"a record for another key":      {change: func(o *api.Object) { *o = *stranger }, says: "--identity"},
		"chunks of another file":        {change: func(o *api.Object) { o.Chunks = second.Chunks }, says: "list of the chunks"},
		"another size":                  {change: func(o *api.Object) { o.Size++ }, says: "the record says"},
		"plain, though it was not":      {change: func(o *api.Object) { o.Code, o.Manifest = nil, nil }, says: "--plain"},
		"chunks that were altered":      {change: stripe(func(raw []byte) []byte { raw[99] ^= 1; return raw }), says: "does not verify"},
		"chunks that are too short":     {change: stripe(func(raw []byte) []byte { return raw[:len(raw)-1] }), says: "does not verify"},
		"chunks that are too long":      {change: stripe(func(raw []byte) []byte { return append(raw, 0) }), says: "does not verify"},
		"chunks that are much too long": {change: stripe(func([]byte) []byte { return make([]byte, 5<<20) }), says: "larger than"},
		"chunks that are at another place": {change: func(*api.Object) {
			m.s.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/chunks/") {
					return false
				}
				http.Redirect(w, r, at.URL, http.StatusFound)
				return true
			})
		}, says: "302"},
		"a record that is at another place": {change: func(*api.Object) {
			m.s.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, at.URL, http.StatusTemporaryRedirect)
				return true
			})
		}, says: "307"},
	} {
		must(t, os.WriteFile(out, []byte("before"), 0o600))
		m.s.await()
		object := truth
		m.s.object, m.s.chunks = &object, maps.Clone(chunks)
		c.change(&object)
		said, err := m.run("object", "get", "file", "--out", out)
		m.s.setAnswer(nil)
		if err == nil || !strings.Contains(said, c.says) {
			t.Errorf("%s: %v, %s, not of %q", name, err, said, c.says)
		}
		m.wantUntouched(out, "before", data)
		m.s.object, m.s.chunks = &truth, chunks
		m.ok("object", "get", "file", "--out", out)
		m.wantUntouched(out, data, data)
	}
	if *reached != 0 {
		t.Errorf("another server was asked %d times", *reached)
	}
}
