package ota

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

// owner holds updates by what a test says.
type owner struct {
	word  atomic.Pointer[wire.Problem]
	asked chan Step // the last few
}

func (w *owner) hold(when func(Step) bool) func(Step) *wire.Problem {
	return func(s Step) *wire.Problem {
		select {
		case w.asked <- s:
		default:
		}
		if when(s) {
			return w.word.Load()
		}
		return nil
	}
}

func before(what string) func(Step) bool {
	return func(s Step) bool { return (s.Fetch > 0) == (what == "fetch") }
}

// TestAnUpdateWaitsForItsOwner before it fetches and before it installs, says why, and
// goes on when it may; what it waits for outlives the process.
func TestAnUpdateWaitsForItsOwner(t *testing.T) {
	for _, what := range []string{"fetch", "install"} {
		t.Run(what, func(t *testing.T) {
			eachWay(t, func(t *testing.T, w way, f *fleet) {
				f.good("1.1.0")
				_, dir := f.device()
				o := &owner{asked: make(chan Step, 9)}
				o.word.Store(wire.RejectedUntil(time.Hour, wire.CodeWindow, "not at this time"))
				s := f.service(dir, func(opt *Options) { opt.Hold = o.hold(before(what)) })
				told := make(chan *wire.Problem, 9)
				ended := make(chan error, 1)
				go func() {
					_, err := s.Handle(t.Context(), order("o1", "1.1.0"), func(p wire.Progress) {
						if p.Waits != nil {
							told <- p.Waits
						}
					})
					ended <- err
				}()
				if p := <-told; p.Code != wire.CodeWindow || p.After != time.Hour {
					t.Errorf("told %+v", p)
				}
				if got := f.partRequests(); got != map[string]int{"fetch": 0, "install": 1}[what] {
					t.Errorf("%d parts were asked for while it waits before the %s", got, what)
				}
				if got := s.State(); got == nil || got.Phase != wire.UpdateWaiting || got.Version != "1.1.0" || got.Code != wire.CodeWindow || got.Seconds < 3590 {
					t.Errorf("it stands at %+v", got)
				}
				rec, err := ReadRecord(dir)
				must(t, err)
				if rec.Phase != slot.Waiting || rec.Why == nil || rec.Why.Code != wire.CodeWindow || rec.Why.Until == nil {
					t.Errorf("on disk: %+v", rec)
				}
				if st, err := standing(s); st != nil || err != nil {
					t.Errorf("something is on trial: %+v, %v", st, err)
				}
				o.word.Store(nil)
				if err := <-ended; !errors.Is(err, ErrRestart) {
					t.Fatal(err)
				}
				if n := f.partRequests(); n != 1 {
					t.Errorf("fetched %d times", n)
				}
				// What was asked about: first the bytes, then the install.
				if first := <-o.asked; first.Version != "1.1.0" || first.Fetch <= 0 || first.Order != "o1" {
					t.Errorf("asked first about %+v", first)
				}
			})
		})
	}
}

