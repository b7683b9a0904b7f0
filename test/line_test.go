package test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// TestWholeLine is what a fleet is for, under launchers as on real devices.
func TestWholeLine(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := testbed.Seeded(t)
	keys := f.Path("release-keys")
	f.OK(nil, "release", "keys", "init", "--keys", keys)
	f.Publish("")
	f.enrol(3, true)

	data := slices.Concat(testbed.RandomText(rng, 1<<20), testbed.RandomBytes(rng, 4<<20))
	o := f.Put("file", data)
	f.CheckPlacements(o, 2)
	f.CheckGet("file", data)
	f.CheckJobs(o, data[:o.Chunks[0].Size])
	for _, d := range f.devices {
		d.checkStorage()
		d.checkCompute()
	}

	victim := f.holdersOf(o, 0)[0]
	victim.kill()
	f.CheckGet("file", data)
	victim.start()
	victim.awaitOnline()
	victim.checkStorage()

	f.checkUpdates(f.devices[rng.IntN(3)])
	f.CheckGet("file", data)
	f.checkRemoval("file")
}

// TestExternalNATS is the same line, shorter, with a stock nats-server between.
func TestExternalNATS(t *testing.T) {
	t.Parallel()
	f := newFleet(t, external)
	rng := testbed.Seeded(t)
	f.enrol(3, false)
	data := slices.Concat(testbed.RandomText(rng, 1<<20), testbed.RandomBytes(rng, 2<<20+4711))
	o := f.Put("file", data)
	f.CheckPlacements(o, 2)
	f.CheckJobs(o, data[:o.Chunks[0].Size])
	victim := f.holdersOf(o, 0)[0]
	victim.checkStorage()
	victim.kill()
	f.CheckGet("file", data)
	victim.start()
	victim.awaitOnline()

	// The server goes and comes back: everybody finds it again by himself.
	f.server.Kill()
	f.startNATS()
	for _, d := range f.devices {
		d.awaitOnline()
	}
	for _, d := range f.holdersOf(o, 0) {
		d.checkStorage()
	}
	f.checkRemoval("file")
}

// external gives a fleet a nats-server of its own, as an operator would: with
// the configuration that the coordinator prints.
func external(f *fleet) {
	f.T.Helper()
	if f.NATS == "" {
		f.NATS = "tls://" + testbed.FreeAddress(f.T)
	}
	r, err := testbed.RunToEnd(f.Ctx, proc.Command{Argv: f.ServeArgs("--print-nats-config")})
	if err != nil || r.Code != 0 {
		f.T.Fatalf("no configuration for nats-server: %v: %s", err, r.Stderr)
	}
	f.Write("nats.conf", r.Stdout)
	f.startNATS()
}

func (f *fleet) startNATS() {
	f.T.Helper()
	log := f.Path("logs", "nats.log")
	os.Remove(log)
	f.launchNATS(log)
	f.Until("nats-server getting ready", func() bool {
		if f.server.Ended() {
			f.T.Fatalf("nats-server ended: %s", f.server.LastWords())
		}
		raw, err := os.ReadFile(log)
		return err == nil && bytes.Contains(raw, []byte("Server is ready"))
	})
}

// launchNATS starts the server and does not wait for it.
func (f *fleet) launchNATS(log string) {
	f.T.Helper()
	host, port, _ := strings.Cut(cmp.Or(f.natsAt, strings.TrimPrefix(f.NATS, "tls://")), ":")
	f.server = f.Start(proc.Command{Name: "nats-server", Log: log, Argv: []string{natsServer(f.T), "-c", f.Path("nats.conf"), "-a", host, "-p", port}})
}

// natsServer builds the stock server, of the very version that is embedded.
var natsServer = func() func(*testing.T) string {
	var once sync.Once
	var failed string
	return func(t *testing.T) string {
		t.Helper()
		path := testbed.Scratch("nats-server")
		once.Do(func() {
			if out, err := exec.Command("go", "build", "-o", path, "github.com/nats-io/nats-server/v2").CombinedOutput(); err != nil {
				failed = string(out) + err.Error()
			}
		})
		if failed != "" {
			t.Fatalf("nats-server cannot be built: %s", failed)
		}
		return path
	}
}()

