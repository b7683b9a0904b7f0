// Package chunk names pieces of data by their content and proves parts of them.
//
// A chunk is 1 byte to [MaxSize] bytes; files are cut into chunks of
// [DefaultSize] by a [Splitter]. A chunk is cut further into leaves of
// [LeafSize] bytes, of which only the last may be shorter, and the leaves are
// hashed into the Merkle tree of RFC 6962 section 2.1 with SHA-256:
//
//	leaf = SHA-256(0x00 ‖ bytes)    node = SHA-256(0x01 ‖ left ‖ right)
//
// The [ID] of a chunk is the root of that tree. Two things follow:
//
//   - Whoever has a chunk and its id can tell whether the chunk is whole.
//   - Whoever knows only an id and a size can check any leaf, with [VerifyLeaf]
//     and the hashes that [Tree.Prove] gives along. That is what an audit is.
//
// The size belongs to what must be known: a root alone does not say how many
// leaves the tree has. Parties: the coordinator cuts, remembers id and size and
// verifies; a device sums, stores and proves. Nothing here is secret or keyed.
//
// An empty chunk does not exist: there would be no leaf to prove.
package chunk

import (
	"encoding/hex"
	"fmt"
)

const (
	// LeafSize is the length of every leaf but the last, in bytes.
	LeafSize = 4096
	// DefaultSize is the length that files are cut into, in bytes.
	DefaultSize = 1 << 20
	// MaxSize is the largest chunk, in bytes.
	MaxSize = 4 << 20
)

// ID is the Merkle root of a chunk.
type ID [32]byte

// String is the id in lower-case hex, 64 letters.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// ParseID reads what [ID.String] writes, and nothing else: upper case is
// refused, so that one chunk has one name.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != hex.EncodedLen(len(id)) {
		return ID{}, fmt.Errorf("%.80q is no chunk id: it must have %d letters, has %d", s, hex.EncodedLen(len(id)), len(s))
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return ID{}, fmt.Errorf("%q is no chunk id: only 0-9 and a-f are used", s)
		}
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return ID{}, fmt.Errorf("%q is no chunk id: %w", s, err)
	}
	return id, nil
}

// MarshalText writes the id in hex.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads an id in hex, as [ParseID] does.
func (id *ID) UnmarshalText(text []byte) error {
	parsed, err := ParseID(string(text))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}

// CheckSize tells whether a chunk may be size bytes long.
func CheckSize(size int64) error {
	if size < 1 || size > MaxSize {
		return fmt.Errorf("a chunk has 1 to %d bytes, not %d", MaxSize, size)
	}
	return nil
}

// LeafCount is the number of leaves of a chunk of size bytes.
func LeafCount(size int64) int {
	return int((size + LeafSize - 1) / LeafSize)
}

// leafLen is the length of one leaf of a chunk of size bytes.
func leafLen(size int64, leaf int) int {
	return int(min(LeafSize, size-int64(leaf)*LeafSize))
}
