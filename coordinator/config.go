package coordinator

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// configs is the fleet's side of the devices' configuration. There is a
// document for the fleet, for groups and for devices; for one device they are
// laid over each other:
//
//	fleet < group < device
//
// # Versions
//
// A device's version is a count on its own record (configRow), beside the
// values that it stands for. Whoever finds that the documents give other values
// than the record's puts the new ones there, under the next number, by
// compare-and-set. So it grows with every change that touches the device, be it
// a value set, one unset, or another group, and with no other; two versions with
// the same values never follow each other. Documents are emptied, never
// deleted: a record notes which revision of them it was made from, and a
// coordinator whose copy of a document is older than that reads it again before
// it changes anything. A device that says hello with a higher number than its
// record's has outlived a loss of the coordinator's state: the count goes on
// from the device's.
//
// # Delivery
//
// The record also names the order that carries the version, before there is
// one: the outbox makes it once, whoever asks and however often. Older
// config.apply orders of the device that are still open are ended as
// superseded, so at most one waits for a device that is away. The device's
// answer is kept on the record. When a device says hello with an older version
// and its order has ended, it gets another; with the same values not before the
// last is configAgain old, and a hello that is repeated, by whomever, counts once.
//
// All this is one function, [configs.settle], that can be run for a device at
// any time. What could have changed something only notes the device.
type configs struct {
	docs   *table[configDoc]
	rows   *table[configRow]
	reg    *registry
	outbox *outbox
	now    func() time.Time
	log    *slog.Logger

	mu     sync.Mutex
	groups map[wire.DeviceID]string
	beats  map[wire.DeviceID]time.Duration // that devices report
	dirty  map[wire.DeviceID]greeting
	early  map[wire.DeviceID]greeting // for which it is too soon; the next look is by run
	said   map[wire.DeviceID]lastHello
	wake   chan struct{} // capacity 1: there is something dirty
}

// lastHello is the one that counted.
type lastHello struct {
	session string
	at      time.Time
}

// greeting is what a device said in its hello, if it said one.
type greeting struct {
	hello   bool
	version uint64
	early   string // the order that was too young when it was said
}

// configDoc is the document of one scope.
type configDoc struct {
	Scope   api.ConfigScope            `json:"scope"`
	Values  map[string]json.RawMessage `json:"values"`
	Updated time.Time                  `json:"updated"`
}

// configRow is what is wanted of one device, and its word on that.
type configRow struct {
	Version uint64                     `json:"version"`
	Values  map[string]json.RawMessage `json:"values"`
	Sources map[string]uint64          `json:"sources"` // document → revision that the values were made from
	Order   string                     `json:"order"`   // that carries Version
	Ended   string                     `json:"ended"`   // the last Order whose end is taken in below
	State   wire.State                 `json:"state,omitempty"`
	Reason  string                     `json:"reason,omitempty"`
	// Reported is the device's newest report, also of an older version.
	Reported *api.ConfigReported `json:"reported,omitempty"`
}

const (
	configRetry    = 5 * time.Second // after the state store failed
	configAgain    = time.Minute     // until the same values may go out again
	maxConfigKeys  = 64              // in one document
	maxConfigKey   = 64              // bytes
	maxConfigValue = 256             // bytes; three documents fit an order many times over
	maxVersion     = 1 << 53         // beyond, JSON numbers are not exact
)

func newConfigs(reg *registry, o *outbox, now func() time.Time, log *slog.Logger) *configs {
	return &configs{reg: reg, outbox: o, now: now, log: log, groups: make(map[wire.DeviceID]string),
		beats: make(map[wire.DeviceID]time.Duration), dirty: make(map[wire.DeviceID]greeting), early: make(map[wire.DeviceID]greeting), said: make(map[wire.DeviceID]lastHello), wake: make(chan struct{}, 1)}
}

const fleetKey = "fleet"

// keyOf is where a scope's document is. Groups may be called what they like.
func keyOf(s api.ConfigScope) string {
	switch {
	case s.Device != "":
		return "device." + string(s.Device)
	case s.Group != "":
		return "group." + base64.RawURLEncoding.EncodeToString([]byte(s.Group))
	}
	return fleetKey
}

