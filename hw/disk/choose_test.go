package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

const tb = 1e12

// twoDisks is a machine with its system on one disk and another one for data.
func twoDisks() *hw.Inventory {
	return &hw.Inventory{
		Disks: []hw.Disk{
			{Name: "mmcblk0", Serial: "0x1", Bus: "emmc", Size: 64e9, Power: hw.PowerAwake, System: true,
				Partitions: []hw.Partition{{Name: "mmcblk0p1", Size: 5e8, Mounts: []string{"/boot/firmware"}}, {Name: "mmcblk0p2", Size: 63e9, Mounts: []string{"/"}}}},
			{Name: "sda", Serial: "WD1", Bus: "sata", Size: tb, Power: hw.PowerAwake,
				Partitions: []hw.Partition{{Name: "sda1", Size: tb, Mounts: []string{"/srv/data"}}}},
		},
		Filesystems: []hw.Filesystem{
			{Mount: "/", Source: "/dev/mmcblk0p2", Disk: "mmcblk0", Type: "ext4", Total: 63e9, Free: 50e9},
			{Mount: "/boot/firmware", Source: "/dev/mmcblk0p1", Disk: "mmcblk0", Type: "vfat", Total: 5e8, Free: 4e8},
			{Mount: "/srv/data", Source: "/dev/sda1", Disk: "sda", Type: "ext4", Total: tb, Free: 9e11},
		},
	}
}

// alone is a machine with one disk.
func alone() *hw.Inventory {
	inv := twoDisks()
	inv.Disks, inv.Filesystems = inv.Disks[:1], inv.Filesystems[:2]
	return inv
}

const state = "/var/lib/deimos"

func auto() Options { return Options{Auto: true, State: state} }

// empty is what an empty filesystem shows.
func empty(string, string, string, bool) sight { return sight{fsid: "f"} }

// shows is a look at filesystems of which some hold something.
func shows(what map[string]sight) func(string, string, string, bool) sight {
	return func(_, mount, _ string, asleep bool) sight {
		s, ok := what[mount]
		if !ok {
			s.fsid = "f"
		}
		if asleep {
			return sight{fsid: s.fsid, asleep: true}
		}
		return s
	}
}

func find(t *testing.T, all []Candidate, mount string) Candidate {
	t.Helper()
	i := slices.IndexFunc(all, func(c Candidate) bool { return c.Mount == mount })
	if i < 0 {
		t.Fatalf("%s is not listed: %+v", mount, all)
	}
	return all[i]
}

func ptr[T any](v T) *T { return &v }

