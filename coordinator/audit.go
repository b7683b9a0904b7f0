package coordinator

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// audits challenges devices: for bytes that they should hold, and for jobs
// whose answer is known. Nobody has to ask for it (rounds); what follows from the
// answers is a score, and what proves a bad one is kept.
//
// # Records
//
// A challenge that is under way is in challenges, from before its device can know
// of it until all that follows from its outcome is on record. What counts against
// a device, or was asked for by an operator, is kept in rows for a year, what went
// well by itself in routine for a week: of a large fleet that would be millions.
// Both are out of memory, but for what lists need of the newest.
//
// The end of a challenge is written in this order: evidence, record, score, what it
// cost into the record, out of challenges. Each step can be done again, so who
// finds a challenge with a record and none waiting for it (sweep) goes on from
// there, and one without a record is void and costs nothing.
type audits struct {
	challenges *table[challengeRow] // by id
	rows       *table[api.Audit]    // by device and id, see auditKey
	routine    *table[api.Audit]    // the same
	scores     *table[score]
	receipts   *table[receiptRow]
	evidence   jetstream.ObjectStore
	newest     newestAudits

	storage *storage
	compute *compute
	outbox  *outbox
	staging *staging
	rounds  *rounds
	honesty *honesty
	// answer runs a module here. It is nil where no engine is linked in.
	answer    Compute
	answering chan struct{} // of capacity 1: who runs one
	limit     time.Duration // for one challenge, its answer included; who asked for one of a job is answered by then

	// caught is told of a device whose result was proved wrong.
	caught func(context.Context, api.Audit) error
}

func newAudits(s *storage, o *outbox, answer Compute, engine string, plan AuditPlan, log *slog.Logger) *audits {
	a := &audits{storage: s, outbox: o, answer: answer, answering: make(chan struct{}, 1), limit: callLimit, newest: newNewestAudits(maxNewestAudits)}
	a.honesty = newHonesty(a, plan.Jobs, engine, log)
	a.rounds = newRounds(a, plan, log)
	return a
}

// open opens the buckets.
func (a *audits) open(ctx context.Context, c *Coordinator) (err error) {
	kept := func(d time.Duration) func(*jetstream.KeyValueConfig) {
		return func(k *jetstream.KeyValueConfig) { k.TTL = d }
	}
	none := keeping(func(api.Audit) bool { return false })
	kv, err := c.openKV(ctx, "challenges", kept(challengeKept))
	if err != nil {
		return err
	}
	track := func(id string, v challengeRow, gone bool) { a.newest.track(id, v.Audit, gone) }
	if a.challenges, err = openTable(ctx, kv, "challenge", track, loggingTo[challengeRow](c.log)); err != nil {
		return err
	}
	c.closers = append(c.closers, a.challenges.close)
	a.honesty.recall()
	for _, t := range []struct {
		name string
		life time.Duration
		into **table[api.Audit]
	}{{"audits", auditKept, &a.rows}, {"audited", routineKept, &a.routine}} {
		if kv, err = c.openKV(ctx, t.name, kept(t.life)); err != nil {
			return err
		}
		if *t.into, err = openTable(ctx, kv, "challenge", a.newest.track, none, loggingTo[api.Audit](c.log)); err != nil {
			return err
		}
		c.closers = append(c.closers, (*t.into).close)
	}
	if err := bucket(ctx, c, "scores", &a.scores, nil); err != nil {
		return err
	}
	if err := bucket(ctx, c, "rounds", &a.rounds.turns, nil); err != nil {
		return err
	}
	if err := bucket(ctx, c, "owed", &a.honesty.rows, nil, kept(owedKept)); err != nil {
		return err
	}
	if kv, err = c.openKV(ctx, "receipts"); err != nil {
		return err
	}
	if a.receipts, err = openTable(ctx, kv, "receipt", nil, keeping(func(receiptRow) bool { return false }), loggingTo[receiptRow](c.log)); err != nil {
		return err
	}
	c.closers = append(c.closers, a.receipts.close)
	step, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	a.evidence, err = c.eng.Objects(step, "evidence", func(o *jetstream.ObjectStoreConfig) { o.TTL = auditKept })
	return err
}

