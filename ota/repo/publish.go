package repo

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/bundle"
)

// PublishOptions says what to sign, with what, and where to put it.
type PublishOptions struct {
	Keys   string // directory of [Init]; root keys are not needed
	Repo   string // directory of the repository, made if missing
	Bundle string // directory of [bundle.Build]; empty: only sign again what is there
	Now    time.Time
	Expiry Expiry
}

// Published is what a repository holds after [Publish].
type Published struct {
	Target    string    `json:"target,omitempty"` // name of the release; empty if nothing was added
	Version   int64     `json:"version"`          // of the timestamp metadata
	Expires   time.Time `json:"expires"`          // of the timestamp metadata: publish again before
	Snapshots int64     `json:"snapshots"`        // version of the snapshot metadata
}

// Publish adds a bundle to a repository, or with no bundle only signs it afresh
// so that it does not expire. A version that was published once never changes
// its content. Interrupted at any moment, the repository still is what it was.
func Publish(o PublishOptions) (Published, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	p := &publisher{PublishOptions: o}
	unlock, err := p.lock()
	if err != nil {
		return Published{}, err
	}
	defer unlock()
	if err := p.load(); err != nil {
		return Published{}, err
	}
	name := ""
	if o.Bundle != "" {
		if name, err = p.addBundle(); err != nil {
			return Published{}, err
		}
	}
	if err := p.write(); err != nil {
		return Published{}, err
	}
	ts := p.timestamp.Signed
	return Published{Target: name, Version: ts.Version, Expires: ts.Expires, Snapshots: p.snapshot.Signed.Version}, nil
}

type publisher struct {
	PublishOptions
	root      *metadata.Metadata[metadata.RootType]
	targets   *metadata.Metadata[metadata.TargetsType]
	snapshot  *metadata.Metadata[metadata.SnapshotType]
	timestamp *metadata.Metadata[metadata.TimestampType]
}

func (p *publisher) path(name string) string {
	return filepath.Join(p.Repo, filepath.FromSlash(name))
}

