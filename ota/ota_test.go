package ota

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

const patience = 2 * time.Minute

// The real launcher, and the stand-in agent, with crash points.
var launcherBin, agentBin []byte

func TestMain(m *testing.M) {
	launcherBin, agentBin = build("../cmd/deimos-launch"), build("./testdata/agent")
	os.Exit(m.Run())
}

// build keeps no file while the tests run: they may be killed.
func build(pkg string) []byte {
	dir, err := os.MkdirTemp("", "deimos-ota-test-*")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "out")
	cmd := exec.Command("go", "build", "-tags", "crashpoints", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("build %s: %v\n%s", pkg, err, msg))
	}
	raw, err := os.ReadFile(out)
	if err != nil {
		panic(err)
	}
	return raw
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// script is an agent that needs no building: enough for everything before its trial.
func script(version, arch string) []byte {
	return fmt.Appendf(nil, "#!/bin/sh\necho '{\"version\":%q,\"os\":%q,\"arch\":%q}'\n", version, runtime.GOOS, arch)
}

func agent(version, mode string) []byte {
	return append(bytes.Clone(agentBin), fmt.Sprintf("\n#agent %s %s\n", version, mode)...)
}

// fleet makes and serves releases.
type fleet struct {
	t          *testing.T
	way        way // of its devices
	keys, repo string
	server     *httptest.Server

	mu    sync.Mutex
	hook  func(w http.ResponseWriter, r *http.Request) bool
	parts int // requests for parts
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{t: t, way: ways["agent"], keys: filepath.Join(t.TempDir(), "keys"), repo: t.TempDir()}
	must(t, repo.Init(f.keys, repo.InitOptions{}))
	files := http.FileServer(http.Dir(f.repo))
	f.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		hook := f.hook
		if strings.HasPrefix(r.URL.Path, "/parts/") {
			f.parts++
		}
		f.mu.Unlock()
		if hook == nil || !hook(w, r) {
			files.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(f.server.Close)
	return f
}

func (f *fleet) partRequests() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.parts
}

// bundle builds a bundle of one part for this machine.
func (f *fleet) bundle(version string, content []byte, change func(*bundle.BuildOptions)) string {
	f.t.Helper()
	dir := f.t.TempDir()
	file := filepath.Join(dir, "agent")
	must(f.t, os.WriteFile(file, content, 0o755))
	o := bundle.BuildOptions{Version: version, Fast: true, Agents: []bundle.Agent{{Path: file, Platform: bundle.Host()}}}
	if change != nil {
		change(&o)
	}
	_, err := bundle.Build(f.t.Context(), filepath.Join(dir, "bundle"), o)
	must(f.t, err)
	f.rename(filepath.Join(dir, "bundle"))
	return filepath.Join(dir, "bundle")
}

func (f *fleet) release(version string, content []byte, change func(*bundle.BuildOptions)) {
	f.t.Helper()
	f.publish(f.bundle(version, content, change))
}

func (f *fleet) publish(bundleDir string) {
	f.t.Helper()
	_, err := repo.Publish(repo.PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: bundleDir})
	must(f.t, err)
}

// releaseAgent releases the stand-in agent.
func (f *fleet) releaseAgent(version, mode string) {
	f.t.Helper()
	dir := f.t.TempDir()
	file := filepath.Join(dir, "agent")
	must(f.t, os.WriteFile(file, agent(version, mode), 0o755))
	if msg, err := exec.Command(file, "build", version, file, filepath.Join(dir, "bundle")).CombinedOutput(); err != nil {
		f.t.Fatalf("%v\n%s", err, msg)
	}
	f.publish(filepath.Join(dir, "bundle"))
}

// device is a settled device that runs 1.0.0, without its process.
func (f *fleet) device() (*Service, string) {
	f.t.Helper()
	dir := f.t.TempDir()
	f.way.settled(f.t, dir)
	return f.service(dir, func(*Options) {}), dir
}

