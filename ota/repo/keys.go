package repo

import (
	"crypto"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/deimos-edge/deimos/internal/durable"
)

const day = 24 * time.Hour

// Expiry is how long each role's signature is good for.
type Expiry struct {
	Root, Targets, Snapshot, Timestamp time.Duration
}

// DefaultExpiry suits a fleet whose manager signs by hand about once a month.
var DefaultExpiry = Expiry{Root: 730 * day, Targets: 365 * day, Snapshot: 90 * day, Timestamp: 45 * day}

func (e Expiry) orDefault() Expiry {
	d := DefaultExpiry
	for _, f := range []struct{ have, def *time.Duration }{
		{&e.Root, &d.Root}, {&e.Targets, &d.Targets}, {&e.Snapshot, &d.Snapshot}, {&e.Timestamp, &d.Timestamp},
	} {
		if *f.have == 0 {
			*f.have = *f.def
		}
	}
	return e
}

// InitOptions describes a new set of keys. Zero values mean the defaults.
type InitOptions struct {
	RootKeys   int // 3
	Threshold  int // of root, 2 at least; 2
	Now        time.Time
	Expiry     Expiry
	Passphrase []byte // of every key file; empty: none
}

// rootFile is the newest signed root; it is public.
const rootFile = "root.json"

// LogRole is what the key of the transparency log is for. It is no role of TUF:
// the root names the key in a field of its own.
const LogRole = "log"

// Roles are what keys are for.
var Roles = []string{metadata.ROOT, metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP, LogRole}

// Init makes all keys of a new fleet in dir: root-1.pem and on, targets.pem,
// snapshot.pem, timestamp.pem, log.pem (Ed25519, PKCS #8, mode 0600), and
// root.json, which they sign. It never overwrites anything.
func Init(dir string, o InitOptions) error {
	if o.RootKeys == 0 {
		o.RootKeys = 3
	}
	if o.Threshold == 0 {
		o.Threshold = 2
	}
	if o.Threshold < 2 || o.RootKeys < o.Threshold {
		return fmt.Errorf("%d root keys of which %d sign: at least two must sign, so that one stolen key is not enough", o.RootKeys, o.Threshold)
	}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory for the keys: %w", err)
	}
	if entries, err := os.ReadDir(dir); err != nil {
		return err
	} else if len(entries) > 0 {
		return fmt.Errorf("%s is not empty; keys are never overwritten: choose a new directory", dir)
	}
	root, err := newKeys(dir, o)
	if err != nil {
		return err
	}
	raw, err := root.ToBytes(true)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, rootFile), raw, 0o644)
}

// newKeys makes the key files and the root that all root keys have signed.
func newKeys(dir string, o InitOptions) (*metadata.Metadata[metadata.RootType], error) {
	root := metadata.Root(o.Now.UTC().Truncate(time.Second).Add(o.Expiry.orDefault().Root))
	var rootKeys []crypto.Signer
	add := func(file, role string) error {
		priv, err := newKey(filepath.Join(dir, file), o.Passphrase)
		if err != nil {
			return err
		}
		if role == metadata.ROOT {
			rootKeys = append(rootKeys, priv)
		}
		return addKey(root, role, priv.Public())
	}
	for i := 1; i <= o.RootKeys; i++ {
		if err := add(fmt.Sprintf("root-%d.pem", i), metadata.ROOT); err != nil {
			return nil, err
		}
	}
	for _, role := range Roles[1:] {
		if err := add(role+".pem", role); err != nil {
			return nil, err
		}
	}
	root.Signed.Roles[metadata.ROOT].Threshold = o.Threshold
	for _, k := range rootKeys {
		if err := sign(root, k); err != nil {
			return nil, err
		}
	}
	return root, nil
}

// addKey lets a root name a key. A log has one, which takes the place of another.
func addKey(root *metadata.Metadata[metadata.RootType], role string, public crypto.PublicKey) error {
	if role != LogRole {
		key, err := tufKey(public)
		if err != nil {
			return err
		}
		return root.Signed.AddKey(key, role)
	}
	name, err := newLogName(public)
	if err != nil {
		return err
	}
	switch old, err := logKey(root); {
	case err != nil:
		return err
	case old != nil:
		name = old.Name()
	}
	text, err := logVerifierKey(name, public)
	if err == nil {
		setLogKey(root, text)
	}
	return err
}

