// Package store keeps chunks on disks and never lies about them.
//
// A [Volume] is one directory on one disk, its own failure domain; a [Set] is
// all volumes of a device. Two promises hold whatever the power, the disk or
// Badger does:
//
//   - [Volume.Put] returns without an error only when the chunk is durable. A
//     receipt may be given then, and not before.
//   - [Volume.Get] returns the bytes that hash to the id, or an error. What was
//     here and is not any more is [wire.CodeLost], remembered and listed; what
//     never was is [wire.CodeNotFound].
//
// # On disk
//
//	VOLUME       the volume's id, a ULID and a newline; also a key in Badger
//	ballast      space that is given up so that a full disk can be opened
//	SYNC_FAILED  only after a failed sync: the boot id of the kernel it happened under
//	chunks/      Badger: 'c'‖id → the chunk, 'i'‖id → its size (uint32, big endian), 'v' → the volume's id
//
// Chunk and index entry are one transaction. The index keeps counters and
// listings off the value log, and tells a lost chunk from one that never was.
//
// # Writing
//
// One goroutine, the committer, makes every change. It takes what waits (up to
// a limit of bytes), writes it, makes it durable once, then answers everybody:
// puts that arrive together share one sync. Those who were answered together the
// last time are waited for a little, and the disk begins with what is written
// meanwhile. A chunk that is held already is read before a put of it is answered; a new
// one is not looked for twice. An error on the way latches the volume read-only until it is opened
// again, because after a failed fsync nobody knows what is on disk: the kernel
// forgets such pages and says success the next time. For the same reason a failed
// sync is noted in SYNC_FAILED, and the volume stays read-only until the machine
// has booted again.
//
// Badger is set to SyncWrites=false, since with it on a failed sync is logged
// and the commit succeeds. Its DB.Sync covers the current memtable's log and the
// current value log only, one after the other. So the committer itself syncs, at
// once, all logs that were written to since the last time, memtables that were
// rotated but are not flushed yet among them, and the directory after new ones
// came (see durable.go).
//
// # Reading
//
// Badger answers a damaged value with success and an empty or a wrong value. So
// every read is hashed. It maps its files: a bad sector or a file cut short is a
// SIGBUS, and on a disk that hangs, who waits for a page cannot be stopped for the
// garbage collector, so all of the process stands still. So chunks are read from their
// logs by system calls, and before logs are written to in mapped memory, a system call
// waits for the journal of their file system; in the tree a SIGBUS becomes an error. When Badger opens it
// cuts its newest value log at the first bad record, with all whole ones behind,
// and says nothing; Open puts an empty log in the way of that (see
// guardNewestLog), and reads the chunks of the newest log, so that what a crash
// took is known at once. [Volume.Check] reads everything.
//
// Who reads many chunks (opening, Check, a scrub) has them read as they lie on disk, some
// megabytes at one go and with the next already asked for; what is not whole there is then
// read alone, and that decides (see sweep.go).
//
// # Space
//
// A write to a full memory-mapped file kills the process, so each put first
// asks the file system and stops at a floor. Dropping is always allowed. On a
// 32-bit processor the address space ends first: there all volumes of a process
// together hold 1 GiB.
//
// The bytes of dropped chunks stay in their value log until it is emptied, and
// count against the capacity. The [Stats] are exact to the byte at any time and
// nothing is walked for them: the tree knows the log and the length of each
// record, so one walk of its keys at opening and the committer afterwards are
// enough (see ledger). Nothing of this is written down, so no crash can make it
// wrong.
//
// # Giving dead bytes back
//
// Badger's own GC is not safe to call as it is: it deletes the old log before the
// moved values are synced, stops at the first bad record, so that the whole ones
// behind it are deleted too, and moves dropped values along until a compaction
// has taken their keys. So the volume empties logs itself (move.go):
//
//   - A log is worth it when half of it is dead, or a quarter when room is short;
//     never the newest.
//   - What lives in it is what the tree says, not what the log says: a damaged
//     record hides none behind it, and the log's format need not be read.
//   - Each such chunk is read, verified and written again by the committer, with a
//     checked sync, unless it was dropped or rewritten meanwhile. Put back is both
//     its record and its index entry. One that is lost stays, and its log with it,
//     until it is dropped or put again.
//   - When a second walk of the tree finds nothing that points to the log, its
//     first record is blanked and Badger is made to choose it: it then deletes it
//     without writing anything.
//
// A kill at any moment leaves a chunk in the old log, or in both. After a power cut
// the tree may point to a record whose bytes are not there, because the kernel writes
// mapped files in any order, and the tree's log is synced beside the value log. So
// the tree keeps two versions of a key: a chunk that is not whole where it lies is
// read where it lay before, and Open has such chunks written again before any log is
// deleted. A log that was emptied and not deleted is found at the next start. A
// reader whose log goes under it reads again. Moving keeps to a rate and gives way to
// use, except when room is short; it needs room itself, which puts leave free: the
// upper half of the floor, and [Stats.Reserved].
//
// # Disks that go wrong
//
// What asks a disk for little (Has, Stats, CanTake, List) waits for it for
// seconds, reads and writes for a minute at most. Then the volume counts as
// hanging and answers [wire.CodeUnreachable] at once, until the disk has answered;
// a [Set] does without it meanwhile. A directory that was moved, unmounted or
// replaced under an open volume takes no more chunks: what is written there would
// be out of reach of the next start. A file system that turns read-only takes none
// either; Badger cannot be closed there, and Close says so at once.
//
// # A damaged tree
//
// Badger crashes at a damaged table, and deletes the tables that its list (MANIFEST)
// does not name, so of a list that was cut it forgets chunks without a word. Open looks
// at list and tables first. If one is damaged, cut or gone, it makes the tree anew of
// what is whole in the tables and of the records in the value logs, without copying a
// chunk, and puts it in the place of the old one at once (see rebuild.go). That reads
// all logs; what is known to be lost then is told before anyone asks.
//
// # Not done yet
//
// A damaged log of a memtable that was not flushed (only after a crash) takes the
// index entries behind it, whose chunks are then not found instead of lost. Small logs that restarts leave are not
// joined while all in them lives. What the tree itself takes on disk is not in the
// figures. Opening a volume whose disk hangs is for the caller to bound. The tree is read
// in mapped memory: if the kernel needed its pages for something else, and then the disk
// hangs, the process stands still until the disk answers; the same if it begins to hang
// within the milliseconds of a write to mapped memory.
package store
