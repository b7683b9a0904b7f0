package coordinator

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// auditScene is a device that holds a few chunks, each on another one too.
func auditScene(t testing.TB, w *world) (d, other *device, chunks []string) {
	t.Helper()
	d, other = w.device(t), w.device(t)
	return d, other, w.someChunks(t)
}

// someChunks places a few chunks on two devices.
func (w *world) someChunks(t testing.TB) (chunks []string) {
	t.Helper()
	for _, size := range []int{40, 20_000, 50_000} {
		data := someBytes(size)
		id := chunk.Sum(data).String()
		_, err := w.op.PutChunk(testContext(t), id, data, 2)
		must(t, err)
		chunks = append(chunks, id)
	}
	return chunks
}

func TestStorageChallenges(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	type leaves = []wire.AuditLeaf
	// each bends the answer of an honest device
	for name, c := range map[string]struct {
		bend func(d *device, a *wire.AuditAnswer, l leaves) leaves
		want api.AuditOutcome
	}{
		"honest": {nil, api.AuditRight},
		"one byte of one leaf": {func(_ *device, _ *wire.AuditAnswer, l leaves) leaves {
			l[len(l)/2].Data[0] ^= 1
			return l
		}, api.AuditWrong},
		"one byte of one path": {func(_ *device, _ *wire.AuditAnswer, l leaves) leaves {
			for i := range l {
				if len(l[i].Path) > 0 {
					l[i].Path[0][31] ^= 1
					break
				}
			}
			return l
		}, api.AuditWrong},
		"no path": {func(_ *device, _ *wire.AuditAnswer, l leaves) leaves {
			for i := range l {
				l[i].Path = nil
			}
			return l
		}, api.AuditWrong},
		"the leaf of another index": {func(d *device, _ *wire.AuditAnswer, l leaves) leaves {
			for i := range l {
				d.mu.Lock()
				data := d.chunks[l[i].Chunk]
				d.mu.Unlock()
				if n := chunk.LeafCount(int64(len(data))); n > 2 {
					l[i].Data, l[i].Path, _ = chunk.Prove(data, (l[i].Leaf+1)%(n-1))
					break
				}
			}
			return l
		}, api.AuditWrong},
		"the leaf of another chunk": {func(_ *device, _ *wire.AuditAnswer, l leaves) leaves {
			for i := range l {
				if l[i].Chunk != l[0].Chunk {
					l[i].Data, l[i].Path = l[0].Data, l[0].Path
				}
			}
			return l
		}, api.AuditWrong},
		"a leaf too few":  {func(_ *device, _ *wire.AuditAnswer, l leaves) leaves { return l[1:] }, api.AuditWrong},
		"a leaf too many": {func(_ *device, _ *wire.AuditAnswer, l leaves) leaves { return append(l, l[0]) }, api.AuditWrong},
		"no leaves":       {func(*device, *wire.AuditAnswer, leaves) leaves { return leaves{} }, api.AuditWrong},
		"another nonce": {func(_ *device, a *wire.AuditAnswer, l leaves) leaves {
			a.Nonce = newNonce()
			return l
		}, api.AuditWrong},
	} {
		t.Run(name, func(t *testing.T) {
			d, _, chunks := auditScene(t, w) // who has lied gets nothing any more
			before := map[string]bool{}
			for _, id := range chunks {
				before[id] = slices.Contains(holders(w.chunkRecord(t, id).Holders), d.id)
			}
			d.on(wire.KindAudit, func(o wire.Order) *reply {
				return d.prove(o, func(a *wire.AuditAnswer, l []wire.AuditLeaf) []wire.AuditLeaf {
					if c.bend == nil {
						return l
					}
					return c.bend(d, a, l)
				})
			})
			a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id, Leaves: 40})
			must(t, err)
			if a.Outcome != c.want {
				t.Fatalf("%s (%s), want %s", a.Outcome, a.Reason, c.want)
			}
			if r, err := wire.OpenAs[wire.Report](a.Report, d.pub(), wire.TypeReport); err != nil || r.Order != a.Order {
				t.Errorf("the evidence: %v", err)
			}
			if c.want == api.AuditRight && (a.Right != 40 || len(a.Wrong)+len(a.Lost) != 0) {
				t.Errorf("%d right, wrong %v, lost %v", a.Right, a.Wrong, a.Lost)
			}
			for _, id := range chunks {
				isHolder := slices.Contains(holders(w.chunkRecord(t, id).Holders), d.id)
				if want := before[id] && !slices.Contains(a.Wrong, id); isHolder != want {
					t.Errorf("chunk %s: holder %v, wrong %v", id, isHolder, a.Wrong)
				}
			}
			if kept, err := w.op.AuditByID(testContext(t), a.ID); err != nil || !reflect.DeepEqual(kept, a) {
				t.Errorf("it is on record as %+v, %v; want %+v", kept, err, a)
			}
			list, err := w.op.Audits(testContext(t), api.AuditQuery{Device: d.id, Outcome: c.want, Limit: 1})
			if err != nil || len(list.Audits) != 1 || list.Audits[0].ID != a.ID {
				t.Errorf("it is not in the list: %+v %v", list, err)
			}
		})
	}
}

