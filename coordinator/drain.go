package coordinator

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// drains empties devices that are to leave.
//
// A device that is being drained gets no new chunks, and is no good holder any more:
// so repair brings what it holds elsewhere, copied from the device itself as long as
// it is there, rebuilt where it is not. It is challenged as before.
//
// When all is whole elsewhere, and only then, the device is told to drop its copies,
// a part at a time: each was read back from a device that keeps it ([repairs.giveUp]).
// Then it is asked what it holds (chunk.holdings), in an order that says, signed by
// the coordinator, what was moved and when. What it should not hold, it is told to
// drop, and asked again. If it holds nothing, order and report are the receipt.
//
// A row is there from the begin to a cancel, and has the receipt. A crash at any place
// is gone on from: what the device should hold follows from the chunks' records, an
// order to drop from the lease, and the row names the order before it is made.
type drains struct {
	rows    *table[drainRow]
	repairs *repairs
	note    func(context.Context, api.LogEntry)

	mu      sync.Mutex
	busy    map[wire.DeviceID]bool
	looked  map[wire.DeviceID]time.Time
	alone   map[wire.DeviceID]int // chunks that are not whole elsewhere, when it was looked
	stepped sync.WaitGroup
}

// drainRow is one drain.
type drainRow struct {
	Device wire.DeviceID `json:"device"`
	Began  time.Time     `json:"began"`
	By     string        `json:"by,omitempty"`
	Chunks int           `json:"chunks"`
	Bytes  int64         `json:"bytes"`
	// Given is what it was told to drop, each once, Part the newest of that.
	Given      int       `json:"given,omitempty"`
	GivenBytes int64     `json:"given_bytes,omitempty"`
	Part       []string  `json:"part,omitempty"`
	Dropped    time.Time `json:"dropped,omitzero"` // the newest time that it was told to
	Asked      time.Time `json:"asked,omitzero"`
	Order      string    `json:"order,omitempty"` // chunk.holdings, that is open
	Problem    string    `json:"problem,omitempty"`
	// Ended is when the device signed that it holds nothing; Receipt says so.
	Ended   time.Time       `json:"ended,omitzero"`
	Receipt json.RawMessage `json:"receipt,omitempty"` // an [api.Evidence]
}

const (
	drainPart  = 32 // chunks that are dropped at once: each is read first
	drainLook  = 2 * time.Second
	drainPause = 20 * time.Second // between two questions what a device holds
)

func newDrains(r *repairs, note func(context.Context, api.LogEntry)) *drains {
	return &drains{repairs: r, note: note, busy: make(map[wire.DeviceID]bool), looked: make(map[wire.DeviceID]time.Time), alone: make(map[wire.DeviceID]int)}
}

// leaving tells whether a device is being drained, or was.
func (s *drains) leaving(d wire.DeviceID) bool {
	_, ok := s.rows.get(string(d))
	return ok
}

// begin has a device drained.
func (s *drains) begin(ctx context.Context, d wire.DeviceID) (api.Drain, error) {
	r := s.repairs
	rec, err := r.reg.device(d)
	if err != nil {
		return api.Drain{}, err
	}
	if rec.Retired {
		return api.Drain{}, refuse(http.StatusConflict, wire.CodeRetired, "device %s is retired: what it held counts as lost, and is repaired", d)
	}
	if r.plan.AtOnce == 0 {
		return api.Drain{}, refuse(http.StatusConflict, "no_repair", "this coordinator repairs nothing, so it cannot bring elsewhere what device %s holds; start it with --repair-at-once above 0", d)
	}
	row := drainRow{Device: d, Began: r.now().UTC(), By: by(ctx)}
	for _, c := range r.storage.held(d) {
		row.Chunks, row.Bytes = row.Chunks+1, row.Bytes+c.Size
	}
	if err := s.rows.create(ctx, string(d), row); err != nil && !errors.Is(err, errExists) {
		return api.Drain{}, err
	}
	return s.show(d)
}

// by is the operator who asks.
func by(ctx context.Context) string {
	o, _ := ctx.Value(operatorKey{}).(api.Operator)
	return o.Name
}

// cancel has a device used as before.
func (s *drains) cancel(ctx context.Context, d wire.DeviceID) error {
	err := s.rows.remove(ctx, string(d), func(drainRow) bool { return true })
	if errors.Is(err, errNotFound) {
		return errNoDrain(d)
	}
	return err
}

func errNoDrain(d wire.DeviceID) error {
	return refuse(http.StatusNotFound, wire.CodeNotFound, "device %s is not being drained; \"deimos device drain %s\" begins it", d, d)
}

func (s *drains) show(d wire.DeviceID) (api.Drain, error) {
	row, ok := s.rows.get(string(d))
	if !ok {
		return api.Drain{}, errNoDrain(d)
	}
	return s.view(row), nil
}

