package ota

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/delta"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

// noisy is a version with what makes its delta worth it.
func (f *fleet) noisy(version string) []byte {
	noise := make([]byte, 8<<10)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	return fmt.Appendf(f.way.content(version, runtime.GOARCH), "# %x\n# of %s\n", noise, version)
}

// withDelta is a bundle of 1.1.0 that has a delta from 1.0.0, not published, and its two forms.
func (f *fleet) withDelta() (dir string, whole, patch bundle.Form) {
	f.t.Helper()
	from, file := f.t.TempDir(), filepath.Join(f.t.TempDir(), "old")
	must(f.t, os.WriteFile(file, f.noisy("1.0.0"), 0o755))
	_, err := bundle.Build(f.t.Context(), from, bundle.BuildOptions{Version: "1.0.0", Fast: true, Agents: []bundle.Agent{{Path: file, Platform: bundle.Host()}}})
	must(f.t, err)
	dir = f.bundle("1.1.0", f.noisy("1.1.0"), func(o *bundle.BuildOptions) { o.DeltaFrom = []string{from} })
	m, _, err := bundle.Open(dir)
	must(f.t, err)
	if forms := m.Parts[0].Forms; len(forms) != 2 || !forms[1].Delta() || forms[1].Size*2 > forms[0].Size {
		f.t.Fatalf("the release has no delta that is worth it: %+v", forms)
	}
	return dir, m.Parts[0].Forms[0], m.Parts[0].Forms[1]
}

// runsNoisy makes a settled device one that runs 1.0.0 as it was released.
func (f *fleet) runsNoisy(dir string) {
	f.t.Helper()
	if f.way.part == bundle.PartFirmware {
		must(f.t, os.WriteFile(f.runs(dir), f.noisy("1.0.0"), 0o755))
		return
	}
	file := filepath.Join(f.t.TempDir(), "agent")
	must(f.t, os.WriteFile(file, f.noisy("1.0.0"), 0o755))
	slots, err := slot.Open(dir)
	must(f.t, err)
	must(f.t, slots.InstallFactory(slot.A, file, "1.0.0", ""))
}

func (f *fleet) runs(dir string) string {
	if f.way.part == bundle.PartFirmware {
		return image(dir, "deimos_1.0.0.efi")
	}
	return filepath.Join(dir, "slots", "a", "deimos-agent")
}

// result is what is told of the update to 1.1.0 once it was given up.
func (f *fleet) result(dir string) wire.UpdateResult {
	f.t.Helper()
	f.way.giveUp(f.t, dir)
	settled, err := f.service(dir, func(*Options) {}).Settled()
	must(f.t, err)
	return settled.Outcome.Body.(wire.UpdateResult)
}

func TestADeltaIsTakenWhereItFits(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		dir, _, patch := f.withDelta()
		f.publish(dir)
		_, state := f.device()
		f.runsNoisy(state)
		var asked []Step
		s := f.service(state, func(o *Options) {
			o.Hold = func(s Step) *wire.Problem { asked = append(asked, s); return nil }
		})
		f.installs(s, order("o1", "1.1.0"))
		must(t, w.whole(state))
		if asked[0].Fetch != patch.Size || asked[0].NoDelta != "" {
			t.Errorf("it asked for %+v, the delta has %d bytes", asked[0], patch.Size)
		}
		if r := f.result(state); r.Form != patch.Encoding || r.FetchedBytes != patch.Size || r.NoDelta != "" {
			t.Errorf("it tells %+v", r)
		}
	})
}

// replace makes the delta in a bundle another one, before it is signed.
func (f *fleet) replace(dir, encoding string, patch []byte) {
	f.t.Helper()
	path := filepath.Join(dir, "manifest.json")
	m, _, err := bundle.Open(dir)
	must(f.t, err)
	sum := sha256.Sum256(patch)
	form := &m.Parts[0].Forms[1]
	form.Encoding, form.SHA256, form.Size = encoding, hex.EncodeToString(sum[:]), int64(len(patch))
	must(f.t, os.WriteFile(filepath.Join(dir, bundle.PartPath(form.SHA256)), patch, 0o644))
	raw, err := json.Marshal(m)
	must(f.t, err)
	must(f.t, os.WriteFile(path, raw, 0o644))
}

func (f *fleet) made(encoding string, old, file []byte) []byte {
	f.t.Helper()
	var out bytes.Buffer
	must(f.t, delta.Make(f.t.Context(), encoding, old, file, &out, nil))
	return out.Bytes()
}

func packed(t *testing.T, raw []byte) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	must(t, err)
	return enc.EncodeAll(raw, nil)
}

