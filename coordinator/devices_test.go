package coordinator

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
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
	w.routes().ServeHTTP(rec, r)
	if answer != nil {
		must(t, json.Unmarshal(rec.Body.Bytes(), answer))
	}
	return rec.Code
}

func TestListsComeInPagesWithoutWhatIsLarge(t *testing.T) {
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
