package coordinator

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	mrand "math/rand/v2"
	"net/http"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// audits challenges devices: for bytes that they should hold, and for jobs
// whose answer is known.
type audits struct {
	rows    *table[api.Audit]
	storage *storage
	compute *compute
	outbox  *outbox
	staging *staging
	// answer runs a module here. It is nil where no engine is linked in.
	answer Compute
	limit  time.Duration // for one challenge, its answer included
}

// Compute runs a module over an input and returns its standard output; the
// coordinator uses it to know the answer of a compute challenge beforehand.
type Compute func(ctx context.Context, module []byte, args []string, input []byte) ([]byte, error)

const (
	auditLife = time.Minute
	// defaultLeaves finds a device that has lost 10% in 99 of 100 audits:
	// 1 - 0.9^44 = 0.9903.
	defaultLeaves = 44
	maxLeaves     = 512
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
	nonce := make([]byte, 16)
	rand.Read(nonce)
	body := wire.Audit{Items: items, Nonce: hex.EncodeToString(nonce), Deadline: a.outbox.now().UTC().Add(auditLife)}
	rec := api.Audit{Kind: api.StorageAudit, Device: r.Device, Leaves: n}
	for _, it := range items {
		if !slices.Contains(rec.Chunks, it.Chunk) {
			rec.Chunks = append(rec.Chunks, it.Chunk)
		}
	}
	claim := a.storage.claims(r.Device, rec.Chunks)
	// On record before the device can know of it: what is cut off is void, and
	// not forgotten.
	if rec, err = a.begin(ctx, rec); err != nil {
		return rec, err
	}
	order, err := a.outbox.submit(ctx, r.Device, wire.KindAudit, body, auditLife)
	if err != nil {
		return a.unjudged(ctx, rec, err)
	}
	rec.Order = order.ID
	v, err := a.outbox.await(ctx, order, nil)
	if err != nil {
		return a.unanswered(ctx, rec, err)
	}
	sizes := make(map[string]int64, len(held))
	for _, c := range held {
		sizes[c.ID] = c.Size
	}
	if err := a.judgeStorage(ctx, &rec, body, sizes, claim, v); err != nil {
		return a.unjudged(ctx, rec, err)
	}
	if err := a.storage.lost(ctx, r.Device, slices.Concat(rec.Lost, rec.Wrong)); err != nil {
		return rec, err
	}
	return a.settle(ctx, rec, v)
}

