// Package repo makes and reads the signed metadata that says which releases
// there are. The metadata is TUF (https://theupdateframework.github.io/specification/latest/),
// by go-tuf; fetching and storing are our own, because go-tuf's fetcher has no
// time limit and its store is not durable.
//
// # Parties and keys
//
//   - root, several keys of which two or more must sign: says which keys the other
//     roles have, and how many of them must sign. Kept offline by several people. A
//     device learns the first root when it enrols, and follows the chain of signed
//     roots from there.
//   - targets: names the releases, each by the digest of its bundle manifest.
//   - snapshot: names the versions of all metadata, so that a mirror cannot mix.
//   - timestamp: short-lived, names the newest snapshot, so that a mirror cannot
//     hold a device back for longer than its expiry.
//   - log: signs the transparency log. The root names it in a field of its own, so
//     that who has stolen all other keys cannot name another log.
//
// Neither the coordinator nor a mirror nor whoever carries the USB stick needs
// to be trusted with anything but delivery. A key has one role. Keys are files
// (PKCS #8, with a passphrase or without) or whatever else signs and is handed in as
// a [crypto.Signer]; see [Desk]. A file with a passphrase shows its public half, so
// nobody is asked for one that is not needed.
//
// # A repository
//
// A plain directory, which any web server or stick can carry:
//
//	parts/<sha256>                  packed parts, named only by the manifests
//	targets/bundles/<sha256>.<version>.json   manifests, see ota/bundle
//	log/tile/8/...                  the log: its records and hashes, as golang.org/x/mod/sumdb/tlog has them
//	log/checkpoint                  how many records there are and the root of their tree, signed; changes
//	log/lookup/<sha256>             which record has this manifest: a hint
//	metadata/N.targets.json
//	metadata/N.snapshot.json
//	metadata/timestamp.json         changes
//	metadata/N.root.json            every root there ever was
//
// They are written and copied in this order ([Compare]), so a reader finds a release
// whole or not at all. Roots come last: as long as the keys that a new root takes out
// are at hand, [Publish] signs with them too, so that at each moment all is valid by
// the newest root that is there. Without them (stolen, lost) devices that read in
// the moment between the last two files refuse what they see, and come again.
//
// # Changing keys
//
// [Rotate], [Revoke] and [Renew] make root N+1, which root N's keys and its own must
// sign; devices go from one to the next. Who fast-forwarded timestamp or snapshot with
// stolen keys is forgotten with these keys: what devices have stored does not verify
// any more, and does not count.
//
// What keys that are elsewhere must sign is written to a folder, and carried:
// [Examine] says in words what a signature says, [Sign] adds one, [TakeRoot] and
// [Publish] take it in. Nothing is signed when it is taken in, as nobody here has
// looked at it. A signature is asked for while the repository is what it was.
//
// # The log
//
// Every release has a record: version, target, digest, time. A device that takes a
// manifest makes sure that the log has it, and that the log is the one that it has
// seen before, grown: so who has the keys can still not give one device something
// that others cannot come to know of. The newest checkpoint is kept durably, and goes
// to the coordinator with the report on an update; [Client.VerifyLog] compares those
// of many devices. Two that contradict each other are kept as evidence ([Fork]).
// What a log does not do: it keeps nobody from signing something bad, it shows it; and a
// device that is shown a face of its own for ever, and whose reports nobody gets,
// finds nothing out.
//
// # Reading
//
// [Client] follows the client workflow of the TUF specification (section 5.3)
// with a reference time that the caller gives, because a device's clock may be
// wrong. What it trusts is synced to disk before it is used. Every fetch has a
// limit in bytes and in time, and a part resumes where it was cut.
//
// Not here yet: delegations.
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

// FirstRootFile is the first root in a repository, and MaxRoot bounds a root, in bytes.
const (
	FirstRootFile = "metadata/1.root.json"
	MaxRoot       = 512 << 10
)

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
		e.Reason = fmt.Sprintf("it goes back behind what this device has already seen, as a stale mirror or an old stick does, or skips a version (%v)", err)
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
