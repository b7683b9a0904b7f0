package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/packaging/init/gpt"
)

// leastData is the smallest data partition that is made, bytes: a journal of
// ext4, the agent's state and its floor.
const leastData = 512 << 20

// dataNote is the file on the ESP that names the data partition once it was
// mounted for the first time. It stands for two things that must not be guessed:
// which partition is awaited, so that a disk that answers late does not get the
// device a second identity, and that the partition has held data, so that it is
// never formatted. One that is there and says nothing stands for both, too.
const dataNote = "deimos-data.id"

// freshNote is the file on the ESP that names a partition before it is made: until
// it is formatted, nothing of anybody's is in it, and a first boot that was cut off
// while it formatted is begun again. It is removed before the partition is mounted. A partition that no note names is formatted
// only if it is empty: either note can be lost with the ESP's file system.
const freshNote = "deimos-data.new"

// promptSettle is how long a disk may take whose driver finds it while it is
// loaded; its partitions are read after.
const promptSettle = time.Second

// disksComeLate tells whether the machine has a bus whose disks may show up
// seconds after its driver was loaded: SCSI, which SATA and USB storage go by,
// cards, USB itself, and NVMe controllers whose disk is not there yet.
func disksComeLate(sys string) bool {
	for _, bus := range []string{"class/scsi_host", "class/mmc_host", "bus/usb/devices"} {
		if some, _ := os.ReadDir(filepath.Join(sys, bus)); len(some) > 0 {
			return true
		}
	}
	controllers, _ := filepath.Glob(filepath.Join(sys, "class/nvme/nvme*"))
	return slices.ContainsFunc(controllers, func(c string) bool {
		disks, _ := filepath.Glob(filepath.Join(c, "nvme*n*"))
		return len(disks) == 0
	})
}

// errNoData is for a machine that will run from memory.
var errNoData = errors.New("there is no place for data")

// dataDisk finds, makes, checks and grows the data partition. All of it runs
// before anything is mounted but the ESP.
type dataDisk struct {
	disks     func() []blockDevice
	processes *processes
	log       *slog.Logger
	boot      string        // path of the disk that the machine was started from; "" if not known
	esp       string        // where the ESP is mounted; "" if it is not
	lost      bool          // there is an ESP that cannot be used: nobody knows what it says of the data
	bootOnly  bool          // which device's ESP it is cannot be told: other disks may be another device's
	settle    time.Duration // how long a disk may take to answer
	late      func() bool   // whether there is hardware whose disks come late; nil: there may be
	node      func(p partition) error
	tool      func(name string) string // path of a program of e2fsprogs
	moved     func()                   // is called while such a program reads and writes; nil: nobody asks
	synced    func(path string)        // a test's: what is made durable now
	unread    time.Time                // since when the disk has failed to read; zero: it does not
}

// prepare returns the partition, ready to be mounted.
func (d *dataDisk) prepare(ctx context.Context) (partition, error) {
	known, lost := d.note()
	p, found := d.await(ctx, known)
	switch all := d.fitting(known); {
	case !found && len(all) > 1:
		return p, fmt.Errorf("%w: there are several data partitions that may be this device's, and which one is cannot be told: %s; remove the others", errNoData, paths(all))
	case !found && lost && d.esp != "":
		return p, fmt.Errorf("%w: %s on the first partition cannot be read, which would say where the data is, and no data partition is found", errNoData, dataNote)
	case !found && lost:
		return p, fmt.Errorf("%w: the EFI system partition cannot be used, which would say where the data is, and no data partition is found", errNoData)
	case !found && known != "":
		return p, fmt.Errorf("%w: the disk with the data partition %s of this device is missing; put it back, or write the image anew", errNoData, known)
	case !found:
		var err error
		if p, err = d.make(); err != nil {
			return p, err
		}
	default:
		p = d.grow(p)
	}
	if err := d.node(p); err != nil {
		return p, err
	}
	return p, d.ready(ctx, p, !found, known != "" || lost)
}

