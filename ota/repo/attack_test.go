package repo

import (
	"crypto"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// Which test tries which attack on updates: docs/developer.md, "Attacks on updates".

// TestOneStolenKeyInstallsNothing: a thief has one key, the mirror and the line, and
// keys of their own for all the rest. They serve all of theirs, or their file of that
// role among ours.
func TestOneStolenKeyInstallsNothing(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	for file, role := range map[string]string{
		"root-1.pem": metadata.ROOT, "targets.pem": metadata.TARGETS, "snapshot.pem": metadata.SNAPSHOT, "timestamp.pem": metadata.TIMESTAMP, "log.pem": LogRole,
	} {
		thief := newFleet(t)
		stolen, err := LoadPublicKey(filepath.Join(f.keys, file), nil)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(thief.keys, "stolen.pem"), read(t, filepath.Join(f.keys, file)), 0o600))
		keys := []crypto.PublicKey{stolen}
		if role == metadata.ROOT {
			own, err := LoadPublicKey(filepath.Join(thief.keys, "root-1.pem"), nil)
			must(t, err)
			keys = append(keys, own)
		}
		_, err = Rotate(thief.desk(), Rotation{Role: role, Keys: keys})
		must(t, err)
		thief.release("6.6.6", "evil")
		thief.release("6.6.7", "evil") // newer than all of ours
		known := t.TempDir()
		must(t, take(t, f.client(known), "1.1.0"))
		all := filepath.Join(t.TempDir(), "all")
		must(t, os.CopyFS(all, os.DirFS(thief.repo)))
		noRoots := filepath.Join(t.TempDir(), "no-roots")
		must(t, os.CopyFS(noRoots, os.DirFS(thief.repo)))
		roots, err := filepath.Glob(filepath.Join(noRoots, "metadata/*.root.json"))
		must(t, err)
		for _, r := range roots {
			must(t, os.Remove(r))
		}
		mixed := filepath.Join(t.TempDir(), "mixed")
		must(t, os.CopyFS(mixed, os.DirFS(f.repo)))
		mine := map[string]string{metadata.ROOT: "metadata/2.root.json", metadata.TARGETS: "metadata/1.targets.json",
			metadata.SNAPSHOT: "metadata/1.snapshot.json", metadata.TIMESTAMP: "metadata/timestamp.json", LogRole: checkpointFile}[role]
		must(t, os.WriteFile(filepath.Join(mixed, mine), read(t, filepath.Join(thief.repo, mine)), 0o644))
		for name, repo := range map[string]string{"all of the thief's": all, "all but roots": noRoots, "one of the thief's": mixed} {
			for _, dir := range []string{known, t.TempDir()} {
				for _, version := range []string{"6.6.6", "6.6.7"} {
					if err := take(t, f.from(dir, repo), version); err == nil {
						t.Errorf("%s, %s: %s would be installed", file, name, version)
					} else if c := conditionOf(err); repo != mixed && c != Signature {
						t.Errorf("%s, %s: %v", file, name, err)
					}
				}
			}
		}
	}
}

// TestFastForwardIsRecoveredFrom: with the keys of timestamp and snapshot a thief
// makes versions so high that ours look old, until other keys sign these roles.
func TestFastForwardIsRecoveredFrom(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	first := f.root()
	thief := f.twin()
	const far = 1 << 40
	snapshot := filepath.Join(thief.repo, "metadata/1.snapshot.json")
	edit[metadata.SnapshotType](t, snapshot, func(m *metadata.Metadata[metadata.SnapshotType]) {
		m.Signed.Version = far
		m.Signed.Meta["targets.json"].Version = far // which does not exist
	}, filepath.Join(f.keys, "snapshot.pem"))
	must(t, os.WriteFile(filepath.Join(thief.repo, metadataPath(metadata.SNAPSHOT, far)), read(t, snapshot), 0o644))
	edit[metadata.TimestampType](t, filepath.Join(thief.repo, "metadata/timestamp.json"), func(m *metadata.Metadata[metadata.TimestampType]) {
		m.Signed.Version = far
		m.Signed.Meta["snapshot.json"] = fileInfo(read(t, snapshot), far)
	}, filepath.Join(f.keys, "timestamp.pem"))
	dir := t.TempDir()
	refused(t, take(t, f.from(dir, thief.repo), "1.1.0"), Missing, "it is not there")
	f.release("1.2.0", "better")
	refused(t, take(t, f.clientOf(dir, first), "1.2.0"), Rollback, "goes back behind")
	f.rotate(metadata.TIMESTAMP)
	f.publish("", now)
	refused(t, take(t, f.clientOf(dir, first), "1.2.0"), Rollback, "goes back behind") // the snapshot is still ahead
	f.rotate(metadata.SNAPSHOT)
	f.publish("", now)
	must(t, take(t, f.clientOf(dir, first), "1.2.0"))
	c, err := NewClient(ClientOptions{Dir: dir, Root: first, Limits: quick, Source: Dir(thief.repo)})
	must(t, err)
	refused(t, c.Refresh(t.Context(), now), Signature, "not signed by enough") // and the thief's count no more
}

