package repo

import (
	"path"
	"strings"

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

// Rank orders the files of a repository for who copies it: what is named before
// what names it, so that a reader finds it whole at any moment. Roots come last, as
// until then all is read by the root before (see [Publish]).
func Rank(file string) int {
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
	case strings.HasSuffix(file, ".root.json"):
		return 8
	}
	return 7 // the timestamp
}

// TargetVersion is the version of the release that a target of this name is; ok is
// false for one that is no release.
func TargetVersion(name string) (version string, ok bool) {
	version = strings.TrimSuffix(strings.TrimPrefix(name, "bundles/"), ".json")
	return version, TargetName(version) == name && bundle.CheckVersion(version) == nil
}
