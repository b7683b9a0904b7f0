package repo

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
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

	Signers    []crypto.Signer                   // see [Desk]
	Passphrase func(file string) ([]byte, error) // see [Desk]
	Unsigned   string                            // folder for metadata that too few keys at hand can sign; empty: that is an error
	Signed     []string                          // files of metadata that were signed by hand, roots among them
}

// Published is what a repository holds after [Publish].
type Published struct {
	Target    string    `json:"target,omitempty"` // name of the release; empty if nothing was added
	Version   int64     `json:"version"`          // of the timestamp metadata
	Expires   time.Time `json:"expires"`          // of the timestamp metadata: publish again before
	Snapshots int64     `json:"snapshots"`        // version of the snapshot metadata
	Root      int64     `json:"root"`             // version of the newest root
	Log       int64     `json:"log,omitempty"`    // records in the transparency log; missing where the root names none
	// Awaits is the file that needs more signatures, and Missing says whose; empty if
	// all is signed. The repository is what it was until then.
	Awaits  string `json:"awaits,omitempty"`
	Missing string `json:"missing,omitempty"`
}

// Publish adds a bundle to a repository, or with no bundle only signs it afresh
// so that it does not expire. A version that was published once never changes
// its content. All is signed before the first byte is written, and interrupted at
// any moment, the repository still is what it was.
func Publish(o PublishOptions) (Published, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	desk := Desk{Keys: o.Keys, Signers: o.Signers, Passphrase: o.Passphrase}
	if _, err := TakeRoot(o.Keys, o.Signed); err != nil {
		return Published{}, err
	}
	p := &publisher{PublishOptions: o}
	unlock, err := p.lock()
	if err != nil {
		return Published{}, err
	}
	defer unlock()
	if p.ring, err = desk.keyring(); err != nil {
		return Published{}, err
	}
	if err := p.load(); err != nil {
		return Published{}, err
	}
	out := Published{Root: p.root.Signed.Version}
	if o.Bundle != "" {
		if out.Target, err = p.addBundle(); err != nil {
			return Published{}, err
		}
	}
	err = p.signAll()
	if waits := (*awaiting)(nil); errors.As(err, &waits) {
		ts := p.timestamp.Signed
		out.Awaits, out.Missing = waits.file, waits.missing
		out.Version, out.Expires, out.Snapshots = p.was.timestamp, ts.Expires, p.was.snapshot
		return out, nil
	}
	if err == nil {
		err = p.write()
	}
	if err != nil {
		return Published{}, err
	}
	ts := p.timestamp.Signed
	out.Version, out.Expires, out.Snapshots = ts.Version, ts.Expires, p.snapshot.Signed.Version
	if p.log != nil {
		out.Log = p.log.size()
	}
	return out, nil
}

type publisher struct {
	PublishOptions
	ring  keyring
	roots []*metadata.Metadata[metadata.RootType] // oldest first; the last is the newest

	root      *metadata.Metadata[metadata.RootType] // the newest
	published *metadata.Metadata[metadata.RootType] // the newest that devices know; nil in a new repository
	targets   *metadata.Metadata[metadata.TargetsType]
	snapshot  *metadata.Metadata[metadata.SnapshotType]
	timestamp *metadata.Metadata[metadata.TimestampType]
	was       struct{ targets, snapshot, timestamp int64 } // versions in the repository
	log       *ledger                                      // nil: the root names none
	signed    []byte                                       // its checkpoint as it is in the repository; nil: none
	logged    int64                                        // records that the repository's checkpoint has
	signedLog []byte                                       // the checkpoint that people have signed; nil: none
	bundle    *bundle.Manifest                             // to be added; nil: none

	files []file // what is to be written, in this order
}

// file is one of the repository, before it is written.
type file struct {
	path string
	raw  []byte
}

// awaiting is metadata that people have to sign.
type awaiting struct{ file, missing string }

