package coordinator

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// asOwner makes a call of the API by hand.
func (w *world) asOwner(t testing.TB, method, path, body string, answer any) int {
	t.Helper()
	at, err := api.LoadContext(w.dir + "/" + ContextFile)
	must(t, err)
	r := httptest.NewRequest(method, v1+path, strings.NewReader(body)).WithContext(testContext(t))
	r.Header.Set("Authorization", "Bearer "+at.Token)
	rec := httptest.NewRecorder()
	w.server.Handler.ServeHTTP(rec, r)
	if answer != nil {
		must(t, json.Unmarshal(rec.Body.Bytes(), answer))
	}
	return rec.Code
}

func TestListsComeInPagesWithoutWhatIsLarge(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	var want []wire.DeviceID
	for range 5 {
		status, m, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: w.newToken(t, api.TokenRequest{}), Inventory: json.RawMessage(`{"found":"much"}`)})
		if status != http.StatusOK {
			t.Fatalf("%d %s", status, e.Reason)
		}
		w.reg.beat(wire.Beat{Device: m.Device, Telemetry: json.RawMessage(`{"warm":1}`)})
		want = append(want, m.Device)
	}
	slices.Sort(want)
	for _, list := range []string{"/devices", "/config/devices"} {
		var got []wire.DeviceID
		for after := wire.DeviceID(""); len(got) <= len(want); {
			var page []struct{ ID, Device wire.DeviceID }
			if code := w.asOwner(t, http.MethodGet, fmt.Sprintf("%s?limit=2&after=%s", list, after), "", &page); code != http.StatusOK || len(page) > 2 {
				t.Fatalf("%s: %d, %d devices", list, code, len(page))
			}
			for _, d := range page {
				after = d.ID + d.Device // one of them
				got = append(got, after)
			}
			if len(page) < 2 {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", list, got, want)
		}
		for _, bad := range []string{"0", "-1", "x", "1000000"} {
			if code := w.asOwner(t, http.MethodGet, list+"?limit="+bad, "", nil); code != http.StatusBadRequest {
				t.Errorf("%s with limit=%s: %d", list, bad, code)
			}
		}
	}
	all, err := w.op.Devices(testContext(t))
	must(t, err)
	for _, d := range all {
		if d.Inventory != nil || d.Telemetry != nil || d.State != api.DeviceOnline {
			t.Errorf("a list has %s, %s, %s", d.State, d.Inventory, d.Telemetry)
		}
	}
	d, err := w.op.Device(testContext(t), string(want[0]))
	if err != nil || string(d.Inventory) != `{"found":"much"}` || string(d.Telemetry) != `{"warm":1}` {
		t.Errorf("one device shows %s, %s, %v", d.Inventory, d.Telemetry, err)
	}
}

func TestWhatARetiredDeviceHadCanBeRead(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	ctx := testContext(t)
	set, err := w.op.ChangeConfig(ctx, api.ConfigChange{ConfigScope: api.ConfigScope{Device: d.id}, Set: map[string]json.RawMessage{wire.SettingBeat: json.RawMessage("60")}})
	if err != nil || len(set.Values) != 1 {
		t.Fatal(err)
	}
	w.retire(t, d.id)
	only := api.Selector{Devices: []wire.DeviceID{d.id}}
	if l, err := w.op.Orders(ctx, api.OrderQuery{Selector: only, Pending: true}); err != nil || len(l.Orders) != 0 {
		t.Errorf("%+v %v", l, err)
	}
	if l, err := w.op.DeviceConfigs(ctx, only); err != nil || len(l) != 1 || string(l[0].Values[wire.SettingBeat].Value) != "60" {
		t.Errorf("%+v %v", l, err)
	}
	if doc, err := w.op.Config(ctx, api.ConfigScope{Device: d.id}); err != nil || len(doc.Values) != 1 {
		t.Errorf("%+v %v", doc, err)
	}
	// To change it is another thing.
	_, err = w.op.ChangeConfig(ctx, api.ConfigChange{ConfigScope: api.ConfigScope{Device: d.id}, Unset: []string{wire.SettingBeat}})
	wantRefusal(t, err, http.StatusConflict, wire.CodeRetired)
}

