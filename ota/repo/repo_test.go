package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/ota/bundle"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fleet is a release manager's desk: keys and a repository behind a web server.
type fleet struct {
	t          *testing.T
	keys, repo string
	server     *httptest.Server

	mu       sync.Mutex
	hook     func(w http.ResponseWriter, r *http.Request) bool // true: it has answered
	requests []string                                          // path, and range if any
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{t: t, keys: filepath.Join(t.TempDir(), "keys"), repo: t.TempDir()}
	must(t, Init(f.keys, InitOptions{Now: now}))
	files := http.FileServer(http.Dir(f.repo))
	f.server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.requests = append(f.requests, strings.TrimSpace(r.URL.Path+" "+r.Header.Get("Range")))
		hook := f.hook
		f.mu.Unlock()
		if hook == nil || !hook(w, r) {
			files.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(f.server.Close)
	return f
}

func (f *fleet) onRequest(hook func(http.ResponseWriter, *http.Request) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = hook
}

func (f *fleet) seen(text string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.requests {
		if strings.Contains(r, text) {
			n++
		}
	}
	return n
}

// release builds and publishes a version whose agent is content.
func (f *fleet) release(version, content string) bundle.Form {
	f.t.Helper()
	dir := f.t.TempDir()
	agent := filepath.Join(dir, "agent")
	must(f.t, os.WriteFile(agent, []byte(content), 0o755))
	m, err := bundle.Build(f.t.Context(), filepath.Join(dir, "bundle"), bundle.BuildOptions{
		Version: version, Fast: true,
		Agents: []bundle.Agent{{Path: agent, Platform: bundle.Platform{OS: "linux", Arch: "arm64"}}},
	})
	must(f.t, err)
	f.publish(filepath.Join(dir, "bundle"), now)
	return m.Parts[0].Forms[0]
}

func (f *fleet) publish(bundleDir string, at time.Time) {
	f.t.Helper()
	_, err := Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: bundleDir, Now: at})
	must(f.t, err)
}

func (f *fleet) root() []byte {
	f.t.Helper()
	raw, err := Root(f.keys)
	must(f.t, err)
	return raw
}

var quick = Limits{Pause: time.Millisecond, Attempts: 2}

func (f *fleet) client(dir string) *Client {
	f.t.Helper()
	c, err := NewClient(ClientOptions{Dir: dir, Root: f.root(), Limits: quick, Source: HTTP{Client: f.server.Client(), Base: f.server.URL}})
	must(f.t, err)
	return c
}

// refused checks that a refresh fails for the reason wanted and says so in words.
func refused(t *testing.T, err error, want Condition, words string) {
	t.Helper()
	if conditionOf(err) != want || !strings.Contains(err.Error(), words) {
		t.Errorf("got %q: %v; want %q with %q", conditionOf(err), err, want, words)
	}
}

func TestReleaseGoesFromKeysToDevice(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", strings.Repeat("agent ", 1000))
	for name, source := range map[string]Source{"web": HTTP{Client: f.server.Client(), Base: f.server.URL + "/"}, "stick": Dir(f.repo)} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c, err := NewClient(ClientOptions{Dir: dir, Root: f.root(), Source: source, Limits: quick})
			must(t, err)
			must(t, c.Refresh(t.Context(), now))
			m, err := c.Manifest(t.Context(), TargetName("1.1.0"))
			must(t, err)
			if m.Version != "1.1.0" || len(c.Targets()) != 1 {
				t.Errorf("%+v, %v", m, c.Targets())
			}
			must(t, c.FetchPart(t.Context(), form, filepath.Join(dir, "part"), nil))
			must(t, bundle.Unpack(t.Context(), open(t, filepath.Join(dir, "part")), m.Parts[0], form, nil, filepath.Join(dir, "agent")))
			if _, err := c.Manifest(t.Context(), TargetName("9.9.9")); conditionOf(err) != Missing {
				t.Errorf("an unsigned name: %v", err)
			}
		})
	}
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func TestKeysAreSafelyMade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	must(t, Init(dir, InitOptions{}))
	for _, f := range []string{"root-1.pem", "root-2.pem", "root-3.pem", "targets.pem", "snapshot.pem", "timestamp.pem", "log.pem"} {
		fi, err := os.Stat(filepath.Join(dir, f))
		must(t, err)
		if fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f, fi.Mode())
		}
		if _, err := LoadKey(filepath.Join(dir, f), nil); err != nil {
			t.Error(err)
		}
	}
	before, err := os.ReadFile(filepath.Join(dir, "targets.pem"))
	must(t, err)
	if err := Init(dir, InitOptions{}); err == nil || !strings.Contains(err.Error(), "never overwritten") {
		t.Errorf("a second Init: %v", err)
	}
	if after, _ := os.ReadFile(filepath.Join(dir, "targets.pem")); !bytes.Equal(before, after) {
		t.Error("a key was overwritten")
	}
	if err := Init(filepath.Join(t.TempDir(), "k"), InitOptions{RootKeys: 3, Threshold: 1}); err == nil {
		t.Error("one root key alone was enough")
	}
}

