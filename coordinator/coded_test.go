package coordinator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// coded is a file that was stored with a code, and who can read it.
type coded struct {
	*object.Object
	data   []byte
	id     *age.X25519Identity
	placed []api.Placement
}

func (w *world) putCoded(t *testing.T, name string, size int, code api.Code) coded {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	must(t, err)
	f := coded{data: someBytes(size), id: id}
	s, err := object.NewSession(code, int64(size), []age.Recipient{id.Recipient()})
	must(t, err)
	s.Payload = 10_000
	f.Object, f.placed, err = object.Put(testContext(t), w.op, name, bytes.NewReader(f.data), s, object.PutOptions{})
	must(t, err)
	return f
}

func (f coded) get(t *testing.T, w *world) error {
	t.Helper()
	var out bytes.Buffer
	_, err := object.Get(testContext(t), w.op, f.Name, &out, &object.GetOptions{Identities: []age.Identity{f.id}})
	if err == nil && !bytes.Equal(out.Bytes(), f.data) {
		t.Errorf("%q came back as something else", f.Name)
	}
	return err
}

func TestAnyDevicesOfDataGiveTheFileBack(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	devices := w.devices(t, 7)
	f := w.putCoded(t, "coded", 100_000, api.Code{Data: 4, Parity: 2})
	for i, stripe := range slices.Collect(slices.Chunk(f.placed, 6)) {
		on := map[wire.DeviceID]bool{}
		for _, p := range stripe {
			for _, d := range holders(p.Holders) {
				on[d] = true
			}
		}
		if len(on) != 6 {
			t.Errorf("stripe %d is on %d devices", i, len(on))
		}
	}
	entry := func() api.ObjectEntry {
		t.Helper()
		list, err := w.op.Objects(testContext(t))
		must(t, err)
		i := slices.IndexFunc(list, func(e api.ObjectEntry) bool { return e.Name == "coded" })
		return list[i]
	}
	if e := entry(); e.Alive != 6 || e.Online != 6 || e.Needed != 4 || e.Chunks != 18 {
		t.Errorf("listed as %+v", e)
	}
	must(t, f.get(t, w))
	// One is destroyed, one is gone, and nobody said so.
	devices[0].mu.Lock()
	clear(devices[0].chunks)
	devices[0].mu.Unlock()
	devices[1].leave()
	must(t, f.get(t, w))
	// What is found out on the way is known from then on.
	r, err := object.Verify(testContext(t), w.op, f.Object.Object, nil)
	must(t, err)
	for _, fault := range slices.Concat(r.Faults, r.Away) {
		if fault.Device != devices[0].id && fault.Device != devices[1].id {
			t.Errorf("device %s is blamed: %s", fault.Device, fault.Problem)
		}
	}
	if len(r.Faults) == 0 || r.Read+len(r.Faults)+len(r.Away) != 18 || r.Least < 4 {
		t.Errorf("verified: %+v", r)
	}
	if e := entry(); e.Alive >= 6 || e.Online > e.Alive {
		t.Errorf("listed as %+v", e)
	}
	devices[2].leave()
	devices[3].leave()
	if err := f.get(t, w); err == nil || !strings.Contains(err.Error(), "it takes 4") {
		t.Errorf("with too few devices: %v", err)
	}
	must(t, w.op.RemoveObject(testContext(t), "coded"))
}

func TestTooFewDevicesForACodeAreToldBeforeTheFirstByte(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	devices := w.devices(t, 3)
	id, err := age.GenerateX25519Identity()
	must(t, err)
	put := func(c api.Code) error {
		s, err := object.NewSession(c, 1000, []age.Recipient{id.Recipient()})
		must(t, err)
		_, _, err = object.Put(testContext(t), w.op, "few", bytes.NewReader(someBytes(1000)), s, object.PutOptions{})
		return err
	}
	err = put(api.Code{Data: 4, Parity: 2})
	wantRefusal(t, err, http.StatusServiceUnavailable, "too_few_devices")
	if err == nil || !strings.Contains(err.Error(), "6 devices") || !strings.Contains(err.Error(), "3 can be found") || !strings.Contains(err.Error(), "--code 2+1") {
		t.Errorf("it says %v", err)
	}
	for _, d := range devices {
		if len(d.orders) > 0 {
			t.Error("something was placed all the same")
		}
	}
	must(t, put(api.Code{Data: 2, Parity: 1})) // as it said
	must(t, w.op.RemoveObject(testContext(t), "few"))
}

