package coordinator

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// tuned is a device that takes configuration as an agent does.
type tuned struct {
	*device
	mu      sync.Mutex
	version uint64
	values  map[string]json.RawMessage
	taken   []uint64 // versions, in the order in which they came
	refuse  map[string]wire.Refusal
}

func tune(d *device) *tuned {
	v := &tuned{device: d}
	d.on(wire.KindConfigApply, v.apply)
	return v
}

func (d *tuned) apply(o wire.Order) *reply {
	want, _ := wire.DecodeBody[wire.ConfigApply](o)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.taken = append(d.taken, want.Version)
	if want.Version < d.version {
		return &reply{state: wire.Rejected, code: wire.CodeSuperseded}
	}
	d.version, d.values = want.Version, want.Values
	r := wire.ConfigReport{Version: want.Version, Running: map[string]json.RawMessage{wire.SettingBeat: json.RawMessage("60")}, Refused: d.refuse}
	for k, v := range want.Values {
		if _, no := d.refuse[k]; !no {
			r.Running[k] = v
		}
	}
	return &reply{state: wire.Succeeded, body: r}
}

func (d *tuned) runs() (uint64, map[string]json.RawMessage) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.version, d.values
}

// greet says hello with the version that the device runs.
func (d *tuned) greet(version uint64) {
	d.t.Helper()
	d.say(wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: newNonce(),
		Agent: "1.0.0", OS: "linux", Arch: "arm64", Board: "test", Capacity: d.capacity, ConfigVersion: version, At: time.Now()})
	next(d.t, d.welcomes, "the welcome")
}

// changeOf is a change for a scope that nothing is in yet.
func changeOf(scope api.ConfigScope) api.ConfigChange {
	return api.ConfigChange{ConfigScope: scope, All: scope == api.ConfigScope{}}
}

// set gives KEY=JSON to a scope.
func (w *world) set(t testing.TB, scope api.ConfigScope, pairs ...string) {
	t.Helper()
	q := changeOf(scope)
	q.Set = map[string]json.RawMessage{}
	for _, p := range pairs {
		k, v, _ := strings.Cut(p, "=")
		q.Set[k] = json.RawMessage(v)
	}
	_, err := w.op.ChangeConfig(testContext(t), q)
	must(t, err)
}

func (w *world) unset(t testing.TB, scope api.ConfigScope, keys ...string) {
	t.Helper()
	q := changeOf(scope)
	q.Unset = keys
	_, err := w.op.ChangeConfig(testContext(t), q)
	must(t, err)
}

func (w *world) configOf(t testing.TB, d wire.DeviceID) api.DeviceConfig {
	t.Helper()
	list, err := w.op.DeviceConfigs(testContext(t), api.Selector{Devices: []wire.DeviceID{d}})
	must(t, err)
	return list[0]
}

// settled waits until the device runs all that is wanted of it and the
// coordinator knows.
func (w *world) settled(t testing.TB, d *tuned, pairs ...string) api.DeviceConfig {
	t.Helper()
	want := map[string]string{}
	for _, p := range pairs {
		k, v, _ := strings.Cut(p, "=")
		want[k] = v
	}
	var got api.DeviceConfig
	eventually(t, fmt.Sprintf("the device runs %v", want), func() bool {
		version, values := d.runs()
		got = w.configOf(t, d.id)
		if len(values) != len(want) || got.Wanted != version || got.Reported == nil || got.Reported.Version != version || got.State == api.ConfigWaiting {
			return false
		}
		for k, v := range want {
			if string(values[k]) != v {
				return false
			}
		}
		return true
	})
	return got
}

func (w *world) join(t testing.TB, d wire.DeviceID, group string) {
	t.Helper()
	_, err := w.reg.rows.change(testContext(t), string(d), func(v *api.DeviceRecord, _ bool) error { v.Group = group; return nil })
	must(t, err)
}

// open lists the device's open config.apply orders.
func (w *world) openConfigs(d wire.DeviceID) []OrderRecord {
	return slices.DeleteFunc(w.outbox.unfinished(wire.KindConfigApply), func(r OrderRecord) bool { return r.Order.Device != d })
}