func TestNoRootIsSaid(t *testing.T) {
	if _, err := NewClient(ClientOptions{Dir: t.TempDir()}); !errors.Is(err, ErrNoRoot) {
		t.Error(err)
	}
}

func TestOtherKeysAreRefused(t *testing.T) {
	f, thief := newFleet(t), newFleet(t)
	f.release("1.1.0", "good")
	dir := t.TempDir()
	must(t, f.client(dir).Refresh(t.Context(), now))
	thief.release("1.2.0", "evil")
	thief.release("1.3.0", "evil") // newer versions of everything
	thief.release("1.4.0", "evil")
	c, err := NewClient(ClientOptions{Dir: dir, Root: f.root(), Limits: quick, Source: HTTP{Client: thief.server.Client(), Base: thief.server.URL}})
	must(t, err)
	refused(t, c.Refresh(t.Context(), now), Signature, "not signed by enough of the keys")
	if _, err := c.Manifest(t.Context(), TargetName("1.2.0")); err == nil {
		t.Error("a manifest after a refused refresh")
	}
}

// edit changes a file of metadata. sign decides which keys sign it afresh; none
// leaves the old signatures.
func edit[T metadata.Roles](t *testing.T, path string, change func(*metadata.Metadata[T]), keys ...string) {
	t.Helper()
	m, err := new(metadata.Metadata[T]).FromFile(path)
	must(t, err)
	if change != nil {
		change(m)
	}
	m.ClearSignatures()
	for _, k := range keys {
		priv, err := LoadKey(k, nil)
		must(t, err)
		must(t, sign(m, priv))
	}
	raw, err := m.ToBytes(false)
	must(t, err)
	must(t, os.WriteFile(path, raw, 0o644))
}

func TestUnsignedMetadataIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	edit[metadata.TimestampType](t, filepath.Join(f.repo, "metadata/timestamp.json"), nil)
	refused(t, f.client(t.TempDir()).Refresh(t.Context(), now), Signature, "not signed by enough")
}

func TestUnsignedTargetsAreRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	// Timestamp and snapshot keys are stolen, the targets key is not.
	evil := filepath.Join(f.repo, "metadata/1.targets.json")
	edit[metadata.TargetsType](t, evil, func(m *metadata.Metadata[metadata.TargetsType]) {
		m.Signed.Targets["bundles/6.6.6.json"] = m.Signed.Targets["bundles/1.1.0.json"]
	}, filepath.Join(f.keys, "snapshot.pem"))
	raw, err := os.ReadFile(evil)
	must(t, err)
	edit[metadata.SnapshotType](t, filepath.Join(f.repo, "metadata/1.snapshot.json"), func(m *metadata.Metadata[metadata.SnapshotType]) {
		m.Signed.Meta["targets.json"] = fileInfo(raw, 1)
	}, filepath.Join(f.keys, "snapshot.pem"))
	raw, err = os.ReadFile(filepath.Join(f.repo, "metadata/1.snapshot.json"))
	must(t, err)
	edit[metadata.TimestampType](t, filepath.Join(f.repo, "metadata/timestamp.json"), func(m *metadata.Metadata[metadata.TimestampType]) {
		m.Signed.Meta["snapshot.json"] = fileInfo(raw, 1)
	}, filepath.Join(f.keys, "timestamp.pem"))
	refused(t, f.client(t.TempDir()).Refresh(t.Context(), now), Signature, "not signed by enough")
}

func TestRootShortOfItsThresholdIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	next := filepath.Join(f.repo, "metadata/2.root.json")
	rotate := func(keys ...string) {
		must(t, os.WriteFile(next, f.root(), 0o644))
		for i := range keys {
			keys[i] = filepath.Join(f.keys, keys[i])
		}
		edit[metadata.RootType](t, next, func(m *metadata.Metadata[metadata.RootType]) { m.Signed.Version = 2 }, keys...)
	}
	dir := t.TempDir()
	rotate("root-1.pem")
	refused(t, f.client(dir).Refresh(t.Context(), now), Signature, "got 1, want 2")
	rotate("root-1.pem", "targets.pem")
	refused(t, f.client(dir).Refresh(t.Context(), now), Signature, "got 1, want 2")
	rotate("root-1.pem", "root-3.pem")
	must(t, f.client(dir).Refresh(t.Context(), now))
	must(t, os.Remove(next)) // from here on the stored root is the second
	must(t, f.client(dir).Refresh(t.Context(), now))
	stored, err := metadata.Root().FromFile(filepath.Join(dir, rootFile))
	must(t, err)
	if stored.Signed.Version != 2 {
		t.Errorf("root version %d is stored, want 2", stored.Signed.Version)
	}
}

func TestRootOfOneKeyIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	weak := filepath.Join(f.repo, "metadata/2.root.json")
	must(t, os.WriteFile(weak, f.root(), 0o644))
	edit[metadata.RootType](t, weak, func(m *metadata.Metadata[metadata.RootType]) {
		m.Signed.Version = 2
		m.Signed.Roles["root"].Threshold = 1
	}, filepath.Join(f.keys, "root-1.pem"), filepath.Join(f.keys, "root-2.pem"))
	refused(t, f.client(t.TempDir()).Refresh(t.Context(), now), Malformed, "one key alone")
}

func TestAnotherEnrolmentRootIsRefused(t *testing.T) {
	f, other := newFleet(t), newFleet(t)
	dir := t.TempDir()
	f.release("1.1.0", "good")
	must(t, f.client(dir).Refresh(t.Context(), now))
	_, err := NewClient(ClientOptions{Dir: dir, Root: other.root(), Source: Dir(f.repo)})
	refused(t, err, OtherRoot, "another update root")
}

// TestLeavingForgetsTheMetadataOfAnotherRootOnly: the same root keeps its
// protection against older metadata.
func TestLeavingForgetsTheMetadataOfAnotherRootOnly(t *testing.T) {
	f, other := newFleet(t), newFleet(t)
	dir := filepath.Join(t.TempDir(), "tuf")
	must(t, Leave(dir, f.root())) // of a new device
	f.release("1.1.0", "good")
	must(t, f.client(dir).Refresh(t.Context(), now))
	must(t, Leave(dir, f.root()))
	if _, err := os.Stat(filepath.Join(dir, "timestamp.json")); err != nil {
		t.Error("the metadata of the same root is gone")
	}
	other.release("2.0.0", "theirs")
	must(t, Leave(dir, other.root()))
	c := other.client(dir)
	must(t, c.Refresh(t.Context(), now))
	if _, err := c.Manifest(t.Context(), TargetName("2.0.0")); err != nil {
		t.Error(err)
	}
	must(t, Leave(dir, nil)) // to a fleet without releases
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}

// TestWhatMarksAnotherFleetsMetadataGoesLast, so that what a cut leaves is still left.
func TestWhatMarksAnotherFleetsMetadataGoesLast(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	f.release("1.1.0", "good")
	must(t, f.client(dir).Refresh(t.Context(), now))
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK)
	must(t, err)
	defer unix.Close(watch)
	_, err = unix.InotifyAddWatch(watch, dir, unix.IN_DELETE)
	must(t, err)
	must(t, Leave(dir, nil))
	raw := make([]byte, 64<<10)
	n, err := unix.Read(watch, raw)
	must(t, err)
	var gone []string
	for raw = raw[:n]; len(raw) > 0; {
		length := binary.NativeEndian.Uint32(raw[12:]) // struct inotify_event
		gone = append(gone, string(bytes.TrimRight(raw[16:16+length], "\x00")))
		raw = raw[16+length:]
	}
	if len(gone) < 4 || gone[len(gone)-1] != enrolledFile {
		t.Errorf("removed in this order: %q", gone)
	}
}

func TestRollbackIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	old := t.TempDir()
	must(t, os.CopyFS(old, os.DirFS(f.repo)))
	f.release("1.2.0", "two")
	dir := t.TempDir()
	must(t, f.client(dir).Refresh(t.Context(), now))
	c, err := NewClient(ClientOptions{Dir: dir, Root: f.root(), Source: Dir(old), Limits: quick})
	must(t, err)
	refused(t, c.Refresh(t.Context(), now), Rollback, "metadata/timestamp.json: it goes back behind")
	must(t, os.Remove(filepath.Join(dir, "timestamp.json"))) // the snapshot protects on its own
	refused(t, c.Refresh(t.Context(), now), Rollback, "goes back behind")
	must(t, os.Remove(filepath.Join(dir, "timestamp.json"))) // it kept the old one
	must(t, f.client(dir).Refresh(t.Context(), now))         // nothing was spoilt
}

func TestExpiredMetadataIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	dir := t.TempDir()
	must(t, f.client(dir).Refresh(t.Context(), now.Add(DefaultExpiry.Timestamp-time.Hour)))
	late := now.Add(DefaultExpiry.Timestamp + time.Hour)
	// A freeze: the very timestamp that is known, again and again.
	refused(t, f.client(dir).Refresh(t.Context(), late), Expired, "it has expired")
	refused(t, f.client(t.TempDir()).Refresh(t.Context(), late), Expired, "takes the time to be 2026-04-15")
	f.publish("", late)
	must(t, f.client(dir).Refresh(t.Context(), late))
	refused(t, f.client(dir).Refresh(t.Context(), now.Add(DefaultExpiry.Root+time.Hour)), Expired, "it has expired")
}

func TestMixedMetadataIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	old, err := os.ReadFile(filepath.Join(f.repo, "metadata/1.snapshot.json"))
	must(t, err)
	f.release("1.2.0", "two")
	must(t, os.WriteFile(filepath.Join(f.repo, "metadata/2.snapshot.json"), old, 0o644))
	refused(t, f.client(t.TempDir()).Refresh(t.Context(), now), Digest, "not the signed ones")
}

func TestEndlessFilesAreCut(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	for _, name := range []string{"2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json", ".1.1.0.json"} {
		var sent int
		done := make(chan struct{})
		f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, name) {
				return false
			}
			defer close(done)
			for block := make([]byte, 32<<10); ; sent += len(block) {
				if _, err := w.Write(block); err != nil {
					return true
				}
			}
		})
		c := f.client(t.TempDir())
		err := c.Refresh(t.Context(), now)
		if err == nil {
			_, err = c.Manifest(t.Context(), TargetName("1.1.0"))
		}
		refused(t, err, Size, "does not end after")
		<-done // the client hung up
		t.Logf("%s: %d KB taken by client and network", name, sent>>10)
	}
}

func TestEndlessPartIsCutAtItsSignedSize(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", "good")
	part, err := os.ReadFile(filepath.Join(f.repo, bundle.PartPath(form.SHA256)))
	must(t, err)
	done := make(chan struct{})
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		defer close(done)
		for _, err := w.Write(part); err == nil; _, err = w.Write(make([]byte, 32<<10)) {
		}
		return true
	})
	path := filepath.Join(t.TempDir(), "part")
	must(t, f.client(t.TempDir()).FetchPart(t.Context(), form, path, nil))
	<-done
	if got, _ := os.ReadFile(path); !bytes.Equal(got, part) {
		t.Errorf("%d bytes on disk, want %d", len(got), len(part))
	}
}

func TestAlteredPartIsRefused(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(64<<10))
	file := filepath.Join(f.repo, bundle.PartPath(form.SHA256))
	raw, err := os.ReadFile(file)
	must(t, err)
	raw[len(raw)/2] ^= 1
	must(t, os.WriteFile(file, raw, 0o644))
	path := filepath.Join(t.TempDir(), "part")
	refused(t, f.client(t.TempDir()).FetchPart(t.Context(), form, path, nil), Digest, "not the signed ones")
	for _, p := range []string{path, path + ".partial"} {
		if _, err := os.Stat(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was kept", p)
		}
	}
	if n := f.seen("/parts/"); n != 1 {
		t.Errorf("fetched %d times: wrong bytes from the start will not get better", n)
	}
}

func TestAlteredManifestIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	files, err := filepath.Glob(filepath.Join(f.repo, "targets/bundles/*.1.1.0.json"))
	must(t, err)
	raw, err := os.ReadFile(files[0])
	must(t, err)
	must(t, os.WriteFile(files[0], bytes.Replace(raw, []byte("1.1.0"), []byte("1.1.1"), 1), 0o644))
	c := f.client(t.TempDir())
	must(t, c.Refresh(t.Context(), now))
	_, err = c.Manifest(t.Context(), TargetName("1.1.0"))
	refused(t, err, Digest, "not the signed ones")
}

func TestSlowSourceIsGivenUp(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(64<<10))
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		_, _ = w.Write([]byte("x"))
		w.(http.Flusher).Flush()
		<-r.Context().Done() // until the client hangs up
		return true
	})
	c := f.client(t.TempDir())
	c.o.Limits = Limits{Metadata: 20 * time.Millisecond, Window: 20 * time.Millisecond, MinBytes: 100, Attempts: 1, Pause: time.Millisecond}
	refused(t, c.FetchPart(t.Context(), form, filepath.Join(t.TempDir(), "part"), nil), Slow, "too slowly")
	refused(t, c.Refresh(t.Context(), now), Slow, "too slowly")
}

func TestMissingFileIsNotAskedForAgain(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", "good")
	must(t, os.RemoveAll(filepath.Join(f.repo, "parts")))
	refused(t, f.client(t.TempDir()).FetchPart(t.Context(), form, filepath.Join(t.TempDir(), "part"), nil), Missing, "not there")
	if n := f.seen("/parts/"); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestBrokenServerIsAskedAgain(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	n := 0
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		if n++; n%2 == 1 {
			w.WriteHeader(http.StatusBadGateway)
			return true
		}
		return false
	})
	must(t, f.client(t.TempDir()).Refresh(t.Context(), now))
	f.server.Close()
	refused(t, f.client(t.TempDir()).Refresh(t.Context(), now), Unreachable, "could not be fetched")
}

// TestAnotherPlaceIsAskedWhenOneFails, whether it is not there, breaks off, or is
// too slow; and the bytes that came before stay.
func TestAnotherPlaceIsAskedWhenOneFails(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", noise(64<<10))
	good := HTTP{Client: f.server.Client(), Base: f.server.URL}
	gone := httptest.NewTLSServer(nil)
	gone.Close()
	half := func(then func(*http.Request)) *httptest.Server {
		s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			raw, err := os.ReadFile(filepath.Join(f.repo, filepath.FromSlash(r.URL.Path)))
			if err != nil {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
			_, _ = w.Write(raw[:len(raw)/2])
			w.(http.Flusher).Flush()
			then(r)
		}))
		t.Cleanup(s.Close)
		return s
	}
	for name, s := range map[string]*httptest.Server{
		"not there": gone, "breaks off": half(func(*http.Request) {}), "hangs": half(func(r *http.Request) { <-r.Context().Done() }),
	} {
		dir := t.TempDir()
		source := NewMirrors(HTTP{Client: s.Client(), Base: s.URL}, good)
		c, err := NewClient(ClientOptions{Dir: dir, Root: f.root(), Source: source,
			Limits: Limits{Metadata: 2 * time.Second, Window: 2 * time.Second, MinBytes: 1, Attempts: 6, Pause: time.Millisecond}})
		must(t, err)
		if err := c.FetchPart(t.Context(), form, filepath.Join(dir, "part"), nil); err != nil {
			t.Errorf("%s: a part: %v", name, err)
		}
		if s != gone && f.seen("bytes=") == 0 {
			t.Errorf("%s: the part was fetched anew", name)
		}
		source.at = 0
		if err := c.Refresh(t.Context(), now); err != nil {
			t.Errorf("%s: metadata: %v", name, err)
		}
		if _, err := source.Open(t.Context(), "nothing", 0); !errors.Is(err, fs.ErrNotExist) || source.at != 1 {
			t.Errorf("%s: a file that is not there: %v, and asks %d next", name, err, source.at)
		}
		f.mu.Lock()
		f.requests = nil
		f.mu.Unlock()
	}
	none := NewMirrors(HTTP{Client: gone.Client(), Base: gone.URL}, HTTP{Client: gone.Client(), Base: gone.URL + "/second"})
	if _, err := none.Open(t.Context(), "metadata/timestamp.json", 0); err == nil || strings.Count(err.Error(), gone.URL) != 2 {
		t.Errorf("with none: %v", err)
	}
}

