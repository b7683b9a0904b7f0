// Package orders carries out what a coordinator orders about chunks: the
// handlers of chunk.store, chunk.serve, chunk.drop, chunk.losses, chunk.holdings and audit. It joins the rest
// of sync: chunks are named and proved by sync/chunk, kept by sync/store and
// moved by sync/transfer.
//
// Every handler may be run again for the same order at any time, also after a
// crash in its middle:
//
//   - chunk.store asks the store first. A chunk that is there, whole and durable
//     gets the same receipt again and is not fetched.
//   - chunk.serve puts the same bytes to the same URL.
//   - chunk.drop of what is not held is done already.
//   - audit answers from disk each time. It hides nothing: what does not verify
//     is confessed as lost, and so is what is not held, since the coordinator
//     asks only for what it has a receipt for. But while a volume is away, what
//     is not held may be on that, and nobody can say: then the answer is a
//     refusal ([wire.CodeUnreachable]), no proof and no confession.
//   - chunk.losses tells what is known to be lost by then.
//   - chunk.holdings tells what is held by then. While a volume is away nobody can
//     say, and it is refused as an audit is.
//
// Memory is bounded: chunks in flight for store and serve together stay below
// 32 MiB, and more wait.
package orders

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// inFlight is how many bytes of chunks may be in memory for transfers.
const inFlight = 32 << 20

// maxAuditItems keeps the leaves of an audit below about 6 MiB of JSON.
const maxAuditItems = 1024

// Service carries out orders about chunks. Make it with [New].
type Service struct {
	set      *store.Set
	transfer *transfer.Client
	log      *slog.Logger
	memory   *semaphore.Weighted
	away     func() string
}

// New returns a service over the device's volumes. Closing them is the caller's.
// away names, for a person, the volumes that the device should have and has not
// now; "" if there are none. It may be nil.
func New(set *store.Set, t *transfer.Client, away func() string, log *slog.Logger) *Service {
	if away == nil {
		away = func() string { return "" }
	}
	return &Service{set: set, transfer: t, log: log, memory: semaphore.NewWeighted(inFlight), away: away}
}

// Handlers returns the handlers by the kind of their orders.
func (s *Service) Handlers() map[wire.Kind]wire.Handler {
	return map[wire.Kind]wire.Handler{
		wire.KindChunkStore:    s.store,
		wire.KindChunkServe:    s.serve,
		wire.KindChunkDrop:     s.drop,
		wire.KindChunkLosses:   s.tellLosses,
		wire.KindChunkHoldings: s.tellHoldings,
		wire.KindAudit:         s.audit,
	}
}

// Read returns the bytes of the chunk with that id (hex), verified: a job's
// input. Problems as for [store.Volume.Get], and [wire.CodeBadBody].
func (s *Service) Read(ctx context.Context, id string) ([]byte, error) {
	parsed, err := parseID(id)
	if err != nil {
		return nil, err
	}
	data, err := s.set.Get(ctx, parsed)
	return data, s.perhapsAway(err)
}

// perhapsAway makes of "not held" what it means while a volume is away.
func (s *Service) perhapsAway(err error) error {
	if err == nil || wire.ProblemOf(err).Code != wire.CodeNotFound {
		return err
	}
	if away := s.away(); away != "" {
		return wire.FailedBecause(wire.CodeUnreachable, "%v; it may be on a volume that is away: %s. Ask again when that is back", err, away)
	}
	return err
}

func parseID(s string) (chunk.ID, error) {
	id, err := chunk.ParseID(s)
	if err != nil {
		return id, wire.RejectedBecause(wire.CodeBadBody, "%v", err)
	}
	return id, nil
}