// TestWhatWaitsKeepsNobodyOff: a newer order takes its place, and what comes from a
// stick goes first.
func TestWhatWaitsKeepsNobodyOff(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		f.good("1.2.0")
		_, dir := f.device()
		o := &owner{}
		o.word.Store(wire.RejectedBecause(wire.CodeConsent, "the owner is asked"))
		s := f.service(dir, func(opt *Options) {
			opt.Hold = o.hold(func(s Step) bool { return s.Version == "1.1.0" })
		})
		waits := make(chan struct{}, 9)
		ended := make(chan error, 1)
		old := order("o1", "1.1.0")
		go func() {
			_, err := s.Handle(t.Context(), old, func(p wire.Progress) {
				if p.Waits != nil {
					waits <- struct{}{}
				}
			})
			ended <- err
		}()
		<-waits
		must(t, s.Refuse(old)) // a repeat of it is no other
		next := order("o2", "1.2.0")
		must(t, s.Refuse(next))
		err := <-ended
		var p *wire.Problem
		if !errors.As(err, &p) || p.State != wire.Rejected || p.Code != wire.CodeSuperseded || !strings.Contains(p.Reason, "o2") {
			t.Fatalf("the old one ends with %v", err)
		}
		if rec := s.Record(); rec.Ended == nil || rec.Ended.Code != wire.CodeSuperseded || rec.Phase != slot.Idle {
			t.Errorf("%+v", rec)
		}
		go func() {
			_, err := s.Handle(t.Context(), order("o3", "1.1.0"), func(p wire.Progress) {
				if p.Waits != nil {
					waits <- struct{}{}
				}
			})
			ended <- err
		}()
		<-waits
		if _, err := s.Install(t.Context(), "w", f.repo, "1.2.0", nil); !errors.Is(err, ErrRestart) {
			t.Fatalf("from a stick: %v", err)
		}
		o.word.Store(nil)
		if err := <-ended; wire.ProblemOf(err).Code != wire.CodeUpdatePending {
			t.Errorf("after it, the order ends with %v", err)
		}
	})
}

// overSoon is a context that says that it is about to end, once it is told so, and ends from
// when it was asked, if at all: one with a deadline would end before anybody has heard what the
// order waited for, on a machine that stands still for as long.
type overSoon struct {
	context.Context
	soon atomic.Bool
	end  func() // nil: never
}

func (c *overSoon) Deadline() (time.Time, bool) {
	if !c.soon.Load() {
		return time.Now().Add(time.Hour), true
	}
	const left = recheck * 3 / 2
	if c.end != nil {
		time.AfterFunc(left, c.end)
	}
	return time.Now().Add(left), true
}

// TestAnOrderThatEndsWhileItWaitsSaysWhatItWaitedFor.
func TestAnOrderThatEndsWhileItWaitsSaysWhatItWaitedFor(t *testing.T) {
	f := newFleet(t)
	f.good("1.1.0")
	_, dir := f.device()
	ending, end := context.WithCancel(t.Context())
	defer end()
	ctx := &overSoon{Context: ending, end: end}
	s := f.service(dir, func(opt *Options) {
		opt.Hold = func(Step) *wire.Problem {
			ctx.soon.Store(true)
			return wire.RejectedBecause(wire.CodeConsent, "the owner is asked")
		}
	})
	_, err := s.Handle(ctx, order("o1", "1.1.0"), nil)
	if p := wire.ProblemOf(err); p.State != wire.Rejected || p.Code != wire.CodeConsent || !strings.Contains(p.Reason, "the order is over") {
		t.Error(err)
	}
}

// TestWhatWasWithdrawnWhileItWaitedIsNotInstalled: it begins at the metadata again.
func TestWhatWasWithdrawnWhileItWaitedIsNotInstalled(t *testing.T) {
	f := newFleet(t)
	f.good("1.1.0")
	_, dir := f.device()
	o := &owner{}
	o.word.Store(wire.RejectedBecause(wire.CodeConsent, "the owner is asked"))
	now := atomic.Pointer[time.Time]{}
	now.Store(new(time.Now()))
	s := f.service(dir, func(opt *Options) {
		opt.Hold = o.hold(before("install"))
		opt.Now = func() time.Time { return *now.Load() }
	})
	waits, ended := make(chan struct{}, 9), make(chan error, 1)
	go func() {
		_, err := s.Handle(t.Context(), order("o1", "1.1.0"), func(p wire.Progress) {
			if p.Waits != nil {
				waits <- struct{}{}
			}
		})
		ended <- err
	}()
	<-waits
	now.Store(new(time.Now().AddDate(20, 0, 0))) // nobody has signed for twenty years
	o.word.Store(nil)
	if err := <-ended; wire.ProblemOf(err).Code != wire.CodeStaleMetadata {
		t.Errorf("it ends with %v", err)
	}
}