// TestHiddenRootIsNoticed: a mirror that shows new metadata without the new root, or
// nothing new at all.
func TestHiddenRootIsNoticed(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	first, old := f.root(), f.twin()
	dir := t.TempDir()
	must(t, take(t, f.clientOf(dir, first), "1.1.0"))
	f.rotate(metadata.TIMESTAMP)
	must(t, os.Remove(filepath.Join(f.keys, "timestamp.pem"))) // it was stolen, and signs no more
	f.publish("", now)
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "2.root.json") {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		return false
	})
	refused(t, take(t, f.clientOf(dir, first), "1.1.0"), Signature, "not signed by enough")
	f.onRequest(nil)
	must(t, take(t, f.clientOf(dir, first), "1.1.0"))
	c, err := NewClient(ClientOptions{Dir: t.TempDir(), Root: first, Limits: quick, Source: Dir(old.repo)})
	must(t, err)
	must(t, c.Refresh(t.Context(), now))                                                                                   // who was never shown the new root cannot know,
	refused(t, c.Refresh(t.Context(), now.Add(DefaultExpiry.Timestamp+day)), Expired, "newer metadata is being held back") // but not for long
}

// TestOnlyWhatIsSignedIsFetched: a mirror has more than was published, and names
// more in its answers; a device asks for what the signed metadata names and no more.
func TestOnlyWhatIsSignedIsFetched(t *testing.T) {
	f := newFleet(t)
	form := f.release("1.1.0", "good")
	f.release("1.2.0", "other")
	for _, extra := range []string{"metadata/9.root.json", "metadata/9.targets.json", "targets/bundles/" + strings.Repeat("a", 64) + ".6.6.6.json", "parts/" + strings.Repeat("b", 64), "log/tile/8/1/000.p/1"} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(f.repo, extra)), 0o755))
		must(t, os.WriteFile(filepath.Join(f.repo, extra), []byte("{}"), 0o644))
	}
	c := f.client(t.TempDir())
	must(t, take(t, c, "1.1.0"))
	must(t, c.FetchPart(t.Context(), form, filepath.Join(t.TempDir(), "part"), nil))
	sum := func(pattern string) string {
		files, err := filepath.Glob(filepath.Join(f.repo, pattern))
		must(t, err)
		s, _ := NamedSum("targets/bundles/" + filepath.Base(files[0]))
		return s
	}("targets/bundles/*.1.1.0.json")
	want := []string{
		"/metadata/2.root.json", "/metadata/timestamp.json", "/metadata/2.snapshot.json", "/metadata/2.targets.json",
		"/targets/bundles/" + sum + ".1.1.0.json", "/log/checkpoint", "/log/lookup/" + sum, "/log/tile/8/0/000.p/2", "/log/tile/8/data/000.p/2",
		"/parts/" + form.SHA256,
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	slices.Sort(want)
	got := slices.Clone(f.requests)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("it asked for\n%s\nand should for\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestMirrorThatLiesAtRandom: each answer may be another file, cut, altered, empty, too
// long, an error, or a broken line. What a device takes is what was published, or nothing.
func TestMirrorThatLiesAtRandom(t *testing.T) {
	seed := testenv.Seed(t)
	random := rand.New(rand.NewPCG(seed, seed))
	f := newFleet(t)
	form := f.release("1.1.0", noise(20<<10))
	must(t, take(t, f.client(t.TempDir()), "1.1.0"))
	honest, err := json.Marshal(manifest(t, f.client(t.TempDir())))
	must(t, err)
	var files []string
	must(t, filepath.WalkDir(f.repo, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	}))
	var one sync.Mutex // a client that has hung up may ask again before its last answer has ended
	f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
		one.Lock()
		defer one.Unlock()
		raw, err := os.ReadFile(filepath.Join(f.repo, filepath.FromSlash(r.URL.Path)))
		switch random.IntN(24) {
		case 0:
			raw, err = os.ReadFile(files[random.IntN(len(files))])
		case 1:
			raw = raw[:random.IntN(len(raw)+1)]
		case 2:
			if len(raw) > 0 {
				raw[random.IntN(len(raw))] ^= 1 << random.IntN(8)
			}
		case 3:
			raw = append(raw, make([]byte, random.IntN(100_000))...)
		case 4:
			w.WriteHeader([]int{http.StatusBadGateway, http.StatusNotFound, http.StatusGone, http.StatusForbidden, http.StatusNoContent}[random.IntN(5)])
			return true
		case 5:
			panic(http.ErrAbortHandler)
		case 6:
			raw = nil
		default:
			return false
		}
		if err != nil {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		_, _ = w.Write(raw)
		return true
	})
	taken, gone := 0, 0
	dir := t.TempDir()
	for i := range 300 {
		if i%3 == 0 {
			dir = t.TempDir()
		}
		c := f.client(dir)
		err := take(t, c, "1.1.0")
		if err != nil {
			if conditionOf(err) == "" {
				t.Fatalf("seed %d, round %d: no condition: %v", seed, i, err)
			}
			gone++
			continue
		}
		m, err := c.Manifest(t.Context(), TargetName("1.1.0"))
		if err == nil {
			if raw, _ := json.Marshal(m); string(raw) != string(honest) {
				t.Fatalf("seed %d, round %d: it took %s", seed, i, raw)
			}
		}
		part := filepath.Join(t.TempDir(), "part")
		if err := c.FetchPart(t.Context(), form, part, nil); err == nil {
			if _, sum, err := digestFile(part); err != nil || sum != form.SHA256 {
				t.Fatalf("seed %d, round %d: a part is %s (%v)", seed, i, sum, err)
			}
			taken++
		}
	}
	if taken == 0 || gone == 0 {
		t.Errorf("seed %d: %d were taken, %d refused: nothing was tried", seed, taken, gone)
	}
	f.onRequest(nil)
	must(t, take(t, f.client(dir), "1.1.0")) // nothing of it stays
}