// The code that is advised must fit.
func TestTheFittingCodeFits(t *testing.T) {
	for n := 1; n < 40; n++ {
		c := fittingCode(n)
		if checkCode(c) != nil || c.Shards() > n || n > 1 && c.Parity == 0 || n >= 6 && c != (api.Code{Data: 4, Parity: 2}) {
			t.Errorf("%d devices: %s", n, c)
		}
	}
}

// Shards of a stripe that are placed at the same time do not meet on a device.
func TestShardsAtTheSameTimeGoApart(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	w.devices(t, 6)
	for round := range 3 {
		token := fmt.Sprintf("together-%d", round)
		var wg sync.WaitGroup
		on := make([]wire.DeviceID, 6)
		for i := range on {
			wg.Go(func() {
				data := someBytes(500)
				p, err := w.op.PutShard(testContext(t), chunk.Sum(data).String(), data, token)
				if err != nil || len(p.Holders) != 1 {
					t.Errorf("%+v, %v", p, err)
					return
				}
				on[i] = p.Holders[0].Device
			})
		}
		wg.Wait()
		slices.Sort(on)
		if len(slices.Compact(on)) != 6 {
			t.Errorf("round %d: on %v", round, on)
		}
		data := someBytes(500)
		_, err := w.op.PutShard(testContext(t), chunk.Sum(data).String(), data, token)
		wantRefusal(t, err, http.StatusServiceUnavailable, "too_few_devices")
	}
}

// A coordinator that does not know what another one reserved, or has forgotten:
// the object is refused, and put again it is placed apart.
func TestAStripeThatMeetsOnADeviceIsNotNamedAndIsMended(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	w.devices(t, 3)
	a, b := someBytes(500), someBytes(500)
	o := api.Object{Name: "meet", Size: 500, Code: &api.Code{Data: 1, Parity: 1}, Manifest: []byte("{}")}
	var on wire.DeviceID
	for i, data := range [][]byte{a, b} {
		id := chunk.Sum(data).String()
		o.Chunks = append(o.Chunks, api.Chunk{ID: id, Size: 500})
		if i == 0 {
			p, err := w.op.PutShard(testContext(t), id, data, "one")
			must(t, err)
			on = p.Holders[0].Device
			continue
		}
		for w.claimedBy(id) != on { // another token does not know of the first
			p, err := w.op.PutShard(testContext(t), id, data, "two")
			must(t, err)
			if p.Holders[0].Device == on {
				break
			}
			_, err = w.storage.chunks.change(testContext(t), id, func(c *chunkRecord, _ bool) error { c.Holders = nil; return nil })
			must(t, err)
			w.storage.stripes.leave("two", p.Holders[0].Device)
		}
	}
	_, err := w.op.PutObject(testContext(t), o)
	wantRefusal(t, err, http.StatusConflict, "not_apart")
	for _, ch := range o.Chunks {
		if refs := w.chunkRecord(t, ch.ID).Refs; len(refs) != 0 {
			t.Errorf("claimed by %v", refs)
		}
	}
	st, err := w.op.Stripe(testContext(t), api.StripeRequest{Token: "three", Code: *o.Code, Size: 500, Chunks: []string{o.Chunks[0].ID, o.Chunks[1].ID}})
	must(t, err)
	if len(st.Placed) != 1 {
		t.Fatalf("%d of two are said to be placed", len(st.Placed))
	}
	_, err = w.op.PutShard(testContext(t), o.Chunks[1].ID, b, "three")
	must(t, err)
	_, err = w.op.PutObject(testContext(t), o)
	must(t, err)
	must(t, w.op.RemoveObject(testContext(t), "meet"))
}

// claimedBy is the only holder of a chunk.
func (w *world) claimedBy(id string) wire.DeviceID {
	c, _ := w.storage.chunks.get(id)
	if len(c.Holders) == 0 {
		return ""
	}
	return c.Holders[0].Device
}