func TestEachRuleHasItsCode(t *testing.T) {
	data, root := 2, 0
	for name, c := range map[string]struct {
		inv    func() *hw.Inventory
		change func(*hw.Inventory, *Options)
		sees   sight
		of     string
		want   string
	}{
		"empty data disk":   {twoDisks, nil, sight{}, "/srv/data", CodeOK},
		"ours":              {twoDisks, nil, sight{ours: true, used: 5e9}, "/srv/data", CodeOK},
		"USB, empty":        {twoDisks, func(i *hw.Inventory, _ *Options) { i.Disks[1].Bus = "usb" }, sight{}, "/srv/data", CodeOK},
		"removable":         {twoDisks, func(i *hw.Inventory, _ *Options) { i.Disks[1].Removable = true }, sight{}, "/srv/data", CodeRemovable},
		"removable, ours":   {twoDisks, func(i *hw.Inventory, _ *Options) { i.Disks[1].Removable = true }, sight{ours: true}, "/srv/data", CodeOK},
		"foreign data":      {twoDisks, nil, sight{foreign: []string{"photos"}}, "/srv/data", CodeForeign},
		"foreign, consent":  {twoDisks, func(_ *hw.Inventory, o *Options) { o.Use = []string{"/srv/data/"} }, sight{foreign: []string{"photos"}}, "/srv/data", CodeConsent},
		"consent by serial": {twoDisks, func(_ *hw.Inventory, o *Options) { o.Use = []string{"WD1"} }, sight{foreign: []string{"photos"}}, "/srv/data", CodeConsent},
		"another's serial":  {twoDisks, func(_ *hw.Inventory, o *Options) { o.Use = []string{"WD2"} }, sight{foreign: []string{"photos"}}, "/srv/data", CodeForeign},
		"never by mount":    {twoDisks, func(_ *hw.Inventory, o *Options) { o.Use, o.Never = []string{"WD1"}, []string{"/srv/data"} }, sight{}, "/srv/data", CodeNever},
		"never by name":     {twoDisks, func(_ *hw.Inventory, o *Options) { o.Never = []string{"/dev/sda"} }, sight{}, "/srv/data", CodeNever},
		"never by serial":   {twoDisks, func(_ *hw.Inventory, o *Options) { o.Never = []string{"WD1"} }, sight{}, "/srv/data", CodeNever},
		"not asked":         {twoDisks, func(_ *hw.Inventory, o *Options) { o.Auto = false }, sight{}, "/srv/data", CodeNotAsked},
		"asked, not auto":   {twoDisks, func(_ *hw.Inventory, o *Options) { o.Auto, o.Use = false, []string{"/srv/data"} }, sight{}, "/srv/data", CodeConsent},
		"read-only":         {twoDisks, func(i *hw.Inventory, o *Options) { i.Filesystems[data].ReadOnly, o.Use = true, []string{"/srv/data"} }, sight{}, "/srv/data", CodeReadOnly},
		"failing": {twoDisks, func(i *hw.Inventory, o *Options) {
			i.Disks[1].Health, o.Use = &hw.Health{Passed: ptr(false)}, []string{"WD1"}
		}, sight{}, "/srv/data", CodeFailing},
		"well":          {twoDisks, func(i *hw.Inventory, _ *Options) { i.Disks[1].Health = &hw.Health{Passed: ptr(true)} }, sight{}, "/srv/data", CodeOK},
		"vfat":          {twoDisks, func(i *hw.Inventory, _ *Options) { i.Filesystems[data].Type = "vfat" }, sight{}, "/srv/data", CodeWeak},
		"ntfs":          {twoDisks, func(i *hw.Inventory, _ *Options) { i.Filesystems[data].Type = "fuseblk" }, sight{}, "/srv/data", CodeWeak},
		"vfat, consent": {twoDisks, func(i *hw.Inventory, o *Options) { i.Filesystems[data].Type, o.Use = "vfat", []string{"WD1"} }, sight{}, "/srv/data", CodeConsent},
		"network":       {twoDisks, func(i *hw.Inventory, o *Options) { i.Filesystems[data].Type, o.Use = "nfs4", []string{"/srv/data"} }, sight{}, "/srv/data", CodeVirtual},
		"fuse": {twoDisks, func(i *hw.Inventory, o *Options) {
			i.Filesystems[data].Type, o.Use = "fuse.sshfs", []string{"/srv/data"}
		}, sight{}, "/srv/data", CodeVirtual},
		"no real disk":   {twoDisks, func(i *hw.Inventory, o *Options) { i.Filesystems[data].Disk, o.Use = "", []string{"/srv/data"} }, sight{}, "/srv/data", CodeNoDisk},
		"board excludes": {twoDisks, func(i *hw.Inventory, o *Options) { i.Disks[1].Bus, o.Board.Disks.Never = "sd", []string{"sd"} }, sight{}, "/srv/data", CodeBus},
		"board excludes, consent": {twoDisks, func(i *hw.Inventory, o *Options) {
			i.Disks[1].Bus, o.Board.Disks.Never, o.Use = "sd", []string{"sd"}, []string{"WD1"}
		}, sight{}, "/srv/data", CodeConsent},
		"desktop's mount": {twoDisks, func(i *hw.Inventory, o *Options) {
			i.Filesystems[data].Mount = "/media/me/STICK"
		}, sight{}, "/media/me/STICK", CodeTemporary},
		"too small": {twoDisks, func(i *hw.Inventory, _ *Options) {
			i.Filesystems[data].Total, i.Filesystems[data].Free = 1400*mib, 1300*mib
		}, sight{}, "/srv/data", CodeSmall},
		"too small, consent": {twoDisks, func(i *hw.Inventory, o *Options) {
			i.Filesystems[data].Total, i.Filesystems[data].Free, o.Use = 1400*mib, 1300*mib, []string{"WD1"}
		}, sight{}, "/srv/data", CodeSmall},
		"full":                      {twoDisks, func(i *hw.Inventory, _ *Options) { i.Filesystems[data].Free = 1e9 }, sight{}, "/srv/data", CodeFull},
		"full of our chunks":        {twoDisks, func(i *hw.Inventory, _ *Options) { i.Filesystems[data].Free = 1e9 }, sight{ours: true, used: 9e11}, "/srv/data", CodeOK},
		"size unknown":              {twoDisks, func(i *hw.Inventory, _ *Options) { i.Filesystems[data].Total = 0 }, sight{}, "/srv/data", CodeUnreadable},
		"hangs":                     {twoDisks, nil, sight{err: errors.New("did not answer")}, "/srv/data", CodeUnreadable},
		"asleep":                    {twoDisks, func(i *hw.Inventory, _ *Options) { i.Disks[1].Power = hw.PowerAsleep }, sight{}, "/srv/data", CodeAsleep},
		"asleep, consent":           {twoDisks, func(i *hw.Inventory, o *Options) { i.Disks[1].Power, o.Use = hw.PowerAsleep, []string{"WD1"} }, sight{}, "/srv/data", CodeAsleep},
		"starts from it":            {twoDisks, func(_ *hw.Inventory, o *Options) { o.Use = []string{"/boot/firmware"} }, sight{}, "/boot/firmware", CodeBoot},
		"system, another disk":      {twoDisks, nil, sight{}, "/", CodeSystem},
		"system, owner":             {twoDisks, func(_ *hw.Inventory, o *Options) { o.Use = []string{"/"} }, sight{foreign: []string{"bin"}}, "/", CodeConsent},
		"system, board":             {twoDisks, func(_ *hw.Inventory, o *Options) { o.Board.Disks.System = true }, sight{foreign: []string{"bin"}}, "/", CodeOnly},
		"system, alone":             {alone, nil, sight{foreign: []string{"bin", "etc"}}, "/", CodeOnly},
		"system, alone, on SD":      {alone, func(i *hw.Inventory, o *Options) { i.Disks[0].Bus, o.Board.Disks.Never = "sd", []string{"sd"} }, sight{}, "/", CodeBus},
		"system, below the floor":   {alone, func(i *hw.Inventory, _ *Options) { i.Filesystems[root].Free = 8 * gib }, sight{}, "/", CodeFull},
		"system, owner, full":       {alone, func(i *hw.Inventory, o *Options) { i.Filesystems[root].Free, o.Use = 8*gib, []string{"/"} }, sight{}, "/", CodeFull},
		"system, a stick beside it": {twoDisks, func(i *hw.Inventory, _ *Options) { i.Disks[1].Removable = true }, sight{}, "/", CodeOnly},
		"system by its mounts":      {twoDisks, func(i *hw.Inventory, _ *Options) { i.Disks[0].System = false }, sight{}, "/", CodeSystem},
		"our image's partition":     {alone, func(_ *hw.Inventory, o *Options) { o.Own = true }, sight{foreign: []string{"log"}}, "/", CodeOK},
		"our image's, on a stick":   {alone, func(i *hw.Inventory, o *Options) { i.Disks[0].Removable, o.Own = true, true }, sight{}, "/", CodeOK},
		"system's other part": {alone, func(i *hw.Inventory, _ *Options) {
			i.Filesystems = append(i.Filesystems, hw.Filesystem{Mount: "/home", Disk: "mmcblk0", Type: "ext4", Total: tb, Free: tb})
		}, sight{}, "/home", CodeSystem},
	} {
		inv, o := c.inv(), auto()
		if c.change != nil {
			c.change(inv, &o)
		}
		got := find(t, choose(inv, o, nil, shows(map[string]sight{c.of: c.sees})), c.of)
		used := slices.Contains([]string{CodeOK, CodeConsent, CodeOnly, CodeInUse}, c.want)
		if got.Code != c.want || got.Use != used || got.Why == "" || (got.Capacity > 0) != used {
			t.Errorf("%s: got %s (use %v, capacity %d: %s), want %s", name, got.Code, got.Use, got.Capacity, got.Why, c.want)
		}
	}
}

