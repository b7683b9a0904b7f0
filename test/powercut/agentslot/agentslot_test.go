// Package agentslot cuts the power of a device that runs without our image while its
// agent is updated: after the agent that it was shipped with, one release is installed,
// tried and kept, and the next one installed, tried and given up. The disk is recorded,
// and made again as it may be after a cut at any of its writes. What must hold each time:
//
//   - what the launcher would start is there, whole, and is the version before the step
//     that was cut, or the one after it;
//   - what was said to be done is done: a release on trial is not forgotten, a try is
//     paid for, a version that was kept stays, one that was given up stays away;
//   - the same update can be gone on with from there, to its end.
//
// Of a device with our image see package powercut.
package agentslot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
	"github.com/deimos-edge/deimos/test/powercut/live"
)

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 {
		if err := blocks.Alone(); err != nil {
			fmt.Fprintln(os.Stderr, err) // the test says what it lacks
		}
	}
	os.Exit(m.Run())
}

const limit = 10 * time.Minute

// stage is how far the life was when the power was cut: what had returned by then.
type stage int

const (
	unborn stage = iota
	shipped
	onTrial
	tried
	kept
	nextOnTrial
	givenUp
)

// versions are what is shipped, what is kept, and what is given up.
var versions = []string{"1.0.0", "1.1.0", "1.2.0"}

// fleet is where releases come from, on another disk.
type fleet struct {
	repo    string
	root    []byte
	factory string // SHA-256 of the agent that devices are shipped with
}

// content is an agent that says what it is, of many pages.
func content(rng *rand.Rand, version string) []byte {
	raw := fmt.Appendf(nil, "#!/bin/sh\necho '{\"version\":%q,\"os\":%q,\"arch\":%q}'\nexit\n", version, runtime.GOOS, runtime.GOARCH)
	for range 20_000 {
		raw = fmt.Appendf(raw, "# %x\n", rng.Uint64())
	}
	return raw
}

func newFleet(t *testing.T, rng *rand.Rand) (f fleet, factory string) {
	t.Helper()
	dir := t.TempDir()
	f.repo = filepath.Join(dir, "repo")
	keys := filepath.Join(dir, "keys")
	must(t, repo.Init(keys, repo.InitOptions{}))
	for _, v := range versions {
		file, packed := filepath.Join(dir, v), filepath.Join(dir, "bundle-"+v)
		must(t, os.WriteFile(file, content(rng, v), 0o755))
		_, err := bundle.Build(t.Context(), packed, bundle.BuildOptions{Version: v, Fast: true, Agents: []bundle.Agent{{Path: file, Platform: bundle.Host()}}})
		must(t, err)
		_, err = repo.Publish(repo.PublishOptions{Keys: keys, Repo: f.repo, Bundle: packed})
		must(t, err)
	}
	var err error
	f.root, err = repo.Root(keys)
	must(t, err)
	factory = filepath.Join(dir, versions[0])
	f.factory, err = slot.Digest(factory)
	must(t, err)
	return f, factory
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// install has what runs, which is of a version and in a slot, take another.
func (f fleet) install(ctx context.Context, state string, runs slot.Name, version, wish, next string) error {
	s, err := ota.New(ota.Options{StateDir: state, Slot: string(runs), Version: version, Device: "dev", Board: "generic", Root: func() []byte { return f.root }})
	if err != nil {
		return err
	}
	_, err = s.Install(ctx, wish, f.repo, next, nil)
	if errors.Is(err, ota.ErrRestart) {
		return nil
	}
	return fmt.Errorf("it is not installed: %w", err)
}

// life is what is recorded.
func (f fleet) life(ctx context.Context, state, factory string, now func(stage)) error {
	if err := os.Mkdir(state, 0o700); err != nil {
		return err
	}
	slots, err := slot.Open(state)
	if err != nil {
		return err
	}
	for _, step := range []struct {
		do   func() error
		then stage
	}{
		{func() error { return slots.InstallFactory(slot.A, factory, versions[0], "") }, shipped},
		{func() error { return f.install(ctx, state, slot.A, versions[0], "first", versions[1]) }, onTrial},
		{func() error { _, err := slots.StartTry(); return err }, tried},
		{func() error { return slots.Confirm(slot.B) }, kept},
		{func() error { return f.install(ctx, state, slot.B, versions[1], "second", versions[2]) }, nextOnTrial},
		{func() error { _, err := slots.RollBack("it crashed three times"); return err }, givenUp},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("before stage %d: %w", step.then, err)
		}
		now(step.then)
	}
	return nil
}

// checker looks at disks after a cut.
type checker struct {
	fleet
	at stage
}

func (k *checker) Pass(e blocks.Event) error {
	if e.Kind != blocks.Note || len(e.Mark) == 0 {
		return nil
	}
	return json.Unmarshal(e.Mark, &k.at)
}

