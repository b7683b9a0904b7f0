package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func (c *Coordinator) deviceRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/devices", needs: toRead, summary: "List the devices", out: []api.Device{},
			query: []param{{"device", "this one; may be repeated", []string{}}, {"group", "of this group; may be repeated", []string{}}, {"label", "with this label, key=value; may be repeated", []string{}},
				{"state", "online, offline or retired", ""}, {"trouble", "only those that something is wrong with", false}, pageAfter, pageLimit(api.MaxDevicePage)}, handle: c.listDevices},
		{method: "PATCH", path: v1 + "/devices", needs: toOperate, summary: "Set the group and labels of devices", in: api.DeviceChange{}, out: []wire.DeviceID{},
			handle: answer(func(r *http.Request, q api.DeviceChange) ([]wire.DeviceID, error) {
				ctx, cancel := c.toTheEnd(r.Context())
				defer cancel()
				return c.reg.set(ctx, q)
			})},
		{method: "GET", path: v1 + "/devices/{id}", needs: toRead, summary: "One device", out: api.Device{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			v, err := c.showDevice(r.Context(), wire.DeviceID(r.PathValue("id")))
			if err == nil {
				writeJSON(w, http.StatusOK, v)
			}
			return err
		}},
		{method: "POST", path: v1 + "/devices/{id}/identify", needs: toOperate, summary: "Have a device show by its light which one it is", in: api.IdentifyRequest{}, out: api.Order{},
			handle: answer(func(r *http.Request, q api.IdentifyRequest) (api.Order, error) {
				return c.identify(r.Context(), wire.DeviceID(r.PathValue("id")), q)
			})},
		{method: "POST", path: v1 + "/devices/{id}/history", needs: toRead, unlogged: true, summary: "Ask a device for what it has measured", in: wire.HistoryRequest{}, out: api.Order{},
			handle: answer(func(r *http.Request, q wire.HistoryRequest) (api.Order, error) {
				return c.askHistory(r.Context(), wire.DeviceID(r.PathValue("id")), q)
			})},
		{method: "POST", path: v1 + "/devices/{id}/inventory", needs: toOperate, summary: "Have a device say now what it has", out: api.Device{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			id := wire.DeviceID(r.PathValue("id"))
			if err := c.inventories.refresh(r.Context(), id); err != nil {
				return err
			}
			v, err := c.showDevice(r.Context(), id)
			if err == nil {
				writeJSON(w, http.StatusOK, v)
			}
			return err
		}},
		{method: "POST", path: v1 + "/devices/{id}/retire", needs: toOperate, summary: "Send a device away for ever", out: api.Device{}, query: []param{{"force", "even if it has the last copies of something", false}}, handle: func(w http.ResponseWriter, r *http.Request) error {
			id := wire.DeviceID(r.PathValue("id"))
			if r.URL.Query().Get("force") != "true" {
				if err := c.mayRetire(id); err != nil {
					return err
				}
			}
			d, err := c.retire(r.Context(), id)
			if err == nil {
				writeJSON(w, http.StatusOK, c.reg.view(d))
			}
			return err
		}},
	}
}

// page is the part of a list by device that a request asks for.
type page struct {
	after wire.DeviceID
	limit int
}

var pageAfter = param{"after", "only devices with a greater id: that of the last one of the page before", ""}

func pageLimit(most int) param {
	return param{"limit", fmt.Sprintf("how many devices; default and at most %d", most), 0}
}

func parsePage(q url.Values, most int) (page, error) {
	p := page{wire.DeviceID(q.Get("after")), most}
	if s := q.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > most {
			return p, refuse(http.StatusBadRequest, "bad_limit", "limit must be a number from 1 to %d, not %q", most, s)
		}
		p.limit = n
	}
	return p, nil
}

// of is the page of a list of all; it sorts it by id.
func (p page) of(all []api.DeviceRecord) []api.DeviceRecord {
	all = slices.DeleteFunc(all, func(d api.DeviceRecord) bool { return d.ID <= p.after })
	slices.SortFunc(all, func(a, b api.DeviceRecord) int { return cmp.Compare(a.ID, b.ID) })
	return all[:min(len(all), p.limit)]
}

