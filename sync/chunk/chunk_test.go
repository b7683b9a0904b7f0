package chunk_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"crypto/sha256"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/deimos-edge/deimos/sync/chunk"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// sizes covers one leaf to many, balanced and lopsided trees, full and cut last leaves.
var sizes = []int{
	1, 31, 4095, 4096, 4097, 8191, 8192, 8193, 3 * 4096, 3*4096 + 1, 5 * 4096, 7*4096 - 1,
	8 * 4096, 9 * 4096, 100_000, 255 * 4096, 1<<20 - 1, 1 << 20, 1<<20 + 1,
}

// random returns a source whose seed is printed if the test fails.
func random(t testing.TB) *rand.Rand {
	return rand.New(rand.NewPCG(testenv.Seed(t), 0))
}

func someBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// oracle holds the stored hashes of x/mod's transparency log over data's leaves.
type oracle struct {
	hashes []tlog.Hash
	leaves int64
}

func newOracle(t testing.TB, data []byte) *oracle {
	o := &oracle{}
	for len(data) > 0 {
		n := min(chunk.LeafSize, len(data))
		add, err := tlog.StoredHashes(o.leaves, data[:n], o)
		if err != nil {
			t.Fatal(err)
		}
		o.hashes = append(o.hashes, add...)
		o.leaves++
		data = data[n:]
	}
	return o
}

func (o *oracle) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, at := range indexes {
		out[i] = o.hashes[at]
	}
	return out, nil
}

func TestRootAndProofsAgreeWithTlog(t *testing.T) {
	rng := random(t)
	for _, size := range sizes {
		data := someBytes(rng, size)
		o := newOracle(t, data)
		want, err := tlog.TreeHash(o.leaves, o)
		if err != nil {
			t.Fatal(err)
		}
		id := chunk.Sum(data)
		if id != chunk.ID(want) {
			t.Fatalf("size %d: root %s, tlog says %x", size, id, want)
		}
		if n := chunk.LeafCount(int64(size)); int64(n) != o.leaves {
			t.Fatalf("size %d: %d leaves, want %d", size, n, o.leaves)
		}
		for _, leaf := range someLeaves(rng, int(o.leaves)) {
			leafBytes, path, err := chunk.Prove(data, leaf)
			if err != nil {
				t.Fatal(err)
			}
			proof := make(tlog.RecordProof, len(path))
			for i, p := range path {
				proof[i] = tlog.Hash(p)
			}
			if err := tlog.CheckRecord(proof, o.leaves, want, int64(leaf), tlog.RecordHash(leafBytes)); err != nil {
				t.Fatalf("size %d leaf %d: tlog refuses our proof: %v", size, leaf, err)
			}
			theirs, err := tlog.ProveRecord(o.leaves, int64(leaf), o)
			if err != nil {
				t.Fatal(err)
			}
			their := make([][]byte, len(theirs))
			for i := range theirs {
				their[i] = theirs[i][:]
			}
			if err := chunk.VerifyLeaf(id, int64(size), leaf, leafBytes, their); err != nil {
				t.Fatalf("size %d leaf %d: we refuse tlog's proof: %v", size, leaf, err)
			}
		}
	}
}

// someLeaves names every leaf of a small tree and the edges and a few of a large one.
func someLeaves(rng *rand.Rand, n int) []int {
	if n <= 16 {
		all := make([]int, n)
		for i := range all {
			all[i] = i
		}
		return all
	}
	return []int{0, 1, n / 2, n - 2, n - 1, rng.IntN(n), rng.IntN(n)}
}

func TestHasherEqualsSumHoweverItIsFed(t *testing.T) {
	rng := random(t)
	for _, size := range sizes {
		data := someBytes(rng, size)
		h := chunk.NewHasher()
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 1+rng.IntN(9000))
			h.Write(rest[:n])
			rest = rest[n:]
			if rng.IntN(3) == 0 { // asking in between must change nothing
				if got, want := h.ID(), chunk.Sum(data[:len(data)-len(rest)]); got != want {
					t.Fatalf("size %d: after %d bytes %s, want %s", size, h.Size(), got, want)
				}
			}
		}
		if h.ID() != chunk.Sum(data) || h.Size() != int64(size) {
			t.Fatalf("size %d: streamed id differs", size)
		}
	}
}