// TestADeltaThatIsOfNoUseIsNamed: whatever is wrong with it, damaged, or signed and bad,
// nothing else than what was signed goes on trial; the whole form is taken, and it is told why.
func TestADeltaThatIsOfNoUseIsNamed(t *testing.T) {
	const none, useless = "none of its deltas is from what runs here", "its delta from what runs here cannot be used: "
	for name, c := range map[string]struct {
		signed  func(f *fleet, dir string)                          // changes the bundle before it is signed
		damaged func(f *fleet, state string, patch string)          // changes device or repository after
		hook    func(http.ResponseWriter, *http.Request, bool) bool // changes what the server says of the delta
		why     string
		fetched bool // the delta's bytes come
	}{
		"for another file": {
			damaged: func(f *fleet, state, _ string) { must(f.t, os.WriteFile(f.runs(state), f.noisy("1.0.1"), 0o755)) }, why: none},
		"what runs cannot be read": {
			damaged: func(f *fleet, state, _ string) {
				if f.way.part == bundle.PartAgent { // without its image a firmware installs nothing
					must(f.t, os.Remove(f.runs(state)))
					return
				}
				must(f.t, os.Truncate(f.runs(state), 9))
			}, why: none},
		"altered": {
			damaged: func(f *fleet, _, patch string) {
				raw, err := os.ReadFile(patch)
				must(f.t, err)
				raw[len(raw)/2] ^= 1
				must(f.t, os.WriteFile(patch, raw, 0o644))
			}, why: useless + "parts/"},
		"missing": {damaged: func(f *fleet, _, patch string) { must(f.t, os.Remove(patch)) }, why: useless + "parts/"},
		"endless": {
			hook: func(w http.ResponseWriter, r *http.Request, delta bool) bool {
				for delta && r.Context().Err() == nil {
					if _, err := w.Write(make([]byte, 1<<10)); err != nil {
						break
					}
				}
				return delta
			}, why: useless + "parts/"},
		"makes something else": {
			signed: func(f *fleet, dir string) {
				evil := f.noisy("1.1.0")
				evil[len(evil)-20]++
				f.replace(dir, delta.BSDiff, f.made(delta.BSDiff, f.noisy("1.0.0"), evil))
			}, why: "SHA-256", fetched: true},
		"makes something else, as dcz": {
			signed: func(f *fleet, dir string) {
				evil := f.noisy("1.1.0")
				evil[len(evil)-20]++
				f.replace(dir, delta.DCZ, f.made(delta.DCZ, f.noisy("1.0.0"), evil))
			}, why: "SHA-256", fetched: true},
		"is for another file than it says": {
			signed: func(f *fleet, dir string) {
				f.replace(dir, delta.DCZ, f.made(delta.DCZ, f.noisy("1.0.7"), f.noisy("1.1.0")))
			}, why: "it is for the file with", fetched: true},
		"makes more than it says": {
			signed: func(f *fleet, dir string) {
				f.replace(dir, delta.BSDiff, f.made(delta.BSDiff, f.noisy("1.0.0"), make([]byte, 1<<20)))
			}, why: "more than was said", fetched: true},
		"claims to be huge": {
			signed: func(f *fleet, dir string) {
				f.replace(dir, delta.BSDiff, packed(f.t, bytes.Repeat([]byte{1, 0, 0xff, 0xff, 0xff, 0xff, 0x7f, 0}, 9)))
			}, why: "more than was said", fetched: true},
		"is none": {
			signed: func(f *fleet, dir string) {
				f.replace(dir, delta.DCZ, []byte("no delta at all, and yet some forty bytes of it"))
			}, why: "does not begin", fetched: true},
	} {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, w way, f *fleet) {
				dir, whole, _ := f.withDelta()
				if c.signed != nil {
					c.signed(f, dir)
				}
				f.publish(dir)
				m, _, err := bundle.Open(dir)
				must(t, err)
				patch := m.Parts[0].Forms[1]
				_, state := f.device()
				f.runsNoisy(state)
				if c.damaged != nil {
					c.damaged(f, state, filepath.Join(f.repo, bundle.PartPath(patch.SHA256)))
				}
				if c.hook != nil {
					f.hook = func(w http.ResponseWriter, r *http.Request) bool {
						return c.hook(w, r, strings.HasSuffix(r.URL.Path, patch.SHA256))
					}
				}
				f.installs(f.service(state, func(*Options) {}), order("o1", "1.1.0"))
				must(t, w.whole(state))
				if left, _ := os.ReadDir(filepath.Join(state, "ota", "parts")); len(left) != 0 {
					t.Errorf("what was fetched still takes space: %v", left)
				}
				r := f.result(state)
				if r.Form != whole.Encoding || !strings.Contains(r.NoDelta, c.why) {
					t.Errorf("taken as %s, for %q; want %q", r.Form, r.NoDelta, c.why)
				}
				if want := whole.Size + map[bool]int64{true: patch.Size}[c.fetched]; c.hook == nil && name != "altered" && r.FetchedBytes != want {
					t.Errorf("%d bytes were fetched, want %d", r.FetchedBytes, want)
				}
			})
		})
	}
}

