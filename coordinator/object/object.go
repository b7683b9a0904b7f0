// Package object stores files in the fleet and gets them back, on the side of
// who owns them. What leaves this package is ciphertext; what comes back is
// believed only when it has been verified.
//
// # Parties
//
//   - The owner has age identities (filippo.io/age: X25519, hybrid, SSH) and
//     trusts this program with them.
//   - The coordinator places chunks, keeps the object's record and hands on what
//     devices serve. It learns names, sizes and when; it cannot read a file, nor
//     alter, cut, swap or rename one so that it is not noticed.
//   - Devices hold chunks, and learn less.
//
// A manifest proves that an object was made for its reader, not by whom: who
// knows a public key can make an object for it. It does not prove either that
// it is the newest object of its name. Who must be sure compares the digest that
// [Put] gave.
//
// # Keys
//
// Each file has a key of 32 random bytes, wrapped with age for its recipients.
// HKDF-SHA256 (RFC 5869, no salt) makes three keys of it, with the labels
// "deimos object 1 shards", "... nonces" and "... manifest".
//
// # Stripes and shards
//
// A file is cut into stripes of k equal payloads. The last stripe's are as small
// as they can be, and filled up with zeros. Payload n of the file (n counts from 0
// through all stripes) becomes one shard, of at most [chunk.MaxSize] bytes:
//
//	nonce (12) ‖ AES-256-GCM(payload) ‖ tag (16)
//	associated data = "deimos object 1 shard" ‖ k ‖ m ‖ n (8 bytes, big endian)
//	nonce = the first 12 bytes of HMAC-SHA256(nonce key, associated data ‖ payload)
//
// So a range needs only the shards that it touches, a shard fits nowhere but in
// its place, and the same file under the same key is the same bytes: a put that
// was cut off goes on. A nonce that is made of the payload is never used for two:
// if the file was changed between the two halves of such a put, there is nothing
// to learn from it.
//
// m shards of parity are made of the k shards as they were sealed, by the
// Reed–Solomon code of klauspost/reedsolomon with its default (Vandermonde)
// matrix, or for k = 1 by multiplying with 2, 3, ... in its field, so that no two
// shards are one chunk. Whoever holds k shards of a stripe can make the others,
// without a key: see [Reconstruct].
//
// # Manifest
//
// [api.Object].Manifest is JSON: version, the wrapped key, and sealed with the
// manifest key under a random nonce, bound to the wrapped key, what must not be
// altered: name, size, SHA-256 of the file, code, payload size, and a digest over
// the list of chunks. It is opened before anything else is believed of an object.
//
// # Memory
//
// [Put] and [Get] hold at most underWay bytes of shards, or one stripe if that is
// more, whatever the file's size; beside it the buffers of as many requests as
// there are at once (atOnce).
//
// # Plain objects
//
// Without a code, chunks are the file's own bytes, each replicated: devices and
// the coordinator can read them, and jobs run over them. The coordinator's word
// is all there is for their list, so that it could give a plain object for an
// encrypted one: who brings a key gets no plain object.
package object

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"filippo.io/age"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
)

const (
	// underWay bounds the shards in memory, in bytes.
	underWay = 48 << 20
	// atOnce is how many requests are made together.
	atOnce = 12
)

// maxChunks is api.MaxChunks, but for tests.
var maxChunks = api.MaxChunks

// ErrDamaged is in the error when what came back is not what was stored.
var ErrDamaged = errors.New("what came back is not what was stored")

// ErrWhole is in the error, beside [ErrDamaged], when each part was believed and
// the whole is not what was stored: what came before is wrong, or the list of a
// plain object.
var ErrWhole = fmt.Errorf("%w as a whole", ErrDamaged)

// ErrRemoved is in the error when an object was removed while it was fetched.
var ErrRemoved = errors.New("was removed while it was fetched")

// ErrPlain is in the error when what was to be opened with a key is not encrypted.
var ErrPlain = errors.New("it is not encrypted, and nothing shows that it is what was stored")

// ErrNoKey is in the error when none of the identities fits.
var ErrNoKey = errors.New("none of the keys here opens it")

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// Object is an object whose record was believed.
type Object struct {
	api.Object
	m    manifest
	keys keys
}

// Digest is the SHA-256 of the file, hex.
func (o *Object) Digest() string {
	if o.Code == nil {
		return o.SHA256
	}
	return o.m.SHA256
}

// Version is a name for this content under this name: it differs if anything of
// the object does.
func (o *Object) Version() string {
	h := sha256.New()
	fmt.Fprintf(h, "%q %d %s %x", o.Name, o.Size, o.Digest(), listDigest(o.Chunks))
	return hex.EncodeToString(h.Sum(nil))
}

// Open fetches an object's record and opens its manifest. With identities, it
// must have one; without, it must be plain.
func Open(ctx context.Context, c *api.Client, name string, identities []age.Identity) (*Object, error) {
	rec, err := c.Object(ctx, name)
	if err != nil {
		return nil, err
	}
	if rec.Name != name {
		return nil, damaged("the record of %q came for %q", rec.Name, name)
	}
	return open(rec, identities)
}

func open(rec api.Object, identities []age.Identity) (*Object, error) {
	o := &Object{Object: rec}
	if rec.Code == nil && len(identities) > 0 {
		return nil, fmt.Errorf("%q: %w", rec.Name, ErrPlain)
	}
	if rec.Code == nil {
		return o, checkPlain(rec)
	}
	var err error
	o.m, o.keys, err = openManifest(rec, identities)
	return o, err
}

// checkPlain looks whether the pieces can be the file's: the digest is for the
// whole only, and says nothing of a range.
func checkPlain(o api.Object) error {
	var sum int64
	for _, ch := range o.Chunks {
		if ch.Size < 1 || ch.Size > chunk.MaxSize {
			return damaged("%q has a chunk of %d bytes", o.Name, ch.Size)
		}
		sum += ch.Size
	}
	if sum != o.Size {
		return damaged("the chunks of %q have %d bytes together, the record says %d", o.Name, sum, o.Size)
	}
	return nil
}

// whole checks a file as it goes by.
type whole struct {
	hash hash.Hash
	size int64
}

func newWhole() *whole { return &whole{hash: sha256.New()} }

func (h *whole) Write(p []byte) (int, error) {
	h.size += int64(len(p))
	return h.hash.Write(p)
}

func (h *whole) sum() string { return hex.EncodeToString(h.hash.Sum(nil)) }

// resume takes in the bytes that were got before.
func (h *whole) resume(r io.Reader, n int64) error {
	_, err := io.CopyN(h, r, n)
	return err
}
