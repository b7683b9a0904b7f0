package coordinator

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// lied is the evidence of a storage challenge that a device has answered with one
// wrong leaf and one confession.
func lied(t *testing.T, w *world) (*device, api.Audit, []byte) {
	t.Helper()
	d, _, chunks := auditScene(t, w)
	honest := someBytes(30_000)
	_, err := w.op.PutChunk(testContext(t), chunk.Sum(honest).String(), honest, 2)
	must(t, err)
	gone := chunks[1]
	d.mu.Lock()
	delete(d.chunks, gone)
	d.mu.Unlock()
	d.on(wire.KindAudit, func(o wire.Order) *reply {
		r := d.prove(o, func(_ *wire.AuditAnswer, l []wire.AuditLeaf) []wire.AuditLeaf {
			for i := range l {
				if l[i].Chunk == chunks[2] {
					l[i].Data[7] ^= 1
					break
				}
			}
			return l
		})
		r.bulk = true
		return r
	})
	a, err := w.audits.challenge(testContext(t), w.storage.held(d.id), []wire.AuditItem{{Chunk: gone, Leaf: 1}, {Chunk: chunks[2]}, {Chunk: chunks[2], Leaf: 3}, {Chunk: chunk.Sum(honest).String(), Leaf: 2}}, api.Audit{Device: d.id})
	must(t, err)
	if a.Outcome != api.AuditWrong || len(a.Wrong) != 1 || len(a.Lost) != 1 || !a.Evidence {
		t.Fatalf("%+v", a)
	}
	raw, err := w.op.Evidence(testContext(t), a.ID)
	must(t, err)
	return d, a, raw
}

func (w *world) orderKey() ed25519.PublicKey { return w.auth.orderKey.Public().(ed25519.PublicKey) }

func TestEvidenceIsJudgedWithoutTheCoordinator(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d, a, raw := lied(t, w)
	v, err := CheckEvidence(raw, EvidenceChecks{OrderKey: w.orderKey()})
	if err != nil || v.Device != d.id || v.Order != a.Order || v.Outcome != api.AuditWrong || !reflect.DeepEqual(v.Wrong, a.Wrong) || !reflect.DeepEqual(v.Lost, a.Lost) {
		t.Errorf("%+v %v", v, err)
	}
	if _, err := CheckEvidence(raw, EvidenceChecks{OrderKey: newKey(t).Public().(ed25519.PublicKey)}); err == nil {
		t.Error("an order of another coordinator is taken")
	}
	_, err = w.op.Evidence(testContext(t), "01ARZ3NDEKTSV4RRFFQ69G5FAV")
	wantRefusal(t, err, 404, wire.CodeNotFound)
}

// forge changes evidence as its fields have it.
func forge(t *testing.T, raw []byte, f func(e *api.Evidence)) []byte {
	t.Helper()
	var e api.Evidence
	must(t, json.Unmarshal(raw, &e))
	f(&e)
	out, err := json.Marshal(e)
	must(t, err)
	return out
}