// scopesOf is whose documents a device goes by, the later over the earlier.
func scopesOf(d api.DeviceRecord) []api.ConfigScope {
	s := []api.ConfigScope{{}}
	if d.Group != "" {
		s = append(s, api.ConfigScope{Group: d.Group})
	}
	return append(s, api.ConfigScope{Device: d.ID})
}

// layer is one document as it was at a revision; 0 if there is none.
type layer struct {
	key string
	doc configDoc
	rev uint64
}

// layers reads a device's documents: from the copy, or afresh from the bucket.
func (s *configs) layers(ctx context.Context, d api.DeviceRecord, fresh bool) ([]layer, error) {
	var out []layer
	for _, scope := range scopesOf(d) {
		l := layer{key: keyOf(scope)}
		if fresh {
			ctx, cancel := context.WithTimeout(ctx, storeTimeout)
			var err error
			l.doc, l.rev, _, err = s.docs.load(ctx, l.key, true)
			cancel()
			if err != nil {
				return nil, err
			}
		} else {
			l.doc, l.rev = s.docs.at(l.key)
		}
		l.doc.Scope = scope
		out = append(out, l)
	}
	return out, nil
}

// at is get with the revision.
func (t *table[T]) at(key string) (T, uint64) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	r := t.rows[key]
	return r.v, r.rev
}

func merged(layers []layer) map[string]json.RawMessage {
	values := make(map[string]json.RawMessage)
	for _, l := range layers {
		maps.Copy(values, l.doc.Values)
	}
	return values
}

func sameValues(a, b map[string]json.RawMessage) bool {
	return maps.EqualFunc(a, b, func(x, y json.RawMessage) bool { return bytes.Equal(x, y) })
}

// trackDoc notes the devices of a document that changes; it is the table's onEach.
func (s *configs) trackDoc(_ string, v configDoc, gone bool) {
	if gone {
		return
	}
	if v.Scope.Device != "" {
		s.touch(v.Scope.Device)
		return
	}
	for _, d := range s.inScope(v.Scope) {
		s.touch(d)
	}
}

// inScope lists the devices that a document is for.
func (s *configs) inScope(scope api.ConfigScope) []wire.DeviceID {
	var sel api.Selector
	if scope.Device != "" {
		sel.Devices = []wire.DeviceID{scope.Device}
	}
	if scope.Group != "" {
		sel.Groups = []string{scope.Group}
	}
	var out []wire.DeviceID
	s.reg.rows.each(func(_ string, d api.DeviceRecord) bool {
		if sel.Matches(d) {
			out = append(out, d.ID)
		}
		return true
	})
	return out
}

// trackDevice notes devices that are new to this coordinator or change their
// group; it is called for every change of a device's record.
func (s *configs) trackDevice(d api.DeviceRecord, gone bool) {
	s.mu.Lock()
	old, known := s.groups[d.ID]
	if gone || d.Retired {
		delete(s.groups, d.ID)
		delete(s.said, d.ID)
		delete(s.early, d.ID)
		s.mu.Unlock()
		return
	}
	s.groups[d.ID] = d.Group
	s.mu.Unlock()
	if !known || old != d.Group {
		s.touch(d.ID)
	}
}

// trackRow keeps the heartbeat intervals that devices report; it is the table's onEach.
func (s *configs) trackRow(key string, v configRow, gone bool) {
	var seconds float64
	if !gone && v.Reported != nil {
		_ = json.Unmarshal(v.Reported.Running[wire.SettingBeat], &seconds) // what is no number counts as none
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if limits, _ := wire.SettingOf(wire.SettingBeat); seconds >= 1 && seconds <= limits.Max {
		s.beats[wire.DeviceID(key)] = time.Duration(seconds * float64(time.Second))
	} else {
		delete(s.beats, wire.DeviceID(key))
	}
}

// beat is the heartbeat interval that a device reports; 0 if it reports none.
func (s *configs) beat(d wire.DeviceID) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.beats[d]
}

// touch has a device settled soon.
func (s *configs) touch(d wire.DeviceID) { s.note(d, greeting{}) }

// hello is told of every verified hello. One counts if it is newer than the last
// or of another session.
func (s *configs) hello(p wire.Presence) {
	s.mu.Lock()
	last, any := s.said[p.Device]
	counts := !any || p.Session != last.session || p.At.After(last.at)
	if counts {
		s.said[p.Device] = lastHello{p.Session, p.At}
		delete(s.early, p.Device)
	}
	s.mu.Unlock()
	if counts {
		s.note(p.Device, greeting{hello: true, version: p.ConfigVersion})
	}
}

