package coordinator

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func TestWarningsOfDevicesAreCleaned(t *testing.T) {
	now := time.Now().UTC()
	got := cleanWarnings([]wire.Warning{
		{Code: "b", Severity: "odd\x1b[31m", Title: "line\nfeed\x1b]0;x\a", Subject: "sd\u202ea", Text: "a\x1b[2Jb\nc", Since: now.Add(time.Hour)},
		{Code: "a_b", Severity: wire.Critical, Subject: strings.Repeat("s", 100), Text: strings.Repeat("ä", 5000)},
		{Code: "b", Subject: "sda", Severity: wire.Critical, Title: "the same again"},
		{Code: "\x00", Severity: wire.Critical, Title: "nameless"},
		{Code: "c", Severity: wire.Trouble, Title: "c", Since: now},
	}, now)
	want := []wire.Warning{
		{Code: "a_b", Severity: wire.Critical, Title: "a b", Subject: strings.Repeat("s", maxLabel)},
		{Code: "c", Severity: wire.Trouble, Title: "c", Since: now},
		{Code: "b", Severity: wire.Info, Title: "linefeed]0;x", Subject: "sda", Text: "a[2Jb c", Since: now},
	}
	if len(got) == 3 {
		if n := len(got[0].Text); n == 0 || n > maxWarningText+len("…") {
			t.Errorf("a text of %d bytes", n)
		}
		got[0].Text = ""
	}
	if !slices.Equal(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	var many []wire.Warning
	for i := range 10 * wire.MaxWarnings {
		many = append(many, wire.Warning{Code: fmt.Sprint("c", i)})
	}
	if n := len(cleanWarnings(many, now)); n != wire.MaxWarnings {
		t.Errorf("%d are kept", n)
	}
}

func TestTheFleetsHealthIsSeenAtOnce(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	ill, slow, well, mute := w.enrolled(t), w.enrolled(t), w.enrolled(t), w.enrolled(t)
	since := time.Now().UTC().Truncate(time.Second)
	full := func(subject string) wire.Warning {
		return wire.Warning{Code: "filesystem_full", Subject: subject, Severity: wire.Trouble, Title: "A file system is full", Text: "Free space.", Since: since}
	}
	hear := func(d *device, list ...wire.Warning) {
		t.Helper()
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, Warnings: list})
	}
	failing := wire.Warning{Code: "disk_failing", Subject: "sda", Severity: wire.Critical, Title: "A disk is failing", Text: "Replace it."}
	hear(ill, full("/a"), full("/b"), full("/c"), full("/d"), failing)
	hear(slow, full("/"))
	hear(well, wire.Warning{Code: "update_waiting", Severity: wire.Info, Title: "An update waits"})

	v, err := w.op.Device(ctx, string(ill.id))
	if err != nil || len(v.Health) != 5 || v.Health[0] != failing || v.Health[1] != full("/a") || v.HealthAt.IsZero() || v.HealthMore != 0 {
		t.Errorf("%+v %v", v.Health, err)
	}
	ids := func(q api.DeviceQuery) (out []wire.DeviceID) {
		t.Helper()
		list, err := w.op.DevicesWhere(ctx, q)
		must(t, err)
		for _, d := range list {
			out = append(out, d.ID)
			if d.ID == ill.id && (len(d.Health) != api.MaxListedHealth || d.HealthMore != 1 || d.Health[0].Text != "" || d.Health[0].Title == "") {
				t.Errorf("a list has %+v and %d more", d.Health, d.HealthMore)
			}
		}
		return out
	}
	if n := len(ids(api.DeviceQuery{})); n != 4 {
		t.Errorf("%d devices", n)
	}
	want := []wire.DeviceID{ill.id, slow.id}
	slices.Sort(want)
	if got := ids(api.DeviceQuery{Trouble: true}); !slices.Equal(got, want) {
		t.Errorf("in trouble are %v, want %v", got, want)
	}
	if v, err := w.op.Device(ctx, string(ill.id)); err != nil || v.Health[0].Text == "" {
		t.Errorf("a list took the text from memory: %v", err)
	}
	if code := w.asOwner(t, http.MethodGet, "/devices?trouble=perhaps", "", nil); code != http.StatusBadRequest {
		t.Errorf("%d", code)
	}

	s := w.statusNow(t)
	if s.Devices.Critical != 1 || s.Devices.Troubled != 1 || s.Devices.Warned != 0 {
		t.Errorf("%+v", s.Devices)
	}
	if len(s.Health) != 3 || s.Health[0].Code != "filesystem_full" || s.Health[0].Devices != 2 || s.Health[1] != (api.HealthCount{Code: "disk_failing", Title: "A disk is failing", Severity: wire.Critical, Devices: 1}) {
		t.Errorf("%+v", s.Health)
	}
	if len(s.Attention) != 1 || s.Attention[0] != aboutDevice(ill.id, "disk_failing", "A disk is failing (sda)") {
		t.Errorf("%+v", s.Attention)
	}

	hear(ill)
	if v, err := w.op.Device(ctx, string(ill.id)); err != nil || len(v.Health) != 0 || v.HealthAt.IsZero() {
		t.Errorf("a device that is well again: %+v %v", v.Health, err)
	}
	if v, err := w.op.Device(ctx, string(mute.id)); err != nil || !v.HealthAt.IsZero() {
		t.Errorf("a device that has said nothing: %s %v", v.HealthAt, err)
	}
	w.retire(t, slow.id)
	if s := w.statusNow(t); s.Devices.Critical+s.Devices.Troubled != 0 || len(ids(api.DeviceQuery{Trouble: true})) != 0 {
		t.Errorf("%+v", s.Devices)
	}
}

