package coordinator

import (
	"crypto/ed25519"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/nats-io/nats.go"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// hearFrom is a message on a device's topic, as it comes from the broker.
func (w *world) hearFrom(t *testing.T, d *device, ch wire.Channel, typ wire.PayloadType, v any) {
	t.Helper()
	raw, err := wire.Seal(d.key, typ, v)
	must(t, err)
	w.hear(testContext(t), &nats.Msg{Subject: wire.Subject(d.id, ch), Data: raw})
}

func TestADeviceSpeaksForItselfAlone(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, victim := w.enrolled(t), w.enrolled(t)
	entries := func() int {
		w.reg.mu.Lock()
		defer w.reg.mu.Unlock()
		return len(w.reg.live)
	}
	before := entries()
	invented := wire.IDOf(newKey(t).Public().(ed25519.PublicKey))
	for _, id := range []wire.DeviceID{victim.id, invented, ""} {
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: id, Capacity: 1 << 40})
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: id, Online: true, Session: "s", Nonce: newNonce()})
		if id != "" && w.reg.online(id) {
			t.Errorf("a device made %s look online", id)
		}
	}
	if n := entries(); n != before {
		t.Errorf("%d entries of devices that did not speak are kept", n-before)
	}
	w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id})
	if !w.reg.online(d.id) {
		t.Error("a device's own beat does not count")
	}
}

func TestADevicesSpaceIsWithinReason(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	for _, n := range []int64{-1, -1 << 63, 1<<63 - 1} {
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, Capacity: n, Used: n})
		w.reg.mu.Lock()
		l := *w.reg.live[d.id]
		w.reg.mu.Unlock()
		if l.capacity < 0 || l.capacity > 1<<60 || l.used < 0 || l.used > 1<<60 {
			t.Errorf("beat: %d was taken as %d, %d used", n, l.capacity, l.used)
		}
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: "s", Nonce: newNonce(), Capacity: n, Used: n})
		v, err := w.reg.device(d.id)
		must(t, err)
		if v.Capacity < 0 || v.Capacity > 1<<60 || v.Used < 0 || v.Used > 1<<60 {
			t.Errorf("presence: %d was taken as %d, %d used", n, v.Capacity, v.Used)
		}
	}
}

func TestARetiredDeviceIsCutOffAtOnceAndForEver(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	d := w.enrolled(t)
	d.connect(w)
	data := someBytes(1000)
	w.putFile(t, "f", data, 1)
	d.on(wire.KindChunkServe, silent)
	open1, err := w.outbox.submit(testContext(t), d.id, wire.KindChunkServe, wire.ChunkServe{ID: chunk.Sum(data).String()}, time.Hour)
	must(t, err)

	cut := make(chan struct{})
	c := mqtt.NewClient(mqtt.NewClientOptions().AddBroker("ssl://localhost:" + w.Broker()).SetClientID(string(d.id)).
		SetTLSConfig(d.tls.Clone()).SetAutoReconnect(false).SetConnectTimeout(patience).SetPingTimeout(patience).
		SetConnectionLostHandler(func(mqtt.Client, error) { close(cut) }))
	d.token(c.Connect()) // takes the place of the connection before

	v, err := w.op.RetireDevice(testContext(t), string(d.id), true)
	must(t, err)
	next(t, cut, "the end of the connection")
	if v.State != api.DeviceRetired || v.Online || !v.Settled || v.RetiredAt.IsZero() {
		t.Errorf("%+v", v)
	}
	refused := func(w *world) {
		t.Helper()
		c := mqtt.NewClient(mqtt.NewClientOptions().AddBroker("ssl://localhost:" + w.Broker()).SetClientID(string(d.id)).
			SetTLSConfig(d.tls.Clone()).SetAutoReconnect(false).SetConnectTimeout(patience).SetPingTimeout(patience))
		if tok := c.Connect(); !tok.WaitTimeout(patience) || tok.Error() == nil {
			c.Disconnect(0)
			t.Error("it connects again")
		}
		if status, body := call(t, d.http, http.MethodGet, w.URL()+"/data/v1/repo/metadata/1.root.json", nil); status != http.StatusForbidden {
			t.Errorf("data plane: %d %s", status, body)
		}
		for _, tok := range []string{"", w.newToken(t, api.TokenRequest{})} {
			if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, d.key), Token: tok}); status != http.StatusForbidden || e.Code != wire.CodeRetired {
				t.Errorf("renewal: %d %+v", status, e)
			}
		}
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id})
		if w.reg.online(d.id) || w.reg.mayWork(d.id) {
			t.Error("a retired device looks online")
		}
	}
	refused(w)
	if o, err := w.outbox.get(testContext(t), d.id, open1.ID); err != nil || o.State != wire.Canceled || o.Result.Code != wire.CodeRetired {
		t.Errorf("its order is %s %s (%v)", o.State, o.Result.Code, err)
	}
	if rec, _ := w.storage.chunks.get(chunk.Sum(data).String()); rec.alive() != 0 {
		t.Errorf("its chunk counts as held: %+v", rec)
	}
	_, err = w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id})
	wantRefusal(t, err, http.StatusConflict, wire.CodeRetired)
	if _, err := w.op.RetireDevice(testContext(t), string(d.id), false); err != nil {
		t.Errorf("a second time: %v", err)
	}
	_, err = w.op.RetireDevice(testContext(t), "nobody", false)
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
	w.Close()
	w = open(t, dir)
	defer w.Close()
	refused(w)
}