// heard is told of every verified report that is kept.
func (s *configs) heard(r wire.Report) {
	if row, ok := s.rows.get(string(r.Device)); ok && r.State.Terminal() && row.Order == r.Order {
		s.touch(r.Device)
	}
}

func (s *configs) note(d wire.DeviceID, g greeting) {
	s.mu.Lock()
	if g.hello || !s.dirty[d].hello {
		s.dirty[d] = g
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run settles what was noted, one device after the other, until ctx ends.
func (s *configs) run(ctx context.Context) {
	t := time.NewTicker(configAgain / 4)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			s.mu.Lock()
			early := s.early
			s.early = make(map[wire.DeviceID]greeting)
			s.mu.Unlock()
			for d, g := range early {
				s.later(d, g)
			}
			continue
		case <-s.wake:
		}
		s.mu.Lock()
		todo := s.dirty
		s.dirty = make(map[wire.DeviceID]greeting)
		s.mu.Unlock()
		for d, g := range todo {
			err := s.settle(ctx, d, g)
			if err == nil {
				delete(todo, d)
				continue
			}
			if ctx.Err() != nil {
				return
			}
			s.log.Warn("the configuration of devices cannot be settled; it will be tried again", "device", d, "left", len(todo), "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(configRetry):
			}
			for d, g := range todo {
				s.later(d, g)
			}
			break
		}
	}
}

// later notes a device again, unless it has said hello anew.
func (s *configs) later(d wire.DeviceID, g greeting) {
	s.mu.Lock()
	newer := s.dirty[d].hello
	s.mu.Unlock()
	if !newer {
		s.note(d, g)
	}
}

// settle makes true for one device what the type's comment says.
func (s *configs) settle(ctx context.Context, id wire.DeviceID, g greeting) error {
	d, ok := s.reg.rows.get(string(id))
	if !ok || d.Retired || g.version >= maxVersion {
		return nil
	}
	if err := s.takeEnd(ctx, id); err != nil {
		return err
	}
	row, err := s.want(ctx, d, g)
	if err != nil || row.Version == 0 {
		return err
	}
	if row.Ended == row.Order {
		return nil
	}
	if err := s.supersede(ctx, id, row.Order); err != nil {
		return err
	}
	if _, open := s.outbox.rows.get(orderKeyOf(id, row.Order)); open {
		return nil
	}
	_, err = s.outbox.submitAs(ctx, row.Order, id, wire.KindConfigApply, wire.ConfigApply{Version: row.Version, Values: row.Values}, kindOf(wire.KindConfigApply).life)
	return err
}

// takeEnd takes in how the order of the record has ended, if it has.
func (s *configs) takeEnd(ctx context.Context, id wire.DeviceID) error {
	row, ok := s.rows.get(string(id))
	if !ok || row.Order == "" || row.Ended == row.Order {
		return nil
	}
	if _, open := s.outbox.rows.get(orderKeyOf(id, row.Order)); open {
		return nil
	}
	o, err := s.outbox.get(ctx, id, row.Order)
	if errors.Is(err, errNotFound) {
		return nil // it was not made yet
	}
	if err != nil || !o.State.Terminal() {
		return err
	}
	_, err = s.rows.change(ctx, string(id), func(v *configRow, exists bool) error {
		if !exists || v.Order != row.Order || v.Ended == row.Order {
			return errUnchanged
		}
		v.Ended, v.State, v.Reason = row.Order, o.State, o.Result.Reason
		var r wire.ConfigReport
		if o.State == wire.Succeeded && json.Unmarshal(o.Result.Body, &r) == nil {
			v.Reported = &api.ConfigReported{ConfigReport: presentable(r), At: o.Updated}
		}
		return nil
	})
	return err
}