func TestKindsOfWarningsAreBounded(t *testing.T) {
	h := healthOf{kinds: map[string]*api.HealthCount{}}
	var s api.Status
	for i := range maxHealthKinds {
		var d api.Device
		d.HealthAt = time.Now()
		for j := range 4 {
			d.Health = append(d.Health, wire.Warning{Code: fmt.Sprint(i, " ", j), Severity: wire.Info})
		}
		h.count(&s, d)
	}
	if len(h.kinds) != maxHealthKinds || len(h.most()) != api.MaxHealthCounts {
		t.Errorf("%d kinds are counted, %d shown", len(h.kinds), len(h.most()))
	}
}

func TestADeviceIsIdentified(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	asked := make(chan wire.Identify, 2)
	d.on(wire.KindIdentify, func(o wire.Order) *reply {
		v, err := wire.DecodeBody[wire.Identify](o)
		if err != nil {
			t.Error(err)
		}
		asked <- v
		return &reply{state: wire.Succeeded}
	})
	o, err := w.op.Identify(ctx, d.id, api.IdentifyRequest{Seconds: 60})
	must(t, err)
	if end, err := w.op.AwaitOrder(ctx, d.id, o.Order.ID, nil); err != nil || end.State != wire.Succeeded || next(t, asked, "the order").Seconds != 60 {
		t.Errorf("%+v %v", end, err)
	}
	d.on(wire.KindIdentify, func(wire.Order) *reply { return &reply{state: wire.Rejected, code: wire.CodeNotSupported} })
	o, err = w.op.Identify(ctx, d.id, api.IdentifyRequest{})
	must(t, err)
	if end, err := w.op.AwaitOrder(ctx, d.id, o.Order.ID, nil); err != nil || end.Result.Code != wire.CodeNotSupported || end.Result.Reason == "" {
		t.Errorf("%+v %v", end, err)
	}
	var done []api.LogEntry
	for _, e := range w.entries(t) {
		if e.Action == "device.identify" && e.Outcome == api.LogDone && slices.Contains(e.Targets, string(d.id)) {
			done = append(done, e)
		}
	}
	if len(done) != 2 || !slices.Contains(done[1].Targets, o.Order.ID) {
		t.Errorf("%+v", done)
	}
}

