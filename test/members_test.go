package test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// effect is the kind of order that test/chaosagent adds, see there.
const effect = "test.effect"

// slowEffect takes longer than any test waits: what ends it is something else.
const slowEffect = `{"before":50000000000}`

// endlessEffect is for what must not have ended when it is looked at.
const endlessEffect = `{"before":3000000000000}`

// effectAgent has the fleet's devices run test/chaosagent.
func effectAgent(f *fleet) {
	f.T.Helper()
	path, err := buildEffectAgent()
	if err != nil {
		f.T.Fatal(err)
	}
	f.agent = path
}

var buildEffectAgent = sync.OnceValues(func() (string, error) {
	path := testbed.Scratch("effectagent")
	build := exec.Command("go", "build", "-o", path, "./chaosagent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", errors.New("test/chaosagent cannot be built: " + err.Error() + ": " + string(out))
	}
	return path, nil
})

// send gives a device an order by hand.
func (d *device) send(args ...string) api.Order {
	d.f.T.Helper()
	var list []api.Order
	d.f.OK(&list, append(append([]string{"order", "send"}, args...), "--device", string(d.id))...)
	if len(list) != 1 {
		d.f.T.Fatalf("deimos order send %v sent %d orders", args, len(list))
	}
	return list[0]
}

// awaitOrder waits until an order is in a state, and not in another one for good.
func (f *fleet) awaitOrder(o api.Order, want wire.State) (v api.Order) {
	f.T.Helper()
	f.Until("order "+o.Order.ID+" being "+string(want), func() bool {
		f.OK(&v, "order", "show", string(o.Order.Device), o.Order.ID)
		if v.State.Terminal() && v.State != want {
			f.T.Fatalf("the order is %s and not %s: %s (%s)", v.State, want, v.Result.Reason, v.Result.Code)
		}
		return v.State == want
	})
	return v
}

// checkPing has the device do something.
func (d *device) checkPing() api.Order {
	d.f.T.Helper()
	return d.f.awaitOrder(d.send("device.ping"), wire.Succeeded)
}

// show is what the command line tells of a device.
func (d *device) show() (v api.Device) {
	d.f.T.Helper()
	d.f.OK(&v, "device", "show", string(d.id))
	return v
}

// status is what the device tells of itself.
func (d *device) status() (s agent.Status) {
	d.f.T.Helper()
	r, err := testbed.RunToEnd(d.f.Ctx, proc.Command{Argv: []string{testbed.Program("deimos-agent"), "status", "--state", d.state(), "-o", "json"}})
	if err != nil || r.Code != 0 {
		d.f.T.Fatalf("deimos-agent status: %v: %s", err, r.Stderr)
	}
	if err := json.Unmarshal(r.Stdout, &s); err != nil {
		d.f.T.Fatalf("deimos-agent status printed no JSON: %v", err)
	}
	return s
}

// said counts what the device has logged.
func (d *device) said(text string) int {
	raw, err := os.ReadFile(d.log())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.f.T.Fatal(err)
	}
	return bytes.Count(raw, []byte(text))
}