func TestEndOfContextIsHandedBack(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	ctx, cancel := context.WithCancel(t.Context())
	f.onRequest(func(_ http.ResponseWriter, r *http.Request) bool { cancel(); <-r.Context().Done(); return true })
	if err := f.client(t.TempDir()).Refresh(ctx, now); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestDamagedStoreHeals damages each stored file in turn.
func TestDamagedStoreHeals(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	dir := t.TempDir()
	for _, file := range []string{"root.json", "timestamp.json", "snapshot.json", "targets.json"} {
		must(t, f.client(dir).Refresh(t.Context(), now))
		must(t, os.WriteFile(filepath.Join(dir, file), []byte(`{"signed":`), 0o644))
		if err := f.client(dir).Refresh(t.Context(), now); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// TestStolenOnlineKeysCannotCrashTheFleet signs nonsense with real keys.
func TestStolenOnlineKeysCannotCrashTheFleet(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	dir := t.TempDir()
	must(t, f.client(dir).Refresh(t.Context(), now))
	path := filepath.Join(f.repo, "metadata/timestamp.json")
	for name, meta := range map[string]map[string]*metadata.MetaFiles{
		"nothing": {}, "null": {"snapshot.json": nil},
	} {
		edit[metadata.TimestampType](t, path, func(m *metadata.Metadata[metadata.TimestampType]) {
			m.Signed.Version++
			m.Signed.Meta = meta
		}, filepath.Join(f.keys, "timestamp.pem"))
		for _, d := range []string{dir, t.TempDir()} {
			if err := f.client(d).Refresh(t.Context(), now); conditionOf(err) != Malformed {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func (f *fleet) metadata(role string, version int64) string {
	return filepath.Join(f.repo, metadataPath(role, version))
}

func (f *fleet) key(role string) string { return filepath.Join(f.keys, role+".pem") }

// signTargets changes what the first targets name, and all that leads there, as who has
// stolen the online keys can.
func (f *fleet) signTargets(change func(map[string]*metadata.TargetFiles)) {
	f.t.Helper()
	edit[metadata.TargetsType](f.t, f.metadata(metadata.TARGETS, 1), func(m *metadata.Metadata[metadata.TargetsType]) { change(m.Signed.Targets) }, f.key(metadata.TARGETS))
	edit[metadata.SnapshotType](f.t, f.metadata(metadata.SNAPSHOT, 1), func(m *metadata.Metadata[metadata.SnapshotType]) {
		m.Signed.Meta["targets.json"] = fileInfo(read(f.t, f.metadata(metadata.TARGETS, 1)), 1)
	}, f.key(metadata.SNAPSHOT))
	edit[metadata.TimestampType](f.t, f.metadata(metadata.TIMESTAMP, 0), func(m *metadata.Metadata[metadata.TimestampType]) {
		m.Signed.Meta["snapshot.json"] = fileInfo(read(f.t, f.metadata(metadata.SNAPSHOT, 1)), 1)
	}, f.key(metadata.TIMESTAMP))
}

// TestAReleaseUnderAnothersNameIsRefused: an old one, signed as if it were new.
func TestAReleaseUnderAnothersNameIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	f.signTargets(func(m map[string]*metadata.TargetFiles) { m[TargetName("1.2.0")] = m[TargetName("1.1.0")] })
	files, err := filepath.Glob(filepath.Join(f.repo, "targets/bundles/*.1.1.0.json"))
	must(t, err)
	must(t, os.WriteFile(strings.Replace(files[0], "1.1.0.json", "1.2.0.json", 1), read(t, files[0]), 0o644))
	must(t, take(t, f.client(t.TempDir()), "1.1.0"))
	refused(t, take(t, f.client(t.TempDir()), "1.2.0"), Malformed, "it says that it is version 1.1.0")
}

// TestAReleaseIsSignedByItsSHA256: another digest would bind it, but not to the log.
func TestAReleaseIsSignedByItsSHA256(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	f.signTargets(func(m map[string]*metadata.TargetFiles) {
		m[TargetName("1.1.0")].Hashes = metadata.Hashes{"sha512": make([]byte, 64)}
	})
	refused(t, take(t, f.client(t.TempDir()), "1.1.0"), Malformed, "signed without a SHA-256")
}

// TestSignedSizesHaveLimits: who has stolen the online keys signs sizes that no such file
// has, and sends as much.
func TestSignedSizesHaveLimits(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	name := TargetName("1.1.0")
	for _, length := range []int64{bundle.MaxManifest + 1, 0, -1} {
		f.signTargets(func(m map[string]*metadata.TargetFiles) { m[name].Length = length })
		refused(t, take(t, f.client(t.TempDir()), "1.1.0"), Size, "is not allowed")
	}
	edit[metadata.TimestampType](t, f.metadata(metadata.TIMESTAMP, 0), func(m *metadata.Metadata[metadata.TimestampType]) {
		m.Signed.Meta["snapshot.json"].Length = 1 << 40
	}, f.key(metadata.TIMESTAMP))
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "1.snapshot.json") {
			return false
		}
		_, _ = w.Write(make([]byte, 2*maxSnapshot))
		return true
	})
	refused(t, take(t, f.client(t.TempDir()), "1.1.0"), Size, fmt.Sprintf("does not end after the %d bytes", maxSnapshot))
}

func TestVersionNeverChangesItsContent(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	dir := t.TempDir()
	agent := filepath.Join(dir, "agent")
	must(t, os.WriteFile(agent, []byte("two"), 0o755))
	_, err := bundle.Build(t.Context(), dir, bundle.BuildOptions{Version: "1.1.0", Agents: []bundle.Agent{{Path: agent, Platform: bundle.Platform{OS: "linux", Arch: "arm64"}}}})
	must(t, err)
	if _, err := Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: dir, Now: now}); err == nil || !strings.Contains(err.Error(), "a version never changes") {
		t.Error(err)
	}
	must(t, f.client(t.TempDir()).Refresh(t.Context(), now))
}

func TestPublishRefusesWhatIsNotItsOwn(t *testing.T) {
	f, other := newFleet(t), newFleet(t)
	f.release("1.1.0", "one")
	if _, err := Publish(PublishOptions{Keys: other.keys, Repo: f.repo, Now: now}); err == nil || !strings.Contains(err.Error(), "not signed by the keys") {
		t.Errorf("another fleet's keys: %v", err)
	}
	dir := t.TempDir()
	agent := filepath.Join(dir, "agent")
	must(t, os.WriteFile(agent, []byte("two"), 0o755))
	m, err := bundle.Build(t.Context(), dir, bundle.BuildOptions{Version: "1.2.0", Agents: []bundle.Agent{{Path: agent, Platform: bundle.Platform{OS: "linux", Arch: "arm64"}}}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, bundle.PartPath(m.Parts[0].Forms[0].SHA256)), []byte("x"), 0o644))
	if _, err := Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: dir, Now: now}); err == nil || !strings.Contains(err.Error(), "not what the manifest says") {
		t.Errorf("an altered bundle: %v", err)
	}
	if _, err := Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Now: now.Add(3 * 365 * day)}); err == nil || !strings.Contains(err.Error(), "the root expired") {
		t.Errorf("an expired root: %v", err)
	}
}

