package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/packaging/init/gpt"
)

const (
	espName  = "deimos-esp"
	dataName = "deimos-data"
)

// blockDevice is a whole disk as /dev shows it.
type blockDevice struct {
	path      string // /dev/nvme0n1
	removable bool
	size      int64      // bytes
	block     int        // bytes of a logical block; of a disk with others than gpt.Block, no table is read
	table     *gpt.Table // nil if it has none
	parted    bool       // the kernel or we see a table or partitions of any sort
}

// partition is one of ours on a disk.
type partition struct {
	disk blockDevice
	gpt.Partition
	path string // /dev/nvme0n1p2
}

// diskNames are the disks that have hardware behind them; loop devices, RAM disks and
// the like have none. It reads nothing of them.
func diskNames(sys string) (names []string) {
	entries, err := os.ReadDir(filepath.Join(sys, "class/block"))
	if err != nil {
		return nil
	}
	for _, e := range entries {
		dir := filepath.Join(sys, "class/block", e.Name())
		if !exists(filepath.Join(dir, "partition")) && exists(filepath.Join(dir, "device")) && readWord(filepath.Join(dir, "ro")) != "1" {
			names = append(names, e.Name())
		}
	}
	return names
}

// readDisk hangs for as long as the disk does.
func readDisk(sys, dev, name string) (blockDevice, error) {
	d, err := lookAt(filepath.Join(dev, name))
	if err != nil {
		return d, err
	}
	dir := filepath.Join(sys, "class/block", name)
	d.removable = readWord(filepath.Join(dir, "removable")) == "1"
	parts, _ := filepath.Glob(filepath.Join(dir, "*", "partition"))
	d.parted = d.parted || len(parts) > 0
	if n, err := strconv.Atoi(readWord(filepath.Join(dir, "queue/logical_block_size"))); err == nil && n != gpt.Block {
		d.block, d.table, d.parted = n, nil, true
	}
	return d, nil
}

// lookAt reads size and partition table of a disk or an image.
func lookAt(path string) (blockDevice, error) {
	f, err := os.Open(path)
	if err != nil {
		return blockDevice{}, err
	}
	defer f.Close()
	d := blockDevice{path: path, block: gpt.Block}
	if d.size, err = f.Seek(0, io.SeekEnd); err != nil || d.size < 1<<20 {
		return d, fmt.Errorf("%s is no disk: %w", path, err)
	}
	d.table, err = gpt.Read(f, d.size)
	d.parted = d.table != nil || !errors.Is(err, gpt.ErrNone)
	return d, nil
}

func find(disks []blockDevice, fits func(gpt.Partition) bool) []partition {
	var found []partition
	for _, d := range disks {
		if d.table == nil {
			continue
		}
		for _, p := range d.table.Partitions {
			if fits(p) {
				found = append(found, partition{disk: d, Partition: p, path: partitionPath(d.path, p.Number)})
			}
		}
	}
	return found
}

// partitionPath is the kernel's name: with a p after a digit (block/partitions/core.c).
func partitionPath(disk string, n int) string {
	if last := disk[len(disk)-1]; last >= '0' && last <= '9' {
		return disk + "p" + strconv.Itoa(n)
	}
	return disk + strconv.Itoa(n)
}

// findESPs are the partitions that the machine may have been started from: those
// with the id that the boot stub tells, else those that are called deimos-esp. The
// id is the same in all copies of an image.
func findESPs(disks []blockDevice, booted string) []partition {
	if booted != "" {
		if all := find(disks, func(p gpt.Partition) bool { return p.ID.String() == booted }); len(all) > 0 {
			return all
		}
	}
	return find(disks, func(p gpt.Partition) bool { return p.Name == espName && p.Type == gpt.EFISystem })
}

// bootedFrom reads the variable of the Boot Loader Interface that systemd's stub
// sets: four bytes of attributes, then the partition's id in UTF-16. Empty if
// there is none.
func bootedFrom(efivars string) string {
	return strings.ToLower(loaderWord(efivars, "LoaderDevicePartUUID"))
}