// settle keeps an outcome, and then forgets the leaves that it was judged from.
// What proves a lie, and what may be a customer's job, stays for as long as the
// staging area keeps things.
func (a *audits) settle(ctx context.Context, rec api.Audit, v OrderRecord) (api.Audit, error) {
	rec, err := a.save(ctx, rec)
	if err != nil || rec.Outcome == api.AuditWrong || rec.Kind != api.StorageAudit || !isStaged(v.Result) {
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
	return a.save(context.WithoutCancel(ctx), rec)
}

// unjudged ends a challenge that failed on our side: no device pays for that.
func (a *audits) unjudged(ctx context.Context, rec api.Audit, cause error) (api.Audit, error) {
	rec.Outcome, rec.Reason = api.AuditVoid, fmt.Sprintf("the coordinator could not judge the answer: %v", cause)
	_, err := a.save(context.WithoutCancel(ctx), rec)
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

// judgeStorage settles a storage challenge from the signed answer, with nothing
// but each chunk's root and size.
func (a *audits) judgeStorage(ctx context.Context, rec *api.Audit, asked wire.Audit, sizes map[string]int64, claim claims, v OrderRecord) error {
	rec.Report = v.Report
	if v.State != wire.Succeeded {
		noProof(rec, v)
		return nil
	}
	wrong := func(format string, args ...any) {
		rec.Outcome, rec.Reason = api.AuditWrong, fmt.Sprintf(format, args...)
	}
	var ans wire.AuditAnswer
	if err := json.Unmarshal(v.Result.Body, &ans); err != nil || ans.Nonce != asked.Nonce {
		wrong("the answer is not to this challenge")
		return nil
	}
	raw, err := attachmentOf(ctx, a.staging, v.Result)
	var refused *refusal
	if errors.As(err, &refused) {
		wrong("%s", refused.Reason)
		return nil
	}
	if err != nil {
		return err
	}
	var leaves []wire.AuditLeaf
	if err := json.Unmarshal(raw, &leaves); err != nil || len(leaves) != len(asked.Items) {
		wrong("the answer has not one leaf for each that was asked for")
		return nil
	}
	judgeLeaves(rec, asked.Items, leaves, sizes, a.storage.released(rec.Device, claim))
	return nil
}

// noProof settles a challenge whose order did not succeed: what the device has
// signed is a refusal, what the outbox gave up on is silence.
func noProof(rec *api.Audit, v OrderRecord) {
	rec.Outcome, rec.Reason = api.AuditRefused, v.Result.Reason
	if v.State == wire.TimedOut && v.Result.Code == codeNoAnswer {
		rec.Outcome = api.AuditUnreachable
	}
}

// judgeLeaves counts leaves. Chunks that the device was released from meanwhile
// count for nothing, whether it has dropped them by then or not; a leaf that is
// made up is a lie about those too.
func judgeLeaves(rec *api.Audit, asked []wire.AuditItem, leaves []wire.AuditLeaf, sizes map[string]int64, released map[string]bool) {
	note := func(list *[]string, id string) {
		if !slices.Contains(*list, id) {
			*list = append(*list, id)
		}
	}
	for i, l := range leaves {
		it := asked[i]
		id, err := chunk.ParseID(it.Chunk)
		if err == nil && l.Lost {
			if !released[it.Chunk] {
				note(&rec.Lost, it.Chunk)
			}
			continue
		}
		if err == nil {
			err = chunk.VerifyLeaf(id, sizes[it.Chunk], it.Leaf, l.Data, l.Path)
		}
		if err != nil {
			note(&rec.Wrong, it.Chunk)
			continue
		}
		if !released[it.Chunk] {
			rec.Right++
		}
	}
	switch {
	case len(rec.Wrong) > 0:
		rec.Outcome, rec.Reason = api.AuditWrong, fmt.Sprintf("leaves of %d chunks do not verify", len(rec.Wrong))
	case len(rec.Lost) > 0:
		rec.Outcome, rec.Reason = api.AuditLost, fmt.Sprintf("the device says that it has lost %d chunks", len(rec.Lost))
	case rec.Right == 0:
		rec.Outcome, rec.Reason = api.AuditVoid, releasedReason
	default:
		rec.Outcome = api.AuditRight
	}
}

const releasedReason = "what the device was asked about was removed from it meanwhile; ask again"

// runCompute sends a job whose answer is known: a customer's module over a
// chunk that the device holds. The coordinator gets the same chunk from another
// holder and runs the job itself first. What the device sees is a job order
// like any other.
func (a *audits) runCompute(ctx context.Context, r api.AuditRequest) (api.Audit, error) {
	rec := api.Audit{Kind: api.ComputeAudit, Device: r.Device}
	if a.answer == nil {
		return rec, refuse(http.StatusNotImplemented, wire.CodeNotSupported, "this coordinator has no engine to know answers with")
	}
	input, data, err := a.knownInput(ctx, r.Device)
	if err != nil {
		return rec, err
	}
	module, err := a.compute.module(ctx, r.Module)
	if err != nil {
		return rec, err
	}
	out, err := a.answer(ctx, module, r.Args, data)
	if err != nil {
		return rec, refuse(http.StatusUnprocessableEntity, "no_answer_known", "the job fails here too, so it is no challenge: %v", err)
	}
	expected := sha256.Sum256(out)
	salt := make([]byte, 16)
	rand.Read(salt)
	rec.Chunks = []string{input}
	rec.Commitment = commitment(salt, expected[:])
	// The commitment is on record before the device can know of the job.
	if rec, err = a.begin(ctx, rec); err != nil {
		return rec, err
	}
	claim := a.storage.claims(r.Device, rec.Chunks)
	order, err := a.compute.send(ctx, r.Device, r.Module, r.Args, input, r.Limits)
	if err != nil {
		return a.unjudged(ctx, rec, err)
	}
	rec.Order = order.ID
	rec.Salt, rec.Expected = hex.EncodeToString(salt), hex.EncodeToString(expected[:])
	v, err := a.outbox.await(ctx, order, nil)
	if err != nil {
		return a.unanswered(ctx, rec, err)
	}
	rec.Report = v.Report
	if err := a.judgeCompute(ctx, &rec, claim, v); err != nil {
		return a.unjudged(ctx, rec, err)
	}
	if err := a.storage.lost(ctx, r.Device, rec.Lost); err != nil {
		return rec, err
	}
	return a.settle(ctx, rec, v)
}

func commitment(salt, outputSum []byte) string {
	sum := sha256.Sum256(slices.Concat(salt, outputSum))
	return hex.EncodeToString(sum[:])
}

// judgeCompute settles a compute challenge. Its error is the coordinator's own.
func (a *audits) judgeCompute(ctx context.Context, rec *api.Audit, claim claims, v OrderRecord) error {
	if v.State != wire.Succeeded {
		noProof(rec, v)
		// The input is the one chunk that the device may confess to have lost.
		if c := v.Result.Code; rec.Outcome == api.AuditRefused && (c == wire.CodeLost || c == wire.CodeNotFound) {
			rec.Outcome, rec.Lost = api.AuditLost, rec.Chunks
			if len(a.storage.released(rec.Device, claim)) > 0 {
				rec.Outcome, rec.Reason, rec.Lost = api.AuditVoid, releasedReason, nil
			}
		}
		return nil
	}
	j, err := a.compute.collect(ctx, v)
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		rec.Outcome, rec.Reason = api.AuditWrong, refused.Reason
		return nil
	case err != nil:
		return err
	}
	rec.Got = j.Result.Output
	if subtle.ConstantTimeCompare([]byte(rec.Got), []byte(rec.Expected)) == 1 {
		rec.Outcome = api.AuditRight
		return nil
	}
	rec.Outcome, rec.Reason = api.AuditWrong, "the device signed another result than the job has"
	return nil
}

// knownInput picks a chunk that d holds and somebody else can give us.
func (a *audits) knownInput(ctx context.Context, d wire.DeviceID) (string, []byte, error) {
	var last error
	held := a.storage.held(d)
	mrand.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
	for _, c := range held {
		data, err := a.storage.read(ctx, c.ID, d)
		if err == nil {
			return c.ID, data, nil
		}
		if last = err; ctx.Err() != nil {
			break
		}
	}
	if last == nil {
		last = errors.New("it holds none")
	}
	return "", nil, refuse(http.StatusConflict, "no_known_input",
		"a compute challenge needs a chunk that device %s holds and another online device too: %v", d, last)
}

// begin keeps a challenge that is about to be sent.
func (a *audits) begin(ctx context.Context, rec api.Audit) (api.Audit, error) {
	rec.ID, rec.At, rec.Outcome = ulid.Make().String(), a.outbox.now().UTC(), api.AuditPending
	return a.save(ctx, rec)
}

func (a *audits) save(ctx context.Context, rec api.Audit) (api.Audit, error) {
	return a.rows.change(ctx, rec.ID, func(v *api.Audit, _ bool) error {
		*v = rec
		return nil
	})
}

// void ends challenges begun before a time that nobody waits for any more: the
// coordinator was stopped before their answer was judged. They count for nothing.
func (a *audits) void(ctx context.Context, before time.Time) error {
	for _, rec := range a.list() {
		if rec.Outcome != api.AuditPending || rec.At.After(before) {
			continue
		}
		_, err := a.rows.change(ctx, rec.ID, func(v *api.Audit, exists bool) error {
			if !exists || v.Outcome != api.AuditPending {
				return errUnchanged
			}
			v.Outcome, v.Reason = api.AuditVoid, "the coordinator was stopped before the answer was judged"
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// sweep voids what another coordinator of the fleet left behind, until ctx ends.
func (a *audits) sweep(ctx context.Context, log *slog.Logger) {
	t := time.NewTicker(voidSweep)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := a.void(ctx, a.outbox.now().Add(-2*a.limit)); err != nil && ctx.Err() == nil {
				log.Warn("challenges that were given up stay pending", "error", err)
			}
		}
	}
}

// list is every challenge, oldest first.
func (a *audits) list() []api.Audit {
	return a.rows.all(func(x, y api.Audit) int { return cmp.Compare(x.ID, y.ID) })
}