func (s *drains) view(row drainRow) api.Drain {
	left := len(s.repairs.storage.held(row.Device))
	s.mu.Lock()
	alone, looked := s.alone[row.Device]
	s.mu.Unlock()
	if !looked {
		alone = left
	}
	v := api.Drain{Device: row.Device, State: api.DrainMoving, Began: row.Began, By: row.By, Chunks: row.Chunks, Bytes: row.Bytes,
		Left: left, Alone: min(alone, left), Moved: row.Given, Problem: row.Problem, Ended: row.Ended}
	switch {
	case !row.Ended.IsZero():
		v.State, v.Receipt = api.DrainDone, row.Order
	case v.Alone == 0:
		v.State = api.DrainDropping
	}
	return v
}

// list is every drain, the newest first.
func (s *drains) list() []api.Drain {
	out := []api.Drain{}
	for _, row := range s.rows.all(func(a, b drainRow) int { return cmp.Or(b.Began.Compare(a.Began), cmp.Compare(a.Device, b.Device)) }) {
		if s.repairs.reg.member(row.Device) {
			out = append(out, s.view(row))
		}
	}
	return out
}

// receipt is what was signed at the end.
func (s *drains) receipt(d wire.DeviceID) (json.RawMessage, error) {
	row, ok := s.rows.get(string(d))
	switch {
	case !ok:
		return nil, errNoDrain(d)
	case row.Ended.IsZero():
		return nil, refuse(http.StatusConflict, "not_drained", "device %s is still being drained; it signs when it holds nothing more", d)
	}
	return row.Receipt, nil
}

// tick goes on with every drain that can be gone on with.
func (s *drains) tick(ctx context.Context) error {
	for _, row := range s.rows.all(func(a, b drainRow) int { return a.Began.Compare(b.Began) }) {
		d := row.Device
		if !row.Ended.IsZero() || !s.repairs.reg.member(d) {
			continue
		}
		s.mu.Lock()
		wait := s.busy[d] || s.repairs.now().Sub(s.looked[d]) < drainLook
		if !wait {
			s.busy[d], s.looked[d] = true, s.repairs.now()
		}
		s.mu.Unlock()
		if wait {
			continue
		}
		s.stepped.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, s.repairs.plan.limit)
			defer cancel()
			err := s.step(ctx, row)
			s.mu.Lock()
			delete(s.busy, d)
			s.mu.Unlock()
			if err != nil && !errors.Is(err, errTaken) && ctx.Err() == nil {
				s.repairs.log.Warn("a drain waits", "device", d, "error", err)
			}
		})
	}
	return nil
}

// step does the next thing about one drain.
func (s *drains) step(ctx context.Context, row drainRow) error {
	r, d := s.repairs, row.Device
	held := r.storage.held(d)
	alone := s.look(held)
	s.mu.Lock()
	s.alone[d] = alone
	s.mu.Unlock()
	switch {
	case alone > 0:
		return s.say(ctx, d, s.holdup(held))
	case !r.reg.online(d):
		return s.say(ctx, d, "the device is not online: all that it should hold is whole elsewhere, and it can be retired; it signs that it is empty when it is back")
	}
	if err := r.lease(ctx, "d."+string(d)); err != nil {
		return err
	}
	defer r.unlease(ctx, "d."+string(d))
	if len(held) > 0 {
		return s.give(ctx, d, held)
	}
	return s.ask(ctx, d)
}

// look counts the chunks that are not whole elsewhere.
func (s *drains) look(held []api.Chunk) (alone int) {
	ids := make(map[string]bool, len(held))
	for _, c := range held {
		ids[c.ID] = true
	}
	for _, u := range s.repairs.units(ids) {
		if s.repairs.look(u).whole() {
			continue
		}
		for _, c := range u.chunks {
			if ids[c.ID] {
				alone++
			}
		}
	}
	return alone
}

// holdup is what repair says of the chunks; empty if it goes on.
func (s *drains) holdup(held []api.Chunk) string {
	ids := make(map[string]bool, len(held))
	for _, c := range held {
		ids[c.ID] = true
	}
	r := s.repairs
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.tasks {
		if t.problem != "" && !t.working && slices.ContainsFunc(t.chunks, func(c api.Chunk) bool { return ids[c.ID] }) {
			return t.problem
		}
	}
	return ""
}

// say notes what holds a drain up.
func (s *drains) say(ctx context.Context, d wire.DeviceID, problem string) error {
	return s.change(ctx, d, func(v *drainRow) error {
		if v.Problem == problem {
			return errUnchanged
		}
		v.Problem = problem
		return nil
	})
}

