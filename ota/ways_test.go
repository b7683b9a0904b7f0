package ota

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/ota/slot/firmware/firmwaretest"
	"github.com/deimos-edge/deimos/wire"
)

// way is a mechanism, for claims that hold for both, without what starts versions.
type way struct {
	part    string
	content func(version, arch string) []byte
	// settled makes a device that runs 1.0.0.
	settled func(t *testing.T, dir string)
	// as tells a service that version runs.
	as func(o *Options, dir, version string)
	// try begins a try of 1.1.0, which is on trial.
	try func(t *testing.T, dir string)
	// giveUp uses up its tries.
	giveUp func(t *testing.T, dir string)
	reason string
	// whole tells, as an error, what is wrong with 1.1.0 on its trial.
	whole func(dir string) error
}

func image(dir, name string) string { return filepath.Join(dir, "esp", firmware.Folder, name) }

func count(from, to string) func(*testing.T, string) {
	return func(t *testing.T, dir string) { must(t, os.Rename(image(dir, from), image(dir, to))) }
}

var ways = map[string]way{
	"agent": {
		part: bundle.PartAgent, content: script,
		settled: func(t *testing.T, dir string) {
			factory := filepath.Join(dir, "factory")
			must(t, os.WriteFile(factory, []byte("factory"), 0o755))
			slots, err := slot.Open(dir)
			must(t, err)
			must(t, slots.InstallFactory(slot.A, factory, "1.0.0", ""))
		},
		as: func(o *Options, _, version string) {
			o.Slot = map[string]string{"1.0.0": "a", "1.1.0": "b"}[version]
		},
		try: func(t *testing.T, dir string) {
			slots, err := slot.Open(dir)
			must(t, err)
			_, err = slots.StartTry()
			must(t, err)
		},
		giveUp: func(t *testing.T, dir string) {
			slots, err := slot.Open(dir)
			must(t, err)
			_, err = slots.RollBack("it crashed three times")
			must(t, err)
		},
		reason: "crashed three times",
		whole: func(dir string) error {
			slots, err := slot.Open(dir)
			if err != nil {
				return err
			}
			st, err := slots.Load()
			if err != nil {
				return err
			}
			return slots.Check(st, slot.B)
		},
	},
	"firmware": {
		part:    bundle.PartFirmware,
		content: func(version, arch string) []byte { return firmwaretest.Image(version, arch, 1000) },
		settled: func(t *testing.T, dir string) {
			must(t, os.MkdirAll(filepath.Dir(image(dir, "x")), 0o755))
			must(t, os.WriteFile(image(dir, "deimos_1.0.0.efi"), firmwaretest.Image("1.0.0", runtime.GOARCH, 1000), 0o600))
		},
		as:     func(o *Options, dir, _ string) { o.ESP, o.Boot = filepath.Join(dir, "esp"), "boot" },
		try:    count("deimos_1.1.0+3.efi", "deimos_1.1.0+2-1.efi"),
		giveUp: count("deimos_1.1.0+3.efi", "deimos_1.1.0+0-3.efi"),
		reason: "not confirmed in 3 starts",
		whole: func(dir string) error {
			f, err := os.Open(image(dir, "deimos_1.1.0+3.efi"))
			if err != nil {
				return err
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				return err
			}
			_, err = firmware.Ask(f, info.Size())
			return err
		},
	},
}

// eachWay runs a claim for agents under their launcher and for whole firmwares.
func eachWay(t *testing.T, claim func(t *testing.T, w way, f *fleet)) {
	for name, w := range ways {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t)
			f.way = w
			claim(t, w, f)
		})
	}
}

// good releases a version that this device would take.
func (f *fleet) good(version string) {
	f.t.Helper()
	f.release(version, f.way.content(version, runtime.GOARCH), nil)
}

// rename makes the parts of a bundle those of the fleet's way. So a firmware gets
// into a release that [bundle.Build] would have refused.
func (f *fleet) rename(bundleDir string) {
	f.t.Helper()
	path := filepath.Join(bundleDir, "manifest.json")
	raw, err := os.ReadFile(path)
	must(f.t, err)
	raw = regexp.MustCompile(`"name": "agent"`).ReplaceAll(raw, []byte(`"name": "`+f.way.part+`"`))
	must(f.t, os.WriteFile(path, raw, 0o644))
}

func TestADeviceTakesThePartForHowItRuns(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		dir := f.bundle("1.1.0", w.content("1.1.0", runtime.GOARCH), nil)
		raw, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
		must(t, err)
		var m bundle.Manifest
		must(t, json.Unmarshal(raw, &m))
		other := m.Parts[0] // and one that nobody knows
		other.Name, other.SHA256 = "later", strings.Repeat("0", 64)
		m.Parts = append([]bundle.Part{other}, m.Parts...)
		raw, err = json.Marshal(m)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "manifest.json"), raw, 0o644))
		f.publish(dir)
		s, _ := f.device()
		if got := s.how.part(); got != w.part {
			t.Fatalf("it is updated by its %s", got)
		}
		f.installs(s, order("o1", "1.1.0"))
		// One that has nothing for it.
		for _, not := range ways {
			if not.part != w.part {
				f2 := newFleet(t)
				f2.way = not
				f2.release("1.1.0", not.content("1.1.0", runtime.GOARCH), nil)
				f2.way = w
				s, _ := f2.device()
				refused(t, s, order("o1", "1.1.0"), wire.Rejected, wire.CodeWrongHardware, "has no "+w.part+" for")
			}
		}
	})
}