// TestADeviceIsClaimedByItsCode is zero touch: a device that was given nothing
// but an address.
func TestADeviceIsClaimedByItsCode(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	d := f.add(device{noToken: true})
	d.start()
	f.Until("the device waiting", func() bool {
		_, err := os.Stat(d.state("claim"))
		return err == nil
	})
	s := d.status()
	if s.Standing != agent.Waiting || s.ClaimCode == "" || d.said(s.ClaimCode) == 0 {
		t.Fatalf("the device does not show its code: %+v", s)
	}
	if page := strings.TrimSpace(string(readFile(t, d.state("claim")))); page != s.ClaimCode {
		t.Errorf("the code is %s in one place and %s in another", s.ClaimCode, page)
	}
	var waiting []api.Pending
	f.OK(&waiting, "device", "pending")
	if len(waiting) != 1 || waiting[0].Code != s.ClaimCode || waiting[0].Device != s.Device {
		t.Fatalf("%s waits under %s, the coordinator says %+v", s.Device, s.ClaimCode, waiting)
	}
	f.Fails(nil, cli.ExitFailed, "order", "send", "device.ping", "--device", string(s.Device)) // it is nobody yet

	key, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if said := f.Fails(nil, cli.ExitFailed, "device", "claim", wire.ClaimCode(key, [16]byte{})); !strings.Contains(said, "deimos device pending") {
		t.Errorf("the answer to a wrong code is of no help: %s", said)
	}
	f.OK(nil, "device", "pending")
	f.OK(nil, "device", "claim", strings.ToLower(s.ClaimCode), "--group", "attic", "--label", "site=home")
	d.awaitOnline()
	v := d.show()
	if v.ID != s.Device || v.Group != "attic" || v.Labels["site"] != "home" || v.Token != "" {
		t.Errorf("it came in as %+v", v.DeviceRecord)
	}
	d.checkPing()
	if s := d.status(); s.Standing != agent.Member || s.ClaimCode != "" {
		t.Errorf("it still waits: %+v", s)
	}
	f.OK(&waiting, "device", "pending")
	if len(waiting) != 0 {
		t.Errorf("the coordinator still has it wait: %+v", waiting)
	}
	// The code was for one time.
	f.Fails(nil, cli.ExitFailed, "device", "claim", s.ClaimCode)
}

// TestARevokedTokenLetsNobodyIn, nor does one whose uses are over.
func TestARevokedTokenLetsNobodyIn(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	refused := func(token, because string) {
		t.Helper()
		state := filepath.Join(t.TempDir(), "state")
		f.checkEnd(proc.Command{Argv: []string{testbed.Program("deimos-agent"), "run", "--state", state, "--coordinator", "https://" + f.HTTPS, "--token", token}},
			cli.ExitNoPerm, because)
	}
	f.enrol(1, false)
	d := f.devices[0]
	refused(f.token, "token") // stolen, after its one use

	var tok api.Token
	f.OK(&tok, "token", "create", "--name", "for the attic", "--group", "attic", "--uses", "2")
	f.token = tok.Token
	second := f.add(device{})
	second.start()
	second.awaitOnline()
	f.OK(nil, "token", "revoke", tok.ID)
	refused(tok.Token, "revoked")

	var list []api.Token
	f.OK(&list, "token", "list")
	i := slices.IndexFunc(list, func(v api.Token) bool { return v.ID == tok.ID })
	if i < 0 || list[i].Revoked.IsZero() || list[i].Left != 1 || list[i].Name != "for the attic" {
		t.Errorf("%+v", list)
	}
	for _, v := range list {
		if v.Token != "" {
			t.Error("the list tells secrets")
		}
	}
	// Who came in by it stays, also when it asks again.
	second.kill()
	second.start()
	second.awaitOnline()
	second.checkPing()
	var all []api.Device
	f.OK(&all, "device", "list")
	if len(all) != 2 || d.id == second.id {
		t.Errorf("%d devices came in, want 2", len(all))
	}
}

// relay is the way from devices to a broker. It tells when the broker ends a
// connection.
type relay struct {
	addr string
	cut  chan time.Time
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	ln, err := net.Listen("tcp", testbed.FreeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	r := &relay{addr: ln.Addr().String(), cut: make(chan time.Time, 1000)}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go r.carry(c, to)
		}
	}()
	return r
}

func (r *relay) carry(device net.Conn, to string) {
	defer device.Close()
	broker, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer broker.Close()
	go func() {
		_, _ = io.Copy(broker, device)
		broker.Close()
	}()
	_, _ = io.Copy(device, broker)
	r.cut <- time.Now()
}

// cutOffWithin is how long a retired device may stay connected after the
// command has returned. The promise is a second; the rest is for a machine
// that is busy. Whom nobody cuts off stays for good.
const cutOffWithin = 30 * time.Second

