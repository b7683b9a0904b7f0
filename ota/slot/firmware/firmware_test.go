package firmware

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/ota/slot"
)

const imageSize = 40 << 10 // two writes of io.Copy

// imageOf is the content of a version's image.
func imageOf(version string) []byte { return bytes.Repeat([]byte(version+"|"), imageSize)[:imageSize] }

func about(version string) slot.Image {
	sum := sha256.Sum256(imageOf(version))
	return slot.Image{Version: version, SHA256: hex.EncodeToString(sum[:])}
}

func install(s *Store, order, version string) error {
	return s.Install(context.Background(), order, about(version), imageSize, bytes.NewReader(imageOf(version)), nil)
}

// fat is a disk as FAT is at its worst: until the next sync each change of a name
// may reach the disk or not, whatever the others do; a rename is two changes, and the
// new name is that of an empty file until that is placed; and
// the bytes of a file that was not synced are anything.
type fat struct {
	stored  map[string]*content
	live    map[string]*content
	pending []change
	nowhere map[string]bool // names of live without a place
	rec     record
	room    int64
	ops     int   // counted down; the power goes at 0
	stuck   bool  // the boot loader cannot rename
	full    error // of save
}

type content struct {
	bytes  []byte
	synced bool
}

// change is a name's new content, nil if it goes.
type change struct {
	name    string
	to      *content
	nowhere bool
	only    *content // applies only where the name has this content still
}

type powerCut struct{}

func newFAT(names ...string) *fat {
	f := &fat{stored: map[string]*content{}, nowhere: map[string]bool{}, room: 1 << 30, ops: 1 << 30}
	for _, name := range names {
		parsed, ok := parseName(name)
		if !ok {
			panic(name)
		}
		f.stored[name] = &content{imageOf(parsed.version), true}
	}
	f.live = maps.Clone(f.stored)
	return f
}

func (f *fat) step() {
	if f.ops--; f.ops < 0 {
		panic(powerCut{})
	}
}

func (f *fat) set(name string, c *content) {
	if c == nil {
		delete(f.live, name)
	} else {
		f.live[name] = c
	}
	delete(f.nowhere, name)
	f.pending = append(f.pending, change{name: name, to: c})
}

func (f *fat) list() (all images, err error) {
	for _, name := range slices.Sorted(maps.Keys(f.live)) {
		if parsed, ok := fileOf(name, int64(len(f.live[name].bytes))); ok {
			all = append(all, parsed)
		}
	}
	return all, nil
}

func (f *fat) free() (int64, error) { return f.room, nil }

func (f *fat) open(name string) (input, error) {
	c := f.live[name]
	if c == nil {
		return nil, os.ErrNotExist
	}
	return struct {
		*bytes.Reader
		io.Closer
	}{bytes.NewReader(c.bytes), io.NopCloser(nil)}, nil
}

func (f *fat) create(name string) (output, error) {
	f.step()
	f.freed(name)
	c := &content{}
	f.set(name, c)
	return &fatFile{f, c}, nil
}

func (f *fat) rename(from, to string) error {
	f.step()
	c := f.live[from]
	if c == nil {
		return os.ErrNotExist
	}
	f.set(to, c)
	f.nowhere[to], f.pending[len(f.pending)-1].nowhere = true, true
	f.set(from, nil)
	return nil
}

func (f *fat) place(name string) error {
	f.step()
	delete(f.nowhere, name)
	for i := range f.pending {
		if f.pending[i].name == name {
			f.pending[i].nowhere = false
		}
	}
	if f.stored[name] != nil {
		f.stored[name] = f.live[name]
	}
	return nil
}

func (f *fat) remove(name string) error {
	f.step()
	if f.live[name] != nil {
		f.freed(name)
		for other, its := range f.stored { // a name that is gone only in memory has them, too
			if other != name && its == f.live[name] {
				f.pending = append(f.pending, change{name: other, to: &content{[]byte("freed"), true}, only: its})
			}
		}
		// The blocks are free before the name is gone, and either may be lost.
		f.pending = append(f.pending, change{name: name, to: &content{[]byte("freed"), true}})
		f.set(name, nil)
	}
	return nil
}

