package coordinator

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// lossReply is what a device answers that has lost ids.
func lossReply(ids ...string) *reply {
	list := []wire.ChunkLoss{}
	for _, id := range slices.Sorted(slices.Values(ids)) {
		list = append(list, wire.ChunkLoss{ID: id, Size: 1, Volume: "v", Reason: "its bytes have changed on disk", Found: time.Now()})
	}
	raw, _ := json.Marshal(list)
	return &reply{state: wire.Succeeded, body: wire.LossReport{Digest: wire.LossDigest(ids), Count: len(ids)}, attachment: raw}
}

// losing has a device's heartbeat heard, and what follows from it done.
func (w *world) losing(t *testing.T, d *device, digest string) {
	t.Helper()
	w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, Losses: digest})
	must(t, w.losses.settle(testContext(t), d.id))
}

func (w *world) lossRow(d *device) lossRow {
	row, _ := w.losses.rows.get(string(d.id))
	return row
}

// endsLosses waits until the newest order about losses is dealt with.
func (w *world) endsLosses(t *testing.T, d *device) lossRow {
	t.Helper()
	eventually(t, "the answer about losses is dealt with", func() bool { return !w.lossRow(d).open() })
	return w.lossRow(d)
}

// placed stores n chunks on the only device there is.
func (w *world) placed(t *testing.T, n int) (ids []string) {
	t.Helper()
	for range n {
		data := make([]byte, 5000)
		rand.Read(data)
		id := chunk.Sum(data).String()
		_, err := w.storage.place(testContext(t), id, data, 1, "")
		must(t, err)
		ids = append(ids, id)
	}
	return ids
}

func (w *world) isLost(t *testing.T, d *device, id string) bool {
	t.Helper()
	c, ok := w.storage.chunks.get(id)
	i := slices.IndexFunc(c.Holders, func(h api.Holder) bool { return h.Device == d.id })
	if !ok || i < 0 {
		t.Fatalf("chunk %s is not known to be on %s", id, d.id)
	}
	return c.Holders[i].Lost
}

// confessions are those that the score has heard from a device.
func (w *world) confessions(t *testing.T, d *device) (out []api.Audit) {
	t.Helper()
	all, err := w.audits.list(testContext(t), api.AuditQuery{Device: d.id, Limit: 100})
	must(t, err)
	for _, a := range all.Audits {
		if a.Kind != api.Confession {
			continue
		}
		rec, err := w.audits.rows.find(testContext(t), auditKey(api.Audit{ID: a.ID, Device: a.Device}))
		must(t, err)
		out = append(out, rec)
	}
	return out
}

func TestALossIsNotedScoredAndForgottenBeforeItIsAskedFor(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	ids := w.placed(t, 3)
	stranger := strings.Repeat("ab", 32) // nobody knows why it has that
	lost := []string{ids[0], ids[1], stranger}
	drops := make(chan wire.ChunkDrop, 10)
	d.on(wire.KindChunkDrop, func(o wire.Order) *reply {
		b, _ := wire.DecodeBody[wire.ChunkDrop](o)
		drops <- b
		return &reply{state: wire.Succeeded}
	})
	d.on(wire.KindChunkLosses, func(wire.Order) *reply { return lossReply(lost...) })
	for _, none := range []string{"", "odd", strings.ToUpper(wire.LossDigest(lost))} {
		if w.losing(t, d, none); w.lossRow(d).Order != "" {
			t.Fatalf("it was asked because of %q", none)
		}
	}
	w.losing(t, d, wire.LossDigest(lost))
	row := w.endsLosses(t, d)
	if !w.isLost(t, d, ids[0]) || !w.isLost(t, d, ids[1]) || w.isLost(t, d, ids[2]) {
		t.Error("the wrong holders are noted as lost")
	}
	if got := <-drops; !got.OnlyLost || !slices.Equal(slices.Sorted(slices.Values(got.IDs)), slices.Sorted(slices.Values(lost))) {
		t.Errorf("dropped are %+v", got)
	}
	confessions := w.confessions(t, d)
	if len(confessions) != 1 || confessions[0].Order != row.Order || !slices.Equal(confessions[0].Lost, slices.Sorted(slices.Values(ids[:2]))) {
		t.Errorf("the score heard %+v", confessions)
	}
	if !slices.ContainsFunc(w.entries(t), func(e api.LogEntry) bool {
		return e.Action == "device.chunks-lost" && strings.Contains(string(e.Request), `"2"`)
	}) {
		t.Error("it is not on the audit log")
	}
	// The device that does not forget is not asked all the time.
	w.advance(lossRest / 2)
	if w.losing(t, d, wire.LossDigest(lost)); w.lossRow(d).Order != row.Order {
		t.Error("it was asked for what was dealt with")
	}
	w.advance(lossRest)
	if w.losing(t, d, wire.LossDigest(lost)); w.lossRow(d).Order == row.Order {
		t.Error("it was not asked again after a day")
	}
	w.endsLosses(t, d)
	// Others are asked for soon.
	lost = []string{ids[2]}
	w.advance(lossPause)
	w.losing(t, d, wire.LossDigest(lost))
	if w.endsLosses(t, d); !w.isLost(t, d, ids[2]) {
		t.Error("a later loss was not noted")
	}
}