// holdLine connects a device to the broker, and tells when it is cut off.
func (d *device) holdLine(w *world) <-chan struct{} {
	cut := make(chan struct{})
	c := mqtt.NewClient(mqtt.NewClientOptions().AddBroker("ssl://localhost:" + w.Broker()).SetClientID(string(d.id)).
		SetTLSConfig(d.tls.Clone()).SetAutoReconnect(false).SetConnectTimeout(patience).SetPingTimeout(patience).
		SetConnectionLostHandler(func(mqtt.Client, error) { close(cut) }))
	d.token(c.Connect())
	return cut
}

// Another coordinator may have let the device in before it knew.
func TestARetirementByAnotherCoordinatorCutsOffToo(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	cut := d.holdLine(w)
	rec, err := w.reg.device(d.id)
	must(t, err)
	rec.Retired = true
	raw, err := json.Marshal(rec)
	must(t, err)
	_, err = w.reg.rows.kv.Put(testContext(t), string(d.id), raw)
	must(t, err)
	next(t, cut, "the end of the connection")
}

// The command's return is a promise: nothing that runs beside it may be what
// cuts the device off.
func TestADeviceIsCutOffWhenItsRetirementReturns(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	lost := d.holdLine(w)
	w.reg.mu.Lock()
	w.reg.retired[d.id] = true // the watch of the records finds nothing new to cut off
	w.reg.mu.Unlock()
	_, err := w.op.RetireDevice(testContext(t), string(d.id), false)
	must(t, err)
	next(t, lost, "the end of the connection")
}

// Its words may be on their way while a device is being retired.
func TestWhatARetiredDeviceSaidBeforeLeavesNothing(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id})
	w.retire(t, d.id)
	eventually(t, "the registry knows", func() bool { v, _ := w.reg.device(d.id); return v.Retired })
	w.reg.beat(wire.Beat{Device: d.id}) // opened before, taken after
	w.reg.heard(wire.Presence{Device: d.id, Online: true, Session: "s"})
	w.reg.mu.Lock()
	defer w.reg.mu.Unlock()
	if l := w.reg.live[d.id]; l != nil {
		t.Errorf("it counts as there: %+v", l)
	}
}