func TestFoldersAndCapacity(t *testing.T) {
	all := choose(twoDisks(), Options{Auto: true, State: state, Use: []string{"/"}}, nil, shows(map[string]sight{"/srv/data": {used: 7e9, ours: true}}))
	root, data := find(t, all, "/"), find(t, all, "/srv/data")
	if root.Dir != "/var/lib/deimos/volumes/main" || data.Dir != "/srv/data/deimos" {
		t.Errorf("%s, %s", root.Dir, data.Dir)
	}
	if root.Floor != 8*gib || root.Capacity != 50e9-8*gib {
		t.Errorf("system: floor %d, capacity %d", root.Floor, root.Capacity)
	}
	image := Options{Auto: true, State: state, Own: true}
	if own := find(t, choose(alone(), image, nil, shows(nil)), "/"); own.System || own.Floor != max(own.Size/100, 512*mib) || own.Capacity != own.Free-own.Floor {
		t.Errorf("the data partition of our image: %+v", own)
	}
	if data.Floor != tb/100 || data.Capacity != 9e11+7e9-tb/100 {
		t.Errorf("data: floor %d, capacity %d", data.Floor, data.Capacity)
	}
	if !root.System || data.System || data.Serial != "WD1" {
		t.Errorf("%+v %+v", root, data)
	}
}