// TestARetiredDeviceIsCutOffForEver while it works.
func TestARetiredDeviceIsCutOffForEver(t *testing.T) {
	t.Parallel()
	var way *relay
	f := newFleet(t, effectAgent, func(f *fleet) {
		way = newRelay(f.T, f.MQTT)
		f.Flags = append(f.Flags, "--public-mqtt", way.addr)
	})
	f.enrol(2, false)
	d, other := f.devices[0], f.devices[1]
	o := d.send(effect, slowEffect)
	f.awaitOrder(o, wire.Running)

	f.OK(nil, "device", "retire", string(d.id), "--yes")
	returned := time.Now()
	select {
	case at := <-way.cut: // of this device: the other's line is up
		if late := at.Sub(returned); late > cutOffWithin {
			t.Errorf("it was connected for another %s", late)
		} else {
			t.Logf("cut off %s after the command", late)
		}
	case <-time.After(testbed.Patience):
		t.Fatal("it is still connected")
	}
	if v := f.awaitOrder(o, wire.Canceled); v.Result.Code != wire.CodeRetired {
		t.Errorf("its order ended with %s: %s", v.Result.Code, v.Result.Reason)
	}
	away := func(times int) {
		t.Helper()
		f.Until("the agent knowing", func() bool { return d.said("has sent this device away") >= times })
		if v := d.show(); v.State != api.DeviceRetired || v.Online {
			t.Errorf("it is %s, online: %v", v.State, v.Online)
		}
	}
	away(1)
	f.Fails(nil, cli.ExitFailed, "order", "send", "device.ping", "--device", string(d.id))
	if d.proc.Ended() {
		t.Errorf("the agent has ended: %s", d.proc.LastWords())
	}
	other.checkPing()

	// So it stays: for a new run of the agent, with a new token, and for a new run
	// of the coordinator.
	f.Stopped(d.proc, 0)
	d.start()
	away(2)
	f.Serve.Kill()
	f.StartServe()
	other.awaitOnline()
	f.Stopped(d.proc, 0)
	d.start()
	away(3)
	other.checkPing()
	if calls := bytes.Count(readFile(t, d.state("effects.log")), []byte("\n")); calls > 0 {
		t.Errorf("its order had an effect %d times", calls)
	}
}

// TestAFlashedDeviceIsTheSameDevice that kept nothing but its key.
func TestAFlashedDeviceIsTheSameDevice(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(1, false)
	d := f.devices[0]
	f.OK(nil, "device", "set", "--device", string(d.id), "--set-label", "site=attic")
	before := d.show()
	d.stop()
	key := readFile(t, d.state("identity", "key.pem"))
	if err := errors.Join(os.RemoveAll(d.state()), os.MkdirAll(d.state("identity"), 0o700), os.WriteFile(d.state("identity", "key.pem"), key, 0o600)); err != nil {
		t.Fatal(err)
	}
	d.id, d.noToken = "", true
	d.start()
	d.awaitOnline()
	after := d.show()
	if after.ID != before.ID || after.Group != "test" || after.Labels["site"] != "attic" || !after.Enrolled.Equal(before.Enrolled) {
		t.Errorf("it was %+v and is %+v", before.DeviceRecord, after.DeviceRecord)
	}
	d.checkPing()
	var all []api.Device
	f.OK(&all, "device", "list")
	if len(all) != 1 || len(all[0].Warnings) > 0 {
		t.Errorf("%d devices, with warnings %v", len(all), all[0].Warnings)
	}
}

