package coordinator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// digestOf is some digest.
func digestOf(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:])
}

// found is what a device answers that has what name says.
func found(name string) *reply {
	return &reply{state: wire.Succeeded, body: wire.InventoryReport{Digest: digestOf(name)}, attachment: fmt.Appendf(nil, `{"format":1,"name":%q}`, name)}
}

// beats has a device's heartbeat heard, and what follows from it done.
func (w *world) beats(t *testing.T, d *device, digest string) {
	t.Helper()
	w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, InventoryDigest: digest})
	must(t, w.inventories.settle(testContext(t), d.id))
}

func (w *world) inventoryRow(d *device) inventoryRow {
	row, _ := w.inventories.rows.get(string(d.id))
	return row
}

// endsAsking waits until the newest order for an inventory is taken in.
func (w *world) endsAsking(t *testing.T, d *device) inventoryRow {
	t.Helper()
	eventually(t, "the inventory order is taken in", func() bool { return !w.inventoryRow(d).open() })
	return w.inventoryRow(d)
}

func (w *world) wantInventory(t *testing.T, d *device, name string) {
	t.Helper()
	v, err := w.op.Device(testContext(t), string(d.id))
	if want := string(found(name).attachment); err != nil || string(v.Inventory) != want || v.InventoryDigest != digestOf(name) || v.InventoryTaken.IsZero() {
		t.Errorf("on record is %s (%s, %s), want %s: %v", v.Inventory, v.InventoryDigest, v.InventoryTaken, want, err)
	}
}

func TestAnInventoryFollowsWhatTheDeviceHas(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	for _, none := range []string{"", "odd", strings.ToUpper(digestOf("a")), digestOf("a") + "0"} {
		if w.beats(t, d, none); w.inventoryRow(d).Order != "" {
			t.Fatalf("it was asked because of %q", none)
		}
	}
	has := "a"
	d.on(wire.KindInventory, func(wire.Order) *reply { return found(has) })
	w.beats(t, d, digestOf("a"))
	first := w.endsAsking(t, d)
	w.wantInventory(t, d, "a")
	w.advance(2 * inventoryPause)
	if w.beats(t, d, digestOf("a")); w.inventoryRow(d).Order != first.Order {
		t.Error("it was asked for what is on record")
	}
	has = "b"
	w.beats(t, d, digestOf("b"))
	w.endsAsking(t, d)
	w.wantInventory(t, d, "b")
	var noted []api.LogEntry
	for _, e := range w.entries(t) {
		if e.Action == "device.inventory-changed" {
			noted = append(noted, e)
		}
	}
	if len(noted) != 1 || noted[0].Actor != "device:"+string(d.id) || !strings.Contains(string(noted[0].Request), digestOf("b")) {
		t.Errorf("%+v", noted)
	}
}

// One whose answers are refused is asked ever less often, and it is seen why.
func TestADeviceThatIsAskedInVainIsAskedLessOften(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	w.freeze()
	answer := &reply{state: wire.Succeeded, body: wire.InventoryReport{Digest: digestOf("bad")}, attachment: []byte(`[1]`)}
	d.on(wire.KindInventory, func(wire.Order) *reply { return answer })
	w.beats(t, d, digestOf("0"))
	last := w.endsAsking(t, d)
	for i, pause := range []time.Duration{2, 4, 8, 16, 24, 24} {
		w.advance(pause*time.Hour - time.Minute)
		if w.beats(t, d, digestOf(fmt.Sprint(i))); w.inventoryRow(d).Order != last.Order {
			t.Fatalf("it was asked before %d h", pause)
		}
		w.advance(time.Minute)
		if w.beats(t, d, digestOf(fmt.Sprint(i))); w.inventoryRow(d).Order == last.Order {
			t.Fatalf("it was not asked after %d h", pause)
		}
		last = w.endsAsking(t, d)
	}
	v, err := w.op.Device(testContext(t), string(d.id))
	if err != nil || !strings.Contains(v.InventoryProblem, "no JSON object") {
		t.Errorf("shown is %q, %v", v.InventoryProblem, err)
	}
	answer = found("good")
	w.advance(24 * time.Hour)
	w.beats(t, d, digestOf("good"))
	if row := w.endsAsking(t, d); row.Vain != 0 || row.Problem != "" {
		t.Errorf("after a good one: %+v", row)
	}
	if v, err = w.op.Device(testContext(t), string(d.id)); err != nil || v.InventoryProblem != "" {
		t.Errorf("shown is %q, %v", v.InventoryProblem, err)
	}
}

