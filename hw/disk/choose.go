package disk

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/deimos-edge/deimos/hw"
)

// lookers bounds how many disks are looked at at once.
const lookers = 32

var (
	// sound are filesystems that survive a power cut with what was synced.
	sound = []string{"ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "jfs", "nilfs2"}
	// virtual are those without storage of their own, or that are made once.
	virtual = []string{"overlay", "tmpfs", "ramfs", "devtmpfs", "aufs", "9p", "virtiofs", "nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "squashfs", "erofs", "iso9660", "udf", "cramfs"}
	// start is where a machine starts from, and system what it runs from.
	start  = []string{"/boot", "/efi"}
	system = []string{"/", "/usr", "/var", "/etc"}
	// momentary is where desktops mount what is plugged in.
	momentary = []string{"/media", "/run/media"}
)

// Choose says for each filesystem, and each disk that is not mounted, whether
// it may hold chunks and why. It writes nothing and wakes no disk. It takes
// a few seconds at most, however many disks hang.
func Choose(inv *hw.Inventory, o Options) []Candidate {
	if inv == nil {
		return nil
	}
	look := lookAt
	if inv.System.Root != "" { // a recorded machine's disks are not here
		look = func(string, string, string, bool) sight { return sight{err: errRecorded} }
	}
	var past map[string]entry
	if o.State != "" {
		past = readRecord(o.State).disks
	}
	return choose(inv, o, past, look)
}

// choice is a candidate while it is judged.
type choice struct {
	Candidate
	fs        *hw.Filesystem
	disk      *hw.Disk // nil if there is none
	state     bool     // the state folder is on it
	named     bool     // the owner consents to this mount point
	consented bool     // … or to the disk
	before    bool     // was in use before
	sight     sight
}

func choose(inv *hw.Inventory, o Options, past map[string]entry, look func(disk, mount, dir string, asleep bool) sight) []Candidate {
	home := stateMount(inv, o.State)
	all := make([]*choice, len(inv.Filesystems))
	for i := range inv.Filesystems {
		all[i] = newChoice(inv, &inv.Filesystems[i], o, home)
	}
	var wg sync.WaitGroup
	free := make(chan struct{}, lookers)
	for _, c := range all {
		if c.judge(o); c.Code != "" {
			continue
		}
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			c.sight = look(c.Disk, c.fs.Path(), c.Dir, c.asleep(past))
		})
	}
	wg.Wait()
	for _, c := range all {
		if c.Code == "" {
			c.weigh(inv, o, past)
		}
	}
	onePerDisk(all)
	out := make([]Candidate, 0, len(all))
	for _, c := range all {
		out = append(out, c.Candidate)
	}
	return append(out, unmounted(inv, o)...)
}

func newChoice(inv *hw.Inventory, f *hw.Filesystem, o Options, home string) *choice {
	c := &choice{fs: f, state: f.Path() == home}
	c.Mount, c.Disk = f.Mount, f.Disk
	c.Size, c.Free = bytesOf(f.Total), bytesOf(f.Free)
	c.Dir = filepath.Join(f.Path(), "deimos")
	if c.state {
		c.Dir = filepath.Join(o.State, "volumes", "main")
	}
	if i := slices.IndexFunc(inv.Disks, func(d hw.Disk) bool { return d.Name == f.Disk && f.Disk != "" }); i >= 0 {
		c.disk = &inv.Disks[i]
		c.Serial = c.disk.Serial
		c.System = isSystem(c.disk) && !(c.state && o.Own)
	}
	c.named = slices.ContainsFunc(o.Use, c.isMount)
	c.consented = c.named || (c.Serial != "" && slices.Contains(o.Use, c.Serial))
	c.Floor = floorOf(c.Size, c.System)
	return c
}

func bytesOf(n uint64) int64 { return int64(min(n, 1<<62)) }

func (c *choice) isMount(s string) bool {
	s = filepath.Clean(s)
	return strings.HasPrefix(s, "/") && (s == c.Mount || c.fs != nil && s == c.fs.Path())
}

// stateMount finds the filesystem that the state folder is on: of those of the
// inventory the one whose mount point is the longest beginning of its path.
func stateMount(inv *hw.Inventory, state string) string {
	best := ""
	if state == "" {
		return best
	}
	for _, f := range inv.Filesystems {
		if below(state, f.Path()) && len(f.Path()) > len(best) {
			best = f.Path()
		}
	}
	return best
}

// below tells whether a path is at or below a folder.
func below(path, dir string) bool {
	path, dir = filepath.Clean(path), filepath.Clean(dir)
	return path == dir || dir == "/" && strings.HasPrefix(path, "/") || strings.HasPrefix(path, dir+"/")
}

func isSystem(d *hw.Disk) bool {
	holds := func(mounts []string) bool {
		return slices.ContainsFunc(mounts, func(m string) bool {
			return slices.Contains(system, m) || isStart(m)
		})
	}
	return d.System || holds(d.Mounts) || slices.ContainsFunc(d.Partitions, func(p hw.Partition) bool { return holds(p.Mounts) })
}