func (f *fleet) service(dir string, change func(*Options)) *Service {
	f.t.Helper()
	root, err := repo.Root(f.keys)
	must(f.t, err)
	o := Options{
		StateDir: dir, Version: "1.0.0", Device: "dev", Board: "generic-amd64",
		Root:   func() []byte { return root },
		Source: func() (repo.Source, error) { return repo.HTTP{Client: f.server.Client(), Base: f.server.URL}, nil },
		Limits: repo.Limits{Attempts: 2, Pause: time.Millisecond}, Patience: -1,
	}
	f.way.as(&o, dir, o.Version)
	change(&o)
	s, err := New(o)
	must(f.t, err)
	return s
}

func order(id, version string) wire.Order {
	body, _ := json.Marshal(wire.UpdateInstall{Version: version, Target: repo.TargetName(version)})
	return wire.Order{ID: id, Kind: wire.KindUpdateInstall, Body: body}
}

// refused checks state, code and words of a refusal, and that nothing changed for the device.
func refused(t *testing.T, s *Service, o wire.Order, state wire.State, code, words string) {
	t.Helper()
	before, err := standing(s)
	must(t, err)
	_, err = s.Handle(t.Context(), o, nil)
	var p *wire.Problem
	if !errors.As(err, &p) || p.State != state || p.Code != code || !strings.Contains(p.Reason, words) {
		t.Errorf("got %+v; want %s %s with %q", err, state, code, words)
	}
	after, err := standing(s)
	must(t, err)
	if after != nil && before == nil {
		t.Errorf("a refused update is on trial: %+v", after)
	}
}

func standing(s *Service) (*trial, error) {
	if s.how == nil {
		return nil, nil
	}
	t, _, err := s.how.standing()
	return t, err
}

// installs carries an order out as far as its restart.
func (f *fleet) installs(s *Service, o wire.Order) {
	f.t.Helper()
	if _, err := s.Handle(f.t.Context(), o, nil); !errors.Is(err, ErrRestart) {
		f.t.Fatal(err)
	}
}

func TestInstallGoesOnTrialAndAsksForRestart(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		s, dir := f.device()
		last := 0.0
		_, err := s.Handle(t.Context(), order("o1", "1.1.0"), func(told wire.Progress) {
			p := told.Done
			if p < last || p > 1 {
				t.Errorf("progress went from %v to %v", last, p)
			}
			last = p
		})
		if !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		if s.Reboots() != (w.part == bundle.PartFirmware) {
			t.Errorf("reboots: %v", s.Reboots())
		}
		if got, err := standing(s); err != nil || got == nil || *got != (trial{order: "o1", version: "1.1.0"}) {
			t.Errorf("%+v, %v", got, err)
		}
		if on, err := s.OnTrial(); on || err != nil {
			t.Errorf("what installed it is on trial: %v", err)
		}
		must(t, w.whole(dir))
		if left, _ := os.ReadDir(filepath.Join(dir, "ota", "parts")); len(left) != 0 {
			t.Errorf("the packed part still takes space: %v", left)
		}
		if settled, err := s.Settled(); settled != nil || err != nil {
			t.Errorf("settled before it was tried: %+v, %v", settled, err)
		}
	})
}

