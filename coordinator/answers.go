package coordinator

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// # Challenges whose answer is known, and what comes back
//
// A device does jobs when its owner lets it, behind those of customers. So the answer to a
// challenge is waited for as that of any other job: to the end of its order, in the
// background, without holding up anything. What is needed to judge it is on record, and found
// again by who starts next. Two coordinators that judge the same come to the same, and it
// counts once.

// challengeRow is a challenge under way.
type challengeRow struct {
	api.Audit
	// Of one among jobs: the answer, which nobody is shown before the device has given its
	// own, the salt of the commitment to it, and what the device should hold by then.
	Own    *trust.Own `json:"own,omitempty"`
	Secret string     `json:"secret,omitempty"`
	Claims claims     `json:"claims,omitempty"`
	// Needs are those of the customer's job that it is made of: witnesses have to meet them, too.
	Needs api.JobNeeds `json:"needs,omitzero"`
}

func byChallenge(x, y challengeRow) int { return cmp.Compare(x.ID, y.ID) }

// runCompute sends a job whose answer is known: a customer's module over a
// chunk that the device holds. The coordinator gets the same chunk from another
// holder and runs the job itself first. What the device sees is a job order
// like any other. Who has asked is told that it is pending, if it takes too long.
func (a *audits) runCompute(ctx context.Context, r api.AuditRequest) (api.Audit, error) {
	rec := api.Audit{Kind: api.ComputeAudit, Device: r.Device}
	if a.answer == nil {
		return rec, refuse(http.StatusNotImplemented, wire.CodeNotSupported, "this coordinator has no engine to know answers with")
	}
	if err := r.Limits.Check(); err != nil {
		return rec, badJob("%v", err)
	}
	input, data, err := a.knownInput(ctx, r.Device, func(api.Chunk) bool { return true })
	if err != nil {
		return rec, err
	}
	l := likeness{data: reading{input: data}, deadline: a.outbox.now().Add(api.JobLife)}
	l.asked.run = wire.JobRun{Module: wire.Blob{SHA256: r.Module}, Args: r.Args, Input: input, Limits: saidLimits(r.Limits)}
	l.device, _ = a.honesty.jobs.deviceNow(r.Device)
	row, err := a.computeChallenge(ctx, rec, l, func(time.Duration) {})
	if err != nil {
		return row.Audit, err
	}
	if row, err = a.honesty.dispatch(ctx, row, l); err != nil {
		return row.Audit, err
	}
	for {
		changed, leave := a.challenges.changed(row.ID)
		if _, open := a.challenges.get(row.ID); !open {
			leave()
			return a.ended(ctx, row.Audit)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			leave()
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return row.Audit, ctx.Err() // the coordinator is being stopped
			}
			row.Reason = fmt.Sprintf("the device has not done the job yet; \"deimos audit show %s\" says what becomes of it", row.ID)
			return row.Audit, nil
		}
	}
}

// reading is what a job reads, by chunk and by the name of an input.
type reading struct {
	input  []byte
	inputs map[string][]byte
}

// computeChallenge runs a job here, and puts it on record as a challenge that is to be sent. ran
// is told how long the former took.
func (a *audits) computeChallenge(ctx context.Context, rec api.Audit, l likeness, ran func(time.Duration)) (row challengeRow, err error) {
	row.Audit = rec
	job := l.asked.run
	if _, err := a.compute.module(ctx, job.Module.SHA256); err != nil {
		return row, err
	}
	known, took, err := a.known(ctx, job, func(context.Context) (reading, error) { return l.data, nil })
	ran(took)
	if err != nil {
		return row, refuse(http.StatusUnprocessableEntity, "no_answer_known", "the job fails here too, so it is no challenge: %v", err)
	}
	own := ownOf(known, job.Outputs)
	expected, err := hex.DecodeString(own.Output)
	if err != nil {
		return row, err
	}
	salt := make([]byte, 16)
	rand.Read(salt)
	row.Own, row.Secret = &own, hex.EncodeToString(salt)
	row.Order, row.CPUSeconds, row.Commitment = ulid.Make().String(), own.CPUSeconds, commitment(salt, expected)
	if job.Input != "" {
		row.Chunks = []string{job.Input}
	}
	row.Claims, row.Needs = a.storage.claims(row.Device, row.Chunks), l.asked.needs
	// The commitment is on record before the device can know of the job.
	return a.begin(ctx, row)
}