// A hello tells of losses, too: of those that were found at the start.
func TestAHelloTellsOfLosses(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	ids := w.placed(t, 1)
	d.on(wire.KindChunkLosses, func(wire.Order) *reply { return lossReply(ids...) })
	w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: strings.Repeat("6", 32), Losses: wire.LossDigest(ids), At: time.Now()})
	eventually(t, "the loss is noted", func() bool { return w.isLost(t, d, ids[0]) })
}

// What was stored there again since is whole: it is neither noted nor dropped.
func TestAReceiptThatIsNewerThanALossStands(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	ids := w.placed(t, 2)
	d.on(wire.KindChunkLosses, func(wire.Order) *reply { return lossReply(ids[0]) })
	w.losing(t, d, wire.LossDigest(ids[:1]))
	row := w.endsLosses(t, d)
	o, err := w.outbox.get(testContext(t), d.id, row.Order)
	must(t, err)
	eventually(t, "the chunk is dropped", func() bool { return len(w.outbox.unfinished(wire.KindChunkDrop)) == 0 })
	data := make([]byte, 100)
	again := chunk.Sum(data).String()
	_, err = w.storage.place(testContext(t), again, data, 1, "")
	must(t, err)
	if whole, err := w.losses.deal(testContext(t), o, []string{again}); err != nil || whole || w.isLost(t, d, again) {
		t.Errorf("a chunk that was stored after the answer is lost by it: %v, %v", whole, err)
	}
	if n := len(w.outbox.unfinished(wire.KindChunkDrop)); n != 0 {
		t.Errorf("%d orders to drop it", n)
	}
	// And one that is on its way there, whose receipt may come at any time.
	d.on(wire.KindChunkStore, silent)
	_, err = w.outbox.submit(testContext(t), d.id, wire.KindChunkStore, wire.ChunkStore{ID: ids[1], Size: 5000, URL: "/data/v1/x"}, storeLife)
	must(t, err)
	if whole, err := w.losses.deal(testContext(t), o, ids[1:]); err != nil || whole || w.isLost(t, d, ids[1]) {
		t.Errorf("a chunk that is being stored is lost: %v, %v", whole, err)
	}
}

func TestAListOfLossesThatIsNoneIsRefusedAndAskedForLessOften(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	ids := w.placed(t, 1)
	w.freeze()
	some := lossReply(ids...)
	lie := *some
	lie.body = wire.LossReport{Digest: digestOf("x"), Count: 1}
	few := *some
	few.body = wire.LossReport{Digest: wire.LossDigest(ids)}
	none := *some
	none.attachment = nil
	many := make([]string, wire.MaxLosses+1)
	for i := range many {
		many[i] = fmt.Sprintf("%064x", i)
	}
	pause := lossPause
	for i, bad := range []*reply{
		{state: wire.Succeeded, body: "odd", attachment: []byte("[]")}, {state: wire.Succeeded, body: wire.LossReport{Count: 1}, attachment: []byte(`[{"id":"odd"}]`)},
		{state: wire.Failed, code: wire.CodeInternal}, {state: wire.Succeeded, attachment: []byte(`{}`)}, &lie, &few, &none, lossReply(many...),
	} {
		d.on(wire.KindChunkLosses, func(wire.Order) *reply { return bad })
		before := w.lossRow(d).Order
		w.losing(t, d, digestOf(fmt.Sprint(i)))
		row := w.endsLosses(t, d)
		if row.Order == before || row.Vain != i+1 {
			t.Fatalf("answer %d: %+v", i, row)
		}
		if w.isLost(t, d, ids[0]) {
			t.Fatalf("answer %d was believed", i)
		}
		pause *= 2
		w.advance(pause - time.Second)
		if w.losing(t, d, digestOf("more")); w.lossRow(d).Order != row.Order {
			t.Fatalf("it was asked again before %s", pause)
		}
		w.advance(time.Second)
	}
	d.on(wire.KindChunkLosses, func(wire.Order) *reply { return some })
	w.losing(t, d, wire.LossDigest(ids))
	if row := w.endsLosses(t, d); row.Vain != 0 || !w.isLost(t, d, ids[0]) {
		t.Errorf("a good one: %+v", row)
	}
}