// roleKeys are the ids of a role's keys, and how many of them must sign.
func roleKeys(root *metadata.Metadata[metadata.RootType], role string) (ids []string, threshold int, err error) {
	if role != LogRole {
		r := root.Signed.Roles[role]
		if r == nil {
			return nil, 0, fmt.Errorf("the root has no role %q", role)
		}
		return r.KeyIDs, r.Threshold, nil
	}
	text, err := logKeyText(root)
	if text == "" || err != nil {
		return nil, 0, err
	}
	id, err := logKeyID(text)
	return []string{id}, 1, err
}

// Root returns the newest signed root of a directory of keys: what a device
// needs to trust.
func Root(keysDir string) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(keysDir, rootFile))
	if err != nil {
		return nil, fmt.Errorf("there is no update root in %s: %w", keysDir, err)
	}
	return raw, nil
}

// FirstRoot returns the oldest signed root that a directory of keys has.
func FirstRoot(keysDir string) ([]byte, error) {
	newest, err := readRoot(keysDir)
	if err != nil {
		return nil, err
	}
	for v := int64(1); v < newest.Signed.Version; v++ {
		raw, err := os.ReadFile(filepath.Join(keysDir, rootName(v)))
		if !errors.Is(err, os.ErrNotExist) {
			return raw, err
		}
	}
	return Root(keysDir)
}

// rootName is an earlier root in a directory of keys.
func rootName(version int64) string { return fmt.Sprintf("%d.%s", version, rootFile) }

func readRoot(keysDir string) (*metadata.Metadata[metadata.RootType], error) {
	raw, err := Root(keysDir)
	if err != nil {
		return nil, err
	}
	root, err := metadata.Root().FromBytes(raw)
	if err == nil {
		err = checkRoot(root)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(keysDir, rootFile), err)
	}
	return root, nil
}

// KeyInfo is a key as people see it.
type KeyInfo struct {
	ID   string `json:"id"`
	Role string `json:"role"`
	File string `json:"file,omitempty"` // empty: it is not at hand
}

// RootInfo is a root as people see it.
type RootInfo struct {
	Version    int64          `json:"version"`
	Expires    time.Time      `json:"expires"`
	Thresholds map[string]int `json:"thresholds"` // by role: how many keys must sign
	Keys       []KeyInfo      `json:"keys"`
	Log        string         `json:"log,omitempty"` // its verifier key; empty: no log is kept
}

// Show tells who may sign what, and which of the keys a desk has. It opens none.
func Show(d Desk) (RootInfo, error) {
	root, err := readRoot(d.Keys)
	if err != nil {
		return RootInfo{}, err
	}
	ring, err := d.keyring()
	if err != nil {
		return RootInfo{}, err
	}
	info := RootInfo{Version: root.Signed.Version, Expires: root.Signed.Expires, Thresholds: map[string]int{}}
	if info.Log, err = logKeyText(root); err != nil {
		return info, err
	}
	for _, role := range Roles {
		ids, threshold, err := roleKeys(root, role)
		if err != nil {
			return info, err
		}
		if threshold > 0 {
			info.Thresholds[role] = threshold
		}
		for _, id := range ids {
			k := KeyInfo{ID: id, Role: role}
			if have := ring[id]; have != nil {
				k.File = have.where
			}
			info.Keys = append(info.Keys, k)
		}
	}
	return info, nil
}

// ChangeOptions says how a root is changed.
type ChangeOptions struct {
	Desk
	Now    time.Time
	Expiry Expiry
	// Unsigned is a folder for a root that too few keys at hand can sign: the
	// others sign it with [Sign], and [TakeRoot] takes it in. Empty: that is an error.
	Unsigned string
}

// Rotation gives a role other keys.
type Rotation struct {
	Role       string
	Keys       []crypto.PublicKey // all that it has from now on; empty: as many new ones as it has, made in the folder
	Threshold  int                // how many must sign; 0: as many as now
	Passphrase []byte             // of key files that are made; empty: none
}

// RootChange is what came of changing a root.
type RootChange struct {
	Version int64     `json:"version"`
	Expires time.Time `json:"expires"`
	Made    []string  `json:"made,omitempty"`   // key files
	Awaits  string    `json:"awaits,omitempty"` // the file that needs more signatures; empty: the root is signed
	Missing string    `json:"missing,omitempty"`
}

