package test

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// TestTheOwnerIsAskedAndMayUseAStick: an offer waits for the owner and says so, to the
// fleet, too; what the owner brings on a stick is held to the same.
func TestTheOwnerIsAskedAndMayUseAStick(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.OK(nil, "release", "keys", "init", "--keys", f.Path("release-keys"))
	f.Publish("")
	config := f.Write("agent.toml", []byte("[updates]\nconsent = \"ask\"\n"))
	f.enrol(1, true, "--config", config)
	d := f.devices[0]
	next := f.release("tour/agent-next")
	var list []api.Order
	f.OK(&list, "release", "offer", next, "--device", string(d.id))
	if len(list) != 1 {
		t.Fatalf("%+v", list)
	}
	order := func() (o api.Order) { f.OK(&o, "order", "show", string(d.id), list[0].Order.ID); return o }
	f.Until("the order waiting for the owner", func() bool { return order().Result.Code == wire.CodeConsent })
	var u agent.Updates
	d.update(&u, 0, "status")
	if !u.Running || u.Update.Why == nil || u.Update.Why.Code != wire.CodeConsent || u.Update.Version != next {
		t.Errorf("the owner sees %+v", u)
	}
	d.restart() // it waits on
	f.Until("it waiting again", func() bool {
		d.update(&u, 0, "status")
		return u.Update.Why != nil && d.now().Online
	})
	if said := d.update(nil, 0, "approve"); !strings.Contains(said, next+" may be installed") {
		t.Errorf("%q", said)
	}
	f.Until("the update's end", func() bool { return order().State.Terminal() })
	var res wire.UpdateResult
	o := order()
	if err := json.Unmarshal(o.Result.Body, &res); o.State != wire.Succeeded || err != nil || res.Gate == nil || res.FetchedBytes == 0 || res.Form == "" || res.Local {
		t.Fatalf("%s %s, %s: %+v, %v", o.State, o.Result.Code, o.Result.Reason, res, err)
	}
	if !res.Gate.Before.Online || !res.Gate.After.Online || res.Gate.After.Volumes != 1 || len(res.Gate.Worse) > 0 {
		t.Errorf("the gate: %+v", res.Gate)
	}

	broken := f.release("tour/agent-broken")
	if said := d.update(nil, 1, "--version", broken, f.Path("repo")); !strings.Contains(said, "rolled back to version "+next) || !strings.Contains(said, wire.CodeRolledBack) {
		t.Errorf("of a broken release on a stick it says %q", said)
	}
	if said := d.update(nil, 1, "--version", next, f.Path("repo")); !strings.Contains(said, wire.CodeAlreadyLatest) {
		t.Errorf("of what runs it says %q", said)
	}
	d.update(&u, 0, "status")
	if u.Runs != next || u.Floor != next || u.Update.Ended == nil || u.Update.Ended.Code != wire.CodeAlreadyLatest {
		t.Errorf("it stands at %+v, %+v", u, u.Update.Ended)
	}
	f.Until("it online with what works", func() bool { v := d.now(); return v.Online && v.Agent == next })
}

// update is deimos-agent update, of this device's owner; it returns what it said.
func (d *device) update(v any, code int, args ...string) string {
	d.f.T.Helper()
	argv := append([]string{testbed.Program("deimos-agent"), "update"}, args...)
	argv = append(argv, "--state", d.state())
	if v != nil {
		argv = append(argv, "-o", "json")
	}
	r, err := testbed.RunToEnd(d.f.T.Context(), proc.Command{Argv: argv, Env: os.Environ()})
	if err != nil || r.Code != code {
		d.f.T.Fatalf("%q ended with code %d, want %d: %v\n%s%s", args, r.Code, code, err, r.Stdout, r.Stderr)
	}
	if v != nil {
		if err := json.Unmarshal([]byte(r.Stdout), v); err != nil {
			d.f.T.Fatalf("%q: %v\n%s", args, err, r.Stdout)
		}
	}
	return string(r.Stdout) + string(r.Stderr)
}

// restart stops device and launcher in good order and starts them again.
func (d *device) restart() {
	d.f.T.Helper()
	d.stop()
	d.start()
	d.awaitOnline()
}
