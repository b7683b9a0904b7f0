package repo

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/ota/bundle"
)

// TestWhatIsAttachedIsPublishedWithTheRelease, and is to be had by who reads the
// repository; no device asks for it.
func TestWhatIsAttachedIsPublishedWithTheRelease(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	agent := filepath.Join(dir, "agent")
	must(t, os.WriteFile(agent, []byte("an agent"), 0o755))
	m, err := bundle.Build(t.Context(), dir, bundle.BuildOptions{Version: "1.1.0", Fast: true,
		Agents: []bundle.Agent{{Path: agent, Platform: bundle.Platform{OS: "linux", Arch: "arm64"}}},
		Attach: func(bundle.Manifest) ([]bundle.Document, error) {
			return []bundle.Document{{Name: "sbom.json", MediaType: "application/json", Content: []byte("a document")}}, nil
		}})
	must(t, err)
	a := m.Attachments[0]
	file := filepath.Join(dir, bundle.PartPath(a.SHA256))
	refusal := func(words string) {
		t.Helper()
		if _, err := Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: dir, Now: now}); err == nil || !strings.Contains(err.Error(), words) {
			t.Error(err)
		}
	}
	must(t, os.WriteFile(file, []byte("A document"), 0o644))
	refusal("sbom.json in the bundle is not what the manifest says")
	must(t, os.Remove(file))
	refusal("lacks its sbom.json")
	must(t, os.WriteFile(file, []byte("a document"), 0o644))
	f.publish(dir, now)
	c := f.client(t.TempDir())
	must(t, c.Refresh(t.Context(), now))
	m, err = c.Manifest(t.Context(), TargetName("1.1.0"))
	must(t, err)
	if n := f.seen(a.SHA256); n != 0 {
		t.Errorf("who read the manifest asked %d times for what is attached", n)
	}
	raw, err := c.Attachment(t.Context(), m.Attachments[0])
	if err != nil || string(raw) != "a document" {
		t.Errorf("%q, %v", raw, err)
	}
	for content, want := range map[string]Condition{"A document": Digest, "a document of which there is too much": Size} {
		must(t, os.WriteFile(filepath.Join(f.repo, bundle.PartPath(a.SHA256)), []byte(content), 0o644))
		_, err = c.Attachment(t.Context(), m.Attachments[0])
		refused(t, err, want, bundle.PartPath(a.SHA256))
	}
}