// Rotate signs the next root, which gives a role other keys. Devices follow it
// with the next [Publish].
func Rotate(o ChangeOptions, r Rotation) (RootChange, error) {
	if !slices.Contains(Roles, r.Role) {
		return RootChange{}, fmt.Errorf("there is no role %q: it is one of %v", r.Role, Roles)
	}
	var made []string
	c, err := o.change(func(root *metadata.Metadata[metadata.RootType]) error {
		old, threshold, err := roleKeys(root, r.Role)
		if err != nil {
			return err
		}
		keys := r.Keys
		for range max(len(old), 1) {
			if len(r.Keys) > 0 {
				break
			}
			public, file, err := o.make(r)
			if err != nil {
				return err
			}
			keys, made = append(keys, public), append(made, file)
		}
		if r.Threshold > 0 {
			threshold = r.Threshold
		}
		return setRole(root, r.Role, keys, max(threshold, 1))
	})
	c.Made = made
	return c, err
}

// make is a new key for a role, in a file that has its name.
func (o ChangeOptions) make(r Rotation) (crypto.PublicKey, string, error) {
	for n := 2; ; n++ {
		file := filepath.Join(o.Keys, fmt.Sprintf("%s-%d.pem", r.Role, n))
		priv, err := newKey(file, r.Passphrase)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, "", err
		}
		return priv.Public(), file, nil
	}
}

// setRole gives a role these keys and no others.
func setRole(root *metadata.Metadata[metadata.RootType], role string, keys []crypto.PublicKey, threshold int) error {
	if role == LogRole {
		if len(keys) != 1 || threshold != 1 {
			return errors.New("the log has one key")
		}
		return addKey(root, role, keys[0])
	}
	for _, id := range slices.Clone(root.Signed.Roles[role].KeyIDs) {
		if err := root.Signed.RevokeKey(id, role); err != nil {
			return err
		}
	}
	for _, public := range keys {
		if err := addKey(root, role, public); err != nil {
			return err
		}
	}
	root.Signed.Roles[role].Threshold = threshold
	return nil
}

// Revoke signs the next root, which does not name a key any more. id may be
// shortened to what no other key begins with.
func Revoke(o ChangeOptions, id string) (RootChange, error) {
	return o.change(func(root *metadata.Metadata[metadata.RootType]) error {
		found, role, err := findKey(root, id)
		if err != nil {
			return err
		}
		ids, threshold, err := roleKeys(root, role)
		if err != nil {
			return err
		}
		if len(ids) <= threshold {
			return fmt.Errorf("without key %s, %d of the %d keys that must sign for %s are left: give it others first, with \"deimos release keys rotate --role %s\"",
				short(found), len(ids)-1, threshold, role, role)
		}
		return root.Signed.RevokeKey(found, role)
	})
}

func findKey(root *metadata.Metadata[metadata.RootType], id string) (found, role string, err error) {
	for _, r := range Roles {
		ids, _, err := roleKeys(root, r)
		if err != nil {
			return "", "", err
		}
		for _, have := range ids {
			if id == "" || len(have) < len(id) || have[:len(id)] != id {
				continue
			}
			if found != "" && found != have {
				return "", "", fmt.Errorf("more than one key begins with %s: %s and %s", id, short(found), short(have))
			}
			found, role = have, r
		}
	}
	if found == "" {
		return "", "", fmt.Errorf("the root names no key %q; \"deimos release keys show\" lists them", id)
	}
	return found, role, nil
}

// PublicKey is the public half of a key that the newest root names, by its id or
// the beginning of it. Keys of the log have none here.
func PublicKey(keysDir, id string) (crypto.PublicKey, error) {
	root, err := readRoot(keysDir)
	if err != nil {
		return nil, err
	}
	found, _, err := findKey(root, id)
	if err != nil {
		return nil, err
	}
	k := root.Signed.Keys[found]
	if k == nil {
		return nil, fmt.Errorf("key %s is the log's, and signs nothing else", short(found))
	}
	return k.ToPublicKey()
}

// Renew signs the next root, which differs from the last by its expiry alone.
func Renew(o ChangeOptions) (RootChange, error) {
	return o.change(func(*metadata.Metadata[metadata.RootType]) error { return nil })
}

// change makes the next root, and takes it if enough keys at hand can sign it.
func (o ChangeOptions) change(edit func(*metadata.Metadata[metadata.RootType]) error) (RootChange, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	old, err := readRoot(o.Keys)
	if err != nil {
		return RootChange{}, err
	}
	next, err := readRoot(o.Keys)
	if err != nil {
		return RootChange{}, err
	}
	if err := edit(next); err != nil {
		return RootChange{}, err
	}
	next.Signed.Version++
	next.Signed.Expires = o.Now.UTC().Truncate(time.Second).Add(o.Expiry.orDefault().Root)
	next.ClearSignatures()
	if err := checkSigners(next); err != nil {
		return RootChange{}, err
	}
	c := RootChange{Version: next.Signed.Version, Expires: next.Signed.Expires}
	missing, err := o.signRoot(old, next)
	switch {
	case err != nil:
		return c, err
	case missing == "":
		return c, adopt(o.Keys, old, next)
	case o.Unsigned == "":
		return c, fmt.Errorf("root %d: %s; write it for them with --unsigned DIR", next.Signed.Version, missing)
	}
	c.Missing = missing
	c.Awaits, err = writeUnsigned(o.Unsigned, metadata.ROOT, old, next)
	return c, err
}

