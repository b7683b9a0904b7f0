package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"
	"golang.org/x/mod/sumdb/note"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/bundle"
)

// ErrNoRoot is returned by [NewClient] on a device that has no root to trust.
var ErrNoRoot = errors.New("this device has no update root to trust; the fleet manager makes one with \"deimos release keys\", and the device gets it when it enrols")

// ClientOptions is what a [Client] needs.
type ClientOptions struct {
	Dir    string // where trusted metadata is kept
	Root   []byte // the root that the device enrolled with
	Source Source
	Limits Limits
	// Local says that the source is at hand, as a stick is: what cannot be read of it is
	// not asked for again, as waiting does not make it whole.
	Local bool
	Log   *slog.Logger
}

// Client reads one repository for one device. It is not safe for concurrent use.
type Client struct {
	o       ClientOptions
	trusted *trustedmetadata.TrustedMetadata // nil before Refresh
	now     time.Time
	logKeys []note.Verifier // of the logs that the roots on the way here have named
	proof   LogProof        // of the last manifest
}

// NewClient pins the root at the first use of Dir; a different one is refused
// later, because only its own keys may replace a root.
func NewClient(o ClientOptions) (*Client, error) {
	if len(o.Root) == 0 {
		return nil, ErrNoRoot
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Limits = o.Limits.orDefault()
	c := &Client{o: o}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("keep update metadata: %w", err)
	}
	return c, c.pin()
}

// enrolledFile is the root of the enrolment.
const enrolledFile = "enrolled.root.json"

