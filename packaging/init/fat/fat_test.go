package fat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// esp is a file system that mkfs.vfat and mtools have made.
type esp struct {
	t     *testing.T
	image string
	files map[string][]byte
}

const (
	confirmed = "deimos_0.1.0.efi"
	trial     = "deimos_0.2.0+3.efi"
)

func newESP(t *testing.T) *esp {
	t.Helper()
	e := &esp{t: t, image: filepath.Join(t.TempDir(), "esp"), files: map[string][]byte{}}
	f, err := os.Create(e.image)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(40<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	e.run("mkfs.vfat", "-F", "32", "-s", "1", e.image)
	e.run("mmd", "-i", e.image, "::/EFI", "::/EFI/Linux")
	e.put(confirmed, 300_001)
	e.put(trial, 300_001)
	return e
}

func (e *esp) run(argv ...string) string {
	e.t.Helper()
	out, err := exec.Command(testenv.Tool(e.t, argv[0], "dosfstools mtools"), argv[1:]...).CombinedOutput()
	if err != nil {
		e.t.Fatalf("%s: %v: %s", argv[0], err, out)
	}
	return string(out)
}

// put makes a file with a content of its own.
func (e *esp) put(name string, size int) {
	e.t.Helper()
	content := bytes.Repeat([]byte(name+" "), size/len(name)+1)[:size]
	from := filepath.Join(e.t.TempDir(), "content")
	if err := os.WriteFile(from, content, 0o600); err != nil {
		e.t.Fatal(err)
	}
	e.run("mcopy", "-o", "-i", e.image, from, "::/EFI/Linux/"+name)
	e.files[name] = content
}

// damage lets do change the file system.
func (e *esp) damage(do func(v *volume, f *os.File)) {
	e.t.Helper()
	f, err := os.OpenFile(e.image, os.O_RDWR, 0)
	if err != nil {
		e.t.Fatal(err)
	}
	defer f.Close()
	v, err := open(f)
	if err != nil {
		e.t.Fatal(err)
	}
	v.readAll()
	for _, file := range v.files {
		file.chain, file.whole = v.follow(file.first)
	}
	do(v, f)
	for _, at := range []int64{v.tableAt, v.spare} {
		if _, err := f.WriteAt(v.table, at); err != nil {
			e.t.Fatal(err)
		}
	}
}

func (v *volume) find(name string) *file {
	i := slices.IndexFunc(v.files, func(f *file) bool { return f.name == name })
	return v.files[i]
}

// rewrite changes the entry of a file.
func rewrite(v *volume, f *os.File, name string, first, size uint32) {
	file := *v.find(name)
	file.first, file.size = first, size
	for _, c := range v.entry(&file) {
		_, _ = f.WriteAt(c.raw, c.at)
	}
}

// repair mends, and proves that a second run has nothing to do.
func (e *esp) repair() Report {
	e.t.Helper()
	f, err := os.OpenFile(e.image, os.O_RDWR, 0)
	if err != nil {
		e.t.Fatal(err)
	}
	defer f.Close()
	r, err := Repair(f)
	if err != nil {
		e.t.Fatal(err)
	}
	again, err := Repair(f)
	if again.Left, r.Left = sorted(again.Left), sorted(r.Left); err != nil || len(r.Left) == 0 && !again.Clean() || !slices.Equal(again.Left, r.Left) || len(again.Cut)+len(again.Dropped)+again.Freed+again.Holes > 0 {
		e.t.Fatalf("after %+v a second run has %+v, %v", r, again, err)
	}
	return r
}

func sorted(s []string) []string { slices.Sort(s); return s }

// whole asks fsck.vfat, and compares the files with what they were.
func (e *esp) whole(names ...string) {
	e.t.Helper()
	if out, err := exec.Command(testenv.Tool(e.t, "fsck.vfat", "dosfstools"), "-n", e.image).CombinedOutput(); err != nil {
		e.t.Errorf("fsck.vfat still finds: %s", out)
	}
	e.same(names...)
}

func (e *esp) same(names ...string) {
	e.t.Helper()
	for _, name := range names {
		got, err := exec.Command(testenv.Tool(e.t, "mcopy", "mtools"), "-i", e.image, "::/EFI/Linux/"+name, "-").Output()
		if err != nil || !bytes.Equal(got, e.files[name]) {
			e.t.Errorf("%s has %d bytes, not those that it had: %v", name, len(got), err)
		}
	}
}

func (e *esp) list() string {
	return e.run("mdir", "-b", "-i", e.image, "::/EFI/Linux")
}

func TestWholeFileSystemIsLeftAlone(t *testing.T) {
	e := newESP(t)
	before, _ := os.ReadFile(e.image)
	if r := e.repair(); !r.Clean() {
		t.Errorf("%+v", r)
	}
	if after, _ := os.ReadFile(e.image); !bytes.Equal(before, after) {
		t.Error("it was written to")
	}
}

func TestWhatAPowerCutLeavesIsMended(t *testing.T) {
	for claim, c := range map[string]struct {
		damage func(v *volume, f *os.File)
		want   Report
	}{
		"in use": {
			func(_ *volume, f *os.File) { _, _ = f.WriteAt([]byte{1}, stateAt) },
			Report{InUse: true},
		},
		"in use, as UEFI marks it": {
			func(v *volume, _ *os.File) { v.set(1, v.next(1)&^unmounted) },
			Report{InUse: true},
		},
		"clusters of nobody": {
			func(v *volume, _ *os.File) { v.set(v.end-2, v.end-1); v.set(v.end-1, mask) },
			Report{Freed: 2},
		},
		"a length that the clusters do not have": {
			func(v *volume, f *os.File) { rewrite(v, f, trial, v.find(trial).first, 1<<20) },
			Report{Cut: []string{"/EFI/Linux/" + trial}},
		},
		"a chain into a free cluster": {
			func(v *volume, _ *os.File) { v.set(v.find(trial).chain[9], v.end-9) },
			Report{Cut: []string{"/EFI/Linux/" + trial}, Freed: 576},
		},
		"a chain into nowhere": {
			func(v *volume, _ *os.File) { v.set(v.find(trial).chain[9], v.end+9) },
			Report{Cut: []string{"/EFI/Linux/" + trial}, Freed: 576},
		},
		"a chain in a ring": {
			func(v *volume, _ *os.File) { v.set(v.find(trial).chain[9], v.find(trial).chain[3]) },
			Report{Cut: []string{"/EFI/Linux/" + trial}, Freed: 576},
		},
		"a first cluster that is free": {
			func(v *volume, _ *os.File) { v.set(v.find(trial).first, 0) },
			Report{Cut: []string{"/EFI/Linux/" + trial}, Freed: 585},
		},
		"clusters beyond the length": {
			func(v *volume, f *os.File) { rewrite(v, f, trial, v.find(trial).first, 513) },
			Report{Freed: 584},
		},
		"a directory that grew into a cluster which was not emptied yet": {
			func(v *volume, f *os.File) {
				c, dir := v.end-9, v.find("Linux")
				v.set(dir.chain[len(dir.chain)-1], c)
				v.set(c, mask)
				_, _ = f.WriteAt(bytes.Repeat([]byte("what a file left"), 32), v.at(c))
			},
			Report{Cut: []string{"/EFI/Linux"}, Freed: 1},
		},
		"clusters of an empty file": {
			func(v *volume, f *os.File) { rewrite(v, f, trial, v.find(trial).first, 0) },
			Report{Freed: 586},
		},
	} {
		t.Run(claim, func(t *testing.T) {
			e := newESP(t)
			e.damage(c.damage)
			if r := e.repair(); fmt.Sprint(r) != fmt.Sprint(c.want) {
				t.Errorf("%+v, want %+v", r, c.want)
			}
			e.whole(confirmed)
		})
	}
}

// TestFileBehindAHoleOfItsFolderStays: of two parts of a folder the first was not on
// the disk yet. Linux reads on behind what is empty, mtools and UEFI do not.
func TestFileBehindAHoleOfItsFolderStays(t *testing.T) {
	e := newESP(t)
	var holes int
	e.damage(func(v *volume, f *os.File) {
		holes = len(v.find(confirmed).slots)
		for _, at := range v.find(confirmed).slots {
			_, _ = f.WriteAt(make([]byte, slot), at)
		}
	})
	if list := e.list(); strings.Contains(list, trial) {
		t.Fatal("there is no hole:", list)
	}
	if r := e.repair(); fmt.Sprint(r) != fmt.Sprint(Report{Freed: 586, Holes: holes}) {
		t.Errorf("%+v", r)
	}
	e.whole(trial)
}

func TestCopiesOfTheTableBecomeAlike(t *testing.T) {
	e := newESP(t)
	f, _ := os.OpenFile(e.image, os.O_RDWR, 0)
	defer f.Close()
	v, err := open(f)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteAt(make([]byte, 512), v.spare+512)
	if r := e.repair(); !r.Copies || r.Freed != 0 {
		t.Errorf("%+v", r)
	}
	e.whole(confirmed, trial)
}

func TestOfTwoNamesOfOneFileTheLaterOneStaysWithAllBytes(t *testing.T) {
	for claim, c := range map[string]struct{ from, to string }{
		"an install":         {trial + ".tmp", trial},
		"a try":              {trial, "deimos_0.2.0+2-1.efi"},
		"another try":        {"deimos_0.2.0+2-1.efi", "deimos_0.2.0+1-2.efi"},
		"a confirmation":     {"deimos_0.2.0+2-1.efi", "deimos_0.2.0.efi"},
		"a note":             {".deimos-data.id123", "deimos-data.id"},
		"an older image's":   {"deimos_0.2.0+2-1.efi.tmp", "deimos_0.3.0+3.efi"},
		"a name of capitals": {"DEIMOS_0.2.0+2-1.EFI", "deimos_0.2.0.efi"},
	} {
		for _, newFirst := range []bool{false, true} {
			t.Run(fmt.Sprint(claim, ", new one first ", newFirst), func(t *testing.T) {
				e := newESP(t)
				e.run("mdel", "-i", e.image, "::/EFI/Linux/"+trial)
				names := []string{c.from, c.to}
				if newFirst {
					slices.Reverse(names)
				}
				for _, n := range names {
					e.put(n, 200_001)
				}
				e.damage(func(v *volume, f *os.File) {
					_, _ = f.WriteAt([]byte{1}, stateAt)
					rewrite(v, f, c.to, v.find(c.from).first, v.find(c.from).size)
				})
				e.files[c.to] = e.files[c.from]
				r := e.repair()
				if !slices.Equal(r.Dropped, []string{"/EFI/Linux/" + c.from}) || len(r.Cut)+len(r.Left) > 0 || r.Freed != 391 {
					t.Errorf("%+v", r)
				}
				e.whole(confirmed, c.to)
				if strings.Contains(e.list(), c.from+"\n") && !strings.HasSuffix(c.to, c.from) {
					t.Error(e.list())
				}
			})
		}
	}
}

func TestFileThatTookTheClustersOfADeletedOneStays(t *testing.T) {
	e := newESP(t)
	e.put("deimos_0.3.0+3.efi", 100_000)
	e.damage(func(v *volume, f *os.File) {
		rewrite(v, f, trial, v.find("deimos_0.3.0+3.efi").first, v.find(trial).size)
	})
	if r := e.repair(); !slices.Equal(r.Dropped, []string{"/EFI/Linux/" + trial}) {
		t.Errorf("%+v", r)
	}
	e.whole(confirmed, "deimos_0.3.0+3.efi")
}

func TestWhatCannotBeToldIsLeftAlone(t *testing.T) {
	for claim, damage := range map[string]func(v *volume, f *os.File){
		"two images with one chain": func(v *volume, f *os.File) { rewrite(v, f, trial, v.find(confirmed).first, 300_001) },
		"a chain that joins another": func(v *volume, _ *os.File) {
			v.set(v.find(trial).chain[9], v.find(confirmed).chain[9])
		},
		"a folder that is none": func(v *volume, f *os.File) {
			_, _ = f.WriteAt(make([]byte, 64), v.at(v.find("Linux").first))
		},
	} {
		t.Run(claim, func(t *testing.T) {
			e := newESP(t)
			e.damage(func(v *volume, f *os.File) { _, _ = f.WriteAt([]byte{1}, stateAt); damage(v, f) })
			before, _ := os.ReadFile(e.image)
			r := e.repair()
			if len(r.Left) != 1 || len(r.Cut)+len(r.Dropped) > 0 {
				t.Errorf("%+v", r)
			}
			after, _ := os.ReadFile(e.image)
			if after[stateAt] != 1 {
				t.Error("the mark is gone")
			}
			if claim == "a folder that is none" && (r.Freed != 0 || !bytes.Equal(before, after)) {
				t.Errorf("%+v, and it was written to", r)
			}
			if claim != "a folder that is none" {
				e.same(confirmed)
			}
		})
	}
}

func TestOtherFileSystemsAreRefused(t *testing.T) {
	e := newESP(t)
	e.run("mkfs.vfat", "-F", "16", e.image)
	f, _ := os.OpenFile(e.image, os.O_RDWR, 0)
	defer f.Close()
	if _, err := Repair(f); !errors.Is(err, ErrOther) {
		t.Error(err)
	}
	if _, err := Repair(newMemory(make([]byte, 1<<20))); !errors.Is(err, ErrOther) {
		t.Error(err)
	}
}

// memory is a disk that is written to beside what it was: an image is large, and
// what changes is not. It loses its power after so many writes, if that is set.
type memory struct {
	was     []byte
	sectors map[int64][]byte
	left    int
	cuts    bool
}

func newMemory(was []byte) *memory { return &memory{was: was, sectors: map[int64][]byte{}} }

func (m *memory) ReadAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > int64(len(m.was)) {
		return 0, errors.New("behind the end")
	}
	copy(p, m.was[at:])
	for s := at / 512; s <= (at+int64(len(p))-1)/512 && len(m.sectors) > 0; s++ {
		if raw := m.sectors[s]; raw != nil {
			from := max(s*512, at)
			copy(p[from-at:], raw[from-s*512:])
		}
	}
	return len(p), nil
}

