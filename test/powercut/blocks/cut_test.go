package blocks

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// recordOf makes a recording of a small disk by hand.
func recordOf(t *testing.T, do func(r *Recorder)) *Recording {
	t.Helper()
	dir := t.TempDir()
	r, err := NewRecorder(dir)
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
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	rec, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rec.Close() })
	return rec
}

func filled(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// What was flushed, or written with FUA, is there after every cut; what was not
// may be there, missing or torn, and each of them happens.
func TestOnlyWhatWasFlushedIsSure(t *testing.T) {
	rec := recordOf(t, func(r *Recorder) {
		_ = r.Write(0, filled('a', 4096), false)
		_ = r.Flush(1)
		_ = r.Write(8192, filled('f', 512), true)
		_ = r.Write(4096, filled('b', 4096), false)
		_ = r.Write(0, filled('c', 4096), false)
		_ = r.Flush(3) // not of the last
	})
	d, err := NewDisk(rec)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Advance(len(rec.Events)); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for seed := range uint64(300) {
		if _, _, err := d.Cut(seed); err != nil {
			t.Fatal(err)
		}
		m := d.Work.Mem
		if !bytes.Equal(m[8192:8704], filled('f', 512)) || !bytes.Equal(m[4096:8192], filled('b', 4096)) {
			t.Fatalf("cut with seed %d took what was durable", seed)
		}
		switch old, new := bytes.Count(m[:4096], []byte("a")), bytes.Count(m[:4096], []byte("c")); {
		case old+new != 4096 || new%Sector != 0:
			t.Fatalf("cut with seed %d tore a sector", seed)
		case new == 0:
			seen["missing"] = true
		case old == 0:
			seen["there"] = true
		default:
			seen["torn"] = true
		}
		if err := d.Restore(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(d.Work.Mem, d.base.Mem) {
			t.Fatal("what the cut did was not undone")
		}
	}
	if len(seen) != 3 {
		t.Errorf("of missing, there and torn only %v were seen", seen)
	}
}

func TestThePlanIsRepeatable(t *testing.T) {
	rec := recordOf(t, func(r *Recorder) {
		for i := range 50 {
			_ = r.Write(int64(i)*512, filled('x', 512), false)
			_ = r.Flush(i + 1)
		}
	})
	a, b := Plan(rec, 120, 7), Plan(rec, 120, 7)
	if len(a) != 120 || !slices.Equal(a, b) {
		t.Errorf("%d cuts, the same twice: %v", len(a), slices.Equal(a, b))
	}
	if !slices.IsSortedFunc(a, func(x, y Cut) int { return x.At - y.At }) {
		t.Error("not in the order of the record")
	}
}

func TestACutIsReadBackFromItsName(t *testing.T) {
	rec := &Recording{Events: make([]Event, 9)}
	if c, err := rec.ParseCut((Cut{7, 1 << 63}).String()); err != nil || c != (Cut{7, 1 << 63}) {
		t.Errorf("%v, %v", c, err)
	}
	for _, s := range []string{"", "7", "7:", ":7", "10:1", "-1:1", "7:1:1"} {
		if c, err := rec.ParseCut(s); err == nil {
			t.Errorf("%q is %v", s, c)
		}
	}
}