// Whatever a device says of itself, others see that and the rest.
func TestNoDeviceMakesItselfUnshowable(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	deep := json.RawMessage(`{"a\"[[":` + strings.Repeat("[", 9990) + strings.Repeat("]", 9990) + `}`)
	status, m, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: w.newToken(t, api.TokenRequest{}), Inventory: deep})
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, e.Reason)
	}
	if v, err := w.op.Device(testContext(t), string(m.Device)); err != nil || v.Inventory != nil {
		t.Errorf("%d bytes are shown, %v", len(v.Inventory), err)
	}
	d := w.enrolled(t)
	for want, telemetry := range map[string]json.RawMessage{"": deep, `{"a\"[[":[{}]}`: json.RawMessage(`{"a\"[[":[{}]}`)} {
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, Telemetry: telemetry})
		if v, err := w.op.Device(testContext(t), string(d.id)); err != nil || !v.Online || string(v.Telemetry) != want {
			t.Errorf("%.40s: shown is %.40s, %v", telemetry, v.Telemetry, err)
		}
	}
}

func TestAHelloAnnouncesAnInventoryToo(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	d.on(wire.KindInventory, func(wire.Order) *reply { return found("a") })
	d.say(wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: newNonce(), InventoryDigest: digestOf("a")})
	eventually(t, "it is asked, and its answer taken", func() bool { return w.inventoryRow(d).Digest == digestOf("a") })
	w.wantInventory(t, d, "a")
}

func TestADeviceThatFlapsIsAskedOnceAnHour(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	w.freeze()
	d.on(wire.KindInventory, func(wire.Order) *reply { return found("a") })
	w.beats(t, d, digestOf("a"))
	orders := map[string]bool{w.endsAsking(t, d).Order: true}
	for i := range 59 {
		w.advance(time.Minute)
		w.beats(t, d, digestOf(fmt.Sprint(i)))
		orders[w.inventoryRow(d).Order] = true
	}
	if len(orders) != 1 {
		t.Fatalf("%d orders in an hour", len(orders))
	}
	w.advance(time.Minute)
	w.beats(t, d, digestOf("b"))
	if orders[w.inventoryRow(d).Order] {
		t.Error("it was not asked after an hour")
	}
	w.endsAsking(t, d)
}

func TestOnlyOneInventoryOrderIsOpen(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t) // away: nothing is answered
	w.freeze()
	w.beats(t, d, digestOf("a"))
	order := w.inventoryRow(d).Order
	_, err := w.outbox.rows.change(testContext(t), orderKeyOf(d.id, order), func(v *orderRow, _ bool) error {
		v.Expires = v.Expires.Add(24 * time.Hour)
		return nil
	})
	must(t, err)
	w.advance(2 * inventoryPause)
	w.beats(t, d, digestOf("b"))
	if n := w.outbox.openOfKind(d.id, wire.KindInventory); n != 1 || w.inventoryRow(d).Order != order {
		t.Errorf("%d are open, %+v", n, w.inventoryRow(d))
	}
}

// Two coordinators hear the same heartbeat.
func TestCoordinatorsAskOnce(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id})
	peer := newInventories(w.reg, w.outbox, w.now, w.log)
	peer.staging, peer.files = w.staging, w.inventories.files
	kv, err := w.openKV(testContext(t), "inventoried")
	must(t, err)
	peer.rows, err = openTable[inventoryRow](testContext(t), kv, "inventoried", nil)
	must(t, err)
	defer peer.rows.close()
	w.reg.beat(wire.Beat{Device: d.id, InventoryDigest: digestOf("a")})
	var all sync.WaitGroup
	for _, s := range []*inventories{w.inventories, peer, w.inventories, peer} {
		all.Go(func() {
			if err := s.settle(testContext(t), d.id); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := w.outbox.openOfKind(d.id, wire.KindInventory); n != 1 {
		t.Errorf("%d orders were made", n)
	}
}

func TestAnAgentThatCannotIsNotAskedAgain(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t) // it knows no such order
	w.beats(t, d, digestOf("a"))
	row := w.endsAsking(t, d)
	if row.Deaf != "1.0.0" || row.Digest != "" {
		t.Fatalf("%+v", row)
	}
	w.advance(2 * inventoryPause)
	if w.beats(t, d, digestOf("b")); w.inventoryRow(d).Order != row.Order {
		t.Fatal("it was asked again")
	}
	d.on(wire.KindInventory, func(wire.Order) *reply { return found("b") })
	w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: newNonce(), Agent: "1.1.0", InventoryDigest: digestOf("b")})
	eventually(t, "the new version is asked", func() bool { return w.inventoryRow(d).Digest == digestOf("b") })
}