// freed is what becomes of the blocks of a name that goes: if another name has
// them too, it has them no more.
func (f *fat) freed(name string) {
	c := f.live[name]
	for other, its := range f.live {
		if other != name && its == c {
			c.bytes = []byte("freed")
		}
	}
}

func (f *fat) same(a, b string) (bool, error) { return f.live[a] == f.live[b], nil }

func (f *fat) sync() error {
	f.step()
	f.stored, f.pending = maps.Clone(f.live), nil
	for name := range f.nowhere {
		f.stored[name] = &content{nil, true}
	}
	return nil
}

func (f *fat) load() (record, error) { return f.rec, nil }

func (f *fat) save(rec record) error {
	f.step()
	if f.full == nil {
		f.rec = rec
	}
	return f.full
}

type fatFile struct {
	f *fat
	c *content
}

func (o *fatFile) Write(p []byte) (int, error) {
	o.f.step()
	o.c.bytes, o.c.synced = append(o.c.bytes, p...), false
	return len(p), nil
}

func (o *fatFile) Sync() error {
	o.f.step()
	o.c.synced = true
	return nil
}

func (o *fatFile) Close() error { return nil }

// after is the disk as a cut leaves it, if of the pending changes those reached
// it whose bit is set in kept.
func (f *fat) after(kept int) *fat {
	g := &fat{stored: maps.Clone(f.stored), nowhere: map[string]bool{}, rec: f.rec, room: f.room, ops: 1 << 30, stuck: f.stuck, full: f.full}
	for i, c := range f.pending {
		switch {
		case kept>>i&1 == 0:
		case c.only != nil && g.stored[c.name] != c.only:
		case c.to == nil:
			delete(g.stored, c.name)
		case c.nowhere:
			g.stored[c.name] = &content{nil, true}
		default:
			g.stored[c.name] = c.to
		}
	}
	copies := map[*content]*content{} // two names of one file stay that
	for name, c := range g.stored {
		if copies[c] == nil {
			copies[c] = &content{[]byte("torn"), true}
			if c.synced {
				copies[c].bytes = slices.Clone(c.bytes)
			}
		}
		g.stored[name] = copies[c]
	}
	g.live = maps.Clone(g.stored)
	return g
}

// boot does what systemd-boot does, and returns the version that runs. It fails
// the test if that image is not whole, or if there is none.
func (f *fat) boot(t *testing.T) (version string) {
	t.Helper()
	all, _ := f.list()
	all = slices.DeleteFunc(all, func(i file) bool { return i.tmp })
	for _, i := range all {
		if !bytes.Equal(f.live[i.name].bytes, imageOf(i.version)) {
			t.Fatalf("%s is not whole, and may boot", i.name)
		}
	}
	if len(all) == 0 {
		t.Fatal("no firmware boots")
	}
	usedUp := func(i file) bool { return i.counted && i.left == 0 }
	best := slices.MaxFunc(all, func(a, b file) int {
		if usedUp(a) != usedUp(b) {
			if usedUp(a) {
				return -1
			}
			return 1
		}
		return compareVersions(a.version, b.version)
	})
	if best.counted && best.left > 0 && !f.stuck {
		next := best
		next.left--
		next.tried++
		f.live[next.String()] = f.live[best.name]
		delete(f.live, best.name)
		f.stored = maps.Clone(f.live)
	}
	return best.version
}

func (f *fat) store(running string) *Store { return &Store{disk: f, running: running} }

func (f *fat) names() string { return strings.Join(slices.Sorted(maps.Keys(f.live)), " ") }

