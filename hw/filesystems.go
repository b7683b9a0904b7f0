package hw

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is one line of mountinfo.
type mount struct {
	dev      string // major:minor
	root     string // directory of the filesystem that is mounted; not "/" for bind mounts
	point    string
	readOnly bool
	fstype   string
	source   string
}

// parseMountinfo reads /proc/self/mountinfo (proc(5)). Lines that are not of
// that form are left out:
//
//	36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
func parseMountinfo(raw []byte) []mount {
	var all []mount
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		sep := slices.Index(f, "-")
		if sep < 6 || len(f) < sep+3 {
			continue
		}
		m := mount{dev: f[2], root: unescape(f[3]), point: unescape(f[4]), fstype: clean(f[sep+1]), source: clean(unescape(f[sep+2]))}
		options := strings.Split(f[5], ",")
		if len(f) > sep+3 {
			options = append(options, strings.Split(f[sep+3], ",")...)
		}
		m.readOnly = slices.Contains(options, "ro")
		all = append(all, m)
	}
	return all
}

// unescape undoes the kernel's octal escapes of space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func (p *prober) filesystems(ctx context.Context) (func(*Inventory), notes) {
	var missing notes
	raw, err := p.bytes("proc/self/mountinfo")
	if err != nil {
		code, text := reason(err)
		missing.add("filesystems", code, "", "the list of mounts "+text)
	}
	found := []Filesystem{}
	for _, fs := range onThisMachine(parseMountinfo(raw), nodevTypes(p.tree)) {
		fs.Disk, fs.below = diskBelow(p.tree, fs.dev, 0), disksBelow(p.tree, fs.dev, 0)
		if p.live() {
			u, err := diskUsage(ctx, p, fs.Mount)
			if err != nil {
				code, text := reason(err)
				missing.add("filesystems", code, clean(fs.Mount), "its size: "+text)
			}
			fs.Total, fs.Used, fs.Free = u.Total, u.Used, u.Free
		}
		fs.path, fs.Mount = fs.Mount, clean(fs.Mount)
		for i := range fs.mounts {
			fs.mounts[i] = clean(fs.mounts[i])
		}
		found = append(found, fs)
	}
	return func(inv *Inventory) { inv.Filesystems = found }, missing
}

// nodevTypes reads which types of filesystem have no storage of their own, from /proc/filesystems.
func nodevTypes(t tree) map[string]bool {
	raw, _ := t.bytes("proc/filesystems")
	types := map[string]bool{}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "nodev" && f[1] != "zfs" {
			types[f[1]] = true
		}
	}
	// Those that matter even if the list could not be read.
	for _, name := range []string{"proc", "sysfs", "tmpfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "overlay"} {
		types[name] = true
	}
	return types
}

// onThisMachine picks the filesystems with storage on this machine, one entry
// each however often it is mounted. The root is shown whatever it is. Images
// that are mounted from files (snaps) are not storage.
func onThisMachine(mounts []mount, nodev map[string]bool) []Filesystem {
	var found []Filesystem
	for _, m := range mounts {
		image := strings.HasPrefix(m.source, "/dev/loop") && m.readOnly
		if m.point != "/" && (nodev[m.fstype] || strings.HasPrefix(m.fstype, "fuse.") || image) {
			continue
		}
		whole := m.root == "/"
		i := slices.IndexFunc(found, func(f Filesystem) bool { return f.dev == m.dev && f.Source == m.source })
		if i < 0 {
			found = append(found, Filesystem{
				Mount: m.point, Source: m.source, Type: m.fstype, ReadOnly: m.readOnly,
				dev: m.dev, mounts: []string{m.point}, whole: whole,
			})
			continue
		}
		f := &found[i]
		f.mounts = appendNew(f.mounts, []string{m.point})
		if better := whole && !f.whole; better || (whole == f.whole && len(m.point) < len(f.Mount)) {
			f.Mount, f.whole = m.point, whole
		}
		f.ReadOnly = f.ReadOnly && m.readOnly // a read-only view does not make the filesystem so
	}
	// Of mounts on top of each other only the last is visible.
	slices.Reverse(found)
	seen := map[string]bool{}
	found = slices.DeleteFunc(found, func(f Filesystem) bool {
		hidden := seen[f.Mount]
		seen[f.Mount] = true
		return hidden
	})
	slices.SortFunc(found, func(a, b Filesystem) int { return cmp.Compare(a.Mount, b.Mount) })
	return found
}

// disksBelow follows a device that is made of others (LVM, encryption, RAID)
// down to the disks and partitions; none if it is one itself.
func disksBelow(t tree, dev string, depth int) []string {
	at := "sys/dev/block/" + dev
	if depth > 8 { // the kernel allows fewer layers
		return nil
	}
	var all []string
	for _, below := range t.list(at + "/slaves") {
		var deeper []string
		if next := t.word(at + "/slaves/" + below + "/dev"); next != "" && next != dev {
			deeper = disksBelow(t, next, depth+1)
		}
		if len(deeper) == 0 {
			deeper = []string{below}
		}
		if all = appendNew(all, deeper); len(all) > 1000 { // two layers that are made of each other
			break
		}
	}
	return all
}

// diskBelow is the first of them; "" if there is none.
func diskBelow(t tree, dev string, depth int) string {
	if below := disksBelow(t, dev, depth); len(below) > 0 {
		return below[0]
	}
	return ""
}

// Usage is how full a filesystem is, in bytes.
type Usage struct {
	Total uint64 `json:"total"`
	Used  uint64 `json:"used"`
	Free  uint64 `json:"free"` // that an ordinary user can still write
}

// diskUsage may hang on a filesystem whose disk does.
func diskUsage(ctx context.Context, p *prober, path string) (Usage, error) {
	type answer struct {
		u   Usage
		err error
	}
	a, err := within(ctx, p.limit, "statfs "+path, func() answer {
		var st unix.Statfs_t
		_, err := retry(func() (int, error) { return 0, unix.Statfs(path, &st) })
		if err != nil {
			return answer{err: err}
		}
		size := uint64(cmp.Or(st.Frsize, st.Bsize)) // blocks are counted in Frsize, where there is one
		return answer{u: Usage{
			Total: st.Blocks * size,
			Used:  (st.Blocks - min(st.Bfree, st.Blocks)) * size,
			Free:  min(st.Bavail, st.Blocks) * size,
		}}
	})
	if err != nil {
		return Usage{}, err
	}
	return a.u, a.err
}
