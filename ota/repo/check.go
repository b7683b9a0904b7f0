package repo

import (
	"path"
	"strings"

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