func TestOneFilesystemOfADisk(t *testing.T) {
	inv := twoDisks()
	inv.Disks[1].Partitions = append(inv.Disks[1].Partitions, hw.Partition{Name: "sda2", Size: tb, Mounts: []string{"/srv/more"}})
	inv.Filesystems = append(inv.Filesystems, hw.Filesystem{Mount: "/srv/more", Disk: "sda", Type: "xfs", Total: 2 * tb, Free: 2 * tb})
	used := func(o Options, past map[string]entry) []string {
		var dirs []string
		for _, c := range choose(inv, o, past, shows(map[string]sight{"/srv/data": {fsid: "a", ours: true}, "/srv/more": {fsid: "b"}})) {
			if c.Use {
				dirs = append(dirs, c.Mount)
			}
		}
		return dirs
	}
	if got := used(auto(), nil); !slices.Equal(got, []string{"/srv/more"}) {
		t.Errorf("the largest: %v", got)
	}
	o := auto()
	o.Use = []string{"/srv/data"}
	if got := used(o, nil); !slices.Equal(got, []string{"/srv/data"}) {
		t.Errorf("the one that the owner names: %v", got)
	}
	if got := used(auto(), map[string]entry{"WD1/a": {Test: Test{Passed: true}}}); !slices.Equal(got, []string{"/srv/data"}) {
		t.Errorf("the one in use: %v", got)
	}
	o.Use = []string{"/srv/more"}
	if got := used(o, map[string]entry{"WD1/a": {Test: Test{Passed: true}}}); !slices.Equal(got, []string{"/srv/data"}) {
		t.Errorf("the one in use, before the one that the owner names: %v", got)
	}
}