// confirmed is a service of the version that was tried and confirmed.
func (f *fleet) confirmed(t *testing.T, dir, order, version string) *Service {
	t.Helper()
	slots, err := slot.Open(dir)
	must(t, err)
	st, err := slots.Load()
	must(t, err)
	_, err = slots.StartTry()
	must(t, err)
	s := f.service(dir, func(o *Options) { o.Version, o.Slot = version, string(st.Trial.Slot) })
	must(t, s.Confirm(t.Context()))
	settled, err := s.Settled()
	must(t, err)
	if settled == nil || settled.Order != order || settled.Problem != nil {
		t.Fatalf("%+v", settled)
	}
	return s
}

// TestNothingBelowTheFloorIsInstalled but by a signed exception, which is the floor then.
func TestNothingBelowTheFloorIsInstalled(t *testing.T) {
	f := newFleet(t)
	for _, v := range []string{"1.1.0", "1.2.0", "1.3.0"} {
		f.good(v)
	}
	f.release("1.2.1", script("1.2.1", runtime.GOARCH), func(o *bundle.BuildOptions) { o.DownFrom = []string{"1.3.0"} })
	f.release("1.4.0", script("1.4.0", runtime.GOARCH), func(o *bundle.BuildOptions) { o.Floor, o.Boards = "1.4.0", []string{"none"} })
	f.release("1.5.0", script("1.5.0", runtime.GOARCH), func(o *bundle.BuildOptions) { o.Floor = "1.4.5" })
	s, dir := f.device()
	f.installs(s, order("o1", "1.3.0"))
	s = f.confirmed(t, dir, "o1", "1.3.0")
	floor := func(want string) {
		t.Helper()
		if got, err := ReadFloor(dir); got != want || err != nil {
			t.Errorf("the floor is %q, %v; want %s", got, err, want)
		}
	}
	floor("1.3.0")
	refused(t, s, order("o2", "1.2.0"), wire.Rejected, wire.CodeDowngrade, "1.2.0 is older than 1.3.0")

	// A damaged slot, say: the first version runs again. It may not be led astray.
	first := f.service(dir, func(o *Options) { o.Slot = "a" })
	refused(t, first, order("o3", "1.1.0"), wire.Rejected, wire.CodeDowngrade, "may go back to: 1.1.0 is older than 1.3.0")
	refused(t, first, order("o4", "1.2.1"), wire.Rejected, wire.CodeDowngrade, "1.2.1 is older than 1.3.0") // the exception is for another
	must(t, first.raise("1.0.0", false))                                                                    // as when it is confirmed
	floor("1.3.0")

	f.installs(s, order("o5", "1.2.1"))
	if !s.Record().Down {
		t.Error("it is not noted as an exception")
	}
	s = f.confirmed(t, dir, "o5", "1.2.1")
	floor("1.2.1")
	s = f.service(dir, func(o *Options) { o.Version, o.Slot = "1.2.1", s.o.Slot }) // a restart later
	must(t, s.Confirm(t.Context()))
	floor("1.2.1")
	refused(t, s, order("o6", "1.2.0"), wire.Rejected, wire.CodeDowngrade, "1.2.0 is older than 1.2.1")

	refused(t, s, order("o7", "1.4.0"), wire.Rejected, wire.CodeWrongHardware, "is for none")
	floor("1.2.1") // what is not for it moves nothing
	o := &owner{}
	o.word.Store(wire.RejectedBecause(wire.CodeConsent, "the owner is asked"))
	s.o.Hold = o.hold(before("fetch"))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Handle(ctx, order("o8", "1.5.0"), func(p wire.Progress) {
		if p.Waits != nil {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	floor("1.4.5") // it has seen the manifest
	refused(t, s, order("o9", "1.3.0"), wire.Rejected, wire.CodeDowngrade, "1.3.0 is older than 1.4.5")

	must(t, os.WriteFile(filepath.Join(dir, "ota", "floor.json"), []byte("damaged"), 0o600))
	refused(t, s, order("o10", "1.2.0"), wire.Rejected, wire.CodeDowngrade, "older than 1.2.1")
	must(t, s.Confirm(t.Context()))
	floor("1.2.1")
}

// A fleet of other keys has other versions.
func TestTheFloorIsOfTheFleet(t *testing.T) {
	f, other := newFleet(t), newFleet(t)
	other.good("1.1.0")
	_, dir := f.device()
	s := f.service(dir, func(*Options) {})
	must(t, s.raise("7.0.0", false))
	root, err := repo.Root(other.keys)
	must(t, err)
	must(t, Enrolled(dir, root))
	other.installs(other.service(dir, func(*Options) {}), order("o1", "1.1.0"))
}

func TestAFirmwareCannotGoBackAndSaysSo(t *testing.T) {
	f := newFleet(t)
	f.way = ways["firmware"]
	f.release("0.9.0", f.way.content("0.9.0", runtime.GOARCH), func(o *bundle.BuildOptions) { o.DownFrom = []string{"1.0.0"} })
	s, _ := f.device()
	refused(t, s, order("o1", "0.9.0"), wire.Rejected, wire.CodeNoWayBack, "the boot loader of this device starts the newest")
	if f.partRequests() != 0 {
		t.Error("it was fetched all the same")
	}
}

// TestAVersionThatDoesWorseIsNotHealthy, and who goes back says what was worse.
func TestAVersionThatDoesWorseIsNotHealthy(t *testing.T) {
	good := wire.UpdateFigures{Online: true, Volumes: 2, Sensors: 3}
	for name, c := range map[string]struct {
		after wire.UpdateFigures
		words string // "" for healthy
	}{
		"the same":    {good, ""},
		"better":      {wire.UpdateFigures{Online: true, Volumes: 3, Sensors: 4}, ""},
		"not online":  {wire.UpdateFigures{Volumes: 2, Sensors: 3}, "the coordinator is not reached"},
		"a volume":    {wire.UpdateFigures{Online: true, Volumes: 1, Sensors: 3}, "volumes that are open: 1, before it was 2"},
		"the sensors": {wire.UpdateFigures{Online: true, Volumes: 2}, "sensors that answer: 0, before it was 3"},
	} {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, w way, f *fleet) {
				f.good("1.1.0")
				_, dir := f.device()
				s := f.service(dir, func(o *Options) { o.Figures = func() wire.UpdateFigures { return good } })
				f.installs(s, order("o1", "1.1.0"))
				w.try(t, dir)
				now := c.after
				next := f.service(dir, func(o *Options) {
					o.Version = "1.1.0"
					w.as(o, dir, o.Version)
					o.Figures = func() wire.UpdateFigures { return now }
				})
				if c.words == "" {
					if err := next.Healthy(next.o.Steady - 1); !errors.Is(err, ErrNotSteady) {
						t.Fatalf("before it has lived for long enough: %v", err)
					}
				}
				err := next.Healthy(next.o.Steady)
				if c.words == "" {
					must(t, err)
					must(t, next.Confirm(t.Context()))
					settled, err := next.Settled()
					must(t, err)
					if r := settled.Outcome.Body.(wire.UpdateResult); r.Gate == nil || r.Gate.Before != good || r.Gate.After != c.after || r.Gate.Worse != nil {
						t.Errorf("%+v", r.Gate)
					}
					return
				}
				if err == nil || !strings.Contains(err.Error(), c.words) {
					t.Fatalf("%v does not say %q", err, c.words)
				}
				if w.part == bundle.PartAgent {
					w.giveUp(t, dir)
				} else {
					count("deimos_1.1.0+2-1.efi", "deimos_1.1.0+0-3.efi")(t, dir)
				}
				settled, err := f.service(dir, func(*Options) {}).Settled()
				must(t, err)
				if p := settled.Problem; p == nil || !strings.Contains(p.Reason, c.words) || !strings.Contains(p.Reason, w.reason) {
					t.Errorf("it says %+v", p)
				}
				if r := settled.Outcome.Body.(wire.UpdateResult); r.Gate == nil || len(r.Gate.Worse) == 0 {
					t.Errorf("%+v", r.Gate)
				}
			})
		})
	}
}

