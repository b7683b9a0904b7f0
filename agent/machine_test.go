package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/health"
	"github.com/deimos-edge/deimos/hw/panel"
	"github.com/deimos-edge/deimos/hw/watchdog"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
	"golang.org/x/sys/unix"
)

func TestTheLightShowsWhatMattersMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := bareMachine()
		steps := []struct {
			do   func()
			want panel.State
		}{
			{func() {}, panel.Starting},
			{func() { m.at(atClaim) }, panel.Waiting},
			{func() { m.at(atWork) }, panel.Starting}, // not online yet
			{func() { m.connected(true) }, panel.Online},
			{func() { m.busy(wire.KindJobRun, 1) }, panel.Working},
			{func() { m.busy(wire.KindPing, 1) }, panel.Working},
			{func() { m.health.Set(health.DiskFailing, "sda", "it says so"); time.Sleep(time.Hour) }, panel.Trouble},
			{func() { m.busy(wire.KindUpdateInstall, 1) }, panel.Updating},
			{func() { m.busy(wire.KindUpdateInstall, -1) }, panel.Trouble},
			{func() { m.health.Clear(health.DiskFailing, "sda"); time.Sleep(48 * time.Hour) }, panel.Working},
			{func() { m.busy(wire.KindJobRun, -1) }, panel.Online},
			{func() { m.connected(false) }, panel.Starting},
		}
		for i, s := range steps {
			s.do()
			if got := m.look(); got != s.want {
				t.Errorf("step %d: %s, want %s; warnings %+v", i, got, s.want, m.health.Visible())
			}
		}
	})
}

// realMachine looks at the machine that the test runs on.
func realMachine(t *testing.T, cfg Config) (*machine, func(error) error) {
	t.Helper()
	m, err := openMachine(t.Context(), cfg, cfg.detectBoard(discardLog()), discardLog())
	if err != nil {
		t.Fatal(err)
	}
	_, stop := m.begin(t.Context())
	return m, stop
}

func (m *machine) asked(t *testing.T, k wire.Kind, body any) (wire.Outcome, error) {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return m.routes()[k].Handle(t.Context(), wire.Order{Kind: k, Body: raw}, func(wire.Progress) {})
}

func TestTheMachineAnswersForItself(t *testing.T) {
	m, stop := realMachine(t, Config{StateDir: t.TempDir(), Version: "1.2.3"})
	m.sample(t.Context())
	m.sample(t.Context())

	out, err := m.asked(t, wire.KindInventory, struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	var inv hw.Inventory
	if err := json.Unmarshal(out.Attachment, &inv); err != nil || inv.Memory.Total == 0 {
		t.Errorf("the inventory: %+v, %v", inv, err)
	}
	if got := out.Body.(wire.InventoryReport).Digest; got != inv.Digest() {
		t.Errorf("its digest is %s, not %s", got, inv.Digest())
	}

	out, err = m.asked(t, wire.KindHistory, wire.HistoryRequest{Series: []string{"load1"}})
	if err != nil {
		t.Fatal(err)
	}
	var h wire.History
	if err := json.Unmarshal(out.Attachment, &h); err != nil || len(h.Series["load1"].Mean) == 0 {
		t.Errorf("the history: %+v, %v", h, err)
	}

	for _, seconds := range []int{-1, wire.MaxIdentify + 1} {
		_, err := m.asked(t, wire.KindIdentify, wire.Identify{Seconds: seconds})
		if p := wire.ProblemOf(err); err == nil || p.State != wire.Rejected || p.Code != wire.CodeBadBody {
			t.Errorf("identify for %d s: %v", seconds, err)
		}
	}
	if m.light.Exists() {
		t.Skip("this machine has a status light; it is not made to blink")
	}
	_, err = m.asked(t, wire.KindIdentify, wire.Identify{Seconds: 1})
	if p := wire.ProblemOf(err); err == nil || p.Code != wire.CodeNotSupported {
		t.Errorf("identify without a light: %v", err)
	}
	if err := stop(nil); err != nil {
		t.Error(err)
	}
}

// TestStatusTellsTheWarnings, while the agent runs and afterwards.
func TestStatusTellsTheWarnings(t *testing.T) {
	cfg := Config{StateDir: t.TempDir(), Version: "1.2.3"}
	lock, err := cfg.makeState()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LoadIdentity(cfg.path("identity")); err != nil {
		t.Fatal(err)
	}
	m, stop := realMachine(t, cfg)
	m.health.Set(health.Stalled, "heart", "it has made no progress")
	var s Status
	for deadline := time.Now().Add(limit); ; {
		if s, err = ReadStatus(cfg.StateDir); err != nil {
			t.Fatal(err)
		}
		if s.Machine != nil && len(s.Machine.Warnings) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no warning was noted: %+v", s.Machine)
		}
		time.Sleep(20 * time.Millisecond) // another process reads it, too
	}
	if w := s.Machine.Warnings[0]; !s.Running || s.Machine.Ended || w.Code != string(health.Stalled) || w.Subject != "heart" {
		t.Errorf("while it runs: %+v, %+v", s, s.Machine)
	}
	if err := stop(nil); err != nil {
		t.Error(err)
	}
	if err := lock.Close(); err != nil {
		t.Error(err)
	}
	if s, err = ReadStatus(cfg.StateDir); err != nil || s.Running || !s.Machine.Ended || s.Machine.Online {
		t.Errorf("afterwards: %+v, %+v, %v", s, s.Machine, err)
	}
}

