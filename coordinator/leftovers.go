package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// leftovers has a device forget what nobody needs of it any more, where it was away for
// longer than an order to drop lives ([dropLife]): the chunks' records are gone by then,
// and nothing else would ever free its disk.
//
// Such a device is asked what it holds, a page of [wire.MaxHoldings] chunks at a time, in
// the order of their ids. What of a page is on nobody's record is dropped, but for
//
//   - what the device was told to store since, or may be storing: [repairs.sendDrop];
//   - the outputs of its jobs of the last [outputsSpared], which may be on no record
//     until they are verified. A page waits until the jobs have ended that were open when
//     the device gave it.
//
// A page's order stands in the row before the outbox has it, and Ended when its chunks
// were dealt with; both can be done again.
type leftovers struct {
	rows    *table[leftoverRow]
	reg     *registry
	outbox  *outbox
	repairs *repairs
	staging *staging
	now     func() time.Time
	log     *slog.Logger

	dueMu sync.Mutex
	due   map[wire.DeviceID]string // newest chunk.drop that was not answered in time, as it is seen

	*settler
}

// leftoverRow is how far one device is.
type leftoverRow struct {
	Due   string    `json:"due"`             // newest chunk.drop that the device did not answer in time
	Done  string    `json:"done,omitempty"`  // the Due with which the last walk began that has ended
	Walk  string    `json:"walk,omitempty"`  // that with which the one under way began
	After string    `json:"after,omitempty"` // the last chunk that was looked at
	Order string    `json:"order,omitempty"` // of the newest page
	Ended string    `json:"ended,omitempty"` // the last Order that was dealt with
	Asked time.Time `json:"asked,omitzero"`
	Freed int       `json:"freed,omitempty"` // chunks that it was told to drop in this walk
}

func (r leftoverRow) open() bool { return r.Order != r.Ended }
func (r leftoverRow) left() bool { return r.Due > r.Done }

const (
	leftoverPause = 10 * time.Minute // between two questions, if the first brought nothing
	// outputsSpared is longer than the result of a job can wait for another to agree.
	outputsSpared = 9 * 24 * time.Hour
	// pageLife is how long a page can wait for jobs: staging keeps it for longer.
	pageLife = stagingLife / 2
)

func newLeftovers(r *repairs, now func() time.Time, log *slog.Logger) *leftovers {
	s := &leftovers{reg: r.reg, outbox: r.outbox, repairs: r, now: now, log: log, due: make(map[wire.DeviceID]string), settler: newSettler("leftovers", log)}
	s.settler.settle, s.settler.sweep = s.settle, s.sweep
	return s
}

// undropped is told of every order to drop that a device did not answer in time.
func (s *leftovers) undropped(d wire.DeviceID, order string) {
	s.dueMu.Lock()
	defer s.dueMu.Unlock()
	s.due[d] = max(s.due[d], order)
}

// arrived is told of every device that says hello.
func (s *leftovers) arrived(id wire.DeviceID) {
	s.dueMu.Lock()
	_, due := s.due[id]
	s.dueMu.Unlock()
	if row, _ := s.rows.get(string(id)); due || row.left() {
		s.touch(id)
	}
}

// heard is told of every verified report that is kept.
func (s *leftovers) heard(r wire.Report) {
	if row, ok := s.rows.get(string(r.Device)); ok && r.State.Terminal() && row.open() && row.Order == r.Order {
		s.touch(r.Device)
	}
}

// sweep notes the devices that something is left to do for.
func (s *leftovers) sweep() {
	s.dueMu.Lock()
	for d := range s.due {
		s.touch(d)
	}
	s.dueMu.Unlock()
	s.rows.each(func(id string, row leftoverRow) bool {
		if row.left() || row.open() {
			s.touch(wire.DeviceID(id))
		}
		return true
	})
}

// settle makes true for one device what the type's comment says.
func (s *leftovers) settle(ctx context.Context, id wire.DeviceID) error {
	d, ok := s.reg.rows.get(string(id))
	if !ok || d.Retired {
		s.seen(id, "")
		return nil
	}
	if err := s.takeDue(ctx, id); err != nil {
		return err
	}
	row, _ := s.rows.get(string(id))
	if row.open() {
		var err error
		if row, err = s.takeEnd(ctx, id, row); err != nil {
			return err
		}
	}
	if !row.left() || row.open() || !s.reg.online(id) || row.After == "" && s.now().Sub(row.Asked) < leftoverPause {
		return nil
	}
	row, err := s.change(ctx, id, func(v *leftoverRow) {
		if v.open() || !v.left() {
			return
		}
		if v.After == "" {
			v.Walk, v.Freed = v.Due, 0
		}
		v.Order, v.Asked = ulid.Make().String(), s.now().UTC()
	})
	if err == nil && row.open() {
		err = s.order(ctx, id, row)
	}
	return err
}

// takeDue notes what was seen to have timed out: the order's own record does not last.
func (s *leftovers) takeDue(ctx context.Context, id wire.DeviceID) error {
	s.dueMu.Lock()
	due := s.due[id]
	s.dueMu.Unlock()
	if row, _ := s.rows.get(string(id)); due > row.Due {
		if _, err := s.change(ctx, id, func(v *leftoverRow) { v.Due = max(v.Due, due) }); err != nil {
			return err
		}
	}
	s.seen(id, due)
	return nil
}