// loaderWord reads a variable of the Boot Loader Interface: UTF-16 behind four bytes
// of attributes. It is empty if there is none.
func loaderWord(efivars, name string) string {
	raw, err := os.ReadFile(filepath.Join(efivars, name+"-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"))
	if err != nil || len(raw) < 4 || len(raw) > 1024 {
		return ""
	}
	var units []uint16
	for b := raw[4:]; len(b) >= 2; b = b[2:] {
		units = append(units, uint16(b[0])|uint16(b[1])<<8)
	}
	return strings.TrimRight(string(utf16.Decode(units)), "\x00")
}

const (
	blankHead = 4 << 20 // bytes that are looked at; every file system and RAID of Linux leaves a mark there ...
	blankTail = 1 << 20 // ... or here
)

// blank tells whether a disk holds nothing that anybody could have put there: a
// disk of somebody's is never formatted.
func blank(d blockDevice) (bool, error) {
	if d.parted {
		return false, nil
	}
	f, err := os.Open(d.path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	head, err := zeros(f, 0, min(blankHead, d.size))
	if err != nil || !head {
		return false, err
	}
	return zeros(f, max(0, d.size-blankTail), min(blankTail, d.size))
}

func zeros(f io.ReaderAt, at, n int64) (bool, error) {
	raw := make([]byte, 64<<10)
	for n > 0 {
		part := raw[:min(n, int64(len(raw)))]
		if _, err := f.ReadAt(part, at); err != nil {
			return false, err
		}
		for _, b := range part {
			if b != 0 {
				return false, nil
			}
		}
		at, n = at+int64(len(part)), n-int64(len(part))
	}
	return true, nil
}

// BLKPG tells the kernel of one partition, also while another of the disk is in
// use (linux/blkpg.h).
const (
	blkpg       = 0x1269
	blkpgAdd    = 1
	blkpgResize = 3
)

type blkpgPartition struct {
	start, length int64 // bytes
	number        int32
	_             [128]byte // names
	_             [4]byte
}

type blkpgArg struct {
	op, flags, length int32
	data              *blkpgPartition
}

func tellKernel(disk *os.File, op int32, p gpt.Partition) error {
	part := &blkpgPartition{start: p.First * gpt.Block, length: p.Size(), number: int32(p.Number)}
	arg := &blkpgArg{op: op, length: int32(unsafe.Sizeof(*part)), data: part}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, disk.Fd(), blkpg, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return fmt.Errorf("tell the kernel of partition %d: %w", p.Number, errno)
	}
	return nil
}

// ensureNode waits for a partition's node, and tells the kernel of a partition
// that it does not see: because it was made just now, or because a power cut left
// a table that only we understand.
func ensureNode(p partition) error {
	if waitFor(p.path, time.Second) {
		return nil
	}
	f, err := os.OpenFile(p.disk.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	none, err := zeros(f, 0, gpt.Block)
	if err == nil && none {
		_, err = f.WriteAt(gpt.ProtectiveMBR(p.disk.size), 0)
	}
	if err != nil {
		return err
	}
	if err := tellKernel(f, blkpgAdd, p.Partition); err != nil && !errors.Is(err, unix.EBUSY) {
		return err
	}
	if !waitFor(p.path, 2*time.Second) {
		return fmt.Errorf("the kernel shows no %s", p.path)
	}
	return nil
}

func waitFor(path string, limit time.Duration) bool {
	for until := time.Now().Add(limit); !exists(path); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(until) {
			return false
		}
	}
	return true
}

// reread lets the kernel read a table anew, where nothing of the disk is in use.
func reread(disk *os.File) { _, _ = unix.IoctlRetInt(int(disk.Fd()), unix.BLKRRPART) }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// readWord is the text of a small file of sysfs.
func readWord(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}