func TestWhatIsAskedOfADeviceIsChecked(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d, gone := w.enrolled(t), w.enrolled(t)
	w.retire(t, gone.id)
	path := "/devices/" + string(d.id)
	for _, bad := range []struct{ path, body string }{
		{"/identify", `{"seconds":-1}`}, {"/identify", `{"seconds":3601}`}, {"/identify", `{"second":1}`}, {"/identify", `{"seconds":1e99}`}, {"/identify", ``},
		{"/history", `{"points":-1}`}, {"/history", `{"points":2001}`}, {"/history", `{"serie":["a"]}`}, {"/history", `{"series":[""]}`}, {"/history", `{"series":["a\u001b[2J"]}`},
		{"/history", `{"series":["` + strings.Repeat("x", 65) + `"]}`}, {"/history", `{"series":["a"` + strings.Repeat(`,"a"`, 64) + `]}`},
		{"/history", `{"from":"2026-01-02T00:00:00Z","to":"2026-01-01T00:00:00Z"}`}, {"/history", `{"from":"yesterday"}`},
	} {
		var e wire.APIError
		if code := w.asOwner(t, http.MethodPost, path+bad.path, bad.body, &e); code != http.StatusBadRequest || e.Code != wire.CodeBadBody {
			t.Errorf("%s %.50s: %d %+v", bad.path, bad.body, code, e)
		}
	}
	if n := len(w.outbox.openOf(d.id)); n != 0 {
		t.Fatalf("%d orders were made", n)
	}
	_, err := w.op.AskHistory(ctx, gone.id, wire.HistoryRequest{})
	wantRefusal(t, err, http.StatusConflict, wire.CodeRetired)
	_, err = w.op.Identify(ctx, "none", api.IdentifyRequest{})
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
	for range maxOpenAsked {
		_, err := w.op.AskHistory(ctx, d.id, wire.HistoryRequest{})
		must(t, err)
	}
	_, err = w.op.AskHistory(ctx, d.id, wire.HistoryRequest{})
	wantRefusal(t, err, http.StatusTooManyRequests, "too_many_open")
}

func TestAHistoryIsWhatTheDeviceSignedFor(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	one := 1.0
	sent, err := json.Marshal(wire.History{From: time.Now().UTC(), Step: 60, Count: 1, Series: map[string]wire.Curve{"cpu": {Mean: []*float64{&one}}}})
	must(t, err)
	ask := func(r *reply) api.Order {
		t.Helper()
		d.on(wire.KindHistory, func(wire.Order) *reply { return r })
		o, err := w.op.AskHistory(ctx, d.id, wire.HistoryRequest{Points: 1, Series: []string{"cpu*"}})
		must(t, err)
		o, err = w.op.AwaitOrder(ctx, d.id, o.Order.ID, nil)
		must(t, err)
		return o
	}
	for _, bulk := range []bool{false, true} {
		o := ask(&reply{state: wire.Succeeded, attachment: sent, bulk: bulk})
		got, err := w.op.Attachment(ctx, d.id, o.Order.ID, *o.Result.Attachment)
		if err != nil || string(got) != string(sent) {
			t.Errorf("bulk %t: %s %v", bulk, got, err)
		}
		other := *o.Result.Attachment
		other.SHA256 = digestOf("other")
		if _, err := w.op.Attachment(ctx, d.id, o.Order.ID, other); err == nil {
			t.Error("what was not signed for passes")
		}
	}
	o := ask(&reply{state: wire.Succeeded, attachment: sent, withhold: true})
	_, err = w.op.Attachment(ctx, d.id, o.Order.ID, *o.Result.Attachment)
	wantRefusal(t, err, http.StatusBadGateway, wire.CodeMismatch)
	o = ask(&reply{state: wire.Rejected, code: wire.CodeNotSupported})
	_, err = w.op.Attachment(ctx, d.id, o.Order.ID, wire.Attachment{})
	wantRefusal(t, err, http.StatusConflict, "no_attachment")
	_, err = w.op.Attachment(ctx, d.id, "01M809DA55642Z2CVKSJAB52QE", wire.Attachment{})
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
}