// checkSigners asks of a root that it can be used at all.
func checkSigners(root *metadata.Metadata[metadata.RootType]) error {
	if err := checkRoot(root); err != nil {
		return fmt.Errorf("such a root no device would take: %w", err)
	}
	of := map[string]string{}
	for _, role := range Roles {
		ids, threshold, err := roleKeys(root, role)
		if err != nil {
			return err
		}
		if len(ids) < threshold {
			return fmt.Errorf("%d keys for %s, of which %d must sign", len(ids), role, threshold)
		}
		for _, id := range ids {
			if other, ok := of[id]; ok {
				return fmt.Errorf("key %s would be for %s and for %s: a thief of it would have both", short(id), other, role)
			}
			of[id] = role
		}
	}
	return nil
}

// signRoot signs with keys at hand until both the old root and the new one are
// content, and tells in words who is missing.
func (d Desk) signRoot(old, next *metadata.Metadata[metadata.RootType]) (missing string, err error) {
	ring, err := d.keyring()
	if err != nil {
		return "", err
	}
	for _, by := range []*metadata.Metadata[metadata.RootType]{old, next} {
		if err := signUntil(next, metadata.ROOT, by, ring); err != nil {
			return "", err
		}
	}
	for _, by := range []*metadata.Metadata[metadata.RootType]{old, next} {
		if lacks := lacking(next, metadata.ROOT, by); lacks != "" {
			return lacks, nil
		}
	}
	return "", nil
}

// signUntil adds signatures of keys at hand until by is content with m, or there
// are no more of them.
func signUntil[T metadata.Roles](m *metadata.Metadata[T], role string, by *metadata.Metadata[metadata.RootType], ring keyring) error {
	ids, _, err := roleKeys(by, role)
	if err != nil {
		return err
	}
	for _, k := range ring.of(ids) {
		if by.VerifyDelegate(role, m) == nil {
			return nil
		}
		if slices.ContainsFunc(m.Signatures, func(s metadata.Signature) bool { return s.KeyID == k.id }) {
			continue
		}
		s, err := k.open()
		if err != nil {
			return err
		}
		if err := sign(m, s); err != nil {
			return fmt.Errorf("sign %s with %s: %w", role, k.where, err)
		}
	}
	return nil
}

// lacking tells in words whose signatures by still wants; "" if it is content.
func lacking[T metadata.Roles](m *metadata.Metadata[T], role string, by *metadata.Metadata[metadata.RootType]) string {
	err := by.VerifyDelegate(role, m)
	if err == nil {
		return ""
	}
	ids, threshold, _ := roleKeys(by, role)
	var open []string
	for _, id := range ids {
		if !slices.ContainsFunc(m.Signatures, func(s metadata.Signature) bool { return s.KeyID == id }) {
			open = append(open, id)
		}
	}
	return fmt.Sprintf("%d of the %d signatures that root %d asks for are there; keys that can sign: %s", len(ids)-len(open), threshold, by.Signed.Version, shortAll(open))
}

// adopt makes a root the newest of a directory of keys. The one before is kept,
// as devices go from one to the next.
func adopt(keysDir string, old, next *metadata.Metadata[metadata.RootType]) error {
	if next.Signed.Version != old.Signed.Version+1 {
		return fmt.Errorf("root %d does not follow root %d, which is the newest in %s", next.Signed.Version, old.Signed.Version, keysDir)
	}
	for _, by := range []*metadata.Metadata[metadata.RootType]{old, next} {
		if lacks := lacking(next, metadata.ROOT, by); lacks != "" {
			return fmt.Errorf("root %d: %s", next.Signed.Version, lacks)
		}
	}
	if err := checkSigners(next); err != nil {
		return err
	}
	before, err := Root(keysDir)
	if err != nil {
		return err
	}
	raw, err := next.ToBytes(true)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(keysDir, rootName(old.Signed.Version)), before, 0o644); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(keysDir, rootFile), raw, 0o644)
}
