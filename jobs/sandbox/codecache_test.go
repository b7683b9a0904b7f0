package sandbox

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// codeFiles lists the files of compiled code below dir.
func codeFiles(t *testing.T, dir string) (files []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestCompiledCodeIsKeptAndUsed(t *testing.T) {
	s := Spec{Module: wasm{}.file(t), CacheDir: t.TempDir()}
	mustRun(t, s)
	files := codeFiles(t, s.CacheDir)
	if len(files) != 1 {
		t.Fatalf("files of compiled code: %q", files)
	}
	// wazero replaces an entry that it does not use.
	before, err := os.Stat(files[0])
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, s)
	after, err := os.Stat(files[0])
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the compiled code was not used: %v", err)
	}
}

func TestDamagedCodeIsCompiledAnew(t *testing.T) {
	s := Spec{Module: wasm{memory: 1, start: cat(constant(7), []byte{opDrop})}.file(t), CacheDir: t.TempDir()}
	mustRun(t, s)
	path := codeFiles(t, s.CacheDir)[0]
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, bad := range map[string][]byte{
		"a byte flipped": append(append([]byte{}, good[:len(good)-9]...), append([]byte{good[len(good)-9] ^ 1}, good[len(good)-8:]...)...),
		"cut":            good[:len(good)/2],
		"empty":          nil,
	} {
		t.Run(what, func(t *testing.T) {
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			mustRun(t, s)
			mustRun(t, s)
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, good) {
				t.Errorf("the damaged code is still there (%d of %d bytes, %v)", len(got), len(good), err)
			}
		})
	}
}

func TestLeastRecentlyUsedCodeGoesFirst(t *testing.T) {
	cache := t.TempDir()
	a := Spec{Module: wasm{start: cat(constant(1), []byte{opDrop})}.file(t), CacheDir: cache}
	b := Spec{Module: wasm{start: cat(constant(2), []byte{opDrop})}.file(t), CacheDir: cache}
	c := Spec{Module: wasm{start: cat(constant(3), []byte{opDrop})}.file(t), CacheDir: cache}
	mustRun(t, a)
	one := treeBytes(cache)
	mustRun(t, b)
	// a and b were last used an hour ago; then a once more.
	then := time.Now().Add(-time.Hour)
	dirs, err := filepath.Glob(filepath.Join(cache, "*"))
	if err != nil || len(dirs) != 2 {
		t.Fatal(dirs, err)
	}
	for _, d := range dirs {
		if err := os.Chtimes(d, then, then); err != nil {
			t.Fatal(err)
		}
	}
	mustRun(t, a)
	kept := func(s Spec) bool {
		m, err := openModule(s.Module)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		h, err := moduleDigest(m)
		if err != nil {
			t.Fatal(err)
		}
		_, err = os.Stat(filepath.Join(cache, h))
		return err == nil
	}
	if _, err := (&Runner{Executable: runner.Executable, CacheBytes: 2*one + one/2}).Run(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if !kept(a) || kept(b) || !kept(c) {
		t.Errorf("kept: a %v, b %v, c %v; want all but b", kept(a), kept(b), kept(c))
	}
}

func TestJobRunsWithoutAPlaceForItsCode(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, Spec{Module: wasm{}.file(t), CacheDir: filepath.Join(file, "cache")})
}

func TestWhatAKilledWorkerLeftOfItsCodeIsRemoved(t *testing.T) {
	s := Spec{Module: wasm{memory: 3}.file(t), CacheDir: t.TempDir()}
	mustRun(t, s)
	code, err := filepath.Glob(filepath.Join(s.CacheDir, "*", "*", "*"))
	if err != nil || len(code) != 1 {
		t.Fatalf("%q %v", code, err)
	}
	old, young := code[0]+".1.tmp", code[0]+".2.tmp"
	for _, path := range []string{old, young} {
		if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	then := time.Now().Add(-2 * unfinished)
	if err := os.Chtimes(old, then, then); err != nil {
		t.Fatal(err)
	}
	mustRun(t, s)
	left, err := filepath.Glob(filepath.Join(s.CacheDir, "*", "*", "*"))
	if err != nil || !slices.Equal(left, []string{code[0], young}) {
		t.Errorf("%q are left, want the code and what may be being written, %v", left, err)
	}
}
