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
// # What bounds bulk
//
// Chunks that come in or go out are bulk; nothing else is, so an audit, a drop or
// a question never waits for one or is refused with it.
//
//   - Memory: chunks under way hold no more than a budget, whatever the number of
//     orders; more wait, by priority, of which none starves (see budget).
//   - The owner's limits ([Limits]): what they forbid now is REJECTED, with when
//     they allow it again, before it costs traffic.
//   - Disks that are too slow: new chunks are REJECTED with [wire.CodeBusy] (see
//     pressure).
//
// [Service.Refuse] says both at once when an order arrives, so that nobody waits in
// a line for a refusal, and the handlers again when its turn has come.
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

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// Memory that chunks under way may hold, in bytes: by default, and at least, so
// that there is room for two.
const (
	DefaultMemory = 32 << 20
	LeastMemory   = 2 * chunk.MaxSize
)

// What bulk waits for memory with.
var storePriority, servePriority = wire.KindChunkStore.Priority(), wire.KindChunkServe.Priority()

// maxAuditItems keeps the leaves of an audit below about 6 MiB of JSON.
const maxAuditItems = 1024

// Store is the device's volumes: a [store.Set].
type Store interface {
	Put(ctx context.Context, id chunk.ID, data []byte) (volume string, err error)
	CanTake(size int64) error
	Confirm(ctx context.Context, id chunk.ID) (volume string, size int64, err error)
	Get(ctx context.Context, id chunk.ID) ([]byte, error)
	Tree(ctx context.Context, id chunk.ID) (*chunk.Tree, error)
	Drop(ctx context.Context, ids []chunk.ID) error
	DropLost(ctx context.Context, ids []chunk.ID) error
	Lost() []store.Loss
	List(ctx context.Context, fn func(id chunk.ID, size int64, lost bool) error) error
	Volumes() []*store.Volume
}

// Limits are the owner's word on bulk. Both methods return at once. A refusal is
// a [wire.RejectedUntil].
type Limits interface {
	// Check tells whether a chunk may be moved now.
	Check() error
	// Reserve is Check, and sets size bytes aside until done is called.
	Reserve(size int64) (done func(), err error)
}

// Service carries out orders about chunks. Make it with [New].
type Service struct {
	set      Store
	transfer *transfer.Client
	log      *slog.Logger
	limits   Limits
	memory   *budget
	disks    *pressure
	away     func() string
	now      func() time.Time
}

// Options are what a [Service] may have besides its volumes; each may be left out.
type Options struct {
	// Away names, for a person, the volumes that the device should have and has not
	// now; "" if there are none.
	Away   func() string
	Limits Limits
	Memory int64            // for chunks under way, in bytes; 0 is DefaultMemory, LeastMemory the least
	Now    func() time.Time // the time that the coordinator goes by; nil: the machine's
	Log    *slog.Logger
}

