package coordinator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/wire"
)

// inventories is what devices have found in themselves, kept up to date.
//
// The first inventory comes with a device's enrolment, and nothing says which it
// is. Every hello and heartbeat names the digest of what the device has now. If
// that is not what is on record, the device gets one device.inventory order, and
// the attachment of its signed report takes the place of what was there.
//
// A device that changes its mind all the time must not burn its link: at most one
// order of a device is open, and they are made inventoryPause apart, the first and
// an operator's own excepted; twice as far after each that brought nothing, up to
// inventoryRest. An agent that does not know such orders is not asked
// again before its version changes.
//
// # Two records
//
// What a device has found is kept as it came, out of memory; what is known about
// that is a small row. The row names the order before the outbox has it, so that
// it is made once, whoever asks and however often, and an end that was not taken
// in because a coordinator stopped is found again ([inventories.sweep]). The
// inventory is written first and by compare-and-set, while the row still waits
// for it: nothing older ever replaces something newer.
type inventories struct {
	files   jetstream.KeyValue
	rows    *table[inventoryRow]
	reg     *registry
	outbox  *outbox
	staging *staging
	now     func() time.Time
	log     *slog.Logger
	*settler
}

// inventoryRow is what is known about one device's inventory.
type inventoryRow struct {
	Digest string    `json:"digest,omitempty"` // of the inventory on record; empty: it came with enrolment, or there is none
	Taken  time.Time `json:"taken,omitzero"`   // when it was taken in
	Asked  time.Time `json:"asked,omitzero"`   // when the newest order was made
	Order  string    `json:"order,omitempty"`  // that order
	Ended  string    `json:"ended,omitempty"`  // the last Order whose end is taken in here
	// Problem is why the newest order brought nothing; empty if it did.
	Problem string `json:"problem,omitempty"`
	// Vain is how many orders in a row the agent of version VainAgent has answered
	// with nothing that is of use.
	Vain      int    `json:"vain,omitempty"`
	VainAgent string `json:"vain_agent,omitempty"`
	// Deaf is the version of an agent that does not know such orders.
	Deaf string `json:"deaf,omitempty"`
}

func (r inventoryRow) open() bool { return r.Order != r.Ended }

// pause is how long after the newest order the next one may be made.
func (r inventoryRow) pause() time.Duration {
	return min(inventoryPause<<min(r.Vain, 5), inventoryRest)
}

const (
	inventoryPause = time.Hour
	inventoryRest  = 24 * time.Hour
	// refreshLife is for an operator, who waits for it.
	refreshLife = 2 * time.Minute
)

func newInventories(reg *registry, o *outbox, now func() time.Time, log *slog.Logger) *inventories {
	s := &inventories{reg: reg, outbox: o, now: now, log: log, settler: newSettler("inventory", log)}
	s.settler.settle, s.settler.sweep = s.settle, s.sweep
	return s
}

// open opens the buckets.
func (s *inventories) open(ctx context.Context, c *Coordinator) (err error) {
	if s.files, err = c.openKV(ctx, "inventories"); err != nil {
		return err
	}
	return bucket(ctx, c, "inventoried", &s.rows, nil)
}

// get is the inventory on record; none if there is none.
func (s *inventories) get(ctx context.Context, id wire.DeviceID) (json.RawMessage, inventoryRow, error) {
	row, _ := s.rows.get(string(id))
	raw, _, err := s.read(ctx, id)
	return raw, row, err
}

func (s *inventories) read(ctx context.Context, id wire.DeviceID) (raw []byte, rev uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	e, err := s.files.Get(ctx, string(id))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("the inventory of device %s cannot be read: %w", id, engine.StoreError(err))
	}
	return e.Value(), e.Revision(), nil
}

// put keeps an inventory if still says so of its device's row, as it is in the
// store, and nobody comes between.
func (s *inventories) put(ctx context.Context, id wire.DeviceID, raw []byte, still func(inventoryRow) bool) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	for {
		_, rev, err := s.read(ctx, id)
		if err != nil {
			return err
		}
		row, _, _, err := s.rows.load(ctx, string(id), true)
		if err != nil || !still(row) {
			return err
		}
		if rev == 0 {
			_, err = s.files.Create(ctx, string(id), raw)
		} else {
			_, err = s.files.Update(ctx, string(id), raw, rev)
		}
		if err == nil {
			return nil
		}
		if !isConflict(err) {
			return fmt.Errorf("the inventory of device %s cannot be saved: %w", id, engine.StoreError(err))
		}
	}
}

