package delta

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func random(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, seed))
}

// program is like one: code with addresses in it, and tables of zeros.
func program(r *rand.Rand, size int) []byte {
	p := make([]byte, 0, size)
	for len(p) < size {
		switch r.IntN(20) {
		case 0:
			p = append(p, make([]byte, r.IntN(200))...)
		case 1:
			for range r.IntN(100) {
				p = append(p, byte(r.Uint32()))
			}
		default:
			p = fmt.Appendf(p, "call %d; ", r.IntN(1000))
			p = binary.LittleEndian.AppendUint32(p, uint32(len(p)+r.IntN(64)))
		}
	}
	return p[:size]
}

// changed is p with some pieces taken out, put in, moved and altered.
func changed(r *rand.Rand, p []byte) []byte {
	p = bytes.Clone(p)
	for range r.IntN(8) {
		i := r.IntN(len(p) + 1)
		j := i + r.IntN(len(p)-i+1)/2
		switch r.IntN(4) {
		case 0:
			p = slices.Delete(p, i, j)
		case 1:
			p = slices.Insert(p, i, program(r, r.IntN(300))...)
		case 2:
			p = append(p, p[i:j]...)
		default:
			for ; i < j; i += 1 + r.IntN(50) {
				p[i] += byte(r.IntN(4))
			}
		}
	}
	return p
}

func patch(t testing.TB, encoding string, old, file []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	must(t, Make(t.Context(), encoding, old, file, &out, nil))
	return out.Bytes()
}

func apply(encoding string, patch io.Reader, old []byte, size int) ([]byte, error) {
	r, err := NewReader(encoding, patch, section(old), int64(size))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func section(old []byte) *io.SectionReader {
	return io.NewSectionReader(bytes.NewReader(old), 0, int64(len(old)))
}

func TestAPatchMakesTheNewFile(t *testing.T) {
	r := random(t)
	for _, encoding := range Encodings {
		t.Run(encoding, func(t *testing.T) {
			for i := range 15 {
				old := program(r, r.IntN(60_000))
				file := changed(r, old)
				switch i {
				case 0:
					old = nil
				case 1:
					file = nil
				case 2:
					file = old
				case 3:
					old, file = make([]byte, 300_000), make([]byte, 200_001)
				case 4:
					old, file = []byte{7}, []byte{7}
				}
				raw := patch(t, encoding, old, file)
				in := io.Reader(bytes.NewReader(raw))
				if i%2 == 0 {
					in = iotest.OneByteReader(in)
				}
				got, err := apply(encoding, in, old, len(file))
				if err != nil || !bytes.Equal(got, file) {
					t.Fatalf("round %d, of %d bytes %d: %v, other bytes: %v", i, len(old), len(file), err, !bytes.Equal(got, file))
				}
				if again := patch(t, encoding, old, file); !bytes.Equal(raw, again) {
					t.Fatal("made again, it has other bytes")
				}
			}
		})
	}
}

// TestAPatchIsSmall: a few bytes for a few changes, also where code has moved and all
// addresses with it, which is what bsdiff is for.
func TestAPatchIsSmall(t *testing.T) {
	r := random(t)
	old := program(r, 1<<20)
	moved := slices.Insert(bytes.Clone(old), 1000, program(r, 400)...)
	for i := 2000; i < len(moved)-4; i += 24 {
		binary.LittleEndian.PutUint32(moved[i:], binary.LittleEndian.Uint32(moved[i:])+400)
	}
	for encoding, most := range map[string]int{BSDiff: 20_000, DCZ: 250_000} {
		n := len(patch(t, encoding, old, moved))
		t.Logf("%s: %d bytes", encoding, n)
		if n > most {
			t.Errorf("%s: %d bytes, at most %d are expected", encoding, n, most)
		}
	}
}

func TestSuffixesAreInOrder(t *testing.T) {
	r := random(t)
	for range 20 {
		file := program(r, r.IntN(3000))
		x := sorted(file)
		if len(x.order) != len(file) || !slices.IsSortedFunc(x.order, func(a, b int32) int { return bytes.Compare(file[a:], file[b:]) }) {
			t.Fatal("the standard library tells places in another order now: sort in another way")
		}
		for range 50 {
			text := changed(r, file[r.IntN(len(file)+1):])
			want := 0
			for i := range file {
				want = max(want, shared(file[i:], text))
			}
			at, n := x.longest(text)
			if want >= 2 && n != want || shared(file[at:], text) < n {
				t.Fatalf("%d bytes at %d, %d are to be found", n, at, want)
			}
		}
	}
}

// TestADamagedPatchIsNamed: cut or altered anywhere, or for another file, it is refused,
// or makes no more bytes than it should.
func TestADamagedPatchIsNamed(t *testing.T) {
	r := random(t)
	old := program(r, 20_000)
	file := changed(r, old)
	for _, encoding := range Encodings {
		raw := patch(t, encoding, old, file)
		for range 500 {
			bad := bytes.Clone(raw)
			if r.IntN(3) == 0 {
				bad = bad[:r.IntN(len(bad))]
			} else {
				bad[r.IntN(len(bad))] ^= byte(1 + r.IntN(255))
			}
			got, err := apply(encoding, bytes.NewReader(bad), old, len(file))
			if err != nil && !errors.Is(err, ErrPatch) || len(got) > len(file) {
				t.Fatalf("%s: %v, %d bytes", encoding, err, len(got))
			}
		}
		for what, size := range map[string]int{"more": len(file) - 1, "less": len(file) + 1} {
			if got, err := apply(encoding, bytes.NewReader(raw), old, size); !errors.Is(err, ErrPatch) || len(got) > size {
				t.Errorf("%s makes %s than was said: %v, %d bytes", encoding, what, err, len(got))
			}
		}
		if _, err := apply(encoding, bytes.NewReader(raw), old[:len(old)-1], len(file)); encoding == DCZ && (!errors.Is(err, ErrPatch) || !strings.Contains(err.Error(), "it is for the file with SHA-256")) {
			t.Errorf("for another file: %v", err)
		}
	}
	if _, err := apply("future", nil, nil, 1); !errors.Is(err, ErrPatch) {
		t.Error(err)
	}
}

func packed(t testing.TB, raw []byte, o ...zstd.EOption) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil, o...)
	must(t, err)
	return enc.EncodeAll(raw, nil)
}