// TestOneKeyOnTwoMachinesIsNoticed, and neither gets anything to keep.
func TestOneKeyOnTwoMachinesIsNoticed(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	rng := testbed.Seeded(t)
	f.enrol(3, false)
	d := f.devices[0]
	f.Put("before", testbed.RandomBytes(rng, 10_000), "--replicas", "3")

	twin := f.add(device{noToken: true})
	if err := os.CopyFS(twin.state("identity"), os.DirFS(d.state("identity"))); err != nil {
		t.Fatal(err)
	}
	twin.start()
	f.Until("the warning", func() bool { return len(d.show().Warnings) > 0 })
	if w := d.show().Warnings; len(w) != 1 || w[0].Code != api.WarningDuplicateKey || w[0].Text == "" {
		t.Errorf("%+v", w)
	}
	// Alone it is online for good, so it is the warning that speaks against it.
	f.Stopped(twin.proc, 0)
	d.awaitOnline()
	d.checkPing()
	file := f.Write("after", testbed.RandomBytes(rng, 10_000))
	f.Fails(nil, cli.ExitFailed, "object", "put", "--plain", file, "--replicas", "3")
	o := f.Put("after", readFile(t, file), "--replicas", "2")
	if slices.Contains(f.holdersOf(o, 0), d) {
		t.Error("it was given a chunk")
	}
	for _, other := range f.devices[1:3] {
		if w := other.show().Warnings; len(w) > 0 {
			t.Errorf("%s has a warning: %+v", other.name, w)
		}
	}
}

// TestCertificatesAreRenewed at work, whatever the clock shows at boot: of a
// device whose clock is right, and of one whose clock begins at 1970 each time.
func TestCertificatesAreRenewed(t *testing.T) {
	t.Parallel()
	f := newFleet(t, effectAgent, serving("--certificate-life", "1m"))
	f.enrol(1, false)
	f.enrol(1, false, "-clock", "1970-01-01T00:00:00Z")
	ended := make(map[*device]time.Time)
	for _, d := range f.devices {
		if o := d.checkPing(); o.Result.TimeConfidence != wire.ClockTrusted || time.Since(o.Result.At).Abs() > time.Minute {
			t.Errorf("%s reports at %s, confidence %s", d.name, o.Result.At, o.Result.TimeConfidence)
		}
		ended[d] = *d.status().Until
	}
	for _, d := range f.devices {
		f.Until(d.name+" having another certificate", func() bool { return d.status().Until.After(ended[d]) })
		if d.said("agent runs") != 1 {
			t.Errorf("%s had to start again", d.name)
		}
		d.checkPing()
	}
	// The new one is what opens doors: the old one has ended.
	for _, d := range f.devices {
		f.Until("the end of the first certificate", func() bool { return time.Now().After(ended[d]) })
		d.kill()
		d.start()
		d.awaitOnline()
		d.checkPing()
		if v := d.show(); !v.CertUntil.After(ended[d]) {
			t.Errorf("the coordinator says that %s's certificate ends at %s", d.name, v.CertUntil)
		}
	}
}

// TestOperatorsHaveRoles that the command line meets, and the log tells who did what.
func TestOperatorsHaveRoles(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(1, false)
	d := f.devices[0]
	as := map[string]string{}
	for name, role := range map[string]api.Role{"vera": api.Viewer, "otto": api.Operating, "rita": api.ReleaseManager} {
		as[name] = f.Path(name + ".json")
		f.OK(nil, "operator", "create", name, "--role", string(role), "--out", as[name])
	}
	id := string(d.id)
	for _, c := range []struct {
		who  string
		args []string
		code int
	}{
		{"vera", []string{"device", "list"}, 0},
		{"vera", []string{"log"}, 0},
		{"vera", []string{"device", "set", "--device", id, "--set-group", "hers"}, cli.ExitNoPerm},
		{"vera", []string{"order", "send", "device.ping", "--device", id}, cli.ExitNoPerm},
		{"rita", []string{"device", "show", id}, 0},
		{"rita", []string{"device", "retire", id, "--yes"}, cli.ExitNoPerm},
		{"otto", []string{"device", "set", "--device", id, "--set-group", "his"}, 0},
		{"otto", []string{"operator", "create", "other", "--role", "admin"}, cli.ExitNoPerm},
	} {
		if code, said := f.Try(nil, append(c.args, "--context", as[c.who])...); code != c.code {
			t.Errorf("%s, deimos %s: exit code %d, want %d: %s", c.who, strings.Join(c.args, " "), code, c.code, said)
		}
	}
	if v := d.show(); v.Group != "his" || v.State != api.DeviceOnline {
		t.Errorf("the device is %s in group %q", v.State, v.Group)
	}
	f.OK(nil, "operator", "revoke", "otto")
	if said := f.Fails(nil, cli.ExitNoPerm, "device", "list", "--context", as["otto"]); !strings.Contains(said, "revoked") {
		t.Errorf("a revoked token: %s", said)
	}

	var entries []api.LogEntry
	f.OK(&entries, "log")
	for _, want := range []api.LogEntry{
		{Actor: "operator:otto", Action: "device.change", Outcome: api.LogDone},
		{Actor: "operator:" + api.Owner, Action: "operator.revoke", Outcome: api.LogDone},
		{Actor: "device:" + id, Action: "device.enrol", Outcome: api.LogNoted},
	} {
		if !slices.ContainsFunc(entries, func(e api.LogEntry) bool {
			return e.Actor == want.Actor && e.Action == want.Action && e.Outcome == want.Outcome
		}) {
			t.Errorf("the log does not say that %s did %s (%s)", want.Actor, want.Action, want.Outcome)
		}
	}
	for _, e := range entries {
		if (e.Actor == "operator:vera" || e.Actor == "operator:rita") && e.Outcome == api.LogDone {
			t.Errorf("%s has done %s", e.Actor, e.Action)
		}
	}
	f.OK(nil, "log", "--verify")
}