// came keeps what came with an enrolment: at the first, and as long as there is
// none; after that only over a connection with the device's certificate
// (certain), for a renewal without one may be a copy in other hands. One that the
// device has signed for is not replaced: it follows the device's changes.
func (s *inventories) came(ctx context.Context, id wire.DeviceID, found json.RawMessage, certain func() bool) error {
	if len(found) == 0 || len(found) > maxInventory || tooDeep(found) {
		return nil
	}
	if !certain() {
		if old, _, err := s.read(ctx, id); err != nil || old != nil {
			return err
		}
	}
	return s.put(ctx, id, found, func(row inventoryRow) bool { return row.Digest == "" })
}

// due tells whether a device that has the inventory digest is to be asked for it.
func (s *inventories) due(row inventoryRow, agent, digest string) bool {
	switch {
	case digest == "", digest == row.Digest, row.open():
		return false
	case row.Deaf != "" && row.Deaf == agent:
		return false
	}
	if row.VainAgent != agent {
		row.Vain = 0 // another one may do better
	}
	return row.Order == "" || s.now().Sub(row.Asked) >= row.pause()
}

// announced is told of every verified hello and heartbeat.
func (s *inventories) announced(id wire.DeviceID) {
	row, _ := s.rows.get(string(id))
	d, _ := s.reg.rows.get(string(id))
	if s.due(row, d.Agent, s.reg.inventoryOf(id)) {
		s.touch(id)
	}
}

// heard is told of every verified report that is kept.
func (s *inventories) heard(r wire.Report) {
	if row, ok := s.rows.get(string(r.Device)); ok && r.State.Terminal() && row.Order == r.Order {
		s.touch(r.Device)
	}
}

// sweep notes the devices whose order has not ended, for all that is known here:
// whoever was to take in its end may be gone.
func (s *inventories) sweep() {
	var open []wire.DeviceID
	s.rows.each(func(id string, row inventoryRow) bool {
		if row.open() {
			open = append(open, wire.DeviceID(id))
		}
		return true
	})
	for _, id := range open {
		s.touch(id)
	}
}

// settle makes true for one device what the type's comment says. It can be run at
// any time.
func (s *inventories) settle(ctx context.Context, id wire.DeviceID) error {
	d, ok := s.reg.rows.get(string(id))
	if !ok || d.Retired {
		return nil
	}
	row, err := s.takeEnd(ctx, d)
	if err != nil {
		return err
	}
	digest := s.reg.inventoryOf(id)
	if s.due(row, d.Agent, digest) {
		_, err = s.ask(ctx, id, kindOf(wire.KindInventory).life, func(row inventoryRow) bool { return s.due(row, d.Agent, digest) })
	}
	return err
}

// ask makes an order, unless one is open or it is not wanted any more.
func (s *inventories) ask(ctx context.Context, id wire.DeviceID, life time.Duration, wanted func(inventoryRow) bool) (inventoryRow, error) {
	row, err := s.rows.change(ctx, string(id), func(v *inventoryRow, _ bool) error {
		if v.open() || !wanted(*v) {
			return errUnchanged
		}
		v.Order, v.Asked = ulid.Make().String(), s.now().UTC()
		return nil
	})
	if err == nil && row.open() {
		_, err = s.outbox.submitAs(ctx, row.Order, id, wire.KindInventory, struct{}{}, life)
	}
	return row, err
}