func manifest(t *testing.T, c *Client) any {
	t.Helper()
	must(t, c.Refresh(t.Context(), now))
	m, err := c.Manifest(t.Context(), TargetName("1.1.0"))
	must(t, err)
	return m
}

// TestDroppedRequestsChangeNothing: the line to each file in turn is cut at the
// request, in the middle of the answer, or answers nothing until the device gives up.
func TestDroppedRequestsChangeNothing(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "old")
	dir := t.TempDir()
	must(t, take(t, f.client(dir), "1.1.0"))
	f.release("1.2.0", "new")
	for _, file := range []string{"2.root.json", "timestamp.json", "2.snapshot.json", "2.targets.json", ".1.2.0.json", "log/checkpoint", "log/lookup/", "log/tile/"} {
		for name, drop := range map[string]func(http.ResponseWriter, *http.Request){
			"at once": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
			"in the middle": func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Length", "1000")
				_, _ = io.WriteString(w, "{")
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			},
			"silence": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		} {
			f.onRequest(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, file) {
					return false
				}
				drop(w, r)
				return true
			})
			own := filepath.Join(t.TempDir(), "own")
			must(t, os.CopyFS(own, os.DirFS(dir)))
			c := f.client(own)
			c.o.Limits.Metadata = 100 * time.Millisecond
			err := take(t, c, "1.2.0")
			if got := conditionOf(err); got != Unreachable && got != Slow || Hostile(err) {
				t.Errorf("%s, %s: %v", file, name, err)
			}
			f.onRequest(nil)
			if err := take(t, f.client(own), "1.2.0"); err != nil {
				t.Errorf("%s, %s: and afterwards: %v", file, name, err)
			}
		}
	}
}

// TestWrongClock: of 1970 nothing has expired, but nothing goes back either; of 2040 all
// has. When the clock is right again, all is as it was.
func TestWrongClock(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	old := f.twin()
	f.release("1.2.0", "two")
	for _, at := range []time.Time{time.Unix(0, 0), time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC)} {
		for _, dir := range []string{t.TempDir(), t.TempDir()} {
			c := f.client(dir)
			err := c.Refresh(t.Context(), at)
			if at.Year() == 1970 {
				must(t, err)
				refused(t, f.from(dir, old.repo).Refresh(t.Context(), at), Rollback, "goes back behind")
			} else {
				refused(t, err, Expired, "takes the time to be 2040-01-01T00:00:00Z")
				if _, err := c.Manifest(t.Context(), TargetName("1.2.0")); err == nil {
					t.Error("a manifest by metadata that has expired")
				}
			}
			must(t, take(t, f.client(dir), "1.2.0"))
			refused(t, f.from(dir, old.repo).Refresh(t.Context(), now), Rollback, "goes back behind")
		}
	}
}

