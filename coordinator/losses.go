package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// losses takes in what devices have lost and say so before they are asked.
//
// Each hello and heartbeat has the digest of all chunks that a device knows to be
// lost. If that is not what was dealt with last, the device gets one chunk.losses
// order. Of what its signed answer names,
//
//  1. the score hears what the device should have held ([audits.confessed]);
//  2. the holder is noted as lost, so that nobody reads the chunk there or is
//     challenged for it, and it is known to need repair;
//  3. the device is told to forget it (chunk.drop, only what is lost by then).
//
// Then its digest changes: to "", or it names the rest.
//
// A chunk that was stored there again since the device answered is left alone: its
// receipt is newer than the loss. That is decided with the chunk's placing lock
// held, under which the order to drop is made, so no order to store the chunk
// there comes between. Each step can be done again; the row names the order before
// the outbox has it, and has its end when all steps are done.
//
// At most one order of a device is open. They are lossPause apart, twice as far
// after each that brought nothing, up to lossRest; a digest that was dealt with
// and does not go away is asked about again after lossRest.
type losses struct {
	rows    *table[lossRow]
	reg     *registry
	outbox  *outbox
	storage *storage
	audits  *audits
	staging *staging
	now     func() time.Time
	log     *slog.Logger

	*settler
}

// lossRow is what is known about one device's losses.
type lossRow struct {
	Digest string    `json:"digest,omitempty"` // of those that were dealt with last
	Asked  time.Time `json:"asked,omitzero"`   // when the newest order was made
	Order  string    `json:"order,omitempty"`  // that order
	Ended  string    `json:"ended,omitempty"`  // the last Order whose end is dealt with
	// Vain is how many orders in a row the agent of version VainAgent has answered
	// with nothing that is of use; Deaf is the version of one that does not know
	// such orders.
	Vain      int    `json:"vain,omitempty"`
	VainAgent string `json:"vain_agent,omitempty"`
	Deaf      string `json:"deaf,omitempty"`
}

func (r lossRow) open() bool { return r.Order != r.Ended }

// pause is how long after the newest order the next one may be made.
func (r lossRow) pause(digest string) time.Duration {
	if digest == r.Digest {
		return lossRest
	}
	return min(lossPause<<min(r.Vain, 10), lossRest)
}

const (
	lossPause = 10 * time.Second
	lossRest  = 24 * time.Hour
	maxLosses = 6 << 20 // bytes of an answer: 10,000 losses, each with all that it may say
	// storedBefore is longer than a chunk.store order can be open: a receipt of one
	// that was made so long before is older than the loss.
	storedBefore = storeLife + 5*time.Minute
)

func newLosses(reg *registry, o *outbox, st *storage, a *audits, now func() time.Time, log *slog.Logger) *losses {
	s := &losses{reg: reg, outbox: o, storage: st, audits: a, now: now, log: log, settler: newSettler("losses", log)}
	s.settler.settle, s.settler.sweep = s.settle, s.sweep
	return s
}

// due tells whether a device that says digest is to be asked what it has lost.
func (s *losses) due(row lossRow, agent, digest string) bool {
	if digest == "" || row.open() || row.Deaf != "" && row.Deaf == agent {
		return false
	}
	if row.VainAgent != agent {
		row.Vain = 0 // another one may do better
	}
	return row.Order == "" || s.now().Sub(row.Asked) >= row.pause(digest)
}

// announced is told of every verified hello and heartbeat.
func (s *losses) announced(id wire.DeviceID) {
	row, _ := s.rows.get(string(id))
	d, _ := s.reg.rows.get(string(id))
	if s.due(row, d.Agent, s.reg.lossesOf(id)) {
		s.touch(id)
	}
}

// heard is told of every verified report that is kept.
func (s *losses) heard(r wire.Report) {
	if row, ok := s.rows.get(string(r.Device)); ok && r.State.Terminal() && row.Order == r.Order {
		s.touch(r.Device)
	}
}