func (s *Service) store(ctx context.Context, o wire.Order, _ func(float64)) (wire.Outcome, error) {
	body, err := wire.DecodeBody[wire.ChunkStore](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	id, err := parseID(body.ID)
	if err != nil {
		return wire.Outcome{}, err
	}
	if err := chunk.CheckSize(body.Size); err != nil {
		return wire.Outcome{}, wire.RejectedBecause(wire.CodeBadBody, "chunk %s: %v", id, err)
	}
	volume, size, err := s.set.Confirm(ctx, id)
	if err != nil {
		volume, err = s.fetch(ctx, id, body)
		size = body.Size
	}
	if err != nil {
		return wire.Outcome{}, err
	}
	if size != body.Size {
		return wire.Outcome{}, wire.RejectedBecause(wire.CodeMismatch, "chunk %s has %d bytes, the order says %d", id, size, body.Size)
	}
	return wire.Outcome{Body: wire.Receipt{ID: id.String(), Size: size, Volume: volume}}, nil
}

// fetch brings a chunk here and makes it durable.
func (s *Service) fetch(ctx context.Context, id chunk.ID, body wire.ChunkStore) (volume string, err error) {
	if err := s.set.CanTake(body.Size); err != nil {
		return "", err // before it costs somebody's traffic
	}
	if err := s.memory.Acquire(ctx, body.Size); err != nil {
		return "", context.Cause(ctx)
	}
	defer s.memory.Release(body.Size)
	data := bytes.NewBuffer(make([]byte, 0, body.Size))
	if err := s.transfer.Fetch(ctx, body.URL, body.Size, data); err != nil {
		return "", err
	}
	if got := int64(data.Len()); got != body.Size {
		return "", wire.FailedBecause(wire.CodeMismatch, "chunk %s: %d bytes came, the order says %d", id, got, body.Size)
	}
	// Put hashes before it writes.
	return s.set.Put(ctx, id, data.Bytes())
}

func (s *Service) serve(ctx context.Context, o wire.Order, _ func(float64)) (wire.Outcome, error) {
	body, err := wire.DecodeBody[wire.ChunkServe](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	id, err := parseID(body.ID)
	if err != nil {
		return wire.Outcome{}, err
	}
	if err := s.memory.Acquire(ctx, chunk.MaxSize); err != nil {
		return wire.Outcome{}, context.Cause(ctx)
	}
	defer s.memory.Release(chunk.MaxSize)
	data, err := s.set.Get(ctx, id)
	if err != nil {
		return wire.Outcome{}, s.perhapsAway(err)
	}
	return wire.Outcome{}, s.transfer.Put(ctx, body.URL, data, "application/octet-stream")
}

func (s *Service) drop(ctx context.Context, o wire.Order, _ func(float64)) (wire.Outcome, error) {
	body, err := wire.DecodeBody[wire.ChunkDrop](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	ids := make([]chunk.ID, len(body.IDs))
	for i, text := range body.IDs {
		if ids[i], err = parseID(text); err != nil {
			return wire.Outcome{}, err
		}
	}
	if body.OnlyLost {
		lost := make(map[string]bool)
		for _, l := range s.Losses() {
			lost[l.ID] = true
		}
		ids = slices.DeleteFunc(ids, func(id chunk.ID) bool { return !lost[id.String()] })
	}
	return wire.Outcome{}, s.set.Drop(ctx, ids)
}

// Losses is every chunk known to be lost, sorted by id. One that is whole on
// another volume is not.
func (s *Service) Losses() []wire.ChunkLoss {
	var all []wire.ChunkLoss
	for _, v := range s.set.Volumes() {
		for _, l := range v.Lost() {
			if !s.set.Has(l.ID) {
				all = append(all, wire.ChunkLoss{ID: l.ID.String(), Size: l.Size, Volume: v.ID(), Reason: l.Reason, Found: l.Found.UTC()})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b wire.ChunkLoss) int { return cmp.Compare(a.ID, b.ID) })
	return slices.CompactFunc(all, func(a, b wire.ChunkLoss) bool { return a.ID == b.ID }) // of two damaged copies one
}

// DigestOf is the [wire.LossDigest] of losses.
func DigestOf(losses []wire.ChunkLoss) string {
	ids := make([]string, len(losses))
	for i, l := range losses {
		ids[i] = l.ID
	}
	return wire.LossDigest(ids)
}

func (s *Service) tellLosses(_ context.Context, o wire.Order, _ func(float64)) (wire.Outcome, error) {
	if _, err := wire.DecodeBody[struct{}](o); err != nil {
		return wire.Outcome{}, err
	}
	all := s.Losses()
	few := slices.Clone(all[:min(len(all), wire.MaxLosses)])
	for i := range few {
		few[i].Reason = few[i].Reason[:min(len(few[i].Reason), maxReason)]
	}
	attachment, err := json.Marshal(few)
	if err != nil {
		return wire.Outcome{}, fmt.Errorf("encode the losses: %w", err)
	}
	return wire.Outcome{Body: wire.LossReport{Digest: DigestOf(all), Count: len(all)}, Attachment: attachment}, nil
}

// maxReason keeps the answer with all losses that it may have below 4 MiB.
const maxReason = 160 // bytes

func (s *Service) tellHoldings(ctx context.Context, o wire.Order, _ func(float64)) (wire.Outcome, error) {
	if _, err := wire.DecodeBody[wire.ChunkHoldings](o); err != nil {
		return wire.Outcome{}, err
	}
	if away := s.away(); away != "" {
		return wire.Outcome{}, wire.FailedBecause(wire.CodeUnreachable, "a volume is away, and nobody can say what is on it: %s. Ask again when it is back", away)
	}
	var all wire.Holdings
	ids := []string{}
	err := s.set.List(ctx, func(id chunk.ID, size int64, _ bool) error {
		all.Count++
		all.Bytes += size
		if len(ids) < wire.MaxHoldings {
			ids = append(ids, id.String())
		}
		return nil
	})
	if err != nil {
		return wire.Outcome{}, fmt.Errorf("what is held cannot be listed: %w", err)
	}
	attachment, err := json.Marshal(ids)
	if err != nil {
		return wire.Outcome{}, fmt.Errorf("encode what is held: %w", err)
	}
	return wire.Outcome{Body: all, Attachment: attachment}, nil
}

// errTooLate is the cause of an audit's context when its deadline passes.
var errTooLate = errors.New("the audit's deadline has passed")

func (s *Service) audit(ctx context.Context, o wire.Order, progress func(float64)) (wire.Outcome, error) {
	body, err := wire.DecodeBody[wire.Audit](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	places, order, err := placesOf(body.Items)
	if err != nil {
		return wire.Outcome{}, err
	}
	if !body.Deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, body.Deadline, errTooLate)
		defer cancel()
	}
	answer := wire.AuditAnswer{Nonce: body.Nonce}
	leaves := make([]wire.AuditLeaf, len(body.Items))
	for done, id := range order {
		lost, err := s.prove(ctx, id, body.Items, places[id], leaves)
		if ctx.Err() != nil {
			return wire.Outcome{}, auditEnded(ctx, body.Deadline)
		}
		if err != nil {
			return wire.Outcome{}, err
		}
		if lost {
			answer.Lost = append(answer.Lost, id.String())
		}
		progress(float64(done+1) / float64(len(order)))
	}
	attachment, err := json.Marshal(leaves)
	if err != nil {
		return wire.Outcome{}, fmt.Errorf("encode the leaves of an audit: %w", err)
	}
	return wire.Outcome{Body: answer, Attachment: attachment}, nil
}

// placesOf groups the items by chunk, so that each chunk is read once: for each
// chunk where its items stand, and the chunks in the order that they come.
func placesOf(items []wire.AuditItem) (map[chunk.ID][]int, []chunk.ID, error) {
	if len(items) > maxAuditItems {
		return nil, nil, wire.RejectedBecause(wire.CodeLimit, "an audit may ask for %d leaves, not %d", maxAuditItems, len(items))
	}
	places := map[chunk.ID][]int{}
	var order []chunk.ID
	for i, item := range items {
		id, err := parseID(item.Chunk)
		if err != nil {
			return nil, nil, err
		}
		if item.Leaf < 0 || item.Leaf >= chunk.LeafCount(chunk.MaxSize) {
			return nil, nil, wire.RejectedBecause(wire.CodeBadBody, "no chunk has a leaf %d", item.Leaf)
		}
		if places[id] == nil {
			order = append(order, id)
		}
		places[id] = append(places[id], i)
	}
	return places, order, nil
}

// prove fills in the leaves of one chunk, or confesses that it is lost.
func (s *Service) prove(ctx context.Context, id chunk.ID, items []wire.AuditItem, places []int, leaves []wire.AuditLeaf) (lost bool, err error) {
	tree, err := s.set.Tree(ctx, id)
	if err != nil {
		code := wire.ProblemOf(err).Code
		if code != wire.CodeLost && code != wire.CodeNotFound {
			return false, err
		}
		if err = s.perhapsAway(err); wire.ProblemOf(err).Code == wire.CodeUnreachable {
			return false, err
		}
		s.log.Warn("an audit asks for a chunk that is lost", "chunk", id, "reason", err)
		for _, i := range places {
			leaves[i] = wire.AuditLeaf{Chunk: items[i].Chunk, Leaf: items[i].Leaf, Lost: true}
		}
		return true, nil
	}
	for _, i := range places {
		data, path, err := tree.Prove(items[i].Leaf)
		if err != nil {
			return false, wire.RejectedBecause(wire.CodeBadBody, "chunk %s: %v", id, err)
		}
		// A copy, so that the rest of the chunk can go.
		leaves[i] = wire.AuditLeaf{Chunk: items[i].Chunk, Leaf: items[i].Leaf, Data: bytes.Clone(data), Path: path}
	}
	return false, nil
}

// auditEnded tells lateness, which is an answer, from being stopped.
func auditEnded(ctx context.Context, deadline time.Time) error {
	if cause := context.Cause(ctx); !errors.Is(cause, errTooLate) {
		return cause
	}
	return &wire.Problem{State: wire.TimedOut, Code: wire.CodeExpired, Reason: fmt.Sprintf("the audit was not done by its deadline, %s", deadline.UTC().Format(time.RFC3339))}
}