func TestADiskInUseStaysInUse(t *testing.T) {
	passed := map[string]entry{"WD1/a": {Test: Test{Passed: true, WriteBps: 5}}}
	see := func(change func(*hw.Inventory, *sight), past map[string]entry) Candidate {
		inv, s := twoDisks(), sight{fsid: "a", ours: true, used: 3e9}
		change(inv, &s)
		return find(t, choose(inv, auto(), past, shows(map[string]sight{"/srv/data": s})), "/srv/data")
	}
	for name, change := range map[string]func(*hw.Inventory, *sight){
		"its owner put something there": func(_ *hw.Inventory, s *sight) { s.foreign = []string{"photos"} },
		"it sleeps":                     func(i *hw.Inventory, _ *sight) { i.Disks[1].Power = hw.PowerAsleep },
		"it is full":                    func(i *hw.Inventory, _ *sight) { i.Filesystems[2].Free = 0 },
	} {
		if c := see(change, passed); c.Code != CodeInUse || c.Capacity <= 0 || c.Test == nil || c.Test.WriteBps != 5 {
			t.Errorf("%s: %+v", name, c)
		}
		if name == "it is full" {
			continue // our chunks there make it one of ours in any case
		}
		if c := see(change, nil); c.Use {
			t.Errorf("%s, and it is not known: %+v", name, c)
		}
		if c := see(change, map[string]entry{"WD1/b": passed["WD1/a"]}); c.Use {
			t.Errorf("%s, and it is another filesystem: %+v", name, c)
		}
	}
	if c := see(func(_ *hw.Inventory, s *sight) { s.ours, s.foreign = false, []string{"photos"} }, passed); c.Code != CodeForeign {
		t.Errorf("our folder is gone: %+v", c)
	}
}

