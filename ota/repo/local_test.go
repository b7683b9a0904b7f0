package repo

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStickCannotLeadElsewhere(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("x"), 0o600))
	must(t, os.Symlink(secret, filepath.Join(dir, "link")))
	for _, path := range []string{"link", "../secret", secret} {
		if r, err := Dir(dir).Open(t.Context(), path, 0); err == nil {
			r.Close()
			t.Errorf("%s was opened", path)
		}
	}
}

// TestWhatIsNoFileOnAStickIsNotOpened: a FIFO would wait for its other end for ever.
func TestWhatIsNoFileOnAStickIsNotOpened(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	for name, spoil := range map[string]func(string) error{
		"a FIFO": func(path string) error { return unix.Mkfifo(path, 0o644) },
		"a link to a FIFO": func(path string) error {
			return errors.Join(unix.Mkfifo(path+"x", 0o644), os.Symlink(filepath.Base(path)+"x", path))
		},
		"a folder":           func(path string) error { return os.Mkdir(path, 0o755) },
		"a socket":           func(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o644, 0) },
		"a link to a device": func(path string) error { return os.Symlink("/dev/zero", path) },
	} {
		dir := filepath.Join(t.TempDir(), "stick")
		must(t, os.CopyFS(dir, os.DirFS(f.repo)))
		path := filepath.Join(dir, "metadata", "timestamp.json")
		must(t, os.Remove(path))
		must(t, spoil(path))
		c, err := NewClient(ClientOptions{Dir: t.TempDir(), Root: f.root(), Limits: Limits{Metadata: time.Minute, Attempts: 1}, Source: Dir(dir)})
		must(t, err)
		err = inTime(t, func() error { return c.Refresh(t.Context(), now) })
		words := "not a regular file"
		if name == "a link to a device" {
			words = "escapes" // the stick
		}
		refused(t, err, Unreachable, words)
		if name == "a folder" {
			continue
		}
		err = inTime(t, func() error { _, _, err := OpenPlace(t.Context(), path); return err })
		if err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s as an archive: %v", name, err)
		}
	}
}

// inTime fails the test if f hangs.
func inTime(t *testing.T, f func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-time.After(2 * time.Minute):
		t.Fatal("it hangs")
		return nil
	}
}

// TestWhatAStickLacksIsAskedForOnce: to wait does not make it whole. A server is asked again.
func TestWhatAStickLacksIsAskedForOnce(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(20<<10))
	stick := filepath.Join(t.TempDir(), "stick")
	must(t, os.CopyFS(stick, os.DirFS(f.repo)))
	part := filepath.Join(stick, "parts", form.SHA256)
	must(t, os.Truncate(part, form.Size/2))
	timestamp := filepath.Join(stick, "metadata", "timestamp.json")
	for _, local := range []bool{true, false} {
		source := &counted{Source: Dir(stick), opened: map[string]int{}}
		c, err := NewClient(ClientOptions{Dir: t.TempDir(), Root: f.root(), Limits: Limits{Pause: time.Millisecond, Attempts: 3}, Local: local, Source: source})
		must(t, err)
		must(t, c.Refresh(t.Context(), now))
		refused(t, c.FetchPart(t.Context(), form, filepath.Join(t.TempDir(), "part"), nil), Unreachable, map[bool]string{true: "it is cut short: copy it again", false: "unexpected EOF"}[local])
		must(t, os.Rename(timestamp, timestamp+".away"))
		must(t, os.Mkdir(timestamp, 0o755)) // as good as a bad sector: it is there, and cannot be read
		refused(t, c.Refresh(t.Context(), now), Unreachable, "not a regular file")
		must(t, os.Remove(timestamp))
		must(t, os.Rename(timestamp+".away", timestamp))
		opened := [2]int{source.opened["parts/"+form.SHA256], source.opened["metadata/timestamp.json"] - 1}
		if once := opened == [2]int{1, 1}; once != local || !local && min(opened[0], opened[1]) < 3 {
			t.Errorf("local: %v; asked %v times", local, opened)
		}
	}
}

// counted counts how often files are opened.
type counted struct {
	Source
	opened map[string]int
}

func (c *counted) Open(ctx context.Context, path string, offset int64) (io.ReadCloser, error) {
	c.opened[path]++
	return c.Source.Open(ctx, path, offset)
}

// TestAStickThatDiesIsGivenUp while it is opened, and while it is read.
func TestAStickThatDiesIsGivenUp(t *testing.T) {
	back := make(chan struct{}) // when the disk comes back
	closed := make(chan struct{}, 2)
	dying := &dyingDisk{back, closed}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := inTime(t, func() error {
		_, err := patient(ctx, func() (io.ReadCloser, error) { <-back; return dying, nil })
		return err
	})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("opened: %v", err)
	}
	f := newFleet(t)
	c, err := NewClient(ClientOptions{Dir: t.TempDir(), Root: f.root(), Limits: Limits{Metadata: 50 * time.Millisecond, Attempts: 1}, Source: dying})
	must(t, err)
	refused(t, inTime(t, func() error { return c.Refresh(t.Context(), now) }), Slow, "too slowly")
	close(back)
	for range 2 { // what came back late was closed
		<-closed
	}
}

type dyingDisk struct{ back, closed chan struct{} }

func (d *dyingDisk) Open(ctx context.Context, _ string, _ int64) (io.ReadCloser, error) {
	return patient(ctx, func() (io.ReadCloser, error) { return d, nil })
}

func (d *dyingDisk) Read(p []byte) (int, error) { <-d.back; clear(p); return len(p), nil }

func (d *dyingDisk) Close() error { d.closed <- struct{}{}; return nil }
