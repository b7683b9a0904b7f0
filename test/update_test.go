package test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// TestAnOwnerDecidesWhenAVersionComes: it waits for a yes, is put off, and comes when
// the owner says so, by the order that was open all the time.
func TestAnOwnerDecidesWhenAVersionComes(t *testing.T) {
	t.Parallel()
	f := newUpdates(t)
	f.enrol(1, true, "--config", f.Write("owner.toml", []byte("[updates]\nconsent = \"ask\"\n")))
	d := f.devices[0]
	before := d.now().Agent
	next := f.release("tour/agent-next")
	var offered []api.Order
	f.OK(&offered, "release", "offer", next, "--device", string(d.id))
	if len(offered) != 1 {
		t.Fatalf("it was offered so: %+v", offered)
	}

	d.awaitWaiting(next, wire.CodeConsent)
	d.says("version "+next+" waits for the owner", "update")
	d.says("no update is installed before", "update", "defer", "--for", "48h")
	d.awaitWaiting(next, wire.CodeDeferred)
	if now := d.now(); now.Agent != before {
		t.Fatalf("version %s runs, and the owner has put it off", now.Agent)
	}
	d.says("version "+next+" may be installed", "update", "approve")

	var o api.Order
	f.Until("the order's end", func() bool {
		f.OK(&o, "order", "show", string(d.id), offered[0].Order.ID)
		return o.State.Terminal()
	})
	var res wire.UpdateResult
	if err := json.Unmarshal(o.Result.Body, &res); err != nil || o.State != wire.Succeeded || res.Running != next || !res.Confirmed {
		t.Fatalf("the order ended %s %s: %+v %v", o.State, o.Result.Reason, res, err)
	}
	f.Until("the owner being told", func() bool {
		e := d.updates().Update.Ended
		return e != nil && e.Version == next && e.State == wire.Succeeded
	})
}

// TestAnUpdateFromAStick takes the same path and the same checks, from a folder and
// from one file, and what is wrong with a stick is said by name, and leaves what runs.
func TestAnUpdateFromAStick(t *testing.T) {
	t.Parallel()
	f := newUpdates(t)
	f.enrol(1, true)
	d := f.devices[0]
	first := d.now().Agent
	next := f.release("tour/agent-next")
	repository := f.Path("repo")
	file := f.Path("update.tar")
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(f.Ctx, name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %s: %v", name, out, err)
		}
	}
	run("tar", "-C", repository, "-cf", file, ".")
	old := f.Path("old.tar")
	run("cp", file, old)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}

	spoilt := f.Path("spoilt")
	run("cp", "-r", repository, spoilt)
	for _, part := range partsBelow(t, spoilt) {
		raw, err := os.ReadFile(part)
		if err != nil {
			t.Fatal(err)
		}
		raw[len(raw)/2] ^= 1
		if err := os.WriteFile(part, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	other := f.Path("for-another-board")
	f.OK(nil, "release", "build", "--version", "0.7.0", "--agent", testbed.Program("tour/agent-next"), "--board", "no-such-board", "--out", other)
	f.Publish(other)
	empty := f.Path("empty")
	if err := os.Mkdir(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, place, version, says string }{
		{"nothing there", f.Path("nowhere"), "", "nowhere"},
		{"a folder without an update", empty, "", "holds no update"},
		{"a file cut short", f.Write("short.tar", whole[:len(whole)/2]), "", "is cut short"},
		{"a part with a changed bit", spoilt, "", "(verification)"},
		{"a release for another board", repository, "0.7.0", "no-such-board"},
		{"a stick that is older than what the device has seen", old, "", "old stick"},
		{"a version that is none", repository, "newest", "newest"},
		{"a version that is not there", repository, "7.7.7", "7.7.7"},
	} {
		args := []string{"update", c.place}
		if c.version != "" {
			args = append(args, "--version", c.version)
		}
		r := d.onDevice(args...)
		if r.Code == 0 || !strings.Contains(r.Said(), c.says) {
			t.Errorf("%s: code %d, %s", c.what, r.Code, r.Said())
		}
		testbed.CheckSentence(t, r)
		if v := d.updates(); v.Runs != first {
			t.Fatalf("%s: version %s runs now", c.what, v.Runs)
		}
	}

	run("tar", "-C", repository, "-cf", file, ".")
	d.says("version "+next+" is installed", "update", file, "--version", next)
	f.Until("the coordinator seeing it", func() bool { v := d.now(); return v.Online && v.Agent == next })
	broken := f.release("tour/agent-broken")
	if r := d.onDevice("update", repository, "--version", broken); r.Code != 1 || !strings.Contains(r.Said(), "("+wire.CodeRolledBack+")") {
		t.Errorf("a version that does not work: code %d, %s", r.Code, r.Said())
	}
	f.Until("the version before being back", func() bool { v := d.now(); return v.Online && v.Agent == next })
	if e := d.updates().Update.Ended; e == nil || !ota.IsLocal(e.Order) || e.Version != broken {
		t.Errorf("the owner reads of the last update: %+v", e)
	}
}

// newUpdates is a fleet whose devices have the root of release keys when they join.
func newUpdates(t *testing.T) *fleet {
	t.Helper()
	f := newFleet(t)
	f.OK(nil, "release", "keys", "init", "--keys", f.Path("release-keys"))
	f.Publish("")
	return f
}

// updates is how they stand, as the owner would be told.
func (d *device) updates() agent.Updates {
	d.f.T.Helper()
	u, err := agent.ReadUpdates(d.state())
	if err != nil {
		d.f.T.Fatal(err)
	}
	return u
}

func (d *device) awaitWaiting(version, code string) {
	d.f.T.Helper()
	d.f.Until("version "+version+" waiting ("+code+")", func() bool {
		u := d.updates().Update
		return u.Phase == slot.Waiting && u.Version == version && u.Why != nil && u.Why.Code == code
	})
}

// says runs a command on the device that must end well and say something.
func (d *device) says(what string, args ...string) {
	d.f.T.Helper()
	r := d.onDevice(args...)
	if flat := strings.Join(strings.Fields(string(r.Stdout)), " "); r.Code != 0 || !strings.Contains(flat, what) {
		d.f.T.Fatalf("deimos-agent %s: code %d, %s\n%s", strings.Join(args, " "), r.Code, r.Stdout, r.Said())
	}
}

// partsBelow are the packed parts of a repository.
func partsBelow(t *testing.T, repository string) (parts []string) {
	t.Helper()
	parts, err := filepath.Glob(filepath.Join(repository, "*", "parts", "*"))
	if more, err2 := filepath.Glob(filepath.Join(repository, "parts", "*")); err == nil && err2 == nil {
		parts = append(parts, more...)
	}
	if err != nil || len(parts) == 0 {
		t.Fatalf("no parts below %s: %v", repository, err)
	}
	return parts
}