func TestCodedObjectsThatCannotBeAreRefused(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	w.devices(t, 3)
	var ids []string
	for range 6 {
		data := someBytes(100)
		ids = append(ids, chunk.Sum(data).String())
		_, err := w.op.PutChunk(testContext(t), ids[len(ids)-1], data, 3)
		must(t, err)
	}
	good := func() api.Object {
		o := api.Object{Name: "bad/coded", Size: 200, Code: &api.Code{Data: 2, Parity: 1}, Manifest: []byte("{}")}
		for _, id := range ids[:3] {
			o.Chunks = append(o.Chunks, api.Chunk{ID: id, Size: 100})
		}
		return o
	}
	for name, c := range map[string]struct {
		spoil func(o *api.Object)
		code  string
	}{
		"no data":            {func(o *api.Object) { o.Code = &api.Code{Parity: 3} }, "bad_code"},
		"negative parity":    {func(o *api.Object) { o.Code = &api.Code{Data: 4, Parity: -1} }, "bad_code"},
		"too many shards":    {func(o *api.Object) { o.Code = &api.Code{Data: 30, Parity: 3} }, "bad_code"},
		"half a stripe":      {func(o *api.Object) { o.Chunks = o.Chunks[:2] }, "bad_object"},
		"unequal sizes":      {func(o *api.Object) { o.Chunks[1].Size = 99 }, "bad_object"},
		"one shard twice":    {func(o *api.Object) { o.Chunks[1] = o.Chunks[0] }, "bad_object"},
		"more than its room": {func(o *api.Object) { o.Size = 201 }, "bad_object"},
		"a negative size":    {func(o *api.Object) { o.Size = -1 }, "bad_object"},
		"no manifest":        {func(o *api.Object) { o.Manifest = nil }, "bad_object"},
		"a large manifest":   {func(o *api.Object) { o.Manifest = make([]byte, api.MaxManifest+1) }, "bad_object"},
		"a digest to see":    {func(o *api.Object) { o.SHA256 = strings.Repeat("0", 64) }, "bad_object"},
		"manifest, no code":  {func(o *api.Object) { o.Code = nil }, "bad_object"},
		"a chunk nobody has": {func(o *api.Object) { o.Chunks[2].ID = chunk.Sum([]byte("?")).String() }, "chunk_missing"},
	} {
		o := good()
		c.spoil(&o)
		_, err := w.op.PutObject(testContext(t), o)
		if e := new(api.Error); err == nil || !asError(err, &e) || e.Code != c.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := w.op.PutObject(testContext(t), good())
	must(t, err)
	other := good() // the same name, other shards
	other.Chunks[2] = api.Chunk{ID: ids[4], Size: 100}
	_, err = w.op.PutObject(testContext(t), other)
	wantRefusal(t, err, http.StatusConflict, "exists")
	_, err = w.op.RunJob(testContext(t), api.JobSpec{Module: w.module(t), Input: &api.JobChunk{Object: "bad/coded"}})
	wantRefusal(t, err, http.StatusConflict, "encrypted")
	must(t, w.op.RemoveObject(testContext(t), "bad/coded"))
}

func asError(err error, into **api.Error) bool {
	e, ok := err.(*api.Error)
	*into = e
	return ok
}

func TestStripesAreForgotten(t *testing.T) {
	now := time.Now()
	s := stripes{now: func() time.Time { return now }}
	for i := range 1000 {
		s.take(fmt.Sprint(i), "a", "c")
	}
	if s.take("0", "a", "other") || !s.take("0", "a", "c") {
		t.Error("a device took two chunks of a stripe, or not one twice")
	}
	now = now.Add(stripeLife + time.Minute)
	s.take("new", "a", "c")
	if len(s.rows) != 1 {
		t.Errorf("%d stripes are remembered", len(s.rows))
	}
}

// Of equals it is drawn; but first come owners, then networks, that a stripe
// does not have yet.
func TestAStripeSpreadsByOwnerAndNetwork(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	fit := []offer{
		{device: "same owner", weight: 1 << 40, owner: "carol", net: netip.MustParsePrefix("192.0.2.0/24")},
		{device: "same network", weight: 1 << 40, owner: "dave", net: netip.MustParsePrefix("198.51.100.0/24")},
		{device: "far and small", weight: 1, owner: "erin", net: netip.MustParsePrefix("203.0.113.0/24")},
	}
	for range 100 {
		have := around{map[string]int{"carol": 1}, map[netip.Prefix]int{fit[1].net: 1}}
		if got := drawDevices(fit, have, 3, rng.ExpFloat64); !slices.Equal(got, []wire.DeviceID{"far and small", "same network", "same owner"}) {
			t.Fatalf("drawn: %v", got)
		}
	}
	w := aWorld(t)
	devices := w.devices(t, 4)
	owners := map[wire.DeviceID]string{}
	for i, d := range devices {
		owner := []string{"carol", "carol", "carol", "dave"}[i]
		owners[d.id] = owner
		_, err := w.op.ChangeDevices(testContext(t), api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{d.id}}, SetLabels: map[string]string{ownerLabel: owner}})
		must(t, err)
	}
	for round := range 60 { // both at once, as they are put
		token, went := fmt.Sprintf("owners-%d", round), make([]string, 2)
		var both errgroup.Group
		for i := range went {
			data := someBytes(300)
			both.Go(func() error {
				p, err := w.op.PutShard(testContext(t), chunk.Sum(data).String(), data, token)
				if err == nil {
					went[i] = owners[p.Holders[0].Device]
				}
				return err
			})
		}
		must(t, both.Wait())
		if went[0] == went[1] {
			t.Errorf("both shards went to %s", went[0])
		}
		data := someBytes(300)
		p, err := w.op.PutChunk(testContext(t), chunk.Sum(data).String(), data, 2)
		must(t, err)
		if a, b := owners[p.Holders[0].Device], owners[p.Holders[1].Device]; a == b {
			t.Errorf("both copies of a chunk went to %s", a)
		}
	}
}