// New returns a service over the device's volumes. Closing them is the caller's.
func New(set Store, t *transfer.Client, opt Options) *Service {
	s := &Service{set: set, transfer: t, log: opt.Log, limits: opt.Limits, disks: newPressure(), away: opt.Away, now: opt.Now}
	if s.now == nil {
		s.now = time.Now
	}
	if s.away == nil {
		s.away = func() string { return "" }
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.limits == nil {
		s.limits = noLimits{}
	}
	s.memory = newBudget(max(cmp.Or(opt.Memory, DefaultMemory), LeastMemory), s.hangs)
	return s
}

type noLimits struct{}

func (noLimits) Check() error                  { return nil }
func (noLimits) Reserve(int64) (func(), error) { return func() {}, nil }

// hangs tells whether a disk does not answer.
func (s *Service) hangs() bool {
	return slices.ContainsFunc(s.set.Volumes(), func(v *store.Volume) bool { return unanswered(v.CanTake(1)) })
}

// unanswered tells whether an error of the store is that a disk hangs.
func unanswered(err error) bool {
	return err != nil && wire.ProblemOf(err).Code == wire.CodeUnreachable
}

// Refuse tells why an order that arrives would be refused now; nil for one that
// is no bulk, or may go on. It does not block.
func (s *Service) Refuse(o wire.Order) error {
	switch o.Kind {
	case wire.KindChunkStore:
		if err := s.limits.Check(); err != nil {
			return err
		}
		return s.disks.refuse()
	case wire.KindChunkServe:
		return s.limits.Check()
	}
	return nil
}

// Pause is what a heartbeat says of that; nil if all is welcome.
func (s *Service) Pause() *wire.Pause {
	err := s.Refuse(wire.Order{Kind: wire.KindChunkStore})
	if err == nil {
		return nil
	}
	p := wire.ProblemOf(err)
	return &wire.Pause{Code: p.Code, Seconds: p.Seconds()}
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

// Get returns the bytes of a chunk, verified: those that are held here, else what url
// has. With asked the owner's word on bulk is asked before something is fetched, and
// may be a refusal for a while. Nothing is kept.
func (s *Service) Get(ctx context.Context, id string, size int64, url string, asked bool) ([]byte, error) {
	parsed, err := parseID(id)
	if err != nil {
		return nil, err
	}
	if err := chunk.CheckSize(size); err != nil {
		return nil, wire.RejectedBecause(wire.CodeBadBody, "chunk %s: %v", id, err)
	}
	data, err := s.set.Get(ctx, parsed)
	if err != nil {
		if url == "" {
			return nil, s.perhapsAway(err)
		}
		if data, err = s.borrow(ctx, parsed, wire.ChunkStore{ID: id, Size: size, URL: url}, asked); err != nil {
			return nil, err
		}
	}
	if int64(len(data)) != size {
		return nil, wire.FailedBecause(wire.CodeMismatch, "chunk %s has %d bytes, the order says %d", id, len(data), size)
	}
	return data, nil
}

// borrow downloads and verifies a chunk that is not to be kept.
func (s *Service) borrow(ctx context.Context, id chunk.ID, body wire.ChunkStore, asked bool) ([]byte, error) {
	if asked {
		done, err := s.limits.Reserve(body.Size)
		if err != nil {
			return nil, err
		}
		defer done()
	}
	data, err := s.download(ctx, id, body)
	if err == nil && chunk.Sum(data) != id {
		err = wire.FailedBecause(wire.CodeMismatch, "what was fetched as chunk %s is another; ask for it again", id)
	}
	return data, err
}

// Keep makes bytes a chunk of this device, durable when it returns the chunk's id.
func (s *Service) Keep(ctx context.Context, data []byte) (id string, err error) {
	if err := chunk.CheckSize(int64(len(data))); err != nil {
		return "", err
	}
	if err := s.canTake(int64(len(data))); err != nil {
		return "", err
	}
	if err := s.memory.acquire(ctx, int64(len(data)), storePriority); err != nil {
		return "", err
	}
	sum := chunk.Sum(data)
	_, err = s.put(ctx, sum, data) // gives the memory back
	return sum.String(), err
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

func (s *Service) store(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
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
	done, err := s.limits.Reserve(body.Size)
	if err != nil {
		return "", err
	}
	defer done()
	if err := s.canTake(body.Size); err != nil {
		return "", err // before it costs somebody's traffic
	}
	if err := s.memory.acquire(ctx, body.Size, storePriority); err != nil {
		return "", err
	}
	data, err := s.download(ctx, id, body)
	if err != nil {
		s.memory.release(body.Size, storePriority)
		return "", err
	}
	return s.put(ctx, id, data)
}

// canTake tells whether a chunk could be stored now.
func (s *Service) canTake(size int64) error {
	if err := s.disks.refuse(); err != nil {
		return err
	}
	err := s.set.CanTake(size)
	if unanswered(err) {
		s.disks.hung()
		return s.disks.refuse()
	}
	return err
}

func (s *Service) download(ctx context.Context, id chunk.ID, body wire.ChunkStore) ([]byte, error) {
	if err := s.disks.refuse(); err != nil { // it may have become slow since this waits for memory
		return nil, err
	}
	data := bytes.NewBuffer(make([]byte, 0, body.Size))
	if err := s.transfer.Fetch(ctx, body.URL, body.Size, data); err != nil {
		return nil, err
	}
	if got := int64(data.Len()); got != body.Size {
		return nil, wire.FailedBecause(wire.CodeMismatch, "chunk %s: %d bytes came, the order says %d", id, got, body.Size)
	}
	return data.Bytes(), nil
}

// put makes a chunk durable, and gives its memory back when the store has let go
// of it, which may be after the order has ended. It hashes before it writes.
func (s *Service) put(ctx context.Context, id chunk.ID, data []byte) (string, error) {
	type result struct {
		volume string
		err    error
	}
	stored := make(chan result, 1)
	go func() { // for as long as the store waits for its disks, at most
		end := s.disks.begin()
		volume, err := s.set.Put(context.WithoutCancel(ctx), id, data)
		if end() >= slowWrite && s.memory.hangs() {
			s.memory.park(int64(len(data)), storePriority)
		} else {
			s.memory.release(int64(len(data)), storePriority)
		}
		stored <- result{volume, err}
	}()
	select {
	case r := <-stored:
		if !unanswered(r.err) {
			return r.volume, r.err
		}
		s.disks.hung()
		p := *wire.ProblemOf(r.err)
		p.Code, p.After = wire.CodeBusy, s.disks.busy()
		return "", &p
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

func (s *Service) serve(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	body, err := wire.DecodeBody[wire.ChunkServe](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	id, err := parseID(body.ID)
	if err != nil {
		return wire.Outcome{}, err
	}
	done, err := s.limits.Reserve(chunk.MaxSize)
	if err != nil {
		return wire.Outcome{}, err
	}
	defer done()
	if err := s.memory.acquire(ctx, chunk.MaxSize, servePriority); err != nil {
		return wire.Outcome{}, err
	}
	defer s.memory.release(chunk.MaxSize, servePriority)
	data, err := s.set.Get(ctx, id)
	if err != nil {
		return wire.Outcome{}, s.perhapsAway(err)
	}
	return wire.Outcome{}, s.transfer.Put(ctx, body.URL, data, "application/octet-stream")
}

func (s *Service) drop(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
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
		return wire.Outcome{}, s.set.DropLost(ctx, ids)
	}
	return wire.Outcome{}, s.set.Drop(ctx, ids)
}

// Losses is every chunk known to be lost, sorted by id. One that is whole on
// another volume is not.
func (s *Service) Losses() []wire.ChunkLoss {
	var all []wire.ChunkLoss
	for _, l := range s.set.Lost() {
		all = append(all, wire.ChunkLoss{ID: l.ID.String(), Size: l.Size, Volume: l.Volume, Reason: l.Reason, Found: l.Found.UTC()})
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

func (s *Service) tellLosses(_ context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
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

func (s *Service) tellHoldings(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	body, err := wire.DecodeBody[wire.ChunkHoldings](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	if away := s.away(); away != "" {
		return wire.Outcome{}, wire.FailedBecause(wire.CodeUnreachable, "a volume is away, and nobody can say what is on it: %s. Ask again when it is back", away)
	}
	var all wire.Holdings
	ids := []string{}
	first := func() { // of those seen so far; a chunk can be on two volumes
		slices.Sort(ids)
		ids = slices.Compact(ids)
		ids = ids[:min(len(ids), wire.MaxHoldings)]
	}
	err = s.set.List(ctx, func(id chunk.ID, size int64, _ bool) error {
		all.Count++
		all.Bytes += size
		if name := id.String(); name > body.After {
			if ids = append(ids, name); len(ids) == 2*wire.MaxHoldings {
				first()
			}
		}
		return nil
	})
	if err != nil {
		return wire.Outcome{}, fmt.Errorf("what is held cannot be listed: %w", err)
	}
	first()
	attachment, err := json.Marshal(ids)
	if err != nil {
		return wire.Outcome{}, fmt.Errorf("encode what is held: %w", err)
	}
	return wire.Outcome{Body: all, Attachment: attachment}, nil
}

// errTooLate is the cause of an audit's context when its deadline passes.
var errTooLate = errors.New("the audit's deadline has passed")

func (s *Service) audit(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
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
		// By the device's clock, which is set by the coordinator's: the machine's may be
		// wrong by years.
		ctx, cancel = context.WithTimeoutCause(ctx, body.Deadline.Sub(s.now()), errTooLate)
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
		tell(wire.Progress{Done: float64(done+1) / float64(len(order))})
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
