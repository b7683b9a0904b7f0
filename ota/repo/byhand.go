package repo

import (
	"bytes"
	"cmp"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/cjson"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/deimos-edge/deimos/internal/durable"
)

// Signing by hand: what lacks signatures is written to a folder as N.role.json,
// the version before it beside, in previous/. Whoever has a key looks at it on a
// machine of their own, and adds a signature; several may sign copies of it.

// previousDir is beside a file that waits for signatures.
const previousDir = "previous"

// writeUnsigned writes metadata that lacks signatures, and the version before it if
// there is one.
func writeUnsigned[T metadata.Roles](dir, role string, old, next *metadata.Metadata[T]) (string, error) {
	if err := os.MkdirAll(filepath.Join(dir, previousDir), 0o755); err != nil {
		return "", fmt.Errorf("make the folder for what is to be signed: %w", err)
	}
	write := func(m *metadata.Metadata[T], dir string) (string, error) {
		raw, err := m.ToBytes(true)
		if err != nil {
			return "", err
		}
		file := filepath.Join(dir, fmt.Sprintf("%d.%s.json", versionOf(m), role))
		return file, durable.WriteFile(file, raw, 0o644)
	}
	if old != nil && versionOf(old) > 0 {
		if _, err := write(old, filepath.Join(dir, previousDir)); err != nil {
			return "", err
		}
	}
	return write(next, dir)
}

func versionOf[T metadata.Roles](m *metadata.Metadata[T]) int64 {
	switch s := any(m.Signed).(type) {
	case metadata.RootType:
		return s.Version
	case metadata.TargetsType:
		return s.Version
	case metadata.SnapshotType:
		return s.Version
	case metadata.TimestampType:
		return s.Version
	}
	return 0
}

// Statement is what a signature on a file of metadata says, for whoever gives it.
type Statement struct {
	Role    string    `json:"role"`
	Version int64     `json:"version"`
	Expires time.Time `json:"expires,omitzero"` // zero: never, as of the log
	SHA256  string    `json:"sha256"`           // of what is signed, in its canonical form: the same on every machine
	// Previous is the version that Changes are against; 0 if there is none to compare with.
	Previous int64 `json:"previous,omitempty"`
	// PreviousMine tells whether the previous version bears a valid signature of the
	// key that is to sign: it is not just what somebody laid beside the file.
	PreviousMine bool `json:"previous_mine"`
	// Changes are sentences without a full stop; what is signed says nothing else.
	Changes []string `json:"changes"`
	// Signed are the ids of keys that have signed already.
	Signed []string `json:"signed,omitempty"`
}

// Examine tells what is signed with a file that [Publish] or [Rotate] wrote.
// previous is the version before it, of the log a checkpoint; empty: the one beside it, if
// there is one. by is the key that is to sign.
func Examine(file, previous string, by crypto.PublicKey) (Statement, error) {
	raw, role, err := readHand(file)
	if err != nil {
		return Statement{}, err
	}
	switch role {
	case LogRole:
		return examineLog(file, previous, by, raw)
	case metadata.ROOT:
		return examine(file, previous, by, role, raw, metadata.Root, func(m *metadata.RootType) (int64, time.Time) { return m.Version, m.Expires }, rootChanges)
	case metadata.TARGETS:
		return examine(file, previous, by, role, raw, metadata.Targets, func(m *metadata.TargetsType) (int64, time.Time) { return m.Version, m.Expires }, targetsChanges)
	case metadata.SNAPSHOT:
		return examine(file, previous, by, role, raw, metadata.Snapshot, func(m *metadata.SnapshotType) (int64, time.Time) { return m.Version, m.Expires },
			func(old, m *metadata.SnapshotType) ([]string, error) { return metaChanges(m.Meta), nil })
	}
	return examine(file, previous, by, role, raw, metadata.Timestamp, func(m *metadata.TimestampType) (int64, time.Time) { return m.Version, m.Expires },
		func(old, m *metadata.TimestampType) ([]string, error) { return metaChanges(m.Meta), nil })
}