func TestAConfessionIsALossAndNoLie(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, other, chunks := auditScene(t, w)
	gone := chunks[2]
	d.mu.Lock()
	delete(d.chunks, gone)
	d.mu.Unlock()
	a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id, Leaves: 100})
	must(t, err)
	if a.Outcome != api.AuditLost || !slices.Equal(a.Lost, []string{gone}) || len(a.Wrong) != 0 {
		t.Errorf("%s lost %v wrong %v", a.Outcome, a.Lost, a.Wrong)
	}
	if got := holders(w.chunkRecord(t, gone).Holders); !slices.Equal(got, []wire.DeviceID{other.id}) {
		t.Errorf("held by %v", got)
	}
	// It is not asked again for what it has confessed.
	a, err = w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id, Leaves: 100})
	if err != nil || a.Outcome != api.AuditRight || slices.Contains(a.Chunks, gone) {
		t.Errorf("%s %v %v", a.Outcome, a.Chunks, err)
	}
}

func TestSilenceIsNoLie(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d, other, chunks := auditScene(t, w)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	d.on(wire.KindAudit, silent)
	d.on(wire.KindJobRun, silent)
	for kind, order := range map[api.AuditKind]wire.Kind{api.StorageAudit: wire.KindAudit, api.ComputeAudit: wire.KindJobRun} {
		result := make(chan api.Audit, 1)
		go func() {
			a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: kind, Device: d.id, Leaves: 5, Module: module})
			if err != nil {
				t.Error(err)
			}
			result <- a
		}()
		for next(t, d.orders, "the challenge").Kind != order {
		}
		w.advance(jobLife + silence + time.Second)
		if a := next(t, result, "the outcome"); a.Outcome != api.AuditUnreachable || a.Reason == "" {
			t.Errorf("%s: %s (%s)", kind, a.Outcome, a.Reason)
		}
		other.hello() // time went by for it as well
		d.hello()
	}
	// Also where the challenge has less time than its order; a job's is waited for further.
	w.audits.limit = 4 * time.Second // in which a challenge is made
	defer func() { w.audits.limit = callLimit }()
	for kind, want := range map[api.AuditKind]api.AuditOutcome{api.StorageAudit: api.AuditUnreachable, api.ComputeAudit: api.AuditPending} {
		a, err := w.audits.run(testContext(t), api.AuditRequest{Kind: kind, Device: d.id, Leaves: 5, Module: module})
		if err != nil || a.Outcome != want || a.Reason == "" {
			t.Errorf("%s cut short: %s %v", kind, a.Outcome, err)
		}
		if kept, _ := w.audits.find(testContext(t), a.ID); kept.Outcome != want {
			t.Errorf("%s cut short: %s on record", kind, kept.Outcome)
		}
	}
	for _, id := range chunks {
		if len(holders(w.chunkRecord(t, id).Holders)) != 2 {
			t.Error("silence was taken for a loss")
		}
	}
}