// TestACrashOfATryIsNotForgiven, however the next one goes. A power cut is none, nor is a
// try that was given up.
func TestACrashOfATryIsNotForgiven(t *testing.T) {
	for what, c := range map[string]struct {
		ends  func(*slot.Store) (bool, error)
		words string
	}{
		"a crash":     {func(s *slot.Store) (bool, error) { return s.FailTry(slot.B, "it was killed", true) }, "tries in which it crashed: 1"},
		"given up":    {func(s *slot.Store) (bool, error) { return s.FailTry(slot.B, "nobody was reached", false) }, ""},
		"a stop":      {func(s *slot.Store) (bool, error) { return s.StopTry(slot.B) }, ""},
		"a power cut": {func(*slot.Store) (bool, error) { return true, nil }, ""},
	} {
		t.Run(what, func(t *testing.T) {
			f := newFleet(t)
			f.good("1.1.0")
			s, dir := f.device()
			f.installs(s, order("o1", "1.1.0"))
			slots, err := slot.Open(dir)
			must(t, err)
			f.way.try(t, dir)
			if ended, err := c.ends(slots); !ended || err != nil {
				t.Fatal(ended, err)
			}
			f.way.try(t, dir)
			err = f.service(dir, func(o *Options) { o.Version = "1.1.0"; f.way.as(o, dir, o.Version) }).Healthy(time.Hour)
			if (err != nil) != (c.words != "") || err != nil && !strings.Contains(err.Error(), c.words) {
				t.Errorf("%v, want %q", err, c.words)
			}
		})
	}
}