// Compute runs a job here; the coordinator uses it to know the answer of a compute
// challenge beforehand, and to settle what devices differ about.
type Compute func(ctx context.Context, j ComputeJob) (ComputeResult, error)

// ComputeJob is a job with all that it reads.
type ComputeJob struct {
	Module  []byte
	Args    []string
	Env     map[string]string
	Input   []byte            // standard input
	Inputs  map[string][]byte // by name
	Outputs []string          // names; those beside [wire.Stdout] may be written
	Limits  wire.JobLimits
}

// ComputeResult is what a job gave.
type ComputeResult struct {
	Output     []byte            // standard output
	Outputs    map[string][]byte // by name
	CPUSeconds float64
	Looks      bool   // the module can see whether it was stopped and went on
	Engine     string // as in [wire.JobResult]; empty: nothing that could differ from a device's
}

// result is what a device would have signed.
func (r ComputeResult) result(outputs []string) wire.JobResult {
	res := wire.JobResult{Output: sha256Of(r.Output), OutputBytes: int64(len(r.Output)), CPUSeconds: r.CPUSeconds, Engine: r.Engine}
	for _, name := range outputs {
		data := r.Outputs[name]
		if name == wire.Stdout {
			data = r.Output
		}
		out := wire.JobOutput{Name: name, SHA256: sha256Of(data), Size: int64(len(data))}
		for part := range slices.Chunk(data, chunk.MaxSize) {
			out.Parts = append(out.Parts, wire.JobPart{Chunk: chunk.Sum(part).String(), Size: int64(len(part))})
		}
		res.Outputs = append(res.Outputs, out)
	}
	return res
}