func TestARefusalIsNoSilence(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, other, _ := auditScene(t, w)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	for name, c := range map[string]struct {
		kind   api.AuditKind
		answer reply
		want   api.AuditOutcome
	}{
		"storage fails":          {api.StorageAudit, *failed(wire.CodeInternal), api.AuditRefused},
		"storage is rejected":    {api.StorageAudit, reply{state: wire.Rejected, code: wire.CodePolicy}, api.AuditRefused},
		"compute fails":          {api.ComputeAudit, *failed(wire.CodeLimit), api.AuditRefused},
		"compute is rejected":    {api.ComputeAudit, reply{state: wire.Rejected, code: wire.CodePolicy}, api.AuditRefused},
		"the input is lost":      {api.ComputeAudit, *failed(wire.CodeLost), api.AuditLost},
		"the input is not there": {api.ComputeAudit, *failed(wire.CodeNotFound), api.AuditLost},
	} {
		t.Run(name, func(t *testing.T) {
			answer := func(wire.Order) *reply { return &c.answer }
			d.on(wire.KindAudit, answer)
			d.on(wire.KindJobRun, answer)
			a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: c.kind, Device: d.id, Module: module})
			if err != nil || a.Outcome != c.want || a.Reason == "" {
				t.Fatalf("%s (%s) %v, want %s", a.Outcome, a.Reason, err, c.want)
			}
			for _, id := range a.Chunks {
				want := []wire.DeviceID{other.id, d.id}
				if c.want == api.AuditLost {
					want = want[:1]
				}
				slices.Sort(want)
				if got := holders(w.chunkRecord(t, id).Holders); !slices.Equal(got, want) {
					t.Errorf("chunk %s is held by %v, want %v", id, got, want)
				}
			}
		})
	}
}

// What is removed from a device in the middle of a challenge is no loss.
func TestWhatWasDroppedMeanwhileIsNoLoss(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d, _ := w.device(t), w.device(t)
	module, err := w.op.PutModule(ctx, []byte("module"))
	must(t, err)
	data, kept := someBytes(20_000), someBytes(20_000)
	id := chunk.Sum(data).String()
	remove := func() {
		if err := w.op.RemoveObject(ctx, "meanwhile"); err != nil {
			t.Error(err)
		}
		eventually(t, "the chunk is dropped", func() bool { return !d.holds(id) })
	}
	again := func() { w.putFile(t, "meanwhile", data, 2) }
	for _, c := range []struct {
		name      string
		kind      api.AuditKind
		alone     bool
		meanwhile func()
		want      api.AuditOutcome
	}{
		{"nothing else, storage", api.StorageAudit, true, remove, api.AuditVoid},
		{"nothing else, compute", api.ComputeAudit, true, remove, api.AuditVoid},
		{"something else", api.StorageAudit, false, remove, api.AuditRight},
		{"put back before the answer is judged", api.StorageAudit, false, func() { remove(); again() }, api.AuditRight},
	} {
		t.Run(c.name, func(t *testing.T) {
			again()
			if !c.alone {
				w.putFile(t, "kept", kept, 2)
				defer func() { must(t, w.op.RemoveObject(ctx, "kept")) }()
			}
			d.on(wire.KindAudit, func(o wire.Order) *reply {
				c.meanwhile()
				return d.prove(o, func(_ *wire.AuditAnswer, l []wire.AuditLeaf) []wire.AuditLeaf {
					for i := range l { // as if all had been read before it was put back
						l[i].Lost = l[i].Lost || l[i].Chunk == id
					}
					return l
				})
			})
			d.on(wire.KindJobRun, func(wire.Order) *reply { c.meanwhile(); return failed(wire.CodeNotFound) })
			a, err := w.op.Audit(ctx, api.AuditRequest{Kind: c.kind, Device: d.id, Leaves: 200, Module: module})
			if err != nil || a.Outcome != c.want || len(a.Lost) > 0 {
				t.Errorf("%s (%s) lost %v, %v; want %s", a.Outcome, a.Reason, a.Lost, err, c.want)
			}
			if r, ok := w.storage.chunks.get(id); ok {
				if len(holders(r.Holders)) != 2 {
					t.Error("the new claim was taken for lost")
				}
				must(t, w.op.RemoveObject(ctx, "meanwhile"))
			}
		})
	}
}