func (d *device) checkStorage() { d.f.T.Helper(); d.f.CheckStorage(d.name, d.id) }
func (d *device) checkCompute() { d.f.T.Helper(); d.f.CheckCompute(d.name, d.id, "sha256sum") }

// bundle builds a release of an agent under its own version, with deltas from these bundles.
func (f *fleet) bundle(agent string, from ...string) (version, dir string) {
	f.T.Helper()
	version = testbed.VersionOf(f.T, agent)
	dir = f.Path("release-" + version)
	args := []string{"release", "build", "--version", version, "--agent", testbed.Program(agent), "--out", dir}
	for _, b := range from {
		args = append(args, "--delta-from", b)
	}
	f.OK(nil, args...)
	return version, dir
}

// release publishes an agent under its own version, which it returns.
func (f *fleet) release(agent string) (version string) {
	f.T.Helper()
	version, dir := f.bundle(agent)
	f.Publish(dir)
	return version
}

// checkUpdates has d take a good release, of which it fetches only what differs, and come
// back from a bad one.
func (f *fleet) checkUpdates(d *device) {
	f.T.Helper()
	before := d.now()
	_, runs := f.bundle("deimos-agent")
	next, dir := f.bundle("tour/agent-next", runs)
	f.Publish(dir)
	m, _, err := bundle.Open(dir)
	if err != nil || len(m.Parts) != 1 || len(m.Parts[0].Forms) != 2 {
		f.T.Fatalf("of the next version, deltas should be packed: %+v, %v", m.Parts, err)
	}
	whole, delta := m.Parts[0].Forms[0], m.Parts[0].Forms[1]
	if delta.Size > whole.Size/10 {
		f.T.Errorf("versions of the same sources differ by %d of %d bytes", delta.Size, whole.Size)
	}
	var good []api.Order
	f.OK(&good, "release", "offer", next, "--device", string(d.id), "--wait", "60s")
	if len(good) != 1 || good[0].State != wire.Succeeded {
		f.T.Fatalf("the good release: %+v", good)
	}
	var res wire.UpdateResult
	if err := json.Unmarshal(good[0].Result.Body, &res); err != nil || !res.Confirmed || res.Running != next || res.From != before.Agent {
		f.T.Errorf("the update's report: %+v %v", res, err)
	}
	if res.Form != delta.Encoding || res.FetchedBytes != delta.Size {
		f.T.Errorf("it fetched %d bytes as %s, not the %d of the %s: %s", res.FetchedBytes, res.Form, delta.Size, delta.Encoding, res.NoDelta)
	}
	awaitVersion := func() {
		f.T.Helper()
		f.Until(d.name+" running "+next, func() bool { v := d.now(); return v.Online && v.Agent == next && v.Slot != before.Slot })
	}
	awaitVersion()
	// How the old agent asked the launcher for the new one.
	if raw, err := os.ReadFile(d.log()); err != nil || !bytes.Contains(raw, []byte("exited with code 75")) {
		f.T.Errorf("the agent did not end with code 75 to be started again (%v)", err)
	}

	broken := f.release("tour/agent-broken")
	var bad []api.Order
	f.Fails(&bad, 1, "release", "offer", broken, "--device", string(d.id), "--wait", "120s")
	if len(bad) != 1 || bad[0].State != wire.Failed || bad[0].Result.Code != wire.CodeRolledBack || bad[0].Result.Reason == "" {
		f.T.Fatalf("the bad release: %+v", bad)
	}
	awaitVersion()
}

// checkRemoval removes the fleet's only object and sees the space come back.
func (f *fleet) checkRemoval(name string) {
	f.T.Helper()
	used := func() (n int64) {
		for _, d := range f.devices {
			n += d.now().Used
		}
		return n
	}
	f.Until("the devices telling that they hold something", func() bool { return used() > 0 })
	f.OK(nil, "object", "rm", name)
	f.Until("the devices' space coming back", func() bool { return used() == 0 })
	f.Fails(nil, 1, "object", "get", "--plain", name, "--out", f.Path("nothing"))
}