func TestBadInventoriesAreNotTaken(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	answer := found("good")
	d.on(wire.KindInventory, func(wire.Order) *reply { return answer })
	w.beats(t, d, digestOf("good"))
	w.endsAsking(t, d)
	large := append(append([]byte(`{"x":"`), bytes.Repeat([]byte("x"), maxInventory)...), `"}`...)
	for name, bad := range map[string]*reply{
		"garbage":           {attachment: []byte("\x00\x01")},
		"half of an object": {attachment: []byte(`{"format":1`)},
		"no object":         {attachment: []byte(`[1]`)},
		"empty":             {attachment: []byte{}},
		"nested":            {attachment: []byte(`{"a":` + strings.Repeat("[", 9999) + strings.Repeat("]", 9999) + `}`)},
		"nothing":           {},
		"too large":         {attachment: large, withhold: true},
		"never sent":        {attachment: []byte(`{"a":1}`), withhold: true},
		"no digest":         {attachment: []byte(`{"a":1}`), body: wire.InventoryReport{}},
		"an odd digest":     {attachment: []byte(`{"a":1}`), body: wire.InventoryReport{Digest: "../../etc"}},
		"a failure":         {state: wire.Failed, code: wire.CodeInternal},
		"a refusal":         {state: wire.Rejected, code: wire.CodePolicy},
	} {
		if bad.state == "" {
			bad.state = wire.Succeeded
		}
		if bad.body == nil {
			bad.body = wire.InventoryReport{Digest: digestOf("bad")}
		}
		answer = bad
		w.advance(inventoryRest + time.Minute)
		w.beats(t, d, digestOf(name))
		if row := w.endsAsking(t, d); row.Problem == "" || row.Digest != digestOf("good") || row.Deaf != "" {
			t.Errorf("%s: %+v", name, row)
		}
		w.wantInventory(t, d, "good")
	}
	// What it uploads is bounded while it comes.
	answer = nil
	w.advance(inventoryRest + time.Minute)
	w.beats(t, d, digestOf("upload"))
	order := w.inventoryRow(d).Order
	if status, _ := d.transfer(http.MethodPut, "/data/v1/attachment/"+order, large); status != http.StatusRequestEntityTooLarge {
		t.Errorf("an upload of %d bytes: %d", len(large), status)
	}
	// It signs for one thing and sends another.
	swapped, _ := json.Marshal(wire.InventoryReport{Digest: digestOf("swapped")})
	w.hearFrom(t, d, wire.ChannelReport, wire.TypeReport, wire.Report{Order: order, Device: d.id, Seq: 99, State: wire.Succeeded, At: w.now(), Body: swapped,
		Attachment: &wire.Attachment{SHA256: digestOf("x"), Size: 2, Inline: []byte("{}")}})
	if row := w.endsAsking(t, d); row.Problem == "" || row.Digest != digestOf("good") {
		t.Errorf("swapped: %+v", row)
	}
	w.wantInventory(t, d, "good")
}

// A large one comes over HTTPS.
func TestALargeInventoryIsFetched(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	raw := fmt.Appendf(nil, `{"format":1,"x":%q}`, strings.Repeat("x", maxInventory-100)) // the store takes it
	d.on(wire.KindInventory, func(wire.Order) *reply {
		return &reply{state: wire.Succeeded, body: wire.InventoryReport{Digest: digestOf("large")}, attachment: raw}
	})
	v, err := w.op.RefreshInventory(testContext(t), d.id)
	if err != nil || !bytes.Equal(v.Inventory, raw) || v.InventoryDigest != digestOf("large") {
		t.Errorf("%d bytes, %s: %v", len(v.Inventory), v.InventoryDigest, err)
	}
}

