package repo

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/deimos-edge/deimos/ota/bundle"
)

// RootVersion checks a root on its own, as a mirror can: whether it is a root
// that a device could begin with, signed by as many of its own keys as it asks
// for. Whether it is the right one only a device can tell. Errors are of type
// [*Error].
func RootVersion(raw []byte) (int64, error) {
	t, err := new(Client).startFrom(raw)
	if err != nil {
		return 0, err
	}
	return t.Root.Signed.Version, nil
}

// RootFollows tells whether devices that trust one root take another as the next, as a
// mirror must know before it has it: they would stop at one that they do not take.
// Errors are of type [*Error].
func RootFollows(before, next []byte) error {
	t, err := new(Client).startFrom(before)
	if err != nil {
		return err
	}
	file := metadataPath(metadata.ROOT, t.Root.Signed.Version+1)
	if err := guarded(func() error { _, err := t.UpdateRoot(next); return err }); err != nil {
		return explain(file, err, time.Time{})
	}
	return nil
}

// Replaces tells whether a file of a repository that changes may take the place of the
// one that is there, nil for none, by the newest root there: devices refuse what that
// root's keys have not signed, and what goes back. Whether it has expired is not asked.
// Errors are of type [*Error].
func Replaces(file string, root, there, next []byte) error {
	t, err := new(Client).startFrom(root)
	if err != nil {
		return err
	}
	if file == checkpointFile {
		return checkpointReplaces(t.Root, there, next)
	}
	t.RefTime = time.Time{}
	update := func(raw []byte) error {
		return guarded(func() error { _, err := t.UpdateTimestamp(raw); return err })
	}
	_ = update(there) // one that this root's keys have not signed protects nothing
	if err := update(next); err != nil && !errors.Is(err, &metadata.ErrEqualVersionNumber{}) {
		return explain(file, err, t.RefTime)
	}
	return nil
}

func checkpointReplaces(root *metadata.Metadata[metadata.RootType], there, next []byte) error {
	v, err := logKey(root)
	if v == nil || err != nil {
		return err // startFrom has looked at it
	}
	shown, err := openCheckpoint(next, v)
	if err != nil {
		return &Error{Condition: Signature, File: checkpointFile, Reason: fmt.Sprintf("it is not signed by the key of the log that the root names (%v)", err), Err: err}
	}
	if seen, err := openCheckpoint(there, v); err == nil && shown.tree.N < seen.tree.N {
		return &Error{Condition: Rollback, File: checkpointFile, Reason: fmt.Sprintf("the log had %d records, and would have %d", seen.tree.N, shown.tree.N)}
	}
	return nil
}

// IsTarget tells whether file, in a repository, holds the target of this name.
func IsTarget(file, name string) bool {
	sum, ok := NamedSum(file)
	return ok && file == targetPath(name, sum)
}

// NamedSum is the SHA-256 of its content that the name of a part or of a target
// carries, lower-case hex; ok is false if it carries none.
func NamedSum(file string) (sum string, ok bool) {
	sum, _, _ = strings.Cut(path.Base(file), ".")
	if len(sum) != 64 || strings.Trim(sum, "0123456789abcdef") != "" {
		return "", false
	}
	return sum, file == bundle.PartPath(sum) || strings.HasPrefix(file, "targets/bundles/")
}

// Mutable tells whether a file of a repository changes its content. All others are
// what they were, for ever.
func Mutable(file string) bool {
	return file == metadataPath(metadata.TIMESTAMP, 0) || file == checkpointFile
}

// Compare orders the files of a repository for who copies it: what is named before
// what names it, so that a reader finds it whole at any moment. Roots come last, as
// until then all is read by the root before (see [Publish]), and in their order.
func Compare(a, b string) int {
	if r := rank(a); r != rank(b) || r != rankRoot {
		return cmp.Compare(r, rank(b))
	}
	return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) // 10 after 9
}

// IsRoot tells whether a file of a repository is one of its roots, by its name.
func IsRoot(file string) bool { return strings.HasSuffix(file, ".root.json") }

const rankRoot = 8

func rank(file string) int {
	switch {
	case strings.HasPrefix(file, "parts/"):
		return 0
	case strings.HasPrefix(file, "targets/"):
		return 1
	case strings.HasPrefix(file, logDir+"tile/"):
		return 2
	case file == checkpointFile:
		return 3
	case strings.HasPrefix(file, logDir):
		return 4
	case strings.HasSuffix(file, ".targets.json"):
		return 5
	case strings.HasSuffix(file, ".snapshot.json"):
		return 6
	case IsRoot(file):
		return rankRoot
	}
	return 7 // the timestamp
}

// TargetVersion is the version of the release that a target of this name is; ok is
// false for one that is no release.
func TargetVersion(name string) (version string, ok bool) {
	version = strings.TrimSuffix(strings.TrimPrefix(name, "bundles/"), ".json")
	return version, TargetName(version) == name && bundle.CheckVersion(version) == nil
}