func isStart(mount string) bool {
	return slices.ContainsFunc(start, func(s string) bool { return below(mount, s) })
}

func (c *choice) no(code, format string, args ...any) {
	c.Use, c.Capacity, c.Code, c.Why = false, 0, code, fmt.Sprintf(format, args...)
}

func (c *choice) yes(code, format string, args ...any) {
	c.Use, c.Code, c.Why = true, code, fmt.Sprintf(format, args...)
}

// ask is how an owner consents.
func (c *choice) ask() string {
	return fmt.Sprintf("to use it all the same, put %q into use of [disks] in the agent's configuration", c.Mount)
}

// judge applies the rules for which nothing needs to be read.
func (c *choice) judge(o Options) {
	switch kind := c.fs.Type; {
	case slices.Contains(virtual, kind) || strings.HasPrefix(kind, "fuse.") || strings.HasPrefix(kind, "nfs"):
		c.no(CodeVirtual, "%s is %s, which is no disk of this machine that could be counted on", c.Mount, kind)
	case c.disk == nil:
		c.no(CodeNoDisk, "no disk of this machine was found below %s (%s)", c.Mount, c.fs.Source)
	case c.never(o):
		c.no(CodeNever, "never of [disks] in the configuration names it; take it out there to use it")
	case c.fs.ReadOnly || c.disk.ReadOnly:
		c.no(CodeReadOnly, "it can only be read; if it was not mounted so on purpose, the kernel has found an error: see \"dmesg\", check it with fsck")
	case c.disk.Health != nil && c.disk.Health.Passed != nil && !*c.disk.Health.Passed:
		c.no(CodeFailing, "the disk says that it is about to fail; save what is on it and replace it")
	case isStart(c.Mount):
		c.no(CodeBoot, "the machine starts from it")
	case c.Size <= 0:
		c.no(CodeUnreadable, "its size could not be read; see \"deimos-agent probe\"")
	}
}

func (c *choice) never(o Options) bool {
	return slices.ContainsFunc(o.Never, func(s string) bool {
		return c.isMount(s) || strings.TrimPrefix(s, "/dev/") == c.Disk || (c.Serial != "" && s == c.Serial)
	})
}

// asleep tells whether a look could wake the disk. Of one that does not say
// whether it sleeps, as behind many USB bridges, only what the owner names or
// what is in use anyway is looked at.
func (c *choice) asleep(past map[string]entry) bool {
	switch c.disk.Power {
	case hw.PowerAsleep:
		return true
	case hw.PowerUnknown:
		return (c.disk.Rotational || c.disk.Bus == "usb") && !c.consented && !trusted(past, c.disk)
	}
	return false
}

// trusted tells whether any filesystem of a disk has passed its test.
func trusted(past map[string]entry, d *hw.Disk) bool {
	for key, e := range past {
		if e.Test.Passed && strings.HasPrefix(key, keyOf(d, "")) {
			return true
		}
	}
	return false
}

// weigh applies the rest, with what was seen on it.
func (c *choice) weigh(inv *hw.Inventory, o Options, past map[string]entry) {
	if e, ok := past[keyOf(c.disk, c.sight.fsid)]; ok && c.sight.fsid != "" {
		t := e.Test
		c.Test = &t
		c.before = t.Passed && (c.sight.ours || c.sight.asleep)
	}
	c.Capacity = c.sight.used + c.Free - c.Floor
	if c.refused() {
		return
	}
	allowed := c.consented || c.before
	if !allowed && c.needsConsent(inv, o) {
		return
	}
	if c.before { // what it holds stays there to be read, however full the disk is now
		c.Capacity = max(c.Capacity, c.sight.used, mib)
	}
	switch {
	case c.Capacity <= 0:
		c.no(CodeFull, "%s of %s are free, and chunks leave %s free here; make room to use it", size(c.Free), size(c.Size), size(c.Floor))
	case c.Capacity < MinCapacity && !c.before:
		c.no(CodeSmall, "only %s could hold chunks, beyond the %s that stay free; %s is the least", size(c.Capacity), size(c.Floor), size(MinCapacity))
	case c.consented:
		c.yes(CodeConsent, "the owner says so")
	case !o.Auto:
		c.no(CodeNotAsked, "it could be used; put %q into use of [disks] in the configuration, or set auto there", c.Mount)
	case c.before:
		c.yes(CodeInUse, "it was in use before")
	case c.System:
		c.yes(CodeOnly, "the system is on it, but %s stay free, and %s", size(c.Floor), onlyReason(o))
	default:
		c.yes(CodeOK, "nothing else is on it")
	}
}

func onlyReason(o Options) string {
	if o.Board.Disks.System {
		return "the board's profile allows it"
	}
	return "there is no other disk"
}

// refused holds for what no consent helps against.
func (c *choice) refused() bool {
	switch {
	case c.sight.err != nil:
		c.no(CodeUnreadable, "%s", c.sight.err)
	case c.sight.asleep && !c.before && c.disk.Power == hw.PowerUnknown:
		c.no(CodeAsleep, "the disk does not say whether it sleeps, and was not looked at, so as not to wake it; %s", c.ask())
	case c.sight.asleep && !c.before:
		c.no(CodeAsleep, "the disk sleeps and was not looked at, so as not to wake it; use it once and start the agent again")
	default:
		return false
	}
	return true
}