// TestInterruptedPublishLeavesTheRepositoryAsItWas: all files of the next
// publication are there but the timestamp, which is written last.
func TestInterruptedPublishLeavesTheRepositoryAsItWas(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	timestamp := filepath.Join(f.repo, "metadata/timestamp.json")
	before, err := os.ReadFile(timestamp)
	must(t, err)
	f.release("1.2.0", "two")
	must(t, os.WriteFile(timestamp, before, 0o644))
	dir := t.TempDir()
	c := f.client(dir)
	must(t, c.Refresh(t.Context(), now))
	if got := c.Targets(); len(got) != 1 || got[0] != TargetName("1.1.0") {
		t.Errorf("%v", got)
	}
	f.release("1.3.0", "three") // and the next one is not confused by what it finds
	c = f.client(dir)
	must(t, c.Refresh(t.Context(), now))
	if got := c.Targets(); len(got) != 2 {
		t.Errorf("%v", got)
	}
}

func TestErrorsAreSentences(t *testing.T) {
	e := &Error{Condition: Digest, File: "parts/x", Reason: "its bytes are not the signed ones"}
	if e.Error() != "parts/x: its bytes are not the signed ones" || !Hostile(fmt.Errorf("wrapped: %w", e)) {
		t.Error(e)
	}
	if Hostile(&Error{Condition: Unreachable}) || Hostile(nil) {
		t.Error("being unreachable is no attack")
	}
	if _, err := json.Marshal(e.Condition); err != nil {
		t.Error(err)
	}
}
