// Package repo makes and reads the signed metadata that says which releases
// there are. The metadata is TUF (https://theupdateframework.github.io/specification/latest/),
// by go-tuf; fetching and storing are our own, because go-tuf's fetcher has no
// time limit and its store is not durable.
//
// # Parties and keys
//
//   - root, several Ed25519 keys of which two or more must sign: says which keys
//     the other roles have. Kept offline by several people. A device learns the
//     first root when it enrols, and follows the chain of signed roots from there.
//   - targets: names the releases, each by the digest of its bundle manifest.
//   - snapshot: names the versions of all metadata, so that a mirror cannot mix.
//   - timestamp: short-lived, names the newest snapshot, so that a mirror cannot
//     hold a device back for longer than its expiry.
//
// Neither the coordinator nor a mirror nor whoever carries the USB stick needs
// to be trusted with anything but delivery.
//
// # A repository
//
// A plain directory, which any web server or stick can carry:
//
//	metadata/N.root.json            every root there ever was
//	metadata/timestamp.json         the only file that changes its content
//	metadata/N.snapshot.json
//	metadata/N.targets.json
//	targets/bundles/<sha256>.<version>.json   manifests, see ota/bundle
//	parts/<sha256>                  packed parts, named only by the manifests
//
// timestamp.json is written last: a reader sees the release whole or not at all.
//
// # Reading
//
// [Client] follows the client workflow of the TUF specification (section 5.3)
// with a reference time that the caller gives, because a device's clock may be
// wrong. What it trusts is synced to disk before it is used. Every fetch has a
// limit in bytes and in time, and a part resumes where it was cut.
//
// Not here yet: rotation of keys by a command, signing by hand on other
// machines, delegations, a transparency log.
package repo

import (
	"errors"
	"fmt"
	"path"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Limits of what is read, in bytes. Snapshot, targets and manifests are bounded
// by the signed length as well.
const (
	maxRoot      = 512 << 10
	maxTimestamp = 16 << 10
	maxSnapshot  = 2 << 20
	maxTargets   = 5 << 20

	// maxRotations is how many new roots are followed in one refresh.
	maxRotations = 256
)

// TargetName is the name of a release in the targets metadata.
func TargetName(version string) string { return "bundles/" + version + ".json" }

// targetPath is where a target stands in a repository with consistent snapshots.
func targetPath(name, sum string) string {
	return path.Join("targets", path.Dir(name), sum+"."+path.Base(name))
}

func metadataPath(role string, version int64) string {
	if role == metadata.TIMESTAMP {
		return "metadata/timestamp.json"
	}
	return fmt.Sprintf("metadata/%d.%s.json", version, role)
}

// Condition names what is wrong with what was read.
type Condition string

// The conditions. Each but the last three means that somebody along the way is
// broken or hostile.
const (
	Expired     Condition = "expired"     // too old: somebody holds newer metadata back, or nobody has signed for long
	Rollback    Condition = "rollback"    // older than what this device has seen
	Signature   Condition = "signature"   // not signed, or by too few or other keys
	Size        Condition = "size"        // longer or shorter than signed, or endless
	Digest      Condition = "digest"      // other bytes than signed
	Malformed   Condition = "malformed"   // not what the specification allows
	OtherRoot   Condition = "other_root"  // the root offered is not the one this device trusts
	LogFork     Condition = "log_fork"    // the log of releases is not the one that this device has seen
	Unlogged    Condition = "not_logged"  // signed, but not in the log of releases
	Missing     Condition = "missing"     // signed, but not there; or not signed at all
	Slow        Condition = "slow"        // no usable speed
	Unreachable Condition = "unreachable" // not to be had right now
)

// Error says which condition stopped a refresh or a fetch, in a sentence.
type Error struct {
	Condition Condition
	File      string // in the repository
	Reason    string
	Err       error
}

func (e *Error) Error() string { return e.File + ": " + e.Reason }

func (e *Error) Unwrap() error { return e.Err }

// Hostile tells whether err means that what was read must not be trusted, as
// opposed to not having been read at all.
func Hostile(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Condition != Missing && e.Condition != Slow && e.Condition != Unreachable
}

func conditionOf(err error) Condition {
	var e *Error
	if errors.As(err, &e) {
		return e.Condition
	}
	return ""
}

// explain turns what go-tuf says about a file into an [Error].
func explain(file string, err error, now time.Time) error {
	e := &Error{File: file, Err: err}
	switch {
	case errors.Is(err, &metadata.ErrExpiredMetadata{}):
		e.Condition = Expired
		e.Reason = fmt.Sprintf("it has expired (this device takes the time to be %s): newer metadata is being held back, nobody has signed any, or the clock is wrong",
			now.UTC().Format(time.RFC3339))
	case errors.Is(err, &metadata.ErrBadVersionNumber{}):
		e.Condition = Rollback
		e.Reason = fmt.Sprintf("it goes back behind what this device has already seen, or skips a version (%v)", err)
	case errors.Is(err, &metadata.ErrUnsignedMetadata{}):
		e.Condition = Signature
		e.Reason = fmt.Sprintf("it is not signed by enough of the keys that this device trusts (%v)", err)
	case errors.Is(err, &metadata.ErrLengthOrHashMismatch{}):
		e.Condition = Digest
		e.Reason = "its bytes are not the signed ones"
	default:
		e.Condition = Malformed
		e.Reason = fmt.Sprintf("it is not valid TUF metadata (%v)", err)
	}
	return e
}
