package object

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"filippo.io/age"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
)

const (
	version   = 1
	keySize   = 32
	nonceSize = 12
	tagSize   = 16
	overhead  = nonceSize + tagSize // of a shard over its payload
	// maxWrapped is what all recipients together may take of a manifest, in bytes.
	maxWrapped = 32 << 10
)

// keys are what is made of a file's key.
type keys struct {
	shards, manifest cipher.AEAD
	nonces           []byte
}

func deriveKeys(fileKey []byte) (k keys, err error) {
	derive := func(what string) []byte {
		out, e := hkdf.Key(sha256.New, fileKey, nil, fmt.Sprintf("deimos object %d %s", version, what), keySize)
		err = errors.Join(err, e)
		return out
	}
	aead := func(key []byte) cipher.AEAD {
		if err != nil {
			return nil
		}
		b, e := aes.NewCipher(key)
		if e != nil {
			err = e
			return nil
		}
		a, e := cipher.NewGCM(b)
		err = errors.Join(err, e)
		return a
	}
	k.shards = aead(derive("shards"))
	k.nonces = derive("nonces")
	k.manifest = aead(derive("manifest"))
	return k, err
}

// place is what a shard is bound to.
func place(c api.Code, n int64) []byte {
	ad := fmt.Appendf(nil, "deimos object %d shard", version)
	ad = append(ad, byte(c.Data), byte(c.Parity))
	return binary.BigEndian.AppendUint64(ad, uint64(n))
}

// sealShard writes the shard of payload n to dst, whose capacity is enough.
func (k keys) sealShard(dst []byte, c api.Code, n int64, payload []byte) []byte {
	ad := place(c, n)
	mac := hmac.New(sha256.New, k.nonces)
	mac.Write(ad)
	mac.Write(payload)
	nonce := mac.Sum(nil)[:nonceSize]
	return k.shards.Seal(append(dst[:0], nonce...), nonce, payload, ad)
}

// openShard returns the payload in the place of the shard.
func (k keys) openShard(c api.Code, n int64, shard []byte) ([]byte, error) {
	if len(shard) < overhead {
		return nil, damaged("a shard has only %d bytes", len(shard))
	}
	out, err := k.shards.Open(shard[nonceSize:nonceSize], shard[:nonceSize], shard[nonceSize:], place(c, n))
	if err != nil {
		return nil, damaged("shard %d does not open with the file's key", n)
	}
	return out, nil
}

// manifest is what is sealed.
type manifest struct {
	Name    string   `json:"name"`
	Size    int64    `json:"size"`   // of the file, in bytes
	SHA256  string   `json:"sha256"` // of the file, hex
	Code    api.Code `json:"code"`
	Payload int      `json:"payload"` // bytes of each, but those of the last stripe
	Chunks  string   `json:"chunks"`  // digest of the list, hex
	// Readers is a digest of the names of who it was stored for; empty: not told.
	Readers string `json:"readers,omitempty"`
}

// envelope is [api.Object].Manifest.
type envelope struct {
	Version int    `json:"version"`
	Key     []byte `json:"key"`    // age
	Sealed  []byte `json:"sealed"` // nonce ‖ AES-256-GCM(manifest)
}

// manifestAD binds what is sealed to the key beside it.
func manifestAD(wrapped []byte) []byte {
	sum := sha256.Sum256(wrapped)
	return append(fmt.Appendf(nil, "deimos object %d manifest", version), sum[:]...)
}

// listDigest is SHA-256 over each chunk's id (32 bytes) and size (8, big endian).
func listDigest(chunks []api.Chunk) []byte {
	h := sha256.New()
	for _, ch := range chunks {
		id, _ := hex.DecodeString(ch.ID) // one that is none makes another digest
		h.Write(binary.BigEndian.AppendUint64(id, uint64(ch.Size)))
	}
	return h.Sum(nil)
}

