package ota

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

// TestADiskThatIsFullAtAnyPageOfAnInstall: as much of a disk as is left is filled, from
// one page to as many as an install takes. What is refused is refused for want of space,
// what runs is as it was, and once there is room the same order goes through. Each file
// that an install writes meets the full disk. The same for an install by a delta.
func TestADiskThatIsFullAtAnyPageOfAnInstall(t *testing.T) {
	testenv.Root(t, "a disk of its own is mounted")
	old := freeSpace
	freeSpace = func(string) (int64, error) { return 1 << 40, nil } // or nothing would be tried
	defer func() { freeSpace = old }()
	for _, name := range []string{"whole", "delta"} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t)
			// Of several pages when packed, too: one page is left over from the record that is
			// replaced before it.
			dir, _, _ := f.withDelta()
			f.publish(dir)
			f.fullAtAnyPage(t, name == "delta")
		})
	}
}

func (f *fleet) fullAtAnyPage(t *testing.T, delta bool) {
	var met []string
	for pages := 0; ; pages++ {
		if pages > 200 {
			t.Fatal("an install takes more than 200 pages")
		}
		reason := fullAt(t, f, pages, delta)
		if reason == "" {
			break
		}
		met = append(met, reason)
	}
	meets(t, met, delta)
	t.Logf("%d disks were full at some page of the install", len(met))
}

// meets sees that the disk was full at each file that an install writes.
func meets(t *testing.T, reasons []string, delta bool) {
	t.Helper()
	all := strings.Join(reasons, "\n")
	for _, file := range []string{
		"/ota/.update.json", "/ota/tuf/.enrolled.root.json", "/ota/tuf/.timestamp.json", "/ota/tuf/.snapshot.json",
		"/ota/tuf/.targets.json", "/ota/tuf/.log.json", "/ota/parts/", "/slots/b/.deimos-agent.new", "/slots/state.json.new",
	} {
		if delta && file == "/ota/parts/" {
			continue // it is small, and the record that was replaced before it has left as much
		}
		if !strings.Contains(all, file) {
			t.Errorf("the disk was never full when %s was written, but:\n%s", file, all)
		}
	}
}

// disk is one that can be full.
type disk struct {
	dir  string
	room func() // there is, from here on
}

// fullAt installs with so many pages free, and returns why that was refused; "" if the
// disk was not full.
func fullAt(t *testing.T, f *fleet, pages int, delta bool) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"))
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	return f.installsOn(t, pages, delta, disk{dir, func() { must(t, os.Remove(filepath.Join(dir, "ballast"))) }}, func() {
		fill(t, dir, filepath.Join(dir, "ballast"), pages)
	})
}

// installsOn does so on a disk that full leaves with so many of something free.
func (f *fleet) installsOn(t *testing.T, free int, delta bool, on disk, full func()) string {
	t.Helper()
	dir := on.dir
	f.way.settled(t, dir)
	if delta {
		f.runsNoisy(dir)
	}
	s := f.service(dir, func(*Options) {})
	before, err := os.ReadFile(filepath.Join(dir, "slots", "a", "deimos-agent"))
	must(t, err)
	full()

	_, err = s.Handle(t.Context(), order("o1", "1.1.0"), nil)
	if errors.Is(err, ErrRestart) {
		return ""
	}
	p := wire.ProblemOf(err)
	if p.Code != wire.CodeNoSpace || p.State != wire.Failed {
		t.Errorf("%d free: %v (%s)", free, err, p.Code)
	}
	if st, err := standing(s); st != nil || err != nil {
		t.Errorf("%d free: on trial: %+v, %v", free, st, err)
	}
	slots, err := slot.Open(dir)
	must(t, err)
	st, err := slots.Load()
	must(t, err)
	after, err := os.ReadFile(slots.Path(slot.A))
	if err != nil || string(after) != string(before) || st.Current != slot.A || st.Warning != "" || slots.Check(st, slot.A) != nil {
		t.Errorf("%d free: what runs is not as it was: %+v, %v", free, st, err)
	}
	on.room()
	// In this life and, from what is on the disk, in the next.
	next := []*Service{s, f.service(dir, func(*Options) {})}[free%2]
	if _, err := next.Handle(t.Context(), order("o1", "1.1.0"), nil); !errors.Is(err, ErrRestart) {
		t.Errorf("%d free: once there is room: %v", free, err)
	}
	return p.Reason
}

// fill leaves so many pages of a disk free.
func fill(t *testing.T, dir, ballast string, pages int) {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	out, err := os.Create(ballast)
	must(t, err)
	must(t, unix.Fallocate(int(out.Fd()), 0, 0, (int64(st.Bavail)-int64(pages))*int64(st.Bsize)))
	must(t, out.Close())
}