// Each is what a coordinator might try that wants to be rid of an honest device,
// or a device's friend who wants a lie to look like none.
func TestForgedEvidenceIsRefused(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d, a, raw := lied(t, w)
	other := newKey(t)
	reseal := func(env []byte, key ed25519.PrivateKey, typ wire.PayloadType, change func(m map[string]any)) []byte {
		m, err := wire.Reread[map[string]any](env)
		must(t, err)
		change(m)
		out, err := wire.Seal(key, typ, m)
		must(t, err)
		return out
	}
	for name, c := range map[string]struct {
		f    func(e *api.Evidence)
		says string
	}{
		"another device's key":       {func(e *api.Evidence) { e.DeviceKey = other.Public().(ed25519.PublicKey) }, "key"},
		"another device":             {func(e *api.Evidence) { e.Device = wire.IDOf(other.Public().(ed25519.PublicKey)) }, "key"},
		"an order of another kind":   {func(e *api.Evidence) { e.Kind = api.ComputeAudit }, "kind"},
		"a report signed by another": {func(e *api.Evidence) { e.Report = reseal(e.Report, other, wire.TypeReport, func(map[string]any) {}) }, "report"},
		"an order signed by another": {func(e *api.Evidence) { e.Order = reseal(e.Order, other, wire.TypeOrder, func(map[string]any) {}) }, "order"},
		"another order": {func(e *api.Evidence) {
			e.Order = reseal(e.Order, w.auth.orderKey, wire.TypeOrder, func(m map[string]any) { m["id"] = "X" })
		}, "not on this order"},
		"the same order, another nonce": {func(e *api.Evidence) {
			e.Order = reseal(e.Order, w.auth.orderKey, wire.TypeOrder, func(m map[string]any) { m["body"].(map[string]any)["nonce"] = "00" })
		}, "claims"},
		"an order for somebody else": {func(e *api.Evidence) {
			e.Order = reseal(e.Order, w.auth.orderKey, wire.TypeOrder, func(m map[string]any) { m["device"] = "x" })
		}, "for device"},
		"a report before the order": {func(e *api.Evidence) {
			e.Report = reseal(e.Report, d.key, wire.TypeReport, func(m map[string]any) { m["at"] = "2020-01-01T00:00:00Z"; m["time_confidence"] = "trusted" })
		}, "before the order"},
		"a report that is no end": {func(e *api.Evidence) {
			e.Report = reseal(e.Report, d.key, wire.TypeReport, func(m map[string]any) { m["state"] = "RUNNING" })
		}, "no end"},
		"a report that was given up": {func(e *api.Evidence) {
			e.Report = reseal(e.Report, d.key, wire.TypeReport, func(m map[string]any) { m["dropped"] = true })
		}, "outbox"},
		"leaves that were not signed": {func(e *api.Evidence) {
			e.Attachment = bytes.Replace(e.Attachment, []byte(`"leaf":`), []byte(`"leaf": `), 1)
		}, "signed for"},
		"no leaves":                    {func(e *api.Evidence) { e.Attachment, e.Missing = nil, true }, "missing"},
		"no receipt":                   {func(e *api.Evidence) { delete(e.Receipts, a.Wrong[0]) }, "no receipt"},
		"no receipt for what was lost": {func(e *api.Evidence) { delete(e.Receipts, a.Lost[0]) }, "no receipt"},
		"another chunk's receipt":      {func(e *api.Evidence) { e.Receipts[a.Wrong[0]] = e.Receipts[a.Lost[0]] }, "is none"},
		"another size":                 {func(e *api.Evidence) { e.Sizes[a.Wrong[0]]++ }, "signed for"},
		"a loss made a lie":            {func(e *api.Evidence) { e.Wrong, e.Lost = append(e.Wrong, e.Lost...), nil }, "claims"},
		"a lie made a loss":            {func(e *api.Evidence) { e.Outcome = api.AuditLost }, "claims"},
		"nothing wrong after all":      {func(e *api.Evidence) { e.Outcome = api.AuditRight }, "wrong and lost only"},
		"of a later format":            {func(e *api.Evidence) { e.Format = 2 }, "format"},
		"the size of an honest leaf bent": {func(e *api.Evidence) {
			for id := range e.Sizes {
				if id != a.Wrong[0] && id != a.Lost[0] {
					e.Sizes[id] += chunk.LeafSize * 3
				}
			}
		}, "claims"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := CheckEvidence(forge(t, raw, c.f), EvidenceChecks{OrderKey: w.orderKey()})
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("it says %v, not of %q", err, c.says)
			}
		})
	}
}

// Any byte: either it is refused, or it means what it meant.
func TestNoByteOfEvidenceCanBeAltered(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	_, _, raw := lied(t, w)
	seed := testenv.Seed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	meaning := func(raw []byte) api.Evidence {
		var e api.Evidence
		must(t, json.Unmarshal(raw, &e))
		e.Audit, e.At = "", time.Time{} // nothing follows from them
		for _, env := range []*json.RawMessage{&e.Order, &e.Report} {
			*env = envelopeMeaning(t, *env)
		}
		for id, r := range e.Receipts {
			e.Receipts[id] = envelopeMeaning(t, r)
		}
		return e
	}
	want := meaning(raw)
	same, rounds := 0, 1500
	if testing.Short() {
		rounds = 200
	}
	for range rounds {
		bad := bytes.Clone(raw)
		at := rng.IntN(len(bad))
		bad[at] ^= byte(1 + rng.IntN(255))
		if _, err := CheckEvidence(bad, EvidenceChecks{OrderKey: w.orderKey()}); err != nil {
			continue
		}
		same++
		if !reflect.DeepEqual(meaning(bad), want) {
			t.Fatalf("seed %d: with byte %d %q as %q it passes, and means something else", seed, at, raw[at], bad[at])
		}
	}
	if same > rounds/10 {
		t.Errorf("seed %d: %d of %d changes passed", seed, same, rounds)
	}
	for n := range len(raw) / 97 { // cut off anywhere
		if _, err := CheckEvidence(raw[:n*97], EvidenceChecks{}); err == nil {
			t.Fatalf("the first %d bytes pass", n*97)
		}
	}
}