// dispatch sends a challenge when its turn at the device has come, and has the answer judged.
func (h *honesty) dispatch(ctx context.Context, row challengeRow, l likeness) (challengeRow, error) {
	h.mu.Lock()
	h.judging[row.Order] = true
	h.mu.Unlock()
	if _, err := h.send(ctx, row.Order, l.asked, l.device, l.deadline); err != nil {
		h.mu.Lock()
		delete(h.judging, row.Order)
		h.mu.Unlock()
		row.Audit, err = h.audits.unjudged(ctx, row.Audit, err)
		return row, err
	}
	select {
	case h.sent <- row:
		return row, nil
	case <-ctx.Done():
		h.mu.Lock()
		delete(h.judging, row.Order) // it is found again
		h.mu.Unlock()
		return row, ctx.Err()
	}
}

func commitment(salt, outputSum []byte) string {
	sum := sha256.Sum256(slices.Concat(salt, outputSum))
	return hex.EncodeToString(sum[:])
}

// knownInput picks a chunk that d holds, that fits, and that somebody else can give us.
func (a *audits) knownInput(ctx context.Context, d wire.DeviceID, fits func(api.Chunk) bool) (string, []byte, error) {
	var last error
	held := slices.DeleteFunc(a.storage.held(d), func(c api.Chunk) bool { return !fits(c) })
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
		last = errors.New("it holds none that fits")
	}
	return "", nil, refuse(http.StatusConflict, "no_known_input",
		"a compute challenge needs a chunk that device %s holds and another online device too: %v", d, last)
}

// recall has the orders known for what they are that were sent before this start.
func (h *honesty) recall() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.audits.challenges.each(func(_ string, v challengeRow) bool {
		if v.Own != nil {
			h.ours[v.Order] = time.Time{}
		}
		return true
	})
}

// judge judges the answers to challenges among jobs as they come, until ctx ends: those that
// it is handed, those that were open before, and those that another coordinator has left
// behind. alone says that there is no other.
func (h *honesty) judge(ctx context.Context, alone bool) {
	var going sync.WaitGroup
	defer going.Wait()
	found := func(before time.Time) {
		for _, row := range h.audits.challenges.all(byChallenge) {
			if row.Own == nil || row.At.After(before) {
				continue
			}
			h.mu.Lock()
			was := h.judging[row.Order]
			h.judging[row.Order] = true
			h.mu.Unlock()
			if !was {
				going.Go(func() { h.await(ctx, row) })
			}
		}
	}
	if alone {
		found(h.now())
	}
	t := time.NewTicker(voidSweep)
	defer t.Stop()
	for {
		select {
		case row := <-h.sent:
			going.Go(func() { h.await(ctx, row) })
		case <-t.C:
			found(h.now().Add(-2 * callLimit))
		case <-ctx.Done():
			return
		}
	}
}

// await waits for the end of a challenge's order, and judges it.
func (h *honesty) await(ctx context.Context, row challengeRow) {
	defer func() {
		h.forget(row.Order, h.now())
		h.mu.Lock()
		delete(h.judging, row.Order)
		h.mu.Unlock()
	}()
	for {
		v, err := h.audits.outbox.await(ctx, wire.Order{ID: row.Order, Device: row.Device}, nil)
		switch {
		case errors.Is(err, errNotFound):
			_, err = h.audits.unjudged(ctx, row.Audit, errors.New("it was stopped before it had sent the job"))
		case err == nil:
			if _, err = h.audits.judgedJob(ctx, row, v); err == nil {
				h.jobs.dropLists(ctx, v.Order)
			}
		}
		if err == nil || ctx.Err() != nil {
			return
		}
		if _, open := h.audits.challenges.get(row.ID); !open {
			h.log.Warn("a challenge among jobs is void", "device", row.Device, "challenge", row.ID, "error", err)
			return
		}
		h.log.Warn("the answer to a challenge among jobs could not be judged; it will be tried again", "device", row.Device, "challenge", row.ID, "error", err)
		if rest(ctx, houseEvery) != nil {
			return
		}
	}
}

// judgedJob ends a challenge among jobs whose order has ended.
func (a *audits) judgedJob(ctx context.Context, row challengeRow, v OrderRecord) (api.Audit, error) {
	rec := row.Audit
	rec.Salt, rec.Expected = row.Secret, row.Own.Output
	asked, err := wire.DecodeBody[wire.JobRun](v.Order)
	if err != nil {
		return a.unjudged(ctx, rec, err)
	}
	return a.judged(ctx, rec, v, a.sizesOf(rec), func(ans response) verdict {
		got := judgeCompute(asked, rec.Expected, ans, len(a.storage.released(rec.Device, row.Claims)) > 0)
		res, err := decodeResult(ans.report)
		if !got.OtherResult || err != nil {
			return got
		}
		if lie, why := a.honesty.vouched(ctx, askedAs(asked, row.Needs), *row.Own, res, rec.Device); !lie {
			got.Outcome, got.Reason = api.AuditVoid, why
		}
		return got
	})
}