// WriteAt writes within one sector, as all of this package does.
func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	if m.left--; m.cuts && m.left < 0 {
		return 0, errors.New("no power")
	}
	s := at / 512
	if m.sectors[s] == nil {
		m.sectors[s] = bytes.Clone(m.was[s*512 : (s+1)*512])
	}
	return copy(m.sectors[s][at-s*512:], p), nil
}

func (m *memory) Sync() error { return nil }

// bytes is the image as it is now.
func (m *memory) bytes() []byte {
	raw := bytes.Clone(m.was)
	for s, b := range m.sectors {
		copy(raw[s*512:], b)
	}
	return raw
}

// TestAnyDamage: whatever the table and the folder hold, a repair ends, touches
// no content, comes to the same end when it is cut and begun again, and leaves
// what fsck.vfat calls whole unless it says otherwise.
func TestAnyDamage(t *testing.T) {
	r := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	e := newESP(t)
	e.put(trial+".tmp", 40_000)
	e.put("deimos_0.3.0+2-1.efi", 1000)
	whole, _ := os.ReadFile(e.image)
	checked, rounds := 0, 40
	if testing.Short() {
		rounds = 10
	}
	// Six in ten repairs are whole; of ten rounds none is, once in 10,000 times.
	for i := 0; i < rounds || checked < rounds/8 && i < 10*rounds; i++ {
		raw := bytes.Clone(whole)
		v, err := open(newMemory(raw))
		if err != nil {
			t.Fatal(err)
		}
		v.readAll()
		for range 1 + r.IntN(3) {
			f := v.files[r.IntN(len(v.files))]
			f.chain, _ = v.follow(f.first)
			if len(f.chain) == 0 {
				continue
			}
			switch r.IntN(4) {
			case 0:
				v.set(f.chain[r.IntN(len(f.chain))], []uint32{0, mask, uint32(r.IntN(2000)), r.Uint32() & mask}[r.IntN(4)])
			case 1:
				v.set(2+uint32(r.IntN(3000)), uint32(r.IntN(3000)))
			default:
				if f.slots != nil {
					binary.LittleEndian.PutUint32(raw[f.slots[len(f.slots)-1]+sizeAt:], uint32(r.IntN(1<<19)))
					binary.LittleEndian.PutUint16(raw[f.slots[len(f.slots)-1]+lowAt:], uint16(r.IntN(2000)))
				}
			}
		}
		copy(raw[v.tableAt:], v.table)
		copy(raw[v.spare:], v.table)
		raw[stateAt] = 1

		once := newMemory(raw)
		report, err := Repair(once)
		if err != nil {
			t.Fatal(err)
		}
		for after := 0; ; after += 1 + r.IntN(4) {
			c := newMemory(raw)
			c.cuts, c.left = true, after
			if _, err := Repair(c); err == nil {
				break
			}
			c.cuts = false
			if _, err := Repair(c); err != nil {
				t.Fatal(err)
			}
			if stateOf(t, c) != stateOf(t, once) {
				t.Fatalf("cut after %d writes, a repair comes to another end; %+v", after, report)
			}
		}
		isDir := map[uint32]bool{}
		for _, f := range v.files {
			chain, _ := v.follow(f.first)
			for _, c := range chain {
				isDir[c] = isDir[c] || f.dir
			}
		}
		for s := range once.sectors {
			if s*512 < v.dataAt {
				continue
			}
			if c := firstReal + uint32((s*512-v.dataAt)/v.cluster); !isDir[c] {
				t.Fatalf("cluster %d, which is of no folder, was written to; %+v", c, report)
			}
		}
		if len(report.Left) > 0 {
			continue
		}
		checked++
		image := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(image, once.bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(testenv.Tool(t, "fsck.vfat", "dosfstools"), "-n", image).CombinedOutput(); err != nil {
			t.Fatalf("after %+v fsck.vfat finds: %s", report, out)
		}
		os.Remove(image)
	}
	if checked < rounds/8 {
		t.Errorf("only %d repairs were whole", checked)
	}
}

// stateOf is all that names and the table say.
func stateOf(t *testing.T, raw *memory) string {
	v, err := open(raw)
	if err != nil {
		t.Fatal(err)
	}
	v.readAll()
	var s strings.Builder
	state := make([]byte, 1)
	_, _ = raw.ReadAt(state, stateAt)
	for _, f := range v.files {
		fmt.Fprintln(&s, f.path, f.first, f.size)
	}
	return s.String() + string(v.table) + fmt.Sprint(state)
}
