package chunk

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"math/bits"
)

// ErrProof is returned, wrapped, by [VerifyLeaf] for a leaf that is not in the
// chunk at that place.
var ErrProof = errors.New("the leaf does not prove the chunk")

var leafPrefix = []byte{0}

func hashLeaf(h hash.Hash, data []byte) (sum ID) {
	h.Reset()
	h.Write(leafPrefix)
	h.Write(data)
	h.Sum(sum[:0])
	return sum
}

func hashNode(left, right ID) ID {
	var buf [1 + 2*len(left)]byte
	buf[0] = 1
	copy(buf[1:], left[:])
	copy(buf[1+len(left):], right[:])
	return sha256.Sum256(buf[:])
}

// Sum is the id of data. Of no data it is the hash of RFC 6962's empty tree,
// which nothing accepts as a chunk.
func Sum(data []byte) ID {
	h := NewHasher()
	h.Write(data)
	return h.ID()
}

// Hasher sums a chunk as it streams by, in constant memory. It is an
// [io.Writer] whose Write never fails; it does not limit the size.
type Hasher struct {
	leaf   hash.Hash // of the leaf that is being written
	inLeaf int       // bytes written to it
	leaves uint64    // leaves that are complete
	size   int64
	// roots are those of the perfect subtrees seen so far, large to small, one
	// for each bit set in leaves.
	roots []ID
}

// NewHasher returns a Hasher that has seen no bytes.
func NewHasher() *Hasher {
	h := &Hasher{leaf: sha256.New()}
	h.leaf.Write(leafPrefix)
	return h
}

// Write adds p to the chunk.
func (h *Hasher) Write(p []byte) (int, error) {
	n := len(p)
	h.size += int64(n)
	for len(p) > 0 {
		if h.inLeaf == LeafSize {
			h.endLeaf()
		}
		take := min(len(p), LeafSize-h.inLeaf)
		h.leaf.Write(p[:take])
		h.inLeaf += take
		p = p[take:]
	}
	return n, nil
}

// endLeaf closes the current leaf and joins the subtrees that it completes.
func (h *Hasher) endLeaf() {
	var sum ID
	h.leaf.Sum(sum[:0])
	h.leaf.Reset()
	h.leaf.Write(leafPrefix)
	h.inLeaf = 0
	for range bits.TrailingZeros64(^h.leaves) {
		last := len(h.roots) - 1
		sum = hashNode(h.roots[last], sum)
		h.roots = h.roots[:last]
	}
	h.roots = append(h.roots, sum)
	h.leaves++
}

// Size is the number of bytes seen so far.
func (h *Hasher) Size() int64 { return h.size }

// ID is the id of the bytes seen so far. More may be written after.
func (h *Hasher) ID() ID {
	if h.size == 0 {
		return sha256.Sum256(nil)
	}
	// Before the first byte of a further leaf the last one is still open, so
	// there is always one to begin with.
	var sum ID
	h.leaf.Sum(sum[:0])
	for i := len(h.roots) - 1; i >= 0; i-- {
		sum = hashNode(h.roots[i], sum)
	}
	return sum
}

// Tree is a chunk with the hashes of its leaves: it proves any number of leaves
// after hashing the chunk once.
type Tree struct {
	data   []byte
	leaves []ID
}

// NewTree hashes data, which it keeps and which must not change after.
func NewTree(data []byte) (*Tree, error) {
	if err := CheckSize(int64(len(data))); err != nil {
		return nil, err
	}
	t := &Tree{data: data, leaves: make([]ID, LeafCount(int64(len(data))))}
	h := sha256.New()
	for i := range t.leaves {
		t.leaves[i] = hashLeaf(h, t.leafBytes(i))
	}
	return t, nil
}

// leavesAtOnce are read at one go: few enough to be in the processor's cache when they are hashed.
const leavesAtOnce = 16

// ReadTree is [NewTree] of a chunk of size bytes, which read fills in, in order and a part at
// a time. An error of read is returned as it is.
func ReadTree(size int64, read func(into []byte, at int64) error) (*Tree, error) {
	if err := CheckSize(size); err != nil {
		return nil, err
	}
	t := &Tree{data: make([]byte, size), leaves: make([]ID, LeafCount(size))}
	h := sha256.New()
	for i := range t.leaves {
		if at := int64(i) * LeafSize; i%leavesAtOnce == 0 {
			if err := read(t.data[at:min(at+leavesAtOnce*LeafSize, size)], at); err != nil {
				return nil, err
			}
		}
		t.leaves[i] = hashLeaf(h, t.leafBytes(i))
	}
	return t, nil
}

