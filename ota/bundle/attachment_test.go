package bundle

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// attached is a bundle with a document, made of the parts that it is about.
func attached(t *testing.T, content string) (dir string, m Manifest) {
	t.Helper()
	path, _ := agentFile(t, 1<<10)
	dir = t.TempDir()
	m, err := Build(t.Context(), dir, BuildOptions{Version: "1.2.3", Agents: []Agent{{Path: path, Platform: amd64}}, Fast: true,
		Attach: func(m Manifest) ([]Document, error) {
			if len(m.Parts) != 1 || m.Parts[0].SHA256 == "" {
				t.Errorf("it is made before the parts are known: %+v", m.Parts)
			}
			return []Document{{Name: "sbom.json", MediaType: "application/json", Content: []byte(content)}}, nil
		}})
	must(t, err)
	return dir, m
}

// TestAnAttachmentStandsBesideTheParts, and changes nothing for devices.
func TestAnAttachmentStandsBesideTheParts(t *testing.T) {
	dir, _ := attached(t, "a document")
	m, raw, err := Open(dir)
	must(t, err)
	a, ok := m.Attachment("sbom.json")
	content, err := ReadAttachment(dir, a)
	if !ok || err != nil || string(content) != "a document" || a.MediaType != "application/json" {
		t.Errorf("%+v: %q, %v", a, content, err)
	}
	if _, ok := m.Attachment("other.json"); ok {
		t.Error("what is not there was found")
	}
	part, forms, err := m.For(Device{Version: "1.0.0", Platform: amd64})
	must(t, err)
	form := forms[0]
	var files []string
	for _, f := range m.Files() {
		files = append(files, f.SHA256)
	}
	if want := []string{form.SHA256, a.SHA256}; !slices.Equal(files, want) {
		t.Errorf("it consists of %v, want %v", files, want)
	}
	// An agent from before there were attachments has all of a manifest but them.
	var old map[string]any
	must(t, json.Unmarshal(raw, &old))
	delete(old, "attachments")
	raw, err = json.Marshal(old)
	must(t, err)
	m, err = Parse(raw)
	must(t, err)
	if p, f, err := m.For(Device{Version: "1.0.0", Platform: amd64}); err != nil || !slices.Equal(f, forms) || p.SHA256 != part.SHA256 {
		t.Errorf("without it: %v, %v, %v", p, f, err)
	}
}

func TestAnAlteredAttachmentIsRefused(t *testing.T) {
	dir, m := attached(t, "a document")
	a := m.Attachments[0]
	path := filepath.Join(dir, PartPath(a.SHA256))
	for _, other := range []string{"A document", "a documen", "a document ", ""} {
		must(t, os.WriteFile(path, []byte(other), 0o644))
		if _, err := ReadAttachment(dir, a); !errors.Is(err, ErrContent) {
			t.Errorf("%q: %v", other, err)
		}
	}
	must(t, os.WriteFile(path, []byte("a document"), 0o644))
	other := a
	if other.Size++; !errors.Is(other.Check([]byte("a document")), ErrContent) {
		t.Error("a size that is not the signed one is taken")
	}
	must(t, os.Remove(path))
	if _, err := ReadAttachment(dir, a); err == nil || !strings.Contains(err.Error(), "lacks") {
		t.Error(err)
	}
}

func TestAttachmentsThatMakeNoSenseAreRefused(t *testing.T) {
	_, m := attached(t, "a document")
	good := m.Attachments[0]
	with := func(change func(*Attachment)) Attachment { a := good; change(&a); return a }
	for what, bad := range map[string]Attachment{
		"no name":       with(func(a *Attachment) { a.Name = "" }),
		"a path":        with(func(a *Attachment) { a.Name = "../sbom.json" }),
		"the folder":    with(func(a *Attachment) { a.Name = ".." }),
		"the root":      with(func(a *Attachment) { a.Name = "/" }),
		"no media type": with(func(a *Attachment) { a.MediaType = "" }),
		"no digest":     with(func(a *Attachment) { a.SHA256 = "" }),
		"no size":       with(func(a *Attachment) { a.Size = 0 }),
		"too large":     with(func(a *Attachment) { a.Size = MaxAttachment + 1 }),
	} {
		m.Attachments = []Attachment{bad}
		raw, err := json.Marshal(m)
		must(t, err)
		if _, err := Parse(raw); err == nil || !strings.Contains(err.Error(), "attachment") {
			t.Errorf("%s: %v", what, err)
		}
	}
	m.Attachments = []Attachment{good, with(func(a *Attachment) { a.SHA256 = strings.Repeat("a", 64) })}
	if err := m.check(); err == nil || !strings.Contains(err.Error(), "two attachments") {
		t.Error(err)
	}
	m.Attachments = []Attachment{good}
	must(t, m.check())
}

// TestABundleWhoseAttachmentsCannotBeMadeIsNone.
func TestABundleWhoseAttachmentsCannotBeMadeIsNone(t *testing.T) {
	path, _ := agentFile(t, 1<<10)
	for what, attach := range map[string]func(Manifest) ([]Document, error){
		"an error": func(Manifest) ([]Document, error) { return nil, errors.New("no bill") },
		"too large": func(Manifest) ([]Document, error) {
			return []Document{{Name: "a", MediaType: "a/b", Content: make([]byte, MaxAttachment+1)}}, nil
		},
	} {
		dir := t.TempDir()
		if _, err := Build(t.Context(), dir, BuildOptions{Version: "1.2.3", Agents: []Agent{{Path: path, Platform: amd64}}, Fast: true, Attach: attach}); err == nil {
			t.Errorf("%s: it was built", what)
		}
		if _, err := os.Stat(filepath.Join(dir, manifestFile)); err == nil {
			t.Errorf("%s: there is a manifest", what)
		}
	}
}