func TestAClientReadsAllPages(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	const more = api.MaxConfigPage + 1
	for i := range more {
		id := wire.DeviceID(fmt.Sprintf("d%05d", i))
		must(t, w.reg.rows.create(testContext(t), string(id), api.DeviceRecord{ID: id}))
	}
	list, err := w.op.DeviceConfigs(testContext(t), api.Selector{})
	if err != nil || len(list) != more || list[more-1].Device != wire.DeviceID(fmt.Sprintf("d%05d", more-1)) {
		t.Errorf("%d devices, want %d: %v", len(list), more, err)
	}
}

// failing is a bucket that cannot write some records.
type failing struct {
	jetstream.KeyValue
	fails func(key string) bool
}

var errFull = errors.New("the disk is full")

func (f failing) Update(ctx context.Context, key string, v []byte, last uint64) (uint64, error) {
	if f.fails(key) {
		return 0, errFull
	}
	return f.KeyValue.Update(ctx, key, v, last)
}

func (f failing) Create(ctx context.Context, key string, v []byte, opts ...jetstream.KVCreateOpt) (uint64, error) {
	if f.fails(key) {
		return 0, errFull
	}
	return f.KeyValue.Create(ctx, key, v, opts...)
}

// two are devices in the order of their ids.
func (w *world) two(t testing.TB) (first, second *device) {
	first, second = w.enrolled(t), w.enrolled(t)
	if first.id > second.id {
		first, second = second, first
	}
	return first, second
}

func (w *world) last(t testing.TB) api.LogEntry {
	list := w.entries(t)
	return list[len(list)-1]
}

func TestRefusedMeansThatNothingWasChanged(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	first, second := w.two(t)
	full := map[string]string{}
	for i := range maxLabels {
		full[fmt.Sprint("l", i)] = ""
	}
	_, err := w.op.ChangeDevices(ctx, api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{second.id}}, SetLabels: full})
	must(t, err)
	old := "cellar"
	_, err = w.op.ChangeDevices(ctx, api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{first.id, second.id}}, SetGroup: &old})
	must(t, err)
	both := api.Selector{Groups: []string{old}}
	_, err = w.op.ChangeDevices(ctx, api.DeviceChange{Selector: both, SetLabels: map[string]string{"one": "more"}})
	wantRefusal(t, err, http.StatusBadRequest, "bad_label")
	if e := w.last(t); e.Outcome != api.LogRefused {
		t.Errorf("%+v", e)
	}
	if d, _ := w.reg.device(first.id); len(d.Labels) != 0 {
		t.Errorf("a change that was refused left %v", d.Labels)
	}
	// What goes wrong in the middle is no refusal, and what was done is named.
	w.reg.rows.kv = failing{w.reg.rows.kv, func(key string) bool { return key == string(second.id) }}
	group := "attic"
	_, err = w.op.ChangeDevices(ctx, api.DeviceChange{Selector: both, SetGroup: &group})
	wantRefusal(t, err, http.StatusInternalServerError, "partly_done")
	if e := w.last(t); e.Outcome != api.LogFailed || !slices.Contains(e.Targets, string(first.id)) || slices.Contains(e.Targets, string(second.id)) || !strings.Contains(e.Reason, "1 of 2") {
		t.Errorf("%+v", e)
	}
	w.reg.rows.kv = w.reg.rows.kv.(failing).KeyValue
	_, err = w.op.ChangeDevices(ctx, api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{first.id}}, SetGroup: &old})
	must(t, err)
	w.outbox.rows.kv = failing{w.outbox.rows.kv, func(key string) bool { return strings.HasPrefix(key, string(second.id)) }}
	_, err = w.op.SendOrder(ctx, api.SendRequest{Kind: extension, Selector: both})
	wantRefusal(t, err, http.StatusInternalServerError, "partly_done")
	// The log names some; all are in the list that the answer points to.
	if s := err.Error(); !strings.Contains(s, "order list --kind "+string(extension)+" --limit 1\"") || strings.Contains(s, "deimos log") {
		t.Errorf("it says %s", s)
	}
	made := w.outbox.openOf(first.id)
	if e := w.last(t); e.Outcome != api.LogFailed || len(made) != 1 || !slices.Contains(e.Targets, made[0]) {
		t.Errorf("%v %+v", made, e)
	}
}