// envelopeMeaning is what an envelope carries: key ids are hints, and base64 may
// be written in several ways.
func envelopeMeaning(t *testing.T, raw []byte) json.RawMessage {
	t.Helper()
	v, err := wire.Reread[json.RawMessage](raw)
	must(t, err)
	return v
}

func TestEvidenceOfAJobNeedsTheJob(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d, _, _ := auditScene(t, w)
	module, err := w.op.PutModule(ctx, []byte("module"))
	must(t, err)
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		return d.compute(o, func(r *wire.JobResult, _ []byte) []byte {
			out := []byte("made up\n")
			r.Output = sumOf(out)
			return out
		})
	})
	a, err := w.op.Audit(ctx, api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: module})
	if err != nil || a.Outcome != api.AuditWrong || a.Got != sumOf([]byte("made up\n")) {
		t.Fatalf("%+v %v", a, err)
	}
	raw, err := w.op.Evidence(ctx, a.ID)
	must(t, err)
	if _, err := CheckEvidence(raw, EvidenceChecks{}); err == nil || !strings.Contains(err.Error(), "--module") {
		t.Errorf("without the job: %v", err)
	}
	job, err := JobOf(raw)
	must(t, err)
	d.mu.Lock()
	input := d.chunks[job.Input]
	d.mu.Unlock()
	out, err := toyCompute(ctx, []byte("module"), job.Args, input)
	must(t, err)
	if v, err := CheckEvidence(raw, EvidenceChecks{Output: out}); err != nil || v.Outcome != api.AuditWrong {
		t.Errorf("%+v %v", v, err)
	}
	if _, err := CheckEvidence(raw, EvidenceChecks{Output: []byte("made up\n")}); err == nil {
		t.Error("the device was right, and is wrong")
	}
	bent := forge(t, raw, func(e *api.Evidence) { e.Expected = sumOf(nil) })
	if _, err := CheckEvidence(bent, EvidenceChecks{Output: []byte{}}); err == nil || !strings.Contains(err.Error(), "commitment") {
		t.Errorf("another expectation: %v", err)
	}
}

// Orders are forgotten after a month, what a device has signed for is not.
func TestReceiptsOutliveTheirOrders(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	data := someBytes(5000)
	o := w.putFile(t, "old", data, 1)
	id := o.Chunks[0].ID
	must(t, w.audits.saveReceipts(ctx))
	if keys, err := w.audits.receipts.keys(ctx, ">"); err != nil || len(keys) != 0 {
		t.Errorf("%d receipts of the first day are kept twice: %v", len(keys), err)
	}
	w.advance(receiptAge + time.Minute)
	for range 2 {
		must(t, w.audits.saveReceipts(ctx))
	}
	must(t, w.outbox.rows.remove(ctx, orderKeyOf(d.id, w.storage.claim(d.id, id)), func(orderRow) bool { return true }))
	raw := w.audits.receiptOf(ctx, d.id, id)
	r, err := wire.OpenAs[wire.Report](raw, d.pub(), wire.TypeReport)
	if err != nil || !bytes.Contains(r.Body, []byte(id)) {
		t.Errorf("%s %v", r.Body, err)
	}
	must(t, w.op.RemoveObject(ctx, "old"))
	must(t, w.audits.saveReceipts(ctx))
	if keys, err := w.audits.receipts.keys(ctx, ">"); err != nil || len(keys) != 0 {
		t.Errorf("%d receipts of chunks that are gone: %v", len(keys), err)
	}
}