// seen forgets what was seen to have timed out, up to an order; "": all.
func (s *leftovers) seen(id wire.DeviceID, order string) {
	s.dueMu.Lock()
	defer s.dueMu.Unlock()
	if order == "" || s.due[id] <= order {
		delete(s.due, id)
	}
}

func (s *leftovers) change(ctx context.Context, id wire.DeviceID, f func(v *leftoverRow)) (leftoverRow, error) {
	return s.rows.change(ctx, string(id), func(v *leftoverRow, _ bool) error {
		before := *v
		if f(v); *v == before {
			return errUnchanged
		}
		return nil
	})
}

func (s *leftovers) order(ctx context.Context, id wire.DeviceID, row leftoverRow) error {
	_, err := s.outbox.submitAs(ctx, row.Order, id, wire.KindChunkHoldings, wire.ChunkHoldings{After: row.After}, kindOf(wire.KindChunkHoldings).life)
	return err
}

// takeEnd deals with a page that has come.
func (s *leftovers) takeEnd(ctx context.Context, id wire.DeviceID, row leftoverRow) (leftoverRow, error) {
	o, err := s.outbox.get(ctx, id, row.Order)
	if errors.Is(err, errNotFound) {
		return row, s.order(ctx, id, row)
	}
	if err != nil || !o.State.Terminal() {
		return row, err
	}
	// again begins anew, after a pause: nothing is known of the device's answer but that
	// it is of no use.
	again := func(why string) (leftoverRow, error) {
		s.log.Info("what a device holds is not known; it will be asked again", "device", id, "order", row.Order, "reason", why)
		return s.change(ctx, id, func(v *leftoverRow) {
			if v.Order == row.Order {
				v.Ended, v.After = v.Order, ""
			}
		})
	}
	if err := succeeded(o); err != nil {
		return again(wire.ProblemOf(err).Reason)
	}
	if s.now().Sub(row.Asked) > pageLife {
		return again("jobs of the device took too long to end")
	}
	if s.outbox.openFrom(id, wire.KindJobRun, o.Updated) {
		return row, nil // one may have stored what the page names; the sweep comes back
	}
	ids, err := s.page(ctx, o)
	var refused *refusal
	if errors.As(err, &refused) {
		return again(refused.Reason)
	}
	if err != nil {
		return row, err
	}
	done := len(ids) < wire.MaxHoldings
	if row.After != "" && len(ids) > 0 && ids[0] <= row.After {
		ids, done = nil, true // an agent that names the same ones each time: the first page was all that it tells
	}
	spared, err := s.outputs(ctx, id)
	if err != nil {
		return row, err
	}
	freed := 0
	for part := range slices.Chunk(slices.DeleteFunc(slices.Clone(ids), func(c string) bool { return spared[c] || s.known(id, c) }), dropPart) {
		if err := s.repairs.sendDrop(ctx, dropping{Device: id, Order: ulid.Make().String(), IDs: part}); err != nil {
			return row, err
		}
		freed += len(part)
	}
	row, err = s.change(ctx, id, func(v *leftoverRow) {
		if v.Order != row.Order || !v.open() {
			return
		}
		v.Ended, v.Freed = v.Order, v.Freed+freed
		if v.After = ""; done {
			v.Done = v.Walk
		} else {
			v.After = ids[len(ids)-1]
		}
	})
	if err == nil && done {
		s.log.Info("a device that was away was told to drop what nobody needs any more", "device", id, "chunks", row.Freed)
	}
	return row, err
}

// known tells whether a device should hold a chunk, by the record.
func (s *leftovers) known(d wire.DeviceID, id string) bool { return s.repairs.storage.holdsNow(d, id) }

// page is the ids that a device names, in order.
func (s *leftovers) page(ctx context.Context, o OrderRecord) ([]string, error) {
	no := func() ([]string, error) {
		return nil, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s says what it holds in a form that cannot be read", o.Order.Device)
	}
	raw, err := attachmentOf(ctx, s.staging, o.Result)
	if err != nil {
		return nil, err
	}
	var ids []string
	if json.Unmarshal(raw, &ids) != nil || len(ids) > wire.MaxHoldings {
		return no()
	}
	for _, id := range ids {
		if _, err := chunk.ParseID(id); err != nil {
			return no()
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// outputs are the chunks of the results that a device has given of late.
func (s *leftovers) outputs(ctx context.Context, d wire.DeviceID) (map[string]bool, error) {
	keys, err := s.outbox.rows.keys(ctx, string(d)+".>")
	if err != nil {
		return nil, err
	}
	out := make(map[string]bool)
	since := s.now().Add(-outputsSpared)
	for _, k := range keys {
		_, id := parseOrderKey(k)
		if u, err := ulid.ParseStrict(id); err != nil || ulid.Time(u.Time()).Before(since) {
			continue
		}
		row, err := s.outbox.rows.find(ctx, k)
		switch {
		case errors.Is(err, errNotFound):
			continue // its time is over
		case err != nil:
			return nil, err
		case row.Kind != wire.KindJobRun:
			continue
		}
		v, err := row.open()
		if err != nil {
			return nil, err
		}
		var result wire.JobResult
		if v.State != wire.Succeeded || json.Unmarshal(v.Result.Body, &result) != nil {
			continue
		}
		for _, f := range result.Outputs {
			for _, p := range f.Parts {
				out[p.Chunk] = true
			}
		}
	}
	return out, nil
}