func TestNetworksAreToldApartByTheirPrefix(t *testing.T) {
	n := networks{now: time.Now}
	of := func(d wire.DeviceID) netip.Prefix { return n.of(api.DeviceRecord{ID: d}) }
	for d, a := range map[wire.DeviceID]string{"a": "192.0.2.1", "b": "192.0.2.200", "c": "192.0.3.1", "d": "2001:db8:1:2::3", "e": "2001:db8:1:ffff::", "f": "2001:db8:2::", "g": "::ffff:192.0.2.9", "h": "nonsense"} {
		n.came(d, a)
	}
	for _, same := range [][2]wire.DeviceID{{"a", "b"}, {"d", "e"}, {"a", "g"}} {
		if of(same[0]) != of(same[1]) {
			t.Errorf("%v are in %s and %s", same, of(same[0]), of(same[1]))
		}
	}
	for _, other := range [][2]wire.DeviceID{{"a", "c"}, {"d", "f"}, {"a", "d"}} {
		if of(other[0]) == of(other[1]) {
			t.Errorf("%v are both in %s", other, of(other[0]))
		}
	}
	if of("h").IsValid() {
		t.Error("nonsense is a network")
	}
}

// A coordinator that starts anew spreads over the networks that it knew, before any
// device has called.
func TestNetworksAreKnownAfterARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	devices := w.devices(t, 4)
	for i, d := range devices {
		from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, byte(i/3), 1)}} // the last one is elsewhere
		d.http.Transport.(*http.Transport).DialContext = from.DialContext
		if status, _ := d.transfer(http.MethodGet, "/data/v1/repo/none", nil); status != http.StatusNotFound {
			t.Fatalf("the call was answered with %d", status)
		}
	}
	w.Close()
	w = open(t, dir)
	defer w.Close()
	for _, d := range devices {
		d.connect(w)
	}
	for range 30 { // by chance both would be near to one another every other time
		if got := w.storage.candidates("", 1, nil, 2); len(got) != 2 || !slices.Contains(got, devices[3].id) {
			t.Fatalf("two copies would go to %v, not one to %s", got, devices[3].id)
		}
	}
	// One that moves is on record again, but not each time.
	writes := 0
	for i, want := range []bool{true, false, false} {
		w.advance(time.Duration(min(i, 1)) * networkKeep / 4)
		rec, err := w.reg.device(devices[0].id)
		must(t, err)
		w.storage.calledFrom(testContext(t), rec.ID, fmt.Sprintf("198.51.%d.1", i))
		now, err := w.reg.device(rec.ID)
		must(t, err)
		if wrote := now.Network != rec.Network; wrote != want {
			t.Errorf("call %d from another network: on record %v, want %v", i, wrote, want)
		} else if wrote {
			writes++
		}
		if got := w.storage.networks.of(now).String(); got != fmt.Sprintf("198.51.%d.0/24", i) {
			t.Errorf("it counts as in %s", got)
		}
	}
	w.advance(networkKeep)
	w.storage.calledFrom(testContext(t), devices[0].id, "198.51.100.1")
	if rec, err := w.reg.device(devices[0].id); err != nil || rec.Network != "198.51.100.0/24" || writes != 1 {
		t.Errorf("an hour later it is on record as in %s (%v)", rec.Network, err)
	}
}