func TestASleepingDiskIsNotRead(t *testing.T) {
	inv := twoDisks()
	inv.Disks[1].Power = hw.PowerAsleep
	asked := map[string]bool{}
	choose(inv, auto(), nil, func(disk, _, _ string, asleep bool) sight {
		if disk == "sda" {
			asked[disk] = asleep
		}
		return sight{asleep: asleep}
	})
	if asleep, ok := asked["sda"]; !ok || !asleep {
		t.Errorf("looked at as if it were awake: %v", asked)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "photos"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s := lookAt("x", dir, filepath.Join(dir, "deimos"), true); len(s.foreign) > 0 || s.fsid == "" || !s.asleep {
		t.Errorf("%+v", s)
	}
}

// Behind many bridges, and for who is not root, it is not known whether a disk sleeps.
func TestADiskThatMaySleepIsReadOnlyIfItIsNamedOrInUse(t *testing.T) {
	passed := map[string]entry{"WD1/a": {Test: Test{Passed: true}}}
	for name, c := range map[string]struct {
		change func(*hw.Disk, *Options)
		past   map[string]entry
		want   string
	}{
		"behind USB":         {func(d *hw.Disk, _ *Options) { d.Bus = "usb" }, nil, CodeAsleep},
		"a hard disk":        {func(d *hw.Disk, _ *Options) { d.Rotational = true }, nil, CodeAsleep},
		"an SSD":             {func(*hw.Disk, *Options) {}, nil, CodeOK},
		"named by its owner": {func(d *hw.Disk, o *Options) { d.Rotational, o.Use = true, []string{"/srv/data"} }, nil, CodeConsent},
		"in use":             {func(d *hw.Disk, _ *Options) { d.Rotational = true }, passed, CodeInUse},
		"another was in use": {func(d *hw.Disk, _ *Options) { d.Rotational, d.Serial = true, "WD11" }, passed, CodeAsleep},
	} {
		inv, o := twoDisks(), auto()
		inv.Disks[1].Power = hw.PowerUnknown
		c.change(&inv.Disks[1], &o)
		got := find(t, choose(inv, o, c.past, shows(map[string]sight{"/srv/data": {fsid: "a", ours: true, used: 3e9}})), "/srv/data")
		if got.Code != c.want || got.Use && got.Capacity != 9e11+3e9-tb/100 {
			t.Errorf("%s: %+v, want %s", name, got, c.want)
		}
	}
}

func TestAnOwnersFolderOfOurNameIsForeign(t *testing.T) {
	dir := t.TempDir()
	own := filepath.Join(dir, "deimos")
	put := func(name string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(own, 0o700), os.WriteFile(filepath.Join(own, name), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	check := func(what string, want bool) {
		t.Helper()
		if s := lookAt("look", dir, own, false); s.ours != want || want == slices.Contains(s.foreign, "deimos") {
			t.Errorf("%s: %+v", what, s)
		}
	}
	if err := os.Mkdir(own, 0o700); err != nil {
		t.Fatal(err)
	}
	check("empty", true)
	put(testFile)
	check("a test that was cut short", true)
	put("thesis.odt")
	check("an owner's file", false)
	put(volumeFile)
	check("a volume", true)
}

// TestADiskThatFailedItsTestIsNotInUse: what a test refused is somebody else's again.
func TestADiskThatFailedItsTestIsNotInUse(t *testing.T) {
	sees := shows(map[string]sight{"/srv/data": {fsid: "a", ours: true, foreign: []string{"photos"}}})
	for passed, want := range map[bool]string{true: CodeInUse, false: CodeForeign} {
		past := map[string]entry{"WD1/a": {Test: Test{Passed: passed}}}
		if c := find(t, choose(twoDisks(), auto(), past, sees), "/srv/data"); c.Code != want {
			t.Errorf("passed %v: %+v", passed, c)
		}
	}
}

func TestASmallDiskInUseStaysInUse(t *testing.T) {
	inv := twoDisks()
	inv.Filesystems[2].Total, inv.Filesystems[2].Free = 1400*mib, 600*mib
	past := map[string]entry{"WD1/a": {Test: Test{Passed: true}}}
	sees := shows(map[string]sight{"/srv/data": {fsid: "a", ours: true, used: 300 * mib}})
	if c := find(t, choose(inv, auto(), past, sees), "/srv/data"); c.Code != CodeInUse || c.Capacity <= 0 || c.Capacity >= MinCapacity {
		t.Errorf("%+v", c)
	}
}

// TestARecordedMachinesFoldersAreNotLookedAt: what has the same name here is another.
func TestARecordedMachinesFoldersAreNotLookedAt(t *testing.T) {
	inv, dir := twoDisks(), t.TempDir()
	inv.System.Root = "/somewhere"
	inv.Filesystems[2].Mount = dir
	if c := find(t, Choose(inv, Options{Auto: true}), dir); c.Code != CodeUnreadable {
		t.Errorf("%+v", c)
	}
}

func TestWhatIsNotMountedIsListed(t *testing.T) {
	inv := twoDisks()
	inv.Disks = append(inv.Disks,
		hw.Disk{Name: "sdb", Serial: "NEW", Size: tb},
		hw.Disk{Name: "sdc", Serial: "OLD", Size: tb, Partitions: []hw.Partition{{Name: "sdc1", Size: 1 * mib}, {Name: "sdc2", Size: tb}}},
		hw.Disk{Name: "sdd", Size: 0}, // an empty card reader
	)
	all := choose(inv, auto(), nil, empty)
	var got []string
	for _, c := range all {
		if c.Mount == "" {
			got = append(got, c.Disk+" "+c.Code)
			if c.Use || !strings.Contains(c.Why, "erases") {
				t.Errorf("%+v", c)
			}
		}
	}
	if !slices.Equal(got, []string{"sdb not_mounted", "sdc not_mounted"}) {
		t.Errorf("%v", got)
	}
}

func TestStateOnItsOwnDisk(t *testing.T) {
	inv := twoDisks()
	o := Options{Auto: true, State: "/srv/data/agent"}
	see := func(foreign ...string) Candidate {
		return find(t, choose(inv, o, nil, shows(map[string]sight{"/srv/data": {foreign: foreign}})), "/srv/data")
	}
	if c := see("agent"); c.Code != CodeOK || c.Dir != "/srv/data/agent/volumes/main" {
		t.Errorf("only the state is on it: %+v", c)
	}
	if c := see("agent", "photos"); c.Code != CodeForeign {
		t.Errorf("photos beside the state: %+v", c)
	}
	o.State = "/srv/data"
	if c := see("journal", "identity"); c.Code != CodeOK {
		t.Errorf("it is the state: %+v", c)
	}
	o.State = "/srv/data2"
	if c := see("agent"); c.Code != CodeForeign || c.Dir != "/srv/data/deimos" {
		t.Errorf("a name that only begins alike: %+v", c)
	}
}

func TestALookSeesWhatIsThere(t *testing.T) {
	dir := t.TempDir()
	own := filepath.Join(dir, "deimos")
	for _, d := range []string{"lost+found", "deimos/a", "ph\x1botos"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile(filepath.Join(own, volumeFile), nil, 0o600), os.WriteFile(filepath.Join(own, "a", "chunk"), make([]byte, 1<<20), 0o600)); err != nil {
		t.Fatal(err)
	}
	s := lookAt("look", dir, own, false)
	if s.err != nil || !s.ours || s.used < 1<<20 || s.used > 2<<20 || !slices.Equal(s.foreign, []string{"ph?otos"}) {
		t.Errorf("%+v", s)
	}
	file := t.TempDir()
	if err := os.WriteFile(filepath.Join(file, "lost+found"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s := lookAt("look", file, filepath.Join(file, "deimos"), false); len(s.foreign) != 1 {
		t.Errorf("a file is taken for the folder of fsck: %+v", s)
	}
	other := t.TempDir()
	if err := os.Symlink(own, filepath.Join(other, "deimos")); err != nil {
		t.Fatal(err)
	}
	if s := lookAt("look", other, filepath.Join(other, "deimos"), false); s.ours || len(s.foreign) != 1 {
		t.Errorf("a link somewhere else counts as our folder: %+v", s)
	}
	if s := lookAt("look", filepath.Join(dir, "missing"), own, false); s.err == nil {
		t.Error("no folder, and no error")
	}
}

func TestAThousandDisks(t *testing.T) {
	inv := &hw.Inventory{}
	for i := range 1000 {
		name, mount := fmt.Sprintf("sd%d", i), fmt.Sprintf("/srv/%d", i)
		inv.Disks = append(inv.Disks, hw.Disk{Name: name, Size: tb, Mounts: []string{mount}})
		inv.Filesystems = append(inv.Filesystems, hw.Filesystem{Mount: mount, Disk: name, Type: "ext4", Total: tb, Free: tb})
	}
	for _, c := range choose(inv, auto(), nil, empty) {
		if !c.Use {
			t.Fatalf("%+v", c)
		}
	}
}

func TestThisMachineAndARecordedOne(t *testing.T) {
	inv, err := hw.Probe(t.Context(), hw.Options{Limit: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range Choose(inv, Options{Auto: true, State: t.TempDir(), Board: board.Detect("/")}) {
		if c.Code == "" || c.Why == "" || c.Use && (c.Capacity < MinCapacity || c.Dir == "") {
			t.Errorf("%+v", c)
		}
	}
	recorded := twoDisks()
	recorded.System.Root = "/somewhere"
	if c := find(t, Choose(recorded, auto()), "/srv/data"); c.Code != CodeUnreadable {
		t.Errorf("the disk of a recorded machine was looked at here: %+v", c)
	}
	if Choose(nil, auto()) != nil {
		t.Error("no inventory, and candidates")
	}
}