// everyCut runs do with a cut at each step that there is, then then with each
// disk that this can leave; the last time do runs to its end.
func everyCut(t *testing.T, begin func() *fat, do func(*fat), then func(t *testing.T, f *fat)) {
	t.Helper()
	cuts := 0
	for n := 0; ; n++ {
		f := begin()
		f.ops = n
		survived := func() (ok bool) {
			defer func() {
				if p := recover(); p != nil {
					if _, is := p.(powerCut); !is {
						panic(p)
					}
				}
			}()
			do(f)
			return true
		}()
		for kept := range 1 << len(f.pending) {
			cuts++
			t.Run(fmt.Sprintf("cut=%d,kept=%b", n, kept), func(t *testing.T) { then(t, f.after(kept)) })
		}
		if survived {
			t.Logf("%d steps, %d disks", n, cuts)
			return
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantSettled(t *testing.T, s *Store, want slot.Result) {
	t.Helper()
	for range 2 { // it keeps telling
		if out, err := s.Settled(); err != nil || out == nil || out.Result != want || out.Order != "o2" || out.From != "1.0.0" || out.To != "2.0.0" {
			t.Fatalf("settled: %+v, %v; want %s", out, err, want)
		}
	}
}

func TestACutInAnInstallBootsOldOrNew(t *testing.T) {
	for _, before := range [][]string{{"deimos_1.0.0.efi"}, {"deimos_0.9.0.efi", "deimos_1.0.0.efi"}, {"deimos_1.0.0.efi", "deimos_1.5.0+0-3.efi", "deimos_2.0.0+3.efi.tmp"}} {
		begin := func() *fat { return newFAT(before...) }
		do := func(f *fat) { must(t, install(f.store("1.0.0"), "o2", "2.0.0")) }
		everyCut(t, begin, do, func(t *testing.T, f *fat) {
			version := f.boot(t)
			if version != "2.0.0" {
				must(t, install(f.store(version), "o2", "2.0.0"))
				if version = f.boot(t); version != "2.0.0" {
					t.Fatalf("%s boots after the install (%s)", version, f.names())
				}
			}
			s := f.store(version)
			must(t, s.Confirm(context.Background()))
			wantSettled(t, s, slot.Confirmed)
			if trial, err := s.OnTrial(); trial || err != nil {
				t.Errorf("confirmed, and on trial: %v", err)
			}
			f.twoAndNoHarm(t)
		})
	}
}

// twoAndNoHarm checks what is on the disk when 2.0.0 is confirmed beside 1.0.0. A
// second name of the same blocks stays, and does no harm.
func (f *fat) twoAndNoHarm(t *testing.T) {
	t.Helper()
	for name, c := range f.live {
		switch name {
		case "deimos_1.0.0.efi", "deimos_2.0.0.efi":
		default:
			if c != f.live["deimos_2.0.0.efi"] && len(c.bytes) > 0 {
				t.Errorf("the disk holds %s", f.names())
			}
		}
	}
	if f.boot(t) != "2.0.0" || f.live["deimos_1.0.0.efi"] == nil {
		t.Errorf("the disk holds %s", f.names())
	}
	must(t, f.store("2.0.0").Install(context.Background(), "o3", about("3.0.0"), imageSize, bytes.NewReader(imageOf("3.0.0")), nil))
	if got := f.boot(t); got != "3.0.0" {
		t.Errorf("%s boots after the next install (%s)", got, f.names())
	}
}

func onTrial() *fat {
	f := newFAT("deimos_1.0.0.efi", "deimos_2.0.0+2-1.efi")
	f.rec.Trial = &trial{Order: "o2", From: "1.0.0", To: "2.0.0", SHA256: about("2.0.0").SHA256}
	return f
}

func TestACutInAConfirmBootsOldOrNew(t *testing.T) {
	do := func(f *fat) { must(t, f.store("2.0.0").Confirm(context.Background())) }
	everyCut(t, onTrial, do, func(t *testing.T, f *fat) {
		if version := f.boot(t); version == "1.0.0" { // the rename lost it
			must(t, install(f.store("1.0.0"), "o2", "2.0.0"))
			f.boot(t)
		}
		s := f.store("2.0.0")
		must(t, s.Confirm(context.Background()))
		wantSettled(t, s, slot.Confirmed)
		f.twoAndNoHarm(t)
	})
}

func TestConfirmingTheOnlyFirmwareNeverLosesIt(t *testing.T) {
	begin := func() *fat { return newFAT("deimos_1.0.0+2-1.efi") }
	do := func(f *fat) { must(t, f.store("1.0.0").Confirm(context.Background())) }
	everyCut(t, begin, do, func(t *testing.T, f *fat) {
		must(t, f.store(f.boot(t)).Confirm(context.Background()))
		if err := install(f.store("1.0.0"), "o2", "2.0.0"); err != nil {
			t.Errorf("after it nothing can be installed: %v (%s)", err, f.names())
		}
	})
}

func TestARollBackIsReportedAndCleared(t *testing.T) {
	begin := func() *fat {
		f := onTrial()
		for range 2 {
			if version := f.boot(t); version != "2.0.0" {
				t.Fatalf("%s boots while there are tries", version)
			}
		}
		if out, err := f.store("2.0.0").Settled(); out != nil || err != nil {
			t.Fatalf("settled during the last try: %+v %v", out, err)
		}
		return f
	}
	do := func(f *fat) { wantSettled(t, f.store(f.boot(t)), slot.RolledBack) }
	everyCut(t, begin, do, func(t *testing.T, f *fat) {
		version := f.boot(t)
		if version != "1.0.0" {
			t.Fatalf("%s boots", version)
		}
		wantSettled(t, f.store(version), slot.RolledBack)
		if names := f.names(); names != "deimos_1.0.0.efi" {
			t.Errorf("the disk holds %s", names)
		}
	})
}

// starts boots until the old firmware runs, and returns how often the new one did.
// What the check of the file system does before each mount is done here.
func (f *fat) starts(t *testing.T) (n int) {
	t.Helper()
	for ; n < 10; n++ {
		f.dropSecondNames()
		version := f.boot(t)
		if version == "1.0.0" {
			return n
		}
		must(t, f.store(version).CountStart())
	}
	t.Fatalf("the new firmware is started for ever: %s", f.names())
	return n
}

func (f *fat) dropSecondNames() {
	all, _ := f.list()
	for i, a := range all {
		for _, b := range all[i+1:] {
			if f.live[a.name] == f.live[b.name] && !a.tmp {
				delete(f.live, a.name)
			}
		}
	}
	f.stored = maps.Clone(f.live)
}

func TestAStartIsPaidForOnceByTheBootLoaderOrByLinux(t *testing.T) {
	for _, stuck := range []bool{false, true} {
		f := newFAT("deimos_1.0.0.efi")
		f.stuck = stuck
		must(t, install(f.store("1.0.0"), "o2", "2.0.0"))
		if n := f.starts(t); n != slot.Tries {
			t.Errorf("the boot loader cannot rename: %v; the new firmware had %d starts, %s", stuck, n, f.names())
		}
		wantSettled(t, f.store("1.0.0"), slot.RolledBack)
	}
}

func TestATrialEndsWhereTheBootLoaderCannotCountAndNothingIsRemembered(t *testing.T) {
	for name, forget := range map[string]func(*fat){
		"the record is lost":         func(f *fat) { f.rec = record{} },
		"the record cannot be saved": func(f *fat) { f.full = errors.New("no space") },
		"an older agent's record":    func(f *fat) { f.rec.Trial.Left = 0 },
	} {
		f := newFAT("deimos_1.0.0.efi")
		f.stuck = true
		must(t, install(f.store("1.0.0"), "o2", "2.0.0"))
		forget(f)
		if n := f.starts(t); n > slot.Tries {
			t.Errorf("%s: %d starts", name, n)
		}
	}
}

func TestACutWhileAStartIsPaidForLengthensTheTrialByOneAtMost(t *testing.T) {
	begin := func() *fat {
		f := newFAT("deimos_1.0.0.efi")
		f.stuck = true
		must(t, install(f.store("1.0.0"), "o2", "2.0.0"))
		f.boot(t)
		return f
	}
	do := func(f *fat) { must(t, f.store("2.0.0").CountStart()) }
	everyCut(t, begin, do, func(t *testing.T, f *fat) {
		if n := f.starts(t); n > slot.Tries+1 {
			t.Errorf("%d more starts", n)
		}
	})
}

// A new device, and one whose first update comes before anybody knows.
func TestAMachineWhoseBootLoaderDoesNotCountTakesNoFirmwareTwice(t *testing.T) {
	for _, c := range []struct {
		names   []string
		running string
	}{{[]string{"deimos_1.0.0+3.efi"}, "1.0.0"}, {[]string{"deimos_0.9.0.efi", "deimos_1.0.0+3.efi"}, "1.0.0"}} {
		begin := func() *fat {
			f := newFAT(c.names...)
			f.stuck = true
			return f
		}
		everyCut(t, begin, func(f *fat) { must(t, f.store(f.boot(t)).NoteLoader()) }, func(t *testing.T, f *fat) {
			s := f.store(f.boot(t))
			must(t, s.NoteLoader())
			must(t, s.CountStart())
			must(t, s.Confirm(t.Context()))
			before := f.names()
			if err := install(s, "o2", "2.0.0"); !errors.Is(err, ErrUncounted) {
				t.Errorf("an install: %v", err)
			}
			if err := s.CheckRoom("2.0.0", imageSize); !errors.Is(err, ErrUncounted) {
				t.Errorf("a look before it is fetched: %v", err)
			}
			if f.names() != before || f.boot(t) != c.running {
				t.Errorf("%s became %s", before, f.names())
			}
			must(t, s.NoteLoader()) // the next start
			must(t, f.remove(uncounted))
			must(t, install(s, "o2", "2.0.0"))
		})
	}
}

func TestABootLoaderThatCountsIsNotNoted(t *testing.T) {
	for _, names := range [][]string{{"deimos_1.0.0+3.efi"}, {"deimos_1.0.0+1-2.efi"}, {"deimos_1.0.0.efi"}, {"deimos_0.9.0.efi", "deimos_1.0.0+3.efi"}} {
		f := newFAT(names...)
		f.rec.Trial = &trial{From: "0.9.0", To: "1.0.0", Left: slot.Tries}
		s := f.store(f.boot(t))
		before := f.names()
		must(t, s.NoteLoader())
		must(t, s.CountStart())
		if f.names() != before {
			t.Errorf("%s became %s", before, f.names())
		}
		must(t, s.Confirm(t.Context()))
		must(t, install(s, "o2", "2.0.0"))
	}
}

func TestWhatIsNotOnTrialIsNotCounted(t *testing.T) {
	for _, names := range [][]string{{"deimos_2.0.0+3.efi"}, {"deimos_1.0.0.efi", "deimos_2.0.0.efi"}, {"deimos_1.0.0.efi", "deimos_2.0.0+0-3.efi"}} {
		f := newFAT(names...)
		must(t, f.store("2.0.0").CountStart())
		if got := strings.Split(f.names(), " "); !slices.Equal(got, names) {
			t.Errorf("%s became %s", names, got)
		}
	}
}

// A reset to factory takes what is remembered of a trial, at any moment of it; the
// boot loader has started either firmware since.
func TestADeviceThatWasResetDuringATrialTakesUpdatesAndAlwaysBoots(t *testing.T) {
	trials := map[string]func() *fat{
		"not tried yet": func() *fat { return newFAT("deimos_1.0.0.efi", "deimos_2.0.0+3.efi") },
		"tried once":    func() *fat { return newFAT("deimos_1.0.0.efi", "deimos_2.0.0+2-1.efi") },
		"used up":       func() *fat { return newFAT("deimos_1.0.0.efi", "deimos_2.0.0+0-3.efi") },
		"a new device":  func() *fat { return newFAT("deimos_1.0.0+2-1.efi", "deimos_2.0.0+3.efi") },
	}
	takes := func(t *testing.T, f *fat, running string) {
		t.Helper()
		must(t, install(f.store(running), "o3", "3.0.0"))
		if got := f.boot(t); got != "3.0.0" {
			t.Errorf("%s runs, not the update; the disk holds %s", got, f.names())
		}
	}
	for name, begin := range trials {
		t.Run("goes on with the old one, "+name, func(t *testing.T) {
			f := begin()
			if _, _, err := f.store("1.0.0").State(); err != nil {
				t.Fatal(err)
			}
			takes(t, f, "1.0.0")
			everyCut(t, begin, func(f *fat) {
				_, _, err := f.store("1.0.0").State() // as the agent asks when it starts
				must(t, err)
			}, func(t *testing.T, f *fat) {
				running := f.boot(t)
				if running == "2.0.0" { // the cut came before; the trial goes on
					must(t, f.store(running).Confirm(t.Context()))
				}
				takes(t, f, running)
			})
		})
	}
	t.Run("runs the new one, which is not confirmed", func(t *testing.T) {
		f := trials["not tried yet"]()
		f.starts(t)
		if got := f.boot(t); got != "1.0.0" {
			t.Fatalf("%s runs", got)
		}
		takes(t, f, "1.0.0")
	})
	t.Run("runs from another disk", func(t *testing.T) {
		f := newFAT("deimos_2.0.0+3.efi")
		if _, _, err := f.store("1.0.0").State(); err != nil || f.boot(t) != "2.0.0" {
			t.Errorf("%v; the disk holds %s", err, f.names())
		}
	})
}

func TestCounterOfTheBootLoadersVariable(t *testing.T) {
	for path, want := range map[string]string{`\EFI\Linux\deimos_2.0.0+2-1.efi`: "2 1 true", "/EFI/Linux/deimos_2.0.0+3.efi": "3 0 true", `\EFI\Linux\deimos_2.0.0.efi`: "0 0 false", "": "0 0 false", `\EFI\Linux\debian+3.efi`: "0 0 false"} {
		left, tried, ok := Counter(path)
		if got := fmt.Sprint(left, tried, ok); got != want {
			t.Errorf("%q is %s, want %s", path, got, want)
		}
	}
}

func TestTheLastTryCanBeConfirmed(t *testing.T) {
	f := newFAT("deimos_1.0.0.efi", "deimos_2.0.0+0-3.efi")
	f.rec.Trial = onTrial().rec.Trial
	s := f.store("2.0.0")
	must(t, s.Confirm(context.Background()))
	wantSettled(t, s, slot.Confirmed)
	if got := f.boot(t); got != "2.0.0" {
		t.Errorf("%s boots", got)
	}
}

func TestWhatAnInstallRefusesChangesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		disk    []string
		room    int64
		version string
		content string
		want    error
	}{
		"the running version":       {[]string{"deimos_1.0.0.efi"}, 1 << 30, "1.0.0", "1.0.0", ErrRunning},
		"an older version":          {[]string{"deimos_1.0.0.efi"}, 1 << 30, "0.9.0", "0.9.0", ErrOlder},
		"before it is confirmed":    {[]string{"deimos_0.9.0.efi", "deimos_1.0.0+2-1.efi"}, 1 << 30, "2.0.0", "2.0.0", slot.ErrBusy},
		"while one is on trial":     {[]string{"deimos_1.0.0.efi", "deimos_1.5.0+3.efi"}, 1 << 30, "2.0.0", "2.0.0", slot.ErrBusy},
		"below a confirmed one":     {[]string{"deimos_1.0.0.efi", "deimos_1.5.0.efi"}, 1 << 30, "2.0.0", "2.0.0", slot.ErrBusy},
		"without room":              {[]string{"deimos_1.0.0.efi"}, margin, "2.0.0", "2.0.0", ErrSpace},
		"without the running image": {[]string{"deimos_0.9.0.efi"}, 1 << 30, "2.0.0", "2.0.0", ErrUnknown},
		"other bytes":               {[]string{"deimos_1.0.0.efi"}, 1 << 30, "2.0.0", "2.1.0", nil},
		"a name for another folder": {[]string{"deimos_1.0.0.efi"}, 1 << 30, "2.0.0/../x", "2.0.0", nil},
	} {
		f := newFAT(c.disk...)
		f.room, f.rec.Trial = c.room, &trial{Order: "o1", From: "1.0.0", To: "1.5.0"}
		err := f.store("1.0.0").Install(context.Background(), "o2", slot.Image{Version: c.version, SHA256: about(c.version).SHA256}, imageSize, bytes.NewReader(imageOf(c.content)), nil)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if got := f.names(); got != strings.Join(c.disk, " ") {
			t.Errorf("%s: the disk holds %s", name, got)
		}
	}
}

// TestANewFirmwareIsCheckedBeforeItCanBoot looks at the disk as it is while the check runs, and after it.
func TestANewFirmwareIsCheckedBeforeItCanBoot(t *testing.T) {
	f := newFAT("deimos_1.0.0.efi")
	no := errors.New("no")
	err := f.store("1.0.0").Install(context.Background(), "o2", about("2.0.0"), imageSize, bytes.NewReader(imageOf("2.0.0")), func(image io.ReaderAt) error {
		got := make([]byte, imageSize)
		if _, err := image.ReadAt(got, 0); err != nil || !bytes.Equal(got, imageOf("2.0.0")) {
			t.Errorf("the check is shown something else: %v", err)
		}
		if f.names() != "deimos_1.0.0.efi deimos_2.0.0+3.efi.tmp" {
			t.Errorf("it could boot already: %s", f.names())
		}
		return no
	})
	if !errors.Is(err, no) || f.names() != "deimos_1.0.0.efi" {
		t.Errorf("%v, the disk holds %s", err, f.names())
	}
	if trial, _, err := f.store("1.0.0").State(); trial != nil || err != nil {
		t.Errorf("what was refused is on trial: %+v %v", trial, err)
	}
}

func TestTheOnlyFirmwareOfANewDeviceIsNotOnTrialAndKeptByAnInstall(t *testing.T) {
	f := newFAT("deimos_1.0.0+2-1.efi")
	s := f.store("1.0.0")
	if trial, err := s.OnTrial(); trial || err != nil {
		t.Errorf("on trial: %v %v", trial, err)
	}
	must(t, install(s, "o2", "2.0.0"))
	if got := f.names(); got != "deimos_1.0.0.efi deimos_2.0.0+3.efi" {
		t.Errorf("the disk holds %s", got)
	}
}

// TestAFirmwareThatTheBootLoaderPassesOverIsGivenUp has the old one running after
// the restart: the machine must not restart for it again and again.
func TestAFirmwareThatTheBootLoaderPassesOverIsGivenUp(t *testing.T) {
	begin := func() *fat {
		f := newFAT("deimos_1.0.0.efi")
		s := f.store("1.0.0")
		s.boot = "first"
		must(t, install(s, "o2", "2.0.0"))
		if out, err := s.Settled(); out != nil || err != nil {
			t.Fatalf("settled before the restart: %+v %v", out, err)
		}
		return f
	}
	later := func(f *fat) *Store {
		s := f.store("1.0.0")
		s.boot = "second"
		return s
	}
	everyCut(t, begin, func(f *fat) { wantSettled(t, later(f), slot.RolledBack) }, func(t *testing.T, f *fat) {
		wantSettled(t, later(f), slot.RolledBack)
		if f.names() != "deimos_1.0.0.efi" {
			t.Errorf("the disk holds %s", f.names())
		}
	})
}

func TestARepeatOfTheOrderInstallsNothing(t *testing.T) {
	f := newFAT("deimos_1.0.0.efi")
	must(t, install(f.store("1.0.0"), "o2", "2.0.0"))
	f.ops = 0
	must(t, install(f.store("1.0.0"), "o2", "2.0.0"))
}

// The examples of the Version Format Specification, as far as our characters go.
func TestVersionsSortAsTheBootLoaderSortsThem(t *testing.T) {
	order := []string{"1~rc1", "1", "1-1", "1^post", "1.0", "1.0.1", "1.2~rc1", "1.2", "1.2a", "1.9", "1.10", "11a", "11b", "122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-3", "123-3.1", "123^patched-1", "123.1-1"}
	for i, a := range order {
		for j, b := range order {
			if got, want := compareVersions(a, b), sign(i-j); got != want {
				t.Errorf("%s against %s is %d, want %d", a, b, got, want)
			}
		}
	}
}

func sign(n int) int { return min(1, max(-1, n)) }

func TestNamesSayWhatTheyAre(t *testing.T) {
	for name, want := range map[string]string{
		"deimos_1.0.efi":           "deimos_1.0.efi",
		"DEIMOS_1.0-RC1+3.EFI":     "deimos_1.0-rc1+3.efi",
		"deimos_1.0+2-1.efi":       "deimos_1.0+2-1.efi",
		"deimos_1.0+0003-0000.efi": "deimos_1.0+3.efi",
		"deimos_.efi":              "",
		"debian_1.0.efi":           "",
		"deimos_1.0+3+3.efi":       "",
		"deimos_1.0+.efi":          "",
	} {
		f, ok := parseName(name)
		if ok != (want != "") || ok && f.String() != want {
			t.Errorf("%s is %+v (%v), want %q", name, f, ok, want)
		}
	}
}

// TestOnARealFileSystem is one update from order to report; on FAT if this
// machine can mount it, else in a folder.
func TestOnARealFileSystem(t *testing.T) {
	esp, state := espFolder(t), t.TempDir()
	must(t, os.WriteFile(filepath.Join(esp, "deimos_1.0.0.efi"), imageOf("1.0.0"), 0o600))
	old, err := Open(filepath.Dir(filepath.Dir(esp)), state, "1.0.0", "")
	must(t, err)
	must(t, install(old, "o2", "2.0.0"))
	must(t, os.Rename(filepath.Join(esp, "deimos_2.0.0+3.efi"), filepath.Join(esp, "deimos_2.0.0+2-1.efi")))
	s, err := Open(filepath.Dir(filepath.Dir(esp)), state, "2.0.0", "")
	must(t, err)
	if trial, err := s.OnTrial(); !trial || err != nil {
		t.Fatalf("on trial: %v %v", trial, err)
	}
	must(t, s.Confirm(context.Background()))
	wantSettled(t, s, slot.Confirmed)
	got, err := os.ReadFile(filepath.Join(esp, "deimos_2.0.0.efi"))
	must(t, err)
	if !bytes.Equal(got, imageOf("2.0.0")) {
		t.Error("the image has changed")
	}
}

func espFolder(t *testing.T) string {
	dir := t.TempDir()
	raw, mnt := filepath.Join(dir, "esp"), filepath.Join(dir, "mnt")
	must(t, os.Mkdir(mnt, 0o700))
	must(t, os.WriteFile(raw, nil, 0o600))
	must(t, os.Truncate(raw, 64<<20))
	if os.Geteuid() == 0 && exec.Command("mkfs.vfat", raw).Run() == nil && exec.Command("mount", "-o", "loop", "-t", "vfat", raw, mnt).Run() == nil {
		t.Cleanup(func() { must(t, exec.Command("umount", mnt).Run()) })
		t.Log("on FAT")
	}
	esp := filepath.Join(mnt, Folder)
	must(t, os.MkdirAll(esp, 0o700))
	return esp
}
