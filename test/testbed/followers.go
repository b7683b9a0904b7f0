package testbed

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// Fate is what becomes of a simulated device that takes a release.
type Fate int

// Fates. A device that fails comes up with the release, and then with what it ran
// before; one that falls silent is gone in its trial until [Follower.Back], after
// which it tells the same.
const (
	Takes Fate = iota
	Fails
	FallsSilent
)

// Followers makes simulated devices take releases. Each asks the signed metadata and
// the log of releases with the client that real devices have, finds its own place in
// the rollout, fetches the part to disk, and starts anew with the new version; it does
// not run it.
type Followers struct {
	Dir    string                                      // each device has a folder below it
	Fate   func(device int, version string) Fate       // nil: all take it
	Mirror func(device int, s repo.Source) repo.Source // what it reads in the repository's place; nil: that

	mu  sync.Mutex
	all map[int]*Follower
}

// Follower is one of them.
type Follower struct {
	agent.SimDevice
	of   *Followers
	back chan struct{}

	mu      sync.Mutex
	runs    string
	orders  []wire.Order
	paths   []string // that it asked the repository for
	fetched int64
}

// Follow runs such devices until stop is called, and waits until all are online. The
// update root must have been published before.
func (f *Fleet) Follow(n int, k *Followers) (stop func()) {
	f.T.Helper()
	return f.simulate(n, k.Does)
}

// Does is for [agent.Simulation].
func (k *Followers) Does(d agent.SimDevice) (map[wire.Kind]agent.Route, func(*wire.Beat)) {
	v := &Follower{SimDevice: d, of: k, runs: FirstVersion, back: make(chan struct{}, 1)}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.all == nil {
		k.all = make(map[int]*Follower)
	}
	k.all[d.N] = v
	return map[wire.Kind]agent.Route{wire.KindUpdateInstall: {AtOnce: 1, Limit: time.Hour, Handle: v.install}}, nil
}

// All is every device, by its number.
func (k *Followers) All() []*Follower {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make([]*Follower, len(k.all))
	for n, v := range k.all {
		out[n] = v
	}
	return out
}

// Back switches on a device that fell silent.
func (v *Follower) Back() { v.back <- struct{}{} }

// Orders is each order for an update that it was given, once.
func (v *Follower) Orders() []wire.Order {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.orders)
}

// Runs is the version that it runs.
func (v *Follower) Runs() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.runs
}

// Fetched is how many files of the repository it has asked for, and how many bytes of
// parts have come.
func (v *Follower) Fetched() (files int, bytes int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.paths), v.fetched
}

// Paths is the files of the repository that it has asked for, in order.
func (v *Follower) Paths() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.paths)
}

func (v *Follower) restart(version string) {
	v.mu.Lock()
	v.runs = version
	v.mu.Unlock()
	v.Restart(version)
}

func (v *Follower) install(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
	b, err := wire.DecodeBody[wire.UpdateInstall](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	v.mu.Lock()
	v.orders = append(v.orders, o)
	from := v.runs
	v.mu.Unlock()
	if point := bundle.RolloutPoint(b.Version, string(v.ID)); b.Percentage > 0 && point >= b.Percentage {
		return wire.Outcome{}, wire.RejectedBecause(wire.CodeNotInRollout, "%s goes to %v%% of devices so far, and this one stands at %.2f%%", b.Version, b.Percentage, point)
	}
	tell(wire.Progress{Done: 0.05})
	r := wire.UpdateResult{From: from, To: b.Version, Running: b.Version, Confirmed: true}
	if err := v.fetch(ctx, b, &r); err != nil {
		return wire.Outcome{Body: r}, err
	}
	fate := Takes
	if v.of.Fate != nil {
		fate = v.of.Fate(v.N, b.Version)
	}
	if fate == FallsSilent {
		on := v.Off()
		select {
		case <-ctx.Done():
			return wire.Outcome{}, ctx.Err()
		case <-v.back:
			on()
		}
	}
	if fate == Takes {
		v.restart(b.Version)
		return wire.Outcome{Body: r}, nil
	}
	if fate == Fails {
		v.restart(b.Version)
		v.restart(from)
	}
	r.Running, r.Confirmed = from, false
	return wire.Outcome{Body: r}, wire.FailedBecause(wire.CodeRolledBack, "rolled back to version %s: it was not confirmed", from)
}

// fetch brings the release to the disk, with all checks that come before that.
func (v *Follower) fetch(ctx context.Context, b wire.UpdateInstall, r *wire.UpdateResult) error {
	dir := filepath.Join(v.of.Dir, fmt.Sprint(v.N))
	var source repo.Source = counted{repo.HTTP{Client: v.HTTP, Base: v.DataPlane[0] + "/data/v1/repo"}, v}
	if v.of.Mirror != nil {
		source = v.of.Mirror(v.N, source)
	}
	began := time.Now()
	c, err := repo.NewClient(repo.ClientOptions{Dir: filepath.Join(dir, "tuf"), Root: v.UpdateRoot, Source: source})
	if err == nil {
		err = c.Refresh(ctx, time.Now())
	}
	var m bundle.Manifest
	if err == nil {
		m, err = c.Manifest(ctx, b.Target)
	}
	if fork := (*repo.Fork)(nil); errors.As(err, &fork) {
		r.Checkpoint = fork.Shown
		return wire.RejectedBecause(wire.CodeLogFork, "the release is refused: %v", err)
	}
	if err != nil {
		return wire.FailedBecause(wire.CodeTransfer, "%v", err)
	}
	r.Checkpoint = c.Log().Checkpoint
	_, forms, err := m.For(bundle.Device{ID: string(v.ID), Board: "simulated", Version: r.From, Part: bundle.PartAgent, Platform: bundle.Host()})
	if err != nil {
		return err
	}
	form, packed := forms[0], filepath.Join(dir, "part")
	if err := c.FetchPart(ctx, form, packed, nil); err != nil {
		return wire.FailedBecause(wire.CodeTransfer, "%v", err)
	}
	r.Form, r.FetchedBytes, r.TookSeconds = form.Encoding, form.Size, time.Since(began).Seconds()
	v.mu.Lock()
	v.fetched += form.Size
	v.mu.Unlock()
	return os.Remove(packed)
}

// counted counts the files that a device asks for.
type counted struct {
	repo.Source
	by *Follower
}

func (s counted) Open(ctx context.Context, path string, offset int64) (io.ReadCloser, error) {
	s.by.mu.Lock()
	s.by.paths = append(s.by.paths, path)
	s.by.mu.Unlock()
	return s.Source.Open(ctx, path, offset)
}

// ToyBundle writes a release of one part, of these bytes, as if they were packed
// already, for devices that only fetch it.
func ToyBundle(dir, version string, packed []byte) error {
	sum := sha256.Sum256(packed)
	name := hex.EncodeToString(sum[:])
	m := bundle.Manifest{Format: bundle.Format, Version: version, Parts: []bundle.Part{{
		Name: bundle.PartAgent, Platform: bundle.Host(), SHA256: name, Size: int64(len(packed)),
		Forms: []bundle.Form{{Encoding: bundle.EncodingZstd, SHA256: name, Size: int64(len(packed))}},
	}}}
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "parts"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, bundle.PartPath(name)), packed, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "manifest.json"), raw, 0o600)
}
