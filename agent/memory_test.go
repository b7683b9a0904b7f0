package agent

import (
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/orders"
)

// Mounts of cgroups, as proc_pid_mountinfo(5) has them.
const (
	v2Mount       = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
	v1Mount       = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
	v1CPU         = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
	unifiedMount  = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
	boundMount    = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro,relatime master:11 - cgroup cgroup rw,memory\n"
	rootMount     = "22 1 254:1 / / rw,relatime - ext4 /dev/root rw\n"
	v1Unlimited   = "9223372036854771712\n"
	service       = "/sys/fs/cgroup/system.slice/deimos-agent.service/"
	aGiB, halfGiB = 1 << 30, 1 << 29
)

func TestTheLeastLimitOfACgroupAndThoseAboveItCounts(t *testing.T) {
	for name, c := range map[string]struct {
		in, mounts string
		files      map[string]string
		want       int64
	}{
		"none": {"0::/\n", rootMount + v2Mount, nil, math.MaxInt64},
		"its own": {"0::/system.slice/deimos-agent.service\n", rootMount + v2Mount,
			map[string]string{service + "memory.max": "536870912\n", "/sys/fs/cgroup/system.slice/memory.max": "max\n"}, halfGiB},
		"a parent's": {"0::/system.slice/deimos-agent.service\n", rootMount + v2Mount,
			map[string]string{service + "memory.max": "1073741824\n", "/sys/fs/cgroup/system.slice/memory.max": "536870912\n"}, halfGiB},
		"of a container, at its top": {"0::/\n", v2Mount, map[string]string{"/sys/fs/cgroup/memory.max": "536870912\n"}, halfGiB},
		"where it is slowed down": {"0::/system.slice/deimos-agent.service\n", v2Mount,
			map[string]string{service + "memory.max": "1073741824\n", service + "memory.high": "536870912\n"}, halfGiB},
		"a neighbour's does not": {"0::/system.slice/deimos-agent.service\n", v2Mount,
			map[string]string{service + "memory.max": "1073741824\n", "/sys/fs/cgroup/system.slice/other.service/memory.max": "1000\n", service + "below/memory.max": "1000\n"}, aGiB},
		"no limit in words": {"0::/system.slice/deimos-agent.service\n", v2Mount, map[string]string{service + "memory.max": "max\n"}, math.MaxInt64},
		"of version 1": {"5:cpu:/a\n4:memory:/a/b\n0::/\n", v1CPU + v1Mount + unifiedMount,
			map[string]string{"/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": v1Unlimited, "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "536870912\n",
				"/sys/fs/cgroup/cpu/a/memory.limit_in_bytes": "1000\n"}, halfGiB},
		"of version 1, with another controller": {"4:cpu,memory:/a\n", v1Mount,
			map[string]string{"/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "536870912\n"}, halfGiB},
		"of version 1 in a container": {"4:memory:/docker/abc/x\n", boundMount,
			map[string]string{"/sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": v1Unlimited}, halfGiB},
		"of a cgroup that is not shown here": {"4:memory:/docker/abcd/x\n", boundMount,
			map[string]string{"/sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n", "/sys/fs/cgroup/memory/d/x/memory.limit_in_bytes": "1000\n"}, halfGiB},
		"lines that nobody knows": {"what\n\n0::/a\n", "x\n\n" + v2Mount, map[string]string{"/sys/fs/cgroup/a/memory.max": "536870912\n"}, halfGiB},
	} {
		root := t.TempDir()
		write := func(path, content string) {
			path = filepath.Join(root, path)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("proc/self/cgroup", c.in)
		write("proc/self/mountinfo", c.mounts)
		for path, content := range c.files {
			write(path, content)
		}
		if got := cgroupMemory(root); got != c.want && !(c.want == math.MaxInt64 && got > 1<<60) {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
	if got := cgroupMemory(t.TempDir()); got != math.MaxInt64 {
		t.Errorf("without /proc: %d", got)
	}
}

func TestChunksUnderWayHoldAThirtySecondWithinBounds(t *testing.T) {
	for memory, want := range map[int64]int64{1 << 20: orders.LeastMemory, halfGiB: 16 << 20, aGiB: orders.DefaultMemory, math.MaxInt64: orders.DefaultMemory} {
		if got := bulkShare(memory); got != want {
			t.Errorf("of %d bytes %d, want %d", memory, got, want)
		}
	}
}

// inCgroup has the test's process tell what it may have, and do nothing else.
const inCgroup = "DEIMOS_TEST_TELL_MEMORY"

// A real process in a real cgroup with a limit, below one with a lower one.
func TestAProcessKnowsTheLimitOfItsRealCgroup(t *testing.T) {
	if os.Getenv(inCgroup) != "" {
		fmt.Printf("memory=%d\n", bulkMemory())
		return
	}
	testenv.Root(t, "a cgroup with a limit is made by root")
	if bulkMemory() != orders.DefaultMemory {
		testenv.Cannot(t, "this machine has too little memory to see a limit below it")
	}
	outer := newCgroup(t)
	inner := filepath.Join(outer, "inner")
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(inner) })
	setLimit(t, outer, 320<<20)
	// It goes in by itself, so that it is in from its first instruction on.
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `echo $$ > "$0/cgroup.procs" && exec "$@"`, inner,
		os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inCgroup+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if want := "memory=" + strconv.Itoa(10<<20) + "\n"; !strings.Contains(string(out), want) {
		t.Errorf("in a cgroup of 320 MiB it says %q, want %q", out, want)
	}
}

// limitFiles are what has the limit, by the version of cgroups.
var limitFiles = []string{"memory.max", "memory.limit_in_bytes"}

// newCgroup makes one that can limit memory, where this process is or above.
func newCgroup(t *testing.T) string {
	t.Helper()
	for _, top := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		dir, err := os.MkdirTemp(top, "deimos-test-")
		if err != nil {
			continue
		}
		for _, name := range limitFiles {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				t.Cleanup(func() {
					if err := os.Remove(dir); err != nil {
						t.Error(err)
					}
				})
				return dir
			}
		}
		os.Remove(dir)
	}
	testenv.Cannot(t, "no cgroup that limits memory can be made here")
	return ""
}

func setLimit(t *testing.T, cgroup string, bytes int) {
	t.Helper()
	for _, name := range limitFiles {
		path := filepath.Join(cgroup, name)
		if _, err := os.Stat(path); err != nil {
			continue
		}
		if err := os.WriteFile(path, []byte(strconv.Itoa(bytes)), 0); err != nil {
			t.Fatal(err)
		}
	}
}
