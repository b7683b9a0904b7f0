package repo

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// from is a device's client that reads another repository of the same fleet.
func (f *fleet) from(dir, repo string) *Client {
	f.t.Helper()
	c, err := NewClient(ClientOptions{Dir: dir, Root: f.root(), Limits: quick, Source: Dir(repo)})
	must(f.t, err)
	return c
}

// take is all that a device does before it fetches parts.
func take(t *testing.T, c *Client, version string) error {
	t.Helper()
	if err := c.Refresh(t.Context(), now); err != nil {
		return err
	}
	_, err := c.Manifest(t.Context(), TargetName(version))
	return err
}

// twin is a copy of the repository, and a fleet that publishes there with the same
// keys: what a thief of all online keys can do.
func (f *fleet) twin() *fleet {
	f.t.Helper()
	repo := f.t.TempDir()
	must(f.t, os.RemoveAll(repo))
	must(f.t, os.CopyFS(repo, os.DirFS(f.repo)))
	return &fleet{t: f.t, keys: f.keys, repo: repo, server: f.server}
}

func TestEveryReleaseIsProvedToBeInTheLog(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	for i, v := range []string{"1.1.0", "1.2.0", "1.3.0"} {
		f.release(v, v)
		c := f.client(dir)
		must(t, take(t, c, v))
		if p := c.Log(); !p.Asked || p.Record != int64(i) || !strings.Contains(p.Checkpoint, fmt.Sprintf("\n%d\n", i+1)) {
			t.Errorf("%s: %+v", v, p)
		}
	}
	c := f.client(dir)
	must(t, take(t, c, "1.1.0")) // an old record in a log that grew
	if c.Log().Record != 0 {
		t.Errorf("%+v", c.Log())
	}
	report, err := c.VerifyLog(t.Context(), map[string]string{"a device": c.Log().Checkpoint})
	must(t, err)
	if report.Size != 3 || len(report.Problems) > 0 || report.Compared != 1 || report.Records[1].Version != "1.2.0" {
		t.Errorf("%+v", report)
	}
}

// TestLogWithTwoFacesIsFoundOut, by a device that sees both, and by who compares
// what two devices saw.
func TestLogWithTwoFacesIsFoundOut(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	other := f.twin()
	f.release("1.2.0", "for all")
	other.release("1.2.0", "for one")
	other.publish("", now.Add(200*day)) // all anew: what devices of the other face have is older
	for i, name := range []string{"of the same size", "that has grown"} {
		dir := t.TempDir()
		must(t, take(t, f.client(dir), "1.2.0"))
		if i > 0 {
			other.release("1.3.0", "more")
		}
		err := take(t, f.from(dir, other.repo), "1.2.0")
		refused(t, err, LogFork, "not those that this device has seen")
		if !Hostile(err) {
			t.Error("it is not called hostile")
		}
		var kept Fork
		raw, err2 := os.ReadFile(filepath.Join(dir, forkFile))
		must(t, err2)
		must(t, json.Unmarshal(raw, &kept))
		var told *Fork
		if !errors.As(err, &told) || *told != kept || kept.Seen == kept.Shown {
			t.Errorf("%s: told is %+v, kept is %+v", name, told, kept)
		}
		v, err := logKey(f.client(t.TempDir()).mustRoot(t))
		must(t, err)
		for _, side := range []string{kept.Seen, kept.Shown} {
			if _, err := openCheckpoint([]byte(side), v); err != nil {
				t.Errorf("%s: the evidence does not stand by itself: %v", name, err)
			}
		}
		if still, ok := f.client(dir).seen(); !ok || still.signed != kept.Seen {
			t.Errorf("%s: the device follows the other face from now on", name)
		}
	}
	one := f.from(t.TempDir(), other.repo)
	must(t, take(t, one, "1.2.0"))
	auditor := f.client(t.TempDir())
	must(t, auditor.Refresh(t.Context(), now))
	report, err := auditor.VerifyLog(t.Context(), map[string]string{"device 7": one.Log().Checkpoint})
	must(t, err)
	if len(report.Problems) != 1 || !strings.Contains(report.Problems[0], "device 7 was shown") || report.Compared != 0 {
		t.Errorf("%+v", report)
	}
}