func (c *Coordinator) listDevices(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	s, err := api.ParseSelector(q)
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_selector", "%v", err)
	}
	state := api.DeviceState(q.Get("state"))
	switch state {
	case "", api.DeviceOnline, api.DeviceOffline, api.DeviceRetired:
	default:
		return refuse(http.StatusBadRequest, "bad_state", "a device is online, offline or retired, not %q; \"deimos device pending\" shows who waits to be claimed", label(string(state)))
	}
	p, err := parsePage(q, api.MaxDevicePage)
	if err != nil {
		return err
	}
	trouble, err := parseTrouble(q.Get("trouble"))
	if err != nil {
		return err
	}
	var all []api.DeviceRecord
	c.reg.rows.each(func(_ string, d api.DeviceRecord) bool {
		rec := d
		rec.Retired = false // a list shows them too
		if s.Matches(rec) && (state == "" || state == stateOf(d, c.reg.online(d.ID))) && (!trouble || c.reg.troubled(d)) {
			all = append(all, d)
		}
		return true
	})
	list := []api.Device{}
	for _, d := range p.of(all) {
		list = append(list, listed(c.reg.view(d)))
	}
	writeJSON(w, http.StatusOK, list)
	return nil
}

// showDevice is all that is known of one device.
func (c *Coordinator) showDevice(ctx context.Context, id wire.DeviceID) (api.Device, error) {
	d, err := c.reg.device(id)
	if err != nil {
		return api.Device{}, err
	}
	v := c.reg.view(d)
	score := c.audits.scoreOf(id).view()
	v.Score = &score
	if drain, err := c.repairs.drains.show(id); err == nil {
		v.Drain = &drain
	}
	v.Rest = c.storage.resting.of(id)
	raw, row, err := c.inventories.get(ctx, id)
	v.Inventory, v.InventoryDigest, v.InventoryTaken, v.InventoryProblem = raw, row.Digest, row.Taken, row.Problem
	return v, err
}