// sweep notes the devices whose order has not ended, for all that is known here.
func (s *losses) sweep() {
	s.rows.each(func(id string, row lossRow) bool {
		if row.open() {
			s.touch(wire.DeviceID(id))
		}
		return true
	})
}

// settle makes true for one device what the type's comment says.
func (s *losses) settle(ctx context.Context, id wire.DeviceID) error {
	d, ok := s.reg.rows.get(string(id))
	if !ok || d.Retired {
		return nil
	}
	row, err := s.takeEnd(ctx, d)
	if err != nil || !s.due(row, d.Agent, s.reg.lossesOf(id)) {
		return err
	}
	row, err = s.rows.change(ctx, string(id), func(v *lossRow, _ bool) error {
		if !s.due(*v, d.Agent, s.reg.lossesOf(id)) {
			return errUnchanged
		}
		v.Order, v.Asked = ulid.Make().String(), s.now().UTC()
		return nil
	})
	if err == nil && row.open() {
		err = s.order(ctx, id, row)
	}
	return err
}

func (s *losses) order(ctx context.Context, id wire.DeviceID, row lossRow) error {
	_, err := s.outbox.submitAs(ctx, row.Order, id, wire.KindChunkLosses, struct{}{}, kindOf(wire.KindChunkLosses).life)
	return err
}

// takeEnd deals with how the order of the row has ended, if it has; an order that
// was not made because a coordinator stopped is made.
func (s *losses) takeEnd(ctx context.Context, d api.DeviceRecord) (lossRow, error) {
	row, _ := s.rows.get(string(d.ID))
	if !row.open() {
		return row, nil
	}
	o, err := s.outbox.get(ctx, d.ID, row.Order)
	if errors.Is(err, errNotFound) {
		return row, s.order(ctx, d.ID, row)
	}
	if err != nil || !o.State.Terminal() {
		return row, err
	}
	digest, ids, err := s.toldBy(ctx, o)
	var refused *refusal
	if err != nil && !errors.As(err, &refused) {
		return row, err
	}
	whole := false
	if refused == nil {
		if whole, err = s.deal(ctx, o, ids); err != nil {
			return row, err
		}
	} else {
		s.log.Info("a device has not said what it has lost", "device", d.ID, "order", row.Order, "reason", refused.Reason)
	}
	return s.rows.change(ctx, string(d.ID), func(v *lossRow, _ bool) error {
		if v.Order != row.Order || !v.open() {
			return errUnchanged
		}
		v.Ended, v.Deaf, v.Digest = v.Order, "", ""
		if whole {
			v.Digest = digest
		}
		if refused == nil {
			v.Vain = 0
			return nil
		}
		if d.Agent != v.VainAgent {
			v.Vain, v.VainAgent = 0, d.Agent
		}
		if o.State != wire.TimedOut && o.State != wire.Canceled {
			v.Vain++ // the device's own answer, not that it was away
		}
		if o.State == wire.Rejected && (o.Result.Code == wire.CodeUnknownKind || o.Result.Code == wire.CodeNotSupported) {
			v.Deaf = d.Agent
		}
		return nil
	})
}