// TestTheWholeIsNotFetchedBeyondTheOwnersVolume: a delta fits, and turns out to be of no
// use. The whole release waits for the owner and says why; what is of no use is fetched
// once, in however many lives.
func TestTheWholeIsNotFetchedBeyondTheOwnersVolume(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		dir, whole, _ := f.withDelta()
		evil := f.noisy("1.1.0")
		evil[len(evil)-20]++
		f.replace(dir, delta.BSDiff, f.made(delta.BSDiff, f.noisy("1.0.0"), evil))
		f.publish(dir)
		_, state := f.device()
		f.runsNoisy(state)
		o := &owner{asked: make(chan Step, 9)}
		o.word.Store(wire.RejectedUntil(time.Hour, wire.CodeMetered, "not so much this month"))
		hold := o.hold(func(s Step) bool { return s.Fetch > whole.Size/2 })
		for life := range 2 {
			s := f.service(state, func(opt *Options) { opt.Hold = hold })
			ctx, cancel := context.WithCancel(t.Context())
			_, err := s.Handle(ctx, order("o1", "1.1.0"), func(p wire.Progress) {
				if p.Waits != nil && p.Waits.Code == wire.CodeMetered {
					cancel() // this life ends
				}
			})
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("life %d ended with %v", life, err)
			}
			rec, err := ReadRecord(state)
			must(t, err)
			if rec.Phase != slot.Waiting || rec.Why == nil || rec.Why.Code != wire.CodeMetered || rec.Why.Until == nil || len(rec.Unusable) != 1 {
				t.Errorf("life %d left %+v", life, rec)
			}
			if n := f.partRequests(); n != 1 {
				t.Errorf("in life %d parts were asked for %d times by now, the delta alone once", life, n)
			}
			if trial, err := standing(s); trial != nil || err != nil {
				t.Errorf("something is on trial: %+v, %v", trial, err)
			}
		}
		var last Step
		for len(o.asked) > 0 {
			last = <-o.asked
		}
		if last.Fetch != whole.Size || !strings.Contains(last.NoDelta, "cannot be used") {
			t.Errorf("the owner was asked for %+v", last)
		}
		o.word.Store(nil) // the next month
		f.installs(f.service(state, func(opt *Options) { opt.Hold = hold }), order("o1", "1.1.0"))
		must(t, w.whole(state))
		if n := f.partRequests(); n != 2 {
			t.Errorf("parts were asked for %d times, want two", n)
		}
		if r := f.result(state); r.Form != whole.Encoding || !strings.Contains(r.NoDelta, "SHA-256") {
			t.Errorf("it tells %+v", r)
		}
	})
}

// releaseAgentWithDelta releases the stand-in agent, with a delta from the one that a
// machine begins with.
func (f *fleet) releaseAgentWithDelta(version, mode string) {
	f.t.Helper()
	dir := f.t.TempDir()
	build := func(version string, content []byte, from ...string) string {
		file, out := filepath.Join(dir, version), filepath.Join(dir, "bundle-"+version)
		must(f.t, os.WriteFile(file, content, 0o755))
		if msg, err := exec.Command(file, append([]string{"build", version, file, out}, from...)...).CombinedOutput(); err != nil {
			f.t.Fatalf("%v\n%s", err, msg)
		}
		return out
	}
	f.publish(build(version, agent(version, mode), build("1.0.0", agent("1.0.0", "good"))))
}

func TestUpdateByDeltaEndToEnd(t *testing.T) {
	f := newFleet(t)
	f.releaseAgentWithDelta("1.1.0", "good")
	line, seen := f.machine().run(nil, "report ")
	if !strings.HasPrefix(line, `report SUCCEEDED {"from":"1.0.0","to":"1.1.0","running":"1.1.0","slot":"b","confirmed":true,"form":"bsdiff","fetched_bytes":`) {
		t.Errorf("%q\n%s", line, strings.Join(seen, "\n"))
	}
}