func sha256Of(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

const (
	auditLife = time.Minute
	// defaultLeaves finds a device that has lost 10% in 99 of 100 audits:
	// 1 - 0.9^44 = 0.9903.
	defaultLeaves = 44
	maxLeaves     = 512
	// challengeKept is longer than any order lives: the answer to a challenge among jobs
	// is waited for until then.
	challengeKept = retention
	routineKept   = 7 * 24 * time.Hour
)

// run makes one challenge and waits for its outcome, which is kept.
func (a *audits) run(ctx context.Context, r api.AuditRequest) (api.Audit, error) {
	ctx, cancel := context.WithTimeout(ctx, a.limit)
	defer cancel()
	d, err := a.storage.reg.device(r.Device)
	if err != nil {
		return api.Audit{}, err
	}
	if d.Retired {
		return api.Audit{}, refuse(http.StatusConflict, wire.CodeRetired, "device %s is retired: nothing is asked of it any more", r.Device)
	}
	switch r.Kind {
	case api.StorageAudit:
		return a.runStorage(ctx, r)
	case api.ComputeAudit:
		return a.runCompute(ctx, r)
	}
	return api.Audit{}, refuse(http.StatusBadRequest, "bad_kind", "a challenge is of the kind storage or compute, not %q", r.Kind)
}

func (a *audits) runStorage(ctx context.Context, r api.AuditRequest) (api.Audit, error) {
	n := cmp.Or(r.Leaves, defaultLeaves)
	if n < 1 || n > maxLeaves {
		return api.Audit{}, refuse(http.StatusBadRequest, "bad_leaves", "a challenge has 1 to %d leaves", maxLeaves)
	}
	held := a.storage.held(r.Device)
	if len(held) == 0 {
		return api.Audit{}, refuse(http.StatusConflict, "holds_nothing", "device %s holds no chunk, so there is nothing to prove", r.Device)
	}
	items, err := draw(held, n)
	if err != nil {
		return api.Audit{}, err
	}
	return a.challenge(ctx, held, items, api.Audit{Device: r.Device})
}

// challenge asks a device for leaves of what it should hold.
func (a *audits) challenge(ctx context.Context, held []api.Chunk, items []wire.AuditItem, rec api.Audit) (api.Audit, error) {
	nonce := make([]byte, 16)
	rand.Read(nonce)
	body := wire.Audit{Items: items, Nonce: hex.EncodeToString(nonce), Deadline: a.outbox.now().UTC().Add(auditLife)}
	rec.Kind, rec.Leaves = api.StorageAudit, len(items)
	for _, it := range items {
		if !slices.Contains(rec.Chunks, it.Chunk) {
			rec.Chunks = append(rec.Chunks, it.Chunk)
		}
	}
	claim := a.storage.claims(rec.Device, rec.Chunks)
	// On record before the device can know of it: what is cut off is void, and
	// not forgotten.
	row, err := a.begin(ctx, challengeRow{Audit: rec})
	if rec = row.Audit; err != nil {
		return rec, err
	}
	order, err := a.outbox.submit(ctx, rec.Device, wire.KindAudit, body, auditLife)
	if err != nil {
		return a.unjudged(ctx, rec, err)
	}
	rec.Order = order.ID
	v, err := a.outbox.await(ctx, order, nil)
	if err != nil {
		return a.unanswered(ctx, rec, err)
	}
	sizes := make(map[string]int64, len(rec.Chunks))
	for _, c := range held {
		if slices.Contains(rec.Chunks, c.ID) {
			sizes[c.ID] = c.Size
		}
	}
	return a.judged(ctx, rec, v, sizes, func(ans response) verdict {
		return judgeStorage(body, sizes, ans, a.storage.released(rec.Device, claim))
	})
}

// judged ends a challenge that has an end of its order.
func (a *audits) judged(ctx context.Context, rec api.Audit, v OrderRecord, sizes map[string]int64, judge func(response) verdict) (api.Audit, error) {
	rec.Report, rec.Bytes = v.Report, int64(len(v.Envelope)+len(v.Report))
	if isStaged(v.Result) {
		rec.Bytes += v.Result.Attachment.Size
	}
	if v.State == wire.TimedOut && v.Result.Code == codeNoAnswer {
		rec.Outcome, rec.Reason = api.AuditUnreachable, v.Result.Reason
		// A job may wait for others, and for its owner: who was there all the time has
		// broken no promise.
		if rec.Kind == api.ComputeAudit && a.storage.reg.heardLately(rec.Device) {
			rec.Outcome, rec.Reason = api.AuditRefused, "the device was there, and had not done the job when its order ended"
		}
		return a.settle(ctx, rec, v)
	}
	ans, err := a.answerOf(ctx, v)
	if err != nil {
		return a.unjudged(ctx, rec, err)
	}
	got := judge(ans)
	rec.Outcome, rec.Reason, rec.Right, rec.Lost, rec.Wrong, rec.Got = got.Outcome, got.Reason, got.Right, got.Lost, got.Wrong, got.Got
	if rec.Outcome == api.AuditWrong || rec.Outcome == api.AuditLost {
		if rec.Evidence, err = a.keepEvidence(ctx, rec, v, sizes); err != nil {
			return a.unjudged(ctx, rec, err)
		}
	}
	return a.settle(ctx, rec, v)
}

// settle keeps an outcome, and then forgets the leaves that it was judged from:
// where they prove something, the evidence has them. What may be a customer's job
// stays for as long as the staging area keeps things.
func (a *audits) settle(ctx context.Context, rec api.Audit, v OrderRecord) (api.Audit, error) {
	rec, err := a.conclude(ctx, rec)
	if err != nil || rec.Kind != api.StorageAudit || !isStaged(v.Result) {
		return rec, err
	}
	if err := a.staging.drop(ctx, attachmentName(rec.Order)); err != nil {
		a.storage.log.Warn("a judged answer stays until it expires", "order", rec.Order, "error", err)
	}
	return rec, nil
}

// unanswered ends a challenge whose answer did not come within the time for it.
func (a *audits) unanswered(ctx context.Context, rec api.Audit, err error) (api.Audit, error) {
	if !errors.Is(err, context.DeadlineExceeded) {
		return rec, err // the coordinator is being stopped; see void
	}
	rec.Outcome, rec.Reason = api.AuditUnreachable, "the device did not answer in time"
	return a.conclude(context.WithoutCancel(ctx), rec)
}

// unjudged ends a challenge that failed on our side: no device pays for that.
func (a *audits) unjudged(ctx context.Context, rec api.Audit, cause error) (api.Audit, error) {
	rec.Outcome, rec.Reason = api.AuditVoid, fmt.Sprintf("the coordinator could not judge the answer: %v", cause)
	rec.Lost, rec.Wrong, rec.Evidence = nil, nil, false
	_, err := a.conclude(context.WithoutCancel(ctx), rec)
	return rec, errors.Join(cause, err)
}

// draw picks n leaves, each byte held having the same chance.
func draw(held []api.Chunk, n int) ([]wire.AuditItem, error) {
	var total int64
	for _, c := range held {
		total += c.Size
	}
	items := make([]wire.AuditItem, n)
	for i := range items {
		k, err := rand.Int(rand.Reader, big.NewInt(total))
		if err != nil {
			return nil, err
		}
		items[i] = leafAt(held, k.Int64())
	}
	// One chunk's leaves side by side, so that the device reads it once.
	slices.SortFunc(items, func(x, y wire.AuditItem) int {
		return cmp.Or(cmp.Compare(x.Chunk, y.Chunk), cmp.Compare(x.Leaf, y.Leaf))
	})
	return items, nil
}

// leafAt is the leaf that byte number at of everything held is in.
func leafAt(held []api.Chunk, at int64) wire.AuditItem {
	for _, c := range held {
		if at < c.Size {
			return wire.AuditItem{Chunk: c.ID, Leaf: int(at / chunk.LeafSize)}
		}
		at -= c.Size
	}
	panic("coordinator: a byte beyond all that is held") // at is drawn below the sum of sizes
}

const releasedReason = "what the device was asked about was removed from it meanwhile; ask again"

// sizesOf is how large the chunks of a challenge are.
func (a *audits) sizesOf(rec api.Audit) map[string]int64 {
	out := make(map[string]int64, len(rec.Chunks))
	for _, id := range rec.Chunks {
		if c, ok := a.storage.chunks.get(id); ok {
			out[id] = c.Size
		}
	}
	return out
}

// begin keeps a challenge that is about to be sent.
func (a *audits) begin(ctx context.Context, row challengeRow) (challengeRow, error) {
	row.ID, row.At, row.Outcome = ulid.Make().String(), a.outbox.now().UTC(), api.AuditPending
	return row, a.challenges.create(ctx, row.ID, row)
}

func (a *audits) put(ctx context.Context, t *table[api.Audit], key string, rec api.Audit) (api.Audit, error) {
	return t.change(ctx, key, func(v *api.Audit, _ bool) error {
		*v = rec
		return nil
	})
}

// auditKey has the device first, so that a device's are found together.
func auditKey(rec api.Audit) string { return string(rec.Device) + "." + rec.ID }

// home is where a challenge that has ended is kept.
func (a *audits) home(rec api.Audit) *table[api.Audit] {
	if rec.Routine && (rec.Outcome == api.AuditRight || rec.Outcome == api.AuditVoid) {
		return a.routine
	}
	return a.rows
}

// conclude writes the end of a challenge, whose evidence is kept.
func (a *audits) conclude(ctx context.Context, rec api.Audit) (api.Audit, error) {
	if a.home(rec) == a.routine {
		rec.Report, rec.Chunks = nil, nil // the order has them, for longer than this is kept
	}
	rec, err := a.put(ctx, a.home(rec), auditKey(rec), rec)
	if err != nil {
		return rec, err
	}
	return a.finish(ctx, rec)
}

// finish is the rest of conclude, for a challenge that has a record.
func (a *audits) finish(ctx context.Context, rec api.Audit) (api.Audit, error) {
	if rec.Outcome == api.AuditWrong && (rec.Kind == api.ComputeAudit || rec.Kind == api.DisputeAudit) {
		if err := a.caught(ctx, rec); err != nil {
			return rec, err
		}
	}
	if rec.Outcome != api.AuditVoid {
		p, err := a.count(ctx, rec)
		if err != nil {
			return rec, err
		}
		if p != nil {
			a.storage.log.Warn("a device's score has fallen", "device", rec.Device, "figure", p.Figure, "cause", p.Cause, "from", two(p.Before), "to", two(p.After), "challenge", rec.ID)
			rec.Penalty = p
			if rec, err = a.put(ctx, a.home(rec), auditKey(rec), rec); err != nil {
				return rec, err
			}
		}
	}
	// Before the challenge is off the table: whoever finds it there does this again.
	if err := a.storage.lostBefore(ctx, rec.Device, slices.Concat(rec.Lost, rec.Wrong), rec.At); err != nil {
		return rec, err
	}
	err := a.challenges.remove(ctx, rec.ID, func(challengeRow) bool { return true })
	if errors.Is(err, errNotFound) {
		err = nil
	}
	return rec, err
}

func two(v float64) float64 { return math.Round(v*100) / 100 }

// void ends challenges begun before a time that nobody waits for any more. Where
// a coordinator was stopped before it judged, they count for nothing; where it was
// stopped after, what was left to do is done. The answers to those among jobs are waited
// for further, see judge.
func (a *audits) void(ctx context.Context, before time.Time) error {
	for _, row := range a.challenges.all(byChallenge) {
		rec := row.Audit
		if rec.At.After(before) {
			continue
		}
		ended, err := a.ended(ctx, rec)
		switch {
		case err == nil:
			_, err = a.finish(ctx, ended)
		case errors.Is(err, errNotFound) && row.Own != nil:
			continue
		case errors.Is(err, errNotFound):
			rec.Outcome, rec.Reason = api.AuditVoid, "the coordinator was stopped before the answer was judged"
			_, err = a.conclude(ctx, rec)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ended is the record of a challenge's end; errNotFound if there is none.
func (a *audits) ended(ctx context.Context, rec api.Audit) (api.Audit, error) {
	v, err := a.rows.find(ctx, auditKey(rec))
	if errors.Is(err, errNotFound) {
		v, err = a.routine.find(ctx, auditKey(rec))
	}
	return v, err
}

// sweep sees to what another coordinator of the fleet left behind, and to
// receipts, until ctx ends.
func (a *audits) sweep(ctx context.Context, log *slog.Logger) {
	t, receipts := time.NewTicker(voidSweep), time.NewTicker(receiptSweep)
	defer t.Stop()
	defer receipts.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := a.void(ctx, a.outbox.now().Add(-2*callLimit)); err != nil && ctx.Err() == nil {
				log.Warn("challenges that were given up stay pending", "error", err)
			}
		case <-receipts.C:
			if err := a.saveReceipts(ctx); err != nil && ctx.Err() == nil {
				log.Warn("receipts could not all be kept beyond their orders; it will be tried again", "error", err)
			}
		}
	}
}

// maxNewestAudits is how many challenges a list of all devices looks through:
// some 6 MB.
const maxNewestAudits = 20_000

// newestAudits is the newest challenges in short.
type newestAudits struct {
	most int

	mu   sync.Mutex
	rows map[string]api.AuditSummary // by id
	cut  bool                        // there were more
}

func newNewestAudits(most int) newestAudits {
	return newestAudits{most: most, rows: make(map[string]api.AuditSummary)}
}

// track is the onEach of all tables of challenges. One that has a record is told
// of by that, and no more by its begin.
func (n *newestAudits) track(key string, rec api.Audit, gone bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, id, settled := strings.Cut(key, ".")
	if !settled {
		id = key
	}
	old, known := n.rows[id]
	switch {
	case !settled && known && old.Outcome != api.AuditPending:
	case gone:
		delete(n.rows, id)
	default:
		v := rec.Summary()
		v.Reason = cutText(v.Reason, 160)
		if n.rows[id] = v; len(n.rows) > n.most+n.most/4 {
			n.shrink()
		}
	}
}

// shrink forgets the oldest. n.mu is held.
func (n *newestAudits) shrink() {
	n.cut = true
	ids := slices.Sorted(maps.Keys(n.rows))
	for _, id := range ids[:len(ids)-n.most] {
		delete(n.rows, id)
	}
}

// list is the newest that fit, the newest first. A record may have been forgotten
// since; nobody tells of that.
func (n *newestAudits) list(fits func(api.AuditSummary) bool) (out []api.AuditSummary, cut bool) {
	n.mu.Lock()
	for _, v := range n.rows {
		if fits(v) {
			out = append(out, v)
		}
	}
	cut = n.cut
	n.mu.Unlock()
	slices.SortFunc(out, func(a, b api.AuditSummary) int { return cmp.Compare(b.ID, a.ID) })
	return out, cut
}

// list is the challenges that a query means.
func (a *audits) list(ctx context.Context, q api.AuditQuery) (api.AuditList, error) {
	old := a.outbox.now().Add(-routineKept)
	fits := func(v api.AuditSummary) bool {
		gone := v.Routine && (v.Outcome == api.AuditRight || v.Outcome == api.AuditVoid) && v.At.Before(old)
		return !gone && (q.Device == "" || v.Device == q.Device) && (q.Outcome == "" || v.Outcome == q.Outcome) && (q.Before == "" || v.ID < q.Before)
	}
	found, cut := a.newest.list(fits)
	if cut && q.Device != "" && len(found) <= q.Limit {
		var err error
		if found, err = a.listOf(ctx, q, fits); err != nil {
			return api.AuditList{}, err
		}
		cut = false
	}
	out := api.AuditList{Audits: found[:min(q.Limit, len(found))]}
	if out.Audits == nil {
		out.Audits = []api.AuditSummary{}
	}
	switch {
	case len(found) > q.Limit:
		out.Next = found[q.Limit-1].ID
		out.Cut = fmt.Sprintf("these are the newest %d; ask for more with a higher limit, or for a device or an outcome", q.Limit)
	case cut:
		out.Cut = fmt.Sprintf("only the newest %d challenges are looked through; name one device to see all of its own", maxNewestAudits)
	}
	return out, nil
}

// listOf looks through all that is kept of one device's challenges, up to one more
// than asked for.
func (a *audits) listOf(ctx context.Context, q api.AuditQuery, fits func(api.AuditSummary) bool) (out []api.AuditSummary, err error) {
	at := make(map[string]*table[api.Audit])
	for _, t := range []*table[api.Audit]{a.rows, a.routine} {
		keys, err := t.keys(ctx, string(q.Device)+".>")
		if err != nil {
			return nil, err
		}
		for _, k := range keys {
			at[k] = t
		}
	}
	keys := slices.Sorted(maps.Keys(at))
	for _, k := range slices.Backward(keys) {
		rec, err := at[k].find(ctx, k)
		if errors.Is(err, errNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if v := rec.Summary(); fits(v) {
			if out = append(out, v); len(out) > q.Limit {
				break
			}
		}
	}
	return out, nil
}

// find is one challenge.
func (a *audits) find(ctx context.Context, id string) (api.Audit, error) {
	none := refuse(http.StatusNotFound, wire.CodeNotFound, "there is no challenge %s; \"deimos audit ls\" shows the newest", id)
	if _, err := ulid.ParseStrict(id); err != nil {
		return api.Audit{}, none
	}
	for _, t := range []*table[api.Audit]{a.rows, a.routine} {
		keys, err := t.keys(ctx, "*."+id)
		if err != nil {
			return api.Audit{}, err
		}
		for _, k := range keys {
			if rec, err := t.find(ctx, k); !errors.Is(err, errNotFound) {
				return rec, err
			}
		}
	}
	if row, ok := a.challenges.get(id); ok {
		return row.Audit, nil
	}
	return api.Audit{}, none
}

func (c *Coordinator) auditRoutes() []route {
	var outcomes []string
	for _, o := range api.AuditOutcomes {
		outcomes = append(outcomes, string(o))
	}
	return []route{
		{method: "POST", path: v1 + "/audits", needs: toOperate, summary: "Challenge a device", in: api.AuditRequest{}, out: api.Audit{},
			handle: answer(func(r *http.Request, q api.AuditRequest) (api.Audit, error) {
				// A challenge that has begun is judged, whoever asked for it has left or not.
				ctx, cancel := c.outlive(r.Context())
				defer cancel()
				return c.audits.run(ctx, q)
			})},
		{method: "GET", path: v1 + "/audits", needs: toRead, summary: "List the challenges", out: api.AuditList{},
			query: []param{{"device", "of this device", ""}, {"outcome", "with this outcome: " + strings.Join(outcomes, ", "), ""}, {"before", "older than the one with this id", ""},
				{"limit", fmt.Sprintf("how many; default %d, at most %d", api.DefaultAudits, api.MaxAudits), 0}}, handle: c.listAudits},
		{method: "GET", path: v1 + "/audits/{id}", needs: toRead, summary: "One challenge, and what it cost", out: api.Audit{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			v, err := c.audits.find(r.Context(), r.PathValue("id"))
			if err == nil {
				writeJSON(w, http.StatusOK, v)
			}
			return err
		}},
		{method: "GET", path: v1 + "/audits/{id}/evidence", needs: toRead, summary: "All that is needed to judge a challenge again", out: api.Evidence{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			raw, err := c.audits.readEvidence(r.Context(), r.PathValue("id"))
			if err == nil {
				w.Header().Set("Content-Type", "application/json")
				_, _ = w.Write(raw) // who asked has left
			}
			return err
		}},
	}
}

func (c *Coordinator) listAudits(w http.ResponseWriter, r *http.Request) error {
	v := r.URL.Query()
	bad := func(format string, args ...any) error {
		return refuse(http.StatusBadRequest, "bad_query", format, args...)
	}
	q := api.AuditQuery{Device: wire.DeviceID(v.Get("device")), Outcome: api.AuditOutcome(v.Get("outcome")), Before: v.Get("before"), Limit: api.DefaultAudits}
	if q.Outcome != "" && !slices.Contains(api.AuditOutcomes, q.Outcome) {
		return bad("%q is no outcome of a challenge; they are %v", q.Outcome, api.AuditOutcomes)
	}
	if q.Device != "" {
		if _, err := c.reg.device(q.Device); err != nil {
			return err
		}
	}
	if q.Before != "" {
		if _, err := ulid.ParseStrict(q.Before); err != nil {
			return bad("before is the id of a challenge, not %q", q.Before)
		}
	}
	if s := v.Get("limit"); s != "" {
		var err error
		if q.Limit, err = strconv.Atoi(s); err != nil || q.Limit < 1 || q.Limit > api.MaxAudits {
			return bad("limit is a number from 1 to %d, not %q", api.MaxAudits, s)
		}
	}
	list, err := c.audits.list(r.Context(), q)
	if err == nil {
		writeJSON(w, http.StatusOK, list)
	}
	return err
}