func TestATreeThatIsReadIsThatOfTheBytes(t *testing.T) {
	rng := random(t)
	for _, size := range sizes {
		data := someBytes(rng, size)
		var read int64
		tree, err := chunk.ReadTree(int64(size), func(into []byte, at int64) error {
			if at != read {
				t.Errorf("size %d: byte %d is read after byte %d", size, at, read)
			}
			read += int64(copy(into, data[at:]))
			return nil
		})
		if err != nil || read != int64(size) || tree.ID() != chunk.Sum(data) || !bytes.Equal(tree.Data(), data) {
			t.Fatalf("size %d: %d bytes read, %v", size, read, err)
		}
		leaf := rng.IntN(chunk.LeafCount(int64(size)))
		b, path, err := tree.Prove(leaf)
		if err == nil {
			err = chunk.VerifyLeaf(tree.ID(), int64(size), leaf, b, path)
		}
		if err != nil {
			t.Errorf("size %d, leaf %d: %v", size, leaf, err)
		}
	}
	gone := errors.New("the disk is gone")
	if _, err := chunk.ReadTree(1<<20, func(_ []byte, at int64) error {
		if at >= 500_000 {
			return gone
		}
		return nil
	}); err != gone {
		t.Errorf("reading failed with %v", err)
	}
	for _, size := range []int64{-1, 0, chunk.MaxSize + 1} {
		if _, err := chunk.ReadTree(size, func([]byte, int64) error { return nil }); err == nil {
			t.Errorf("a chunk of %d bytes was read", size)
		}
	}
}

func TestVerifyLeafRefusesAnyChange(t *testing.T) {
	rng := random(t)
	for _, size := range sizes {
		data := someBytes(rng, size)
		id, n := chunk.Sum(data), chunk.LeafCount(int64(size))
		leaf := rng.IntN(n)
		leafBytes, path, err := chunk.Prove(data, leaf)
		if err != nil {
			t.Fatal(err)
		}
		ok := func(id chunk.ID, size int64, leaf int, b []byte, p [][]byte) error {
			return chunk.VerifyLeaf(id, size, leaf, b, p)
		}
		if err := ok(id, int64(size), leaf, leafBytes, path); err != nil {
			t.Fatal(err)
		}
		flipped := bytes.Clone(leafBytes)
		flipped[rng.IntN(len(flipped))] ^= 1 << rng.IntN(8)
		otherID := id
		otherID[rng.IntN(32)] ^= 1
		zero := make([]byte, 32)
		lies := map[string]error{
			"a flipped bit":        ok(id, int64(size), leaf, flipped, path),
			"another id":           ok(otherID, int64(size), leaf, leafBytes, path),
			"a hash too many":      ok(id, int64(size), leaf, leafBytes, append(path[:len(path):len(path)], zero)),
			"a leaf cut":           ok(id, int64(size), leaf, leafBytes[:len(leafBytes)-1], path),
			"a leaf with a byte":   ok(id, int64(size), leaf, append(bytes.Clone(leafBytes), 0), path),
			"leaf index beyond":    ok(id, int64(size), n, leafBytes, path),
			"leaf index below":     ok(id, int64(size), -1, leafBytes, path),
			"size zero":            ok(id, 0, leaf, leafBytes, path),
			"size negative":        ok(id, -1, leaf, leafBytes, path),
			"size above the limit": ok(id, chunk.MaxSize+1, leaf, leafBytes, path),
		}
		if n > 1 {
			changed := append([][]byte{}, path...)
			i := rng.IntN(len(path))
			changed[i] = bytes.Clone(path[i])
			changed[i][rng.IntN(32)] ^= 1
			short := append([][]byte{}, path...)
			short[i] = path[i][:31]
			lies["a changed hash"] = ok(id, int64(size), leaf, leafBytes, changed)
			lies["a short hash"] = ok(id, int64(size), leaf, leafBytes, short)
			lies["a hash missing"] = ok(id, int64(size), leaf, leafBytes, path[:len(path)-1])
			if other := (leaf + 1) % n; true {
				lies["another place"] = ok(id, int64(size), other, leafBytes, path)
			}
		}
		for name, err := range lies {
			if !errors.Is(err, chunk.ErrProof) {
				t.Errorf("size %d leaf %d: %s is accepted (%v)", size, leaf, name, err)
			}
		}
	}
}