// Who is in trouble, or is not trusted, is asked less, or not at all.
func TestHealthAndTrustWeigh(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	view := func(health ...wire.Warning) api.Device {
		rec, err := w.reg.device(d.id)
		must(t, err)
		v := w.reg.view(rec)
		v.Health = health
		return v
	}
	well := w.storage.weight(view(), 100)
	troubled := w.storage.weight(view(wire.Warning{Severity: wire.Info}, wire.Warning{Severity: wire.Trouble}), 100)
	critical := w.storage.weight(view(wire.Warning{Severity: wire.Critical}, wire.Warning{Severity: wire.Trouble}), 100)
	if !(well > troubled && troubled > critical && critical > 0) || w.storage.weight(view(), 1<<31) != 0 {
		t.Errorf("weights: well %g, troubled %g, critical %g", well, troubled, critical)
	}
	trust := w.storage.trust
	defer func() { w.storage.trust = trust }()
	w.storage.trust = func(wire.DeviceID) float64 { return 0.5 }
	if got := w.storage.weight(view(), 100); got != well/2 {
		t.Errorf("half trusted: %g of %g", got, well)
	}
	w.storage.trust = func(wire.DeviceID) float64 { return 0 }
	if len(w.storage.candidates("", 100, nil, 1)) != 0 {
		t.Error("who is not trusted is asked")
	}
}

func TestApartIsAMatching(t *testing.T) {
	on := func(devices ...wire.DeviceID) (c chunkRecord) {
		for _, d := range devices {
			c.Holders = append(c.Holders, api.Holder{Device: d})
		}
		return c
	}
	gone := on("c")
	gone.Holders[0].Lost = true
	for name, c := range map[string]struct {
		chunks []chunkRecord
		want   bool
	}{
		"each its own":           {[]chunkRecord{on("a"), on("b"), on("c")}, true},
		"two on one":             {[]chunkRecord{on("a"), on("b"), on("a")}, false},
		"the second copy helps":  {[]chunkRecord{on("a", "b"), on("a")}, true},
		"a chain of second ones": {[]chunkRecord{on("a", "b"), on("a", "c"), on("a"), on("b", "d")}, true},
		"three on two":           {[]chunkRecord{on("a", "b"), on("a", "b"), on("a", "b")}, false},
		"one is lost":            {[]chunkRecord{on("a"), gone}, false},
		"none":                   {nil, true},
	} {
		if got := apart(c.chunks); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

func TestOneHolderCanBeAsked(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	devices := w.devices(t, 2)
	data := someBytes(700)
	id := chunk.Sum(data).String()
	_, err := w.op.PutChunk(testContext(t), id, data, 2)
	must(t, err)
	for _, d := range devices {
		got, err := w.op.GetChunkFrom(testContext(t), id, d.id)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%v", err)
		}
	}
	// What says nothing of the chunk is not said of it.
	for code, want := range map[string]string{wire.CodeUnreachable: wire.CodeUnreachable, wire.CodeTransfer: codeNoAnswer, wire.CodeLimit: codeNoAnswer, wire.CodeMismatch: "unreadable"} {
		devices[0].on(wire.KindChunkServe, func(wire.Order) *reply { return failed(code) })
		_, err = w.op.GetChunkFrom(testContext(t), id, devices[0].id)
		wantRefusal(t, err, http.StatusServiceUnavailable, want)
	}
	devices[0].on(wire.KindChunkServe, silent)
	w.storage.wait = 100 * time.Millisecond
	_, err = w.op.GetChunkFrom(testContext(t), id, devices[0].id)
	w.storage.wait = w.cfg.serve
	wantRefusal(t, err, http.StatusServiceUnavailable, codeNoAnswer)
	// The coordinator's own fault is no device's.
	if err := w.storage.unserved(devices[0].id, errors.New("the disk is full")); wire.ProblemOf(err).Code != wire.CodeInternal {
		t.Errorf("%v", err)
	}
	devices[0].on(wire.KindChunkServe, func(wire.Order) *reply { return failed(wire.CodeLost) })
	for range 2 { // it is lost from then on
		_, err = w.op.GetChunkFrom(testContext(t), id, devices[0].id)
		if e := new(api.Error); !asError(err, &e) || e.Code != wire.CodeLost {
			t.Errorf("%v", err)
		}
	}
	devices[1].leave()
	_, err = w.op.GetChunkFrom(testContext(t), id, devices[1].id)
	wantRefusal(t, err, http.StatusServiceUnavailable, "offline")
	_, err = w.op.GetChunkFrom(context.Background(), id, "nobody")
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
}
