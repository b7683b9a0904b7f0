package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/sbom"
)

const aCommit = "0123456789abcdef0123456789abcdef01234567"

// run types a command, and returns what it printed.
func run(t *testing.T, all *commands, args ...string) (out string, err error) {
	t.Helper()
	out = printed(t, func() { err = typed(t, all, args...) })
	return out, err
}

// aGoProgram is a small one that can be asked what it is made of.
func aGoProgram(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module example.org/agent\n\ngo 1.26\n", "main.go": "package main\n\nfunc main() {}\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", "agent", ".")
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return filepath.Join(dir, "agent")
}

// aBuilder is a key in a file, and its public half in another.
func aBuilder(t *testing.T) (private, public string) {
	t.Helper()
	dir := t.TempDir()
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for kind, marshal := range map[string]func() ([]byte, error){
		"PRIVATE KEY": func() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(priv) },
		"PUBLIC KEY":  func() ([]byte, error) { return x509.MarshalPKIXPublicKey(pub) },
	} {
		der, err := marshal()
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, kind), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "PRIVATE KEY"), filepath.Join(dir, "PUBLIC KEY")
}

// TestAReleaseTellsWhatItIsAndWhoBuiltIt: as a bundle, and as the coordinator has it.
func TestAReleaseTellsWhatItIsAndWhoBuiltIt(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	d := aDesk(ctx, t)
	private, public := aBuilder(t)
	dir := filepath.Join(t.TempDir(), "bundle")
	build := []string{"release", "build", "--version", "1.2.3", "--agent", aGoProgram(t), "--out", dir, "--notes", "New.", "--from", "1.0.0",
		"--created", "2026-11-22", "--commit", aCommit, "--builder", "https://example.org/ci", "--builder-key", private, "-o", "json"}
	out, err := run(t, d.all, build...)
	if err != nil {
		t.Fatal(err)
	}
	var made built
	if err := json.Unmarshal([]byte(out), &made); err != nil || len(made.Lacks) > 0 || len(made.Attachments) != 2 {
		t.Fatalf("%v: %s", err, out)
	}
	again, err := run(t, d.all, append(slices.Clone(build), "--out", filepath.Join(t.TempDir(), "again"))...)
	if err != nil || again != out {
		t.Errorf("built once more it is %s, before it was %s (%v)", again, out, err)
	}

	// A version that is older is published later.
	d.publish(ctx, t, func(r *releasePublishCmd) { r.Bundle = dir })
	d.publish(ctx, t, func(r *releasePublishCmd) { r.Bundle = aBundle(t, "1.1.0", "an agent") })
	for what, args := range map[string][]string{
		"a bundle":            {dir},
		"the newest":          {"--keys", d.keys},
		"by name":             {"1.2.3", "--keys", d.keys},
		"in a folder":         {"1.2.3", "--repo", d.repo, "--root", filepath.Join(d.keys, "root.json")},
		"by the word of it":   {"1.2.3"},
		"by one of its words": {"--repo", d.repo},
	} {
		show := append([]string{"release", "show", "--builder-key", public}, args...)
		out, err := run(t, d.all, append(show, "-o", "json")...)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		var got shown
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatal(err)
		}
		p := got.Provenance
		switch {
		case got.SHA256 != made.SHA256 || got.Version != "1.2.3" || got.SBOM == nil || got.SBOM.Programs != 1 || got.SBOM.Modules != 1 || p == nil:
			t.Errorf("%s is %s", what, out)
		case p.Who != "https://example.org/ci" || p.Commit != aCommit || p.Signed != "yes" || len(p.Go) != 1:
			t.Errorf("%s was built %+v", what, p)
		case (got.Metadata == nil) != (what == "a bundle") || (got.Log == nil) != (what == "a bundle"):
			t.Errorf("%s is signed %+v, logged %+v", what, got.Metadata, got.Log)
		case got.Log != nil && (got.Log.Record != 0 || got.Log.Size != 2 || !strings.HasPrefix(got.Log.Checkpoint, "deimos-releases-") || got.Metadata.Root != 1):
			t.Errorf("%s is signed %+v, logged %+v", what, got.Metadata, got.Log)
		case got.Metadata != nil && got.Metadata.Trusted != slices.ContainsFunc(args, func(s string) bool { return s == "--keys" || s == "--root" }):
			t.Errorf("%s: by a root that was named: %v", what, got.Metadata.Trusted)
		}
		text, err := run(t, d.all, show...)
		for _, words := range []string{"1.2.3 of 2026-11-22", "New.", "1.0.0", made.SHA256, aCommit, "signed with the key that you named", "1 Go module"} {
			if err != nil || !strings.Contains(text, words) {
				t.Errorf("%s: nothing says %q (%v):\n%s", what, words, err, text)
			}
		}
		bill, err := run(t, d.all, append(show, "--sbom")...)
		if _, broken := sbom.Read([]byte(bill)); err != nil || broken != nil {
			t.Errorf("%s: %v, %v", what, err, broken)
		}
	}

	// A release of before there were attachments.
	text, err := run(t, d.all, "release", "show", "1.1.0")
	if err != nil || !strings.Contains(text, "no bill of materials") || !strings.Contains(text, "no statement") {
		t.Errorf("%v:\n%s", err, text)
	}
	if _, err := run(t, d.all, "release", "show", "1.1.0", "--builder-key", public); err == nil {
		t.Error("nobody has said who built it, and the builder was asked for")
	}
	for words, args := range map[string][]string{"no such release": {"9.9.9"}, "neither a version": {"nowhere"}, "has no provenance.json": {"1.1.0", "--provenance"}, "leave out -o": {"--sbom", "-o", "json"}, "leave out --repo": {dir, "--repo", d.repo}} {
		if _, err := run(t, d.all, append([]string{"release", "show"}, args...)...); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%v: %v, and not %q", args, err, words)
		}
	}
}

