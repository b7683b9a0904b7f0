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
	all := strings.Join(met, "\n")
	for _, file := range []string{
		"/ota/.update.json", "/ota/tuf/.enrolled.root.json", "/ota/tuf/.timestamp.json", "/ota/tuf/.snapshot.json",
		"/ota/tuf/.targets.json", "/ota/tuf/.log.json", "/ota/parts/", "/slots/b/.deimos-agent.new", "/slots/state.json.new",
	} {
		if delta && file == "/ota/parts/" {
			continue // it has one page, which is left over from the record
		}
		if !strings.Contains(all, file) {
			t.Errorf("the disk was never full when %s was written, but:\n%s", file, all)
		}
	}
	t.Logf("%d disks were full at some page of the install", len(met))
}

// fullAt installs with so many pages free, and returns why that was refused; "" if the
// disk was not full.
func fullAt(t *testing.T, f *fleet, pages int, delta bool) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"))
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	f.way.settled(t, dir)
	if delta {
		f.runsNoisy(dir)
	}
	s := f.service(dir, func(*Options) {})
	before, err := os.ReadFile(filepath.Join(dir, "slots", "a", "deimos-agent"))
	must(t, err)
	ballast := filepath.Join(dir, "ballast")
	fill(t, dir, ballast, pages)

	_, err = s.Handle(t.Context(), order("o1", "1.1.0"), nil)
	if errors.Is(err, ErrRestart) {
		return ""
	}
	p := wire.ProblemOf(err)
	if p.Code != wire.CodeNoSpace || p.State != wire.Failed {
		t.Errorf("%d pages: %v (%s)", pages, err, p.Code)
	}
	if st, err := standing(s); st != nil || err != nil {
		t.Errorf("%d pages: on trial: %+v, %v", pages, st, err)
	}
	slots, err := slot.Open(dir)
	must(t, err)
	st, err := slots.Load()
	must(t, err)
	after, err := os.ReadFile(slots.Path(slot.A))
	if err != nil || string(after) != string(before) || st.Current != slot.A || st.Warning != "" || slots.Check(st, slot.A) != nil {
		t.Errorf("%d pages: what runs is not as it was: %+v, %v", pages, st, err)
	}
	must(t, os.Remove(ballast))
	// In this life and, from what is on the disk, in the next.
	next := []*Service{s, f.service(dir, func(*Options) {})}[pages%2]
	if _, err := next.Handle(t.Context(), order("o1", "1.1.0"), nil); !errors.Is(err, ErrRestart) {
		t.Errorf("%d pages: once there is room: %v", pages, err)
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