func (p *publisher) lock() (func(), error) {
	for _, d := range []string{"metadata", "targets/bundles", "parts"} {
		if err := os.MkdirAll(p.path(d), 0o755); err != nil {
			return nil, fmt.Errorf("make the repository: %w", err)
		}
	}
	f, err := os.OpenFile(p.path(".lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the repository: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("somebody else is publishing into %s; try again when they are done", p.Repo)
	}
	return func() { f.Close() }, nil
}

// load reads what the repository says now, from its timestamp down, so that
// files of an interrupted publication do not count.
func (p *publisher) load() error {
	raw, err := Root(p.Keys)
	if err != nil {
		return err
	}
	if p.root, err = metadata.Root().FromBytes(raw); err != nil {
		return fmt.Errorf("%s: %w", rootFile, err)
	}
	if p.root.Signed.IsExpired(p.Now) {
		return fmt.Errorf("the root expired on %s; no device would accept a release: sign a new root first", p.root.Signed.Expires.Format(time.DateOnly))
	}
	p.targets, p.snapshot, p.timestamp = metadata.Targets(), metadata.Snapshot(), metadata.Timestamp()
	p.targets.Signed.Version, p.snapshot.Signed.Version, p.timestamp.Signed.Version = 0, 0, 0
	if _, err := os.Stat(p.path(metadataPath(metadata.TIMESTAMP, 0))); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if p.timestamp, err = loadRole[metadata.TimestampType](p, metadata.TIMESTAMP, 0); err != nil {
		return err
	}
	if p.snapshot, err = loadRole[metadata.SnapshotType](p, metadata.SNAPSHOT, versionIn(p.timestamp.Signed.Meta, metadata.SNAPSHOT)); err != nil {
		return err
	}
	p.targets, err = loadRole[metadata.TargetsType](p, metadata.TARGETS, versionIn(p.snapshot.Signed.Meta, metadata.TARGETS))
	return err
}

func versionIn(meta map[string]*metadata.MetaFiles, role string) int64 {
	if m := meta[role+".json"]; m != nil {
		return m.Version
	}
	return 0
}

func loadRole[T metadata.Roles](p *publisher, role string, version int64) (*metadata.Metadata[T], error) {
	path := p.path(metadataPath(role, version))
	m, err := new(metadata.Metadata[T]).FromFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := p.root.VerifyDelegate(role, m); err != nil {
		return nil, fmt.Errorf("%s is not signed by the keys in %s; use the keys of this repository, or a new directory: %w", path, p.Keys, err)
	}
	return m, nil
}

// addBundle copies parts and manifest and names the manifest in the targets.
func (p *publisher) addBundle() (string, error) {
	m, raw, err := bundle.Open(p.Bundle)
	if err != nil {
		return "", err
	}
	name := TargetName(m.Version)
	target, err := metadata.TargetFile().FromBytes(name, raw, "sha256")
	if err != nil {
		return "", err
	}
	if old, ok := p.targets.Signed.Targets[name]; ok && !old.Equal(*target) {
		return "", fmt.Errorf("version %s is published already with other content; a version never changes: build it under a new one", m.Version)
	}
	for _, part := range m.Parts {
		for _, form := range part.Forms {
			if err := p.addPart(part, form); err != nil {
				return "", err
			}
		}
	}
	if err := durable.WriteFile(p.path(targetPath(name, target.Hashes["sha256"].String())), raw, 0o644); err != nil {
		return "", fmt.Errorf("write the manifest: %w", err)
	}
	p.targets.Signed.Targets[name] = target
	return name, nil
}

// addPart copies a packed part, which must be what the manifest says.
func (p *publisher) addPart(part bundle.Part, form bundle.Form) error {
	from := filepath.Join(p.Bundle, filepath.FromSlash(bundle.PartPath(form.SHA256)))
	size, sum, err := digestFile(from)
	if err != nil {
		return fmt.Errorf("the bundle lacks a part: %w", err)
	}
	if size != form.Size || sum != form.SHA256 {
		return fmt.Errorf("part %s for %s is not what the manifest says; build the bundle again", part.Name, part.Platform)
	}
	return durable.CopyFile(p.path(bundle.PartPath(form.SHA256)), from, 0o644)
}

// write signs everything afresh, the next version each, timestamp last.
func (p *publisher) write() error {
	e := p.Expiry.orDefault()
	now := p.Now.UTC().Truncate(time.Second)
	p.targets.Signed.Version++
	p.targets.Signed.Expires = now.Add(e.Targets)
	info, err := writeRole(p, p.targets, metadata.TARGETS, p.targets.Signed.Version)
	if err != nil {
		return err
	}
	p.snapshot.Signed.Version++
	p.snapshot.Signed.Expires = now.Add(e.Snapshot)
	p.snapshot.Signed.Meta = map[string]*metadata.MetaFiles{"targets.json": info}
	if info, err = writeRole(p, p.snapshot, metadata.SNAPSHOT, p.snapshot.Signed.Version); err != nil {
		return err
	}
	root, err := Root(p.Keys)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(p.path(metadataPath(metadata.ROOT, p.root.Signed.Version)), root, 0o644); err != nil {
		return err
	}
	p.timestamp.Signed.Version++
	p.timestamp.Signed.Expires = now.Add(e.Timestamp)
	p.timestamp.Signed.Meta = map[string]*metadata.MetaFiles{"snapshot.json": info}
	_, err = writeRole(p, p.timestamp, metadata.TIMESTAMP, p.timestamp.Signed.Version)
	return err
}

func writeRole[T metadata.Roles](p *publisher, m *metadata.Metadata[T], role string, version int64) (*metadata.MetaFiles, error) {
	key, err := loadKey(filepath.Join(p.Keys, role+".pem"))
	if err != nil {
		return nil, err
	}
	m.ClearSignatures()
	if err := sign(m, key); err != nil {
		return nil, fmt.Errorf("sign %s: %w", role, err)
	}
	if err := p.root.VerifyDelegate(role, m); err != nil {
		return nil, fmt.Errorf("%s.pem in %s is not the key that the root names: %w", role, p.Keys, err)
	}
	raw, err := m.ToBytes(false)
	if err != nil {
		return nil, err
	}
	if err := durable.WriteFile(p.path(metadataPath(role, version)), raw, 0o644); err != nil {
		return nil, fmt.Errorf("write %s: %w", role, err)
	}
	return fileInfo(raw, version), nil
}

func fileInfo(raw []byte, version int64) *metadata.MetaFiles {
	sum, n, _ := digestOf(bytes.NewReader(raw))
	return &metadata.MetaFiles{Version: version, Length: n, Hashes: metadata.Hashes{"sha256": sum}}
}