// TestAResetLeavesNothingOfTheDevice but its software, what is not its own, and
// goes on after a power cut.
func TestAResetLeavesNothingOfTheDevice(t *testing.T) {
	cfg := Config{StateDir: filepath.Join(t.TempDir(), "state")}
	disk := filepath.Join(t.TempDir(), "deimos")
	foreign := filepath.Join(t.TempDir(), "photos")
	cfg.Volumes = []VolumeConfig{{Dir: foreign}}
	if err := os.MkdirAll(foreign, 0o700); err != nil {
		t.Fatal(err)
	}
	holiday := filepath.Join(foreign, "holiday.jpg")
	if err := os.WriteFile(holiday, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fill := func() {
		t.Helper()
		if _, err := LoadIdentity(cfg.path("identity")); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{disk, cfg.path("volumes", "main")} {
			v, err := store.Open(dir, store.Options{Log: discardLog()})
			if err != nil {
				t.Fatal(err)
			}
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
		a := &Agent{cfg: cfg}
		if err := a.noteChosen([]place{{VolumeConfig: VolumeConfig{Dir: disk}}}); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"slots/a", "journal", "history", "ota"} {
			if err := os.MkdirAll(cfg.path(name), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		slots, err := slot.Open(cfg.StateDir)
		if err != nil {
			t.Fatal(err)
		}
		factory := filepath.Join(t.TempDir(), "factory")
		if err := os.WriteFile(factory, nil, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := slots.InstallFactory(slot.A, factory, "1.2.3", ""); err != nil {
			t.Fatal(err)
		}
		if _, err := slots.BeginInstall("order of the old fleet", "1.2.3"); err != nil {
			t.Fatal(err)
		}
	}
	bare := func() {
		t.Helper()
		entries, err := os.ReadDir(cfg.StateDir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != "slots" && e.Name() != lockFile {
				t.Errorf("%s is left", e.Name())
			}
		}
		if _, err := os.Stat(cfg.path("slots", "a")); err != nil {
			t.Error(err)
		}
		for _, name := range []string{"state.json", "state.prev.json"} {
			if raw, _ := os.ReadFile(cfg.path("slots", name)); strings.Contains(string(raw), "old fleet") {
				t.Errorf("%s: %s", name, raw)
			}
		}
		if _, err := os.Stat(holiday); err != nil {
			t.Errorf("what is not the device's is gone: %v", err)
		}
		if left, _ := os.ReadDir(disk); len(left) > 0 {
			t.Errorf("the disk still holds %v", left)
		}
	}
	fill()
	if err := Reset(cfg); err != nil {
		t.Fatal(err)
	}
	bare()

	fill()
	if err := os.WriteFile(cfg.path(resetMark), nil, 0o600); err != nil { // the power went
		t.Fatal(err)
	}
	a := &Agent{cfg: cfg, log: discardLog()}
	if err := a.resetIfAsked(context.Background(), cfg.detectBoard(discardLog())); err != nil {
		t.Fatal(err)
	}
	bare()

	fill()
	if err := a.resetIfAsked(context.Background(), cfg.detectBoard(discardLog())); err != nil { // nobody has asked
		t.Fatal(err)
	}
	if _, err := os.Stat(cfg.path("identity", keyFile)); err != nil {
		t.Errorf("a device was reset that nobody wanted to reset: %v", err)
	}
	lock, err := cfg.makeState()
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := Reset(cfg); err == nil {
		t.Error("a device was reset while its agent runs")
	}
}

func TestTheOwnersBoardWins(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine.toml"), []byte("name = \"mine\"\ntitle = \"My board\"\n[match]\ncompatible = [\"me,mine\"]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	detected := board.Detect("/").Name
	for _, c := range []struct{ name, want string }{{"", detected}, {"mine", "mine"}, {"raspberry-pi-4", "raspberry-pi-4"}, {"no-such-board", detected}} {
		if got := (Config{Board: BoardConfig{Name: c.name, Profiles: dir}}).detectBoard(discardLog()).Name; got != c.want {
			t.Errorf("%q makes it %s, want %s", c.name, got, c.want)
		}
	}
}

// TestAStuckLoopIsAWarningOnlyWhileItIs.
func TestAStuckLoopIsAWarningOnlyWhileItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := bareMachine()
		var err error
		if m.dog, err = watchdog.New(watchdog.Options{Log: discardLog()}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		over := make(chan struct{})
		go func() { m.watchLoops(ctx); close(over) }()
		pulse := m.dog.Pulse("heart", time.Minute)
		time.Sleep(2 * time.Minute)
		if all := m.health.Visible(); len(all) != 1 || all[0].Code != string(health.Stalled) || all[0].Subject != "heart" {
			t.Errorf("stuck: %+v", all)
		}
		for range 60 {
			pulse.Beat()
			time.Sleep(30 * time.Second)
		}
		if all := m.health.Visible(); len(all) != 0 {
			t.Errorf("it goes on, and still: %+v", all)
		}
		cancel()
		<-over
	})
}

// TestADeviceThatIsNoMemberYetSaysThatNobodyAnswers: that is when its owner looks.
func TestADeviceThatIsNoMemberYetSaysThatNobodyAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := bareMachine()
		m.at(atClaim)
		m.answered(false)
		time.Sleep(time.Hour)
		if all := m.health.Visible(); len(all) != 1 || all[0].Code != string(health.Offline) {
			t.Errorf("with nobody there: %+v", all)
		}
		m.answered(true) // it may wait
		time.Sleep(time.Hour)
		if all := m.health.Visible(); len(all) != 0 {
			t.Errorf("while it waits to be claimed: %+v", all)
		}
		if m.look() != panel.Waiting {
			t.Errorf("the light shows %s", m.look())
		}
	})
}

