package test

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/packaging/tour"
	"github.com/deimos-edge/deimos/wire"
)

// TestWholeLine is what a fleet is for, under launchers as on real devices.
func TestWholeLine(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := seeded(t)
	keys := f.path("release-keys")
	f.ok(nil, "release", "keys", "init", "--keys", keys)
	f.publish("")
	f.enrol(3, true)

	data := slices.Concat(randomText(rng, 1<<20), randomBytes(rng, 4<<20))
	o := f.put("file", data)
	f.checkPlacements(o, 2)
	f.checkGet("file", data)
	f.checkJobs(o, data[:o.Chunks[0].Size])
	for _, d := range f.devices {
		d.checkStorage()
		d.checkCompute()
	}

	victim := f.holdersOf(o, 0)[0]
	victim.kill()
	f.checkGet("file", data)
	victim.start()
	victim.awaitOnline()
	victim.checkStorage()

	f.checkUpdates(f.devices[rng.IntN(3)])
	f.checkGet("file", data)
	f.checkRemoval("file")
}

// TestExternalNATS is the same line, shorter, with a stock nats-server between.
func TestExternalNATS(t *testing.T) {
	t.Parallel()
	f := newFleet(t, external)
	rng := seeded(t)
	f.enrol(3, false)
	data := slices.Concat(randomText(rng, 1<<20), randomBytes(rng, 2<<20+4711))
	o := f.put("file", data)
	f.checkPlacements(o, 2)
	f.checkJobs(o, data[:o.Chunks[0].Size])
	victim := f.holdersOf(o, 0)[0]
	victim.checkStorage()
	victim.kill()
	f.checkGet("file", data)
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
	f.t.Helper()
	if f.nats == "" {
		f.nats = "tls://" + freeAddress(f.t)
	}
	r, err := runToEnd(f.ctx, proc.Command{Argv: f.serveArgs("--print-nats-config")})
	if err != nil || r.Code != 0 {
		f.t.Fatalf("no configuration for nats-server: %v: %s", err, r.Stderr)
	}
	f.write("nats.conf", r.Stdout)
	f.startNATS()
}

func (f *fleet) startNATS() {
	f.t.Helper()
	log := f.path("logs", "nats.log")
	os.Remove(log)
	f.launchNATS(log)
	f.until("nats-server getting ready", func() bool {
		if f.server.Ended() {
			f.t.Fatalf("nats-server ended: %s", f.server.LastWords())
		}
		raw, err := os.ReadFile(log)
		return err == nil && bytes.Contains(raw, []byte("Server is ready"))
	})
}

// launchNATS starts the server and does not wait for it.
func (f *fleet) launchNATS(log string) {
	f.t.Helper()
	host, port, _ := strings.Cut(cmp.Or(f.natsAt, strings.TrimPrefix(f.nats, "tls://")), ":")
	f.server = f.start(proc.Command{Name: "nats-server", Log: log, Argv: []string{natsServer(f.t), "-c", f.path("nats.conf"), "-a", host, "-p", port}})
}