func TestRepeatOfOrderInstallsOnce(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		f.good("1.2.0")
		s, dir := f.device()
		for range 2 { // the agent may be killed before it exits
			f.installs(s, order("o1", "1.1.0"))
		}
		refused(t, s, order("o2", "1.2.0"), wire.Rejected, wire.CodeUpdatePending, "on trial since order o1")
		w.try(t, dir)
		next := f.service(dir, func(o *Options) { o.Version = "1.1.0"; w.as(o, dir, o.Version) })
		if on, err := next.OnTrial(); !on || err != nil {
			t.Errorf("on trial: %v, %v", on, err)
		}
		if _, err := next.Handle(t.Context(), order("o1", "1.1.0"), nil); !errors.Is(err, ErrPending) {
			t.Fatalf("a repeat to the version on trial: %v", err)
		}
		must(t, next.Confirm(t.Context()))
		if on, err := next.OnTrial(); on || err != nil {
			t.Errorf("confirmed, and on trial: %v", err)
		}
		out, err := next.Handle(t.Context(), order("o1", "1.1.0"), nil)
		want := wire.UpdateResult{From: "1.0.0", To: "1.1.0", Running: "1.1.0", Slot: next.o.Slot, Confirmed: true}
		if err != nil || bare(out) != want {
			t.Errorf("%+v, %v", out, err)
		}
		settled, err := next.Settled()
		must(t, err)
		if settled.Order != "o1" || settled.Problem != nil || !reflect.DeepEqual(settled.Outcome, out) {
			t.Errorf("%+v; a repeat was told %+v", settled, out)
		}
		told := out.Body.(wire.UpdateResult)
		if told.Form != bundle.EncodingZstd || told.FetchedBytes <= 0 || told.TookSeconds <= 0 || !strings.Contains(told.Checkpoint, "\n2\n") {
			t.Errorf("what the install was like is not told: %+v", told)
		}
		if n := f.partRequests(); n != 1 {
			t.Errorf("fetched %d times", n)
		}
	})
}

func TestRolledBackUpdateIsReportedAsFailed(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		s, dir := f.device()
		f.installs(s, order("o1", "1.1.0"))
		w.giveUp(t, dir)
		settled, err := s.Settled()
		must(t, err)
		if p := settled.Problem; p == nil || p.State != wire.Failed || p.Code != wire.CodeRolledBack || !strings.Contains(p.Reason, w.reason) {
			t.Errorf("%+v", p)
		}
		if body := settled.Outcome.Body.(wire.UpdateResult); body.Confirmed || body.Running != "1.0.0" {
			t.Errorf("%+v", body)
		}
		refused(t, s, order("o1", "1.1.0"), wire.Failed, wire.CodeRolledBack, w.reason)
		f.installs(s, order("o2", "1.1.0")) // a new order may try it again
	})
}

func TestWhatDoesNotFitIsRefusedByName(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		ok := func(v string) []byte { return w.content(v, runtime.GOARCH) }
		zero := 0.0
		f.release("0.9.0", ok("0.9.0"), nil)
		f.release("1.0.0", ok("1.0.0"), nil)
		f.release("1.1.0", ok("1.1.0"), func(o *bundle.BuildOptions) { o.Boards = []string{"rock-5b"} })
		f.release("1.2.0", ok("1.2.0"), func(o *bundle.BuildOptions) {
			o.Agents[0].Platform = bundle.Platform{OS: "linux", Arch: "riscv64"}
		})
		f.release("1.3.0", ok("1.3.0"), func(o *bundle.BuildOptions) { o.From = "1.2.0" })
		f.release("1.4.0", ok("1.4.0"), func(o *bundle.BuildOptions) { o.Percentage = &zero })
		f.release("1.5.0", ok("1.5.1"), nil)
		f.release("1.6.0", w.content("1.6.0", "arm"), nil)
		f.release("1.7.0", []byte("no program"), nil)
		s, _ := f.device()
		for version, c := range map[string]struct {
			state       wire.State
			code, words string
		}{
			"0.9.0": {wire.Rejected, wire.CodeDowngrade, "older than 1.0.0"},
			"1.0.0": {wire.Rejected, wire.CodeAlreadyLatest, "already runs"},
			"1.1.0": {wire.Rejected, wire.CodeWrongHardware, "is for rock-5b"},
			"1.2.0": {wire.Rejected, wire.CodeWrongHardware, "has no " + w.part + " for"},
			"1.3.0": {wire.Rejected, wire.CodeTooOld, "from 1.2.0 on"},
			"1.4.0": {wire.Rejected, wire.CodeNotInRollout, "0% of devices"},
			"1.5.0": {wire.Failed, wire.CodePreflight, "says that it is 1.5.1"},
			"1.6.0": {wire.Failed, wire.CodePreflight, "1.6.0 for linux/arm"},
			"1.7.0": {wire.Failed, wire.CodePreflight, "; version 1.0.0 keeps running"},
			"9.9.9": {wire.Rejected, wire.CodeNotFound, "names no such release"},
		} {
			t.Run(version, func(t *testing.T) { refused(t, s, order("o-"+version, version), c.state, c.code, c.words) })
		}
		lie := order("o", "1.5.0")
		lie.Body = []byte(`{"version":"2.0.0","target":"bundles/1.3.0.json"}`)
		refused(t, s, lie, wire.Rejected, wire.CodeVerification, "is version 1.3.0")
		lie.Body = []byte(`{"version":"1.5.0","target":"../../etc/passwd"}`)
		refused(t, s, lie, wire.Rejected, wire.CodeNotFound, "names no such release")
		lie.Body = []byte(`[]`)
		refused(t, s, lie, wire.Rejected, wire.CodeBadBody, "cannot be read")
	})
}