// An answer whose leaves are signed for and never sent is no way out.
func TestAWithheldAttachmentIsWrong(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, _, _ := auditScene(t, w)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	withhold := func(r *reply) *reply { r.withhold = true; return r }
	d.on(wire.KindAudit, func(o wire.Order) *reply { return withhold(d.prove(o, nil)) })
	d.on(wire.KindJobRun, func(o wire.Order) *reply { return withhold(d.compute(o, nil)) })
	for _, kind := range []api.AuditKind{api.StorageAudit, api.ComputeAudit} {
		a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: kind, Device: d.id, Module: module})
		if err != nil || a.Outcome != api.AuditWrong {
			t.Errorf("%s: %s (%s) %v", kind, a.Outcome, a.Reason, err)
		}
	}
}

// A leaf has the chance of the bytes in it: counted over every byte, so that
// there is no luck in it.
func TestTheDrawIsUniformOverBytes(t *testing.T) {
	held := []api.Chunk{{ID: "a", Size: 1}, {ID: "b", Size: 4096}, {ID: "c", Size: 4097}, {ID: "d", Size: 3*4096 + 100}}
	want := map[wire.AuditItem]int{{Chunk: "a"}: 1, {Chunk: "b"}: 4096, {Chunk: "c"}: 4096, {Chunk: "c", Leaf: 1}: 1,
		{Chunk: "d"}: 4096, {Chunk: "d", Leaf: 1}: 4096, {Chunk: "d", Leaf: 2}: 4096, {Chunk: "d", Leaf: 3}: 100}
	var total int64
	for _, c := range held {
		total += c.Size
	}
	got := map[wire.AuditItem]int{}
	for at := range total {
		got[leafAt(held, at)]++
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("bytes that lead to each leaf: %v, want %v", got, want)
	}
	// And draw uses all of the range: each of 64 equal leaves is drawn, which 2^12
	// draws miss with a chance of 64·(63/64)^4096 < 1e-26.
	items, err := draw([]api.Chunk{{ID: "x", Size: 64 * 4096}}, 4096)
	must(t, err)
	seen := map[int]bool{}
	for _, it := range items {
		seen[it.Leaf] = true
	}
	if len(items) != 4096 || len(seen) != 64 {
		t.Errorf("%d draws hit %d of 64 leaves", len(items), len(seen))
	}
}

func TestAComputeChallengeHasTheLimitsThatAreAskedFor(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, _, _ := auditScene(t, w)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	got := make(chan wire.JobLimits, 1)
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		b, _ := wire.DecodeBody[wire.JobRun](o)
		got <- b.Limits
		return d.compute(o, nil)
	})
	for _, want := range []wire.JobLimits{{}, {MemoryBytes: 1 << 20, CPUSeconds: 150, WallSeconds: 200, OutputBytes: 99}} {
		a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: module, Limits: want})
		if err != nil || a.Outcome != api.AuditRight {
			t.Fatalf("%s (%s) %v", a.Outcome, a.Reason, err)
		}
		if want.MemoryBytes == 0 {
			want.MemoryBytes = wire.OrdinaryLimits.MemoryBytes // said, as in a customer's job
		}
		if l := next(t, got, "the job"); l != want {
			t.Errorf("%+v, want %+v", l, want)
		}
	}
}

func TestComputeChallenges(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	d, _, _ := auditScene(t, w)
	sum := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	for name, c := range map[string]struct {
		bend func(r *wire.JobResult, out []byte) []byte
		want api.AuditOutcome
	}{
		"right": {nil, api.AuditRight},
		"another result": {func(r *wire.JobResult, _ []byte) []byte {
			out := []byte("made up\n")
			r.Output = sum(out)
			return out
		}, api.AuditWrong},
		"an output that is not the signed one":  {func(_ *wire.JobResult, _ []byte) []byte { return []byte("made up\n") }, api.AuditWrong},
		"the right output under another digest": {func(r *wire.JobResult, out []byte) []byte { r.Output = sum([]byte("x")); return out }, api.AuditWrong},
		"the result of another module":          {func(r *wire.JobResult, out []byte) []byte { r.Module = sum([]byte("x")); return out }, api.AuditWrong},
		"the result of another input":           {func(r *wire.JobResult, out []byte) []byte { r.Input = sum([]byte("x")); return out }, api.AuditWrong},
	} {
		t.Run(name, func(t *testing.T) {
			begun := make(chan []api.Audit, 1)
			d.on(wire.KindJobRun, func(o wire.Order) *reply {
				begun <- w.audits.underWay()
				return d.compute(o, c.bend)
			})
			a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: module, Args: []string{"-x"}})
			must(t, err)
			if a.Outcome != c.want {
				t.Errorf("%s (%s), want %s", a.Outcome, a.Reason, c.want)
			}
			// The commitment was on record when the device got the order, told
			// nothing by then, and opens to what was expected.
			i := slices.IndexFunc(<-begun, func(x api.Audit) bool {
				return x.ID == a.ID && x.Outcome == api.AuditPending && x.Commitment == a.Commitment && x.Salt == "" && x.Expected == ""
			})
			if i < 0 || a.Commitment == "" {
				t.Error("the commitment was not on record before the device had the order")
			}
			salt, err1 := hex.DecodeString(a.Salt)
			expected, err2 := hex.DecodeString(a.Expected)
			if opened := sum(slices.Concat(salt, expected)); err1 != nil || err2 != nil || opened != a.Commitment || len(salt) < 16 {
				t.Errorf("the commitment %s opens to %s", a.Commitment, opened)
			}
		})
	}
}