func TestOnlyAStateFolderCanBeReset(t *testing.T) {
	home := t.TempDir()
	photo := filepath.Join(home, "photo.jpg")
	if err := os.WriteFile(photo, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Reset(Config{StateDir: home}); err == nil {
		t.Error("a folder without a device was reset")
	}
	entries, err := os.ReadDir(home)
	if err != nil || len(entries) != 1 {
		t.Errorf("it holds %v, %v", entries, err)
	}
	// What somebody else has put beside a device stays, too.
	if _, err := LoadIdentity(filepath.Join(home, "identity")); err != nil {
		t.Fatal(err)
	}
	if err := Reset(Config{StateDir: home}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(photo); err != nil {
		t.Error(err)
	}
}

func TestAMachineWithManyDisksComesInWithoutThem(t *testing.T) {
	a := joining(t, newIdentity(t), "https://127.0.0.1:1", "")
	many := hw.Inventory{Disks: make([]hw.Disk, 1000)}
	a.hw.inv.Store(&inventory{&many, ""})
	q, err := a.request()
	if err != nil || q.Inventory != nil {
		t.Errorf("its request carries %d bytes of inventory (%v)", len(q.Inventory), err)
	}
}

// TestADeviceWhoseDisksAllFailStaysToSayIt.
func TestADeviceWhoseDisksAllFailStaysToSayIt(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := Config{StateDir: t.TempDir(), Volumes: []VolumeConfig{{Dir: filepath.Join(file, "chunks")}}}
	m, stop := realMachine(t, cfg)
	a := &Agent{cfg: cfg, log: discardLog(), hw: m}
	if err := a.openVolumes(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(a.chunks.Volumes()); n != 0 {
		t.Errorf("%d volumes are open", n)
	}
	if err := os.Remove(file); err != nil { // the disk is put in order
		t.Fatal(err)
	}
	for _, u := range a.places.left {
		if u.next.Before(time.Now()) {
			t.Error("it is tried again at once")
		}
		u.next = time.Time{}
	}
	a.openRest(t.Context())
	if n := len(a.chunks.Volumes()); n != 1 {
		t.Errorf("%d volumes are open then", n)
	}
	a.measure()
	if capacity, _ := a.room(); capacity == 0 {
		t.Error("and there is no room")
	}
	if err := errors.Join(a.chunks.Close(), stop(nil)); err != nil {
		t.Error(err)
	}
}

// TestADiskThatHangsAtTheStartIsUsedOnceItAnswers, without another start.
func TestADiskThatHangsAtTheStartIsUsedOnceItAnswers(t *testing.T) {
	cfg := Config{StateDir: t.TempDir(), Volumes: []VolumeConfig{{Dir: filepath.Join(t.TempDir(), "chunks")}}}
	m, stop := realMachine(t, cfg)
	a := &Agent{cfg: cfg, log: discardLog(), hw: m}
	// What the kernel does not come back from is not begun a second time.
	answers, back := make(chan struct{}), make(chan struct{})
	if _, ok := hw.Within(t.Context(), time.Millisecond, "self-test of "+cfg.Volumes[0].Dir, func() bool { <-answers; close(back); return true }); ok {
		t.Fatal("the disk does not hang")
	}
	began := time.Now()
	if err := a.openVolumes(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(a.places.left) != 1 || a.places.left[0].final {
		t.Fatalf("at the start: %+v", a.places.left)
	}
	for i, pause := range []time.Duration{time.Minute, 5 * time.Minute, 15 * time.Minute, time.Hour, time.Hour} {
		if u := a.places.left[0]; u.next.Before(began.Add(pause)) || u.next.After(time.Now().Add(pause)) {
			t.Errorf("try %d: the next one comes in %s", i+1, time.Until(u.next))
		}
		began = time.Now()
		a.openRest(t.Context()) // not due
		if a.places.left[0].tries != i+1 {
			t.Errorf("it was tried %d times, not %d", a.places.left[0].tries, i+1)
		}
		a.places.left[0].next = time.Time{}
		a.openRest(t.Context())
	}
	if n := len(a.chunks.Volumes()); n != 0 {
		t.Errorf("%d volumes are open while it hangs", n)
	}
	close(answers)
	<-back
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for len(a.chunks.Volumes()) == 0 && ctx.Err() == nil { // the hang is over a moment after its answer
		for _, u := range a.places.left {
			u.next = time.Time{}
		}
		a.openRest(ctx)
		time.Sleep(time.Millisecond)
	}
	a.reopen(ctx, time.Hour) // ends, as nothing is left
	if len(a.chunks.Volumes()) != 1 || ctx.Err() != nil {
		t.Errorf("then: %d volumes are open", len(a.chunks.Volumes()))
	}
	if err := errors.Join(a.chunks.Close(), stop(nil)); err != nil {
		t.Error(err)
	}
}

// resettable is a state folder with a key in it.
func resettable(t *testing.T) Config {
	t.Helper()
	cfg := Config{StateDir: t.TempDir()}
	if _, err := LoadIdentity(cfg.path("identity")); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestAResetFollowsALinkToTheKey(t *testing.T) {
	cfg := resettable(t)
	elsewhere := filepath.Join(t.TempDir(), "identity")
	if err := errors.Join(os.Rename(cfg.path("identity"), elsewhere), os.Symlink(elsewhere, cfg.path("identity"))); err != nil {
		t.Fatal(err)
	}
	if err := Reset(cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(elsewhere, keyFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key is still there (%v)", err)
	}
}

// TestAResetEndsWhereSomethingIsMounted below the state.
func TestAResetEndsWhereSomethingIsMounted(t *testing.T) {
	cfg := resettable(t)
	if err := os.Mkdir(cfg.path("jobs"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", cfg.path("jobs"), "tmpfs", 0, "size=1m"); err != nil {
		testenv.Cannot(t, "only root can mount: %v", err)
	}
	defer func() {
		if err := unix.Unmount(cfg.path("jobs"), 0); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(cfg.path("jobs", "module"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Reset(cfg); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(cfg.path("jobs")); err != nil || len(left) != 0 {
		t.Errorf("%v is left (%v)", left, err)
	}
	if _, err := os.Stat(cfg.path("identity")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key is still there (%v)", err)
	}
}

// TestADiskThatIsAwayAtOneStartIsStillReset at the next.
func TestADiskThatIsAwayAtOneStartIsStillReset(t *testing.T) {
	a := &Agent{cfg: resettable(t)}
	at := func(dir string) []place { return []place{{VolumeConfig: VolumeConfig{Dir: dir}}} }
	for _, dir := range []string{"/a", "/b", "/a"} {
		if err := a.noteChosen(at(dir)); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := chosenBefore(a.cfg); err != nil || !slices.Equal(all, []string{"/a", "/b"}) {
		t.Errorf("%v, %v", all, err)
	}
}

// TestNoVolumeIsMadeUnderADiskThatWasTakenOut: below its empty mount point is the
// system's own disk.
func TestNoVolumeIsMadeUnderADiskThatWasTakenOut(t *testing.T) {
	mount := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", mount, "tmpfs", unix.MS_RDONLY, "size=1m"); err != nil {
		testenv.Cannot(t, "only root can mount: %v", err)
	}
	cfg := Config{StateDir: t.TempDir(), Volumes: []VolumeConfig{{Dir: filepath.Join(mount, "chunks")}}}
	m, stop := realMachine(t, cfg)
	a := &Agent{cfg: cfg, log: discardLog(), hw: m}
	err := a.openVolumes(t.Context())
	if u := unix.Unmount(mount, 0); err != nil || u != nil {
		t.Fatal(err, u)
	}
	for _, u := range a.places.left {
		u.next = time.Time{}
	}
	a.openRest(t.Context())
	if n := len(a.chunks.Volumes()); n != 0 || len(a.places.left) != 1 {
		t.Errorf("%d volumes are open, %d wait", n, len(a.places.left))
	}
	if left, err := os.ReadDir(mount); err != nil || len(left) != 0 {
		t.Errorf("the empty mount point holds %v (%v)", left, err)
	}
	if err := errors.Join(a.chunks.Close(), stop(nil)); err != nil {
		t.Error(err)
	}
}
