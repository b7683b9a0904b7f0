package coordinator

import (
	"cmp"
	"context"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
	"github.com/oklog/ulid/v2"
)

// maxWarningText is how much of a warning's text is kept, in bytes.
const maxWarningText = 512

// cleanWarnings is what a device says is wrong with it, fit for memory and a
// terminal: each thing once, the worst first.
func cleanWarnings(list []wire.Warning, now time.Time) []wire.Warning {
	var out []wire.Warning
	type thing struct{ code, subject string }
	seen := make(map[thing]bool)
	for _, w := range list[:min(len(list), wire.MaxWarnings)] {
		w.Code, w.Subject, w.Title = label(w.Code), label(w.Subject), label(w.Title)
		if w.Text = sentence(w.Text); len(w.Text) > maxWarningText {
			w.Text = cutText(w.Text, maxWarningText)
		}
		if w.Title == "" {
			w.Title = strings.ReplaceAll(w.Code, "_", " ")
		}
		if api.Rank(w.Severity) == 0 {
			w.Severity = wire.Info
		}
		if w.Since.After(now) {
			w.Since = now // its clock is wrong
		}
		if t := (thing{w.Code, w.Subject}); w.Code != "" && !seen[t] {
			seen[t] = true
			out = append(out, w)
		}
	}
	slices.SortStableFunc(out, func(a, b wire.Warning) int { return cmp.Compare(api.Rank(b.Severity), api.Rank(a.Severity)) })
	return out
}

// listed is a device's view as it stands in a list: without what is long.
func listed(v api.Device) api.Device {
	v.Telemetry, v.Scrubs = nil, nil
	v.HealthMore = max(len(v.Health)-api.MaxListedHealth, 0)
	v.Health = slices.Clone(v.Health[:len(v.Health)-v.HealthMore]) // that of the view is everybody's
	for i := range v.Health {
		v.Health[i].Text = ""
	}
	return v
}

// parseTrouble reads the parameter of a list that leaves out who is well.
func parseTrouble(s string) (bool, error) {
	switch s {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	}
	return false, refuse(http.StatusBadRequest, "bad_trouble", "trouble is true or false, not %q", label(s))
}

// healthOf counts what members say is wrong with them.
type healthOf struct {
	kinds map[string]*api.HealthCount // by code
	see   []api.Attention
}

// count takes in one member.
func (h *healthOf) count(s *api.Status, d api.Device) {
	if d.HealthAt.IsZero() {
		return
	}
	switch d.Worst() {
	case wire.Critical:
		s.Devices.Critical++
	case wire.Trouble:
		s.Devices.Troubled++
	}
	codes := make(map[string]bool)
	for _, w := range d.Health {
		if w.Severity == wire.Critical {
			h.see = append(h.see, aboutDevice(d.ID, w.Code, api.Brief(w)))
		}
		if codes[w.Code] {
			continue // another disk of the same device
		}
		codes[w.Code] = true
		k := h.kinds[w.Code]
		if k == nil {
			if len(h.kinds) >= maxHealthKinds {
				continue
			}
			k = &api.HealthCount{Code: w.Code, Title: w.Title, Severity: w.Severity}
			h.kinds[w.Code] = k
		}
		k.Devices++
		if api.Rank(w.Severity) > api.Rank(k.Severity) {
			k.Severity = w.Severity
		}
	}
}

// maxHealthKinds bounds what a fleet can make us count: codes are its devices' words.
const maxHealthKinds = 1000

// most is the most frequent kinds of warnings.
func (h *healthOf) most() []api.HealthCount {
	out := make([]api.HealthCount, 0, len(h.kinds))
	for k := range maps.Values(h.kinds) {
		out = append(out, *k)
	}
	slices.SortFunc(out, func(a, b api.HealthCount) int {
		return cmp.Or(cmp.Compare(b.Devices, a.Devices), cmp.Compare(api.Rank(b.Severity), api.Rank(a.Severity)), cmp.Compare(a.Code, b.Code))
	})
	return out[:min(len(out), api.MaxHealthCounts)]
}

// troubled tells whether something worse than [wire.Info] is wrong with a device.
func (r *registry) troubled(d api.DeviceRecord) bool {
	return api.Rank(r.view(d).Worst()) > api.Rank(wire.Info)
}

// limits of what is asked of a device
const (
	maxSeries    = 64 // of one request
	maxOpenAsked = 8  // requests of one kind that wait for a device
)

// identify has a device blink, or stop.
func (c *Coordinator) identify(ctx context.Context, id wire.DeviceID, q api.IdentifyRequest) (api.Order, error) {
	if q.Seconds < 0 || q.Seconds > wire.MaxIdentify {
		return api.Order{}, refuse(http.StatusBadRequest, wire.CodeBadBody, "a device shows itself for 1 to %d seconds, or 0 to stop, not %d", wire.MaxIdentify, q.Seconds)
	}
	return c.askDevice(ctx, id, wire.KindIdentify, wire.Identify{Seconds: q.Seconds})
}

// askHistory asks a device for what it has measured.
func (c *Coordinator) askHistory(ctx context.Context, id wire.DeviceID, q wire.HistoryRequest) (api.Order, error) {
	bad := func(format string, args ...any) (api.Order, error) {
		return api.Order{}, refuse(http.StatusBadRequest, wire.CodeBadBody, format, args...)
	}
	switch {
	case q.Points < 0 || q.Points > wire.MaxPoints:
		return bad("a curve has 1 to %d points, not %d", wire.MaxPoints, q.Points)
	case !q.From.IsZero() && !q.To.IsZero() && !q.From.Before(q.To):
		return bad("the time that is asked for ends before it begins")
	case len(q.Series) > maxSeries:
		return bad("at most %d series can be named; \"cpu*\" means all that begin so", maxSeries)
	}
	for _, s := range q.Series {
		if s == "" || label(s) != s {
			return bad("%q cannot be the name of a series", label(s))
		}
	}
	return c.askDevice(ctx, id, wire.KindHistory, q)
}

// askDevice makes an order that somebody waits for. It does not pile them up for
// a device that is away.
func (c *Coordinator) askDevice(ctx context.Context, id wire.DeviceID, k wire.Kind, body any) (api.Order, error) {
	d, err := c.reg.device(id)
	if err != nil {
		return api.Order{}, err
	}
	if d.Retired {
		return api.Order{}, errAway(id)
	}
	if n := c.outbox.openOfKind(id, k); n >= maxOpenAsked {
		return api.Order{}, refuse(http.StatusTooManyRequests, "too_many_open", "device %s has %d such orders to answer yet; wait for their end (\"deimos order list --pending --device %s\")", id, n, id)
	}
	order, err := c.outbox.submit(ctx, id, k, body, kindOf(k).life)
	if err != nil {
		return api.Order{}, err
	}
	about(ctx, order.ID)
	v, err := c.outbox.get(ctx, id, order.ID)
	return v.view(), err
}

// openOfKind counts the open orders of one kind of a device.
func (o *outbox) openOfKind(d wire.DeviceID, k wire.Kind) (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if l := o.lines[d]; l != nil {
		for _, p := range l.orders {
			if p.kind == k {
				n++
			}
		}
	}
	return n
}

// openFrom tells whether a device has an open order of a kind that was made by then.
func (o *outbox) openFrom(d wire.DeviceID, k wire.Kind, by time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if l := o.lines[d]; l != nil {
		for id, p := range l.orders {
			if u, err := ulid.ParseStrict(id); p.kind == k && (err != nil || !ulid.Time(u.Time()).After(by)) {
				return true
			}
		}
	}
	return false
}