// keys lists where in a JSON document there is something, and of what type.
func keys(at string, v any, out map[string]string) {
	switch x := v.(type) {
	case map[string]any:
		for k, e := range x {
			keys(at+"."+k, e, out)
		}
	case []any:
		for _, e := range x {
			keys(at+"[]", e, out)
		}
	default:
		out[at] = reflect.TypeOf(v).String()
	}
}

func TestADeviceCannotTellAChallengeFromAJob(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d, _ := w.device(t), w.device(t)
	module, err := w.op.PutModule(testContext(t), []byte("module"))
	must(t, err)
	data := someBytes(1000)
	w.putFile(t, "input", data, 2)
	jobs := make(chan wire.Order, 2)
	d.on(wire.KindJobRun, func(o wire.Order) *reply { jobs <- o; return d.compute(o, nil) })
	if _, err := w.op.RunJob(testContext(t), api.JobSpec{Module: module, Args: []string{"-x"}, Input: &api.JobChunk{Object: "input"}, Needs: api.JobNeeds{Device: d.id}}); err != nil {
		t.Fatal(err)
	}
	job := next(t, jobs, "the customer's job")
	before := map[string]bool{} // an order may come again
	for range len(d.orders) {
		before[(<-d.orders).ID] = true
	}
	if a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: module, Args: []string{"-x"}}); err != nil || a.Outcome != api.AuditRight {
		t.Fatalf("%s %v", a.Outcome, err)
	}
	challenge := next(t, jobs, "the challenge")
	shape := func(o wire.Order) map[string]string {
		raw, err := json.Marshal(o)
		must(t, err)
		var v any
		must(t, json.Unmarshal(raw, &v))
		out := map[string]string{}
		keys("", v, out)
		return out
	}
	if a, b := shape(job), shape(challenge); !reflect.DeepEqual(a, b) {
		t.Errorf("a job has %v\na challenge %v", a, b)
	}
	j, err := wire.DecodeBody[wire.JobRun](job)
	must(t, err)
	c, err := wire.DecodeBody[wire.JobRun](challenge)
	must(t, err)
	cut := func(u string) string { return u[:strings.Index(u, "exp=")] }
	j.Module.URL, c.Module.URL = cut(j.Module.URL), cut(c.Module.URL)
	if !reflect.DeepEqual(j, c) {
		t.Errorf("a job is %+v, the same as a challenge %+v", j, c)
	}
	if a, b := job.Expires.Sub(job.Issued), challenge.Expires.Sub(challenge.Issued); a != b || len(job.ID) != len(challenge.ID) {
		t.Errorf("a job lives %s, a challenge %s", a, b)
	}
	// Nor by what else it is asked for at that time.
	for range len(d.orders) {
		if o := <-d.orders; !before[o.ID] && o.ID != challenge.ID {
			t.Errorf("the challenge came with an order for %s", o.Kind)
		}
	}
	must(t, w.op.RemoveObject(testContext(t), "input"))
}

