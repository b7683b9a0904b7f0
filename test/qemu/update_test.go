package qemu

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// The programs whose versions are those of the firmware that is offered, one that works
// and one whose agent does not come up.
const (
	nextAgent   = "tour/agent-next"
	brokenAgent = "tour/agent-broken"
)

// offer publishes a firmware and offers it to the device. It waits for the order's end.
func (d *device) offer(version string) api.Order {
	f := d.f
	f.T.Helper()
	dir := f.Path("release-" + version)
	f.OK(nil, "release", "build", "--version", version, "--firmware", testbed.Program(filepath.Join("qemu-test", "deimos_"+version+".efi")), "--out", dir)
	f.Publish(dir)
	var orders []api.Order
	code, said := f.Try(&orders, "release", "offer", version, "--device", string(d.id), "--wait", (2 * bootLimit).String())
	if len(orders) != 1 || (code == 0) != (orders[0].State == wire.Succeeded) {
		f.T.Fatalf("the offer of %s ended with code %d: %s; %+v", version, code, said, orders)
	}
	return orders[0]
}

// checkRuns waits until the device is online with a firmware, and sees that it is all of it.
func (d *device) checkRuns(version string) {
	d.f.T.Helper()
	d.f.Until("the device being online with "+version, func() bool { v := d.now(); return v.Online && v.Agent == version })
	said := d.machine.Said()
	if _, last, _ := strings.Cut(said[strings.LastIndex(said, "Deimos starts"):], "firmware="); !strings.HasPrefix(last, version+" ") {
		d.f.T.Errorf("the agent is %s, but init is that of another firmware", version)
	}
}

// checkUpdate has the device take a firmware that works.
func (d *device) checkUpdate(t *testing.T) {
	before, from, next := d.id, d.now().Agent, testbed.VersionOf(t, nextAgent)
	o := d.offer(next)
	if o.State != wire.Succeeded {
		t.Fatalf("the good firmware: %s %s %s", o.State, o.Result.Code, o.Result.Reason)
	}
	if r := decode[wire.UpdateResult](t, o.Result.Body); !r.Confirmed || r.Running != next || r.From != from {
		t.Errorf("the report of the update: %+v", r)
	}
	d.checkRuns(next)
	if d.now().ID != before {
		t.Error("the device is another one")
	}
	d.f.CheckStorage("the device", d.id)
}

// checkRollback has the device try a firmware whose agent does not come up.
func (d *device) checkRollback(t *testing.T) {
	before, broken := d.now().Agent, testbed.VersionOf(t, brokenAgent)
	o := d.offer(broken)
	if o.State != wire.Failed || o.Result.Code != wire.CodeRolledBack || o.Result.Reason == "" {
		t.Fatalf("the bad firmware: %s %s %s", o.State, o.Result.Code, o.Result.Reason)
	}
	if !strings.Contains(d.machine.Said(), "firmware="+broken+" ") {
		t.Error("the bad firmware was never started")
	}
	d.checkRuns(before)
	d.f.CheckStorage("the device", d.id)
}

// checkFirmwareKept looks at the ESP of a device that is off: the firmware that was
// confirmed is not counted any more.
func (d *device) checkFirmwareKept(t *testing.T) {
	t.Helper()
	list := tool(t, "mdir", "-b", "-i", d.disk()+espAt, "::EFI/Linux")
	if !strings.Contains(list, "/deimos_"+testbed.VersionOf(t, nextAgent)+".efi") {
		t.Errorf("the confirmed firmware is not on the ESP, or still counted:\n%s", list)
	}
}