// TestAReleaseThatContradictsItselfIsAnError: whoever changed what, after it was built.
func TestAReleaseThatContradictsItselfIsAnError(t *testing.T) {
	private, _ := aBuilder(t)
	_, other := aBuilder(t)
	agent := aGoProgram(t)
	for what, c := range map[string]struct {
		change func(t *testing.T, dir string, m *bundle.Manifest)
		args   []string
		words  string
	}{
		"another agent": {func(t *testing.T, dir string, m *bundle.Manifest) { m.Parts[0].SHA256 = strings.Repeat("a", 64) },
			nil, "in 2 places"}, // neither bill nor statement knows it
		"another version": {func(t *testing.T, dir string, m *bundle.Manifest) { m.Version = "1.2.4" }, nil, "in 1 place"},
		"a damaged part": {func(t *testing.T, dir string, m *bundle.Manifest) {
			if err := os.WriteFile(filepath.Join(dir, bundle.PartPath(m.Parts[0].Forms[0].SHA256)), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, nil, "in 1 place"},
		"another builder":         {nil, []string{"--builder-key", other}, "in 1 place"},
		"a bill that was altered": {alterAttachment(sbomName), nil, "in 1 place"},
		"a bill of nothing":       {replaceAttachment(sbomName, []byte("{}")), nil, "in 2 places"}, // which the statement does not know either
		"an altered statement":    {alterAttachment(provenanceName), nil, "in 1 place"},
		"a statement of nothing":  {replaceAttachment(provenanceName, []byte("{}")), nil, "in 1 place"},
	} {
		dir := filepath.Join(t.TempDir(), "bundle")
		if _, err := run(t, new(commands), "release", "build", "--version", "1.2.3", "--agent", agent, "--builder-key", private, "--out", dir); err != nil {
			t.Fatal(err)
		}
		m, _, err := bundle.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if c.change != nil {
			c.change(t, dir, &m)
		}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "manifest.json"), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		text, err := run(t, new(commands), append([]string{"release", "show", dir}, c.args...)...)
		if err == nil || !strings.Contains(err.Error(), c.words) || !strings.Contains(text, "✗") {
			t.Errorf("%s: %v, and not %q:\n%s", what, err, c.words, text)
		}
	}
}

// alterAttachment changes a byte, and not the manifest.
func alterAttachment(name string) func(*testing.T, string, *bundle.Manifest) {
	return func(t *testing.T, dir string, m *bundle.Manifest) {
		a, _ := m.Attachment(name)
		path := filepath.Join(dir, bundle.PartPath(a.SHA256))
		raw, err := os.ReadFile(path)
		if err == nil {
			raw[len(raw)/2] ^= 1
			err = os.WriteFile(path, raw, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// replaceAttachment puts another in its place, and into the manifest.
func replaceAttachment(name string, content []byte) func(*testing.T, string, *bundle.Manifest) {
	return func(t *testing.T, dir string, m *bundle.Manifest) {
		at := slices.IndexFunc(m.Attachments, func(a bundle.Attachment) bool { return a.Name == name })
		m.Attachments[at] = bundle.Document{Name: name, MediaType: m.Attachments[at].MediaType, Content: content}.Attachment()
		if err := os.WriteFile(filepath.Join(dir, bundle.PartPath(m.Attachments[at].SHA256)), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWhatIsNotKnownOfAReleaseIsSaid when it is built.
func TestWhatIsNotKnownOfAReleaseIsSaid(t *testing.T) {
	agent := aGoProgram(t)
	firmware := filepath.Join(t.TempDir(), "deimos_1.2.3.efi")
	if err := os.WriteFile(firmware, []byte("a firmware"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := bundle.Manifest{Format: bundle.Format, Version: "1.2.3"}
	for name, file := range map[string]string{bundle.PartAgent: agent, bundle.PartFirmware: firmware} {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		m.Parts = append(m.Parts, bundle.Part{Name: name, Platform: bundle.Host(), SHA256: filepath.Base(partOf(string(raw)))})
	}
	a, err := new(provenanceFlags).attachments([]string{agent}, []string{firmware})
	if err != nil {
		t.Fatal(err)
	}
	docs, err := a.attach(m)
	if err != nil || len(docs) != 2 || !bytes.Contains(docs[0].Content, []byte(`"unknown"`)) {
		t.Errorf("%d documents, %v", len(docs), err)
	}
	lacks := strings.Join(a.lacks(), "\n")
	for _, words := range []string{"--commit", "--builder-key", "no deimos_1.2.3.cdx.json beside it"} {
		if !strings.Contains(lacks, words) {
			t.Errorf("nothing says %q: %s", words, lacks)
		}
	}
	if err := os.WriteFile(firmware, []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.attach(m); err == nil || !strings.Contains(err.Error(), "was changed while it was packed") {
		t.Error(err)
	}
}