// A campaign asks a share of the devices: whether it is among them, the device
// computes itself.
func TestADeviceTakesACampaignOnlyWhenItsTurnHasCome(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", script("1.1.0", runtime.GOARCH), nil)
	s, _ := f.device()
	point := bundle.RolloutPoint("1.1.0", string(s.o.Device))
	of := func(id string, percentage float64) wire.Order {
		o := order(id, "1.1.0")
		o.Body, _ = json.Marshal(wire.UpdateInstall{Version: "1.1.0", Target: repo.TargetName("1.1.0"), Percentage: percentage})
		return o
	}
	refused(t, s, of("o1", point/2), wire.Rejected, wire.CodeNotInRollout, "of devices so far")
	refused(t, s, of("o2", point), wire.Rejected, wire.CodeNotInRollout, "of devices so far")
	f.installs(s, of("o3", math.Nextafter(point, 100)))
}

func TestWhatIsMissingOnTheDeviceIsSaid(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", script("1.1.0", runtime.GOARCH), nil)
	_, dir := f.device()
	refused(t, f.service(dir, func(o *Options) { o.Slot = "" }), order("o", "1.1.0"), wire.Rejected, wire.CodeNotSupported, "through deimos-launch, or run our image")
	refused(t, f.service(dir, func(o *Options) { o.Root = func() []byte { return nil } }), order("o", "1.1.0"), wire.Rejected, wire.CodeNoUpdateRoot, "deimos release keys")
	refused(t, f.service(dir, func(o *Options) { o.Now = func() time.Time { return time.Now().AddDate(20, 0, 0) } }),
		order("o", "1.1.0"), wire.Rejected, wire.CodeStaleMetadata, "the clock is wrong")
	old := freeSpace
	freeSpace = func(string) (int64, error) { return 1 << 20, nil }
	refused(t, f.service(dir, func(*Options) {}), order("o", "1.1.0"), wire.Failed, wire.CodeNoSpace, "there are 1 MB")
	freeSpace = old
	if f.partRequests() != 0 {
		t.Error("something was fetched all the same")
	}
	if _, err := New(Options{StateDir: dir, Slot: "c"}); err == nil {
		t.Error("slot c was accepted")
	}
}

func TestBundleOfOtherKeysIsRefused(t *testing.T) {
	f, thief := newFleet(t), newFleet(t)
	thief.release("1.1.0", script("1.1.0", runtime.GOARCH), nil)
	_, dir := f.device()
	s := f.service(dir, func(o *Options) {
		o.Source = func() (repo.Source, error) { return repo.Dir(thief.repo), nil }
	})
	refused(t, s, order("o", "1.1.0"), wire.Rejected, wire.CodeVerification, "not signed by enough of the keys")
}

// TestUnsignedBundleIsRefused puts all files of a bundle into the repository;
// only the signatures are missing.
func TestUnsignedBundleIsRefused(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", script("1.1.0", runtime.GOARCH), nil)
	evil := f.bundle("1.2.0", script("1.2.0", runtime.GOARCH), nil)
	must(t, os.CopyFS(filepath.Join(f.repo, "targets"), os.DirFS(evil)))
	targets := filepath.Join(f.repo, "metadata", "1.targets.json")
	raw, err := os.ReadFile(targets)
	must(t, err)
	must(t, os.WriteFile(targets, bytes.Replace(raw, []byte("bundles/1.1.0.json"), []byte("bundles/1.2.0.json"), 1), 0o644))
	s, _ := f.device()
	refused(t, s, order("o", "1.2.0"), wire.Rejected, wire.CodeVerification, "not the signed ones")
}