// TestOrdersAreListedAndCanceled: one at work, and one that waits for its device.
func TestOrdersAreListedAndCanceled(t *testing.T) {
	t.Parallel()
	f := newFleet(t, effectAgent)
	f.enrol(2, false)
	works, away := f.devices[0], f.devices[1]
	f.OK(nil, "device", "set", "--device", string(works.id), "--set-group", "busy", "--set-label", "site=here")
	running := works.send(effect, endlessEffect)
	f.awaitOrder(running, wire.Running)
	away.stop()
	queued := away.send(effect)
	works.checkPing() // which has ended when the lists are made

	for _, c := range []struct {
		flags []string
		want  []string
	}{
		{nil, []string{running.Order.ID, queued.Order.ID}},
		{[]string{"--group", "busy"}, []string{running.Order.ID}},
		{[]string{"--group", "test"}, []string{queued.Order.ID}},
		{[]string{"--label", "site=here"}, []string{running.Order.ID}},
		{[]string{"--device", string(away.id)}, []string{queued.Order.ID}},
		{[]string{"--state", "RUNNING"}, []string{running.Order.ID}},
	} {
		var list api.OrderList
		f.OK(&list, append([]string{"order", "list", "--pending"}, c.flags...)...)
		var got []string
		for _, o := range list.Orders {
			got = append(got, o.ID)
		}
		slices.Sort(got)
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) {
			t.Errorf("order list --pending %v shows %v, want %v", c.flags, got, c.want)
		}
	}
	var all api.OrderList
	f.OK(&all, "order", "list", "--group", "busy", "--kind", string(wire.KindPing))
	if len(all.Orders) != 1 || all.Orders[0].State != wire.Succeeded {
		t.Errorf("without --pending: %+v", all)
	}

	f.OK(nil, "order", "cancel", string(works.id), running.Order.ID, "--reason", "changed my mind")
	v := f.awaitOrder(running, wire.Canceled)
	if v.Cancel == nil || v.Cancel.Reason != "changed my mind" || v.Cancel.By != api.Owner {
		t.Errorf("who canceled it: %+v", v.Cancel)
	}
	f.OK(nil, "order", "cancel", queued.Order.ID)
	away.start()
	away.awaitOnline()
	f.awaitOrder(queued, wire.Canceled)
	away.checkPing()
	for _, d := range f.devices {
		if n := bytes.Count(readFile(t, d.state("effects.log")), []byte("\n")); n > 0 {
			t.Errorf("%s: a canceled order had an effect", d.name)
		}
	}
	f.Fails(nil, cli.ExitFailed, "order", "cancel", string(works.id), running.Order.ID) // it is over
}