func TestNobodyReportsAnothersInventory(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d, thief := w.enrolled(t), w.enrolled(t)
	w.beats(t, d, digestOf("a"))
	order := w.inventoryRow(d).Order
	body, _ := json.Marshal(wire.InventoryReport{Digest: digestOf("forged")})
	sum := sha256.Sum256([]byte("{}"))
	forged := wire.Report{Order: order, Device: d.id, Seq: 1, State: wire.Succeeded, At: w.now(), Body: body,
		Attachment: &wire.Attachment{SHA256: hex.EncodeToString(sum[:]), Size: 2, Inline: []byte("{}")}}
	w.hearFrom(t, thief, wire.ChannelReport, wire.TypeReport, forged) // for another, under its own name
	forged.Device = thief.id
	w.hearFrom(t, thief, wire.ChannelReport, wire.TypeReport, forged) // for itself, on another's order
	forged.Device = d.id
	w.hearFrom(t, &device{id: d.id, key: thief.key}, wire.ChannelReport, wire.TypeReport, forged) // on another's topic, with its own key
	for _, x := range []*device{d, thief} {
		must(t, w.inventories.settle(testContext(t), x.id))
		if v, err := w.op.Device(testContext(t), string(x.id)); err != nil || v.Inventory != nil || v.InventoryDigest != "" {
			t.Errorf("%s has %s: %v", x.id, v.Inventory, err)
		}
	}
	if row := w.inventoryRow(d); !row.open() {
		t.Errorf("the order was ended: %+v", row)
	}
}

func TestAnInventoryOutlivesRestarts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	d := w.enrolled(t)
	d.connect(w)
	d.on(wire.KindInventory, silent)
	w.beats(t, d, digestOf("a"))
	order := w.inventoryRow(d).Order
	d.orderOf(order)
	w.Close()
	d.leave()

	w = open(t, dir)
	defer w.Close()
	d.on(wire.KindInventory, func(wire.Order) *reply { return found("a") })
	d.connect(w)
	defer d.leave()
	if row := w.endsAsking(t, d); row.Order != order || row.Digest != digestOf("a") {
		t.Errorf("the order before the restart was %s: %+v", order, row)
	}
	w.wantInventory(t, d, "a")

	// Cut off after the report was kept, before it was taken in.
	ctx := testContext(t)
	_, err := w.inventories.rows.change(ctx, string(d.id), func(v *inventoryRow, _ bool) error {
		v.Ended, v.Digest = "", ""
		return nil
	})
	must(t, err)
	w.inventories.sweep()
	eventually(t, "it is taken in", func() bool { return w.inventoryRow(d).Digest == digestOf("a") })

	// Cut off after the row was written, before the order was made.
	never := ulid.Make().String()
	_, err = w.inventories.rows.change(ctx, string(d.id), func(v *inventoryRow, _ bool) error {
		v.Order = never
		return nil
	})
	must(t, err)
	w.inventories.sweep()
	d.orderOf(never)
	w.endsAsking(t, d)
}

func TestWhatIsOldReplacesNothingNewer(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	d.on(wire.KindInventory, func(wire.Order) *reply { return found("a") })
	_, err := w.op.RefreshInventory(testContext(t), d.id)
	must(t, err)
	old := w.inventoryRow(d)
	d.on(wire.KindInventory, func(wire.Order) *reply { return found("b") })
	_, err = w.op.RefreshInventory(testContext(t), d.id)
	must(t, err)
	// Somebody was about to write the answer of the order before.
	must(t, w.inventories.put(testContext(t), d.id, []byte(`{"late":1}`), func(v inventoryRow) bool { return v.Order == old.Order && v.open() }))
	w.wantInventory(t, d, "b")
	// A renewal brings one too, and nobody has signed for it.
	raw, err := json.Marshal(wire.EnrolRequest{CSR: csr(t, d.key), Inventory: json.RawMessage(`{"renewed":1}`)})
	must(t, err)
	for _, as := range []*tls.Certificate{nil, &d.tls.Certificates[0]} {
		resp, err := w.plain(as).Post(w.URL()+enrolPath, "application/json", bytes.NewReader(raw))
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("%d", resp.StatusCode)
		}
	}
	w.wantInventory(t, d, "b")
}

func TestARefreshSaysWhyItBroughtNothing(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, gone := w.device(t), w.enrolled(t)
	w.retire(t, gone.id)
	_, err := w.op.RefreshInventory(testContext(t), d.id)
	wantRefusal(t, err, http.StatusBadGateway, wire.CodeNotFound)
	if err == nil || !strings.Contains(err.Error(), wire.CodeUnknownKind) {
		t.Errorf("%v", err)
	}
	_, err = w.op.RefreshInventory(testContext(t), gone.id)
	wantRefusal(t, err, http.StatusConflict, wire.CodeRetired)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	d.on(wire.KindInventory, func(wire.Order) *reply { cancel(); return nil }) // who asked leaves
	if _, err := w.op.RefreshInventory(ctx, d.id); err == nil || !w.inventoryRow(d).open() {
		t.Errorf("%v", err)
	}
}