// What a crash left of a retirement is done at the next start.
func TestARetirementThatWasCutOffIsSettledLater(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	d := w.enrolled(t)
	d.connect(w)
	data := someBytes(1000)
	w.putFile(t, "f", data, 1)
	d.leave()
	_, err := w.reg.rows.change(testContext(t), string(d.id), func(v *api.DeviceRecord, _ bool) error { v.Retired = true; return nil })
	must(t, err)
	w.Close()
	w = open(t, dir)
	defer w.Close()
	eventually(t, "it is settled", func() bool { v, _ := w.reg.device(d.id); return v.Settled })
	if rec, _ := w.storage.chunks.get(chunk.Sum(data).String()); len(rec.Holders) != 1 || rec.alive() != 0 {
		t.Errorf("its chunk counts as held: %+v", rec)
	}
}

// greets makes hellos as an agent's clock and starts would.
type greets struct {
	instance string
	at       int // minutes
	trusted  bool
}

func TestTwoMachinesWithOneKeyAreFoundAndNothingElseIs(t *testing.T) {
	for name, c := range map[string]struct {
		hellos []greets
		twins  bool
	}{
		"reconnects":                         {[]greets{{"a", 1, true}, {"a", 2, true}, {"a", 3, true}}, false},
		"restarts":                           {[]greets{{"a", 1, true}, {"b", 2, true}, {"c", 3, true}}, false},
		"two in turn":                        {[]greets{{"a", 1, true}, {"b", 2, true}, {"a", 3, true}}, true},
		"two in turn, booting":               {[]greets{{"a", 1, true}, {"b", 0, false}, {"a", 3, true}, {"b", 4, true}, {"a", 5, true}}, true},
		"a repeated hello":                   {[]greets{{"a", 1, true}, {"b", 2, true}, {"a", 1, true}}, false},
		"a late hello":                       {[]greets{{"a", 1, true}, {"b", 3, true}, {"a", 2, true}}, false},
		"all repeated, again and again":      {[]greets{{"a", 1, true}, {"b", 2, true}, {"a", 1, true}, {"b", 2, true}, {"a", 1, true}, {"b", 2, true}}, false},
		"late, over a start without a clock": {[]greets{{"a", 1, true}, {"b", 0, false}, {"a", 2, true}}, false},
		"no clock at all":                    {[]greets{{"a", 1, false}, {"b", 2, false}, {"a", 3, false}}, false},
		"from the future":                    {[]greets{{"a", 1, true}, {"b", 2, true}, {"a", 99, true}}, false},
		"after a restart of ours":            {[]greets{{"b", 2, true}, {"a", 1, true}, {"b", 3, true}}, false},
		"of a start that is forgotten": {[]greets{{"a", 1, true}, {"b", 2, true}, {"c", 2, true}, {"d", 2, true}, {"e", 2, true}, {"f", 2, true}, {"g", 2, true}, {"h", 2, true},
			{"i", 2, false}, {"i", 3, true}, {"a", 1, true}, {"i", 4, true}}, false},
		"an agent that does not say": {[]greets{{"", 1, true}, {"b", 2, true}, {"", 3, true}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			base := time.Now()
			var s starts
			twins := false
			for _, h := range c.hellos {
				p := wire.Presence{Instance: h.instance, At: base.Add(time.Duration(h.at) * time.Minute), TimeConfidence: wire.ClockUnknown}
				if h.trusted {
					p.TimeConfidence = wire.ClockTrusted
				}
				two, _ := s.hello(p, base.Add(5*time.Minute))
				twins = twins || two
			}
			if twins != c.twins {
				t.Errorf("two machines: %t", twins)
			}
		})
	}
	var s starts
	for i := range 1000 {
		s.hello(wire.Presence{Instance: strconv.Itoa(i), At: time.Now(), TimeConfidence: wire.ClockTrusted}, time.Now())
	}
	if len(s.seen) > maxStarts {
		t.Errorf("%d starts of one device are remembered", len(s.seen))
	}
}

