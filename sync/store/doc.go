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
// puts that arrive together share one sync. An error on the way latches the
// volume read-only until it is opened again, because after a failed fsync
// nobody knows what is on disk: the kernel forgets such pages and says success
// the next time. For the same reason a failed sync is noted in SYNC_FAILED, and
// the volume stays read-only until the machine has booted again.
//
// Badger is set to SyncWrites=false, since with it on a failed sync is logged
// and the commit succeeds. Its DB.Sync covers the current memtable's log and the
// current value log only, so the committer itself syncs what Badger leaves out:
// the logs of memtables that were rotated but are not flushed yet, and the
// directory after files came or went (see durable.go).
//
// # Reading
//
// Badger answers a damaged value with success and an empty or a wrong value. So
// every read is hashed. Files are memory-mapped: a bad sector or a file cut
// short is a SIGBUS, which reads turn into a lost chunk. When Badger opens it
// cuts its newest value log at the first bad record, with all whole ones behind,
// and says nothing; Open puts an empty log in the way of that (see
// guardNewestLog), and reads the chunks of the newest log, so that what a crash
// took is known at once. [Volume.Check] reads everything.
//
// # Space
//
// A write to a full memory-mapped file kills the process, so each put first
// asks the file system and stops at a floor. Dropping is always allowed. The
// bytes of dropped chunks stay in the value log and count against the capacity
// ([Stats.Dead]). On a 32-bit processor the address space ends first: there
// all volumes of a process together hold 1 GiB.
//
// # Not done yet
//
// Value logs are not rewritten, so Dead does not shrink. Badger's own GC is not
// safe to call as it is: it deletes the old log before the moved values are
// synced (an open iterator would hold the file until then), and stops at the
// first bad record, so that the whole ones behind are deleted with it. There is
// no paced scrub. A damaged index table keeps the volume from opening (with a
// sentence; the index could be rebuilt from the value logs), and a
// damaged log of a memtable that was not flushed (only after a crash) takes the
// index entries behind it, whose chunks are then not found instead of lost. A
// hung disk is only bounded by the caller's context.
package store