func TestTheLogNamesWhoWasMeant(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	keys := []ed25519.PrivateKey{newKey(t), newKey(t)}
	for _, k := range keys {
		w.knocks(t, k)
	}
	named := func(action string, targets ...string) {
		t.Helper()
		e := w.last(t)
		if e.Action == "device.enrol" {
			t.Fatalf("%+v", e)
		}
		for _, s := range targets {
			if !slices.Contains(e.Targets, s) {
				t.Errorf("%s does not name %s: %q", e.Action, s, e.Targets)
			}
		}
		if e.Action != action || e.Outcome != api.LogDone || e.Of == 0 {
			t.Errorf("%+v", e)
		}
	}
	d, err := w.op.Claim(ctx, api.Claim{Code: w.codeFor(keys[0]), Group: "attic"})
	must(t, err)
	named("claim.create", string(d.ID))
	must(t, w.op.RejectClaim(ctx, w.codeFor(keys[1])))
	named("claim.remove", string(wire.IDOf(keys[1].Public().(ed25519.PublicKey))))
	tok, err := w.op.CreateToken(ctx, api.TokenRequest{})
	must(t, err)
	named("token.create", tok.ID)
	if tok.CreatedBy != api.Owner {
		t.Errorf("made by %q", tok.CreatedBy)
	}
	attic := api.Selector{Groups: []string{"attic"}}
	_, err = w.op.ChangeDevices(ctx, api.DeviceChange{Selector: attic, SetLabels: map[string]string{"a": "b"}})
	must(t, err)
	named("device.change", string(d.ID))
	sent, err := w.op.SendOrder(ctx, api.SendRequest{Kind: extension, Selector: attic})
	must(t, err)
	named("order.create", string(d.ID), sent[0].Order.ID)
	w.publish(t, "2.0.0")
	offer := api.OfferRequest{Version: "2.0.0", Target: repo.TargetName("2.0.0"), Selector: attic, Key: newNonce()}
	offered, err := w.op.Offer(ctx, offer)
	must(t, err)
	named("offer.create", string(d.ID), offered[0].Order.ID)
	again, err := w.op.Offer(ctx, offer)
	if err != nil || again[0].Order.ID != offered[0].Order.ID || len(w.outbox.openOf(d.ID)) != 2 {
		t.Errorf("the repeat of an offer made another: %+v %v", again, err)
	}
	// Many are cut, and counted.
	found := &concerned{}
	about(context.WithValue(ctx, concernedKey{}, found), strings.Fields(strings.Repeat("x ", 3*maxConcerned))...)
	if n := len(found.targets); n != 2 || found.targets[1] != fmt.Sprintf("… and %d more", 2*maxConcerned) {
		t.Errorf("%q", found.targets)
	}
}

func TestOrdersToManyAreAllMadeThoughWhoAskedHasLeft(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	a, b := w.two(t)
	ctx, leave := context.WithCancel(testContext(t))
	leave()
	out, err := w.sendOrder(ctx, api.SendRequest{Kind: extension})
	if err != nil || len(out) != 2 || len(w.outbox.openOf(a.id)) != 1 || len(w.outbox.openOf(b.id)) != 1 {
		t.Errorf("%+v %v", out, err)
	}
}

func TestAJobLivesAsLongAsItMayRun(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	module, err := w.op.PutModule(testContext(t), []byte("a module"))
	must(t, err)
	for seconds, want := range map[float64]time.Duration{0: jobLife, 24 * 3600: 24*time.Hour + jobLife, 1e300: maxLife, -1: jobLife} {
		o, err := w.compute.send(testContext(t), d.id, module, nil, strings.Repeat("0", 64), wire.JobLimits{WallSeconds: seconds})
		must(t, err)
		run, err := wire.DecodeBody[wire.JobRun](o)
		must(t, err)
		u, err := url.Parse(run.Module.URL)
		must(t, err)
		exp, err := strconv.ParseInt(u.Query().Get("exp"), 10, 64)
		must(t, err)
		if life := o.Expires.Sub(o.Issued); life != want || time.Unix(exp, 0).Before(o.Expires.Add(-2*time.Second)) {
			t.Errorf("a job of %v s lives for %s, its module can be fetched until %s", seconds, life, time.Unix(exp, 0))
		}
	}
	must(t, w.outbox.retire(testContext(t), d.id))
}
