// Package store keeps chunks on disks and never lies about them.
//
// A [Volume] is one directory on one disk, its own failure domain; a [Set] is all volumes of a
// device. Two promises hold whatever the power, the disk or Badger does:
//
//   - [Volume.Put] returns without an error only when the chunk is durable. A receipt may be given
//     then, and not before.
//   - [Volume.Get] returns the bytes that hash to the id, or an error. What was here and is not any
//     more is [wire.CodeLost], remembered and listed; what never was is [wire.CodeNotFound].
//
// # On disk
//
//	VOLUME       the volume's id, a ULID and a newline; also in each segment
//	ballast      space that is given up so that a full disk can be opened
//	SYNC_FAILED  only after a failed sync: the boot id of the kernel it happened under
//	READ_FAILED  only after an opening that could not read all it had to: the same, and the number of
//	             the segment, a line each
//	chunks/      000001.seg and so on: segments, each with records of chunks and of drops, one after
//	             the other (record.go has their form)
//	chunks/index Badger: where each chunk's record lies
//
// The segments are the truth. The index is made of them, and can be made of them again.
//
// # Writing
//
// One goroutine, the committer, makes every change. It takes what waits (up to a limit of bytes),
// appends it to the newest segment, syncs that once, then answers everybody: puts that arrive
// together share one sync. Those who were answered together the last time are waited for a little,
// and the disk begins with what is written meanwhile. A chunk that is held already is read before a
// put of it is answered; a new one is not looked for twice. An error on the way latches the volume
// read-only until it is opened again, because after a failed fsync nobody knows what is on disk:
// the kernel forgets such pages and says success the next time. For the same reason a failed sync
// is noted in SYNC_FAILED, and the volume stays read-only until the machine has booted again. Only
// a write that the disk has no room for is taken back, as a whole and durably, before anybody is
// answered. What a batch changes is in the index and in the figures once it is durable, and not
// before; what a failed one was to drop or to replace has no receipt until the next opening.
//
// A segment that is full gets a table of contents, all of it is synced, and the next one begins;
// the directory is synced before the first receipt for what is in that.
//
// Nobody waits for the index. What has changed is in memory first, and goes into Badger with a
// checkpoint: at most so many bytes, changes or seconds later, before a segment is deleted, and
// when the volume is closed. A checkpoint is written beside the puts, synced, and says up to which
// place in the log the index is complete. It holds nothing that is not durable in the segments.
//
// # After a crash
//
// Open reads the log again from the last checkpoint's place on. All segments but the last were
// synced before the next one began. In the last, each record tells up to which record all was
// durable when it was written: what is not whole of those is a lost chunk, and of the others was
// never promised, and is blanked. Behind a damaged head the next record is searched for, so that a
// torn or damaged one hides no other. A table of contents counts if it is that of what was found:
// its own bytes can be whole, and others not, when the cut comes while a segment is ended. A record counts only where it was written: a block of an
// older file, which a cut has left there, or a copy in a chunk holds none (record.go). Then all
// that was found is synced: it is as good as put. A receipt that was given just before the crash,
// and that nothing was written after, is not told apart from what was never promised: if its bytes
// are damaged, too, the chunk is not found instead of lost. After half a minute without a change
// the checkpoint has it.
//
// What the disk cannot read then may be a cable that is mended tomorrow. Nothing is written, nothing
// has a receipt, and of no chunk is said that it was never here, until the machine has booted again.
// What cannot be read then, either, counts as damaged, and is written over with zeros: the decision
// is in the segment itself, whatever can be read of it later, and the disk puts another sector there
// (see unread.go).
//
// # Reading
//
// Every read is hashed. Chunks are read by system calls: in mapped memory a bad sector is a SIGBUS,
// and on a disk that hangs, who waits for a page cannot be stopped for the garbage collector, so
// all of the process stands still. Badger maps its files: before a checkpoint writes to them, a
// system call waits for the journal of their file system; in its tables a SIGBUS becomes an error.
//
// Who reads many chunks (Check, a scrub) has them read as they lie on disk, some megabytes at one
// go and with the next already asked for; what is not whole there is then read alone, and that
// decides (see sweep.go).
//
// # Space
//
// Each put first asks the file system and stops at a floor: a full disk would end a checkpoint, and
// the process with it, as Badger writes to mapped memory. Dropping is always allowed.
//
// The bytes of dropped chunks stay in their segment until it is emptied, and count against the
// capacity. The [Stats] are exact to the byte at any time and nothing is walked for them: one walk
// of the index at opening and the committer afterwards are enough (see ledger).
//
// The index is mapped into memory. On a 32-bit processor the address space ends first: there all
// volumes of a process hold 4 Mi chunks, and puts of more are refused.
//
// # Giving dead bytes back
//
//   - A segment is worth it when half of it is dead, or a quarter when room is short; never the
//     newest.
//   - Each chunk that lives in it is read, verified and written again by the committer, with a
//     checked sync, unless it was dropped or rewritten meanwhile. One that is lost stays, and its
//     segment with it, until it is dropped or put again.
//   - A drop names the record that it drops, and a chunk written again the record that it replaces.
//     As long as the segment of such a record is there, the drop is written again, too: without the
//     index the record would count.
//   - When nothing lives in it, the index is brought up to date, and it is deleted.
//
// A kill at any moment leaves a chunk in the old segment, or in both. A reader whose segment goes
// under it reads again. Moving keeps to a rate and gives way to use, except when room is short; it
// needs room itself, which puts leave free: the upper half of the floor, and [Stats.Reserved].
//
// # Disks that go wrong
//
// What asks a disk for little (Has, Stats, CanTake, List) waits for it for seconds, reads and
// writes for a minute at most. Then the volume counts as hanging and answers [wire.CodeUnreachable]
// at once, until the disk has answered; a [Set] does without it meanwhile. A directory that was
// moved, unmounted or replaced under an open volume takes no more chunks: what is written there
// would be out of reach of the next start. A file system that turns read-only takes none either;
// Badger cannot be closed there, and Close says so at once.
//
// # A damaged index
//
// Badger crashes at a damaged table, so Open looks at its list and tables first. If one is damaged,
// cut, gone or cannot be read, or if the entries are not those of the last checkpoint (how many, and
// the sum of where they say that chunks lie), the index is made anew: of the tables of contents, and
// where one is damaged of the records. The log tells how far it is; it can be killed meanwhile. What was
// known to be here, and is in no segment any more, is forgotten then: it is not found instead of
// lost. With a whole index, it is lost. A checkpoint that fails makes the volume read-only until it
// is opened again, and has the index be made anew then.
//
// # Not done yet
//
// If the newest checkpoint's log rots, and the index was not closed since, Badger goes back to an
// older checkpoint without a word. The segments make up for it, but for drops whose segment was
// emptied since: what they dropped is told as lost, though nobody wants it. A drop whose page could
// not be read and was written over is known to the index alone: if that is made anew, what it
// dropped is held again. A chunk whose record's
// head rots before a checkpoint has it, and whose segment is not full yet, is not found instead of
// lost. Small segments that were left are not joined while all in them lives, nor are drops that
// are not needed any more given back where a segment has little else. What the index takes on disk
// (some 60 bytes a chunk) is not in the figures. Opening a volume whose disk hangs is for the caller to
// bound. The index is read in mapped memory: if the kernel needed its pages for something else, and
// then the disk hangs, the process stands still until the disk answers; the same if it begins to
// hang within the milliseconds of a checkpoint.
package store