// Sign adds a signature to such a file, and tells the id of the key. Show the
// [Statement] to who signs before.
func Sign(file string, s crypto.Signer) (id string, err error) {
	raw, role, err := readHand(file)
	if err != nil {
		return "", err
	}
	if id, err = KeyID(s.Public()); err != nil {
		return "", err
	}
	switch role {
	case LogRole:
		return id, signHandLog(file, raw, s)
	case metadata.ROOT:
		return id, addSignature[metadata.RootType](file, raw, id, s)
	case metadata.TARGETS:
		return id, addSignature[metadata.TargetsType](file, raw, id, s)
	case metadata.SNAPSHOT:
		return id, addSignature[metadata.SnapshotType](file, raw, id, s)
	}
	return id, addSignature[metadata.TimestampType](file, raw, id, s)
}

func addSignature[T metadata.Roles](file string, raw []byte, id string, s crypto.Signer) error {
	m, err := new(metadata.Metadata[T]).FromBytes(raw)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	m.Signatures = slices.DeleteFunc(m.Signatures, func(have metadata.Signature) bool { return have.KeyID == id })
	if err := sign(m, s); err != nil {
		return fmt.Errorf("sign %s: %w", file, err)
	}
	if raw, err = m.ToBytes(true); err != nil {
		return err
	}
	return durable.WriteFile(file, raw, 0o644)
}