// change changes a drain that goes on.
func (s *drains) change(ctx context.Context, d wire.DeviceID, f func(v *drainRow) error) error {
	_, err := s.rows.change(ctx, string(d), func(v *drainRow, exists bool) error {
		if !exists || !v.Ended.IsZero() {
			return errUnchanged // it was canceled, or another coordinator was first
		}
		return f(v)
	})
	return err
}

// give has the device drop a part of what it holds.
func (s *drains) give(ctx context.Context, d wire.DeviceID, held []api.Chunk) error {
	for part := range slices.Chunk(held, drainPart) {
		ids := make([]string, len(part))
		for i, c := range part {
			ids[i] = c.ID
		}
		if !s.leaving(d) { // it was canceled
			return nil
		}
		_, err := s.repairs.giveUp(ctx, "d."+string(d), d, ids, func(sure []string) error { return s.count(ctx, d, sure) })
		if err != nil {
			return errors.Join(err, s.say(ctx, d, cutText(errText(err), maxLoggedText)))
		}
	}
	return nil
}

// count notes what the device is about to be told to drop. What was counted before,
// and a crash came before the device was told, does not count.
func (s *drains) count(ctx context.Context, d wire.DeviceID, ids []string) error {
	st := s.repairs.storage
	return s.change(ctx, d, func(v *drainRow) error {
		for _, id := range v.Part {
			if c, ok := st.chunks.get(id); ok && slices.ContainsFunc(c.Holders, func(h api.Holder) bool { return h.Device == d && !h.Lost }) {
				v.Given, v.GivenBytes = v.Given-1, v.GivenBytes-c.Size
			}
		}
		for _, id := range ids {
			c, _ := st.chunks.get(id)
			v.Given, v.GivenBytes = v.Given+1, v.GivenBytes+c.Size
		}
		v.Part, v.Dropped, v.Problem = ids, s.repairs.now().UTC(), ""
		return nil
	})
}

// ask has the device say what it holds, and ends the drain if that is nothing.
func (s *drains) ask(ctx context.Context, d wire.DeviceID) error {
	r := s.repairs
	row, ok := s.rows.get(string(d))
	if !ok || !row.Ended.IsZero() {
		return nil
	}
	if row.Order != "" {
		v, err := r.outbox.get(ctx, d, row.Order)
		switch {
		case errors.Is(err, errNotFound): // a crash came before it was made
			return s.order(ctx, row)
		case err != nil || !v.State.Terminal():
			return err
		}
		return s.heard(ctx, row, v)
	}
	if r.now().Sub(row.Asked) < drainPause || s.coming(d) {
		return nil
	}
	row.Order = ulid.Make().String()
	if err := s.change(ctx, d, func(v *drainRow) error {
		v.Order, v.Asked = row.Order, r.now().UTC()
		return nil
	}); err != nil {
		return err
	}
	return s.order(ctx, row)
}

// coming tells whether orders are out that change what a device holds.
func (s *drains) coming(d wire.DeviceID) bool {
	for _, k := range []wire.Kind{wire.KindChunkStore, wire.KindChunkDrop} {
		if s.repairs.outbox.openOfKind(d, k) > 0 {
			return true
		}
	}
	return false
}

// order makes the order whose report may be the receipt.
func (s *drains) order(ctx context.Context, row drainRow) error {
	body := wire.ChunkHoldings{Drained: &wire.Drained{Began: row.Began, Ended: latest(row.Dropped, row.Began), Chunks: row.Given, Bytes: row.GivenBytes}}
	_, err := s.repairs.outbox.submitAs(ctx, row.Order, row.Device, wire.KindChunkHoldings, body, kindOf(wire.KindChunkHoldings).life)
	return err
}

