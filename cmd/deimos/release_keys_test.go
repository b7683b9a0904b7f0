package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/ota/repo"
)

// desk is a release manager's: keys, and a repository that a coordinator has too.
type desk struct {
	keys, repo string
	all        *commands
}

func aDesk(ctx context.Context, t *testing.T) desk {
	t.Helper()
	dir := t.TempDir()
	d := desk{keys: filepath.Join(dir, "keys"), repo: filepath.Join(dir, "repo")}
	d.all, _ = startCoordinator(ctx, t)
	if err := repo.Init(d.keys, repo.InitOptions{Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d desk) publish(ctx context.Context, t *testing.T, change func(*releasePublishCmd)) {
	t.Helper()
	r := releasePublishCmd{Keys: d.keys, Repo: d.repo}
	if change != nil {
		change(&r)
	}
	if err := r.Run(ctx, d.all); err != nil {
		t.Fatal(err)
	}
}

// TestLogOfTheCoordinatorIsVerified, also after keys have changed, and what it shows
// is compared with what was seen before.
func TestLogOfTheCoordinatorIsVerified(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	d := aDesk(ctx, t)
	d.publish(ctx, t, func(r *releasePublishCmd) { r.Bundle = aBundle(t, "1.0.0", "an agent") })
	seen := filepath.Join(t.TempDir(), "seen")
	checkpoint := filepath.Join(d.repo, "log", "checkpoint")
	noted, err := os.ReadFile(checkpoint)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(seen, noted, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{"log", "timestamp"} {
		r := releaseKeysRotateCmd{Role: role, rootFlags: rootFlags{Keys: d.keys}}
		if err := r.Run(); err != nil {
			t.Fatal(err)
		}
	}
	d.publish(ctx, t, func(r *releasePublishCmd) { r.Bundle = aBundle(t, "1.1.0", "another agent") })
	verify := releaseLogVerifyCmd{repoFlags: repoFlags{Keys: d.keys}, Checkpoint: []string{seen}}
	if err := verify.Run(ctx, d.all); err != nil {
		t.Error(err)
	}
	verify.Repo = d.repo
	if err := verify.Run(ctx, d.all); err != nil {
		t.Error(err)
	}

	// The other face: the same keys, another log.
	other := desk{keys: d.keys, repo: filepath.Join(t.TempDir(), "other")}
	other.publish(ctx, t, func(r *releasePublishCmd) { r.Bundle, r.Local = aBundle(t, "1.0.0", "a worse agent"), true })
	verify.Checkpoint = append(verify.Checkpoint, filepath.Join(other.repo, "log", "checkpoint"))
	if err := verify.Run(ctx, d.all); err == nil || !strings.Contains(err.Error(), "in 1 place") {
		t.Errorf("with a checkpoint of another log: %v", err)
	}
	if err := (&releaseLogVerifyCmd{repoFlags: repoFlags{Repo: d.repo}}).Run(ctx, d.all); err == nil || !strings.Contains(err.Error(), "--root") {
		t.Errorf("without a root to trust: %v", err)
	}
}

// TestNothingIsSignedThatNobodySaw: without a terminal there is nobody to ask.
func TestNothingIsSignedThatNobodySaw(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	d := aDesk(ctx, t)
	d.publish(ctx, t, nil)
	key := filepath.Join(t.TempDir(), "targets.pem")
	if err := os.Rename(filepath.Join(d.keys, "targets.pem"), key); err != nil {
		t.Fatal(err)
	}
	bundle, dir := aBundle(t, "1.0.0", "an agent"), t.TempDir()
	d.publish(ctx, t, func(r *releasePublishCmd) { r.Bundle, r.Unsigned = bundle, dir })
	file := filepath.Join(dir, "2.targets.json")
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	old := os.Stdin
	os.Stdin = stdin
	defer func() { os.Stdin = old }()
	if err := (&releaseSignCmd{File: file, Key: key}).Run(); err == nil || !strings.Contains(err.Error(), "nothing was signed") {
		t.Error(err)
	}
	if after, _ := os.ReadFile(file); !bytes.Equal(before, after) {
		t.Error("it was signed all the same")
	}
	client, err := d.all.client()
	if err != nil {
		t.Fatal(err)
	}
	files, err := client.RepoFiles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasPrefix(f.Path, "targets/") || strings.HasPrefix(f.Path, "parts/") {
			t.Errorf("%s is uploaded and signed by nobody", f.Path)
		}
	}
	if err := (&releaseSignCmd{File: file, Key: key, Yes: true}).Run(); err != nil {
		t.Fatal(err)
	}
	d.publish(ctx, t, func(r *releasePublishCmd) { r.Bundle, r.Signed = bundle, []string{file} })
	if err := (&releaseLogVerifyCmd{repoFlags: repoFlags{Keys: d.keys}}).Run(ctx, d.all); err != nil {
		t.Error(err)
	}
}

func TestPassphraseIsTheFirstLineOfItsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pass")
	for text, want := range map[string]string{"secret\n": "secret", "secret": "secret", "two words \r\nmore": "two words ", "\nsecret": ""} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := passphraseFlags{PassphraseFile: file}.ask("k.pem")
		if string(got) != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}
