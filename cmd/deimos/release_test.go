package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
)

// TestOnlyWhatBelongsToARepositoryIsUploaded, what is named before what names it.
func TestOnlyWhatBelongsToARepositoryIsUploaded(t *testing.T) {
	want := []string{
		"parts/aa", "targets/bundles/bb.1.0.0.json", "log/tile/8/0/000.p/1", "log/checkpoint", "log/lookup/bb",
		"metadata/1.targets.json", "metadata/1.snapshot.json", "metadata/timestamp.json", "metadata/1.root.json",
	}
	dir := t.TempDir()
	for _, name := range append([]string{".lock", "notes.txt", "parts/.aa123", "metadata/.timestamp.json7"}, want...) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := repoFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	place := func(name string) int { return slices.Index(got, name) }
	if len(got) != len(want) || !slices.IsSortedFunc(want, func(a, b string) int { return place(a) - place(b) }) ||
		slices.ContainsFunc(want, func(name string) bool { return place(name) < 0 }) {
		t.Errorf("it would upload %v", got)
	}
}

// TestWhatTheCoordinatorHasIsNotUploadedAgain, by its own audit log: signed afresh,
// only metadata goes over the line, and of a release that shares a part with one
// before it, not that part. What only has the name of what is there is not there.
func TestWhatTheCoordinatorHasIsNotUploadedAgain(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	_, c := startCoordinator(ctx, t)
	dir := t.TempDir()
	keys, repository := filepath.Join(dir, "keys"), filepath.Join(dir, "repo")
	if err := repo.Init(keys, repo.InitOptions{RootKeys: 2, Threshold: 2, Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	seen := uint64(0)
	publish := func(bundle string, sent, skipped []string) {
		t.Helper()
		if _, err := repo.Publish(repo.PublishOptions{Keys: keys, Repo: repository, Bundle: bundle, Now: time.Now()}); err != nil {
			t.Fatal(err)
		}
		u, err := upload(ctx, c, repository)
		if err != nil {
			t.Fatal(err)
		}
		var all []string // as the coordinator was asked to take it
		seen, err = c.Log(ctx, seen, api.LogFilter{}, func(e api.LogEntry) error {
			if e.Action == "repo.put" && e.Outcome == api.LogAsked {
				all = append(all, e.Targets...)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range sent {
			if !slices.Contains(all, name) {
				t.Errorf("%s was not uploaded, but %q", name, all)
			}
		}
		for _, name := range skipped {
			if slices.Contains(all, name) {
				t.Errorf("%s was uploaded again", name)
			}
		}
		files, err := repoFiles(repository)
		if err != nil || u.Sent.Files != len(all) || u.Sent.Files+u.Skipped.Files != len(files) {
			t.Errorf("it says that %d files were sent and %d there; %d were sent, of %d (%v)", u.Sent.Files, u.Skipped.Files, len(all), len(files), err)
		}
	}
	shared, added := strings.Repeat("an agent", 1000), "a firmware"
	first, second := partOf(shared), partOf(added)
	publish(aBundle(t, "1.0.0", shared), []string{first, "metadata/1.root.json", "metadata/timestamp.json"}, nil)
	publish("", []string{"metadata/timestamp.json"}, []string{first, "metadata/1.root.json"})
	publish(aBundle(t, "2.0.0", shared, added), []string{second, "metadata/timestamp.json"}, []string{first, "metadata/1.root.json"})

	if err := os.WriteFile(filepath.Join(repository, first), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := upload(ctx, c, repository); err == nil || !strings.Contains(err.Error(), first) {
		t.Errorf("a part that is not what the coordinator has was passed over: %v", err)
	}
}

// TestEachChangeOfKeysCanBeUploaded, also where what a stolen key was for is signed by the
// new one alone; an old copy of the repository cannot, as devices would refuse all of it.
func TestEachChangeOfKeysCanBeUploaded(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	_, c := startCoordinator(ctx, t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	keys, repository := filepath.Join(dir, "keys"), filepath.Join(dir, "repo")
	must(repo.Init(keys, repo.InitOptions{RootKeys: 2, Threshold: 2, Now: time.Now()}))
	publish := func(bundle string) {
		t.Helper()
		_, err := repo.Publish(repo.PublishOptions{Keys: keys, Repo: repository, Bundle: bundle, Now: time.Now()})
		must(err)
	}
	send := func(dir string) error {
		_, err := upload(ctx, c, dir)
		return err
	}
	o := repo.ChangeOptions{Desk: repo.Desk{Keys: keys}, Now: time.Now()}
	for range 10 {
		_, err := repo.Renew(o)
		must(err)
	}
	publish(aBundle(t, "1.0.0", "an agent"))
	must(send(repository)) // 10 comes after 9
	old := filepath.Join(dir, "old")
	must(os.CopyFS(old, os.DirFS(repository)))
	for _, role := range []string{"timestamp", "log"} {
		_, err := repo.Rotate(o, repo.Rotation{Role: role})
		must(err)
		must(os.Remove(filepath.Join(keys, role+".pem")))
		publish(aBundle(t, map[string]string{"timestamp": "1.1.0", "log": "1.2.0"}[role], role))
		must(send(repository))
	}
	if err := send(old); err == nil || !strings.Contains(err.Error(), "devices would refuse it") {
		t.Errorf("an old copy, signed by keys that count no more: %v", err)
	}
	must(os.RemoveAll(old))
	must(os.CopyFS(old, os.DirFS(repository)))
	publish(aBundle(t, "1.3.0", "newer"))
	must(send(repository))
	list, err := c.RepoFiles(ctx)
	must(err)
	if err := send(old); err == nil || !strings.Contains(err.Error(), "the log had 4 records, and would have 3") {
		t.Errorf("an old copy: %v", err)
	}
	must(os.Remove(filepath.Join(old, "log", "checkpoint")))
	if err := send(old); err == nil || !strings.Contains(err.Error(), "published last") {
		t.Errorf("an old copy without its log: %v", err)
	}
	after, err := c.RepoFiles(ctx)
	if err != nil || !slices.Equal(after, list) {
		t.Errorf("old copies have changed what is there (%v)", err)
	}
}

// TestWhoWentFarAheadWithAStolenKeyIsOvertaken by the commands that are for that, though
// the publisher still has the stolen key and signs by it, too: devices that have not come
// to the new root read by it.
func TestWhoWentFarAheadWithAStolenKeyIsOvertaken(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	d := aDesk(ctx, t)
	publish := func(version string) error {
		_, err := run(t, d.all, "release", "publish", "--keys", d.keys, "--repo", d.repo, "--bundle", aBundle(t, version, version))
		return err
	}
	must(publish("1.0.0"))
	// The thief has keys and an operator's token, and a repository that is ahead.
	thief := desk{keys: filepath.Join(t.TempDir(), "keys"), repo: filepath.Join(t.TempDir(), "repo")}
	must(os.CopyFS(thief.keys, os.DirFS(d.keys)))
	for _, version := range []string{"6.6.6", "6.6.7", "6.6.8", "6.6.9", "6.6.10"} {
		_, err := repo.Publish(repo.PublishOptions{Keys: thief.keys, Repo: thief.repo, Bundle: aBundle(t, version, version), Now: time.Now()})
		must(err)
	}
	c, err := d.all.client()
	must(err)
	const timestamp, checkpoint = "metadata/timestamp.json", "log/checkpoint"
	for _, file := range []string{timestamp, checkpoint} {
		raw, err := os.ReadFile(filepath.Join(thief.repo, filepath.FromSlash(file)))
		must(err)
		must(c.PutRepoFile(ctx, file, raw))
	}
	if err := publish("1.1.0"); err == nil || !strings.Contains(err.Error(), "would have") {
		t.Fatalf("the thief is not ahead: %v", err)
	}
	for _, role := range []string{"timestamp", "log"} {
		_, err := run(t, d.all, "release", "keys", "rotate", "--keys", d.keys, "--role", role)
		must(err)
	}
	must(publish("1.2.0"))
	for _, file := range []string{timestamp, checkpoint, "metadata/2.root.json", "metadata/3.root.json"} {
		want, err := os.ReadFile(filepath.Join(d.repo, filepath.FromSlash(file)))
		must(err)
		got, err := c.RepoFile(ctx, file)
		if err != nil || string(got) != string(want) {
			t.Errorf("the coordinator has another %s than was published (%v)", file, err)
		}
		if signatures := strings.Count(string(got), `"keyid"`) - strings.Count(string(got), `"keyids"`); file == timestamp && signatures != 2 {
			t.Errorf("the timestamp has %d signatures; that of the stolen key is what the coordinator judges by", signatures)
		}
	}
	_, err = run(t, d.all, "release", "log", "verify", "--keys", d.keys)
	must(err)

	// Where no new root is on its way, nothing is sent of what goes with the file that is refused.
	old := filepath.Join(t.TempDir(), "old")
	must(os.CopyFS(old, os.DirFS(d.repo)))
	must(publish("1.3.0"))
	asked := func(after uint64) (files []string, last uint64) {
		last, err := c.Log(ctx, after, api.LogFilter{}, func(e api.LogEntry) error {
			if e.Action == "repo.put" && e.Outcome == api.LogAsked {
				files = append(files, e.Targets...)
			}
			return nil
		})
		must(err)
		return files, last
	}
	_, last := asked(0)
	if _, err := upload(ctx, c, old); err == nil || !strings.Contains(err.Error(), "published last") {
		t.Errorf("an old copy: %v", err)
	}
	if files, _ := asked(last); !slices.Equal(files, []string{checkpoint}) {
		t.Errorf("of an old copy was sent %q", files)
	}
}

// startCoordinator starts a whole one, and lets its owner in, who types commands or
// is a program.
func startCoordinator(ctx context.Context, t *testing.T) (*commands, *api.Client) {
	t.Helper()
	dir := t.TempDir()
	c, err := coordinator.Start(ctx, coordinator.Config{Dir: dir, Listen: "127.0.0.1:0", MQTT: "127.0.0.1:0", Compute: new(engine).compute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	owner := &commands{Context: filepath.Join(dir, coordinator.ContextFile)}
	client, err := owner.client()
	if err != nil {
		t.Fatal(err)
	}
	return owner, client
}

// aBundle is a release of these parts, as if they were packed already.
func aBundle(t *testing.T, version string, parts ...string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	m := bundle.Manifest{Format: bundle.Format, Version: version}
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "parts"), 0o700); err != nil {
		t.Fatal(err)
	}
	for i, p := range parts {
		sum := filepath.Base(partOf(p))
		m.Parts = append(m.Parts, bundle.Part{
			Name: []string{bundle.PartAgent, bundle.PartFirmware}[i], Platform: bundle.Host(), SHA256: sum, Size: 1,
			Forms: []bundle.Form{{Encoding: bundle.EncodingZstd, SHA256: sum, Size: int64(len(p))}},
		})
		write(partOf(p), []byte(p))
	}
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	write("manifest.json", raw)
	return dir
}

func partOf(packed string) string {
	sum := sha256.Sum256([]byte(packed))
	return bundle.PartPath(hex.EncodeToString(sum[:]))
}