func (a *awaiting) Error() string { return a.missing }

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
	if err := p.loadRoots(); err != nil {
		return err
	}
	if p.root.Signed.IsExpired(p.Now) {
		return fmt.Errorf("the root expired on %s; no device would accept a release: sign a new root first, with \"deimos release keys renew\"", p.root.Signed.Expires.Format(time.DateOnly))
	}
	p.targets, p.snapshot, p.timestamp = metadata.Targets(), metadata.Snapshot(), metadata.Timestamp()
	p.targets.Signed.Version, p.snapshot.Signed.Version, p.timestamp.Signed.Version = 0, 0, 0
	_, err := os.Stat(p.path(metadataPath(metadata.TIMESTAMP, 0)))
	if err == nil {
		if p.timestamp, err = loadRole[metadata.TimestampType](p, metadata.TIMESTAMP, 0); err != nil {
			return err
		}
		if p.snapshot, err = loadRole[metadata.SnapshotType](p, metadata.SNAPSHOT, versionIn(p.timestamp.Signed.Meta, metadata.SNAPSHOT)); err != nil {
			return err
		}
		if p.targets, err = loadRole[metadata.TargetsType](p, metadata.TARGETS, versionIn(p.snapshot.Signed.Meta, metadata.TARGETS)); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	p.was.targets, p.was.snapshot, p.was.timestamp = p.targets.Signed.Version, p.snapshot.Signed.Version, p.timestamp.Signed.Version
	return p.loadLog()
}

// loadRoots reads the newest root, those before it as far as they are there, and
// finds the one that devices know.
func (p *publisher) loadRoots() (err error) {
	if p.root, err = readRoot(p.Keys); err != nil {
		return err
	}
	newest := p.root.Signed.Version
	if _, err := os.Stat(p.path(metadataPath(metadata.ROOT, newest+1))); err == nil {
		return fmt.Errorf("%s has root %d, and %s only root %d: copy the newer one there as %s, from where it was made", p.Repo, newest+1, p.Keys, newest, rootFile)
	}
	for v := int64(1); v < newest; v++ {
		raw, err := p.oldRoot(v)
		if errors.Is(err, os.ErrNotExist) {
			continue // of a fleet that began later
		}
		if err != nil {
			return err
		}
		old, err := metadata.Root().FromBytes(raw)
		if err != nil {
			return fmt.Errorf("root %d: %w", v, err)
		}
		p.roots = append(p.roots, old)
	}
	p.roots = append(p.roots, p.root)
	for _, r := range p.roots {
		if _, err := os.Stat(p.path(metadataPath(metadata.ROOT, r.Signed.Version))); err == nil {
			p.published = r
		}
	}
	return nil
}

func (p *publisher) oldRoot(version int64) ([]byte, error) {
	raw, err := os.ReadFile(filepath.Join(p.Keys, rootName(version)))
	if errors.Is(err, os.ErrNotExist) {
		return os.ReadFile(p.path(metadataPath(metadata.ROOT, version)))
	}
	return raw, err
}

func versionIn(meta map[string]*metadata.MetaFiles, role string) int64 {
	if m := meta[role+".json"]; m != nil {
		return m.Version
	}
	return 0
}

// loadRole reads what a root of ours, the newest or one before it, has vouched for.
func loadRole[T metadata.Roles](p *publisher, role string, version int64) (*metadata.Metadata[T], error) {
	path := p.path(metadataPath(role, version))
	m, err := new(metadata.Metadata[T]).FromFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, root := range slices.Backward(p.roots) {
		if err = root.VerifyDelegate(role, m); err == nil {
			return m, nil
		}
	}
	return nil, fmt.Errorf("%s is not signed by the keys in %s; use the keys of this repository, or a new directory: %w", path, p.Keys, err)
}

// loadLog reads the log as its checkpoint says, and removes what an interrupted
// publication has left beyond it: other records may come there.
func (p *publisher) loadLog() error {
	newest, err := logKey(p.root)
	if newest == nil || err != nil {
		return err
	}
	p.log = new(ledger)
	raw, err := os.ReadFile(p.path(checkpointFile))
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	default:
		if p.log, err = p.openLog(raw); err != nil {
			return fmt.Errorf("the log of releases in %s: %w", p.Repo, err)
		}
		p.signed = raw
	}
	p.logged = p.log.size()
	if err := p.checkLogged(); err != nil {
		return err
	}
	return p.clearTiles()
}