// A hello that the broker has kept says what was so once: it is answered, and
// changes nothing, also after a restart of the coordinator.
func TestAnOldHelloChangesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	d := w.enrolled(t)
	base := w.now()
	hello := func(instance, agent string, minutes int, sure wire.Confidence) wire.Presence {
		return wire.Presence{Device: d.id, Online: true, Instance: instance, Session: newNonce(), Nonce: newNonce(), Agent: agent,
			At: base.Add(time.Duration(minutes) * time.Minute), TimeConfidence: sure, Capacity: int64(100 + minutes)}
	}
	say := func(p wire.Presence) {
		t.Helper()
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, p)
	}
	gone := func(p wire.Presence) wire.Presence { p.Online, p.Nonce = false, newNonce(); return p }
	first, second := hello("a", "1.0.0", -9, wire.ClockUnknown), hello("a", "1.0.0", -8, wire.ClockTrusted)
	third := hello("b", "1.0.0", -7, wire.ClockTrusted)
	newest := hello("b", "2.0.0", -5, wire.ClockTrusted)
	for _, p := range []wire.Presence{first, second, third, newest} {
		say(p)
	}
	unchanged := func(what string) {
		t.Helper()
		if v, err := w.op.Device(testContext(t), string(d.id)); err != nil || v.Online || v.Agent != "2.0.0" || v.Capacity != newest.Capacity || len(v.Warnings) != 0 {
			t.Errorf("%s: %t, %s, %d, %v, %v", what, v.Online, v.Agent, v.Capacity, v.Warnings, err)
		}
	}
	for name, p := range map[string]wire.Presence{"of an old life": first, "of an old life, with a time": second, "of an old session": third} {
		say(p)
		say(gone(newest)) // which still is its session
		unchanged("a hello " + name + " before the end")
		say(p)
		unchanged("a hello " + name + " after the end")
	}
	say(newest)
	unchanged("the newest once more")
	w.Close()
	w = open(t, dir)
	t.Cleanup(w.Close)
	for name, p := range map[string]wire.Presence{"of an old life": second, "of an old session": third} {
		say(p)
		unchanged("after a restart, a hello " + name)
	}
	say(hello("b", "2.0.1", -3, wire.ClockTrusted))
	if v, err := w.op.Device(testContext(t), string(d.id)); err != nil || !v.Online || v.Agent != "2.0.1" {
		t.Errorf("a new hello does not count: %+v %v", v, err)
	}
}

// An old hello must be answered: the device that said it may still be waiting.
func TestAStaleHelloIsAnswered(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	p := wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: newNonce(), Instance: "a", At: w.now(), TimeConfidence: wire.ClockTrusted}
	for range 2 {
		d.say(wire.ChannelPresence, wire.TypePresence, p)
		if got := next(t, d.welcomes, "the welcome"); got.Nonce != p.Nonce {
			t.Errorf("welcome to %q, want %q", got.Nonce, p.Nonce)
		}
	}
}