// TestNoFirmwareIsFetchedThatDoesNotFit names a version that cannot be, and a
// partition that is full.
func TestNoFirmwareIsFetchedThatDoesNotFit(t *testing.T) {
	f := newFleet(t)
	f.way = ways["firmware"]
	f.release("1.1.0-rc10", f.way.content("1.1.0~rc10", runtime.GOARCH), nil)
	f.good("1.1.0")
	s, dir := f.device()
	refused(t, s, order("o1", "1.1.0-rc10"), wire.Rejected, wire.CodePreflight, "cannot be the version of a firmware")
	must(t, os.WriteFile(image(dir, "deimos_1.2.0+3.efi"), []byte("of another order"), 0o600))
	record := filepath.Join(dir, "ota", "firmware.json")
	must(t, os.WriteFile(record, []byte(`{"trial": {"order": "o0", "from": "1.0.0", "to": "1.2.0"}}`), 0o600))
	if _, err := s.Handle(t.Context(), order("o1", "1.1.0"), nil); wire.ProblemOf(err).Code != wire.CodeUpdatePending {
		t.Errorf("while another is to be tried: %v", err)
	}
	must(t, os.Remove(record)) // as a reset does
	s.how = noRoom{s.how}
	before := f.partRequests()
	refused(t, s, order("o1", "1.1.0"), wire.Failed, wire.CodeNoSpace, "the EFI system partition has too little room")
	if f.partRequests() != before {
		t.Error("something was fetched all the same")
	}
}

// noRoom is a device whose EFI system partition is full.
type noRoom struct{ mechanism }

func (noRoom) room(string, int64) (int64, error) { return 0, firmware.ErrSpace }

// TestAnInstallThatIsOnTrialIsNotReportedFailed: it is tried at the next start
// whatever was said.
func TestAnInstallThatIsOnTrialIsNotReportedFailed(t *testing.T) {
	late := map[string]func(dir string) error{
		"the disk fails after the trial began": func(string) error { return errors.New("input/output error") },
		"what was fetched cannot be removed": func(dir string) error {
			parts := filepath.Join(dir, "ota", "parts")
			return errors.Join(os.RemoveAll(parts), os.WriteFile(parts, nil, 0o600))
		},
	}
	for name, fail := range late {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, _ way, f *fleet) {
				f.good("1.1.0")
				s, dir := f.device()
				s.how = thenFails{s.how, func() error { return fail(dir) }}
				f.installs(s, order("o1", "1.1.0"))
			})
		})
	}
}

// TestAnOrderStaysOpenWhileItsTrialCannotBeSeen: the disk fails as the install ends,
// and answers again later.
func TestAnOrderStaysOpenWhileItsTrialCannotBeSeen(t *testing.T) {
	for name, fails := range map[string]int{"when it was installed": 2, "when it comes again": 1} {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, _ way, f *fleet) {
				f.good("1.1.0")
				s, _ := f.device()
				if fails == 1 {
					f.installs(s, order("o1", "1.1.0"))
				}
				whole := s.how
				seen := 0
				s.how = &blind{whole, func() bool { seen++; return seen == fails }}
				if _, err := s.Handle(t.Context(), order("o1", "1.1.0"), nil); !errors.Is(err, ErrPending) {
					t.Errorf("it ends with %v", err)
				}
				s.how = whole
				f.installs(s, order("o1", "1.1.0"))
			})
		})
	}
}

// blind cannot see how it stands while off says so; its install ends in an error.
type blind struct {
	mechanism
	off func() bool
}

func (m *blind) standing() (*trial, *slot.Outcome, error) {
	if m.off() {
		return nil, nil, errors.New("input/output error")
	}
	return m.mechanism.standing()
}

func (m *blind) install(ctx context.Context, r release) error {
	return errors.Join(m.mechanism.install(ctx, r), errors.New("input/output error"))
}

// thenFails is a device whose install ends in an error once its trial stands.
type thenFails struct {
	mechanism
	fail func() error
}

func (m thenFails) install(ctx context.Context, r release) error {
	return errors.Join(m.mechanism.install(ctx, r), m.fail())
}

// TestASettledUpdateIsToldUntilItIsReported, also by later lives.
func TestASettledUpdateIsToldUntilItIsReported(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		s, dir := f.device()
		f.installs(s, order("o1", "1.1.0"))
		w.giveUp(t, dir)
		told := func() bool {
			t.Helper()
			settled, err := f.service(dir, func(*Options) {}).Settled()
			must(t, err)
			return settled != nil
		}
		must(t, s.Reported("another"))
		for range 2 {
			if !told() {
				t.Error("it is not told")
			}
		}
		must(t, s.Reported("o1"))
		if told() {
			t.Error("it is told again")
		}
		refused(t, s, order("o1", "1.1.0"), wire.Failed, wire.CodeRolledBack, w.reason) // it is still known
		f.installs(s, order("o2", "1.1.0"))
		w.giveUp(t, dir)
		if !told() {
			t.Error("the next one is not told")
		}
	})
}