// hadData tells whether this device has a data partition or may have had one,
// wherever that is now: another one would be another device.
func (d *dataDisk) hadData() bool {
	known, lost := d.note()
	return known != "" || lost || len(d.fitting("")) > 0
}

// note is the id of the partition that was used before; "" if there was none. It is
// lost where there may have been one and nobody can tell: what is found is used then,
// and nothing made or formatted.
func (d *dataDisk) note() (known string, lost bool) {
	if d.esp == "" {
		return "", d.lost
	}
	raw, err := os.ReadFile(filepath.Join(d.esp, dataNote))
	if errors.Is(err, os.ErrNotExist) {
		return "", false
	}
	known = strings.TrimSpace(string(raw))
	if err != nil || !isGUID.MatchString(known) {
		return "", true
	}
	return known, false
}

var isGUID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// remember notes a partition that is mounted.
func (d *dataDisk) remember(p partition) error {
	if known, _ := d.note(); d.esp == "" || known == p.ID.String() {
		return nil
	}
	return d.write(dataNote, p.ID)
}

// noLongerNew removes the note that a partition may be formatted, before somebody's
// data can be in it.
func (d *dataDisk) noLongerNew() {
	if d.esp == "" {
		return
	}
	err := os.Remove(filepath.Join(d.esp, freshNote))
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err = errors.Join(err, d.sync(d.esp)); err != nil {
		d.log.Warn("the note that the data partition is new cannot be removed", "file", freshNote, "error", err)
	}
}

func (d *dataDisk) write(note string, id gpt.GUID) error {
	path := filepath.Join(d.esp, note)
	if err := renameio.WriteFile(path, []byte(id.String()+"\n"), 0o600, renameio.WithTempDir(d.esp)); err != nil {
		return fmt.Errorf("note which partition holds the data: %w", err)
	}
	// On FAT a renamed file is empty until it is synced itself.
	return errors.Join(d.sync(path), d.sync(d.esp))
}

func (d *dataDisk) sync(path string) error {
	if d.synced != nil {
		d.synced(path)
	}
	return syncPath(path)
}