// heard takes in what a device says that it holds.
func (s *drains) heard(ctx context.Context, row drainRow, v OrderRecord) error {
	again := func(problem string) error {
		return s.change(ctx, row.Device, func(v *drainRow) error {
			v.Order, v.Problem = "", problem
			return nil
		})
	}
	if err := succeeded(v); err != nil {
		p := wire.ProblemOf(err)
		if p.Code == wire.CodeUnknownKind {
			return again("its agent cannot say what it holds, and so sign that this is nothing; update it, or retire the device: all that it held is whole elsewhere")
		}
		return again("the device did not say what it holds: " + cutText(p.Reason, 200))
	}
	var holds wire.Holdings
	if err := json.Unmarshal(v.Result.Body, &holds); err != nil || holds.Count < 0 {
		return again("the device said what it holds in a form that cannot be read")
	}
	if holds.Count > 0 {
		return errors.Join(s.dropRest(ctx, v), again(fmt.Sprintf("the device still holds %s that it should not; it was told to drop them", chunksOf(holds.Count))))
	}
	key, err := s.repairs.audits.keyOf(row.Device)
	if err != nil {
		return err
	}
	receipt, err := json.Marshal(api.Evidence{Format: evidenceFormat, Audit: row.Order, At: s.repairs.now().UTC(), Kind: api.DrainReceipt, Device: row.Device, DeviceKey: key,
		OrderKey: s.repairs.outbox.key.Public().(ed25519.PublicKey), Order: v.Envelope, Report: v.Report, Outcome: api.DrainEmpty})
	if err != nil {
		return err
	}
	ended := false
	err = s.change(ctx, row.Device, func(v *drainRow) error {
		if v.Order != row.Order {
			return errUnchanged
		}
		v.Ended, v.Receipt, v.Problem, ended = s.repairs.now().UTC(), receipt, "", true
		return nil
	})
	if err == nil && ended {
		about, _ := json.Marshal(map[string]string{"order": row.Order, "chunks": fmt.Sprint(row.Given)}) // texts only
		s.note(ctx, api.LogEntry{Actor: "device:" + string(row.Device), Action: "device.drained", Targets: []string{string(row.Device)}, Request: about})
	}
	return err
}

// dropRest has a device drop what it holds and nobody knows of: what is left of
// uploads that were cut off, and of another coordinator's time.
func (s *drains) dropRest(ctx context.Context, v OrderRecord) error {
	raw, err := attachmentOf(ctx, s.repairs.storage.staging, v.Result)
	if err != nil {
		return err
	}
	var ids []string
	if json.Unmarshal(raw, &ids) != nil || len(ids) > wire.MaxHoldings {
		return nil // it is asked again
	}
	ids = slices.DeleteFunc(ids, func(id string) bool { return !isDigest(id) })
	for part := range slices.Chunk(ids, dropPart) {
		if err := s.repairs.sendDrop(ctx, dropping{Device: v.Order.Device, Order: ulid.Make().String(), IDs: part}); err != nil {
			return err
		}
	}
	return nil
}

// lastCopies are the chunks that nobody could read any more without a device, and
// the names of some objects that need them.
func (r *repairs) lastCopies(d wire.DeviceID) (chunks int, names []string) {
	ids := make(map[string]bool)
	for _, c := range r.storage.held(d) {
		ids[c.ID] = true
	}
	for _, u := range r.units(ids) {
		if u.name == "" {
			continue
		}
		with, without, mine := 0, 0, 0
		for _, ch := range u.chunks {
			c, _ := r.storage.chunks.get(ch.ID)
			all, others := 0, 0
			for _, h := range c.Holders {
				if !h.Lost && r.reg.member(h.Device) {
					all = 1
					if h.Device != d {
						others = 1
					}
				}
			}
			with, without = with+all, without+others
			mine += all - others
		}
		need := 1
		if u.code != nil {
			need = u.code.Data
		}
		if mine > 0 && with >= need && without < need {
			chunks += mine
			if !slices.Contains(names, u.name) && len(names) < 5 {
				names = append(names, u.name)
			}
		}
	}
	slices.Sort(names)
	return chunks, names
}

// judgeDrain finds in what was signed that a device holds nothing.
func (c *evidenceCheck) judgeDrain(v *EvidenceVerdict) error {
	asked, err := wire.DecodeBody[wire.ChunkHoldings](c.asked)
	var holds wire.Holdings
	switch {
	case err != nil || asked.Drained == nil:
		return errors.New("the order does not say what was moved: it ends no drain")
	case c.Outcome != api.DrainEmpty || len(c.Lost)+len(c.Wrong)+len(c.Sizes)+len(c.Attachment) > 0 || c.Missing:
		return errors.New("it claims more than a drain's end")
	case c.answered.State != wire.Succeeded || json.Unmarshal(c.answered.Body, &holds) != nil || len(c.answered.Body) == 0:
		return errors.New("the device did not say what it holds")
	case holds != (wire.Holdings{}):
		return fmt.Errorf("the device says that it holds %s", chunksOf(holds.Count))
	}
	v.Outcome, v.Reason = api.DrainEmpty, fmt.Sprintf("the device says that it holds no chunk, at %s by its clock; the coordinator says that %s of %d bytes were moved from it between %s and %s",
		c.answered.At.UTC().Format(time.RFC3339), chunksOf(asked.Drained.Chunks), asked.Drained.Bytes, asked.Drained.Began.UTC().Format(time.RFC3339), asked.Drained.Ended.UTC().Format(time.RFC3339))
	v.Checked = append(v.Checked, "the device has signed that it holds nothing, and the coordinator what was moved")
	v.Trusting = append(v.Trusting, "that a device which says it is empty is; that what was moved can be read where it is")
	return nil
}