// selected is the devices that a selector means, sorted by id. A device that is
// named and not there, or retired, is an error, and so is a selector that means
// nobody, unless it is the empty one.
func (r *registry) selected(s api.Selector) ([]api.DeviceRecord, error) {
	for _, id := range s.Devices {
		d, err := r.device(id)
		if err != nil {
			return nil, err
		}
		if d.Retired {
			return nil, refuse(http.StatusConflict, wire.CodeRetired, "device %s is retired", id)
		}
	}
	var out []api.DeviceRecord
	r.rows.each(func(_ string, d api.DeviceRecord) bool {
		if s.Matches(d) {
			out = append(out, d)
		}
		return true
	})
	if len(out) == 0 && !s.Empty() {
		return nil, errNobody
	}
	slices.SortFunc(out, func(a, b api.DeviceRecord) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

// shown is what selected is, for who only looks: a device that is named may be
// retired.
func (r *registry) shown(s api.Selector) ([]api.DeviceRecord, error) {
	if len(s.Devices) == 0 {
		return r.selected(s)
	}
	var out []api.DeviceRecord
	for _, id := range slices.Compact(slices.Sorted(slices.Values(s.Devices))) {
		d, err := r.device(id)
		if err != nil {
			return nil, err
		}
		rec := d
		rec.Retired = false
		if s.Matches(rec) {
			out = append(out, d)
		}
	}
	if len(out) == 0 {
		return nil, errNobody
	}
	return out, nil
}

var errNobody = refuse(http.StatusNotFound, wire.CodeNotFound, "no device has all that was asked for; \"deimos device list\" shows groups and labels")

// set changes group and labels of all that are meant, or of none if one of them
// cannot be.
func (r *registry) set(ctx context.Context, q api.DeviceChange) ([]wire.DeviceID, error) {
	var group string
	if q.SetGroup != nil {
		group = *q.SetGroup
	}
	if err := checkPlace(group, q.SetLabels); err != nil {
		return nil, err
	}
	if q.SetGroup == nil && len(q.SetLabels) == 0 && len(q.RemoveLabels) == 0 {
		return nil, refuse(http.StatusBadRequest, wire.CodeBadBody, "say what to change: a group, labels to set, or labels to remove")
	}
	devices, err := r.selected(q.Selector)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if err := place(&d, q); err != nil && !errors.Is(err, errUnchanged) {
			return nil, err
		}
	}
	ids := []wire.DeviceID{}
	defer func() { about(ctx, ids...) }()
	for _, d := range devices {
		_, err := r.rows.change(ctx, string(d.ID), func(v *api.DeviceRecord, exists bool) error {
			if !exists || v.Retired {
				return errUnchanged
			}
			return place(v, q)
		})
		if err != nil && len(ids) > 0 {
			return nil, partly(fmt.Sprintf("%d of %d devices were changed, up to %s", len(ids), len(devices), ids[len(ids)-1]), err)
		}
		if err != nil {
			return nil, err
		}
		ids = append(ids, d.ID)
	}
	return ids, nil
}

// place gives one record its new group and labels.
func place(v *api.DeviceRecord, q api.DeviceChange) error {
	group, labels := v.Group, maps.Clone(v.Labels)
	if q.SetGroup != nil {
		group = *q.SetGroup
	}
	for _, k := range q.RemoveLabels {
		delete(labels, k)
	}
	if labels == nil {
		labels = make(map[string]string)
	}
	maps.Copy(labels, q.SetLabels)
	switch {
	case len(labels) > maxLabels:
		return errTooManyLabels
	case group == v.Group && maps.Equal(labels, v.Labels):
		return errUnchanged
	}
	v.Group, v.Labels = group, labels
	return nil
}

// mayRetire refuses to send away a device without which something cannot be read any
// more.
func (c *Coordinator) mayRetire(id wire.DeviceID) error {
	if !c.reg.member(id) {
		return nil // who is none is told so; a repeat is none of this
	}
	n, names := c.repairs.lastCopies(id)
	if n == 0 {
		return nil
	}
	return refuse(http.StatusConflict, "last_copies", "device %s has the last copies of %s, of %s: drain it first (\"deimos device drain %s\"), or give them up with --force", id, chunksOf(n), strings.Join(names, ", "), id)
}

// retire sends a device away for ever. From the moment that the record is
// written nothing lets it in: broker, data plane and renewal ask the record.
// Then it is cut off, and what it had is settled. A call that failed after the
// record can be repeated; the coordinator goes on by itself at its next start.
func (c *Coordinator) retire(ctx context.Context, id wire.DeviceID) (api.DeviceRecord, error) {
	if _, err := wire.ParseDeviceID(string(id)); err != nil {
		return api.DeviceRecord{}, refuse(http.StatusNotFound, wire.CodeNotFound, "%v", err)
	}
	d, err := c.reg.rows.change(ctx, string(id), func(v *api.DeviceRecord, exists bool) error {
		switch {
		case !exists:
			return refuse(http.StatusNotFound, wire.CodeNotFound, "there is no device %s; \"deimos device list\" shows all", id)
		case v.Retired:
			return errUnchanged
		}
		v.Retired, v.RetiredAt = true, c.now().UTC()
		return nil
	})
	if err != nil {
		return d, err
	}
	ctx, cancel := c.outlive(ctx)
	defer cancel()
	if err := c.eng.Disconnect(ctx, id); err != nil {
		return d, err
	}
	c.log.Info("device retired", "device", id)
	return c.settle(ctx, id)
}

// settle ends what a retired device had to do, and counts what it held as lost.
func (c *Coordinator) settle(ctx context.Context, id wire.DeviceID) (api.DeviceRecord, error) {
	if err := c.outbox.retire(ctx, id); err != nil {
		return api.DeviceRecord{}, err
	}
	var ids []string
	for _, ch := range c.storage.held(id) {
		ids = append(ids, ch.ID)
	}
	if err := c.storage.lost(ctx, id, ids); err != nil {
		return api.DeviceRecord{}, err
	}
	var now bool
	d, err := c.reg.rows.change(ctx, string(id), func(v *api.DeviceRecord, exists bool) error {
		now = exists && !v.Settled
		if !now {
			return errUnchanged
		}
		v.Settled = true
		return nil
	})
	if err == nil && now {
		c.note(ctx, api.LogEntry{Actor: "coordinator", Action: "device.settle", Targets: []string{string(id)}})
	}
	return d, err
}

// keepMembers does until ctx ends what membership needs from time to time.
func (c *Coordinator) keepMembers(ctx context.Context) {
	t := time.NewTicker(pendingSweep)
	defer t.Stop()
	for {
		c.settleRest(ctx)
		c.waiting.sweep(ctx, c.reg.known, c.log)
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// settleRest goes on where a retirement was cut off. One that has just begun may
// be settled twice, which is no harm.
func (c *Coordinator) settleRest(ctx context.Context) {
	var rest []wire.DeviceID
	c.reg.rows.each(func(_ string, d api.DeviceRecord) bool {
		if d.Retired && !d.Settled {
			rest = append(rest, d.ID)
		}
		return true
	})
	for _, id := range rest {
		if _, err := c.settle(ctx, id); err != nil {
			if ctx.Err() == nil {
				c.log.Warn("what a retired device had could not all be settled; it will be tried again", "device", id, "error", err)
			}
			return
		}
	}
}

// cutOffRetired ends the connections of devices that the registry finds retired.
func (c *Coordinator) cutOffRetired(ctx context.Context) {
	for {
		select {
		case id := <-c.reg.cut:
			if err := c.eng.Disconnect(ctx, id); err != nil && ctx.Err() == nil {
				c.log.Warn("a retired device could not be cut off; it will be tried again when it says something", "device", id, "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// starts is what is remembered of the starts of one device's agent, to find two
// machines with one key. Every start has an instance of its own, so one that
// comes back after another took its place still runs, beside it.
//
// A broker can repeat and delay hellos, and must not get a device into trouble
// by that. So a hello counts only if, by the device's own signed and trusted
// clock, it was said after all that was heard before, the hello of the other
// instance included: of one agent after the other, the first can say nothing
// later than the second. One that was said before is stale: nothing that is known
// is changed by it. A hello without a trusted time cannot be placed, and counts,
// unless its instance has said a time since or another took its place.
type starts struct {
	seen   []start   // the newest last, at most maxStarts
	latest time.Time // newest trusted time of all
}

type start struct {
	instance uint64    // hash
	trusted  time.Time // newest trusted time that it said; zero: none
}

const (
	maxStarts = 8
	// maxAhead is how far a device's clock may be before ours and still count.
	maxAhead = 5 * time.Minute
)

var startSeed = maphash.MakeSeed()

// hello takes in a hello and tells whether it shows two machines, or is stale.
func (s *starts) hello(p wire.Presence, now time.Time) (twins, stale bool) {
	if p.Instance == "" {
		return false, false // a program that does not say
	}
	if s.latest.After(now.Add(maxAhead)) {
		s.latest = time.Time{} // our own clock was wrong then
	}
	var at time.Time
	if p.TimeConfidence == wire.ClockTrusted && p.At.Before(now.Add(maxAhead)) {
		at = p.At
	}
	h := maphash.String(startSeed, p.Instance)
	i := slices.IndexFunc(s.seen, func(v start) bool { return v.instance == h })
	last := len(s.seen) - 1
	later := !at.IsZero() && at.After(s.latest)
	switch {
	case !at.IsZero() && !later:
		return false, true
	case i < 0:
		if len(s.seen) == maxStarts {
			s.seen = slices.Delete(s.seen, 0, 1)
		}
		s.seen = append(s.seen, start{h, at})
	case i == last:
		if p.TimeConfidence != wire.ClockTrusted && !s.seen[i].trusted.IsZero() {
			return false, true // an agent that knows the time does not forget it
		}
		if later {
			s.seen[i].trusted = at
		}
	case later:
		twins = !s.seen[last].trusted.IsZero()
		s.seen = append(slices.Delete(s.seen, i, i+1), start{h, at})
	default:
		return false, true // late, or repeated
	}
	if later {
		s.latest = at
	}
	return twins, false
}

const (
	warningLife  = 24 * time.Hour // without another observation
	warningWrite = time.Minute    // the time of the last observation is kept so often
	helloWrite   = time.Minute    // and so is the time of the newest hello
)

var duplicateKey = api.Warning{Code: api.WarningDuplicateKey, Title: "two machines use this device's key",
	Text: "Two running agents have said hello with this key, in turn. Somebody has copied the agent's state folder, or a disk image with one in it, or the key was stolen. " +
		"Stop the copy, remove its state folder and enrol it anew; if you do not know of one, retire this device. " +
		"Until a day has passed without the other, the device gets no new chunks and no jobs."}

// warn puts a warning on a record, or notes that it was observed again. isNew is
// for what has to be said once.
func warn(d *api.DeviceRecord, w api.Warning, now time.Time) (changed, isNew bool) {
	d.Warnings = slices.DeleteFunc(d.Warnings, func(old api.Warning) bool { return now.Sub(old.Last) >= warningLife })
	i := slices.IndexFunc(d.Warnings, func(old api.Warning) bool { return old.Code == w.Code })
	if i < 0 {
		w.Since, w.Last = now, now
		d.Warnings = append(d.Warnings, w)
		return true, true
	}
	if now.Sub(d.Warnings[i].Last) < warningWrite {
		return false, false
	}
	d.Warnings[i].Last = now
	return true, false
}

// standing tells whether a warning holds now.
func standing(d api.DeviceRecord, code string, now time.Time) bool {
	return slices.ContainsFunc(d.Warnings, func(w api.Warning) bool { return w.Code == code && now.Sub(w.Last) < warningLife })
}