// An owner's device that was offline is not held to be online by its update.
func TestWhoWasOfflineNeedNotBeOnline(t *testing.T) {
	f := newFleet(t)
	f.good("1.1.0")
	_, dir := f.device()
	offline := func(o *Options) { o.Figures = func() wire.UpdateFigures { return wire.UpdateFigures{Volumes: 1} } }
	if _, err := f.service(dir, offline).Install(t.Context(), "w", f.repo, "", nil); !errors.Is(err, ErrRestart) {
		t.Fatal(err)
	}
	f.way.try(t, dir)
	must(t, f.service(dir, func(o *Options) { offline(o); o.Version, o.Slot = "1.1.0", "b" }).Healthy(slot.ConfirmWithin/2))
}

// tarOf makes an archive of a repository, cut at a share of its bytes.
func tarOf(t *testing.T, dir string, share float64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "release.tar")
	out, err := os.Create(path)
	must(t, err)
	w := tar.NewWriter(out)
	must(t, w.AddFS(os.DirFS(dir)))
	must(t, w.Close())
	size, err := out.Seek(0, io.SeekCurrent)
	must(t, err)
	must(t, out.Truncate(int64(share*float64(size))))
	must(t, out.Close())
	return path
}

// TestAStickTakesTheSamePath: a folder or a file, and the newest that there is.
func TestAStickTakesTheSamePath(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		f.good("1.10.0")
		f.good("1.9.0")
		for name, place := range map[string]string{"folder": f.repo, "file": tarOf(t, f.repo, 1)} {
			t.Run(name, func(t *testing.T) {
				_, dir := f.device()
				s := f.service(dir, func(o *Options) {
					o.Source = func() (repo.Source, error) { return nil, errors.New("there is no network") }
					o.Hold = func(Step) *wire.Problem { return wire.RejectedBecause(wire.CodeConsent, "the owner is asked") }
					o.Moved = func(int64) { t.Error("bytes of a stick count as those of the line") }
				})
				if _, err := s.Install(t.Context(), "w", place, "", nil); !errors.Is(err, ErrRestart) {
					t.Fatal(err)
				}
				if st, err := standing(s); err != nil || st.version != "1.10.0" || st.order != LocalOrder("w") {
					t.Errorf("%+v, %v", st, err)
				}
				if _, err := s.Install(t.Context(), "w", place, "", nil); !errors.Is(err, ErrRestart) {
					t.Errorf("a repeat: %v", err)
				}
				if !IsLocal(s.Record().Order) || s.Record().Form != bundle.EncodingZstd || s.Record().Fetched == 0 {
					t.Errorf("%+v", s.Record())
				}
			})
		}
	})
}

