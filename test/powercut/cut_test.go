package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// recordOf makes a recording of a small disk by hand.
func recordOf(t *testing.T, do func(r *recorder)) *recording {
	t.Helper()
	dir := t.TempDir()
	r, err := newRecorder(dir)
	if err != nil {
		t.Fatal(err)
	}
	do(r)
	base, err := os.Create(filepath.Join(dir, "base"))
	if err != nil {
		t.Fatal(err)
	}
	if err := base.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	base.Close()
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
	if err := (header{Size: 1 << 20}).save(dir); err != nil {
		t.Fatal(err)
	}
	rec, err := load(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rec.close() })
	return rec
}

func filled(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// What was flushed, or written with FUA, is there after every cut; what was not
// may be there, missing or torn, and each of them happens.
func TestOnlyWhatWasFlushedIsSure(t *testing.T) {
	rec := recordOf(t, func(r *recorder) {
		_ = r.Write(0, filled('a', 4096), false)
		_ = r.Flush(1)
		_ = r.Write(8192, filled('f', 512), true)
		_ = r.Write(4096, filled('b', 4096), false)
		_ = r.Write(0, filled('c', 4096), false)
		_ = r.Flush(3) // not of the last
	})
	d, err := newDisk(rec)
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	if err := d.advance(len(rec.events)); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for seed := range uint64(300) {
		if _, _, err := d.cut(seed); err != nil {
			t.Fatal(err)
		}
		m := d.work.mem
		if !bytes.Equal(m[8192:8704], filled('f', 512)) || !bytes.Equal(m[4096:8192], filled('b', 4096)) {
			t.Fatalf("cut with seed %d took what was durable", seed)
		}
		switch old, new := bytes.Count(m[:4096], []byte("a")), bytes.Count(m[:4096], []byte("c")); {
		case old+new != 4096 || new%sector != 0:
			t.Fatalf("cut with seed %d tore a sector", seed)
		case new == 0:
			seen["missing"] = true
		case old == 0:
			seen["there"] = true
		default:
			seen["torn"] = true
		}
		if err := d.restore(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(d.work.mem, d.base.mem) {
			t.Fatal("what the cut did was not undone")
		}
	}
	if len(seen) != 3 {
		t.Errorf("of missing, there and torn only %v were seen", seen)
	}
}

// A promise that was taken back before a cut is none after it.
func TestPromisesFollowTheirMarks(t *testing.T) {
	p := newPromises()
	for _, m := range []mark{{Receipt: "a"}, {Receipt: "b"}, {Order: "o"}, {Config: 3}, {Removing: []string{"a"}}} {
		p.take(m)
	}
	if _, asked := p.chunks["a"]; asked || !p.chunks["b"] || !p.orders["o"] || p.config != 3 {
		t.Errorf("%+v", p)
	}
	p.take(mark{Removed: []string{"a"}})
	if held, known := p.chunks["a"]; held || !known {
		t.Errorf("%+v", p)
	}
}

func TestThePlanIsRepeatable(t *testing.T) {
	rec := recordOf(t, func(r *recorder) {
		for i := range 50 {
			_ = r.Write(int64(i)*512, filled('x', 512), false)
			_ = r.Flush(i + 1)
		}
	})
	a, b := plan(rec, 120, 7), plan(rec, 120, 7)
	if len(a) != 120 || !slices.Equal(a, b) {
		t.Errorf("%d cuts, the same twice: %v", len(a), slices.Equal(a, b))
	}
	if !slices.IsSortedFunc(a, func(x, y cut) int { return x.At - y.At }) {
		t.Error("not in the order of the record")
	}
}

func TestTheBootLoadersChoice(t *testing.T) {
	files := func(names ...string) (all []espFile) {
		for _, n := range names {
			all = append(all, espFile{path: "EFI/Linux/" + n, size: 1})
		}
		return all
	}
	for want, names := range map[string][]string{
		"deimos_0.2.0+3.efi":   {"deimos_0.1.0.efi", "deimos_0.2.0+3.efi"},
		"deimos_0.1.0.efi":     {"deimos_0.2.0+0-3.efi", "deimos_0.1.0.efi", "deimos_0.3.0+3.efi.tmp"},
		"deimos_0.10.0.efi":    {"deimos_0.9.0.efi", "deimos_0.10.0.efi"},
		"deimos_0.2.0+0-3.efi": {"deimos_0.2.0+0-3.efi"},
	} {
		if got := choice(files(names...)); filepath.Base(got[0].path) != want {
			t.Errorf("%v: %s", names, got[0].path)
		}
	}
}
