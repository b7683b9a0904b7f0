package disk

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/internal/testenv"
)

// loop mounts a new filesystem of 2 GiB on a loop device.
func loop(t *testing.T, fstype string, mkfs ...string) string {
	t.Helper()
	testenv.Root(t, "loop devices need root")
	mkfs[0] = testenv.Tool(t, mkfs[0], "e2fsprogs dosfstools")
	dir := t.TempDir()
	image, mount := filepath.Join(dir, "image"), filepath.Join(dir, "mount")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(2 * gib); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	command := func(name string, args ...string) string {
		out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
		if err != nil {
			testenv.Cannot(t, "no loop device to be had: %s %s: %v: %s", name, strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out))
	}
	command(mkfs[0], append(mkfs[1:], image)...)
	dev := command("losetup", "--find", "--show", image)
	t.Cleanup(func() { _ = exec.Command("losetup", "--detach", dev).Run() })
	switch err := unix.Mount(dev, mount, fstype, 0, ""); {
	case errors.Is(err, unix.ENODEV):
		t.Skipf("this kernel has no %s, and no set-up gives it one", fstype) // with CI set, too
	case err != nil:
		testenv.Cannot(t, "mounting is not allowed here: %v", err)
	}
	t.Cleanup(func() {
		err := unix.Unmount(mount, 0)
		for end := time.Now().Add(time.Minute); err == unix.EBUSY && time.Now().Before(end); err = unix.Unmount(mount, 0) {
			time.Sleep(10 * time.Millisecond) // another package's test takes an inventory of this machine
		}
		if err != nil {
			t.Errorf("unmount %s: %v", mount, err)
		}
	})
	return mount
}

func ext4(t *testing.T) string {
	return loop(t, "ext4", "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1")
}

// around is a machine whose data disk is what is mounted there.
func around(t *testing.T, mount, fstype string) *hw.Inventory {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(mount, &st); err != nil {
		t.Fatal(err)
	}
	inv := twoDisks()
	inv.Disks[1].Partitions[0].Mounts = []string{mount}
	inv.Filesystems[2] = hw.Filesystem{Mount: mount, Disk: "sda", Type: fstype, ReadOnly: st.Flags&unix.ST_RDONLY != 0,
		Total: st.Blocks * uint64(st.Bsize), Free: st.Bavail * uint64(st.Bsize)}
	return inv
}

func TestOnRealExt4(t *testing.T) {
	mount := ext4(t)
	o := Options{Auto: true, State: t.TempDir()}
	chosen := func() Candidate {
		t.Helper()
		return find(t, Choose(around(t, mount, "ext4"), o), mount)
	}
	c := chosen()
	if c.Code != CodeOK || c.Test != nil {
		t.Fatalf("new: %+v", c)
	}
	got, err := open(t, o.State).Trusted(t.Context(), c.Dir, around(t, mount, "ext4"), quiet())
	if err != nil || !got.Passed || !got.Direct || got.Bytes < testLeast {
		t.Fatalf("%+v %v", got, err)
	}
	if c := chosen(); c.Code != CodeInUse || c.Test == nil || *c.Test != got {
		t.Errorf("tested: %+v", c)
	}

	photo := filepath.Join(mount, "photo")
	if err := os.WriteFile(photo, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if c := chosen(); c.Code != CodeInUse {
		t.Errorf("in use, and its owner put something there: %+v", c)
	}
	o.State = t.TempDir() // where it was never tested
	if c := chosen(); c.Code != CodeForeign || !strings.Contains(c.Why, "photo") {
		t.Errorf("of somebody else: %+v", c)
	}

	// Filled up, but for less than a test needs.
	f, err := os.Create(photo)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(mount, &st); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*int64(st.Bsize)-leastFree/2); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if got, err := SelfTest(t.Context(), mount, quiet()); err != nil || got.Passed || got.Code != ProblemFull {
		t.Errorf("full: %+v %v", got, err)
	}
	if err := os.Remove(photo); err != nil {
		t.Fatal(err)
	}

	if err := unix.Mount("", mount, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if got, err := SelfTest(t.Context(), mount, quiet()); err != nil || got.Passed || got.Code != ProblemReadOnly {
		t.Errorf("read-only: %+v %v", got, err)
	}
	if c := chosen(); c.Code != CodeReadOnly {
		t.Errorf("read-only: %+v", c)
	}
}

// A disk that a store has filled to its floor is still tested, in little room.
func TestADiskFilledToItsFloorIsTested(t *testing.T) {
	mount := ext4(t)
	var st unix.Statfs_t
	if err := unix.Statfs(mount, &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(mount, "chunks"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*int64(st.Bsize)-floorOf(0, false)); err != nil {
		t.Fatal(err)
	}
	if got, err := SelfTest(t.Context(), mount, quiet()); err != nil || !got.Passed || got.Bytes != testLeast {
		t.Errorf("%+v %v", got, err)
	}
}

func TestOnRealVFAT(t *testing.T) {
	mount := loop(t, "vfat", "mkfs.vfat")
	o := Options{Auto: true, State: t.TempDir()}
	if c := find(t, Choose(around(t, mount, "vfat"), o), mount); c.Code != CodeWeak {
		t.Errorf("%+v", c)
	}
	if got, err := SelfTest(t.Context(), mount, quiet()); err != nil || !got.Passed {
		t.Errorf("%+v %v", got, err)
	}
	if left, _ := os.ReadDir(mount); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A loop device is an image in a file of another disk.
func TestAMountedImageIsNoDisk(t *testing.T) {
	mount := ext4(t)
	inv, err := hw.Probe(t.Context(), hw.Options{Limit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	all := Choose(inv, Options{Auto: true, Use: []string{mount}})
	if i := slices.IndexFunc(all, func(c Candidate) bool { return c.Mount == mount }); i < 0 || all[i].Code != CodeNoDisk {
		t.Errorf("%+v", all)
	}
}