// presentable is a device's report, fit for a record and a terminal.
func presentable(r wire.ConfigReport) wire.ConfigReport {
	out := wire.ConfigReport{Version: min(r.Version, maxVersion), Running: make(map[string]json.RawMessage), Refused: make(map[string]wire.Refusal)}
	for k, v := range r.Running {
		if len(out.Running) < 3*maxConfigKeys && label(k) == k && len(v) <= maxConfigValue {
			out.Running[k] = v
		}
	}
	for k, v := range r.Refused {
		if len(out.Refused) < 3*maxConfigKeys && label(k) == k {
			out.Refused[k] = wire.Refusal{Code: label(v.Code), Reason: sentence(v.Reason)}
		}
	}
	return out
}

var errStale = errors.New("a newer document is known to the record")

// want brings a device's record up to what its documents say, and gives it a
// new order if the device has to be told.
func (s *configs) want(ctx context.Context, d api.DeviceRecord, g greeting) (configRow, error) {
	const tries = 3 // the copy, the bucket, and the bucket's last word
	for try := 0; ; try++ {
		layers, err := s.layers(ctx, d, try > 0)
		if err != nil {
			return configRow{}, err
		}
		values := merged(layers)
		if row, ok := s.rows.get(string(d.ID)); !ok && len(values) == 0 && g.version == 0 {
			return row, nil
		} else if ok && sameValues(row.Values, values) && (!g.behind(row) || s.tooSoon(d.ID, row, g)) {
			return row, nil
		}
		row, err := s.rows.change(ctx, string(d.ID), func(v *configRow, exists bool) error {
			same := exists && sameValues(v.Values, values)
			switch {
			case same && !g.behind(*v):
				return errUnchanged
			case same && g.version <= v.Version: // the same again
			case !same && try < tries-1 && newer(v.Sources, layers):
				return errStale
			default:
				v.Version = max(v.Version, g.version) + 1
			}
			v.Values, v.Order, v.State, v.Reason = values, ulid.Make().String(), "", ""
			v.Sources = make(map[string]uint64, len(layers))
			for _, l := range layers {
				v.Sources[l.key] = l.rev
			}
			return nil
		})
		if !errors.Is(err, errStale) {
			return row, err
		}
	}
}

// tooSoon tells whether the last order with a record's values is too young for
// another with the same, and if so, sees to it that the greeting is looked at
// again.
func (s *configs) tooSoon(d wire.DeviceID, row configRow, g greeting) bool {
	id, err := ulid.ParseStrict(row.Order)
	if err != nil || g.early != "" && g.early != row.Order && g.version <= row.Version {
		return err == nil // what it was to get has come another way
	}
	if s.now().Sub(id.Timestamp()) >= configAgain {
		return false
	}
	g.early = row.Order
	s.mu.Lock()
	s.early[d] = g
	s.mu.Unlock()
	return true
}

// behind tells whether a device that greets like this has to be given an order
// though nothing else has changed.
func (g greeting) behind(v configRow) bool {
	return g.hello && (g.version > v.Version || g.version < v.Version && v.Ended == v.Order)
}

// newer tells whether a record was made from a newer revision of one of layers.
func newer(sources map[string]uint64, layers []layer) bool {
	return slices.ContainsFunc(layers, func(l layer) bool { return sources[l.key] > l.rev })
}

// supersede ends what is still open of older config.apply orders. Ids of orders
// sort by the time at which they were made.
func (s *configs) supersede(ctx context.Context, d wire.DeviceID, current string) error {
	for _, id := range s.outbox.openOf(d) {
		if row, ok := s.outbox.rows.get(orderKeyOf(d, id)); !ok || row.Kind != wire.KindConfigApply || id >= current {
			continue
		}
		if err := s.outbox.end(ctx, d, id, wire.Canceled, wire.CodeSuperseded, "a newer configuration took its place before the device had answered"); err != nil {
			return err
		}
	}
	return nil
}