func (c *Client) mustRoot(t *testing.T) *metadata.Metadata[metadata.RootType] {
	t.Helper()
	root, err := c.loadRoot()
	must(t, err)
	return root.Root
}

// TestLogThatGoesBackIsRefused though all metadata is new.
func TestLogThatGoesBackIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	old, err := os.ReadFile(filepath.Join(f.repo, checkpointFile))
	must(t, err)
	f.release("1.2.0", "two")
	dir := t.TempDir()
	must(t, take(t, f.client(dir), "1.2.0"))
	must(t, os.WriteFile(filepath.Join(f.repo, checkpointFile), old, 0o644))
	refused(t, take(t, f.client(dir), "1.1.0"), Rollback, "the log had 2 records, and has 1 now")
	if _, err := os.Stat(filepath.Join(dir, forkFile)); err != nil {
		t.Error("no evidence is kept")
	}
	refused(t, take(t, f.client(t.TempDir()), "1.2.0"), Unlogged, "it has 1 records")
}

// TestReleaseThatIsNotLoggedIsRefused: all online keys but the log's are stolen.
func TestReleaseThatIsNotLoggedIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	thief := f.twin()
	log := t.TempDir()
	must(t, os.CopyFS(log, os.DirFS(filepath.Join(f.repo, "log"))))
	thief.release("6.6.6", "evil")
	evil := filepath.Join(thief.repo, "log")
	lookup, err := filepath.Glob(filepath.Join(evil, "lookup/*"))
	must(t, err)
	for name, with := range map[string]func(){
		"nothing":                     func() {},
		"a hint to another record":    func() { copyLookups(t, lookup, evil, "0\n") },
		"a hint beyond the end":       func() { copyLookups(t, lookup, evil, "1\n") },
		"a hint below the start":      func() { copyLookups(t, lookup, evil, "-1\n") },
		"a hint that is no number":    func() { copyLookups(t, lookup, evil, "x\n") },
		"a record that nobody signed": func() { copyLookups(t, lookup, evil, "0\n"); falsifyRecord(t, thief) },
	} {
		must(t, os.RemoveAll(evil))
		must(t, os.CopyFS(evil, os.DirFS(log)))
		with()
		want, words := Unlogged, "not in the log of releases"
		if strings.HasPrefix(name, "a record") {
			want, words = Digest, "not the one that the log was signed for"
		}
		err := take(t, f.from(t.TempDir(), thief.repo), "6.6.6")
		if conditionOf(err) != want || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// copyLookups lets each lookup say the same.
func copyLookups(t *testing.T, paths []string, dir, text string) {
	t.Helper()
	for _, p := range paths {
		must(t, os.WriteFile(filepath.Join(dir, "lookup", filepath.Base(p)), []byte(text), 0o644))
	}
}

// falsifyRecord writes the evil release over the record of the good one.
func falsifyRecord(t *testing.T, f *fleet) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(f.repo, "targets/bundles/*.6.6.6.json"))
	must(t, err)
	sum, _ := NamedSum("targets/bundles/" + filepath.Base(files[0]))
	line, err := LogRecord{Version: "6.6.6", Target: TargetName("6.6.6"), SHA256: sum, Time: now}.line()
	must(t, err)
	must(t, os.WriteFile(filepath.Join(f.repo, tilePath(dataTile(0, 1))), line, 0o644))
}

func TestDamagedLogIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	f.release("1.2.0", "two")
	for file, want := range map[string]Condition{
		checkpointFile: Signature, tilePath(dataTile(0, 2)): Digest, logDir + "tile/8/0/000.p/2": Digest,
	} {
		path := filepath.Join(f.repo, file)
		good, err := os.ReadFile(path)
		must(t, err)
		bad := append([]byte{}, good...)
		bad[len(bad)-1] ^= 1
		must(t, os.WriteFile(path, bad, 0o644))
		if err := take(t, f.client(t.TempDir()), "1.2.0"); conditionOf(err) != want {
			t.Errorf("%s altered: %v", file, err)
		}
		must(t, os.WriteFile(path, append(good, make([]byte, 1<<20)...), 0o644))
		if err := take(t, f.client(t.TempDir()), "1.2.0"); conditionOf(err) != Size {
			t.Errorf("%s too long: %v", file, err)
		}
		must(t, os.Remove(path))
		if err := take(t, f.client(t.TempDir()), "1.2.0"); conditionOf(err) != Missing {
			t.Errorf("%s missing: %v", file, err)
		}
		must(t, os.WriteFile(path, good, 0o644))
		must(t, take(t, f.client(t.TempDir()), "1.2.0"))
	}
}

// withoutLog is a fleet from before there were logs.
func withoutLog(t *testing.T) *fleet {
	t.Helper()
	f := newFleet(t)
	edit[metadata.RootType](t, filepath.Join(f.keys, rootFile), func(m *metadata.Metadata[metadata.RootType]) {
		m.Signed.UnrecognizedFields = nil
	}, filepath.Join(f.keys, "root-1.pem"), filepath.Join(f.keys, "root-2.pem"))
	must(t, os.Remove(filepath.Join(f.keys, "log.pem")))
	return f
}

// TestOlderFleetBeginsALog: without one nothing is asked for; then all its releases
// are logged, more than a tile has place for, and the log grows on from there.
func TestOlderFleetBeginsALog(t *testing.T) {
	f := withoutLog(t)
	f.release("1.1.0", "one")
	dir := t.TempDir()
	c := f.client(dir)
	must(t, take(t, c, "1.1.0"))
	if c.Log() != (LogProof{}) || f.seen("log/") > 0 {
		t.Errorf("%+v", c.Log())
	}
	root := f.root()
	targets := filepath.Join(f.repo, "metadata/1.targets.json")
	edit[metadata.TargetsType](t, targets, func(m *metadata.Metadata[metadata.TargetsType]) {
		for i := range 300 {
			name := TargetName(fmt.Sprintf("1.0.%d", i))
			target, err := metadata.TargetFile().FromBytes(name, []byte(name), "sha256")
			must(t, err)
			m.Signed.Targets[name] = target
		}
	}, filepath.Join(f.keys, "targets.pem"))
	must(t, os.WriteFile(filepath.Join(f.repo, "metadata/1.targets.json"), read(t, targets), 0o644))
	change, err := Rotate(ChangeOptions{Desk: Desk{Keys: f.keys}, Now: now}, Rotation{Role: LogRole})
	must(t, err)
	if change.Version != 2 || len(change.Made) != 1 {
		t.Errorf("%+v", change)
	}
	for i, v := range []string{"1.2.0", "1.3.0"} {
		f.release(v, v)
		c, err := NewClient(ClientOptions{Dir: dir, Root: root, Limits: quick, Source: HTTP{Client: f.server.Client(), Base: f.server.URL}})
		must(t, err)
		must(t, take(t, c, v))
		must(t, take(t, c, "1.1.0"))
		report, err := c.VerifyLog(t.Context(), nil)
		must(t, err)
		if report.Size != int64(302+i) || len(report.Problems) > 0 {
			t.Errorf("%d records, %q", report.Size, report.Problems)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	return raw
}

// TestInterruptedPublishLeavesNoRecordBehind: hashes of a record that was never
// signed for make room for others.
func TestInterruptedPublishLeavesNoRecordBehind(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	for _, name := range []string{tilePath(dataTile(1, 2)), tilePath(tlog.Tile{H: tileHeight, L: 0, N: 0, W: 2}), tilePath(tlog.Tile{H: tileHeight, L: 1, N: 0, W: 1})} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(f.repo, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(f.repo, name), []byte("left behind"), 0o644))
	}
	f.publish("", now)
	left := 0
	must(t, filepath.WalkDir(filepath.Join(f.repo, "log/tile"), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			left++
		}
		return err
	}))
	if left != 2 {
		t.Errorf("%d tiles are left, want the hash and the record of one release", left)
	}
	f.release("1.2.0", "two")
	must(t, take(t, f.client(t.TempDir()), "1.2.0"))
}