// syncPath makes a file or a folder durable.
func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// await looks for the partition until it is there, or time is up. Without a note,
// one that is there already is enough, and where no disk comes late the time is short.
func (d *dataDisk) await(ctx context.Context, known string) (partition, bool) {
	until := time.Now().Add(d.settle)
	if known == "" && d.late != nil && !d.late() {
		until = time.Now().Add(min(d.settle, promptSettle))
	}
	for {
		if p, ok := d.find(known); ok {
			return p, true
		}
		if time.Now().After(until) || ctx.Err() != nil {
			return partition{}, false
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// find is the partition, where that can be told: of copies, such as of a disk that was
// copied as a whole and left in the machine, the one beside the ESP.
func (d *dataDisk) find(known string) (partition, bool) {
	all := d.fitting(known)
	for _, p := range all {
		if p.disk.path == d.boot {
			return p, true
		}
	}
	if len(all) != 1 {
		return partition{}, false
	}
	return all[0], true
}

// fitting are the partitions with the id that is known, else those with our name.
func (d *dataDisk) fitting(known string) []partition {
	all := find(d.disks(), func(p gpt.Partition) bool {
		if known != "" {
			return p.ID.String() == known
		}
		return p.Name == dataName && p.Type == gpt.LinuxData
	})
	if known == "" && d.bootOnly {
		all = slices.DeleteFunc(all, func(p partition) bool { return p.disk.path != d.boot })
	}
	return all
}

func paths(all []partition) string {
	var names []string
	for _, p := range all {
		names = append(names, p.path)
	}
	return strings.Join(names, ", ")
}

// make adds the partition: on the largest empty disk, else behind the ESP.
func (d *dataDisk) make() (partition, error) {
	var why []error
	for _, disk := range d.candidates() {
		p, err := d.makeOn(disk)
		if err == nil {
			d.log.Info("made the data partition", "partition", p.path, "bytes", p.Size())
			return p, nil
		}
		why = append(why, fmt.Errorf("%s: %w", disk.path, err))
	}
	return partition{}, errors.Join(append([]error{errNoData}, why...)...)
}

func (d *dataDisk) candidates() []blockDevice {
	var empty, boot []blockDevice
	for _, disk := range d.disks() {
		switch {
		case disk.block != gpt.Block:
			d.log.Warn("a disk has blocks of a size that is not supported; it is left alone", "disk", disk.path, "bytes", disk.block)
		case disk.path == d.boot && disk.table != nil:
			boot = append(boot, disk)
		case d.bootOnly || disk.removable || disk.size < leastData+4<<20:
		default:
			is, err := blank(disk)
			if err != nil {
				d.log.Warn("a disk cannot be read; it is left alone", "disk", disk.path, "error", err)
			} else if is {
				empty = append(empty, disk)
			}
		}
	}
	slices.SortStableFunc(empty, func(a, b blockDevice) int { return cmp.Compare(b.size, a.size) })
	return append(empty, boot...)
}

func (d *dataDisk) makeOn(disk blockDevice) (partition, error) {
	f, err := os.OpenFile(disk.path, os.O_RDWR, 0)
	if err != nil {
		return partition{}, err
	}
	defer f.Close()
	table := disk.table
	if table == nil {
		table = gpt.New(newGUID())
	}
	p, err := table.Append(disk.size, gpt.LinuxData, newGUID(), dataName, leastData)
	if err != nil {
		return partition{}, err
	}
	if d.esp != "" {
		if err := d.write(freshNote, p.ID); err != nil {
			d.log.Warn("if the power is cut while the data partition is made, it may have to be made by hand", "error", err)
		}
	}
	if err := clearFront(f, p.First*gpt.Block); err != nil {
		return partition{}, err
	}
	if err := table.Write(f, disk.size); err != nil {
		return partition{}, err
	}
	if disk.table == nil { // last: without it, nothing reads the table
		if _, err := f.WriteAt(gpt.ProtectiveMBR(disk.size), 0); err != nil {
			return partition{}, err
		}
		if err := f.Sync(); err != nil {
			return partition{}, err
		}
	}
	return partition{disk: disk, Partition: p, path: partitionPath(disk.path, p.Number)}, tellKernel(f, blkpgAdd, p)
}

// grow lets the partition end where its disk ends. A disk that cannot be grown
// is used as it is.
func (d *dataDisk) grow(p partition) partition {
	larger, ok := p.disk.table.Grow(p.disk.size, p.Number)
	if !ok {
		return p
	}
	f, err := os.OpenFile(p.disk.path, os.O_RDWR, 0)
	if err == nil {
		defer f.Close()
		if err = p.disk.table.Write(f, p.disk.size); err == nil {
			err = tellKernel(f, blkpgResize, larger)
		}
	}
	if err != nil {
		d.log.Warn("the disk has grown, but the data partition could not", "partition", p.path, "error", err)
		return p
	}
	d.log.Info("the data partition grows with its disk", "partition", p.path, "bytes", larger.Size())
	p.Partition = larger
	return p
}

// clearFront removes what stood at the front of a new partition: where the image
// was written over an older one, the device of that would come back.
func clearFront(disk *os.File, at int64) error {
	if is, err := zeros(disk, at, 1<<20); err != nil || is {
		return err
	}
	if _, err := disk.WriteAt(make([]byte, 1<<20), at); err != nil {
		return err
	}
	return disk.Sync()
}

// ready formats a partition that never held anything, else checks its file
// system and lets it fill the partition.
func (d *dataDisk) ready(ctx context.Context, p partition, made, used bool) error {
	fs, err := readExt4(p.path)
	if err != nil {
		return err
	}
	if fs == 0 && !used {
		never := made || d.esp != "" && readWord(filepath.Join(d.esp, freshNote)) == p.ID.String()
		if !never {
			if never, err = emptyPartition(p); err != nil {
				return err
			}
		}
		if never {
			if err := d.format(ctx, p); err != nil {
				return err
			}
			d.noLongerNew()
			return nil
		}
	}
	d.noLongerNew()
	if err := d.check(ctx, p, "-p"); err != nil {
		d.log.Warn("the data partition needs a thorough repair", "partition", p.path, "error", err)
		if err := d.repair(ctx, p); err != nil {
			return fmt.Errorf("%w: the file system of %s cannot be repaired, and is not formatted, because it may hold data: %w", errNoData, p.path, err)
		}
	}
	if fs, err = readExt4(p.path); err != nil {
		return err
	}
	if fs+1<<20 > p.Size() {
		return nil
	}
	return d.resize(ctx, p)
}

// emptyPartition tells whether nothing says that there was a file system: neither
// the front nor one of the first copies of ext4's superblock, which begin the
// groups 1, 3, 5 and 7 (Documentation/filesystems/ext4/super.rst).
func emptyPartition(p partition) (bool, error) {
	f, err := os.Open(p.path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if is, err := zeros(f, 0, 1<<20); err != nil || !is {
		return false, err
	}
	for _, group := range []int64{1, 3, 5, 7} {
		at := group * ext4Group
		if at+1024 > p.Size() {
			break
		}
		if is, err := zeros(f, at, 1024); err != nil || !is {
			return false, err
		}
	}
	return true, nil
}

// ext4Group is the size of a block group, bytes: 8 blocks of 4096 bytes for each byte
// of the block that is its bitmap. All file systems from 512 MiB have such blocks.
const ext4Group = 8 * 4096 * 4096

func (d *dataDisk) format(ctx context.Context, p partition) error {
	code, text, err := d.processes.runTold(ctx, readSome, d.moved, d.tool("mke2fs"), "-q", "-F", "-t", "ext4", "-L", dataName, "-m", "1",
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", p.path)
	return toolError("mke2fs", code, text, err)
}

// check runs e2fsck, whose codes 1 and 2 say that it has repaired.
func (d *dataDisk) check(ctx context.Context, p partition, flags ...string) error {
	code, text, err := d.processes.runTold(ctx, readSome, d.moved, append(append([]string{d.tool("e2fsck")}, flags...), p.path)...)
	if err == nil && (code == 1 || code == 2) {
		d.log.Warn("the data partition was repaired", "partition", p.path, "said", text)
		return nil
	}
	return toolError("e2fsck", code, text, err)
}

// readPatience is how long a disk may fail to read before what it does not read is
// given up. A loose cable, a weak supply, or heat may pass.
const readPatience = 24 * time.Hour

// repair runs e2fsck -y, which says yes to everything. Of a block that cannot be read,
// it is asked whether to ignore that and to write zeros there: the files whose inodes
// are in it are gone then, though the disk may read it again a minute later. So a pass
// that writes nothing goes first, and while that fails to read, nothing is repaired.
func (d *dataDisk) repair(ctx context.Context, p partition) error {
	_, fails, err := d.processes.runTold(ctx, readFault, d.moved, d.tool("e2fsck"), "-n", "-f", p.path)
	switch {
	case err != nil:
		return err
	case fails == "":
		d.unread = time.Time{}
	case d.unread.IsZero():
		d.unread = time.Now()
		fallthrough
	case time.Since(d.unread) < readPatience:
		return fmt.Errorf("the disk fails to read: %s; check its cable and its supply; what still cannot be read after %s is given up", clean(fails), readPatience)
	default:
		d.log.Error("the disk still fails to read; what it does not read is given up", "partition", p.path, "since", d.unread, "said", fails)
	}
	return d.check(ctx, p, "-y", "-f")
}

// readFault is the first line of e2fsck's that tells of something that could not be
// read; "" if there is none. "Error reading block N (why) while …" is its answer to any
// error of the disk (e2fsck/ehandler.c), the rest stands in e2fsck/problem.c and libext2fs.
func readFault(r io.Reader) (fault string) {
	lines := bufio.NewReaderSize(r, toolText)
	for {
		line, err := lines.ReadString('\n')
		lower := strings.ToLower(line)
		if fault == "" && slices.ContainsFunc(readFaults, func(f string) bool { return strings.Contains(lower, f) }) {
			fault = strings.TrimSpace(line)
		}
		if err != nil {
			return fault
		}
	}
}

var readFaults = []string{"error reading", "error while reading", "can't read", "short read", "input/output error"}

// resize never fails the boot: the file system is whole before and after.
func (d *dataDisk) resize(ctx context.Context, p partition) error {
	err := d.check(ctx, p, "-p", "-f") // resize2fs insists
	if err == nil {
		code, text, runErr := d.processes.runTold(ctx, readSome, d.moved, d.tool("resize2fs"), p.path)
		err = toolError("resize2fs", code, text, runErr)
	}
	if err != nil {
		d.log.Warn("the file system of the data partition could not grow; it is used as it is", "partition", p.path, "error", err)
	}
	return nil
}

func toolError(name string, code int, text string, err error) error {
	if err == nil && code != 0 {
		err = fmt.Errorf("%s exited with code %d: %s", name, code, clean(strings.ReplaceAll(text, "\n", "; ")))
	}
	return err
}

// readExt4 is the size of the ext4 file system that begins at the front of a
// partition, in bytes; 0 if there is none. Its superblock stands at byte 1024
// (Documentation/filesystems/ext4/super.rst).
func readExt4(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	if binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
		return 0, nil
	}
	blocks := int64(binary.LittleEndian.Uint32(sb[0x4:]))
	if binary.LittleEndian.Uint32(sb[0x60:])&0x80 != 0 { // INCOMPAT_64BIT
		blocks |= int64(binary.LittleEndian.Uint32(sb[0x150:])) << 32
	}
	if shift := binary.LittleEndian.Uint32(sb[0x18:]); shift <= 6 {
		return blocks << (10 + shift), nil
	}
	return 0, nil
}

// repairTables makes primary and backup tables of our own disks alike; a power
// cut may have come while one was written.
func repairTables(disks []blockDevice, log *slog.Logger) {
	for _, disk := range disks {
		if disk.table == nil {
			continue
		}
		_, esp := disk.table.Find(espName)
		_, data := disk.table.Find(dataName)
		if !esp && !data {
			continue
		}
		f, err := os.OpenFile(disk.path, os.O_RDWR, 0)
		if err != nil {
			log.Warn("a disk cannot be written", "disk", disk.path, "error", err)
			continue
		}
		repaired, err := gpt.Repair(f, disk.size)
		switch {
		case err != nil:
			log.Warn("a partition table cannot be repaired", "disk", disk.path, "error", err)
		case repaired:
			log.Info("the two copies of a partition table are alike again", "disk", disk.path)
			reread(f)
		}
		f.Close()
	}
}

// newGUID is random (RFC 9562, version 4).
func newGUID() gpt.GUID {
	var g gpt.GUID
	_, _ = rand.Read(g[:]) // never fails
	g[7] = g[7]&0x0f | 0x40
	g[8] = g[8]&0x3f | 0x80
	return g
}

// mountData mounts the partition; data=ordered and barriers are ext4's defaults.
func mountData(p partition, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(p.path, dir, "ext4", unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID, "errors=remount-ro"); err != nil {
		return fmt.Errorf("mount %s: %w", p.path, err)
	}
	return nil
}

const (
	faultsLook  = time.Minute
	faultsLeast = 10 * time.Minute // between two starts of the machine for faults of a disk
)

// watchFaults starts the machine anew when ext4 has found faults in the data
// partition since it was mounted: it is read-only from then on, and only a check
// before it is mounted again helps. The number is in a file of sysfs: statfs and
// mount flags do not tell, since Linux 6.12.
func watchFaults(ctx context.Context, count string, every, least time.Duration, restart func(why string), log *slog.Logger) {
	began, before := time.Now(), readWord(count)
	for sleep(ctx, every) {
		now := readWord(count)
		if now == before || now == "" || before == "" {
			before = now
			continue
		}
		wait := least - time.Since(began)
		log.Error("the file system of the data partition has faults; the machine is started anew to repair it", "faults", clean(now), "in", max(wait, 0).Round(time.Second))
		if sleep(ctx, wait) {
			restart("the file system of the data partition has faults")
		}
		return
	}
}