// TestDamagedStoreOfAnyKindHeals: every file that a device keeps, cut at many offsets,
// with a bit flipped at random places, garbage, or of another file; and what the other
// files protect from is still refused.
func TestDamagedStoreOfAnyKindHeals(t *testing.T) {
	seed := testenv.Seed(t)
	random := rand.New(rand.NewPCG(seed, seed))
	f := newFleet(t)
	f.release("1.1.0", "one")
	first := f.root()
	f.rotate(metadata.SNAPSHOT)
	f.release("1.2.0", "two")
	whole := t.TempDir()
	must(t, take(t, f.clientOf(whole, first), "1.2.0"))
	entries, err := os.ReadDir(whole)
	must(t, err)
	if len(entries) != 6 {
		t.Fatalf("a device keeps %v", entries)
	}
	for _, e := range entries {
		raw := read(t, filepath.Join(whole, e.Name()))
		var bad [][]byte
		for _, n := range []int{0, 1, 2, len(raw) / 4, len(raw) / 2, len(raw) - 2, len(raw) - 1} {
			bad = append(bad, raw[:n])
		}
		for range 12 {
			flipped := slices.Clone(raw)
			flipped[random.IntN(len(raw))] ^= 1 << random.IntN(8)
			bad = append(bad, flipped)
		}
		bad = append(bad, make([]byte, len(raw)), []byte("null"), []byte("{}"), []byte(`{"signed":null,"signatures":null}`), []byte(noise(1000)))
		for _, other := range entries {
			if other.Name() != e.Name() {
				bad = append(bad, read(t, filepath.Join(whole, other.Name())))
			}
		}
		for i, b := range bad {
			dir := filepath.Join(t.TempDir(), "tuf")
			must(t, os.CopyFS(dir, os.DirFS(whole)))
			must(t, os.WriteFile(filepath.Join(dir, e.Name()), b, 0o644))
			c, err := NewClient(ClientOptions{Dir: dir, Root: first, Limits: quick, Source: Dir(f.repo)})
			if err == nil {
				err = take(t, c, "1.2.0")
			}
			if err != nil && !(e.Name() == enrolledFile && isRoot(b)) {
				t.Errorf("seed %d: %s, damage %d: %v", seed, e.Name(), i, err)
			}
		}
	}
}

// isRoot tells whether this is a root that a device could have enrolled with: such
// is no damage, and is refused.
func isRoot(raw []byte) bool {
	_, err := RootVersion(raw)
	return err == nil
}

// TestPublishCutAtEachFile: the first so many files are there and no others. A device
// reads what was or what is to be, and the next publication is not confused.
func TestPublishCutAtEachFile(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	first := f.root()
	f.rotate(metadata.TARGETS)
	f.rotate(metadata.TIMESTAMP)
	next := f.pack("1.2.0")
	for cut := 0; ; cut++ {
		twin := f.twin()
		p := &publisher{PublishOptions: PublishOptions{Keys: f.keys, Repo: twin.repo, Bundle: next, Now: now}}
		unlock, err := p.lock()
		must(t, err)
		p.ring, err = Desk{Keys: f.keys}.keyring()
		must(t, err)
		must(t, p.load())
		_, err = p.addBundle()
		must(t, err)
		must(t, p.signAll())
		if len(p.files) < 10 {
			t.Fatalf("only %d files", len(p.files))
		}
		whole := cut >= len(p.files)
		p.files = p.files[:min(cut, len(p.files))]
		must(t, p.write())
		unlock()
		dir := t.TempDir()
		read := func(version string) error {
			c, err := NewClient(ClientOptions{Dir: dir, Root: first, Limits: quick, Source: Dir(twin.repo)})
			must(t, err)
			return take(t, c, version)
		}
		if err := read("1.1.0"); err != nil {
			t.Errorf("cut before file %d: %v", cut, err)
		}
		twin.release("1.3.0", "another")
		for _, v := range []string{"1.1.0", "1.3.0"} {
			if err := read(v); err != nil {
				t.Errorf("cut before file %d, then published anew: %s: %v", cut, v, err)
			}
		}
		if whole {
			must(t, read("1.2.0"))
			break
		}
	}
}

// TestForkIsAnErrorOfItsOwn, for who reports it.
func TestForkIsAnErrorOfItsOwn(t *testing.T) {
	var f *Fork
	if !errors.As(&Error{Condition: LogFork, Err: &Fork{Seen: "a", Shown: "b"}}, &f) || f.Shown != "b" {
		t.Error(f)
	}
}
