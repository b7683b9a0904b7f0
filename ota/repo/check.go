package repo

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
	const prefix, sum = len("targets/bundles/"), 64
	if len(file) < prefix+sum {
		return false
	}
	digest := file[prefix : prefix+sum]
	for _, c := range digest {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return file == targetPath(name, digest)
}