// takeEnd takes in how the order of the row has ended, if it has; an order that
// was not made because a coordinator stopped is made.
func (s *inventories) takeEnd(ctx context.Context, d api.DeviceRecord) (inventoryRow, error) {
	row, _ := s.rows.get(string(d.ID))
	if !row.open() {
		return row, nil
	}
	o, err := s.outbox.get(ctx, d.ID, row.Order)
	if errors.Is(err, errNotFound) {
		_, err = s.outbox.submitAs(ctx, row.Order, d.ID, wire.KindInventory, struct{}{}, kindOf(wire.KindInventory).life)
		return row, err
	}
	if err != nil || !o.State.Terminal() {
		return row, err
	}
	digest, raw, err := s.foundBy(ctx, o)
	var refused *refusal
	if err != nil && !errors.As(err, &refused) {
		return row, err
	}
	waits := func(v inventoryRow) bool { return v.Order == row.Order && v.open() }
	if refused == nil {
		if err := s.put(ctx, d.ID, raw, waits); err != nil {
			return row, err
		}
	}
	var before string
	var taken bool
	row, err = s.rows.change(ctx, string(d.ID), func(v *inventoryRow, _ bool) error {
		if taken = waits(*v); !taken {
			return errUnchanged
		}
		v.Ended, v.Problem, v.Deaf = v.Order, "", ""
		if refused == nil {
			v.Vain = 0
			before, v.Digest, v.Taken = v.Digest, digest, s.now().UTC()
			return nil
		}
		if d.Agent != v.VainAgent {
			v.Vain, v.VainAgent = 0, d.Agent
		}
		if o.State == wire.Succeeded || o.State == wire.Rejected || o.State == wire.Failed {
			v.Vain++ // the device's own answer, not that it was away
		}
		v.Problem = cutText(sentence(refused.Reason), maxWarningText) // often the device's words
		if o.State == wire.Rejected && (o.Result.Code == wire.CodeUnknownKind || o.Result.Code == wire.CodeNotSupported) {
			v.Deaf = d.Agent
		}
		return nil
	})
	switch {
	case err != nil || !taken:
	case refused != nil:
		s.log.Info("a device's inventory was not taken", "device", d.ID, "order", row.Order, "reason", row.Problem)
	case before != "" && before != digest:
		about, _ := json.Marshal(map[string]string{"digest": digest, "before": before}) // texts only
		s.reg.note(ctx, api.LogEntry{Actor: "device:" + string(d.ID), Action: "device.inventory-changed", Targets: []string{string(d.ID)}, Request: about})
	}
	return row, err
}

// foundBy is what an ended order has brought. What is the device's fault, or its
// answer, is a refusal.
func (s *inventories) foundBy(ctx context.Context, o OrderRecord) (digest string, raw []byte, err error) {
	no := func(format string, args ...any) (string, []byte, error) {
		return "", nil, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s %s", o.Order.Device, fmt.Sprintf(format, args...))
	}
	var p *wire.Problem
	if errors.As(succeeded(o), &p) {
		return "", nil, refuse(http.StatusBadGateway, p.Code, "%s", p.Reason)
	}
	var body wire.InventoryReport
	if json.Unmarshal(o.Result.Body, &body) != nil || !isDigest(body.Digest) {
		return no("sent its inventory without a digest")
	}
	if a := o.Result.Attachment; a == nil || a.Size > maxInventory {
		return no("sent no inventory, or one of more than %d KiB", maxInventory>>10)
	}
	if raw, err = attachmentOf(ctx, s.staging, o.Result); err != nil {
		return "", nil, err
	}
	if raw = bytes.TrimSpace(raw); len(raw) == 0 || raw[0] != '{' || !json.Valid(raw) {
		return no("sent an inventory that is no JSON object")
	}
	if tooDeep(raw) {
		return no("sent an inventory that is nested more than %d deep", maxDepth)
	}
	return body.Digest, raw, nil
}

// refresh has a device say now what it has, and waits for that.
func (s *inventories) refresh(ctx context.Context, id wire.DeviceID) error {
	d, err := s.reg.device(id)
	if err != nil {
		return err
	}
	if d.Retired {
		return errAway(id)
	}
	row, err := s.ask(ctx, id, refreshLife, func(inventoryRow) bool { return true })
	if err != nil {
		return err
	}
	about(ctx, row.Order)
	if _, err := s.outbox.await(ctx, wire.Order{ID: row.Order, Device: id}, nil); err != nil {
		return err
	}
	if row, err = s.takeEnd(ctx, d); err != nil {
		return err
	}
	if row.Problem != "" {
		return refuse(http.StatusBadGateway, wire.CodeNotFound, "the device has not said what it has: %s", row.Problem)
	}
	return nil
}

func errAway(id wire.DeviceID) error {
	return refuse(http.StatusConflict, wire.CodeRetired, "device %s is retired: nothing is asked of it any more", id)
}

// isDigest tells whether s is a SHA-256 as devices write it.
func isDigest(s string) bool {
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == 64
}

// maxDepth is how deep JSON may be nested that a device has sent and that is
// shown to others as it is. encoding/json reads up to 10,000 levels, and would not
// write that within an answer of its own.
const maxDepth = 32

// tooDeep tells whether raw, which is valid JSON, is nested deeper.
func tooDeep(raw []byte) bool {
	depth, text := 0, false
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case text && c == '\\':
			i++
		case c == '"':
			text = !text
		case text:
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}