// A leaf may be right and the size that goes with the id wrong: then the last
// leaf gives it away.
func TestVerifyLeafRefusesAnotherSize(t *testing.T) {
	data := someBytes(random(t), 3*chunk.LeafSize+100)
	leafBytes, path, err := chunk.Prove(data, 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{-1, 1, 99, chunk.LeafSize, -chunk.LeafSize} {
		if err := chunk.VerifyLeaf(chunk.Sum(data), int64(len(data))+size, 3, leafBytes, path); !errors.Is(err, chunk.ErrProof) {
			t.Errorf("a size off by %d is accepted", size)
		}
	}
}

// An inner node passed off as a leaf is RFC 6962's reason for its prefixes.
func TestNodeIsNoLeaf(t *testing.T) {
	data := make([]byte, 2*chunk.LeafSize)
	left, right := tlog.RecordHash(data[:4096]), tlog.RecordHash(data[4096:])
	node := append(append([]byte{}, left[:]...), right[:]...)
	if err := chunk.VerifyLeaf(chunk.Sum(data), int64(len(node)), 0, node, nil); err == nil {
		t.Fatal("the two leaf hashes were accepted as a chunk of 64 bytes")
	}
}

func TestProveRefusesWhatIsNotThere(t *testing.T) {
	if _, _, err := chunk.Prove(nil, 0); err == nil {
		t.Error("a leaf of an empty chunk was proved")
	}
	if _, _, err := chunk.Prove(make([]byte, chunk.MaxSize+1), 0); err == nil {
		t.Error("a leaf of a chunk above the limit was proved")
	}
	for _, leaf := range []int{-1, 1} {
		if _, _, err := chunk.Prove([]byte("x"), leaf); err == nil {
			t.Errorf("leaf %d of one was proved", leaf)
		}
	}
}

func TestIDTextForm(t *testing.T) {
	id := chunk.Sum([]byte("x"))
	raw, err := json.Marshal(map[string]chunk.ID{"id": id})
	if err != nil {
		t.Fatal(err)
	}
	var back map[string]chunk.ID
	if err := json.Unmarshal(raw, &back); err != nil || back["id"] != id {
		t.Fatalf("%s came back as %v, %v", raw, back, err)
	}
	for _, bad := range []string{"", "00", strings.ToUpper(id.String()), id.String() + "0", strings.Repeat("g", 64)} {
		if _, err := chunk.ParseID(bad); err == nil {
			t.Errorf("%q was read as an id", bad)
		}
	}
}

func TestSplitterCutsAndLosesNothing(t *testing.T) {
	rng := random(t)
	for _, size := range []int{0, 1, chunk.DefaultSize - 1, chunk.DefaultSize, chunk.DefaultSize + 1, 2*chunk.DefaultSize + 5} {
		data := someBytes(rng, size)
		s := chunk.NewSplitter(iotest.HalfReader(bytes.NewReader(data)))
		var joined []byte
		for {
			id, piece, err := s.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(piece) == 0 || id != chunk.Sum(piece) {
				t.Fatalf("size %d: piece of %d bytes with a wrong id", size, len(piece))
			}
			if rest := size - len(joined); len(piece) != min(rest, chunk.DefaultSize) {
				t.Fatalf("size %d: piece of %d bytes with %d to go", size, len(piece), rest)
			}
			joined = append(joined, piece...)
		}
		if !bytes.Equal(joined, data) {
			t.Fatalf("size %d: the pieces are not the whole", size)
		}
	}
}

func TestSplitterReportsAReadError(t *testing.T) {
	broken := errors.New("broken")
	s := chunk.NewSplitter(io.MultiReader(bytes.NewReader(make([]byte, 100)), iotest.ErrReader(broken)))
	for range 2 {
		if _, data, err := s.Next(); !errors.Is(err, broken) || data != nil {
			t.Fatalf("got %d bytes and %v after a read error", len(data), err)
		}
	}
}

func FuzzVerifyLeaf(f *testing.F) {
	data := bytes.Repeat([]byte("deimos "), 3000)
	id := chunk.Sum(data)
	for _, leaf := range []int{0, 3, 5} {
		b, path, err := chunk.Prove(data, leaf)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(int64(len(data)), leaf, b, bytes.Join(path, nil))
	}
	f.Fuzz(func(t *testing.T, size int64, leaf int, b, joined []byte) {
		var path [][]byte
		for rest := joined; len(rest) > 0; {
			n := min(32, len(rest))
			path = append(path, rest[:n])
			rest = rest[n:]
		}
		if chunk.VerifyLeaf(id, size, leaf, b, path) != nil {
			return
		}
		// Accepted: then it is the chunk's own leaf, whatever size was claimed
		// (another size can have a tree of the same shape around this leaf).
		if leaf*chunk.LeafSize+len(b) > len(data) || !bytes.Equal(b, data[leaf*chunk.LeafSize:][:len(b)]) {
			t.Fatalf("bytes that are not leaf %d were accepted", leaf)
		}
	})
}

func BenchmarkSum(b *testing.B) {
	data := make([]byte, chunk.DefaultSize)
	b.Run("merkle", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			chunk.Sum(data)
		}
	})
	b.Run("plain-sha256", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			sha256.Sum256(data)
		}
	})
}