// TestASickStickIsRefusedByName, and leaves what runs as it was.
func TestASickStickIsRefusedByName(t *testing.T) {
	f, thief := newFleet(t), newFleet(t)
	f.good("1.1.0")
	thief.good("1.1.0")
	evil := t.TempDir()
	must(t, os.CopyFS(evil, os.DirFS(f.repo)))
	parts, err := filepath.Glob(filepath.Join(evil, "parts", "*"))
	must(t, err)
	must(t, os.Truncate(parts[0], 20))
	empty := t.TempDir()
	must(t, os.Mkdir(filepath.Join(empty, "metadata"), 0o755))
	text := filepath.Join(t.TempDir(), "text")
	must(t, os.WriteFile(text, []byte(strings.Repeat("no archive\n", 1000)), 0o600))
	for name, c := range map[string]struct {
		place, version, code string
	}{
		"nothing there":     {filepath.Join(f.repo, "nowhere"), "", wire.CodeNotFound},
		"a folder":          {t.TempDir(), "", wire.CodeNotFound},
		"empty metadata":    {empty, "", wire.CodeNotFound},
		"a text":            {text, "", wire.CodeNotFound},
		"a truncated stick": {evil, "", wire.CodeTransfer},
		"a truncated file":  {tarOf(t, f.repo, 0.7), "", wire.CodeNotFound},
		"half a file":       {tarOf(t, f.repo, 0.4), "", wire.CodeNotFound},
		"other keys":        {thief.repo, "", wire.CodeVerification},
		"a version":         {f.repo, "9.9.9", wire.CodeNotFound},
		"no version":        {f.repo, "latest", wire.CodeNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			_, dir := f.device()
			s := f.service(dir, func(o *Options) { o.Limits.Pause = 24 * time.Hour }) // nothing of a stick is waited for
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := s.Install(ctx, "w", c.place, c.version, nil)
			var p *wire.Problem
			if !errors.As(err, &p) || p.Code != c.code {
				t.Fatalf("%v; want %s", err, c.code)
			}
			if p.Reason == "" || p.Code == wire.CodeInternal {
				t.Errorf("%+v", p)
			}
			if st, err := standing(s); st != nil || err != nil {
				t.Errorf("%+v, %v", st, err)
			}
			rec, err := ReadRecord(dir)
			must(t, err)
			if rec.Ended == nil || rec.Ended.Order != LocalOrder("w") || rec.Ended.Code != p.Code || rec.Phase != slot.Idle || !s.Known("w") {
				t.Errorf("on disk: %+v, %+v", rec, rec.Ended)
			}
		})
	}
}

// TestAPhaseThatNobodyKnowsHoldsNothing: it may be of a newer version that was left again.
func TestAPhaseThatNobodyKnowsHoldsNothing(t *testing.T) {
	f := newFleet(t)
	f.good("1.1.0")
	for _, phase := range []string{"patching", ""} {
		for _, last := range []string{"o1", "another"} {
			for _, stick := range []bool{false, true} {
				_, dir := f.device()
				must(t, os.MkdirAll(filepath.Join(dir, "ota"), 0o755))
				note := fmt.Sprintf(`{"phase":%q,"order":%q,"heard":"local-before"}`, phase, last)
				must(t, os.WriteFile(filepath.Join(dir, "ota", "update.json"), []byte(note), 0o600))
				s := f.service(dir, func(*Options) {})
				if !s.Known("before") {
					t.Error("which wish of the owner's has ended is forgotten: it would be carried out again")
				}
				if stick {
					if _, err := s.Install(t.Context(), "w", f.repo, "", nil); !errors.Is(err, ErrRestart) {
						t.Errorf("%q, a stick after %s: %v", phase, last, err)
					}
				} else {
					f.installs(s, order("o1", "1.1.0"))
				}
			}
		}
	}
}