func TestAnAgentThatDoesNotKnowLossesIsNotAskedAgain(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	d.on(wire.KindChunkLosses, func(wire.Order) *reply { return &reply{state: wire.Rejected, code: wire.CodeUnknownKind} })
	w.losing(t, d, digestOf("a"))
	row := w.endsLosses(t, d)
	w.advance(10 * lossRest)
	if w.losing(t, d, digestOf("b")); w.lossRow(d).Order != row.Order {
		t.Error("it was asked again")
	}
}

// A coordinator may stop between any two steps.
func TestLossesThatWereCutOffAreDealtWith(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	ids := w.placed(t, 1)
	d.on(wire.KindChunkLosses, func(wire.Order) *reply { return lossReply(ids...) })
	_, err := w.losses.rows.change(context.Background(), string(d.id), func(v *lossRow, _ bool) error {
		v.Order, v.Asked = ulid.Make().String(), w.now().UTC()
		return nil
	})
	must(t, err)
	w.losses.sweep()
	w.endsLosses(t, d)
	if !w.isLost(t, d, ids[0]) {
		t.Error("an order that was not made is not made")
	}
	// All done, and not written down: done again, it changes nothing.
	order := w.lossRow(d).Order
	_, err = w.losses.rows.change(context.Background(), string(d.id), func(v *lossRow, _ bool) error {
		v.Ended = ""
		return nil
	})
	must(t, err)
	w.losses.sweep()
	if row := w.endsLosses(t, d); row.Order != order {
		t.Error("it was asked anew")
	}
	if n := len(w.confessions(t, d)); n != 1 {
		t.Errorf("the score heard it %d times", n)
	}
}

// What a device says of its scrubs can be shown, whatever it is.
func TestScrubsAreShownAndBounded(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	many := make([]wire.Scrub, 3*wire.MaxScrubs)
	many[0] = wire.Scrub{Volume: "v\n", Dir: "/mnt/\x1b[1m" + strings.Repeat("a", 500), Share: -7, Bytes: -1, Lost: -1, Problem: strings.Repeat("p", 10_000)}
	w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, Scrubs: many})
	v, err := w.op.Device(testContext(t), string(d.id))
	must(t, err)
	if len(v.Scrubs) != wire.MaxScrubs {
		t.Fatalf("%d are shown", len(v.Scrubs))
	}
	if s := v.Scrubs[0]; s.Volume != "v" || strings.ContainsRune(s.Dir, 0x1b) || len(s.Dir) > maxLabel || s.Share != 0 || s.Bytes != 0 || s.Lost != 0 || len(s.Problem) > maxWarningText+5 {
		t.Errorf("%+v", s)
	}
}