func (t *Tree) leafBytes(leaf int) []byte {
	start := leaf * LeafSize
	return t.data[start : start+leafLen(int64(len(t.data)), leaf)]
}

// ID is the chunk's id.
func (t *Tree) ID() ID { return root(t.leaves) }

// Size is the chunk's length in bytes.
func (t *Tree) Size() int64 { return int64(len(t.data)) }

// Data is the chunk itself; it must not be changed.
func (t *Tree) Data() []byte { return t.data }

// Prove returns one leaf's bytes, as a part of the chunk, and its inclusion
// path: the hashes beside the way from the leaf to the root, leaf first.
func (t *Tree) Prove(leaf int) (data []byte, path [][]byte, err error) {
	if leaf < 0 || leaf >= len(t.leaves) {
		return nil, nil, fmt.Errorf("the chunk has leaves 0 to %d, not %d", len(t.leaves)-1, leaf)
	}
	return t.leafBytes(leaf), prove(t.leaves, leaf), nil
}

// Prove is [Tree.Prove] for a single leaf of data.
func Prove(data []byte, leaf int) (leafBytes []byte, path [][]byte, err error) {
	t, err := NewTree(data)
	if err != nil {
		return nil, nil, err
	}
	return t.Prove(leaf)
}

// split is where RFC 6962 cuts n > 1 leaves in two: the largest power of two
// below n.
func split(n int) int { return 1 << (bits.Len(uint(n-1)) - 1) }

func root(leaves []ID) ID {
	if len(leaves) == 1 {
		return leaves[0]
	}
	k := split(len(leaves))
	return hashNode(root(leaves[:k]), root(leaves[k:]))
}

// prove is PATH(m, D[n]) of RFC 6962 section 2.1.1.
func prove(leaves []ID, leaf int) [][]byte {
	if len(leaves) == 1 {
		return nil
	}
	var beside ID
	var path [][]byte
	if k := split(len(leaves)); leaf < k {
		path, beside = prove(leaves[:k], leaf), root(leaves[k:])
	} else {
		path, beside = prove(leaves[k:], leaf-k), root(leaves[:k])
	}
	return append(path, beside[:])
}

// pathLen is the number of hashes in the path of one of n leaves.
func pathLen(n, leaf int) int {
	length := 0
	for n > 1 {
		if k := split(n); leaf < k {
			n = k
		} else {
			n, leaf = n-k, leaf-k
		}
		length++
	}
	return length
}

// VerifyLeaf tells whether data is the leaf with that index, counted from 0, of
// the chunk with this id and size. It needs nothing but the arguments. The
// lengths of data and path follow from size and leaf, and others are refused:
// there is exactly one proof of a leaf. Errors wrap [ErrProof].
func VerifyLeaf(id ID, size int64, leaf int, data []byte, path [][]byte) error {
	if err := CheckSize(size); err != nil {
		return fmt.Errorf("%w: %w", ErrProof, err)
	}
	n := LeafCount(size)
	if leaf < 0 || leaf >= n {
		return fmt.Errorf("%w: it has leaves 0 to %d, not %d", ErrProof, n-1, leaf)
	}
	if want := leafLen(size, leaf); len(data) != want {
		return fmt.Errorf("%w: leaf %d has %d bytes, not %d", ErrProof, leaf, want, len(data))
	}
	if want := pathLen(n, leaf); len(path) != want {
		return fmt.Errorf("%w: the path of leaf %d has %d hashes, not %d", ErrProof, leaf, want, len(path))
	}
	sum := hashLeaf(sha256.New(), data)
	// RFC 9162 section 2.1.3.2: first and last are the leaf's and the last
	// leaf's index at the level that sum has reached.
	first, last := uint(leaf), uint(n-1)
	for i, p := range path {
		if len(p) != len(sum) {
			return fmt.Errorf("%w: hash %d of the path has %d bytes", ErrProof, i, len(p))
		}
		if first&1 == 1 || first == last {
			sum = hashNode(ID(p), sum)
			for first&1 == 0 && first != 0 {
				first, last = first>>1, last>>1
			}
		} else {
			sum = hashNode(sum, ID(p))
		}
		first, last = first>>1, last>>1
	}
	if sum != id {
		return fmt.Errorf("%w: leaf %d leads to another id", ErrProof, leaf)
	}
	return nil
}