func (p *publisher) openLog(raw []byte) (*ledger, error) {
	err := errors.New("no root has named a log")
	for _, root := range slices.Backward(p.roots) {
		var v note.Verifier
		if v, err = logKey(root); v == nil {
			continue
		}
		var c checkpoint
		if c, err = openCheckpoint(raw, v); err != nil {
			continue
		}
		return readLedger(context.Background(), func(_ context.Context, path string, most int64) ([]byte, error) {
			return durable.ReadFile(p.path(path), most)
		}, c)
	}
	return nil, fmt.Errorf("%s is not signed by its keys: %w", checkpointFile, err)
}

// checkLogged refuses to sign once more for a release that the log has not: with
// a stolen key others could have put it among ours. A new log takes all that is there.
func (p *publisher) checkLogged() error {
	for _, name := range slices.Sorted(maps.Keys(p.targets.Signed.Targets)) {
		sum, err := targetSum(name, p.targets.Signed.Targets[name])
		if err != nil {
			return err
		}
		if _, ok := p.log.at[sum]; !ok && p.logged > 0 {
			return fmt.Errorf("%s is signed as a release in %s, but the log of releases has it not: somebody else has signed it, with keys of yours; revoke them, and take the repository from a copy of yours", name, p.Repo)
		}
	}
	return nil
}

func (p *publisher) clearTiles() error {
	return filepath.WalkDir(p.path(logDir+"tile"), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(p.path(logDir), path)
		if err != nil {
			return err
		}
		t, err := tlog.ParseTilePath(filepath.ToSlash(rel))
		if err != nil || t.H != tileHeight {
			return nil // none of ours
		}
		covers := p.logged >> (tileHeight * max(t.L, 0)) // hashes that there are at its level
		if t.N*tileWidth+int64(t.W) <= covers {
			return nil
		}
		return os.Remove(path)
	})
}

// addBundle looks at parts and manifest, and names the manifest in the targets.
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
	for _, f := range m.Files() {
		if err := bundle.CheckFile(p.Bundle, f); err != nil {
			return "", err
		}
	}
	p.bundle = &m
	p.files = append(p.files, file{targetPath(name, target.Hashes["sha256"].String()), raw})
	p.targets.Signed.Targets[name] = target
	return name, nil
}

// signAll makes all that is to be written but for the parts, in memory.
func (p *publisher) signAll() error {
	e := p.Expiry.orDefault()
	targets, err := p.signTargets(e)
	if err != nil {
		return err
	}
	snapshot, err := p.signSnapshot(e, targets)
	if err != nil {
		return err
	}
	old := *p.timestamp
	expires := p.until(e.Timestamp)
	p.timestamp.Signed.Version, p.timestamp.Signed.Expires = p.was.timestamp+1, expires
	p.timestamp.Signed.Meta = map[string]*metadata.MetaFiles{"snapshot.json": fileInfo(snapshot, p.snapshot.Signed.Version)}
	if p.timestamp, err = byHand(p, metadata.TIMESTAMP, p.was.timestamp, p.timestamp, func(m *metadata.TimestampType) bool {
		return sameFile(m.Meta["snapshot.json"], p.timestamp.Signed.Meta["snapshot.json"])
	}); err != nil {
		return err
	}
	timestamp, err := signRole(p, metadata.TIMESTAMP, &old, p.timestamp)
	if err != nil {
		return err
	}
	if err := p.signLog(); err != nil {
		return err
	}
	p.files = append(p.files,
		file{metadataPath(metadata.TARGETS, p.targets.Signed.Version), targets},
		file{metadataPath(metadata.SNAPSHOT, p.snapshot.Signed.Version), snapshot},
		file{metadataPath(metadata.TIMESTAMP, 0), timestamp})
	return p.addRoots()
}

func (p *publisher) until(life time.Duration) time.Time {
	return p.Now.UTC().Truncate(time.Second).Add(life)
}

