// Package blocks cuts the power of a disk: it records what a disk is asked to do,
// and makes it again as it may be after a cut at any moment of the record.
//
// A [Recorder] is the observer of a disk of package nbd. It writes changes and
// flushes in one order, and among them marks: promises that somebody has been given,
// which must hold after every cut from there on. What they say is its maker's
// business.
//
// A disk has a volatile cache. At a cut everything is there that a flush had
// covered, and of what came after, anything: all, none, some, single sectors
// ([Disk.Cut]). [Plan] chooses moments, [Replay] makes the cuts and has each
// checked. From a [Cut] the disk follows, so any can be made again alone.
//
// It needs Linux, and root for loop devices and mounts.
package blocks