// TestWhatRotsWhileItWaitsIsFetchedAgain: once, and what the repository itself has is a
// fault of the release.
func TestWhatRotsWhileItWaitsIsFetchedAgain(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		parts, err := filepath.Glob(filepath.Join(f.repo, "parts", "*"))
		must(t, err)
		good, err := os.ReadFile(parts[0])
		must(t, err)
		bad := bytes.Clone(good)
		bad[len(bad)/2] ^= 1
		for _, atSource := range []bool{false, true} {
			_, dir := f.device()
			fetched := filepath.Join(dir, "ota", "parts", filepath.Base(parts[0]))
			o := &owner{}
			o.word.Store(wire.RejectedBecause(wire.CodeConsent, "the owner is asked"))
			s := f.service(dir, func(opt *Options) { opt.Hold = o.hold(before("install")) })
			waits := make(chan struct{}, 9)
			ended := make(chan error, 1)
			go func() {
				_, err := s.Handle(t.Context(), order("o1", "1.1.0"), func(p wire.Progress) {
					if p.Waits != nil {
						waits <- struct{}{}
					}
				})
				ended <- err
			}()
			<-waits
			if had, err := os.ReadFile(fetched); err != nil || !bytes.Equal(had, good) {
				t.Fatalf("it waits without its bytes: %v", err)
			}
			must(t, os.WriteFile(fetched, bad, 0o600))
			if atSource {
				must(t, os.WriteFile(parts[0], bad, 0o600))
			}
			asked := f.partRequests()
			o.word.Store(nil)
			err := <-ended
			switch {
			case !atSource && !errors.Is(err, ErrRestart):
				t.Errorf("what is damaged here alone: %v", err)
			case atSource && wire.ProblemOf(err).Code != wire.CodeVerification:
				t.Errorf("what is damaged there: %v", err)
			}
			if n := f.partRequests() - asked; n != 1 {
				t.Errorf("it was fetched %d times more (at its source: %v)", n, atSource)
			}
		}
	})
}

// TestAWishThatIsNotCarriedOutEnds, for who waits for it.
func TestAWishThatIsNotCarriedOutEnds(t *testing.T) {
	s, dir := newFleet(t).device()
	s.Decline("w", "1.1.0", wire.RejectedBecause(wire.CodeExpired, "it was asked for long ago"))
	rec, err := ReadRecord(dir)
	if err != nil || rec.Ended == nil || rec.Ended.Order != LocalOrder("w") || rec.Ended.Code != wire.CodeExpired || !s.Known("w") {
		t.Errorf("%+v (%v)", rec, err)
	}
}

// TestWaitingIsNoFetching: a fetch may take a day, and what holds it may last for weeks.
func TestWaitingIsNoFetching(t *testing.T) {
	f := newFleet(t)
	f.good("1.1.0")
	for _, waits := range []bool{false, true} {
		_, dir := f.device()
		must(t, os.MkdirAll(filepath.Join(dir, "ota"), 0o755))
		began := moment{Boot: "boot", At: -2 * slot.Limits[slot.Fetching]}
		note, err := json.Marshal(Record{Phase: slot.Fetching, Order: "o1", Version: "1.1.0", Began: &began})
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "ota", recordFile), note, 0o600))
		o := &owner{}
		if waits {
			o.word.Store(wire.RejectedBecause(wire.CodeDeferred, "the owner has put updates off"))
		}
		s := f.service(dir, func(opt *Options) { opt.Boot, opt.Hold = "boot", o.hold(before("fetch")) })
		_, err = s.Handle(t.Context(), order("o1", "1.1.0"), func(p wire.Progress) {
			if p.Waits != nil {
				o.word.Store(nil)
			}
		})
		if waits && !errors.Is(err, ErrRestart) {
			t.Errorf("it was put off: %v", err)
		}
		if !waits && wire.ProblemOf(err).Code != wire.CodeLimit {
			t.Errorf("it takes two days: %v", err)
		}
	}
}