func (p *publisher) signTargets(e Expiry) ([]byte, error) {
	old, err := p.inRepo(metadata.TARGETS, p.was.targets)
	if err != nil {
		return nil, err
	}
	before := metadata.Targets()
	if before.Signed.Version = 0; old != nil {
		if before, err = before.FromBytes(old); err != nil {
			return nil, err
		}
		if same, err := sameSigned(before, p.targets); err != nil {
			return nil, err
		} else if same && !p.handed(metadata.TARGETS) && p.stays(metadata.TARGETS, p.targets.Signed.Expires, e.Targets, func() error { return p.root.VerifyDelegate(metadata.TARGETS, p.targets) }) {
			return old, nil
		}
	}
	mine := p.targets
	mine.Signed.Version, mine.Signed.Expires = p.was.targets+1, p.until(e.Targets)
	if p.targets, err = byHand(p, metadata.TARGETS, p.was.targets, mine, func(m *metadata.TargetsType) bool {
		if p.bundle == nil {
			return true
		}
		name := TargetName(p.bundle.Version)
		t := m.Targets[name]
		return t != nil && t.Equal(*mine.Signed.Targets[name])
	}); err != nil {
		return nil, err
	}
	if err := p.checkHandedTargets(before.Signed.Targets); err != nil {
		return nil, err
	}
	return signRole(p, metadata.TARGETS, before, p.targets)
}

// checkHandedTargets refuses what others have signed if a release would change, or
// has no manifest.
func (p *publisher) checkHandedTargets(before map[string]*metadata.TargetFiles) error {
	for _, name := range slices.Sorted(maps.Keys(p.targets.Signed.Targets)) {
		t := p.targets.Signed.Targets[name]
		if was := before[name]; was != nil {
			if !was.Equal(*t) {
				return fmt.Errorf("%s is signed with other content than it was published with; a version never changes", name)
			}
			continue
		}
		sum, err := targetSum(name, t)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(p.files, func(f file) bool { return f.path == targetPath(name, sum) }) {
			return fmt.Errorf("%s is signed as a new release, but its bundle is not here: name it with --bundle", name)
		}
	}
	return nil
}

func (p *publisher) signSnapshot(e Expiry, targets []byte) ([]byte, error) {
	old, err := p.inRepo(metadata.SNAPSHOT, p.was.snapshot)
	if err != nil {
		return nil, err
	}
	before := *p.snapshot
	meta := map[string]*metadata.MetaFiles{"targets.json": fileInfo(targets, p.targets.Signed.Version)}
	same := sameFile(p.snapshot.Signed.Meta["targets.json"], meta["targets.json"])
	if old != nil && same && !p.handed(metadata.SNAPSHOT) && p.stays(metadata.SNAPSHOT, p.snapshot.Signed.Expires, e.Snapshot, func() error { return p.root.VerifyDelegate(metadata.SNAPSHOT, p.snapshot) }) {
		return old, nil
	}
	p.snapshot.Signed.Version, p.snapshot.Signed.Expires, p.snapshot.Signed.Meta = p.was.snapshot+1, p.until(e.Snapshot), meta
	if p.snapshot, err = byHand(p, metadata.SNAPSHOT, p.was.snapshot, p.snapshot, func(m *metadata.SnapshotType) bool {
		return sameFile(m.Meta["targets.json"], meta["targets.json"])
	}); err != nil {
		return nil, err
	}
	return signRole(p, metadata.SNAPSHOT, &before, p.snapshot)
}

// inRepo is metadata as it was published; nil if there is none.
func (p *publisher) inRepo(role string, version int64) ([]byte, error) {
	if version == 0 {
		return nil, nil
	}
	return os.ReadFile(p.path(metadataPath(role, version)))
}

// stays tells whether what has not changed needs no new signature, so that nobody
// is asked for a key: the newest root stands behind it, and half its life is left.
func (p *publisher) stays(role string, expires time.Time, life time.Duration, verify func() error) bool {
	return expires.After(p.Now.Add(life/2)) && verify() == nil
}