// natsServer builds the stock server, of the very version that is embedded.
var natsServer = func() func(*testing.T) string {
	var once sync.Once
	var failed string
	return func(t *testing.T) string {
		t.Helper()
		path := filepath.Join(scratch, "nats-server")
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

// checkPlacements verifies every receipt with its device's own key.
func (f *fleet) checkPlacements(o putResult, replicas int) {
	f.t.Helper()
	for _, p := range o.Placements {
		var seen []wire.DeviceID
		for _, h := range p.Holders {
			d, err := f.client.Device(f.ctx, string(h.Device))
			if err == nil {
				err = tour.CheckReceipt(p.Chunk, h, d)
			}
			if err != nil {
				f.t.Error(err)
			}
			if wire.IDOf(d.PublicKey) != h.Device {
				f.t.Errorf("device %s is listed under another's key", h.Device)
			}
			seen = append(seen, h.Device)
		}
		slices.Sort(seen)
		if len(slices.Compact(seen)) != replicas {
			f.t.Errorf("chunk %s is on %d devices, want %d", p.ID, len(seen), replicas)
		}
	}
}

// checkJobs compares both guests, run on devices, with the programs of this machine.
func (f *fleet) checkJobs(o putResult, chunk []byte) {
	f.t.Helper()
	file := f.write("chunk", chunk)
	count := exec.Command("wc", "-lwc", file)
	count.Env = append(os.Environ(), "LC_ALL=C")
	wc, err := count.Output()
	if err != nil {
		f.t.Fatal(err)
	}
	sum, err := exec.Command("sha256sum", file).Output()
	if err != nil {
		f.t.Fatal(err)
	}
	var words struct{ Lines, Words, Bytes json.Number }
	if err := json.Unmarshal(f.runJob(o.Name, "wordcount"), &words); err != nil {
		f.t.Fatal(err)
	}
	if got, want := []string{words.Lines.String(), words.Words.String(), words.Bytes.String()}, strings.Fields(string(wc))[:3]; !slices.Equal(got, want) {
		f.t.Errorf("a device counted %v, wc %v", got, want)
	}
	if got, want := strings.TrimSpace(string(f.runJob(o.Name, "sha256sum"))), strings.Fields(string(sum))[0]; got != want {
		f.t.Errorf("a device hashed to %s, sha256sum to %s", got, want)
	}
}

// runJob runs a guest over the first chunk and checks who signed for the output.
func (f *fleet) runJob(object, name string) []byte {
	f.t.Helper()
	var j api.Job
	f.ok(&j, "job", "run", guest(name), "--input", object)
	d, err := f.client.Device(f.ctx, string(j.Device))
	if err != nil {
		f.t.Fatal(err)
	}
	r, err := wire.OpenAs[wire.Report](j.Report, ed25519.PublicKey(d.PublicKey), wire.TypeReport)
	if err != nil {
		f.t.Fatal(err)
	}
	sum := sha256.Sum256(j.Output)
	if r.Attachment == nil || r.Attachment.SHA256 != hex.EncodeToString(sum[:]) || r.Order != j.Order {
		f.t.Errorf("device %s signed for another output", j.Device)
	}
	return j.Output
}

func (d *device) checkStorage() {
	d.f.t.Helper()
	var a api.Audit
	d.f.ok(&a, "audit", "storage", string(d.id))
	if a.Outcome != api.AuditRight || a.Leaves == 0 || a.Right != a.Leaves {
		d.f.t.Errorf("%s proved %d of %d leaves: %s %s", d.name, a.Right, a.Leaves, a.Outcome, a.Reason)
	}
}

func (d *device) checkCompute() {
	d.f.t.Helper()
	var a api.Audit
	d.f.ok(&a, "audit", "compute", string(d.id), "--module", guest("sha256sum"))
	salt, err1 := hex.DecodeString(a.Salt)
	expected, err2 := hex.DecodeString(a.Expected)
	sum := sha256.Sum256(slices.Concat(salt, expected))
	if err1 != nil || err2 != nil || hex.EncodeToString(sum[:]) != a.Commitment || a.Got != a.Expected || len(expected) != sha256.Size {
		d.f.t.Errorf("the challenge of %s does not open its commitment: %+v", d.name, a)
	}
}

// publish signs with the fleet's release keys and uploads.
func (f *fleet) publish(bundle string) {
	f.t.Helper()
	args := []string{"release", "publish", "--keys", f.path("release-keys"), "--repo", f.path("repo")}
	if bundle != "" {
		args = append(args, "--bundle", bundle)
	}
	f.ok(nil, args...)
}

func (f *fleet) release(version, agent string) {
	f.t.Helper()
	dir := f.path("release-" + version)
	f.ok(nil, "release", "build", "--version", version, "--agent", program("tour/"+agent), "--out", dir)
	f.publish(dir)
}

// checkUpdates has d take a good release, and come back from a bad one.
func (f *fleet) checkUpdates(d *device) {
	f.t.Helper()
	before := d.now()
	f.release("0.2.0", "agent-next")
	var good []api.Order
	f.ok(&good, "release", "offer", "0.2.0", "--device", string(d.id), "--wait", "60s")
	if len(good) != 1 || good[0].State != wire.Succeeded {
		f.t.Fatalf("the good release: %+v", good)
	}
	var res wire.UpdateResult
	if err := json.Unmarshal(good[0].Result.Body, &res); err != nil || !res.Confirmed || res.Running != "0.2.0" || res.From != before.Agent {
		f.t.Errorf("the update's report: %+v %v", res, err)
	}
	awaitVersion := func() {
		f.t.Helper()
		f.until(d.name+" running 0.2.0", func() bool { v := d.now(); return v.Online && v.Agent == "0.2.0" && v.Slot != before.Slot })
	}
	awaitVersion()
	// How the old agent asked the launcher for the new one.
	if raw, err := os.ReadFile(d.log()); err != nil || !bytes.Contains(raw, []byte("exited with code 75")) {
		f.t.Errorf("the agent did not end with code 75 to be started again (%v)", err)
	}

	f.release("0.3.0", "agent-broken")
	var bad []api.Order
	f.fails(&bad, 1, "release", "offer", "0.3.0", "--device", string(d.id), "--wait", "120s")
	if len(bad) != 1 || bad[0].State != wire.Failed || bad[0].Result.Code != wire.CodeRolledBack || bad[0].Result.Reason == "" {
		f.t.Fatalf("the bad release: %+v", bad)
	}
	awaitVersion()
}

// checkRemoval removes the fleet's only object and sees the space come back.
func (f *fleet) checkRemoval(name string) {
	f.t.Helper()
	used := func() (n int64) {
		for _, d := range f.devices {
			n += d.now().Used
		}
		return n
	}
	f.until("the devices telling that they hold something", func() bool { return used() > 0 })
	f.ok(nil, "object", "rm", name)
	f.until("the devices' space coming back", func() bool { return used() == 0 })
	f.fails(nil, 1, "object", "get", name, "--out", f.path("nothing"))
}