// group is the head of one, with records of seek, add and copy.
func group(records ...[3]uint64) []byte {
	raw := binary.AppendUvarint(nil, uint64(len(records)))
	for _, r := range records {
		raw = binary.AppendUvarint(binary.AppendUvarint(binary.AppendVarint(raw, int64(r[0])), r[1]), r[2])
	}
	return raw
}

// TestAHostilePatchIsBounded: what claims to be huge, goes nowhere, or never ends.
func TestAHostilePatchIsBounded(t *testing.T) {
	old := []byte("what runs")
	sum := sha256.Sum256(old)
	dcz := func(raw []byte) []byte { return append(append([]byte(dczMagic), sum[:]...), raw...) }
	back := func(n uint64) uint64 { return -n }
	many := binary.AppendUvarint(nil, mostRecords+1)
	for name, c := range map[string]struct {
		encoding string
		patch    []byte
		words    string
	}{
		"more than was said":          {BSDiff, packed(t, append(group([3]uint64{0, 0, 1001}), make([]byte, 1001)...)), "more than was said"},
		"more in two numbers":         {BSDiff, packed(t, group([3]uint64{0, 9, 992})), "more than was said"},
		"two numbers that overflow":   {BSDiff, packed(t, group([3]uint64{0, 1 << 63, 1 << 63})), "more than was said"},
		"old bytes that are not":      {BSDiff, packed(t, append(group([3]uint64{0, 10, 0}), make([]byte, 10)...)), "the old file has not"},
		"before the old file":         {BSDiff, packed(t, append(group([3]uint64{back(1), 1, 0}), 0)), "the old file has not"},
		"far behind the old file":     {BSDiff, packed(t, group([3]uint64{1 << 62, 1, 0})), "the old file has not"},
		"far before the old file":     {BSDiff, packed(t, group([3]uint64{back(1 << 63), 1, 0})), "the old file has not"},
		"a record that makes nothing": {BSDiff, packed(t, group([3]uint64{0, 0, 0})), "makes nothing"},
		"a group without records":     {BSDiff, packed(t, make([]byte, 100_000)), "has 0 records"},
		"a group of many records":     {BSDiff, packed(t, append(many, make([]byte, 100)...)), "has 65537 records"},
		"more than was said, later":   {BSDiff, packed(t, append(group([3]uint64{0, 0, 1000}, [3]uint64{0, 0, 1}), make([]byte, 1001)...)), "more than was said"},
		"a number without end":        {BSDiff, packed(t, bytes.Repeat([]byte{0xff}, 100)), "overflows"},
		"a frame of 9 MiB at once":    {BSDiff, packed(t, make([]byte, 9<<20), zstd.WithSingleSegment(true)), "exceeds"},
		"no zstd":                     {BSDiff, []byte("hello, world"), "magic"},
		"nothing":                     {BSDiff, nil, "unexpected EOF"},
		"nothing at all":              {DCZ, nil, "EOF"},
		"no header":                   {DCZ, bytes.Repeat([]byte{1}, 100), "does not begin"},
		"a frame of 9 MiB":            {DCZ, dcz(packed(t, make([]byte, 9<<20))), "window size"},
		"a frame that goes on":        {DCZ, dcz(packed(t, make([]byte, 1001))), "more than was said"},
		"a frame too short":           {DCZ, dcz(packed(t, make([]byte, 999))), "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := apply(c.encoding, bytes.NewReader(c.patch), old, 1000)
			if !errors.Is(err, ErrPatch) || !strings.Contains(err.Error(), c.words) || len(got) > 1000 {
				t.Errorf("%v, %d bytes; want %q", err, len(got), c.words)
			}
		})
	}
}