// TestOthersReleaseIsNotSignedAgain: somebody with the targets key has put a release
// of their own among ours.
func TestOthersReleaseIsNotSignedAgain(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	edit[metadata.TargetsType](t, filepath.Join(f.repo, "metadata/1.targets.json"), func(m *metadata.Metadata[metadata.TargetsType]) {
		target, err := metadata.TargetFile().FromBytes("x", []byte("evil"), "sha256")
		must(t, err)
		m.Signed.Targets[TargetName("6.6.6")] = target
	}, filepath.Join(f.keys, "targets.pem"))
	if _, err := Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Now: now}); err == nil || !strings.Contains(err.Error(), "the log of releases has it not") {
		t.Error(err)
	}
}

// TestOtherContentOfALoggedVersionIsRefused: the log has the version, with another
// manifest, and the hint leads there.
func TestOtherContentOfALoggedVersionIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "good")
	thief := &fleet{t: t, keys: f.keys, repo: t.TempDir(), server: f.server}
	thief.release("1.1.0", "evil")
	lookups, err := filepath.Glob(filepath.Join(thief.repo, "log/lookup/*"))
	must(t, err)
	must(t, os.RemoveAll(filepath.Join(thief.repo, "log")))
	must(t, os.CopyFS(filepath.Join(thief.repo, "log"), os.DirFS(filepath.Join(f.repo, "log"))))
	copyLookups(t, lookups, filepath.Join(thief.repo, "log"), "0\n")
	refused(t, take(t, f.from(t.TempDir(), thief.repo), "1.1.0"), Unlogged, "record 0 is of another release")
}

// TestARecordMustNameTheReleaseAsItIs: the log's key has signed one that has its digest,
// and another version or another name. Who looks for the release in the log by these would
// not find it.
func TestARecordMustNameTheReleaseAsItIs(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	name := TargetName("1.1.0")
	for line, good := range map[string]bool{
		"1.1.0 " + name: true, "1.2.0 " + name: false, "1.1.0 " + TargetName("1.2.0"): false, "1.2.0 " + TargetName("1.2.0"): false,
	} {
		f.logAlone(line)
		err := take(t, f.client(t.TempDir()), "1.1.0")
		if good {
			must(t, err)
			continue
		}
		refused(t, err, Unlogged, "is of another release")
	}
}

// logAlone makes the log these records of the only release, which the log's key signs.
func (f *fleet) logAlone(versionsAndNames ...string) {
	f.t.Helper()
	files, err := filepath.Glob(filepath.Join(f.repo, "targets/bundles/*"))
	must(f.t, err)
	sum, _ := NamedSum("targets/bundles/" + filepath.Base(files[0]))
	l := new(ledger)
	for _, r := range versionsAndNames {
		must(f.t, l.add([]byte(r+" "+sum+" 2026-11-22T00:00:00Z\n")))
	}
	must(f.t, os.WriteFile(filepath.Join(f.repo, tilePath(dataTile(0, l.size()))), bytes.Join(l.lines, nil), 0o644))
	for _, tile := range tlog.NewTiles(tileHeight, 0, l.size()) {
		raw, err := tlog.ReadTileData(tile, l)
		must(f.t, err)
		must(f.t, os.WriteFile(filepath.Join(f.repo, tilePath(tile)), raw, 0o644))
	}
	root, err := readRoot(f.keys)
	must(f.t, err)
	v, err := logKey(root)
	must(f.t, err)
	key, err := LoadKey(filepath.Join(f.keys, "log.pem"), nil)
	must(f.t, err)
	tree, err := l.tree(l.size())
	must(f.t, err)
	signed, err := note.Sign(&note.Note{Text: checkpointText(v.Name(), tree)}, logSigner{v, key})
	must(f.t, err)
	must(f.t, os.WriteFile(filepath.Join(f.repo, checkpointFile), signed, 0o644))
}