func TestDeviceGoesBeforeGroupAndGroupBeforeFleet(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := tune(w.device(t))
	other := tune(w.device(t))
	w.join(t, d.id, "roof/süd 1")
	w.set(t, api.ConfigScope{}, "beat.seconds=60", "log.level=\"warn\"", "jobs.slots=4")
	w.set(t, api.ConfigScope{Group: "roof/süd 1"}, "beat.seconds=30", "jobs.slots=3")
	w.set(t, api.ConfigScope{Device: d.id}, "beat.seconds=10")
	c := w.settled(t, d, "beat.seconds=10", "jobs.slots=3", "log.level=\"warn\"")
	for key, from := range map[string]string{"beat.seconds": "device", "jobs.slots": "group", "log.level": "fleet"} {
		if c.Values[key].From != from {
			t.Errorf("%s is from %q, want %q", key, c.Values[key].From, from)
		}
	}
	if c.State != api.ConfigApplied {
		t.Errorf("state %q", c.State)
	}
	w.settled(t, other, "beat.seconds=60", "jobs.slots=4", "log.level=\"warn\"")
}

func TestTheVersionGrowsWithEachChangeThatTouchesTheDevice(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := tune(w.device(t))
	last := uint64(0)
	grown := func(what string, pairs ...string) {
		t.Helper()
		if v := w.settled(t, d, pairs...).Wanted; v <= last {
			t.Errorf("%s: version %d after %d", what, v, last)
		} else {
			last = v
		}
	}
	w.set(t, api.ConfigScope{}, "beat.seconds=60")
	grown("set", "beat.seconds=60")
	w.set(t, api.ConfigScope{Group: "a"}, "beat.seconds=30")
	w.set(t, api.ConfigScope{Group: "b"}, "beat.seconds=20")
	w.join(t, d.id, "b")
	grown("into a group", "beat.seconds=20")
	w.join(t, d.id, "a") // the older document
	grown("into another", "beat.seconds=30")
	w.unset(t, api.ConfigScope{Group: "a"}, "beat.seconds")
	grown("unset in the group", "beat.seconds=60")
	w.unset(t, api.ConfigScope{}, "beat.seconds")
	grown("unset everywhere")
	// What does not touch it gives it no order.
	w.set(t, api.ConfigScope{Group: "b"}, "beat.seconds=25")
	w.set(t, api.ConfigScope{Device: d.id}, "jobs.slots=2")
	if v := w.settled(t, d, "jobs.slots=2").Wanted; v != last+1 {
		t.Errorf("version %d after %d and one change", v, last)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.IsSorted(d.taken) || len(slices.Compact(slices.Clone(d.taken))) != len(d.taken) {
		t.Errorf("the device was given the versions %v", d.taken)
	}
}

func TestARefusalIsSeenWithItsReason(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := tune(w.device(t))
	d.refuse = map[string]wire.Refusal{"jobs.slots": {Code: wire.CodePolicy, Reason: "the owner allows 2\x1b[2J"}}
	w.set(t, api.ConfigScope{}, "jobs.slots=4", "beat.seconds=60")
	c := w.settled(t, d, "jobs.slots=4", "beat.seconds=60")
	if got := c.Reported.Refused["jobs.slots"]; c.State != api.ConfigPartly || got.Code != wire.CodePolicy || got.Reason != "the owner allows 2[2J" {
		t.Errorf("state %s, %+v", c.State, c.Reported)
	}
	if _, runs := c.Reported.Running["jobs.slots"]; runs {
		t.Error("what is refused is reported as running")
	}
}

func TestADeviceThatIsAwayGetsOneOrderWithTheNewest(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := tune(w.enrolled(t))
	for i := range 5 {
		w.set(t, api.ConfigScope{}, fmt.Sprintf("beat.seconds=%d", 10+i))
		version := uint64(i + 1)
		eventually(t, "one order is open", func() bool {
			open := w.openConfigs(d.id)
			if len(open) != 1 {
				return false
			}
			b, _ := wire.DecodeBody[wire.ConfigApply](open[0].Order)
			return b.Version == version
		})
	}
	d.connect(w)
	t.Cleanup(d.leave)
	w.settled(t, d, "beat.seconds=14")
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.Equal(d.taken, []uint64{5}) {
		t.Errorf("the device was given the versions %v", d.taken)
	}
}

func TestTwoOperatorsAtOnceLoseNothing(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	const n = 24
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() {
			_, errs[i] = w.op.ChangeConfig(testContext(t), api.ConfigChange{All: true, Set: map[string]json.RawMessage{fmt.Sprintf("new.key%d", i): json.RawMessage("1")}, Force: true})
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	doc, err := w.op.Config(testContext(t), api.ConfigScope{})
	must(t, err)
	if len(doc.Values) != n {
		t.Errorf("%d of %d changes are there", len(doc.Values), n)
	}
}

func TestWhatIsWantedOutlivesTheCoordinator(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	d := tune(w.enrolled(t))
	w.set(t, api.ConfigScope{}, "beat.seconds=30")
	eventually(t, "the order is there", func() bool { return len(w.openConfigs(d.id)) == 1 })
	w.Close()
	w = open(t, dir)
	t.Cleanup(w.Close)
	d.connect(w)
	t.Cleanup(d.leave)
	w.settled(t, d, "beat.seconds=30")
	if len(d.taken) != 1 {
		t.Errorf("the device was given the versions %v", d.taken)
	}
}

// The coordinator dies after the version is on record and before its order is.
func TestAnOrderThatWasNotMadeIsMade(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	id := ulid.Make().String()
	_, err := w.config.rows.change(testContext(t), string(d.id), func(v *configRow, _ bool) error {
		v.Version, v.Order = 3, id
		return nil
	})
	must(t, err)
	for range 3 {
		must(t, w.config.settle(testContext(t), d.id, greeting{}))
		if open := w.openConfigs(d.id); len(open) != 1 || open[0].Order.ID != id {
			t.Fatalf("open orders: %+v", open)
		}
	}
}

func TestTheCountGoesOnFromTheDevices(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := tune(w.device(t))
	d.greet(41) // this coordinator never gave it any
	if v := w.settled(t, d).Wanted; v != 42 {
		t.Errorf("version %d", v)
	}
	d.greet(1 << 60) // nonsense
	w.set(t, api.ConfigScope{}, "beat.seconds=30")
	if v := w.settled(t, d, "beat.seconds=30").Wanted; v != 43 {
		t.Errorf("version %d", v)
	}
}

func TestAFailedConfigurationIsGivenAgainAtTheNextHello(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := tune(w.device(t))
	d.on(wire.KindConfigApply, func(wire.Order) *reply { return failed("disk_full") })
	w.set(t, api.ConfigScope{}, "beat.seconds=30")
	eventually(t, "the failure is seen", func() bool {
		c := w.configOf(t, d.id)
		return c.State == api.ConfigFailed && strings.Contains(c.Reason, "disk_full")
	})
	must(t, w.config.settle(testContext(t), d.id, greeting{}))
	if n := len(w.openConfigs(d.id)); n != 0 {
		t.Errorf("%d orders without a hello", n)
	}
	d.on(wire.KindConfigApply, d.apply)
	w.advance(configAgain)
	d.greet(0)
	if c := w.settled(t, d, "beat.seconds=30"); c.Wanted != 1 || c.State != api.ConfigApplied {
		t.Errorf("%+v", c)
	}
}

// TestAHelloThatIsRepeatedMakesOneOrder: neither a replay nor a device that
// always says it has nothing is given the same values without end; who was too
// early gets them when it is time.
func TestAHelloThatIsRepeatedMakesOneOrder(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.freeze()
	d := w.device(t)
	d.on(wire.KindConfigApply, func(wire.Order) *reply { return failed("disk_full") })
	w.set(t, api.ConfigScope{}, "beat.seconds=30")
	orders := func() int {
		l, err := w.outbox.listOf(testContext(t), d.id, api.OrderQuery{Limit: 1000, Kind: wire.KindConfigApply})
		must(t, err)
		return len(l.Orders)
	}
	ended := func() {
		t.Helper()
		eventually(t, "the failure is seen", func() bool { return w.configOf(t, d.id).State == api.ConfigFailed })
	}
	at := time.Now()
	hello := func(at time.Time) {
		t.Helper()
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: newNonce(), Capacity: d.capacity, At: at})
		eventually(t, "it is settled", func() bool {
			w.config.mu.Lock()
			defer w.config.mu.Unlock()
			return len(w.config.dirty) == 0
		})
		ended()
	}
	ended()
	for i := range 10 { // newer each time
		hello(at.Add(time.Duration(i) * time.Second))
	}
	if n := orders(); n != 1 {
		t.Fatalf("%d orders within a minute", n)
	}
	w.advance(2 * configAgain)
	for range 10 { // the same again
		hello(at)
	}
	if n := orders(); n != 1 {
		t.Fatalf("%d orders though nothing was said anew", n)
	}
	w.config.mu.Lock()
	g, early := w.config.early[d.id]
	w.config.mu.Unlock()
	if !early {
		t.Fatal("who came too early was forgotten")
	}
	must(t, w.config.settle(testContext(t), d.id, g))
	ended()
	if n := orders(); n != 2 {
		t.Errorf("%d orders, want the first and one after a minute", n)
	}
	must(t, w.config.settle(testContext(t), d.id, g)) // it is done
	if n := orders(); n != 2 {
		t.Errorf("%d orders", n)
	}
}