func TestChallengesThatCannotBeMadeAreRefused(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d, other, _ := auditScene(t, w)
	empty := w.device(t)
	module, err := w.op.PutModule(ctx, []byte("module"))
	must(t, err)
	broken, err := w.op.PutModule(ctx, []byte("broken module"))
	must(t, err)
	for name, c := range map[string]struct {
		q      api.AuditRequest
		status int
		code   string
	}{
		"no device":         {api.AuditRequest{Kind: api.StorageAudit, Device: "x"}, http.StatusNotFound, wire.CodeNotFound},
		"no kind":           {api.AuditRequest{Device: d.id}, http.StatusBadRequest, "bad_kind"},
		"holds nothing":     {api.AuditRequest{Kind: api.StorageAudit, Device: empty.id}, http.StatusConflict, "holds_nothing"},
		"negative":          {api.AuditRequest{Kind: api.StorageAudit, Device: d.id, Leaves: -1}, http.StatusBadRequest, "bad_leaves"},
		"too many":          {api.AuditRequest{Kind: api.StorageAudit, Device: d.id, Leaves: maxLeaves + 1}, http.StatusBadRequest, "bad_leaves"},
		"no module":         {api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: strings.Repeat("0", 64)}, http.StatusNotFound, "no_module"},
		"no name of module": {api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: "../x"}, http.StatusBadRequest, "bad_module"},
		"no answer known":   {api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: broken}, http.StatusUnprocessableEntity, "no_answer_known"},
		"no input":          {api.AuditRequest{Kind: api.ComputeAudit, Device: empty.id, Module: module}, http.StatusConflict, "no_known_input"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := w.op.Audit(ctx, c.q)
			wantRefusal(t, err, c.status, c.code)
		})
	}
	// The device itself is never the source of what it is tested with.
	other.leave()
	_, err = w.op.Audit(ctx, api.AuditRequest{Kind: api.ComputeAudit, Device: d.id, Module: module})
	wantRefusal(t, err, http.StatusConflict, "no_known_input")
	// The most leaves that can be asked for fit an order.
	if a, err := w.op.Audit(ctx, api.AuditRequest{Kind: api.StorageAudit, Device: d.id, Leaves: maxLeaves}); err != nil || a.Outcome != api.AuditRight {
		t.Errorf("%s %v", a.Outcome, err)
	}
}

// A challenge whose coordinator went away in the middle counts for nothing.
func TestUnjudgedChallengesAreVoid(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	d, _, _ := auditScene(t, w)
	d.on(wire.KindAudit, silent)
	cut := make(chan error, 1)
	go func() {
		_, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id})
		cut <- err
	}()
	for next(t, d.orders, "the challenge").Kind != wire.KindAudit {
	}
	w.Close()
	// It was told so: it did not hold the end up until it was cut off.
	wantRefusal(t, next(t, cut, "the end of the call"), http.StatusServiceUnavailable, "stopping")
	w = open(t, dir)
	defer w.Close()
	list, err := w.op.Audits(testContext(t), api.AuditQuery{})
	if err != nil || len(list.Audits) != 1 || list.Audits[0].Outcome != api.AuditVoid {
		t.Fatalf("%+v %v", list, err)
	}
	if s := w.audits.scoreOf(d.id); s.integrity() != 1 || s.reachability() != 1 || len(s.Penalties) > 0 {
		t.Errorf("it cost %+v", s)
	}
	// Nobody may have judged it: not even the coordinator's own fault.
	a, err := w.audits.unjudged(testContext(t), api.Audit{ID: list.Audits[0].ID + "X"}, errNotFound)
	if err == nil || a.Outcome != api.AuditVoid {
		t.Errorf("%s %v", a.Outcome, err)
	}
}

// What went well by itself is kept for a week, and all else for a year.
func TestWhatEachChallengeIsWorthToKeep(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	for _, routine := range []bool{true, false} {
		for _, o := range api.AuditOutcomes {
			want := w.audits.rows
			if routine && (o == api.AuditRight || o == api.AuditVoid) {
				want = w.audits.routine
			}
			if got := w.audits.home(api.Audit{Routine: routine, Outcome: o}); got != want {
				t.Errorf("routine %v, %s: it is kept elsewhere", routine, o)
			}
		}
	}
	for kept, want := range map[jetstream.KeyValue]time.Duration{w.audits.rows.kv: auditKept, w.audits.routine.kv: routineKept, w.audits.challenges.kv: challengeKept} {
		s, err := kept.Status(testContext(t))
		must(t, err)
		if s.TTL() != want {
			t.Errorf("%s is kept for %s, want %s", s.Bucket(), s.TTL(), want)
		}
	}
}