func (p *publisher) handed(role string) bool {
	for _, f := range p.Signed {
		if _, has, err := readHand(f); err != nil || has == role {
			return true
		}
	}
	return false
}

func sameFile(a, b *metadata.MetaFiles) bool {
	return a != nil && b != nil && a.Version == b.Version && a.Length == b.Length && bytes.Equal(a.Hashes["sha256"], b.Hashes["sha256"])
}

// byHand is what people have signed in the place of mine, if they have. It must
// follow what is in the repository, and say what fits.
func byHand[T metadata.Roles](p *publisher, role string, was int64, mine *metadata.Metadata[T], fits func(*T) bool) (*metadata.Metadata[T], error) {
	theirs, err := mergeHand[T](p.Signed, role)
	if theirs == nil || err != nil {
		return mine, err
	}
	if v := versionOf(theirs); v != was+1 {
		return nil, fmt.Errorf("what is signed for %s is version %d, and the repository has version %d: something was published in between; write it anew with --unsigned", role, v, was)
	}
	if !fits(&theirs.Signed) {
		return nil, fmt.Errorf("what is signed for %s is not for this bundle and these other signatures; write it anew with --unsigned", role)
	}
	return theirs, nil
}

// signRole adds signatures of keys at hand until the newest root is content, and
// the one that devices know now, if its keys are still here: until devices have the
// newest, they read this by the other. Without enough it writes it for others to sign.
func signRole[T metadata.Roles](p *publisher, role string, old, m *metadata.Metadata[T]) ([]byte, error) {
	ring := p.ring
	if p.handed(role) {
		ring = nil // nobody here has looked at it; keys that are here had signed before it was carried away
	} else {
		m.ClearSignatures()
	}
	if err := signUntil(m, role, p.root, ring); err != nil {
		return nil, err
	}
	if missing := lacking(m, role, p.root); missing != "" {
		if p.Unsigned == "" {
			return nil, fmt.Errorf("%s: %s; write it for them with --unsigned DIR", role, missing)
		}
		file, err := writeUnsigned(p.Unsigned, role, old, m)
		if err != nil {
			return nil, err
		}
		return nil, &awaiting{file, role + ": " + missing}
	}
	if p.published != nil && p.published != p.root {
		if err := signUntil(m, role, p.published, ring); err != nil {
			return nil, err
		}
	}
	return m.ToBytes(false)
}

// signLog appends what is not logged yet, and signs the log as it is then.
func (p *publisher) signLog() error {
	if p.log == nil {
		return nil
	}
	if err := p.takeHandLog(); err != nil {
		return err
	}
	released := map[string]string{} // names, by digest
	var lookups []file
	for _, name := range slices.Sorted(maps.Keys(p.targets.Signed.Targets)) {
		sum, err := targetSum(name, p.targets.Signed.Targets[name])
		if err != nil {
			return err
		}
		released[sum] = name
		n, ok := p.log.at[sum]
		if !ok {
			version := strings.TrimSuffix(strings.TrimPrefix(name, "bundles/"), ".json")
			line, err := LogRecord{Version: version, Target: name, SHA256: sum, Time: p.until(0)}.line()
			if err != nil {
				return err
			}
			n = p.log.size()
			if err := p.log.add(line); err != nil {
				return err
			}
		}
		lookups = append(lookups, file{lookupPath(sum), fmt.Appendf(nil, "%d\n", n)})
	}
	added, err := (&ledger{lines: p.log.lines[p.logged:]}).records()
	if err != nil {
		return err
	}
	for n, r := range added {
		if released[r.SHA256] != r.Target || TargetName(r.Version) != r.Target || p.log.at[r.SHA256] != p.logged+int64(n) {
			return fmt.Errorf("what is signed for the log has a record of %s, %s, which is not published now, or is there already; write it anew with --unsigned", r.Target, short(r.SHA256))
		}
	}
	if err := p.addTiles(); err != nil {
		return err
	}
	signed, err := p.signCheckpoint()
	if err != nil {
		return err
	}
	p.files = append(p.files, file{checkpointFile, signed})
	p.files = append(p.files, lookups...)
	return nil
}