// Leave durably removes the metadata in dir if it is trusted for another root than this.
func Leave(dir string, root []byte) error {
	pinned, err := os.ReadFile(filepath.Join(dir, enrolledFile))
	if errors.Is(err, os.ErrNotExist) || err == nil && bytes.Equal(pinned, root) {
		return nil
	}
	// The pinned root goes last: what a cut leaves is then still found to be another's.
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Name() != enrolledFile {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err == nil {
		err = durable.Sync(dir)
	}
	if err == nil {
		err = os.Remove(filepath.Join(dir, enrolledFile))
	}
	if err == nil {
		err = durable.Sync(dir)
	}
	if err != nil {
		return fmt.Errorf("the update metadata of the fleet before cannot be removed from %s: %w", dir, err)
	}
	return nil
}

func (c *Client) pin() error {
	pinned, err := os.ReadFile(c.local(enrolledFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err == nil && bytes.Equal(pinned, c.o.Root) {
		return nil
	}
	mine, err2 := c.startFrom(c.o.Root)
	if err2 != nil {
		return err2
	}
	if err == nil {
		kept, damaged := c.startFrom(pinned)
		if damaged == nil {
			same, err := sameSigned(kept.Root, mine.Root)
			if err != nil {
				return err
			}
			if !same {
				return &Error{Condition: OtherRoot, File: rootFile,
					Reason: fmt.Sprintf("the device enrolled with another update root; if it really changed fleets, remove %s", c.o.Dir)}
			}
		}
		c.o.Log.Warn("the root that was kept at the enrolment is damaged; it is taken anew from the membership", "reason", damaged)
	}
	return durable.WriteFile(c.local(enrolledFile), c.o.Root, 0o644)
}

// startFrom begins with a root that needs no other to vouch for it.
func (c *Client) startFrom(raw []byte) (*trustedmetadata.TrustedMetadata, error) {
	var t *trustedmetadata.TrustedMetadata
	err := guarded(func() (err error) {
		t, err = trustedmetadata.New(raw)
		return err
	})
	if err == nil {
		err = checkRoot(t.Root)
	}
	if err != nil {
		return nil, explain(rootFile, err, c.now)
	}
	return t, nil
}

// checkRoot asks more than TUF: two keys for a new root, consistent snapshots, of each
// key that its id is its own, and of a log that it names a key that can be read.
func checkRoot(root *metadata.Metadata[metadata.RootType]) error {
	if r := root.Signed.Roles[metadata.ROOT]; r == nil || r.Threshold < 2 {
		return errors.New("one key alone may replace it, at least two must be needed")
	}
	if !root.Signed.ConsistentSnapshot {
		return errors.New("it does not use consistent snapshots")
	}
	// Whoever looks at a root before signing it compares ids: a key under another's id
	// would take its place unseen, and go-tuf does not look.
	for id, key := range root.Signed.Keys {
		if key == nil {
			return fmt.Errorf("key %q is empty", short(id))
		}
		switch own, err := key.ID(); {
		case err != nil:
			return fmt.Errorf("key %q: %w", short(id), err)
		case own != id:
			return fmt.Errorf("what it has as key %q is another key, %s: somebody has put their own in its place; find out who had this file before you", short(id), short(own))
		}
	}
	_, err := logKey(root)
	return err
}

// guarded calls into go-tuf, which dereferences what a hostile, well-signed file
// may lack. A stolen timestamp key must not be able to crash the fleet.
func guarded(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("it lacks something that every such file has: %v", r)
		}
	}()
	return f()
}

func (c *Client) local(name string) string { return filepath.Join(c.o.Dir, name) }

// Refresh brings the metadata up to date. now is the time as the device best
// knows it; what expired before that is refused. Errors are of type [*Error]
// unless ctx ended or the disk failed.
func (c *Client) Refresh(ctx context.Context, now time.Time) error {
	c.trusted, c.now, c.proof, c.logKeys = nil, now, LogProof{}, nil
	t, err := c.loadRoot()
	if err != nil {
		return err
	}
	c.noteLog(t.Root)
	t.RefTime = now
	if err := c.followRoots(ctx, t); err != nil {
		return err
	}
	if err := c.refreshTimestamp(ctx, t); err != nil {
		return err
	}
	if err := c.refreshSnapshot(ctx, t); err != nil {
		return err
	}
	if err := c.refreshTargets(ctx, t); err != nil {
		return err
	}
	c.trusted = t
	return nil
}

// loadRoot starts from the newest root seen, or, if that is damaged, from the
// one of the enrolment: the chain leads to the same place.
func (c *Client) loadRoot() (*trustedmetadata.TrustedMetadata, error) {
	raw, err := os.ReadFile(c.local(rootFile))
	if err == nil {
		t, err := c.startFrom(raw)
		if err == nil {
			return t, nil
		}
		c.o.Log.Warn("the stored update root is damaged; starting from the enrolled one", "reason", err)
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return c.startFrom(c.o.Root)
}

func (c *Client) followRoots(ctx context.Context, t *trustedmetadata.TrustedMetadata) error {
	for range maxRotations {
		file := metadataPath(metadata.ROOT, t.Root.Signed.Version+1)
		raw, err := c.fetch(ctx, file, MaxRoot)
		if conditionOf(err) == Missing {
			return nil // this is the newest
		}
		if err != nil {
			return err
		}
		err = guarded(func() error {
			root, err := t.UpdateRoot(raw)
			if err != nil {
				return err
			}
			return checkRoot(root)
		})
		if err != nil {
			return explain(file, err, c.now)
		}
		if err := c.keep(rootFile, raw); err != nil {
			return err
		}
		c.noteLog(t.Root)
	}
	return &Error{Condition: Malformed, File: rootFile, Reason: fmt.Sprintf("more than %d new roots at once", maxRotations)}
}

// noteLog remembers the key of the log that a trusted root names.
func (c *Client) noteLog(root *metadata.Metadata[metadata.RootType]) {
	if v, err := logKey(root); err == nil && v != nil {
		c.logKeys = append(c.logKeys, v)
	}
}

func (c *Client) refreshTimestamp(ctx context.Context, t *trustedmetadata.TrustedMetadata) error {
	const name = "timestamp.json"
	file := metadataPath(metadata.TIMESTAMP, 0)
	// The stored one protects against older ones, even if it has expired itself.
	if raw, err := os.ReadFile(c.local(name)); err == nil {
		err := guarded(func() error { _, err := t.UpdateTimestamp(raw); return err })
		if err != nil && !errors.Is(err, &metadata.ErrExpiredMetadata{}) {
			c.o.Log.Warn("the stored timestamp is not used", "reason", explain(file, err, c.now))
		}
	}
	raw, err := c.fetch(ctx, file, maxTimestamp)
	if err != nil {
		return err
	}
	err = guarded(func() error {
		if _, err := t.UpdateTimestamp(raw); err != nil {
			return err
		}
		if t.Timestamp.Signed.Meta["snapshot.json"] == nil {
			return errors.New("it names no snapshot")
		}
		return nil
	})
	if errors.Is(err, &metadata.ErrEqualVersionNumber{}) {
		return nil // nothing new; its expiry is checked with the snapshot
	}
	if err != nil {
		return explain(file, err, c.now)
	}
	return c.keep(name, raw)
}

func (c *Client) refreshSnapshot(ctx context.Context, t *trustedmetadata.TrustedMetadata) error {
	const name = "snapshot.json"
	meta := t.Timestamp.Signed.Meta[name]
	update := func(raw []byte, trusted bool) error {
		return guarded(func() error { _, err := t.UpdateSnapshot(raw, trusted); return err })
	}
	if raw, err := os.ReadFile(c.local(name)); err == nil && update(raw, true) == nil {
		return nil
	}
	file := metadataPath(metadata.SNAPSHOT, meta.Version)
	raw, err := c.fetch(ctx, file, signedLength(meta, maxSnapshot))
	if err != nil {
		return err
	}
	if err := update(raw, false); err != nil {
		return explain(file, err, c.now)
	}
	return c.keep(name, raw)
}

func (c *Client) refreshTargets(ctx context.Context, t *trustedmetadata.TrustedMetadata) error {
	const name = "targets.json"
	meta := t.Snapshot.Signed.Meta[name]
	if meta == nil {
		return &Error{Condition: Malformed, File: metadataPath(metadata.SNAPSHOT, t.Snapshot.Signed.Version), Reason: "it names no targets"}
	}
	update := func(raw []byte) error {
		return guarded(func() error { _, err := t.UpdateTargets(raw); return err })
	}
	if raw, err := os.ReadFile(c.local(name)); err == nil && update(raw) == nil {
		return nil
	}
	file := metadataPath(metadata.TARGETS, meta.Version)
	raw, err := c.fetch(ctx, file, signedLength(meta, maxTargets))
	if err != nil {
		return err
	}
	if err := update(raw); err != nil {
		return explain(file, err, c.now)
	}
	return c.keep(name, raw)
}

func signedLength(meta *metadata.MetaFiles, most int64) int64 {
	if meta.Length > 0 {
		return min(meta.Length, most)
	}
	return most
}

func (c *Client) keep(name string, raw []byte) error {
	if err := durable.WriteFile(c.local(name), raw, 0o644); err != nil {
		return fmt.Errorf("keep update metadata: %w", err)
	}
	return nil
}

// Targets are the names of all targets, after [Client.Refresh].
func (c *Client) Targets() []string {
	if c.trusted == nil {
		return nil
	}
	var names []string
	for name := range c.trusted.Targets[metadata.TARGETS].Signed.Targets {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Manifest fetches and checks the manifest of a release, after [Client.Refresh],
// and that the transparency log has it, if the root names one; [Client.Log] tells.
func (c *Client) Manifest(ctx context.Context, name string) (bundle.Manifest, error) {
	if c.trusted == nil {
		return bundle.Manifest{}, errors.New("the update metadata has not been refreshed")
	}
	target := c.trusted.Targets[metadata.TARGETS].Signed.Targets[name]
	if target == nil {
		return bundle.Manifest{}, &Error{Condition: Missing, File: name, Reason: "the signed metadata names no such release"}
	}
	sum, err := targetSum(name, target)
	if err != nil {
		return bundle.Manifest{}, err
	}
	file := targetPath(name, sum)
	if target.Length <= 0 || target.Length > bundle.MaxManifest {
		return bundle.Manifest{}, &Error{Condition: Size, File: file, Reason: fmt.Sprintf("a manifest of %d bytes is not allowed", target.Length)}
	}
	raw, err := c.fetch(ctx, file, target.Length)
	if err != nil {
		return bundle.Manifest{}, err
	}
	if err := target.VerifyLengthHashes(raw); err != nil {
		return bundle.Manifest{}, explain(file, err, c.now)
	}
	m, err := bundle.Parse(raw)
	if err != nil {
		return m, &Error{Condition: Malformed, File: name, Reason: err.Error(), Err: err}
	}
	if TargetName(m.Version) != name {
		return m, &Error{Condition: Malformed, File: name, Reason: "it says that it is version " + strings.TrimSpace(m.Version)}
	}
	return m, c.checkLog(ctx, name, sum)
}

// Signed is how the metadata stands behind a target.
type Signed struct {
	SHA256  string    // of the manifest, lower-case hex
	Root    int64     // version of the root that leads there
	Expires time.Time // of the timestamp metadata
}

// Signed tells how the metadata stands behind a target, after [Client.Manifest].
func (c *Client) Signed(name string) Signed {
	return Signed{
		SHA256:  c.trusted.Targets[metadata.TARGETS].Signed.Targets[name].Hashes["sha256"].String(),
		Root:    c.trusted.Root.Signed.Version,
		Expires: c.trusted.Timestamp.Signed.Expires,
	}
}

// Attachment fetches what is attached to a release, and checks that it is what the
// manifest says.
func (c *Client) Attachment(ctx context.Context, a bundle.Attachment) ([]byte, error) {
	file := bundle.PartPath(a.SHA256)
	raw, err := c.fetch(ctx, file, a.Size)
	if err != nil {
		return nil, err
	}
	if err := a.Check(raw); err != nil {
		return nil, &Error{Condition: Digest, File: file, Reason: err.Error(), Err: err}
	}
	return raw, nil
}

// targetSum is the signed SHA-256 of a target. A target that is signed by another
// digest alone would not be bound to what the log has.
func targetSum(name string, t *metadata.TargetFiles) (string, error) {
	sum := t.Hashes["sha256"].String()
	if len(sum) != 2*sha256.Size {
		return "", &Error{Condition: Malformed, File: name, Reason: "it is signed without a SHA-256"}
	}
	return sum, nil
}