// toldBy is what an ended order has brought: the digest of all that is lost, and
// the ids of as much of it as a device tells at once. What is the device's fault,
// or its answer, is a refusal.
func (s *losses) toldBy(ctx context.Context, o OrderRecord) (digest string, ids []string, err error) {
	no := func(what string) (string, []string, error) {
		return "", nil, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s %s", o.Order.Device, what)
	}
	var p *wire.Problem
	if errors.As(succeeded(o), &p) {
		return "", nil, refuse(http.StatusBadGateway, p.Code, "%s", p.Reason)
	}
	var body wire.LossReport
	if json.Unmarshal(o.Result.Body, &body) != nil {
		return no("sent its losses without a digest")
	}
	if a := o.Result.Attachment; a == nil || a.Size > maxLosses {
		return no(fmt.Sprintf("sent no list of its losses, or one of more than %d MiB", maxLosses>>20))
	}
	raw, err := attachmentOf(ctx, s.staging, o.Result)
	if err != nil {
		return "", nil, err
	}
	var list []wire.ChunkLoss
	if json.Unmarshal(raw, &list) != nil || len(list) > wire.MaxLosses {
		return no("sent a list of its losses that is none")
	}
	for _, l := range list {
		id, err := chunk.ParseID(l.ID)
		if err != nil {
			return no("says that it lost what is no chunk")
		}
		ids = append(ids, id.String())
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	if len(ids) > body.Count || len(ids) == body.Count && wire.LossDigest(ids) != body.Digest {
		return no("sent another list of its losses than it has the digest of")
	}
	return body.Digest, ids, nil
}

// deal does the three steps of the type's comment. whole is false if a chunk was
// left alone, as it may have been stored again.
func (s *losses) deal(ctx context.Context, o OrderRecord, ids []string) (whole bool, err error) {
	d := o.Order.Device
	before := s.storage.claims(d, ids)
	held := make(map[string]bool)
	for _, c := range s.storage.held(d) {
		held[c.ID] = true
	}
	var owed []string // that it should have held, for all that was known
	for _, id := range ids {
		if held[id] && s.older(ctx, d, before[id], o) {
			owed = append(owed, id)
		}
	}
	if len(owed) > 0 {
		if err := s.audits.confessed(ctx, d, owed, o.Order.ID); err != nil {
			return false, err
		}
	}
	whole = true
	for part := range slices.Chunk(ids, dropPart) {
		sure, err := s.forget(ctx, d, part, o)
		if err != nil {
			return false, err
		}
		whole = whole && len(sure) == len(part)
	}
	if len(ids) > 0 {
		s.log.Warn("a device has lost chunks", "device", d, "chunks", len(ids), "of_these_it_should_hold", len(owed))
		about, _ := json.Marshal(map[string]string{"order": o.Order.ID, "chunks": strconv.Itoa(len(ids)), "should_hold": strconv.Itoa(len(owed))}) // texts only
		s.reg.note(ctx, api.LogEntry{Actor: "device:" + string(d), Action: "device.chunks-lost", Targets: []string{string(d)}, Request: about})
	}
	return whole, nil
}

// forget notes chunks as lost and has the device drop them, but for those that
// were, or are being, stored there again. It returns which it was sure of.
func (s *losses) forget(ctx context.Context, d wire.DeviceID, ids []string, o OrderRecord) (sure []string, err error) {
	ids, unlock := s.storage.lockAll(ids)
	defer unlock()
	coming := make(map[string]bool)
	for _, v := range s.outbox.unfinished(wire.KindChunkStore) {
		if b, err := wire.DecodeBody[wire.ChunkStore](v.Order); err == nil && v.Order.Device == d {
			coming[b.ID] = true
		}
	}
	for _, id := range ids {
		if !coming[id] && s.older(ctx, d, s.storage.claim(d, id), o) {
			sure = append(sure, id)
		}
	}
	if len(sure) == 0 {
		return nil, nil
	}
	if err := s.storage.lost(ctx, d, sure); err != nil {
		return nil, err
	}
	_, err = s.outbox.submit(ctx, d, wire.KindChunkDrop, wire.ChunkDrop{IDs: sure, OnlyLost: true}, dropLife)
	return sure, err
}

// older tells whether a receipt, by the order that it answers, was given before
// an answer about losses; both by the device's own clock. There may be none ("").
func (s *losses) older(ctx context.Context, d wire.DeviceID, receipt string, answer OrderRecord) bool {
	if receipt == "" {
		return true
	}
	stored, err := ulid.ParseStrict(receipt)
	asked, err2 := ulid.ParseStrict(answer.Order.ID)
	if err != nil || err2 != nil {
		return false
	}
	if ulid.Time(asked.Time()).Sub(ulid.Time(stored.Time())) > storedBefore {
		return true
	}
	v, err := s.outbox.get(ctx, d, receipt)
	return err == nil && v.Result.At.Before(answer.Result.At)
}
