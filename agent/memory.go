package agent

import (
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/orders"
)

// bulkMemory is what chunks under way may hold, in bytes: a 32nd of what this
// process may have, within bounds.
func bulkMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return orders.LeastMemory
	}
	machine := int64(info.Totalram) * int64(max(1, info.Unit))
	return bulkShare(min(machine, cgroupMemory("/")))
}

func bulkShare(memory int64) int64 {
	return min(max(memory/32, orders.LeastMemory), orders.DefaultMemory)
}

// cgroupMemory is the least memory, in bytes, that a cgroup of this process or one
// above it may have, of either version; [math.MaxInt64] without a limit. Above what
// is mounted here, as in a container, nobody can look.
//
// Formats: cgroups(7), proc_pid_cgroup(5), proc_pid_mountinfo(5). root is "/", or a
// made-up machine.
func cgroupMemory(root string) int64 {
	in, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return math.MaxInt64
	}
	mounts, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return math.MaxInt64
	}
	least := int64(math.MaxInt64)
	for line := range strings.Lines(string(in)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3) // hierarchy:controllers:path
		if len(f) < 3 {
			continue
		}
		switch {
		case f[0] == "0" && f[1] == "":
			least = min(least, leastAbove(root, hierarchy(mounts, "cgroup2", ""), f[2], "memory.max", "memory.high"))
		case slices.Contains(strings.Split(f[1], ","), "memory"):
			least = min(least, leastAbove(root, hierarchy(mounts, "cgroup", "memory"), f[2], "memory.limit_in_bytes"))
		}
	}
	return least
}

// cgroupMount is where cgroups are mounted: the folder point shows the cgroup top.
type cgroupMount struct{ top, point string }

// hierarchy finds where cgroups of a type are mounted, with that option; the zero
// value if they are not.
func hierarchy(mountinfo []byte, fstype, option string) cgroupMount {
	for line := range strings.Lines(string(mountinfo)) {
		f := strings.Fields(line)
		sep := slices.Index(f, "-")
		if sep < 6 || len(f) < sep+4 || f[sep+1] != fstype {
			continue
		}
		if option == "" || slices.Contains(strings.Split(f[sep+3], ","), option) {
			return cgroupMount{f[3], f[4]}
		}
	}
	return cgroupMount{}
}

// leastAbove is the least number in the files with these names, from the cgroup's
// own folder up to what is mounted.
func leastAbove(root string, m cgroupMount, cgroup string, names ...string) int64 {
	least := int64(math.MaxInt64)
	if m.point == "" {
		return least
	}
	below, ok := strings.CutPrefix(cgroup, strings.TrimSuffix(m.top, "/"))
	if !ok || below != "" && below[0] != '/' { // of a cgroup that is not shown here, the one that is
		below = ""
	}
	for at := path.Clean("/" + below); ; at = path.Dir(at) {
		for _, name := range names {
			raw, err := os.ReadFile(filepath.Join(root, m.point, at, name))
			if err != nil {
				continue // no limits at the top, or not of memory
			}
			if n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64); err == nil { // not "max"
				least = min(least, n)
			}
		}
		if at == "/" {
			return least
		}
	}
}