// change is an operator's change of one document.
func (s *configs) change(ctx context.Context, q api.ConfigChange) (api.ConfigDocument, error) {
	if err := q.CheckChange(); err != nil {
		return api.ConfigDocument{}, refuse(http.StatusBadRequest, wire.CodeBadBody, "%v", err)
	}
	about(ctx, target(q.ConfigScope))
	if err := s.checkScope(q.ConfigScope, s.reg.selected); err != nil {
		return api.ConfigDocument{}, err
	}
	set, err := checkValues(q)
	if err != nil {
		return api.ConfigDocument{}, err
	}
	doc, err := s.docs.change(ctx, keyOf(q.ConfigScope), func(v *configDoc, exists bool) error {
		old := maps.Clone(v.Values)
		if v.Values == nil {
			v.Values = make(map[string]json.RawMessage)
		}
		for _, key := range q.Unset {
			if _, isSet := v.Values[key]; !isSet {
				if _, known := wire.SettingOf(key); !known {
					return refuse(http.StatusUnprocessableEntity, "unknown_setting", "%v", wire.UnknownSetting(key))
				}
			}
			delete(v.Values, key)
		}
		maps.Copy(v.Values, set)
		switch {
		case len(v.Values) > maxConfigKeys:
			return refuse(http.StatusUnprocessableEntity, wire.CodeLimit, "a configuration has at most %d values", maxConfigKeys)
		case sameValues(old, v.Values):
			return errUnchanged
		}
		v.Scope, v.Updated = q.ConfigScope, s.now().UTC()
		return nil
	})
	return s.document(q.ConfigScope, doc), err
}

// target is what the log calls a scope.
func target(s api.ConfigScope) string {
	switch {
	case s.Device != "":
		return cutText(string(s.Device), maxLoggedText)
	case s.Group != "":
		return "group:" + cutText(s.Group, maxLoggedText)
	}
	return "fleet"
}

// checkScope refuses a scope that there cannot be; resolve finds the device. A
// group may be empty: its devices are perhaps still to come.
func (s *configs) checkScope(scope api.ConfigScope, resolve func(api.Selector) ([]api.DeviceRecord, error)) error {
	switch {
	case scope.Device != "" && scope.Group != "":
		return refuse(http.StatusBadRequest, "bad_scope", "name a device or a group, not both: each has a configuration of its own")
	case scope.Device != "":
		_, err := resolve(api.Selector{Devices: []wire.DeviceID{scope.Device}})
		return err
	case label(scope.Group) != scope.Group:
		return refuse(http.StatusBadRequest, "bad_scope", "a group's name has at most %d printable bytes", maxLabel)
	}
	return nil
}

// checkValues gives the values of a change in their one form.
func checkValues(q api.ConfigChange) (map[string]json.RawMessage, error) {
	if len(q.Set)+len(q.Unset) == 0 {
		return nil, refuse(http.StatusBadRequest, wire.CodeBadBody, "nothing is set or unset")
	}
	set := make(map[string]json.RawMessage, len(q.Set))
	for key, raw := range q.Set {
		if slices.Contains(q.Unset, key) {
			return nil, refuse(http.StatusBadRequest, wire.CodeBadBody, "%.64s is set and unset at once", label(key))
		}
		known, ok := wire.SettingOf(key)
		switch {
		case ok:
			clean, err := known.Check(raw)
			if err != nil {
				return nil, refuse(http.StatusUnprocessableEntity, "bad_value", "%v", err)
			}
			set[key] = clean
		case !q.Force:
			return nil, refuse(http.StatusUnprocessableEntity, "unknown_setting", "%v; agents that are newer than this coordinator may know it: set it with --force", wire.UnknownSetting(key))
		case api.CheckLabel(key, "") != nil || len(key) > maxConfigKey:
			return nil, refuse(http.StatusUnprocessableEntity, "bad_value", "%.64q cannot be a setting: its name has letters, digits, '.', '_' and '-', %d at most", key, maxConfigKey)
		default:
			var b bytes.Buffer
			if err := json.Compact(&b, raw); err != nil || b.Len() > maxConfigValue {
				return nil, refuse(http.StatusUnprocessableEntity, "bad_value", "the value of %s is not JSON of at most %d bytes", key, maxConfigValue)
			}
			set[key] = b.Bytes()
		}
	}
	return set, nil
}

func (s *configs) document(scope api.ConfigScope, v configDoc) api.ConfigDocument {
	values := maps.Clone(v.Values)
	if values == nil {
		values = make(map[string]json.RawMessage)
	}
	return api.ConfigDocument{ConfigScope: scope, Values: values, Updated: v.Updated, Devices: len(s.inScope(scope))}
}