func TestAlteredPartIsRefusedAndNotKept(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		must(t, filepath.WalkDir(filepath.Join(f.repo, "parts"), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			raw, err := os.ReadFile(path)
			raw[len(raw)-1] ^= 1
			return errors.Join(err, os.WriteFile(path, raw, 0o644))
		}))
		s, dir := f.device()
		refused(t, s, order("o", "1.1.0"), wire.Rejected, wire.CodeVerification, "not the signed ones")
		if left, _ := os.ReadDir(filepath.Join(dir, "ota", "parts")); len(left) != 0 {
			t.Errorf("kept: %v", left)
		}
	})
}

func TestCancelledInstallResumes(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		content := append(w.content("1.1.0", runtime.GOARCH), bytes.Repeat([]byte("#\n"), 100)...)
		f.release("1.1.0", content, nil)
		ctx, cancel := context.WithCancel(t.Context())
		f.hook = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasPrefix(r.URL.Path, "/parts/") || r.Header.Get("Range") != "" {
				return false
			}
			raw, _ := os.ReadFile(filepath.Join(f.repo, r.URL.Path))
			_, _ = w.Write(raw[:20])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return true
		}
		s, dir := f.device()
		_, err := s.Handle(ctx, order("o1", "1.1.0"), func(told wire.Progress) {
			p := told.Done
			if p > 0.05 {
				cancel() // bytes have come
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "ota", "parts", "*.partial")); len(left) != 1 {
			t.Fatalf("nothing to resume from: %v", left)
		}
		if _, err := s.Handle(t.Context(), order("o1", "1.1.0"), nil); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
	})
}

// bare is a result without how it came about, which other tests look at.
func bare(out wire.Outcome) wire.UpdateResult {
	r := out.Body.(wire.UpdateResult)
	r.Form, r.FetchedBytes, r.TookSeconds, r.Checkpoint, r.Gate = "", 0, 0, "", nil
	return r
}

func TestOneInstallAtATime(t *testing.T) {
	eachWay(t, func(t *testing.T, w way, f *fleet) {
		f.good("1.1.0")
		s, _ := f.device()
		asked := false
		_, err := s.Handle(t.Context(), order("o1", "1.1.0"), func(wire.Progress) {
			if asked {
				return
			}
			asked = true
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			_, err := s.Handle(ctx, order("o2", "1.1.0"), func(told wire.Progress) {
				if told.Waits == nil || told.Waits.Code != wire.CodeUpdatePending {
					t.Errorf("it is told %+v", told)
				}
				cancel()
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the second ends with %v", err)
			}
		})
		if !errors.Is(err, ErrRestart) || !asked {
			t.Errorf("%v, asked %v", err, asked)
		}
	})
}

// machine is a device with its launcher and agent as real processes.
type machine struct {
	t    *testing.T
	dir  string
	args []string
}

func (f *fleet) machine() *machine {
	f.t.Helper()
	dir := f.t.TempDir()
	m := &machine{t: f.t, dir: dir}
	put := func(name string, raw []byte) string {
		path := filepath.Join(dir, name)
		must(f.t, os.WriteFile(path, raw, 0o755))
		return path
	}
	root, err := repo.Root(f.keys)
	must(f.t, err)
	raw, err := json.Marshal(order("o1", "1.1.0"))
	must(f.t, err)
	m.args = []string{put("deimos-launch", launcherBin), "--state", dir, "--agent", put("factory", agent("1.0.0", "good")), "--restart-delay", "1ms",
		"--", "run", dir, f.server.URL, put("root", root), put("order", raw)}
	return m
}

// run starts the launcher and reads on until a line contains text, then cuts
// the power. It returns that line, empty if it never came.
func (m *machine) run(env []string, texts ...string) (line string, seen []string) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, m.args[0], m.args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.StderrPipe()
	must(m.t, err)
	must(m.t, cmd.Start())
	for sc := bufio.NewScanner(out); sc.Scan(); {
		seen = append(seen, sc.Text())
		for _, text := range texts {
			if line == "" && strings.Contains(sc.Text(), text) {
				line = sc.Text()
				cancel() // and read until launcher and agent are both gone
			}
		}
	}
	_ = cmd.Wait()
	return line, seen
}

