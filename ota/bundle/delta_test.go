package bundle

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/ota/delta"
)

// next is a release of the file at path, changed in a few places, after that in the directory from.
func next(t *testing.T, path string, change func([]byte) []byte, from ...string) (file []byte, dir string, m Manifest, tried []Measured) {
	t.Helper()
	old, err := os.ReadFile(path)
	must(t, err)
	file = change(old)
	newer := filepath.Join(t.TempDir(), "newer")
	must(t, os.WriteFile(newer, file, 0o755))
	dir = t.TempDir()
	told := 0.0
	m, err = Build(t.Context(), dir, BuildOptions{Version: "1.3.0", Agents: []Agent{{Path: newer, Platform: amd64}}, Fast: true, DeltaFrom: from,
		Measured: func(m Measured) { tried = append(tried, m) },
		Progress: func(what string, done float64) {
			if told = done; !strings.Contains(what, "agent for linux/amd64 from 1.2.3") {
				t.Errorf("progress of %q", what)
			}
		}})
	must(t, err)
	if told != 1 && len(tried) > 0 {
		t.Errorf("progress ends at %v", told)
	}
	return file, dir, m, tried
}

func fewChanges(raw []byte) []byte {
	raw = slices.Insert(bytes.Clone(raw), len(raw)/2, []byte("func patched")...)
	raw[100]++
	return raw
}

func TestADeviceTakesTheSmallestFormForWhatItRuns(t *testing.T) {
	path, old := agentFile(t, 200<<10)
	from, was := build(t, path)
	file, dir, m, tried := next(t, path, fewChanges, from)
	forms := m.Parts[0].Forms
	if len(forms) != 2 || forms[0].Encoding != EncodingZstd || !delta.Known(forms[1].Encoding) ||
		forms[1].From != was.Parts[0].SHA256 || forms[1].FromVersion != "1.2.3" || forms[1].Size*10 > forms[0].Size {
		t.Fatalf("forms: %+v", forms)
	}
	if len(tried) != len(delta.Encodings) || !slices.ContainsFunc(tried, func(m Measured) bool { return m.Kept && m.Form == forms[1] }) {
		t.Errorf("measured: %+v", tried)
	}
	for _, c := range tried {
		if c.Form.Size < forms[1].Size {
			t.Errorf("%s would have been smaller", c.Form.Encoding)
		}
	}
	m, _, err := Open(dir) // as a device reads it
	must(t, err)
	part, best, err := m.For(Device{Version: "1.2.3", Platform: amd64, Runs: was.Parts[0].SHA256})
	must(t, err)
	if len(best) != 2 || best[0] != forms[1] || best[1] != forms[0] {
		t.Fatalf("it would take %+v", best)
	}
	out := filepath.Join(t.TempDir(), "agent")
	in, err := os.Open(filepath.Join(dir, PartPath(best[0].SHA256)))
	must(t, err)
	defer in.Close()
	must(t, Unpack(t.Context(), in, part, best[0], io.NewSectionReader(bytes.NewReader(old), 0, int64(len(old))), out))
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, file) {
		t.Errorf("it makes other bytes: %v", err)
	}
	// What runs is told by its bytes: the version alone is not enough.
	for _, runs := range []string{"", strings.Repeat("0", 64)} {
		_, whole, err := m.For(Device{Version: "1.2.3", Platform: amd64, Runs: runs})
		if err != nil || len(whole) != 1 || whole[0] != forms[0] {
			t.Errorf("running %q it would take %+v, %v", runs, whole, err)
		}
	}
}

func TestADeltaForAnotherFileIsNamed(t *testing.T) {
	path, old := agentFile(t, 50<<10)
	from, _ := build(t, path)
	_, dir, m, _ := next(t, path, fewChanges, from)
	old[7000]++ // the disk gives back something else than was measured
	out := filepath.Join(t.TempDir(), "agent")
	raw, err := os.ReadFile(filepath.Join(dir, PartPath(m.Parts[0].Forms[1].SHA256)))
	must(t, err)
	unpack := func(old *io.SectionReader) error {
		return Unpack(t.Context(), bytes.NewReader(raw), m.Parts[0], m.Parts[0].Forms[1], old, out)
	}
	for name, old := range map[string]*io.SectionReader{"altered": io.NewSectionReader(bytes.NewReader(old), 0, int64(len(old))), "missing": nil} {
		if err := unpack(old); !errors.Is(err, ErrContent) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("it is there all the same")
	}
}

func TestADeltaThatIsNotWorthItIsLeftOut(t *testing.T) {
	path, _ := agentFile(t, 50<<10)
	from, _ := build(t, path)
	_, dir, m, tried := next(t, path, func(raw []byte) []byte {
		for i := range raw {
			raw[i] = raw[i]*31 + byte(i*i>>3)
		}
		return raw
	}, from)
	if len(m.Parts[0].Forms) != 1 || len(tried) == 0 || slices.ContainsFunc(tried, func(m Measured) bool { return m.Kept }) {
		t.Errorf("forms %+v, measured %+v", m.Parts[0].Forms, tried)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "parts")); len(left) != 1 {
		t.Errorf("in the bundle: %v", left)
	}
	// The same file again, and the same bundle twice.
	if _, _, m, tried := next(t, path, bytes.Clone, from); len(m.Parts[0].Forms) != 1 || len(tried) != 0 {
		t.Errorf("of the same file: %+v", m.Parts[0].Forms)
	}
	if _, _, m, _ := next(t, path, fewChanges, from, from); len(m.Parts[0].Forms) != 2 {
		t.Errorf("from one file twice: %+v", m.Parts[0].Forms)
	}
}

func TestWhatIsNoBundleToMakeDeltasFromIsNamed(t *testing.T) {
	path, _ := agentFile(t, 1<<10)
	from, m := build(t, path)
	make := func(from string, p Platform) error {
		_, err := Build(t.Context(), t.TempDir(), BuildOptions{Version: "1.3.0", Agents: []Agent{{Path: path, Platform: p}}, DeltaFrom: []string{from}})
		return err
	}
	if err := make(t.TempDir(), amd64); err == nil || !strings.Contains(err.Error(), "this is no bundle") {
		t.Error(err)
	}
	if err := make(from, arm64); err == nil || !strings.Contains(err.Error(), "none of the parts") {
		t.Error(err)
	}
	must(t, os.WriteFile(path, []byte("another"), 0o755))
	must(t, os.WriteFile(filepath.Join(from, PartPath(m.Parts[0].Forms[0].SHA256)), []byte("damaged"), 0o644))
	if err := make(from, amd64); !errors.Is(err, ErrContent) {
		t.Error(err)
	}
}