// TestWhatIsWrongWithALogIsSaid, each by its own sentence, though the log's key has signed it.
func TestWhatIsWrongWithALogIsSaid(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	name := TargetName("1.1.0")
	verify := func() string {
		t.Helper()
		c := f.client(t.TempDir())
		must(t, c.Refresh(t.Context(), now))
		report, err := c.VerifyLog(t.Context(), nil)
		must(t, err)
		return strings.Join(report.Problems, "\n")
	}
	for line, want := range map[string][]string{
		"1.1.0 " + name:                nil,
		"1.2.0 " + name:                {"which do not go together"},
		"1.1.0 " + TargetName("1.2.0"): {"which do not go together", "the log has it not"},
		"1.2.0 " + TargetName("1.2.0"): {"the log has it not"},
	} {
		f.logAlone(line)
		problems := verify()
		if n := strings.Count(problems, "\n") + 1; problems == "" && len(want) > 0 || problems != "" && n != len(want) {
			t.Errorf("%s: %q, want %q", line, problems, want)
		}
		for _, words := range want {
			if !strings.Contains(problems, words) {
				t.Errorf("%s: %q, want %q", line, problems, words)
			}
		}
	}
	f.logAlone("1.1.0 "+name, "1.1.0 "+name)
	if problems := verify(); !strings.Contains(problems, "version 1.1.0 is logged twice, as records 0 and 1") {
		t.Errorf("logged twice: %q", problems)
	}
	f.logAlone("1.1.0 " + name)
	tile := filepath.Join(f.repo, tilePath(tlog.NewTiles(tileHeight, 0, 1)[0]))
	raw := read(t, tile)
	raw[3] ^= 1
	must(t, os.WriteFile(tile, raw, 0o644))
	if problems := verify(); !strings.Contains(problems, "its hashes are not those of the records") {
		t.Errorf("with a hash that was altered: %q", problems)
	}
}

// TestRecordsMustBeThoseThatAreSignedFor.
func TestRecordsMustBeThoseThatAreSignedFor(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	records := filepath.Join(f.repo, tilePath(dataTile(0, 1)))
	must(t, os.WriteFile(records, bytes.Replace(read(t, records), []byte("1.1.0 "), []byte("1.1.1 "), 1), 0o644))
	c := f.client(t.TempDir())
	must(t, c.Refresh(t.Context(), now))
	_, err := c.VerifyLog(t.Context(), nil)
	refused(t, err, Digest, "are not those that it was signed for")
}

// TestTheLogIsReadStrictly: a checkpoint and a record say one thing in one way.
func TestTheLogIsReadStrictly(t *testing.T) {
	hash := tlog.Hash{1}.String()
	for size, good := range map[string]bool{"1": true, "0": true, "+1": false, "01": false, "-1": false, " 1": false, "": false, fmt.Sprint(int64(maxLogSize)): true, fmt.Sprint(int64(maxLogSize) + 1): false} {
		if _, err := parseCheckpoint("log\n"+size+"\n"+hash+"\n", "log"); (err == nil) != good {
			t.Errorf("a log of %q records: %v", size, err)
		}
	}
	for _, text := range []string{"", "log\n1\n", "other\n1\n" + hash + "\n", "log\n1\nx\n"} {
		if _, err := parseCheckpoint(text, "log"); err == nil {
			t.Errorf("%q was read", text)
		}
	}
	record := func(version string) string { return version + " b c 2026-11-22T00:00:00Z\n" }
	fits := strings.Repeat("v", maxRecord-len(record("")))
	for line, good := range map[string]bool{record(fits): true, record(fits + "v"): false, "a b c 2026-11-22T00:00:00Z d\n": false, record("")[1:]: false, strings.TrimSuffix(record("a"), "\n"): false} {
		if _, err := parseRecord([]byte(line)); (err == nil) != good {
			t.Errorf("a record of %d bytes, %.20q: %v", len(line), line, err)
		}
	}
}