// noEvidence is a store that is full.
type noEvidence struct{ jetstream.ObjectStore }

func (noEvidence) PutBytes(context.Context, string, []byte) (*jetstream.ObjectInfo, error) {
	return nil, errors.New("no space")
}

// Nothing is held against a device that cannot be shown: where the evidence is not
// kept, the challenge is void, and costs nothing.
func TestALieWhoseEvidenceIsNotKeptCostsNothing(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d, _, chunks := auditScene(t, w)
	w.audits.evidence = noEvidence{w.audits.evidence}
	d.on(wire.KindAudit, func(o wire.Order) *reply {
		return d.prove(o, func(_ *wire.AuditAnswer, l []wire.AuditLeaf) []wire.AuditLeaf {
			for i := range l {
				l[i].Data[0] ^= 1
			}
			return l
		})
	})
	a, err := w.audits.run(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id})
	if err == nil || a.Outcome != api.AuditVoid || a.Evidence || len(a.Wrong) > 0 {
		t.Errorf("%+v, %v", a, err)
	}
	if s := w.audits.scoreOf(d.id); s.integrity() != 1 || len(s.Penalties) > 0 {
		t.Errorf("it cost %+v", s.Penalties)
	}
	for _, id := range chunks {
		if len(holders(w.chunkRecord(t, id).Holders)) != 2 {
			t.Error("it was taken for a loss")
		}
	}
	if n := len(w.audits.underWay()); n != 0 {
		t.Errorf("%d challenges are still under way", n)
	}
}

func TestOutputsOfJobsStayAndJudgedLeavesGo(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d, _, _ := auditScene(t, w)
	module, err := w.op.PutModule(ctx, []byte("module"))
	must(t, err)
	w.putFile(t, "bulk", someBytes(1000), 2)
	bulk := func(r *reply) *reply { r.bulk = true; return r }
	d.on(wire.KindJobRun, func(o wire.Order) *reply { return bulk(d.compute(o, nil)) })
	d.on(wire.KindAudit, func(o wire.Order) *reply { return bulk(d.prove(o, nil)) })
	staged := func(order string) bool {
		_, err := w.staging.get(ctx, attachmentName(order))
		return err == nil
	}
	j, err := w.op.RunJob(ctx, api.JobSpec{Module: module, Input: &api.JobChunk{Object: "bulk"}, Needs: api.JobNeeds{Device: d.id}})
	if err != nil || len(j.Output) == 0 {
		t.Fatalf("%+v %v", j, err)
	}
	for range 2 { // whoever lost the answer can ask again
		again, err := w.op.JobOutcome(ctx, j.Job)
		if err != nil || string(again.Output) != string(j.Output) {
			t.Errorf("%+v %v", again, err)
		}
	}
	// A challenge is a job like any other, also to who would fetch its output.
	for kind, stays := range map[api.AuditKind]bool{api.StorageAudit: false, api.ComputeAudit: true} {
		a, err := w.op.Audit(ctx, api.AuditRequest{Kind: kind, Device: d.id, Module: module})
		if err != nil || a.Outcome != api.AuditRight || staged(a.Order) != stays {
			t.Errorf("%s: %s %v, staged %v", kind, a.Outcome, err, staged(a.Order))
		}
	}
	// What proves a lie is kept for longer than that.
	d.on(wire.KindAudit, func(o wire.Order) *reply {
		return bulk(d.prove(o, func(_ *wire.AuditAnswer, l []wire.AuditLeaf) []wire.AuditLeaf { return l[1:] }))
	})
	if a, err := w.op.Audit(ctx, api.AuditRequest{Kind: api.StorageAudit, Device: d.id}); err != nil || a.Outcome != api.AuditWrong || staged(a.Order) || !a.Evidence {
		t.Errorf("%s %v, staged %v, evidence %v", a.Outcome, err, staged(a.Order), a.Evidence)
	}
	must(t, w.op.RemoveObject(ctx, "bulk"))
}