// readersDigest is the SHA-256 of names, in whatever order; empty of none.
func readersDigest(names []string) string {
	if len(names) == 0 {
		return ""
	}
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	h := sha256.New()
	for _, n := range names {
		fmt.Fprintf(h, "%q", n)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// wrap encrypts a file's key for its recipients.
func wrap(fileKey []byte, recipients []age.Recipient) ([]byte, error) {
	var out bytes.Buffer
	w, err := age.Encrypt(&out, recipients...)
	if err == nil {
		_, err = w.Write(fileKey)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("the file's key cannot be wrapped: %w", err)
	}
	if out.Len() > maxWrapped {
		return nil, fmt.Errorf("the file's key takes %d bytes for %d recipients, more than the %d there is room for: name fewer", out.Len(), len(recipients), maxWrapped)
	}
	return out.Bytes(), nil
}

func unwrap(wrapped []byte, identities []age.Identity) ([]byte, error) {
	if len(identities) == 0 {
		return nil, ErrNoKey
	}
	r, err := age.Decrypt(bytes.NewReader(wrapped), identities...)
	var none *age.NoIdentityMatchError
	if errors.As(err, &none) {
		return nil, ErrNoKey
	}
	if err != nil {
		return nil, damaged("the wrapped key cannot be read (%v)", err)
	}
	key, err := io.ReadAll(io.LimitReader(r, keySize+1))
	if err != nil || len(key) != keySize {
		return nil, damaged("the wrapped key is cut")
	}
	return key, nil
}

func sealManifest(k keys, wrapped []byte, m manifest) ([]byte, error) {
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, nonceSize)
	rand.Read(nonce)
	return json.Marshal(envelope{version, wrapped, k.manifest.Seal(nonce, nonce, raw, manifestAD(wrapped))})
}

// openManifest believes nothing of a record that the manifest does not say.
func openManifest(o api.Object, identities []age.Identity) (m manifest, k keys, err error) {
	e, err := readEnvelope(o)
	if err != nil {
		return m, k, err
	}
	key, err := unwrap(e.Key, identities)
	if err != nil {
		return m, k, fmt.Errorf("%q: %w", o.Name, err)
	}
	return e.open(o, key)
}

func readEnvelope(o api.Object) (e envelope, err error) {
	if len(o.Manifest) > api.MaxManifest {
		return e, damaged("the manifest of %q has %d bytes", o.Name, len(o.Manifest))
	}
	if err := json.Unmarshal(o.Manifest, &e); err != nil {
		return e, damaged("the manifest of %q cannot be read", o.Name)
	}
	if e.Version != version {
		return e, fmt.Errorf("%q was stored by another version of this program: its manifest has version %d, known is %d", o.Name, e.Version, version)
	}
	return e, nil
}

// open opens the manifest with the file's key.
func (e envelope) open(o api.Object, key []byte) (m manifest, k keys, err error) {
	if k, err = deriveKeys(key); err != nil {
		return m, k, err
	}
	if len(e.Sealed) < overhead {
		return m, k, damaged("the manifest of %q is cut", o.Name)
	}
	raw, err := k.manifest.Open(nil, e.Sealed[:nonceSize], e.Sealed[nonceSize:], manifestAD(e.Key))
	if err != nil {
		return m, k, damaged("the manifest of %q was altered", o.Name)
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, k, damaged("the manifest of %q cannot be read", o.Name)
	}
	switch {
	case m.Name != o.Name:
		return m, k, damaged("%q has the manifest of %q", o.Name, m.Name)
	case m.Code != *o.Code:
		return m, k, damaged("%q was stored with the code %s, the record says %s", o.Name, m.Code, *o.Code)
	case m.Size != o.Size:
		return m, k, damaged("%q has %d bytes, the record says %d", o.Name, m.Size, o.Size)
	case m.Chunks != hex.EncodeToString(listDigest(o.Chunks)):
		return m, k, damaged("the list of the chunks of %q is not the one that was stored", o.Name)
	}
	return m, k, m.check(o.Chunks)
}

// check looks whether a manifest makes sense: who knows a public key can seal any.
func (m manifest) check(chunks []api.Chunk) error {
	if checkCode(m.Code) != nil || m.Size < 0 || m.Size > int64(api.MaxChunks)*chunk.MaxSize || m.Payload < 1 || m.Payload > chunk.MaxSize-overhead {
		return damaged("the manifest of %q makes no sense", m.Name)
	}
	var want []api.Chunk
	for s := range m.stripes() {
		_, payload := m.stripe(s)
		want = append(want, slices.Repeat([]api.Chunk{{Size: int64(payload + overhead)}}, m.Code.Shards())...)
		if len(want) > len(chunks) {
			break
		}
	}
	if !slices.EqualFunc(want, chunks, func(a, b api.Chunk) bool { return a.Size == b.Size }) {
		return damaged("the chunks of %q have other sizes than its manifest says", m.Name)
	}
	return nil
}

// stripes is how many there are.
func (m manifest) stripes() int64 {
	full := int64(m.Payload) * int64(m.Code.Data)
	return (m.Size + full - 1) / full
}

// stripe is where in the file one begins, and the bytes of each of its payloads.
func (m manifest) stripe(s int64) (at int64, payload int) {
	full := int64(m.Payload) * int64(m.Code.Data)
	at = s * full
	return at, payloadOf(min(m.Size-at, full), m.Code)
}

// payloadOf is how many bytes of each payload hold n bytes of a file.
func payloadOf(n int64, c api.Code) int {
	return int((n + int64(c.Data) - 1) / int64(c.Data))
}