// A second coordinator changes a document; this one's copy does not have it yet.
func TestAnOldCopyOfADocumentBringsNothingBack(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := tune(w.device(t))
	w.set(t, api.ConfigScope{}, "beat.seconds=30")
	w.settled(t, d, "beat.seconds=30")
	docs := w.config.docs
	old, rev := docs.at(fleetKey)
	w.set(t, api.ConfigScope{}, "beat.seconds=20")
	c := w.settled(t, d, "beat.seconds=20")
	docs.mu.Lock()
	docs.rows[fleetKey] = row[configDoc]{old, rev}
	docs.mu.Unlock()
	must(t, w.config.settle(testContext(t), d.id, greeting{}))
	if row, _ := w.config.rows.get(string(d.id)); row.Version != c.Wanted || string(row.Values["beat.seconds"]) != "20" {
		t.Errorf("version %d with %s", row.Version, row.Values)
	}
}

func TestChangesThatMakeNoSenseAreRefused(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	one := map[string]json.RawMessage{"beat.seconds": json.RawMessage("60")}
	for name, c := range map[string]struct {
		q      api.ConfigChange
		status int
		says   string
	}{
		"unknown key":         {api.ConfigChange{Set: map[string]json.RawMessage{"beat.second": json.RawMessage("60")}}, http.StatusUnprocessableEntity, "nearest are beat.seconds"},
		"unknown to unset":    {api.ConfigChange{Unset: []string{"log.lvl"}}, http.StatusUnprocessableEntity, "nearest are log.level"},
		"odd key by force":    {api.ConfigChange{Set: map[string]json.RawMessage{"a b": json.RawMessage("60")}, Force: true}, http.StatusUnprocessableEntity, "cannot be a setting"},
		"large by force":      {api.ConfigChange{Set: map[string]json.RawMessage{"a.b": json.RawMessage(`"` + strings.Repeat("x", 600) + `"`)}, Force: true}, http.StatusUnprocessableEntity, "256 bytes"},
		"out of range":        {api.ConfigChange{Set: map[string]json.RawMessage{"beat.seconds": json.RawMessage("4")}, Force: true}, http.StatusUnprocessableEntity, "5 to 3600"},
		"nothing":             {api.ConfigChange{}, http.StatusBadRequest, "nothing"},
		"set and unset":       {api.ConfigChange{Set: one, Unset: []string{"beat.seconds"}}, http.StatusBadRequest, "at once"},
		"device and group":    {api.ConfigChange{Set: one, ConfigScope: api.ConfigScope{Device: d.id, Group: "g"}}, http.StatusBadRequest, "not both"},
		"no such device":      {api.ConfigChange{Set: one, ConfigScope: api.ConfigScope{Device: "nobody"}}, http.StatusNotFound, "no device"},
		"unprintable group":   {api.ConfigChange{Set: one, ConfigScope: api.ConfigScope{Group: "a\x00"}}, http.StatusBadRequest, "printable"},
		"a group's long name": {api.ConfigChange{Set: one, ConfigScope: api.ConfigScope{Group: strings.Repeat("g", 65)}}, http.StatusBadRequest, "64"},
	} {
		c.q.All = c.q.ConfigScope == api.ConfigScope{}
		_, err := w.op.ChangeConfig(testContext(t), c.q)
		var e *api.Error
		if !errors.As(err, &e) || e.Status != c.status || !strings.Contains(e.Reason, c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Too many values in all, one after the other.
	scope := api.ConfigScope{Device: d.id}
	var err error
	for i := 0; i <= maxConfigKeys && err == nil; i++ {
		_, err = w.op.ChangeConfig(testContext(t), api.ConfigChange{ConfigScope: scope, Force: true, Set: map[string]json.RawMessage{fmt.Sprintf("k%d", i): json.RawMessage("1")}})
		if err != nil && i < maxConfigKeys {
			t.Errorf("value %d: %v", i, err)
		}
	}
	if err == nil || !strings.Contains(err.Error(), "at most 64") {
		t.Errorf("got %v", err)
	}
}

// A group that was left out or misspelt must not become the whole fleet.
func TestAChangeSaysWhomItIsFor(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	for _, body := range []string{
		`{"set":{"beat.seconds":60}}`, `{"group":"","set":{"beat.seconds":60}}`, `{"groups":["a"],"set":{"beat.seconds":60}}`,
		`{"unset":["beat.seconds"]}`, `{"all":true,"group":"a","set":{"beat.seconds":60}}`, `{"all":true,"device":"` + string(d.id) + `","set":{"beat.seconds":60}}`,
	} {
		if code := w.asOwner(t, http.MethodPatch, "/config", body, nil); code != http.StatusBadRequest {
			t.Errorf("%s: %d", body, code)
		}
	}
	for _, scope := range []api.ConfigScope{{}, {Group: "a"}} {
		if doc, err := w.op.Config(testContext(t), scope); err != nil || len(doc.Values) != 0 {
			t.Errorf("%+v has %s (%v)", scope, doc.Values, err)
		}
	}
	for want, scope := range map[string]api.ConfigScope{"fleet": {}, "group:a": {Group: "a"}, string(d.id): {Device: d.id}} {
		w.set(t, scope, "beat.seconds=60")
		list := w.entries(t)
		if e := list[len(list)-1]; e.Action != "config.change" || !slices.Equal(e.Targets, []string{want}) {
			t.Errorf("the log says %+v, want %s", e, want)
		}
	}
}

func TestADeviceThatBeatsSeldomIsNotAway(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := tune(w.device(t))
	w.set(t, api.ConfigScope{}, "beat.seconds=600")
	w.settled(t, d, "beat.seconds=600")
	w.advance(20 * time.Minute)
	w.reg.expire()
	if !w.reg.online(d.id) {
		t.Error("away after two of its heartbeats are missing")
	}
	w.advance(20 * time.Minute)
	w.reg.expire()
	if w.reg.online(d.id) {
		t.Error("still there after four")
	}
}

// The largest documents that there can be still fit an order.
func TestTheLargestConfigurationFitsAnOrder(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	w.join(t, d.id, "g")
	value := json.RawMessage(`"` + strings.Repeat("v", maxConfigValue-2) + `"`)
	for i, scope := range []api.ConfigScope{{}, {Group: "g"}, {Device: d.id}} {
		q := changeOf(scope)
		q.Force, q.Set = true, map[string]json.RawMessage{}
		for j := range maxConfigKeys {
			key := fmt.Sprintf("%d.%d.", i, j)
			q.Set[key+strings.Repeat("k", maxConfigKey-len(key))] = value
		}
		_, err := w.op.ChangeConfig(testContext(t), q)
		must(t, err)
	}
	must(t, w.config.settle(testContext(t), d.id, greeting{}))
	eventually(t, "the order is there", func() bool {
		open := w.openConfigs(d.id)
		if len(open) != 1 {
			return false
		}
		b, _ := wire.DecodeBody[wire.ConfigApply](open[0].Order)
		return len(b.Values) == 3*maxConfigKeys
	})
}
