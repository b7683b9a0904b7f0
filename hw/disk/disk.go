// Package disk says which disks may hold chunks, how much, and whether they can
// be trusted with them.
//
// # Choosing
//
// [Choose] looks at each mounted filesystem of the inventory, and at each disk
// that is not mounted, and gives every one a code and a sentence for its owner.
// It writes nothing, formats nothing, and wakes no disk that sleeps: one that does
// not say whether it does is looked at only if its owner names it or it was in use.
// Our folder is one that holds a volume, or nothing yet; any other of that name is
// somebody's data. The rules,
// the first that applies being the reason:
//
//	not mounted, virtual, no disk, the owner's never, read-only, failing,
//	of the start of the system, no size: never
//	a filesystem that loses data in a power cut, a bus that the board excludes,
//	removable, mounted for a moment, the system's disk, somebody's data on it:
//	only with the owner's consent
//	the system's disk: also if the board says so or there is no other disk, and
//	always only above a floor of 10 % and 8 GiB, whichever is more (on a device
//	that runs our image, the data partition is none of the system's)
//	less than 1 GiB usable: never
//	two filesystems of one disk: the one that the owner names, or the largest,
//	as one disk is one domain of failure
//
// A disk that was in use stays so: if it has our folder and an earlier test in
// the [Record], what its owner puts beside that, or that it sleeps, takes no
// chunks away from a fleet that counts on them.
//
// # Trusting
//
// [SelfTest] writes what no other disk and no other place of this one holds,
// syncs it, reads it back past the page cache and compares. [Record.Trusted]
// does so once for each disk and filesystem, and at each start for one that failed.
// The parties: the disk may lie (sold with more capacity than it has, or one that
// drops writes), hang, or break; the owner of the folder may do anything, but other
// users must not be able to have us write elsewhere, so no symbolic link is
// followed at the test's file, and no file is emptied that is another user's or
// has a second name.
//
// # Not done yet
//
// The test is bounded: a disk that lies about what is beyond its first free
// 64 MiB is found out when chunks are audited, not here. A filesystem over
// several disks (RAID, LVM) is judged by the first of them.
package disk

import (
	"time"

	"github.com/deimos-edge/deimos/board"
)

// Options are the owner's word.
type Options struct {
	Auto  bool     // use what the rules allow, without being told
	Use   []string // mount points or disk serials that the owner consents to, foreign data or not
	Never []string // mount points, disk names or serials that are not to be used
	State string   // the agent's state folder
	Own   bool     // the filesystem of State was made for the device alone, as that of our image: no system lives on it
	Board board.Board
}

// The codes of candidates that are used.
const (
	CodeOK      = "ok"      // by the rules
	CodeConsent = "consent" // the owner says so
	CodeOnly    = "only"    // the system's disk, as there is no other or the board says so
	CodeInUse   = "in_use"  // was in use before
)

// The codes of candidates that are not used.
const (
	CodeNotMounted = "not_mounted"
	CodeVirtual    = "virtual"    // network, memory, an image, an overlay
	CodeNoDisk     = "no_disk"    // a disk of this machine is not found below it
	CodeNever      = "never"      // the owner says so
	CodeReadOnly   = "read_only"  //
	CodeFailing    = "failing"    // the disk expects to fail
	CodeBoot       = "boot"       // what the machine starts from
	CodeUnreadable = "unreadable" // did not answer, or may not be read
	CodeAsleep     = "asleep"     // not looked at, so as not to wake it
	CodeWeak       = "weak"       // the filesystem cannot sync and rename well
	CodeBus        = "bus"        // the board's profile excludes it
	CodeRemovable  = "removable"  // a stick, a card
	CodeTemporary  = "temporary"  // mounted by a desktop, for a moment
	CodeSystem     = "system"     // the system's disk, and there are others
	CodeForeign    = "foreign"    // somebody's data
	CodeFull       = "full"       // below its floor
	CodeSmall      = "small"      // less than MinCapacity
	CodeSecond     = "second"     // another filesystem of the same disk is used
	CodeNotAsked   = "not_asked"  // would be used if the owner asked
)

const (
	gib = 1 << 30
	mib = 1 << 20

	// MinCapacity is the least that is worth a volume, in bytes.
	MinCapacity = 1 * gib
)

// Candidate is one filesystem that could hold chunks.
type Candidate struct {
	Mount    string `json:"mount"` // "" if it is not mounted
	Disk     string `json:"disk"`  // kernel name
	Serial   string `json:"serial,omitempty"`
	System   bool   `json:"system"`
	Size     int64  `json:"size"`     // bytes
	Free     int64  `json:"free"`     // bytes
	Floor    int64  `json:"floor"`    // bytes that chunks leave free
	Capacity int64  `json:"capacity"` // bytes that may hold chunks, those that it holds already among them; 0 if it is not used
	Dir      string `json:"dir"`      // folder for the chunks
	Use      bool   `json:"use"`
	Why      string `json:"why"` // a sentence: why it is used, or is not and what would change that
	Code     string `json:"code"`
	Test     *Test  `json:"test,omitempty"` // the newest self-test
}

// Test is what a self-test has found.
type Test struct {
	At       time.Time `json:"at"`
	Bytes    int64     `json:"bytes"`     // written and read back
	WriteBps float64   `json:"write_bps"` // bytes a second, synced
	ReadBps  float64   `json:"read_bps"`  // bytes a second, past the page cache where the filesystem allows it
	SyncMS   float64   `json:"sync_ms"`   // p50 of a small synced write
	Direct   bool      `json:"direct"`    // read with O_DIRECT; else the kernel was asked to drop its cache first, which it may not have done
	Passed   bool      `json:"passed"`
	Code     string    `json:"code,omitempty"` // of the problem: full, read_only, denied, io_error, mismatch, hung, other
	Problem  string    `json:"problem,omitempty"`
}

// floorOf is what chunks leave free on a filesystem of so many bytes.
func floorOf(size int64, system bool) int64 {
	if system {
		return max(size/10, 8*gib)
	}
	return max(size/100, 512*mib)
}