// view is what an operator sees of one device.
func (s *configs) view(ctx context.Context, d api.DeviceRecord) (api.DeviceConfig, error) {
	v := api.DeviceConfig{Device: d.ID, Group: d.Group, State: api.ConfigNone, Values: make(map[string]api.ConfigValue)}
	layers, err := s.layers(ctx, d, false)
	if err != nil {
		return v, err
	}
	for _, l := range layers {
		from, _, _ := strings.Cut(l.key, ".")
		for key, raw := range l.doc.Values {
			v.Values[key] = api.ConfigValue{Value: raw, From: from}
		}
	}
	row, ok := s.rows.get(string(d.ID))
	if !ok {
		if len(v.Values) > 0 {
			v.State = api.ConfigWaiting // it is being settled
		}
		return v, nil
	}
	v.Wanted, v.Order, v.Reported = row.Version, row.Order, row.Reported
	if v.State, v.Reason = s.stateOf(ctx, d.ID, row); !sameValues(merged(layers), row.Values) {
		v.State, v.Reason = api.ConfigWaiting, "" // it is being settled
	}
	return v, nil
}

func (s *configs) stateOf(ctx context.Context, d wire.DeviceID, row configRow) (api.ConfigState, string) {
	state, reason := row.State, row.Reason
	if row.Ended != row.Order {
		if _, open := s.outbox.rows.get(orderKeyOf(d, row.Order)); open {
			return api.ConfigWaiting, ""
		}
		o, err := s.outbox.get(ctx, d, row.Order)
		if err != nil || o.State == wire.Succeeded || !o.State.Terminal() {
			return api.ConfigWaiting, "" // it is being settled
		}
		state, reason = o.State, o.Result.Reason
	}
	switch {
	case state != wire.Succeeded:
		return api.ConfigFailed, fmt.Sprintf("%s: %s", state, reason)
	case row.Reported != nil && len(row.Reported.Refused) > 0:
		return api.ConfigPartly, ""
	}
	return api.ConfigApplied, ""
}

func (c *Coordinator) configRoutes() []route {
	scope := []param{{"device", "of this device", ""}, {"group", "of this group; with neither, of the fleet", ""}}
	return []route{
		{method: "GET", path: v1 + "/config/settings", needs: toRead, summary: "What can be configured", out: []wire.Setting{}, handle: func(w http.ResponseWriter, _ *http.Request) error {
			writeJSON(w, http.StatusOK, wire.Settings())
			return nil
		}},
		{method: "GET", path: v1 + "/config", needs: toRead, summary: "What is wanted of the fleet, a group or a device", out: api.ConfigDocument{}, query: scope, handle: c.getConfig},
		{method: "PATCH", path: v1 + "/config", needs: toOperate, summary: "Set and unset configuration", in: api.ConfigChange{}, out: api.ConfigDocument{},
			handle: answer(func(r *http.Request, q api.ConfigChange) (api.ConfigDocument, error) {
				return c.config.change(r.Context(), q)
			})},
		{method: "GET", path: v1 + "/config/devices", needs: toRead, summary: "Which configuration devices run, and what they refuse", out: []api.DeviceConfig{},
			query: []param{{"device", "this one; may be repeated", []string{}}, {"group", "of this group; may be repeated", []string{}}, {"label", "with this label, key=value; may be repeated", []string{}},
				pageAfter, pageLimit(api.MaxConfigPage)}, handle: c.deviceConfigs},
	}
}

func (c *Coordinator) getConfig(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	scope := api.ConfigScope{Device: wire.DeviceID(q.Get("device")), Group: q.Get("group")}
	if err := c.config.checkScope(scope, c.reg.shown); err != nil {
		return err
	}
	doc, _ := c.config.docs.get(keyOf(scope))
	writeJSON(w, http.StatusOK, c.config.document(scope, doc))
	return nil
}

func (c *Coordinator) deviceConfigs(w http.ResponseWriter, r *http.Request) error {
	sel, err := api.ParseSelector(r.URL.Query())
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_selector", "%v", err)
	}
	p, err := parsePage(r.URL.Query(), api.MaxConfigPage)
	if err != nil {
		return err
	}
	devices, err := c.reg.shown(sel)
	if err != nil {
		return err
	}
	out := []api.DeviceConfig{}
	for _, d := range p.of(devices) {
		v, err := c.config.view(r.Context(), d)
		if err != nil {
			return err
		}
		out = append(out, v)
	}
	writeJSON(w, http.StatusOK, out)
	return nil
}