func (k *checker) Check(d *blocks.Disk, _ blocks.Cut, _ bool) error {
	return d.Mounted(0, int64(len(d.Work.Mem)), func(dir string) error {
		state := filepath.Join(dir, "state")
		if _, err := os.Stat(state); k.at == unborn && errors.Is(err, os.ErrNotExist) {
			return nil
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		return k.check(ctx, state)
	})
}

func (k *checker) check(ctx context.Context, state string) error {
	slots, err := slot.Open(state)
	if err != nil {
		return err
	}
	st, err := slots.Load()
	if err != nil {
		return err
	}
	if st.Current == "" && k.at == unborn {
		return nil // the launcher installs what was shipped, once more
	}
	if err := slots.Check(st, st.Current); err != nil {
		return fmt.Errorf("what runs: %w", err)
	}
	if st.Version() == "" && k.at == unborn { // it is in its place, and not noted yet
		if sum, err := slot.Digest(slots.Path(st.Current)); err != nil || sum != k.factory {
			return fmt.Errorf("what was shipped is not whole (%w)", err)
		}
		return nil
	}
	is := unborn
	runs, trial := st.Version(), st.Trial
	switch {
	case runs == versions[0] && trial == nil:
		is = shipped
	case runs == versions[0] && trial.Version == versions[1] && !trial.Running:
		is = onTrial
	case runs == versions[0] && trial.Version == versions[1]:
		is = tried
	case runs == versions[1] && trial == nil && st.Last != nil && st.Last.Result == slot.RolledBack:
		is = givenUp
	case runs == versions[1] && trial == nil:
		is = kept
	case runs == versions[1] && trial.Version == versions[2]:
		is = nextOnTrial
	default:
		return fmt.Errorf("version %s runs, with a trial of %+v", runs, trial)
	}
	if is != k.at && is != k.at+1 {
		return fmt.Errorf("it is at stage %d, and was told to be at %d", is, k.at)
	}
	if trial != nil {
		if err := slots.Check(st, trial.Slot); err != nil {
			return fmt.Errorf("on trial: %w", err)
		}
		return nil
	}
	switch is {
	case shipped:
		err = k.install(ctx, state, st.Current, runs, "first", versions[1])
	case kept:
		err = k.install(ctx, state, st.Current, runs, "second", versions[2])
	}
	if err != nil {
		return err
	}
	if st, err = slots.Load(); err == nil && st.Trial != nil {
		err = slots.Check(st, st.Trial.Slot)
	}
	return err
}

// TestAPowerCutAtAnyWriteOfAnAgentsUpdate leaves a device that starts, and goes on.
func TestAPowerCutAtAnyWriteOfAnAgentsUpdate(t *testing.T) {
	testenv.Root(t, "a disk of its own is mounted")
	for tool, from := range map[string]string{"qemu-storage-daemon": "qemu-system-common", "mke2fs": "e2fsprogs"} {
		if _, err := exec.LookPath(tool); err != nil {
			testenv.Cannot(t, "%s is missing (Debian: %s)", tool, from)
		}
	}
	for _, device := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(device); err != nil {
			testenv.Cannot(t, "a disk cannot be recorded: %v", err)
		}
	}
	seed := testenv.Seed(t)
	rng := rand.New(rand.NewPCG(seed, 1))
	f, factory := newFleet(t, rng)
	dir := t.TempDir()
	must(t, f.record(t, dir, factory))
	rec, err := blocks.Load(dir)
	must(t, err)
	defer rec.Close()
	cuts := blocks.Plan(rec, howMany(t), seed)
	out, err := blocks.Replay(t.Context(), rec, cuts, min(blocks.Workers(), len(cuts)), func(*blocks.Disk) blocks.Checker { return &checker{fleet: f} })
	must(t, err)
	if err := out.Err(); err != nil {
		t.Error(err)
	}
	t.Logf("%s: %d cuts in %.1f s; at %d the journal was not enough", rec, out.Points, out.Took.Seconds(), out.Repaired)
}

func howMany(t *testing.T) int {
	t.Helper()
	if s := os.Getenv("CUTS"); s != "" {
		n, err := strconv.Atoi(s)
		must(t, err)
		return n
	}
	if testing.Short() {
		return 60
	}
	return 400
}

func (f fleet) record(t *testing.T, dir, factory string) (err error) {
	t.Helper()
	scratch, err := os.MkdirTemp("", "d") // sockets want short paths
	must(t, err)
	defer os.RemoveAll(scratch)
	starter := proc.NewStarter()
	defer starter.End()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	d, err := live.Start(ctx, starter, scratch, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.End()) }()
	return f.life(ctx, filepath.Join(d.Dir, "state"), factory, func(s stage) { d.Rec.Mark(s) })
}