// TestGroupsAreBounded, whatever is to be written; a larger one is refused.
func TestGroupsAreBounded(t *testing.T) {
	r := random(t)
	fresh := make([]byte, 2*mostFresh+7)
	for i := range fresh {
		fresh[i] = byte(r.Uint32())
	}
	old := program(r, 10_000)
	file := append(append(bytes.Clone(old), fresh...), old...)
	got, err := apply(BSDiff, bytes.NewReader(patch(t, BSDiff, old, file)), old, len(file))
	if err != nil || !bytes.Equal(got, file) {
		t.Errorf("of much that is new: %v, %d bytes", err, len(got))
	}
	var out bytes.Buffer
	w := recordWriter{w: &out, old: []byte{1, 2}, file: bytes.Repeat([]byte{2, 7}, mostRecords+10)}
	for i := range mostRecords + 10 {
		must(t, w.record(made{from: 1, here: 2 * i, add: 1, fresh: 1}))
	}
	must(t, w.flush())
	got, err = apply(BSDiff, bytes.NewReader(packed(t, out.Bytes())), w.old, len(w.file))
	if err != nil || !bytes.Equal(got, w.file) {
		t.Errorf("of many records: %v, %d bytes", err, len(got))
	}
	large := append(group([3]uint64{0, 0, mostFresh + 1}), fresh[:mostFresh+1]...)
	if _, err := apply(BSDiff, bytes.NewReader(packed(t, large)), old, mostFresh+1); !errors.Is(err, ErrPatch) || !strings.Contains(err.Error(), "too many new bytes") {
		t.Error(err)
	}
}

// TestMemoryIsBounded: what takes more than a device may spend is neither made nor
// applied; records take the same whatever the size.
func TestMemoryIsBounded(t *testing.T) {
	if Memory(BSDiff, 1<<30, 1<<30) > Budget {
		t.Error("records take more with larger files")
	}
	half := int64(Budget / 2)
	old := io.NewSectionReader(zeros{}, 0, half)
	if _, err := NewReader(DCZ, nil, old, half); !errors.Is(err, ErrPatch) || !strings.Contains(err.Error(), "memory") {
		t.Error(err)
	}
	if err := Make(t.Context(), DCZ, make([]byte, half), make([]byte, half), io.Discard, nil); !errors.Is(err, ErrPatch) {
		t.Error(err)
	}
}

// zeros is a file of as many as are asked for.
type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

// TestADiskThatFailsIsNamed: the old file cannot be read any more.
func TestADiskThatFailsIsNamed(t *testing.T) {
	old := program(random(t), 5000)
	for _, encoding := range Encodings {
		r, err := NewReader(encoding, bytes.NewReader(patch(t, encoding, old, old)), io.NewSectionReader(bytes.NewReader(old[:100]), 0, 5000), 5000)
		if err == nil {
			_, err = io.ReadAll(r)
			must(t, r.Close())
		}
		if !errors.Is(err, ErrPatch) || !strings.Contains(err.Error(), "cannot be read") {
			t.Errorf("%s: %v", encoding, err)
		}
	}
}

func TestMakingStopsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	old := program(random(t), 1<<20)
	told := 0.0
	err := Make(ctx, BSDiff, old, old[1:], io.Discard, func(f float64) {
		told = f
		cancel()
	})
	if !errors.Is(err, context.Canceled) || told == 1 {
		t.Errorf("%v, at %v", err, told)
	}
}

func FuzzApply(f *testing.F) {
	old := program(rand.New(rand.NewPCG(1, 2)), 3000)
	file := changed(rand.New(rand.NewPCG(3, 4)), old)
	for i, encoding := range Encodings {
		f.Add(i, patch(f, encoding, old, file))
	}
	f.Add(0, packed(f, group([3]uint64{3, 6, 3})))
	f.Fuzz(func(t *testing.T, i int, raw []byte) {
		encoding := Encodings[uint(i)%uint(len(Encodings))]
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got, err := apply(encoding, bytes.NewReader(raw), old, len(file))
		if err != nil && !errors.Is(err, ErrPatch) || len(got) > len(file) {
			t.Errorf("%v, %d bytes", err, len(got))
		}
		if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > Budget {
			t.Errorf("it took %d bytes", after.TotalAlloc-before.TotalAlloc)
		}
	})
}

// FuzzRecords gives the records as they are, without what packs them.
func FuzzRecords(f *testing.F) {
	old := program(rand.New(rand.NewPCG(1, 2)), 3000)
	f.Add(append(group([3]uint64{5, 9, 3}), make([]byte, 12)...), 12)
	f.Fuzz(func(t *testing.T, raw []byte, size int) {
		size = int(uint(size) % 10_000)
		got, err := apply(BSDiff, bytes.NewReader(packed(t, raw, zstd.WithEncoderLevel(zstd.SpeedFastest))), old, size)
		if err != nil && !errors.Is(err, ErrPatch) || len(got) > size {
			t.Errorf("%v, %d bytes", err, len(got))
		}
	})
}