// needsConsent gives the reason why an owner has to be asked.
func (c *choice) needsConsent(inv *hw.Inventory, o Options) bool {
	switch {
	case !slices.Contains(sound, c.fs.Type):
		c.no(CodeWeak, "%s loses data in a power cut: it cannot sync and rename well; ext4 can, but making it erases the disk; %s", c.fs.Type, c.ask())
	case slices.Contains(o.Board.Disks.Never, c.disk.Bus):
		c.no(CodeBus, "the profile of this board (%s) excludes disks of the kind %s, which wear out by being written to; %s", o.Board.Name, c.disk.Bus, c.ask())
	case c.System && !c.state:
		c.no(CodeSystem, "it is another part of the disk that the system is on; %s", c.ask())
	case c.System && !o.Board.Disks.System && others(inv, c.disk):
		c.no(CodeSystem, "the system is on it, and there are other disks; mount one of them for chunks, or %s", c.ask())
	case c.System, c.state && o.Own:
		return false // whatever else is on it is the system's, or ours
	case slices.ContainsFunc(momentary, func(m string) bool { return below(c.Mount, m) }):
		c.no(CodeTemporary, "it is mounted where a desktop puts what is plugged in for a moment; mount it elsewhere for good, in /etc/fstab, or %s", c.ask())
	case c.disk.Removable && !c.sight.ours:
		c.no(CodeRemovable, "it is a medium that is made to be taken out; %s", c.ask())
	case len(c.sight.foreign) > 0 && !c.ownState(o):
		c.no(CodeForeign, "somebody's data is on it (%s); %s: nothing of that is touched", strings.Join(c.sight.foreign, ", "), c.ask())
	default:
		return false
	}
	return true
}

// ownState tells whether all that is on a disk belongs to the agent's state.
func (c *choice) ownState(o Options) bool {
	if !c.state {
		return false
	}
	rel, err := filepath.Rel(c.fs.Path(), filepath.Clean(o.State))
	if err != nil {
		return false
	}
	first, _, _ := strings.Cut(rel, "/")
	return first == "." || !slices.ContainsFunc(c.sight.foreign, func(name string) bool { return name != shown(first) })
}

// others tells whether the machine has another disk that could hold chunks.
func others(inv *hw.Inventory, d *hw.Disk) bool {
	return slices.ContainsFunc(inv.Disks, func(o hw.Disk) bool {
		return o.Name != d.Name && !o.Removable && !o.ReadOnly && !isSystem(&o) && o.Size >= MinCapacity
	})
}

// onePerDisk leaves one filesystem of each disk in use: one that was in use
// before, one that the owner names, else the largest.
func onePerDisk(all []*choice) {
	best := map[string]*choice{}
	for _, c := range all {
		if !c.Use {
			continue
		}
		b := best[c.Disk]
		if b == nil || cmp.Or(order(c.before, b.before), order(c.named, b.named), cmp.Compare(c.Capacity, b.Capacity)) > 0 {
			best[c.Disk] = c
		}
	}
	for _, c := range all {
		if b := best[c.Disk]; c.Use && b != c {
			c.no(CodeSecond, "it is on the same disk as %s, which is used: two on one disk would fail together", b.Mount)
		}
	}
}

// order is positive if a holds and b does not.
func order(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// unmounted lists the disks and partitions that nobody has mounted.
func unmounted(inv *hw.Inventory, o Options) []Candidate {
	var all []Candidate
	for i := range inv.Disks {
		d := &inv.Disks[i]
		add := func(name string, bytes uint64, what string) {
			c := choice{disk: d}
			c.Disk, c.Serial, c.System, c.Size = d.Name, d.Serial, isSystem(d), bytesOf(bytes)
			if c.never(o) {
				c.no(CodeNever, "/dev/%s: never of [disks] in the configuration names it", name)
			} else {
				c.no(CodeNotMounted, "/dev/%s %s; to use it: put a filesystem on it if it is empty (\"mkfs.ext4 /dev/%s\" erases all of it), mount it for good, in /etc/fstab, and start the agent again", name, what, name)
			}
			all = append(all, c.Candidate)
		}
		if len(d.Partitions) == 0 && len(d.Mounts) == 0 && d.Size >= MinCapacity {
			add(d.Name, d.Size, "is not mounted and has no partitions")
		}
		for _, p := range d.Partitions {
			if len(p.Mounts) == 0 && len(d.Mounts) == 0 && p.Size >= MinCapacity {
				add(p.Name, p.Size, "is not mounted; what is on it was not looked at and may be swap, encrypted or part of a RAID")
			}
		}
	}
	return all
}

// size says a size to a person, as on a disk's label.
func size(n int64) string {
	switch {
	case n >= 1e12:
		return fmt.Sprintf("%.1f TB", float64(n)/1e12)
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	}
	return fmt.Sprintf("%.0f MB", float64(max(n, 0))/1e6)
}