func TestADuplicateKeyKeepsWorkAwayUntilADayHasPassed(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	d.connect(w)
	hello := func(instance string) {
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: newNonce(), Nonce: newNonce(),
			Instance: instance, At: w.now(), TimeConfidence: wire.ClockTrusted, Capacity: d.capacity,
			Dropped: []wire.Dropped{{Class: "result\x1b", Count: 3}}})
	}
	turn := func() {
		for _, i := range []string{"a", "b", "a"} {
			hello(i)
		}
	}
	hello("a")
	hello("b")
	if v, _ := w.op.Device(testContext(t), string(d.id)); len(v.Warnings) != 0 || len(v.Dropped) != 1 || v.Dropped[0].Class != "result" {
		t.Errorf("a restart: %+v %+v", v.Warnings, v.Dropped)
	}
	w.putFile(t, "before", someBytes(100), 1)
	turn()
	v, err := w.op.Device(testContext(t), string(d.id))
	must(t, err)
	if len(v.Warnings) != 1 || v.Warnings[0].Code != api.WarningDuplicateKey || !strings.Contains(v.Warnings[0].Text, "Stop the copy") {
		t.Fatalf("%+v", v.Warnings)
	}
	_, err = w.tryPutFile(testContext(t), "after", someBytes(100), 1)
	wantRefusal(t, err, http.StatusServiceUnavailable, "too_few_devices")
	w.waitsFor(t, api.JobSpec{Module: w.module(t), Input: &api.JobChunk{Object: "before"}}, api.WarningDuplicateKey)
	rev := func() uint64 {
		e, err := w.reg.rows.kv.Get(testContext(t), string(d.id))
		must(t, err)
		return e.Revision()
	}
	r := rev()
	turn()
	if rev() != r {
		t.Error("an observation in the same minute was written")
	}
	w.advance(2 * time.Minute)
	turn()
	if rev() == r {
		t.Error("a later observation was not written")
	}
	w.advance(warningLife + time.Minute)
	hello("a")
	if v, _ := w.op.Device(testContext(t), string(d.id)); len(v.Warnings) != 0 || !w.reg.mayWork(d.id) {
		t.Errorf("a day later: %+v", v.Warnings)
	}
}

func TestGroupsAndLabelsOfManyAreSetAtOnce(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	a, b := w.enrolled(t), w.enrolled(t)
	ctx := testContext(t)
	group, none := "attic", ""
	ids, err := w.op.ChangeDevices(ctx, api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{a.id}}, SetGroup: &group, SetLabels: map[string]string{"x": "1", "y": "2"}})
	if err != nil || len(ids) != 1 || ids[0] != a.id {
		t.Fatalf("%v %v", ids, err)
	}
	ids, err = w.op.ChangeDevices(ctx, api.DeviceChange{Selector: api.Selector{Labels: map[string]string{"x": "1"}}, RemoveLabels: []string{"x", "no such"}})
	if err != nil || len(ids) != 1 {
		t.Fatalf("%v %v", ids, err)
	}
	list, err := w.op.DevicesWhere(ctx, api.DeviceQuery{Selector: api.Selector{Groups: []string{"attic"}}, State: api.DeviceOffline})
	if err != nil || len(list) != 1 || list[0].ID != a.id || len(list[0].Labels) != 1 || list[0].Labels["y"] != "2" {
		t.Fatalf("%+v %v", list, err)
	}
	if _, err := w.op.RetireDevice(ctx, string(a.id), false); err != nil {
		t.Fatal(err)
	}
	if list, err := w.op.DevicesWhere(ctx, api.DeviceQuery{Selector: api.Selector{Groups: []string{"attic"}}, State: api.DeviceRetired}); err != nil || len(list) != 1 {
		t.Errorf("%+v %v", list, err)
	}
	if ids, err := w.op.ChangeDevices(ctx, api.DeviceChange{Selector: api.Selector{All: true}, SetGroup: &none}); err != nil || len(ids) != 1 || ids[0] != b.id {
		t.Errorf("all: %v %v", ids, err)
	}
	many := map[string]string{}
	for i := range maxLabels + 1 {
		many["l"+strconv.Itoa(i)] = ""
	}
	bad := "a\nb"
	for _, c := range []struct {
		change api.DeviceChange
		code   string
	}{{api.DeviceChange{}, wire.CodeBadBody}, {api.DeviceChange{SetGroup: &bad}, "bad_group"}, {api.DeviceChange{SetLabels: many}, "bad_label"}} {
		c.change.All = c.code != wire.CodeBadBody
		_, err := w.op.ChangeDevices(ctx, c.change)
		wantRefusal(t, err, http.StatusBadRequest, c.code)
	}
	_, err = w.op.DevicesWhere(ctx, api.DeviceQuery{State: "lost"})
	wantRefusal(t, err, http.StatusBadRequest, "bad_state")
}
