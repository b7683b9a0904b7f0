package logring

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var small = Limits{Segments: 3, Size: 4096}

const writerOf = "LOGRING_TEST_DIR"

// TestMain is also the process that is killed while it writes.
func TestMain(m *testing.M) {
	dir := os.Getenv(writerOf)
	if dir == "" {
		os.Exit(m.Run())
	}
	r, err := Open(dir, small)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		if err := r.WriteLine(fmt.Sprintf("line %08d %s", i, strings.Repeat("x", i%97))); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if i%500 == 0 {
			fmt.Println(i)
		}
	}
}

func TestKilledWriterLeavesWholeLinesWithinTheLimit(t *testing.T) {
	dir := t.TempDir()
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), writerOf+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for s := bufio.NewScanner(out); s.Scan() && s.Text() != fmt.Sprint(500*(round+1)); {
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if n := sizeOf(t, dir); n > small.Size*int64(small.Segments) {
			t.Fatalf("%d bytes after a kill", n)
		}
		r, err := Open(dir, small)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.WriteLine("after"); err != nil {
			t.Fatal(err)
		}
		r.Close()
		lines := strings.Split(strings.TrimSuffix(all(t, dir), "\n"), "\n")
		for _, l := range lines {
			if l != "after" && !strings.HasPrefix(l, "line 0") {
				t.Fatalf("a torn line: %q", l)
			}
		}
		if len(lines) < 20 || lines[len(lines)-1] != "after" {
			t.Fatalf("%d lines, the last is %q", len(lines), lines[len(lines)-1])
		}
	}
}

func TestTornLineIsCutOff(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "00000007.log"), []byte("whole\na torn line, longer than the next"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Open(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.WriteLine("next"); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if got := all(t, dir); got != "whole\nnext\n" {
		t.Errorf("%q", got)
	}
}

func TestLargerRingIsShrunkAndTheNewestKept(t *testing.T) {
	dir := t.TempDir()
	for i := range 9 {
		raw := bytes.Repeat([]byte("x\n"), 1000)
		if i == 4 {
			raw = bytes.Repeat([]byte("y\n"), 10000)
		}
		if err := os.WriteFile(filepath.Join(dir, name(uint64(i+1))), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "owner.txt"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Open(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for i := range 1000 {
		if err := r.WriteLine(fmt.Sprint("new ", i)); err != nil {
			t.Fatal(err)
		}
		if n := sizeOf(t, dir); n > small.Size*int64(small.Segments) {
			t.Fatalf("%d bytes", n)
		}
	}
	if !strings.HasSuffix(all(t, dir), "new 998\nnew 999\n") {
		t.Error("the newest lines are not there")
	}
	if _, err := os.Stat(filepath.Join(dir, "owner.txt")); err != nil {
		t.Error("a file of somebody else's is gone")
	}
}

func TestLineLongerThanAFileIsCut(t *testing.T) {
	dir := t.TempDir()
	r, err := Open(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for range 5 {
		if err := r.WriteLine(strings.Repeat("z", 10000) + "\nforged"); err != nil {
			t.Fatal(err)
		}
	}
	if n := sizeOf(t, dir); n > small.Size*int64(small.Segments) {
		t.Errorf("%d bytes", n)
	}
}

func sizeOf(t *testing.T, dir string) (n int64) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if st, err := os.Stat(f); err == nil {
			n += st.Size()
		}
	}
	return n
}

func all(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(raw)
	}
	return text.String()
}

func TestFileThatIsTooLongCostsOnlyItself(t *testing.T) {
	dir := t.TempDir()
	r, err := Open(dir, small)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		if err := r.WriteLine(fmt.Sprintf("line %040d", i)); err != nil {
			t.Fatal(err)
		}
	}
	r.Close()
	names, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil || len(names) != small.Segments {
		t.Fatalf("%q, %v", names, err)
	}
	kept, err := os.ReadFile(names[len(names)-2])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(names[len(names)-1], small.Size+1); err != nil {
		t.Fatal(err)
	}
	if r, err = Open(dir, small); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteLine("after"); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if got := all(t, dir); !strings.Contains(got, string(kept)) || !strings.HasSuffix(got, "after\n") {
		t.Errorf("of %d bytes in the file before it is left: %q", len(kept), got)
	}
	if n := sizeOf(t, dir); n > small.Size*int64(small.Segments) {
		t.Errorf("%d bytes", n)
	}
}