// readHand reads a file of metadata that was carried by hand.
func readHand(file string) (raw []byte, role string, err error) {
	if raw, err = durable.ReadFile(file, maxTargets); err != nil {
		return nil, "", fmt.Errorf("read what is to be signed: %w", err)
	}
	var head struct {
		Signed struct {
			Type string `json:"_type"`
		} `json:"signed"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, "", fmt.Errorf("%s is no update metadata: %w", file, err)
	}
	if !slices.Contains(Roles, head.Signed.Type) {
		return nil, "", fmt.Errorf("%s is no update metadata: it has the type %q", file, head.Signed.Type)
	}
	return raw, head.Signed.Type, nil
}

func examine[T metadata.Roles](file, previous string, by crypto.PublicKey, role string, raw []byte, empty func(...time.Time) *metadata.Metadata[T],
	head func(*T) (int64, time.Time), changes func(old, m *T) ([]string, error)) (Statement, error) {
	m, err := empty().FromBytes(raw)
	if err != nil {
		return Statement{}, fmt.Errorf("%s: %w", file, err)
	}
	canonical, err := cjson.EncodeCanonical(m.Signed)
	if err != nil {
		return Statement{}, fmt.Errorf("%s: %w", file, err)
	}
	sum, _, _ := digestOf(bytes.NewReader(canonical))
	version, expires := head(&m.Signed)
	st := Statement{Role: role, Version: version, Expires: expires, SHA256: fmt.Sprintf("%x", sum)}
	for _, s := range m.Signatures {
		st.Signed = append(st.Signed, s.KeyID)
	}
	given := previous != ""
	if !given {
		previous = filepath.Join(filepath.Dir(file), previousDir, fmt.Sprintf("%d.%s.json", version-1, role))
	}
	old := empty()
	switch beside, err := durable.ReadFile(previous, maxTargets); {
	case err == nil:
		if old, err = empty().FromBytes(beside); err != nil {
			return st, fmt.Errorf("%s: %w", previous, err)
		}
		if st.Previous = versionOf(old); st.Previous >= version {
			return st, fmt.Errorf("%s is version %d, and cannot be what version %d follows", previous, st.Previous, version)
		}
		if st.PreviousMine, err = isSignedBy(old, role, by); err != nil {
			return st, err
		}
	case given || !errors.Is(err, os.ErrNotExist):
		return st, fmt.Errorf("read the version before: %w", err)
	}
	st.Changes, err = changes(&old.Signed, &m.Signed)
	return st, err
}

// isSignedBy tells whether a key has signed.
func isSignedBy[T metadata.Roles](m *metadata.Metadata[T], role string, by crypto.PublicKey) (bool, error) {
	key, err := tufKey(by)
	if err != nil {
		return false, err
	}
	alone := metadata.Root() // as if no other key mattered
	if err := alone.Signed.AddKey(key, role); err != nil {
		return false, err
	}
	return alone.VerifyDelegate(role, m) == nil, nil
}

func rootChanges(old, m *metadata.RootType) (out []string, err error) {
	before, after := &metadata.Metadata[metadata.RootType]{Signed: *old}, &metadata.Metadata[metadata.RootType]{Signed: *m}
	if err := checkRoot(after); err != nil {
		return nil, fmt.Errorf("do not sign this root, no device would take it: %w", err)
	}
	for _, role := range Roles {
		was, wasThreshold, err := roleKeys(before, role)
		if err != nil && old.Version > 0 {
			return nil, err
		}
		is, threshold, err := roleKeys(after, role)
		if err != nil {
			return nil, err
		}
		for _, id := range is {
			if !slices.Contains(was, id) {
				out = append(out, fmt.Sprintf("key %s may sign %s from now on", id, role))
			}
		}
		for _, id := range was {
			if !slices.Contains(is, id) {
				out = append(out, fmt.Sprintf("key %s may no longer sign %s", id, role))
			}
		}
		if threshold != wasThreshold {
			out = append(out, fmt.Sprintf("%d of the %d keys for %s must sign, before it was %d", threshold, len(is), role, wasThreshold))
		}
	}
	for name, value := range m.UnrecognizedFields {
		if name == logField {
			continue // above
		}
		out = append(out, fmt.Sprintf("a field %q that this command does not know says %q", name, fmt.Sprint(value)))
	}
	return out, nil
}

func targetsChanges(old, m *metadata.TargetsType) (out []string, err error) {
	for _, name := range slices.Sorted(maps.Keys(m.Targets)) {
		t := m.Targets[name]
		sum, err := targetSum(name, t)
		if err != nil {
			return nil, err
		}
		switch was := old.Targets[name]; {
		case was == nil:
			out = append(out, fmt.Sprintf("release %q is added: a manifest of %d bytes, SHA-256 %s", name, t.Length, sum))
		case !was.Equal(*t):
			out = append(out, fmt.Sprintf("release %q has OTHER CONTENT than before: SHA-256 %s, before it was %s; a published version never changes", name, sum, was.Hashes["sha256"]))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(old.Targets)) {
		if m.Targets[name] == nil {
			out = append(out, fmt.Sprintf("release %q is removed", name))
		}
	}
	if m.Delegations != nil {
		out = append(out, "others may sign releases, by delegations that this command does not show")
	}
	return out, nil
}

func metaChanges(meta map[string]*metadata.MetaFiles) (out []string) {
	for _, name := range slices.Sorted(maps.Keys(meta)) {
		if m := meta[name]; m != nil {
			out = append(out, fmt.Sprintf("%q is version %d, %d bytes, SHA-256 %s", name, m.Version, m.Length, m.Hashes["sha256"]))
		}
	}
	return out
}

// mergeHand puts together what several people have signed of one file each.
func mergeHand[T metadata.Roles](files []string, role string) (*metadata.Metadata[T], error) {
	var merged *metadata.Metadata[T]
	var canonical []byte
	for _, file := range files {
		raw, has, err := readHand(file)
		if err != nil {
			return nil, err
		}
		if has != role {
			continue
		}
		m, err := new(metadata.Metadata[T]).FromBytes(raw)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		c, err := cjson.EncodeCanonical(m.Signed)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if merged == nil {
			merged, canonical = m, c
			continue
		}
		if !bytes.Equal(c, canonical) {
			return nil, fmt.Errorf("%s is signed for something else than the other files for %s: sign copies of one file", file, role)
		}
		for _, s := range m.Signatures {
			if !slices.ContainsFunc(merged.Signatures, func(have metadata.Signature) bool { return have.KeyID == s.KeyID }) {
				merged.Signatures = append(merged.Signatures, s)
			}
		}
	}
	if merged != nil {
		slices.SortFunc(merged.Signatures, func(a, b metadata.Signature) int { return cmp.Compare(a.KeyID, b.KeyID) })
	}
	return merged, nil
}

// TakeRoot takes in a root that was signed by hand, as the newest of a folder of
// keys, once both the root before and it itself are content. It signs nothing: what
// came from elsewhere, nobody here has looked at. It tells false if no file is a root.
func TakeRoot(keysDir string, files []string) (bool, error) {
	next, err := mergeHand[metadata.RootType](files, metadata.ROOT)
	if next == nil || err != nil {
		return false, err
	}
	old, err := readRoot(keysDir)
	if err != nil {
		return false, err
	}
	if same, err := sameSigned(old, next); same || err != nil {
		return same, err // taken before, and cut off after that
	}
	return true, adopt(keysDir, old, next)
}

func sameSigned[T metadata.Roles](a, b *metadata.Metadata[T]) (bool, error) {
	x, err := cjson.EncodeCanonical(a.Signed)
	if err != nil {
		return false, err
	}
	y, err := cjson.EncodeCanonical(b.Signed)
	return bytes.Equal(x, y), err
}