// What a device does not have when it is read costs it, once for a loss of many
// chunks, whether it tells of it afterwards or not; and it can be shown to others.
func TestALossThatAReadFindsCosts(t *testing.T) {
	t.Parallel()
	for _, code := range []string{wire.CodeLost, wire.CodeNotFound} {
		w := ownWorld(t)
		ctx := testContext(t)
		d := w.device(t)
		ids := w.placed(t, 4)
		read := func(id string) {
			t.Helper()
			if _, err := w.storage.read(ctx, id); err == nil {
				t.Fatal("what the device does not have was read")
			}
		}
		d.on(wire.KindChunkServe, func(wire.Order) *reply { return failed(wire.CodeMetered) })
		if read(ids[0]); w.audits.scoreOf(d.id).integrity() != 1 || w.isLost(t, d, ids[0]) {
			t.Error("a device that does not serve for another reason has lost something")
		}
		d.on(wire.KindChunkServe, func(wire.Order) *reply { return failed(code) })
		w.advance(time.Hour)
		if read(ids[0]); !w.isLost(t, d, ids[0]) {
			t.Error("the holder is not noted as lost")
		}
		is := w.audits.scoreOf(d.id).integrity()
		told := w.confessions(t, d)
		if is == 1 || len(told) != 1 || told[0].Penalty == nil || !slices.Equal(told[0].Lost, ids[:1]) {
			t.Fatalf("%s: integrity %v, the score heard %+v", code, is, told)
		}
		raw, err := w.op.Evidence(ctx, told[0].ID)
		must(t, err)
		if v, err := CheckEvidence(raw, EvidenceChecks{}); err != nil || !slices.Equal(v.Lost, ids[:1]) {
			t.Errorf("the evidence shows %+v %v", v, err)
		}
		// Another chunk of the same disk, and then all of them by itself.
		if read(ids[1]); !w.isLost(t, d, ids[1]) {
			t.Error("the second holder is not noted as lost")
		}
		d.on(wire.KindChunkLosses, func(wire.Order) *reply { return lossReply(ids[:2]...) })
		w.losing(t, d, wire.LossDigest(ids[:2]))
		w.endsLosses(t, d)
		if got := w.audits.scoreOf(d.id).integrity(); got < is || len(w.confessions(t, d)) != 1 {
			t.Errorf("it was counted again: %v, then %v", is, got)
		}
		w.advance(missedApart)
		if read(ids[2]); w.audits.scoreOf(d.id).integrity() >= is {
			t.Error("another loss, later, costs nothing")
		}
	}
}

// A chunk that a device is told to drop is none that it owes.
func TestWhatADeviceMayDropIsNotMissed(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	id := w.placed(t, 1)[0]
	d.on(wire.KindChunkDrop, silent)
	_, err := w.outbox.submit(ctx, d.id, wire.KindChunkDrop, wire.ChunkDrop{IDs: []string{id}}, time.Minute)
	must(t, err)
	d.on(wire.KindChunkServe, func(wire.Order) *reply { return failed(wire.CodeNotFound) })
	if _, err := w.storage.read(ctx, id); err == nil {
		t.Fatal("what the device does not have was read")
	}
	if got := w.audits.scoreOf(d.id).integrity(); got != 1 {
		t.Errorf("integrity %v", got)
	}
}

// A coordinator that ends between the record of a confession and its score counts it
// when it comes to it again.
func TestAConfessionThatWasCutOffIsCounted(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	id := w.placed(t, 1)[0]
	order := ulid.Make().String()
	rec := api.Audit{ID: order, Kind: api.Confession, Device: d.id, Order: order, At: w.time().UTC(), Routine: true, Outcome: api.AuditLost, Lost: []string{id}}
	_, err := w.audits.put(ctx, w.audits.rows, auditKey(rec), rec) // the coordinator ends here
	must(t, err)
	for range 2 {
		must(t, w.audits.confessed(ctx, d.id, []string{id}, order))
	}
	if s := w.audits.scoreOf(d.id); len(s.Penalties) != 1 || !w.isLost(t, d, id) {
		t.Errorf("%+v", s)
	}
}

// What is on no device any more is not said to come back when one is online.
func TestAChunkThatIsGoneIsSaidToBe(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	id := w.placed(t, 1)[0]
	c := w.chunkRecord(t, id)
	must(t, w.storage.lost(ctx, d.id, []string{id}))
	_, err := w.op.GetChunk(ctx, id)
	wantRefusal(t, err, http.StatusGone, wire.CodeLost)
	must(t, w.storage.chunks.remove(ctx, id, func(chunkRecord) bool { return true }))
	d.leave()
	_, err = w.storage.readAny(ctx, c, nil) // who has read its record before
	if r := explain(err, false); r.status != http.StatusNotFound || r.Code != wire.CodeNotFound {
		t.Error(err)
	}
}