func (p *publisher) addTiles() error {
	for _, t := range tlog.NewTiles(tileHeight, p.logged, p.log.size()) {
		raw, err := tlog.ReadTileData(t, p.log)
		if err != nil {
			return err
		}
		p.files = append(p.files, file{tilePath(t), raw})
		if t.L == 0 {
			t.L = -1
			first := t.N * tileWidth
			p.files = append(p.files, file{tilePath(t), bytes.Join(p.log.lines[first:first+int64(t.W)], nil)})
		}
	}
	return nil
}

// signCheckpoint signs with the key that the newest root names, and the one that
// devices know, if it is still here.
func (p *publisher) signCheckpoint() ([]byte, error) {
	tree, err := p.log.tree(p.log.size())
	if err != nil {
		return nil, err
	}
	if p.log.size() == p.logged && p.signed != nil && p.published == p.root && p.signedLog == nil {
		return p.signed, nil // nothing new; nobody is asked for the key
	}
	var signers []note.Signer
	var origin string
	for _, root := range []*metadata.Metadata[metadata.RootType]{p.root, p.published} {
		if root == nil || root == p.root && len(signers) > 0 {
			continue
		}
		v, err := logKey(root)
		if err != nil || v == nil {
			continue // the newest has one, else there would be no log
		}
		if p.signedLog != nil {
			return p.checkHandLog(v, tree)
		}
		ids, _, err := roleKeys(root, LogRole)
		if err != nil {
			return nil, err
		}
		keys := p.ring.of(ids)
		if len(keys) == 0 && root == p.root {
			return nil, p.awaitLog(v.Name(), ids[0])
		}
		for _, k := range keys {
			s, err := k.open()
			if err != nil {
				return nil, err
			}
			signers = append(signers, logSigner{v, s})
		}
		origin = v.Name()
	}
	return note.Sign(&note.Note{Text: checkpointText(origin, tree)}, signers...)
}

// awaitLog writes the log for who has its key.
func (p *publisher) awaitLog(origin, id string) error {
	missing := fmt.Sprintf("the key of the log, %s, is not at hand, and signs each release", short(id))
	if p.Unsigned == "" {
		return fmt.Errorf("%s: write it for who has the key with --unsigned DIR, or name a new key with \"deimos release keys rotate --role log\"", missing)
	}
	file, err := p.writeHandLog(origin)
	if err != nil {
		return err
	}
	return &awaiting{file, missing}
}

// addRoots adds the roots that the repository lacks. They come last: until then
// devices read all by the root that they know.
func (p *publisher) addRoots() error {
	for _, r := range p.roots {
		path := metadataPath(metadata.ROOT, r.Signed.Version)
		if _, err := os.Stat(p.path(path)); err == nil {
			continue
		}
		raw, err := Root(p.Keys)
		if r != p.root {
			raw, err = p.oldRoot(r.Signed.Version)
		}
		if err != nil {
			return err
		}
		p.files = append(p.files, file{path, raw})
	}
	return nil
}

// write puts all in its place: parts, manifest, tiles of the log before its
// checkpoint, and metadata, timestamp last but for roots.
func (p *publisher) write() error {
	if p.bundle != nil {
		for _, f := range p.bundle.Files() {
			path := filepath.FromSlash(bundle.PartPath(f.SHA256))
			if err := durable.CopyFile(filepath.Join(p.Repo, path), filepath.Join(p.Bundle, path), 0o644); err != nil {
				return err
			}
		}
	}
	for _, f := range p.files {
		if err := p.writeFile(f); err != nil {
			return fmt.Errorf("write %s: %w", f.path, err)
		}
	}
	return nil
}

func (p *publisher) writeFile(f file) error {
	path := p.path(f.path)
	if there, err := os.ReadFile(path); err == nil && bytes.Equal(there, f.raw) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(path, f.raw, 0o644)
}

func fileInfo(raw []byte, version int64) *metadata.MetaFiles {
	sum, n, _ := digestOf(bytes.NewReader(raw))
	return &metadata.MetaFiles{Version: version, Length: n, Hashes: metadata.Hashes{"sha256": sum}}
}