// TestTheNewestOfAStickIsTheNewestThatFits: its metadata names all that was ever signed.
func TestTheNewestOfAStickIsTheNewestThatFits(t *testing.T) {
	other := func(o *bundle.BuildOptions) { o.Boards = []string{"other-board"} }
	for name, c := range map[string]struct {
		releases map[string]func(*bundle.BuildOptions)
		runs     string
		without  string // a version whose files are not on the stick
		want     string
		code     string
	}{
		"another board":      {releases: map[string]func(*bundle.BuildOptions){"1.1.0": nil, "1.2.0": other}, want: "1.1.0"},
		"by a way between":   {releases: map[string]func(*bundle.BuildOptions){"1.1.0": nil, "1.2.0": func(o *bundle.BuildOptions) { o.From = "1.1.0" }}, want: "1.1.0"},
		"not on it":          {releases: map[string]func(*bundle.BuildOptions){"1.1.0": nil, "1.2.0": nil}, without: "1.2.0", want: "1.1.0"},
		"a pre-release":      {releases: map[string]func(*bundle.BuildOptions){"1.1.0": nil, "2.0.0-rc.1": nil}, want: "1.1.0"},
		"on a pre-release":   {releases: map[string]func(*bundle.BuildOptions){"1.1.0": nil, "2.0.0-rc.2": nil}, runs: "1.0.0-rc.1", want: "2.0.0-rc.2"},
		"pre-releases alone": {releases: map[string]func(*bundle.BuildOptions){"2.0.0-rc.1": nil}, code: wire.CodeNotFound},
		"nothing that fits":  {releases: map[string]func(*bundle.BuildOptions){"0.9.0": nil, "1.0.0": nil, "1.2.0": other}, code: wire.CodeWrongHardware},
		"what runs":          {releases: map[string]func(*bundle.BuildOptions){"0.9.0": nil, "1.0.0": nil}, code: wire.CodeAlreadyLatest},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t)
			for _, v := range slices.SortedFunc(maps.Keys(c.releases), bundle.Compare) {
				f.release(v, agent(v, "good"), c.releases[v])
			}
			if c.without != "" {
				files, err := filepath.Glob(filepath.Join(f.repo, "targets", "bundles", "*."+c.without+".json"))
				if err != nil || len(files) != 1 {
					t.Fatal(files, err)
				}
				must(t, os.Remove(files[0]))
			}
			_, dir := f.device()
			s := f.service(dir, func(o *Options) {
				if c.runs != "" {
					o.Version = c.runs
				}
			})
			_, err := s.Install(t.Context(), "w", f.repo, "", nil)
			if c.code != "" {
				if p := wire.ProblemOf(err); p.Code != c.code {
					t.Errorf("%v; want %s", err, c.code)
				}
				return
			}
			if st, trouble := standing(s); !errors.Is(err, ErrRestart) || trouble != nil || st == nil || st.version != c.want {
				t.Errorf("%+v is on trial (%v, %v), want %s", st, err, trouble, c.want)
			}
		})
	}
}

// TestAStickThatWaitsDoesNotGiveWay to an order of the fleet.
func TestAStickThatWaitsDoesNotGiveWay(t *testing.T) {
	f := newFleet(t)
	f.good("1.1.0")
	s, _ := f.device()
	s.busy.Lock() // as an order does that is under way
	waits := make(chan struct{}, 9)
	ended := make(chan error, 1)
	go func() {
		_, err := s.Install(t.Context(), "w", f.repo, "", func(p wire.Progress) {
			if p.Waits != nil {
				waits <- struct{}{}
			}
		})
		ended <- err
	}()
	<-waits
	must(t, s.Refuse(order("o2", "1.1.0")))
	s.busy.Unlock()
	if err := <-ended; !errors.Is(err, ErrRestart) {
		t.Errorf("it ends with %v", err)
	}
}