func TestUpdateEndToEnd(t *testing.T) {
	f := newFleet(t)
	f.releaseAgent("1.1.0", "good")
	m := f.machine()
	line, seen := m.run(nil, "report ")
	if want := `report SUCCEEDED {"from":"1.0.0","to":"1.1.0","running":"1.1.0","slot":"b","confirmed":true,"form":"zstd","fetched_bytes":`; !strings.HasPrefix(line, want) {
		t.Errorf("%q\n%s", line, strings.Join(seen, "\n"))
	}
}

func TestBrokenReleaseRollsBackEndToEnd(t *testing.T) {
	f := newFleet(t)
	f.releaseAgent("1.1.0", "crash")
	m := f.machine()
	line, seen := m.run(nil, "report ")
	if !strings.HasPrefix(line, `report FAILED rolled_back {"from":"1.0.0","to":"1.1.0","running":"1.0.0","slot":"a","confirmed":false,`) ||
		!strings.Contains(line, "exited with code 1") {
		t.Errorf("%q\n%s", line, strings.Join(seen, "\n"))
	}
}

// TestUpdateKilledAtEveryPoint kills the agent at each point where an update
// changes a slot, and at points of the download; the next start ends it well.
func TestUpdateKilledAtEveryPoint(t *testing.T) {
	for name, form := range map[string]struct {
		release  func(f *fleet, version, mode string)
		progress []string
	}{
		"whole": {(*fleet).releaseAgent, []string{"progress 0.05", "progress 0.3", "progress 0.6", "progress 0.8", "progress 0.95"}},
		"delta": {(*fleet).releaseAgentWithDelta, nil}, // which is too small to be killed in the middle of its way
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t)
			form.release(f, "1.1.0", "good")
			f.killedAtEveryPoint(t, form.progress)
		})
	}
}

func (f *fleet) killedAtEveryPoint(t *testing.T, progresses []string) {
	met := map[string]bool{} // the names of the points
	killed := func(env []string, text string) bool {
		m := f.machine()
		line, _ := m.run(env, text, "report ")
		if _, point, ok := strings.Cut(line, "crash point "); ok {
			_, point, _ = strings.Cut(point, ": ")
			met[point] = true
		}
		if strings.HasPrefix(line, "report ") {
			return false
		}
		if line, seen := m.run(nil, "report "); !strings.HasPrefix(line, "report SUCCEEDED") {
			t.Errorf("after %q (%v): %q\n%s", text, env, line, strings.Join(seen, "\n"))
		}
		return true
	}
	step := 1
	if testing.Short() {
		step = 3
	}
	points, first := 0, 1+rand.IntN(step)
	for n := first; killed([]string{"DEIMOS_CRASH_IN=deimos-agent", "DEIMOS_CRASH_AT=" + strconv.Itoa(n)}, "crash point"); n += step {
		points++
	}
	for _, e := range []slot.Event{slot.Offered, slot.Allowed, slot.Fetched, slot.Marked} {
		if step == 1 && (!met["before it is "+string(e)] || !met["it is "+string(e)]) {
			t.Errorf("nobody was killed when it is %s; points: %v", e, met)
		}
	}
	if points < 2 {
		t.Errorf("only %d crash points: was the agent built with them?", points)
	}
	if step == 1 && !met["half of it is unpacked"] {
		t.Errorf("nobody was killed in the middle of unpacking; points: %v", met)
	}
	for _, progress := range progresses {
		if !killed(nil, progress) {
			t.Errorf("%s never came", progress)
		}
	}
	t.Logf("%d crash points, from %d in steps of %d", points, first, step)
}
